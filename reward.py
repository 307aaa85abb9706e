"""Rewards: what makes one candidate better than another, as numbers that a policy can be trained on.

A CLIP-like pair of small encoders learns from noisy (picture, caption) pairs which picture goes with which words. Its
score is turned into a probability that saturates: does this picture fit its prompt better than the prompt's own small
edits ("a red circle" against "a red square", "a blue circle", ...)? Answers are simply compared with the key.

  (R1) s(x, c) = 1/2 mean_w max_p <w, p> + 1/2 mean_p max_w <p, w>     similarity of picture x and text c: every word w
                  looks for its patch p and every patch for its word (late interaction, as in FILIP, arXiv 2111.07783)
  (R2) L = 1/2 CE(rows of a*s) + 1/2 CE(columns of a*s)                symmetric InfoNCE, a = exp(learned log-scale);
                  equal captions are positives of each other; each row has false edits of its own caption as
                  further negatives (NegCLIP, arXiv 2210.01936)
  (R3) r(x, c) = log [ exp(a s(x,c)) / sum_{c' in c + edits of c} exp(a s(x,c')) ]   the CLIP reward, in [FLOOR, 0]
  (R4) r = 1 if the answer is the key, else 0                          exact match
  (R5) agreement = share of (right, wrong) pairs in a group that the reward puts in order     validity, before RL

Why (R3) and not s itself: among correct candidates s still differs a little, for no reason that matters. (R3) is flat
near 0 when a picture is right, and keeps a slope when all candidates are wrong. Why (R1) and not one vector a picture:
prompts name three objects, training pairs one or two, and parts that are matched one by one should still add up. These
are reasons, not results: s itself and pooled vectors have not been compared with them here.

Symbols: N pictures, M texts, P patches, W words, D width of the shared space, B prompts, G group.
A learned preference reward joins by one more entry in the dict that `Rewards` returns.

    train.py --stage clip      # trains it and prints (R5) per kind of statement
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from data import END_THINK, PAD, THINK
from model import Block, RMSNorm

FLOOR = -6.0  # the CLIP reward is cut here: a hopeless candidate is not worse than a bad one


class CLIP(nn.Module):
    """Two small two-way transformers into one space. n_text: word ids; patch: pixels; side: picture width in pixels."""

    def __init__(self, n_text, patch=8, side=32, width=64, layers=2, heads=4, max_text=32):
        super().__init__()
        self.patch = patch
        self.pixels = nn.Linear(3 * patch * patch, width)
        self.place = nn.Parameter(torch.randn((side // patch) ** 2, width) * width**-0.5)
        self.words = nn.Embedding(n_text, width)
        self.image_blocks = nn.ModuleList(Block(width, heads, reach=12.0) for _ in range(layers))
        self.text_blocks = nn.ModuleList(Block(width, heads, reach=12.0) for _ in range(layers))
        self.image_norm, self.text_norm = RMSNorm(width), RMSNorm(width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def image(self, pictures):
        """(N, S, S, 3) uint8 -> one unit vector a patch, (N, P, D)."""
        x = torch.as_tensor(pictures, device=self.place.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = self.pixels(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)) + self.place
        positions = torch.zeros(x.shape[1], device=x.device)  # `place` says where; no rotation
        for block in self.image_blocks:
            x = block(x, positions, causal=False)
        return F.normalize(self.image_norm(x), dim=-1)

    def text(self, ids):
        """(M, W) int64, padded with <pad> -> one unit vector a word, (M, W, D); padding is exactly zero."""
        real = ids != PAD
        x, positions = self.words(ids), torch.arange(ids.shape[1], device=ids.device)
        for block in self.text_blocks:
            x = block(x, positions, causal=False, mask=real[:, None, None, :])
        return F.normalize(self.text_norm(x), dim=-1) * real[..., None]

    def similarity(self, image, text, pairs="nm"):
        """image (N, P, D), text (M, W, D) -> (N, M); or, with pairs="n", text (N, M, W, D): its own M texts a picture."""
        equation = "npd,mwd->nmpw" if pairs == "nm" else "npd,nmwd->nmpw"
        dots = torch.einsum(equation, image, text)
        real = text.detach().abs().sum(-1) > 0  # (..., M, W)
        by_word = (dots.amax(-2) * real).sum(-1) / real.sum(-1).clamp(min=1)
        by_patch = dots.masked_fill(~real[..., None, :], -torch.inf).amax(-1).mean(-1)
        return 0.5 * by_word + 0.5 * by_patch  # (R1)

    def embed_image(self, pictures):
        """(N, S, S, 3) uint8 -> (N, D), unit length."""
        return F.normalize(self.image(pictures).mean(1), dim=-1)


def text_ids(vocab, texts, device="cpu"):
    """A list of texts -> (M, W) int64 word ids, padded on the right."""
    rows = [vocab.encode(t) or [PAD] for t in texts]
    width = max(map(len, rows))
    return torch.tensor([r + [PAD] * (width - len(r)) for r in rows], device=device)


def clip_loss(clip, pictures, ids, edited):
    """Symmetric InfoNCE of N pictures and their N captions (N, W); `edited` (N*E, V) are E false edits of each caption.

    Returns the loss and the share of pictures whose own caption (or an equal one) scores highest among all N and its E edits."""
    image, scale = clip.image(pictures), clip.log_scale.exp()
    logits = scale * clip.similarity(image, clip.text(ids))  # (N, N)
    edits = scale * clip.similarity(image, clip.text(edited).unflatten(0, (len(ids), -1)), pairs="n")  # (N, E)
    right = logits.masked_fill((ids[:, None] != ids[None]).any(-1), -torch.inf)
    everything = torch.cat((logits, edits), 1)
    rows, columns = everything.logsumexp(1) - right.logsumexp(1), logits.logsumexp(0) - right.logsumexp(0)
    return 0.5 * rows.mean() + 0.5 * columns.mean(), (right.amax(1) >= everything.amax(1)).float().mean()  # (R2)


@torch.no_grad()
def match_logprob(clip, vocab, pictures, texts, edits):
    """How surely does each picture show its text and not an edit of it? In [FLOOR, 0].

    pictures (N, S, S, 3) uint8; texts: N strings; edits: N equally long lists of strings.
    N may be a multiple of len(texts): then each text has a group of consecutive pictures.
    """
    device, group = clip.place.device, len(pictures) // len(texts)
    row = {}  # the same texts come again and again: each is read once
    which = [[row.setdefault(t, len(row)) for t in (text, *others)] for text, others in zip(texts, edits)]
    words = clip.text(text_ids(vocab, row, device))[torch.tensor(which, device=device)].repeat_interleave(group, 0)  # (N, 1+E, W, D)
    logits = clip.log_scale.exp() * clip.similarity(clip.image(pictures), words, pairs="n")
    return F.log_softmax(logits, -1)[:, 0].clamp(min=FLOOR)  # (R3)


@torch.no_grad()
def clip_score(clip, vocab, pictures, texts):
    """The plain similarity of N pictures and N texts, (N,) in [-1, 1]: what is reported, by the second CLIP."""
    device = clip.place.device
    words = clip.text(text_ids(vocab, texts, device))
    return clip.similarity(clip.image(pictures), words[:, None], pairs="n")[:, 0]


def exact_match(text, key):
    """1.0 if the answer, which is the last word of either text, is the same; else 0.0.

    >>> exact_match("<think> red circle : top left </think> blue", "<think> whatever </think> blue")
    1.0
    """
    return float(bool(text.split()) and text.split()[-1] == key.split()[-1])  # (R4)


def well_formed(text):
    """1.0 for exactly one `<think> steps </think> answer` with steps that are not empty, else 0.0."""
    words = text.split()
    once = words.count(THINK) == words.count(END_THINK) == 1
    return float(once and words[0] == THINK and words[-2] == END_THINK and len(words) > 3)


class Rewards:
    """The rule rewards of every task. `weights` says how much each part counts; a missing one counts 0."""

    parts = {"draw": ("clip",), "caption": ("clip", "format"), "ask": ("exact",), "reason": ("exact", "format")}
    weights = {"clip": 1.0, "exact": 1.0, "format": 0.2}

    def __init__(self, clip, vocab, n_edits=12, n_caption_edits=32):
        self.clip, self.vocab, self.n_edits = clip, vocab, n_edits
        self.n_caption_edits = n_caption_edits  # more: a caption that misses an object must meet the one that names it

    def __call__(self, source, task, examples, outputs, rng):
        """Rewards of B*G outputs for B examples: dict part -> (B, G). outputs: pictures uint8, or texts."""
        group = len(outputs) // len(examples)
        if task == "draw":
            prompts = [e.prompt for e in examples]
            parts = {"clip": self._match(outputs, prompts, [source.negatives(rng, p, self.n_edits) for p in prompts])}
        elif task == "caption":
            edits = [source.negatives(rng, text, self.n_caption_edits) for text in outputs]
            good = torch.tensor([bool(e) for e in edits])  # a text that is no caption has no edits
            score = torch.full((len(outputs),), FLOOR)
            if good.any():
                keep = good.nonzero()[:, 0].tolist()
                pictures = torch.stack([torch.as_tensor(examples[i // group].picture) for i in keep])
                score[good] = self._match(pictures, [outputs[i] for i in keep], [edits[i] for i in keep]).cpu()
            parts = {"clip": score, "format": good.float()}
        else:
            keys = [e.answer for e in examples for _ in range(group)]
            parts = {"exact": torch.tensor([exact_match(text, key) for text, key in zip(outputs, keys)])}
            if task == "reason":
                parts["format"] = torch.tensor([well_formed(text) for text in outputs])
        return {name: value.float().cpu().view(len(examples), group) for name, value in parts.items()}

    def believes(self, sources, examples, rng, level=0.5):
        """(N,) bool: is the caption of each pre-training example likelier than its edits together, by (R3)? A caption that
        the reward takes for noise is not learned from again. Examples without a caption to judge pass."""
        kept = torch.ones(len(examples), dtype=torch.bool)
        texts = [e.prompt or e.answer if e.task in ("draw", "caption") else "" for e in examples]
        edits = [source.negatives(rng, text, self.n_edits) if text else [] for source, text in zip(sources, texts)]
        judged = [i for i, others in enumerate(edits) if others]
        if judged:
            pictures = torch.stack([torch.as_tensor(examples[i].picture) for i in judged])
            kept[judged] = (self._match(pictures, [texts[i] for i in judged], [edits[i] for i in judged]) > math.log(level)).cpu()
        return kept

    def _match(self, pictures, texts, edits):
        return match_logprob(self.clip, self.vocab, pictures, texts, edits)

    def total(self, parts):
        """The weighted sum of the parts, (B, G)."""
        return sum(self.weights.get(name, 0.0) * value for name, value in parts.items())


def agreement(rewards, right, wrong):
    """Does the reward rank the candidates of one prompt? rewards (B, G); right, wrong (B, G) bool -> the share of (right,
    wrong) pairs within groups with the higher reward on the right one, ties counting half; nan without such a pair.
    0.5 is a coin. With two classes this is also the within-group rank correlation: Somers' D = 2 * agreement - 1.

    >>> right = torch.tensor([[True, False, False]])
    >>> agreement(torch.tensor([[0.9, 0.2, 0.5]]), right, ~right)
    1.0
    """
    pair = right[:, :, None] & wrong[:, None, :]
    difference = rewards[:, :, None] - rewards[:, None, :]
    ordered = (difference > 0).float() + 0.5 * (difference == 0)
    return float(ordered[pair].mean())  # (R5)
