"""Ablate one choice of GRPO at a time: short runs from one base, otherwise equal, over seeds.

  group    candidates per prompt: at equal samples, then at equal prompts; and `gradient_noise`
  kl       the weight of the KL penalty
  reward   the CLIP score, preferences learned from pairs, the base's likelihoods, and halves of two

Prints a table, mean and 95% interval over seeds (Student's t), and writes NAME.csv and NAME.png.
Flags of train.py apply to all runs. Run the command again to continue where it stopped.

    $ python results/ablate.py kl --run runs/lvrpo-cpu-0      # 15 runs of 1 to 2 minutes
"""

import csv
import random
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from launch import command, positive, trained
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as evaluation
from data import make_sources, pictures_of
from grpo import grpo_loss
from kernels import selected_logprobs
from model import allowed_head, atomically, completion, outputs, sample
from reward import Rewards
from train import INHERITED, parse_flags, read_log

SIZES = ((2, 64), (4, 32), (8, 16), (16, 8), (2, 16), (4, 16), (16, 16))
ABLATIONS = {  # name: {variant: what it changes}
    "group": {f"{g} x {n} prompts": {"group_size": g, "prompts": n} for g, n in SIZES},
    "kl": {str(k): {"kl_coef": k} for k in (0.0, 0.01, 0.02, 0.05, 0.2)},
    "reward": {
        "rule": {"reward": "rule", "contrast": 0.0},
        "learned": {"reward": "learned", "contrast": 0.0},
        "rule, learned": {"reward": "mix", "contrast": 0.0},
        "contrast": {"reward": "rule", "contrast": 1.0},
        "rule, contrast": {"reward": "rule", "contrast": 0.5},
    },
}
DEFAULT = {"group_size": 8, "prompts": 16, "kl_coef": 0.02, "reward": "rule", "contrast": 0.5,
           "grpo_steps": 30, "eval_items": 256, "eval_prompts": 24}  # fmt: skip
# Ablations share equal runs.
FOLDER = "{group_size}x{prompts}-kl{kl_coef}-{reward}-{contrast}-{seed}"
LOGGED = {"reward": "reward_draw", "KL": "kl_draw", "no spread": "zero_spread_draw"}
AXES = {  # column: label of its axis
    "reward": "reward of drawings (nats)", "KL": "KL to the base (nats a token)",
    "compose": "drawings right (share)", "compose_heldout": "three objects right (share)",
    "diversity": "distinct of right ones (share)", "vqa": "answers right (share)",
    "caption_three": "three captioned (share)", "text_nll": "text NLL (nats a token)",
}  # fmt: skip


def train_flags(words):
    """Words of a command line -> {field of Config: value}, checked as in train.py."""
    config, flags = vars(parse_flags(words)), {}
    for word in [word.split("=")[0] for word in words if word.startswith("--")]:
        name = word[2:].replace("-", "_")
        if name not in config or name in ("seed", "base", "resume", "threads"):
            raise ValueError(f"{word}: give the full name of a flag that all runs can share")
        flags[name] = config[name]
    return flags


def outcome(folder):
    """{column of the table: a run's value, or None if it has none}."""
    row, log, result = {}, read_log(folder / "metrics.csv"), evaluation.read_result(folder)
    for name, column in LOGGED.items():  # the mean of the last quarter of the steps
        values = [float(r[column]) for r in log if r.get(column)]
        row[name] = float(np.mean(values[-max(1, len(values) // 4) :])) if values else None
    values = evaluation.numbers(next(iter(evaluation.by_source(result).values())), "aligned")
    row |= {name: values.get(name) for name in AXES if name not in LOGGED}
    return row | {"seconds": result["meta"]["seconds"].get("align")}


def ablate(name, run, out, seeds=3, jobs=1, **flags):
    """Train every variant with every seed from the base of a run, `jobs` at a time with their share
    of the cores. Writes out/NAME.csv and out/NAME.png; returns the table as text."""
    config, out = evaluation.load_run(run)[0], Path(out)
    flags = DEFAULT | {k: config[k] for k in ("preset", "data_dir", *INHERITED)} | flags
    flags |= {"base": str(run), "threads": max(1, torch.get_num_threads() // jobs)}
    plan = [(variant, seed) for variant in ABLATIONS[name] for seed in range(seeds)]
    print(f"{len(plan)} runs in {out}; finished ones are kept", flush=True)

    def one(variant, seed):
        settings = flags | ABLATIONS[name][variant] | {"seed": seed}
        folder = out / FOLDER.format(**settings)
        return {"variant": variant, "seed": seed} | outcome(trained(folder, **settings))

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, *zip(*plan)))
    with atomically(out / f"{name}.csv") as new, new.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    figure(name, columns_of(rows), out / f"{name}.png")
    return table(name, columns_of(rows))


def columns_of(rows):
    """{column: {variant: values over seeds}} of the columns that all runs have."""
    columns = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for column in [c for c in row if c not in ("variant", "seed")]:
            columns[column][row["variant"]].append(row[column])
    return {column: v for column, v in columns.items() if all(None not in x for x in v.values())}


def table(name, columns):
    """One line per variant: mean and interval over seeds."""
    lines = [f"{name:18}" + "".join(f"{column:>17}" for column in columns)]
    for variant in ABLATIONS[name]:
        cells = (f"{evaluation.over_seeds(values[variant]):>17}" for values in columns.values())
        lines.append(f"{variant:18}" + "".join(cells))
    return "\n".join(lines)


def figure(name, columns, path):
    """Plot all columns. A hacked reward rises while the judge's numbers do not."""
    panels = [column for column in AXES if column in columns]
    image = Figure(figsize=(2.9 * len(panels), 3.4), layout="constrained")
    for ax, column in zip(image.subplots(1, len(panels), squeeze=False)[0], panels):
        names, values = zip(*columns[column].items())
        ax.errorbar(names, np.mean(values, 1), np.std(values, 1), fmt="o", capsize=3)
        ax.tick_params(axis="x", rotation=60)
        ax.set_ylabel(AXES[column])
    image.suptitle(f"{name}: mean and standard deviation over seeds")
    image.savefig(path, dpi=90)


def gradients(model, layout, tokens, rewards):
    """Yields (name, policy gradient) of drawings (N, L) with rewards (B, G) for each baseline to
    subtract: none, the batch's mean, the group's mean. None of them biases the gradient."""
    group, weights = rewards.shape[1], list(model.parameters())
    states, targets, mask = completion(model, layout, tokens, group)
    logprobs = selected_logprobs(states, allowed_head(model, layout), targets)
    none, batch = (0.0, np.inf), (rewards.mean(), rewards.numel())
    means = {"none": none, "batch": batch, "group": (rewards.mean(1, keepdim=True), group)}
    for name, (mean, n) in means.items():
        # A mean over n that includes the candidate takes away 1/n of its own gradient.
        advantages = (rewards - mean).flatten() / (1 - 1 / n)
        loss, _ = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask)
        parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        yield name, torch.cat([part.flatten() for part in parts if part is not None])


def gradient_noise(run, groups=(2, 4, 8, 16), samples=128, repeats=8):
    """How noisy is the gradient of `samples` drawings by the base of a run? {(group size,
    baseline): (variance over repeats, squared length of the mean)}. 1 minute."""
    config, codebook, vocab = evaluation.load_run(run)
    model = evaluation.load_model(run, vocab, codebook, config, "base")
    reward = Rewards(evaluation.load_clip(run, "clip", vocab, config), vocab)
    source = make_sources(config["data"], config["data_dir"], config["jitter"])[0]
    layout, noise = vocab.layout("draw"), {}
    for group in groups:
        every = defaultdict(list)
        for k in range(repeats):
            rng, chance = random.Random(f"noise/{group}/{k}"), torch.Generator().manual_seed(k)
            pools = [source.prompt_pool(rng, "draw") for _ in range(samples // group)]
            examples = [source.example(rng, "draw", pool) for pool in pools]
            rows = vocab.rows("draw", examples, codebook.encode(pictures_of(examples)))
            tokens = sample(model, layout, rows, group, chance)
            pictures = outputs(layout, tokens, vocab, codebook)
            rewards, _ = reward(source, "draw", examples, pictures, rng)
            for name, gradient in gradients(model, layout, tokens, rewards):
                every[name].append(gradient)
        for name, some in every.items():
            g = torch.stack(some)
            variance = float((g - g.mean(0)).square().sum() / (repeats - 1))
            signal = float(g.mean(0).square().sum()) - variance / repeats  # a mean of few is noisy
            noise[group, name] = variance, max(signal, 0.0)
    return noise


def main():
    parser = evaluation.Parser(description="Short runs from one base.", allow_abbrev=False)
    parser.add_argument("name", choices=tuple(ABLATIONS))
    parser.add_argument("--run", required=True, metavar="RUN", help="the run whose base is aligned")
    parser.add_argument("--out", help="folder for runs, table and figure [RUN/ablate]")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds per variant [3]")
    more = "runs at a time [1]; also: flags of train.py"
    parser.add_argument("--jobs", type=positive, default=1, help=more)
    args, words = parser.parse_known_args()
    out = Path(args.out or Path(args.run) / "ablate")
    print(ablate(args.name, args.run, out, args.seeds, args.jobs, **train_flags(words)))
    if args.name == "group":
        print("\ngradient of 128 drawings: group size, baseline, variance, squared mean")
        for key, value in gradient_noise(args.run).items():
            print("{:4}  {:5}  {:.4f}  {:.4f}".format(*key, *value))


if __name__ == "__main__":
    command("ablate.py", main)
