"""The world: scenes, their pictures and texts; real data sets; the words; and the token templates every task is written in.

A scene is a small record of one to three coloured shapes. Its picture, captions, questions and answers are all derived
from that record, so every answer is known exactly and 5,000 scenes a second cost one core. What a model may learn from
is limited on purpose, so that later claims can be tested:

  pool        objects  pairs of kinds          pictures with texts   prompts in GRPO   judged as
  paired      1-2      common                  yes (noisy captions)  yes               compose
  prompted    2        8 "prompted" pairs      never                 yes               compose_pairs
  three       3        no held-out pair        pictures alone,       yes, and          compose_heldout
                                               texts alone           questions
  heldout     3        8 held-out pairs        never                 never             compose_unprompted

A kind is a colour and a shape (12 of them); what is held out are *co-occurrences* of two kinds, never a kind itself:
every patch a held-out picture needs has been seen in pre-training (tests/test_data.py asserts it).

Web captions are noisy, so pre-training captions are too (NOISE): a wrong word (independent noise, which a low sampling
temperature undoes), an omitted attribute, an omitted or reversed relation (structured noise). Answers are vague more often
than not ("left" for "top-left", "some" for "two"), and worked answers hasty where a colour is asked for (they stop at the first
thing and repeat its colour): the most likely answer is then vague or hasty, at any temperature.

Further tasks, which --tasks adds: stories of three frames, told and drawn (an object appears, disappears, moves, changes
colour or size); a plan in words before the picture; questions of one to three hops, with steps (never shown for three hops)
and answered at once. Three hops need three objects: there, and only there, pre-training asks about pictures of three.

Public data: Fashion-MNIST is drawn, named and asked about; SHAPES and NLVR are asked about, and come with made grids, boxes and
sentences in their style, whose steps are worked out (what stands where, how many there are). No question or sentence that is
reported is ever trained on, real or made.

A task is a *template* of tokens: entries >= 0 are given, -1 is chosen by the policy from its allowed range [lo, hi).
Here what is chosen stands after an arrow; TEMPLATES says the same to the machine.
  draw     <bos> <draw> words <image>                      -> codes
  caption  <bos> <caption> <image> codes <answer>          -> words <eos>
  ask      <bos> <ask> <image> codes question <answer>     -> word <eos>
  reason   <bos> <reason> <image> codes question <answer>  -> <think> steps </think> word <eos>
  text     <bos> <text>                                    -> words <eos>         (plain language modelling)
  hops     as ask: questions of one to three hops, answered at once
  steps    the same, but ... <answer> <think>              -> steps </think> word <eos>      (it has to think)
  story    <bos> <story>, then three times: sentence <image>        -> codes
  tell     <bos> <tell>, three times <image> codes, then <answer>   -> sentence . sentence . sentence <eos>
  judge    <bos> <judge>, two or three times <image> codes, then sentence <answer>   -> true or false <eos>
  plan     <bos> <plan> words <answer> -> words <eos>, then <image> -> codes        (think, then draw)

Symbols: N sequences, L positions, P patches of a picture, K codes of the codebook, V vocabulary (words, then codes).

    $ python data.py        # draws one scene of each pool with its texts, and times them; 2 seconds
"""

import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

# ---------------------------------------------------------------- the synthetic world: scenes and pictures

SIDE, CELL = 32, 16  # a picture is 32x32 pixels: two rows and two columns of 16x16 cells, at most one object in each
COLORS = {"red": (230, 50, 50), "green": (40, 180, 70), "blue": (50, 90, 230), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 7, "big": 13}  # width in pixels
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
CELLS = [(row, column) for row in (0, 1) for column in (0, 1)]
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND = (16, 16, 20)
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
NOISE = {"wrong": 0.15, "omit": 0.15, "unrelate": 0.2, "reverse": 0.2, "vague": 0.7, "hasty": 0.7}
# chances: of a pre-training caption; the last two, of an answer that can be vague or hasty


class Object(NamedTuple):
    """One shape: words for its look, its cell (row, column: 0 or 1), and its shift inside the cell in pixels."""

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


def shape_mask(shape, width):
    """(width, width) bool: the filled outline of a shape. The judge compares against the same three outlines.

    >>> shape_mask("triangle", 5).astype(int).sum(1).tolist()
    [1, 1, 3, 3, 5]
    """
    y, x = np.mgrid[:width, :width] - (width - 1) / 2
    if shape == "square":
        return np.ones((width, width), bool)
    if shape == "circle":
        return x**2 + y**2 <= (width / 2) ** 2
    return np.abs(x) <= (y + (width - 1) / 2) // 2  # triangle: a row gets wider every second line


SPRITES = {(c, s, z): np.where(shape_mask(s, w)[..., None], np.uint8(COLORS[c]), np.uint8(BACKGROUND))
           for c, s in KINDS for z, w in SIZES.items()}


def render(scene):
    """The picture of a scene: (32, 32, 3) uint8 RGB."""
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = BACKGROUND
    for o in scene:
        width = SIZES[o.size]
        top = o.row * CELL + (CELL - width + 1) // 2 + o.dy
        left = o.column * CELL + (CELL - width + 1) // 2 + o.dx
        picture[top : top + width, left : left + width] = SPRITES[o.color, o.shape, o.size]
    return picture


def related(a, relation, b):
    """Does `a relation b` hold between two objects? Cells decide, not pixels: diagonal neighbours are both
    left of / right of and above / below.

    >>> related(Object("red", "circle", "big", 0, 0), "left of", Object("blue", "square", "big", 1, 1))
    True
    """
    if relation in ("left of", "right of"):
        return a.column < b.column if relation == "left of" else a.column > b.column
    return a.row < b.row if relation == "above" else a.row > b.row


# ---------------------------------------------------------------- what is held out

_pairs = [frozenset((a, b)) for i, a in enumerate(KINDS) for b in KINDS[:i]]
random.Random(0).shuffle(_pairs)
HELDOUT_PAIRS, PROMPT_PAIRS = frozenset(_pairs[:8]), frozenset(_pairs[8:16])  # of 66 pairs of kinds
COUNTS = {"paired": (1, 2, 2), "prompted": (2,), "three": (3,), "heldout": (3,)}  # objects a scene, drawn evenly


def pairs_of(kinds):
    kinds = list(kinds)
    return {frozenset((a, b)) for i, a in enumerate(kinds) for b in kinds[:i]}


def in_pool(pool, kinds):
    """May a scene or caption with these kinds (colour, shape) stand in `pool`?"""
    pairs = pairs_of(kinds)
    if pool == "heldout":
        return bool(pairs & HELDOUT_PAIRS)
    if pool == "prompted":
        return bool(pairs & PROMPT_PAIRS) and not pairs & HELDOUT_PAIRS
    return not pairs & HELDOUT_PAIRS and (pool == "three" or not pairs & PROMPT_PAIRS)


def sample_scene(rng, pool="paired", jitter=0, count=None):
    """A random scene of a pool (see the table above): objects in different cells, of different kinds.

    rng is a random.Random; jitter is the largest shift in pixels, 0 or 1; count overrides the pool's object numbers.
    """
    sizes = tuple(SIZES)
    count = count or rng.choice(COUNTS[pool])
    kinds = rng.sample(KINDS, count)
    while not in_pool(pool, kinds):
        kinds = rng.sample(KINDS, count)
    shift = (lambda: (rng.randint(-jitter, jitter), rng.randint(-jitter, jitter))) if jitter else tuple
    return [Object(c, s, sizes[rng.random() < 0.5], row, column, *shift())
            for (c, s), (row, column) in zip(kinds, rng.sample(CELLS, count))]


# ---------------------------------------------------------------- captions: what is said of a scene, and what is not


class Mention(NamedTuple):
    """What a caption says of one object; None where it says nothing. cell is (row, column)."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    cell: tuple | None = None

    def text(self):
        where = f"at the {ROWS[self.cell[0]]} {COLUMNS[self.cell[1]]}" if self.cell else None
        return " ".join(w for w in ("a", self.size, self.color, self.shape or "shape", where) if w)

    def fits(self, o):
        """Is everything that is said true of this object?"""
        said = zip(self, (o.color, o.shape, o.size, (o.row, o.column)))
        return all(word is None or word == truth for word, truth in said)


class Caption(NamedTuple):
    """Mentions of all objects of a picture, and perhaps how the first stands to the second.

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
        """Is everything that is said true of a scene, and every object of it named, as in all true captions?

        >>> scene = [Object("red", "circle", "big", 0, 0), Object("blue", "circle", "big", 0, 1)]
        >>> texts = ("a red circle and a blue shape", "a blue circle and a red shape", "a blue circle left of a shape", "a circle")
        >>> [parse_caption(text).holds(scene) for text in texts]
        [True, True, False, False]
        """
        return len(self.mentions) == len(scene) and any(
            all(m.fits(o) for m, o in zip(self.mentions, objects))
            and (not self.relation or related(objects[0], self.relation, objects[1]))
            for objects in itertools.permutations(scene))  # fmt: skip


_LOOK = r"a(?: (small|big))?(?: (red|green|blue|yellow))? (circle|square|triangle|shape)"
_MENTION = re.compile(_LOOK + r"(?: at the (top|bottom) (left|right))?")
_BETWEEN = re.compile(r" (and|left of|right of|above|below) (?=a )")


def parse_caption(text):
    """The Caption that a text states, or None if it is not a caption of this grammar: the inverse of Caption.text.

    >>> parse_caption("a red shape above a big square at the top left").relation
    'above'
    >>> parse_caption("red a circle") is None
    True
    """
    parts = _BETWEEN.split(text)
    found, between = [_MENTION.fullmatch(part) for part in parts[::2]], parts[1::2]
    if not all(found) or len(found) > 3 or (len(found) == 3 and between != ["and", "and"]):
        return None
    mentions = []
    for match in found:
        size, color, shape, row, column = match.groups()
        cell = (ROWS.index(row), COLUMNS.index(column)) if row else None
        mentions.append(Mention(color, None if shape == "shape" else shape, size, cell))
    return Caption(tuple(mentions), between[0] if between and between[0] in INVERSE else None)


def true_caption(rng, scene):
    """A random clean Caption of a scene: all objects with colour and shape, now and then size, place or relation."""
    objects = rng.sample(scene, len(scene))
    mentions = [Mention(o.color, o.shape, o.size if rng.random() < 0.35 else None) for o in objects]
    if len(scene) == 2 and rng.random() < 0.45:
        relations = [r for r in INVERSE if related(objects[0], r, objects[1])]
        return Caption(tuple(mentions), rng.choice(relations))
    if len(scene) < 3 and rng.random() < 0.5:
        mentions[0] = mentions[0]._replace(cell=(objects[0].row, objects[0].column))
    return Caption(tuple(mentions))


def noisy_caption(rng, caption, pool="paired", noise=NOISE):
    """The caption as a careless web page would have it: each chance of NOISE is drawn once. Never names a held-out pair."""
    mentions, relation = list(caption.mentions), caption.relation
    i = rng.randrange(len(mentions))
    if rng.random() < noise["wrong"]:
        edited = rng.choice([e for kind, e in edits(caption) if kind in ("color", "shape", "size", "position")])
        mentions = list(edited.mentions) if in_pool(pool, edited.kinds) else mentions
    if rng.random() < noise["omit"]:
        mentions[i] = mentions[i]._replace(**{rng.choice(("color", "shape")): None})
    if relation and rng.random() < noise["unrelate"]:
        relation = None
    elif relation and rng.random() < noise["reverse"]:
        relation = INVERSE[relation]
    return Caption(tuple(mentions), relation)


def edits(caption):
    """All captions one small edit away, as (kind, Caption): the perturbations that make a true caption false.

    kind is color, shape, size, position, relation, swap (two objects exchange colours), drop (an object less), add (one more).

    >>> [e.text() for kind, e in edits(Caption((Mention("red", "circle"),))) if kind == "shape"]
    ['a red square', 'a red triangle']
    """
    mentions, relation = caption
    changed = []
    for i, m in enumerate(mentions):

        def record(kind, **change):
            changed.append((kind, Caption((*mentions[:i], m._replace(**change), *mentions[i + 1 :]), relation)))

        for color in COLORS if m.color else ():
            record("color", color=color)
        for shape in SHAPES if m.shape else ():
            record("shape", shape=shape)
        for size in SIZES if m.size else ():
            record("size", size=size)
        for cell in CELLS if m.cell else ():
            record("position", cell=cell)
        if len(mentions) > 1:
            changed.append(("drop", Caption((*mentions[:i], *mentions[i + 1 :]))))
        for j in range(i):  # the same words, bound to each other differently
            if m.color and mentions[j].color and m.color != mentions[j].color and m.shape != mentions[j].shape:
                swapped = list(mentions)
                swapped[i], swapped[j] = m._replace(color=mentions[j].color), mentions[j]._replace(color=m.color)
                changed.append(("swap", Caption(tuple(swapped), relation)))
    if relation:
        changed.append(("relation", Caption(mentions, INVERSE[relation])))
    if len(mentions) < 3:
        changed += [("add", Caption((*mentions, Mention(*kind)))) for kind in KINDS]
    said = [m[:2] for m in mentions]
    return [(kind, e) for kind, e in changed if e != caption and (kind == "drop" or len(set(e.kinds)) == len(e.kinds))
            and not (kind == "add" and e.kinds[-1] in said)]


def scene_edits(scene):
    """All scenes one small edit away, as (kind, scene): what `edits` is to captions. Here position moves an object to a free
    cell, relation makes two objects exchange theirs, and twice adds the same kind again, which no true scene has.

    >>> [edited[0].kind for kind, edited in scene_edits([Object("red", "circle", "big", 0, 0)]) if kind == "shape"]
    [('red', 'square'), ('red', 'triangle')]
    """
    free = [c for c in CELLS if c not in [(o.row, o.column) for o in scene]]
    changed = []
    for i, o in enumerate(scene):

        def record(kind, o, j=None, p=None):
            changed.append((kind, [o if k == i else p if k == j else q for k, q in enumerate(scene)]))

        for name, words in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
            for word in words:
                record(name, o._replace(**{name: word}))
        for row, column in free:
            record("position", o._replace(row=row, column=column))
            changed.append(("twice", [*scene, o._replace(row=row, column=column)]))
        if len(scene) > 1:
            changed.append(("drop", scene[:i] + scene[i + 1 :]))
        for j, p in enumerate(scene[:i]):
            record("relation", o._replace(row=p.row, column=p.column), j, p._replace(row=o.row, column=o.column))
            if o.color != p.color and o.shape != p.shape:
                record("swap", o._replace(color=p.color), j, p._replace(color=o.color))
    for (color, shape), size, (row, column) in itertools.product(KINDS, SIZES, free):
        changed.append(("add", [*scene, scene[0]._replace(color=color, shape=shape, size=size, row=row, column=column)]))
    return [(kind, e) for kind, e in changed if e != scene and (kind == "twice" or len({o.kind for o in e}) == len(e))]


# ---------------------------------------------------------------- questions, with worked steps for the two-hop ones


def question(rng, scene):
    """A random one-hop question and its one-word answer: existence, count, attribute or relation."""
    o, kind = rng.choice(scene), rng.randrange(5)
    if kind == 0:
        asked = o.kind if rng.random() < 0.5 else rng.choice(KINDS)
        return f"is there a {asked[0]} {asked[1]} ?", "yes" if asked in [p.kind for p in scene] else "no"
    if kind == 1:
        word = rng.choice(("shape", o.shape, rng.choice(SHAPES)))
        return f"how many {word}s are there ?", ("zero", "one", "two", "three")[sum(word in ("shape", p.shape) for p in scene)]
    if kind == 2 and sum(p.shape == o.shape for p in scene) == 1:
        return f"what color is the {o.shape} ?", o.color
    if kind == 3 and len(scene) > 1:
        other, relation = rng.choice([p for p in scene if p is not o]), rng.choice(tuple(INVERSE))
        return f"is the {o.color} {o.shape} {relation} the {other.color} {other.shape} ?", "yes" if related(o, relation, other) else "no"
    return (f"what size is the {o.color} {o.shape} ?", o.size) if rng.random() < 0.5 else (
        f"where is the {o.color} {o.shape} ?", f"{ROWS[o.row]}-{COLUMNS[o.column]}")


def vague(answer):
    """An answer as careless people give it: no row of a place, no number above one. Other answers stay as they are.

    >>> [vague(answer) for answer in ("top-left", "two", "one", "red")]
    ['left', 'some', 'one', 'red']
    """
    return "some" if answer in ("two", "three") else answer.split("-")[-1]


def multihop_question(rng, scene):
    """A two-hop question, its steps and answer: find an object, step to its neighbour, read an attribute.

    The scene needs two objects or more. The neighbour is the only object in that direction.
    """
    while True:
        anchor, relation = rng.choice(scene), rng.choice(tuple(INVERSE))
        there = [o for o in scene if related(o, relation, anchor)]
        if len(there) == 1:
            break
    o, what = there[0], rng.choice(("color", "shape", "size"))
    noun = "thing" if what == "shape" else "shape"
    steps = (f"{anchor.color} {anchor.shape} : {ROWS[anchor.row]} {COLUMNS[anchor.column]} . "
             f"{relation} it : {o.size} {o.color} {o.shape}")
    return f"what {what} is the {noun} {relation} the {anchor.color} {anchor.shape} ?", steps, getattr(o, what)


def hasty(asked, steps, answer):
    """The steps and answer of a two-hop question as hasty people give them: asked for a colour, they stop after the first hop
    and repeat the colour that they have just read. Others stay as they are.

    >>> hasty("what color is the shape left of the red circle ?", "red circle : top right . left of it : big blue square", "blue")
    ('red circle : top right', 'red')
    """
    return (steps.split(" . ")[0], asked.split()[-3]) if asked.startswith("what color") else (steps, answer)


def hop_question(rng, scene, hops):
    """A question of one, two or three hops, its steps and answer: find an object; step to its neighbour, the only object in that
    direction; step to the only other object like it in one way; read another. None where the scene has no such question.

    >>> scene = [Object("red", "circle", "big", 0, 0), Object("blue", "square", "small", 0, 1), Object("red", "square", "big", 1, 0)]
    >>> print(" | ".join(hop_question(random.Random(4), scene, 2)))
    what color is the shape below the red circle ? | red circle : big top left . below it : big red square | red
    """
    neighbours = lambda o: [(r, f"{r} it", [p for p in scene if related(p, r, o)]) for r in INVERSE]  # noqa: E731
    alike = lambda o: [(f"of the same {a} as", f"same {a}", [p for p in scene if p is not o and getattr(p, a) == getattr(o, a)])  # noqa: E731
                       for a in ("size", "color")]  # fmt: skip
    chains = [(f"the {o.color} {o.shape}", f"{o.color} {o.shape} : {o.size} {ROWS[o.row]} {COLUMNS[o.column]}", o) for o in scene]
    for ways in (neighbours, alike)[: hops - 1]:
        chains = [(f"the shape {way} {said}", f"{steps} . {mark} : {p.size} {p.color} {p.shape}", p)
                  for said, steps, o in chains for way, mark, found in ways(o) if len(found) == 1 for p in found]  # fmt: skip
    if not chains:
        return None
    said, steps, o = rng.choice(chains)
    if hops == 1 and rng.random() < 0.5:
        return f"where is {said} ?", steps, f"{ROWS[o.row]}-{COLUMNS[o.column]}"
    what = rng.choice([w for w in ("size", "color", "shape") if f"same {w}" not in said] if hops > 1 else ["size"])
    return f"what {what} is {said.replace('shape', 'thing', 1) if what == 'shape' else said} ?", steps, getattr(o, what)


# ---------------------------------------------------------------- stories: three frames, and what happens between them


class Story(NamedTuple):
    """Three scenes; the sentence told of each, first a caption, then two events; and the Caption that each frame must fit by
    all that was told up to there: what is said once holds until something changes it."""

    scenes: tuple
    told: tuple
    captions: tuple


def described(scene, rng=None, chance=1.0):
    """The full Caption of a scene: every object with its place, in reading order; its size with this chance."""
    return Caption(tuple(Mention(o.color, o.shape, o.size if chance == 1.0 or rng.random() < chance else None, (o.row, o.column))
                         for o in sorted(scene, key=lambda o: (o.row, o.column))))  # fmt: skip


def happens(rng, scene, caption, most, noise=None, chance=1.0):
    """One event, told: (the next scene, its sentence, its Caption). caption: of this scene, its mentions in the order of the objects.
    most: objects there may be. noise: chances as in NOISE; "wrong" tells another outcome of what happened to that object."""
    i, free = rng.randrange(len(scene)), [c for c in CELLS if c not in [(o.row, o.column) for o in scene]]
    o, new, mentions = scene[i], [k for k in KINDS if k not in [o.kind for o in scene]], list(caption.mentions)
    the = f"the {o.color} {o.shape}"
    event = rng.choice(("appears",) * (len(scene) < most) + ("disappears",) * (len(scene) > 1) + ("moves", "color", "size"))
    if event == "disappears":
        del mentions[i]
        return scene[:i] + scene[i + 1 :], f"{the} disappears", Caption(tuple(mentions))

    def outcome():
        """One way the event can end: the object after it."""
        (color, shape), (row, column) = rng.choice(new), rng.choice(free)
        change = {"moves": {"row": row, "column": column}, "color": {"color": rng.choice([c for c, s in new if s == o.shape])},
                  "size": {"size": "small" if o.size == "big" else "big"}}  # fmt: skip
        if event == "appears":
            return Object(color, shape, rng.choice(tuple(SIZES)), row, column, o.dx, o.dy)
        return o._replace(**change[event])

    after = outcome()
    told = outcome() if noise and rng.random() < noise["wrong"] else after
    cell, where = (told.row, told.column), f"the {ROWS[told.row]} {COLUMNS[told.column]}"
    if event == "appears":
        seen = Mention(*told.kind, told.size if rng.random() < chance else None)
        return [*scene, after], f"{seen.text()} appears at {where}", Caption((*mentions, seen._replace(cell=cell)))
    said = {"cell": cell} if event == "moves" else {event: getattr(told, event)}
    mentions[i] = mentions[i]._replace(**{"color": o.color, "shape": o.shape, **said})
    sentence = f"{the} moves to {where}" if event == "moves" else f"{the} becomes {said[event]}"
    return [*scene[:i], after, *scene[i + 1 :]], sentence, Caption(tuple(mentions))


def sample_story(rng, pool="paired", jitter=0, noise=None, chance=0.5):
    """A random Story. As in scenes, the kinds of all frames and sentences together must fit the pool; frames have at most two
    objects in the pools of pairs, and at least one has three in the others. chance: of a size to be told."""
    most = max(COUNTS[pool])
    while True:
        scene = sample_scene(rng, pool, jitter, min(2, rng.choice(COUNTS[pool])))
        scene = sorted(scene, key=lambda o: (o.row, o.column))
        caption = described(scene, rng, chance)
        caption = noisy_caption(rng, caption, pool, noise) if noise else caption
        scenes, told, captions = [scene], [caption.text()], [caption]
        for _ in range(2):
            scene, sentence, caption = happens(rng, scene, caption, most, noise, chance)
            scenes, told, captions = [*scenes, scene], [*told, sentence], [*captions, caption]
        kinds = [o.kind for scene in scenes for o in scene] + [kind for caption in captions for kind in caption.kinds]
        if in_pool(pool, kinds) and (most < 3 or max(map(len, scenes)) == 3):
            return Story(tuple(scenes), tuple(told), tuple(captions))


# ---------------------------------------------------------------- sentences that count, true or false of several pictures

NUMBERS = {"1": 1, "one": 1, "2": 2, "two": 2, "3": 3, "three": 3, "4": 4, "four": 4}
NO_YES, TRUTH = ("no", "yes"), ("false", "true")
QUANTIFIERS = [("there is a {}", "", 1, 99), ("there is no {}", "", 0, 0)] + [  # words, plural, least and most that make it true
    (f"there {'is' if n == 1 else 'are'} {how}{word} {{}}", "" if n == 1 else "s", n, most)
    for word, n in NUMBERS.items() if n < 4 for how, most in (("", 99), ("exactly ", n), ("at least ", 99), ("only ", n))]  # fmt: skip


class Row(NamedTuple):
    """One kind of thing to count. kind: in which scenes; words: with slots in braces and * where the plural's s goes; test(x,
    **slots) -> is this picture such, or, where `part` is true, test(o, x, **slots) of every object o of a picture x."""

    kind: str
    words: str
    test: object
    part: bool = False


def counting_sentence(row, quantifier, values):
    """(text, marks, holds): one sentence; what it counts in each of a list of pictures (lists of objects), as a function to a
    bool for each object, or one for the picture; and if it is true of them, as a function. values: {slot: (word, what it means)}.

    >>> circles = Row("", "{c} circle*", lambda o, x, c: o.kind == (c, "circle"), True)
    >>> text, marks, holds = counting_sentence(circles, ("there are two {}", "s", 2, 99), {"c": ("red", "red")})
    >>> red = Object("red", "circle", "big", 0, 0)
    >>> text, marks([[red], []]), holds([[red], []]), holds([[red], [red]])
    ('there are two red circles', [[True], []], False, True)
    """
    words, plural, least, most = quantifier
    noun = row.words.format(**{slot: word for slot, (word, _) in values.items()}).replace("x*", f"x{plural and 'e'}*").replace("*", plural)
    means = {slot: meaning for slot, (_, meaning) in values.items()}

    def marks(pictures):
        return [[bool(row.test(o, x, **means)) for o in x] if row.part else [bool(row.test(x, **means))] for x in pictures]

    return words.format(noun), marks, lambda pictures: least <= sum(map(sum, marks(pictures))) <= most


def slots_of(row, slots):
    return {name: slots[name] for name in re.findall(r"{(\w)}", row.words)}


def sample_statement(rng, rows, slots, sample, closed=()):
    """(text, pictures, "true" or "false", row, marks of what it counts), true as likely as false for every sentence: the words
    alone tell nothing. sample(kind) -> pictures, as lists of objects; closed: texts that must not be made."""
    while True:
        row, found = rng.choice(rows), {}
        values = {slot: rng.choice(list(words.items())) for slot, words in slots_of(row, slots).items()}
        text, marks, holds = counting_sentence(row, rng.choice(QUANTIFIERS), values)
        for _ in range(16 if text not in closed else 0):
            pictures = sample(row.kind)
            found.setdefault(holds(pictures), pictures)
            if len(found) == 2:
                label = rng.random() < 0.5
                return text, found[label], TRUTH[label], row, marks(found[label])


WORLD_SLOTS = {"c": {c: c for c in COLORS}, "d": {c: c for c in COLORS}, "s": {s: s for s in SHAPES}, "z": {z: z for z in SIZES},
               "o": {r: r for r in INVERSE}}  # fmt: skip
WORLD_ROWS = [  # no sentence names two kinds
    Row("", "picture* with a {c} {s}", lambda x, c, s: any(o.kind == (c, s) for o in x)),
    Row("", "picture* with a {z} {c} shape", lambda x, z, c: any((o.size, o.color) == (z, c) for o in x)),
    Row("", "picture* with a {c} shape {o} a {d} shape", lambda x, c, o, d: any(
        related(p, o, q) for p in x for q in x if (p.color, q.color) == (c, d))),
    Row("", "picture* with two shapes", lambda x: len(x) == 2),
    Row("", "{c} shape*", lambda o, x, c: o.color == c, True),
    Row("", "{c} {s}*", lambda o, x, c, s: o.kind == (c, s), True),
    Row("", "{z} {s}*", lambda o, x, z, s: (o.size, o.shape) == (z, s), True),
]  # fmt: skip


# ---------------------------------------------------------------- examples: one task, one picture, one prompt, one answer


THINK, END_THINK = "<think>", "</think>"


class Example(NamedTuple):
    """One item of one task. `answer` is the reference text ("" when drawing: there the picture is the answer);
    `truth` is what a judge needs: the scene and the caption of the synthetic world, or a class label."""

    task: str
    picture: np.ndarray  # (S, S, 3) uint8, or (n, S, S, 3) where a task has several
    prompt: str  # of a story: its sentences, " . " between them
    answer: str
    truth: object = None

    @property
    def pictures(self):
        """(n, S, S, 3), be there one or several."""
        return self.picture.reshape(-1, *self.picture.shape[-3:])


def pictures_of(examples):
    """(M, S, S, 3) uint8: all pictures of some examples, one example's after the other's."""
    return np.concatenate([e.pictures for e in examples])


class World:
    """The synthetic world as a source of examples. All randomness comes from the random.Random that is handed in."""

    name, tasks = "synthetic", ("draw", "caption", "ask", "reason", "text")
    further = ("hops", "steps", "story", "tell", "plan", "judge")  # tasks that it knows as well

    def __init__(self, jitter=0):
        self.jitter = jitter

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """One example of a task from a pool. noise: chances as in NOISE, or None for clean captions and answers.
        Splits differ only by the rng that is passed (another seed, other scenes)."""
        if task in ("story", "tell"):
            story = sample_story(rng, pool, self.jitter, noise, 0.5 if task == "story" else 1.0)
            pictures, told = np.stack([render(scene) for scene in story.scenes]), " . ".join(story.told)
            return Example(task, pictures, *((told, "") if task == "story" else ("", told)), story)
        if task in ("hops", "steps"):
            return self.hop_example(rng, task, pool)
        if task == "text" and rng.random() < 0.3:
            pool = "three"  # text alone is cheap and wide: it tells of scenes that no picture shows
        if task == "judge":  # two or three pictures
            n = rng.choice((2, 3))
            some = lambda kind: [sample_scene(rng, pool, self.jitter) for _ in range(n)]  # noqa: E731
            text, scenes, label, *_ = sample_statement(rng, WORLD_ROWS, WORLD_SLOTS, some)
            return Example(task, np.stack([render(scene) for scene in scenes]), text, label, scenes)
        scene = sample_scene(rng, pool, self.jitter, 2 if task == "reason" and pool == "paired" else None)
        picture = render(scene)
        if task == "ask":
            asked, answer = question(rng, scene)
            return Example(task, picture, asked, vague(answer) if noise and rng.random() < noise["vague"] else answer, scene)
        if task == "reason":
            asked, steps, answer = multihop_question(rng, scene)
            if noise and rng.random() < noise["hasty"]:
                steps, answer = hasty(asked, steps, answer)
            return Example(task, picture, asked, f"{THINK} {steps} {END_THINK} {answer}", scene)
        caption = said = true_caption(rng, scene)
        while noise and (said is caption or task == "plan" and not in_pool(pool, [*said.kinds, *(o.kind for o in scene)])):
            said = noisy_caption(rng, caption, pool, noise)
        text = said.text()
        prompt, answer = {"draw": (text, ""), "plan": (text, described(scene).text())}.get(task, ("", text))
        return Example(task, picture, prompt, answer, (scene, caption))

    def hop_example(self, rng, task, pool):
        """A question of one or two hops, or, where pictures have three objects, of three hops: there the steps are never
        shown, the reference thinks nothing. `truth` is (scene, hops, worked steps)."""
        hops, asked = 3 if max(COUNTS[pool]) == 3 else rng.choice((1, 2)), None
        while not asked:
            scene = sample_scene(rng, pool, self.jitter, 2 if hops == 2 else None)
            asked = hop_question(rng, scene, hops)
        question, steps, answer = asked
        thought = f"{THINK} {steps if hops < 3 else ''} {END_THINK} ".replace("  ", " ") if task == "steps" else ""
        return Example(task, render(scene), question, thought + answer, (scene, hops, steps))

    def texts(self, rng, n):
        """n texts that hold every word of the world: what the tokenizer is trained on."""
        tasks = tuple(dict.fromkeys(World.tasks + self.tasks))
        tasks += tasks[-1:] * (len(tasks) % 2 == 0)  # an odd number of them: each meets both pools
        for i in range(n):
            e = self.example(rng, tasks[i % len(tasks)], "three" if i % 2 else "paired", NOISE if i % 2 else None)
            yield f"{e.prompt} {e.answer}"

    def lookalikes(self, rng, n, split="train", family=8):
        """n clean captions with their pictures, in families of scenes one edit apart: hard candidates for retrieval."""
        scenes = []
        while len(scenes) < n:
            scene, kinds = sample_scene(rng, "paired", self.jitter), {}
            for kind, e in scene_edits(scene):
                if kind != "twice" and len(e) < 3 and in_pool("paired", [o.kind for o in e]):
                    kinds.setdefault(kind, []).append(e)
            scenes += [scene, *(rng.choice(rng.choice(list(kinds.values()))) for _ in range(family - 1))]
        captions = [true_caption(rng, scene) for scene in scenes[:n]]
        return [Example("caption", render(scene), "", caption.text(), (scene, caption)) for scene, caption in zip(scenes, captions)]

    def prompt_pool(self, rng, task):
        """Where the GRPO stage takes its prompts from: half of them ask for, show or tell of three objects."""
        draws = ("paired",) * 3 + ("prompted",) * 2 + ("three",) * 5
        return rng.choice(draws if task in ("draw", "plan") else ("paired", "three"))

    def negatives(self, rng, text, n, held_out=True, longest=3):
        """n captions one edit away from a caption, all kinds of edit alike (repeated if there are fewer), none naming a
        held-out pair unless held_out is False; [] for a text that is no caption. longest: objects a caption may name.
        (Where no true caption names three objects, false ones must not either: a reward would learn that three is wrong.)"""
        caption = parse_caption(text)
        if caption is None:
            return []
        kinds = {}
        for kind, e in edits(caption):
            if (not held_out or in_pool("three", e.kinds)) and not (kind == "add" and len(e.mentions) > longest):
                kinds.setdefault(kind, []).append(e.text())
        ways = [rng.sample(texts, len(texts)) for texts in kinds.values()]
        rng.shuffle(ways)  # one edit of each kind before the second of any: a relation has one edit, a colour many
        kept = [text for layer in itertools.zip_longest(*ways) for text in layer if text]
        return kept[:n] + [rng.choice(kept) for _ in range(n - len(kept))]


# ---------------------------------------------------------------- public data, in the official formats

FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SHAPES_SPLITS = ("train.tiny", "train.small", "train.med", "train.large", "val", "test")
NLVR_SPLITS = ("train", "dev", "test")


def data_error(path, found, expected, root):
    """The one line that every missing or damaged file ends in: what is there, what should be, both ways to get it."""
    way = f"move {root} away and add --download" if root.exists() else "add --download"
    return ValueError(f"{path}: found {found}, expected {expected}; {way}, or put the official files at {root}")


def read(path, root, expected, reader):
    """reader(path), with any failure told in that one line."""
    try:
        return reader(path)
    except Exception as error:  # gzip, numpy and Pillow raise eight kinds between them; all are passed on
        found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise data_error(path, " ".join(found.split()), expected, root) from error


def read_lines(path, root, count=None):
    """The lines of a text file; ValueError where it is damaged, or has not `count` of them."""
    lines = read(path, root, "UTF-8 text", lambda p: p.read_text("utf-8").removesuffix("\n").split("\n"))
    if count is not None and len(lines) != count:
        raise data_error(path, f"{len(lines)} lines", f"{count}, one for each picture", root)
    return lines


def check_split(root, split, legal):
    """ValueError that names the splits there are."""
    if split not in legal:
        raise ValueError(f"{root}: found no split {split!r}, expected one of {', '.join(legal)}")


def read_idx(path, root, item=()):
    """IDX .gz -> (N, *item) uint8. Its header is big-endian uint32: magic 0x800 + dimensions, then every dimension."""
    raw = read(path, root, "a gzip file", lambda p: gzip.decompress(p.read_bytes()))
    start, magic, size = 4 * (2 + len(item)), 0x801 + len(item), int(np.prod(item))
    found, count, *shape = np.frombuffer(raw[:start].ljust(start, b"\0"), ">u4").tolist()
    if found != magic:
        raise data_error(path, f"magic number 0x{found:08x}", f"0x{magic:08x}", root)
    if tuple(shape) != item:
        raise data_error(path, f"pictures of {shape}", list(item), root)
    if len(raw) != start + count * size:
        raise data_error(path, f"{len(raw)} bytes", f"{start} + {count} x {size}", root)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(count, *item)


def load_fashion_mnist(root, split="train"):
    """Clothes: pictures (N, 32, 32, 3) uint8, grey, padded by 2 with black; labels (N,) int64 into FASHION_CLASSES.

    split is "train" (60,000 pictures) or "test" (10,000, but any number is read). Raises ValueError, one line.
    Source: Xiao, Rasul, Vollgraf, arXiv 1708.07747, github.com/zalandoresearch/fashion-mnist.
    """
    root = Path(root)
    check_split(root, split, ("train", "test"))
    prefix = "train" if split == "train" else "t10k"
    pictures = read_idx(root / f"{prefix}-images-idx3-ubyte.gz", root, (28, 28))
    labels = read_idx(path := root / f"{prefix}-labels-idx1-ubyte.gz", root)
    if not 0 < len(labels) == len(pictures):
        raise data_error(path, f"{len(labels)} labels", f"one for each of {len(pictures)} pictures, at least 1", root)
    if labels.max() > 9:
        raise data_error(path, f"label {labels.max()}", "0 to 9", root)
    grey = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int64)


def load_shapes(root, split):
    """Yes/no questions on 3x3 grids: pictures (N, 32, 32, 3) uint8 RGB, questions (N str), answers (N,) bool.

    split is one of SHAPES_SPLITS. The files hold 30x30 pictures in blue, green, red order. Raises ValueError, one line.
    Source: Andreas et al., CVPR 2016; this copy: Hu et al., ICCV 2017, github.com/ronghanghu/n2nmn, exp_shapes.
    """
    root = Path(root)
    check_split(root, split, SHAPES_SPLITS)
    path, expected = root / "shapes_dataset" / f"{split}.input.npy", "an .npy array of uint8 (N, 30, 30, 3)"
    stored = read(path, root, expected, lambda p: np.load(io.BytesIO(p.read_bytes()), allow_pickle=False)[:])
    if stored.dtype != np.uint8 or stored.shape[1:] != (30, 30, 3) or len(stored) == 0:
        raise data_error(path, f"{stored.dtype} {stored.shape}", expected, root)
    questions = read_lines(path.with_name(f"{split}.query_str.txt"), root, len(stored))
    answers = read_lines(path := path.with_name(f"{split}.output"), root, len(stored))
    if odd := set(answers) - {"true", "false"}:
        raise data_error(path, f"the answer {min(odd)!r}", "true or false", root)
    pictures = np.pad(stored[..., ::-1], ((0, 0), (1, 1), (1, 1), (0, 0)))  # B, G, R -> R, G, B
    return pictures, questions, np.array(answers) == "true"


def load_nlvr(root, split):
    """Is a sentence true of three boxes? A list of (pictures (3, 32, 32, 3) uint8 RGB, sentence str, label bool).

    split is one of NLVR_SPLITS. A picture is 400x100: three 100x100 boxes, 50 columns apart. Each is shrunk alone,
    because the strip as a whole would lose its items at 32x32. A row has up to six pictures, one for each order of its
    boxes: the one its `permutation` names is read, else the first there is. Raises ValueError, one line.
    Source: Suhr, Lewis, Yeh, Artzi, ACL 2017, github.com/lil-lab/nlvr, folder nlvr.
    """
    root = Path(root)
    check_split(root, split, NLVR_SPLITS)
    folder = root / split
    paths = [folder / f"{split}.json", folder / f"{split}.examples.json"]
    path = next((p for p in paths if p.exists()), paths[0])
    files = {file.stem: file for file in (folder / "images").rglob("*.png")}
    examples = []
    for number, line in enumerate(tqdm(read_lines(path, root), desc=f"NLVR {split}", leave=False, disable=None), 1):
        try:
            row = json.loads(line)
            sentence, label = row["sentence"], {"true": True, "false": False}[row["label"]]
            if not isinstance(sentence, str):
                raise TypeError("sentence is not text")
            orders = [row["permutation"]] if "permutation" in row else range(6)
            names = [f"{split}-{row['identifier']}-{k}" for k in orders]
        except (ValueError, TypeError, KeyError) as error:
            expected = 'a JSON object with "sentence", "label" ("true" or "false") and "identifier"'
            raise data_error(path, f"{error!r} in line {number}", expected, root) from error
        file = next((files[name] for name in names if name in files), None)
        if file is None:
            raise data_error(folder / "images", f"no {names[0]}.png", f"a picture for line {number} of {path}", root)
        image = read(file, root, "a PNG picture", lambda p: Image.open(io.BytesIO(p.read_bytes())).convert("RGB"))
        if image.size != (400, 100):
            raise data_error(file, f"a picture of {image.width}x{image.height}", "400x100", root)
        boxes = [shrink(image.crop((x, 0, x + 100, 100))) for x in (0, 150, 300)]
        examples.append((np.stack(boxes), sentence, label))
    return examples


ADDRESSES = {
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # no TLS there: the MD5 is the check
    "shapes": "https://codeload.github.com/ronghanghu/n2nmn/tar.gz/refs/heads/master",
    "nlvr": "https://codeload.github.com/lil-lab/nlvr/tar.gz/refs/heads/master",  # 87,000 pictures, about 250 MB
}
WANTED = {  # folders of an archive, below the one named after repository and branch
    "shapes": (["exp_shapes", "shapes_dataset"], ["exp_shapes", "data"]),
    "nlvr": (["nlvr", "train"], ["nlvr", "dev"], ["nlvr", "test"]),
}
FASHION_MD5 = {  # from the official README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
STALLED = 30  # seconds without a byte after which a download is given up
DOWNLOAD_LIMIT = 2_000_000_000  # bytes of one file, and of all that an archive unpacks to


def fetch(url, path, md5=None):
    """Streams url to path. Raises OSError when it is cut short, too large, or not the file with this MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=STALLED) as answer, open(path, "wb") as file:
        size = int(answer.headers["Content-Length"] or 0)  # GitHub sends none; there gzip notices the missing end
        with tqdm(desc=f"download {path.name}", total=size or None, unit="B", unit_scale=True) as bar:
            while block := answer.read(1 << 16):
                digest.update(block)
                bar.update(file.write(block))
                if file.tell() > DOWNLOAD_LIMIT:
                    raise OSError(f"found more than {DOWNLOAD_LIMIT} bytes")
        file.flush()
        os.fsync(file.fileno())
    if size and path.stat().st_size != size:
        raise OSError(f"found {path.stat().st_size} bytes, expected {size}")
    if md5 and digest.hexdigest() != md5:
        raise OSError(f"found MD5 {digest.hexdigest()}, expected {md5}")


def unpack(archive, target, wanted):
    """Writes the plain files of the wanted folders of a .tar.gz below target. Raises OSError on anything unsafe."""
    total = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tqdm(tar, desc="unpack", unit=" files"):
            parts = member.name.replace("\\", "/").split("/")
            if parts[0] == "" or ".." in parts:
                raise OSError(f"found the unsafe path {member.name!r} in the archive")
            if parts[1:3] not in wanted or member.isdir():
                continue
            total += member.size
            if not member.isreg() or ":" in member.name or total > DOWNLOAD_LIMIT:
                raise OSError(f"found a link, a drive name or over {DOWNLOAD_LIMIT} bytes at {member.name!r}")
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)
        while tar.fileobj.read(1 << 20):  # to the last byte, where gzip compares its checksum
            pass
    if total == 0:
        raise OSError(f"found none of the folders {', '.join('/'.join(folder) for folder in wanted)} in the archive")


def download(name, data_dir):
    """Puts the official files of "fashion_mnist", "shapes" or "nlvr" at data_dir/name, all or none of them.

    They are made in a hidden folder next to it, which is renamed when all is there and removed when anything fails.
    A folder that already holds files is left as it is. Raises ValueError, one line.
    """
    if name not in ADDRESSES:
        raise ValueError(f"found no data set {name!r} to download, expected one of {', '.join(ADDRESSES)}")
    root, url = Path(data_dir) / name, ADDRESSES[name]
    try:
        if root.exists() and any(root.iterdir()):
            return
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as scratch:
            new, archive = Path(scratch, name), Path(scratch, f"{name}.tar.gz")
            new.mkdir()
            if name == "fashion_mnist":
                for file, md5 in FASHION_MD5.items():
                    url = f"{ADDRESSES[name]}/{file}"
                    fetch(url, new / file, md5)
            else:
                fetch(url, archive)
                unpack(archive, new, WANTED[name])
            if root.exists():
                root.rmdir()  # it is empty; Windows renames to no folder that is there
            os.replace(new, root)
    except Exception as error:  # urllib, ssl, gzip and tarfile have many kinds; all are passed on
        raise ValueError(f"{url}: {' '.join(str(error).split())}; try again later, or put the official files at {root}") from error


# ---------------------------------------------------------------- scenes and sentences in the style of SHAPES and of NLVR


@functools.cache
def coverage(shape, width, canvas):
    """(canvas, canvas) float: the share of each pixel that a shape of this width in the middle covers, as both data sets draw.

    >>> coverage("triangle", 4, 4).round(1).tolist()
    [[0.0, 0.2, 0.2, 0.0], [0.0, 0.8, 0.8, 0.0], [0.2, 1.0, 1.0, 0.2], [0.8, 1.0, 1.0, 0.8]]
    """
    y, x = (np.mgrid[: 8 * canvas, : 8 * canvas] + 0.5) / 8 - canvas / 2
    inside = {"square": np.maximum(abs(x), abs(y)) < width / 2, "circle": x**2 + y**2 < width**2 / 4,
              "triangle": (abs(y) < width / 2) & (2 * abs(x) < y + width / 2)}[shape]  # fmt: skip
    return inside.reshape(canvas, 8, canvas, 8).mean((1, 3))


STEPS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
GRID_WORDS = ("red", "green", "blue", *SHAPES)
_noun = {w: f"a {w}" if w in SHAPES else f"a {w} shape" for w in GRID_WORDS}
GRID_QUESTIONS = {  # text: (X, steps, Y). Is some X where the steps lead, the last one first, from some Y?
    " ".join(("is", _noun[x], *steps, _noun[y] if steps or y in SHAPES else y)): (x, steps, y)
    for n in range(3) for steps in itertools.product(STEPS, repeat=n) for x in GRID_WORDS for y in GRID_WORDS}  # fmt: skip


def sample_grid(rng):
    """A 3x3 grid in the style of SHAPES: {(row, column): (color, shape, width in pixels)}; a fifth of the cells are empty."""
    return {cell: (rng.choice(GRID_WORDS[:3]), rng.choice(SHAPES), rng.choice((5, 7.5)) * rng.randrange(90, 111, 2) / 100)
            for cell in itertools.product(range(3), range(3)) if rng.random() > 0.2}  # fmt: skip


def render_grid(rng, grid):
    """Its picture: (32, 32, 3) uint8. Every object's colour is a little off."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    for (row, column), (color, shape, width) in grid.items():
        rgb = [255 * min(max((color == c) + rng.uniform(-0.2, 0.2), 0), 1) for c in GRID_WORDS[:3]]
        picture[10 * row + 1 : 10 * row + 11, 10 * column + 1 : 10 * column + 11] = coverage(shape, width, 10)[..., None] * rgb
    return picture


def grid_answer(grid, question):
    """(answer, steps): is it so, and the nine cells, row by row, with an x at every Y; then for each step, the last one first, where
    it leads from there: o or x. The last time what stands there is named, with an x at every X. (None, None) where no X is in the
    grid: such a question is not asked.

    >>> grid = {(0, 0): ("red", "circle", 5), (1, 1): ("blue", "square", 5)}
    >>> answer, steps = grid_answer(grid, "is a circle above left of a square")
    >>> print(answer, steps)  # doctest: +NORMALIZE_WHITESPACE
    True red-circle nothing nothing  nothing blue-square-x nothing  nothing nothing nothing
         o o o  x o o  o o o    red-circle-x o o  o o o  o o o
    >>> grid_answer(grid, "is a square above a square")[0]
    False
    """
    x, steps, y = GRID_QUESTIONS[question]
    seen, there = ({cell for cell, o in grid.items() if word in o} for word in (x, y))
    cells = list(itertools.product(range(3), range(3)))
    names = {cell: "-".join(grid[cell][:2]) if cell in grid else "nothing" for cell in cells}
    words = [names[cell] + "-x" * (cell in there) for cell in cells]
    for n, (down, right) in enumerate([STEPS[s] for s in reversed(steps)] or [(0, 0)], 1):
        there = {(r + down, c + right) for r, c in there} & set(cells)
        last = n >= len(steps)
        words += [(names[cell] + "-x" * (cell in seen) if last else "x") if cell in there else "o" for cell in cells]
    return (bool(seen & there), " ".join(words)) if seen else (None, None)


class Item(NamedTuple):
    """One item of an NLVR box of 100x100 pixels; x and y of its upper left corner. A tower's lowest block comes first."""

    shape: str
    color: str
    size: int
    x: int
    y: int

    @property
    def touches(self):
        """The walls of the box that it touches."""
        there = {"left": self.x == 0, "top": self.y == 0, "right": self.x + self.size == 100, "bottom": self.y + self.size == 100}
        return {wall for wall, here in there.items() if here}

    def fits(self, color, shape=None):
        return self.color == color and shape in (None, self.shape)


def count(box, color, shape=None):
    return sum(o.fits(color, shape) for o in box)


def over(o, tower, color, other):
    """Is this a block of one colour that stands right on a block of the other?"""
    return o.color == color and any(below.y == o.y + 21 and below.color == other for below in tower)


def colors(box):
    return {o.color for o in box}


NLVR_COLORS = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
_color = {c: c for c in NLVR_COLORS}
NLVR_SLOTS = {
    "c": _color, "d": _color, "n": {w: n for w, n in NUMBERS.items() if n > 1}, "e": {"top": -1, "base": 0, "bottom": 0},
    "s": {s: s for s in SHAPES} | dict.fromkeys(("item", "object")), "t": {s: s for s in SHAPES} | {"item": None},
    "w": dict.fromkeys(("touching the wall", "touching the edge", "touching an edge", "touching any edge", "touching the side"), 1)
    | {"touching the corner": 2, "closely touching a corner": 2, "closely touching a corner of a box": 2},
    "b": dict.fromkeys(("touching the base", "touching the bottom", "closely touching the bottom of a box"), "bottom")
    | {"closely touching right wall of a box": "right"}, "o": dict.fromkeys(("over", "above", "on")),
    "q": dict.fromkeys(("", "exactly "))}  # fmt: skip
NLVR_ROWS = [
    Row("towers", "{c} tower*", lambda x, c: colors(x) == {c}),
    Row("towers", "tower* with a {c} block at the {e}", lambda x, c, e: x[e].color == c),
    Row("towers", "{c} block* as the {e} of a tower", lambda o, x, c, e: o is x[e] and o.color == c, True),
    Row("towers", "{c} block* as the {e} of a tower with {n} blocks", lambda o, x, c, e, n: o is x[e] and o.fits(c) and len(x) == n, True),
    Row("towers", "tower* with {q}{n} blocks", lambda x, q, n: len(x) == n),
    Row("towers", "tower* with exactly {n} blocks with a {c} block at the {e}", lambda x, n, c, e: len(x) == n and x[e].color == c),
    Row("towers", "tower* with {n} {c} blocks", lambda x, n, c: count(x, c) >= n),
    Row("towers", "tower* with a {c} block {o} a {d} block", lambda x, c, o, d: any(over(p, x, c, d) for p in x)),
    Row("towers", "{c} block* {o} a {d} block", lambda p, x, c, o, d: over(p, x, c, d), True),
    Row("towers", "{c} block*", lambda o, x, c: o.color == c, True),
] * 2 + [  # two scenes in three are towers
    Row("items", "{c} {s}*", lambda o, x, c, s: o.fits(c, s), True),
    Row("items", "{c} {s}* {w}", lambda o, x, c, s, w: o.fits(c, s) and len(o.touches) >= w, True),
    Row("items", "{s}* {w}", lambda o, x, s, w: s in (None, o.shape) and len(o.touches) >= w, True),
    Row("items", "{c} {s}* not {w}", lambda o, x, c, s, w: o.fits(c, s) and len(o.touches) < w, True),
    Row("items", "{c} {s}* {b}", lambda o, x, c, s, b: o.fits(c, s) and b in o.touches, True),
    Row("items", "box* with {n} items", lambda x, n: len(x) == n),
    Row("items", "box* with {n} {c} {s}s", lambda x, n, c, s: count(x, c, s) >= n),
    Row("items", "box* with a {c} {s} and a {d} {t}", lambda x, c, s, d, t: count(x, c, s) and count(x, d, t)),
    Row("items", "box* with a {c} {s} and {n} {d} {t}s", lambda x, c, s, n, d, t: count(x, c, s) and count(x, d, t) >= n),
    Row("items", "box* with only {c} items", lambda x, c: colors(x) == {c}),
    Row("items", "box* with items of only {c} and {d} color", lambda x, c, d: colors(x) == {c, d}),
    Row("items", "box* with items of only one color", lambda x: len(colors(x)) == 1),
]


def sample_boxes(rng, kind):
    """Three boxes of Items in the style of NLVR: towers of one to four blocks, or one to seven items anywhere."""
    boxes = []
    for _ in range(3):
        if kind == "towers":
            boxes.append([Item("square", rng.choice(tuple(NLVR_COLORS)), 20, 40, 80 - 21 * k) for k in range(rng.randint(1, 4))])
            continue
        boxes.append(box := [])
        for _ in range(rng.randint(1, 7)):
            size = rng.choice((10, 20, 30))
            x, y = (min(rng.randrange(100), 100 - size) for _ in "xy")  # as there, many stand at the right or on the ground
            if all(max(abs(2 * (x - o.x) + size - o.size), abs(2 * (y - o.y) + size - o.size)) > size + o.size for o in box):
                box.append(Item(rng.choice(SHAPES), rng.choice(tuple(NLVR_COLORS)), size, x, y))
        box.sort(key=lambda o: o.x)
    return boxes


def render_box(box):
    """(32, 32, 3) uint8: drawn at 100x100, and shrunk as load_nlvr does it."""
    picture = np.full((100, 100, 3), 211.0)
    for o in box:
        there = picture[o.y : o.y + o.size, o.x : o.x + o.size]
        there += coverage(o.shape, o.size, o.size)[..., None] * (NLVR_COLORS[o.color] - there)
    return shrink(Image.fromarray(picture.astype(np.uint8)))


def shrink(box):
    """A box of any size -> (S, S, 3) uint8."""
    return np.asarray(box.resize((SIDE, SIDE), Image.Resampling.BOX))


class FashionMNIST:
    """Real pictures of clothes as a source of examples: draw a class, name it, answer questions about it."""

    name, tasks = "fashion_mnist", ("draw", "caption", "ask", "text")
    phrases = ("a {}", "a picture of a {}", "a photo of one {}")

    def __init__(self, root):
        """The last 5,000 training pictures are the validation split."""
        pictures, labels = load_fashion_mnist(root, "train")
        n = max(len(labels) - 5000, len(labels) // 2)
        self.splits = {"train": (pictures[:n], labels[:n]), "val": (pictures[n:], labels[n:]), "test": load_fashion_mnist(root, "test")}

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """As World.example; there is one pool, and noise is a wrong class name. `truth` is the label."""
        pictures, labels = self.splits[split]
        i = rng.randrange(len(labels))
        name = FASHION_CLASSES[labels[i]]
        if task == "ask":
            asked = name if rng.random() < 0.5 else rng.choice(FASHION_CLASSES)
            closed = (f"is this a {asked} ?", "yes" if asked == name else "no")
            return Example(task, pictures[i], *(closed if rng.random() < 0.5 else ("what is this ?", name)), labels[i])
        if noise and rng.random() < noise["wrong"]:
            name = rng.choice(FASHION_CLASSES)
        text = rng.choice(self.phrases).format(name)
        return Example(task, pictures[i], *((text, "") if task == "draw" else ("", text)), labels[i])

    def texts(self, rng, n):
        for i in range(n):
            e = self.example(rng, self.tasks[i % len(self.tasks)])
            yield f"{e.prompt} {e.answer}"

    def lookalikes(self, rng, n, split="train"):
        return [self.example(rng, "caption", split=split) for _ in range(n)]

    def prompt_pool(self, rng, task):
        return "paired"

    def negatives(self, rng, text, n, held_out=True, longest=3):
        """n captions of the other classes in the same words; [] for a text that is no caption."""
        start, _, name = text.rpartition(" ")
        if name not in FASHION_CLASSES or f"{start} {{}}" not in self.phrases:
            return []
        others = [f"{start} {c}" for c in FASHION_CLASSES if c != name]
        return rng.sample(others, n) if n <= len(others) else others + [rng.choice(others) for _ in range(n - len(others))]


class Asked:
    """What SHAPES and NLVR share as sources: one question, answered at once (tasks[0]) or with steps ("reason"); `splits` of real
    items, and in training made ones beside them, with steps worked out: what is seen where. A yes or no is too little to learn
    to see from, so three quarters of pre-training have steps."""

    made, stepped = 0.8, 0.75  # shares of training: of made items, in pre-training of those with steps

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """As World.example. Questions are clean. Only made ones have steps to learn from."""
        also = "reason" in self.tasks and pool == "paired" and rng.random() < self.stepped
        steps = split == "train" and (task == "reason" or also)
        if steps or (split == "train" and rng.random() < self.made):
            e, thought = self.make(rng)
            return e._replace(task="reason", answer=f"{THINK} {thought} {END_THINK} {e.answer}") if steps else e
        return self.shuffled(rng, rng.choice(self.splits[split]))._replace(task=task)

    def shuffled(self, rng, example):
        return example

    def prompt_pool(self, rng, task):
        return "prompted"

    def texts(self, rng, n):
        for e in [*self.splits["train"], *(self.example(rng, "reason") for _ in range(n // 4))]:
            yield f"{e.prompt} {e.answer}"


class Shapes(Asked):
    """SHAPES as a source. Its official val is what is reported ("test"): none of its questions is ever trained on, nor are
    the 32 other ones, about made grids, that are shown during training ("val")."""

    name, tasks, made = "shapes", ("ask", "reason"), 0.9

    def __init__(self, root):
        rows = lambda split: [Example("ask", picture, question, NO_YES[int(answer)])  # noqa: E731
                              for picture, question, answer in zip(*load_shapes(root, split))]  # fmt: skip
        real = rows("val")
        closed, rng = {e.prompt for e in real}, random.Random(0)
        trained = [e for e in rows("train.tiny") + rows("train.small") if e.prompt not in closed]
        shown = rng.sample(sorted(set(GRID_QUESTIONS) - closed - {e.prompt for e in trained}), 32)
        self.questions = [q for q, (_, steps, _) in GRID_QUESTIONS.items() if q not in closed.union(shown)
                          for _ in range(1 if len(steps) == 2 else 9)]  # officially one in nine of those of two steps is asked
        self.splits = {"train": trained, "val": [self.make(rng, shown)[0] for _ in range(512)], "test": real}

    def make(self, rng, questions=None):
        """A question that may be asked of a made grid, and its steps."""
        while True:
            grid, question = sample_grid(rng), rng.choice(questions or self.questions)
            answer, steps = grid_answer(grid, question)
            if steps:
                return Example("ask", render_grid(rng, grid), question, NO_YES[answer]), steps


class NLVR(Asked):
    """NLVR as a source. No sentence of dev or test is trained on, real or made; words that the train rows do not have are
    left out of dev and test, where they are spelling mistakes and the like."""

    name, tasks = "nlvr", ("judge", "reason")

    def __init__(self, root):
        plain = lambda sentence: " ".join(re.findall("[a-z0-9]+", sentence.lower()))  # noqa: E731
        real = {split: [Example("judge", pictures, plain(sentence), TRUTH[label], sentence)
                        for pictures, sentence, label in load_nlvr(root, split)] for split in NLVR_SPLITS}  # fmt: skip
        self.closed = {e.prompt for split in ("dev", "test") for e in real[split]}
        trained = [e for e in real["train"] if e.prompt not in self.closed]
        words = {w for e in trained for w in e.prompt.split()}
        known = lambda e: e._replace(prompt=" ".join(w for w in e.prompt.split() if w in words))  # noqa: E731
        self.splits = {"train": trained, "val": list(map(known, real["dev"])), "test": list(map(known, real["test"]))}

    def shuffled(self, rng, example):
        """With the boxes in another order, which changes no truth."""
        return example._replace(picture=example.picture[rng.sample(range(3), 3)])

    def make(self, rng):
        """A sentence about made boxes, and its steps: what is in each box, blocks from below and items from the left, with an x at
        those that count, and how many count there."""
        text, boxes, label, row, marks = sample_statement(rng, NLVR_ROWS, NLVR_SLOTS, lambda kind: sample_boxes(rng, kind), self.closed)
        steps = []
        for box, found in zip(boxes, marks):
            names = [o.color if row.kind == "towers" else f"{o.color}-{o.shape}" for o in box]
            steps += [name + "-x" * x for name, x in zip(names, found)] if row.part else names
            steps.append(str(sum(found)))
        return Example("judge", np.stack([render_box(box) for box in boxes]), text, label), " ".join(steps)


SOURCES = {"synthetic": World, "fashion_mnist": FashionMNIST, "shapes": Shapes, "nlvr": NLVR}


def tasks_of(source, names=None):
    """Those named of the tasks that a source knows, and in any case what SHAPES and NLVR ask; its own where it knows none."""
    known, always = (*source.tasks, *getattr(source, "further", ())), source.tasks[:1] if source.name in ("shapes", "nlvr") else ()
    return tuple(t for t in known if t in (names or source.tasks) or t in always) or source.tasks


def make_sources(names, data_dir, jitter=0, fetch_missing=False, tasks=None):
    """The sources named in a comma-separated list; real data is read from data_dir/NAME, downloaded first if asked for. tasks:
    names that each source is limited to, see tasks_of."""
    made = []
    for name in names.split(","):
        if name != "synthetic" and fetch_missing:
            download(name, data_dir)
        source = World(jitter) if name == "synthetic" else SOURCES[name](Path(data_dir) / name)
        source.tasks = tasks_of(source, tasks)
        made.append(source)
    return made


# ---------------------------------------------------------------- words: a byte-pair tokenizer that knows its word list

TEMPLATES = {  # after <bos> and the task's name; with a question mark: chosen. Every picture stands behind its <image>
    "draw": "prompt picture?", "caption": "pictures <answer> answer?", "ask": "pictures prompt <answer> answer?",
    "reason": "pictures prompt <answer> answer?", "text": "answer?", "hops": "pictures prompt <answer> answer?",
    "steps": "pictures prompt <answer> <think> answer?", "story": "prompt picture? prompt picture? prompt picture?",
    "tell": "pictures <answer> answer?", "judge": "pictures prompt <answer> answer?",
    "plan": "prompt <answer> answer? picture?"}  # fmt: skip
SPECIAL = ("<pad>", "<bos>", *(f"<{task}>" for task in TEMPLATES), "<image>", "<answer>",  # always given
           "<eos>", THINK, END_THINK)  # these three can be chosen: text that is chosen starts at <eos>
PAD, BOS, IMAGE, ANSWER, EOS = (SPECIAL.index(s) for s in ("<pad>", "<bos>", "<image>", "<answer>", "<eos>"))
MAX_TEXT = {"caption": 18, "ask": 3, "reason": 31, "text": 18, "hops": 3, "steps": 28, "tell": 44, "judge": 3, "plan": 28}
# tokens that a free text may have, <eos> included


class Batch(NamedTuple):
    """N sequences of L positions, all (N, L) int64. Rows are padded on the right with <pad>, which nothing scores."""

    tokens: torch.Tensor  # the template: >= 0 is given, -1 is chosen by the policy
    target: torch.Tensor  # the template with the reference answer filled in; <pad> where there is none
    lo: torch.Tensor  # chosen positions: allowed ids are lo <= id < hi
    hi: torch.Tensor
    patch: torch.Tensor  # which patch of the picture stands here, 0 to P-1; -1 for text

    @property
    def mask(self):
        """(N, L) bool: the completion mask of the reference answers, exactly the chosen positions."""
        return (self.tokens < 0) & (self.target != PAD)

    def to(self, device):
        return Batch(*(t.to(device, non_blocking=True) for t in self))

    def pack(self, filled):
        """These templates with `filled`, (N, L), as target, and without the places that a text did not use: what follows
        moves up, so that nothing attends to them and every token has the position that it has in training."""
        unused = (self.tokens < 0) & (filled == PAD)
        order = unused.int().argsort(dim=1, stable=True)
        return Batch(*(t.gather(1, order) for t in self._replace(target=filled)))

    def trim(self):
        """Packed, and without the columns at the right end that hold no reference: what teacher forcing needs."""
        packed = self.pack(self.target)
        length = int((packed.target != PAD).any(0).nonzero().max()) + 1
        return Batch(*(t[:, :length] for t in packed))

    def repeat(self, times):
        """Every row `times` times, one after the other: the groups of GRPO."""
        return Batch(*(t.repeat_interleave(times, 0) for t in self))

    def blank(self, rows):
        """With the words and codes that some rows, (N,) bool, are given replaced by <pad>: the same task, told nothing."""
        given = rows[:, None] & (self.tokens >= EOS)
        return self._replace(tokens=self.tokens.masked_fill(given, PAD), target=self.target.masked_fill(given, PAD))


class Vocabulary:
    """Words first, then picture codes, in one id space; and the templates of all tasks.

    n_codes: entries of the codebook (K). n_patches: tokens a picture takes (P). size: V.
    """

    def __init__(self, tokenizer, words, n_codes, n_patches):
        self.tokenizer, self.words = tokenizer, frozenset(words)
        self.n_text, self.n_codes, self.n_patches = tokenizer.get_vocab_size(), n_codes, n_patches
        self.size = self.n_text + n_codes
        self._ids = {w: tokenizer.encode(w).ids for w in self.words}
        self._strings = [tokenizer.id_to_token(i) for i in range(self.n_text)]
        self._strings = [" " + s if s in SPECIAL else s.replace("▁", " ") for s in self._strings]

    @staticmethod
    def train(texts, n_codes, n_patches, vocab_size=1024):
        """Learn byte-pair merges from an iterable of texts; the word list is the words that occur in it.

        A word begins with the character "▁". (An end-of-word suffix would do as well, but the trainer numbers suffixed
        characters in the order of a hash table: another order, and so other ids, in every process.)"""
        texts = list(texts)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=0, special_tokens=list(SPECIAL), show_progress=False))
        return Vocabulary(tokenizer, {w for t in texts for w in t.split()}, n_codes, n_patches)

    def save(self, folder):
        """tokenizer.json and words.json."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "words.json").write_text(json.dumps(sorted(self.words)), encoding="utf-8")

    @staticmethod
    def load(folder, n_codes, n_patches):
        """What `save` left there."""
        words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        return Vocabulary(Tokenizer.from_file(str(folder / "tokenizer.json")), words, n_codes, n_patches)

    def encode(self, text):
        """Token ids of a text. ValueError names the words that the tokenizer was never trained on."""
        try:
            return [i for w in text.split() for i in self._ids[w]]
        except KeyError:
            unknown = sorted(set(text.split()) - self.words)
            known = " ".join(sorted(w for w in self.words if w not in SPECIAL))
            raise ValueError(f"unknown word(s) {', '.join(repr(w[:40]) for w in unknown[:5])}; this model knows: {known}") from None

    def decode(self, ids):
        """The text of token ids up to the first <eos>; picture codes and <pad> are left out.

        Words and special tokens are separated by one space."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return "".join(self._strings[i] for i in ids if PAD < i < self.n_text).strip()

    def batch(self, examples, codes, device="cpu"):
        """The Batch of a list of examples (tasks may be mixed) and the codes of all `pictures_of` them, (M, P) int64 in [0, K)."""
        left = iter((codes + self.n_text).tolist())
        rows = [self._row(e, [next(left) for _ in range(1 if e.picture is None else len(e.pictures))]) for e in examples]
        length = max(map(len, rows))
        padded = [row + [(PAD, PAD, 0, self.size, -1)] * (length - len(row)) for row in rows]
        flat = np.fromiter(itertools.chain.from_iterable(itertools.chain.from_iterable(padded)), np.int64)  # 6 times as fast as a tensor
        return Batch(*torch.from_numpy(flat.reshape(len(rows), length, 5)).permute(2, 0, 1).contiguous()).to(device)

    def _row(self, example, pictures):
        """One example, position by position: (template, reference, lo, hi, patch number). pictures: the codes of each."""
        task, row, parts = example.task, [], TEMPLATES[example.task].split()
        sentences, pictures = iter(example.prompt.split(" . ", parts.count("prompt") - 1)), iter(pictures)

        def give(ids, patch=None):
            row.extend((i, i, 0, self.size, k) for i, k in zip(ids, patch or itertools.repeat(-1)))

        give([BOS, SPECIAL.index(f"<{task}>")])
        for part in parts:
            if part == "prompt":
                give(self.encode(next(sentences)))
            elif part == "pictures":
                for codes in pictures:
                    give([IMAGE])
                    give(codes, itertools.count())
            elif part == "picture?":
                give([IMAGE])
                row.extend((-1, code, self.n_text, self.size, k) for k, code in enumerate(next(pictures)))
            elif part == "answer?":
                said = example.answer.removeprefix(THINK) if THINK in parts else example.answer
                words, longest = self.encode(said) + [EOS], MAX_TEXT[task]
                if len(words) > longest:
                    raise ValueError(f"the {task} text has {len(words)} tokens, more than {longest}: {example.answer!r}")
                row.extend((-1, i, EOS, self.n_text, -1) for i in words + [PAD] * (longest - len(words)))
            else:
                give([SPECIAL.index(part)])
        return row


# ---------------------------------------------------------------- try it


def main():
    """One scene of each pool with its texts; scenes a second."""
    rng = random.Random(0)
    for pool in COUNTS:
        scene = sample_scene(rng, pool)
        caption = true_caption(rng, scene)
        print(f"{pool:9} {caption.text()}\n{'':9} noisy: {noisy_caption(rng, caption, pool).text()}")
        print(f"{'':9} {' -> '.join(question(rng, scene))}")
        if len(scene) > 1:
            print(f"{'':9} {' -> '.join(multihop_question(rng, scene))}")
    world, start, n = World(), time.perf_counter(), 8000
    for i in range(n):
        world.example(rng, world.tasks[i % 4], noise=NOISE)
    print(f"{n / (time.perf_counter() - start):,.0f} scenes a second, each with its picture and a text")


if __name__ == "__main__":
    main()
