"""Windows of pictures with masks, and questions that their masks answer.

    python -m experiments.prepare windows FOLDER OUT            several windows of 32 x 32 a picture
    python -m experiments.prepare windows FOLDER OUT --whole    whole pictures, made smaller

What is five pixels large in a small picture can be told by nobody. So windows are cut at the pictures'
own resolution around the classes that cover most, and are asked only about what fills a part of them.
Of each question's text every answer is kept equally often in each split: its words alone tell nothing.
"""
import json
import random
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data import CELLS, SPLITS, UserError, and_between
from experiments.writer import Writer, with_article
from folder import FOLDERS, TEXTS, class_names, upright

IGNORED = 255
SEEN = .04                     # share of a window that a class covers at least, to be asked about
KINDS = ('exist', 'what', 'at', 'where', 'half', 'size', 'larger', 'nearer', 'side')   # of questions


class Window(NamedTuple):
    """A part of a picture. The mask has the numbers of Kept.names."""
    split: str
    image: Image.Image
    mask: np.ndarray           # uint8 [h, w]
    caption: str               # of the whole picture, or ''
    depth: dict                # {class: 0 near, 1, ...}, where the folder tells it


class Kept(NamedTuple):
    """Classes of the windows: first those that are only ground, then those that are asked about."""
    names: list
    grounds: int
    numbers: np.ndarray        # uint8 [256]: class in the folder -> class here, or IGNORED


# ---- the folder ----
def text_in(row: dict, key: str) -> str:
    """What stands under a key of folder.TEXTS, or under Hugging Face's name for it; '' for none."""
    return row.get(key) or row.get(TEXTS[key]) or ''


def rows_in(folder: Path):
    """-> (split, a row of its metadata.jsonl, path of its picture, its mask uint8 [h, w])."""
    for name in SPLITS:
        split = 'validation' if name == 'val' else name        # as it is called in folders
        paths = [folder / part / 'metadata.jsonl' for part in FOLDERS[name]]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f'{folder} has no metadata.jsonl for {split}: FOLDER is one that train.py '
                            '--data reads, with all three splits')
        path = paths[0]
        for n, line in enumerate(path.read_text('utf-8-sig').split('\n'), 1):
            if not line.strip():                               # an empty line is no row
                continue
            try:
                row = json.loads(line)
                picture = path.parent / row['file_name']
                mask = read_mask(path.parent / text_in(row, 'mask'))
            except (LookupError, AttributeError, TypeError, ValueError, OSError) as e:
                raise UserError(f'{path}:{n} is no row with a picture and a mask, by which windows are '
                                f'cut: {e!r:.100}')
            yield split, row, picture, mask


def read_mask(path: Path):
    """An indexed PNG, upright -> uint8 [h, w]."""
    with Image.open(path) as im:
        im = ImageOps.exif_transpose(im)                       # as its picture
        if im.mode not in ('P', 'L'):
            raise ValueError(f'{path.name} has mode {im.mode}; it must be P or L')
        return np.array(im)


def kept_classes(folder: Path, n: int, grounds: list) -> Kept:
    """The n classes that cover most of the training pictures, and the grounds, which are not asked
    about."""
    names = class_names(folder / 'classes.json')
    if not names:
        raise UserError(f'{folder} has no classes.json: what is on its masks?')
    unknown = [name for name in grounds if name not in names]
    if unknown:
        raise UserError(f"--ground names {unknown[0]!r}; there are: {', '.join(names):.300}")
    grounds = grounds or names[:1]
    pixels = np.zeros(256, np.int64)
    for split, _, _, mask in rows_in(folder):
        if split == 'train':
            pixels += np.bincount(mask.flatten(), minlength=256)
    order = sorted(range(len(names)), key=lambda k: -pixels[k])
    largest = [names[k] for k in order if pixels[k] and names[k] not in grounds]
    if not largest:
        raise UserError(f'{folder}: nothing on the training masks but {and_between(grounds)}')
    kept = [*grounds, *largest[:n]]
    numbers = np.full(256, IGNORED, np.uint8)
    for k, name in enumerate(kept):
        numbers[names.index(name)] = k
    return Kept(kept, len(grounds), numbers)


# ---- windows ----
def covered(mask, kept: Kept) -> dict:
    """{class: share of the mask}, of those that are asked about and occur."""
    count = np.bincount(mask.flatten(), minlength=256)
    shares = {}
    for k, name in enumerate(kept.names):
        if k >= kept.grounds and count[k]:
            shares[name] = count[k] / mask.size
    return shares


def around(mask, k: int, side: int, rng) -> tuple:
    """A window [x0, y0, x1, y1) inside the picture around a pixel of class k."""
    places = np.argwhere(mask == k)                                                   # [n,2]
    middle = places[rng.randrange(len(places))]
    last = np.subtract(mask.shape, side)                       # the lowest and rightmost window
    y, x = np.clip(middle - side // 2, 0, last).tolist()
    return x, y, x + side, y + side


def windows_in(folder: Path, kept: Kept, side: int, each: int, whole: bool, rng):
    """`each` windows of each picture around different classes, or the whole picture."""
    for split, row, path, mask in rows_in(folder):
        image = upright(path)
        if image.size != mask.shape[::-1]:
            raise UserError(f'the mask of {path} is {mask.shape[::-1]}, the upright picture '
                            f'{image.size}: make them alike')
        mask = kept.numbers[mask]
        depth = {o['name']: o['depth'] for o in row.get('objects', ()) if 'depth' in o}
        if whole:
            yield Window(split, image, mask, text_in(row, 'caption'), depth)
            continue
        if min(mask.shape) < side:
            raise UserError(f"{row['file_name']} is {image.size}, less than a window of {side}: --whole")
        enough = SEEN * side ** 2 / mask.size
        large = [name for name, share in covered(mask, kept).items() if share > enough]
        for name in rng.sample(large, min(each, len(large))):
            box = around(mask, kept.names.index(name), side, rng)
            part = Image.fromarray(mask).crop(box)
            yield Window(split, image.crop(box), np.array(part), '', depth)


# ---- questions ----
class Region(NamedTuple):
    """A class in a window."""
    name: str
    share: float               # of the window
    x: float                   # of its middle, from 0 to 1
    y: float
    corners: list              # shares of the four quarters that it covers
    box: tuple                 # [x0, y0, x1, y1) in pixels


def regions_in(mask, kept: Kept) -> list[Region]:
    """Of the classes that are seen well, from left to right."""
    h, w = mask.shape
    found = []
    for name, share in covered(mask, kept).items():
        if share < SEEN:
            continue
        inside = mask == kept.names.index(name)
        rows, columns = np.nonzero(inside)
        quarters = [part for half in np.array_split(inside, 2) for part in np.array_split(half, 2, 1)]
        corners = [quarter.mean() for quarter in quarters]
        x = columns.mean() / w
        y = rows.mean() / h
        box = Image.fromarray(inside).getbbox()
        found.append(Region(name, share, x, y, corners, box))
    return sorted(found, key=lambda region: region.x)


def candidates(window: Window, regions: list[Region], kept: Kept) -> list:
    """All that can be asked about a window: (type, question, answer). What lies near a limit is not."""
    asked = []
    there = covered(window.mask, kept)
    for name in kept.names[kept.grounds:]:
        text = f'is there {with_article(name)}?'
        if there.get(name, 0) >= SEEN:
            asked.append(('exist', text, 'yes'))
        elif name not in there:
            asked.append(('exist', text, 'no'))
    for cell, place in enumerate(CELLS):
        filled = [region for region in regions if region.corners[cell] > .05]
        if len(filled) == 1 and filled[0].corners[cell] > .2:
            asked.append(('what', f'what is at the {place}?', filled[0].name))
        for region in regions:
            text = f'is the {region.name} at the {place}?'
            if region.corners[cell] > .35:
                asked.append(('at', text, 'yes'))
            elif region.corners[cell] < .1:
                asked.append(('at', text, 'no'))
    for region in regions:
        if min(abs(region.x - .5), abs(region.y - .5)) > .06:
            cell = 2 * (region.y > .5) + (region.x > .5)
            asked.append(('where', f'where is the {region.name}?', CELLS[cell]))
        for middle, low, high in ((region.x, 'left', 'right'), (region.y, 'top', 'bottom')):
            if abs(middle - .5) > .06:
                half = low if middle < .5 else high
                asked.append(('half', f'is the {region.name} more {low} or {high}?', half))
        for word, low, high in (('small', 0, .15), ('medium', .25, .4), ('large', .5, 1)):
            if low < region.share < high:
                asked.append(('size', f'how large is the {region.name}?', word))
    for a, b in permutations(regions, 2):
        asked += compared(a, b, window.depth)
    return asked


def compared(a: Region, b: Region, depth: dict) -> list:
    """Questions about two regions of a window."""
    asked = []
    choice = f'the {a.name} or the {b.name}?'
    if max(a.share, b.share) > 1.5 * min(a.share, b.share):
        larger = a if a.share > b.share else b
        asked.append(('larger', f'which is larger, {choice}', larger.name))
    near, far = depth.get(a.name), depth.get(b.name)
    if near is not None and far is not None and near != far:
        nearer = a if near < far else b
        asked.append(('nearer', f'which is nearer, {choice}', nearer.name))
    if abs(a.x - b.x) > .15:
        side = 'left' if a.x < b.x else 'right'
        asked.append(('side', f'is the {a.name} left or right of the {b.name}?', side))
    return asked


def balanced(asked: list, rng) -> list:
    """Of (window, (type, question, answer)) as many of each answer to a question; answers ten times as
    rare as its most frequent one are left out, and so is a question with one answer only."""
    of_text = defaultdict(lambda: defaultdict(list))
    for number, words in asked:
        kind, text, answer = words
        of_text[kind, text][answer].append((number, words))
    kept = []
    for _, by_answer in sorted(of_text.items()):
        most = max(len(found) for found in by_answer.values())
        groups = [found for _, found in sorted(by_answer.items()) if len(found) * 10 >= most]
        fewest = min(len(found) for found in groups)
        if len(groups) > 1:
            for found in groups:
                kept += rng.sample(found, fewest)
    return kept


def questions(windows: list[Window], regions: list, kept: Kept, without: list, rng) -> list:
    """Balanced questions about each of the windows of a split."""
    asked = []
    for number, (window, found) in enumerate(zip(windows, regions)):
        for words in candidates(window, found, kept):
            kind, _, _ = words
            if kind not in without:
                asked.append((number, words))
    chosen = [[] for _ in windows]
    for number, words in balanced(asked, rng):
        chosen[number].append(words)
    return chosen


# ---- all windows ----
def asked_windows(folder: Path, kept: Kept, side: int, each: int, whole: bool, without: list, seed: int):
    """Yields (split, picture, mask, [(name, box)], caption, [(type, question, answer)])."""
    rng = random.Random(seed)
    by_split = defaultdict(list)
    for window in windows_in(folder, kept, side, each, whole, rng):
        by_split[window.split].append(window)
    for split, windows in by_split.items():
        regions = [regions_in(window.mask, kept) for window in windows]
        asked = questions(windows, regions, kept, without, rng)
        for window, found, qa in zip(windows, regions, asked):
            names = [with_article(region.name) for region in found]
            caption = window.caption or and_between(names or ['nothing'])
            objects = [(region.name, region.box) for region in found]
            yield split, window.image, Image.fromarray(window.mask), objects, caption, qa


def write_folder(a):
    """The command `windows`."""
    if a.each < 1 or a.classes < 1:
        raise UserError(f'--each is {a.each}, --classes {a.classes}: 1 or more of both')
    without = [kind for kind in a.without.split(',') if kind]
    unknown = [kind for kind in without if kind not in KINDS]
    if unknown:
        raise UserError(f"--without names {unknown[0]!r}; there are: {', '.join(KINDS)}")
    grounds = list(dict.fromkeys(name for name in a.ground.split(',') if name))        # each once
    kept = kept_classes(a.source, a.classes, grounds)
    with Writer(a.out, a.side, kept.names) as writer:
        rows = asked_windows(a.source, kept, a.side, a.each, a.whole, without, a.seed)
        writer.scenes(rows)
