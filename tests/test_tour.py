"""The notebook: it is built of its cells, runs on any finished run, and what is committed is current."""
import json

import pytest
import torch
from conftest import ROOT

import eval as evaluation
from data import UserError

matplotlib = pytest.importorskip('matplotlib')
matplotlib.use('Agg')
from experiments import tour


def sources(notebook: dict) -> list:
    """[(kind, source)] of a notebook's cells."""
    return [(cell['cell_type'], ''.join(cell['source'])) for cell in notebook['cells']]


def test_cells_are_cut_at_their_marks():
    text = '"""Not a cell."""\n\n# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\n\n\ny = 2\n'
    assert tour.cells_of(text) == [('markdown', '# Title\n\nWords.'), ('code', 'x = 1\n\n\ny = 2')]


def test_what_is_committed_is_what_the_cells_say():
    path = ROOT / 'experiments/tour.ipynb'
    assert path.stat().st_size < tour.MOST
    notebook = json.loads(path.read_text())
    assert sources(notebook) == tour.cells_of(tour.CELLS.read_text())
    shown = 0
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error'
            shown += 'image/png' in output.get('data', {})
    assert shown > 15                                      # it can be read without running it
    assert str(ROOT) not in path.read_text()


def test_attention_darkens_what_was_not_looked_at():
    image = torch.ones(3, 4, 4)
    seen = tour.looked_at(image, torch.tensor([.2, 0., 0., .1]), 2)
    assert torch.allclose(seen[:, :2, :2], torch.ones(()))
    assert torch.allclose(seen[:, 2:, :2], torch.full((), .15))
    assert torch.allclose(seen[:, 2:, 2:], torch.full((), .575))


def test_all_cells_run_on_another_run(run_dir, monkeypatch):
    """Here and not in a kernel of their own, which costs much more."""
    monkeypatch.setenv('NANOUMM_RUN', str(run_dir))
    monkeypatch.chdir(ROOT)
    # dear on noise, and tested elsewhere
    monkeypatch.setattr(evaluation, 'generation', lambda *how: {'mean': evaluation.share(1, 2)})
    names, code = {}, []
    for kind, source in tour.cells_of(tour.CELLS.read_text()):
        if kind == 'code':
            code.append(source)
    with torch.no_grad():                                  # which also undoes what the first cell sets
        for source in code:
            exec(source, names)
            tour.plt.close('all')
    assert len(code) > 20


def test_a_notebook_is_built_of_cells_and_what_they_gave(run_dir, tmp_path, monkeypatch):
    pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    cells = tmp_path / 'cells.py'
    cells.write_text('# %% [markdown]\n# # Title\n\n# %%\nimport os\nprint(os.environ["NANOUMM_RUN"])\n')
    cells.write_text('"""Cells."""\n\n' + cells.read_text())
    monkeypatch.setattr(tour, 'CELLS', cells)
    monkeypatch.setenv('NANOUMM_RUN', 'none')              # which build() sets: to be undone
    out = tmp_path / 'tour.ipynb'
    tour.main(['--run', str(run_dir), '--out', str(out)])
    notebook = json.loads(out.read_text())
    assert sources(notebook) == tour.cells_of(cells.read_text())
    said = ''.join(notebook['cells'][1]['outputs'][0]['text'])
    assert run_dir.name in said


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match='no finished run'):
        tour.main(['--run', str(tmp_path)])
