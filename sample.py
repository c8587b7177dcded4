"""Use a trained model:

    python sample.py draw "a red circle left of a blue square"
    python sample.py ask photo.png "how many objects are there?"
    python sample.py caption photo.png
    python sample.py segment photo.png --out map.png

A picture may be a PNG or JPEG of any size and mode; it is turned upright, flattened onto white and resized to
the model's size by area. Only the checkpoint is needed: it holds config, weights and text tokens.
"""
import argparse
import math
import os
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import data
from data import UserError
from eval import grid, source, until
from model import load

MAX_PIXELS = 50_000_000        # of a picture a user gives: more is refused before it is decoded
INSTRUCTIONS = {'segment': 'seg', 'depth': 'depth map', 'edges': 'edge', 'copy': 'recon'}


def read_image(path, size: int):
    """A picture file of any size and mode -> [1, 3, size, size] in [0, 1]. UserError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path) as im:
                if im.width * im.height > MAX_PIXELS:
                    raise UserError(f'{path} has {im.width} x {im.height} pixels: at most {MAX_PIXELS:,}; shrink it')
                im.load()
                im = ImageOps.exif_transpose(im)
                if im.mode.startswith(('I', 'F')):        # 16-bit and float: stretch to 8 bits, do not clip
                    a = np.asarray(im, dtype=np.float32)
                    a = (a - a.min()) / max(1e-6, a.max() - a.min()) * 255
                    im = Image.fromarray(a.astype(np.uint8))
                im = im.convert('RGBA')
                im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
                pixels = np.array(im.resize((size, size), Image.BOX))                 # [S,S,3]
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f'no picture {path}')
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f'{path} would unpack to more than {MAX_PIXELS:,} pixels: shrink it')
    except Exception as e:                                # PIL raises many kinds on broken files
        raise UserError(f'cannot read {path} as a picture ({type(e).__name__}: {str(e)[:80]}): give a PNG or JPEG')
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255                      # [1,3,S,S]


def check_prompt(text, prompt: str, limit: int):
    """Check a user's text: not empty, not longer than the model can read."""
    n = len(text.encode(prompt))
    if n == 0:
        raise UserError('the text is empty: write what to draw or to ask')
    if n > limit:
        raise UserError(f'the text has {n} tokens, the model reads at most {limit}: shorten it')


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='task', required=True, metavar='TASK')
    for task, help in (('draw', 'draw pictures of a text'), ('ask', 'answer a question about a picture'),
                       ('caption', 'describe a picture'), ('segment', 'generate the map of classes'),
                       ('depth', 'generate a depth map'), ('edges', 'generate an edge map'),
                       ('copy', 'generate the picture again')):
        q = sub.add_parser(task, help=help)
        if task != 'draw':
            q.add_argument('image', help='PNG or JPEG file')
        if task in ('draw', 'ask'):
            q.add_argument('text', help='what to draw' if task == 'draw' else 'question')
        q.add_argument('--checkpoint', help='default: the newest of out/*/model.safetensors')
        q.add_argument('--seed', type=int, default=0, help='of the sampling (default %(default)s)')
        q.add_argument('--n', type=int, default=4 if task == 'draw' else 1, help='samples (default %(default)s)')
        q.add_argument('--cfg', type=float, default=2. if task == 'draw' else 1.,
                       help='classifier-free guidance scale, 1 = off (default %(default)s)')
        q.add_argument('--temperature', type=float, default=1. if task == 'draw' else 0.,
                       help='0 = greedy (default %(default)s)')
        q.add_argument('--top_k', type=int, default=64, help='likeliest tokens to sample from (default %(default)s)')
        q.add_argument('--out', default=f'{task}.png', help='picture to write (default %(default)s)')
    a = p.parse_args(argv)
    for name, low, high in (('n', 1, 256), ('temperature', 0, 100), ('cfg', 0, 100), ('top_k', 0, 2**18)):
        if not low <= getattr(a, name) <= high:
            raise UserError(f'--{name} is {getattr(a, name)}: from {low} to {high}')
    return a


def newest_checkpoint() -> Path:
    found = sorted(Path('out').glob('*/model.safetensors'), key=os.path.getmtime)
    if not found:
        raise UserError('no checkpoint under out/: make one with `python train.py`, or name yours with --checkpoint')
    return found[-1]


@torch.no_grad()
def main(argv=None):
    a = parse(argv)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    tok, umm, text, _, _ = load(a.checkpoint or newest_checkpoint(), device)
    rng, g = random.Random(a.seed), torch.Generator(device).manual_seed(a.seed)
    answers = a.task in ('ask', 'caption')
    prompt = getattr(a, 'text', None) or ('' if a.task in ('draw', 'ask') else
                                          data.WORDS[INSTRUCTIONS.get(a.task, 'list')][0])
    check_prompt(text, prompt, umm.max_text - 64)
    image = None if a.task == 'draw' else read_image(a.image, umm.c.size).to(device).repeat(a.n, 1, 1, 1)
    s = data.pack(text, [[(prompt, None)]] * a.n, None if image is None else source(umm, tok, image), device)
    how = dict(cfg=a.cfg, temperature=a.temperature, top_k=a.top_k, generator=g)
    if answers:
        rows = umm.generate(s, first=text.answer, stop=text.end, length=64, **how).tolist()
        for row in until(rows, text.end):
            print(text.decode(row))
        return
    pictures = tok.decode(umm.generate(s, **how))
    scale = max(1, 256 // umm.c.size)
    rows = pictures.split(math.ceil(a.n ** .5))
    write(grid(rows, scale=scale), a.out)
    print(f'wrote {a.out}: {a.n} picture{"s" * (a.n > 1)} of {umm.c.size} x {umm.c.size} pixels, enlarged {scale} times')


def write(picture: Image.Image, path):
    """Save as PNG, whole or not at all."""
    part = Path(f'{path}.part')
    try:
        picture.save(part, 'PNG')
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path} ({e.strerror}): choose another --out')


if __name__ == '__main__':
    data.guard(main)
