"""The losses of a run of train.py, drawn beside what a uniform guess would reach.

    python -m experiments.losses out/cpu        losses.png of a run of train.py: "is my loss normal?"
"""
import argparse
import json
import math
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait

import model
from data import UserError
from experiments.figures import INK, pyplot


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def points_of(lines: list, name: str, pre_steps: int) -> list:
    """[(step, loss)] of a loss; steps of post-training are counted on from pretraining."""
    points = []
    for line in lines:
        if name not in line:                               # a folder may lack captions, questions, masks
            continue
        before = pre_steps if line['stage'] == 'posttrain' else 0
        points.append((before + line['step'], line[name]))
    return points


def losses(run: Path):
    """losses.png: each loss of a run by step, and beside it that of a uniform guess, ln V or ln K."""
    plt = pyplot()
    _, umm, text, _, meta = model.load(run / 'model.safetensors')
    s = meta['settings']
    lines = read_log(run / 'log.jsonl')
    V, K = text.size, umm.c.codebook
    sizes = {'text': V, 'plan': V, 'draw': K, s['proxy']: K}
    shown = {}
    for name in sizes:
        points = points_of(lines, name, s['pre_steps'])
        if points:
            shown[name] = points
    if not shown:
        raise UserError(f'{run}/log.jsonl holds no losses: train longer than --log_every steps')
    size = (3 * len(shown), 2.6)
    fig, axes = plt.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False)
    for ax, (name, points) in zip(axes[0], shown.items()):
        steps, values = zip(*points)
        guess = math.log(sizes[name])
        ax.plot(steps, values, color=INK['seg'], lw=1)
        ax.axhline(guess, color='black', lw=.8, ls='--', label=f'uniform guess: {guess:.2f}')
        ax.axvline(s['pre_steps'], color='#999999', lw=.6)
        ax.set_title(name, loc='left')
        ax.set_xlabel('step (line: posttrain begins)')
        ax.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel('loss, nats')
    fig.savefig(run / 'losses.png', bbox_inches='tight', dpi=130)
    plt.close(fig)
    print(f'wrote {run}/losses.png')


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('run', nargs='?', type=Path, default='out/cpu', help='default %(default)s')
    a = p.parse_args()
    losses(a.run)


if __name__ == '__main__':
    data.guard(main)
