"""Speed against peers on equal work, alternating runs in one process: median ratio of wall and CPU time.

    pip install -r experiments/requirements-bench.txt
    python -m experiments.bench [--quick] [--json FILE] [--nanogpt DIR]

Equal work: width 256, 6 layers, 8 heads, vocabulary 2048, 320 tokens (64 of text, 256 of a picture),
batch 4, float32. A ratio above 1: nanoUMM needs less time. A peer that is not installed is left out with
a line. nanoGPT is no package: name a clone of it. FLOPs are counted, by flops() for all; the peak
is measured, not looked up.
"""
import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
import timeit

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Sequence, UserError
from experiments.report import table
from model import Config, UMM, VQTokenizer

V, T, B, LAYERS, HEADS, WIDTH = 2048, 320, 4, 6, 8, 256


# ---- measuring ----
def flops(work) -> float:
    """Floating-point operations of work() in matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as count:
        work()
    return count.get_total_flops()


def peak(dtype, shape=(1024, 1024, 1024)) -> float:
    """Measured FLOP/s, best of 9, of a matrix product [n, k] @ [k, m], shape (n, k, m)."""
    n, k, m = shape
    a = torch.ones(n, k, dtype=dtype)
    b = torch.ones(k, m, dtype=dtype)
    seconds = min(timeit.repeat(lambda: a @ b, number=1, repeat=9))
    return 2 * n * k * m / seconds


def kept(loss) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, shared storage once."""
    sizes = {}

    def keep(t):
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = loss()                        # alive until counted, or its storage would be used again
    total = sum(sizes.values())
    del held
    return total


def alternate(runs: dict, rounds: int) -> dict:
    """{name: function} -> {name: [(wall, CPU) seconds of each round]}; one warm-up, then by turns."""
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if i > 0:
                times[name].append((wall, cpu))
    return times


def median_wall(times: list) -> float:
    return statistics.median(wall for wall, _ in times)


def seconds(run, rounds: int) -> float:
    """Median wall time of one function."""
    return median_wall(alternate({'run': run}, rounds)['run'])


def spread(ratios: list) -> str:
    """Median (least-largest)."""
    return f'{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})'


class Report:
    """Rows of a Markdown table and a flat {name: median ratio}."""

    def __init__(self):
        self.rows, self.ratios = [], {}

    def add(self, what: str, times: dict, unit: str, amount: float):
        """times: as from alternate, nanoUMM first; amount of `unit` in one run."""
        ours = times['nanoUMM']
        for name, theirs in times.items():
            rate = f'{amount / median_wall(theirs):,.0f} {unit}/s'
            row = [what, name, rate, '1', '1']
            if name != 'nanoUMM':
                wall = [t[0] / o[0] for t, o in zip(theirs, ours)]
                cpu = [t[1] / o[1] for t, o in zip(theirs, ours)]
                row = [what, name, rate, spread(wall), spread(cpu)]
                self.ratios[f'{what}: {name}'] = statistics.median(wall)
            self.rows.append(row)
            print(' | '.join(row), flush=True)

    def note(self, what: str, value: str, number=None):
        self.rows.append([what, '', value, '', ''])
        if number is not None:
            self.ratios[what] = number
        print(f'{what}: {value}', flush=True)

    def table(self) -> str:
        return table(('work', 'who', 'rate', 'wall: theirs / ours', 'CPU: theirs / ours'), self.rows)


@contextlib.contextmanager
def peer(name: str):
    """What follows needs the peer: without it, one line."""
    try:
        yield
    except ImportError as e:
        print(f'{name} left out: {e}')


# ---- training ----
def adam(model) -> list:
    return [torch.optim.AdamW(model.parameters(), 3e-4, fused=True)]


def stepper(loss_of, opts):
    """One step: forward, backward, clip, optimizers."""
    parameters = []
    for optimizer in opts:
        for group in optimizer.param_groups:
            parameters += group['params']

    def step():
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()

    return step


def llama(c: Config):
    """transformers' Llama, as large as a UMM of that Config."""
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=c.n_embd, intermediate_size=round(8 / 3 * c.n_embd / 16) * 16,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
        max_position_embeddings=2 * T, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, attn_implementation='sdpa'))


def x_transformer(c: Config, length: int):
    """The same of x-transformers."""
    from x_transformers import Decoder, TransformerWrapper
    layers = Decoder(
        dim=c.n_embd, depth=c.n_layer, heads=c.n_head, attn_dim_head=c.n_embd // c.n_head,
        rotary_pos_emb=True, attn_flash=True)
    return TransformerWrapper(num_tokens=V, max_seq_len=length, attn_layers=layers)


def nanogpt(c: Config, length: int, folder: str):
    """The same of a clone of nanoGPT."""
    if not folder:
        raise ImportError('name a clone with --nanogpt')
    spec = importlib.util.spec_from_file_location('nanogpt', f'{folder}/model.py')       # not ours
    gpt = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt'] = gpt
    spec.loader.exec_module(gpt)
    return gpt.GPT(gpt.GPTConfig(
        block_size=length, vocab_size=V, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
        dropout=0., bias=False))


def training(report: Report, rounds: int, a, what: str, c: Config, batch: int, length: int):
    """A step on sequences of that many tokens, all predicted; in bfloat16 too, where that is not
    emulated."""
    ids = torch.randint(V, (batch, length + 1))
    x = ids[:, :-1].contiguous()
    y = ids[:, 1:].contiguous()
    s = Sequence(x, torch.ones_like(x), y)
    runs = {}

    def add(name, loss, opts):
        runs[name] = stepper(loss, opts)
        if a.bf16:
            half = torch.autocast('cpu', torch.bfloat16)
            runs[f'{name}, bf16'] = stepper(half(loss), opts)

    def cross_entropy(logits):
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    umm, with_muon = UMM(c, V), UMM(c, V)
    add('nanoUMM', lambda: umm(s)[0], adam(umm))               # equal work
    add('nanoUMM, Muon', lambda: with_muon(s)[0], train.optimizers(with_muon, 2e-3, .02))
    with peer('transformers'):
        body = llama(c)
        add('transformers Llama', lambda: cross_entropy(body(x).logits), adam(body))
    with peer('x-transformers'):
        wrapped = x_transformer(c, length)
        add('x-transformers', lambda: cross_entropy(wrapped(x)), adam(wrapped))
    with peer('nanoGPT'):
        net = nanogpt(c, length, a.nanogpt)
        add('nanoGPT', lambda: net(x, y)[1], [net.configure_optimizers(.1, 3e-4, (.9, .95), 'cpu')])
    times = alternate(runs, rounds)
    report.add(what, times, 'tokens', batch * length)
    best = peak(torch.float32, (batch * length, c.n_embd, 4 * c.n_embd))
    achieved = flops(lambda: umm(s)[0].backward()) / median_wall(times['nanoUMM'])
    share = achieved / best
    report.note(f'{what}: MFU', f'{share:.0%} of {best / 1e9:.0f} GFLOP/s, float32', share)


def main_job(report: Report, rounds: int, folder='out/bench'):
    """A post-training step of the cpu preset, the share of its data, scenes a second."""
    s = train.parse(['--preset', 'cpu', '--out', folder, '--overwrite'])
    run = train.Run(s, torch.device('cpu'))
    run.tok.eval().requires_grad_(False)
    world, maps = run.world, train.maps_a_step(run)
    opts = train.optimizers(run.umm, s.lr, s.muon_lr)
    index = 0                                                  # of the batch: another one every time

    def draw_data():
        nonlocal index
        index += 1
        world.questions('train', index, s.post_ask, s.questions)
        world.drawings('train', index, s.post_draw)
        world.maps_to_draw('train', index, maps, s.proxy)

    def loss(part):
        nonlocal index
        index += 1
        losses = train.umm_losses(run, index, s.post_ask, s.post_draw, maps, s.w_text, s.w_draw, part)
        return losses['loss']

    runs = {
        'step': stepper(lambda: loss('first'), opts),
        'late': stepper(lambda: loss('finding'), opts),
        'data': draw_data,
    }
    spent = {name: median_wall(times) for name, times in alternate(runs, rounds).items()}
    for name, what in (('step', 'post-training'), ('late', 'with late questions')):
        steps = 1 / spent[name]
        report.note(f'cpu preset, {what}', f'{steps:.2f} steps/s', steps)
    share = spent['data'] / spent['step']
    report.note('cpu preset, share of the data in a step', f'{share:.1%}', share)
    rate = 512 / seconds(lambda: world.scenes('train', 'bench', 0, 512), rounds)
    report.note('scenes rendered', f'{rate:,.0f} scenes/s at 32 x 32', rate)


# ---- generation ----
def janus():
    """The one unified model of the same kind that pip can install, as small as ours: Janus (Wu et al.
    2024), 256 image tokens by its own guided loop. Its vision tower is not used here."""
    from transformers import (JanusConfig, JanusForConditionalGeneration, JanusVisionConfig,
                              JanusVQVAEConfig, LlamaConfig)
    text = LlamaConfig(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=2 * T, bos_token_id=0, pad_token_id=1)
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=4,
        num_image_tokens=256, projection_dim=WIDTH)
    vq = JanusVQVAEConfig(
        num_embeddings=V, base_channels=32, channel_multiplier=[1], num_res_blocks=1,
        latent_channels=32, projection_dim=WIDTH, image_token_embed_dim=WIDTH)
    net = JanusForConditionalGeneration(JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=V - 1)).eval()
    net.generation_config.generation_kwargs = {'boi_token_id': 2}
    return lambda x: net.generate(x, attention_mask=torch.ones_like(x), generation_mode='image',
                                  do_sample=True, guidance_scale=3., bos_token_id=0, pad_token_id=1)


def large() -> Config:
    return Config(codebook=V, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, size=64)


def generation(report: Report, rounds: int):
    """256 codes after 64 text tokens, with a cache, sampled."""
    c = large()
    umm = UMM(c, V).eval()
    for batch in (1, 16):
        x = torch.randint(V, (batch, T - 256))
        ones = torch.ones_like(x)
        s = Sequence(x, ones)
        what, tokens = f'generation, batch {batch}', batch * 256
        runs = {'nanoUMM': lambda: umm.generate(s)}
        with peer('transformers'):
            body = llama(c).eval()
            how = dict(max_new_tokens=256, min_new_tokens=256, do_sample=True, temperature=1., top_k=0,
                       use_cache=True)
            runs['transformers generate()'] = lambda: body.generate(x, attention_mask=ones, **how)
        report.add(what, alternate(runs, rounds), 'tokens', tokens)
        runs = {'off': lambda: umm.generate(s), 'on': lambda: umm.generate(s, cfg=3.)}
        times = alternate(runs, rounds)
        cost = statistics.median(on[0] / off[0] for on, off in zip(times['on'], times['off']))
        report.note(f'{what}: guidance', f'{cost:.2f} times as long', cost)
        with peer('transformers (Janus)'):
            theirs = janus()
            runs = {'nanoUMM': lambda: umm.generate(s, cfg=3.), 'tiny Janus': lambda: theirs(x)}
            report.add(f'generation, guided, batch {batch}', alternate(runs, rounds), 'tokens', tokens)


# ---- tokenizer ----
def their_quantizer(c: Config) -> torch.nn.Module:
    """vector-quantize-pytorch's quantizer in the place of ours."""
    from vector_quantize_pytorch import VectorQuantize

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vq = VectorQuantize(
                dim=c.code_dim, codebook_size=c.codebook, decay=.98, use_cosine_sim=True,
                threshold_ema_dead_code=.03, commitment_weight=1.)
            self.codebook = torch.zeros(c.codebook, c.code_dim)

        def forward(self, z):
            e, codes, loss = self.vq(z.flatten(1, 2))
            return e.view_as(z), codes.view(z.shape[:3]), loss

    return Theirs()


def tokenizer(report: Report, rounds: int):
    """Training step and round trip of 64 pictures of 32 x 32, the quantizer ours or the library's."""
    c, x = Config(), torch.rand(64, 3, 32, 32)
    runs, trips = {}, {}

    def add(name, tok):
        def loss():
            y, _, commitment = tok(x)
            return F.mse_loss(y, x) + .25 * commitment

        @torch.no_grad()
        def trip():
            tok(x)

        tok.to(memory_format=torch.channels_last)
        runs[name] = stepper(loss, [torch.optim.AdamW(tok.parameters(), 1e-3, fused=True)])
        trips[name] = trip

    add('nanoUMM', VQTokenizer(c))
    with peer('vector-quantize-pytorch'):
        theirs = VQTokenizer(c)
        theirs.quantizer = their_quantizer(c)
        add('vector-quantize-pytorch', theirs)
    report.add('tokenizer, training step', alternate(runs, rounds), 'pictures', len(x))
    report.add('tokenizer, there and back', alternate(trips, rounds), 'pictures', len(x))


# ---- growth ----
GROWTH = {
    'T': (128, 256, 512),
    'B': (4, 8, 16),
    'C': (128, 256, 512),
    'n_layer': (4, 8, 16),
}


def growth(report: Report, rounds: int):
    """How a step's time and memory grow with length, batch, width, layers; generation with length."""
    for key, values in GROWTH.items():
        shown = []
        for value in values:
            how = {'T': 128, 'B': 4, 'C': 128, 'n_layer': 4, key: value}
            umm = UMM(Config(n_layer=how['n_layer'], n_head=4, n_embd=how['C']), V)
            x = torch.randint(V, (how['B'], how['T']))
            s = Sequence(x, torch.ones_like(x), x)
            step = stepper(lambda: umm(s)[0], train.optimizers(umm, 2e-3, .02))
            spent = seconds(step, rounds)
            memory = kept(lambda: umm(s)[0])
            shown.append(f'{value}: {1e3 * spent:.0f} ms, {memory / 1e6:.0f} MB')
        report.note(f'step against {key}', '; '.join(shown))
    x = torch.randint(V, (1, 64))
    s = Sequence(x, torch.ones_like(x))
    shown = []
    for size in (32, 64, 96):
        c = large()
        c.size = size
        umm = UMM(c, V).eval()
        N = len(umm.rc)
        spent = seconds(lambda: umm.generate(s), rounds)
        shown.append(f'{N} codes: {1e3 * spent / N:.2f} ms each')
    report.note('generation against length, batch 1', '; '.join(shown))


# ---- command line ----
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true',
                   help='fewer rounds, no growth curves: under 3 minutes')
    p.add_argument('--json', default='', help='write {name: median ratio} to this file')
    p.add_argument('--nanogpt', default='', help='folder of a clone of nanoGPT')
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args(argv)
    if a.threads < 1:
        raise UserError(f'--threads is {a.threads}: 1 or more')
    torch.set_num_threads(a.threads)
    a.bf16 = not a.quick or peak(torch.bfloat16) > peak(torch.float32)
    if not a.bf16:
        print('bfloat16 is slower than float32 on this processor: left out of --quick')
    report = Report()
    rounds = 3 if a.quick else 7
    training(report, rounds, a, f'training step, T = {T}', large(), B, T)
    training(report, rounds, a, 'training step, cpu preset', Config(), 24, 160)
    main_job(report, rounds)
    generation(report, max(2, rounds // 2))
    tokenizer(report, rounds)
    if not a.quick:
        growth(report, 3)
    print('\n' + report.table())
    if a.json:
        with data.written_whole(a.json) as part:
            part.write_text(json.dumps(report.ratios, indent=1))


if __name__ == '__main__':
    data.guard(main)
