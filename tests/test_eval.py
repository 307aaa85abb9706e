"""The judge, the numbers with their intervals, what a model can do, and the playground on a finished run."""

import html
import json
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import WORLD
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
from data import (
    BOS,
    COLORS,
    COUNTS,
    EOS,
    PAD,
    SPECIAL,
    Example,
    Object,
    Story,
    Vocabulary,
    World,
    edits,
    parse_caption,
    pictures_of,
    render,
    sample_scene,
    true_caption,
)
from model import ModelConfig, Transformer, sample
from reward import CLIP


def scenes(n, jitters=(0, 1), seed=0):
    rng = random.Random(seed)
    return [sample_scene(rng, pool, jitter) for pool in COUNTS for jitter in jitters for _ in range(n)]


def without_shift(scene):
    return sorted(o._replace(dx=0, dy=0) for o in scene)


CIRCLE, SQUARE = Object("red", "circle", "big", 0, 0), Object("blue", "square", "small", 1, 1)


# ---------------------------------------------------------------- the judge


def test_the_judge_reads_every_real_picture_exactly():
    some = scenes(260)  # 2,080 scenes: four pools, with and without jitter
    for scene, found in zip(some, evaluation.parse(np.stack([render(s) for s in some]))):
        assert sorted(found) == without_shift(scene)


def test_every_single_object_is_read_in_every_place():
    some = [[Object(c, s, z, row, column, dx, dy)] for c in COLORS for s, z in evaluation.OUTLINES for row in (0, 1) for column in (0, 1)
            for dx, dy in ((0, 0), (1, -1), (-1, 1))]  # fmt: skip
    assert evaluation.parse(np.stack([render(s) for s in some])) == [without_shift(s) for s in some]


def test_small_pixel_noise_does_not_change_what_is_read():
    rng, some = np.random.default_rng(0), scenes(20)
    pictures = np.stack([render(s) for s in some])
    noisy = np.clip(pictures + rng.integers(-30, 31, pictures.shape), 0, 255).astype(np.uint8)
    assert [sorted(found) for found in evaluation.parse(noisy)] == [without_shift(s) for s in some]


@pytest.mark.parametrize("strength", [20, 60, 120])
def test_noise_never_makes_a_wrong_picture_right(strength):
    rng, noise, some = random.Random(0), np.random.default_rng(0), scenes(20)
    pictures = np.stack([render(s) for s in some])
    noisy = np.clip(pictures + noise.integers(-strength, strength + 1, pictures.shape), 0, 255).astype(np.uint8)
    for scene, found in zip(some, evaluation.parse(noisy)):
        kind, wrong = rng.choice([e for e in edits(true_caption(rng, scene)) if e[0] != "drop"])  # noise can destroy an object
        assert not evaluation.holds(found, wrong), (kind, wrong.text())


objects = st.builds(Object, st.sampled_from([*COLORS]), st.sampled_from(data.SHAPES), st.sampled_from([*data.SIZES]),
                    st.just(0), st.just(0), st.integers(-1, 1), st.integers(-1, 1))  # fmt: skip
placed = st.lists(st.tuples(objects, st.tuples(st.integers(0, 1), st.integers(0, 1))), max_size=4, unique_by=lambda pair: pair[1]).map(
    lambda pairs: [o._replace(row=row, column=column) for o, (row, column) in pairs])  # fmt: skip


@settings(max_examples=60)
@given(placed)
def test_reading_undoes_drawing(scene):
    assert sorted(evaluation.parse(render(scene)[None])[0]) == without_shift(scene)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([*COUNTS]), st.integers(0, 30), st.integers(0, 10**6))
def test_pixels_of_any_colour_never_make_a_wrong_scene_pass(seed, pool, pixels, noise):
    rng, spots = random.Random(seed), np.random.default_rng(noise)
    scene = sample_scene(rng, pool)
    false = rng.choice([edit for _, edit in edits(true_caption(rng, scene))])
    assert not evaluation.holds(scene, false)
    picture = render(scene)
    picture[spots.integers(0, 32, pixels), spots.integers(0, 32, pixels)] = spots.integers(0, 256, (pixels, 3))
    assert not evaluation.holds(evaluation.parse(picture[None])[0], false)


def test_a_speck_is_no_object_and_four_pixels_are_one():
    picture = render([CIRCLE])
    picture[25, 5:8] = COLORS["green"]
    assert evaluation.parse(picture[None]) == [[CIRCLE]]
    picture[25, 8] = COLORS["green"]
    assert len(evaluation.parse(picture[None])[0]) == 2
    assert evaluation.parse(np.zeros((1, 32, 32, 3), np.uint8)) == [[]]


@pytest.mark.parametrize("up, row", [(8, 1), (9, 0)])
def test_an_object_between_two_cells_counts_for_the_one_its_middle_is_in(up, row):
    picture = np.roll(render([SQUARE]), -up, axis=0)  # from rows 21-27 to 13-19, whose middle is below the border, or to 12-18
    assert evaluation.parse(picture[None]) == [[SQUARE._replace(row=row)]]


def test_pieces_that_touch_only_at_a_corner_are_two():
    labels = np.zeros((1, 4, 4), int)
    labels[0, 0, 0] = labels[0, 1, 1] = labels[0, 1, 2] = labels[0, 2, 2] = 1
    labels[0, 3, 3] = 2
    found = evaluation.components(labels)[0]
    assert found[1, 1] == found[1, 2] == found[2, 2] and len({found[0, 0], found[1, 1], found[3, 3]}) == 3


def test_a_winding_line_is_one_component():
    spiral = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    found = evaluation.components(spiral[None])[0]
    assert len(np.unique(found[spiral == 1])) == 1 and len(np.unique(found[spiral == 0])) == 2 - (found[1, 3] == found[2, 3])


def test_an_object_that_lost_a_corner_is_read_and_half_an_object_has_no_shape():
    picture = render([SQUARE, CIRCLE])
    picture[21, 21] = picture[27, 27] = (16, 16, 20)  # two corner pixels of the small square, at rows and columns 21-27
    assert sorted(evaluation.parse(picture[None])[0]) == sorted([CIRCLE, SQUARE])
    picture[2:9] = (16, 16, 20)  # the upper half of the circle
    assert Object("red", None, None, 0, 0) in evaluation.parse(picture[None])[0]
    assert not evaluation.holds(evaluation.parse(picture[None])[0], parse_caption("a red circle and a blue square"))


@pytest.mark.parametrize("text, failed", [
    ("a red circle and a blue square", set()), ("a blue square and a red circle", set()), ("a shape and a red shape", set()),
    ("a big red circle at the top left and a square", set()), ("a red circle left of a blue square", set()),
    ("a red circle above a small square", set()),
    ("a red circle", {"count"}), ("a red circle and a blue square and a green circle", {"count", "color", "shape"}),
    ("a red circle and a green square", {"color"}), ("a red circle and a blue triangle", {"shape"}),
    ("a small red circle and a blue square", {"size"}),
    ("a red circle at the top right and a blue square", {"position"}), ("a red circle right of a blue square", {"relation"}),
    ("a blue square above a red circle", {"relation"}), ("a small red square and a blue square", {"size", "shape"})])  # fmt: skip
def test_each_kind_of_statement_is_checked(text, failed):
    checks = evaluation.statements([SQUARE, CIRCLE], parse_caption(text))
    assert {kind for kind, ok in checks if not ok} == failed
    assert evaluation.holds([SQUARE, CIRCLE], parse_caption(text)) == (not failed)


def test_mentions_are_matched_to_objects_in_the_way_that_makes_most_of_them_true():
    scene = [Object("red", "circle", "big", 0, 0), Object("red", "circle", "small", 1, 1)]
    assert evaluation.holds(scene, parse_caption("a small red circle and a big red circle"))
    assert evaluation.holds(scene, parse_caption("a red circle below a big circle"))
    assert not evaluation.holds(scene, parse_caption("a small red circle and a small red circle"))


def test_nothing_and_a_crowd_are_wrong_and_quick():
    caption = parse_caption("a red circle left of a blue square")
    assert not evaluation.holds([], caption)
    crowd = [Object("red", None, None, 0, 0)] * 200
    assert dict(evaluation.statements(crowd, caption))["count"] is False


def test_the_worlds_judge_scores_drawings_statements_and_captions():
    judge, rng = evaluation.WorldJudge(), random.Random(0)
    texts = ["a red circle and a blue square", "a red circle and a green square", "a big red circle left of a blue square"]
    examples = [Example("draw", None, text, "", ([CIRCLE, SQUARE], parse_caption(text))) for text in texts]
    pictures = np.stack([render([CIRCLE, SQUARE])] * 2 + [render([CIRCLE])])
    right, kinds = judge.draw(examples, pictures)
    assert right.tolist() == [True, False, False]
    assert kinds == pytest.approx({"count": 2 / 3, "color": 4 / 6, "shape": 5 / 6, "size": 1, "relation": 0})
    assert judge.failed(examples, pictures) == [set(), {"color"}, {"count", "color", "shape", "relation"}]
    said = judge.caption([examples[0]] * 5, [*texts, "", "circle red"])
    assert said.tolist() == [True, False, True, False, False]
    for pool in (p for pools in judge.pools.values() for p in pools):
        some = [World().example(rng, "draw", pool) for _ in range(20)]
        assert judge.draw(some, np.stack([e.picture for e in some]))[0].all()


@pytest.mark.parametrize("pool", ["paired", "three"])
def test_the_judge_finds_every_real_story_right_and_consistent_and_every_plan_true_and_followed(pool):
    judge, rng = evaluation.WorldJudge(), random.Random(0)
    stories = [WORLD.example(rng, "story", pool) for _ in range(100)]
    right, same = judge.story(stories, np.stack([e.picture for e in stories]))
    assert right.shape == (100, 3) and right.all() and same.all()
    plans = [WORLD.example(rng, "plan", pool) for _ in range(100)]
    assert all(found.all() for found in judge.plan(plans, [(e.answer, e.picture) for e in plans]))


GREEN = Object("green", "triangle", "big", 0, 1)


@pytest.mark.parametrize("frames, right, same", [
    ([[CIRCLE, SQUARE], [CIRCLE._replace(row=1), SQUARE], [SQUARE]], [1, 1, 1], True),
    ([[CIRCLE, SQUARE], [CIRCLE, SQUARE], [SQUARE]], [1, 0, 1], True),  # it did not move, but nothing else changed
    ([[CIRCLE, SQUARE], [CIRCLE._replace(row=1), SQUARE._replace(size="big")], [SQUARE._replace(size="big")]], [1, 1, 1], False),
    ([[CIRCLE, SQUARE._replace(size="big")], [CIRCLE._replace(row=1), SQUARE._replace(size="big")], [SQUARE._replace(size="big")]],
     [1, 1, 1], True),  # no word says how big
    ([[CIRCLE, SQUARE], [CIRCLE._replace(row=1, size="small"), SQUARE], [SQUARE]], [1, 0, 1], False),  # what moves keeps its size
    ([[CIRCLE, SQUARE], [CIRCLE._replace(row=1), SQUARE], [CIRCLE._replace(row=1), SQUARE]], [1, 1, 0], True),
    ([[CIRCLE, SQUARE], [CIRCLE._replace(row=1), SQUARE, GREEN], [SQUARE]], [1, 0, 1], True),
    ([[CIRCLE, SQUARE], [CIRCLE._replace(row=1)], [SQUARE]], [1, 0, 1], False), ([[], [], []], [0, 0, 0], False)])  # fmt: skip
def test_a_story_is_judged_frame_by_frame_and_by_what_should_stay(frames, right, same):
    scenes = ([CIRCLE, SQUARE], [CIRCLE._replace(row=1), SQUARE], [SQUARE])
    texts = ["a big red circle at the top left and a blue square at the bottom right",
             "a big red circle at the bottom left and a blue square at the bottom right", "a blue square at the bottom right"]  # fmt: skip
    story = Story(scenes, ("", "", ""), tuple(map(parse_caption, texts)))
    found = evaluation.WorldJudge().story([Example("story", None, "", "", story)], np.stack([render(s) for s in frames])[None])
    assert found[0].tolist() == [list(map(bool, right))] and found[1].tolist() == [same]


def test_a_plan_must_place_every_object_agree_with_its_prompt_and_be_drawn():
    prompt, picture = parse_caption("a red circle and a blue square"), render([CIRCLE, SQUARE])
    one = "a big red circle at the top left"
    plans = [f"{one} and a small blue square at the bottom {side}" for side in ("right", "left")]
    plans += [one, "a red circle and a blue square", "a"]
    found = evaluation.WorldJudge().plan([Example("plan", None, "", "", (None, prompt))] * 5, [(text, picture) for text in plans])
    assert [x.tolist() for x in found] == [[True, True, False, False, False], [True, False, False, False, False]]


def test_the_clothes_judge_learns_from_real_pictures_and_disturbs_no_other_chance(clothes):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    judge = evaluation.FashionJudge(clothes, steps=150)
    assert judge.accuracy == 1 and torch.equal(torch.rand(3), expected)
    pictures, labels = clothes.splits["test"]
    examples = [Example("draw", None, "", "a boot", int(label)) for label in labels]
    assert judge.draw(examples, pictures)[0].all() and not judge.draw(examples, pictures[::-1])[0].any()
    assert judge.failed(examples[:2], pictures[[0, 0]]) == [set(), {"class"}]
    assert judge.caption(examples[:4], ["a boot", "a picture of a boot", "a bag", ""]).tolist() == [True, True, False, False]


# ---------------------------------------------------------------- numbers with intervals


@pytest.mark.parametrize("k, n", [(0, 20), (1, 20), (13, 20), (20, 20), (500, 1000)])
def test_a_rate_lies_between_the_two_values_from_which_it_is_196_errors_away(k, n):
    r = evaluation.rate([True] * k + [False] * (n - k))
    assert r["value"] == k / n and r["n"] == n and r["low"] <= r["value"] <= r["high"]
    for bound in (r["low"], r["high"]):  # Wilson: the bounds p solve (k/n - p)^2 = 1.96^2 p (1 - p) / n
        assert (k / n - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=2e-4)
    assert 0 <= r["low"] and r["high"] <= 1 and r["high"] - r["low"] > 0.01


def test_an_average_has_its_interval_by_hand():
    assert evaluation.average([1, 2, 3, 4]) == {"value": 2.5, "low": 1.4043, "high": 3.5957, "n": 4}  # 1.96 sqrt(5) / 4 = 1.0957
    assert evaluation.average([1, 4], [3, 1]) == {"value": 1.75, "low": 0.1908, "high": 3.3092, "n": 2}  # 1.96 sqrt(10.125) / 4
    assert evaluation.average([2.0, 2.0], [1, 9]) == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 2}


def test_diversity_counts_distinct_correct_pictures_and_their_distance():
    a, b, c = (np.full((2, 2, 3), v, np.uint8) for v in (0, 51, 255))
    pictures = np.stack([[a, b, b, c], [a, a, c, c], [c, c, a, b]])
    right = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)  # one correct picture of the last prompt: nothing to compare
    distinct, differ, distance = evaluation.diversity(pictures, right)
    assert distinct == 3 / 5  # a, b of a, b, b and a of a, a
    assert differ == pytest.approx((2 / 3 + 0) / 2)  # two of three pairs, and none of one
    assert distance == pytest.approx(((0.2 + 0.2 + 0) / 3 + 0) / 2)


def test_more_correct_pictures_make_the_distinct_share_smaller_but_not_the_share_of_pairs_that_differ():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 6, (4000, 8, 1))  # six pictures, all as likely
    few, many = (evaluation.diversity(pictures, np.arange(8) < n * np.ones((4000, 1))) for n in (4, 8))
    assert few[0] - many[0] > 0.15 and abs(few[1] - many[1]) < 0.01 and few[1] == pytest.approx(5 / 6, abs=0.01)


def test_diversity_is_no_number_without_two_correct_pictures_of_a_prompt():
    assert all(math.isnan(x) for x in evaluation.diversity(np.zeros((2, 3, 4, 4, 3), np.uint8), np.eye(3, dtype=bool)[:2]))


@pytest.mark.parametrize("values, text", [([], "-"), ([0.25], "0.250"), ([0.5, 0.6, 0.7], "0.600 ± 0.248"), ([0.4, 0.6], "0.500 ± 1.271")])
def test_seeds_become_a_mean_with_students_interval(values, text):
    assert evaluation.over_seeds(values) == text


def test_cells_show_value_and_interval_and_a_dash_for_nothing():
    assert evaluation.show({"value": 0.5, "low": 0.25, "high": 0.75, "n": 9}) == "0.500 [0.250, 0.750]"
    assert evaluation.show({"value": 0.5, "low": None, "high": None, "n": 9}) == "0.500"
    assert evaluation.show(None) == evaluation.show({"value": None, "low": None, "high": None, "n": 9}) == "-"


# ---------------------------------------------------------------- what a model can do


@pytest.fixture(scope="module")
def model(vocab, codebook):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab.size, codebook.side, 32, 1, 2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else None
    return model


@pytest.fixture
def evaluator(model, vocab, codebook):
    return evaluation.Evaluator(model, vocab, codebook, World(), evaluation.WorldJudge(), "test", seed=3)


def test_decoding_gives_pictures_for_drawings_and_texts_for_the_rest(vocab, codebook):
    picture = render([CIRCLE])
    codes = codebook.encode(picture[None])
    batch = vocab.batch([Example("draw", picture, "a red circle", "")], codes)
    (drawn,) = evaluation.decode(vocab, codebook, "draw", batch, batch.target)
    assert (drawn == picture).all()
    texts = ["a big red circle", "a circle"]
    batch = vocab.batch([Example("caption", picture, "", text) for text in texts], codes.expand(2, -1))
    assert evaluation.decode(vocab, codebook, "caption", batch, batch.target) == texts
    late = torch.where(batch.target == EOS, vocab.encode("red")[0], batch.target)  # a text that never ended
    assert evaluation.decode(vocab, codebook, "caption", batch, late) == ["a big red circle red", "a circle red"]


def test_decoding_gives_a_story_its_three_frames_and_a_plan_its_text_and_picture(vocab, codebook):
    rng = random.Random(0)
    for task in ("story", "plan"):
        some = [WORLD.example(rng, task) for _ in range(3)]
        batch = vocab.batch(some, codebook.encode(pictures_of(some)))
        for e, found in zip(some, evaluation.decode(vocab, codebook, task, batch, batch.target)):
            text, picture = found if task == "plan" else ("", found)
            assert text == e.answer and picture.shape == e.picture.shape and (picture == e.picture).all()


def test_where_a_task_has_to_think_that_is_given_and_decoded_with_the_rest(vocab, codebook):
    rng = random.Random(0)
    for task, times in (("steps", 1), ("reason", 0)):
        some = [WORLD.example(rng, task) for _ in range(3)]
        batch = vocab.batch(some, codebook.encode(pictures_of(some)))
        assert ((batch.tokens == SPECIAL.index("<think>")).sum(1) == times).all()
        assert evaluation.decode(vocab, codebook, task, batch, batch.target) == [e.answer for e in some]


def test_a_model_that_answers_from_the_key_masters_every_task_and_a_task_that_is_no_part_is_null(evaluator, vocab, codebook, monkeypatch):
    def filled(model, batch, *args, group=1, **kwargs):
        return batch.repeat(group).target

    monkeypatch.setattr(evaluation, "sample", filled)
    evaluator.source = WORLD
    clip = CLIP(vocab.n_text, width=32, heads=2)
    further = evaluation.measure(evaluator, clip, 12)[0]
    evaluator.source = World()
    plain = evaluation.measure(evaluator, clip, 12)[0]
    cells = {name: cell for group in further.values() for name, cell in group.items()}
    names = [name for name, cell in cells.items() if cell and name.startswith(("story", "tell", "plan", "hops", "steps", "visual"))]
    assert all(cells[name]["value"] == (0 if name == "steps_worked" else 1) for name in names)  # no reference works three hops out
    assert [cells[f"steps_{k}"]["n"] + cells[f"steps_{3 - k}"]["n"] for k in (1, 2)] == [12, 12] and cells["steps_3"]["n"] == 12
    assert all(plain[group][name] is None for group in plain for name in plain[group] if name in names)
    assert all(cells[name] == cell for group in plain.values() for name, cell in group.items() if name not in (*names, "visual"))


def test_the_nll_of_texts_is_that_of_a_loop_over_tokens(evaluator, model, vocab):
    examples, nll, tokens = evaluator.examples("text", 7), [], []
    for e in examples:
        ids = [BOS, SPECIAL.index("<text>"), *vocab.encode(e.answer), EOS]
        logits = model(torch.tensor([ids]), torch.full((1, len(ids)), -1))[0] @ model.embed.weight.T
        losses = [-logits[t - 1, EOS : vocab.n_text].log_softmax(-1)[ids[t] - EOS].item() for t in range(2, len(ids))]
        nll, tokens = nll + [sum(losses)], tokens + [len(losses)]
    found = evaluator.text_nll(7)
    assert found["value"] == pytest.approx(sum(nll) / sum(tokens), abs=2e-4) and found["n"] == 7
    assert found["low"] < found["value"] < found["high"]


# ---------------------------------------------------------------- retrieval and the Frechet distance


def test_text_likelihoods_given_pictures_are_those_of_whole_sequences(evaluator, model, vocab, codebook):
    examples = World().lookalikes(random.Random(0), 5)
    found = evaluator.caption_logprobs(examples, [e.answer for e in examples])
    assert found.shape == (5, 5)
    for i, j in ((0, 0), (1, 3), (4, 2)):
        batch = vocab.batch([examples[i]._replace(answer=examples[j].answer)], codebook.encode(examples[i].picture[None]))
        logits = (model(batch.target, batch.patch) @ model.embed.weight.T)[0, :-1, EOS : vocab.n_text].log_softmax(-1)
        chosen = batch.mask[0, 1:]
        own = logits[chosen].gather(1, batch.target[0, 1:][chosen][:, None] - EOS).sum()
        assert float(found[i, j]) == pytest.approx(own.item(), abs=1e-4)


def test_a_text_that_is_likely_everywhere_does_not_win_and_what_is_also_true_is_no_candidate():
    likely = np.log([[0.9, 0.5, 0.1], [0.9, 0.8, 0.1], [0.9, 0.1, 0.3]])  # text 0 says nothing: likely for every picture
    none = np.zeros((3, 3), bool)
    assert evaluation.ranked_first(likely, none).tolist() == [[False, True, True], [True, True, True]]
    also = none.copy()
    also[0, 1] = True  # picture 0 is also rightly described by text 1
    assert evaluation.ranked_first(likely, also)[0].tolist() == [True, True, True]


def test_an_untrained_model_retrieves_at_the_level_of_chance_and_a_perfect_one_always(evaluator, monkeypatch):
    i2t, t2i, chance = evaluator.retrieval(256)
    assert len(i2t) == len(t2i) == 256 and 1 / 64 <= chance < 0.05 and i2t.mean() < 0.15 and t2i.mean() < 0.15
    monkeypatch.setattr(evaluator, "caption_logprobs", lambda examples, texts: torch.eye(len(texts)).double())
    assert all(right.all() for right in evaluator.retrieval(128)[:2])


def test_candidates_for_retrieval_come_in_families_one_edit_apart_and_say_the_truth():
    examples = World().lookalikes(random.Random(0), 64)
    assert evaluation.WorldJudge().caption(examples, [e.answer for e in examples]).all()
    near = [sum(x.truth[0] != e.truth[0] and len(set(x.truth[0]) ^ set(e.truth[0])) <= 4 for x in examples) for e in examples]
    assert len(examples) == 64 and np.mean(near) > 7


def test_the_frechet_distance_is_that_of_gaussians_and_zero_to_itself():
    rng, D = np.random.default_rng(0), 5
    a, b = (rng.normal(size=(400, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D) for _ in range(2))
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c @ d).real.clip(min=0)).sum()  # the same trace, by the eigenvalues of the product
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * root
    assert evaluation.frechet(a, b) == pytest.approx(expected, rel=1e-9) and evaluation.frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert abs(evaluation.frechet(a, a)) < 1e-9 and evaluation.frechet(a, a + 2) == pytest.approx(4 * D)


def test_splits_and_seeds_have_other_scenes_and_pools_are_taken_in_turn(model, vocab, codebook):
    def asked(split, seed):
        return evaluation.Evaluator(model, vocab, codebook, World(), None, split, seed).examples("draw", 20, ("three", "prompted"))

    def prompts(split, seed):
        return tuple(e.prompt for e in asked(split, seed))

    assert prompts("val", 0) == prompts("val", 0)
    assert len({prompts(split, seed) for split in ("val", "test") for seed in (0, 1)}) == 4
    assert [len(e.truth[0]) for e in asked("test", 0)] == [3, 2] * 10


def test_outputs_do_not_depend_on_what_was_asked_before_and_batches_are_joined(evaluator, vocab, codebook, model):
    examples = evaluator.examples("draw", 10)
    first, again = evaluator.outputs(examples, seed=1), evaluator.outputs(examples, seed=1)
    assert first.shape == (10, 32, 32, 3) and first.dtype == np.uint8 and (first == again).all()
    assert (first != evaluator.outputs(examples, seed=2)).any()
    small = evaluation.Evaluator(model, vocab, codebook, World(), None, batch=4)
    assert (small.outputs(examples, temperature=0.0) == evaluator.outputs(examples, temperature=0.0)).all()


def test_a_model_that_answers_from_the_key_is_always_right(evaluator, vocab, codebook, monkeypatch):
    """The sampler is replaced by one that fills in the reference: what is left is the bookkeeping of answers and fronts."""
    monkeypatch.setattr(evaluation, "sample", lambda model, batch, *args: batch.target.repeat_interleave(args[-1], 0))
    for task in ("ask", "reason", "caption"):
        assert evaluator.answers(task, 12).all()
    rows = evaluator.front(("paired",), (0.5, 1.0), prompts=3, group=2)
    assert rows == [{"temperature": t, "compose": 1.0, "diversity": 0.5, "differ": 0.0, "distance": 0.0} for t in (0.5, 1.0)]
    monkeypatch.setattr(evaluation, "sample", lambda model, batch, *args: torch.where(batch.target == EOS, PAD, batch.target.roll(1, 0)))
    assert not evaluator.answers("caption", 12).all()


def test_real_questions_are_reported_whole_beside_the_majority_and_sentence_by_sentence(asked, model, vocab, codebook, monkeypatch):
    """Every answer is the key's, but for the second of NLVR's rows: what is left is the bookkeeping."""
    said = {}
    for source, judge in evaluation.judges({"data": "shapes,nlvr", "data_dir": asked, "jitter": 0, "tasks": "ask,reason"}):
        e = evaluation.Evaluator(model, vocab, codebook, source, judge)
        monkeypatch.setattr(e, "outputs", lambda examples, temperature: [
            "false" if x.truth == "there is a tower." else x.answer for x in examples])
        found, breakdown, items = evaluation.measure(e, None, 100)
        said |= {m: (c["value"], c.get("chance"), c["n"]) for group in found.values() for m, c in group.items() if c}
        if source.name == "shapes":
            assert said.pop("vqa_val") == said.pop("multihop_val") and said.pop("multihop") == said["vqa"]
    assert said.pop("vqa") == (1.0, 0.5, 8)
    assert said == {f"{metric}{end}": value for metric in ("visual", "multihop") for end, value in (
        ("", (0.6667, 0.6667, 3)), ("_val", (1.0, 0.6667, 3)), ("_consistency", (0.5, 0.5, 2)))}  # fmt: skip


def test_a_data_set_without_drawings_has_a_table_without_a_front(asked, model, vocab, codebook):
    results = {}
    for source, judge in evaluation.judges({"data": "shapes,nlvr", "data_dir": asked, "jitter": 0, "tasks": "reason"}):
        vocab = Vocabulary.train(source.texts(random.Random(0), 2000), vocab.n_codes, vocab.n_patches)
        model = Transformer(ModelConfig(vocab.size, codebook.side, 32, 1, 2))
        results[source.name] = evaluation.evaluate({"base": model, "aligned": model}, vocab, codebook, source, judge, None, 3)
    text = evaluation.tables({"sources": results, "meta": {"data": "shapes,nlvr"}})
    found = re.findall("^(\\w+)(?: |$)", text, re.M)
    assert found == ["shapes", "vqa", "vqa_val", "multihop", "multihop_val", "in",
                     "nlvr", "visual", "visual_val", "visual_consistency", "multihop", "multihop_val", "multihop_consistency",
                     "in"]  # fmt: skip
    assert evaluation.tables(results["shapes"] | {"meta": {"data": "shapes"}}) == evaluation.table(results["shapes"])
    cells = {m: c for group in results["nlvr"]["aligned"].values() for m, c in group.items()}
    assert cells["visual"]["n"] == 3 and cells["compose"] is cells["text_nll"] is None and results["nlvr"]["sweep"]["base"] == []


def test_a_front_has_a_row_for_each_temperature(evaluator):
    rows = evaluator.front(("paired",), (0.1, 1.0), prompts=2, group=2)
    assert [row["temperature"] for row in rows] == [0.1, 1.0] and all(0 <= row["compose"] <= 1 for row in rows)


# ---------------------------------------------------------------- a finished run


@pytest.fixture
def copy(smoke, tmp_path):
    return shutil.copytree(smoke, tmp_path / "copy")


def loaded(folder, name="aligned"):
    config, codebook, vocab = evaluation.load_run(folder)
    return evaluation.load_model(folder, vocab, codebook, config, name)


def test_a_run_loads_as_it_was_saved(smoke):
    config, codebook, vocab = evaluation.load_run(smoke)
    weights = load_file(str(smoke / "aligned.safetensors"))
    assert config["preset"] == "smoke" and codebook.side == 4 and vocab.n_codes == len(codebook.entries)
    assert all(torch.equal(weights[k], v) for k, v in loaded(smoke).state_dict().items())


def spoil(file, how):
    path = file / "aligned.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "no safetensors at all":
        path.write_bytes(b"PK\x03\x04 not weights")
    else:
        weights = load_file(str(path))
        name = "norm.gain"
        weights[name] = {"not finite": weights[name] * math.nan, "another width": weights[name][:-1]}[how].contiguous()
        save_file(weights, str(path))


@pytest.mark.parametrize("how, message", {
    "missing": "is not there: has this stage finished", "cut short": "cannot be used", "no safetensors at all": "cannot be used",
    "not finite": "holds weights that are not finite", "another width": "cannot be used .*norm.gain"}.items())  # fmt: skip
def test_a_checkpoint_that_cannot_be_used_is_one_line_that_names_it(copy, how, message):
    spoil(copy, how)
    with pytest.raises(ValueError, match=rf"aligned.safetensors {message}") as error:
        loaded(copy)
    assert "\n" not in str(error.value)




@pytest.mark.parametrize("file, content", [
    ("config.json", None), ("config.json", b"{"), ("codebook.safetensors", None), pytest.param("config.json", b"{}"),
    pytest.param("codebook.safetensors", b"nonsense"), pytest.param("tokenizer.json", None),
    pytest.param("tokenizer.json", b"{}"), pytest.param("words.json", None)])  # fmt: skip
def test_a_folder_that_holds_no_whole_run_is_one_line_that_names_it(copy, file, content):
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    with pytest.raises(ValueError, match="copy is not a finished run") as error:
        evaluation.load_run(copy)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the command line


def test_the_table_of_a_run_has_base_beside_aligned_and_its_numbers_go_to_a_file(smoke, tmp_path, command):
    done = command("eval.py", "--run", smoke, "--json", tmp_path / "numbers.json")
    stored = json.loads((smoke / "eval.json").read_text())
    assert done.status == 0 and json.loads((tmp_path / "numbers.json").read_text()) == stored
    header, *rows = done.out.splitlines()
    assert header.split() == ["base", "aligned"]
    cells = {row.split()[0]: row for row in rows if row}
    for metric in ("vqa", "compose", "multihop", "text_nll"):
        for name in ("base", "aligned"):
            assert f"{next(g[metric] for g in stored[name].values() if metric in g)['value']:.3f}" in cells[metric]
    assert "story" not in cells and {"0.1", "0.3", "1.0"} <= set(cells)


def test_a_run_that_was_never_measured_is_measured_now(copy, tmp_path, command):
    (copy / "eval.json").unlink()
    config = json.loads((copy / "config.json").read_text()) | {"eval_items": 4, "eval_prompts": 2}
    (copy / "config.json").write_text(json.dumps(config))
    assert command("eval.py", "--run", copy, "--json", tmp_path / "numbers.json", "--device", "cpu").status == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["aligned"]["understanding"]["vqa"]["n"] == 4
    assert [row["temperature"] for row in found["sweep"]["base"]] == [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]


def copies(smoke, tmp_path, diversity):
    """Two more runs with the smoke run's numbers, of both methods and two seeds; their diversity is the one given."""
    for method, seed in (("lvrpo", 0), ("unified", 1)):
        result = json.loads((smoke / "eval.json").read_text())
        result["meta"] |= {"method": method, "seed": seed}
        for name in ("base", "aligned"):
            cell = {"value": diversity, "low": None, "high": None, "n": 9}
            result[name]["generation"] |= {"diversity": cell, "diversity_heldout": cell}
        folder = tmp_path / method
        folder.mkdir()
        (folder / "eval.json").write_text(json.dumps(result))
        yield folder


def test_runs_are_compared_method_by_method_and_seed_by_seed(smoke, tmp_path, command):
    done = command("eval.py", "--compare", *copies(smoke, tmp_path, 0.5))
    header, *lines = done.out.splitlines()
    assert done.status == 0
    assert re.split("  +", header.strip()) == ["lvrpo (n=1)", "unified (n=1)", "base (n=2)", "lvrpo - unified", "lvrpo - base"]
    result = json.loads((smoke / "eval.json").read_text())
    base, aligned = (result[name]["language"]["text_nll"]["value"] for name in ("base", "aligned"))
    nll = next(re.split("  +", line) for line in lines if line.startswith("text_nll"))[1:]
    assert nll == [f"{aligned:.3f}", f"{aligned:.3f}", f"{base:.3f} ± 0.000", "-", f"{aligned - base:.3f}"]  # "-": no seed in common


def test_runs_on_several_data_sets_are_compared_on_each(smoke, tmp_path, command):
    folders = []
    for folder in copies(smoke, tmp_path, 0.5):
        result = json.loads((folder / "eval.json").read_text())
        asked = json.loads(json.dumps(result)) | {"sweep": {"base": [], "aligned": []}, "best_temperature": {}}
        (folder / "eval.json").write_text(json.dumps(result | {"sources": {"synthetic": result, "shapes": asked}}))
        folders.append(folder)
    parts = command("eval.py", "--compare", *folders).out.split("\n\n")
    assert [part.splitlines()[0] for part in parts] == ["synthetic", "shapes"] and all("\nvqa " in part for part in parts)
    assert "@ best T" in parts[0] and "@" not in parts[1]


def test_clothes_which_have_no_prompts_of_three_objects_are_compared_as_well(smoke, tmp_path, command):
    folders = list(copies(smoke, tmp_path, 0.5))
    for path in (folder / "eval.json" for folder in folders):
        result = json.loads(path.read_text())
        result["meta"]["seed"] = 0
        result["sweep"] = {m: [{"temperature": t, "compose": 0.5, "diversity": 0.5} for t in (0.1, 1.0)] for m in ("base", "aligned")}
        path.write_text(json.dumps(result))
    done = command("eval.py", "--compare", *folders)
    assert done.status == 0 and "compose @ diversity" in done.out and "compose_heldout @" not in done.out


def test_runs_without_any_diversity_are_compared_as_well(smoke, tmp_path, command):
    done = command("eval.py", "--compare", *copies(smoke, tmp_path, None))
    assert done.status == 0 and not re.search("^diversity ", done.out, re.M)


FRONT = [{"compose": 0.9, "diversity": 0.2}, {"compose": 0.7, "diversity": 0.6}, {"compose": 0.8, "diversity": None}]


@pytest.mark.parametrize("diversity, quality", [(0.1, 0.9), (0.2, 0.9), (0.3, 0.85), (0.6, 0.7), (0.61, None)])
def test_quality_at_a_diversity_is_read_off_the_front(diversity, quality):
    assert evaluation.quality_at(FRONT, diversity) == quality
    assert evaluation.quality_at([{f"{k}_x": v for k, v in row.items()} for row in FRONT], diversity, "_x") == quality


def test_a_drawing_is_saved_and_the_same_seed_draws_the_same(smoke, tmp_path, command):
    pictures, prompt = [], "a red circle left of a blue square"
    for i, seed in enumerate((1, 1, 2)):
        flags = "--seed", seed, "--temperature", 1, "--out", tmp_path / f"{i}.png"
        done = command("eval.py", "--run", smoke, "--draw", prompt, *flags)
        assert done.status == 0 and prompt in done.out
        pictures.append(np.asarray(Image.open(tmp_path / f"{i}.png")))
    assert pictures[0].shape == (256, 256, 3)
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()
    assert (pictures[0] == pictures[0][::8, ::8].repeat(8, 0).repeat(8, 1)).all()  # 32x32, enlarged without smoothing


@pytest.mark.parametrize("question, task", [
    ("what color is the circle ?", "ask"), ("what color is the shape below the red circle ?", "reason")])  # fmt: skip
def test_a_question_gets_the_models_most_likely_answer(smoke, tmp_path, command, question, task):
    Image.fromarray(render([CIRCLE, SQUARE])).resize((256, 256), Image.Resampling.NEAREST).save(tmp_path / "picture.png")
    done = command("eval.py", "--run", smoke, "--ask", question, "--image", tmp_path / "picture.png")
    config, codebook, vocab = evaluation.load_run(smoke)
    picture = render([CIRCLE, SQUARE])
    batch = vocab.batch([Example(task, picture, question, "")], codebook.encode(picture[None]))
    tokens = sample(loaded(smoke), batch, vocab, temperature=0)
    assert done.status == 0 and done.out.rstrip("\n") == evaluation.decode(vocab, codebook, task, batch, tokens)[0]


# ---------------------------------------------------------------- ablations


def test_an_ablation_trains_its_variants_from_one_base_and_shares_the_default(tmp_path, monkeypatch):
    started = {}

    def instead(out, **flags):
        started.setdefault(out.name, flags)
        cell = lambda v: {"value": v}  # noqa: E731
        cells = {m: cell(0.5) for m in ("compose", "diversity", "vqa", "text_nll")}
        result = {"aligned": {"all": cells}, "meta": {"seconds": {"grpo": 1.0}}}
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").write_text(json.dumps(result))
        kl = flags.get("kl_coef", 0.02)
        steps = "".join(f"grpo,{s},{-1 - kl - s / 10},{kl + s}\n" for s in range(8))
        (out / "metrics.csv").write_text("stage,step,reward_draw,kl_draw\n" + steps)
        return out

    monkeypatch.setattr(evaluation, "trained", instead)
    names = ("preset", "device", "data", "data_dir", "tasks", "width", "layers", "heads", "patch", "codes", "jitter", "clip_width")
    config = dict.fromkeys(names, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = evaluation.ablate("kl", tmp_path, tmp_path / "out", seeds=2, jobs=2)
    assert len(started) == 2 + 4 * 2 and started["default-0"]["base"] == tmp_path
    assert started["kl_coef-0.2-1"]["base"] == tmp_path / "out" / "default-1" and started["kl_coef-0.2-1"]["seed"] == 1
    lines = (tmp_path / "out" / "kl.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 * 2 and lines[0].startswith("variant,seed,reward,KL,compose") and "no spread" not in lines[0]
    assert lines[-1].split(",")[:2] == ["0.2", "1"] and float(lines[-1].split(",")[3]) == pytest.approx(0.2 + 6.5)  # the last quarter
    assert "0.02" in text and (tmp_path / "out" / "kl.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["group", "reward", "pairs"])
def test_every_variant_of_every_ablation_starts(tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr(evaluation, "trained", lambda out, **flags: started.append(flags) or out)
    monkeypatch.setattr(evaluation, "outcome", lambda folder: {"compose": 0.5})
    names = ("preset", "device", "data", "data_dir", "tasks", "width", "layers", "heads", "patch", "codes", "jitter", "clip_width")
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(names, 1)))
    (tmp_path / "out").mkdir()
    evaluation.ablate(name, tmp_path, tmp_path / "out", seeds=1)
    for change in evaluation.ABLATIONS[name].values():
        assert any(flags | change == flags for flags in started)


def test_the_variants_of_an_ablation_are_what_their_names_say():
    for name, change in evaluation.ABLATIONS["group"].items():
        flags = {"group_size": 8, "prompts": 16} | change
        assert name == f"{flags['group_size']} x {flags['prompts']} prompts"
    for name, change in evaluation.ABLATIONS["kl"].items():
        assert float(name) == change.get("kl_coef", 0.02)


def test_the_group_mean_takes_noise_out_of_the_gradient(smoke):
    found = evaluation.gradient_noise(smoke, groups=(2, 8), samples=32, repeats=6)
    assert set(found) == {(g, b) for g in (2, 8) for b in ("none", "batch", "group")}
    assert 0 < found[8, "group"][0] < found[8, "none"][0]  # rewards are log-probabilities: without a mean, all is discouraged


def test_the_report_of_a_run_is_one_page_that_needs_no_other_file(smoke):
    page = (smoke / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and not re.search(r'(src|href)="(?!data:)', page)
    result = json.loads((smoke / "eval.json").read_text())
    assert f"{result['aligned']['understanding']['vqa']['value']:.3f} [" in page and "lvrpo, seed 0" in page
    assert all(html.escape(w) in page for w in result["meta"]["health"]) and "&quot;grpo_steps&quot;: 4" in page
