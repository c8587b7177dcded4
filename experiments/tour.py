"""Build tour.ipynb, the notebook that shows the inside of a trained model, from tour_cells.py:

    pip install -r experiments/requirements-tour.txt
    python -m experiments.tour                             of out/cpu; about two minutes
    python -m experiments.tour --run out/mine --out mine.ipynb

tour_cells.py is plain Python: `# %%` begins a cell of code, `# %% [markdown]` one of text. All cells are
run, and the notebook is written with what they gave. What they draw with stands here.
"""
import argparse
import math
import os
from pathlib import Path
from textwrap import fill

import data  # before torch: it tells OpenMP how to wait
from data import UserError

try:
    import matplotlib.pyplot as plt
except ImportError:
    data.fail('the tour needs more packages: pip install -r experiments/requirements-tour.txt')

ROOT = Path(__file__).resolve().parent.parent
CELLS = Path(__file__).with_name('tour_cells.py')
MOST = 2_000_000               # bytes of a notebook that code hosts still show
NEEDED = ('pretrained.safetensors', 'model.safetensors')       # before and after post-training


# ---- pictures in cells ----
def show(pictures, titles=(), across=8, side=1.5):
    """pictures: of [3, S, S] in [0, 1], or [G, G] numbers, as a grid, each `side` inches wide, with
    titles above them."""
    pictures = list(pictures)
    titles = [fill(title, int(13 * side)) for title in titles]
    high = max([title.count('\n') + 1 for title in titles], default=0)        # lines of text
    across = max(1, min(across, len(pictures)))
    down = max(1, math.ceil(len(pictures) / across))
    whole = (side * across, (side + .16 * high) * down)
    _, axes = plt.subplots(down, across, squeeze=False, layout='constrained', figsize=whole)
    for ax in axes.flat:
        ax.axis('off')
    for ax, x in zip(axes.flat, pictures):
        if x.dim() == 3:
            pixels = x.clamp(0, 1).permute(1, 2, 0)                                   # [S,S,3]
            ax.imshow(pixels, interpolation='nearest')
        else:
            ax.imshow(x, cmap='Blues', vmin=0)
    for ax, title in zip(axes.flat, titles):
        ax.set_title(title, fontsize=8)


def lines(curves: dict, x_label: str, y_label: str, ax=None):
    """{name: [(x, y)]} as lines."""
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3), layout='constrained')
    for name, points in curves.items():
        ax.plot(*zip(*points), label=name)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(fontsize=8, frameon=False)


def bars(groups: dict, names, y_label: str):
    """{group: values, one for each name} as bars beside each other."""
    _, ax = plt.subplots(figsize=(9, 2.6), layout='constrained')
    width = .8 / len(groups)
    for k, (group, values) in enumerate(groups.items()):
        places = [i + k * width for i in range(len(names))]
        ax.bar(places, values, width, label=group)
    middle = .4 - width / 2
    ax.set_xticks([i + middle for i in range(len(names))], names)
    ax.set_ylabel(y_label)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(fontsize=8, frameon=False)


def looked_at(image, weights, patch: int):
    """image [3, S, S] with the patches dark that have little of the weights [N]."""
    G = image.shape[-1] // patch
    light = (weights / weights.max()).view(G, G)                                      # [G,G]
    light = light.repeat_interleave(patch, 0).repeat_interleave(patch, 1)             # [S,S]
    return image * (.15 + .85 * light)


# ---- the notebook ----
def cells_of(text: str) -> list[tuple]:
    """-> [(kind, source)], kind 'code' or 'markdown'; what stands before the first mark is left out."""
    cells = []
    for part in text.split('\n# %%')[1:]:
        mark, _, source = part.partition('\n')
        source = source.strip('\n')
        if 'markdown' not in mark:
            cells.append(('code', source))
            continue
        said = [line.removeprefix('#').removeprefix(' ') for line in source.split('\n')]
        cells.append(('markdown', '\n'.join(said)))
    return cells


def build(run: str, timeout=600):
    """-> the notebook of a run, all cells run. UserError where a package is missing."""
    try:
        import nbclient
        import nbformat
    except ImportError as e:
        raise UserError(f'{e.name} is missing: pip install -r experiments/requirements-tour.txt')
    notebook = nbformat.v4.new_notebook()
    kernel = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
    notebook.metadata['kernelspec'] = kernel
    for number, (kind, source) in enumerate(cells_of(CELLS.read_text())):
        new = nbformat.v4.new_code_cell if kind == 'code' else nbformat.v4.new_markdown_cell
        notebook.cells.append(new(source, id=f'cell-{number}'))
    os.environ['NANOUMM_RUN'] = run                            # read by the first cell
    where = {'metadata': {'path': str(ROOT)}}
    client = nbclient.NotebookClient(notebook, timeout=timeout, kernel_name='python3', resources=where,
                                     coalesce_streams=True)    # printed lines stay together
    client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()                                  # times of day
    return notebook


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', default='out/cpu', help='folder of a finished run (default %(default)s)')
    p.add_argument('--out', type=Path, default=CELLS.with_name('tour.ipynb'), help='default %(default)s')
    a = p.parse_args(argv)
    if not all((Path(a.run) / name).exists() for name in NEEDED):
        raise UserError(f'{a.run} is no finished run: make one with `python train.py`')
    import nbformat
    text = nbformat.writes(build(os.path.relpath(a.run, ROOT)))
    with data.written_whole(a.out) as part:
        part.write_text(text)
    print(f'wrote {a.out}: {len(text):,} bytes')
    if len(text) > MOST:
        raise UserError(f'{a.out} has more than {MOST:,} bytes: make its pictures smaller')


if __name__ == '__main__':
    data.guard(main)
