"""All that the model sees: data sets, scenes, renderings, maps, captions, questions, text tokens.

A scene of the procedural world holds 1-4 objects (shape, colour, position, depth) on a textured grey
background. Everything is exact and free: class, instance and depth of each pixel, answers to questions.
A batch of B scenes is a pure function of (seed, split, stream, index, B): nothing is stored; train, val
and test never meet. Coordinates are in units of the picture's side: x to the right, y down, (0, 0) the
top left corner.
"""
import contextlib
import ctypes
import math
import os
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product, takewhile
from pathlib import Path
from typing import NamedTuple

# OpenMP's threads wait for each other in a loop that keeps their cores busy. Beside another program
# that costs several times what it saves, so they give up after some microseconds. OpenMP reads this
# when torch is loaded: every program here imports data before torch. What the user has set, stays.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '2000')

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ('train', 'val', 'test')
MAX_TEXT = 512                 # tokens of the longest text
MAX_PLAN = 200                 # tokens of the longest plan, which is written before a drawing


class UserError(Exception):
    """What a user got wrong: what, which value, how to fix it."""


def fail(why: str):
    """One line on stderr, exit status 2."""
    why = CONTROL.sub(' ', why)                                # it may quote a stranger's file
    print(f'error: {why}', file=sys.stderr)
    sys.exit(2)


def guard(main):
    """Run a command line; what is wrong with input or disk becomes one line, see fail()."""
    sys.stdout.reconfigure(errors='replace')                   # a terminal may not know all letters
    try:
        main()
    except OSError as e:
        fail(f'{e} (missing? no room? try --out)')
    except (UserError, KeyboardInterrupt, torch.OutOfMemoryError) as e:
        fail(str(e) or 'stopped')
    except Exception as e:
        if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
            fail('out of memory: smaller batches or pictures need less')
        print('this is a bug in nanoUMM; please report it with what follows', file=sys.stderr)
        raise


@contextlib.contextmanager
def written_whole(path):
    """with written_whole(path) as part: write `part`. It becomes `path` if all goes well, synced and
    then renamed; else it is gone and what was at `path` stays."""
    part = Path(f'{path}.part')
    try:
        yield part
        with open(part, 'rb+') as f:
            os.fsync(f.fileno())
        mask = os.umask(0)                                     # the only way to ask for it
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)                          # safetensors writes for its user alone
        os.replace(part, path)
    except BaseException:                                      # Ctrl-C too
        part.unlink(missing_ok=True)
        raise


def keep_memory():
    """glibc hands large buffers back to the system and gets them again, zeroed: with M_MMAP_MAX (-4) = 0
    and no M_TRIM_THRESHOLD (-1) it keeps them, and a step is 1.3 times faster."""
    with contextlib.suppress(OSError, AttributeError, TypeError):      # there is no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def find_device(name='auto') -> torch.device:
    """The one place where it is chosen; auto: cuda where there is one, else cpu."""
    keep_memory()                                              # every program comes by here
    there = [d for d in ('cuda', 'cpu', 'mps') if getattr(torch, d).is_available()]
    if name == 'auto':
        name = there[0]
    if name not in there:
        raise UserError(f"--device is {name!r}, but this machine has {', '.join(there)}")
    return torch.device(name)


# ---- random sources: of (seed, split, stream, index), and of nothing but how much is drawn ----
def generator(seed: int, split: str, stream: str, index: int, device='cpu') -> torch.Generator:
    """For tensors. Of the 32 bits that torch looks at on a CPU two are the split's, 30 a hash."""
    name = f'{seed}/{stream}/{index}'
    hashed = random.Random(name).getrandbits(30)
    key = hashed * 4 + SPLITS.index(split)
    return torch.Generator(device).manual_seed(key)


def python_random(seed: int, split: str, stream: str, index: int) -> random.Random:
    """For words and choices."""
    return random.Random(f'{seed}/{split}/{stream}/{index}')


# ---- pictures and their annotations ----
# The one statement of the segmentation palette: row = class. Corners of the RGB cube are far apart and
# easy to name; the map from class to colour is fixed, so there is a single right answer.
PALETTE = torch.tensor([
    (0, 0, 0),                 # background: black
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 0, 255),
])


class Rendering(NamedTuple):
    """B pictures and what is known of each pixel."""
    image: Tensor              # [B,3,S,S] in [0, 1]: all that a model may see
    classes: Tensor            # [B,S,S] row of the palette, 255 = ignored
    instance: Tensor           # [B,S,S] number of the object, 0 = background
    depth: Tensor              # [B,S,S] nearness, 0 = background, 1 = nearest
    palette: Tensor = PALETTE  # [classes,3]


# ---- maps, which the model may be taught to generate: Rendering -> [B,3,S,S] in [0, 1] ----
def seg_map(r: Rendering):
    """Semantic segmentation: the palette colour of each pixel's class, never blended."""
    palette = r.palette.to(r.image.device)
    rgb = palette[r.classes % 255] / 255                   # ignored pixels as background
    return rgb.permute(0, 3, 1, 2)                                                    # [B,3,S,S]


def instance_map(r: Rendering):
    """Class-agnostic instances, as SAM's: colours differ within a picture and mean nothing beyond it."""
    turn = (r.image.mean((1, 2, 3)) * 1e6).long()                                     # [B]
    colour = (r.instance + turn[:, None, None]) % 5 + 1                               # [B,S,S]
    colour = colour * (r.instance > 0)
    return seg_map(r._replace(classes=colour))


def edge_map(r: Rendering):
    """Edge map: Sobel gradient magnitude of the luminance, the texture's own edges included."""
    grey = r.image.mean(1, keepdim=True)                                              # [B,1,S,S]
    grey = F.pad(grey, (1, 1, 1, 1), mode='replicate')                                # [B,1,S+2,S+2]
    across = torch.tensor([
        [-1., 0., 1.],
        [-2., 0., 2.],
        [-1., 0., 1.],
    ], device=grey.device)
    kernels = torch.stack([across, across.T])[:, None]                                # [2,1,3,3]
    gradient = F.conv2d(grey, kernels)                                                # [B,2,S,S]
    strength = gradient.norm(dim=1, keepdim=True).clamp(max=1)                        # [B,1,S,S]
    return strength.expand_as(r.image)                                                # [B,3,S,S]


def depth_map(r: Rendering):
    """Nearness as grey: near = bright."""
    return r.depth[:, None].expand_as(r.image)                                        # [B,3,S,S]


def picture_map(r: Rendering):
    """The picture itself."""
    return r.image


def classes_of(images, palette):
    """Generated maps [B, 3, S, S] -> class maps [B, S, S]: the nearest colour of the palette."""
    colours = palette.to(images.device) / 255                                         # [k,3]
    pixels = images.permute(0, 2, 3, 1)                                               # [B,S,S,3]
    return torch.cdist(pixels, colours).argmin(-1)                                    # [B,S,S]


class Map(NamedTuple):
    """All that the project knows of one kind of map."""
    draw: Callable                   # Rendering -> [B,3,S,S] in [0, 1], the target
    words: tuple                     # instructions in words, one is drawn at random
    needs: str                       # field of Rendering that must be annotated; 'image': nothing
    colour: str                      # in figures


MAPS = {
    'seg': Map(
        seg_map,
        ('segment the picture.', 'color every object by its class.', 'show the segmentation map.'),
        'classes', '#d62728'),
    'instance': Map(
        instance_map,
        ('segment every object.', 'color every object.', 'show every object.'),
        'instance', '#ff7f0e'),
    'edge': Map(
        edge_map,
        ('find the edges.', 'draw the outline of every object.', 'show the edge map.'),
        'image', '#1f77b4'),
    'depth': Map(
        depth_map,
        ('estimate the depth.', 'color every object by its distance.', 'show the depth map.'),
        'depth', '#9467bd'),
    'recon': Map(
        picture_map,
        ('copy the picture.', 'draw every object again.', 'show the same picture.'),
        'image', '#2ca02c'),
}

# ---- text tokens ----
CONTROL = re.compile('[\x00-\x1f\x7f-\x9f]')   # characters that a terminal obeys
BYTES = [bytes([b]) for b in range(256)]
# Scripts without spaces between words: from Thai to Burmese, Khmer, Chinese and Japanese. A letter is a
# word there: else the tokens would be whole sentences. Letters of Hebrew, Arabic and Indian scripts have
# marks beside them.
UNSPACED = '\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fff\u3001-\u9fff\uf900-\ufaff\U00020000-\U0003ffff'
MARKS = '\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff'
WORD = re.compile(rf'[{UNSPACED}]|(?:[^\W{UNSPACED}]|[{MARKS}])+|[^\w\s{UNSPACED}{MARKS}]+')
PIECE = r' ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+'     # no token reaches beyond one


def small(text: str) -> str:
    """In small letters, each with its accents in one character."""
    return unicodedata.normalize('NFC', text.lower())


def words_of(text: str) -> list[str]:
    """In small letters; what stands between words is one, too."""
    return WORD.findall(small(text))


class Text:
    """Text <-> token ids, byte-level BPE. No string encodes to the specials `answer` and `end`."""

    def __init__(self, vocab: list[bytes]):
        if len(set(vocab)) < len(vocab) or vocab[:256] != BYTES:
            raise ValueError('a vocabulary starts with all bytes and names no token twice')
        self.vocab = list(vocab)
        self.answer = len(vocab)                               # opens an answer or a plan
        self.end = len(vocab) + 1                              # closes it
        self.size = len(vocab) + 2
        ranks = {token: i for i, token in enumerate(vocab)}
        self.bpe = tiktoken.Encoding('nanoumm', pat_str=PIECE, mergeable_ranks=ranks, special_tokens={})
        self.encode = lru_cache(65536)(self._encode)           # the world's sentences repeat

    def _encode(self, text: str) -> list[int]:
        """In small letters; the first word too has a space before it."""
        spaced = [f' {word}' for word in small(text).split()]
        return self.bpe.encode_ordinary(''.join(spaced))

    def decode(self, ids) -> str:
        ids = takewhile(lambda i: i != self.end, ids)          # what follows the end says nothing
        plain = [i for i in ids if i < self.answer]
        return self.bpe.decode(plain).strip()

    @staticmethod
    def from_corpus(texts, size=512, rare=0):
        """Train BPE (Sennrich et al. 2016, algorithm 1) on the distinct words of `texts`, the thousand
        most frequent of those that occur more than `rare` times: the most frequent pair of neighbours
        becomes a token, again and again; deterministic."""
        count = Counter(word for text in texts for word in words_of(text))
        found = [word for word, n in count.most_common(1000) if n > rare]
        words = []
        for word in sorted(found):
            # the space before a word is a part of it
            spaced = word if re.match(f'[{UNSPACED}]', word) else f' {word}'
            words.append([bytes([b]) for b in spaced.encode()])
        vocab = list(BYTES)
        while len(vocab) < size - 2:
            pairs = Counter()
            for word in words:
                pairs.update(pairwise(word))
            if not pairs:
                break
            pair = max(pairs, key=lambda p: (pairs[p], p))
            vocab.append(pair[0] + pair[1])
            for word in words:
                merge(word, pair)
        return Text(vocab)


def merge(word: list[bytes], pair: tuple):
    """Make one token of each occurrence of the pair, in place, from the end of the word."""
    for i in reversed(range(len(word) - 1)):
        if (word[i], word[i + 1]) == pair:
            word[i] += word.pop(i + 1)


# ---- sequences ----
@dataclass
class Sequence:
    """A batch of [picture][text][codes]; picture and codes may be absent. The text is made of turns that
    see the picture but not each other: many questions cost one pass. The codes continue turn 1."""
    text: Tensor                       # [B*R,T] token ids; R rows of text share a picture
    turn: Tensor                       # [B*R,T] 1, 2, ..., or -1 for padding
    target: Tensor | None = None       # [B*R,T] the token to predict here, -1 = none
    image: Tensor | None = None        # [B,3,S,S] in [0, 1]
    codes: Tensor | None = None        # [B,N] codes of the picture to generate


def tokens_of(text: Text, number: int, ask: str, answer: str | None) -> list[tuple]:
    """One turn as [(token, number of the turn, token to predict here or -1)], by words and for turn 1:

    'how many?', '2'  ->  (how, 1, -1), (many, 1, -1), (?, 1, -1), (ANSWER, 1, 2), (2, 1, END)"""
    turn = [(token, number, -1) for token in text.encode(ask)]
    if answer is not None:
        targets = text.encode(answer) + [text.end]
        inputs = [text.answer] + targets                       # a token is predicted one before it
        turn += [(token, number, target) for token, target in zip(inputs, targets)]
    return turn


def pack(text: Text, rows, image=None, device='cpu', room=96) -> Sequence:
    """rows: for each picture a list of turns (prompt, answer), in words; answer None: the prompt alone.
    Only answer and end are supervised. Many turns are spread over R rows of some `room` tokens, which
    share the picture: attention, whose cost is quadratic, need not span what it may not see."""
    turns = []
    for row in rows:
        turns.append([tokens_of(text, number, *turn) for number, turn in enumerate(row, 1)])
    longest = max(sum(len(turn) for turn in mine) for mine in turns)
    most = max(1, max(len(mine) for mine in turns))
    R = min(1 + longest // room, most)                         # a turn is never cut
    lines = []
    for mine in turns:
        parts = [[] for _ in range(R)]
        for turn in sorted(mine, key=len, reverse=True):       # the longest first: lines of equal length
            min(parts, key=len).extend(turn)
        lines += parts
    T = max(1, max(len(line) for line in lines))
    padding = (text.end, -1, -1)
    for line in lines:
        line += [padding] * (T - len(line))
    grid = torch.tensor(lines, device=device)                                         # [B*R,T,3]
    tokens, numbers, targets = grid.unbind(-1)                                        # [B*R,T]
    return Sequence(tokens, numbers, targets, image=image)


# ---- what a data set is ----
PLACES = ('place', 'place', 'list')   # styles of the caption asked for beside questions, how often


class DataSet:
    """Pictures with questions, captions and maps, as batches that are pure functions of (seed, split,
    stream, index, B). The procedural world below and folder.py's are two; to bring your own, set what
    you have and define scenes(), corpus(), and ask() or describe()."""
    kinds: tuple = ()                # types of question that are measured
    mixes: dict = {}                 # part of training ('first', 'finding', 'relating'): what it asks,
                                     # a type as often as it stands there; where none stands: kinds
    annotated: tuple = ()            # those of 'classes', 'instance', 'depth' that its Rendering holds
    captions = False                 # does describe() know the style 'list'?
    palette = PALETTE                # colours of the classes
    exact = False                    # objects are data.Object: drawings can be verified by rule
    example = 'a picture'            # a caption, to show what can be asked for
    names: list = []                 # of the classes
    checksum = 0                     # of the data, to notice that they have changed
    vocab = 512                      # text tokens to train
    rare = 0                         # a word that occurs no more often is spelled

    def __init__(self, size=32, seed=0, device='cpu', text: Text | None = None):
        self.size = size
        self.seed = seed
        self.device = device
        self.text = text or Text.from_corpus(self.corpus(), self.vocab, self.rare)

    # -- what a data set defines
    def scenes(self, split: str, stream: str, index: int, B: int, pixels=True):
        """-> (B scenes, their Rendering or None without pixels, a random.Random for the text). Only
        ask() and describe() look into a scene. There may be fewer than B outside of training."""
        raise NotImplementedError

    def corpus(self):
        """Texts to train the text tokens on."""
        raise NotImplementedError

    def words(self) -> set:
        """All words that training shows."""
        return {word for text in self.corpus() for word in words_of(text)}

    def ask(self, scene, kind: str, rng) -> list:
        """[(question, answer)] of one type about a scene, or []."""
        return []

    def describe(self, scene, style: str, rng) -> str | None:
        """A caption: 'list' names what is there (never None if `captions` is True), 'place' (a plan to
        draw by) says what is where."""
        return None

    def limit(self, split: str) -> float:
        """How many pictures a split has."""
        return math.inf

    # -- what follows from that
    @property
    def maps(self) -> list[str]:
        """Names of the maps that can be taught."""
        known = ('image', *self.annotated)
        return [name for name, m in MAPS.items() if m.needs in known]

    def turns(self, scene, Q: int, rng, kinds) -> list:
        """[(type, (question, answer))]: Q of them, of types drawn from `kinds`; fewer where hardly any
        question fits the scene."""
        turns = []
        for _ in range(20 * Q):                                # a type may not fit this scene
            if not kinds or len(turns) >= Q:
                break
            kind = rng.choice(kinds)
            turns += [(kind, qa) for qa in self.ask(scene, kind, rng)]
        return turns

    def questions(self, split, index, B, Q, captions=PLACES, kinds=None, stream='questions'):
        """-> (Sequence of B pictures with Q questions and one of `captions`, kinds of the turns)."""
        scenes, r, rng = self.scenes(split, stream, index, B)
        rows, asked = [], []
        for scene in scenes:
            turns = self.turns(scene, Q, rng, kinds or self.mixes.get('first') or self.kinds)
            if captions:
                style = rng.choice(captions)
                ask = rng.choice(ASK_FOR_CAPTION[style])
                said = self.describe(scene, style, rng) or self.describe(scene, 'list', rng)
                if said:
                    turns.append((style, (ask, said)))
            rows.append([qa for _, qa in turns])
            asked.append([kind for kind, _ in turns])
        return pack(self.text, rows, r.image, self.device), asked

    def drawings(self, split, index, B, drop=.1, stream='drawings'):
        """-> (Sequence of prompts and plans, a share `drop` empty, target pictures [B, 3, S, S])."""
        scenes, r, rng = self.scenes(split, stream, index, B)
        rows = []
        for scene in scenes:
            said = {style: self.describe(scene, style, rng) for style in STYLES}
            fit = [style for style in STYLES if said[style]]
            style = rng.choices(fit, [STYLES[k] for k in fit])[0]
            prompt = rng.choice(ASK_TO_DRAW).format(said[style])
            turn = (prompt, said['place'] or '')
            if rng.random() < drop:
                turn = ('', None)
            rows.append([turn])
        return pack(self.text, rows, device=self.device), r.image

    def maps_to_draw(self, split, index, B, name, stream='maps'):
        """-> (Sequence of B pictures with an instruction, their maps [B, 3, S, S], Rendering)."""
        _, r, rng = self.scenes(split, stream, index, B)
        m = MAPS[name]
        rows = [[(rng.choice(m.words), None)] for _ in r.image]
        return pack(self.text, rows, r.image, self.device), m.draw(r), r


# ---- the procedural world: scenes ----
SHAPES = ('circle', 'square', 'triangle', 'cross', 'ring')
COLOURS = {
    'red': (.90, .12, .12),
    'green': (.12, .68, .20),
    'blue': (.12, .28, .95),
    'yellow': (.96, .86, .10),
    'purple': (.72, .18, .85),
    'cyan': (.10, .82, .85),
}
CLASSES = ('background',) + SHAPES
PAIRS = list(product(SHAPES, COLOURS))
CELLS = ('top left', 'top right', 'bottom left', 'bottom right')   # in each one object at most
NEAR = .265                    # radius of the nearest object
FAR = .17                      # and of the farthest
# How likely 0, 1, 2, 3, 4 objects of the theme are, where there are 1, 2, 3 or 4 objects in all; over
# these each is .2
OF_THEME = {
    1: (.5, .5, 0, 0, 0),
    2: (.1, .1, .8, 0, 0),
    3: (.1, .1, 0, .8, 0),
    4: (.1, .1, 0, 0, .8),
}


class Object(NamedTuple):
    """What lies in one quarter of the picture."""
    shape: str                 # one of SHAPES
    colour: str                # one of COLOURS
    cell: int                  # index into CELLS
    x: float                   # of its centre
    y: float
    z: float                   # depth, 0 near to 1 far

    @property
    def name(self) -> str:
        return f'{self.colour} {self.shape}'

    @property
    def radius(self) -> float:
        return NEAR + (FAR - NEAR) * self.z


class Scene(NamedTuple):
    """What a picture shows."""
    objects: list[Object]      # in reading order
    theme: str = ''            # the shape or colour that may be counted, if any


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene. A (shape, colour) pair occurs once at most: a name means one object. 40% have a
    theme, a shape or colour of exactly c objects: n is uniform from 1 to 4, and so is c from 0 to 4, so
    that no count can be guessed."""
    n = rng.randint(1, 4)
    theme, c = '', 0
    if rng.random() < .4:
        theme = rng.choice([*SHAPES, *COLOURS])
        c, = rng.choices(range(5), OF_THEME[n])
    of_theme = [pair for pair in PAIRS if theme in pair]        # without a theme none
    others = [pair for pair in PAIRS if theme not in pair]
    pairs = rng.sample(of_theme, c) + rng.sample(others, n - c)
    rng.shuffle(pairs)
    cells = rng.sample(range(len(CELLS)), n)
    objects = []
    for (shape, colour), cell in zip(pairs, sorted(cells)):
        row, column = divmod(cell, 2)
        x = (column + .5) / 2 + rng.uniform(-.06, .06)
        y = (row + .5) / 2 + rng.uniform(-.06, .06)
        objects.append(Object(shape, colour, cell, x, y, rng.random()))
    return Scene(objects, theme)


# ---- the procedural world: renderings ----
def box(x, y, width, height):
    """Signed distance to a box around the origin."""
    return torch.maximum(x.abs() - width, y.abs() - height)


def distance_field(shape: str, x, y):
    """Signed distance (negative inside) to a shape of radius 1 at the origin; x, y of any size."""
    if shape == 'circle':
        return torch.hypot(x, y) - .95
    if shape == 'square':
        return box(x, y, .82, .82)
    if shape == 'triangle':
        sides = x.abs() * .866 - (y - .15) * .5
        return torch.maximum(sides, y - .15) - .58
    if shape == 'cross':
        lying = box(x, y, 1, .32)
        standing = box(x, y, .32, 1)
        return torch.minimum(lying, standing)
    if shape == 'ring':
        return (torch.hypot(x, y) - .70).abs() - .25
    raise ValueError(f'{shape} has no distance field')


def background(B: int, size: int, g: torch.Generator):
    """Grey of random brightness and tint with stripes of random direction, width and contrast,
    [B, 3, S, S], and where its pixels lie across and down, [1, S, S] each."""
    axis = (torch.arange(size, device=g.device) + .5) / size
    X = axis.expand(1, size, size)
    Y = axis[:, None].expand(1, size, size)
    u = torch.rand(5, B, 1, 1, generator=g, device=g.device)
    tint = torch.rand(B, 3, 1, 1, generator=g, device=g.device)
    angle = math.pi * u[0]                                                            # [B,1,1]
    phase = 2 * math.pi * u[1]
    waves = 4 * u[2] + 2                                   # from side to side
    contrast = .05 * u[3]
    along = X * angle.cos() + Y * angle.sin()                                         # [B,S,S]
    stripes = torch.sin(2 * math.pi * waves * along + phase) * contrast               # [B,S,S]
    grey = .3 + .4 * u[4] + stripes                                                   # [B,S,S]
    return grey[:, None] + .06 * (tint - .5), X, Y                                    # [B,3,S,S]


def noisy(image, g: torch.Generator):
    """A picture as a camera takes it: grain on every pixel, nothing darker than 0 or brighter than 1."""
    noise = torch.randn(image.shape, generator=g, device=g.device)
    return (image + .015 * noise).clamp(0, 1)


def layers_of(scenes: list[Scene], device):
    """The objects of B scenes as numbers, from the farthest to the nearest: [4, 9, B, 1, 1]. Of each
    its number in the scene, its class, x, y, radius, nearness, red, green, blue. Number 0: no object."""
    none = (0, 0, 0, 0, 1, 0, 0, 0, 0)                         # radius 1: nothing is divided by 0
    rows = []
    for scene in scenes:
        row = []
        numbered = enumerate(scene.objects, 1)
        for number, o in sorted(numbered, key=lambda pair: pair[1].z, reverse=True):
            nearness = 1 - .75 * o.z
            kind = CLASSES.index(o.shape)
            row.append((number, kind, o.x, o.y, o.radius, nearness, *COLOURS[o.colour]))
        rows.append(row + [none] * (len(CELLS) - len(row)))
    table = torch.tensor(rows, device=device)                                         # [B,4,9]
    return table.permute(1, 2, 0)[..., None, None]                                    # [4,9,B,1,1]


def render(scenes: list[Scene], size: int, g: torch.Generator) -> Rendering:
    """Draw B scenes at size x size pixels, anti-aliased; g, on the device: texture and noise."""
    image, X, Y = background(len(scenes), size, g)                                    # [B,3,S,S]
    instance = torch.zeros_like(image[:, 0])                                          # [B,S,S]
    classes = torch.zeros_like(instance)
    depth = torch.zeros_like(instance)
    for layer in layers_of(scenes, g.device):
        number, kind, right, down, radius, nearness, *rgb = layer                     # [B,1,1]
        x = (X - right) / radius                                                      # [B,S,S]
        y = (Y - down) / radius                                                       # [B,S,S]
        distance = torch.full_like(x, 9.)
        for k, shape in enumerate(SHAPES, 1):
            here = kind.flatten() == k                                                # [B]
            distance[here] = distance_field(shape, x[here], y[here])
        alpha = (.5 - distance * radius * size).clamp(0, 1)                           # [B,S,S]
        image = torch.lerp(image, torch.stack(rgb, 1), alpha[:, None])
        inside = alpha >= .5
        instance = torch.where(inside, number, instance)
        classes = torch.where(inside, kind, classes)
        depth = torch.where(inside, nearness, depth)
    return Rendering(noisy(image, g), classes.long(), instance.long(), depth)


# ---- the procedural world: captions; one right order of the objects leaves less to guess per word ----
PLURAL = {'circle': 'circles', 'square': 'squares', 'triangle': 'triangles', 'cross': 'crosses',
          'ring': 'rings'}
NUMBERS = ('zero', 'one', 'two', 'three', 'four')
STYLES = {'list': 3, 'place': 2, 'relation': 3, 'bare': 3, 'count': 4}      # how often one is a prompt
ASK_TO_DRAW = ('{}', 'draw {}', 'a picture of {}')
ASK_FOR_CAPTION = {'list': ('describe the picture.', 'what do you see?'),
                   'place': ('describe the picture with places.', 'what is where?')}


def relation(a: Object, b: Object, margin=1.5):
    """Where a is as seen from b: 'left of', 'right of', 'above' or 'below'; None if not clear-cut."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > margin * abs(dy):
        return 'left of' if dx < 0 else 'right of'
    if abs(dy) > margin * abs(dx):
        return 'above' if dy < 0 else 'below'
    return None


def caption(objects: list[Object], style: str, rng: random.Random):
    """A caption in one of STYLES, or None where the style does not fit the objects."""
    if style == 'place':
        places = [f'{CELLS[o.cell]} a {o.name}' for o in objects]
        return ', '.join(places)
    if style == 'list':
        return and_between([f'a {o.name}' for o in objects])
    if style == 'bare' and len(objects) <= 2:
        return and_between([f'a {o.shape}' for o in objects])
    if style == 'relation' and len(objects) == 2:
        a, b = rng.sample(objects, 2)
        where = relation(a, b)
        if where:
            return f'a {a.name} {where} a {b.name}'
    if style == 'count' and len(objects) > 1:
        shapes = {o.shape for o in objects}
        if len(shapes) == 1:
            return f'{NUMBERS[len(objects)]} {PLURAL[shapes.pop()]}'
    return None                                            # the style does not fit


def and_between(names: list[str]) -> str:
    """'a, b and c'."""
    if len(names) == 1:
        return names[0]
    *first, last = names
    return ', '.join(first) + ' and ' + last


# ---- the procedural world: questions, balanced given their words: blind guesses stay at chance ----
# Each function: (scene, rng) -> (words to fill in, answer), or None where there is no right answer
def one_of(found: list, rng):
    """One of the possible questions."""
    return rng.choice(found) if found else None


def one_either_way(found: list, rng):
    """One of the questions; its last two words, of which the first is right, in random order."""
    if not found:
        return None
    words, answer = rng.choice(found)
    *first, right, wrong = words
    return first + rng.sample([right, wrong], 2), answer


def times(scene: Scene, word: str) -> int:
    """How many objects have this shape or colour."""
    return sum(word in (o.shape, o.colour) for o in scene.objects)


def gap(a: Object, b: Object) -> float:
    """Distance of the centres."""
    return math.hypot(a.x - b.x, a.y - b.y)


def ask_count(scene, rng):
    """'how many red objects are there?' Of all objects, or of the scene's theme."""
    if not scene.theme or rng.random() < .3:
        return ['objects'], str(len(scene.objects))
    words = PLURAL.get(scene.theme, f'{scene.theme} objects')
    return [words], str(times(scene, scene.theme))


def ask_colour(scene, rng):
    """'what color is the ring?', if there is one ring."""
    found = [o for o in scene.objects if times(scene, o.shape) == 1]
    return one_of([([o.shape], o.colour) for o in found], rng)


def ask_shape(scene, rng):
    """'what shape is the red object?', if there is one."""
    found = [o for o in scene.objects if times(scene, o.colour) == 1]
    return one_of([([o.colour], o.shape) for o in found], rng)


def all_names(colours, shapes) -> set:
    """'red ring', ...: each colour with each shape."""
    return {f'{colour} {shape}' for colour, shape in product(colours, shapes)}


def ask_exist(scene, rng):
    """'is there a red ring?' 'no' recombines colours and shapes that are there, if possible (as in the
    adversarial split of POPE, Li et al. 2023)."""
    if rng.random() < .5:
        return [rng.choice(scene.objects).name], 'yes'
    there = {o.name for o in scene.objects}
    shapes = {o.shape for o in scene.objects}
    colours = {o.colour for o in scene.objects}
    both = all_names(colours, shapes)
    wrong = both - there
    if not wrong:                                          # then one of the two is there
        one = all_names(colours, SHAPES) | all_names(COLOURS, shapes)
        wrong = one - both
    return [rng.choice(sorted(wrong))], 'no'


def ask_relation(scene, rng):
    """'where is the red ring relative to the blue cross?', if that is clear-cut."""
    found = []
    for a, b in product(scene.objects, repeat=2):
        where = relation(a, b)
        if where:
            found.append(([a.name, b.name], where.replace(' of', '')))
    return one_of(found, rng)


def ask_depth(scene, rng):
    """'which is closer, the red ring or the blue cross?', if it is by .3."""
    found = []
    for a, b in product(scene.objects, repeat=2):
        if a.z < b.z - .3:
            found.append(([a.name, b.name], a.name))
    return one_either_way(found, rng)


def ask_distance(scene, rng):
    """'which is nearest to the red ring, the blue cross or the green circle?', if it is by .12."""
    found = []
    for o, a, b in product(scene.objects, repeat=3):
        if 0 < gap(o, a) < gap(o, b) - .12:
            found.append(([o.name, a.name, b.name], a.name))
    return one_either_way(found, rng)


def ask_where(scene, rng):
    """'where is the red ring?' 'top left'."""
    return one_of([([o.name], CELLS[o.cell]) for o in scene.objects], rng)


def ask_size(scene, rng):
    """'is the red ring small or large?' Objects of middling size are not asked about."""
    found = []
    for o in scene.objects:
        if abs(o.z - .5) > .1:
            size = 'small' if o.z > .5 else 'large'
            found.append(([o.name], size))
    return one_of(found, rng)


def ask_what(scene, rng):
    """'what is at the top left?' 'red ring'."""
    return one_of([([CELLS[o.cell]], o.name) for o in scene.objects], rng)


def ask_sum(scene, rng):
    """'what is 3 plus 4?'"""
    a, b = rng.sample(range(10), 2)
    return [a, b], str(a + b)


def ask_more(scene, rng):
    """'which is more, 3 or 4?'"""
    a, b = rng.sample(range(10), 2)
    return [a, b], str(max(a, b))


class Question(NamedTuple):
    """All that the project knows of one type of question."""
    ask: Callable              # (Scene, rng) -> (words to fill in, answer) or None
    words: tuple               # ways to ask it


QUESTIONS = {
    'count': Question(ask_count, ('how many {} are there?', 'count the {}.')),
    'colour': Question(ask_colour, ('what color is the {}?', 'name the color of the {}.')),
    'shape': Question(ask_shape, ('what shape is the {} object?', 'name the {} shape.')),
    'exist': Question(ask_exist, ('is there a {}?', 'do you see a {}?')),
    'relation': Question(ask_relation, ('where is the {} relative to the {}?',
                                        'on which side is the {} of the {}?')),
    'depth': Question(ask_depth, ('which is closer, the {} or the {}?',
                                  'what is nearer to you, the {} or the {}?')),
    'distance': Question(ask_distance, ('which is nearest to the {}, the {} or the {}?',
                                        'what is next to the {}, the {} or the {}?')),
    'where': Question(ask_where, ('where is the {}?', 'find the {}.')),
    'size': Question(ask_size, ('is the {} small or large?', 'how large is the {}?')),
    'what': Question(ask_what, ('what is at the {}?', 'name the object at the {}.')),
    'sum': Question(ask_sum, ('what is {} plus {}?', 'add {} and {}.')),
    'more': Question(ask_more, ('which is more, {} or {}?', 'what is larger, {} or {}?')),
}
REASON = ('sum', 'more')       # text-only control: no visual supervision should move these
VISUAL = tuple(kind for kind in QUESTIONS if kind not in REASON)
# What training asks, a type as often as it stands there: at first, once shapes are known, and once
# things are found by their names.
KINDS = VISUAL * 2 + REASON
FINDING = VISUAL + REASON + ('where', 'exist') * 7 + ('relation',) * 2 + ('distance',)
RELATING = KINDS + ('relation', 'distance', 'depth') * 5


class World(DataSet):
    """Endless batches from the procedural world."""
    kinds = VISUAL
    mixes = {'first': KINDS, 'finding': FINDING, 'relating': RELATING}
    annotated = ('classes', 'instance', 'depth')
    names = list(CLASSES)
    captions = True
    exact = True
    example = 'a red circle left of a blue square'

    def scenes(self, split, stream, index, B, pixels=True):
        """-> (B of Scene, their Rendering, a random.Random for the text)."""
        rng = python_random(self.seed, split, stream, index)
        scenes = [sample_scene(rng) for _ in range(B)]
        r = None
        if pixels:
            g = generator(self.seed, split, stream, index, self.device)
            r = render(scenes, self.size, g)
        return scenes, r, rng

    def corpus(self):
        """All kinds of sentences of the world."""
        for words in (ASK_TO_DRAW, *ASK_FOR_CAPTION.values()):
            yield from words
        for entry in (*MAPS.values(), *QUESTIONS.values()):
            yield from entry.words
        scenes, _, rng = self.scenes('train', 'corpus', 0, 300, pixels=False)
        for scene in scenes:
            for style in STYLES:
                yield caption(scene.objects, style, rng) or ''
            for kind in QUESTIONS:
                for question, answer in self.ask(scene, kind, rng):
                    yield question
                    yield answer

    def ask(self, scene, kind, rng):
        question = QUESTIONS[kind]
        found = question.ask(scene, rng)
        if found is None:
            return []
        words, answer = found
        sentence = rng.choice(question.words)
        return [(sentence.format(*words), answer)]

    def describe(self, scene, style, rng):
        return caption(scene.objects, style, rng)
