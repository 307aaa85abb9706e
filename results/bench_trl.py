"""One GRPO step, ours and TRL's, on the same machine: a randomly initialised text model, the same lengths, the same group.

A step is one rollout (16 prompts of 14 tokens, 8 candidates of up to 16 new tokens each), the policy's and the reference's
log-probs, and two updates, float32; on a GPU 64 prompts and bfloat16 autocast for both. The reward is the share of even token
ids: it costs nothing. Both models have width 128, 4 layers, 4 heads, a vocabulary of 1,000 and a tied head (0.9 million weights).
Where TRL is not installed, ours is timed alone.

  floor   operations of all matrix products over the rate of a large matrix product, measured in the same run. It counts a prompt
          once for all its candidates, a sampled token once, and three times the forward pass for each update
  limit   of sampling: the tokens a second at which either its matrix products or its reading of weights and cache, at the
          rates of a large product and of a large copy measured in the same run, would fill the time
  naive   the loop that everybody writes first: the whole sequence is read again for every token, by every candidate

    $ pip install trl transformers pillow matplotlib      # in an environment of its own; not needed by anything else here
    $ python results/bench_trl.py --threads 2      # or --device cuda
"""

import argparse
import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import EOS, PAD, Batch  # noqa: E402
from grpo import group_advantages, rollout, rollout_loss  # noqa: E402
from kernels import fused_linear_grpo_loss  # noqa: E402
from model import ModelConfig, Transformer, pick_device, sample  # noqa: E402

GROUP, PROMPT, NEW, WIDTH, LAYERS, VOCAB, UPDATES = 8, 14, 16, 128, 4, 1000, 2


class Words:
    """What `sample` asks of a vocabulary."""

    size = n_text = VOCAB


def lower(device):
    """bfloat16 matrix products where there is a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def ours(prompts, device):
    """A function that takes one step of ours; and two that sample alone, ours and the naive one, returning how many tokens they made."""
    torch.manual_seed(0)
    policy, reference = (Transformer(ModelConfig(VOCAB, 1, WIDTH, LAYERS, 4)).to(device) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    optimizer, generator = torch.optim.AdamW(policy.parameters(), lr=1e-4), torch.Generator(device).manual_seed(0)

    def batch():
        template = torch.full((prompts, PROMPT + NEW), -1, device=device)
        template[:, :PROMPT] = torch.randint(PAD + 2, VOCAB, (prompts, PROMPT), generator=generator, device=device)
        return Batch(template, template.clamp(min=0), torch.full_like(template, EOS), torch.full_like(template, VOCAB),
                     torch.full_like(template, -1))  # fmt: skip

    def reward(filled, tokens):
        share = (tokens[:, PROMPT:] % 2 == 0).float().mean(1).view(prompts, GROUP)
        return share, {"even": share}

    def step():
        with lower(device):
            r = rollout(policy, batch(), GROUP, reward, Words, generator)
        advantages = group_advantages(r.rewards).flatten()
        for _ in range(UPDATES):
            optimizer.zero_grad()
            with lower(device):
                loss, _ = rollout_loss(policy, reference, r, fused_linear_grpo_loss, advantages=advantages)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    def generate():
        with lower(device):
            return int((sample(policy, batch(), Words, generator, group=GROUP)[:, PROMPT:] != PAD).sum())

    @torch.no_grad()
    def naive():
        b = batch().repeat(GROUP)
        tokens = b.tokens
        for at in range(PROMPT, PROMPT + NEW):
            with lower(device):
                logits = policy(tokens[:, :at], b.patch[:, :at])[:, -1].float() @ policy.head.T.float()
            logits[:, :EOS] = -torch.inf
            tokens[:, at] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return tokens[:, PROMPT:].numel()

    return step, generate, naive


def theirs(steps, prompts, device, between):
    """Seconds of each of TRL's steps, calling `between` after each; and a function that samples with generate(), returning how many
    tokens it made."""
    import datasets
    import tokenizers
    import transformers
    import trl

    names = {f"w{i}": i for i in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=VOCAB - 1, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 2))  # fmt: skip
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)  # the trainer reads its reference from there
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    texts = [" ".join(f"w{i}" for i in row) for row in torch.randint(VOCAB - 2, (prompts * (steps + 1), PROMPT)).tolist()]
    config = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=prompts * GROUP, num_generations=GROUP, max_completion_length=NEW,
        num_iterations=UPDATES, beta=0.02, learning_rate=1e-4, max_steps=steps * UPDATES, use_cpu=device == "cpu", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, bf16=device == "cuda",
        gradient_checkpointing=False)  # fmt: skip
    clock, spent = [time.perf_counter()], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % UPDATES == 0:
                finish()
                spent.append(time.perf_counter() - clock[-1])
                between()
                clock.append(time.perf_counter())

    def even(completion_ids, **_):
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    trl.GRPOTrainer(model, even, config, train_dataset=datasets.Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
                    callbacks=[Clock()]).train()  # fmt: skip
    ids = torch.randint(VOCAB - 2, (prompts * GROUP, PROMPT), device=device)

    @torch.no_grad()
    def generate():
        with lower(device):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=NEW)[:, PROMPT:]
        return int((out != VOCAB - 2).sum())

    return spent[2:], generate


def finish():
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, times, warmup=2):
    """Of each call, after some to warm up; and what the last one returned."""
    found = []
    for _ in range(times + warmup):
        start = time.perf_counter()
        result = function()
        finish()
        found.append(time.perf_counter() - start)
    return found[warmup:], result


def rates(device):
    """Operations a second of a large matrix product, and bytes a second of a large copy."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    large = torch.empty(2**27, device=device)
    there = torch.empty_like(large)
    return 2 * size**3 / min(seconds(lambda: a @ a, 10)[0]), 2 * 4 * 2**27 / min(seconds(lambda: there.copy_(large), 10)[0])


PER_TOKEN, HEAD = 2 * 12 * WIDTH**2 * LAYERS, 2 * WIDTH * VOCAB  # operations of matrix products


def floor(prompts):
    """Operations of a step's matrix products."""
    sequences = prompts * GROUP
    read = prompts * PROMPT * PER_TOKEN + sequences * (NEW - 1) * PER_TOKEN  # a prompt once, then what was chosen
    chosen = sequences * NEW * HEAD
    sampling, reference, update = read + chosen, read + chosen, 3 * (read + chosen)
    return sampling + reference + UPDATES * update


def limit(prompts, device, rate, bandwidth):
    """Tokens a second that sampling cannot pass."""
    n, size = prompts * GROUP, 2 if device == "cuda" else 4
    cache = n * (PROMPT + NEW / 2) * 2 * WIDTH * LAYERS
    weights = (PER_TOKEN + HEAD) / 2
    return n / max(n * (PER_TOKEN + HEAD) / rate, size * (cache + weights) / bandwidth)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads [2]")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each [12]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)[0].type
    prompts = 64 if device == "cuda" else 16
    rate, bandwidth = rates(device)
    operations, most = floor(prompts), limit(prompts, device, rate, bandwidth)
    step, sampler, naive = ours(prompts, device)
    mine, samplers = seconds(step, args.steps)[0], {"sample()": sampler, "naive": naive}
    if there := importlib.util.find_spec("trl"):  # in turns: a machine is not equally fast at all times
        mine = []
        other, samplers["generate()"] = theirs(args.steps + 2, prompts, device, lambda: mine.append(seconds(step, 1, 0)[0][0]))
        mine = mine[2:]
    ours_s = statistics.median(mine)
    print(f"floor   {operations / 1e9:.1f} GFLOP at {rate / 1e9:,.0f} GFLOP/s: {operations / rate:.3g} s")
    print(f"ours    {ours_s:.3f} s a step: {operations / rate / ours_s:.1%} of the rate of a large matrix product")
    if there:
        print(f"TRL     {statistics.median(other):.3f} s a step: {statistics.median(other) / ours_s:.2f} times as long")
    print(f"limit of sampling: {most:,.0f} tokens a second")
    spent = {name: [] for name in samplers}
    for i in range(10):
        for name, function in samplers.items():
            times, tokens = seconds(function, 1, 2 * (i == 0))
            spent[name].append(times[0] / tokens)
    made = {name: 1 / statistics.median(times) for name, times in spent.items()}
    for name, tokens in made.items():
        share = f"{tokens / most:.1%} of the limit; sample() makes {made['sample()'] / tokens:.2f} times as many"
        print(f"{name:10} {tokens:,.0f} tokens a second, {share}")


if __name__ == "__main__":
    main()
