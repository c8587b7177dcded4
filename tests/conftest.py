"""What the tests share: flags, fixtures, comparisons of runs."""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # before torch: it tells OpenMP how to wait
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import eval as evaluation
import model
import train

# Numbers are compared: the type and the threads are fixed, whatever the machine would choose.
TEST = ['--preset', 'test', '--device', 'cpu', '--dtype', 'float32', '--threads', '1']
# What is untrained never ends a plan. Only drawing is cut short: what may be asked for stays as it is,
# so data.MAX_PLAN is left alone.
model.MAX_PLAN = 24
torch.set_num_threads(1)     # two threads on a busy machine are several times slower than one
times = 1                    # --fuzz
# Accuracy of guessing the answer to a type of question among the possible ones.
CHANCE = {
    'count': 1 / 4,
    'colour': 1 / 6,
    'shape': 1 / 5,
    'exist': 1 / 2,
    'relation': 1 / 4,
    'depth': 1 / 2,
    'distance': 1 / 2,
    'where': 1 / 4,
    'size': 1 / 2,
    'what': 1 / 30,
}


# ---- pytest ----
def pytest_addoption(parser):
    parser.addoption('--fuzz', type=int, default=1, help='test_fuzz.py: times as many random inputs')
    parser.addoption('--kills', type=int, default=1, help='test_kill.py: how often a run is killed')


@pytest.hookimpl(tryfirst=True)      # before the same hook of pytest-xdist, which reads them
def pytest_cmdline_main(config):
    worker = hasattr(config, 'workerinput')
    if config.option.numprocesses is None and not worker:                # -n 0: in this process
        config.option.numprocesses = 2
        config.option.dist = 'worksteal'


def pytest_configure(config):
    global times
    times = config.getoption('--fuzz')


def fuzz(n, *strategies):
    """Run a test on n random inputs, or on n * K with --fuzz K; the same ones every time."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(max_examples=n * times, deadline=None, derandomize=True, database=None,
                   suppress_health_check=quiet)

    def decorate(test):
        return how(given(*strategies)(test))

    return decorate


# ---- runs ----
def weights(path) -> dict:
    """All tensors of a checkpoint."""
    _, _, _, tensors, _ = model.load(path)
    return tensors


def same_bits(path, other) -> bool:
    """Do two checkpoints hold the same tensors, to the last bit?"""
    a = weights(path)
    b = weights(other)
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) for name in a)


def log_of(run) -> list[dict]:
    """The lines of a run's log, without what a clock has said."""
    lines = []
    for text in (run / 'log.jsonl').read_text().splitlines():
        line = json.loads(text)
        line.pop('seconds', None)
        line.pop('pictures_per_second', None)
        lines.append(line)
    return lines


def leave_out(monkeypatch, *names):
    """These measurements of eval.py find nothing: for tests of training alone."""
    for name in names:
        monkeypatch.setattr(evaluation, name, lambda *args, **how: {})


@pytest.fixture(scope='session')
def world():
    return data.World(size=16)


@pytest.fixture(scope='session')
def run_dir(tmp_path_factory):
    """A finished run of the test preset."""
    out = tmp_path_factory.mktemp('run') / 'test'
    train.main([*TEST, '--out', str(out)])
    return out
