import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402, F401  before torch: it tells OpenMP how to wait

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402

import model  # noqa: E402

# Numbers are compared: the type and the threads are fixed, whatever the machine would choose.
TEST = ['--preset', 'test', '--device', 'cpu', '--dtype', 'float32', '--threads', '1']
model.MAX_PLAN = 24  # what is untrained never ends a plan
torch.set_num_threads(1)  # two threads on a busy machine are several times slower than one


def pytest_addoption(parser):
    parser.addoption('--fuzz', type=int, default=1, help='test_fuzz.py: times as many random inputs')
    parser.addoption('--kills', type=int, default=1, help='test_kill.py: how often a run is killed')


@pytest.hookimpl(tryfirst=True)  # before the same hook of pytest-xdist, which reads them
def pytest_cmdline_main(config):
    if config.option.numprocesses is None and not hasattr(config, 'workerinput'):  # -n 0: in this one
        config.option.numprocesses, config.option.dist = 2, 'worksteal'


def pytest_configure(config):
    global times
    times = config.getoption('--fuzz')


def fuzz(n, *strategies):
    """Run a test on n random inputs, or on n * K with --fuzz K; the same ones every time."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(max_examples=n * times, deadline=None, derandomize=True, database=None,
                   suppress_health_check=quiet)  # fmt: skip
    return lambda test: how(given(*strategies)(test))


def weights(path):
    return model.load(path)[3]


def leave_out(monkeypatch, *names):
    """These measurements of eval.py find nothing: for tests of training alone."""
    import eval as evaluation

    for name in names:
        monkeypatch.setattr(evaluation, name, lambda *a, **k: {})


@pytest.fixture(scope='session')
def world():
    from data import World

    return World(size=16)


@pytest.fixture(scope='session')
def run_dir(tmp_path_factory):
    """A finished run of the test preset."""
    import train

    out = tmp_path_factory.mktemp('run') / 'test'
    train.main([*TEST, '--out', str(out)])
    return out
