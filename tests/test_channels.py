"""Labels or generation: what channels read and write, what contents show, drawing without sampling."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import model
import train
from data import World
from experiments import channels, drawing, labels, report, reproduce


@pytest.fixture(scope='module')
def run(run_dir, tmp_path_factory):
    """A run that is about to post-train, at the test preset."""
    out = tmp_path_factory.mktemp('channels')
    init = str(run_dir / 'pretrained.safetensors')
    flags = ['--preset', 'test', '--device', 'cpu', '--threads', '1', '--dtype', 'float32']
    s = train.parse([*flags, '--hide', '0', '--init', init, '--out', str(out)])
    found = train.Run(s, torch.device('cpu'))
    g = torch.Generator().manual_seed(0)
    for head in (found.umm.text_head, found.umm.pixel_head):       # heads that say something
        head.weight.data.normal_(0, .3, generator=g)
    return found


def batch(run, index=3):
    return run.world.maps_to_draw('train', index, 4, 'seg')


def another(run, codes, places):
    """The same codes, but other ones at some places of every picture."""
    changed = codes.clone()
    changed[:, places] += 1
    return changed % run.umm.c.codebook


# ---- contents ----
def test_contents_show_what_they_say():
    _, r, _ = World(32).scenes('train', 'x', 0, 8)
    there = r.instance > 0
    assert torch.equal(channels.silhouette(r).amax(1) > 0, there)
    assert torch.equal(channels.regions(r).amax(1) > 0, there)
    assert channels.blank(r).sum() == 0
    cut = channels.cutout(r)
    inside = there[:, None].expand_as(cut)
    assert cut[~inside].sum() == 0
    assert torch.equal(cut[inside], r.image[inside])
    # the n-th object in reading order has the n-th colour in every picture
    for number in range(1, 5):
        maps = channels.regions(r).permute(0, 2, 3, 1)                                # [B,S,S,3]
        colours = maps[r.instance == number]
        assert len(colours.unique(dim=0)) == 1


def test_told_says_what_the_map_shows():
    """The words are those of the scene's plan without its colours; of objects that can be seen."""
    scenes, r, _ = World(32).scenes('train', 'x', 0, 64)
    alike = 0
    for scene, said in zip(scenes, channels.in_words(r)):
        want = []
        for o in scene.objects:
            want.append(f'{data.CELLS[o.cell]} a {o.shape}')
        if said == ', '.join(want):
            alike += 1
    assert alike >= 62             # an object that another one covers in part may seem to lie elsewhere


# ---- channels ----
def test_readout_is_a_classifier_of_the_pictures_own_states(run):
    """No code of the map is read, nor the instruction; against the states that umm.hidden computes."""
    seq, target, r = batch(run)
    loss = channels.readout(run, 0, seq, target, r)
    states = []
    last = run.umm.blocks[-1]
    hook = last.register_forward_hook(lambda block, given, out: states.append(out))
    run.umm.hidden(seq)
    hook.remove()
    picture = states[0]                                        # it goes first in each block
    logits = run.umm.pixel_head(model.norm(picture))
    want = F.cross_entropy(logits.mT, run.tok.encode(target))
    assert torch.allclose(loss, want, atol=1e-5)
    other, _, _ = batch(run, 4)
    seq.text, seq.turn = other.text, other.turn
    assert torch.equal(channels.readout(run, 0, seq, target, r), loss)


def test_masked_sees_shown_codes_on_both_sides_and_no_hidden_one(run):
    seq, target, _ = batch(run)
    codes = run.tok.encode(target)
    hidden = torch.zeros_like(codes, dtype=torch.bool)
    hidden[:, 5:9] = True
    plain = channels.logits_of_masked(run, seq, codes, hidden)
    changed = another(run, codes, slice(5, 9))
    assert torch.equal(channels.logits_of_masked(run, seq, changed, hidden), plain)
    for place in (0, 12):                                      # before and after the hidden ones
        changed = another(run, codes, place)
        other = channels.logits_of_masked(run, seq, changed, hidden)
        difference = (other - plain).abs()
        assert difference[:, 5:9].amax() > 1e-4


def test_all_hidden_and_earlier_places_only_would_be_blind(run):
    """Then masked computes what --hide 1 does."""
    seq, target, _ = batch(run)
    seq.codes = run.tok.encode(target)
    hidden = torch.ones_like(seq.codes, dtype=torch.bool)
    got = channels.logits_of_masked(run, seq, seq.codes, hidden, both_sides=False)
    T = seq.text.shape[1]
    x = run.umm.hidden(seq, hide=1.)[:, T:]
    assert torch.allclose(got, run.umm.pixel_head(x), atol=1e-5)


def test_order_and_blind(run):
    """hide 0: a code sees the earlier ones; hide 1: it sees none."""
    seq, target, _ = batch(run)
    T = seq.text.shape[1]
    seq.codes = run.tok.encode(target)
    changed = another(run, seq.codes, 0)
    other = model.Sequence(seq.text, seq.turn, image=seq.image, codes=changed)
    for hide, alike in ((0., False), (1., True)):
        a = run.umm.hidden(seq, hide=hide)
        b = run.umm.hidden(other, hide=hide)
        after = slice(T + 1, None)                             # what stands after the changed code
        assert torch.allclose(a[:, after], b[:, after], atol=1e-6) == alike


def test_controls_that_shuffle_and_freeze(run):
    seq, target, r = batch(run)
    plain = train.generated(run, 0, seq, target, r)
    rolled = train.generated(run, 0, seq, target.roll(1, 0), r)
    assert torch.equal(channels.shuffled(run, 0, seq, target, r), rolled)
    run.umm.zero_grad()
    loss = channels.frozen(run, 0, seq, target, r)
    assert torch.equal(loss, plain)
    loss.backward()
    assert all(p.grad is None for p in run.umm.blocks.parameters())
    assert run.umm.pixel_head.weight.grad.abs().sum() > 0
    run.umm.zero_grad()
    # UniMRG: the third of three batches is segmentation
    assert torch.equal(channels.in_turns(run, 2, seq, target, r), plain)


# ---- equal cost ----
def test_counted_flops_are_those_of_a_hand_count(run):
    """Of reading the codes of maps off the picture, beside nothing else, forward only."""
    from torch.utils.flop_counter import FlopCounterMode
    seq, target, r = batch(run)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        channels.readout(run, 0, seq, target, r)
    with FlopCounterMode(display=False) as coding, torch.no_grad():
        run.tok.encode(target)
    c = run.umm.c
    B, C = 4, c.n_embd
    N = len(run.umm.rc)
    embedding = 3 * c.patch ** 2 * C
    matrices = (3 + 1 + 4 + 4) * C * C                         # qkv, proj, up, down
    attention = 2 * N * C                                      # scores, and the mean of the values
    each = embedding + c.n_layer * (matrices + attention) + C * c.codebook
    counted = whole.get_total_flops() - coding.get_total_flops()
    assert counted == 2 * B * N * each                         # a product and a sum


# ---- drawing without sampling ----
def test_swapped_scenes_differ_in_nothing_else():
    world = World(32)
    _, scenes = drawing.pair_batch(world, 'test', 0)
    scene = scenes[0]
    a, b = scene.objects
    x, y = drawing.swapped(scene, 'colours').objects
    assert x == a._replace(colour=b.colour)
    assert y == b._replace(colour=a.colour)
    x, y = drawing.swapped(scene, 'sides').objects
    assert x == a._replace(colour=b.colour, shape=b.shape)
    assert y == b._replace(colour=a.colour, shape=a.shape)


def test_forced_choice_against_naive_code(run):
    """One picture at a time, log-probabilities added code by code."""
    umm, tok, world = run.umm, run.tok, run.world
    got = drawing.choices(umm, tok, world, 1, 'val')
    texts, true = drawing.pair_batch(world, 'val', 0)
    other = [drawing.swapped(scene, 'sides') for scene in true]
    pictures = []
    for scenes in (true, other):
        g = data.generator(world.seed, 'val', 'choice texture', 0)
        r = data.render(scenes, world.size, g)
        pictures.append(tok.encode(r.image))
    right = 0
    for b, text in enumerate(texts):
        plan = drawing.plans_of(world, true)[b]
        likely = []
        for codes in pictures:
            seq = data.pack(world.text, [[(text, plan)]])
            seq.codes = codes[b:b + 1]
            with torch.no_grad():
                x = umm.hidden(seq)[0, seq.text.shape[1]:]
                log_p = umm.pixel_head(x).log_softmax(-1)
            total = 0
            for place, code in enumerate(codes[b].tolist()):
                total += log_p[place, code].item()
            likely.append(total)
        right += likely[0] > likely[1]
    n = got['sides']['n']
    assert n == len(texts)
    assert abs(got['sides']['value'] * n - right) < 1.5        # sums in another order: a tie may break


def test_likelihood_is_the_loss_of_drawings(run):
    got = drawing.likelihood(run.umm, run.tok, run.world, 64, 'val')
    seq, target = run.world.drawings('val', 0, 64, drop=0, stream='likelihood')
    seq.codes = run.tok.encode(target)
    with torch.no_grad():
        _, pixel = run.umm(seq)
    assert got['nats a code'] == pytest.approx(pixel.item(), abs=1e-5)


# ---- plans ----
def test_every_arm_of_the_plans_is_known():
    for plan in reproduce.PLANS.values():
        assert set(plan) <= reproduce.ARMS.keys()
    assert reproduce.ARMS['seg-order'].flags == {'hide': 0}
    assert reproduce.ARMS['sft-flops'].longer > reproduce.ARMS['readout-flops'].longer > 1


def test_the_bound_of_one_who_knows_all_but_shapes():
    """It guesses shapes, knows sizes and colours well, and names what is somewhere by luck."""
    ring = data.Object('ring', 'red', 0, .2, .2, .9)
    scene = data.Scene([ring])
    rng = random.Random(0)
    assert labels.guess_without_shapes(scene, 'size', ['red ring'], rng) == 'small'
    assert labels.guess_without_shapes(scene, 'colour', ['ring'], rng) == 'red'
    guess = labels.guess_without_shapes(scene, 'what', ['top left'], rng)
    assert guess.startswith('red ')
    other = labels.without_shapes(scene, rng).objects[0]
    assert other._replace(shape='ring') == ring


@pytest.mark.parametrize('arms', [
    ('sft-flops', 'readout-flops', 'seg-order', 'seg-blind'),
    ('sft-x3-flops', 'readout-x3', 'order-x3', 'masked-x3'),
])
def test_the_figure_is_of_short_or_of_long_runs(tmp_path, arms):
    pytest.importorskip('matplotlib')
    scores = Path(reproduce.ROOT) / 'experiments' / 'results' / 'scores-channel.json'
    found = report.collect(scores)
    kept = {arm: found[arm] for arm in arms}
    assert len(kept) > 3
    assert set(arms) <= set(labels.arms_of(kept).values())
    labels.figure(kept, tmp_path / 'labels.png')
    assert (tmp_path / 'labels.png').stat().st_size > 10_000
    del kept[arms[0]]                                      # nothing to compare with
    with pytest.raises(data.UserError, match='needs the arms'):
        labels.figure(kept, tmp_path / 'none.png')
    assert not (tmp_path / 'none.png').exists()
