"""Labels or generation? The figure of the plans `channel` and `budget`; what is known without shapes.

    python -m experiments.labels scores.json --out labels.png    of a scores.json of reproduce
    python -m experiments.labels --bound                                     prints the shape-blind bound

Left: validation accuracy against what training has cost. Right: what each channel gains over questions
alone at equal FLOPs, by group of questions. Arms differ in colour, in the marker and in the dashes.
"""
import argparse
import random
from collections import Counter
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import numpy as np

from data import QUESTIONS, SHAPES, UserError, World
from experiments import figures, report
from experiments.channels import GFLOPS

# arm: (label, colour, marker, dashes); colours of Okabe and Ito: colour-blind people can tell them apart
STYLES = {
    'sft-flops': ('questions alone', '#000000', 'o', '-'),
    'told-flops': ('told in words', '#999999', 'X', ':'),
    'readout-flops': ('read out', '#D55E00', 's', '-'),
    'seg-order': ('generated in order', '#0072B2', '^', '--'),
    'seg-masked': ('generated masked', '#56B4E9', 'v', '--'),
    'seg-blind': ('generated blind', '#009E73', 'D', '-.'),
    'seg': ('mixture (train.py)', '#CC79A7', 'P', '-.'),
}
LONG = {'sft-flops': 'sft-x3-flops', 'readout-flops': 'readout-x3', 'seg-order': 'order-x3',
        'seg-blind': 'blind-x3', 'seg-masked': 'masked-x3'}
COST = {'sft-flops': GFLOPS['sft'], 'sft-x3-flops': GFLOPS['sft'], 'told-flops': GFLOPS['seg-told'],
        'readout-flops': GFLOPS['seg-readout'], 'readout-x3': GFLOPS['seg-readout']}
# Accuracy of one who knows all of a scene but its shapes; printed by --bound
SHAPE_BLIND = {'count': .88, 'colour': .76, 'shape': .19, 'exist': .68, 'relation': .79, 'depth': .81,
               'distance': .81, 'where': .87, 'size': .94, 'what': .23}


# ---- the shape-blind bound ----
def without_shapes(scene: data.Scene, rng: random.Random) -> data.Scene:
    """The same scene with other shapes, no (colour, shape) twice; what may be counted stays."""
    while True:
        objects = [o._replace(shape=rng.choice(SHAPES)) for o in scene.objects]
        if len({o.name for o in objects}) == len(objects):
            return data.Scene(objects, scene.theme)


def guess_without_shapes(scene, kind: str, words, rng: random.Random, enough=15, tries=20_000):
    """The likeliest answer over scenes that differ in their shapes alone: of `enough` of those in which
    the question is asked in these words. None where it never is."""
    answers = Counter()
    for _ in range(tries):
        found = QUESTIONS[kind].ask(without_shapes(scene, rng), rng)
        if found and list(found[0]) == list(words):
            answers[found[1]] += 1
        if answers.total() == enough:
            break
    return answers.most_common(1)[0][0] if answers else None


def shape_blind(n=300) -> dict:
    """{type of question: accuracy without knowing shapes}, by simulation of n test scenes."""
    scenes, _, _ = World(32).scenes('test', 'shape blind', 0, n, pixels=False)
    rng = random.Random(0)
    bound = {}
    for kind in data.VISUAL:
        right = total = 0
        for scene in scenes:
            found = QUESTIONS[kind].ask(scene, rng)
            if not found:
                continue
            words, answer = found
            total += 1
            right += guess_without_shapes(scene, kind, words, rng) == answer
        bound[kind] = right / total
    return bound


# ---- the figure ----
def cost_curve(result: dict) -> list:
    """[(TFLOPs of post-training so far, validation accuracy)]."""
    cost = COST.get(result['arm'], GFLOPS['seg-order'])
    return [(step * cost / 1e3, value) for step, value in report.curve_of(result, 'mean')]


def draw_costs(ax, found):
    """Validation accuracy against cost, the longest run of each channel."""
    for arm, (label, ink, mark, dashes) in STYLES.items():
        by_seed = found.get(LONG.get(arm), found.get(arm))
        if not by_seed:
            continue
        curves = [cost_curve(result) for result in by_seed.values()]
        x, mean, half = figures.over_seeds(curves)
        ax.errorbar(x, mean, half, color=ink, marker=mark, ls=dashes, ms=4, lw=1.3, elinewidth=.7,
                    label=f'{label} ({len(curves)} seeds)')
    bound = np.mean(list(SHAPE_BLIND.values()))
    ax.axhline(bound, color='black', lw=.8, ls=':')
    ax.text(ax.get_xlim()[0], bound, ' one who knows all but shapes', va='bottom', fontsize=7)
    ax.set(xlabel='TFLOPs of post-training', ylabel='validation accuracy')
    ax.legend(fontsize=7, loc='upper left')


def arms_of(found) -> dict:
    """{arm of STYLES: the one whose gains are drawn}: the short runs, or where there are none the long
    ones. UserError where there are neither."""
    short = {arm: arm for arm in STYLES}
    for arms in (short, LONG):
        if {arms['sft-flops'], arms['seg-order']} <= found.keys():
            return arms
    raise UserError('the figure needs the arms sft-flops and seg-order, or sft-x3-flops and order-x3; '
                    f"there are: {', '.join(found)}")


def draw_gains(ax, found):
    """Points above questions alone at equal FLOPs, by group."""
    arms = arms_of(found)
    other, generated = arms['sft-flops'], arms['seg-order']
    looks = {}
    for channel, arm in arms.items():
        if arm in found and arm != other:
            looks[arm] = STYLES[channel][:3]                   # without the dashes
    groups = report.GROUPS
    paths = [('understanding', kinds) for kinds in groups.values()]
    figures.side_by_side(ax, found, paths, other, looks)
    names = ['\n'.join([f'{group}:', *kinds]) for group, kinds in groups.items()]
    ax.set_xticks(range(len(groups)), names, fontsize=7)
    ax.set_ylabel('points above questions alone')
    steps = next(iter(found[generated].values()))['steps']
    seeds = figures.seeds_of(found, looks)
    ax.set_title(f'{steps:,} steps, equal FLOPs, test split, {seeds}', loc='left', fontsize=9)


def figure(found, path: Path):
    """Both panels."""
    plt = figures.pyplot()
    plt.rcParams.update(figures.LOOK)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    draw_costs(left, found)
    left.set_title('Labels or generation? (bars: 95% t intervals over seeds)', loc='left', fontsize=9)
    draw_gains(right, found)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('scores', nargs='?', type=Path, help='scores.json of experiments.reproduce')
    p.add_argument('--out', type=Path, default='labels.png', help='default labels.png')
    p.add_argument('--bound', action='store_true', help='print what can be known without shapes')
    a = p.parse_args()
    if a.bound:
        for kind, accuracy in shape_blind().items():
            print(f'{kind}: {accuracy:.2f}')
        return
    if a.scores is None or not a.scores.is_file():
        raise UserError(f'no file of scores: {a.scores}; name one, as experiments.reproduce writes it')
    found = report.collect(a.scores)
    if not report.has_groups(found):
        raise UserError(f'{a.scores} is not of the procedural world, whose questions the figure groups')
    figure(found, a.out)
    print(f'wrote {a.out}')


if __name__ == '__main__':
    data.guard(main)
