# %% [markdown]
# # 05 · From a bandit to GRPO
#
# **You will see** how one learns from rewards alone, when nobody can show the right answer: first
# on a slot machine with three arms, where every expectation can be computed exactly, then step by
# step up to the loss of this course. Each step is there because the one before it fails at
# something, and you will measure what.
#
# No reinforcement learning is assumed. The code is in `grpo.py`; its equation numbers stand to the
# right of the formulas.

# %%
import itertools
import math

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GOLD, GREEN, GREY, RED

from grpo import group_advantages, grpo_loss

course.start(minutes=0.2)
course.map(5)

# %% [markdown]
# ## A bandit
#
# A **bandit** is a slot machine with several **arms**. We pull one arm $a$ and get a reward
# $r(a)$; then the game is over. A **policy** $\pi$ is the probability of pulling each arm. Ours is
# a softmax over one number $\theta_a$ for each arm, its logit:
#
# $$ \pi_\theta(a) = \frac{e^{\theta_a}}{\sum_b e^{\theta_b}} $$
#
# We look for logits that make the **expected reward** large:
#
# $$ J(\theta) = \mathbb{E}_{a \sim \pi_\theta}\big[r(a)\big] = \sum_a \pi_\theta(a)\, r(a) $$
#
# In this course an arm is a whole picture that the model could draw for a prompt, and pulling the
# arm means drawing that picture. Here there are only three arms. Their rewards have the size of
# those that the CLIP of notebook 04 gives: log-probabilities, all of them negative.

# %%
ARMS = ("wrong", "half right", "right")
reward = torch.tensor([-5.0, -4.0, -1.0])
theta = torch.tensor([0.5, 0.3, 0.2]).log()  # the logits of a policy that prefers the wrong arm
policy = theta.softmax(0)
J = float(policy @ reward)
for name, p, r in zip(ARMS, policy.tolist(), reward.tolist()):
    print(f"{name:11} probability {p:.1f}   reward {r:+.0f}")
print(f"expected reward J = {J:.2f}")

# %% [markdown]
# How does a probability change with the logits? Take the logarithm of the softmax and differentiate
# it with respect to the logit of some arm $k$ (the bracket $[a = k]$ is 1 if $a = k$, and 0
# otherwise):
#
# $$ \frac{\partial}{\partial \theta_k} \log \pi_\theta(a)
#    = \frac{\partial}{\partial \theta_k} \Big( \theta_a - \log \sum_b e^{\theta_b} \Big)
#    = [a = k] - \pi_\theta(k) $$
#
# > **Predict.** All rewards are negative. We follow the gradient of $J$ uphill: which of the three
# > logits grow, and which shrink?

# %%
logits = theta.clone().requires_grad_()
(exact,) = torch.autograd.grad(logits.softmax(0) @ reward, logits)
for name, slope, p, r in zip(ARMS, exact.tolist(), policy.tolist(), reward.tolist()):
    print(f"{name:11} dJ/dlogit = {slope:+.3f}   p · (r - J) = {p * (r - J):+.3f}")

# %% [markdown]
# **Check.** The second column explains the first: an arm's logit grows if the arm is better than
# the *average* $J$. The sign of the reward does not matter. The expression is an
# **advantage**, $r(k) - J$, times the probability of the arm. We will come back to it.
#
# ## The score-function identity
#
# With three arms we can sum over all of them. A picture of 16 tokens, each one of 100 codes, has
# $100^{16}$ arms: nobody can sum those. But we can *sample*, and the mean of a few samples
# estimates any sum of the form $\sum_a \pi(a) \cdot$ something. The gradient of $J$ does not have
# this form, so we rewrite it:
#
# $$ \begin{aligned}
# \nabla J &= \nabla \sum_a \pi(a)\, r(a)
#   && \text{the definition of } J \\
# &= \sum_a r(a)\, \nabla \pi(a)
#   && r(a) \text{ does not depend on } \theta \\
# &= \sum_a \pi(a)\, r(a)\, \frac{\nabla \pi(a)}{\pi(a)}
#   && \text{times } \pi(a) / \pi(a) \text{, and a softmax is never } 0 \\
# &= \sum_a \pi(a)\, r(a)\, \nabla \log \pi(a)
#   && \text{the chain rule: } \nabla \log x = \nabla x / x \\
# &= \mathbb{E}_{a \sim \pi}\big[ r(a)\, \nabla \log \pi(a) \big]
#   && \text{the definition of an expectation}
# \end{aligned} $$
#
# The vector $\nabla \log \pi(a)$ is the **score function** of the arm. To pull an arm and take
# $r(a)\, \nabla \log \pi(a)$ as an estimate of the gradient is **REINFORCE** (R. Williams, 1992).
# The reward itself is never differentiated: it may come from a rule, a judge or a person.

# %%
def reinforce(theta, arm, reward):
    """Exercise 1. Logits theta (K,), the number of the pulled arm, its reward -> the REINFORCE
    estimate (K,) of the gradient of the expected reward. Without autograd; leave `theta`
    unchanged."""
    raise NotImplementedError


course.check(reinforce)

# %% [markdown]
# The check takes your estimate for every arm, weights it by the probability of the arm, and
# compares the sum with the gradient that autograd finds. This is **enumeration**: an expectation
# without sampling, and so without luck.
#
# > **Predict.** You pull the *best* arm and its reward is −1. Then you take a small step along the
# > estimate. Does the best arm become likelier?

# %%
estimate = course.use(reinforce)


def estimates(weights):
    """(arms, logits): what is estimated when an arm is pulled, if its "reward" is weights[arm]."""
    return torch.stack([estimate(theta, a, float(w)) for a, w in enumerate(weights)])


bars = torch.cat((estimates(reward), exact[None]))
figure, ax = plt.subplots(figsize=(5.8, 2.3))
for k, color in enumerate((RED, GOLD, GREEN)):
    ax.bar(np.arange(4) + 0.25 * (k - 1), bars[:, k], 0.25, color=color, label=f"“{ARMS[k]}”")
ax.axhline(0, color="black", linewidth=0.8)
labels = [f"pulled: {name}\n(p = {p:.1f})" for name, p in zip(ARMS, policy.tolist())]
ax.set(xticks=range(4), xticklabels=[*labels, "expectation\n(= gradient of J)"],
       ylabel="gradient, reward per logit",
       title=f"Best arm: {bars[2, 2]:+.2f} when it is pulled, {bars[3, 2]:+.2f} in expectation")
ax.legend(title="logit of", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# **Check.** It becomes *less* likely. The estimate knows only that this arm brought −1, and −1 is
# less than 0. The other arms are pushed away more strongly still, so that on average the best arm
# wins. The estimate is right on average, and almost never right: that is **noise**.
#
# ## A baseline
#
# The trouble is the comparison with 0. Let us compare the reward with some other number $b$, the
# **baseline**. Does that change the expectation?
#
# $$ \begin{aligned}
# \mathbb{E}_{a \sim \pi}\big[ b\, \nabla \log \pi(a) \big]
# &= b \sum_a \pi(a)\, \frac{\nabla \pi(a)}{\pi(a)}
#   && b \text{ is the same for every arm} \\
# &= b\, \nabla \sum_a \pi(a)
#   && \pi(a) \text{ cancels; a sum of gradients is the gradient of the sum} \\
# &= b\, \nabla 1 = 0
#   && \text{probabilities sum to 1}
# \end{aligned} $$
#
# So a baseline does not bias the gradient, whatever its value:
#
# $$ \nabla J = \mathbb{E}_{a \sim \pi}\big[ (r(a) - b)\, \nabla \log \pi(a) \big] $$
#
# The first line is the only place where something was assumed: **$b$ must not depend on the arm
# that was pulled.** It may depend on anything else.
#
# > **Predict.** Sketch the variance of the estimate against $b$, from −10 to 4. Where is it
# > smallest: at 0, at the mean reward, at the best reward? Is it 0 there?

# %%
def variance(weights):
    """Exact, by enumeration: the expected squared distance of an estimate from its mean."""
    each = estimates(weights)
    return float(policy @ (each - policy @ each).square().sum(1))


g = torch.Generator().manual_seed(0)
pulled = torch.multinomial(policy, 5000, replacement=True, generator=g)
for name, b in (("no baseline", 0.0), ("baseline: the mean reward", J)):
    sampled = estimates(reward - b)[pulled]  # (5000, 3)
    mean, spread = sampled.mean(0), float(sampled.var(0).sum())
    print(f"{name:26} mean of 5,000 estimates", *(f"{x:+.2f}" for x in mean.tolist()),
          f"  variance measured {spread:5.2f}, exact {variance(reward - b):5.2f}")
print(f"{'gradient, exact':26} {'':22}", *(f"{x:+.2f}" for x in exact.tolist()))

# %%
levels = np.linspace(-10, 4, 57)
curve = [variance(reward - b) for b in levels]
figure, ax = plt.subplots(figsize=(4.8, 2.3))
ax.plot(levels, curve, color=BLUE)
for b, label, color, left in ((0.0, "none", RED, 14), (J, "mean reward", GREEN, 0)):
    ax.plot(b, variance(reward - b), "o", color=color)
    ax.annotate(label, (b, variance(reward - b)), xytext=(-left, 8), textcoords="offset points",
                ha="center", color=color)
times = variance(reward) / variance(reward - J)
ax.set(xlabel="baseline b, in units of the reward", ylabel="variance, reward²",
       ylim=(0, None), title=f"The mean reward as baseline: {times:.0f} times less variance")
plt.show()
best = float(levels[int(np.argmin(curve))])
print(f"smallest at b = {best:.2f}, where it is {min(curve):.2f}; the mean reward is {J:.2f}")

# %% [markdown]
# **Check.** Both rows have the same mean up to luck, and very different variances. The mean of $n$
# estimates has $n$ times less variance than one, so with this baseline one sample is worth six
# without. The best $b$ is a mean of the rewards, each weighted by the squared length of its score;
# it lies near the mean reward. The variance is not 0 there: even with the best baseline, one pull
# says nothing about the other arms.
#
# ## Nobody knows the mean reward
#
# The expected reward of a prompt is not known, and a network that learns to predict it (a *value
# network*) would be a second model to train. Another way: pull $G$ times for the same prompt, a
# **group** of independent samples, and let the samples be each other's baseline.

# %%
def unbiased_advantages(rewards):
    """Exercise 2. The rewards of one group (G,), G >= 2 -> a number for each sample (G,), in place
    of its reward, such that the mean over the group of (number · score) is still the gradient of J
    on average, and is less noisy. There is more than one good answer. Which rewards may the
    baseline of sample i depend on?"""
    raise NotImplementedError


course.check(unbiased_advantages)

# %% [markdown]
# This check enumerates all groups that can occur: $3^G$ of them, each with its probability.
#
# In code nobody writes scores by hand. Autograd differentiates $A \log \pi(a)$, with $A$ held
# fixed, and the result is $A\, \nabla \log \pi(a)$.
#
# > **Predict.** Somebody adds 20 to every reward, so that they look nicer. That adds 20 to $J$ and
# > changes no gradient. 200 runs follow the gradient, with groups of 8 samples per step: with the
# > old rewards, with the nicer ones, and with your advantages of the nicer ones. What will you see?

# %%
def climb(advantages_of, runs=200, steps=51, group=8, lr=0.3):
    """(steps, runs): the expected reward while a policy climbs."""
    logits, g = theta.repeat(runs, 1).requires_grad_(), torch.Generator().manual_seed(0)
    history = []
    for _ in range(steps):
        logprobs = logits.log_softmax(1)  # (runs, 3)
        history.append(logprobs.detach().exp() @ reward)
        arms = torch.multinomial(logprobs.detach().exp(), group, replacement=True, generator=g)
        A = torch.stack([advantages_of(r) for r in reward[arms]])  # (runs, group)
        objective = (A * logprobs.gather(1, arms)).mean(1).sum()
        logits.data += lr * torch.autograd.grad(objective, logits)[0]
    return torch.stack(history)


mine = course.use(unbiased_advantages)
curves = {"rewards": (climb(lambda r: r), GOLD),
          "rewards + 20": (climb(lambda r: r + 20), RED),
          "advantages of rewards + 20": (climb(lambda r: mine(r + 20)), BLUE)}

# %%
figure, ax = plt.subplots(figsize=(6.4, 2.6))
for name, (history, color) in curves.items():
    ax.plot(history.mean(1), color=color, label=name)
    ax.fill_between(range(len(history)), *history.quantile(torch.tensor([0.05, 0.95]), dim=1),
                    color=color, alpha=0.15, linewidth=0)
ax.axhline(float(reward.max()), color=GREY, linestyle=":", label="reward of the best arm")
end = [float(history[-1].mean()) for history, _ in curves.values()]
ax.set(xlabel="step (8 samples each)", ylabel="expected reward J",
       title=f"At the end {end[0]:.2f}; + 20: {end[1]:.2f}; advantages: {end[2]:.2f}")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1),
          title="means of 200 runs;\nbands: 90% of the runs")
plt.show()
for name, (history, _) in curves.items():
    end = history[-1]
    print(f"{name:27} after 50 steps: mean {end.mean():+.2f}, worst run {end.min():+.2f}")

# %% [markdown]
# **Check.** The expected gradient is the same in all three, and the noise is not. With rewards
# around 15 every pulled arm is pushed *up*, whatever it brings, so an arm pulled by chance is
# pulled again. Some runs settle on a bad arm, and a policy that hardly ever pulls the right arm can
# no longer learn that it is right. (The old rewards do no harm: they are negative and not far from
# 0, so the arms that were not pulled are tried next.) A baseline makes the constant irrelevant.
#
# ## The group's mean
#
# GRPO subtracts the mean of the *whole* group, sample $i$ included, which the proof above does not
# allow. What does that do?
#
# $$ \begin{aligned}
# r_i - \frac{1}{G} \sum_{j} r_j
# &= \frac{G - 1}{G}\, r_i - \frac{1}{G} \sum_{j \ne i} r_j
#   && \text{sample } i \text{ taken out of the sum} \\
# &= \frac{G - 1}{G} \Big( r_i - \frac{1}{G - 1} \sum_{j \ne i} r_j \Big)
#   && \text{the bracket: a baseline from the others only}
# \end{aligned} $$
#
# It is an unbiased advantage times a constant, which shortens every step; a higher learning rate
# makes up for it. GRPO also divides by the group's standard deviation, so that rewards in any unit
# make steps of similar size:
#
# $$ A_i = \frac{r_i - \operatorname{mean}_j r_j}{\operatorname{std}_j r_j + \epsilon} \tag{G1} $$
#
# > **Predict.** Over all groups of 2, 4 and 8: how long is the mean estimate, relative to the exact
# > gradient, without the division? With it, does it still point the same way?

# %%
def mean_estimate(size, scale):
    """(3,): the expectation over all 3^size groups, by enumeration."""
    groups = torch.tensor(list(itertools.product(range(3), repeat=size)))  # (3^size, size)
    A, scores = group_advantages(reward[groups], scale), estimates(torch.ones(3))[groups]
    return policy[groups].prod(1) @ (A[..., None] * scores).mean(1)


print("group   without std: length, angle      divided by std: length, angle")
for size in (2, 4, 8):
    row = f"{size:5}"
    for scale in ("none", "group"):
        mean = mean_estimate(size, scale)
        cosine = float(mean @ exact / mean.norm() / exact.norm())
        angle = math.degrees(math.acos(min(cosine, 1.0)))
        row += f"{float(mean.norm() / exact.norm()):20.3f}{angle:9.1f}°"
    print(row)

# %% [markdown]
# **Check.** Without the division: $(G - 1) / G$ of the length, to all digits, and the same
# direction. With it the direction changes, since groups with a small spread are scaled up more than
# the others. So (G1) is *not* an unbiased estimate of the gradient of $J$. It is a choice that
# works well; `scale="none"` leaves it out (Dr. GRPO), and notebook 06 looks at what it does to
# small differences.
#
# ## Old samples: the importance ratio
#
# Sampling costs time, so we would like to take several steps on the same samples. But after the
# first step the samples come from an **old** policy. They can still estimate expectations under the
# current policy, if each sample is weighted:
#
# $$ \begin{aligned}
# \mathbb{E}_{a \sim \pi}\big[ f(a) \big] &= \sum_a \pi(a)\, f(a)
#   && \text{the definition} \\
# &= \sum_a \pi_{\mathrm{old}}(a)\, \frac{\pi(a)}{\pi_{\mathrm{old}}(a)}\, f(a)
#   && \text{times } \pi_{\mathrm{old}}(a) / \pi_{\mathrm{old}}(a) \\
# &= \mathbb{E}_{a \sim \pi_{\mathrm{old}}}\big[ \rho(a)\, f(a) \big]
#   && \rho \text{: the weight}
# \end{aligned} $$
#
# $$ \rho(a) = \frac{\pi(a)}{\pi_{\mathrm{old}}(a)}
#    = \exp\big( \log \pi(a) - \log \pi_{\mathrm{old}}(a) \big) \tag{G4} $$
#
# This is the **importance ratio**. Code has log-probs, hence the second form.

# %%
def importance_estimate(logprobs, old_logprobs, values):
    """Exercise 3. N samples of the old policy: their log-probs under the current policy and under
    the old one, and values f, (N,) each -> the estimate of the expectation of f under the current
    policy, a number. Gradients flow into `logprobs`."""
    raise NotImplementedError


course.check(importance_estimate)

# %% [markdown]
# What is its gradient? By the same rule as before, read backwards:
#
# $$ \nabla \rho(a) = \frac{\nabla \pi(a)}{\pi_{\mathrm{old}}(a)}
#    = \rho(a)\, \frac{\nabla \pi(a)}{\pi(a)} = \rho(a)\, \nabla \log \pi(a) $$
#
# So the gradient of $\rho A$ is $\rho A\, \nabla \log \pi(a)$: REINFORCE, corrected for old
# samples, and exactly REINFORCE where $\pi = \pi_{\mathrm{old}}$ and $\rho = 1$. That is why the
# loss of this course has a ratio in it and no logarithm.
#
# > **Predict.** The old policy pulls the right arm in 2% of the cases. We move the policy towards
# > that arm. How much does one old sample still say about the expected reward of the new policy?

# %%
old = torch.tensor([0.68, 0.30, 0.02])
shares, of = torch.linspace(0.02, 0.98, 49), course.use(importance_estimate)
rows = []
for share in shares:
    new = torch.cat((old[:2] / old[:2].sum() * (1 - share), share[None]))
    one = torch.stack([of(new.log()[[a]], old.log()[[a]], reward[[a]]) for a in range(3)])  # (3,)
    mean = old @ one
    assert abs(mean - new @ reward) < 1e-4  # right on average, however far the policy has moved
    pairs = (old, one), (new, reward)
    rows.append([float((p @ (x - new @ reward) ** 2).sqrt()) for p, x in pairs])
weighted, fresh = np.array(rows).T
figure, ax = plt.subplots(figsize=(4.6, 2.3))
ax.plot(shares, weighted, color=RED, label="a sample of the old policy, weighted")
ax.plot(shares, fresh, color=BLUE, label="a fresh sample")
ax.set(xlabel="probability of the right arm, new policy (old: 0.02)",
       ylabel="std of an estimate, in units of the reward",
       title=f"An old sample is worse beyond {shares[np.argmax(weighted > fresh + 1e-3)]:.2f}")
ax.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# **Check.** The estimate is right on average everywhere (the cell asserts it). Close to the old
# policy an old sample is as good as a fresh one, and even better where the right arm is still rare.
# Far away it is worth little: nearly all samples have a weight close to 0, and a rare one has a
# weight of up to 49. Old samples are good for policies *close* to the old one.
#
# ## The clip
#
# So the loss should stop pushing once the ratio has left a small interval around 1, and only in the
# direction of the push:
#
# $$ \ell = -\min\Big( \rho A,\ \operatorname{clip}\big(\rho,\ 1 - \varepsilon_{\mathrm{low}},\
#    1 + \varepsilon_{\mathrm{high}}\big)\, A \Big) \tag{G7} $$
#
# The minus sign turns what we want to be large into a loss. Both $\varepsilon$ are usually 0.2;
# notebook 06 draws the curve and its four corners.
#
# > **Predict.** Rewards are now noisy (standard deviation 3). 200 runs take 40 steps each: on one
# > group of 8 samples without a clip, on one group with it, and on a fresh group every step. Which
# > has the best mean at the end? In which do runs end *below* their start?

# %%
def reuse(clip, fresh, runs=200, steps=41, group=8, lr=0.5):
    """(steps, runs): the expected reward of runs that see one group, or a fresh one every step."""
    logits, g = theta.repeat(runs, 1).requires_grad_(), torch.Generator().manual_seed(0)
    history = []
    for step in range(steps):
        logprobs = logits.log_softmax(1)
        history.append(logprobs.detach().exp() @ reward)
        if step == 0 or fresh:
            arms = torch.multinomial(logprobs.detach().exp(), group, replacement=True, generator=g)
            luck = 3 * torch.randn(runs, group, generator=g)
            A = group_advantages(reward[arms] + luck).view(-1)
            old = logprobs.detach().gather(1, arms).view(-1, 1)  # (N, T): one token each
        new = logprobs.gather(1, arms).view(-1, 1)
        loss, _ = grpo_loss(new, old, None, A, torch.ones_like(new), clip_low=clip, clip_high=clip)
        logits.data -= lr * runs * torch.autograd.grad(loss, logits)[0]  # a mean of runs
    return torch.stack(history)


NEVER = 1e6  # a clip range that no ratio leaves
curves = {"one group, no clip": (reuse(NEVER, False), RED),
          "one group, clip 0.2": (reuse(0.2, False), BLUE),
          "fresh groups, clip 0.2": (reuse(0.2, True), GREEN)}

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.2, 2.2))
for name, (history, color) in curves.items():
    mean, error = history.mean(1), 2 * history.std(1) / history.shape[1] ** 0.5
    axes[0].plot(mean, color=color, label=name)
    axes[0].fill_between(range(len(mean)), mean - error, mean + error, color=color, alpha=0.2)
    axes[1].plot((history < J - 1e-4).float().mean(1), color=color)
axes[0].set(xlabel="step", ylabel="expected reward J", title="Mean of 200 runs ± 2 std. errors")
axes[1].set(xlabel="step", ylabel="share of the runs", title="Runs below their start")
figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
course.show_small(figure, 32)
for name, (history, _) in curves.items():
    print(f"{name:23} mean {history[-1].mean():+.2f}, worst tenth of the runs below",
          f"{history[-1].quantile(0.1):+.2f}, {(history[-1] < J - 1e-4).float().mean():.0%} harmed")

# %% [markdown]
# **Check.** Without a clip the average still rises, but some of the runs learn the *luck* of their
# 8 samples and get worse the longer they train on them. The clip does not make a group say more. It
# stops when the group has said what it can, after a small step; then we draw fresh samples.
#
# ## The KL penalty
#
# A reward never says everything. The **reference**, the model before alignment, knows much that the
# reward does not cover, so we also penalise the distance from it:
#
# $$ J_\beta(\theta) = \mathbb{E}_{a \sim \pi}\big[ r(a) \big]
#    - \beta\, \mathrm{KL}(\pi \,\|\, \pi_{\mathrm{ref}}), \qquad
#    \mathrm{KL}(\pi \,\|\, \pi_{\mathrm{ref}})
#    = \sum_a \pi(a) \log \frac{\pi(a)}{\pi_{\mathrm{ref}}(a)} $$
#
# The best policy can be written down. Let
# $\pi^*(a) = \pi_{\mathrm{ref}}(a)\, e^{r(a) / \beta} / Z$, where $Z$ makes the sum 1. Then
#
# $$ \begin{aligned}
# J_\beta &= \sum_a \pi(a) \Big( r(a) - \beta \log \frac{\pi(a)}{\pi_{\mathrm{ref}}(a)} \Big)
#   && \text{both terms in one sum} \\
# &= -\beta \sum_a \pi(a) \log \frac{\pi(a)}{\pi_{\mathrm{ref}}(a)\, e^{r(a) / \beta}}
#   && r = \beta \log e^{r / \beta} \\
# &= -\beta\, \mathrm{KL}(\pi \,\|\, \pi^*) + \beta \log Z
#   && \text{the denominator is } Z \pi^*(a)
# \end{aligned} $$
#
# A KL is never negative and is 0 only for equal policies, so $\pi = \pi^*$ is the best one.
#
# > **Predict.** What is $\pi^*$ for a tiny $\beta$, and for a huge one?

# %%
def ascend(beta, steps=800, lr=1.0):
    """Gradient ascent on J_beta from the reference, exactly: no samples."""
    logits = theta.clone().requires_grad_()
    for _ in range(steps):
        p = logits.softmax(0)
        objective = p @ reward - beta * (p @ (p.log() - policy.log()))
        logits.data += lr / (1 + beta) * torch.autograd.grad(objective, logits)[0]
    return logits.detach().softmax(0)


betas = (0.3, 1.0, 3.0, 10.0, 100.0)
figure, ax = plt.subplots(figsize=(5.6, 2.6))
for k, color in enumerate((RED, GOLD, GREEN)):
    best = [float((policy * (reward / beta).exp() / (policy @ (reward / beta).exp()))[k])
            for beta in betas]
    found = [float(ascend(beta)[k]) for beta in betas]
    ax.bar(np.arange(5) + 0.25 * (k - 1), best, 0.25, color=color, label=f"“{ARMS[k]}”")
    ax.plot(np.arange(5) + 0.25 * (k - 1), found, "kx", label="found by ascent" if k == 2 else None)
ax.set(xticks=range(5), xticklabels=betas, xlabel="β (kl_coef), reward per nat",
       ylabel="probability", title="The best policy between reward and reference")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="arm; bars: π*")
plt.show()

# %% [markdown]
# **Check.** A tiny $\beta$ forgets the reference, a huge one the reward (compare the reference:
# 0.5, 0.3, 0.2). The crosses are where gradient ascent ends.
#
# The KL is a sum over all arms, so for pictures it too must be estimated from samples. `grpo.py`
# uses, for a sampled arm,
#
# $$ k_3(a) = e^{d(a)} - d(a) - 1, \qquad
#    d(a) = \log \pi_{\mathrm{ref}}(a) - \log \pi(a) \tag{G6} $$
#
# It is never negative, as $e^d \ge 1 + d$, and right on average:
#
# $$ \mathbb{E}_{a \sim \pi}\big[ k_3(a) \big]
#    = \underbrace{\sum_a \pi(a)\, \frac{\pi_{\mathrm{ref}}(a)}{\pi(a)}}_{1}
#    + \underbrace{\mathbb{E}_{a \sim \pi}\big[ -d(a) \big]}_{\mathrm{KL}}
#    - 1 = \mathrm{KL}(\pi \,\|\, \pi_{\mathrm{ref}}) $$
#
# Its *gradient* is another matter: on samples of the current policy it is that of
# $\mathrm{KL}(\pi_{\mathrm{ref}} \,\|\, \pi)$, the other direction. Both vanish only at the
# reference. The penalty enters the loss with the weight $\beta$:
#
# $$ \ell + \beta\, k_3 \tag{G8} $$
#
# ## From an arm to a sequence of tokens
#
# A picture or a sentence is one arm $o$, chosen token by token, and the log of a product of
# probabilities is a sum of log-probs:
#
# $$ \log \pi(o) = \sum_{t=1}^{T} \log \pi(o_t \mid o_{<t}), \qquad
#    A\, \nabla \log \pi(o) = \sum_{t=1}^{T} A\, \nabla \log \pi(o_t \mid o_{<t}) $$
#
# So the gradient above pushes every token by the *same* advantage, that of the whole sequence. The
# ratio of a whole sequence would be the product of the ratios of its tokens and would soon be far
# from 1: with 1.1 for each of 16 tokens it is 4.6. GRPO therefore takes one ratio for each *token*
# and clips each. That is an approximation, exact where all ratios are 1. Rows have different
# lengths, so a mask $m_{nt}$ is 1 for the tokens that were chosen and 0 for padding, and the loss
# is a mean over the valid tokens:
#
# $$ L = \frac{\sum_{n,t} m_{nt}\, \ell_{nt}}{\sum_{n,t} m_{nt}} \tag{G9} $$
#
# ## GRPO's whole objective
#
# For each prompt sample a group from $\pi_{\mathrm{old}}$; row $n$ is one sample, $A_n$ its
# advantage within its group. Then minimise
#
# $$ L(\theta) =
# \underbrace{\frac{1}{\sum_{n,t} m_{nt}} \sum_{n,t} m_{nt}}_{\text{(G9)}}
# \bigg[
# \underbrace{-\min\Big(
# \overbrace{\rho_{nt}}^{\text{(G4)}} \overbrace{A_n}^{\text{(G1)}},\
# \operatorname{clip}\big(\rho_{nt},\ 1 - \varepsilon_{\mathrm{low}},\
# 1 + \varepsilon_{\mathrm{high}}\big) A_n
# \Big)}_{\text{(G7)}}
# \underbrace{{}+ \beta\,
# \overbrace{\big( e^{d_{nt}} - d_{nt} - 1 \big)}^{\text{(G6)}}}_{\text{(G8)}}
# \bigg] $$
#
# $$ \rho_{nt} = \exp\big( \log \pi_\theta(o_{nt} \mid o_{n,<t})
#    - \log \pi_{\mathrm{old}}(o_{nt} \mid o_{n,<t}) \big), \qquad
#    d_{nt} = \log \pi_{\mathrm{ref}}(o_{nt} \mid o_{n,<t})
#    - \log \pi_\theta(o_{nt} \mid o_{n,<t}) $$
#
# The same term by term in Python, compared with `grpo_loss`:

# %%
g = torch.Generator().manual_seed(0)
new, old, ref = -3 * torch.rand(3, 8, 5, generator=g)  # log-probs (N, T) of two groups of 4
rewards = torch.randn(2, 4, generator=g)
mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=g)
mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
A = ((rewards - mean) / (std + 1e-4)).flatten().tolist()  # (G1)
total = count = 0
for n, t in mask.nonzero().tolist():
    rho = math.exp(new[n, t] - old[n, t])  # (G4)
    loss = -min(rho * A[n], min(max(rho, 1 - 0.2), 1 + 0.2) * A[n])  # (G7)
    d = float(ref[n, t] - new[n, t])
    loss += 0.02 * (math.exp(d) - d - 1)  # (G6), (G8)
    total, count = total + loss, count + 1
theirs, _ = grpo_loss(new, old, ref, group_advantages(rewards).flatten(), mask, kl_coef=0.02)
print(f"by the formula: {total / count:.6f}   grpo_loss: {theirs.item():.6f}")

# %% [markdown]
# ## The whole algorithm, on 27 sequences
#
# A tiny language: words of three letters, from an alphabet of three. A word is right (reward 1) if
# its letters all differ, and wrong (reward 0) otherwise. The policy is a table: the logits of the
# next letter, given its position and the letter before it.
#
# > **Predict.** 6 of the 27 words are right. After 60 steps: what share of the samples is right?
# > And how many *different* right words does the policy still write? With and without a KL penalty?

# %%
WORDS = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)
RIGHT = torch.tensor([len(set(word)) == 3 for word in WORDS.tolist()])


def logprobs_of(table, words):
    """Log-probs (N, 3) of the letters of words (N, 3). table (position, letter before, letter)."""
    before = torch.cat((torch.zeros_like(words[:, :1]), words[:, :-1]), 1)
    return table.log_softmax(2)[range(3), before].gather(2, words[..., None])[..., 0]


# %%
def grpo(kl_coef, seed, steps=61, prompts=4, group=8, epochs=2, lr=4.0):
    """GRPO on a table: share of right words and exp(entropy) of the right ones, step by step."""
    table, history = torch.zeros(3, 3, 3, requires_grad=True), []
    g = torch.Generator().manual_seed(seed)
    ref = logprobs_of(table, WORDS).detach()
    for _ in range(steps):
        old = logprobs_of(table, WORDS).detach()
        chance = old.sum(1).exp()  # of each word: the product of its letters' probabilities
        right = chance[RIGHT] / chance[RIGHT].sum()
        history.append((float(chance[RIGHT].sum()), float(torch.special.entr(right).sum().exp())))
        drawn = torch.multinomial(chance, prompts * group, replacement=True, generator=g)
        A = group_advantages(RIGHT[drawn].float().view(prompts, group)).flatten()
        for _ in range(epochs):
            rows, mask = logprobs_of(table, WORDS[drawn]), torch.ones(len(drawn), 3)
            loss, _ = grpo_loss(rows, old[drawn], ref[drawn], A, mask, kl_coef=kl_coef)
            table.data -= lr * torch.autograd.grad(loss, table)[0]
    return np.array(history)


# %%
figure, axes = plt.subplots(1, 2, figsize=(6.2, 2.2))
for kl_coef, color in ((0.0, RED), (0.1, BLUE), (0.5, GREEN)):
    runs = np.stack([grpo(kl_coef, seed) for seed in range(4)])  # (seeds, steps, 2)
    for ax, y in zip(axes, runs.transpose(2, 1, 0)):  # y: (steps, seeds)
        ax.plot(y, color=color, linewidth=0.5, alpha=0.5)
        ax.plot(y.mean(1), color=color, label=f"kl_coef = {kl_coef:g}")
    (share, different), mean = runs[:, -1].T, runs.mean(0)
    print(f"kl_coef {kl_coef:g}: right {mean[0, 0]:.2f} -> {mean[-1, 0]:.2f}",
          f"({share.min():.2f} to {share.max():.2f}), different right words",
          f"{mean[0, 1]:.1f} -> {mean[-1, 1]:.1f} ({different.min():.1f} to {different.max():.1f})")
axes[0].set(xlabel="step", ylabel="share of samples", title="Words that are right", ylim=(0, 1.02))
axes[1].set(xlabel="step", ylabel="exp(entropy), words", title="Different right words",
            ylim=(0, 6.2))
axes[0].legend(fontsize=8, title="mean of 4 seeds")
course.show_small(figure, 32)

# %% [markdown]
# **Check.** Nobody showed the policy a right word: it found them by trying. But it also gave up
# some of them, for no reason but luck: a word that was drawn and rewarded is drawn more often. The
# KL penalty keeps more variety and costs some of the reward. This is the trade-off that the rest of
# the course is about.
#
# | here | in the following notebooks |
# |---|---|
# | an arm | one candidate: a picture, a caption or an answer |
# | the table of logits | the transformer of notebook 02 |
# | the reward of an arm | the CLIP of notebook 04, or an answer key |
# | the reference | the base of notebook 03, frozen |
# | `grpo` above | `train.grpo_step`; by hand in notebooks 06 and 07 |
#
# ## The check cell

# %%
course.final(reinforce, unbiased_advantages, importance_estimate)
