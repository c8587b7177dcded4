"""The claims of SGT (arXiv 2605.18714), tested: arms that differ in what is taught beside questions.

    python -m experiments.reproduce --only quick --seeds 3     none, sft, edge, depth, seg
    python -m experiments.reproduce                            ten arms x 5 seeds: the main comparison
    python -m experiments.reproduce --only channel             generated, or taught as labels?
    python -m experiments.reproduce --only steps|content|budget|known|drawing        see channels.py
    python -m experiments.reproduce --only controls|restoration|ratio|scale|questions
    python -m experiments.reproduce --report                   only write the report of what is finished
    python -m experiments.reproduce --data DIR --only quick    on real pictures (see folder.py)

One pre-trained checkpoint per seed (another for `known-*` and `*-bare-*`); every arm starts from it and
runs train.posttrain, with the same loss weights, on the same pictures, questions and drawings in the
same order. The maps differ in target and instruction, those of restoration in their spoilt input too;
`ratio-*` has other pictures with maps, `first` other batches, `*-long` and `*-x3` more steps, `*-flops`
as many as cost what `seg-order` does in the cpu preset and the procedural world. Only `*-alone*` and
`*-bare-*` replay no drawings. A finished arm is kept (result.json) and never run again; a killed one
resumes. Writes report.md, claims.json and figures under --out; scores: test split.
"""
import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import subprocess
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import data  # before torch: it tells OpenMP how to wait
import torch

import eval as evaluation
import sample
import train
from data import UserError
from experiments import channels, drawing, figures, probes, reader, report
from experiments.channels import LONGER
from experiments.restoration import RESTORATIONS
from folder import open_world

RECIPE = 9      # counts changes of model or training after which old arms must not be mixed in
ROOT = Path(__file__).resolve().parent.parent


# ---- the arms ----
@dataclass
class Arm:
    """One way to post-train."""
    proxy: str = 'seg'                 # the map that is taught, or none
    trained: bool = True               # False: the base is measured as it is
    longer: float = 1                  # times the steps of the other arms
    pictures: int = 0                  # distinct ones with maps, 0: endless
    questions: int = 0                 # distinct pictures with questions, 0: endless
    base: str = 'base'                 # the pre-trained run that it starts from
    needs: str = 'image'               # what of a Rendering its maps need beside those of the proxy
    flags: dict = field(default_factory=dict)                      # others of train.py
    control: train.Control = field(default_factory=train.Control)


def maps_first(s: train.Settings, step: int):
    """As train.mixed, but all maps in the first half of the stage, then all questions."""
    share = step / s.post_steps
    if share < .5:
        return 0, 2, 'first'
    if share < (1 + s.late_from) / 2:
        return 2, 0, 'first'
    return 2, 0, 'finding'


MAP_ARMS = ('edge', 'recon', 'depth', 'instance', 'seg')
RATIO_ARMS = {f'ratio-{r:g}': Arm(flags={'ratio': r}) for r in (.5, 1., 1.5, 2.5, 3.)}
SCALE_ARMS = {f'scale-{n}': Arm(pictures=n) for n in (100, 400, 1600)}
QUESTION_ARMS = {
    'sft-asked-200': Arm('none', questions=200),
    'seg-asked-200': Arm('seg', questions=200),
    'sft-asked-800': Arm('none', questions=800),
    'seg-asked-800': Arm('seg', questions=800),
}
# What the map says times how it is taught, see channels.py. `-flops`: as many FLOPs as seg-order.
CHANNEL_ARMS = {
    'seg-order': Arm(flags={'hide': 0}),
    'seg-blind': Arm(flags={'hide': 1}),
    'seg-masked': Arm(control=train.Control(map_loss=channels.masked)),
    'seg-readout': Arm(control=train.Control(map_loss=channels.readout)),
    'seg-told': Arm(control=train.Control(map_loss=channels.told)),
    'all-three': Arm(control=train.Control(map_loss=channels.in_turns), needs='depth'),
}
EQUAL_ARMS = {
    'sft-flops': Arm('none', longer=LONGER['sft']),
    'readout-flops': replace(CHANNEL_ARMS['seg-readout'], longer=LONGER['seg-readout']),
    'told-flops': replace(CHANNEL_ARMS['seg-told'], longer=LONGER['seg-told']),
}
CONTENTS = {                           # and what of a Rendering each needs
    'regions': (channels.regions, 'instance'),
    'silhouette': (channels.silhouette, 'instance'),
    'cutout': (channels.cutout, 'instance'),
    'blank': (channels.blank, 'image'),
}
CONTENT_ARMS = {}
for _name, (_content, _needs) in CONTENTS.items():
    _generated = channels.teaching(_content)
    _read_off = channels.teaching(_content, channels.readout)
    CONTENT_ARMS[f'{_name}-order'] = Arm(flags={'hide': 0}, control=_generated, needs=_needs)
    CONTENT_ARMS[f'{_name}-readout'] = Arm(control=_read_off, needs=_needs)
# On a base that knows shapes from questions alone, the nearest to a large model that knows its objects.
KNOWN_ARMS = {
    'known-none': Arm('none', trained=False, base='known'),
    'known-sft': Arm('none', base='known'),
    'known-edge': Arm('edge', base='known'),
    'known-seg': Arm('seg', base='known'),
    'known-order': replace(CHANNEL_ARMS['seg-order'], base='known'),
    'known-readout': replace(CHANNEL_ARMS['seg-readout'], base='known'),
}
# Three times the steps: does it end higher, or was it only sooner?
LONG_ARMS = {
    'sft-x3': Arm('none', longer=3),
    'sft-x3-flops': Arm('none', longer=3 * LONGER['sft']),     # as many FLOPs as order-x3
    'order-x3': replace(CHANNEL_ARMS['seg-order'], longer=3),
    'blind-x3': replace(CHANNEL_ARMS['seg-blind'], longer=3),
    'masked-x3': replace(CHANNEL_ARMS['seg-masked'], longer=3),
    'readout-x3': replace(CHANNEL_ARMS['seg-readout'], longer=3),
}
# Drawing when nothing else keeps it alive: no drawing is replayed. `slow`: a tenth of the learning rate,
# at the full one all is forgotten; `bare`: no plan is written before a drawing, the caption alone says
# what is where.
DRAW_MAPS = ('none', 'recon', 'edge', 'depth', 'instance', 'seg')
SLOW = {'lr': 2e-4, 'muon_lr': .002}
DRAW_ARMS = {}
for _name in DRAW_MAPS:
    DRAW_ARMS[f'{_name}-alone'] = Arm(_name, flags={'post_draw': 0})
    DRAW_ARMS[f'{_name}-alone-slow'] = Arm(_name, flags={'post_draw': 0, **SLOW})
BARE_ARMS = {'bare-none': Arm('none', trained=False, base='bare')}
for _name in DRAW_MAPS:
    BARE_ARMS[f'{_name}-bare-slow'] = Arm(_name, flags={'post_draw': 0, **SLOW}, base='bare')
ARMS = {
    'none': Arm('none', trained=False),
    'sft': Arm('none'),                # questions alone
    **{name: Arm(name) for name in MAP_ARMS},
    **{name: Arm('recon', control=control) for name, (control, _) in RESTORATIONS.items()},
    'sft-long': Arm('none', longer=2),
    'seg-long': Arm('seg', longer=2),
    'shuffled': Arm(control=train.Control(map_loss=channels.shuffled)),
    'frozen': Arm(control=train.Control(map_loss=channels.frozen)),
    'first': Arm(control=train.Control(shares=maps_first)),
    **RATIO_ARMS,
    **SCALE_ARMS,
    **QUESTION_ARMS,
    **CHANNEL_ARMS,
    **EQUAL_ARMS,
    **CONTENT_ARMS,
    **KNOWN_ARMS,
    **LONG_ARMS,
    **DRAW_ARMS,
    **BARE_ARMS,
}
BASES = {                          # and how many times the steps of pretraining each has
    'base': 1,
    'known': 1,
    'bare': 3,                     # without plans drawing is learned later
}
KNOWN = 5                          # as many times the steps of an arm of questions alone: `known`
PLANS = {
    'main': ('none', 'sft', 'edge', 'recon', 'denoise', 'inpaint', 'depth', 'instance', 'seg',
             'shuffled'),
    'quick': ('none', 'sft', 'edge', 'depth', 'seg'),
    'controls': ('none', 'sft', 'seg', 'sft-long', 'seg-long', 'shuffled', 'frozen', 'first'),
    'restoration': ('none', 'sft', 'recon', 'denoise', 'deblur', 'superres', 'inpaint'),
    'ratio': ('none', 'sft', 'seg', *RATIO_ARMS),
    'scale': ('none', 'sft', 'seg', *SCALE_ARMS),
    'questions': ('none', 'sft', 'seg', *QUESTION_ARMS),
    'channel': ('seg-order', 'seg-masked', 'seg-blind', *EQUAL_ARMS),
    'steps': ('none', 'sft', 'seg', *CHANNEL_ARMS),
    'content': ('none', 'sft', 'seg-order', 'seg-readout', *CONTENT_ARMS),
    'budget': ('none', *LONG_ARMS),
    'known': tuple(KNOWN_ARMS),
    'drawing': ('none', *DRAW_ARMS, *BARE_ARMS),
}
# Post-training shorter than the main job's: arms are compared while there is still something to learn.
STEPS = {
    'cpu': {'post_steps': 400, 'sample_every': 100, 'save_every': 100},
    'gpu': {'sample_every': 500},
    'test': {'sample_every': 3},
}


class Limited:
    """A data set in whose training split only some pictures with maps and with questions exist: the
    batches that come first, again and again. They are whole: of 100 pictures in batches of 16 there are
    96, the next multiple below, and one batch at least. 0: there is no limit."""

    def __init__(self, world: data.DataSet, pictures: int, questions: int):
        self.world = world
        self.limits = {'maps': pictures, 'questions': questions}

    def __getattr__(self, name):
        """All else is the data set's own."""
        return getattr(self.world, name)

    def again(self, split: str, stream: str, index: int, B: int) -> int:
        """The index of the batch that is given for that one."""
        limit = self.limits.get(stream, 0)
        if split != 'train' or limit == 0:
            return index
        return index % max(1, limit // B)

    def maps_to_draw(self, split, index, B, name, stream='maps'):
        index = self.again(split, stream, index, B)
        return self.world.maps_to_draw(split, index, B, name, stream)

    def questions(self, split, index, B, Q, stream='questions', **how):
        index = self.again(split, stream, index, B)
        return self.world.questions(split, index, B, Q, stream=stream, **how)


class Bare(data.World):
    """The procedural world without plans: a drawing follows its caption at once."""

    def describe(self, scene, style, rng):
        if style == 'place':
            return None
        return super().describe(scene, style, rng)


# ---- one arm ----
def conditions_of(a) -> list:
    """What all arms of one folder share; others must not be mixed in."""
    return [a.preset, a.n, RECIPE, a.data, a.steps, a.dtype]


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        flags += [f'--{name}', str(value)]
    return flags


def flags_of(a, seed: int, base: str) -> list[str]:
    """The flags of train.py that a base and its arms share: they all compute alike."""
    pre_steps = train.parse(['--preset', a.preset]).pre_steps
    values = {
        'preset': a.preset,
        'seed': seed,
        'device': a.device,
        'dtype': a.dtype,
        'threads': a.threads,
        **STEPS[a.preset],
        'pre_steps': BASES[base] * pre_steps,
    }
    if a.steps:
        values['post_steps'] = a.steps
    if a.data:
        values['data'] = a.data
    flags = as_flags(values)
    if a.skip_bad:
        flags.append('--skip_bad')
    return flags


def begin(folder: Path, flags: list, base: str) -> train.Run:
    """A Run in `folder`, resumed if it was begun before."""
    begun = (folder / 'state.safetensors').exists()
    how = '--resume' if begun else '--overwrite'
    s = train.parse([*flags, '--out', str(folder), how])
    torch.set_num_threads(s.threads)
    run = train.Run(s, data.find_device(s.device))
    if base == 'bare':
        run.world = Bare(s.size, s.seed, run.device, run.world.text)
    return run


def run_base(a, seed: int, base: str, folder: Path) -> train.Run:
    """The first two stages; `known`: and questions without maps."""
    flags = flags_of(a, seed, base)
    steps = train.parse(flags).post_steps
    run = begin(folder, flags + as_flags({'proxy': 'none', 'post_steps': KNOWN * steps}), base)
    train.train_tokenizer(run)
    train.pretrain(run)
    if base == 'known':
        train.posttrain(run)
    run.save('pretrained.safetensors', 'posttrain', 0)
    return run


def run_arm(a, seed: int, arm: Arm, folder: Path) -> train.Run:
    """The third one, as the arm has it."""
    flags = flags_of(a, seed, arm.base)
    s = train.parse(flags)
    pretrained = folder.parent / arm.base / 'pretrained.safetensors'
    steps = round(arm.longer * s.post_steps)
    values = {'proxy': arm.proxy, 'init': pretrained, 'post_steps': steps, **arm.flags}
    if arm.base == 'known':        # batches are counted on: no picture of the base comes again
        values['pre_steps'] = s.pre_steps + KNOWN * s.post_steps
    run = begin(folder, flags + as_flags(values), arm.base)
    run.control = arm.control
    world = run.world
    run.world = Limited(world, arm.pictures, arm.questions)
    if arm.trained:
        train.posttrain(run)
    run.world = world
    run.umm.eval()
    return run


def end_with(boss):
    """End this process as soon as the one that started it has ended, even if that was killed."""
    boss.join()
    os._exit(1)


def commit() -> str:
    """The commit that is checked out here, '' where that cannot be told."""
    if not (ROOT / '.git').exists():
        return ''
    try:
        found = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    except OSError:                                        # there is no git
        return ''
    return found.stdout.strip()


def work(a, seed: int, name: str):
    """Run one arm or base to its result.json, its output to out.txt."""
    boss = multiprocessing.parent_process()
    if boss:
        threading.Thread(target=end_with, args=(boss,), daemon=True).start()
    start, version = time.time(), commit()
    folder = a.out / f'seed{seed}' / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'out.txt', 'a') as out, contextlib.redirect_stdout(out):
        if name in BASES:
            run, scores = run_base(a, seed, name, folder), {}
        else:
            run = run_arm(a, seed, ARMS[name], folder)
            scores = measure(run, a.n)
    result = {
        'arm': name,
        'seed': seed,
        'plan': conditions_of(a),
        'commit': version,
        'threads': run.s.threads,
        'seconds': time.time() - start,
        'steps': run.s.post_steps,
        'scores': scores,
        'log': [json.loads(line) for line in run.lines if '"val"' in line],
    }
    with data.written_whole(folder / 'result.json') as part:
        part.write_text(json.dumps(result))


def measure(run: train.Run, n: int) -> dict:
    """All scores of an arm, on test scenes that are the same for every arm and seed; writes samples.png.
    Of real pictures no scenes are known: there are no probes and no attention shares."""
    umm, tok, world = run.umm, run.tok, copy.copy(run.world)
    world.seed = 0
    n = min(n, world.limit('test'))
    scores = {}
    if world.exact:
        scores['generation'] = evaluation.generation(umm, tok, world, max(2, n // 12), run.s.cfg)
        scores['drawing'] = drawing.measure(umm, tok, world, 2 * n)
        scores['probe'] = probes.probe(umm, world, max(50, n * 3 // 4))
        scores['attention'] = probes.attention_shares(umm, tok, world, max(16, n // 4))
    elif world.captions:
        scores['generation'] = reader.recognition(umm, tok, world, min(n, 192), run.s.cfg)
    if world.kinds:
        scores['understanding'] = evaluation.understanding(umm, tok, world, n)
    if run.s.proxy == 'seg' and 'seg' in world.maps:
        scores['segmentation'] = evaluation.segmentation(umm, tok, world, max(16, n // 4))
    sample.picture(umm, tok, world, run.s.cfg, run.s.proxy).save(run.dir / 'samples.png')
    return scores


# ---- all arms ----
def finished(a, seed: int, name: str) -> bool:
    """Is there a result? UserError if it is one of another plan."""
    path = a.out / f'seed{seed}' / name / 'result.json'
    if not path.exists():
        return False
    if json.loads(path.read_text())['plan'] != conditions_of(a):
        raise UserError(f'{path} is of another --preset, --n, --data, --steps, --dtype or recipe: '
                        'choose another --out, or delete its folder')
    return True


def to_do(a, arms):
    """-> ([(seed, base or arm)] that can run at once, {(seed, base): what waits for it})."""
    ready, waiting = [], {}
    missing = {}                                           # (seed, base): is it to be run first?
    for name in arms:
        for seed in range(a.seeds):
            if finished(a, seed, name):
                continue
            base = (seed, ARMS[name].base)
            if base not in missing:
                missing[base] = not finished(a, *base)
            if missing[base]:
                waiting.setdefault(base, []).append((seed, name))
            else:
                ready.append((seed, name))
    return sorted(waiting) + ready, waiting


def execute(a, arms) -> list[str]:
    """Run all that is not finished, at most --jobs at a time: the bases first, then their arms. A run
    that fails does not stop the others, but what waits for it is left out. -> what failed and why"""
    ready, waiting = to_do(a, arms)
    total = len(ready) + sum(len(keys) for keys in waiting.values())
    print(f'{total} runs to do, {a.jobs} at a time, under {a.out}')
    if total == 0:
        return []
    running, failed, ended, start = {}, [], 0, time.time()
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        while ready or running:
            while ready and len(running) < a.jobs:
                key = ready.pop(0)
                running[pool.submit(work, a, *key)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                seed, name = key
                ended += 1
                error = future.exception()
                if error:
                    failed.append(f'seed {seed} {name}: {error}')
                    print(failed[-1], flush=True)
                    continue
                ready += waiting.pop(key, [])
                left = (time.time() - start) / ended * (total - ended) / 60
                print(f'{ended}/{total} seed {seed} {name}: done; about {left:.0f} minutes left',
                      flush=True)
    return failed


# ---- command line ----
def parse(argv=None):
    """-> (the arguments, names of arms)."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=5, help='seeds 0, 1, ... (default 5)')
    p.add_argument('--only', default='main', choices=PLANS, help='which plan (default main)')
    p.add_argument('--arms', default='', help='arms by name, comma-separated, instead of a plan')
    p.add_argument('--preset', default='cpu', choices=STEPS, help='default cpu')
    p.add_argument('--out', type=Path, default=None, help='default out/reproduce')
    p.add_argument('--steps', type=int, default=0, help='of post-training, a multiple of 200 (gpu: '
                   '1,000, test: 6); 0: 400 (gpu: 3,000, test: 6)')
    p.add_argument('--data', default='', help='folder of real pictures instead of the procedural world')
    p.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'),
                   help='default float32; bfloat16 is faster where the processor has units for it')
    p.add_argument('--jobs', type=int, default=0, help='runs at a time; 0: one per core, 1 on a GPU')
    p.add_argument('--n', type=int, default=0, help='test pictures for understanding; 0: 512 (test: 64)')
    p.add_argument('--skip-bad', action='store_true', help='leave out bad rows of --data')
    p.add_argument('--report', nargs='?', const='out', default='', metavar='FILE',
                   help='write the report only; of a scores.json: its tables, beside it')
    a = p.parse_args(argv)
    arms = PLANS[a.only]
    if a.arms:
        arms = list(dict.fromkeys(a.arms.split(',')))          # each once
    check(a, arms)
    a.device = 'cpu'
    if a.preset == 'gpu':
        a.device = data.find_device().type
    if a.data:
        a.data = str(Path(a.data).resolve())
    cores = os.cpu_count()
    if a.jobs == 0:
        a.jobs = 1 if a.device == 'cuda' else cores
    a.threads = max(1, cores // a.jobs)
    if a.n == 0:
        a.n = 64 if a.preset == 'test' else 512
    name = 'reproduce'
    if a.preset != 'cpu':
        name += f'-{a.preset}'
    if a.data:
        name += f'-{Path(a.data).name}'
    a.out = (a.out or Path('out') / name).resolve()
    return a, arms


def check(a, arms):
    """UserError for what cannot be run."""
    for arm in arms:
        if arm not in ARMS:
            raise UserError(f"--arms names {arm!r}: choose from {', '.join(ARMS)}")
    if not 1 <= a.seeds <= 100 or min(a.jobs, a.n, a.steps) < 0:
        raise UserError(f'--seeds is {a.seeds}, --jobs {a.jobs}, --n {a.n}, --steps {a.steps}: '
                        '1 to 100 seeds, no negatives')
    half = STEPS[a.preset]['sample_every']                 # the report looks at the middle of a stage
    if a.steps % (2 * half):
        raise UserError(f'--steps is {a.steps}: it must be a multiple of {2 * half}, so that half of '
                        'the steps is a multiple of --sample_every')


def teachable(a, arms) -> list:
    """The arms that the folder can teach. It is decoded here, once, before all workers would do it."""
    size = train.parse(['--preset', a.preset]).size
    world = open_world(a.data, size, 0, 'cpu', None, a.skip_bad)
    known = (*world.maps, 'none')
    there = (*world.annotated, 'image')
    without = []
    for name in arms:
        arm = ARMS[name]
        if arm.proxy not in known or arm.needs not in there or arm.base == 'bare':
            without.append(name)
    if without:
        print(f"{a.data} cannot teach {', '.join(without)}: left out (no such maps, or they want the "
              'procedural world without plans)')
    return [arm for arm in arms if arm not in without]


def main(argv=None):
    a, arms = parse(argv)
    if a.report not in ('', 'out'):                        # a file is named
        report.report(Path(a.report))
        return
    os.environ['TQDM_DISABLE'] = '1'                       # the workers' bars would mix
    failed = []
    if not a.report:
        if a.data:
            arms = teachable(a, arms)
        try:
            a.out.mkdir(parents=True, exist_ok=True)
            failed = execute(a, arms)
        except OSError as e:
            raise UserError(f'cannot write to {a.out} ({e.strerror}): choose another --out')
        except BrokenExecutor:
            raise UserError('a run was killed: out of memory? The same command goes on; --jobs 1 needs '
                            'less')
        except KeyboardInterrupt:
            raise UserError('stopped; finished arms are kept: the same command goes on')
    torch.set_num_threads(a.threads)       # two threads on a busy machine can be many times slower
    if not failed or report.results_in(a.out):
        found = report.report(a.out)
        figures.draw_all(a.out, found)
    if failed:
        raise UserError('failed: ' + '; '.join(failed) +
                        '. See out.txt there; the same command tries again')


if __name__ == '__main__':
    data.guard(main)
