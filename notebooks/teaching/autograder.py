"""Points for a submission of the homework: three coding questions on hidden inputs, two with fixed
answers.

Every question runs in a process of its own, so that a submission may raise, loop, exit or print: it
loses that question's points, and the others are graded. Inputs come from the seed: keep yours. The
grader compares with expressions of its own. It does not guard against malice: a submission runs
with your rights, so grade strangers' files in a container.

    $ python notebooks/teaching/autograder.py submission.py --seed 7 --limit 5
    Q1  25/25
    ...
    total 100/100

Exit status: 0 when it was graded, whatever the points; 2, with one line, for a file that cannot be
imported.
"""

import argparse
import copy
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

POINTS = {"Q1": 25, "Q2": 25, "Q3": 25, "Q4": 15, "Q5": 10}
TRIALS = 12
# Student's t at 95%, by degrees of freedom: rounded as in homework.py.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
WORDS = ("a small big red green blue yellow circle square triangle cross at the top bottom left "
         "right of above below two three").split()  # fmt: skip


# ---------------------------------------------------------------- what a part of a question asks


class Wrong(Exception):
    """An answer is wrong; the message says which, and how."""


def require(ok, message):
    if not ok:
        raise Wrong(message)


def call(submission, name, *inputs):
    """The result of a function of the submission; Wrong if it is missing, raises, or modifies its
    inputs."""
    function = getattr(submission, name, None)
    require(callable(function), f"{name}: there is no such function")
    given = copy.deepcopy(inputs)
    try:
        result = function(*given)
    except NotImplementedError:
        raise Wrong(f"{name}: not written yet") from None
    except Exception as error:
        raise Wrong(f"{name}: raises {type(error).__name__}: {error}") from None
    for before, after in zip(inputs, given):
        same = before == after if not isinstance(before, np.ndarray) else np.array_equal(
            before, after, equal_nan=before.dtype.kind == "f")  # fmt: skip
        require(same, f"{name}: modifies its input")
    return result


def close(name, result, expected, tolerance=1e-6):
    """Wrong unless a result is close to the expected numbers."""
    expected = np.asarray(expected, float)
    try:
        result = np.asarray(result, float)
    except (TypeError, ValueError):
        raise Wrong(f"{name}: returns a {type(result).__name__}, not numbers") from None
    shapes = f"{name}: shape {result.shape}, expected {expected.shape}"
    require(result.shape == expected.shape, shapes)
    require(np.isfinite(result).all(), f"{name}: not finite")
    require(np.abs(result - expected).max() <= tolerance, f"{name}: wrong numbers")


def number(name, value):
    """A value as a float; Wrong if it is not a number."""
    plain = isinstance(value, (int, float, np.number, np.ndarray)) and np.ndim(value) == 0
    require(plain and not isinstance(value, bool), f"{name}: expected a number, got {value!r:.40}")
    require(np.isfinite(value), f"{name}: not finite")
    return float(value)


# ---------------------------------------------------------------- question 1


def advantages(submission, rng):
    for trial in range(TRIALS):
        shape = rng.integers(1, 6), rng.integers(2, 9)
        rewards = rng.normal(size=shape) * 10.0 ** (trial % 3 - 1)
        expected = [[r - sum(row) / len(row) for r in row] for row in rewards.tolist()]
        close("dr_grpo_advantages", call(submission, "dr_grpo_advantages", rewards), expected)


def constant_mean(submission, rng):
    for trial in range(TRIALS):
        n, t = int(rng.integers(1, 6)), int(rng.integers(2, 8))
        loss, lengths, most = rng.normal(size=(n, t)), rng.integers(0, t + 1, n), t + trial % 4
        mask = np.arange(t) < lengths[:, None]
        total = sum(sum(row[:k]) for row, k in zip(loss.tolist(), lengths))
        loss[~mask] = np.nan if trial % 2 else 99.0
        got = call(submission, "dr_grpo_mean", loss, mask, most)
        close("dr_grpo_mean", number("dr_grpo_mean", got), total / (n * most))


# ---------------------------------------------------------------- question 2


def words_of(rng, n):
    """(vocabulary of 22 words, key of n different words of it)."""
    vocabulary = [WORDS[i] for i in rng.permutation(len(WORDS))]
    return vocabulary, [vocabulary[i] for i in rng.permutation(len(WORDS))[:n]]


def cheating(submission, rng):
    for _ in range(TRIALS):
        vocabulary, key = words_of(rng, 6)
        answer = call(submission, "cheat", vocabulary)
        listed = isinstance(answer, (list, tuple)) and all(isinstance(w, str) for w in answer)
        require(listed, "cheat: expected a list of words")
        require(set(key) <= set(answer), "cheat: naive_reward is below 1 for some key")


def patching(submission, rng):
    def reward(key, answer):
        value = number("patched_reward", call(submission, "patched_reward", key, answer))
        require(-1e-9 <= value <= 1 + 1e-9, f"patched_reward: {value:.3g} is not from 0 to 1")
        return value

    for _ in range(TRIALS):
        vocabulary, key = words_of(rng, 2 * int(rng.integers(2, 4)))
        if rng.random() < 0.5:  # a key may name a word twice
            key[-1] = key[0]
        others = [word for word in vocabulary if word not in key]
        n, shuffled = len(key), [key[i] for i in rng.permutation(len(key))]
        require(abs(reward(key, shuffled) - 1) < 1e-9, "patched_reward: the key shuffled is not 1")
        ladder = [reward(key, key[: n - k] + others[:k]) for k in range(min(n, len(others)) + 1)]
        falling = all(a > b + 1e-9 for a, b in zip(ladder, ladder[1:]))
        require(falling, "patched_reward: one more wrong word does not lower it")
        half = reward(key, key[: n // 2] + others[: n // 2])
        for name, answer in {
            "all words": vocabulary, "the key and all other words": key + others,
            "one word for ever": key[:1] * 30, "nothing": [],
        }.items():  # fmt: skip
            value = reward(key, answer)
            require(value < 1 - 1e-9, f"patched_reward: {name} gets 1")
            fooled = name == "all words" and value >= half - 1e-9
            require(not fooled, "patched_reward: naming all words beats an honest half")
        require(reward(key, key + key) < 1 - 1e-9, "patched_reward: the key said twice gets 1")
        require(reward(key, key[:-1]) < 1 - 1e-9, "patched_reward: a word left out gets 1")


# ---------------------------------------------------------------- question 3


def comparing(submission, rng):
    for trial in range(TRIALS):
        n, shift = int(rng.integers(2, 9)), (0.3, -0.3, 0.0)[trial % 3]
        seeds = [int(s) for s in rng.permutation(50)[: n + 4]]
        level = {s: float(rng.normal(0.5, 0.2)) for s in seeds}
        ours = {s: level[s] + shift + 0.01 * float(rng.normal()) for s in seeds[: n + 2]}
        theirs = {s: level[s] for s in sorted(seeds[:n] + seeds[n + 2 :])}
        d = [ours[s] - theirs[s] for s in seeds[:n]]
        if shift == 0.0:  # centred, so that the interval surely holds 0
            ours |= {s: ours[s] - sum(d) / n for s in seeds[:n]}
            d = [ours[s] - theirs[s] for s in seeds[:n]]
        mean = sum(d) / n
        half = T95[n - 2] * (sum((x - mean) ** 2 for x in d) / (n - 1) / n) ** 0.5
        got = call(submission, "compare", ours, theirs)
        require(isinstance(got, (tuple, list)) and len(got) == 3, "compare: expected three values")
        close("compare", [number("compare", x) for x in got[:2]], [mean - half, mean + half])
        verdict = "better" if mean - half > 0 else "worse" if mean + half < 0 else "undetermined"
        require(isinstance(got[2], str) and got[2] == verdict, "compare: the verdict is wrong")


# ---------------------------------------------------------------- questions 4 and 5


def binomial_spread(p, size):
    """The chance that a group has both a right and a wrong candidate."""
    return 1 - p**size - (1 - p) ** size


def value_of(submission, name):
    value = getattr(submission, name, None)
    require(value is not None, f"{name}: no answer")
    return value


def share_equal(submission, rng):
    value = number("ZERO_SPREAD", value_of(submission, "ZERO_SPREAD"))
    require(abs(value - (1 - binomial_spread(0.4, 4))) < 0.003, "ZERO_SPREAD: wrong")


def groups_with_spread(submission, rng):
    value = value_of(submission, "WITH_SPREAD")
    require(isinstance(value, (tuple, list)) and len(value) == 2, "WITH_SPREAD: two numbers")
    for got, size in zip(value, (4, 16)):
        expected = 64 / size * binomial_spread(0.05, size)
        require(abs(number("WITH_SPREAD", got) - expected) < 0.03, "WITH_SPREAD: wrong")


def least_group(submission, rng):
    value = number("LEAST_GROUP", value_of(submission, "LEAST_GROUP"))
    right = next(size for size in range(2, 99) if binomial_spread(0.1, size) >= 0.9)
    require(value == right, "LEAST_GROUP: wrong")


TRUE = "bdef"


def statements(submission, rng):
    value = value_of(submission, "STATEMENTS")
    require(isinstance(value, dict), "STATEMENTS: expected a dictionary")
    answers = {name: value.get(name) for name in "abcdef"}
    require(all(isinstance(x, bool) for x in answers.values()), "STATEMENTS: each True or False")
    right = sum(answer == (name in TRUE) for name, answer in answers.items())
    require(right == 6, f"STATEMENTS: {right} of 6 right, all are needed")


PARTS = {  # question: [(points, what grades them)]
    "Q1": [(15, advantages), (10, constant_mean)], "Q2": [(5, cheating), (20, patching)],
    "Q3": [(25, comparing)], "Q4": [(5, share_equal), (5, groups_with_spread), (5, least_group)],
    "Q5": [(10, statements)],
}  # fmt: skip


# ---------------------------------------------------------------- one question in its own process


def load(path):
    """A file as a module."""
    spec = importlib.util.spec_from_file_location("submission", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graded(submission, question, seed):
    """(points, what is wrong) of every part of a question, one after the other."""
    for i, (points, part) in enumerate(PARTS[question]):
        rng = np.random.default_rng([seed, int(question[1]), i])
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            part(submission, rng)
            yield points, ""
        except Wrong as wrong:
            yield 0, str(wrong)
        except Exception as error:  # a result so odd that comparing it fails
            yield 0, f"{part.__name__}: odd result, {type(error).__name__}: {error}"


def child(path, question, seed, file):
    """Import a submission and write what it gets, one line per part, as soon as it is known."""
    try:
        submission = load(path)
    except BaseException as error:  # an exit as well
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        Path(file).write_text(json.dumps(["import", words]) + "\n", encoding="utf-8")
        return
    with open(file, "w", encoding="utf-8") as out:
        print(json.dumps(["imported", ""]), file=out, flush=True)
        for result in graded(submission, question, seed) if question in PARTS else ():
            print(json.dumps(result), file=out, flush=True)


def ask(path, question, seed, limit):
    """The lines of a child, and why they end early, if they do."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points"
        argv = [sys.executable, __file__, path, "--seed", seed, "--child", question, file]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen([*map(str, argv)], start_new_session=True, **quiet)
        try:
            process.wait(limit)
            end = "" if process.returncode == 0 else "its process ended early"
        except subprocess.TimeoutExpired:
            end = f"longer than {limit:g} s"
        finally:
            stop(process)
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("]")], end


def stop(process):
    """End a process and what it has started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    else:
        process.kill()
    process.wait()


def points_of(path, question, seed, limit):
    """(points, what is wrong, in one line) of a question."""
    lines, end = ask(path, question, seed, limit)
    results = lines[1:]
    whys = [why for _, why in results if why]
    if len(results) < len(PARTS[question]):
        whys.append(end or "its process ended early")
    return sum(points for points, _ in results), "; ".join(" ".join(why.split()) for why in whys)


def grade(path, seed, limit):
    """Print one line per question and the total; returns the exit status."""
    if not Path(path).is_file():
        print(f"autograder: {path}: no such file", file=sys.stderr)
        return 2
    lines, end = ask(path, "import", seed, limit)
    if not lines or lines[0][0] != "imported":
        why = lines[0][1] if lines else end or "its process ended"
        print(f"autograder: {path}: cannot be imported: {why}", file=sys.stderr)
        return 2
    total = 0
    for question, most in POINTS.items():
        points, why = points_of(path, question, seed, limit)
        total += points
        print(f"{question} {points:3}/{most}" + (f"  {why[:200]}" if why else ""), flush=True)
    print(f"total {total}/{sum(POINTS.values())}")
    return 0


def whole(text):
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def main():
    parser = argparse.ArgumentParser(description="Points for a submission of the homework.")
    parser.add_argument("submission", help="a file like homework.py")
    parser.add_argument("--seed", type=whole, default=0, help="of the hidden inputs, 0 or more")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds per question")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.submission, given.child[0], given.seed, given.child[1])
    else:
        sys.exit(grade(given.submission, given.seed, given.limit))


if __name__ == "__main__":
    main()
