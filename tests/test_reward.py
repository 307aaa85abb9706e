"""The CLIP reward, the rule rewards, and the check of their validity."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORLD, example

from data import (
    FASHION_CLASSES,
    HELDOUT_PAIRS,
    KINDS,
    NOISE,
    Example,
    Object,
    World,
    edits,
    in_pool,
    pairs_of,
    parse_caption,
    render,
    sample_scene,
    scene_edits,
)
from reward import (
    CLIP,
    FLOOR,
    MIXES,
    SURE,
    PreferenceModel,
    Rewards,
    agreement,
    calibration,
    captioned,
    clip_loss,
    clip_score,
    exact_match,
    make_pairs,
    match_logprob,
    pair_accuracy,
    pair_rewards,
    preference_loss,
    rank_pairs,
    sentences_right,
    set_anchor,
    text_ids,
    well_formed,
)
from train import make_optimizers, schedule

TEXTS = ["a red circle", "a big blue square above a green triangle", "a red circle"]
GUESS = torch.tensor(-math.log(33))  # of a caption among its 32 edits


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


def test_an_edit_counts_once_and_texts_may_have_different_numbers_of_them(clip, vocab, pictures):
    texts, edits = TEXTS[:2], [["a blue circle", "a red square", "a blue circle"], ["a big blue square"]]
    together = match_logprob(clip, vocab, pictures[:2], texts, edits)
    alone = [match_logprob(clip, vocab, pictures[i : i + 1], texts[i : i + 1], [sorted(set(edits[i]))]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_reward_lies_between_the_floor_and_zero_however_sure_the_clip_is(vocab, pictures):
    torch.manual_seed(0)
    sure = CLIP(vocab.n_text, width=32, heads=2)
    with torch.no_grad():
        sure.log_scale.fill_(math.log(5000.0))
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


# ---------------------------------------------------------------- preferences


EDITS = {"color", "shape", "size", "position", "relation", "swap", "drop", "add"}  # and of scenes: twice


@pytest.fixture(scope="module")
def prefers(vocab):
    """A preference model whose every weight is random: at its start, all layers are identities."""
    torch.manual_seed(0)
    model = PreferenceModel(vocab.n_text, width=32, heads=2).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.out.weight, std=0.3), torch.nn.init.normal_(block.down.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def clean_pairs():
    return make_pairs(World(), random.Random(0), 600, noise=None)


def shown(picture):
    """The scene of a picture of the world without shifts, cell by cell."""
    looks = {render([Object(*kind, size, 0, 0)])[:16, :16].tobytes(): (*kind, size) for kind in KINDS for size in ("small", "big")}
    cells = [(looks.get(picture[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].tobytes()), r, c) for r in (0, 1) for c in (0, 1)]
    return [Object(*look, r, c) for look, r, c in cells if look]


def test_the_preference_loss_is_that_of_a_hand_calculation():
    better, worse = [2.0, -1.0, 0.5], [1.0, 1.0, 0.5]
    by_hand = sum(-math.log(math.exp(b) / (math.exp(b) + math.exp(w))) for b, w in zip(better, worse)) / 3
    assert float(preference_loss(torch.tensor(better), torch.tensor(worse))) == pytest.approx(by_hand)
    moved = preference_loss(torch.tensor(better) + 7, torch.tensor(worse) + 7)
    assert float(moved) == pytest.approx(by_hand)  # only differences count


def test_a_pair_shares_what_is_judged_and_the_better_is_true_and_the_worse_false(clean_pairs):
    assert len(clean_pairs) == 600 and all(p.clean for p in clean_pairs)
    for p in clean_pairs:
        (picture, text), (other, edited) = p.better, p.worse
        assert parse_caption(text).holds(shown(picture)) and not parse_caption(edited).holds(shown(other))
        assert (text == edited) == (p.direction == "draw") and (picture == other).all() == (p.direction == "caption")


def test_both_directions_come_equally_often_and_with_every_kind_of_edit(clean_pairs):
    for direction in ("caption", "draw"):
        some = [p for p in clean_pairs if p.direction == direction]
        assert len(some) == 300 and {p.kind for p in some} == EDITS | ({"twice"} if direction == "draw" else set())


@pytest.mark.parametrize("pool", ["paired", "three"])
def test_both_sides_stay_in_the_pool(pool):
    for p in make_pairs(World(), random.Random(1), 300, NOISE, pool):
        for picture, text in (p.better, p.worse):
            for kinds in ([o.kind for o in shown(picture)], parse_caption(text).kinds):
                assert in_pool(pool, kinds) and not pairs_of(kinds) & HELDOUT_PAIRS and len(kinds) <= (2 if pool == "paired" else 3)


def test_an_edited_caption_that_is_also_true_is_no_worse_one():
    """Of (red circle, blue circle), "a red circle and a blue shape" and, colours swapped, "a blue circle and a red shape" are
    both true: data.edits lists such an edit, no pair has it."""
    scene = [Object("red", "circle", "big", 0, 0), Object("blue", "circle", "big", 0, 1)]
    caption = parse_caption("a red circle and a blue shape")
    assert any(e.holds(scene) for kind, e in edits(caption) if kind == "swap")

    class Fixed(World):
        def example(self, *_):
            return Example("draw", render(scene), caption.text(), "", (scene, caption))

    worse = [p.worse[1] for p in make_pairs(Fixed(), random.Random(0), 400) if p.direction == "caption"]
    assert "a green circle and a blue shape" in worse and not any(parse_caption(text).holds(scene) for text in worse)


def test_a_scene_edit_changes_the_scene_by_what_its_kind_says():
    rng, seen = random.Random(0), set()
    for _ in range(60):
        scene = sample_scene(rng, "paired")
        for kind, edited in scene_edits(scene):
            seen.add(kind)
            cells = [{(o.row, o.column) for o in s} for s in (scene, edited)]
            assert len(cells[1]) == len(edited) == len({o.kind for o in edited}) + (kind == "twice")
            assert len(edited) == len(scene) + {"add": 1, "twice": 1, "drop": -1}.get(kind, 0)
            if kind in ("add", "twice", "drop"):
                assert len(set(scene) & set(edited)) == min(len(scene), len(edited))
                continue
            changed = {name for a, b in zip(scene, edited) for name in Object._fields if getattr(a, name) != getattr(b, name)}
            assert changed <= ({"row", "column"} if kind in ("position", "relation") else {"color"} if kind == "swap" else {kind})
            assert changed and (kind == "position") == (cells[0] != cells[1])
            assert sum(a != b for a, b in zip(scene, edited)) == (2 if kind in ("relation", "swap") else 1)
    assert seen == EDITS | {"twice"}


def test_noisy_captions_make_some_labels_wrong_and_the_pair_says_so():
    """About one in six: a wrong word or a reversed relation. (An omission is still true.)"""
    pairs = make_pairs(World(), random.Random(0), 1000, NOISE)
    for p in pairs:
        true = [parse_caption(text).holds(shown(picture)) for picture, text in (p.better, p.worse)]
        assert p.clean == true[0] and not all(true)
    assert 0.12 < sum(not p.clean for p in pairs) / 1000 < 0.22
    assert any(parse_caption(p.worse[1]).holds(shown(p.worse[0])) for p in pairs)  # some edits repair the caption: kept


def test_the_same_seed_gives_the_same_pairs():
    one, other = (make_pairs(World(jitter=1), random.Random(3), 40) for _ in range(2))
    for p, q in zip(one, other):
        assert p[:2] == q[:2] and p.better[1] == q.better[1] and p.worse[1] == q.worse[1] and (p.worse[0] == q.worse[0]).all()


def test_clothes_are_perturbed_to_another_class(clothes):
    for p in make_pairs(clothes, random.Random(0), 100, noise=None):
        (picture, text), (other, edited) = p.better, p.worse
        label, other_label = (round((int(x[16, 16, 0]) - 22) / 20) for x in (picture, other))
        assert p.kind == "class" and p.clean and text.split()[-1] == FASHION_CLASSES[label]
        assert (label == other_label) == (p.direction == "caption") and edited.split()[-1] != FASHION_CLASSES[other_label]
        assert text.split()[:-1] == edited.split()[:-1]
    noisy = make_pairs(clothes, random.Random(0), 200, NOISE)
    assert 0.05 < sum(not p.clean for p in noisy) / 200 < 0.25


def test_candidates_are_ranked_where_their_rewards_differ_by_the_margin():
    torch.manual_seed(0)
    rewards = torch.randint(0, 5, (6, 4)) / 4
    flat = rewards.flatten().tolist()
    by_loop = [[i, j] for i in range(24) for j in range(24) if i // 4 == j // 4 and flat[i] - flat[j] >= 0.5]
    assert sorted(rank_pairs(rewards, 0.5).tolist()) == by_loop
    assert rank_pairs(torch.tensor([[1.0, float("nan"), 1.0]]), 0.1).shape == (0, 2)
    with pytest.raises(ValueError, match="margin must be above 0"):
        rank_pairs(rewards, 0.0)


def test_padding_does_not_change_a_preference(prefers, vocab, pictures):
    alone, padded = text_ids(vocab, TEXTS[:1]), text_ids(vocab, TEXTS)[:1]
    assert padded.shape[1] > alone.shape[1]
    torch.testing.assert_close(prefers(pictures[:1], padded), prefers(pictures[:1], alone))


def test_words_and_patches_look_at_each_other_and_both_know_their_order(prefers, vocab, pictures):
    ids = text_ids(vocab, ["a red circle above a blue square", "a blue square above a red circle", "a red square above a blue circle"])
    assert torch.pdist(prefers(pictures[:1].repeat(3, 0), ids)[:, None]).min() > 1e-4
    moved = np.stack([pictures[0], np.roll(pictures[0], 8, axis=1)])
    assert (prefers(moved, ids[:1].repeat(2, 1)).diff().abs() > 1e-4).all()


def test_the_preference_reward_is_the_log_probability_to_win_against_the_anchor(prefers, vocab, pictures):
    texts = TEXTS[:2]
    prefers.anchor.fill_(0.3)
    found = prefers.score(vocab, pictures[:4], texts)  # two prompts, a group of two pictures each
    for i in range(4):
        r = float(prefers(pictures[i : i + 1], text_ids(vocab, [texts[i // 2]])).detach())
        assert float(found[i]) == pytest.approx(max(FLOOR, -math.log(1 + math.exp(0.3 - r))), abs=1e-5)
    prefers.anchor.fill_(1e3)
    assert (prefers.score(vocab, pictures[:4], texts) == FLOOR).all() and not found.requires_grad


def test_the_anchor_is_halfway_between_better_and_worse(prefers, vocab, clean_pairs):
    set_anchor(prefers, vocab, clean_pairs[:50])
    better, worse = pair_rewards(prefers, vocab, clean_pairs[:50])
    assert float(prefers.anchor) == pytest.approx(float(torch.cat((better, worse)).mean()), abs=1e-5)
    assert "anchor" in prefers.state_dict()


def test_pair_accuracy_counts_each_kind_and_direction_and_a_tie_as_half(vocab, clean_pairs):
    class LikesRed(PreferenceModel):
        def forward(self, pictures, ids):
            return (ids == vocab.encode("red")[0]).any(1).float()

    some, found = clean_pairs[:200], pair_accuracy(LikesRed(vocab.n_text), vocab, clean_pairs[:200])
    value = [0.5 + 0.5 * (("red" in p.better[1]) - ("red" in p.worse[1])) for p in some]
    assert set(found) == {"all", "caption", "draw", "twice", *EDITS, *(f"{p.direction} {p.kind}" for p in some)}
    assert found["all"] == pytest.approx(np.mean(value)) and found["draw"] == 0.5 == found["caption shape"]
    swapped = [p._replace(better=p.worse, worse=p.better) for p in some]
    assert pair_accuracy(LikesRed(vocab.n_text), vocab, swapped)["caption"] == pytest.approx(1 - found["caption"])


def trained_on_pairs(vocab, width, steps, lr):
    """A PreferenceModel after `steps` of 32 clean pairs, and its accuracy on held-out pairs."""
    torch.manual_seed(0)
    model, rng = PreferenceModel(vocab.n_text, width=width, heads=2), random.Random(1)
    optimizers = make_optimizers(model, lr)
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * schedule(step, steps, warmup=10)
        loss = preference_loss(*model.pairs(vocab, make_pairs(World(), rng, 32, noise=None)))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    return pair_accuracy(model, vocab, make_pairs(World(), random.Random(99), 600, noise=None))


def test_a_very_short_training_ranks_held_out_pairs_of_both_directions(vocab):
    """120 steps at width 32, seconds: colours (0.9), sizes and counts are learned, position and relation (0.5) have not begun.
    The 0.85 that one would want takes the longer training of the next test."""
    found = trained_on_pairs(vocab, 32, 120, 6e-3)
    assert found["all"] > 0.7 and min(found["caption"], found["draw"]) > 0.65 and found["color"] > 0.8, found


@pytest.mark.slow
def test_a_short_training_ranks_more_than_85_percent_of_held_out_pairs(vocab):
    found = trained_on_pairs(vocab, 64, 350, 4e-3)
    assert min(found["all"], found["caption"], found["draw"]) > 0.85, found


def test_calibration_is_zero_where_every_bin_wins_as_often_as_it_says():
    odds = torch.tensor([3.0, 3.0, 3.0, 1 / 3, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1 / 9, 1.0]).log()
    error, table = calibration(odds, torch.zeros(15))
    assert error == pytest.approx(0, abs=1e-6)
    assert [(round(p, 4), round(won, 4), n) for p, won, n in table] == [(0.5, 0.5, 1), (0.75, 0.75, 4), (0.9, 0.9, 10)]


def test_calibration_tells_how_far_a_sure_model_is_off():
    sure = torch.tensor([50.0, 50.0, 50.0, -50.0])
    assert calibration(sure, torch.zeros(4)) == (pytest.approx(0.25), [(1.0, 0.75, 4)])


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("text, key, value", [
    ("red", "red", 1), ("blue", "red", 0), ("", "red", 0), ("red blue", "red", 0), ("blue red", "red", 0), ("top-left", "left", 0),
    ("<think> red circle : top left </think> blue", "<think> x </think> blue", 1),
    ("<think> blue </think> red", "<think> x </think> blue", 0), ("<think> blue", "<think> x </think> blue", 0),
    ("<think>", "<think> x </think> blue", 0), ("<think> red </think> blue blue", "<think> x </think> blue", 0)])  # fmt: skip
def test_an_answer_is_right_if_it_is_all_that_stands_behind_a_thought_that_has_ended(text, key, value):
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


def reference(task, some, times):
    """The reference outputs of some examples, `times` of each, as model.decode gives them."""
    repeated = [e for e in some for _ in range(times)]
    if task == "plan":
        return [(e.answer, e.picture) for e in repeated]
    return np.stack([e.picture for e in repeated]) if task in ("draw", "story") else [e.answer for e in repeated]


@pytest.mark.parametrize("task, parts", [
    ("draw", {"clip"}), ("caption", {"clip", "format"}), ("ask", {"exact"}), ("reason", {"exact", "format"}), ("hops", {"exact"}),
    ("steps", {"exact", "format"}), ("story", {"clip"}), ("tell", {"exact"}), ("judge", {"exact"}), ("plan", {"clip"})])  # fmt: skip
def test_every_task_has_its_parts_one_number_a_candidate(rewards, task, parts):
    rng = random.Random(0)
    some = [example(rng, task) for _ in range(2)]
    found = rewards(WORLD, task, some, reference(task, some, 3), rng)
    assert set(found) == parts == set(rewards.parts[task])
    assert all(r.shape == (2, 3) and r.dtype == torch.float32 and not r.requires_grad for r in found.values())
    if task not in ("draw", "story", "plan"):
        assert all((r == 1).all() for name, r in found.items() if name != "clip")  # the reference answers earn everything


def test_a_drawing_is_compared_with_its_own_prompt(rewards, clip, vocab, pictures):
    world = World()
    some = [Example("draw", None, text, "") for text in ("a red circle", "a blue square and a green triangle")]
    found = rewards(world, "draw", some, pictures[:4], random.Random(1))["clip"]
    edits = [world.negatives(again, e.prompt, 4) for again in [random.Random(1)] for e in some]
    plain = match_logprob(clip, vocab, pictures[:4], [e.prompt for e in some], edits)
    torch.testing.assert_close(found.flatten(), plain.clamp(max=math.log(SURE)))


def test_a_story_earns_the_mean_of_what_its_frames_earn_each_compared_with_what_was_told_up_to_there(rewards, monkeypatch):
    judged = []

    def judge(pictures, texts, edits):
        judged.append((pictures, texts, edits))
        return {"clip": torch.arange(float(len(pictures)))}

    monkeypatch.setattr(rewards, "_judge", judge)
    some, group = [WORLD.example(random.Random(seed), "story") for seed in range(2)], 2
    frames = np.stack([e.picture for e in some for _ in range(group)])
    frames[1::group] = 255 - frames[1::group]  # the second candidate of each prompt
    found = rewards(WORLD, "story", some, frames, random.Random(0))["clip"]
    ((pictures, texts, edits),) = judged
    assert texts == [c.text() for e in some for c in e.truth.captions] and all(len(e) == 4 and t not in e for t, e in zip(texts, edits))
    expected = [[np.mean([6 * b + 2 * k + g for k in range(3)]) for g in range(group)] for b in range(2)]
    assert found.tolist() == expected
    for b, e in enumerate(some):
        for k in range(3):
            first, second = pictures[6 * b + 2 * k : 6 * b + 2 * k + 2]
            assert (first == e.picture[k]).all() and (second == 255 - e.picture[k]).all()


def test_a_plan_earns_what_its_picture_earns_whatever_it_says(rewards):
    some = [WORLD.example(random.Random(seed), "plan") for seed in range(2)]
    planned = [(text, e.picture) for e in some for text in (e.answer, "nonsense")]
    found, drawn = (rewards(WORLD, task, some, outputs, random.Random(1))["clip"] for task, outputs in (
        ("plan", planned), ("draw", np.stack([p for _, p in planned]))))  # fmt: skip
    assert torch.equal(found, drawn) and (found[:, 0] == found[:, 1]).all()


def test_steps_earn_nothing_but_their_form(rewards):
    e = WORLD.example(random.Random(0), "steps", "three")
    texts = [f"<think> {e.truth[2]} </think> {e.answer.split()[-1]}", f"<think> a red circle </think> {e.answer.split()[-1]}", e.answer,
             e.answer.split()[-1]]  # fmt: skip
    found = rewards(WORLD, "steps", [e], texts, random.Random(0))
    assert found["exact"].tolist() == [[1, 1, 1, 1]] and found["format"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("text, share", [
    ("a circle . b . c", 1), ("a circle . c . b", 1 / 3), ("a circle", 1 / 3), ("", 0), ("a circle . b . c . c", 3 / 4)])  # fmt: skip
def test_a_story_told_earns_the_share_of_its_sentences_that_stand_where_they_belong(text, share):
    assert sentences_right(text, "a circle . b . c") == pytest.approx(share)


def test_where_stories_are_told_every_other_caption_to_learn_from_is_all_that_is_known_of_a_frame():
    rng, frames = random.Random(0), 0
    for _ in range(400):
        e = captioned(WORLD, rng)
        scene, caption = e.truth
        assert e.task == "draw" and e.prompt == caption.text() and (e.picture == render(scene)).all() and caption.holds(scene)
        frames += all(m.cell for m in caption.mentions) and len(scene) == 2
    assert 60 < frames < 200  # only frames place both of two objects
    plain = [captioned(World(), random.Random(seed)) for seed in range(5)]
    assert [e.prompt for e in plain] == [World().example(random.Random(seed), "draw").prompt for seed in range(5)]


def test_a_reward_stops_rising_where_it_is_sure_enough(rewards, pictures, monkeypatch):
    monkeypatch.setattr(rewards, "_match", lambda *_: torch.tensor([-7.0, -1.0, -0.6, -0.1]).clamp(min=FLOOR))
    found = rewards(World(), "draw", [Example("draw", None, "a red circle", "")], pictures[:4], random.Random(0))["clip"]
    torch.testing.assert_close(found, torch.tensor([[-6.0, -1.0, math.log(0.5), math.log(0.5)]]))


def test_a_malformed_caption_is_worth_a_guess_and_no_format_and_harms_no_other(rewards, pictures):
    some = [Example("caption", picture, "", "a red circle") for picture in pictures[:2]]
    found = rewards(World(), "caption", some, ["a red circle", "a a", "", "a blue square"], random.Random(0))
    assert found["format"].tolist() == [[1, 0], [0, 1]]
    assert (found["clip"] == GUESS).tolist() == [[False, True], [True, False]]
    nothing = rewards(World(), "caption", some, ["circle"] * 4, random.Random(0))
    assert (nothing["clip"] == GUESS).all() and (nothing["format"] == 0).all()


def test_a_caption_is_compared_with_the_picture_that_it_was_asked_about(rewards, clip, vocab, pictures):
    some = [Example("caption", picture, "", "") for picture in pictures[:2]]
    texts = ["a red circle", "circle", "a big blue square", "a red circle"]
    found = rewards(World(), "caption", some, texts, random.Random(5))["clip"]
    rng = random.Random(5)
    edits = [World().negatives(rng, text, rewards.n_caption_edits) for text in texts]
    for i, picture in ((0, 0), (2, 1), (3, 1)):
        alone = match_logprob(clip, vocab, pictures[picture : picture + 1], [texts[i]], [edits[i]])
        assert float(found.flatten()[i]) == pytest.approx(float(alone), abs=1e-5)


def test_a_caption_that_leaves_out_what_an_object_is_is_worth_a_guess_and_equal_ones_earn_the_same(rewards, pictures):
    some = [Example("caption", pictures[0], "", "")]
    texts = ["a red circle", "a shape", "a red shape", "a circle", "a shape and a red circle", "a small shape", *["a red circle"] * 2]
    found = rewards(World(), "caption", some, texts, random.Random(5))
    assert (found["format"][0] == 0).tolist() == [False] + [True] * 5 + [False] * 2
    assert (found["clip"][0, 1:6] == GUESS).all() and found["clip"].min() == GUESS
    assert found["clip"][0, 0] == found["clip"][0, 6] == found["clip"][0, 7]


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


def test_a_preference_model_adds_its_part_to_what_is_drawn_and_to_captions_alone(clip, prefers, vocab, pictures):
    rng, world, both = random.Random(0), WORLD, Rewards(clip, vocab, n_edits=4, n_caption_edits=4, preference=prefers)
    for task, alone in Rewards.parts.items():
        some = [example(rng, task) for _ in range(2)]
        outputs = reference(task, some, 2)
        found = both(world, task, some, outputs, random.Random(1))
        learned = task in ("draw", "caption", "story", "plan")
        assert set(found) == set(both.parts[task]) == {*alone, *(["preference"] if learned else [])}
        without = Rewards(clip, vocab, n_edits=4, n_caption_edits=4)(world, task, some, outputs, random.Random(1))
        assert all((found[name] == without[name]).all() for name in alone)
    draw = [Example("draw", None, text, "") for text in TEXTS[:2]]
    found = both(world, "draw", draw, pictures[:4], rng)["preference"].flatten()
    torch.testing.assert_close(found, prefers.score(vocab, pictures[:4], TEXTS[:2]))


def test_a_malformed_caption_gets_no_more_of_the_preference(clip, prefers, vocab, pictures):
    prefers.anchor.fill_(0.0)
    some = [Example("caption", picture, "", "") for picture in pictures[:2]]
    both = Rewards(clip, vocab, preference=prefers)
    found = both(World(), "caption", some, ["a red circle", "a a", "", "a blue square"], random.Random(0))["preference"]
    assert found[0, 1] == found[1, 0] == GUESS
    torch.testing.assert_close(found[[0, 1], [0, 1]], prefers.score(vocab, pictures[:2], ["a red circle", "a blue square"]))


def test_weights_switch_between_rules_the_learned_reward_and_a_mix(clip, prefers, vocab):
    parts = {"clip": torch.tensor([[-1.0]]), "preference": torch.tensor([[-3.0]]), "format": torch.tensor([[1.0]])}
    totals = {name: float(Rewards(clip, vocab, preference=prefers, weights=mix).total(parts)) for name, mix in MIXES.items()}
    assert totals == pytest.approx({"rule": -0.8, "learned": -2.8, "mix": -1.8})
    assert Rewards(clip, vocab).weights == MIXES["rule"] and Rewards(clip, vocab, preference=prefers).weights == MIXES["mix"]


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
