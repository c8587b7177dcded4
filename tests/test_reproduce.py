"""The experiments: probes, attention and statistics against naive code; arms differ in targets only."""

import hashlib
import json
import types
from concurrent.futures import Future
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model
import train
from data import UserError, World
from experiments import cosine, figures, losses, probes, report, reproduce
from experiments.restoration import RESTORATIONS


@pytest.fixture(scope='module')
def trained(run_dir):
    tok, umm, text, _, _ = model.load(run_dir / 'model.safetensors')
    return umm, tok, World(umm.c.size, 0, 'cpu', text)


# ---- probes and attention ----
def test_ridge_is_least_squares_with_a_penalty():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(80, 5, generator=g)
    y = torch.randint(3, (80,), generator=g)
    X_test = torch.randn(30, 5, generator=g)

    def prepared(x):
        standard = (x - X.mean(0)) / (X.std(0) + 1e-6)
        ones = torch.ones(len(x), 1)
        return torch.cat([standard, ones], 1).double()

    more = sqrt(1e-2 * 80) * torch.eye(6, dtype=torch.double)  # ridge = more rows, all of them zero
    zeros = torch.zeros(6, 3, dtype=torch.double)
    A = torch.cat([prepared(X), more])
    Y = torch.cat([F.one_hot(y).double(), zeros])
    W = torch.linalg.lstsq(A, Y).solution
    want = (prepared(X_test) @ W).argmax(-1)
    assert torch.equal(probes.ridge(X, y, X_test), want)


def test_features_are_the_pictures_states_and_labels_the_objects_under_them(trained):
    umm, tok, world = trained
    G, p = umm.c.grid, umm.c.patch
    X, y = probes.features(umm, world, 'val', 12)
    assert X.shape == (umm.c.n_layer + 1, 12 * G * G, umm.c.n_embd)
    scenes, r, _ = world.scenes('val', 'probe', 0, 12)
    x = umm.embed_image(r.image)
    x = umm.blocks[0](x, model.norm(x), umm.rope(umm.rc[None]), None, model.KV())
    assert torch.allclose(X[1], x.flatten(0, 1), atol=1e-5)
    seen = 0
    for place in range(12 * G * G):
        b, i = divmod(place, G * G)
        row, column = i // G * p, i % G * p
        inside = r.instance[b, row:row + p, column:column + p].flatten().tolist()
        k = max(set(inside), key=inside.count)
        if inside.count(k) <= p * p / 2:
            continue
        shape = colour = depth = -1
        if k > 0:
            o = scenes[b].objects[k - 1]
            shape, colour = data.SHAPES.index(o.shape), list(data.COLOURS).index(o.colour)
            depth = o.z > 0.5
            seen += 1
        assert y['object'][place] == (k > 0)
        assert y['shape'][place] == shape
        assert y['colour'][place] == colour
        assert y['depth'][place] == depth
    assert seen > 20


def test_probe_reports_every_layer_and_what_it_can_memorise(trained):
    umm, tok, world = trained
    scores = probes.probe(umm, world, 60)
    assert all(len(layers) == umm.c.n_layer + 1 for layers in scores.values())
    assert {'shape', 'colour', 'depth', 'object', 'control', 'circle/ring'} <= scores.keys()
    assert min(scores['control']) > 0.2
    assert max(scores['colour']) > 0.6


def test_recorded_attention_is_what_the_model_computed(trained):
    umm, tok, world = trained
    s, _ = world.questions('val', 3, 4, 3)
    plain = umm.hidden(s)
    with probes.recorded() as kept:
        assert torch.equal(umm.hidden(s), plain)
    assert len(kept) == 2 * umm.c.n_layer  # the picture, then the text, in every layer
    assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in kept)
    assert torch.equal(umm.hidden(s), plain)
    assert len(kept) == 2 * umm.c.n_layer


def test_attention_shares_sum_to_one(trained):
    shares = probes.attention_shares(*trained, n=16)
    whole = np.array(shares['picture']) + np.array(shares['text'])
    assert np.allclose(whole, 1, atol=1e-4)
    for on_object, on_picture in zip(shares['asked object'], shares['picture']):
        assert 0 <= on_object <= on_picture
    kinds = [np.array(layers) for name, layers in shares.items() if name.startswith('draw: ')]
    assert len(kinds) == 4
    assert np.allclose(sum(kinds), 1, atol=1e-4)


def test_words_and_tokens_line_up(trained):
    text = trained[2].text
    lines = (
        'a red circle, a blue ring and a green cross',
        'top left a red circle, bottom right a ring',
    )
    for line in lines:
        tokens = text.encode(line)
        by_word = [token for word in line.split() for token in text.encode(word)]
        assert by_word == tokens
        kinds = probes.buckets(text, line)
        assert len(kinds) == len(tokens)
        for kind, token in zip(kinds, tokens):
            if text.decode([token]) == ',':
                assert kind == 'other'
    words = 'top red ring, squares with'.split()
    kinds = [probes.bucket(word) for word in words]
    assert kinds == ['position', 'colour', 'object', 'object', 'other']


# ---- statistics ----
def test_statistics_against_known_values():
    for df, want in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262)):
        assert report.t_quantile(0.975, df) == pytest.approx(want, abs=2e-3)
        assert report.t_below(want, df) == pytest.approx(0.975, abs=1e-4)
    e = report.paired([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt(3)
    assert e['low'] == pytest.approx(2 - 4.303 / sqrt(3), abs=1e-3)
    assert e['high'] == pytest.approx(2 + 4.303 / sqrt(3), abs=1e-3)
    assert e['p'] == pytest.approx(0.0742, abs=1e-3)
    assert report.holm([0.01, 0.04, 0.03, None], 4) == [True, False, False, False]
    assert report.holm([0.01, 0.04, 0.03], 6) == [False, False, False]     # three were not run


VERDICTS = [  # low, high, is it claimed that nothing moves?, verdict
    (0.01, 0.05, False, 'supported'),
    (-0.05, -0.01, False, 'opposite'),
    (-0.004, 0.004, False, 'no effect'),
    (0.001, 0.004, False, 'no effect'),
    (-0.01, 0.01, False, 'undecided'),
    (-0.004, 0.004, True, 'supported'),
    (0.03, 0.05, True, 'opposite'),
    (-0.05, -0.03, True, 'opposite'),
    (-0.01, 0.05, True, 'undecided'),
    (None, None, False, 'undecided'),
]


@pytest.mark.parametrize('low, high, no_change, want', VERDICTS)
def test_verdicts_follow_the_rule(low, high, no_change, want):
    assert report.verdict({'low': low, 'high': high}, no_change) == want


def result_of(mean, reason=0.5):
    """As in result.json, of an arm with these accuracies."""
    understanding = {'mean': {'value': mean}, 'reason': {'value': reason}}
    return {'scores': {'understanding': understanding}, 'log': [], 'steps': 4}


def test_a_claim_of_no_change_is_no_difference_that_survives():
    found = {'sft': {}, 'seg': {}}
    for seed in range(3):
        found['sft'][seed] = result_of(0.5 + seed / 100)
        found['seg'][seed] = result_of(0.7 + seed / 99, 0.6 + seed / 1000)
    rows = report.claims_of(found)
    assert [row['no_change'] for row in rows] == [False, True]
    assert [row['verdict'] for row in rows] == ['supported', 'opposite']
    assert rows[0]['survives_holm']                            # primary: of the family 'main'
    assert 'survives_holm' not in rows[1]                      # secondary
    assert [row['paper'] == '0' for row in rows] == [False, True]


def test_primary_claims_are_five_a_family():
    families = [claim.family for claim in report.CLAIMS if claim.family]
    assert families.count('main') == families.count('channel') == 5


def test_tables_are_rebuilt_from_the_small_file(tmp_path):
    """The same tables from a folder and from its scores.json; intervals of scores are left out of it."""
    found = {}
    for arm in ('sft', 'seg'):
        for seed in range(3):
            result = result_of(0.5 + seed / 7)
            result |= dict(arm=arm, seed=seed, plan=['test'], seconds=1.23456)
            found.setdefault(arm, {})[seed] = result
    path = tmp_path / 'scores.json'
    report.write_scores(path, found)
    report.report(path)
    again = report.collect(path)
    assert path.with_suffix('.md').read_text() == report.tables(again)
    kept = again['seg'][2]['scores']['understanding']
    assert kept == {'mean': round(0.5 + 2 / 7, 4), 'reason': 0.5}


COMMITTED = sorted((Path(reproduce.ROOT) / 'experiments' / 'results').glob('*.json'))


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_committed_scores(path):
    assert path.stat().st_size < 300_000
    assert path.with_suffix('.md').read_text() == report.tables(report.collect(path))


# ---- arms ----
def plan(out, **changed):
    """The arguments of a small plan."""
    a = dict(out=out, preset='test', data='', skip_bad=False, steps=0, device='cpu', threads=1, n=16)
    a |= dict(jobs=1, seeds=1, dtype='float32')
    return types.SimpleNamespace(**a | changed)


class Hashed(reproduce.Limited):
    """Notes what an arm is given in training, as hashes."""

    arm = ''
    seen = {}  # {arm: {kind: hash of all tensors so far}}

    def note(self, kind, *tensors):
        kinds = self.seen.setdefault(self.arm, {})
        so_far = kinds.setdefault(kind, hashlib.sha256())
        for t in tensors:
            if t is not None:
                so_far.update(t.numpy().tobytes())

    def questions(self, split, *where, **how):
        s, kinds = super().questions(split, *where, **how)
        if split == 'train':
            self.note('questions', s.text, s.turn, s.target, s.image)
        return s, kinds

    def drawings(self, split, *where, **how):
        s, target = self.world.drawings(split, *where, **how)
        self.note('drawings', s.text, s.turn, s.target)
        return s, target

    def maps_to_draw(self, split, *where, **how):
        s, target, r = super().maps_to_draw(split, *where, **how)
        if split == 'train':
            self.note('pictures', r.image)
            self.note('targets', target)
        return s, target, r


@pytest.fixture(scope='module')
def arms(tmp_path_factory):
    """The folder of a base and four arms, and {arm: {kind: hash of all that the world gave it}}."""
    out = tmp_path_factory.mktemp('plan')
    measure, kept = reproduce.measure, []

    def measured_twice(run, n):  # the other arms borrow the last scores: this is about training
        if len(kept) < 2:
            kept.append(measure(run, n))
        return kept[-1]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(reproduce, 'Limited', Hashed)
        m.setattr(reproduce, 'measure', measured_twice)
        for arm in ('base', 'sft', 'seg', 'edge', 'shuffled'):
            Hashed.arm = arm
            reproduce.work(plan(out), 0, arm)
    seen = {}
    for arm, kinds in Hashed.seen.items():
        seen[arm] = {kind: so_far.hexdigest() for kind, so_far in kinds.items()}
    return out, seen


def test_arms_differ_in_nothing_but_the_target(arms):
    _, seen = arms
    assert seen['sft'].keys() == {'questions', 'drawings'}
    for arm in ('edge', 'seg', 'shuffled'):
        assert seen[arm]['questions'] == seen['sft']['questions']
        assert seen[arm]['drawings'] == seen['sft']['drawings']
        assert seen[arm]['pictures'] == seen['seg']['pictures']
    assert seen['edge']['targets'] != seen['seg']['targets']


NEW_ARMS = ('seg-masked', 'told-flops', 'all-three', 'blank-order', 'order-x3', 'known-order',
            'seg-bare-slow')


def test_every_kind_of_arm_runs(arms, tmp_path, monkeypatch):
    """Of the plans channel, content, budget, known and drawing; each on its own base."""
    out, _ = arms
    (tmp_path / 'seed0').mkdir()
    (tmp_path / 'seed0' / 'base').symlink_to(out / 'seed0' / 'base')
    monkeypatch.setattr(reproduce, 'measure', lambda run, n: {})
    monkeypatch.setattr(train, 'show', lambda *how: None)      # this is about training
    monkeypatch.setitem(reproduce.BASES, 'bare', 1)
    for name in ('known', 'bare', *NEW_ARMS):
        reproduce.work(plan(tmp_path), 0, name)
    steps, losses = {}, {}
    for name in NEW_ARMS:
        folder = tmp_path / 'seed0' / name
        steps[name] = json.loads((folder / 'result.json').read_text())['steps']
        lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        losses[name] = [line['seg'] for line in lines if 'seg' in line]
    assert steps['order-x3'] == 18
    assert steps['told-flops'] == 7                            # words cost less than codes
    assert steps['seg-masked'] == 6
    for name, values in losses.items():
        assert values and np.isfinite(values).all(), name
    log = (tmp_path / 'seed0' / 'known' / 'log.jsonl').read_text()
    assert '"stage": "posttrain", "step": 30' in log           # five times an arm's steps
    assert '"plan"' not in (tmp_path / 'seed0' / 'seg-bare-slow' / 'log.jsonl').read_text()


def test_a_result_says_what_it_was_made_with(arms):
    out, _ = arms
    result = json.loads((out / 'seed0' / 'seg' / 'result.json').read_text())
    assert result['plan'] == ['test', 16, reproduce.RECIPE, '', 0, 'float32']
    assert result['threads'] == 1
    assert result['commit'] == reproduce.commit()
    assert len(result['commit']) in (0, 40)  # none in a copy without its history


@pytest.mark.parametrize('name', RESTORATIONS)
def test_of_a_restoration_the_input_is_spoilt_the_target_is_not(world, monkeypatch, name):
    s, target, r = world.maps_to_draw('train', 0, 8, 'recon')
    run = types.SimpleNamespace(s=train.Settings(), device=torch.device('cpu'))
    monkeypatch.setattr(train, 'generated', lambda run, index, seq, target, r: (seq.image, target))
    map_loss = reproduce.ARMS[name].control.map_loss
    seen, taught = map_loss(run, 0, s, target, r)
    assert torch.equal(taught, r.image)
    assert not torch.allclose(seen, r.image, atol=.1)
    assert seen.min() >= 0
    assert seen.max() <= 1
    s, target, r = world.maps_to_draw('train', 0, 8, 'recon')
    again, _ = map_loss(run, 0, s, target, r)
    assert torch.equal(seen, again)


def test_maps_first_shows_as_much_of_both():
    """Maps in the first half, then questions, the late ones last."""
    s = train.Settings(post_steps=20, late_from=.3)
    amounts = [reproduce.ARMS['first'].control.shares(s, step) for step in range(20)]
    assert amounts[:10] == [(0, 2, 'first')] * 10
    assert amounts[10:13] == [(2, 0, 'first')] * 3
    assert amounts[13:] == [(2, 0, 'finding')] * 7


def test_a_finished_arm_is_kept_and_the_report_is_the_same_again(arms, monkeypatch, capsys):
    out, _ = arms
    monkeypatch.setattr(reproduce, 'ProcessPoolExecutor', None)  # fails if anything is left to run
    results = {path: path.read_bytes() for path in out.glob('seed*/*/result.json')}
    assert len(results) == 5
    assert reproduce.execute(plan(out), ['sft', 'seg', 'edge', 'shuffled']) == []
    with pytest.raises(UserError, match='another --preset, --n'):
        reproduce.execute(plan(out, n=17), ['seg'])
    tables = []
    for _ in range(2):
        report.report(out)
        tables.append((out / 'report.md').read_text())
    assert tables[0] == tables[1]
    assert 'segmentation beats edges' in tables[0]
    assert '# Probe, last layer' in tables[0]
    assert 'circle/ring' in tables[0]
    claims = json.loads((out / 'claims.json').read_text())
    keys = {'claim', 'effect', 'low', 'high', 'seeds', 'paper', 'verdict'}
    assert claims
    assert all(keys <= claim.keys() for claim in claims)
    for path, before in results.items():
        assert path.read_bytes() == before
    assert len(list(out.glob('seed*/*/result.json'))) == 5


class OneByOne:
    """Stands in for ProcessPoolExecutor: does the work at once, here."""

    def __init__(self, *how):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, a, seed, name):
        future = Future()
        try:
            future.set_result(work(a, seed, name))
        except RuntimeError as e:
            future.set_exception(e)
        return future


def test_bases_come_first_and_what_fails_stops_nothing_else(tmp_path, monkeypatch, capsys):
    done = []

    def work(a, seed, name):
        if (seed, name) in ((0, 'other'), (1, 'sft')):
            raise RuntimeError('no')
        folder = a.out / f'seed{seed}' / name
        folder.mkdir(parents=True)
        (folder / 'result.json').write_text(json.dumps({'plan': reproduce.conditions_of(a)}))
        done.append((seed, name))

    monkeypatch.setattr(reproduce, 'work', work)
    monkeypatch.setattr(reproduce, 'ProcessPoolExecutor', OneByOne)
    monkeypatch.setitem(reproduce.ARMS, 'sft-other', reproduce.Arm('none', base='other'))
    a = plan(tmp_path, seeds=2)
    failed = reproduce.execute(a, ['sft', 'sft-other'])
    assert failed == ['seed 0 other: no', 'seed 1 sft: no']
    assert done[:3] == [(0, 'base'), (1, 'base'), (1, 'other')]
    assert sorted(done[3:]) == [(0, 'sft'), (1, 'sft-other')]
    # the same command again does the rest alone
    failed = reproduce.execute(a, ['sft', 'sft-other'])
    assert failed == ['seed 0 other: no', 'seed 1 sft: no']
    assert len(done) == 5
    assert '3 runs to do' in capsys.readouterr().out  # a base, its arm, and the other arm


def test_cosine_of_gradients(arms, monkeypatch, capsys):
    """Against autograd.grad of the summed loss; with themselves the questions' gradients agree fully."""
    out, _ = arms
    runs, real = [], train.umm_losses

    def of_two_steps(run, step, *how):
        runs.append(run)
        return real(run, step % 2, *how)

    monkeypatch.setattr(cosine, 'BATCHES', 2)
    monkeypatch.setattr(cosine, 'PICTURES', 4)
    monkeypatch.setattr(train, 'umm_losses', of_two_steps)
    got = cosine.cosines(out / 'seed0' / 'base' / 'pretrained.safetensors')
    assert got.keys() == {'questions', *reproduce.MAP_ARMS}
    assert got['questions'] == pytest.approx([1, 1], abs=1e-5)
    run = runs[-1]
    run.s.proxy = 'edge'
    weights = list(run.umm.blocks.parameters())

    def gradient(ask, maps):
        loss = real(run, 0, ask, 0, maps)['loss'] + real(run, 1, ask, 0, maps)['loss']
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    want = F.cosine_similarity(gradient(4, 0), gradient(0, 4), 0).item()
    assert got['edge'][-1] == pytest.approx(want, abs=1e-5)
    cosine.compare(out)
    assert '| edge |' in capsys.readouterr().out


def test_a_killed_arm_resumes_to_the_same_scores(arms, tmp_path):
    """Stopped in the middle of post-training, as after a kill: same result as the arm that was not."""
    out, _ = arms
    (tmp_path / 'seed0').mkdir()
    (tmp_path / 'seed0' / 'base').symlink_to(out / 'seed0' / 'base')
    save = train.Run.save

    def die(run, name, stage, step, opts=()):
        save(run, name, stage, step, opts)
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train.Run, 'save', die)
        with pytest.raises(KeyboardInterrupt):
            reproduce.work(plan(tmp_path), 0, 'seg')
    assert not (tmp_path / 'seed0' / 'seg' / 'result.json').exists()
    reproduce.work(plan(tmp_path), 0, 'seg')
    want = json.loads((out / 'seed0' / 'seg' / 'result.json').read_text())
    got = json.loads((tmp_path / 'seed0' / 'seg' / 'result.json').read_text())
    assert want['scores'] == got['scores']
    assert want['log'] == got['log']


def test_limited_worlds_repeat_their_first_pictures():
    world = World(16)
    limited = reproduce.Limited(world, 11, 4)  # of 11 pictures in batches of 4 there are 8
    images = []
    for index in range(5):
        _, _, r = limited.maps_to_draw('train', index, 4, 'seg')
        images.append(r.image)
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])
    _, _, r = world.maps_to_draw('train', 0, 4, 'seg')
    assert torch.equal(images[0], r.image)
    first, _ = limited.questions('train', 0, 4, 2)
    second, _ = limited.questions('train', 1, 4, 2)
    assert torch.equal(first.text, second.text)
    # other splits and what has no limit are as they were, and so is all else
    endless = reproduce.Limited(world, 0, 0)
    for split, other in (('val', limited), ('train', endless)):
        want, _ = world.questions(split, 7, 4, 2)
        got, _ = other.questions(split, 7, 4, 2)
        assert torch.equal(got.text, want.text)
    assert limited.text is world.text


# ---- figures and the command line ----
def test_sweeps_name_real_arms_and_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib').use('Agg')
    for panel in figures.SWEEPS.values():
        for arm in panel.values():
            assert arm in reproduce.ARMS
            assert report.baseline(arm) in reproduce.ARMS
    for claim in report.CLAIMS:
        assert {claim.arm, claim.other} <= reproduce.ARMS.keys()
    assert figures.INK.keys() <= reproduce.ARMS.keys()
    assert figures.INK.keys() == figures.MARK.keys()
    drawn, real = [], figures.difference  # a panel shows the seeds that all its arms have

    def difference(*which):
        drawn.append(real(*which))
        return drawn[-1]

    monkeypatch.setattr(figures, 'difference', difference)
    found = {
        'sft': {0: result_of(0.5), 1: result_of(0.6)},
        'seg': {0: result_of(0.7), 1: result_of(0.7)},
        'ratio-1': {1: result_of(0.6)},
    }
    figures.sweeps(tmp_path, found)
    assert [e['n'] for e in drawn] == [1, 1, 1]
    assert (tmp_path / 'sweeps.png').stat().st_size > 1000


def test_figures_of_finished_arms_are_drawn(arms):
    pytest.importorskip('matplotlib').use('Agg')
    out, _ = arms
    figures.figures(out, report.collect(out))
    for name in ('gains', 'generation', 'convergence', 'probe', 'attention'):
        assert (out / f'{name}.png').stat().st_size > 1000


def test_losses_are_drawn_beside_a_guess(run_dir, tmp_path):
    pytest.importorskip('matplotlib')
    for name in ('model.safetensors', 'log.jsonl'):
        (tmp_path / name).symlink_to(run_dir / name)
    losses.losses(tmp_path)
    assert (tmp_path / 'losses.png').stat().st_size > 1000
    lines = losses.read_log(run_dir / 'log.jsonl')
    steps = [step for step, _ in losses.points_of(lines, 'text', 6)]
    assert steps == [2, 4, 6, 8, 10, 12]  # pretraining, then post-training
    (tmp_path / 'log.jsonl').unlink()
    (tmp_path / 'log.jsonl').write_text('')
    with pytest.raises(UserError, match='holds no losses'):
        losses.losses(tmp_path)


def test_unknown_arms_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match='sge'):
        reproduce.main(['--arms', 'sge'])
    with pytest.raises(UserError, match='multiple of 200'):
        reproduce.main(['--steps', '300'])
    with pytest.raises(UserError, match='no finished arm'):
        report.report(tmp_path)
    for seed in (0, 1):
        folder = tmp_path / f'seed{seed}' / 'seg'
        folder.mkdir(parents=True)
        result = {'arm': 'seg', 'seed': seed, 'plan': [seed], 'scores': {'understanding': {}}}
        (folder / 'result.json').write_text(json.dumps(result))
    with pytest.raises(UserError, match='mixes seg'):
        report.report(tmp_path)


def test_types_of_questions_may_have_any_names():
    """A folder may have a type `shape` and no `what`; test may lack a type."""
    found = {
        'sft': {0: result_of(.5), 1: result_of(.6)},
        'seg': {0: result_of(.7), 1: result_of(.7)},
    }
    for result in report.all_results(found):
        result['scores']['understanding'] |= {'shape': {'value': .5}, 'rare': {'value': None}}
        result['seconds'] = 1
    assert '# Understanding' in report.tables(found)
    assert 'labelled' not in report.tables(found)
    assert figures.moved_most(found, ['sft', 'seg'], 'sft', ['shape', 'rare']) == ['shape', 'rare']


def test_another_file_of_scores_is_named(run_dir, tmp_path):
    for content in ((run_dir / 'scores.json').read_text(), '{"a"', '[1]', '[{"arm": "seg"}]'):
        path = tmp_path / 'scores.json'
        path.write_text(content)
        with pytest.raises(UserError, match='no scores.json of experiments.reproduce'):
            reproduce.main(['--report', str(path)])


def test_arms_that_a_folder_cannot_teach_are_left_out(monkeypatch, capsys):
    world = types.SimpleNamespace(maps=['seg', 'edge', 'recon'], annotated=('classes',))
    monkeypatch.setattr(reproduce, 'open_world', lambda *how: world)
    arms = ['sft', 'seg', 'seg-readout', 'blank-order', 'depth', 'all-three', 'regions-readout',
            'cutout-order', 'none-bare-slow']
    kept = reproduce.teachable(plan('out'), arms)
    assert kept == ['sft', 'seg', 'seg-readout', 'blank-order']
    assert 'cannot teach depth, all-three, regions-readout' in capsys.readouterr().out


def test_arms_on_a_known_base_see_other_pictures(monkeypatch, tmp_path):
    """Batches are numbered on from the base's last, in every preset."""
    seen = {}

    def begin(folder, flags, base):
        seen[folder.name] = train.parse(flags)
        raise InterruptedError                             # nothing is trained here

    monkeypatch.setattr(reproduce, 'begin', begin)
    arm = reproduce.ARMS['known-seg']
    for preset in ('cpu', 'test'):
        a = plan(tmp_path, preset=preset)
        with pytest.raises(InterruptedError):
            reproduce.run_base(a, 0, 'known', tmp_path / 'base')
        with pytest.raises(InterruptedError):
            reproduce.run_arm(a, 0, arm, tmp_path / 'arm')
        assert seen['arm'].pre_steps == seen['base'].pre_steps + seen['base'].post_steps


def test_curves_of_real_pictures_are_of_what_moved_most():
    def result(digit, what):
        accuracy = {'count': .9, 'digit': digit, 'what': what}
        return {'scores': {'understanding': {k: {'value': v} for k, v in accuracy.items()}}}

    found = {
        'sft': {0: result(.1, .2), 1: result(.2, .2)},
        'seg': {0: result(.9, .6), 1: result(.8, .5)},
    }
    types = ['count', 'what', 'digit']
    assert figures.moved_most(found, ['sft', 'seg'], 'sft', types) == ['digit', 'what']
