"""Official downloads -> the folder that `python train.py --data` reads (see folder.py).

    python -m experiments.prepare pets DOWNLOADS OUT    Oxford-IIIT Pet: photographs, trimaps, 37 breeds
    python -m experiments.prepare coco DOWNLOADS OUT    COCO 2017 (or its format): objects, captions
    python -m experiments.prepare digits OUT            scenes of MNIST digits (see digits.py)
    python -m experiments.prepare windows FOLDER OUT    parts of a folder's pictures (see windows.py)

None downloads anything: `-h` of each says what to fetch and from where. Captions and questions are made
by rule from the annotations; the same --seed gives the same text. Pictures are kept whole up to --side
pixels.
"""
import argparse
import contextlib
import json
import random
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import data
from data import UserError
from experiments import digits, windows
from folder import upright

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
DIGITS = """Coloured handwritten digits on textured ground, with exact masks. Nothing is fetched: 5,000
digits of MNIST lie in a package, pip install -r experiments/requirements-data.txt. Cite LeCun, Bottou,
Bengio, Haffner: Gradient-based learning applied to document recognition, 1998."""


class Writer:
    """Writes OUT/{split}/images, masks and metadata.jsonl; the folder appears only when complete."""

    def __init__(self, out: Path, side: int, classes: list, skip_bad=False):
        if out.exists():
            raise UserError(f'{out} is there already: name a new folder')
        if len(classes) > 255:
            raise UserError(f'{len(classes)} classes: an indexed mask holds 255; name fewer with '
                            '--classes')
        self.out = out
        self.part = out.with_name(out.name + '.part')          # until it is complete
        self.side = side
        self.skip_bad = skip_bad
        self.bad = []                                          # messages about what was left out
        self.count = Counter()                                 # pictures by split
        self.empty = 0                                         # pictures without objects
        self.boxes = 0                                         # how many stand for masks
        shutil.rmtree(self.part, ignore_errors=True)
        self.files = {}
        for split in SPLITS:
            folder = self.part / split
            (folder / 'images').mkdir(parents=True)
            (folder / 'masks').mkdir()
            self.files[split] = open(folder / 'metadata.jsonl', 'w', encoding='utf-8')
        text = json.dumps({'mask_classes': classes})
        (self.part / 'classes.json').write_text(text)

    def row(self, split: str, image, mask, objects=(), **said):
        """image, mask: PIL, of one size; objects: (name, box [x0, y0, x1, y1) in its pixels)."""
        scale = min(1, self.side / max(image.size))
        size = tuple(max(1, round(v * scale)) for v in image.size)
        folder = self.part / split
        name = f'{self.count[split]:06d}.png'
        small = image.convert('RGB').resize(size, Image.BOX)
        small.save(folder / 'images' / name)
        small_mask = mask.resize(size, Image.NEAREST)
        small_mask.save(folder / 'masks' / name)
        found = []
        for what, box in objects:
            box = [round(v * scale, 1) for v in box]
            found.append({'name': what, 'bbox': box})
        row = {'file_name': f'images/{name}', 'mask': f'masks/{name}', **said, 'objects': found}
        self.files[split].write(json.dumps(row) + '\n')
        self.count[split] += 1

    @contextlib.contextmanager
    def skipping(self, what: str):
        """with writer.skipping(what): a picture in which something is wrong is UserError with its name,
        or left out and counted."""
        try:
            yield
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as e:
            message = f'{what}: {e}' if isinstance(e, (UserError, ValueError)) else f'{what}: {e!r:.100}'
            self.bad.append(message)
            if not self.skip_bad:
                raise UserError(f'{message}. Mend it, or leave it out: --skip-bad')

    def scenes(self, rows):
        """All of (split, picture, mask, [(name, box)], caption, [(type, question, answer)])."""
        for split, image, mask, objects, caption, asked_of_it in rows:
            qa = [question(*words) for words in asked_of_it]
            self.row(split, image, mask, objects, caption=caption, qa=qa)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for file in self.files.values():
            file.close()
        empty = [split for split in SPLITS if not self.count[split]]
        if kind or empty:
            shutil.rmtree(self.part, ignore_errors=True)
        if kind:
            return
        if empty:
            raise UserError(f'no pictures for {empty[0]}: {dict(self.count)}; is the download complete?')
        self.part.rename(self.out)
        if self.bad:
            print(f'left out {len(self.bad)} bad pictures, the first: {self.bad[0]}')
        if self.boxes:
            print(f'{self.boxes} objects have no polygon: their boxes stand for their masks')
        if self.empty:
            print(f'{self.empty} pictures hold none of the classes: all background')
        counts = [f'{self.count[split]} {split}' for split in SPLITS]
        print(f'wrote {self.out}: ' + ', '.join(counts))


# ---- words ----
def plural(name: str) -> str:
    if name.endswith(('s', 'x', 'ch', 'sh')):
        return name + 'es'
    return name + 's'


def third(low: float, high: float, whole: float) -> str:
    """Where the middle of low..high, (low + high) / 2, lies in 0..whole."""
    k = int(1.5 * (low + high) / whole)
    return ('left', 'center', 'right')[min(2, k)]


def question(kind: str, text: str, answer: str) -> dict:
    """As it stands in metadata.jsonl."""
    return {'question': text, 'answer': answer, 'type': kind}


def yes_no(thing: str, there: bool) -> dict:
    answer = 'yes' if there else 'no'
    return question('exist', f'Is there a {thing} in the picture?', answer)


# ---- Oxford-IIIT Pet ----
def unpacked(folder: Path, name: str, tmp: Path) -> Path:
    """folder/name, a directory, or unpacked from folder/name.tar.gz."""
    if (folder / name).is_dir():
        return folder / name
    path = folder / f'{name}.tar.gz'
    if not path.is_file():
        raise UserError(f'there is neither {folder / name}/ nor {path.name}: see -h for where to get it')
    with tarfile.open(path) as tar:
        tar.extractall(tmp, filter='data')                     # refuses paths and links that lead out
    return tmp / name


class Pet(NamedTuple):
    """A line of trainval.txt, such as 'Abyssinian_100 1 1 1': file, class, species, breed in it."""
    file: str
    species: str               # cat or dog
    breed: str


def pets_in(path: Path) -> list[Pet]:
    """Of an official list; lines that begin with # are comments."""
    found = []
    for line in path.read_text().splitlines():
        if not line.strip() or line[0] == '#':
            continue
        file, _, number, *_ = line.split()
        species = ('cat', 'dog')[int(number) - 1]
        breed, _ = file.rsplit('_', 1)                         # without the number of the picture
        found.append(Pet(file, species, breed.replace('_', ' ').lower()))
    return found


def pets(a):
    """The command `pets`."""
    tmp = a.out.with_name(a.out.name + '.unpacked')
    try:
        images = unpacked(a.downloads, 'images', tmp)
        notes = unpacked(a.downloads, 'annotations', tmp)
        write_pets(a, images, notes)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_pets(a, images: Path, notes: Path):
    """From the unpacked folders."""
    rng = random.Random(a.seed)
    trainval = pets_in(notes / 'trainval.txt')
    test = pets_in(notes / 'test.txt')
    rng.shuffle(trainval)                                      # they are sorted by breed
    rng.shuffle(test)
    held = len(trainval) // 10
    rows = {'train': trainval[held:], 'validation': trainval[:held], 'test': test}
    breeds = sorted({(pet.species, pet.breed) for pet in trainval + test})
    with Writer(a.out, a.side, ['background', 'pet'], a.skip_bad) as writer:
        for split in SPLITS:
            for pet in rows[split][:a.limit or None]:
                with writer.skipping(pet.file):
                    mask = pet_mask(notes / 'trimaps' / f'{pet.file}.png')
                    image = upright(images / f'{pet.file}.jpg')
                    height, width = mask.shape
                    if image.size != (width, height):
                        raise ValueError(f'picture {image.size}, trimap {(width, height)}: download '
                                         'it again')
                    said = said_of_pet(pet, mask, breeds, rng)
                    writer.row(split, image, Image.fromarray(mask), **said)


def pet_mask(path: Path):
    """A trimap (1 pet, 2 ground, 3 border) -> classes: 1 pet, 0 background, 255 ignored."""
    try:
        trimap = np.array(Image.open(path))
    except OSError as e:
        raise ValueError(f'cannot read {path} ({e})')
    kinds = np.clip(trimap, 1, 3) - 1
    return np.choose(kinds, [1, 0, 255]).astype(np.uint8)


def said_of_pet(pet: Pet, mask, breeds: list, rng) -> dict:
    """Caption, questions and the one object of a photograph; breeds: all (species, breed)."""
    species, breed = pet.species, pet.breed
    others = [name for kind, name in breeds if kind == species and name != breed]
    other = rng.choice(others or [breed])
    asked = rng.choice(('cat', 'dog'))
    a, b = rng.sample([breed, other], 2)
    qa = [
        question('species', 'Is this a cat or a dog?', species),
        question('breed', f'What breed is the {species}?', breed),
        yes_no(asked, asked == species),
        question('breed_choice', f'Is the {species} a {a} or a {b}?', breed),
    ]
    y, x = np.nonzero(mask == 1)
    if len(x) == 0:                                            # a few trimaps are all border
        return {'caption': f'a {breed} {species}', 'qa': qa}
    height, width = mask.shape
    place = third(x.min(), x.max(), width)
    where = f'in the {place}' if place == 'center' else f'on the {place}'
    size = size_word(len(x) / (height * width))
    qa.append(question('position', f'Where is the {species}?', place))
    qa.append(question('size', f'How large is the {species} in the picture?', size))
    box = [int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
    caption = f'a {size} {breed} {species} {where}'
    return {'caption': caption, 'qa': qa, 'objects': [(f'{breed} {species}', box)]}


def size_word(share: float) -> str:
    """Of something that covers this share of the picture."""
    if share < .2:
        return 'small'
    return 'large' if share > .45 else 'medium'


# ---- COCO: which files there are, and which split each belongs to ----
class Notes(NamedTuple):
    """A file of annotations."""
    path: Path
    split: str
    content: dict
    pictures: dict             # {id as text: path} of those that are there
    names: dict                # {category as text: name}


def read_json(path: Path) -> dict:
    """What a file holds; {} if that is no object. UserError if it is not whole."""
    try:
        content = json.loads(path.read_text('utf-8-sig'))
        return content if type(content) is dict else {}
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is not whole JSON of COCO ({e}): download it again')


def in_one_line(caption: str) -> str:
    """In small letters, without its full stop."""
    return ' '.join(caption.lower().strip(' .\n').split())


def holds(content: dict, lists: str, keys: str) -> bool:
    """Are there lists of these names, and an annotation with all of these keys? Files are known by what
    is in them: test sets and panoptic maps have names like the others."""
    for name in lists.split():
        if type(content.get(name)) is not list:
            return False
    wanted = set(keys.split())
    return any(type(note) is dict and wanted <= set(note) for note in content['annotations'])


def read_downloads(root: Path):
    """All files of annotations under a folder -> ([(path, content)] of objects, {(split, name of a
    picture): captions}). Captions are joined by the picture's file, as numbers may begin again."""
    files, said = [], defaultdict(list)
    for path in sorted(root.rglob('*.json')):
        if 'person_keypoints' in path.name:                    # large, beside the instances in the zip
            continue
        content = read_json(path)
        if holds(content, 'images annotations categories', 'image_id category_id'):
            files.append((path, content))
        elif holds(content, 'annotations', 'image_id caption'):
            split = split_of(path.relative_to(root))
            add_captions(said, split, path, content)
        else:
            print(f'{path} holds neither instances nor captions of COCO and is left out')
    if not files:
        raise UserError(f'no instances_*.json under {root}: see -h for where to get it')
    return files, said


def add_captions(said: dict, split: str, path: Path, content: dict):
    """Of one file, under the names of its pictures, or their numbers where it names none."""
    try:
        name_of = {str(im['id']): im['file_name'] for im in content.get('images', [])}
        for note in content['annotations']:
            number = str(note['image_id'])
            name = name_of.get(number, number)
            said[split, name].append(in_one_line(note['caption']))
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f'{path}: a picture or a caption of it lacks a key ({e!r:.60})')


def names_in(path: Path, content: dict) -> dict:
    """{number of a category, as text: its name} of one file: another may number them otherwise."""
    try:
        return {str(c['id']): c['name'].lower() for c in content['categories']}
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f'{path}: a category lacks its id or name ({e!r:.60})')


def split_of(path: Path) -> str:
    """The split that a file's own name tells, else the nearest folder, as a word; else train."""
    for part in reversed(path.parts):
        words = re.split('[^a-z]+', Path(part).stem.lower())
        for split, names in (('train', 'train training'), ('validation', 'val valid validation dev'),
                             ('test', 'test testing')):
            if set(words) & set(names.split()):
                return split
    return 'train'


def dealt(split: str, k: int, there: set) -> str:
    """The split that picture k of a file goes to: splits that no file is for get every tenth picture of
    the training file, or of the only file."""
    alone = len(there) == 1
    if split != 'train' and not alone:
        return split
    lacking = [name for name in SPLITS if name not in there]
    if alone:
        lacking = ['validation', 'test']
    tenths = dict(zip((9, 8), lacking))
    return tenths.get(k % 10, 'train')


def pictures_under(root: Path) -> dict:
    """{name: paths}."""
    found = defaultdict(list)
    for path in root.rglob('*'):
        if path.suffix.lower() in ('.jpg', '.jpeg', '.png'):
            found[path.name].append(path)
    return found


def located(notes: Path, images: list, root: Path, pictures: dict) -> dict:
    """{id: path} of the pictures of a file of annotations that are there: by their path from the file's
    folder, else by the only picture under root whose path ends so (or, of several, in a folder of that
    split). pictures: {name: paths under root}."""
    found = {}
    split = split_of(notes.relative_to(root))
    for im in images:
        tail = PurePosixPath(im['file_name'].replace('\\', '/'))         # as Windows writes it
        named = pictures[tail.name]
        ends = len(tail.parts)
        paths = [path for path in named if path.parts[-ends:] == tail.parts] or named
        beside = notes.parent / tail
        if beside.is_file():
            paths = [beside]
        elif len(paths) > 1:
            paths = [path for path in paths if split_of(path.parent.relative_to(root) / 'x') == split]
        if len(paths) > 1:
            a, b, *_ = paths
            raise UserError(f"{notes}: {im['file_name']} may be {a} or {b}: rename one")
        if paths:
            found[str(im['id'])] = paths[0]
    lacking = len(images) - len(found)
    if lacking:
        print(f'{notes}: {lacking} of {len(images)} pictures are not there and left out')
    return found


def chosen_classes(a, files: list[Notes]) -> list:
    """Those that were asked for, or all, the most frequent first."""
    if not a.classes:
        count = Counter()
        for notes in files:
            for n in notes.content['annotations']:
                count[notes.names.get(str(n.get('category_id')))] += 1
        return [name for name, _ in count.most_common() if name]
    kept = a.classes.split(',')
    there = {name for notes in files for name in notes.names.values()}
    unknown = [name for name in kept if name not in there]
    if unknown:
        known = ', '.join(sorted(there))
        raise UserError(f'--classes names {unknown[0]!r}; there are: {known:.300}')
    return kept


# ---- COCO: one picture after the other ----
def coco(a):
    """The command `coco`."""
    contents, said = read_downloads(a.downloads)
    pictures = pictures_under(a.downloads)
    files = []
    for path, content in contents:
        try:
            for n in content['annotations']:
                n['image_id'] = str(n['image_id'])             # some write them as texts
            found = located(path, content['images'], a.downloads, pictures)
        except (LookupError, TypeError, AttributeError) as e:
            raise UserError(f'{path}: a picture or an annotation lacks an id or file_name ({e!r:.60})')
        if found:
            split = split_of(path.relative_to(a.downloads))
            files.append(Notes(path, split, content, found, names_in(path, content)))
    if not files:
        raise UserError(f'no pictures of these annotations under {a.downloads}: '
                        'see -h for where to get them')
    kept = chosen_classes(a, files)
    there = {notes.split for notes in files}
    rng = random.Random(a.seed)
    with Writer(a.out, a.side, ['background', *kept], a.skip_bad) as writer:
        for notes in files:
            write_file(a, writer, notes, kept, there, said, rng)


def write_file(a, writer, notes: Notes, kept: list, there: set, said: dict, rng):
    """The pictures of one file of annotations; there: the splits that files are for."""
    objects = objects_in(notes, kept)
    images = [im for im in notes.content['images'] if str(im['id']) in notes.pictures]
    images.sort(key=lambda im: (len(str(im['id'])), str(im['id'])))        # numbers by size
    for k, im in enumerate(images):
        key = str(im['id'])
        goes = dealt(notes.split, k, there)
        if a.limit and writer.count[goes] >= a.limit:
            continue
        if not objects[key]:
            writer.empty += 1                                  # nothing to see is worth knowing, too
        with writer.skipping(f"{notes.path}: annotations of picture {key} ({im['file_name']})"):
            captions = said[notes.split, im['file_name']] or said[notes.split, key]
            write_coco(writer, goes, notes.pictures[key], im, objects[key], kept, captions, rng)


def objects_in(notes: Notes, kept: list) -> dict:
    """{id of a picture: [(name of the class, annotation)]}."""
    found = defaultdict(list)
    for n in notes.content['annotations']:
        name = notes.names.get(str(n.get('category_id')))
        if name in kept or not name:                           # write_coco() tells what is wrong
            found[n['image_id']].append((name, n))
    return found


def boxed(name, n: dict) -> dict:
    """An annotation with its box, from the corners of its polygons where there is none."""
    if not name:
        raise ValueError(f"annotation {n.get('id')} has category {n.get('category_id')!r}, which the "
                         "file's categories do not name")
    rings = n.get('segmentation')
    if n.get('bbox') or type(rings) is not list or not rings:
        return n
    corners = [float(v) for ring in rings for v in ring]
    left, top = min(corners[::2]), min(corners[1::2])
    box = [left, top, max(corners[::2]) - left, max(corners[1::2]) - top]
    return n | {'bbox': box}


def write_coco(writer, split, path, im, objects, kept, captions, rng):
    """One picture. Objects are painted from the largest to the smallest; crowds are ignored (255)."""
    image = upright(path)
    width, height = image.size
    if image.size != (im.get('width', width), im.get('height', height)):
        raise ValueError(f"the picture is {image.size}, annotated as {im['width'], im['height']}")
    objects = [(name, boxed(name, n)) for name, n in objects]
    mask = Image.new('L', image.size)
    found, crowd = [], False                                   # found: (name, [x0, y0, x1, y1])
    for name, n in sorted(objects, key=area_of_box, reverse=True):
        x, y, w, h = n['bbox']
        if n.get('iscrowd'):
            crowd = True
            ImageDraw.Draw(mask).rectangle((x, y, x + w, y + h), 255)
            continue
        ink = 1 + kept.index(name)
        if not painted(mask, n.get('segmentation'), ink):      # compressed or none: the box
            ImageDraw.Draw(mask).rectangle((x, y, x + w, y + h), ink)
            writer.boxes += 1
        if w > 0 and h > 0:
            box = [max(0, x), max(0, y), min(width, x + w), min(height, y + h)]
            found.append((name, box))
    told = [caption for caption in captions if caption]
    caption = told[0] if told else listed(found)
    qa = asked(found, kept, width, rng, crowd)
    writer.row(split, image, mask, found, caption=caption, qa=qa)


def area_of_box(named: tuple) -> float:
    """Of (name, annotation)."""
    _, n = named
    return n['bbox'][2] * n['bbox'][3]


def painted(mask, shape, ink: int) -> bool:
    """Paint what COCO calls a segmentation, polygons or run lengths; False: it is neither."""
    if isinstance(shape, list) and shape:
        paint = ImageDraw.Draw(mask)
        for ring in shape:
            corners = [round(v) for v in ring]
            paint.polygon(corners, ink)
        return True
    if not shape:
        return False
    if isinstance(shape['counts'], str):
        bits = decompressed(shape)                                                    # [H,W]
    elif isinstance(shape['counts'], list):                # down the columns, first of 0, then of 1
        lengths = shape['counts']
        values = np.arange(len(lengths)) % 2
        width_and_height = shape['size'][::-1]
        bits = np.repeat(values, lengths).reshape(width_and_height).T                 # [H,W]
    else:
        return False
    inside = Image.fromarray(bits.astype(np.uint8) * 255)
    mask.paste(ink, (0, 0), inside)
    return True


def decompressed(shape: dict):
    """The mask [H, W] of run lengths that COCO wrote as a text."""
    try:
        from pycocotools import mask as rle
    except ImportError:
        raise UserError('compressed run lengths: pip install -r experiments/requirements-prepare.txt')
    return rle.decode(shape)


def listed(found: list) -> str:
    """'a dog, a car and two persons': the five largest kinds."""
    count = Counter(name for name, _ in found)
    words = []
    for name, n in list(count.items())[:5]:
        if n == 1:
            words.append(f'a {name}')
        else:
            number = data.NUMBERS[n] if n < 5 else 'many'
            words.append(f'{number} {plural(name)}')
    return data.and_between(words) if words else 'nothing'


def asked(found: list, kept: list, width: int, rng, crowd: bool) -> list:
    """Existence (one yes, one no), counting up to four, where things are, relation and size of pairs.
    In a crowd nothing is counted, and what was not found may be there."""
    count = Counter(name for name, _ in found)
    there = sorted(count)
    absent = sorted(set(kept) - set(count))
    qa = []
    if found:
        qa.append(yes_no(rng.choice(there), True))
    if absent:
        name = rng.choice(absent)
        if not crowd:
            qa.append(yes_no(name, False))
    for name in rng.sample(there, min(2, len(there))):
        if count[name] <= 4 and not crowd:
            qa.append(question('count', f'How many {plural(name)} are there?', str(count[name])))
    box_of = {name: box for name, box in found if count[name] == 1}
    alone = sorted(box_of)                                     # a name means one object
    if alone:
        name, = rng.sample(alone, 1)
        x0, _, x1, _ = box_of[name]
        qa.append(question('position', f'Where is the {name}?', third(x0, x1, width)))
    if len(alone) > 1:
        a, b = rng.sample(alone, 2)
        qa += compared(a, b, box_of)
    return qa


def compared(a: str, b: str, box_of: dict) -> list:
    """Questions about two objects: which is where, if they are side by side, and which is larger, if
    that is clear."""
    qa = []
    left_of_a, top_of_a, right_of_a, bottom_of_a = box_of[a]
    left_of_b, top_of_b, right_of_b, bottom_of_b = box_of[b]
    if right_of_a <= left_of_b or right_of_b <= left_of_a:
        answer = 'left' if right_of_a <= left_of_b else 'right'
        qa.append(question('relation', f'Is the {a} to the left or right of the {b}?', answer))
    area_of_a = (right_of_a - left_of_a) * (bottom_of_a - top_of_a)
    area_of_b = (right_of_b - left_of_b) * (bottom_of_b - top_of_b)
    if max(area_of_a, area_of_b) > 1.8 * min(area_of_a, area_of_b):
        answer = a if area_of_a > area_of_b else b
        text = f'Which is larger in the picture, the {a} or the {b}?'
        qa.append(question('larger', text, answer))
    return qa


# ---- digits ----
def digit_scenes(a):
    """The command `digits`."""
    if a.limit < 1:
        raise UserError(f'--limit is {a.limit}: 1 scene or more')
    exemplars, labels = digits.mnist()
    names = [str(number) for number in range(10)]
    with Writer(a.out, a.side, ['background', *names]) as writer:
        writer.scenes(digits.scenes(exemplars, labels, a.side, a.limit, a.seed))


# ---- windows of a folder ----
def window_rows(a):
    """The command `windows`."""
    if a.each < 1 or a.classes < 1:
        raise UserError(f'--each is {a.each}, --classes {a.classes}: 1 or more of both')
    grounds = [name for name in a.ground.split(',') if name]
    kept = windows.kept_classes(a.downloads, a.classes, grounds)
    left_out = a.without.split(',')
    with Writer(a.out, a.side, kept.names) as writer:
        rows = windows.asked_windows(a.downloads, kept, a.side, a.each, a.whole, left_out, a.seed)
        writer.scenes(rows)


# ---- command line ----
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
        q.add_argument('--skip-bad', action='store_true',
                       help='leave out pictures in which something is wrong, and count them')
        if name == 'coco':
            q.add_argument('--classes', default='', help='comma-separated; default: all, at most 254')
        q.set_defaults(run=run)
    q = sub.add_parser('digits', description=DIGITS, formatter_class=raw, allow_abbrev=False)
    q.add_argument('out', type=Path, help='folder to write; it must not exist')
    q.add_argument('--side', type=int, default=32, help='side of the pictures in pixels (default 32)')
    q.add_argument('--limit', type=int, default=8000, help='scenes to train on (default 8000)')
    q.add_argument('--seed', type=int, default=0, help='of scenes and questions (default 0)')
    q.set_defaults(run=digit_scenes, downloads=Path('.'))
    q = sub.add_parser('windows', description=windows.__doc__, formatter_class=raw, allow_abbrev=False)
    q.add_argument('downloads', metavar='folder', type=Path, help='one that train.py --data reads')
    q.add_argument('out', type=Path, help='folder to write; it must not exist')
    q.add_argument('--side', type=int, default=32, help='side of what is written (default 32)')
    q.add_argument('--each', type=int, default=2, help='windows a picture at most (default 2)')
    q.add_argument('--whole', action='store_true', help='whole pictures, made smaller')
    q.add_argument('--classes', type=int, default=12, help='that are asked about (default 12)')
    q.add_argument('--ground', default='', help='classes not asked about (default: the first)')
    q.add_argument('--without', default='', help='types of question to leave out')
    q.add_argument('--seed', type=int, default=0, help='of windows and questions (default 0)')
    q.set_defaults(run=window_rows, limit=0)
    a = p.parse_args(argv)
    if not a.downloads.is_dir():
        raise UserError(f'there is no folder {a.downloads}')
    if a.side < 16 or a.limit < 0:
        raise UserError(f'--side is {a.side}, --limit {a.limit}: 16 pixels or more, no negatives')
    a.run(a)


if __name__ == '__main__':
    data.guard(main)
