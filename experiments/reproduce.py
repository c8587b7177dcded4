"""The claims of SGT (arXiv 2605.18714), tested: arms that differ in the proxy alone.

    python -m experiments.reproduce --only quick --seeds 3     none, sft, edge, depth, seg
    python -m experiments.reproduce                            ten arms x 5 seeds: the main comparison
    python -m experiments.reproduce --only controls|restoration|ratio|scale|questions|input
    python -m experiments.reproduce --report                   only write the report of what is finished
    python -m experiments.reproduce --data DIR --only quick    on real pictures (see folder.py)

One pre-trained checkpoint per seed; every arm starts from it and runs train.posttrain, with the same
loss weights, on the same pictures, questions and drawings in the same order. The proxies differ in
target and instruction, those of restoration in their spoilt input too; `ratio-*` has other pictures
with maps, `first` other batches, `sft-long` and `seg-long` twice the steps. All arms replay drawings.
A finished arm is kept (result.json) and never run again; a killed one resumes. Writes report.md,
claims.json and figures under --out; scores: test split.
"""
import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import model
import train
from data import COLOURS, SHAPES, UserError
from folder import Folder, open_world

PROXY_ARMS = ('edge', 'recon', 'denoise', 'deblur', 'superres', 'inpaint', 'depth', 'instance', 'seg')
RATIOS, POOLS, ASKED = (.5, 1., 1.5, 2.5, 3.), (100, 400, 1600), (200, 800)
# arm -> flags of train.py, then: 'pictures' / 'questions', the number of distinct ones (0 = endless)
ARMS = {
    'none': None, 'sft': {'proxy': 'none'}, **{p: {'proxy': p} for p in PROXY_ARMS},
    'sft-long': {'proxy': 'none', 'longer': 2.}, 'seg-long': {'proxy': 'seg', 'longer': 2.},
    'shuffled': {'control': 'shuffled'}, 'frozen': {'control': 'frozen'}, 'first': {'control': 'first'},
    **{f'ratio-{r:g}': {'ratio': r} for r in RATIOS},
    **{f'scale-{n}': {'pictures': n} for n in POOLS},
    **{f'{arm}-asked-{n}': {'proxy': proxy, 'questions': n}
       for n in ASKED for arm, proxy in (('sft', 'none'), ('seg', 'seg'))},
    **{f'{arm}-code': {'proxy': proxy} for arm, proxy in (('sft', 'none'), ('seg', 'seg'))}}
PLANS = {'main': ('none', 'sft', 'edge', 'recon', 'denoise', 'inpaint', 'depth', 'instance', 'seg',
                  'shuffled'),
         'quick': ('none', 'sft', 'edge', 'depth', 'seg'),
         'controls': ('none', 'sft', 'seg', 'sft-long', 'seg-long', 'shuffled', 'frozen', 'first'),
         'restoration': ('none', 'sft', 'recon', 'denoise', 'deblur', 'superres', 'inpaint'),
         'ratio': ('none', 'sft', 'seg', *(a for a in ARMS if a.startswith('ratio'))),
         'scale': ('none', 'sft', 'seg', *(a for a in ARMS if a.startswith('scale'))),
         'questions': ('none', 'sft', 'seg', *(a for a in ARMS if '-asked-' in a)),
         'input': ('none', 'sft', 'seg', 'sft-code', 'seg-code')}
# Post-training shorter than the main job's: arms are compared while there is still something to learn.
STEPS = {'cpu': ['--post_steps', '400', '--sample_every', '100', '--save_every', '100'],
         'gpu': ['--sample_every', '500'], 'test': ['--sample_every', '3']}
RECIPE = 5      # counts changes of model or training after which old arms must not be mixed in
PAIRS = (('circle', 'ring'), ('square', 'cross'))           # the shapes hardest to tell apart

class Limited:
    """World mixin: only the first `pictures` maps or `questions_` pictures with questions exist."""
    pictures = questions_ = 0

    @staticmethod
    def again(split, index, B, limit):
        """The index of a batch among the first limit / B: a step has three, see train.umm_losses."""
        return index % (3 * max(1, limit // B)) if limit and split == 'train' else index

    def proxies(self, split, index, B, name):
        return super().proxies(split, self.again(split, index, B, self.pictures), B, name)

    def questions(self, split, index, B, Q, **how):
        return super().questions(split, self.again(split, index, B, self.questions_), B, Q, **how)

# ---- probes: what a linear map can read from frozen features ----
@torch.no_grad()
def features(umm, tok, world, split, index, n):
    """-> (states of the picture's positions per layer [n_layer + 1, n * N, C], labels {task: [n * N]},
    -1 = not asked). A patch is an object's if that object covers half of it."""
    found, r, _ = world.scenes(split, index, n)
    states, p = [], umm.c.patch
    hooks = [b.register_forward_hook(lambda m, a, out: states.append(out)) for b in umm.blocks]
    image = umm.inputs(tok, r.image)
    umm.hidden(data.pack(world.text, [[('what is where?', None)]] * n, image, world.device))
    for hook in hooks:
        hook.remove()
    layers = [umm.embed_image(image)] + states[::2]        # a block sees the picture first, then text
    cover = F.avg_pool2d(F.one_hot(r.instance, 5).permute(0, 3, 1, 2).float(), p)     # [n,5,G,G]
    share, slot = cover.flatten(2).max(1)                                             # [n,N]
    slot = torch.where(share >= .5, slot, -1).cpu()
    look = lambda f: torch.tensor([[f(objs[k - 1]) if k > 0 else -1 for k in row]
                                   for (objs, _), row in zip(found, slot.tolist())]).flatten()
    g = torch.Generator().manual_seed(index)
    labels = {'shape': look(lambda o: SHAPES.index(o.shape)),
              'colour': look(lambda o: list(COLOURS).index(o.colour)),
              'depth': look(lambda o: int(o.z > .5)),
              'object': torch.where(slot < 0, -1, slot > 0).flatten()}
    labels['control'] = torch.where(labels['shape'] < 0, -1,
                                    torch.randint(5, labels['shape'].shape, generator=g))
    return torch.stack([x.flatten(0, 1) for x in layers]).cpu(), labels

def ridge(X, y, X_test, strength=1e-2):
    """Ridge regression to one-hot labels, closed form; X standardised, [n, C]. -> predictions."""
    mean, std = X.mean(0), X.std(0) + 1e-6
    add = lambda x: F.pad((x - mean) / std, (0, 1), value=1.).double()                # [n,C+1]
    A, Y = add(X), F.one_hot(y).double()
    penalty = strength * len(X) * torch.eye(A.shape[1], dtype=A.dtype)
    return (add(X_test) @ torch.linalg.solve(A.T @ A + penalty, A.T @ Y)).argmax(-1)

def probe(umm, tok, world, n=400) -> dict:
    """Balanced accuracy per task and layer on scenes that the probe has not seen (and accuracy on PAIRS
    of shapes). `control`: as shape, but random labels, scored on the patches that the probe was fitted
    to: what it can memorise (after Hewitt & Liang 2019)."""
    (X, y), (X_test, y_test) = (features(umm, tok, world, split, 2**27, m)
                                for split, m in (('train', n), ('test', n // 2)))
    out = {}
    for task in y:
        X_at, y_at = (X, y[task]) if task == 'control' else (X_test, y_test[task])
        a, b, out[task] = y[task] >= 0, y_at >= 0, []
        true = y_at[b]
        for layer in range(len(X)):
            got = ridge(X[layer][a], y[task][a], X_at[layer][b])
            out[task].append(np.mean([(got[true == k] == k).float().mean().item()
                                      for k in true.unique()]))
            for pair in PAIRS if task == 'shape' else ():
                kept = [SHAPES.index(s) for s in pair]
                i, j = (torch.isin(t, torch.tensor(kept)) for t in (y[task], y_test[task]))
                got2 = ridge(X[layer][i], (y[task][i] == kept[1]).long(), X_test[layer][j])
                right = (got2 == (y_test[task][j] == kept[1])).float().mean().item()
                out.setdefault('/'.join(pair), []).append(right)
    return out

def projection(umm, tok, world, n) -> dict:
    """The first two principal components of the middle layer at object patches, and their shapes."""
    X, y = features(umm, tok, world, 'test', 2**27, n)
    x = X[len(X) // 2][y['shape'] >= 0]
    x = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2].T       # [m,2]
    return {'xy': x.tolist(), 'shape': y['shape'][y['shape'] >= 0].tolist()}

# ---- attention: the softmax weights of the forward pass itself ----
@contextlib.contextmanager
def recorded():
    """Within, every call of model.attention leaves its weights [B, H, T, keys] in the list."""
    kept, original = [], model.attention

    def attention(q, k, v, mask):
        scores = (q * q.shape[-1] ** -.5) @ k.mT                                      # [B,H,T,keys]
        kept.append(torch.softmax(scores if mask is None else scores + mask, dim=-1))
        return kept[-1] @ v
    model.attention = attention
    try:
        yield kept
    finally:
        model.attention = original

def bucket(word: str) -> str:
    """object, colour, position or other: what a word of a prompt is about."""
    word = word.strip('.,?')
    return 'object' if word in SHAPES or word in data.PLURAL.values() else \
        'colour' if word in COLOURS else \
        'position' if word in 'top left right bottom above below of'.split() else 'other'

def buckets(text, line: str) -> list[str]:
    """The bucket of each token of a line; a comma is 'other', not its word's."""
    return [kind for word in line.split()
            for kind in [bucket(word)] * (len(text.encode(word)) - word.endswith(','))
            + ['other'] * word.endswith(',')]

@torch.no_grad()
def attention_shares(umm, tok, world, n=128) -> dict:
    """Per layer, mean over heads and pictures: from the position that answers 'where is the X?', the
    share of mass on the picture, on the patches of X, on text; while drawing, the shares of the prompt's
    and the plan's kinds of words in the mass on text."""
    N, out = umm.c.grid ** 2, {}
    found, r, rng = world.scenes('test', 2**26, n)
    asked = [rng.randrange(len(objs)) for objs, _ in found]
    rows = [[(f'where is the {objs[k].name}?', data.CELLS[objs[k].cell])]
            for (objs, _), k in zip(found, asked)]
    s = data.pack(world.text, rows, umm.inputs(tok, r.image), world.device)
    with recorded() as kept:
        umm.hidden(s)
    at = (s.target >= 0).int().argmax(1)                   # where the answer's first word is predicted
    mine = F.max_pool2d((r.instance == torch.tensor(asked, device=r.instance.device)[:, None, None] + 1)
                        .float()[:, None], umm.c.patch).flatten(1)                    # [n,N]
    rows = [w[torch.arange(n), :, at].mean(1) for w in kept[1::2]]                    # [n,N+T] per layer
    out['picture'] = [w[:, :N].sum(1).mean().item() for w in rows]
    out['asked object'] = [(w[:, :N] * mine).sum(1).mean().item() for w in rows]
    out['text'] = [w[:, N:].sum(1).mean().item() for w in rows]
    prompts = [data.caption(objs, 'list', rng) for objs, _ in found]
    plans = [data.caption(objs, 'place', rng) for objs, _ in found]
    s = data.pack(world.text, [[turn] for turn in zip(prompts, plans)], device=world.device)
    s.codes = tok.encode(r.image)
    with recorded() as kept:
        umm.hidden(s)
    kinds = [buckets(world.text, prompt) + ['other'] + buckets(world.text, plan)
             for prompt, plan in zip(prompts, plans)]
    text = [w[:, :, -N:, :s.text.shape[1]].mean((1, 2)) for w in kept]                # [n,T] per layer
    for name in ('object', 'colour', 'position', 'other'):
        m = torch.tensor([[k == name for k in row] + [False] * (s.text.shape[1] - len(row))
                          for row in kinds], device=world.device)                     # [n,T]
        out['draw: ' + name] = [((w * m).sum(1) / w.sum(1)).mean().item() for w in text]
    return out

# ---- one arm ----
def base_of(arm: str) -> str:
    """The pre-trained run that an arm starts from; a base's is itself."""
    return 'base-code' if arm.endswith('-code') else 'base'

def plan_of(a) -> list:
    """What all arms of one folder share; others must not be mixed in."""
    return [a.preset, a.n, RECIPE, a.data, a.steps]

def prepare(folder: Path, flags: list):
    """A Run in `folder`, resumed if it was begun before."""
    begun = (folder / 'state.safetensors').exists()
    s = train.parse([*flags, '--out', str(folder), '--resume' if begun else '--overwrite'])
    torch.set_num_threads(s.threads)
    return train.Run(s, data.find_device(s.device))

def work(a, seed: int, arm: str):
    """Run one arm (or a base) to its result.json, its output to out.txt."""
    if boss := multiprocessing.parent_process():       # a worker must not outlive a plan that is killed
        threading.Thread(target=lambda: (boss.join(), os._exit(1)), daemon=True).start()
    base, folder, begin = base_of(arm), a.out / f'seed{seed}' / arm, time.time()
    flags = ['--preset', a.preset, '--seed', str(seed), '--device', a.device,
             '--dtype', 'float32', '--threads', str(a.threads),    # all arms compute alike
             *STEPS[a.preset],
             *(['--image_input', 'code'] if base == 'base-code' else []),
             *(['--data', a.data] if a.data else []), *['--skip_bad'] * a.skip_bad,
             *(['--post_steps', str(a.steps)] if a.steps else [])]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'out.txt', 'a') as out, contextlib.redirect_stdout(out):
        if arm == base:
            run = prepare(folder, flags)
            train.train_tokenizer(run)
            train.pretrain(run)
            run.save('pretrained.safetensors', 'posttrain', 0)
            scores = {}
        else:
            how = dict(ARMS[arm] or {'proxy': 'none'})
            limits = {k: how.pop(k, 0) for k in ('pictures', 'questions')}
            steps = train.parse(flags).post_steps * how.pop('longer', 1)
            for k, v in how.items():
                flags += [f'--{k}', str(v)]
            flags += ['--init', str(folder.parent / base / 'pretrained.safetensors'),
                      '--post_steps', str(round(steps))]
            run = prepare(folder, flags)
            run.world.__class__ = type('LimitedWorld', (Limited, type(run.world)), {})
            run.world.pictures, run.world.questions_ = limits['pictures'], limits['questions']
            if arm != 'none':
                train.posttrain(run)
            run.umm.eval()
            scores = measure(run, a.n)
        result = {'arm': arm, 'seed': seed, 'plan': plan_of(a),
                  'seconds': time.time() - begin, 'steps': run.s.post_steps, 'scores': scores,
                  'log': [json.loads(x) for x in run.lines if '"val"' in x]}
    (folder / 'result.part').write_text(json.dumps(result))
    os.replace(folder / 'result.part', folder / 'result.json')

def measure(run, n) -> dict:
    """All scores of an arm, on test scenes that are the same for every arm and seed. Of real pictures no
    scenes are known: there are no probes and no attention shares."""
    umm, tok, world = run.umm, run.tok, copy.copy(run.world)
    world.seed, n = 0, min(n, world.limit('test'))
    if isinstance(world, Folder):
        scores = {'generation': evaluation.recognition(umm, tok, world, min(n, 192), run.s.cfg)} \
            if world.captions else {}
    else:
        scores = {'generation': evaluation.generation(umm, tok, world, max(2, n // 12), run.s.cfg),
                  'probe': probe(umm, tok, world, max(50, n * 3 // 4)),
                  'projection': projection(umm, tok, world, max(20, n // 10)),
                  'attention': attention_shares(umm, tok, world, max(16, n // 4))}
    scores['understanding'] = evaluation.understanding(umm, tok, world, n)
    if run.s.proxy == 'seg' and 'seg' in world.maps:
        scores['segmentation'] = evaluation.segmentation(umm, tok, world, max(16, n // 4))
    evaluation.picture(umm, tok, world, run.s.cfg).save(run.dir / 'samples.png')
    return scores

def execute(a, arms):
    """All that is not finished, at most --jobs at a time: the bases first, then their arms. A run that
    fails does not stop the others. -> what failed and why"""
    def done(seed, arm):
        path = a.out / f'seed{seed}' / arm / 'result.json'
        if path.exists() and json.loads(path.read_text())['plan'] != plan_of(a):
            raise UserError(f'{path} is of another --preset, --n, --data, --steps or recipe: '
                            'choose another --out, or delete its folder')
        return path.exists()

    need = {(seed, arm): base_of(arm) for arm in arms for seed in range(a.seeds) if not done(seed, arm)}
    todo = sorted({(seed, base) for (seed, _), base in need.items() if not done(seed, base)})
    total, running, failed, begin = len(need) + len(todo), {}, [], time.time()
    print(f'{total} runs to do, {a.jobs} at a time, under {a.out}')
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        while todo or need or running:
            ready = [k for k, base in need.items() if done(k[0], base)]
            if not (todo or ready or running):
                break                                      # what is left waits for a base that failed
            while (todo or ready) and len(running) < a.jobs:
                key = todo.pop(0) if todo else ready.pop(0)
                need.pop(key, None)
                running[pool.submit(work, a, *key)] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                seed, arm = running.pop(future)
                if error := future.exception():
                    failed.append(f'seed {seed} {arm}: {error}')
                    print(failed[-1], flush=True)
                    continue
                finished = total - len(todo) - len(need) - len(running)
                left = (time.time() - begin) / finished * (total - finished) / 60
                print(f'{finished}/{total} seed {seed} {arm}: done; about {left:.0f} minutes left',
                      flush=True)
    return failed

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument('--seeds', type=int, default=5, help='seeds 0, 1, ... (default 5)')
    p.add_argument('--only', default='main', choices=PLANS, help='which plan (default main)')
    p.add_argument('--arms', default='', help='arms by name, comma-separated, instead of a plan')
    p.add_argument('--preset', default='cpu', choices=STEPS, help='default cpu')
    p.add_argument('--out', type=Path, default=None, help='default out/reproduce')
    p.add_argument('--steps', type=int, default=0, help='of post-training, a '
                   'multiple of 200; 0: 400 (gpu: 3,000, test: 6)')
    p.add_argument('--data', default='', help='folder of real pictures instead of the procedural world')
    p.add_argument('--jobs', type=int, default=0, help='runs at a time; 0: one per core, 1 on a GPU')
    p.add_argument('--n', type=int, default=0, help='test pictures for understanding; 0: 512 (test: 64)')
    p.add_argument('--skip-bad', action='store_true', help='leave out bad rows of --data')
    p.add_argument('--report', action='store_true', help='write the report only')
    a = p.parse_args(argv)
    arms = a.arms.split(',') if a.arms else PLANS[a.only]
    for arm in arms:
        if arm not in ARMS:
            raise UserError(f"--arms names {arm!r}: choose from {', '.join(ARMS)}")
    if not 1 <= a.seeds <= 100 or min(a.jobs, a.n, a.steps) < 0:
        raise UserError(f'--seeds is {a.seeds}, --jobs {a.jobs}, --n {a.n}, --steps {a.steps}: '
                        '1 to 100 seeds, no negatives')
    a.device = data.find_device().type if a.preset == 'gpu' else 'cpu'
    a.data = a.data and str(Path(a.data).resolve())
    name = '-'.join(['reproduce', *[a.preset] * (a.preset != 'cpu'),
                     *[Path(a.data).name] * bool(a.data)])
    a.out = (a.out or Path('out') / name).resolve()
    a.jobs = a.jobs or (1 if a.device == 'cuda' else os.cpu_count())
    a.threads, a.n = max(1, os.cpu_count() // a.jobs), a.n or (64 if a.preset == 'test' else 512)
    if a.data and not a.report:        # decoded here once, before the workers would all do it
        world = open_world(a.data, train.parse(['--preset', a.preset]).size, 0, 'cpu', None, a.skip_bad)
        taught = {arm: (ARMS[arm] or {'proxy': 'none'}).get('proxy', 'seg') for arm in arms}
        without = [arm for arm in arms if taught[arm] not in (*world.targets, 'none')]
        if without:
            print(f"{a.data} has no maps for {', '.join(without)}: left out")
        arms = [arm for arm in arms if arm not in without]
    failed, os.environ['TQDM_DISABLE'] = [], '1'               # the workers' bars would mix
    if not a.report:
        try:
            a.out.mkdir(parents=True, exist_ok=True)
            failed = execute(a, arms)
        except OSError as e:
            raise UserError(f'cannot write to {a.out} ({e.strerror}): choose another --out')
        except (KeyboardInterrupt, BrokenExecutor):
            raise UserError('stopped; finished arms are kept: the same command goes on')
    from experiments.report import report
    torch.set_num_threads(a.threads)       # two threads on a busy machine can be many times slower
    report(a.out)
    if failed:
        raise UserError('failed: ' + '; '.join(failed)
                        + '. See out.txt there; the same command tries again')

if __name__ == '__main__':
    data.guard(main)
