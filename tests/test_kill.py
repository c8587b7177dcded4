"""SIGKILL at random moments, then the same command: `python -m pytest tests/test_kill.py --kills 50`.

And full disks: a limit on the size of a file stands in for one.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TEST, log_of, same_bits

TRAIN = [sys.executable, str(ROOT / 'train.py'), *TEST]
ARMS = [sys.executable, '-m', 'experiments.reproduce', '--preset', 'test', '--arms', 'sft,seg',
        '--seeds', '1', '--jobs', '2', '--n', '16']
pytestmark = pytest.mark.skipif(os.name == 'nt', reason='SIGKILL')


def killed(command, cwd, seconds) -> bool:
    """Run a command, kill it and its children some seconds after its first line; False: it finished."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    how = dict(cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, start_new_session=True, **how) as p:
        p.stdout.readline()
        try:
            p.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode in (0, -signal.SIGKILL)
    return p.returncode != 0


def kill_until_done(out, cwd, rng, kills: int) -> int:
    """Train, again and again killed at a random moment, at most `kills` times -> how often it was."""
    n = 0
    while True:
        command = [*TRAIN, '--out', str(out)]
        if (out / 'state.safetensors').exists():
            command.append('--resume')
        seconds = rng.uniform(0, 4) if n < kills else 600
        if not killed(command, cwd, seconds):
            return n
        n += 1


def test_a_run_killed_anywhere_resumes_to_the_same_weights(run_dir, tmp_path, request):
    rng = random.Random(0)
    left = request.config.getoption('--kills')
    runs = 0
    while left > 0 or runs == 0:
        out = tmp_path / f'run{runs}'
        left -= kill_until_done(out, tmp_path, rng, left)
        runs += 1
        assert same_bits(run_dir / 'model.safetensors', out / 'model.safetensors')
        assert log_of(run_dir) == log_of(out)


def test_experiments_killed_anywhere_go_on(tmp_path, request):
    kills = request.config.getoption('--kills') // 2
    if kills == 0:
        pytest.skip('with --kills 2 or more')
    assert not killed([*ARMS, '--out', str(tmp_path / 'whole')], tmp_path, 600)
    rng = random.Random(1)
    cut = tmp_path / 'cut'
    for _ in range(kills):
        if not killed([*ARMS, '--out', str(cut)], tmp_path, rng.uniform(0, 12)):
            cut.rename(tmp_path / f'cut{time.time()}')     # finished: begin another one
    killed([*ARMS, '--out', str(cut)], tmp_path, 600)
    want = {}
    for path in tmp_path.glob('whole/seed0/*/result.json'):
        want[path.parent.name] = json.loads(path.read_text())['scores']
    assert len(want) == 3
    results = list(tmp_path.glob('cut*/seed0/*/result.json'))
    assert results
    for path in results:
        assert json.loads(path.read_text())['scores'] == want[path.parent.name]


@pytest.mark.parametrize('limit', [300, 30_000])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, limit, request):
    """No file may grow beyond `limit` bytes: neither log nor checkpoint, or no checkpoint."""
    import resource  # Windows has none

    if limit == 300 and request.config.getoption('--kills') < 2:
        pytest.skip('with --kills 2 or more')

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [*TRAIN, '--out', 'run']
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=small, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2
    assert len(errors) == 1
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.rglob('*.part'))
    assert not list(tmp_path.rglob('*.safetensors'))
