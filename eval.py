"""Evaluation: a judge that training never sees, metrics with intervals, comparisons, playground.

The judge reads a generated picture with plain NumPy: it assigns every pixel to the nearest colour
of the palette, compares the pixels of one colour in a cell with the outlines of the shapes, and
checks every statement of the prompt. On the generator's own pictures it is always right (a test
asserts it). It is not a reward and chooses no checkpoint; temperatures are chosen on validation
prompts and reported on test prompts.

  (E1) compose   = share of pictures with exactly the objects of the prompt, every statement true
  (E2) diversity = distinct right pictures / right pictures of a prompt; it falls as more are
       right; differ = share of pairs of right pictures that differ, which does not fall
  (E3) interval of a rate: Wilson, 95%         (E4) of a mean: mean +- 1.96 standard errors
  (E5) text NLL  = - sum of log-probs of held-out captions / their tokens, in nats per token
  (E6) retrieval: log p(c|x) - log mean_x' p(c|x') from the model as a captioner, plus
       log p(x|c) - log mean_c' p(x|c') as a drawer; does the true partner rank first of 64? Hard
       negatives, one edit away, are among them. Intervals are over blocks of 64 candidates
  (E7) frechet   = |m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of real and drawn pictures, embedded by
       the second CLIP. It is not the FID of the Inception network
  (E8) story     = share of stories whose frames are all right and consistent

A drawing result is a front: quality against diversity, over temperatures. One number at
temperature 1 says little: a low temperature alone makes a model look better, but duller.

    $ python eval.py --run runs/NAME                                  # the table
    $ python eval.py --run results/model --draw "a red circle left of a blue square"
    $ python eval.py --run results/model --ask "What color is the circle?" --image picture.png
    $ python eval.py --run results/model --caption picture.png
    $ python eval.py --compare runs/A runs/B ...                      # methods, over seeds
"""

import argparse
import functools
import itertools
import json
import math
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import nn

from data import (BACKGROUND, CELL, CELLS, COLORS, SHAPES, SIDE, SIZES, Example, Object, Vocabulary,
                  at_once, parse_caption, pictures_of, related, shape_mask)
from kernels import selected_logprobs
from model import (BATCH, Codebook, ModelConfig, Transformer, allowed_head, atomically, completion,
                   load_tensors, outputs, pick_device, sample)
from reward import CLIP, clip_score, drawing_logprobs, exact_match

# ------------------------------------------------ the judge: picture -> objects -> is it true?

PALETTE = np.array([BACKGROUND, *COLORS.values()], np.int16)
OUTLINES = {(shape, size): shape_mask(shape, SIZES[size]) for shape in SHAPES for size in SIZES}
SPECK, LIKENESS = 4, 0.9  # fewer pixels are noise; an outline must overlap by this much (IoU)


@functools.lru_cache(100_000)
def outline(pixels, size):
    """The best-matching (shape, size) for a cropped mask (bytes, shape), or (None, None)."""
    best, name, mask = LIKENESS, (None, None), np.frombuffer(pixels, bool).reshape(size)
    for candidate, shape in OUTLINES.items():
        h, w = (max(a, b) for a, b in zip(mask.shape, shape.shape))
        a, b = (np.pad(m, ((0, h - m.shape[0]), (0, w - m.shape[1]))) for m in (mask, shape))
        overlap = (a & b).sum() / (a | b).sum()
        if overlap >= best:
            best, name = overlap, candidate
    return name


def parse(pictures):
    """(N, S, S, 3) uint8 -> the Objects in each picture; malformed ones have shape and size None.
    All pixels of one colour in a cell are one object: true objects never leave their cell."""
    distance = np.abs(pictures[:, :, :, None].astype(np.int16) - PALETTE).sum(-1)
    labels = distance.argmin(-1).reshape(-1, 2, CELL, 2, CELL).transpose(0, 1, 3, 2, 4)
    cells = labels.reshape(-1, len(CELLS), CELL, CELL)
    colors = np.arange(1, len(PALETTE))
    pixels = (cells[..., None] == colors).sum((2, 3))  # (N, cells, colors)
    scenes = [[] for _ in pictures]
    for n, cell, color in np.argwhere(pixels >= SPECK):
        mask = cells[n, cell] == color + 1
        y, x = np.nonzero(mask)
        mask = mask[y.min() : y.max() + 1, x.min() : x.max() + 1]
        look = tuple(COLORS)[color], *outline(mask.tobytes(), mask.shape)
        scenes[n].append(Object(*look, *CELLS[cell]))
    return scenes


def statements(scene, caption):
    """All statements of a caption as (kind, is it true of the scene?), under the assignment of
    objects to mentions that makes most of them true. Kinds: count, color, shape, size, position,
    relation."""
    best, most, missing = [], -1, max(len(caption.mentions) - len(scene), 0)
    for objects in itertools.permutations([*scene[:5], *[None] * missing], len(caption.mentions)):
        checks = [("count", len(scene) == len(caption.mentions))]
        for m, o in zip(caption.mentions, objects):
            for kind, word in zip(("color", "shape", "size", "position"), m):
                if word is not None:
                    truth = o and (o.cell if kind == "position" else getattr(o, kind))
                    checks.append((kind, word == truth))
        if caption.relation:
            both = None not in objects[:2]
            checks.append(("relation", both and related(objects[0], caption.relation, objects[1])))
        number = sum(ok for _, ok in checks)
        if number > most:
            best, most = checks, number
        if most == len(checks):
            break
    return best


def holds(scene, caption):
    """Is every statement true, with exactly the objects mentioned? Independent of the generator's
    Caption.holds, so that the judge does not share its mistakes."""
    same_number = len(scene) == len(caption.mentions)  # first, because it is cheap
    return same_number and all(ok for _, ok in statements(scene, caption))  # (E1)


def consistent(drawn, scenes):
    """Does everything stay that should? Whatever an object keeps from one true scene to the next,
    it must keep in the drawn ones: an object that only moves keeps its colour, shape and size."""
    for a, b, drawn_a, drawn_b in zip(scenes, scenes[1:], drawn, drawn[1:]):
        gone, new = [o for o in a if o not in b], [o for o in b if o not in a]
        pairs = [(o, o) for o in a if o in b] + list(zip(gone, new))
        by_kind_a, by_kind_b = ({o.kind: o for o in scene} for scene in (drawn_a, drawn_b))
        for o, p in pairs:
            d, e = by_kind_a.get(o.kind), by_kind_b.get(p.kind)
            if d is None or e is None:
                return False
            if any(d[i] != e[i] for i in range(5) if o[i] == p[i]):
                return False
    return True


class WorldJudge:
    """The judge of the synthetic world: right or wrong, and which kinds of statement failed."""

    accuracy = 1.0
    # The pool behind each metric. Metric names are older: compose_heldout draws from "three".
    pools = {
        "compose": "paired",
        "compose_heldout": "three",
        "compose_pairs": "prompted",
        "compose_unprompted": "heldout",
    }

    def failed(self, examples, pictures):
        """Pictures (N, 1, S, S, 3) -> N sets of kinds of false statement, empty if all is right."""
        scenes = parse(pictures[:, 0])
        assert len(scenes) == len(examples), (len(scenes), len(examples))
        failed = []
        for e, scene in zip(examples, scenes):
            failed.append({kind for kind, ok in statements(scene, e.truth[1]) if not ok})
        return failed

    def draw(self, examples, pictures):
        """(N,) bool: is each picture (N, 1, S, S, 3) what its example asks for?"""
        return np.array([not kinds for kinds in self.failed(examples, pictures)])

    def story(self, examples, pictures):
        """Stories (N, 3, S, S, 3) -> is each frame right, (N, 3) bool; is each story consistent,
        (N,) bool."""
        assert len(pictures) == len(examples), (len(pictures), len(examples))
        right, same = [], []
        for e, frames in zip(examples, pictures):
            scenes = parse(frames)
            pairs = zip(scenes, e.truth.captions, strict=True)
            right.append([holds(scene, caption) for scene, caption in pairs])
            same.append(consistent(scenes, e.truth.scenes))
        return np.array(right), np.array(same)

    def caption(self, examples, texts):
        """(N,) bool: is the text true of the scene, with every object's colour and shape?"""
        assert len(texts) == len(examples), (len(texts), len(examples))
        right = []
        for e, caption in zip(examples, map(parse_caption, texts)):
            named = caption is not None and all(m.color and m.shape for m in caption.mentions)
            right.append(named and holds(e.truth[0], caption))
        return np.array(right)


class FashionJudge:
    """Classifies pictures with a small convolutional net, trained here in a few seconds on real
    training pictures; `accuracy` is how often it is right on real test pictures."""

    pools = {"compose": "paired"}

    def __init__(self, source, steps=600, batch=128, lr=5e-3):
        (pictures, labels), (unseen, truth) = source.splits["train"], source.splits["test"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                nn.Flatten(), nn.Linear(2048, 10),
            )
            optimizer = torch.optim.Adam(self.net.parameters(), lr)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                rows = torch.randint(len(labels), (batch,)).numpy()
                optimizer.zero_grad()
                loss = F.cross_entropy(self.scores(pictures[rows]), torch.from_numpy(labels[rows]))
                loss.backward()
                optimizer.step()
        self.accuracy = float((self.classify(unseen[:2000]) == truth[:2000]).mean())

    def scores(self, pictures):
        """(N, S, S, 3) uint8 -> (N, 10) logits."""
        grey = torch.from_numpy(np.ascontiguousarray(pictures[..., :1]))
        return self.net(grey.permute(0, 3, 1, 2) / 127.5 - 1)

    @torch.no_grad()
    def classify(self, pictures):
        """(N, S, S, 3) uint8 -> classes (N,)."""
        return self.scores(pictures).argmax(1).numpy()

    def draw(self, examples, pictures):
        """(N,) bool: is each picture (N, 1, S, S, 3) of the class asked for?"""
        assert len(pictures) == len(examples), (len(pictures), len(examples))
        return self.classify(pictures[:, 0]) == np.array([e.truth for e in examples])

    def failed(self, examples, pictures):
        """What is wrong with each picture: N sets."""
        return [set() if ok else {"class"} for ok in self.draw(examples, pictures)]

    def caption(self, examples, texts):
        """(N,) bool: does a text name the class?"""
        pairs = zip(examples, texts, strict=True)
        return np.array([t.split()[-1:] == e.answer.split()[-1:] for e, t in pairs])


class KeyJudge:
    """For a source with only questions: nothing is drawn, and the key decides."""

    pools, accuracy = {}, 1.0


def judge_of(source):
    """The judge of a source."""
    if source.name == "synthetic":
        return WorldJudge()
    return FashionJudge(source) if source.name == "fashion_mnist" else KeyJudge()


# ------------------------------------------------ numbers with intervals

T_QUANTILES = (  # of Student's t at 97.5%, for 1 to 29 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip


def cell(values, weights=None):
    """An entry of eval.json: {"value", "low", "high", "n"}, None where there is no such number.

    bools give their share with a Wilson interval, floats their (weighted) mean, one float itself.

    >>> cell(np.array([True] * 8 + [False] * 2))
    {'value': 0.8, 'low': 0.4902, 'high': 0.9433, 'n': 10}
    """
    v, z = np.asarray(values), 1.96
    if v.ndim == 0:
        value = round(float(v), 5) if math.isfinite(v) else None
        return {"value": value, "low": None, "high": None, "n": 1}
    n, w = len(v), np.ones(len(v)) if weights is None else np.asarray(weights, float)
    mean = float((v * w).sum() / w.sum())
    if v.dtype == bool:
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)  # (E3)
    elif n > 1:
        variance = (w**2 * (v - mean) ** 2).sum() * n / (n - 1)
        centre, half = mean, z * math.sqrt(variance) / w.sum()  # (E4)
    else:
        return {"value": round(mean, 4), "low": None, "high": None, "n": n}
    low, high = round(centre - half, 4), round(centre + half, 4)
    return {"value": round(mean, 4), "low": low, "high": high, "n": n}


def over_seeds(values):
    """'mean ± half-width' of a 95% interval with Student's t.

    >>> over_seeds([0.5, 0.6, 0.7])
    '0.600 ± 0.248'
    """
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    t = T_QUANTILES[min(len(values), 30) - 2]
    return f"{np.mean(values):.3f} ± {t * np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def diversity(pictures, right):
    """pictures (B, G, ...), right (B, G) bool -> (share of right ones that are distinct, share of
    pairs of right ones that differ), over prompts with at least two right ones; nan without any.

    Two of three are distinct, two of three pairs differ:
    >>> a, b = np.zeros((1, 2, 2)), np.full((1, 2, 2), 255)
    >>> diversity(np.stack([a, a, b], 1), np.array([[True, True, True]]))
    (0.6666666666666666, 0.6666666666666666)
    """
    distinct, correct, differ = 0, 0, []
    for group, ok in zip(pictures, right):
        kept = [picture.tobytes() for picture in group[ok]]
        if len(kept) > 1:
            distinct, correct = distinct + len(set(kept)), correct + len(kept)
            differ.append(np.mean([a != b for a, b in itertools.combinations(kept, 2)]))
    return (distinct / correct, float(np.mean(differ))) if correct else (math.nan, math.nan)  # (E2)


def frechet(a, b):
    """Frechet distance of Gaussians fitted to two sets of vectors, (N, D) and (M, D). Source:
    arXiv:1706.08500.

    Means 1 and 5, std sqrt 2 and 2 sqrt 2:
    >>> round(frechet(np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])), 6)
    18.0
    """
    a, b = np.float64(a), np.float64(b)
    m, n = a.mean(0), b.mean(0)
    c, d = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ d @ root).clip(min=0)).sum()  # tr of the root of c d
    return float(np.square(m - n).sum() + np.trace(c) + np.trace(d) - 2 * both)  # (E7)


def surprise(logprobs, axis):
    """log p(a|b) -> log [p(a|b) / p(a)], where p(a) is the mean over b, along `axis`. (Short
    texts are likely for any picture, and plain pictures for any text.)

    >>> surprise(np.log([[0.9, 0.3], [0.3, 0.3]]), 0).round(2).tolist()  # log of 1.5, 1, 0.5, 1
    [[0.41, 0.0], [-0.69, 0.0]]
    """
    mean = np.logaddexp.reduce(logprobs, axis, keepdims=True) - math.log(logprobs.shape[axis])
    return logprobs - mean


def ranked_first(scores, also):
    """Does each picture rank its own text first, and each text its own picture? (2, M) bool.

    scores (M, M) of picture i with text j; also (M, M) bool: text j is true of picture i, though
    not its own, and so no candidate.

    >>> ranked_first(np.array([[0.9, 0.3], [0.95, 0.1]]), np.zeros((2, 2), bool)).tolist()
    [[True, False], [False, False]]
    """
    scores, own = np.where(also, -np.inf, scores), np.arange(len(scores))
    return np.stack((scores.argmax(1) == own, scores.argmax(0) == own))


# ------------------------------------------------ what a model can do


class Evaluator:
    """A model, and what it is evaluated on. split: "val" to choose by, "test" to report, each with
    its own seed. n: items per metric. With `rewards`, drawings and captions are the best of 8
    samples by them (a control that learns nothing). clip: the second CLIP, where metrics need it.
    """

    choices = 8

    def __init__(
        self, model, vocab, codebook, source, judge, split="test", seed=0, n=1000, rewards=None
    ):
        self.model, self.vocab, self.codebook = model, vocab, codebook
        self.source, self.judge, self.split, self.seed = source, judge, split, seed
        self.n, self.rewards, self.clip, self.memory = n, rewards, None, {}

    def rng(self, *place):
        return random.Random("/".join(map(str, (self.split, self.seed, self.source.name, *place))))

    def examples(self, task, n=None, pool="paired"):
        """n examples of a task, the same for every model; fewer if a source has fewer real ones."""
        rng, n = self.rng(task, pool), n or self.n
        if getattr(self.source, "real_items", False):
            items = self.source.splits[self.split]
            return [e._replace(task=task) for e in rng.sample(items, min(n, len(items)))]
        return [self.source.example(rng, task, pool, split=self.split) for _ in range(n)]

    def outputs(self, examples, temperature=1.0, group=1, seed=0):
        """`group` outputs per example, in order: pictures (N, n, S, S, 3) uint8, or N texts."""
        if self.rewards and examples[0].task in ("draw", "caption"):
            return self.best_outputs(examples, temperature, group, seed)
        return self.sampled_outputs(examples, temperature, group, seed)

    def sampled_outputs(self, examples, temperature, group, seed):
        """As `outputs`, without a choice by rewards."""
        device, task, parts = self.model.head.device, examples[0].task, []
        layout, chance = self.vocab.layout(task, device), torch.Generator(device).manual_seed(seed)
        size = max(BATCH[device.type == "cuda"] // group, 1)
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            prompts = self.vocab.rows(task, batch, self.codes(batch))
            tokens = sample(self.model, layout, prompts, group, chance, temperature)
            parts.append(outputs(layout, tokens, self.vocab, self.codebook))
        return np.concatenate(parts) if layout.draws else list(itertools.chain(*parts))

    def codes(self, examples):
        """The codes (M, P) of all pictures of the examples, on the model's device."""
        pictures = torch.as_tensor(pictures_of(examples), device=self.model.head.device)
        return self.codebook.encode(pictures)

    def best_outputs(self, examples, temperature, group, seed):
        """As `outputs`, each the best of several by the reward. At temperature 0 all samples
        would be equal, so it becomes 1."""
        n = group * self.choices
        samples = self.sampled_outputs(examples, temperature or 1.0, n, seed)
        repeated, best = [e for e in examples for _ in range(group)], []
        for start in range(0, len(repeated), 128):
            batch, first = repeated[start : start + 128], start * self.choices
            candidates = samples[first : first + len(batch) * self.choices]
            rng = random.Random(seed)
            total, _ = self.rewards(self.source, batch[0].task, batch, candidates, rng)
            best += [first + i * self.choices + j for i, j in enumerate(total.argmax(1).tolist())]
        return samples[best] if isinstance(samples, np.ndarray) else [samples[i] for i in best]

    def once(self, function, *args):
        """function(self, *args), computed only once: several metrics share the same drawings."""
        key = function.__name__, *args
        if key not in self.memory:
            self.memory[key] = function(self, *args)
        return self.memory[key]


def drawings(e, pool):
    """(examples, one drawing of each at temperature 1)."""
    examples = e.examples("draw", 2 * e.n if pool == "paired" else e.n, pool)
    return examples, e.outputs(examples)


def stories(e, pool):
    """(is each frame right, (N, 3) bool; is each story consistent, (N,) bool)."""
    examples = e.examples("story", pool=pool)
    return e.judge.story(examples, e.outputs(examples))


@torch.no_grad()
def caption_logprobs(e, texts, codes):
    """log p(text | picture): M captions for each of N pictures, codes (N, P) -> (N, M)."""
    layout, parts = e.vocab.layout("caption", codes.device), []
    rows = e.vocab.rows("caption", [Example("caption", (), "", text) for text in texts], codes[:0])
    picture = (layout.patch >= 0).nonzero()[:, 0]
    for chunk in codes.split(max(BATCH[codes.is_cuda] // len(texts), 1)):
        tokens = rows.repeat(len(chunk), 1)
        tokens[:, picture] = (chunk + e.vocab.n_text).repeat_interleave(len(texts), 0)
        states, targets, mask = completion(e.model, layout, tokens, len(texts))
        logprobs = selected_logprobs(states, allowed_head(e.model, layout), targets)
        parts.append(torch.where(mask, logprobs, 0.0).sum(1).view(-1, len(texts)).cpu())
    return torch.cat(parts).numpy()


def retrievals(e, size=64):
    """{direction: (2, blocks) float}: the shares of pictures that find their text, and of texts
    that find their picture, in blocks of 64 candidates, at least n in all."""
    rng, shares = e.rng("retrieval"), defaultdict(list)
    for _ in range(math.ceil(e.n / size)):
        examples = e.source.hard_negatives(rng, size, e.split)
        texts, codes = [x.answer for x in examples], e.codes(examples)
        also = np.stack([e.judge.caption([x] * size, texts) for x in examples])
        np.fill_diagonal(also, False)
        drawn = drawing_logprobs(e.model, e.vocab, texts, codes.expand(size, -1, -1)).T
        scores = {"caption": surprise(caption_logprobs(e, texts, codes), 0)}
        scores["draw"] = surprise(drawn.cpu().numpy(), 1)
        scores["both"] = scores["caption"] + scores["draw"]  # (E6)
        for direction, matrix in scores.items():
            shares[direction].append(ranked_first(matrix, also).mean(1))
    return {direction: np.stack(blocks, 1) for direction, blocks in shares.items()}


# ------------------------------------------------ metrics: name -> outcomes of the items


def answered(e, task, pool="paired", thoughts=True):
    """(N,) bool: is the likeliest answer or caption right?"""
    examples = e.examples(task, pool=pool)
    examples = examples if thoughts else [at_once(x) for x in examples]
    texts = e.outputs(examples, 0.0)
    if task == "caption":
        return e.judge.caption(examples, texts)
    return np.array([exact_match(text, x.answer) > 0 for text, x in zip(texts, examples)])


def composed(e, pool):
    """(N,) bool: is each drawing right?"""
    return e.judge.draw(*e.once(drawings, pool))


def drawn_score(e, examples, pictures):
    """(N,) float: the second CLIP's score of each drawing (N, 1, S, S, 3)."""
    texts = [x.prompt for x in examples]
    return clip_score(e.clip, e.vocab, pictures[:, 0], texts).cpu().numpy()


def drawn_distance(e, examples, pictures, pool):
    """The Frechet distance of pictures (N, S, S, 3) from as many real ones of a pool."""
    real = pictures_of(e.examples("caption", len(examples), pool))
    return frechet(e.clip.embed_image(pictures).cpu(), e.clip.embed_image(real).cpu())


def scored(e):
    """(N,) float: how well drawings fit their prompts, by the second CLIP."""
    return drawn_score(e, *e.once(drawings, "paired"))


@torch.no_grad()
def distance(e, pool="paired", floor=False):
    """The Frechet distance of drawings from real pictures; floor: of other real ones instead."""
    examples, pictures = e.once(drawings, pool)
    return drawn_distance(e, examples, pictures_of(examples) if floor else pictures[:, 0], pool)


def retrieved(e, way, direction="both"):
    """(blocks,) float: how often the true partner is first, from picture (way 0) or text (1)."""
    return e.once(retrievals)[direction][way]


def storied(e, pool="paired", part="all"):
    """(N,) bool: stories that are all right (E8), single right frames, or consistent stories."""
    frames, same = e.once(stories, pool)
    if part == "frames":
        return frames.flatten()
    return same if part == "consistent" else frames.all(1) & same  # (E8)


@torch.no_grad()
def text_nll(e):
    """(values, weights): nats per token of each held-out caption, and its number of tokens."""
    examples, layout = e.examples("text"), e.vocab.layout("text", e.model.head.device)
    rows = e.vocab.rows("text", examples, e.codes(examples))
    states, targets, mask = completion(e.model, layout, rows)
    logprobs = selected_logprobs(states, allowed_head(e.model, layout), targets)
    sums, counts = -torch.where(mask, logprobs, 0.0).sum(1), mask.sum(1)
    return (sums / counts).cpu().numpy(), counts.cpu().numpy()  # (E5)


partial = functools.partial
METRICS = {  # group: {metric: (tasks it needs, function of an Evaluator)}
    "understanding": {
        "vqa": ("vqa", partial(answered, task="vqa")),
        "vqa_three": ("vqa", partial(answered, task="vqa", pool="three")),
        "retrieval_i2t_r1": ("caption draw", partial(retrieved, way=0)),
        "retrieval_t2i_r1": ("caption draw", partial(retrieved, way=1)),
        "retrieval_i2t_caption": ("caption", partial(retrieved, way=0, direction="caption")),
        "retrieval_t2i_caption": ("caption", partial(retrieved, way=1, direction="caption")),
        "retrieval_i2t_draw": ("draw", partial(retrieved, way=0, direction="draw")),
        "retrieval_t2i_draw": ("draw", partial(retrieved, way=1, direction="draw")),
        "caption": ("caption", partial(answered, task="caption")),
        "caption_three": ("caption", partial(answered, task="caption", pool="three")),
    },
    "generation": {
        "compose": ("draw", partial(composed, pool="paired")),
        "compose_heldout": ("draw", partial(composed, pool="three")),
        "compose_pairs": ("draw", partial(composed, pool="prompted")),
        "compose_unprompted": ("draw", partial(composed, pool="heldout")),
        "clip_score": ("draw", scored),
        "frechet": ("draw", distance),
        "frechet_floor": ("draw", partial(distance, floor=True)),
        "frechet_three": ("draw", partial(distance, pool="three")),
        "story": ("story", storied),
        "story_frames": ("story", partial(storied, part="frames")),
        "story_consistent": ("story", partial(storied, part="consistent")),
        "story_three": ("story", partial(storied, pool="three")),
        "diversity": ("draw", None),  # from the front
        "diversity_heldout": ("draw", None),
    },
    "reasoning": {
        "visual": ("verify", partial(answered, task="verify")),
        "visual_three": ("verify", partial(answered, task="verify", pool="three")),
        "multihop": ("multihop", partial(answered, task="multihop")),
        "multihop_three": ("multihop", partial(answered, task="multihop", pool="three")),
        "multihop_at_once": ("vqa multihop", partial(answered, task="multihop", thoughts=False)),
        "multihop_at_once_three": (
            "vqa multihop", partial(answered, task="multihop", pool="three", thoughts=False)),
    },
    "language": {"text_nll": ("text", text_nll)},
}


def measure(e, tasks):
    """All metrics of a model on a source: ({group: {metric: cell or None}}, {metric: outcomes})."""
    cells, items, pools = {}, {}, e.source.name == "synthetic"
    for group, metrics in METRICS.items():
        cells[group] = dict.fromkeys(metrics)
        for name, (task, function) in metrics.items():
            several = name.endswith(("_three", "_heldout", "_pairs", "_unprompted"))
            if function is None or not set(task.split()) <= set(tasks) or (several and not pools):
                continue
            outcomes = function(e)
            values, weights = outcomes if isinstance(outcomes, tuple) else (outcomes, None)
            cells[group][name] = cell(values, weights)
            if np.ndim(values) and weights is None:
                items[name] = np.round(values * 1, 4).tolist()
    return cells, items


# ------------------------------------------------ fronts, and a whole evaluation

TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
POOLS = ("", "_heldout", "_pairs")  # of a sweep: suffixes of the metrics of each pool


@torch.no_grad()
def front(e, pool, prompts=128, group=8, temperatures=TEMPERATURES):
    """One row per temperature: compose, diversity and differ (E2) over prompts x group pictures;
    with a second CLIP also clip_score and frechet."""
    examples, rows = e.examples("draw", prompts, pool), []
    repeated = [x for x in examples for _ in range(group)]
    for t in temperatures:
        pictures = e.outputs(examples, t, group)
        right = e.judge.draw(repeated, pictures).reshape(prompts, group)
        distinct, differ = diversity(pictures.reshape(prompts, group, *pictures.shape[1:]), right)
        values = {"compose": float(right.mean()), "diversity": distinct, "differ": differ}
        if e.clip is not None:
            values["clip_score"] = float(drawn_score(e, repeated, pictures).mean())
            values["frechet"] = drawn_distance(e, repeated, pictures[:, 0], pool)
        values = {k: round(v, 4) if math.isfinite(v) else None for k, v in values.items()}
        rows.append({"temperature": t} | values)
    return rows


def sweep(e, prompts):
    """The fronts of all POOLS that a source has, side by side."""
    rows = [{"temperature": t} for t in TEMPERATURES]
    for suffix in POOLS:
        if f"compose{suffix}" in e.judge.pools:
            pool = e.judge.pools[f"compose{suffix}"]
            for row, more in zip(rows, front(e, pool, prompts), strict=True):
                row |= {f"{k}{suffix}": v for k, v in more.items() if k != "temperature"}
    return rows


def evaluate(test, val, tasks, prompts=128):
    """Evaluate one model on one source, with an Evaluator for each split -> {"numbers": {group:
    {metric: cell}}, "items": {metric: outcomes}, "sweep", "temperature": the best one}."""
    cells, items = measure(test, tasks)
    result = {"numbers": cells, "items": items, "sweep": [], "temperature": None}
    if "draw" in tasks:
        result["sweep"] = rows = sweep(test, prompts)
        choices = front(val, val.judge.pools["compose"], max(prompts // 2, 2), 2)
        result["temperature"] = max(choices, key=lambda row: row["compose"])["temperature"]
        for key in ("diversity", "diversity_heldout"):  # at temperature 1
            if rows[-1].get(key) is not None:
                cells["generation"][key] = cell(rows[-1][key]) | {"n": 8 * prompts}
    return result


def merged(models, accuracy):
    """One source's part of eval.json, from the results of `evaluate` for base and aligned."""
    result = {name: m["numbers"] for name, m in models.items()} | {"judge_accuracy": accuracy}
    drawn = {name: m for name, m in models.items() if m["sweep"]}
    result["sweep"] = {name: m["sweep"] for name, m in drawn.items()}
    result["best_temperature"] = {name: m["temperature"] for name, m in drawn.items()}
    return result


# ------------------------------------------------ tables


def show(number):
    """A cell of eval.json as text, with its interval."""
    if number is None or number["value"] is None:
        return "-"
    interval = f" [{number['low']:.3f}, {number['high']:.3f}]" if number["low"] is not None else ""
    return f"{number['value']:.3f}{interval}"


def table(result):
    """The numbers of one source as text: base beside aligned, then the fronts."""
    lines = [f"{'':24}{'base':>26}{'aligned':>26}"]
    for group, metrics in METRICS.items():
        for metric in metrics:
            cells = [result[m][group].get(metric) for m in ("base", "aligned")]
            if any(cells):
                lines.append(f"{metric:24}" + "".join(f"{show(c):>26}" for c in cells))
    if not result["sweep"]:
        return "\n".join(lines)
    lines.append(f"\n{'quality @ diversity':24}{'base':>26}{'aligned':>26}")
    for rows in zip(*(result["sweep"][m] for m in ("base", "aligned"))):
        line = f"T = {rows[0]['temperature']:<20}"
        for row in rows:
            points = []
            for pool in ("", "_heldout"):
                if f"compose{pool}" in row:
                    quality, variety = row[f"compose{pool}"], row[f"diversity{pool}"] or 0
                    points.append(f"{100 * quality:.0f} @ {100 * variety:.0f}")
            line += f"{' | '.join(points):>26}"
        lines.append(line)
    best = ", ".join(f"{m} {t}" for m, t in result["best_temperature"].items())
    lines.append("left of |: one or two objects; right: three, never seen with a caption")
    lines.append(f"best temperature, chosen on validation prompts: {best}")
    if result["judge_accuracy"] < 1:
        lines.append(f"the judge is right on {result['judge_accuracy']:.1%} of real test pictures")
    return "\n".join(lines)


def by_source(result):
    """The parts of an eval.json: {data set: its numbers}."""
    return result.get("sources") or {result["meta"]["data"]: result}


def tables(result):
    """The table of every data set of a run."""
    return "\n\n".join(f"{name}\n{table(part)}" for name, part in by_source(result).items())


def quality_at(rows, diversity, column="", measure="diversity"):
    """The best quality a front offers at this diversity or more, linear between temperatures.

    >>> quality_at([{"compose": 0.9, "diversity": 0.2}, {"compose": 0.7, "diversity": 0.6}], 0.4)
    0.8
    """
    points = sorted((row[measure + column] or 0.0, row[f"compose{column}"]) for row in rows)
    best = max((q for d, q in points if d >= diversity), default=None)
    for (d0, q0), (d1, q1) in itertools.pairwise(points):
        if d0 < diversity <= d1:
            best = max(best, q0 + (q1 - q0) * (diversity - d0) / (d1 - d0))
    return None if best is None else round(best, 4)


def numbers(result, model):
    """{metric: value} of a model on a source: at temperature 1, at its best one; and its front."""
    flat = {m: (c or {}).get("value") for group in METRICS for m, c in result[model][group].items()}
    for row in result["sweep"].get(model, ()):
        if row["temperature"] == result["best_temperature"][model]:
            flat |= {f"{k} @ best T": v for k, v in row.items()}
    return flat | {"front": result["sweep"].get(model, [])}


def front_gap(ours, theirs, column="", measure="diversity", points=21):
    """The mean difference in quality of two fronts, ours - theirs, over the diversities that both
    reach; None if they share none.

    >>> low, high = {"compose": 0.8, "diversity": 0.2}, {"compose": 0.6, "diversity": 0.6}
    >>> front_gap([low | {"compose": 0.9}, high | {"compose": 0.7}], [low, high])
    0.1
    """
    ends = []
    for rows in (ours, theirs):
        reached = [row[measure + column] for row in rows if row.get(measure + column)]
        ends.append((min(reached, default=1.0), max(reached, default=0.0)))
    (a, b), (c, d) = ends
    if max(a, c) > min(b, d):
        return None
    levels = np.linspace(max(a, c), min(b, d), points)
    pairs = [[quality_at(rows, x, column, measure) for x in levels] for rows in (ours, theirs)]
    return round(float(np.subtract(*pairs).mean()), 4)


def differences(ours, theirs):
    """{metric: ours - theirs} of two `numbers`; drawings at equal diversity by both measures."""
    rows = {}
    for metric, value in ours.items():
        if metric != "front" and None not in (value, theirs.get(metric)):
            rows[metric] = value - theirs[metric]
    for column, measure in itertools.product(POOLS, ("diversity", "differ")):
        gap = front_gap(ours["front"], theirs["front"], column, measure)
        rows |= {} if gap is None else {f"compose{column} @ equal {measure}": gap}
    return rows


def compare(folders):
    """Methods side by side as text, one table per data set: means over seeds with 95% intervals
    (Student's t), and paired differences to the first method."""
    runs = defaultdict(lambda: defaultdict(dict))  # data set: method: seed: numbers
    for result in map(read_result, folders):
        method, seed = result["meta"]["method"], result["meta"]["seed"]
        for name, part in by_source(result).items():
            if seed in runs[name][method]:
                raise ValueError(f"--compare: {method} with seed {seed} is given twice")
            runs[name][method][seed] = numbers(part, "aligned")
            runs[name]["base"][seed] = numbers(part, "base")
    return "\n\n".join(f"{name}\n{comparison(methods)}" for name, methods in runs.items())


def comparison(runs):
    """The table of {method: {seed: numbers}}."""
    first, *others = sorted(runs, key=lambda m: (m == "base", m != "lvrpo", m))
    heads = {m: f"{m} (n={len(runs[m])})" for m in (first, *others)}
    columns = {head: list(runs[m].values()) for m, head in heads.items()}
    for other in others:
        seeds = [seed for seed in runs[first] if seed in runs[other]]
        pairs = [(runs[first][seed], runs[other][seed]) for seed in seeds]
        columns[f"{first} - {other}"] = [differences(*pair) for pair in pairs]
    lines = [f"{'':30}" + "".join(f"{head:>20}" for head in columns)]
    metrics = dict.fromkeys(m for rows in columns.values() for row in rows for m in row)
    for metric in [m for m in metrics if m != "front"]:
        cells = []
        for rows in columns.values():
            cells.append(over_seeds([row[metric] for row in rows if row.get(metric) is not None]))
        if set(cells) != {"-"}:
            lines.append(f"{metric:30}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------ a finished run: load it and try it


def read_result(folder):
    """The eval.json of a run. ValueError if it is missing or damaged."""
    path = Path(folder) / "eval.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        tables(result)  # raises if anything that we show is missing
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or repr(error)[:100]
        begun = (Path(folder) / "config.json").is_file()
        way = f"`python train.py --resume --out {folder}` continues it" if begun else "not a run"
        raise ValueError(f"{path}: {reason}; {way}") from error


def load_run(folder):
    """(config dict, codebook, vocab) of a run directory. ValueError if it is not one."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entries = load_tensors(folder / "codebook.safetensors")["entries"]
        codebook = Codebook(entries, config["patch"])
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return config, codebook, Vocabulary(tokenizer, len(entries), codebook.side**2)
    except Exception as error:  # json, tokenizers and the operating system raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} is not a run of train.py ({reason})") from error


def load_weights(module, path):
    """Load a module's weights from a file; ValueError says what is wrong with it."""
    tensors = load_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:  # other names or shapes
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path} is of another configuration ({reason})") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path} holds weights that are not finite; delete it, then --resume")
    return module


def load_model(folder, vocab, codebook, config, name="aligned", device="cpu"):
    """The transformer of a run; name is "base" or "aligned"."""
    c = ModelConfig(vocab.size, codebook.side, config["width"], config["layers"], config["heads"])
    return load_weights(Transformer(c).to(device), Path(folder) / f"{name}.safetensors").eval()


def load_clip(folder, name, vocab, config, device="cpu"):
    """A CLIP of a run; name is "clip", which rewards, or "clip_report"."""
    clip = CLIP(vocab.n_text, config["patch"], width=config["clip_width"]).to(device)
    return load_weights(clip, Path(folder) / f"{name}.safetensors").eval()


def load_picture(path):
    """Read a picture file -> (S, S, 3) uint8: rotated as EXIF says, scaled down by averaging, with
    black behind transparency and beside a shape that is not square. ValueError if unreadable."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits of grey
            grey = (np.asarray(image, np.float64) / 257).clip(0, 255)
            image = Image.fromarray(grey.astype(np.uint8))
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    method = Image.Resampling.BOX if max(image.size) > SIDE else Image.Resampling.NEAREST
    return np.asarray(ImageOps.pad(image, (SIDE, SIDE), method, "black"))


def known_words(text, vocab):
    """A text in the run's spelling: lower case, punctuation split off, and dropped if unknown."""
    words = re.findall(r"[\w'-]+|[^\w\s]", text.lower())
    return " ".join(word for word in words if word in vocab.ids or re.search(r"\w", word))


def ask(
    folder, task, prompt="", picture=None, name="aligned", temperature=0.0, seed=0, device="cpu"
):
    """A trained run's output for one prompt: a picture (S, S, 3) uint8, or a text. ValueError for
    a task that it has not learned, or a prompt with unknown or too many words."""
    config, codebook, vocab = load_run(folder)
    if task not in config["tasks"].split(","):
        raise ValueError(f"{folder} has not learned the task {task}; it knows {config['tasks']}")
    prompt = known_words(prompt, vocab)
    if task in ("vqa", "multihop") and "?" in vocab.ids and not prompt.endswith("?"):
        prompt += " ?"
    if task != "caption" and not prompt.strip("? "):
        words = "a red circle left of a blue square" if task == "draw" else "what is this?"
        raise ValueError(f'an empty prompt; try "{words}"')
    model = load_model(folder, vocab, codebook, config, name, device)
    picture = np.zeros((SIDE, SIDE, 3), np.uint8) if picture is None else picture
    e = Evaluator(model, vocab, codebook, None, None)
    answer = e.outputs([Example(task, picture[None], prompt, "")], temperature, seed=seed)[0]
    return answer[0] if task == "draw" else answer


def save_picture(picture, path):
    """Write a picture, enlarged 8 times. ValueError if the name has no picture format."""
    Image.init()
    if Image.EXTENSION.get(Path(path).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {path}: not a format that can be written; name a .png file")
    large = Image.fromarray(picture).resize((8 * SIDE, 8 * SIDE), Image.Resampling.NEAREST)
    with atomically(path) as new:
        large.save(new, Image.EXTENSION[Path(path).suffix.lower()])


def joined(results, meta):
    """One eval.json: the first source's numbers, those of all sources if several, and meta."""
    first = next(iter(results.values()))
    return first | ({"sources": results} if len(results) > 1 else {}) | {"meta": meta}


# ------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def run_command(program, function):
    """Call function(). Errors that users can fix end in one line and status 2; others are ours."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may have no ±
    try:
        function()
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        message = "out of memory" if isinstance(error, MemoryError) else str(error)
        if not re.search("out of memory|allocate memory", message):
            raise
        print(f"{program}: out of memory; lower --batch, --prompts or --width", file=sys.stderr)
        sys.exit(2)


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(description="Show the results of a run, compare runs, or try a run.")
    parser.add_argument("--run", metavar="DIR", help="a run directory of train.py")
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--compare", nargs="+", metavar="DIR", help="compare runs, over seeds")
    job.add_argument("--draw", metavar="PROMPT", help="draw this, into --out")
    job.add_argument("--ask", metavar="QUESTION", help="ask this about --image")
    about = "describe this picture; black fills what is transparent, and makes it square"
    job.add_argument("--caption", metavar="FILE", help=about)
    parser.add_argument("--think", action="store_true", help="let --ask write its steps first")
    parser.add_argument("--image", metavar="FILE", help="the picture for --ask")
    parser.add_argument("--out", metavar="FILE", default="picture.png", help="[%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="also write the results of --run here")
    models = ("base", "aligned")
    parser.add_argument("--model", choices=models, default="aligned", help="[%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.5, help="of --draw [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of --draw [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    return parser.parse_args(argv)


def main(argv=None):
    """Do one of the jobs listed at the top of this file."""
    args = parse_arguments(argv)
    if args.compare:
        return print(compare(args.compare))
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected 0 or more, less than 2**63")
    if not args.run:
        raise ValueError("say which run: --run DIR, or --compare DIR DIR ...; see --help")
    if args.ask is None and (args.image or args.think):
        raise ValueError("--image and --think belong to --ask")
    common = dict(name=args.model, device=pick_device(args.device)[0])
    if args.draw is not None:
        sampling = dict(temperature=args.temperature, seed=args.seed)
        save_picture(ask(args.run, "draw", args.draw, **sampling, **common), args.out)
        print(f"{args.out}: {args.draw}")
    elif args.caption is not None:
        print(ask(args.run, "caption", "", load_picture(args.caption), **common))
    elif args.ask is not None:
        if not args.image:
            raise ValueError("--ask needs --image FILE")
        tasks = load_run(args.run)[0]["tasks"].split(",")
        task = "multihop" if args.think or "vqa" not in tasks else "vqa"
        print(ask(args.run, task, args.ask, load_picture(args.image), **common))
    else:
        result = read_result(args.run)
        if args.json:
            with atomically(args.json) as new:
                new.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        print(tables(result))


if __name__ == "__main__":
    run_command("eval.py", main)
