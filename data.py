"""All that the model sees: scenes, their renderings, proxy targets, captions, questions and text tokens.

A scene holds 1-4 objects (shape, colour, position, depth) on a textured grey background. Everything is
exact and free: class, instance and depth of each pixel, answers to questions. A scene is a pure
function of (seed, split, index): nothing is stored; train, val and test never meet.
Coordinates are in units of the picture's side: x to the right, y down, (0, 0) the top left corner.
"""
import contextlib
import ctypes
import math
import os
import random
import re
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, takewhile

# OpenMP's threads wait for each other in a loop that keeps their cores busy. Beside another program
# that costs several times what it saves, so they give up after some microseconds. OpenMP reads this
# when torch is loaded: every program here imports data before torch. What the user has set, stays.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '2000')

import tiktoken
import torch
import torch.nn.functional as F

SHAPES = ('circle', 'square', 'triangle', 'cross', 'ring')
COLOURS = {'red': (.90, .12, .12), 'green': (.12, .68, .20), 'blue': (.12, .28, .95),
           'yellow': (.96, .86, .10), 'purple': (.72, .18, .85), 'cyan': (.10, .82, .85)}
CLASSES = ('background',) + SHAPES
# The one statement of the segmentation palette: row = class. Corners of the RGB cube are as far apart as
# six colours can be, and the map from class to colour is fixed, so there is a single right answer.
PALETTE = torch.tensor([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)])
CELLS = ('top left', 'top right', 'bottom left', 'bottom right')   # in each one object at most
PLURAL = {name: name + ('es' if name.endswith('s') else 's') for name in SHAPES}
NUMBERS = ('zero', 'one', 'two', 'three', 'four')
CHANCE = {'count': 1 / 4, 'colour': 1 / 6, 'shape': 1 / 5, 'exist': 1 / 2, 'relation': 1 / 4,
          'depth': 1 / 2, 'distance': 1 / 2, 'where': 1 / 4, 'size': 1 / 2, 'what': 1 / 30}
VISUAL = tuple(CHANCE)         # types of question that need the picture
REASON = ('sum', 'more')       # text-only control: no visual supervision should move these
KINDS = VISUAL * 2 + REASON    # what training asks, and how often; then, once shapes are known:
FINDING = VISUAL + REASON + ('where', 'exist') * 7 + ('relation',) * 2 + ('distance',)
NEAR, FAR = .265, .17          # radius of the nearest and of the farthest object
SPLITS, MAX_TEXT, MAX_PLAN = ('train', 'val', 'test'), 512, 200       # longest text and plan, tokens

class UserError(Exception):
    """What a user got wrong: what, which value, how to fix it."""

def guard(main):
    """Run a command line; what is wrong with input or disk becomes one line on stderr, exit status 2."""
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as e:
        hint = ['(missing? no room? try --out)'] * isinstance(e, OSError)
        print('error:', str(e) or 'stopped', *hint, file=sys.stderr)
        sys.exit(2)
    except Exception:
        print('this is a bug in nanoUMM; please report it with what follows', file=sys.stderr)
        raise

def find_device(name='auto') -> torch.device:
    """The one place where it is chosen; auto: cuda where there is one, else cpu."""
    there = [d for d in ('cuda', 'mps', 'cpu') if getattr(torch, d).is_available()]
    if name == 'auto':
        name = 'cuda' if 'cuda' in there else 'cpu'
    if name not in there:
        raise UserError(f"--device is {name!r}, but this machine has {', '.join(there)}")
    # glibc hands large buffers back to the system and gets them again, zeroed: with M_MMAP_MAX (-4) = 0
    # and no M_TRIM_THRESHOLD (-1) it keeps them, and a step is 1.3 times faster.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)
    return torch.device(name)

def generator(seed: int, split: str, index: int, device='cpu') -> torch.Generator:
    """A random source; of the 32 bits that torch looks at on a CPU two are the split's, 30 a hash."""
    key = random.Random(f'{seed}/{index}').getrandbits(30) * 4 + SPLITS.index(split)
    return torch.Generator(device).manual_seed(key)

# ---- scenes and their renderings ----
class Scenes(namedtuple('Scenes', 'n shape colour cell xy z theme')):
    """B scenes as tensors; slots are in reading order. n [B]: number of objects, 1 to 4, slots >= n are
    empty; shape, colour, cell [B,4]: index into SHAPES, COLOURS, CELLS; xy [B,4,2]: centres; z [B,4]:
    depth, 0 near to 1 far; theme [B]: what may be counted, 0-4 a shape, 5-10 a colour, -1 nothing."""
    radius = property(lambda self: NEAR + (FAR - NEAR) * self.z)                      # [B,4]

class Object(namedtuple('Object', 'shape colour cell x y z')):
    """One object of one scene, for the text functions: names of shape and colour, then as in Scenes."""
    name = property(lambda self: f'{self.colour} {self.shape}')

def sample_scenes(B: int, g: torch.Generator) -> Scenes:
    """Draw B scenes. A (colour, shape) pair occurs once at most: a name means one object. 40% have a
    theme: a shape or colour of exactly c objects, P(c) = 1/5, n is uniform: no count can be guessed."""
    S, C, M = len(SHAPES), len(COLOURS), len(CELLS)
    rand = lambda *shape: torch.rand(*shape, generator=g, device=g.device)
    joint = torch.tensor([[.125, .125, 0, 0, 0], [.025, .025, .2, 0, 0],      # rows n = 1-4, columns c
                          [.025, .025, 0, .2, 0], [.025, .025, 0, 0, .2]], device=g.device)
    pick = torch.multinomial(joint.flatten(), B, replacement=True, generator=g)       # [B]
    theme = torch.where(rand(B) < .4, (rand(B) * (S + C)).long(), -1)                 # [B]
    n, c = pick // 5 + 1, torch.where(theme >= 0, pick % 5, 0)[:, None]               # [B], [B,1]
    pair = torch.arange(S * C, device=g.device)
    has = ((pair // C == theme[:, None]) | (pair % C + S == theme[:, None])).float()  # [B,30]
    score, slot = rand(B, S * C), torch.arange(M, device=g.device).expand(B, M)
    inside, outside = (score + has).topk(M).indices, (score - has).topk(M).indices    # [B,4] distinct
    pairs = torch.where(slot < c, inside, outside.gather(1, (slot - c).clamp(min=0)))
    cell = rand(B, M).argsort(1)                                                      # [B,4]
    order = torch.where(slot < n[:, None], cell, cell + M).argsort(1)                 # empty slots last
    cell, pairs = cell.gather(1, order), pairs.gather(1, order)
    xy = (torch.stack([cell % 2, cell // 2], -1) + .5) / 2 + (rand(B, M, 2) - .5) * .12
    return Scenes(n, pairs // C, pairs % C, cell, xy, rand(B, M), theme)

def distance_field(shape: int, x, y):
    """Signed distance (negative inside) to shape `shape` of radius 1 at the origin; x, y of any size."""
    box = lambda w, h: torch.maximum(x.abs() - w, y.abs() - h)
    return {'circle': lambda: torch.hypot(x, y) - .95,
            'square': lambda: box(.82, .82),
            'triangle': lambda: torch.maximum(x.abs() * .866 - (y - .15) * .5, y - .15) - .58,
            'cross': lambda: torch.minimum(box(1, .32), box(.32, 1)),
            'ring': lambda: (torch.hypot(x, y) - .70).abs() - .25}[SHAPES[shape]]()

class Rendering(namedtuple('Rendering', 'image classes instance depth palette', defaults=[PALETTE])):
    """Pictures, exactly annotated. image [B,3,S,S] in [0, 1]: all that a model may see; classes [B,S,S]:
    row of the palette, 255 = ignored; instance [B,S,S]: slot of the object + 1, 0 = background; depth
    [B,S,S]: nearness, 0 = background, 1 = nearest."""

def render(s: Scenes, size: int, g: torch.Generator) -> Rendering:
    """Draw scenes at size x size pixels, far to near, anti-aliased; g: texture and noise."""
    B, device = len(s.n), s.n.device
    rand = lambda *shape: torch.rand(*shape, generator=g, device=g.device).to(device)
    axis = (torch.arange(size, device=device) + .5) / size
    X, Y = axis.expand(1, size, size), axis[:, None].expand(1, size, size)
    most = torch.tensor([math.pi, 2 * math.pi, 4, .05], device=device)
    angle, phase, freq, amp = rand(4, B, 1, 1) * most[:, None, None, None]            # [B,1,1] each
    stripes = amp * torch.sin(2 * math.pi * (freq + 2) * (X * angle.cos() + Y * angle.sin()) + phase)
    image = .3 + .4 * rand(B, 1, 1, 1) + .06 * (rand(B, 3, 1, 1) - .5) + stripes[:, None]  # [B,3,S,S]
    instance = torch.zeros(B, size, size, dtype=torch.long, device=device)
    rgb = torch.tensor(list(COLOURS.values()), device=device)
    for slot in s.z.argsort(1, descending=True).T:                                    # [B]
        pick = lambda t: t[torch.arange(B, device=device), slot]
        shape, (x, y), r = pick(s.shape), pick(s.xy).T[..., None, None], pick(s.radius)[:, None, None]
        x, y = (X - x) / r, (Y - y) / r                                               # [B,S,S]
        d = torch.full((B, size, size), 9., device=device)
        for k in range(len(SHAPES)):
            rows = ((shape == k) & (slot < s.n)).nonzero()[:, 0]
            d[rows] = distance_field(k, x[rows], y[rows])
        alpha = (.5 - d * r * size).clamp(0, 1)                                       # [B,S,S]
        image = torch.lerp(image, rgb[pick(s.colour)][:, :, None, None], alpha[:, None])
        instance = torch.where(alpha >= .5, slot[:, None, None] + 1, instance)
    look_up = lambda t: F.pad(t, (1, 0)).gather(1, instance.flatten(1)).view_as(instance)  # [B,S,S]
    image = image + .015 * torch.randn(image.shape, generator=g, device=g.device).to(device)
    return Rendering(image.clamp(0, 1), look_up(s.shape + 1), instance, look_up(1 - .75 * s.z))

def objects(s: Scenes) -> list[list[Object]]:
    """The scenes as lists of Object in reading order."""
    names, rows = list(COLOURS), zip(*(t.tolist() for t in s))
    return [[Object(SHAPES[shape[k]], names[colour[k]], cell[k], *xy[k], z[k]) for k in range(n)]
            for n, shape, colour, cell, xy, z, _ in rows]

# ---- proxy targets, which the model may be taught to generate: Rendering -> [B,3,S,S] in [0, 1] ----
def seg(r: Rendering):
    """Semantic segmentation: the palette colour of each pixel's class, never blended."""
    rgb = r.palette.to(r.image.device)[r.classes % 255]             # ignored pixels as background
    return (rgb / 255).permute(0, 3, 1, 2)                                            # [B,3,S,S]

def edge(r: Rendering):
    """Edge map: Sobel gradient magnitude of the luminance, the texture's own edges included."""
    grey = F.pad(r.image.mean(1, keepdim=True), (1,) * 4, mode='replicate')           # [B,1,S+2,S+2]
    kx = torch.tensor([[-1., 0, 1], [-2, 0, 2], [-1, 0, 1]], device=grey.device)
    g = F.conv2d(grey, torch.stack([kx, kx.T])[:, None])                              # [B,2,S,S]
    return g.norm(dim=1, keepdim=True).clamp(max=1).expand_as(r.image)                # [B,3,S,S]

def instance(r: Rendering):
    """Class-agnostic instances, as SAM's: colours differ within a picture and mean nothing beyond it."""
    turn = (r.image.mean((1, 2, 3)) * 1e6).long()[:, None, None]                      # [B,1,1]
    return seg(r._replace(classes=(r.instance > 0) * ((r.instance + turn) % 5 + 1)))

MAPS = {'seg': seg, 'instance': instance, 'edge': edge,
        'depth': lambda r: r.depth[:, None].expand_as(r.image)}                       # near = bright
# Restoration: the input is x [B,3,S,S] spoilt (u: random numbers of that size), the target the picture.
SPOIL = {'denoise': lambda x, u: (x + .7 * (u - .5)).clamp(0, 1),
         'deblur': lambda x, u: F.avg_pool2d(F.pad(x, (3,) * 4, mode='replicate'), 7, 1),
         'superres': lambda x, u: F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.),
         'inpaint': lambda x, u: torch.where(F.interpolate(u[:, :1, ::8, ::8], x.shape[2:]) < .4, .5, x)}
PROXIES = MAPS | dict.fromkeys(('recon', *SPOIL), lambda r: r.image)

# ---- text; objects are listed in reading order: one right order leaves less to guess per word ----
STYLES = {'list': 3, 'place': 2, 'relation': 3, 'bare': 3, 'count': 4}      # captions: how often
WORDS = {
    'draw': ('{}', 'draw {}', 'a picture of {}'), 'list': ('describe the picture.', 'what do you see?'),
    'place': ('describe the picture with places.', 'what is where?'),
    'seg': ('segment the picture.', 'color every object by its class.', 'show the segmentation map.'),
    'instance': ('segment every object.', 'color every object.', 'show every object.'),
    'depth map': ('estimate the depth.', 'color every object by its distance.', 'show the depth map.'),
    'edge': ('find the edges.', 'draw the outline of every object.', 'show the edge map.'),
    'recon': ('copy the picture.', 'draw every object again.', 'show the same picture.'),
    'exist': ('is there a {}?', 'do you see a {}?'), 'sum': ('what is {} plus {}?', 'add {} and {}.'),
    'colour': ('what color is the {}?', 'name the color of the {}.'),
    'shape': ('what shape is the {} object?', 'name the {} shape.'),
    'relation': ('where is the {} relative to the {}?', 'on which side is the {} of the {}?'),
    'depth': ('which is closer, the {} or the {}?', 'what is nearer to you, the {} or the {}?'),
    'distance': ('which is nearest to the {}, the {} or the {}?',
                 'what is next to the {}, the {} or the {}?'),
    'where': ('where is the {}?', 'find the {}.'), 'count': ('how many {} are there?', 'count the {}.'),
    'what': ('what is at the {}?', 'name the object at the {}.'),
    'size': ('is the {} small or large?', 'how large is the {}?'),
    'more': ('which is more, {} or {}?', 'what is larger, {} or {}?')}

def relation(a: Object, b: Object, margin=1.5):
    """Where a is as seen from b: 'left of', 'right of', 'above' or 'below'; None if not clear-cut."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > margin * abs(dy):
        return 'left of' if dx < 0 else 'right of'
    if abs(dy) > margin * abs(dx):
        return 'above' if dy < 0 else 'below'

def caption(objs: list[Object], style: str, rng: random.Random):
    """A caption in one of STYLES, or None where the style does not fit the objects."""
    names = [f'a {o.shape if style == "bare" else o.name}' for o in objs]
    if style == 'place':
        return ', '.join(f'{CELLS[o.cell]} {name}' for o, name in zip(objs, names))
    if style == 'relation' and len(objs) == 2:
        a, b = rng.sample(objs, 2)
        return relation(a, b) and f'a {a.name} {relation(a, b)} a {b.name}'
    if style == 'count' and len(objs) > 1 and len({o.shape for o in objs}) == 1:
        return f'{NUMBERS[len(objs)]} {PLURAL[objs[0].shape]}'
    if style == 'list' or (style == 'bare' and len(objs) <= 2):
        return ' and '.join(', '.join(names).rsplit(', ', 1))

class Questions:
    """Questions about one scene, balanced given their words: blind guesses stay at CHANCE."""

    def __init__(self, objs: list[Object], theme: int, rng: random.Random):
        self.objs, self.theme, self.rng = objs, theme, rng

    def ask(self, kind: str):
        """-> (question, answer) as text, or None where the scene allows no such question."""
        if kind in ('count', 'exist'):
            words, answer = getattr(self, kind)()
        elif kind in REASON:
            answer = str((sum if kind == 'sum' else max)(words := self.rng.sample(range(10), 2)))
        elif found := self.about(kind):
            words, answer = self.rng.choice(found)
            if kind in ('depth', 'distance'):              # the right one of the last two may be either
                words = words[:-2] + self.rng.sample(words[-2:], 2)
        else:
            return None
        return self.rng.choice(WORDS[kind]).format(*words), answer

    def about(self, kind: str) -> list:
        """All [words to fill in], answer of a type of question with one right answer here."""
        objs, gap = self.objs, lambda a, b: math.hypot(a.x - b.x, a.y - b.y)
        pairs = [(a, b) for a in objs for b in objs]
        times = lambda word: sum(word in (o.shape, o.colour) for o in objs)
        return {
            'colour': lambda: [([o.shape], o.colour) for o in objs if times(o.shape) == 1],
            'shape': lambda: [([o.colour], o.shape) for o in objs if times(o.colour) == 1],
            'relation': lambda: [([a.name, b.name], s.replace(' of', ''))
                                 for a, b in pairs if (s := relation(a, b))],
            'depth': lambda: [([a.name, b.name], a.name) for a, b in pairs if a.z < b.z - .3],
            'distance': lambda: [([x.name, a.name, b.name], a.name) for x in objs for a, b in pairs
                                 if 0 < gap(x, a) < gap(x, b) - .12],
            'where': lambda: [([o.name], CELLS[o.cell]) for o in objs],
            'size': lambda: [([o.name], ('large', 'small')[o.z > .5]) for o in objs
                             if abs(o.z - .5) > .1],
            'what': lambda: [([CELLS[o.cell]], o.name) for o in objs]}[kind]()

    def count(self):
        if self.theme < 0 or self.rng.random() < .3:
            return ['objects'], str(len(self.objs))
        name = (SHAPES + tuple(COLOURS))[self.theme]
        words = [PLURAL[name] if name in SHAPES else f'{name} objects']
        return words, str(sum(name in (o.shape, o.colour) for o in self.objs))

    def exist(self):
        """'no' recombines colours and shapes that are there if possible (as POPE's adversarial)."""
        if self.rng.random() < .5:
            return [self.rng.choice(self.objs).name], 'yes'
        shapes, colours = {o.shape for o in self.objs}, {o.colour for o in self.objs}
        hard = {f'{c} {s}' for c in colours for s in shapes} - {o.name for o in self.objs}
        half = {f'{c} {s}' for c in COLOURS for s in SHAPES if (c in colours) != (s in shapes)}
        return [self.rng.choice(sorted(hard or half))], 'no'

# ---- text tokens and sequences ----
class Text:
    """Text <-> token ids, byte-level BPE. No string encodes to the specials `answer` and `end`."""

    def __init__(self, vocab: list[bytes]):
        self.vocab = list(vocab)
        if vocab[:256] != [bytes([b]) for b in range(256)] or len(set(vocab)) < len(vocab):
            raise ValueError('a vocabulary starts with all bytes and names no token twice')
        self.answer, self.end, self.size = len(vocab), len(vocab) + 1, len(vocab) + 2
        self.bpe = tiktoken.Encoding('nanoumm', pat_str=r' ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+',
                                     mergeable_ranks=dict(zip(vocab, count())), special_tokens={})
        self.encode = lru_cache(65536)(self._encode)           # the world's sentences repeat

    def _encode(self, text: str) -> list[int]:
        return self.bpe.encode_ordinary(' ' + ' '.join(text.lower().split())) if text.strip() else []

    def decode(self, ids) -> str:
        ids = takewhile(lambda i: i != self.end, ids)            # what follows the end says nothing
        return self.bpe.decode([i for i in ids if i < self.answer]).strip()

    @staticmethod
    def from_corpus(texts, size=512):
        """Train BPE (Sennrich et al. 2016) on the distinct words of `texts`; deterministic."""
        words = {w for t in texts for w in re.findall(r'\w+|[^\w\s]+', t.lower())}
        words = [[bytes([b]) for b in (' ' + w).encode()] for w in sorted(words)]
        vocab = [bytes([b]) for b in range(256)]
        while len(vocab) < size - 2 and (pairs := Counter(p for w in words for p in zip(w, w[1:]))):
            pair = max(pairs, key=lambda p: (pairs[p], p))
            vocab.append(b''.join(pair))
            for w in words:
                for i in reversed(range(len(w) - 1)):
                    if tuple(w[i:i + 2]) == pair:
                        w[i:i + 2] = vocab[-1:]
        return Text(vocab)

@dataclass
class Sequence:
    """A batch of [picture][text][codes]; picture and codes may be absent. The text is made of turns that
    see the picture but not each other: many questions cost one pass. The codes continue turn 1."""
    text: torch.Tensor                       # [B*R,T] token ids; R rows of text share a picture
    turn: torch.Tensor                       # [B*R,T] 1, 2, ..., or -1 for padding
    target: torch.Tensor | None = None       # [B*R,T] the token to predict here, -1 = none
    image: torch.Tensor | None = None        # [B,3,S,S] in [0, 1]; codes [B,N] for image_input code
    codes: torch.Tensor | None = None        # [B,N] codes of the picture to generate

def pack(text: Text, rows, image=None, device='cpu', room=96) -> Sequence:
    """rows: for each picture a list of turns (prompt, answer), in words; answer None: the prompt alone.
    Only answer and end are supervised. Many turns are spread over R rows of some `room` tokens, which
    share the picture: attention, whose cost is quadratic, need not span what it may not see."""
    turns = [[[(t, k, -1) for t in text.encode(ask)] + [(t, k, y) for t, y in zip([text.answer] + a, a)]
              for k, (ask, answer) in enumerate(row, 1)
              for a in [[] if answer is None else text.encode(answer) + [text.end]]] for row in rows]
    R, out = max(1, min(max(map(len, turns)), 1 + max(sum(map(len, row)) for row in turns) // room)), []
    for row in turns:
        out += (parts := [[] for _ in range(R)])
        for t in sorted(row, key=len, reverse=True):           # the longest first: rows of equal length
            min(parts, key=len).extend(t)
    T = max(1, *map(len, out))
    grid = torch.tensor([row + [(text.end, -1, -1)] * (T - len(row)) for row in out], device=device)
    return Sequence(*grid.unbind(-1), image=image)                                    # [B*R,T] each

class World:
    """Endless batches from the procedural world; each is a pure function of (seed, split, index)."""
    kinds, maps, captions = VISUAL, MAPS, True       # types of question, maps, captions: what there is
    example, vocab, limit = 'a red circle left of a blue square', 512, lambda self, split: math.inf
    checksum = 0                                     # of the data, to notice that they have changed
    targets = property(lambda self: [k for k in PROXIES if k in self.maps or k not in MAPS])
    describe = lambda self, scene, style, rng: caption(scene[0], style, rng)

    def __init__(self, size=32, seed=0, device='cpu', text: Text | None = None):
        self.size, self.seed, self.device = size, seed, device
        self.text = text or Text.from_corpus((*self.corpus(), *sum(WORDS.values(), ())), self.vocab)

    def scenes(self, split: str, index: int, B: int, pixels=True):
        """-> (B scenes: (objects, theme), their Rendering, a random.Random for the text)."""
        scenes = sample_scenes(B, generator(self.seed, split, index))
        found = list(zip(objects(scenes), scenes.theme.tolist()))
        g = generator(self.seed, split, index + 2**31, self.device)
        r = render(Scenes(*(t.to(self.device) for t in scenes)), self.size, g) if pixels else None
        return found, r, random.Random(f'{self.seed}/{split}/{index}')

    def corpus(self):
        """All kinds of sentences of the world, to train text tokens on."""
        scenes, _, rng = self.scenes('train', 0, 300, pixels=False)
        for objs, theme in scenes:
            yield from (c for style in STYLES if (c := caption(objs, style, rng)))
            for kind in VISUAL + REASON:
                yield from Questions(objs, theme, rng).ask(kind) or ()

    def ask(self, scene, kind: str, rng) -> list:
        """[(question, answer)] of one type about a scene, or []."""
        return [qa] if (qa := Questions(*scene, rng).ask(kind)) else []

    def turns(self, scene, Q: int, rng, kinds=KINDS) -> list:
        turns = []                                            # [(type, (question, answer))]
        while len(turns) < Q:
            turns += [(kind, qa) for kind in [rng.choice(kinds)] for qa in self.ask(scene, kind, rng)]
        return turns

    def questions(self, split, index, B, Q, captions=('place', 'place', 'list'), kinds=KINDS):
        """-> (Sequence of B pictures with Q questions and one of `captions`, kinds of the turns)."""
        scenes, r, rng = self.scenes(split, index, B)
        rows = []
        for scene in scenes:
            rows.append(self.turns(scene, Q, rng, kinds))
            for c in captions and [rng.choice(captions)]:
                ask, said = rng.choice(WORDS[c]), self.describe(scene, c, rng)
                said = said or self.describe(scene, 'list', rng)
                rows[-1] += [(c, (ask, said))] * bool(said)
        s = pack(self.text, [[qa for _, qa in turns] for turns in rows], r.image, self.device)
        return s, [[kind for kind, _ in turns] for turns in rows]

    def drawings(self, split, index, B, drop=.1):
        """-> (Sequence of prompts and plans, a share `drop` empty, target pictures [B, 3, S, S])."""
        scenes, r, rng = self.scenes(split, index, B)
        rows = []
        for scene in scenes:
            fit = {s: c for s in STYLES if (c := self.describe(scene, s, rng))}
            style = rng.choices(list(fit), [STYLES[s] for s in fit])[0]
            turn = rng.choice(WORDS['draw']).format(fit[style]), fit.get('place', '')
            rows.append([turn if rng.random() >= drop else ('', None)])
        return pack(self.text, rows, device=self.device), r.image

    def proxies(self, split, index, B, name):
        """-> (Sequence of pictures with an instruction, the proxy's maps to generate, Rendering)."""
        _, r, rng = self.scenes(split, index, B)
        words = WORDS['depth map' if name == 'depth' else name if name in MAPS else 'recon']
        u = torch.rand(r.image.shape, generator=generator(self.seed, split, index + 2**32))
        image = SPOIL[name](r.image, u.to(self.device)) if name in SPOIL else r.image
        s = pack(self.text, [[(rng.choice(words), None)] for _ in r.image], image, self.device)
        return s, PROXIES[name](r), r
