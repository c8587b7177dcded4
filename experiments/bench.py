"""Speed against peers on equal work, alternating runs in one process: median ratio of wall and CPU time.

    pip install -r experiments/requirements-bench.txt
    python -m experiments.bench [--quick] [--json FILE] [--nanogpt DIR]

Equal work: width 256, 6 layers, 8 heads, vocabulary 2048, 320 tokens (64 of text, 256 of a picture),
batch 4, float32. A ratio above 1: nanoUMM needs less time. A peer that is not installed is left out with
a line. nanoGPT is no package: name a clone of it. FLOPs are counted in one place, flops(); the peak is
measured, not looked up.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
import timeit

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from data import Sequence, UserError
from model import Config, UMM, VQTokenizer

V, T, B, LAYERS, HEADS, WIDTH = 2048, 320, 4, 6, 8, 256

def flops(work) -> float:
    """Floating-point operations of work() in matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as count:
        work()
    return count.get_total_flops()

def peak(dtype, shape=(1024, 1024, 1024)) -> float:
    """Measured FLOP/s, best of 9, of a matrix product [n, k] @ [k, m], shape (n, k, m)."""
    n, k, m = shape
    a, b = torch.ones(n, k, dtype=dtype), torch.ones(k, m, dtype=dtype)
    return 2 * n * k * m / min(timeit.repeat(lambda: a @ b, number=1, repeat=9))

def alternate(runs: dict, rounds: int) -> dict:
    """{name: function} -> {name: [(wall, CPU) seconds of each round]}; one warm-up, then by turns."""
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if i:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times

class Report:
    """Rows of a Markdown table and a flat {name: median ratio}."""

    def __init__(self):
        self.rows, self.ratios = [], {}

    def add(self, what: str, times: dict, unit: str, amount: float):
        """times: as from alternate, nanoUMM first; amount of `unit` in one run."""
        ours = times['nanoUMM']
        for name, theirs in times.items():
            rate = amount / statistics.median(w for w, _ in theirs)
            wall, cpu = ([t[i] / o[i] for t, o in zip(theirs, ours)] for i in (0, 1))
            show = lambda r: f'{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})'
            self.rows.append((what, name, f'{rate:,.0f} {unit}/s',
                              *((show(wall), show(cpu)) if name != 'nanoUMM' else ('1', '1'))))
            if name != 'nanoUMM':
                self.ratios[f'{what}: {name}'] = statistics.median(wall)
            print(' | '.join(self.rows[-1]), flush=True)

    def note(self, what: str, value: str, number=None):
        self.rows.append((what, '', value, '', ''))
        if number is not None:
            self.ratios[what] = number
        print(f'{what}: {value}', flush=True)

    def table(self) -> str:
        head = ('work', 'who', 'rate', 'wall: theirs / ours', 'CPU: theirs / ours')
        return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [head, ['---'] * 5, *self.rows])

@contextlib.contextmanager
def peer(name: str):
    """What follows needs the peer: without it, one line."""
    try:
        yield
    except ImportError as e:
        print(f'{name} left out: {e}')

# ---- training ----
def stepper(loss_of, optimizers):
    """One step: forward, backward, clip, optimizers."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group['params']]

    def step():
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        for o in optimizers:
            o.step()
            o.zero_grad()
    return step

def llama(c: Config, **how):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.n_embd, intermediate_size=round(8 / 3 * c.n_embd / 16) * 16,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
        max_position_embeddings=2 * T, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, **how))

def training(report: Report, rounds: int, a, what: str, c: Config, B: int, T: int):
    """A step on B sequences of T tokens, all predicted; in bfloat16 too, where that is not emulated."""
    ids = torch.randint(c.vocab, (B, T + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    adam = lambda m: [torch.optim.AdamW(m.parameters(), 3e-4, fused=True)]
    umm, ours, ones, runs = UMM(c), UMM(c), torch.ones_like(x), {}

    def add(name, loss, opts):
        runs[name] = stepper(loss, opts)
        if a.bf16:
            runs[name + ', bf16'] = stepper(torch.autocast('cpu', torch.bfloat16)(loss), opts)
    add('nanoUMM', lambda: umm(Sequence(x, ones, y))[0], adam(umm))                        # equal work
    add('nanoUMM, Muon', lambda: ours(Sequence(x, ones, y))[0], train.optimizers(ours, 2e-3, .02))
    with peer('transformers'):
        body = llama(c, attn_implementation='sdpa')
        add('transformers Llama', lambda: F.cross_entropy(body(x).logits.flatten(0, 1), y.flatten()),
            adam(body))
    with peer('x-transformers'):
        from x_transformers import Decoder, TransformerWrapper
        wrapped = TransformerWrapper(num_tokens=c.vocab, max_seq_len=T, attn_layers=Decoder(
            dim=c.n_embd, depth=c.n_layer, heads=c.n_head, attn_dim_head=c.n_embd // c.n_head,
            rotary_pos_emb=True, attn_flash=True))
        add('x-transformers', lambda: F.cross_entropy(wrapped(x).flatten(0, 1), y.flatten()),
            adam(wrapped))
    with peer('nanoGPT'):
        if not a.nanogpt:
            raise ImportError('name a clone with --nanogpt')
        spec = importlib.util.spec_from_file_location('nanogpt', f'{a.nanogpt}/model.py')  # not ours
        gpt = sys.modules['nanogpt'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(gpt)
        net = gpt.GPT(gpt.GPTConfig(block_size=T, vocab_size=c.vocab, n_layer=c.n_layer, n_head=c.n_head,
                                    n_embd=c.n_embd, dropout=0., bias=False))
        add('nanoGPT', lambda: net(x, y)[1], [net.configure_optimizers(.1, 3e-4, (.9, .95), 'cpu')])
    times = alternate(runs, rounds)
    report.add(what, times, 'tokens', B * T)
    spent = statistics.median(w for w, _ in times['nanoUMM'])
    best = peak(torch.float32, (B * T, c.n_embd, 4 * c.n_embd))
    share = flops(lambda: umm(Sequence(x, ones, y))[0].backward()) / spent / best
    report.note(f'{what}: MFU', f'{share:.0%} of {best / 1e9:.0f} GFLOP/s, float32', share)

def main_job(report: Report, rounds: int, folder='out/bench'):
    """A post-training step of the cpu preset, the share of its data, scenes a second."""
    s = train.parse(['--preset', 'cpu', '--out', folder, '--overwrite'])
    run = train.Run(s, torch.device('cpu'))
    world, opts, count = run.world, train.optimizers(run.umm, s.lr, s.muon_lr), [0]
    run.tok.eval().requires_grad_(False)
    proxies = round(s.ratio * s.post_ask)

    def draw_data():
        count[0] += 1
        world.questions('train', 3 * count[0], s.post_ask, s.questions)
        world.drawings('train', 3 * count[0] + 1, s.post_draw, s.drop)
        world.proxies('train', 3 * count[0] + 2, proxies, s.proxy)

    def loss(late=False):
        count[0] += 1
        return train.umm_losses(run, count[0], s.post_ask, s.post_draw, proxies, s.w_text, s.w_draw,
                                late)['loss']
    runs = {'step': stepper(loss, opts), 'late': stepper(lambda: loss(True), opts), 'data': draw_data}
    times = alternate(runs, rounds)
    spent, late, given = (statistics.median(w for w, _ in times[k]) for k in ('step', 'late', 'data'))
    report.note('cpu preset, post-training', f'{1 / spent:.2f} steps/s', 1 / spent)
    report.note('cpu preset, its second half', f'{1 / late:.2f} steps/s', 1 / late)
    report.note('cpu preset, share of the data in a step', f'{given / spent:.1%}', given / spent)
    scenes = alternate({'scenes': lambda: world.scenes('train', 7, 512)}, rounds)['scenes']
    rate = 512 / statistics.median(w for w, _ in scenes)
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
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=4)
    net = JanusForConditionalGeneration(JanusConfig(
        text_config=text, image_token_id=V - 1,
        vision_config=JanusVisionConfig(**small, num_image_tokens=256, projection_dim=WIDTH),
        vq_config=JanusVQVAEConfig(
            num_embeddings=V, base_channels=32, channel_multiplier=[1], num_res_blocks=1,
            latent_channels=32, projection_dim=WIDTH, image_token_embed_dim=WIDTH))).eval()
    net.generation_config.generation_kwargs = {'boi_token_id': 2}
    return lambda x: net.generate(x, attention_mask=torch.ones_like(x), generation_mode='image',
                                  do_sample=True, guidance_scale=3., bos_token_id=0, pad_token_id=1)

def generation(report: Report, rounds: int):
    """256 codes after 64 text tokens, with a cache, sampled."""
    c = Config(vocab=V, codebook=V, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, size=64)
    umm = UMM(c).eval()
    for batch in (1, 16):
        x = torch.randint(V, (batch, T - 256))
        s = Sequence(x, torch.ones_like(x))
        runs = {'nanoUMM': lambda: umm.generate(s)}
        with peer('transformers'):
            body = llama(c, attn_implementation='sdpa').eval()
            how = dict(max_new_tokens=256, min_new_tokens=256, do_sample=True, temperature=1., top_k=0,
                       use_cache=True)
            runs['transformers generate()'] = lambda: body.generate(
                x, attention_mask=torch.ones_like(x), **how)
        report.add(f'generation, batch {batch}', alternate(runs, rounds), 'tokens', batch * 256)
        guided = alternate({'off': lambda: umm.generate(s), 'on': lambda: umm.generate(s, cfg=3.)},
                           rounds)
        cost = statistics.median(a[0] / b[0] for a, b in zip(guided['on'], guided['off']))
        report.note(f'generation, batch {batch}: guidance', f'{cost:.2f} times as long', cost)
        with peer('transformers (Janus)'):
            theirs = janus()
            runs = {'nanoUMM': lambda: umm.generate(s, cfg=3.), 'tiny Janus': lambda: theirs(x)}
            report.add(f'generation, guided, batch {batch}', alternate(runs, rounds), 'tokens',
                       batch * 256)

# ---- tokenizer ----
def tokenizer(report: Report, rounds: int):
    """Training step and round trip of 64 pictures of 32 x 32, the quantizer ours or the library's."""
    c, x = Config(), torch.rand(64, 3, 32, 32)
    runs, trips = {}, {}

    def add(name, tok):
        def loss():
            y, _, commitment = tok(x)
            return F.mse_loss(y, x) + .25 * commitment
        tok.to(memory_format=torch.channels_last)
        runs[name] = stepper(loss, [torch.optim.AdamW(tok.parameters(), 1e-3, fused=True)])
        trips[name] = torch.no_grad()(lambda: tok(x))
    add('nanoUMM', VQTokenizer(c))
    with peer('vector-quantize-pytorch'):
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
        theirs = VQTokenizer(c)
        theirs.quantizer = Theirs()
        add('vector-quantize-pytorch', theirs)
    report.add('tokenizer, training step', alternate(runs, rounds), 'pictures', len(x))
    report.add('tokenizer, there and back', alternate(trips, rounds), 'pictures', len(x))

def kept(loss) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, shared storage once."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = loss()                        # alive until counted, or its storage would be used again
    return sum(sizes.values()) + 0 * held.numel()

def growth(report: Report, rounds: int):
    """How a step's time and memory grow with length, batch, width, layers; generation with length."""
    base = dict(T=128, B=4, C=128, n_layer=4)
    middle = lambda runs: statistics.median(w for w, _ in alternate(runs, rounds)['s'])
    for key, values in (('T', (128, 256, 512)), ('B', (4, 8, 16)), ('C', (128, 256, 512)),
                        ('n_layer', (4, 8, 16))):
        shown = []
        for value in values:
            how = base | {key: value}
            umm = UMM(Config(vocab=V, n_layer=how['n_layer'], n_head=4, n_embd=how['C']))
            x = torch.randint(V, (how['B'], how['T']))
            loss = lambda: umm(Sequence(x, torch.ones_like(x), x))[0]
            spent = middle({'s': stepper(loss, train.optimizers(umm, 2e-3, .02))})
            shown.append(f'{value}: {1e3 * spent:.0f} ms, {kept(loss) / 1e6:.0f} MB')
        report.note(f'step against {key}', '; '.join(shown))
    shown, x = [], torch.randint(V, (1, 64))
    for size in (32, 64, 96):
        c = Config(vocab=V, codebook=V, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, size=size)
        umm = UMM(c).eval()
        spent = middle({'s': lambda: umm.generate(Sequence(x, torch.ones_like(x)))})
        shown.append(f'{len(umm.rc)} codes: {1e3 * spent / len(umm.rc):.2f} ms each')
    report.note('generation against length, batch 1', '; '.join(shown))

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
    report, rounds = Report(), 3 if a.quick else 7
    large = Config(vocab=V, codebook=V, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, size=64)
    training(report, rounds, a, f'training step, T = {T}', large, B, T)
    training(report, rounds, a, 'training step, cpu preset', Config(), 24, 160)
    main_job(report, rounds)
    generation(report, max(2, rounds // 2))
    tokenizer(report, rounds)
    if not a.quick:
        growth(report, 3)
    print('\n' + report.table())
    if a.json:
        with open(f'{a.json}.part', 'w') as f:
            json.dump(report.ratios, f, indent=1)
        os.replace(f'{a.json}.part', a.json)

if __name__ == '__main__':
    data.guard(main)
