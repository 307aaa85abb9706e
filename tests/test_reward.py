"""The CLIP reward, the rule rewards, and the check of their validity."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import NOISE, Example, World, render, sample_scene
from reward import CLIP, FLOOR, Rewards, agreement, clip_loss, clip_score, exact_match, match_logprob, text_ids, well_formed
from train import make_optimizers

TEXTS = ["a red circle", "a big blue square above a green triangle", "a red circle"]


@pytest.fixture(scope="module")
def clip(vocab):
    torch.manual_seed(0)
    return CLIP(vocab.n_text, width=32, heads=2).eval()


@pytest.fixture(scope="module")
def pictures():
    rng = random.Random(0)
    return np.stack([render(sample_scene(rng)) for _ in range(6)])


def score(image, words):
    """(R1) in plain loops: patches (P, D) and words (W, D) as lists of unit vectors."""
    dot = [[sum(a * b for a, b in zip(w, p)) for p in image] for w in words]
    by_word = sum(max(row) for row in dot) / len(words)
    by_patch = sum(max(column) for column in zip(*dot)) / len(image)
    return (by_word + by_patch) / 2


# ---------------------------------------------------------------- the CLIP


def test_similarity_is_the_mean_of_both_ways_of_matching_parts(clip):
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(3, 4, 5), dim=-1), F.normalize(torch.randn(2, 3, 5), dim=-1)
    text[1, 2] = 0  # the second text has two words
    by_loop = [[score(x.tolist(), t.tolist()) for t in (text[0], text[1, :2])] for x in image]
    torch.testing.assert_close(clip.similarity(image, text), torch.tensor(by_loop))
    own = torch.stack([text, text.flip(0), text])  # (N, M, W, D): the second picture has its texts in the other order
    expected = torch.tensor(by_loop)
    expected[1] = expected[1].flip(0)
    torch.testing.assert_close(clip.similarity(image, own, pairs="n"), expected)


def test_a_text_is_padded_without_any_change_to_it(clip, vocab, pictures):
    alone, padded = text_ids(vocab, TEXTS[:1]), text_ids(vocab, TEXTS)[:1]
    assert padded.shape[1] > alone.shape[1] == 3
    words = clip.text(padded)
    torch.testing.assert_close(words[:, :3], clip.text(alone))
    assert (words[:, 3:] == 0).all()
    image = clip.image(pictures)
    torch.testing.assert_close(clip.similarity(image, words), clip.similarity(image, clip.text(alone)))


def test_every_patch_and_every_word_is_a_unit_vector(clip, vocab, pictures):
    image, words = clip.image(pictures), clip.text(text_ids(vocab, TEXTS))
    assert image.shape == (6, 16, 32) and words.shape == (3, 8, 32)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(6, 16))
    torch.testing.assert_close(words.norm(dim=-1).sum(1), torch.tensor([3.0, 8.0, 3.0]))


def test_a_patch_knows_its_place_and_a_word_its_order(clip, vocab):
    uniform = np.full((1, 32, 32, 3), 99, np.uint8)
    image = clip.image(uniform)[0]
    assert torch.pdist(image).min() > 1e-3
    one, other = clip.text(text_ids(vocab, ["a red circle above a blue square", "a blue square above a red circle"])).mean(1)
    assert (one - other).abs().max() > 1e-3


def test_a_picture_vector_is_the_direction_of_the_mean_patch(clip, pictures):
    mean = clip.image(pictures).mean(1)
    torch.testing.assert_close(clip.embed_image(pictures), mean / mean.norm(dim=1, keepdim=True))


EDITED = [["a red square", "a blue circle"], ["a big blue square", "a red circle"], ["a green circle", "a red triangle"]]


def test_the_contrastive_loss_is_that_of_a_hand_calculation_with_equal_captions_as_positives(clip, vocab, pictures):
    loss, first = clip_loss(clip, pictures[:3], text_ids(vocab, TEXTS), text_ids(vocab, sum(EDITED, [])))
    image, scale = clip.image(pictures[:3]).tolist(), clip.log_scale.exp().item()

    def e(i, text):
        return math.exp(scale * score(image[i], clip.text(text_ids(vocab, [text]))[0].tolist()))

    positives = [(0, 2), (1,), (0, 2)]  # pictures 0 and 2 have the same caption
    every = [[e(i, t) for t in TEXTS + EDITED[i]] for i in range(3)]  # all captions, and the edits of a picture's own
    rows = [-math.log(sum(every[i][j] for j in positives[i]) / sum(every[i])) for i in range(3)]
    columns = [-math.log(sum(every[i][j] for i in positives[j]) / sum(every[i][j] for i in range(3))) for j in range(3)]
    assert float(loss.detach()) == pytest.approx((sum(rows) + sum(columns)) / 6, abs=1e-5)
    assert float(first) == pytest.approx(sum(every[i].index(max(every[i])) in positives[i] for i in range(3)) / 3)


def test_equal_captions_cost_nothing_but_what_their_edits_cost(clip, vocab, pictures):
    caption, edit = "a red circle", "a red square"
    loss, _ = clip_loss(clip, pictures[:2], text_ids(vocab, [caption] * 2), text_ids(vocab, [edit] * 2))
    c, d = (clip.log_scale.exp() * clip.similarity(clip.image(pictures[:2]), clip.text(text_ids(vocab, [caption, edit])))).T
    torch.testing.assert_close(loss, 0.5 * torch.log(1 + (d - c).exp() / 2).mean())  # -log 2c / (2c + d), and -log 1 for columns


def test_a_few_steps_teach_which_caption_belongs_to_which_picture(vocab):
    rng, world = random.Random(0), World()
    some = {e.prompt: e for e in (world.example(rng, "draw") for _ in range(16))}.values()
    pictures, ids = np.stack([e.picture for e in some]), text_ids(vocab, [e.prompt for e in some])
    torch.manual_seed(0)
    clip, ranked = CLIP(vocab.n_text, width=32, layers=1), []
    optimizers = make_optimizers(clip, 3e-3)
    for _ in range(50):
        edited = text_ids(vocab, [text for e in some for text in world.negatives(rng, e.prompt, 2)])
        loss, first = clip_loss(clip, pictures, ids, edited)
        clip.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        ranked.append(float(first))
    assert ranked[0] < 0.3 and np.mean(ranked[-5:]) > 0.7


# ---------------------------------------------------------------- the reward of a picture and its text


def test_the_reward_is_the_log_share_of_the_caption_among_its_edits(clip, vocab, pictures):
    texts, edits = TEXTS[:2], [["a blue circle", "a red square"], ["a big blue square below a green triangle", "a big blue square"]]
    r = match_logprob(clip, vocab, pictures[:4], texts, edits)  # two prompts, a group of two pictures each
    image, scale = clip.image(pictures[:4]).tolist(), clip.log_scale.exp().item()
    for i in range(4):
        words = [clip.text(text_ids(vocab, [t]))[0].tolist() for t in (texts[i // 2], *edits[i // 2])]
        e = [math.exp(scale * score(image[i], w)) for w in words]
        assert float(r[i]) == pytest.approx(math.log(e[0] / sum(e)), abs=1e-5)


def test_the_reward_lies_between_the_floor_and_zero_however_sure_the_clip_is(vocab, pictures):
    torch.manual_seed(0)
    sure = CLIP(vocab.n_text, width=32, heads=2)
    with torch.no_grad():
        sure.log_scale.fill_(math.log(500.0))
    texts = ["a red circle", "a green triangle", "a big yellow square", "a blue circle", "a red square", "a small red circle"]
    edits = [[t for t in texts if t != own] for own in texts]
    r = match_logprob(sure, vocab, pictures, texts, edits)
    assert r.min() == FLOOR and r.max() <= 0 and r.unique().numel() > 1
    swapped = match_logprob(sure, vocab, pictures[:1].repeat(6, 0), texts, edits)
    assert (swapped > -1e-3).sum() == 1  # one picture, six texts: it is sure of one of them


def test_the_reported_score_is_the_plain_similarity_of_each_picture_and_its_own_text(clip, vocab, pictures):
    texts = [*TEXTS[:2], "a small yellow square", "a big red circle", "a blue circle", "a green triangle"]
    matrix = clip.similarity(clip.image(pictures), clip.text(text_ids(vocab, texts)))
    torch.testing.assert_close(clip_score(clip, vocab, pictures, texts), matrix.diagonal())


def test_no_reward_carries_a_gradient(clip, vocab, pictures):
    assert not match_logprob(clip, vocab, pictures, TEXTS[:2], [["a circle"]] * 2).requires_grad
    assert not clip_score(clip, vocab, pictures[:3], TEXTS).requires_grad


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("text, key, value", [
    ("red", "red", 1), ("blue", "red", 0), ("", "red", 0), ("red blue", "red", 0), ("top-left", "left", 0),
    ("<think> red circle : top left </think> blue", "<think> x </think> blue", 1),
    ("<think> blue </think> red", "<think> x </think> blue", 0)])  # fmt: skip
def test_an_answer_is_right_if_its_last_word_is(text, key, value):
    assert exact_match(text, key) == value


@pytest.mark.parametrize("text, value", [
    ("<think> red circle : top left . left of it : big blue square </think> blue", 1), ("<think> red circle </think> blue", 1),
    ("<think> red </think> blue", 1), ("", 0), ("blue", 0), ("<think>", 0), ("</think> <think>", 0),
    ("<think> </think> blue", 0), ("<think> red circle </think>", 0), ("<think> red circle </think> blue blue", 0),
    ("red circle </think> blue", 0), ("<think> red circle blue", 0), ("x <think> red circle </think> blue", 0),
    ("<think> <think> red circle </think> blue", 0), ("<think> red </think> circle </think> blue", 0),
    ("</think> red circle <think> blue", 0)])  # fmt: skip
def test_a_worked_answer_is_thought_then_one_word(text, value):
    assert well_formed(text) == value


# ---------------------------------------------------------------- the rewards of every task


@pytest.fixture(scope="module")
def rewards(clip, vocab):
    return Rewards(clip, vocab, n_edits=4)


@pytest.mark.parametrize("task, parts", [
    ("draw", {"clip"}), ("caption", {"clip", "format"}), ("ask", {"exact"}), ("reason", {"exact", "format"})])  # fmt: skip
def test_every_task_has_its_parts_one_number_a_candidate(rewards, pictures, task, parts):
    rng, world = random.Random(0), World()
    some = [world.example(rng, task) for _ in range(2)]
    outputs = pictures if task == "draw" else [e.answer for e in some for _ in range(3)]
    found = rewards(world, task, some, outputs, rng)
    assert set(found) == parts == set(rewards.parts[task])
    assert all(r.shape == (2, 3) and r.dtype == torch.float32 and not r.requires_grad for r in found.values())
    if task != "draw":
        assert all((r == 1).all() for name, r in found.items() if name != "clip")  # the reference answers earn everything


def test_a_drawing_is_compared_with_its_own_prompt(rewards, clip, vocab, pictures):
    world = World()
    some = [Example("draw", None, text, "") for text in ("a red circle", "a blue square and a green triangle")]
    found = rewards(world, "draw", some, pictures[:4], random.Random(1))["clip"]
    edits = [world.negatives(again, e.prompt, 4) for again in [random.Random(1)] for e in some]
    torch.testing.assert_close(found.flatten(), match_logprob(clip, vocab, pictures[:4], [e.prompt for e in some], edits))


def test_a_malformed_caption_gets_the_floor_and_no_format_and_harms_no_other(rewards, pictures):
    some = [Example("caption", picture, "", "a red circle") for picture in pictures[:2]]
    found = rewards(World(), "caption", some, ["a red circle", "a a", "", "a blue square"], random.Random(0))
    assert found["format"].tolist() == [[1, 0], [0, 1]]
    assert (found["clip"] == FLOOR).tolist() == [[False, True], [True, False]]
    nothing = rewards(World(), "caption", some, ["circle"] * 4, random.Random(0))
    assert (nothing["clip"] == FLOOR).all() and (nothing["format"] == 0).all()


def test_a_caption_is_compared_with_the_picture_that_it_was_asked_about(rewards, clip, vocab, pictures):
    some = [Example("caption", picture, "", "") for picture in pictures[:2]]
    texts = ["a red circle", "circle", "a big blue square", "a red circle"]
    found = rewards(World(), "caption", some, texts, random.Random(5))["clip"]
    rng = random.Random(5)
    edits = [World().negatives(rng, text, rewards.n_caption_edits) for text in texts]
    for i, picture in ((0, 0), (2, 1), (3, 1)):
        alone = match_logprob(clip, vocab, pictures[picture : picture + 1], [texts[i]], [edits[i]])
        assert float(found.flatten()[i]) == pytest.approx(float(alone), abs=1e-5)


def test_only_captions_that_the_reward_finds_likelier_than_their_edits_together_are_believed(clip, vocab):
    rewards, world, rng = Rewards(clip, vocab, n_edits=1), World(), random.Random(0)
    some = [world.example(rng, task, noise=NOISE) for task in ("draw", "caption", "ask", "reason", "text") for _ in range(12)]
    believed = rewards.believes([world] * len(some), some, random.Random(1))
    again, captions = random.Random(1), 0
    for e, ok in zip(some, believed.tolist()):
        if e.task in ("draw", "caption"):
            text, captions = e.prompt + e.answer, captions + ok
            share = match_logprob(clip, vocab, e.picture[None], [text], [world.negatives(again, text, 1)]).exp()
            assert ok == (float(share) > 0.5)
        else:
            assert ok  # no caption: nothing to doubt
    assert 0 < captions < 24


def test_the_total_weighs_each_part_and_an_unknown_one_not_at_all(rewards):
    parts = {"exact": torch.tensor([[1.0, 0.0]]), "format": torch.tensor([[1.0, 1.0]]), "novelty": torch.tensor([[9.0, 9.0]])}
    torch.testing.assert_close(rewards.total(parts), torch.tensor([[1.2, 0.2]]))


# ---------------------------------------------------------------- validity


@pytest.mark.parametrize("values, right, share", [
    ([[3.0, 2.0, 1.0]], [[1, 0, 0]], 1.0), ([[1.0, 2.0, 3.0]], [[1, 0, 0]], 0.0), ([[2.0, 1.0, 3.0]], [[1, 0, 0]], 0.5),
    ([[1.0, 1.0]], [[1, 0]], 0.5), ([[1.0, 1.0, 0.0]], [[1, 0, 0]], 0.75),
    ([[5.0, 0.0], [9.0, 7.0]], [[1, 0], [0, 1]], 0.5),  # only candidates of the same prompt are compared
    ([[5.0, 0.0], [0.0, 1.0]], [[1, 0], [1, 1]], 1.0)])  # fmt: skip
def test_agreement_is_the_share_of_right_and_wrong_pairs_in_order(values, right, share):
    right = torch.tensor(right, dtype=torch.bool)
    assert agreement(torch.tensor(values), right, ~right) == share


def test_agreement_leaves_out_candidates_that_are_neither_right_nor_wrong():
    right, wrong = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    assert agreement(torch.tensor([[2.0, 1.0, 9.0]]), right, wrong) == 1


def test_agreement_is_no_number_where_nothing_can_be_compared():
    right = torch.tensor([[True] * 3, [False] * 3])
    assert math.isnan(agreement(torch.rand(2, 3), right, ~right))


def test_agreement_agrees_with_a_loop_over_pairs():
    torch.manual_seed(0)
    values, right, wrong = torch.randint(0, 4, (5, 6)).float(), torch.rand(5, 6) < 0.4, torch.rand(5, 6) < 0.4
    pairs = [(values[b, i] > values[b, j]) + 0.5 * (values[b, i] == values[b, j])
             for b in range(5) for i in range(6) for j in range(6) if right[b, i] and wrong[b, j]]  # fmt: skip
    assert agreement(values, right, wrong) == pytest.approx(float(sum(pairs)) / len(pairs))
