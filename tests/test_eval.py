"""eval.py: the judge, numbers with intervals, what a model can do, and a run that is asked."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import WORLD, chosen_logprobs
from PIL import Image
from test_data import says, scenes
from test_reward import outputs_of

import eval as evaluation
from data import (BACKGROUND, CELLS, COLORS, COUNTS, KINDS, Example, FashionMNIST, Object,
                  World, edits, parse_caption, render, scene_edits, true_caption)
from eval import METRICS, Evaluator, WorldJudge, cell, consistent, load_picture, parse, statements
from model import sample
from reward import CLIP

CIRCLE, SQUARE = Object("red", "circle", "big", 0, 0), Object("blue", "square", "small", 1, 1)


@pytest.mark.parametrize("pool", COUNTS)
@pytest.mark.parametrize("jitter", [0, 1])
def test_the_judge_reads_every_real_picture_exactly(pool, jitter):
    some = [scene for _, scene in scenes(400, (pool,), jitter)]
    pictures = np.stack([render(scene) for scene in some])
    noise = np.random.default_rng(0).integers(-30, 31, pictures.shape)
    noisy = (pictures + noise).clip(0, 255).astype(np.uint8)
    for scene, clean, read in zip(some, parse(pictures), parse(noisy)):
        assert sorted(clean) == sorted(read) == sorted(o._replace(dx=0, dy=0) for o in scene)


def faults(rng, scene):
    """(picture, the scene it should be read as) of everything that can go wrong in drawing."""
    for _, e in scene_edits(scene):
        yield render(e), e
    (row, column), o, picture = rng.choice(CELLS), scene[0], render(scene)
    if (row, column) not in [p.cell for p in scene]:
        for kind in (rng.choice(KINDS), o.kind):  # an object too many, or one twice
            more = [*scene, Object(*kind, "small", row, column)]
            yield render(more), more
        for pixels in (3, 4):  # a speck is nothing, four pixels of a colour are something
            specks, blob = picture.copy(), Object("green", None, None, row, column)
            specks[16 * row + 2, 16 * column : 16 * column + pixels] = COLORS["green"]
            yield specks, [*scene, blob] if pixels > 3 else scene
    half = picture.copy()
    half[16 * o.row : 16 * o.row + 9, 16 * o.column : 16 * o.column + 16] = BACKGROUND
    yield half, [o._replace(shape=None, size=None), *scene[1:]]
    yield np.zeros_like(picture), []


def test_the_judge_agrees_with_reading_word_by_word_whatever_is_drawn():
    rng, judge, right = random.Random(0), WorldJudge(), []
    for _, scene in scenes(40, jitter=0):
        caption = true_caption(rng, scene)
        drawn, read = zip(*faults(rng, scene))
        examples = [Example("draw", None, "", "", (scene, caption))] * len(drawn)
        failed = judge.failed(examples, np.stack(drawn)[:, None])
        expected = [says(caption.text(), e) for e in read]
        assert judge.draw(examples, np.stack(drawn)[:, None]).tolist() == expected
        assert [not kinds for kinds in failed] == expected
        right += expected
    assert 100 < sum(right) < len(right) / 4  # a size or place that no word names is free


def test_each_kind_of_statement_is_checked():
    expected = {
        "a shape and a red shape": "", "a red circle above a square": "", "a circle": "count",
        "a small red circle and a square": "size", "a blue square above a shape": "relation",
        "a red circle at the top right and a square": "position", "a red square and a blue square":
        "shape", "a red circle and a blue square and a green circle": "count color shape",
    }  # fmt: skip
    for text, kinds in expected.items():
        checks = statements([SQUARE, CIRCLE], parse_caption(text))
        assert {kind for kind, ok in checks if not ok} == set(kinds.split()), text


def test_a_caption_is_right_if_it_is_true_and_names_colour_and_shape_of_every_object():
    rng, judge = random.Random(0), WorldJudge()
    for _, scene in scenes(20):
        true = true_caption(rng, scene)
        vague = true.text().replace(f"{scene[0].color} ", "", 1)
        texts = [true.text(), *(e.text() for _, e in edits(true)), "", "circle red", vague]
        example = Example("caption", None, "", "", (scene, true))
        assert judge.caption([example] * len(texts), texts).nonzero()[0].tolist() == [0]


TURNED, MOVED = CIRCLE._replace(color="green"), CIRCLE._replace(row=1)
SMALL, LARGE = CIRCLE._replace(size="small"), SQUARE._replace(size="big")


@pytest.mark.parametrize("same, scenes, drawn", [
    (True, [[CIRCLE, SQUARE], [MOVED, SQUARE]], [[CIRCLE, SQUARE], [MOVED, SQUARE]]),
    (True, [[CIRCLE, SQUARE], [MOVED, SQUARE]], [[CIRCLE, SQUARE], [CIRCLE, SQUARE]]),  # not moved
    (False, [[CIRCLE, SQUARE], [MOVED, SQUARE]], [[CIRCLE, SQUARE], [MOVED, LARGE]]),
    (False, [[CIRCLE, SQUARE], [MOVED, SQUARE]], [[CIRCLE, SQUARE], [MOVED]]),  # one is gone
    (False, [[CIRCLE], [MOVED]], [[SMALL], [MOVED]]),  # it grew on its way
    (True, [[CIRCLE], [TURNED]], [[SMALL], [TURNED._replace(size="small")]]),
    (False, [[CIRCLE], [TURNED]], [[CIRCLE], [TURNED._replace(row=1)]]),  # changed, and elsewhere
])  # fmt: skip
def test_a_story_is_consistent_if_what_no_event_changes_stays(same, scenes, drawn):
    assert consistent(drawn, scenes) == same


@pytest.mark.parametrize("pool", COUNTS)
def test_the_judge_finds_every_frame_of_a_story_right_and_frames_in_another_order_wrong(pool):
    stories = [WORLD.example(random.Random(i), "story", pool) for i in range(30)]
    right, same = WorldJudge().story(stories, outputs_of(stories))
    assert right.shape == (30, 3) and right.all() and same.all()
    right, _ = WorldJudge().story(stories, outputs_of(stories)[:, [0, 2, 1]])
    assert right[:, 0].all() and right[:, 1:].mean() < 0.2


def test_the_judge_of_clothes_learns_from_real_pictures_and_disturbs_no_other_chance(clothes):
    before = torch.get_rng_state()
    judge = evaluation.FashionJudge(source := FashionMNIST(clothes), steps=100)
    assert judge.accuracy == 1 and torch.equal(torch.get_rng_state(), before)
    pictures, labels = source.splits["test"]
    examples = [Example("draw", None, "", "a boot", label) for label in labels]
    assert judge.draw(examples, pictures[:, None]).all()
    assert judge.failed(examples[:2], pictures[[0, 0], None]) == [set(), {"class"}]


@pytest.mark.parametrize("values, weights, expected", [  # value, low, high, n
    (np.arange(20) < 0, None, (0, 0, 0.1611, 20)), (np.arange(20) < 20, None, (1, 0.8389, 1, 20)),
    (np.array([1.0, 2, 3, 4]), None, (2.5, 1.2348, 3.7652, 4)),  # 1.96 sqrt(5 * 4/3) / 4
    (np.array([1.0, 4.0]), [3, 1], (1.75, -0.455, 3.955, 2)),  # 1.96 sqrt(10.125 * 2) / 4
    (np.array([0.25]), None, (0.25, None, None, 1)), (math.nan, None, (None, None, None, 1)),
])  # fmt: skip
def test_a_cell_has_the_interval_of_a_hand_calculation(values, weights, expected):
    assert cell(values, weights) == dict(zip(("value", "low", "high", "n"), expected))  # (E3), (E4)


def test_the_quantiles_are_those_of_students_t():
    for freedom, t in enumerate(evaluation.T_QUANTILES, 1):
        x = torch.linspace(0, t, 20001)
        density = torch.distributions.StudentT(freedom).log_prob(x).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=5e-5), freedom


def test_diversity_is_of_right_pictures_alone():
    a, b, c = (np.full((2, 2, 3), v, np.uint8) for v in (0, 51, 255))
    pictures = np.stack([[a, b, b, c], [a, a, c, c], [c, c, a, b]])
    right = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]) > 0  # of the last: no pair
    assert evaluation.diversity(pictures, right) == (3 / 5, pytest.approx((2 / 3 + 0) / 2))  # (E2)
    assert np.isnan(evaluation.diversity(pictures, right & False)).all()


def test_the_frechet_distance_is_that_of_gaussians():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5) for _ in "ab")
    c, d = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(c @ d).real).sum()  # the same trace, without a root of c
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * root
    assert evaluation.frechet(a, b) == pytest.approx(expected)  # (E7)


def test_a_text_that_is_likely_everywhere_does_not_win_and_what_is_also_true_is_no_candidate():
    likely = np.log([[0.9, 0.5, 0.1], [0.9, 0.8, 0.1], [0.9, 0.1, 0.3]])  # text 0: everywhere
    both = np.arange(9).reshape(3, 3) == 1  # text 1 is true of picture 0, too
    scores, turned = evaluation.surprise(likely, 0), evaluation.surprise(likely.T, 1)  # (E6)
    for also, first in ((both & False, [False, True, True]), (both, [True, True, True])):
        assert evaluation.ranked_first(scores, also).tolist() == [first, [True] * 3]
        assert evaluation.ranked_first(turned, also.T).tolist() == [[True] * 3, first]


@pytest.fixture
def of(model, vocab, codebook):
    def make(cls=Evaluator, split="test", seed=0, n=16, rewards=None):
        e = cls(model, vocab, codebook, WORLD, WorldJudge(), split, seed, n, rewards)
        e.clip = CLIP(vocab.n_text, width=32, heads=2)
        return e

    return make


def test_models_are_asked_the_same_and_splits_and_seeds_something_else(of):
    places = [{"split": split, "seed": seed} for split in ("val", "test") for seed in (0, 1, 0)]
    every = [str([e.prompt for e in of(**place).examples("draw", 20)]) for place in places]
    assert every[::3] == every[2::3] and len(set(every)) == 4


@pytest.mark.parametrize("task", ["draw", "vqa", "story"])
def test_outputs_are_the_samples_of_the_model_whatever_the_batch(
    of, model, vocab, codebook, task, monkeypatch
):
    e, layout = of(), vocab.layout(task)
    examples = e.examples(task, 6)
    rows = vocab.rows(task, examples, e.codes(examples))
    plain = evaluation.outputs(layout, sample(model, layout, rows, temperature=0), vocab, codebook)
    for size in (2, 512):
        monkeypatch.setattr(evaluation, "BATCH", (size, size))
        assert np.array_equal(e.outputs(examples, 0.0), plain)
    one, same, other = (e.outputs(examples, group=2, seed=seed) for seed in (1, 1, 2))
    assert len(one) == 12 and np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("task", ["draw", "caption"])
def test_the_best_of_eight_is_the_one_that_the_reward_likes_most(of, task):
    like = np.mean if task == "draw" else len  # the brightest picture, or the longest text

    def reward(source, task, examples, outputs, rng):
        return torch.tensor([like(x) for x in outputs]).view(len(examples), -1), {}

    examples = of().examples(task, 130)  # more than are rewarded at once
    samples, best = of().outputs(examples, 1.0, 8, seed=3), []
    for i in range(130):
        best.append(max(samples[8 * i : 8 * i + 8], key=like))
    assert np.array_equal(of(rewards=reward).outputs(examples, 1.0, seed=3), best)


def test_likelihoods_of_texts_are_those_of_a_loop_over_tokens(of, monkeypatch):
    def logprobs(task, example):
        row = e.vocab.rows(task, [example], e.codes([example]))[0]
        return chosen_logprobs(e.model, e.vocab.layout(task), row)

    e, examples = of(n=7), WORLD.hard_negatives(random.Random(0), 5)
    monkeypatch.setattr(evaluation, "BATCH", (12, 12))  # two pictures with five texts at a time
    found = evaluation.caption_logprobs(e, [x.answer for x in examples], e.codes(examples))
    for i, j in itertools.product(range(5), repeat=2):
        one = logprobs("caption", examples[i]._replace(answer=examples[j].answer))
        assert found[i, j] == pytest.approx(sum(one), abs=1e-6)
    values, weights = evaluation.text_nll(e)
    texts = [logprobs("text", x) for x in e.examples("text")]
    assert weights.tolist() == list(map(len, texts))
    assert values.tolist() == pytest.approx([-np.mean(text) for text in texts])  # (E5)


def test_candidates_for_retrieval_are_families_of_eight_one_edit_apart():
    examples = World(jitter=1).hard_negatives(random.Random(0), 64)
    for i, e in enumerate(examples):
        scene, first = e.truth[0], examples[i // 8 * 8].truth[0]
        assert says(e.answer, scene) and (e.pictures[0] == render(scene)).all()
        assert len({o.kind for o in scene}) == len(scene) < 3
        apart = len({o[:5] for o in scene} ^ {o[:5] for o in first})
        assert apart in ((1, 2, 4) if i % 8 else (0,))  # 4: two objects swap colours


class Keyed(Evaluator):
    """Answers with the key: on validation prompts only at T = 0.3, else with that of the next."""

    def outputs(self, examples, temperature=1.0, group=1, seed=0):
        k = int(self.split == "val" and temperature != 0.3)
        return outputs_of([e for e in examples[k:] + examples[:k] for _ in range(group)])


def test_who_answers_from_the_key_masters_every_metric_and_who_takes_anothers_does_not(of):
    design = {"understanding": "vqa retrieval_i2t_r1 retrieval_t2i_r1 caption caption_three",
              "generation": "compose compose_heldout compose_pairs compose_unprompted clip_score "
              "frechet frechet_three story story_three diversity",
              "reasoning": "visual multihop multihop_three", "language": "text_nll"}  # fmt: skip
    right, wrong = of(Keyed), of(Keyed, "val")
    (cells, items), (others, _) = (evaluation.measure(e, WORLD.tasks) for e in (right, wrong))
    for group, names in design.items():
        assert set(names.split()) <= set(METRICS[group]) == set(cells[group])
        for name in re.findall(r"vqa|caption\w*|compose\w*|story\w*|visual|multihop\w*", names):
            assert cells[group][name]["value"] == 1 > others[group][name]["value"] + 0.1
            assert items[name] == [1] * cells[group][name]["n"]
    drawn = cells["generation"]
    assert list(cells) == list(design) and drawn["frechet"] == drawn["frechet_floor"]
    assert [drawn[name]["n"] for name in ("compose", "story", "story_frames")] == [32, 16, 48]
    few, _ = evaluation.measure(right, ["vqa"])
    assert [name for group in few.values() for name in group if group[name]] == ["vqa", "vqa_three"]


def test_a_whole_evaluation_has_fronts_and_a_temperature_chosen_on_other_prompts(of):
    test, val = of(Keyed, "test"), of(Keyed, "val")
    measured = evaluation.evaluate(test, val, ("draw", "vqa"), prompts=4)
    result = evaluation.merged({"base": measured, "aligned": measured}, 1.0)
    for row, t in zip(result["sweep"]["base"], evaluation.TEMPERATURES, strict=True):
        assert row["temperature"] == t
        for suffix in evaluation.POOLS:
            values = [row[k + suffix] for k in ("compose", "diversity", "differ")]
            assert values == [1.0, 0.125, 0.0] and 0 < row[f"clip_score{suffix}"] <= 1
            assert row[f"frechet{suffix}"] == pytest.approx(0, abs=0.5)
    assert result["best_temperature"] == {"base": 0.3, "aligned": 0.3}  # see Keyed
    assert measured["items"]["vqa"] == [1] * 16


@pytest.mark.parametrize("task, prompt, argv", [
    ("draw", "a red circle", "--draw|A red circle!|--temperature|0|--out|x.png"),
    ("vqa", "what color is the circle ?", "--ask|What color is the circle?|--image|in.PNG"),
    ("caption", "", "--caption|in.PNG"),
])  # fmt: skip
def test_a_run_chooses_what_its_model_does(
        smoke, tmp_path, monkeypatch, command, task, prompt, argv):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    picture = render([CIRCLE, SQUARE])
    evaluation.save_picture(picture, "in.PNG")
    done = command("eval.py", "--run", smoke, *argv.split("|"))
    config, codebook, vocab = evaluation.load_run(smoke)
    model, layout = evaluation.load_model(smoke, vocab, codebook, config), vocab.layout(task)
    example = Example(task, picture[None], prompt, "")
    rows = vocab.rows(task, [example], codebook.encode(example.pictures))
    tokens = sample(model, layout, rows, temperature=0.0)
    (expected,) = evaluation.outputs(layout, tokens, vocab, codebook)
    answer = [load_picture("x.png")] if task == "draw" else done.out.rstrip("\n")
    assert done.status == 0 and np.array_equal(answer, expected)


def test_pictures_of_every_kind_are_read_as_they_look(tmp_path):
    def saved(image, **how):
        image.save(tmp_path / "x.png", **how)
        return load_picture(tmp_path / "x.png")

    picture, turned = render([CIRCLE]), Image.Exif()
    assert (saved(Image.fromarray(np.full((32, 32), 25700, np.uint16))) == 100).all()  # of 65535
    clear = np.dstack([picture, np.tri(32, dtype=np.uint8) * 255])  # transparent: black
    assert (saved(Image.fromarray(clear)) == np.where(np.tri(32)[..., None], picture, 0)).all()
    turned[0x112] = 6  # a camera held upright
    assert (saved(Image.fromarray(picture), exif=turned) == np.rot90(picture, -1)).all()
    assert (saved(Image.fromarray(picture).quantize(8)) == picture).all()  # a palette
    wide = saved(Image.new("RGB", (64, 32), "white"))  # 2:1
    assert (wide[8:24] == 255).all() and wide.sum() == 255 * 16 * 32 * 3


def made_up(folder, method, seed, vqa, front):
    result = {"judge_accuracy": 1.0, "meta": {"method": method, "seed": seed, "data": "synthetic"}}
    result |= {"sweep": {}, "best_temperature": {"base": 0.1, "aligned": 1.0}}
    base = 0.4, [(0.9, 0.3), (0.3, 0.5)]
    for name, (value, points) in {"base": base, "aligned": (vqa, front)}.items():
        result[name] = {group: dict.fromkeys(metrics) for group, metrics in METRICS.items()}
        result[name]["understanding"]["vqa"] = cell(value)
        rows = [{"compose": q, "diversity": d} for q, d in points]
        result["sweep"][name] = [rows[0] | {"temperature": 0.1}, rows[1] | {"temperature": 1.0}]
    (folder / f"{method}{seed}").mkdir()
    (folder / f"{method}{seed}" / "eval.json").write_text(json.dumps(result))
    return folder / f"{method}{seed}"


def test_runs_are_compared_as_by_hand(tmp_path, command):
    theirs, ours = [(0.8, 0.1), (0.6, 0.4)], [(0.9, 0.2), (0.7, 0.6)]
    runs = [made_up(tmp_path, "unified", seed, vqa, theirs) for seed, vqa in enumerate((0.7, 0.5))]
    runs += [made_up(tmp_path, "lvrpo", seed, vqa, ours) for seed, vqa in enumerate((0.9, 0.8))]
    source, header, *rows = command("eval.py", "--compare", *runs).out.splitlines()
    table = {row[:30].strip(): re.split("  +", row[30:].strip()) for row in (header, *rows)}
    assert source == "synthetic" and table[""] == [
        "lvrpo (n=2)", "unified (n=2)", "base (n=2)", "lvrpo - unified", "lvrpo - base"]
    assert table["vqa"] == ["0.850 ± 0.635", "0.600 ± 1.271", "0.400 ± 0.000",  # t = 12.706
                            "0.250 ± 0.635", "0.450 ± 0.635"]
    best = [f"{mean / 10:.3f} ± 0.000" for mean in (7, 6, 9, 1, -2)]
    assert table["compose @ best T"] == best
    # From 0.2 to 0.4: 0.9 to 0.8 less 0.7333 to 0.6. From 0.3 to 0.5: 0.85 to 0.75, 0.9 to 0.3.
    gaps = ["-", "-", "-", "0.183 ± 0.000", "0.200 ± 0.000"]
    assert table["compose @ equal diversity"] == gaps


@pytest.mark.parametrize("task", ["draw", "caption", "story"])
def test_outputs_and_examples_of_different_numbers_are_our_mistake(task):
    e = WORLD.example(random.Random(0), task)
    with pytest.raises(AssertionError):
        getattr(WorldJudge(), task)([e] * 2, outputs_of([e]))


def test_likely_texts_and_plain_pictures_have_no_advantage_in_retrieval(of, monkeypatch):
    """What is likely with any partner is divided out, each direction along its own axis."""
    likely = 9.0 * (torch.arange(64) % 5)
    captioned = torch.eye(64) + likely  # (pictures, texts): some texts are likely
    drawn = torch.eye(64) + likely  # (texts, pictures): some pictures are likely
    monkeypatch.setattr(evaluation, "caption_logprobs", lambda *_: captioned.double().numpy())
    monkeypatch.setattr(evaluation, "drawing_logprobs", lambda *_: drawn.double())
    shares = evaluation.retrievals(of(n=64))
    assert all((share == 1).all() for share in shares.values()) and len(shares) == 3
