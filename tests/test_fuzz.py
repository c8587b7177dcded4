"""Random input of every kind: a few hundred in the suite, thousands with
`python -m pytest tests/test_fuzz.py --fuzz 31`.

Whatever a user, a file or a command line brings, the answer is a result or one UserError, never
another exception.
"""

import contextlib
import dataclasses
import io
import json
import struct
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
from data import Questions, UserError, World

TEXT = st.one_of(
    st.text(max_size=60),
    st.text('<|>/end answer', max_size=40),
    st.sampled_from(
        ['<|endoftext|>', '\x00', '\u200b', '\U0001f600' * 9, 'a' * 3000, ' \t\n', 'İ', 'ß']
    ),
)


@pytest.fixture(scope='module')
def bytes_of(run_dir):
    return (run_dir / 'model.safetensors').read_bytes()


@fuzz(40, TEXT)
def test_any_text_comes_back_and_holds_no_special_token(world, line):
    ids = world.text.encode(line)
    assert all(0 <= i < world.text.answer for i in ids)
    assert world.text.decode(ids) == ' '.join(line.lower().split())


@fuzz(10, st.lists(st.tuples(TEXT, st.none() | TEXT), min_size=1, max_size=4))
def test_any_turns_are_packed(world, turns):
    s = data.pack(world.text, [turns, [('how many?', '1')]])
    assert s.text.shape == s.turn.shape == s.target.shape
    assert int(s.turn.max()) <= max(len(turns), 1) and bool((s.target[s.turn < 0] == -1).all())


@fuzz(15, st.integers(0, 2**62), st.sampled_from(data.SPLITS), st.integers(0, 2**40), st.integers(1, 5))
def test_any_scene_is_sound(world, seed, split, index, B):
    w = World(16, seed, text=world.text)
    found, r, rng = w.scenes(split, index, B)
    assert len(found) == B and 0 <= r.image.min() and r.image.max() <= 1
    for (objs, theme), instance in zip(found, r.instance):
        assert 1 <= len(objs) <= 4 and len({o.name for o in objs}) == len(objs)
        assert instance.max() <= len(objs)
        for style in data.STYLES:
            assert (data.caption(objs, style, rng) or 'a').strip()
        for kind in data.KINDS:
            q, a = Questions(objs, theme, rng).ask(kind) or ('?', 'a')
            assert '{' not in q and a.strip() == a != ''


def picture(draw_from):
    """Bytes of a picture file of any mode and format, cut or with bytes overwritten."""
    mode, size, kind, seed, cut, holes = draw_from
    g, f = np.random.default_rng(seed), io.BytesIO()
    im = Image.fromarray(g.integers(0, 256, (size[1], size[0], 3), np.uint8))
    with contextlib.suppress(OSError, ValueError):
        im.convert(mode).save(f, kind)
    b = bytearray(f.getvalue())
    for at, value in holes:
        if b:
            b[at % len(b)] = value
    return bytes(b[: len(b) - cut])


PICTURE = st.tuples(
    st.sampled_from(['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'F']),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'ICO', 'TGA']),
    st.integers(0, 9),
    st.sampled_from([0, 0, 1, 5, 30, 100]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
)


@fuzz(80, PICTURE.map(picture) | st.binary(max_size=200))
def test_any_picture_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'fuzz.png'
    path.write_bytes(content)
    try:
        x = folder.read_image(path, 16)[None] / 255
    except UserError as e:
        assert 'fuzz.png' in str(e) and '\n' not in str(e)
    else:
        assert x.shape == (1, 3, 16, 16) and bool(((x >= 0) & (x <= 1)).all())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**13), 10**13)
    | st.integers(1, 64)
    | st.floats()
    | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)


def altered(content: bytes, change) -> bytes:
    """A checkpoint after change(meta), which may alter the notes in its header in place."""
    n = struct.unpack('<Q', content[:8])[0]
    head = json.loads(content[8 : 8 + n])
    meta = json.loads(head['__metadata__']['nanoumm'])
    change(meta)
    head['__metadata__']['nanoumm'] = json.dumps(meta)
    line = json.dumps(head).encode()
    return struct.pack('<Q', len(line)) + line + content[8 + n :]


@fuzz(20, st.sampled_from([f.name for f in dataclasses.fields(model.Config)]), JSON)
def test_any_config_in_a_checkpoint_is_used_or_refused(bytes_of, tmp_path_factory, key, value):
    check(tmp_path_factory, altered(bytes_of, lambda meta: meta['config'].update({key: value})))


@fuzz(15, st.sampled_from(['config', 'text', 'settings', 'stage', 'step', 'lines']), JSON)
def test_any_meta_in_a_checkpoint_is_used_or_refused(bytes_of, tmp_path_factory, key, value):
    check(tmp_path_factory, altered(bytes_of, lambda meta: meta.update({key: value})))


@fuzz(
    25,
    st.lists(st.tuples(st.integers(0, 600), st.binary(max_size=3)), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_any_vocabulary_in_a_checkpoint_is_used_or_refused(bytes_of, tmp_path_factory, changes, cut):
    def change(meta):
        for at, token in changes:
            meta['text'][at % len(meta['text'])] = token.hex()
        meta['text'] = meta['text'][: len(meta['text']) - max(0, cut - 7)]

    check(tmp_path_factory, altered(bytes_of, change))


def check(tmp_path_factory, content: bytes):
    path = tmp_path_factory.getbasetemp() / 'fuzz.safetensors'
    path.write_bytes(content)
    try:
        tok, umm, text, _, _ = model.load(path)
    except UserError as e:
        assert 'fuzz.safetensors' in str(e) and len(str(e)) < 600
    else:
        text.encode('a red circle'), text.decode([0, 300])


@fuzz(
    30,
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3),
)
def test_any_damaged_checkpoint_is_used_or_refused(bytes_of, tmp_path_factory, keep, holes):
    b = bytearray(bytes_of[: keep % (len(bytes_of) + 1)] if keep % 3 else bytes_of)
    for at, value in holes:
        if b:
            b[at % min(len(b), 6000)] = value  # the header is in the first kilobytes
    check(tmp_path_factory, bytes(b))


NAMES = [f.name for f in dataclasses.fields(train.Settings)]
VALUE = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.text(max_size=6),
    st.just('9' * 5000),
    st.sampled_from(['0', '1', '-1', '1e400', 'nan', 'seg', 'code', 'cpu', 'True', '']),
)


@fuzz(80, st.lists(st.tuples(st.sampled_from(NAMES), VALUE), max_size=3))
def test_any_command_line_is_taken_or_refused(flags):
    argv = [f'--{k}={v}' for k, v in flags]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            s = train.parse(argv)
        except UserError as e:
            assert str(e).startswith('--') and '\n' not in str(e)
        except SystemExit as e:
            assert e.code == 2 and 'error: ' in err.getvalue()
        else:
            assert s.n_embd % s.n_head == 0 and s.tok_steps > 0


@fuzz(
    30,
    st.lists(
        st.one_of(
            TEXT, st.sampled_from(['draw', 'ask', 'caption', 'segment', '--n', '--seed', '--cfg'])
        ),
        max_size=5,
    ),
)
def test_any_sample_command_line_is_taken_or_refused(words):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            sample.parse(words)
        except UserError as e:
            assert '\n' not in str(e)
        except SystemExit as e:
            assert e.code in (0, 2)


@fuzz(8, st.integers(0, 9), st.floats(0, 3), st.integers(0, 40), st.floats(0.0, 4.0))
def test_any_way_of_sampling_gives_codes(run_dir, seed, temperature, top_k, cfg):
    tok, umm, text, _, _ = loaded_once(run_dir)
    g = torch.Generator().manual_seed(seed)
    codes, plans = model.draw(
        umm, text, ['a red circle'], g, temperature=temperature, top_k=top_k, cfg=cfg
    )
    assert codes.shape == (1, umm.c.grid**2) and 0 <= codes.min() and codes.max() < umm.c.codebook


@fuzz(10, st.integers(1, 4), st.integers(1, 20), st.integers(0, 19), st.booleans(), st.integers(0, 99))
def test_cached_and_uncached_logits_agree_to_1e_5(run_dir, B, T, padding, picture, seed):
    _, umm, _, _, _ = loaded_once(run_dir)
    g = torch.Generator().manual_seed(seed)
    turn = torch.ones(B, T, dtype=torch.long)
    turn[0, max(1, T - padding) :] = -1
    image = torch.rand(B, 3, 16, 16, generator=g) if picture else None
    s = data.Sequence(torch.randint(umm.c.vocab, (B, T), generator=g), turn, image=image)
    seen, pick = [], model.pick
    with pytest.MonkeyPatch.context() as m:
        m.setattr(model, 'pick', lambda x, *a: (seen.append(x), pick(x, *a))[1])
        s.codes = umm.generate(s, temperature=1.0, generator=g)
    with torch.no_grad():
        want = umm.pixel_head(umm.hidden(s)[:, -(umm.c.grid**2) :])
    assert (torch.stack(seen, 1) - want).abs().max() <= 1e-5 * max(1, want.abs().max())


@lru_cache
def loaded_once(run_dir):
    return model.load(run_dir / 'model.safetensors')
