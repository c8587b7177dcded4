"""CoDraw's scenes of clip art (Kim et al. 2019) from the official files: drawn, with exact masks.

    python -m experiments.prepare codraw DOWNLOADS OUT

A scene is a text, `abs_t`: the number of pieces, then for each piece the name of its PNG, three numbers
that the name tells too, its middle in pixels of a canvas of 500 x 400, how far away it is (0, 1 or 2)
and whether it is mirrored. Pieces in the sky lie behind all others, the sun behind all of these; then
what is far lies behind what is near.
"""
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data import UserError
from experiments.writer import Writer, listed, questions_about
from folder import upright

HELP = """Fetch CoDraw_1_0.json from https://github.com/facebookresearch/CoDraw (its folder dataset)
and the folder Pngs of Abstract Scenes 1.1 (Zitnick, Parikh: Bringing Semantics Into Focus, CVPR 2013),
as that repository says, into DOWNLOADS. Licence: CC BY-NC 4.0, non-commercial. Cite Kim et al.: CoDraw,
ACL 2019. The official splits stay. Questions about single pieces need windows: the command `windows`."""
CANVAS = (500, 400)
SCALES = (1., .7, .49)         # of a piece that is near, farther and far away
LENGTH = 8                     # values that describe a piece
GROUND = ('sky', 'grass')      # classes of the background
# What the PNGs show: kind of piece -> names in order of their numbers; the kinds in drawing order. Of
# the children there are 35 PNGs each, of 7 poses with 5 faces.
NAMES = {
    's': ('helicopter', 'hot air balloon', 'cloud', 'sun', 'lightning cloud', 'rain cloud', 'rocket',
          'airplane'),
    'p': ('bee spring toy', 'slide', 'sandbox', 'grill', 'swing set', 'tent', 'picnic table',
          'pine tree', 'oak tree', 'apple tree'),
    'hb0': ('boy',) * 35,
    'hb1': ('girl',) * 35,
    'a': ('bear', 'cat', 'dog', 'duck', 'owl', 'snake'),
    'c': ('blue cap', 'crown', 'chef hat', 'pirate hat', 'winter hat', 'propeller hat', 'wizard hat',
          'viking hat', 'purple glasses', 'sunglasses'),
    'e': ('pie', 'pizza', 'hot dog', 'ketchup', 'mustard', 'hamburger', 'soda cup'),
    't': ('baseball', 'sand bucket', 'beach ball', 'basketball', 'soccer ball', 'tennis ball',
          'football', 'frisbee', 'baseball bat', 'balloons', 'baseball glove', 'shovel',
          'tennis racket', 'kite', 'campfire'),
}
KINDS = list(NAMES)
CLASSES = list(dict.fromkeys([*GROUND, *[name for names in NAMES.values() for name in names]]))
LEAST = .002                   # share of the canvas; what shows less of itself is not spoken of


class Piece(NamedTuple):
    """A piece of clip art in a scene."""
    png: str                   # such as hb0_12s.png
    kind: str                  # as in NAMES
    number: int
    name: str                  # such as boy
    x: float                   # of its middle, in pixels of the canvas
    y: float
    depth: int                 # 0 near, 1, 2 far
    mirrored: bool

    @property
    def order(self) -> tuple:
        """Pieces are drawn in this order."""
        in_the_sky = self.kind == 's'
        return self.name != 'sun', not in_the_sky, -self.depth, KINDS.index(self.kind), self.number


def pieces_of(scene: str) -> list[Piece]:
    """Of a scene's text; ValueError, KeyError or IndexError for what is none."""
    n, *values = scene.rstrip(',').split(',')
    if len(values) != int(n) * LENGTH:
        raise ValueError(f'{n} pieces need {int(n) * LENGTH} values, there are {len(values)}')
    found = []
    for i in range(0, len(values), LENGTH):
        png, _, _, _, x, y, depth, mirrored = values[i:i + LENGTH]
        if depth not in ('0', '1', '2'):
            raise ValueError(f'depth is {depth!r}: 0, 1 or 2')
        kind, number = png.removesuffix('s.png').split('_')
        name = NAMES[kind][int(number)]
        is_mirrored = mirrored == '1'
        found.append(Piece(png, kind, int(number), name, float(x), float(y), int(depth), is_mirrored))
    return found


class Drawer:
    """Draws scenes from the PNGs in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pngs = {}                                         # {name: picture with its alpha}
        path = folder / 'background.png'
        self.background = upright(path).resize(CANVAS)
        _, green, blue = np.moveaxis(np.array(self.background).astype(int), -1, 0)    # [H,W]
        self.ground = (green > blue).astype(np.uint8)          # 0 sky, 1 grass

    def png(self, name: str) -> Image.Image:
        """Decoded once."""
        if name not in self.pngs:
            try:
                self.pngs[name] = Image.open(self.folder / name).convert('RGBA')
            except OSError as e:
                raise UserError(f'cannot read {self.folder / name} ({e})')
        return self.pngs[name]

    def draw(self, pieces: list[Piece]):
        """-> (picture, mask of classes, [(name, box [x0, y0, x1, y1))] of what is seen), the nearest
        objects last."""
        image = self.background.copy()
        owner = np.zeros(CANVAS[::-1], np.uint8)               # [H,W] which piece is seen, from 1 on
        pieces = sorted(pieces, key=lambda piece: piece.order)
        for i, piece in enumerate(pieces, 1):
            layer = self.png(piece.png)
            size = [max(1, round(v * SCALES[piece.depth])) for v in layer.size]
            layer = layer.resize(size, Image.BOX)
            if piece.mirrored:
                layer = ImageOps.mirror(layer)
            corner = round(piece.x - size[0] / 2), round(piece.y - size[1] / 2)
            image.paste(layer, corner, layer)
            alone = Image.new('L', CANVAS)
            alone.paste(layer.getchannel('A'), corner)         # what lies outside is cut off
            owner[np.array(alone) >= 128] = i
        mask = self.ground.copy()
        found = []
        for i, piece in enumerate(pieces, 1):
            mine = owner == i
            mask[mine] = CLASSES.index(piece.name)
            if mine.mean() > LEAST:
                found.append((piece.name, Image.fromarray(mine).getbbox()))
        return image, Image.fromarray(mask), found


def scenes_in(folder: Path):
    """-> (split, key, the scene's text) of CoDraw_1_0.json."""
    path = folder / 'CoDraw_1_0.json'
    try:
        scenes = json.loads(path.read_text('utf-8-sig'))['data']
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f'cannot read {path} ({e!r:.80}): see -h for where to get it')
    splits = {'train': 'train', 'val': 'validation', 'test': 'test'}
    for key in sorted(scenes):                                 # such as train_00003
        split = splits.get(key.split('_')[0])
        if split:
            yield split, key, scenes[key]


def write_folder(a):
    """The command `codraw`."""
    drawer = Drawer(a.source / 'Pngs')
    rng = random.Random(a.seed)
    with Writer(a.out, a.side, CLASSES) as writer:
        for split, key, scene in scenes_in(a.source):
            if a.limit and writer.count[split] >= a.limit:
                continue
            try:
                pieces = pieces_of(scene['abs_t'])
                image, mask, found = drawer.draw(pieces)
            except (UserError, LookupError, TypeError, ValueError, AttributeError) as e:
                a.bad.note(f'{key}: {e}')
                continue
            # what shows too little of itself is neither there nor absent
            hardly = {piece.name for piece in pieces} - {name for name, _ in found}
            names = [name for name in CLASSES[len(GROUND):] if name not in hardly]
            qa = questions_about(found, names, image.width, rng, False)
            writer.row(split, image, mask, found, caption=listed(found), qa=qa)
