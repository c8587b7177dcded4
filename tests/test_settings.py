"""Settings and failures of train.py: every flag, impossible values, lost or hostile files, NaN."""
import math
import shutil
import sys
from dataclasses import fields

import pytest
import torch
from conftest import TEST, leave_out, weights
from PIL import Image

import data
import eval as evaluation
import model
import sample
import train
from data import UserError

FLAGS = fields(train.Settings)
NUMBERS = [f for f in FLAGS if type(f.default) in (int, float)]
CHOICES = [f for f in FLAGS if f.metadata['one_of']]


def test_every_setting_is_a_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(['-h'])
    assert e.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    for f in FLAGS:
        assert f'--{f.name} ' in text, f.name
        assert f'(default {f.default!r})' in text, f.name
        if isinstance(f.default, bool):
            for flag, value in ((f'--{f.name}', True), (f'--no-{f.name}', False)):
                assert getattr(train.parse([flag]), f.name) is value
        else:
            assert f'--{f.name} {type(f.default).__name__}' in text, f.name
    assert train.parse(['--preset', 'test', '--n_layer', '3']).n_layer == 3
    assert train.parse(['--preset', 'test', '--n-layer', '3']).n_layer == 3


@pytest.mark.parametrize('flags, message', [
    (['--proxy', 'sge'], "--proxy is 'sge': choose one of seg, instance, "),
    (['--dtype', 'half'], "--dtype is 'half': choose one of auto, float32, bfloat16"),
    (['--until', 'x'], "--until is 'x': choose one of tokenizer, pretrain, posttrain"),
    (['--preset', 'tpu'], "--preset is 'tpu': choose one of cpu, gpu, test"),
    (['--tok_steps', '0'], '--tok_steps is 0: it must be from 1 to'),
    (['--lr', 'nan'], '--lr is nan: it must be from'),
    (['--lr', '-1'], '--lr is -1.0: it must be from'),
    (['--size', '30'], '--size is 30: it must be a multiple of 4'),
    (['--n_embd', '50'], '--n_embd is 50: it must be a multiple of 24'),
    (['--hide', '2'], '--hide is 2.0: it must be from 0 to 1'),
    (['--seed', '-1'], '--seed is -1: it must be from 0 to'),
    (['--seed', str(2**64)], '--seed is 18446744073709551616: it must be from 0 to'),
    (['--device', 'tpu'], "--device is 'tpu', but this machine has"),
    (['--codebook', '1'], '--codebook is 1: it must be from 2 to'),
])
def test_impossible_settings_are_named(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train.main(flags)
    assert not list(tmp_path.iterdir())                    # nothing was written


@pytest.mark.parametrize('f', NUMBERS, ids=lambda f: f.name)
def test_a_number_out_of_its_bounds_is_named(f):
    least, most = f.metadata['least'], f.metadata['most']
    assert least <= f.default <= most
    for value in (least - 1, most + 1 + most // 2):        # a float of 2^62 has no ones
        with pytest.raises(UserError, match=f'--{f.name} is .*: it must be from {least} to {most}'):
            train.parse([f'--{f.name}', str(value)])


@pytest.mark.parametrize('f', CHOICES, ids=lambda f: f.name)
def test_a_choice_that_is_none_is_named(f):
    first, *_ = f.metadata['one_of']
    assert f.default in f.metadata['one_of']
    with pytest.raises(UserError, match=f"--{f.name} is 'x': choose one of {first}, "):
        train.parse([f'--{f.name}', 'x'])


def test_all_presets_are_possible():
    for preset in train.PRESETS:
        assert train.parse(['--preset', preset]).out == f'out/{preset}'


def test_a_run_is_never_lost_by_accident(run_dir):
    before = (run_dir / 'model.safetensors').read_bytes()
    with pytest.raises(UserError, match='--resume'):
        train.main([*TEST, '--out', str(run_dir)])
    with pytest.raises(UserError, match='n_layer is 2, but .* with 1'):
        train.main([*TEST, '--out', str(run_dir), '--resume', '--n_layer', '2'])
    assert (run_dir / 'model.safetensors').read_bytes() == before


def test_stages_before_what_init_gives_cannot_be_asked_for(run_dir, tmp_path):
    flags = ['--init', str(run_dir / 'pretrained.safetensors'), '--out', str(tmp_path / 'run')]
    with pytest.raises(UserError, match="--until is 'tokenizer'"):
        train.main([*TEST, *flags, '--until', 'tokenizer'])
    assert not (tmp_path / 'run').exists()


def test_a_model_that_is_post_trained_in_its_own_folder_stays_until_it_is_replaced(
        run_dir, tmp_path, monkeypatch):
    out = tmp_path / 'run'
    shutil.copytree(run_dir, out)
    base = out / 'pretrained.safetensors'
    before = base.read_bytes()
    monkeypatch.setattr(train, 'settle', lambda run: sys.exit())       # as if killed there
    with pytest.raises(SystemExit):
        train.main([*TEST, '--init', str(base), '--out', str(out), '--overwrite'])
    assert base.read_bytes() == before
    assert not (out / 'scores.json').exists()              # it would be another model's


def test_a_run_begun_anew_leaves_nothing_of_the_old_one(run_dir, tmp_path, monkeypatch):
    out = tmp_path / 'run'
    shutil.copytree(run_dir, out)
    monkeypatch.setattr(train, 'settle', lambda run: sys.exit())
    with pytest.raises(SystemExit):
        train.main([*TEST, '--out', str(out), '--overwrite'])
    for name in ('state.safetensors', 'model.safetensors', *train.WRITTEN):
        assert (run_dir / name).exists(), name
        assert not (out / name).exists(), name


def test_resume_without_a_run(tmp_path):
    with pytest.raises(UserError, match='no checkpoint .* without --resume'):
        train.main([*TEST, '--out', str(tmp_path / 'none'), '--resume'])


def test_unwritable_run_folder(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    out = tmp_path / 'file' / 'run'
    with pytest.raises(SystemExit) as e:
        data.guard(lambda: train.main([*TEST, '--out', str(out)]))
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert 'file/run' in error
    assert '--out' in error


def test_a_bug_says_that_it_is_one(capsys):
    with pytest.raises(ZeroDivisionError):
        data.guard(lambda: 1 / 0)
    assert 'bug in nanoUMM' in capsys.readouterr().err


def test_nan_stops_at_once_with_the_step(tmp_path):
    wild = ['--lr', '1e18', '--muon_lr', '1e18', '--tok_lr', '1e18']
    with pytest.raises(UserError, match='step [0-9]+: gradient is not finite'):
        train.main([*TEST, '--out', str(tmp_path / 'run'), *wild])


def test_a_collapsed_codebook_warns(tmp_path, capsys, monkeypatch):
    leave_out(monkeypatch, 'evaluate', 'report')
    monkeypatch.setattr(evaluation, 'tokenizer', lambda *args: {'used': .1})
    train.main([*TEST, '--out', str(tmp_path / 'run'), '--until', 'tokenizer'])
    said = capsys.readouterr().out
    assert 'codebook has collapsed' in said
    assert 'a uniform guess: 6.24 nats a text token, 4.16 a code' in said


def test_failed_write_keeps_the_old_checkpoint(run_dir, tmp_path, monkeypatch):
    tensors = weights(run_dir / 'model.safetensors')
    path = tmp_path / 'm.safetensors'
    model.save(path, tensors, {'a': 1})
    before = path.read_bytes()

    def full(*args, **how):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(data.os, 'fsync', full)
    with pytest.raises(UserError, match='No space left'):
        model.save(path, tensors, {'a': 2})
    assert path.read_bytes() == before
    assert not list(tmp_path.glob('*.part'))


# ---- a checkpoint may be cut off, or written by a stranger ----
def test_a_checkpoint_that_is_cut_off_is_one_clear_line(run_dir, tmp_path):
    good = (run_dir / 'model.safetensors').read_bytes()
    path = tmp_path / 'bad.safetensors'
    lengths = [0, 7, 8, 100, *range(1024, len(good), 1024), len(good) - 1]
    for n in lengths:
        path.write_bytes(good[:n])
        with pytest.raises(UserError, match='not a whole nanoUMM checkpoint'):
            model.load(path)
    with pytest.raises(UserError, match='no checkpoint'):
        model.load(tmp_path / 'none')


@pytest.fixture
def stranger(run_dir, tmp_path):
    """-> write(tensors, meta), which changes these of a good checkpoint -> path."""
    _, _, _, good, good_meta = model.load(run_dir / 'model.safetensors')

    def write(tensors, **meta):
        path = tmp_path / 'bad.safetensors'
        model.save(path, {**good, **tensors}, {**good_meta, **meta})
        return path

    return write


@pytest.mark.parametrize('name, value, message', [
    ('n_embd', 10**12, 'not a whole'),
    ('n_layer', 2, 'missing'),
    ('n_embd', 64, 'misshapen'),
    ('size', '16', 'not a whole'),
    ('vq_depth', 10**5, 'not a whole'),
    ('vq_width', 12, 'not a whole'),
    ('size', 2**14, 'not a whole'),
])
def test_a_hostile_config_is_one_clear_line(run_dir, stranger, name, value, message):
    _, umm, _, _, _ = model.load(run_dir / 'model.safetensors')
    config = {**vars(umm.c), name: value}
    with pytest.raises(UserError, match=message):
        model.load(stranger({}, config=config))


def test_hostile_tensors_are_one_clear_line(run_dir, stranger):
    row = weights(run_dir / 'model.safetensors')['umm.row']
    with pytest.raises(UserError, match='not finite'):
        model.load(stranger({'umm.row': row * math.nan}))
    with pytest.raises(UserError, match='umm.row'):
        model.load(stranger({'umm.row': row.double()}))
    path = stranger({'../../evil': torch.ones(2)})         # a name is never a path
    model.load(path)
    assert list(path.parent.iterdir()) == [path]


def test_hostile_meta_is_one_clear_line(run_dir, stranger, tmp_path):
    wrong = {'step': '1', 'lines': None, 'settings': [], 'text': 3, 'config': 'x'}
    for key, value in wrong.items():
        with pytest.raises(UserError, match='not a whole'):
            model.load(stranger({}, **{key: value}))
    path = tmp_path / 'other.safetensors'
    model.save(path, weights(run_dir / 'model.safetensors'), {'hello': 1})
    with pytest.raises(UserError, match='not a whole'):
        model.load(path)


def test_a_model_that_knows_no_classes_cannot_segment(stranger, tmp_path):
    Image.new('RGB', (9, 9)).save(tmp_path / 'x.png')
    path = stranger({}, classes=[])
    with pytest.raises(UserError, match='knows no classes'):
        sample.main(['segment', str(tmp_path / 'x.png'), '--checkpoint', str(path)])
