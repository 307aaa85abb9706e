"""data.py: the synthetic world, its texts, and rows of tokens. Public data: test_data_public.py."""

import itertools
import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, WORLD
from hypothesis import given
from hypothesis import strategies as st

import data
from data import (CELLS, COLORS, COLUMNS, COUNTS, EOS, INVERSE, LAYOUTS, NOISE, PAD, ROWS, SHAPES,
                  SIZES, SPECIAL, Caption, Example, Mention, Object, edits, noisy_caption, pairs_of,
                  parse_caption, render, sample_scene, true_caption)

RELATION = "|".join(INVERSE)

# ---------------------------------------------------------------- oracles: from the words alone


def stands(a, relation, b):
    """Does `a relation b` hold? By the cells, apart from data.related."""
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[relation]
    return (a.row - b.row) * steps[0] + (a.column - b.column) * steps[1] == 1


def says(text, scene):
    """Is a caption true of a scene? Word by word, apart from Caption.holds and the judge."""
    first, *rest = re.split(rf" (and|{RELATION}) (?=a )", text)
    mentions, relation = [first, *rest[1::2]], rest[0] if rest else "and"
    for objects in itertools.permutations(scene):
        fits = len(mentions) == len(scene)
        for words, o in zip(mentions, objects):
            look = {o.color, o.shape, o.size, ROWS[o.row], COLUMNS[o.column]}
            fits = fits and set(words.split()) <= look | {"a", "shape", "at", "the"}
        if fits and (relation == "and" or stands(objects[0], relation, objects[1])):
            return True
    return False


def named_pairs(text):
    """Every pair of kinds that a text names with colour and shape."""
    return pairs_of({*re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", text)})


def scenes(n, pools=tuple(COUNTS), jitter=1, seed=0):
    rng = random.Random(seed)
    return [(pool, sample_scene(rng, pool, jitter)) for pool in pools for _ in range(n)]


# ---------------------------------------------------------------- scenes, pools, captions, noise


def test_a_picture_is_its_objects_on_the_background_and_nothing_else():
    expected = np.full((32, 32, 3), data.BACKGROUND, np.uint8)
    expected[5:12, 21:28] = COLORS["red"]  # 7 pixels in the middle of rows 0-15, columns 16-31
    expected[17:30, 3:16] = COLORS["blue"]  # 13 pixels in the cell below left; 1 right, 1 up
    red, blue = Object("red", "square", "small", 0, 1), Object("blue", "square", "big", 1, 0, 1, -1)
    assert render([red, blue]).dtype == np.uint8 and (render([red, blue]) == expected).all()


def test_pools_have_their_counts_and_pairs():
    heldout, prompted = data.HELDOUT_PAIRS, data.PROMPT_PAIRS
    assert len(heldout) == len(prompted) == 8 and not heldout & prompted
    counts = {pool: set() for pool in COUNTS}
    for pool, scene in scenes(1000):
        pairs = pairs_of([o.kind for o in scene])
        counts[pool].add(len(scene))
        assert len({o.kind for o in scene}) == len({o.cell for o in scene}) == len(scene)
        assert bool(pairs & heldout) == (pool == "heldout")
        assert bool(pairs & prompted) == (pool == "prompted") or pool in ("three", "heldout")
    assert counts == {"paired": {1, 2}, "prompted": {2}, "three": {3}, "heldout": {3}}
    prompts = Counter(WORLD.prompt_pool(random.Random(i), "draw") for i in range(2000))
    assert set(prompts) == {"paired", "prompted", "three"} and 900 < prompts["three"] < 1100
    asked = {WORLD.prompt_pool(random.Random(i), "vqa") for i in range(99)}
    assert asked == {"paired", "three"}


@pytest.mark.parametrize("pool", ["paired", "prompted", "three"])
def test_no_text_noise_story_or_false_edit_names_a_heldout_pair(pool):
    rng, pairs, false = random.Random(1), set(), set()
    for i in range(2800):
        e = WORLD.example(rng, WORLD.tasks[i % 7], pool, NOISE)
        named = named_pairs(f"{e.prompt} {e.answer}")
        if e.task == "story":  # "becomes blue": what it shows, too
            named |= pairs_of({o.kind for scene in e.truth.scenes for o in scene})
        if pool == "paired" and e.task != "text":  # plain text may tell of three objects
            assert not named & data.PROMPT_PAIRS, e
        for text in WORLD.negatives(rng, e.prompt + e.answer, 12):
            false |= named_pairs(text)
        pairs |= named
    assert len(pairs) > (7 if pool == "prompted" else 40) and len(false) > 40
    assert not (pairs | false) & data.HELDOUT_PAIRS


@pytest.mark.parametrize("jitter, size", [(0, 4), (0, 8), (1, 4), (1, 8)])
def test_every_patch_of_a_heldout_picture_occurs_in_paired_pictures(jitter, size):
    def patches(pools, n):
        pictures = np.stack([render(scene) for _, scene in scenes(n, pools, jitter, seed=n)])
        x = pictures.reshape(len(pictures), 32 // size, size, 32 // size, size, 3).swapaxes(2, 3)
        return {patch.tobytes() for patch in x.reshape(-1, size, size, 3)}

    known, needed = patches(("paired",), 3000), patches(("prompted", "three", "heldout"), 500)
    assert len(needed) > 90 and needed <= known


fields = [st.sampled_from([None, *words]) for words in (COLORS, SHAPES, SIZES, CELLS)]
mentions, nothing = st.builds(Mention, *fields), st.none()
lists = st.builds(Caption, st.lists(mentions, min_size=1, max_size=3).map(tuple), nothing)
captions = lists | st.builds(Caption, st.tuples(mentions, mentions), st.sampled_from([*INVERSE]))


@given(captions, st.sampled_from([scene for _, scene in scenes(10)]))
def test_a_caption_means_what_its_words_say(caption, scene):
    assert parse_caption(caption.text()) == caption
    assert caption.holds(scene) == says(caption.text(), scene)


def test_other_texts_are_no_captions():
    texts = "|a|a red|red circle|a circle red|a  red circle|a circle |A circle|a circle\n|<eos>|"
    texts += "a circle and|a circle a square|a circle at the left top|a red big circle|a pink one|"
    texts += " and ".join(["a circle"] * 4) + "|a circle above a square and a triangle"
    for text in texts.split("|"):
        assert parse_caption(text) is None and not WORLD.negatives(random.Random(0), text, 3), text


def test_a_caption_is_true_and_names_every_object_and_each_of_its_edits_is_false():
    rng, seen = random.Random(0), set()
    for pool, task in itertools.product(COUNTS, ("draw", "caption") * 50):
        e = WORLD.example(rng, task, pool)
        scene, caption = e.truth
        assert (e.pictures == render(scene)).all() and (e.prompt == "") == (task == "caption")
        assert e.prompt + e.answer == caption.text() and says(caption.text(), scene)
        assert caption.holds(scene) and sorted(caption.kinds) == sorted(o.kind for o in scene)
        for kind, edit in edits(caption):
            seen.add(kind)
            assert not says(edit.text(), scene), (caption.text(), edit.text())
    assert seen == {"color", "shape", "size", "position", "relation", "swap", "drop", "add"}


def test_noise_is_as_frequent_as_stated_and_never_more_often_wrong_than_right():
    rng, shares = random.Random(2), {}
    for _ in range(4000):
        true = true_caption(rng, sample_scene(rng, "paired", count=2))
        noisy, words = noisy_caption(rng, true), []
        for before, after in zip(true.mentions, noisy.mentions):
            words += [b for a, b in zip(before, after) if a != b]
        happened = {"omit": None in words, "wrong": any(words)}
        if true.relation:
            happened["unrelate"] = noisy.relation is None
        if noisy.relation:
            happened["reverse"] = noisy.relation == INVERSE[true.relation]
            assert noisy.relation in (true.relation, INVERSE[true.relation])
        story = data.sample_story(rng, noise=NOISE)
        for k, (caption, scene) in enumerate(zip(story.captions, story.scenes)):
            happened[f"frame {k}"] = not says(caption.text(), scene)
        for name, value in happened.items():
            shares.setdefault(name, []).append(value)
    shares = {name: np.mean(values) for name, values in shares.items()}
    assert 0.1 < shares.pop("wrong") <= 0.15  # an edit that leaves the pool is taken back
    for name, stated in {"omit": 0.15, "unrelate": 0.2, "reverse": 0.2}.items():
        assert abs(shares.pop(name) - stated) < 0.03
    assert len(shares) == 3 and all(0.05 < share < 0.4 for share in shares.values()), shares


@pytest.mark.parametrize("task", ["vqa", "multihop"])
def test_the_likeliest_answer_is_the_right_one_and_a_wrong_one_is_any_word_of_its_kind(task):
    learned = {}
    for seed in range(6000):
        clean, noisy = (WORLD.example(random.Random(seed), task, noise=n) for n in (None, NOISE))
        (*steps, answer), (*same, other) = clean.answer.split(), noisy.answer.split()
        assert (clean.prompt, steps) == (noisy.prompt, same)
        learned.setdefault(answer, Counter())[other] += 1
    for answer, counts in learned.items():
        (kind,) = [words for words in data.ANSWER_KINDS if answer in words]
        assert set(counts) == set(kind)
        n, right = counts.total(), counts.pop(answer)
        assert abs(right / n - 0.85) < 1.8 / n**0.5, answer
        assert max(counts.values()) < 2 * min(counts.values()) + 20, answer


# ---------------------------------------------------------------- questions, statements, stories


def worked_out(text, scene):
    """The answer to a question of the grammar, by other means than data.py's."""
    o = {f"{o.color} {o.shape}": o for o in scene}
    words = text.removesuffix(" ?").split(" ", 3)
    if text.startswith("is there a"):
        return "yes" if words[3] in o else "no"
    if text.startswith("how many"):
        return data.NUMBERS[sum(words[2] in ("shapes", f"{p.shape}s") for p in scene)]
    if m := re.fullmatch(rf"is the (.*) ({RELATION}) the (.*) \?", text):
        return "yes" if stands(o[m[1]], m[2], o[m[3]]) else "no"
    *_, color, shape = text.removesuffix(" ?").split()
    if text.startswith("what color"):
        (answer,) = [p.color for p in scene if p.shape == shape]  # the only one
        return answer
    p = o[f"{color} {shape}"]
    return p.size if text.startswith("what size") else f"{ROWS[p.row]}-{COLUMNS[p.column]}"


def test_answers_are_right_and_every_answer_occurs():
    rng, answers = random.Random(0), set()
    for pool in list(COUNTS) * 600:
        e = WORLD.example(rng, "vqa", pool)
        assert e.answer == worked_out(e.prompt, e.truth) and (e.pictures == render(e.truth)).all()
        answers.add(e.answer)
    assert answers == set(itertools.chain(*data.ANSWER_KINDS)) - set(SHAPES)


def test_a_two_hop_question_has_one_answer_and_steps_that_lead_to_it():
    rng, asked = random.Random(0), set()
    for _, scene in scenes(300, ("prompted", "three", "heldout")):
        text, steps, answer = data.multihop_question(rng, scene)
        pattern = rf"what (\w+) is the (\w+) ({RELATION}) the (\w+ \w+) \?"
        slot, noun, relation, anchor = re.fullmatch(pattern, text).groups()
        (a,) = [a for a in scene if " ".join(a.kind) == anchor]
        (o,) = [o for o in scene if stands(o, relation, a)]
        place = f"{anchor} : {ROWS[a.row]} {COLUMNS[a.column]}"
        assert steps == f"{place} . {relation} it : {o.size} {o.color} {o.shape}"
        assert answer == getattr(o, slot) and noun == ("thing" if slot == "shape" else "shape")
        asked.add((slot, relation))
    assert len(asked) == 12


HOW = {"is a": (1, 9), "is no": (0, 0), "is exactly one": (1, 1)}
HOW |= {"are two": (2, 9), "are exactly two": (2, 2), "are at least two": (2, 9)}


def counted(noun, some):
    """How many pictures, or objects, of some scenes a statement's noun names."""
    if "with" not in noun:
        return sum(says(f"a {noun}", [o]) for scene in some for o in scene)
    claim = noun.removeprefix("picture with ")
    if claim == "two shapes":
        return sum(len(scene) == 2 for scene in some)
    size = 2 if re.search(RELATION, claim) else 1
    parts = [itertools.combinations(scene, size) for scene in some]
    return sum(any(says(claim, part) for part in picture) for picture in parts)


def test_a_statement_is_labelled_rightly_and_its_words_alone_say_nothing():
    rng, labels = random.Random(0), {}
    for i in range(2400):
        e = WORLD.example(rng, "verify", tuple(COUNTS)[i % 4])
        how, noun = re.fullmatch(rf"there ({'|'.join(HOW)}) (.*)", e.prompt).groups()
        noun = noun.replace("pictures", "picture") if "with" in noun else noun.removesuffix("s")
        truth = HOW[how][0] <= counted(noun, e.truth) <= HOW[how][1]
        assert e.answer == ("true" if truth else "false"), e.prompt
        assert len(e.pictures) == len(e.truth) and not named_pairs(e.prompt)
        form = re.sub("|".join([*COLORS, *SIZES, *SHAPES, *INVERSE]), "_", noun)
        for group in (how, form, len(e.truth), (how, form)):
            labels.setdefault(group, []).append(truth)
    assert len(labels) == 6 + 5 + 2 + 30
    for group, some in labels.items():
        assert abs(np.mean(some) - 0.5) < 2.2 / len(some) ** 0.5, group


def sentence_of(gone, new):
    """What a story says when `gone`, at most one Object, became `new`; no size of a new one."""
    kind, (o, *_) = " ".join((gone or new)[0].kind), new or gone
    where = f"the {ROWS[o.row]} {COLUMNS[o.column]}"
    if not gone or not new:
        return f"the {kind} disappears" if gone else f"a {kind} appears at {where}"
    fields = [f for f, a, b in zip(Object._fields, *gone, o) if a != b]
    if fields in (["color"], ["size"]):
        return f"the {kind} becomes {getattr(o, fields[0])}"
    assert set(fields) <= {"row", "column"}
    return f"the {kind} moves to {where}"


@pytest.mark.parametrize("pool", COUNTS)
def test_a_story_changes_one_object_at_a_time_and_says_so_and_captions_keep_what_was_said(pool):
    rng, verbs, most = random.Random(0), set(), set()
    for story in (data.sample_story(rng, pool, jitter=1) for _ in range(300)):
        assert story.sentences[0] == story.captions[0].text()
        for caption, scene in zip(story.captions, story.scenes):
            assert says(caption.text(), scene) and all(m.cell for m in caption.mentions)
        for k in (1, 2):
            (a, b), (c, d) = story.scenes[k - 1 : k + 1], story.captions[k - 1 : k + 1]
            gone, new = [o for o in a if o not in b], [o for o in b if o not in a]
            plain = re.sub("a (big|small)", "a", sentence := story.sentences[k])
            assert plain == sentence_of(gone, new)
            lost, told = set(c.mentions) - set(d.mentions), set(d.mentions) - set(c.mentions)
            assert (len(lost), len(told)) == (len(gone), len(new))
            assert all(m.size or plain == sentence for m in told)
            verbs |= {*re.findall("disap|appears|moves|big$|small$|becomes", sentence)}
        most.add(max(map(len, story.scenes)))
    assert len(verbs) == 6 and most == {"paired": {1, 2}, "prompted": {2}}.get(pool, {3})


# ---------------------------------------------------------------- words, and rows of tokens


def test_every_word_of_the_grammar_is_known_and_every_text_fits_its_span(vocab):
    rng, codes = random.Random(3), torch.zeros(3, 16, dtype=torch.int64)
    for task, pool, noise, _ in itertools.product(WORLD.tasks, COUNTS, (None, NOISE), range(100)):
        e = WORLD.example(rng, task, pool, noise)
        vocab.rows(task, [e], codes[: len(e.pictures)])  # else a ValueError


def test_a_text_comes_back_from_its_tokens_up_to_the_first_eos(vocab):
    text, red = "a big red circle ? top-left", vocab.ids["red"]
    assert vocab.decode(vocab.encode(text, 9)) == text and len(vocab.encode(text, 9)) == 9
    assert vocab.decode(torch.tensor([PAD, red, vocab.n_text + 3, red, EOS, red])) == "red red"
    assert vocab.decode([EOS, red]) == vocab.decode([]) == ""
    assert vocab.words[: len(SPECIAL)] == [*SPECIAL] and vocab.size == vocab.n_text + vocab.n_codes


MAKE = """
import data, hashlib, random
rng, world = random.Random(0), data.World(1)
words = data.Vocabulary.build(world.texts(rng, 500), 9, 16).words
examples = [world.example(rng, task, noise=data.NOISE) for task in world.tasks]
pictures = hashlib.md5(data.pictures_of(examples).tobytes()).hexdigest()
print(words, [e[2:4] for e in examples], pictures, sorted(map(sorted, data.HELDOUT_PAIRS)))
"""


def test_every_process_makes_the_same_examples(capsys):
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}  # ours is another
    other = subprocess.run([sys.executable, "-c", MAKE], env=env, capture_output=True, text=True)
    exec(MAKE, {})
    assert other.stdout == capsys.readouterr().out and other.stdout.startswith("['<pad>', ")


BY_HAND = {  # prompt, answer, row. P0: codes of picture 0; P-: none; _17: so much <pad>; {}: chosen
    "draw": ("a red circle", "", "<draw> a red circle _17 <image> { P0 }"),
    "caption": ("", "a red circle", "<caption> <image> P0 <answer> { a red circle <eos> _16 }"),
    "vqa": ("where is the red circle ?", "top-left",
            "<vqa> <image> P0 where is the red circle ? _8 <answer> { top-left <eos> _1 }"),
    "multihop": ("what size is the shape below the red circle ?", "<think> below it </think> big",
                 "<multihop> <image> P0 what size is the shape below the red circle ? _4 "
                 "<answer> { <think> below it </think> big <eos> _25 }"),
    "verify": ("there is no red shape", "true", "<verify> <image> P0 <image> P1 <image> P- "
               "there is no red shape _11 <answer> { true <eos> _1 }"),
    "story": ("a circle . a red circle appears . the red circle disappears", "",
              "<story> a circle _16 <image> { P0 } a red circle appears _14 <image> { P1 } "
              "the red circle disappears _14 <image> { P2 }"),
    "text": ("", "a red circle", "<text> { a red circle <eos> _16 }"),
}  # fmt: skip


def by_hand(vocab, task, first=0):
    """The example and row: tokens, chosen, patch. Codes of picture k: first + k, one more, ..."""
    prompt, answer, row = BY_HAND[task]
    columns, chosen = [], False
    for word in row.split():
        if word in "{}":
            chosen = word == "{"
        elif word[0] == "_":
            columns += [(PAD, chosen, -1)] * int(word[1:])
        elif word[0] == "P":
            code = None if word == "P-" else vocab.n_text + first + int(word[1])
            columns += [(PAD if code is None else code + p, chosen, p) for p in range(16)]
        else:
            columns.append((vocab.ids[word], chosen, -1))
    pictures = np.zeros((max(len(re.findall(r"P\d", row)), 1), 32, 32, 3), np.uint8)
    return Example(task, pictures, prompt, answer), *map(torch.tensor, zip(*columns))


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_row_is_the_one_written_by_hand(vocab, task):
    layout, (e, tokens, chosen, patch) = vocab.layout(task), by_hand(vocab, task)
    codes = torch.arange(16) + torch.arange(len(e.pictures))[:, None]
    assert torch.equal(vocab.rows(task, [e], codes), tokens[None]) and layout.length == len(tokens)
    assert torch.equal(layout.chosen, chosen) and torch.equal(layout.patch, patch)
    assert layout.columns == chosen.nonzero()[:, 0].tolist() and layout.start == layout.columns[0]
    ids = (vocab.n_text, vocab.size) if task in ("draw", "story") else (EOS, vocab.n_text)
    assert (layout.first, layout.last, layout.draws) == (*ids, task in ("draw", "story"))


def test_examples_find_their_own_pictures_and_a_missing_one_is_padding(vocab):
    two, *_ = by_hand(vocab, "verify")
    three = two._replace(pictures=np.zeros((3, 32, 32, 3), np.uint8))
    codes = torch.arange(16) + torch.arange(8)[:, None]
    one, *others = vocab.rows("verify", [two, three, three], codes)
    assert torch.equal(one, by_hand(vocab, "verify")[1])
    for first, row in zip((2, 5), others):
        expected = by_hand(vocab, "verify", first)[1]
        expected[36:52] = codes[first + 2] + vocab.n_text
        assert torch.equal(row, expected)
    assert data.pictures_of([two, three]).shape == (5, 32, 32, 3)


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_dropped_prompt_leaves_the_frame_and_what_is_chosen(vocab, task):
    _, tokens, chosen, _ = by_hand(vocab, task)
    dropped = vocab.layout(task).drop_prompt(tokens.repeat(2, 1), torch.tensor([True, False]))
    assert torch.equal(dropped[0], torch.where(chosen | (tokens < EOS), tokens, PAD))
    assert torch.equal(dropped[1], tokens) and (task == "text" or (dropped[0] != tokens).any())
