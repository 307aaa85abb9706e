"""GRPO: score G candidates of one prompt, and make those that beat their own group more likely.

The group's mean reward is the baseline, so no value network is trained. A clipped ratio keeps each
update close to the policy that sampled, and a KL penalty keeps the policy close to the frozen base.

(G1) A_i = (r_i - mean_j r_j) / (std_j r_j + eps)                      advantage within the group
(G2) A_i = 1/(G-1) sum_{j != i} [ 2 sigmoid((r_i - r_j) / tau) - 1 ]   ...from preference pairs
(G3) A = s / (std s + eps),  s = sum_k w_k z_k,  z_k = (G1) of reward k      several rewards (GDPO)
(G4) ratio_t = exp(logprob_t - old_logprob_t)                 new policy over the one that sampled
(G5) ratio = exp( mean_t (logprob_t - old_logprob_t) )        ...or one per sequence (GSPO)
(G6) k3_t = exp(d_t) - d_t - 1,  d_t = ref_logprob_t - logprob_t      estimate of the KL, >= 0
(G7) l_t = -min( ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A )      the token's loss
(G8) l_t = (G7) + kl_coef k3_t                                         ...and its KL penalty
(G9) L = sum_nt l / sum_nt m  |  1/N sum_n (sum_t l / sum_t m)  |  sum_nt l / (N max_tokens)
(G10) KL(policy||ref)_t = sum_id p(id) log( p(id) / p_ref(id) ),  H_t = - sum_id p(id) log p(id)

(G11) L = - sum_t logprob_t of each group's best / their tokens        control: rejection sampling
(G12) L = - log sigmoid( beta sum_t (logprob - ref)_t(best) - beta sum_t (logprob - ref)_t(worst) )
(G13) L = CE over texts and over pictures of scale * cos(mean state of each)    baseline: CLIP-style
(G14) L = - mean over hidden codes of log p(code | the other codes)             baseline: BEiT-style

Symbols: B prompts, G candidates of each, N = B*G sequences (row n answers prompt n // G), T tokens
of a completion, r rewards (B,G), A advantages, m (N,T) the completion mask: > 0 is valid.

Conventions
* Std is the sample std: rewards [1,1,0,0] give advantages +-0.87. The population std gives +-1.00.
* For A < 0 the objective is still the minimum: a ratio far above 1 is never clipped then.
* k3 is an unbiased estimate of KL(policy||ref) when the policy sampled the tokens, but its
  on-policy gradient is that of KL(ref||policy).
* In the first step after sampling the ratio is 1 and l_t = -A: its mean is 0, its gradient is not.
* Equal rewards in a group give advantages of exactly 0: only the KL penalty moves such a group.
* Log-ratios beyond +-20 are clamped, as in verl: exp(89) overflows, and inf * 0 is a NaN gradient.

Compared with the paper: LVRPO's text does not specify the std, the KL estimator or the reduction.
These are GRPO's here, with its published variants to choose from.

    $ python train.py --base runs/NAME --out runs/NEW      # `grpo_step` is the loop; 2 minutes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PAD
from model import Transformer, allowed_head, at_least_float32, matmul

LOG_LIMIT = 20.0


def check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, legal))}")


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if x is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}, {meaning}")


# ------------------------------------------------ advantages


def checked_rewards(rewards: Tensor, name: str = "rewards") -> Tensor:
    """Rewards (B,G), detached and at least float32; ValueError if they cannot rank a group."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"{name} has shape {tuple(rewards.shape)}, expected (B, G) with G >= 2")
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).sum())
        raise ValueError(f"{name}: {bad} of {rewards.numel()} values are not finite")
    return at_least_float32(rewards.detach())


def minus_group_mean(rewards: Tensor) -> Tensor:
    shifted = rewards - rewards[:, :1]  # so that equal rewards give exactly 0, not a rounding error
    return shifted - shifted.mean(1, keepdim=True)


def scaled_advantages(rewards: Tensor, scale: str, eps: float = 1e-4) -> Tensor:
    """group_advantages of checked rewards: no device sync, so it can be compiled."""
    if scale == "none":
        return minus_group_mean(rewards)
    std = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
    return minus_group_mean(rewards) / (std + eps)  # (G1)


def group_advantages(rewards: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Reward minus the mean of its group, over a std. (B,G) -> (B,G), no gradient. Source:
    arXiv:2402.03300.

    scale: "group" divides by the group's std + eps; "batch" by the std of all B*G raw rewards +
    eps; "none" does not divide (Dr. GRPO, arXiv:2503.20783: dividing by a small std magnifies
    differences that mean little). Raises ValueError for G < 2, a reward that is not finite, or an
    unknown scale.

    >>> rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    >>> group_advantages(rewards).round(decimals=2)
    tensor([[ 0.8700,  0.8700, -0.8700, -0.8700],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    check_choice("scale", scale, ("group", "batch", "none"))
    return scaled_advantages(checked_rewards(rewards), scale, eps)


def pairwise_advantages(rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """How a candidate fares against the others: (B,G) -> (B,G) in [-1, 1]. Every group sums to 0;
    no gradient.

    sigmoid((r_i - r_j) / temperature) is the Bradley-Terry probability that i is preferred to j.
    Raises ValueError for G < 2, a reward that is not finite, or temperature <= 0.

    Odds of three to one: 2 * 0.75 - 1.
    >>> pairwise_advantages(torch.tensor([[3.0, 1.0]]).log()).round(decimals=4)
    tensor([[ 0.5000, -0.5000]])
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number > 0")
    rewards = checked_rewards(rewards)
    difference = (rewards[:, :, None] - rewards[:, None, :]) / temperature  # (B,G,G): i against j
    preferred = torch.tanh(difference / 2)  # = 2 sigmoid(difference) - 1, and 0 for j = i
    return preferred.sum(2) / (rewards.shape[1] - 1)  # (G2)


def combine_rewards(
    rewards: dict[str, Tensor],
    weights: dict[str, float],
    mode: str = "sum_then_normalize",
    eps: float = 1e-4,
) -> Tensor:
    """Named rewards (B,G) and a weight for each name -> advantages (B,G), no gradient.

    "sum_then_normalize" is (G1) of the weighted sum: the reward with the widest spread dominates.
    With "normalize_then_sum", (G3), each reward counts by its weight, whatever its unit (GDPO).
    Raises ValueError for names or shapes that differ, an unknown mode, G < 2, or a reward that is
    not finite.

    >>> rewards = {"clip": torch.tensor([[9.0, 3.0]]), "exact": torch.tensor([[0.0, 1.0]])}
    >>> weights = {"clip": 1.0, "exact": 2.0}  # weighted sums 9 and 5
    >>> combine_rewards(rewards, weights).round(decimals=2)
    tensor([[ 0.7100, -0.7100]])
    >>> combine_rewards(rewards, weights, "normalize_then_sum").round(decimals=2)
    tensor([[-0.7100,  0.7100]])
    """
    check_choice("mode", mode, ("sum_then_normalize", "normalize_then_sum"))
    if not rewards or set(rewards) != set(weights):
        raise ValueError(f"rewards {sorted(rewards)}, weights {sorted(weights)}: names differ")
    shape = next(iter(rewards.values())).shape
    for name, r in rewards.items():
        check_shape(f"reward {name!r}", r, shape, "the (B, G) of the first reward")
        checked_rewards(r, f"reward {name!r}")
    if mode == "sum_then_normalize":
        total = sum(weights[name] * r.detach() for name, r in rewards.items())
        return group_advantages(total, eps=eps)
    total = sum(weights[name] * group_advantages(r, eps=eps) for name, r in rewards.items())
    # Whiten over the whole batch: every group of the sum has mean 0, so only the std is missing.
    return total / (total.std() + eps)  # (G3)


# ------------------------------------------------ the objective


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy||ref), any shape -> same shape, >= 0. The reference gets no
    gradient.

    Source: J. Schulman, "Approximating KL Divergence" (2020), estimator k3.

    >>> kl_k3(torch.tensor(1.0).log(), torch.tensor(2.0).log()).round(decimals=4)  # 2 - ln 2 - 1
    tensor(0.3069)
    """
    d = at_least_float32(ref_logprobs.detach()) - at_least_float32(logprobs)
    d = d.clamp(-LOG_LIMIT, LOG_LIMIT)
    return torch.expm1(d) - d  # (G6)


def token_objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.02,
    level: str = "token",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, ratio and k3 of every token, (N,T) each; finite at masked positions, even for NaN."""
    valid, dtype = mask > 0, at_least_float32(logprobs).dtype

    def clean(x: Tensor) -> Tensor:
        # Mask the inputs, not the results: a discarded result has the gradient 0 * nan = nan.
        return torch.where(valid, x.to(dtype), 0.0)

    new, old = clean(logprobs), clean(old_logprobs.detach())
    advantages = clean(advantages.detach()[:, None])
    log_ratio = new - old
    if level == "sequence":
        length = valid.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(new)  # (G5)
    ratio = log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()  # (G4)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)  # (G7)
    kl = None if ref_logprobs is None else kl_k3(new, clean(ref_logprobs))
    if kl is not None and kl_coef != 0:
        loss = loss + kl_coef * kl  # (G8)
    return loss, ratio, kl


def reduce_tokens(
    per_token: Tensor, mask: Tensor, reduction: str = "token", max_tokens: int | None = None
) -> Tensor:
    """(N,T) -> one number over the valid tokens. A row without any adds 0 and still counts in N.

    "token" weighs all tokens equally (DAPO, arXiv:2503.14476); "sequence" weighs all sequences
    equally, so tokens of a long one count less (GRPO); "constant" divides by N * max_tokens, for
    any lengths (Dr. GRPO; max_tokens=None means T). Raises ValueError for an unknown reduction or
    max_tokens < 1.

    6/3, 5/2 and 6/4:
    >>> x, mask = torch.tensor([[1.0, 1.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> [reduce_tokens(x, mask, how).item() for how in ("token", "sequence", "constant")]
    [2.0, 2.5, 1.5]
    """
    check_choice("reduction", reduction, ("token", "sequence", "constant"))
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected None or at least 1")
    (rows, width), valid = per_token.shape, mask > 0
    kept = torch.where(valid, at_least_float32(per_token), 0.0)
    if reduction == "sequence":
        return (kept.sum(1) / valid.sum(1).clamp(min=1)).sum() / max(rows, 1)  # (G9)
    if reduction == "token":
        return kept.sum() / valid.sum().clamp(min=1)  # (G9)
    return kept.sum() / max(rows * (max_tokens or width), 1)  # (G9)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    kl_coef: float = 0.02,
    reduction: str = "token",
    level: str = "token",
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise and its metrics, from log-probs (N,T), advantages (N,) and mask (N,T).

    clip_high=None means clip_low; a larger one lets improbable tokens grow (DAPO). level: "token"
    is GRPO, "sequence" GSPO (arXiv:2507.18071). reduction and max_tokens: see reduce_tokens. Only
    logprobs get a gradient. Metrics, means over valid tokens: ratio; clip_low and clip_high, the
    shares of ratios below and above the clip range; kl (k3), when ref_logprobs are given. Raises
    ValueError for shapes that differ or an unknown name.

    >>> old = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    >>> new = torch.tensor([[0.75, 0.5], [0.75, 0.0]]).log()  # ratios 1.5, 1 (A = 1), 1.5 (A = -1)
    >>> advantages, mask = torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [1, 0]])
    >>> loss, metrics = grpo_loss(new, old, None, advantages, mask)
    >>> round(loss.item(), 4)  # (-1.2 - 1 + 1.5) / 3: the gain is clipped, the harm is not
    -0.2333
    >>> {name: round(value.item(), 2) for name, value in metrics.items()}
    {'ratio': 1.33, 'clip_low': 0.0, 'clip_high': 0.67}
    """
    check_choice("level", level, ("token", "sequence"))
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}, expected (N, T)")
    check_shape("old_logprobs", old_logprobs, logprobs.shape, "the (N, T) of logprobs")
    check_shape("ref_logprobs", ref_logprobs, logprobs.shape, "the (N, T) of logprobs")
    check_shape("mask", mask, logprobs.shape, "the (N, T) of logprobs")
    check_shape("advantages", advantages, logprobs.shape[:1], "one per sequence")
    high = clip_low if clip_high is None else clip_high
    inputs = (logprobs, old_logprobs, ref_logprobs, advantages, mask)
    per_token, ratio, kl = token_objective(*inputs, clip_low, high, kl_coef, level)
    watched = {"ratio": ratio, "clip_low": ratio < 1 - clip_low, "clip_high": ratio > 1 + high}
    if kl is not None:
        watched["kl"] = kl
    metrics = {name: reduce_tokens(x.detach().to(ratio.dtype), mask) for name, x in watched.items()}
    return reduce_tokens(per_token, mask, reduction, max_tokens), metrics


@torch.no_grad()
def look_back(policy, reference, layout, hidden, ref_hidden, targets, temperature=1.0):
    """Score the sampled tokens under the policy that sampled them and under the frozen base.

    From the states (N,T,C) of both: old_logprobs, ref_logprobs, exact KL and entropy, (N,T) each,
    in nats."""

    def all_logprobs(model, states):
        logits = matmul(states.flatten(0, 1), allowed_head(model, layout).T.to(states.dtype))
        return (logits / temperature).log_softmax(-1).unflatten(0, targets.shape)

    new, ref = all_logprobs(policy, hidden), all_logprobs(reference, ref_hidden)
    p = new.exp()
    kl, entropy = (p * (new - ref)).sum(-1), -(p * new).sum(-1)  # (G10)
    old_logprobs, ref_logprobs = (x.gather(-1, targets[..., None])[..., 0] for x in (new, ref))
    return old_logprobs, ref_logprobs, kl, entropy


# ------------------------------------------------ controls: the same rewards, without GRPO


def best_and_worst(rewards: Tensor, margin: float = 0.1) -> tuple[Tensor, Tensor]:
    """Rewards (B,G) -> indices into the B*G candidates, (K,) each, of the best and the worst of
    every group whose rewards spread by more than `margin`: below that, the best is no better."""
    rewards = checked_rewards(rewards)
    first = torch.arange(len(rewards), device=rewards.device) * rewards.shape[1]
    spread = rewards.amax(1) - rewards.amin(1) > margin
    return (first + rewards.argmax(1))[spread], (first + rewards.argmin(1))[spread]


def rejection_loss(logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Rejection-sampling fine-tuning: next-token learning on only the best candidate per group.

    logprobs, ref_logprobs (not used) and mask (N,T), rewards (B,G) with N = B*G -> loss. 0 if no
    group has a spread.

    >>> logprobs = torch.tensor([[0.5], [0.2], [0.1], [0.3]]).log()
    >>> rewards = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    >>> loss = rejection_loss(logprobs, logprobs, rewards, torch.ones(4, 1))
    >>> round(loss.item(), 4)  # -log 0.2
    1.6094
    """
    best, _ = best_and_worst(rewards)
    return -reduce_tokens(logprobs[best], mask[best])  # (G11)


def dpo_loss(
    logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor, beta: float = 0.1
) -> Tensor:
    """Direct preference optimization on one pair per group: its best against its worst candidate.
    Source: arXiv:2305.18290.

    logprobs, ref_logprobs, mask (N,T), rewards (B,G) with N = B*G -> loss. 0 if no group has a
    spread.

    >>> new, ref = torch.tensor([[0.5], [0.1]]).log(), torch.tensor([[0.25], [0.2]]).log()
    >>> loss = dpo_loss(new, ref, torch.tensor([[1.0, 0.0]]), torch.ones(2, 1), beta=0.5)
    >>> round(loss.item(), 4)  # -log sigmoid(log 4 / 2)
    0.4055
    """
    valid = mask > 0
    gain = torch.where(valid, logprobs - ref_logprobs.detach(), 0.0).sum(1)
    best, worst = best_and_worst(rewards)
    return -F.logsigmoid(beta * (gain[best] - gain[worst])).sum() / max(len(best), 1)  # (G12)


# ------------------------------------------------ baselines: objectives on representations


def contrastive_loss(model: Transformer, vocab, examples, codes: Tensor, scale=10.0) -> Tensor:
    """CLIP-style alignment of the policy itself: the mean states of a picture and of its text, each
    read alone, attract each other. N examples with texts, codes (N,P) -> loss. Equal texts are
    positives of each other. Source: arXiv:2103.00020."""
    texts = [e._replace(prompt=e.prompt or e.answer, answer="") for e in examples]
    means = []
    for task, kind in (("caption", "picture"), ("draw", "prompt")):
        rows, layout = vocab.rows(task, texts, codes), vocab.layout(task, codes.device)
        _, start, end, _ = next(span for span in layout.spans if span.kind == kind)
        states = at_least_float32(model(rows[:, :end], layout.patch[:end])[:, start:end])
        valid = (rows[:, start:end] != PAD)[..., None]
        means.append(F.normalize((states * valid).sum(1), dim=-1))
    logits = scale * matmul(means[0], means[1].T)
    words = rows[:, start:end]
    different = (words[:, None] != words).any(-1)
    right = logits.masked_fill(different, -torch.inf)
    return sum(0.5 * (logits.logsumexp(d) - right.logsumexp(d)).mean() for d in (0, 1))  # (G13)


def masked_code_loss(model: Transformer, vocab, examples, codes: Tensor, share=0.4) -> Tensor:
    """BEiT-style: hide a share of a picture's codes and predict them from the other codes, with
    bidirectional attention inside the picture. codes (N,P) -> loss; texts are not used. Source:
    arXiv:2106.08254."""
    layout = vocab.layout("caption", codes.device)
    _, start, end, _ = next(span for span in layout.spans if span.kind == "picture")
    rows = vocab.rows("caption", [e._replace(answer="") for e in examples], codes)[:, :end]
    inside = layout.patch[:end] >= 0
    hidden = (torch.rand(rows.shape, device=rows.device) < share) & inside
    causal = torch.ones(end, end, dtype=torch.bool, device=rows.device).tril()
    visible = causal | (inside[:, None] & inside)
    states = model(rows.masked_fill(hidden, PAD), layout.patch[:end], mask=visible)[hidden]
    logits = matmul(states, model.head[vocab.n_text :].T.to(states.dtype))
    return F.cross_entropy(logits, rows[hidden] - vocab.n_text)  # (G14)
