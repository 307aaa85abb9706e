# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] slideshow={"slide_type": "skip"}
# Four and a half lectures on how GRPO aligns a vision-language model, for use beside the notebooks.
# Edit `slides.py`, then `python notebooks/teaching/make_slides.py` executes it and writes
# `slides.ipynb`. For a browser:
#
#     jupyter nbconvert --to slides --no-input notebooks/teaching/slides.ipynb
#
# This needs `pip install nbconvert`, which is not among the requirements of the repository. The
# test suite therefore checks the slides' metadata, not the export. The pictures are in `results/`,
# so the `.html` has to stay in this folder. `S` opens the speaker's notes.

# %% slideshow={"slide_type": "skip"}
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path("..").resolve()))
import course
import matplotlib.pyplot as plt
import torch
from course import BLUE, GREY, HERE, RED
from IPython.display import Markdown, display
from matplotlib.ticker import MaxNLocator

plt.rcParams.update(course.STYLE | {"figure.figsize": (7.5, 3), "font.size": 12})
LOGS = json.loads((HERE / "sick_runs.json").read_text(encoding="utf-8"))

# %% [markdown] slideshow={"slide_type": "slide"}
# # How does GRPO align a vision-language model?
#
# Four and a half lectures, one small transformer, no framework
#
# 1. Tokens and a transformer
# 2. Pre-training and rewards
# 3. From a bandit to GRPO (half a lecture)
# 4. GRPO
# 5. Kernels and honesty

# %% [markdown] slideshow={"slide_type": "slide"}
# # Lecture 1
# ## Tokens and a transformer

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One vocabulary for words and pictures
#
# * A picture of 32 × 32 pixels is cut into 16 patches.
# * Each patch becomes the number of its nearest entry in a **codebook** (k-means).
# * Words and codes are ids of one vocabulary.
# * Reading and drawing are then the same act: *choose the next token*.

# %% [markdown] slideshow={"slide_type": "notes"}
# Notebook 01. Ask before you run it: what is lost when an object sits half a patch off the grid?

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A task is a row of tokens in fixed columns
#
# | task | given | chosen |
# |---|---|---|
# | draw | words | 16 codes |
# | caption | 16 codes | words |
# | vqa | 16 codes, question | one word |
#
# The **completion mask** marks what the policy chose. Only these tokens are rewarded or blamed.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A transformer that cannot look ahead
#
# * Attention with a causal mask: token *t* sees 0 … *t*.
# * Rotary positions: the score of two tokens depends on their distance.
# * A cache keeps keys and values, so a new token costs one column.
#
# **Question.** A fresh model shows no influence of earlier tokens on later states. Is it causal?

# %% [markdown] slideshow={"slide_type": "fragment"}
# It is, but this test cannot fail: the matrices that write into the residual stream start at 0.
# Test with random weights.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Sampling
#
# * Softmax of the scores over a temperature *T*; only legal ids (words, or codes) take part.
# * *T* → 0 takes the likeliest token.
# * **Sample and score with the same ids and the same temperature.** Otherwise the ratio of lecture
#   4 is not 1 even before the policy has moved.

# %% [markdown] slideshow={"slide_type": "slide"}
# # Lecture 2
# ## Pre-training and rewards

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What do noisy captions teach?
#
# Captions name a wrong colour in 30% of the cases, evenly over the three others.
#
# * Vote: what does the model draw at *T* = 1? And at *T* = 0.1?

# %% [markdown] slideshow={"slide_type": "fragment"}
# * At *T* = 1 about what it was shown: a wrong colour in some 30%.
# * At *T* = 0.1 nearly always the right colour: it is still the likeliest one.
# * So a low temperature repairs *careless* errors for free. It does not repair a *systematic* one,
#   whose likeliest answer is wrong.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Who says what is better?
#
# | | learns from | says |
# |---|---|---|
# | rule | nothing | is the answer the key? |
# | CLIP | noisy pairs | is the prompt likelier than all its small edits together? |
# | Bradley-Terry | ranked pairs | P(*i* preferred to *j*) = σ(R*i* − R*j*) |
# | **judge** | nothing | reads the pixels; *never trained on* |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Four drawings of one prompt
#
# <img src="../../results/four_samples.png" width="830" alt="four drawings, the third right">
#
# “a red circle left of a blue square”: only the third is right.
#
# Rewards −5.02, −5.01, −0.77, −4.12 (log-probability that the picture shows its prompt and not an
# edit of it).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Every reward has blind spots
#
# * CLIP sees only what distinguishes its negatives.
# * A rule sees only what it was written to see.
# * Only *differences* of a Bradley-Terry reward mean anything: R = 3.1 is neither good nor bad.
#
# **In class.** Invent a reward. Your neighbour says how a policy will hack it.

# %% [markdown] slideshow={"slide_type": "slide"}
# # Lecture 3
# ## From a bandit to GRPO

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Learning from rewards alone
#
# $$\nabla\, \mathbb{E}_{a \sim \pi}[r(a)]
# = \mathbb{E}_{a \sim \pi}\left[r(a)\, \nabla \log \pi(a)\right]$$
#
# * Pull an arm, get a reward: nobody says which arm was right, and *r* has no gradient.
# * The score function ∇ log π turns the gradient of an average into an average: REINFORCE.
#
# **Question.** The best arm is pulled, its reward is −1. What does REINFORCE do to this arm?

# %% [markdown] slideshow={"slide_type": "fragment"}
# It makes the arm less likely. Only the average over many pulls is right.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A baseline costs nothing
#
# $$\mathbb{E}_{a \sim \pi}[b\, \nabla \log \pi(a)] = b\, \nabla \sum_a \pi(a) = 0$$
#
# * Subtract any *b* that does not depend on the arm: the mean stays, the variance falls.
# * GRPO's baseline is the mean reward of the group. It includes the sample itself, which shrinks
#   the estimate by (G − 1)/G: a constant that the learning rate makes up for.
#
# Notebook 05 checks both by enumeration, without sampling.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Samples grow old
#
# $$\mathbb{E}_{a \sim \pi}[r(a)] = \mathbb{E}_{a \sim \pi_{\mathrm{old}}}
# \left[\frac{\pi(a)}{\pi_{\mathrm{old}}(a)}\, r(a)\right]$$
#
# * The **ratio** lets one rollout serve several updates.
# * The further the policy moves, the wilder the ratios: hence the clip, and the KL to the base.

# %% [markdown] slideshow={"slide_type": "slide"}
# # Lecture 4
# ## GRPO

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A group grades itself
#
# $$A_i = \frac{r_i - \mathrm{mean}_j\, r_j}{\mathrm{std}_j\, r_j + \epsilon}$$
#
# * *G* candidates of one prompt; their mean is the baseline; no value network.
# * [1, 1, 0, 0] gives ±0.87 (sample std). [1, 1, 1, 1] gives 0: such a group is uninformative.
# * Dr. GRPO: leave out the std, since a small one magnifies differences that mean little.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The clip

# %% slideshow={"slide_type": "-"}
ratio = torch.linspace(0.4, 1.8, 281)
figure, axes = plt.subplots(1, 2, sharey=True)
for ax, a in zip(axes, (1, -1)):
    objective = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    flat = ratio >= 1.2 if a > 0 else ratio <= 0.8
    ax.plot(ratio, objective, color=BLUE)
    ax.plot(ratio[flat], objective[flat], color=RED, linewidth=4, label="gradient 0")
    ax.set(xlabel="ratio: new over old probability", title=f"A = {a:+}")
axes[0].set_ylabel("objective")
axes[0].legend()
plt.show()

# %% [markdown] slideshow={"slide_type": "notes"}
# Each corner once, on the board: a good token that became likelier, a good one that became rarer,
# and the same for a bad one. Two of four are never clipped, because they are mistakes.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The loss
#
# $$\ell_t = -\min\left(\rho_t A,\ \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\, A\right)
# + \beta\, \mathrm{k3}_t, \qquad \mathrm{k3}_t = e^{d_t} - d_t - 1$$
#
# ρ: new over old probability. d = log p_ref − log p: how far the policy is from the frozen base.
#
# **Why is my loss 0?** Right after sampling ρ = 1, so the loss is minus the mean advantage, 0 by
# construction. Its gradient is not 0. Watch the reward.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A reward goes up. So?

# %% slideshow={"slide_type": "-"}
figure, axes = plt.subplots(1, 2)
for name, color, label in (("healthy", BLUE, "a reward that fits"), ("C", RED, "counts pixels")):
    reward, judge = LOGS[name]["reward"], LOGS[name]["judge"]
    axes[0].plot([r - reward[0] for r in reward], color=color, label=label)
    axes[1].plot(*zip(*[(i, j) for i, j in enumerate(judge) if j is not None]), color=color)
axes[0].set(xlabel="step", ylabel="nats", title="reward, minus its first value")
axes[1].set(xlabel="step", ylabel="share right", ylim=(0, 1), title="judge, never trained on")
axes[0].legend()
plt.show()

# %% [markdown] slideshow={"slide_type": "notes"}
# From sick_runs.json: this is log C of the lab, so show it after the lab, or do not mention the
# letter.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Six ways to be sick
#
# | cause | what shows it |
# |---|---|
# | sampler and loss disagree | ratios differ from 1 in the first pass |
# | no spread in any group | nothing moves: KL exactly 0 |
# | clip with the wrong sign | single ratios of 100; reward and judge hide it |
# | certainty is rewarded | entropy → 0, then no spread |
# | no KL penalty | KL keeps growing |
# | a reward with a loophole | reward up, judge down |
#
# Lab: diagnose six unlabelled logs (“Sick runs”).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Before and after
#
# <img src="../../results/model/before_after.png" height="500" alt="drawings before and after">
#
# The same prompts, the same noise. Left four before, right four after; green is right.

# %% [markdown] slideshow={"slide_type": "slide"}
# # Lecture 5
# ## Kernels and honesty

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where does the memory go?
#
# * Logits, their softmax and their gradient: 3 × 4 bytes for each of N · T · V.
# * 16 rows of 1,024 tokens, 128,256 ids: **25 GB**, for one number per token.
# * Online softmax: keep a running maximum and a running sum; a chunk of logits lives only for a
#   moment.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What was found here

# %% slideshow={"slide_type": "-"}
WORDS = {"compose_heldout": "three objects, never seen with a caption (T = 1)",
         "compose_pairs": "pairs that no caption joined (T = 1)",
         "compose": "known pairs (T = 1)", "compose @ equal differ": "the same at equal variety",
         "vqa": "questions, with the same answer keys"}  # fmt: skip
lines = ["| five seeds, Student's t | lvrpo − unified | |", "|---|---|---|"]
study = json.loads((HERE.parent / "results" / "claims.json").read_text(encoding="utf-8"))
claims = {c["metric"]: c for c in study["claims"] if c["against"] == "unified"}
for metric, words in WORDS.items():
    claim = claims[metric]
    half = (claim["high"] - claim["low"]) / 2
    number = f"{claim['difference']:+.3f} ± {half:.3f}".replace("-", "−")
    lines.append(f"| {words} | {number} | **{claim['verdict']}** |")
display(Markdown("\n".join(lines)))

# %% [markdown] slideshow={"slide_type": "-"}
# `unified`: further next-token training for the same seconds, on the same pairs and on the very
# prompts and answers that GRPO sees.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How one fools oneself

# %% slideshow={"slide_type": "-"}
metrics = torch.arange(1, 21)
figure, ax = plt.subplots()
ax.plot(metrics, 1 - 0.975**metrics, "o-", color=RED, label="at least one “win”")
ax.axhline(0.025, color=GREY, label="one metric")
ax.set(xlabel="independent metrics one looks at", ylabel="chance", ylim=(0, 0.5),
       title="two methods that are exactly equal, 95% intervals")
ax.xaxis.set_major_locator(MaxNLocator(integer=True))
ax.legend()
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Before you believe a number
#
# * Which temperature? Show quality *against* diversity.
# * Against what, at the same cost and with the same information?
# * How many seeds, paired how? Show the interval, and what got worse.
# * Who judges? Not the reward.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Project
#
# Change **one** thing: a reward, the noise, a task, a reduction.
#
# 1. Predict, in writing.
# 2. Three seeds, the same seconds, `eval.py --compare`.
# 3. Report the front, the interval, and what got worse.
#
# A result that does not hold is also a result.
