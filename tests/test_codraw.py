"""CoDraw's official files -> a folder, on made-up clip art."""
import json

import numpy as np
import pytest
from PIL import Image

import data
from experiments import codraw, prepare
from folder import Folder

SUN = 's_3s.png,0,3,0,250,40,0,0'              # near, at the top
TENT = 'p_5s.png,1,5,1,100,300,0,0'            # near
OAK = 'p_8s.png,2,8,1,130,300,2,0'             # far: half as large, and behind the tent
BOY = 'hb0_12s.png,3,12,2,400,300,0,1'         # mirrored


def scene(*pieces) -> str:
    return f'{len(pieces)},' + ','.join(pieces) + ','


@pytest.fixture
def downloads(tmp_path):
    """Pieces are full rectangles of 80 x 60 of their own grey; the boy is solid on the left only."""
    root = tmp_path / 'downloads'
    pngs = root / 'Pngs'
    pngs.mkdir(parents=True)
    ground = np.zeros((400, 500, 3), np.uint8)
    ground[:200] = 90, 160, 255                            # sky
    ground[200:] = 60, 200, 60                             # grass
    Image.fromarray(ground).save(pngs / 'background.png')
    for i, name in enumerate(('s_3s', 'p_5s', 'p_8s', 'hb0_12s')):
        piece = np.full((60, 80, 4), 40 * i + 40, np.uint8)
        piece[..., 3] = 255
        if name == 'hb0_12s':
            piece[:, 40:, 3] = 0
        Image.fromarray(piece).save(pngs / f'{name}.png')
    scenes = {}
    for k in range(9):                                     # in each the boy stands elsewhere
        split = ('train', 'val', 'test')[k // 3]
        boy = BOY.replace('400', str(260 + 20 * k))
        scenes[f'{split}_{k:05d}'] = {'abs_t': scene(SUN, TENT, OAK, boy)}
    (root / 'CoDraw_1_0.json').write_text(json.dumps({'data': scenes}))
    return root


def test_near_pieces_hide_far_ones_and_mirrored_ones_are_turned(downloads):
    drawer = codraw.Drawer(downloads / 'Pngs')
    pieces = codraw.pieces_of(scene(SUN, TENT, OAK, BOY))
    assert [piece.name for piece in pieces] == ['sun', 'tent', 'oak tree', 'boy']
    image, mask, found = drawer.draw(pieces)
    mask = np.array(mask)
    names = [codraw.CLASSES[k] for k in np.unique(mask)]
    assert sorted(names) == ['boy', 'grass', 'oak tree', 'sky', 'sun', 'tent']
    tent, oak, boy = [codraw.CLASSES.index(name) for name in ('tent', 'oak tree', 'boy')]
    assert (mask[270:330, 60:140] == tent).all()           # 80 x 60 around (100, 300)
    assert mask[300, 145] == oak                           # it reaches from 110 to 149
    assert (mask[270:330, 400:440] == boy).all()           # the solid half is the right one now
    assert mask[300, 390] == codraw.CLASSES.index('grass')
    assert dict(found)['tent'] == (60, 270, 140, 330)
    assert image.getpixel((100, 300)) == (80, 80, 80)      # the tent's grey


def test_the_folder_can_be_trained_on(downloads, tmp_path, capsys):
    out = tmp_path / 'out'
    prepare.main(['codraw', str(downloads), str(out), '--side', '64'])
    assert '3 train, 3 validation, 3 test' in capsys.readouterr().out
    row = json.loads((out / 'train' / 'metadata.jsonl').read_text().splitlines()[0])
    assert row['caption'] == 'a sun, a tent and a boy'     # of the oak tree hardly anything is seen
    assert Image.open(out / 'train' / row['mask']).size == (64, 51)
    questions = [q['question'] for q in row['qa']]
    assert 'oak tree' not in ' '.join(questions)           # nor is it denied
    kinds = {q['type'] for q in row['qa']}
    assert {'exist', 'count', 'position'} <= kinds
    world = Folder(out, 16)
    assert world.annotated == ('classes',)
    assert world.names == codraw.CLASSES
    assert [len(rows) for rows in world.rows.values()] == [3, 3, 3]


@pytest.mark.parametrize('wrong, message', [
    ('2,s_3s.png,0,3,0,250,40,0,0,', '2 pieces need 16 values, there are 8'),
    (scene(SUN.replace('250', 'x')), 'could not convert'),
    (scene(SUN.replace('s_3s', 's_30s')), 'out of range'),
    (scene(SUN.replace('s_3s', 'q_3s')), "'q'"),
    (scene('s_3s.png,0,3,0,250,40,7,0'), "depth is '7'"),
    (scene('s_4s.png,0,3,0,250,40,0,0'), 'cannot read'),
    (None, 'NoneType'),
])
def test_a_wrong_scene_is_named_or_left_out(downloads, tmp_path, capsys, wrong, message):
    path = downloads / 'CoDraw_1_0.json'
    content = json.loads(path.read_text())
    content['data']['train_00001']['abs_t'] = wrong
    path.write_text(json.dumps(content))
    command = ['codraw', str(downloads), str(tmp_path / 'out')]
    with pytest.raises(data.UserError, match=f'train_00001: .*{message}'):
        prepare.main(command)
    assert not (tmp_path / 'out').exists()
    prepare.main([*command, '--skip-bad'])
    assert '2 train, 3 validation, 3 test' in capsys.readouterr().out


def test_missing_files_are_named(downloads, tmp_path):
    (downloads / 'CoDraw_1_0.json').unlink()
    with pytest.raises(data.UserError, match='CoDraw_1_0.json'):
        prepare.main(['codraw', str(downloads), str(tmp_path / 'out')])
    (downloads / 'Pngs' / 'background.png').unlink()
    with pytest.raises(data.UserError, match='background.png'):
        prepare.main(['codraw', str(downloads), str(tmp_path / 'out')])
