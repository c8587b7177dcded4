"""Do maps and questions pull the model the same way? Cosine of their gradients, before post-training.

    python -m experiments.cosine out/reproduce      reads the bases and arms of experiments.reproduce

A table: for each kind of map the cosine between its gradient and that of the questions, by block, mean
over seeds; beside it what the arm gained. Aligned gradients are said to predict which task helps another
(OmniTaskonomy, Ge et al.: r = .53 to .80). `questions`: the same with other pictures, what sampling
alone leaves of a cosine of 1.
"""
import argparse
from pathlib import Path
from types import SimpleNamespace

import data  # before torch: it tells OpenMP how to wait
import numpy as np
import torch
import torch.nn.functional as F

import model
import train
from data import UserError
from experiments.report import UNDERSTANDING, collect, difference, paired, points, table
from experiments.reproduce import MAP_ARMS
from folder import open_world

BATCHES = 8                      # of a gradient
PICTURES = 16                    # in each of them
FIRST = 2**24                    # step of the first batch: training sees none of these


def gradient(run, ask: int, maps: int, first: int) -> list:
    """Of the mean loss of BATCHES batches, one vector per block."""
    run.umm.zero_grad()
    for step in range(first, first + BATCHES):
        losses = train.umm_losses(run, step, ask, 0, maps)
        losses['loss'].backward()
    vectors = []
    for block in run.umm.blocks:
        vectors.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    return vectors


def cosines(base: Path) -> dict:
    """{kind of map: cosine with the questions' gradient [n_layer + 1], by block and of all}"""
    tok, umm, text, _, meta = model.load(base)
    s = train.Settings(**meta['settings'])
    world = open_world(s.data, s.size, s.seed, 'cpu', text, s.skip_bad)
    # what umm_losses needs of a Run, without its folder
    run = SimpleNamespace(s=s, world=world, tok=tok, umm=umm, device=torch.device('cpu'),
                          control=train.Control())
    asked = gradient(run, PICTURES, 0, FIRST)
    others = {'questions': gradient(run, PICTURES, 0, FIRST + BATCHES)}
    for name in MAP_ARMS:
        if name in world.maps:
            s.proxy = name
            others[name] = gradient(run, 0, PICTURES, FIRST + BATCHES)
    out = {}
    for name, vectors in others.items():
        values = [F.cosine_similarity(a, b, 0).item() for a, b in zip(asked, vectors)]
        whole = F.cosine_similarity(torch.cat(asked), torch.cat(vectors), 0)
        out[name] = [*values, whole.item()]
    return out


def compare(out: Path):
    """Print the table of a folder of experiments.reproduce."""
    bases = sorted(out.glob('seed*/base/pretrained.safetensors'))
    if not bases:
        raise UserError(f'{out} holds no seed*/base: name the folder of experiments.reproduce')
    found = collect(out)
    measured = [cosines(base) for base in bases]
    rows, alike, gained = [], [], []
    for name in measured[0]:
        values = np.array([by_name[name] for by_name in measured])                    # [seeds,n_layer+1]
        *blocks, _ = values.mean(0)
        whole = paired(values[:, -1])
        gain = difference(found, name, 'sft', UNDERSTANDING)
        cell = f"{whole['value']:+.3f}"
        if whole['low'] is not None:
            cell += f" [{whole['low']:+.3f}, {whole['high']:+.3f}]"
        rows.append([name, *[f'{value:+.3f}' for value in blocks], cell, points(gain)])
        if gain['value'] is not None:
            alike.append(whole['value'])
            gained.append(gain['value'])
    names = [f'block {i}' for i in range(1, len(blocks) + 1)]
    print(table(('gradient of', *names, 'all blocks', 'understanding - sft'), rows))
    if len(alike) > 2:
        r = np.corrcoef(alike, gained)[0, 1]
        print(f'\n{len(bases)} seeds; correlation of cosine and gain over {len(alike)} maps: {r:+.2f}')


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('out', nargs='?', type=Path, default='out/reproduce', help='default %(default)s')
    a = p.parse_args()
    compare(a.out)


if __name__ == '__main__':
    data.guard(main)
