"""Train a unified multimodal model from nothing, in three stages that share one loop:

    tokenizer   pictures and maps -> codes -> the same pictures
    pretrain    text -> picture, and picture -> text (captions and questions)
    posttrain   SGT (arXiv 2605.18714): picture -> segmentation map, 2:1 with questions

    python train.py                      everything, then the evaluation; writes out/cpu
    python train.py --until tokenizer    one stage; --resume goes on with the next ones
    python train.py --resume             the same command and --resume: go on after an interruption

In reading order: the settings; the optimizers; what several processes need; a run's folder, log and
checkpoint; how type and threads are chosen; the loop that all stages share; the losses; the stages.

Where the losses of the second and third stage live (sequences as in model.py, * = supervised):

    text    [picture][question *answer*]                       answers and captions
    plan             [prompt   *plan*  ]                       what is where, before a drawing
    draw             [prompt    plan   ][*codes of the picture*]
    seg     [picture][instruction      ][*codes of the map*]   or another map, see --proxy

The first loss is ln V for text and ln K for codes, a uniform guess: the heads begin at zero.
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
from itertools import product
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
from model import BEFORE, UMM, Config, VQTokenizer, both, check_config, load, save, setting

STAGES = ('tokenizer', 'pretrain', 'posttrain')
DONE = 'done'                  # the stage of a run that has finished all of them
NEXT = {before: stage for stage, before in BEFORE.items()}
WRITTEN = ('pretrained.safetensors', 'scores.json', 'samples.png',
           *[f'{stage}.png' for stage in STAGES])      # beside state, model and log

# torchrun starts several processes, each with a part of every batch; without it there is one.
SEVERAL = dist.is_available() and dist.is_torchelastic_launched()
RANK = int(os.environ['RANK']) if SEVERAL else 0
RANKS = int(os.environ['WORLD_SIZE']) if SEVERAL else 1


# ---- settings ----
# One dataclass is the command line, its help and what the checkpoint remembers. Each default stands
# once, with its meaning and its bounds; what both networks need to be rebuilt stands in model.Config.
@dataclass
class Settings(Config):
    """The command line: each field, those of Config too, is a flag. Defaults are the cpu preset's."""
    # -- the run
    preset: str = setting('cpu', 'cpu: small, for a GPU too; gpu: larger, not measured yet; test: tiny',
                          one_of=('cpu', 'gpu', 'test'))
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
    # -- the tokenizer stage
    tok_steps: int = setting(900, 'steps of the tokenizer stage', least=1)
    tok_batch: int = setting(32, 'pictures a step', least=8)
    # -- the pretrain stage: drawing from text takes most of it; a few questions keep reading alive
    pre_steps: int = setting(660, 'steps of the pretrain stage', least=1)
    pre_ask: int = setting(1, 'pictures with questions a step, pretraining', least=1)
    pre_draw: int = setting(32, 'pictures drawn from text a step, pretraining')
    # -- the posttrain stage: SGT's mixture, maps and questions 2:1, and drawings not to forget them
    post_steps: int = setting(1000, 'steps of the posttrain stage', least=1)
    post_ask: int = setting(8, 'pictures with questions a step, post-training', least=1)
    post_draw: int = setting(8, 'pictures drawn a step, post-training: against forgetting')
    ratio: float = setting(2., 'pictures with maps for each one with questions, post-training')
    proxy: str = setting('seg', 'map to generate, post-training', one_of=(*MAPS, 'none'))
    # -- questions about one picture share it: they are nearly free
    questions: int = setting(12, 'questions asked about each picture', least=1)
    late_questions: int = setting(36, 'the same in the later part of post-training', least=1)
    late_from: float = setting(.1, 'share of post-training after which these are asked', most=1)
    # -- optimizers
    tok_lr: float = setting(4e-3, 'AdamW learning rate of the tokenizer stage', least=1e-12)
    lr: float = setting(2e-3, 'AdamW learning rate of the other stages: embeddings, heads', least=1e-12)
    muon_lr: float = setting(.02, 'Muon learning rate: hidden matrices, all stages', least=1e-12)
    # -- what the losses count
    w_text: float = setting(1., 'weight of the mean loss of answers about pictures, post-training')
    w_draw: float = setting(.4, 'weight of the mean loss of drawings, post-training; of plans: 1')
    w_proxy: float = setting(.6, 'weight of the mean loss of maps')
    # -- how maps are taught
    hide: float = setting(.75, 'share of maps written without sight of their earlier codes', most=1)
    # -- measuring and saving
    cfg: float = setting(2., 'guidance scale in the evaluation')
    eval_n: int = setting(512, 'pictures in the evaluation', least=16)
    log_every: int = setting(20, 'steps between log lines', least=1)
    save_every: int = setting(200, 'steps between checkpoints', least=1)
    sample_every: int = setting(400, 'steps between sample pictures', least=1)


# What a preset changes of the defaults. gpu: pictures of 64 x 64, 15 M parameters, batches that fit into
# 8 GB in bfloat16. test: everything as small as can be, for the tests.
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
    """Of a command line -> checked settings: defaults, changed by the preset, changed by flags. Every
    field of Settings is a flag: to add a setting, add a field."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        names = [f'--{f.name}']
        if '_' in f.name:
            names.append('--' + f.name.replace('_', '-'))      # both spellings
        help = f"{f.metadata['help']} (default {f.default!r})"
        if isinstance(f.default, bool):
            p.add_argument(*names, help=help, action=argparse.BooleanOptionalAction)
        else:
            kind = type(f.default)
            p.add_argument(*names, help=help, type=kind, metavar=kind.__name__)
    # a flag that was not typed is None; later dicts win over earlier ones
    typed = vars(p.parse_args(argv))
    given = {name: value for name, value in typed.items() if value is not None}
    preset = given.get('preset', 'cpu')
    values = {'out': f'out/{preset}', **PRESETS.get(preset, {}), **given}
    s = Settings(**values)
    check(s)
    return s


def check(s: Settings):
    """UserError for impossible settings, before anything is written."""
    try:
        check_config(s)
    except ValueError as e:
        raise UserError(f'--{e}')
    if s.init and s.until != 'posttrain':
        raise UserError(f'--until is {s.until!r}: with --init the stages up to it are done already')


# ---- optimizers: Muon for hidden matrices, AdamW for all else ----
# AdamW scales each weight's step by itself; a matrix then moves mostly along its few strongest
# directions. Muon makes all singular values of the step alike, so that weak directions learn as fast. It
# is meant for matrices between hidden states; embeddings, heads and vectors have no such directions.
def orthogonalize(G, steps=5):
    """Roughly the nearest orthogonal matrices, by Newton-Schulz (Jordan et al. 2024); G [n, a, b]. Each
    step applies an odd polynomial to the singular values, which drives all of them towards 1."""
    norm = G.norm(dim=(-2, -1), keepdim=True)                                         # [n,1,1]
    X = G / (norm + 1e-7)                                      # no singular value above 1
    a, b = X.shape[-2:]
    tall = a > b
    if tall:                                                   # the smaller side first: cheaper
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

    With the gradient G: m <- .95 m + .05 G; u = .05 G + .95 m; W <- (1 - lr * decay) W - length * U, U
    the nearest orthogonal matrix to u, length = lr * sqrt(rows / columns) for tall matrices, else lr.
    torch.optim.Muon always computes in bfloat16, 100 times slower than float32 on a CPU without bfloat16
    units; this one keeps the type of the weights. Of a convolution all axes but the first are one."""

    MOMENTUM = .95
    DECAY = .1

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}                        # matrices of one shape are orthogonalized together
            for p in group['params']:
                if p.grad is None:               # it had no part in this step
                    continue
                state = self.state[p]
                m = state.setdefault('momentum', torch.zeros_like(p))
                m.lerp_(p.grad, 1 - self.MOMENTUM)
                update = p.grad.lerp(m, self.MOMENTUM)     # Nesterov
                same = by_shape.setdefault(p.shape, [])
                same.append((p, update.flatten(1)))                                   # [a,b]
            lr = group['lr']
            for same in by_shape.values():
                stack = torch.stack([update for _, update in same])                   # [n,a,b]
                U = orthogonalize(stack)
                a, b = U.shape[1:]
                length = lr * max(1, a / b) ** .5              # an output moves as far at any shape
                for (p, _), u in zip(same, U):
                    p.mul_(1 - lr * self.DECAY)
                    p.add_(u.view_as(p), alpha=-length)


def optimizers(model, lr: float, muon_lr: float) -> list:
    """Muon for the matrices that the model names, AdamW for all else."""
    hidden = model.hidden_matrices()
    known = set(hidden)
    rest = [p for p in model.parameters() if p not in known]
    adamw = torch.optim.AdamW(rest, lr, (.9, .95), weight_decay=0., fused=True)
    return [Muon(hidden, muon_lr), adamw]


# ---- several processes: each draws its own pictures, gradients are averaged ----
# As one process with the same number of pictures a step, up to which pictures these are. All processes
# start from the same weights and add the same averaged gradients, so they stay alike; the first writes.
def my_share(pictures: int) -> int:
    """How many of a batch's pictures this process draws: the same number as every other. Rounded up,
    so that a step may see a few more pictures than with one process."""
    return math.ceil(pictures / RANKS)


def my_index(step: int) -> int:
    """The number of this process's batch: no two processes see the same one."""
    return step * RANKS + RANK


def join(device):
    """Become one of several processes, on a GPU of its own."""
    how = 'gloo'                                               # sums over CPUs
    if device.type == 'cuda':
        how = 'nccl'                                           # over GPUs
        gpus = torch.cuda.device_count()
        mine = int(os.environ['LOCAL_RANK'])
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
    """Over all processes, by one sum -> has any of them been told to stop?

    The stop travels with the gradients, so that all processes end after the same step."""
    params = list(model.parameters())
    told = params[0].new_tensor([float(stop)])                 # 1 where a signal came
    parts = []
    for p in params:
        if p.grad is None:                                     # another process may have one
            p.grad = torch.zeros_like(p)
        parts.append(p.grad.flatten())
    flat = torch.cat([*parts, told])                           # all in one: one message a step
    together(dist.all_reduce, flat)
    sizes = [p.numel() for p in params]
    *means, told = (flat / RANKS).split([*sizes, 1])
    for p, mean in zip(params, means):
        p.grad.copy_(mean.view_as(p))
    return bool(told > 0)


# ---- a run: its folder, log and checkpoint ----
# state.safetensors holds all that a run needs to go on: both networks, the optimizers, the settings, the
# stage and step, the text tokens and the length of the log. No random generator: what is drawn in a step
# follows from seed, stage and step. So a run that was killed goes on to the same bits.
class Run:
    """The folder of a run and what it trains:

    log.jsonl                 a line every --log_every steps, another with every sample picture
    STAGE.png                 the latest sample picture of a stage
    state.safetensors         to go on from
    pretrained.safetensors    the model before post-training
    model.safetensors         the model at the end, for sample.py and eval.py
    scores.json, samples.png  what it can do

    Raises UserError where the folder, the settings or the data do not fit, before it writes anything."""

    def __init__(self, s: Settings, device):
        self.s, self.device = s, device
        self.dir = Path(s.out)
        self.control = Control()
        self.stage, self.step = STAGES[0], 0                   # what comes next
        self.saved = {}                                        # all tensors of a resumed run
        self.stop = False                                      # told to, by a signal
        self.lines = []                                        # of the log
        state = self.dir / 'state.safetensors'
        model = self.dir / 'model.safetensors'
        text, meta = None, {}                                  # None: tokens are trained on the data
        if s.resume:
            text, meta = self.resume(state)
        elif (state.exists() or model.exists()) and not s.overwrite:
            raise UserError(f'{s.out} holds a run: --resume goes on with it, --overwrite throws it '
                            'away, --out DIR keeps it and trains elsewhere')
        elif s.init:
            text = self.begin_from(s.init)
        self.world = self.open_data(text)
        self.words = sorted(self.world.words())
        if s.resume and self.world.checksum != meta.get('checksum', 0):
            raise UserError(f'{s.data} is not what the run began with, or has changed since the run '
                            'began: restore it or --overwrite this')
        if s.proxy not in (*self.world.maps, 'seg', 'none'):   # without masks seg is switched off
            raise UserError(f'--proxy is {s.proxy!r}: {s.data} has no such maps; choose from '
                            f"{', '.join(self.world.maps)} or none")
        # from here on the folder changes: all that can be wrong with the command is known
        self.dir.mkdir(parents=True, exist_ok=True)
        self.open_log(meta.get('lines', 0))
        if not s.resume:
            state.unlink(missing_ok=True)
            model.unlink(missing_ok=True)
            for name in WRITTEN:               # nothing of an older run stays, but what this begins from
                path = self.dir / name
                if path.resolve() != Path(s.init).resolve():
                    path.unlink(missing_ok=True)
        if not s.resume and not s.init:
            c = Config(**{f.name: getattr(s, f.name) for f in fields(Config)})
            torch.manual_seed(s.seed)
            self.tok = VQTokenizer(c).to(device)
            self.umm = UMM(c, self.world.text.size).to(device)
        self.tok.to(memory_format=torch.channels_last)         # faster convolutions

    def resume(self, state: Path):
        """Take up what was saved -> (text tokens, meta); the settings must be those it began with."""
        s = self.s
        self.tok, self.umm, text, self.saved, meta = load(state, self.device)
        self.stage, self.step = meta['stage'], meta['step']
        old = meta['settings']
        if s.dtype == 'auto':                  # what was chosen when the run began: the same bits
            s.dtype = old['dtype']
        if s.threads == 0:
            s.threads = old['threads']
        # these may differ from one start to the next
        free = ('resume', 'overwrite', 'out', 'data', 'device', 'threads', 'until', 'cfg', 'eval_n',
                'log_every', 'save_every', 'sample_every')
        self.must_agree(old, [name for name in vars(s) if name not in free], s.out)
        return text, meta

    def must_agree(self, theirs: dict, names, path: str):
        """UserError where settings of these names are not those of another run."""
        for name in names:
            ours = getattr(self.s, name)
            if theirs.get(name) != ours:
                raise UserError(f'--{name} is {ours!r}, but {path} was made with {theirs.get(name)!r}')

    def begin_from(self, path: str):
        """Post-train another run's model -> text tokens. Its architecture must be the one asked for."""
        self.tok, self.umm, text, _, _ = load(path, self.device)
        self.stage = 'posttrain'                               # its first two stages are done
        config = vars(self.umm.c)
        self.must_agree(config, config, path)
        return text

    def open_data(self, text):
        """The data set. The first process decodes a folder of pictures, the others find it decoded."""
        s = self.s
        if RANK > 0:
            wait()
        world = open_world(s.data, s.size, s.seed, self.device, text, s.skip_bad)
        if RANK == 0:
            wait()
        return world

    def open_log(self, lines: int):
        """log.jsonl, cut after the first `lines`: later steps are done again. What stays is not written
        again, so that nothing is lost if this is interrupted."""
        path = self.dir / 'log.jsonl'
        if RANK > 0:                                           # the first process writes for all
            path, lines = os.devnull, 0
        mode = 'r+' if lines else 'w'
        self.logfile = open(path, mode, 1, newline='\n')       # line buffered
        if lines:
            self.lines = self.logfile.readlines()[:lines]
            self.logfile.seek(len(''.join(self.lines).encode()))
            self.logfile.truncate()

    def log(self, **line):
        """One JSON object on a line of its own."""
        self.lines.append(json.dumps(line) + '\n')
        self.logfile.write(self.lines[-1])

    def save(self, name: str, stage: str, step: int, opts=()):
        """Weights, and with `opts` the optimizers' state: enough to sample, to evaluate or to resume."""
        if RANK > 0:
            return
        tensors = both(self.tok, self.umm).state_dict()
        # of each optimizer i and its parameter j: momentum, averages, count of steps
        for i, optimizer in enumerate(opts):
            for j, state in optimizer.state_dict()['state'].items():
                for key, tensor in state.items():
                    tensors[f'optimizer.{i}.{j}.{key}'] = tensor
        meta = {
            'config': vars(self.umm.c),
            'text': [token.hex() for token in self.world.text.vocab],
            'settings': vars(self.s),
            'stage': stage,
            'step': step,
            'lines': len(self.lines),
            'checksum': self.world.checksum,
            'classes': self.world.names,
            'words': self.words,
        }
        save(self.dir / name, tensors, meta)

    def restore(self, opts):
        """Put the saved state back, in the memory layout of the parameters: fused AdamW counts on it."""
        for name, tensor in self.saved.items():
            if not name.startswith('optimizer.'):
                continue
            _, i, j, key = name.split('.')
            optimizer = opts[int(i)]
            p = optimizer.param_groups[0]['params'][int(j)]
            like = p if tensor.shape == p.shape else tensor    # a count of steps has no layout
            mine = torch.empty_like(like, device=p.device)
            optimizer.state[p][key] = mine.copy_(tensor)


# ---- how fast this machine is, and in what ----
# Units for bfloat16 may or may not pay for small matrices, and a second thread costs time when another
# program uses its core. No table of processors can tell; three real steps can.
def seconds_a_step(run: Run, dtype: str, threads: int) -> float:
    """Of the forward and backward pass of post-training. No optimizer: nothing is learned."""
    s = run.s
    s.dtype, s.threads = dtype, threads
    torch.set_num_threads(threads)
    run.tok.eval()                                             # its codebook must not move
    begin = time.perf_counter()
    losses = umm_losses(run, 0, s.post_ask, s.post_draw, maps_a_step(run), part='finding')
    losses['loss'].backward()
    run.umm.source.grad.sum().item()                           # a GPU is waited for
    run.umm.zero_grad()
    spent = torch.tensor(time.perf_counter() - begin, device=run.device)
    if SEVERAL:
        together(dist.all_reduce, spent, dist.ReduceOp.MAX)    # all processes choose alike
    return spent.item()


def settle(run: Run):
    """Train in the type and with the number of threads in which real steps are fastest on this machine
    now, unless they were asked for or are those that a resumed run began with: float32 or bfloat16; all
    cores or, beside another busy program, one.

    Three rounds by turns, the first of which warms up; what is far too slow, or takes seconds, is timed
    once. float32 on all cores has to lose by a tenth, or one command would give two results."""
    s = run.s
    dtypes = ['float32', 'bfloat16'] if s.dtype == 'auto' else [s.dtype]
    threads = [s.threads or torch.get_num_threads()]           # all cores
    if s.threads == 0 and run.device.type == 'cpu':
        threads.append(1)
    times = dict.fromkeys(product(dtypes, threads), math.inf)  # of each candidate once
    best, *others = times
    why = 'as asked for, or as when the run began'
    if others:
        for turn in range(3):
            for candidate in times:
                if turn == 0 or times[candidate] < min(3, 2 * min(times.values())):
                    seconds = seconds_a_step(run, *candidate)
                    times[candidate] = min(times[candidate], seconds)
        fastest = min(times, key=times.get)
        if times[fastest] < .9 * times[best]:
            best = fastest
        timed = [f'{dtype} on {n} {seconds:.3g}' for (dtype, n), seconds in times.items()]
        why = 'seconds a step: ' + ', '.join(timed)
    s.dtype, s.threads = best
    torch.set_num_threads(s.threads)
    print(f'device: {run.device}, {s.dtype}, CPU threads: {s.threads} ({why})')


# ---- the loop ----
BUSY = ('warning: {} {}: steps take {:.1f} times as long as before: is the machine busy? One thread '
        'suffers least: stop and --resume --threads 1 (other last bits)')
CLIP = 1.                      # largest norm of the gradient
WARMUP = .02                   # share of a stage in which the learning rate rises
COOLDOWN = {'tokenizer': .4, 'pretrain': .1, 'posttrain': .4}          # share in which it falls


def loop(run: Run, stage: str, model, loss_of, steps: int, lr: float, pictures: int, look):
    """The one training loop.

    loss_of(step) -> {name: loss}: 'loss' is minimised, the others are logged.
    look(run) -> (figures, a picture) of the model so far, on validation scenes.
    lr: of AdamW; Muon's is --muon_lr in every stage. pictures: in a step, to log how many a second.
    Random draws depend on (seed, stage, step) only: no generator is saved."""
    s = run.s
    if run.stage != stage:
        return                                                 # done before the interruption
    opts = optimizers(model.train(), lr, s.muon_lr)
    if run.step > 0:                                           # resumed in the middle of this stage
        run.restore(opts)
    begin, spent = time.time(), []                             # seconds of each step
    usual, warned = math.inf, False                            # is the machine busier than before?
    quiet = RANK > 0 or 'TQDM_DISABLE' in os.environ           # no bar, but all messages
    bar = tqdm(range(run.step, steps), stage, initial=run.step, total=steps, smoothing=.05,
               dynamic_ncols=True, disable=quiet)
    for step in bar:
        done = step + 1
        start = time.perf_counter()
        # for what is drawn beside the data: which vectors replace dead codes
        torch.manual_seed(data.generator(s.seed, 'train', stage, step).initial_seed())
        losses = loss_of(step)
        losses['loss'].backward()
        if SEVERAL:
            run.stop = average_gradients(model, run.stop)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not norm.isfinite():                                # no step is taken with it
            raise UserError(f'{stage} step {done}: gradient is not finite: lower a learning rate. '
                            f'Last good state: {s.out}')
        rate = schedule(stage, step, steps)
        for optimizer in opts:
            optimizer.param_groups[0]['lr'] = optimizer.defaults['lr'] * rate
            optimizer.step()
        model.zero_grad()
        spent.append(time.perf_counter() - start)
        # tell, show and save
        if done % s.log_every == 0 or done == steps:
            shown = {k: round(v.item(), 4) for k, v in losses.items()}
            bar.set_postfix(shown, refresh=False)
            seconds = sum(spent) / len(spent)                  # a step since the last line
            spent.clear()
            run.log(stage=stage, step=done, **shown, norm=norm.item(), lr=lr * rate,
                    seconds=time.time() - begin, pictures_per_second=pictures / seconds)
            # something else uses the machine; late questions alone do not take twice as long
            if seconds > 2 * usual and not warned:
                tqdm.write(BUSY.format(stage, done, seconds / usual))
                warned = True
            usual = min(usual, seconds)                        # the first steps warm up
        if RANK == 0 and (done % s.sample_every == 0 or done == steps):
            show(run, stage, done, model, look)
        if done < steps and (done % s.save_every == 0 or run.stop):
            run.save('state.safetensors', stage, done, opts)
            if run.stop:                                       # Ctrl-C, or a cluster's warning
                wait()
                raise UserError(f'stopped; saved {stage} step {done}. Go on: same command and --resume')
    # without the optimizers: the next stage begins with new ones
    run.stage, run.step = NEXT[stage], 0
    run.save('state.safetensors', run.stage, run.step)


def schedule(stage: str, step: int, steps: int) -> float:
    """Share of the learning rate: it rises, stays, and falls to zero. Falling slowly, it settles what is
    half learned; a stage that another one follows need not settle."""
    rise = (step + 1) / max(1, WARMUP * steps)                 # above 1 after the warmup
    fall = (steps - step) / max(1, COOLDOWN[stage] * steps)    # below 1 in the cooldown
    return min(1, rise, fall)


def show(run: Run, stage: str, done: int, model, look):
    """Log validation figures and write a sample picture."""
    model.eval()
    figures, picture = look(run)
    values = {}
    for name, f in figures.items():
        value = f if isinstance(f, float) else f['value']
        if value is not None:                                  # nothing was measured: nothing is said
            values[name] = round(value, 3)
    # a line of the log, a line on the screen, and the latest picture of this stage
    run.log(stage=stage, step=done, val=values)
    told = [f'{name} {value:.4g}' for name, value in values.items()]
    if told:
        tqdm.write(f'{stage} {done}: ' + ', '.join(told))
    if values.get('used', 1) < .5:
        tqdm.write('warning: the codebook has collapsed: less than half of its codes are used')
    if values.get('mean_train', 0) > values.get('mean', 1) + .2:
        tqdm.write('warning: the training pictures are being learned by heart: more pictures help, or '
                   'fewer steps')
    picture.save(run.dir / f'{stage}.png')
    model.train()


# ---- the three stages ----
def train_tokenizer(run: Run):
    """Autoencode pictures and all maps together: one codebook has to draw them all. Half of a batch are
    pictures, a quarter masks, a quarter maps of all kinds. A large error counts by its square, a small
    one by its size; no adversary and no other network judges the pictures."""
    s, tok, world = run.s, run.tok, run.world
    B = my_share(s.tok_batch)
    kinds = [name for name in world.maps if name != 'recon']

    def loss_of(step):
        _, r, _ = world.scenes('train', 'tokenizer', my_index(step), B)
        first_half = B // 2
        most = B * 3 // 4
        drawn = [MAPS[name].draw(r) for name in kinds]         # each [B,3,S,S]; seg first, if known
        parts = [r.image[:first_half], drawn[0][first_half:most]]
        before = my_index(step) * (B - most)                   # such maps in all batches so far
        for i, maps in enumerate(drawn):                       # all kinds by turns, over the batches
            first = (i - before) % len(kinds)                  # place of its first turn in this one
            parts.append(maps[most + first::len(kinds)])
        x = torch.cat(parts)                                                          # [B,3,S,S]
        y, _, commitment = tok(x)
        mse = F.mse_loss(y, x)
        l1 = F.l1_loss(y, x)
        loss = mse + .3 * l1 + .25 * commitment
        return {'loss': loss, 'mse': mse, 'commitment': commitment}

    def look(run):
        _, r, _ = world.scenes('val', 'samples', 0, 8)
        rows = []                                              # each kind, and what it becomes
        for name in world.maps:
            x = MAPS[name].draw(r)
            rows += [x, tok.decode(tok.encode(x))]
        return evaluation.tokenizer(tok, world, 128, 'val'), sample.grid(rows)

    loop(run, 'tokenizer', tok, loss_of, s.tok_steps, s.tok_lr, s.tok_batch, look)
    tok.eval().requires_grad_(False)                           # the codes mean the same from now on


def precision(run: Run):
    """A context in which matrix products use the run's type."""
    enabled = run.s.dtype == 'bfloat16'
    return torch.autocast(run.device.type, torch.bfloat16, enabled=enabled)


def losses_of(run: Run, seq, target=None, hide=0.):
    """(text loss, pixel loss) of a batch; target: the pictures to generate, [B, 3, S, S]; hide: share of
    them that does not see its earlier codes."""
    if target is not None:
        seq.codes = run.tok.encode(target)
    with precision(run):
        return run.umm(seq, hide)


# What an experiment may change, to find out what it is that teaches.
def generated(run, index: int, seq, target, r):
    """The loss of maps as they are taught here: their codes, written after picture and instruction.

    Earlier codes tell a later one its class; hidden, each needs the picture (Bowman 2016, 3.1).
    seq, target [B, 3, S, S], r: as DataSet.maps_to_draw gives them; index, of the batch, and r are for
    experiments."""
    _, loss = losses_of(run, seq, target, run.s.hide)
    return loss


FIND_STEPS = 1700              # so long the later part asks mostly to find things, then to relate them


def mixed(s: Settings, step: int):
    """-> (share of the questions' pictures, share of the maps, part of training: what is asked)"""
    late = step - s.late_from * s.post_steps                   # steps of the later part so far
    part = 'first'
    if late >= 0:
        part = 'finding'
    if late >= FIND_STEPS:
        part = 'relating'
    return 1, 1, part


@dataclass
class Control:
    """Training itself changes nothing; experiments set run.control to one of their own."""
    map_loss: Callable = generated                     # what is taught about pictures with maps
    shares: Callable = mixed                           # (settings, step) -> how much of what


def umm_losses(run: Run, step, n_ask, n_draw, n_maps, w_text=1., w_draw=1., part='first'):
    """Mean losses of a step: `n_ask` pictures with questions, `n_draw` texts to draw, `n_maps` pictures
    with maps. What nothing is known of is left out; part of training: which of DataSet.mixes is asked,
    after the first late_questions about a picture.

    Each loss is a mean over its own tokens, in nats, and has its own weight: 64 codes of a picture do
    not drown three words of an answer. All of them go through one pass of the optimizer."""
    s, world, umm = run.s, run.world, run.umm
    index = my_index(step)
    out = {}

    if n_ask:
        # questions and captions about pictures
        Q = s.questions if part == 'first' else s.late_questions
        seq, _ = world.questions('train', index, my_share(n_ask), Q, kinds=world.mixes.get(part))
        out['text'], _ = losses_of(run, seq)
    if n_draw and world.captions:
        # pictures from captions
        seq, target = world.drawings('train', index, my_share(n_draw))
        out['plan'], out['draw'] = losses_of(run, seq, target)
    if n_maps:
        # maps of pictures
        seq, target, r = world.maps_to_draw('train', index, my_share(n_maps), s.proxy)
        out[s.proxy] = run.control.map_loss(run, index, seq, target, r)
    weights = {'text': w_text, 'plan': 1., 'draw': w_draw, s.proxy: s.w_proxy}
    losses = {'loss': 0 * umm.source.sum()}                    # if nothing is known of these pictures
    for name, loss in out.items():
        if loss is not None:
            losses['loss'] = losses['loss'] + weights[name] * loss
            losses[name] = loss.detach()
    return losses


def look_at_umm(run: Run):
    """Understanding of validation pictures, and a picture of what the model can do so far."""
    networks = (run.umm, run.tok, run.world)
    n = min(128, run.world.limit('val'))                       # of few pictures each once
    figures = evaluation.understanding(*networks, n, 'val')
    if run.s.data:                                             # much better: learned by heart
        figures['mean_train'] = evaluation.understanding(*networks, n, 'train')['mean']
    proxy = run.s.proxy if run.stage == 'posttrain' else 'none'
    return figures, sample.picture(*networks, run.s.cfg, proxy)


def pretrain(run: Run):
    """Text -> picture, and picture -> text (captions and questions). Mostly drawing: answers about
    shapes that are not seen yet are noise, which would take its share of every step."""
    s = run.s
    pictures = s.pre_ask + s.pre_draw                          # in a step

    def loss_of(step):
        return umm_losses(run, step, s.pre_ask, s.pre_draw, 0, w_text=.1)      # it slows drawing

    loop(run, 'pretrain', run.umm, loss_of, s.pre_steps, s.lr, pictures, look_at_umm)


def maps_a_step(run: Run) -> int:
    """Pictures with a map to generate in a step of post-training; none where none are known."""
    if run.s.proxy not in run.world.maps:
        return 0
    return round(run.s.ratio * run.s.post_ask)


def posttrain(run: Run):
    """SGT: [picture][instruction][map], loss on the map's codes only, mixed with questions. Later, when
    shapes are known from the maps, more questions are asked, most of them of finding; in long runs, once
    that is learned too, of how things relate."""
    s = run.s
    maps = maps_a_step(run)
    pictures = s.post_ask + s.post_draw + maps

    def loss_of(step):
        # steps are counted on from pretraining: no picture of it comes again
        ask_share, map_share, part = run.control.shares(s, step)
        ask = ask_share * s.post_ask
        return umm_losses(run, s.pre_steps + step, ask, s.post_draw, map_share * maps, s.w_text,
                          s.w_draw, part)

    loop(run, 'posttrain', run.umm, loss_of, s.post_steps, s.lr, pictures, look_at_umm)


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
    for name, network in both(run.tok, run.umm).items():
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        print(f'{name}: {millions:.2f} M parameters')
    print('a uniform guess: {:.2f} nats a text token, {:.2f} a code'.format(
        math.log(run.world.text.size), math.log(s.codebook)))

    def stop(number, _):
        """Ctrl-C or SIGTERM: the loop saves after the step at hand and ends."""
        run.stop = True
        if not SEVERAL:
            signal.signal(number, signal.SIG_DFL)              # the second one kills

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    for stage, train in zip(STAGES, (train_tokenizer, pretrain, posttrain)):
        if stage == 'posttrain' and run.stage == stage and run.step == 0:
            # what experiments start from: one base, many ways to go on
            run.save('pretrained.safetensors', 'posttrain', 0)
        train(run)
        if run.stop:                                           # in the last step of a stage
            wait()
            raise UserError(f'stopped after {stage}, which is saved. Go on: same command and --resume')
        if stage == s.until:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)   # measuring can be interrupted
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if SEVERAL:
        dist.destroy_process_group()
    if RANK == 0:
        finish(run, begin)


def finish(run: Run, begin: float):
    """Keep the model and measure what it has learned so far. Minutes are those of this start, with
    everything: data, sample pictures, the evaluation."""
    s = run.s
    run.save('model.safetensors', run.stage, 0)
    # what comes next is not trained yet
    umm = None if run.stage == 'pretrain' else run.umm
    proxy = s.proxy if run.stage == DONE else 'none'
    scores = evaluation.evaluate(umm, run.tok, run.world, s.eval_n, s.cfg, proxy=proxy)
    scores['minutes'] = (time.time() - begin) / 60
    evaluation.report(scores, run.dir / 'scores.json')
    print(f"\n{scores['minutes']:.1f} minutes since this start")
    task = 'reconstruct PICTURE'
    if umm:
        sample.picture(umm, run.tok, run.world, s.cfg, proxy).save(run.dir / 'samples.png')
        task = f'draw "{run.world.example}" --n 1'
    print(f'Look at the pictures in {run.dir}, then:\n'
          f'python sample.py {task} --checkpoint {run.dir}/model.safetensors')


if __name__ == '__main__':
    data.guard(main)
