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
import torch
from conftest import ROOT, TEST
from safetensors.torch import load_file

TRAIN = [sys.executable, str(ROOT / 'train.py'), *TEST]
ARMS = [sys.executable, '-m', 'experiments.reproduce', '--preset', 'test', '--arms', 'sft,seg',
        '--seeds', '1', '--jobs', '2', '--n', '16']  # fmt: skip
pytestmark = pytest.mark.skipif(os.name == 'nt', reason='SIGKILL')


def killed(command, cwd, seconds) -> bool:
    """Run a command, kill it and its children some seconds after its first line; False: it finished."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:  # fmt: skip
        p.stdout.readline()
        try:
            p.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode in (0, -signal.SIGKILL)
    return p.returncode != 0


def test_a_run_killed_anywhere_resumes_to_the_same_weights(run_dir, tmp_path, request):
    rng, left, done, runs = random.Random(0), request.config.getoption('--kills'), False, 0
    while not done or left > 0:
        out, runs, done = tmp_path / f'run{runs}', runs + 1, False
        while not done:
            state = (out / 'state.safetensors').exists()
            seconds = rng.uniform(0, 4) if left > 0 else 600
            done = not killed([*TRAIN, '--out', str(out), *['--resume'] * state], tmp_path, seconds)
            left -= not done
        a, b = load_file(run_dir / 'model.safetensors'), load_file(out / 'model.safetensors')
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        plain = lambda p: [
            {k: v for k, v in json.loads(x).items() if k != 'seconds'} for x in open(p)
        ]
        assert plain(run_dir / 'log.jsonl') == plain(out / 'log.jsonl')


def test_experiments_killed_anywhere_go_on(tmp_path, request):
    kills = request.config.getoption('--kills') // 2
    if not kills:
        pytest.skip('with --kills 2 or more')
    assert not killed([*ARMS, '--out', str(tmp_path / 'whole')], tmp_path, 600)
    rng = random.Random(1)
    for _ in range(kills):
        if not killed([*ARMS, '--out', str(tmp_path / 'cut')], tmp_path, rng.uniform(0, 12)):
            (tmp_path / 'cut').rename(tmp_path / f'cut{time.time()}')
    killed([*ARMS, '--out', str(tmp_path / 'cut')], tmp_path, 600)
    want = {
        p.parent.name: json.loads(p.read_text())['scores']
        for p in tmp_path.glob('whole/seed0/*/result.json')
    }
    results = [p for p in tmp_path.glob('cut*/seed0/*/result.json')]
    assert len(want) == 3 and results
    for p in results:
        assert json.loads(p.read_text())['scores'] == want[p.parent.name]


@pytest.mark.parametrize('limit', [300, 30_000])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, limit, request):
    """No file may grow beyond `limit` bytes: neither log nor checkpoint, or no checkpoint."""
    import resource

    if limit == 300 and request.config.getoption('--kills') < 2:
        pytest.skip('with --kills 2 or more')
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    p = subprocess.run(
        [*TRAIN, '--out', 'run'], cwd=tmp_path, preexec_fn=small, capture_output=True, text=True
    )
    errors = [x for x in p.stderr.splitlines() if x.startswith('error: ')]
    assert p.returncode == 2 and len(errors) == 1 and 'Traceback' not in p.stderr
    assert not list(tmp_path.rglob('*.part')) and not list(tmp_path.rglob('*.safetensors'))
