"""Flags, the step of the method, its guards, every stage and method; a smoke run from all sides."""

import csv
import dataclasses
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from data import HELDOUT_PAIRS, NUMBERS, PAD, PROMPT_PAIRS, pairs_of
from grpo import combine_rewards, group_advantages, pairwise_advantages
from model import completion, outputs
from train import Config, Stopped, make_config, parse_flags, schedule

TINY = dict(preset="smoke", device="cpu")
SHORT = dict(eval_items=4, eval_prompts=2, grpo_steps=2, extra_steps=2, preference_steps=3)


def read_csv(folder, name="metrics"):
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def run_like(smoke, folder, **changes):
    """A Run in a folder with all that the smoke run had when its alignment began."""
    run = train.Run(make_config(**TINY | changes, base=str(smoke), out=str(folder)))
    folder.mkdir()
    train.take_over(run.config)
    train.write_config(run)
    run.load_tokens()
    return run


@pytest.fixture
def run(smoke, tmp_path):
    return run_like(smoke, tmp_path / "run", epochs=1, prompts=2, batch=8, max_kl=50.0)


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    """finished(method) -> the folder of a short run of it, from the base of the smoke run."""
    top, done = tmp_path_factory.mktemp("methods"), {}

    def finish(method):
        flags = TINY | SHORT | dict(method=method, base=str(smoke), out=str(top / method))
        done[method] = done.get(method) or train.main(make_config(**flags))
        return done[method]

    return finish


# ------------------------------------------------ flags


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_every_field_is_a_flag_of_its_type(field):
    flag, default = "--" + field.name.replace("_", "-"), field.default
    values = {"device": "cpu", "tasks": "draw,story", "data": "shapes", "width": 192}
    value = values.get(field.name) or (field.metadata["choices"] or [None])[-1] or {
        str: "elsewhere", int: 1 - bool(default) or 2 * default, bool: True}.get(field.type, 0.01)
    given = getattr(parse_flags([flag] if value is True else [flag, str(value)]), field.name)
    assert given == value != default and type(given) is field.type
    assert value is not True or getattr(parse_flags(["--no-" + flag[2:]]), field.name) is False


def test_help_explains_every_flag_with_its_default_in_its_group(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_flags(["--help"])
    parts = [part.split(":\n") for part in capsys.readouterr().out.split("\n\n")]
    groups = {part[0]: " ".join(part[1].split()) for part in parts if len(part) > 1}
    order = ["options", "run", "data", "policy", "pre-training", "reward", "GRPO", "evaluation"]
    assert list(groups) == order
    for field in dataclasses.fields(Config):
        group, explained = groups[field.metadata["group"]], field.metadata["help"]
        assert f"--{field.name.replace('_', '-')}" in group and len(explained) > 9
        assert f"{explained} [{field.default}]" in group


@pytest.mark.parametrize("preset", train.PRESETS)
def test_flags_override_presets_and_presets_defaults_and_what_is_derived_follows(preset):
    plain = parse_flags(["--preset", preset, "--device", "cpu"])
    given = parse_flags(["--width", "192", "--device", "cpu", "--preset", preset, "--seed", "3"])
    assert all(getattr(plain, name) == value for name, value in train.PRESETS[preset].items())
    changed = dict(width=192, seed=3, out=f"runs/lvrpo-{preset}-3")
    assert given == dataclasses.replace(plain, **changed) != plain
    assert given == make_config(preset=preset, device="cpu", width=192, seed=3)


# ------------------------------------------------ the step


class Toy:
    """A reward that anyone can check: how bright is a picture, how often does a text say red?"""

    weights = {"toy": 1.0}

    def __init__(self, change=lambda rewards: rewards):
        self.change, self.examples = change, {}

    def of(self, answers):
        drawn = isinstance(answers, np.ndarray)
        values = answers.mean((1, 2, 3, 4)) if drawn else [t.split().count("red") for t in answers]
        return self.change(torch.tensor(values).float())

    def __call__(self, source, task, examples, answers, rng):
        self.examples[task] = examples
        rewards = self.of(answers).view(len(examples), -1)
        return rewards, {"toy": rewards}


EQUAL, BROKEN = Toy(torch.ones_like), Toy(lambda r: r.index_fill(0, torch.tensor([1]), math.nan))


class Recorder:
    """update(loss) that keeps the loss and its gradient, and moves nothing."""

    def __init__(self, model):
        self.model = model

    def __call__(self, loss):
        weights, self.loss = list(self.model.parameters()), loss.detach()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        self.gradient = torch.cat([g.flatten() for g in gradients])
        return {"loss": self.loss}


@pytest.fixture
def rollouts(monkeypatch):
    """Every Rollout whose loss is computed, in order."""
    seen, plain = [], train.policy_loss
    monkeypatch.setattr(train, "policy_loss", lambda *args: seen.append(args[2]) or plain(*args))
    return seen


@pytest.fixture
def moved(run):
    """The base policy, a little elsewhere."""
    policy = run.policy("base")
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return policy


def step(run, policy, reward):
    """(row, Recorder) of one step that moves nothing."""
    update = Recorder(policy)
    return train.grpo_step(run, policy, run.policy("base"), reward, 0, update), update


def learn(run, policy, rewards, after=None):
    """A step with each of these rewards; the rows of the log."""
    reference = run.policy("base")
    train.fit(run, "align", policy, len(rewards), 5e-3, lambda step, update: train.grpo_step(
        run, policy, reference, rewards[step], step, update), after)  # fmt: skip
    return read_csv(run.folder)


def test_steps_raise_what_is_rewarded_in_both_directions(run):
    run.config = dataclasses.replace(run.config, tasks="draw,vqa", prompts=4, group_size=8)
    rows = learn(run, run.policy("base"), 12 * [Toy()])
    for task, more in (("draw", 5), ("vqa", 0.2)):
        rewards = [float(row[f"reward_{task}"]) for row in rows]
        assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + more, rewards


def test_the_first_pass_scores_tokens_as_they_were_sampled(run, moved, rollouts):
    run.config.temperature = 0.7
    row, _ = step(run, moved, Toy())
    assert [r.task for r in rollouts] == ["draw", "caption", "vqa", "multihop"]
    for r in rollouts:
        first, last, start = r.layout.first, r.layout.last, r.layout.start
        scores = moved(r.tokens[:, :-1], r.layout.patch[:-1]) @ moved.head[first:last].T / 0.7
        chosen = (r.tokens[:, 1:] - first).clamp(0, last - first - 1)[..., None]
        logprobs = scores.log_softmax(-1).gather(-1, chosen)[:, start - 1 :, 0]
        logprobs = logprobs[:, : r.mask.shape[1]]
        assert torch.allclose(logprobs[r.mask], r.old_logprobs[r.mask], atol=1e-4)
        assert float(row[f"ratio_{r.task}"]) == pytest.approx(1, abs=1e-5)
        assert row[f"clip_low_{r.task}"] == row[f"clip_high_{r.task}"] == 0


def test_every_reward_belongs_to_its_row_and_every_row_to_its_prompt(run, moved, rollouts):
    reward = Toy()
    step(run, moved, reward)
    for r in rollouts:
        answers = outputs(r.layout, r.tokens, run.vocab, run.codebook)
        assert torch.equal(reward.of(answers), r.rewards.flatten())
        assert torch.equal(r.advantages, group_advantages(r.rewards, "batch").flatten())
        prompts = r.tokens.unflatten(0, r.rewards.shape)[..., : r.layout.start]
        asked = run.rows(r.task, reward.examples[r.task])[:, : r.layout.start]
        assert torch.equal(prompts, prompts[:, :1].expand_as(prompts))
        assert all((asked == prompt).all(1).any() for prompt in prompts[:, 0])
        assert r.task != "draw" or torch.equal(prompts[:, 0], asked) and r.rewards.std() > 0


def test_equal_rewards_leave_only_the_pull_to_the_base_and_to_pretraining(run, moved):
    def gradient(policy, reward, kl_coef, ptx_coef):
        run.config = dataclasses.replace(run.config, kl_coef=kl_coef, ptx_coef=ptx_coef)
        return step(run, policy, reward)[1].gradient

    assert gradient(moved, Toy(), 0.0, 0.0).norm() > 0.01
    assert gradient(moved, EQUAL, 0.0, 0.0).norm() == 0
    assert gradient(moved, EQUAL, 1.0, 0.0).norm() > 0.01
    assert gradient(run.policy("base"), EQUAL, 1.0, 0.0).norm() < 1e-4
    by_task = train.pretraining_examples(run, run.rng("grpo", 0, "ptx", 0), run.config.batch)
    alone = Recorder(moved)
    alone(0.5 * train.next_token_loss(run, moved, by_task)[0])
    assert torch.allclose(gradient(moved, EQUAL, 0.0, 0.5), alone.gradient, atol=1e-6)


def test_the_groups_that_are_kept_are_whole_and_have_the_widest_spread(run):
    run.config.prompts = 4  # of captions half as many are kept
    rewards = torch.tensor([0.0, 3.0, 1.0, 5.0, 2.0, 4.0])[:, None] * torch.linspace(0, 1, 4)
    tokens, parts = torch.arange(24)[:, None].expand(-1, 7), {"clip": rewards + 10}
    tokens, kept, parts = train.most_informative(run, "caption", tokens, rewards, parts)
    assert tokens[:, 6].tolist() == [12, 13, 14, 15, 20, 21, 22, 23]
    assert torch.equal(kept, rewards[[3, 5]]) and torch.equal(parts["clip"], kept + 10)


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_advantages_are_those_that_the_flags_name(scale):
    parts = dict(zip(("exact", "format"), torch.rand(2, 3, 4, generator=torch.Generator())))
    total, weights = parts["exact"] + 0.2 * parts["format"], {"exact": 1.0, "format": 0.2}
    expected = {"mean": group_advantages(total, scale), "pairwise": pairwise_advantages(total)}
    expected["parts"] = combine_rewards(parts, weights, "normalize_then_sum")
    for advantage, values in expected.items():
        c = make_config(**TINY, advantage=advantage, scale=scale)
        got = train.advantages_of(c, total, parts, weights | {"clip": 1.0})
        assert torch.equal(got, values.flatten())
        assert train.advantages_of(c, total / 0, parts, weights).isnan().all()


@pytest.mark.parametrize("level, reduction", [("token", "token"), ("sequence", "constant")])
def test_the_one_pass_of_a_gpu_is_the_two_calls_of_a_cpu(run, moved, rollouts, level, reduction):
    class OnGPU(torch.Tensor):  # computed as any other, but taken for a tensor on a GPU
        is_cuda, __torch_function__ = True, torch._C._disabled_torch_function_impl

    step(run, moved, Toy())
    how = dict(level=level, reduction=reduction, clip_high=0.3, kl_coef=0.5, temperature=0.8)
    c, results = dataclasses.replace(run.config, **how), []
    for r, kind in itertools.product(rollouts[:], (torch.Tensor, OnGPU)):
        r.states = completion(moved, r.layout, r.tokens, 4)[0].as_subclass(kind)
        r.old_logprobs = r.ref_logprobs + 0.3 * r.ref_logprobs.sin()  # some ratios are clipped
        update, (loss, metrics) = Recorder(moved), train.policy_loss(c, moved, r)
        update(loss)
        results.append(torch.stack([loss, *metrics.values(), *update.gradient]))
    for two_calls, one_pass in zip(results[::2], results[1::2], strict=True):
        assert torch.allclose(two_calls, one_pass, atol=1e-5, rtol=1e-4) and two_calls.norm() > 0.1


# ------------------------------------------------ guards


def test_a_reward_that_is_no_number_skips_its_step_and_six_of_them_end_the_run(run):
    policy, heads = run.policy("base"), [run.policy("base").head]
    with pytest.raises(Stopped, match="six gradients were not finite.* lower") as stopped:
        learn(run, policy, [BROKEN, Toy(), *9 * [BROKEN]],
              after=lambda step: heads.append(policy.head.detach().clone()) or {})  # fmt: skip
    rows = read_csv(run.folder)
    assert [row["skipped"] for row in rows] == list("112345") and stopped.value.status == 1
    assert all(math.isfinite(float(row["grad_norm"])) == (row["step"] == "1") for row in rows)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(heads)] == [True, False, *4 * [True]]
    assert policy.head.isfinite().all()


def test_a_kl_out_of_range_for_five_steps_on_end_stops_the_run(run):
    kl = [3.0, 3.0, 3.0, 3.0, 0.1, 3.0, math.nan, *[3.0] * 20]
    model, run.config.max_kl = run.policy(), 2.0
    with pytest.raises(Stopped, match=r"kl_vqa passed 2.0 .*five steps.*; raise --kl-coef"):
        train.fit(run, "align", model, 25, 1e-4, lambda step, update: (
            update(model.head.square().sum() * 1e-3) | {"kl_draw": 0.1, "kl_vqa": kl[step]}))
    assert read_csv(run.folder)[-1]["step"] == "9"


# ------------------------------------------------ what is learned from


def by_hand(run, model, task, example, alone):
    """Log-probs of the tokens of an example that its policy chooses, one after the other."""
    layout, row = run.vocab.layout(task), run.rows(task, [example])[0]
    given = row.clone()
    for span in layout.spans:
        if alone and span.kind in ("prompt", "picture") and not span.chosen:
            given[span.start : span.end] = PAD
    scores = (model(given[None], layout.patch) @ model.head.T)[0, :, layout.first : layout.last]
    columns = [c for c in layout.columns if row[c] != PAD]
    return [scores[c - 1].log_softmax(-1)[row[c] - layout.first].item() for c in columns]


def test_the_next_token_loss_is_the_weighted_mean_of_what_is_chosen(run, moved):
    run.config.tasks, weights, logprobs = ",".join(train.TASKS), [], []
    by_task = train.pretraining_examples(run, run.rng("any"), 64)
    for task, pairs in by_task.items():
        for example, alone in pairs:
            logprobs += by_hand(run, moved, task, example, alone)
            weights += [train.TOKEN_WEIGHT.get(task, 1.0)] * (len(logprobs) - len(weights))
    loss, tokens = train.next_token_loss(run, moved, by_task)
    assert loss.item() == pytest.approx(-np.average(logprobs, weights=weights), rel=1e-5)
    assert set(by_task) == set(train.TASKS) and tokens == len(logprobs)
    assert sum(alone for pairs in by_task.values() for _, alone in pairs) > 3


@pytest.mark.parametrize("clean", [False, True])
def test_three_objects_come_without_words_but_in_the_clean_answers_of_the_control(run, clean):
    batches = [train.pretraining_examples(run, run.rng("any", k), 64, clean) for k in range(40)]
    pairs = [pair for by_task in batches for pairs in by_task.values() for pair in pairs]
    dropped, most, wrong = Counter(), Counter(), 0
    for e, alone in [(e, alone) for e, alone in pairs if e.task != "text"]:
        scene = e.truth[0] if e.task in ("draw", "caption") else e.truth
        dropped[e.task, len(scene)] += alone
        if not alone:
            most[e.task] = max(most[e.task], len(scene))
            if e.task in ("draw", "caption"):
                assert not pairs_of(o.kind for o in scene) & (HELDOUT_PAIRS | PROMPT_PAIRS)
        wrong += e.prompt == "how many shapes are there ?" and e.answer != NUMBERS[len(scene)]
    assert most == {"draw": 2, "caption": 2, "vqa": 2 + clean, "multihop": 2 + clean}
    alone = {("draw", 1), ("draw", 2), ("draw", 3), ("caption", 3)}
    assert {k for k, n in dropped.items() if n} == alone and (wrong == 0) == clean


@pytest.mark.parametrize("method", train.OBJECTIVES)
def test_a_baseline_adds_its_objective_on_pictures_that_come_with_texts(run, monkeypatch, method):
    run.config.batch, model, seen, losses = 32, run.policy("base"), [], []
    plain = train.OBJECTIVES[method]
    monkeypatch.setitem(train.OBJECTIVES, method, lambda *args: (
        seen.append((args[2], plain(*args))) or seen[-1][1]))  # fmt: skip
    for name in ("unified", method):
        losses.append(train.next_token_step(run, model, "any", name)(0, Recorder(model))["loss"])
    by_task, ((examples, value),) = train.pretraining_examples(run, run.rng("any", 0, 0), 32), seen
    pairs = [e for t in ("draw", "caption") for e, alone in by_task.get(t, ()) if not alone]
    assert [e.truth for e in examples] == [e.truth for e in pairs] and value > 0.1
    assert losses[1] - losses[0] == pytest.approx(train.OBJECTIVE_WEIGHT * value.item(), abs=1e-5)


def test_a_next_token_method_gets_the_steps_that_fit_the_seconds_of_its_base(run, monkeypatch):
    lines = [f"pretrain,{i},0.1" for i in range(60)] + ["clip,0,2", "clip_report,0,9", "align,0,4"]
    (run.folder / "timing.csv").write_text("\n".join(["stage,step,seconds", *lines, ""]))
    ticks = itertools.count()  # a clock that goes on by a second whenever it is read
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setitem(train.OBJECTIVES, "clip", lambda model, *rest: (  # of two more seconds
        next(ticks) + next(ticks) + model.head.sum() * 0))  # fmt: skip
    run.config.base, run.config.batch = str(run.folder), 32
    for method, steps in (("unified", 60), ("sft", 60), ("clip", 20)):
        run.config = dataclasses.replace(run.config, method=method)
        assert train.fitting_steps(run) == steps


# ------------------------------------------------ the learning rate, the optimizer


@pytest.mark.parametrize("steps", [1, 4, 100, 700])
def test_the_learning_rate_rises_stays_falls_and_is_never_zero(steps):
    shares = [schedule(number, steps) for number in range(steps)]
    peak = max(shares)
    rise, fall = shares[: shares.index(peak)], shares[steps - shares[::-1].index(peak) :]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True) and min(shares) > 0
    assert steps < 100 or (peak, len(rise), shares[-1] < 0.03) == (1, min(30, steps // 10) - 1, True)


def test_muon_goes_equally_far_in_all_directions_and_as_far_as_the_one_in_torch():
    shapes, gradients = ((6, 4), (4, 8), (4, 4)), [torch.randn(9, 9) for _ in range(3)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    for p, q, g in zip(ours, theirs, gradients):
        p.grad, q.grad = (g[: p.shape[0], : p.shape[1]].clone() for _ in range(2))
    train.Muon(ours, 0.1).step()
    torch.optim.Muon(theirs, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=0.004)  # bfloat16 has two digits
        singular = torch.linalg.svdvals(p.detach()) / (0.02 * math.sqrt(max(p.shape)))
        assert 0.6 < singular.min() and singular.max() < 1.3


# ------------------------------------------------ a smoke run, and a short one of every method


def test_a_run_leaves_its_files_its_configuration_and_a_row_a_step(smoke):
    there = {p.relative_to(smoke).as_posix() for p in smoke.rglob("*") if p.is_file()}
    pictures = ("base", "aligned", "before_after", "align_0001", "align_0004")
    assert there == {f"samples/{name}.png" for name in pictures} | {
        "config.json", "tokenizer.json", "codebook.safetensors", "base.safetensors", "lock",
        "clip.safetensors", "clip_report.safetensors", "reward_validity.json", "metrics.csv",
        "timing.csv", "aligned.safetensors", "reward_validity_aligned.json", "eval.json",
        "items.json"}  # fmt: skip
    stages, rows = {"pretrain": 60, "clip": 25, "clip_report": 10, "align": 4}, read_csv(smoke)
    steps = [(stage, str(k)) for stage, n in stages.items() for k in range(n)]
    assert [(row["stage"], row["step"]) for row in rows] == steps
    assert [(row["stage"], row["step"]) for row in read_csv(smoke, "timing")] == steps
    losses = [float(row["loss"]) for row in rows]
    assert all(math.isfinite(x) for x in losses) and np.mean(losses[50:60]) < 0.5 * losses[0]
    assert all(row["skipped"] == "0" and float(row["grad_norm"]) > 0 for row in rows)
    first = {k: float(v) for k, v in rows[-4].items() if k.startswith("kl_")}
    assert len(first) == 4 and max(map(abs, first.values())) < 1e-6  # it starts at the base
    stored = read_json(smoke / "config.json")
    assert stored.pop("environment")["command"].startswith("python train.py --preset smoke")
    assert Config(**stored) == make_config(**TINY, out=str(smoke))


def test_an_aligned_checkpoint_holds_the_transformer_and_nothing_else(smoke):
    width, vocab = 32, evaluation.load_run(smoke)[2]
    expected = {"embed": vocab.size, "row": 4, "column": 4}
    for i in range(2):
        block = {"norm1": 1, "norm2": 1, "qkv": 3 * width, "out": width, "up": 4 * width}
        expected |= {f"blocks.{i}.{k}": v for k, v in (block | {"down": 4 * width}).items()}
    for name in ("base", "aligned"):
        tensors = load_file(smoke / f"{name}.safetensors")
        sizes = {k.rpartition(".")[0]: t.numel() // width for k, t in tensors.items()}
        assert sizes == expected | {"norm": 1} and len(tensors) == len(sizes)


GROUPS = {
    "understanding": "vqa vqa_three retrieval_i2t_r1 retrieval_t2i_r1 caption caption_three",
    "generation": "compose compose_heldout compose_pairs compose_unprompted clip_score frechet "
                  "frechet_floor frechet_three story story_frames story_consistent story_three "
                  "diversity diversity_heldout",
    "reasoning": "visual visual_three multihop multihop_three", "language": "text_nll",
}  # fmt: skip
META = "preset method data seed command commit device threads machine versions seconds noise config"


def test_eval_json_has_the_structure_that_others_rely_on(smoke):
    result = read_json(smoke / "eval.json")
    assert set(result) == {"base", "aligned", "sweep", "best_temperature", "judge_accuracy", "meta"}
    assert set(result["meta"]) == set(META.split()) and result["meta"]["seconds"]["align"] > 0
    for name in ("base", "aligned"):
        assert {k: " ".join(v) for k, v in result[name].items()} == GROUPS
        cells = {k: cell for group in result[name].values() for k, cell in group.items()}
        absent = "story story_frames story_consistent story_three visual visual_three".split()
        assert all(cells[k] is None for k in absent)
        for k in set(cells) - {*absent, "diversity", "diversity_heldout"}:
            assert set(cells[k]) == {"value", "low", "high", "n"} and cells[k]["value"] is not None
        assert (cells["compose"]["n"], cells["vqa"]["n"], cells["text_nll"]["n"]) == (128, 64, 64)
        rows, both = result["sweep"][name], ("compose", "diversity", "differ")
        assert [row.pop("temperature") for row in rows] == [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
        assert all(set(row) == {*both, *(f"{k}_heldout" for k in both)} for row in rows)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m == "lvrpo"))
                                    for m in train.METHODS])  # fmt: skip
def test_every_method_runs_to_its_end_from_the_base_of_another_run(smoke, finished, method):
    folder, rows = finished(method), read_csv(finished(method))
    assert [row["stage"] for row in rows] == ["align"] * (0 if method == "best_of_n" else 2)
    labelled = method in ("lvrpo", "sft", "rejection", "dpo")  # clean answers are counted
    assert all((float(row["labels"]) > 0) == labelled and float(row["tokens"]) > 0 for row in rows)
    assert (folder / "base.safetensors").read_bytes() == (smoke / "base.safetensors").read_bytes()
    base, aligned = (load_file(folder / f"{name}.safetensors") for name in ("base", "aligned"))
    same = [torch.equal(base[k], aligned[k]) for k in base]
    assert base.keys() == aligned.keys() and same == [method == "best_of_n"] * len(base)
    ours, theirs = (read_json(finished(m) / "eval.json") for m in (method, "unified"))
    assert ours["base"] == theirs["base"] and ours["sweep"]["base"] == theirs["sweep"]["base"]


@pytest.mark.slow
def test_one_model_learns_all_tasks_of_all_data_sets_from_mixed_rewards(clothes, grids, tmp_path):
    few = dict(pretrain_steps=6, clip_steps=5, prompts=2, tasks="all", reward="mix")
    data = dict(data="synthetic,fashion_mnist,shapes", data_dir=str(tmp_path))
    folder = train.main(make_config(**TINY | SHORT | few | data, out=str(tmp_path / "run")))
    for name, n in (("synthetic", 28), ("fashion_mnist", 14), ("shapes", 2)):
        result = read_json(folder / "eval.json")["sources"][name]["aligned"]
        assert sum(c is not None for g in result.values() for c in g.values()) <= n
    assert all(read_csv(folder)[-1][f"reward_{task}"] for task in train.GRPO_TASKS)
