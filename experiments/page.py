"""A page to play with a trained model, in a browser on this machine:

    python -m experiments.page                   the newest checkpoint under out/
    python -m experiments.page --checkpoint FILE --port 8001

Type a sentence and see the picture appear code by code; ask about a picture and see where each word of
the answer looked. Only this machine can reach it: the server listens on 127.0.0.1, answers only to that
name, so that no other site's page can use it, and reads and writes no file but the checkpoint, page.html
and, for random pictures of a folder's model, that folder. One request is worked on at a time.
"""
import argparse
import base64
import contextlib
import io
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import data  # before torch: it tells OpenMP how to wait
import torch

from data import MAPS, UserError
from experiments.probes import recorded
from folder import open_world, shrunk, upright
from model import continued, draw, load
from sample import BOUNDS, as_picture, prompt_of, grid, newest_checkpoint

PAGE = Path(__file__).with_name('page.html')
HEAD = 'data:image/png;base64,'
MOST = 16_000_000              # bytes of a request; a picture takes 4/3 of its size
FRAMES = 64                    # pictures of a drawing that appears
ACROSS = 8                     # of them beside each other
LONGEST = 64                   # tokens of an answer
# What the browser is told: nothing from elsewhere is loaded, nobody may frame the page.
HEADERS = {
    'Content-Security-Policy': "default-src 'none'; script-src 'unsafe-inline'; connect-src 'self'; "
                               "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    'X-Content-Type-Options': 'nosniff',
    'Cache-Control': 'no-store',
}


# ---- what the browser sends, checked ----
class Upload(io.BytesIO):
    """The bytes of a picture, with a name for messages."""

    def __repr__(self):
        return 'the picture'


def text_in(given: dict) -> str:
    """The user's words. UserError where they are none."""
    words = given.get('text', '')
    try:
        words.encode()
    except (AttributeError, UnicodeEncodeError):               # no text, or half of a character
        raise UserError(f'the text is {words!r:.40}: write plain words')
    return words


def number_in(given: dict, name: str, default):
    """A number within sample.BOUNDS; UserError for all else. NaN is within no bounds."""
    value = given.get(name, default)
    low, high = BOUNDS[name]
    kinds = (int,) if name == 'seed' else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        raise UserError(f'{name} is {value!r:.40}: a number from {low} to {high}')
    return value


def image_in(given: dict, size: int):
    """A picture as a data URL -> as the model sees it, [1, 3, S, S] in [0, 1]."""
    address = given.get('image') or ''
    if type(address) is not str or not address.startswith('data:image/'):
        raise UserError('there is no picture yet: open one, or take a random one')
    try:
        raw = base64.b64decode(address.partition(',')[2], validate=True)
    except ValueError:
        raise UserError('the picture is cut off or damaged: open it again')
    return shrunk(upright(Upload(raw)), size)[None] / 255


# ---- what it gets back ----
def address_of(picture) -> str:
    """A PIL picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG')
    return HEAD + base64.b64encode(buffer.getvalue()).decode()


def rounded(values) -> list:
    """Numbers of a tensor as JSON, short."""
    return [round(value, 4) for value in values.tolist()]


def words_of(text: data.Text, tokens: list[int]) -> list:
    """Tokens -> [(word, places of its tokens)]. A word begins with a space; specials are left out."""
    words = []                                                 # [bytes, places]
    for place, token in enumerate(tokens):
        if token >= text.answer:
            continue
        part = text.vocab[token]
        if part.startswith(b' ') or not words:
            words.append([b'', []])
        words[-1][0] += part
        words[-1][1].append(place)
    return [(word.decode(errors='replace').strip(), places) for word, places in words]


class Player:
    """A checkpoint and all that the page can ask of it. Each task takes the request, a dictionary, and
    gives another one; UserError says what is wrong with the request."""

    def __init__(self, checkpoint, device):
        self.checkpoint = str(checkpoint)
        self.device = device
        self.tok, self.umm, self.text, _, meta = load(checkpoint, device)
        self.settings = meta['settings']
        self.words = meta['words']                             # that training showed
        self.map = str(meta['taught'])                         # a stranger's file may say anything
        if meta['trained'] in ('', 'tokenizer'):
            raise UserError(f'{checkpoint} can neither draw nor answer yet: train.py --resume goes on')
        self.size = self.umm.c.size
        self.world = None                                      # opened when a random picture is wanted

    def opened(self) -> data.DataSet:
        """The data that the model was trained on."""
        if self.world is None:
            where = self.settings.get('data', '')
            skip = self.settings.get('skip_bad', False)
            self.world = open_world(where, self.size, 0, self.device, self.text, skip)
        return self.world

    def how(self, given) -> dict:
        """Of sampling, as UMM.generate takes it."""
        seed = number_in(given, 'seed', 0)
        return {
            'cfg': number_in(given, 'cfg', 1.),
            'temperature': number_in(given, 'temperature', 0.),
            'generator': torch.Generator(self.device).manual_seed(seed),
        }

    def prompt(self, task: str, words='') -> str:
        """The words that go with a task; UserError where they are empty or too long."""
        return prompt_of(SimpleNamespace(task=task, text=words), self.text, self.words)

    # -- tasks
    def about(self, given):
        """What the page has to know of the model."""
        example = data.World.example
        if self.settings.get('data'):
            example = data.DataSet.example
        return {
            'checkpoint': self.checkpoint,
            'grid': self.umm.c.grid,
            'layers': self.umm.c.n_layer,
            'map': self.map if self.map in MAPS else '',
            'example': example,
            'frames_across': ACROSS,
        }

    def scene(self, given):
        """A picture of the test split by its number, with a question and its answer if it has any."""
        number = number_in(given, 'seed', 0)
        world = self.opened()
        scenes, r, rng = world.scenes('test', 'page', number, 1)
        found = []
        for kind in world.kinds:
            found += world.ask(scenes[0], kind, rng)
        question, truth = rng.choice(found) if found else ('', '')
        image = address_of(as_picture(r.image[0], self.size))
        return {'image': image, 'question': question, 'truth': truth.lower()}

    def picture(self, given):
        """A picture of any size -> what the model sees of it."""
        x = image_in(given, self.size)
        return {'image': address_of(as_picture(x[0], self.size))}

    def draw(self, given):
        """A sentence -> a plan, and the picture as it appears."""
        prompt = self.prompt('draw', text_in(given))
        codes, plans = draw(self.umm, self.text, [prompt], **self.how(given))
        s = data.pack(self.text, [[(prompt, plans[0])]], device=self.device)
        return {'plan': plans[0], **self.film(s, codes)}

    def segment(self, given):
        """A picture -> the map that the model was taught, as it appears."""
        if self.map not in MAPS:
            raise UserError('this model was taught no map: train it with --proxy seg')
        image = image_in(given, self.size).to(self.device)
        s = data.pack(self.text, [[(MAPS[self.map].words[0], None)]], image, self.device)
        codes = self.umm.generate(s, **self.how(given))
        return self.film(s, codes)

    def ask(self, given):
        """A picture and a question -> the answer, and where each of its words looked."""
        return self.answer(given, self.prompt('ask', text_in(given)))

    def caption(self, given):
        """A picture -> its description, alike."""
        return self.answer(given, self.prompt('caption'))

    # -- their parts
    def film(self, s, codes) -> dict:
        """Codes [1, N] that continue s -> the picture after 0, ..., N codes; those that are to come yet
        are plain grey's. certainty: the chance that the model gave to each code, from one pass over all
        of them, without guidance."""
        N = codes.shape[1]
        grey = torch.full((1, 3, self.size, self.size), .5, device=self.device)
        nothing = self.tok.encode(grey)                                               # [1,N]
        count = min(N, FRAMES)
        known = torch.linspace(0, N, count + 1).round().long().to(self.device)        # [count+1]
        order = torch.arange(N, device=self.device)
        drawn = order < known[:, None]                                                # [count+1,N]
        frames = self.tok.decode(torch.where(drawn, codes, nothing))                  # [count+1,3,S,S]
        s.codes = codes
        logits = self.umm.pixel_head(self.umm.hidden(s)[0, -N:])                      # [N,K]
        chances = logits.float().softmax(-1).gather(1, codes[0, :, None])             # [N,1]
        return {
            'picture': address_of(as_picture(frames[-1], self.size)),
            'frames': address_of(grid(frames.split(ACROSS), scale=1, gap=0)),
            'known': known.tolist(),
            'certainty': rounded(chances[:, 0]),
        }

    def answer(self, given, prompt: str) -> dict:
        """-> the words of the answer; for each the chance that the model gave to it and, per layer, the
        attention on each patch of the picture [N], mean over heads, from where it was predicted."""
        N = len(self.umm.rc)
        image = image_in(given, self.size).to(self.device)
        s = data.pack(self.text, [[(prompt, None)]], image, self.device)
        how = self.how(given)
        tokens = self.umm.generate(s, self.text.answer, self.text.end, LONGEST, **how)
        # one pass over the whole: each token is predicted one before it
        opening = torch.full_like(tokens[:, :1], self.text.answer)
        given_tokens = torch.cat([opening, tokens[:, :-1]], 1)                        # [1,n]
        for token in given_tokens.T:
            s = continued(s, token)
        n = tokens.shape[1]
        with recorded() as kept:
            x = self.umm.hidden(s)[0, -n:]                                            # [n,C]
        layers = kept[self.umm.c.n_layer:]                     # after those of the picture itself
        looked = torch.stack([w[0, :, -n:, :N].mean(0) for w in layers])              # [layers,n,N]
        chances = self.umm.text_head(x).float().softmax(-1).gather(1, tokens.T)       # [n,1]
        words = []
        for word, places in words_of(self.text, tokens[0].tolist()):
            words.append({
                'word': word,
                'chance': round(chances[places].prod().item(), 4),
                'looked': [rounded(layer[places].mean(0)) for layer in looked],
            })
        return {'answer': self.text.decode(tokens[0].tolist()), 'words': words}


TASKS = {'about': Player.about, 'scene': Player.scene, 'picture': Player.picture, 'draw': Player.draw,
         'ask': Player.ask, 'caption': Player.caption, 'segment': Player.segment}


# ---- the server ----
class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /TASK with a JSON object a task."""
    timeout = 30               # seconds that a browser may take to say something
    server_version = 'nanoUMM'

    def do_GET(self):
        if self.refused():
            return
        if self.path != '/':
            self.reply(404, {'error': f'there is no {self.path:.40}: the page is at /'})
            return
        self.send(200, 'text/html; charset=utf-8', PAGE.read_bytes())

    def do_POST(self):
        if self.refused():
            return
        task = TASKS.get(self.path[1:])
        if task is None:
            self.reply(404, {'error': f'there is no task {self.path:.40}'})
            return
        length = self.headers.get('Content-Length', '')
        if not length.isascii() or not length.isdigit() or int(length[:12]) > MOST:
            self.reply(413, {'error': f'a request has {MOST:,} bytes at most: take a smaller picture'})
            return
        try:
            body = self.rfile.read(int(length))
        except OSError:                                        # the rest of it never came
            return
        self.reply(*self.done(task, body))

    def done(self, task, body: bytes):
        """-> (status, result) of a task."""
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if type(given) is not dict:
            return 400, {'error': 'the request is no JSON object'}
        try:
            with self.server.lock, torch.no_grad():            # a second request waits here
                return 200, task(self.server.player, given)
        except UserError as e:
            return 400, {'error': str(e)}
        except Exception:
            traceback.print_exc()
            return 500, {'error': 'this is a bug in nanoUMM; please report what the terminal says'}

    def refused(self) -> bool:
        """Does the request name another host, or come from another site's page? Such a page may find
        this server under a name of its own, and a form of it can post anywhere."""
        host = self.headers.get('Host', '')
        port = self.server.server_port
        mine = (f'127.0.0.1:{port}', f'localhost:{port}')
        if host in mine and self.headers.get('Origin') in (None, f'http://{host}'):
            return False
        self.reply(403, {'error': f'open http://{mine[0]} on this machine'})
        return True

    def reply(self, status: int, result: dict):
        self.send(status, 'application/json', json.dumps(result).encode())

    def send(self, status: int, kind: str, body: bytes):
        with contextlib.suppress(ConnectionError):             # the browser has left
            self.send_response(status)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *about):
        """The terminal stays quiet."""


class Server(ThreadingHTTPServer):
    """A thread for each connection, as browsers open more than they use; one lock for the model."""

    def __init__(self, player: Player, port: int):
        self.player = player
        self.lock = threading.Lock()
        super().__init__(('127.0.0.1', port), Handler)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--checkpoint', default='', help='of a run; empty: the newest under out/')
    p.add_argument('--port', type=int, default=8000, help='0: any that is free (default 8000)')
    p.add_argument('--device', default='auto', help='cpu, cuda, mps, or auto: cuda if there is one')
    a = p.parse_args(argv)
    if a.port != 0 and not 1024 <= a.port <= 65535:
        raise UserError(f'--port is {a.port}: from 1024 to 65535, or 0')
    return a


def main(argv=None):
    a = parse(argv)
    player = Player(a.checkpoint or newest_checkpoint(), data.find_device(a.device))
    try:
        server = Server(player, a.port)
    except OSError as e:
        raise UserError(f'port {a.port} cannot be used ({e.strerror}): choose another --port')
    with server:
        address = f'http://127.0.0.1:{server.server_port}'
        print(f'{address} shows {player.checkpoint}; Ctrl-C ends it', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    print('\nended')


if __name__ == '__main__':
    data.guard(main)
