"""One GRPO step, ours and TRL's, in turns on the same machine: small text models, equal lengths.

A step is one rollout (16 prompts of 14 tokens, 8 candidates of up to 16 tokens each), log-probs of
policy and reference, and two updates, in float32; on a GPU 64 prompts and bfloat16 autocast for both.
The reward is the share of even ids: it costs nothing. Both models are random: width 128, 4 layers, 4
heads, 1,000 ids to choose from, a tied head. Where TRL is not installed, ours is timed alone.

  floor   operations of all matrix products over the rate of a large one, measured in the same run:
          a prompt counts once for its candidates, an update three times a forward pass
  limit   of sampling: the tokens a second at which its products, or its reading of weights and cache
          at the rate of a large copy, would fill the time
  naive   the loop that is written first: every candidate reads its whole row for every token

    $ pip install trl transformers      # in an environment of its own; nothing else here needs it
    $ python results/bench_trl.py --threads 2      # or --device cuda; MEASURED
"""

import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from data import EOS, PAD
from eval import Parser, run_command
from grpo import group_advantages, grpo_loss, look_back
from kernels import fused_linear_grpo_loss, selected_logprobs
from model import ModelConfig, Transformer, allowed_head, completion, matmul, pick_device, sample

GROUP, PROMPT, NEW, WIDTH, LAYERS, IDS, UPDATES = 8, 14, 16, 128, 4, 1000, 2


def autocast(device):
    """bfloat16 matrix products on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def ours(prompts, device):
    """Three functions: one step; sampling alone; sampling naively. The latter return how many tokens
    they made."""
    torch.manual_seed(0)
    data.LAYOUTS["plain"] = f"prompt:{PROMPT} text:{NEW}?"
    layout, shape = data.Layout("plain", 1, EOS + IDS, EOS + IDS, device), (prompts, PROMPT + NEW)
    config = ModelConfig(EOS + IDS, 1, WIDTH, LAYERS, 4)
    policy, reference = (Transformer(config).to(device) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    chance = torch.Generator(device).manual_seed(0)

    def rollout():
        rows = torch.randint(EOS + 1, EOS + IDS, shape, generator=chance, device=device)
        with autocast(device):
            return sample(policy, layout, rows, GROUP, chance)

    def step():
        tokens = rollout()
        rewards = (tokens[:, PROMPT:] % 2 == 0).float().mean(1).view(prompts, GROUP)
        advantages = group_advantages(rewards).flatten()
        for update in range(UPDATES):
            with autocast(device):
                states, targets, mask = completion(policy, layout, tokens, GROUP)
                if update == 0:
                    with torch.no_grad():
                        ref_states, _, _ = completion(reference, layout, tokens, GROUP)
                    seen = policy, reference, layout, states, ref_states, targets
                    old, ref, _, _ = look_back(*seen)
            head, rest = allowed_head(policy, layout), (old, ref, advantages, mask)
            if device == "cuda":
                loss, _ = fused_linear_grpo_loss(states, head, targets, *rest)
            else:
                loss, _ = grpo_loss(selected_logprobs(states, head, targets), *rest)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    @torch.no_grad()
    def naive():
        rows = torch.randint(EOS + 1, EOS + IDS, shape, generator=chance, device=device)
        tokens = rows.repeat_interleave(GROUP, 0)
        for column in layout.columns:
            with autocast(device):
                states = policy(tokens[:, :column], layout.patch[:column])[:, -1]
            logits = matmul(states, allowed_head(policy, layout).T.to(states.dtype))
            choice = torch.multinomial(logits.softmax(-1), 1, generator=chance)
            tokens[:, column] = choice[:, 0] + layout.first
        return tokens[:, PROMPT:].numel()

    return step, lambda: int((rollout()[:, PROMPT:] != PAD).sum()), naive


def trl_model(folder):
    """A random GPT-2 of our size, and a tokenizer whose words are w0, w1, ..., <pad>, <eos>."""
    import tokenizers
    import transformers

    names = {name: i for i, name in enumerate([*(f"w{i}" for i in range(IDS - 2)), "<pad>", "<eos>"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = dict(pad_token="<pad>", eos_token="<eos>", padding_side="left")
    torch.manual_seed(0)
    size = dict(vocab_size=IDS, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=4)
    size |= dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    size |= dict(bos_token_id=IDS - 1, eos_token_id=IDS - 1, pad_token_id=IDS - 2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)  # the reference is read there
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)


def theirs(steps, prompts, device, between):
    """Seconds of each of TRL's steps, `between` called after each; and a function that samples with
    generate() and returns how many tokens it made."""
    import datasets
    import transformers
    import trl

    folder, spent, clock = tempfile.mkdtemp(), [], []
    model, tokenizer = trl_model(folder)
    ids = torch.randint(IDS - 2, (prompts * (steps + 1), PROMPT)).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in ids]
    config = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=prompts * GROUP, num_generations=GROUP,
        max_completion_length=NEW, num_iterations=UPDATES, beta=0.02, learning_rate=1e-4,
        max_steps=steps * UPDATES, use_cpu=device == "cpu", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        bf16=device == "cuda", gradient_checkpointing=False,
    )

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % UPDATES == 0:
                finish()
                spent.append(time.perf_counter() - clock[-1])
                between()
                clock.append(time.perf_counter())

    def even(completion_ids, **_):
        return [sum(i % 2 == 0 for i in row) / len(row) for row in completion_ids]

    trainer = trl.GRPOTrainer(
        model, even, config, train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer, callbacks=[Clock()],
    )
    clock.append(time.perf_counter())
    trainer.train()
    rows = torch.randint(IDS - 2, (prompts * GROUP, PROMPT), device=device)

    @torch.no_grad()
    def generate():
        options = dict(attention_mask=torch.ones_like(rows), do_sample=True, top_k=0)
        with autocast(device):
            tokens = model.generate(rows, max_new_tokens=NEW, **options)
        return int((tokens[:, PROMPT:] != IDS - 2).sum())

    return spent[2:], generate


def finish():
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, times=1, warmup=0):
    """Of each call after the warm-up; and what the last one returned."""
    spent = []
    for _ in range(times + warmup):
        start = time.perf_counter()
        result = function()
        finish()
        spent.append(time.perf_counter() - start)
    return spent[warmup:], result


def bounds(prompts, device):
    """(floor of a step in seconds, limit of sampling in tokens a second)."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    large = torch.empty(2**27, device=device)
    product, copy = (min(seconds(f, 10, 2)[0]) for f in (lambda: a @ a, large.clone))
    rate, bandwidth, n = 2 * size**3 / product, 2 * 4 * 2**27 / copy, prompts * GROUP
    token, head = 2 * 12 * WIDTH**2 * LAYERS, 2 * WIDTH * IDS  # operations: the blocks, the head
    forward = (prompts * PROMPT + n * (NEW - 1)) * token + n * NEW * head
    cache = n * (PROMPT + NEW / 2) * 2 * WIDTH * LAYERS
    moved = (2 if device == "cuda" else 4) * (cache + (token + head) / 2)  # bytes for a column
    return (2 + 3 * UPDATES) * forward / rate, n / max(n * (token + head) / rate, moved / bandwidth)


def main():
    parser = Parser(description="One GRPO step and sampling, ours beside TRL's.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads [2]")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each [12]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)[0].type
    prompts, mine = 64 if device == "cuda" else 16, []
    floor, limit = bounds(prompts, device)
    step, sampler, naive = ours(prompts, device)
    samplers = {"sample()": sampler, "naive": naive}
    seconds(step, 2)
    if importlib.util.find_spec("trl"):  # in turns: a machine is not equally fast at all times
        turn = lambda: mine.extend(seconds(step)[0])
        other, samplers["generate()"] = theirs(args.steps + 2, prompts, device, turn)
    else:
        mine, other = seconds(step, args.steps)[0], []
    median = statistics.median(mine)
    print(f"floor   {floor:.4f} s a step")
    print(f"ours    {median:.3f} s a step, {median / floor:.1f} times the floor")
    if other:
        print(f"TRL     {statistics.median(other):.3f} s a step, {statistics.median(other) / median:.2f} times ours")
    print(f"limit   {limit:,.0f} tokens a second of sampling")
    spent = {name: [] for name in samplers}
    for i in range(10):
        for name, function in samplers.items():
            times, tokens = seconds(function, 1, 2 * (i == 0))
            spent[name].append(times[0] / tokens)
    for name, times in spent.items():
        rate = 1 / statistics.median(times)
        print(f"{name:10} {rate:,.0f} tokens a second, {rate / limit:.1%} of the limit")


if __name__ == "__main__":
    run_command("bench_trl.py", main)
