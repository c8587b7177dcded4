"""Converters on tiny fakes of the official layouts; what they write is read by folder.Folder."""
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import UserError
from experiments import learnable, prepare, writer
from experiments.coco import split_of
from folder import Folder


def rows_of(out, split='train') -> list[dict]:
    text = (out / split / 'metadata.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines()]


def noise(rng):
    """A picture of 60 x 40 pixels."""
    pixels = rng.integers(0, 255, (40, 60, 3))
    return Image.fromarray(pixels.astype(np.uint8))


# ---- Oxford-IIIT Pet ----
def add(tar, name: str, content: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def file_of(image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def trimap(i: int):
    """A pet of 20 x 20 pixels on the left; one picture has none, as in the original."""
    pixels = np.full((40, 60), 2, np.uint8)
    if i != 5:
        pixels[9:31, 4:26] = 3                             # the border
        pixels[10:30, 5:25] = 1
    return Image.fromarray(pixels)


@pytest.fixture
def pets(tmp_path):
    """images.tar.gz and annotations.tar.gz as Oxford serves them: 20 trainval and 4 test pictures."""
    root = tmp_path / 'downloads'
    root.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    images = tarfile.open(root / 'images.tar.gz', 'w:gz')
    notes = tarfile.open(root / 'annotations.tar.gz', 'w:gz')
    with images, notes:
        for i in range(24):
            name, numbers = f'great_pyrenees_{i}', '1 2 1'
            if i % 2:
                name, numbers = f'Abyssinian_{i}', '2 1 1'
            lines.append(f'{name} {numbers}')
            add(images, f'images/{name}.jpg', file_of(noise(rng), 'JPEG'))
            add(notes, f'annotations/trimaps/{name}.png', file_of(trimap(i), 'PNG'))
        trainval = '\n'.join(['# comment', *lines[:20]])
        add(notes, 'annotations/trainval.txt', trainval.encode())
        test = '\n'.join(lines[20:])
        add(notes, 'annotations/test.txt', test.encode())
    return root


def test_pets(pets, tmp_path, capsys):
    out = tmp_path / 'out'
    prepare.main(['pets', str(pets), str(out), '--side', '30'])
    assert '18 train, 2 validation, 4 test' in capsys.readouterr().out
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {'downloads', 'out'}                    # nothing temporary stays
    dogs, cats = [], []
    for split in writer.SPLITS:
        for row in rows_of(out, split):
            if row['objects']:
                kind = dogs if 'great pyrenees' in row['caption'] else cats
                kind.append(row)
    assert len(dogs) == 12
    assert len(cats) == 11                                 # one has no pet pixel
    for row in dogs:
        assert row['caption'] == 'a small great pyrenees dog on the left'
        assert row['objects'] == [{'name': 'great pyrenees dog', 'bbox': [2.5, 5., 12.5, 15.]}]
        answers = {q['type']: q['answer'] for q in row['qa']}
        assert answers.pop('exist') in ('yes', 'no')
        assert answers == {'species': 'dog', 'position': 'left', 'breed': 'great pyrenees',
                           'breed_choice': 'great pyrenees', 'size': 'small'}


def test_pets_are_read(pets, tmp_path):
    prepare.main(['pets', str(pets), str(tmp_path / 'out'), '--side', '30'])
    world = Folder(tmp_path / 'out', 16)
    assert world.annotated == ('classes',)
    assert world.maps == ['seg', 'edge', 'recon']
    assert world.captions
    assert {'species', 'breed', 'breed_choice', 'exist'} < set(world.kinds)
    _, r, _ = world.scenes('test', 'reading', 0, 4)
    assert set(r.classes.unique().tolist()) == {0, 1, 255}


# ---- COCO ----
KINDS = [
    {'id': 7, 'name': 'dog'},
    {'id': 9, 'name': 'cup'},
    {'id': 11, 'name': 'kite'},
]
DOG = {'category_id': 7, 'iscrowd': 0, 'area': 400, 'bbox': [2, 10, 20, 20],
       'segmentation': [[2, 10, 22, 10, 22, 30, 2, 30]]}
# run lengths down the columns: two of eight pixels each, at x = 40
CUP = {'category_id': 9, 'iscrowd': 0, 'area': 16, 'bbox': [40, 4, 2, 8],
       'segmentation': {'counts': [1604, 8, 32, 8, 748], 'size': [40, 60]}}
CUPS = {'category_id': 9, 'iscrowd': 1, 'area': 9, 'bbox': [50, 30, 5, 5], 'segmentation': {}}


@pytest.fixture
def coco(tmp_path):
    """20 pictures with a dog on the left and a cup on the right, the first with a crowd of cups too."""
    root = tmp_path / 'downloads'
    (root / 'pictures').mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, notes, captions = [], [], []
    for i in range(20):
        name = f'{i}.jpg'
        noise(rng).save(root / 'pictures' / name)
        images.append({'id': i, 'file_name': name, 'width': 60, 'height': 40})
        notes.append({'image_id': i, **DOG})
        notes.append({'image_id': i, **CUP})
        captions.append({'image_id': i, 'caption': 'A Dog near a cup. '})
    notes.append({'image_id': 0, **CUPS})
    content = {'images': images, 'annotations': notes, 'categories': KINDS}
    (root / 'instances_val2017.json').write_text(json.dumps(content))
    (root / 'captions_val2017.json').write_text(json.dumps({'annotations': captions}))
    return root


def converted(coco, tmp_path, *flags) -> list:
    """-> the training rows that are written under tmp_path / 'out'."""
    out = tmp_path / 'out'
    prepare.main(['coco', str(coco), str(out), *flags])
    return rows_of(out)


def content_of(coco) -> dict:
    return json.loads((coco / 'instances_val2017.json').read_text())


def test_coco_texts(coco, tmp_path, capsys):
    out = tmp_path / 'out'
    prepare.main(['coco', str(coco), str(out), '--side', '60'])
    assert '16 train, 2 validation, 2 test' in capsys.readouterr().out
    for row in rows_of(out)[1:]:
        assert row['caption'] == 'a dog near a cup'
        names = {o['name'] for o in row['objects']}
        assert names == {'dog', 'cup'}
        asked = {q['type']: q for q in row['qa']}
        assert asked.keys() == {'exist', 'count', 'position', 'relation', 'larger'}
        assert asked['count']['answer'] == '1'
        assert asked['larger']['answer'] == 'dog'
        about_the_dog = asked['relation']['question'].startswith('Is the dog')
        side = 'left' if about_the_dog else 'right'
        assert asked['relation']['answer'] == side
    assert Folder(out, 16).kinds == ('count', 'exist', 'larger', 'position', 'relation')


def test_in_a_crowd_nothing_is_counted_or_denied(coco, tmp_path):
    first = converted(coco, tmp_path)[0]
    asked = [(q['type'], q['answer']) for q in first['qa']]
    assert ('exist', 'yes') in asked
    assert ('exist', 'no') not in asked
    assert 'count' not in dict(asked)


def test_coco_masks(coco, tmp_path):
    out = tmp_path / 'out'
    prepare.main(['coco', str(coco), str(out), '--side', '60'])
    names = json.loads((out / 'classes.json').read_text())['mask_classes']
    dog, cup = names.index('dog'), names.index('cup')
    path = out / 'train' / rows_of(out)[0]['mask']
    mask = np.array(Image.open(path))
    assert (mask[12:28, 4:20] == dog).all()
    assert (mask[4:12, 40:42] == cup).all()
    assert (mask == cup).sum() == 16                       # and nowhere else
    assert (mask[31:34, 51:54] == 255).all()               # the crowd is ignored


def test_coco_without_captions_lists_the_objects(coco, tmp_path):
    (coco / 'captions_val2017.json').unlink()
    rows = converted(coco, tmp_path, '--classes', 'cup', '--limit', '2')
    assert [row['caption'] for row in rows] == ['a cup', 'a cup']


def test_exports_with_splits_in_folders_and_equal_names(coco, tmp_path):
    """As Roboflow writes them: train, valid and test, each with its annotations and its own 0.png."""
    content = content_of(coco)
    for im in content['images']:
        im['file_name'] = f"{im['id']}.png"
    root = tmp_path / 'export'
    reds = {'train': 0, 'valid': 80, 'test': 160}          # tell the splits apart
    for split, red in reds.items():
        (root / split).mkdir(parents=True)
        for im in content['images']:
            picture = Image.new('RGB', (60, 40), (red, im['id'], 0))
            picture.save(root / split / im['file_name'])
        (root / split / '_annotations.coco.json').write_text(json.dumps(content))
    prepare.main(['coco', str(root), str(tmp_path / 'out')])
    for split, red in zip(writer.SPLITS, reds.values()):
        rows = rows_of(tmp_path / 'out', split)
        assert len(rows) == 20
        for row in rows:
            picture = Image.open(tmp_path / 'out' / split / row['file_name'])
            assert picture.getpixel((0, 0))[0] == red


# ---- what is wrong with downloads ----
def refused(words: list, match: str):
    with pytest.raises(UserError, match=match):
        prepare.main([str(word) for word in words])


def test_bad_downloads_are_named_and_nothing_is_written(tmp_path, pets):
    out = tmp_path / 'x'
    refused(['pets', tmp_path / 'none', out], 'none')
    refused(['pets', tmp_path, out], 'images')
    refused(['coco', pets, out], 'instances')
    refused(['pets', pets, pets], 'there already')
    refused(['pets', pets, '.'], 'there already')
    refused(['pets', pets, out, '--side', 3], '--side is 3')
    Image.new('RGB', (9, 9)).save(pets / 'x.png')
    (pets / 'instances.json').write_text('{"images": [')
    refused(['coco', pets, out], 'not whole JSON')
    assert not out.exists()


def test_what_lies_beside_the_folder_stays(coco, tmp_path):
    left = tmp_path / 'x.part'
    left.mkdir()
    (left / 'mine.txt').write_text('mine')
    refused(['coco', coco, tmp_path / 'x'], 'x.part is there')
    assert (left / 'mine.txt').read_text() == 'mine'


def test_a_class_is_named_once(coco, tmp_path):
    refused(['coco', coco, tmp_path / 'x', '--classes', 'cup,cup'], 'named twice')
    assert not list(tmp_path.glob('x*'))


def split_files(coco, first: dict, second: dict):
    """The pictures 0 to 9 as train, the others as val; both with the given keys of content."""
    content = content_of(coco)
    (coco / 'instances_val2017.json').unlink()
    for path, ids, keys in (('instances_train2017.json', range(10), first),
                            ('instances_val2017.json', range(10, 20), second)):
        part = dict(content, **keys)
        part['images'] = [im for im in content['images'] if im['id'] in ids]
        part['annotations'] = [n for n in content['annotations'] if n['image_id'] in ids]
        path = coco / 'annotations_trainval2017' / path        # its folder's name says train and val
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(part))


def test_numbers_of_categories_belong_to_their_file(coco, tmp_path):
    """Dog and cup have each other's numbers in the second file."""
    other = [{'id': 9, 'name': 'dog'}, {'id': 7, 'name': 'cup'}]
    split_files(coco, {}, {'categories': other})
    converted(coco, tmp_path, '--side', '60')
    assert len(rows_of(tmp_path / 'out', 'validation')) == 10
    for split, left in (('train', 'dog'), ('validation', 'cup')):
        for row in rows_of(tmp_path / 'out', split):
            name, = [o['name'] for o in row['objects'] if o['bbox'][0] == 2]
            assert name == left


def test_files_of_other_kinds_are_left_out_and_ids_may_be_texts(coco, tmp_path, capsys):
    content = content_of(coco)
    for n in content['annotations']:
        n['image_id'] = str(n['image_id'])
    del content['annotations'][0]['bbox']                  # the polygon tells it
    text = json.dumps(content)
    (coco / 'instances_val2017.json').write_bytes(b'\xef\xbb\xbf' + text.encode())
    (coco / 'panoptic_val2017.json').write_text('{"images": [], "annotations": [{"image_id": 1}]}')
    (coco / 'list.json').write_text('[1]')
    converted(coco, tmp_path)
    said = capsys.readouterr().out
    assert 'panoptic_val2017.json holds neither' in said
    assert 'list.json holds neither' in said
    assert '16 train, 2 validation, 2 test' in said


def test_pictures_that_are_not_there_are_counted(coco, tmp_path, capsys):
    """As in the official zip, which has the annotations of train2017 beside those of val2017."""
    content = content_of(coco)
    content['images'] = []
    for i in range(900, 905):
        im = {'id': i, 'file_name': f'{i}.jpg', 'width': 9, 'height': 9}
        content['images'].append(im)
    (coco / 'instances_train2017.json').write_text(json.dumps(content))
    converted(coco, tmp_path)
    assert '5 of 5 pictures are not there' in capsys.readouterr().out


@pytest.mark.parametrize('wrong', [
    {'bbox': [1]},
    {'segmentation': [[1.]]},
    {'segmentation': {'counts': [3], 'size': [40, 60]}},
])
def test_wrong_annotations_are_named_with_their_picture(coco, tmp_path, wrong):
    content = content_of(coco)
    content['annotations'][4].update(wrong)
    (coco / 'instances_val2017.json').write_text(json.dumps(content))
    refused(['coco', coco, tmp_path / 'out'], 'picture 2')
    assert not list(tmp_path.glob('out*'))


def test_a_picture_of_another_size_is_named(coco, tmp_path):
    content = content_of(coco)
    content['images'][3]['width'] = 40
    (coco / 'instances_val2017.json').write_text(json.dumps(content))
    refused(['coco', coco, tmp_path / 'out'], 'picture 3')


# ---- files of other programs: nothing is taken for granted ----
def write(path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding='utf-8-sig')           # with a mark, as Windows writes


def left_out(words: list, capsys) -> str:
    """Refused without --skip-bad, done with it -> what it said."""
    refused(words, '--skip-bad')
    prepare.main([*map(str, words), '--skip-bad'])
    return capsys.readouterr().out


def test_captions_are_joined_to_the_instances_of_their_split(coco, tmp_path):
    """In both splits the ids begin at 0; one writes them as texts, the other as floats."""
    content = content_of(coco)
    (coco / 'instances_val2017.json').unlink()
    for split in ('train', 'val'):
        folder = coco / split
        folder.mkdir()
        for im in content['images']:
            picture = Image.open(coco / 'pictures' / im['file_name'])
            if split == 'val':
                picture = picture.rotate(180)
            picture.save(folder / im['file_name'])
        captions = []
        for i in range(20):
            number = str(i) if split == 'val' else float(i)
            captions.append({'image_id': number, 'caption': f'of {split}'})
        write(coco / f'instances_{split}.json', content)
        write(coco / f'captions_{split}.json', {'annotations': captions})
    converted(coco, tmp_path)
    for split, caption in (('train', 'of train'), ('validation', 'of val')):
        assert {row['caption'] for row in rows_of(tmp_path / 'out', split)} == {caption}


@pytest.mark.parametrize('path, split', [
    ('annotations_trainval2017/annotations/instances_val2017.json', 'validation'),
    ('annotations_trainval2017/annotations/instances_train2017.json', 'train'),
    ('valid/_annotations.coco.json', 'validation'),
    ('test/train/x.json', 'train'),
    ('latest/contest.json', None),
])
def test_the_split_is_that_of_the_file_then_of_the_nearest_folder(path, split):
    assert split_of(Path(path)) == split


def test_pictures_are_read_as_for_training(coco, tmp_path):
    """Turned upright, on white, 16 bits stretched; paths of Windows are taken."""
    content = content_of(coco)
    exif = Image.Exif()
    exif[0x0112] = 3                                       # upside down
    white_above = Image.new('RGB', (60, 40), 'white')
    white_above.paste((0, 0, 0), (0, 20, 60, 40))
    white_above.rotate(180).save(coco / 'pictures' / '0.jpg', exif=exif)
    content['images'][0]['file_name'] = 'images\\1\\0.jpg'
    Image.new('RGBA', (60, 40)).save(coco / 'pictures' / '1.png')
    content['images'][1]['file_name'] = '1.png'
    bright = np.linspace(0, 3000, 2400).reshape(40, 60).astype(np.uint16)
    Image.fromarray(bright).save(coco / 'pictures' / '2.png')
    content['images'][2]['file_name'] = '2.png'
    write(coco / 'instances_val2017.json', content)
    converted(coco, tmp_path, '--side', '60')
    found = []
    for row in rows_of(tmp_path / 'out')[:3]:
        picture = Image.open(tmp_path / 'out' / 'train' / row['file_name'])
        found.append(np.array(picture).mean((1, 2)))
    turned, clear, deep = found
    assert turned[:15].min() > 240
    assert turned[25:].max() < 15
    assert clear.min() == 255
    assert deep[0] < 15
    assert deep[-1] > 240


def test_other_json_is_named_and_left_out(coco, tmp_path, capsys):
    content = content_of(coco)
    segments = [{'image_id': 0, 'segments_info': [{'bbox': [1, 2, 3, 4]}]}]
    write(coco / 'panoptic_val2017.json', {**content, 'annotations': segments})
    write(coco / 'image_info_test2017.json', {'images': content['images'], 'categories': KINDS})
    write(coco / 'package.json', ['anything'])
    converted(coco, tmp_path)
    said = capsys.readouterr().out
    for name in ('panoptic_val2017', 'image_info_test2017', 'package'):
        assert f'{name}.json holds neither' in said
    assert '16 train' in said


@pytest.mark.parametrize('spoilt', [
    {'category_id': None},
    {'category_id': 99},
    {'bbox': [1, 2, 3]},
    {'bbox': [1, 2, float('nan'), 3]},
    {'bbox': [10, 10, 59, 39]},
    {'image_id': None},
    {'image_id': '0001'},
    {'segmentation': [['a', 'b']]},
    {'segmentation': [4, 10, 20, 10, 20, 30]},
])
def test_a_wrong_annotation_is_named_or_left_out(coco, tmp_path, capsys, spoilt):
    content = content_of(coco)
    content['annotations'][2] |= {'id': 77, **spoilt}
    write(coco / 'instances_val2017.json', content)
    said = left_out(['coco', coco, tmp_path / 'out'], capsys)
    assert 'left out 1 that are wrong' in said
    assert 'instances_val2017.json' in said
    assert '77' in said


def test_a_broken_picture_is_named_or_left_out(coco, tmp_path, capsys):
    picture = coco / 'pictures' / '3.jpg'
    picture.write_bytes(picture.read_bytes()[:500])
    assert '3.jpg' in left_out(['coco', coco, tmp_path / 'out'], capsys)


def test_a_missing_pet_is_named_or_left_out(pets, tmp_path, capsys):
    for name in ('images', 'annotations'):
        with tarfile.open(pets / f'{name}.tar.gz') as tar:
            tar.extractall(pets, filter='data')
    (pets / 'images' / 'Abyssinian_3.jpg').unlink()
    assert 'Abyssinian_3.jpg' in left_out(['pets', pets, tmp_path / 'out'], capsys)
    (pets / 'annotations' / 'test.txt').write_text('Abyssinian_1\n')
    refused(['pets', pets, tmp_path / 'other'], 'test.txt:1')


def test_boxes_come_from_polygons_and_pictures_without_objects_stay(coco, tmp_path, capsys):
    content = content_of(coco)
    without = {key: value for key, value in DOG.items() if key != 'bbox'}
    content['annotations'] = [{**without, 'image_id': i} for i in range(19)]
    write(coco / 'instances_val2017.json', content)
    (coco / 'captions_val2017.json').unlink()
    converted(coco, tmp_path, '--side', '60')
    assert '1 pictures have no objects' in capsys.readouterr().out
    rows = rows_of(tmp_path / 'out')
    assert rows[0]['objects'] == [{'name': 'dog', 'bbox': [2, 10, 23, 31]}]
    *_, last = rows_of(tmp_path / 'out', 'validation')
    assert last['objects'] == []
    assert last['caption'] == 'nothing'
    assert [q['answer'] for q in last['qa']] == ['no']


def annotate_all(coco, note: dict):
    """The one object of every picture."""
    content = content_of(coco)
    content['annotations'] = [{**note, 'image_id': i} for i in range(20)]
    write(coco / 'instances_val2017.json', content)


def test_boxes_in_shares_of_the_picture_are_no_pixels(coco, tmp_path):
    annotate_all(coco, {'category_id': 9, 'bbox': [.1, .2, .3, .4]})
    refused(['coco', coco, tmp_path / 'out'], 'no box is larger than 1')


def test_a_box_that_stands_for_a_mask_covers_its_pixels_and_no_more(coco, tmp_path):
    annotate_all(coco, {'category_id': 9, 'bbox': [10, 5, 20, 20]})
    row = converted(coco, tmp_path, '--side', '60')[0]
    mask = Image.open(tmp_path / 'out' / 'train' / row['mask'])
    expected = np.zeros((40, 60), np.uint8)
    expected[5:25, 10:30] = 1
    assert (np.array(mask) == expected).all()


def test_a_crowd_alone_is_something(coco, tmp_path):
    annotate_all(coco, CUPS)
    (coco / 'captions_val2017.json').unlink()
    rows = converted(coco, tmp_path)
    assert {row['caption'] for row in rows} == {'many cups'}


def test_captions_that_belong_to_no_picture_are_said(coco, tmp_path, capsys):
    captions = [{'image_id': 1000 + i, 'caption': 'a cup'} for i in range(20)]
    write(coco / 'captions_val2017.json', {'annotations': captions})
    converted(coco, tmp_path)
    assert 'captions_val2017.json: no caption belongs to a picture' in capsys.readouterr().out


def test_run_lengths_that_end_too_early_are_named(coco, tmp_path):
    pytest.importorskip('pycocotools.mask')
    content = content_of(coco)
    content['annotations'][4]['segmentation'] = {'size': [40, 60], 'counts': 'zzzz'}
    write(coco / 'instances_val2017.json', content)
    refused(['coco', coco, tmp_path / 'out'], 'picture 2 .*do not fill the picture')


def test_compressed_run_lengths(coco, tmp_path):
    packed = pytest.importorskip('pycocotools.mask')
    layer = np.zeros((40, 60), np.uint8, order='F')
    layer[5:9, 30:33] = 1
    shape = packed.encode(layer)
    counts = shape['counts'].decode()
    annotate_all(coco, {'category_id': 9, 'segmentation': {'size': [40, 60], 'counts': counts}})
    row = converted(coco, tmp_path, '--side', '60')[0]
    assert row['objects'] == [{'name': 'cup', 'bbox': [30, 5, 33, 9]}]
    mask = Image.open(tmp_path / 'out' / 'train' / row['mask'])
    assert (np.array(mask) == layer).all()


# ---- what is written ----
def test_hugging_face_reads_what_is_written(coco, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    datasets = pytest.importorskip('datasets')
    converted(coco, tmp_path)
    Folder(tmp_path / 'out', 16)                           # its cache is in no one's way
    found = datasets.load_dataset('imagefolder', data_dir=str(tmp_path / 'out'), cache_dir=str(tmp_path))
    assert found.num_rows == {'train': 16, 'validation': 2, 'test': 2}
    assert found['train'][0]['image'].size == (60, 40)
    assert found['train'][0]['caption'] == 'a dog near a cup'


def test_check_tells_what_a_folder_holds(coco, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out'
    prepare.main(['coco', str(coco), str(out)])
    meta = out / 'train' / 'metadata.jsonl'
    first, *others = meta.read_text().splitlines()
    first = first.replace('"name": "cup"', '"name": "mug"')
    meta.write_text('\n'.join([first, *others, '{}']))
    prepare.main(['check', str(out), '--out', str(tmp_path / 'check.png')])
    said = capsys.readouterr().out
    assert 'left out 1 bad rows' in said
    assert 'bad: ' in said
    assert 'objects that are no class, how often:\n  mug 1' in said
    assert 'train: 16 rows, 16 pictures, from (60, 40) to (60, 40) pixels' in said
    assert re.search(r'dog +1\d\.\d% +20', said)
    assert re.search(r'count +\d+ +1.000 +1 100%', said)
    assert re.search(r"caption: 1 different, the longest of \d+ tokens: 'a dog near a cup'", said)
    assert Image.open(tmp_path / 'check.png').width == 8 * 132 + 4
    real = learnable.print_table
    monkeypatch.setattr(learnable, 'print_table', lambda world: real(world, steps=2))
    prepare.main(['check', str(out), '--out', str(tmp_path / 'check.png'), '--learnable'])
    assert '| question | CNN | blind | kept |' in capsys.readouterr().out
