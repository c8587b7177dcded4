"""All that a person looks at. Use a trained model:

    python sample.py draw "a red circle left of a blue square"
    python sample.py ask photo.png "how many objects are there?"
    python sample.py caption photo.png
    python sample.py segment photo.png --out map.png      class numbers, as large as the picture
    python sample.py reconstruct photo.png        through the tokenizer: picture, its codes, picture

Only the checkpoint is needed: it holds config, weights and text tokens. A picture: PNG or JPEG of any
size and mode; it is turned upright, laid on white and resized to the model's size by area.
"""
import argparse
import math
import os
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

import data  # before torch: it tells OpenMP how to wait
import numpy as np
import torch
from PIL import Image, ImageDraw

from data import MAPS, DataSet, UserError
from folder import palette, shrunk, upright
from model import TEMPERATURE, draw, drawn, load, write

TASKS = {                      # name: (what it does, the map it generates or None)
    'draw': ('draw pictures of a text', None),
    'ask': ('answer a question about a picture', None),
    'caption': ('describe a picture', None),
    'reconstruct': ('a picture through the tokenizer', None),
    'segment': ('generate its map of classes', 'seg'),
}
for _name in MAPS:             # the other maps under their own names
    if _name != 'seg':
        TASKS[_name] = (f'generate this map of it (trained with --proxy {_name})', _name)
LINE = 13                      # height of a line of text in pixels
LETTERS = 21                   # in a line under a picture


# ---- pictures of what a model does ----
# Training shows them every --sample_every steps and at its end.
def as_picture(x, side: int) -> Image.Image:
    """x [3, S, S] in [0, 1], enlarged without smoothing."""
    pixels = (x.clamp(0, 1) * 255).round().byte()
    pixels = pixels.permute(1, 2, 0).cpu().numpy()                                    # [S,S,3]
    return Image.fromarray(pixels).resize((side, side), Image.NEAREST)


def grid(rows, captions=(), scale=4, gap=4) -> Image.Image:
    """rows: list of [n, 3, S, S] in [0, 1] -> one picture; captions: for each row a list of texts, which
    stand under its pictures. scale: pixels on the canvas for one of a picture; gap: between them."""
    side = rows[0].shape[-1] * scale                           # of one picture on the canvas
    n = max(len(row) for row in rows)
    under, heights = [], []                                    # lines of text, height of each row
    for row, texts in zip_longest(rows, captions, fillvalue=()):
        lines = [wrap(text, LETTERS) for text in texts]
        under.append(lines)
        most = max([len(x) for x in lines], default=0)
        heights.append(side + gap + LINE * most)
    width = n * (side + gap) + gap
    canvas = Image.new('RGB', (width, sum(heights) + gap), 'white')
    pen = ImageDraw.Draw(canvas)
    y = gap                                                    # top of the row
    for row, lines, height in zip(rows, under, heights):
        for i, x in enumerate(row):
            left = gap + i * (side + gap)
            canvas.paste(as_picture(x, side), (left, y))
            if i < len(lines):
                pen.multiline_text((left, y + side), '\n'.join(lines[i]), 'black', spacing=1)
        y += height
    return canvas


def captions_of(world: DataSet, scenes, rng) -> list[str]:
    """A caption of each scene, of styles that change from one to the next: lists, places, relations,
    bare names, counts."""
    texts = []
    for i, scene in enumerate(scenes):
        # a style that does not fit the scene gives nothing
        said = [world.describe(scene, style, rng) for style in data.STYLES]
        fit = [text for text in said if text]
        texts.append(fit[i % len(fit)])
    return texts


def answers_to(umm, world: DataSet, scenes, image, rng) -> list[str]:
    """A question about each picture with the model's answer and, where that is wrong, the true one. Its
    type changes from one to the next. Answers are greedy."""
    asked = []                                                 # (question, true answer)
    for i, scene in enumerate(scenes):
        fit = [qa for kind in world.kinds for qa in world.ask(scene, kind, rng)]
        asked.append(fit[i % len(fit)] if fit else ('', ''))
    rows = [[(question, None)] for question, _ in asked]
    s = data.pack(world.text, rows, image, world.device)
    answers = write(umm, world.text, s, temperature=0)         # greedy
    notes = []
    for (question, true), answer in zip(asked, answers):
        note = f'{question} {answer}'
        if answer != true.lower():                             # text tokens know no capitals
            note += f' (true: {true})'
        notes.append(note if question else '')                 # nothing is known of this picture
    return notes


def picture(umm, tok, world: DataSet, cfg=2., proxy='seg', n=8) -> Image.Image:
    """What the model can do, on validation scenes, row by row, as far as the data set knows it; proxy:
    the map that it was taught:

    drawings of the texts below them; input pictures; the maps that the model generated; the true maps,
    and a question about each picture with the model's answer. Wrong answers have the true one behind."""
    scenes, r, rng = world.scenes('val', 'samples', 0, n)
    rows, notes = [], []                                       # what stands under each row
    if world.captions:
        texts = captions_of(world, scenes, rng)
        # its own seed: the same drawings at every look, as far as the model is the same
        rows.append(drawn(umm, tok, world.text, texts, 1, cfg))
        notes.append(texts)
    rows.append(r.image)
    notes.append([])
    if proxy in world.maps:
        s, target, _ = world.maps_to_draw('val', 0, n, proxy, stream='samples')
        rows.append(tok.decode(umm.generate(s, temperature=0)))
        rows.append(target)
        notes += [[], []]
    if world.kinds:                                            # under the last row
        notes[-1] = answers_to(umm, world, scenes, r.image, rng)
    return grid(rows, notes)


# ---- command line ----
FLAGS = [                      # (name, default, help); the type of the default is that of the flag
    ('n', 1, 'samples'),
    ('seed', 0, 'of the sampling'),
    ('cfg', 1., 'classifier-free guidance scale, 1 = off'),
    ('temperature', 0., '0 = greedy'),
    ('out', '', 'PNG to write, where the answer is a picture'),
    ('checkpoint', '', 'model.safetensors of a run; empty: the newest under out/'),
    ('device', 'auto', 'cpu, cuda, mps, or auto: cuda where there is one, else cpu'),
]
# Drawing samples, with guidance: one caption has many pictures. Answers and maps are the likeliest ones:
# each has one right form.
DRAWING = {'n': 4, 'cfg': 2., 'temperature': TEMPERATURE}
# What is outside of these is refused before anything is loaded.
BOUNDS = {
    'n': (1, 256),
    'seed': (0, 2**62),
    'temperature': (0, 100),
    'cfg': (0, 100),
}


def parse(argv=None):
    """A task, its picture or text or both, and flags; UserError for impossible values."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sub = p.add_subparsers(dest='task', required=True, metavar='TASK')
    for task, (help, _) in TASKS.items():
        q = sub.add_parser(task, help=help, allow_abbrev=False)
        if task != 'draw':
            q.add_argument('image', help='PNG or JPEG file')
        if task in ('draw', 'ask'):
            q.add_argument('text', help='what to draw, or the question')
        for name, default, text in FLAGS:
            q.add_argument(f'--{name}', type=type(default), default=default,
                           help=f'{text} (default %(default)r)')
        q.set_defaults(out=f'{task}.png')
        if task == 'draw':
            q.set_defaults(**DRAWING)
    a = p.parse_args(argv)
    for name, (low, high) in BOUNDS.items():
        value = getattr(a, name)
        if not low <= value <= high:
            raise UserError(f'--{name} is {value}: from {low} to {high}')
    return a


def newest_checkpoint() -> Path:
    """Of the runs in the folder out/ of where the program was started."""
    found = list(Path('out').glob('*/model.safetensors'))
    if not found:
        raise UserError('no checkpoint under out/: make one with `python train.py` or name --checkpoint')
    return max(found, key=os.path.getmtime)


def prompt_of(a, text: data.Text, known: list) -> str:
    """The words that go with the task: the user's, or an instruction of the kind that training gave.
    UserError where they are empty or too long; words that are not `known` are named."""
    _, name = TASKS[a.task]
    prompt = data.ASK_FOR_CAPTION['list'][0]
    if name:
        prompt = MAPS[name].words[0]
    if a.task in ('draw', 'ask'):                              # the user's own words
        prompt = a.text
        new = [word for word in data.words_of(prompt) if word not in known]
        if new:
            print('warning: training never showed', *new)
    n = len(text.encode(prompt))
    limit = data.MAX_TEXT - data.MAX_PLAN                      # a plan or an answer follows
    if n == 0:
        raise UserError('the text is empty: write what to draw or to ask')
    if n > limit:
        raise UserError(f'the text has {n} tokens, the model reads {limit} at most: shorten it')
    return prompt


def in_a_square(pictures) -> Image.Image:
    """[n, 3, S, S] beside and below each other, each at least 256 pixels wide."""
    columns = math.ceil(len(pictures) ** .5)                   # as many rows, or one less
    rows = pictures.split(columns)
    # as large as they are, or enlarged
    scale = math.ceil(256 / pictures.shape[-1])
    return grid(rows, scale=scale, gap=0)


def map_of_classes(pictures, names: list, size: tuple) -> Image.Image:
    """Generated maps [n, 3, S, S] as one indexed picture of class numbers, beside each other, each of
    that (width, height). Prints which classes they hold, and how much of each."""
    colours = palette(len(names))                                                     # [classes,3]
    numbers = data.classes_of(pictures, colours).byte().cpu()                         # [n,S,S]
    # never blended: between class 1 and class 3 there is no class 2
    large = [Image.fromarray(one.numpy()).resize(size, Image.NEAREST) for one in numbers]
    canvas = Image.fromarray(np.hstack(large))
    canvas.putpalette(colours.flatten().tolist())              # indexed from here on
    for i, name in enumerate(names):
        share = (numbers == i).float().mean()
        if share > 0:
            print(f'{i} {name}: {share:.1%}')
    return canvas


def main(argv=None):
    """Do one task with one checkpoint: print texts, or write one picture."""
    a = parse(argv)                                            # nothing is loaded before it is right
    device = data.find_device(a.device)
    checkpoint = a.checkpoint or newest_checkpoint()
    tok, umm, text, _, meta = load(checkpoint, device)
    if a.task == 'segment' and not meta['classes']:
        raise UserError(f'{checkpoint} knows no classes: it was trained without masks')
    if a.task != 'reconstruct' and meta['trained'] in ('', 'tokenizer'):
        raise UserError(f'{checkpoint} can only reconstruct yet: train.py --resume goes on')
    _, name = TASKS[a.task]                                    # the map it generates, or None
    if name and name != meta['taught']:
        print(f'warning: {checkpoint} did not learn this map (train.py --proxy {name}): expect noise')
    prompt = prompt_of(a, text, meta['words'])
    prompts = [prompt for _ in range(a.n)]                     # each sample is a row of the batch
    # the same seed gives the same result on the same machine
    g = torch.Generator(device).manual_seed(a.seed)
    how = dict(cfg=a.cfg, temperature=a.temperature, generator=g)
    if a.task == 'draw':
        codes, plans = draw(umm, text, prompts, **how)                                # [n,N]
        for plan in plans:                                     # what it means to draw
            # a text from a folder may hold what a terminal would obey
            print('plan:', data.CONTROL.sub(' ', plan))
        pictures = tok.decode(codes)                                                  # [n,3,S,S]
    else:
        photo = upright(a.image)
        x = shrunk(photo, umm.c.size).to(device)[None] / 255                          # [1,3,S,S]
        image = x.repeat(a.n, 1, 1, 1)                                                # [n,3,S,S]
        s = data.pack(text, [[(words, None)] for words in prompts], image, device)
        if a.task in ('ask', 'caption'):
            room = data.MAX_TEXT - s.text.shape[1]             # as long as a text in training
            for tokens in umm.generate(s, text.answer, text.end, room, **how).tolist():
                cut = '' if text.end in tokens else ' ... (cut)'
                print(data.CONTROL.sub(' ', text.decode(tokens)) + cut)
            return
        if a.task == 'reconstruct':
            pictures = torch.cat([x, tok.decode(tok.encode(x))])       # before and after
        else:
            pictures = tok.decode(umm.generate(s, **how))                             # [n,3,S,S]
    if a.task == 'segment':
        canvas = map_of_classes(pictures, meta['classes'], photo.size)
    else:
        canvas = in_a_square(pictures)
    with data.written_whole(a.out) as part:
        canvas.save(part, 'PNG')
    print(f'wrote {a.out}: {len(pictures)} of {checkpoint}')


if __name__ == '__main__':
    data.guard(main)
