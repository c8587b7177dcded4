"""What a folder for `python train.py --data` holds:

    python -m experiments.prepare check FOLDER --out check.png

How many pictures there are and of which sizes, how often classes and answers occur, what can be answered
from the words of a question alone, which texts are longest. The picture shows eight rows with their
masks in colour. Bad rows are named and left out. --learnable: which questions can be learned at all, see
learnable.py; some minutes.
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


def tell(folder: Path, out: str, also_learnable=False):
    """Print all of it, and write the picture."""
    world = Folder(folder, skip_bad=True)
    for split in data.SPLITS:
        tell_of_pictures(world, split)
    if 'classes' in world.annotated:
        tell_of_classes(world)
    if world.kinds:
        tell_of_questions(world)
    tell_of_texts(world)
    canvas = look_at(world)
    sample.save_picture(canvas, out)
    print(f'wrote {out}: do its masks, captions, plans and answers fit the pictures?')
    if also_learnable:
        learnable.tell(world)


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
    """Eight rows of train: picture, mask as the model sees it, what is said of it."""
    pictures, masks, texts = [], [], []
    rows = world.rows['train']
    places = torch.linspace(0, len(rows) - 1, 8).long().tolist()         # spread over all of them
    colours = torch.full((256, 3), 128)                        # of what is ignored
    colours[:len(world.palette)] = world.palette
    for row in [rows[i] for i in places]:
        picture = upright(path_of(world, row))
        picture = np.array(picture.resize((SIDE, SIDE), Image.BOX))                   # [S,S,3]
        pictures.append(torch.from_numpy(picture))
        mask = world.arrays['train.mask'][row['index']]
        mask = Image.fromarray(mask.numpy()).resize((SIDE, SIDE), Image.NEAREST)
        mask = torch.from_numpy(np.array(mask)).long()                                # [S,S]
        masks.append(colours[mask])                                                   # [S,S,3]
        qa = [' '.join(question_and_answer) for _, question_and_answer in row['qa'][:2]]
        texts.append(' | '.join([row['caption'], row['plan'], *qa]))
    lines = [torch.stack(x).permute(0, 3, 1, 2) / 255 for x in (pictures, masks)]
    if 'classes' not in world.annotated:
        lines = lines[:1]
    notes = [[] for _ in lines]
    notes[-1] = texts                                          # under the last line
    return sample.grid(lines, notes, scale=1)
