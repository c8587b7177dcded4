"""The two networks: a VQ tokenizer (pictures <-> codes) and the unified multimodal model (UMM).

Axes: B pictures (text: B*R rows, see data.pack), T positions of a sequence, C channels, H heads,
D channels of a head, V text vocabulary, K codebook, S side of a picture, G of its grid of N = G*G codes.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import MAX_PLAN, MAX_TEXT, Sequence, Text, UserError, pack

@dataclass
class Config:
    """Everything needed to rebuild both networks; it travels inside the checkpoint."""
    size: int = 32               # S, side of a picture in pixels
    patch: int = 4               # side in pixels of what one code, or one input token, stands for
    codebook: int = 512          # K, number of codes
    code_dim: int = 8            # channels of a code
    vq_width: int = 64           # channels of the tokenizer
    vq_depth: int = 2            # residual blocks in the encoder and in the decoder
    quantizer: str = 'vq'        # 'vq' (learned codebook) or 'fsq' (fixed grid)
    vocab: int = 512             # V, text tokens, the special ones included
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 96             # C
    image_input: str = 'patch'   # how the input picture enters: 'patch' (pixels) or 'code' (VQ codes)
    grid = property(lambda self: self.size // self.patch)      # G

# ---- VQ tokenizer ----
class VectorQuantizer(nn.Module):
    """Nearest of K unit vectors, learned by exponential moving averages: VQ-VAE (van den Oord et al.
    2017, eq. 3 and appendix A.1) with low-dimensional l2-normalised codes (Yu et al. 2021, section
    3.2) and restart of dead codes (Dhariwal et al. 2020, section 3.1)."""

    def __init__(self, K: int, dim: int, decay=.98, dead=.03):
        super().__init__()
        self.decay, self.dead = decay, dead      # restart codes used less than `dead` times a batch
        self.register_buffer('codebook', F.normalize(torch.randn(K, dim), dim=-1))    # [K, dim]
        self.register_buffer('count', torch.ones(K))                                  # [K]
        self.register_buffer('total', self.codebook.clone())                          # [K, dim]

    def forward(self, z):
        """z [B, G, G, dim] -> (code vectors [B, G, G, dim], codes [B, G, G], commitment loss)."""
        z = F.normalize(z, dim=-1)
        codes = (z @ self.codebook.T).argmax(-1)                                      # [B, G, G]
        e = self.codebook[codes]                                                      # [B, G, G, dim]
        if self.training:
            self.update(z.detach().flatten(0, 2), codes.flatten())                    # [B*G*G, dim]
        # straight-through gradient; the commitment moves the encoder only: the codebook is a buffer
        return z + (e - z).detach(), codes, F.mse_loss(z, e)

    @torch.no_grad()
    def update(self, z, codes):
        """Moving averages of a code's uses and of the vectors it stands for; z [n, dim], codes [n]."""
        uses = codes.bincount(minlength=len(self.count)).to(z.dtype)                  # [K]
        sums = torch.zeros_like(self.total).index_add_(0, codes, z)                   # [K, dim]
        fresh = z[torch.randint(len(z), self.count.shape, device=z.device)]           # [K, dim]
        if dist.is_available() and dist.is_initialized():          # torchrun: of all processes
            dist.all_reduce(uses), dist.all_reduce(sums), dist.broadcast(fresh, 0)
        self.count.lerp_(uses, 1 - self.decay), self.total.lerp_(sums, 1 - self.decay)
        dead = self.count < self.dead
        self.total.copy_(torch.where(dead[:, None], fresh, self.total))
        self.count.masked_fill_(dead, 1.)
        self.codebook.copy_(F.normalize(self.total, dim=-1))

class FiniteScalarQuantizer(nn.Module):
    """A fixed grid instead of a learned codebook: FSQ (Mentzer et al. 2023, section 3.1)."""

    def __init__(self, K: int):
        super().__init__()
        bits = K.bit_length() - 1                      # K = 2^bits = 8 * 8 * ... * 2^(bits mod 3)
        levels = torch.tensor([8] * (bits // 3) + ([2 ** (bits % 3)] if bits % 3 else []))
        self.register_buffer('levels', levels)                                        # [dim]
        self.register_buffer('basis', torch.cumprod(F.pad(levels[:-1], (1, 0), value=1), 0))  # [dim]
        digits = torch.arange(K)[:, None] // self.basis % levels                      # [K, dim]
        self.register_buffer('codebook', digits / (levels - 1) * 2 - 1)               # [K, dim]

    def forward(self, z):
        """As VectorQuantizer.forward; there is nothing to commit to, so that loss is 0."""
        z = torch.tanh(z)
        digits = ((z + 1) / 2 * (self.levels - 1)).round()                            # [B,G,G,dim]
        e, codes = digits / (self.levels - 1) * 2 - 1, (digits.long() * self.basis).sum(-1)
        return z + (e - z).detach(), codes, z.new_zeros(())

class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))

class VQTokenizer(nn.Module):
    """Convolutional autoencoder with a discrete bottleneck: S x S pixels <-> G x G codes. Pixels are
    folded into channels first, so that all convolutions run on the G x G grid: cheapest on a CPU."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.quantizer = (FiniteScalarQuantizer(c.codebook) if c.quantizer == 'fsq' else
                          VectorQuantizer(c.codebook, c.code_dim))
        width, pixels, dim = c.vq_width, 3 * c.patch ** 2, self.quantizer.codebook.shape[1]
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(c.patch), nn.Conv2d(pixels, width, 3, padding=1),       # [B,width,G,G]
            *[ResBlock(width) for _ in range(c.vq_depth)], nn.Conv2d(width, dim, 1))  # [B,dim,G,G]
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 1), *[ResBlock(width) for _ in range(c.vq_depth)],  # [B,width,G,G]
            nn.Conv2d(width, pixels, 3, padding=1), nn.PixelShuffle(c.patch))         # [B,3,S,S]

    def quantize(self, x):
        return self.quantizer(self.encoder(x * 2 - 1).permute(0, 2, 3, 1))            # [B,G,G,dim]

    def reconstruct(self, e):
        return self.decoder(e.permute(0, 3, 1, 2)) * .5 + .5                          # [B,3,S,S]

    def forward(self, x):
        """x [B, 3, S, S] in [0, 1] -> (reconstruction alike, codes [B, G, G], commitment loss)."""
        e, codes, commitment = self.quantize(x)
        return self.reconstruct(e), codes, commitment

    @torch.no_grad()
    def encode(self, x):
        """Pictures [B, 3, S, S] in [0, 1] -> codes [B, N], row by row."""
        return self.quantize(x)[1].flatten(1)                                         # [B,N]

    @torch.no_grad()
    def decode(self, codes):
        """Codes [B, N] -> pictures [B, 3, S, S] in [0, 1]."""
        e = self.quantizer.codebook[codes].unflatten(1, (self.c.grid, self.c.grid))   # [B,G,G,dim]
        return self.reconstruct(e).clamp(0, 1)

# ---- the unified multimodal model ----
def norm(x):
    """LayerNorm without parameters (Ba et al. 2016, eq. 4): on a CPU one pass, where RMSNorm is five."""
    return F.layer_norm(x, x.shape[-1:])

def rope_table(length: int, dim: int, base=10000.):
    """e^(i angle), complex [length, dim/2], of rotary position embedding (Su et al. 2021, eq. 13). Half
    of the channels hardly turn at these lengths: they find things by what they are, not where."""
    angle = torch.arange(length)[:, None] / base ** (torch.arange(0, dim, 2) / dim)   # [length,dim/2]
    return torch.polar(torch.ones_like(angle), angle)

def rotate(x, turns):
    """Turn channel pairs (2i, 2i + 1) of x [B, T, n, H, D] by position; turns [B, T, 1, 1, D/2]."""
    x = x.to(turns.real.dtype)                               # there are no complex numbers of bfloat16
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))                           # [B,T,n,H,D/2]
    return torch.view_as_real(pairs * turns).flatten(-2)                              # [B,T,n,H,D]

def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v. q [B, H, T, D], k and v [B, H, keys, D] -> [B, H, T, D]."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU the fused kernel's backward is slower than plain matrix products at these lengths.
    scores = (q * q.shape[-1] ** -.5) @ k.mT                                          # [B,H,T,keys]
    if mask is not None:
        scores += mask                                       # in place: one pass through memory less
    return torch.softmax(scores, dim=-1) @ v

class KV:
    """Keys and values of one layer: grown by concatenation (training) or in a preallocated buffer."""

    def __init__(self, buffer=None):
        self.buffer, self.used, self.kv = buffer, 0, ()            # buffer [2, B, H, length, D]

    def append(self, k, v):
        """k, v [B, H, T, D] -> all so far, [B, H, used, D]; rows of text share their picture's."""
        if self.buffer is None:
            past = [a[:, None].expand(-1, len(k) // len(a), -1, -1, -1).flatten(0, 1) for a in self.kv]
            self.kv = [torch.cat(pair, 2) for pair in zip(past, (k, v))] or (k, v)    # [B,H,used,D]
            return self.kv
        start, self.used = self.used, self.used + k.shape[2]
        self.buffer[:, :, :, start:self.used] = torch.stack((k, v))
        return self.buffer[:, :, :, :self.used]

class Block(nn.Module):
    """Pre-norm transformer block: LayerNorm, attention with QK-norm and RoPE, squared-ReLU MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.n_head = c.n_head
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        for out in (self.proj, self.down):
            nn.init.zeros_(out.weight)                 # every block starts as the identity

    def forward(self, x, x0, rope, mask, kv: KV):
        """x [B, T, C] -> [B, T, C]; x0 alike: norm(embedding), which attention of every block reads too,
        as it drowns in x (after Jordan 2024); mask [B, 1, T, keys] or None: added to scores; kv: past"""
        B, T, C = x.shape
        qkv = self.qkv(norm(x) + x0).view(B, T, 3, self.n_head, -1)                   # [B,T,3,H,D]
        q, k = rotate(norm(qkv[:, :, :2]), rope).permute(2, 0, 3, 1, 4)               # [B,H,T,D]
        v = qkv[:, :, 2].transpose(1, 2)                                              # [B,H,T,D]
        y = attention(q, *kv.append(k, v), mask)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))                         # [B,T,C]
        return x + self.down(F.relu(self.up(norm(x))).square())

class UMM(nn.Module):
    """One decoder-only transformer that reads and writes both text and pictures.

    A sequence is [picture][text][codes]. The picture is read bidirectionally and never sees what
    follows; text and codes are causal. Each modality has its own embedding and head; a head is computed
    only where its loss lives. Source patch (r, c) and target code (r, c) share their 2-D position.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.c, C = c, c.n_embd
        self.text_embed = nn.Embedding(c.vocab, C)
        self.taps = nn.Parameter(torch.randn(3, C) * .5)      # how a token hears the three before it
        self.code_embed = nn.Embedding(c.codebook + 1, C)          # the last row: start of a picture
        self.patch_embed = nn.Linear(3 * c.patch ** 2, C)
        # Positions as loud as the content they are added to: with quiet ones learning starts much later.
        self.row = nn.Parameter(torch.randn(c.grid, 1, C) * .5)
        self.col = nn.Parameter(torch.randn(1, c.grid, C) * .5)
        self.source = nn.Parameter(torch.randn(C) * .5)            # marks the input picture
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.text_head = nn.Linear(C, c.vocab, bias=False)
        self.pixel_head = nn.Linear(C, c.codebook, bias=False)
        for table, head in ((self.text_embed, self.text_head), (self.code_embed, self.pixel_head)):
            nn.init.normal_(table.weight, std=.7)
            nn.init.zeros_(head.weight)                      # the first loss is exactly ln V or ln K
        turns = rope_table(c.grid + 2 * MAX_TEXT, C // c.n_head // 2)                 # [positions,D/4]
        self.register_buffer('turns', torch.view_as_real(turns), persistent=False)
        self.register_buffer('rc', torch.cartesian_prod(*[torch.arange(c.grid)] * 2), False)  # [N,2]

    position = lambda self: (self.row + self.col).flatten(0, 1)                       # [N,C]

    def rope(self, at):
        """2-D rotary positions: half of the channels turn by row, half by column; at [B, T, 2]. Text
        moves along the diagonal, as in M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1)."""
        return torch.view_as_complex(self.turns[at]).flatten(2)[:, :, None, None]     # [B,T,1,1,D/2]

    def inputs(self, tok, image):
        """Pictures [B, 3, S, S] as this model reads them: pixels, or the tokenizer's codes [B, N]."""
        return tok.encode(image) if self.c.image_input == 'code' else image

    def embed_image(self, image):
        """Input picture: [B, 3, S, S] in [0, 1] ('patch') or codes [B, N] ('code') -> [B, N, C]."""
        x = (self.code_embed(image) if self.c.image_input == 'code' else
             self.patch_embed(F.pixel_unshuffle(image * 2 - 1, self.c.patch).flatten(2).mT))   # [B,N,C]
        return x + self.position() + self.source

    def embed_text(self, text, turn):
        """Tokens and turns [B, T] -> [B, T, C]: a depthwise causal convolution within a turn (Allen-Zhu
        2025, Canon layers), so that the end of a question hears at once what it is about."""
        x = out = self.text_embed(text)
        for k, tap in enumerate(self.taps, 1):
            same = F.pad(turn, (k, 0), value=-2)[:, :-k] == turn                      # [B,T]
            out = out + tap * F.pad(x, (0, 0, k, 0))[:, :-k] * same[..., None]        # [B,T,C]
        return out

    def hidden(self, s: Sequence, kvs: list[KV] | None = None, hide=0.):
        """-> last hidden states at text and codes, [B, T (+ N), C]; kvs: where keys and values go; hide:
        share of the rows, the first ones, that do not see their own earlier codes."""
        N = self.c.grid ** 2
        x, turn = self.embed_text(s.text, s.turn), s.turn
        if s.codes is not None:      # shifted by one: the input at n is code n - 1 and the position of n
            shifted = F.pad(s.codes[:, :-1], (1, 0), value=self.c.codebook)           # [B,N]
            shifted[:round(hide * len(shifted))] = self.c.codebook
            x = torch.cat([x, self.code_embed(shifted) + self.position()], 1)         # [B,T+N,C]
            turn = F.pad(turn, (0, N), value=1)                                       # [B,T+N]
        see = (turn[:, :, None] == turn[:, None, :]).tril()  # [B,T,T] earlier tokens of the same turn
        at = (self.c.grid - 1 + see.sum(-1))[..., None].repeat(1, 1, 2)               # [B,T,2]
        if s.codes is not None:
            at[:, -N:] = self.rc         # a code stands where its source patch stands, text after them
        rope = self.rope(at)
        if s.image is not None:
            image, image_rope = self.embed_image(s.image), self.rope(self.rc[None])   # [B,N,C]
            see = F.pad(see, (N, 0), value=True)                                      # [B,T,N+T]
            image0 = norm(image)
        mask, x0 = torch.where(see, 0., -1e4).to(x.dtype)[:, None], norm(x)           # [B,1,T,keys]
        for block, kv in zip(self.blocks, kvs or [KV() for _ in self.blocks]):
            if s.image is not None:
                image = block(image, image0, image_rope, None, kv)
            x = block(x, x0, rope, mask, kv)
        return norm(x)

    def forward(self, s: Sequence, hide=0.):
        """-> (text loss, pixel loss): mean cross-entropy of each head in nats, None without a target."""
        x, text, pixel = self.hidden(s, hide=hide), None, None
        if s.target is not None and (keep := s.target >= 0).any():
            text = F.cross_entropy(self.text_head(x[:, :s.text.shape[1]][keep]).float(), s.target[keep])
        if s.codes is not None:
            logits = self.pixel_head(x[:, -s.codes.shape[1]:])                        # [B,N,K]
            pixel = F.cross_entropy(logits.flatten(0, 1).float(), s.codes.flatten())
        return text, pixel

    @torch.no_grad()
    def generate(self, s: Sequence, first: int | None = None, stop: int = -1, length: int = 32, cfg=1.,
                 temperature=1., top_k=0, generator=None):
        """Continue [picture][text], one turn per row, token by token with a preallocated KV cache.

        first: None draws the N codes of a picture; else the text token that opens an answer, of at most
        `length` tokens, ended by `stop`. cfg: classifier-free guidance scale g, logits u + g (c - u), u
        without the text (Ho & Salimans 2022, eq. 6, g = 1 + w); 1 = off. -> tokens [B, n].
        """
        (B, T), H, draw, guided = s.text.shape, self.c.n_head, first is None, cfg != 1
        if guided:                         # second half of the batch: the same without its text
            image = None if s.image is None else torch.cat([s.image, s.image])
            turn = torch.cat([s.turn, torch.full_like(s.turn, -1)])                   # [2B,T]
            s = Sequence(s.text.repeat(2, 1), turn, None, image)
        length, known = len(self.rc) if draw else length, 0 if s.image is None else len(self.rc)
        size = (2, len(s.text), H, known + T + length, self.c.n_embd // H)
        kvs = [KV(torch.zeros(size, device=s.text.device, dtype=self.row.dtype)) for _ in self.blocks]
        self.hidden(s, kvs)                # fills the cache
        see = F.pad(F.pad(s.turn == 1, (known, 0), value=True), (0, length), value=True)    # [B,keys]
        mask = torch.where(see, 0., -1e4)[:, None, None]                              # [B,1,1,keys]
        told = (s.turn == 1).sum(1, keepdim=True)                                     # [B,1]
        back = told + torch.arange(-3, 0, device=told.device)                         # [B,3]
        ids, turn = s.text.gather(1, back.clamp(min=0)), torch.where(back < 0, -1, 1)
        token = torch.full_like(told[:, 0], self.c.codebook if draw else first)       # [B or 2B]
        tokens, done = [], torch.zeros_like(token[:B], dtype=torch.bool)
        for i in range(length):
            if draw:
                x, at = self.code_embed(token) + self.position()[i], self.rc[None, i:i + 1]   # [B,C]
            else:
                ids, turn = torch.cat([ids, token[:, None]], 1), F.pad(turn, (0, 1), value=1)
                x = self.embed_text(ids, turn)[:, -1]                                 # [B,C]
                at = (self.c.grid + told + i)[..., None].repeat(1, 1, 2)              # [B,1,2]
            x0, rope = norm(x := x[:, None]), self.rope(at)                           # [B,1,C]
            for block, kv in zip(self.blocks, kvs):
                x = block(x, x0, rope, mask[..., :kv.used + 1], kv)
            logits = (self.pixel_head if draw else self.text_head)(norm(x)[:, 0]).float()  # [B,K or V]
            if guided:
                c, u = logits.chunk(2)
                logits = u + cfg * (c - u)
            tokens.append(pick(logits, temperature, top_k, generator))                # [B]
            if (done := done | (tokens[-1] == stop)).all():
                break
            token = tokens[-1].repeat(1 + guided)
        return torch.stack(tokens, 1)                                                 # [B,n]

def pick(logits, temperature: float, top_k: int, generator=None):
    """Sample one token per row of logits [B, K]; temperature 0 (< 1e-4): the likeliest; top_k 0: all."""
    if temperature < 1e-4:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

def write(umm, text: Text, s: Sequence, length=40, **how) -> list[str]:
    """The texts that continue [picture][prompt]; how: as in UMM.generate."""
    return [text.decode(row) for row in umm.generate(s, text.answer, text.end, length, **how).tolist()]

def draw(umm, text: Text, prompts: list[str], generator=None, temperature=.7, top_k=64, **how):
    """-> (codes [B, N], plans): first a plan, what is where, at temperature 1 or 0, then its picture."""
    asked = pack(text, [[(prompt, None)] for prompt in prompts], device=umm.row.device)
    plans = write(umm, text, asked, MAX_PLAN, generator=generator, temperature=float(temperature > 0))
    planned = pack(text, [[turn] for turn in zip(prompts, plans)], device=umm.row.device)
    return umm.generate(planned, generator=generator, temperature=temperature, top_k=top_k, **how), plans

# ---- files: safetensors, config and vocabulary as JSON in the header; nothing is ever unpickled ----
def save(path, tensors: dict, meta: dict):
    """Write tensors and meta to `path`, whole or not at all: a temporary file, fsync, then rename."""
    path, part = Path(path), Path(f'{path}.part')
    try:
        tensors = {k: t.detach().contiguous() for k, t in tensors.items()}
        save_file(tensors, part, {'nanoumm': json.dumps(meta)})
        with open(part, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f'cannot write {path}: {e}; free some space or choose another --out. '
                        'The previous file, if any, is untouched')

def load(path, device='cpu'):
    """-> (tokenizer, umm, text, all tensors, meta) of a checkpoint; UserError if it is not sound."""
    if not Path(path).is_file():
        raise UserError(f'no checkpoint {path}: make one with `python train.py`, or name yours')
    try:
        with safe_open(path, 'pt') as f:
            meta = json.loads(f.metadata()['nanoumm'])
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}   # not mapped
        c, text = Config(**meta['config']), Text([bytes.fromhex(t) for t in meta['text']])
        range(meta['step']), range(meta['lines']), dict(meta['settings'])     # TypeError if foreign
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f'{path} is not a whole nanoUMM checkpoint ({type(e).__name__}: {str(e)[:80]}); '
                        'train again or copy it anew')
    sane = all(type(v) is type(vars(Config())[k]) and (type(v) is str or 0 < v <= 2**18)
               for k, v in vars(c).items()) and max(c.n_layer, c.vq_depth, c.size) <= 512
    if not sane or c.vocab != text.size or c.size % c.patch or c.vq_width % 8 or c.n_embd % (4*c.n_head):
        raise UserError(f'{path} has an impossible config: {vars(c)}; train again')
    with torch.device('meta'):             # compare shapes before anything of that size is allocated
        want = {f'{n}.{k}': t for n, m in (('tokenizer', VQTokenizer(c)), ('umm', UMM(c)))
                for k, t in m.state_dict().items()}
    if bad := [k for k, t in want.items() if k not in tensors or tensors[k].shape != t.shape
               or tensors[k].dtype != t.dtype or not tensors[k].isfinite().all()]:
        raise UserError(f'{path}: tensor {bad[0]} is missing, misshapen or not finite; train again')
    tok, umm = VQTokenizer(c), UMM(c)
    for name, m in (('tokenizer', tok), ('umm', umm)):
        m.load_state_dict({k[len(name) + 1:]: t for k, t in tensors.items() if k.startswith(name + '.')})
        m.to(device).eval()
    return tok, umm, text, tensors, meta
