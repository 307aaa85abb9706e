"""One choice of GRPO at a time: short runs from one base that differ in nothing else, over seeds.

  group    candidates a prompt: at equal samples, then at equal prompts; and `gradient_noise`
  kl       the weight of the KL penalty
  reward   the CLIP score, preferences learned from pairs, or both

Prints a table, mean and 95% interval over seeds (Student's t), and writes NAME.csv and NAME.png. A
reward that rises while the judge's score does not is being hacked.

    $ python results/ablate.py kl --run runs/lvrpo-cpu-0      # 15 runs of MEASURED minutes each
    $ python results/ablate.py group --run RUN --seeds 5 --jobs 2 --grpo-steps 60

Flags of train.py hold for all runs. Given again, the command goes on where it stopped.
"""

import csv
import os
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

from data import make_sources, pictures_of
from eval import Parser, load_clip, load_model, load_run, over_seeds, read_result
from grpo import grpo_loss
from kernels import selected_logprobs
from model import allowed_head, atomically, completion, outputs, sample
from reward import Rewards
from train import INHERITED, parse_flags, read_log

SIZES = ((2, 64), (4, 32), (8, 16), (16, 8), (2, 16), (4, 16), (16, 16))
ABLATIONS = {  # name: {variant: what it changes}
    "group": {f"{g} x {n} prompts": {"group_size": g, "prompts": n} for g, n in SIZES},
    "kl": {str(k): {"kl_coef": k} for k in (0.0, 0.01, 0.02, 0.05, 0.2)},
    "reward": {reward: {"reward": reward} for reward in ("rule", "learned", "mix")},
}
DEFAULT = {"group_size": 8, "prompts": 16, "kl_coef": 0.02, "reward": "rule", "grpo_steps": 30,
           "eval_items": 256, "eval_prompts": 24}  # fmt: skip
FOLDER = "{group_size}x{prompts}-kl{kl_coef}-{reward}-{seed}"  # ablations share equal runs
LOGGED = {"reward": "reward_draw", "KL": "kl_draw", "no spread": "zero_spread_draw"}
JUDGED = ("compose", "compose_heldout", "diversity", "vqa", "caption_three", "text_nll")
AXES = {  # panels of the figure: column, and what its axis says
    "reward": "reward of drawings (nats)", "KL": "KL to the base (nats a token)",
    "compose": "drawings right (share)", "compose_heldout": "three objects right (share)",
    "diversity": "distinct of right ones (share)", "text_nll": "text NLL (nats a token)",
}  # fmt: skip


def train_flags(words):
    """Words of a command line -> {field of Config: value}, checked as train.py does."""
    config, flags = vars(parse_flags(words)), {}
    for word in [word.split("=")[0] for word in words if word.startswith("--")]:
        name = word[2:].replace("-", "_")
        name = name if name in config else name.removeprefix("no_")
        if name not in config or name in ("seed", "base", "resume", "threads"):
            raise ValueError(f"{word}: expected the full name of a flag that all runs can share")
        flags[name] = config[name]
    return flags


def outcome(folder):
    """What the table has of one run: {column: number, or None where the run has no such thing}."""
    row, log, result = {}, read_log(folder / "metrics.csv"), read_result(folder)
    for name, column in LOGGED.items():  # the mean of the last quarter of the steps
        values = [float(r[column]) for r in log if r.get(column)]
        row[name] = float(np.mean(values[-max(1, len(values) // 4) :])) if values else None
    cells = {name: c for group in result["aligned"].values() for name, c in group.items() if c}
    row |= {name: cells[name]["value"] if name in cells else None for name in JUDGED}
    return row | {"seconds": result["meta"]["seconds"].get("align")}


def ablate(name, run, out, seeds=3, jobs=1, **flags):
    """Train every variant with every seed from the base of a run, `jobs` at a time with their share
    of the cores. Writes out/NAME.csv and out/NAME.png; returns the table as text."""
    config, out = load_run(run)[0], Path(out)
    flags = DEFAULT | {k: config[k] for k in ("preset", "data_dir", *INHERITED)} | flags
    flags |= {"base": str(run), "threads": max(1, (os.cpu_count() or 1) // jobs)}
    plan = [(variant, seed) for variant in ABLATIONS[name] for seed in range(seeds)]
    print(f"{len(plan)} runs in {out}; finished ones are kept", flush=True)

    def one(variant, seed):
        settings = flags | ABLATIONS[name][variant] | {"seed": seed}
        run = trained(out / FOLDER.format(**settings), **settings)
        return {"variant": variant, "seed": seed} | outcome(run)

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, *zip(*plan)))
    with atomically(out / f"{name}.csv") as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(name, columns_of(rows), out / f"{name}.png")
    return table(name, columns_of(rows))


def columns_of(rows):
    """{column: {variant: values over seeds}} of the columns that all runs have."""
    columns = {}
    for column in [c for c in rows[0] if c not in ("variant", "seed")]:
        if all(row[column] is not None for row in rows):
            columns[column] = defaultdict(list)
            for row in rows:
                columns[column][row["variant"]].append(row[column])
    return columns


def table(name, columns):
    """One line a variant: mean and interval over seeds."""
    lines = [f"{name:18}" + "".join(f"{column:>17}" for column in columns)]
    for variant in ABLATIONS[name]:
        cells = [over_seeds(values[variant]) for values in columns.values()]
        lines.append(f"{variant:18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def figure(name, columns, path):
    """The reward beside what the judge thinks: mean and standard deviation over seeds."""
    panels = [column for column in AXES if column in columns]
    image = Figure(figsize=(2.9 * len(panels), 3.4), layout="constrained")
    for ax, column in zip(image.subplots(1, len(panels), squeeze=False)[0], panels):
        values = list(columns[column].values())
        ax.errorbar(range(len(values)), np.mean(values, 1), np.std(values, 1), fmt="o", capsize=3)
        ax.set_xticks(range(len(values)), list(columns[column]), rotation=45, ha="right")
        ax.set_ylabel(AXES[column])
    image.suptitle(f"{name}: mean and standard deviation over seeds")
    image.savefig(path, dpi=90)


# ---------------------------------------------------------------- why a group


def gradients(model, layout, tokens, rewards):
    """Yields (name, policy gradient) of drawings (N, L) with rewards (B, G) for each thing to take
    off a reward: nothing, the batch's mean, its group's mean. None of them biases the gradient."""
    group, weights = rewards.shape[1], list(model.parameters())
    states, targets, mask = completion(model, layout, tokens, group)
    logprobs = selected_logprobs(states, allowed_head(model, layout), targets)
    baselines = {"none": (0.0, np.inf), "batch": (rewards.mean(), rewards.numel()),
                 "group": (rewards.mean(1, keepdim=True), group)}  # fmt: skip
    for name, (mean, n) in baselines.items():
        # A mean of n with the candidate itself in it takes 1/n of its own gradient away.
        advantages = (rewards - mean).flatten() / (1 - 1 / n)
        loss, _ = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask)
        parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        yield name, torch.cat([part.flatten() for part in parts if part is not None])


def gradient_noise(run, groups=(2, 4, 8, 16), samples=128, repeats=8):
    """How noisy is the gradient of `samples` drawings by the base of a run? {(group size, what is
    taken off): (variance over repeats, squared length of the mean)}. 2 minutes."""
    config, codebook, vocab = load_run(run)
    model, noise = load_model(run, vocab, codebook, config, "base"), {}
    source = make_sources(config["data"], config["data_dir"], config["jitter"])[0]
    reward, layout = Rewards(load_clip(run, "clip", vocab, config), vocab), vocab.layout("draw")
    for group in groups:
        every = defaultdict(list)
        for k in range(repeats):
            rng, chance = random.Random(f"noise/{group}/{k}"), torch.Generator().manual_seed(k)
            pools = [source.prompt_pool(rng, "draw") for _ in range(samples // group)]
            examples = [source.example(rng, "draw", pool) for pool in pools]
            codes = codebook.encode(torch.as_tensor(pictures_of(examples)))
            prompts = vocab.rows("draw", examples, codes)
            tokens = sample(model, layout, prompts, group, chance)
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
    parser = Parser(description="Short runs from one base that differ in one choice.",
                    epilog="Other flags are train.py's, for all runs.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("name", choices=tuple(ABLATIONS))
    parser.add_argument("--run", required=True, metavar="RUN", help="whose base is aligned")
    parser.add_argument("--out", help="for runs, table and figure [RUN/ablate]")
    parser.add_argument("--seeds", type=positive, default=3, help="of every variant [3]")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time [1]")
    args, words = parser.parse_known_args()
    out = Path(args.out or Path(args.run) / "ablate")
    print(ablate(args.name, args.run, out, args.seeds, args.jobs, **train_flags(words)))
    if args.name == "group":
        text = "gradient of 128 drawings, by what is taken off their rewards\n"
        for (group, name), (noise, signal) in gradient_noise(args.run).items():
            text += f"group size {group:2}, {name:6} variance {noise:.4f}, squared mean {signal:.4f}\n"
        (out / "gradient.txt").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    command("ablate.py", main)
