"""Oxford-IIIT Pet (Parkhi et al. 2012) from the official files: photographs, trimaps, 37 breeds.

    python -m experiments.prepare pets DOWNLOADS OUT
"""
import random
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data import UserError
from experiments.writer import SPLITS, Writer, question, third, yes_no
from folder import upright

HELP = """Fetch images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/
into one folder (DOWNLOADS). Licence of the annotations: CC BY-SA 4.0; the photographs belong to their
authors. Cite Parkhi, Vedaldi, Zisserman, Jawahar: Cats and Dogs, CVPR 2012. The official test split
stays; a tenth of trainval is held out as validation. Masks: pet and background, the border of the trimap
is ignored (255)."""


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


def write_folder(a):
    """The command `pets`."""
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.out.parent) as tmp:
        images = unpacked(a.source, 'images', Path(tmp))
        notes = unpacked(a.source, 'annotations', Path(tmp))
        write_pets(a, images, notes)


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
