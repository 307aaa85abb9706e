"""The whole method in one command: learn the codebook, pre-train, train the reward, align with GRPO, evaluate.

  stage       learns                                   from                                        leaves in runs/NAME/
  codebook    patches <-> codes, words <-> ids         pictures; texts                             codebook.safetensors, tokenizer.json
  pretrain    the base policy: next token              noisy pairs, careless answers               base.safetensors
  clip        the reward's CLIP, and a second one      noisy pairs; the second: clean pairs of     clip.safetensors, clip_report.safetensors
              that only reports                        all scenes, another seed                    reward_validity.json
  preference  a reward from pairs, only if             edited captions and pictures, samples of    preference.safetensors
              --reward is learned or mix               the base ranked by the CLIP score           preference_validity.json
  grpo        the aligned policy                       its own samples, rewarded; prompts alone    aligned.safetensors
    or, by --method, what goes on with pretrain's loss for the seconds that the reward and grpo took:
  unified     the obvious alternative                  more of pretrain's pairs                    aligned.safetensors
  contrast    --method clip: and a contrastive loss    the same                                    aligned.safetensors
  masked      --method beit: and masked picture codes  the same                                    aligned.safetensors
  labels      --method labels                          and clean answers, about three objects too  aligned.safetensors
    or, by --method, other ways to use the same reward on samples:
  reject      next tokens                              the best of each group of its own samples   aligned.safetensors
  dpo         preferences                              the best and the worst of each group        aligned.safetensors
  best        nothing                                  the reward chooses among 8 when asked       aligned.safetensors
  eval        nothing                                  test scenes                                 eval.json, report.html, samples/

  (T1) L = sum_task weight_task * L_grpo(task) + ptx_coef * L_nexttoken     the pre-training loss is kept in the GRPO
           step (InstructGPT's PPO-ptx), against forgetting; without it and the KL the reward is hacked (README)

  (T2) L_nexttoken = - sum_t w_t logprob_t / sum_t w_t,  over the chosen tokens of a batch, w_t = TOKEN_WEIGHT of the task

All randomness of step k of a stage comes from random.Random(f"{seed}/{stage}/{k}"), so a resumed run needs weights,
optimizer state and k, and then equals an uninterrupted one.

`evaluation` is eval.py: here it loads runs, asks models, and judges what they draw.

    $ python train.py                      # two-core CPU: the `cpu` preset
    $ python train.py --device cuda        # one GPU: the `gpu` preset; several: torchrun --nproc_per_node=N train.py
    $ python train.py --preset smoke       # everything once, tiny; under a minute
    $ python train.py --tasks all --pretrain-steps 2000      # stories, hops and plans as well
    $ python train.py --method unified --base runs/NAME      # the alternative, from the same base, for the same seconds
"""

import argparse
import atexit
import contextlib
import csv
import ctypes
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import eval as evaluation
from data import NOISE, PAD, SOURCES, SPECIAL, Batch, Vocabulary, make_sources, pictures_of, tasks_of
from grpo import (
    best_and_worst,
    combine_rewards,
    contrastive_loss,
    dpo_loss,
    group_advantages,
    masked_code_loss,
    pairwise_advantages,
    rejection_loss,
    rollout,
    rollout_loss,
)
from kernels import fused_linear_grpo_loss, selected_logprobs
from model import Codebook, ModelConfig, Transformer, atomically, decode, pick_device, read_tensors, save_atomically
from reward import (
    CLIP,
    MIXES,
    Pair,
    PreferenceModel,
    Rewards,
    agreement,
    captioned,
    clip_loss,
    make_pairs,
    pair_report,
    preference_loss,
    rank_pairs,
    set_anchor,
    text_ids,
)

# ---------------------------------------------------------------- configuration: one field a flag, its comment the help


@dataclass
class Config:
    preset: str = "auto"  # smoke, cpu or gpu; auto picks gpu on a CUDA device, else cpu
    device: str = "auto"  # auto, cuda, mps or cpu
    method: str = "lvrpo"  # lvrpo; baselines unified, clip, beit; controls labels, reject, dpo, best (see above)
    data: str = "synthetic"  # data sets, comma-separated: synthetic, fashion_mnist, shapes, nlvr
    data_dir: str = "data"  # the parent of fashion_mnist/, shapes/ and nlvr/
    tasks: str = "draw,caption,ask,reason,text"  # what is learned and measured; all: story, tell, hops, steps, plan, judge too
    download: bool = False  # fetch missing public data from the official addresses
    out: str = ""  # run directory; empty means runs/METHOD-PRESET-SEED
    base: str = ""  # take codebook, words, base policy and CLIPs from this run instead of training them
    stage: str = "all"  # all, or the stages to run now, comma-separated
    resume: bool = False  # go on in a run directory that exists
    seed: int = 0  # seeds weights, scenes and samples
    threads: int = 0  # CPU threads; 0 leaves torch's choice
    deterministic: bool = False  # on a GPU: the same numbers every time, by slower kernels; a CPU gives them anyway
    # the world and its tokens
    patch: int = 8  # pixels a patch is wide: 8 gives 16 tokens a picture, 4 gives 64
    codes: int = 1024  # most entries the codebook may have
    jitter: int = 0  # pixels an object may be off its place, 0 or 1
    # the policy
    width: int = 96  # of the residual stream
    layers: int = 4  # transformer blocks
    heads: int = 4  # attention heads
    # pre-training
    pretrain_steps: int = 1000  # next-token steps of the base
    batch: int = 64  # sequences a step
    lr: float = 4e-3  # peak learning rate: 30 steps up, flat, the last 40% down to 0
    extra_steps: int = 0  # next-token methods: further steps; 0 means as many as fit the base run's seconds of rewards and grpo
    fitting_steps: float = 0.0  # set by --base: how many plain next-token steps fit those seconds
    # reward
    clip_steps: int = 400  # for the reward's CLIP; the one that reports takes two fifths
    clip_batch: int = 64  # pairs a step
    clip_edits: int = 4  # false edits of each caption, as further negatives
    clip_width: int = 64  # of both encoders
    clip_lr: float = 3e-3  # peak learning rate
    reward: str = "rule"  # what pictures and captions are rewarded by: rule (the CLIP score), learned (the preference model), mix
    preference_steps: int = 500  # for the preference model
    pair_limit: int = 0  # preference pairs to learn from in all, in whole steps, again and again; 0 means new ones at every step
    pairs: int = 32  # preference pairs a step, half of them made, half sampled from the base and ranked by the CLIP score
    # GRPO
    grpo_steps: int = 60  # steps: each samples, rewards, scores and learns
    prompts: int = 16  # prompts to draw a step; of the other tasks as many times that as GRPO_PROMPTS says
    group_size: int = 8  # candidates a prompt
    epochs: int = 1  # optimisation passes over a rollout: with more than one the clipping acts
    grpo_lr: float = 2e-3  # peak learning rate
    kl_coef: float = 0.02  # weight of the KL penalty to the frozen base
    clip_low: float = 0.2  # the ratio is clipped below 1 - this
    clip_high: float = 0.2  # ... and above 1 + this
    scale: str = "batch"  # what advantages of --advantage mean are divided by: group or batch std, or none
    advantage: str = "mean"  # mean (reward - group mean), pairwise (win rate) or parts (normalise each reward, then sum)
    reduction: str = "token"  # how token losses are averaged: token, sequence or constant
    level: str = "token"  # one ratio a token, or one a sequence
    ptx_coef: float = 1.0  # weight of the pre-training loss kept in the step
    ptx_filter: bool = True  # keep it on those pairs only whose caption the reward finds likelier than all its edits together
    temperature: float = 1.0  # of rollouts
    max_kl: float = 2.0  # stop when the KL to the base, nats a token, passes this for five steps
    # evaluation
    eval_items: int = 1024  # test items a metric, twice as many drawings of compose
    eval_prompts: int = 96  # prompts a front, 8 pictures each, at 6 temperatures


PRESETS = {
    "cpu": {},
    "smoke": dict(width=32, layers=2, pretrain_steps=60, batch=32, clip_steps=25, clip_batch=32, clip_width=32,
                  grpo_steps=4, prompts=4, group_size=4, epochs=2, eval_items=64, eval_prompts=8, extra_steps=10),
    "gpu": dict(patch=4, jitter=1, width=384, layers=8, heads=6, pretrain_steps=2500, batch=512, lr=2e-3, clip_steps=800, clip_batch=512,
                clip_width=128, prompts=64, eval_items=2048),
}  # fmt: skip
LAST = {"lvrpo": "grpo", "unified": "unified", "clip": "contrast", "beit": "masked", "labels": "labels", "reject": "reject",
        "dpo": "dpo", "best": "best"}  # method: the stage that tells it from the others  # fmt: skip
MORE = {"unified": {}, "contrast": {"objective": contrastive_loss}, "masked": {"objective": masked_code_loss, "words": False},
        "labels": {"labelled": True}}  # stages that go on with next-token training, and how  # fmt: skip
SAMPLING = {"grpo": None, "reject": rejection_loss, "dpo": dpo_loss}  # stages that learn from samples; None is GRPO's own loss
STAGES = {method: ("codebook", "pretrain", "clip", "preference", last, "eval") for method, last in LAST.items()}
CHOICES = {
    "preset": ("auto", *PRESETS),
    "device": ("auto", "cuda", "mps", "cpu"),
    "method": tuple(STAGES),
    "reward": tuple(MIXES),
    "scale": ("group", "batch", "none"),
    "advantage": ("mean", "pairwise", "parts"),
    "reduction": ("token", "sequence", "constant"),
    "level": ("token", "sequence"),
}
TASK_MIX = {"draw": 4, "caption": 2, "ask": 6, "reason": 1, "text": 1, "hops": 4, "steps": 2, "story": 2, "tell": 2, "judge": 4,
            "plan": 2}  # of a pre-training batch  # fmt: skip
TOKEN_WEIGHT = {"draw": 1.5, "ask": 4.0, "hops": 4.0, "judge": 4.0, "story": 1.5, "plan": 1.5}
# in its loss; others 1. An answer is one word beside sixteen codes or more:
# with equal weights questions are learned last (700 steps: 71% of the answers right, with these 89%)
ALONE = 0.2  # share of the pictures to draw that come without words, half of them of three objects, and of the captions that come
# without a picture, all of three objects: pictures alone and texts alone are cheap. It is what guidance needs, and it lets
# a policy sample, once in a while, what no pair ever showed it
QUESTIONS = ("ask", "reason", "hops", "steps", "judge")  # tasks that have one right answer
HURRIED = ("ask", "reason")  # those of them whose answers are vague or hasty in pre-training
LONG = ("reason", "steps", "story", "tell", "plan")  # tasks that a batch of others had better not be padded to
CAPTIONED = {"draw", "caption", "story", "plan"}  # tasks that need the reward of pictures with their captions
OBJECTIVE_WEIGHT = 0.5  # of the contrastive and the masked-code loss beside the next-token loss
GRPO_PROMPTS = {"draw": (1, 1), "caption": (1, 0.5), "ask": (4, 1), "reason": (1, 0.5), "hops": (2, 0.5), "steps": (0.5, 0.5),
                "story": (0.5, 0.5), "tell": (0.25, 0.25), "judge": (2, 0.5), "plan": (0.5, 0.5)}  # fmt: skip
# prompts of each task, as shares of --prompts: sampled, and learned from, the ones whose rewards differ most. Of ten groups of
# answers seven have no spread, so questions are sampled in plenty: an answer is one word
GRPO_TASKS = {"draw": 2.0, "caption": 0.5, "ask": 0.5, "reason": 0.5, "hops": 0.5, "steps": 0.5, "story": 2.0, "tell": 0.5,
              "judge": 0.5, "plan": 2.0}  # fmt: skip
# weight of each task's mean token loss: a picture's reward is spread over 16 tokens or 64, a short answer's over two, so the
# mean over tokens would let answers dominate


def grpo_prompts(config, task):
    """How many prompts of a task are sampled in a step, and how many are learned from."""
    return [max(round(config.prompts * share), 1) for share in GRPO_PROMPTS[task]]


def clean_labels(rows, labelled=False):
    """How many rows of Trainer.pretraining_rows bring an answer that is sure to be right and exact; the web's are not."""
    return sum(e.task in (*QUESTIONS, "plan") and (labelled or e.task not in HURRIED or s.name != "synthetic") for s, e, _ in rows)


def parse_flags(argv=None):
    """Command line -> Config: a preset's values, overridden by every flag that was given; with --resume, those of the run."""
    parser = evaluation.Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "choices": CHOICES.get(f.name)}
        help_text = f"{comments[f.name]} [{f.default}]".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **kind)
    given = vars(parser.parse_args(argv))
    return resumed(given) if given.get("resume") else make_config(**given)


def resumed(given):
    """The Config of the run that goes on: only where and how to run it may be given anew, and which stages (all, if none is
    given). ValueError for any other change."""
    path, here = Path(given.get("out") or make_config(**given).out) / "config.json", ("out", "resume", "stage", "device", "threads")
    if not path.exists():
        return make_config(**given)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = make_config(**{k: v for k, v in stored.items() if k != "environment"})
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); start again with another --out") from error
    config = make_config(**{"method": stored.method, "preset": stored.preset, **given})
    for name in set(given) - set(here):
        if getattr(config, name) != getattr(stored, name):
            flag = f"--{name.replace('_', '-')} {given[name]}"
            raise ValueError(f"{flag}: the run in {config.out} has {getattr(stored, name)}; leave it out to go on, or choose another --out")
    anew = {name: getattr(config, name) for name in here if name in given or name in ("out", "stage")}
    return dataclasses.replace(stored, **anew)


def make_config(**given):
    """A checked Config from keyword arguments. ValueError names a value that cannot work, and what can."""
    for name, value in given.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"--{name} {value}: expected one of {', '.join(CHOICES[name])}")
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "gpu" if pick_device(given.get("device", "auto"))[0].type == "cuda" else "cpu"
    c = Config(**{**PRESETS[preset], **given, "preset": preset})
    c.tasks = ",".join(TASK_MIX) if c.tasks == "all" else c.tasks
    c.out = c.out or f"runs/{c.method}-{c.preset}-{c.seed}"
    positive = ("codes", "width", "layers", "heads", "pretrain_steps", "batch", "lr", "clip_steps", "clip_batch", "clip_edits",
                "clip_width", "clip_lr", "grpo_steps", "prompts", "epochs", "grpo_lr", "temperature", "max_kl", "eval_items",
                "eval_prompts", "preference_steps", "clip_high")  # fmt: skip
    stages = STAGES[c.method]
    checks = [(0 < getattr(c, n) < math.inf, n, "more than 0") for n in positive]
    natural = ("kl_coef", "ptx_coef", "extra_steps", "pair_limit", "fitting_steps")
    checks += [(0 <= getattr(c, n) < math.inf, n, "0 or more") for n in natural]
    checks += [
        (c.patch in (4, 8, 16), "patch", "4, 8 or 16"),
        (c.jitter in (0, 1), "jitter", "0 or 1"),
        (c.group_size > 1, "group_size", "at least 2"),
        (0 < c.clip_low < 1, "clip_low", "between 0 and 1"),
        (c.width % (2 * c.heads) == 0, "width", f"a multiple of 2 x heads = {2 * c.heads}"),
        (c.clip_width % 8 == 0, "clip_width", "a multiple of 8"),
        (0 <= c.seed < 2**63, "seed", "0 or more, below 2**63"),
        (0 <= c.threads <= 1024, "threads", "0 to 1024"),
        (c.pairs >= 2, "pairs", "2 or more"),
        (set(c.data.split(",")) <= set(SOURCES) and len(set(c.data.split(","))) == c.data.count(",") + 1, "data",
         f"names from {', '.join(SOURCES)}, comma-separated, each once"),
        (set(c.tasks.split(",")) <= set(TASK_MIX), "tasks", f"all, or names from {', '.join(TASK_MIX)}, comma-separated"),
        (bool(set(c.tasks.split(",")) & set(GRPO_TASKS)), "tasks", "a task beside text, which nothing rewards"),
        ("draw" in c.tasks.split(",") or not {"story", "plan"} & set(c.tasks.split(",")), "tasks", "draw beside story and plan"),
        (c.stage == "all" or set(c.stage.split(",")) <= set(stages), "stage", f"all, or names from {', '.join(stages)}"),
    ]
    for ok, name, legal in checks:
        if not ok:
            near = get_close_matches(str(getattr(c, name)), [*SOURCES, *stages, *TASK_MIX], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: expected {legal}{hint}")
    return c


# ---------------------------------------------------------------- the run directory


class Log:
    """metrics.csv, one row a step, reproducible; and timing.csv, which is not. Opening it at (stage, step) drops later rows."""

    def __init__(self, folder, stage, step):
        self.files = {}
        for name in ("metrics", "timing"):
            path = folder / f"{name}.csv"
            self.files[name] = [path, [r for r in evaluation.read_log(path) if r["stage"] != stage or int(r["step"]) < step]]
            self._write(name)

    def add(self, name, row):
        """Append one row, a dict, to "metrics" or "timing"; a new column rewrites the file."""
        path, rows = self.files[name]
        known = set(rows[0]) if rows else set()
        rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})
        if set(row) <= known:
            with path.open("a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, list(rows[0])).writerow(rows[-1])
        else:
            self._write(name)  # a new stage brings new columns

    def _write(self, name):
        path, rows = self.files[name]
        columns = list(dict.fromkeys(k for r in rows for k in r))
        for i, r in enumerate(rows):
            rows[i] = {k: r.get(k, "") for k in columns}
        with atomically(path) as new, new.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(rows)


SAVE_SECONDS = 60  # between two states of a stage: what a crash costs


class Stopped(BaseException):
    """Training ended early, for a reason that the message tells; `status` is the exit status. No handler of errors may swallow it."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- several processes: torchrun --nproc_per_node=N train.py

RANK, WORLD = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))


def join(config):
    """Meet the others. All but the first work on a copy of the run directory that is thrown away: one writes."""
    for task in (t for t in config.tasks.split(",") if t in GRPO_PROMPTS):
        asked, kept = grpo_prompts(config, task)
        if asked % WORLD or kept % WORLD:
            raise ValueError(f"--prompts {config.prompts}: {WORLD} processes cannot share {asked} prompts of {task}, {kept} kept")
    if config.batch < 8 * WORLD:
        raise ValueError(f"--batch {config.batch}: fewer than 8 rows for each of {WORLD} processes")
    if gpus := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")  # numbers for the log stay on the CPU
    atexit.register(torch.distributed.destroy_process_group)
    if RANK:
        copy = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, copy)
        if Path(config.out).is_dir():
            shutil.copytree(config.out, copy, dirs_exist_ok=True)
        config.out, sys.stdout = copy, open(os.devnull, "w", encoding="utf-8")
    if config.download and int(os.environ.get("LOCAL_RANK", RANK)) == 0:  # one on each machine
        make_sources(config.data, config.data_dir, fetch_missing=True)
    torch.distributed.barrier()


class Loss(torch.nn.Sequential):
    """Loss(model) gives back the loss that it is called with: DistributedDataParallel wants a call before a backward pass."""

    def forward(self, loss):
        return loss


def loss_of(model):
    """A loss that went through it has gradients that are means over the processes."""
    return torch.nn.parallel.DistributedDataParallel(Loss(model)) if WORLD > 1 else Loss(model)


def own_share(items):
    """This process's part of what all have made alike."""
    return items[RANK * len(items) // WORLD : (RANK + 1) * len(items) // WORLD]


def over_processes(x):
    """The mean of a tensor over the processes."""
    if WORLD > 1:
        torch.distributed.all_reduce(x := x.detach() / WORLD)
    return x


def gathered(x):
    """What all processes have, (B, G) each, one after the other."""
    every = x.new_zeros(WORLD, *x.shape)
    every[RANK] = x * WORLD
    return over_processes(every).flatten(0, 1)


# ---------------------------------------------------------------- one loop for every stage that learns


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: all directions of a matrix get an equal share of the step. Source: K. Jordan et al., Muon (2024).

    Matrices of one shape are taken together and in their own precision; torch.optim.Muon is the same one by one in
    bfloat16, which many CPUs emulate: 52 ms a step of the `cpu` preset instead of 13.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)  # shape: [(weight, update with the short side first)]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])  # Nesterov's look ahead
                alike[tuple(sorted(p.shape))].append((p, update if p.shape[0] <= p.shape[1] else update.T))
            for shape, pairs in alike.items():
                x = torch.stack([update for _, update in pairs])
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):  # Newton-Schulz: every singular value goes to about 1
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
                for (p, _), update in zip(pairs, x * (0.2 * math.sqrt(shape[1]))):  # as large as a step of AdamW
                    p.sub_(update if p.shape[0] <= p.shape[1] else update.T, alpha=group["lr"])


def make_optimizers(model, lr):
    """Muon for the matrices inside the blocks, AdamW for embeddings and gains: after 750 steps ahead of
    AdamW alone after 1,000 (results/optimizer.md)."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "blocks" in n)]
    return [Muon(inside, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step, steps, warmup=30, decay=0.4):
    """Share of the peak learning rate: linear up (over a tenth of a short run), flat, linear down to 0 over the last part of the steps.

    >>> [round(schedule(step, 100), 2) for step in (0, 9, 50, 80, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.03]
    """
    return min(1.0, (step + 1) / min(warmup, max(steps / 10, 1)), (steps - step) / (decay * steps))


def flat_state(model, optimizers, progress):
    """Weights, optimizer state and progress, a list of integers, as one flat dict of tensors, for one .safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {"progress": torch.tensor(progress)}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{p}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return tensors


def load_state(model, optimizers, path):
    """The reverse of flat_state; returns the progress."""
    tensors = read_tensors(path)
    progress = tensors["progress"].tolist()
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for i, optimizer in enumerate(optimizers):
        state = {}
        for k, v in tensors.items():
            if k.startswith(f"optimizer.{i}."):
                p, name = k.split(".", 3)[2:]
                state.setdefault(int(p), {})[name] = v
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return progress


def save_state(model, optimizers, progress, path):
    """Keep this state and the one before."""
    if path.exists():
        os.replace(path, path.with_suffix(".previous"))
    save_atomically(flat_state(model, optimizers, progress), path)


def newest_state(model, optimizers, path):
    """Load the newer of the two states kept that is whole; returns its progress, None if there is none. ValueError if they are damaged."""
    damaged = None
    for kept in (path, path.with_suffix(".previous")):
        if kept.exists():
            try:
                progress = load_state(model, optimizers, kept)
            except (ValueError, KeyError, RuntimeError) as error:  # the last two: other names or shapes
                damaged = str(error) if isinstance(error, ValueError) else f"{kept} is of another configuration"
                print(f"{damaged}; the state before it is looked for")
            else:
                os.replace(kept, path)  # or the next one saved would push it out and keep the damaged one
                return progress
    if damaged:
        raise ValueError(f"{damaged}, nor is there a whole one before it; delete it to run its stage again")
    return None


class Made(torch.utils.data.Dataset):
    """What `make(step)` gives, as a data set whose items are steps."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, step):
        return self.make(step)


def ahead(make, steps, workers):
    """make(step) for the steps in order; with workers, made by as many other processes while this one learns from those before.
    It may depend on nothing but the step, and gives numbers, texts and arrays, which come through a pipe."""
    if not workers:
        return map(make, steps)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the fork

    def begin(_):
        os.setpgrp()  # a Ctrl-C, or a signal to the group, is for the process that saves
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: killed with that process

    return iter(torch.utils.data.DataLoader(
        Made(make), None, sampler=steps, num_workers=workers, collate_fn=lambda made: made, worker_init_fn=begin,
        multiprocessing_context="fork", generator=torch.Generator()))  # fmt: skip


class Trainer:
    """What all stages share: configuration, device, data, run directory."""

    def __init__(self, config):
        self.config, self.folder = config, Path(config.out)
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's matrix products ask for it
            torch.use_deterministic_algorithms(True)
        self.device, self.dtype, self.reason = pick_device(config.device)
        self.sources = make_sources(config.data, config.data_dir, config.jitter, config.download, config.tasks.split(","))
        self.captioned = [s for s in self.sources if CAPTIONED & set(s.tasks)]  # the key rewards the others
        self.interrupted, self.learning = None, False
        # a GPU takes a batch faster than one CPU core makes it; on a CPU all cores learn
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if sys.platform == "linux" else 1
        self.workers = max(0, min(8, cores - 1)) if self.device.type == "cuda" else 0

    def save_config(self):
        """config.json: every setting, and what else a second run needs to give the same numbers."""
        known = describe(self.config)
        here = {"device": self.reason, "threads": torch.get_num_threads()} | {k: known[k] for k in ("commit", "machine", "versions")}
        write_json(self.folder / "config.json", dataclasses.asdict(self.config) | {"environment": here})

    def rng(self, *place):
        """The random numbers of a place, such as a stage and its step: the same whatever ran before."""
        return random.Random("/".join(map(str, (self.config.seed, *place))))

    def generator(self, rng):
        """A generator on the device, seeded from rng, another in every process."""
        return torch.Generator(self.device).manual_seed(rng.getrandbits(60) + RANK)

    @functools.cached_property
    def judges(self):
        """(source, judge) for every data set."""
        return evaluation.judges(vars(self.config), self.sources)

    def autocast(self):
        """bfloat16 matrix products on a GPU that has them, else nothing."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def optimise(self, stage, model, steps, lr, losses, after=None, make=None):
        """Train `model` for `steps`. losses(step) yields {name: loss} once for every optimizer update, after it filled a
        dict of metrics that it yields beside it; with `make` it is losses(step, make(step)), made `ahead`. `after(step)` may look at
        the model. Resumes, logs, guards, saves."""
        optimizers, through, path = make_optimizers(model, lr), loss_of(model), self.folder / f"state_{stage}.safetensors"
        progress = newest_state(model, optimizers, path)
        first, skipped, *counts = progress or (0, 0, 0, 0)
        if progress:
            print(f"{stage}: goes on at step {first}")
        log, saved = Log(self.folder, stage, first), time.monotonic()
        pace = 1 if sys.stderr.isatty() else 15  # seconds between two states of the bar; a log file wants few
        bar = tqdm(range(first, steps), initial=first, total=steps, desc=f"{stage:9}", mininterval=pace, ncols=110, disable=RANK > 0)
        self.learning = True
        made = ahead(make, range(first, steps), self.workers) if make else None
        for step in bar:
            start = time.perf_counter()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(step, steps)
            counted = step == min(first + 1, steps - 1) and self.device.type == "cpu"  # one step's matrix products, for the ledger
            counter = FlopCounterMode(display=False) if counted else contextlib.nullcontext()
            with counter:
                for parts, row in losses(step, *([next(made)] if make else [])):
                    norms = self.backward(through, parts)
                    total = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
                    loss = float(over_processes(sum(x.detach() for x in parts.values())))
                    if np.isfinite(total + loss):
                        for optimizer in optimizers:
                            optimizer.step()
                    else:
                        skipped += 1
                        if skipped > 5:
                            raise Stopped(
                                f"{stage}: the loss or gradient was not finite {skipped} times, last at step {step}; start again "
                                f"with a lower learning rate than {lr:g} and another --out")  # fmt: skip
                    row |= {"loss": loss, "grad_norm": total, "lr": lr * schedule(step, steps), "skipped": skipped, **norms}
            row = {k: float(v) for k, v in row.items()}
            if WORLD > 1:  # one that is told to stop stops all
                *values, told = over_processes(torch.tensor([*row.values(), float(self.interrupted or 0)])).tolist()
                row = dict(zip(row, values))
            seconds = {k: row.pop(k) for k in [k for k in row if k.startswith("seconds")]}
            row |= after(step, model) if after and not RANK else {}
            log.add("metrics", {"stage": stage, "step": step, **row})
            log.add("timing", {"stage": stage, "step": step, "seconds": time.perf_counter() - start, **seconds, **self.memory(),
                               **({"operations": counter.get_total_flops()} if counted else {})})  # fmt: skip
            bar.set_postfix({k: f"{row[k]:.3g}" for k in ("loss", "reward_draw", "reward_ask", "kl_draw", "r1") if k in row}, refresh=False)
            counts = self.guard(stage, step, row, *counts)
            signalled = self.interrupted if WORLD == 1 else told and signal.SIGTERM
            if signalled or (time.monotonic() - saved > SAVE_SECONDS and not counts[0]):
                save_state(model, optimizers, [step + 1, skipped, *counts], path)
                saved = time.monotonic()
            if signalled:
                go_on = f"go on with: python train.py --resume --out {self.folder}"
                raise Stopped(f"interrupted in {stage} at step {step + 1}; {go_on}", 128 + signalled)
        self.learning = False
        return model

    def guard(self, stage, step, row, diverged, idle):
        """How many steps on end a KL has been out of range, and no group has had a spread. Stopped after five, and after twenty."""
        kl, equal = ([v for k, v in row.items() if k.startswith(prefix)] for prefix in ("kl_", "zero_spread_"))
        diverged = diverged + 1 if any(not v <= self.config.max_kl for v in kl) else 0  # not a number is out of range too
        idle = idle + 1 if equal and min(equal) == 1 else 0
        again = f"from the same base: --base {self.folder} --out NEW"
        if diverged == 5:
            raise Stopped(f"{stage}: the KL to the base passed {self.config.max_kl} nats a token for five steps, last at step {step}; "
                          f"raise --kl-coef or lower --grpo-lr, {again}")  # fmt: skip
        if idle == 20:
            raise Stopped(f"{stage}: for twenty steps, last at step {step}, all candidates of a prompt had equal rewards: there is nothing "
                          f"to learn; train the base for longer, or try another --reward or a higher --temperature, {again}")  # fmt: skip
        return diverged, idle

    @staticmethod
    def backward(through, parts):
        """Gradients of the sum of the parts, through the `loss_of` a model, and the norm that each part adds (if it is not alone)."""
        weights, total, norms = list(through.parameters()), 0.0, {}
        for name, loss in parts.items():
            for p in weights:
                p.grad = torch.zeros_like(p)
            through(loss).backward()
            part = torch.cat([p.grad.flatten() for p in weights])
            total, norms[f"grad_{name}"] = total + part, float(part.norm())
        for p, g in zip(weights, total.split([p.numel() for p in weights])):
            p.grad = g.view_as(p)
        return norms if len(parts) > 1 else {}

    def memory(self):
        """{"peak_mb": peak memory so far}: of the GPU, else of the process; {} where the system does not tell."""
        if self.device.type == "cuda":
            return {"peak_mb": torch.cuda.max_memory_allocated() / 2**20}
        try:
            import resource
        except ImportError:  # Windows
            return {}
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)}

    # ------------------------------------------------------------ stages

    def codebook_stage(self):
        """Patches and words of all data sets."""
        c, rng = self.config, self.rng("codebook")
        pools = ("paired", "three") * 2000
        look = lambda s: "caption" if "caption" in s.tasks else s.tasks[0]  # noqa: E731
        shown = lambda s: pools[: 1400 if look(s) == "judge" else None]  # three pictures each  # noqa: E731
        pictures = pictures_of([s.example(rng, look(s), pool) for s in self.sources for pool in shown(s)])
        codebook = Codebook.fit(pictures, c.codes, c.patch, seed=c.seed)
        for s in self.sources:
            sample = pictures_of([s.example(rng, look(s), split="val") for _ in range(500)])
            print(f"codebook: {len(codebook.entries)} entries; {s.name} validation pictures {codebook.psnr(sample):.1f} dB")
        vocab = Vocabulary.train((t for s in self.sources for t in s.texts(rng, 6000)), len(codebook.entries), codebook.side**2)
        print(f"words: {len(vocab.words)} in {vocab.n_text} text tokens; vocabulary {vocab.size}")
        vocab.save(self.folder)
        save_atomically({"entries": codebook.entries}, self.folder / "codebook.safetensors")

    def load_tokens(self):
        """Codebook, words, and the weight of every task in the next-token loss, from the run directory."""
        _, self.codebook, self.vocab = evaluation.load_run(self.folder)
        self.token_weight = torch.ones(self.vocab.size, device=self.device)
        for task, weight in TOKEN_WEIGHT.items():
            self.token_weight[SPECIAL.index(f"<{task}>")] = weight

    def policy(self, name=None):
        """The transformer, fresh from the seed, or with the weights of a checkpoint of this run."""
        c = self.config
        torch.manual_seed(c.seed)
        model = Transformer(ModelConfig(self.vocab.size, self.codebook.side, c.width, c.layers, c.heads)).to(self.device)
        if name:
            evaluation.load_weights(model, self.folder / f"{name}.safetensors")
        return model

    def pretraining_rows(self, rng, n, believed=None, labelled=False):
        """n pre-training examples, as (source, example, is what it is given blanked out?), less those that `believed`(sources,
        examples, rng) -> (N,) bool turns down. labelled: questions and answers as in the GRPO stage, clean, about three objects too;
        those of several hops to be answered at once always are."""
        rows = []
        for _ in range(n):
            source = rng.choice(self.sources)
            task = rng.choice([t for t in source.tasks for _ in range(TASK_MIX[t])])
            alone = task in ("draw", "caption") and rng.random() < ALONE
            pool = "three" if alone and (task == "caption" or rng.random() < 0.5) else "paired"
            pool = source.prompt_pool(rng, task) if task == "hops" or (labelled and task in QUESTIONS) else pool
            rows.append((source, source.example(rng, task, pool, None if labelled and task in HURRIED else NOISE), alone))
        if believed:
            told = [row for row in rows if not row[2]]  # no pair, nothing to believe
            kept = itertools.compress(told, believed(*zip(*((s, e) for s, e, _ in told)), rng)) if told else ()
            rows = [*kept, *(row for row in rows if row[2])] or rows
        return rows

    def codes(self, pictures):
        """The codes of pictures (M, S, S, 3), worked out on the device: a thousand distances for every patch."""
        return self.codebook.encode(torch.as_tensor(pictures, device=self.device))

    def packed(self, rows):
        """The rows of `pretraining_rows` as templates, the LONG tasks each apart: padding is work for nothing. For each part all
        of a Batch in one array, (5, N, L) int32, in which code k is that of the k-th patch of the part's pictures; which rows are
        to be told nothing; and the pictures."""
        parts = []
        for task in (None, *LONG):
            part = [(e, alone) for _, e, alone in rows if (e.task if e.task in LONG else None) == task]
            if part:
                examples, alone = zip(*part)
                pictures = pictures_of(examples)
                patches = torch.arange(len(pictures) * self.vocab.n_patches).view(len(pictures), -1)
                parts.append((torch.stack(self.vocab.batch(examples, patches)).int().numpy(), np.array(alone), pictures))
        return parts

    def batches(self, parts):
        """What `packed` made, as Batches on the device, with the codes of the pictures."""
        for array, alone, pictures in parts:
            batch = Batch(*torch.from_numpy(array).to(self.device).long()).trim().blank(torch.from_numpy(alone).to(self.device))
            ids = torch.cat((torch.arange(self.vocab.n_text, device=self.device), self.codes(pictures).flatten() + self.vocab.n_text))
            yield batch._replace(tokens=torch.where(batch.tokens < 0, -1, ids[batch.tokens]), target=ids[batch.target])

    def next_token_loss(self, model, parts):
        """Weighted mean negative log-likelihood of all chosen tokens of what `packed` made, and how many they are."""
        total, weights, count = 0.0, 0.0, 0
        for batch in self.batches(parts):
            mask = batch.mask[:, 1:]
            weight = self.token_weight[batch.tokens[:, 1]][:, None].expand(mask.shape)[mask]  # the second token names the task
            with self.autocast():
                hidden = model(batch.target[:, :-1], batch.patch[:, :-1])
            pick = lambda x: x[:, 1:][mask][None]  # noqa: E731
            logprobs = selected_logprobs(hidden[mask][None], model.head, pick(batch.target), lo=pick(batch.lo), hi=pick(batch.hi))
            total, weights, count = total - weight @ logprobs[0], weights + weight.sum(), count + len(weight)
        return total / over_processes(weights), count * WORLD  # (T2)

    def next_token(self, stage, model, labelled=False, objective=None, words=True):
        """`make` and `losses` of a next-token stage for `optimise`: (T2), and a baseline's objective on the same rows beside it: on
        the pictures that come with a caption, or, without `words`, on all pictures."""

        def make(step):
            """A batch; and what the objective is to see: pictures, texts, and the random numbers that go on from here."""
            rng = self.rng(stage, step)
            rows = self.pretraining_rows(rng, self.config.batch, labelled=labelled)
            shown = [(e, alone) for _, e, alone in rows if e.task != "text" and not (alone and e.task == "caption")]
            some = [e for e, alone in shown if objective and (not words or (e.task in ("draw", "caption") and not alone))]
            seen = (pictures_of(some), [e.prompt or e.answer for e in some], rng) if some else None
            return self.packed(own_share(rows)), clean_labels(rows, labelled), seen

        def losses(step, made):
            """Of one batch."""
            packed, labels, seen = made
            loss, tokens = self.next_token_loss(model, packed)
            parts, row = {"nll": loss}, {"tokens": tokens, "labels": labels}
            if seen:
                pictures, texts, rng = seen
                with self.autocast():
                    parts[stage] = OBJECTIVE_WEIGHT * objective(model, self.vocab, self.codes(pictures), texts, rng)
                row[f"loss_{stage}"] = float(parts[stage].detach())
            yield parts, row

        return {"make": make, "losses": losses}

    def pretrain_stage(self):
        """The base policy, on noisy pairs."""
        model, c = self.policy(), self.config
        self.optimise("pretrain", model, c.pretrain_steps, c.lr, **self.next_token("pretrain", model))
        save_atomically(model.state_dict(), self.folder / "base.safetensors")

    def go_on(self, stage, **how):
        """A baseline or control that goes on with next-token training."""
        model, c = self.policy("base"), self.config
        if not c.extra_steps:  # as many steps as fit its seconds, by how much slower than a plain one a step is here and now
            c.extra_steps = max(1, round(c.fitting_steps / self.slowness(stage, how)))
            self.save_config()
            print(f"{stage}: {c.extra_steps} further steps")
        self.optimise(stage, model, c.extra_steps, c.lr, **self.next_token(stage, model, **how))
        save_atomically(model.state_dict(), self.folder / "aligned.safetensors")

    def slowness(self, stage, how, steps=6):
        """Seconds of a step of this stage over those of a plain next-token step, medians of a few of each, in turns."""
        model, seconds = self.policy("base"), ([], [])
        optimizers, through = make_optimizers(model, 1e-6), loss_of(model)
        kinds = [self.next_token("slowness", model), self.next_token(stage, model, **how)]
        made = [ahead(kind["make"], range(steps), self.workers) for kind in kinds] if how else []
        for step in range(steps if how else 0):
            for kind, ready, times in zip(kinds, made, seconds):
                start = time.perf_counter()
                for parts, _ in kind["losses"](step, next(ready)):
                    self.backward(through, parts)
                    float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))  # waits for the device, as a step does
                    for optimizer in optimizers:
                        optimizer.step()
                times.append(time.perf_counter() - start)
        return float(over_processes(torch.tensor(np.median(seconds[1]) / np.median(seconds[0])))) if how else 1.0

    def best_stage(self):
        """Best-of-N learns nothing: the reward chooses among N candidates when the model is asked."""
        save_atomically(self.policy("base").state_dict(), self.folder / "aligned.safetensors")

    def rewards(self, mix=None):
        """The rewards of --reward, or of another mix."""
        c, preference, mix = self.config, None, (mix or self.config.reward) if self.captioned else "rule"
        if mix != "rule":
            preference = PreferenceModel(self.vocab.n_text, c.patch, width=c.clip_width).to(self.device).eval()
            evaluation.load_weights(preference, self.folder / "preference.safetensors")
        clip = evaluation.load_clip(self.folder, "clip", self.vocab, vars(c), self.device) if self.captioned else None
        return Rewards(clip, self.vocab, preference=preference, weights=MIXES[mix])

    def clip_stage(self):
        """The reward's CLIP on noisy pairs; a second one, of another seed, on clean pairs of all pools, that only reports."""
        c = self.config
        if not self.captioned:
            print("clip: nothing to learn, no data set here has pictures with captions; answers are rewarded by the key")
            return write_json(self.folder / "reward_validity.json", {})
        everything = ("paired", "prompted", "three", "heldout")
        reports = c.clip_steps * 2 // 5  # clean pairs teach faster
        for stage, steps, noise, pools, held_out, longest in (
            ("clip", c.clip_steps, NOISE, ("paired",), True, 2), ("clip_report", reports, None, everything, False, 3)):  # fmt: skip
            if (self.folder / f"{stage}.safetensors").exists():
                continue  # an interrupted stage goes on with the second
            torch.manual_seed(self.rng(stage).getrandbits(60))
            clip = CLIP(self.vocab.n_text, c.patch, width=c.clip_width).to(self.device)

            def make(step):
                """Pairs, each caption with its false edits: pictures, word ids of captions and of edits."""
                rng, examples, edited = self.rng(stage, step), [], []
                for _ in range(c.clip_batch):
                    source = rng.choice(self.captioned)
                    examples.append(captioned(source, rng, rng.choice(pools), noise))
                    edited += source.negatives(rng, examples[-1].prompt, c.clip_edits, held_out, longest)
                ids, edits = (text_ids(self.vocab, texts).numpy() for texts in ([e.prompt for e in examples], edited))
                return np.stack([e.picture for e in examples]), ids, edits

            def losses(step, made):
                """Of one batch of pairs."""
                pictures, ids, edits = (torch.from_numpy(x).to(self.device) for x in made)
                with self.autocast():
                    loss, r1 = clip_loss(clip, pictures, ids, edits)
                yield {"loss": loss}, {"r1": r1, "tokens": int((ids > PAD).sum())}

            self.optimise(stage, clip, steps, c.clip_lr, losses, make=make)
            save_atomically(clip.state_dict(), self.folder / f"{stage}.safetensors")
        write_json(self.folder / "reward_validity.json", self.check_reward("rule"))

    def preference_stage(self):
        """The preference model, on pairs made by small edits and on pairs of the base model's own samples."""
        c = self.config
        torch.manual_seed(self.rng("preference").getrandbits(60))
        model = PreferenceModel(self.vocab.n_text, c.patch, width=c.clip_width).to(self.device)
        ranked = self.ranked_samples()

        def losses(step):
            """Pairs, half of them made, half sampled."""
            rng = self.rng("preference", step % math.ceil(c.pair_limit / c.pairs) if c.pair_limit else step)
            source = rng.choice(self.captioned)
            own = rng.sample(ranked, min(c.pairs // 2, len(ranked)))
            pairs = own + make_pairs(source, rng, c.pairs - len(own))
            with self.autocast():
                better, worse = model.pairs(self.vocab, pairs)
            yield {"loss": preference_loss(better, worse)}, {"accuracy": (better > worse).float().mean(), "pairs": len(pairs)}

        self.optimise("preference", model, c.preference_steps, c.clip_lr, losses)
        model.eval()
        set_anchor(model, self.vocab, [p for s in self.captioned for p in make_pairs(s, self.rng("anchor"), 512 // len(self.captioned))])
        save_atomically(model.state_dict(), self.folder / "preference.safetensors")
        found = {}
        for source in self.captioned:
            held_out = make_pairs(source, self.rng("held-out pairs"), 1024, noise=None, split="val")
            found[source.name] = report = pair_report(model, self.vocab, held_out)
            shares = ", ".join(f"{k} {v:.2f}" for k, v in report["accuracy"].items() if " " not in k)
            print(f"{source.name}, share of held-out pairs in order: {shares}; calibration error {report['calibration_error']:.3f}")
        write_json(self.folder / "preference_validity.json", found | {"drawings": self.check_reward("learned")})

    def ranked_samples(self, prompts=96, group=8, margin=1.0, most=20000):
        """Preference pairs of the base model's own drawings and captions, ranked by the CLIP score, prompts as in GRPO."""
        rewards, model, pairs = self.rewards("rule"), self.policy("base").eval(), []
        for task in ("draw", "caption"):
            for source in self.captioned:
                rng = self.rng("ranked", task, source.name)
                examples = [source.example(rng, task, source.prompt_pool(rng, task)) for _ in range(prompts)]
                outputs = evaluation.Evaluator(model, self.vocab, self.codebook, source, None).outputs(examples, group=group)
                sides = [(o, e.prompt) if task == "draw" else (e.picture, o) for e, o in
                         zip((e for e in examples for _ in range(group)), outputs)]  # fmt: skip
                parts = rewards(source, task, examples, outputs, rng)
                legible = parts.get("format", torch.ones(prompts, group)).flatten()  # what is no caption may have words nobody knows
                for better, worse in rank_pairs(parts["clip"], margin).tolist():
                    if legible[better] and legible[worse]:
                        pairs.append(Pair(task, "sampled", sides[better], sides[worse], True))
        return self.rng("ranked").sample(pairs, min(len(pairs), most))

    def check_reward(self, mix, name="base", prompts=48, group=8, least=5):
        """Reward validity: does this mix of rewards rank a model's own drawings as the judge does? Before RL, and after it,
        by what the policy has found meanwhile. Validation prompts; the answer is written down and shown, nothing is chosen
        by it. least: faulty drawings of one kind that there must be to speak of it."""
        if not self.captioned:
            return {}
        rewards, found = self.rewards(mix), {}
        model = self.policy(name)
        for source, judge in self.judges:
            asked = evaluation.Evaluator(model, self.vocab, self.codebook, source, judge, "val", self.config.seed)
            for pool, pools in list(judge.pools.items())[:2]:  # never on what no prompt may name
                examples = asked.examples("draw", prompts, pools)
                repeated = [e for e in examples for _ in range(group)]
                pictures = asked.outputs(examples, group=group)
                reward = rewards.total(rewards(source, "draw", examples, pictures, self.rng("validity")))
                failed = judge.failed(repeated, pictures)
                right = torch.tensor([not f for f in failed]).view(prompts, group)
                found[f"{source.name} {pool}"] = agreement(reward, right, ~right)
                for kind in sorted(set().union(*failed)):  # against candidates whose only fault is of this kind
                    only = torch.tensor([f == {kind} for f in failed]).view(prompts, group)
                    if int(only.sum()) >= least:
                        found[f"{source.name} {pool} {kind}"] = agreement(reward, right, only)
        found = {k: round(v, 3) for k, v in found.items() if v == v}
        shares = ", ".join(f"{k} {v:.2f}" for k, v in found.items())
        print(f"share of (right, wrong) drawings by {name} that the {mix} reward puts in order: {shares}")
        return found

    def grpo_stage(self, stage="grpo", control=None):
        """Every step: prompts of each task, G candidates for each, rewards, advantages, one loss over all tasks (T1). The way of a
        prompt: `optimise` asks `losses`; `sampled` -> grpo.rollout (model.sample, then `reward`) -> `advantages`; grpo.rollout_loss
        -> kernels.fused_linear_grpo_loss. control: another loss (logprobs, ref_logprobs, rewards, mask) -> loss of the same rollouts."""
        c = self.config
        policy, reference = self.policy("base"), self.policy("base").requires_grad_(False)
        rewards = self.rewards()
        objective = dict(clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef, reduction=c.reduction, level=c.level,
                         temperature=c.temperature)  # fmt: skip

        def controlled(hidden, head, tokens, old, ref, advantages, mask, *, lo, hi, rewards, **_):
            logprobs = selected_logprobs(hidden, head, tokens, c.temperature, lo, hi)
            return control(torch.where(mask, logprobs, 0.0), ref, rewards, mask), {}

        def sampled(step, task):
            """One rollout of a task, from one source."""
            rng = self.rng(stage, step, task)
            source = rng.choice([s for s in self.sources if task in s.tasks])
            asked, kept = grpo_prompts(c, task)
            examples = own_share([source.example(rng, task, source.prompt_pool(rng, task)) for _ in range(asked)])
            batch = self.vocab.batch(examples, self.codes(pictures_of(examples)), self.device)  # of what is to be drawn
            # only .target holds the picture, which nothing here reads

            def reward(filled, tokens):
                outputs = decode(self.vocab, self.codebook, task, filled, tokens)
                parts = rewards(source, task, examples, np.stack(outputs) if task in ("draw", "story") else outputs, rng)
                return rewards.total(parts), parts

            with self.autocast():
                r = rollout(policy, batch, c.group_size, reward, self.vocab, self.generator(rng), c.temperature, task, kept // WORLD)
            r.stats |= {"tokens": r.stats["tokens"] * WORLD} | ({"labels": asked} if task in (*QUESTIONS, "tell") else {})
            return r, self.advantages(r, rewards.weights)

        def losses(step):
            """One rollout of every task, then --epochs passes over them."""
            rng = self.rng(stage, step)
            rollouts = [sampled(step, task) for task in GRPO_TASKS if any(task in s.tasks for s in self.sources)]
            row = {}
            for epoch in range(c.epochs):
                parts = {}
                for r, advantages in rollouts:
                    loss_fn, given = (controlled, None) if control else (fused_linear_grpo_loss, advantages)  # None: it gets the rewards
                    with self.autocast():
                        loss, metrics = rollout_loss(policy, reference, r, loss_fn, advantages=given, **objective,
                                                     max_tokens=int((r.batch.tokens < 0).sum(1).max()))  # what the template has room for
                    n = r.mask.sum().float()  # a mean over tokens weighs a process by those it has
                    by_tokens = c.reduction == "token" and not control
                    parts[r.task] = GRPO_TASKS[r.task] * (n / over_processes(n) if by_tokens else 1) * loss
                    row |= {f"{k if k != 'kl' else 'k3'}_{r.task}": float(v) for k, v in metrics.items()}  # kl_TASK is exact, of look_back
                    for k, v in r.stats.items() if epoch == 0 else ():
                        row[k] = row.get(k, 0) + v  # tokens and seconds add up over the tasks
                if c.ptx_coef:
                    rows = self.pretraining_rows(rng, c.batch, rewards.believes if c.ptx_filter else None)
                    nll, tokens = self.next_token_loss(policy, self.packed(own_share(rows)))
                    parts["ptx"], row["nll"] = c.ptx_coef * nll, float(nll.detach())  # (T1)
                    row["ptx_tokens"] = row.get("ptx_tokens", 0) + tokens
                    row["labels"] = row.get("labels", 0) + clean_labels(rows)
                if epoch == 0 and stage == "dpo":
                    row["pairs"] = WORLD * sum(len(best_and_worst(r.rewards)[0]) for r, _ in rollouts)
                yield parts, row

        self.optimise(stage, policy, c.grpo_steps, c.grpo_lr, losses, self.watcher())
        save_atomically(policy.state_dict(), self.folder / "aligned.safetensors")

    def advantages(self, r, weights):
        """(N,) advantages of a rollout by --advantage and --scale; a reward that is not finite makes them so: the step is skipped."""
        rewards, parts = gathered(r.rewards), {k: gathered(v) for k, v in r.parts.items()}  # of all processes
        if not rewards.isfinite().all():
            found = torch.full_like(rewards, math.nan)
        elif self.config.advantage == "mean":
            found = group_advantages(rewards, self.config.scale)
        elif self.config.advantage == "pairwise":
            found = pairwise_advantages(rewards)
        else:
            found = combine_rewards(parts, {k: weights[k] for k in parts}, "normalize_then_sum")
        return own_share(found).flatten()

    # ------------------------------------------------------------ looking at it

    def watcher(self, every=20, prompts=32, group=4):
        """After the first step, and every so often: the judge's score and diversity on validation prompts (shown, never used), and
        sample pictures; or, where nothing is drawn, the share of right answers on validation questions."""
        source, judge = next((pair for pair in self.judges if pair[1].pools), self.judges[0])
        pools = [judge.pools[p] for p in ("compose", "compose_heldout") if p in judge.pools]

        def watch(step, model):
            """{column: value} for the log, {} between two looks."""
            if step % every and step + 1 < self.config.grpo_steps:
                return {}
            asked, row = evaluation.Evaluator(model, self.vocab, self.codebook, source, judge, "val", self.config.seed), {}
            if not pools:
                asks = [task for task in source.tasks if task in QUESTIONS]
                return {"val_right": float(asked.answers(asks[0], 256).mean())} if asks else {}
            for name, pool in zip(("val", "val_heldout"), pools):
                front = asked.front(pool, (1.0,), prompts, group)[0]
                row |= {f"{name}_{k}": v for k, v in front.items() if v is not None and k in ("compose", "diversity")}
            self.draw_samples(model, f"grpo_{step + 1:04d}")
            return row

        return watch

    def draw_samples(self, model, name, per_prompt=6, rewards=None):
        """samples/NAME.png: the same prompts from the same noise, whatever the model; with rewards, the best of several each."""
        (self.folder / "samples").mkdir(exist_ok=True)
        rows = []
        for source, judge in (pair for pair in self.judges if pair[1].pools):
            asked = evaluation.Evaluator(model, self.vocab, self.codebook, source, judge, "val", 1, rewards=rewards)
            examples = [e for pools in judge.pools.values() for e in asked.examples("draw", 3 if len(judge.pools) > 1 else 8, pools)]
            repeated = [e for e in examples for _ in range(per_prompt)]
            pictures = asked.outputs(examples, group=per_prompt)
            groups = zip(np.split(pictures, len(examples)), np.split(judge.draw(repeated, pictures)[0], len(examples)))
            rows += [(e.prompt, *group) for e, group in zip(examples, groups)]
        if rows:
            contact_sheet(rows).save(self.folder / "samples" / f"{name}.png")
        return rows

    def show(self, models, n=8):
        """samples/stories.png: stories drawn before and after alignment; samples/transcripts.txt: what either thinks and says
        to questions of three hops."""
        for source, judge in self.judges:
            asked = [evaluation.Evaluator(model, self.vocab, self.codebook, source, judge, "val", 1) for model in models.values()]
            if "story" in source.tasks:
                examples = asked[0].examples("story", n, ("paired", "three"))
                drawn = [e.outputs(examples) for e in asked]
                right = [judge.story(examples, pictures)[0] for pictures in drawn]
                rows = [(e.prompt, np.concatenate(p), np.concatenate(ok)) for e, p, ok in zip(examples, zip(*drawn), zip(*right))]
                contact_sheet(rows, ("before", "after")).save(self.folder / "samples" / "stories.png")
            if "steps" in source.tasks:
                examples = asked[0].examples("steps", 2 * n, ("three",))
                said = zip(*(e.outputs(examples, 0.0) for e in asked))
                texts = [f"{e.prompt}\n  worked out: {e.truth[2]} -> {e.answer.split()[-1]}\n" + "".join(
                    f"  {name}: {text}\n" for name, text in zip(models, some)) for e, some in zip(examples, said)]  # fmt: skip
                (self.folder / "samples" / "transcripts.txt").write_text("\n".join(texts), encoding="utf-8")

    def eval_stage(self):
        """Base and aligned on test scenes: eval.json, the table, curves and pictures."""
        c, start = self.config, time.perf_counter()
        if c.method == "lvrpo":
            write_json(self.folder / "reward_validity_aligned.json", self.check_reward(c.reward, "aligned", prompts=128))
        models = {name: self.policy(name).eval() for name in ("base", "aligned")}
        clip = evaluation.load_clip(self.folder, "clip_report", self.vocab, vars(c), self.device) if self.captioned else None
        results, items, known = {}, {}, self.base_results()
        chosen_by = {"base": None, "aligned": self.rewards() if c.method == "best" else None}
        for source, judge in self.judges:
            result = evaluation.evaluate(
                models, self.vocab, self.codebook, source, judge, clip, c.eval_items, c.seed, c.eval_prompts,
                rewards=chosen_by["aligned"], known=known.get(source.name))  # fmt: skip
            results[source.name], items[source.name] = result, result.pop("items")
            print(f"\n{source.name}\n{evaluation.table(result)}")
        warnings = [check["says"] for check in evaluation.health(self.folder) if check["mark"] != "green"]
        print("\n".join(f"health: {warning}" for warning in warnings))
        before, after = (self.draw_samples(model, name, rewards=chosen_by[name]) for name, model in models.items())
        both = [(prompt, np.concatenate((a[:4], b[:4])), [*x[:4], *y[:4]]) for (prompt, a, x), (_, b, y) in zip(before, after)]
        if both:
            contact_sheet(both, ("before", "after")).save(self.folder / "samples" / "before_after.png")
        self.show(models)
        frames = [Image.open(p).convert("P") for p in sorted((self.folder / "samples").glob("grpo_*.png"))]
        if frames:
            frames[0].save(self.folder / "samples.gif", save_all=True, append_images=frames[1:], duration=500, loop=0)
        curves(self.folder)
        first = next(iter(results.values()))
        seconds = stage_seconds(self.folder) | {"eval": round(time.perf_counter() - start, 1)}
        used = (ledger(Path(c.base)) if c.base else {}) | ledger(self.folder)
        rewarding = () if LAST[c.method] in MORE else ("clip",) if c.reward == "rule" else ("clip", "preference")
        used = {stage: used[stage] for stage in ("pretrain", *rewarding, "clip_report", LAST[c.method]) if stage in used}
        meta = describe(c) | {"seconds": seconds, "ledger": used, "device": self.reason, "health": warnings, **self.memory()}
        out = first | {"sources": results, "meta": meta} if len(results) > 1 else first | {"meta": meta}
        (self.folder / "items.json").write_text(json.dumps(items), encoding="utf-8")
        write_json(self.folder / "eval.json", out)
        with atomically(self.folder / "report.html") as new:  # the last file of a run
            new.write_text(evaluation.report(self.folder), encoding="utf-8")

    def base_results(self):
        """What the run of --base measured, by source, if it measured the same base on the same scenes; else {}."""
        c, files = self.config, [Path(self.config.base) / name for name in ("eval.json", "items.json", "base.safetensors")]
        if not c.base or not all(f.is_file() for f in files):
            return {}
        stored, items = (json.loads(f.read_text(encoding="utf-8")) for f in files[:2])
        same = all(stored["meta"]["config"][k] == getattr(c, k) for k in ("data", "seed", "eval_items", "eval_prompts"))
        same = same and files[2].read_bytes() == (self.folder / "base.safetensors").read_bytes()
        return {name: stored.get("sources", {name: stored})[name] | {"items": found} for name, found in items.items()} if same else {}

    def run(self):
        """Every stage whose result is not there yet, in order."""
        c = self.config
        clips = ("clip.safetensors", "clip_report.safetensors") if self.captioned else ()
        done = {"codebook": ("tokenizer.json", "words.json", "codebook.safetensors"), "pretrain": ("base.safetensors",),
                "clip": (*clips, "reward_validity.json"),
                "preference": ("preference.safetensors", "preference_validity.json"), "eval": ("eval.json", "report.html")}  # fmt: skip
        every = [s for s in STAGES[c.method] if s != "preference" or (c.reward != "rule" and LAST[c.method] not in MORE and self.captioned)]
        wanted = every if c.stage == "all" else [s for s in STAGES[c.method] if s in c.stage.split(",")]
        wanted = [s for s in wanted if s != "eval" or not RANK]
        for stage in wanted:
            there = all((self.folder / name).exists() for name in done.get(stage, ("aligned.safetensors",)))
            if there and not (c.stage != "all" and stage == "eval"):
                print(f"{stage}: already there")
            else:
                if stage != "codebook":
                    self.load_tokens()
                start = time.perf_counter()
                if stage in MORE:
                    self.go_on(stage, **MORE[stage])
                elif stage in SAMPLING:
                    self.grpo_stage(stage, SAMPLING[stage])
                else:
                    getattr(self, f"{stage}_stage")()
                print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)
            for state in self.folder.glob(f"*state_{stage}*"):  # clip has two, and a killed run may leave half a one
                state.unlink()


# ---------------------------------------------------------------- pictures and files of a run


def contact_sheet(rows, titles=(), zoom=2, words=330):
    """One line a prompt: the words, then its pictures, framed green where the judge found them right, else red. With
    titles, the pictures stand in as many blocks, a gap between them."""
    size, per_row = 32 * zoom + 6, max(len(p) for _, p, _ in rows)
    block, top = per_row // max(len(titles), 1), 20 if titles else 0
    sheet = Image.new("RGB", (words + size * per_row + 12 * len(titles), top + size * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        draw.text((words + i * (block * size + 12), 4), title, fill="black")
    for y, (prompt, pictures, right) in enumerate(rows):
        text = "\n".join(textwrap.fill(sentence, 51) for sentence in prompt.split(" . "))
        draw.multiline_text((8, top + y * size + (size // 2 - 6 if text.count("\n") < 2 else 4)), text, fill="black")
        for x, (picture, ok) in enumerate(zip(pictures, right)):
            left, upper = words + x * size + x // block * 12, top + y * size
            draw.rectangle((left, upper, left + size - 2, upper + size - 2), fill=(40, 160, 60) if ok else (210, 60, 50))
            sheet.paste(Image.fromarray(picture).resize((32 * zoom,) * 2, Image.Resampling.NEAREST), (left + 2, upper + 2))
    return sheet


def curves(folder):
    """curves.png from metrics.csv: one panel a question that a reader should ask of the run."""
    from matplotlib.figure import Figure

    rows = evaluation.read_log(folder / "metrics.csv")
    if not rows:
        return  # nothing was learned here
    panels = {  # title: (stages, columns by prefix)
        "next-token loss": (("pretrain", *MORE), ("loss",)),
        "rewards: own caption first, pairs in order": (("clip", "clip_report", "preference"), ("r1", "accuracy")),
        "reward (mean of a step)": (SAMPLING, ("reward_",)),
        "judge and diversity, validation prompts": (SAMPLING, ("val_",)),
        "groups without any spread": (SAMPLING, ("zero_spread_",)),
        "exact KL to the base, nats a token": (SAMPLING, ("kl_",)),
        "entropy, nats a token": (SAMPLING, ("entropy_",)),
        "gradient norm by task": (SAMPLING, ("grad_",)),
        "ratios outside the clip range": (SAMPLING, ("clip_low_", "clip_high_")),
    }
    figure = Figure(figsize=(15, 10), layout="constrained")
    for ax, (title, (stages, prefixes)) in zip(figure.subplots(3, 3).flat, panels.items()):
        stages = [stage for stage in stages if any(r["stage"] == stage for r in rows)]
        for stage in stages:
            there = [r for r in rows if r["stage"] == stage]
            for column in [k for k in there[0] if k.startswith(prefixes) and k != "grad_norm"]:
                points = [(int(r["step"]), float(r[column])) for r in there if r[column]]
                if points:
                    x, y = zip(*points)
                    width = max(1, len(y) // 40)
                    smooth = np.convolve(np.pad(y, (width // 2, (width - 1) // 2), "edge"), np.ones(width) / width, "valid")
                    ax.plot(x, smooth, label=f"{stage} {column}" if len(stages) > 1 else column, marker="o" if len(y) < 12 else None)
        ax.set_title(title)
        ax.set_xlabel("step")
        if ax.lines:
            ax.legend(fontsize=7)
        else:
            ax.text(0.5, 0.5, "not part of this run", ha="center", transform=ax.transAxes, color="grey")
    figure.savefig(folder / "curves.png", dpi=80)


def write_json(path, value):
    """Write a value as JSON; ValueError where that fails."""
    with atomically(path) as new:
        new.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def stage_seconds(folder):
    """Seconds that each stage spent in its steps."""
    return {stage: round(used["seconds"], 1) for stage, used in ledger(folder).items()}


def ledger(folder):
    """{stage: what it used}: steps, seconds, tokens sampled or trained on, clean labels, preference pairs, and operations: the matrix
    products of one counted step times the steps, two operations a multiplication, without attention (which has no counter on a CPU);
    0 on a GPU, where none is counted."""
    used = {}
    for name in ("metrics", "timing"):
        for r in evaluation.read_log(folder / f"{name}.csv"):
            stage = used.setdefault(r["stage"], dict.fromkeys(("steps", "seconds", "tokens", "labels", "pairs", "operations"), 0))
            stage["steps"] += name == "metrics"
            for k in ("seconds", "tokens", "ptx_tokens", "labels", "pairs"):
                stage[k.removeprefix("ptx_")] += float(r.get(k) or 0)
            stage["operations"] = float(r.get("operations") or 0) or stage["operations"]
    for stage in used.values():
        stage["operations"] *= stage["steps"]
    return used


def describe(config):
    """What a result needs beside it: configuration, command, commit, machine, versions."""
    try:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = f"{gpu or platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, np, tokenizers)}
    return {name: getattr(config, name) for name in ("preset", "method", "data", "seed")} | {
        "commit": commit, "machine": machine, "command": " ".join(("python", Path(sys.argv[0]).name, *sys.argv[1:])), "versions": versions,
        "noise": NOISE, "config": dataclasses.asdict(config)}  # fmt: skip


def take_over(config, folder):
    """Copy what --base already trained. What goes on with next-token training gets as many steps as fit the seconds that the
    rewards and alignment took there."""
    base = Path(config.base)
    kept = ("codebook.safetensors", "tokenizer.json", "words.json", "base.safetensors", "reward_validity.json")
    if any(CAPTIONED & set(tasks_of(SOURCES[name], config.tasks.split(","))) for name in config.data.split(",")):
        kept += ("clip.safetensors", "clip_report.safetensors")
    for name in kept:
        if not (base / name).is_file():
            raise ValueError(f"--base {base}: {name} is not there; train it first with `python train.py --out {base}`")
    theirs = evaluation.load_run(base)[0]
    if all(theirs.get(n) == getattr(config, n) for n in ("preference_steps", "pair_limit", "pairs")):
        kept += tuple(n for n in ("preference.safetensors", "preference_validity.json") if (base / n).is_file())
    try:
        for path in (base / name for name in kept if name.endswith("safetensors")):
            read_tensors(path)
    except ValueError as error:
        raise ValueError(f"--base {base}: {error}; train it again, with another --out") from error
    different = [f"{n} {theirs.get(n)} (here {getattr(config, n)})" for n in evaluation.INHERITED if theirs.get(n) != getattr(config, n)]
    if different:
        raise ValueError(f"--base {base} has another configuration: {', '.join(different)}")
    if LAST[config.method] in MORE and not (config.extra_steps or config.fitting_steps):
        spent = stage_seconds(base)
        if not {"pretrain", "grpo"} <= set(spent):
            raise ValueError(f"--base {base}: its timing.csv does not tell what pretrain and grpo took; give --extra-steps")
        seconds = sum(spent.get(s, 0) for s in ("clip", "preference", "grpo"))
        config.fitting_steps = seconds / spent["pretrain"] * theirs["pretrain_steps"]
    for name in ("pretrain_steps", "clip_steps", "clip_batch", "clip_edits", "clip_lr"):  # of stages that are taken over, not run
        setattr(config, name, theirs[name])
    folder.mkdir(parents=True, exist_ok=True)
    for name in kept:
        shutil.copy(base / name, folder / name)


def main(config):
    """Train as configured; returns the run directory. ValueError for what the user can mend, Stopped for an early end."""
    if WORLD > 1:
        join(config)
    folder = Path(config.out)
    saved = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; name a folder")
    held = [name for name in ("config.json", "eval.json", "metrics.csv") if (folder / name).exists()]
    if held and not config.resume:
        raise ValueError(f"{folder} already holds a run ({held[0]}): add --resume to go on with it, or choose another --out")
    if config.resume and not saved.exists():
        raise ValueError(f"{folder} holds no run to resume; leave --resume out, or name another --out")
    if not (config.resume or config.base or config.stage == "all" or "codebook" in config.stage.split(",")):
        raise ValueError(f"--stage {config.stage}: a new run begins with codebook; add --base RUN, or --resume to go on with a run")
    if LAST[config.method] in MORE and not (config.base or config.extra_steps or config.fitting_steps):
        raise ValueError(f"--method {config.method} needs --base RUN (it gets the seconds that lvrpo took there) or --extra-steps")
    trainer = None

    def stop(number, frame):
        if trainer and trainer.learning and not trainer.interrupted:
            trainer.interrupted = number  # the loop ends this step, saves and says how to go on
        else:
            way = f"go on with: python train.py --resume --out {folder}" if saved.exists() else "nothing had begun"
            raise Stopped(f"interrupted; {way}", 128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer = Trainer(config)
        print(trainer.reason)
        if not saved.exists():
            if config.base:
                take_over(config, folder)
            folder.mkdir(parents=True, exist_ok=True)
            trainer.save_config()
        trainer.run()
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror or error}; make room or get permission there and go on with: "
                         f"python train.py --resume --out {folder}; or choose another --out") from error  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return folder


if __name__ == "__main__":
    try:
        main(parse_flags())
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    except Exception as error:
        evaluation.give_up("train.py", error)
