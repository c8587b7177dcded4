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
from pathlib import Path

import data
from data import UserError
from experiments import check, coco, codraw, digits, pets, windows
from experiments.writer import Bad


# ---- command line ----
def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sub = p.add_subparsers(dest='set', required=True, metavar='SET')
    for name, module in (('pets', pets), ('coco', coco), ('codraw', codraw)):
        q = sub.add_parser(name, description=module.HELP, formatter_class=raw, allow_abbrev=False)
        q.add_argument('source', metavar='DOWNLOADS', type=Path, help='folder with the official files')
        q.add_argument('out', type=Path, help='folder to write; it must not exist')
        q.add_argument('--side', type=int, default=128,
                       help='longest side of the pictures written (default 128)')
        q.add_argument('--limit', type=int, default=0, help='pictures a split at most (default: all)')
        q.add_argument('--seed', type=int, default=0, help='of splits and questions (default 0)')
        q.add_argument('--skip-bad', '--skip_bad', action='store_true',
                       help='leave out pictures in which something is wrong, and count them')
        if name == 'coco':
            q.add_argument('--classes', default='', help='comma-separated; default: all, at most 254')
        q.set_defaults(run=module.write_folder)
    q = sub.add_parser('digits', description=digits.HELP, formatter_class=raw, allow_abbrev=False)
    q.add_argument('out', type=Path, help='folder to write; it must not exist')
    q.add_argument('--side', type=int, default=32, help='side of the pictures in pixels (default 32)')
    q.add_argument('--limit', type=int, default=8000, help='scenes to train on (default 8000)')
    q.add_argument('--seed', type=int, default=0, help='of scenes and questions (default 0)')
    q.set_defaults(run=digits.write_folder)
    q = sub.add_parser('windows', description=windows.__doc__, formatter_class=raw, allow_abbrev=False)
    q.add_argument('source', metavar='FOLDER', type=Path, help='one that train.py --data reads')
    q.add_argument('out', type=Path, help='folder to write; it must not exist')
    q.add_argument('--side', type=int, default=32, help='side of what is written (default 32)')
    q.add_argument('--each', type=int, default=2, help='windows a picture at most (default 2)')
    q.add_argument('--whole', action='store_true', help='whole pictures, made smaller')
    q.add_argument('--classes', type=int, default=12, help='that are asked about (default 12)')
    q.add_argument('--ground', default='', help='classes not asked about (default: the first)')
    q.add_argument('--without', default='', help='types of question to leave out')
    q.add_argument('--seed', type=int, default=0, help='of windows and questions (default 0)')
    q.set_defaults(run=windows.write_folder)
    q = sub.add_parser('check', description=check.__doc__, formatter_class=raw, allow_abbrev=False)
    q.add_argument('source', metavar='FOLDER', type=Path, help='one that train.py --data reads')
    q.add_argument('--out', default='check.png', help='picture to write (default check.png)')
    q.add_argument('--learnable', action='store_true', help='which questions can be learned at all?')
    a = p.parse_args(argv)
    if a.set != 'digits' and not a.source.is_dir():
        raise UserError(f'there is no folder {a.source}')
    if a.set == 'check':
        check.tell(a.source, a.out, a.learnable)
        return
    if a.out.exists():
        raise UserError(f'{a.out} is there already: name a new folder')
    if a.side < 16:
        raise UserError(f'--side is {a.side}: 16 pixels or more')
    if 'limit' in a and a.limit < 0:
        raise UserError(f'--limit is {a.limit}: no negatives')
    a.bad = Bad('skip_bad' in a and a.skip_bad)
    try:
        a.run(a)
    finally:
        a.bad.tell()


if __name__ == '__main__':
    data.guard(main)
