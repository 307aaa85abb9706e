"""The synthetic world, its words and its templates. The public data sets have tests/test_data_public.py."""

import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import WORLD, every_sentence
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import (
    COLORS,
    COUNTS,
    EOS,
    INVERSE,
    KINDS,
    MAX_TEXT,
    NOISE,
    PAD,
    SHAPES,
    SIZES,
    SPECIAL,
    TEMPLATES,
    Caption,
    Example,
    Mention,
    Object,
    World,
    parse_caption,
)
from eval import holds
from reward import well_formed

DIRECTIONS = {  # independent of data.related: from the cells, once more
    "left of": lambda a, b: a.column - b.column == -1, "right of": lambda a, b: a.column - b.column == 1,
    "above": lambda a, b: a.row - b.row == -1, "below": lambda a, b: a.row - b.row == 1}  # fmt: skip


def scenes(n, pools=tuple(COUNTS), jitter=1, seed=0):
    """n scenes of each pool."""
    rng = random.Random(seed)
    return [(pool, data.sample_scene(rng, pool, jitter)) for pool in pools for _ in range(n)]


def named_pairs(text):
    """Every pair of kinds that a text names with colour and shape."""
    kinds = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", text)
    return data.pairs_of(dict.fromkeys(kinds))


# ---------------------------------------------------------------- scenes and pictures


def test_a_picture_is_its_objects_on_the_background_and_nothing_else():
    picture = data.render([Object("red", "square", "small", 0, 1), Object("blue", "square", "big", 1, 0, 1, -1)])
    expected = np.full((32, 32, 3), data.BACKGROUND, np.uint8)
    expected[5:12, 21:28] = COLORS["red"]  # 7 pixels in the middle of the cell at rows 0-15, columns 16-31
    expected[17:30, 3:16] = COLORS["blue"]  # 13 pixels in the cell at rows 16-31, columns 0-15, one to the right, one up
    assert picture.dtype == np.uint8 and (picture == expected).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", SIZES.values())
def test_an_outline_is_symmetric_and_touches_all_four_sides(shape, width):
    mask = data.shape_mask(shape, width)
    assert mask.shape == (width, width) and (mask == mask[:, ::-1]).all()
    assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
    assert mask.all() == (shape == "square")


def test_every_object_stays_inside_its_own_cell():
    for _, scene in scenes(300):
        for o in scene:
            there = (data.render([o]) != data.BACKGROUND).any(-1)
            cell = there[o.row * 16 : o.row * 16 + 16, o.column * 16 : o.column * 16 + 16]
            assert there.sum() == cell.sum() == data.shape_mask(o.shape, SIZES[o.size]).sum()


def test_the_same_generator_gives_the_same_examples_and_another_gives_others():
    def some(seed):
        rng = random.Random(seed)
        return [WORLD.example(rng, task, pool, NOISE) for task in WORLD.tasks for pool in ("paired", "three") for _ in range(3)]

    first, again, other = some(5), some(5), some(6)
    for a, b in zip(first, again):
        assert (a.picture == b.picture).all() and a._replace(picture=None) == b._replace(picture=None)
    assert sum(np.array_equal(a.picture, b.picture) for a, b in zip(first, other)) < len(first) / 2


def test_relations_hold_one_way_only():
    for _, scene in scenes(100, ("three",)):
        for a in scene:
            for b in scene:
                for relation, inverse in INVERSE.items():
                    assert data.related(a, relation, b) == DIRECTIONS[relation](a, b) == data.related(b, inverse, a)


# ---------------------------------------------------------------- pools: what is held out stays out


def test_the_two_sets_of_special_pairs_are_eight_each_and_disjoint():
    assert len(data.HELDOUT_PAIRS) == len(data.PROMPT_PAIRS) == 8 and not data.HELDOUT_PAIRS & data.PROMPT_PAIRS
    assert all(len(pair) == 2 and pair <= set(KINDS) for pair in data.HELDOUT_PAIRS | data.PROMPT_PAIRS)


def test_pools_hold_the_object_counts_and_pairs_of_the_table():
    counts = {pool: Counter() for pool in COUNTS}
    for pool, scene in scenes(1000):
        pairs = data.pairs_of(o.kind for o in scene)
        counts[pool][len(scene)] += 1
        assert len({o.kind for o in scene}) == len({(o.row, o.column) for o in scene}) == len(scene)
        assert bool(pairs & data.HELDOUT_PAIRS) == (pool == "heldout")
        if pool in ("paired", "prompted"):
            assert bool(pairs & data.PROMPT_PAIRS) == (pool == "prompted")
    table = {pool: set(map(int, n.split("-"))) for pool, n in re.findall(r"^  (\w+) +([\d-]+)  ", data.__doc__, re.M)}
    assert {pool: set(c) for pool, c in counts.items()} == table and list(table) == [*COUNTS]


@pytest.mark.parametrize("pool", ["paired", "prompted", "three"])
def test_no_text_outside_the_heldout_pool_names_a_heldout_pair(pool):
    world, rng, named = WORLD, random.Random(1), set()
    for i in range(4000):
        e = world.example(rng, world.tasks[i % len(world.tasks)], pool, NOISE)
        pairs = named_pairs(f"{e.prompt} {e.answer}")
        if pool == "paired" and e.task != "text":  # plain text may tell of three objects
            assert not pairs & data.PROMPT_PAIRS, e
        named |= pairs
        if e.task in ("draw", "caption"):
            for text in world.negatives(rng, e.prompt + e.answer, 6):
                named |= named_pairs(text)
    assert len(named) > 40 and not named & data.HELDOUT_PAIRS


def test_negatives_may_name_heldout_pairs_only_when_asked_to():
    rng, world, named = random.Random(0), World(), set()
    for _ in range(300):
        for text in world.negatives(rng, world.example(rng, "draw").prompt, 12, held_out=False):
            named |= named_pairs(text)
    assert named & data.HELDOUT_PAIRS


def test_reinforced_prompts_are_half_of_three_objects_and_never_held_out():
    rng, world = random.Random(0), World()
    for task in ("draw", "caption", "ask"):
        pools = Counter(world.prompt_pool(rng, task) for _ in range(2000))
        assert set(pools) == {"paired", "three"} | ({"prompted"} if task == "draw" else set())
        assert abs(pools["three"] / 2000 - 0.5) < 0.05


@pytest.mark.parametrize("jitter", [0, 1])
def test_every_patch_that_a_heldout_picture_needs_occurs_in_paired_pictures(jitter):
    def patches(pools, n, size):
        pictures = np.stack([data.render(scene) for _, scene in scenes(n, pools, jitter, seed=n)])
        cut = pictures.reshape(len(pictures), 32 // size, size, 32 // size, size, 3).swapaxes(2, 3)
        return {patch.tobytes() for patch in cut.reshape(-1, size, size, 3)}

    for size in (4, 8):
        known, needed = patches(("paired",), 3000, size), patches(("prompted", "three", "heldout"), 500, size)
        assert len(needed) > 90 and needed <= known


# ---------------------------------------------------------------- captions


mentions = st.builds(Mention, st.sampled_from([None, *COLORS]), st.sampled_from([None, *SHAPES]), st.sampled_from([None, *SIZES]),
                     st.sampled_from([None, (0, 0), (0, 1), (1, 0), (1, 1)]))  # fmt: skip
captions = st.one_of(st.builds(Caption, st.lists(mentions, min_size=1, max_size=3).map(tuple), st.none()),
                     st.builds(Caption, st.tuples(mentions, mentions), st.sampled_from([*INVERSE])))  # fmt: skip


@given(captions)
def test_parsing_undoes_writing(caption):
    assert data.parse_caption(caption.text()) == caption


@given(captions, st.integers(0, 40), st.sampled_from(["", "a", "red", "big", "circle", "and", "above", "at", "top", "?"]))
def test_a_text_with_a_word_lost_or_swapped_is_no_caption_or_says_what_it_says(caption, i, word):
    words = caption.text().split()
    words[i % len(words)] = word
    text = " ".join(filter(None, words))
    found = data.parse_caption(text)
    assert found is None or found.text() == text


@pytest.mark.parametrize("text", [
    "", "a", "red", "a red", "red circle", "a circle red", "a  red circle", "a red circle ", "a red circle and", "A red circle",
    "a red circle a blue square", "a red circle at the left top", "a red big circle", "a pink circle", "<eos>", "a red circle\n",
    "a red circle above a blue square and a red square", "a circle and a circle and a circle and a circle"])  # fmt: skip
def test_other_texts_are_no_captions(text):
    assert data.parse_caption(text) is None


def test_captions_are_true_of_their_scene_and_every_edit_of_one_is_false():
    rng, kinds = random.Random(0), Counter()
    for _, scene in scenes(25):
        caption = data.true_caption(rng, scene)
        assert holds(scene, caption), caption.text()
        for kind, edited in data.edits(caption):
            kinds[kind] += 1
            assert not holds(scene, edited), (kind, caption.text(), edited.text())
    assert set(kinds) == {"color", "shape", "size", "position", "relation", "swap", "drop", "add"}


@given(captions)
def test_an_edit_is_another_caption_and_changes_what_its_kind_says(caption):
    for kind, edited in data.edits(caption):
        assert edited != caption and data.parse_caption(edited.text()) == edited
        assert len(edited.mentions) - len(caption.mentions) == {"drop": -1, "add": 1}.get(kind, 0)
        assert (edited.relation != caption.relation) == (kind == "relation" or (kind in ("drop", "add") and caption.relation is not None))
        if kind != "drop":
            changed = [field for m, n in zip(caption.mentions, edited.mentions) for field, a, b in zip(m._fields, m, n) if a != b]
            assert changed == {"add": [], "relation": [], "swap": ["color", "color"], "position": ["cell"]}.get(kind, [kind])
        if kind == "swap":
            assert Counter(m.color for m in edited.mentions) == Counter(m.color for m in caption.mentions)


@given(captions, st.integers(1, 40))
def test_any_caption_has_as_many_negatives_as_are_asked_for(caption, n):
    negatives = World().negatives(random.Random(0), caption.text(), n)
    assert len(negatives) == n and caption.text() not in negatives and all(map(data.parse_caption, negatives))


def test_negatives_are_of_all_kinds_alike_and_name_no_more_objects_than_allowed():
    text = "a small red circle at the top left and a blue square"
    kinds = {e.text(): kind for kind, e in data.edits(data.parse_caption(text))}
    for seed in range(20):
        found = World().negatives(random.Random(seed), text, 14)
        of = [kinds[t] for t in found]
        assert len(set(of[:7])) == 7 and len(set(found)) == 14  # colour, shape, size, position, swap, drop, add; then again
        short = World().negatives(random.Random(seed), text, 40, longest=2)
        assert "add" not in {kinds[t] for t in short} and set(short) <= set(kinds)


def test_a_text_that_is_no_caption_has_no_negatives():
    assert World().negatives(random.Random(0), "a red red circle", 3) == []


def test_a_caption_names_colour_and_shape_of_every_object():
    rng = random.Random(0)
    for _, scene in scenes(100):
        assert sorted(data.true_caption(rng, scene).kinds) == sorted(o.kind for o in scene)


@pytest.mark.parametrize("only", [name for name in NOISE if name not in ("vague", "hasty")])
def test_each_noise_occurs_as_often_as_stated_and_changes_only_its_own_part(only):
    rng, n, changed = random.Random(2), 0, 0
    for _ in range(4000):
        caption = data.true_caption(rng, data.sample_scene(rng, "paired", count=2))
        noisy = data.noisy_caption(rng, caption, noise=dict.fromkeys(NOISE, 0.0) | {only: NOISE[only]})
        if only in ("wrong", "omit") or caption.relation:
            n, changed = n + 1, changed + (noisy != caption)
        parts = [(a, b) for m, k in zip(caption.mentions, noisy.mentions) for a, b in zip(m, k) if a != b]
        if only in ("unrelate", "reverse"):
            assert not parts and noisy.relation in (caption.relation, None if only == "unrelate" else INVERSE.get(caption.relation))
        else:
            assert len(parts) <= 1 and noisy.relation == caption.relation and all((b is None) == (only == "omit") for _, b in parts)
    below = 0.05 if only == "wrong" else 0.02  # a wrong word that would name a pair of another pool is taken back
    assert NOISE[only] - below < changed / n < NOISE[only] + 0.02


def test_vague_answers_occur_as_often_as_stated_and_are_never_false():
    world, exact = World(), {"left": ("top-left", "bottom-left"), "right": ("top-right", "bottom-right"), "some": ("two", "three")}
    could, were = 0, 0
    for i in range(4000):
        clean, noisy = (world.example(random.Random(i), "ask", noise=noise) for noise in (None, NOISE))
        assert clean.prompt == noisy.prompt and (noisy.answer == clean.answer or clean.answer in exact[noisy.answer])
        could, were = could + (data.vague(clean.answer) != clean.answer), were + (noisy.answer != clean.answer)
    assert could / 4000 > 0.15 and abs(were / could - NOISE["vague"]) < 0.05


def test_hasty_answers_occur_as_often_as_stated_and_stop_at_the_colour_that_was_read():
    world, kinds = World(), Counter()
    for i in range(3000):
        clean, noisy = (world.example(random.Random(i), "reason", noise=noise) for noise in (None, NOISE))
        color = re.fullmatch(r"what (\w+) is the .* the (\w+) \w+ \?", noisy.prompt)
        assert clean.prompt == noisy.prompt and (noisy.answer == clean.answer or color[1] == "color")
        kinds[color[1] == "color", noisy.answer != clean.answer] += 1
        if noisy.answer != clean.answer:
            first, _, rest = clean.answer.partition(" . ")
            assert noisy.answer == f"{first} </think> {color[2]}" and rest
    assert kinds[False, True] == 0 and kinds[True, False] + kinds[True, True] > 800
    assert abs(kinds[True, True] / (kinds[True, True] + kinds[True, False]) - NOISE["hasty"]) < 0.05


# ---------------------------------------------------------------- questions


def worked_out(question, scene):
    """The answer to a question of the grammar, worked out again from the scene by other means than data.py's."""
    word = r"([\w-]+)"
    if m := re.fullmatch(rf"is there a {word} {word} \?", question):
        return "yes" if m.groups() in {(o.color, o.shape) for o in scene} else "no"
    if m := re.fullmatch(rf"how many {word}s are there \?", question):
        return ["zero", "one", "two", "three"][len(scene) if m[1] == "shape" else Counter(o.shape for o in scene)[m[1]]]
    by_kind = {(o.color, o.shape): o for o in scene}
    if m := re.fullmatch(rf"what color is the {word} \?", question):
        (answer,) = [o.color for o in scene if o.shape == m[1]]  # the only one, or the question has no answer
        return answer
    if m := re.fullmatch(rf"is the {word} {word} ({'|'.join(INVERSE)}) the {word} {word} \?", question):
        return "yes" if DIRECTIONS[m[3]](by_kind[m[1], m[2]], by_kind[m[4], m[5]]) else "no"
    if m := re.fullmatch(rf"what size is the {word} {word} \?", question):
        return by_kind[m[1], m[2]].size
    if m := re.fullmatch(rf"where is the {word} {word} \?", question):
        o = by_kind[m[1], m[2]]
        return ("bottom" if o.row else "top") + ("-right" if o.column else "-left")
    raise AssertionError(f"not a question of the grammar: {question}")


def test_answers_are_right():
    rng, answers = random.Random(0), Counter()
    for _, scene in scenes(500):
        asked, answer = data.question(rng, scene)
        assert answer == worked_out(asked, scene), (asked, scene)
        answers[answer] += 1
    places = {f"{row}-{column}" for row in data.ROWS for column in data.COLUMNS}
    assert set(answers) == {"yes", "no", "zero", "one", "two", "three"} | {*COLORS, *SIZES} | places


def test_two_hop_questions_have_one_answer_and_steps_that_lead_to_it():
    rng, asked_for = random.Random(0), Counter()
    for _, scene in scenes(400, ("prompted", "three", "heldout")):
        asked, steps, answer = data.multihop_question(rng, scene)
        parts = re.fullmatch(rf"what (\w+) is the (\w+) ({'|'.join(INVERSE)}) the (\w+) (\w+) \?", asked)
        what, noun, relation, color, shape = parts.groups()
        (anchor,) = [o for o in scene if (o.color, o.shape) == (color, shape)]
        (target,) = [o for o in scene if DIRECTIONS[relation](o, anchor)]
        row, column = ("top", "bottom")[anchor.row], ("left", "right")[anchor.column]
        assert answer == {"color": target.color, "shape": target.shape, "size": target.size}[what] and noun != what
        assert steps == f"{color} {shape} : {row} {column} . {relation} it : {target.size} {target.color} {target.shape}"
        asked_for[what, relation] += 1
    assert len(asked_for) == 12


def looked_up(question, scene):
    """The answer to a question of one to three hops, worked out from its words alone."""
    what, rest = re.fullmatch(r"(where|what \w+) is the (.*) \?", question).groups()
    *hops, kind = re.split(r" the (?=(?:thing|shape|red|green|blue|yellow)\b)", rest)
    (o,) = [o for o in scene if f"{o.color} {o.shape}" == kind]
    for hop in reversed(hops):
        _, relation = hop.split(" ", 1)
        like = re.fullmatch(r"of the same (\w+) as", relation)
        (o,) = [p for p in scene if p is not o and (getattr(p, like[1]) == getattr(o, like[1]) if like else DIRECTIONS[relation](p, o))]
    return f"{data.ROWS[o.row]}-{data.COLUMNS[o.column]}" if what == "where" else getattr(o, what.split()[1])


@pytest.mark.parametrize("hops, pool", [(1, "paired"), (2, "paired"), (2, "three"), (3, "three"), (3, "heldout")])
def test_questions_of_one_to_three_hops_have_one_answer_and_steps_that_end_where_it_is(hops, pool):
    rng, asked = random.Random(0), []
    for _, scene in scenes(300, (pool,)):
        if found := data.hop_question(rng, scene, hops):
            question, steps, answer = found
            assert answer == looked_up(question, scene)
            parts = steps.split(" . ")
            assert len(parts) == hops and set(answer.split("-")) <= set(parts[-1].split())  # it can be read off the last step
            asked.append(question.split()[1])
    assert len(asked) > 80 and set(asked) == ({"size", "is"} if hops == 1 else {"size", "color", "shape"})


def test_neither_of_the_two_objects_in_question_can_be_guessed_without_the_second_hop_of_three():
    """The other object like the neighbour is the one that is named about as often as the one that is not."""
    rng, back = random.Random(0), []
    while len(back) < 600:
        found = data.hop_question(rng, data.sample_scene(rng, "three"), 3)
        if found:
            first, _, last = (part.split(" : ") for part in found[1].split(" . "))
            back.append(last[1].endswith(first[0]))
    assert 0.35 < np.mean(back) < 0.65


def test_steps_of_three_hops_are_never_shown_and_those_of_fewer_always_are():
    rng, hops = random.Random(0), Counter()
    for i in range(400):
        pool = tuple(COUNTS)[i % 4]
        direct, e = (WORLD.example(rng, task, pool) for task in ("hops", "steps"))
        scene, n, steps = e.truth
        thought = f"<think> {steps} </think>" if n < 3 else "<think> </think>"
        assert e.answer == f"{thought} {looked_up(e.prompt, scene)}"
        assert direct.answer == looked_up(direct.prompt, direct.truth[0])
        assert (n == 3) == (pool in ("three", "heldout"))
        hops[n] += 1
    assert set(hops) == {1, 2, 3}


# ---------------------------------------------------------------- stories


def retold(text):
    """What a story's sentences say of each frame, from the words alone: a list of three sorted lists of (color, shape, size, cell)."""
    first, *events = text.split(" . ")
    known, frames = {(m.color, m.shape): [m.size, m.cell] for m in parse_caption(first).mentions}, []
    for event in [None, *events]:
        if event and (m := re.fullmatch(r"a(?: (small|big))? (\w+) (\w+) appears at the (\w+) (\w+)", event)):
            assert (m[2], m[3]) not in known
            known[m[2], m[3]] = [m[1], (data.ROWS.index(m[4]), data.COLUMNS.index(m[5]))]
        elif event:
            color, shape, verb, rest = re.fullmatch(r"the (\w+) (\w+) (disappears|moves to|becomes)(.*)", event).groups()
            size, cell = known.pop((color, shape))  # it was there
            if verb == "moves to":
                row, column = rest.split()[1:]
                cell = (data.ROWS.index(row), data.COLUMNS.index(column))
            color, size = (rest.strip(), size) if rest.strip() in COLORS else (color, rest.strip() if verb == "becomes" else size)
            if verb != "disappears":
                known[color, shape] = [size, cell]
        frames.append(sorted((*kind, *said) for kind, said in known.items()) if None not in known else None)
    return frames


def told_of(pool, n=300, **how):
    rng = random.Random(0)
    return [data.sample_story(rng, pool, **how) for _ in range(n)]


@pytest.mark.parametrize("pool", COUNTS)
def test_what_each_frame_must_show_follows_from_the_words_of_its_story_and_is_true(pool):
    verbs = Counter()
    for story in told_of(pool):
        captions = [sorted((m.color, m.shape, m.size, m.cell) for m in c.mentions) for c in story.captions]
        assert retold(" . ".join(story.told)) == captions
        assert all(holds(scene, caption) for scene, caption in zip(story.scenes, story.captions))
        assert all(m.cell and m.color and m.shape for c in story.captions for m in c.mentions)
        verbs.update(re.findall(r"appears|disappears|moves|becomes (?:small|big)|becomes", " ".join(story.told)))
    assert set(verbs) == {"appears", "disappears", "moves", "becomes", "becomes small", "becomes big"}


@pytest.mark.parametrize("pool", COUNTS)
def test_one_object_changes_from_frame_to_frame_and_no_other(pool):
    for story in told_of(pool):
        assert len(story.scenes) == 3 and all(o.kind for scene in story.scenes for o in scene)
        for a, b in zip(story.scenes, story.scenes[1:]):
            gone, new = [o for o in a if o not in b], [o for o in b if o not in a]
            assert len(gone) <= 1 and len(new) <= 1 and gone + new
            assert len({o.kind for o in b}) == len({(o.row, o.column) for o in b}) == len(b)
            if gone and new:
                fields = [f for f, x, y in zip(Object._fields, gone[0], new[0]) if x != y]
                assert fields in (["color"], ["size"]) or set(fields) <= {"row", "column"}


def test_frames_have_the_objects_of_their_pool():
    for pool in COUNTS:
        most = {max(map(len, story.scenes)) for story in told_of(pool)}
        assert most <= {1, 2} if pool in ("paired", "prompted") else most == {3}


def test_a_told_story_is_the_one_that_the_frames_show_with_every_size():
    assert all(m.size for story in told_of("three", chance=1.0) for c in story.captions for m in c.mentions)
    share = np.mean([m.size is not None for story in told_of("paired") for m in story.captions[0].mentions])
    assert 0.4 < share < 0.6


def test_noise_tells_some_events_wrongly_and_never_leaves_the_frames_of_the_pool():
    clean, noisy = told_of("paired", 2000), told_of("paired", 2000, noise=dict.fromkeys(NOISE, 0.0) | {"wrong": 0.15})
    wrong = [np.mean([not all(holds(s, c) for s, c in zip(story.scenes, story.captions)) for story in some]) for some in (clean, noisy)]
    assert wrong[0] == 0 and 0.1 < wrong[1] < 0.3  # of three sentences; another outcome may be the same one
    assert all(not data.pairs_of(o.kind for o in scene) & data.HELDOUT_PAIRS for story in noisy for scene in story.scenes)


# ---------------------------------------------------------------- words


def test_every_word_of_the_grammar_is_known(vocab):
    rng = random.Random(7)
    for i in range(2000):
        e = WORLD.example(rng, WORLD.tasks[i % len(WORLD.tasks)], rng.choice(tuple(COUNTS)), NOISE)
        vocab.encode(f"{e.prompt} {e.answer}")
    (few,) = data.make_sources("synthetic", "", tasks=("draw", "story"))
    assert set("shape shapes thing ? zero disappears".split()) <= {w for text in few.texts(rng, 2000) for w in text.split()}
    vocab.encode("zero one two three yes no thing shape shapes top-left top-right bottom-left bottom-right ? : . it")


def test_text_comes_back_from_its_tokens(vocab):
    @given(st.lists(st.sampled_from(sorted(vocab.words - {"<pad>", "<eos>"})), max_size=12).map(" ".join))
    def comes_back(text):
        assert vocab.decode(vocab.encode(text)) == text

    comes_back()


def test_decoding_stops_at_the_first_eos_and_leaves_out_padding_and_codes(vocab):
    red, circle = vocab.encode("red"), vocab.encode("circle")
    assert vocab.decode([PAD, *red, vocab.n_text + 3, *circle, EOS, *red]) == "red circle"
    assert vocab.decode([]) == vocab.decode([EOS, *red]) == ""


def test_an_unknown_word_is_named_and_the_known_ones_listed(vocab):
    with pytest.raises(ValueError, match=r"unknown word\(s\) 'crimson', 'hexagon'; this model knows: .*circle") as error:
        vocab.encode("a crimson hexagon above a red circle")
    assert "\n" not in str(error.value)


def test_special_tokens_have_the_first_ids_and_cannot_be_part_of_words(vocab):
    assert [vocab.tokenizer.token_to_id(s) for s in SPECIAL] == list(range(len(SPECIAL)))
    assert vocab.words & set(SPECIAL) == {"<think>", "</think>"}  # nobody can type "<eos>" into a prompt
    assert min(min(vocab.encode(w)) for w in vocab.words - set(SPECIAL)) >= len(SPECIAL)
    assert vocab.size == vocab.n_text + vocab.n_codes


def test_a_saved_vocabulary_loads_as_the_same(vocab, tmp_path):
    vocab.save(tmp_path)
    loaded = data.Vocabulary.load(tmp_path, vocab.n_codes, vocab.n_patches)
    text = "what size is the thing left of the red circle ?"
    assert loaded.encode(text) == vocab.encode(text) and loaded.words == vocab.words and loaded.size == vocab.size


# ---------------------------------------------------------------- templates


CODES = torch.arange(16)[None] * 2  # one picture: codes 0, 2, 4, ... 30


def template(vocab, task, prompt="", answer=""):
    """The rows of a one-example Batch as lists."""
    batch = vocab.batch([Example(task, None, prompt, answer)], CODES)
    return batch, *(x[0].tolist() for x in batch)


def test_drawing_gives_the_words_and_chooses_one_code_a_patch(vocab):
    batch, tokens, target, lo, hi, patch = template(vocab, "draw", "a red circle")
    given = [1, SPECIAL.index("<draw>"), *vocab.encode("a red circle"), SPECIAL.index("<image>")]
    n = len(given)
    assert tokens == given + [-1] * 16 and target == given + [vocab.n_text + 2 * i for i in range(16)]
    assert patch == [-1] * n + list(range(16))
    assert lo[n:] == [vocab.n_text] * 16 and hi[n:] == [vocab.size] * 16
    assert batch.mask[0].tolist() == [False] * n + [True] * 16


@pytest.mark.parametrize("task, prompt, answer", [
    ("caption", "", "a red circle"), ("ask", "what color is the circle ?", "red"),
    ("reason", "what color is the shape below the red circle ?",
     "<think> red circle : top left . below it : big blue square </think> blue")])  # fmt: skip
def test_answering_gives_the_picture_and_chooses_words_up_to_eos(vocab, task, prompt, answer):
    batch, tokens, target, lo, hi, patch = template(vocab, task, prompt, answer)
    codes = [vocab.n_text + 2 * i for i in range(16)]
    given = [1, SPECIAL.index(f"<{task}>"), SPECIAL.index("<image>"), *codes, *vocab.encode(prompt), SPECIAL.index("<answer>")]
    words, n = vocab.encode(answer) + [EOS], len(given)
    assert tokens == given + [-1] * MAX_TEXT[task]
    assert target == given + words + [PAD] * (MAX_TEXT[task] - len(words))
    assert patch == [-1] * 3 + list(range(16)) + [-1] * (len(tokens) - 19)
    assert set(lo[n:]) == {EOS} and set(hi[n:]) == {vocab.n_text}  # <eos>, the marks of thought, and words; no code
    assert batch.mask[0].tolist() == [False] * n + [True] * len(words) + [False] * (MAX_TEXT[task] - len(words))


def test_plain_text_gives_nothing_but_its_name(vocab):
    batch, tokens, target, *_, patch = template(vocab, "text", "", "a red circle")
    assert tokens == [1, SPECIAL.index("<text>")] + [-1] * MAX_TEXT["text"] and set(patch) == {-1}
    assert target[2:] == vocab.encode("a red circle") + [EOS] + [PAD] * (MAX_TEXT["text"] - 4)


def test_a_mixed_batch_holds_each_template_and_padding_that_is_neither_chosen_nor_scored(vocab):
    texts = [("draw", "a circle", ""), ("ask", "is there a circle ?", "no"), ("text", "", "a circle")]
    examples = [Example(task, None, prompt, answer) for task, prompt, answer in texts]
    batch = vocab.batch(examples, CODES.expand(3, -1))
    for i, e in enumerate(examples):
        alone = vocab.batch([e], CODES)
        n = alone.tokens.shape[1]
        for name, fill in {"tokens": PAD, "target": PAD, "patch": -1}.items():
            row = getattr(batch, name)[i]
            assert (row[:n] == getattr(alone, name)[0]).all() and (row[n:] == fill).all()
        assert (batch.mask[i, :n] == alone.mask[0]).all() and not batch.mask[i, n:].any()
    assert batch.mask.sum(1).tolist() == [16, 2, 3]
    chosen = batch.target[batch.mask]
    assert (chosen >= batch.lo[batch.mask]).all() and (chosen < batch.hi[batch.mask]).all()


@pytest.mark.parametrize("n", [2, 3])
def test_several_pictures_stand_each_behind_its_mark_with_places_of_their_own(vocab, n):
    pictures = np.zeros((n, 32, 32, 3), np.uint8)
    codes = torch.arange(n * 16).view(n, 16) % 24
    batch, shown = vocab.batch([Example("judge", pictures, "is there a circle ?", "yes")], codes), []
    for k in range(n):
        shown += [SPECIAL.index("<image>"), *(codes[k] + vocab.n_text).tolist()]
    words = [SPECIAL.index("<bos>"), SPECIAL.index("<judge>"), *shown, *vocab.encode("is there a circle ?"), SPECIAL.index("<answer>")]
    assert batch.tokens[0].tolist() == words + [-1] * MAX_TEXT["judge"]
    assert batch.patch[0].tolist() == [-1, -1] + [-1, *range(16)] * n + [-1] * (len(words) - 2 - 17 * n + MAX_TEXT["judge"])


def test_a_story_gives_its_sentences_and_chooses_the_picture_after_each(vocab):
    codes = torch.arange(48).view(3, 16) % 24
    sentences = ["a circle", "a big red circle", "a red circle and a square"]
    batch = vocab.batch([Example("story", np.zeros((3, 32, 32, 3), np.uint8), " . ".join(sentences), "")], codes)
    tokens, target, patch = [SPECIAL.index("<bos>"), SPECIAL.index("<story>")], [], []
    for sentence, drawn in zip(sentences, codes):
        tokens += [*vocab.encode(sentence), SPECIAL.index("<image>"), *[-1] * 16]
        target += (drawn + vocab.n_text).tolist()
        patch += range(16)
    assert batch.tokens[0].tolist() == tokens and batch.target[0][batch.mask[0]].tolist() == target
    assert (batch.mask[0] == (batch.tokens[0] < 0)).all() and batch.patch[0][batch.mask[0]].tolist() == patch
    assert set(batch.lo[batch.mask].tolist()) == {vocab.n_text} and set(batch.hi[batch.mask].tolist()) == {vocab.size}


def test_a_plan_is_chosen_and_then_the_picture_and_packing_closes_the_gap_between_them(vocab):
    texts = ["a circle", "a big red circle and a square"]
    batch = vocab.batch([Example("plan", None, "a circle", text) for text in texts], CODES.expand(2, -1))
    packed = batch.trim()
    for row, text in zip(packed.target.tolist(), texts):
        words = [SPECIAL.index("<bos>"), SPECIAL.index("<plan>"), *vocab.encode("a circle"), SPECIAL.index("<answer>")]
        words += [*vocab.encode(text), EOS, SPECIAL.index("<image>"), *(CODES[0] + vocab.n_text).tolist()]
        assert row == words + [PAD] * (packed.target.shape[1] - len(words))
    for name in ("target", "lo", "hi", "patch"):
        assert torch.equal(getattr(packed, name)[packed.mask], getattr(batch, name)[batch.mask])
    assert packed.mask.sum(1).tolist() == [2 + 1 + 16, 7 + 1 + 16] and packed.target.shape[1] == 5 + 7 + 2 + 16


def test_the_pictures_of_mixed_examples_find_their_own_rows(vocab):
    one, three = np.zeros((32, 32, 3), np.uint8), np.zeros((3, 32, 32, 3), np.uint8)
    codes = torch.arange(5)[:, None].expand(5, 16) + 1
    texts = [("caption", one, "", "a circle"), ("tell", three, "", "a circle . a square . a circle"), ("draw", one, "a circle", "")]
    some = [Example(*text) for text in texts]
    batch = vocab.batch(some, codes)
    assert [sorted(set(row[where].tolist())) for row, where in zip(batch.target - vocab.n_text, batch.patch >= 0)] == [[1], [2, 3, 4], [5]]
    assert data.pictures_of(some).shape == (5, 32, 32, 3)


def test_trimming_cuts_only_columns_without_a_reference(vocab):
    batch = vocab.batch([Example("text", None, "", "a circle"), Example("text", None, "", "a big circle")], CODES.expand(2, -1))
    trimmed = batch.trim()
    assert trimmed.target.shape == (2, 2 + 4) and trimmed.mask.sum() == batch.mask.sum()  # <bos> <text> a big circle <eos>
    assert all((short == long[:, :6]).all() for short, long in zip(trimmed, batch))


def test_repeating_puts_the_candidates_of_one_prompt_next_to_each_other(vocab):
    batch = vocab.batch([Example("text", None, "", "a circle"), Example("draw", None, "a circle", "")], CODES.expand(2, -1))
    assert (batch.repeat(3).tokens == batch.tokens[[0, 0, 0, 1, 1, 1]]).all()


@pytest.mark.parametrize("task", ["draw", "caption"])
def test_blanking_a_row_leaves_nothing_of_what_it_is_given_but_all_that_frames_and_answers_it(vocab, task):
    batch = vocab.batch([Example(task, None, *(("a circle", "") if task == "draw" else ("", "a circle")))] * 2, CODES.expand(2, -1))
    blank = batch.blank(torch.tensor([True, False]))
    frame = {"draw": 2, "caption": 3}[task]  # <bos> <draw> a circle <image> -> codes; <bos> <caption> <image> codes <answer> -> a circle
    told = torch.arange(batch.tokens.shape[1])
    told = (told >= frame) & (told < frame + {"draw": 2, "caption": 16}[task])
    for name in ("tokens", "target"):
        before, after = getattr(batch, name), getattr(blank, name)
        assert (after[0] == torch.where(told, PAD, before[0])).all() and (after[1] == before[1]).all()
    assert (blank.mask == batch.mask).all() and (blank.lo == batch.lo).all() and (blank.patch == batch.patch).all()


def test_a_text_longer_than_its_span_is_an_error_that_shows_it(vocab):
    with pytest.raises(ValueError, match=r"the ask text has 5 tokens, more than 3: 'a big red circle'"):
        template(vocab, "ask", "where is the red circle ?", "a big red circle")


def test_every_text_of_the_world_fits_its_span(vocab):
    rng = random.Random(3)
    examples = [WORLD.example(rng, task, pool, NOISE) for task in WORLD.tasks for pool in COUNTS for _ in range(100)]
    vocab.batch(examples, CODES.expand(len(data.pictures_of(examples)), -1))


# ---------------------------------------------------------------- sources


def test_an_unpaired_task_draws_its_scene_from_the_pool_that_is_named():
    world, rng = World(), random.Random(0)
    for pool, sizes in {"paired": {1, 2}, "three": {3}}.items():
        assert {len(world.example(rng, "ask", pool).truth) for _ in range(50)} == sizes
    assert {len(world.example(rng, "reason").truth) for _ in range(50)} == {2}  # a question with two hops needs two objects


def test_a_wish_for_no_noise_is_granted():
    world, rng = World(), random.Random(0)
    for i in range(300):
        e = world.example(rng, ("draw", "caption")[i % 2], tuple(COUNTS)[i % 4])
        assert e.prompt + e.answer == e.truth[1].text() and holds(*e.truth) and (e.picture == data.render(e.truth[0])).all()


def test_sources_are_made_in_the_order_of_their_names(tmp_path):
    (world,) = data.make_sources("synthetic", tmp_path, jitter=1)
    assert world.name == "synthetic" and world.jitter == 1 and world.tasks == World.tasks
    with pytest.raises(ValueError, match="fashion_mnist"):
        data.make_sources("synthetic,fashion_mnist", tmp_path)


def test_a_source_is_limited_to_the_tasks_that_are_asked_for_and_one_that_knows_none_keeps_its_own(tmp_path):
    every, asked = (*World.tasks, *World.further), [("tell", "draw"), ("none of them",), TEMPLATES]
    assert [data.make_sources("synthetic", tmp_path, tasks=t)[0].tasks for t in asked] == [("draw", "tell"), World.tasks, every]
    assert set(every) == set(TEMPLATES)
    assert [data.tasks_of(data.NLVR, t) for t in (None, ("draw", "reason"), ("draw",))] == [data.NLVR.tasks] * 2 + [("judge",)]


def test_clothes_are_drawn_named_and_asked_about_by_their_label(clothes):
    rng = random.Random(0)
    for task in clothes.tasks * 20:
        e = clothes.example(rng, task, split=rng.choice(("train", "val", "test")))
        name = data.FASHION_CLASSES[e.truth]
        assert round((e.picture[16, 16, 0] - 20) / 20) == e.truth  # the fixture's shade of this class
        if task == "ask" and e.prompt == "what is this ?":
            assert e.answer == name
        elif task == "ask":
            assert (e.answer == "yes") == (e.prompt == f"is this a {name} ?")
        else:
            assert (e.prompt + e.answer).split()[-1] == name and (e.answer == "") == (task == "draw")
    noisy = [clothes.example(rng, "caption", noise={"wrong": 0.5}) for _ in range(400)]
    wrong = np.mean([e.answer.split()[-1] != data.FASHION_CLASSES[e.truth] for e in noisy])
    assert abs(wrong - 0.45) < 0.1  # one wrong name in ten is right by chance


def test_clothes_negatives_name_the_other_classes_in_the_same_words(clothes):
    for n in (3, 9, 12):
        found = clothes.negatives(random.Random(0), "a photo of one bag", n)
        assert len(found) == n and len(set(found)) == min(n, 9) and "a photo of one bag" not in found
        assert all(text.startswith("a photo of one ") and text.split()[-1] in data.FASHION_CLASSES for text in found)
    assert clothes.negatives(random.Random(0), "a bag bag", 3) == clothes.negatives(random.Random(0), "a red circle", 3) == []


def test_validation_clothes_are_none_of_the_training_ones(clothes):
    assert [len(clothes.splits[s][1]) for s in ("train", "val", "test")] == [20, 20, 20]
    assert not {p.tobytes() for p in clothes.splits["train"][0]} & {p.tobytes() for p in clothes.splits["val"][0]}


# ---------------------------------------------------------------- sentences that count, grids and boxes


def truth(text, scenes):
    """Is a sentence of the world true of these scenes? An oracle of its own, from the words alone."""
    how, number, noun = re.fullmatch(r"there (?:is|are) (exactly |only |at least |)(a|no|one|two|three|[123]) (.*)", text).groups()
    n = {"a": 1, "no": 0, "one": 1, "two": 2, "three": 3}.get(number) if number.isalpha() else int(number)
    said = lambda words, o: all(w in (o.color, o.shape, o.size, "shape") for w in words.removeprefix("a ").split())  # noqa: E731
    kind, _, rest = noun.partition(" with ")
    if kind in ("picture", "pictures"):
        first, relation, second = (re.split(rf" ({'|'.join(INVERSE)}) ", rest) + [None] * 2)[:3]
        fits = lambda x: any(said(first, o) and (not relation or any(  # noqa: E731
            said(second, p) and DIRECTIONS[relation](o, p) for p in x)) for o in x)
        found = sum(len(x) == 2 if rest == "two shapes" else fits(x) for x in scenes)
    else:
        words = re.sub(r"(circle|square|triangle|shape)s$", r"\1", noun)
        found = sum(said(words, o) for x in scenes for o in x)
    return found == n if how in ("exactly ", "only ") or number == "no" else found >= n


def test_statements_about_two_or_three_pictures_are_true_or_false_as_they_say_and_name_no_two_kinds():
    rng, answers, counts = random.Random(0), Counter(), Counter()
    for i in range(400):
        e = World().example(rng, "judge", tuple(COUNTS)[i % 4])
        assert e.answer == ("true" if truth(e.prompt, e.truth) else "false"), e.prompt
        assert (e.picture == np.stack([data.render(scene) for scene in e.truth])).all() and not named_pairs(e.prompt)
        answers[e.answer] += 1
        counts[len(e.truth)] += 1
    assert abs(answers["true"] - 200) < 50 and set(counts) == {2, 3}


def test_the_same_sentence_is_as_often_true_as_false():
    rng, row = random.Random(0), data.Row("", "{c} square*", lambda o, x, c: o.kind == (c, "square"), True)
    said = [data.sample_statement(rng, [row], data.WORLD_SLOTS, lambda _: [data.sample_scene(rng)])[:3] for _ in range(800)]
    assert {text for text, *_ in said if text.startswith("there is no")} == {f"there is no {c} square" for c in COLORS}
    assert abs(np.mean([label == "true" for text, _, label in said if text.startswith("there is no")]) - 0.5) < 0.15
    closed = {f"there is a {c} square" for c in COLORS}
    assert closed & {text for text, *_ in said}
    again = [data.sample_statement(rng, [row], data.WORLD_SLOTS, lambda _: [data.sample_scene(rng)], closed) for _ in range(300)]
    assert not closed & {text for text, *_ in again}


def test_a_grid_is_drawn_cell_by_cell_and_can_be_read_again():
    rng = random.Random(0)
    for _ in range(50):
        grid = data.sample_grid(rng)
        picture = data.render_grid(rng, grid)
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        for row, column in [(r, c) for r in range(3) for c in range(3)]:
            cell = picture[10 * row + 1 : 10 * row + 11, 10 * column + 1 : 10 * column + 11].astype(int)
            if (row, column) not in grid:
                assert not cell.any()
                continue
            color, shape, _ = grid[row, column]
            assert cell.sum((0, 1)).argmax() == ("red", "green", "blue").index(color)
            there = cell.max(-1) > 0
            height, width = (there.any(axis).sum() for axis in (1, 0))
            found = "triangle" if cell[5:].sum() > 1.3 * cell[:5].sum() else "square" if there.sum() == height * width else "circle"
            assert found == shape


def test_a_question_about_a_grid_is_answered_by_shifting_the_whole_grid():
    """The oracle: boolean 3x3 arrays, shifted one step at a time, with nothing coming in from outside."""
    rng, shifts = random.Random(1), {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
    for _ in range(400):
        grid, asked = data.sample_grid(rng), rng.choice(list(data.GRID_QUESTIONS))
        x, *shifted, y = re.findall(r"above|below|left of|right of|red|green|blue|circle|square|triangle", asked)
        seen, there = (np.array([[word in grid.get((r, c), ()) for c in range(3)] for r in range(3)]) for word in (x, y))
        for step in reversed(shifted):
            (down, right), padded = shifts[step], np.pad(there, 1)
            there = padded[1 - down : 4 - down, 1 - right : 4 - right]
        answer, steps = data.grid_answer(grid, asked)
        assert answer == (bool((seen & there).any()) if seen.any() else None), asked
        if steps:
            cells, *maps = np.array(steps.split()).reshape(-1, 3, 3)
            assert len(maps) == max(len(shifted), 1)
            assert ((np.char.find(cells, y) >= 0) == np.char.endswith(cells, "-x")).all()
            named = np.char.add(np.char.replace(cells, "-x", ""), np.where(seen, "-x", ""))
            assert (maps[-1] == np.where(there, named, "o")).all() and answer == ("-x" in "".join(maps[-1].flat))
            assert all(set(m.flat) <= {"x", "o"} for m in maps[:-1])
    assert len(data.GRID_QUESTIONS) == 36 * (1 + 4 + 16)


def test_boxes_hold_towers_or_items_that_do_not_overlap():
    rng = random.Random(0)
    for kind in ("towers", "items"):
        for box in (box for _ in range(60) for box in data.sample_boxes(rng, kind)):
            room = np.zeros((100, 100), int)
            for o in box:
                room[o.y : o.y + o.size, o.x : o.x + o.size] += 1
            assert room.max() == 1 and room.sum() == sum(o.size**2 for o in box)  # inside, and none on another
            if kind == "towers":
                assert [o.y for o in box] == [80, 59, 38, 17][: len(box)] and {o.x for o in box} == {40}
            picture = data.render_box(box)
            for o in (o for o in box if o.size == 30):
                middle = picture[(o.y + 15) * 32 // 100, (o.x + 15) * 32 // 100]
                assert np.abs(middle - np.array(data.NLVR_COLORS[o.color])).max() <= 1


@pytest.mark.parametrize("sentence, true", [
    ("there is exactly one tower with a blue block at the base", True), ("there are two towers with a blue block at the base", False),
    ("there is a black block over a blue block", True), ("there is a yellow block over a black block", False),
    ("there are exactly two blue blocks", True), ("there is no yellow tower", False), ("there are 2 towers with 1 blocks", None),
    ("there is one tower with exactly two blocks with a black block at the top", True), ("there are 3 towers with 2 blocks", False),
])  # fmt: skip
def test_sentences_about_towers_mean_what_they_say(sentence, true):
    block = lambda color, k: data.Item("square", color, 20, 40, 80 - 21 * k)  # noqa: E731
    boxes = [[block("blue", 0), block("black", 1)], [block("yellow", 0)], [block("black", 0), block("blue", 1), block("yellow", 2)]]
    holds = every_sentence(data.NLVR_ROWS, data.NLVR_SLOTS).get(sentence)
    assert (holds and holds(boxes)) == true


def test_what_is_reported_of_shapes_and_nlvr_is_never_trained_on_and_unknown_words_are_left_out(asked):
    rng, (shapes, nlvr) = random.Random(0), data.make_sources("shapes,nlvr", asked)
    assert {e.prompt for e in shapes.splits["train"]} == {"is a circle red", "is a red shape red"}  # val asks the third one
    assert {e.prompt for e in nlvr.splits["train"]} == {"there is a blue tower"}  # dev says the other
    assert [e.prompt for e in nlvr.splits["val"]] == ["there is a tower", "there", "there is a tower"]  # "bleu", "are 2 boxes"
    for source in (shapes, nlvr):
        seen = Counter(source.example(rng, source.tasks[0], pool).prompt for pool in ("paired", "prompted") for _ in range(500))
        assert not set(seen) & ({e.prompt for e in shapes.splits["test"] + shapes.splits["val"]} | nlvr.closed)
        assert set(seen) >= {e.prompt for e in source.splits["train"]}
        words = {w for text in source.texts(rng, 4000) for w in text.split()}
        assert words >= {w for text in seen for w in text.split()}


def test_three_quarters_of_pre_training_have_steps_and_prompts_of_alignment_have_them_where_they_are_the_task(asked):
    for source in data.make_sources("shapes,nlvr", asked):
        rng, once = random.Random(0), source.tasks[0]
        for task, pool, share in ((once, "paired", 0.75), (once, "prompted", 0), ("reason", "paired", 1), ("reason", "prompted", 1)):
            some = [source.example(rng, task, pool) for _ in range(200)]
            assert abs(np.mean([e.task == "reason" for e in some]) - share) < 0.12
            assert all(well_formed(e.answer) if e.task == "reason" else len(e.answer.split()) == 1 for e in some)
        assert {source.example(rng, "reason", split="test").task for _ in range(9)} == {"reason"}


def test_the_steps_about_a_grid_are_its_cells(asked):
    source, rng = data.Shapes(asked / "shapes"), random.Random(1)
    for e in (source.example(rng, "reason") for _ in range(100)):
        cells = e.picture[1:31, 1:31].reshape(3, 10, 3, 10, 3).swapaxes(1, 2).reshape(9, 100, 3).astype(int).sum(1)
        words = [w.removesuffix("-x") for w in e.answer.split()[1:10]]
        assert [w.split("-")[0] for w in words] == [("red", "green", "blue")[c.argmax()] if c.any() else "nothing" for c in cells]
        grid = {(k // 3, k % 3): tuple(w.split("-")) for k, w in enumerate(words) if w != "nothing"}
        answer, steps = data.grid_answer(grid, e.prompt)
        assert e.answer == f"<think> {steps} </think> {'yes' if answer else 'no'}"


def test_the_steps_about_boxes_are_the_blocks_of_towers_and_what_is_counted_and_lead_to_the_answer(asked):
    source, rng, seen = data.NLVR(asked / "nlvr"), random.Random(1), Counter()
    for e in (source.example(rng, "reason") for _ in range(150)):
        _, *steps, _, answer = e.answer.split()
        parts = re.findall(r"([a-z -]*)(\d+)", " ".join(steps))  # what is in each box, and how many count
        found = sum(int(n) for _, n in parts)
        how, number = re.match(r"there (?:is|are) (exactly |only |at least |)(\w+) ", e.prompt).groups()
        n = {"a": 1, "no": 0}.get(number, data.NUMBERS.get(number))
        assert len(parts) == 3 and answer == data.TRUTH[found == n if how in ("exactly ", "only ") or n == 0 else found >= n], e
        if "tower" in e.prompt or "block" in e.prompt:
            assert "-x" not in " ".join(steps) or [blocks.count("-x") for blocks, _ in parts] == [int(n) for _, n in parts]
            boxes = [[data.Item("square", c, 20, 40, 80 - 21 * k) for k, c in enumerate(blocks.replace("-x", "").split())]
                     for blocks, _ in parts]  # fmt: skip
            assert (np.stack([data.render_box(box) for box in boxes]) == e.picture).all()
        else:
            pixels = {tuple(pixel) for pixel in e.picture.reshape(-1, 3).tolist()}
            assert {c for c, rgb in data.NLVR_COLORS.items() if rgb in pixels} == {c for c in data.NLVR_COLORS if c in " ".join(steps)}
        seen["-" in parts[0][0].replace("-x", "")] += 1
    assert min(seen.values()) > 20


def test_boxes_of_real_rows_come_in_every_order(asked):
    nlvr, rng = data.NLVR(asked / "nlvr"), random.Random(0)
    (e, *_) = nlvr.splits["train"]
    orders = {tuple(box[0, 0].argmax() for box in nlvr.shuffled(rng, e).picture) for _ in range(100)}
    assert len(orders) == 6 and e.picture[0, 0, 0].tolist() == [255, 0, 0]
# ---------------------------------------------------------------- any batch


def test_any_batch_is_its_rows_one_by_one_and_chooses_exactly_what_its_mask_scores(vocab, codebook):
    tasks, pools = st.sampled_from(World.tasks), st.sampled_from(("paired", "three"))

    @settings(max_examples=25)
    @given(st.lists(st.tuples(tasks, pools), min_size=1, max_size=5), st.integers(0, 10**6))
    def holds_for(rows, seed):
        rng = random.Random(seed)
        examples = [World().example(rng, task, pool, NOISE) for task, pool in rows]
        codes = codebook.encode(np.stack([e.picture for e in examples]))
        batch = vocab.batch(examples, codes)
        given_, chosen, mask = batch.tokens >= 0, batch.tokens < 0, batch.mask
        assert (batch.tokens == batch.target)[given_].all() and (mask == chosen & (batch.target != PAD)).all()
        assert ((batch.lo <= batch.target) & (batch.target < batch.hi))[mask].all()
        assert (batch.patch >= 0).sum(1).tolist() == [0 if e.task == "text" else vocab.n_patches for e in examples]
        for e, row in zip(examples, range(len(examples))):
            alone = vocab.batch([e], codes[row : row + 1])
            length = alone.tokens.shape[1]
            for together, one, fill in zip(batch, alone, (PAD, PAD, 0, vocab.size, -1)):
                assert (together[row, :length] == one[0]).all() and (together[row, length:] == fill).all()
            answer = batch.target[row][mask[row]]
            said = e.answer if e.task != "draw" else ""
            assert vocab.decode(answer) == said and (e.task == "draw" or answer[-1] == EOS)
            assert e.task != "draw" or (answer - vocab.n_text == codes[row]).all()
        trimmed = batch.trim()
        assert trimmed.mask.sum() == mask.sum() and (trimmed.target == batch.target[:, : trimmed.target.shape[1]]).all()

    holds_for()
