"""The losses of a run of train.py, drawn beside what a guess would reach.

    python -m experiments.losses out/cpu        losses.png of a run of train.py: "is my loss normal?"
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
import model
from data import UserError
from experiments.report import INK, world_of

@torch.no_grad()
def losses(run: Path):
    """losses.png: each loss of a run by step; a uniform guess (ln V, ln K) and the entropy of the
    unigram frequencies, what a model that ignores all context could reach, beside it."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('losses.png needs matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    tok, umm, text, _, meta = model.load(run / 'model.safetensors')
    proxy, s = meta['settings']['proxy'], meta['settings']
    world = world_of(s, text)
    entropy = lambda ids: torch.special.entr(ids.bincount() / ids.numel()).sum().item()
    lines = [json.loads(x) for x in (run / 'log.jsonl').read_text().splitlines()]
    V, K, shown = umm.c.vocab, umm.c.codebook, {}      # a folder may lack captions, questions, masks
    if any('text' in x for x in lines):
        shown['text'] = V, world.questions('val', 0, 128, s['questions'])[0].target
    if any('draw' in x for x in lines):
        seq, drawn = world.drawings('val', 1, 128)
        shown |= {'plan': (V, seq.target), 'draw': (K, tok.encode(drawn))}
    if any(proxy in x for x in lines):
        shown[proxy] = K, tok.encode(world.proxies('val', 2, 128, proxy)[1])
    if not shown:
        raise UserError(f'{run}/log.jsonl holds no losses: train longer than --log_every steps')
    fig, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.6), sharey=True)
    for ax, (name, (size, ids)) in zip(axes, shown.items()):
        step = lambda x: (x['stage'] == 'posttrain') * s['pre_steps'] + x['step']
        points = [(step(x), x[name]) for x in lines if name in x]
        ax.plot(*zip(*points), color=INK['seg'], lw=1)
        ax.axhline(np.log(size), color='black', lw=.8, ls='--',
                   label=f'uniform guess: {np.log(size):.2f}')
        frequent = entropy(ids[ids >= 0])
        ax.axhline(frequent, color='black', lw=.8, ls=':', label=f'unigram entropy: {frequent:.2f}')
        ax.axvline(s['pre_steps'], color='#999999', lw=.6)
        ax.set_title(name, loc='left')
        ax.set_xlabel('step (line: posttrain begins)')
        ax.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel('loss, nats')
    fig.savefig(run / 'losses.png', bbox_inches='tight', dpi=130)
    plt.close(fig)
    print(f'wrote {run}/losses.png')

if __name__ == '__main__':
    data.guard(lambda: losses(Path(sys.argv[1] if len(sys.argv) > 1 else 'out/cpu')))
