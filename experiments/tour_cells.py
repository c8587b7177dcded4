"""The cells of tour.ipynb; `python -m experiments.tour` runs them and builds it."""

# %% [markdown]
# # Look inside nanoUMM
#
# What a small model that answers, draws and segments has inside, picture by picture. You should
# know what a neural network is, and have seen PyTorch once. The functions used here are the
# project's own: keep `data.py`, `model.py` and `eval.py` open beside this page.
#
# All pictures and numbers are of **one run of the main job, `out/cpu`**: that is `python
# train.py` and nothing else. `python -m experiments.tour` runs all cells and writes this notebook
# again. The answers printed under the exercises are of an earlier run, with three attention heads
# (`--n_head 3`): yours will differ in detail.

# %%
import json
import os
import sys
from pathlib import Path

here = Path.cwd()
ROOT = here if (here / 'model.py').exists() else here.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import data  # before torch: it tells OpenMP how to wait
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import eval as evaluation
import sample
from experiments import probes
from experiments.tour import bars, lines, looked_at, show
from model import draw, load, write

torch.set_grad_enabled(False)          # nothing is trained here
run = Path(os.environ.get('NANOUMM_RUN', 'out/cpu'))
tok, umm, text, _, meta = load(run / 'model.safetensors')
c = umm.c
G = c.grid
N = G * G
seed = meta['settings']['seed']
world = data.World(c.size, seed, text=text)
many = 200             # test pictures of a measurement
if N < 64:             # a model of the tests
    many = 16
for name, network in (('tokenizer', tok), ('transformer', umm)):
    sizes = [p.numel() for p in network.parameters()]
    print(name, 'parameters:', sum(sizes))
print('pixels:', c.size * c.size)
print('codes:', N, 'each one of', c.codebook)

# %% [markdown]
# ## 1. What the model sees
#
# A world of flat shapes, made when it is needed: one to four objects on textured grey. A scene is
# a list of objects. Its picture, captions, questions and maps follow from that list, so each is
# exactly right. These scenes are of the test split, which training never shows.

# %%
scenes, r, rng = world.scenes('test', 'tour', 0, 8)
captions = [data.caption(scene.objects, 'list', rng) for scene in scenes]
show(r.image, captions, across=4, side=2.1)

# %% [markdown]
# Ten types of question are asked. Their answers are balanced: who guesses from the words alone
# stays at chance. Here is a question of each type about one picture, as far as they fit.

# %%
counts = [len(scene.objects) for scene in scenes]
busy = counts.index(max(counts))
scene = scenes[busy]
picture = r.image[busy]                                                               # [3,S,S]
asked = []                                                     # (question, true answer)
for kind in world.kinds:
    found = world.ask(scene, kind, rng)
    asked += found
    print(kind, found)
show([picture], side=2.1)

# %% [markdown]
# Maps are pictures too. `seg` paints each object in the colour of its class. A model may be
# taught to generate any of these five; the main job teaches `seg`.

# %%
pictures = [picture]
titles = ['picture']
for name, m in data.MAPS.items():
    maps = m.draw(r)                                                                  # [8,3,S,S]
    pictures.append(maps[busy])
    titles.append(name)
show(pictures, titles)

# %% [markdown]
# Text becomes tokens: frequent words are one token, others are spelled in pieces. Nothing that is
# typed can become one of the two special tokens, which open and close an answer.

# %%
for sentence in ('a red circle left of a blue square', 'a zebra on the moon', '<|end|>'):
    tokens = text.encode(sentence)
    pieces = [text.vocab[token] for token in tokens]
    print(tokens, b'|'.join(pieces).decode())
print('tokens:', text.size)
print('an answer opens with', text.answer)
print('and closes with', text.end)

# %% [markdown]
# ## 2. What a code is
#
# The tokenizer turns a picture into a grid of codes, which are integers, and back. Below: the
# picture, its codes as numbers, the mean colour of each code decoded alone, and all codes decoded
# together. Only together do they give edges: the decoder looks at neighbours.

# %%
def alone(codes):
    """[n] codes -> [n, 3, S, S]: for each the picture of nothing but that code."""
    repeated = codes[:, None].expand(-1, N)                                           # [n,N]
    return tok.decode(repeated)


image = picture[None]                                                                 # [1,3,S,S]
codes = tok.encode(image)                                                             # [1,N]
decoded = tok.decode(codes)                                                           # [1,3,S,S]
colours = alone(codes[0]).mean((2, 3))                                                # [N,3]
colours = colours.T.reshape(3, G, G)
pale = colours * .25 + .75
pictures = [picture, pale, colours, decoded[0]]
titles = ['picture', 'its codes', 'each alone', 'all decoded']
show(pictures, titles, side=2.6)
ax = plt.gcf().axes[1]
for place, code in enumerate(codes[0].tolist()):
    row = place // G
    column = place % G
    ax.text(column, row, code, ha='center', va='center', fontsize=7)

# %% [markdown]
# The whole codebook, each code decoded alone, from dark to bright. Greys make the background of
# pictures; black and the corners of the colour cube are mostly used by segmentation maps.

# %%
K = c.codebook
every = alone(torch.arange(K))                                                        # [K,3,S,S]
patches = F.pixel_unshuffle(every, c.patch)                                           # [K,3*P*P,G,G]
inside = patches[:, :, G // 2, G // 2]                                                # [K,3*P*P]
tiles = inside.view(K, 3, c.patch, c.patch)
order = tiles.mean((1, 2, 3)).argsort()
sheet = sample.grid(tiles[order].split(32), scale=5, gap=1)
sheet

# %% [markdown]
# Codes are directions in space, and near ones look alike. Each row: a code of the picture above,
# then its seven nearest neighbours, with their similarity (1: the same direction).

# %%
codebook = F.normalize(tok.quantizer.codebook, dim=-1)                                # [K,dim]
similar = codebook @ codebook.T                                                       # [K,K]
different = codes[0].unique()
chosen = different[:4]
near = similar[chosen].topk(8)
values = near.values.flatten()                                                        # [32]
titles = [f'{s:.2f}' for s in values.tolist()]
pictures = tiles[near.indices.flatten()]                                              # [32,3,P,P]
show(pictures, titles, side=.8)

# %% [markdown]
# What does one code do? Here one in the middle is replaced by the code that is least like it. The
# decoder looks around each code, so the change reaches a little beyond its own patch, and no
# farther.

# %%
place = G // 2 * G + G // 2
code = codes[0, place]
swapped = codes.clone()
swapped[0, place] = similar[code].argmin()
a = decoded[0]
b = tok.decode(swapped)[0]
change = a - b
change = change.abs().mean(0)                                                         # [S,S]
titles = ['as it was', 'one code changed', 'difference']
show([a, b, change], titles, side=2)

# %% [markdown]
# ## 3. A sequence, and who sees whom
#
# One transformer reads and writes `[picture][text][codes]`. Left, answers: two questions about a
# picture are two *turns*. Both see the picture and their own past, but not each other. Right, a
# drawing: a code sees the prompt, the plan and the codes before it. Blue: this row sees that
# column.

# %%
turns = [
    ('how many objects are there?', '2'),
    ('is there a ring?', 'no'),
]
questions = data.pack(text, [turns])
T = questions.text.shape[1]
see, _ = umm.places(questions.turn, T, 0)                                             # [1,T,T]
see = F.pad(see, (N, 0), value=True)                                                  # [1,T,N+T]
turn = ('a red ring', 'top left a red ring')
drawing = data.pack(text, [[turn]])
T = drawing.text.shape[1]
numbers = F.pad(drawing.turn, (0, N), value=1)                                        # [1,T+N]
draws, _ = umm.places(numbers, T, 0)                                                  # [1,T+N,T+N]
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
look = {'cmap': 'Blues', 'aspect': 'auto', 'interpolation': 'nearest'}
left.imshow(see[0], **look)
left.set_title('[picture][turn 1][turn 2]')
left.set_ylabel('text')
right.imshow(draws[0], **look)
right.set_title('[prompt, plan][codes]')
right.set_ylabel('text, then codes')
plt.show()

# %% [markdown]
# ## 4. How it learned
#
# Three stages. The tokenizer learns to copy pictures. Pre-training learns to draw from text.
# Post-training learns to answer, with segmentation maps beside the questions. Losses of the
# transformer are in nats: who knows nothing of 512 codes has ln 512 = 6.2.

# %%
log = []
for line in open(run / 'log.jsonl'):
    log.append(json.loads(line))
LOSSES = {
    'tokenizer': ('mse',),
    'pretrain': ('text', 'plan', 'draw'),
    'posttrain': ('text', 'plan', 'draw', 'seg'),
}
_, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout='constrained')
for ax, stage in zip(axes, LOSSES):
    curves = {}
    for name in LOSSES[stage]:
        points = []
        for line in log:
            if line['stage'] == stage and name in line:
                points.append((line['step'], line[name]))
        curves[name] = points
    lines(curves, 'step', stage, ax)
axes[0].set_yscale('log')

# %% [markdown]
# ## 5. Drawing, step by step
#
# First the model writes a plan, what is where. Each token is drawn from the chances that the text
# head gives, after a temperature of .4 has made the likely ones likelier. Here they are before that,
# with the likeliest tokens at the three places where it was least sure. Whether the two things lie
# above or below was not asked for: the model had to choose.

# %%
prompt = 'a red circle left of a blue square'
g = torch.Generator().manual_seed(0)
drawn, plans = draw(umm, text, [prompt], g, cfg=2.)
plan = plans[0]
s = data.pack(text, [[(prompt, plan)]])
s.codes = drawn
states = umm.hidden(s)[0]                                                             # [T+N,C]
planned = s.target[0] >= 0                                                            # [T]
written = s.target[0][planned]                                                        # [n]
states_of_plan = states[:-N][planned]                                                 # [n,C]
logits = umm.text_head(states_of_plan)                                                # [n,V]
chances = logits.softmax(-1)


def print_tokens(tokens, chances):
    """Tokens [n] in words, with the chance [n] of each."""
    said = []
    for token, chance in zip(tokens.tolist(), chances.tolist()):
        word = text.decode([token]) or 'END'
        said.append(f'{word} {chance:.2f}')
    print(',  '.join(said))


sure = chances.gather(1, written[:, None])[:, 0]                                      # [n]
print_tokens(written, sure)
print('where it was least sure:')
for i in sure.argsort()[:3]:
    best = chances[i].topk(3)
    print_tokens(best.indices, best.values)

# %% [markdown]
# Then the codes, one after another, row by row. What is not drawn yet is filled with the code of
# plain grey.

# %%
grey = tok.encode(torch.full_like(image, .5))                                         # [1,N]
counts = torch.linspace(0, N, 8).long()                                               # [8]
known = torch.arange(N) < counts[:, None]                                             # [8,N]
frames = torch.where(known, drawn, grey)                                              # [8,N]
titles = [f'{n} codes' for n in counts.tolist()]
show(tok.decode(frames), titles)

# %% [markdown]
# How sure was it of each code? Dark is sure. Inside a shape, and once the background is settled,
# it knows what must come. Where a shape begins, and what the background looks like, it has to
# choose.

# %%
logits = umm.pixel_head(states[-N:])                                                  # [N,K]
chances = logits.softmax(-1)
certainty = chances.gather(1, drawn.T)                                                # [N,1]
finished = tok.decode(drawn)[0]                                                       # [3,S,S]
pictures = [finished, certainty.view(G, G)]
show(pictures, ['drawing', 'certainty'], side=2.2)

# %% [markdown]
# What counts, the sentence or the plan? Here the sentence is always "a red circle", and the plans are
# ours. The drawings follow the plan, even where it contradicts the sentence.

# %%
ours = [
    'top left a red circle',
    'bottom right a red circle',
    'top left a blue square',
    'top left a red circle, bottom right a red circle',
    'top left a red circle, top right a green ring',
]
s = data.pack(text, [[('a red circle', plan)] for plan in ours])
g = torch.Generator().manual_seed(0)
follows = umm.generate(s, cfg=2., temperature=.4, generator=g)                        # [5,N]
show(tok.decode(follows), ours, across=5, side=2.1)

# %% [markdown]
# ## 6. Guidance
#
# Each step is computed twice, with the text and without it; guidance goes on from the second
# through the first, so that what the text wants counts more. 1 is off. Rows: guidance 1, 2 and 4,
# the same four seeds. Below, the share of drawings that show what was asked for, found by rule,
# with its 95% interval. A little helps, too much spoils.

# %%
pictures = []
titles = []
prompts = [prompt] * 4
for guidance in (1., 2., 4.):
    g = torch.Generator().manual_seed(1)
    four, _ = draw(umm, text, prompts, g, cfg=guidance)                               # [4,N]
    pictures += tok.decode(four)
    titles += [f'guidance {guidance:g}'] * 4
    scores = evaluation.generation(umm, tok, world, many // 8, guidance)
    share = evaluation.as_text(scores['mean'])
    print('guidance', guidance, 'right:', share)
show(pictures, titles, across=4)

# %% [markdown]
# ## 7. What an answer looks at
#
# Attention is a set of weights that sum to one: how much of each position goes into the next
# state. Here it is, from the place where the first word of the answer is predicted, over the
# patches of the picture, mean over the heads. Dark patches were not looked at.

# %%
wanted = scene.objects[0]
question = f'where is the {wanted.name}?'
answer = data.CELLS[wanted.cell]
s = data.pack(text, [[(question, answer)]], image)
with probes.recorded() as kept:
    umm.hidden(s)
L = c.n_layer
answered = s.target[0] >= 0                                                           # [T]
at = answered.int().argmax()           # the answer's first word is predicted here
pictures = [picture]
titles = [question]
for weights in kept[L:]:               # after those of the picture itself: [1,H,T,N+T]
    w = weights[0, :, at].mean(0)                                                     # [N+T]
    w = w[:N]
    pictures.append(looked_at(picture, w, c.patch))
    titles.append(f'{w.sum():.0%} on the picture')
show(pictures, titles, side=2.1)

# %% [markdown]
# The same over many pictures, before and after post-training: the share of all attention that
# lies on the object that is asked about.

# %%
_, before, _, _, _ = load(run / 'pretrained.safetensors')
BOTH = {'before': before, 'after': umm}
shares = {}
for name, network in BOTH.items():
    found = probes.attention_shares(network, tok, world, many)
    shares[name] = found['asked object']
layers = list(range(1, L + 1))
bars(shares, layers, 'share on the object')

# %% [markdown]
# ## 8. Before and after segmentation tuning
#
# `pretrained.safetensors` can draw and was hardly ever asked. `model.safetensors` was
# post-trained with questions and maps. The same questions about the same picture:

# %%
for question, true in asked:
    print(question)
    s = data.pack(text, [[(question, None)]], image)
    for name, network in BOTH.items():
        answers = write(network, text, s, temperature=0)
        print(f'    {name:7}', answers[0])
    print('    true   ', true)

# %% [markdown]
# The map that each generates when it is told to segment the picture:

# %%
instruction = data.MAPS['seg'].words[0]
s = data.pack(text, [[(instruction, None)]], image)
pictures = [picture]
for network in BOTH.values():
    written = network.generate(s, temperature=0)                                      # [1,N]
    pictures += tok.decode(written)
true = data.seg_map(r)[busy]                                                          # [3,S,S]
pictures.append(true)
titles = ['picture', 'map before', 'map after', 'true map']
show(pictures, titles, side=1.8)

# %% [markdown]
# Right answers by type of question, beside the best guess from the words alone (`blind`):

# %%
known = {'blind': evaluation.blind(world, many)}
for name, network in BOTH.items():
    known[name] = evaluation.understanding(network, tok, world, many)
kinds = ['mean', *world.kinds]
groups = {}
for name, found in known.items():
    shares = []
    for kind in kinds:
        share = found[kind]['value']
        shares.append(share or 0)
    groups[name] = shares
bars(groups, kinds, 'share right')

# %% [markdown]
# Where is the shape known? A *probe* is a linear classifier that reads the states of one layer at
# the patches of an object. Its accuracy on new pictures tells what lies open there. Colours lie
# open in the pixels themselves. Shapes do not: five shapes give .2 by chance. After post-training
# they can be read from the third layer on.

# %%
curves = {}
for name, network in BOTH.items():
    found = probes.probe(network, world, many)
    for task in ('shape', 'colour'):
        points = enumerate(found[task])
        curves[f'{task}, {name}'] = list(points)
lines(curves, 'layer (0: what goes in)', 'accuracy of the probe')

# %% [markdown]
# ## 9. Where it fails
#
# Wrong answers of the trained model. Most need two objects at once: where one lies as seen from
# the other, which of two is nearer. Sizes are judged by depth, which a picture of one object
# hardly shows.

# %%
pictures = []
titles = []
for kind in ('relation', 'distance', 'depth', 'size', 'count'):
    some, seen, rng = world.scenes('test', kind, 0, 12)
    wrong = 0
    for scene, picture in zip(some, seen.image):
        for question, true in world.ask(scene, kind, rng):
            s = data.pack(text, [[(question, None)]], picture[None])
            answers = write(umm, text, s, temperature=0)
            if answers[0] != true and wrong < 2:
                wrong += 1
                pictures.append(picture)
                titles.append(f'{question} {answers[0]} (true: {true})')
show(pictures, titles, across=5, side=2.2)

# %% [markdown]
# And drawings that do not show what was asked for, as the rule found:

# %%
pictures, titles = [], []
for category in ('position', 'counting', 'attribution'):
    prompts, wanted, _ = evaluation.prompts(world, category, 16)
    g = torch.Generator().manual_seed(0)
    codes, _ = draw(umm, text, prompts, g, cfg=2.)                                    # [16,N]
    drawn = tok.decode(codes)                                                         # [16,3,S,S]
    found = evaluation.detect(drawn)
    for i, objects in enumerate(wanted):
        right = evaluation.satisfied(objects, category, found[i])
        if not right:
            pictures.append(drawn[i])
            titles.append(prompts[i])
show(pictures[:8], titles[:8], across=4, side=2.1)

# %% [markdown]
# The world is all that it knows. There is no white, no star, no five and no dog in it, and nobody asked
# it to leave something out. It draws all the same, and does not say that it guesses. Behind each
# sentence stands the plan that it wrote.

# %%
strange = [
    'a white circle',
    'a red star',
    'five circles',
    'a dog',
    'nothing',
    'a circle inside a square',
    'no red circle',
    'ein roter kreis',
]
g = torch.Generator().manual_seed(0)
guesses, plans = draw(umm, text, strange, g, cfg=2.)                                  # [8,N]
titles = [f'{said}: {plan}' for said, plan in zip(strange, plans)]
show(tok.decode(guesses), titles, across=4, side=2.1)

# %% [markdown]
# ## 10. Ten exercises
#
# From easy to hard. Each was tried on this run, with `many = 200`; the figure that came out stands
# behind it, with its 95% interval where it has one. The trainings of the last three ran with
# `--threads 1 --dtype bfloat16 --eval_n 256`, one seed each. Guess first, then try.
#
# **1.** Set guidance to 8: `evaluation.generation(umm, tok, world, 20, 8.)`. *Right drawings: .23
# [.18, .32]. With guidance 2 these 120 prompts give .83 [.75, .88]; the 150 of section 6 gave .75
# [.67, .80].* Why does a louder text spoil the picture?
#
# **2.** Replace each code by its nearest neighbour, `near = similar.topk(2).indices[:, 1]`, and decode
# `near[codes]`. *Over 200 pictures the PSNR falls from 26.7 to 23.9 dB.* Which parts suffer?
#
# **3.** Ask in other words: in `data.QUESTIONS`, count with "number of {}?", and ask for existence with
# "is a {} in the picture?". *count falls from .92 to .46, exist from .99 to .06: it never says yes or no
# to the second.* How many ways of asking must training show?
#
# **4.** Mirror the pictures, and leave questions and answers as they are. *where falls from .93 to .05,
# what from 1.00 to .47, shape stays at .98.* What would .5 for `where` have meant?
#
#     class Mirrored(data.World):
#         def scenes(self, *where, **how):
#             scenes, r, rng = super().scenes(*where, **how)
#             return scenes, r._replace(image=r.image.flip(3)), rng
#
#     evaluation.understanding(umm, tok, Mirrored(c.size, 0, text=text), many)
#
# **5.** Exchange red and blue instead, `flip(1)`. *colour falls from .96 to .36.* Which colours are
# still right? *But shape falls too, from .99 to .80, and "where" to .73.* Why? Then take the colour
# away, `r.image.mean(1, keepdim=True).expand_as(r.image)`. *Everything falls to chance: mean .29, and
# shape to .14, although shapes are as plain as before.* How does the model find the thing that it is
# asked about?
#
# **6.** Draw without a plan, from the prompt alone. *Right drawings fall from .83 to .01 [.00, .08].*
# Look at them. What would a model need that plans without words?
#
#     def without_plan(umm, text, prompts, generator=None, cfg=1.):
#         s = data.pack(text, [[(prompt, None)] for prompt in prompts])
#         return umm.generate(s, generator=generator, temperature=.4, cfg=cfg), prompts
#
#     import model
#     model.draw = without_plan
#
# **7.** Take out one layer, `del less.blocks[k]` of `less = copy.deepcopy(umm)`. *Understanding falls
# from .80 to .03, .50, .45 and .31 without the first, second, third and fourth. Without the third,
# colour falls to .22 and "where" only to .75; without the second it is the other way round, .84 and
# .57.* What does each layer do?
#
# **8.** Train: a smaller codebook, a minute each:
#
#     python train.py --until tokenizer --tok_steps 300 --out out/large
#     python train.py --until tokenizer --tok_steps 300 --codebook 32 --out out/small
#
# *PSNR 25.4 [25.1, 25.6] with 512 codes, 23.5 [23.3, 23.8] with 32; mIoU of masks .945 and .894.* A
# code of 32 says 5 bits and not 9. Where are they missed?
#
# **9.** Train: what is not repeated is forgotten. Post-train for 300 steps instead of 1,000, with and
# without drawings:
#
#     python train.py --init out/cpu/pretrained.safetensors --post_steps 300 --out out/short
#     python train.py --init out/cpu/pretrained.safetensors --post_steps 300 --post_draw 0 --out out/less
#
# *Right drawings fall from .65 [.58, .70] to .00 [.00, .04]. But shape rises from .33 [.28, .38] to
# .62 [.57, .67], and mIoU of the maps from .62 to .80.* What do the drawings cost, and whom?
#
# **10.** Train: let the maps see their earlier codes, `--hide 0` instead of `--post_draw 0`. *mIoU falls
# from .62 [.58, .67] to .26 [.24, .29], shape from .33 [.28, .38] to .24 [.20, .29], where chance is
# .2. Yet the loss of the maps is lower, 1.62 instead of 2.26 after 160 steps.* Why is a lower loss
# worse here?
