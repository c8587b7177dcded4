"""What a run chooses by measuring the machine: type and threads; how idle threads wait."""
import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from conftest import ROOT, TEST, leave_out, same_bits, weights

import data
import train

AUTO = ['--preset', 'test', '--device', 'cpu']


def tiny_run(tmp_path, *flags):
    s = train.parse([*AUTO, '--out', str(tmp_path / 'run'), *flags])
    return train.Run(s, torch.device('cpu'))


def machine(monkeypatch, seconds):
    """Pretend that steps take this long; `seconds`: {(dtype, threads): seconds}. -> what was timed"""
    timed = []

    def seconds_a_step(run, dtype, threads):
        timed.append((dtype, threads))
        return seconds[dtype, threads]

    monkeypatch.setattr(train, 'seconds_a_step', seconds_a_step)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    return timed


# Seconds of float32 on one thread (on two: 1), of bfloat16 on two and on one; what is the fastest
@pytest.mark.parametrize('one, bf16_two, bf16_one, chosen', [
    (1.8, 1.5, 9, ('float32', 2)),       # a quiet machine without bfloat16 units
    (1.8, .7, 9, ('bfloat16', 2)),       # with units
    (1.8, .93, 9, ('float32', 2)),       # a little faster: less than a tenth is noise
    (.95, .95, 9, ('float32', 2)),       # too near to tell: what another run would choose too
    (.5, 9, .6, ('float32', 1)),         # another program uses the cores
    (.5, 9, .3, ('bfloat16', 1)),
])
def test_the_fastest_is_chosen_and_said(tmp_path, monkeypatch, capsys, one, bf16_two, bf16_one, chosen):
    seconds = {
        ('float32', 2): 1.,
        ('float32', 1): one,
        ('bfloat16', 2): bf16_two,
        ('bfloat16', 1): bf16_one,
    }
    timed = machine(monkeypatch, seconds)
    run = tiny_run(tmp_path)
    train.settle(run)
    assert (run.s.dtype, run.s.threads) == chosen
    assert timed[:4] == list(seconds)                      # by turns
    for candidate in seconds:                              # three times, or once if it is far too slow
        slow = seconds[candidate] >= 2 * min(seconds.values())
        assert timed.count(candidate) == (1 if slow else 3)
    said = capsys.readouterr().out
    assert f'{chosen[0]}, CPU threads: {chosen[1]} (seconds a step: float32 on 2 1, ' in said


@pytest.mark.parametrize('flags, candidates', [
    (['--dtype', 'bfloat16', '--threads', '2'], []),
    (['--dtype', 'float32'], [('float32', 2), ('float32', 1)]),
    (['--threads', '2'], [('float32', 2), ('bfloat16', 2)]),
])
def test_what_is_asked_for_is_not_measured(tmp_path, monkeypatch, flags, candidates):
    alike = {(dtype, n): 1. for dtype in ('float32', 'bfloat16') for n in (1, 2)}
    seen = machine(monkeypatch, alike)
    train.settle(tiny_run(tmp_path, *flags))
    assert seen == 3 * candidates


def tensors_of(run):
    """Copies of all weights and buffers of both networks."""
    tensors = train.both(run.tok, run.umm).state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_measuring_changes_nothing(tmp_path):
    run = tiny_run(tmp_path)
    before = tensors_of(run)
    for dtype in ('float32', 'bfloat16'):
        assert 0 < train.seconds_a_step(run, dtype, 1) < 60
    after = tensors_of(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in run.umm.parameters())


def test_steps_of_seconds_are_timed_once(tmp_path, monkeypatch):
    """A model that is far too large for this machine."""
    alike = {(dtype, n): 50. for dtype in ('float32', 'bfloat16') for n in (1, 2)}
    seen = machine(monkeypatch, alike)
    train.settle(tiny_run(tmp_path))
    assert seen == [('float32', 2), ('float32', 1), ('bfloat16', 2), ('bfloat16', 1)]


def test_a_resumed_run_goes_on_in_what_it_began_with(run_dir, tmp_path, monkeypatch):
    """Begun where bfloat16 was faster, resumed where float32 would be: the same bits as in one go."""
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    leave_out(monkeypatch, 'evaluate', 'report')
    train.main([*AUTO, '--out', str(whole), '--dtype', 'bfloat16', '--threads', '1'])

    def bfloat16_wins(run, dtype, threads):
        return 1. if dtype == 'float32' else 0.

    monkeypatch.setattr(train, 'seconds_a_step', bfloat16_wins)
    monkeypatch.setattr(train, 'posttrain', lambda run: sys.exit())
    with pytest.raises(SystemExit):
        train.main([*AUTO, '--out', str(cut)])
    monkeypatch.undo()
    leave_out(monkeypatch, 'evaluate', 'report')
    monkeypatch.setattr(train, 'seconds_a_step', None)     # nothing is measured again
    train.main([*AUTO, '--out', str(cut), '--resume'])
    assert same_bits(whole / 'model.safetensors', cut / 'model.safetensors')
    exact = weights(run_dir / 'model.safetensors')
    rounded = weights(whole / 'model.safetensors')
    assert not torch.equal(exact['umm.row'], rounded['umm.row'])
    with pytest.raises(train.UserError, match="dtype is 'float32', but .* with 'bfloat16'"):
        train.main([*TEST, '--out', str(cut), '--resume'])


def test_a_machine_that_becomes_busy_is_said_once(tmp_path, capsys, monkeypatch):
    """The clock is looked at before and after each step; the first steps warm up."""
    ends = accumulate([3., 1., 1.5, 2.6, 2.6, 1., 9., 1.])
    times = []
    for end in ends:
        times += [times[-1] if times else 0., end]
    clock = iter(times)
    monkeypatch.setattr(train.time, 'perf_counter', lambda: next(clock))
    only = ['--until', 'tokenizer', '--log_every', '1']
    train.main([*TEST, '--out', str(tmp_path / 'run'), *only])
    said = capsys.readouterr().out
    assert 'tokenizer 4: steps take 2.6 times as long' in said
    assert '--resume --threads 1' in said
    assert said.count('is the machine busy?') == 1


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="asks GNU's OpenMP")
@pytest.mark.parametrize('given, spins', [
    ({}, "'2000'"),
    ({'GOMP_SPINCOUNT': '7'}, "'7'"),
    ({'OMP_WAIT_POLICY': 'passive'}, "'0'"),
])
def test_openmp_waits_politely_unless_the_user_says_how(given, spins):
    """OpenMP itself says what it read when torch loaded it."""
    env = dict(os.environ)
    env.pop('GOMP_SPINCOUNT', None)
    env.pop('OMP_WAIT_POLICY', None)
    env |= {'OMP_DISPLAY_ENV': 'VERBOSE', **given}
    command = [sys.executable, '-c', 'import data']
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert f'GOMP_SPINCOUNT = {spins}' in done.stderr


# ---- the machine's own limits ----
def test_a_file_has_the_mode_that_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        with data.written_whole(tmp_path / 'x') as part:
            part.write_text('x')
            part.chmod(0o600)
    finally:
        os.umask(old)
    assert (tmp_path / 'x').stat().st_mode & 0o777 == 0o644


def test_letters_that_the_terminal_does_not_know_are_replaced():
    code = 'import data; data.guard(lambda: print("a \\u732b"))'
    how = dict(os.environ, PYTHONIOENCODING='cp1252')
    done = subprocess.run([sys.executable, '-c', code], env=how, cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.strip() == b'a ?'


def test_out_of_memory_is_one_line():
    code = 'import data, torch; data.guard(lambda: torch.empty(2**50))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('error: out of memory')
