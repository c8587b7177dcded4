"""Which questions of a folder can be learned, on a folder whose colours tell half of the answers."""
import json

import numpy as np
import pytest
from PIL import Image

from data import UserError
from experiments import learnable


def folder_of(root, qa_of):
    """Pictures of one colour with noise; qa_of: (is it red?, a coin) -> qa of a row."""
    rng = np.random.default_rng(0)
    (root / 'classes.json').write_text('{"mask_classes": ["background"]}')
    for split, n in (('train', 64), ('validation', 32), ('test', 8)):
        folder = root / split
        folder.mkdir()
        rows = []
        for i in range(n):
            red, coin = rng.integers(0, 2, 2)
            pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[:, :, 0] += 180 * red.astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.png')
            row = {'file_name': f'{i}.png', 'caption': 'a color', 'qa': qa_of(red, coin)}
            rows.append(json.dumps(row))
        (folder / 'metadata.jsonl').write_text('\n'.join(rows))


def test_what_is_seen_is_kept_and_what_is_not_is_left_out(tmp_path, capsys):
    def qa_of(red, coin):
        return [
            {'question': 'is it red?', 'answer': 'yes' if red else 'no', 'type': 'color'},
            {'question': 'did it rain?', 'answer': 'yes' if coin else 'no', 'type': 'weather'},
        ]

    folder_of(tmp_path, qa_of)
    learnable.main([str(tmp_path), '--size', '16', '--steps', '25', '--n', '32'])
    lines = capsys.readouterr().out.splitlines()
    verdict = {}
    for line in lines[-2:]:
        kind, cnn, blind, kept = line.strip('| ').split(' | ')
        assert float(blind) < .8
        verdict[kind] = kept
        if kind == 'color':
            assert float(cnn) > .9
    assert verdict == {'color': 'yes', 'weather': 'no'}


def test_most_rows_may_be_without_questions(tmp_path, capsys):
    asked = []

    def qa_of(red, coin):
        asked.append(red)
        if len(asked) % 40:
            return []
        return [{'question': 'is it red?', 'answer': 'yes', 'type': 'color'}]

    folder_of(tmp_path, qa_of)
    learnable.main([str(tmp_path), '--size', '16', '--steps', '3', '--n', '32'])
    assert 'color' in capsys.readouterr().out
    with pytest.raises(UserError, match='--steps is 0'):
        learnable.main([str(tmp_path), '--steps', '0'])


def test_a_folder_without_questions(tmp_path):
    folder_of(tmp_path, lambda red, coin: [])
    with pytest.raises(UserError, match='no questions'):
        learnable.main([str(tmp_path), '--size', '16'])
