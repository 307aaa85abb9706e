"""Measuring: a judge that no training ever sees, what a model can do by it, tables with intervals, and a playground.

The judge reads a generated picture with plain NumPy: every pixel goes to the nearest colour of the palette, equal
neighbours become components, a component's outline is compared with the three shapes; then every statement of the
prompt is checked (a GenEval in miniature). On real renders it is always right (tests/test_eval.py asserts it).
It is no reward, and it chooses no checkpoint; temperatures are chosen on validation prompts, reported on test prompts.

  (E1) compose   = share of pictures with exactly the objects asked for and every statement true
  (E2) diversity = distinct correct pictures / correct pictures of a prompt; it falls by itself where more are correct, so beside it
       differ    = share of pairs of correct pictures that differ, which does not; and the mean distance of a pair, |a - b| / 255
                   over its pixels; means over prompts with at least two correct ones
  (E3) interval of a rate: Wilson, 95%      (E4) of a mean: mean +- 1.96 standard errors
  (E5) text NLL  = - sum of log-probs of held-out captions / their tokens, nats a token
  (E6) retrieval: PMI(c, x) = log p(c|x) - log mean_x' p(c|x'), by the model itself; is its own the first of 64 candidates?
                   Scenes one edit apart are among them; what is also true of the picture by its scene is not
  (E7) frechet   = |m - n|^2 + tr(C + D - 2 (C D)^(1/2)), means and covariances of real and of drawn pictures as the second
                   CLIP sees them, --clip-width numbers a picture. It is not the FID of the Inception network
  (E8) story     = share of stories whose frames are all right and consistent: what no sentence changes is the same in the next

A result on drawing is a *front*: quality against diversity over temperatures. One number at temperature 1 says little,
because a low temperature alone makes a model look better and duller.

    $ python eval.py --run runs/NAME                                            # the table; measured anew where there is no eval.json
    $ python eval.py --run runs/NAME --draw "a red circle left of a blue square" --out picture.png
    $ python eval.py --run runs/NAME --ask "what color is the circle ?" --image picture.png
    $ python eval.py --compare runs/A runs/B ...                                # methods side by side, over seeds
    $ python eval.py --run runs/NAME --ablate group|kl|reward|pairs             # short runs from its base: table and figure
"""

import argparse
import base64
import copy
import csv
import functools
import html
import itertools
import json
import math
import operator
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import (
    BACKGROUND,
    COLORS,
    EOS,
    PAD,
    SHAPES,
    SIZES,
    Asked,
    Batch,
    Example,
    Object,
    Vocabulary,
    make_sources,
    parse_caption,
    pictures_of,
    related,
    shape_mask,
)
from grpo import rollout, rollout_loss
from kernels import fused_linear_grpo_loss, selected_logprobs
from model import (
    Codebook,
    ModelConfig,
    Transformer,
    atomically,
    completion_states,
    decode,
    pick_device,
    read_tensors,
    sample,
)
from reward import CLIP, Rewards, clip_score, exact_match, sentences_right

# ---------------------------------------------------------------- the judge: picture -> objects -> is the prompt true?

PALETTE = np.array([BACKGROUND, *COLORS.values()], np.int16)
NAMES = (None, *COLORS)
OUTLINES = {(shape, size): shape_mask(shape, width) for shape in SHAPES for size, width in SIZES.items()}
SPECK, LIKENESS = 4, 0.9  # components of fewer pixels are noise; an outline must overlap by this much (IoU)


def components(labels):
    """(N, S, S) palette numbers -> (N, S, S) component numbers: the largest pixel index among equal neighbours' regions."""
    n, s, _ = labels.shape
    region = np.broadcast_to(np.arange(1, s * s + 1, dtype=np.int16).reshape(s, s), labels.shape).copy()
    joined = {axis: np.equal(*_neighbours(labels, axis)) for axis in (1, 2)}
    while True:
        before = region.copy()
        for axis, same in joined.items():
            a, b = _neighbours(region, axis)
            high = np.where(same, np.maximum(a, b), 0)
            np.maximum(a, high, out=a)
            np.maximum(b, high, out=b)
        if (before == region).all():
            return region


def _neighbours(x, axis):
    return (x[:, :-1], x[:, 1:]) if axis == 1 else (x[:, :, :-1], x[:, :, 1:])


@functools.lru_cache(100_000)  # the same few outlines come again and again
def outline(pixels, size):
    """The (shape, size) whose outline overlaps a cropped bool mask best, or (None, None) below LIKENESS. The mask comes as its
    bytes and shape, which can be looked up."""
    best, found, mask = LIKENESS, (None, None), np.frombuffer(pixels, bool).reshape(size)
    for name, shape in OUTLINES.items():
        h, w = (max(a, b) for a, b in zip(mask.shape, shape.shape))
        both = [np.pad(m, ((0, h - m.shape[0]), (0, w - m.shape[1]))) for m in (mask, shape)]
        overlap = (both[0] & both[1]).sum() / (both[0] | both[1]).sum()
        if overlap >= best:
            best, found = overlap, name
    return found


def parse(pictures):
    """(N, S, S, 3) uint8 -> for each picture the list of Objects in it; shape and size are None for a malformed one."""
    different = {}  # equal pictures are read once
    which = [different.setdefault(p.tobytes(), len(different)) for p in pictures]
    pictures = np.frombuffer(b"".join(different), np.uint8).reshape(-1, *pictures.shape[1:])
    distance = np.abs(pictures[:, :, :, None].astype(np.int16) - PALETTE).sum(-1, dtype=np.int16)
    labels = distance.argmin(-1).astype(np.int8)
    regions, half = components(labels), pictures.shape[1] / 2
    scenes = []
    for label, region in zip(labels, regions):
        scene = []
        for r in np.unique(region[label > 0]):
            y, x = np.nonzero(region == r)
            if len(y) < SPECK:
                continue
            box = np.s_[y.min() : y.max() + 1, x.min() : x.max() + 1]
            row, column = (int((v.min() + v.max() + 1) / 2 > half) for v in (y, x))
            mask = region[box] == r
            scene.append(Object(NAMES[label[y[0], x[0]]], *outline(mask.tobytes(), mask.shape), row, column))
        scenes.append(scene)
    return [scenes[i] for i in which]


def statements(scene, caption):
    """Every statement of a caption, as (kind, true of the scene?), under the assignment of objects to mentions that makes
    most of them true. Kinds: count, color, shape, size, position, relation."""
    best, missing = None, max(len(caption.mentions) - len(scene), 0)
    for objects in itertools.permutations([*scene[:5], *[None] * missing], len(caption.mentions)):
        checks = [("count", len(scene) == len(caption.mentions))]
        for m, o in zip(caption.mentions, objects):
            said = {"color": m.color, "shape": m.shape, "size": m.size, "position": m.cell}
            truth = (o.color, o.shape, o.size, (o.row, o.column)) if o else (None,) * 4
            checks += [(kind, word == there) for (kind, word), there in zip(said.items(), truth) if word is not None]
        if caption.relation:
            checks.append(("relation", None not in objects[:2] and related(objects[0], caption.relation, objects[1])))
        if best is None or sum(ok for _, ok in checks) > sum(ok for _, ok in best):
            best = checks
        if all(ok for _, ok in best):
            break
    return best


def holds(scene, caption):
    """Is every statement of the caption true of the scene, with no object more or less? Worked out apart from Caption.holds of
    the generator, so that the judge does not share its mistakes."""
    return all(ok for _, ok in statements(scene, caption))  # (E1)


def consistent(drawn, scenes):
    """Does everything stay that should? Of the objects that are in two successive true scenes, those drawn must have in common
    what the true ones have in common: an object that only moves keeps its colour, shape and size, whatever size was drawn."""
    for a, b, first, second in zip(scenes, scenes[1:], drawn, drawn[1:]):
        gone, new = ([o for o in x if o not in y] for x, y in ((a, b), (b, a)))
        first, second = ({o.kind: o for o in objects} for objects in (first, second))
        for o, p in [*((o, o) for o in a if o in b), *zip(gone, new)]:
            d, e = first.get(o.kind), second.get(p.kind)
            if not (d and e and all(x == y for x, y, same in zip(d[:5], e[:5], map(operator.eq, o, p)) if same)):
                return False
    return True


class WorldJudge:
    """Right or wrong for the synthetic world, and which kinds of statement failed."""

    pools = {"compose": ("paired",), "compose_heldout": ("three",), "compose_pairs": ("prompted",), "compose_unprompted": ("heldout",)}

    def __init__(self, draws=True):
        if not draws:
            self.pools = {}

    def draw(self, examples, pictures):
        """(N,) bool, and {kind: share of statements that are true}."""
        right, kinds = [], defaultdict(list)
        for e, scene in zip(examples, parse(pictures)):
            checks = statements(scene, e.truth[1])
            right.append(all(ok for _, ok in checks))
            for kind, ok in checks:
                kinds[kind].append(ok)
        return np.array(right), {kind: float(np.mean(v)) for kind, v in kinds.items()}

    def failed(self, examples, pictures):
        """For each picture the kinds of statement that are false of it: a list of N sets, empty where all is right."""
        return [{kind for kind, ok in statements(scene, e.truth[1]) if not ok} for e, scene in zip(examples, parse(pictures))]

    def story(self, examples, pictures):
        """Stories (N, 3, S, S, 3) -> is each frame right, (N, 3) bool, and does what should stay the same, (N,) bool?"""
        scenes = parse(pictures.reshape(-1, *pictures.shape[2:]))
        drawn = [scenes[i : i + 3] for i in range(0, len(scenes), 3)]
        right = [[holds(scene, caption) for scene, caption in zip(story, e.truth.captions)] for e, story in zip(examples, drawn)]
        return np.array(right), np.array([consistent(story, e.truth.scenes) for e, story in zip(examples, drawn)])

    def plan(self, examples, outputs):
        """Plans and the pictures after them -> is the plan in full and true of its prompt, and is it what was drawn? (N,) bool each."""
        plans = [parse_caption(text) for text, _ in outputs]
        objects = [[Object(m.color, m.shape, m.size, *m.cell) for m in c.mentions] if c and all(m.cell for m in c.mentions) else None
                   for c in plans]  # fmt: skip
        true = [o is not None and holds(o, e.truth[1]) for o, e in zip(objects, examples)]
        return np.array(true), np.array([o is not None and holds(scene, c) for o, c, scene in zip(
            objects, plans, parse(np.stack([picture for _, picture in outputs])))])  # fmt: skip

    def caption(self, examples, texts):
        """(N,) bool: a caption that is true of the scene and names colour and shape of every object."""
        captions = [parse_caption(text) for text in texts]
        named = [c is not None and all(m.color and m.shape for m in c.mentions) for c in captions]  # "a shape" is no answer
        return np.array([ok and holds(e.truth[0], c) for e, c, ok in zip(examples, captions, named)])


class FashionJudge:
    """Which class is a picture of? A small convolutional net says so, trained here on real training pictures in a few seconds;
    `accuracy` is how often it is right on real test pictures."""

    pools = {"compose": ("paired",)}

    def __init__(self, source, steps=600, batch=128, lr=5e-3):
        (pictures, labels), (unseen, theirs) = source.splits["train"], (x[:2000] for x in source.splits["test"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                                     nn.Linear(2048, 10))  # fmt: skip
            optimizer = torch.optim.Adam(self.net.parameters(), lr)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                some = torch.randint(len(labels), (batch,)).numpy()
                optimizer.zero_grad()
                F.cross_entropy(self.scores(pictures[some]), torch.from_numpy(labels[some])).backward()
                optimizer.step()
        self.accuracy = float((self.classify(unseen) == theirs).mean())

    def scores(self, pictures):
        """(N, S, S, 3) uint8 -> (N, 10) logits."""
        return self.net(torch.from_numpy(np.ascontiguousarray(pictures[..., :1])).permute(0, 3, 1, 2) / 127.5 - 1)

    @torch.no_grad()
    def classify(self, pictures):
        """(N, S, S, 3) uint8 -> classes (N,)."""
        return self.scores(np.asarray(pictures)).argmax(1).numpy()

    def draw(self, examples, pictures):
        """(N,) bool: is a picture of the class asked for? And the share."""
        right = self.classify(pictures) == np.array([e.truth for e in examples])
        return right, {"class": float(right.mean())}

    def failed(self, examples, pictures):
        """What is wrong with each, a list of sets."""
        return [set() if ok else {"class"} for ok in self.draw(examples, pictures)[0]]

    def caption(self, examples, texts):
        """(N,) bool: does a text name the class?"""
        return np.array([t == e.answer or t.split()[-1:] == e.answer.split()[-1:] for e, t in zip(examples, texts)])


class KeyJudge:
    """For a source that only asks, SHAPES or NLVR: nothing is drawn, and the key says what is right."""

    pools = {}


# ---------------------------------------------------------------- numbers with intervals


def rate(right):
    """A share with its 95% Wilson interval.

    >>> rate([True] * 8 + [False] * 2)
    {'value': 0.8, 'low': 0.4902, 'high': 0.9433, 'n': 10}
    """
    n, p, z = len(right), float(np.mean(right)), 1.96
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)  # (E3)
    return {"value": round(p, 4), "low": round(centre - half, 4), "high": round(centre + half, 4), "n": n}


def average(values, weights=None):
    """A (weighted) mean with its 95% interval."""
    v, w = np.asarray(values, float), np.ones(len(values)) if weights is None else np.asarray(weights, float)
    mean = (v * w).sum() / w.sum()
    error = 1.96 * math.sqrt((w**2 * (v - mean) ** 2).sum()) / w.sum()  # (E4)
    return {"value": round(mean, 4), "low": round(mean - error, 4), "high": round(mean + error, 4), "n": len(v)}


def diversity(pictures, right):
    """pictures (B, G, ...), right (B, G) bool -> (distinct correct / correct, share of pairs of correct ones of a prompt that differ,
    mean distance of a pair); nan where no prompt has two correct pictures.

    >>> a, b = np.zeros((1, 2, 2)), np.full((1, 2, 2), 255)
    >>> diversity(np.stack([a, a, b], 1), np.array([[True, True, True]]))  # 2 of 3 distinct, and 2 of 3 pairs differ
    (0.6666666666666666, 0.6666666666666666, 0.6666666666666666)
    """
    distinct, correct, differ, distances = 0, 0, [], []
    for group, ok in zip(pictures, right):
        if ok.sum() < 2:
            continue
        kept = group[ok].reshape(ok.sum(), -1)
        distinct, correct = distinct + len({p.tobytes() for p in kept}), correct + len(kept)
        pairs = [np.abs(a.astype(np.int16) - b).mean() / 255 for a, b in itertools.combinations(kept, 2)]
        differ.append(np.count_nonzero(pairs) / len(pairs))
        distances.append(np.mean(pairs))
    return (distinct / correct, float(np.mean(differ)), float(np.mean(distances))) if correct else (math.nan,) * 3  # (E2)


# ---------------------------------------------------------------- what a model can do


class Evaluator:
    """A model, asked. `split` names the scenes: "val" to choose by, "test" to report; each has its own seed. With `rewards`,
    drawings and captions are the best of `n` samples by these (a control: what the reward knows, without any learning)."""

    def __init__(self, model, vocab, codebook, source, judge, split="test", seed=0, batch=512, rewards=None, n=8):
        self.model, self.vocab, self.codebook, self.source, self.judge = model, vocab, codebook, source, judge
        self.split, self.seed, self.batch, self.rewards, self.n = split, seed, batch, rewards, n

    def examples(self, task, n, pools=("paired",)):
        """n examples of a task, pools in turn; the same for every model. Of SHAPES and NLVR at most all there are."""
        rng = random.Random(f"{self.split}/{self.seed}/{self.source.name}/{task}/{pools}")
        if isinstance(self.source, Asked):  # each real item once, or n of them, the same with and without steps
            items, rng = self.source.splits[self.split], random.Random(f"{self.split}/{self.seed}/{self.source.name}")
            return [e._replace(task=task) for e in rng.sample(items, min(n, len(items)))]
        return [self.source.example(rng, task, pools[i % len(pools)], split=self.split) for i in range(n)]

    def outputs(self, examples, temperature=1.0, guidance=0.0, seed=0, group=1):
        """`group` outputs an example, one after the other: pictures (N, S, S, 3) uint8 when drawing, else a list of texts."""
        if self.rewards and examples[0].task in ("draw", "caption"):
            return self.best(examples, temperature, guidance, seed, group)
        device, outputs, rows = self.model.head.device, [], max(self.batch // group, 1)
        generator = torch.Generator(device).manual_seed(seed)
        for start in range(0, len(examples), rows):
            part = examples[start : start + rows]
            codes = self.codebook.encode(torch.as_tensor(pictures_of(part), device=device))
            batch = self.vocab.batch(part, codes, device)
            tokens = sample(self.model, batch, self.vocab, generator, temperature, guidance, group)
            outputs += decode(self.vocab, self.codebook, part[0].task, batch.repeat(group), tokens)
        return np.stack(outputs) if examples[0].task in ("draw", "story") else outputs

    def best(self, examples, temperature, guidance, seed, group):
        """As outputs: each the best of n. Nothing is to be chosen from at temperature 0, so captions are sampled at 1."""
        plain = Evaluator(self.model, self.vocab, self.codebook, self.source, None, batch=self.batch)
        samples = plain.outputs(examples, temperature or 1.0, guidance, seed, group * self.n)
        asked, chosen = [e for e in examples for _ in range(group)], []
        for start in range(0, len(asked), 128):
            part, n = asked[start : start + 128], self.n
            some = samples[start * n : (start + len(part)) * n]
            rewards = self.rewards.total(self.rewards(self.source, part[0].task, part, some, random.Random(seed)))  # (B, n)
            chosen += [some[i * n + j] for i, j in enumerate(rewards.argmax(1).tolist())]
        return np.stack(chosen) if examples[0].task == "draw" else chosen

    def answers(self, task, n, pools=("paired",)):
        """(N,) bool for ask, reason, judge and caption."""
        return self.answered(self.examples(task, n, pools))

    def answered(self, examples):
        """(N,) bool: which of these are answered right? By the most likely answer."""
        texts = self.outputs(examples, 0.0)
        if examples[0].task == "caption":
            return self.judge.caption(examples, texts)
        return np.array([exact_match(t, e.answer) > 0 for t, e in zip(texts, examples)])

    def front(self, pools, temperatures, prompts=128, group=8):
        """One row a temperature: compose, diversity (share distinct), differ and distance, over prompts x group pictures."""
        examples, rows = self.examples("draw", prompts, pools), []
        repeated = [e for e in examples for _ in range(group)]
        for t in temperatures:
            pictures = self.outputs(examples, t, group=group)
            right = self.judge.draw(repeated, pictures)[0].reshape(prompts, group)
            distinct, differ, distance = diversity(pictures.reshape(prompts, group, *pictures.shape[1:]), right)
            rows.append({"temperature": t, "compose": round(float(right.mean()), 4), "diversity": tidy(distinct),
                         "differ": tidy(differ), "distance": tidy(distance)})  # fmt: skip
        return rows

    @torch.no_grad()
    def caption_logprobs(self, examples, texts):
        """log p(text | picture) of M texts for each of N pictures, (N, M), under the caption task."""
        device, vocab = self.model.head.device, self.vocab
        codes = self.codebook.encode(np.stack([e.picture for e in examples]))
        asked = vocab.batch([e._replace(prompt="", answer="") for e in examples], codes, device)
        written = [torch.tensor(vocab.encode(t) + [EOS], device=device) for t in texts]
        found = torch.empty(len(examples), len(texts))
        for which in np.array_split(sorted(range(len(texts)), key=lambda j: len(written[j])), 4):  # texts of like length
            some = torch.nn.utils.rnn.pad_sequence([written[j] for j in which], True, PAD)  # (m, T)
            for i in range(0, len(examples), 16):  # pictures at a time
                pictures = Batch(*(x[i : i + 16] for x in asked))
                tail = some.repeat(len(pictures.tokens), 1)  # every text for every picture
                hidden = completion_states(self.model, pictures, tail, torch.full_like(tail, -1))
                lo, hi = torch.full_like(tail, EOS), torch.full_like(tail, vocab.n_text)
                logprobs = selected_logprobs(hidden, self.model.head, tail.clamp(min=EOS), lo=lo, hi=hi)
                found[i : i + 16, which] = torch.where(tail != PAD, logprobs, 0.0).sum(1).view(-1, len(which)).cpu()
        return found

    def retrieval(self, n, size=64):
        """R@1 among `size` candidates, both ways, from at least n queries: (i2t (N,) bool, t2i (N,) bool, chance level)."""
        rng, found, chance = random.Random(f"{self.split}/{self.seed}/{self.source.name}/retrieval"), [], []
        for _ in range(math.ceil(n / size)):
            examples = self.source.lookalikes(rng, size, self.split)
            texts = [e.answer for e in examples]
            also = np.stack([self.judge.caption([e] * size, texts) for e in examples]) & ~np.eye(size, dtype=bool)
            found.append(ranked_first(self.caption_logprobs(examples, texts).cpu().numpy(), also))
            chance.append(np.mean([1 / (size - also.sum(axis)) for axis in (0, 1)]))
        return *np.concatenate(found, 1), float(np.mean(chance))

    @torch.no_grad()
    def text_nll(self, n):
        """Negative log-likelihood of held-out clean captions, nats a token."""
        device = self.model.head.device
        examples = self.examples("text", n)
        batch = self.vocab.batch(examples, torch.zeros(n, self.vocab.n_patches, dtype=torch.long), device).trim()
        hidden, mask = self.model(batch.target[:, :-1], batch.patch[:, :-1]), batch.mask[:, 1:]
        logprobs = selected_logprobs(hidden, self.model.head, batch.target[:, 1:], lo=batch.lo[:, 1:], hi=batch.hi[:, 1:])
        sums, counts = -torch.where(mask, logprobs, 0.0).sum(1), mask.sum(1)
        return average((sums / counts).cpu().numpy(), counts.cpu().numpy())  # (E5)


def ranked_first(logprobs, also):
    """logprobs (M, M) of text j given picture i; also (M, M) bool: text j is true of picture i as well, although not its
    own, and no candidate -> (2, M) bool: is a picture's own text first, and a text's own picture?

    Short texts are likely whatever the picture shows; the prior, a text's mean probability over all pictures, is removed.

    >>> ranked_first(np.log([[0.9, 0.3], [0.8, 0.1]]), np.zeros((2, 2), bool)).tolist()  # 0.9/0.85 < 0.3/0.2; 0.9 > 0.8
    [[False, False], [True, False]]
    """
    prior = np.logaddexp.reduce(logprobs, 0, keepdims=True) - math.log(len(logprobs))
    pmi, own = np.where(also, -np.inf, logprobs - prior), np.arange(len(logprobs))  # (E6)
    return np.stack((pmi.argmax(1) == own, pmi.argmax(0) == own))


def frechet(a, b):
    """Frechet distance of two sets of vectors (N, D), (M, D), each taken for a Gaussian; >= 0. Source: arXiv:1706.08500.

    >>> round(frechet(np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])), 6)  # means 1 and 5, std sqrt 2 and 2 sqrt 2
    18.0
    """
    (m, c), (n, d) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ d @ root).clip(min=0)).sum()  # trace of the root of c d
    return float(np.square(m - n).sum() + np.trace(c) + np.trace(d) - 2 * both)  # (E7)


@torch.no_grad()
def embed(clip, pictures, batch=512):
    """Pictures (N, S, S, 3) uint8 -> what a CLIP makes of each, (N, D) on the CPU."""
    return torch.cat([clip.embed_image(part).cpu() for part in np.array_split(pictures, math.ceil(len(pictures) / batch))]).numpy()


def tidy(x):
    """Four digits, or None for what is not a number: JSON has no nan."""
    return None if math.isnan(x) else round(x, 4)


TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
METRICS = {  # group: metrics; those that no task of a run gives are null
    "understanding": ("vqa", "vqa_three", "vqa_val", "retrieval_i2t_r1", "retrieval_t2i_r1", "caption", "caption_three", "tell",
                      "tell_sentences", "tell_three"),
    "generation": ("compose", "compose_heldout", "compose_pairs", "compose_unprompted", "clip_score", "frechet", "frechet_floor", "story",
                   "story_frames", "story_consistent", "story_three", "plan_compose", "plan_compose_heldout", "plan_compose_pairs",
                   "plan_compose_unprompted", "plan_true", "plan_followed", "diversity", "diversity_heldout"),
    "reasoning": ("visual", "visual_three", "visual_val", "visual_consistency", "multihop", "multihop_three", "multihop_val",
                  "multihop_consistency", *(f"{task}_{hops}" for hops in (1, 2, 3) for task in ("hops", "steps")), "steps_worked"),
    "language": ("text_nll",),
}


def measure(evaluator, clip, n=1000):
    """Every metric of one model on one source: {group: {metric: {"value", "low", "high", "n"} or None}}; a breakdown of the
    drawings by kind of statement and of the answers by kind of question; and the outcome of every single item, {metric: list}, to
    pair methods by."""
    e, judge, tasks, found, breakdown, items = evaluator, evaluator.judge, evaluator.source.tasks, {}, {}, {}

    def note(metric, outcomes, cell, **more):
        found[metric], items[metric] = cell(outcomes) | more, np.round(outcomes * 1, 4).tolist()

    if judge.pools:
        found |= measure_drawings(e, clip, n, note, breakdown)
    for metric, pools in judge.pools.items() if "plan" in tasks else ():
        examples = e.examples("plan", n, pools)
        outputs = e.outputs(examples)
        note(f"plan_{metric}", judge.draw(examples, np.stack([picture for _, picture in outputs]))[0], rate)
        if metric == "compose_heldout":
            for name, right in zip(("true", "followed"), judge.plan(examples, outputs)):
                note(f"plan_{name}", right, rate)
    for three, pools in {"": ("paired",), "_three": ("three",)}.items() if "story" in tasks else ():
        examples = e.examples("story", n, pools)
        frames, same = judge.story(examples, e.outputs(examples))
        note(f"story{three}", frames.all(1) & same, rate)  # (E8)
        if not three:
            note("story_frames", frames.flatten(), rate)
            note("story_consistent", same, rate)
    for three, pools in {"": ("paired",), "_three": ("three",)}.items() if "tell" in tasks else ():
        examples = e.examples("tell", n, pools)
        shares = np.array([sentences_right(text, x.answer) for text, x in zip(e.outputs(examples, 0.0), examples)])
        note(f"tell{three}", shares == 1, rate)
        if not three:
            note("tell_sentences", shares, average)
    for task in [t for t in ("hops", "steps") if t in tasks]:  # of one and two hops about two objects, of three hops about three
        examples = e.examples(task, 2 * n, ("paired", "three"))
        texts, hops = e.outputs(examples, 0.0), np.array([x.truth[1] for x in examples])
        right = np.array([exact_match(text, x.answer) > 0 for text, x in zip(texts, examples)])
        for k in sorted(set(hops)):  # few items may not have all
            note(f"{task}_{k}", right[hops == k], rate)
        if task == "steps":
            worked = [text.startswith(f"<think> {x.truth[2]} </think>") for text, x in zip(texts, examples) if x.truth[1] == 3]
            note("steps_worked", np.array(worked), rate)
    if isinstance(e.source, Asked):
        measure_asked(e, n, note)
    for metric, task in {"vqa": "ask", "caption": "caption", "multihop": "reason", "visual": "judge"}.items():
        if task in tasks and metric not in found:
            note(metric, right := e.answers(task, n), rate)
            if task == "ask":
                kinds = np.array([" ".join(x.prompt.split()[:2]) for x in e.examples(task, n)])  # how many, where is, ...
                breakdown[metric] = {kind: float(right[kinds == kind].mean()) for kind in sorted(set(kinds))}
            if e.source.name == "synthetic":
                note(f"{metric}_three", e.answers(task, n, ("three",)), rate)
    if "caption" in tasks:
        *both_ways, chance = e.retrieval(n)
        for metric, right in zip(("retrieval_i2t_r1", "retrieval_t2i_r1"), both_ways):
            note(metric, right, rate, chance=round(chance, 4))
    if "text" in tasks:
        found["text_nll"] = e.text_nll(n)
    return {g: {m: found.get(m) for m in names} for g, names in METRICS.items()}, breakdown, items


def measure_drawings(e, clip, n, note, breakdown):
    """One picture a prompt at temperature 1, by the judge and by the second CLIP; returns {metric: cell} of the distances between
    all real pictures and all drawn ones, which have no single items to note."""
    distances = {}
    for metric, pools in e.judge.pools.items():
        examples = e.examples("draw", 2 * n if metric == "compose" else n, pools)
        pictures = e.outputs(examples)
        right, breakdown[metric] = e.judge.draw(examples, pictures)
        note(metric, right, rate)
        if metric == "compose":
            note("clip_score", clip_score(clip, e.vocab, pictures, [x.prompt for x in examples]).cpu().numpy(), average)
            real, other = (np.stack([x.picture for x in some]) for some in (examples, e.examples("caption", 2 * n, pools)))
            seen = [embed(clip, x) for x in (pictures, real, other)]
            for name, ours in {"frechet": seen[0], "frechet_floor": seen[1]}.items():
                distances[name] = {"value": round(frechet(ours, seen[2]), 5), "low": None, "high": None, "n": 2 * n}
    return distances


def measure_asked(evaluator, n, note):
    """Right answers of SHAPES ("vqa") or NLVR ("visual") at once, and with steps ("multihop"), on the reported split and on "val",
    beside the majority class in round brackets; for NLVR also how many sentences are judged right of all their pictures."""
    tasks = {"ask": "vqa", "judge": "visual", "reason": "multihop"}
    for name, task, split in [(metric + end, task, split) for task, metric in tasks.items() if task in evaluator.source.tasks
                              for end, split in (("", evaluator.split), ("_val", "val"))]:  # fmt: skip
        asked = copy.copy(evaluator)
        asked.split = split
        examples = asked.examples(task, n)
        answers, right = Counter(e.answer for e in examples), asked.answered(examples)
        (majority, most), *_ = answers.most_common(1)
        note(name, right, rate, chance=round(most / len(examples), 4))
        if evaluator.source.name == "nlvr" and not name.endswith("_val"):
            alike, always = defaultdict(list), defaultdict(list)  # by sentence
            for e, ok in zip(examples, right):
                alike[e.truth].append(bool(ok))
                always[e.truth].append(e.answer == majority)
            share = np.mean([all(some) for some in always.values()])
            note(f"{name}_consistency", np.array([all(some) for some in alike.values()]), rate, chance=round(float(share), 4))


def sweep(evaluator, temperatures=TEMPERATURES, prompts=128, group=8):
    """The fronts: one row a temperature, with compose and diversity for seen and for never-seen prompts; and stories, one each."""
    pools = [p for p in ("compose", "compose_heldout") if p in evaluator.judge.pools]
    fronts = [evaluator.front(evaluator.judge.pools[p], temperatures, prompts, group) for p in pools]
    rows = fronts[0] if fronts else []
    for extra in fronts[1:]:
        for row, more in zip(rows, extra):
            row |= {f"{k}_heldout": v for k, v in more.items() if k != "temperature"}
    examples = evaluator.examples("story", prompts) if "story" in evaluator.source.tasks else ()
    for row in rows if examples else ():
        frames, same = evaluator.judge.story(examples, evaluator.outputs(examples, row["temperature"]))
        row["story"] = round(float((frames.all(1) & same).mean()), 4)
    return rows


def evaluate(models, vocab, codebook, source, judge, clip, n=1000, seed=0, prompts=128, group=8, rewards=None, known=None):
    """The numbers of eval.json for {"base": model, "aligned": model} (meta is the caller's), and "items", see measure.

    rewards: "aligned" is best-of-N by these. known: an earlier result, whose base is this one on the same scenes."""
    parts = ("sweep", "breakdown", "best_temperature", "items")
    result = {part: {} for part in parts} | {"judge_accuracy": getattr(judge, "accuracy", 1.0)}
    for name, model in models.items():
        if known and name == "base":
            result[name] = known[name]
            for part in parts:
                result[part] |= {name: known[part][name]} if name in known[part] else {}
            continue
        test, val = (Evaluator(model, vocab, codebook, source, judge, split, seed, rewards=rewards if name == "aligned" else None)
                     for split in ("test", "val"))  # fmt: skip
        result[name], result["breakdown"][name], result["items"][name] = measure(test, clip, n)
        result["sweep"][name] = rows = sweep(test, TEMPERATURES, prompts, group)
        if not rows:  # nothing is drawn
            continue
        chosen = max(val.front(judge.pools["compose"], TEMPERATURES, max(prompts // 2, 2), 2), key=lambda row: row["compose"])
        result["best_temperature"][name] = chosen["temperature"]
        for key in ("diversity", "diversity_heldout"):  # at temperature 1
            if key in rows[-1]:
                result[name]["generation"][key] = {"value": rows[-1][key], "low": None, "high": None, "n": prompts * group}
    return result


# ---------------------------------------------------------------- tables


def table(result):
    """eval.json as text: base beside aligned, metric by metric, then the fronts."""
    models = [m for m in ("base", "aligned") if m in result]
    lines = [f"{'':22}" + "".join(f"{m:>30}" for m in models)]
    for group, metrics in METRICS.items():
        for metric in metrics:
            cells = [result[m][group].get(metric) for m in models]
            if any(cells):
                lines.append(f"{metric:22}" + "".join(f"{show(c):>30}" for c in cells))
    if not result["best_temperature"]:  # nothing was drawn
        return "\n".join([*lines, "in round brackets: the share of the majority class"])
    lines.append(f"\n{'temperature':22}" + "".join(f"{f'{m}: quality @ diversity':>34}" for m in models))
    for rows in zip(*(result["sweep"][m] for m in models)):
        cells = [" | ".join(f"{100 * r[q]:.0f} @ {100 * (r[d] or 0):.0f}" for q, d in (
            ("compose", "diversity"), ("compose_heldout", "diversity_heldout")) if q in r) for r in rows]
        lines.append(f"{rows[0]['temperature']:<22}" + "".join(f"{c:>34}" for c in cells))
    if result.get("judge_accuracy", 1) < 1:
        lines.append(f"the judge itself is right on {result['judge_accuracy']:.1%} of real test pictures")
    lines.append("in round brackets: chance level; frechet: in the space of the second CLIP, frechet_floor: real against real pictures")
    best = ", ".join(f"{m} {result['best_temperature'][m]}" for m in models)
    lines.append(f"best temperature, chosen on validation prompts: {best}")
    if "compose_heldout" in rows[0]:
        lines.append("left of |: prompts as in the captions of pictures; right: three objects, whose pictures never came with a caption")
    return "\n".join(lines)


def by_source(result):
    """The parts of an eval.json: {data set: its numbers}."""
    return result.get("sources") or {result["meta"]["data"]: result}


def tables(result):
    """The table of every data set of a run, each under its name where there are several."""
    parts = by_source(result)
    return "\n\n".join((f"{name}\n" if len(parts) > 1 else "") + table(part) for name, part in parts.items())
# ---------------------------------------------------------------- a run on one page

MARKS = {"green": ("#1a7f37", "good"), "amber": ("#9a6700", "look"), "red": ("#cf222e", "act")}  # colour and word of a check
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1f2328;max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid #d1d9e0}
.facts{color:#59636e;overflow-wrap:anywhere}.scroll{overflow-x:auto}.scroll img{display:block;min-width:46rem;max-width:100%}
ul{list-style:none;padding:0}li{display:grid;grid-template-columns:4.2rem 1fr;gap:.2rem .8rem;padding:.5rem 0}
li+li{border-top:1px solid #eef1f4}
.mark{color:#fff;border-radius:.8rem;text-align:center;height:1.5rem;font-weight:600}
.do{grid-column:2;color:#59636e}.do::before{content:"\\2192  "}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}tr+tr td{border-top:1px solid #eef1f4}
td,th{padding:.2rem .8rem .2rem 0;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}
pre{white-space:pre-wrap;overflow-wrap:anywhere}.wide{white-space:pre}summary{cursor:pointer;color:#0969da}
@media(max-width:40rem){td{white-space:normal}td,th{padding-right:.5rem}table{font-size:.9rem}}
"""


def read_log(path):
    """The rows of metrics.csv or timing.csv as dicts, [] without that file. A last line that was cut short does not count.
    ValueError where they are not rows of a log."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(line for line in f if line.endswith("\n")))
        for r in rows:
            r["stage"], int(r["step"])
        return rows
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"[:100]
        raise ValueError(f"{path} is damaged ({found}); repair that line, or start again with another --out") from error


ADVICE = {  # of each check: what to do when it is not green
    "reward and judge": "stop earlier, raise --kl-coef or --ptx-coef, or mend the reward",
    "variety": "stop earlier, or raise --kl-coef, --ptx-coef or --temperature",
    "spread": "ask harder prompts, raise --group-size or --temperature, or train the base for longer",
    "KL": "raise --kl-coef or lower --grpo-lr, and look at the pictures: far from the base a reward means less",
    "entropy": "raise --kl-coef or --ptx-coef, or lower --grpo-lr: what has no entropy explores nothing",
    "clipping": "take fewer --epochs or a lower --grpo-lr",
    "skipped steps": "lower the learning rate of that stage",
    "reward": "give it more --clip-steps or --clip-edits before it is optimised",
}


def health(folder):
    """What a reader should know of a run before its numbers, by its metrics.csv and by what the reward made of the aligned
    model's drawings: a list of {"what", "mark": "green", "amber" or "red", "says", "do"}. The limits are rules of thumb."""
    rows, found = read_log(folder / "metrics.csv"), []
    log = [r for r in rows if any(v for k, v in r.items() if k.startswith("reward_"))]

    def ends(column, share):
        """Means of the first and of the last share of a column's values; not numbers without any."""
        values = [float(r[column]) for r in log if r.get(column)]
        n = max(1, round(share * len(values)))
        return (np.mean(values[:n]), np.mean(values[-n:])) if values else (math.nan, math.nan)

    def lasts(prefix):
        """{task: mean over the last quarter of the steps}."""
        columns = [k for k in (log[0] if log else ()) if k.startswith(prefix)]
        return {k.removeprefix(prefix): value for k in columns if not math.isnan(value := ends(k, 0.25)[1])}

    def note(what, says, red=False, amber=False):
        mark = "red" if red else "amber" if amber else "green"
        found.append({"what": what, "mark": mark, "says": says, "do": ADVICE[what] if mark != "green" else ""})

    (reward, rewarded), (before, after), (varied, left) = ends("reward_draw", 0.1), ends("val_compose", 0.01), ends("val_diversity", 0.01)
    rises, moved = rewarded > reward, f"from {reward:.2f} to {rewarded:.2f}"
    if not math.isnan(before):
        hacked, judged = rises and after < before - 0.1, f"from {before:.2f} to {after:.2f}"
        note("reward and judge", f"the reward of drawings rose {moved} while the judge's score fell {judged}: the reward is being hacked"
             if hacked else f"the reward of drawings went {moved}, the judge's score {judged}", hacked)  # fmt: skip
    if not math.isnan(varied):
        dull, shares = rises and left < 0.6 * varied, f"from {varied:.2f} to {left:.2f}"
        note("variety", f"the reward of drawings rose {moved} while the share of distinct pictures fell {shares}: the policy collapses"
             if dull else f"the share of distinct pictures among the correct ones went {shares}", dull)  # fmt: skip
    idle, kl, (fresh, stale) = lasts("zero_spread_"), lasts("kl_"), ends("entropy_draw", 0.1)
    for task in (task for task, share in idle.items() if share > 0.9):
        says = f"{idle[task]:.0%} of the last groups to {task} have no spread: nothing is left to learn there, or nothing succeeds"
        note("spread", says, amber=True)
    if idle and max(idle.values()) <= 0.9:
        note("spread", f"groups without any spread of rewards: {', '.join(f'{share:.0%} to {task}' for task, share in idle.items())}")
    if kl:
        far = max(kl, key=kl.get)
        note("KL", f"the last steps are {kl[far]:.2g} nats a token from the base, to {far} the furthest", kl[far] > 2, kl[far] > 0.5)
    if fresh > 0:
        says = f"the entropy of drawings went from {fresh:.2f} to {stale:.2f} nats a token"
        note("entropy", says, stale < 0.2 * fresh, stale < 0.5 * fresh)
    if low := lasts("clip_low_"):
        share = max(low[task] + high for task, high in lasts("clip_high_").items())
        note("clipping", f"{share:.0%} of the ratios are outside the clip range, in the task with most", share > 0.4, share > 0.2)
    if rows:
        skipped = {r["stage"]: float(r.get("skipped") or 0) for r in rows}  # a count: the last row of a stage has all
        where = f" ({', '.join(stage for stage, n in skipped.items() if n)})" if any(skipped.values()) else ""
        says = f"{sum(skipped.values()):.0f} of {len(rows)} steps{where} were skipped, because loss or gradient was not finite"
        note("skipped steps", says, amber=bool(where))
    path = folder / "reward_validity_aligned.json"
    for what, share in json.loads(path.read_text(encoding="utf-8")).items() if path.exists() else ():
        if share < 0.85 and len(what.split()) == 3:
            says = f"the reward sees only {share:.0%} of the faults of this kind in the aligned model's drawings: {what}"
            note("reward", says, amber=True)
    return found


def report(folder):
    """A finished run as one self-contained page of HTML: health, pictures before and after, numbers, curves, configuration."""
    result, say = read_result(folder), lambda x: html.escape(str(x))
    meta = result["meta"]
    title = f"{meta['method']}, seed {meta['seed']}, {meta['data']}, {meta['preset']} preset"

    def picture(name):
        data = base64.b64encode((folder / name).read_bytes()).decode() if (folder / name).is_file() else ""
        return f'<div class="scroll"><img src="data:image/png;base64,{data}" alt="{name}"></div>' if data else "<p>not part of this run</p>"

    def check(c):
        (color, word), do = MARKS[c["mark"]], f'<div class="do">{say(c["do"])}</div>' * bool(c["do"])
        mark = f'<span class="mark" style="background:{color}">{word}</span>'
        return f"<li>{mark}<div><b>{say(c['what'])}</b>: {say(c['says'])}</div>{do}</li>"

    def rows(lines, cell="td"):
        return "".join("<tr>" + "".join(f"<{cell}>{say(x)}</{cell}>" for x in line) + "</tr>" for line in lines)

    cells = [(m, *(result[name][group].get(m) for name in ("base", "aligned"))) for group in METRICS for m in METRICS[group]]
    metrics = rows([("", "base", "aligned")], "th") + rows([(m, show(a), show(b)) for m, a, b in cells if a or b])
    facts = "\n".join(f"{k}: {meta[k]}" for k in ("command", "commit", "machine", "versions", "seconds"))
    path = folder / "samples" / "transcripts.txt"
    thoughts = f"<h2>Questions of three hops</h2><pre>{say(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""
    stories = picture("samples/stories.png") if (folder / "samples" / "stories.png").is_file() else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{say(title)}</title><style>{STYLE}</style><h1>{say(title)}</h1><p class="facts">{say(meta["command"])}</p>
<h2>Health</h2><ul>{"".join(map(check, health(folder))) or "<li>nothing was learned here</li>"}</ul>
<h2>Before and after</h2><p class="facts">The same prompts and the same noise; green frames are right by the judge.</p>
{picture("samples/before_after.png")}{stories}
<h2>Test scenes</h2><div class="scroll"><table>{metrics}</table></div><details><summary>Fronts and notes</summary>
<div class="scroll"><pre class="wide">{say(tables(result))}</pre></div></details>
{thoughts}<h2>Curves</h2>{picture("curves.png")}
<h2>Run</h2><pre>{say(facts)}</pre>
<details><summary>Configuration</summary><pre>{say(json.dumps(meta["config"], indent=1))}</pre></details></html>
"""


def show(cell):
    """A number with its interval, and its chance level in round brackets."""
    if cell is None or cell["value"] is None:
        return "-"
    interval = f" [{cell['low']:.3f}, {cell['high']:.3f}]" if cell["low"] is not None else ""
    return f"{cell['value']:.3f}" + interval + (f" ({cell['chance']:.3f})" if "chance" in cell else "")


def read_result(folder):
    """eval.json of a run. ValueError where it is missing or damaged."""
    path = Path(folder) / "eval.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: has this run finished? `python train.py --resume --out {folder}` goes on")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        [result["meta"][k] for k in ("method", "seed", "data")]
        numbers(result, "base"), numbers(result, "aligned"), table(result)  # all that is shown of it
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        again = f"`python train.py --resume --stage eval --out {folder}` makes it again"
        raise ValueError(f"{path} is damaged ({str(error)[:100]}); {again}") from error
    return result


def compare(folders):
    """Methods side by side as text, a table a data set: mean over seeds with a 95% interval (Student's t), and paired differences
    to the first method."""
    results = [read_result(folder) for folder in folders]
    found, metas = defaultdict(lambda: defaultdict(dict)), [result["meta"] for result in results]  # data set: method: seed: numbers
    if len({(m["method"], m["seed"]) for m in metas}) < len(metas) or len({m["data"] for m in metas}) > 1:
        raise ValueError(f"--compare {' '.join(map(str, folders))}: expected runs on the same data, each method and seed once")
    for result in results:
        method, seed = result["meta"]["method"], result["meta"]["seed"]
        for name, part in by_source(result).items():
            found[name][method][seed] = numbers(part, "aligned")
            found[name]["base"][seed] = numbers(part, "base")
    return "\n\n".join((f"{name}\n" if len(found) > 1 else "") + comparison(runs) for name, runs in found.items())


def comparison(runs):
    """The table of {method: {seed: numbers}}. Fronts are compared at each one's best temperature (chosen on validation) and at
    equal diversity: the most that all of them reach, by either measure of (E2)."""
    first, *others = sorted(runs, key=lambda m: (m == "base", m != "lvrpo", m))
    for seed in set.intersection(*(set(r) for r in runs.values())):
        for column, measure in itertools.product(("", "_heldout"), ("diversity", "differ")):
            fronts = {m: runs[m][seed]["front"] for m in runs}
            common = min(max((row.get(measure + column) or 0 for row in rows), default=0) for rows in fronts.values())
            for m, rows in fronts.items():
                runs[m][seed][f"compose{column} @ {measure}"] = quality_at(rows, common, column, measure) if common else None
    heads = [f"{m} (n={len(runs[m])})" for m in (first, *others)] + [f"{first} - {m}" for m in others]
    lines = [f"{'':30}" + "".join(f"{h:>20}" for h in heads)]
    for metric in next(iter(runs[first].values())):
        values = {m: {s: r[metric] for s, r in by_seed.items() if r.get(metric) is not None} for m, by_seed in runs.items()}
        if metric != "front" and any(values.values()):
            cells = [over_seeds(list(values[m].values())) for m in (first, *others)]
            cells += [over_seeds([values[first][s] - values[m][s] for s in values[first] if s in values[m]]) for m in others]
            lines.append(f"{metric:30}" + "".join(f"{c:>20}" for c in cells))
    return "\n".join(lines)


def numbers(result, model):
    """{metric: value} of one model and data set of an eval.json: at temperature 1, at its best temperature, and its front."""
    flat = {m: (cell or {}).get("value") for group in METRICS for m, cell in result[model][group].items()}
    best = next((row for row in result["sweep"][model] if row["temperature"] == result["best_temperature"][model]), {})
    return flat | {f"{k} @ best T": v for k, v in best.items() if not k.startswith("distance")} | {"front": result["sweep"][model]}


def quality_at(rows, diversity, column="", measure="diversity"):
    """The best quality a front offers at this diversity or more, between two temperatures by linear interpolation.

    >>> quality_at([{"compose": 0.9, "diversity": 0.2}, {"compose": 0.7, "diversity": 0.6}], 0.4)
    0.8
    """
    points = sorted((row[measure + column] or 0.0, row[f"compose{column}"]) for row in rows)
    best = max((q for d, q in points if d >= diversity), default=None)
    for (d0, q0), (d1, q1) in itertools.pairwise(points):
        if d0 < diversity <= d1:
            best = max(best, q0 + (q1 - q0) * (diversity - d0) / (d1 - d0))
    return best if best is None else round(best, 4)


def over_seeds(values):
    """'mean +- half-width' of a 95% interval with Student's t.

    >>> over_seeds([0.5, 0.6, 0.7])
    '0.600 ± 0.248'
    """
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0 + 2.5 / (len(values) - 1))
    return f"{np.mean(values):.3f} ± {t * np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


# ---------------------------------------------------------------- a finished run: load it, ask it


def load_model(folder, vocab, codebook, config, name="aligned", device="cpu"):
    """The transformer of a run: name is "base" or "aligned". ValueError if that checkpoint is not there or not this model's."""
    path = Path(folder) / f"{name}.safetensors"
    model = Transformer(ModelConfig(vocab.size, codebook.side, config["width"], config["layers"], config["heads"])).to(device)
    load_weights(model, path)
    return model


def load_weights(module, path):
    """Read a module's weights from a .safetensors file; ValueError names what is wrong with it."""
    again = f"`python train.py --resume --out {Path(path).parent}`"
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there: has this stage finished? {again} goes on")
    try:
        weights = read_tensors(path)
        module.load_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and {again} makes it again") from error
    except RuntimeError as error:  # other names or shapes
        raise ValueError(f"{path} cannot be used ({' '.join(str(error).split())[:150]}): it is of another configuration") from error
    if not all(w.isfinite().all() for w in weights.values()):
        raise ValueError(f"{path} holds weights that are not finite; delete it and {again} makes it again")


def load_run(folder):
    """(config dict, codebook, vocab) of a run directory. ValueError if it is none."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entries = read_tensors(folder / "codebook.safetensors")["entries"]
        codebook = Codebook(entries, config["patch"])
        whole = ("jitter", "width", "layers", "heads", "clip_width", "seed", "eval_items", "eval_prompts")
        for name, kind in {"data": str, "data_dir": str, "tasks": str, **dict.fromkeys(whole, int)}.items():
            if not isinstance(config[name], kind):
                raise ValueError(f"{name} in config.json is {config[name]!r}")
        return config, codebook, Vocabulary.load(folder, len(entries), codebook.side**2)
    except Exception as error:  # json, safetensors, tokenizers and the operating system raise many kinds
        found = " ".join(str(error).split())[:200]
        way = f"python train.py --out {folder}"
        raise ValueError(f"{folder} is not a finished run ({found}); make one with `{way}`, go on with `{way} --resume`") from error


def load_clip(folder, name, vocab, config, device="cpu"):
    """A CLIP of a run: name is "clip", which rewards, or "clip_report"."""
    clip = CLIP(vocab.n_text, config["patch"], width=config["clip_width"]).to(device)
    load_weights(clip, Path(folder) / f"{name}.safetensors")
    return clip.eval()


def judges(config, sources=None):
    """(source, judge) for every data set of a run."""
    sources = sources or make_sources(config["data"], config["data_dir"], config["jitter"], tasks=config["tasks"].split(","))
    kinds = {"synthetic": lambda source: WorldJudge("draw" in source.tasks), "fashion_mnist": FashionJudge}
    return [(source, kinds.get(source.name, lambda source: KeyJudge())(source)) for source in sources]


# ---------------------------------------------------------------- ablations: many short runs from one base

INHERITED = ("data", "tasks", "patch", "codes", "jitter", "width", "layers", "heads", "clip_width")  # a base decides them
SHORT = {"group_size": 8, "prompts": 16, "grpo_steps": 30, "eval_items": 256, "eval_prompts": 24}
ABLATIONS = {  # name: {variant: flags}; as many steps from the same base for all; no flags: the defaults, one run for all ablations
    "group": {f"{g} x {p} prompts": {"group_size": g, "prompts": p} if g * p != 128 or g != 8 else {} for g, p in (
        (2, 64), (4, 32), (8, 16), (16, 8), (2, 16), (4, 16), (16, 16))},  # four at equal samples, then at equal prompts
    "kl": {"0": {"kl_coef": 0}, "0.01": {"kl_coef": 0.01}, "0.02": {}, "0.05": {"kl_coef": 0.05}, "0.2": {"kl_coef": 0.2}},
    "reward": {"rule": {}, "learned": {"reward": "learned"}, "mix": {"reward": "mix"}},
    "pairs": {n: {"reward": "learned", "stage": "preference", "pair_limit": n} for n in ("100", "1000", "10000")},
}  # fmt: skip


def trained(out, **flags):
    """Run train.py with these flags, in a process of its own; a finished run stays as it is, a started one goes on."""
    out = Path(out)
    if (out / "config.json").is_file():
        stored = json.loads((out / "config.json").read_text(encoding="utf-8"))
        other = [k for k, v in flags.items() if k not in ("device", "threads", "stage") and type(stored[k])(v) != stored[k]]
        if other:
            raise ValueError(f"{out} is a run with another {', '.join(other)}; delete it or choose another folder")
    if not ((out / "eval.json").is_file() or (flags.get("stage") == "preference" and (out / "preference_validity.json").is_file())):
        words = [w for k, v in (flags | {"out": out}).items() for w in (f"--{k.replace('_', '-')}", str(v))]
        resume = ["--resume"] if (out / "config.json").is_file() else []
        print(f"train.py {' '.join(words + resume)}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *words, *resume]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"the run {out} failed, see above; the same command goes on")
    return out


def last_of(folder, column, share=0.25):
    """The mean of a column of metrics.csv over the last part of the steps that have it; None without any."""
    values = [float(r[column]) for r in read_log(folder / "metrics.csv") if r.get(column)]
    return float(np.mean(values[-max(1, round(share * len(values))) :])) if values else None


def outcome(folder):
    """What an ablation shows of one run: {column: number or None}."""
    if not (folder / "eval.json").is_file():
        report = next(iter(json.loads((folder / "preference_validity.json").read_text(encoding="utf-8")).values()))
        return report["accuracy"] | {"calibration error": report["calibration_error"]}
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    cells = {m: c["value"] for group in result["aligned"].values() for m, c in group.items() if c}
    logged = {k: last_of(folder, f"{c}_draw") for k, c in {"reward": "reward", "KL": "kl", "no spread": "zero_spread"}.items()}
    shown = {m: cells.get(m) for m in ("compose", "compose_heldout", "diversity", "vqa", "caption_three", "text_nll")}
    return logged | shown | {"seconds": result["meta"]["seconds"].get("grpo")}


def ablate(name, run, out, seeds=3, jobs=1, **flags):
    """Train every variant of an ablation from the base of a run, with several seeds: a table, and out/NAME.csv and .png.
    jobs: runs at a time, each with its share of the cores."""
    config, out = json.loads((Path(run) / "config.json").read_text(encoding="utf-8")), Path(out)
    flags = SHORT | {k: config[k] for k in ("preset", "data_dir", *INHERITED)} | flags
    flags["threads"] = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        defaults = list(pool.map(lambda seed: trained(out / f"default-{seed}", base=run, seed=seed, **flags), range(seeds)))

        def one(variant, seed):
            change = ABLATIONS[name][variant]
            folder = out / "-".join([*(f"{k}-{v}" for k, v in change.items()), str(seed)])
            return outcome(trained(folder, base=defaults[seed], seed=seed, **(flags | change)) if change else defaults[seed])

        plan, table = [(variant, seed) for variant in ABLATIONS[name] for seed in range(seeds)], {}
        for (variant, _), row in zip(plan, pool.map(lambda key: one(*key), plan)):
            for column, value in row.items():
                table.setdefault(column, {}).setdefault(variant, []).append(value)
    table = {column: values for column, values in table.items() if not any(None in v for v in values.values())}
    with (out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("variant", "seed", *table), *((v, s, *(column[v][s] for column in table.values()))
                                                                 for v in ABLATIONS[name] for s in range(seeds))])  # fmt: skip
    ablation_figure(name, table, out / f"{name}.png")
    lines = [f"{name:18}" + "".join(f"{column:>18}" for column in table)]
    return "\n".join(lines + [f"{v:18}" + "".join(f"{over_seeds(column[v]):>18}" for column in table.values()) for v in ABLATIONS[name]])


def ablation_figure(name, table, path):
    """Reward, judge and diversity side by side: a reward that rises alone is being hacked."""
    from matplotlib.figure import Figure

    titles = {"reward": "reward of drawings, last quarter", "compose": "judge: compose, T=1", "compose_heldout": "judge: three objects",
              "diversity": "diversity, T=1", "text_nll": "text NLL (lower is better)", "all": "held-out pairs in order",
              "calibration error": "calibration error"}  # fmt: skip
    shown = [column for column in titles if column in table]
    figure = Figure(figsize=(3.4 * len(shown), 3.6), layout="constrained")
    for ax, column in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        values = list(table[column].values())
        ax.errorbar(range(len(values)), [np.mean(v) for v in values], [np.std(v) for v in values], fmt="o", capsize=3)
        ax.set_xticks(range(len(values)), list(table[column]), rotation=30, ha="right", fontsize=8)
        ax.set_title(titles[column], fontsize=10)
    figure.suptitle(f"{name}: mean and standard deviation over seeds")
    figure.savefig(path, dpi=90)


def gradient_noise(run, groups=(2, 4, 8, 16), samples=128, repeats=8, device="cpu"):
    """Why a group: {(group size, baseline): (variance of the policy gradient, squared length of its mean)}, of drawings by the
    base of a run. The same candidates are weighed by reward, reward minus batch mean, and reward minus group mean."""
    config, codebook, vocab = load_run(run)
    model, source = load_model(run, vocab, codebook, config, "base", device), judges(config)[0][0]
    rewards, found = Rewards(load_clip(run, "clip", vocab, config, device), vocab), {}
    for group in groups:
        gradients = defaultdict(list)
        for k in range(repeats):
            rng = random.Random(f"noise/{group}/{k}")
            examples = [source.example(rng, "draw", source.prompt_pool(rng, "draw")) for _ in range(samples // group)]
            batch = vocab.batch(examples, codebook.encode(np.stack([e.picture for e in examples])), device)

            def reward(filled, tokens):
                parts = rewards(source, "draw", examples, np.stack(decode(vocab, codebook, "draw", filled, tokens)), rng)
                return rewards.total(parts), parts

            r = rollout(model, batch, group, reward, vocab, torch.Generator(device).manual_seed(k), task="draw")
            group_mean = r.rewards.mean(1, keepdim=True)
            for baseline, mean, size in (("none", 0.0, math.inf), ("batch", r.rewards.mean(), samples), ("group", group_mean, group)):
                model.zero_grad()
                weigh = 1 / (1 - 1 / size)  # a mean with the candidate itself in it takes a share of its own gradient away
                advantages = weigh * (r.rewards - mean).flatten()
                loss, _ = rollout_loss(model, model, r, fused_linear_grpo_loss, advantages=advantages, kl_coef=0.0)
                loss.backward()
                gradients[baseline].append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        for baseline, some in gradients.items():
            every = torch.stack(some)
            noise = float((every - every.mean(0)).square().sum(1).sum() / (repeats - 1))
            signal = float(every.mean(0).square().sum()) - noise / repeats  # without what noise adds to a mean of a few
            found[group, baseline] = noise, max(signal, 0.0)
    return found


# ---------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line, and what was perhaps meant."""

    def error(self, message):
        """ValueError instead of the usage, which would push that line off the screen."""
        word, *others = re.findall(r"[\w-]+", message.split(": ")[-1]) or [""]
        legal = self._option_string_actions if word.startswith("--") else others if "choice" in message else ()
        near = get_close_matches(word, legal, 1)
        raise ValueError(f"{message}; {f'did you mean {near[0]}?' if near else 'see'} --help")


def give_up(program, error):
    """End a command: what its user can mend is one line and exit status 2; any other error is ours and is raised again."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", str(error))):
        error = f"out of memory ({error}); lower --batch, --prompts, --group-size or --width"
    elif not isinstance(error, (ValueError, OSError)):
        raise error
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def check_prompt(flag, text, vocab, most=64):
    """ValueError unless a text has words, known ones, and not far more than any that was trained on."""
    if not 0 < (n := len(vocab.encode(text))) <= most:
        raise ValueError(f"{flag}: found {n} tokens, expected 1 to {most}; try a prompt such as \"a red circle left of a blue square\"")


def draw(folder, prompt, out, name="aligned", temperature=0.5, guidance=0.0, seed=0, device="cpu"):
    """Draw one prompt with a trained run and save the picture, 8 times enlarged."""
    config, codebook, vocab = load_run(folder)
    check_prompt("--draw", prompt, vocab)
    if not (temperature >= 0 and math.isfinite(temperature + guidance)):
        raise ValueError(f"--temperature {temperature} --guidance {guidance}: expected numbers, the temperature 0 or more")
    model = load_model(folder, vocab, codebook, config, name, device)
    example = Example("draw", np.zeros((32, 32, 3), np.uint8), prompt, "")
    picture = Evaluator(model, vocab, codebook, None, None).outputs([example], temperature, guidance, seed)[0]
    if Path(out).suffix not in Image.registered_extensions():
        raise ValueError(f"--out {out}: no kind of picture file is called so; name a .png file")
    with atomically(out) as new:
        Image.fromarray(picture).resize((256, 256), Image.Resampling.NEAREST).save(new)
    return picture


def ask(folder, question, image, name="aligned", device="cpu"):
    """The most likely answer of a trained run to a question about a picture file (scaled to 32x32 if it is larger)."""
    config, codebook, vocab = load_run(folder)
    try:
        picture = np.asarray(Image.open(image).convert("RGB").resize((32, 32), Image.Resampling.NEAREST))
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"--image {image}: cannot be read as a picture ({error}); name a .png file") from error
    check_prompt("--ask", question, vocab)
    model = load_model(folder, vocab, codebook, config, name, device)
    task = "reason" if re.match(r"what \w+ is the (shape|thing) (left|right|above|below)", question) else "ask"
    return Evaluator(model, vocab, codebook, None, None).outputs([Example(task, picture, question, "")], 0.0)[0]


def measured(folder, device):
    """What eval.json of a run would hold, but for some of its "meta"; at the end of training it is measured and written."""
    config, codebook, vocab = load_run(folder)
    if config.get("method") == "best":
        raise ValueError(f"{folder}: the reward chooses here; `python train.py --resume --out {folder}` measures it")
    models = {name: load_model(folder, vocab, codebook, config, name, device) for name in ("base", "aligned")}
    draws = (Path(folder) / "clip_report.safetensors").is_file()
    clip = load_clip(folder, "clip_report", vocab, config, device) if draws else None
    results = {source.name: evaluate(models, vocab, codebook, source, judge, clip, config["eval_items"], config["seed"],
                                     config["eval_prompts"]) for source, judge in judges(config)}  # fmt: skip
    for part in results.values():
        del part["items"]
    meta = {k: config[k] for k in ("preset", "method", "data", "seed")} | {"config": config}
    return {**next(iter(results.values())), **({"sources": results} if len(results) > 1 else {}), "meta": meta}


def main(argv=None):
    """The command line: one of the jobs that the top of this file lists."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", metavar="DIR", help="a run directory of train.py")
    do = parser.add_mutually_exclusive_group()
    do.add_argument("--compare", nargs="+", metavar="DIR", help="run directories: methods side by side, over seeds")
    do.add_argument("--ablate", choices=tuple(ABLATIONS), help="train variants from the base of --run [runs/lvrpo]; see runs/ablate")
    do.add_argument("--draw", metavar="PROMPT", help="draw this")
    do.add_argument("--ask", metavar="QUESTION", help="ask this about --image")
    parser.add_argument("--seeds", type=int, default=3, help="of --ablate [3]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time in --ablate, each with its share of the cores [1]")
    parser.add_argument("--json", metavar="FILE", help="write the numbers of --run there")
    parser.add_argument("--out", metavar="FILE", default="picture.png", help="where --draw saves [picture.png]")
    parser.add_argument("--image", metavar="FILE", help="a picture for --ask")
    parser.add_argument("--model", choices=("base", "aligned"), default="aligned", help="before or after alignment [aligned]")
    parser.add_argument("--temperature", type=float, default=0.5, help="of --draw [0.5]")
    parser.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance of --draw; 0 is none [0]")
    parser.add_argument("--seed", type=int, default=0, help="of --draw [0]")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu [auto]")
    args = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("jobs", 1), ("seed", 0)):
        if not least <= getattr(args, name) < 2**63:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {least} or more, below 2**63")
    if args.compare:
        return print(compare(args.compare))
    if args.ablate and not args.run:
        args.run = "runs/lvrpo"  # what `make train` leaves
    if not args.run:
        raise ValueError("say what to do: --run DIR (see --help), or --compare DIR DIR ...")
    device = pick_device(args.device)[0]
    if args.ablate:
        load_run(args.run)
        print(ablate(args.ablate, args.run, "runs/ablate", args.seeds, args.jobs, device=device.type))
        if args.ablate == "group":
            print("\ngradient of 128 drawings, by the mean that is taken off their rewards")
            for (group, baseline), (noise, signal) in gradient_noise(args.run, device=device).items():
                print(f"group size {group:2}, {baseline:6} variance {noise:.4f}, squared mean {signal:.4f}")
        return None
    if args.draw is not None:
        draw(args.run, args.draw, args.out, args.model, args.temperature, args.guidance, args.seed, device)
        print(f"{args.out}: {args.draw}")
    elif args.ask is not None:
        if not args.image:
            raise ValueError("--ask needs --image FILE")
        print(ask(args.run, args.ask, args.image, args.model, device))
    else:
        load_run(args.run)  # nothing is shown of a damaged run
        result = read_result(args.run) if (Path(args.run) / "eval.json").is_file() else measured(args.run, device)
        if args.json:
            with atomically(args.json) as new:
                new.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        print(tables(result))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        give_up("eval.py", error)
