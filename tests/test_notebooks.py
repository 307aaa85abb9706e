"""The course: twins in step, outputs light, solutions pass where stubs and wrong answers fail,
hints that do not give the answer away, formulas that can be rendered."""

import ast
import inspect
import re
import sys
import textwrap

import jupytext
import nbformat
import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))  # where a notebook's kernel starts

import checks
import course
import hints
import run
from wrong_answers import ANSWERS

import grpo

TWINS = {twin.stem: twin for twin in run.TWINS}
CELLS = {stem: jupytext.read(twin, fmt="py:percent").cells for stem, twin in TWINS.items()}
TREES = {stem: ast.parse(twin.read_text(encoding="utf-8")) for stem, twin in TWINS.items()}


def names_in_calls(stem, function):
    """The names that a notebook hands to a function of course.py, in order."""
    calls = [n for n in ast.walk(TREES[stem]) if isinstance(n, ast.Call)]
    return [a.id for call in calls if ast.unparse(call.func) == function for a in call.args]


EXERCISES = [(stem, name) for stem in TWINS for name in names_in_calls(stem, "course.final")]


def stub(stem, name):
    """A function as the notebook leaves it to the student."""
    space, imports = {}, (ast.Import, ast.ImportFrom)
    body = TREES[stem].body
    kept = [n for n in body if isinstance(n, imports) or getattr(n, "name", "") == name]
    exec(compile(ast.Module(kept, []), f"{stem}.py", "exec"), space)
    return space[name]


def solved(stem):
    """The text of a twin in which every exercise is replaced by its solution."""
    text = "import copy, itertools, math\nimport torch.nn.functional as F\n"
    text += TWINS[stem].read_text(encoding="utf-8")
    for name in names_in_calls(stem, "course.final"):
        before, rest = text.split(f"def {name}(")
        answer = inspect.getsource(course.solution(name)).rstrip()
        text = before + answer + rest[rest.index("\n\n\ncourse.check") :]
    return text


def test_every_notebook_has_its_number_is_executed_and_has_solutions_and_a_line_in_the_readme():
    numbers = [int(stem[:2]) for stem in TWINS]
    assert len(set(numbers)) == len(numbers) >= 9 and min(numbers) == 1
    for pattern in ("[0-9]*.ipynb", "solutions/*.py"):
        assert sorted(path.stem for path in FOLDER.glob(pattern)) == list(TWINS)
    linked = re.findall(r"\((\d\d_\w+)\.ipynb\)", (FOLDER / "README.md").read_text("utf-8"))
    assert linked == list(TWINS)


@pytest.mark.parametrize("stem", TWINS)
def test_a_notebook_is_its_twin_executed_with_light_and_clean_outputs(stem):
    cells = nbformat.read(path := FOLDER / f"{stem}.ipynb", as_version=4).cells
    sources = [(c.cell_type, c.source) for c in cells]
    assert sources == [(c.cell_type, c.source) for c in CELLS[stem]]
    code = [c for c in cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    printed = [o for o in outputs if o.output_type == "stream" and o.name == "stdout"]
    figures = [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    assert len(printed) + len(figures) == len(outputs) and len(figures) >= 3
    texts = "".join(o.text for o in printed)
    assert re.match(r"python .* torch .* about [\d.]+ min", texts)
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|Traceback|Error\b", texts)
    assert path.stat().st_size < run.LIMIT


@pytest.mark.parametrize("stem", TWINS)
def test_cells_are_short_and_every_exercise_is_checked_where_it_stands(stem):
    for cell in CELLS[stem]:
        assert cell.cell_type != "code" or cell.source.count("\n") < 24, cell.source
    names = names_in_calls(stem, "course.final")
    assert names_in_calls(stem, "course.check") == names and 3 <= len(names) <= 5


@pytest.mark.parametrize("stem,name", EXERCISES)
def test_a_solution_passes_and_the_stub_and_a_nearly_right_answer_fail_with_words(stem, name):
    right = course.solution(name)
    assert course.status(right) == ("solved", "") and course.use(right) is right

    def nearly(*arguments):  # the solution with its result moved by a little
        x = right(*arguments)
        if isinstance(x, tuple):
            return (x[0] + 0.01, *x[1:])
        return None if x is None or isinstance(x, torch.nn.Module) else 1.05 * x + 1

    nearly.__name__ = name
    for wrong in (stub(stem, name), nearly):
        state, words = course.status(wrong)
        assert state in ("open", "not yet") and len(words) > 10 and course.use(wrong) is not wrong


def test_every_check_has_at_least_two_wrong_answers_to_refuse():
    exercises = [name.split("__")[0] for name in ANSWERS]
    assert set(exercises) == {name for _, name in EXERCISES}
    for _, name in EXERCISES:
        assert exercises.count(name) >= 2, name


@pytest.mark.parametrize("name", ANSWERS)
def test_a_plausible_wrong_answer_is_refused_in_a_line_that_says_what_is_wrong(name):
    exercise = name.split("__")[0]
    with pytest.raises(AssertionError) as refused:  # not a crash inside the answer
        getattr(checks, exercise)(ANSWERS[name])
    words = str(refused.value).splitlines()[0]
    assert 10 < len(words) < 130
    told = {step for steps in hints.HINTS.values() for step in steps}
    assert not any(words in step for step in told)


def test_the_checks_of_the_bandit_accept_every_right_answer():
    def others_only(rewards):
        return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)

    def a_neighbour(rewards):
        return rewards - rewards.roll(1)

    for answer in (others_only, a_neighbour):
        checks.unbiased_advantages(answer)


def code_of(name):
    """The statements of a solution and the values in them, without blanks."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(course.solution(name)))).body
    lines = []
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and node is not function and not hasattr(node, "body"):
            lines += [node, *([node.value] if getattr(node, "value", None) else [])]
    texts = [ast.unparse(line) for line in lines if not isinstance(line, ast.Constant)]
    docstring = ast.get_docstring(function, clean=False)
    return ["".join(text.split()) for text in texts if docstring is None or docstring not in text]


@pytest.mark.parametrize("stem,name", EXERCISES)
def test_every_exercise_has_hints_in_steps_that_do_not_contain_the_solution(stem, name, capsys):
    steps = hints.HINTS[name]
    assert len(steps) >= 2 and len(set(steps)) == len(steps)
    for number, step in enumerate(steps, 1):
        course.hint(stub(stem, name), number)
        assert capsys.readouterr().out.startswith(f"hint {number} of {len(steps)}: {step[:20]}")
        for code in code_of(name):
            # names of one word, like `keys`, may stand in a hint
            assert code.isidentifier() or code not in "".join(step.split()), (code, step)
    for number in (0, len(steps) + 1):
        with pytest.raises(ValueError, match=f"hints 1 to {len(steps)}"):
            course.hint(name, number)


def test_hints_belong_to_exercises_and_a_failed_check_says_that_there_are_some(capsys):
    assert list(hints.HINTS) == [name for _, name in EXERCISES]
    for stem, name in EXERCISES[:1]:
        course.check(stub(stem, name))
        assert f"course.hint({name}, 1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no exercise"):
        course.hint("no_such_exercise", 1)


@pytest.mark.parametrize("stem", TWINS)
def test_the_first_cell_shows_the_map_with_this_lesson_on_it(stem):
    first = next(cell.source for cell in CELLS[stem] if cell.cell_type == "code")
    number = int(stem[:2])
    assert f"\ncourse.map({number})" in first
    assert any(number in lessons for *_, lessons in course.PIPELINE)
    book = nbformat.read(FOLDER / f"{stem}.ipynb", as_version=4)
    outputs = next(c.outputs for c in book.cells if c.cell_type == "code")
    (picture,) = [o.data["image/png"] for o in outputs if o.output_type == "display_data"]
    assert len(picture) < 20_000


def test_the_map_names_files_that_exist_and_notebooks_that_exist():
    for _, _, files, lessons in course.PIPELINE:
        assert all((ROOT / file).is_file() for file in files.split(", "))
        assert {f"{n:02}" for n in lessons} <= {stem[:2] for stem in TWINS}


@pytest.mark.parametrize("stem", TWINS)
def test_formulas_are_balanced(stem):
    for cell in CELLS[stem]:
        if cell.cell_type == "markdown":
            assert cell.source.count("$$") % 2 == 0
            for formula in re.findall(r"\$\$(.+?)\$\$", cell.source, re.S):
                assert formula.count("{") == formula.count("}")
                opened, closed = (re.findall(rf"\\{w}{{(\w+)}}", formula) for w in ("begin", "end"))
                assert opened == closed and formula.count(r"\tag") <= 1


def test_the_lesson_on_policy_gradients_tags_its_formulas_as_grpo_does():
    text = TWINS["05_policy_gradient"].read_text("utf-8")
    listed = dict(re.findall(r"^\((G\d+)\) (.+)", grpo.__doc__, re.M))
    assert set(re.findall(r"\\tag{(G\d+)}", text)) == {"G1", "G4", "G6", "G7", "G8", "G9"}
    whole = text[text.index("## GRPO's whole objective") :]
    for tag in ("G1", "G4", "G6", "G7", "G8", "G9"):
        assert tag in listed and rf"\text{{({tag})}}" in whole and f"({tag})" in whole


@pytest.mark.slow
@pytest.mark.parametrize("stem", TWINS)
def test_a_notebook_runs_in_a_clean_kernel_with_stubs_and_with_solutions(stem, tmp_path):
    n, twin = len(names_in_calls(stem, "course.final")), tmp_path / "solved.py"
    twin.write_text(solved(stem), encoding="utf-8")
    for source, count in ((TWINS[stem], 0), (twin, n)):
        assert f"{count} of {n} solved" in run.executed(source).cells[-1].outputs[0].text
