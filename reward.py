"""Rewards: what makes one candidate better than another, as numbers that a policy can be trained on.

A CLIP-like pair of small encoders learns from noisy (picture, caption) pairs which picture goes with which words. Its
score is turned into a probability that saturates: does this picture fit its prompt better than the prompt's own small
edits ("a red circle" against "a red square", "a blue circle", ...)? Answers are simply compared with the key.

  (R1) s(x, c) = 1/2 mean_w max_p <w, p> + 1/2 mean_p max_w <p, w>     similarity of picture x and text c: every word w
                  looks for its patch p and every patch for its word (late interaction, as in FILIP, arXiv 2111.07783)
  (R2) L = 1/2 CE(rows of a*s) + 1/2 CE(columns of a*s)                symmetric InfoNCE, a = exp(learned log-scale);
                  equal captions are positives of each other; each row has false edits of its own caption as
                  further negatives (NegCLIP, arXiv 2210.01936)
  (R3) r(x, c) = log [ exp(a s(x,c)) / sum_{c' in c + edits of c} exp(a s(x,c')) ]   the CLIP score, in [FLOOR, 0]
  (R4) r = 1 if the answer is the key, else 0                          exact match
  (R5) agreement = share of (right, wrong) pairs in a group that the reward puts in order     validity, before and after RL
  (R9) min(r, log SURE)                                                the CLIP reward of drawings and captions; a caption's is
                  never less than a guess among its edits, which is also what a text that is no whole caption earns
  (R10) r = right sentences / sentences                                a story told; one drawn: the mean over its frames of their rewards

Why (R9) and not s itself: among correct candidates s and (R3) still differ a little, for no reason that matters, and a
policy that follows them draws the same few pictures. (R9) is flat when a picture is right, and keeps the slope of (R3)
when all candidates are wrong. Why (R1) and not one vector a picture: prompts name three objects, training pairs one or
two, and parts that are matched one by one should still add up. (Pooled vectors have not been compared with them here.)

The second reward is learned from preferences: of two pictures for a text, or two texts for a picture, one is better.

  (R6) P(better > worse) = sigmoid(R(better) - R(worse)),  L = -mean log P        Bradley-Terry; only differences of R count
  (R7) r(x, c) = log sigmoid(R(x, c) - anchor), cut at FLOOR                      the preference reward, in [FLOOR, 0]
  (R8) ECE = sum_bins share of the pairs * |mean P of the likelier - how often it won|       is P what happens?

Symbols: N pictures, M texts or pairs, P patches, W words, D width of the shared space, B prompts, G group.

    $ python train.py --stage codebook,pretrain,clip --out runs/NAME      # trains it, prints (R5) by kind of statement; 4 minutes
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import COUNTS, END_THINK, FASHION_CLASSES, NOISE, PAD, THINK, Example, edits, in_pool, parse_caption, render, scene_edits
from model import Block, RMSNorm, at_least_float32, rotation

FLOOR = -6.0  # the learned rewards are cut here: a hopeless candidate is not worse than a bad one
SURE = 0.5  # likelier than all its edits together is sure enough: for a reward to stop rising, for a noisy caption to be believed


def cut(pictures, patch, device):
    """(N, S, S, 3) uint8 -> (N, P, 3*patch*patch) float32 in [-1, 1], patches row by row."""
    x = torch.as_tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


class CLIP(nn.Module):
    """Two small two-way transformers into one space. n_text: word ids; patch: pixels; side: picture width in pixels."""

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
        """(N, S, S, 3) uint8 -> one unit vector a patch, (N, P, D)."""
        x = self.pixels(cut(pictures, self.patch, self.place.device)) + self.place  # which says where: no rotation
        for block in self.image_blocks:
            x = block(x, causal=False)
        return F.normalize(self.image_norm(x), dim=-1)

    def text(self, ids):
        """(M, W) int64, padded with <pad> -> one unit vector a word, (M, W, D); padding is exactly zero."""
        real = ids != PAD
        x = self.words(ids)
        turn = rotation(torch.arange(ids.shape[1], device=ids.device), x.shape[-1] // self.text_blocks[0].heads)
        for block in self.text_blocks:
            x = block(x, turn, causal=False, mask=real[:, None, None, :])
        return F.normalize(self.text_norm(x), dim=-1) * real[..., None]

    def similarity(self, image, text, pairs="nm"):
        """image (N, P, D), text (M, W, D) -> (N, M); or, with pairs="n", text (N, M, W, D): its own M texts a picture."""
        equation = "npd,mwd->nmpw" if pairs == "nm" else "npd,nmwd->nmpw"
        with torch.autocast(image.device.type, enabled=False):
            dots = torch.einsum(equation, at_least_float32(image), at_least_float32(text))
        real = text.detach().abs().sum(-1) > 0  # (..., M, W)
        by_word = (dots.amax(-2) * real).sum(-1) / real.sum(-1).clamp(min=1)
        by_patch = dots.masked_fill(~real[..., None, :], -torch.inf).amax(-1).mean(-1)
        return 0.5 * by_word + 0.5 * by_patch  # (R1)

    def embed_image(self, pictures):
        """(N, S, S, 3) uint8 -> (N, D), unit length."""
        return F.normalize(self.image(pictures).mean(1), dim=-1)


def text_ids(vocab, texts, device="cpu"):
    """A list of texts -> (M, W) int64 word ids, padded on the right."""
    rows = [vocab.encode(t) or [PAD] for t in texts]
    width = max(map(len, rows))
    return torch.tensor([r + [PAD] * (width - len(r)) for r in rows], device=device)


def clip_loss(clip, pictures, ids, edited):
    """Symmetric InfoNCE of N pictures and their N captions (N, W); `edited` (N*E, W) are E false edits of each caption.

    Returns the loss and the share of pictures whose own caption (or an equal one) scores highest among all N and its E edits."""
    image, scale = clip.image(pictures), clip.log_scale.exp()
    logits = scale * clip.similarity(image, clip.text(ids))  # (N, N)
    false = scale * clip.similarity(image, clip.text(edited).unflatten(0, (len(ids), -1)), pairs="n")  # (N, E)
    right = logits.masked_fill((ids[:, None] != ids[None]).any(-1), -torch.inf)
    everything = torch.cat((logits, false), 1)
    rows, columns = everything.logsumexp(1) - right.logsumexp(1), logits.logsumexp(0) - right.logsumexp(0)
    return 0.5 * rows.mean() + 0.5 * columns.mean(), (right.amax(1) >= everything.amax(1)).float().mean()  # (R2)


@torch.no_grad()
def match_logprob(clip, vocab, pictures, texts, edits):
    """How surely does each picture show its text and not an edit of it? In [FLOOR, 0].

    pictures (N, S, S, 3) uint8; texts: N strings; edits: N lists of strings, of which each counts once.
    N may be a multiple of len(texts): then each text has a group of consecutive pictures.
    """
    device, group = clip.place.device, len(pictures) // len(texts)
    row = {}  # the same texts come again and again: each is read once, beside others of about its length
    which = [[row.setdefault(t, len(row)) for t in dict.fromkeys((text, *others))] for text, others in zip(texts, edits)]
    which = torch.tensor(list(zip(*itertools.zip_longest(*which, fillvalue=-1))), device=device)  # (N, 1+E), -1: no edit
    ids = text_ids(vocab, row, device)
    length = (ids > PAD).sum(1)
    order = length.argsort()
    parts = [clip.text(ids[some, : length[some[-1]]]) for some in order.tensor_split(min(4, len(order)))]
    read = torch.cat([F.pad(x, (0, 0, 0, ids.shape[1] - x.shape[1])) for x in parts])[order.argsort()]
    words = read[which].repeat_interleave(group, 0)  # (N, 1+E, W, D)
    logits = clip.log_scale.exp() * clip.similarity(clip.image(pictures), words, pairs="n")
    logits = logits.masked_fill(which.repeat_interleave(group, 0) < 0, -torch.inf)
    return F.log_softmax(logits, -1)[:, 0].clamp(min=FLOOR)  # (R3)


@torch.no_grad()
def clip_score(clip, vocab, pictures, texts):
    """The plain similarity of N pictures and N texts, (N,) in [-1, 1]: what is reported, by the second CLIP."""
    device = clip.place.device
    words = clip.text(text_ids(vocab, texts, device))
    return clip.similarity(clip.image(pictures), words[:, None], pairs="n")[:, 0]


# ---------------------------------------------------------------- preferences: pairs of which one is better


class Pair(NamedTuple):
    """One preference. `better` and `worse` are (picture (S, S, 3) uint8, text); they share the picture or the text."""

    direction: str  # caption: two texts for a picture; draw: two pictures for a text
    kind: str  # what was changed to make the worse one: color, shape, ..., as in data.edits; class for clothes
    better: tuple
    worse: tuple
    clean: bool  # is the better text true of the better picture? Where not, the label is noise. Counted, never used


def perturb_world(rng, example, direction, pool):
    """(kind, picture, text, clean) of the worse side, or None if no edit will do; every kind of edit is equally likely.

    An edit must stay in the pool, held-out pairs and number of objects included: what only ever loses, such as three
    objects where truth has two, would be learned as bad. And it must matter: text and edit may not both be true. A noisy
    text that is false to begin with stays, whatever the edit does: putting labels right by the scene would be cheating.
    """
    scene, caption, ways = example.truth[0], parse_caption(example.prompt), {}
    clean = caption.holds(scene)
    for kind, edit in edits(caption) if direction == "caption" else scene_edits(scene):
        ways.setdefault(kind, []).append(edit)
    for kind in rng.sample(list(ways), len(ways)):
        for edit in rng.sample(ways[kind], len(ways[kind])):
            said, seen = (edit, scene) if direction == "caption" else (caption, edit)
            kinds = edit.kinds if direction == "caption" else [o.kind for o in edit]
            if in_pool(pool, kinds) and len(kinds) <= max(COUNTS[pool]) and not (clean and said.holds(seen)):
                return kind, render(seen), said.text(), clean
    return None


def perturb_clothes(rng, source, example, direction, split):
    """The same for FashionMNIST: another class's words in the same phrase, or a picture of another class."""
    text, clean = example.prompt, FASHION_CLASSES.index(example.prompt.split()[-1]) == example.truth
    if direction == "caption":
        return "class", example.picture, source.negatives(rng, text, 1)[0], clean
    while (other := source.example(rng, "draw", split=split)).truth == example.truth:
        pass
    return "class", other.picture, text, clean


def captioned(source, rng, pool="paired", noise=None, split="train"):
    """A picture and a caption to learn a reward from, as an Example to draw. Where stories are a task, every other one is a frame
    with all that its story tells of it."""
    if "story" not in source.tasks or rng.random() < 0.5:
        return source.example(rng, "draw", pool, noise, split)
    e, k = source.example(rng, "story", pool, noise, split), rng.randrange(3)
    scene, caption = e.truth.scenes[k], e.truth.captions[k]
    return Example("draw", e.picture[k], caption.text(), "", (scene, caption))


def make_pairs(source, rng, n, noise=NOISE, pool="paired", split="train"):
    """n Pairs of matching over perturbed, by turns with the text and with the picture perturbed.

    Texts are the noisy pre-training captions (noise=None: clean ones), so that some labels are wrong, as people's are:
    `clean` tells which. rng: a random.Random, as everywhere the only source of chance.
    """
    pairs = []
    while len(pairs) < n:
        direction, example = ("caption", "draw")[len(pairs) % 2], captioned(source, rng, pool, noise, split)
        clothes = source.name == "fashion_mnist"
        found = perturb_clothes(rng, source, example, direction, split) if clothes else perturb_world(rng, example, direction, pool)
        if found:
            kind, picture, text, clean = found
            pairs.append(Pair(direction, kind, (example.picture, example.prompt), (picture, text), clean))
    return pairs


def rank_pairs(rewards, margin):
    """Preferences among candidates: rewards (B, G), of B prompts -> (K, 2) int64, rows (better, worse) of indices into the
    B*G candidates, all pairs of one prompt whose rewards differ by `margin` or more. ValueError unless margin > 0.

    >>> rank_pairs(torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.0, 0.5]]), 0.5).tolist()
    [[0, 1], [0, 2], [5, 3], [5, 4]]
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, not {margin}: equal rewards prefer nothing")
    prompt, better, worse = (rewards[:, :, None] - rewards[:, None, :] >= margin).nonzero().T
    return torch.stack((better, worse), 1) + prompt[:, None] * rewards.shape[1]


class PreferenceModel(nn.Module):
    """R(picture, text): patches and words in one two-way transformer, then the mean over words of each one's best patch.

    Joint, and not a head on the vectors of two encoders: a colour is bound to a shape, a relation to two objects and a count
    to all of them only where words and patches look at each other. (A reason; a dual encoder with this loss was not measured.)
    The head was: after 80 to 100 steps of 32 clean pairs the best patch ranked 0.73 of held-out pairs, a product of the two mean
    states 0.65, a linear head on the mean word 0.64 (one seed).
    One R serves both directions. Source: Bradley and Terry, Biometrika 1952; as a reward, InstructGPT, arXiv 2203.02155.
    n_text: word ids; patch: pixels; side: picture width in pixels.
    """

    def __init__(self, n_text, patch=8, side=32, width=64, layers=2, heads=4):
        super().__init__()
        self.patch = patch
        self.pixels = nn.Linear(3 * patch * patch, width)
        self.place = nn.Parameter(0.5 * torch.randn((side // patch) ** 2, width))
        self.words = nn.Embedding(n_text, width)
        self.blocks = nn.ModuleList(Block(width, heads, reach=12.0) for _ in range(layers))
        self.norm, self.match = RMSNorm(width), nn.Linear(width, width, bias=False)
        for block in self.blocks:  # every layer starts as an identity: one word against one patch is learned first
            nn.init.zeros_(block.out.weight), nn.init.zeros_(block.down.weight)
        self.register_buffer("anchor", torch.tensor(0.0))  # saved with the weights; see set_anchor

    def forward(self, pictures, ids):
        """pictures (N, S, S, 3) uint8, ids (N, W) int64 padded with <pad> -> R, (N,) float32."""
        patches = self.pixels(cut(pictures, self.patch, self.place.device)) + self.place
        real, P = ids != PAD, patches.shape[1]
        x, mask = torch.cat((patches, self.words(ids)), 1), F.pad(real, (P, 0), value=True)  # (N, P + W, C), (N, P + W)
        positions = F.pad(torch.arange(1, ids.shape[1] + 1, device=x.device), (P, 0))  # `place` says where a patch is: no rotation
        turn = rotation(positions, x.shape[-1] // self.blocks[0].heads)
        for block in self.blocks:
            x = block(x, turn, causal=False, mask=mask[:, None, None, :])
        patches, words = self.norm(x).split((P, ids.shape[1]), 1)
        best = (words @ self.match(patches).mT / x.shape[-1] ** 0.5).amax(-1)  # (N, W)
        return ((best * real).sum(1) / real.sum(1).clamp(min=1)).float()

    def pairs(self, vocab, pairs):
        """R of both sides of M Pairs: (better (M,), worse (M,))."""
        sides = [p.better for p in pairs] + [p.worse for p in pairs]
        ids = text_ids(vocab, [text for _, text in sides], self.place.device)
        return self(np.stack([picture for picture, _ in sides]), ids).chunk(2)

    @torch.no_grad()
    def score(self, vocab, pictures, texts):
        """The reward of N pictures (N, S, S, 3) uint8, N / len(texts) consecutive ones a text: (N,) in [FLOOR, 0].

        The log-probability to win against R = anchor. Like (R3), it is flat where all is right and slopes where it is not,
        and has the same range, so that equal weights mean something when the two are mixed."""
        ids = text_ids(vocab, texts, self.place.device).repeat_interleave(len(pictures) // len(texts), 0)
        return F.logsigmoid(self(pictures, ids) - self.anchor).clamp(min=FLOOR)  # (R7)


def preference_loss(better, worse):
    """Bradley-Terry: R of the better and of the worse of M pairs, (M,) each -> loss, the mean.

    Three to one, then no preference: -log 3/4 and -log 1/2.
    >>> [round(preference_loss(torch.tensor([r]), torch.tensor([0.0])).item(), 4) for r in (math.log(3), 0.0)]
    [0.2877, 0.6931]
    """
    return -F.logsigmoid(better - worse).mean()  # (R6)


@torch.no_grad()
def pair_rewards(model, vocab, pairs, batch=256):
    """As PreferenceModel.pairs, without gradient and for any number of pairs: (better (M,), worse (M,)) on the CPU."""
    parts = [model.pairs(vocab, pairs[i : i + batch]) for i in range(0, len(pairs), batch)]
    return tuple(torch.cat(side).cpu() for side in zip(*parts))


def set_anchor(model, vocab, pairs):
    """After training: the anchor of (R7) is halfway between the mean R of the better and of the worse of these pairs."""
    better, worse = pair_rewards(model, vocab, pairs)
    model.anchor.fill_(float(better.mean() + worse.mean()) / 2)


def pair_accuracy(model, vocab, pairs):
    """Share of pairs whose better side has the higher R, ties counting half: {"all", each direction, each kind, and
    each "direction kind" that occurs: in [0, 1]}. Where the label is wrong, being right counts as an error: use clean pairs."""
    better, worse = pair_rewards(model, vocab, pairs)
    won = ((better > worse).float() + 0.5 * (better == worse)).tolist()
    found = {}
    for pair, value in zip(pairs, won):
        for name in ("all", pair.direction, pair.kind, f"{pair.direction} {pair.kind}"):
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def calibration(better, worse, bins=10):
    """Do the sides that R finds likelier by P win as often as P says? R of the better and of the worse of M pairs, (M,) each
    -> (ECE in [0, 1], a list of (mean P, share won, pairs), one for every bin of P in [0.5, 1] that is not empty).

    Four pairs at odds of three to one, and three of the four went that way:
    >>> error, table = calibration(torch.tensor([3.0, 3.0, 3.0, 1.0]).log(), torch.tensor([1.0, 1.0, 1.0, 3.0]).log())
    >>> round(error, 4), [(round(p, 4), won, n) for p, won, n in table]
    (0.0, [(0.75, 0.75, 4)])
    """
    p = torch.sigmoid((better - worse).abs().double())
    won = (better > worse).double() + 0.5 * (better == worse)
    bin_of = ((p - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table = [(float(p[here].mean()), float(won[here].mean()), int(here.sum())) for here in (bin_of == b for b in bin_of.unique())]
    return sum(n / len(p) * abs(predicted - observed) for predicted, observed, n in table), table  # (R8)


def pair_report(model, vocab, pairs):
    """What a preference model knows of pairs it never saw: {"accuracy": see pair_accuracy, "calibration_error", "calibration"}."""
    error, table = calibration(*pair_rewards(model, vocab, pairs))
    return {"accuracy": pair_accuracy(model, vocab, pairs), "calibration_error": error, "calibration": table}


# ---------------------------------------------------------------- rules, and the rewards of every task


def exact_match(text, key):
    """1.0 if the answer, which is all that stands behind the thought if there is one, is the same; else 0.0.

    >>> exact_match("<think> red circle : top left </think> blue", "<think> whatever </think> blue")
    1.0
    >>> exact_match("<think> something blue", "<think> whatever </think> blue")
    0.0
    """
    return float(text.split(f"{END_THINK} ")[-1] == key.split(f"{END_THINK} ")[-1])  # (R4)


def sentences_right(text, key):
    """The share of the key's sentences that stand at their place in the text.

    >>> sentences_right("a red circle . the red circle disappears", "a red circle . the red circle becomes big")
    0.5
    """
    said, keys = text.split(" . "), key.split(" . ")
    return sum(a == b for a, b in zip(said, keys)) / max(len(said), len(keys))  # (R10)


def tells_all(text):
    """False for a caption of a scene that leaves out the colour or the shape of an object: "a shape" has hardly any edits, so
    nothing would be surer."""
    caption = parse_caption(text)
    return caption is None or all(m.color and m.shape for m in caption.mentions)


def well_formed(text):
    """1.0 for exactly one `<think> steps </think> answer` with steps that are not empty, else 0.0."""
    words = text.split()
    once = words.count(THINK) == words.count(END_THINK) == 1
    return float(once and words[0] == THINK and words[-2] == END_THINK and len(words) > 3)


MIXES = {  # what `weights` of Rewards make of the two: answers and format are always rules
    "rule": {"clip": 1.0, "preference": 0.0, "exact": 1.0, "format": 0.2},
    "learned": {"clip": 0.0, "preference": 1.0, "exact": 1.0, "format": 0.2},
    "mix": {"clip": 0.5, "preference": 0.5, "exact": 1.0, "format": 0.2},
}


class Rewards:
    """The rewards of every task. `weights` says how much each part counts; a missing one counts 0.

    With a PreferenceModel, what is drawn and captions have the part "preference" too, and weights default to an even mix."""

    parts = {"draw": ("clip",), "caption": ("clip", "format"), "ask": ("exact",), "reason": ("exact", "format"), "hops": ("exact",),
             "steps": ("exact", "format"), "story": ("clip",), "tell": ("exact",), "judge": ("exact",), "plan": ("clip",)}  # fmt: skip
    weights = MIXES["rule"]

    def __init__(self, clip, vocab, n_edits=12, n_caption_edits=32, preference=None, weights=None):
        self.clip, self.vocab, self.n_edits, self.preference = clip, vocab, n_edits, preference
        self.n_caption_edits = n_caption_edits  # more: a caption that misses an object must meet the one that names it
        if preference is not None:
            self.parts = {task: names + ("preference",) * ("clip" in names) for task, names in self.parts.items()}
        self.weights = dict(weights or MIXES["rule" if preference is None else "mix"])

    def __call__(self, source, task, examples, outputs, rng):
        """Rewards of B*G outputs for B examples: dict part -> (B, G). outputs: as of model.decode. Plans and steps are not looked at."""
        group = len(outputs) // len(examples)
        if task in ("draw", "story", "plan"):
            texts = [text for e in examples for text in ([c.text() for c in e.truth.captions] if task == "story" else [e.prompt])]
            pictures, frames = np.stack([p for _, p in outputs] if task == "plan" else outputs), len(texts) // len(examples)
            size = pictures.shape[-3:]  # all candidates of a text one after the other, as _judge wants them
            pictures = pictures.reshape(-1, group, frames, *size).swapaxes(1, 2).reshape(-1, *size)
            parts = self._judge(pictures, texts, [source.negatives(rng, text, self.n_edits) for text in texts])
            parts = {name: value.view(-1, frames, group).mean(1) for name, value in parts.items()}
        elif task == "caption":
            edits = {text: source.negatives(rng, text, self.n_caption_edits) for text in dict.fromkeys(outputs) if tells_all(text)}
            good = torch.tensor([bool(edits.get(text)) for text in outputs])  # a text that is no caption has no edits
            guess = -math.log(1 + self.n_caption_edits)  # among so many; what tells nothing, or is wrong, is worth no less
            parts = {name: torch.full((len(outputs),), guess) for name in self.parts[task]} | {"format": good.float()}
            if good.any():
                keep = good.nonzero()[:, 0].tolist()
                pictures = torch.stack([torch.as_tensor(examples[i // group].picture) for i in keep])
                for name, score in self._judge(pictures, [outputs[i] for i in keep], [edits[outputs[i]] for i in keep]).items():
                    parts[name][good] = score.float().cpu().clamp(min=guess)
        else:
            keys = [e.answer for e in examples for _ in range(group)]
            right = sentences_right if task == "tell" else exact_match
            parts = {"exact": torch.tensor([right(text, key) for text, key in zip(outputs, keys)])}
            if "format" in self.parts[task]:
                parts["format"] = torch.tensor([well_formed(text) for text in outputs])
        return {name: value.float().cpu().view(len(examples), group) for name, value in parts.items()}

    def believes(self, sources, examples, rng):
        """(N,) bool: is the caption of each pre-training example likelier than its edits together, by (R3)? A caption that
        the reward takes for noise is not learned from again. Examples without a caption to judge pass."""
        kept = torch.ones(len(examples), dtype=torch.bool)
        texts = [e.prompt or e.answer if e.task in ("draw", "caption", "plan") else "" for e in examples]
        edits = [source.negatives(rng, text, self.n_edits) if text else [] for source, text in zip(sources, texts)]
        judged = [i for i, others in enumerate(edits) if others]
        if judged:
            pictures = torch.stack([torch.as_tensor(examples[i].picture) for i in judged])
            kept[judged] = (self._match(pictures, [texts[i] for i in judged], [edits[i] for i in judged]) > math.log(SURE)).cpu()
        return kept

    def _judge(self, pictures, texts, edits):
        """The part of each learned reward: by the CLIP and, where there is one, by the preference model."""
        parts = {"clip": self._match(pictures, texts, edits).clamp(max=math.log(SURE))}  # (R9)
        return parts if self.preference is None else parts | {"preference": self.preference.score(self.vocab, pictures, texts)}

    def _match(self, pictures, texts, edits):
        return match_logprob(self.clip, self.vocab, pictures, texts, edits)

    def total(self, parts):
        """The weighted sum of the parts, (B, G)."""
        return sum(self.weights.get(name, 0.0) * value for name, value in parts.items())


def agreement(rewards, right, wrong):
    """Does the reward rank the candidates of one prompt? rewards (B, G); right, wrong (B, G) bool -> the share of (right,
    wrong) pairs within groups with the higher reward on the right one, ties counting half; nan without such a pair.
    0.5 is a coin. With two classes this is also the within-group rank correlation: Somers' D = 2 * agreement - 1.

    >>> right = torch.tensor([[True, False, False]])
    >>> agreement(torch.tensor([[0.9, 0.2, 0.5]]), right, ~right)
    1.0
    """
    pair = right[:, :, None] & wrong[:, None, :]
    difference = rewards[:, :, None] - rewards[:, None, :]
    ordered = (difference > 0).float() + 0.5 * (difference == 0)
    return float(ordered[pair].mean())  # (R5)
