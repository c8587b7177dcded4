"""COCO (Lin et al. 2014), or an export in its format, from the official files: objects, captions.

    python -m experiments.prepare coco DOWNLOADS OUT
"""
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import UserError
from experiments.writer import SPLITS, Bad, Writer, listed, questions_about
from folder import upright

HELP = """Fetch annotations_trainval2017.zip and val2017.zip (5,000 pictures; train2017.zip for all) from
https://cocodataset.org/#download and unpack them into DOWNLOADS: instances_*.json, captions_*.json (if
there) and a folder of pictures, at any depth. Annotations: CC BY 4.0; the pictures are Flickr's, each
under its own licence. Cite Lin et al.: Microsoft COCO, ECCV 2014. Any export in this format should do.
The split is that of the file's name, or of the nearest folder that tells one (train, val, test); one
that no file is for gets every tenth training picture; annotations without pictures are left out with a
line. Pictures without objects stay. Compressed run lengths need requirements-prepare.txt."""


# ---- COCO: which files there are, and which split each belongs to ----
# Nothing is taken for granted: exports of other programs have other JSON beside, ids as texts, no boxes.
class Notes(NamedTuple):
    """A file of annotations."""
    path: Path
    split: str | None          # as its name or folder tells
    pictures: dict             # {id: (its entry in `images`, the path of the picture that is there)}
    categories: dict           # {id: name}
    objects: dict              # {id of a picture: its annotations}
    captions: dict             # {id of a picture: its captions}


def read_json(path: Path, bad: Bad):
    try:
        return json.loads(path.read_text('utf-8-sig'))
    except (ValueError, RecursionError) as e:
        bad.note(f'{path} is not whole JSON ({e}): download it again')
        return None


def kind_of(content) -> str:
    """'instances', 'captions' or '' for JSON of any kind."""
    notes = content.get('annotations') if isinstance(content, dict) else None
    if not isinstance(notes, list):
        return ''
    keys = set()
    for note in notes:
        if isinstance(note, dict):
            keys.update(note)
    if 'caption' in keys:
        return 'captions'
    shapes = keys & {'bbox', 'segmentation'} or not notes      # none at all: pictures without objects
    has_lists = [type(content.get(key)) is list for key in ('images', 'categories')]
    return 'instances' if shapes and 'segments_info' not in keys and all(has_lists) else ''


def id_of(entry, key: str) -> str:
    """17, 17.0 and '17' are the same id; ValueError where there is none."""
    if not isinstance(entry, dict):
        raise ValueError(f'{entry!r:.40} is no object with an {key}')
    value = entry.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in (int, str):
        raise ValueError(f"{key} is {value!r:.40} where id is {entry.get('id')!r:.40}")
    return str(value)


def by_id(path: Path, entries: list, key: str, bad: Bad) -> dict:
    """{id: its entries} of a list in a file."""
    found = defaultdict(list)
    for entry in entries:
        try:
            found[id_of(entry, key)].append(entry)
        except ValueError as e:
            bad.note(f'{path}: {e}')
    return found


def in_one_line(caption: str) -> str:
    """In small letters, without its full stop."""
    return ' '.join(caption.lower().strip(' .\n').split())


def read_downloads(root: Path, bad: Bad) -> list[Notes]:
    """All files of annotations under a folder that pictures are there for. Ids mean something in one
    file only, so captions are joined to instances of the same split."""
    found = {'instances': [], 'captions': []}                  # [(path, content)]
    for path in sorted(root.rglob('*.json')):
        content, kind = None, ''
        if 'person_keypoints' not in path.name:                # large, beside the instances in the zip
            content = read_json(path, bad)
            kind = kind_of(content)
        if kind:
            found[kind].append((path, content))
        else:
            print(f'{path} holds neither instances nor captions of COCO and is left out')
    if not found['instances']:
        raise UserError(f'no instances_*.json, with lists of images, annotations and categories, under '
                        f'{root}: see -h for where to get it')
    pictures = pictures_under(root)
    files, owner = [], {}                                      # owner: {picture: file of annotations}
    used = set()                                               # files of captions
    for path, content in found['instances']:
        split = split_of(path.relative_to(root))
        images = by_id(path, content['images'], 'id', bad)
        there = located(path, images, root, pictures, bad)
        for key, (_, picture) in list(there.items()):
            if owner.setdefault(picture, path) != path:
                bad.note(f'{path}: {picture} is annotated in {owner[picture]} too')
                del there[key]
        if there:
            names = {}
            for key, entries in by_id(path, content['categories'], 'id', bad).items():
                names[key] = str(entries[0].get('name', key)).lower()
            objects = by_id(path, content['annotations'], 'image_id', bad)
            check_objects(path, images, objects, bad)
            captions = captions_of(there, split, found['captions'], root, bad, used)
            files.append(Notes(path, split, there, names, objects, captions))
    if not files:
        raise UserError(f'no pictures of these annotations under {root}: see -h for where to get them')
    for path, _ in found['captions']:
        if path not in used:
            print(f'{path}: no caption belongs to a picture that is there (split and ids must be those '
                  'of the instances), all are left out')
    return files


def check_objects(path: Path, images: dict, objects: dict, bad: Bad):
    """Note objects of no picture, and boxes that are no pixels; images, objects: as of by_id()."""
    boxes = []
    for key, annotations in objects.items():
        if key not in images:
            number = annotations[0].get('id')
            bad.note(f'{path}: annotation {number} has image_id {key!r}, which no picture has')
        boxes += [n['bbox'] for n in annotations if n.get('bbox')]
    numbers = [v for box in boxes if isinstance(box, list) for v in box if isinstance(v, (int, float))]
    if numbers and max(numbers) <= 1:
        raise UserError(f'{path}: no box is larger than 1: bbox must be [x, y, width, height] in '
                        'pixels, not in shares of the picture')


def captions_of(there: dict, split, files: list, root: Path, bad: Bad, used: set) -> dict:
    """{id of a picture: its captions} of the files of that split, else of those that tell none; files
    of which there is one are added to `used`."""
    same = [file for file in files if split_of(file[0].relative_to(root)) == split]
    same = same or [file for file in files if split_of(file[0].relative_to(root)) is None]
    said = defaultdict(list)
    for path, content in same:
        theirs = by_id(path, content.get('images') or [], 'id', bad)
        for key, entries in by_id(path, content['annotations'], 'image_id', bad).items():
            if key not in there:
                continue
            names = [PurePosixPath(str(im.get('file_name'))).name for im in theirs[key]]
            if names and there[key][1].name not in names:
                bad.note(f'{path}: picture {key} is {names[0]}, in the instances {there[key][1].name}')
                continue
            for entry in entries:
                if isinstance(entry.get('caption'), str) and in_one_line(entry['caption']):
                    said[key].append(in_one_line(entry['caption']))
                    used.add(path)
                else:
                    bad.note(f'{path}: annotation {entry.get("id")} has no caption')
    return said


SPLIT_WORDS = {
    'train': 'train',
    'training': 'train',
    'val': 'validation',
    'valid': 'validation',
    'validation': 'validation',
    'dev': 'validation',
    'test': 'test',
    'testing': 'test',
}


def split_of(path: Path) -> str | None:
    """The split that the name of a file tells as a whole word, or the nearest folder that tells one."""
    for part in reversed(path.parts):
        for word in re.findall('[a-z]+', part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def dealt(split: str, k: int, there: set) -> str:
    """The split that picture k of a file goes to: splits that no file is for get every tenth picture of
    the training file, or of the only file."""
    alone = len(there) == 1
    if split != 'train' and not alone:
        return split
    lacking = [name for name in SPLITS if name not in there]
    if alone:
        lacking = ['validation', 'test']
    tenths = dict(zip((9, 8), lacking))                        # the last of ten, and the one before
    return tenths.get(k % 10, 'train')


def pictures_under(root: Path) -> dict:
    """{name: paths}."""
    found = defaultdict(list)
    for path in root.rglob('*'):
        if path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'):
            found[path.name].append(path)
    return found


def located(notes: Path, images: dict, root: Path, pictures: dict, bad: Bad) -> dict:
    """{id: (entry, path)} of the pictures of a file of annotations that are there: by their path from
    the file's folder, else by the only picture under root whose path ends so (or, of several, in a
    folder of that split). images: as of by_id(); pictures: {name: paths under root}."""
    found, lacking = {}, 0
    split = split_of(notes.relative_to(root))
    for key, entries in images.items():
        im = entries[0]
        if type(im.get('file_name')) is not str or len(entries) > 1:
            bad.note(f'{notes}: picture {key} has no file_name, or the id is there twice')
            continue
        tail = PurePosixPath(im['file_name'].replace('\\', '/'))       # as Windows writes it
        named = pictures.get(tail.name, [])
        ends = len(tail.parts)
        paths = [path for path in named if path.parts[-ends:] == tail.parts] or named
        beside = notes.parent / tail
        if beside.is_file():
            paths = [beside]
        elif len(paths) > 1:
            paths = [path for path in paths if split_of(path.parent.relative_to(root)) == split]
        if len(paths) > 1:
            a, b, *_ = paths
            bad.note(f"{notes}: {im['file_name']} may be {a} or {b}: rename one")
        elif paths:
            found[key] = im, paths[0]
        else:
            lacking += 1
    if lacking:
        print(f'{notes}: {lacking} of {len(images)} pictures are not there and left out')
    return found


def chosen_classes(a, files: list[Notes]) -> list:
    """Those that were asked for, or all, the most frequent first."""
    count = Counter()
    for notes in files:
        for key in notes.pictures:
            for n in notes.objects.get(key, []):
                count[notes.categories.get(str(n.get('category_id')))] += 1
    if not a.classes:
        return [name for name, _ in count.most_common() if name]
    kept = [name.strip() for name in a.classes.lower().split(',')]
    names = {name for notes in files for name in notes.categories.values()}
    unknown = [name for name in kept if name not in names]
    if unknown:
        known = ', '.join(sorted(names))
        raise UserError(f'--classes names {unknown[0]!r}; there are: {known:.300}')
    return kept


# ---- COCO: one picture after the other ----
def write_folder(a):
    """The command `coco`."""
    files = read_downloads(a.source, a.bad)
    kept = chosen_classes(a, files)
    there = {notes.split or 'train' for notes in files}
    rng = random.Random(a.seed)
    with Writer(a.out, a.side, ['background', *kept]) as writer:
        for notes in files:
            in_order = sorted(notes.pictures, key=lambda key: (len(key), key))       # of numbers
            for k, key in enumerate(in_order):
                goes = dealt(notes.split or 'train', k, there)
                if a.limit and writer.count[goes] >= a.limit:
                    continue
                im, path = notes.pictures[key]
                try:
                    write_coco(writer, goes, notes, key, kept, rng)
                except (UserError, LookupError, TypeError, ValueError, AttributeError) as e:
                    a.bad.note(f'{notes.path}: picture {key} ({path}): {e}')


def write_coco(writer, split: str, notes: Notes, key: str, kept: list, rng):
    """One picture. Objects are painted from the largest to the smallest; the boxes of crowds are ignored
    (255). Of several captions the first one counts."""
    im, path = notes.pictures[key]
    annotations = notes.objects.get(key, [])
    image = upright(path)
    size = (int(im.get('width', image.width)), int(im.get('height', image.height)))
    if image.size != size:
        raise ValueError(f'the upright picture is {image.size}, annotated as {size}')
    shapes = []                                                # (area of box, name, box, layer, crowd)
    for n in annotations:
        try:
            category = id_of(n, 'category_id')
            if category not in notes.categories:
                raise ValueError(f'category_id is {category}: the file has no such category')
            name = notes.categories[category]
            box, layer = shape_of(n, image.size)
        except (LookupError, TypeError, ValueError) as e:
            raise ValueError(f'annotation {n.get("id")}: {e}')
        if name in kept:
            x0, y0, x1, y1 = box
            crowd = n.get('iscrowd') in (1, True, '1')
            shapes.append(((x1 - x0) * (y1 - y0), name, box, layer, crowd))
    if annotations and not shapes:
        writer.others += 1
        return
    mask = Image.new('L', image.size)
    found, crowds = [], []                                     # (name, [x0, y0, x1, y1]); names
    for area, name, box, layer, crowd in sorted(shapes, key=lambda shape: shape[0], reverse=True):
        x0, y0, x1, y1 = [round(v) for v in box]
        filled = x0, y0, max(x0 + 1, x1), max(y0 + 1, y1)      # a pixel at least
        if crowd:
            crowds.append(name)
            mask.paste(255, filled)
            continue
        ink = 1 + kept.index(name)
        if layer is None:
            mask.paste(ink, filled)
            writer.boxes += 1
        else:
            mask.paste(ink, (0, 0), layer)
        if area > 0:
            found.append((name, box))
    told = notes.captions.get(key) or [listed(found, crowds)]
    qa = questions_about(found, kept, image.width, rng, bool(crowds))
    writer.row(split, image, mask, found, caption=told[0], qa=qa)
    if not annotations:
        writer.empty += 1                                      # nothing to see is worth knowing, too


def shape_of(n: dict, size: tuple) -> tuple:
    """-> (box [x0, y0, x1, y1] inside of the picture, what it covers as a picture of 0 and 255 or None)
    of an annotation: its box, or that around its polygons or run lengths."""
    layer = layer_of(n.get('segmentation'), size)
    if n.get('bbox') is None:
        if layer is None or not layer.getbbox():
            raise ValueError('it has neither bbox nor segmentation')
        return list(layer.getbbox()), layer
    width, height = size
    x, y, w, h = [float(v) for v in n['bbox']]
    fits = -2 <= x <= x + w <= 1.05 * width + 2 and -2 <= y <= y + h <= 1.05 * height + 2
    if not fits:
        raise ValueError(f"bbox is {n['bbox']}: it must be [x, y, width, height] in a picture of {size}")
    return [max(0, x), max(0, y), min(width, x + w), min(height, y + h)], layer


def layer_of(shape, size: tuple):
    """What COCO calls a segmentation, polygons or run lengths -> a picture of 0 and 255, or None."""
    if not shape:
        return None
    if isinstance(shape, list):
        if not all(isinstance(ring, list) for ring in shape):
            raise ValueError(f'segmentation is {shape!r:.40}: it must be a list of polygons [x, y, ...]')
        layer = Image.new('L', size)
        paint = ImageDraw.Draw(layer)
        for ring in shape:
            corners = [round(v) for v in ring]
            paint.polygon(corners, 255)
        return layer
    width, height = size
    if [*shape['size']] != [height, width]:
        raise ValueError(f"size of the run lengths is {shape['size']}, the picture {size}")
    lengths = shape['counts']
    if isinstance(lengths, list):                              # down the columns, first of 0, then of 1
        bits = np.arange(len(lengths)) % 2
        runs = np.repeat(bits, lengths).reshape(width, height).T
    else:
        runs = decompressed(shape)
    return Image.fromarray(runs.astype(np.uint8) * 255)


def decompressed(shape: dict):
    """Run lengths as pycocotools packs them into a text -> 0 and 1 [height, width]."""
    try:
        from pycocotools import mask as packed
    except ImportError:
        raise UserError('compressed run lengths: pip install -r experiments/requirements-prepare.txt')
    bits = packed.decode({'size': shape['size'], 'counts': shape['counts'].encode()})
    again = packed.encode(np.asfortranarray(bits))['counts']
    if again.decode() != shape['counts']:                      # too short ones are not noticed there
        raise ValueError(f"counts are {shape['counts']!r:.40}: they do not fill the picture")
    return bits
