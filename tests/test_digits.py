"""Scenes of digits from fake handwriting; what prepare writes of them is read by folder.Folder."""
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data import COLOURS, UserError
from experiments import digits, prepare
from folder import Folder


def handwriting():
    """20 blocks of ink for each digit -> (pictures [200, 28, 28], labels [200])."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 20)
    pictures = np.zeros((200, 28, 28), np.uint8)
    for picture, label in zip(pictures, labels):
        height, width = rng.integers(12, 21, 2)
        picture[4:4 + height, 4:4 + width] = 255
    return pictures, labels


def all_scenes(n=64, seed=0) -> list:
    pictures, labels = handwriting()
    return list(digits.scenes(pictures, labels, 32, n, seed))


def test_no_hand_writes_in_two_splits():
    _, labels = handwriting()
    hands = digits.dealt(labels, 0)
    of_split = [sum(hands[split], []) for split in ('train', 'validation', 'test')]
    assert [len(found) for found in of_split] == [160, 20, 20]
    together = sum(of_split, [])
    assert sorted(together) == list(range(200))            # each one once
    for found in of_split:
        for number, mine in enumerate(hands['train']):
            assert (labels[mine] == number).all()
        scene = digits.sampled(hands['test'], random.Random(0))
        for digit in scene:
            assert digit.exemplar in hands['test'][digit.number]


def test_masks_are_exact():
    for _, image, mask, objects, _, _ in all_scenes():
        pixels = np.array(image) / 255                                                # [32,32,3]
        classes = np.array(mask)                                                      # [32,32]
        for name, (x0, y0, x1, y1) in objects:
            colour, number = name.split()
            own = np.zeros((32, 32), np.uint8)             # its box, then what is inked in it
            own[y0:y1, x0:x1] = 1
            own[classes == 0] = 0
            assert Image.fromarray(own).getbbox() == (x0, y0, x1, y1)
            inside = own > 0
            assert (classes[inside] == int(number) + 1).all()
            # half ink or more, so nearer to the colour than any ground is
            far = np.abs(pixels[inside] - COLOURS[colour]).max(-1)
            assert far.max() < .5
            assert np.median(far) < .01
            classes[inside] = 0
        assert not classes.any()                           # no class outside of the boxes


def test_answers_are_those_of_the_scene():
    a = digits.Digit(3, 'red', 0, 0)
    b = digits.Digit(8, 'blue', 1, 0)
    asked = set()
    rng = random.Random(0)
    for _ in range(20):                                    # what is asked of pairs differs
        asked |= set(digits.questions([a, b], rng))
    assert ('count', 'how many digits are there?', '2') in asked
    assert ('what', 'what is at the top left?', 'red 3') in asked
    assert ('where', 'where is the blue digit?', 'top right') in asked
    assert ('digit', 'which digit is blue?', '8') in asked
    assert ('find', 'where is the 3?', 'top left') in asked
    assert ('colour', 'what color is the 8?', 'blue') in asked
    assert ('exist', 'is there a red 3?', 'yes') in asked
    assert ('exist', 'is there a red 8?', 'no') in asked   # both are there, but not together
    assert ('add', 'what is the red digit plus the blue digit?', '11') in asked
    assert ('larger', 'which digit is larger, the red or the blue one?', 'blue') in asked
    assert ('relation', 'where is the red digit relative to the blue one?', 'left') in asked
    answers = Counter(text for _, text, _ in asked)
    assert max(answers.values()) == 1                      # one right answer to each question


def test_words_alone_tell_no_answer():
    """The answer most frequent for a question's words is right hardly more often than a guess."""
    seen = defaultdict(Counter)
    hands = [[0]] * 10
    rng = random.Random(0)
    for _ in range(4000):
        for kind, text, answer in digits.questions(digits.sampled(hands, rng), rng):
            seen[kind, text][answer] += 1
    right, total = Counter(), Counter()
    for (kind, _), counted in seen.items():
        right[kind] += max(counted.values())
        total[kind] += counted.total()
    answers = {'count': 4, 'what': 60, 'where': 4, 'digit': 10, 'find': 4, 'colour': 6, 'exist': 2,
               'add': 10, 'larger': 2, 'relation': 4}      # of the sums, 9 is one in ten
    assert set(total) == set(answers)
    for kind, n in answers.items():
        best = right[kind] / total[kind]
        assert 1 / n - .01 < best < 1 / n + .07, kind


def test_the_same_seed_gives_the_same_scenes():
    def bytes_of(seed):
        found = []
        for _, image, mask, *said in all_scenes(8, seed):
            found.append((image.tobytes(), mask.tobytes(), said))
        return found

    assert bytes_of(1) == bytes_of(1)
    assert bytes_of(1) != bytes_of(2)


def test_the_folder_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, 'mnist', handwriting)
    prepare.main(['digits', str(tmp_path / 'out'), '--limit', '32'])
    assert '32 train, 2 validation, 4 test' in capsys.readouterr().out
    world = Folder(tmp_path / 'out', 32)
    assert world.maps == ['seg', 'edge', 'recon']
    assert world.captions
    line = (tmp_path / 'out' / 'train' / 'metadata.jsonl').read_text().split('\n')[0]
    row = json.loads(line)
    names = [o['name'] for o in row['objects']]
    for name, part in zip(names, world.rows['train'][0]['plan'].split(', ')):
        row_word, column_word, _ = part.split(' ', 2)
        assert row_word in ('top', 'bottom')               # quarters are no middle thirds
        assert column_word in ('left', 'right')
        assert part == f'{row_word} {column_word} {name}'


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='requirements-data.txt'):
        prepare.main(['digits', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_no_scenes(tmp_path):
    with pytest.raises(UserError, match='--limit is 0'):
        prepare.main(['digits', str(tmp_path / 'out'), '--limit', '0'])
