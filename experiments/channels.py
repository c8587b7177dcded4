"""What a map says times how it is taught: the arms of the plans `channel`, `content`, `budget`, `known`.

Semantic Generative Tuning generates segmentation maps. Is it the generating that helps, or the labels
that the maps carry? The same content is taught through other channels, about the same pictures, in the
same order, with the same weight:

    order      generated: codes one after another, each sees the earlier ones
    blind      generated: all codes at once, none sees another
    mixture    three rows in four blind, one in order: what train.py does
    masked     generated: a random share of the codes is hidden, the others are seen from both sides
               (MaskGIT, Chang et al. 2022, section 3.1): the counterpart of a flow-matching head
    readout    nothing is generated: the picture's own last states say the map's codes, patch by patch
    told       nothing is generated: an answer in words says which shape is where

    python -m experiments.channels          counts the FLOPs of a step of some, for GFLOPS below
"""
import argparse
import math
import tempfile

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from data import MAPS, Rendering
from model import KV

# GFLOPs of a step of post-training, cpu preset: what this file counts, of `sft-flops` and so on
GFLOPS = {'sft': 15.46, 'seg-readout': 19.04, 'seg-told': 19.32, 'seg-order': 22.37}
# So many steps cost as much as one in which maps are generated
LONGER = {name: GFLOPS['seg-order'] / count for name, count in GFLOPS.items()}


# ---- contents: Rendering -> the map that is taught, [B, 3, S, S] ----
def regions(r: Rendering):
    """Each object in a colour of its own, in reading order: no names, but one right answer."""
    return data.seg_map(r._replace(classes=r.instance))


def silhouette(r: Rendering):
    """Object or not, in one colour."""
    return data.seg_map(r._replace(classes=(r.instance > 0).long()))


def cutout(r: Rendering):
    """The picture without its background."""
    return r.image * (r.instance > 0)[:, None]                                        # [B,3,S,S]


def blank(r: Rendering):
    """Black: there is nothing to learn. A control."""
    return torch.zeros_like(r.image)


# ---- channels: the loss of one batch, as train.generated ----
def nothing_before(umm) -> list:
    """Empty keys and values, of each layer."""
    return [KV() for _ in umm.blocks]


def readout(run, index: int, seq, target, r):
    """A classifier of patches: the picture's last states -> pixel head -> the codes of the map. No code
    of the map and no instruction is read."""
    umm = run.umm
    codes = run.tok.encode(target)                                                    # [B,N]
    with train.precision(run):
        x = umm.read(seq.image, nothing_before(umm))                                  # [B,N,C]
        logits = umm.pixel_head(x)                                                    # [B,N,K]
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())


def masked(run, index: int, seq, target, r):
    """The codes of the map, of which a random share is hidden: cos(pi/2 u), u uniform. Each code reads
    the picture, the instruction and all codes that are shown; the loss is that of the hidden ones."""
    codes = run.tok.encode(target)                                                    # [B,N]
    B, N = codes.shape
    share = torch.cos(math.pi / 2 * torch.rand(B, 1, device=codes.device))
    hidden = torch.rand(B, N, device=codes.device) < share                            # [B,N]
    hidden[0, 0] = True                                        # one at least
    logits = logits_of_masked(run, seq, codes, hidden)                                # [B,N,K]
    return F.cross_entropy(logits[hidden].float(), codes[hidden])


def logits_of_masked(run, seq, codes, hidden, both_sides=True):
    """-> [B, N, K] at each place of the map; hidden [B, N]: which codes the input does not show."""
    umm = run.umm
    B, N = codes.shape
    T = seq.text.shape[1]
    shown = torch.where(hidden, umm.c.codebook, codes)         # the start symbol for a hidden code
    turn = F.pad(seq.turn, (0, N), value=1)                                           # [B,T+N]
    see, at = umm.places(turn, T, 0)                                        # [B,T+N,T+N], [B,T+N,2]
    if both_sides:
        see[:, T:, T:] = True
    see = F.pad(see, (N, 0), value=True)                                              # [B,T+N,N+T+N]
    with train.precision(run):
        kvs = nothing_before(umm)
        umm.read(seq.image, kvs)                               # its keys are in kvs from now on
        text = umm.embed_text(seq.text, seq.turn)                                     # [B,T,C]
        places = umm.code_embed(shown) + umm.position()                               # [B,N,C]
        x = torch.cat([text, places], 1)                                              # [B,T+N,C]
        mask = torch.where(see, 0., -1e4).to(x.dtype)[:, None]                        # [B,1,T+N,N+T+N]
        x = umm.through_blocks(x, at, mask, kvs)
        return umm.pixel_head(x[:, T:])                                               # [B,N,K]


def told(run, index: int, seq, target, r):
    """What the map of classes shows, as an answer in words: 'top left a ring, bottom right a circle'."""
    ask = MAPS['seg'].words[0]
    rows = [[(ask, words)] for words in in_words(r)]
    s = data.pack(run.world.text, rows, seq.image, run.device)
    loss, _ = train.losses_of(run, s)
    return loss


def in_words(r: Rendering) -> list[str]:
    """For each picture the shapes and where they are: read off the map, nothing else is known."""
    S = r.classes.shape[-1]
    texts = []
    for classes, instance in zip(r.classes, r.instance):                              # [S,S]
        said = []
        for number in range(1, int(instance.max()) + 1):       # in reading order
            mine = instance == number
            if not mine.any():                                 # another object hides it
                continue
            y, x = mine.nonzero().float().mean(0).tolist()
            cell = 2 * int(y >= S / 2) + int(x >= S / 2)
            name = data.CLASSES[int(classes[mine][0])]
            said.append(f'{data.CELLS[cell]} a {name}')
        texts.append(', '.join(said))
    return texts


def frozen(run, index: int, seq, target, r):
    """As train.py does it, but no block learns from it: embeddings and heads alone."""
    run.umm.blocks.requires_grad_(False)                       # for the graph of this loss alone
    loss = train.generated(run, index, seq, target, r)
    run.umm.blocks.requires_grad_(True)
    return loss


def shuffled(run, index: int, seq, target, r):
    """As train.py does it, with the map of another picture for each."""
    return train.generated(run, index, seq, target.roll(1, 0), r)


def in_turns(run, index: int, seq, target, r):
    """Reconstruction, depth and segmentation, a batch each in turn (UniMRG, arXiv 2601.21406)."""
    names = ('recon', 'depth', 'seg')
    name = names[index % len(names)]
    return train.generated(run, index, seq, MAPS[name].draw(r), r)


def teaching(content, channel=train.generated) -> train.Control:
    """The control that teaches a content through a channel."""

    def map_loss(run, index, seq, target, r):
        return channel(run, index, seq, content(r), r)

    return train.Control(map_loss=map_loss)


# ---- FLOPs ----
def flops_a_step(run: train.Run, steps: int) -> float:
    """Mean over `steps` steps of post-training, spread over the stage, of the FLOPs of all products:
    forward, backward and the tokenizer's. Nothing is learned."""
    s = run.s
    counted = 0
    for i in range(steps):
        step = s.post_steps * i // steps
        _, _, part = run.control.shares(s, step)
        with FlopCounterMode(display=False) as counter:
            maps = train.maps_a_step(run)
            losses = train.umm_losses(run, s.pre_steps + step, s.post_ask, s.post_draw, maps, s.w_text,
                                      s.w_draw, part)
            losses['loss'].backward()
        counted += counter.get_total_flops()
        run.umm.zero_grad()
    return counted / steps


def main():
    """Print the FLOPs of a step of each arm of the plan `channel`."""
    from experiments import reproduce
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('--init', default='out/cpu/pretrained.safetensors', help='default %(default)s')
    a = p.parse_args()
    for name in reproduce.PLANS['channel']:
        arm = reproduce.ARMS[name]
        with tempfile.TemporaryDirectory() as out:
            values = {'init': a.init, 'out': out, 'proxy': arm.proxy, 'dtype': 'float32', **arm.flags}
            s = train.parse(reproduce.as_flags(values))
            run = train.Run(s, data.find_device('cpu'))
        run.control = arm.control
        print(f'{name}: {flops_a_step(run, 10) / 1e9:.2f} GFLOPs a step')


if __name__ == '__main__':
    data.guard(main)
