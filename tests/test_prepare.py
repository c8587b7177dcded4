"""Converters on tiny fakes of the official layouts; what they write is read by folder.Folder."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import UserError
from experiments import prepare
from folder import Folder


@pytest.fixture
def pets(tmp_path):
    """images.tar.gz and annotations.tar.gz as Oxford serves them: 20 trainval and 4 test pictures."""
    root = tmp_path / 'downloads'
    root.mkdir()
    rng = np.random.default_rng(0)
    lines = [
        f'{"Abyssinian" if i % 2 else "great_pyrenees"}_{i} {1 + i % 2} {2 - i % 2} 1' for i in range(24)
    ]
    with (
        tarfile.open(root / 'images.tar.gz', 'w:gz') as images,
        tarfile.open(root / 'annotations.tar.gz', 'w:gz') as notes,
    ):

        def add(tar, name, content):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        def picture(array, kind):
            out = io.BytesIO()
            Image.fromarray(array).save(out, kind)
            return out.getvalue()

        for i, line in enumerate(lines):
            name = line.split()[0]
            add(
                images,
                f'images/{name}.jpg',
                picture(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8), 'JPEG'),
            )
            trimap = np.full((40, 60), 2, np.uint8)
            if i != 5:  # as in the original, a picture without a pet pixel
                trimap[9:31, 4:26], trimap[10:30, 5:25] = 3, 1
            add(notes, f'annotations/trimaps/{name}.png', picture(trimap, 'PNG'))
        add(notes, 'annotations/trainval.txt', '\n'.join(['# comment', *lines[:20]]).encode())
        add(notes, 'annotations/test.txt', '\n'.join(lines[20:]).encode())
    return root


def test_pets(pets, tmp_path, capsys):
    prepare.main(['pets', str(pets), str(tmp_path / 'out'), '--side', '30'])
    assert '18 train, 2 validation, 4 test' in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['downloads', 'out']  # nothing temporary stays
    rows = [
        json.loads(x)
        for s in prepare.SPLITS
        for x in (tmp_path / 'out' / s / 'metadata.jsonl').read_text().splitlines()
    ]
    row = next(r for r in rows if 'great pyrenees' in r['caption'] and r['objects'])
    assert row['caption'] == 'a small great pyrenees dog on the left'
    assert row['objects'] == [{'name': 'great pyrenees dog', 'bbox': [2.5, 5.0, 12.5, 15.0]}]
    answers = {q['type']: q['answer'] for q in row['qa']}
    assert (
        answers['species'] == 'dog'
        and answers['position'] == 'left'
        and answers['breed'] == 'great pyrenees'
    )
    world = Folder(tmp_path / 'out', 16)
    assert set(world.maps) == {'seg', 'edge'} and world.captions
    assert set(world.scenes('test', 0, 4)[1].classes.unique().tolist()) == {0, 1, 255}


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / 'downloads'
    (root / 'pictures').mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, notes, captions = [], [], []
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)).save(
            root / 'pictures' / f'{i}.jpg'
        )
        images.append({'id': i, 'file_name': f'{i}.jpg', 'width': 60, 'height': 40})
        runs = [40 * 40 + 4, 8, 32, 8, 2400 - 40 * 40 - 52]  # two columns of eight pixels at x = 40
        notes += [
            {'image_id': i, 'category_id': 7, 'iscrowd': 0, 'area': 400, 'bbox': [2, 10, 20, 20],
             'segmentation': [[2, 10, 22, 10, 22, 30, 2, 30]]},
            {'image_id': i, 'category_id': 9, 'iscrowd': 0, 'area': 16, 'bbox': [40, 4, 2, 8],
             'segmentation': {'counts': runs, 'size': [40, 60]}},
        ]  # fmt: skip
        captions.append({'image_id': i, 'caption': 'A Dog near a cup. '})
    notes.append(
        {
            'image_id': 0,
            'category_id': 9,
            'iscrowd': 1,
            'area': 9,
            'bbox': [50, 30, 5, 5],
            'segmentation': {},
        }
    )
    kinds = [{'id': 7, 'name': 'dog'}, {'id': 9, 'name': 'cup'}, {'id': 11, 'name': 'kite'}]
    (root / 'instances_val2017.json').write_text(
        json.dumps({'images': images, 'annotations': notes, 'categories': kinds})
    )
    (root / 'captions_val2017.json').write_text(json.dumps({'annotations': captions}))
    return root


def test_coco(coco, tmp_path, capsys):
    prepare.main(['coco', str(coco), str(tmp_path / 'out'), '--side', '60'])
    assert '16 train, 2 validation, 2 test' in capsys.readouterr().out
    rows = [json.loads(x) for x in (tmp_path / 'out/train/metadata.jsonl').read_text().splitlines()]
    assert rows[1]['caption'] == 'a dog near a cup'
    assert {o['name'] for o in rows[1]['objects']} == {'dog', 'cup'}
    types = {q['type']: q for q in rows[1]['qa']}
    assert types.keys() >= {'exist', 'count', 'position', 'relation', 'larger'}
    assert types['relation']['answer'] == (
        'left' if types['relation']['question'].startswith('Is the dog') else 'right'
    )
    assert types['larger']['answer'] == 'dog'
    mask = np.array(Image.open(tmp_path / 'out/train' / rows[0]['mask']))
    names = json.loads((tmp_path / 'out/classes.json').read_text())['mask_classes']
    assert (mask[12:28, 4:20] == names.index('dog')).all() and (
        mask[4:12, 40:42] == names.index('cup')
    ).all()
    assert (mask == names.index('cup')).sum() == 16 and (mask[31:34, 51:54] == 255).all()
    assert Folder(tmp_path / 'out', 16).kinds == ('count', 'exist', 'larger', 'position', 'relation')


def test_coco_without_captions_lists_the_objects(coco, tmp_path):
    (coco / 'captions_val2017.json').unlink()
    prepare.main(['coco', str(coco), str(tmp_path / 'out'), '--classes', 'cup', '--limit', '2'])
    row = json.loads((tmp_path / 'out/train/metadata.jsonl').read_text().splitlines()[0])
    assert row['caption'] == 'a cup'


def test_bad_downloads_are_named_and_nothing_is_written(tmp_path, pets):
    for words, what in (
        (['pets', str(tmp_path / 'none'), 'x'], 'none'),
        (['pets', str(tmp_path), str(tmp_path / 'x')], 'images'),
        (['coco', str(pets), str(tmp_path / 'x')], 'instances'),
        (['pets', str(pets), str(pets)], 'there already'),
        (['pets', str(pets), str(tmp_path / 'x'), '--side', '3'], '--side is 3'),
    ):
        with pytest.raises(UserError, match=what):
            prepare.main(words)
    Image.new('RGB', (9, 9)).save(pets / 'x.png')
    (pets / 'instances.json').write_text('{"images": [')
    with pytest.raises(UserError, match='not whole JSON'):
        prepare.main(['coco', str(pets), str(tmp_path / 'x')])
    assert not (tmp_path / 'x').exists()


def test_exports_with_splits_in_folders_and_equal_names(coco, tmp_path):
    """As Roboflow writes them: train, valid and test, each with its annotations and its own 0.jpg."""
    d = json.loads((coco / 'instances_val2017.json').read_text())
    root = tmp_path / 'export'
    for k, split in enumerate(('train', 'valid', 'test')):
        (root / split).mkdir(parents=True)
        (root / split / '_annotations.coco.json').write_text(json.dumps(d))
        for im in d['images']:
            Image.new('RGB', (60, 40), (80 * k, im['id'], 0)).save(
                root / split / im['file_name'].replace('jpg', 'png')
            )
            im['file_name'] = im['file_name'].replace('jpg', 'png')
        (root / split / '_annotations.coco.json').write_text(json.dumps(d))
    prepare.main(['coco', str(root), str(tmp_path / 'out')])
    for k, split in enumerate(prepare.SPLITS):
        rows = (tmp_path / 'out' / split / 'metadata.jsonl').read_text().splitlines()
        assert len(rows) == 20
        for row in rows:
            assert (
                Image.open(tmp_path / 'out' / split / json.loads(row)['file_name']).getpixel((0, 0))[0]
                == 80 * k
            )


def test_annotations_without_pictures_and_with_errors(coco, tmp_path, capsys):
    d = json.loads((coco / 'instances_val2017.json').read_text())
    more = d | {
        'images': [
            {'id': 900 + i, 'file_name': f'none{i}.jpg', 'width': 9, 'height': 9} for i in range(5)
        ]
    }
    (coco / 'instances_train2017.json').write_text(
        json.dumps(more)
    )  # as in the official zip beside val2017
    prepare.main(['coco', str(coco), str(tmp_path / 'out')])
    assert '5 of 5 pictures are not there' in capsys.readouterr().out
    (coco / 'instances_train2017.json').unlink()
    for wrong in (
        {'bbox': [1]},
        {'segmentation': [[1.0]]},
        {'segmentation': {'counts': [3], 'size': [40, 60]}},
    ):
        bad = json.loads(json.dumps(d))
        bad['annotations'][4] |= wrong
        (coco / 'instances_val2017.json').write_text(json.dumps(bad))
        with pytest.raises(UserError, match='picture 2'):
            prepare.main(['coco', str(coco), str(tmp_path / 'out2')])
        assert not list(tmp_path.glob('out2*'))
    d['images'][3]['width'] = 40
    (coco / 'instances_val2017.json').write_text(json.dumps(d))
    with pytest.raises(UserError, match='picture 3'):
        prepare.main(['coco', str(coco), str(tmp_path / 'out2')])
