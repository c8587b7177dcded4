"""What a model's states hold and where its attention looks: linear probes, attention shares.

Both look at a trained model in the procedural world, where the shape, colour and depth under every patch
are known. experiments/reproduce.py measures them for each arm; the tour shows them for one model.
"""
import contextlib

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F

import model
from data import COLOURS, SHAPES

# ---- probes: what a linear map can read from frozen features ----
PAIRS = (('circle', 'ring'), ('square', 'cross'))           # the shapes hardest to tell apart


@torch.no_grad()
def features(umm, world, split: str, n: int):
    """-> (states of the picture's positions per layer [n_layer + 1, n * N, C], labels {task: [n * N]},
    -1 = not asked)."""
    scenes, r, _ = world.scenes(split, 'probe', 0, n)
    prompts = [[('what is where?', None)] for _ in scenes]
    states, hooks = [], []
    for block in umm.blocks:
        hooks.append(block.register_forward_hook(lambda block, given, out: states.append(out)))
    umm.hidden(data.pack(world.text, prompts, r.image, world.device))
    for hook in hooks:
        hook.remove()
    layers = [umm.embed_image(r.image), *states[:umm.c.n_layer]]      # the picture goes first, then text
    states = torch.stack([x.flatten(0, 1) for x in layers])                           # [.,n*N,C]
    labels = labels_of(scenes, objects_under(r, umm.c.patch))
    g = data.generator(world.seed, split, 'probe labels', 0)
    shape = labels['shape']                                                           # [n*N]
    drawn = torch.randint(len(SHAPES), shape.shape, generator=g)                      # [n*N]
    labels['control'] = torch.where(shape < 0, -1, drawn)
    return states.cpu(), labels


def objects_under(r: data.Rendering, patch: int) -> list:
    """For each patch of each picture the number of the object that covers half of it, 0: background,
    -1: nothing does."""
    each = F.one_hot(r.instance, 5).permute(0, 3, 1, 2).float()                       # [n,5,S,S]
    cover = F.avg_pool2d(each, patch).flatten(2)                                      # [n,5,N]
    most, number = cover.max(1)                                                       # [n,N]
    return torch.where(most >= .5, number, -1).tolist()


def labels_of(scenes, numbers) -> dict:
    """{task: [n * N]}: what is to be read from each patch; of the background no more than that."""
    labels = {'shape': [], 'colour': [], 'depth': [], 'object': []}
    colours = list(COLOURS)
    for scene, row in zip(scenes, numbers):
        for k in row:
            shape = colour = depth = -1
            if k > 0:
                o = scene.objects[k - 1]
                shape, colour = SHAPES.index(o.shape), colours.index(o.colour)
                depth = int(o.z > .5)
            labels['shape'].append(shape)
            labels['colour'].append(colour)
            labels['depth'].append(depth)
            labels['object'].append(min(k, 1))
    return {task: torch.tensor(values) for task, values in labels.items()}


def ridge(X, y, X_test, strength=1e-2):
    """Ridge regression to one-hot labels, closed form; X standardised, [n, C]. -> predictions."""
    mean = X.mean(0)
    std = X.std(0) + 1e-6

    def prepared(x):
        standard = (x - mean) / std
        return F.pad(standard, (0, 1), value=1.).double()                             # [n,C+1]

    A, Y = prepared(X), F.one_hot(y).double()
    penalty = strength * len(X) * torch.eye(A.shape[1], dtype=A.dtype)
    W = torch.linalg.solve(A.T @ A + penalty, A.T @ Y)                                # [C+1,classes]
    return (prepared(X_test) @ W).argmax(-1)


def accuracy(got, true) -> float:
    """Share of right predictions."""
    return (got == true).float().mean().item()


def balanced_accuracy(got, true) -> float:
    """Mean over the classes that occur of the share of them that is found."""
    rates = [accuracy(got[true == k], k) for k in true.unique()]
    return sum(rates) / len(rates)


def by_layer(X, y, X_test, y_test, score) -> list:
    """The score of a probe of each layer, fitted to X and y, on X_test and y_test."""
    asked = y >= 0
    asked_test = y_test >= 0
    scores = []
    for x, x_test in zip(X, X_test):                                                  # [n*N,C]
        got = ridge(x[asked], y[asked], x_test[asked_test])
        scores.append(score(got, y_test[asked_test]))
    return scores


def one_or_other(y, pair):
    """Labels of shape -> 0 and 1 for the shapes of the pair, -1 for all else."""
    first, second = [SHAPES.index(name) for name in pair]
    out = torch.full_like(y, -1)
    out[y == first] = 0
    out[y == second] = 1
    return out


def probe(umm, world, n=400) -> dict:
    """Balanced accuracy per task and layer on scenes that the probe has not seen (and accuracy on PAIRS
    of shapes). `control`: as shape, but random labels, scored on the patches that the probe was fitted
    to: what it can memorise (after Hewitt & Liang 2019)."""
    X, y = features(umm, world, 'train', n)
    X_test, y_test = features(umm, world, 'test', n // 2)
    scores = {}
    for task in y:
        if task == 'control':
            scores[task] = by_layer(X, y[task], X, y[task], balanced_accuracy)
        else:
            scores[task] = by_layer(X, y[task], X_test, y_test[task], balanced_accuracy)
    for pair in PAIRS:
        two = one_or_other(y['shape'], pair)
        two_test = one_or_other(y_test['shape'], pair)
        scores['/'.join(pair)] = by_layer(X, two, X_test, two_test, accuracy)
    return scores


# ---- attention: the softmax weights of the forward pass itself ----
POSITIONS = ('top', 'left', 'right', 'bottom', 'above', 'below', 'of')


@contextlib.contextmanager
def recorded():
    """Within, every call of model.attention leaves its weights [B, H, T, keys] in the list."""
    kept, original = [], model.attention

    def attention(q, k, v, mask):
        scores = (q * q.shape[-1] ** -.5) @ k.mT                                      # [B,H,T,keys]
        if mask is not None:
            scores = scores + mask
        kept.append(torch.softmax(scores, dim=-1))
        return kept[-1] @ v

    model.attention = attention
    try:
        yield kept
    finally:
        model.attention = original


def bucket(word: str) -> str:
    """object, colour, position or other: what a word of a prompt is about."""
    word = word.strip('.,?')
    if word in SHAPES or word in data.PLURAL.values():
        return 'object'
    if word in COLOURS:
        return 'colour'
    return 'position' if word in POSITIONS else 'other'


def buckets(text, line: str) -> list[str]:
    """The bucket of each token of a line; a comma is 'other', not its word's."""
    kinds = []
    for word in line.split():
        for token in text.encode(word):
            comma = text.decode([token]) == ','
            kinds.append('other' if comma else bucket(word))
    return kinds


@torch.no_grad()
def attention_shares(umm, tok, world, n=128) -> dict:
    """Per layer, mean over heads and pictures: see the two functions below."""
    scenes, r, rng = world.scenes('test', 'attention', 0, n)
    shares = shares_while_answering(umm, world, scenes, r, rng)
    return shares | shares_while_drawing(umm, tok, world, scenes, r, rng)


def shares_while_answering(umm, world, scenes, r, rng) -> dict:
    """From the position that answers 'where is the X?': the share of mass on the picture, on the patches
    of X, on text."""
    N = len(umm.rc)
    rows, numbers = [], []
    for scene in scenes:
        k = rng.randrange(len(scene.objects))
        o = scene.objects[k]
        rows.append([(f'where is the {o.name}?', data.CELLS[o.cell])])
        numbers.append(k + 1)
    s = data.pack(world.text, rows, r.image, world.device)
    with recorded() as kept:
        umm.hidden(s)
    at = (s.target >= 0).int().argmax(1)                   # where the answer's first word is predicted
    every = torch.arange(len(rows))
    numbers = torch.tensor(numbers, device=world.device)                              # [n]
    inside = (r.instance == numbers[:, None, None]).float()                           # [n,S,S]
    mine = F.max_pool2d(inside[:, None], umm.c.patch).flatten(1)                      # [n,N]
    shares = {'picture': [], 'asked object': [], 'text': []}
    for weights in kept[umm.c.n_layer:]:                   # after those of the picture itself
        w = weights[every, :, at].mean(1)                                             # [n,N+T]
        shares['picture'].append(w[:, :N].sum(1).mean().item())
        shares['asked object'].append((w[:, :N] * mine).sum(1).mean().item())
        shares['text'].append(w[:, N:].sum(1).mean().item())
    return shares


def shares_while_drawing(umm, tok, world, scenes, r, rng) -> dict:
    """From the codes that are drawn: the shares of the kinds of words, of prompt and plan, in the mass
    on text."""
    N = len(umm.rc)
    prompts = [data.caption(scene.objects, 'list', rng) for scene in scenes]
    plans = [world.describe(scene, 'place', rng) or '' for scene in scenes]
    s = data.pack(world.text, [[turn] for turn in zip(prompts, plans)], device=world.device)
    s.codes = tok.encode(r.image)
    with recorded() as kept:
        umm.hidden(s)
    T = s.text.shape[1]
    kinds = []
    for prompt, plan in zip(prompts, plans):
        row = [*buckets(world.text, prompt), 'other', *buckets(world.text, plan)]
        while len(row) < T:
            row.append('padding')
        kinds.append(row)
    shares = {}
    for name in ('object', 'colour', 'position', 'other'):
        here = torch.tensor([[kind == name for kind in row] for row in kinds], device=world.device)
        shares['draw: ' + name] = []
        for weights in kept:
            w = weights[:, :, -N:, :T].mean((1, 2))                                   # [n,T]
            share = (w * here).sum(1) / w.sum(1)                                      # [n]
            shares['draw: ' + name].append(share.mean().item())
    return shares
