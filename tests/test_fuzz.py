"""Random input of every kind: a few hundred in the suite, thousands with
`python -m pytest tests/test_fuzz.py --fuzz 31`.

Whatever a user, a file or a command line brings, the answer is a result or one UserError, never
another exception.
"""
import contextlib
import io
import json
import struct
from dataclasses import fields
from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import fuzz
from hypothesis import strategies as st
from PIL import Image

import data
import folder
import model
import sample
import train
from data import UserError, World

STRANGE = ['<|endoftext|>', '\x00', '\u200b', '\U0001f600' * 9, 'a' * 3000, ' \t\n', 'İ', 'ß']
TEXT = st.one_of(
    st.text(max_size=60),
    st.text('<|>/end answer', max_size=40),
    st.sampled_from(STRANGE),
)
SPLIT = st.sampled_from(data.SPLITS)
BYTE = st.integers(0, 255)


# ---- texts ----
@fuzz(40, TEXT)
def test_any_text_comes_back_and_holds_no_special_token(world, line):
    ids = world.text.encode(line)
    for i in ids:
        assert 0 <= i < world.text.answer
    assert world.text.decode(ids) == ' '.join(data.small(line).split())


TURN = st.tuples(TEXT, st.none() | TEXT)


@fuzz(10, st.lists(TURN, min_size=1, max_size=4))
def test_any_turns_are_packed(world, turns):
    s = data.pack(world.text, [turns, [('how many?', '1')]])
    assert s.text.shape == s.turn.shape == s.target.shape
    assert s.turn.max() <= len(turns)
    padding = s.turn < 0
    assert (s.target[padding] == -1).all()


# ---- scenes ----
@fuzz(15, st.integers(0, 2**62), SPLIT, st.text(max_size=9), st.integers(0, 2**40), st.integers(1, 5))
def test_any_scene_is_sound(world, seed, split, stream, index, B):
    other = World(16, seed, text=world.text)
    scenes, r, rng = other.scenes(split, stream, index, B)
    assert len(scenes) == B
    assert r.image.min() >= 0
    assert r.image.max() <= 1
    for scene, instance in zip(scenes, r.instance):
        names = {o.name for o in scene.objects}
        assert 1 <= len(names) <= 4
        assert len(names) == len(scene.objects)
        assert instance.max() <= len(names)
        for style in data.STYLES:
            text = other.describe(scene, style, rng)
            assert text is None or text.strip()
        for kind in data.KINDS:
            for question, answer in other.ask(scene, kind, rng):
                assert '{' not in question
                assert answer == answer.strip() != ''


# ---- pictures ----
def picture_file(drawn) -> bytes:
    """Bytes of a picture file of any mode and format, cut or with bytes overwritten."""
    mode, (width, height), kind, seed, cut, holes = drawn
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    with contextlib.suppress(OSError, ValueError):         # not every format knows every mode
        Image.fromarray(pixels).convert(mode).save(file, kind)
    content = bytearray(file.getvalue())
    for at, value in holes:
        if content:
            content[at % len(content)] = value
    return bytes(content[:len(content) - cut])


SIDE = st.integers(1, 40)
PICTURE = st.tuples(
    st.sampled_from(['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'F']),
    st.tuples(SIDE, SIDE),
    st.sampled_from(['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'ICO', 'TGA']),
    st.integers(0, 9),
    st.sampled_from([0, 0, 1, 5, 30, 100]),
    st.lists(st.tuples(st.integers(0, 400), BYTE), max_size=4),
)
FILE = PICTURE.map(picture_file)


@fuzz(80, FILE | st.binary(max_size=200))
def test_any_picture_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'fuzz.png'
    path.write_bytes(content)
    try:
        x = folder.shrunk(folder.upright(path), 16)
    except UserError as e:
        assert 'fuzz.png' in str(e)
        assert '\n' not in str(e)
        return
    assert x.shape == (3, 16, 16)
    assert x.dtype == torch.uint8


# ---- checkpoints ----
@pytest.fixture(scope='module')
def checkpoint(run_dir) -> bytes:
    return (run_dir / 'model.safetensors').read_bytes()


def altered(content: bytes, change) -> bytes:
    """A checkpoint after change(meta), which may alter the notes in its header in place."""
    n, = struct.unpack('<Q', content[:8])                  # length of the header
    head = json.loads(content[8:8 + n])
    meta = json.loads(head['__metadata__']['nanoumm'])
    change(meta)
    head['__metadata__']['nanoumm'] = json.dumps(meta)
    line = json.dumps(head).encode()
    return struct.pack('<Q', len(line)) + line + content[8 + n:]


def used_or_refused(tmp_path_factory, content: bytes):
    """Write a checkpoint of that content and load it."""
    path = tmp_path_factory.getbasetemp() / 'fuzz.safetensors'
    path.write_bytes(content)
    try:
        _, _, text, _, _ = model.load(path)
    except UserError as e:
        assert 'fuzz.safetensors' in str(e)
        assert len(str(e)) < 600
        return
    text.encode('a red circle')
    text.decode([0, 300])


def smaller_json(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)


SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10**13, 10**13),
    st.integers(1, 64),
    st.floats(),
    st.text(max_size=8),
)
JSON = st.recursive(SCALAR, smaller_json, max_leaves=6)
CONFIG = [f.name for f in fields(model.Config)]
META = ['config', 'text', 'settings', 'stage', 'step', 'lines']


@fuzz(20, st.sampled_from(CONFIG), JSON)
def test_any_config_in_a_checkpoint_is_used_or_refused(checkpoint, tmp_path_factory, key, value):
    def change(meta):
        meta['config'][key] = value

    used_or_refused(tmp_path_factory, altered(checkpoint, change))


@fuzz(15, st.sampled_from(META), JSON)
def test_any_meta_in_a_checkpoint_is_used_or_refused(checkpoint, tmp_path_factory, key, value):
    def change(meta):
        meta[key] = value

    used_or_refused(tmp_path_factory, altered(checkpoint, change))


TOKEN = st.tuples(st.integers(0, 600), st.binary(max_size=3))


@fuzz(25, st.lists(TOKEN, min_size=1, max_size=3), st.sampled_from([0, 0, 0, 0, 1, 2]))
def test_any_vocabulary_in_a_checkpoint_is_used_or_refused(checkpoint, tmp_path_factory, tokens, cut):
    def change(meta):
        vocab = meta['text']
        for at, token in tokens:
            vocab[at % len(vocab)] = token.hex()
        meta['text'] = vocab[:len(vocab) - cut]

    used_or_refused(tmp_path_factory, altered(checkpoint, change))


HOLE = st.tuples(st.integers(0, 10**6), BYTE)


@fuzz(30, st.booleans(), st.integers(0, 10**6), st.lists(HOLE, max_size=3))
def test_any_damaged_checkpoint_is_used_or_refused(checkpoint, tmp_path_factory, cut, at, holes):
    content = bytearray(checkpoint)
    if cut:
        content = content[:at % (len(content) + 1)]
    for place, value in holes:
        if content:
            header = min(len(content), 6000)               # it is in the first kilobytes
            content[place % header] = value
    used_or_refused(tmp_path_factory, bytes(content))


# ---- command lines ----
NAMES = [f.name for f in fields(train.Settings)]
VALUE = st.one_of(
    st.integers(-10**20, 10**20).map(str),
    st.floats().map(str),
    st.text(max_size=6),
    st.just('9' * 5000),
    st.sampled_from(['0', '1', '-1', '1e400', 'nan', 'seg', 'code', 'cpu', 'True', '']),
)
FLAG = st.tuples(st.sampled_from(NAMES), VALUE)


@fuzz(80, st.lists(FLAG, max_size=3))
def test_any_command_line_is_taken_or_refused(flags):
    words = [f'--{name}={value}' for name, value in flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            s = train.parse(words)
    except UserError as e:
        assert str(e).startswith('--')
        assert '\n' not in str(e)
        return
    except SystemExit as e:                                # argparse's own
        assert e.code == 2
        assert 'error: ' in said.getvalue()
        return
    assert s.n_embd % s.n_head == 0
    assert s.tok_steps > 0


WORD = TEXT | st.sampled_from([*sample.TASKS, '--n', '--seed', '--cfg'])


@fuzz(30, st.lists(WORD, max_size=5))
def test_any_sample_command_line_is_taken_or_refused(words):
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            a = sample.parse(words)
    except UserError as e:
        assert '\n' not in str(e)
        return
    except SystemExit as e:                                # 0: -h
        assert e.code in (0, 2)
        return
    assert a.task in sample.TASKS


# ---- generation ----
@lru_cache
def loaded_once(run_dir):
    return model.load(run_dir / 'model.safetensors')


@fuzz(8, st.integers(0, 9), st.floats(0, 3), st.floats(0, 4))
def test_any_way_of_sampling_gives_codes(run_dir, seed, temperature, cfg):
    _, umm, text, _, _ = loaded_once(run_dir)
    g = torch.Generator().manual_seed(seed)
    how = dict(temperature=temperature, cfg=cfg)
    codes, plans = model.draw(umm, text, ['a red circle'], g, **how)
    assert len(plans) == 1
    assert codes.shape == (1, umm.c.grid**2)
    assert codes.min() >= 0
    assert codes.max() < umm.c.codebook


@fuzz(10, st.integers(1, 4), st.integers(1, 20), st.integers(0, 19), st.booleans(), st.integers(0, 99))
def test_cached_and_uncached_logits_agree_to_1e_5(run_dir, B, T, padding, picture, seed):
    _, umm, text, _, _ = loaded_once(run_dir)
    g = torch.Generator().manual_seed(seed)
    turn = torch.ones(B, T, dtype=torch.long)
    turn[0, max(1, T - padding):] = -1
    s = data.Sequence(torch.randint(text.size, (B, T), generator=g), turn)
    if picture:
        s.image = torch.rand(B, 3, 16, 16, generator=g)
    seen, pick = [], model.pick

    def watched(logits, *how):
        seen.append(logits)
        return pick(logits, *how)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(model, 'pick', watched)
        s.codes = umm.generate(s, temperature=1., generator=g)
    cached = torch.stack(seen, 1)                                                     # [B,N,K]
    N = umm.c.grid**2
    with torch.no_grad():
        plain = umm.pixel_head(umm.hidden(s)[:, -N:])                                 # [B,N,K]
    assert (cached - plain).abs().max() <= 1e-5 * max(1, plain.abs().max())
