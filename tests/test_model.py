"""The codebook, the transformer and the sampler."""

import contextlib
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import EOS, IMAGE, MAX_TEXT, PAD, TEMPLATES, Batch, pictures_of, render, sample_scene
from model import (
    Codebook,
    ModelConfig,
    RMSNorm,
    Transformer,
    completion_mask,
    completion_states,
    first_choices,
    pick_device,
    recorded,
    rotate,
    rotation,
    sample,
    tails,
)

TASKS = tuple(TEMPLATES)


def lively(vocab, codebook, width=32, layers=2, heads=4, seed=0):
    """A model whose every weight is random: as it is initialised all layers are identities, and much would hold trivially."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab.size, codebook.side, width, layers, heads))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def model(vocab, codebook):
    return lively(vocab, codebook)


def examples(tasks=TASKS, n=3, seed=0):
    rng = random.Random(seed)
    return [example(rng, task) for _ in range(n) for task in tasks]


def batch_of(vocab, codebook, *args, **kwargs):
    some = examples(*args, **kwargs)
    return vocab.batch(some, codebook.encode(pictures_of(some)))


# ---------------------------------------------------------------- where to run


def test_a_device_that_is_absent_is_an_error_that_lists_those_present():
    with pytest.raises(ValueError, match="--device abacus: not available here; use one of auto.*cpu"):
        pick_device("abacus")
    device, dtype, reason = pick_device("cpu")
    assert device.type == "cpu" and dtype == torch.float32 and reason == "cpu (as asked), float32 matrix products"


# ---------------------------------------------------------------- codebook


def test_the_codebook_is_lossless_on_the_world(codebook):
    rng = random.Random(0)
    pictures = np.stack([render(sample_scene(rng, pool)) for pool in ("paired", "three", "heldout") for _ in range(100)])
    codes = codebook.encode(pictures)
    assert codes.shape == (300, 16) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < len(codebook.entries)
    assert (codebook.decode(codes).numpy() == pictures).all() and codebook.psnr(pictures) == math.inf


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_codes_number_the_patches_row_by_row_and_every_code_decodes_to_itself(patch):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    book = Codebook.fit(pictures, 1024, patch)
    side = 32 // patch
    codes = book.encode(pictures).view(2, side, side)
    for row, column in ((0, 0), (0, 1), (1, 0), (side - 1, side - 1)):
        there = pictures[1, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert (book.entries[codes[1, row, column]].numpy() == there.reshape(-1)).all()
    every = torch.randperm(len(book.entries))[: 2 * side * side].view(2, -1)
    assert (book.encode(book.decode(every)) == every).all()


def test_any_codes_come_back_from_their_picture_and_any_scene_from_its_codes(codebook):
    some = st.lists(st.integers(0, len(codebook.entries) - 1), min_size=16, max_size=16)

    @settings(max_examples=30)
    @given(some, st.integers(0, 10**6), st.sampled_from(("paired", "three", "heldout")))
    def comes_back(codes, seed, pool):
        assert codebook.encode(codebook.decode(torch.tensor([codes]))).tolist() == [codes]
        picture = render(sample_scene(random.Random(seed), pool))[None]
        assert (codebook.decode(codebook.encode(picture)).numpy() == picture).all()

    comes_back()


def test_a_patch_gets_the_nearest_entry():
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    book = Codebook(torch.rand(50, 48) * 255, patch=4, size=16)
    x = book.cut(pictures).reshape(-1, 48)
    assert (book.encode(pictures).flatten() == torch.cdist(x, book.entries).argmin(1)).all()


def test_more_iterations_of_k_means_reduce_the_error():
    pictures = np.random.default_rng(0).integers(0, 60, (60, 32, 32, 3), dtype=np.uint8)
    pictures += np.random.default_rng(1).integers(0, 190, (60, 4, 4, 1), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    psnr = [Codebook.fit(pictures, 40, patch=8, iterations=n).psnr(pictures) for n in (0, 1, 3, 12)]
    assert psnr == sorted(psnr) and psnr[-1] > psnr[0] + 0.2


@pytest.mark.parametrize("seed", [0, 1, 36])
def test_every_entry_is_in_use_also_after_one_lost_all_its_patches(seed):
    """60 colours in 30 entries. It is rare that an entry loses them all: without a new start, seed 36 would leave one unused."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (60, 1, 1, 3)).repeat(rng.integers(1, 60, 60), 0).astype(np.uint8)
    pictures = colors.repeat(4, 1).repeat(4, 2)
    assert Codebook.fit(pictures, 30, patch=4).encode(pictures).unique().numel() == 30


def test_psnr_is_the_formula_in_decibels():
    book = Codebook(torch.zeros(1, 48), patch=4)
    assert book.psnr(np.full((2, 32, 32, 3), 16, np.uint8)) == pytest.approx(10 * math.log10(255**2 / 16**2), abs=1e-4)


# ---------------------------------------------------------------- the transformer


def test_rotation_keeps_lengths_and_makes_a_product_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def turned(x, at):
        return rotate(x, rotation(torch.tensor([at]), 16))

    def product(at, other):
        return float((turned(q, at) * turned(k, other)).sum())

    assert turned(q, 7).norm() == pytest.approx(q.norm())
    assert product(3, 8) == pytest.approx(product(20, 25), abs=1e-6) and product(3, 8) != pytest.approx(product(3, 9), abs=1e-3)


def test_the_future_does_not_leak_into_the_past(model, vocab, codebook):
    batch = batch_of(vocab, codebook, n=1)
    before = model(batch.target, batch.patch)
    for t in (1, 8, 20):
        changed = batch.target.clone()
        changed[:, t] = (changed[:, t] + 5) % vocab.size
        after = model(changed, batch.patch)
        assert (after[:, :t] == before[:, :t]).all()
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-4).all()  # and every later state sees it


def test_a_state_gets_gradient_from_its_past_and_none_from_its_future(model, vocab, codebook):
    batch = batch_of(vocab, codebook, ("caption",), n=1)
    embedded = []
    hook = model.embed.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    model(batch.target, batch.patch)[0, 9].square().sum().backward()
    hook.remove()
    gradient = embedded[0].grad[0].abs().sum(-1)
    assert (gradient[:10] > 0).all() and (gradient[10:] == 0).all()


def test_the_order_of_earlier_words_matters(vocab, codebook):
    """In a single layer, where the last state sees earlier tokens as they are: only their positions tell the two apart."""
    model, none = lively(vocab, codebook, layers=1), torch.full((2, 4), -1)
    one, other = model(torch.tensor([[1, 20, 30, 40], [1, 30, 20, 40]]), none)[:, -1]
    assert (one - other).abs().max() > 1e-2


def test_padding_on_the_right_changes_no_state(model, vocab, codebook):
    short, long = examples(("text",), 1) + examples(("caption",), 1)
    codes = codebook.encode(np.stack([short.picture, long.picture]))
    alone, together = vocab.batch([short], codes[:1]).trim(), vocab.batch([short, long], codes)
    n = alone.target.shape[1]
    assert together.target.shape[1] > n
    torch.testing.assert_close(model(together.target, together.patch)[:1, :n], model(alone.target, alone.patch))


def test_patch_places_tell_the_same_code_apart_and_words_have_none(model):
    token = torch.full((17, 1), 200)
    states = model(token, torch.arange(-1, 16)[:, None])[:, 0]  # as a word, then as each of the 16 patches
    assert torch.pdist(states).min() > 1e-2
    torch.testing.assert_close(model.row.weight[3] + model.column.weight[1], place_of(model, 13))  # row by row


def place_of(model, patch):
    """What is added to a token because it stands at this patch: seen at the entrance of the first block."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for place in (patch, -1):
        model(torch.tensor([[200]]), torch.tensor([[place]]))
    hook.remove()
    return (seen[0] - seen[1])[0, 0]


def test_normalising_divides_by_the_root_of_the_mean_square_and_scales_by_the_gain():
    norm = RMSNorm(2)
    with torch.no_grad():
        norm.gain.copy_(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5))


def test_a_fresh_model_is_the_identity_on_the_residual_stream(vocab, codebook):
    torch.manual_seed(0)
    fresh, batch = Transformer(ModelConfig(vocab.size, codebook.side, 32, 2, 4)), batch_of(vocab, codebook, ("text",), 2)
    torch.testing.assert_close(fresh(batch.target, batch.patch), fresh.norm(fresh.embed(batch.target)))


def test_a_width_that_the_heads_cannot_share_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="width 30 must be a multiple of 2 x heads = 12"):
        Transformer(ModelConfig(50, 4, 30, 2, 6))


def test_the_head_is_the_embedding(model):
    assert model.head is model.embed.weight and len(list(model.parameters())) == len(model.state_dict()) == 3 + 2 * 6 + 1


# ---------------------------------------------------------------- sampling


def plainly_sampled(model, batch, vocab, generator, temperature, guidance):
    """The oracle: no cache and nothing shared; for every token the whole sequence is read again, without the places that an
    ended text left unused."""
    (n, length), rows = batch.tokens.shape, torch.arange(len(batch.tokens))
    views = [batch.tokens.clone()]
    if guidance:
        views.append(batch.blank(torch.ones(n, dtype=torch.bool)).tokens)
    start, ended = (batch.tokens < 0).int().argmax(1), torch.zeros(n, dtype=torch.bool)
    for k in range(length):
        at = start + k  # every row goes on from its own first choice; past its end it stays where it is
        inside, at = at < length, at.clamp(max=length - 1)
        if not inside.any() or not any((view < 0).any() for view in views):
            break
        used = ~((batch.tokens < 0) & (views[0] == PAD))
        look = used[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
        states = [model(view.clamp(min=0), batch.patch, used.cumsum(1) - 1, mask=look) for view in views]
        logits = [(h @ model.head.T)[rows, at - 1] for h in states]
        logits = logits[0] if not guidance else (1 + guidance) * logits[0] - guidance * logits[1]
        ids = torch.arange(vocab.size)
        lo, hi = (torch.where(inside, x[rows, at], e)[:, None] for x, e in ((batch.lo, 0), (batch.hi, vocab.size)))
        p = logits.masked_fill((ids < lo) | (ids >= hi), -torch.inf)
        if temperature:
            p = torch.softmax(p / temperature, -1)
            p = p / torch.empty_like(p).uniform_(generator=generator).log_().neg_()
        chosen = (batch.tokens[rows, at] < 0) & inside
        new = torch.where(ended & chosen, PAD, p.argmax(-1))
        ended = (ended & chosen) | (chosen & (new == EOS))
        for view in views:
            view[rows[chosen], at[chosen]] = new[chosen]
    return views[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("tasks", [*[(task,) for task in TASKS], TASKS], ids=lambda tasks: "+".join(tasks))
def test_cached_sampling_equals_uncached_token_for_token(model, vocab, codebook, tasks, guidance, temperature):
    batch = batch_of(vocab, codebook, tasks, n=2)
    cached = sample(model, batch, vocab, torch.Generator().manual_seed(3), temperature, guidance)
    assert (cached >= 0).all()
    assert torch.equal(cached, plainly_sampled(model, batch, vocab, torch.Generator().manual_seed(3), temperature, guidance))
    fixed = sample(model, batch, vocab, torch.Generator().manual_seed(3), temperature, guidance, fixed=True)
    assert torch.equal(cached, fixed)  # as a GPU does it


class Elsewhere(TorchDispatchMode):
    """Fails at an operation that takes or makes a tensor of the host."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        assert all(x.is_meta for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)), operation
        return result


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_gpu_can_record_a_step_of_the_sampler(vocab, codebook, monkeypatch, guidance):
    """The whole loop on a device without any memory: it asks for no number, and mixes in no tensor of the host, each of which
    would break a recording. The lengths of the prompts, which are asked for once before it, are given."""
    batch = batch_of(vocab, codebook, n=2)
    start, *lengths = first_choices(batch)
    found = start.to("meta"), *lengths
    monkeypatch.setattr("model.first_choices", lambda batch: found)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # there is no autocast for it
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = Transformer(ModelConfig(vocab.size, codebook.side, 32, 2, 4)).to("meta")
    batch = Batch(*(x.to("meta") for x in batch))
    with Elsewhere():
        tokens = sample(model, batch, vocab, guidance=guidance, group=12, fixed=True)  # four in a row
    assert tokens.is_meta and tokens.shape == (12 * len(start), batch.tokens.shape[1])
    with pytest.raises(AssertionError), Elsewhere():  # such a tensor would be found
        batch.tokens.index_select(1, torch.zeros(1, dtype=torch.long))


def test_a_recorded_step_is_done_as_often_as_it_is_called(monkeypatch):
    done = []

    @contextlib.contextmanager
    def recording(graph):
        before = len(done)
        yield
        graph.replay = lambda work=done[before:]: done.extend(work)
        del done[before:]  # a recording does not do what it records

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for device in ("cpu", "cuda"):
        done.clear()
        step = recorded(lambda: done.append("token"), torch.device(device))
        for n in range(1, 6):
            step()
            assert done == ["token"] * n


@pytest.mark.parametrize("group", [3, 4, 12, 16])  # in rows of one, four, four and eight
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("tasks", [("draw",), ("reason",), TASKS], ids=lambda tasks: "+".join(tasks))
def test_candidates_that_share_a_prompt_are_those_of_repeated_prompts(model, vocab, codebook, tasks, fixed, group):
    batch = batch_of(vocab, codebook, tasks, n=2)
    draw = lambda b, g: sample(model, b, vocab, torch.Generator().manual_seed(3), group=g, fixed=fixed)  # noqa: E731
    shared, alone = draw(batch, group), draw(batch.repeat(group), 1)
    assert torch.equal(shared, alone) and len(shared) == group * len(batch.tokens)
    groups = shared.view(-1, group, shared.shape[1])
    assert (groups != groups[:, :1]).any(2).float().mean() > 0.5  # and candidates of a prompt differ


@pytest.mark.parametrize("tasks", [*[(task,) for task in TASKS], TASKS], ids=lambda tasks: "+".join(tasks))
def test_states_and_gradients_after_a_shared_prompt_are_those_of_whole_sequences(vocab, codebook, tasks):
    """In float64: the candidates' tails on top of prompts that are read once, against every sequence read from its start."""
    model, batch, group = lively(vocab, codebook).double(), batch_of(vocab, codebook, tasks, n=2), 3
    tokens = sample(model, batch, vocab, torch.Generator().manual_seed(0), group=group)
    filled = batch.repeat(group).pack(tokens)
    tokens, (start, _, length) = filled.target, first_choices(filled)
    mask = tails(filled.mask, start, length, False)
    tail, patch = tails(tokens, start, length), tails(filled.patch, start, length, -1)
    weight = torch.randn(int(mask.sum()), 32, dtype=torch.float64)
    found = []
    for whole in (False, True):
        model.zero_grad()
        if whole:
            states = F.pad(model(tokens, filled.patch), (0, 0, 0, length))
            states = states[torch.arange(len(tokens))[:, None], start[:, None] - 1 + torch.arange(length)]
        else:
            states = completion_states(model, batch, tail, patch)
        (states[mask] * weight).sum().backward()
        found.append((states[mask].detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_tails_start_at_the_first_choice_and_are_filled_at_the_end():
    tokens = torch.tensor([[1, 2, -1, -1, 5], [1, 2, 3, -1, 5]])
    batch = Batch(*[tokens] * 5)
    start, prompt, length = first_choices(batch)
    assert start.tolist() == [2, 3] and (prompt, length) == (3, 2)
    assert tails(tokens, start, 3).tolist() == [[-1, -1, 5], [-1, 5, PAD]]


def test_given_tokens_stay_and_chosen_ones_lie_in_their_range(model, vocab, codebook):
    batch = batch_of(vocab, codebook, n=10)
    tokens = sample(model, batch, vocab, torch.Generator().manual_seed(0), temperature=2.0)
    given, chosen = batch.tokens >= 0, completion_mask(batch, tokens)
    drawn = sum(TEMPLATES[task].count("picture?") for task in TASKS)
    assert (tokens[given] == batch.tokens[given]).all() and not (chosen & given).any()
    assert (tokens[chosen] >= batch.lo[chosen]).all() and (tokens[chosen] < batch.hi[chosen]).all()
    codes, words = tokens[chosen & (batch.patch >= 0)], tokens[chosen & (batch.patch < 0)]
    assert len(codes) == 10 * 16 * drawn and codes.min() >= vocab.n_text and words.max() < vocab.n_text and words.unique().numel() > 20


def test_a_range_narrower_than_the_vocabulary_is_kept(model, vocab, codebook):
    batch = batch_of(vocab, codebook, ("text",), 8)
    batch = batch._replace(lo=torch.full_like(batch.lo, 40), hi=torch.full_like(batch.hi, 43))
    tokens = sample(model, batch, vocab, torch.Generator().manual_seed(0))
    assert tokens[batch.tokens < 0].unique().tolist() == [40, 41, 42]


def test_a_text_ends_at_its_first_eos_and_padding_follows(model, vocab, codebook):
    batch = batch_of(vocab, codebook, ("caption", "text", "reason"), 20)
    batch = batch._replace(hi=batch.hi.clamp(max=EOS + 5))  # five words to choose from: most texts end early
    tokens, ended = sample(model, batch, vocab, torch.Generator().manual_seed(0)), 0
    mask = completion_mask(batch, tokens)
    for row, free, kept in zip(tokens, batch.tokens < 0, mask):
        text = row[free].tolist()
        if EOS in text:
            ended += 1
            assert set(text[text.index(EOS) + 1 :]) <= {PAD} and PAD not in text[: text.index(EOS)]
            assert int(kept.sum()) == text.index(EOS) + 1  # <eos> is chosen and scored, what follows is neither
        else:
            assert int(kept.sum()) == len(text)
    assert ended > 20


def test_given_tokens_after_an_ended_text_let_the_next_one_start(model, vocab):
    """Two free spans with given tokens between them: the end of the first is not the end of the second."""
    tokens = torch.tensor([[1, 6, -1, -1, -1, IMAGE, -1, -1]])
    lo = torch.tensor([[0, 0, EOS, 20, 20, 0, 20, 20]])
    batch = Batch(tokens, tokens.clamp(min=0), lo, torch.where(lo == EOS, EOS + 1, 22), torch.full_like(tokens, -1))
    filled = sample(model, batch, vocab, torch.Generator().manual_seed(0))[0].tolist()
    assert filled[2:6] == [EOS, PAD, PAD, IMAGE] and {*filled[6:]} <= {20, 21}


def test_the_picture_after_a_plan_does_not_depend_on_how_much_room_the_plan_left_unused(model, vocab, codebook):
    """The same plan in its span of 28 places and in one that it just fills: the same most likely codes."""
    e = example(random.Random(0), "plan")
    batch = vocab.batch([e], codebook.encode(e.pictures))
    words = int((batch.mask & (batch.patch < 0)).sum())
    lo, hi = (torch.where(batch.patch < 0, word, ids) for word, ids in ((batch.target, batch.lo), (batch.target + 1, batch.hi)))
    forced = batch._replace(lo=lo, hi=hi)
    keep = (batch.tokens[0] >= 0) | batch.mask[0]
    roomy, tight = (sample(model, b, vocab, temperature=0)[0] for b in (forced, Batch(*(x[:, keep] for x in forced))))
    assert len(roomy) - len(tight) == MAX_TEXT["plan"] - words > 5 and torch.equal(roomy[keep], tight) and (roomy[~keep] == PAD).all()


def allowed_logprobs(model, batch, tokens, temperature=1.0):
    """Log-probs of every id at every position from one uncached pass, by the definition (M5): (N, L-1, V)."""
    logits = model(tokens[:, :-1], batch.patch[:, :-1]) @ model.embed.weight.T / temperature
    ids = torch.arange(logits.shape[-1])
    return torch.where((ids >= batch.lo[:, 1:, None]) & (ids < batch.hi[:, 1:, None]), logits, -torch.inf).log_softmax(-1)


def test_temperature_zero_takes_the_most_likely_allowed_token(model, vocab, codebook):
    batch = batch_of(vocab, codebook, n=4)
    filled = batch.pack(sample(model, batch, vocab, temperature=0))
    tokens, mask = filled.target, filled.mask[:, 1:]
    assert (tokens[:, 1:][mask] == allowed_logprobs(model, filled, tokens)[mask].argmax(-1)).all()


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_tokens_are_sampled_with_the_probabilities_that_are_scored(model, vocab, temperature):
    n, tokens = 8000, torch.tensor([[1, 8, -1]])
    ranges = torch.full_like(tokens, 50), torch.full_like(tokens, 56)
    batch = Batch(*(x.expand(n, -1) for x in (tokens, tokens.clamp(min=0), *ranges, torch.full_like(tokens, -1))))
    filled = sample(model, batch, vocab, torch.Generator().manual_seed(0), temperature)
    counted = torch.bincount(filled[:, 2], minlength=vocab.size) / n
    probabilities = allowed_logprobs(model, batch, filled[:, :3], temperature)[0, 1].exp()
    assert probabilities.max() < 0.9  # a distribution worth testing
    assert (counted - probabilities).abs().max() < 4 * 0.5 / math.sqrt(n)


def test_guidance_is_a_step_from_the_blanked_prompt_to_the_prompt(model, vocab, codebook):
    batch, s = batch_of(vocab, codebook, ("draw",), 4), 2.0
    tokens = sample(model, batch, vocab, temperature=0, guidance=s)
    blank = torch.where((batch.tokens >= EOS) & (batch.tokens < vocab.n_text), PAD, tokens)
    logits = [model(view[:, :-1], batch.patch[:, :-1]) @ model.head.T for view in (tokens, blank)]
    guided = (logits[0] + s * (logits[0] - logits[1]))[..., vocab.n_text :]
    mask = (batch.tokens < 0)[:, 1:]
    assert (tokens[:, 1:][mask] == guided[mask].argmax(-1) + vocab.n_text).all()
    assert (tokens != sample(model, batch, vocab, temperature=0)).any()


def test_the_same_noise_gives_the_same_tokens_and_other_noise_others(model, vocab, codebook):
    batch = batch_of(vocab, codebook, n=4)
    first, again, other = (sample(model, batch, vocab, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_two_models_that_are_nearly_equal_draw_nearly_the_same_from_the_same_noise(vocab, codebook):
    model, near, far = lively(vocab, codebook), lively(vocab, codebook), lively(vocab, codebook, seed=1)
    with torch.no_grad():
        for p in near.parameters():
            p += 1e-5 * torch.randn_like(p)
    batch = batch_of(vocab, codebook, ("draw",), 20)
    tokens, close, distant = (sample(m, batch, vocab, torch.Generator().manual_seed(0))[batch.tokens < 0] for m in (model, near, far))
    assert (tokens == close).float().mean() > 0.9 and (tokens == distant).float().mean() < 0.5


def test_a_negative_temperature_is_an_error(model, vocab, codebook):
    with pytest.raises(ValueError, match="temperature must be 0 or more, not -1"):
        sample(model, batch_of(vocab, codebook, n=1), vocab, temperature=-1)


def test_sampling_leaves_its_template_as_it_was(model, vocab, codebook):
    batch = batch_of(vocab, codebook, n=1)
    before = batch.tokens.clone()
    sample(model, batch, vocab, guidance=1.0)
    assert torch.equal(batch.tokens, before)
