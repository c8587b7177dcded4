import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two threads on a busy machine are several times slower than one


@pytest.fixture(scope='session')
def world():
    from data import World

    return World(size=16)


@pytest.fixture(scope='session')
def run_dir(tmp_path_factory):
    """A finished run of the test preset."""
    import train

    out = tmp_path_factory.mktemp('run') / 'test'
    train.main(['--preset', 'test', '--out', str(out), '--device', 'cpu', '--threads', '1'])
    return out
