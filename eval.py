"""Every measurement: understanding, generation, segmentation, tokenizer, on scenes never trained on.
(Drawings of real pictures, which no rule verifies: experiments/reader.py.)

    python eval.py                         evaluate out/cpu/model.safetensors again: scores_test.json
    python eval.py --run out/mine --n 1024

Each figure is {value, low, high, n}, with a 95% interval; perplexity is a plain number. Test scenes
are the same for every run with the same --n.
"""
import argparse
import copy
import json
import math
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F

from data import COLOURS, MAPS, SHAPES, DataSet, Object, UserError, classes_of
from folder import open_world
from model import drawn, load

Z = 1.96                       # half-width of a 95% interval in standard errors


# ---- figures with intervals ----
# A share without an interval says nothing: 9 of 10 right may be 60% or 99%. Intervals here are those of
# the evaluation's sampling alone; how much training runs differ, only several seeds can tell.
def figure(value, low, high, n: int) -> dict:
    """One measured value with its 95% interval, of n cases; None where there was nothing to measure."""
    return {'value': value, 'low': low, 'high': high, 'n': n}


NOTHING = figure(None, None, None, 0)


def share(right: int, n: int) -> dict:
    """Share of right answers with its Wilson interval (Wilson 1927), which holds near 0 and 1 too."""
    if n == 0:
        return NOTHING
    p = right / n
    z2 = Z * Z / n
    whole = 1 + z2
    centre = (p + z2 / 2) / whole
    variance = p * (1 - p) / n + z2 / (4 * n)
    half = Z * math.sqrt(variance) / whole
    return figure(p, max(0., centre - half), centre + half, n)


def mean_of(figures: list[dict]) -> dict:
    """Unweighted mean of independent shares; interval from their Wilson ones (Zou & Donner 2008)."""
    kept = [f for f in figures if f['n']]
    if not kept:
        return NOTHING
    k = len(kept)
    total = sum(f['value'] for f in kept)
    mean = total / k
    # errors of independent shares add up as the sides of a right angle
    lower = [f['value'] - f['low'] for f in kept]
    upper = [f['high'] - f['value'] for f in kept]
    below = math.hypot(*lower) / k
    above = math.hypot(*upper) / k
    n = sum(f['n'] for f in kept)
    return figure(mean, mean - below, mean + above, n)


def bootstrap(score, tables) -> dict:
    """score of the summed tables [n, ...], one per picture; its interval from 400 draws of pictures."""
    g = torch.Generator().manual_seed(0)
    n = len(tables)
    value = score(tables.sum(0)).item()                        # of all pictures together
    if math.isnan(value):                                      # there was nothing to score
        return NOTHING
    chosen = torch.randint(n, (400, n), generator=g)           # with replacement
    draws = torch.stack([score(tables[one].sum(0)) for one in chosen])                # [400]
    ends = torch.tensor([.025, .975], dtype=draws.dtype)
    low, high = draws.nanquantile(ends).tolist()
    return figure(value, low, high, n)


# ---- understanding ----
# Beside every accuracy stands that of the best guess from the words of the question, the blind baseline.
# A model has to beat it to have looked.
@torch.no_grad()
def understanding(umm, tok, world: DataSet, n=512, split='test', B=64, Q=16) -> dict:
    """Accuracy by type over n pictures (or more, to fill B) with Q questions each; whole answers count.
    A greedy answer is the true one exactly when every true token, the end included, is the likeliest
    after the true tokens before it: one pass over the true answers scores greedy decoding."""
    right = Counter()
    total = Counter()
    for i in range(math.ceil(n / B)):
        s, kinds = world.questions(split, i, B, Q, captions=(), stream='understanding')
        logits = umm.text_head(umm.hidden(s))                                         # [B*R,T,V]
        good = logits.argmax(-1) == s.target                                          # [B*R,T]
        good = good | (s.target < 0)                           # nothing is asked of these tokens
        # a picture's turns lie in R rows: put these beside each other
        good = good.view(len(kinds), -1)                                              # [B,R*T]
        turns = s.turn.view(len(kinds), -1)                                           # [B,R*T]
        for b, row in enumerate(kinds):
            for number, kind in enumerate(row, 1):
                if kind not in world.kinds:
                    kind = 'reason'                            # sums in words are asked as a control
                mine = good[b][turns[b] == number]             # its tokens: are they right?
                total[kind] += 1
                right[kind] += int(mine.all())
    scores = by_kind(world, right, total)
    if total['reason']:
        scores['reason'] = share(right['reason'], total['reason'])
    return scores


def by_kind(world: DataSet, right: Counter, total: Counter) -> dict:
    """{type of question: share of right answers}, the mean of them first."""
    scores = {kind: share(right[kind], total[kind]) for kind in world.kinds}
    mean = mean_of(scores.values())
    return {'mean': mean, **scores}


def asked_without_pictures(world: DataSet, split: str, stream: str, n: int):
    """(type, question, answer): one of each type about each of n scenes, or more to fill batches."""
    B = 64                                                     # as in understanding(): the same scenes
    for i in range(math.ceil(n / B)):
        scenes, _, rng = world.scenes(split, stream, i, B, pixels=False)
        for kind in world.kinds:
            for scene in scenes:
                for question, answer in world.ask(scene, kind, rng):
                    yield kind, question, answer


def blind(world: DataSet, n=512, split='test') -> dict:
    """Questions about the scenes of understanding() and n more, from their words alone: the answer most
    frequent in 16 n training scenes after that question; after its type, if possible one it names, where
    it was never asked."""
    seen = defaultdict(Counter)                                # question or type: answers
    right = Counter()
    total = Counter()
    for kind, question, answer in asked_without_pictures(world, 'train', 'blind', 16 * n):
        seen[question][answer] += 1
        seen[kind][answer] += 1
    scenes = min(2 * n, world.limit(split))                    # twice as many: no model has to run
    for kind, question, answer in asked_without_pictures(world, split, 'understanding', scenes):
        known = question if question in seen else kind         # in these very words?
        ranked = [a for a, _ in seen[known].most_common()]
        if known == kind:
            choice = question.split(',')[-1]                   # 'which is nearer, a or b?'
            named = [a for a in ranked if a in choice]
            ranked = named or ranked
        total[kind] += 1
        if ranked[:1] == [answer]:
            right[kind] += 1
    return by_kind(world, right, total)


# ---- generation in the procedural world: a verifier by rule ----
# What is on a drawing? (1) Saturated pixels belong to objects, each pixel to the nearest of the six
# colours. (2) Connected pixels of one colour are a region. (3) Templates of all shapes and radii are
# laid over a region at all places near its middle; the best overlap names the shape. (4) Pixels that
# the template leaves over are a region again: two objects of one colour may touch. On true pictures
# this finds everything (`verifier` in the table); nobody has learned anything to do it.
WINDOW = 13                    # a template is tried at WINDOW x WINDOW places around a region's middle
REACH = WINDOW // 2
SMALLEST = .02                 # share of the picture that an object covers at least


def components(mask, label):
    """Connected regions (8 neighbours) of mask [B, S, S] with equal label [B, S, S] -> ids, 0 = none:
    the highest pixel index spreads inside each region until nothing changes."""
    planes = F.one_hot(label)                                                         # [B,S,S,k]
    planes = planes.permute(0, 3, 1, 2)                                               # [B,k,S,S]
    planes = (planes * mask[:, None]).float()                  # one plane for each label
    S = mask.shape[-1]
    index = torch.arange(1, S * S + 1, device=mask.device)
    ids = planes * index.view(S, S)                                                   # [B,k,S,S]
    while True:
        grown = F.max_pool2d(ids, 3, 1, 1) * planes
        if torch.equal(grown, ids):
            return ids.amax(1).long()                                                 # [B,S,S]
        ids = grown


def templates(size: int, device):
    """Binary pictures of each shape at 10 radii and 4 half-pixel offsets -> [5 * 40, 1, P, P]."""
    largest = data.NEAR * 1.1 * size
    half = math.ceil(largest) + 1                              # of the template's side
    axis = torch.arange(-half, half + 1, device=device)                               # [P]
    radii = torch.linspace(data.FAR * .9, data.NEAR * 1.05, 10)
    radii = radii * size                                       # in pixels
    offsets = list(product((0, .5), (0, .5)))                  # centres lie between pixels too
    inside = []
    for shape, r, (x, y) in product(SHAPES, radii, offsets):
        across = (axis - x)[None] / r                                                 # [1,P]
        down = (axis - y)[:, None] / r                                                # [P,1]
        distance = data.distance_field(shape, across, down)                           # [P,P]
        inside.append(distance < 0)
    return torch.stack(inside)[:, None].float()                                       # [200,1,P,P]


def around(mask, y: int, x: int, pad: int):
    """What templates placed at most REACH from (y, x) can cover of a mask [S, S]."""
    margin = pad + REACH
    side = 2 * pad + WINDOW
    wide = F.pad(mask.float(), (margin, margin, margin, margin))                      # beyond the edges
    return wide[y:y + side, x:x + side]                                               # [side,side]


def best_template(mask, solid, bank):
    """The template that overlaps a region [S, S] best, by intersection over union, and where it lies:
    (template, y, x). Pixels that other objects cover, the rest of `solid` [S, S], count as neither."""
    pad = bank.shape[-1] // 2
    middle = mask.nonzero().float().mean(0)                                           # [2]
    y, x = middle.long().tolist()
    # a convolution counts, for each template and place, the pixels that it shares with the region
    # and with the background
    region = around(mask, y, x, pad)
    nothing = around(~solid, y, x, pad)
    both = torch.stack([region, nothing])[:, None]                                    # [2,1,side,side]
    hit, over = F.conv2d(both, bank)                                                  # [200,13,13]
    iou = hit / (mask.sum() + over)
    k, down, right = torch.unravel_index(iou.argmax(), iou.shape)
    y += int(down) - REACH
    x += int(right) - REACH
    return int(k), y, x


def detect(images) -> list[list[Object]]:
    """Objects in pictures [B, 3, S, S]: connected saturated regions of one colour and 2% of the picture,
    the shape by the template that overlaps best."""
    S = images.shape[-1]
    rgb = torch.tensor(list(COLOURS.values()))                  # [6,3]
    saturation = images.amax(1) - images.amin(1)                                      # [B,S,S]
    solid = saturation > .35
    colour = classes_of(images, rgb * 255)                                            # [B,S,S]
    regions = components(solid, colour)                                               # [B,S,S]
    bank = templates(S, images.device)
    return [objects_in(*picture, bank) for picture in zip(regions, solid, colour)]


def objects_in(regions, solid, colour, bank) -> list[Object]:
    """Of one picture, all [S, S]. What a template leaves of a region is looked at again: objects of one
    colour may touch."""
    S, names = len(regions), list(COLOURS)
    numbers = regions.unique()
    todo = [regions == number for number in numbers if number > 0]
    found = []
    while todo:
        mask = todo.pop(0)
        if mask.sum() < SMALLEST * S * S:
            continue
        k, y, x = best_template(mask, solid, bank)
        covered = laid(bank[k, 0], y, x, S)                                           # [S,S]
        inside = mask & covered
        if not inside.any():
            continue
        middle = inside.nonzero().float().mean(0) + .5
        y, x = (middle / S).tolist()
        shape = SHAPES[k * len(SHAPES) // len(bank)]
        hue = int(colour[mask][0])                             # all pixels of a region have one colour
        found.append(Object(shape, names[hue], 0, x, y, 0.))
        todo.append(mask & ~widened(covered))
    return found


def laid(template, y: int, x: int, S: int):
    """The pixels [S, S] of a picture that a template [P, P] with its middle at (y, x) covers."""
    pad = len(template) // 2
    whole = F.pad(template, (x, S - x, y, S - y))              # pad pixels wider on each side
    inside = slice(pad, pad + S)
    return whole[inside, inside] > 0                                                  # [S,S]


def widened(mask):
    """A mask [S, S] and the pixels next to it."""
    mask = mask[None].float()                                                         # [1,S,S]
    wide = F.max_pool2d(mask, 3, 1, 1)
    return wide[0] > 0                                                                # [S,S]


# ---- generation: GenEval's six categories (Ghosh et al. 2023, section 3) ----
# A caption asks for objects; a drawing passes if the verifier finds these and no others on it.
CATEGORIES = {                 # style of the captions, number of objects, are colours asked for
    'single': ('bare', 1, False),
    'two': ('bare', 2, False),
    'counting': ('count', None, False),
    'colours': ('list', 1, True),
    'position': ('relation', 2, True),
    'attribution': ('list', 2, True),
}


def satisfied(wanted: list[Object], category: str, found: list[Object]) -> bool:
    """Do objects `found` make the caption of `wanted` true, and no more? (GenEval allows more except
    in counting.) Position by its rule: the centre is off that way by more than a margin."""
    _, _, coloured = CATEGORIES[category]

    def key(o):
        return (o.shape, o.colour) if coloured else o.shape

    asked = Counter(key(o) for o in wanted)
    seen = Counter(key(o) for o in found)
    if asked != seen:
        return False
    if category != 'position':
        return True
    place = {key(o): o for o in found}
    a, b = [place[key(o)] for o in wanted]
    off = {
        'left of': b.x - a.x,
        'right of': a.x - b.x,
        'above': b.y - a.y,
        'below': a.y - b.y,
    }
    where = data.relation(*wanted)
    return off[where] > .1


def prompts(world: DataSet, category: str, n: int, split='test'):
    """n scenes that fit a category -> (captions, wanted objects, true pictures [n, 3, S, S])."""
    style, count, _ = CATEGORIES[category]
    found, index = [], 0
    while len(found) < n:
        scenes, r, rng = world.scenes(split, 'generation', index, 128)
        index += 1
        for (objects, _), image in zip(scenes, r.image):
            if count is not None and len(objects) != count:
                continue
            if category == 'two' and objects[0].shape == objects[1].shape:
                continue                                       # 'a ring and a ring' is counting
            text = data.caption(objects, style, rng)
            if text:
                found.append((text, objects, image))
    texts, wanted, images = zip(*found[:n])
    return texts, wanted, torch.stack(images)


def passed(pictures, category: str, wanted) -> dict:
    """Share of the pictures [n, 3, S, S] that show what is wanted of each."""
    found = detect(pictures)
    good = [satisfied(asked, category, seen) for asked, seen in zip(wanted, found)]
    return share(sum(good), len(good))


def generation(umm, tok, world: DataSet, n=64, cfg=2., split='test') -> dict:
    """Share of n prompts per category whose picture passes; `verifier`: of true pictures; `ceiling`: of
    these after the tokenizer's round trip."""
    right, verifier, ceiling = {}, [], []
    for category in CATEGORIES:
        texts, wanted, images = prompts(world, category, n, split)
        # its own seed: a category's drawings do not depend on the lengths of plans in the others
        drawings = drawn(umm, tok, world.text, texts, 0, cfg)                         # [n,3,S,S]
        codes = tok.encode(images)
        right[category] = passed(drawings, category, wanted)
        verifier.append(passed(images, category, wanted))
        ceiling.append(passed(tok.decode(codes), category, wanted))
    scores = {'mean': mean_of(right.values()), **right}
    scores['verifier'] = mean_of(verifier)
    scores['ceiling'] = mean_of(ceiling)
    return scores


# ---- segmentation and tokenizer ----
# A generated map is a picture. Its classes are read off by colour, pixel by pixel, never by comparing
# codes: several codes may stand for the same pixels. What the tokenizer cannot draw, no model can: the
# score of true maps after its round trip is the ceiling.
def miou(pred, true, k=len(data.CLASSES)) -> dict:
    """Mean over the classes that occur of intersection over union, pooled over pictures [n, S, S] with
    classes < k; pixels whose true class is 255 do not count. Bootstrapped over pictures."""
    tables = []
    for p, t in zip(pred, true):                                                      # [S,S]
        p, t = p[t != 255], t[t != 255]                                               # [known]
        right = t[t == p]
        counts = [x.bincount(minlength=k) for x in (right, t, p)]
        tables.append(torch.stack(counts))                                            # [3,k]

    def score(counts):
        """[(right, true, predicted), classes] -> mIoU."""
        right, true, predicted = counts                                               # [k]
        union = true + predicted - right                                              # [k]
        return (right / union).nanmean()                       # of the classes that occur

    return bootstrap(score, torch.stack(tables).cpu().double())


def segmentation(umm, tok, world: DataSet, n=192, split='test') -> dict:
    """mIoU of generated maps in pixel space, and the tokenizer's ceiling decode(encode(true map))."""
    s, target, r = world.maps_to_draw(split, 0, n, 'seg', stream='segmentation')
    codes = umm.generate(s, temperature=0)                     # the likeliest code at each place
    generated = tok.decode(codes)                                                     # [n,3,S,S]
    best = tok.decode(tok.encode(target))                                             # [n,3,S,S]
    scores = {}
    for name, maps in (('miou', generated), ('ceiling', best)):
        read = classes_of(maps, r.palette)                                            # [n,S,S]
        scores[name] = miou(read, r.classes, len(r.palette))
    return scores


def tokenizer(tok, world: DataSet, n=512, split='test') -> dict:
    """PSNR in dB of pictures and of each kind of map, mIoU of masks, codes used, perplexity of all."""
    _, r, _ = world.scenes(split, 'tokenizer', 0, n)
    n, K = len(r.image), tok.c.codebook
    scores, count = {}, torch.zeros(K)
    for name in world.maps:
        x = MAPS[name].draw(r)
        codes = tok.encode(x)
        y = tok.decode(codes)
        count += codes.flatten().bincount(minlength=K).cpu()
        error = (x - y).square()                                                      # [n,3,S,S]
        mse = error.mean((1, 2, 3)).clamp(min=1e-10)                                  # [n]
        psnr = -10 * mse.log10()                                                      # [n]
        key = 'psnr' if name == 'recon' else f'psnr_{name}'
        scores[key] = bootstrap(lambda total: total / n, psnr.cpu())
        if name == 'seg':
            read = classes_of(y, r.palette)
            scores['mask_ceiling'] = miou(read, r.classes, len(r.palette))
    # few pictures cannot show all codes: one is expected for every four tokens
    most = min(K, int(count.sum()) // 4)
    used = min(most, int(count.count_nonzero()))
    scores['used'] = share(used, most)
    p = count / count.sum()                                                           # [K]
    entropy = torch.special.entr(p).sum()                      # nats a code
    scores['perplexity'] = entropy.exp().item()
    return scores


# ---- everything at once ----
def evaluate(umm, tok, world: DataSet, n=512, cfg=2., split='test', proxy='seg') -> dict:
    """All measurements, nested; n pictures for understanding, fewer for what takes longer. umm None:
    only the tokenizer is trained yet. proxy: the map that was taught."""
    tok.eval()                                                 # its codebook must not move
    world = copy.copy(world)
    world.seed = 0                                             # the same scenes for every run
    n = min(n, world.limit(split))
    scores = {
        'understanding': {},
        'blind': {},
        'generation': {},
        'segmentation': {},
        'tokenizer': tokenizer(tok, world, n, split),
    }
    if umm is None:
        return scores
    pictures = min(n, 192)                                     # of what takes longer
    if world.kinds:
        scores['understanding'] = understanding(umm, tok, world, n, split)
        scores['blind'] = blind(world, n, split)
    if world.exact:
        each = max(2, n // 8)                                  # prompts a category
        scores['generation'] = generation(umm, tok, world, each, cfg, split)
    if proxy == 'seg' and proxy in world.maps:
        scores['segmentation'] = segmentation(umm, tok, world, pictures, split)
    return scores


# ---- the table and the command line ----
def as_text(f) -> str:
    """A figure with its interval, or a plain number."""
    if isinstance(f, float):
        return f'{f:.3g}'
    if f['n'] == 0:
        return '-'
    return '{value:.3f} [{low:.3f}, {high:.3f}]'.format(**f)


def table(scores: dict) -> str:
    """The scores as Markdown."""
    rows = [('', '[95% interval]', 'n', 'blind')]
    for part in ('understanding', 'generation', 'segmentation', 'tokenizer'):
        if scores[part]:
            rows.append((f'**{part}**', '', '', ''))
        for name, f in scores[part].items():
            n = '' if isinstance(f, float) else f['n']
            blindly = ''
            if part == 'understanding' and name in scores['blind']:
                blindly = as_text(scores['blind'][name])[:5]   # without its interval
            rows.append((name, as_text(f), n, blindly))
    lines = ['| {:17} | {:23} | {:5} | {:5} |'.format(*row) for row in rows]
    lines.insert(1, '|---|---|---|---|')
    return '\n'.join(lines)


def report(scores: dict, path: Path):
    """Print the table and write it, with all digits, to `path`."""
    print(table(scores))
    answers = scores['understanding'].get('mean', NOTHING)
    if answers['n'] and answers['low'] < scores['blind']['mean']['value']:
        print('Answers are not clearly better than blind guesses from the words of the questions. More '
              'pictures, more questions about each or longer training help; python -m '
              'experiments.learnable DIR says which questions of a folder can be learned at all')
    text = json.dumps(scores, indent=1)
    with data.written_whole(path) as part:
        part.write_text(text + '\n')


def open_run(run: Path, device, folder=None, other_data=False):
    """-> (tokenizer, umm or None where it is not trained yet, data set, settings) of a run's folder.
    folder: where its real pictures are now; UserError if they are not those that it learned, unless
    other_data."""
    checkpoint = run / 'model.safetensors'
    tok, umm, text, _, meta = load(checkpoint, device)
    s = meta['settings']
    skip_bad = s.get('skip_bad')
    folder = folder or s.get('data')
    world = open_world(folder, umm.c.size, 0, device, text, skip_bad)
    if world.names != meta['classes']:
        raise UserError(f"{folder} has other classes than {run} learned: {meta['classes']}")
    if world.checksum != meta['checksum'] and not other_data:
        raise UserError(f'{folder} is not what {run} learned, or it has changed: restore it, or measure '
                        'on other pictures with --other_data')
    if meta['trained'] == 'tokenizer':
        umm = None
    s['proxy'] = meta['taught']                                # 'none' before post-training
    return tok, umm, world, s


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', default='out/cpu', help='run folder (default %(default)s)')
    p.add_argument('--n', type=int, default=512, help='pictures for understanding (default %(default)s)')
    p.add_argument('--data', default=None, help='the folder of real pictures, if it has moved')
    p.add_argument('--other_data', '--other-data', action='store_true',
                   help='measure although the data differ')
    p.add_argument('--split', default='test', choices=data.SPLITS[1:], help='default %(default)s')
    p.add_argument('--device', default='auto', help='cpu, cuda, mps or auto (default %(default)s)')
    a = p.parse_args(argv)
    if a.n < 16:
        raise UserError(f'--n is {a.n}: it must be 16 or more')
    run = Path(a.run)
    device = data.find_device(a.device)
    tok, umm, world, s = open_run(run, device, a.data, a.other_data)
    cfg = s.get('cfg', 2.)
    scores = evaluate(umm, tok, world, a.n, cfg, a.split, s['proxy'])
    report(scores, run / f'scores_{a.split}.json')


if __name__ == '__main__':
    data.guard(main)
