"""Statistics, verdicts and tables of experiments.reproduce: result.json -> report.md, claims.json.

Also scores.json: all scores of all runs in one small file, from which `--report FILE` writes the same
tables again. Differences are paired by seed, intervals are Student's t, 95%; RULE says what a verdict
means. The paper's "questions alone hurt generation" is not among the claims: here every arm replays
drawings, so the untouched base is no fair baseline for generation.
"""
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import UserError, written_whole

MARGIN = .005                    # half a point: the smallest effect that the paper reports
RULE = """\
A claim has *no effect* if the interval lies within half a point of 0 (the smallest effect that the
paper reports); else it is *supported* if the interval excludes 0 and has the claimed sign, *opposite*
if it excludes 0 with the other sign, *undecided* if it holds 0. A claim that nothing moves is
supported if the interval lies within half a point of 0, opposite if it excludes 0. Intervals are
Student's t over seeds, not corrected for the number of claims. The last column says which of the
primary claims, which were named before the runs, survive Holm's correction among all that were named,
run or not; the others are secondary. The paper's effects are those of the same contrast."""

# ---- what is claimed ----
# Where in the scores of a result a figure stands; of layers 'middle' or 'last'
UNDERSTANDING = ('understanding', 'mean')
REASONING = ('understanding', 'reason')
GENERATION = ('generation', 'mean')
POSITION = ('generation', 'position')
SHAPES_READ = ('probe', 'shape', 'middle')
ON_PICTURE = ('attention', 'picture', 'last')
SIDES = ('drawing', 'sides')      # forced choice, see drawing.py
HALF = ('half',)                 # validation accuracy at half time: of the log


@dataclass
class Claim:
    """A claim about the difference of two arms."""
    text: str
    arm: str
    other: str                   # the arm that is subtracted
    figure: tuple
    paper: str                   # the paper's effect in points; BAGEL / OmniGen2
    no_change: bool = False      # the claim is that nothing moves
    family: str = ''             # primary claims of one family are corrected together; '': secondary


CLAIMS = (
    Claim('segmentation beats questions alone in understanding', 'seg', 'sft', UNDERSTANDING,
          '+1.8 / +1.1', family='main'),
    Claim('segmentation beats edges in understanding', 'seg', 'edge', UNDERSTANDING, '+1.5 / +1.0',
          family='main'),
    Claim('segmentation beats reconstruction in understanding', 'seg', 'recon', UNDERSTANDING,
          '+1.1 / +0.5', family='main'),
    Claim('segmentation beats depth in understanding', 'seg', 'depth', UNDERSTANDING, '+1.0 / +1.0'),
    Claim('classes beat instances without names in understanding', 'seg', 'instance', UNDERSTANDING,
          '-'),
    Claim('the supervision does it: true maps beat shuffled ones', 'seg', 'shuffled', UNDERSTANDING,
          '-', family='main'),
    Claim('maps beat twice the steps of questions', 'seg', 'sft-long', UNDERSTANDING, '-'),
    Claim('the lead lasts: both after twice the steps', 'seg-long', 'sft-long', UNDERSTANDING, '-'),
    Claim('the trunk must move: frozen blocks lose', 'seg', 'frozen', UNDERSTANDING, '-'),
    Claim('maps matter when few pictures have questions (200)', 'seg-asked-200', 'sft-asked-200',
          UNDERSTANDING, '-'),
    Claim('segmentation leaves text-only reasoning as it is', 'seg', 'sft', REASONING, '0',
          no_change=True),
    Claim('segmentation improves generation over questions alone', 'seg', 'sft', GENERATION,
          '+3.8 / +4.3', family='main'),
    # the paper's figures of position are above the untouched base: another contrast
    Claim('segmentation improves position in generation', 'seg', 'sft', POSITION, '-'),
    Claim('edges improve position in generation', 'edge', 'sft', POSITION, '-'),
    Claim('depth improves position in generation', 'depth', 'sft', POSITION, '-'),
    Claim('shapes become more separable (probe, middle layer)', 'seg', 'sft', SHAPES_READ, 't-SNE'),
    Claim('attention moves to the picture (last layer)', 'seg', 'sft', ON_PICTURE, '+7.6%'),
    Claim('segmentation converges faster (accuracy at half time)', 'seg', 'sft', HALF, 'yes'),
    Claim('a ratio of 2:1 beats 1:1', 'seg', 'ratio-1', UNDERSTANDING, '+0.8 / +1.0'),
    Claim('a ratio of 2:1 beats 3:1', 'seg', 'ratio-3', UNDERSTANDING, '+0.7 / +0.5'),
    Claim('more maps help: endless against 100', 'seg', 'scale-100', UNDERSTANDING, '+0.8 / +0.6'),
    # labels or generation, see channels.py; at equal FLOPs
    Claim('maps generated in order beat questions alone', 'seg-order', 'sft-flops', UNDERSTANDING,
          '+1.8 / +1.1', family='channel'),
    Claim('maps read out, not generated, beat questions alone', 'readout-flops', 'sft-flops',
          UNDERSTANDING, '-', family='channel'),
    Claim('generated in order beats read out', 'seg-order', 'readout-flops', UNDERSTANDING, '-',
          family='channel'),
    Claim('generated masked beats read out', 'seg-masked', 'readout-flops', UNDERSTANDING, '-',
          family='channel'),
    Claim('generated blind beats read out', 'seg-blind', 'readout-flops', UNDERSTANDING, '-',
          family='channel'),
    Claim('maps told in words beat questions alone', 'told-flops', 'sft-flops', UNDERSTANDING, '-'),
    Claim('read out beats told in words', 'readout-flops', 'told-flops', UNDERSTANDING, '-'),
    Claim('masked beats in order', 'seg-masked', 'seg-order', UNDERSTANDING, '-'),
    Claim('order after three times the steps beats questions alone', 'order-x3', 'sft-x3',
          UNDERSTANDING, '-'),
    Claim('and questions alone of as many FLOPs', 'order-x3', 'sft-x3-flops', UNDERSTANDING, '-'),
    Claim('masked after three times the steps beats questions alone of as many FLOPs', 'masked-x3',
          'sft-x3-flops', UNDERSTANDING, '-'),
    Claim('read out after three times the steps beats questions alone', 'readout-x3', 'sft-x3',
          UNDERSTANDING, '-'),
    Claim('order after three times the steps beats read out', 'order-x3', 'readout-x3', UNDERSTANDING,
          '-'),
    Claim('blind after three times the steps beats read out', 'blind-x3', 'readout-x3', UNDERSTANDING,
          '-'),
    Claim('masked after three times the steps beats read out', 'masked-x3', 'readout-x3',
          UNDERSTANDING, '-'),
    Claim('a base that knows shapes gains from segmentation', 'known-seg', 'known-sft', UNDERSTANDING,
          '+1.8 / +1.1'),
    Claim('it gains from maps generated in order', 'known-order', 'known-sft', UNDERSTANDING,
          '+1.8 / +1.1'),
    Claim('it gains from maps that are read out', 'known-readout', 'known-sft', UNDERSTANDING, '-'),
    Claim('it gains more from segmentation than from edges', 'known-seg', 'known-edge', UNDERSTANDING,
          '+1.5 / +1.0'),
    # drawing when nothing else keeps it alive
    Claim('without replay segmentation keeps sides better than reconstruction', 'seg-alone',
          'recon-alone', SIDES, '-'),
    Claim('without replay segmentation keeps sides better than edges', 'seg-alone', 'edge-alone', SIDES,
          '-'),
    Claim('without replay segmentation keeps sides better than questions alone', 'seg-alone',
          'none-alone', SIDES, '-'),
    Claim('slow, without replay: segmentation keeps sides better than reconstruction',
          'seg-alone-slow', 'recon-alone-slow', SIDES, '-'),
    Claim('slow, without replay: segmentation keeps sides better than edges', 'seg-alone-slow',
          'edge-alone-slow', SIDES, '-'),
    Claim('slow, without replay: segmentation keeps drawings better than reconstruction',
          'seg-alone-slow', 'recon-alone-slow', GENERATION, '+0.1 / +1.3'),
    Claim('slow, without replay: segmentation keeps drawings better than edges', 'seg-alone-slow',
          'edge-alone-slow', GENERATION, '+1.0 / +1.4'),
    Claim('slow, without replay: segmentation keeps drawings better than questions alone',
          'seg-alone-slow', 'none-alone-slow', GENERATION, '+3.8 / +4.3'),
)
BASELINES = {
    'seg-long': 'sft-long',
    'seg-asked-200': 'sft-asked-200', 'seg-asked-800': 'sft-asked-800',
    # at equal FLOPs
    'seg-order': 'sft-flops', 'seg-masked': 'sft-flops', 'seg-blind': 'sft-flops',
    'readout-flops': 'sft-flops', 'told-flops': 'sft-flops',
}
ENDINGS = {                      # of names
    '-x3': 'sft-x3-flops', '-x3-flops': 'sft-x3-flops',        # at equal FLOPs
    '-alone': 'none-alone', '-alone-slow': 'none-alone-slow', '-bare-slow': 'none-bare-slow',
}
# Questions by what they need: names that the map's colours give, finding, two objects at once, neither
GROUPS = {
    'labelled': ('shape', 'what'),
    'search': ('colour', 'exist', 'where'),
    'two objects': ('relation', 'distance', 'depth'),
    'controls': ('count', 'size', 'reason'),
}


def baseline(arm: str) -> str:
    """The arm that an arm is compared with in tables: questions alone, as far as there is such an arm
    on the same base, with the same questions and steps or FLOPs."""
    for ending, other in ENDINGS.items():
        if arm.endswith(ending):
            return other
    if arm.startswith('known-'):
        return 'known-sft'
    return BASELINES.get(arm, 'sft')


# ---- statistics ----
# Student's distribution by summing its density: all that would be used of scipy.
@lru_cache
def t_table(df: int):
    """Angles and Student's distribution there: t = sqrt(df) tan(a); a has density ~ cos(a)^(df-1)."""
    a = np.linspace(-np.pi / 2, np.pi / 2, 400_001)
    mass = np.cumsum(np.abs(np.cos(a)) ** (df - 1))
    below = mass / mass[-1]
    return a, below * (1 - below[0] / 2)                       # a step's own mass counts half


def t_quantile(p: float, df: int) -> float:
    a, below = t_table(df)
    return float(np.sqrt(df) * np.tan(np.interp(p, below, a)))


def t_below(t: float, df: int) -> float:
    a, below = t_table(df)
    return float(np.interp(np.arctan(t / np.sqrt(df)), a, below))


def paired(differences) -> dict:
    """Mean of paired differences, 95% t interval, two-sided p value; low = high = None for one pair."""
    d = np.asarray(differences, float)
    n = len(d)
    out = {'value': None, 'low': None, 'high': None, 'p': None, 'n': n}
    if n > 0:
        mean = float(d.mean())
        out['value'] = mean
    if n > 1:
        error = float(d.std(ddof=1)) / n ** .5
        half = t_quantile(.975, n - 1) * error
        out['low'], out['high'] = mean - half, mean + half
        t = abs(mean) / max(error, 1e-12)
        out['p'] = 2 - 2 * t_below(t, n - 1)
    return out


def verdict(e: dict, no_change=False) -> str:
    """See RULE; no_change: the claim is that nothing moves."""
    if e['low'] is None:
        return 'undecided'
    inside = max(abs(e['low']), abs(e['high'])) < MARGIN
    above = e['low'] > 0
    below = e['high'] < 0
    if no_change:
        if inside:
            return 'supported'
        return 'opposite' if above or below else 'undecided'
    if inside:
        return 'no effect'
    if above:
        return 'supported'
    return 'opposite' if below else 'undecided'


def holm(ps: list, named: int) -> list:
    """Which of the p values (None = no test) stay below .05 after Holm's step-down correction for as
    many tests as were `named` before, run or not."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    kept = [False for _ in ps]
    for rank, (p, i) in enumerate(order):
        if p > .05 / (named - rank):
            break
        kept[i] = True
    return kept


# ---- results ----
KEYS = {'arm', 'seed', 'plan', 'scores', 'log', 'steps', 'seconds'}        # of a result


def curve_of(result: dict, key: str) -> list:
    """[(step of post-training, validation figure)]; a line lacks a figure of which nothing was asked."""
    curve = []
    for line in result['log']:
        if line['stage'] == 'posttrain' and key in line['val']:
            curve.append((line['step'], line['val'][key]))
    return curve


def look_up(result: dict, path: tuple):
    """A score by its path, None where it was not measured; layers by 'middle' or 'last'; a tuple of
    names: their mean; 'half': validation accuracy at half time."""
    if path == HALF:
        return dict(curve_of(result, 'mean')).get(result['steps'] // 2)
    value = result['scores']
    for key in path:
        if value is None:
            return None
        if isinstance(key, tuple):
            each = [value_of(value.get(name)) for name in key]
            value = None if None in each else sum(each) / len(each)
        elif key == 'middle':
            value = value[len(value) // 2]
        elif key == 'last':
            value = value[-1]
        else:
            value = value.get(key)
    return value_of(value)


def value_of(score):
    """Of a score with its interval or without."""
    return score['value'] if isinstance(score, dict) else score


def compact(scores):
    """Scores without their intervals, to four digits."""
    if isinstance(scores, dict):
        if 'value' in scores:
            return compact(scores['value'])
        return {name: compact(score) for name, score in scores.items()}
    if isinstance(scores, list):
        return [compact(score) for score in scores]
    return round(scores, 4) if isinstance(scores, float) else scores


def all_results(found: dict) -> list:
    return [result for by_seed in found.values() for result in by_seed.values()]


def results_in(out: Path) -> list:
    """The results of all finished arms of a folder, or those that a scores.json holds."""
    if out.is_file():
        return scores_in(out)
    results = [json.loads(path.read_text()) for path in sorted(out.glob('seed*/*/result.json'))]
    return [result for result in results if result['scores']]  # a base has none


def scores_in(path: Path) -> list:
    """Of a scores.json as write_scores() writes it; train.py and eval.py write others of that name."""
    try:
        results = json.loads(path.read_text())
        if all(KEYS <= result.keys() for result in results):
            return results
    except (ValueError, TypeError, AttributeError):
        pass                                                   # it is none, as where a key is missing
    raise UserError(f'{path} is no scores.json of experiments.reproduce')


def collect(out: Path) -> dict:
    """{arm: {seed: result}} of all finished arms."""
    found = {}
    results = results_in(out)
    for result in results:
        by_seed = found.setdefault(result['arm'], {})
        by_seed[result['seed']] = result
    if not found:
        raise UserError(f'no finished arm under {out}: run python -m experiments.reproduce first')
    first = results[0]
    for other in results:
        if other['plan'] != first['plan']:
            raise UserError(f"{out} mixes {other['arm']} (plan {other['plan']}) with {first['arm']} "
                            f"(plan {first['plan']}): delete the folders of one of the two kinds")
    return found


def write_scores(path: Path, found):
    """All results as one small JSON file: a line each."""
    lines = [json.dumps(compact(result)) for result in all_results(found)]
    write(path, '[\n' + ',\n'.join(lines) + '\n]\n')


def write(path: Path, text: str):
    """Whole or not at all."""
    with written_whole(path) as part:
        part.write_text(text)


def difference(found, arm, other, path):
    """Paired differences over the seeds that both arms finished."""
    ours, theirs = found.get(arm, {}), found.get(other, {})
    differences = []
    for seed in sorted(ours.keys() & theirs.keys()):
        a = look_up(ours[seed], path)
        b = look_up(theirs[seed], path)
        if a is not None and b is not None:
            differences.append(a - b)
    return paired(differences)


def claims_of(found) -> list[dict]:
    """Each claim of which both arms are there, its effect and its verdict."""
    rows = []
    for claim in CLAIMS:
        e = difference(found, claim.arm, claim.other, claim.figure)
        if e['n'] == 0:
            continue
        rows.append({
            'claim': claim.text,
            'effect': e['value'],
            'low': e['low'],
            'high': e['high'],
            'p': e['p'],
            'seeds': e['n'],
            'arms': f'{claim.arm} - {claim.other}',
            'paper': claim.paper,
            'no_change': claim.no_change,
            'family': claim.family,
            'verdict': verdict(e, claim.no_change),
        })
    families = {row['family'] for row in rows if row['family']}
    for family in families:
        primary = [row for row in rows if row['family'] == family]
        named = len([claim for claim in CLAIMS if claim.family == family])
        kept_of_all = holm([row['p'] for row in primary], named)
        for row, kept in zip(primary, kept_of_all):
            row['survives_holm'] = kept
    return rows


def names_of(found, part: str) -> list:
    """What was measured of understanding, generation or segmentation, in the order of eval.py."""
    names = []
    for result in all_results(found):
        names += result['scores'].get(part, ())
    return list(dict.fromkeys(names))                          # each once


# ---- the report ----
def table(head, rows) -> str:
    """As Markdown."""
    lines = []
    rule = ['---' for _ in head]
    for row in (head, rule, *rows):
        lines.append('| ' + ' | '.join(map(str, row)) + ' |')
    return '\n'.join(lines)


def points(e) -> str:
    """An effect in percentage points with its interval."""
    if e['value'] is None:
        return '-'
    # rounded twice: a tie such as 8.35 must not hang on the last bit, which versions of numpy differ in
    ends = (e['value'], e['low'], e['high'])
    value, low, high = [None if x is None else round(100 * x, 6) for x in ends]
    if low is None:
        return f'{value:+.1f}'
    return f'{value:+.1f} [{low:+.1f}, {high:+.1f}]'


def table_of_claims(claims) -> str:
    rows = []
    for c in claims:
        effect = points({'value': c['effect'], 'low': c['low'], 'high': c['high']})
        row = [c['claim'], c['arms'], effect, c['seeds'], c['paper'], c['verdict']]
        after = 'secondary'
        if c['family'] and c['p'] is None:                     # one seed: nothing can be tested
            after = '-'
        elif c['family']:
            after = 'survives' if c['survives_holm'] else 'does not survive'
        row.append(after)
        rows.append(row)
    return table(('claim', 'arms', 'effect', 'seeds', 'paper', 'verdict', 'primary, after Holm'), rows)


def mean_text(results, path) -> str:
    """The mean of a score over the results that have it."""
    values = [look_up(result, path) for result in results]
    known = [value for value in values if value is not None]
    return f'{round(np.mean(known), 9):.3f}' if known else '-'       # twice, as above


def has_groups(found) -> bool:
    """Were all types of question of GROUPS asked? Those of the procedural world."""
    grouped = {kind for kinds in GROUPS.values() for kind in kinds}
    return grouped <= set(names_of(found, 'understanding'))


def above(found, arm: str, path: tuple) -> str:
    """An arm's effect over its baseline; with the number of pairs, where the arm has more seeds."""
    e = difference(found, arm, baseline(arm), path)
    text = points(e)
    if 0 < e['n'] < len(found[arm]):
        text += f" (n={e['n']})"
    return text


def table_of_scores(found, part: str, layer: tuple) -> str:
    """Each arm's mean over seeds of all that was measured; layer: ('last',) where there are layers."""
    names = names_of(found, part)
    main = (part, names[0], *layer)
    rows = []
    for arm, by_seed in found.items():
        if None in [look_up(result, main) for result in by_seed.values()]:
            continue
        row = [arm, len(by_seed)]
        for name in names:
            row.append(mean_text(by_seed.values(), (part, name, *layer)))
        row.append(above(found, arm, main))
        rows.append(row)
    return table(('arm', 'seeds', *names, f'{names[0]} - sft*'), rows)


def table_of_groups(found) -> str:
    """Understanding above the baseline by group of questions."""
    rows = []
    for arm, by_seed in found.items():
        row = [arm, baseline(arm), len(by_seed)]
        for kinds in GROUPS.values():
            row.append(above(found, arm, ('understanding', kinds)))
        rows.append(row)
    heads = [f"{group} ({', '.join(kinds)})" for group, kinds in GROUPS.items()]
    return table(('arm', 'minus', 'seeds', *heads), rows)


def tables(found) -> str:
    """All tables of a report as Markdown."""
    claims = claims_of(found)
    tested = [c for c in claims if c['p'] is not None and not c['no_change']]
    head = f'# Claims\n\n{len(tested)} differences tested, paired by seed, in points.\n{RULE}\n'
    parts = [head, table_of_claims(claims)]
    if has_groups(found):
        parts.append('\n# Understanding by group of questions: points above the baseline, test split\n')
        parts.append(table_of_groups(found))
    for title in ('Understanding', 'Generation', 'Drawing', 'Segmentation', 'Probe', 'Attention'):
        part = title.lower()
        layer, where = (), ''
        if part in ('probe', 'attention'):
            layer, where = ('last',), ', last layer'
        if names_of(found, part):
            parts.append(f'\n# {title}{where}: mean over seeds, test split\n')
            parts.append(table_of_scores(found, part, layer))
    seconds = [result['seconds'] for result in all_results(found)]
    parts.append('\n\\* or the baseline that differs in the map alone: see BASELINES in report.py.\n')
    parts.append(f'{len(seconds)} runs, {sum(seconds) / 3600:.1f} hours of one process, '
                 'without the bases.')
    return '\n'.join(parts) + '\n'


def report(out: Path) -> dict:
    """Write report.md, claims.json and scores.json of all finished arms under `out`; of a scores.json
    the tables alone, beside it. -> what was found, as collect() gives it."""
    found = collect(out)
    if out.is_file():
        path = out.with_suffix('.md')
        write(path, tables(found))
        print(f'wrote {path}')
        return found
    write_scores(out / 'scores.json', found)
    small = collect(out / 'scores.json')                       # the tables are those of this file
    claims = claims_of(small)
    write(out / 'claims.json', json.dumps(claims, indent=1) + '\n')
    write(out / 'report.md', tables(small))
    print(RULE + '\n\n' + table_of_claims(claims))
    print(f'\nwrote {out}/report.md, claims.json, scores.json')
    return found
