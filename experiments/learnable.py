"""Which questions of a folder can be learned at all? A small supervised CNN against the blind guess.

    python -m experiments.learnable DIR          some minutes on one core; prints a table, as does
    python -m experiments.prepare check DIR --learnable

A type of question is worth measuring if the CNN, which is trained on nothing else, beats the answer that
is the most frequent for the same words by 15 points on validation. What it cannot learn from a folder's
pictures at this size says little about a model that fails there. The CNN reads the question with a GRU,
which scales and shifts its features (FiLM, Perez et al. 2018), and chooses among the answers of train.
"""
import argparse
from collections import Counter

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from eval import blind
from folder import Folder

ENOUGH = .15                   # by so much the CNN must beat the blind guess
EACH = 4                       # questions asked about a picture of a batch
LONGEST = 24                   # words of a question that are read


class Block(nn.Module):
    """A residual convolution, whose features the question scales and shifts."""

    def __init__(self, width: int, read: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.film = nn.Linear(read, 2 * width)

    def forward(self, x, question):
        """x [n, width, s, s], question [n, read] -> [n, width, s, s]."""
        scale, shift = self.film(question)[:, :, None, None].chunk(2, 1)              # [n,width,1,1]
        y = self.norm(self.conv(x))
        return x + F.gelu(y * (1 + scale) + shift)


class Net(nn.Module):
    """Pictures and questions -> logits of the answers."""

    def __init__(self, words: int, answers: int, width=64, read=96):
        super().__init__()
        self.embedding = nn.Embedding(words, read, padding_idx=0)
        self.gru = nn.GRU(read, read, batch_first=True)
        self.first = nn.Conv2d(5, width, 3, 2, 1)              # colours and coordinates
        self.second = nn.Conv2d(width, width, 3, 2, 1)
        self.norm = nn.GroupNorm(8, width)
        self.blocks = nn.ModuleList([Block(width, read) for _ in range(3)])
        self.wide = nn.Linear(2 * width, 128)
        self.head = nn.Linear(128, answers)

    def forward(self, image, question):
        """image [B, 3, S, S]; question [B, Q, LONGEST], numbers of words -> [n, answers], n = B * Q."""
        B, _, S, _ = image.shape
        axis = torch.linspace(-1, 1, S, device=image.device)
        across = axis.expand(B, 1, S, S)
        seen = torch.cat([image, across, across.mT], 1)                               # [B,5,S,S]
        x = F.gelu(self.first(seen))                                                  # [B,width,S/2,S/2]
        x = F.gelu(self.norm(self.second(x)))                                         # [B,width,S/4,S/4]
        x = x.repeat_interleave(question.shape[1], 0)                                 # [n,...]
        _, last = self.gru(self.embedding(question.flatten(0, 1)))                    # [1,n,read]
        for block in self.blocks:
            x = block(x, last[0])
        x = x.flatten(2)                                                              # [n,width,s*s]
        pooled = torch.cat([x.mean(-1), x.amax(-1)], -1)                              # [n,2*width]
        y = F.gelu(self.wide(pooled))                                                 # [n,128]
        return self.head(F.dropout(y, .2, self.training))


class Numbers:
    """Words of questions and whole answers of train as numbers; 0 stands for what train never says."""

    def __init__(self, world: Folder):
        words, answers = set(), set()
        for row in world.rows['train']:
            for _, (question, answer) in row['qa']:
                words.update(question.split())
                answers.add(answer)
        self.words = {word: i for i, word in enumerate(sorted(words), 1)}
        self.answers = {answer: i for i, answer in enumerate(sorted(answers), 1)}

    def of(self, turns):
        """B lists of (type, (question, answer)), equally long -> questions [B, Q, LONGEST], answers
        [B, Q]. The last words stand at the end: the GRU reads them last."""
        questions, answers = [], []
        for row in turns:
            for _, (question, answer) in row:
                read = [self.words.get(word, 0) for word in question.split()][-LONGEST:]
                questions.append([0] * (LONGEST - len(read)) + read)
                answers.append(self.answers.get(answer, 0))
        Q = len(turns[0])
        questions = torch.tensor(questions).view(-1, Q, LONGEST)                      # [B,Q,LONGEST]
        return questions, torch.tensor(answers).view(-1, Q)                           # [B,Q]


def trained(world: Folder, numbers: Numbers, steps: int, B=32) -> Net:
    """On random questions about random training pictures."""
    torch.manual_seed(0)
    net = Net(len(numbers.words) + 1, len(numbers.answers) + 1)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)    # its highest learning rate
    asked = [row for row in world.rows['train'] if row['qa']]
    for step in tqdm(range(steps), 'cnn'):
        rng = data.python_random(world.seed, 'train', 'learnable', step)
        rows = rng.choices(asked, k=B)
        turns = [rng.choices(row['qa'], k=EACH) for row in rows]
        question, answer = numbers.of(turns)
        chosen = [row['index'] for row in rows]
        image = world.arrays['train.image'][chosen] / 255                             # [B,3,S,S]
        logits = net(image, question)
        F.cross_entropy(logits, answer.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: Net, world: Folder, numbers: Numbers, split='val') -> dict:
    """{type: share of right answers} to all questions of a split."""
    right, total = Counter(), Counter()
    for row in world.rows[split]:
        if not row['qa']:
            continue
        question, answer = numbers.of([row['qa']])
        at = row['index']
        image = world.arrays[f'{split}.image'][at:at + 1] / 255                       # [1,3,S,S]
        given = net(image, question).argmax(-1)                                       # [Q]
        good = (given == answer[0]) & (given > 0)
        for (kind, _), one in zip(row['qa'], good.tolist()):
            total[kind] += 1
            right[kind] += one
    return {kind: right[kind] / total[kind] for kind in sorted(total)}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument('folder', help='as of train.py --data')
    p.add_argument('--size', type=int, default=32, help='side of the pictures (default 32)')
    p.add_argument('--steps', type=int, default=1500, help='of the CNN (default 1500)')
    p.add_argument('--n', type=int, default=512, help='pictures for the blind guess (default 512)')
    p.add_argument('--threads', type=int, default=1, help='CPU threads (default 1)')
    a = p.parse_args(argv)
    for name, least in (('size', 16), ('steps', 1), ('n', 1), ('threads', 1)):
        value = getattr(a, name)
        if value < least:
            raise data.UserError(f'--{name} is {value}: {least} or more')
    torch.set_num_threads(a.threads)
    print_table(Folder(a.folder, a.size), a.steps, a.n)


def print_table(world: Folder, steps=1500, n=512):
    """Each type of question: the CNN, the blind guess, is it kept?"""
    if not world.kinds:
        raise data.UserError(f'{world.root} has no questions')
    guess = blind(world, n, 'val')
    numbers = Numbers(world)
    seen = accuracy(trained(world, numbers, steps), world, numbers)
    print('| question | CNN | blind | kept |\n|---|---|---|---|')
    for kind, share in seen.items():
        words_alone = guess[kind]['value']
        kept = 'yes' if share >= words_alone + ENOUGH else 'no'
        print('| {} | {:.3f} | {:.3f} | {} |'.format(kind, share, words_alone, kept))


if __name__ == '__main__':
    data.guard(main)
