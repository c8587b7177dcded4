"""Train a unified multimodal model from nothing, in three stages that share one loop:

    tokenizer   pictures and maps -> codes -> the same pictures
    pretrain    text -> picture, and picture -> text (captions and questions)
    posttrain   SGT (arXiv 2605.18714): picture -> segmentation map, 2:1 with questions

    python train.py                      everything, then the evaluation; writes out/cpu
    python train.py --until tokenizer    one stage; --resume goes on with the next ones
    python train.py --resume             the same command and --resume: go on after an interruption
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
import sample
from data import MAPS, UserError
from folder import open_world
from model import (UMM, Config, VQTokenizer, check_fields, check_together, load, save, setting,
                   state_of)

STAGES = ('tokenizer', 'pretrain', 'posttrain')
DONE = 'done'                  # the stage of a run that has finished all of them

# torchrun starts several processes, each with a part of every batch; without it there is one.
SEVERAL = dist.is_available() and dist.is_torchelastic_launched()
RANK = int(os.environ['RANK']) if SEVERAL else 0
RANKS = int(os.environ['WORLD_SIZE']) if SEVERAL else 1


# ---- settings ----
@dataclass
class Settings(Config):
    """The command line: each field, those of Config too, is a flag. Defaults are the cpu preset's."""
    preset: str = setting('cpu', 'cpu: small, for a GPU too; gpu: larger, not measured yet; test: tiny')
    out: str = setting('', 'run folder; when not given: out/<preset>')
    resume: bool = setting(False, 'go on with the run in the folder')
    overwrite: bool = setting(False, 'throw away the run in the folder')
    until: str = setting('posttrain', 'last stage to train', one_of=STAGES)
    data: str = setting('', 'folder of real pictures, see README; empty: the procedural world')
    skip_bad: bool = setting(False, 'leave out bad rows of --data instead of stopping')
    init: str = setting('', 'a pretrained.safetensors to post-train, instead of the first two stages')
    seed: int = setting(0, 'seed of weights, scenes, order and questions')
    device: str = setting('auto', 'cpu, cuda, mps, or auto: cuda where there is one, else cpu')
    dtype: str = setting('auto', 'of matrix products; auto: the faster one here',
                         one_of=('auto', 'float32', 'bfloat16'))
    threads: int = setting(0, 'CPU threads; 0: all cores or one, the faster one here')
    tok_steps: int = setting(900, 'steps of the tokenizer stage', least=1)
    tok_batch: int = setting(32, 'pictures a step', least=8)
    pre_steps: int = setting(660, 'steps of the pretrain stage', least=1)
    pre_ask: int = setting(1, 'pictures with questions a step, pretraining', least=1)
    pre_draw: int = setting(32, 'pictures drawn from text a step, pretraining')
    post_steps: int = setting(900, 'steps of the posttrain stage', least=1)
    post_ask: int = setting(8, 'pictures with questions a step, post-training', least=1)
    post_draw: int = setting(8, 'pictures drawn a step, post-training: against forgetting')
    ratio: float = setting(2., 'pictures with maps for each one with questions, post-training')
    proxy: str = setting('seg', 'map to generate, post-training', one_of=(*MAPS, 'none'))
    questions: int = setting(12, 'questions asked about each picture', least=1)
    late_questions: int = setting(36, 'in the second half of post-training: mostly to find things',
                                  least=1)
    tok_lr: float = setting(4e-3, 'AdamW learning rate of the tokenizer stage', least=1e-12)
    lr: float = setting(2e-3, 'AdamW learning rate of the other stages: embeddings, heads', least=1e-12)
    muon_lr: float = setting(.02, 'Muon learning rate: hidden matrices, all stages', least=1e-12)
    warmup: float = setting(.02, 'share of a stage in which the learning rate rises', most=1)
    cooldown: float = setting(.4, 'share of a stage, at its end, in which it falls', most=1)
    pre_cooldown: float = setting(.1, 'the same for pretrain, which another stage follows',
                                  most=1)
    clip: float = setting(1., 'largest norm of the gradient', least=1e-12)
    w_text: float = setting(1., 'weight of the mean loss of answers about pictures')
    pre_w_text: float = setting(.1, 'the same in the pretrain stage, where it slows drawing')
    w_draw: float = setting(.4, 'weight of the mean loss of drawings, post-training; of plans: 1',
                            least=0)
    w_proxy: float = setting(.6, 'weight of the mean loss of maps')
    hide: float = setting(.75, 'share of the maps written without sight of their earlier codes',
                          least=0, most=1)
    drop: float = setting(.1, 'share of empty prompts, for classifier-free guidance', most=1)
    cfg: float = setting(2., 'guidance scale in the evaluation')
    eval_n: int = setting(512, 'pictures in the evaluation', least=16)
    log_every: int = setting(20, 'steps between log lines', least=1)
    save_every: int = setting(200, 'steps between checkpoints', least=1)
    sample_every: int = setting(400, 'steps between sample pictures', least=1)


PRESETS = {
    'cpu': {},
    'gpu': dict(
        size=64, codebook=1024, vq_width=192, vq_depth=3, n_layer=8, n_head=8, n_embd=384,
        tok_steps=4000, tok_batch=128, pre_steps=6000, pre_ask=32, pre_draw=48, post_steps=3000,
        post_ask=20, post_draw=8, late_questions=12, eval_n=2048, save_every=1000, sample_every=1000),
    'test': dict(
        size=16, codebook=64, vq_width=16, vq_depth=1, n_layer=1, n_head=2, n_embd=32,
        tok_steps=8, tok_batch=8, pre_steps=6, pre_ask=4, pre_draw=4, post_steps=6,
        post_ask=2, post_draw=2, questions=4, late_questions=6, eval_n=32, log_every=2, save_every=4,
        sample_every=8),
}


def parse(argv=None) -> Settings:
    """Of a command line -> checked settings: defaults, changed by the preset, changed by flags."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        if not f.metadata:
            continue                                           # vocab follows from the data
        names = [f'--{f.name}']
        if '_' in f.name:
            names.append('--' + f.name.replace('_', '-'))      # both spellings
        help = f"{f.metadata['help']} (default {f.default!r})"
        if isinstance(f.default, bool):
            p.add_argument(*names, help=help, action=argparse.BooleanOptionalAction)
        else:
            kind = type(f.default)
            p.add_argument(*names, help=help, type=kind, metavar=kind.__name__)
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    preset = given.get('preset', 'cpu')
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}: choose one of {', '.join(PRESETS)}")
    s = Settings(**{'out': f'out/{preset}', **PRESETS[preset], **given})
    check(s)
    return s


def check(s: Settings):
    """Name impossible settings before anything is written."""
    try:
        check_fields(s)
        check_together(s)
    except ValueError as e:
        raise UserError(f'--{e}')
    if s.proxy != 'none' and s.ratio * s.post_ask < 1.5:
        raise UserError(f'--ratio is {s.ratio}: it must be such that a step has 2 maps')


# ---- optimizers: Muon for hidden matrices, AdamW for all else ----
def orthogonalize(G, steps=5):
    """Roughly the nearest orthogonal matrices, by Newton-Schulz (Jordan et al. 2024); G [n, a, b]."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    for _ in range(steps):
        A = X @ X.mT                                                                  # [n,min,min]
        B = 2.0315 * A @ A - 4.7750 * A
        X = 3.4445 * X + B @ X
    if tall:
        X = X.mT
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: all directions of a matrix move equally far (Jordan et al. 2024).
    torch.optim.Muon always computes in bfloat16, 100 times slower than float32 on a CPU without bfloat16
    units; this one keeps the type of the weights. Of a convolution all axes but the first are one."""

    def __init__(self, params, lr, momentum=.95, decay=.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}                        # matrices of one shape are orthogonalized together
            for p in group['params']:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(m, group['momentum'])     # Nesterov
                by_shape.setdefault(p.shape, []).append((p, update.flatten(1)))       # [a,b]
            for same in by_shape.values():
                U = orthogonalize(torch.stack([u for _, u in same]))                  # [n,a,b]
                a, b = U.shape[1:]
                lr = group['lr']
                for (p, _), u in zip(same, U):
                    p.mul_(1 - lr * group['decay'])
                    p.add_(u.view_as(p), alpha=-lr * max(1, a / b) ** .5)


def optimizers(model, lr: float, muon_lr: float) -> list:
    """Muon for the matrices that the model names, AdamW for all else."""
    hidden = model.hidden_matrices()
    known = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in known]
    adamw = torch.optim.AdamW(rest, lr, (.9, .95), weight_decay=0., fused=True)
    return [Muon(hidden, muon_lr), adamw]


# ---- several processes: each draws its own pictures, gradients are averaged ----
def my_share(pictures: int) -> int:
    """How many of a batch's pictures this process draws: the same number as every other."""
    return math.ceil(pictures / RANKS)


def my_index(step: int) -> int:
    """The number of this process's batch: no two processes see the same one."""
    return step * RANKS + RANK


def join(device):
    """Become one of several processes, on a GPU of its own."""
    how = 'gloo'
    if device.type == 'cuda':
        how = 'nccl'
        gpus, mine = torch.cuda.device_count(), int(os.environ['LOCAL_RANK'])
        if mine >= gpus:
            raise UserError(f'torchrun started more processes than GPUs: --nproc_per_node={gpus}')
        torch.cuda.set_device(mine)
    dist.init_process_group(how, timeout=timedelta(hours=4))   # while one decodes a folder


def together(call, *args):
    """A call that all processes make; one line where another has ended."""
    try:
        call(*args)
    except RuntimeError as e:
        raise UserError(f'another process has ended, see its message ({str(e)[:60]})')


def wait():
    """Until all processes are here."""
    if SEVERAL:
        together(dist.barrier)


def average_gradients(model, stop: bool) -> bool:
    """Over all processes, by one sum -> has any of them been told to stop?"""
    params = list(model.parameters())
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    told = params[0].new_tensor([float(stop)])
    flat = torch.cat([p.grad.flatten() for p in params] + [told])
    together(dist.all_reduce, flat)
    sizes = [p.numel() for p in params]
    *means, told = (flat / RANKS).split([*sizes, 1])
    for p, mean in zip(params, means):
        p.grad.copy_(mean.view_as(p))
    return bool(told > 0)


# ---- a run: its folder, log and checkpoint ----
@dataclass
class Control:
    """What an experiment changes about the maps; training itself changes nothing."""
    change_target: Callable = lambda maps: maps        # [B, 3, S, S] -> what is taught instead
    frozen: bool = False                               # the map's loss moves no block
    amounts: Callable | None = None                    # (step, steps) -> shares of questions and of maps


class Run:
    """The folder of a run: log.jsonl, sample pictures and the checkpoint it can be resumed from."""

    def __init__(self, s: Settings, device):
        self.s, self.device = s, device
        self.dir = Path(s.out)
        self.control = Control()
        self.stage, self.step = STAGES[0], 0
        self.saved = {}                                        # all tensors of a resumed run
        self.stop = False                                      # told to, by a signal
        self.lines = []                                        # of the log
        state = self.dir / 'state.safetensors'
        model = self.dir / 'model.safetensors'
        text, meta = None, {}
        if s.resume:
            text, meta = self.resume(state)
        elif (state.exists() or model.exists()) and not s.overwrite:
            raise UserError(f'{s.out} holds a run: --resume goes on with it, --overwrite throws it '
                            'away, --out DIR keeps it and trains elsewhere')
        elif s.init:
            text = self.begin_from(s.init)
        self.world = self.open_data(text)
        if s.resume and self.world.checksum != meta.get('checksum', 0):
            raise UserError(f'{s.data} has changed since the run began: restore it or --overwrite this')
        if s.proxy not in (*self.world.maps, 'none'):
            raise UserError(f'--proxy is {s.proxy!r}: {s.data} has no such maps; choose from '
                            f"{', '.join(self.world.maps)} or none")
        self.dir.mkdir(parents=True, exist_ok=True)
        self.open_log(meta.get('lines', 0))
        if not s.resume:
            state.unlink(missing_ok=True)
            model.unlink(missing_ok=True)
        if not s.resume and not s.init:
            shared = {f.name: getattr(s, f.name) for f in fields(Config)}
            c = Config(**{**shared, 'vocab': self.world.text.size})
            torch.manual_seed(s.seed)
            self.tok, self.umm = VQTokenizer(c).to(device), UMM(c).to(device)
        self.tok.to(memory_format=torch.channels_last)

    def resume(self, state: Path):
        """Take up what was saved -> (text tokens, meta); the settings must be those it began with."""
        s = self.s
        if not state.exists():
            raise UserError(f'nothing to resume: there is no {state}; leave out --resume to start')
        self.tok, self.umm, text, self.saved, meta = load(state, self.device)
        self.stage, self.step = meta['stage'], meta['step']
        if self.stage not in (*STAGES, DONE):
            raise UserError(f'{state} is of stage {self.stage!r:.30}, not of {STAGES}: train again')
        old = meta['settings']
        if s.dtype == 'auto':                  # what was chosen when the run began: the same bits
            s.dtype = old['dtype']
        if s.threads == 0:
            s.threads = old['threads']
        free = ('resume', 'overwrite', 'out', 'device', 'threads', 'until', 'vocab')
        for name, value in vars(s).items():
            if name not in free and old.get(name) != value:
                raise UserError(f'--resume needs the settings that the run in {s.out} began with: '
                                f'{name} is {value!r} here, {old.get(name)!r} there')
        return text, meta

    def begin_from(self, path: str):
        """Post-train another run's model -> text tokens."""
        self.tok, self.umm, text, _, _ = load(path, self.device)
        self.stage = 'posttrain'
        for f in fields(Config):
            theirs, ours = getattr(self.umm.c, f.name), getattr(self.s, f.name)
            if f.name != 'vocab' and theirs != ours:
                raise UserError(f'--{f.name} is {ours!r}, but {path} was made with {theirs!r}')
        return text

    def open_data(self, text):
        """The first process decodes a folder, the others find it decoded."""
        s = self.s
        if RANK > 0:
            wait()
        world = open_world(s.data, s.size, s.seed, self.device, text, s.skip_bad)
        if RANK == 0:
            wait()
        return world

    def open_log(self, lines: int):
        """log.jsonl, cut after the first `lines`: later steps are done again."""
        path = self.dir / 'log.jsonl'
        if RANK > 0:
            path = os.devnull
        if lines and RANK == 0:
            with open(path, newline='\n') as f:
                self.lines = f.readlines()[:lines]
        self.logfile = open(path, 'w', 1, newline='\n')        # line buffered
        self.logfile.writelines(self.lines)

    def log(self, **line):
        self.lines.append(json.dumps(line) + '\n')
        self.logfile.write(self.lines[-1])

    def save(self, name: str, stage: str, step: int, opts=()):
        """Weights, and with `opts` the optimizers' state: enough to sample, to evaluate or to resume."""
        if RANK > 0:
            return
        tensors = state_of(self.tok, self.umm)
        for i, optimizer in enumerate(opts):
            for j, state in optimizer.state_dict()['state'].items():
                for key, tensor in state.items():
                    tensors[f'optimizer.{i}.{j}.{key}'] = tensor
        vocab = [token.hex() for token in self.world.text.vocab]
        meta = {'config': vars(self.umm.c), 'text': vocab, 'settings': vars(self.s), 'stage': stage,
                'step': step, 'lines': len(self.lines), 'checksum': self.world.checksum}
        save(self.dir / name, tensors, meta)

    def restore(self, opts):
        """Put the saved state back, in the memory layout of the parameters: fused AdamW counts on it."""
        for name, tensor in self.saved.items():
            if not name.startswith('optimizer.'):
                continue
            _, i, j, key = name.split('.')
            p = opts[int(i)].param_groups[0]['params'][int(j)]
            like = p if tensor.shape == p.shape else tensor
            mine = torch.empty_like(like, device=p.device)
            opts[int(i)].state[p][key] = mine.copy_(tensor)

    def guess(self, loss: str) -> float:
        """The loss of a uniform guess in nats, of text or of codes."""
        c = self.umm.c
        return math.log(c.vocab if loss in ('text', 'plan') else c.codebook)


# ---- how fast this machine is, and in what ----
def seconds_a_step(run: Run, dtype: str, threads: int, limit=math.inf) -> float:
    """Time the forward and backward pass of a step of post-training: best of three, the first warms up.
    Slower than `limit` or 3 seconds, it is not tried again. No optimizer: nothing is learned."""
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
        if SEVERAL:
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

    def look(self) -> float:
        """Mean seconds of the steps since the last look."""
        self.mean = sum(self.recent) / len(self.recent)
        self.before, self.recent = self.best, []
        self.best = min(self.best, self.mean)
        return self.mean

    def warning(self, threads: int) -> str:
        """What to say, once, when the steps last looked at took twice as long as those before."""
        if self.warned or self.mean < 2 * self.before:
            return ''
        self.warned = True
        text = f'steps take {self.mean / self.before:.1f} times as long as before: is the machine busy?'
        if threads > 1:
            text += ' Until it is quiet, stop and --resume --threads 1 is faster (other last bits)'
        return text


# ---- the loop ----
def loop(run: Run, stage: str, model, loss_of, steps: int, lr: float, pictures: int, look):
    """The one training loop. loss_of(step) -> {name: loss}, 'loss' is minimised; look() -> (figures, a
    picture) of the model so far. Random draws depend on (seed, stage, step) only: no generator is
    saved."""
    s, index = run.s, STAGES.index(stage)
    if run.stage != stage:
        return                                                 # done before the interruption
    opts = optimizers(model.train(), lr, s.muon_lr)
    first, pace, begin = run.step, Pace(), time.time()
    if first > 0:
        run.restore(opts)
    quiet = RANK > 0 or 'TQDM_DISABLE' in os.environ
    bar = tqdm(range(first, steps), stage, initial=first, total=steps, smoothing=.05,
               dynamic_ncols=True, disable=quiet)
    for step in bar:
        done = step + 1
        pace.start()
        torch.manual_seed(random_key(s.seed, step, index))
        losses = loss_of(step)
        losses['loss'].backward()
        if SEVERAL:
            run.stop = average_gradients(model, run.stop)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        if not norm.isfinite():
            values = {k: v.item() for k, v in losses.items()}
            raise UserError(f'{stage} step {done}: gradient is not finite: lower a learning rate; '
                            f'{values}. Last good state: {s.out}')
        rate = schedule(s, stage, step, steps)
        for optimizer in opts:
            optimizer.param_groups[0]['lr'] = optimizer.defaults['lr'] * rate
            optimizer.step()
        model.zero_grad()
        pace.stop()
        if done % s.log_every == 0 or done == steps:
            shown = {k: round(v.item(), 4) for k, v in losses.items()}
            bar.set_postfix(shown, refresh=False)
            seconds = pace.look()
            run.log(stage=stage, step=done, **shown, norm=norm.item(), lr=lr * rate,
                    seconds=time.time() - begin, pictures_per_second=pictures / seconds)
            warn(run, stage, done, shown, pace, warm=done > s.warmup * steps)
        if RANK == 0 and (done % s.sample_every == 0 or done == steps):
            show(run, stage, done, model, look)
        if done < steps and (done % s.save_every == 0 or run.stop):
            run.save('state.safetensors', stage, done, opts)
            if run.stop:
                wait()
                raise UserError(f'stopped; saved {stage} step {done}. Go on: same command and --resume')
    run.stage, run.step = (*STAGES, DONE)[index + 1], 0
    run.save('state.safetensors', run.stage, run.step)


def random_key(seed: int, step: int, stage: int) -> int:
    """Of the step's random draws that are not the data's."""
    return data.generator(seed, 'train', STAGES[stage], step).initial_seed()


def schedule(s: Settings, stage: str, step: int, steps: int) -> float:
    """Share of the learning rate: it rises, stays, and falls to zero."""
    cooldown = s.pre_cooldown if stage == 'pretrain' else s.cooldown
    rise = (step + 1) / max(1, s.warmup * steps)
    fall = (steps - step) / max(1, cooldown * steps)
    return min(1, rise, fall)


def warn(run: Run, stage: str, done: int, losses: dict, pace: Pace, warm: bool):
    """Say what looks wrong: losses above a guess once the learning rate has risen, slow steps."""
    wild = [k for k, v in losses.items() if k != 'loss' and v > run.guess(k)]
    if wild and warm:
        tqdm.write(f'warning: {stage} {done}: {wild} worse than a uniform guess')
    busy = pace.warning(run.s.threads)
    if busy:
        tqdm.write(f'warning: {stage} {done}: {busy}')


def show(run: Run, stage: str, done: int, model, look):
    """Log validation figures and write a sample picture."""
    model.eval()
    figures, picture = look()
    values = {}
    for name, f in figures.items():
        value = f if isinstance(f, float) else f['value']
        if value is not None:                                  # nothing was measured: nothing is said
            values[name] = round(value, 3)
    run.log(stage=stage, step=done, val=values)
    tqdm.write(f'{stage} {done}: ' + ', '.join(f'{k} {v:.4g}' for k, v in values.items()))
    if values.get('used', 1) < .5:
        tqdm.write('warning: the codebook has collapsed: less than half of its codes are used')
    picture.save(run.dir / f'{stage}.png')
    model.train()


# ---- the three stages ----
def train_tokenizer(run: Run):
    """Autoencode pictures and all maps together: one codebook has to draw them all. Half of a batch are
    pictures, a quarter masks, a quarter maps of all kinds."""
    s, tok, world = run.s, run.tok, run.world
    B = my_share(s.tok_batch)
    kinds = [name for name in world.targets if name != 'recon']
    masks = 'seg' if 'seg' in kinds else kinds[0]

    def loss_of(step):
        _, r, _ = world.scenes('train', 'tokenizer', my_index(step), B)
        half, most = B // 2, B * 3 // 4
        parts = [r.image[:half], MAPS[masks].draw(r)[half:most]]
        for i, name in enumerate(kinds):
            parts.append(MAPS[name].draw(r)[most + i::len(kinds)])
        x = torch.cat(parts)                                                          # [B,3,S,S]
        y, _, commitment = tok(x)
        mse, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
        return {'loss': mse + .3 * l1 + .25 * commitment, 'mse': mse, 'commitment': commitment}

    def look():
        _, r, _ = world.scenes('val', 'samples', 0, 8)
        rows = []
        for name in world.targets:
            x = MAPS[name].draw(r)
            rows += [x, tok.decode(tok.encode(x))]
        return evaluation.tokenizer(tok, world, 128, 'val'), sample.grid(rows)

    loop(run, 'tokenizer', tok, loss_of, s.tok_steps, s.tok_lr, s.tok_batch, look)
    tok.eval().requires_grad_(False)


def umm_losses(run: Run, step: int, ask: int, draw: int, maps: int, w_text=1., w_draw=1., late=False):
    """Mean losses of a step: `ask` pictures with questions, `draw` texts to draw, `maps` pictures with
    maps. What nothing is known of is left out; late: ask more, mostly to find things."""
    s, world, tok, umm = run.s, run.world, run.tok, run.umm
    index, out = my_index(step), {}

    def losses_of(seq, target=None, hide=0.):
        """(text loss, pixel loss) of a batch; `hide`: share that does not see its earlier codes."""
        if seq.image is not None:
            seq.image = umm.inputs(tok, seq.image)
        if target is not None:
            seq.codes = tok.encode(target)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=s.dtype == 'bfloat16'):
            return umm(seq, hide)

    if ask:
        Q, kinds = (s.late_questions, world.asked_late) if late else (s.questions, world.asked)
        seq, _ = world.questions('train', index, my_share(ask), Q, kinds=kinds)
        out['text'], _ = losses_of(seq)
    if draw and world.captions:
        seq, target = world.drawings('train', index, my_share(draw), s.drop)
        out['plan'], out['draw'] = losses_of(seq, target)
    if maps:
        seq, target, _ = world.maps_to_draw('train', index, my_share(maps), s.proxy)
        target = run.control.change_target(target)
        umm.blocks.requires_grad_(not run.control.frozen)      # the graph of this loss alone
        # Earlier codes tell a later one its class; hidden, each needs the picture (Bowman 2016, 3.1)
        _, out[s.proxy] = losses_of(seq, target, s.hide)
        umm.blocks.requires_grad_(True)
    weights = {'text': w_text, 'plan': 1., 'draw': w_draw, s.proxy: s.w_proxy}
    out = {name: loss for name, loss in out.items() if loss is not None}
    total = 0 * umm.source.sum()                               # where nothing is known of the pictures
    for name, loss in out.items():
        total = total + weights[name] * loss
    return {'loss': total} | {name: loss.detach() for name, loss in out.items()}


def look_at_umm(run: Run):
    """Understanding of validation pictures, and a picture of what the model can do."""
    figures = evaluation.understanding(run.umm, run.tok, run.world, 128, 'val')
    return figures, sample.picture(run.umm, run.tok, run.world, run.s.cfg)


def pretrain(run: Run):
    """Text -> picture, and picture -> text (captions and questions)."""
    s = run.s

    def loss_of(step):
        return umm_losses(run, step, s.pre_ask, s.pre_draw, 0, s.pre_w_text)

    loop(run, 'pretrain', run.umm, loss_of, s.pre_steps, s.lr, s.pre_ask + s.pre_draw,
         lambda: look_at_umm(run))


def maps_a_step(run: Run) -> int:
    """Pictures with a map to generate in a step of post-training."""
    if run.s.proxy == 'none':
        return 0
    return round(run.s.ratio * run.s.post_ask)


def posttrain(run: Run):
    """SGT: [picture][instruction][map], loss on the map's codes only, mixed with questions."""
    s, maps = run.s, maps_a_step(run)

    def loss_of(step):
        ask_share, map_share, late = 1, 1, step >= s.post_steps / 2
        if run.control.amounts is not None:
            ask_share, map_share, late = run.control.amounts(step, s.post_steps)
        return umm_losses(run, s.pre_steps + step, ask_share * s.post_ask, s.post_draw,
                          map_share * maps, s.w_text, s.w_draw, late)

    loop(run, 'posttrain', run.umm, loss_of, s.post_steps, s.lr, s.post_ask + s.post_draw + maps,
         lambda: look_at_umm(run))


# ---- command line ----
def main(argv=None):
    begin, s = time.time(), parse(argv)
    if RANK > 0:
        sys.stdout = open(os.devnull, 'w')                     # the first process talks
    device = data.find_device(s.device)
    if SEVERAL:
        join(device)
    run = Run(s, device)
    settle(run)
    sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (run.tok, run.umm)]
    print('parameters: tokenizer {:.2f} M, UMM {:.2f} M; a uniform guess: {:.2f} nats a text token, '
          '{:.2f} a code'.format(*sizes, run.guess('text'), run.guess('draw')))

    def stop(number, _):
        run.stop = True
        if not SEVERAL:
            signal.signal(number, signal.SIG_DFL)              # the second one kills

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    for stage, train in zip(STAGES, (train_tokenizer, pretrain, posttrain)):
        if stage == 'posttrain' and run.step == 0:
            run.save('pretrained.safetensors', 'posttrain', 0)
        train(run)
        if stage == s.until:
            break
    if SEVERAL:
        dist.destroy_process_group()
    if RANK == 0:
        finish(run, begin)


def finish(run: Run, begin: float):
    """Keep the model and measure what it has learned so far."""
    s = run.s
    run.save('model.safetensors', run.stage, 0)
    umm = None if run.stage == 'pretrain' else run.umm         # not trained yet
    scores = evaluation.evaluate(umm, run.tok, run.world, s.eval_n, s.cfg)
    scores['minutes'] = (time.time() - begin) / 60
    evaluation.report(scores, run.dir / 'scores.json')
    since = ' since --resume' if s.resume else ''
    print(f"\n{scores['minutes']:.1f} minutes{since}")
    checkpoint = run.dir / 'model.safetensors'
    if umm is None:
        print(f'python sample.py reconstruct PICTURE --checkpoint {checkpoint}')
        return
    sample.picture(umm, run.tok, run.world, s.cfg).save(run.dir / 'samples.png')
    print(f'Look at {run.dir}/samples.png, then:\n'
          f'python sample.py draw "{run.world.example}" --n 1 --checkpoint {checkpoint}')


if __name__ == '__main__':
    data.guard(main)
