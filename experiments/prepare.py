"""Official downloads -> the folder that `python train.py --data` reads (see folder.py).

    python -m experiments.prepare pets DOWNLOADS OUT    Oxford-IIIT Pet: photographs, trimaps, 37 breeds
    python -m experiments.prepare coco DOWNLOADS OUT    COCO 2017 (or its format): objects, captions

Neither downloads anything: `-h` of each says what to fetch and from where. Captions and questions are
made by rule from the annotations; the same --seed gives the same text. Pictures are kept whole up to
--side pixels.
"""
import argparse
import json
import random
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw

import data
from data import UserError

SPLITS = ('train', 'validation', 'test')
PETS = """Fetch images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/
into one folder (DOWNLOADS). Licence of the annotations: CC BY-SA 4.0; the photographs belong to their
authors. Cite Parkhi, Vedaldi, Zisserman, Jawahar: Cats and Dogs, CVPR 2012. The official test split
stays; a tenth of trainval is held out as validation. Masks: pet and background, the border of the trimap
is ignored (255)."""
COCO = """Fetch annotations_trainval2017.zip and val2017.zip (5,000 pictures; train2017.zip for all) from
https://cocodataset.org/#download and unpack them into DOWNLOADS: instances_*.json, captions_*.json (if
there) and a folder of pictures, at any depth. Annotations: CC BY 4.0; the pictures are Flickr's, each
under its own licence. Cite Lin et al.: Microsoft COCO, ECCV 2014. Any export in this format should do.
The split is that of the path of the file (train, val, test); one that no file is for gets every tenth
training picture; annotations without pictures are left out with a line."""

class Writer:
    """Writes OUT/{split}/images, masks and metadata.jsonl; the folder appears only when complete."""

    def __init__(self, out: Path, side: int, classes: list):
        if out.exists():
            raise UserError(f'{out} is there already: name a new folder')
        if len(classes) > 255:
            raise UserError(f'{len(classes)} classes: an indexed mask holds 255; name fewer with '
                            '--classes')
        self.out, self.part, self.side = out, out.with_name(out.name + '.part'), side
        self.count, self.boxes = Counter(), 0          # pictures by split; boxes that stand for masks
        shutil.rmtree(self.part, ignore_errors=True)
        for split in SPLITS:
            (self.part / split / 'images').mkdir(parents=True)
            (self.part / split / 'masks').mkdir()
        self.files = {split: open(self.part / split / 'metadata.jsonl', 'w', encoding='utf-8')
                      for split in SPLITS}
        (self.part / 'classes.json').write_text(json.dumps({'mask_classes': classes}))

    def row(self, split: str, image, mask, objects=(), **said):
        """image, mask: PIL, of one size; boxes [x0, y0, x1, y1) of objects in its pixels."""
        scale = min(1, self.side / max(image.size))
        size = tuple(max(1, round(v * scale)) for v in image.size)
        name = f'{self.count[split]:06d}.png'
        image.convert('RGB').resize(size, Image.BOX).save(self.part / split / 'images' / name)
        mask.resize(size, Image.NEAREST).save(self.part / split / 'masks' / name)
        objects = [{'name': n, 'bbox': [round(v * scale, 1) for v in box]} for n, box in objects]
        row = {'file_name': f'images/{name}', 'mask': f'masks/{name}', **said, 'objects': objects}
        self.files[split].write(json.dumps(row) + '\n')
        self.count[split] += 1

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for f in self.files.values():
            f.close()
        empty = [split for split in SPLITS if not self.count[split]]
        if kind or empty:
            shutil.rmtree(self.part, ignore_errors=True)
        if kind:
            return
        if empty:
            raise UserError(f'no pictures for {empty[0]}: {dict(self.count)}; is the download complete?')
        self.part.rename(self.out)
        if self.boxes:
            print(f'{self.boxes} objects have no polygon: their boxes stand for their masks')
        print(f'wrote {self.out}: ' + ', '.join(f'{self.count[split]} {split}' for split in SPLITS))

def plural(name: str) -> str:
    return name + ('es' if name.endswith(('s', 'x', 'ch', 'sh')) else 's')

def third(low: float, high: float, whole: float, names=('left', 'center', 'right')) -> str:
    """Where the middle of low..high lies in 0..whole."""
    return names[min(2, int(1.5 * (low + high) / whole))]

def yes_no(thing: str, answer: bool):
    return {'question': f'Is there a {thing} in the picture?', 'answer': ('no', 'yes')[answer],
            'type': 'exist'}

# ---- Oxford-IIIT Pet ----
def unpacked(folder: Path, name: str, tmp: Path) -> Path:
    """folder/name, a directory, or unpacked from folder/name.tar.gz."""
    if (folder / name).is_dir():
        return folder / name
    path = folder / f'{name}.tar.gz'
    if not path.is_file():
        raise UserError(f'there is neither {folder / name}/ nor {path.name}: see -h for where to get it')
    with tarfile.open(path) as tar:
        tar.extractall(tmp, filter='data')             # refuses paths and links that lead out
    return tmp / name

def pets(a):
    tmp = a.out.with_name(a.out.name + '.unpacked')
    try:
        images, notes = (unpacked(a.downloads, name, tmp) for name in ('images', 'annotations'))
        official = {name: [line.split() for line in (notes / f'{name}.txt').read_text().splitlines()
                           if line.strip() and line[0] != '#'] for name in ('trainval', 'test')}
        rng = random.Random(a.seed)
        rng.shuffle(official['trainval']), rng.shuffle(official['test'])       # they are sorted by breed
        held = len(official['trainval']) // 10
        rows = {'train': official['trainval'][held:], 'validation': official['trainval'][:held],
                'test': official['test']}
        breeds = sorted({breed_of(row) for split in rows.values() for row in split})
        with Writer(a.out, a.side, ['background', 'pet']) as writer:
            for split in SPLITS:
                for row in rows[split][:a.limit or None]:
                    # 1 pet, 2 ground, 3 border
                    trimap = np.array(Image.open(notes / 'trimaps' / f'{row[0]}.png'))
                    mask = np.choose(np.clip(trimap, 1, 3) - 1, [1, 0, 255]).astype(np.uint8)
                    image = Image.open(images / f'{row[0]}.jpg')
                    if image.size != mask.shape[::-1]:
                        raise UserError(f'{row[0]}: picture {image.size}, trimap {mask.shape[::-1]}: '
                                        'download it again')
                    writer.row(split, image, Image.fromarray(mask), **pet(row, mask, breeds, rng))
    finally:
        shutil.rmtree(tmp, ignore_errors=True)

def breed_of(row):
    """'Abyssinian_100 1 1 1': file, class, species (1 cat, 2 dog), breed in it -> (species, breed)."""
    return ('cat', 'dog')[int(row[2]) - 1], row[0].rsplit('_', 1)[0].replace('_', ' ').lower()

def pet(row, mask, breeds, rng) -> dict:
    """Caption, questions and the one object of a photograph."""
    species, breed = breed_of(row)
    other = rng.choice([b for s, b in breeds if s == species and b != breed] or [breed])
    y, x = np.nonzero(mask == 1)
    qa = [{'question': 'Is this a cat or a dog?', 'answer': species, 'type': 'species'},
          {'question': f'What breed is the {species}?', 'answer': breed, 'type': 'breed'},
          yes_no(asked := rng.choice(('cat', 'dog')), asked == species)]
    names = rng.sample([breed, other], 2)
    qa.append({'question': f'Is the {species} a {names[0]} or a {names[1]}?', 'answer': breed,
               'type': 'breed_choice'})
    if not len(x):                                     # a few trimaps are all border
        return {'caption': f'a {breed} {species}', 'qa': qa}
    place, share = third(x.min(), x.max(), mask.shape[1]), (mask == 1).mean()
    size = 'small' if share < .2 else 'large' if share > .45 else 'medium'
    qa += [{'question': f'Where is the {species}?', 'answer': place, 'type': 'position'},
           {'question': f'How large is the {species} in the picture?', 'answer': size, 'type': 'size'}]
    box = [int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
    return {'caption': f"a {size} {breed} {species} {'in' if place == 'center' else 'on'} the {place}",
            'qa': qa, 'objects': [(f'{breed} {species}', box)]}

# ---- COCO ----
def coco(a):
    names, files, said, pictures = {}, [], defaultdict(list), defaultdict(list)
    for p in a.downloads.rglob('*'):
        if p.suffix.lower() in ('.jpg', '.jpeg', '.png'):
            pictures[p.name].append(p)
    for f in sorted(a.downloads.rglob('*.json')):
        if 'person_keypoints' in f.name:             # large, beside the instances in the official zip
            continue
        d = read_json(f)
        if 'caption' in f.name:
            for note in d['annotations']:
                said[note['image_id']].append(' '.join(note['caption'].lower().strip(' .\n').split()))
        elif 'categories' in d and ('instances' in f.name or 'images' in d):
            names |= {c['id']: c['name'].lower() for c in d['categories']}
            files.append((f, d))
    if not files:
        raise UserError(f'no instances_*.json under {a.downloads}: see -h for where to get it')
    files = [(f, split_of(f.relative_to(a.downloads)), d, found) for f, d in files
             if (found := located(f, d['images'], a.downloads, pictures))]
    if not files:
        raise UserError(f'no pictures of these annotations under {a.downloads}: '
                        'see -h for where to get them')
    count = Counter(names.get(n['category_id']) for _, _, d, _ in files for n in d['annotations'])
    kept = a.classes.split(',') if a.classes else [name for name, _ in count.most_common() if name]
    if unknown := [k for k in kept if k not in names.values()]:
        raise UserError(f'--classes names {unknown[0]!r}; there are: '
                        f'{", ".join(sorted(names.values())):.300}')
    there, rng = {split for _, split, _, _ in files}, random.Random(a.seed)
    with Writer(a.out, a.side, ['background', *kept]) as writer:
        for f, split, d, found in files:
            notes = defaultdict(list)
            for n in d['annotations']:
                if names.get(n['category_id']) in kept:
                    notes[n['image_id']].append(n)
            for k, im in enumerate(sorted((im for im in d['images'] if im['id'] in found),
                                          key=lambda im: im['id'])):
                goes = dealt(split, k, there)
                if not notes[im['id']] or a.limit and writer.count[goes] >= a.limit:
                    continue
                try:
                    write_coco(writer, goes, found[im['id']], im, notes[im['id']], names, kept,
                               said[im['id']], rng)
                except (LookupError, TypeError, ValueError) as e:
                    raise UserError(f"{f}: annotations of picture {im['id']} ({im['file_name']}): "
                                    f"{e!r:.100}")

def split_of(path: Path) -> str:
    """The split that the name or the folder of a file of annotations tells, else train."""
    return next((s for s in SPLITS for part in reversed(path.parts)
                 if s[:5 if s == 'train' else 3] in part.lower()), 'train')

def dealt(split: str, k: int, there: set) -> str:
    """Splits that no file is for get every tenth picture of the training file, or of the only file."""
    lacking = ['validation', 'test'] if len(there) == 1 else [s for s in SPLITS if s not in there]
    return dict(zip((9, 8), lacking)).get(k % 10, 'train') if split == 'train' or len(there) == 1 \
        else split

def located(f: Path, images: list, root: Path, pictures: dict) -> dict:
    """{id: path} of the pictures of a file of annotations that are there: by their path from the file's
    folder, else by the only picture under root whose path ends so (or, of several, in a folder of that
    split). pictures: {name: paths under root}."""
    found, split = {}, split_of(f.relative_to(root))
    for im in images:
        tail = PurePosixPath(im['file_name'])
        named = pictures[tail.name]
        paths = [p for p in named if p.parts[-len(tail.parts):] == tail.parts] or named
        if (f.parent / tail).is_file():
            paths = [f.parent / tail]
        elif len(paths) > 1:
            paths = [p for p in paths if split_of(p.relative_to(root).parent / 'x') == split]
        if len(paths) > 1:
            raise UserError(f"{f}: {im['file_name']} may be {paths[0]} or {paths[1]}: rename one")
        if paths:
            found[im['id']] = paths[0]
    if len(found) < len(images):
        print(f'{f}: {len(images) - len(found)} of {len(images)} pictures are not there and left out')
    return found

def read_json(path: Path) -> dict:
    try:
        d = json.loads(path.read_text('utf-8'))
        if type(d) is not dict:
            raise ValueError('not an object')
        return d
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is not whole JSON of COCO ({e}): download it again')

def write_coco(writer, split, path, im, notes, names, kept, captions, rng):
    """One picture: objects are painted from the largest to the smallest, crowds are ignored (255)."""
    image = Image.open(path)
    if image.size != (im.get('width', image.width), im.get('height', image.height)):
        raise ValueError(f"the picture is {image.size}, annotated as {im['width'], im['height']}")
    mask, found = Image.new('L', image.size), []
    paint = ImageDraw.Draw(mask)
    for n in sorted(notes, key=lambda n: -n['bbox'][2] * n['bbox'][3]):
        ink, (x, y, w, h) = 1 + kept.index(names[n['category_id']]), n['bbox']
        if n.get('iscrowd'):
            paint.rectangle((x, y, x + w, y + h), 255)
            continue
        shape = n.get('segmentation')
        if isinstance(shape, list) and shape:
            for ring in shape:
                paint.polygon([round(v) for v in ring], ink)
        elif shape and isinstance(shape['counts'], list):      # run lengths down the columns, 0 first
            runs = np.repeat(np.arange(len(shape['counts'])) % 2, shape['counts'])
            inside = runs.reshape(shape['size'][::-1]).T.astype(np.uint8) * 255
            mask.paste(ink, (0, 0), Image.fromarray(inside))
        else:                                                  # compressed runs or none: the box
            paint.rectangle((x, y, x + w, y + h), ink)
            writer.boxes += 1
        if w > 0 and h > 0:
            found.append((names[n['category_id']], [max(0, x), max(0, y), min(image.width, x + w),
                                                    min(image.height, y + h)]))
    writer.row(split, image, mask, found, caption=next(filter(None, captions), listed(found)),
               qa=asked(found, kept, image.size, rng, any(n.get('iscrowd') for n in notes)))

def listed(found) -> str:
    """'a dog, a car and two persons': the five largest kinds."""
    many = list(Counter(name for name, _ in found).items())[:5]
    words = [f'a {name}' if k == 1 else f'{data.NUMBERS[k] if k < 5 else "many"} {plural(name)}'
             for name, k in many]
    return ' and '.join(', '.join(words).rsplit(', ', 1))

def asked(found, kept, size, rng, crowd: bool) -> list:
    """Existence (one yes, one no), counting up to four, where things are, relation and size of pairs."""
    count, qa = Counter(name for name, _ in found), []
    if found:
        qa.append(yes_no(rng.choice(sorted(count)), True))
    if absent := sorted(set(kept) - set(count)):
        qa += [yes_no(rng.choice(absent), False)] * (not crowd)
    alone = {name: box for name, box in found if count[name] == 1}
    for name in rng.sample(sorted(count), min(2, len(count))):
        if count[name] <= 4 and not crowd:
            qa.append({'question': f'How many {plural(name)} are there?', 'answer': str(count[name]),
                       'type': 'count'})
    for name in rng.sample(sorted(alone), min(1, len(alone))):
        x0, _, x1, _ = alone[name]
        qa.append({'question': f'Where is the {name}?', 'answer': third(x0, x1, size[0]),
                   'type': 'position'})
    if len(alone) > 1:
        (a, p), (b, q) = ((name, alone[name]) for name in rng.sample(sorted(alone), 2))
        if p[2] <= q[0] or q[2] <= p[0]:               # boxes side by side
            qa.append({'question': f'Is the {a} to the left or right of the {b}?',
                       'answer': 'left' if p[2] <= q[0] else 'right', 'type': 'relation'})
        area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (p, q)]
        if max(area) > 1.8 * min(area):
            qa.append({'question': f'Which is larger in the picture, the {a} or the {b}?',
                       'answer': a if area[0] > area[1] else b, 'type': 'larger'})
    return qa

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sub = p.add_subparsers(dest='set', required=True, metavar='SET')
    for name, run, text in (('pets', pets, PETS), ('coco', coco, COCO)):
        q = sub.add_parser(name, description=text, formatter_class=raw, allow_abbrev=False)
        q.add_argument('downloads', type=Path, help='folder with the official files')
        q.add_argument('out', type=Path, help='folder to write; it must not exist')
        q.add_argument('--side', type=int, default=128,
                       help='longest side of the pictures written (default 128)')
        q.add_argument('--limit', type=int, default=0, help='pictures a split at most (default: all)')
        q.add_argument('--seed', type=int, default=0, help='of splits and questions (default 0)')
        if name == 'coco':
            q.add_argument('--classes', default='', help='comma-separated; default: all, at most 254')
        q.set_defaults(run=run)
    a = p.parse_args(argv)
    if not a.downloads.is_dir():
        raise UserError(f'there is no folder {a.downloads}')
    if a.side < 16 or a.limit < 0:
        raise UserError(f'--side is {a.side}, --limit {a.limit}: 16 pixels or more, no negatives')
    a.run(a)

if __name__ == '__main__':
    data.guard(main)
