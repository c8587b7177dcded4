"""What a GPU would do, rehearsed without one: all runs on the device of pretend.py, where no tensor
can meet one of the CPU."""
import contextlib
import json
import shutil
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import leave_out, same_bits, weights
from PIL import Image
from test_folder import original  # a fixture: a folder of pictures

import data
import eval as evaluation
import model
import sample
import train
from experiments import drawing, probes, reader
from folder import Folder

try:
    import pretend
except ImportError as e:
    pytest.skip(f'this torch cannot have a device written in Python: {e}', allow_module_level=True)

BLANK = Image.new('RGB', (1, 1))
THERE = ['--preset', 'test', '--device', 'pretend', '--threads', '1', '--eval-n', '16']


@pytest.fixture(scope='module', autouse=True)
def fewer_drawings(run_dir):
    """Two of six kinds, to save time; run_dir has them all, for other tests too."""
    kept = {name: evaluation.CATEGORIES[name] for name in ('single', 'position')}
    with mock.patch.object(evaluation, 'CATEGORIES', kept):
        yield


@contextlib.contextmanager
def rehearsal():
    """The device is there, and the program finds it."""
    with pretend.device(), mock.patch.object(data, 'find_device', torch.device):
        yield


def train_there(out, *flags):
    """Train on the device. What is drawn between the stages is drawn again in the evaluation."""
    with rehearsal(), mock.patch.object(train, 'look_at_umm', lambda run: ({}, BLANK)):
        train.main([*THERE, '--out', str(out), *flags])


@pytest.fixture
def device():
    with rehearsal():
        yield torch.device('pretend')


@pytest.fixture(scope='module')
def run_there(tmp_path_factory):
    """A finished run, as run_dir, on the device."""
    out = tmp_path_factory.mktemp('run') / 'there'
    train_there(out, '--dtype', 'float32')
    return out


# ---- the device itself: x lies there ----
OURS = torch.Generator()  # of the CPU
REFUSED = {
    'add': lambda x, here: x + here,
    'add here': lambda x, here: here + x,
    'add in place here': lambda x, here: here.add_(x),
    'add to a number here': lambda x, here: torch.tensor(1.0).add_(x.sum()),
    'matmul': lambda x, here: x @ here.T,
    'linear': lambda x, here: F.linear(x, here),
    'cat': lambda x, here: torch.cat([x, here]),
    'stack with a number': lambda x, here: torch.stack([x.sum(), torch.tensor(1.0)]),
    'where': lambda x, here: torch.where(here > 0, x, 0.),
    'gather': lambda x, here: x.gather(1, here.long()),
    'embedding': lambda x, here: F.embedding(here.long(), x),
    'index of the device': lambda x, here: here[x.long()],
    'write from here': lambda x, here: x.index_put_([torch.tensor([0])], here[0]),
    'mask from here': lambda x, here: x.masked_fill(here > 0, 0.),
    'module': lambda x, here: torch.nn.Linear(3, 2)(x),
    'buffer': lambda x, here: torch.nn.BatchNorm1d(3).to('pretend')(here),
    'multinomial': lambda x, here: torch.multinomial(x, 1, generator=OURS),
    'rand': lambda x, here: torch.rand(3, device=x.device, generator=OURS),
    'randn': lambda x, here: torch.randn(3, device=x.device, generator=OURS),
    'randint': lambda x, here: torch.randint(3, (1,), device=x.device, generator=OURS),
    'randperm': lambda x, here: torch.randperm(3, device=x.device, generator=OURS),
    'rand here': lambda x, here: torch.rand(3, generator=torch.Generator('pretend')),
    'normal_ here': lambda x, here: here.normal_(generator=torch.Generator('pretend')),
    'numpy': lambda x, here: x.numpy(),
    'asarray': lambda x, here: np.asarray(x),
}


@pytest.mark.parametrize('name', REFUSED)
def test_the_device_refuses(device, name):
    x, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
    with pytest.raises((RuntimeError, TypeError), match='same device|generator of|to numpy'):
        REFUSED[name](x, here)


def test_the_device_allows_what_cuda_allows(device):
    x = torch.arange(6.0, device=device).view(2, 3)
    assert (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]
    assert x[torch.ones(2, 3) > 0].sum().item() == 15
    x[torch.tensor([0])] = 7.0
    x[1:].copy_(torch.ones(1, 3))
    assert x.tolist() == [[7, 7, 7], [1, 1, 1]]
    assert bool((x > 0).all())
    listed = torch.tensor([1], device=device)
    copied = torch.ones(2).to(device)
    for made in (x, x.sum(), x > 0, listed, copied):
        assert made.device == torch.device('pretend:0')
        assert made.cpu().device == torch.device('cpu')
    g = torch.Generator(device).manual_seed(3)
    for draw in (torch.rand, torch.randn):
        assert draw(2, device=g.device, generator=g).device.type == 'pretend'
    assert torch.multinomial(x, 2, generator=g).device.type == 'pretend'


def test_the_device_is_gone_afterwards():
    with pretend.device():
        x = torch.ones(2, device='pretend')
    assert type(torch.Generator()) is torch.Generator
    with pytest.raises(NotImplementedError):
        torch.ones(2, device='pretend')
    assert (x + 1).tolist() == [2, 2]


def test_autocast_computes_in_bfloat16(device):
    x = torch.randn(4, 6, device=device)
    with torch.autocast('pretend', torch.bfloat16):
        assert (x @ x.T).dtype == F.linear(x, x).dtype == torch.bfloat16
        assert F.layer_norm(x.bfloat16(), (6,)).dtype == torch.float32
        assert (x.double() @ x.double().T).dtype == torch.float64
    assert (x @ x.T).dtype == torch.float32


# ---- the parts: the same numbers as on a CPU ----
def fit_tokenizer(device):
    """-> the tokenizer and its optimizers after three steps; convolutions are channels_last."""
    torch.manual_seed(0)
    tok = model.VQTokenizer(model.Config(size=16, codebook=16, vq_width=8, vq_depth=1)).to(device)
    tok.to(memory_format=torch.channels_last)
    opts = train.optimizers(tok, .01, .01)
    x = torch.rand(4, 3, 16, 16).to(device)
    for _ in range(3):
        tok.zero_grad()
        y, _, commitment = tok(x)
        (F.mse_loss(y, x) + commitment).backward()
        for opt in opts:
            opt.step()
    return tok, opts


def test_both_optimizers_do_the_same(device):
    here, _ = fit_tokenizer('cpu')
    there, _ = fit_tokenizer(device)
    for name, t in here.state_dict().items():
        assert torch.allclose(t, there.state_dict()[name].cpu(), atol=1e-5), name


def test_restored_averages_lie_in_memory_as_their_parameters_do(device):
    """In a file everything is contiguous. CUDA's fused AdamW raises where the strides differ."""
    _, opts = fit_tokenizer(device)
    states = opts[1].state_dict()['state']
    saved = {}
    for j, state in states.items():
        for name, t in state.items():
            saved[f'optimizer.1.{j}.{name}'] = t.cpu().contiguous()
    train.Run.restore(SimpleNamespace(saved=saved), opts)
    opts[1].step()
    for state in opts[1].state.values():
        state['exp_avg'] = state['exp_avg'].contiguous()
    with pytest.raises(RuntimeError, match='different strides'):
        opts[1].step()


@pytest.mark.parametrize('name, fused', [('cpu', False), ('pretend', True)])
def test_attention_takes_the_fused_kernel_there(device, name, fused):
    q = torch.randn(2, 2, 5, 8, device=name)
    with mock.patch.object(F, 'scaled_dot_product_attention') as kernel:
        model.attention(q, q, q, None)
    assert kernel.called == fused


def losses(device, text, proxy, **config):
    """Of a step with everything in it; and the norm of its gradient."""
    torch.manual_seed(0)
    s = train.Settings(proxy=proxy, dtype='float32', questions=4)
    world = data.World(16, 0, device, text)
    c = model.Config(size=16, codebook=64, n_layer=2, n_head=2, n_embd=32, **config)
    tok, umm = model.VQTokenizer(c).eval(), model.UMM(c, text.size)
    for p in umm.parameters():
        torch.nn.init.normal_(p, std=.1)    # untrained, the blocks would do nothing
    networks = dict(tok=tok.to(device), umm=umm.to(device))
    run = SimpleNamespace(s=s, device=device, world=world, control=train.Control(), **networks)
    out = train.umm_losses(run, 0, 2, 2, 2)
    out['loss'].backward()
    out['norm'] = torch.nn.utils.clip_grad_norm_(run.umm.parameters(), 1.)
    return {name: v.item() for name, v in out.items()}


@pytest.mark.parametrize('proxy', data.MAPS)
def test_losses_and_gradients_of_all_maps(device, world, proxy):
    here = losses(torch.device('cpu'), world.text, proxy)
    assert losses(device, world.text, proxy) == pytest.approx(here, rel=1e-3)


def test_real_pictures(run_there, device, original, monkeypatch):
    """Evaluated as the procedural world is; and a small network judges the drawings."""
    monkeypatch.setattr(reader, 'Reader', partial(reader.Reader, steps=2, B=8))
    tok, umm, text, _, _ = model.load(run_there / 'model.safetensors', device)
    world = Folder(original, 16, 0, device, text)
    scores = evaluation.evaluate(umm, tok, world, 16)
    figures = reader.recognition(umm, tok, world, 16)
    assert figures.keys() == {'mean', 'verifier', 'ceiling', 'other'}
    assert scores['segmentation']['miou']['n'] > 0
    sample.picture(umm, tok, world)


def test_experiments(run_there, device):
    tok, umm, text, _, _ = model.load(run_there / 'model.safetensors', device)
    world = data.World(16, 0, device, text)
    assert len(probes.probe(umm, world, 30)['shape']) == 2
    assert 0 <= drawing.measure(umm, tok, world, 8)['sides']['value'] <= 1
    shares = probes.attention_shares(umm, tok, world, 8)
    whole = shares['picture'][0] + shares['text'][0]
    assert whole == pytest.approx(1, abs=1e-4)


# ---- whole runs ----
def test_the_faster_type_is_chosen_there(run_there, tmp_path, device):
    flags = ['--dtype', 'auto', '--init', str(run_there / 'pretrained.safetensors')]
    s = train.parse([*THERE, *flags, '--out', str(tmp_path / 'run')])
    run = train.Run(s, device)
    train.settle(run)
    assert run.s.dtype in ('float32', 'bfloat16')


def test_a_run_there_equals_one_on_a_cpu(run_dir, run_there):
    here = weights(run_dir / 'model.safetensors')
    there = weights(run_there / 'model.safetensors')
    assert here.keys() == there.keys()
    for name in here:
        assert torch.allclose(here[name], there[name], atol=1e-3), name
    for name in ('tokenizer.png', 'samples.png', 'scores.json', 'log.jsonl'):
        assert (run_there / name).stat().st_size > 0, name


def test_bfloat16_resumes_to_the_same_bits(run_there, tmp_path, monkeypatch):
    """Post-training under autocast; the run that goes on has what was saved after step 4."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    flags = ['--dtype', 'bfloat16', '--init', str(run_there / 'pretrained.safetensors')]
    leave_out(monkeypatch, 'evaluate', 'report')
    monkeypatch.setattr(sample, 'picture', lambda *how: BLANK)
    save, attention, types = train.Run.save, model.attention, set()

    def save_and_keep(self, name, stage, step, opts=()):
        save(self, name, stage, step, opts)
        if step == 4 and not killed.exists():
            shutil.copytree(whole, killed)

    def note(q, k, v, mask):
        types.add(v.dtype)
        return attention(q, k, v, mask)

    monkeypatch.setattr(train.Run, 'save', save_and_keep)
    monkeypatch.setattr(model, 'attention', note)
    train_there(whole, *flags)
    train_there(killed, *flags, '--resume')
    assert types == {torch.bfloat16}
    assert same_bits(whole / 'model.safetensors', killed / 'model.safetensors')


def test_a_cpu_measures_the_same(run_there):
    """The checkpoint that was written there, evaluated on a CPU."""
    evaluation.main(['--run', str(run_there), '--n', '16', '--device', 'cpu'])
    there = json.loads((run_there / 'scores.json').read_text())
    here = json.loads((run_there / 'scores_test.json').read_text())
    for part in ('understanding', 'generation', 'segmentation', 'tokenizer'):
        for name, figure in here[part].items():
            assert figure == pytest.approx(there[part][name], rel=1e-2, abs=1e-2), name


TASKS = {
    'draw': ['a red circle', '--n', '2'],
    'ask': ['photo.png', 'how many objects are there?', '--cfg', '1.5', '--temperature', '1'],
    'segment': ['photo.png'],
    'reconstruct': ['photo.png'],
}


@pytest.mark.parametrize('task', TASKS)
def test_a_cpu_samples_the_same(run_there, tmp_path, monkeypatch, capsys, task):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (50, 40), 'red').save('photo.png')
    seen = []
    for name in ('cpu', 'pretend'):
        flags = ['--checkpoint', str(run_there / 'model.safetensors'), '--device', name]
        with rehearsal():
            sample.main([task, *TASKS[task], '--out', 'out.png', *flags])
        picture = b'' if task == 'ask' else (tmp_path / 'out.png').read_bytes()
        seen.append((capsys.readouterr().out, picture))
    assert seen[0] == seen[1]
