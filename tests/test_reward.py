"""reward.py: the CLIP reward, preferences, the rules, and the check of their validity."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import WORLD, chosen_logprobs
from test_data import says, scenes

from data import (FASHION_CLASSES, KINDS, NOISE, Caption, Example, FashionMNIST, Mention,
                  Object, edits, in_pool, parse_caption, render, scene_edits)
from eval import parse
from reward import (CAPTION_EDITS, CLIP, DRAWING_EDITS, FLOOR, MIXES, REWARDS, SURE,
                    PreferenceModel, Rewards, agreement, clip_loss, clip_score, exact_match,
                    likelihood_contrast, log_multiplicity, make_pairs, match_logprob,
                    pair_accuracy, pair_rewards, preference_loss, set_anchor,
                    text_ids, well_formed)

TEXTS = ["a red circle", "a big blue square above a green triangle", "a red circle"]
GUESS = -math.log(1 + CAPTION_EDITS)


@pytest.fixture(scope="module")
def clip(vocab):
    torch.manual_seed(0)
    return CLIP(vocab.n_text, width=32, heads=2).requires_grad_(False)


@pytest.fixture
def prefers(vocab):
    torch.manual_seed(0)
    model = PreferenceModel(vocab.n_text, width=32, heads=2).requires_grad_(False)
    for block in model.blocks:  # initialised, they are identities
        block.out.weight.normal_(std=0.3)
        block.down.weight.normal_(std=0.3)
    return model


PICTURES = np.stack([render(scene) for _, scene in scenes(6, ("paired",))])


def score(clip, vocab, picture, text):
    """(R1) of one picture and one text, in plain loops."""
    image, words = clip.image(picture[None])[0], clip.text(text_ids(vocab, [text]))[0]
    dots = [[float(w @ p) for p in image] for w in words]
    by_word, by_patch = ([max(line) for line in lines] for lines in (dots, zip(*dots)))
    return sum(by_word) / len(words) / 2 + sum(by_patch) / len(image) / 2


def test_similarity_matches_words_with_patches_and_patches_with_words(clip, vocab):
    texts = TEXTS[:2]  # of 3 and 8 words: the first is padded
    expected = torch.tensor([[score(clip, vocab, p, t) for t in texts] for p in PICTURES[:2]])
    image, words = clip.image(PICTURES[:2]), clip.text(text_ids(vocab, texts))
    torch.testing.assert_close(clip.similarity(image, words), expected)  # (R1)
    own = torch.stack([words, words.flip(0)])  # each picture's own texts
    torch.testing.assert_close(clip.similarity(image, own)[1], expected[1].flip(0))
    torch.testing.assert_close(clip_score(clip, vocab, PICTURES[:2], texts), expected.diagonal())
    turned = text_ids(vocab, ["a red shape above a blue one", "a blue one above a red shape"])
    assert (clip.text(turned).mean(1).diff(dim=0).abs() > 1e-3).any()  # a word knows its place
    grey = np.full((1, 32, 32, 3), 99, np.uint8)
    assert torch.pdist(clip.image(grey)[0]).min() > 1e-3  # and a patch its own


def test_the_contrastive_loss_has_equal_captions_as_positives_and_edits_as_negatives(clip, vocab):
    edited = [["a red square", "a blue circle"], ["a blue square"] * 2, ["a circle", "a red shape"]]
    ids = text_ids(vocab, TEXTS), text_ids(vocab, sum(edited, []))
    loss, first = clip_loss(clip, PICTURES[:3], *ids)
    scale, table, total, same = clip.log_scale.exp().item(), [], 0, [(0, 2), (1,), (0, 2)]
    for picture, false in zip(PICTURES, edited):
        table.append([math.exp(scale * score(clip, vocab, picture, t)) for t in (*TEXTS, *false)])
    for i in range(3):  # pictures 0 and 2 have the same caption
        column = [row[i] for row in table]
        total -= math.log(sum(table[i][j] for j in same[i]) / sum(table[i]))
        total -= math.log(sum(column[j] for j in same[i]) / sum(column))
    assert loss.item() == pytest.approx(total / 6, abs=1e-5)  # (R2)
    right = [row.index(max(row)) in own for row, own in zip(table, same)]
    assert first.item() == pytest.approx(np.mean(right))


def test_a_match_is_the_log_share_of_a_text_among_its_different_edits(clip, vocab):
    texts, scale = TEXTS[:2], clip.log_scale.exp().item()
    edited = [["a blue circle", "a red square", "a blue circle", "a red circle"], ["a big square"]]
    r, expected = match_logprob(clip, vocab, PICTURES[:4], texts, edited), []  # two pictures each
    for i in range(4):
        choices = texts[i // 2], *(edited[0][:2] if i < 2 else edited[1])  # an edit counts once
        own, *rest = (math.exp(scale * score(clip, vocab, PICTURES[i], t)) for t in choices)
        expected.append(math.log(own / (own + sum(rest))))
    torch.testing.assert_close(r, torch.tensor(expected))  # (R3)
    turned = match_logprob(clip, vocab, PICTURES[[2, 3, 0, 1]], texts[::-1], edited[::-1])
    torch.testing.assert_close(turned, r[[2, 3, 0, 1]])
    with pytest.raises(AssertionError):
        match_logprob(clip, vocab, PICTURES[:3], texts, edited)


def test_the_reward_ends_at_the_floor_and_does_not_rise_where_it_is_sure(vocab):
    torch.manual_seed(0)
    clip, texts = CLIP(vocab.n_text, width=32, heads=2), [f"a {c} {s}" for c, s in KINDS[:6]]
    clip.log_scale.data.fill_(math.log(5000.0))
    case = PICTURES[:1].repeat(6, 0), texts, [texts] * 6  # it is sure of one of six texts
    r, used = match_logprob(clip, vocab, *case), Rewards(clip, vocab).match(*case)["clip"]
    assert r.min() == FLOOR and (r > -1e-3).sum() == 1
    torch.testing.assert_close(used, r.clamp(max=math.log(SURE)))  # (R8)


def test_false_neighbours_are_different_edits_of_all_kinds_alike():
    text = "a small red circle at the top left and a blue square"
    kinds = {e.text(): kind for kind, e in edits(parse_caption(text))}
    for rng in map(random.Random, range(100)):
        many = WORLD.negatives(rng, text, DRAWING_EDITS)
        assert len({kinds[t] for t in many[:7]}) == 7  # all but relation, then each again
        assert len(set(many)) == DRAWING_EDITS and set(many) <= set(kinds)
        assert "add" not in {kinds[t] for t in WORLD.negatives(rng, text, 40, longest=2)}


def test_an_edited_scene_is_false_and_differs_by_its_kind_and_not_by_a_pixel_more():
    changes = {"drop": (1, 0), "add": (0, 1), "twice": (0, 1), "swap": (2, 2), "relation": (2, 2)}
    changes |= dict.fromkeys(("color", "shape", "size", "position"), (1, 1))
    ways = [(scene, *edit) for _, scene in scenes(50) for edit in scene_edits(scene)]
    for scene, kind, e in ways:
        gone, new = set(scene) - set(e), set(e) - set(scene)
        assert (len(gone), len(new)) == changes[kind] and len({o.cell for o in e}) == len(e), kind
        assert len({o.kind for o in e}) == len(e) - (kind == "twice")
        assert {(o.dx, o.dy) for o in new} <= {(o.dx, o.dy) for o in scene}  # no other shifts
        assert not says(Caption(tuple(Mention(*o.kind, o.size, o.cell) for o in scene)).text(), e)
        if changes[kind] == (1, 1):
            fields = {f for f, a, b in zip(Object._fields, *gone, *new) if a != b}
            assert fields == {kind} or kind == "position" and fields <= {"row", "column"}
    assert {kind for _, kind, _ in ways} == set(changes)


@pytest.mark.parametrize("pool, noise", [("paired", None), ("three", None), ("paired", NOISE)])
def test_the_better_side_is_true_the_worse_one_false_and_both_stay_in_the_pool(pool, noise):
    kinds, clean, most = {"caption": set(), "draw": set()}, [], 2 if pool == "paired" else 3
    for i, p in enumerate(make_pairs(WORLD, random.Random(0), 400, noise, pool)):
        pictures, texts = zip(p.better, p.worse)
        better, worse = parse(np.stack(pictures))
        kinds[p.direction].add(p.kind)
        clean.append(says(texts[0], better))
        assert p.direction == ("caption", "draw")[i % 2] and p.clean == clean[-1]
        assert not (p.clean and says(texts[1], worse))
        assert (texts[0] == texts[1]) == (p.direction == "draw") == (better != worse)
        named = [parse_caption(text).kinds for text in texts]
        for some in (*named, *([o.kind for o in scene] for scene in (better, worse))):
            assert in_pool(pool, some) and len(some) <= most
    assert all(len(some) >= 5 for some in kinds.values())
    assert 0.75 < np.mean(clean) < 0.9 if noise else all(clean)  # omissions stay true


def test_clothes_are_worse_with_the_name_or_picture_of_another_class(clothes):
    source, rng, clean = FashionMNIST(clothes), random.Random(0), []
    for p in make_pairs(source, rng, 100, None) + make_pairs(source, rng, 200):
        (a, b), (name, other) = zip(*((x[16, 16, 0] // 20 - 1, t) for x, t in (p.better, p.worse)))
        name, other = (FASHION_CLASSES.index(text.split()[-1]) for text in (name, other))
        assert (a == b) == (name != other) == (p.direction == "caption")
        assert p.clean == (a == name) and not (p.clean and b == other)
        clean.append(p.clean)
    assert all(clean[:100]) and 0.75 < np.mean(clean[100:]) < 0.95


def test_the_preference_reward_is_the_log_probability_to_win_against_the_anchor(prefers, vocab):
    pairs = make_pairs(WORLD, random.Random(0), 50)
    set_anchor(prefers, vocab, pairs)
    anchor = torch.cat(pair_rewards(prefers, vocab, pairs)).mean().item()
    found = prefers.score(vocab, PICTURES[:4], TEXTS[:2])  # two pictures each, one text padded
    for i in range(4):
        r = prefers(PICTURES[i : i + 1], text_ids(vocab, [TEXTS[i // 2]])).item()
        assert found[i].item() == pytest.approx(-math.log1p(math.exp(anchor - r)), abs=1e-5)  # (R7)
    assert "anchor" in prefers.state_dict()  # saved with the weights
    prefers.anchor += 1e3
    assert (prefers.score(vocab, PICTURES[:4], TEXTS[:2]) == FLOOR).all()


def test_a_short_training_ranks_pairs_that_were_never_seen(vocab):
    torch.manual_seed(0)
    model, rng = PreferenceModel(vocab.n_text, width=32, heads=2), random.Random(1)
    unseen = make_pairs(WORLD, random.Random(99), 400, noise=None)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    for _ in range(100):
        optimizer.zero_grad()
        preference_loss(*model.pairs(vocab, make_pairs(WORLD, rng, 48, noise=None))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = pair_accuracy(model, vocab, unseen)
    assert after["all"] > 0.65 and after["color"] > 0.7, after  # relation takes longer


ANSWERS = {  # text: (is its answer blue?, is it one thought, then one word?)
    "<think> a </think> blue": (1, 1), "<think> blue </think> red": (0, 1), "blue": (1, 0),
    "": (0, 0), "dark-blue": (0, 0), "blue blue": (0, 0), "<think> a </think> blue blue": (0, 0),
    "<think> blue": (0, 0), "<think> blue </think>": (0, 0), "<think> </think> blue": (1, 0),
    "a <think> b </think> blue": (1, 0), "<think> <think> a </think> blue": (1, 0),
    "<think> a </think> b </think> blue": (1, 0), "</think> <think> blue": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_all_that_stands_behind_a_finished_thought(text):  # (R4)
    assert (exact_match(text, "<think> x </think> blue"), well_formed(text)) == ANSWERS[text]


def outputs_of(examples):
    """Their reference outputs, as model.outputs gives them."""
    answers = [e.answer for e in examples]
    return answers if any(answers) else np.stack([e.pictures for e in examples])


@pytest.mark.parametrize("task", REWARDS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_task_has_its_parts_and_the_mix_weighs_them(clip, prefers, vocab, task, mix):
    a, b = (WORLD.example(random.Random(i), task) for i in range(2))
    rewards = Rewards(clip, vocab, None if mix == "rule" else prefers, MIXES[mix])
    total, parts = rewards(WORLD, task, [a, b], outputs_of([a, a, a, b, b, b]), random.Random(0))
    expected = {"clip", "preference"} if task in ("draw", "story", "caption") else {"exact"}
    expected |= {"format"} if task in ("caption", "multihop") else set()
    assert set(parts) == expected - ({"preference"} if mix == "rule" else set())
    assert total.shape == (2, 3) and total.dtype == torch.float32
    rule, learned = {"rule": (1, 0), "learned": (0, 1), "mix": (0.5, 0.5)}[mix]
    weights = {"clip": rule, "preference": learned, "exact": 1, "format": 0.2}
    torch.testing.assert_close(total, sum(weights[name] * r for name, r in parts.items()))
    assert all((parts[name] == 1).all() for name in parts.keys() & {"exact", "format"})


@pytest.mark.parametrize("task", ["draw", "caption", "story"])
def test_a_reward_is_that_of_its_own_example_frame_and_text(clip, vocab, task, monkeypatch):
    """One by one. A story earns the mean over frames, each against all that was said up to it."""
    for name in ("DRAWING_EDITS", "CAPTION_EDITS"):
        monkeypatch.setattr(f"reward.{name}", 99)  # all edits: no chance is left
    rewards, chance = Rewards(clip, vocab), random.Random(0)
    a, b, c = (WORLD.example(random.Random(i), task) for i in range(3))
    outputs = outputs_of([a, b, b, c, c, a])  # of a, a, b, b, c, c: right, wrong, right, ...
    found = rewards(WORLD, task, [a, b, c], outputs, chance)[1]["clip"].flatten().tolist()
    for r, e, output in zip(found, [a, a, b, b, c, c], outputs):
        cases, kind = [(e, [output])], "caption" if task == "caption" else "draw"
        if task != "caption":
            texts = [e.prompt] if task == "draw" else [k.text() for k in e.truth.captions]
            cases = [(e._replace(prompt=t), p[None, None]) for t, p in zip(texts, output)]
        each = [rewards(WORLD, kind, [one], out, chance)[1]["clip"].item() for one, out in cases]
        assert r == pytest.approx(np.mean(each), abs=1e-4)
    assert len(set(found)) > 3


def test_an_answer_is_compared_with_the_key_of_its_own_question(clip, vocab):
    e = WORLD.example(random.Random(0), "vqa")
    some = [e._replace(answer=answer) for answer in ("red", "two")]
    _, parts = Rewards(clip, vocab)(WORLD, "vqa", some, ["red", "two", "red", "two"], None)
    assert parts["exact"].tolist() == [[1, 0], [0, 1]]


def test_what_is_no_whole_caption_earns_a_guess_and_harms_no_other(clip, vocab):
    some = [WORLD.example(random.Random(i), "caption") for i in range(2)]
    texts = ["a red circle", "a shape", "", "a circle", "a red shape and a red circle", "a a"]
    texts += ["a blue square", "circle", "a small red", "a blue circle", "a circle and", "a shape"]
    total, parts = Rewards(clip, vocab)(WORLD, "caption", some, texts, random.Random(0))
    whole = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]]) > 0
    assert torch.equal(parts["format"], whole.float()) and parts["clip"].min() > GUESS - 1e-6
    torch.testing.assert_close(parts["clip"][~whole], torch.full((9,), GUESS))
    assert total[whole].min() > total[~whole].max()


def test_agreement_is_the_share_of_right_and_wrong_pairs_of_a_prompt_in_order():
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (5, 6), generator=rng).float()
    state = torch.randint(0, 3, (5, 6), generator=rng)  # right, wrong, neither
    ordered = []
    for b, i, j in itertools.product(range(5), range(6), range(6)):
        if state[b, i] == 0 and state[b, j] == 1:
            a, c = values[b, i].item(), values[b, j].item()
            ordered.append((a > c) + 0.5 * (a == c))
    assert agreement(values, state == 0, state == 1) == pytest.approx(np.mean(ordered))  # (R5)
    assert math.isnan(agreement(values, state == 0, state == 7))


@torch.no_grad()
def test_the_contrast_is_the_share_of_a_texts_likelihood_among_its_edits(model, vocab, codebook):
    texts, edited = ["a red circle", "a big blue square"], [["a red square", "a circle"], []]
    pictures = PICTURES[:4]  # two a text
    found = likelihood_contrast(model, vocab, codebook, pictures, texts, edited)
    codes = codebook.encode(pictures)

    def logprob(i, text):
        example = Example("draw", pictures[i : i + 1], text, "")
        (row,) = vocab.rows("draw", [example], codes[i : i + 1])
        return sum(chosen_logprobs(model, vocab.layout("draw"), row))

    for i in range(4):
        every = [logprob(i, text) for text in (texts[i // 2], *edited[i // 2])]
        expected = every[0] - math.log(sum(map(math.exp, every)))
        assert found[i].item() == pytest.approx(max(expected, FLOOR), abs=1e-6)


def test_a_drawing_loses_by_how_many_of_its_group_share_it():
    a, b = PICTURES[:2]
    found = log_multiplicity(np.stack([a, b, a, a, a, b, b, b, a]), 3)  # groups aba, aab, bba
    expected = [2, 1, 2, 2, 2, 1, 2, 2, 1]
    assert found.exp().tolist() == pytest.approx(expected)


def test_drawings_are_rewarded_by_clip_contrast_and_rarity(clip, vocab, model, codebook):
    some = [WORLD.example(random.Random(i), "draw") for i in range(2)]
    drawings, how = outputs_of([some[0], some[0], some[1], some[0]]), (model.float(), codebook)
    rewards = Rewards(clip, vocab, None, MIXES["rule"], *how, contrast=0.25, rarity=0.5)
    total, parts = rewards(WORLD, "draw", some, drawings, random.Random(0))
    assert set(parts) == {"clip", "contrast", "rarity"} and total.shape == (2, 2)
    assert parts["rarity"].tolist() == [[pytest.approx(-math.log(2))] * 2, [0, 0]]
    assert (parts["contrast"] <= math.log(SURE) + 1e-6).all()
    expected = 0.75 * parts["clip"] + 0.25 * parts["contrast"] + 0.5 * parts["rarity"]
    assert torch.allclose(total, expected)
    captions = [WORLD.example(random.Random(i), "caption") for i in range(2)]
    total, parts = rewards(WORLD, "caption", captions, ["a circle"] * 4, random.Random(0))
    assert set(parts) == {"clip", "format"}
