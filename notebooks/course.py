"""What all notebooks share: the first cell, figures, a small base model, the check of exercises.

    import course                # also makes `from grpo import ...` find the repository's files
    course.start(minutes=1)      # versions, device, expected minutes; seeds; style of figures
    course.map(3)                # the whole pipeline, with the place of notebook 03
    course.check(my_function)    # tries it on random inputs: solved, open, or what is wrong
    course.hint(my_function, 1)  # the first hint; 2, 3, ... come closer to the answer
    course.use(my_function)      # what later cells call: yours if it passes, else the solution
    course.final(f, g, h)        # the last cell: all exercises of a notebook at once
"""

import importlib.util
import io
import platform
import random
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import checks
import hints
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import Image, display
from matplotlib.patches import FancyBboxPatch

from data import (
    NOISE, PAD, SPECIAL, Example, Vocabulary, World, noisy_caption, pictures_of, render,
    sample_scene, true_caption)
from eval import cell
from kernels import selected_logprobs
from model import (
    Codebook, ModelConfig, Transformer, allowed_head, completion, pick_device)
from train import make_optimizers, schedule

BLUE, RED, GREEN, GOLD, GREY = "#3568a8", "#c2503a", "#3f8f63", "#c99a2e", "#8a8f98"
STYLE = {
    "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.8,
    "axes.prop_cycle": plt.cycler(color=[BLUE, RED, GREEN, GOLD, GREY]),
}  # fmt: skip


def start(minutes):
    """First cell: what runs here and how long it takes; sets torch's seed and the style of
    figures."""
    plt.rcParams.update(STYLE)
    torch.manual_seed(0)
    python, device = platform.python_version(), pick_device("cpu")[0]
    versions = f"python {python} · torch {torch.__version__} · numpy {np.__version__}"
    print(f"{versions} · {device} · about {minutes:g} min on two cores")


# ---------------------------------------------------------------- the map of the course

PIPELINE = [  # box, what it holds, where its code is, the notebooks about it
    ("data", "scenes and\nnoisy captions", "data.py", (1,)),
    ("tokens", "words and codes\nin one row", "data.py, model.py", (1,)),
    ("base", "next-token training,\nthen a frozen copy", "model.py, train.py", (2, 3)),
    ("samples", "G candidates\nof each prompt", "model.py", (2, 7)),
    ("rewards", "how well each\nfits its prompt", "reward.py", (4, 7)),
    ("advantages", "each against\nits own group", "grpo.py", (5, 6, 7, 8)),
    ("update", "clipped ratio,\nKL to the base", "grpo.py, kernels.py", (5, 6, 7, 8, 9)),
    ("results", "a judge that was\nnot trained on", "eval.py", (10,)),
]


def map(lesson):
    """The pipeline of this repository, with the boxes of one notebook (its number) in colour."""
    figure, ax = plt.subplots(figsize=(8.8, 1.6))
    for x, (box, what, file, lessons) in enumerate(PIPELINE):
        here = lesson in lessons
        face = dict(fc=BLUE, ec=BLUE) if here else dict(fc="#eef1f5", ec=GREY)
        style = "round,pad=0,rounding_size=0.06"
        ax.add_patch(FancyBboxPatch((x - 0.44, 0), 0.88, 1, boxstyle=style, lw=0.8, **face))
        ink = dict(color="white" if here else "black", ha="center", va="center")
        ax.text(x, 0.86, box, fontsize=9, fontweight="bold", **ink)
        ax.text(x, 0.6, what, fontsize=6, **ink)
        ax.text(x, 0.33, file.replace(", ", "\n"), fontsize=6, family="monospace", **ink)
        ax.text(x, 0.1, " ".join(f"{n:02}" for n in lessons), fontsize=7, **ink)
        if x:
            ax.annotate("", (x - 0.44, 0.5), (x - 0.56, 0.5), arrowprops=dict(arrowstyle="-|>"))
    ax.plot((6, 6, 3), (1.01, 1.14, 1.14), color=GREY, linewidth=1)
    ax.annotate("", (3, 1.0), (3, 1.16), arrowprops=dict(arrowstyle="-|>", color=GREY))
    ax.text(4.5, 1.19, "again, with the updated policy", fontsize=7, color=GREY, ha="center")
    ax.set(xlim=(-0.5, 7.5), ylim=(-0.02, 1.36), title=f"In blue: what notebook {lesson:02} is about")
    ax.text(7.5, 1.42, "in each box: its files, and the numbers of its notebooks", fontsize=7,
            color=GREY, ha="right")  # fmt: skip
    ax.axis("off")
    show_small(figure)


def show_small(figure, colors=16, place=None):
    """Displays a figure as a PNG of few colours, with a third of the bytes.
    place: the handle of an earlier display, which the figure then replaces."""
    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png")
    plt.close(figure)
    PIL.Image.open(large).convert("RGB").quantize(colors).save(small, format="png", optimize=True)
    picture = Image(small.getvalue())
    place.update(picture) if place else display(picture)


# ---------------------------------------------------------------- figures


def show(pictures, titles=None, columns=8, right=None, title=None, size=1.15, labels=()):
    """Pictures (32, 32, 3) uint8 in rows of `columns`, a title above each. right: bools, framed
    green where true and red where not. labels: words to the left of each row."""
    rows = -(-len(pictures) // columns)
    words = [textwrap.wrap(t, max(8, int(17 * size))) for t in titles or ()]
    lines = sum(max(len(w) for w in words[i : i + columns]) for i in range(0, len(words), columns))
    high = rows * size + 0.14 * lines + 0.3 * bool(title)
    wide = size * columns + bool(labels)
    figure, axes = plt.subplots(rows, columns, figsize=(wide, high), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, picture) in enumerate(zip(axes.flat, pictures)):
        ax.imshow(picture)
        if titles:
            ax.set_title("\n".join(words[i]), fontsize=7, fontweight="normal", loc="center")
        if right is not None:
            frame = dict(fill=False, color=GREEN if right[i] else RED, linewidth=3, clip_on=False)
            ax.add_patch(plt.Rectangle((-1, -1), 33, 33, **frame))
    for ax, label in zip(axes[:, 0], labels):
        ax.text(-4, 16, textwrap.fill(label, 16), fontsize=7, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=10, fontweight="bold")
    plt.show()


def film(runs, place, every=40):
    """A strip of frames for each run, {title: (steps, pictures (moments, n, 32, 32, 3), right
    (moments, n))}: a column for each moment, a row for each of n drawings. Green frames are right,
    red ones wrong. It replaces what `place` displays."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4.3 * len(runs), 4), squeeze=False)
    for ax, (title, (steps, pictures, right)) in zip(axes[0], runs.items()):
        moments, n = right.shape
        strip = np.full((n * every, moments * every, 3), 255, np.uint8)
        for m, i in np.ndindex(moments, n):
            color = np.array(plt.matplotlib.colors.to_rgb(GREEN if right[m, i] else RED))
            tile = strip[i * every + 1 : (i + 1) * every - 1, m * every + 1 : (m + 1) * every - 1]
            tile[:] = 255 * color
            tile[3:-3, 3:-3] = pictures[m, i]
        ax.imshow(strip)
        middle = every * (0.5 + np.arange(max(moments, n)))
        ax.set(xticks=middle[:moments], xticklabels=steps, xlabel="step of training", title=title)
        ax.set(yticks=middle[:n], yticklabels=range(1, n + 1), ylabel="drawing (its own noise)")
    show_small(figure, 128, place)  # with few colours, blue and yellow would be lost


def reach(samples):
    """(2, n): how far the 95% intervals of the means of n samples reach down and up, as the yerr of
    matplotlib: Wilson's for bools (E3), otherwise from the standard error (E4)."""
    cells = [cell(sample) for sample in samples]
    reaches = [(c["value"] - c["low"], c["high"] - c["value"]) for c in cells]
    return np.array(reaches).T.clip(min=0)


COLUMNS = {"marker": "#4a4f58", "word, given": "#d9cba3", "code, given": "#b9cbe4",
           "word, chosen": GOLD, "code, chosen": BLUE, "<pad>": "#dfdfdb"}  # fmt: skip


def strip(layout, tokens=None):
    """(L,): what every column of a row holds, as an index into COLUMNS; tokens (L,) show its
    <pad>."""
    kinds = torch.zeros(layout.length)
    for span in layout.spans:
        if span.kind not in SPECIAL:
            columns = slice(span.start, span.end)
            kinds[columns] = 1 + (span.kind == "picture") + 2 * layout.chosen[columns]
    return kinds if tokens is None else kinds.masked_fill(tokens == PAD, 5)


def show_rows(strips, title, wide=8.4):
    """Rows of tokens as coloured strips: {label: strip(layout, tokens)}."""
    longest = max(len(kinds) for kinds in strips.values())
    grid = torch.full((len(strips), longest), torch.nan)
    for row, kinds in zip(grid, strips.values()):
        row[: len(kinds)] = kinds
    figure, ax = plt.subplots(figsize=(wide, 0.95 + 0.26 * len(strips)))
    colors = plt.matplotlib.colors.ListedColormap(COLUMNS.values())
    ax.pcolormesh(grid, cmap=colors, vmin=-0.5, vmax=5.5, edgecolors="white", linewidth=0.8)
    ax.set(yticks=np.arange(len(strips)) + 0.5, yticklabels=strips, xlabel="column", title=title)
    ax.invert_yaxis()
    squares = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLUMNS.values()]
    figure.legend(squares, COLUMNS, ncols=6, loc="outside lower center", fontsize=8)
    plt.show()


# ---------------------------------------------------------------- the small base model of 06 and 07


class OneObject(World):
    """The world with one object per picture: a model of 65,000 parameters learns it in seconds."""

    tasks = ("draw", "caption")

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        scene = sample_scene(rng, count=1)
        caption = true_caption(rng, scene)
        text = (noisy_caption(rng, caption, noise=noise) if noise else caption).text()
        prompt, answer = (text, "") if task == "draw" else ("", text)
        return Example(task, render(scene)[None], prompt, answer, (scene, caption))

    def negatives(self, rng, text, n, allow_held_out=False, longest=1):
        return super().negatives(rng, text, n, allow_held_out, longest)


def tokens_of(source, n=600):
    """(codebook, vocabulary): all patches of n pictures of a source, all words of the world."""
    examples = [source.example(random.Random(f"tokens/{i}"), "draw") for i in range(n)]
    codebook = Codebook.fit(pictures_of(examples), 1024, patch=8)
    texts = World().texts(random.Random(0), 2100)
    return codebook, Vocabulary.build(texts, len(codebook.entries), codebook.side**2)


def rows(base, task, examples):
    """Examples of one task as rows of tokens (N, L), reference answers included."""
    return base.vocab.rows(task, examples, base.codebook.encode(pictures_of(examples)))


def logprobs_of(model, layout, tokens, group=1):
    """(log-probs (N, T) of the chosen columns of rows (N, L), completion mask (N, T))."""
    states, targets, mask = completion(model, layout, tokens, group)
    return selected_logprobs(states, allowed_head(model, layout), targets), mask


def next_token_loss(base, model, rng, n=48, wrong=0.3):
    """Mean next-token loss of n noisy examples, two drawings for every caption. Captions are wrong twice
    as often as in data.NOISE, so that there is something left to align."""
    noise, total, tokens = NOISE | {"wrong": wrong}, 0.0, 0
    for task, count in (("draw", 2 * n // 3), ("caption", n // 3)):
        examples = [base.source.example(rng, task, noise=noise) for _ in range(count)]
        logprobs, mask = logprobs_of(model, base.vocab.layout(task), rows(base, task, examples))
        total, tokens = total - logprobs[mask].sum(), tokens + mask.sum()
    return total / tokens


def small_base(steps=160, lr=4e-3, seed=0):
    """The pre-training of notebook 03, on drawing and captioning one object: a namespace of model,
    vocab, codebook, source."""
    source = OneObject()
    codebook, vocab = tokens_of(source)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab.size, codebook.side, width=48, layers=2))
    base = SimpleNamespace(model=model, vocab=vocab, codebook=codebook, source=source)
    optimizers = make_optimizers(model, lr)
    for step in range(steps):
        loss = next_token_loss(base, model, random.Random(f"{seed}/base/{step}"))
        update(model, optimizers, loss, lr * schedule(step, steps))
    return base


def update(model, optimizers, loss, lr):
    """One gradient step at a learning rate; returns the norm of the gradient before it was clipped
    to 1."""
    model.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return norm


# ---------------------------------------------------------------- exercises

MARKS = {"solved": "✔", "open": "·", "not yet": "✘"}


def status(function):
    """("solved" | "open" | "not yet", what is wrong) of a student's function, by the check with its
    name."""
    try:
        getattr(checks, function.__name__)(function)
    except NotImplementedError:
        return "open", "write it, then run its cell and this one again"
    except AssertionError as wrong:
        return "not yet", str(wrong)
    except Exception as error:  # whatever a student's code raises is shown, with its line
        line = error.__traceback__
        while line.tb_next:
            line = line.tb_next
        where = f"line {line.tb_lineno} of {line.tb_frame.f_code.co_name}"
        return "not yet", f"{type(error).__name__} in {where}: {error}"
    return "solved", ""


def check(function):
    """Run the check of one exercise and print the result."""
    name, (state, wrong) = function.__name__, status(function)
    print(f"{MARKS[state]} {name}: {state}")
    if wrong:
        print(f"    {wrong}")
        print(f"    {len(hints.HINTS[name])} hints: course.hint({name}, 1)")


def hint(function, number):
    """Print one hint about an exercise: 1 is the gentlest, the last is nearly the answer."""
    name = getattr(function, "__name__", function)
    if name not in hints.HINTS:
        raise ValueError(f"no exercise is called {name!r}")
    steps = hints.HINTS[name]
    if number not in range(1, len(steps) + 1):
        raise ValueError(f"hint {number} of {name}: it has hints 1 to {len(steps)}")
    print(textwrap.fill(f"hint {number} of {len(steps)}: {steps[number - 1]}", 92))


def solution(name):
    """The solution of an exercise, from solutions/."""
    for path in sorted((HERE / "solutions").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"solutions_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"no exercise is called {name!r}; solutions are in {HERE.name}/solutions")


def use(function):
    """What later cells work with: the student's function if it passes its check, else the
    solution."""
    return function if status(function)[0] == "solved" else solution(function.__name__)


def final(*functions):
    """The last cell: every exercise again, and how many are solved."""
    states = [status(function)[0] for function in functions]
    for function, state in zip(functions, states):
        print(f"{MARKS[state]} {function.__name__}: {state}")
    solved = states.count("solved")
    where = "" if solved == len(functions) else "; solutions are in notebooks/solutions"
    print(f"{solved} of {len(functions)} solved{where}")
