"""Train a unified multimodal model from nothing, in three stages that share one loop:

    tokenizer   pictures and proxy maps -> codes -> the same pictures
    pretrain    text -> picture, and picture -> text (captions and questions)
    posttrain   SGT (arXiv 2605.18714): picture -> segmentation map, 2:1 with questions

    python train.py                  everything, then the evaluation; writes out/cpu (or out/gpu)
    python train.py --resume         the same command and --resume: go on after an interruption
"""
import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from data import PROXIES, Sequence, UserError
from folder import open_world
from model import Config, UMM, VQTokenizer, load, save
from optim import exchange, join, optimizers, wait

STAGES = ('tokenizer', 'pretrain', 'posttrain')
torchrun = dist.is_available() and dist.is_torchelastic_launched()
RANK, RANKS = (int(os.environ[k]) for k in ('RANK', 'WORLD_SIZE')) if torchrun else (0, 1)
opt = lambda default, help: field(default=default, metadata={'help': help})

@dataclass
class Settings:
    """The command line: each field is a flag, and its default is that of the cpu preset."""
    preset: str = opt('cpu', 'cpu: small, for a GPU too; gpu: larger, not measured yet; test: tiny')
    out: str = opt('', 'run folder; when not given: out/<preset>')
    resume: bool = opt(False, 'go on with the run in the folder')
    overwrite: bool = opt(False, 'throw away the run in the folder')
    data: str = opt('', 'folder of real pictures, see README; empty: the procedural world')
    skip_bad: bool = opt(False, 'leave out bad rows of --data instead of stopping')
    init: str = opt('', 'a pretrained.safetensors to post-train, instead of the first two stages')
    seed: int = opt(0, 'seed of weights, scenes, order and questions')
    device: str = opt('auto', 'cpu, cuda, mps, or auto: cuda where there is one, else cpu')
    dtype: str = opt('auto', 'of matrix products: float32, bfloat16, or auto: the faster one here')
    threads: int = opt(0, 'CPU threads; 0: all cores or one, the faster one here')
    size: int = opt(32, 'side of the pictures in pixels')
    codebook: int = opt(512, 'codes of the tokenizer')
    quantizer: str = opt('vq', 'vq (learned codebook) or fsq (fixed grid)')
    vq_width: int = opt(64, 'channels of the tokenizer')
    vq_depth: int = opt(2, 'residual blocks in its encoder and in its decoder')
    n_layer: int = opt(4, 'transformer blocks')
    n_head: int = opt(3, 'attention heads')
    n_embd: int = opt(96, 'channels of the transformer')
    image_input: str = opt('patch', 'input pictures as pixel patches (patch) or as VQ codes (code)')
    tok_steps: int = opt(900, 'steps of the tokenizer stage')
    tok_batch: int = opt(32, 'pictures a step')
    pre_steps: int = opt(660, 'steps of the pretrain stage')
    pre_ask: int = opt(1, 'pictures with questions a step, pretraining')
    pre_draw: int = opt(32, 'pictures drawn from text a step, pretraining')
    post_steps: int = opt(900, 'steps of the posttrain stage')
    post_ask: int = opt(8, 'pictures with questions a step, post-training')
    post_draw: int = opt(8, 'pictures drawn from text a step, post-training: against forgetting')
    ratio: float = opt(2., 'proxy pictures for each picture with questions, post-training')
    proxy: str = opt('seg', f"map to generate, post-training: {', '.join(PROXIES)} or none")
    control: str = opt('none', 'none; shuffled: maps of other pictures; frozen: the map moves no block; '
                       'first: maps alone in half of the stage, then questions alone')
    questions: int = opt(12, 'questions asked about each picture')
    late_questions: int = opt(36, 'the same in the second half of post-training: mostly to find things')
    tok_lr: float = opt(4e-3, 'AdamW learning rate of the tokenizer stage')
    lr: float = opt(2e-3, 'AdamW learning rate of the other stages: embeddings and heads')
    muon_lr: float = opt(.02, 'Muon learning rate: hidden matrices, all stages')
    warmup: float = opt(.02, 'share of a stage in which the learning rate rises')
    cooldown: float = opt(.4, 'share of a stage, at its end, in which it falls to zero')
    pre_cooldown: float = opt(.1, 'the same for the pretrain stage, which another stage follows')
    clip: float = opt(1., 'largest norm of the gradient')
    w_text: float = opt(1., 'weight of the mean loss of answers about pictures')
    pre_w_text: float = opt(.1, 'the same in the pretrain stage, where it slows drawing')
    w_draw: float = opt(.4, 'weight of the mean loss of drawings, post-training; of plans: 1')
    w_proxy: float = opt(.6, 'weight of the mean loss of proxy maps')
    hide: float = opt(.75, 'share of the maps written without sight of their earlier codes')
    drop: float = opt(.1, 'share of empty prompts, for classifier-free guidance')
    cfg: float = opt(2., 'guidance scale in the evaluation')
    eval_n: int = opt(512, 'pictures in the evaluation')
    log_every: int = opt(20, 'steps between log lines')
    save_every: int = opt(200, 'steps between checkpoints')
    sample_every: int = opt(400, 'steps between sample pictures')

PRESETS = {'cpu': {}, 'gpu': dict(
    size=64, codebook=1024, vq_width=192, vq_depth=3, n_layer=8, n_head=8, n_embd=384, tok_steps=4000,
    tok_batch=128, pre_steps=6000, pre_ask=32, pre_draw=48, post_steps=3000, post_ask=20, post_draw=8,
    late_questions=12, eval_n=2048, save_every=1000, sample_every=1000), 'test': dict(
    size=16, codebook=64, vq_width=16, vq_depth=1, n_layer=1, n_head=2, n_embd=32, tok_steps=8,
    tok_batch=8, pre_steps=6, pre_ask=4, pre_draw=4, post_steps=6, post_ask=2, post_draw=2, questions=4,
    late_questions=6, eval_n=32, log_every=2, save_every=4, sample_every=8)}

# ---- a run: its folder, log and checkpoint ----
class Run:
    """The folder of a run: log.jsonl, sample pictures and the checkpoint it can be resumed from."""
    guess = lambda self, k: math.log(self.umm.c.vocab if k in ('text', 'plan') else self.umm.c.codebook)

    def __init__(self, s: Settings, device):
        self.s, self.device, self.dir = s, device, Path(s.out)
        self.stage, self.step, self.saved, self.stop, text = STAGES[0], 0, {}, False, None
        state = self.dir / 'state.safetensors'
        if s.resume and not state.exists():
            raise UserError(f'nothing to resume: there is no {state}; leave out --resume to start')
        if (state.exists() or state.with_stem('model').exists()) and not (s.resume or s.overwrite):
            raise UserError(f'{s.out} holds a run: --resume goes on with it, --overwrite throws it '
                            'away, --out DIR keeps it and trains elsewhere')
        if s.resume:
            self.tok, self.umm, text, self.saved, meta = load(state, device)
            self.stage, self.step, old = meta['stage'], meta['step'], meta['settings']
            if self.stage not in STAGES:
                raise UserError(f'{state} is of stage {self.stage!r:.30}, not of {STAGES}: train again')
            if s.dtype == 'auto':              # what was chosen when the run began: the same bits
                s.dtype = old['dtype']
            if s.threads == 0:
                s.threads = old['threads']
            for k, v in vars(s).items():
                if k not in ('resume', 'overwrite', 'out', 'device', 'threads') and old.get(k) != v:
                    raise UserError(f'--resume needs the settings that the run in {s.out} began with: '
                                    f'{k} is {v!r} here, {old.get(k)!r} there')
        if s.init and not s.resume:
            self.tok, self.umm, text, _, meta = load(s.init, device)
            self.stage = 'posttrain'
            for k, v in vars(self.umm.c).items():
                if getattr(s, k, v) != v:
                    raise UserError(f'--{k} is {getattr(s, k)!r}, but {s.init} was made with {v!r}')
        RANK and wait()                        # the first process decodes a folder, the others find it
        self.world = open_world(s.data, s.size, s.seed, device, text, s.skip_bad)
        RANK or wait()
        if s.resume and self.world.checksum != meta.get('checksum', 0):
            raise UserError(f'{s.data} has changed since the run began: restore it or --overwrite this')
        if s.proxy not in (*self.world.targets, 'seg', 'none'):
            raise UserError(f'--proxy is {s.proxy!r}: {s.data} has no such maps; choose from '
                            f"{', '.join(self.world.targets)} or none")
        self.dir.mkdir(parents=True, exist_ok=True)
        name = os.devnull if RANK else self.dir / 'log.jsonl'
        self.logfile = open(name, 'r+' if s.resume else 'w', 1, newline='\n')
        self.lines = self.logfile.readlines()[:meta['lines']] if s.resume else []
        self.logfile.seek(sum(len(x.encode()) for x in self.lines))      # later steps are done again
        RANK or self.logfile.truncate()
        if not s.resume:
            state.unlink(missing_ok=True), state.with_stem('model').unlink(missing_ok=True)
        if not s.resume and not s.init:
            shared = {k: v for k, v in vars(s).items() if k in vars(Config())}
            c = Config(**shared, vocab=self.world.text.size)
            torch.manual_seed(s.seed)
            self.tok, self.umm = VQTokenizer(c).to(device), UMM(c).to(device)
        self.tok.to(memory_format=torch.channels_last)

    def log(self, **line):
        self.lines.append(json.dumps(line) + '\n')
        self.logfile.write(self.lines[-1])                # line buffered

    def save(self, name: str, stage: str, step: int, opts=()):
        """Weights, and with `opts` the optimizers' state: enough to sample, to evaluate or to resume."""
        tensors = {f'{n}.{k}': t for n, m in (('tokenizer', self.tok), ('umm', self.umm))
                   for k, t in m.state_dict().items()}
        tensors |= {f'optimizer.{i}.{j}.{k}': t for i, o in enumerate(opts)
                    for j, state in o.state_dict()['state'].items() for k, t in state.items()}
        meta = {'config': vars(self.umm.c), 'text': [t.hex() for t in self.world.text.vocab],
                'settings': vars(self.s), 'stage': stage, 'step': step, 'lines': len(self.lines)}
        RANK or save(self.dir / name, tensors, meta | {'checksum': self.world.checksum})

    def restore(self, opts):
        """Put the saved state back, in the memory layout of the parameters: fused AdamW counts on it."""
        for key, t in self.saved.items():
            if key.startswith('optimizer.'):
                i, j, k = key.split('.')[1:]
                p = opts[int(i)].param_groups[0]['params'][int(j)]
                like = p if t.shape == p.shape else t
                opts[int(i)].state[p][k] = torch.empty_like(like, device=p.device).copy_(t)

# ---- how fast this machine is, and in what ----
def seconds_a_step(run: Run, dtype: str, threads: int, limit=math.inf) -> float:
    """Time the forward and backward pass of a step of post-training: best of three, the first warms up.
    Slower than `limit` or 3 seconds, it is not tried again. Nothing is learned: there is no optimizer."""
    s, best = run.s, math.inf
    s.dtype, s.threads = dtype, threads
    torch.set_num_threads(threads)
    run.tok.eval()                                             # its codebook must not move
    for _ in range(3):
        begin = time.perf_counter()
        losses = umm_losses(run, 0, s.post_ask, s.post_draw, maps_a_step(run), late=True)
        losses['loss'].backward()
        run.umm.source.grad.sum().item()                       # a GPU is waited for
        run.umm.zero_grad()
        spent = torch.tensor(time.perf_counter() - begin, device=run.device)
        if torchrun:
            dist.all_reduce(spent, dist.ReduceOp.MAX)          # all processes choose alike
        best = min(best, spent.item())
        if best > min(limit, 3):
            break
    return best

def faster(run: Run, times: dict, best: tuple, other: tuple) -> tuple:
    """Time `other`, (dtype, threads) -> it or `best`: it has to win by a tenth, not by chance."""
    times[other] = seconds_a_step(run, *other, limit=2 * times[best])
    return other if times[other] < .9 * times[best] else best

def settle(run: Run):
    """Train in the type and with the number of threads in which real steps are fastest on this machine
    now, unless they were asked for or are those that a resumed run began with: float32 or bfloat16; all
    cores or, beside another busy program, one."""
    s, times = run.s, {}
    choose_dtype, choose_threads = s.dtype == 'auto', s.threads == 0
    best = ('float32' if choose_dtype else s.dtype, s.threads or torch.get_num_threads())
    if choose_dtype or choose_threads:
        times[best] = seconds_a_step(run, *best)
    if choose_threads and best[1] > 1 and run.device.type == 'cpu':
        best = faster(run, times, best, (best[0], 1))
    if choose_dtype:
        best = faster(run, times, best, ('bfloat16', best[1]))
    s.dtype, s.threads = best
    torch.set_num_threads(s.threads)
    timed = [f'{dtype} on {n} {seconds:.3g}' for (dtype, n), seconds in times.items()]
    why = 'seconds a step: ' + ', '.join(timed) if timed else 'as asked for'
    print(f'device: {run.device}, {s.dtype}, CPU threads: {s.threads} ({why})')
    if run.device.type == 'cuda':
        print(f'memory of a step: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB')

class Pace:
    """The seconds of a stage's steps, to notice when something else has begun to use the machine."""

    def __init__(self):
        self.recent, self.best, self.warned = [], math.inf, False

    def start(self):
        self.begin = time.perf_counter()

    def stop(self):
        self.recent.append(time.perf_counter() - self.begin)

    def warning(self, threads: int) -> str:
        """Look at the steps since the last look. Once they take twice as long as before: what to say."""
        mean = sum(self.recent) / len(self.recent)
        slow = mean > 2 * self.best
        self.best, self.recent = min(self.best, mean), []
        if self.warned or not slow:
            return ''
        self.warned = True
        text = f'steps take {mean / self.best:.1f} times as long as before: is the machine busy?'
        if threads > 1:
            text += ' Until it is quiet, stop and --resume --threads 1 is faster (other last bits)'
        return text

def loop(run: Run, stage: str, model, loss_of, steps: int, lr: float, muon_lr: float, sample):
    """The one training loop. loss_of(step) -> {name: loss}, 'loss' is minimised; sample(run) ->
    (figures, picture). Random draws depend on (seed, stage, step) only: no generator is saved."""
    s, index = run.s, STAGES.index(stage)
    if index < STAGES.index(run.stage):
        return                                        # was done before the interruption
    opts = optimizers(model.train(), lr, muon_lr)
    begin, first, pace = time.time(), run.step, Pace()
    first and run.restore(opts)
    bar = tqdm(range(first, steps), stage, initial=first, total=steps, smoothing=.05, dynamic_ncols=True,
               disable=RANK > 0 or 'TQDM_DISABLE' in os.environ)
    for step in bar:
        pace.start()
        torch.manual_seed(data.generator(s.seed, 'train', step * 4 + index).initial_seed())
        done, cooldown = step + 1, s.pre_cooldown if stage == 'pretrain' else s.cooldown
        rise, fall = done / max(1, s.warmup * steps), (steps - step) / max(1, cooldown * steps)
        losses = loss_of(step)
        losses['loss'].backward()
        stop = exchange(model, losses, run.stop) if torchrun else run.stop
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        if not norm.isfinite():
            raise UserError(f'{stage} step {done}: gradient is not finite: lower a learning rate; '
                            f'{ {k: v.item() for k, v in losses.items()} }. Last good state: {s.out}')
        for o in opts:
            o.param_groups[0]['lr'] = o.defaults['lr'] * min(1, rise, fall)
            o.step()
        model.zero_grad()
        pace.stop()
        if done % s.log_every == 0 or done == steps:
            line = {k: round(v.item(), 4) for k, v in losses.items()}
            shown = {k: v for k, v in line.items() if not k.startswith('H_')}
            bar.set_postfix(shown, refresh=False)
            run.log(stage=stage, step=done, **line, norm=norm.item(), seconds=time.time() - begin)
            if busy := pace.warning(s.threads):
                tqdm.write(f'warning: {stage} {done}: {busy}')
            if wild := [k for k, v in shown.items() if k != 'loss' and rise > 1 and v > run.guess(k)]:
                tqdm.write(f'warning: {stage} {done}: {wild} worse than a uniform guess')
        if RANK == 0 and (done % s.sample_every == 0 or done == steps):
            model.eval()
            figures, picture = sample(run)
            v = {k: round(f if isinstance(f, float) else f['value'] or 0, 3) for k, f in figures.items()}
            run.log(stage=stage, step=done, val=v)
            tqdm.write(f'{stage} {done}: ' + ', '.join(f'{k} {x:.4g}' for k, x in v.items()))
            if v.get('used', 1) < .5:
                tqdm.write('warning: the codebook has collapsed: less than half of its codes are used')
            picture.save(run.dir / f'{stage}.png')
            model.train()
        if done < steps and (done % s.save_every == 0 or stop):
            run.save('state.safetensors', stage, done, opts)
            if stop:
                wait()
                raise UserError(f'stopped; saved {stage} step {done}. Go on: same command and --resume')
    run.stage, run.step = (STAGES[index + 1], 0) if stage != STAGES[-1] else (stage, steps)
    run.save('state.safetensors', run.stage, run.step)

# ---- the three stages ----
def part(t, B: int):
    """Of t [B * R, ...], about B pictures, the rows of this process: every RANKS-th picture's."""
    return t if t is None else t.unflatten(0, (B, -1))[min(RANK, B - 1)::RANKS].flatten(0, 1)

def train_tokenizer(run: Run):
    """Autoencode pictures and the maps of all proxies together: one codebook has to draw them all."""
    s, tok, world, maps = run.s, run.tok, run.world, list(run.world.maps.values())

    def loss_of(step):
        _, r, _ = world.scenes('train', step, s.tok_batch)
        half, most = s.tok_batch // 2, s.tok_batch * 3 // 4     # 1/2 pictures, 1/4 masks, 1/4 all
        x = torch.cat([r.image[:half], maps[0](r)[half:most],
                       *(f(r)[most + i::len(maps)] for i, f in enumerate(maps))])[RANK::RANKS]
        y, _, commitment = tok(x)                                                     # [B,3,S,S]
        mse, l1, commitment = (v / RANKS for v in (F.mse_loss(y, x), F.l1_loss(y, x), commitment))
        return {'loss': mse + .3 * l1 + .25 * commitment, 'mse': mse, 'commitment': commitment}

    def sample(run):
        _, r, _ = world.scenes('val', 0, 8)
        rows = [x for f in (*maps, PROXIES['recon']) for x in (f(r), tok.decode(tok.encode(f(r))))]
        return evaluation.tokenizer(tok, world, 128, 'val'), evaluation.grid(rows)

    loop(run, 'tokenizer', tok, loss_of, s.tok_steps, s.tok_lr, s.muon_lr, sample)
    tok.eval().requires_grad_(False)

def umm_losses(run, step: int, ask: int, draw: int, proxies: int, w_text=1., w_draw=1., late=False):
    """Mean losses: `ask` pictures with questions, `draw` texts to draw, `proxies` pictures with maps.
    H_...: the entropy of this step's tokens, near what guessing by their frequencies would reach."""
    s, world, tok, umm, out, N = run.s, run.world, run.tok, run.umm, {}, run.umm.c.grid ** 2
    entropy = lambda ids: torch.special.entr(ids.unique(return_counts=True)[1] / ids.numel()).sum()

    def add(names, B, seq, target=None, hide=0.):
        """The (text, pixel) loss of a batch of B pictures under two names, '' for none: this process's
        part of the means. The first round(hide * B) do not see their earlier codes."""
        mine, hidden = Sequence(*(part(t, B) for t in vars(seq).values())), range(round(hide * B))
        said, all_said = (t[t >= 0] for t in (mine.target, seq.target))
        mine.image = None if seq.image is None else umm.inputs(tok, mine.image)
        mine.codes = None if target is None else tok.encode(part(target, B))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=s.dtype == 'bfloat16'):
            losses = umm(mine, len(hidden[RANK::RANKS]) / len(mine.text))
        for name, loss, ids, n in zip(names, losses, (said, mine.codes), (len(all_said), B * N)):
            if name and n:                    # 0: nothing is known of these pictures, or no prompt left
                share = ids.numel() / n * (RANK < B)
                out[name] = 0 * umm.source.sum() if loss is None else loss * share
                out['H_' + name] = entropy(all_said if ids is said else ids) / RANKS

    if ask:
        Q, kinds = (s.late_questions, data.FINDING) if late else (s.questions, data.KINDS)
        add(['text'], ask, world.questions('train', 3 * step, ask, Q, kinds=kinds)[0])
    if draw and world.captions:
        add(['plan', 'draw'], draw, *world.drawings('train', 3 * step + 1, draw, s.drop))
    if proxies:
        seq, target, _ = world.proxies('train', 3 * step + 2, proxies, s.proxy)
        target = target.roll(1, 0) if s.control == 'shuffled' else target
        umm.blocks.requires_grad_(s.control != 'frozen')     # the graph of this loss alone leaves it out
        # Earlier codes tell a later one its class; hidden, each needs the picture (Bowman 2016, 3.1)
        add(['', s.proxy], proxies, seq, target, s.hide)
        umm.blocks.requires_grad_(True)
    weights = {'text': w_text, 'plan': 1., 'draw': w_draw, s.proxy: s.w_proxy}
    loss = sum(w * out[k] for k, w in weights.items() if k in out) if out else 0 * umm.source.sum()
    return {'loss': loss} | {k: v.detach() for k, v in out.items()}

sample_umm = lambda run: (evaluation.understanding(run.umm, run.tok, run.world, 128, 'val'),
                          evaluation.picture(run.umm, run.tok, run.world, run.s.cfg))

def pretrain(run: Run):
    """Text -> picture, and picture -> text (captions and questions)."""
    s = run.s
    loss_of = lambda step: umm_losses(run, step, s.pre_ask, s.pre_draw, 0, s.pre_w_text)
    loop(run, 'pretrain', run.umm, loss_of, s.pre_steps, s.lr, s.muon_lr, sample_umm)

def maps_a_step(run: Run) -> int:
    """Pictures with a map to generate in a step of post-training; a folder may have no such maps."""
    return round(run.s.ratio * run.s.post_ask) if run.s.proxy in run.world.targets else 0

def posttrain(run: Run):
    """SGT: [picture][instruction][map], loss on the map's codes only, mixed with questions."""
    s, proxies = run.s, maps_a_step(run)

    def loss_of(step):
        share, since = (2 * (2 * step >= s.post_steps), .75) if s.control == 'first' else (1, .5)
        return umm_losses(run, s.pre_steps + step, share * s.post_ask, s.post_draw,    # as much in all
                          (2 - share) * proxies, s.w_text, s.w_draw, late=step >= since * s.post_steps)
    loop(run, 'posttrain', run.umm, loss_of, s.post_steps, s.lr, s.muon_lr, sample_umm)

# ---- command line ----
def parse(argv=None) -> Settings:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    for f in fields(Settings):
        how = {'type': type(f.default), 'metavar': type(f.default).__name__}
        how = {'action': argparse.BooleanOptionalAction} if isinstance(f.default, bool) else how
        names = dict.fromkeys(('--' + f.name, '--' + f.name.replace('_', '-')))      # both spellings
        p.add_argument(*names, help=f"{f.metadata['help']} (default {f.default!r})", **how)
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    preset = given.get('preset', 'cpu')
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}: choose one of {', '.join(PRESETS)}")
    return check(Settings(**{'out': f'out/{preset}'} | PRESETS[preset] | given))

def check(s: Settings) -> Settings:
    """Name impossible settings before anything is written."""
    zero = lambda k: any(x in k for x in 'seed threads _draw ratio drop hide w_ warm cool cfg'.split())
    rules = [(k, 0 <= v < 2**62 and (v > 0 or zero(k)), f"{'' if zero(k) else 'more than '}0 to 2^62")
             for k, v in vars(s).items() if type(v) in (int, float)]
    rules += [(k, getattr(s, k) in allowed.split(), f'one of {allowed}') for k, allowed in (
        ('quantizer', 'vq fsq'), ('image_input', 'patch code'), ('dtype', 'auto float32 bfloat16'),
        ('proxy', ' '.join(PROXIES) + ' none'), ('control', 'none shuffled frozen first'))]
    rules += [('size', 16 <= s.size <= 512 and s.size % Config.patch == 0, '16 to 512, a multiple of 4'),
              ('n_embd', s.n_embd % (4 * s.n_head or 1) == 0, f'a multiple of {4 * s.n_head}'),
              ('vq_width', s.vq_width % 8 == 0, 'a multiple of 8'),
              ('ratio', s.proxy == 'none' or s.ratio * s.post_ask >= 1.5, '2 maps a step or more'),
              ('tok_batch', s.tok_batch % RANKS == 0 and s.tok_batch >= 8,
               'at least 8' + f' and a multiple of {RANKS}, the processes' * torchrun),
              *((k, getattr(s, k) <= 1, 'a share, 0 to 1') for k in ('drop', 'hide')),
              ('codebook', s.quantizer == 'vq' or s.codebook.bit_count() == 1 < s.codebook,
               'a power of 2, 2 or more, for fsq'), ('eval_n', s.eval_n >= 16, 'at least 16')]
    for name, rule in [(k, rule) for k, good, rule in rules if not good]:
        raise UserError(f'--{name} is {getattr(s, name)!r:.60}: it must be {rule}')
    return s

def main(argv=None):
    sys.stdout = open(os.devnull, 'w') if RANK else sys.stdout    # the first process logs and saves
    begin, s = time.time(), parse(argv)
    device = data.find_device(s.device)
    torchrun and join(device)
    run = Run(s, device)
    settle(run)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (run.tok, run.umm)]
    print('parameters: tokenizer {:.2f} M, UMM {:.2f} M; a uniform guess: {:.2f} nats a text token, '
          '{:.2f} a code'.format(*sizes, run.guess('text'), run.guess('draw')))
    def stop(number, _):
        run.stop = True
        torchrun or signal.signal(number, signal.SIG_DFL)                # the second one kills
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    train_tokenizer(run)
    pretrain(run)
    if run.step == 0:
        run.save('pretrained.safetensors', 'posttrain', 0)
    posttrain(run)
    torchrun and dist.destroy_process_group()
    if RANK:
        return
    run.save('model.safetensors', 'posttrain', s.post_steps)
    scores = evaluation.evaluate(run.umm, run.tok, run.world, s.eval_n, s.cfg)
    scores['minutes'] = minutes = (time.time() - begin) / 60
    evaluation.report(scores, run.dir / 'scores.json')
    evaluation.picture(run.umm, run.tok, run.world, s.cfg).save(run.dir / 'samples.png')
    out, words = shlex.quote(str(run.dir)), shlex.quote(run.world.example or 'a picture')
    again = ['train.py', *(x for x in argv or sys.argv[1:] if x not in ('--resume', '--overwrite'))]
    print(f"""\n{minutes:.1f} minutes{' since --resume' * s.resume}. Look at {out}/samples.png, then:
    python sample.py draw {words} --n 1 --checkpoint {out}/model.safetensors
    python {shlex.join(again)} --init {out}/pretrained.safetensors --proxy edge --out out/edge
which teaches edges instead of segmentation: what changes?""")

if __name__ == '__main__':
    data.guard(main)
