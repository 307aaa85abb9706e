"""Rewards: what makes one candidate better than another, as numbers a policy can be trained on.

A CLIP-like pair of small encoders learns from noisy (picture, caption) pairs which picture goes
with which words. Its score becomes a probability that saturates: does this picture fit its prompt
better than small edits of that prompt? Answers are compared with the key. A second reward is
learned from preference pairs; the two can be mixed.

  (R1) s(x, c) = 1/2 mean_w max_p <w, p> + 1/2 mean_p max_w <p, w>    picture x and text c:
       every word w looks for its patch p, every patch for its word (FILIP, arXiv:2111.07783)
  (R2) L = 1/2 CE(rows of a*s) + 1/2 CE(columns of a*s)    InfoNCE, a = exp(learned log-scale);
       false edits of its caption are further negatives in each row (NegCLIP, arXiv:2210.01936)
  (R3) r(x, c) = log [ exp(a s(x,c)) / sum_{c' in c + edits of c} exp(a s(x,c')) ]   cut at FLOOR
  (R4) r = 1 if the answer is the key, else 0                                      exact match
  (R5) agreement = share of (right, wrong) pairs of a group ranked correctly       validity
  (R6) P(better > worse) = sigmoid(R(better) - R(worse)),  L = -mean log P         Bradley-Terry
  (R7) r(x, c) = log sigmoid(R(x, c) - anchor), cut at FLOOR                       preference
  (R8) min(r, log SURE)                                                    the reward in use
  (R9) r(x, c) = log [ p(x|c) / sum_{c' in c + edits of c} p(x|c') ]       likelihood contrast:
       p is the frozen base itself; cut at FLOOR, then as (R8)
  (R10) r - rarity log n    for a drawing found n times in its group       inverse frequency

Why (R8): among right candidates, s and (R3) still differ slightly for no reason that matters, and
a policy that follows them draws the same few pictures. (R8) is flat once a picture is right. Why
(R1) and not one vector per picture: prompts name three objects, training pairs only one or two,
and the scores of parts add up.

Symbols: N pictures, M texts or pairs, P patches, W words, D embedding width, B prompts, G group.
Left out: any pretrained encoder. CLIP learns from the policy's own noisy pairs, the preference
model from those and from ranked samples of the base.

    $ python train.py --out runs/NAME      # the stage train_clip prints (R5); 1 minute
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import (COUNTS, END_THINK, FASHION_CLASSES, NOISE, PAD, THINK, Example, by_kind, edits,
                  in_pool, moved, parse_caption, render, scene_edits)
from model import (BATCH, Block, RMSNorm, allowed_head, at_least_float32, completion, matmul,
                   rotation)

FLOOR = -6.0  # a hopeless candidate scores no worse than a bad one
SURE = 0.5  # likelier than all its edits together is sure enough: here the reward stops rising


def patches_of(pictures, patch, device):
    """(N, S, S, 3) uint8 -> (N, P, 3*patch*patch) float32 in [-1, 1], row by row."""
    x = moved(torch.as_tensor(pictures), device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


def text_ids(vocab, texts, device="cpu"):
    """A list of texts -> (M, W) int64 word ids, padded on the right."""
    rows = [vocab.encode(t) or [PAD] for t in texts]
    width = max(map(len, rows))
    return moved(torch.tensor([r + [PAD] * (width - len(r)) for r in rows]), device)


class CLIP(nn.Module):
    """Two small bidirectional encoders into one space. n_text: word ids; patch: side in pixels."""

    def __init__(self, n_text, patch=8, side=32, width=64, layers=2, heads=4):
        super().__init__()
        self.patch = patch
        self.pixels = nn.Linear(3 * patch * patch, width)
        self.place = nn.Parameter(torch.randn((side // patch) ** 2, width) * width**-0.5)
        self.words = nn.Embedding(n_text, width)
        self.image_blocks = nn.ModuleList(Block(width, heads, reach=12.0) for _ in range(layers))
        self.text_blocks = nn.ModuleList(Block(width, heads, reach=12.0) for _ in range(layers))
        self.image_norm, self.text_norm = RMSNorm(width), RMSNorm(width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def image(self, pictures):
        """(N, S, S, 3) uint8 -> one unit vector per patch, (N, P, D)."""
        x = self.pixels(patches_of(pictures, self.patch, self.place.device)) + self.place
        for block in self.image_blocks:
            x = block(x, causal=False)
        return F.normalize(self.image_norm(x), dim=-1)

    def text(self, ids):
        """(M, W) int64 padded with <pad> -> one unit vector per word, (M, W, D); 0 for padding."""
        words = ids != PAD
        x = self.words(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        turn = rotation(positions, x.shape[-1] // self.text_blocks[0].heads)
        for block in self.text_blocks:
            x = block(x, turn, mask=words[:, None, None, :])
        return F.normalize(self.text_norm(x), dim=-1) * words[..., None]

    def similarity(self, image, text):
        """(R1) of image (N, P, D) and text -> (N, M). text is (M, W, D), the same for all pictures,
        or (N, M, W, D), each picture's own."""
        equation = "npd,mwd->nmpw" if text.dim() == 3 else "npd,nmwd->nmpw"
        with torch.autocast(image.device.type, enabled=False):
            dots = torch.einsum(equation, at_least_float32(image), at_least_float32(text))
        words = text.detach().abs().sum(-1) > 0  # (..., M, W)
        by_word = (dots.amax(-2) * words).sum(-1) / words.sum(-1).clamp(min=1)
        by_patch = dots.masked_fill(~words[..., None, :], -torch.inf).amax(-1).mean(-1)
        return 0.5 * by_word + 0.5 * by_patch  # (R1)

    def embed_image(self, pictures):
        """(N, S, S, 3) uint8 -> (N, D), unit length."""
        return F.normalize(self.image(pictures).mean(1), dim=-1)


def clip_loss(clip, pictures, ids, edited):
    """(R2) of N pictures, their N captions (N, W), and E false edits each, `edited` (N*E, W).

    Equal captions are positives of each other. Returns the loss, and the share of pictures whose
    own caption scores highest among all N captions and its edits."""
    image, scale = clip.image(pictures), clip.log_scale.exp()
    logits = scale * clip.similarity(image, clip.text(ids))  # (N, N)
    false = scale * clip.similarity(image, clip.text(edited).unflatten(0, (len(ids), -1)))  # (N, E)
    right = logits.masked_fill((ids[:, None] != ids).any(-1), -torch.inf)
    everything = torch.cat((logits, false), 1)
    rows = everything.logsumexp(1) - right.logsumexp(1)
    columns = logits.logsumexp(0) - right.logsumexp(0)
    first = (right.amax(1) >= everything.amax(1)).float().mean()
    return 0.5 * rows.mean() + 0.5 * columns.mean(), first  # (R2)


@torch.no_grad()
def match_logprob(clip, vocab, pictures, texts, edits):
    """(R3): how surely each picture shows its text and not an edit of it, (N,) in [FLOOR, 0].

    pictures (N, S, S, 3) uint8; M texts, N / M consecutive pictures each; edits: M lists of texts.
    """
    device, group = clip.place.device, len(pictures) // len(texts)
    assert len(pictures) == group * len(texts) == group * len(edits), (len(pictures), len(texts))
    number, choices = {}, []  # every distinct text is encoded once
    for text, others in zip(texts, edits):
        choices.append([number.setdefault(t, len(number)) for t in dict.fromkeys((text, *others))])
    most = max(map(len, choices))
    which = torch.tensor([row + [-1] * (most - len(row)) for row in choices])
    which = moved(which.repeat_interleave(group, 0), device)  # (N, 1+E)
    words = clip.text(text_ids(vocab, list(number), device))[which]  # (N, 1+E, W, D)
    logits = clip.log_scale.exp() * clip.similarity(clip.image(pictures), words)
    logits = logits.masked_fill(which < 0, -torch.inf)
    return logits.log_softmax(-1)[:, 0].clamp(min=FLOOR)  # (R3)


@torch.no_grad()
def drawing_logprobs(model, vocab, texts, codes):
    """log p(picture | text) under a policy: M texts, G pictures each, codes (M, G, P) -> (M, G)."""
    layout, group = vocab.layout("draw", codes.device), codes.shape[1]
    rows = vocab.rows("draw", [Example("draw", (), text, "") for text in texts], codes[:0, 0])
    rows = rows.repeat_interleave(group, 0)
    rows[:, layout.index] = codes.flatten(0, 1) + vocab.n_text
    logprobs = []
    for chunk in rows.split(max(BATCH[codes.is_cuda] // group, 1) * group):
        states, targets, _ = completion(model, layout, chunk, group)
        logits = matmul(states.flatten(0, 1), allowed_head(model, layout).T.to(states.dtype))
        nll = F.cross_entropy(logits, targets.flatten(), reduction="none")
        logprobs.append(-nll.view(-1, group, targets.shape[1]).sum(2))
    return torch.cat(logprobs)


def likelihood_contrast(model, vocab, codebook, pictures, texts, edits):
    """(R9): how surely a policy would draw each picture for its text and not for an edit of it.
    The last three arguments and the result are as in match_logprob."""
    choices = [list(dict.fromkeys((text, *others))) for text, others in zip(texts, edits)]
    counts = [len(row) for row in choices]
    codes = codebook.encode(moved(torch.from_numpy(pictures), model.head.device))
    codes = codes.view(len(texts), -1, codes.shape[1])  # (M, G, P)
    own = [i for i, count in enumerate(counts) for _ in range(count)]
    codes = codes[moved(torch.tensor(own), codes.device)]
    logprobs = drawing_logprobs(model, vocab, [text for row in choices for text in row], codes)
    contrasts = [part[0] - part.logsumexp(0) for part in logprobs.split(counts)]
    return torch.cat(contrasts).clamp(min=FLOOR)  # (R9)


def log_multiplicity(pictures, group):
    """The log of how often each picture occurs in its own group: (N, ...) -> (N,)."""
    keys = [picture.tobytes() for picture in pictures]
    groups = [keys[i - i % group : i - i % group + group] for i in range(len(keys))]
    return torch.tensor([math.log(g.count(key)) for key, g in zip(keys, groups)])  # (R10)


@torch.no_grad()
def clip_score(clip, vocab, pictures, texts):
    """(R1) of N pictures and their N texts, (N,) in [-1, 1]: reported, by a second CLIP."""
    words = clip.text(text_ids(vocab, texts, clip.place.device))
    return clip.similarity(clip.image(pictures), words[:, None])[:, 0]


# ------------------------------------------------ preferences: pairs with a better side


class Pair(NamedTuple):
    """One preference. Its sides are (picture (S, S, 3) uint8, text) and share one of the two."""

    direction: str  # caption: two texts for a picture; draw: two pictures for a text
    kind: str  # what was changed to make the worse one: color, shape, ..., as in data.edits
    better: tuple
    worse: tuple
    clean: bool  # is the better text true of the better picture? Counted, never used


def captioned(source, rng, pool="paired", noise=None, split="train", stories=False):
    """A random (picture, text, truth) to train a reward on; with stories, half of them are frames
    with everything that the story has said so far."""
    if not stories or rng.random() < 0.5:
        e = source.example(rng, "draw", pool, noise, split)
        return e.pictures[0], e.prompt, e.truth
    e, k = source.example(rng, "story", pool, noise, split), rng.randrange(3)
    scene, caption = e.truth.scenes[k], e.truth.captions[k]
    return e.pictures[k], caption.text(), (scene, caption)


def perturb_world(rng, scene, text, direction, pool):
    """(kind, picture, text, clean) of the worse side, by a random kind of edit; None if none is
    legal. A legal edit stays in the pool and within its number of objects (what only ever loses
    would be learned as bad), and does not make both sides true. A noisy text that is already false
    is kept: that is the noise."""
    caption = parse_caption(text)
    clean = caption.holds(scene)
    ways = by_kind(edits(caption) if direction == "caption" else scene_edits(scene))
    for kind in rng.sample(list(ways), len(ways)):
        for edit in rng.sample(ways[kind], len(ways[kind])):
            claim, content = (edit, scene) if direction == "caption" else (caption, edit)
            kinds = edit.kinds if direction == "caption" else [o.kind for o in edit]
            legal = in_pool(pool, kinds) and len(kinds) <= max(COUNTS[pool])
            if legal and not (clean and claim.holds(content)):
                return kind, render(content), claim.text(), clean
    return None


def perturb_clothes(rng, source, picture, text, label, direction, split):
    """The same for FashionMNIST: the text or the picture of another class, in the same phrase."""
    clean = FASHION_CLASSES[label] == text.split()[-1]
    if direction == "caption":
        return "class", picture, source.negatives(rng, text, 1)[0], clean
    other = source.example(rng, "draw", split=split)
    while other.truth == label:
        other = source.example(rng, "draw", split=split)
    return "class", other.pictures[0], text, clean


def make_pairs(source, rng, n, noise=NOISE, pool="paired", split="train", stories=False):
    """n Pairs of a match and a perturbed copy, in which text or picture is edited, in turns. Texts
    are the noisy captions of pre-training, so some labels are wrong, as people's are; noise=None:
    clean."""
    pairs = []
    while len(pairs) < n:
        direction = ("caption", "draw")[len(pairs) % 2]
        picture, text, truth = captioned(source, rng, pool, noise, split, stories)
        if source.name == "fashion_mnist":
            worse = perturb_clothes(rng, source, picture, text, truth, direction, split)
        else:
            worse = perturb_world(rng, truth[0], text, direction, pool)
        if worse:
            kind, other, edited, clean = worse
            pairs.append(Pair(direction, kind, (picture, text), (other, edited), clean))
    return pairs


def rank_pairs(rewards, margin):
    """Preferences among candidates: rewards (B, G) -> (K, 2) int64, each row (better, worse).

    These are indices into the B*G candidates, for all pairs of one prompt whose rewards differ by
    at least `margin`. ValueError for margin <= 0.

    >>> rank_pairs(torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.0, 0.5]]), 0.5).tolist()
    [[0, 1], [0, 2], [5, 3], [5, 4]]
    """
    if not margin > 0:
        raise ValueError(f"margin {margin}: expected more than 0; equal rewards give no preference")
    prompt, better, worse = (rewards[:, :, None] - rewards[:, None, :] >= margin).nonzero().T
    return torch.stack((better, worse), 1) + prompt[:, None] * rewards.shape[1]


class PreferenceModel(nn.Module):
    """R(picture, text): patches and words share one bidirectional transformer; R is the mean over
    words of the best patch's score. Sharing lets it bind a colour to a shape, and a relation to
    two objects. One R serves both directions. Source: Bradley and Terry 1952; as a reward,
    InstructGPT, arXiv:2203.02155."""

    def __init__(self, n_text, patch=8, side=32, width=64, layers=2, heads=4):
        super().__init__()
        self.patch = patch
        self.pixels = nn.Linear(3 * patch * patch, width)
        self.place = nn.Parameter(0.5 * torch.randn((side // patch) ** 2, width))
        self.words = nn.Embedding(n_text, width)
        self.blocks = nn.ModuleList(Block(width, heads, reach=12.0) for _ in range(layers))
        self.norm, self.match = RMSNorm(width), nn.Linear(width, width, bias=False)
        for block in self.blocks:  # layers start as identity: single words, patches come first
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)
        self.register_buffer("anchor", torch.tensor(0.0))  # saved with the weights; see set_anchor

    def forward(self, pictures, ids):
        """pictures (N, S, S, 3) uint8, ids (N, W) int64 padded with <pad> -> R, (N,) float32."""
        patches = self.pixels(patches_of(pictures, self.patch, self.place.device)) + self.place
        words, count = ids != PAD, patches.shape[1]
        x = torch.cat((patches, self.words(ids)), 1)  # (N, P + W, C)
        mask = F.pad(words, (count, 0), value=True)[:, None, None, :]
        positions = torch.arange(1, ids.shape[1] + 1, device=x.device)
        positions = F.pad(positions, (count, 0))  # patches have a learned place, no rotation
        turn = rotation(positions, x.shape[-1] // self.blocks[0].heads)
        for block in self.blocks:
            x = block(x, turn, mask=mask)
        patches, states = self.norm(x).split((count, ids.shape[1]), 1)
        best = (states @ self.match(patches).mT / x.shape[-1] ** 0.5).amax(-1)  # (N, W)
        return ((best * words).sum(1) / words.sum(1).clamp(min=1)).float()

    def pairs(self, vocab, pairs):
        """R of both sides of M Pairs: (better (M,), worse (M,))."""
        sides = [p.better for p in pairs] + [p.worse for p in pairs]
        ids = text_ids(vocab, [text for _, text in sides], self.place.device)
        return self(np.stack([picture for picture, _ in sides]), ids).chunk(2)

    @torch.no_grad()
    def score(self, vocab, pictures, texts):
        """The reward of N pictures, N / len(texts) consecutive ones per text: (N,) in [FLOOR, 0].
        It is the log-probability of winning against R = anchor: like (R3), it is flat where all
        is right and has the same range."""
        ids = text_ids(vocab, texts, self.place.device)
        ids = ids.repeat_interleave(len(pictures) // len(texts), 0)
        return F.logsigmoid(self(pictures, ids) - self.anchor).clamp(min=FLOOR)  # (R7)


def preference_loss(better, worse):
    """Bradley-Terry: R of the better and of the worse side of M pairs, (M,) each -> mean loss.

    Three to one, then no preference: -log 3/4 and -log 1/2.
    >>> better, worse = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 1.0]).log()
    >>> round(preference_loss(better, worse).item(), 4)  # (0.2877 + 0.6931) / 2
    0.4904
    """
    return -F.logsigmoid(better - worse).mean()  # (R6)


@torch.no_grad()
def pair_rewards(model, vocab, pairs, batch=256):
    """As PreferenceModel.pairs, but in batches and on the CPU: (better (M,), worse (M,))."""
    parts = [model.pairs(vocab, pairs[i : i + batch]) for i in range(0, len(pairs), batch)]
    return tuple(torch.cat(side).cpu() for side in zip(*parts))


def set_anchor(model, vocab, pairs):
    """After training, set the anchor of (R7) midway between the mean R of both sides of pairs."""
    better, worse = pair_rewards(model, vocab, pairs)
    model.anchor.fill_(float(better.mean() + worse.mean()) / 2)


def pair_accuracy(model, vocab, pairs):
    """Accuracy on held-out pairs: {"all", each direction, each kind: share ranked correctly}. Ties
    count half. A wrong label counts as an error, so use clean pairs."""
    better, worse = pair_rewards(model, vocab, pairs)
    won = ((better > worse).float() + 0.5 * (better == worse)).tolist()
    shares = {}
    for pair, value in zip(pairs, won):
        for name in ("all", pair.direction, pair.kind):
            shares.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(shares.items())}


# ------------------------------------------------ one function per task


def exact_match(text, key):
    """1.0 if the answer, which is everything after the thought, is the key's; else 0.0.

    >>> exact_match("<think> red circle : top left </think> blue", "<think> whatever </think> blue")
    1.0
    >>> exact_match("<think> something blue", "<think> whatever </think> blue")
    0.0
    """
    return float(text.split(f"{END_THINK} ")[-1] == key.split(f"{END_THINK} ")[-1])  # (R4)


def well_formed(text):
    """1.0 for exactly one `<think> steps </think> answer` whose steps are not empty, else 0.0."""
    words = text.split()
    once = words.count(THINK) == words.count(END_THINK) == 1
    return float(once and words[0] == THINK and words[-2] == END_THINK and len(words) > 3)


def names_all(text):
    """False for a scene's caption that omits a colour or a shape: "a shape" has hardly any edits,
    so it would look the surest of all."""
    caption = parse_caption(text)
    return caption is None or all(m.color and m.shape for m in caption.mentions)


MIXES = {  # weights of the parts; answers and format are always judged by rules
    "rule": {"clip": 1.0, "preference": 0.0, "exact": 1.0, "format": 0.2},
    "learned": {"clip": 0.0, "preference": 1.0, "exact": 1.0, "format": 0.2},
    "mix": {"clip": 0.5, "preference": 0.5, "exact": 1.0, "format": 0.2},
}
# More for captions: one that misses an object must compete with the edit that adds it.
DRAWING_EDITS, CAPTION_EDITS = 12, 32


def reward_drawing(rewards, source, examples, pictures, rng):
    """Does each picture (N, 1, S, S, 3) show its prompt, and is it rare in its group?"""
    texts, pictures = [e.prompt for e in examples], pictures[:, 0]
    negatives = [source.negatives(rng, text, DRAWING_EDITS) for text in texts]
    parts = rewards.match(pictures, texts, negatives)
    if rewards.contrast:
        vocab, codebook = rewards.vocab, rewards.codebook
        contrast = likelihood_contrast(rewards.base, vocab, codebook, pictures, texts, negatives)
        parts["contrast"] = contrast.clamp(max=math.log(SURE)).cpu()
    if rewards.rarity:
        parts["rarity"] = -log_multiplicity(pictures, len(pictures) // len(texts))
    return parts


def reward_story(rewards, source, examples, pictures, rng):
    """Does each frame show all that was said so far? The mean over (N, 3, S, S, 3) frames."""
    frames, total = pictures.shape[1], {}
    for k in range(frames):
        texts = [e.truth.captions[k].text() for e in examples]
        negatives = [source.negatives(rng, text, DRAWING_EDITS) for text in texts]
        for name, value in rewards.match(pictures[:, k], texts, negatives).items():
            total[name] = total.get(name, 0) + value / frames
    return total


def reward_caption(rewards, source, examples, texts, rng):
    """Does each of N texts fit its example's picture? An incomplete caption earns as much as a
    guess among edits, and a wrong one never less: saying nothing must not pay."""
    group, edited = len(texts) // len(examples), {}
    for text in dict.fromkeys(texts):
        edited[text] = source.negatives(rng, text, CAPTION_EDITS) if names_all(text) else []
    good = [i for i, text in enumerate(texts) if edited[text]]
    guess = -math.log(1 + CAPTION_EDITS)
    parts = {name: torch.full((len(texts),), guess) for name in rewards.scorers}
    parts["format"] = torch.zeros(len(texts))
    parts["format"][good] = 1.0
    if good:
        pictures = np.stack([examples[i // group].pictures[0] for i in good])
        scores = rewards.match(pictures, [texts[i] for i in good], [edited[texts[i]] for i in good])
        for name, score in scores.items():
            parts[name][good] = score.clamp(min=guess)
    return parts


def reward_answer(rewards, source, examples, texts, rng):
    """Does each of N answers match the key? If the key has a thought: is the form right, too?"""
    group = len(texts) // len(examples)
    keys = [e.answer for e in examples for _ in range(group)]
    parts = {"exact": [exact_match(text, key) for text, key in zip(texts, keys, strict=True)]}
    if THINK in examples[0].answer:
        parts["format"] = [well_formed(text) for text in texts]
    return {name: torch.tensor(values) for name, values in parts.items()}


REWARDS = {
    "draw": reward_drawing, "story": reward_story, "caption": reward_caption,
    "vqa": reward_answer, "multihop": reward_answer, "verify": reward_answer,
}  # fmt: skip


class Rewards:
    """The rewards of every task, with weights from MIXES; drawings also use contrast and rarity."""

    def __init__(self, clip, vocab, preference=None, weights=MIXES["rule"], base=None,
                 codebook=None, contrast=0.0, rarity=0.0):
        self.clip, self.vocab, self.preference, self.weights = clip, vocab, preference, weights
        self.base, self.codebook, self.contrast, self.rarity = base, codebook, contrast, rarity
        self.scorers = ("clip",) if preference is None else ("clip", "preference")

    def weights_of(self, task):
        """{part: weight} in a task."""
        if task != "draw":
            return self.weights
        kept = {name: (1 - self.contrast) * self.weights[name] for name in self.scorers}
        return self.weights | kept | {"contrast": self.contrast, "rarity": self.rarity}

    def match(self, pictures, texts, edits):
        """How N pictures fit M texts, N / M consecutive ones each: {scorer: (N,) on the CPU}."""
        clip = match_logprob(self.clip, self.vocab, pictures, texts, edits)
        parts = {"clip": clip.clamp(max=math.log(SURE)).cpu()}  # (R8)
        if self.preference is not None:
            parts["preference"] = self.preference.score(self.vocab, pictures, texts).cpu()
        return parts

    def __call__(self, source, task, examples, outputs, rng):
        """Reward N `outputs` of the model for B examples -> (total (B, G), {part: (B, G)})."""
        parts = REWARDS[task](self, source, examples, outputs, rng)
        parts = {name: value.float().view(len(examples), -1) for name, value in parts.items()}
        weights = self.weights_of(task)
        return sum(weights[name] * value for name, value in parts.items()), parts


def agreement(rewards, right, wrong):
    """(R5): the share of (right, wrong) candidates of a prompt that the reward ranks correctly.

    rewards (B, G); right, wrong (B, G) bool. Ties count half; nan without such a pair. 0.5 is a
    coin flip.

    >>> right = torch.tensor([[True, False, False]])
    >>> agreement(torch.tensor([[0.9, 0.2, 0.5]]), right, ~right)
    1.0
    """
    pair = right[:, :, None] & wrong[:, None, :]
    difference = rewards[:, :, None] - rewards[:, None, :]
    ordered = (difference > 0).float() + 0.5 * (difference == 0)
    return float(ordered[pair].mean())  # (R5)
