"""Folders of real pictures: read as they are, all stages run, each kind of bad row named."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TEST
from PIL import Image
from safetensors.torch import load_file

import data
import eval as evaluation
import folder as folders
import train
from data import UserError
from folder import Folder

INKS = {'red': (220, 30, 30), 'blue': (30, 60, 220), 'green': (30, 180, 40)}


def write(root, n=24):
    """A tiny set: a coloured block on grey, 24 x 16 pixels; the mask ignores a line around the block."""
    rng = np.random.default_rng(0)
    for split, count in (('train', n), ('validation', n // 3), ('test', n // 3)):
        (root / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            name, x = list(INKS)[i % 3], int(rng.integers(1, 13))
            noise = rng.integers(100, 140, (16, 24, 3))
            picture, mask = noise.astype(np.uint8), np.zeros((16, 24), np.uint8)
            mask[3:13, x - 1 : x + 9] = 255
            mask[4:12, x : x + 8] = 1 + i % 3
            picture[4:12, x : x + 8] = INKS[name]
            Image.fromarray(picture).save(root / split / f'{i}.png')
            Image.fromarray(mask).save(root / split / f'{i}m.png')
            side = 'left' if x < 8 else 'right'
            rows.append({
                'file_name': f'{i}.png', 'mask': f'{i}m.png', 'caption': f'a {name} block on the {side}',
                'qa': [{'question': 'What color is the block?', 'answer': name, 'type': 'color'},
                       {'question': 'Where is it?', 'answer': side, 'type': 'side'}],
                'objects': [{'name': f'{name} block', 'bbox': [x, 4, x + 8, 12]}],
            })  # fmt: skip
        (root / split / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    (root / 'classes.json').write_text(json.dumps({'mask_classes': ['background', *INKS]}))
    return root


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    return write(tmp_path_factory.mktemp('pictures') / 'set')


@pytest.fixture(autouse=True)
def short_reader(monkeypatch):
    """The verifier of real pictures trains for a moment only: its quality has its own test."""
    reader = evaluation.reader
    monkeypatch.setattr(evaluation, 'reader', lambda world, steps=20, B=16: reader(world, steps, B))


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / 'set', ignore=shutil.ignore_patterns('.cache'))


def change(root, k, split='train', **keys):
    """Change row k of a split; a key that is None goes away."""
    meta = root / split / 'metadata.jsonl'
    rows = [json.loads(line) for line in meta.read_text().splitlines()]
    rows[k] = {key: v for key, v in (rows[k] | keys).items() if v is not None}
    meta.write_text('\n'.join(map(json.dumps, rows)))


def change_all(root, keys_of):
    """Change every row: keys_of(its number in its split) -> keys, as in change."""
    for split, n in (('train', 24), ('validation', 8), ('test', 8)):
        for k in range(n):
            change(root, k, split, **keys_of(k))


def command(root, out):
    """Words of a command line that trains on the folder in a moment."""
    return [*TEST, '--data', str(root), '--out', str(out), '--eval_n', '16']


def test_what_is_read_is_what_is_there(root):
    world = Folder(root, 16)
    rows, r, _ = world.scenes('val', 0, 5)
    assert len({row['file'] for row in rows}) == 5
    for i, row in enumerate(rows):
        number = int(row['file'].removesuffix('.png'))
        with Image.open(root / 'validation' / row['file']) as im:
            want = torch.from_numpy(np.array(im.resize((16, 16), Image.BOX))).permute(2, 0, 1) / 255
        assert torch.equal(r.image[i], want)
        with Image.open(root / 'validation' / f'{number}m.png') as im:
            want = torch.from_numpy(np.array(im.resize((16, 16), Image.NEAREST))).long()
        assert torch.equal(r.classes[i], want)
        name = list(INKS)[number % 3]
        assert row['caption'].startswith(f'a {name} block') and row['plan'].endswith(f'{name} block')
    s, target, _ = world.proxies('val', 0, 5, 'seg')
    assert torch.equal(s.image, r.image)
    for k in (0, 1, 2, 3, 255):  # an ignored pixel is drawn as background
        want = (data.PALETTE[k % 255] / 255)[None].expand(int((r.classes == k).sum()), 3)
        assert torch.equal(target.permute(0, 2, 3, 1)[r.classes == k], want)


def test_objects_become_a_plan_in_reading_order(root):
    boxes = {'sun': (18, 0, 24, 4), 'dog': (1, 9, 9, 15), 'hat': (0, 0, 4, 4), 'cat': (10, 10, 16, 15)}
    change(
        root,
        0,
        objects=[{'name': k, 'bbox': v} for k, v in boxes.items()] + [{'name': 'gone', 'bbox': None}],
    )
    row = Folder(root, 16).rows['train'][0]
    assert row['plan'] == 'top left hat, top right sun, bottom left dog, bottom center cat'


def test_evaluation_splits_are_read_in_order_and_once(root):
    world = Folder(root, 16)
    assert world.kinds == ('color', 'side') and len(world.rows['test']) == 8
    for first in (0, 2**20, 2**21):
        seen = [row['caption'] for i in range(3) for row in world.scenes('test', first + i, 3)[0]]
        assert seen == [row['caption'] for row in world.rows['test']]
    assert len(world.scenes('train', 0, 100)[0]) == 100
    s, kinds = world.questions('test', 0, 8, 16, captions=())
    assert kinds == [['color', 'side']] * 8 or sorted(sum(kinds, [])) == ['color'] * 8 + ['side'] * 8


def test_second_start_reads_the_cache_and_a_changed_file_makes_a_new_one(root, monkeypatch):
    first = Folder(root, 16)
    monkeypatch.setattr(folders, 'read_row', None)  # would raise
    again = Folder(root, 16)
    assert again.rows['train'][3]['caption'] == first.rows['train'][3]['caption']
    assert all(torch.equal(first.arrays[k], again.arrays[k]) for k in first.arrays)
    change(root, 3, caption='something new')
    with pytest.raises(UserError):
        Folder(root, 16)
    monkeypatch.undo()
    assert Folder(root, 16).rows['train'][3]['caption'] == 'something new'


def spoil(root, how):
    meta, picture = root / 'train' / 'metadata.jsonl', root / 'train' / '1.png'
    match how:
        case 'no metadata':
            meta.unlink()
        case 'missing file':
            picture.unlink()
        case 'broken picture':
            picture.write_bytes(picture.read_bytes()[:40])
        case 'mask of another size':
            Image.new('L', (10, 10)).save(root / 'train' / '1m.png')
        case 'mask in colour':
            Image.new('RGB', (24, 16)).save(root / 'train' / '1m.png')
        case 'unknown class':
            Image.new('L', (24, 16), 9).save(root / 'train' / '1m.png')
        case 'broken JSON':
            meta.write_text(meta.read_text().replace('"file_name": "1.png"', '"file_name": '))
        case 'no file name':
            change(root, 1, file_name=None)
        case 'not an object':
            meta.write_text(meta.read_text().replace(meta.read_text().splitlines()[1], '[1, 2]'))
        case 'answer is a number':
            change(root, 1, qa=[{'question': 'how many?', 'answer': 3, 'type': 'count'}])
        case 'no answer':
            change(root, 1, qa=[{'question': 'how many?'}])
        case 'bad box':
            change(root, 1, objects=[{'name': 'x', 'bbox': [1, 2]}])
        case 'box of width and height':
            change(root, 1, objects=[{'name': 'x', 'bbox': [12, 8, 6, 7]}])
        case 'box is infinite':
            change(root, 1, objects=[{'name': 'x', 'bbox': [0, 0, 1e999, 7]}])
        case 'object without a name':
            change(root, 1, objects=[{'bbox': [0, 0, 3, 7]}])
        case 'objects are texts':
            change(root, 1, objects=['dog'])
        case 'qa is one object':
            change(root, 1, qa={'question': 'a?', 'answer': 'b'})
        case 'type is taken':
            change(root, 1, qa=[{'question': 'a?', 'answer': 'b', 'type': 'mean'}])
        case 'caption is a number':
            change(root, 1, caption=7)
        case 'caption is no Unicode':
            change(root, 1, caption='\ud800')
        case 'deep':
            lines = meta.read_text().splitlines()
            meta.write_text('\n'.join([lines[0], '[' * 100000, *lines[2:]]))
        case 'newline in a name':
            change(root, 1, file_name='a\nb.png')
        case 'same picture twice':
            shutil.copy(root / 'validation' / '2.png', picture)
        case 'empty split':
            meta.write_text('')


LINE = ('missing file', 'broken picture', 'mask of another size', 'mask in colour', 'unknown class',
        'broken JSON', 'no file name', 'not an object', 'answer is a number', 'no answer', 'bad box',
        'box of width and height', 'box is infinite', 'object without a name', 'objects are texts',
        'qa is one object', 'type is taken', 'caption is a number', 'caption is no Unicode', 'deep',
        'newline in a name')  # fmt: skip


@pytest.mark.parametrize('how', LINE)
def test_a_bad_row_is_named_with_its_line_or_left_out(root, how, capsys):
    spoil(root, how)
    with pytest.raises(UserError, match=r'train.metadata\.jsonl:2: (?s:.)*--skip-bad') as e:
        Folder(root, 16)
    assert '\n' not in str(e.value) and not (root / '.cache').exists() and len(str(e.value)) < 600
    world = Folder(root, 16, skip_bad=True)
    assert len(world.rows['train']) == 23 and 'left out 1 bad row' in capsys.readouterr().out


@pytest.mark.parametrize('how', ['no metadata', 'empty split'])
def test_a_folder_that_cannot_be_used_is_named(root, how):
    spoil(root, how)
    for skip in (False, True):
        with pytest.raises(UserError, match='train.metadata.jsonl'):
            Folder(root, 16, skip_bad=skip)


def test_a_picture_in_two_splits_is_named(root):
    spoil(root, 'same picture twice')
    with pytest.raises(UserError, match=r'validation.metadata\.jsonl:3: .*train'):
        Folder(root, 16)
    assert len(Folder(root, 16, skip_bad=True).rows['val']) == 7


@pytest.mark.parametrize(
    'text', ['["background"]', '{"mask_classes": 5}', '{"mask_classes": "pet"}', '[' * 10**5, '{']
)
def test_a_wrong_class_list_is_named(root, text):
    (root / 'classes.json').write_text(text)
    with pytest.raises(UserError, match='classes.json'):
        Folder(root, 16)


def test_pictures_are_turned_upright_and_masks_are_of_the_upright_picture(root):
    upright = Image.open(root / 'train' / '1.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees to the left
    upright.transpose(Image.Transpose.ROTATE_90).save(root / 'train' / '1.png', exif=exif)
    world = Folder(root, 16)
    k = [row['file'] for row in world.rows['train']].index('1.png')
    want = torch.from_numpy(np.array(upright.resize((16, 16), Image.BOX))).permute(2, 0, 1)
    assert torch.equal(world.arrays['train.image'][k], want)


def test_texts_too_long_for_the_model_are_named(root):
    change(root, 1, 'test', caption='word ' * 400)
    with pytest.raises(UserError, match='1.png'):
        Folder(root, 16)


def test_windows_lines_and_marks_are_read(root):
    meta = root / 'train' / 'metadata.jsonl'
    meta.write_bytes(b'\xef\xbb\xbf' + meta.read_bytes().replace(b'\n', b'\r\n'))
    assert len(Folder(root, 16).rows['train']) == 24
    meta.write_bytes(b'\xff\xfe' + meta.read_bytes())
    with pytest.raises(UserError, match='UTF-8'):
        Folder(root, 16)


def test_captions_alone_are_enough(root, tmp_path):
    """Two captions in three are plans, which need objects: a batch may hold no text at all."""
    change_all(root, lambda k: dict(qa=None, objects=None))
    train.main([*command(root, tmp_path / 'run'), '--pre_ask', '1', '--post_ask', '1'])


def test_a_typo_in_data_leaves_the_old_run_alone(root, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'log.jsonl').write_text('kept')
    with pytest.raises(UserError):
        train.main([*command(f'{root}x', tmp_path / 'run'), '--overwrite'])
    assert (tmp_path / 'run' / 'log.jsonl').read_text() == 'kept'


@pytest.mark.parametrize('gone', ['mask', 'caption', 'qa'])
def test_what_is_missing_switches_off_what_needs_it(root, gone, tmp_path, capsys):
    change_all(root, lambda k: {gone: None})
    out = tmp_path / 'run'
    train.main(command(root, out))
    assert f'no {gone} in' in capsys.readouterr().out
    scores = json.loads((out / 'scores.json').read_text())
    assert bool(scores['segmentation']) == (gone != 'mask')
    assert bool(scores['generation']) == (gone != 'caption')
    assert (scores['understanding']['mean']['value'] is None) == (gone == 'qa')
    if gone == 'caption':
        change_all(root, lambda k: {'qa': None})
        with pytest.raises(UserError, match='nothing to learn'):
            Folder(root, 16)


def test_answers_that_training_never_gives_are_counted(root, capsys):
    change(
        root,
        0,
        'test',
        qa=[{'question': 'What color is the block?', 'answer': 'mauve', 'type': 'color'}],
    )
    Folder(root, 16)
    assert re.search(r"1 of \d+ answers .* such as 'mauve'", capsys.readouterr().out)


def test_depth_maps_are_used_where_all_rows_have_one(root, tmp_path):
    with pytest.raises(UserError, match='depth'):
        train.main([*command(root, tmp_path / 'run'), '--proxy', 'depth'])
    change_all(root, lambda k: {'depth': f'{k}m.png'})
    world = Folder(root, 16)
    target = world.proxies('val', 0, 2, 'depth')[1]
    name = world.rows['val'][1]['file'].replace('.', 'm.')
    with Image.open(root / 'validation' / name) as im:
        want = (
            torch.from_numpy(np.array(im.convert('RGB').resize((16, 16), Image.BOX))).permute(2, 0, 1)
            / 255
        )
    assert torch.equal(target[1], want)


def test_all_stages_run_resume_and_are_evaluated_again(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'run'
    words = command(root, out)
    train.main(words)
    assert 'a red block on the' in capsys.readouterr().out  # the next command to try is of this set
    scores = json.loads((out / 'scores.json').read_text())
    assert scores['understanding'].keys() >= {'mean', 'color', 'side'}
    assert 'exist' not in scores['understanding']
    assert scores['generation'].keys() == {'mean', 'verifier', 'ceiling', 'other'}
    weights = load_file(out / 'model.safetensors')
    (out / 'model.safetensors').unlink()
    train.main([*words, '--resume'])
    assert all(torch.equal(t, weights[k]) for k, t in load_file(out / 'model.safetensors').items())
    evaluation.main(['--run', str(out), '--n', '16'])
    again = json.loads((out / 'scores_test.json').read_text())
    assert all(again[k] == scores[k] for k in ('understanding', 'generation'))
    change(root, 0, caption='a block')
    with pytest.raises(UserError, match='has changed since the run began'):
        train.main([*words, '--resume'])


def test_only_what_is_read_counts_as_a_change(root):
    first = Folder(root, 16).checksum
    (root / 'train' / '0.png').touch()
    assert Folder(root, 16).checksum == first  # decoded again
    assert Folder(root, 16).checksum == first  # from the cache
    change(root, 0, note='not read')
    assert Folder(root, 16).checksum == first
    shutil.copy(root / 'train' / '1.png', root / 'train' / '0.png')
    assert Folder(root, 16).checksum != first


def test_ignored_pixels_do_not_count(root):
    g = torch.Generator().manual_seed(0)
    true, pred = (torch.randint(4, (5, 8, 8), generator=g) for _ in range(2))
    true[torch.rand(true.shape, generator=g) < 0.3] = 255
    true[true == 3] = 0  # class 3 is predicted, never true: it counts; 4 of 5 never occurs: it does not
    ious = []
    for k in range(5):
        inside = ((true == k) & (pred == k)).sum().item()
        union = (((true == k) | (pred == k)) & (true != 255)).sum().item()
        ious += [inside / union] if union else []
    assert len(ious) == 4
    assert evaluation.miou(pred, true, 5)['value'] == pytest.approx(sum(ious) / 4)


def test_the_reader_reads_true_captions_and_not_others(root):
    world = Folder(root, 16)
    rows, r, _ = world.scenes('test', 2**20, 8)
    read = evaluation.reader(world, steps=120, B=16)
    texts = [row['caption'] for row in rows]
    score = lambda x: (
        (x.sum(0)[:, 0] / x.sum(0)[:, 1] + x.sum(0)[:, 2] / x.sum(0)[:, 3]).nanmean().item() / 2
    )
    assert score(read(r.image, texts)) > 0.85 > 0.7 > score(read(r.image.roll(1, 0), texts))


def test_many_classes_get_colours_that_are_told_apart():
    for n in (0, 2, 6, 7, 60, 254):
        colours = folders.palette(n)
        assert len({tuple(c) for c in colours.tolist()}) == len(colours) == n
    images = folders.palette(60).permute(1, 0)[None, :, None].float() / 255
    assert evaluation.classes_of(images, folders.palette(60)).flatten().tolist() == list(range(60))


def test_the_readme_describes_the_format():
    text = (ROOT / 'README.md').read_text()
    assert all(word in text for word in ('metadata.jsonl', 'classes.json', '--skip-bad', 'file_name'))
