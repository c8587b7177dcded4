"""All that a person looks at. Use a trained model:

    python sample.py draw "a red circle left of a blue square"
    python sample.py ask photo.png "how many objects are there?"
    python sample.py caption photo.png
    python sample.py segment photo.png --out map.png
    python sample.py reconstruct photo.png        through the tokenizer: picture, its codes, picture

Only the checkpoint is needed: it holds config, weights and text tokens. A picture: PNG or JPEG of any
size and mode; it is turned upright, laid on white and resized to the model's size by area.
"""
import argparse
import math
import os
from pathlib import Path
from textwrap import wrap

import data  # before torch: it tells OpenMP how to wait
import torch
from PIL import Image, ImageDraw

from data import MAPS, DataSet, UserError
from folder import read_image
from model import draw, load, write

TASKS = {                      # name: (what it does, the map it generates or None)
    'draw': ('draw pictures of a text', None),
    'ask': ('answer a question about a picture', None),
    'caption': ('describe a picture', None),
    'reconstruct': ('a picture through the tokenizer', None),
    'segment': ('generate its map of classes', 'seg'),
    'depth': ('its depth map (run with --proxy depth)', 'depth'),
    'edges': ('its edges (--proxy edge)', 'edge'),
    'copy': ('it again (--proxy recon)', 'recon'),
}
LINE = 13                      # height of a line of text in pixels
LETTERS = 21                   # in a line under a picture


# ---- pictures of what a model does ----
def as_picture(x, side: int) -> Image.Image:
    """x [3, S, S] in [0, 1], enlarged without smoothing."""
    pixels = (x.clamp(0, 1) * 255).round().byte()
    pixels = pixels.permute(1, 2, 0).cpu().numpy()                                    # [S,S,3]
    return Image.fromarray(pixels).resize((side, side), Image.NEAREST)


def grid(rows, captions=(), scale=4, gap=4) -> Image.Image:
    """rows: list of [n, 3, S, S] in [0, 1] -> one picture; captions: texts under each row's pictures."""
    captions = list(captions) + [[]] * (len(rows) - len(captions))
    side = rows[0].shape[-1] * scale
    heights = []
    for texts in captions:
        lines = max([len(wrap(text, LETTERS)) for text in texts], default=0)
        heights.append(side + gap + LINE * lines)
    n = max(len(row) for row in rows)
    canvas = Image.new('RGB', (n * (side + gap) + gap, sum(heights) + gap), 'white')
    pen, y = ImageDraw.Draw(canvas), gap
    for row, texts, height in zip(rows, captions, heights):
        for i, x in enumerate(row):
            left = gap + i * (side + gap)
            canvas.paste(as_picture(x, side), (left, y))
            if i < len(texts):
                words = '\n'.join(wrap(texts[i], LETTERS))
                pen.multiline_text((left, y + side), words, 'black', spacing=1)
        y += height
    return canvas


def captions_of(world: DataSet, scenes, rng) -> list[str]:
    """A caption of each scene, of a style that changes from one to the next as far as it fits."""
    styles = list(data.STYLES)
    texts = []
    for i, scene in enumerate(scenes):
        k = i % len(styles)
        said = [world.describe(scene, style, rng) for style in styles[k:] + styles[:k]]
        texts.append([text for text in said if text][0])
    return texts


def answers_to(umm, world: DataSet, scenes, image, rng) -> list[str]:
    """A question about each picture with the model's answer and, where that is wrong, the true one."""
    kinds, asked = list(world.kinds), []
    for i, scene in enumerate(scenes):
        k = i % len(kinds)
        found = [('', '')]
        for kind in kinds[k:] + kinds[:k]:
            found = world.ask(scene, kind, rng) or found
            if found[0][0]:
                break
        asked.append(found[0])
    s = data.pack(world.text, [[(question or '?', None)] for question, _ in asked], image, world.device)
    notes = []
    for (question, true), answer in zip(asked, write(umm, world.text, s, temperature=0)):
        note = f'{question} {answer}'
        if answer != true.lower():
            note += f' (true: {true})'
        notes.append(note if question else '')
    return notes


@torch.no_grad()
def picture(umm, tok, world: DataSet, cfg=2., n=8) -> Image.Image:
    """What the model can do, on validation scenes: drawings of texts; input, generated map, true map and
    a question with the model's answer and, where that is wrong, the true one."""
    scenes, r, rng = world.scenes('val', 'samples', 0, n)
    image = umm.inputs(tok, r.image)
    rows, notes = [], []
    if world.captions:
        texts = captions_of(world, scenes, rng)
        g = torch.Generator(world.device).manual_seed(1)
        codes, _ = draw(umm, world.text, texts, g, cfg=cfg)
        rows.append(tok.decode(codes))
        notes.append(texts)
    rows.append(r.image)
    notes.append([])
    if 'seg' in world.maps:
        s, target, _ = world.maps_to_draw('val', 0, n, 'seg', stream='samples')
        s.image = image
        rows.append(tok.decode(umm.generate(s, temperature=0)))
        rows.append(target)
        notes += [[], []]
    if world.kinds:
        notes[-1] = answers_to(umm, world, scenes, image, rng)
    return grid(rows, notes)


# ---- command line ----
def arguments(task: str) -> list:
    """[(flag, default, help)] of a task."""
    drawing = task == 'draw'
    return [
        ('n', 4 if drawing else 1, 'samples'),
        ('seed', 0, 'of the sampling'),
        ('cfg', 2. if drawing else 1., 'classifier-free guidance scale, 1 = off'),
        ('temperature', .7 if drawing else 0., '0 = greedy'),
        ('top_k', 64, 'sample from that many likeliest tokens, 0 = all'),
        ('out', f'{task}.png', 'PNG to write, where the answer is a picture'),
        ('checkpoint', '', 'model.safetensors of a run; empty: the newest under out/'),
        ('device', 'auto', 'cpu, cuda, mps, or auto: cuda where there is one, else cpu'),
    ]


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='task', required=True, metavar='TASK')
    for task, (help, _) in TASKS.items():
        q = sub.add_parser(task, help=help, allow_abbrev=False)
        if task != 'draw':
            q.add_argument('image', help='PNG or JPEG file')
        if task in ('draw', 'ask'):
            q.add_argument('text', help='what to draw' if task == 'draw' else 'question')
        for name, default, text in arguments(task):
            q.add_argument(f'--{name}', type=type(default), default=default,
                           help=f'{text} (default {default!r})')
    a = p.parse_args(argv)
    bounds = {'n': (1, 256), 'seed': (0, 2**62), 'temperature': (0, 100), 'cfg': (0, 100),
              'top_k': (0, 2**18)}
    for name, (low, high) in bounds.items():
        value = getattr(a, name)
        if not low <= value <= high:
            raise UserError(f'--{name} is {value}: from {low} to {high}')
    return a


def newest_checkpoint() -> Path:
    found = sorted(Path('out').glob('*/model.safetensors'), key=os.path.getmtime)
    if not found:
        raise UserError('no checkpoint under out/: make one with `python train.py` or name --checkpoint')
    return found[-1]


def prompt_of(a, text: data.Text) -> str:
    """The words that go with the task, if they are neither empty nor too long."""
    _, name = TASKS[a.task]
    prompt = MAPS[name].words[0] if name else data.ASK_FOR_CAPTION['list'][0]
    if a.task in ('draw', 'ask'):
        prompt = a.text
    n, limit = len(text.encode(prompt)), data.MAX_TEXT - data.MAX_PLAN     # a plan or answer follows
    if n == 0:
        raise UserError('the text is empty: write what to draw or to ask')
    if n > limit:
        raise UserError(f'the text has {n} tokens, the model reads {limit} at most: shorten it')
    return prompt


def save_picture(canvas: Image.Image, path: str):
    """A temporary file first: nothing is half-written."""
    part = Path(f'{path}.part')
    try:
        canvas.save(part, 'PNG')
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path} ({e.strerror}): choose another --out')


def in_a_square(pictures) -> Image.Image:
    """[n, 3, S, S] beside and below each other, 256 pixels each."""
    n, side = len(pictures), max(256, pictures.shape[-1])
    columns = math.ceil(n ** .5)
    canvas = Image.new('RGB', (columns * side, math.ceil(n / columns) * side))
    for i, x in enumerate(pictures):
        canvas.paste(as_picture(x, side), (i % columns * side, i // columns * side))
    return canvas


@torch.no_grad()
def main(argv=None):
    a = parse(argv)
    device = data.find_device(a.device)
    checkpoint = a.checkpoint or newest_checkpoint()
    tok, umm, text, _, meta = load(checkpoint, device)
    _, name = TASKS[a.task]
    if name and name != meta['settings'].get('proxy'):
        print(f'warning: {checkpoint} did not learn this map (train.py --proxy {name}): expect noise')
    prompt = prompt_of(a, text)
    how = dict(cfg=a.cfg, temperature=a.temperature, top_k=a.top_k,
               generator=torch.Generator(device).manual_seed(a.seed))
    if a.task == 'draw':
        codes, plans = draw(umm, text, [prompt] * a.n, **how)
        for plan in plans:
            print('plan:', plan)
    else:
        x = read_image(a.image, umm.c.size).to(device) / 255                          # [3,S,S]
        x = x.repeat(a.n, 1, 1, 1)                                                    # [n,3,S,S]
        s = data.pack(text, [[(prompt, None)]] * a.n, umm.inputs(tok, x), device)
        if a.task in ('ask', 'caption'):
            print('\n'.join(write(umm, text, s, 64, **how)))
            return
        codes = tok.encode(x) if a.task == 'reconstruct' else umm.generate(s, **how)
    pictures = tok.decode(codes)                                                      # [n,3,S,S]
    if a.task == 'reconstruct':
        pictures = torch.cat([x[:1], pictures[:1]])            # before and after
    save_picture(in_a_square(pictures), a.out)
    print(f'wrote {a.out}: {len(pictures)} of {checkpoint}')


if __name__ == '__main__':
    data.guard(main)
