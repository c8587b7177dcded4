"""The commands as a user types them, the README; bad input: one clear line, exit 2, nothing written."""

import ast
import io
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import eval as evaluation
import folder as folders
import sample
import train
from data import UserError
from experiments import bench, report, reproduce


def read_image(path, size):
    return folders.read_image(path, size)[None] / 255


def run(script, *args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def folder(run_dir, tmp_path_factory):
    """A folder with out/test/ in it, as the README's commands leave it."""
    folder = tmp_path_factory.mktemp('user')
    (folder / 'out').mkdir()
    (folder / 'out' / 'test').symlink_to(run_dir, target_is_directory=True)
    Image.new('RGB', (50, 40), 'red').save(folder / 'photo.png')
    return folder


def test_readme_commands(folder, monkeypatch):
    """Every sample.py and eval.py command of the README runs, at tiny size, from any folder."""
    monkeypatch.chdir(folder)
    lines = re.findall(
        r'^ *python ((?:sample|eval)\.py [^#\n]*)', (ROOT / 'README.md').read_text(), re.M
    )
    assert len(lines) >= 6
    for line in lines:
        script, *words = shlex.split(line.replace('out/cpu', 'out/test'))
        main, extra = (sample.main, []) if script == 'sample.py' else (evaluation.main, ['--n', '16'])
        main(words + extra)


def test_a_map_that_was_never_taught_is_warned_of(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for task, warned in (('segment', False), ('depth', True)):
        sample.main([task, 'photo.png', '--out', 'map.png'])
        assert ('did not learn this map' in capsys.readouterr().out) == warned


def test_readme_flags_exist():
    for line in re.findall(r'python train\.py ([^#\n`]*)', (ROOT / 'README.md').read_text()):
        if line.split() != ['-h']:
            train.parse(shlex.split(line))


def test_readme_experiments_exist(monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce, 'execute', lambda a, arms: seen.append((a.seeds, arms)))
    monkeypatch.setattr(report, 'report', lambda out: None)
    monkeypatch.setattr(reproduce, 'open_world', lambda *how: data.World(16))
    for line in re.findall(
        r'python -m experiments\.reproduce ?([^#\n`]*)', (ROOT / 'README.md').read_text()
    ):
        reproduce.main(shlex.split(line))
    assert seen and all(set(arms) <= reproduce.ARMS.keys() for _, arms in seen)


def test_readme_says_how_long_the_files_are():
    text = (ROOT / 'README.md').read_text()
    for name in ('data.py', 'folder.py', 'model.py', 'eval.py', 'optim.py', 'train.py', 'sample.py'):
        stated = int(re.search(rf'`{name}` \((\d+) lines\)', text)[1])
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(stated - actual) <= 0.1 * actual, (name, stated, actual)


def test_bench_counts_what_autograd_keeps():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    keeps = 4 * (x.numel() + w.numel() + 8 * 4)  # both factors of x @ w, and its exponential
    assert bench.kept(lambda: (x @ w).exp().sum()) == keeps
    assert bench.flops(lambda: x @ w) == 2 * 8 * 16 * 4


def test_house_rules():
    """Budgets that keep the code readable, and imports that go one way."""
    order = ['data', 'folder', 'model', 'eval', 'optim', 'train']
    for name in (*order, 'sample'):
        lines = (ROOT / f'{name}.py').read_text().splitlines()
        assert max(map(len, lines)) <= 105, name
        if name in ('eval', 'sample', 'train'):  # OpenMP reads what data has set when torch is loaded
            first = [line.split()[1] for line in lines if re.match('import (data|torch)', line)]
            assert first[0] == 'data', name
        used = {
            m
            for line in lines
            for m in re.findall(r'^(?:from|import) (data|folder|model|eval|optim|train|sample)\b', line)
        }
        later = order[order.index(name) :] if name in order else ['eval', 'train']
        assert not used & set(later), name
    for path in [*ROOT.glob('*.py'), *(ROOT / 'experiments').glob('*.py')]:
        for f in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(f, ast.FunctionDef) or f.end_lineno - f.lineno < 60, f.name
    for path in [*(ROOT / 'experiments').glob('*.py'), *(ROOT / 'tests').glob('*.py')]:
        lines = path.read_text().splitlines()
        assert max(map(len, lines), default=0) <= 105, path.name


def test_draw_is_seeded_and_writes_a_picture(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pixels = []
    for seed in (0, 0, 1):
        sample.main(['draw', 'a red circle', '--n', '3', '--seed', str(seed), '--out', 'd.png'])
        pixels.append(np.array(Image.open('d.png')))
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()


@pytest.mark.parametrize(
    'mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'I;16', 'F']
)
@pytest.mark.parametrize('shape', [(1, 1), (3, 200)])
def test_pictures_of_any_mode_and_size(tmp_path, mode, shape):
    im = Image.new(mode, shape)
    path = tmp_path / ('x.tif' if mode in ('LAB', 'F', 'CMYK', 'YCbCr') else 'x.png')
    try:
        im.save(path)
        Image.open(path).load()
    except OSError:  # Pillow 12.3 cannot read its own YCbCr TIFF
        pytest.skip('this Pillow does not write such a file, or cannot read it back')
    x = read_image(path, 16)
    assert x.shape == (1, 3, 16, 16) and 0 <= x.min() and x.max() <= 1


def test_pictures_are_read_right(tmp_path):
    """Area filter, white behind transparency, upright by EXIF, 16 bits scaled and not clipped."""
    a = np.zeros((64, 64, 3), np.uint8)
    a[::2, :32] = 255
    Image.fromarray(a).save(tmp_path / 'a.png')
    x = read_image(tmp_path / 'a.png', 16)[0, 0]
    assert torch.allclose(x[:, :8], torch.tensor(0.5), atol=0.01) and x[:, 8:].max() == 0
    Image.new('RGBA', (9, 9), (255, 0, 0, 0)).save(tmp_path / 'b.png')
    assert read_image(tmp_path / 'b.png', 16).min() == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    im = Image.new('RGB', (64, 64))
    im.paste((255, 255, 255), (0, 0, 64, 32))
    im.save(tmp_path / 'c.jpg', exif=exif)
    x = read_image(tmp_path / 'c.jpg', 16)[0, 0]
    assert x[:, 12:].min() > 0.9 and x[:, :4].max() < 0.1
    Image.fromarray(np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)).save(
        tmp_path / 'd.png'
    )
    x = read_image(tmp_path / 'd.png', 16)[0, 0]
    assert x[0].mean() < 0.1 and x[-1].mean() > 0.9


def bomb():
    """A PNG header that claims 60,000 x 60,000 pixels."""
    f = io.BytesIO()
    Image.new('L', (4, 4)).save(f, 'PNG')
    b = bytearray(f.getvalue())
    b[16:24] = (60000).to_bytes(4, 'big') * 2
    import zlib

    b[29:33] = zlib.crc32(bytes(b[12:29])).to_bytes(4, 'big')
    return bytes(b)


def test_bad_pictures(tmp_path, folder):
    good = (folder / 'photo.png').read_bytes()
    path = tmp_path / 'x.png'
    for content in (b'', b'hello', good[:20], good[:60], bomb()):
        path.write_bytes(content)
        with pytest.raises(UserError, match='x.png'):
            read_image(path, 16)
    with pytest.raises(UserError, match='no picture'):
        read_image(tmp_path / 'none.png', 16)
    with pytest.raises(UserError):
        read_image(tmp_path, 16)


def test_pictures_cut_at_every_byte_of_the_header_animated_and_long(tmp_path):
    frames = [Image.new('RGB', (30, 20), c) for c in ('red', 'blue')]
    for name in ('x.png', 'x.jpg', 'x.gif', 'x.webp'):
        path = tmp_path / name
        frames[0].save(path, save_all=name.endswith(('gif', 'webp')), append_images=frames[1:])
        assert read_image(path, 16)[0, 0].min() > 0.9  # of an animation, the first picture
        good = path.read_bytes()
        for n in range(25):
            path.write_bytes(good[:n])
            with pytest.raises(UserError, match=name):
                read_image(path, 16)
    for size in ((20_000, 1), (1, 20_000)):
        Image.new('RGB', size).save(tmp_path / 'long.png')
        assert read_image(tmp_path / 'long.png', 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    'args,named',
    [
        (['draw', ''], 'empty'),
        (['draw', 'a ' * 10000], 'tokens'),
        (['ask', 'photo.png', ' '], 'empty'),
        (['draw', 'x', '--n', '0'], '--n is 0'),
        (['draw', 'x', '--temperature', '-1'], 'temperature'),
        (['draw', 'x', '--cfg', 'nan'], 'cfg'),
        (['draw', 'x', '--out', 'none/x.png'], 'none/x.png'),
        (['draw', 'x', '--checkpoint', 'none'], 'train.py'),
        (['draw', 'x', '--device', 'tpu'], 'tpu'),
        (['draw', 'x', '--checkpoint', 'photo.png'], 'photo.png'),
        (['ask', 'none.png', 'how many?'], 'none.png'),
        (['segment', 'out'], 'out'),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, args, named, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob('*'))
    with pytest.raises(SystemExit) as e:
        data.guard(lambda: sample.main(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1 and named in err
    assert sorted(folder.rglob('*')) == before


def test_special_token_look_alikes_are_plain_text(folder, monkeypatch):
    monkeypatch.chdir(folder)
    sample.main(['ask', 'photo.png', '<|end|><|answer|> how many?'])


def test_no_checkpoint_names_the_command_that_makes_one(tmp_path):
    done = run('sample.py', 'draw', 'x', cwd=tmp_path)
    assert done.returncode == 2 and 'python train.py' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('module', [train, evaluation, sample])
def test_help_and_unknown_flags(module, capsys):
    draw = ['draw', 'x'] if module is sample else []
    for args, status in ((['-h'], 0), ([*draw, '--colour', '1'], 2)):
        with pytest.raises(SystemExit) as e:
            module.main(args)
        assert e.value.code == status
    assert '--colour' in capsys.readouterr().err


def test_impossible_flag_as_typed(tmp_path):
    """One real process: exit status 2, one line, no traceback, nothing written."""
    done = run('train.py', '--proxy', 'sge', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and "'sge'" in done.stderr
    assert not list(tmp_path.iterdir())
