"""The policy: a codebook that turns pictures into tokens, one causal transformer, one sampler.

A picture is cut into patches, and each patch becomes the index of its nearest entry in a k-means
codebook; looking the entry up gives pixels again. Words and codes share one vocabulary, one
transformer and one output head, so drawing, captioning and answering are all "choose the next
token", and one loss can align them all.

  (M1) code(x) = argmin_k |x - c_k|^2                               picture -> tokens
  (M2) c_k     = mean of the patches whose code is k                k-means
  (M3) norm(x) = x / sqrt(mean(x^2) + eps) * g                      RMSNorm, before each sub-layer
  (M4) rotate((a, b), t) = (a cos - b sin, a sin + b cos), angle t*w       rotary positions
  (M5) p(id) = softmax(h . E / temperature) over first <= id < last        tied head
  (M6) id = argmax p(id) / e,  e = -log u,  u ~ Uniform(0, 1)       sampling: e is exponential noise

Sampling and scoring use the same distribution: (M5), with the same ids and temperature.

Symbols: B prompts, G candidates each, N = B*G rows, L columns, T columns from the first chosen
one on, C width, H heads, D = C/H, V vocabulary, P patches, K codes.
Left out: dropout, biases, a network for pictures (a trained autoencoder was worse, 100x slower).

    $ python model.py       # codebook, parameters, sampled tokens per second; 5 seconds
"""

import contextlib
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import torch as safetensors
from torch import nn

from data import EOS, PAD, Vocabulary, World, pictures_of

# ------------------------------------------------ device and precision


def pick_device(name="auto"):
    """(torch.device, dtype of matrix products, description) for "auto", "cuda", "mps" or "cpu".

    bfloat16 autocast on CUDA, float32 elsewhere; log-probs and losses are float32 everywhere.
    ValueError if the device is not available."""
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True,
    }
    if name != "auto" and not available.get(name):
        legal = ", ".join(["auto", *(device for device, ok in available.items() if ok)])
        raise ValueError(f"--device {name}: not available here; use one of {legal}")
    reason = "as requested" if name != "auto" else "the fastest device found"
    device = name if name != "auto" else next(d for d, ok in available.items() if ok)
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    return torch.device(device), dtype, f"{device} ({reason}), {str(dtype)[6:]} matrix products"


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def matmul(a, b):
    """a @ b for two matrices; bfloat16 inputs are summed in float32 and give float32. All logits
    are computed here: in sampling, scoring and the loss."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.bfloat16 and a.is_cuda and not torch.is_grad_enabled():
            return torch.mm(a, b, out_dtype=torch.float32)  # has no derivative
        return at_least_float32(a) @ at_least_float32(b)


def add_matmul(total, a, b):
    """total += matmul(a, b) without a second tensor of that size. No gradient."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(at_least_float32(a), at_least_float32(b))


# ------------------------------------------------ files that are whole or absent


@contextlib.contextmanager
def atomically(path):
    """Yield a temporary path beside `path`; what is written there is flushed, then renamed.
    Whenever this process dies, a reader finds either the old file or the whole new one.
    ValueError if writing fails."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path  # write to a pipe or a device, but never replace it
        return
    new = path.with_name(f"writing-{path.name}")
    try:
        yield new
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path}: cannot be written ({reason})") from error
    finally:
        new.unlink(missing_ok=True)


def save_tensors(tensors, path):
    """Write a dict of tensors to a .safetensors file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomically(path) as new:
        new.write_bytes(safetensors.save(tensors))


def load_tensors(path):
    """The dict of tensors in a .safetensors file. A one-line ValueError if it cannot be read."""
    try:
        return safetensors.load(Path(path).read_bytes())
    except Exception as error:  # safetensors and the operating system raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be read ({reason})") from error


# ------------------------------------------------ pictures <-> codes


class Codebook:
    """K patches of p x p pixels. entries: (K, 3*p*p) float32 in [0, 255]; side: patches per row."""

    def __init__(self, entries, patch, size=32):
        self.entries, self.patch, self.side = entries, patch, size // patch

    def patchify(self, pictures):
        """(N, S, S, 3) uint8 -> (N, P, 3*p*p) float32, row by row."""
        n, p, s = len(pictures), self.patch, self.side
        x = torch.as_tensor(pictures).reshape(n, s, p, s, p, 3).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, s * s, p * p * 3).float()

    def encode(self, pictures):
        """(N, S, S, 3) uint8 -> codes (N, P) int64."""
        x = self.patchify(pictures)
        entries = self.entries.to(x.device)
        products = matmul(x.reshape(-1, x.shape[-1]), entries.T)
        distance = entries.square().sum(1) - 2 * products  # |x|^2 is the same for all k
        return distance.argmin(1).reshape(x.shape[:2])  # (M1)

    def decode(self, codes):
        """codes (N, P) -> pictures (N, S, S, 3) uint8."""
        s, p = self.side, self.patch
        x = self.entries.to(codes.device)[codes].reshape(-1, s, s, p, p, 3)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, s * p, s * p, 3).round().byte()

    def psnr(self, pictures):
        """Peak signal-to-noise ratio in dB after encoding and decoding; infinite if lossless."""
        error = self.decode(self.encode(pictures)).float() - torch.as_tensor(pictures).float()
        return float(10 * torch.log10(255**2 / error.square().mean()))

    @staticmethod
    def fit(pictures, n_codes, patch, iterations=12, seed=0):
        """A Codebook by k-means over all patches of the pictures: at most n_codes entries, all in
        use. If there are at most n_codes distinct patches, they are the codebook, which is then
        lossless."""
        book = Codebook(None, patch, pictures.shape[1])
        patches = book.patchify(pictures).reshape(-1, 3 * patch * patch).byte().numpy()
        patches, counts = np.unique(patches, axis=0, return_counts=True)
        x, weight = torch.from_numpy(patches).float(), torch.from_numpy(counts).float()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        book.entries = x[order[:n_codes].sort().values]
        for _ in range(iterations if len(x) > n_codes else 0):
            code = torch.cat([torch.cdist(part, book.entries).argmin(1) for part in x.split(8192)])
            total = torch.zeros(n_codes).index_add_(0, code, weight)
            sums = torch.zeros_like(book.entries).index_add_(0, code, x * weight[:, None])
            book.entries = sums / total.clamp(min=1)[:, None]  # (M2)
            unused = total == 0  # an entry without patches moves to a badly explained one
            far = (x - book.entries[code]).square().sum(1).topk(int(unused.sum())).indices
            book.entries[unused] = x[far]
        return book


# ------------------------------------------------ the transformer


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.gain, eps=1e-6)  # (M3)


def rotation(positions, width):
    """Positions (L,) -> the factors of x and of swapped x in `rotate`, (L, width) each."""
    half = width // 2
    frequency = 100.0 ** (-torch.arange(half, device=positions.device) / half)  # rows are short
    angle = positions[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, turn):
    """Rotary embedding (M4) of x (..., L, D), whose two halves are a and b."""
    cos, sin = turn
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # (M4)


class Block(nn.Module):
    """One pre-norm layer: attention, then an MLP. Causal in the policy, bidirectional in rewards.

    reach: the largest attention logit, which limits how far one position can outweigh the others.
    None means sqrt(D), which is low for small heads."""

    def __init__(self, width, heads, reach=None):
        super().__init__()
        self.heads = heads
        self.scale = (width / heads) ** -0.5 if reach is None else reach * heads / width
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, turn=None, causal=True, mask=None, cache=None, start=0):
        """x (N, L, C) -> the same shape. turn: the `rotation` of queries and keys. mask: True
        where to attend, broadcasts to (N, H, L, keys) and replaces `causal`. cache: (keys, values)
        of this layer, (N, H, columns, D) each; columns before `start` are read, and the L columns
        of x are written."""
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # QK-norm: with queries and keys of equal length, attention logits stay bounded.
        qk, v = F.layer_norm(qkv[:2], qkv.shape[-1:]), qkv[2]
        q, k = (qk if turn is None else rotate(qk, turn)).to(v.dtype)
        if cache is not None:
            end = start + length
            for columns, new in zip(cache, (k, v)):
                columns[:, :, start:end] = new
            k, v = (columns[:, :, :end] for columns in cache)
        if start and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        if length == 1 or mask is not None:
            causal = False  # a single query sees all keys; a mask replaces `causal`
        if length == 1 and x.device.type == "cpu":  # twice as fast for one query
            y = (self.scale * q @ k.mT).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass
class ModelConfig:
    vocab: int  # number of words and codes
    side: int  # patches per row of a picture
    width: int = 96
    layers: int = 4
    heads: int = 4
    longest: int = 512  # most columns in a row of tokens


class Transformer(nn.Module):
    """Tokens (N, L) -> hidden states (N, L, C). `head` (V, C), the tied weight, gives logits."""

    def __init__(self, config):
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width}: expected a multiple of {2 * config.heads}")
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.row = nn.Embedding(config.side, config.width)
        self.column = nn.Embedding(config.side, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        turns = rotation(torch.arange(config.longest), config.width // config.heads)
        self.register_buffer("turns", torch.stack(turns), persistent=False)
        self.layer = Block.__call__  # or a compiled version, for rows read whole
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(p)  # these write to the residual stream: layers start as identity
            elif p.dim() == 2:
                nn.init.normal_(p, std=config.width**-0.5)

    @property
    def head(self):
        return self.embed.weight

    @property
    def dtype(self):
        """The dtype of keys, values and hidden states: that of autocast where it is on."""
        device = self.head.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.head.dtype

    def forward(self, tokens, patch, cache=None, start=0, mask=None):
        """tokens (N, L), patch (L,): which patch of a picture a column is, -1 in a text -> states
        (N, L, C). With a `new_cache`, tokens are columns start to start + L. mask: see Block."""
        places = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)  # (P, C)
        places = F.pad(places, (0, 0, 0, 1))  # patch -1 is the last row, of zeros
        x = self.embed(tokens) + F.embedding(patch % len(places), places)
        turn = self.turns[:, start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            if cache is None:
                x = self.layer(block, x, turn, True, mask)
            else:
                x = block(x, turn, True, mask, cache[i], start)
        return self.norm(x).to(self.dtype)

    def new_cache(self, n, columns):
        """An empty cache for n rows: (keys, values) per layer, (n, H, columns, D) each."""
        c, cache = self.config, []
        empty = torch.zeros(n, c.heads, columns, c.width // c.heads, device=self.head.device)
        for _ in self.blocks:
            cache.append([empty.to(self.dtype, copy=True), empty.to(self.dtype, copy=True)])
        return cache


# ------------------------------------------------ rows: sample them, then score them

BATCH = 512, 8192  # rows at once, without gradients: on a CPU, on a GPU


def read_prompts(model, layout, prompts, group):
    """Prefill: read each of B prompts once for all its G candidates. Returns the states (N, C)
    that predict the first chosen token, and a cache with room for whole rows."""
    cache = model.new_cache(len(prompts), layout.start)
    hidden = model(prompts[:, : layout.start], layout.patch[: layout.start], cache)[:, -1]
    room = layout.length - layout.start
    for i, layer in enumerate(cache):
        cache[i] = [F.pad(x.repeat_interleave(group, 0), (0, 0, 0, room)) for x in layer]
    return hidden.repeat_interleave(group, 0), cache


@torch.no_grad()
def sample(model, layout, prompts, group=1, generator=None, temperature=1.0):
    """Fill the chosen columns of B prompts, G times each: (B, L) -> tokens (N, L) int64.

    The chosen columns of `prompts` are ignored. Candidates of one prompt are consecutive rows.
    Texts continue with <pad> after <eos>. temperature 0 takes the likeliest token; ValueError
    below 0."""
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature}: expected 0 or more")
    hidden, cache = read_prompts(model, layout, prompts, group)
    tokens = prompts.masked_fill(layout.chosen, PAD).repeat_interleave(group, 0)
    head = model.head[layout.first : layout.last].T.to(hidden.dtype).contiguous()
    noise = torch.empty(len(tokens), head.shape[1], device=tokens.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    read = layout.start
    for column in layout.columns:
        if column > read:
            hidden = model(tokens[:, read:column], layout.patch[read:column], cache, read)[:, -1]
            read = column
        scores = matmul(hidden, head)
        if temperature:
            noise.uniform_(generator=generator)  # on a CPU, three times as fast as exponential_
            scores = (scores / temperature).softmax(-1) / noise.log_().neg_()  # (M5)
        token = scores.argmax(-1) + layout.first  # (M6)
        tokens[:, column] = token.masked_fill(ended, PAD)
        ended |= token == EOS
        if not tokens.is_cuda and ended.all():  # on a GPU, this check would cost a sync
            break
    return tokens


def sample_recorded(graphs, model, layout, prompts, group, generator, temperature):
    """As `sample`, on a GPU: the first call with a shape records a CUDA graph in the dict
    `graphs`, later calls replay it: one launch instead of thousands. The weights of `model` must
    stay at the same addresses, as optimizers leave them. Randomness comes from the seed of the
    generator, not from its state: pass a fresh one each time."""
    key = id(model), layout.task, prompts.shape, group, temperature
    if key not in graphs:
        fixed, chance, side = prompts.clone(), torch.Generator(prompts.device), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: one-time work, such as choosing algorithms
            sample(model, layout, fixed, group, chance, temperature)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(chance)
        torch.clear_autocast_cache()  # the graph must cast the weights anew: they change
        with torch.cuda.graph(graph):
            tokens = sample(model, layout, fixed, group, chance, temperature)
        torch.clear_autocast_cache()
        graphs[key] = graph, fixed, chance, tokens
    graph, fixed, chance, tokens = graphs[key]
    fixed.copy_(prompts)
    chance.manual_seed(generator.initial_seed())
    graph.replay()
    return tokens.clone()


def completion(model, layout, tokens, group=1):
    """What a loss needs of rows (N, L), where each prompt repeats `group` times.

    Returns the states (N, T, C) that predict the T columns from the first chosen one on; the
    targets (N, T), counted from the first allowed id; and the completion mask (N, T), True where
    the policy chose a token other than <pad>. A CPU reads a prompt once per group and drops
    trailing columns of <pad>; a GPU reads whole rows, so that shapes never change."""
    start, end = layout.start, layout.length
    if not tokens.is_cuda:
        end = max(int((tokens != PAD).any(0).nonzero().max()) + 1, start + 1)
    if group == 1 or tokens.is_cuda:
        states = model(tokens[:, : end - 1], layout.patch[: end - 1])[:, start - 1 :]
    else:
        hidden, cache = read_prompts(model, layout, tokens[::group], group)
        states = hidden[:, None]
        if start < end - 1:
            rest = model(tokens[:, start : end - 1], layout.patch[start : end - 1], cache, start)
            states = torch.cat((states, rest), 1)
    written = tokens[:, start:end]
    mask = layout.chosen[start:end] & (written != PAD)
    return states, (written - layout.first).clamp(min=0), mask


def allowed_head(model, layout):
    """The head's rows for ids that may be chosen, words or codes: (ids, C)."""
    return model.head[layout.first : layout.last]


def outputs(layout, tokens, vocab, codebook):
    """Decode the chosen columns of rows (N, L): pictures (N, n, S, S, 3) uint8, or N texts."""
    chosen = tokens[:, layout.index]
    if layout.draws:
        codes = (chosen - vocab.n_text).reshape(-1, vocab.n_patches)
        pictures = codebook.decode(codes).cpu().numpy()
        return pictures.reshape(len(tokens), -1, *pictures.shape[1:])
    return [vocab.decode(ids) for ids in chosen.tolist()]


# ------------------------------------------------ try it


def main():
    """Fit a codebook, make an untrained model, and time its sampling."""
    rng, world = random.Random(0), World()
    examples = [world.example(rng, "draw") for _ in range(512)]
    pictures = pictures_of(examples)
    codebook = Codebook.fit(pictures, 1024, patch=8)
    vocab = Vocabulary.build([e.prompt for e in examples], len(codebook.entries), codebook.side**2)
    model = Transformer(ModelConfig(vocab.size, codebook.side))
    size = sum(p.numel() for p in model.parameters())
    print(f"codebook: {vocab.n_codes} entries, {codebook.psnr(pictures):.1f} dB")
    print(f"transformer: {size:,} parameters")
    layout, rows = vocab.layout("draw"), vocab.rows("draw", examples, codebook.encode(pictures))
    for group in (1, 8):
        start = time.perf_counter()
        tokens = sample(model, layout, rows[::group], group, torch.Generator().manual_seed(0))
        rate = len(tokens) * len(layout.columns) / (time.perf_counter() - start)
        print(f"{len(tokens) // group} prompts x {group} candidates: {rate:,.0f} tokens per second")


if __name__ == "__main__":
    main()
