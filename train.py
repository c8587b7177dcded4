"""Train a unified multimodal model from nothing, in three stages that share one loop:

    tokenizer   pictures and proxy maps -> codes -> the same pictures
    pretrain    text -> picture and picture -> text (captions and questions)
    posttrain   SGT: picture -> segmentation map, mixed 2:1 with questions (arXiv 2605.18714)

    python train.py                        everything, then the evaluation; writes out/cpu (or out/gpu)
    python train.py --resume               go on after an interruption, to the same bits
    python train.py --preset test          the same in seconds
"""
import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import eval as evaluation
from data import UserError, World
from model import Config, UMM, VQTokenizer, load, save

def opt(default, help):
    return field(default=default, metadata={'help': help})


@dataclass
class Settings:
    """The command line: each field is a flag (n_layer is --n_layer), its default that of the cpu preset."""
    preset: str = opt('auto', 'cpu, gpu, test, or auto: gpu where there is one')
    out: str = opt('', 'run folder; empty: out/<preset>')
    seed: int = opt(0, 'of weights, scenes, order and questions')
    device: str = opt('auto', 'cpu, cuda, mps, or auto')
    threads: int = opt(0, 'CPU threads; 0: as many as cores')
    resume: bool = opt(False, 'go on with the run in the folder')
    overwrite: bool = opt(False, 'throw away the run in the folder')
    size: int = opt(32, 'side of the pictures in pixels')
    codebook: int = opt(512, 'number of codes of the tokenizer')
    quantizer: str = opt('vq', 'vq or fsq')
    vq_width: int = opt(64, 'channels of the tokenizer')
    vq_depth: int = opt(2, 'residual blocks in its encoder and in its decoder')
    n_layer: int = opt(4, 'transformer blocks')
    n_head: int = opt(4, 'attention heads')
    n_embd: int = opt(128, 'channels of the transformer')
    image_input: str = opt('patch', 'input pictures enter as pixel patches (patch) or as VQ codes (code)')
    tok_steps: int = opt(1300, 'steps of the tokenizer stage')
    tok_batch: int = opt(32, 'pictures a step')
    pre_steps: int = opt(700, 'steps of the pretrain stage')
    pre_draw: int = opt(16, 'pictures drawn from text a step')
    pre_ask: int = opt(16, 'pictures with questions a step, while pretraining')
    post_steps: int = opt(500, 'steps of the posttrain stage')
    post_ask: int = opt(12, 'pictures with questions a step, while post-training')
    post_draw: int = opt(4, 'pictures drawn from text a step, while post-training: against forgetting')
    ratio: float = opt(2., 'proxy pictures for each picture with questions, while post-training')
    proxy: str = opt('seg', f"what to generate while post-training: {', '.join(data.PROXIES)} or none")
    questions: int = opt(12, 'questions asked about each picture')
    tok_lr: float = opt(4e-3, 'AdamW learning rate of the tokenizer stage')
    lr: float = opt(2e-3, 'AdamW learning rate: embeddings, heads')
    muon_lr: float = opt(.02, 'Muon learning rate: all hidden matrices, in all stages')
    post_scale: float = opt(.5, 'learning rates of the posttrain stage, relative to those above')
    warmup: float = opt(.02, 'share of a stage in which the learning rate rises')
    cooldown: float = opt(.4, 'share of a stage in which it falls, at the end')
    clip: float = opt(1., 'largest norm of the gradient')
    w_text: float = opt(1., 'weight of the mean loss of the text head')
    w_image: float = opt(1., 'weight of the mean loss of the pixel head')
    drop: float = opt(.1, 'share of empty prompts, for classifier-free guidance')
    cfg: float = opt(2., 'guidance scale in the evaluation')
    eval_n: int = opt(512, 'pictures in the evaluation')
    log_every: int = opt(20, 'steps between log lines')
    save_every: int = opt(200, 'steps between checkpoints')
    sample_every: int = opt(400, 'steps between sample pictures')


PRESETS = {
    'cpu': {},
    'gpu': dict(size=64, codebook=1024, vq_width=192, vq_depth=3, n_layer=8, n_head=8, n_embd=384, tok_steps=4000,
                tok_batch=128, pre_steps=6000, pre_draw=64, pre_ask=64, post_steps=3000, post_ask=48, post_draw=16,
                eval_n=2048, save_every=1000, sample_every=1000),
    'test': dict(size=16, codebook=64, vq_width=16, vq_depth=1, n_layer=1, n_head=2, n_embd=32, tok_steps=8,
                 tok_batch=8, pre_steps=6, pre_draw=4, pre_ask=4, post_steps=6, post_ask=2, post_draw=2, questions=4,
                 eval_n=32, log_every=2, save_every=4, sample_every=4)}


# ----------------------------------------------------------------------------------------------------
# optimizers

def orthogonalize(G, steps=5):
    """Nearest orthogonal matrix, roughly, by Newton-Schulz (Jordan et al. 2024, Muon); G [n, a, b]."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    for _ in range(steps):
        A = X @ X.mT                                                                            # [n,min,min]
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X if wide else X.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized. torch.optim.Muon computes in bfloat16, which a CPU without bfloat16 units runs
    100 times slower than float32; this one keeps the weights' own type and takes equal shapes together."""

    def __init__(self, params, lr, momentum=.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group['momentum'])
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(m, group['momentum'])))
            for same in by_shape.values():
                U = orthogonalize(torch.stack([u.flatten(1) for _, u in same]))                 # [n,a,b]
                scale = max(1, U.shape[-2] / U.shape[-1]) ** .5
                for (p, _), u in zip(same, U):
                    p.add_(u.view_as(p), alpha=-group['lr'] * scale)


def optimizers(model, lr, muon_lr):
    """Muon for the hidden matrices and convolutions of blocks, AdamW for all else."""
    hidden = [p for name, p in model.named_parameters() if p.ndim > 1 and ('blocks.' in name or 'conv' in name)]
    ids = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [Muon(hidden, muon_lr), torch.optim.AdamW(rest, lr, betas=(.9, .95), weight_decay=0., fused=True)]


# ----------------------------------------------------------------------------------------------------
# a run: its folder, log and checkpoint

STAGES = ('tokenizer', 'pretrain', 'posttrain')


class Run:
    """The folder of a run: settings, log.jsonl, sample pictures and the checkpoint it can be resumed from."""

    def __init__(self, s: Settings, device):
        self.s, self.device, self.dir = s, device, Path(s.out)
        self.stage, self.step, self.saved = STAGES[0], 0, {}
        state = self.dir / 'state.safetensors'
        if s.resume and not state.exists():
            raise UserError(f'nothing to resume: there is no {state}; leave out --resume to start')
        if state.exists() and not s.resume and not s.overwrite:
            raise UserError(f'{s.out} holds a run: --resume goes on with it, --overwrite throws it away, '
                            '--out DIR keeps it and trains elsewhere')
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.logfile = open(self.dir / 'log.jsonl', 'a+')
        except OSError as e:
            raise UserError(f'cannot write to the run folder {s.out} ({e.strerror}): name another with --out')
        if s.resume:
            self.tok, self.umm, text, self.saved, meta = load(state, device)
            self.check_settings(meta['settings'])
            self.stage, self.step = meta['stage'], meta['step']
            self.world = World(s.size, s.seed, device, text)
            self.truncate_log()
        else:
            self.logfile.truncate(0)
            self.world = World(s.size, s.seed, device)
            c = Config(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Config) if hasattr(s, f.name)},
                       vocab=self.world.text.size)
            torch.manual_seed(s.seed)
            self.tok, self.umm = VQTokenizer(c).to(device), UMM(c).to(device)

    def check_settings(self, theirs):
        for k, v in dataclasses.asdict(self.s).items():
            if k not in ('resume', 'overwrite', 'out', 'device', 'threads') and theirs.get(k) != v:
                raise UserError(f'--resume needs the settings that the run in {self.s.out} began with: '
                                f'{k} is {v!r} here, {theirs.get(k)!r} there')

    def truncate_log(self):
        """Forget lines written after the checkpoint: those steps will be done again."""
        self.logfile.seek(0)
        at = lambda line: (STAGES.index(line['stage']), line['step'])
        lines = [x for x in self.logfile if at(json.loads(x)) <= (STAGES.index(self.stage), self.step)]
        self.logfile.truncate(0)
        self.logfile.writelines(lines)

    def log(self, **line):
        self.logfile.write(json.dumps(line) + '\n')
        self.logfile.flush()

    def save(self, name: str, stage: str, step: int, opts=()):
        """Weights, and with `opts` the optimizers' state, as safetensors: enough to sample, evaluate or resume."""
        tensors = {f'{n}.{k}': t for n, m in (('tokenizer', self.tok), ('umm', self.umm))
                   for k, t in m.state_dict().items()}
        for i, o in enumerate(opts):
            for j, state in o.state_dict()['state'].items():
                tensors |= {f'optimizer.{i}.{j}.{k}': t for k, t in state.items()}
        save(self.dir / name, tensors, {'config': vars(self.umm.c), 'settings': dataclasses.asdict(self.s),
                                        'text': [t.hex() for t in self.world.text.vocab],
                                        'stage': stage, 'step': step, 'torch': torch.__version__})

    def restore(self, opts):
        """Put the saved state back into the optimizers of the stage that was interrupted."""
        for i, o in enumerate(opts):
            d = o.state_dict()
            for key, t in self.saved.items():
                if key.startswith(f'optimizer.{i}.'):
                    _, _, j, k = key.split('.')
                    d['state'].setdefault(int(j), {})[k] = t.to(self.device) if k != 'step' else t
            o.load_state_dict(d)


def loop(run: Run, stage: str, model, loss_of, steps: int, lr: float, muon_lr: float, sample):
    """The one training loop: loss_of(step) -> {name: loss}, 'loss' being what is minimised.

    Every random draw is a function of (seed, stage, step), so a checkpoint needs no generator states.
    """
    s, first = run.s, 0
    if STAGES.index(stage) < STAGES.index(run.stage):
        return                                        # done before the interruption
    opts = optimizers(model, lr, muon_lr)
    if stage == run.stage and run.step:
        run.restore(opts)
        first = run.step
    peaks, begin, model = [o.param_groups[0]['lr'] for o in opts], time.time(), model.train()
    bar = tqdm(range(first, steps), stage, initial=first, total=steps, unit='step', smoothing=.05, mininterval=1)
    for step in bar:
        torch.manual_seed((s.seed * 3 + STAGES.index(stage)) * 2**32 + step)
        rise, fall = (step + 1) / max(1, s.warmup * steps), (steps - step) / max(1, s.cooldown * steps)
        for o, peak in zip(opts, peaks):
            o.param_groups[0]['lr'] = peak * min(1, rise, fall)
        losses = loss_of(step)
        losses['loss'].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        if not norm.isfinite():
            raise UserError(f'{stage} step {step}: the gradient is not finite (' + ', '.join(
                f'{k} {v.item():.3g}' for k, v in losses.items()) + '); lower --lr or --muon_lr. '
                f'The last good checkpoint is in {s.out}')
        for o in opts:
            o.step()
        model.zero_grad(set_to_none=True)
        done = step + 1
        if done % s.log_every == 0 or done == steps:
            line = {k: round(v.item(), 4) for k, v in losses.items()}
            bar.set_postfix(line, refresh=False)
            run.log(stage=stage, step=done, **line, norm=round(norm.item(), 3), seconds=round(time.time() - begin, 1))
        if done % s.sample_every == 0 or done == steps:
            sample(done)
            model.train()
        if done % s.save_every == 0 and done < steps:
            run.save('state.safetensors', stage, done, opts)
    nxt = STAGES[STAGES.index(stage) + 1] if stage != STAGES[-1] else stage
    run.save('state.safetensors', nxt, 0 if nxt != stage else steps)
    run.stage, run.step = nxt, 0 if nxt != stage else steps


# ----------------------------------------------------------------------------------------------------
# the three stages

def train_tokenizer(run: Run):
    """Autoencode pictures and the maps of all proxies together: one codebook has to draw them all."""
    s, maps = run.s, [f for name, f in data.PROXIES.items() if name != 'recon']

    def loss_of(step):
        _, r, _ = run.world.scenes('train', step, s.tok_batch)
        n = s.tok_batch // 2                               # half pictures, a quarter masks, a quarter the other maps
        parts = [r.image[:n], data.seg(r)[n:n + n // 2]] + [f(r)[n + n // 2 + i::len(maps)]
                                                            for i, f in enumerate(maps)]
        x = torch.cat(parts)
        y, _, commitment = run.tok(x)
        mse, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
        return {'loss': mse + .3 * l1 + .25 * commitment, 'mse': mse.detach(), 'commitment': commitment.detach()}

    def sample(done):
        run.tok.eval()
        m = evaluation.tokenizer(run.tok, run.world, n=64, split='val')
        run.log(stage='tokenizer', step=done, val={k: m[k] if isinstance(m[k], float) else m[k]['value'] for k in m})
        tqdm.write(f"tokenizer step {done}: {m['psnr']['value']:.1f} dB, masks {m['psnr_seg']['value']:.1f} dB, "
                   f"mask mIoU {m['mask_ceiling']['value']:.3f}, perplexity {m['perplexity']:.0f}, "
                   f"codes used {m['used']:.0%} of {s.codebook}")
        _, r, _ = run.world.scenes('val', 0, 8)
        rows = [x for f in data.PROXIES.values() for x in (f(r), run.tok.decode(run.tok.encode(f(r))))]
        evaluation.grid(rows).save(run.dir / 'tokenizer.png')

    loop(run, 'tokenizer', run.tok, loss_of, s.tok_steps, s.tok_lr, s.muon_lr, sample)
    run.tok.eval().requires_grad_(False)


def umm_losses(run: Run, split: str, index: int, ask: int, draw: int, proxies: int) -> dict:
    """Losses of one batch of the UMM: `ask` pictures with questions, `draw` prompts to draw, `proxies` pictures
    with a proxy map to generate. Each head's loss is a mean over all its targets, whatever their number."""
    s, w, tok, out = run.s, run.world, run.tok, {}
    pixel = []
    if ask:
        seq, _ = w.questions(split, 3 * index, ask, s.questions)
        seq.image = evaluation.source(run.umm, tok, seq.image)
        out['text'] = run.umm(seq)[0]
    if draw:
        seq, image = w.drawings(split, 3 * index + 1, draw, s.drop)
        seq.codes = tok.encode(image)
        out['draw'] = run.umm(seq)[1]
        pixel.append((out['draw'], draw))
    if proxies:
        seq, target, _ = w.proxies(split, 3 * index + 2, proxies, s.proxy)
        seq.image, seq.codes = evaluation.source(run.umm, tok, seq.image), tok.encode(target)
        out[s.proxy] = run.umm(seq)[1]
        pixel.append((out[s.proxy], proxies))
    loss = s.w_text * out['text'] if ask else 0.
    if pixel:
        loss = loss + s.w_image * sum(l * n for l, n in pixel) / sum(n for _, n in pixel)
    return {'loss': loss} | {k: v.detach() for k, v in out.items()}


def sampler(run: Run, stage: str):
    """Understanding on a few validation pictures, and a picture of samples, while a UMM stage runs."""
    def sample(done):
        run.umm.eval()
        u = evaluation.understanding(run.umm, run.tok, run.world, n=64, split='val')
        run.log(stage=stage, step=done, val={k: v['value'] for k, v in u.items()})
        tqdm.write(f"{stage} step {done}: understanding {u['mean']['value']:.2f} "
                   + ' '.join(f"{k} {u[k]['value']:.2f}" for k in data.VISUAL))
        evaluation.picture(run.umm, run.tok, run.world, run.s.cfg).save(run.dir / f'{stage}.png')
    return sample


def pretrain(run: Run):
    """Text -> picture, and picture -> text (captions and questions)."""
    s = run.s
    loop(run, 'pretrain', run.umm, lambda step: umm_losses(run, 'train', step, s.pre_ask, s.pre_draw, 0),
         s.pre_steps, s.lr, s.muon_lr, sampler(run, 'pretrain'))


def posttrain(run: Run):
    """SGT: [picture][instruction][proxy map], loss on the map's codes only, mixed with questions."""
    s = run.s
    proxies = 0 if s.proxy == 'none' else round(s.ratio * s.post_ask)
    loop(run, 'posttrain', run.umm,
         lambda step: umm_losses(run, 'train', s.pre_steps + step, s.post_ask, s.post_draw, proxies),
         s.post_steps, s.lr * s.post_scale, s.muon_lr * s.post_scale, sampler(run, 'posttrain'))


# ----------------------------------------------------------------------------------------------------
# command line

def parse(argv=None) -> Settings:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Settings):
        text = f"{f.metadata['help']} (default {f.default!r})"
        if isinstance(f.default, bool):
            p.add_argument(f'--{f.name}', action=argparse.BooleanOptionalAction, help=text)
        else:
            p.add_argument(f'--{f.name}', type=type(f.default), metavar=type(f.default).__name__, help=text)
    p.set_defaults(**{f.name: None for f in dataclasses.fields(Settings)})
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    name = given.get('preset', 'auto')
    if name == 'auto':
        name = 'gpu' if torch.cuda.is_available() and given.get('device', 'auto') in ('auto', 'cuda') else 'cpu'
    if name not in PRESETS:
        raise UserError(f'--preset is {name!r}: choose {", ".join(PRESETS)} or auto')
    s = Settings(**(PRESETS[name] | given | {'preset': name}))
    s.out = s.out or f'out/{name}'
    check(s)
    return s


def check(s: Settings):
    """Impossible settings, named before anything is written."""
    allowed = {'quantizer': ('vq', 'fsq'), 'image_input': ('patch', 'code'), 'proxy': (*data.PROXIES, 'none')}
    for k, v in allowed.items():
        if getattr(s, k) not in v:
            raise UserError(f'--{k} is {getattr(s, k)!r}: choose one of {", ".join(v)}')
    zero = ('seed', 'threads', 'pre_draw', 'post_draw', 'ratio', 'drop', 'w_text', 'w_image', 'warmup', 'cooldown')
    for f in dataclasses.fields(s):
        v = getattr(s, f.name)
        if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
            if not math.isfinite(v) or v < 0 or (v == 0 and f.name not in zero):
                raise UserError(f"--{f.name} is {v}: it must be {'0 or more' if f.name in zero else 'more than 0'}")
    for bad, why in (
            (s.size % Config.patch or not 16 <= s.size <= 512, f'--size is {s.size}: a multiple of {Config.patch}, 16..512'),
            (s.n_embd % (4 * s.n_head), f'--n_embd is {s.n_embd}: a multiple of 4 * --n_head = {4 * s.n_head}'),
            (s.vq_width % 8, f'--vq_width is {s.vq_width}: a multiple of 8'),
            (s.tok_batch < 8, f'--tok_batch is {s.tok_batch}: at least 8'),
            (s.codebook & (s.codebook - 1) and s.quantizer == 'fsq',
             f'--codebook is {s.codebook}: a power of 2 for --quantizer fsq'),
            (s.drop > 1, f'--drop is {s.drop}: a share, 0 to 1')):
        if bad:
            raise UserError(why)


def choose_device(s: Settings):
    """-> torch device; prints the choice and its reason."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = s.device if s.device != 'auto' else 'cuda' if cuda else 'mps' if mps else 'cpu'
    if name not in ('cpu', 'cuda', 'mps') or (name == 'cuda' and not cuda) or (name == 'mps' and not mps):
        raise UserError(f'--device is {name!r}, but this machine has: cpu' + ' cuda' * cuda + ' mps' * mps)
    if s.threads:
        torch.set_num_threads(s.threads)
    if name == 'cpu':
        keep_memory()
    why = 'asked for' if s.device != 'auto' else 'there is one' if name != 'cpu' else 'no GPU found'
    print(f'device: {name} ({why}), {torch.get_num_threads()} threads')
    return torch.device(name)


def keep_memory():
    """Ask glibc to keep freed buffers: by default each large tensor is a fresh, slowly zeroed mapping.
    Measured 1.3x on a training step; does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no mappings of their own for large buffers
        libc.mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: do not hand memory back


def main(argv=None):
    begin = time.time()
    s = parse(argv)
    run = Run(s, choose_device(s))
    for name, m in (('tokenizer', run.tok), ('UMM', run.umm)):
        print(f'{name}: {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M parameters')
    train_tokenizer(run)
    pretrain(run)
    posttrain(run)
    run.save('model.safetensors', 'done', 0)
    scores = evaluation.evaluate(run.umm, run.tok, run.world, s.eval_n, s.cfg)
    scores['minutes'] = (time.time() - begin) / 60
    evaluation.report(scores, run.dir)
    evaluation.picture(run.umm, run.tok, run.world, s.cfg).save(run.dir / 'samples.png')


if __name__ == '__main__':
    data.guard(main)
