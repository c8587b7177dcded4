"""The experiments: probes, attention and statistics against naive code; arms differ in targets only."""

import hashlib
import json
import types

import numpy as np
import pytest
import torch

import data
import model
import train
from data import UserError, World
from experiments import cosine, report, reproduce


@pytest.fixture(scope='module')
def trained(run_dir):
    tok, umm, text, _, _ = model.load(run_dir / 'model.safetensors')
    return umm, tok, World(umm.c.size, 0, 'cpu', text)


def test_ridge_is_least_squares_with_a_penalty():
    g = torch.Generator().manual_seed(0)
    X, y, X_test = (
        torch.randn(80, 5, generator=g),
        torch.randint(3, (80,), generator=g),
        torch.randn(30, 5),
    )
    A = torch.cat([(X - X.mean(0)) / (X.std(0) + 1e-6), torch.ones(80, 1)], 1).double()
    extra = (1e-2 * 80) ** 0.5 * torch.eye(6, dtype=torch.double)  # ridge = more rows, all zero
    Y = torch.cat([torch.nn.functional.one_hot(y).double(), torch.zeros(6, 3, dtype=torch.double)])
    W = torch.linalg.lstsq(torch.cat([A, extra]), Y).solution
    test = torch.cat([(X_test - X.mean(0)) / (X.std(0) + 1e-6), torch.ones(30, 1)], 1).double()
    assert torch.equal(reproduce.ridge(X, y, X_test), (test @ W).argmax(-1))


def test_features_are_the_pictures_states_and_labels_the_objects_under_them(trained):
    umm, tok, world = trained
    X, y = reproduce.features(umm, tok, world, 'val', 7, 12)
    N = umm.c.grid**2
    assert X.shape == (umm.c.n_layer + 1, 12 * N, umm.c.n_embd)
    found, r, _ = world.scenes('val', 7, 12)
    x = umm.embed_image(r.image)
    x = umm.blocks[0](x, model.norm(x), umm.rope(umm.rc[None]), None, model.KV())
    assert torch.allclose(X[1], x.flatten(0, 1), atol=1e-5)
    p, seen = umm.c.patch, 0
    for b, (objs, _) in enumerate(found):
        for i in range(N):
            row, col = i // umm.c.grid * p, i % umm.c.grid * p
            inside = r.instance[b, row : row + p, col : col + p].flatten().tolist()
            slot = max(set(inside), key=inside.count)
            if inside.count(slot) > p * p / 2:
                o = objs[slot - 1] if slot else None
                assert y['object'][b * N + i] == (slot > 0)
                assert y['shape'][b * N + i] == (data.SHAPES.index(o.shape) if o else -1)
                assert y['colour'][b * N + i] == (list(data.COLOURS).index(o.colour) if o else -1)
                seen += slot > 0
    assert seen > 20


def test_probe_reports_every_layer_and_what_it_can_memorise(trained):
    umm, tok, world = trained
    out = reproduce.probe(umm, tok, world, 60)
    assert all(len(v) == umm.c.n_layer + 1 for v in out.values())
    assert {'shape', 'colour', 'depth', 'object', 'control', 'circle/ring'} <= out.keys()
    assert 0.2 < min(out['control']) and max(out['colour']) > 0.6


def test_recorded_attention_is_what_the_model_computed(trained):
    umm, tok, world = trained
    s, _ = world.questions('val', 3, 4, 3)
    plain = umm.hidden(s)
    with reproduce.recorded() as kept:
        assert torch.equal(umm.hidden(s), plain)
    assert len(kept) == 2 * umm.c.n_layer  # the picture, then the text, in every layer
    assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in kept)
    assert torch.equal(umm.hidden(s), plain) and len(kept) == 2 * umm.c.n_layer


def test_attention_shares_sum_to_one(trained):
    shares = reproduce.attention_shares(*trained, n=16)
    whole = np.array(shares['picture']) + np.array(shares['text'])
    assert np.allclose(whole, 1, atol=1e-4)
    assert all(0 <= a <= p for a, p in zip(shares['asked object'], shares['picture']))
    drawn = sum(np.array(v) for k, v in shares.items() if k.startswith('draw: '))
    assert np.allclose(drawn, 1, atol=1e-4)


def test_words_and_tokens_line_up(trained):
    text = trained[2].text
    for line in (
        'a red circle, a blue ring and a green cross',
        'top left a red circle, bottom right a ring',
    ):
        assert [t for w in line.split() for t in text.encode(w)] == text.encode(line)
        kinds = reproduce.buckets(text, line)
        assert len(kinds) == len(text.encode(line))
        assert all((k == 'other') >= (text.decode([t]) == ',') for k, t in zip(kinds, text.encode(line)))
    assert [reproduce.bucket(w) for w in 'top red ring, squares with'.split()] == [
        'position',
        'colour',
        'object',
        'object',
        'other',
    ]


def test_statistics_against_known_values():
    for df, want in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262)):
        assert report.t_quantile(0.975, df) == pytest.approx(want, abs=2e-3)
        assert report.t_below(want, df) == pytest.approx(0.975, abs=1e-4)
    e = report.paired([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt(3)
    assert (e['low'], e['high']) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert e['p'] == pytest.approx(0.0742, abs=1e-3)
    assert report.holm([0.01, 0.04, 0.03, None]) == [True, False, False, False]


@pytest.mark.parametrize(
    'low, high, no_change, want',
    [
        (0.01, 0.05, False, 'reproduced'),
        (-0.05, -0.01, False, 'opposite'),
        (-0.01, 0.01, False, 'not reproduced'),
        (-0.01, 0.05, False, 'undecided'),
        (-0.01, 0.01, True, 'reproduced'),
        (0.03, 0.05, True, 'not reproduced'),
        (-0.01, 0.05, True, 'undecided'),
        (None, None, False, 'undecided'),
    ],
)
def test_verdicts_follow_the_rule(low, high, no_change, want):
    assert report.verdict({'low': low, 'high': high}, no_change) == want


def plan(tmp_path, **how):
    a = dict(
        out=tmp_path,
        preset='test',
        data='',
        skip_bad=False,
        steps=0,
        device='cpu',
        threads=1,
        n=16,
        jobs=1,
        seeds=1,
    )
    return types.SimpleNamespace(**a | how)


@pytest.fixture(scope='module')
def arms(tmp_path_factory):
    """A base, sft and seg, and a hash of everything that the world gave each arm."""
    out, seen = tmp_path_factory.mktemp('plan'), {}
    given = reproduce.Limited

    class Hashed(given):
        def note(self, kind, found, text=True):
            for t in [x for x in vars(found).values() if isinstance(x, torch.Tensor)][
                : None if text else 0
            ]:
                seen[self.arm].setdefault(kind, hashlib.sha256()).update(t.numpy().tobytes())

        def questions(self, split, *args, **how):
            found = super().questions(split, *args, **how)
            if split == 'train':
                self.note('questions', found[0])
            return found

        def drawings(self, split, *args, **how):
            found = super().drawings(split, *args, **how)
            self.note('drawings', found[0])
            return found

        def proxies(self, split, index, B, name):
            found = super().proxies(split, index, B, name)
            if split == 'train':
                for kind, t in (('pictures', found[2].image), ('targets', found[1])):
                    seen[self.arm].setdefault(kind, hashlib.sha256()).update(t.numpy().tobytes())
            return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(reproduce, 'Limited', Hashed)
        real, kept = reproduce.measure, []

        def measured_twice(run, n):  # the other arms borrow the last scores: this is about training
            if len(kept) < 2:
                kept.append(real(run, n))
            return kept[-1]

        m.setattr(reproduce, 'measure', measured_twice)
        for arm in ('base', 'sft', 'seg', 'edge', 'shuffled'):
            Hashed.arm, seen[arm] = arm, {}
            reproduce.work(plan(out), 0, arm)
    return out, {arm: {k: h.hexdigest() for k, h in kinds.items()} for arm, kinds in seen.items()}


def test_arms_differ_in_nothing_but_the_target(arms):
    _, seen = arms
    for arm in ('edge', 'seg', 'shuffled'):
        assert seen[arm]['questions'] == seen['sft']['questions']
        assert seen[arm]['drawings'] == seen['sft']['drawings']
        assert seen[arm]['pictures'] == seen['seg']['pictures']
    assert seen['edge']['targets'] != seen['seg']['targets'] and 'targets' not in seen['sft']


def test_a_finished_arm_is_kept_and_the_report_is_the_same_again(arms, monkeypatch, capsys):
    out, _ = arms
    monkeypatch.setattr(reproduce, 'ProcessPoolExecutor', None)  # fails if anything is left to run
    monkeypatch.setattr(report, 'figures', lambda *a: None)
    results = {p: p.read_bytes() for p in out.glob('seed*/*/result.json')}
    assert len(results) == 5
    tables = []
    for _ in range(2):
        report.report(out)
        tables.append((out / 'report.md').read_text())
    assert tables[0] == tables[1] and 'segmentation beats edges' in tables[0]
    assert '# Probe, last layer' in tables[0] and 'circle/ring' in tables[0]
    claims = json.loads((out / 'claims.json').read_text())
    keys = {'claim', 'effect', 'low', 'high', 'seeds', 'paper', 'verdict'}
    assert claims and all(keys <= c.keys() for c in claims)
    assert results == {p: p.read_bytes() for p in out.glob('seed*/*/result.json')}


def test_cosine_of_gradients(arms, monkeypatch, capsys):
    """Against autograd.grad of the summed loss; with themselves the questions' gradients agree fully."""
    monkeypatch.setattr(cosine, 'BATCHES', 2), monkeypatch.setattr(cosine, 'PICTURES', 4)
    runs, real = [], train.umm_losses
    monkeypatch.setattr(
        train, 'umm_losses', lambda run, step, *how: (runs.append(run), real(run, step % 2, *how))[1]
    )
    got = cosine.cosines(arms[0] / 'seed0' / 'base' / 'pretrained.safetensors')
    assert got.keys() == {'questions', *reproduce.PROXY_ARMS} and got['questions'] == pytest.approx(
        [1, 1], abs=1e-5
    )
    run = runs[-1]
    run.s.proxy, parts = 'edge', list(run.umm.blocks.parameters())
    a, b = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(real(run, 0, *n)['loss'] + real(run, 1, *n)['loss'], parts)
            ]
        )
        for n in ((4, 0, 0), (0, 0, 4))
    )
    assert got['edge'][-1] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-5)
    cosine.main(arms[0])
    assert '| edge |' in capsys.readouterr().out


def test_a_killed_arm_resumes_to_the_same_scores(arms, tmp_path):
    """Stopped in the middle of post-training, as after a kill: same result as the arm that was not."""
    out, _ = arms
    (tmp_path / 'seed0').mkdir()
    (tmp_path / 'seed0' / 'base').symlink_to(out / 'seed0' / 'base')
    a, save = plan(tmp_path), train.Run.save

    def die(run, name, stage, step, opts=()):
        save(run, name, stage, step, opts)
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train.Run, 'save', die)
        with pytest.raises(KeyboardInterrupt):
            reproduce.work(a, 0, 'seg')
    assert not (tmp_path / 'seed0' / 'seg' / 'result.json').exists()
    reproduce.work(a, 0, 'seg')
    want, got = (json.loads((f / 'seed0' / 'seg' / 'result.json').read_text()) for f in (out, tmp_path))
    assert want['scores'] == got['scores'] and want['log'] == got['log']


def test_sweeps_name_real_arms_and_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib').use('Agg')
    arms = {arm for panel in report.SWEEPS.values() for arm in panel.values()}
    assert (
        arms <= reproduce.ARMS.keys() and {report.baseline(arm) for arm in arms} <= reproduce.ARMS.keys()
    )
    at = lambda x: {'scores': {'understanding': {'mean': {'value': x}}}}
    drawn = []  # a panel shows the seeds that all its arms have
    real = report.difference
    monkeypatch.setattr(report, 'difference', lambda *a: drawn.append(real(*a)) or drawn[-1])
    found = {'sft': {0: at(0.5), 1: at(0.6)}, 'seg': {0: at(0.7), 1: at(0.7)}, 'ratio-1': {1: at(0.6)}}
    report.sweeps(tmp_path, found)
    assert [e['n'] for e in drawn] == [1, 1, 1]
    assert (tmp_path / 'sweeps.png').stat().st_size > 1000


def test_limited_worlds_repeat_their_first_pictures():
    world = World(16)
    world.__class__ = type('LimitedWorld', (reproduce.Limited, World), {})
    world.pictures, world.questions_ = 8, 4
    images = [world.proxies('train', 3 * i + 2, 4, 'seg')[2].image for i in range(5)]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert torch.equal(images[0], World(16).proxies('train', 2, 4, 'seg')[2].image)
    asked = [world.questions('train', 3 * i, 4, 2)[0].text for i in range(2)]
    assert torch.equal(*asked)


def test_unknown_arms_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match='sge'):
        reproduce.main(['--arms', 'sge'])
    with pytest.raises(UserError, match='no finished arm'):
        report.report(tmp_path)
    for seed in (0, 1):
        (folder := tmp_path / f'seed{seed}' / 'seg').mkdir(parents=True)
        r = {'arm': 'seg', 'seed': seed, 'plan': [seed], 'scores': {'understanding': {}}}
        (folder / 'result.json').write_text(json.dumps(r))
    with pytest.raises(UserError, match='mixes seg'):
        report.report(tmp_path)


def test_a_claim_of_no_change_is_no_difference_that_survives():
    run = lambda mean, reason: {
        'scores': {'understanding': {'mean': {'value': mean}, 'reason': {'value': reason}}},
        'log': [],
        'steps': 4,
    }
    found = {
        'sft': {seed: run(0.5 + seed / 100, 0.5) for seed in range(3)},
        'seg': {seed: run(0.7 + seed / 99, 0.6 + seed / 1000) for seed in range(3)},
    }
    rows = {r['paper'] == '0': r for r in report.claims_of(found)}
    assert (rows[True]['verdict'], rows[True]['survives_holm']) == ('not reproduced', False)
    assert (rows[False]['verdict'], rows[False]['survives_holm']) == ('reproduced', True)
