"""Restorations: the picture is to be drawn, but what the model reads is spoilt.

Each takes pictures x [B, 3, S, S] in [0, 1] and random numbers u of that size -> [B, 3, S, S].
"""
import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F

import train


def noisy(x, u):
    """Uniform noise of +-.35, clipped."""
    return (x + .7 * (u - .5)).clamp(0, 1)


def blurred(x, u):
    """The mean of 7 x 7 pixels around each."""
    padded = F.pad(x, (3, 3, 3, 3), mode='replicate')                                 # [B,3,S+6,S+6]
    return F.avg_pool2d(padded, 7, 1)                                                 # [B,3,S,S]


def coarse(x, u):
    """A quarter of the resolution."""
    return F.interpolate(F.avg_pool2d(x, 4), x.shape[2:])                             # [B,3,S,S]


def with_holes(x, u):
    """40% of the squares of 8 x 8 pixels made grey."""
    chance = u[:, :1, ::8, ::8]                            # one number for 8 x 8 pixels
    squares = F.interpolate(chance, x.shape[2:])                                      # [B,1,S,S]
    return torch.where(squares < .4, .5, x)


def taught(spoil) -> train.Control:
    """As train.py teaches maps, but the pictures are spoilt before the model reads them."""
    def map_loss(run, index, seq, target, r):
        g = data.generator(run.s.seed, 'train', 'maps spoilt', index)
        u = torch.rand(seq.image.shape, generator=g)                                  # [B,3,S,S]
        seq.image = spoil(seq.image, u.to(run.device))
        return train.generated(run, index, seq, target, r)

    return train.Control(map_loss=map_loss)


# arm: (how it is taught, with `recon` as the map; its colour in figures)
RESTORATIONS = {
    'denoise': (taught(noisy), '#8c564b'),
    'deblur': (taught(blurred), '#e377c2'),
    'superres': (taught(coarse), '#17becf'),
    'inpaint': (taught(with_holes), '#bcbd22'),
}
