"""Windows of a folder with masks: where they are cut, what is asked about them, whether words tell."""
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data import UserError
from experiments import prepare, windows, writer
from folder import Folder

CLASSES = ['ground', 'cat', 'dog', 'flea']
COLOURS = [(90, 90, 90), (250, 0, 0), (0, 0, 250), (0, 250, 0)]


def folder_of(root, n=24):
    """Pictures of 60 x 40: a red cat, a blue dog, a green flea. depth: each is nearer in turn."""
    rng = np.random.default_rng(0)
    root.mkdir()
    (root / 'classes.json').write_text(json.dumps({'mask_classes': CLASSES}))
    for split in writer.SPLITS:
        folder = root / split
        folder.mkdir()
        lines = []
        for i in range(n):
            mask = np.zeros((40, 60), np.uint8)
            for k in (1, 2):
                half = mask[:, 30 * k - 30:30 * k]
                h, w = rng.integers(8, 20, 2)
                y, x = rng.integers(0, 20), rng.integers(0, 10)
                half[y:y + h, x:x + w] = k
            mask[39, 59] = 3
            pixels = np.array(COLOURS, np.uint8)[mask]                                # [40,60,3]
            pixels[:, :, 1] += rng.integers(0, 5, mask.shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.png')
            Image.fromarray(mask).save(folder / f'{i}m.png')
            objects = [{'name': 'cat', 'depth': i % 2}, {'name': 'dog', 'depth': 1 - i % 2}]
            files = {'file_name': f'{i}.png', 'mask': f'{i}m.png'}
            lines.append(json.dumps({**files, 'caption': 'animals', 'objects': objects}))
        (folder / 'metadata.jsonl').write_text('\n'.join(lines))
    return root


def prepared(tmp_path, *flags):
    """-> (the folder written, its training rows)."""
    folder_of(tmp_path / 'in')
    out = tmp_path / 'out'
    prepare.main(['windows', str(tmp_path / 'in'), str(out), *flags])
    text = (out / 'train' / 'metadata.jsonl').read_text()
    return out, [json.loads(line) for line in text.splitlines()]


def test_rows_are_read_as_training_reads_them(tmp_path):
    """A byte order mark, an empty line, Hugging Face's name for the mask."""
    root = folder_of(tmp_path / 'in')
    path = root / 'train' / 'metadata.jsonl'
    lines = path.read_text().replace('"mask"', '"mask_file_name"')
    path.write_text(lines + '\n\n', 'utf-8-sig')
    found = [split for split, *_ in windows.rows_in(root)]
    assert found == ['train'] * 24 + ['validation'] * 24 + ['test'] * 24
    assert windows.text_in({'text': 'a cat'}, 'caption') == 'a cat'


@pytest.mark.parametrize('line', ['[1]', '"a"', '{"file_name": "0.png"}'])
def test_a_row_without_a_mask_is_one_line(tmp_path, line):
    root = folder_of(tmp_path / 'in')
    (root / 'train' / 'metadata.jsonl').write_text(line)
    with pytest.raises(UserError, match='metadata.jsonl:1 is no row with a picture and a mask'):
        list(windows.rows_in(root))


def test_windows_are_cut_at_the_pictures_own_resolution(tmp_path):
    out, rows = prepared(tmp_path, '--side', '24', '--classes', '2')
    assert len(rows) > 24                                  # around the cat and around the dog
    names = json.loads((out / 'classes.json').read_text())['mask_classes']
    assert sorted(names) == ['cat', 'dog', 'ground']       # a flea is too small to be kept
    assert names[0] == 'ground'
    for row in rows:
        pixels = np.array(Image.open(out / 'train' / row['file_name']))
        mask = np.array(Image.open(out / 'train' / row['mask']))
        assert pixels.shape == (24, 24, 3)
        red, green, blue = pixels.transpose(2, 0, 1)
        assert np.array_equal(mask == names.index('cat'), red == 250)
        assert np.array_equal(mask == names.index('dog'), blue == 250)
        assert np.array_equal(mask == 255, green >= 250)


def test_whole_pictures_keep_their_captions(tmp_path):
    out, rows = prepared(tmp_path, '--side', '30', '--whole')
    assert len(rows) == 24
    assert {row['caption'] for row in rows} == {'animals'}
    assert Image.open(out / 'train' / rows[0]['file_name']).size == (30, 20)
    world = Folder(out, 16)
    assert {'at', 'larger', 'nearer', 'where'} <= set(world.kinds)


def test_questions_are_answered_by_the_mask():
    mask = np.zeros((32, 32), np.uint8)
    mask[:14, :14] = 1                                     # a cat at the top left
    mask[20:30, 17:27] = 2                                 # a dog, half as large, at the bottom right
    kept = windows.Kept(['ground', 'cat', 'dog', 'owl'], 1, np.arange(256, dtype=np.uint8))
    window = windows.Window('train', None, mask, '', {'cat': 2, 'dog': 1})
    regions = windows.regions_in(mask, kept)
    assert [region.name for region in regions] == ['cat', 'dog']
    assert regions[0].box == (0, 0, 14, 14)
    asked = windows.candidates(window, regions, kept)
    for words in [
        ('exist', 'is there a cat?', 'yes'),
        ('exist', 'is there an owl?', 'no'),
        ('what', 'what is at the top left?', 'cat'),
        ('at', 'is the cat at the top left?', 'yes'),
        ('at', 'is the dog at the top left?', 'no'),
        ('where', 'where is the dog?', 'bottom right'),
        ('half', 'is the dog more left or right?', 'right'),
        ('half', 'is the dog more top or bottom?', 'bottom'),
        ('size', 'how large is the dog?', 'small'),
        ('larger', 'which is larger, the dog or the cat?', 'cat'),
        ('nearer', 'which is nearer, the cat or the dog?', 'dog'),
        ('side', 'is the cat left or right of the dog?', 'left'),
    ]:
        assert words in asked
    answers = Counter(text for _, text, _ in asked)
    assert max(answers.values()) == 1                      # one right answer to each question


def test_words_alone_tell_no_answer(tmp_path):
    out, _ = prepared(tmp_path, '--side', '24')
    for split in writer.SPLITS:
        seen = defaultdict(Counter)
        for line in (out / split / 'metadata.jsonl').read_text().splitlines():
            for q in json.loads(line)['qa']:
                seen[q['question']][q['answer']] += 1
        assert seen
        for counted in seen.values():
            assert len(counted) > 1
            assert len(set(counted.values())) == 1         # each answer as often as the others


def test_rare_answers_are_left_out_of_the_balance():
    asked = [(n, ('what', 'what is it?', 'cat')) for n in range(50)]
    asked += [(n, ('what', 'what is it?', 'dog')) for n in range(50, 70)]
    asked += [(70, ('what', 'what is it?', 'flea')), (71, ('exist', 'is it there?', 'yes'))]
    kept = windows.balanced(asked, random.Random(0))
    assert Counter(answer for _, (_, _, answer) in kept) == {'cat': 20, 'dog': 20}


def test_what_cannot_be_cut_is_named(tmp_path):
    def refused(words, match):
        with pytest.raises(UserError, match=match):
            prepare.main(['windows', str(tmp_path / 'in'), str(tmp_path / 'out'), *words])
        assert not list(tmp_path.glob('out*'))

    folder_of(tmp_path / 'in', 2)
    refused(['--side', '48'], '--whole')
    refused(['--ground', 'sky'], "'sky'; there are: ground, cat")
    refused(['--each', '0'], '--each is 0')
    refused(['--without', 'exsit'], "'exsit'; there are: exist")
    picture = tmp_path / 'in' / 'train' / '0m.png'
    mask = Image.open(picture)
    mask.resize((120, 80)).save(picture)                   # twice as large as its picture
    refused([], r'mask of .*0.png is \(120, 80\), the upright picture \(60, 40\)')
    mask.convert('RGB').save(picture)
    refused([], 'mode RGB; it must be P or L')
    mask.save(picture)
    path = tmp_path / 'in' / 'validation' / 'metadata.jsonl'
    path.write_text('{"file_name": "0.png"}')
    refused([], 'metadata.jsonl:1 is no row with a picture and a mask')
    path.write_text('{"file_name"')
    refused([], 'metadata.jsonl:1')
    path.unlink()
    refused([], 'no metadata.jsonl for validation')
    (tmp_path / 'in' / 'classes.json').unlink()
    refused([], 'no classes.json')


def test_masks_are_turned_as_their_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3                                       # upside down
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(tmp_path / 'm.png', exif=exif)
    assert windows.read_mask(tmp_path / 'm.png').tolist() == [[5, 4, 3], [2, 1, 0]]


def test_kinds_are_those_that_are_asked(tmp_path):
    _, rows = prepared(tmp_path)
    asked = {q['type'] for row in rows for q in row['qa']}
    assert len(asked) > 4
    assert asked <= set(windows.KINDS)
