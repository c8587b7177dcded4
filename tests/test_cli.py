"""The commands as a user types them, the README, the rules of the house; bad input: one clear line,
exit 2, nothing written."""
import ast
import io
import re
import shlex
import subprocess
import sys
import zlib

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
from experiments import bench, figures, report, reproduce

README = (ROOT / 'README.md').read_text()


def read_image(path, size):
    """A picture file in [0, 1], [3, size, size]."""
    return folders.shrunk(folders.upright(path), size) / 255


def run(script, *args, cwd):
    """One real process."""
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope='module')
def folder(run_dir, tmp_path_factory):
    """A folder with out/test/ in it, as the README's commands leave it."""
    folder = tmp_path_factory.mktemp('user')
    (folder / 'out').mkdir()
    (folder / 'out' / 'test').symlink_to(run_dir, target_is_directory=True)
    Image.new('RGB', (50, 40), 'red').save(folder / 'photo.png')
    return folder


# ---- the README ----
def commands(what: str) -> list[list[str]]:
    """The words that follow `what` in the README, for each time it stands there."""
    lines = re.findall(what + r'(?= |\n|`)([^#\n`]*)', README)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize('script, main, extra, least', [
    ('sample', sample.main, [], 5),
    ('eval', evaluation.main, ['--n', '16'], 1),
])
def test_readme_commands(folder, monkeypatch, script, main, extra, least):
    """Every sample.py and eval.py command of the README runs, at tiny size, from any folder."""
    monkeypatch.chdir(folder)
    lines = [words for words in commands(rf'python {script}\.py') if words]
    assert len(lines) >= least
    for words in lines:
        words = [word.replace('out/cpu', 'out/test') for word in words]
        main(words + extra)


def test_readme_flags_exist():
    lines = commands(r'python train\.py')
    flags = []
    for words in lines:
        flags += [word for word in words if word.startswith('--')]
        if words != ['-h']:
            train.parse(words)
    assert len(lines) >= 3                                 # the README was understood
    assert len(flags) >= 3


def test_readme_experiments_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TQDM_DISABLE', '1')                # which main sets: to be undone
    seen = []

    def note(a, arms):
        seen.append(arms)
        return []

    monkeypatch.setattr(reproduce, 'execute', note)
    monkeypatch.setattr(report, 'report', lambda out: None)
    monkeypatch.setattr(figures, 'draw_all', lambda out, found: None)
    monkeypatch.setattr(reproduce, 'open_world', lambda *how: data.World(16))
    lines = commands(r'python -m experiments\.reproduce')
    assert len(lines) >= 2
    for words in lines:
        reproduce.main(words)
    assert len(seen) == len([words for words in lines if '--report' not in words]) > 0
    for arms in seen:
        assert arms
        assert set(arms) <= reproduce.ARMS.keys()


def test_bench_counts_what_autograd_keeps():
    x = torch.randn(8, 16, requires_grad=True)
    w = torch.randn(16, 4, requires_grad=True)
    numbers = x.numel() + w.numel() + 8 * 4                # both factors of x @ w, and its exponential
    assert bench.kept(lambda: (x @ w).exp().sum()) == 4 * numbers
    assert bench.flops(lambda: x @ w) == 2 * 8 * 16 * 4


# ---- the rules of the house: budgets that keep the code readable, and imports that go one way ----
MAY_IMPORT = {
    'data': set(),
    'folder': {'data'},
    'model': {'data', 'folder'},
    'eval': {'data', 'folder', 'model'},
    'sample': {'data', 'folder', 'model'},
    'train': {'data', 'folder', 'model', 'eval', 'sample'},
}
CORE = [ROOT / f'{name}.py' for name in MAY_IMPORT]
OTHERS = sorted(ROOT.glob('experiments/*.py')) + sorted(ROOT.glob('tests/*.py'))
CORE_DENSITY = 8.          # nodes of the syntax tree on a line of code, on average; at most
OTHERS_DENSITY = 8.5
CORE_NODES = 19_611        # of all core files together; 16,000 are the aim


def id_of(path) -> str:
    """The name of a case below."""
    return path.relative_to(ROOT).as_posix()


def imports(path) -> list[str]:
    """Top-level names of the modules that a file imports, in order."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return [name.split('.')[0] for name in names]


def size_of(path) -> tuple[int, int]:
    """-> (nodes of the syntax tree, lines of code), without docstrings, comments and blank lines."""
    text = path.read_text()
    nodes, said = 0, set()                                 # lines of docstrings
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.expr_context)):           # there is nothing to read
            continue
        nodes += 1
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            nodes -= 2                                     # a docstring, and the text in it
            said.update(range(node.lineno, node.end_lineno + 1))
    code = 0
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and number not in said and not line.startswith('#'):
            code += 1
    return nodes, code


def test_size_counts_what_is_to_be_read(tmp_path):
    path = tmp_path / 'x.py'
    code = '"""Two\nlines."""\n\n# said\nx = 1  # said too\nif x:\n    """More."""\n    x += 2\n'
    path.write_text(code)
    # Assign, Name, Constant; If, Name; AugAssign, Name, Add, Constant
    assert size_of(path) == (9, 3)


@pytest.mark.parametrize('name', MAY_IMPORT)
def test_imports_go_one_way(name):
    used = imports(ROOT / f'{name}.py')
    ours = {path.stem for path in CORE + OTHERS} | {'experiments', 'tests'}
    assert ours & set(used) <= MAY_IMPORT[name]
    if name in ('eval', 'sample', 'train'):
        # OpenMP reads what data has set when torch is loaded
        assert used.index('data') < used.index('torch')


def test_there_are_six_core_files():
    assert sorted(ROOT.glob('*.py')) == sorted(CORE)
    assert len(OTHERS) > 10


@pytest.mark.parametrize('path', CORE + OTHERS, ids=id_of)
def test_lines_and_functions_are_short(path):
    text = path.read_text()
    for line in text.splitlines():
        assert len(line) <= 105, line
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize('path', CORE + OTHERS, ids=id_of)
def test_code_is_not_dense(path):
    nodes, code = size_of(path)
    most = CORE_DENSITY if path in CORE else OTHERS_DENSITY
    assert nodes <= most * code, f'{nodes / code:.2f} nodes a line'


def test_the_core_is_small():
    nodes = {path.name: size_of(path)[0] for path in CORE}
    assert sum(nodes.values()) <= CORE_NODES, nodes


# ---- sampling ----
def test_draw_is_seeded_and_writes_a_picture(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pictures = []
    for seed in ('0', '0', '1'):
        sample.main(['draw', 'a red circle', '--n', '3', '--seed', seed, '--out', 'd.png'])
        pictures.append(np.array(Image.open('d.png')))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize('task, warned', [('segment', False), ('depth', True)])
def test_a_map_that_was_never_taught_is_warned_of(folder, monkeypatch, capsys, task, warned):
    monkeypatch.chdir(folder)
    sample.main([task, 'photo.png', '--out', 'map.png'])
    assert ('did not learn this map' in capsys.readouterr().out) == warned


def test_words_that_training_never_showed_are_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    sample.main(['draw', 'draw a red Zebra!', '--n', '1'])
    assert 'training never showed zebra !' in capsys.readouterr().out
    sample.main(['ask', 'photo.png', 'how many red rings are there?'])
    assert 'never showed' not in capsys.readouterr().out


def test_a_text_that_does_not_end_is_marked(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(data, 'MAX_TEXT', data.MAX_PLAN + 20)
    sample.main(['caption', 'photo.png', '--n', '3', '--temperature', '100'])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.endswith(' ... (cut)')


def test_special_token_look_alikes_are_plain_text(folder, monkeypatch):
    monkeypatch.chdir(folder)
    sample.main(['ask', 'photo.png', '<|end|><|answer|> how many?'])


# ---- pictures of any kind ----
MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'I;16', 'F')


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shape', [(1, 1), (3, 200)])
def test_pictures_of_any_mode_and_size(tmp_path, mode, shape):
    kind = 'tif' if mode in ('LAB', 'F', 'CMYK', 'YCbCr') else 'png'
    path = tmp_path / f'x.{kind}'
    try:
        Image.new(mode, shape).save(path)
        Image.open(path).load()
    except OSError:                                        # Pillow 12.3 cannot read its own YCbCr TIFF
        pytest.skip('this Pillow does not write such a file, or cannot read it back')
    x = read_image(path, 16)
    assert x.shape == (3, 16, 16)
    assert 0 <= x.min()
    assert x.max() <= 1


def test_pictures_are_shrunk_by_area(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2, :32] = 255                                 # every second line of the left half
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    x = read_image(tmp_path / 'x.png', 16)[0]
    assert torch.allclose(x[:, :8], torch.tensor(.5), atol=.01)
    assert x[:, 8:].max() == 0


def test_what_is_transparent_is_white(tmp_path):
    Image.new('RGBA', (9, 9), (255, 0, 0, 0)).save(tmp_path / 'x.png')
    assert read_image(tmp_path / 'x.png', 16).min() == 1


def test_pictures_are_turned_upright(tmp_path):
    im = Image.new('RGB', (64, 64))
    im.paste((255, 255, 255), (0, 0, 64, 32))              # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be turned to the right
    im.save(tmp_path / 'x.jpg', exif=exif)
    x = read_image(tmp_path / 'x.jpg', 16)[0]
    assert x[:, 12:].min() > .9
    assert x[:, :4].max() < .1


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    rising = np.linspace(0, 65535, 4096).reshape(64, 64)
    Image.fromarray(rising.astype(np.uint16)).save(tmp_path / 'x.png')
    x = read_image(tmp_path / 'x.png', 16)[0]
    assert x[0].mean() < .1
    assert x[-1].mean() > .9


def bomb() -> bytes:
    """A PNG header that claims 60,000 x 60,000 pixels."""
    f = io.BytesIO()
    Image.new('L', (4, 4)).save(f, 'PNG')
    png = bytearray(f.getvalue())
    png[16:24] = (60_000).to_bytes(4, 'big') * 2
    checksum = zlib.crc32(png[12:29])
    png[29:33] = checksum.to_bytes(4, 'big')
    return bytes(png)


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


@pytest.mark.parametrize('name', ['x.png', 'x.jpg', 'x.gif', 'x.webp'])
def test_pictures_cut_at_every_byte_of_the_header_and_animated(tmp_path, name):
    path = tmp_path / name
    red, blue = [Image.new('RGB', (30, 20), colour) for colour in ('red', 'blue')]
    red.save(path, save_all=name.endswith(('gif', 'webp')), append_images=[blue])
    assert read_image(path, 16)[0].min() > .9              # of an animation, the first picture
    good = path.read_bytes()
    for n in range(25):
        path.write_bytes(good[:n])
        with pytest.raises(UserError, match=name):
            read_image(path, 16)


@pytest.mark.parametrize('size', [(20_000, 1), (1, 20_000)])
def test_long_pictures(tmp_path, size):
    Image.new('RGB', size).save(tmp_path / 'long.png')
    assert read_image(tmp_path / 'long.png', 16).shape == (3, 16, 16)


# ---- bad input ----
@pytest.mark.parametrize('args, named', [
    (['draw', ''], 'empty'),
    (['draw', 'a ' * 10_000], 'tokens'),
    (['ask', 'photo.png', ' '], 'empty'),
    (['draw', 'x', '--n', '0'], '--n is 0'),
    (['draw', 'x', '--temperature', '-1'], '--temperature is -1'),
    (['draw', 'x', '--cfg', 'nan'], '--cfg is nan'),
    (['draw', 'x', '--out', 'none/x.png'], 'none/x.png'),
    (['draw', 'x', '--checkpoint', 'none'], 'train.py'),
    (['draw', 'x', '--device', 'tpu'], 'tpu'),
    (['draw', 'x', '--checkpoint', 'photo.png'], 'photo.png'),
    (['ask', 'none.png', 'how many?'], 'none.png'),
    (['segment', 'out'], 'out'),
])
def test_bad_input_is_one_line_and_exit_2(folder, args, named, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob('*'))
    with pytest.raises(SystemExit) as e:
        data.guard(lambda: sample.main(args))
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    assert named in error
    assert sorted(folder.rglob('*')) == before


def test_no_checkpoint_names_the_command_that_makes_one(tmp_path):
    done = run('sample.py', 'draw', 'x', cwd=tmp_path)
    assert done.returncode == 2
    assert 'python train.py' in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('module', [train, evaluation, sample])
def test_help_and_unknown_flags(module, capsys):
    unknown = ['--colour', '1']
    if module is sample:
        unknown = ['draw', 'x', *unknown]
    for args, status in ((['-h'], 0), (unknown, 2)):
        with pytest.raises(SystemExit) as e:
            module.main(args)
        assert e.value.code == status
    assert '--colour' in capsys.readouterr().err


def test_impossible_flag_as_typed(tmp_path):
    """One real process: exit status 2, one line, no traceback, nothing written."""
    done = run('train.py', '--proxy', 'sge', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert "'sge'" in done.stderr
    assert not list(tmp_path.iterdir())
