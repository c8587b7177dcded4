"""Real pictures: a folder with captions, questions and masks as a World like the procedural one.

    python train.py --data DIR      DIR is laid out as Hugging Face's ImageFolder:
                                    {train,validation,test}/metadata.jsonl and the files these name

A line of metadata.jsonl is a JSON object; paths are relative to its folder. Its keys:
    file_name                       PNG or JPEG of any size and mode
    caption, mask, depth            in every line or not used; mask: indexed PNG as large as the picture,
                                    class ids as named in order in DIR/classes.json, 255 = ignored;
                                    depth: grey, bright = near
    qa                              [{question, answer, type}], where known
    objects                         [{name, bbox: [x0, y0, x1, y1]}], where known: what a drawing plans
"""
import contextlib
import hashlib
import json
import os
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import MAPS, SPLITS, WORDS, Rendering, Text, UserError, World, palette

MAX_PIXELS = 50_000_000        # a larger picture is refused before it is decoded
THIRDS = [f'{y} {x}' for y in ('top', 'middle', 'bottom') for x in ('left', 'center', 'right')]

def read_image(path, size: int):
    """A picture file of any size and mode, turned upright, on white -> uint8 [3, size, size]."""
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
            im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
            pixels = np.array(im.resize((size, size), Image.BOX))                     # [S,S,3]
    except FileNotFoundError:
        raise UserError(f'there is no picture {path}')
    except UserError:
        raise
    except Exception as e:                           # PIL raises many kinds on broken files
        raise UserError(f'cannot read {path} as a picture ({type(e).__name__}: {str(e)[:60]}): '
                        'give a PNG or JPEG')
    return torch.from_numpy(pixels).permute(2, 0, 1)                                  # [3,S,S]

def read_row(folder: Path, line: str, size: int, classes: int):
    """A line of metadata.jsonl, checked -> (what is said of its picture, its arrays of bytes)."""
    row = json.loads(line)
    path = folder / row['file_name']
    arrays = {'image': read_image(path, size)}                                        # [3,S,S]
    with Image.open(path) as im:
        width, height = im.size
    if row.get('mask'):
        with Image.open(folder / row['mask']) as im:
            if im.size != (width, height) or im.mode not in ('P', 'L'):
                raise ValueError(f"{row['mask']} is {im.size}, mode {im.mode}; it must have the "
                                 f'size of the picture, {width, height}, and mode P or L')
            arrays['mask'] = torch.from_numpy(np.array(im.resize((size, size), Image.NEAREST)))  # [S,S]
        if unknown := set(arrays['mask'].unique().tolist()) - {*range(classes), 255}:
            raise ValueError(f"{row['mask']} has class {max(unknown)}; classes.json names {classes}")
    if row.get('depth'):
        arrays['depth'] = read_image(folder / row['depth'], size)[0]                  # [S,S]
    found, third = [], lambda a, b, whole: min(2, max(0, int(1.5 * (a + b) / whole)))
    for o in row.get('objects') or []:
        if o['bbox']:
            x0, y0, x1, y1 = o['bbox']
            at = 3 * third(y0, y1, height) + third(x0, x1, width)
            found.append(((x1 - x0) * (y1 - y0), at, x0 + x1, f"{THIRDS[at]} {o['name']}"))
    said = {'caption': row.get('caption') or '', 'qa': [
        (q.get('type', 'question'), (q['question'], q['answer'])) for q in row.get('qa') or []]}
    ' '.join([said['caption'], *(' '.join((kind, *qa)) for kind, qa in said['qa'])])  # or TypeError
    # a plan to draw by: the eight largest objects in reading order
    said['plan'] = ', '.join(o[-1] for o in sorted(sorted(found)[-8:], key=lambda o: o[1:]))
    return said | {k: k in arrays for k in ('mask', 'depth')}, arrays

class Folder(World):
    """Real pictures in Hugging Face's ImageFolder layout: root/{train,validation,test}/metadata.jsonl, a
    JSON object a line: file_name; in all lines or in none caption, mask (class ids, named in order in
    root/classes.json; 255 = ignored), depth (bright = near); where known qa [{question, answer, type}],
    objects [{name, bbox}]. Decoded once: root/.cache is used until a file's size or time changes."""

    def __init__(self, root, size=32, seed=0, device='cpu', text=None, skip_bad=False):
        self.root, self.size, self.skip_bad = Path(root), size, skip_bad
        names = self.root / 'classes.json'
        try:
            classes = json.loads(names.read_bytes())['mask_classes'] if names.exists() else []
        except (ValueError, LookupError, TypeError) as e:
            raise UserError(f'{names} is not {{"mask_classes": ["background", ...]}}: {e!r:.60}')
        self.palette, (self.rows, self.arrays) = palette(len(classes)), self.cached(len(classes))
        rows = sum(self.rows.values(), [])
        full = [k for k in ('caption', 'mask', 'depth') if all(row[k] for row in rows)]
        self.kinds = tuple(sorted({kind for row in self.rows['train'] for kind, _ in row['qa']}))
        for name in ('caption', 'mask', *['qa'] * (not self.kinds)):
            if name not in full:
                print(f'{root}: not every row has a {name}: what needs it is switched off')
        if not self.kinds and 'caption' not in full:
            raise UserError(f'{root} has neither captions nor questions: there is nothing to learn')
        maps = {'edge', *(k if k == 'depth' else 'seg' for k in full if k != 'caption')}
        self.captions, self.maps = 'caption' in full, {k: f for k, f in MAPS.items() if k in maps}
        self.has, self.example = {'image', *full}, self.rows['train'][0]['caption']
        known = {answer for row in self.rows['train'] for _, (_, answer) in row['qa']}
        asked = [a for s in SPLITS[1:] for row in self.rows[s] for _, (_, a) in row['qa']]
        if new := [a for a in asked if a not in known]:
            print(f'{root}: {len(new)} of {len(asked)} answers of validation and test never occur in '
                  f'train, such as {new[0]!r}: they count as wrong')
        super().__init__(size, seed, device, text or Text.from_corpus(self.corpus(), 1024))

    def cached(self, classes: int):
        """-> ({split: rows}, {'split.name': bytes [n, ...]}), from root/.cache, or decoded and kept."""
        files = [(str(p.relative_to(self.root)), p.stat().st_size, p.stat().st_mtime_ns)
                 for p in sorted(self.root.rglob('*')) if p.is_file() and p.parent.name != '.cache']
        key = hashlib.sha256(repr((self.size, self.skip_bad, files)).encode()).hexdigest()[:16]
        path = self.root / '.cache' / f'{key}.safetensors'
        with contextlib.suppress(OSError, SafetensorError):
            arrays = load_file(path)
            return json.loads(arrays.pop('rows').numpy().tobytes()), arrays
        rows, arrays = self.read(classes)
        text = torch.frombuffer(bytearray(json.dumps(rows), 'utf-8'), dtype=torch.uint8)
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(arrays | {'rows': text}, f'{path}.part')
            os.replace(f'{path}.part', path)
        except (OSError, SafetensorError) as e:
            print(f'cannot keep {path} ({e}): the next start decodes again')
        return rows, arrays

    def read(self, classes: int):
        """Decode all. A bad line ends the program or, with skip_bad, is counted and left out."""
        rows, arrays, seen, bad = {split: [] for split in SPLITS}, {}, {}, []
        for split in SPLITS:
            meta, kept = self.root / {'val': 'validation'}.get(split, split) / 'metadata.jsonl', []
            if not meta.is_file():
                raise UserError(f'{meta} is missing: a folder of pictures has one in each of its splits')
            lines = meta.read_text('utf-8', 'replace').split('\n')
            for n, line in enumerate(tqdm(lines, f'reading {split}', delay=2), 1):
                if not line.strip():
                    continue
                try:
                    row, found = read_row(meta.parent, line, self.size, classes)
                    first = seen.setdefault(found['image'].numpy().tobytes(), split)
                    if first != split:
                        raise ValueError(f'its picture is in {first} too')
                    rows[split].append(row), kept.append(found)
                except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError) as e:
                    bad.append(f'{meta}:{n}: {type(e).__name__}: {e}')
                    if not self.skip_bad:
                        raise UserError(f'{bad[-1]:.300}. Mend the line, or leave it out: --skip-bad')
            if not kept:
                raise UserError(f'{meta} has no row that can be used. {bad[-1:]}')
            arrays |= {f'{split}.{k}': torch.stack([found[k] for found in kept])
                       for k in kept[0] if all(k in found for found in kept)}
        if bad:
            print(f'{self.root}: left out {len(bad)} bad rows, the first: {bad[0]:.200}')
        return rows, arrays

    def scenes(self, split, index, B, pixels=True):
        """As World's; a scene is a row. In training at random; else in order, fewer at the end."""
        rng, n = random.Random(f'{self.seed}/{split}/{index}'), len(self.rows[split])
        first = index % 2**20 * B % n               # evaluations count batches from a multiple of 2^20
        at = [*range(first, min(first + B, n))]
        at = [rng.randrange(n) for _ in range(B)] if split == 'train' else at
        none = torch.zeros(len(at), self.size, self.size, dtype=torch.long, device=self.device)
        get = lambda k: self.arrays[f'{split}.{k}'][at].to(self.device) if k in self.has else none
        image, classes, depth = get('image'), get('mask'), get('depth')
        r = Rendering(image / 255, classes.long(), none, depth / 255, self.palette)
        return [self.rows[split][i] for i in at], r, rng

    def corpus(self):
        for row in self.rows['train']:
            yield from (row['caption'], row['plan'], *(w for _, qa in row['qa'] for w in qa))
        yield from (w for words in WORDS.values() for w in words)

    def ask(self, scene, kind, rng):
        return [tuple(qa) for k, qa in scene['qa'] if k == kind]

    def turns(self, scene, Q, rng):
        return [(k, tuple(qa)) for k, qa in rng.sample(scene['qa'], min(Q, len(scene['qa'])))]

    def describe(self, scene, style, rng):
        return {'list': scene['caption'] * self.captions, 'place': scene['plan']}.get(style)

def open_world(folder, size, seed, device, text=None, skip_bad=False) -> World:
    """The procedural world, or the folder of real pictures that is named."""
    how = size, seed, device, text
    return Folder(folder, *how, skip_bad) if folder else World(*how)
