"""Networks against naive code, and the properties that generation rests on."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import data
import model
from data import Sequence
from model import Config, UMM, VQTokenizer


@pytest.fixture(scope='module', params=['patch', 'code'])
def umm(request):
    torch.manual_seed(0)
    m = UMM(
        Config(size=16, codebook=32, vocab=60, n_layer=2, n_head=2, n_embd=32, image_input=request.param)
    )
    for p in m.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(p, std=0.3)
    return m.eval()


def sequence(m, B=3, T=7, picture=True, codes=True, pad=True):
    g = torch.Generator().manual_seed(1)
    turn = torch.ones(B, T, dtype=torch.long)
    if pad:
        turn[1, 4:] = -1
    image = torch.rand(B, 3, 16, 16, generator=g)
    if m.c.image_input == 'code':
        image = torch.randint(32, (B, 16), generator=g)
    return Sequence(
        torch.randint(60, (B, T), generator=g),
        turn,
        image=image if picture else None,
        codes=torch.randint(32, (B, 16), generator=g) if codes else None,
    )


def test_attention_against_a_naive_loop():
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.double).unbind()
    mask = torch.where(torch.rand(2, 1, 5, 5) < 0.7, 0.0, -1e4).double()
    mask[..., 0] = 0
    y = model.attention(q, k, v, mask)
    for b in range(2):
        for h in range(2):
            for i in range(5):
                w = [math.exp(sum(q[b, h, i] * k[b, h, j]) / 2 + mask[b, 0, i, j]) for j in range(5)]
                want = sum(w[j] / sum(w) * v[b, h, j] for j in range(5))
                assert torch.allclose(y[b, h, i], want, atol=1e-9)


def test_rope_depends_on_distance_only():
    turns = model.rope_table(50, 8)
    q, k = torch.randn(2, 1, 1, 1, 1, 8).unbind()
    at = lambda x, i: model.rotate(x, turns[i])
    dots = [(at(q, i) * at(k, i + 7)).sum().item() for i in (0, 3, 40)]
    assert dots == pytest.approx([dots[0]] * 3, abs=1e-5)
    assert at(q, 5).norm().item() == pytest.approx(q.norm().item(), abs=1e-5)


def test_text_and_codes_are_causal(umm):
    s = sequence(umm, pad=False)
    x = umm.hidden(s)
    text, codes = s.text.clone(), s.codes.clone()
    text[:, 4], codes[:, 9] = (text[:, 4] + 1) % 60, (codes[:, 9] + 1) % 32
    y = umm.hidden(Sequence(text, s.turn, image=s.image, codes=s.codes))
    assert torch.equal(x[:, :4], y[:, :4]) and not torch.allclose(x[:, 4:], y[:, 4:])
    z = umm.hidden(Sequence(s.text, s.turn, image=s.image, codes=codes))
    assert torch.equal(x[:, : 7 + 10], z[:, : 7 + 10])  # code 9 is an input from position 10 on
    assert not torch.allclose(x[:, 7 + 10 :], z[:, 7 + 10 :])


def test_a_code_is_predicted_without_seeing_it(umm):
    """No target leaks into its own logits: they do not depend on that code or on later ones."""
    s = sequence(umm)
    a = umm.pixel_head(umm.hidden(s)[:, -16:])
    codes = s.codes.clone()
    codes[:, 5:] = (codes[:, 5:] + 3) % 32
    b = umm.pixel_head(umm.hidden(Sequence(s.text, s.turn, image=s.image, codes=codes))[:, -16:])
    assert torch.equal(a[:, :6], b[:, :6])


def test_hidden_rows_do_not_see_their_codes(umm):
    s = sequence(umm)
    x, plain = umm.hidden(s, hide=0.6), umm.hidden(s)
    codes = (s.codes + 5) % 32
    y = umm.hidden(Sequence(s.text, s.turn, image=s.image, codes=codes), hide=0.6)
    assert torch.equal(x[:2], y[:2])  # 0.6 of 3 rows, rounded: the first two
    assert torch.equal(x[2], plain[2]) and not torch.allclose(x[2, -15:], y[2, -15:])
    assert umm(s, hide=0.6)[1] != umm(s)[1]


def test_many_turns_in_several_rows_are_as_in_one(umm):
    text, image = data.Text.from_corpus(['how many rings?']), sequence(umm, B=2).image
    asked = [(f'{k} and {j}?', str(k + j)) for k in range(4) for j in range(k + 1)]
    one = data.pack(text, [asked, asked[:7]], image, room=10**9)
    many = data.pack(text, [asked, asked[:7]], image, room=20)
    assert len(one.text) == 2 and len(many.text) >= 8 and len(many.text) % 2 == 0
    assert many.text.shape[1] < one.text.shape[1] / 3  # of rows of equal length, so little is padding
    states = {}
    for s in (one, many):
        s.text = s.text % umm.c.vocab
        rows = umm.hidden(s)
        for b, (turns, x) in enumerate(zip(s.turn, rows)):
            picture = b * 2 // len(s.text)
            for k in set(turns.tolist()) - {-1}:
                assert (s is one, picture, k) not in states  # a turn is never cut in two
                states[s is one, picture, k] = x[turns == k]
    assert len(states) == 2 * (10 + 7)
    for (first, picture, k), x in states.items():
        assert torch.allclose(x, states[not first, picture, k], atol=1e-5)
    for s in (one, many):
        s.target = torch.where(s.turn > 0, s.text, -1)
    assert torch.allclose(umm(one)[0], umm(many)[0], atol=1e-5)


def test_the_longest_prompt_and_the_worst_plan_fit(monkeypatch):
    """A plan of broken bytes is three times as long once it is read again."""
    text = data.Text.from_corpus(['a ring'])
    umm = UMM(Config(size=16, codebook=32, vocab=text.size, n_layer=1, n_head=2, n_embd=32))
    prompt = 'x' * (data.MAX_TEXT - data.MAX_PLAN - 1)
    assert len(text.encode(prompt)) == data.MAX_TEXT - data.MAX_PLAN
    monkeypatch.setattr(model, 'write', lambda *a, **how: ['\ufffd' * data.MAX_PLAN])
    codes, _ = model.draw(umm, text, [prompt], torch.Generator().manual_seed(0))
    assert codes.shape == (1, 16)


def test_turns_do_not_see_each_other_and_all_see_the_picture(umm):
    s = sequence(umm, codes=False, pad=False)
    s.turn[:, 4:] = 2
    x = umm.hidden(s)
    alone = umm.hidden(Sequence(s.text[:, 4:], torch.ones(3, 3, dtype=torch.long), image=s.image))
    assert torch.allclose(x[:, 4:], alone, atol=1e-5)
    other = umm.hidden(Sequence(s.text, s.turn, image=s.image.flip(0)))
    assert not torch.allclose(x[0, 0], other[0, 0]) and not torch.allclose(x[0, 4], other[0, 4])


def test_padding_changes_nothing(umm):
    s = sequence(umm, pad=False)
    padded = Sequence(
        F.pad(s.text, (0, 3)), F.pad(s.turn, (0, 3), value=-1), image=s.image, codes=s.codes
    )
    x, y = umm.hidden(s), umm.hidden(padded)
    assert torch.allclose(x[:, :7], y[:, :7], atol=1e-5) and torch.allclose(
        x[:, 7:], y[:, 10:], atol=1e-5
    )


def test_the_picture_is_read_in_both_directions(umm):
    """The first patch's keys in layer 2 depend on the last patch."""
    s = sequence(umm, codes=False)
    kvs = [[model.KV() for _ in umm.blocks] for _ in range(2)]
    umm.hidden(s, kvs[0])
    image = s.image.clone()
    image[..., -1] = (image[..., -1] + 1) % 32 if umm.c.image_input == 'code' else 1 - image[..., -1]
    umm.hidden(Sequence(s.text, s.turn, image=image), kvs[1])
    assert not torch.allclose(kvs[0][1].k[:, :, 0], kvs[1][1].k[:, :, 0])


@pytest.fixture
def logits(monkeypatch):
    """The logits that tokens are picked from, one [B, V or K] a step."""
    seen, pick = [], model.pick
    monkeypatch.setattr(model, 'pick', lambda x, *a: (seen.append(x), pick(x, *a))[1])
    return seen


@pytest.mark.parametrize('picture', [True, False])
@pytest.mark.parametrize('cfg', [1.0, 2.5])
def test_cached_generation_equals_uncached(umm, picture, cfg, logits):
    s = sequence(umm, picture=picture, codes=False)
    codes = umm.generate(s, cfg=cfg, temperature=0)
    full = Sequence(s.text, s.turn, image=s.image, codes=codes)
    want = umm.pixel_head(umm.hidden(full)[:, -16:])
    if cfg != 1:
        full.turn = torch.full_like(s.turn, -1)
        u = umm.pixel_head(umm.hidden(full)[:, -16:])
        want = u + cfg * (want - u)
    assert torch.allclose(torch.stack(logits, 1), want, atol=2e-4) and torch.equal(
        codes, want.argmax(-1)
    )


def test_cached_answers_equal_uncached(umm, logits):
    s = sequence(umm, codes=False, pad=False)
    tokens = umm.generate(s, first=58, stop=-1, length=6, temperature=0)
    text = torch.cat([s.text, torch.full((3, 1), 58), tokens[:, :-1]], 1)
    x = umm.hidden(Sequence(text, torch.ones_like(text), image=s.image))
    assert torch.allclose(torch.stack(logits, 1), umm.text_head(x[:, -6:]), atol=2e-4)


def test_sampling_is_seeded_and_top_k_limits(umm):
    s = sequence(umm, codes=False)
    draw = lambda seed, **k: umm.generate(s, generator=torch.Generator().manual_seed(seed), **k)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), umm.generate(s, temperature=0))


def test_draw_continues_the_prompt_and_its_plan(umm, monkeypatch):
    """The codes are those of [prompt][plan][codes], laid out as in training."""
    text = data.Text([bytes([i]) for i in range(256)])
    m = UMM(dataclasses.replace(umm.c, vocab=text.size))
    monkeypatch.setattr(model, 'write', lambda *_, **__: ['a ring', 'two red squares'])
    codes, plans = model.draw(m, text, ['x', 'yy'], temperature=0)
    s = data.pack(text, [[('x', 'a ring')], [('yy', 'two red squares')]])
    assert torch.equal(codes, m.generate(s, temperature=0)) and plans == ['a ring', 'two red squares']
    s.codes = codes
    assert torch.equal(codes, m.pixel_head(m.hidden(s)[:, -codes.shape[1] :]).argmax(-1))


def test_losses_are_per_head_means_and_start_at_ln_of_the_vocabulary():
    m = UMM(Config(size=16, codebook=32, vocab=60, n_layer=1, n_head=2, n_embd=32))
    s = sequence(m)
    s.target = torch.full_like(s.text, -1)
    s.target[:, 2] = 5
    text, pixel = m(s)
    assert text.item() == pytest.approx(math.log(60), abs=1e-5)
    assert pixel.item() == pytest.approx(math.log(32), abs=1e-5)
    s.target[:] = -1
    s.codes = None
    assert m(s) == (None, None)


def test_loss_against_naive_cross_entropy(umm):
    s = sequence(umm)
    s.target = torch.full_like(s.text, -1)
    s.target[0, 1], s.target[2, 5] = 7, 9
    text, pixel = umm(s)
    x = umm.hidden(s)
    logp = umm.text_head(x).log_softmax(-1)
    assert text.item() == pytest.approx(-(logp[0, 1, 7] + logp[2, 5, 9]).item() / 2, abs=1e-5)
    logp = umm.pixel_head(x[:, -16:]).log_softmax(-1)
    want = -sum(logp[b, i, s.codes[b, i]] for b in range(3) for i in range(16)) / 48
    assert pixel.item() == pytest.approx(want.item(), abs=1e-5)


def test_text_embedding_against_naive_code(umm):
    """A token hears the three before it, of its own turn only."""
    text, turn = (
        torch.randint(umm.c.vocab, (2, 9)),
        torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, -1], [1, 2, 2, 2, 2, 2, 2, -1, -1]]),
    )
    got = umm.embed_text(text, turn)
    for b in range(2):
        for i in range(9):
            want = umm.text_embed.weight[text[b, i]].clone()
            for k in (1, 2, 3):
                if i >= k and turn[b, i - k] == turn[b, i]:
                    want += umm.taps[k - 1] * umm.text_embed.weight[text[b, i - k]]
            assert torch.allclose(got[b, i], want, atol=1e-6), (b, i)


def test_a_block_against_naive_code(umm):
    """LayerNorm, query-key norm, 2-D rotary positions, attention, squared ReLU, by position."""
    block, C, H = umm.blocks[1].double(), 32, 2
    x, at = torch.randn(1, 5, C, dtype=torch.double), torch.randint(20, (1, 5, 2))
    mask = torch.full((5, 5), -1e4, dtype=torch.double).triu(1)[None, None]
    x0 = torch.randn(1, 5, C, dtype=torch.double)
    got = block(x, x0, umm.rope(at).to(torch.complex128), mask, model.KV())
    norm = lambda v: (v - v.mean()) / (v.var(correction=0) + 1e-5) ** 0.5

    def turned(v, row, col):  # D = 16, 8 pairs: the first 4 turn by row, the others by column
        out = v.clone()
        for i in range(8):
            angle = (row if i < 4 else col) / 10000 ** (2 * (i % 4) / 8)
            out[2 * i] = v[2 * i] * math.cos(angle) - v[2 * i + 1] * math.sin(angle)
            out[2 * i + 1] = v[2 * i] * math.sin(angle) + v[2 * i + 1] * math.cos(angle)
        return out

    heads = []
    for i in range(5):
        q, k, v = (block.qkv.weight @ (norm(x[0, i]) + x0[0, i])).view(3, H, C // H)
        place = at[0, i].tolist()
        heads.append([[turned(norm(q[h]), *place), turned(norm(k[h]), *place), v[h]] for h in range(H)])
    for i in range(5):
        y = []
        for h in range(H):
            scores = torch.stack([heads[i][h][0] @ heads[j][h][1] / 4 for j in range(i + 1)])
            y.append(sum(w * heads[j][h][2] for j, w in enumerate(scores.softmax(0))))
        z = x[0, i] + block.proj.weight @ torch.cat(y)
        z = z + block.down.weight @ (block.up.weight @ norm(z)).clamp(min=0) ** 2
        assert torch.allclose(got[0, i], z, atol=1e-5), i
    block.float()


def test_gradients_against_finite_differences(umm, monkeypatch):
    m = UMM(umm.c).double()
    m.load_state_dict(umm.state_dict())
    for p in m.parameters():
        p.data *= 0.5  # keeps the third derivative small
    monkeypatch.setattr(torch.Tensor, 'float', lambda x: x)  # the losses are taken in float32 otherwise
    s = sequence(m, B=2)
    s.image = s.image if m.c.image_input == 'code' else s.image.double()
    s.target = torch.full_like(s.text, -1)
    s.target[0, 1], s.target[1, 3] = 7, 9
    loss = lambda: sum(m(s, hide=0.5))
    loss().backward()
    g, checked = torch.Generator().manual_seed(0), 0
    for name, p in m.named_parameters():
        if p.grad is None:
            continue
        direction = torch.randn(p.shape, generator=g, dtype=torch.double)
        want, eps = (p.grad * direction).sum().item(), 1e-6
        with torch.no_grad():
            p += eps * direction
            up = loss().item()
            p -= 2 * eps * direction
            down = loss().item()
            p += eps * direction
        assert (up - down) / 2 / eps == pytest.approx(want, rel=1e-5, abs=1e-7), name
        checked += 1
    assert checked >= 14


# --- tokenizer


@pytest.mark.parametrize('quantizer', ['vq', 'fsq'])
def test_tokenizer_round_trip_shapes_and_straight_through(quantizer):
    tok = VQTokenizer(Config(size=16, codebook=64, vq_width=16, vq_depth=1, quantizer=quantizer))
    x = torch.rand(3, 3, 16, 16)
    y, codes, commitment = tok(x)
    assert y.shape == x.shape and codes.shape == (3, 4, 4) and 0 <= codes.min() and codes.max() < 64
    y.sum().backward()
    assert tok.encoder[1].weight.grad.abs().sum() > 0  # the gradient passes through the codes
    tok.eval()
    codes = tok.encode(x)
    assert codes.shape == (3, 16) and torch.allclose(tok.decode(codes), tok(x)[0].clamp(0, 1), atol=1e-6)


def test_fsq_codes_name_their_own_vectors():
    fsq = model.FiniteScalarQuantizer(64)
    z = torch.atanh(fsq.codebook.clamp(-0.999, 0.999)).view(8, 8, 1, -1)
    assert torch.equal(fsq(z)[1].flatten(), torch.arange(64))


def test_commitment_moves_the_encoder_never_the_codebook():
    vq = model.VectorQuantizer(16, 4)
    z = torch.randn(2, 3, 3, 4, requires_grad=True)
    book = vq.codebook.clone()
    vq.eval()
    e, codes, commitment = vq(z)
    commitment.backward()
    assert z.grad.abs().sum() > 0 and torch.equal(book, vq.codebook) and not list(vq.parameters())
    step = F.normalize(z - 0.1 * z.grad, dim=-1)
    assert F.mse_loss(step, vq.codebook[codes]) < commitment


def test_codebook_moving_average_against_naive():
    vq = model.VectorQuantizer(4, 2, decay=0.9, dead=0.0)
    z = F.normalize(torch.randn(1, 2, 3, 2), dim=-1)
    count, total = vq.count.clone(), vq.total.clone()
    codes = vq(z)[1].flatten()
    for k in range(4):
        mine = z.view(-1, 2)[codes == k]
        count[k] = 0.9 * count[k] + 0.1 * len(mine)
        total[k] = 0.9 * total[k] + 0.1 * mine.sum(0)
    assert torch.allclose(vq.count, count) and torch.allclose(vq.total, total, atol=1e-6)
    assert torch.allclose(vq.codebook, F.normalize(total, dim=-1), atol=1e-6)


def test_dead_codes_come_back():
    torch.manual_seed(0)
    vq = model.VectorQuantizer(32, 4)
    vq.codebook[:] = F.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(32, 4), dim=-1)
    vq.total.copy_(vq.codebook)
    z = torch.randn(8, 4, 4, 4)
    for _ in range(400):
        codes = vq(z)[1]
    assert len(codes.unique()) > 20
