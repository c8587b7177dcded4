"""Every measurement: understanding, generation, segmentation, tokenizer, on scenes never trained on.

    python eval.py                         evaluate out/cpu/model.safetensors again: scores_test.json
    python eval.py --run out/gpu --n 1024

Each figure is {value, low, high, n}, with a 95% interval. Test scenes are the same for every run.
"""
import argparse
import copy
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from textwrap import fill, wrap

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import UserError, World
from folder import Folder, open_world
from model import draw, load, write

Z = 1.96                       # half-width of a 95% interval in standard errors
CATEGORIES = {'single': ('bare', 1), 'two': ('bare', 2), 'counting': ('count', None),
              'colours': ('list', 1), 'position': ('relation', 2), 'attribution': ('list', 2)}

# ---- figures with intervals ----
def share(right: int, n: int) -> dict:
    """Share of right answers with its Wilson interval (Wilson 1927), which holds near 0 and 1 too."""
    if n == 0:
        return {'value': None, 'low': None, 'high': None, 'n': 0}
    p, z2 = right / n, Z * Z / n
    centre, half = (p + z2 / 2) / (1 + z2), Z * math.sqrt(p * (1 - p) / n + z2 / 4 / n) / (1 + z2)
    return {'value': p, 'low': centre - half, 'high': centre + half, 'n': n}

def mean_of(figures: list[dict]) -> dict:
    """Unweighted mean of independent shares; interval from their Wilson ones (Zou & Donner 2008)."""
    if not (kept := [f for f in figures if f['n']]):
        return share(0, 0)
    m = sum(f['value'] for f in kept) / len(kept)
    low, high = (math.hypot(*[f['value'] - f[k] for f in kept]) / len(kept) for k in ('low', 'high'))
    return {'value': m, 'low': m - low, 'high': m + high, 'n': sum(f['n'] for f in kept)}

def bootstrap(score, tables) -> dict:
    """score of the summed tables [n, ...], one per picture; its interval from 400 draws of pictures."""
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([score(tables[torch.randint(len(tables), (len(tables),), generator=g)].sum(0))
                         for _ in range(400)])
    low, high = draws.nanquantile(torch.tensor([.025, .975], dtype=draws.dtype)).tolist()
    n, value = len(tables), score(tables.sum(0)).item()        # nan: there was nothing to score
    return {'value': value, 'low': low, 'high': high, 'n': n} if value == value else share(0, 0)

# ---- understanding ----
@torch.no_grad()
def understanding(umm, tok, world: World, n=512, split='test', B=64, Q=16) -> dict:
    """Accuracy by type over n pictures (or more, to fill B) with Q questions each; whole answers count.
    A greedy answer is the true one exactly when every true token, the end included, is the likeliest
    after the true tokens before it: one pass over the true answers scores greedy decoding."""
    right, total = Counter(), Counter()
    for i in range(math.ceil(n / B)):
        s, kinds = world.questions(split, i, B, Q, captions=())
        s.image = umm.inputs(tok, s.image)
        good = (umm.text_head(umm.hidden(s)).argmax(-1) == s.target) | (s.target < 0)  # [B*R,T]
        good, turns = (t.view(len(kinds), -1) for t in (good, s.turn))                # [B,R*T]
        for b, row in enumerate(kinds):
            for turn, kind in enumerate(row, 1):
                total[kind] += 1
                right[kind] += bool(good[b][turns[b] == turn].all())
    scores = {k: share(right[k], total[k]) for k in world.kinds}
    scores = {'mean': mean_of(list(scores.values())), **scores}
    if asked := sum(total[k] for k in data.REASON):            # not about real pictures
        scores['reason'] = share(sum(right[k] for k in data.REASON), asked)
    return scores

def blind(world: World, n=512, split='test') -> dict:
    """Such questions about these scenes and n more, from their words alone: the answer most frequent in
    16 n training scenes after that question; after its type, if possible one it names, if never seen."""
    def asked(split, first, count):
        for i in range(math.ceil(count / 64)):
            scenes, _, rng = world.scenes(split, first + i, 64, pixels=False)
            yield from ((k, *qa) for k in world.kinds for s in scenes for qa in world.ask(s, k, rng))
    seen, right, total = defaultdict(Counter), Counter(), Counter()
    for kind, question, answer in asked('train', 2**30, 16 * n):
        seen[question][answer] += 1
        seen[kind][answer] += 1
    for kind, question, answer in asked(split, 0, min(2 * n, world.limit(split))):
        ranked = [a for a, _ in seen[question if question in seen else kind].most_common()]
        total[kind] += 1
        named = [a for a in ranked if a in question.split(',')[-1]] * (question not in seen)
        right[kind] += answer == (named or ranked or [''])[0]
    scores = {k: share(right[k], total[k]) for k in world.kinds}
    return {'mean': mean_of(list(scores.values())), **scores}

# ---- generation: GenEval's six categories (Ghosh et al. 2023, section 3) and a verifier by rule ----
def components(mask, label):
    """Connected regions (8 neighbours) of mask [B, S, S] with equal label [B, S, S] -> ids, 0 = none:
    the highest pixel index spreads inside each region until nothing changes."""
    planes = (F.one_hot(label).permute(0, 3, 1, 2) * mask[:, None]).float()           # [B,k,S,S]
    ids = planes * torch.arange(1, mask[0].numel() + 1, device=mask.device).view(mask[0].shape)
    while not torch.equal(grown := F.max_pool2d(ids, 3, 1, 1) * planes, ids):
        ids = grown
    return ids.amax(1).long()                                                         # [B,S,S]

def templates(size: int, device):
    """Binary pictures of each shape at 10 radii and 4 half-pixel offsets -> [5 * 40, 1, P, P]."""
    axis = torch.arange(-(half := math.ceil(data.NEAR * 1.1 * size) + 1), half + 1, device=device)  # [P]
    radii = torch.linspace(data.FAR * .9, data.NEAR * 1.05, 10) * size
    inside = [data.distance_field(k, (axis - x)[None] / r, (axis - y)[:, None] / r) < 0
              for k in range(len(data.SHAPES)) for r in radii for x in (0, .5) for y in (0, .5)]
    return torch.stack(inside)[:, None].float()                                       # [200,1,P,P]

def detect(images) -> list[list[data.Object]]:
    """Objects in pictures [B, 3, S, S]: connected saturated regions of one colour and 2% of the picture,
    the shape by the template that overlaps best (IoU over positions and radii; other objects may hide a
    part). What it leaves of a region is looked at again: objects of one colour may touch."""
    B, _, S, _ = images.shape
    rgb = torch.tensor(list(data.COLOURS.values()), device=images.device)             # [6,3]
    solid = images.amax(1) - images.amin(1) > .35                                     # [B,S,S]
    colour = (images.permute(0, 2, 3, 1)[..., None, :] - rgb).square().sum(-1).argmin(-1)   # [B,S,S]
    ids, bank, found = components(solid, colour), templates(S, images.device), [[] for _ in range(B)]
    pad, todo = bank.shape[-1] // 2, []
    for b in range(B):
        index, area = ids[b].unique(return_counts=True)
        todo += [(b, ids[b] == i) for i in index[(area >= .02 * S * S) & (index > 0)]]
    while todo:
        part, todo = todo[:128], todo[128:]
        middle = [m.nonzero().float().mean(0).long().tolist() for _, m in part]       # y, x of regions
        crop = lambda m, y, x: F.pad(m.float(), (pad + 6,) * 4)[y:, x:][:2 * pad + 13, :2 * pad + 13]
        near = [(crop(m, *at), crop(~solid[b], *at)) for (b, m), at in zip(part, middle)]
        hit, over = (F.conv2d(torch.stack(m)[:, None], bank) for m in zip(*near))     # [n,200,13,13]
        area = torch.stack([m.sum() for _, m in part])[:, None, None, None]
        best = (hit / (area + over)).flatten(1).argmax(1).tolist()
        for (b, m), at, (y, x) in zip(part, best, middle):
            k, y, x = at // 169, y + at // 13 % 13 - 6, x + at % 13 - 6
            covered = F.pad(bank[k, 0], (x, S - x, y, S - y))[pad:pad + S, pad:pad + S] > 0     # [S,S]
            if (inside := m & covered).any():
                y, x = inside.nonzero().float().mean(0).add(.5).div(S).tolist()
                name = list(data.COLOURS)[int(colour[b][m][0])]
                shape = data.SHAPES[k * len(data.SHAPES) // len(bank)]
                found[b].append(data.Object(shape, name, 0, x, y, 0.))
                rest = m & (F.max_pool2d(covered[None].float(), 3, 1, 1)[0] == 0)
                todo += [(b, rest)] if rest.sum() >= .02 * S * S else []
    return found

def satisfied(wanted: list[data.Object], category: str, found: list[data.Object]) -> bool:
    """Do objects `found` make the caption of `wanted` true, and no more? (GenEval allows more except
    in counting.) Position by its rule: the centre is off that way by more than a margin."""
    coloured = category in ('colours', 'position', 'attribution')
    key = lambda o: (o.shape, o.colour) if coloured else o.shape
    if Counter(map(key, wanted)) != Counter(map(key, found)):
        return False
    if category != 'position':
        return True
    a, b = (next(f for f in found if key(f) == key(w)) for w in wanted)
    off = {'left of': b.x - a.x, 'right of': a.x - b.x, 'above': b.y - a.y, 'below': a.y - b.y}
    return off[data.relation(*wanted)] > .1

def prompts(world: World, category: str, n: int, split='test'):
    """n scenes that fit a category -> (captions, wanted objects, true pictures [n, 3, S, S])."""
    (style, count), out, index = CATEGORIES[category], [], 2**20
    while len(out) < n:
        scenes, r, rng = world.scenes(split, index, 128)
        for (objs, _), image in zip(scenes, r.image):
            fits = count in (None, len(objs)) and (category != 'two' or objs[0].shape != objs[1].shape)
            if fits and (text := data.caption(objs, style, rng)):
                out.append((text, objs, image))
        index += 1
    texts, wanted, images = zip(*out[:n])
    return texts, wanted, torch.stack(images)

@torch.no_grad()
def generation(umm, tok, world: World, n=64, cfg=2., split='test') -> dict:
    """Share of n prompts per category whose picture passes; `verifier`: of true pictures; `ceiling`: of
    these after the tokenizer's round trip."""
    g, rows = torch.Generator(world.device).manual_seed(0), {}
    for category in CATEGORIES:
        texts, wanted, images = prompts(world, category, n, split)
        codes, _ = draw(umm, world.text, texts, g, cfg=cfg)
        rows[category] = [share(sum(satisfied(w, category, f) for w, f in zip(wanted, detect(x))), n)
                          for x in (tok.decode(codes), images, tok.decode(tok.encode(images)))]
    drawn, verifier, ceiling = zip(*rows.values())
    return {'mean': mean_of(drawn), **dict(zip(rows, drawn)), 'verifier': mean_of(verifier),
            'ceiling': mean_of(ceiling)}

def reader(world: Folder, steps=600, B=64, rare=.02):
    """No rule verifies a real picture: a small CNN learns from the training split which words of a
    caption hold. -> f(pictures, captions): counts [n, words, (hits, true, right noes, false)]."""
    spoken = lambda text: set(re.findall(r'\w+', text.lower()))
    said = [spoken(row['caption']) for row in world.rows['train']]
    often = {w: k / len(said) for w, k in Counter(w for words in said for w in words).items()}
    words = sorted(w for w, p in often.items() if rare <= p <= 1 - rare)
    label = lambda texts: torch.tensor([[float(w in s) for w in words] for s in map(spoken, texts)])
    conv = lambda a, b: (torch.nn.Conv2d(a, b, 3, 2, 1), torch.nn.GroupNorm(8, b), torch.nn.GELU())
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        head = torch.nn.Linear(128 * math.ceil(world.size / 8) ** 2, len(words))
        net = torch.nn.Sequential(*conv(3, 32), *conv(32, 64), *conv(64, 128), torch.nn.Flatten(),
                                  torch.nn.Dropout(), head).to(world.device)
        opt = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=.05)
        falling = torch.optim.lr_scheduler.LinearLR(opt, 1, 0, steps)
        loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1 / often[w] - 1 for w in words]))
        for step in range(steps):
            rows, r, _ = world.scenes('train', 2**30 + step, B)
            loss(net(r.image).cpu(), label([row['caption'] for row in rows])).backward()
            opt.step(), opt.zero_grad(), falling.step()
    def read(images, texts):
        true, pred = label(texts) > 0, net.eval()(images).cpu() > 0                   # [n,words]
        return torch.stack([true & pred, true, ~true & ~pred, ~true], -1).double()
    return read

@torch.no_grad()
def recognition(umm, tok, world: Folder, n=192, cfg=2., split='test') -> dict:
    """Generation on real pictures: how well `reader` tells the words of n captions in pictures drawn
    from them, mean over words of balanced accuracy (chance 1/2). `verifier`: in true pictures, that is
    its own accuracy; `ceiling`: in these after the tokenizer; `other`: in what other captions drew."""
    rows, r, _ = world.scenes(split, 2**20, n)
    texts, read = [row['caption'] for row in rows], reader(world)
    g = torch.Generator(world.device).manual_seed(0)
    drawn = tok.decode(draw(umm, world.text, texts, g, cfg=cfg)[0])
    score = lambda c: ((c[:, 0] / c[:, 1] + c[:, 2] / c[:, 3]) / 2).nanmean()         # c [words,4]
    kinds = zip(('mean', 'verifier', 'ceiling', 'other'),
                (drawn, r.image, tok.decode(tok.encode(r.image)), drawn.roll(1, 0)))
    return {kind: bootstrap(score, read(x, texts)) for kind, x in kinds}

# ---- segmentation and tokenizer ----
def classes_of(images, palette=data.PALETTE):
    """Segmentation pictures [B, 3, S, S] -> class maps [B, S, S]: the nearest colour of the palette."""
    return torch.cdist(images.permute(0, 2, 3, 1), palette.to(images.device) / 255).argmin(-1)  # [B,S,S]

def miou(pred, true, k=len(data.CLASSES)) -> dict:
    """Mean over the classes that occur of intersection over union, pooled over pictures [n, S, S] with
    classes < k; pixels whose true class is 255 do not count. Bootstrapped over pictures."""
    both = torch.where(true == 255, k * k, true * k + pred).flatten(1).cpu()          # [n,S*S]
    joint = torch.stack([x.bincount(minlength=k * k + 1)[:-1] for x in both]).double()  # [n,k*k]

    def score(c):                                        # confusion [..., k*k] -> mIoU [...]
        c = c.unflatten(-1, (k, k))                                                   # [...,true,pred]
        inside = c.diagonal(dim1=-2, dim2=-1)
        union = c.sum(-1) + c.sum(-2) - inside                                        # [...,k]
        return (inside / union.clamp(min=1)).sum(-1) / (union > 0).sum(-1)
    return bootstrap(score, joint)

@torch.no_grad()
def segmentation(umm, tok, world: World, n=192, split='test') -> dict:
    """mIoU of generated maps in pixel space, and the tokenizer's ceiling decode(encode(true map))."""
    s, target, r = world.proxies(split, 2**21, n, 'seg')
    s.image = umm.inputs(tok, s.image)
    drawn = tok.decode(umm.generate(s, temperature=0))
    best = tok.decode(tok.encode(target))
    score = lambda x: miou(classes_of(x, r.palette), r.classes, len(r.palette))
    return {'miou': score(drawn), 'ceiling': score(best)}

@torch.no_grad()
def tokenizer(tok, world: World, n=512, split='test') -> dict:
    """PSNR in dB of pictures and of each proxy's maps, mIoU of masks, codes used, perplexity of all."""
    _, r, _ = world.scenes(split, 2**22, n)
    scores, count = {}, torch.zeros(tok.c.codebook)
    for name, proxy in {**world.maps, 'recon': data.PROXIES['recon']}.items():
        x = proxy(r)
        codes = tok.encode(x)
        count += codes.flatten().bincount(minlength=tok.c.codebook).cpu()
        y = tok.decode(codes)
        mse = (x - y).square().mean((1, 2, 3))                                        # [n]
        psnr = bootstrap(lambda total: total / len(x), -10 * mse.log10().cpu())
        scores['psnr' if name == 'recon' else 'psnr_' + name] = psnr
        if name == 'seg':
            scores['mask_ceiling'] = miou(classes_of(y, r.palette), r.classes, len(r.palette))
    p = count / count.sum()
    return {**scores, 'used': share(int((count > 0).sum()), len(count)),
            'perplexity': torch.exp(-(p * (p + 1e-10).log()).sum()).item()}

def grid(rows, captions=(), scale=4, gap=4) -> Image.Image:
    """rows: list of [n, 3, S, S] in [0, 1] -> one picture; captions: texts under each row's pictures."""
    n, S, line = max(len(r) for r in rows), rows[0].shape[-1] * scale, 13
    heights = [S + gap + line * max([len(wrap(t, 21)) for t in texts] or [0])
               for texts in [*captions, *[()] * (len(rows) - len(captions))]]
    canvas = Image.new('RGB', (n * (S + gap) + gap, sum(heights) + gap), 'white')
    draw, y = ImageDraw.Draw(canvas), gap
    for k, row in enumerate(rows):
        for i, x in enumerate(row):
            pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            canvas.paste(Image.fromarray(pixels).resize((S, S), Image.NEAREST), (gap + i * (S + gap), y))
            if k < len(captions) and i < len(captions[k]):
                at = gap + i * (S + gap), y + S
                draw.multiline_text(at, fill(captions[k][i], 21), 'black', spacing=1)
        y += heights[k]
    return canvas

@torch.no_grad()
def picture(umm, tok, world: World, cfg=2., n=8) -> Image.Image:
    """What the model can do, on validation scenes: drawings of texts; input, generated map, true map and
    a question with the model's answer and, where that is wrong, the true one."""
    scenes, r, rng = world.scenes('val', 2**21, n)
    rows, notes, image = [r.image], [[]], umm.inputs(tok, r.image)
    if world.captions:
        kinds, g = list(CATEGORIES), torch.Generator(world.device).manual_seed(1)
        wanted = [world.describe(s, 'list', rng) for s in scenes] if isinstance(world, Folder) else \
            [prompts(world, kinds[i % len(kinds)], i + 1, 'val')[0][i] for i in range(n)]
        rows, notes = [tok.decode(draw(umm, world.text, wanted, g, cfg=cfg)[0]), *rows], [wanted, *notes]
    if 'seg' in world.maps:
        s, target, _ = world.proxies('val', 2**21, n, 'seg')
        s.image = image
        rows, notes = [*rows, tok.decode(umm.generate(s, temperature=0)), target], [*notes, [], []]
    if kinds := list(world.kinds):
        qa = [next((x for k in kinds[i % len(kinds):] + kinds for x in world.ask(scene, k, rng)), '  ')
              for i, scene in enumerate(scenes)]
        s = data.pack(world.text, [[(q, None)] for q, _ in qa], image, world.device)
        notes[-1] = [q.strip() and f'{q} {a}' + f' (true: {t})' * (a != t.lower())
                     for (q, t), a in zip(qa, write(umm, world.text, s, temperature=0))]
    return grid(rows, notes)

# ---- everything at once ----
def evaluate(umm, tok, world: World, n=512, cfg=2., split='test') -> dict:
    """All measurements, nested; n pictures for understanding, in proportion for the others."""
    world, real = copy.copy(world), isinstance(world, Folder)
    umm.eval(), tok.eval()
    world.seed, n = 0, min(n, world.limit(split))              # the same scenes for every run
    drawing = recognition(umm, tok, world, min(n, 192), cfg, split) if real and world.captions else \
        {} if real else generation(umm, tok, world, max(2, n // 8), cfg, split)
    maps = 'seg' in world.maps and segmentation(umm, tok, world, min(256, max(2, n * 3 // 8)), split)
    chance = {} if real else data.CHANCE | {'mean': sum(data.CHANCE.values()) / len(data.CHANCE)}
    return {'understanding': understanding(umm, tok, world, n, split), 'chance': chance,
            'blind': blind(world, n, split), 'generation': drawing, 'segmentation': maps or {},
            'tokenizer': tokenizer(tok, world, n, split)}

def table(scores: dict) -> str:
    """The scores as Markdown."""
    show = lambda f: f'{f:.0f}' if isinstance(f, float) else '-' if not f['n'] else \
        f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]"
    chance, rows = scores.get('chance', {}), []
    for part in ('understanding', 'generation', 'segmentation', 'tokenizer'):
        rows += [('**' + part + '**', '[95% interval]', 'n', *['blind', 'chance'] * (not rows))]
        for k, f in scores[part].items():
            beside = [show(scores['blind'][k])[:5], f'{chance[k]:.3f}' if chance else ''] if (
                part == 'understanding' and k in scores['blind']) else []
            rows += [(k, show(f), '' if isinstance(f, float) else f['n'], *beside)]
    lines = ['| ' + ' | '.join(f'{c!s:<{w}}' for c, w in zip((*r, '', ''), (17, 23, 5, 5, 6))) + ' |'
             for r in rows]
    return '\n'.join([lines[0], '|' + '---|' * 5, *lines[1:]])

def report(scores: dict, path: Path):
    """Print the table and write it, with all digits, to `path`."""
    print(table(scores))
    Path(f'{path}.part').write_text(json.dumps(scores, indent=1) + '\n')
    os.replace(f'{path}.part', path)

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument('--run', default='out/cpu', help='run folder (default %(default)s)')
    p.add_argument('--n', type=int, default=512, help='pictures for understanding (default %(default)s)')
    p.add_argument('--cfg', type=float, default=2., help='guidance scale (default %(default)s)')
    p.add_argument('--data', default=None, help='the folder of real pictures, if it has moved')
    p.add_argument('--split', default='test', choices=data.SPLITS[1:], help='default %(default)s')
    p.add_argument('--device', default='auto', help='cpu, cuda or mps (default %(default)s)')
    a = p.parse_args(argv)
    if a.n < 16 or not 0 <= a.cfg <= 100:
        raise UserError(f'--n is {a.n}, --cfg is {a.cfg}: --n must be 16 or more, --cfg 0 to 100')
    device = data.find_device(a.device)
    tok, umm, text, _, meta = load(Path(a.run) / 'model.safetensors', device)
    s = meta['settings']
    world = open_world(a.data or s.get('data'), umm.c.size, 0, device, text, s.get('skip_bad'))
    scores = evaluate(umm, tok, world, a.n, a.cfg, a.split)
    report(scores, Path(a.run) / f'scores_{a.split}.json')

if __name__ == '__main__':
    data.guard(main)
