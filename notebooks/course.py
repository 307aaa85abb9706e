"""What all notebooks share: the first cell, the look of pictures and figures, one small base model, the checks of exercises.

    import course                   # also puts the repository's root on the path: `from grpo import ...` works from here
    course.start(minutes=1)         # versions, device, expected minutes; seeds; style of figures
    course.check(my_function)       # runs checks.my_function on random inputs: solved, open, or a hint
    course.final(f, g, h)           # the last cell: all exercises of a notebook at once
"""

import platform
import random
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import checks  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from data import NOISE, Example, Vocabulary, World, noisy_caption, render, sample_scene, true_caption  # noqa: E402
from kernels import selected_logprobs  # noqa: E402
from model import Codebook, ModelConfig, Transformer, pick_device  # noqa: E402
from train import make_optimizers, schedule  # noqa: E402

BLUE, RED, GREEN, GOLD, GREY = "#3568a8", "#c2503a", "#3f8f63", "#c99a2e", "#8a8f98"
STYLE = {"figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
         "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.8,
         "axes.prop_cycle": plt.cycler(color=[BLUE, RED, GREEN, GOLD, GREY])}  # fmt: skip


def start(minutes):
    """First cell: what runs here and how long it takes; fixes torch's seed and the look of figures."""
    plt.rcParams.update(STYLE)
    torch.manual_seed(0)
    versions = f"python {platform.python_version()} · torch {torch.__version__} · numpy {np.__version__}"
    print(f"{versions} · {pick_device('cpu')[0]} · about {minutes:g} min on two cores")


def show(pictures, titles=None, columns=8, right=None, title=None, size=1.15):
    """Pictures (32, 32, 3) uint8 in rows of `columns`, words above each. right: bools, framed green where true, red where not."""
    rows, words = -(-len(pictures) // columns), [textwrap.wrap(t, max(8, int(17 * size))) for t in titles or ()]
    lines = sum(max(len(w) for w in words[i : i + columns]) for i in range(0, len(words), columns))
    high = rows * size + 0.14 * lines + 0.3 * bool(title)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, high), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, picture) in enumerate(zip(axes.flat, pictures)):
        ax.imshow(picture)
        if titles:
            ax.set_title("\n".join(words[i]), fontsize=7, fontweight="normal", loc="center")
        if right is not None:
            color = GREEN if right[i] else RED
            ax.add_patch(plt.Rectangle((-1, -1), 33, 33, fill=False, color=color, linewidth=3, clip_on=False))
    if title:
        figure.suptitle(title, fontsize=10, fontweight="bold")
    plt.show()


# ---------------------------------------------------------------- the small base model of notebooks 05 and 06


class OneObject(World):
    """The world with one object a picture: a model of 65,000 parameters learns it in a quarter of a minute."""

    def example(self, rng, task, pool="paired", noise=None, split="train"):
        scene = sample_scene(rng, count=1)
        caption = true_caption(rng, scene)
        text = (noisy_caption(rng, caption, noise=noise) if noise else caption).text()
        prompt, answer = (text, "") if task == "draw" else ("", text)
        return Example(task, render(scene), prompt, answer, (scene, caption))

    def negatives(self, rng, text, n, held_out=True, longest=1):
        return super().negatives(rng, text, n, held_out, longest)


def tokens_of(source, n=600):
    """(codebook, vocabulary) of a source: all patches of n pictures, and the words of the whole world."""
    pictures = np.stack([source.example(random.Random(f"tokens/{i}"), "draw").picture for i in range(n)])
    codebook = Codebook.fit(pictures, 1024, patch=8)
    return codebook, Vocabulary.train(World().texts(random.Random(0), 1500), len(codebook.entries), codebook.side**2)


def batch_of(base, examples):
    """The templates of some examples."""
    return base.vocab.batch(examples, base.codebook.encode(np.stack([e.picture for e in examples])))


def next_token_loss(base, model, rng, n=48, wrong=0.3):
    """Mean next-token loss of n noisy examples, two drawings to a caption. Captions are more wrong than the default's 0.15, so
    that something is left to align."""
    examples = [base.source.example(rng, task, noise=NOISE | {"wrong": wrong}) for task in ("draw", "draw", "caption") * (n // 3)]
    b = batch_of(base, examples).trim()
    hidden, mask = model(b.target[:, :-1], b.patch[:, :-1]), b.mask[:, 1:]
    logprobs = selected_logprobs(hidden, model.head, b.target[:, 1:], lo=b.lo[:, 1:], hi=b.hi[:, 1:])
    return -logprobs[mask].mean()


def small_base(steps=160, lr=4e-3, seed=0):
    """The pre-training of notebook 03 on drawing and captioning one object: a namespace of model, vocab, codebook, source."""
    source = OneObject()
    codebook, vocab = tokens_of(source)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab.size, codebook.side, width=48, layers=2))
    base, optimizers = SimpleNamespace(model=model, vocab=vocab, codebook=codebook, source=source), make_optimizers(model, lr)
    for step in range(steps):
        loss = next_token_loss(base, model, random.Random(f"{seed}/base/{step}"))
        update(model, optimizers, loss, lr * schedule(step, steps))
    return base


def update(model, optimizers, loss, lr):
    """One step down the gradient of a loss, at a learning rate; returns the norm of the gradient before it was clipped to 1."""
    model.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return norm


# ---------------------------------------------------------------- exercises


def status(function):
    """("solved" | "open" | "not yet", hint) of a student's function, by the check of the same name."""
    try:
        getattr(checks, function.__name__)(function)
    except NotImplementedError:
        return "open", "write it, then run its cell and this one again"
    except AssertionError as hint:
        return "not yet", str(hint)
    except Exception as error:  # whatever a student's code raises is shown, with the line it came from
        line = error.__traceback__
        while line.tb_next:
            line = line.tb_next
        return "not yet", f"{type(error).__name__} in line {line.tb_lineno} of {line.tb_frame.f_code.co_name}: {error}"
    return "solved", ""


def check(function):
    """Runs the check of one exercise and prints what came of it."""
    found, hint = status(function)
    mark = {"solved": "✔", "open": "·", "not yet": "✘"}[found]
    print(f"{mark} {function.__name__}: {found}" + (f"\n    {hint}" if hint else ""))


def final(*functions):
    """The last cell: every exercise again, and how many are solved."""
    for function in functions:
        check(function)
    solved = sum(status(function)[0] == "solved" for function in functions)
    print(f"{solved} of {len(functions)} solved" + ("" if solved == len(functions) else "; solutions are in notebooks/solutions"))
