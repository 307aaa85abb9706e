"""Seven short GRPO runs for the lab of sick runs: a healthy one, and six with one cause each.

Every run is the `grpo_step` of train.py on the small base of course.py (one object per picture),
with the same base, prompts and settings. A sick run differs from the healthy one in one thing: a
setting, the reward, or a statement of the root code. The old text of that statement is replaced by
the new one during the run, so the files of the repository stay as they are. Every number of a log
was measured.

The logs are in sick_runs.json under letters. Do the lab of the notebook before you read on: the
causes are named below.

    $ python notebooks/sick_runs.py      # 5 minutes on one core; writes notebooks/sick_runs.json
"""

import contextlib
import copy
import inspect
import json
import random
import time

import course
import numpy as np
import torch
from course import HERE

import eval as evaluation
import grpo
import train
from data import COLORS, NOISE, pictures_of
from reward import CLIP, Rewards, clip_loss, text_ids

COMMAND = "python notebooks/sick_runs.py"
STEPS, LOOK, OTHER_TEMPERATURE = 40, 4, 1.5
SETTINGS = dict(preset="smoke", device="cpu", tasks="draw", prompts=32, group_size=8, epochs=8,
                grpo_steps=STEPS, grpo_lr=1e-3, kl_coef=0.2, ptx_coef=0.0, clip_low=0.1,
                clip_high=0.1)

# ---------------------------------------------------------------- the six causes

CAUSES = ("kl", "no spread", "entropy", "temperature", "clip", "hacked")


class PixelCount:
    """A reward that is easy to hack: the log of the share of pixels in the colour that the prompt
    names."""

    def weights_of(self, task):
        return {"count": 1.0}

    def __call__(self, source, task, examples, pictures, rng):
        group, rewards = len(pictures) // len(examples), []
        for i, picture in enumerate(pictures[:, 0].astype(int)):
            words = examples[i // group].prompt.split()
            color = COLORS[next(w for w in words if w in COLORS)]
            rewards.append(np.log(0.01 + (np.abs(picture - color).sum(-1) < 60).mean()))
        rewards = torch.tensor(rewards).float().view(len(examples), -1)
        return rewards, {"count": rewards}


# An entropy bonus is subtracted from a loss. Here it is added: certainty is rewarded.
ENTROPY_PAID = """loss, metrics = grpo_loss(new, *before, **objective)
        logp = (r.states @ head.T / c.temperature).log_softmax(-1)
        loss = loss + 0.5 * -(logp.exp() * logp).sum(-1)[r.mask].mean()"""

CHANGES = {  # run: [(function, its text, the text that takes its place)]
    # Every candidate is given the mean reward of its group.
    "no spread": [(
        train.grpo_step,
        "tokens, rewards, parts = most_informative",
        "rewards = rewards.mean(1, keepdim=True).expand_as(rewards)\n"
        "        row |= reward_columns(task, rewards, parts)\n"
        "        tokens, rewards, parts = most_informative",
    )],
    "entropy": [(train.policy_loss, ENTROPY_PAID.splitlines()[0], ENTROPY_PAID)],
    # The sampler uses another temperature, and hands over its own log-probs.
    "temperature": [
        (train.candidates, "generator, c.temperature", f"generator, {OTHER_TEMPERATURE}"),
        (train.grpo_step, "look_back(*seen, c.temperature)  # (N, T)",
         "look_back(*seen, c.temperature)\n"
         f"        old = look_back(*seen, {OTHER_TEMPERATURE})[0]"),
    ],
    "clip": [(grpo.token_objective, "-torch.min(ratio *", "-torch.max(ratio *")],
}  # fmt: skip


@contextlib.contextmanager
def changed(changes):
    """Functions of the root files with some of their text replaced, until the block ends."""
    texts = {}
    for function, old, new in changes:
        text = texts.get(function, inspect.getsource(function))
        assert text.count(old) == 1, f"{function.__name__} has {text.count(old)} times: {old}"
        texts[function] = text.replace(old, new)
    try:
        for function, text in texts.items():
            exec(compile(text, f"changed {function.__name__}", "exec"), function.__globals__)
        yield
    finally:
        for function in texts:
            function.__globals__[function.__name__] = function


# ---------------------------------------------------------------- a run and its log


class SmallRun(train.Run):
    """A run of train.py on the small base of the course, without a folder."""

    def __init__(self, base, **settings):
        super().__init__(train.make_config(**SETTINGS | settings))
        self.sources, self.vocab, self.codebook = [base.source], base.vocab, base.codebook


def small_clip(base, steps=400):
    """A CLIP as in the notebook “Aligning a model”, trained longer: noisy pairs and their edits."""
    torch.manual_seed(0)
    clip, noise = CLIP(base.vocab.n_text, width=48), NOISE | {"wrong": 0.3}
    optimizers = train.make_optimizers(clip, 3e-3)
    for step in range(steps):
        rng, edits = random.Random(f"clip/{step}"), []
        pairs = [base.source.example(rng, "draw", noise=noise) for _ in range(32)]
        for e in pairs:
            false = base.source.negatives(rng, e.prompt, 4)
            edits += false + [rng.choice(false) for _ in range(4 - len(false))]
        ids, edited = text_ids(base.vocab, [e.prompt for e in pairs]), text_ids(base.vocab, edits)
        loss, _ = clip_loss(clip, pictures_of(pairs), ids, edited)
        course.update(clip, optimizers, loss, 3e-3 * train.schedule(step, steps))
    return clip


def judged(run, policy):
    """The judge's score and the diversity of a policy on validation prompts."""
    e = evaluation.Evaluator(policy, run.vocab, run.codebook, run.sources[0],
                             evaluation.WorldJudge(), "val")
    row = evaluation.front(e, "paired", 64, 6, (1.0,))[0]
    return {"judge": row["compose"], "diversity": row["diversity"]}


def log_of(base, reward, changes=(), **settings):
    """The log of one run, one row per step."""
    run, rows, passes, largest = SmallRun(base, **settings), [], [], []
    policy, reference = copy.deepcopy(base.model), copy.deepcopy(base.model).requires_grad_(False)
    update = train.Updater("align", policy, run.config.grpo_lr)
    with changed(changes), watched(passes, largest):
        for step in range(STEPS):
            looks = step % LOOK == 0 or step == STEPS - 1
            seen = judged(run, policy) if looks else {}
            update.set_lr(train.schedule(step, STEPS))
            passes.clear()
            largest.clear()
            row = train.grpo_step(run, policy, reference, reward, step, update)
            rows.append(columns(row, passes) | {"largest_ratio": largest[-1]} | seen)
    return rows


@contextlib.contextmanager
def watched(passes, largest):
    """Keep the metrics of every pass over a rollout, of which train.py logs only the last, and its
    largest ratio."""
    loss_of, objective_of = train.policy_loss, grpo.token_objective

    def policy_loss(*arguments):
        loss, metrics = loss_of(*arguments)
        passes.append({name: float(value) for name, value in metrics.items()})
        return loss, metrics

    def token_objective(new, old, ref, advantages, mask, *others):
        loss, ratio, kl = objective_of(new, old, ref, advantages, mask, *others)
        largest.append(float(ratio.detach()[mask > 0].max()))
        return loss, ratio, kl

    train.policy_loss, grpo.token_objective = policy_loss, token_objective
    try:
        yield
    finally:
        train.policy_loss, grpo.token_objective = loss_of, objective_of


def columns(row, passes):
    """What the lab keeps of a step."""
    names = "reward", "kl", "entropy", "zero_spread"
    kept = {name: float(row[f"{name}_draw"]) for name in names}
    kept |= {"gradient": float(row["grad_norm"]), "ratio": passes[-1]["ratio"]}
    for name, metrics in (("first", passes[0]), ("last", passes[-1])):
        kept[f"outside_{name}"] = metrics["clip_low"] + metrics["clip_high"]
    return kept


# ---------------------------------------------------------------- the file


def letters(seed=7):
    """{cause: the letter of its log}, in an order that tells nothing."""
    order = list(CAUSES)
    random.Random(seed).shuffle(order)
    return dict(zip(order, "ABCDEF"))


def as_columns(rows):
    """{column: its numbers at all steps}, None where a step has none."""
    every = dict.fromkeys(name for row in rows for name in row)
    return {name: [short(row.get(name)) for row in rows] for name in every}


def short(number):
    return None if number is None else float(f"{number:.4g}")


def main():
    torch.set_num_threads(1)
    base = course.small_base()
    clip = Rewards(small_clip(base), base.vocab)
    logs = {}
    for cause in ("healthy", *CAUSES):
        start, name = time.perf_counter(), letters().get(cause, cause)
        reward = PixelCount() if cause == "hacked" else clip
        settings = {"kl_coef": 0.0} if cause == "kl" else {}
        rows = log_of(base, reward, CHANGES.get(cause, ()), **settings)
        logs[name] = as_columns(rows)
        print(f"{name:8}{time.perf_counter() - start:6.0f} s", flush=True)
    about = {"command": COMMAND, "versions": f"torch {torch.__version__}", "steps": STEPS}
    about |= {"settings": SETTINGS}
    lines = [f'"about": {json.dumps(about)}']
    for name in sorted(logs, key=lambda name: (name != "healthy", name)):
        body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in logs[name].items())
        lines.append(f'"{name}": {{\n{body}}}')
    text = "{" + ",\n".join(lines) + "}\n"
    (HERE / "sick_runs.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
