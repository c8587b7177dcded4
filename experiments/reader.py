"""How well do drawings of real pictures show what their captions say? A small CNN reads them.

    python -m experiments.reader --run out/mine

Of the procedural world a rule verifies drawings (eval.py); of real pictures nothing but another network
can. It learns from real pictures only, so it can be as wrong about a drawing as about a picture: its own
accuracy on true test pictures stands beside the score, and what it finds in drawings of other texts.
"""
import argparse
import math
from collections import Counter
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn as nn

import eval as evaluation
from data import DataSet, UserError
from model import drawn


class Reader:
    """Which words of a caption hold of a picture? Learned from the training split, from the words that
    2% to 98% of its captions contain."""

    def __init__(self, world: DataSet, steps=600, B=64, rare=.02):
        self.world = world
        texts, said = [], Counter()
        pictures = min(world.limit('train'), 20_000)
        for i in range(math.ceil(pictures / B)):
            batch = world.scenes('train', 'reader words', i, B, pixels=False)
            texts += self.captions(batch)
        for text in texts:
            said.update(self.words_of(text))
        self.words, weight = [], []
        for word, n in sorted(said.items()):
            often = n / len(texts)
            if rare <= often <= 1 - rare:
                self.words.append(word)
                weight.append(1 / often - 1)                   # rare words count more
        if not self.words:
            return                                             # there is nothing to tell apart
        weight = torch.tensor(weight)                                                 # [words]
        with torch.random.fork_rng():     # leave the caller's random numbers as they were
            torch.manual_seed(0)
            self.train(steps, B, nn.BCEWithLogitsLoss(pos_weight=weight))

    def captions(self, batch) -> list[str]:
        """Of a batch as scenes() gives it."""
        scenes, _, rng = batch
        return [self.world.describe(scene, 'list', rng) for scene in scenes]

    def words_of(self, text: str) -> set:
        """The distinct words of a caption, without what stands between them."""
        return {word for word in data.words_of(text) if word[0].isalnum()}

    def labels(self, texts):
        """Captions -> [n, words], 1 where the word is there."""
        rows = []
        for text in texts:
            said = self.words_of(text)
            rows.append([float(word in said) for word in self.words])
        return torch.tensor(rows)

    def train(self, steps: int, B: int, loss):
        """Three convolutions and a linear layer, on batches of real training pictures."""
        side = math.ceil(self.world.size / 8)                  # after three halvings
        layers = []
        for a, b in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU()]
        features = 128 * side ** 2
        layers += [nn.Flatten(), nn.Dropout(), nn.Linear(features, len(self.words))]
        self.net = nn.Sequential(*layers).to(self.world.device)
        # small pictures are learned by heart: dropout and weight decay work against that
        optimizer = torch.optim.AdamW(self.net.parameters(), 2e-3, weight_decay=.05)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        for step in range(steps):
            batch = self.world.scenes('train', 'reader', step, B)
            _, r, _ = batch
            logits = self.net(r.image).cpu()                                          # [B,words]
            labels = self.labels(self.captions(batch))                                # [B,words]
            loss(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
        self.net.eval()

    @torch.no_grad()
    def __call__(self, images, texts):
        """-> counts [n, words, (hits, true, right noes, false)] of what it reads in the pictures."""
        true = self.labels(texts) > 0                                                 # [n,words]
        read = self.net(images).cpu() > 0                                             # [n,words]
        hits = true & read
        noes = ~true & ~read
        counts = torch.stack([hits, true, noes, ~true], -1)                           # [n,words,4]
        return counts.double()


def balanced_accuracy(counts):
    """[words, (hits, true, right noes, false)] -> mean over words of the mean of both rates."""
    hits, true, noes, false = counts.unbind(-1)
    return ((hits / true + noes / false) / 2).nanmean()


def recognition(umm, tok, world: DataSet, n=192, cfg=2., split='test') -> dict:
    """Generation on real pictures: how well `Reader` tells the words of n captions in pictures drawn
    from them, mean over words of balanced accuracy (chance 1/2). `verifier`: in true pictures, that is
    its own accuracy; `ceiling`: in these after the tokenizer; `other`: in what other captions drew."""
    read = Reader(world)
    if not read.words:
        print('drawings cannot be scored: no word stands in 2% to 98% of the captions of train')
        return {}
    batch = world.scenes(split, 'generation', 0, n)
    _, r, _ = batch
    texts = read.captions(batch)
    drawings = drawn(umm, tok, world.text, texts, 0, cfg)                             # [n,3,S,S]
    pictures = {
        'mean': drawings,
        'verifier': r.image,
        'ceiling': tok.decode(tok.encode(r.image)),
        'other': drawings.roll(1, 0),
    }
    scores = {}
    for name, x in pictures.items():
        counts = read(x, texts)                                                       # [n,words,4]
        scores[name] = evaluation.bootstrap(balanced_accuracy, counts)
    return scores


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', required=True, help='run folder of a model of real pictures')
    p.add_argument('--n', type=int, default=192, help='captions to draw (default %(default)s)')
    p.add_argument('--data', default=None, help='the folder of real pictures, if it has moved')
    p.add_argument('--other_data', '--other-data', action='store_true',
                   help='measure although the data differ')
    p.add_argument('--split', default='test', choices=data.SPLITS[1:], help='default %(default)s')
    a = p.parse_args(argv)
    if a.n < 2:
        raise UserError(f'--n is {a.n}: it must be 2 or more')
    device = data.find_device()
    tok, umm, world, s = evaluation.open_run(Path(a.run), device, a.data, a.other_data)
    if umm is None:
        raise UserError(f'{a.run} cannot draw yet: only its tokenizer is trained')
    if not world.captions:
        raise UserError(f'{a.run} cannot draw: it has learned no captions')
    n = min(a.n, world.limit(a.split))
    figures = recognition(umm, tok, world, n, s.get('cfg', 2.), a.split)
    for name, figure in figures.items():
        print(f'{name:9} {evaluation.as_text(figure)}')


if __name__ == '__main__':
    data.guard(main)
