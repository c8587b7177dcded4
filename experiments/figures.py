"""Figures and pictures of experiments.reproduce: gains, curves, sweeps, targets, samples, as PNG files.

Figures need matplotlib; pictures of what the arms draw do not. The scores are those that report.collect
gives.
"""
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import numpy as np
import torch

import eval as evaluation
import model
import sample
from data import UserError
from experiments.report import UNDERSTANDING, baseline, curve_of, difference, names_of, t_quantile
from experiments.restoration import RESTORATIONS
from folder import open_world

LOOK = {                         # of all figures
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.frameon': False,
    'savefig.bbox': 'tight',
    'savefig.dpi': 130,
}
# The arms in the figures, in this order; those that teach a map have its colour.
INK = {'none': '#999999', 'sft': '#000000', **{name: m.colour for name, m in data.MAPS.items()},
       **{name: colour for name, (_, colour) in RESTORATIONS.items()}, 'shuffled': '#7f4f24'}
MARK = dict(zip(INK, 'Xosv^DPp<d>*.hH8+x1234'))          # more than are needed: maps may be added
# panel of sweeps.png: {label on the x axis: arm}; each arm is compared with its baseline()
SWEEPS = {
    'maps for each picture with questions': {
        '0': 'sft', '0.5': 'ratio-0.5', '1': 'ratio-1', '1.5': 'ratio-1.5', '2': 'seg',
        '2.5': 'ratio-2.5', '3': 'ratio-3'},
    'distinct pictures with maps': {
        '0': 'sft', '100': 'scale-100', '400': 'scale-400', '1600': 'scale-1600', 'endless': 'seg'},
    'distinct pictures with questions': {
        '200': 'seg-asked-200', '800': 'seg-asked-800', 'endless': 'seg'},
}


# ---- figures ----
def pyplot():
    """matplotlib.pyplot, which draws into files; UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('figures need matplotlib: pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def bars(effects) -> tuple[list, list]:
    """Effects in points (nan: none) and half-widths of intervals (0: none), as errorbar takes them."""
    middle, half = [], []
    for e in effects:
        middle.append(np.nan if e['value'] is None else 100 * e['value'])
        if e['low'] is None or e['n'] < 3:
            half.append(0)
        else:
            half.append(100 * (e['value'] - e['low']))
    return middle, half


def seeds_of(found, shown) -> str:
    """How many seeds the arms have: '3 seeds' or '3 to 5 seeds'."""
    counts = [len(found[arm]) for arm in shown]
    least, most = min(counts), max(counts)
    return f'{most} seeds' if least == most else f'{least} to {most} seeds'


def panels_of(found) -> dict:
    """Of SWEEPS the arms that are finished; a panel of more than the main comparison's."""
    panels = {}
    for title, arms in SWEEPS.items():
        kept = {}
        for x, arm in arms.items():
            if arm in found and baseline(arm) in found:
                kept[x] = arm
        if set(kept.values()) - {'sft', 'seg'}:
            panels[title] = kept
    return panels


def sweep(ax, found, arms: dict):
    """One panel: the seeds that all its arms have."""
    seeds = None
    for arm in arms.values():
        both = found[arm].keys() & found[baseline(arm)].keys()
        seeds = both if seeds is None else seeds & both
    kept = {}
    for arm, by_seed in found.items():
        kept[arm] = {seed: result for seed, result in by_seed.items() if seed in seeds}
    labels, effects = [], []
    for x, arm in arms.items():
        e = difference(kept, arm, baseline(arm), UNDERSTANDING)
        if e['n']:
            labels.append(f"{x}\nn={e['n']}")
            effects.append(e)
    at = range(len(effects))
    middle, half = bars(effects)
    ax.errorbar(at, middle, half, fmt='s-', color=INK['seg'], ms=4, lw=1, capsize=2)
    ax.axhline(0, color='black', lw=.7)
    ax.set_xticks(at, labels)


def sweeps(out: Path, found):
    """sweeps.png: understanding above questions alone against what each sweep varies."""
    plt = pyplot()
    panels = panels_of(found)
    if not panels:
        return
    size = (3.4 * len(panels), 2.8)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, (title, arms) in zip(axes[0], panels.items()):
        sweep(ax, found, arms)
        ax.set_xlabel(title)
    axes[0, 0].set_ylabel('points above questions alone')
    fig.suptitle('Segmentation, understanding, test split; 95% t intervals, n = seeds', x=.1, ha='left')
    fig.savefig(out / 'sweeps.png')
    plt.close(fig)


def side_by_side(ax, found, paths: list, other: str, looks: dict):
    """Each arm above the arm `other`, at each of the paths of scores; looks: {arm: (label, colour,
    marker)}."""
    for i, (arm, (label, ink, mark)) in enumerate(looks.items()):
        middle, half = bars([difference(found, arm, other, path) for path in paths])
        beside = (i - (len(looks) - 1) / 2) * .8 / len(looks)
        x = np.arange(len(paths)) + beside
        ax.errorbar(x, middle, half, fmt=mark, color=ink, label=label, ms=5, lw=1, mec='black', mew=.4)
    ax.axhline(0, color='black', lw=.7)


def gains(out: Path, found, shown, part: str, other: str, name: str):
    """Each arm above the arm `other`, by type of question or category."""
    plt = pyplot()
    arms = [arm for arm in shown if arm != other]
    kinds = [kind for kind in names_of(found, part) if kind not in ('verifier', 'ceiling', 'other')]
    fig, ax = plt.subplots(figsize=(max(6, len(kinds) * .95), 3.2))
    looks = {arm: (arm, INK[arm], MARK[arm]) for arm in arms}
    side_by_side(ax, found, [(part, kind) for kind in kinds], other, looks)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_ylabel(f'points above {other}')
    seeds = seeds_of(found, shown)
    ax.set_title(f'{part}, test split: paired differences, 95% t intervals, {seeds}', loc='left')
    ax.legend(ncol=max(1, len(arms)), loc='upper center', bbox_to_anchor=(.5, -.12))
    fig.savefig(out / name)
    plt.close(fig)


def over_seeds(lines: list) -> tuple:
    """lines: a curve of each seed, [(x, y)] -> (x that all of them have, mean of y, half-width of its
    interval, 0 for fewer than three seeds: an interval of two is wider than the figure)."""
    lines = [dict(line) for line in lines]
    common = set(lines[0]).intersection(*lines)
    x = sorted(common)
    y = np.array([[line[i] for i in x] for line in lines])                            # [seeds,n]
    half = np.zeros(len(x))
    if len(lines) > 2:
        error = y.std(0, ddof=1) / len(lines) ** .5
        half = t_quantile(.975, len(lines) - 1) * error
    return x, y.mean(0), half


def draw_curve(ax, arm: str, lines: list):
    """Mean and interval over seeds; lines: a curve of each seed, [(x, y)]."""
    lines = [line for line in lines if line]
    if not lines:
        return
    x, mean, half = over_seeds(lines)
    if len(x) < 2:
        return
    ax.plot(x, mean, MARK[arm] + '-', color=INK[arm], label=arm, ms=4, mec='black', mew=.3)
    if len(lines) > 2:
        ax.fill_between(x, mean - half, mean + half, color=INK[arm], alpha=.12, lw=0)


def curves(out: Path, found, shown, panels: dict, y_label: str, x_label: str, name: str):
    """panels: {title: function of a result -> [(x, y)]}."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.8), squeeze=False)
    for ax, (title, curve) in zip(axes[0], panels.items()):
        for arm in shown:
            draw_curve(ax, arm, [curve(result) for result in found[arm].values()])
        ax.set_title(title, loc='left')
        ax.set_xlabel(x_label)
    axes[0, 0].set_ylabel(y_label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncol=max(1, len(labels)), loc='lower center', bbox_to_anchor=(.5, -.1))
    fig.text(.99, 1.0, f'bands: 95% t intervals, {seeds_of(found, shown)}', ha='right', fontsize=7)
    fig.tight_layout()
    fig.savefig(out / name)
    plt.close(fig)


def by_step(key: str):
    """A function of a result: validation figures by step."""
    return lambda result: curve_of(result, key)


def by_layer(part: str, key: str):
    """A function of a result: scores by layer."""
    return lambda result: list(enumerate(result['scores'][part][key]))


def moved_most(found, shown, other: str, types) -> list:
    """The two types of question in which some arm is farthest from the arm `other`."""

    def farthest(kind):
        effects = [difference(found, arm, other, ('understanding', kind)) for arm in shown]
        return max([abs(e['value']) for e in effects if e['n']], default=0)

    return sorted(types, key=farthest, reverse=True)[:2]


def figures(out: Path, found):
    """gains.png, generation.png, convergence.png; of the procedural world probe.png, attention.png."""
    plt = pyplot()
    plt.rcParams.update(LOOK)
    shown = [arm for arm in INK if arm in found]
    other = 'sft' if 'sft' in found else shown[0]
    gains(out, found, shown, 'understanding', other, 'gains.png')
    gains(out, found, shown, 'generation', other, 'generation.png')
    types = names_of(found, 'understanding')
    chosen = ('shape', 'what')
    if 'shape' not in types:                                   # real pictures
        chosen = moved_most(found, shown, other, types[1:])
    panels = {'mean of visual types': by_step('mean')}
    for kind in chosen:
        panels[kind] = by_step(kind)
    curves(out, found, shown, panels, 'validation accuracy', 'post-training step', 'convergence.png')
    if not names_of(found, 'probe'):                           # of real pictures there are none
        return
    tasks = ('shape', 'colour', 'depth', 'object', 'control')
    panels = {task: by_layer('probe', task) for task in tasks}
    curves(out, found, shown, panels, 'balanced accuracy of a linear probe', 'layer (0 = embedding)',
           'probe.png')
    parts = ('picture', 'asked object', 'draw: position')
    panels = {part: by_layer('attention', part) for part in parts}
    curves(out, found, shown, panels, 'share of attention', 'layer', 'attention.png')


# ---- pictures ----
def world_of(settings: dict):
    """The world that a run was trained on, with the scenes that are the same for all."""
    return open_world(settings.get('data'), settings['size'], 0, 'cpu', None, settings.get('skip_bad'))


def targets(out: Path, world, n=6):
    """targets.png: input pictures and every kind of map."""
    _, r, _ = world.scenes('val', 'maps', 0, n)
    rows, names = [r.image], [['picture']]
    for name in world.maps:
        _, target, _ = world.maps_to_draw('val', 0, n, name)
        rows.append(target)
        names.append([name])
    sample.grid(rows, names, scale=2).save(out / 'targets.png')


def a_model(out: Path, arm: str, by_seed: dict):
    """The checkpoint of an arm's first seed, as model.load gives it; of `none` its base."""
    folder = out / f'seed{min(by_seed)}'
    path = folder / arm / 'state.safetensors'
    if not path.exists():
        path = folder / 'base' / 'pretrained.safetensors'
    return model.load(path)


def wanted_of(world, n: int) -> list[str]:
    """What the arms are asked to draw: a prompt of each category, or the first captions."""
    if world.exact:
        texts = []
        for category in evaluation.CATEGORIES:
            prompts, _, _ = evaluation.prompts(world, category, 1, 'test')
            texts += prompts
        return texts
    scenes, _, rng = world.scenes('test', 'generation', 0, n, pixels=False)
    return [world.describe(scene, 'list', rng) or '' for scene in scenes]


@torch.no_grad()
def samples(out: Path, found, world, n=6):
    """samples.png: for each arm of the first seed, the map it was taught, of the same test pictures, and
    its drawings of the same prompts."""
    _, r, _ = world.scenes('test', 'samples', 0, n)
    rows, names = [r.image], [['test pictures']]
    wanted = wanted_of(world, n)
    for arm in INK:
        if arm not in found:
            continue
        tok, umm, world.text, _, meta = a_model(out, arm, found[arm])
        name = meta['taught']
        if name != 'none':
            s, _, _ = world.maps_to_draw('test', 0, n, name, stream='samples')
            codes = umm.generate(s, temperature=0)
            rows.append(tok.decode(codes))
            names.append([f'{arm}: its map'])
        g = torch.Generator().manual_seed(0)
        codes, _ = model.draw(umm, world.text, wanted, g, cfg=2.)
        rows.append(tok.decode(codes))
        names.append([f'{arm}: "{words}"' for words in wanted])
    if len(rows) > 1:
        sample.grid(rows, names).save(out / 'samples.png')


# ---- all of them ----
def draw_all(out: Path, found):
    """The figures, as far as matplotlib is there, and the pictures."""
    try:
        pyplot()
    except UserError as e:
        print(e)
    else:
        if any(arm in INK for arm in found):
            figures(out, found)
            sweeps(out, found)
    arm, by_seed = next(iter(found.items()))
    _, _, _, _, meta = a_model(out, arm, by_seed)
    world = world_of(meta['settings'])
    targets(out, world)
    samples(out, found, world)
