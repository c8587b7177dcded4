"""Networks against naive code, and the properties that generation rests on."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import model
from data import Sequence
from model import UMM, Config, VQTokenizer

SMALL = Config(size=16, codebook=32, n_layer=2, n_head=2, n_embd=32)
N = 16                         # codes of a picture of 16 x 16 pixels
V = 60                         # text tokens


@pytest.fixture(scope='module')
def umm():
    """Random weights everywhere: layers that begin at zero would hide mistakes."""
    torch.manual_seed(0)
    m = UMM(SMALL, V)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=.3)
    return m.eval()


def sequence(m, B=3, T=7, picture=True, codes=True, pad=True) -> Sequence:
    """Random tokens of one turn, the end of row 1 padded; with a picture and with codes, if wanted."""
    g = seeded(1)
    turn = torch.ones(B, T, dtype=torch.long)
    if pad:
        turn[1, 4:] = -1
    image = torch.rand(B, 3, 16, 16, generator=g)
    s = Sequence(torch.randint(60, (B, T), generator=g), turn)
    if picture:
        s.image = image
    if codes:
        s.codes = torch.randint(32, (B, N), generator=g)
    return s


def close(a, b, atol=1e-5) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


def change_from(place: int, x, y):
    """Are states [B, T, C] the same to the last bit before a place, and others from there on?"""
    same = torch.equal(x[:, :place], y[:, :place])
    return same and not close(x[:, place:], y[:, place:])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def code_logits(m, s: Sequence):
    """Of all places of the picture at once, without a cache, [B, N, K]."""
    x = m.hidden(s)
    return m.pixel_head(x[:, -N:])


# ---- the parts ----
def test_attention_against_a_naive_loop():
    B, H, T, D = 2, 2, 5, 4
    q, k, v = torch.randn(3, B, H, T, D, dtype=torch.double)
    seen = torch.rand(B, 1, T, T) < .7
    mask = torch.where(seen, 0., -1e4).double()
    mask[..., 0] = 0                                       # everyone sees something
    y = model.attention(q, k, v, mask)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                total, want = 0, 0
                for j in range(T):
                    product = q[b, h, i] @ k[b, h, j]
                    score = product / math.sqrt(D) + mask[b, 0, i, j]
                    weight = math.exp(score)
                    total += weight
                    want += weight * v[b, h, j]
                assert close(y[b, h, i], want / total, 1e-9)


def test_rope_depends_on_distance_only():
    torch.manual_seed(0)
    turns = model.rope_table(50, 8)
    q, k = torch.randn(2, 1, 1, 1, 1, 8)

    def dot(i, j):
        """Of q at place i and k at place j."""
        turned_q = model.rotate(q, turns[i])
        turned_k = model.rotate(k, turns[j])
        return (turned_q * turned_k).sum().item()

    want = dot(0, 7)
    assert dot(3, 10) == pytest.approx(want, abs=1e-5)
    assert dot(40, 47) == pytest.approx(want, abs=1e-5)
    assert dot(0, 8) != pytest.approx(want, abs=1e-3)
    length = model.rotate(q, turns[5]).norm().item()
    assert length == pytest.approx(q.norm().item(), abs=1e-5)


def test_text_embedding_against_naive_code(umm):
    """A token hears the three before it, of its own turn only."""
    text = torch.randint(V, (2, 9))
    turn = torch.tensor([
        [1, 1, 1, 1, 1, 2, 2, 2, -1],
        [1, 2, 2, 2, 2, 2, 2, -1, -1],
    ])
    got = umm.embed_text(text, turn)
    for b in range(2):
        for i in range(9):
            want = umm.text_embed.weight[text[b, i]].clone()
            for k in (1, 2, 3):
                before = i - k
                if before >= 0 and turn[b, before] == turn[b, i]:
                    heard = umm.text_embed.weight[text[b, before]]
                    want += umm.taps[k - 1] * heard
            assert close(got[b, i], want, 1e-6), (b, i)


def naive_norm(v):
    variance = v.var(correction=0)
    return (v - v.mean()) / (variance + 1e-5).sqrt()


def naive_turn(v, row: int, column: int):
    """v [16]: of its 8 pairs the first 4 turn by row, the others by column."""
    out = v.clone()
    for i in range(8):
        place = row if i < 4 else column
        angle = place / 10000 ** (2 * (i % 4) / 8)
        sin, cos = math.sin(angle), math.cos(angle)
        a, b = v[2 * i:2 * i + 2]
        out[2 * i] = a * cos - b * sin
        out[2 * i + 1] = a * sin + b * cos
    return out


def naive_block(block, x, x0, at):
    """LayerNorm, query-key norm, 2-D rotary positions, causal attention, squared ReLU, position by
    position; x, x0 [T, 32], at [T, 2] -> [T, 32]."""
    T, H, D = len(x), 2, 16
    queries, keys, values = [], [], []
    for i in range(T):
        qkv = block.qkv.weight @ (naive_norm(x[i]) + x0[i])
        q, k, v = qkv.view(3, H, D)
        place = at[i].tolist()
        queries.append([naive_turn(naive_norm(head), *place) for head in q])
        keys.append([naive_turn(naive_norm(head), *place) for head in k])
        values.append(v)
    out = []
    for i in range(T):
        heads = []
        for h in range(H):
            scores = []
            for j in range(i + 1):
                score = queries[i][h] @ keys[j][h]
                scores.append(score / math.sqrt(D))
            weights = torch.stack(scores).softmax(0)
            mixed = 0
            for j, weight in enumerate(weights):
                mixed = mixed + weight * values[j][h]
            heads.append(mixed)
        y = x[i] + block.proj.weight @ torch.cat(heads)
        inner = (block.up.weight @ naive_norm(y)).clamp(min=0) ** 2
        out.append(y + block.down.weight @ inner)
    return torch.stack(out)


def test_a_block_against_naive_code(umm):
    m = UMM(umm.c, V).double()
    m.load_state_dict(umm.state_dict())
    block, T = m.blocks[1], 5
    x, x0 = torch.randn(2, 1, T, 32, dtype=torch.double)
    at = torch.randint(20, (1, T, 2))
    later = torch.ones(T, T, dtype=torch.double).triu(1)
    mask = -1e4 * later[None, None]
    rope = m.rope(at).to(torch.complex128)
    got = block(x, x0, rope, mask, model.KV())
    want = naive_block(block, x[0], x0[0], at[0])
    assert close(got[0], want)


# ---- who sees whom ----
def changed(tokens, place, size: int):
    """The same tokens but for one place, or a slice of them, in every row."""
    tokens = tokens.clone()
    tokens[:, place] = (tokens[:, place] + 3) % size
    return tokens


def test_text_and_codes_are_causal(umm):
    s = sequence(umm, pad=False)
    T = s.text.shape[1]
    x = umm.hidden(s)
    text = changed(s.text, 4, 60)
    y = umm.hidden(replace(s, text=text))
    assert change_from(4, x[:, :T], y[:, :T])
    assert change_from(0, x[:, T:], y[:, T:])              # codes see all of the text
    codes = changed(s.codes, 9, 32)
    y = umm.hidden(replace(s, codes=codes))
    assert change_from(T + 10, x, y)                       # code 9 is an input from place 10 on


def test_a_code_is_predicted_without_seeing_it(umm):
    """No target leaks into its own logits: they do not depend on that code or on later ones."""
    s = sequence(umm)
    codes = changed(s.codes, slice(5, None), 32)           # from code 5 on
    a = code_logits(umm, s)
    b = code_logits(umm, replace(s, codes=codes))
    assert change_from(6, a, b)


def test_hidden_rows_do_not_see_their_codes(umm):
    s = sequence(umm)
    plain = umm.hidden(s)
    x = umm.hidden(s, hide=.7)                             # 0.7 of 3 rows, rounded down: the first two
    codes = changed(s.codes, slice(None), 32)              # all of them
    y = umm.hidden(replace(s, codes=codes), hide=.7)
    assert torch.equal(x[:2], y[:2])
    assert torch.equal(x[2], plain[2])
    T = s.text.shape[1]                                    # the first code is predicted from the text
    assert change_from(T + 1, x[2:], y[2:])
    _, loss = umm(s, hide=.6)
    _, plain_loss = umm(s)
    assert loss != plain_loss


def test_turns_do_not_see_each_other_and_all_see_the_picture(umm):
    s = sequence(umm, codes=False, pad=False)
    s.turn[:, 4:] = 2
    x = umm.hidden(s)
    text = s.text[:, 4:]
    turn = torch.ones_like(text)
    alone = umm.hidden(Sequence(text, turn, image=s.image))
    assert close(x[:, 4:], alone)
    others = s.image.flip(0)
    other = umm.hidden(replace(s, image=others))
    assert not close(x[0, 0], other[0, 0])
    assert not close(x[0, 4], other[0, 4])


def test_padding_changes_nothing(umm):
    s = sequence(umm, pad=False)
    text = F.pad(s.text, (0, 3))
    turn = F.pad(s.turn, (0, 3), value=-1)
    x = umm.hidden(s)
    y = umm.hidden(replace(s, text=text, turn=turn))
    assert close(x[:, :7], y[:, :7])
    assert close(x[:, 7:], y[:, 10:])


def test_the_picture_is_read_in_both_directions(umm):
    """The first patch's keys in layer 2 depend on the last patch."""
    s = sequence(umm, codes=False)
    image = s.image.clone()
    image[..., -1, -1] += .5                               # the last pixel
    first = []
    for x in (s.image, image):
        kvs = [model.KV() for _ in umm.blocks]
        umm.hidden(replace(s, image=x), kvs)
        first.append(kvs[1].k[:, :, 0])
    assert not close(*first)


QUESTIONS = [
    ('0 and 0?', '0'), ('1 and 0?', '1'), ('1 and 1?', '2'), ('2 and 0?', '2'), ('2 and 1?', '3'),
    ('2 and 2?', '4'), ('3 and 0?', '3'), ('3 and 1?', '4'), ('3 and 2?', '5'), ('3 and 3?', '6'),
]


def states_of_turns(umm, s: Sequence, pictures: int) -> dict:
    """{(picture, number of the turn): hidden states of its tokens}."""
    R = len(s.text) // pictures
    states = {}
    x = umm.hidden(s)
    for row, turn in enumerate(s.turn):
        for number in set(turn.tolist()) - {-1}:
            key = (row // R, number)
            assert key not in states                       # a turn is never cut in two
            mine = turn == number
            states[key] = x[row, mine]
    return states


def test_many_turns_in_several_rows_are_as_in_one(umm):
    text = data.Text.from_corpus(['how many rings?'])
    image = sequence(umm, B=2).image
    asked = [QUESTIONS, QUESTIONS[:7]]
    one = data.pack(text, asked, image, room=10**9)
    many = data.pack(text, asked, image, room=20)
    for s in (one, many):
        s.text = s.text % V                      # any tokens do
        s.target = torch.where(s.turn > 0, s.text, -1)
    assert len(one.text) == 2
    assert len(many.text) >= 8
    assert len(many.text) % 2 == 0
    assert many.text.shape[1] < one.text.shape[1] / 3      # rows of equal length: little is padding
    states = states_of_turns(umm, one, 2)
    others = states_of_turns(umm, many, 2)
    assert states.keys() == others.keys()
    assert len(states) == 10 + 7
    for key, x in states.items():
        assert close(x, others[key])
    loss, _ = umm(one)
    other_loss, _ = umm(many)
    assert close(loss, other_loss)


# ---- generation ----
def test_the_longest_prompt_and_the_worst_plan_fit(monkeypatch):
    """A plan of broken bytes is three times as long once it is read again."""
    text = data.Text.from_corpus(['a ring'])
    umm = UMM(replace(SMALL, n_layer=1), text.size)
    prompt = 'x' * (data.MAX_TEXT - data.MAX_PLAN - 1)
    assert len(text.encode(prompt)) == data.MAX_TEXT - data.MAX_PLAN
    plan = '\ufffd' * 200
    assert len(plan) == data.MAX_PLAN
    monkeypatch.setattr(model, 'write', lambda *args, **how: [plan])
    codes, _ = model.draw(umm, text, [prompt], seeded(0))
    assert codes.shape == (1, N)


@pytest.fixture
def logits(monkeypatch):
    """The logits that tokens are picked from, one [B, V or K] a step."""
    seen, pick = [], model.pick

    def watched(x, *how):
        seen.append(x)
        return pick(x, *how)

    monkeypatch.setattr(model, 'pick', watched)
    return seen


@pytest.mark.parametrize('picture', [True, False])
@pytest.mark.parametrize('cfg', [1., 2.5])
def test_cached_generation_equals_uncached(umm, picture, cfg, logits):
    s = sequence(umm, picture=picture, codes=False)
    s.codes = codes = umm.generate(s, cfg=cfg, temperature=0)
    want = code_logits(umm, s)
    if cfg != 1:
        blind = replace(s, turn=torch.full_like(s.turn, -1))
        unguided = code_logits(umm, blind)
        want = unguided + cfg * (want - unguided)
    assert close(torch.stack(logits, 1), want, 2e-4)
    assert torch.equal(codes, want.argmax(-1))


def test_cached_answers_equal_uncached(umm, logits):
    s = sequence(umm, codes=False, pad=False)
    tokens = umm.generate(s, first=58, stop=-1, length=6, temperature=0)
    assert tokens.shape == (3, 6)
    opens = torch.full((3, 1), 58)
    told = tokens[:, :-1]
    text = torch.cat([s.text, opens, told], 1)
    turn = torch.ones_like(text)
    x = umm.hidden(Sequence(text, turn, image=s.image))
    want = umm.text_head(x[:, -6:])
    assert close(torch.stack(logits, 1), want, 2e-4)


def test_sampling_is_seeded_and_greedy_when_cold(umm):
    s = sequence(umm, codes=False)

    def drawn(seed, **how):
        return umm.generate(s, generator=seeded(seed), **how)

    codes = drawn(0)
    assert torch.equal(codes, drawn(0))
    assert not torch.equal(codes, drawn(1))
    likeliest = drawn(1, temperature=0)
    assert torch.equal(drawn(0, temperature=.001), likeliest)


def test_what_was_generated_can_be_trained_on(umm):
    s = sequence(umm, codes=False)
    s.codes = umm.generate(s, generator=seeded(0))
    _, loss = umm(s)
    loss.backward()
    assert umm.code_embed.weight.grad.abs().sum() > 0


def test_draw_continues_the_prompt_and_its_plan(umm, monkeypatch):
    """The codes are those of [prompt][plan][codes], laid out as in training."""
    text = data.Text(data.BYTES)
    torch.manual_seed(0)
    m = UMM(umm.c, text.size)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=.3)
    prompts, planned = ['x', 'yy'], ['a ring', 'two red squares']
    monkeypatch.setattr(model, 'write', lambda *args, **how: planned)
    codes, plans = model.draw(m, text, prompts, temperature=0)
    assert plans == planned
    s = data.pack(text, [[turn] for turn in zip(prompts, planned)])
    assert torch.equal(codes, m.generate(s, temperature=0))
    s.codes = codes
    assert torch.equal(codes, code_logits(m, s).argmax(-1))


# ---- losses ----
def test_losses_are_per_head_means_and_start_at_ln_of_the_vocabulary():
    m = UMM(SMALL, V)
    s = sequence(m)
    s.target = torch.full_like(s.text, -1)
    s.target[:, 2] = 5
    text, pixel = m(s)
    assert close(text, torch.tensor(60.).log())
    assert close(pixel, torch.tensor(32.).log())
    s.target[:] = -1
    s.codes = None
    assert m(s) == (None, None)


def test_loss_against_naive_cross_entropy(umm):
    s = sequence(umm)
    s.target = torch.full_like(s.text, -1)
    s.target[0, 1] = 7
    s.target[2, 5] = 9
    text, pixel = umm(s)
    x = umm.hidden(s)
    logp = umm.text_head(x).log_softmax(-1)
    want = logp[0, 1, 7] + logp[2, 5, 9]
    assert close(text, -want / 2)
    logp = code_logits(umm, s).log_softmax(-1)
    total = 0
    for b in range(3):
        for i in range(N):
            code = s.codes[b, i]
            total += logp[b, i, code]
    assert close(pixel, -total / (3 * N))


def test_gradients_against_finite_differences(umm, monkeypatch):
    """Of all parameters, in double precision, along a random direction each."""
    m = UMM(umm.c, V).double()
    m.load_state_dict(umm.state_dict())
    for p in m.parameters():
        p.data *= .5                                       # keeps the third derivative small
    monkeypatch.setattr(torch.Tensor, 'float', lambda x: x)              # losses stay double
    s = sequence(m, B=2)
    s.image = s.image.double()
    s.target = torch.full_like(s.text, -1)
    s.target[0, 1] = 7
    s.target[1, 3] = 9

    def loss():
        text, pixel = m(s, hide=.5)
        return text + pixel

    @torch.no_grad()
    def loss_after(p, move):
        """With the parameter moved; it is moved back."""
        p += move
        value = loss().item()
        p -= move
        return value

    loss().backward()
    g, eps, checked = seeded(0), 1e-6, 0
    for name, p in m.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=torch.double)
        want = (p.grad * direction).sum().item()
        above = loss_after(p, eps * direction)
        below = loss_after(p, -eps * direction)
        slope = (above - below) / (2 * eps)
        assert slope == pytest.approx(want, rel=1e-5, abs=1e-7), name
        checked += 1
    assert checked >= 14


# ---- the tokenizer ----
def test_tokenizer_round_trip_shapes_and_straight_through():
    tok = VQTokenizer(replace(SMALL, codebook=64, vq_width=16, vq_depth=1))
    x = torch.rand(3, 3, 16, 16)
    y, codes, _ = tok(x)
    assert y.shape == x.shape
    assert codes.shape == (3, 4, 4)
    assert codes.min() >= 0
    assert codes.max() < 64
    y.sum().backward()
    assert tok.encoder[1].weight.grad.abs().sum() > 0      # the gradient passes through the codes
    tok.eval()
    codes = tok.encode(x)
    assert codes.shape == (3, N)
    y, _, _ = tok(x)
    assert close(tok.decode(codes), y.clamp(0, 1), 1e-6)


def test_commitment_moves_the_encoder_never_the_codebook():
    torch.manual_seed(0)
    vq = model.VectorQuantizer(16, 4).eval()
    z = torch.randn(2, 3, 3, 4, requires_grad=True)
    book = vq.codebook.clone()
    _, codes, commitment = vq(z)
    commitment.backward()
    assert z.grad.abs().sum() > 0
    assert torch.equal(book, vq.codebook)
    assert not list(vq.parameters())
    moved = z - .1 * z.grad
    nearer = F.normalize(moved, dim=-1)
    assert F.mse_loss(nearer, vq.codebook[codes]) < commitment


def test_codebook_moving_average_against_naive(monkeypatch):
    monkeypatch.setattr(model, 'DECAY', .9)
    monkeypatch.setattr(model, 'DEAD', 0.)
    vq = model.VectorQuantizer(4, 2)
    z = F.normalize(torch.randn(1, 2, 3, 2), dim=-1)
    count = vq.count.clone()
    total = vq.total.clone()
    _, codes, _ = vq(z)
    for k in range(4):
        mine = z[codes == k]
        count[k] = .9 * count[k] + .1 * len(mine)
        total[k] = .9 * total[k] + .1 * mine.sum(0)
    assert torch.allclose(vq.count, count)
    assert close(vq.total, total, 1e-6)
    assert close(vq.codebook, F.normalize(total, dim=-1), 1e-6)


def test_dead_codes_come_back():
    torch.manual_seed(0)
    vq = model.VectorQuantizer(32, 4)
    corner = torch.tensor([1., 0, 0, 0])                   # all codes begin there
    near = corner + .01 * torch.randn(32, 4)
    vq.codebook.copy_(F.normalize(near, dim=-1))
    vq.total.copy_(vq.codebook)
    z = torch.randn(8, 4, 4, 4)
    for _ in range(400):
        _, codes, _ = vq(z)
    assert len(codes.unique()) > 20
