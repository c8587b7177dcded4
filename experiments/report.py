"""Statistics, verdicts and figures of experiments.reproduce: result.json -> report.md, claims.json, PNG.

Differences are paired by seed, intervals are Student's t, 95%; RULE says what a verdict means. The
paper's "questions alone hurt generation" is not among the claims: here every arm replays drawings, so
the untouched base is no fair baseline for generation.
"""
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import data
import eval as evaluation
import model
from data import UserError
from folder import open_world

MARGIN = .02                     # differences below 2 points are called none
RULE = """\
A claim is *reproduced* if the interval excludes 0 and has the paper's sign, *opposite* if it excludes 0
with the other sign, *not reproduced* if it holds 0 and lies within 2 points of it, else *undecided*.
That reasoning stays as it is counts as reproduced if the interval lies within 2 points of 0, as not
reproduced if it excludes 0. Intervals are Student's t over seeds, not corrected for the number of
claims; the last column says which of the differences survive Holm's correction."""
UNDERSTANDING, GENERATION = ('understanding', 'mean'), ('generation', 'mean')
POSITION = ('generation', 'position')
INK = {'none': '#999999', 'sft': '#000000', 'seg': '#D55E00', 'recon': '#0072B2', 'edge': '#56B4E9',
       'depth': '#009E73', 'instance': '#CC79A7', 'inpaint': '#E69F00', 'denoise': '#F0E442',
       'shuffled': '#7F4F24'}    # Okabe & Ito: told apart by colour-blind readers and in print
MARK = dict(zip(INK, 'Xosv^DPp<d'))
# claim: (arm, minus arm, where in the scores, the paper's effect in points; BAGEL / OmniGen2)
CLAIMS = {
    'segmentation beats questions alone in understanding': ('seg', 'sft', UNDERSTANDING, '+1.8 / +1.1'),
    'segmentation beats edges in understanding': ('seg', 'edge', UNDERSTANDING, '+1.5 / +1.0'),
    'segmentation beats reconstruction in understanding': ('seg', 'recon', UNDERSTANDING, '+1.1 / +0.5'),
    'segmentation beats depth in understanding': ('seg', 'depth', UNDERSTANDING, '+1.0 / +1.0'),
    'classes beat instances without names in understanding': ('seg', 'instance', UNDERSTANDING, '-'),
    'the supervision does it: true maps beat shuffled ones': ('seg', 'shuffled', UNDERSTANDING, '-'),
    'maps beat twice the steps of questions': ('seg', 'sft-long', UNDERSTANDING, '-'),
    'the lead lasts: both after twice the steps': ('seg-long', 'sft-long', UNDERSTANDING, '-'),
    'the trunk must move: frozen blocks lose': ('seg', 'frozen', UNDERSTANDING, '-'),
    'maps matter when few pictures have questions (200)':
        ('seg-asked-200', 'sft-asked-200', UNDERSTANDING, '-'),
    'the same with VQ codes as input': ('seg-code', 'sft-code', UNDERSTANDING, '-'),
    'segmentation leaves text-only reasoning as it is': ('seg', 'sft', ('understanding', 'reason'), '0'),
    'segmentation improves generation over questions alone': ('seg', 'sft', GENERATION, '+3.8 / +4.3'),
    'segmentation improves position in generation': ('seg', 'sft', POSITION, '+4.7 / +6.0'),
    'edges improve position in generation': ('edge', 'sft', POSITION, '+5 / +6'),
    'depth improves position in generation': ('depth', 'sft', POSITION, '+5.7 / +9.0'),
    'shapes become more separable (probe, middle layer)':
        ('seg', 'sft', ('probe', 'shape', 'middle'), 't-SNE'),
    'attention moves to the picture (last layer)':
        ('seg', 'sft', ('attention', 'picture', 'last'), '+7.6%'),
    'segmentation converges faster (accuracy at half time)': ('seg', 'sft', ('half',), 'yes'),
    'a ratio of 2:1 beats 1:1': ('seg', 'ratio-1', UNDERSTANDING, '+0.8 / +1.0'),
    'a ratio of 2:1 beats 3:1': ('seg', 'ratio-3', UNDERSTANDING, '+0.7 / +0.5'),
    'more maps help: endless against 100': ('seg', 'scale-100', UNDERSTANDING, '+0.8 / +0.6')}
# panel of sweeps.png: {label on the x axis: arm}; each arm is compared with its baseline()
SWEEPS = {
    'maps for each picture with questions': {
        '0': 'sft', '0.5': 'ratio-0.5', '1': 'ratio-1', '1.5': 'ratio-1.5', '2': 'seg',
        '2.5': 'ratio-2.5', '3': 'ratio-3'},
    'distinct pictures with maps': {
        '0': 'sft', '100': 'scale-100', '400': 'scale-400', '1600': 'scale-1600', 'endless': 'seg'},
    'distinct pictures with questions': {
        '200': 'seg-asked-200', '800': 'seg-asked-800', 'endless': 'seg'},
    'input pictures': {'patches': 'seg', 'codes': 'seg-code'}}

@lru_cache
def t_table(df: int):
    """Angles and Student's distribution there: t = sqrt(df) tan(a); a has density ~ cos(a)^(df-1)."""
    a = np.linspace(-np.pi / 2, np.pi / 2, 400_001)
    mass = np.cumsum(np.abs(np.cos(a)) ** (df - 1))
    return a, (mass - mass / mass[-1] * mass[0] / 2) / mass[-1]

def t_quantile(p: float, df: int) -> float:
    a, below = t_table(df)
    return float(np.sqrt(df) * np.tan(np.interp(p, below, a)))

def t_below(t: float, df: int) -> float:
    a, below = t_table(df)
    return float(np.interp(np.arctan(t / np.sqrt(df)), a, below))

def paired(differences) -> dict:
    """Mean of paired differences, 95% t interval, two-sided p value; low = high = None for one pair."""
    d, n = np.asarray(differences, float), len(differences)
    out = {'value': float(d.mean()) if n else None, 'low': None, 'high': None, 'p': None, 'n': n}
    if n > 1:
        error = d.std(ddof=1) / n ** .5
        half = t_quantile(.975, n - 1) * error
        p = 2 - 2 * t_below(abs(d.mean()) / max(error, 1e-12), n - 1)
        out |= {'low': float(d.mean() - half), 'high': float(d.mean() + half), 'p': p}
    return out

def verdict(e: dict, no_change=False) -> str:
    """See RULE; no_change: the paper says that nothing moves."""
    if e['low'] is None:
        return 'undecided'
    inside = max(abs(e['low']), abs(e['high'])) < MARGIN
    if no_change:
        return 'reproduced' if inside else 'not reproduced' if e['low'] * e['high'] > 0 else 'undecided'
    if e['low'] > 0:
        return 'reproduced'
    return 'opposite' if e['high'] < 0 else 'not reproduced' if inside else 'undecided'

def holm(ps: list) -> list:
    """Which of the p values (None = no test) stay below .05 after Holm's step-down correction."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    kept = [False] * len(ps)
    for rank, (p, i) in enumerate(order):
        if p > .05 / (len(order) - rank):
            break
        kept[i] = True
    return kept

def look_up(result: dict, path: tuple):
    """A score by its path; layers by 'middle' or 'last'; 'half': validation accuracy at half time."""
    if path == ('half',):
        curve = [(x['step'], x['val']['mean']) for x in result['log'] if x['stage'] == 'posttrain']
        return dict(curve).get(result['steps'] // 2)
    value = result['scores']
    for key in path:
        if value is None:
            return None
        if key in ('middle', 'last'):
            value = value[len(value) // 2 if key == 'middle' else -1]
        else:
            value = value.get(key)
    return value['value'] if isinstance(value, dict) else value

def collect(out: Path) -> dict:
    """{arm: {seed: result}} of all finished arms."""
    found = {}
    for path in sorted(out.glob('seed*/*/result.json')):
        r = json.loads(path.read_text())
        if r['scores']:
            found.setdefault(r['arm'], {})[r['seed']] = r
    for r in (runs := [r for by_seed in found.values() for r in by_seed.values()]):
        if r['plan'] != runs[0]['plan']:
            raise UserError(f"{out} mixes {r['arm']} (plan {r['plan']}) with {runs[0]['arm']} (plan "
                            f"{runs[0]['plan']}): delete the folders of one of the two kinds")
    if not found:
        raise UserError(f'no finished arm under {out}: run python -m experiments.reproduce first')
    return found

def difference(found, arm, other, path):
    """Paired differences over the seeds that both arms finished."""
    seeds = sorted(found.get(arm, {}).keys() & found.get(other, {}).keys())
    values = [(look_up(found[arm][s], path), look_up(found[other][s], path)) for s in seeds]
    return paired([a - b for a, b in values if a is not None and b is not None])

def claims_of(found) -> list[dict]:
    rows = []
    for claim, (arm, other, path, paper) in CLAIMS.items():
        e = difference(found, arm, other, path)
        if e['n']:
            rows.append({'claim': claim, 'effect': e['value'], 'low': e['low'], 'high': e['high'],
                         'p': e['p'], 'seeds': e['n'], 'arms': f'{arm} - {other}', 'paper': paper,
                         'verdict': verdict(e, no_change=paper == '0')})
    for row, kept in zip(rows, holm([None if r['paper'] == '0' else r['p'] for r in rows])):
        row['survives_holm'] = kept
    return rows

def table(head, rows) -> str:
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---'] * len(head), *rows])

def baseline(arm: str) -> str:
    """The arm of questions alone that differs from `arm` in its maps only."""
    return arm.replace('seg', 'sft') if arm.startswith('seg-') else 'sft'

def names_of(found, first: str) -> list:
    """What was measured of understanding, generation or segmentation, in the order of eval.py."""
    return list(dict.fromkeys(k for by_seed in found.values() for r in by_seed.values()
                              for k in r['scores'].get(first, ())))

def points(e) -> str:
    """An effect in percentage points with its interval."""
    if e['value'] is None:
        return '-'
    tail = '' if e['low'] is None else f" [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]"
    return f"{100 * e['value']:+.1f}{tail}"

def bars(effects) -> tuple[list, list]:
    """Effects in points (nan: none) and half-widths of intervals (0: none), as errorbar takes them."""
    return ([np.nan if e['value'] is None else 100 * e['value'] for e in effects],
            [0 if e['low'] is None or e['n'] < 3 else 100 * (e['value'] - e['low']) for e in effects])

def report(out: Path):
    """Write report.md, claims.json and the figures of all finished arms under `out`."""
    found = collect(out)
    claims = claims_of(found)
    (out / 'claims.json').write_text(json.dumps(claims, indent=1) + '\n')
    m = sum(c['p'] is not None and c['paper'] != '0' for c in claims)
    parts = [f'# Claims\n\n{m} differences tested, paired by seed, in points.\n{RULE}\n',
             table(('claim', 'arms', 'effect', 'seeds', 'paper', 'verdict', 'after Holm'),
                   [(c['claim'], c['arms'], points(c | {'value': c['effect']}), c['seeds'], c['paper'],
                     c['verdict'], 'holds' if c['survives_holm'] else '-') for c in claims])]
    for title in ('Understanding', 'Generation', 'Segmentation', 'Probe', 'Attention'):
        first, rows, layer = title.lower(), [], ('last',) * (title in ('Probe', 'Attention'))
        if not (names := names_of(found, first)):
            continue
        for arm, by_seed in found.items():
            values = [[look_up(r, (first, k, *layer)) for r in by_seed.values()] for k in names]
            if None not in values[0]:
                rows.append([arm, len(by_seed),
                             *(f'{np.mean([x for x in v if x is not None]):.3f}'
                               if any(x is not None for x in v) else '-' for v in values),
                             points(difference(found, arm, baseline(arm), (first, names[0], *layer)))])
        parts.append(f"\n# {title}{', last layer' * len(layer)}: mean over seeds, test split\n\n" +
                     table(('arm', 'seeds', *names, f'{names[0]} - sft*'), rows))
    seconds = [r['seconds'] for by_seed in found.values() for r in by_seed.values()]
    parts.append("\n\\* `sft-asked-N`, `sft-code` and `sft-long` for the `seg-` arms of these kinds.\n\n"
                 f'{len(seconds)} runs, {sum(seconds) / 3600:.1f} hours of one process, '
                 'without the bases.')
    (out / 'report.md').write_text('\n'.join(parts) + '\n')
    try:
        import matplotlib
    except ImportError:
        print('no figures: pip install matplotlib')
    else:
        matplotlib.use('Agg')
        if any(arm in INK for arm in found):
            figures(out, found)
            sweeps(out, found)
    world = world_of(a_model(out, found)[4]['settings'])
    targets(out, world)
    samples(out, found, world)
    print(parts[0] + '\n' + parts[1] + f'\n\nwrote {out}/report.md, claims.json, figures')

def world_of(settings: dict, text=None):
    """The world that a run was trained on, with the scenes that are the same for all."""
    return open_world(settings.get('data'), settings['size'], 0, 'cpu', text, settings.get('skip_bad'))

def targets(out: Path, world, n=6):
    """targets.png: input pictures, the target of every proxy; of a restoration its spoilt input too."""
    rows, names = [], []
    for name in world.targets:
        s, target, r = world.proxies('val', 0, n, name)
        spoilt = name in data.SPOIL
        rows += [r.image] * (not rows) + [s.image if spoilt else target]
        names += ['picture'] * (not names) + [f"{name}: input" if spoilt else name]
    evaluation.grid(rows, [[name] for name in names], scale=2).save(out / 'targets.png')

def a_model(out: Path, found):
    """The checkpoint of the first seed of the first arm, as model.load gives it; of `none` its base."""
    arm, by_seed = next(iter(found.items()))
    path = out / f'seed{min(by_seed)}' / arm / 'state.safetensors'
    return model.load(path if path.exists() else path.parents[1] / 'base/pretrained.safetensors')

@torch.no_grad()
def samples(out: Path, found, world, n=6):
    """samples.png: for each arm of the first seed, the map it was taught, of the same test pictures, and
    its drawings of the same prompts."""
    rows, names = [], []
    for arm in [a for a in INK if a in found]:
        tok, umm, world.text, _, meta = a_model(out, {arm: found[arm]})
        settings = meta['settings']
        proxy = settings['proxy'] if meta['stage'] == 'posttrain' and arm != 'none' else 'none'
        s, _, r = world.proxies('test', 2**21, n, proxy if proxy != 'none' else 'recon')
        if not rows:
            rows, names = [r.image], [['test pictures']]
            wanted = [evaluation.prompts(world, c, 1, 'test')[0][0] for c in evaluation.CATEGORIES] \
                if not settings.get('data') else [row['caption'] for row in world.rows['test'][:n]]
        if proxy != 'none':
            if proxy in data.SPOIL:
                rows.append(s.image)
                names.append([f'{arm}: what it reads'])
            s.image = umm.inputs(tok, s.image)
            rows.append(tok.decode(umm.generate(s, temperature=0)))
            names.append([f'{arm}: its map'])
        codes, _ = model.draw(umm, world.text, wanted, torch.Generator().manual_seed(0), cfg=2.)
        rows.append(tok.decode(codes))
        names.append([f'{arm}: "{w}"' for w in wanted])
    if rows:
        evaluation.grid(rows, names, scale=3).save(out / 'samples.png')

def sweeps(out: Path, found):
    """sweeps.png: understanding above questions alone against what each sweep varies; a panel shows the
    seeds that all its arms have."""
    import matplotlib.pyplot as plt
    known = found.keys() - {'sft', 'seg'}
    panels = {title: {x: a for x, a in arms.items() if a in found and baseline(a) in found}
              for title, arms in SWEEPS.items()}
    panels = {title: arms for title, arms in panels.items() if known & set(arms.values())}
    if not panels:
        return
    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8), sharey=True,
                             squeeze=False)
    for ax, (title, arms) in zip(axes[0], panels.items()):
        seeds = set.intersection(*(found[a].keys() & found[baseline(a)].keys() for a in arms.values()))
        kept = {a: {s: r for s, r in by_seed.items() if s in seeds} for a, by_seed in found.items()}
        es = [(x, difference(kept, arm, baseline(arm), UNDERSTANDING)) for x, arm in arms.items()]
        es = [(x, e) for x, e in es if e['n']]
        at, up = bars([e for _, e in es])
        ax.errorbar(range(len(es)), at, up, fmt='s-', color=INK['seg'], ms=4, lw=1, capsize=2)
        ax.axhline(0, color='black', lw=.7)
        ax.set_xticks(range(len(es)), [f"{x}\nn={e['n']}" for x, e in es])
        ax.set_xlabel(title)
    axes[0, 0].set_ylabel('points above questions alone')
    fig.suptitle('Segmentation, understanding, test split; 95% t intervals, n = seeds', x=.1, ha='left')
    fig.savefig(out / 'sweeps.png')
    plt.close(fig)

def projected(out: Path, found):
    """projection.png: object patches in the plane of their first two principal components, by arm."""
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(found), figsize=(2.4 * len(found), 2.6), squeeze=False)
    for ax, (arm, by_seed) in zip(axes[0], found.items()):
        p = by_seed[min(by_seed)]['scores']['projection']
        xy, kind = np.array(p['xy']), np.array(p['shape'])
        for k, (name, mark, ink) in enumerate(zip(data.SHAPES, 'os^P*', INK.values())):
            ax.scatter(*xy[kind == k].T, s=9, marker=mark, color=ink, label=name, lw=0, alpha=.8)
        ax.set(title=arm, xticks=[], yticks=[])
    fig.legend(*axes[0, 0].get_legend_handles_labels(), ncol=5, loc='lower center',
               bbox_to_anchor=(.5, -.06))
    fig.suptitle('Object patches of test scenes, middle layer, first two principal components '
                 '(one seed)', x=.12, y=1.03, ha='left', fontsize=9)
    fig.savefig(out / 'projection.png')
    plt.close(fig)

def gains(out: Path, found, shown, first: str, base: str, name: str):
    """Each arm above `base`, by type of question or category."""
    import matplotlib.pyplot as plt
    arms = [a for a in shown if a != base]
    names = [k for k in names_of(found, first) if k not in ('verifier', 'ceiling', 'other')]
    fig, ax = plt.subplots(figsize=(max(6, len(names) * .95), 3.2))
    for i, arm in enumerate(arms):
        es = [difference(found, arm, base, (first, k)) for k in names]
        x = np.arange(len(names)) + (i - (len(arms) - 1) / 2) * .8 / len(arms)
        ax.errorbar(x, *bars(es), fmt=MARK[arm], color=INK[arm], label=arm, ms=5, lw=1, mec='black',
                    mew=.4)
    ax.axhline(0, color='black', lw=.7)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel(f'points above {base}')
    ax.set_title(f'{first}, test split: paired differences, 95% t intervals, '
                 f'{seeds_of(found, shown)}', loc='left')
    ax.legend(ncol=max(1, len(arms)), loc='upper center', bbox_to_anchor=(.5, -.12))
    fig.savefig(out / name)
    plt.close(fig)

def seeds_of(found, shown) -> str:
    counts = sorted({len(found[a]) for a in shown})
    return ' to '.join(map(str, sorted({counts[0], counts[-1]}))) + ' seeds'

def curves(out: Path, found, shown, panels: dict, y_label: str, x_label: str, name: str):
    """panels: {title: function of a result -> [(x, y)]}; mean and interval over seeds, by arm."""
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.8), squeeze=False)
    for ax, (title, curve) in zip(axes[0], panels.items()):
        for arm in shown:
            lines = [dict(curve(r)) for r in found[arm].values() if curve(r)]
            x = sorted(set.intersection(*map(set, lines))) if lines else []
            y = np.array([[line[i] for i in x] for line in lines])
            if len(x) > 1:
                ax.plot(x, y.mean(0), MARK[arm] + '-', color=INK[arm], label=arm, ms=4, mec='black',
                        mew=.3)
                if len(lines) > 2:                # an interval of two is wider than the figure
                    h = t_quantile(.975, len(lines) - 1) * y.std(0, ddof=1) / len(lines) ** .5
                    ax.fill_between(x, y.mean(0) - h, y.mean(0) + h, color=INK[arm], alpha=.12, lw=0)
        ax.set_title(title, loc='left')
        ax.set_xlabel(x_label)
    axes[0, 0].set_ylabel(y_label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncol=max(1, len(labels)), loc='lower center', bbox_to_anchor=(.5, -.1))
    fig.text(.99, 1.0, f'bands: 95% t intervals, {seeds_of(found, shown)}', ha='right', fontsize=7)
    fig.tight_layout()
    fig.savefig(out / name)
    plt.close(fig)

def figures(out: Path, found):
    """gains.png, generation.png, convergence.png; of the procedural world probe.png, attention.png,
    projection.png."""
    import matplotlib.pyplot as plt
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False,
                         'legend.frameon': False, 'savefig.bbox': 'tight', 'savefig.dpi': 130})
    shown = [a for a in INK if a in found]
    base = 'sft' if 'sft' in found else shown[0]
    gains(out, found, shown, 'understanding', base, 'gains.png')
    gains(out, found, shown, 'generation', base, 'generation.png')
    at = lambda key: lambda r: [(x['step'], x['val'][key]) for x in r['log']
                                if x['stage'] == 'posttrain']
    types = names_of(found, 'understanding')
    chosen = ('shape', 'what') if 'what' in types else types[1:3]
    curves(out, found, shown, {'mean of visual types': at('mean'), **{k: at(k) for k in chosen}},
           'validation accuracy', 'post-training step', 'convergence.png')
    if 'projection' not in next(iter(found[shown[0]].values()))['scores']:         # of real pictures
        return
    projected(out, {arm: found[arm] for arm in shown})
    by_layer = lambda group, key: lambda r: list(enumerate(r['scores'][group][key]))
    tasks, kinds = ('shape', 'colour', 'depth', 'object', 'control'), ('picture', 'asked object')
    curves(out, found, shown, {k: by_layer('probe', k) for k in tasks},
           'balanced accuracy of a linear probe', 'layer (0 = embedding)', 'probe.png')
    curves(out, found, shown, {k: by_layer('attention', k) for k in (*kinds, 'draw: position')},
           'share of attention', 'layer', 'attention.png')
