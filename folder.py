"""Real pictures: a folder with captions, questions and masks as a data set.

    python train.py --data DIR      DIR is laid out as Hugging Face's ImageFolder:
                                    {train,validation,test}/metadata.jsonl and the files these name;
                                    for splits that are not there a tenth of train each is set aside

A line of metadata.jsonl is a JSON object; paths are relative to its folder. Its keys (and others of
Hugging Face for the same: text, mask_file_name, depth_file_name):
    file_name                       PNG or JPEG of any size and mode
    caption, mask, depth            in every line or not used; mask: indexed PNG as large as the picture,
                                    class ids as named in order in DIR/classes.json, 255 = ignored;
                                    depth: grey, bright = near; 16 bits: stretched to what occurs in it
    qa                              [{question, answer, type}], where known
    objects                         [{name, bbox: [x0, y0, x1, y1]}], where known: what a drawing plans;
                                    pixels of the upright picture, as for the mask
"""
import contextlib
import glob
import hashlib
import json
import math
import random
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import (ASK_TO_DRAW, CONTROL, MAX_PLAN, MAX_TEXT, PALETTE, SPLITS, DataSet, Rendering,
                  UserError, World, python_random, written_whole)

FORMAT = 5                     # of the cache: counts changes of what it holds
MAX_PIXELS = 50_000_000        # a larger picture is refused before it is decoded
THIRDS = (                     # where an object lies, row by row
    'top left', 'top center', 'top right',
    'middle left', 'middle center', 'middle right',
    'bottom left', 'bottom center', 'bottom right',
)
UPPER_LEFT = r'\btop (left|center|right)|\b(top|middle|bottom) left'          # in plans
LOWER_RIGHT = r'\bbottom (left|center|right)|\b(top|middle|bottom) right'
MOST_PLANNED = 8               # objects in a plan: the largest ones
ANNOTATIONS = {'mask': 'classes', 'depth': 'depth'}        # key of a row: field of a Rendering
TEXTS = {                      # keys whose values are texts, and Hugging Face's names for the same
    'file_name': 'file_name',
    'caption': 'text',
    'mask': 'mask_file_name',
    'depth': 'depth_file_name',
}
EXAMPLES = {
    'qa': '[{"question": "Is it a cat?", "answer": "yes", "type": "exist"}]',
    'objects': '[{"name": "cat", "bbox": [x0, y0, x1, y1]}]',
}
FOLDERS = {                    # of a split: names that people give it; '.' is the folder itself
    'train': ('train', '.'),
    'val': ('validation', 'val', 'valid', 'dev'),
    'test': ('test',),
}


# ---- colours of any number of classes ----
def palette(n: int):
    """Colours of n classes, [n, 3]: PALETTE, then points of a grid in the RGB cube, each the farthest
    from all before it, so that the classes named first are told apart best."""
    side = 3                                                   # of the grid
    while side ** 3 < n:
        side += 1
    steps = torch.linspace(0, 255, side).round().long()                               # [side]
    grid = torch.cartesian_prod(steps, steps, steps)                                  # [side^3,3]
    colours = PALETTE[:n]
    while len(colours) < n:
        # of each point of the grid to the nearest colour that is taken
        distance = torch.cdist(grid.float(), colours.float()).amin(1)                 # [side^3]
        farthest = grid[distance.argmax()]
        colours = torch.cat([colours, farthest[None]])
    return colours


# ---- pictures ----
# People bring files of every kind: phones turn pictures by a note beside the pixels, cameras store 16
# bits, drawings have transparent parts. One function reads them all, for training and for sample.py.
def upright(path) -> Image.Image:
    """A picture file of any size and mode: RGB, turned upright, on white."""
    try:
        warnings.simplefilter('ignore')        # of PIL, about damaged parts; MAX_PIXELS is stricter
        # open() reads the header only: a picture that is too large is never decoded
        with Image.open(path) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f'{im.width} x {im.height} pixels, {MAX_PIXELS:,} at most')
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith(('I', 'F')):                 # 16 bits and float: do not clip
                im = stretched(im)
            im = im.convert('RGBA')                            # of every other mode
            white = Image.new('RGBA', im.size, 'white')
            return Image.alpha_composite(white, im).convert('RGB')
    except FileNotFoundError:
        raise UserError(f'there is no picture {path}')
    except Exception as e:                           # PIL raises many kinds on broken files
        raise UserError(f'cannot read {path} as a picture ({e!r:.80}): give a PNG or JPEG')


def stretched(im: Image.Image) -> Image.Image:
    """Numbers of any range as 8 bits: from 0 for the least to 255 for the largest that occurs; 0 for
    what is not finite."""
    a = np.ma.masked_invalid(np.asarray(im, dtype=np.float64))
    a = (a - a.min()) * 255 / (a.ptp() or 1)
    return Image.fromarray(a.filled(0).astype(np.uint8))


def shrunk(im: Image.Image, size: int):
    """Resized by area -> uint8 [3, size, size]."""
    pixels = np.array(im.resize((size, size), Image.BOX))                             # [S,S,3]
    return torch.from_numpy(pixels).permute(2, 0, 1)                                  # [3,S,S]


# ---- a row of metadata.jsonl, checked: ValueError says what is wrong with it ----
# What a stranger wrote is not trusted: every value is looked at once, here; nothing later has to.
# The caller adds file and line to the message.
def text_of(value, key: str) -> str:
    """A text with single spaces and no control characters, of a value that may be anything."""
    if type(value) is str:
        value.encode()                                         # lone surrogates: ValueError
        text = ' '.join(CONTROL.sub(' ', value).split())
        if text:
            return text
    raise ValueError(f'{key} is {value!r:.40}: it must be a text')


def answer_of(value) -> str:
    """A text; numbers and true or false are taken as theirs."""
    if type(value) in (bool, int, float) and math.isfinite(value):
        value = str(value)
    return text_of(value, 'answer')


def list_of(row: dict, key: str) -> list[dict]:
    """The list of objects under a key, empty where there is none."""
    found = row.get(key) or []
    if type(found) is list and all(type(x) is dict for x in found):
        return found
    raise ValueError(f'{key} is {found!r:.80}: it must be a list such as {EXAMPLES[key]}')


def plan_of(objects: list[dict], width: int, height: int) -> str:
    """A plan to draw by: 'top left a cat, ...', the largest objects in reading order of the nine
    parts of a picture, see THIRDS."""
    found = []
    for o in objects:
        box = o.get('bbox')
        if box is None:
            continue                                           # nothing of it is seen
        corners = [v for v in box if type(v) in (int, float)]
        if len(corners) != 4:
            corners = [0, 0, 0, 0]                             # which is no box either
        x0, y0, x1, y1 = corners
        inside = 0 <= x0 < x1 <= width + 1 and 0 <= y0 < y1 <= height + 1
        if not inside:                                         # a pixel of rounding is forgiven
            raise ValueError(f'bbox is {box}: it must be [x0, y0, x1, y1] in pixels of the upright '
                             f'picture, {(width, height)}')
        # the third of the picture that its middle, (y0 + y1) / 2, lies in
        row = min(2, int(1.5 * (y0 + y1) / height))
        column = min(2, int(1.5 * (x0 + x1) / width))
        place = 3 * row + column
        name = text_of(o.get('name'), 'name')
        area = (x1 - x0) * (y1 - y0)
        words = f'{THIRDS[place]} {name}'                      # as it will stand in the plan
        found.append((area, place, x0 + x1, words))
    largest = sorted(found)[-MOST_PLANNED:]
    in_order = sorted(largest, key=lambda o: o[1:])            # by place, then from left to right
    return ', '.join(words for _, _, _, words in in_order)


def said_in(row: dict, width: int, height: int) -> dict:
    """The texts of a row, whose upright picture has that size in pixels: {file, mask, depth, caption,
    plan, qa: [(type, [question, answer])]}, '' for none; questions and answers in small letters."""
    said = {'file': row['file_name'], 'caption': '', 'qa': []}
    for key in ANNOTATIONS:                                    # to know whether all rows have them
        said[key] = row[key]
    if row['caption'].strip():                                 # an empty one is none
        said['caption'] = text_of(row['caption'], 'caption')
    for q in list_of(row, 'qa'):
        kind = text_of(q.get('type', 'question'), 'type').lower()          # Colour is colour
        if kind == 'mean':                                     # the name of all types together
            kind = 'mean (type)'
        question = text_of(q.get('question'), 'question')
        answer = answer_of(q.get('answer'))
        said['qa'].append((kind, [question.lower(), answer.lower()]))
    said['plan'] = plan_of(list_of(row, 'objects'), width, height)
    return said


def read_mask(path, whole: tuple, size: int, classes: int):
    """An indexed PNG, as large as its picture -> classes [size, size]."""
    with Image.open(path) as im:
        im = ImageOps.exif_transpose(im)                       # as the picture
        if im.size != whole or im.mode not in ('P', 'L'):
            raise ValueError(f'{path.name} is {im.size}, mode {im.mode}; it must have the size of the '
                             f'upright picture, {whole}, and mode P or L')
        mask = np.array(im.resize((size, size), Image.NEAREST))                       # [S,S]
    # a class without a name would be a colour that means nothing; 255 is ignored
    largest = mask[mask < 255].max(initial=0)
    if largest >= classes:
        raise ValueError(f'{path.name} has class {largest}; classes.json names {classes} classes')
    return torch.from_numpy(mask)


def read_row(folder: Path, line: bytes, size: int, classes: int):
    """A line of metadata.jsonl -> (what is said of its picture, its arrays of bytes: image [3, S, S],
    mask and depth [S, S], zero where the row names none)."""
    row = json.loads(line.decode('utf-8-sig'))                 # with or without a byte order mark
    if type(row) is not dict or not row.get('file_name'):
        raise ValueError('it must be a JSON object with a file_name')
    for key, other in TEXTS.items():
        row[key] = row.get(key) or row.get(other) or ''
        if type(row[key]) is not str:
            raise ValueError(f'{key} is {row[key]!r:.40}: it must be a text')
    im = upright(folder / row['file_name'])
    none = torch.zeros(size, size, dtype=torch.uint8)          # where nothing is annotated
    arrays = {'image': shrunk(im, size), 'mask': none, 'depth': none}
    if row['mask']:
        arrays['mask'] = read_mask(folder / row['mask'], im.size, size, classes)
    if row['depth']:
        depth = upright(folder / row['depth'])                 # it may be coarser than the picture
        if (depth.width - depth.height) * (im.width - im.height) < 0:
            raise ValueError(f'depth is {depth.size}, the upright picture {im.size}: turn one of them')
        arrays['depth'] = shrunk(depth, size)[0]                                      # [S,S]
    said = said_in(row, *im.size)
    return said, arrays


def class_names(path: Path) -> list:
    """Of classes.json; none where there is no such file."""
    if not path.exists():
        return []
    try:
        names = json.loads(path.read_bytes())['mask_classes']
        if type(names) is not list or len(names) > 255 or len(set(names)) < len(names):
            raise ValueError('a list of 255 different names at most')
        names = [text_of(name, 'a class') for name in names]
    except Exception as e:                                     # whatever else it may hold
        raise UserError(f'{path} is not {{"mask_classes": ["background", ...]}}: {e!r:.60}')
    return names


# ---- the data set ----
# Rows (what is said of a picture) and arrays (its pixels as bytes) of all splits lie in memory.
class Folder(DataSet):
    """Batches from the folder described above; a scene is a row. Decoded once: root/.cache is used until
    the size or time of a file changes. Raises UserError where something is wrong with it."""
    vocab = 1024
    rare = 1

    def __init__(self, root, size=32, seed=0, device='cpu', text=None, skip_bad=False):
        # what reading needs; the rest is set by DataSet.__init__ below
        self.root = Path(root)
        self.size = size
        self.skip_bad = skip_bad
        self.bad = []                                          # messages about bad rows
        self.names = class_names(self.root / 'classes.json')
        self.palette = palette(len(self.names))
        self.meta = self.metadata()
        self.rows, self.arrays = self.cached()
        # of all that is read, so that --resume notices another folder
        self.checksum = zlib.crc32(json.dumps([self.names, self.rows]).encode())
        for k in sorted(self.arrays):
            self.checksum = zlib.crc32(self.arrays[k].numpy(), self.checksum)
        # what there is to learn
        kinds = {kind for row in self.all_rows() for kind, _ in row['qa']}
        self.kinds = tuple(sorted(kinds))
        self.example = self.rows['train'][0]['caption'] or self.example
        self.captions = self.all_have('caption')
        self.annotated = tuple(name for key, name in ANNOTATIONS.items() if self.all_have(key))
        if not self.qa_of('train'):                            # captions alone can be drawn
            print(f'{root}: no qa in train: what needs it is switched off')
            self.kinds = ()
        if not self.kinds and not self.captions:
            raise UserError(f'{root} has neither captions nor questions: there is nothing to learn')
        self.check_meaning()
        super().__init__(size, seed, device, text)
        self.check_lengths()

    def all_rows(self) -> list:
        """Of all splits, one after another: what is said of each picture,
        without its pixels."""
        return [row for split in SPLITS for row in self.rows[split]]

    def all_have(self, key: str) -> bool:
        """Is it in every row? If not, say so: what needs it is switched off, rather
        than taught on some pictures only."""
        rows = self.all_rows()
        lack = [row['file'] for row in rows if not row[key]]
        if lack and key != 'depth':                            # which few have
            print(f'{self.root}: no {key} in {len(lack)} of {len(rows)} rows, the first {lack[0]}: '
                  'what needs it is switched off')
        return not lack

    def qa_of(self, split) -> list:
        """All (type, answer) of a split."""
        return [(kind, answer) for row in self.rows[split] for kind, (_, answer) in row['qa']]

    def check_meaning(self):
        """Say what would make scores mean something else than they seem to; UserError where no map can
        be right."""
        taught = set(self.qa_of('train'))
        asked = self.qa_of('val') + self.qa_of('test')
        new = [kind_and_answer for kind_and_answer in asked if kind_and_answer not in taught]
        if new:                                                # whole answers are scored
            print(f'{self.root}: {len(new)} of {len(asked)} answers of validation and test never occur '
                  f'in train with their type of question, such as {new[0]}: they count as wrong')
        plans = ' '.join(row['plan'] for row in self.all_rows())
        if re.search(UPPER_LEFT, plans) and not re.search(LOWER_RIGHT, plans):
            print(f'{self.root}: no object lies at the right or the bottom of any picture. Are its '
                  'boxes [x, y, width, height]? They must be [x0, y0, x1, y1]')
        if 'classes' not in self.annotated:
            return
        found = self.arrays['train.mask'].unique().tolist()
        never = [name for i, name in enumerate(self.names) if i not in found]
        if never and found[1:] == [255]:                       # one class beside it
            raise UserError(f'{self.root}: the masks of train hold {found} only. 255 means ignored; the '
                            f'classes {self.names} must be 0, 1, ... in them')
        if never:
            print(f'{self.root}: no mask of train holds {never}: they cannot be learned')

    def check_lengths(self):
        """What is too long would have no positions in the model: such rows are bad. 12 tokens are left
        for an instruction; a prompt needs room for the plan that follows it."""
        for split, rows in self.rows.items():
            fit = [row for row in rows if self.fits(row)]
            self.need(split, fit)
            self.rows[split] = fit
        if self.bad:
            print(f'{self.root}: left out {len(self.bad)} bad rows, the first: {self.bad[0]}')

    def fits(self, row: dict) -> bool:
        """Are its texts short enough?"""
        room = MAX_TEXT - 12
        texts = [(f'{question} {answer}', room) for _, (question, answer) in row['qa']]
        texts += [(row['caption'], room - MAX_PLAN), (row['plan'], MAX_PLAN)]
        for text, most in texts:
            n = len(self.text.encode(text))
            if n > most:
                self.refuse(row['at'], f'{n} tokens, at most {most}: shorten {text[:40]!r}')
                return False
        return True

    def refuse(self, at: str, why: str):
        """A bad row at 'train/metadata.jsonl:3': UserError or, with skip_bad, one more of self.bad."""
        message = f'{self.root / at}: {why}'
        self.bad.append(message)
        if not self.skip_bad:
            raise UserError(f'{message}. Mend the line, or leave it out: --skip-bad')

    def need(self, split: str, rows: list):
        """UserError for an empty split: it measures nothing."""
        if not rows:
            raise UserError(f'{self.root} has no row for {split} that can be used. {self.bad[:1]}')

    # -- reading the folder
    def cached(self):
        """-> ({split: rows}, {'split.name': bytes [n, ...]}), from root/.cache, or decoded and kept."""
        path = self.root / '.cache' / f'{self.size}.safetensors'
        known = self.fingerprint()
        # no cache, or one that is cut off or foreign: decode again
        with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError):
            arrays = load_file(path)
            of, rows, bad = json.loads(arrays.pop('rows').numpy().tobytes())
            if of == known:
                self.bad = bad
                return rows, arrays
        rows, arrays = self.read()
        # the rows travel in the same file, as the bytes of their JSON
        text = bytearray(json.dumps([known, rows, self.bad]), 'utf-8')
        text = torch.frombuffer(text, dtype=torch.uint8)
        try:
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as part:
                save_file(arrays | {'rows': text}, part)
        except (OSError, SafetensorError) as e:
            print(f'cannot keep {path} ({e}): the next start decodes again')
        return rows, arrays

    def fingerprint(self) -> str:
        """A hash of size and time of all files in the folder (not of hidden ones, nor of those that
        rows name elsewhere): another one when any of them changes."""
        # times and sizes, not contents: reading all files would take as long as decoding them
        known = []
        for name in sorted(glob.glob('**', root_dir=self.root, recursive=True)):
            path = self.root / name
            if path.is_file():
                stat = path.stat()
                known.append((name, stat.st_size, stat.st_mtime_ns))
        known = repr([FORMAT, self.skip_bad, known])
        return hashlib.sha256(known.encode()).hexdigest()

    def metadata(self) -> dict:
        """{split: its metadata.jsonl, relative to the folder}; UserError without train."""
        found = {}
        for split, names in FOLDERS.items():
            for name in names:
                path = Path(name, 'metadata.jsonl')
                if (self.root / path).is_file():
                    found.setdefault(split, path)
        if 'train' not in found:
            there = sorted(path.name for path in self.root.glob('*'))
            raise UserError(f'there is no {self.root}/train/metadata.jsonl (metadata.csv is not read); '
                            f'found: {there[:4]}. Write a line for each picture, such as '
                            '{"file_name": "1.png", "caption": "a cat on the left"}')
        lacking = [split for split in SPLITS if split not in found]
        self.aside = {('train', digit): split for digit, split in enumerate(lacking)}
        if lacking:
            print(f'{self.root}: no metadata.jsonl for {lacking}: every tenth picture of train is set '
                  'aside for each')
        return found

    def read(self):
        """Decode all. A bad line ends the program or, with skip_bad, is counted and left out."""
        rows, arrays = {}, {}
        kept = {split: [] for split in SPLITS}                 # of (row, arrays)
        self.read_splits(kept)
        for split in SPLITS:
            self.need(split, kept[split])
            if split != 'train':     # in a fixed random order: the first n are then a fair sample of all
                random.Random(0).shuffle(kept[split])
            rows[split] = [row | {'index': i} for i, (row, _) in enumerate(kept[split])]
            for key in ('image', *ANNOTATIONS):
                arrays[f'{split}.{key}'] = torch.stack([found[key] for _, found in kept[split]])
        return rows, arrays

    def read_splits(self, kept: dict):
        """Fills kept, {split: [(row, arrays)]}."""
        seen = {}                                              # picture: its split
        for split, meta in self.meta.items():
            lines = (self.root / meta).read_bytes().split(b'\n')
            for n, line in enumerate(tqdm(lines, f'reading {split}', delay=2), 1):
                if not line.strip():                           # an empty line is no row
                    continue
                at = f'{meta}:{n}'
                try:
                    row, found = read_row(self.root / meta.parent, line, self.size, len(self.names))
                    pixels = found['image'].numpy().tobytes()
                    # every tenth new picture of train may be set aside, with all of its rows
                    goes = self.aside.get((split, len(seen) % 10), split)
                    goes = seen.setdefault(pixels, goes)
                    # the same pixels in two splits: the test would know what training showed
                    if goes != split and split != 'train':
                        raise ValueError(f'its picture is in {goes} too')
                    kept[goes].append((row | {'at': at}, found))
                except Exception as e:                         # a stranger's data: whatever is wrong
                    why = str(e) if isinstance(e, (UserError, ValueError)) else repr(e)
                    self.refuse(at, CONTROL.sub(' ', why)[:200])

    # -- what a data set defines
    def limit(self, split):
        """How many rows there are."""
        return len(self.rows[split])

    def scenes(self, split, stream, index, B, pixels=True):
        """-> (rows, their Rendering, a random.Random). In training at random; else in order, the
        batches of a stream one after another, fewer at the end."""
        rng = python_random(self.seed, split, stream, index)
        n = len(self.rows[split])                              # rows of the split
        if split == 'train':                                   # again and again
            rows = [self.rows[split][rng.randrange(n)] for _ in range(B)]
        else:
            first = index * B % n
            rows = self.rows[split][first:first + B]
        chosen = [row['index'] for row in rows]
        found = {}
        for key in ('image', *ANNOTATIONS):
            found[key] = self.arrays[f'{split}.{key}'][chosen].to(self.device)
        mask = found['mask'].long()
        none = torch.zeros_like(mask)                          # no instances are known
        r = Rendering(found['image'] / 255, mask, none, found['depth'] / 255, self.palette)
        return rows, r, rng

    def corpus(self):
        """All texts of train, and what is said to have a picture drawn."""
        yield from ASK_TO_DRAW
        for row in self.rows['train']:
            yield row['caption']
            yield row['plan']
            for _, question_and_answer in row['qa']:
                yield from question_and_answer

    def ask(self, scene, kind, rng):
        """All of the row's questions of that type."""
        return [qa for k, qa in scene['qa'] if k == kind]

    def turns(self, scene, Q, rng, kinds):
        """Q of the row's questions, or all, whatever their types."""
        return rng.sample(scene['qa'], min(Q, len(scene['qa'])))

    def describe(self, scene, style, rng):
        """The caption is the list of what is there; the plan says what is where."""
        if style == 'list' and self.captions:
            return scene['caption']
        if style == 'place':
            return scene['plan']
        return None


def open_world(folder, size, seed, device, text=None, skip_bad=False) -> DataSet:
    """The procedural world, or the folder of real pictures that is named."""
    if folder:
        return Folder(folder, size, seed, device, text, skip_bad)
    return World(size, seed, device, text)
