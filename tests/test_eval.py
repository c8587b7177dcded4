"""Measurements against naive code, and the verifier against the truth."""

import math
from collections import Counter

import pytest
import torch

import data
import eval as evaluation
import model
from data import World


def test_share_is_wilson():
    f = evaluation.share(8, 10)
    assert (round(f['low'], 3), round(f['high'], 3), f['n']) == (
        0.490,
        0.943,
        10,
    )  # Wilson's interval, tabulated
    assert evaluation.share(0, 20)['low'] == pytest.approx(0, abs=1e-9)
    m = evaluation.mean_of([evaluation.share(5, 10), evaluation.share(20, 20)])
    half, whole = evaluation.share(5, 10), evaluation.share(20, 20)  # MOVER: distances add in squares
    assert m['value'] == 0.75 and m['high'] == pytest.approx(0.75 + (half['high'] - 0.5) / 2)
    assert m['low'] == pytest.approx(0.75 - math.hypot(0.5 - half['low'], 1 - whole['low']) / 2)
    assert evaluation.mean_of([whole] * 6)['low'] < 0.99  # all right is no certainty


def test_miou_against_naive():
    pred, true = torch.randint(6, (2, 9, 8, 8)).unbind()
    want = [((pred == k) & (true == k)).sum() / ((pred == k) | (true == k)).sum() for k in range(6)]
    f = evaluation.miou(pred, true)
    assert (
        f['value'] == pytest.approx(sum(want).item() / 6, abs=1e-6) and f['low'] < f['value'] < f['high']
    )
    assert evaluation.miou(true, true)['value'] == 1


def test_components_against_flood_fill():
    label = torch.randint(3, (4, 9, 9))
    mask = torch.rand(4, 9, 9) < 0.6
    ids = evaluation.components(mask, label)
    for b in range(4):
        seen, want = {}, 0
        for start in mask[b].nonzero().tolist():
            if tuple(start) in seen:
                continue
            want, stack = want + 1, [tuple(start)]
            while stack:
                y, x = stack.pop()
                if (y, x) not in seen:
                    seen[y, x] = want
                    stack += [
                        (v, u)
                        for v in range(max(0, y - 1), min(9, y + 2))
                        for u in range(max(0, x - 1), min(9, x + 2))
                        if mask[b, v, u] and label[b, v, u] == label[b, y, x]
                    ]
        pairs = {(ids[b, y, x].item(), k) for (y, x), k in seen.items()}
        assert (
            len(pairs) == want and len({a for a, _ in pairs}) == want and (ids[b][~mask[b]] == 0).all()
        )


def test_verifier_is_right_on_true_pictures():
    """>= 99% of scenes, occluded ones included, and >= 99% of prompts."""
    world = World(32)
    scenes, r, _ = world.scenes('val', 0, 100)
    key = lambda o: (o.shape, o.colour)
    right = sum(
        Counter(map(key, objs)) == Counter(map(key, f))
        for (objs, _), f in zip(scenes, evaluation.detect(r.image))
    )
    assert right >= 99
    passed = total = 0
    for category in evaluation.CATEGORIES:
        _, wanted, images = evaluation.prompts(world, category, 16, 'val')
        passed += sum(
            evaluation.satisfied(w, category, f) for w, f in zip(wanted, evaluation.detect(images))
        )
        total += 16
    assert passed >= 0.99 * total


def test_verifier_rejects_what_is_wrong():
    world = World(32)
    _, wanted, images = evaluation.prompts(world, 'position', 20, 'val')
    found = evaluation.detect(images)
    for w, f in zip(wanted, found):
        assert not evaluation.satisfied(w[::-1][:1], 'single', f)  # one object too many
        mirrored = [o._replace(x=1 - o.x, y=1 - o.y) for o in f]
        assert not evaluation.satisfied(w, 'position', mirrored)  # wrong side
        other = [f[0]._replace(colour='none'), *f[1:]]
        assert not evaluation.satisfied(w, 'attribution', other)
    assert not evaluation.satisfied(wanted[0], 'two', [])


class Oracle(torch.nn.Module):
    """A 'model' whose hidden state is the true next token."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.text_head = lambda x: x
        self.inputs = lambda tok, image: image

    def hidden(self, s):
        return torch.nn.functional.one_hot(s.target.clamp(min=0), self.c.vocab).float()


def test_perfect_answers_score_one_and_wrong_ones_zero(world):
    umm = Oracle(model.Config(size=16, vocab=world.text.size))
    u = evaluation.understanding(umm, None, world, n=64, split='val')
    assert u['mean']['value'] == 1 and u['reason']['value'] == 1
    umm.text_head = lambda x: -x
    assert evaluation.understanding(umm, None, world, n=64, split='val')['mean']['value'] == 0


def test_scoring_equals_greedy_answers(run_dir):
    """Teacher-forced scoring gives what generating the answers gives."""
    tok, umm, text, _, _ = model.load(run_dir / 'model.safetensors')
    world = World(umm.c.size, 0, 'cpu', text)
    umm.text_head.weight.data += (
        torch.randn(umm.text_head.weight.shape) * 0.3
    )  # an untrained model answers variously
    scenes, r, rng = world.scenes('val', 0, 40)
    qa = [
        next(x for k in ('where', 'what') if (x := data.Questions(o, t, rng).ask(k))) for o, t in scenes
    ]
    forced = data.pack(text, [[x] for x in qa], r.image)
    good = ((umm.text_head(umm.hidden(forced)).argmax(-1) == forced.target) | (forced.target < 0)).all(1)
    asked = data.pack(text, [[(q, None)] for q, _ in qa], r.image)
    rows = umm.generate(asked, first=text.answer, stop=text.end, temperature=0, length=8).tolist()
    said = [row[: row.index(text.end)] if text.end in row else row + [-1] for row in rows]
    assert good.tolist() == [a == text.encode(t) for a, (_, t) in zip(said, qa)]


def test_blind_baseline_is_at_chance():
    b = evaluation.blind(World(16), n=1024)
    for kind, chance in data.CHANCE.items():
        assert b[kind]['value'] < chance + 0.08, kind


def test_detect_ends_on_regions_that_no_template_touches():
    """A thin frame has its centre far from all its pixels: it is no object, and no endless loop."""
    x = torch.full((1, 3, 32, 32), 0.5)
    x[:, :, [0, -1]] = x[:, :, :, [0, -1]] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    assert len(evaluation.detect(x)[0]) < 20
