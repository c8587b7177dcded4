"""How well a model draws, without the noise of sampling: what it finds likely.

    nats a code            of true drawings, given their captions and true plans; of the plans a token
    forced choice          of two pictures, or plans, the one that fits the caption is the likelier one

The other picture is the same scene with the two objects' places exchanged (`sides`), or their colours
(`colours`): same background, same noise. Choosing at random is right half of the time.
"""
import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F

import eval as evaluation
from data import Scenes

B = 64                           # pictures at a time


def nats_of_rows(umm, s) -> tuple:
    """-> (nats a text target, nats a code) of each row, [B], [B]; the sequence has one row a picture."""
    x = umm.hidden(s)                                                                 # [B,T+N,C]
    T = s.text.shape[1]
    text = F.cross_entropy(umm.text_head(x[:, :T]).mT, s.target.clamp(min=0), reduction='none')
    asked = s.target >= 0                                                             # [B,T]
    text = (text * asked).sum(1) / asked.sum(1)                                       # [B]
    pixel = F.cross_entropy(umm.pixel_head(x[:, T:]).mT, s.codes, reduction='none')   # [B,N]
    return text, pixel.mean(1)


def swapped(s: Scenes, what: str) -> Scenes:
    """The same scenes with the first two objects' places (`sides`) or colours (`colours`) exchanged."""
    order = torch.tensor([1, 0, 2, 3])
    colour = s.colour[:, order]                                                       # [B,4]
    if what == 'colours':
        return s._replace(colour=colour)
    return s._replace(colour=colour, shape=s.shape[:, order])


def pair_batch(world, split: str, index: int) -> list:
    """[(caption, plan, Scenes of one scene, texture)]: scenes of two objects with two shapes and two
    colours, one of which is clearly left of, right of, above or below the other."""
    g = data.generator(world.seed, split, 'choice', index)
    s = data.sample_scenes(4 * B, g)
    rng = data.python_random(world.seed, split, 'choice', index)
    found = []
    for i, scene in enumerate(data.scenes_as_objects(s)):
        if len(scene.objects) != 2:
            continue
        a, b = scene.objects
        text = data.caption(scene.objects, 'relation', rng)
        if text and a.shape != b.shape and a.colour != b.colour:
            found.append((text, i))
    return s, found


def told(scenes: Scenes) -> list[str]:
    """The plans of scenes."""
    return [data.caption(scene.objects, 'place', None) for scene in data.scenes_as_objects(scenes)]


@torch.no_grad()
def choices(umm, tok, world, n=1000, split='test') -> dict:
    """{'sides', 'colours': the true picture is likelier, given caption and true plan; 'plan sides', 'plan
    colours': the true plan is likelier, given the caption}: shares of n pairs, or a few more."""
    right = {'sides': 0, 'colours': 0, 'plan sides': 0, 'plan colours': 0}
    total = index = 0
    while total < n:
        s, found = pair_batch(world, split, index)
        chosen = torch.tensor([i for _, i in found])
        texts = [text for text, _ in found]
        true = Scenes(*[t[chosen] for t in s])
        plans = told(true)
        nats = {}
        for what in ('true', 'sides', 'colours'):
            scenes = true if what == 'true' else swapped(true, what)
            # the same texture and noise for all three
            g = data.generator(world.seed, split, 'choice texture', index)
            codes = tok.encode(data.render(scenes, world.size, g).image)
            nats[what] = nats_of(umm, world, texts, plans, codes)[1]
            nats['plan ' + what] = nats_of(umm, world, texts, told(scenes), codes)[0]
        for what in ('sides', 'colours'):
            right[what] += int((nats['true'] < nats[what]).sum())
            right['plan ' + what] += int((nats['plan true'] < nats['plan ' + what]).sum())
        total += len(texts)
        index += 1
    return {what: evaluation.share(count, total) for what, count in right.items()}


def nats_of(umm, world, texts, plans, codes):
    """As nats_of_rows, of captions with plans and pictures."""
    s = data.pack(world.text, [[turn] for turn in zip(texts, plans)], device=world.device)
    s.codes = codes
    return nats_of_rows(umm, s)


@torch.no_grad()
def likelihood(umm, tok, world, n=512, split='test') -> dict:
    """{'nats a code', 'nats a plan token'} of n true drawings with captions of all styles."""
    text, pixel = [], []
    for i in range(max(1, n // B)):
        s, target = world.drawings(split, i, B, drop=0, stream='likelihood')
        s.codes = tok.encode(target)
        text_nats, pixel_nats = nats_of_rows(umm, s)
        text.append(text_nats)
        pixel.append(pixel_nats)
    return {'nats a code': torch.cat(pixel).mean().item(),
            'nats a plan token': torch.cat(text).mean().item()}


def measure(umm, tok, world, n=1000) -> dict:
    """All of the above, on test scenes."""
    return {**choices(umm, tok, world, n), **likelihood(umm, tok, world, n // 2)}
