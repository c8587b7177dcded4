"""Measurements against naive code, and the verifier against the truth."""
import math
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import CHANCE

import data
import eval as evaluation
import model
import sample
from data import World


# ---- figures with intervals ----
def test_share_is_wilson():
    f = evaluation.share(8, 10)                            # Wilson's interval, as tabulated
    assert f['low'] == pytest.approx(.490, abs=5e-4)
    assert f['high'] == pytest.approx(.943, abs=5e-4)
    assert f['n'] == 10
    assert evaluation.share(0, 20)['low'] == pytest.approx(0, abs=1e-9)


def test_of_nothing_there_is_no_share():
    assert evaluation.share(0, 0) == evaluation.NOTHING
    assert evaluation.mean_of([evaluation.share(0, 0)]) == evaluation.NOTHING


def test_errors_of_a_mean_add_in_squares():
    half = evaluation.share(5, 10)
    whole = evaluation.share(20, 20)
    mean = evaluation.mean_of([half, whole])
    assert mean['value'] == .75
    above = half['high'] - .5                              # of the other it is 0
    assert mean['high'] == pytest.approx(.75 + above / 2)
    below = math.hypot(.5 - half['low'], 1 - whole['low'])
    assert mean['low'] == pytest.approx(.75 - below / 2)
    many = evaluation.mean_of([whole] * 6)
    assert many['low'] < .99                               # all right is no certainty


# ---- segmentation ----
def test_miou_against_naive():
    g = torch.Generator().manual_seed(0)
    pred, true = torch.randint(6, (2, 9, 8, 8), generator=g)
    ious = []
    for k in range(6):
        both = (pred == k) & (true == k)
        either = (pred == k) | (true == k)
        ious.append(both.sum().item() / either.sum().item())
    f = evaluation.miou(pred, true)
    assert f['value'] == pytest.approx(sum(ious) / 6, abs=1e-6)
    assert f['low'] < f['value'] < f['high']
    assert evaluation.miou(true, true)['value'] == 1


# ---- the verifier ----
def flood_fill(mask, label) -> dict:
    """Of one picture: {(y, x): number of its region}, from 1 on."""
    S, region, regions = len(mask), {}, 0
    for start in mask.nonzero().tolist():
        if tuple(start) in region:
            continue
        regions += 1
        stack = [tuple(start)]
        while stack:
            y, x = stack.pop()
            inside = 0 <= y < S and 0 <= x < S
            if not inside or (y, x) in region:
                continue
            if mask[y, x] and label[y, x] == label[tuple(start)]:
                region[y, x] = regions
                stack += product((y - 1, y, y + 1), (x - 1, x, x + 1))
    return region


def test_components_against_flood_fill():
    g = torch.Generator().manual_seed(0)
    label = torch.randint(3, (4, 9, 9), generator=g)
    mask = torch.rand(4, 9, 9, generator=g) < .6
    ids = evaluation.components(mask, label)
    for b in range(4):
        region = flood_fill(mask[b], label[b])
        pairs = set()
        for place, number in region.items():
            found = ids[b][place].item()
            pairs.add((found, number))
        # one id for each region, one region for each id
        assert len(pairs) == len(set(region.values()))
        assert len(pairs) == len({number for number, _ in pairs})
        assert (ids[b][~mask[b]] == 0).all()


def names_of(objects) -> Counter:
    return Counter(o.name for o in objects)


def test_verifier_is_right_on_true_pictures():
    """At least 99% of scenes, occluded ones included."""
    scenes, r, _ = World(32).scenes('val', 'verifier', 0, 100)
    right = 0
    for scene, found in zip(scenes, evaluation.detect(r.image)):
        if names_of(scene.objects) == names_of(found):
            right += 1
    assert right >= 99


def test_true_pictures_pass():
    """At least 99% of prompts."""
    world, passed = World(32), 0
    for category in evaluation.CATEGORIES:
        _, wanted, images = evaluation.prompts(world, category, 16, 'val')
        for objects, found in zip(wanted, evaluation.detect(images)):
            if evaluation.satisfied(objects, category, found):
                passed += 1
    assert passed >= .99 * 16 * len(evaluation.CATEGORIES)


def test_verifier_rejects_what_is_wrong():
    _, wanted, images = evaluation.prompts(World(32), 'position', 20, 'val')
    for objects, found in zip(wanted, evaluation.detect(images)):
        only = [objects[1]]
        assert not evaluation.satisfied(only, 'single', found)           # one object too many
        mirrored = [o._replace(x=1 - o.x, y=1 - o.y) for o in found]
        assert not evaluation.satisfied(objects, 'position', mirrored)   # wrong side
        other = [found[0]._replace(colour='none'), *found[1:]]
        assert not evaluation.satisfied(objects, 'attribution', other)
        assert not evaluation.satisfied(objects, 'two', [])


def test_detect_ends_on_regions_that_no_template_touches():
    """A thin frame has its centre far from all its pixels: it is no object, and no endless loop."""
    x = torch.full((1, 3, 32, 32), .5)
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    x[0, :, frame] = torch.tensor([.9, .1, .1])[:, None]
    found, = evaluation.detect(x)
    assert len(found) < 20


# ---- understanding ----
class Oracle:
    """A 'model' whose hidden state is the true next token, or, contrary, all but that one."""

    def __init__(self, vocab: int, contrary=False):
        self.vocab = vocab
        self.contrary = contrary

    def hidden(self, s):
        target = s.target.clamp(min=0)
        return F.one_hot(target, self.vocab).float()

    def text_head(self, x):
        return -x if self.contrary else x


def test_perfect_answers_score_one_and_wrong_ones_zero(world):
    right = Oracle(world.text.size)
    wrong = Oracle(world.text.size, contrary=True)
    for umm, value in ((right, 1), (wrong, 0)):
        scores = evaluation.understanding(umm, None, world, n=64, split='val')
        assert scores.keys() == {'mean', 'reason', *data.VISUAL}
        for f in scores.values():
            assert f['value'] == value


class Asked:
    """A data set of one batch of questions, a type for each."""
    kinds = ('yes', 'no')

    def __init__(self, s, types):
        self.batch = s, [[kind] for kind in types]

    def questions(self, *args, **how):
        return self.batch


def test_scoring_equals_greedy_answers(run_dir):
    """The score from one pass over the true answers is that of answers generated token by token."""
    tok, umm, text, _, _ = model.load(run_dir / 'model.safetensors')
    world = World(umm.c.size, 0, 'cpu', text)
    # a model that has learned nothing gives various answers in words of the world, and ends them
    torch.manual_seed(0)
    words = text.encode('top bottom left right') + [text.end]
    head = umm.text_head.weight.data
    head[words] += torch.randn(len(words), head.shape[1])
    scenes, r, rng = world.scenes('val', 'greedy', 0, 40)
    asked = []
    for scene in scenes:
        asked += world.ask(scene, 'where', rng)
    prompts = data.pack(text, [[(question, None)] for question, _ in asked], r.image)
    rows = umm.generate(prompts, text.answer, text.end, length=8, temperature=0).tolist()
    # every second true answer is made what the model says; if it does not end, it is wrong all the same
    turns, types = [], []
    for i, (question, answer) in enumerate(asked):
        said = text.decode(rows[i])
        if i % 2 == 0:
            answer = said
        turns.append((question, answer))
        correct = said == answer and text.end in rows[i]
        types.append('yes' if correct else 'no')
    right = types.count('yes')
    assert 3 <= right <= 30
    s = data.pack(text, [[turn] for turn in turns], r.image)
    scores = evaluation.understanding(umm, tok, Asked(s, types), n=40, B=40)
    assert scores['yes'] == evaluation.share(right, right)
    assert scores['no'] == evaluation.share(0, 40 - right)


def test_blind_baseline_is_at_chance():
    scores = evaluation.blind(World(16), n=1024)
    assert tuple(CHANCE) == data.VISUAL
    for kind, chance in CHANCE.items():
        assert scores[kind]['value'] < chance + .08, kind


@pytest.mark.parametrize('proxy', ['seg', 'edge', 'none'])
def test_only_the_map_that_was_taught_is_shown_and_measured(run_dir, monkeypatch, proxy):
    tok, umm, text, _, _ = model.load(run_dir / 'model.safetensors')
    world = World(16, text=text)
    monkeypatch.setattr(sample, 'grid', lambda rows, notes: rows)
    drawings, pictures, *maps = sample.picture(umm, tok, world, 2., proxy)
    if proxy == 'none':
        assert maps == []
    else:
        _, true, _ = world.maps_to_draw('val', 0, 8, proxy, stream='samples')
        assert torch.equal(maps[-1], true)
    for name in ('tokenizer', 'understanding', 'blind', 'generation'):
        monkeypatch.setattr(evaluation, name, lambda *how: {})
    scores = evaluation.evaluate(umm, tok, world, 16, proxy=proxy)
    assert ('miou' in scores['segmentation']) is (proxy == 'seg')


def test_the_table_has_no_heading_without_figures():
    half = evaluation.share(1, 2)
    scores = {part: {} for part in ('understanding', 'blind', 'generation', 'segmentation')}
    scores['tokenizer'] = {'used': half}
    table = evaluation.table(scores)
    assert '**tokenizer**' in table
    assert 'generation' not in table
    scores['generation'] = {'mean': half}
    assert '**generation**' in evaluation.table(scores)
