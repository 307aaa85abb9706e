"""model.py: files, the codebook, the transformer; what is sampled is what is scored."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, allowed_logprobs, lively, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from data import EOS, LAYOUTS, PAD, render, sample_scene
from model import (Block, Codebook, ModelConfig, Transformer, allowed_head, atomically, completion,
                   load_tensors, rotate, rotation, sample, sample_recorded, save_tensors)


@pytest.fixture(params=LAYOUTS)
def case(request, vocab, codebook):
    """The layout of each task in turn, and three of its rows, reference answers included."""
    return vocab.layout(request.param), rows_of(vocab, codebook, request.param, 3)


def noise_of(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


# ---------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "base.txt"
    for text in ("old", "new"):
        with atomically(path) as new:
            new.write_text(text)
            assert text == "old" or path.read_text() == "old"  # until the block has ended
    with pytest.raises(KeyboardInterrupt), atomically(path) as new:
        new.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]  # no scratch file


def test_tensors_come_back_as_they_were_saved_or_one_line_says_why_not(tmp_path):
    tensors = {"t": torch.arange(600).view(2, 300).T, "half": torch.rand(3).bfloat16()}
    save_tensors(tensors, tmp_path / "whole")
    torch.testing.assert_close(load_tensors(tmp_path / "whole"), tensors, rtol=0, atol=0)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-9])
    (tmp_path / "text").write_bytes(b"not\na\ntensor")
    for name in ("cut", "text", "missing"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read") as error:
            load_tensors(tmp_path / name)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- codebook


@settings(max_examples=40)
@given(rng=st.randoms(use_true_random=False), pool=st.sampled_from(("paired", "three", "heldout")))
def test_the_codebook_loses_nothing_of_the_world_and_no_code(codebook, rng, pool):
    picture = render(sample_scene(rng, pool))[None]
    codes = codebook.encode(picture)
    assert codes.shape == (1, 16) and codes.dtype == torch.int64
    assert (codebook.decode(codes).numpy() == picture).all() and codebook.psnr(picture) == math.inf
    codes = torch.tensor([[rng.randrange(len(codebook.entries)) for _ in range(16)]])
    assert torch.equal(codebook.encode(codebook.decode(codes)), codes)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_codes_number_the_patches_row_by_row(patch):
    n = 32 // patch
    grey = np.arange(n * n, dtype=np.uint8).reshape(n, n).repeat(patch, 0).repeat(patch, 1)
    pictures = np.stack((grey, grey, grey), -1)[None]
    book = Codebook.fit(pictures, 1024, patch)
    assert book.entries[book.encode(pictures)[0]].mean(1).tolist() == [*range(n * n)]


def colored(seed):
    """Pictures of 4x4 pixels in one of 60 colours, some colours often."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (60, 1, 1, 3)).repeat(rng.integers(1, 60, 60), 0)
    return colors.astype(np.uint8).repeat(4, 1).repeat(4, 2)


def test_k_means_ends_where_codes_are_nearest_and_entries_are_means():
    pictures = colored(0)
    book = Codebook.fit(pictures, 12, patch=4, iterations=60)
    x, codes = book.patchify(pictures).flatten(0, 1), book.encode(pictures).flatten()
    assert torch.equal(codes, torch.cdist(x, book.entries).argmin(1))  # (M1)
    means = torch.stack([x[codes == k].mean(0) for k in range(12)])
    torch.testing.assert_close(book.entries, means, atol=0.01, rtol=0)  # (M2), of 0 to 255


@pytest.mark.parametrize("seed", [0, 1, 36])
def test_every_entry_is_in_use_also_after_one_lost_all_its_patches(seed):
    """That is rare: without a new start, seed 36 would leave one unused."""
    codes = Codebook.fit(colored(seed), 30, patch=4).encode(colored(seed))
    assert codes.unique().numel() == 30


# ---------------------------------------------------------------- the transformer


def test_rotation_keeps_lengths_and_products_depend_on_the_distance_alone():
    (q, k), turn = torch.randn(2, 1, 16, generator=noise_of(0)), rotation(torch.arange(30), 16)
    q, k = (rotate(x.expand(30, -1), turn) for x in (q, k))  # the same at 30 positions
    close(q.norm(dim=1), q[0].norm().expand(30))
    close(q[3] @ k[8], q[20] @ k[25])
    assert (q[3] @ k[8] - q[8] @ k[3]).abs() > 0.01


@pytest.mark.parametrize("reach, causal", [(None, True), (12.0, False)])
def test_a_block_is_softmax_attention_in_each_head_then_an_mlp(reach, causal):
    torch.manual_seed(0)
    block, x = Block(8, 2, reach).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x))[0].split(8, -1)
    heads, future = [], torch.ones(5, 5).triu(1) > 0
    for h in (slice(0, 4), slice(4, 8)):
        logits = F.layer_norm(q[:, h], (4,)) @ F.layer_norm(k[:, h], (4,)).T  # at most D = 4
        logits = logits / 2 if reach is None else logits * reach / 4
        logits = logits.masked_fill(future, -torch.inf) if causal else logits
        heads.append(logits.softmax(-1) @ v[:, h])
    y = x + block.out(torch.cat(heads, -1))
    close(block(x, causal=causal), y + block.down(F.gelu(block.up(block.norm2(y)))))


def test_a_layer_compiles_whole_for_all_shapes_of_rows():
    """fullgraph: a graph break, such as a length where attention wants a bool, is an error."""
    torch.manual_seed(0)
    block, turn = Block(8, 2), rotation(torch.arange(9), 4)
    whole = torch.compile(Block.forward, dynamic=True, fullgraph=True, backend="eager")
    for n, length in ((2, 5), (3, 9)):
        x, here = torch.randn(n, length, 8), [part[:length] for part in turn]
        close(whole(block, x, here), block(x, here))


def test_the_future_does_not_leak_into_the_past(model, vocab, case):
    layout, tokens = case
    before = model(tokens, layout.patch)
    for t in (1, 8, 20):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 5) % vocab.size
        after = model(changed, layout.patch)
        close(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-4).all()


def test_positions_tell_the_order_of_two_earlier_words(vocab, codebook):
    tokens = torch.tensor([[1, 20, 30, 40], [1, 30, 20, 40]])  # one layer sees them as they are
    one, other = lively(vocab, codebook, layers=1)(tokens, torch.full((4,), -1))[:, -1]
    assert (one - other).abs().max() > 1e-2


def test_a_code_knows_its_row_and_column_and_a_word_has_none(model):
    entering = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(torch.full((1, 17), 150), torch.arange(-1, 16))
    hook.remove()
    word, *codes = entering[0][0]
    close(word, model.embed.weight[150])
    for p, code in enumerate(codes):
        close(code, word + model.row.weight[p // 4] + model.column.weight[p % 4])


def test_the_head_is_the_embedding_and_a_fresh_layer_the_identity(vocab, codebook):
    fresh = Transformer(ModelConfig(vocab.size, codebook.side))
    tokens = rows_of(vocab, codebook, "text", 2)
    close(fresh(tokens, vocab.layout("text").patch), fresh.norm(fresh.embed(tokens)))
    assert fresh.head is fresh.embed.weight and len(fresh.state_dict()) == 3 + 4 * 6 + 1


# ---------------------------------------------------------------- sampling: as without a cache


def plainly_sampled(model, layout, prompts, group, generator, temperature):
    """The oracle: nothing is kept; for every token all rows are read again. Gumbel noise."""
    tokens = torch.stack([row for row in prompts for _ in range(group)])
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    for column in layout.chosen.nonzero()[:, 0].tolist():
        logits = model(tokens, layout.patch)[:, column - 1] @ model.head.T
        logits = logits[:, layout.first : layout.last]
        if temperature:
            u = torch.empty(logits.shape).uniform_(generator=generator)
            logits = logits / temperature - (-u.log()).log()
        token = logits.argmax(-1) + layout.first
        tokens[:, column] = torch.where(ended, PAD, token)
        ended |= token == EOS
    return tokens


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_cached_groups_equal_an_uncached_loop_token_for_token(model, case, temperature):
    tokens = sample(model, *case, 3, noise_of(1), temperature)
    assert torch.equal(tokens, plainly_sampled(model, *case, 3, noise_of(1), temperature))
    assert torch.equal(tokens[0::3], tokens[1::3]) == (temperature == 0)  # candidates differ


def test_answers_in_the_prompts_are_not_read_and_all_that_is_given_stays(model, vocab, case):
    layout, prompts = case
    other = prompts.where(~layout.chosen, torch.randint(vocab.size, prompts.shape))
    before = other.clone()
    tokens, again = (sample(model, layout, p, 2, noise_of(1)) for p in (prompts, other))
    assert torch.equal(tokens, again) and torch.equal(other, before)
    assert not torch.equal(tokens, sample(model, layout, prompts, 2, noise_of(2)))
    assert (tokens == prompts.repeat_interleave(2, 0))[:, ~layout.chosen].all()


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_tokens_are_as_frequent_as_they_are_probable(model, vocab, codebook, temperature):
    layout, n, prompt = vocab.layout("vqa"), 8000, rows_of(vocab, codebook, "vqa", 1)
    tokens = sample(model, layout, prompt, n, noise_of(0), temperature)
    p = allowed_logprobs(model, layout, tokens[:1], temperature)[0, 0].exp()
    counted = torch.bincount(tokens[:, layout.start] - layout.first, minlength=len(p)) / n
    assert 0.05 < p.max() < 0.9 and ((counted - p).abs() <= 4 * (p / n).sqrt() + 1 / n).all()


def test_a_text_ends_with_eos_which_is_scored_and_the_pad_behind_it_is_not(model, vocab, codebook):
    layout, prompts = vocab.layout("caption"), rows_of(vocab, codebook, "caption", 3)
    tokens, ended = sample(model, layout, prompts, 40, noise_of(0), temperature=20), 0
    for row, scored in zip(tokens, completion(model, layout, tokens, 40)[2].tolist(), strict=True):
        text = row[layout.start :].tolist()
        n = text.index(EOS) + 1 if EOS in text else len(text)
        assert [t for t, yes in enumerate(scored) if yes] == [*range(n)] and set(text[n:]) <= {PAD}
        ended += n < len(text)
    assert 10 < ended < 110


def test_when_all_texts_have_ended_only_padding_follows(vocab, codebook):
    model, layout = lively(vocab, codebook), vocab.layout("text")
    model.norm.gain.data.zero_()  # all ids are equally likely, so the first is taken: <eos>
    tokens = sample(model, layout, rows_of(vocab, codebook, "text", 2), temperature=0)
    assert tokens[:, 1:].tolist() == [[EOS] + [PAD] * 19] * 2
    assert [int(completion(model, layout, tokens, group)[2].sum()) for group in (1, 2)] == [2, 2]


def test_a_shape_is_captured_once_and_another_temperature_apart(
        model, vocab, codebook, monkeypatch):  # fmt: skip
    """A pretended GPU counts the captures; what it captures runs at once."""
    captured, stream = [], SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(register_generator_state=captured.append, replay=lambda: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    graphs, layout = {}, vocab.layout("vqa")
    for seed, temperature in enumerate((1.0, 1.0, 0.5, 1.0)):
        prompts = rows_of(vocab, codebook, "vqa", 2, seed)
        sample_recorded(graphs, model, layout, prompts, 3, noise_of(seed), temperature)
    assert len(captured) == 2


# ---------------------------------------------------------------- scoring: what was sampled


def test_a_prompt_read_once_for_its_group_changes_no_state_and_no_gradient(model, case):
    (layout, _), results = case, []
    tokens = sample(model, *case, 3, noise_of(0))
    for group in (1, 3):
        states, targets, mask = completion(model, layout, tokens, group)
        weight = torch.randn(states.shape, dtype=states.dtype, generator=noise_of(0))
        loss = (states * weight)[mask].sum()
        results.append([states, *torch.autograd.grad(loss, [*model.parameters()])])
        assert torch.equal((targets + layout.first)[mask], tokens[layout.chosen & (tokens != PAD)])
        assert targets.min() >= 0 and targets.shape == mask.shape == states.shape[:2]
    for alone, shared in zip(*results, strict=True):
        close(alone, shared)


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_what_is_sampled_is_what_is_scored(vocab, codebook, case, temperature, precision):
    """With the noise of the sampler again, each token is the likeliest by what is scored."""
    layout, prompts = case
    model = lively(vocab, codebook).to(torch.promote_types(precision, torch.float32))
    with torch.autocast("cpu", enabled=precision == torch.bfloat16):
        tokens = sample(model, layout, prompts, 4, noise_of(1), temperature)
        states, targets, mask = completion(model, layout, tokens, 4)
    head, error = allowed_head(model, layout), TOLERANCE[states.dtype] / temperature
    logprobs = (states.to(head.dtype) @ head.T / temperature).log_softmax(-1)
    generator, exact = noise_of(1), allowed_logprobs(model, layout, tokens, temperature)
    length = mask.shape[1]  # columns at the end that no row has reached may be missing
    assert states.dtype == precision and (logprobs - exact[:, :length])[mask].abs().max() < error
    for t in layout.chosen[layout.start :][:length].nonzero()[:, 0].tolist():
        u = torch.empty(len(tokens), len(head)).uniform_(generator=generator)
        noisy = logprobs[:, t] - (-u.log()).log()
        chosen = noisy.gather(1, targets[:, t, None])[:, 0]
        assert ((noisy.amax(1) - chosen)[mask[:, t]] < error).all()
