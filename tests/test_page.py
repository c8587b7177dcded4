"""The page to play with: its tasks over HTTP, what it refuses, and that nothing typed becomes HTML."""
import base64
import http.client
import io
import json
import re
import threading
import urllib.error
import urllib.request

import pytest
import torch
from PIL import Image

import data
import folder as folders
import model
import sample
from data import UserError
from experiments import page


def png(size=(40, 30), colour='red') -> str:
    """A picture as the browser sends it."""
    return page.address_of(Image.new('RGB', size, colour))


def pixels(address: str) -> Image.Image:
    raw = base64.b64decode(address.removeprefix(page.HEAD))
    return Image.open(io.BytesIO(raw))


@pytest.fixture(scope='module')
def server(run_dir):
    player = page.Player(run_dir / 'model.safetensors', 'cpu')
    with page.Server(player, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def post(server):
    """post(task, key=value, ...) -> (status, result)."""

    def post(task, headers={}, body=None, **given):
        body = body or json.dumps(given).encode()
        address = f'http://127.0.0.1:{server.server_port}/{task}'
        try:
            with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    return post


# ---- tasks ----
def test_the_page_is_one_file_that_loads_nothing(server):
    with urllib.request.urlopen(f'http://127.0.0.1:{server.server_port}/') as reply:
        text = reply.read().decode()
        assert "default-src 'none'" in reply.headers['Content-Security-Policy']
    assert text == page.PAGE.read_text()
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?:', text)
    script = text.partition('<script>')[2].partition('</script>')[0]
    assert len(script.splitlines()) < 200
    names = set(re.findall(r"\$\('([\w-]+)'\)", script))
    assert names <= set(re.findall(r'id="([\w-]+)"', text))
    tasks = set(re.findall(r"(?:ask|answer)\('(\w+)'", script))
    assert tasks == page.TASKS.keys()


def test_a_drawing_appears_code_by_code(server, post):
    umm, size = server.player.umm, server.player.size
    asked = {'text': 'a red circle', 'seed': 3, 'cfg': 2.0, 'temperature': 0.4}
    status, result = post('draw', **asked)
    assert status == 200
    N = len(umm.rc)
    assert result['known'] == list(range(N + 1))
    assert len(result['certainty']) == N
    assert all(0 <= chance <= 1 for chance in result['certainty'])
    assert type(result['plan']) is str
    # the last frame is the picture, the same that sample.py draws
    g = torch.Generator().manual_seed(3)
    codes, plans = model.draw(umm, server.player.text, ['a red circle'], g, cfg=2.0)
    picture = sample.as_picture(server.player.tok.decode(codes)[0], size)
    assert pixels(result['picture']).tobytes() == picture.tobytes()
    assert result['plan'] == plans[0]
    x, y = N % page.ACROSS * size, N // page.ACROSS * size
    last = pixels(result['frames']).crop((x, y, x + size, y + size))
    assert last.tobytes() == picture.tobytes()
    assert post('draw', **asked) == (status, result)


def test_an_answer_says_where_its_words_looked(server, post):
    umm, text = server.player.umm, server.player.text
    _, scene = post('scene', seed=2)
    assert pixels(scene['image']).size == (server.player.size, server.player.size)
    assert scene['question'] and scene['truth']
    status, result = post('ask', image=scene['image'], text=scene['question'])
    assert status == 200
    image = page.image_in(scene, server.player.size)
    s = data.pack(text, [[(scene['question'], None)]], image)
    assert result['answer'] == model.write(umm, text, s, page.LONGEST, temperature=0)[0]
    assert ' '.join(word['word'] for word in result['words']).split() == result['answer'].split()
    for word in result['words']:
        assert 0 < word['chance'] <= 1
        assert len(word['looked']) == umm.c.n_layer
        for layer in word['looked']:
            assert len(layer) == len(umm.rc)
            assert 0 < sum(layer) <= 1.01


def test_words_are_tokens_put_together(server):
    text = server.player.text
    tokens = [*text.encode('a red circle, zzyx'), text.end]
    words = page.words_of(text, tokens)
    assert [word for word, _ in words] == ['a', 'red', 'circle,', 'zzyx']
    places = [place for _, places in words for place in places]
    assert places == list(range(len(tokens) - 1))


def test_a_picture_is_described_and_segmented(server, post):
    status, seen = post('picture', image=png((300, 200)))
    assert status == 200
    assert pixels(seen['image']).getpixel((0, 0)) == (255, 0, 0)
    for task, key in (('caption', 'answer'), ('segment', 'picture')):
        status, result = post(task, image=seen['image'])
        assert status == 200
        assert key in result
    status, about = post('about')
    assert about['map'] == 'seg'
    assert about['grid'] ** 2 == len(server.player.umm.rc)


def test_a_model_that_was_taught_no_map_says_so(server, post, monkeypatch):
    monkeypatch.setattr(server.player, 'map', 'none')
    assert post('about')[1]['map'] == ''
    status, result = post('segment', image=png())
    assert status == 400
    assert '--proxy' in result['error']


def test_a_folders_model_shows_pictures_of_its_folder(server, post, monkeypatch, tmp_path):
    monkeypatch.setattr(server.player, 'world', None)
    monkeypatch.setitem(server.player.settings, 'data', str(tmp_path))
    status, result = post('scene', seed=0)
    assert status == 400
    assert 'metadata.jsonl' in result['error']             # the folder is gone
    for split in ('train', 'validation', 'test'):
        (tmp_path / split).mkdir()
        row = {'file_name': '1.png', 'caption': 'a dot'}
        (tmp_path / split / 'metadata.jsonl').write_text(json.dumps(row))
        colour = {'train': 'red', 'validation': 'green', 'test': 'blue'}[split]
        Image.new('RGB', (20, 20), colour).save(tmp_path / split / '1.png')
    status, result = post('scene', seed=7)
    assert status == 200
    assert pixels(result['image']).getpixel((0, 0)) == (0, 0, 255)
    assert result['question'] == ''                        # none is known
    assert isinstance(server.player.world, folders.Folder)


# ---- what it refuses ----
@pytest.mark.parametrize('task, given, message', [
    ('draw', {}, 'empty'),
    ('draw', {'text': '  '}, 'empty'),
    ('draw', {'text': 'zz ' * 2000}, 'tokens'),
    ('draw', {'text': 7}, 'plain words'),
    ('draw', {'text': '\ud800'}, 'plain words'),
    ('draw', {'text': 'x', 'seed': -1}, 'seed is -1'),
    ('draw', {'text': 'x', 'seed': 1.5}, 'seed is 1.5'),
    ('draw', {'text': 'x', 'cfg': float('nan')}, 'cfg is nan'),
    ('draw', {'text': 'x', 'temperature': True}, 'temperature is True'),
    ('draw', {'text': 'x', 'temperature': 101}, 'from 0 to 100'),
    ('ask', {'text': 'x'}, 'no picture'),
    ('ask', {'text': 'x', 'image': ['a']}, 'no picture'),
    ('ask', {'text': 'x', 'image': '/etc/passwd'}, 'no picture'),
    ('ask', {'text': 'x', 'image': 'data:image/png;base64,!'}, 'damaged'),
    ('picture', {'image': 'data:image/png;base64,AAAA'}, 'image file the picture'),
    ('segment', {'image': 'data:image/png'}, 'cannot read the picture'),
])
def test_bad_input_is_one_message(post, task, given, message):
    status, result = post(task, **given)
    assert status == 400
    assert message in result['error']
    assert '\n' not in result['error']


@pytest.mark.parametrize('body', [b'{', b'[]', b'\xff', b'[' * 100_000, b'1' * 5000])
def test_what_is_no_json_object_is_named(post, body):
    assert post('draw', body=body) == (400, {'error': 'the request is no JSON object'})


def test_other_sites_are_refused(server, post):
    port = server.server_port
    for headers in (
        {'Host': f'evil.example:{port}'},
        {'Host': '127.0.0.1'},
        {'Origin': 'http://evil.example'},
        {'Origin': 'null'},
        {'Origin': f'http://127.0.0.1:{port + 1}'},
    ):
        status, result = post('about', headers)
        assert status == 403
        assert f'http://127.0.0.1:{port}' in result['error']
    assert post('about', {'Origin': f'http://127.0.0.1:{port}'})[0] == 200
    assert post('about', {'Host': f'localhost:{port}'})[0] == 200
    assert server.server_address[0] == '127.0.0.1'


@pytest.mark.parametrize('length', ['', '-1', 'x', str(page.MOST + 1), '9' * 5000])
def test_large_requests_are_never_read(server, length):
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port)
    connection.putrequest('POST', '/picture')
    connection.putheader('Content-Length', length)
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 413
    assert 'smaller' in json.load(reply)['error']
    connection.close()


def test_unknown_paths_and_bugs_are_named(server, post, monkeypatch, capsys):
    assert post('nothing')[0] == 404
    assert post('../page.py')[0] == 404
    with pytest.raises(urllib.error.HTTPError, match='404'):
        urllib.request.urlopen(f'http://127.0.0.1:{server.server_port}/page.py')
    monkeypatch.setitem(page.TASKS, 'about', lambda player, given: 1 / 0)
    status, result = post('about')
    assert status == 500
    assert 'bug' in result['error']
    assert 'ZeroDivisionError' in capsys.readouterr().err


def test_a_second_request_waits(server, post, monkeypatch):
    order = []
    inside, leave = threading.Event(), threading.Event()

    def slow(player, given):
        inside.set()
        leave.wait(20)
        order.append('first')
        return {}

    def quick(player, given):
        order.append('second')
        return {}

    monkeypatch.setitem(page.TASKS, 'draw', slow)
    monkeypatch.setitem(page.TASKS, 'about', quick)
    first = threading.Thread(target=post, args=['draw'])
    second = threading.Thread(target=post, args=['about'])
    first.start()
    assert inside.wait(20)
    second.start()
    leave.set()
    first.join(20)
    second.join(20)
    assert order == ['first', 'second']


# ---- the command ----
def test_the_command_takes_the_newest_checkpoint(run_dir, monkeypatch, capsys, tmp_path):
    def ctrl_c(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(page.Server, 'serve_forever', ctrl_c)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'test').symlink_to(run_dir, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    page.main(['--port', '0', '--device', 'cpu'])
    said = capsys.readouterr().out
    assert re.search(r'http://127\.0\.0\.1:\d+ shows out.test.model\.safetensors', said)


def test_a_port_that_cannot_be_used_is_named(server, run_dir):
    checkpoint = ['--checkpoint', str(run_dir / 'model.safetensors'), '--device', 'cpu']
    with pytest.raises(UserError, match='choose another --port'):
        page.main([*checkpoint, '--port', str(server.server_port)])
    with pytest.raises(UserError, match='1024'):
        page.main(['--port', '80'])
