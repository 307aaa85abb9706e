"""What teachers use: the lab of sick runs, homework and autograder, slides, the cell for Colab."""

import ast
import inspect
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jupytext
import nbformat
import numpy as np
import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks"
TEACHING = FOLDER / "teaching"
sys.path[:0] = [str(FOLDER), str(TEACHING)]

import autograder
import checks
import colab
import course
import sick_runs

LOGS = json.loads((FOLDER / "sick_runs.json").read_text(encoding="utf-8"))
STUBS = (TEACHING / "homework.py").read_text(encoding="utf-8")

# ---------------------------------------------------------------- the lab of sick runs


def hint_for(answer):
    """What the check says of a diagnosis; "" if it is right."""

    def diagnosis():
        return answer

    return course.status(diagnosis)[1]


RIGHT = course.solution("diagnosis")()


def test_the_diagnosis_of_the_solution_is_that_of_the_script_and_any_panel_that_shows_it_will_do():
    assert {letter: cause for letter, (cause, _) in RIGHT.items()} == {
        letter: cause for cause, letter in sick_runs.letters().items()}  # fmt: skip
    assert hint_for(RIGHT) == ""
    swaps = {"clip": "gradient", "no spread": "gradient"}
    also = {letter: (cause, swaps.get(cause, panel)) for letter, (cause, panel) in RIGHT.items()}
    assert also != RIGHT and hint_for(also) == ""


def test_a_wrong_diagnosis_is_refused_with_a_count_and_no_answer():
    causes = {letter: cause for letter, (cause, _) in RIGHT.items()}
    for a in "ABCDEF":
        for b in "ABCDEF":
            if a < b:
                assert "4 of 6 causes" in hint_for(RIGHT | {a: RIGHT[b], b: RIGHT[a]})
        hint = hint_for(RIGHT | {a: (causes[a], "reward")})
        assert "5 of 6 panels" in hint
    for broken in (None, {}, "A", {"A": RIGHT["A"]}, RIGHT | {"G": RIGHT["A"]}, dict.fromkeys(
            "ABCDEF", "kl"), RIGHT | {"A": ("flu", "kl")}, RIGHT | {"A": RIGHT["B"]}):  # fmt: skip
        hint = hint_for(broken)
        assert len(hint) > 10 and not re.search(r"\b[A-F] is\b|[A-F]: (kl|clip|hacked)", hint)
    assert set(causes.values()) == set(checks.CAUSES) == set(sick_runs.CAUSES)
    text = inspect.getsource(checks)
    assert not any(f'"{letter}": ("' in text for letter in "BCDEF")


def test_the_logs_are_small_whole_and_show_what_the_reading_says():
    assert (FOLDER / "sick_runs.json").stat().st_size < 200_000
    about, healthy = LOGS["about"], LOGS["healthy"]
    assert set(LOGS) == {"about", "healthy", *"ABCDEF"}
    assert about["command"] == sick_runs.COMMAND and about["settings"] == sick_runs.SETTINGS
    assert all(len(column) == about["steps"] for n in LOGS if n != "about"
               for column in LOGS[n].values())  # fmt: skip
    log = {cause: LOGS[letter] for cause, letter in sick_runs.letters().items()}
    assert max(log["kl"]["kl"]) > 4 * max(healthy["kl"])
    assert set(log["no spread"]["zero_spread"]) == {1.0} and set(log["no spread"]["kl"]) == {0.0}
    assert log["entropy"]["entropy"][-1] < 0.05 * healthy["entropy"][-1]
    assert log["entropy"]["judge"][-1] > healthy["judge"][-1]  # what the reading is honest about
    assert min(log["temperature"]["outside_first"]) > 0.3
    others = (x for name, x in log.items() if name != "temperature")
    assert all(set(x["outside_first"]) == {0.0} for x in (healthy, *others))
    assert max(log["clip"]["largest_ratio"]) > 20 * max(healthy["largest_ratio"])
    assert log["hacked"]["reward"][-1] > log["hacked"]["reward"][0] + 1
    assert log["hacked"]["judge"][-1] < 0.3 * log["hacked"]["judge"][0]


@pytest.mark.parametrize("cause", sick_runs.CHANGES)
def test_a_change_still_fits_the_root_code_and_is_gone_after_the_run(cause):
    for function, _, _ in sick_runs.CHANGES[cause]:
        space, name = function.__globals__, function.__name__
        with sick_runs.changed(sick_runs.CHANGES[cause]):
            assert space[name].__code__.co_filename == f"changed {name}"
        assert space[name] is function


# ---------------------------------------------------------------- the homework

SOLUTION = '''
import itertools
from collections import Counter

import numpy as np

T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def dr_grpo_advantages(rewards):
    return rewards - rewards.mean(1, keepdims=True)


def dr_grpo_mean(per_token, mask, max_tokens):
    return np.where(mask, per_token, 0.0).sum() / (len(mask) * max_tokens)


def cheat(vocabulary):
    return list(vocabulary)


def patched_reward(key, answer):
    shared = sum((Counter(key) & Counter(answer)).values())
    return 2 * shared / (len(key) + len(answer))


def compare(ours, theirs):
    seeds = sorted(set(ours) & set(theirs))
    d = np.array([ours[s] - theirs[s] for s in seeds])
    half = T[len(d) - 1] * d.std(ddof=1) / len(d) ** 0.5
    low, high = d.mean() - half, d.mean() + half
    return low, high, "better" if low > 0 else "worse" if high < 0 else "undetermined"


ZERO_SPREAD = 0.4**4 + 0.6**4
WITH_SPREAD = tuple(64 / g * (1 - 0.05**g - 0.95**g) for g in (4, 16))
LEAST_GROUP = next(g for g in itertools.count(2) if 1 - 0.1**g - 0.9**g >= 0.9)
STATEMENTS = dict(a=False, b=True, c=False, d=True, e=True, f=True)
'''


def marks(text, seed=0):
    """{question: points} of a submission, in this process."""
    space = {}
    exec(compile(text, "submission.py", "exec"), space)
    submission = SimpleNamespace(**space)
    return {question: sum(points for points, _ in autograder.graded(submission, question, seed))
            for question in autograder.POINTS}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_solution_has_all_points_for_every_seed(seed):
    assert marks(SOLUTION, seed) == autograder.POINTS
    assert sum(autograder.POINTS.values()) == 100


def test_the_stubs_have_no_point_and_name_what_the_questions_name():
    assert set(marks(STUBS).values()) == {0}
    names = [{getattr(node, "name", "") for node in ast.parse(text).body}
             for text in (STUBS, SOLUTION)]  # fmt: skip
    assert names[0] - names[1] == {"naive_reward"} and not names[1] - names[0]


ZOO = {  # a wrong answer: (the part of the points that is left in its question, its text)
    "std": (10, "def dr_grpo_advantages(r):\n"
                " return (r - r.mean(1, keepdims=True)) / r.std(1)[:, None]"),
    "batch mean": (10, "def dr_grpo_advantages(r):\n return r - r.mean()"),
    "in place": (10, "def dr_grpo_advantages(r):\n r -= r.mean(1, keepdims=True)\n return r"),
    "flat": (10, "def dr_grpo_advantages(r):\n return (r - r.mean(1, keepdims=True)).ravel()"),
    "no numbers": (10, "def dr_grpo_advantages(r):\n return 'A'"),
    "a list of odd rows": (10, "def dr_grpo_advantages(r):\n return [[1], [2, 3]]"),
    "token mean": (15, "def dr_grpo_mean(x, m, t):\n"
                       " return np.where(m, x, 0).sum() / max(m.sum(), 1)"),
    "nan leaks": (15, "def dr_grpo_mean(x, m, t):\n return (x * m).sum() / (len(m) * t)"),
    "its own width": (15, "def dr_grpo_mean(x, m, t):\n return np.where(m, x, 0).sum() / m.size"),
    "a row each": (15, "def dr_grpo_mean(x, m, t):\n return np.where(m, x, 0).sum(1) / t"),
    "a word too few": (20, "def cheat(v):\n return v[1:]"),
    "still naive": (5, "def patched_reward(k, a):\n return float(np.mean([w in a for w in k]))"),
    "exact match": (5, "def patched_reward(k, a):\n return float(sorted(k) == sorted(a))"),
    "precision": (5, "def patched_reward(k, a):\n return sum(w in k for w in a) / max(len(a), 1)"),
    "sets": (5, "def patched_reward(k, a):\n return len(set(k) & set(a)) / len(set(k) | set(a))"),
    "a mild fine": (5, "def patched_reward(k, a):\n more = max(len(a) - len(k), 0)\n"
                       " shared = sum((Counter(k) & Counter(a)).values())\n"
                       " return max(0, shared / len(k) - more / 99)"),
    "in order": (5, "def patched_reward(k, a):\n"
                    " return sum(x == y for x, y in zip(k, a)) / max(len(k), len(a))"),
    "sorts its input": (5, "old = patched_reward\ndef patched_reward(k, a):\n"
                           " k.sort()\n return old(k, a)"),
    "unpaired": (0, """def compare(a, b):
 x, y = np.array(list(a.values())), np.array(list(b.values()))
 half = T[min(len(x), 10) - 1] * (x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y)) ** 0.5
 d = x.mean() - y.mean()
 return d - half, d + half, 'undetermined'"""),
    "population std": (0, "COMPARE = compare\ndef compare(a, b):\n low, high, v = COMPARE(a, b)\n"
                          " return low + 1e-3, high - 1e-3, v"),
    "turned": (0, "COMPARE = compare\ndef compare(a, b):\n return COMPARE(b, a)"),
    "no verdict": (0, "COMPARE = compare\ndef compare(a, b):\n return COMPARE(a, b)[:2]"),
    "always better": (0, "COMPARE = compare\ndef compare(a, b):\n"
                         " return (*COMPARE(a, b)[:2], 'better')"),
    "pops": (0, "COMPARE = compare\ndef compare(a, b):\n x = COMPARE(a, b)\n a.clear()\n return x"),
    "raises": (0, "def compare(a, b):\n return 1 / 0"),
    "numbers": (0, "ZERO_SPREAD, WITH_SPREAD, LEAST_GROUP = 0.6**4, (1, 2), 21"),
    "odd numbers": (0, "ZERO_SPREAD, WITH_SPREAD, LEAST_GROUP = 'x', 3, [22]"),
    "nan": (0, "ZERO_SPREAD, WITH_SPREAD, LEAST_GROUP = float('nan'), (np.nan,) * 2, True"),
    "all true": (0, "STATEMENTS = dict.fromkeys('abcdef', True)"),
    "ones": (0, "STATEMENTS = {k: int(v) for k, v in STATEMENTS.items()}"),
    "no dict": (0, "STATEMENTS = 'fttftt'"),
}  # fmt: skip
QUESTION_OF = {"dr_grpo": "Q1", "cheat": "Q2", "patched": "Q2", "compare": "Q3", "COMPARE": "Q3",
               "ZERO": "Q4", "STATEMENTS": "Q5", "old = patched": "Q2"}  # fmt: skip


@pytest.mark.parametrize("wrong", ZOO)
def test_a_wrong_answer_loses_the_points_of_its_part_and_no_others(wrong):
    left, text = ZOO[wrong]
    start = text.removeprefix("def ")
    question = next(q for name, q in QUESTION_OF.items() if start.startswith(name))
    for seed in (0, 1):
        assert marks(SOLUTION + "\n" + text, seed) == autograder.POINTS | {question: left}


def test_equal_words_count_however_the_partial_credit_is_made():
    jaccard = SOLUTION.replace("2 * shared / (len(key) + len(answer))",
                               "shared / (len(key) + len(answer) - shared)")
    assert jaccard != SOLUTION and marks(jaccard) == autograder.POINTS


def grader(folder, text, *options):
    """The autograder as a command on a submission; None: there is no such file."""
    path = folder / "submission.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    argv = [sys.executable, TEACHING / "autograder.py", path, *options]
    return subprocess.run([*map(str, argv)], capture_output=True, text=True, timeout=60)


def test_the_command_prints_a_line_a_question_and_survives_what_loops_exits_and_prints(tmp_path):
    wild = SOLUTION + """
print("total 100/100")
def dr_grpo_mean(x, m, t):
    while True: pass
def patched_reward(key, answer):
    import os
    os._exit(0)
def compare(a, b):
    raise SystemExit(0)
"""
    done = grader(tmp_path, wild, "--seed", "7", "--limit", "2")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[0] for line in lines] == [*autograder.POINTS, "total"]
    points = [re.search(r"\d+/\d+", line).group() for line in lines[:-1]]
    assert points == ["15/25", "5/25", "0/25", "15/15", "10/10"]
    assert "longer than 2 s" in lines[0] and "ended early" in lines[1]
    assert lines[-1] == "total 45/100"


@pytest.mark.parametrize("text, says, options", [
    ("def f(:\n", "SyntaxError", ()), ("import nowhere", "nowhere", ()), (None, "no such file", ()),
    ("raise SystemExit(0)", "SystemExit", ()),
    ("while True: pass", "longer than 1 s", ("--limit", "1")),
])  # fmt: skip
def test_a_file_that_cannot_be_imported_is_one_line_and_status_2(tmp_path, text, says, options):
    done = grader(tmp_path, text, *options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and says in done.stderr


def test_the_tables_of_students_t_agree():
    space = {}
    exec(compile(STUBS, "homework.py", "exec"), space)
    assert tuple(space["T"].values()) == autograder.T95
    assert np.isclose(autograder.T95[1], 4.303)


# ---------------------------------------------------------------- slides, reading, Colab


def test_the_slides_are_their_source_executed_and_their_metadata_are_valid():
    book = nbformat.read(path := TEACHING / "slides.ipynb", as_version=4)
    nbformat.validate(book)
    source = jupytext.read(TEACHING / "slides.py", fmt="py:percent")
    assert [(c.cell_type, c.source, c.metadata["slideshow"]) for c in book.cells] == [
        (c.cell_type, c.source, c.metadata["slideshow"]) for c in source.cells]  # fmt: skip
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in book.cells]
    assert set(kinds) <= {"slide", "subslide", "fragment", "skip", "notes", "-"}
    assert 20 <= kinds.count("slide") <= 34 and path.stat().st_size < 300_000
    shown = [k for k in kinds if k not in ("skip", "notes")]
    assert shown[0] == "slide"  # a fragment needs a slide before it
    text = "\n".join(c.source for c in book.cells)
    assert re.findall(r"^# Lecture (\d)", text, re.M) == list("12345")
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert len(pictures) == 2 and all((TEACHING / p).is_file() for p in pictures)
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type == "display_data"
            assert {"image/png", "text/markdown"} & set(output.data)


def test_the_reading_list_has_twenty_papers_with_numbers_and_what_stands_here():
    text = (TEACHING / "reading.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(\d+)\. \*\*.+?(?=^\d+\. |^## |^Not a)", text, re.M | re.S)
    bodies = re.findall(r"^\d+\. .+?(?=^\d+\. |^## |^Not a)", text, re.M | re.S)
    assert [int(n) for n in entries] == list(range(1, 21))
    for body in bodies:
        assert re.search(r"arXiv \d{4}\.\d{5}", body) and "*Here*:" in body, body
    numbers = re.findall(r"arXiv (\d{4}\.\d{5})", text)
    assert len(set(numbers)) == 20
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    tags = set(re.findall(r"\([A-Z]\d+\)", text))
    assert tags and all(tag in code for tag in tags)
    for flag in re.findall(r"`--([a-z-]+)", text):
        assert flag.replace("-", "_") in code, flag


def test_the_colab_cell_needs_an_address_and_is_python():
    cell = colab.first_cell("https://example.org/a/b")
    ast.parse(cell)
    assert 'REPOSITORY, FOLDER = "https://example.org/a/b"' in cell
    for bad in ("", 'x"; import os', "a\nb"):
        with pytest.raises(ValueError, match="address"):
            colab.first_cell(bad)
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)", required, re.M)) <= set(re.findall(r'"(\w+)": "', cell))


def test_every_file_that_a_page_for_teachers_links_is_there():
    for page in TEACHING.glob("*.md"):
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (TEACHING / target).exists(), (page.name, target)
