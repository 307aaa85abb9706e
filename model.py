"""The policy: a patch codebook that turns pictures into tokens, one causal transformer for words and codes, one sampler.

A picture is cut into patches; each patch becomes the number of the nearest entry of a k-means codebook, and a table
look-up turns numbers back into pixels. Words and codes then share one vocabulary, one transformer and one output head,
so that drawing, captioning and answering are all "choose the next token", and one loss can align them all.

  (M1) code(x) = argmin_k |x - c_k|^2                              picture -> tokens
  (M2) c_k     = mean of the patches whose code is k               k-means; an entry without patches is re-seeded
  (M3) norm(x) = x / sqrt(mean(x^2) + eps) * g                     RMSNorm, before each sub-layer
  (M4) rotate((a, b), t) = (a cos - b sin, a sin + b cos), angle t*w   rotary positions: q.k depends on distance only
  (M5) p(id) = softmax(h . E / temperature) over lo <= id < hi     tied head; what is sampled is what is scored
  (M6) id = argmax p(id) / e,  e = -log u,  u ~ Uniform(0, 1)      sampling: e is exponential; it does not depend on p,
                                                                   so two models can be given the same noise
  (M7) guided logits = (1+s) * conditional - s * unconditional     classifier-free guidance, evaluation only

Symbols: N sequences, L positions, C width, H heads, D = C/H, V vocabulary, P patches, K codes.
Left out: dropout, biases, a second network for pictures (a trained autoencoder did worse after 100x the time).

    $ python model.py       # PSNR of the codebook, parameters, sampled tokens a second; 5 seconds
"""

import contextlib
import hashlib
import itertools
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors import torch as safetensors
from torch import nn

from data import EOS, PAD, SPECIAL, THINK, Vocabulary, World

# ---------------------------------------------------------------- where to run


def pick_device(name="auto"):
    """"auto", "cuda", "mps" or "cpu" -> (torch.device, dtype of the matrix products, why). ValueError if it is absent.

    bfloat16 autocast on CUDA, float32 elsewhere; log-probs and losses are float32 everywhere."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not there.get(name):
        raise ValueError(f"--device {name}: not available here; use one of auto, {', '.join(d for d, ok in there.items() if ok)}")
    device = name if name != "auto" else next(d for d, ok in there.items() if ok)
    reason = "as asked" if name != "auto" else "the fastest device found"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew, for long, for every new shape; ours are many
    return torch.device(device), dtype, f"{device} ({reason}), {str(dtype)[6:]} matrix products"


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def matmul(a, b):
    """a @ b for two matrices; bf16 factors give a float32 product, which is also summed in float32. All logits are made
    with it, in sampling, scoring and loss: what is sampled is what is scored."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.bfloat16 and a.is_cuda and not torch.is_grad_enabled():  # out_dtype has no derivative
            return torch.mm(a, b, out_dtype=torch.float32)
        return at_least_float32(a) @ at_least_float32(b)


def add_matmul(total, a, b):
    """total += matmul(a, b) without a second tensor of that size. No gradient."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(at_least_float32(a), at_least_float32(b))


# ---------------------------------------------------------------- files that are whole or not there


@contextlib.contextmanager
def atomically(path):
    """Where to write what shall stand at `path`: a file beside it, flushed, then renamed. A reader finds all of it or what was
    there before, whenever this process dies; a failure leaves nothing behind and is a ValueError."""
    path = Path(path)
    plain = path.is_file() or not path.exists()  # else a pipe or a device, which cannot be replaced
    new = path.with_name(f"writing-{path.name}") if plain else path
    try:
        yield new
        if plain:
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        found = error.strerror or error
        raise ValueError(f"{path}: cannot be written ({found}); make room, get permission, or name another place") from error
    finally:
        if plain:
            new.unlink(missing_ok=True)


def checksum(tensors):
    """SHA-256 of a dict of tensors: names, types, shapes and bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_atomically(tensors, path):
    """Write a dict of tensors to a .safetensors file with its checksum. ValueError where that fails."""
    tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    with atomically(path) as new:
        new.write_bytes(safetensors.save(tensors, {"sha256": checksum(tensors)}))


def read_tensors(path):
    """The dict of tensors in a .safetensors file. ValueError unless they are the ones that were written there; a file from
    elsewhere, without a checksum, is taken as it is."""
    try:
        with safe_open(str(path), "pt") as file:
            # clones: nothing may keep the file open, or Windows will not rename it
            tensors, stored = {k: file.get_tensor(k).clone() for k in file.keys()}, (file.metadata() or {}).get("sha256")
    except Exception as error:  # safetensors and the operating system raise many kinds
        raise ValueError(f"{path} cannot be used ({' '.join(str(error).split())[:200]})") from error
    if stored and stored != checksum(tensors):
        raise ValueError(f"{path} cannot be used (its checksum is not that of what was written: it is damaged)")
    return tensors


# ---------------------------------------------------------------- pictures <-> codes


class Codebook:
    """K patches of p x p pixels. `entries` is (K, 3*p*p) float32 in [0, 255]; `side` is the picture's width in patches."""

    def __init__(self, entries, patch, size=32):
        self.entries, self.patch, self.side = entries, patch, size // patch

    def cut(self, pictures):
        """(N, S, S, 3) uint8 -> (N, P, 3*p*p) float32, row by row."""
        n, p, s = len(pictures), self.patch, self.side
        x = torch.as_tensor(pictures).reshape(n, s, p, s, p, 3).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, s * s, p * p * 3).float()

    def encode(self, pictures):
        """(N, S, S, 3) uint8 -> codes (N, P) int64."""
        x = self.cut(pictures)
        entries = self.entries.to(x.device)
        distance = entries.square().sum(1) - 2 * matmul(x.reshape(-1, x.shape[-1]), entries.T)  # |x|^2 is the same for all k
        return distance.argmin(1).reshape(x.shape[:2])  # (M1)

    def decode(self, codes):
        """codes (N, P) -> pictures (N, S, S, 3) uint8."""
        s, p = self.side, self.patch
        x = self.entries.to(codes.device)[codes].reshape(-1, s, s, p, p, 3).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, s * p, s * p, 3).round().byte()

    def psnr(self, pictures):
        """Peak signal-to-noise ratio in dB of pictures after encoding and decoding; infinite when nothing is lost."""
        error = (self.decode(self.encode(pictures)).float() - torch.as_tensor(pictures).float()).square().mean()
        return float(10 * torch.log10(255**2 / error))

    @staticmethod
    def fit(pictures, n_codes, patch, iterations=12, seed=0):
        """k-means over all patches of the pictures, started from data. If there are no more distinct patches than
        n_codes, they are the codebook and it is lossless. Returns a Codebook of at most n_codes entries, all in use."""
        book = Codebook(None, patch, pictures.shape[1])
        x, weight = np.unique(book.cut(pictures).reshape(-1, 3 * patch * patch).byte().numpy(), axis=0, return_counts=True)
        x, weight = torch.from_numpy(x).float(), torch.from_numpy(weight).float()
        start = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n_codes]
        book.entries = x[start.sort().values]
        for _ in range(iterations if len(x) > n_codes else 0):
            code = torch.cat([torch.cdist(part, book.entries).argmin(1) for part in x.split(8192)])
            total = torch.zeros(n_codes).index_add_(0, code, weight)
            centre = torch.zeros_like(book.entries).index_add_(0, code, x * weight[:, None])
            book.entries = centre / total.clamp(min=1)[:, None]  # (M2)
            far = (x - book.entries[code]).square().sum(1).topk(int((total == 0).sum())).indices
            book.entries[total == 0] = x[far]  # an entry that lost its patches takes one of the worst explained
        return book


# ---------------------------------------------------------------- the transformer


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.gain, eps=1e-6)  # (M3)


def rotation(positions, width):
    """Positions (L,), or (N, L) where rows differ -> what `rotate` multiplies x and swapped x by, each (..., 1, L, width)."""
    half = width // 2
    frequency = 100.0 ** (-torch.arange(half, device=positions.device) / half)  # sequences are short: 100, not 10,000
    angle = (positions[..., None] * frequency).unsqueeze(-3)  # the same for all heads
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, turn):
    """Rotary embedding of x (..., N, H, L, D), whose halves are a and b, by a rotation of width D."""
    cos, sin = turn
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # (M4)


class Block(nn.Module):
    """One pre-norm layer: attention, then a two-layer MLP. Used causally by the policy, both ways by the reward's CLIP."""

    def __init__(self, width, heads, reach=None):
        """reach: the largest attention logit, so that exp(reach) is the strongest preference of one position over
        another; None is sqrt(D), which is little where heads are small."""
        super().__init__()
        self.heads = heads
        self.scale = (width / heads) ** -0.5 if reach is None else reach * heads / width
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x, turn=None, causal=True, mask=None, cache=None, at=None):
        """x (N, L, C), its queries and keys turned by a `rotation`. mask, broadcast to (N, H, L, keys), replaces `causal`: 0 for the
        keys that may be looked at and -inf for the others; or, without a cache, bool. cache: (keys, values), each (N, H, keys, D):
        written at the columns `at` (L,), and then read whole."""
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # queries and keys of equal length: attention logits are bounded and cannot blow up at high learning rates
        qk, v = F.layer_norm(qkv[:2], qkv.shape[-1:]), qkv[2]
        q, k = (qk if turn is None else rotate(qk, turn)).to(v.dtype)
        if cache is not None:
            for store, new in zip(cache, (k, v)):
                store.index_copy_(2, at, new)
            k, v = cache
        if cache is not None and mask is not None and length <= 8 and x.device.type == "cpu":  # twice as fast for so few queries
            y = (self.scale * q @ k.mT + mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=self.scale)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass
class ModelConfig:
    vocab: int  # words and codes
    side: int  # patches in a row of a picture
    width: int = 96
    layers: int = 4
    heads: int = 4


class Transformer(nn.Module):
    """tokens (N, L), patch (N, L) -> hidden states (N, L, C); `head` is the tied weight (V, C) that scores the next token."""

    def __init__(self, config):
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} must be a multiple of 2 x heads = {2 * config.heads}")
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.row, self.column = nn.Embedding(config.side, config.width), nn.Embedding(config.side, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the two matrices that write into the residual stream start at zero: every layer an identity
                nn.init.zeros_(p) if name.endswith(("out.weight", "down.weight")) else nn.init.normal_(p, std=config.width**-0.5)

    @property
    def head(self):
        return self.embed.weight

    def forward(self, tokens, patch, positions=None, cache=None, at=None, mask=None):
        """positions: (L,) or (N, L); cache, at and mask: see Block. positions and at are 0 to L-1 if None."""
        x = self.embed(tokens)
        places = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)  # (P, C)
        x = x + F.embedding(patch % (len(places) + 1), F.pad(places, (0, 0, 0, 1)))  # -1 is the last row, of zeros
        step = torch.arange(tokens.shape[1], device=tokens.device)
        turn = rotation(step if positions is None else positions, self.config.width // self.config.heads)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, cache=cache and cache[i], at=step if at is None else at, mask=mask)
        return self.norm(x).to(self.compute_dtype)

    def new_cache(self, n, length):
        """Room for the keys and values of n sequences: a list of (keys, values), each (n, H, length, D), per layer."""
        c = self.config
        make = lambda: torch.zeros(n, c.heads, length, c.width // c.heads, device=self.head.device, dtype=self.compute_dtype)  # noqa: E731
        return [(make(), make()) for _ in self.blocks]

    @property
    def compute_dtype(self):
        """bfloat16 under autocast, else the weights' own: of hidden states, and so of every product with the head."""
        device = self.head.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.dtype


# ---------------------------------------------------------------- a prompt is read once, by all its candidates


def first_choices(batch):
    """Where the prompts end: (B,) position of each row's first chosen token; the length of the longest prompt; and that of the
    longest tail, which is everything from the first to the last chosen token."""
    chosen = batch.tokens < 0
    start, end = chosen.int().argmax(1), chosen.shape[1] - chosen.flip(1).int().argmax(1)
    return start, *torch.stack((start.max(), (end - start).max())).tolist()


def tails(x, start, length, fill=PAD):
    """(N, L) -> (N, length): every row from its own start on, with `fill` beyond its right end."""
    return F.pad(x, (0, length), value=fill).gather(1, start[:, None] + torch.arange(length, device=x.device))


class Prompted:
    """B templates whose prompts a model has read, once, and R = B*share rows that go on from there, Q tokens at a time: the next Q
    of one candidate, or the next one of each of Q candidates. These share the keys and values of their prompt, and their own
    stand in turns behind it (p p p a b a b a b for two); the mask hides b's from a."""

    def __init__(self, model, batch, share, width, steps=1, fixed=False):
        """width: Q; steps: how often `read` will be called. fixed: it always works on all of the cache, on the same memory
        and with numbers that stand in tensors, so that a GPU can record it; else on the part that is filled."""
        start, prompt, _ = first_choices(batch)
        room = width * steps
        room += -(prompt + room) % 8 if fixed else 0  # a GPU's attention would pad the mask to that in every layer
        cache = model.new_cache(len(start), prompt)
        hidden = model(batch.tokens[:, :prompt].clamp(min=0), batch.patch[:, :prompt], cache=cache)
        self.model, self.start, self.fixed = model, start, fixed
        self.state = hidden[torch.arange(len(start), device=start.device), start - 1]  # (B, C), predicts the first chosen token
        self.cache = [tuple(F.pad(x.repeat_interleave(share, 0), (0, 0, 0, room)) for x in layer) for layer in cache]
        self.filled = torch.full((1,), prompt, device=start.device) if fixed else prompt
        given = torch.arange(prompt, device=start.device) < start.repeat_interleave(share)[:, None]  # shorter prompts end earlier
        self.mask = F.pad(self.hide(given)[:, None, None].expand(-1, 1, width, -1), (0, room), value=-torch.inf)  # (R, 1, Q, columns)

    def hide(self, seen):
        """bool -> what attention adds to its logits: 0 where it is true, else -inf."""
        return torch.zeros_like(seen, dtype=self.model.compute_dtype).masked_fill_(~seen, -torch.inf)

    def read(self, tokens, patch, positions, looks):
        """Tokens, their patch numbers and positions, (R, Q) each -> their states (R, Q, C). looks (R or 1, Q, Q) bool: which of
        these tokens each of the Q, and what stands in its place later, may look at."""
        at = self.filled + torch.arange(tokens.shape[1], device=tokens.device)
        self.mask.index_copy_(3, at, self.hide(looks)[:, None].expand(len(tokens), -1, -1, -1))
        self.filled += tokens.shape[1]
        end = None if self.fixed else self.filled
        return self.model(tokens, patch, positions, [tuple(x[:, :, :end] for x in layer) for layer in self.cache], at, self.mask[..., :end])


def completion_states(model, batch, tail, patch):
    """B templates and the tails (N, T) of their N/B candidates each -> (N, T, C): the states that predict the tails."""
    group, step = len(tail) // len(batch.tokens), torch.arange(tail.shape[1] - 1, device=tail.device)
    prompted = Prompted(model, batch, group, len(step))
    first, start = (x.repeat_interleave(group, 0)[:, None] for x in (prompted.state, prompted.start))
    if not len(step):
        return first
    causal = (step <= step[:, None])[None]
    return torch.cat((first, prompted.read(tail[:, :-1], patch[:, :-1], start + step, causal)), 1)


# ---------------------------------------------------------------- sampling: fill a template


def recorded(step, device):
    """step(), to be called again and again on the same tensors. On a GPU its kernels are recorded at the second call, and
    launched all at once from then on (a CUDA graph): a token takes hundreds of them, of microseconds each."""
    if device.type != "cuda":
        return step
    calls, graph = itertools.count(), torch.cuda.CUDAGraph()

    def call():
        """Do the step: by itself at first, then by launching what was recorded."""
        number = next(calls)
        if number == 0:
            return step()  # what happens once only, such as choosing algorithms, happens here
        if number == 1:
            with torch.cuda.graph(graph):
                step()  # recorded, not done
        graph.replay()

    return call


@torch.no_grad()
def sample(model, batch, vocab, generator=None, temperature=1.0, guidance=0.0, group=1, fixed=None):
    """Fill the chosen positions of a Batch of B templates, `group` times each; returns tokens (B*group, L) int64 with
    nothing left at -1, the candidates of a template one after the other.

    A free text ends at its first <eos>: what follows it in its span becomes <pad>, which nothing after it sees.
    temperature 0 takes the most likely token. guidance > 0 needs a model that was trained with dropped prompts.
    fixed: see Prompted; None means on a GPU.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    start, _, length = first_choices(batch)
    device = batch.tokens.device
    fixed = device.type == "cuda" if fixed is None else fixed
    share = lambda x: x.repeat_interleave(group, 0)  # noqa: E731
    cut = lambda x, fill: share(tails(x, start, length, fill))  # noqa: E731
    tail, patch = cut(batch.tokens, PAD), cut(batch.patch, -1)
    lo, hi = cut(batch.lo, 0), cut(batch.hi, vocab.size)
    views = [batch]
    if guidance:  # the same templates, told nothing
        views.append(batch.blank(torch.ones_like(start, dtype=torch.bool)))
    beside = math.gcd(group, 8)  # candidates in a row: what they read of each other's keys is for nothing, and grows with them
    runs = [Prompted(model, view, group // beside, beside, length - 1, fixed) for view in views]
    given, free = [share(tails(view.tokens, start, length)) for view in views], tail < 0
    states, head, ids = [share(run.state) for run in runs], model.head.T.to(runs[0].state.dtype), torch.arange(vocab.size, device=device)
    noise, ended = torch.empty(len(tail), vocab.size, device=device), torch.zeros(len(tail), 1, dtype=torch.bool, device=device)
    position = share(start)[:, None]
    t = torch.zeros(1, dtype=torch.long, device=device)
    column = lambda x: x.index_select(1, t)  # (N, 1): what a table has for this step  # noqa: E731

    def choose():
        """The next token, from the states that predict it; what the template gives stays."""
        logits = [matmul(state, head) for state in states]
        logits = logits[0] if not guidance else (1 + guidance) * logits[0] - guidance * logits[1]  # (M7)
        logits.masked_fill_((ids < column(lo)) | (ids >= column(hi)), -torch.inf)
        if temperature:
            logits = torch.softmax(logits / temperature, -1) / noise.log_().neg_()  # (M5)
        chosen = column(free)
        ended.logical_and_(chosen)  # a given token starts a new span
        token = logits.argmax(-1, keepdim=True).masked_fill(ended, PAD)  # (M6)
        tail.index_copy_(1, t, torch.where(chosen, token, column(tail)))

    def step():
        """Read the token that was chosen, and choose the next."""
        chosen, token, real = column(free), column(tail), ~ended
        ended.logical_or_(chosen & (token == EOS))
        rows = lambda x: x.view(-1, beside)  # noqa: E731
        where = rows(column(patch)), rows(position), torch.diag_embed(rows(real))  # each looks at itself, not at its neighbours
        for run, state, view in zip(runs, states, given):
            state.copy_(run.read(rows(torch.where(chosen, token, column(view))), *where).flatten(0, 1))
        position.add_(real)
        t.add_(1)
        choose()

    once_more = recorded(step, device) if length > 8 else step  # recording costs as much as a few steps
    last_span = device.type == "cpu" and bool((tail <= PAD).all())  # nothing but choices, then padding; elsewhere asking costs more
    for i in range(length):
        if temperature:
            noise.uniform_(generator=generator)  # on a CPU 3 times as fast as exponential_
        once_more() if i else choose()
        if last_span and bool((ended | (column(tail) == EOS)).all()):
            break  # all texts have ended
    tail.clamp_(min=PAD)
    room = F.pad(share(batch.tokens), (0, length))
    return room.scatter(1, share(start)[:, None] + torch.arange(length, device=device), tail)[:, : batch.tokens.shape[1]]


def completion_mask(batch, tokens):
    """(N, L) bool: the positions that the policy chose in filled templates (after a text's <eos> nothing was chosen)."""
    return (batch.tokens < 0) & (tokens != PAD)


def decode(vocab, codebook, task, batch, tokens):
    """Filled templates of one task -> what was chosen in each, a list: pictures (S, S, 3) uint8; for a story its three, (3, S, S, 3);
    texts; for a plan (text, picture)."""
    chosen, pictures = completion_mask(batch, tokens), []
    drawn = chosen & (batch.patch >= 0)
    if drawn.any():
        pictures = codebook.decode(tokens[drawn].view(-1, vocab.n_patches) - vocab.n_text).cpu().numpy()
        pictures = list(pictures.reshape(len(tokens), -1, *pictures.shape[1:]) if task == "story" else pictures)
    if task in ("draw", "story"):
        return pictures
    said = (chosen & ~drawn) | (tokens == SPECIAL.index(THINK))  # where a task has to think, that is given
    texts = [vocab.decode(row[keep].tolist()) for row, keep in zip(tokens.cpu(), said.cpu())]
    return list(zip(texts, pictures)) if task == "plan" else texts


# ---------------------------------------------------------------- try it


def main():
    """A codebook, an untrained model, and how fast it samples."""
    rng, world = random.Random(0), World()
    examples = [world.example(rng, "draw") for _ in range(512)]
    pictures = np.stack([e.picture for e in examples])
    codebook = Codebook.fit(pictures, 1024, patch=8)
    vocab = Vocabulary.train([e.prompt for e in examples], len(codebook.entries), codebook.side**2)
    model = Transformer(ModelConfig(vocab.size, codebook.side))
    size = sum(p.numel() for p in model.parameters())
    print(f"codebook: {vocab.n_codes} entries, {codebook.psnr(pictures):.1f} dB · {size:,} parameters")
    for group in (1, 8):
        batch = vocab.batch(examples[::group], codebook.encode(pictures[::group]))
        start = time.perf_counter()
        tokens = sample(model, batch, vocab, torch.Generator().manual_seed(0), group=group)
        rate = int(completion_mask(batch.repeat(group), tokens).sum()) / (time.perf_counter() - start)
        print(f"{len(batch.tokens):3} prompts, {group} candidates each: {rate:,.0f} tokens a second")


if __name__ == "__main__":
    main()
