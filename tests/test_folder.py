"""Folders of real pictures: read as they are, all stages run, each kind of bad row named."""
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TEST, log_of, same_bits
from PIL import Image

import data
import eval as evaluation
import folder as folders
import model
import sample
import train
from data import UserError
from experiments import reader
from folder import Folder

INKS = {'red': (220, 30, 30), 'blue': (30, 60, 220), 'green': (30, 180, 40)}
ROWS = {'train': 24, 'validation': 8, 'test': 8}


# ---- a tiny data set: a coloured block on grey, 24 x 16 pixels ----
def write_picture(path, number: int, x: int, rng):
    """The block of 8 x 8 pixels begins at column x; the mask ignores a line around it."""
    ink = list(INKS.values())[number % 3]
    noise = rng.integers(100, 140, (16, 24, 3))
    picture = noise.astype(np.uint8)
    picture[4:12, x:x + 8] = ink
    mask = np.zeros((16, 24), np.uint8)
    mask[3:13, x - 1:x + 9] = 255
    mask[4:12, x:x + 8] = 1 + number % 3
    Image.fromarray(picture).save(path / f'{number}.png')
    Image.fromarray(mask).save(path / f'{number}m.png')


def row_of(number: int, x: int) -> dict:
    """What its line of metadata says."""
    name = list(INKS)[number % 3]
    side = 'left' if x < 8 else 'right'
    return {
        'file_name': f'{number}.png',
        'mask': f'{number}m.png',
        'caption': f'a {name} block on the {side}',
        'qa': [
            {'question': 'What color is the block?', 'answer': name, 'type': 'color'},
            {'question': 'Where is it?', 'answer': side, 'type': 'side'},
        ],
        'objects': [{'name': f'{name} block', 'bbox': [x, 4, x + 8, 12]}],
    }


def write_rows(meta, rows: list):
    lines = [json.dumps(row) for row in rows]
    meta.write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures') / 'set'
    rng = np.random.default_rng(0)
    for split, n in ROWS.items():
        path = root / split
        path.mkdir(parents=True)
        rows = []
        for number in range(n):
            x = int(rng.integers(1, 13))
            write_picture(path, number, x, rng)
            rows.append(row_of(number, x))
        write_rows(path / 'metadata.jsonl', rows)
    classes = {'mask_classes': ['background', *INKS]}
    (root / 'classes.json').write_text(json.dumps(classes))
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy that a test may spoil."""
    no_cache = shutil.ignore_patterns('.cache')
    return shutil.copytree(original, tmp_path / 'set', ignore=no_cache)


def change(root, k: int, split='train', **keys):
    """Change row k of a split; a key that is None goes away."""
    meta = root / split / 'metadata.jsonl'
    rows = [json.loads(line) for line in meta.read_text().splitlines()]
    rows[k].update(keys)
    rows[k] = {key: value for key, value in rows[k].items() if value is not None}
    write_rows(meta, rows)


def change_all(root, **keys):
    """Change every row alike."""
    for split, n in ROWS.items():
        for k in range(n):
            change(root, k, split, **keys)


def command(root, out) -> list:
    """Words of a command line that trains on the folder in a moment."""
    return [*TEST, '--data', str(root), '--out', str(out), '--eval_n', '16']


def scores_of(out) -> dict:
    return json.loads((out / 'scores.json').read_text())


def pixels(path, how=Image.BOX, mode=None):
    """A picture file as it must be read: [3, 16, 16], or a mask [16, 16]."""
    with Image.open(path) as im:
        if mode:
            im = im.convert(mode)
        small = torch.from_numpy(np.array(im.resize((16, 16), how)))
    return small.permute(2, 0, 1) if small.ndim == 3 else small


# ---- what is read ----
def test_what_is_read_is_what_is_there(root):
    world = Folder(root, 16)
    rows, r, _ = world.scenes('val', 'reading', 0, 5)
    assert len({row['file'] for row in rows}) == 5
    for row, image, classes in zip(rows, r.image, r.classes):
        number = int(row['file'].removesuffix('.png'))
        path = root / 'validation'
        assert torch.equal(image, pixels(path / f'{number}.png') / 255)
        assert torch.equal(classes, pixels(path / f'{number}m.png', Image.NEAREST).long())
        name = list(INKS)[number % 3]
        assert row['caption'].startswith(f'a {name} block')
        assert row['plan'].endswith(f'{name} block')


def test_maps_are_drawn_in_the_colours_of_the_palette(root):
    world = Folder(root, 16)
    s, target, r = world.maps_to_draw('val', 0, 5, 'seg')
    assert torch.equal(s.image, r.image)
    target = target.permute(0, 2, 3, 1)                                               # [B,S,S,3]
    for k in (0, 1, 2, 3, 255):
        found = target[r.classes == k]
        assert len(found) > 0
        colour = data.PALETTE[k % 255] / 255               # an ignored pixel is drawn as background
        assert torch.equal(found, colour.expand_as(found))


def test_objects_become_a_plan_in_reading_order(root):
    objects = [
        {'name': 'sun', 'bbox': [18, 0, 24, 4]},
        {'name': 'dog', 'bbox': [1, 9, 9, 15]},
        {'name': 'hat', 'bbox': [0, 0, 4, 4]},
        {'name': 'cat', 'bbox': [10, 10, 16, 15]},
        {'name': 'gone', 'bbox': None},
    ]
    change(root, 0, objects=objects)
    row = Folder(root, 16).rows['train'][0]
    assert row['plan'] == 'top left hat, top right sun, bottom left dog, bottom center cat'


def test_evaluation_splits_are_read_in_order_and_once(root):
    world = Folder(root, 16)
    assert world.kinds == ('color', 'side')
    assert len(world.rows['test']) == 8
    for stream in ('understanding', 'generation', 'tokenizer'):
        seen = []
        for index in range(3):                             # 3, 3 and the 2 that are left
            rows, _, _ = world.scenes('test', stream, index, 3)
            seen += rows
        assert seen == world.rows['test']
    rows, r, _ = world.scenes('train', 'questions', 0, 100)              # again and again
    assert len(rows) == len(r.image) == 100


def test_learning_by_heart_and_blind_guesses_are_said(root, tmp_path, capsys, monkeypatch):
    real = evaluation.understanding

    def good_in_training(umm, tok, world, n, split):
        scores = real(umm, tok, world, n, split)
        if split == 'train':
            scores['mean']['value'] = 1.
        return scores

    monkeypatch.setattr(evaluation, 'understanding', good_in_training)
    train.main(command(root, tmp_path / 'run'))
    said = capsys.readouterr().out
    assert 'mean_train 1' in said
    assert 'being learned by heart' in said
    assert 'not clearly better than blind guesses' in said
    scores = scores_of(tmp_path / 'run')
    scores['understanding']['mean']['low'] = .9
    scores['blind']['mean']['value'] = .5
    evaluation.report(scores, tmp_path / 'scores.json')
    assert 'blind guesses' not in capsys.readouterr().out


def test_all_questions_of_a_row_are_asked_once(root):
    world = Folder(root, 16)
    s, kinds = world.questions('test', 0, 8, 16, captions=())
    assert len(kinds) == len(s.text) == 8
    for row, asked, turn, target in zip(world.rows['test'], kinds, s.turn, s.target):
        assert sorted(asked) == ['color', 'side']
        for number, kind in enumerate(asked, 1):
            answer = (turn == number) & (target >= 0)      # its tokens
            _, wanted = dict(row['qa'])[kind]
            assert world.text.decode(target[answer].tolist()) == wanted


def test_second_start_reads_the_cache_and_a_changed_file_makes_a_new_one(root, monkeypatch):
    first = Folder(root, 16)
    monkeypatch.setattr(folders, 'read_row', None)         # to decode again would raise
    again = Folder(root, 16)
    assert json.dumps(again.rows) == json.dumps(first.rows)
    assert again.arrays.keys() == first.arrays.keys()
    for name, array in first.arrays.items():
        assert torch.equal(array, again.arrays[name])
    change(root, 3, caption='something new')
    with pytest.raises(UserError):
        Folder(root, 16)
    monkeypatch.undo()
    assert Folder(root, 16).rows['train'][3]['caption'] == 'something new'


def test_only_what_is_read_counts_as_a_change(root):
    first = Folder(root, 16).checksum
    picture = root / 'train' / '0.png'
    picture.touch()
    assert Folder(root, 16).checksum == first              # decoded again
    assert Folder(root, 16).checksum == first              # from the cache
    change(root, 0, note='not read')
    assert Folder(root, 16).checksum == first
    shutil.copy(root / 'train' / '1.png', picture)
    assert Folder(root, 16).checksum != first


def test_pictures_are_turned_upright_and_masks_are_of_the_upright_picture(root):
    picture = root / 'train' / '1.png'
    want = pixels(picture)
    exif = Image.Exif()
    exif[0x0112] = 6                                       # stored turned by 90 degrees to the left
    with Image.open(picture) as im:
        lying = im.transpose(Image.Transpose.ROTATE_90)
    lying.save(picture, exif=exif)
    world = Folder(root, 16)
    k = [row['file'] for row in world.rows['train']].index('1.png')
    assert torch.equal(world.arrays['train.image'][k], want)


def test_windows_lines_and_marks_are_read(root):
    meta = root / 'train' / 'metadata.jsonl'
    content = meta.read_bytes().replace(b'\n', b'\r\n')
    meta.write_bytes(b'\xef\xbb\xbf' + content)
    assert len(Folder(root, 16).rows['train']) == 24
    meta.write_bytes(b'\xff\xfe' + content)
    with pytest.raises(UserError, match='utf-8'):
        Folder(root, 16)


def test_many_classes_get_colours_that_are_told_apart():
    for n in (0, 2, 6, 7, 60, 254):
        colours = {tuple(colour) for colour in folders.palette(n).tolist()}
        assert len(colours) == len(folders.palette(n)) == n
    colours = folders.palette(60)                                                     # [60,3]
    image = colours.T[None, :, None] / 255                                            # [1,3,1,60]
    found = evaluation.classes_of(image, colours)
    assert found.flatten().tolist() == list(range(60))


# ---- what is wrong with a row ----
def question(text='a?', **keys) -> list:
    return [{'question': text, **keys}]


# the keys of a row that is wrong
ROW = {
    'no file name': dict(file_name=None),
    'newline in a name': dict(file_name='a\nb.png'),
    'answer is a list': dict(qa=question(answer=[3], type='count')),
    'mask is a number': dict(mask=5),
    'no answer': dict(qa=question()),
    'qa is one object': dict(qa={'question': 'a?', 'answer': 'b'}),
    'depth is turned': dict(depth='standing.png'),
    'text is too long': dict(caption='word ' * 400),
    'lists of boxes and names': dict(objects={'bbox': [[1, 2, 3, 4]], 'categories': [0]}),
    'bad box': dict(objects=[{'name': 'x', 'bbox': [1, 2]}]),
    'box of width and height': dict(objects=[{'name': 'x', 'bbox': [12, 8, 6, 7]}]),
    'box is infinite': dict(objects=[{'name': 'x', 'bbox': [0, 0, 1e999, 7]}]),
    'object without a name': dict(objects=[{'bbox': [0, 0, 3, 7]}]),
    'objects are texts': dict(objects=['dog']),
    'caption is a number': dict(caption=7),
    'caption is no Unicode': dict(caption='\ud800'),
}
# or its line
LINE = {
    'broken JSON': '{"file_name": ',
    'not an object': '[1, 2]',
    'deep': '[' * 100_000,
}
# or its mask
MASK = {
    'mask of another size': Image.new('L', (10, 10)),
    'mask in colour': Image.new('RGB', (24, 16)),
    'unknown class': Image.new('L', (24, 16), 9),
}
WRONG = (*ROW, *LINE, *MASK, 'missing file', 'broken picture')


def spoil(root, how: str):
    """Make the second row of train wrong."""
    meta = root / 'train' / 'metadata.jsonl'
    picture = root / 'train' / '1.png'
    if how in ROW:
        Image.new('L', (16, 24)).save(root / 'train' / 'standing.png')
        change(root, 1, **ROW[how])
    elif how in LINE:
        lines = meta.read_text().splitlines()
        lines[1] = LINE[how]
        meta.write_text('\n'.join(lines))
    elif how in MASK:
        MASK[how].save(root / 'train' / '1m.png')
    elif how == 'missing file':
        picture.unlink()
    else:
        picture.write_bytes(picture.read_bytes()[:40])


@pytest.mark.parametrize('how', WRONG)
def test_a_bad_row_is_named_with_its_line_or_left_out(root, how, capsys):
    spoil(root, how)
    with pytest.raises(UserError, match=r'train.metadata\.jsonl:2: (?s:.)*--skip-bad') as e:
        Folder(root, 16)
    message = str(e.value)
    assert '\n' not in message
    assert len(message) < 600
    world = Folder(root, 16, skip_bad=True)
    assert len(world.rows['train']) == 23
    assert 'left out 1 bad row' in capsys.readouterr().out
    Folder(root, 16, skip_bad=True)                        # from its cache
    assert 'left out 1 bad row' in capsys.readouterr().out


@pytest.mark.parametrize('skip', [False, True])
def test_a_split_that_cannot_be_used_is_named(root, skip):
    meta = root / 'train' / 'metadata.jsonl'
    meta.write_text('')
    with pytest.raises(UserError, match='no row for train'):
        Folder(root, 16, skip_bad=skip)
    meta.unlink()
    with pytest.raises(UserError, match='train.metadata.jsonl'):
        Folder(root, 16, skip_bad=skip)


def test_a_picture_in_two_splits_is_named(root):
    shutil.copy(root / 'validation' / '2.png', root / 'train' / '1.png')
    with pytest.raises(UserError, match=r'validation.metadata\.jsonl:3: .*train'):
        Folder(root, 16)
    assert len(Folder(root, 16, skip_bad=True).rows['val']) == 7


# ---- labels that mean something else, and what people bring first ----
def test_masks_of_0_and_255_are_refused(root):
    (root / 'classes.json').write_text('{"mask_classes": ["background", "cat"]}')
    for path in root.glob('*/*m.png'):
        mask = np.zeros((16, 24), np.uint8)
        mask[4:12] = 255
        Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match=r'hold \[0, 255\] only.*cat.* must be 0, 1'):
        Folder(root, 16)


def test_a_class_that_occurs_nowhere_is_named(root, capsys):
    classes = {'mask_classes': ['background', *INKS, 'unicorn']}
    (root / 'classes.json').write_text(json.dumps(classes))
    Folder(root, 16)
    assert "no mask of train holds ['unicorn']" in capsys.readouterr().out


def test_question_types_are_the_same_in_capitals_and_new_ones_are_named(root, capsys):
    change(root, 0, 'test', qa=question(answer='red', type='Color'))
    change(root, 1, 'test', qa=question(answer='red', type='hue'))
    change(root, 2, 'test', qa=question(answer='red', type='sum'))
    assert Folder(root, 16).kinds == ('color', 'hue', 'side', 'sum')
    assert re.search(r"2 of \d+ answers .* such as \('(hue|sum)', 'red'\)", capsys.readouterr().out)


def test_boxes_of_width_and_height_are_noticed(root, capsys):
    for split, n in ROWS.items():
        for k in range(n):
            change(root, k, split, objects=[{'name': 'x', 'bbox': [1, 3, 8, 8]}])
    Folder(root, 16)
    assert 'Are its boxes [x, y, width, height]?' in capsys.readouterr().out
    for split, n in ROWS.items():                          # in the middle, and 'top' is in its name
        for k in range(n):
            change(root, k, split, objects=[{'name': 'laptop', 'bbox': [9, 6, 14, 10]}])
    Folder(root, 16)
    assert 'Are its boxes' not in capsys.readouterr().out


def test_numbers_and_booleans_are_answers(root):
    qa = [*question(answer=3, type='count'), *question(answer=True, type='mean')]
    change(root, 0, qa=qa)
    rows = Folder(root, 16).rows['train']
    assert rows[0]['qa'] == [('count', ['a?', '3']), ('mean (type)', ['a?', 'true'])]


def test_the_keys_of_hugging_face_are_read(root):
    change(root, 0, caption=None, mask=None, text='a\x1b block', mask_file_name='0m.png')
    row = Folder(root, 16).rows['train'][0]
    assert row['caption'] == 'a block'
    assert row['mask']


@pytest.mark.parametrize('name', ['val', 'valid', 'dev'])
def test_other_names_of_splits_are_read(root, name):
    (root / 'validation').rename(root / name)
    assert len(Folder(root, 16).rows['val']) == 8


def test_a_tenth_of_train_is_set_aside_for_splits_that_are_not_there(root, capsys):
    shutil.rmtree(root / 'test')
    (root / 'validation').rename(root / 'old')
    for k in (1, 2, 3):                                    # the same picture goes to the same split
        shutil.copy(root / 'train' / '0.png', root / 'train' / f'{k}.png')
    world = Folder(root, 16)
    assert 'every tenth picture of train is set aside' in capsys.readouterr().out
    files = {split: {row['file'] for row in world.rows[split]} for split in data.SPLITS}
    # of 21 pictures; the first is in four rows
    assert files['val'] == {'0.png', '1.png', '2.png', '3.png', '13.png', '23.png'}
    assert files['test'] == {'4.png', '14.png'}
    assert len(files['train']) == 16


def test_photographs_alone_get_the_line_to_write(tmp_path):
    Image.new('RGB', (9, 9)).save(tmp_path / 'IMG_1.JPG')
    with pytest.raises(UserError, match=r"found: \['IMG_1.JPG'\].*file_name"):
        Folder(tmp_path, 16)


def test_one_number_that_is_not_finite_spoils_no_depth_map(root):
    depth = np.linspace(0, 1, 16 * 24, dtype=np.float32).reshape(16, 24)
    depth[3, 3] = np.nan
    depth[4, 4] = np.inf
    path = root / 'depth.tiff'
    Image.fromarray(depth).save(path)
    read = np.array(folders.upright(path))
    assert read.min() == 0
    assert read.max() == 255
    assert 100 < np.median(read) < 155


@pytest.mark.parametrize('text', [
    '["background"]',
    '{"mask_classes": 5}',
    '{"mask_classes": "pet"}',
    '{"mask_classes": ["background", null]}',
    '{"mask_classes": ["background", "cat", "cat"]}',
    '[' * 10**5,
    '{',
])
def test_a_wrong_class_list_is_named(root, text):
    (root / 'classes.json').write_text(text)
    with pytest.raises(UserError, match='classes.json'):
        Folder(root, 16)


def test_texts_too_long_for_the_model_are_named(root):
    change(root, 1, 'test', caption='word ' * 400)
    with pytest.raises(UserError, match=r'test.metadata\.jsonl:2'):
        Folder(root, 16)


def test_answers_that_training_never_gives_are_counted(root, capsys):
    change(root, 0, 'test', qa=question('What color is the block?', answer='mauve', type='color'))
    Folder(root, 16)
    said = capsys.readouterr().out
    assert re.search(r"1 of \d+ answers .* such as \('color', 'mauve'\)", said)


# ---- training ----
def test_captions_alone_are_enough(root, tmp_path, monkeypatch):
    """They are what is asked for and what is drawn; there are no questions to measure."""
    change_all(root, qa=None, objects=None)
    out = tmp_path / 'run'
    train.main([*command(root, out), '--pre_ask', '1', '--post_ask', '1'])
    logged = {}
    for line in log_of(out):
        logged.setdefault(line['stage'], set()).update(line)
    assert logged['pretrain'] >= {'text', 'plan', 'draw'}
    assert logged['posttrain'] >= {'text', 'plan', 'draw', 'seg'}
    scores = scores_of(out)
    assert scores['understanding'] == scores['blind'] == {}
    monkeypatch.setattr(reader, 'Reader', partial(reader.Reader, steps=20, B=16))
    tok, umm, world, _ = evaluation.open_run(out, torch.device('cpu'))
    assert reader.recognition(umm, tok, world, 8)['mean']['n'] == 8
    # what is supervised are the captions, a whole one for each picture
    world = Folder(root, 16)
    s, kinds = world.questions('test', 0, 8, 4)
    for row, turns, target in zip(world.rows['test'], kinds, s.target):
        assert len(turns) == 1
        assert world.text.decode(target[target >= 0].tolist()) == row['caption']


def test_a_typo_in_data_leaves_the_old_run_alone(root, tmp_path):
    log = tmp_path / 'run' / 'log.jsonl'
    log.parent.mkdir()
    log.write_text('kept')
    with pytest.raises(UserError):
        train.main([*command(f'{root}x', tmp_path / 'run'), '--overwrite'])
    assert log.read_text() == 'kept'


@pytest.mark.parametrize('gone', ['mask', 'caption', 'qa'])
def test_what_is_missing_switches_off_what_needs_it(root, gone, tmp_path, capsys):
    change_all(root, **{gone: None})
    out = tmp_path / 'run'
    flags = command(root, out)
    train.main(flags)                                      # without masks the default map is off
    assert f'no {gone} in' in capsys.readouterr().out
    scores = scores_of(out)
    assert bool(scores['segmentation']) == (gone != 'mask')
    assert bool(scores['understanding']) == (gone != 'qa')
    if gone == 'caption':
        with pytest.raises(UserError, match='it has learned no captions'):
            reader.main(['--run', str(out)])


def test_without_captions_and_questions_there_is_nothing_to_learn(root):
    change_all(root, caption=None, qa=None)
    with pytest.raises(UserError, match='nothing to learn'):
        Folder(root, 16)


def test_depth_maps_are_used_where_all_rows_have_one(root, tmp_path):
    with pytest.raises(UserError, match='depth'):
        train.main([*command(root, tmp_path / 'run'), '--proxy', 'depth'])
    for split, n in ROWS.items():
        for k in range(n):
            change(root, k, split, depth=f'{k}m.png')
    world = Folder(root, 16)
    _, target, _ = world.maps_to_draw('val', 0, 2, 'depth')
    for row, found in zip(world.rows['val'], target):
        path = root / 'validation' / row['file'].replace('.', 'm.')
        assert torch.equal(found, pixels(path, mode='RGB') / 255)


def test_all_stages_run_resume_and_are_evaluated_again(root, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'run'
    words = command(root, out)
    train.main(words)
    assert 'a red block on the' in capsys.readouterr().out               # the command to try next
    scores = scores_of(out)
    assert scores['understanding'].keys() == {'mean', 'color', 'side'}
    first = tmp_path / 'first.safetensors'
    (out / 'model.safetensors').rename(first)
    train.main([*words, '--resume'])
    assert same_bits(first, out / 'model.safetensors')
    evaluation.main(['--run', str(out), '--n', '16'])
    again = json.loads((out / 'scores_test.json').read_text())
    for part in ('understanding', 'segmentation'):
        assert again[part] == scores[part]
    # its drawings, read by a small network
    monkeypatch.setattr(reader, 'Reader', partial(reader.Reader, steps=20, B=16))
    capsys.readouterr()
    reader.main(['--run', str(out)])
    figures = capsys.readouterr().out
    reader.main(['--run', str(out)])
    assert capsys.readouterr().out == figures              # measured again, the same
    names = [line.split()[0] for line in figures.splitlines()]
    assert names == ['mean', 'verifier', 'ceiling', 'other']
    # a map of class numbers, as large as the picture
    picture = root / 'test' / '0.png'
    path = tmp_path / 'map.png'
    words_of_sample = ['segment', str(picture), '--checkpoint', str(out / 'model.safetensors')]
    sample.main([*words_of_sample, '--out', str(path)])
    with Image.open(path) as im:
        assert im.mode == 'P'
        assert im.size == (24, 16)
        found = set(np.array(im).flatten().tolist())
    assert found <= {0, 1, 2, 3}
    said = capsys.readouterr().out
    for number in found:
        assert f"{number} {['background', *INKS][number]}: " in said
    # the same pictures elsewhere; others
    moved = root.rename(tmp_path / 'moved')
    words[words.index(str(root))] = str(moved)
    train.main([*words, '--resume', '--save_every', '7'])
    change(moved, 0, caption='a block')
    with pytest.raises(UserError, match='has changed since the run began'):
        train.main([*words, '--resume'])
    measure = ['--run', str(out), '--n', '16', '--data', str(moved)]
    with pytest.raises(UserError, match='--other_data'):
        evaluation.main(measure)
    evaluation.main([*measure, '--other_data'])
    classes = {'mask_classes': ['background', 'green', 'blue', 'red']}
    (moved / 'classes.json').write_text(json.dumps(classes))
    with pytest.raises(UserError, match='other classes'):
        evaluation.main([*measure, '--other_data'])


# ---- texts of any language ----
def test_scripts_without_spaces_are_split_by_letter(root):
    for split, n in ROWS.items():
        for k in range(n):
            side = '左右'[k % 2]
            change(root, k, split, caption=f'照片{chr(0x5000 + k)}的{side}边有一个方形')
    world = Folder(root, 16)
    ids = world.text.encode('左边有一个方形')
    assert len(ids) == 8                                   # one for each letter and a space
    assert world.text.decode(ids) == '左边有一个方形'
    assert {'左', '右'} <= world.words()
    read = reader.Reader(world, steps=1)
    assert {'左', '右'} <= set(read.words)                 # what stands in all captions tells nothing
    assert not {'边', '方'} & set(read.words)


def test_a_word_that_occurs_once_is_no_token(root):
    change(root, 0, caption='a quetzalcoatlus block')
    text = Folder(root, 16).text
    assert len(text.encode('block')) == 1
    assert b' quetzalcoatlus' not in text.vocab


def test_where_all_captions_are_alike_drawings_are_not_scored(root, tmp_path, capsys):
    change_all(root, caption='a block')
    train.main([*command(root, tmp_path / 'run'), '--until', 'pretrain'])
    reader.main(['--run', str(tmp_path / 'run'), '--n', '4'])
    assert 'drawings cannot be scored' in capsys.readouterr().out


# ---- measuring ----
def test_few_pictures_do_not_make_a_collapse(root):
    """Two pictures and their maps have 96 codes, most of them of the ground."""
    for k in range(2, 8):
        change(root, k, 'validation', file_name='none.png')
    world = Folder(root, 16, skip_bad=True)
    tok = model.VQTokenizer(model.Config(size=16, codebook=64, vq_width=16, vq_depth=1))
    used = evaluation.tokenizer(tok, world, 64, 'val')['used']
    assert used['n'] == 24


def test_all_pictures_count_where_there_are_few(root, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, 'segmentation', lambda *how: asked.append(how[3]) or {})
    for name in ('tokenizer', 'understanding', 'blind', 'generation'):
        monkeypatch.setattr(evaluation, name, lambda *how: {})
    networks = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    evaluation.evaluate(*networks, Folder(root, 16))
    evaluation.evaluate(*networks, data.World(16), 512)
    assert asked == [8, 192]


def test_ignored_pixels_do_not_count():
    """Class 3 is predicted, never true: it counts. Class 4 never occurs: it does not."""
    g = torch.Generator().manual_seed(0)
    true, pred = torch.randint(4, (2, 5, 8, 8), generator=g)
    true[true == 3] = 0
    true[torch.rand(true.shape, generator=g) < .3] = 255
    ious = []
    for k in range(5):
        inside = (true == k) & (pred == k)
        either = (true == k) | (pred == k)
        union = either & (true != 255)
        if union.any():
            ious.append(inside.sum().item() / union.sum().item())
    assert len(ious) == 4
    assert evaluation.miou(pred, true, 5)['value'] == pytest.approx(sum(ious) / 4)


def test_the_reader_reads_true_captions_and_not_others(root):
    world = Folder(root, 16)
    rows, r, _ = world.scenes('test', 'reading', 0, 8)
    texts = [row['caption'] for row in rows]
    read = reader.Reader(world, steps=120, B=16)

    def score(images):
        """Mean over words of the mean of both rates, as balanced_accuracy, word by word."""
        rates = []
        for hits, true, noes, false in read(images, texts).sum(0).tolist():
            if true and false:
                rates.append((hits / true + noes / false) / 2)
        return sum(rates) / len(rates)

    assert score(r.image) > .85
    others = r.image.roll(1, 0)
    assert score(others) < .7
    counts = read(r.image, texts).sum(0)
    assert reader.balanced_accuracy(counts).item() == pytest.approx(score(r.image))


def test_the_readme_describes_the_format():
    text = (ROOT / 'README.md').read_text()
    for word in ('metadata.jsonl', 'classes.json', '--skip-bad', 'file_name'):
        assert word in text
