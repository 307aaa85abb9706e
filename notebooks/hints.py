"""The hints of all exercises, in steps: the first is gentle, the last is nearly the answer.

`course.hint(my_function, 1)` prints the first one. A test checks that every exercise has at
least two, and that none of them contains a line of the solution.
"""

HINTS = {
    # 01 the world and its tokens
    "cut_patches": (
        "Think of the picture as a grid of squares. Which four numbers say where a pixel is: "
        "two for the square, two for its place inside the square?",
        "A reshape can split the height into (number of squares, p), and the width likewise. "
        "The channels stay last.",
        "After the split the axes are: square row, pixel row, square column, pixel column, "
        "channel. A permute should bring both square axes to the front; the last reshape then "
        "flattens each square.",
    ),
    "nearest_code": (
        "For each patch you need a score for every entry; then the entry with the smallest "
        "score.",
        "Expand |x - c|². One of its three terms is the same for all entries and can be left "
        "out.",
        "What is left: the squared length of each entry, a vector (K,), minus twice the matrix "
        "product of patches and transposed entries, (N, K). The argmin runs over K.",
    ),
    "kmeans_step": (
        "There are two steps: which entry is nearest to each patch, and then a mean for each "
        "entry.",
        "Start from a copy of the entries. Change only those that some patch has chosen.",
        "A loop over the codes that occur is enough: select the patches of that code by a "
        "comparison and put their mean over the rows into the copy.",
    ),
    # 02 one transformer
    "causal_attention": (
        "First ask what the first position may look at, and what its result must therefore be.",
        "Compute all L × L scores, make those of the future impossible, and only then take the "
        "softmax.",
        "A score of minus infinity becomes a weight of 0. `triu` with a diagonal of 1 finds the "
        "future. The scores are divided by the root of the width D, the last axis of q.",
    ),
    "attend_next": (
        "There is no mask here: everything in the cache is the past.",
        "Append the new key and value to the cache before you attend: a token also sees itself.",
        "The scores are the matrix of all keys times the query, over the root of its length. "
        "Softmax them, weight the values, and return the result with both longer lists.",
    ),
    "allowed_probs": (
        "Probabilities of the allowed ids must sum to 1, so the others have to be gone before "
        "the softmax.",
        "Compare `torch.arange` of the vocabulary with the two ends: `first` is allowed, `last` "
        "is not.",
        "Divide the logits by the temperature, fill the ids that are not allowed with minus "
        "infinity (in a new tensor), and take the softmax.",
    ),
    # 03 pre-training and noise
    "noise_floor": (
        "The loss of an outcome is -log of its probability. How often does each loss occur?",
        "Weight each loss by its probability and add up. The logarithm is the natural one.",
        "An outcome of probability 0 never costs anything, but its logarithm is minus infinity: "
        "leave it out of the sum.",
    ),
    "sharpened": (
        "What does softmax(log p / T) do to a single p, before it is normalised?",
        "Dividing a logarithm by T is the same as raising the number to the power 1 / T.",
        "Raise all probabilities to that power, then divide by their sum so that they are "
        "probabilities again. Make new tensors.",
    ),
    "next_token_logprobs": (
        "A loss below the floor means that the model knows what it should predict. Which state "
        "has seen which tokens?",
        "The state at place t has read tokens 0 to t. It must not score token t.",
        "Only one slice is wrong. There are L states and L - 1 tokens to score: the last state "
        "has nothing to score, the first one has.",
    ),
    # 04 rewards
    "info_nce": (
        "Row i of the scores is a choice among N texts, and text i is the right one. What about "
        "the columns?",
        "Each is an ordinary classification: `F.cross_entropy` with the right class of row i "
        "being i.",
        "Compute it for the scores and again for their transpose, with the numbers 0 to N - 1 "
        "as the right answers. Return the mean of the two.",
    ),
    "agreement": (
        "Make a list of pairs on paper first: one right and one wrong candidate of the same "
        "prompt.",
        "With two new axes, (B, G, 1) against (B, 1, G), every candidate meets every other one "
        "of its group.",
        "Select the entries whose first candidate is right and whose second is wrong. A positive "
        "difference of rewards counts 1, a difference of 0 counts one half, and the rest 0; "
        "then the mean.",
    ),
    "bradley_terry": (
        "Write down the probability that the better side wins. When should the loss be small?",
        "It is the mean of -log sigmoid of a difference of rewards. Which minus which?",
        "`log(sigmoid(x))` is minus infinity for x = -200, in float32. `F.logsigmoid` computes "
        "it safely.",
    ),
    # 05 from a bandit to GRPO
    "reinforce": (
        "The estimate is a number times a vector. The number is the reward; which vector says "
        "how the logits change the log-probability of the pulled arm?",
        "The notebook derives it: the derivative of log p(a) with respect to logit k is 1 or 0, "
        "minus the probability of arm k.",
        "Start from the negated softmax of theta, a new tensor, and add 1 at the pulled arm. "
        "Then multiply by the reward.",
    ),
    "unbiased_advantages": (
        "In the proof the baseline is taken out of the sum over arms. It may use every reward of "
        "the group but one.",
        "A natural choice for sample i is the mean of the rewards of the other G - 1 samples. "
        "The reward of one neighbour is unbiased too, but noisier.",
        "If you subtract the mean of the whole group, the check says by which factor the result "
        "is too short, for G = 2. Work out the factor for any G and divide by it.",
    ),
    "importance_estimate": (
        "With one sample there is nothing to average. What is the weight of that sample?",
        "The weight is the probability under the current policy over that under the old one. "
        "You have logarithms of both.",
        "Take the difference of the logarithms, then exp, times the values, then the plain mean "
        "over N. Do not divide by the sum of the weights: that is another, biased, estimate. "
        "Do not detach anything.",
    ),
    # 06 GRPO by hand
    "advantages": (
        "Each row is a group. What should the advantages of a group sum to?",
        "Subtract the mean of the row and divide by the row's standard deviation, "
        "`keepdim=True` for both.",
        "`std` of torch is the sample std, which is the right one here. Add 1e-4 to it, not "
        "1e-8: that number decides what nearly equal rewards become.",
    ),
    "clipped_objective": (
        "Fill in a table of the four corners on paper: A = ±1, ratio 1.5 and 0.5. In which two "
        "has the token already moved far enough in the direction of the push?",
        "The objective must never promise more than the unclipped one: a push that went the "
        "wrong way keeps its full gradient.",
        "The clamp is right. Look at how the two products are combined: the pessimistic one of "
        "them should be taken.",
    ),
    "k3": (
        "Both inputs are logarithms. Name their difference d, and mind its sign.",
        "The formula has exp(d), which must be p_ref / p: so which logarithm is subtracted?",
        "d is the reference's log-prob minus the policy's. For d = 0 the estimate is 0, and it "
        "is never negative.",
    ),
    "zero_spread": (
        "In which cases do all candidates of a group get the same reward, if it is 0 or 1?",
        "They are all right, or they are all wrong. It cannot be both.",
        "Independent chances multiply: one power with p as its base, another with 1 - p, and "
        "their sum.",
    ),
    "token_mean": (
        "Try it on a row of two valid tokens and eight of padding. What is the sum divided by?",
        "Divide by the number of valid tokens. Then put nan into the padding: what is nan · 0?",
        "`torch.where` replaces the padding before the sum. And a batch without any valid token "
        "would divide by 0: let the count be at least 1.",
    ),
    # 07 aligning a model
    "color_share": (
        "Three differences belong to each pixel. Add up their absolute values, then compare.",
        "The picture is uint8: 10 - 20 is 246 there. Convert it to int first.",
        "The sum runs over the last axis, the three channels. The mean of a boolean array is a "
        "share.",
    ),
    "frozen_reference": (
        "Let the policy take a step and look at the reference: does it move? Which Python "
        "object is it?",
        "An assignment makes a second name, not a second model. The module `copy` makes one.",
        "After the deep copy the reference must not require gradients: `requires_grad_` of a "
        "module returns the module. The policy itself must stay trainable.",
    ),
    "best_of_n": (
        "For one prompt: when is there no right sample among n?",
        "All n are wrong with probability (1 - p) to the power n. The chance that we want is "
        "the rest.",
        "Do this for each prompt first, elementwise, and take the mean over prompts at the end.",
    ),
    # 08 sick runs
    "first_pass_gap": (
        "Only valid tokens count, and a gap can go up or down.",
        "Choose the valid tokens of both tensors first, by the mask; whatever the padding "
        "holds must not even be subtracted.",
        "Take the absolute difference of what you have chosen, and its maximum. The maximum "
        "of nothing is an error, so a mask without a valid token needs its own answer.",
    ),
    "alarm": (
        "Keep a counter of how many values in a row were above the limit.",
        "A value that is not strictly above the limit sets the counter back to 0.",
        "After each value compare the counter with the patience; the first time they are equal is "
        "the answer. If the loop ends without it, there was no alarm.",
    ),
    "diagnosis": (
        "Begin with the log in which most panels do not move at all, and with the one that is "
        "wrong before the first update.",
        "Two logs have no spread in the end; one of them never had any. Two have a large KL: see "
        "when their judge falls, and how far.",
        "What is left has a healthy reward and a healthy judge, and a single panel that reaches "
        "values far beyond the clip range.",
    ),
    # 09 kernels
    "logits_bytes": (
        "How many logits are there, and how many numbers are held for each of them?",
        "The text above the exercise counts three numbers for each logit. A float32 has 4 "
        "bytes.",
        "So 12 bytes for each logit, and N · T · V logits.",
    ),
    "online_logsumexp": (
        "Two numbers per row are enough: the largest logit so far, and a sum that is relative to "
        "it.",
        "When a new piece brings a larger maximum, the old sum is relative to the wrong one. By "
        "which factor is it off?",
        "Multiply the old sum by exp(old maximum - new maximum), then add the exps of the "
        "piece, each minus the new maximum. At the end: the maximum plus the log of the sum. "
        "Start with minus infinity and 0.",
    ),
    "logprob_gradient": (
        "log p of the chosen id is its logit minus the logsumexp of all. Differentiate both with "
        "respect to a logit.",
        "The derivative of a logsumexp is the softmax. The derivative of the chosen logit is 1 "
        "at the chosen id, and 0 elsewhere.",
        "`one_hot` with V classes gives the second part. Subtract the probabilities from it, "
        "row by row.",
    ),
    "attainable": (
        "Two things limit the speed: how fast it computes, and how fast bytes arrive.",
        "Bytes per second, times operations per byte, is a speed as well.",
        "Intensity times bandwidth is the slanted roof, the peak the flat one. Which of the two "
        "limits applies?",
    ),
    # 10 reading results
    "equal_diversity": (
        "Sort the points by diversity and look for the two neighbours around the wanted one.",
        "Between two neighbours, interpolate along the straight line: what share of the way from "
        "the first to the second is the wanted diversity?",
        "`itertools.pairwise` of the sorted points gives the neighbours. If no pair encloses the "
        "wanted diversity, the front does not reach it: None.",
    ),
    "wilson": (
        "The docstring has the whole formula; z is 1.96 and p is k / n.",
        "Both centre and half have the same denominator, 1 + z²/n. The half has a root over "
        "both terms.",
        "Return centre minus half and centre plus half, each over the denominator, as two "
        "numbers, the lower one first. Mind that z²/4n² is z² divided by (4 n²).",
    ),
    "paired_interval": (
        "Two scores of one seed share their luck. What cancels it?",
        "Compute everything from the differences, one for each seed: their mean, and their "
        "standard deviation.",
        "The half width is t times the sample standard deviation (`ddof=1`) over the root of "
        "the number of seeds.",
    ),
}  # fmt: skip
