"""What only a run can show of the GRPO step: it scores what it sampled, and it leaks nothing.

Trains the model of a preset for a few steps, then takes GRPO steps and prints
  ratios      the share of tokens whose probability as the sampler saw it, column by column from its
              cache, and as the loss sees it, whole rows at once, differ by more than a tenth
  memory      of the device after two steps and after all: a leak would show
  graphs      that torch.compile made, after two steps and after all: recompilation would show
  seconds     of a step, median after the first two

    $ python results/check_step.py --device cuda      # 2 minutes; --device cpu --preset smoke: 1
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from eval import Parser, run_command
from kernels import selected_logprobs
from model import allowed_head, completion, matmul, read_prompts


@torch.no_grad()
def sampled_logprobs(model, layout, tokens, group, temperature):
    """The log-prob of each chosen token as `sample` computes it, from the cache: (N, chosen)."""
    hidden, cache = read_prompts(model, layout, tokens[::group], group)
    head, read, parts = allowed_head(model, layout).T.to(hidden.dtype), layout.start, []
    for column in layout.columns:
        if column > read:
            hidden = model(tokens[:, read:column], layout.patch[read:column], cache, read)[:, -1]
            read = column
        logprobs = (matmul(hidden, head) / temperature).log_softmax(-1)
        chosen = (tokens[:, column] - layout.first).clamp(min=0)
        parts.append(logprobs.gather(1, chosen[:, None])[:, 0])
    return torch.stack(parts, 1)


@torch.no_grad()
def ratios(run, policy, task):
    """New over old probability of every token of one rollout, (valid tokens,): 1 where sampler and
    loss agree."""
    c, layout = run.config, run.vocab.layout(task, run.device)
    _, examples = train.grpo_prompts(run, run.rng("check", task), task)
    chance = run.generator(run.rng("check", task))
    tokens = train.candidates(run, policy, layout, run.rows(task, examples), chance)
    with run.autocast():
        sampled = sampled_logprobs(policy, layout, tokens, c.group_size, c.temperature)
        states, targets, mask = completion(policy, layout, tokens, c.group_size)
    scored = selected_logprobs(states, allowed_head(policy, layout), targets, c.temperature)
    columns = [column - layout.start for column in layout.columns]
    columns = [column for column in columns if column < mask.shape[1]]
    valid = mask[:, columns]
    return (scored[:, columns] - sampled[:, : len(columns)]).exp()[valid]


def prepared(c):
    """A Run with everything that a GRPO step needs, hardly trained."""
    run = train.Run(c)
    run.folder.mkdir(parents=True, exist_ok=True)
    train.write_config(run)
    for stage in (train.fit_codebook, train.pretrain, train.train_clip):
        stage(run)
        run.load_tokens()
    return run


def check(c, steps):
    """Take GRPO steps of a configuration; returns the lines to print."""
    run = prepared(c)
    policy, reference = run.policy("base"), run.policy("base").requires_grad_(False)
    reward, update = run.rewards(c.reward), train.Updater("align", policy, c.grpo_lr)
    update.set_lr(0.1)
    seconds, memory, graphs = [], [], []
    for step in range(steps):
        start = time.perf_counter()
        train.as_floats(train.grpo_step(run, policy, reference, reward, step, update))
        seconds.append(time.perf_counter() - start)
        memory.append(torch.cuda.memory_allocated() / 2**20 if run.device.type == "cuda" else 0)
        graphs.append(counters["stats"]["unique_graphs"])
    lines = [f"{run.reason}; {c.preset} preset, {steps} steps"]
    for task in [task for task in train.GRPO_TASKS if run.sources_of(task)]:
        r = ratios(run, policy, task).float()
        outside = float(((r < 0.9) | (r > 1.1)).float().mean())
        lines.append(f"{task}: {outside:.3%} of {len(r):,} ratios outside [0.9, 1.1], "
                     f"from {float(r.min()):.3f} to {float(r.max()):.3f}")
    lines.append(f"memory {memory[1]:.1f} MiB after two steps, {memory[-1]:.1f} after {steps}")
    lines.append(f"compiled graphs {graphs[1]} after two steps, {graphs[-1]} after {steps}")
    lines.append(f"a step {median(seconds[2:]):.3f} s; the first {seconds[0]:.1f} s")
    return lines


def main():
    parser = Parser(description="Ratios, memory, recompilations and seconds of the GRPO step.")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--preset", default="auto", help="as in train.py [auto]")
    parser.add_argument("--steps", type=int, default=50, help="3 or more [50]")
    args = parser.parse_args()
    if args.steps < 3:
        raise ValueError(f"--steps {args.steps}: expected 3 or more")
    with tempfile.TemporaryDirectory() as folder:
        flags = {"device": args.device, "preset": args.preset, "out": f"{folder}/run"}
        c = train.make_config(**flags, pretrain_steps=20, clip_steps=20)
        print("\n".join(check(c, args.steps)))


if __name__ == "__main__":
    run_command("check_step.py", main)
