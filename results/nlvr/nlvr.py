"""Bring your own data: NLVR, sentences that are true or false about three boxes.

Your own data needs four things, in this order here, and no change to the root files:

  1. a loader     official files -> pictures, texts, labels; one clear line for a damaged file
  2. more of it   because labels are few: generated boxes and sentences in NLVR's style. True or
                  false teaches too little, so these have worked steps: the items in each box, one
                  by one, with -x on those that count, and then how many count
  3. a source     name, tasks, splits, example, texts, prompt_pool: what train.py and eval.py use
  4. register()   its name, its address, columns for its longer texts, its defaults

The base learns from generated boxes with steps. GRPO takes half its prompts from real train rows:
they have a key but no steps, so the policy tries its own. We train on no sentence of dev or test.

    <verify> <image> box <image> box <image> box there is exactly one black tower <answer>
    <think> black-square black-square 1 blue-square 0 blue-square black-square 0 </think> true

Source: A. Suhr, M. Lewis, J. Yeh, Y. Artzi, ACL 2017; github.com/lil-lab/nlvr, folder nlvr.

    $ python results/nlvr/nlvr.py --data-dir DIR --out runs/nlvr    # reads DIR/nlvr; 25 minutes
"""

import io
import json
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root files

import data
import eval as evaluation
import train
from data import END_THINK, SHAPES, SIDE, THINK, TRUTH, Example

# ---------------------------------------------------------------- 1. a loader


def shrink(box):
    """A box of any size -> (S, S, 3) uint8."""
    return np.asarray(box.resize((SIDE, SIDE), Image.Resampling.BOX))


def cut_boxes(raw):
    """A picture's bytes -> (3, S, S, 3). Boxes shrink singly: the whole strip would lose items."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    if image.size != (400, 100):
        raise ValueError(f"{image.width}x{image.height} pixels")
    return np.stack([shrink(image.crop((x, 0, x + 100, 100))) for x in (0, 150, 300)])


def parse_rows(raw, split):
    """JSON lines as bytes -> one (sentence, label, possible names of its picture) per row."""
    for number, line in enumerate(raw.decode().strip().split("\n"), 1):
        try:
            row = json.loads(line)
            sentence = "" + row["sentence"]  # a TypeError if it is no text
            label = {"true": True, "false": False}[row["label"]]
            orders = [row["permutation"]] if "permutation" in row else range(6)  # of the boxes
            yield sentence, label, [f"{split}-{row['identifier']}-{order}" for order in orders]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{error!r} in line {number}") from error


def load_nlvr(root, split):
    """A list of (pictures (3, 32, 32, 3) uint8 RGB, sentence str, label bool): is it true of them?

    split: "train", "dev" or "test". Reads SPLIT.json, or SPLIT.examples.json where there is none,
    and the picture that a row's `permutation` names, else its first. ValueError, one line.
    """
    data.check_split(root, split, ("train", "dev", "test"))
    folder, items = Path(root) / split, []
    paths = [folder / f"{split}.json", folder / f"{split}.examples.json"]
    path = next((path for path in paths if path.exists()), paths[0])
    expected = 'a JSON object a line with "sentence", "label" ("true" or "false"), "identifier"'
    rows = data.read(path, expected, lambda raw: list(parse_rows(raw, split)))
    files = {file.stem: file for file in (folder / "images").rglob("*.png")}
    for sentence, label, names in tqdm(rows, f"NLVR {split}", leave=False, disable=None):
        file = next((files[name] for name in names if name in files), None)
        if file is None:
            raise data.data_error(folder / "images", f"no {names[0]}.png", "a picture a row")
        boxes = data.read(file, "a PNG picture of 400x100 pixels", cut_boxes)
        items.append((boxes, sentence, label))
    return items


# ---------------------------------------------------------------- 2. more of it: made boxes

COLORS = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
Item = namedtuple("Item", "shape color size x y")  # pixels of 100; x, y of its upper left corner


def touches(o, place):
    """Does an item touch the "right" or "bottom" wall, any "wall", or a "corner", which is two?"""
    right, bottom = o.x + o.size == 100, o.y + o.size == 100
    walls = right + bottom + (o.x == 0) + (o.y == 0)
    return {"right": right, "bottom": bottom, "wall": walls > 0, "corner": walls > 1}[place]


def sample_tower(rng):
    """A tower of one to four blocks, the lowest first."""
    colors = [rng.choice(list(COLORS)) for _ in range(rng.randint(1, 4))]
    return [Item("square", color, 20, 40, 80 - 21 * k) for k, color in enumerate(colors)]


def sample_scatter(rng):
    """One to seven items anywhere, none over another, from left to right."""
    box, taken = [], np.zeros((101, 101), bool)
    for _ in range(rng.randint(1, 7)):
        size = rng.choice((10, 20, 30))
        x, y = (min(rng.randrange(100), 100 - size) for _ in "xy")  # as in NLVR, many at a wall
        area = taken[y : y + size + 1, x : x + size + 1]  # and a pixel between two items
        if not area.any():
            area[:] = True
            box.append(Item(rng.choice(SHAPES), rng.choice(list(COLORS)), size, x, y))
    return sorted(box, key=lambda o: o.x)


def render_box(box):
    """The picture of a box, drawn at 100x100 and shrunk as in load_nlvr: (S, S, 3) uint8."""
    picture = np.full((100, 100, 3), 211.0)
    for o in box:
        ground = picture[o.y : o.y + o.size, o.x : o.x + o.size]
        ground += data.coverage(o.shape, o.size, o.size)[..., None] * (COLORS[o.color] - ground)
    return shrink(Image.fromarray(picture.astype(np.uint8)))


NUMBERS = {"2": 2, "two": 2, "3": 3, "three": 3, "4": 4, "four": 4}
ENDS = {"top": -1, "base": 0, "bottom": 0}
WALLS = {
    "touching the wall": "wall", "touching the edge": "wall", "touching any edge": "wall",
    "touching the corner": "corner", "closely touching a corner": "corner",
    "closely touching a corner of a box": "corner", "closely touching right wall of a box": "right",
    "touching the base": "bottom", "closely touching the bottom of a box": "bottom",
}  # fmt: skip
SLOTS = {
    "color": COLORS, "other": COLORS, "number": NUMBERS, "end": ENDS, "over": ("above", "on"),
    "shape": (*SHAPES, "item", "object"), "wall": WALLS,
}  # fmt: skip
QUANTIFIERS = (  # words, plural s, smallest and largest count that make them true
    ("there is a", "", 1, 99), ("there is no", "", 0, 0), ("there is 1", "", 1, 99),
    ("there is one", "", 1, 99), ("there is at least 1", "", 1, 99),
    ("there is at least one", "", 1, 99), ("there is exactly one", "", 1, 1),
    ("there are 2", "s", 2, 99), ("there are two", "s", 2, 99), ("there are 3", "s", 3, 99),
    ("there are at least two", "s", 2, 99), ("there are exactly two", "s", 2, 2),
    ("there are exactly three", "s", 3, 3),
)  # fmt: skip


def in_tower(box, s, color, other, number, end, over, **_):
    """{noun: a list of bools, which blocks of a tower it means; or a bool, if it means the tower}.
    s: of the plural; the other words are from SLOTS."""
    blocks, last = [o.color == color for o in box], ENDS[end] % max(len(box), 1)
    at_end = [ok and i == last for i, ok in enumerate(blocks)]
    above = [ok and i > 0 and box[i - 1].color == other for i, ok in enumerate(blocks)]
    high = len(box) == NUMBERS[number]
    as_end = f"{color} block{s} as the {end} of a tower"
    return {
        f"{color} block{s}": blocks,
        as_end: at_end,
        f"{as_end} with {number} blocks": [ok and high for ok in at_end],
        f"{color} block{s} {over} a {other} block": above,
        f"{color} tower{s}": all(blocks),
        f"tower{s} with a {color} block at the {end}": any(at_end),
        f"tower{s} with a {color} block {over} a {other} block": any(above),
        f"tower{s} with {number} blocks": high,
        f"tower{s} with {number} {color} blocks": sum(blocks) >= NUMBERS[number],
    }


def in_scatter(box, s, color, other, number, shape, wall, **_):
    """As in_tower, for a box with items anywhere."""
    shaped = [shape in ("item", "object", o.shape) for o in box]
    colored = [ok and o.color == color for ok, o in zip(shaped, box)]
    touching = [touches(o, WALLS[wall]) for o in box]
    boxes = "boxes" if s else "box"
    return {
        f"{color} {shape}{s}": colored,
        f"{color} {shape}{s} {wall}": [a and b for a, b in zip(colored, touching)],
        f"{color} {shape}{s} not {wall}": [a and not b for a, b in zip(colored, touching)],
        f"{shape}{s} {wall}": [a and b for a, b in zip(shaped, touching)],
        f"{boxes} with {number} items": len(box) == NUMBERS[number],
        f"{boxes} with {number} {color} {shape}s": sum(colored) >= NUMBERS[number],
        f"{boxes} with only {color} and {other} items": {o.color for o in box} == {color, other},
    }


def sample_statement(rng, closed=()):
    """(sentence, three boxes, what its noun means in each, "true" or "false"); never a closed one.
    Both labels are equally likely for every sentence, so the words alone give nothing away."""
    kinds = [(sample_tower, in_tower)] * 2 + [(sample_scatter, in_scatter)]
    while True:
        words = {slot: rng.choice(list(values)) for slot, values in SLOTS.items()}
        (sample, means), (start, s, least, most) = rng.choice(kinds), rng.choice(QUANTIFIERS)
        noun, by_truth = rng.choice(list(means([], s, **words))), {}
        for _ in range(16 if f"{start} {noun}" not in closed else 0):
            boxes = [sample(rng) for _ in range(3)]
            marks = [means(box, s, **words)[noun] for box in boxes]
            count = sum(np.sum(mark) for mark in marks)
            by_truth.setdefault(bool(least <= count <= most), (boxes, marks))
            if len(by_truth) == 2:
                label = rng.random() < 0.5
                return f"{start} {noun}", *by_truth[label], TRUTH[label]


def steps(boxes, marks):
    """The items in each box, a tower from below, with -x on what counts; and how many count."""
    words = []
    for box, mark in zip(boxes, marks):
        each = mark if isinstance(mark, list) else [False] * len(box)
        words += [f"{o.color}-{o.shape}" + "-x" * x for o, x in zip(box, each)]
        words.append(str(int(np.sum(mark))))
    return " ".join(words)


# ---------------------------------------------------------------- 3. a source


class NLVR:
    """What train.py and eval.py need from a source."""

    name, tasks, real_items = "nlvr", ("verify",), True  # eval.py measures every real item once

    def __init__(self, root):
        """splits: {split: real rows}, without typing errors (words that no train row has)."""
        self.splits, self.words = {}, set()
        for split, stored in (("train", "train"), ("val", "dev"), ("test", "test")):
            self.splits[split] = rows = []
            for boxes, sentence, label in load_nlvr(root, stored):
                words = re.findall("[a-z0-9]+", sentence.lower())[:24]
                self.words.update(words if split == "train" else ())
                prompt = " ".join(word for word in words if word in self.words)
                rows.append(Example("verify", boxes, prompt, TRUTH[label]))
        self.closed = {e.prompt for e in self.splits["val"] + self.splits["test"]}
        self.splits["train"] = [e for e in self.splits["train"] if e.prompt not in self.closed]

    def make(self, rng):
        """A generated Example, with steps."""
        text, boxes, marks, label = sample_statement(rng, self.closed)
        answer = f"{THINK} {steps(boxes, marks)} {END_THINK} {label}"
        return Example("verify", np.stack([render_box(box) for box in boxes]), text, answer)

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        """One Example. The pool "paired", for pre-training, has generated ones. Others also have
        real rows, with an empty thought in the key: the reward wants a thought, but any will do."""
        if split == "train" and (pool == "paired" or rng.random() < 0.5):
            return self.make(rng)
        e = rng.choice(self.splits[split])
        boxes = e.pictures[rng.sample(range(3), 3)]  # their order does not matter
        return e._replace(pictures=boxes, answer=f"{THINK} {END_THINK} {e.answer}")

    def texts(self, rng, n):
        """Texts that together contain every word that is read or written."""
        names = [f"{color}-{shape}" for color in COLORS for shape in SHAPES]
        yield " ".join([*self.words, *names, *(f"{name}-x" for name in names), *"01234567"])
        for e in [self.make(rng) for _ in range(n // 2)]:
            yield f"{e.prompt} {e.answer}"

    def prompt_pool(self, rng, task):
        return "real"


# ---------------------------------------------------------------- 4. what train.py must know


def register():
    """Set up `--data nlvr --tasks verify`. 28 tokens: 3 boxes of 7 items and a count, + 4."""
    url = "https://codeload.github.com/lil-lab/nlvr/tar.gz/refs/heads/master"
    data.SOURCES["nlvr"], data.DOWNLOADS["nlvr"] = NLVR, [(url, None, "nlvr")]
    data.LAYOUTS["verify"] = f"<verify>{3 * ' <image> picture'} prompt:24 <answer> text:28?"
    train.PRESETS["cpu"] = {"pretrain_steps": 3000, "eval_items": 1024}


if __name__ == "__main__":
    register()
    sys.argv[1:1] = ["--data", "nlvr", "--tasks", "verify"]  # your own flags come later and win
    evaluation.run_command("nlvr.py", train.command)
