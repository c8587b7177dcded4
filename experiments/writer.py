"""What the converters of experiments/prepare.py share: a folder that is written whole, and captions and
questions from the names and boxes of objects.
"""
import json
import shutil
from collections import Counter
from pathlib import Path

from PIL import Image

import data
from data import UserError

SPLITS = ('train', 'validation', 'test')


# ---- the folder ----
class Bad:
    """What is wrong with a download: the end or, with --skip-bad, counted and left out."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.found = []

    def note(self, why: str):
        self.found.append(' '.join(why.split())[:400])
        if not self.skip:
            raise UserError(f'{self.found[-1]}. To leave out what is wrong: --skip-bad')

    def tell(self):
        if self.found:
            print(f'left out {len(self.found)} that are wrong, such as')
            for why in self.found[:5]:
                print(f'  {why}')


class Writer:
    """Writes OUT/{split}/images, masks and metadata.jsonl; the folder appears only when complete."""

    def __init__(self, out: Path, side: int, classes: list):
        if len(classes) > 255:
            raise UserError(f'{len(classes)} classes: an indexed mask holds 255; name fewer with '
                            '--classes')
        if len(set(classes)) < len(classes):
            raise UserError(f'a class is named twice: {classes!r:.300}')
        self.out = out
        self.part = out.with_name(out.name + '.part')          # until it is complete
        if self.part.exists():
            raise UserError(f'{self.part} is there: left by a run that was killed? Delete it')
        self.side = side
        self.count = Counter()                                 # pictures by split
        self.empty = 0                                         # pictures without objects
        self.others = 0                                        # left out: none of the classes wanted
        self.boxes = 0                                         # how many stand for masks
        self.files = {}
        for split in SPLITS:
            folder = self.part / split
            (folder / 'images').mkdir(parents=True)
            (folder / 'masks').mkdir()
            self.files[split] = open(folder / 'metadata.jsonl', 'w', encoding='utf-8')
        text = json.dumps({'mask_classes': classes})
        (self.part / 'classes.json').write_text(text)

    def row(self, split: str, image, mask, objects=(), **said):
        """image, mask: PIL, of one size; objects: (name, box [x0, y0, x1, y1) in its pixels)."""
        scale = min(1, self.side / max(image.size))
        size = tuple(max(1, round(v * scale)) for v in image.size)
        folder = self.part / split
        name = f'{self.count[split]:06d}.png'
        small = image.convert('RGB').resize(size, Image.BOX)
        small.save(folder / 'images' / name)
        small_mask = mask.resize(size, Image.NEAREST)
        small_mask.save(folder / 'masks' / name)
        found = []
        for what, box in objects:
            box = [round(v * scale, 1) for v in box]
            found.append({'name': what, 'bbox': box})
        row = {'file_name': f'images/{name}', 'mask': f'masks/{name}', **said, 'objects': found}
        self.files[split].write(json.dumps(row) + '\n')
        self.count[split] += 1

    def scenes(self, rows):
        """All of (split, picture, mask, [(name, box)], caption, [(type, question, answer)])."""
        for split, image, mask, objects, caption, asked_of_it in rows:
            qa = [question(*words) for words in asked_of_it]
            self.row(split, image, mask, objects, caption=caption, qa=qa)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for file in self.files.values():
            file.close()
        empty = [split for split in SPLITS if not self.count[split]]
        if kind or empty:
            shutil.rmtree(self.part, ignore_errors=True)
        if kind:
            return
        if empty:
            raise UserError(f'no pictures for {empty[0]}: {dict(self.count)}; is the download complete? '
                            'Where splits are missing, ten pictures are needed at least')
        self.part.rename(self.out)
        if self.boxes:
            print(f'{self.boxes} objects have no polygon: their boxes stand for their masks')
        if self.empty:
            print(f'{self.empty} pictures have no objects: all background')
        if self.others:
            print(f'{self.others} pictures have objects, but of no class wanted: left out')
        counts = [f'{self.count[split]} {split}' for split in SPLITS]
        print(f'wrote {self.out}: ' + ', '.join(counts))


# ---- words ----
def plural(name: str) -> str:
    if name.endswith(('s', 'x', 'ch', 'sh')):
        return name + 'es'
    return name + 's'


def third(low: float, high: float, whole: float) -> str:
    """Where the middle of low..high, (low + high) / 2, lies in 0..whole."""
    k = int(1.5 * (low + high) / whole)
    return ('left', 'center', 'right')[min(2, k)]


def question(kind: str, text: str, answer: str) -> dict:
    """As it stands in metadata.jsonl."""
    return {'question': text, 'answer': answer, 'type': kind}


def yes_no(thing: str, there: bool) -> dict:
    answer = 'yes' if there else 'no'
    return question('exist', f'Is there {with_article(thing)} in the picture?', answer)


def with_article(name: str) -> str:
    """'an oak tree'."""
    article = 'an' if name[0] in 'aeiou' else 'a'
    return f'{article} {name}'


# ---- captions and questions from boxes ----
# found: [(name, box [x0, y0, x1, y1])], the largest first.
def listed(found: list, crowds=()) -> str:
    """'a dog, a car and two persons': the five largest kinds, then names of which there is a crowd."""
    count = Counter(name for name, _ in found)
    words = []
    for name, n in list(count.items())[:5]:
        if n == 1:
            words.append(with_article(name))
        else:
            number = data.NUMBERS[n] if n < 5 else 'many'
            words.append(f'{number} {plural(name)}')
    words += [f'many {plural(name)}' for name in dict.fromkeys(crowds) if name not in count]
    return data.and_between(words) if words else 'nothing'


def questions_about(found: list, names: list, width: int, rng, crowd: bool) -> list:
    """Existence (one yes, one no), counting up to four, where things are, relation and size of pairs.
    In a crowd nothing is counted, and what was not found may be there."""
    count = Counter(name for name, _ in found)
    there = sorted(count)
    absent = sorted(set(names) - set(count))
    qa = []
    if found:
        qa.append(yes_no(rng.choice(there), True))
    if absent and not crowd:
        qa.append(yes_no(rng.choice(absent), False))
    for name in rng.sample(there, min(2, len(there))):
        if count[name] <= 4 and not crowd:
            qa.append(question('count', f'How many {plural(name)} are there?', str(count[name])))
    box_of = {name: box for name, box in found if count[name] == 1}
    alone = sorted(box_of)                                     # a name means one object
    if alone:
        name, = rng.sample(alone, 1)
        x0, _, x1, _ = box_of[name]
        qa.append(question('position', f'Where is the {name}?', third(x0, x1, width)))
    if len(alone) > 1:
        a, b = rng.sample(alone, 2)
        qa += compared(a, b, box_of)
    return qa


def compared(a: str, b: str, box_of: dict) -> list:
    """Questions about two objects: which is where, if they are side by side, and which is larger, if
    that is clear."""
    qa = []
    left_of_a, top_of_a, right_of_a, bottom_of_a = box_of[a]
    left_of_b, top_of_b, right_of_b, bottom_of_b = box_of[b]
    if right_of_a <= left_of_b or right_of_b <= left_of_a:
        answer = 'left' if right_of_a <= left_of_b else 'right'
        qa.append(question('relation', f'Is the {a} to the left or right of the {b}?', answer))
    area_of_a = (right_of_a - left_of_a) * (bottom_of_a - top_of_a)
    area_of_b = (right_of_b - left_of_b) * (bottom_of_b - top_of_b)
    if max(area_of_a, area_of_b) > 1.8 * min(area_of_a, area_of_b):
        answer = a if area_of_a > area_of_b else b
        text = f'Which is larger in the picture, the {a} or the {b}?'
        qa.append(question('larger', text, answer))
    return qa
