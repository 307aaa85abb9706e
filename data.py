"""The synthetic world, the public data sets, the vocabulary, and each task as a row of tokens.

A scene is one to three coloured shapes in a 2x2 grid. Its picture, captions, questions and
answers are computed from the scene, so the right answer is always known. Training data is limited
on purpose, so that claims can be tested. A kind is a colour and a shape. We hold out pairs of
kinds that occur together, never a kind: every patch of a held-out picture was seen in training.

  pool      objects  pairs of kinds      pictures with texts   prompts of GRPO  judged as
  paired    1-2      common              yes, noisy captions   yes              compose
  prompted  2        8 "prompted" pairs  never                 yes              compose_pairs
  three     3        none held out       pictures alone,       yes, and         compose_heldout
                                         texts alone           questions
  heldout   3        8 held-out pairs    never                 never            compose_unprompted

Every task is a row of fixed-width spans, so each column has one meaning (see LAYOUTS). Short texts
are padded with <pad>, an ordinary token. A text that the policy writes ends with <eos>; the
padding after it is neither trained nor scored.

Symbols: N rows, L columns, P codes per picture, S pixels per side, V vocabulary (words and codes).
Left out: photographs (Fashion-MNIST and SHAPES are real, but small), subwords (a word is a token).

    $ python data.py        # a scene per pool with its texts, and examples per second; 2 seconds
"""

import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import random
import re
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

# ------------------------------------------------ scenes and pictures

SIDE, CELL = 32, 16  # a picture is 32x32 pixels: two rows and two columns of 16x16 cells
COLORS = {
    "red": (230, 50, 50), "green": (40, 180, 70), "blue": (50, 90, 230), "yellow": (240, 210, 40),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 7, "big": 13}  # width in pixels
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
CELLS = [(row, column) for row in (0, 1) for column in (0, 1)]
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND = (16, 16, 20)
EMPTY = np.full((SIDE, SIDE, 3), BACKGROUND, np.uint8)
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
NOISE = {  # probabilities in pre-training; everything is right more often than wrong
    "wrong": 0.15,  # a word of a caption is wrong
    "omit": 0.15,  # a colour or a shape is left out
    "unrelate": 0.2,  # a relation is left out
    "reverse": 0.2,  # a relation is reversed
    "answer": 0.15,  # an answer is replaced by another word of its kind
}


class Object(NamedTuple):
    """One shape: its look in words, its cell (row and column, 0 or 1) and its shift in pixels."""

    color: str
    shape: str
    size: str
    row: int
    column: int
    dx: int = 0
    dy: int = 0

    @property
    def kind(self):
        return self.color, self.shape

    @property
    def cell(self):
        return self.row, self.column


def shape_mask(shape, width):
    """(width, width) bool: a filled shape. The judge compares pictures with the same masks.

    >>> shape_mask("triangle", 5).astype(int).sum(1).tolist()
    [1, 1, 3, 3, 5]
    """
    y, x = np.mgrid[:width, :width] - (width - 1) / 2
    if shape == "square":
        return np.ones((width, width), bool)
    if shape == "circle":
        return x**2 + y**2 <= (width / 2) ** 2
    return np.abs(x) <= (y + (width - 1) / 2) // 2  # a triangle widens every second line


@functools.cache
def sprite(color, shape, size):
    """(width, width, 3) uint8: one object on the background."""
    mask = shape_mask(shape, SIZES[size])[..., None]
    return np.where(mask, np.uint8(COLORS[color]), np.uint8(BACKGROUND))


def render(scene):
    """Draw a scene, which is a list of Objects: (S, S, 3) uint8 RGB."""
    picture = EMPTY.copy()
    for o in scene:
        width = SIZES[o.size]
        top = o.row * CELL + (CELL - width + 1) // 2 + o.dy
        left = o.column * CELL + (CELL - width + 1) // 2 + o.dx
        picture[top : top + width, left : left + width] = sprite(*o[:3])
    return picture


def related(a, relation, b):
    """Is `a relation b` true? Only cells count: a diagonal neighbour is, say, both left and above.

    >>> a, b = Object("red", "circle", "big", 0, 0), Object("blue", "square", "big", 1, 1)
    >>> related(a, "left of", b), related(a, "below", b)
    (True, False)
    """
    if relation in ("left of", "right of"):
        return a.column < b.column if relation == "left of" else a.column > b.column
    return a.row < b.row if relation == "above" else a.row > b.row


def pairs_of(kinds):
    """All unordered pairs of these kinds."""
    return {frozenset(pair) for pair in itertools.combinations(kinds, 2)}


_pairs = [frozenset((a, b)) for i, a in enumerate(KINDS) for b in KINDS[:i]]
random.Random(0).shuffle(_pairs)
HELDOUT_PAIRS, PROMPT_PAIRS = frozenset(_pairs[:8]), frozenset(_pairs[8:16])  # of 66
COUNTS = {"paired": (1, 2, 2), "prompted": (2,), "three": (3,), "heldout": (3,)}  # object counts


def in_pool(pool, kinds):
    """May a scene or caption with these kinds (colour, shape) belong to `pool`?"""
    pairs = pairs_of(kinds)
    if pool == "heldout":
        return bool(pairs & HELDOUT_PAIRS)
    if pool == "prompted":
        return bool(pairs & PROMPT_PAIRS) and not pairs & HELDOUT_PAIRS
    return not pairs & HELDOUT_PAIRS and (pool == "three" or not pairs & PROMPT_PAIRS)


def sample_scene(rng, pool="paired", jitter=0, count=None):
    """A random scene from a pool: Objects of different kinds in different cells.

    rng: random.Random; jitter: largest shift in pixels; count: objects, if not the pool's choice.
    """
    count = count or rng.choice(COUNTS[pool])
    kinds = rng.sample(KINDS, count)
    while not in_pool(pool, kinds):
        kinds = rng.sample(KINDS, count)
    scene = []
    for kind, cell in zip(kinds, rng.sample(CELLS, count)):
        shift = [rng.randint(-jitter, jitter) for _ in range(2)] if jitter else (0, 0)
        scene.append(Object(*kind, rng.choice(tuple(SIZES)), *cell, *shift))
    return scene


# ------------------------------------------------ captions, and how they go wrong


class Mention(NamedTuple):
    """What a caption says about one object; None where it says nothing. cell is (row, column)."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    cell: tuple | None = None

    def text(self):
        where = f"at the {ROWS[self.cell[0]]} {COLUMNS[self.cell[1]]}" if self.cell else None
        words = ("a", self.size, self.color, self.shape or "shape", where)
        return " ".join(word for word in words if word)

    def fits(self, o):
        """Is everything that is mentioned true of this Object?"""
        truths = (o.color, o.shape, o.size, o.cell)
        return all(word is None or word == truth for word, truth in zip(self, truths))


class Caption(NamedTuple):
    """One mention per object, and optionally the relation of the first object to the second.

    >>> Caption((Mention("red", "circle"), Mention("blue", "square", "big")), "left of").text()
    'a red circle left of a big blue square'
    """

    mentions: tuple
    relation: str | None = None

    def text(self):
        return f" {self.relation or 'and'} ".join(m.text() for m in self.mentions)

    @property
    def kinds(self):
        return [(m.color, m.shape) for m in self.mentions]

    def holds(self, scene):
        """Is the caption true of a scene, with every object mentioned exactly once?

        >>> scene = [Object("red", "circle", "big", 0, 0), Object("blue", "circle", "big", 0, 1)]
        >>> texts = ("a red circle and a blue shape", "a blue circle left of a shape", "a circle")
        >>> [parse_caption(text).holds(scene) for text in texts]
        [True, False, False]
        """
        if len(self.mentions) != len(scene):
            return False
        for objects in itertools.permutations(scene):
            fits = all(m.fits(o) for m, o in zip(self.mentions, objects))
            if fits and (not self.relation or related(objects[0], self.relation, objects[1])):
                return True
        return False


_MENTION = re.compile(
    r"a(?: (small|big))?(?: (red|green|blue|yellow))? (circle|square|triangle|shape)"
    r"(?: at the (top|bottom) (left|right))?"
)
_BETWEEN = re.compile(r" (and|left of|right of|above|below) (?=a )")


@functools.lru_cache(16384)
def parse_caption(text):
    """Parse a text into a Caption, or None if it is not a caption of this grammar.

    >>> parse_caption("a red shape above a big square at the top left").relation
    'above'
    >>> parse_caption("red a circle") is None
    True
    """
    parts = _BETWEEN.split(text)
    matches, between = [_MENTION.fullmatch(part) for part in parts[::2]], parts[1::2]
    too_long = len(matches) > 3 or (len(matches) == 3 and between != ["and", "and"])
    if too_long or not all(matches):
        return None
    mentions = []
    for match in matches:
        size, color, shape, row, column = match.groups()
        cell = (ROWS.index(row), COLUMNS.index(column)) if row else None
        mentions.append(Mention(color, None if shape == "shape" else shape, size, cell))
    relation = between[0] if between and between[0] in INVERSE else None
    return Caption(tuple(mentions), relation)


def true_caption(rng, scene):
    """A random true Caption: every object's colour and shape; sometimes a size, cell, relation."""
    objects = rng.sample(scene, len(scene))
    mentions = []
    for o in objects:
        mentions.append(Mention(*o.kind, o.size if rng.random() < 0.35 else None))
    if len(scene) == 2 and rng.random() < 0.45:
        relations = [r for r in INVERSE if related(objects[0], r, objects[1])]
        return Caption(tuple(mentions), rng.choice(relations))
    if len(scene) < 3 and rng.random() < 0.5:
        mentions[0] = mentions[0]._replace(cell=objects[0].cell)
    return Caption(tuple(mentions))


def replaced(items, i, new):
    """The items as a tuple, with item i replaced by `new`."""
    return (*items[:i], new, *items[i + 1 :])


def _all_edits(mentions, relation):
    """Yield every (kind, Caption) one small edit away; some equal the original caption."""
    slots = (("color", COLORS), ("shape", SHAPES), ("size", SIZES), ("cell", CELLS))
    for i, m in enumerate(mentions):
        for slot, words in slots:
            for word in words if getattr(m, slot) else ():
                kind = "position" if slot == "cell" else slot
                yield kind, Caption(replaced(mentions, i, m._replace(**{slot: word})), relation)
        if len(mentions) > 1:
            yield "drop", Caption(mentions[:i] + mentions[i + 1 :])
        for j, n in enumerate(mentions[:i]):
            if m.color and n.color and m.color != n.color and m.shape != n.shape:
                swapped = replaced(mentions, i, m._replace(color=n.color))
                yield "swap", Caption(replaced(swapped, j, n._replace(color=m.color)), relation)
    if relation:
        yield "relation", Caption(mentions, INVERSE[relation])
    for kind in KINDS if len(mentions) < 3 else ():
        yield "add", Caption((*mentions, Mention(*kind)))


def edits(caption):
    """Yield every (kind, Caption) one small edit away; it usually makes a true caption false.

    kind: color, shape, size, position, relation, swap (two objects exchange colours), drop (one
    object less), add (one more). No edit mentions a kind twice unless the caption already does.

    >>> [e.text() for kind, e in edits(Caption((Mention("red", "circle"),))) if kind == "shape"]
    ['a red square', 'a red triangle']
    """
    repeats = len(caption.kinds) - len(set(caption.kinds))
    for kind, e in _all_edits(*caption):
        if e != caption and len(e.kinds) - len(set(e.kinds)) <= repeats:
            yield kind, e


def scene_edits(scene):
    """Yield every (kind, scene) that is one small edit away; kinds as in `edits`.

    Except: "relation" lets two objects exchange cells, and "twice" adds a kind that is already
    there, which never happens in a true scene.

    >>> scene = [Object("red", "circle", "big", 0, 0)]
    >>> [edited[0].kind for kind, edited in scene_edits(scene) if kind == "shape"]
    [('red', 'square'), ('red', 'triangle')]
    """
    everything = Caption(tuple(Mention(*o.kind, o.size, o.cell) for o in scene))
    for kind, e in edits(everything):
        cells = {m.cell for m in e.mentions}
        if kind == "add" or len(cells) < len(e.mentions):  # two objects in one cell
            continue
        kept = [o for o in scene if kind != "drop" or o.cell in cells]  # with their shifts
        pairs = zip(kept, e.mentions, strict=True)
        yield kind, [Object(m.color, m.shape, m.size, *m.cell, o.dx, o.dy) for o, m in pairs]
    free = [cell for cell in CELLS if cell not in [o.cell for o in scene]]
    for new, size, cell in itertools.product(KINDS, SIZES, free):
        kind = "twice" if new in [o.kind for o in scene] else "add"
        yield kind, [*scene, Object(*new, size, *cell, scene[0].dx, scene[0].dy)]
    for a, b in itertools.combinations(scene, 2):
        cells = {a: b.cell, b: a.cell}
        yield "relation", [Object(*o[:3], *cells.get(o, o.cell), *o[5:]) for o in scene]


def by_kind(pairs):
    """(kind, value) pairs -> {kind: [values]}, in the order of first appearance."""
    groups = {}
    for kind, value in pairs:
        groups.setdefault(kind, []).append(value)
    return groups


@functools.lru_cache(16384)
def legal_edits(text, allow_held_out, longest):
    """The legal edits of a caption as texts, one list per kind; [] if the text is not a caption.
    World.negatives says what is legal."""
    caption, legal = parse_caption(text), []
    for kind, e in edits(caption) if caption else ():
        long = kind == "add" and len(e.mentions) > longest
        if not long and (allow_held_out or in_pool("three", e.kinds)):
            legal.append((kind, e.text()))
    return list(by_kind(legal).values())


def noisy_caption(rng, caption, pool="paired", noise=NOISE):
    """The caption as a careless web page might have it; its pairs of kinds stay in the pool."""
    mentions, relation = list(caption.mentions), caption.relation
    i = rng.randrange(len(mentions))
    if rng.random() < noise["wrong"]:
        wrong = [e for kind, e in edits(caption) if kind in ("color", "shape", "size", "position")]
        edited = rng.choice(wrong)
        mentions = list(edited.mentions) if in_pool(pool, edited.kinds) else mentions
    if rng.random() < noise["omit"]:
        mentions[i] = mentions[i]._replace(**{rng.choice(("color", "shape")): None})
    if relation and rng.random() < noise["unrelate"]:
        relation = None
    elif relation and rng.random() < noise["reverse"]:
        relation = INVERSE[relation]
    return Caption(tuple(mentions), relation)


# ------------------------------------------------ questions and statements

THINK, END_THINK = "<think>", "</think>"
NUMBERS = ("zero", "one", "two", "three")
PLACES = tuple(f"{row}-{column}" for row in ROWS for column in COLUMNS)
NO_YES, TRUTH = ("no", "yes"), ("false", "true")
ANSWER_KINDS = (NO_YES, NUMBERS, tuple(COLORS), SHAPES, tuple(SIZES), PLACES)


def question(rng, scene):
    """A random one-hop question (existence, count, attribute, relation) and one-word answer."""
    o, form = rng.choice(scene), rng.randrange(5)
    if form == 0:
        kind = o.kind if rng.random() < 0.5 else rng.choice(KINDS)
        exists = kind in [p.kind for p in scene]
        return f"is there a {kind[0]} {kind[1]} ?", NO_YES[exists]
    if form == 1:
        word = rng.choice(("shape", o.shape, rng.choice(SHAPES)))
        count = sum(word in ("shape", p.shape) for p in scene)
        return f"how many {word}s are there ?", NUMBERS[count]
    if form == 2 and sum(p.shape == o.shape for p in scene) == 1:
        return f"what color is the {o.shape} ?", o.color
    if form == 3 and len(scene) > 1:
        other = rng.choice([p for p in scene if p is not o])
        relation = rng.choice(tuple(INVERSE))
        text = f"is the {o.color} {o.shape} {relation} the {other.color} {other.shape} ?"
        return text, NO_YES[related(o, relation, other)]
    if rng.random() < 0.5:
        return f"what size is the {o.color} {o.shape} ?", o.size
    return f"where is the {o.color} {o.shape} ?", f"{ROWS[o.row]}-{COLUMNS[o.column]}"


def multihop_question(rng, scene):
    """A two-hop question, its worked steps and its answer: find an object, step to its only
    neighbour in that direction, read an attribute. The scene needs at least two objects."""
    while True:
        anchor, relation = rng.choice(scene), rng.choice(tuple(INVERSE))
        neighbours = [o for o in scene if related(o, relation, anchor)]
        if len(neighbours) == 1:
            break
    o, slot = neighbours[0], rng.choice(("color", "shape", "size"))
    noun = "thing" if slot == "shape" else "shape"
    first = f"{anchor.color} {anchor.shape} : {ROWS[anchor.row]} {COLUMNS[anchor.column]}"
    steps = f"{first} . {relation} it : {o.size} {o.color} {o.shape}"
    text = f"what {slot} is the {noun} {relation} the {anchor.color} {anchor.shape} ?"
    return text, steps, getattr(o, slot)


def wrong_answer(rng, answer):
    """Another word of the same kind, all equally likely: a careless annotator's answer.

    >>> wrong_answer(random.Random(0), "yes")
    'no'
    """
    for words in ANSWER_KINDS:
        if answer in words:
            return rng.choice([word for word in words if word != answer])
    raise ValueError(f"{answer!r} is no answer of this world; expected a word of {ANSWER_KINDS}")


def countable(scene, color, other, shape, size, relation):
    """What a statement can count: {noun: how many a scene has}; * marks where the plural s goes."""
    looks = [(o.size, o.color) for o in scene]
    pairs = [(a, b) for a, b in itertools.permutations(scene, 2) if related(a, relation, b)]
    beside = any((a.color, b.color) == (color, other) for a, b in pairs)
    return {
        f"picture* with a {color} {shape}": (color, shape) in [o.kind for o in scene],
        f"picture* with a {size} {color} shape": (size, color) in looks,
        f"picture* with a {color} shape {relation} a {other} shape": beside,
        "picture* with two shapes": len(scene) == 2,
        f"{color} shape*": sum(o.color == color for o in scene),
    }


QUANTIFIERS = (  # words, plural s, smallest and largest count that make them true
    ("there is a", "", 1, 99),
    ("there is no", "", 0, 0),
    ("there is exactly one", "", 1, 1),
    ("there are two", "s", 2, 99),
    ("there are exactly two", "s", 2, 2),
    ("there are at least two", "s", 2, 99),
)


def sample_statement(rng, pool="paired", jitter=0):
    """A random (text, two or three scenes, "true" or "false"). Both labels are equally likely for
    every sentence, so the words alone give nothing away."""
    values = {"color": COLORS, "other": COLORS, "shape": SHAPES, "size": SIZES, "relation": INVERSE}
    while True:
        words = {slot: rng.choice(tuple(choices)) for slot, choices in values.items()}
        noun = rng.choice(list(countable([], **words)))
        start, plural, least, most = rng.choice(QUANTIFIERS)
        count, by_truth = rng.choice((2, 3)), {}
        for _ in range(16):
            scenes = [sample_scene(rng, pool, jitter) for _ in range(count)]
            total = sum(countable(scene, **words)[noun] for scene in scenes)
            by_truth.setdefault(least <= total <= most, scenes)
        if len(by_truth) == 2:
            label = rng.random() < 0.5
            return f"{start} {noun.replace('*', plural)}", by_truth[label], TRUTH[label]


# ------------------------------------------------ stories of three frames


class Story(NamedTuple):
    """Three scenes, a sentence for each (a caption, then two events), and a Caption for each.

    A frame's Caption sums up all sentences so far: what was said holds until an event changes it.
    """

    scenes: tuple
    sentences: tuple
    captions: tuple


EVENTS = ("appears", "disappears", "moves", "color", "size")


def outcome(rng, event, scene, o):
    """A random result of an event: Object o of the scene afterwards, or the one that appears."""
    new = [kind for kind in KINDS if kind not in [p.kind for p in scene]]
    row, column = rng.choice([cell for cell in CELLS if cell not in [p.cell for p in scene]])
    if event == "appears":
        return Object(*rng.choice(new), rng.choice(tuple(SIZES)), row, column, o.dx, o.dy)
    if event == "moves":
        return o._replace(row=row, column=column)
    if event == "color":
        return o._replace(color=rng.choice([color for color, shape in new if shape == o.shape]))
    return o._replace(size="small" if o.size == "big" else "big")


def next_frame(rng, scene, caption, most, noise=None):
    """One random event -> (the next scene, its sentence, its Caption).

    Mentions are in the order of objects. most: the most objects a frame may have. noise: a wrong
    sentence names another outcome of the event."""
    impossible = {"appears": len(scene) == most, "disappears": len(scene) == 1}
    event = rng.choice([event for event in EVENTS if not impossible.get(event)])
    i, mentions = rng.randrange(len(scene)), caption.mentions
    o = scene[i]
    subject = f"the {o.color} {o.shape}"
    if event == "disappears":
        rest = Caption(mentions[:i] + mentions[i + 1 :])
        return scene[:i] + scene[i + 1 :], f"{subject} disappears", rest
    after = outcome(rng, event, scene, o)
    wrong = noise and rng.random() < noise["wrong"]
    claimed = outcome(rng, event, scene, o) if wrong else after
    where = f"the {ROWS[claimed.row]} {COLUMNS[claimed.column]}"
    if event == "appears":
        m = Mention(*claimed.kind, claimed.size if rng.random() < 0.5 else None)
        everything = Caption((*mentions, m._replace(cell=claimed.cell)))
        return [*scene, after], f"{m.text()} appears at {where}", everything
    slot = "cell" if event == "moves" else event
    value = getattr(claimed, slot)
    sentence = f"{subject} moves to {where}" if event == "moves" else f"{subject} becomes {value}"
    m = mentions[i]._replace(**{"color": o.color, "shape": o.shape, slot: value})
    return list(replaced(scene, i, after)), sentence, Caption(replaced(mentions, i, m))


def sample_story(rng, pool="paired", jitter=0, noise=None):
    """A random Story whose kinds, over all frames and sentences, fit the pool. In the pools of
    pairs no frame has more than two objects; in the others, at least one frame has three."""
    most = max(COUNTS[pool])
    while True:
        scene = sample_scene(rng, pool, jitter, min(2, rng.choice(COUNTS[pool])))
        scene.sort(key=lambda o: o.cell)
        mentions = [Mention(*o.kind, rng.choice((o.size, None)), o.cell) for o in scene]
        caption = Caption(tuple(mentions))
        caption = noisy_caption(rng, caption, pool, noise) if noise else caption
        frames = [(scene, caption.text(), caption)]
        for _ in range(2):
            frames.append(next_frame(rng, frames[-1][0], frames[-1][2], most, noise))
        scenes, sentences, captions = zip(*frames)
        kinds = [o.kind for scene in scenes for o in scene]
        kinds += [kind for caption in captions for kind in caption.kinds]
        if in_pool(pool, kinds) and (most < 3 or max(map(len, scenes)) == 3):
            return Story(scenes, sentences, captions)


# ------------------------------------------------ sources: where examples come from


class Example(NamedTuple):
    """One item of one task. `answer` is the reference text, "" where pictures are the answer."""

    task: str
    pictures: np.ndarray  # (n, S, S, 3) uint8: one; three of a story; two or three of a statement
    prompt: str  # of a story: its sentences, joined by " . "
    answer: str
    truth: object = None  # for the judge: (scene, caption), scene(s), Story, or a class label


def at_once(example):
    """A two-hop question as a `vqa` example without steps; any other example unchanged."""
    if example.task != "multihop":
        return example
    return example._replace(task="vqa", answer=example.answer.split(f"{END_THINK} ")[-1])


def pictures_of(examples):
    """All pictures of the examples, in order: (M, S, S, 3) uint8."""
    return np.concatenate([e.pictures for e in examples])


class World:
    """The synthetic world as a source of examples; all randomness comes from the rng passed in."""

    name, tasks = "synthetic", ("draw", "caption", "vqa", "multihop", "text", "story", "verify")

    def __init__(self, jitter=0):
        self.jitter = jitter

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """One Example of a task from a pool. noise: as NOISE, or None for clean texts. Splits
        differ only in the caller's rng: another seed, other scenes."""
        if task == "story":
            story = sample_story(rng, pool, self.jitter, noise)
            pictures = np.stack([render(scene) for scene in story.scenes])
            return Example(task, pictures, " . ".join(story.sentences), "", story)
        if task == "verify":
            text, scenes, label = sample_statement(rng, pool, self.jitter)
            return Example(task, np.stack([render(scene) for scene in scenes]), text, label, scenes)
        if task == "text" and rng.random() < 0.3:
            pool = "three"  # text alone is cheap, and may describe scenes that no picture shows
        two = task == "multihop" and pool == "paired"
        scene = sample_scene(rng, pool, self.jitter, 2 if two else None)
        picture = render(scene)[None]
        if task in ("vqa", "multihop"):
            return Example(task, picture, *self.asked(rng, task, scene, noise), scene)
        caption = true_caption(rng, scene)
        text = (noisy_caption(rng, caption, pool, noise) if noise else caption).text()
        prompt, answer = (text, "") if task == "draw" else ("", text)
        return Example(task, picture, prompt, answer, (scene, caption))

    def asked(self, rng, task, scene, noise):
        """A question and its answer, with steps if the task is multihop."""
        text, *steps, answer = (question if task == "vqa" else multihop_question)(rng, scene)
        if noise and rng.random() < noise["answer"]:
            answer = wrong_answer(rng, answer)
        return text, f"{THINK} {steps[0]} {END_THINK} {answer}" if steps else answer

    def texts(self, rng, n):
        """n texts that together contain every word of the world."""
        for i in range(n):
            e = self.example(rng, self.tasks[i % len(self.tasks)], ("paired", "three")[i // 7 % 2])
            yield f"{e.prompt} {e.answer}"

    def prompt_pool(self, rng, task):
        """The pool of one GRPO prompt; half of all prompts show or ask for three objects."""
        pools = ("paired",) * 3 + ("prompted",) * 2 + ("three",) * 5
        return rng.choice(pools if task == "draw" else ("paired", "three"))

    def negatives(self, rng, text, n, allow_held_out=False, longest=3):
        """Up to n hard negatives: captions one edit away, every kind of edit equally likely; []
        for other texts. None names a held-out pair, unless that is allowed, or adds an object
        beyond `longest`. (If no true caption names three objects, no false one may: a reward
        would learn that three is wrong.)"""
        legal = legal_edits(text, allow_held_out, longest)
        kinds = [rng.sample(texts, len(texts)) for texts in legal]
        rng.shuffle(kinds)  # one edit of each kind before a second of any
        in_turns = itertools.chain(*itertools.zip_longest(*kinds))
        return list(dict.fromkeys(edited for edited in in_turns if edited))[:n]

    def hard_negatives(self, rng, n, split="train", family=8):
        """n clean captions with pictures for retrieval, in families of scenes one edit apart."""
        scenes = []
        while len(scenes) < n:
            scene = sample_scene(rng, "paired", self.jitter)
            near = [(k, e) for k, e in scene_edits(scene) if k != "twice" and len(e) < 3]
            legal = [(k, e) for k, e in near if in_pool("paired", [o.kind for o in e])]
            kinds = list(by_kind(legal).values())
            scenes += [scene, *(rng.choice(rng.choice(kinds)) for _ in range(family - 1))]
        captions = [true_caption(rng, scene) for scene in scenes[:n]]
        pairs = zip(scenes, captions)
        return [Example("caption", render(s)[None], "", c.text(), (s, c)) for s, c in pairs]


# ------------------------------------------------ one row of tokens per task

# Spans: a token, a picture (P codes), or a text:WIDTH in tokens. The policy chooses those with ?.
LAYOUTS = {
    "draw": "<draw> prompt:20 <image> picture?",
    "caption": "<caption> <image> picture <answer> text:20?",
    "vqa": "<vqa> <image> picture prompt:14 <answer> text:3?",
    "multihop": "<multihop> <image> picture prompt:14 <answer> text:31?",
    "verify": "<verify>" + 3 * " <image> picture" + " prompt:16 <answer> text:3?",
    "story": "<story>" + 3 * " prompt:18 <image> picture?",
    "text": "<text> text:20?",
}
SPECIAL = ("<pad>", "<image>", "<answer>", *(f"<{task}>" for task in LAYOUTS), "<eos>")
SPECIAL += (THINK, END_THINK)
PAD, EOS = SPECIAL.index("<pad>"), SPECIAL.index("<eos>")  # a text may choose ids from <eos> on


class Span(NamedTuple):
    """Adjacent columns of a row. kind: prompt, text, picture, or the special token itself."""

    kind: str
    start: int
    end: int
    chosen: bool


class Layout:
    """The columns of a task's row. start: the first column that the policy chooses; chosen (L,)
    bool: all of them; patch (L,) int64: which patch of a picture, -1 in a text; first, last: ids
    with first <= id < last may be chosen."""

    def __init__(self, task, n_patches, n_text, size, device="cpu"):
        self.task, self.spans, end = task, [], 0
        for word in LAYOUTS[task].split():
            kind, _, width = word.rstrip("?").partition(":")
            start, end = end, end + (n_patches if kind == "picture" else int(width or 1))
            self.spans.append(Span(kind, start, end, word.endswith("?")))
        self.length, self.patch = end, torch.full((end,), -1, device=device)
        self.chosen = torch.zeros(end, dtype=torch.bool, device=device)
        for span in self.spans:
            self.chosen[span.start : span.end] = span.chosen
            if span.kind == "picture":
                self.patch[span.start : span.end] = torch.arange(n_patches)
        self.columns = [c for s in self.spans if s.chosen for c in range(s.start, s.end)]
        self.index = torch.tensor(self.columns, device=device)
        self.start, self.draws = self.columns[0], self.spans[-1].kind == "picture"
        self.first, self.last = (n_text, size) if self.draws else (EOS, n_text)

    def drop_prompt(self, tokens, rows):
        """Tokens (N, L) with all given words and codes replaced by <pad> in `rows`, (N,) bool."""
        given = ~self.chosen & (tokens >= EOS)
        return tokens.masked_fill(given & rows[:, None], PAD)


def moved(tensor, device):
    """Copy a CPU tensor to a device, without waiting for the work that a GPU still has to do."""
    return tensor.to(device, non_blocking=True)


class Vocabulary:
    """Words first, then picture codes, in one id space. n_codes: entries of the codebook;
    n_patches: P; size: V."""

    def __init__(self, tokenizer, n_codes, n_patches):
        self.tokenizer, self.ids = tokenizer, tokenizer.get_vocab()
        self.words = sorted(self.ids, key=self.ids.get)
        self.n_text, self.n_codes, self.n_patches = len(self.words), n_codes, n_patches
        self.size = self.n_text + n_codes
        self._layouts = {}

    @staticmethod
    def build(texts, n_codes, n_patches):
        """The vocabulary of all words in an iterable of texts."""
        words = {word for text in texts for word in text.split()}
        ids = {word: i for i, word in enumerate([*SPECIAL, *sorted(words - set(SPECIAL))])}
        tokenizer = Tokenizer(models.WordLevel(ids, "<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return Vocabulary(tokenizer, n_codes, n_patches)

    def layout(self, task, device="cpu"):
        """The Layout of a task, made once per device."""
        key = task, str(device)
        if key not in self._layouts:
            self._layouts[key] = Layout(task, self.n_patches, self.n_text, self.size, device)
        return self._layouts[key]

    def encode(self, text, width=None):
        """Ids of a text, padded with <pad> to `width`. ValueError for unknown or too many words."""
        words = text.split()
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            known = " ".join(self.words[len(SPECIAL) :])
            names = ", ".join(repr(word[:40]) for word in unknown[:5])
            raise ValueError(f"unknown word(s) {names}; this model knows: {known}")
        ids = [self.ids[word] for word in words]
        if width is not None and len(ids) > width:
            raise ValueError(f"{len(ids)} tokens where {width} fit: {text[:200]!r}")
        return ids if width is None else ids + [PAD] * (width - len(ids))

    def decode(self, ids):
        """The text of token ids up to the first <eos>; <pad> and picture codes are left out."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return " ".join(self.words[i] for i in ids if PAD < i < self.n_text)

    def rows(self, task, examples, codes):
        """Token rows (N, L) int64 of N examples of one task, with their reference answers.

        codes (M, P) in [0, n_codes) are those of `pictures_of(examples)`; the rows are on their
        device. Missing pictures become <pad>."""
        layout, lengths = self.layout(task), [len(e.pictures) for e in examples]
        ends = list(itertools.accumulate(lengths))
        assert len(codes) == ends[-1], (len(codes), ends[-1])
        tokens = torch.full((len(examples), layout.length), PAD)
        several = sum(span.kind == "prompt" for span in layout.spans) > 1
        sentence, places = 0, []
        for kind, start, end, chosen in layout.spans:
            if kind == "picture":
                places.append((start, end))
            elif kind in SPECIAL:
                tokens[:, start] = self.ids[kind]
            else:
                texts = [f"{e.answer} <eos>" if chosen else e.prompt for e in examples]
                texts = [text.split(" . ")[sentence] for text in texts] if several else texts
                tokens[:, start:end] = torch.tensor([self.encode(t, end - start) for t in texts])
                sentence += kind == "prompt"
        # The index of each example's pictures among the codes; -1, the last row, is <pad>.
        index = [[end - n + k if k < n else -1 for k in range(len(places))]
                 for n, end in zip(lengths, ends)]
        tokens, index = moved(tokens, codes.device), moved(torch.tensor(index), codes.device)
        absent = codes.new_full((1, self.n_patches), PAD)
        pictures = torch.cat((codes + self.n_text, absent))
        for k, (start, end) in enumerate(places):
            tokens[:, start:end] = pictures[index[:, k]]
        return tokens


# ------------------------------------------------ public data, in the official formats

# A first reading may stop here: what follows are two more sources, and the files they read.

FASHION_CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
SHAPES_SPLITS = ("train.tiny", "train.small", "train.med", "train.large", "val", "test")


def data_error(path, content, expected):
    """The one-line error for a missing or damaged file: what was found and what was expected."""
    way = "put the official file there, or move its folder away and add --download"
    return ValueError(f"{path}: found {content}, expected {expected}; {way}")


def read(path, expected, reader):
    """Return reader(bytes of the file); any failure becomes a data_error."""
    try:
        return reader(Path(path).read_bytes())
    except Exception as error:  # gzip and numpy raise eight kinds between them; all are passed on
        content = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise data_error(path, " ".join(content.split()), expected) from error


def check_split(root, split, legal):
    if split not in legal:
        raise ValueError(f"{root}: no split {split!r}; expected one of {', '.join(legal)}")


def read_idx(path, item=()):
    """IDX .gz -> (N, *item) uint8; its header: big-endian uint32, a magic number and the shape."""
    raw = read(path, "a gzip file", gzip.decompress)
    start, magic = 4 * (2 + len(item)), 0x801 + len(item)
    number, count, *shape = np.frombuffer(raw[:start].ljust(start, b"\0"), ">u4").tolist()
    if (number, tuple(shape), len(raw) - start) != (magic, item, count * math.prod(item)):
        content = f"magic number {number:#x}, {count} items of {shape} in {len(raw)} bytes"
        raise data_error(path, content, f"{magic:#x}, whole items of {list(item)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(count, *item)


def load_fashion_mnist(root, split="train"):
    """Clothes: pictures (N, 32, 32, 3) uint8, grey, padded by 2 with black; labels (N,) int64,
    indices into FASHION_CLASSES. split: "train" or "test". Raises a one-line ValueError. Source:
    Xiao, Rasul, Vollgraf, arXiv:1708.07747, github.com/zalandoresearch/fashion-mnist."""
    check_split(root, split, ("train", "test"))
    prefix = Path(root) / ("train" if split == "train" else "t10k")
    pictures = read_idx(f"{prefix}-images-idx3-ubyte.gz", (28, 28))
    labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz")
    if not 0 < len(labels) == len(pictures) or labels.max() > 9:
        content = f"{len(labels)} labels up to {max(labels, default=0)}"
        raise data_error(f"{prefix}-labels-idx1-ubyte.gz", content, f"{len(pictures)} up to 9")
    grey = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int64)


def load_shapes(root, split):
    """Yes/no questions on 3x3 grids: pictures (N, 32, 32, 3) uint8 RGB, questions (N str),
    answers (N,) bool. split: one of SHAPES_SPLITS. The files contain 30x30 pictures in BGR order.
    Raises a one-line ValueError. Source: Andreas et al., CVPR 2016; this copy: Hu et al., ICCV
    2017, github.com/ronghanghu/n2nmn."""
    check_split(root, split, SHAPES_SPLITS)
    start = f"{Path(root) / 'shapes_dataset' / split}"
    path = f"{start}.input.npy"
    stored = read(path, "an .npy file", lambda raw: np.lib.format.read_array(io.BytesIO(raw)))
    if stored.dtype != np.uint8 or stored.shape[1:] != (30, 30, 3) or len(stored) == 0:
        raise data_error(path, f"{stored.dtype} {stored.shape}", "uint8 (N, 30, 30, 3)")
    texts = []
    for path in (f"{start}.query_str.txt", f"{start}.output"):
        texts.append(read(path, "UTF-8 text", lambda raw: raw.decode().splitlines()))
        if len(texts[-1]) != len(stored):
            raise data_error(path, f"{len(texts[-1])} lines", f"{len(stored)}, one a picture")
    questions, answers = texts
    if not set(answers) <= set(TRUTH):
        raise data_error(path, f"{min(set(answers) - set(TRUTH))!r}", "true or false")
    pictures = np.pad(stored[..., ::-1], ((0, 0), (1, 1), (1, 1), (0, 0)))  # B, G, R -> R, G, B
    return pictures, questions, np.array(answers) == "true"


# The address has no TLS, so the MD5 is the only check.
FASHION_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
SHAPES_ADDRESS = "https://codeload.github.com/ronghanghu/n2nmn/tar.gz/refs/heads/master"
DOWNLOADS = {  # data set: files (address, MD5), or an archive (address, the folder to take)
    "fashion_mnist": (
        (f"{FASHION_ADDRESS}/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        (f"{FASHION_ADDRESS}/train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
        (f"{FASHION_ADDRESS}/t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        (f"{FASHION_ADDRESS}/t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "shapes": ((SHAPES_ADDRESS, "exp_shapes"),),
}


def fetch(url, scratch, check):
    """Download an address into the folder `scratch`: a file whose MD5 is `check`, or an archive
    with a folder of that name. Returns the folder with the data. OSError if the check fails."""
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=30) as answer:
        content = answer.read()  # raises where the connection ends early
    if url.endswith(".gz"):
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != check:
            raise OSError(f"the MD5 checksum is not {check}")
        (scratch / url.rsplit("/", 1)[-1]).write_bytes(content)
        return scratch
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(scratch, filter="data")  # refuses links and paths that lead outside
    folder = next(scratch.glob(f"*/{check}"), None)
    if folder is None:
        raise OSError(f"the archive has no folder {check}")
    return folder


def download(name, data_dir):
    """Download the official files of "fashion_mnist" or "shapes" to data_dir/name, all or none.
    A folder that contains files stays as it is. Any failure raises a one-line ValueError."""
    root = Path(data_dir) / name
    if name not in DOWNLOADS:
        raise ValueError(f"no address is known for {name!r}, only for {', '.join(DOWNLOADS)}")
    if root.is_dir() and any(root.iterdir()):
        return
    url = DOWNLOADS[name][0][0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as scratch:
            new = Path(scratch) / name
            new.mkdir()
            for url, check in DOWNLOADS[name]:
                folder = fetch(url, new, check)
            root.rmdir()  # it is empty; Windows cannot rename onto an existing folder
            os.replace(folder, root)
    except Exception as error:  # urllib, ssl, gzip and tarfile raise many kinds; all are passed on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{url}: {reason}; or put the official files at {root}") from error


class FashionMNIST:
    """Real pictures of clothes: draw a class, name it, answer questions about it."""

    name, tasks = "fashion_mnist", ("draw", "caption", "vqa", "text")
    phrases = ("a {}", "a picture of a {}", "a photo of one {}")

    def __init__(self, root):
        """The last 5,000 training pictures are the validation split."""
        pictures, labels = load_fashion_mnist(root, "train")
        n = max(len(labels) - 5000, len(labels) // 2)
        self.splits = {"train": (pictures[:n], labels[:n]), "val": (pictures[n:], labels[n:])}
        self.splits["test"] = load_fashion_mnist(root, "test")

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """As World.example, with one pool; noise is a wrong class name, `truth` is the label."""
        pictures, labels = self.splits[split]
        i = rng.randrange(len(labels))
        name, picture = FASHION_CLASSES[labels[i]], pictures[i][None]
        if task == "vqa":
            return Example(task, picture, *self.asked(rng, name, noise), labels[i])
        if noise and rng.random() < noise["wrong"]:
            name = rng.choice([other for other in FASHION_CLASSES if other != name])
        text = rng.choice(self.phrases).format(name)
        prompt, answer = (text, "") if task == "draw" else ("", text)
        return Example(task, picture, prompt, answer, labels[i])

    def asked(self, rng, name, noise):
        """A question about a picture of class `name`, and its answer."""
        guess = name if rng.random() < 0.5 else rng.choice(FASHION_CLASSES)
        text, answer, words = "what is this ?", name, FASHION_CLASSES
        if rng.random() < 0.5:
            text, answer, words = f"is this a {guess} ?", NO_YES[guess == name], NO_YES
        if noise and rng.random() < noise["answer"]:
            answer = rng.choice([word for word in words if word != answer])
        return text, answer

    def texts(self, rng, n):
        """n texts that together contain every word."""
        for i in range(n):
            e = self.example(rng, self.tasks[i % len(self.tasks)])
            yield f"{e.prompt} {e.answer}"

    def hard_negatives(self, rng, n, split="train"):
        """n captions with pictures: candidates for retrieval."""
        return [self.example(rng, "caption", split=split) for _ in range(n)]

    def prompt_pool(self, rng, task):
        return "paired"

    def negatives(self, rng, text, n, allow_held_out=False, longest=3):
        """Up to n captions of other classes in the same phrase; [] if the text is not a caption."""
        start, _, name = text.rpartition(" ")
        if name not in FASHION_CLASSES or f"{start} {{}}" not in self.phrases:
            return []
        others = [f"{start} {c}" for c in FASHION_CLASSES if c != name]
        return rng.sample(others, min(n, len(others)))


# ------------------------------------------------ SHAPES: real questions, made grids with steps

STEPS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
GRID_WORDS = ("red", "green", "blue", *SHAPES)
GRID_CELLS = tuple(itertools.product(range(3), range(3)))


def grid_questions():
    """{text: (X, steps, Y)}: from some Y, do the steps, last one first, lead to some X?"""
    noun = {w: f"a {w}" if w in SHAPES else f"a {w} shape" for w in GRID_WORDS}
    questions = {}
    for n, x, y in itertools.product(range(3), GRID_WORDS, GRID_WORDS):
        for steps in itertools.product(STEPS, repeat=n):
            end = noun[y] if steps or y in SHAPES else y  # above a red shape; but: is a circle red
            questions[" ".join(("is", noun[x], *steps, end))] = x, steps, y
    return questions


GRID_QUESTIONS = grid_questions()


@functools.cache
def coverage(shape, width, canvas=10):
    """(canvas, canvas) float: the share of each pixel that a centred shape of this width covers."""
    y, x = (np.mgrid[: 8 * canvas, : 8 * canvas] + 0.5) / 8 - canvas / 2
    inside = {
        "square": np.maximum(abs(x), abs(y)) < width / 2,
        "circle": x**2 + y**2 < width**2 / 4,
        "triangle": (abs(y) < width / 2) & (2 * abs(x) < y + width / 2),
    }[shape]
    return inside.reshape(canvas, 8, canvas, 8).mean((1, 3))


def sample_grid(rng):
    """A random grid as in SHAPES: {(row, column): (color, shape, width)}; 20% of cells empty."""
    grid = {}
    for cell in GRID_CELLS:
        if rng.random() > 0.2:
            width = rng.choice((5, 7.5)) * rng.randrange(90, 111, 2) / 100
            grid[cell] = rng.choice(GRID_WORDS[:3]), rng.choice(SHAPES), width
    return grid


def render_grid(rng, grid):
    """The picture of a grid: (32, 32, 3) uint8. Every object's colour is slightly off."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    for (row, column), (color, shape, width) in grid.items():
        rgb = [255 * min(max((color == c) + rng.uniform(-0.2, 0.2), 0), 1) for c in GRID_WORDS[:3]]
        top, left = 10 * row + 1, 10 * column + 1
        picture[top : top + 10, left : left + 10] = coverage(shape, width)[..., None] * rgb
    return picture


def grid_answer(grid, question):
    """The (answer, worked steps) of a question, or (None, None) if the grid has no X.

    The text first names the nine cells, with -x at every Y. Then each step marks the cells it leads
    to with x and all others with o; the last step names its cells instead, with -x at every X.

    >>> grid = {(0, 0): ("red", "circle", 5), (1, 1): ("blue", "square", 5)}
    >>> answer, steps = grid_answer(grid, "is a circle above left of a square")
    >>> print(answer, steps)  # doctest: +NORMALIZE_WHITESPACE
    True red-circle nothing nothing  nothing blue-square-x nothing  nothing nothing nothing
         o o o  x o o  o o o    red-circle-x o o  o o o  o o o
    """
    x, steps, y = GRID_QUESTIONS[question]
    goal = {cell for cell, o in grid.items() if x in o}
    reached = {cell for cell, o in grid.items() if y in o}
    names = {cell: "-".join(grid[cell][:2]) if cell in grid else "nothing" for cell in GRID_CELLS}
    words = [names[cell] + "-x" * (cell in reached) for cell in GRID_CELLS]
    moves = [STEPS[step] for step in reversed(steps)] or [(0, 0)]
    for n, (down, right) in enumerate(moves, 1):
        reached = {(r + down, c + right) for r, c in reached} & set(GRID_CELLS)
        for cell in GRID_CELLS:
            mark = names[cell] + "-x" * (cell in goal) if n == len(moves) else "x"
            words.append(mark if cell in reached else "o")
    return (bool(goal & reached), " ".join(words)) if goal else (None, None)


class Shapes:
    """SHAPES: a yes/no question about a grid, answered at once (vqa) or with steps (multihop). We
    report on the official val as our "test"; none of its questions is trained on, nor are the 32
    of our "val". A yes or no teaches too little about a picture, so three quarters of pre-training
    have worked steps, on generated grids."""

    name, tasks = "shapes", ("vqa", "multihop")
    real_items = True  # metrics use `splits`, not generated examples
    mix = {"vqa": 1, "multihop": 3}  # in pre-training

    def __init__(self, root):
        real = {split: self.rows(root, split) for split in ("train.tiny", "train.small", "val")}
        closed, rng = {e.prompt for e in real["val"]}, random.Random(0)
        trained = [e for e in real["train.tiny"] + real["train.small"] if e.prompt not in closed]
        unseen = rng.sample(sorted(set(GRID_QUESTIONS) - closed - {e.prompt for e in trained}), 32)
        self.questions = []
        for text in set(GRID_QUESTIONS) - closed - set(unseen):
            two_steps = len(GRID_QUESTIONS[text][1]) == 2
            self.questions += [text] * (1 if two_steps else 9)  # the official proportions
        self.questions.sort()
        val = [self.make(rng, "vqa", unseen) for _ in range(512)]
        self.splits = {"train": trained, "val": val, "test": real["val"]}

    def rows(self, root, split):
        items = zip(*load_shapes(root, split))
        return [Example("vqa", p[None], text, NO_YES[int(answer)]) for p, text, answer in items]

    def make(self, rng, task, questions=None):
        """A generated grid, a question that fits it, and the answer, in multihop with steps."""
        steps = None
        while not steps:
            grid, text = sample_grid(rng), rng.choice(questions or self.questions)
            answer, steps = grid_answer(grid, text)
        thought = f"{THINK} {steps} {END_THINK} " if task == "multihop" else ""
        return Example(task, render_grid(rng, grid)[None], text, thought + NO_YES[answer])

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """As World.example, with one pool and clean questions."""
        if split == "train" and (task == "multihop" or rng.random() < 0.9):
            return self.make(rng, task)
        return rng.choice(self.splits[split])._replace(task=task)

    def texts(self, rng, n):
        """Texts that together contain every word."""
        for e in self.splits["train"] + [self.make(rng, "multihop") for _ in range(n // 4)]:
            yield f"{e.prompt} {e.answer}"

    def prompt_pool(self, rng, task):
        return "paired"


SOURCES = {"synthetic": World, "fashion_mnist": FashionMNIST, "shapes": Shapes}


def make_sources(names, data_dir, jitter=0, fetch_missing=False):
    """The sources named in a comma-separated list; real data is read from data_dir/NAME."""
    sources = []
    for name in names.split(","):
        if name not in SOURCES:
            raise ValueError(f"--data {name}: expected names from {', '.join(SOURCES)}")
        if name != "synthetic" and fetch_missing:
            download(name, data_dir)
        synthetic = name == "synthetic"
        sources.append(World(jitter) if synthetic else SOURCES[name](Path(data_dir) / name))
    return sources


# ------------------------------------------------ try it


def main():
    """Print one scene of each pool with its texts, and examples per second."""
    rng = random.Random(0)
    for pool in COUNTS:
        scene = sample_scene(rng, pool)
        caption = true_caption(rng, scene)
        print(f"{pool:9} {caption.text()}")
        print(f"{'':9} noisy: {noisy_caption(rng, caption, pool).text()}")
        print(f"{'':9} {' -> '.join(question(rng, scene))}")
        if len(scene) > 1:
            print(f"{'':9} {' -> '.join(multihop_question(rng, scene))}")
    world, start, n = World(), time.perf_counter(), 8000
    for i in range(n):
        world.example(rng, world.tasks[i % 4], noise=NOISE)
    print(f"{n / (time.perf_counter() - start):,.0f} examples per second")


if __name__ == "__main__":
    main()
