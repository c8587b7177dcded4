"""Real pictures: a folder with captions, questions and masks as a data set.

    python train.py --data DIR      DIR is laid out as Hugging Face's ImageFolder:
                                    {train,validation,test}/metadata.jsonl and the files these name

A line of metadata.jsonl is a JSON object; paths are relative to its folder. Its keys:
    file_name                       PNG or JPEG of any size and mode
    caption, mask, depth            in every line or not used; mask: indexed PNG as large as the picture,
                                    class ids as named in order in DIR/classes.json, 255 = ignored;
                                    depth: grey, bright = near; 16 bits: stretched to what occurs in it
    qa                              [{question, answer, type}], where known
    objects                         [{name, bbox: [x0, y0, x1, y1]}], where known: what a drawing plans;
                                    pixels of the upright picture, as for the mask
"""
import contextlib
import hashlib
import json
import random
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import (MAX_PLAN, MAX_TEXT, PALETTE, REASON, SPLITS, DataSet, Rendering, UserError, World,
                  python_random, written_whole)

FORMAT = 2                     # of the cache: counts changes of what it holds
MAX_PIXELS = 50_000_000        # a larger picture is refused before it is decoded
THIRDS = (                     # where an object lies, row by row
    'top left', 'top center', 'top right',
    'middle left', 'middle center', 'middle right',
    'bottom left', 'bottom center', 'bottom right',
)
MOST_PLANNED = 8               # objects in a plan: the largest ones
ANNOTATIONS = {'mask': 'classes', 'depth': 'depth'}        # key of a row: field of a Rendering


# ---- pictures ----
# People bring files of every kind: phones turn pictures by a note beside the pixels, cameras store 16
# bits, drawings have transparent parts. One function reads them all, for training and for sample.py.
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


def upright(path) -> Image.Image:
    """A picture file of any size and mode: RGB, turned upright, on white."""
    try:
        warnings.simplefilter('ignore')        # of PIL, about damaged parts; MAX_PIXELS is stricter
        # open() reads the header only: a picture that is too large is never decoded
        with Image.open(path) as im:
            if im.width * im.height > MAX_PIXELS:
                raise UserError(f'{path} has {im.width} x {im.height} pixels, {MAX_PIXELS:,} at most: '
                                'shrink it')
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith(('I', 'F')):                 # 16 bits and float: do not clip
                im = stretched(im)
            im = im.convert('RGBA')                            # of every other mode
            white = Image.new('RGBA', im.size, 'white')
            return Image.alpha_composite(white, im).convert('RGB')
    except FileNotFoundError:
        raise UserError(f'there is no picture {path}')
    except UserError:                                          # from above
        raise
    except Exception as e:                           # PIL raises many kinds on broken files
        why = f'{type(e).__name__}: {str(e)[:60]}'
        raise UserError(f'cannot read {path} as a picture ({why}): give a PNG or JPEG')


def stretched(im: Image.Image) -> Image.Image:
    """Numbers of any range as 8 bits: from 0 for the least to 255 for the largest that occurs."""
    a = np.asarray(im, dtype=np.float32)
    span = max(1e-6, np.ptp(a))
    a = (a - a.min()) / span * 255
    return Image.fromarray(a.astype(np.uint8))


def shrunk(im: Image.Image, size: int):
    """Resized by area -> uint8 [3, size, size]."""
    pixels = np.array(im.resize((size, size), Image.BOX))                             # [S,S,3]
    return torch.from_numpy(pixels).permute(2, 0, 1)                                  # [3,S,S]


def read_image(path, size: int):
    """A picture file as a model sees it: uint8 [3, size, size]."""
    return shrunk(upright(path), size)


# ---- a row of metadata.jsonl, checked: ValueError says what is wrong with it ----
# What a stranger wrote is not trusted: every value is looked at once, here; nothing later has to.
# The caller adds file and line to the message.
def text_of(value, key: str) -> str:
    """A text with single spaces, of a value that may be anything."""
    if type(value) is not str or not value.strip():
        raise ValueError(f'{key} is {value!r:.40}: it must be a text')
    value.encode()                                             # lone surrogates: ValueError
    return ' '.join(value.split())


def list_of(row: dict, key: str) -> list[dict]:
    """The list of objects under a key, empty where there is none."""
    found = row.get(key) or []
    if type(found) is not list:
        raise ValueError(f'{key} must be a list of objects, {{...}}')
    for x in found:
        if type(x) is not dict:
            raise ValueError(f'{key} must be a list of objects, {{...}}')
    return found


def plan_of(objects: list[dict], width: int, height: int) -> str:
    """A plan to draw by: 'top left a cat, ...', the largest objects in reading order of the nine thirds
    of thirds of a picture."""
    found = []
    for o in objects:
        box = o.get('bbox')
        if box is None:
            continue                                           # nothing of it is seen
        x0, y0, x1, y1 = [float(v) for v in box]
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
    """The texts of a row, whose upright picture has that size in pixels: {file, caption or '', qa:
    [(type, [question, answer])], plan or ''}, questions and answers in small letters."""
    said = {'file': row['file_name'], 'caption': '', 'qa': []}
    if row.get('caption'):                                     # an empty one is none
        said['caption'] = text_of(row['caption'], 'caption')
    for q in list_of(row, 'qa'):
        kind = text_of(q.get('type', 'question'), 'type')
        if kind in ('mean', 'reason', *REASON):                # columns of the table of scores
            raise ValueError(f'the type {kind!r} is taken: choose another name')
        question = text_of(q.get('question'), 'question')
        answer = text_of(q.get('answer'), 'answer')
        said['qa'].append((kind, [question.lower(), answer.lower()]))
    said['plan'] = plan_of(list_of(row, 'objects'), width, height)
    return said


def read_mask(path, whole: tuple, size: int, classes: int):
    """An indexed PNG, as large as its picture -> classes [size, size]."""
    with Image.open(path) as im:
        if im.size != whole or im.mode not in ('P', 'L'):
            raise ValueError(f'{path.name} is {im.size}, mode {im.mode}; it must have the size of the '
                             f'upright picture, {whole}, and mode P or L')
        mask = np.array(im.resize((size, size), Image.NEAREST))                       # [S,S]
    known = {*range(classes), 255}
    unknown = set(np.unique(mask).tolist()) - known
    if unknown:
        raise ValueError(f'{path.name} has class {max(unknown)}; classes.json names {classes}')
    return torch.from_numpy(mask)


def read_row(folder: Path, line: str, size: int, classes: int):
    """A line of metadata.jsonl -> (what is said of its picture, its arrays of bytes: image [3, S, S]
    and, where the row names them, mask and depth [S, S])."""
    row = json.loads(line)
    if type(row) is not dict or type(row.get('file_name')) is not str:
        raise ValueError('it must be a JSON object with a file_name')
    im = upright(folder / row['file_name'])
    arrays = {'image': shrunk(im, size)}
    if row.get('mask'):
        arrays['mask'] = read_mask(folder / row['mask'], im.size, size, classes)
    if row.get('depth'):
        arrays['depth'] = read_image(folder / row['depth'], size)[0]                  # [S,S]
    said = said_in(row, *im.size)
    # which annotations there are, to know whether all rows have them
    for key in ANNOTATIONS:
        said[key] = key in arrays
    return said, arrays


def class_names(path: Path) -> list:
    """Of classes.json; none where there is no such file."""
    if not path.exists():
        return []
    try:
        names = json.loads(path.read_bytes())['mask_classes']
        if type(names) is not list or len(names) > 255:
            raise ValueError('a list of 255 names at most')
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(f'{path} is not {{"mask_classes": ["background", ...]}}: {e!r:.60}')
    return names


# ---- the data set ----
# Rows (what is said of a picture) and arrays (its pixels as bytes) of all splits lie in memory.
class Folder(DataSet):
    """Batches from the folder described above; a scene is a row. Decoded once: root/.cache is used until
    the size or time of a file changes. Raises UserError where something is wrong with it."""
    vocab = 1024

    def __init__(self, root, size=32, seed=0, device='cpu', text=None, skip_bad=False):
        # what reading needs; the rest is set by DataSet.__init__ below
        self.root = Path(root)
        self.size = size
        self.skip_bad = skip_bad
        self.classes = len(class_names(self.root / 'classes.json'))
        self.palette = palette(self.classes)
        self.rows, self.arrays = self.cached()
        # of all that is read, so that --resume notices another folder
        self.checksum = zlib.crc32(json.dumps(self.rows).encode())
        for k in sorted(self.arrays):
            self.checksum = zlib.crc32(self.arrays[k].numpy(), self.checksum)
        # what there is to learn
        kinds = {kind for row in self.rows['train'] for kind, _ in row['qa']}
        self.kinds = tuple(sorted(kinds))
        self.example = self.rows['train'][0]['caption'] or self.example
        self.captions = self.all_have('caption')
        self.annotated = tuple(name for key, name in ANNOTATIONS.items() if self.all_have(key))
        if not self.kinds:                                     # captions alone can be drawn
            print(f'{root}: no qa in train: what needs it is switched off')
        if not self.kinds and not self.captions:
            raise UserError(f'{root} has neither captions nor questions: there is nothing to learn')
        self.warn_of_new_answers()
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

    def warn_of_new_answers(self):
        """Whole answers are scored: one that training never shows is hardly ever given."""
        known = {answer for row in self.rows['train'] for _, (_, answer) in row['qa']}
        asked = []
        for split in SPLITS[1:]:
            for row in self.rows[split]:
                asked += [answer for _, (_, answer) in row['qa']]
        new = [answer for answer in asked if answer not in known]
        if new:
            print(f'{self.root}: {len(new)} of {len(asked)} answers of validation and test never occur '
                  f'in train, such as {new[0]!r}: they count as wrong')

    def check_lengths(self):
        """UserError for a text that is too long: it would have no positions in the model. 12 tokens are
        left for an instruction; a prompt needs room for the plan that follows it."""
        for row in self.all_rows():
            # (what is read, what is written, tokens that follow)
            texts = [(question, answer, 0) for _, (question, answer) in row['qa']]
            texts.append((row['caption'], row['plan'], MAX_PLAN))
            for a, b, more in texts:
                room = MAX_TEXT - 12 - more
                # cheap first: a token is a byte or more
                if len((a + b).encode()) < room - 2:
                    continue
                n = len(self.text.encode(a)) + len(self.text.encode(b))
                if n > room:
                    raise UserError(f"{self.root}: a text about {row['file']} has {n} tokens, at most "
                                    f'{room}: shorten {a[:40]!r}')

    # -- reading the folder
    def cached(self):
        """-> ({split: rows}, {'split.name': bytes [n, ...]}), from root/.cache, or decoded and kept."""
        path = self.root / '.cache' / f'{self.size}-{self.fingerprint()}.safetensors'
        # no cache, or one that is cut off or foreign: decode again
        with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError):
            arrays = load_file(path)
            return json.loads(arrays.pop('rows').numpy().tobytes()), arrays
        rows, arrays = self.read()
        # the rows travel in the same file, as the bytes of their JSON
        text = torch.frombuffer(bytearray(json.dumps(rows), 'utf-8'), dtype=torch.uint8)
        try:
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as part:
                save_file(arrays | {'rows': text}, part)
            for old in path.parent.glob(f'{self.size}-*'):
                if old != path:
                    old.unlink(missing_ok=True)                # of pictures that have changed
        except (OSError, SafetensorError) as e:
            print(f'cannot keep {path} ({e}): the next start decodes again')
        return rows, arrays

    def fingerprint(self) -> str:
        """A hash of size and time of all files: another one when any of them changes."""
        files = [self.root / 'classes.json']
        for split in SPLITS:
            meta = self.meta(split)
            files.append(meta)
            with contextlib.suppress(ValueError, RecursionError):      # read() will tell which line
                lines = [line for line in self.lines(split) if line.strip()]
                rows = [json.loads(line) for line in lines]
                files += files_of(rows, meta.parent)
        known = []                                             # of the files that exist
        for path in files:
            if path.exists():
                stat = path.stat()
                known.append((str(path), stat.st_size, stat.st_mtime_ns))
        key = repr((FORMAT, self.skip_bad, known))
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def meta(self, split) -> Path:
        """The split's metadata.jsonl; UserError where there is none."""
        path = self.root / {'val': 'validation'}.get(split, split) / 'metadata.jsonl'
        if not path.is_file():
            raise UserError(f'{path} is missing: a folder of pictures has one in each of its splits')
        return path

    def lines(self, split) -> list[str]:
        """Of the split's metadata, a byte order mark left out."""
        try:
            return self.meta(split).read_text('utf-8-sig').split('\n')
        except UnicodeDecodeError as e:
            raise UserError(f'{self.meta(split)} is not UTF-8: {e}')

    def read(self):
        """Decode all. A bad line ends the program or, with skip_bad, is counted and left out."""
        rows, arrays = {}, {}
        seen, bad = {}, []                                     # shared by all splits
        for split in SPLITS:
            kept = self.read_split(split, seen, bad)
            if not kept:                                       # an empty split measures nothing
                raise UserError(f'{self.meta(split)} has no row that can be used. {bad[-1:]}')
            if split != 'train':     # in a fixed random order: the first n are then a fair sample of all
                random.Random(0).shuffle(kept)
            rows[split] = [row for row, _ in kept]
            # an annotation counts if every row of the split has it
            _, first = kept[0]
            for key in first:
                found = [arrays_of_row.get(key) for _, arrays_of_row in kept]
                if all(array is not None for array in found):
                    arrays[f'{split}.{key}'] = torch.stack(found)
        if bad:
            print(f'{self.root}: left out {len(bad)} bad rows, the first: {bad[0]}')
        return rows, arrays

    def read_split(self, split: str, seen: dict, bad: list) -> list:
        """-> [(row, arrays)]; seen: {picture: split} so far, which grows; bad: messages, which grow."""
        meta, kept = self.meta(split), []
        for n, line in enumerate(tqdm(self.lines(split), f'reading {split}', delay=2), 1):
            if not line.strip():                               # an empty line is no row
                continue
            try:
                row, found = read_row(meta.parent, line, self.size, self.classes)
                # the same pixels in two splits: the test would know what training showed
                first = seen.setdefault(found['image'].numpy().tobytes(), split)
                if first != split:
                    raise ValueError(f'its picture is in {first} too')
                kept.append((row, found))
            except Exception as e:                             # a stranger's data: whatever is wrong
                why = ' '.join(str(e).split())[:200]
                if not isinstance(e, (UserError, ValueError)):
                    why = f'{type(e).__name__}: {why}'
                bad.append(f'{meta}:{n}: {why}')
                if not self.skip_bad:
                    raise UserError(f'{bad[-1]}. Mend the line, or leave it out: --skip-bad')
        return kept

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
            chosen = [rng.randrange(n) for _ in range(B)]
        else:
            first = index * B % n
            chosen = list(range(first, min(first + B, n)))
        rows = [self.rows[split][i] for i in chosen]
        # what is not annotated is all zero, and nobody asks for it
        none = torch.zeros(len(chosen), self.size, self.size, dtype=torch.uint8)
        found = {}
        for key in ('image', 'mask', 'depth', 'instance'):
            array = self.arrays.get(f'{split}.{key}')
            bytes_ = none if array is None else array[chosen]
            found[key] = bytes_.to(self.device)
        r = Rendering(found['image'] / 255, found['mask'].long(), found['instance'].long(),
                      found['depth'] / 255, self.palette)
        return rows, r, rng

    def corpus(self):
        """The thousand most frequent words of train."""
        words = Counter()
        for row in self.rows['train']:
            texts = [row['caption'], row['plan']]
            for _, question_and_answer in row['qa']:
                texts += question_and_answer
            for text in texts:
                words.update(text.lower().split())
        return [word for word, _ in words.most_common(1000)]

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


def files_of(rows: list, folder: Path) -> list:
    """The files that rows of metadata name."""
    files = []
    for row in rows:
        if type(row) is not dict:                              # read() will say so
            continue
        for key in ('file_name', 'mask', 'depth'):
            if type(row.get(key)) is str:
                files.append(folder / row[key])
    return files


def open_world(folder, size, seed, device, text=None, skip_bad=False) -> DataSet:
    """The procedural world, or the folder of real pictures that is named."""
    if folder:
        return Folder(folder, size, seed, device, text, skip_bad)
    return World(size, seed, device, text)
