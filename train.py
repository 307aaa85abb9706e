"""The whole method in one command: codebook, pre-training, reward, alignment with GRPO, evaluation.

  stage             learns                            from                         leaves
  fit_codebook      patches <-> codes, words <-> ids  pictures; texts              codebook, words
  pretrain          the base policy: next token       noisy pairs and answers      base
  train_clip        the reward's CLIP, and a second   noisy pairs; clean ones, of  clip, clip_report
                    that only reports                 another seed
  train_preference  a reward, for --reward learned    edited captions, pictures;   preference
                    and mix                           ranked samples of the base
  align             the aligned policy, by --method:                               aligned
     lvrpo                GRPO on rewards of its own samples, in both directions
     rejection, dpo       the same samples and rewards, without a policy gradient
     best_of_n            nothing: the reward picks the best of 8 at evaluation
     unified, clip, beit  the same seconds of next tokens; + a contrastive, + a masked-code loss
     sft                  the same seconds of next tokens, with clean answers to GRPO-like questions
  evaluate          nothing                           test scenes                  eval.json

  (T1) L = sum_task weight_task * L_grpo(task) + ptx_coef * L_nexttoken      (as in PPO-ptx)
  (T2) L_nexttoken = - sum_t w_t logprob_t / sum_t w_t,  w_t = TOKEN_WEIGHT of its task

`grpo_step` is the method. All randomness of a step comes from a Random keyed by seed, stage, step,
task and process. So weights, optimizer state and the step number are enough to resume a run, which
then equals an uninterrupted one.

    $ python train.py                      # CPU: the `cpu` preset, 8 minutes on one core
    $ python train.py --device cuda        # one GPU: `gpu`; several: torchrun --nproc_per_node=N
    $ python train.py --method unified --base runs/NAME      # the alternative, from the same base
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
from data import (COUNTS, NOISE, SOURCES, Layout, Vocabulary, at_once, make_sources, moved,
                  pictures_of)
from grpo import (combine_rewards, contrastive_loss, dpo_loss, group_advantages, grpo_loss,
                  look_back, masked_code_loss, pairwise_advantages, reduce_tokens, rejection_loss)
from kernels import fused_linear_grpo_loss, maybe_compile, selected_logprobs
from model import (Block, Codebook, ModelConfig, Transformer, allowed_head, atomically, completion,
                   load_tensors, outputs, pick_device, sample, sample_recorded, save_tensors)
from reward import (CLIP, MIXES, Pair, PreferenceModel, Rewards, agreement, captioned, clip_loss,
                    make_pairs, pair_accuracy, preference_loss, rank_pairs, set_anchor, text_ids)

# ------------------------------------------------ configuration: one field a flag

METHODS = ("lvrpo", "unified", "clip", "beit", "sft", "rejection", "dpo", "best_of_n")
TASKS = ("draw", "caption", "vqa", "multihop", "text", "story", "verify")

PRESETS = {  # what differs from the defaults of Config
    "cpu": {},
    "smoke": dict(
        width=32, layers=2, pretrain_steps=60, batch=32, clip_steps=25, clip_batch=32,
        clip_width=32, preference_steps=20, grpo_steps=4, prompts=4, group_size=4, epochs=2,
        ptx_batch=32, eval_items=64, eval_prompts=8, extra_steps=10,
    ),
    "gpu": dict(
        patch=4, jitter=1, width=384, layers=8, heads=6, pretrain_steps=2500, batch=512, lr=2e-3,
        clip_steps=800, clip_batch=512, clip_width=128, prompts=64, ptx_batch=1024,
        eval_items=2048, eval_prompts=96,
    ),
}  # fmt: skip


def option(group, default, text, choices=None):
    """A field of Config: the group, default, help and legal values of its flag."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass
class Config:
    preset: str = option("run", "auto", "auto: gpu on CUDA, else cpu", ("auto", *PRESETS))
    device: str = option("run", "auto", "where to compute", ("auto", "cuda", "mps", "cpu"))
    method: str = option("run", "lvrpo", "how the base is aligned", METHODS)
    tasks: str = option("run", "draw,caption,vqa,multihop,text", "all: also story and verify")
    out: str = option("run", "", "run directory; empty: runs/METHOD-PRESET-SEED")
    base: str = option("run", "", "take codebook, base policy and CLIPs from this run")
    resume: bool = option("run", False, "resume the run in --out")
    seed: int = option("run", 0, "seed of weights, scenes and samples")
    threads: int = option("run", 0, "CPU threads; 0: torch decides")
    compile: bool = option("run", True, "on a GPU: compiled layers, sampling as a CUDA graph")
    deterministic: bool = option("run", False, "on a GPU: repeatable results, but slower")
    data: str = option("data", "synthetic", "comma-separated: synthetic, fashion_mnist, shapes")
    data_dir: str = option("data", "data", "the parent of fashion_mnist/ and shapes/")
    download: bool = option("data", False, "fetch missing data from the official addresses")
    patch: int = option("data", 8, "side of a patch in pixels: 8 is 16 codes, 4 is 64", (4, 8, 16))
    jitter: int = option("data", 0, "largest shift of an object in pixels", (0, 1))
    width: int = option("policy", 96, "width of the residual stream")
    layers: int = option("policy", 4, "transformer blocks")
    heads: int = option("policy", 4, "attention heads")
    pretrain_steps: int = option("pre-training", 1000, "next-token steps of the base")
    batch: int = option("pre-training", 64, "rows per step")
    lr: float = option("pre-training", 4e-3, "peak; 30 steps of warm-up, decay in the last 40%")
    extra_steps: int = option("pre-training", 0, "steps of next-token methods; 0: as many as fit "
                              "the seconds of LVRPO")
    clip_steps: int = option("reward", 400, "steps of the reward's CLIP; the second gets 2/5")
    clip_batch: int = option("reward", 64, "pairs per step")
    clip_width: int = option("reward", 64, "width of the encoders")
    reward: str = option("reward", "rule", "CLIP score, learned preferences or both", tuple(MIXES))
    contrast: float = option("reward", 0.5, "weight of the base's likelihood contrast, in drawings")
    rarity: float = option("reward", 0.3, "a drawing found n times in its group loses this x log n")
    preference_steps: int = option("reward", 500, "steps of the preference model")
    grpo_steps: int = option("GRPO", 60, "steps; each samples, rewards and updates")
    prompts: int = option("GRPO", 16, "drawing prompts per step; other tasks: see GRPO_TASKS")
    group_size: int = option("GRPO", 8, "candidates per prompt")
    epochs: int = option("GRPO", 1, "passes over a rollout; clipping acts from the second on")
    grpo_lr: float = option("GRPO", 2e-3, "peak learning rate")
    kl_coef: float = option("GRPO", 0.02, "weight of the KL penalty to the frozen base")
    clip_low: float = option("GRPO", 0.2, "the ratio is clipped below 1 - this")
    clip_high: float = option("GRPO", 0.2, "... and above 1 + this")
    scale: str = option("GRPO", "batch", "std that divides advantages", ("group", "batch", "none"))
    advantage: str = option("GRPO", "mean", "reward - group mean, win rate, or part by part",
                            ("mean", "pairwise", "parts"))
    reduction: str = option("GRPO", "token", "average of losses", ("token", "sequence", "constant"))
    level: str = option("GRPO", "token", "one ratio per token or sequence", ("token", "sequence"))
    ptx_coef: float = option("GRPO", 2.0, "weight of the pre-training loss kept in the step")
    ptx_batch: int = option("GRPO", 256, "its rows per step")
    temperature: float = option("GRPO", 1.0, "temperature of rollouts")
    max_kl: float = option("GRPO", 2.0, "stop when the KL per token exceeds this for five steps")
    eval_items: int = option("evaluation", 512, "test items per metric")
    eval_prompts: int = option("evaluation", 48, "prompts per front, 8 pictures each")


TASK_MIX = {"draw": 4, "caption": 2, "vqa": 6, "multihop": 1, "text": 1, "story": 2, "verify": 4}
TOKEN_WEIGHT = {"draw": 1.5, "vqa": 4.0, "verify": 4.0, "story": 1.5}  # an answer is one word
# Share of drawings without a text (half with three objects) and of captions without a picture (all
# with three): they are cheap, and let a policy sample what no pair ever showed it.
ALONE = 0.35
# Share of a baseline's unpaired rows that come from the prompts of GRPO, see `prompts_shown`.
SHOWN = 0.5
# Task: weight of its loss; prompts sampled and prompts kept, as multiples of --prompts. Kept ones
# have the widest spread of rewards. A picture's reward covers many tokens, an answer's only two.
GRPO_TASKS = {
    "draw": (2.0, 1, 1), "caption": (0.5, 2, 1), "vqa": (1.0, 4, 2), "multihop": (1.0, 3, 1),
    "verify": (0.5, 2, 0.5), "story": (2.0, 0.5, 0.5),
}  # fmt: skip
ANSWERED = ("vqa", "multihop", "verify")  # tasks whose reward compares with a key
MAY_BE_ZERO = ("seed", "threads", "extra_steps", "kl_coef", "ptx_coef", "contrast", "rarity")


def parse_flags(argv=None):
    """Command line -> Config: a preset's values, overridden by every flag that was given."""
    parser = evaluation.Parser(description="Train, align and evaluate; everything goes to --out.")
    groups = {}
    for f in dataclasses.fields(Config):
        name = f.metadata["group"]
        groups[name] = groups.get(name) or parser.add_argument_group(name)
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} [{f.default}]"
        kind["help"] = text.replace("%", "%%")
        groups[name].add_argument(flag, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    return resumed(given) if given.get("resume") else make_config(**given)


def resumed(given):
    """The Config of a run to resume: flags on where and how it runs may change, others may not."""
    config = make_config(**given)
    path = Path(config.out) / "config.json"
    if not path.is_file():
        return config
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = {f.name: stored[f.name] for f in dataclasses.fields(Config)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); choose another --out") from error
    free = ("out", "resume", "device", "threads", "compile", "data_dir")
    for name in set(given) - set(free):
        if getattr(config, name) != stored[name]:
            flag = f"--{name.replace('_', '-')} {given[name]}"
            raise ValueError(f"{flag}: the run in {config.out} has {stored[name]}; omit it")
    return Config(**stored | {k: v for k, v in given.items() if k in free} | {"out": config.out})


def make_config(**given):
    """A checked Config from keyword arguments. ValueError names an illegal value and what works."""
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "gpu" if pick_device(given.get("device", "auto"))[0].type == "cuda" else "cpu"
    c = Config(**PRESETS.get(preset, {}) | given | {"preset": preset})
    c.tasks = ",".join(TASKS) if c.tasks == "all" else c.tasks
    c.out = c.out or f"runs/{c.method}-{c.preset}-{c.seed}"
    tasks, sources, checks = c.tasks.split(","), c.data.split(","), []
    for f in dataclasses.fields(c):
        value, choices = getattr(c, f.name), f.metadata["choices"]
        if choices:
            checks.append((value in choices, f.name, f"one of {', '.join(map(str, choices))}"))
        elif f.type in (int, float):
            least = 0 if f.name in MAY_BE_ZERO else 1e-12
            legal = "0 or more" if f.name in MAY_BE_ZERO else "more than 0"
            checks.append((least <= value < math.inf, f.name, legal))
    needed = {"sft": set(ANSWERED), "clip": {"draw", "caption"}, "beit": {"draw", "caption"}}
    needed = needed.get(c.method, set(GRPO_TASKS))
    checks += [
        (c.group_size > 1, "group_size", "at least 2"),
        (c.clip_low < 1, "clip_low", "less than 1"),
        (c.contrast <= 1, "contrast", "at most 1"),
        (c.width % (2 * c.heads) == 0, "width", f"a multiple of 2 x heads = {2 * c.heads}"),
        (c.clip_width % 8 == 0, "clip_width", "a multiple of 8"),
        (c.seed < 2**63, "seed", "less than 2**63"),
        (set(sources) <= set(SOURCES), "data", f"names from {', '.join(SOURCES)}"),
        (set(tasks) <= set(TASKS), "tasks", f"all, or names from {', '.join(TASKS)}"),
        ("story" not in tasks or "draw" in tasks, "tasks", "draw beside story"),
    ]
    known = {name: SOURCES[name].tasks for name in set(sources) & set(SOURCES)}
    learned = {task for names in known.values() for task in names} & set(tasks)
    legal = f"{' or '.join(sorted(needed))}, for --method {c.method}"
    checks.append((needed & learned, "tasks", legal))
    for name, names in known.items():
        legal = f"{' or '.join(t for t in names if t in GRPO_TASKS)}, for --data {name}"
        checks.append((set(names) & set(GRPO_TASKS) & learned, "tasks", legal))
    for ok, name, legal in checks:
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: expected {legal}")
    c.tasks = ",".join(task for task in tasks if task in learned)
    return c


# ------------------------------------------------ a run: what all stages share


class Stopped(BaseException):
    """Training ended early; the message says why. No handler of errors may swallow it."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status  # the exit status


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Run:
    """Configuration, device, data and folder of a run; codebook and words once they exist."""

    def __init__(self, config):
        self.config, self.folder = config, Path(config.out)
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA requires it
            torch.use_deterministic_algorithms(True)
        self.device, self.dtype, self.reason = pick_device(config.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where bfloat16 is not used
        self.sources = make_sources(config.data, config.data_dir, config.jitter, config.download)
        self.judges, self.graphs = {}, {}
        self.learning, self.interrupted = False, None  # is a stage training? which signal came?

    def load_tokens(self):
        _, self.codebook, self.vocab = evaluation.load_run(self.folder)
        self.codebook.entries = self.codebook.entries.to(self.device)

    def tasks(self, source):
        """The tasks of this run that a source knows."""
        return [task for task in self.config.tasks.split(",") if task in source.tasks]

    def sources_of(self, *tasks):
        """The sources that know one of these tasks."""
        return [source for source in self.sources if set(tasks) & set(self.tasks(source))]

    def rng(self, *place):
        """The Random of a place, such as a stage and a step: the same whatever ran before."""
        return random.Random("/".join(map(str, (self.config.seed, *place))))

    def generator(self, rng):
        return torch.Generator(self.device).manual_seed(rng.getrandbits(60))

    def autocast(self):
        """bfloat16 matrix products on a GPU that has them, else nothing."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def codes(self, examples):
        """The codes (M, P) of all pictures of the examples, on the device."""
        return self.codebook.encode(moved(torch.from_numpy(pictures_of(examples)), self.device))

    def rows(self, task, examples):
        """Examples of one task as tokens (N, L), on the device."""
        return self.vocab.rows(task, examples, self.codes(examples))

    def policy(self, name=None):
        """The transformer, fresh from the seed, or with the weights of a checkpoint of this run."""
        c = self.config
        torch.manual_seed(c.seed)
        shape = ModelConfig(self.vocab.size, self.codebook.side, c.width, c.layers, c.heads)
        model = Transformer(shape).to(self.device)
        if self.config.compile:
            model.layer = maybe_compile(Block.forward, self.device)
        if name:
            evaluation.load_weights(model, self.folder / f"{name}.safetensors")
        return model

    def rewards(self, mix):
        """The Rewards of a mix, with the networks of this run."""
        c, clip, preference = self.config, None, None
        if self.sources_of("draw", "caption", "story"):
            clip = evaluation.load_clip(self.folder, "clip", self.vocab, vars(c), self.device)
        if clip is not None and mix != "rule":
            preference = PreferenceModel(self.vocab.n_text, c.patch, width=c.clip_width)
            evaluation.load_weights(preference, self.folder / "preference.safetensors")
            preference = preference.to(self.device).eval()
        base = self.policy("base").eval().requires_grad_(False) if c.contrast else None
        drawings = base, self.codebook, c.contrast, c.rarity
        return Rewards(clip, self.vocab, preference, MIXES[mix], *drawings)

    def evaluator(self, model, source, split="val", seed=None, rewards=None):
        """An Evaluator of a model, on the scenes of a split."""
        if source.name not in self.judges:
            self.judges[source.name] = evaluation.judge_of(source)
        seed, judge = self.config.seed if seed is None else seed, self.judges[source.name]
        settings = split, seed, self.config.eval_items, rewards
        return evaluation.Evaluator(model, self.vocab, self.codebook, source, judge, *settings)


def write_json(path, value):
    with atomically(path) as new:
        new.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def read_log(path):
    """The rows of metrics.csv or timing.csv as dicts."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Log:
    """metrics.csv, one row per step, reproducible; or timing.csv, which is not. Opened at a step of
    a stage, it drops the stage's later rows, which will be written again."""

    def __init__(self, run, name, stage, step):
        self.path, self.stage = run.folder / f"{name}.csv", stage
        rows = read_log(self.path)
        self.rows = [row for row in rows if row["stage"] != stage or int(row["step"]) < step]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.write()

    def add(self, step, values):
        values = {name: f"{value:.6g}" for name, value in values.items()}
        self.rows.append({"stage": self.stage, "step": step} | values)

    def write(self):
        """All rows, under the columns of all stages."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomically(self.path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


# ------------------------------------------------ one loop for every stage that learns


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum: all directions of a matrix get an equal share of the step. Source:
    K. Jordan et al., Muon (2024). torch.optim.Muon uses bfloat16, which is slow on many CPUs."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)  # matrices of one shape form a batch, short side first
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])  # Nesterov's look-ahead
                wide = p.shape[0] <= p.shape[1]
                by_shape[tuple(sorted(p.shape))].append((p, update if wide else update.T))
            for shape, pairs in by_shape.items():
                x = torch.stack([update for _, update in pairs])
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):  # Newton-Schulz: every singular value goes to about 1
                    a = x @ x.mT
                    polynomial = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
                    x = torch.baddbmm(x, polynomial, x, beta=3.4445)
                x = x * (0.2 * math.sqrt(shape[1]))  # as large as a step of AdamW
                for (p, _), update in zip(pairs, x):
                    p.sub_(update if p.shape[0] <= p.shape[1] else update.T, alpha=group["lr"])


def make_optimizers(model, lr):
    """Muon for the matrices inside the blocks, AdamW for the rest: better after 750 steps than
    AdamW alone after 1,000 (results/first_edition.md)."""
    inside, rest = [], []
    for name, p in model.named_parameters():
        (inside if p.ndim == 2 and "blocks" in name else rest).append(p)
    return [Muon(inside, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step, steps, warmup=30, decay=0.4):
    """Share of the peak learning rate: linear warm-up (a tenth of a short run), flat, linear decay.

    >>> [round(schedule(step, 100), 2) for step in (0, 9, 50, 80, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.03]
    """
    return min(1.0, (step + 1) / min(warmup, max(steps / 10, 1)), (steps - step) / (decay * steps))


def save_state(model, optimizers, progress, path):
    """Write weights, optimizer state and progress, a list of integers, to one .safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors["progress"] = torch.tensor(progress)
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{p}.{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(tensors, path)


def load_state(model, optimizers, path):
    """The reverse of save_state; returns the progress."""
    tensors = load_tensors(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for i, optimizer in enumerate(optimizers):
        state = defaultdict(dict)
        for k, v in tensors.items():
            if k.startswith(f"optimizer.{i}."):
                p, name = k.split(".", 3)[2:]
                state[int(p)][name] = v
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})
    return tensors["progress"].tolist()


class Updater:
    """update(loss) takes one step of the optimizers and returns {"loss", "grad_norm", "skipped"}. A
    gradient that is not finite is skipped and counted; six of them end the stage."""

    def __init__(self, stage, model, lr):
        self.stage, self.model, self.lr, self.skipped = stage, model, lr, 0
        self.optimizers = make_optimizers(model, lr)

    def set_lr(self, share):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * share

    def __call__(self, loss):
        self.model.zero_grad()
        loss.backward()
        weights = [p for p in self.model.parameters() if p.grad is not None]
        if WORLD_SIZE > 1:  # processes have different data: average the gradients
            for p in weights:
                torch.distributed.all_reduce(p.grad)
                p.grad /= WORLD_SIZE
        norm = float(torch.nn.utils.clip_grad_norm_(weights, 1.0))
        self.skipped += not math.isfinite(norm)
        if self.skipped > 5:
            reason = f"{self.stage}: six gradients were not finite at learning rate {self.lr:g}"
            raise Stopped(f"{reason}; start again with a lower one and another --out")
        for optimizer in self.optimizers if math.isfinite(norm) else ():
            optimizer.step()
        return {"loss": loss.detach(), "grad_norm": norm, "skipped": self.skipped}


def as_floats(row):
    """{name: float} of numbers and tensors, with a single wait for the device."""
    remote = [name for name, v in row.items() if torch.is_tensor(v) and v.device.type != "cpu"]
    values = torch.stack([row[name].detach().float() for name in remote]).tolist() if remote else []
    return {name: float(v) for name, v in (row | dict(zip(remote, values))).items()}


SAVE_SECONDS = 60  # between two checkpoints of a stage: the most that a crash costs


def fit(run, stage, model, steps, lr, step_of, after=None):
    """Train `model`, and resume, log, check and save. step_of(step, update) takes a step and
    returns its row of the log; after(step) adds columns to it."""
    update, path = Updater(stage, model, lr), run.folder / f"state_{stage}.safetensors"
    first, far = 0, 0  # far: consecutive steps whose KL was out of range
    if path.exists():
        first, far, update.skipped = load_state(model, update.optimizers, path)
        print(f"{stage}: resumes at step {first}")
    pace = 1 if sys.stderr.isatty() else 15  # seconds between updates of the bar
    bar = tqdm(range(first, steps), stage, steps, initial=first, mininterval=pace,
               dynamic_ncols=True, disable=RANK > 0)
    run.learning, saved = True, time.monotonic()
    with Log(run, "metrics", stage, first) as metrics, Log(run, "timing", stage, first) as timing:
        for step in bar:
            start = time.perf_counter()
            update.set_lr(schedule(step, steps))
            row = as_floats(step_of(step, update))
            timing.add(step, {"seconds": time.perf_counter() - start})
            metrics.add(step, row | (after(step) if after else {}))
            visible = [k for k in ("loss", "reward_draw", "kl_draw", "r1") if k in row]
            bar.set_postfix({k: f"{row[k]:.3g}" for k in visible}, refresh=False)
            too_far = [k for k, v in row.items() if k[:3] == "kl_" and not v <= run.config.max_kl]
            far = far + 1 if too_far else 0
            if far == 5:
                reason = f"{stage}: {too_far[0]} passed {run.config.max_kl} five steps in a row"
                raise Stopped(f"{reason}; raise --kl-coef or lower --grpo-lr")
            if run.interrupted or time.monotonic() - saved > SAVE_SECONDS:
                metrics.write()  # before the state: rows that are ahead of it are made again
                timing.write()
                save_state(model, update.optimizers, [step + 1, far, update.skipped], path)
                saved = time.monotonic()
            if run.interrupted:
                reason = f"interrupted in {stage} at step {step + 1}; {go_on(run)}"
                raise Stopped(reason, 128 + run.interrupted)
    run.learning = False


def go_on(run):
    """The shell command that resumes a run."""
    words = ["python", sys.argv[0], "--resume", "--out", str(run.folder)]
    return f"go on with: {shlex.join(words)}"


# ------------------------------------------------ codebook and pre-training

MOST_CODES = 1024


def fit_codebook(run):
    """Fit the codebook and the vocabulary on all data sets."""
    c, rng, examples = run.config, run.rng("codebook"), []
    for source in run.sources:
        task = next(t for t in ("caption", "vqa", "verify") if t in source.tasks)
        examples += [source.example(rng, task, ("paired", "three")[i % 2]) for i in range(4000)]
    codebook = Codebook.fit(pictures_of(examples), MOST_CODES, c.patch, seed=c.seed)
    texts = (text for source in run.sources for text in source.texts(rng, 6000))
    vocab = Vocabulary.build(texts, len(codebook.entries), codebook.side**2)
    psnr = codebook.psnr(pictures_of(examples[:500]))
    print(f"codebook: {vocab.n_codes} entries, {psnr:.1f} dB; {vocab.n_text} words")
    with atomically(run.folder / "tokenizer.json") as new:
        vocab.tokenizer.save(str(new))
    save_tensors({"entries": codebook.entries}, run.folder / "codebook.safetensors")


def pretraining_examples(run, rng, n, method="pretrain", also=None):
    """n examples by TASK_MIX: {task: [(example, is its prompt dropped?)]}.

    also: `prompts_shown`, which replace a share SHOWN of the unpaired rows of their task. The
    control sft has clean answers to questions like GRPO's in all rows with questions."""
    by_task, also, mixes = {}, also or {}, {}
    for source in run.sources:
        mix = getattr(source, "mix", TASK_MIX)
        mixes[source.name] = [task for task in run.tasks(source) for _ in range(mix[task])]
    for _ in range(n):
        source = rng.choice(run.sources)
        task = rng.choice(mixes[source.name])
        alone = task in ("draw", "caption") and rng.random() < ALONE
        pool = "three" if alone and (task == "caption" or rng.random() < 0.5) else "paired"
        noise = NOISE
        if method == "sft" and task in ANSWERED:
            pool, noise = source.prompt_pool(rng, task), None
        example = source.example(rng, task, pool, noise)
        unpaired = alone or task not in ("draw", "caption")
        if also.get(task) and unpaired and rng.random() < SHOWN:
            example = rng.choice(also[task])
        by_task.setdefault(task, []).append((example, alone))
    return by_task


def prompts_shown(run):
    """GRPO's prompts in this configuration, except stories, as next-token data: {task: examples}.

    Texts to draw have no picture, pictures to describe have no text, and questions have their
    answers. Two-hop questions are answered at once, as vqa: bare answers in the place of thoughts
    were no better (results/choices.md)."""
    shown = defaultdict(list)
    for step, task in itertools.product(range(run.config.grpo_steps), GRPO_TASKS):
        if not run.sources_of(task):
            continue
        for e in grpo_prompts(run, run.rng("grpo", step, task, RANK), task)[1]:
            if task == "draw":
                for unpaired in ("text", "caption"):
                    shown[unpaired].append(e._replace(task=unpaired, prompt="", answer=e.prompt))
            elif task == "caption":
                shown["draw"].append(e._replace(task="draw", prompt="", answer=""))
            elif task in ANSWERED:
                question = at_once(e)
                shown[question.task].append(question)
    return shown


def next_token_loss(run, model, by_task):
    """(T2) of `pretraining_examples`, and the number of tokens. Tasks that choose from the same
    ids (words or codes) are scored together."""
    by_ids, total, weights, count = defaultdict(list), 0.0, 0.0, 0
    for task, pairs in by_task.items():
        layout = run.vocab.layout(task, run.device)
        alone = moved(torch.tensor([alone for _, alone in pairs]), run.device)
        tokens = layout.drop_prompt(run.rows(task, [example for example, _ in pairs]), alone)
        with run.autocast():
            states, targets, mask = completion(model, layout, tokens)
        weight = TOKEN_WEIGHT.get(task, 1.0) * mask
        by_ids[layout.draws].append([x.flatten(0, 1) for x in (states, targets, weight)])
        count = count + mask.sum()
    for draws, parts in by_ids.items():
        layout = run.vocab.layout("draw" if draws else "text", run.device)
        states, targets, weight = map(torch.cat, zip(*parts))
        logprobs = selected_logprobs(states[None], allowed_head(model, layout), targets[None])[0]
        total = total - (weight * torch.where(weight > 0, logprobs, 0.0)).sum()
        weights = weights + weight.sum()
    return total / weights, count  # (T2)


OBJECTIVES = {"clip": contrastive_loss, "beit": masked_code_loss}  # added to next tokens
OBJECTIVE_WEIGHT = 0.5
BASELINES = ("unified", "clip", "beit")  # these also learn from GRPO's prompts, see SHOWN
NEXT_TOKEN = (*BASELINES, "sft")  # methods that continue with the pre-training loss


def next_token_step(run, model, stage, method="pretrain"):
    """step_of for fit: (T2) of one batch, and a baseline's objective on its pictures with texts."""
    also = prompts_shown(run) if method in BASELINES else {}
    shown = {id(example) for examples in also.values() for example in examples}

    def step_of(step, update):
        """One batch of rows."""
        rng = run.rng(stage, step, RANK)
        by_task = pretraining_examples(run, rng, run.config.batch, method, also)
        loss, tokens = next_token_loss(run, model, by_task)
        pairs = by_task.get("draw", []) + by_task.get("caption", [])
        paired = [example for example, alone in pairs if not alone]
        if method in OBJECTIVES and paired:
            torch.manual_seed(rng.getrandbits(60))  # picks the codes to hide
            with run.autocast():
                objective = OBJECTIVES[method](model, run.vocab, paired, run.codes(paired))
            loss = loss + OBJECTIVE_WEIGHT * objective
        questions = [example for task in ANSWERED for example, _ in by_task.get(task, ())]
        labels = sum(method == "sft" or id(example) in shown for example in questions)
        return update(loss) | {"tokens": tokens, "labels": labels}

    return step_of


def pretrain(run):
    """Train the base policy on noisy pairs."""
    c, model = run.config, run.policy()
    fit(run, "pretrain", model, c.pretrain_steps, c.lr, next_token_step(run, model, "pretrain"))
    save_tensors(model.state_dict(), run.folder / "base.safetensors")


# ------------------------------------------------ the reward's networks

REWARD_LR, CLIP_EDITS, PAIRS = 3e-3, 4, 32  # peak; hard negatives per caption; preferences per step


def train_clip(run):
    """Train the reward's CLIP on noisy pairs, and one for reports on clean pairs of all pools."""
    sources, steps = run.sources_of("draw", "caption", "story"), run.config.clip_steps
    if sources:
        all_pools, fewer = ("paired", "prompted", "three", "heldout"), steps * 2 // 5
        fit_clip(run, "clip", sources, steps, NOISE, ("paired",))
        fit_clip(run, "clip_report", sources, fewer, None, all_pools)
    write_json(run.folder / "reward_validity.json", check_reward(run, "rule") if sources else {})


def fit_clip(run, stage, sources, steps, noise, pools):
    """Train a CLIP on pairs of these pools; its hard negatives might be of them, too."""
    c, path = run.config, run.folder / f"{stage}.safetensors"
    if path.exists():
        return  # an interrupted stage continues with the second one
    limits = "heldout" in pools, max(max(COUNTS[pool]) for pool in pools)
    torch.manual_seed(run.rng(stage).getrandbits(60))
    clip = CLIP(run.vocab.n_text, c.patch, width=c.clip_width).to(run.device)

    def step_of(step, update):
        """One batch of pairs, each caption with its false edits."""
        rng, pictures, texts, edits = run.rng(stage, step, RANK), [], [], []
        for _ in range(c.clip_batch):
            source = rng.choice(sources)
            stories = "story" in run.tasks(source)
            picture, text, _ = captioned(source, rng, rng.choice(pools), noise, stories=stories)
            false = source.negatives(rng, text, CLIP_EDITS, *limits)
            edits += false + [rng.choice(false) for _ in range(CLIP_EDITS - len(false))]
            pictures.append(picture)
            texts.append(text)
        ids, edited = (text_ids(run.vocab, batch, run.device) for batch in (texts, edits))
        with run.autocast():
            loss, r1 = clip_loss(clip, np.stack(pictures), ids, edited)
        return update(loss) | {"r1": r1}

    fit(run, stage, clip, steps, REWARD_LR, step_of)
    save_tensors(clip.state_dict(), path)


def check_reward(run, mix, name="base", prompts=48, group=8, least=5):
    """Reward validity: does a mix rank a model's own drawings as the judge does, before and after
    RL? On validation prompts; also per kind of fault that is the only one in `least` drawings."""
    model, rewards, shares = run.policy(name), run.rewards(mix), {}
    rewards.rarity = 0.0  # rarity says nothing about right and wrong
    for source in run.sources_of("draw"):
        e = run.evaluator(model, source)
        for pool in [p for p in ("compose", "compose_heldout") if p in e.judge.pools]:
            examples = e.examples("draw", prompts, e.judge.pools[pool])
            pictures = e.outputs(examples, group=group)
            reward, _ = rewards(source, "draw", examples, pictures, run.rng("validity"))
            failed = e.judge.failed([x for x in examples for _ in range(group)], pictures)
            right = torch.tensor([not kinds for kinds in failed]).view(prompts, group)
            shares[f"{source.name} {pool}"] = agreement(reward, right, ~right)
            for kind in sorted(set().union(*failed)):
                only = torch.tensor([kinds == {kind} for kinds in failed]).view(prompts, group)
                if int(only.sum()) >= least:
                    shares[f"{source.name} {pool} {kind}"] = agreement(reward, right, only)
    shares = {k: round(v, 3) for k, v in shares.items() if v == v}
    print(f"{mix} reward: share of (right, wrong) drawings of {name} ranked correctly: {shares}")
    return shares


def train_preference(run):
    """Train the preference model on edited pairs and on ranked samples of the base."""
    c, sources = run.config, run.sources_of("draw", "caption")
    torch.manual_seed(run.rng("preference").getrandbits(60))
    model = PreferenceModel(run.vocab.n_text, c.patch, width=c.clip_width).to(run.device)
    ranked = ranked_samples(run, sources)

    def step_of(step, update):
        """One batch of preference pairs, half edited, half sampled."""
        rng = run.rng("preference", step, RANK)
        own = rng.sample(ranked, min(PAIRS // 2, len(ranked)))
        pairs = own + make_pairs(rng.choice(sources), rng, PAIRS - len(own))
        with run.autocast():
            better, worse = model.pairs(run.vocab, pairs)
        accuracy = (better > worse).float().mean()
        return update(preference_loss(better, worse)) | {"accuracy": accuracy}

    fit(run, "preference", model, c.preference_steps, REWARD_LR, step_of)
    model.eval()
    set_anchor(model, run.vocab, make_pairs(sources[0], run.rng("anchor"), 512))
    save_tensors(model.state_dict(), run.folder / "preference.safetensors")
    validity = {"drawings": check_reward(run, "learned")}
    for source in sources:
        held_out = make_pairs(source, run.rng("held-out pairs"), 1024, noise=None, split="val")
        validity[source.name] = pair_accuracy(model, run.vocab, held_out)
        print(f"{source.name}, held-out pairs ranked correctly: {validity[source.name]}")
    write_json(run.folder / "preference_validity.json", validity)


def ranked_samples(run, sources, prompts=96, group=8, margin=1.0, most=20000):
    """Preference pairs of the base's own drawings and captions, ranked by the CLIP score."""
    rewards, model, pairs = run.rewards("rule"), run.policy("base").eval(), []
    for task, source in [(task, source) for task in ("draw", "caption") for source in sources]:
        rng = run.rng("ranked", task, source.name)
        pools = [source.prompt_pool(rng, task) for _ in range(prompts)]
        examples = [source.example(rng, task, pool) for pool in pools]
        samples = run.evaluator(model, source).outputs(examples, group=group)
        _, parts = rewards(source, task, examples, samples, rng)
        legible = parts.get("format", torch.ones(prompts, group)).flatten()
        for better, worse in rank_pairs(parts["clip"], margin).tolist():
            example, sides = examples[better // group], []
            for i in (better, worse):
                picture = samples[i][0] if task == "draw" else example.pictures[0]
                sides.append((picture, example.prompt if task == "draw" else samples[i]))
            if legible[better] and legible[worse]:
                pairs.append(Pair(task, "sampled", *sides, True))
    return run.rng("ranked").sample(pairs, min(len(pairs), most))


# ------------------------------------------------ alignment: the method


@dataclass
class Rollout:
    """Sampled and rewarded groups of one task: everything a pass over them needs."""

    task: str
    layout: Layout
    tokens: Tensor  # (N, L)
    rewards: Tensor  # (B, G)
    advantages: Tensor  # (N,)
    states: Tensor  # (N, T, C), of the policy that sampled
    targets: Tensor  # (N, T)
    mask: Tensor  # (N, T)
    old_logprobs: Tensor  # (N, T)
    ref_logprobs: Tensor  # (N, T)


def grpo_step(run, policy, reference, reward, step, update):
    """One step of the method: for every task, in both directions, sample groups of candidates,
    reward them, and make those that beat their own group likelier. Returns a row of the log."""
    c, rollouts, row = run.config, [], {"tokens": 0, "labels": 0}
    for task in [task for task in GRPO_TASKS if run.sources_of(task)]:
        rng, layout = run.rng("grpo", step, task, RANK), run.vocab.layout(task, run.device)
        source, examples = grpo_prompts(run, rng, task)  # B prompts
        prompts, chance = run.rows(task, examples), run.generator(rng)
        tokens = candidates(run, policy, layout, prompts, chance)  # (N, L)
        answers = outputs(layout, tokens, run.vocab, run.codebook)
        rewards, parts = reward(source, task, examples, answers, rng)  # (B, G)
        row |= reward_columns(task, rewards, parts)
        tokens, rewards, parts = most_informative(run, task, tokens, rewards, parts)
        advantages = advantages_of(c, rewards, parts, reward.weights_of(task))  # (N,)
        rewards, advantages = moved(rewards, run.device), moved(advantages, run.device)
        with run.autocast():
            states, targets, mask = completion(policy, layout, tokens, c.group_size)  # (N, T, ...)
            with torch.no_grad():
                ref_states, _, _ = completion(reference, layout, tokens, c.group_size)
        seen = policy, reference, layout, states, ref_states, targets
        old, ref, kl, entropy = look_back(*seen, c.temperature)  # (N, T)
        sampled = task, layout, tokens, rewards, advantages, states, targets, mask
        rollouts.append(Rollout(*sampled, old, ref))
        for name, value in (("kl", kl), ("entropy", entropy)):
            row[f"{name}_{task}"] = reduce_tokens(value, mask)
        row["tokens"] = row["tokens"] + mask.sum()
        row["labels"] += len(examples) * (task in ANSWERED)
    for epoch in range(c.epochs):
        losses = {}
        for r in rollouts:
            if epoch > 0:  # the policy has moved
                with run.autocast():
                    r.states, _, _ = completion(policy, r.layout, r.tokens, c.group_size)
            loss, metrics = policy_loss(c, policy, r)
            losses[r.task] = GRPO_TASKS[r.task][0] * loss
            row |= {f"{name}_{r.task}": value for name, value in metrics.items()}
        if c.ptx_coef:
            by_task = pretraining_examples(run, run.rng("grpo", step, "ptx", RANK), c.ptx_batch)
            nll, tokens = next_token_loss(run, policy, by_task)
            losses["ptx"], row["nll"] = c.ptx_coef * nll, nll.detach()
            row["tokens"] = row["tokens"] + tokens
        row |= update(sum(losses.values()))  # (T1)
    return row


def candidates(run, policy, layout, prompts, generator):
    """G samples of each of B prompts (B, L) -> (N, L)."""
    c = run.config
    how = layout, prompts, c.group_size, generator, c.temperature
    with run.autocast():
        if run.device.type == "cuda" and c.compile:
            return sample_recorded(run.graphs, policy, *how)
        return sample(policy, *how)


def grpo_prompts(run, rng, task):
    """(source, B examples) of a task: the prompts of one step."""
    source, n = rng.choice(run.sources_of(task)), run.config.prompts * GRPO_TASKS[task][1]
    pools = [source.prompt_pool(rng, task) for _ in range(max(round(n), 1))]
    return source, [source.example(rng, task, pool) for pool in pools]


def reward_columns(task, rewards, parts):
    """Columns of the log on the rewards (B, G) of all sampled candidates."""
    equal = rewards.amax(1) - rewards.amin(1) < 1e-6
    row = {f"reward_{task}": rewards.mean(), f"zero_spread_{task}": equal.float().mean()}
    return row | {f"{task}_{name}": value.mean() for name, value in parts.items()}


def most_informative(run, task, tokens, rewards, parts):
    """Keep the prompts with the widest spread of rewards, as many as GRPO_TASKS says: equal rewards
    are uninformative. (After DAPO, arXiv:2503.14476, which samples more prompts instead.)"""
    keep = max(round(run.config.prompts * GRPO_TASKS[task][2]), 1)
    spread = rewards.amax(1) - rewards.amin(1)
    best = spread.topk(min(keep, len(spread))).indices.sort().values
    groups = tokens.unflatten(0, rewards.shape)[moved(best, run.device)]
    return groups.flatten(0, 1), rewards[best], {name: v[best] for name, v in parts.items()}


def advantages_of(c, rewards, parts, weights):
    """(N,) advantages by --advantage, for mean also --scale. All NaN if any reward is not finite,
    so that the step is skipped."""
    if not rewards.isfinite().all():
        return torch.full_like(rewards, math.nan).flatten()
    if c.advantage == "mean":
        return group_advantages(rewards, c.scale).flatten()
    if c.advantage == "pairwise":
        return pairwise_advantages(rewards).flatten()
    return combine_rewards(parts, {k: weights[k] for k in parts}, "normalize_then_sum").flatten()


CONTROLS = {"rejection": rejection_loss, "dpo": dpo_loss}  # on the same samples and rewards


def policy_loss(c, policy, r):
    """The loss and metrics of a Rollout; `policy` must have computed r.states. On CUDA, log-probs
    and objective are one compiled pass; kernels.py checks that both ways agree."""
    head = allowed_head(policy, r.layout)
    before = r.old_logprobs, r.ref_logprobs, r.advantages, r.mask
    objective = dict(clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef, level=c.level,
                     reduction=c.reduction, max_tokens=len(r.layout.columns))
    if c.method == "lvrpo" and r.states.is_cuda:
        objective["temperature"] = c.temperature
        loss, metrics = fused_linear_grpo_loss(r.states, head, r.targets, *before, **objective)
    else:
        new = selected_logprobs(r.states, head, r.targets, c.temperature)
        if c.method in CONTROLS:
            return CONTROLS[c.method](new, r.ref_logprobs, r.rewards, r.mask), {}
        loss, metrics = grpo_loss(new, *before, **objective)
    metrics["k3"] = metrics.pop("kl")  # an estimate from samples; kl_TASK is exact
    return loss, metrics


def align(run):
    """Train the aligned policy by --method."""
    c, policy = run.config, run.policy("base")
    if c.method in ("lvrpo", *CONTROLS):
        reference, reward = run.policy("base").requires_grad_(False), run.rewards(c.reward)

        def step_of(step, update):
            return grpo_step(run, policy, reference, reward, step, update)

        fit(run, "align", policy, c.grpo_steps, c.grpo_lr, step_of, watcher(run, policy))
    elif c.method in NEXT_TOKEN:
        steps = c.extra_steps or fitting_steps(run)
        fit(run, "align", policy, steps, c.lr, next_token_step(run, policy, "align", c.method))
    save_tensors(policy.state_dict(), run.folder / "aligned.safetensors")


def slowness(run):
    """How many times slower a step of this method is than a plain one: medians, timed in turns."""
    method, policy, seconds = run.config.method, run.policy("base"), defaultdict(list)
    update = Updater("timing", policy, 0.0)
    steps_of = {m: next_token_step(run, policy, "timing", m) for m in ("unified", method)}
    for step, m in itertools.product(range(7), steps_of):
        start = time.perf_counter()
        steps_of[m](step, update)
        seconds[m].append(time.perf_counter() - start)
    return statistics.median(seconds[method]) / statistics.median(seconds["unified"])


def fitting_steps(run):
    """How many steps of a next-token method fit the seconds that rewards and alignment took in
    the base run, by that run's own seconds per step."""
    c, spent = run.config, stage_seconds(Path(run.config.base))
    budget = sum(spent.get(stage, 0.0) for stage in ("clip", "preference", "align"))
    steps = budget / spent["pretrain"] * c.pretrain_steps
    if c.method in OBJECTIVES:  # the others differ from pre-training only in data
        steps /= slowness(run)
    steps = torch.tensor(steps, device=run.device)
    if WORLD_SIZE > 1:  # clocks differ; the number of steps must not
        torch.distributed.broadcast(steps, 0)
    c.extra_steps = max(1, round(float(steps)))
    print(f"{c.method}: {c.extra_steps} further steps fit {budget:.0f} seconds")
    write_config(run)
    return c.extra_steps


def stage_seconds(folder):
    """Seconds that each stage of a run spent in its steps."""
    spent = defaultdict(float)
    for row in read_log(folder / "timing.csv"):
        spent[row["stage"]] += float(row["seconds"])
    return {stage: round(seconds, 1) for stage, seconds in spent.items()}


# ------------------------------------------------ looking at samples


def draw_samples(run, model, name, per_prompt=6, rewards=None):
    """Write samples/NAME.png, from the same prompts and noise for every model. Returns its rows,
    [(prompt, pictures, right)]. With rewards, each picture is the best of several."""
    rows = []
    for source in run.sources_of("draw"):
        e = run.evaluator(model, source, seed=1, rewards=rewards)
        for pool in e.judge.pools.values():
            examples = e.examples("draw", 3 if len(e.judge.pools) > 1 else 8, pool)
            pictures = e.outputs(examples, group=per_prompt)
            right = e.judge.draw([x for x in examples for _ in range(per_prompt)], pictures)
            for i, x in enumerate(examples):
                here = slice(i * per_prompt, (i + 1) * per_prompt)
                rows.append((x.prompt, pictures[here, 0], right[here]))
    if rows:
        (run.folder / "samples").mkdir(exist_ok=True)
        contact_sheet(rows).save(run.folder / "samples" / f"{name}.png")
    return rows


def contact_sheet(rows, zoom=2, words=330):
    """One row per prompt: its words, then its pictures, framed in green if right, else in red."""
    size = 32 * zoom + 6
    columns = max(len(pictures) for _, pictures, _ in rows)
    sheet = Image.new("RGB", (words + size * columns, size * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (prompt, pictures, right) in enumerate(rows):
        draw.multiline_text((8, y * size + size // 3), textwrap.fill(prompt, 51), fill="black")
        for x, (picture, ok) in enumerate(zip(pictures, right, strict=True)):
            left, top = words + x * size, y * size
            box = left, top, left + size - 2, top + size - 2
            draw.rectangle(box, (40, 160, 60) if ok else (210, 60, 50))
            image = Image.fromarray(picture).resize((32 * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(image, (left + 2, top + 2))
    return sheet


def watcher(run, model, every=20, prompts=32, group=4):
    """after(step) for fit: every so often, the judge's score and diversity on validation prompts
    (logged, never used) and sample pictures."""

    def watch(step):
        """{column: value}; {} between two looks."""
        row = {}
        if step % every and step + 1 < run.config.grpo_steps:
            return row
        for source in run.sources_of("draw")[:1]:
            e = run.evaluator(model, source)
            for pool in [p for p in ("compose", "compose_heldout") if p in e.judge.pools]:
                front = evaluation.front(e, e.judge.pools[pool], prompts, group, (1.0,))[0]
                row[f"val_{pool}"] = front["compose"]
                row[f"val_diversity_{pool}"] = front["diversity"] or 0.0
            draw_samples(run, model, f"align_{step + 1:04d}")
        return row

    return watch


def evaluate(run):
    """Evaluate base and aligned on test scenes: eval.json, items.json, tables, sample pictures."""
    c, start, results, items, clip = run.config, time.perf_counter(), {}, {}, None
    if c.method == "lvrpo" and run.sources_of("draw"):
        validity = check_reward(run, c.reward, "aligned", 128)
        write_json(run.folder / "reward_validity_aligned.json", validity)
    if run.sources_of("draw", "caption", "story"):
        clip = evaluation.load_clip(run.folder, "clip_report", run.vocab, vars(c), run.device)
    models = {name: run.policy(name).eval() for name in ("base", "aligned")}
    rewards = {"base": None, "aligned": run.rewards(c.reward) if c.method == "best_of_n" else None}
    if rewards["aligned"]:
        rewards["aligned"].rarity = 0.0  # we want the best one, not the rarest
    known = base_measured(c)
    for source in run.sources:
        measured = {"base": known[source.name]} if known else {}
        for name in [name for name in models if name not in measured]:
            test, val = (run.evaluator(models[name], source, split, rewards=rewards[name])
                         for split in ("test", "val"))
            test.clip = clip
            measured[name] = evaluation.evaluate(test, val, run.tasks(source), c.eval_prompts)
        items[source.name] = {name: m["items"] for name, m in measured.items()}
        results[source.name] = evaluation.merged(measured, test.judge.accuracy)
        print(f"\n{source.name}\n{evaluation.table(results[source.name])}")
    before, after = (draw_samples(run, m, name, 4, rewards[name]) for name, m in models.items())
    both = [(p, np.concatenate((a, b)), np.concatenate((x, y)))
            for (p, a, x), (_, b, y) in zip(before, after, strict=True)]
    if both:
        contact_sheet(both).save(run.folder / "samples" / "before_after.png")
    seconds = stage_seconds(run.folder) | {"evaluate": round(time.perf_counter() - start, 1)}
    meta = {k: getattr(c, k) for k in ("preset", "method", "data", "seed")} | describe(run)
    meta |= {"seconds": seconds, "noise": NOISE, "config": dataclasses.asdict(c)}
    if run.device.type == "cuda":
        meta["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    write_json(run.folder / "items.json", items)
    write_json(run.folder / "eval.json", evaluation.joined(results, meta))


MEASURED_ALIKE = ("seed", "data", "tasks", "eval_items", "eval_prompts")


def base_measured(c):
    """{source: result of `evaluation.evaluate` for the base}, reused from the run --base if this
    commit evaluated it on the same scenes; else {}."""
    base, commit, measured = Path(c.base), commit_of_code(), {}
    if not c.base or not all((base / name).is_file() for name in ("eval.json", "items.json")):
        return {}
    result = evaluation.read_result(base)
    same = all(result["meta"]["config"].get(k) == getattr(c, k) for k in MEASURED_ALIKE)
    if not same or not commit or "+" in commit or result["meta"]["commit"] != commit:
        return {}
    items = json.loads((base / "items.json").read_text(encoding="utf-8"))
    for name, part in evaluation.by_source(result).items():
        sweep, best = part["sweep"].get("base", []), part["best_temperature"].get("base")
        numbers = {"numbers": part["base"], "items": items[name]["base"]}
        measured[name] = numbers | {"sweep": sweep, "temperature": best}
    return measured


# ------------------------------------------------ the command


def commit_of_code():
    """The commit of these files, plus "+changes" if they differ from it; "" if git has none."""
    here = Path(__file__).resolve().parent

    def git(*words):
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=here)
        return done.stdout.strip()

    with contextlib.suppress(OSError):  # no git on this machine
        if git("rev-parse", "--show-toplevel") == str(here):  # not a copy in another repository
            changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
            return git("rev-parse", "--short", "HEAD") + changes
    return ""


def describe(run):
    """What is recorded with a result: command, commit, device, machine, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = gpu or platform.processor() or platform.machine()
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit_of_code(),
        "device": run.reason,
        "threads": torch.get_num_threads(),
        "machine": f"{machine}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def write_config(run):
    settings = dataclasses.asdict(run.config) | {"environment": describe(run)}
    write_json(run.folder / "config.json", settings)


INHERITED = ("data", "tasks", "patch", "jitter", "width", "layers", "heads", "clip_width")


def check_base(c):
    """The config of the run --base; ValueError if its policy cannot be aligned as configured."""
    base = Path(c.base)
    theirs = evaluation.load_run(base)[0]
    for name in INHERITED:
        if theirs[name] != getattr(c, name):
            raise ValueError(f"--base {base} has {name} {theirs[name]}, not {getattr(c, name)}")
    if not (base / "base.safetensors").is_file():
        raise ValueError(f"--base {base} has no base.safetensors: it is not finished")
    timed = "align" in stage_seconds(base)
    if c.method in NEXT_TOKEN and not (timed or c.extra_steps):
        raise ValueError(f"--base {base} has no timing of an alignment; give --extra-steps")
    return theirs


def take_over(c, theirs):
    """Copy what the run --base has trained into --out; `theirs` is its config."""
    base, folder = Path(c.base), Path(c.out)
    names = ["tokenizer.json", "reward_validity.json"]
    names += [f"{name}.safetensors" for name in ("codebook", "base", "clip", "clip_report")]
    if theirs["preference_steps"] == c.preference_steps:
        names += ["preference.safetensors", "preference_validity.json"]
    for name in names:
        if (base / name).is_file():
            with atomically(folder / name) as new:
                shutil.copyfile(base / name, new)
    c.pretrain_steps, c.clip_steps = theirs["pretrain_steps"], theirs["clip_steps"]


STAGES = {  # stage: the last file that it writes
    fit_codebook: "codebook.safetensors", pretrain: "base.safetensors",
    train_clip: "reward_validity.json", train_preference: "preference_validity.json",
    align: "aligned.safetensors", evaluate: "eval.json",
}  # fmt: skip


def run_stages(run):
    """Run every stage whose result does not exist yet, in order."""
    c = run.config
    for stage, file in STAGES.items():
        needless = stage is train_preference and (c.reward == "rule" or c.method in NEXT_TOKEN)
        if needless or (stage is evaluate and RANK) or (run.folder / file).exists():
            continue
        if stage is not fit_codebook:
            run.load_tokens()
        start = time.perf_counter()
        stage(run)
        print(f"{stage.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
        for state in run.folder.glob("*state_*.safetensors"):  # one may be half written
            state.unlink()


@contextlib.contextmanager
def locked(folder):
    """Allow one process at a time in a run directory; the lock ends when the process does."""
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock
            pass
        except OSError:
            raise ValueError(f"{folder}: another process is training there") from None
        yield


@contextlib.contextmanager
def stopped_by_signals(run):
    """Ctrl-C and SIGTERM finish the step, save and say how to resume; other work ends at once."""

    def stop(number, frame):
        if run.learning and not run.interrupted:
            run.interrupted = number
        else:
            raise Stopped(f"interrupted; {go_on(run)}", 128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it gets signals
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def join(config):
    """Join the other processes; all but the first work on a copy of the run: only one writes."""
    gpus = pick_device(config.device)[0].type == "cuda"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if gpus else "gloo")
    if RANK:
        scratch = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        if Path(config.out).is_dir():
            shutil.copytree(config.out, scratch, dirs_exist_ok=True)
        config.out, sys.stdout = scratch, open(os.devnull, "w", encoding="utf-8")
    torch.distributed.barrier()


def main(config):
    """Train as configured; returns the run directory. ValueError for what the user can fix,
    Stopped for an early end."""
    if WORLD_SIZE > 1:
        join(config)
    folder, c = Path(config.out), config
    saved = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; name a folder")
    if not c.resume and any((folder / name).exists() for name in ("config.json", "eval.json")):
        raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
    if c.resume and not saved.exists():
        raise ValueError(f"{folder} holds no run to resume; leave --resume out")
    if c.method in NEXT_TOKEN and not (c.base or c.extra_steps):
        raise ValueError(f"--method {c.method} needs --base RUN, or --extra-steps")
    new = not saved.exists()
    theirs = check_base(c) if c.base and new else None
    run = Run(c)
    print(run.reason)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), stopped_by_signals(run):
        if theirs:
            take_over(c, theirs)
        if new:
            write_config(run)
        run_stages(run)
    return folder


def command():
    """The command line; a run that was stopped early has its own exit status."""
    try:
        main(parse_flags())
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)


if __name__ == "__main__":
    evaluation.run_command("train.py", command)
