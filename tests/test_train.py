"""Training: optimizers, resume to the same bits, several processes, what the losses are made of."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TEST, leave_out, log_of, same_bits, weights
from PIL import Image

import data
import eval as evaluation
import model
import sample
import train
from data import UserError
from experiments import channels
from experiments.reproduce import maps_first


# ---- optimizers ----
@pytest.mark.parametrize('shape', [(3, 8, 20), (2, 20, 8)])
def test_muon_orthogonalizes(shape):
    """Singular values near 1, singular vectors kept: compared with the SVD."""
    G = torch.randn(shape)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    X = train.orthogonalize(G)
    values = torch.linalg.svdvals(X)
    assert .6 < values.min()
    assert values.max() < 1.3
    along = (U.mT @ X @ V.mT).diagonal(dim1=-2, dim2=-1)
    assert (along > .6).all()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    umm = model.UMM(model.Config(size=16, n_layer=2, n_head=2, n_embd=32), 60)
    muon, adamw = train.optimizers(umm, .1, .2)
    names = {id(p): name for name, p in umm.named_parameters()}
    mine = {names[id(p)] for p in muon.param_groups[0]['params']}
    rest = {names[id(p)] for p in adamw.param_groups[0]['params']}
    assert mine == {name for name in names.values() if name.startswith('blocks.')}
    assert mine | rest == set(names.values())
    assert not mine & rest


# ---- whole runs ----
FIGURES = {
    'understanding': ('mean', 'count'),
    'blind': ('mean',),
    'generation': ('mean', 'single', 'ceiling'),
    'segmentation': ('miou', 'ceiling'),
    'tokenizer': ('psnr', 'mask_ceiling', 'used'),
}


def test_main_job_leaves_everything(run_dir):
    pictures = ['samples.png', *[f'{stage}.png' for stage in train.STAGES]]
    files = ['model.safetensors', 'pretrained.safetensors', 'log.jsonl', 'scores.json']
    for name in files + pictures:
        assert (run_dir / name).stat().st_size > 0, name
    assert not list(run_dir.glob('*.part'))
    stages = [line['stage'] for line in log_of(run_dir)]
    assert set(stages) == set(train.STAGES)
    assert stages == sorted(stages, key=train.STAGES.index)
    scores = json.loads((run_dir / 'scores.json').read_text())
    assert scores['minutes'] > 0
    for part, names in FIGURES.items():
        for name in names:
            figure = scores[part][name]
            assert figure.keys() == {'value', 'low', 'high', 'n'}
            assert figure['low'] <= figure['value'] <= figure['high']


class Killed(Exception):
    """Ends a run from within."""


@pytest.mark.parametrize('stage', train.STAGES)
def test_resume_gives_the_same_bits(run_dir, tmp_path, stage, monkeypatch):
    """A run killed in the middle of any stage and resumed equals the run that was never interrupted."""
    out = tmp_path / 'run'
    real = train.Run.save

    def save_then_die(run, name, next_stage, step, opts=()):
        real(run, name, next_stage, step, opts)
        if next_stage == stage and step == 4:
            raise Killed

    leave_out(monkeypatch, 'evaluate', 'report')           # the weights and the log are compared
    monkeypatch.setattr(train.Run, 'save', save_then_die)
    with pytest.raises(Killed):
        train.main([*TEST, '--out', str(out)])
    monkeypatch.setattr(train.Run, 'save', real)
    with open(out / 'log.jsonl', 'a') as f:                # a line written after the checkpoint must go
        f.write(json.dumps({'stage': stage, 'step': 5}) + '\n')
    train.main([*TEST, '--out', str(out), '--resume'])
    assert same_bits(run_dir / 'model.safetensors', out / 'model.safetensors')
    assert log_of(run_dir) == log_of(out)


def test_stages_one_by_one_give_the_same_bits(run_dir, tmp_path, monkeypatch, capsys):
    """--until, then --resume. What is not trained yet is not shown, not measured, or warned of."""
    out = tmp_path / 'run'
    flags = [*TEST, '--out', str(out)]
    train.main([*flags, '--until', 'tokenizer'])
    assert {line['stage'] for line in log_of(out)} == {'tokenizer'}

    photo, seen = tmp_path / 'photo.png', tmp_path / 'seen.png'
    Image.new('RGB', (50, 40), 'red').save(photo)
    checkpoint = str(out / 'model.safetensors')
    sample.main(['reconstruct', str(photo), '--out', str(seen), '--checkpoint', checkpoint])
    assert Image.open(seen).size == (512, 256)             # before and after
    with pytest.raises(UserError, match='can only reconstruct yet'):
        sample.main(['draw', 'a red circle', '--checkpoint', checkpoint])
    evaluation.main(['--run', str(out), '--n', '16'])
    for name in ('scores.json', 'scores_test.json'):
        scores = json.loads((out / name).read_text())
        assert scores['tokenizer']['psnr']['n'] > 0
        assert scores['understanding'] == scores['generation'] == scores['segmentation'] == {}

    with monkeypatch.context() as m:
        leave_out(m, 'evaluate', 'report')
        train.main([*flags, '--resume', '--until', 'pretrain'])
    assert {line['stage'] for line in log_of(out)} == {'tokenizer', 'pretrain'}
    sample.main(['segment', str(photo), '--out', str(seen), '--checkpoint', checkpoint])
    assert 'did not learn this map' in capsys.readouterr().out         # not yet
    evaluation.main(['--run', str(out), '--n', '16'])
    scores = json.loads((out / 'scores_test.json').read_text())
    assert scores['understanding']['mean']['n'] > 0
    assert scores['segmentation'] == {}
    assert not (out / 'pretrained.safetensors').exists()   # the next stage begins with it
    leave_out(monkeypatch, 'evaluate', 'report')
    for _ in range(2):                                     # of a run that is done nothing changes
        train.main([*flags, '--resume'])
        for name in ('pretrained.safetensors', 'model.safetensors'):
            assert same_bits(run_dir / name, out / name)
        assert log_of(run_dir) == log_of(out)


def test_another_seed_gives_other_weights(run_dir, tmp_path, monkeypatch):
    leave_out(monkeypatch, 'evaluate', 'report', 'understanding')
    train.main([*TEST, '--out', str(tmp_path / 'run'), '--seed', '1'])
    a = weights(run_dir / 'model.safetensors')
    b = weights(tmp_path / 'run' / 'model.safetensors')
    assert not torch.equal(a['umm.blocks.0.qkv.weight'], b['umm.blocks.0.qkv.weight'])


@pytest.mark.parametrize('flag, value', [
    ('--patch', '2'),
    ('--proxy', 'edge'),
    ('--proxy', 'none'),
])
def test_switches_train(tmp_path, flag, value, monkeypatch):
    leave_out(monkeypatch, 'evaluate', 'report', 'understanding')
    train.main([*TEST, '--out', str(tmp_path / 'run'), flag, value])


def test_posttraining_from_another_runs_checkpoint(run_dir, tmp_path):
    """--init gives what the run that pretrained gives, without its first two stages."""
    a, b = tmp_path / 'a', tmp_path / 'b'
    flags = [*TEST, '--init', str(run_dir / 'pretrained.safetensors')]
    train.main([*flags, '--out', str(a)])
    assert same_bits(run_dir / 'model.safetensors', a / 'model.safetensors')
    assert {line['stage'] for line in log_of(a)} == {'posttrain'}
    with pytest.raises(UserError, match='n_layer is 2'):
        train.main([*flags, '--out', str(b), '--n_layer', '2'])
    assert not b.exists()
    with pytest.raises(UserError, match='no checkpoint'):  # and what was there stays
        train.main([*TEST, '--init', 'none', '--out', str(a), '--overwrite'])
    assert (a / 'model.safetensors').exists()


# ---- several processes ----
TORCHRUN = """
import faulthandler, pathlib, signal, sys
sys.path.insert(0, {root!r})
import data, model, train

model.MAX_PLAN = 24
faulthandler.dump_traceback_later(300, exit=True)      # should one wait for the other for ever
real = train.umm_losses
written = []


def note(event, args):
    # which files of the run does this process write?
    for_writing = event == 'open' and args[1] and set(args[1]) & set('wa+')
    if (for_writing or event == 'os.rename') and 'run' in pathlib.Path(str(args[0])).parts:
        written.append(str(args[0]))


def losses(run, step, *amounts, **more):
    if step == 2:                          # the third of pretraining
        networks = model.both(run.tok, run.umm).state_dict()
        model.save(f'{{train.RANK}}.safetensors', networks, {{}})
        if train.RANK == 1:
            signal.raise_signal(signal.SIGTERM)        # one of the two is told to stop
    return real(run, step, *amounts, **more)


train.umm_losses = losses
sys.addaudithook(note)
try:
    data.guard(train.main)
finally:
    pathlib.Path(f'{{train.RANK}}.txt').write_text(' '.join(written))
"""


def steps_of(run) -> list:
    """(stage, step) of the lines about losses in a run's log."""
    return [(line['stage'], line['step']) for line in log_of(run) if 'loss' in line]


def test_two_processes_train_and_stop_together_and_one_goes_on(run_dir, tmp_path, monkeypatch):
    """torchrun with two gloo processes, until one of them is told to stop; then this process alone."""
    out = tmp_path / 'run'
    flags = [*TEST, '--log_every', '1', '--out', 'run']
    (tmp_path / 'main.py').write_text(TORCHRUN.format(root=str(ROOT)))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [*torchrun, 'main.py', *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count('stopped; saved pretrain step 3') == 2, done.stderr
    # the first talks and writes, the other does not
    assert done.stdout.count('umm: ') == 1
    assert done.stdout.count('device:') == 1
    first = (tmp_path / '0.txt').read_text()
    for name in ('log.jsonl', 'tokenizer.png', 'state.safetensors'):
        assert name in first
    assert (tmp_path / '1.txt').read_text() == ''
    expected = [('tokenizer', step) for step in range(1, 9)]
    assert steps_of(out) == expected + [('pretrain', step) for step in range(1, 4)]
    # they have the same weights, to the last bit
    a, b = [(tmp_path / f'{rank}.safetensors').read_bytes() for rank in (0, 1)]
    assert a == b

    monkeypatch.chdir(tmp_path)
    leave_out(monkeypatch, 'evaluate', 'report')
    train.main([*flags, '--resume'])
    for stage in ('pretrain', 'posttrain'):
        expected += [(stage, step) for step in range(1, 7)]
    assert steps_of(out) == expected
    assert weights(out / 'model.safetensors').keys() == weights(run_dir / 'model.safetensors').keys()


class Spy(data.World):
    """A world that keeps the pictures that it gave out: (stream, Rendering)."""

    def scenes(self, split, stream, index, B, pixels=True):
        given = super().scenes(split, stream, index, B, pixels)
        if pixels:
            self.given.append((stream, given[1]))
        return given

    def drawn(self, stream):
        """Its latest Rendering of a stream."""
        return [r for name, r in self.given if name == stream][-1]


def tiny_run(world, *flags):
    """As train.Run, without a folder; its heads and blocks are not zero, as they would be at first."""
    s = train.parse([*TEST, *flags])
    torch.manual_seed(0)
    tok, umm = model.VQTokenizer(s).eval(), model.UMM(s, world.text.size)
    for layer in (umm.pixel_head, umm.text_head, *[block.proj for block in umm.blocks]):
        torch.nn.init.normal_(layer.weight)
    spy = Spy(16, text=world.text)
    spy.given = []
    return SimpleNamespace(s=s, world=spy, tok=tok, umm=umm, device=torch.device('cpu'),
                           control=train.Control())


def averaged(monkeypatch, models, stops) -> list:
    """Let each model be in a process of its own and average their gradients -> what each is told."""
    monkeypatch.setattr(train, 'RANKS', len(models))
    sent = []
    monkeypatch.setattr(train.dist, 'all_reduce', sent.append)
    for network, stop in zip(models, stops):
        train.average_gradients(network, stop)
    total = sum(sent)
    monkeypatch.setattr(train.dist, 'all_reduce', lambda message: message.copy_(total))
    return [train.average_gradients(network, stop) for network, stop in zip(models, stops)]


def naive_loss(run, index):
    """Of two pictures each with questions, to draw and with maps, from the batches of that number."""
    s, world, tok, umm = run.s, run.world, run.tok, run.umm
    asked, _ = world.questions('train', index, 2, s.questions)
    drawing, picture = world.drawings('train', index, 2)
    maps, target, _ = world.maps_to_draw('train', index, 2, 'seg')
    drawing.codes = tok.encode(picture)
    maps.codes = tok.encode(target)
    text, _ = umm(asked)
    plan, draw = umm(drawing)
    _, seg = umm(maps, s.hide)
    return .7 * text + plan + .3 * draw + s.w_proxy * seg


def test_gradients_of_two_processes_are_those_of_both_batches(world, monkeypatch):
    """3 pictures with questions are 2 for each process: the share is rounded up."""
    monkeypatch.setattr(train, 'RANKS', 2)
    runs = []
    for rank in range(2):
        monkeypatch.setattr(train, 'RANK', rank)
        run = tiny_run(world, '--hide', '.5')
        losses = train.umm_losses(run, 5, 3, 4, 4, .7, .3)
        losses['loss'].backward()
        runs.append(run)
    averaged(monkeypatch, [run.umm for run in runs], [False, False])
    whole = tiny_run(world, '--hide', '.5')
    loss = (naive_loss(whole, 10) + naive_loss(whole, 11)) / 2
    loss.backward()
    for run in runs:
        for got, want in zip(run.umm.parameters(), whole.umm.parameters()):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stops', [(False, False, False), (False, True, False), (True, True, True)])
def test_a_gradient_that_one_process_lacks_counts_as_zero_and_all_stop_together(monkeypatch, stops):
    models = [torch.nn.Linear(2, 3) for _ in stops]
    gradients = torch.randn(3, 3, 2)
    models[1].weight.grad = gradients[1].clone()
    models[2].weight.grad = gradients[2].clone()
    told = averaged(monkeypatch, models, stops)
    assert told == [any(stops)] * 3
    for network in models:
        mean = (gradients[1] + gradients[2]) / 3
        torch.testing.assert_close(network.weight.grad, mean)
        assert not network.bias.grad.any()


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_no_process_sees_the_pictures_of_another(world, monkeypatch, ranks):
    """Nor its own ones again: in each stream the batches of all steps differ."""

    def two_steps(run, stage, model, loss_of, *how):
        for step in range(2):
            loss_of(step)

    monkeypatch.setattr(train, 'loop', two_steps)
    monkeypatch.setattr(train, 'RANKS', ranks)
    pictures = {}
    for rank in range(ranks):
        monkeypatch.setattr(train, 'RANK', rank)
        run = tiny_run(world, '--pre_steps', '2')
        for stage in (train.train_tokenizer, train.pretrain, train.posttrain):
            stage(run)
        for stream, r in run.world.given:
            pictures.setdefault(stream, []).append(r.image)
    batches = {stream: len(images) for stream, images in pictures.items()}
    steps = 2 * ranks                                      # of a stage, all processes together
    assert batches == {'tokenizer': steps, 'questions': 2 * steps, 'drawings': 2 * steps, 'maps': steps}
    for stream, images in pictures.items():
        each = {picture.numpy().tobytes() for batch in images for picture in batch}
        assert len(each) == sum(len(batch) for batch in images), stream


# ---- what the losses are made of ----
def test_mixture_is_what_the_settings_say(world):
    """Pictures drawn from the world in a step: 2 with a map for 1 with questions, by default."""
    run = tiny_run(world)
    s = run.s
    maps = train.maps_a_step(run)
    losses = train.umm_losses(run, 0, s.post_ask, s.post_draw, maps, s.w_text, s.w_draw)
    amounts = {stream: len(r.image) for stream, r in run.world.given}
    assert amounts == {'questions': s.post_ask, 'drawings': s.post_draw, 'maps': 2 * s.post_ask}
    want = s.w_text * losses['text'] + losses['plan']
    want = want + s.w_draw * losses['draw'] + s.w_proxy * losses['seg']
    assert losses['loss'].item() == pytest.approx(want.item(), rel=1e-5)


def taught(run):
    """The maps that the tokenizer is given to encode, in a step with 4 of them."""
    encode, seen = run.tok.encode, []

    def keep(x):
        seen.append(x)
        return encode(x)

    run.tok.encode = keep
    train.umm_losses(run, 0, 0, 0, 4)
    return seen[-1]


@pytest.mark.parametrize('name', data.MAPS)
def test_the_supervised_target_is_the_map_and_shuffled_is_another_pictures(world, name):
    run = tiny_run(world, '--proxy', name)
    target = taught(run)
    want = data.MAPS[name].draw(run.world.drawn('maps'))
    assert torch.equal(target, want)

    run = tiny_run(world, '--proxy', name)
    run.control = train.Control(map_loss=channels.shuffled)
    target = taught(run)
    assert torch.equal(target, want.roll(1, 0))
    for other, own in zip(target, want):
        assert not torch.equal(other, own)


@pytest.mark.parametrize('frozen', [False, True])
def test_frozen_keeps_the_map_off_the_blocks_and_only_that(world, frozen):
    run = tiny_run(world)
    if frozen:
        run.control = train.Control(map_loss=channels.frozen)
    train.umm_losses(run, 0, 0, 0, 4)['loss'].backward()
    moved = [p.grad is not None for p in run.umm.blocks.parameters()]
    assert any(moved) is not frozen
    assert run.umm.pixel_head.weight.grad.any()
    assert run.umm.code_embed.weight.grad.any()
    assert all(p.requires_grad for p in run.umm.parameters())


def amounts_of(world, control, monkeypatch) -> list:
    """(pictures with questions, to draw, with maps, with late questions) of 20 post-training steps."""
    steps = []

    def all_steps(run, stage, model, loss_of, steps, *how):
        for step in range(steps):
            loss_of(step)

    def note(run, step, ask, draw, maps, w_text, w_draw, part):
        steps.append((ask, draw, maps, 0 if part == 'first' else ask))

    monkeypatch.setattr(train, 'loop', all_steps)
    monkeypatch.setattr(train, 'umm_losses', note)
    run = tiny_run(world, '--post_steps', '20', '--late_from', '.3')
    run.control = control
    train.posttrain(run)
    return steps


def test_maps_first_are_the_same_amounts_in_another_order(world, monkeypatch):
    mixed = amounts_of(world, train.Control(), monkeypatch)
    first = amounts_of(world, train.Control(shares=maps_first), monkeypatch)
    for steps in (mixed, first):
        late = [pictures > 0 for _, _, _, pictures in steps]
        assert late == sorted(late)                        # the late questions come last
        assert late[-1]
    assert len(mixed) == len(first) == 20
    for a, b in zip(zip(*mixed), zip(*first)):
        assert sum(a) == sum(b)
    assert first[0][0] == 0                                # no questions at the beginning
    assert first[-1][2] == 0                               # no maps at the end
    assert len({step[:3] for step in mixed}) == 1


@pytest.mark.parametrize('ratio, maps', [('0', 0), ('.1', 1)])
def test_one_map_a_step_or_none(world, ratio, maps):
    run = tiny_run(world, '--post_ask', '8', '--ratio', ratio)
    assert train.maps_a_step(run) == maps
    losses = train.umm_losses(run, 0, 2, 2, maps)
    assert ('seg' in losses) is (maps > 0)
    losses['loss'].backward()


def test_what_is_asked_changes_twice(monkeypatch):
    monkeypatch.setattr(train, 'FIND_STEPS', 5)
    s = train.Settings(post_steps=10, late_from=.3)
    parts = [train.mixed(s, step) for step in range(10)]
    assert parts == [(1, 1, 'first')] * 3 + [(1, 1, 'finding')] * 5 + [(1, 1, 'relating')] * 2


@pytest.mark.parametrize('B', [8, 12, 32])
def test_the_tokenizer_sees_every_kind_of_map(world, monkeypatch, B):
    """However few maps there are in a batch: the kinds take turns over the batches."""
    run = tiny_run(world, '--tok_batch', str(B))
    batches, kinds = [], ('seg', 'instance', 'edge', 'depth')

    class Tokenizer:
        def __call__(self, x):
            batches.append(x)
            return x, None, torch.zeros(())

        def eval(self):
            return self

        def requires_grad_(self, needed):
            return self

    def some_steps(run, stage, model, loss_of, *how):
        for step in range(4):
            loss_of(step)

    run.tok = Tokenizer()
    monkeypatch.setattr(train, 'loop', some_steps)
    train.train_tokenizer(run)
    seen = set()
    for step, x in enumerate(batches):
        assert len(x) == B
        _, r, _ = run.world.scenes('train', 'tokenizer', step, B)
        drawn = {kind: data.MAPS[kind].draw(r) for kind in kinds}
        for picture in x[B * 3 // 4:]:
            for kind in kinds:
                if any(torch.equal(picture, target) for target in drawn[kind][B * 3 // 4:]):
                    seen.add(kind)
    assert seen == set(kinds)


def test_a_resumed_log_is_cut_in_place(run_dir, tmp_path, monkeypatch):
    """What stays is never out of the file: not while it is opened, nor if there is no room to write."""
    out = tmp_path / 'run'
    shutil.copytree(run_dir, out)
    log = out / 'log.jsonl'
    kept = log.read_text()
    with open(log, 'a') as f:
        f.write('a later line\n')
    sizes = []
    real = open

    def watched(path, *how, **more):
        opened = real(path, *how, **more)
        if Path(path) == log:
            sizes.append(log.stat().st_size)
        return opened

    monkeypatch.setattr(train, 'open', watched, raising=False)
    train.Run(train.parse([*TEST, '--out', str(out), '--resume']), torch.device('cpu'))
    assert sizes and min(sizes) >= len(kept)
    assert log.read_text() == kept
