"""Do maps and questions pull the model the same way? Cosine of their gradients, before post-training.

    python -m experiments.cosine out/reproduce      reads the bases and arms of experiments.reproduce

A table: for each proxy the cosine between its gradient and that of the questions, by block, mean over
seeds; beside it what the arm gained. Aligned gradients are said to predict which task helps another
(OmniTaskonomy, Ge et al.: r = .53 to .80). `questions`: the same with other pictures, what sampling
alone leaves of a cosine of 1.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import model
import train
from experiments.report import UNDERSTANDING, collect, difference, paired, points, table
from experiments.reproduce import PROXY_ARMS

BATCHES, PICTURES = 8, 16        # of a gradient; its batches are none that post-training sees

def gradient(run, ask: int, proxies: int, first: int) -> list:
    """Of the mean loss of BATCHES batches, one vector per block."""
    run.umm.zero_grad()
    for step in range(first, first + BATCHES):
        train.umm_losses(run, step, ask, 0, proxies)['loss'].backward()
    return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in run.umm.blocks]

def cosines(base: Path) -> dict:
    """{proxy: cosine with the questions' gradient [n_layer + 1], by block and of all}"""
    tok, umm, text, _, meta = model.load(base)
    s = train.Settings(**meta['settings'])
    world = train.open_world(s.data, s.size, s.seed, 'cpu', text, s.skip_bad)
    run = SimpleNamespace(s=s, world=world, tok=tok, umm=umm, device=torch.device('cpu'))
    asked, out = gradient(run, PICTURES, 0, 2**24), {}
    for name in ('questions', *(p for p in PROXY_ARMS if p in world.targets)):
        s.proxy = name
        how = (PICTURES, 0) if name == 'questions' else (0, PICTURES)
        g = gradient(run, *how, 2**24 + BATCHES)
        pairs = [*zip(asked, g), (torch.cat(asked), torch.cat(g))]
        out[name] = [F.cosine_similarity(a, b, 0).item() for a, b in pairs]
    return out

def main(out: Path):
    found = collect(out)
    bases = sorted(out.glob('seed*/base/pretrained.safetensors'))
    measured = [cosines(base) for base in bases]
    rows, xy = [], []
    for name in measured[0]:
        values = np.array([m[name] for m in measured])                                # [seeds,n_layer+1]
        whole, gain = paired(values[:, -1]), difference(found, name, 'sft', UNDERSTANDING)
        spread = '' if whole['low'] is None else f" [{whole['low']:+.3f}, {whole['high']:+.3f}]"
        rows.append([name, *(f'{v:+.3f}' for v in values.mean(0)[:-1]), f"{whole['value']:+.3f}{spread}",
                     points(gain)])
        xy += [(whole['value'], gain['value'])] * (gain['value'] is not None)
    blocks = [f'block {i}' for i in range(1, len(rows[0]) - 2)]
    print(table(('gradient of', *blocks, 'all blocks', 'understanding - sft'), rows))
    if len(xy) > 2:
        r = np.corrcoef(*zip(*xy))[0, 1]
        print(f'\n{len(bases)} seeds; correlation of cosine and gain over {len(xy)} proxies: {r:+.2f}')

if __name__ == '__main__':
    data.guard(lambda: main(Path(sys.argv[1] if len(sys.argv) > 1 else 'out/reproduce')))
