"""Flags, the step of the method, its guards, every stage and method; a smoke run from all sides."""

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import chosen_logprobs
from safetensors.torch import load_file

import train
from data import HELDOUT_PAIRS, NUMBERS, PROMPT_PAIRS, pairs_of
from grpo import combine_rewards, group_advantages, pairwise_advantages
from model import completion, outputs
from train import Config, Stopped, make_config, parse_flags

TINY = dict(preset="smoke", device="cpu")
SHORT = dict(eval_items=4, eval_prompts=2, grpo_steps=2, extra_steps=2, preference_steps=3)


def rows_of(folder, name="metrics"):
    return train.read_log(folder / f"{name}.csv")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def run_like(smoke, folder, **changes):
    """A Run in a folder with all that the smoke run had when its alignment began."""
    run = train.Run(make_config(**TINY | changes, base=str(smoke), out=str(folder)))
    folder.mkdir()
    train.take_over(run.config, train.check_base(run.config))
    train.write_config(run)
    run.load_tokens()
    return run


@pytest.fixture
def run(smoke, tmp_path):
    return run_like(smoke, tmp_path / "run", epochs=1, prompts=2, batch=8, max_kl=50.0)


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    """finished(method) -> the folder of a short run of it, from the base of the smoke run."""
    flags = TINY | SHORT | {"base": str(smoke)}
    return functools.cache(lambda method: train.main(make_config(
        **flags, method=method, out=str(tmp_path_factory.mktemp(method)))))  # fmt: skip


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_flags(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert f"{field.metadata['help']} [{field.default}]" in shown


@pytest.mark.parametrize("preset", train.PRESETS)
def test_flags_override_presets_and_presets_defaults_and_what_is_derived_follows(preset):
    plain = parse_flags(["--preset", preset, "--device", "cpu"])
    flags = "--width 192 --device cpu --kl-coef 0.5 --seed 3 --no-compile --reward mix --preset"
    given = parse_flags([*flags.split(), preset])
    assert all(getattr(plain, name) == value for name, value in train.PRESETS[preset].items())
    changed = dict(width=192, kl_coef=0.5, seed=3, compile=False, reward="mix")
    derived = dict(out=f"runs/lvrpo-{preset}-3")
    assert given == dataclasses.replace(plain, **changed, **derived) != plain
    assert given == make_config(preset=preset, device="cpu", **changed)


class Toy:
    """A reward that anyone can check: how bright is a picture, how often does a text say red?"""

    def weights_of(self, task):
        return {"toy": 1.0}

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


def unmoved(model):
    """update(loss) that returns the loss and its gradient, and moves nothing."""

    def update(loss):
        how = dict(allow_unused=True, materialize_grads=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()), **how)
        return {"loss": loss.detach(), "gradient": torch.cat([g.flatten() for g in gradients])}

    return update


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
    """The row of a step that moves nothing."""
    return train.grpo_step(run, policy, run.policy("base"), reward, 0, unmoved(policy))


def learn(run, policy, rewards, after=None):
    """A step with each of these rewards; the rows of the log."""
    reference = run.policy("base")
    train.fit(run, "align", policy, len(rewards), 5e-3, lambda step, update: train.grpo_step(
        run, policy, reference, rewards[step], step, update), after)  # fmt: skip
    return rows_of(run.folder)


def test_steps_raise_what_is_rewarded_in_both_directions(run):
    run.config = dataclasses.replace(run.config, tasks="draw,vqa", prompts=4, group_size=8)
    rows = learn(run, run.policy("base"), 12 * [Toy()])
    for task, more in (("draw", 5), ("vqa", 0.2)):
        rewards = [float(row[f"reward_{task}"]) for row in rows]
        assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + more, rewards


def test_scores_rewards_and_prompts_belong_to_the_rows_that_were_sampled(run, moved, rollouts):
    run.config.temperature, reward = 0.7, Toy()
    row = step(run, moved, reward)
    assert [r.task for r in rollouts] == ["draw", "caption", "vqa", "multihop"]
    for r in rollouts:
        for tokens, old, mask in zip(r.tokens, r.old_logprobs, r.mask, strict=True):
            by_hand = chosen_logprobs(moved, r.layout, tokens, 0.7)
            assert by_hand == pytest.approx(old[mask].tolist(), abs=1e-4)
        assert float(row[f"ratio_{r.task}"]) == pytest.approx(1, abs=1e-5)
        assert row[f"clip_low_{r.task}"] == row[f"clip_high_{r.task}"] == 0
        answers = outputs(r.layout, r.tokens, run.vocab, run.codebook)
        assert torch.equal(reward.of(answers), r.rewards.flatten())
        assert torch.equal(r.advantages, group_advantages(r.rewards, "batch").flatten())
        prompts = r.tokens.unflatten(0, r.rewards.shape)[..., : r.layout.start]
        asked = run.rows(r.task, reward.examples[r.task])[:, : r.layout.start]
        assert torch.equal(prompts, prompts[:, :1].expand_as(prompts))
        assert all((asked == prompt).all(1).any() for prompt in prompts[:, 0])
        assert r.task != "draw" or torch.equal(prompts[:, 0], asked) and r.rewards.std() > 0


@pytest.mark.parametrize("task", ["draw", "caption", "vqa", "multihop"])
def test_no_prompt_of_grpo_has_a_heldout_pair(run, task):
    for step in range(30):
        _, examples = train.grpo_prompts(run, run.rng("grpo", step, task, 0), task)
        scenes = [e.truth[0] if task in ("draw", "caption") else e.truth for e in examples]
        assert not any(pairs_of(o.kind for o in scene) & HELDOUT_PAIRS for scene in scenes)


def test_equal_rewards_leave_only_the_pull_to_the_base_and_to_pretraining(run, moved):
    def gradient(policy, reward, kl_coef, ptx_coef):
        run.config = dataclasses.replace(run.config, kl_coef=kl_coef, ptx_coef=ptx_coef)
        return step(run, policy, reward)["gradient"]

    assert gradient(moved, Toy(), 0.0, 0.0).norm() > 0.01
    assert gradient(moved, EQUAL, 0.0, 0.0).norm() == 0
    assert gradient(moved, EQUAL, 1.0, 0.0).norm() > 0.01
    assert gradient(run.policy("base"), EQUAL, 1.0, 0.0).norm() < 1e-4
    by_task = train.pretraining_examples(run, run.rng("grpo", 0, "ptx", 0), run.config.ptx_batch)
    alone = unmoved(moved)(0.5 * train.next_token_loss(run, moved, by_task)[0])["gradient"]
    assert torch.allclose(gradient(moved, EQUAL, 0.0, 0.5), alone, atol=1e-6)


def test_the_groups_that_are_kept_are_whole_and_have_the_widest_spread(run):
    run.config.prompts = 4  # of statements half as many are kept
    rewards = torch.tensor([0.0, 3.0, 1.0, 5.0, 2.0, 4.0])[:, None] * torch.linspace(0, 1, 4)
    tokens, parts = torch.arange(24)[:, None].expand(-1, 7), {"clip": rewards + 10}
    tokens, kept, parts = train.most_informative(run, "verify", tokens, rewards, parts)
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
        loss, metrics = train.policy_loss(c, moved, r)
        results.append(torch.stack([loss, *metrics.values(), *unmoved(moved)(loss)["gradient"]]))
    for two_calls, one_pass in zip(results[::2], results[1::2], strict=True):
        assert torch.allclose(two_calls, one_pass, atol=1e-5, rtol=1e-4) and two_calls.norm() > 0.1


def test_a_reward_that_is_no_number_skips_its_step_and_six_of_them_end_the_run(run):
    policy, heads = run.policy("base"), [run.policy("base").head]
    for run.interrupted in (signal.SIGTERM, None):  # what was skipped counts after a pause, too
        with pytest.raises(Stopped) as stopped:
            learn(run, policy, [BROKEN, Toy(), *9 * [BROKEN]],
                  after=lambda step: heads.append(policy.head.detach().clone()) or {})  # fmt: skip
    assert re.search("six gradients were not finite.* lower", str(stopped.value))
    rows = rows_of(run.folder)
    assert [row["skipped"] for row in rows] == list("112345") and stopped.value.status == 1
    assert all((row["grad_norm"] == "nan") == (row["step"] != "1") for row in rows)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(heads)] == [True, False, *4 * [True]]


def test_a_kl_out_of_range_for_five_steps_on_end_stops_the_run(run):
    kl = [3.0, 3.0, 3.0, 3.0, 0.1, 3.0, math.nan, *[3.0] * 20]
    model, run.config.max_kl = run.policy(), 2.0
    with pytest.raises(Stopped, match=r"kl_vqa passed 2.0 .*five steps.*; raise --kl-coef"):
        train.fit(run, "align", model, 25, 1e-4, lambda step, update: (
            update(model.head.square().sum() * 1e-3) | {"kl_draw": 0.1, "kl_vqa": kl[step]}))
    assert rows_of(run.folder)[-1]["step"] == "9"


def test_the_next_token_loss_is_the_weighted_mean_of_what_is_chosen(run, moved):
    run.config.tasks, weights, logprobs = ",".join(train.TASKS), [], []
    by_task = train.pretraining_examples(run, run.rng("any"), 64)
    for task, pairs in by_task.items():
        layout = run.vocab.layout(task)
        for example, alone in pairs:
            given = layout.drop_prompt(run.rows(task, [example]), torch.tensor([alone]))[0]
            logprobs += chosen_logprobs(moved, layout, given)
            weights += [train.TOKEN_WEIGHT.get(task, 1.0)] * (len(logprobs) - len(weights))
    loss, tokens = train.next_token_loss(run, moved, by_task)
    assert loss.item() == pytest.approx(-np.average(logprobs, weights=weights), rel=1e-5)
    assert set(by_task) == set(train.TASKS) and tokens == len(logprobs)
    assert sum(alone for pairs in by_task.values() for _, alone in pairs) > 3


@pytest.mark.parametrize("clean", [False, True])
def test_three_objects_come_without_words_but_in_the_clean_answers_of_the_control(run, clean):
    method = "sft" if clean else "pretrain"
    batches = [train.pretraining_examples(run, run.rng("any", k), 64, method) for k in range(40)]
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


def test_a_baseline_learns_from_the_very_prompts_that_grpo_sees_and_from_no_steps(run, monkeypatch):
    run.config.grpo_steps, seen, plain = 3, [], train.grpo_prompts
    policy, reference = run.policy("base"), run.policy("base")
    monkeypatch.setattr(train, "grpo_prompts", lambda *args: seen.append(plain(*args)) or seen[-1])
    for step in range(3):
        train.grpo_step(run, policy, reference, run.rewards("rule"), step, unmoved(policy))
    sampled = [e for _, examples in seen for e in examples]
    shown = train.prompts_shown(run)
    of = {task: [e for e in sampled if e.task == task] for task in train.GRPO_TASKS}
    texts = [e.prompt for e in of["draw"]]
    assert [e.answer for e in shown["text"]] == [e.answer for e in shown["caption"]] == texts
    asked = [e for e in sampled if e.task in ("vqa", "multihop")]
    for task, source in {"draw": of["caption"], "vqa": asked}.items():
        pairs = zip(shown[task], source, strict=True)
        assert all((a.pictures == b.pictures).all() for a, b in pairs)
    assert [e.answer for e in shown["vqa"]] == [e.answer.split()[-1] for e in asked]
    assert [e.prompt for e in shown["vqa"]] == [e.prompt for e in asked] and of["multihop"]
    assert set(shown) == {"text", "caption", "draw", "vqa"}
    mixed = train.pretraining_examples(run, run.rng("any"), 400, "unified", shown)
    known = {id(e) for some in shown.values() for e in some}
    for task, pairs in mixed.items():  # half of what is no pair
        unpaired = [id(e) in known for e, alone in pairs if alone or task in ("text", "vqa")]
        paired = [id(e) in known for e, alone in pairs if not alone and task in ("draw", "caption")]
        assert not any(paired) and (not unpaired or 0.2 < np.mean(unpaired) < 0.8)


@pytest.mark.parametrize("method", train.OBJECTIVES)
def test_a_baseline_adds_its_objective_on_pictures_that_come_with_texts(run, monkeypatch, method):
    run.config.batch, model, plain, seen = 32, run.policy("base"), train.OBJECTIVES[method], []
    monkeypatch.setitem(train.OBJECTIVES, method, lambda *args: (
        seen.append((args[2], plain(*args))) or seen[-1][1]))  # fmt: skip
    steps = [train.next_token_step(run, model, "any", name) for name in ("unified", method)]
    losses = [step(0, unmoved(model))["loss"] for step in steps]
    chance, shown, ((examples, value),) = run.rng("any", 0, 0), train.prompts_shown(run), seen
    by_task = train.pretraining_examples(run, chance, 32, method, shown)
    pairs = [e for t in ("draw", "caption") for e, alone in by_task.get(t, ()) if not alone]
    assert [e.truth for e in examples] == [e.truth for e in pairs] and value > 0.1
    assert losses[1] - losses[0] == pytest.approx(train.OBJECTIVE_WEIGHT * value.item(), abs=1e-5)
    run.config.batch = 1  # which may be none of these
    assert all(steps[1](k, unmoved(model))["loss"] > 0 for k in range(1, 9)) and len(seen) < 9


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


def test_muon_goes_down_and_equally_far_in_all_directions():
    for shape in ((6, 4), (4, 8), (4, 4)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        train.Muon([weight], 0.1).step()
        singular = torch.linalg.svdvals(weight.detach()) / (0.02 * math.sqrt(max(shape)))
        assert 0.6 < singular.min() and singular.max() < 1.3 and (weight * weight.grad).sum() < 0


def test_a_run_leaves_its_configuration_and_a_row_a_step(smoke):
    stages, rows = {"pretrain": 60, "clip": 25, "clip_report": 10, "align": 4}, rows_of(smoke)
    steps = [(stage, str(k)) for stage, n in stages.items() for k in range(n)]
    assert [(row["stage"], row["step"]) for row in rows] == steps
    assert [(row["stage"], row["step"]) for row in rows_of(smoke, "timing")] == steps
    losses = [float(row["loss"]) for row in rows]
    assert np.isfinite(losses).all() and np.mean(losses[50:60]) < 0.5 * losses[0]
    assert all(row["skipped"] == "0" and float(row["grad_norm"]) > 0 for row in rows)
    first = {k: abs(float(v)) for k, v in rows[-4].items() if k.startswith("kl_")}
    assert len(first) == 4 and max(first.values()) < 1e-6  # it starts at the base
    stored = read_json(smoke / "config.json")
    assert stored.pop("environment")["command"].startswith("python train.py --preset smoke")
    assert Config(**stored) == make_config(**TINY, out=str(smoke))


META = "preset method data seed command commit device threads machine versions seconds noise config"


def test_eval_json_has_the_structure_that_others_rely_on(smoke):
    result = read_json(smoke / "eval.json")
    assert set(result) == {"base", "aligned", "sweep", "best_temperature", "judge_accuracy", "meta"}
    assert set(result["meta"]) == set(META.split()) and result["meta"]["seconds"]["align"] > 0
    for name in ("base", "aligned"):
        cells = {k: cell for group in result[name].values() for k, cell in group.items()}
        missing = {k.split("_")[0] for k, cell in cells.items() if cell is None}
        assert missing - {"diversity"} == {"story", "visual"}
        assert all(set(cell) == {"value", "low", "high", "n"} for cell in cells.values() if cell)
        assert (cells["compose"]["n"], cells["vqa"]["n"], cells["text_nll"]["n"]) == (128, 64, 64)
        rows = result["sweep"][name]
        assert [row.pop("temperature") for row in rows] == [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
        names = "compose", "diversity", "differ", "clip_score", "frechet"
        pools = "", "_heldout", "_pairs"
        assert all(set(row) == {k + pool for k in names for pool in pools} for row in rows)


@pytest.mark.parametrize("method", train.METHODS[1:])
def test_every_method_runs_to_its_end_from_the_base_of_another_run(finished, method):
    rows = rows_of(finished(method))
    assert [row["stage"] for row in rows] == ["align"] * (0 if method == "best_of_n" else 2)
    assert all(float(row["labels"]) > 0 and float(row["tokens"]) > 0 for row in rows)
    base, aligned = (load_file(finished(method) / f"{k}.safetensors") for k in ("base", "aligned"))
    assert all(torch.equal(base[k], aligned[k]) == (method == "best_of_n") for k in base)
    ours, theirs = (read_json(finished(m) / "eval.json") for m in (method, "unified"))
    assert ours["base"] == theirs["base"] and ours["sweep"]["base"] == theirs["sweep"]["base"]


def test_a_base_is_measured_once_by_one_commit_on_the_same_scenes(smoke, tmp_path, monkeypatch):
    for name in ("eval.json", "items.json"):
        shutil.copy(smoke / name, tmp_path)
    result, items = (read_json(smoke / name) for name in ("eval.json", "items.json"))
    result["meta"]["commit"] = "abc1234"
    (tmp_path / "eval.json").write_text(json.dumps(result))
    c = make_config(**TINY, base=str(tmp_path), method="unified")
    monkeypatch.setattr(train, "commit_of_code", lambda: "abc1234")
    known = train.base_measured(c)["synthetic"]
    assert known["numbers"] == result["base"] and known["sweep"] == result["sweep"]["base"]
    assert known["items"] == items["synthetic"]["base"] and len(known["items"]["vqa"]) == 64
    for change in ({"eval_items": 32}, {"seed": 1}, {"tasks": "vqa"}, {"base": ""}):
        assert train.base_measured(dataclasses.replace(c, **change)) == {}
    for commit in ("", "abc1234+changes", "def5678"):
        monkeypatch.setattr(train, "commit_of_code", lambda commit=commit: commit)
        assert train.base_measured(c) == {}


@pytest.mark.slow
def test_one_model_learns_all_tasks_of_all_data_sets_from_mixed_rewards(clothes, grids, tmp_path):
    few = dict(pretrain_steps=6, clip_steps=5, prompts=2, tasks="all", reward="mix")
    data = dict(data="synthetic,fashion_mnist,shapes", data_dir=str(tmp_path))
    folder = train.main(make_config(**TINY | SHORT | few | data, out=str(tmp_path / "run")))
    for name, metrics in (("synthetic", 29), ("fashion_mnist", 13), ("shapes", 2)):
        result = read_json(folder / "eval.json")["sources"][name]["aligned"]
        assert sum(cell is not None for g in result.values() for cell in g.values()) >= metrics
    assert all(rows_of(folder)[-1][f"reward_{task}"] for task in train.GRPO_TASKS)


def test_an_aligned_checkpoint_holds_the_transformer_and_nothing_else(smoke):
    run = train.Run(train.resumed({"resume": True, "out": str(smoke), "preset": "smoke"}))
    run.load_tokens()
    assert load_file(smoke / "aligned.safetensors").keys() == run.policy().state_dict().keys()
