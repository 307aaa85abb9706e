"""One GRPO step, ours and TRL's, in turns on the same machine: small text models, equal lengths.

A step is one rollout (16 prompts of 14 tokens, 8 candidates of up to 16 tokens each), log-probs of
policy and reference, and two updates, in float32; on a GPU 64 prompts, and bfloat16 autocast for
both. The reward, the share of even ids, costs nothing. Both models are random: width 128, 4 layers,
4 heads, 1,000 ids to choose from, a tied head. Without TRL, only ours is timed.
The floor is the time of all matrix products at the rate of a large one: a prompt counts once for
its candidates, an update three times a forward pass.

    $ pip install trl transformers      # in an environment of its own; nothing else here needs it
    $ python results/bench_trl.py --threads 2      # 1 minute with TRL; or --device cuda
"""

import copy
import importlib.util
import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from data import EOS, PAD
from eval import Parser, run_command
from grpo import group_advantages, grpo_loss, look_back
from kernels import fused_linear_grpo_loss, maybe_compile, selected_logprobs
from model import (Block, ModelConfig, Transformer, allowed_head, completion, pick_device, sample,
                   sample_recorded)

GROUP, PROMPT, NEW, WIDTH, LAYERS, IDS, UPDATES = 8, 14, 16, 128, 4, 1000, 2


def autocast(device):
    """bfloat16 matrix products on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def ours(prompts, device):
    """Two functions: one whole step; and sampling alone, which returns the number of tokens."""
    torch.manual_seed(0)
    data.LAYOUTS["plain"] = f"prompt:{PROMPT} text:{NEW}?"
    layout, shape = data.Layout("plain", 1, EOS + IDS, EOS + IDS, device), (prompts, PROMPT + NEW)
    policy = Transformer(ModelConfig(EOS + IDS, 1, WIDTH, LAYERS, 4)).to(device)
    reference = copy.deepcopy(policy)
    policy.layer = reference.layer = maybe_compile(Block.forward, torch.device(device))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    chance, graphs, seeds = torch.Generator(device).manual_seed(0), {}, itertools.count()

    def rollout():
        rows = torch.randint(EOS + 1, EOS + IDS, shape, generator=chance, device=device)
        with autocast(device):
            if device == "cuda":  # as train.py does
                fresh = torch.Generator(device).manual_seed(next(seeds))
                return sample_recorded(graphs, policy, layout, rows, GROUP, fresh, 1.0)
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
                    seen = states, ref_states, targets
                    old, ref, _, _ = look_back(policy, reference, layout, *seen)
            head, rest = allowed_head(policy, layout), (old, ref, advantages, mask)
            if device == "cuda":
                loss, _ = fused_linear_grpo_loss(states, head, targets, *rest)
            else:
                loss, _ = grpo_loss(selected_logprobs(states, head, targets), *rest)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

    return step, lambda: int((rollout()[:, PROMPT:] != PAD).sum())


def trl_model(folder):
    """A random GPT-2 of our size, and a tokenizer whose words are w0, w1, ..., <pad>, <eos>."""
    import tokenizers
    import transformers

    names = {f"w{i}": i for i in range(IDS - 2)} | {"<pad>": IDS - 2, "<eos>": IDS - 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    size = dict(vocab_size=IDS, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=4)
    size |= dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    size |= dict(bos_token_id=IDS - 1, eos_token_id=IDS - 1, pad_token_id=IDS - 2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)  # the reference is read there
    ends = dict(pad_token="<pad>", eos_token="<eos>", padding_side="left")
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends)


def theirs(steps, prompts, device, our_step):
    """Time TRL's steps, each followed by one of ours: their seconds, our seconds; and a function
    that samples with generate() and returns the number of tokens."""
    import datasets
    import transformers
    import trl

    folder, spent, mine, clock = tempfile.mkdtemp(), [], [], []
    model, tokenizer = trl_model(folder)
    ids = torch.randint(IDS - 2, (prompts * (steps + 1), PROMPT)).tolist()
    texts = [{"prompt": " ".join(f"w{i}" for i in row)} for row in ids]
    config = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=prompts * GROUP, num_generations=GROUP,
        max_completion_length=NEW, num_iterations=UPDATES, beta=0.02, learning_rate=1e-4,
        max_steps=steps * UPDATES, use_cpu=device == "cpu", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        bf16=device == "cuda", gradient_checkpointing=False)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % UPDATES == 0:
                finish()
                spent.append(time.perf_counter() - clock[-1])
                mine.extend(seconds(our_step)[0])
                clock.append(time.perf_counter())

    def even(completion_ids, **_):
        return [sum(i % 2 == 0 for i in row) / len(row) for row in completion_ids]

    trainer = trl.GRPOTrainer(
        model, even, config, train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer, callbacks=[Clock()])
    clock.append(time.perf_counter())
    trainer.train()
    rows = torch.randint(IDS - 2, (prompts * GROUP, PROMPT), device=device)
    options = dict(attention_mask=torch.ones_like(rows), do_sample=True, top_k=0)

    def generate():
        with autocast(device), torch.no_grad():
            tokens = model.generate(rows, max_new_tokens=NEW, **options)
        return int((tokens[:, PROMPT:] != IDS - 2).sum())

    return spent[2:], mine[2:], generate


def finish():
    """Wait until a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, times=1, warmup=0):
    """Seconds of each call after the warm-up, and what the last one returned."""
    spent = []
    for _ in range(times + warmup):
        start = time.perf_counter()
        result = function()
        finish()
        spent.append(time.perf_counter() - start)
    return spent[warmup:], result


def floor(prompts, device):
    """Seconds for the matrix products of a step, at the rate of a large product."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / min(seconds(lambda: a @ a, 10, 2)[0])
    token, head, rows = 2 * 12 * WIDTH**2 * LAYERS, 2 * WIDTH * IDS, prompts * GROUP
    forward = (prompts * PROMPT + rows * (NEW - 1)) * token + rows * NEW * head
    return (2 + 3 * UPDATES) * forward / rate  # sampling, the reference, the updates


def main():
    parser = Parser(description="One GRPO step and sampling, ours beside TRL's.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads [2]")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each [12]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)[0].type
    prompts = 64 if device == "cuda" else 16
    (step, sampler), least = ours(prompts, device), floor(prompts, device)
    samplers, other = {"sample()": sampler}, []
    if importlib.util.find_spec("trl"):  # in turns, because a machine's speed drifts
        other, mine, samplers["generate()"] = theirs(args.steps + 2, prompts, device, step)
    else:
        mine = seconds(step, args.steps, 2)[0]
    print(f"floor   {least:.4f} s a step")
    print(f"ours    {median(mine):.4f} s a step, {median(mine) / least:.1f} times the floor")
    if other:
        ratio = median(other) / median(mine)
        print(f"TRL     {median(other):.4f} s a step, {ratio:.2f} times as long")
    spent = {name: [] for name in samplers}
    for i in range(10):
        for name, function in samplers.items():
            times, tokens = seconds(function, 1, 2 * (i == 0))
            spent[name].append(times[0] / tokens)
    for name, times in spent.items():
        print(f"{name:10} {1 / median(times):,.0f} tokens a second")


if __name__ == "__main__":
    run_command("bench_trl.py", main)
