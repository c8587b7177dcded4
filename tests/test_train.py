"""Training: optimizer, resume to the same bits, checkpoints, settings."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEST, leave_out, weights

import data
import model
import optim
import train
from data import UserError


def test_muon_orthogonalizes():
    """Singular values near 1, singular vectors kept: compared with the SVD."""
    for shape in ((3, 8, 20), (2, 20, 8)):
        G = torch.randn(shape)
        U, S, V = torch.linalg.svd(G, full_matrices=False)
        O = optim.orthogonalize(G)
        s = torch.linalg.svdvals(O)
        assert 0.6 < s.min() and s.max() < 1.3
        assert ((U.mT @ O @ V.mT).diagonal(dim1=-2, dim2=-1) > 0.6).all()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    m = model.UMM(model.Config(size=16, n_layer=2, n_head=2, n_embd=32))
    muon, adam = train.optimizers(m, 0.1, 0.2)
    names = {id(p): n for n, p in m.named_parameters()}
    mine = {names[id(p)] for p in muon.param_groups[0]['params']}
    rest = {names[id(p)] for p in adam.param_groups[0]['params']}
    assert mine == {n for n in names.values() if n.startswith('blocks.')} and mine | rest == set(
        names.values()
    )


def test_main_job_leaves_everything(run_dir):
    for name in (
        'model.safetensors',
        'pretrained.safetensors',
        'log.jsonl',
        'scores.json',
        'samples.png',
        'tokenizer.png',
        'pretrain.png',
        'posttrain.png',
    ):
        assert (run_dir / name).stat().st_size > 0, name
    assert not list(run_dir.glob('*.part'))
    log = [json.loads(x) for x in (run_dir / 'log.jsonl').read_text().splitlines()]
    assert [x['stage'] for x in log] == sorted((x['stage'] for x in log), key=train.STAGES.index)
    s = json.loads((run_dir / 'scores.json').read_text())
    for path in (
        'understanding.mean',
        'understanding.count',
        'blind.mean',
        'generation.mean',
        'generation.single',
        'generation.ceiling',
        'segmentation.miou',
        'segmentation.ceiling',
        'tokenizer.psnr',
        'tokenizer.mask_ceiling',
        'tokenizer.used',
        'minutes',
    ):
        figure = s
        for key in path.split('.'):
            figure = figure[key]
        if path != 'minutes':
            assert (
                set(figure) == {'value', 'low', 'high', 'n'}
                and figure['low'] <= figure['value'] <= figure['high']
            )


@pytest.mark.parametrize('stage,step', [('tokenizer', 4), ('pretrain', 4), ('posttrain', 4)])
def test_resume_gives_the_same_bits(run_dir, tmp_path, stage, step, monkeypatch):
    """A run killed in the middle of any stage and resumed equals the run that was never interrupted."""
    out = tmp_path / 'run'

    class Killed(Exception):
        pass

    real = train.Run.save

    def save_then_die(self, name, at, done, opts=()):
        real(self, name, at, done, opts)
        if (at, done) == (stage, step):
            raise Killed

    monkeypatch.setattr(train.Run, 'save', save_then_die)
    leave_out(monkeypatch, 'evaluate', 'report')  # the weights and the log are compared
    with pytest.raises(Killed):
        train.main([*TEST, '--out', str(out)])
    with open(out / 'log.jsonl', 'a') as f:  # a line written after the checkpoint must go
        f.write(json.dumps({'stage': stage, 'step': step + 1}) + '\n')
    monkeypatch.setattr(train.Run, 'save', real)
    train.main([*TEST, '--out', str(out), '--resume'])
    a, b = weights(run_dir / 'model.safetensors'), weights(out / 'model.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    drop = lambda p: [
        {k: v for k, v in json.loads(x).items() if k != 'seconds'}
        for x in p.read_text().splitlines()
    ]
    assert drop(run_dir / 'log.jsonl') == drop(out / 'log.jsonl')


TORCHRUN = """
import signal, sys
sys.path.insert(0, {root!r})
import model, torch, train
model.MAX_PLAN = 24
real = train.umm_losses

def losses(run, step, *how, **more):
    if train.RANK == 1 and step == run.s.pre_steps + 2:     # the third of post-training
        signal.raise_signal(signal.SIGTERM)     # one of the two is told to stop
    return real(run, step, *how, **more)
train.umm_losses = losses
train.data.guard(train.main)
"""


def test_two_processes_are_one_and_a_run_goes_on_with_another_number_of_them(
    run_dir, tmp_path, monkeypatch
):
    """Begun in this process, continued by torchrun with two gloo processes until one of them is told to
    stop, finished in this process: the same losses and files as in one go."""
    (tmp_path / 'main.py').write_text(TORCHRUN.format(root=str(ROOT)))
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        'main.py',
    ]
    flags, real = [*TEST, '--out', str(tmp_path / 'run')], train.umm_losses
    leave_out(monkeypatch, 'evaluate', 'report')

    def stop(run, step, *how, **more):
        run.stop = True
        return real(run, step, *how, **more)

    monkeypatch.setattr(train, 'umm_losses', stop)
    with pytest.raises(UserError, match='stopped; saved pretrain step 1'):
        train.main(flags)
    monkeypatch.setattr(train, 'umm_losses', real)
    done = subprocess.run([*command, *flags, '--resume'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.count('stopped; saved posttrain step 3') == 2, done.stderr
    assert done.stdout.count('parameters:') == done.stdout.count('device:') == 1
    train.main([*flags, '--resume'])
    one, two = ([json.loads(x) for x in open(d / 'log.jsonl')] for d in (run_dir, tmp_path / 'run'))
    losses = lambda line: (
        {k: v for k, v in line.items() if isinstance(v, float) and k[:2] != 'H_'}
        | {'seconds': 0.0}
    )
    for a, b in zip(one, two, strict=True):
        assert (a['stage'], a['step']) == (b['stage'], b['step'])
        assert losses(a) == pytest.approx(losses(b), rel=1e-3)
    a, b = weights(run_dir / 'model.safetensors'), weights(tmp_path / 'run' / 'model.safetensors')
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_same_seed_same_weights_other_seed_other_weights(run_dir, tmp_path, monkeypatch):
    leave_out(monkeypatch, 'evaluate', 'report', 'understanding')
    train.main([*TEST, '--out', str(tmp_path / 'b'), '--seed', '1'])
    a, b = weights(run_dir / 'model.safetensors'), weights(tmp_path / 'b' / 'model.safetensors')
    assert not torch.equal(a['umm.blocks.0.qkv.weight'], b['umm.blocks.0.qkv.weight'])


@pytest.mark.parametrize(
    'flags',
    [['--image_input', 'code'], ['--quantizer', 'fsq'], ['--proxy', 'edge'], ['--proxy', 'none']],
)
def test_switches_train(tmp_path, flags, monkeypatch):
    if flags[1] != 'code':  # the evaluation reads pictures in one of two ways, whatever else is switched
        leave_out(monkeypatch, 'evaluate', 'report', 'understanding')
    train.main([*TEST, '--out', str(tmp_path / 'run'), *flags])


class Spy(data.World):
    """A world that keeps what it gave out."""

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in ('questions', 'drawings', 'proxies'):
            return found

        def call(*args, **how):
            given = found(*args, **how)
            self.given.setdefault(name, []).append((args, given))
            return given

        return call


def tiny_run(*flags):
    s = train.parse([*TEST, *flags])
    torch.manual_seed(0)
    world = Spy(16)
    world.given = {}
    shared = vars(s).keys() & vars(model.Config()).keys()
    c = model.Config(**{k: getattr(s, k) for k in shared}, vocab=world.text.size)
    parts = dict(s=s, world=world, tok=model.VQTokenizer(c).eval(), umm=model.UMM(c))
    return type('Run', (), parts | {'device': torch.device('cpu')})


def test_mixture_is_what_the_settings_say():
    """Pictures drawn from the world in a step: 2 with a proxy map for 1 with questions, by default."""
    run = tiny_run()
    s = run.s
    losses = train.umm_losses(
        run, 0, s.post_ask, s.post_draw, round(s.ratio * s.post_ask), s.w_text, s.w_draw
    )
    counts = {k: v[0][0][2] for k, v in run.world.given.items()}
    assert counts == {'questions': s.post_ask, 'drawings': s.post_draw, 'proxies': 2 * s.post_ask}
    pixel = s.w_draw * losses['draw'] + s.w_proxy * losses['seg']
    want = s.w_text * losses['text'] + losses['plan'] + pixel
    assert losses['loss'].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize('ranks', [2, 3, 5])
def test_parts_of_processes_add_up_to_the_whole_batch(monkeypatch, ranks):
    """Losses and gradients; some processes get no picture at all."""
    run = tiny_run('--hide', '.5')
    torch.nn.init.normal_(run.umm.pixel_head.weight), torch.nn.init.normal_(run.umm.text_head.weight)

    def step():
        losses = train.umm_losses(run, 0, 4, 3, 4, 0.7, 0.4)
        losses['loss'].backward()
        grads = [p.grad for p in run.umm.parameters()]
        run.umm.zero_grad()
        return {k: v.item() for k, v in losses.items()}, [
            torch.zeros(1) if g is None else g for g in grads
        ]

    whole, parts = step(), []
    for rank in range(ranks):
        monkeypatch.setattr(train, 'RANKS', ranks), monkeypatch.setattr(train, 'RANK', rank)
        parts.append(step())
    for k in whole[0]:
        assert k[:2] == 'H_' or sum(p[0][k] for p in parts) == pytest.approx(whole[0][k], rel=1e-5), k
    for i, g in enumerate(whole[1]):
        torch.testing.assert_close(sum(p[1][i] for p in parts), g, rtol=1e-4, atol=1e-5)


def targets_of(run, monkeypatch):
    """The proxy targets that the tokenizer is given to encode, after one step of the losses."""
    seen, encode = [], model.VQTokenizer.encode
    monkeypatch.setattr(model.VQTokenizer, 'encode', lambda tok, x: (seen.append(x), encode(tok, x))[1])
    losses = train.umm_losses(run, 0, 0, 0, 4, 1.0)
    return seen[-1], losses


@pytest.mark.parametrize('proxy', data.PROXIES)
def test_the_supervised_target_is_the_proxy_and_shuffled_is_another_pictures(proxy, monkeypatch):
    for control in ('none', 'shuffled'):
        run = tiny_run('--proxy', proxy, '--control', control)
        target, _ = targets_of(run, monkeypatch)
        (_, (_, want, r)) = run.world.given['proxies'][0]
        assert torch.equal(want, data.PROXIES[proxy](r))
        assert torch.equal(target, want if control == 'none' else want.roll(1, 0))
        if control == 'shuffled':
            assert all(not torch.equal(a, b) for a, b in zip(target, want))


def test_frozen_keeps_the_proxy_off_the_trunk_and_only_that():
    for control, moved in (('none', True), ('frozen', False)):
        run = tiny_run('--control', control)
        torch.nn.init.normal_(run.umm.pixel_head.weight)
        for block in run.umm.blocks:
            torch.nn.init.normal_(block.proj.weight)
        train.umm_losses(run, 0, 0, 0, 4, 1.0)['loss'].backward()
        assert any(p.grad is not None for p in run.umm.blocks.parameters()) is moved
        assert run.umm.pixel_head.weight.grad.any() and run.umm.code_embed.weight.grad.any()
        assert all(p.requires_grad for p in run.umm.parameters())


def test_first_gives_the_same_amounts_in_another_order(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        train, 'loop', lambda run, stage, model, loss_of, steps, *a: [loss_of(i) for i in range(steps)]
    )
    for control in ('none', 'first'):
        run = seen[control] = []
        late = lambda n, how: n[0] * how['late']  # pictures asked about with the later questions
        monkeypatch.setattr(
            train, 'umm_losses', lambda r, step, *n, **how: run.append((*n[:3], late(n, how)))
        )
        train.posttrain(tiny_run('--control', control, '--post_steps', '8'))
        assert [n[3] > 0 for n in run] == sorted(n[3] > 0 for n in run) and run[-1][3]
    mixed, first = ([sum(n[k] for n in run) for k in range(4)] for run in seen.values())
    assert mixed == first and seen['first'][0][0] == 0 and seen['first'][-1][2] == 0
    assert len({n[:3] for n in seen['none']}) == 1


def test_posttraining_from_another_runs_checkpoint(run_dir, tmp_path):
    """--init gives what the run that pretrained gives, without its first two stages."""
    flags = [*TEST, '--init', str(run_dir / 'pretrained.safetensors')]
    train.main([*flags, '--out', str(tmp_path / 'a')])
    want, got = weights(run_dir / 'model.safetensors'), weights(tmp_path / 'a' / 'model.safetensors')
    assert all(torch.equal(want[k], got[k]) for k in want)
    log = [json.loads(x) for x in (tmp_path / 'a' / 'log.jsonl').read_text().splitlines()]
    assert {x['stage'] for x in log} == {'posttrain'}
    with pytest.raises(UserError, match='n_layer is 2'):
        train.main([*flags, '--out', str(tmp_path / 'b'), '--n_layer', '2'])
    with pytest.raises(UserError, match='no checkpoint'):  # and what was there stays
        train.main([*TEST, '--init', 'none', '--out', str(tmp_path / 'a'), '--overwrite'])
    assert (tmp_path / 'a' / 'model.safetensors').exists() and not (tmp_path / 'b').exists()
