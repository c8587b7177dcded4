"""Use a trained model:

    python sample.py draw "a red circle left of a blue square"
    python sample.py ask photo.png "how many objects are there?"
    python sample.py caption photo.png
    python sample.py segment photo.png --out map.png

Only the checkpoint is needed: it holds config, weights and text tokens. A picture: PNG or JPEG of any
size and mode; it is turned upright, laid on white and resized to the model's size by area.
"""
import argparse
import math
import os
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import torch
from PIL import Image

from data import PROXIES, UserError
from folder import read_image
from model import draw, load, write

TASKS = {'draw': ('draw pictures of a text', ''), 'ask': ('answer a question about a picture', ''),
         'caption': ('describe a picture', 'list'), 'segment': ('generate its map of classes', 'seg'),
         'depth': ('its depth map (run with --proxy depth)', 'depth map'),
         'edges': ('its edges (--proxy edge)', 'edge'), 'copy': ('it again (--proxy recon)', 'recon')}

def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sub = p.add_subparsers(dest='task', required=True, metavar='TASK')
    for task, (help, _) in TASKS.items():
        q, draw = sub.add_parser(task, help=help, allow_abbrev=False), task == 'draw'
        if not draw:
            q.add_argument('image', help='PNG or JPEG file')
        if task in ('draw', 'ask'):
            q.add_argument('text', help='what to draw' if draw else 'question')
        for name, default, text in (
                ('n', 4 if draw else 1, 'samples'), ('seed', 0, 'of the sampling'),
                ('cfg', 2. if draw else 1., 'classifier-free guidance scale, 1 = off'),
                ('temperature', .7 if draw else 0., '0 = greedy'),
                ('top_k', 64, 'sample from that many likeliest tokens, 0 = all'),
                ('out', f'{task}.png', 'PNG to write, where the answer is a picture'),
                ('checkpoint', '', 'model.safetensors of a run; empty: the newest under out/'),
                ('device', 'auto', 'cpu, cuda, mps, or auto: cuda where there is one, else cpu')):
            q.add_argument(f'--{name}', type=type(default), default=default,
                           help=f'{text} (default {default!r})')
    a = p.parse_args(argv)
    for name, low, high in (('n', 1, 256), ('seed', 0, 2**62), ('temperature', 0, 100), ('cfg', 0, 100),
                            ('top_k', 0, 2**18)):
        if not low <= getattr(a, name) <= high:
            raise UserError(f'--{name} is {getattr(a, name)}: from {low} to {high}')
    return a

def newest_checkpoint():
    found = sorted(Path('out').glob('*/model.safetensors'), key=os.path.getmtime)
    if not found:
        raise UserError('no checkpoint under out/: make one with `python train.py` or name --checkpoint')
    return found[-1]

@torch.no_grad()
def main(argv=None):
    a = parse(argv)
    device, checkpoint = data.find_device(a.device), a.checkpoint or newest_checkpoint()
    tok, umm, text, _, meta = load(checkpoint, device)
    if (kind := TASKS[a.task][1].split(' ')[0]) in PROXIES and kind != meta['settings'].get('proxy'):
        print(f'warning: {checkpoint} did not learn this map (train.py --proxy {kind}): expect noise')
    prompt = a.text if a.task in ('draw', 'ask') else data.WORDS[TASKS[a.task][1]][0]
    n, limit = len(text.encode(prompt)), data.MAX_TEXT - data.MAX_PLAN     # a plan or an answer follows
    if not 0 < n <= limit:
        raise UserError(f'the text has {n} tokens, the model reads {limit} at most: shorten it' if n else
                        'the text is empty: write what to draw or to ask')
    image = None if a.task == 'draw' else umm.inputs(
        tok, read_image(a.image, umm.c.size).to(device).repeat(a.n, 1, 1, 1) / 255)
    s = data.pack(text, [[(prompt, None)]] * a.n, image, device)
    how = dict(cfg=a.cfg, temperature=a.temperature, top_k=a.top_k,
               generator=torch.Generator(device).manual_seed(a.seed))
    if a.task in ('ask', 'caption'):
        print('\n'.join(write(umm, text, s, 64, **how)))
        return
    codes, plans = (umm.generate(s, **how), ()) if image is not None else \
        draw(umm, text, [prompt] * a.n, **how)
    for plan in plans:
        print('plan:', plan)
    pictures = tok.decode(codes).permute(0, 2, 3, 1).mul(255).round().byte().cpu()
    side, S = math.ceil(a.n ** .5), max(256, umm.c.size)
    canvas = Image.new('RGB', (side * S, math.ceil(a.n / side) * S))
    for i, x in enumerate(pictures.numpy()):                                          # [S,S,3]
        canvas.paste(Image.fromarray(x).resize((S, S), Image.NEAREST), (i % side * S, i // side * S))
    part = Path(f'{a.out}.part')
    try:                                             # a temporary file first: nothing is half-written
        canvas.save(part, 'PNG')
        os.replace(part, a.out)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {a.out} ({e.strerror}): choose another --out')
    print(f"wrote {a.out}: {a.n} picture{'s' * (a.n > 1)} of {checkpoint}")

if __name__ == '__main__':
    data.guard(main)
