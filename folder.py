"""Real pictures: a folder with captions, questions and masks as a World like the procedural one.

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
import os
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

from data import MAPS, MAX_PLAN, MAX_TEXT, PALETTE, REASON, SPLITS, Rendering, UserError, World

FORMAT = 2                     # of the cache: counts changes of what it holds
MAX_PIXELS = 50_000_000        # a larger picture is refused before it is decoded
THIRDS = [f'{y} {x}' for y in ('top', 'middle', 'bottom') for x in ('left', 'center', 'right')]

def palette(n: int):
    """Colours of n classes, [n, 3]: PALETTE, then points of a grid in the RGB cube, each the farthest
    from all before it, so that the classes named first are told apart best."""
    side, colours = next(k for k in range(3, 8) if k ** 3 >= n), PALETTE[:n]
    grid = torch.cartesian_prod(*[torch.linspace(0, 255, side).round().long()] * 3)   # [side^3,3]
    while len(colours) < n:
        far = torch.cdist(grid.float(), colours.float()).amin(1)                      # [side^3]
        colours = torch.cat([colours, grid[far.argmax()][None]])
    return colours

def upright(path) -> Image.Image:
    """A picture file of any size and mode: RGB, turned upright, on white."""
    try:
        warnings.simplefilter('ignore')        # of PIL, about damaged parts; MAX_PIXELS is stricter
        with Image.open(path) as im:
            if im.width * im.height > MAX_PIXELS:
                raise UserError(f'{path} has {im.width} x {im.height} pixels, {MAX_PIXELS:,} at most: '
                                'shrink it')
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith(('I', 'F')):       # 16 bits and float: stretch to 8 bits, do not clip
                a = np.asarray(im, dtype=np.float32)
                im = Image.fromarray(((a - a.min()) / max(1e-6, np.ptp(a)) * 255).astype(np.uint8))
            im = im.convert('RGBA')
            return Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    except FileNotFoundError:
        raise UserError(f'there is no picture {path}')
    except UserError:
        raise
    except Exception as e:                           # PIL raises many kinds on broken files
        raise UserError(f'cannot read {path} as a picture ({type(e).__name__}: {str(e)[:60]}): '
                        'give a PNG or JPEG')

def shrunk(im: Image.Image, size: int):
    """Resized by area -> uint8 [3, size, size]."""
    return torch.from_numpy(np.array(im.resize((size, size), Image.BOX))).permute(2, 0, 1)    # [3,S,S]

read_image = lambda path, size: shrunk(upright(path), size)

def said_in(row: dict, size) -> dict:
    """The texts of a row, checked; size: (width, height) of its upright picture in pixels."""
    def text(value, key):
        if type(value) is not str or not value.strip():
            raise ValueError(f'{key} is {value!r:.40}: it must be a text')
        value.encode()                                         # lone surrogates: ValueError
        return ' '.join(value.split())
    lists = {}
    for key in ('qa', 'objects'):
        lists[key] = row.get(key) or []
        if type(lists[key]) is not list or not all(type(x) is dict for x in lists[key]):
            raise ValueError(f'{key} must be a list of objects, {{...}}')
    caption = row.get('caption') and text(row['caption'], 'caption')
    said, found = {'file': row['file_name'], 'caption': caption or '', 'qa': []}, []
    for q in lists['qa']:
        kind = text(q.get('type', 'question'), 'type')
        if kind in ('mean', 'reason', *REASON):
            raise ValueError(f'the type {kind!r} is taken: choose another name')
        said['qa'].append((kind, [text(q.get(k), k).lower() for k in ('question', 'answer')]))
    for o in lists['objects']:
        if o.get('bbox') is None:
            continue                                           # nothing of it is seen
        x0, y0, x1, y1 = map(float, o['bbox'])
        if not (0 <= x0 < x1 <= size[0] + 1 and 0 <= y0 < y1 <= size[1] + 1):
            raise ValueError(f"bbox is {o['bbox']}: it must be [x0, y0, x1, y1] in pixels of the "
                             f'upright picture, {size}')
        row_of, column = (min(2, int(1.5 * v)) for v in ((y0 + y1) / size[1], (x0 + x1) / size[0]))
        at, name = 3 * row_of + column, text(o.get('name'), 'name')
        found.append(((x1 - x0) * (y1 - y0), at, x0 + x1, f'{THIRDS[at]} {name}'))
    # a plan to draw by: the eight largest objects in reading order
    said['plan'] = ', '.join(o[-1] for o in sorted(sorted(found)[-8:], key=lambda o: o[1:]))
    return said

def read_row(folder: Path, line: str, size: int, classes: int):
    """A line of metadata.jsonl, checked -> (what is said of its picture, its arrays of bytes)."""
    row = json.loads(line)
    if type(row) is not dict or type(row.get('file_name')) is not str:
        raise ValueError('it must be a JSON object with a file_name')
    picture = upright(folder / row['file_name'])
    arrays, whole = {'image': shrunk(picture, size)}, picture.size       # of which mask and boxes are
    if row.get('mask'):
        with Image.open(folder / row['mask']) as im:
            if im.size != whole or im.mode not in ('P', 'L'):
                raise ValueError(f"{row['mask']} is {im.size}, mode {im.mode}; it must have the "
                                 f'size of the upright picture, {whole}, and mode P or L')
            arrays['mask'] = torch.from_numpy(np.array(im.resize((size, size), Image.NEAREST)))  # [S,S]
        if unknown := set(arrays['mask'].unique().tolist()) - {*range(classes), 255}:
            raise ValueError(f"{row['mask']} has class {max(unknown)}; classes.json names {classes}")
    if row.get('depth'):
        arrays['depth'] = read_image(folder / row['depth'], size)[0]                  # [S,S]
    return said_in(row, whole) | {k: k in arrays for k in ('mask', 'depth')}, arrays

class Folder(World):
    """Batches from the folder described above. Decoded once: root/.cache is used until the size or time
    of a file changes. Raises UserError where something is wrong with it."""
    vocab = 1024

    def __init__(self, root, size=32, seed=0, device='cpu', text=None, skip_bad=False):
        self.root, self.size, self.skip_bad = Path(root), size, skip_bad
        names = self.root / 'classes.json'
        try:
            classes = json.loads(names.read_bytes())['mask_classes'] if names.exists() else []
            if type(classes) is not list or len(classes) > 255:
                raise ValueError('a list of 255 names at most')
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise UserError(f'{names} is not {{"mask_classes": ["background", ...]}}: {e!r:.60}')
        self.palette, (self.rows, self.arrays) = palette(len(classes)), self.cached(len(classes))
        self.checksum = zlib.crc32(json.dumps(self.rows).encode())
        for k in sorted(self.arrays):
            self.checksum = zlib.crc32(self.arrays[k].numpy(), self.checksum)
        rows = sum(self.rows.values(), [])
        lack = {k: [row['file'] for row in rows if not row[k]] for k in ('caption', 'mask', 'depth')}
        self.kinds = tuple(sorted({kind for row in self.rows['train'] for kind, _ in row['qa']}))
        for name in ('caption', 'mask'):
            if lack[name]:
                print(f'{root}: no {name} in {len(lack[name])} of {len(rows)} rows, the first '
                      f'{lack[name][0]}: what needs it is switched off')
        if not self.kinds:
            print(f'{root}: no qa in train: what needs it is switched off')
        if not self.kinds and lack['caption']:
            raise UserError(f'{root} has neither captions nor questions: there is nothing to learn')
        maps = {'edge', *['seg'] * (not lack['mask']), *['depth'] * (not lack['depth'])}
        self.captions, self.maps = not lack['caption'], {k: f for k, f in MAPS.items() if k in maps}
        self.example = self.rows['train'][0]['caption']
        known = {answer for row in self.rows['train'] for _, (_, answer) in row['qa']}
        asked = [a for s in SPLITS[1:] for row in self.rows[s] for _, (_, a) in row['qa']]
        if new := [a for a in asked if a not in known]:
            print(f'{root}: {len(new)} of {len(asked)} answers of validation and test never occur in '
                  f'train, such as {new[0]!r}: they count as wrong')
        super().__init__(size, seed, device, text)
        for row in rows:                                # longer ones have no positions in the model
            texts = [(*qa, 0) for _, qa in row['qa']] + [(row['caption'], row['plan'], MAX_PLAN)]
            for a, b, more in texts:
                if len((a + b).encode()) + more < MAX_TEXT - 14:      # a token is a byte or more
                    continue
                n = len(self.text.encode(a)) + len(self.text.encode(b)) + more
                if n > MAX_TEXT - 12:
                    raise UserError(f"{root}: a text about {row['file']} has {n - more} tokens, at most "
                                    f'{MAX_TEXT - 12 - more}: shorten {a[:40]!r}')

    def cached(self, classes: int):
        """-> ({split: rows}, {'split.name': bytes [n, ...]}), from root/.cache, or decoded and kept."""
        files = [self.root / 'classes.json']
        for split in SPLITS:
            files.append(self.meta(split))
            with contextlib.suppress(ValueError, RecursionError):      # read() will tell which line
                rows = [json.loads(line) for line in self.lines(split) if line.strip()]
                files += [files[-1].parent / row[k] for row in rows if type(row) is dict
                          for k in ('file_name', 'mask', 'depth') if type(row.get(k)) is str]
        stat = [(str(p), s.st_size, s.st_mtime_ns) for p in files if p.exists() and (s := p.stat())]
        key = hashlib.sha256(repr((FORMAT, self.skip_bad, stat)).encode()).hexdigest()[:16]
        path = self.root / '.cache' / f'{self.size}-{key}.safetensors'
        with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError):
            arrays = load_file(path)
            return json.loads(arrays.pop('rows').numpy().tobytes()), arrays
        rows, arrays = self.read(classes)
        text = torch.frombuffer(bytearray(json.dumps(rows), 'utf-8'), dtype=torch.uint8)
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(arrays | {'rows': text}, f'{path}.part')
            os.replace(f'{path}.part', path)
            for old in path.parent.glob(f'{self.size}-*'):
                if old != path:
                    old.unlink(missing_ok=True)                # of pictures that have changed
        except (OSError, SafetensorError) as e:
            print(f'cannot keep {path} ({e}): the next start decodes again')
        return rows, arrays

    def meta(self, split) -> Path:
        path = self.root / {'val': 'validation'}.get(split, split) / 'metadata.jsonl'
        if not path.is_file():
            raise UserError(f'{path} is missing: a folder of pictures has one in each of its splits')
        return path

    def lines(self, split) -> list[str]:
        try:
            return self.meta(split).read_text('utf-8-sig').split('\n')
        except UnicodeDecodeError as e:
            raise UserError(f'{self.meta(split)} is not UTF-8: {e}')

    def read(self, classes: int):
        """Decode all. A bad line ends the program or, with skip_bad, is counted and left out."""
        rows, arrays, seen, bad = {split: [] for split in SPLITS}, {}, {}, []
        for split in SPLITS:
            meta, kept = self.meta(split), []
            for n, line in enumerate(tqdm(self.lines(split), f'reading {split}', delay=2), 1):
                if not line.strip():
                    continue
                try:
                    row, found = read_row(meta.parent, line, self.size, classes)
                    first = seen.setdefault(found['image'].numpy().tobytes(), split)
                    if first != split:
                        raise ValueError(f'its picture is in {first} too')
                    kept.append((row, found))
                except Exception as e:                         # a stranger's data: whatever is wrong
                    kind = '' if isinstance(e, (UserError, ValueError)) else type(e).__name__ + ': '
                    bad.append(f'{meta}:{n}: {kind}' + ' '.join(str(e).split())[:200])
                    if not self.skip_bad:
                        raise UserError(f'{bad[-1]}. Mend the line, or leave it out: --skip-bad')
            if not kept:
                raise UserError(f'{meta} has no row that can be used. {bad[-1:]}')
            if split != 'train':     # in a fixed random order: the first n are then a fair sample of all
                random.Random(0).shuffle(kept)
            rows[split] = [row for row, _ in kept]
            arrays |= {f'{split}.{k}': torch.stack([found[k] for _, found in kept])
                       for k in kept[0][1] if all(k in found for _, found in kept)}
        if bad:
            print(f'{self.root}: left out {len(bad)} bad rows, the first: {bad[0]}')
        return rows, arrays

    def limit(self, split):
        return len(self.rows[split])

    def scenes(self, split, index, B, pixels=True):
        """As World's; a scene is a row. In training at random; else in order, fewer at the end."""
        rng, n = random.Random(f'{self.seed}/{split}/{index}'), len(self.rows[split])
        first = index % 2**20 * B % n               # evaluations count batches from a multiple of 2^20
        at = [*range(first, min(first + B, n))]
        at = [rng.randrange(n) for _ in range(B)] if split == 'train' else at
        none = torch.zeros(len(at), self.size, self.size, dtype=torch.long, device=self.device)
        image, classes, depth = (x[at].to(self.device) if x is not None else none for x in (
            self.arrays.get(f'{split}.{k}') for k in ('image', 'mask', 'depth')))
        r = Rendering(image / 255, classes.long(), none, depth / 255, self.palette)
        return [self.rows[split][i] for i in at], r, rng

    def corpus(self):
        """The thousand most frequent words of train."""
        words = Counter(w for row in self.rows['train'] for text in (row['caption'], row['plan'],
                        *(w for _, qa in row['qa'] for w in qa)) for w in text.lower().split())
        return [w for w, _ in words.most_common(1000)]

    def ask(self, scene, kind, rng):
        return [qa for k, qa in scene['qa'] if k == kind]

    def turns(self, scene, Q, rng, kinds=()):
        return rng.sample(scene['qa'], min(Q, len(scene['qa'])))

    def describe(self, scene, style, rng):
        return {'list': scene['caption'] * self.captions, 'place': scene['plan']}.get(style)

def open_world(folder, size, seed, device, text=None, skip_bad=False) -> World:
    """The procedural world, or the folder of real pictures that is named."""
    how = size, seed, device, text
    return Folder(folder, *how, skip_bad) if folder else World(*how)
