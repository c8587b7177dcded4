"""The two networks: a VQ tokenizer (pictures <-> codes) and the unified multimodal model (UMM).

A sequence is [picture][text][codes]; what a use does not need is left out:

    use      sequence                                  where its loss lives
    answer   [picture][question, answer]               text head, at the answer
    draw              [prompt, plan]      [codes]      text head at the plan, pixel head at the codes
    map      [picture][instruction]       [codes]      pixel head at the codes

    who sees whom        picture    text of its turn    codes
    picture              all        -                   -
    text                 all        earlier             -
    codes (turn 1)       all        all                 earlier

Axes: B pictures (text: B*R rows, see data.pack), T positions of a sequence, C channels, H heads,
D channels of a head, V text vocabulary, K codebook, S side of a picture, G of its grid of N = G*G codes.
"""
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import MAX_PLAN, MAX_TEXT, Sequence, Text, UserError, pack, written_whole


def setting(default, help: str, least=0, most=2**62, one_of=()):
    """A field that is a flag of train.py too: its default, what it means and what it may be."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, one_of=one_of))


@dataclass
class Config:
    """Everything needed to rebuild both networks; it travels inside the checkpoint."""
    size: int = setting(32, 'S, side of a picture in pixels', 16, 512)
    patch: int = setting(4, 'side in pixels of what one code, or one input token, stands for', 1, 64)
    codebook: int = setting(512, 'K, number of codes', 2, 2**18)
    code_dim: int = setting(8, 'channels of a code', 1, 2**18)
    vq_width: int = setting(64, 'channels of the tokenizer', 8, 2**18)
    vq_depth: int = setting(2, 'residual blocks in the encoder and in the decoder', 1, 512)
    n_layer: int = setting(4, 'transformer blocks', 1, 512)
    n_head: int = setting(6, 'H, attention heads', 1, 2**18)
    n_embd: int = setting(96, 'C, channels of the transformer', 4, 2**18)

    @property
    def grid(self) -> int:
        """G, codes along a side of the picture."""
        return self.size // self.patch


# ---- VQ tokenizer ----
DECAY = .98                    # of the moving averages, a step
DEAD = .03                     # a code that a batch uses less often than that, on average, is replaced


class VectorQuantizer(nn.Module):
    """Nearest of K unit vectors, learned by exponential moving averages: VQ-VAE (van den Oord et al.
    2017, eq. 3 and appendix A.1) with low-dimensional l2-normalised codes (Yu et al. 2021, section
    3.2) and restart of dead codes (Dhariwal et al. 2020, section 3.1)."""

    def __init__(self, K: int, dim: int):
        super().__init__()
        vectors = torch.randn(K, dim)
        codebook = F.normalize(vectors, dim=-1)
        self.register_buffer('codebook', codebook)                                    # [K, dim]
        self.register_buffer('count', torch.ones(K))                                  # [K]
        self.register_buffer('total', codebook.clone())                               # [K, dim]

    def forward(self, z):
        """z [B, G, G, dim] -> (code vectors [B, G, G, dim], codes [B, G, G], commitment loss)."""
        z = F.normalize(z, dim=-1)
        similarity = z @ self.codebook.T                                              # [B, G, G, K]
        codes = similarity.argmax(-1)                                                 # [B, G, G]
        e = self.codebook[codes]                                                      # [B, G, G, dim]
        if self.training:
            vectors = z.detach().flatten(0, 2)                                        # [B*G*G, dim]
            self.update(vectors, codes.flatten())
        commitment = F.mse_loss(z, e)            # moves the encoder only: the codebook is a buffer
        e = z + (e - z).detach()                 # straight-through: the gradient passes by the codes
        return e, codes, commitment

    def update(self, z, codes):
        """Moving averages of a code's uses and of the vectors it stands for; z [n, dim], codes [n]."""
        K = len(self.count)
        uses = codes.bincount(minlength=K).to(z.dtype)                                # [K]
        sums = torch.zeros_like(self.total)                                           # [K, dim]
        sums.index_add_(0, codes, z)
        chosen = torch.randint(len(z), (K,), device=z.device)
        fresh = z[chosen]                                                             # [K, dim]
        if dist.is_available() and dist.is_initialized():                # torchrun: of all processes
            dist.all_reduce(uses)
            dist.all_reduce(sums)
            dist.broadcast(fresh, 0)
        self.count.lerp_(uses, 1 - DECAY)
        self.total.lerp_(sums, 1 - DECAY)
        dead = self.count < DEAD
        self.total[dead] = fresh[dead]
        self.count[dead] = 1.
        self.codebook.copy_(F.normalize(self.total, dim=-1))


class ResBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))), x [B, width, G, G]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        y = self.conv1(self.norm(x))
        y = self.conv2(F.gelu(y))
        return x + y


class VQTokenizer(nn.Module):
    """Convolutional autoencoder with a discrete bottleneck: S x S pixels <-> G x G codes. Pixels are
    folded into channels first, so that all convolutions run on the G x G grid: cheapest on a CPU."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.quantizer = VectorQuantizer(c.codebook, c.code_dim)
        width = c.vq_width
        pixels = 3 * c.patch ** 2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(c.patch),                                               # [B,pixels,G,G]
            nn.Conv2d(pixels, width, 3, padding=1),                                   # [B,width,G,G]
            *[ResBlock(width) for _ in range(c.vq_depth)],
            nn.Conv2d(width, c.code_dim, 1),                                          # [B,dim,G,G]
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c.code_dim, width, 1),                                          # [B,width,G,G]
            *[ResBlock(width) for _ in range(c.vq_depth)],
            nn.Conv2d(width, pixels, 3, padding=1),                                   # [B,pixels,G,G]
            nn.PixelShuffle(c.patch),                                                 # [B,3,S,S]
        )

    def hidden_matrices(self) -> list:
        """The parameters that Muon trains: convolutions inside the residual blocks."""
        found = []
        for module in self.modules():
            if isinstance(module, ResBlock):
                found += [module.conv1.weight, module.conv2.weight]
        return found

    def quantize(self, x):
        """x [B, 3, S, S] in [0, 1] -> as VectorQuantizer.forward."""
        z = self.encoder(x * 2 - 1)                                                   # [B,dim,G,G]
        return self.quantizer(z.permute(0, 2, 3, 1))                                  # [B,G,G,dim]

    def reconstruct(self, e):
        """Code vectors [B, G, G, dim] -> pictures [B, 3, S, S], about [0, 1]."""
        x = self.decoder(e.permute(0, 3, 1, 2))                                       # [B,3,S,S]
        return x * .5 + .5

    def forward(self, x):
        """x [B, 3, S, S] in [0, 1] -> (reconstruction alike, codes [B, G, G], commitment loss)."""
        e, codes, commitment = self.quantize(x)
        return self.reconstruct(e), codes, commitment

    @torch.no_grad()
    def encode(self, x):
        """Pictures [B, 3, S, S] in [0, 1] -> codes [B, N], row by row."""
        _, codes, _ = self.quantize(x)
        return codes.flatten(1)                                                       # [B,N]

    @torch.no_grad()
    def decode(self, codes):
        """Codes [B, N] -> pictures [B, 3, S, S] in [0, 1]."""
        G = self.c.grid
        e = self.quantizer.codebook[codes]                                            # [B,N,dim]
        x = self.reconstruct(e.unflatten(1, (G, G)))                                  # [B,3,S,S]
        return x.clamp(0, 1)


# ---- the parts of the transformer ----
def norm(x):
    """LayerNorm without parameters (Ba et al. 2016, eq. 4): on a CPU one pass, where RMSNorm is five."""
    return F.layer_norm(x, x.shape[-1:])


def rope_table(length: int, dim: int):
    """e^(i angle), complex [length, dim/2], of rotary position embedding (Su et al. 2021, eq. 13). Half
    of the channels hardly turn at these lengths: they find things by what they are, not where."""
    slowness = 10000. ** (torch.arange(0, dim, 2) / dim)                              # [dim/2]
    position = torch.arange(length)[:, None]                                          # [length,1]
    angle = position / slowness                                                       # [length,dim/2]
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, rotations):
    """Turn channel pairs (2i, 2i + 1) of x [B, T, n, H, D] by position; rotations [B, T, 1, 1, D/2]."""
    x = x.to(rotations.real.dtype)                           # bfloat16 has no complex numbers
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))                           # [B,T,n,H,D/2]
    turned = torch.view_as_real(pairs * rotations)                                    # [B,T,n,H,D/2,2]
    return turned.flatten(-2)                                                         # [B,T,n,H,D]


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v. q [B, H, T, D], k and v [B, H, keys, D] -> [B, H, T, D]."""
    if q.device.type != 'cpu':
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU the fused kernel's backward is slower than plain matrix products at these lengths.
    D = q.shape[-1]
    scores = (q * D ** -.5) @ k.mT                                                    # [B,H,T,keys]
    if mask is not None:
        scores += mask                                       # in place: one pass through memory less
    return torch.softmax(scores, dim=-1) @ v


# A block takes either of two stores: KV to train, Cache to generate.
class KV:
    """Keys and values of one layer: those of the picture, then those of text and codes."""

    k = v = None                                                                      # [B,H,used,D]

    def append(self, k, v):
        """k, v [B*R, H, T, D] -> all so far, [B*R, H, used, D]."""
        if self.k is not None:
            k = joined(self.k, k)
            v = joined(self.v, v)
        self.k, self.v = k, v
        return k, v


def joined(before, new):
    """[B, H, past, D] and [B*R, H, T, D] -> [B*R, H, past + T, D]: R rows share what is before."""
    R = len(new) // len(before)
    if R > 1:
        before = before.repeat_interleave(R, 0)                                       # [B*R,H,past,D]
    return torch.cat([before, new], 2)


class Cache:
    """As KV, for generation: with memory for `room` positions after those of the first append, taken
    once, so that a new token copies nothing of those before it. Written in place: not for training."""

    def __init__(self, room: int):
        self.room = room
        self.used = 0

    def append(self, k, v):
        """As KV.append, of as many rows as before."""
        new = torch.stack([k, v])                                                     # [2,B,H,T,D]
        if self.used == 0:
            self.kv = F.pad(new, (0, 0, 0, self.room))                                # [2,B,H,T+room,D]
        start, self.used = self.used, self.used + k.shape[2]
        self.kv[..., start:self.used, :] = new
        return self.kv[..., :self.used, :]                                            # [2,B,H,used,D]


class Block(nn.Module):
    """Pre-norm transformer block: LayerNorm, attention with QK-norm and RoPE, squared-ReLU MLP."""

    def __init__(self, c: Config):
        super().__init__()
        C = c.n_embd
        self.n_head = c.n_head
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)
        nn.init.zeros_(self.proj.weight)                 # every block starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x, x0, rope, mask, kv):
        """x [B, T, C] -> [B, T, C]; x0 alike: norm(embedding), which attention of every block reads too,
        as it drowns in x (after Jordan 2024); rope [B, T, 1, 1, D/2]; mask [B, 1, T, keys] or None is
        added to the scores; kv: keys and values of what comes before, which grows."""
        B, T, C = x.shape
        qkv = self.qkv(norm(x) + x0)                                                  # [B,T,3*C]
        qkv = qkv.view(B, T, 3, self.n_head, -1)                                      # [B,T,3,H,D]
        qk = rotate(norm(qkv[:, :, :2]), rope)                                        # [B,T,2,H,D]
        q, k = qk.permute(2, 0, 3, 1, 4)                                              # [B,H,T,D]
        v = qkv[:, :, 2].transpose(1, 2)                                              # [B,H,T,D]
        k, v = kv.append(k, v)                                                        # [B,H,keys,D]
        y = attention(q, k, v, mask)                                                  # [B,H,T,D]
        y = y.transpose(1, 2).reshape(B, T, C)                                        # [B,T,C]
        x = x + self.proj(y)
        y = F.relu(self.up(norm(x))).square()                                         # [B,T,4*C]
        return x + self.down(y)


# ---- the unified multimodal model ----
class UMM(nn.Module):
    """One decoder-only transformer that reads and writes both text and pictures (see the top of this
    file). Each modality has its own embedding and head; a head is computed only where its loss lives.
    Source patch (r, c) and target code (r, c) share their 2-D position. vocab: V, number of text tokens,
    which follows from the data."""

    def __init__(self, c: Config, vocab: int):
        super().__init__()
        self.c = c
        C = c.n_embd
        self.text_embed = nn.Embedding(vocab, C)
        self.taps = nn.Parameter(torch.randn(3, C) * .5)     # how a token hears the three before it
        self.code_embed = nn.Embedding(c.codebook + 1, C)    # the last row: start of a picture
        self.patch_embed = nn.Linear(3 * c.patch ** 2, C)
        # Positions as loud as the content they are added to: with quiet ones learning starts much later.
        self.row = nn.Parameter(torch.randn(c.grid, 1, C) * .5)
        self.col = nn.Parameter(torch.randn(1, c.grid, C) * .5)
        self.source = nn.Parameter(torch.randn(C) * .5)      # marks the input picture
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.text_head = nn.Linear(C, vocab, bias=False)
        self.pixel_head = nn.Linear(C, c.codebook, bias=False)
        nn.init.normal_(self.text_embed.weight, std=.7)
        nn.init.normal_(self.code_embed.weight, std=.7)
        nn.init.zeros_(self.text_head.weight)                # the first loss is exactly ln V
        nn.init.zeros_(self.pixel_head.weight)               # ln K
        D = C // c.n_head
        positions = c.grid + 2 * MAX_TEXT                    # padding and what is written count too
        rotations = rope_table(positions, D // 2)                                     # [positions,D/4]
        self.register_buffer('rotations', torch.view_as_real(rotations), persistent=False)
        place = torch.arange(c.grid)
        self.register_buffer('rc', torch.cartesian_prod(place, place), False)         # [N,2] row, column

    def hidden_matrices(self) -> list:
        """The parameters that Muon trains: the matrices of the blocks."""
        return list(self.blocks.parameters())

    def position(self):
        """Learned embedding of each place of the grid, [N, C]."""
        return (self.row + self.col).flatten(0, 1)                                    # [N,C]

    def rope(self, at):
        """2-D rotary positions: half of the channels turn by row, half by column; at [B, T, 2]. Text
        moves along the diagonal, as in M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1)."""
        rotations = torch.view_as_complex(self.rotations[at])                         # [B,T,2,D/4]
        return rotations.flatten(2)[:, :, None, None]                                 # [B,T,1,1,D/2]

    def embed_image(self, image):
        """Input pictures [B, 3, S, S] in [0, 1] -> [B, N, C]."""
        patches = F.pixel_unshuffle(image * 2 - 1, self.c.patch)                      # [B,3*P*P,G,G]
        x = self.patch_embed(patches.flatten(2).mT)                                   # [B,N,C]
        return x + self.position() + self.source

    def embed_text(self, text, turn):
        """Tokens and turns [B, T] -> [B, T, C]: a depthwise causal convolution within a turn (Allen-Zhu
        2025, Canon layers), so that the end of a question hears at once what it is about."""
        T = text.shape[1]
        x = out = self.text_embed(text)
        for k, tap in enumerate(self.taps, 1):
            before = F.pad(x, (0, 0, k, 0))                                           # [B,k+T,C]
            before = before[:, :T]
            its_turn = F.pad(turn, (k, 0), value=-2)[:, :T]                           # [B,T]
            same = turn == its_turn
            out = out + tap * before * same[..., None]
        return out

    def embed_codes(self, codes, hide: float):
        """Known codes [B, n] -> inputs [B, min(n + 1, N), C]: at place i code i - 1, which is known when
        code i is to be predicted: a, b, c -> start, a, b. The first int(hide * B) rows read the start
        symbol everywhere; rows are in random order anyway."""
        shifted = F.pad(codes, (1, 0), value=self.c.codebook)                         # [B,n+1]
        shifted = shifted[:, :len(self.rc)]                  # the last code of a picture is no input
        hidden_rows = int(hide * len(shifted))
        shifted[:hidden_rows] = self.c.codebook
        places = self.position()[:shifted.shape[1]]                                   # [n+1,C]
        return self.code_embed(shifted) + places

    def hidden(self, s: Sequence, kvs=None, done=0, hide=0.):
        """-> last hidden states at text and codes, [B, T (+ N), C]. Of text B stands for B*R rows, R of
        which share a picture; with codes R is 1.

        kvs: keys and values of each layer, which hold the picture and the first `done` positions of text
        and codes already: these are skipped and not returned. hide: share of the rows, the
        first ones, that do not see their own earlier codes."""
        if kvs is None:
            kvs = [KV() for _ in self.blocks]
        if s.image is not None and done == 0:                # later its keys are in kvs
            self.read(s.image, kvs)
        x, turn = self.embed(s, done, hide)                                   # [B,new,C], [B,T']
        T = s.text.shape[1]
        see, at = self.places(turn, T, done)                                  # [B,new,T'], [B,new,2]
        if s.image is not None:
            N = len(self.rc)
            see = F.pad(see, (N, 0), value=True)                                      # [B,new,N+T']
        mask = torch.where(see[:, None], 0., -1e4).to(x.dtype)                        # [B,1,new,N+T']
        return self.through_blocks(x, at, mask, kvs)

    def read(self, image, kvs):
        """Pictures [B, 3, S, S] -> their last hidden states [B, N, C]; kvs, from which all else reads
        them, are filled."""
        x = self.embed_image(image)                                                   # [B,N,C]
        return self.through_blocks(x, self.rc[None], None, kvs)

    def embed(self, s: Sequence, done: int, hide: float):
        """-> inputs of text and codes from position `done` on [B, new, C], turn of all positions."""
        T = s.text.shape[1]
        turn, parts = s.turn, []
        if done < T:
            text = self.embed_text(s.text, turn)                                      # [B,T,C]
            parts.append(text[:, done:])
        if s.codes is not None:
            codes = self.embed_codes(s.codes, hide)                                   # [B,n+1,C]
            turn = F.pad(turn, (0, codes.shape[1]), value=1)                          # codes are turn 1
            start = max(0, done - T)                         # first new code
            parts.append(codes[:, start:])
        return torch.cat(parts, 1), turn

    def through_blocks(self, x, at, mask, kvs):
        """x [B, new, C] at places `at` [B, new, 2] -> alike; mask as in Block; kvs grow."""
        x0 = norm(x)
        rope = self.rope(at)
        for block, kv in zip(self.blocks, kvs):
            x = block(x, x0, rope, mask, kv)
        return norm(x)

    def places(self, turn, T: int, done: int):
        """turn [B, T'] of text, T positions, and codes -> for the positions from `done` on: whom they
        see [B, new, T'], the earlier ones of their turn, and where they stand [B, new, 2]."""
        mine = turn[:, done:, None]                                                   # [B,new,1]
        same = mine == turn[:, None]                                                  # [B,new,T']
        see = same.tril(done)                                # none that comes later
        # Text stands on the diagonal beyond the picture, as far as the number of tokens that it sees
        seen = see.sum(-1)                                                            # [B,new]
        at = self.c.grid - 1 + seen
        at = torch.stack([at, at], -1)                                                # [B,new,2]
        n_codes = turn.shape[1] - T
        if n_codes > 0:                                      # a code stands where its source stands
            start = max(0, done - T)                         # first new code
            at[:, start - n_codes:] = self.rc[start:n_codes]
        return see, at

    def forward(self, s: Sequence, hide=0.):
        """-> (text loss, pixel loss): mean cross-entropy of each head in nats, None without a target."""
        x = self.hidden(s, hide=hide)                                                 # [B,T+N,C]
        T = s.text.shape[1]
        text = pixel = None
        if s.target is not None:
            asked = s.target >= 0                                                     # [B,T]
            if asked.any():
                states = x[:, :T][asked]                                              # [targets,C]
                logits = self.text_head(states)                                       # [targets,V]
                text = F.cross_entropy(logits.float(), s.target[asked])
        if s.codes is not None:
            states = x[:, T:].flatten(0, 1)                                           # [B*N,C]
            logits = self.pixel_head(states)                                          # [B*N,K]
            pixel = F.cross_entropy(logits.float(), s.codes.flatten())
        return text, pixel

    def generate(self, s: Sequence, first=None, stop=-1, length=32, cfg=1., temperature=1.,
                 generator=None):
        """Continue [picture][text], one turn per row, token by token with a KV cache.

        first: None draws the N codes of a picture; else the text token that opens an answer, of at most
        `length` tokens, ended by `stop`. cfg: classifier-free guidance scale g, logits u + g (c - u), u
        without the text (Ho & Salimans 2022, eq. 6, g = 1 + w); 1 = off. -> tokens [B, n].
        """
        B = len(s.text)
        s = padded_in_front(s)
        if cfg != 1:
            s = with_and_without_text(s)                                              # 2B rows
        if first is None:
            head, length = self.pixel_head, len(self.rc)
            s.codes = s.text[:, :0]                          # none is known yet
        else:
            head = self.text_head
            opening = torch.full_like(s.text[:, 0], first)                            # [rows]
            s = continued(s, opening)
        room = s.text.shape[1] + length
        kvs = [Cache(room) for _ in self.blocks]
        tokens, done = [], 0
        ended = s.text.new_zeros(B, dtype=torch.bool)
        with torch.inference_mode():                         # faster than no_grad
            for _ in range(length):
                x = self.hidden(s, kvs, done)                                         # [rows,new,C]
                done += x.shape[1]
                logits = head(x[:, -1]).float()                                       # [rows,K or V]
                if cfg != 1:
                    c, u = logits.chunk(2)
                    logits = u + cfg * (c - u)                                        # [B,K or V]
                token = pick(logits, temperature, generator)                          # [B]
                tokens.append(token)
                ended = ended | (token == stop)
                if ended.all():
                    break
                s = continued(s, token.repeat(len(s.text) // B))
        # outside of that mode: what was written can be trained on
        return torch.stack(tokens, 1)                                                 # [B,n]


# ---- writing and drawing, token by token ----
TEMPERATURE = .4               # of drawings: more is more various, less is more often right


def padded_in_front(s: Sequence) -> Sequence:
    """The same rows with their padding before the text, so that what is written follows the text."""
    order = s.turn.argsort(stable=True)                      # -1, padding, first         [B,T]
    text = s.text.gather(1, order)
    turn = s.turn.gather(1, order)
    return replace(s, text=text, turn=turn)


def with_and_without_text(s: Sequence) -> Sequence:
    """Twice as many rows: in the second half what is generated does not see the text. For guidance."""
    unseen = torch.full_like(s.turn, -1)
    turn = torch.cat([s.turn, unseen])                                                # [2B,T]
    image = s.image
    if image is not None:
        image = image.repeat(2, 1, 1, 1)
    return replace(s, text=s.text.repeat(2, 1), turn=turn, image=image)


def continued(s: Sequence, token) -> Sequence:
    """The sequence with one more token [B], a code where codes are being drawn, else text."""
    token = token[:, None]                                                            # [B,1]
    if s.codes is not None:
        return replace(s, codes=torch.cat([s.codes, token], 1))                       # [B,n+1]
    text = torch.cat([s.text, token], 1)                                              # [B,T+1]
    turn = F.pad(s.turn, (0, 1), value=1)
    return replace(s, text=text, turn=turn)


def pick(logits, temperature: float, generator=None):
    """Sample one token per row of logits [B, K]; temperature 0 (< 1e-4): the likeliest."""
    if temperature < 1e-4:
        return logits.argmax(-1)
    chances = (logits / temperature).softmax(-1)                                      # [B,K]
    tokens = torch.multinomial(chances, 1, generator=generator)                       # [B,1]
    return tokens[:, 0]


def write(umm, text: Text, s: Sequence, length=40, **how) -> list[str]:
    """The texts that continue [picture][prompt]; how: as in UMM.generate."""
    tokens = umm.generate(s, text.answer, text.end, length, **how)
    return [text.decode(row) for row in tokens.tolist()]


def draw(umm, text: Text, prompts: list[str], generator=None, temperature=TEMPERATURE, cfg=1.):
    """-> (codes [B, N], plans): first a plan, what is where, then its picture."""
    device = umm.row.device
    how = dict(temperature=temperature, generator=generator)
    rows = [[(prompt, None)] for prompt in prompts]
    asked = pack(text, rows, device=device)
    plans = write(umm, text, asked, MAX_PLAN, **how)
    rows = [[turn] for turn in zip(prompts, plans)]        # packed again: as training lays it out
    planned = pack(text, rows, device=device)
    codes = umm.generate(planned, cfg=cfg, **how)                                     # [B,N]
    return codes, plans


def drawn(umm, tok, text: Text, prompts, seed: int, cfg: float):
    """Pictures [B, 3, S, S] of the prompts, the same ones for the same seed."""
    g = torch.Generator(umm.row.device).manual_seed(seed)
    codes, _ = draw(umm, text, prompts, g, cfg=cfg)
    return tok.decode(codes)


# ---- files: safetensors, config and vocabulary as JSON in the header; nothing is ever unpickled ----
def save(path, tensors: dict, meta: dict):
    """Write tensors and meta to `path`, whole or not at all."""
    tensors = {k: t.contiguous() for k, t in tensors.items()}
    try:
        with written_whole(path) as part:
            save_file(tensors, part, {'nanoumm': json.dumps(meta)})
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write {path}: {e}; free some space or choose another --out. '
                        'The previous file, if any, is untouched')


def both(tok, umm) -> nn.ModuleDict:
    """The two networks as one: a checkpoint names its tensors tokenizer.* and umm.*"""
    return nn.ModuleDict({'tokenizer': tok, 'umm': umm})


def check_config(c: Config):
    """ValueError for what no network here can have: values out of the bounds that their fields state,
    or that do not fit each other. They may come from a stranger's file."""
    for f in fields(c):
        value = getattr(c, f.name)
        least, most = f.metadata['least'], f.metadata['most']
        one_of = f.metadata['one_of']
        if type(value) is not type(f.default):
            raise ValueError(f'{f.name} is {value!r:.40}')
        if one_of and value not in one_of:
            raise ValueError(f"{f.name} is {value!r:.40}: choose one of {', '.join(one_of)}")
        if type(value) in (int, float) and not least <= value <= most:
            raise ValueError(f'{f.name} is {value}: it must be from {least} to {most}')
    units = {'size': c.patch, 'vq_width': 8, 'n_embd': 4 * c.n_head}
    for name, unit in units.items():
        value = getattr(c, name)
        if value % unit:
            raise ValueError(f'{name} is {value}: it must be a multiple of {unit}')


# A checkpoint says which stage comes next, or goes on; the one before it is done.
BEFORE = {'tokenizer': '', 'pretrain': 'tokenizer', 'posttrain': 'pretrain', 'done': 'posttrain'}


def read_checkpoint(path):
    """-> (config, text, tensors, meta) of a file; what is no checkpoint raises one of many errors.
    meta['trained']: the last stage in which the model learned something; meta['taught']: the map that it
    learned to generate, or 'none'."""
    with safe_open(path, 'pt') as f:
        meta = json.loads(f.metadata()['nanoumm'])
        tensors = {k: f.get_tensor(k).clone() for k in f.keys()}         # not a view of the file
    kinds = {'step': int, 'lines': int, 'settings': dict, 'classes': list, 'words': list}
    for key, kind in kinds.items():
        if type(meta[key]) is not kind:
            raise TypeError(f'{key} is {meta[key]!r:.40}')
    before = BEFORE[meta['stage']]
    trained = meta['stage'] if meta['step'] > 0 else before
    meta['trained'] = trained
    meta['taught'] = meta['settings'].get('proxy') if trained == 'posttrain' else 'none'
    c = Config(**meta['config'])
    check_config(c)
    tokens = [bytes.fromhex(t) for t in meta['text']]
    return c, Text(tokens), tensors, meta


def load(path, device='cpu'):
    """-> (tokenizer, umm, text, all tensors, meta) of a checkpoint; UserError if it is not sound."""
    if not Path(path).is_file():
        raise UserError(f'no checkpoint {path}: make one with `python train.py` without --resume, or '
                        'name yours')
    try:
        c, text, tensors, meta = read_checkpoint(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f'cannot read {path}: it is not a whole nanoUMM checkpoint, or not for you '
                        f'({e!r:.90}); copy it anew or train again')
    with torch.device('meta'):             # compare shapes before anything of that size is allocated
        networks = both(VQTokenizer(c), UMM(c, text.size))
    for name, want in networks.state_dict().items():
        found = tensors.get(name, torch.empty(0))
        alike = found.shape == want.shape and found.dtype == want.dtype
        if not alike or not found.isfinite().all():
            raise UserError(f'{path}: tensor {name} is missing, misshapen or not finite; train again')
    networks = both(VQTokenizer(c), UMM(c, text.size))
    networks.load_state_dict(tensors, strict=False)          # an optimizer's tensors are not theirs
    networks.to(device).eval()
    return *networks.values(), text, tensors, meta
