"""Settings and failures of train.py: every flag, impossible values, lost or hostile files, NaN."""

import dataclasses
import math

import pytest
import torch
from conftest import TEST, leave_out, weights

import data
import model
import train
from data import UserError


def test_every_setting_is_a_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(['-h'])
    text = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0
    for f in dataclasses.fields(train.Settings):
        assert f'--{f.name} ' in text and f'(default {f.default!r})' in text, f.name
        if isinstance(f.default, bool):
            assert getattr(train.parse(['--preset', 'cpu', f'--{f.name}']), f.name) is True
            assert getattr(train.parse(['--preset', 'cpu', f'--no-{f.name}']), f.name) is False
    assert train.parse(['--preset', 'test', '--n_layer', '3']).n_layer == 3


@pytest.mark.parametrize(
    'flags,named',
    [
        (['--proxy', 'sge'], 'sge'),
        (['--quantizer', 'lfq'], 'lfq'),
        (['--image_input', 'x'], 'image_input'),
        (['--preset', 'tpu'], 'tpu'),
        (['--tok_steps', '0'], 'tok_steps'),
        (['--lr', 'nan'], 'lr'),
        (['--lr', '-1'], 'lr'),
        (['--size', '30'], '--size is 30'),
        (['--n_embd', '50'], 'n_embd'),
        (['--drop', '2'], 'drop'),
        (['--seed', '-1'], 'seed'),
        (['--seed', str(2**64)], 'seed'),
        (['--device', 'tpu'], 'tpu'),
        (['--codebook', '100', '--quantizer', 'fsq'], '100'),
    ],
)
def test_impossible_settings_are_named(tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        train.main(flags)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_run_is_never_lost_by_accident(run_dir):
    before = (run_dir / 'model.safetensors').read_bytes()
    with pytest.raises(UserError, match='--resume'):
        train.main([*TEST, '--out', str(run_dir)])
    with pytest.raises(UserError, match='n_layer is 2 here, 1 there'):
        train.main([*TEST, '--out', str(run_dir), '--resume', '--n_layer', '2'])
    assert (run_dir / 'model.safetensors').read_bytes() == before


def test_resume_without_a_run(tmp_path):
    with pytest.raises(UserError, match='nothing to resume'):
        train.main([*TEST, '--out', str(tmp_path / 'none'), '--resume'])


def test_unwritable_run_folder(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit) as e:
        data.guard(lambda: train.main([*TEST, '--out', str(tmp_path / 'file' / 'run')]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and 'file/run' in err and '--out' in err


def test_a_bug_says_that_it_is_one(capsys):
    with pytest.raises(ZeroDivisionError):
        data.guard(lambda: 1 / 0)
    assert 'bug in nanoUMM' in capsys.readouterr().err


def test_nan_stops_at_once_with_the_step(tmp_path):
    with pytest.raises(UserError, match='step [0-9]+: gradient is not finite'):
        wild = '--lr 1e18 --muon_lr 1e18 --tok_lr 1e18'.split()
        train.main([*TEST, '--out', str(tmp_path / 'run'), *wild])


def test_a_loss_above_a_guess_and_a_collapsed_codebook_warn(tmp_path, capsys, monkeypatch):
    leave_out(monkeypatch, 'evaluate', 'report')
    monkeypatch.setattr(train.evaluation, 'tokenizer', lambda *a: {'used': 0.1})
    train.main([*TEST, '--out', str(tmp_path / 'run'), '--lr', '1', '--muon_lr', '1', '--clip', '1e6'])
    said = capsys.readouterr().out
    assert (
        'worse than a uniform guess' in said
        and 'codebook has collapsed' in said
        and 'a uniform guess: 6.24 nats a text token, 4.16 a code' in said
    )


def test_failed_write_keeps_the_old_checkpoint(run_dir, tmp_path, monkeypatch):
    tensors = weights(run_dir / 'model.safetensors')
    path = tmp_path / 'm.safetensors'
    model.save(path, tensors, {'a': 1})
    before = path.read_bytes()

    def full(*args, **kw):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(model.os, 'fsync', full)
    with pytest.raises(UserError, match='No space left'):
        model.save(path, tensors, {'a': 2})
    assert path.read_bytes() == before and not list(tmp_path.glob('*.part'))


def test_hostile_checkpoints_give_one_clear_line(run_dir, tmp_path):
    good = (run_dir / 'model.safetensors').read_bytes()
    tensors, path = weights(run_dir / 'model.safetensors'), tmp_path / 'bad.safetensors'
    for n in (0, 7, 8, 100, *range(1024, len(good), 1024), len(good) - 1):
        path.write_bytes(good[:n])
        with pytest.raises(UserError, match='not a whole nanoUMM checkpoint'):
            model.load(path)
    meta = model.load(run_dir / 'model.safetensors')[4]
    for change, message in (
        ({'n_embd': 10**12}, 'impossible'),
        ({'n_layer': 2}, 'missing'),
        ({'vocab': 9}, 'impossible'),
        ({'n_embd': 64}, 'misshapen'),
        ({'size': '16'}, 'impossible'),
        ({'vq_depth': 10**5}, 'impossible'),
        ({'vq_width': 12}, 'impossible'),
        ({'size': 2**14}, 'impossible'),
    ):
        model.save(path, tensors, {**meta, 'config': {**meta['config'], **change}})
        with pytest.raises(UserError, match=message):
            model.load(path)
    model.save(path, {**tensors, 'umm.row': tensors['umm.row'] * math.nan}, meta)
    with pytest.raises(UserError, match='not finite'):
        model.load(path)
    model.save(path, {**tensors, 'umm.row': tensors['umm.row'].double()}, meta)
    with pytest.raises(UserError, match='umm.row'):
        model.load(path)
    model.save(path, {**tensors, '../../evil': torch.ones(2)}, meta)  # a name is never a path
    model.load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.safetensors']
    model.save(path, tensors, {'hello': 1})
    with pytest.raises(UserError, match='not a whole'):
        model.load(path)
    with pytest.raises(UserError, match='no checkpoint'):
        model.load(tmp_path / 'none')
