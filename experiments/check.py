"""What a folder for `python train.py --data` holds:

    python -m experiments.prepare check FOLDER --out check.png

How many pictures there are and of which sizes, how often classes and answers occur, what can be answered
from the words of a question alone, which texts are longest. The picture shows eight rows with their
masks in colour. Bad rows are named (twenty at most) and left out. --learnable: which questions can be
learned at all, see learnable.py; some minutes.
"""
import math
from collections import Counter, defaultdict
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import numpy as np
import torch
from PIL import Image

import eval as evaluation
import sample
from experiments import learnable
from folder import Folder, upright

SIDE = 128                     # of a picture to look at
EACH = 8                       # pictures in a line


def tell(folder: Path, out: str, also_learnable=False):
    """Print all of it, and write the picture."""
    world = Folder(folder, skip_bad=True)
    for message in world.bad[:20]:
        print(f'bad: {message}')
    for split in data.SPLITS:
        tell_of_pictures(world, split)
    if 'classes' in world.annotated:
        tell_of_classes(world)
    if world.kinds:
        tell_of_questions(world)
    tell_of_objects(world)
    tell_of_texts(world)
    canvas = look_at(world)
    with data.written_whole(out) as part:
        canvas.save(part, 'PNG')
    print(f'wrote {out}: do its masks, captions, plans and answers fit the pictures?')
    if also_learnable:
        learnable.print_table(world)


def path_of(world: Folder, row: dict) -> Path:
    """Of the row's picture."""
    meta = world.root / row['at']
    return meta.parent / row['file']


def tell_of_pictures(world: Folder, split: str):
    """How many, and how large."""
    sizes = []
    for row in world.rows[split]:
        with Image.open(path_of(world, row)) as im:    # the header only
            sizes.append(im.size)
    files = {path_of(world, row) for row in world.rows[split]}
    smallest = min(sizes, key=math.prod)
    largest = max(sizes, key=math.prod)
    n, pictures = len(sizes), len(files)
    print(f'{split}: {n} rows, {pictures} pictures, from {smallest} to {largest} pixels')


def tell_of_classes(world: Folder):
    """Shares of the pixels of all masks, as far as the model sees them."""
    masks = [world.arrays[f'{split}.mask'] for split in data.SPLITS]
    masks = torch.cat(masks)                                                          # [n,S,S]
    names = dict(enumerate(world.names))
    names[255] = '(ignored)'
    print('classes, share of pixels, masks that show them:')
    for k, name in names.items():
        here = masks == k                                                             # [n,S,S]
        share = here.float().mean()
        shown = int(here.amax((1, 2)).sum())
        print('  {:3} {:20} {:6.1%} {:6}'.format(k, name, share, shown))


def tell_of_objects(world: Folder):
    """Names in plans that are no class, how often: they may be misspelled."""
    count = Counter()
    for row in world.all_rows():
        for part in row['plan'].split(', '):
            *_, name = part.split(' ', 2)                      # without 'top left'
            count[name] += 1
    del count['']                                              # of rows without a plan
    for name in world.names:
        del count[name]
    if count:
        print('objects that are no class, how often:')
        for name, n in count.most_common():
            print(f'  {name} {n}')


def tell_of_questions(world: Folder):
    """How often each answer is right, and how far the words alone lead."""
    blind = evaluation.blind(world, 512)
    counts = defaultdict(Counter)
    for split in data.SPLITS:
        for kind, answer in world.qa_of(split):
            counts[kind][answer] += 1
    print('types of question, blind accuracy on test, answers:')
    for kind in world.kinds:
        n = counts[kind].total()
        shares = [f'{answer} {k / n:.0%}' for answer, k in counts[kind].most_common(6)]
        blindly = evaluation.as_text(blind[kind])[:5]
        print('  {:16} {:6} {:5}'.format(kind, n, blindly), *shares)


def tell_of_texts(world: Folder):
    """The longest of each kind, in tokens."""
    texts = defaultdict(set)
    for row in world.all_rows():
        texts['caption'].add(row['caption'])
        texts['plan'].add(row['plan'])
        for _, (asked, answer) in row['qa']:
            texts['question'].add(asked)
            texts['answer'].add(answer)
    for kind, found in texts.items():
        lengths = {text: len(world.text.encode(text)) for text in found}
        longest = max(found, key=lengths.get)
        n = lengths[longest]
        print(f'{kind}: {len(found)} different, the longest of {n} tokens: {longest[:60]!r}')


def look_at(world: Folder) -> Image.Image:
    """Eight rows of train: picture, mask and depth as the model sees them, what is said of them; below
    that the colours of the classes. Prints the texts too: Pillow's font lacks many letters."""
    rows = world.rows['train']
    places = torch.linspace(0, len(rows) - 1, EACH).long().tolist()      # spread over all of them
    chosen = [rows[i] for i in places]
    lines = [[picture_of(world, row) for row in chosen]]
    if 'classes' in world.annotated:
        lines.append([mask_of(world, row) for row in chosen])
    if 'depth' in world.annotated:
        lines.append([depth_of(world, row) for row in chosen])
    notes = [[] for _ in lines]
    notes[-1] = [text_of(row) for row in chosen]               # under the last line
    for number, text in enumerate(notes[-1], 1):
        print(f'{number}: {text}')
    if 'classes' in world.annotated:
        names = world.names[:2 * EACH]
        tiles = [world.palette[k].expand(SIDE, SIDE, 3) for k in range(len(names))]
        for first in range(0, len(names), EACH):
            lines.append(tiles[first:first + EACH])
            notes.append(names[first:first + EACH])
    lines = [torch.stack(line).permute(0, 3, 1, 2) / 255 for line in lines]           # [n,3,S,S]
    return sample.grid(lines, notes, scale=1)


def picture_of(world: Folder, row: dict):
    """[SIDE, SIDE, 3], bytes."""
    picture = upright(path_of(world, row)).resize((SIDE, SIDE), Image.BOX)
    return torch.from_numpy(np.array(picture))


def mask_of(world: Folder, row: dict):
    """[SIDE, SIDE, 3], in the colours of the classes; what is ignored is grey."""
    colours = torch.full((256, 3), 128)
    colours[:len(world.palette)] = world.palette
    return colours[enlarged(world, row, 'mask').long()]


def depth_of(world: Folder, row: dict):
    """[SIDE, SIDE, 3], near is bright."""
    return enlarged(world, row, 'depth')[..., None].expand(SIDE, SIDE, 3)


def enlarged(world: Folder, row: dict, name: str):
    """[SIDE, SIDE] bytes of what the model sees."""
    found = world.arrays[f'train.{name}'][row['index']]
    found = Image.fromarray(found.numpy()).resize((SIDE, SIDE), Image.NEAREST)
    return torch.from_numpy(np.array(found))


def text_of(row: dict) -> str:
    """Caption, plan and two questions with their answers, as far as they are there."""
    qa = [' '.join(question_and_answer) for _, question_and_answer in row['qa'][:2]]
    return ' | '.join(text for text in (row['caption'], row['plan'], *qa) if text)
