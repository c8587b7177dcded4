"""How to extend the project: a map and a data set of one's own, each as short as it can be, go through
everything that the built-in ones go through."""
import json
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TEST, leave_out, log_of

import data
import eval as evaluation
import train
from data import COLOURS, DataSet, Map, Rendering, UserError
from experiments import reader


# ---- a map in five lines ----
def contour(r: Rendering):
    """The borders of instances: white where a pixel next to this one has a higher number."""
    number = r.instance[:, None].float()                                              # [B,1,S,S]
    highest = F.max_pool2d(number, 3, stride=1, padding=1)                            # [B,1,S,S]
    return (highest > number).float().expand_as(r.image)                              # [B,3,S,S]


CONTOUR = Map(contour, ('draw the borders.', 'show every border.'), 'instance', '#7f7f7f')


@pytest.fixture
def with_contour(monkeypatch):
    """As a line in data.MAPS would have it."""
    monkeypatch.setitem(data.MAPS, 'contour', CONTOUR)


def naive_contour(instance):
    """The same of one picture, pixel by pixel; instance [S, S]."""
    S = len(instance)
    white = torch.zeros(3, S, S)
    for y in range(S):
        for x in range(S):
            around = instance[max(0, y - 1):y + 2, max(0, x - 1):x + 2]
            if around.max() > instance[y, x]:
                white[:, y, x] = 1
    return white


@pytest.fixture
def run(with_contour, tmp_path):
    """A run of the test preset that has the map to learn and begins with post-training. A new network
    gives all codes the same chance, so that its loss is the same for any target: not this one."""
    s = train.parse([*TEST, '--out', str(tmp_path / 'run')])
    s.proxy = 'contour'                                    # a flag takes the maps in data.MAPS
    run = train.Run(s, torch.device('cpu'))
    nn.init.normal_(run.umm.pixel_head.weight)
    run.tok.eval()
    run.stage = 'posttrain'
    return run


def test_the_supervised_target_is_the_new_map(run):
    s, drawn, r = run.world.maps_to_draw('train', 0, 4, 'contour')
    target = torch.stack([naive_contour(instance) for instance in r.instance])
    assert torch.equal(drawn, target)
    assert 0 < target.mean() < .5                          # there are borders
    s.codes = run.tok.encode(target)
    _, want = run.umm(s, run.s.hide)
    losses = train.umm_losses(run, 0, 2, 2, 4)
    assert losses.keys() == {'loss', 'text', 'plan', 'draw', 'contour'}
    assert torch.equal(losses['contour'], want)
    # of another target the loss is another one
    s.codes = run.tok.encode(1 - target)
    _, other = run.umm(s, run.s.hide)
    assert not torch.allclose(other, want)
    # and it is a part of what is minimised
    rest = losses['text'] + losses['plan'] + losses['draw']
    assert torch.allclose(losses['loss'], rest + run.s.w_proxy * want)


def test_post_training_on_the_new_map(run, monkeypatch):
    leave_out(monkeypatch, 'understanding')
    before = run.umm.pixel_head.weight.clone()
    train.posttrain(run)
    assert run.stage == train.DONE
    logged = [line for line in log_of(run.dir) if 'contour' in line]
    assert [line['step'] for line in logged] == [2, 4, 6]
    assert logged[-1]['contour'] < logged[0]['contour']
    assert not torch.equal(run.umm.pixel_head.weight, before)


def test_the_tokenizer_and_the_text_know_the_new_map(run):
    assert 'contour' in run.world.maps
    figures = evaluation.tokenizer(run.tok, run.world, 16, 'val')
    assert figures['psnr_contour']['n'] == 16
    for word in ('borders', 'border'):
        assert len(run.world.text.encode(word)) == 1


# ---- a data set in 25 lines ----
class Plain(DataSet):
    """Pictures of a single colour; a scene is the name of it."""
    kinds = ('colour',)
    captions = True
    example = 'a red picture'

    def scenes(self, split, stream, index, B, pixels=True):
        rng = data.python_random(self.seed, split, stream, index)
        names = rng.choices(list(COLOURS), k=B)
        if not pixels:
            return names, None, rng
        rgb = torch.tensor([COLOURS[name] for name in names], device=self.device)     # [B,3]
        image = rgb[:, :, None, None].expand(B, 3, self.size, self.size)
        none = torch.zeros_like(image[:, 0])               # nothing is annotated
        return names, Rendering(image, none.long(), none.long(), none), rng

    def corpus(self):
        return ['what color is it?', 'a picture', *COLOURS]

    def ask(self, scene, kind, rng):
        return [('what color is it?', scene)]

    def describe(self, scene, style, rng):
        return f'a {scene} picture' if style == 'list' else None


@pytest.fixture
def open_plain(monkeypatch):
    """As a line in folder.open_world would have it."""
    def open_world(folder, size, seed, device, text=None, skip_bad=False):
        return Plain(size, seed, device, text)

    monkeypatch.setattr(train, 'open_world', open_world)
    monkeypatch.setattr(evaluation, 'open_world', open_world)


def test_the_new_data_set_goes_through_everything(open_plain, tmp_path):
    """All stages, the evaluation, another evaluation of what was saved."""
    out = tmp_path / 'run'
    flags = [*TEST, '--out', str(out)]
    with pytest.raises(UserError, match='--proxy'):        # there is no depth
        train.main([*flags, '--proxy', 'depth'])
    train.main([*flags, '--proxy', 'edge'])
    names = {'pretrain': set(), 'posttrain': set(), 'tokenizer': set()}
    for line in log_of(out):
        names[line['stage']].update(line)
    assert {'text', 'plan', 'draw'} <= names['pretrain']
    assert {'text', 'plan', 'draw', 'edge'} <= names['posttrain']
    scores = json.loads((out / 'scores.json').read_text())
    assert scores['understanding'].keys() == {'mean', 'colour'}
    assert scores['understanding']['colour']['n'] >= 32
    assert scores['blind'].keys() == {'mean', 'colour'}
    assert scores['generation'] == {}                      # no rule verifies its drawings
    assert scores['tokenizer'].keys() == {'psnr', 'psnr_edge', 'used', 'perplexity'}
    assert scores['segmentation'] == {}
    evaluation.main(['--run', str(out), '--n', '32', '--device', 'cpu'])
    again = json.loads((out / 'scores_test.json').read_text())
    for part in ('understanding', 'blind', 'tokenizer'):
        assert again[part] == scores[part]


def test_a_small_model_learns_the_new_data_set(open_plain, tmp_path):
    """It names the colours of pictures that it has not seen in words that say nothing of them."""
    s = train.parse([*TEST, '--out', str(tmp_path / 'run'), '--proxy', 'edge'])
    run = train.Run(s, torch.device('cpu'))
    run.tok.eval()
    optimizers = train.optimizers(run.umm, s.lr, s.muon_lr)
    for step in range(200):
        losses = train.umm_losses(run, step, 8, 0, 0)
        losses['loss'].backward()
        for optimizer in optimizers:
            optimizer.step()
        run.umm.zero_grad()
    figures = evaluation.understanding(run.umm, run.tok, run.world, 64, Q=1)
    assert figures['colour']['value'] > .9
    figures = evaluation.blind(run.world, 512)
    assert figures['colour']['value'] < .3


def test_drawings_of_the_new_data_set_can_be_read(open_plain, tmp_path, monkeypatch):
    """The colours are read in true pictures, and in no drawing of a model that has learned nothing."""
    s = train.parse([*TEST, '--out', str(tmp_path / 'run'), '--proxy', 'edge'])
    run = train.Run(s, torch.device('cpu'))
    monkeypatch.setattr(reader, 'Reader', partial(reader.Reader, steps=60, B=16))
    figures = reader.recognition(run.umm, run.tok.eval(), run.world, 64)
    assert figures['verifier']['value'] > .9
    assert figures['mean']['value'] < .7
