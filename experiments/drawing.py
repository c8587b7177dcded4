"""How well a model draws, without the noise of sampling: what it finds likely.

    nats a code            of true drawings, given their captions and true plans; of the plans a token
    forced choice          of two pictures, or plans, the one that fits the caption is the likelier one

The other picture is the same scene with the two objects' places exchanged (`sides`), or their colours
(`colours`): same background, same noise. Choosing at random is right half of the time.
"""
from collections import Counter

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F

import eval as evaluation
from data import Scene

B = 64                           # pictures at a time


def nats_of_rows(umm, s) -> tuple:
    """-> (nats a text target, nats a code) of each row, [B], [B]; the sequence has one row a picture."""
    x = umm.hidden(s)                                                                 # [B,T+N,C]
    T = s.text.shape[1]
    words = umm.text_head(x[:, :T]).mT                                                # [B,V,T]
    codes = umm.pixel_head(x[:, T:]).mT                                               # [B,K,N]
    text = F.cross_entropy(words, s.target, ignore_index=-1, reduction='none')        # [B,T]
    pixel = F.cross_entropy(codes, s.codes, reduction='none')                         # [B,N]
    asked = (s.target >= 0).sum(1)                                                    # [B]
    return text.sum(1) / asked, pixel.mean(1)


def swapped(scene: Scene, what: str) -> Scene:
    """The same scene of two objects with their places (`sides`) or colours (`colours`) exchanged."""
    a, b = scene.objects                                       # in reading order, which stays
    if what == 'colours':
        return Scene([a._replace(colour=b.colour), b._replace(colour=a.colour)])
    first = a._replace(colour=b.colour, shape=b.shape)
    second = b._replace(colour=a.colour, shape=a.shape)
    return Scene([first, second])


def pair_batch(world, split: str, index: int) -> tuple:
    """-> (captions, their scenes): those of two objects with two shapes and two colours, one of which is
    clearly left of, right of, above or below the other."""
    texts, found = [], []
    scenes, _, rng = world.scenes(split, 'choice', index, 4 * B, pixels=False)
    for scene in scenes:
        objects = scene.objects
        text = None
        if len(objects) == 2:
            text = data.caption(objects, 'relation', rng)
        shapes = {o.shape for o in objects}
        colours = {o.colour for o in objects}
        if text and len(shapes) == 2 and len(colours) == 2:
            texts.append(text)
            found.append(scene)
    return texts, found


def plans_of(world, scenes: list[Scene]) -> list[str]:
    """The plans of scenes; empty in a world that has none."""
    return [world.describe(scene, 'place', None) or '' for scene in scenes]


@torch.no_grad()
def choices(umm, tok, world, n=1000, split='test') -> dict:
    """{'sides', 'colours': the true picture is likelier, given caption and true plan; 'plan sides',
    'plan colours': the true plan is likelier, given the caption}: shares of n pairs, or a few more."""
    right, total, index = Counter(), 0, 0
    while total < n:
        texts, true = pair_batch(world, split, index)
        plans = plans_of(world, true)
        codes = drawn_alike(tok, world, true, split, index)                           # [B,N]
        plan_nats, code_nats = nats_of(umm, world, texts, plans, codes)               # [B], [B]
        for what in ('sides', 'colours'):
            others = [swapped(scene, what) for scene in true]
            other_codes = drawn_alike(tok, world, others, split, index)
            _, other_code_nats = nats_of(umm, world, texts, plans, other_codes)
            right[what] += int((code_nats < other_code_nats).sum())
            if plans[0]:
                other_plans = plans_of(world, others)
                other_plan_nats, _ = nats_of(umm, world, texts, other_plans, codes)
                right[f'plan {what}'] += int((plan_nats < other_plan_nats).sum())
        total += len(texts)
        index += 1
    return {what: evaluation.share(count, total) for what, count in right.items()}


def drawn_alike(tok, world, scenes: list[Scene], split: str, index: int):
    """The codes [B, N] of scenes, with the same background and noise at every call of one index."""
    g = data.generator(world.seed, split, 'choice texture', index, world.device)
    return tok.encode(data.render(scenes, world.size, g).image)


def nats_of(umm, world, texts, plans, codes) -> tuple:
    """As nats_of_rows, of captions with plans and pictures."""
    s = data.pack(world.text, [[turn] for turn in zip(texts, plans)], device=world.device)
    s.codes = codes
    return nats_of_rows(umm, s)


@torch.no_grad()
def likelihood(umm, tok, world, n=512, split='test') -> dict:
    """{'nats a code', 'nats a plan token'} of about n true drawings with captions of all styles."""
    text, pixel = [], []
    for i in range(max(1, n // B)):
        s, target = world.drawings(split, i, B, drop=0, stream='likelihood')
        s.codes = tok.encode(target)
        text_nats, pixel_nats = nats_of_rows(umm, s)
        text.append(text_nats)
        pixel.append(pixel_nats)
    code = torch.cat(pixel).mean().item()
    token = torch.cat(text).mean().item()
    return {'nats a code': code, 'nats a plan token': token}


def measure(umm, tok, world, n=1000) -> dict:
    """All of the above, on test scenes."""
    return {**choices(umm, tok, world, n), **likelihood(umm, tok, world, n // 2)}
