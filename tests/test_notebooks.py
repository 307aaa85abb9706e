"""The course: twins are in step, solutions pass where stubs fail, outputs are light and clean, links lead somewhere, notebooks run."""

import ast
import importlib.util
import inspect
import re
import sys

import jupytext
import nbformat
import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))  # where a notebook's kernel starts

import course  # noqa: E402
import run  # noqa: E402

TWINS = {twin.stem: twin for twin in run.TWINS}
QUICK = ("07_kernels",)  # `make test` executes these and 08 with its solutions, `make test-all` all


def calls(tree, name):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def exercises(stem):
    """The names that the check cell of a notebook lists."""
    (final,) = calls(ast.parse(TWINS[stem].read_text(encoding="utf-8")), "course.final")
    return [argument.id for argument in final.args]


EXERCISES = [(stem, name) for stem in TWINS for name in exercises(stem)]


def stub(stem, name):
    """A function as the notebook leaves it to the student: its definition and the notebook's imports, run."""
    body = ast.parse(TWINS[stem].read_text(encoding="utf-8")).body
    kept = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom)) or (isinstance(n, ast.FunctionDef) and n.name == name)]
    space = {}
    exec(compile(ast.Module(kept, []), f"{stem}.py", "exec"), space)
    return space[name]


def solution(stem, name):
    spec = importlib.util.spec_from_file_location(f"solutions_{stem}", FOLDER / "solutions" / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def committed(stem):
    return nbformat.read(FOLDER / f"{stem}.ipynb", as_version=4)


def test_there_are_eight_notebooks_in_reading_order_each_with_solutions():
    assert [stem[:2] for stem in TWINS] == [f"{i:02}" for i in range(1, 9)]
    for folder, pattern in ((FOLDER, "[0-9]*.ipynb"), (FOLDER / "solutions", "*.py")):
        assert sorted(path.stem for path in folder.glob(pattern)) == list(TWINS)


@pytest.mark.parametrize("stem", TWINS)
def test_a_notebook_is_its_twin_executed_from_top_to_bottom(stem):
    twin = jupytext.reads(TWINS[stem].read_text(encoding="utf-8"), fmt="py:percent")
    cells = committed(stem).cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in twin.cells]
    code = [c for c in cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("stem", TWINS)
def test_outputs_are_light_and_clean_with_figures_and_without_errors(stem):
    path = FOLDER / f"{stem}.ipynb"
    assert path.stat().st_size < run.LIMIT
    outputs = [o for c in committed(stem).cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    texts = [o.text for o in outputs if o.output_type == "stream"] + [str(o.get("data", {}).get("text/plain", "")) for o in outputs]
    assert {o.output_type for o in outputs} <= {"stream", "display_data"} and not any(o.get("name") == "stderr" for o in outputs)
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|Traceback|Error\b", "\n".join(texts))
    assert re.match(r"python .* torch .* about [\d.]+ min", outputs[0].text)


@pytest.mark.parametrize("stem", TWINS)
def test_cells_are_short_and_every_exercise_is_checked_where_it_stands(stem):
    for cell in committed(stem).cells:
        assert cell.cell_type != "code" or cell.source.count("\n") < 26, cell.source
    checked = [call.args[0].id for call in calls(ast.parse(TWINS[stem].read_text(encoding="utf-8")), "course.check")]
    assert checked == exercises(stem) and 3 <= len(checked) <= 5


@pytest.mark.parametrize("stem,name", EXERCISES)
def test_a_solution_passes_the_check_and_the_stub_fails_it_with_a_hint(stem, name):
    assert course.status(solution(stem, name)) == ("solved", "")
    found, hint = course.status(stub(stem, name))
    assert found in ("open", "not yet") and len(hint) > 10


@pytest.mark.parametrize("stem,name", EXERCISES)
def test_an_answer_that_is_nearly_right_does_not_pass(stem, name):
    """The solution with its result moved by a little, whatever its form."""
    right = solution(stem, name)

    def moved(x):
        if isinstance(x, tuple):
            return (moved(x[0]), *x[1:])
        return x + 1 if not isinstance(x, (course.torch.nn.Module, type(None))) else course.torch.nn.Linear(3, 2)

    def nearly(*arguments):
        return moved(right(*arguments))

    nearly.__name__ = name
    assert course.status(nearly)[0] == "not yet"


def test_links_and_figures_of_the_course_exist():
    pages = {FOLDER / "README.md": (FOLDER / "README.md").read_text(encoding="utf-8")}
    pages |= {twin: "".join(c.source for c in committed(stem).cells if c.cell_type == "markdown") for stem, twin in TWINS.items()}
    for page, text in pages.items():
        for link in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (page.parent / link).exists(), (page.name, link)
    linked = re.findall(r"\((\d\d_\w+)\.ipynb\)", pages[FOLDER / "README.md"])
    assert linked == list(TWINS)


def with_solutions(stem):
    """The text of a twin in which every exercise is solved."""
    text = TWINS[stem].read_text(encoding="utf-8")
    for name in exercises(stem):
        tree = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
        lines = text.splitlines()
        lines[tree.lineno - 1 : tree.end_lineno] = inspect.getsource(solution(stem, name)).splitlines()
        text = "\n".join(lines)
    helpers = {"math", "itertools", "copy"}  # what solutions import beyond the notebook
    return "".join(f"import {name}\n" for name in sorted(helpers)) + "import torch.nn.functional as F\n" + text


@pytest.mark.parametrize("stem", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in TWINS])
def test_a_notebook_runs_in_a_clean_kernel(stem, tmp_path):
    book = run.executed(TWINS[stem])
    assert f"0 of {len(exercises(stem))} solved" in book.cells[-1].outputs[0].text


def test_a_notebook_with_the_solutions_in_place_says_that_all_is_solved(tmp_path):
    twin = tmp_path / "solved.py"
    twin.write_text(with_solutions("08_results"), encoding="utf-8")
    assert "3 of 3 solved" in run.executed(twin).cells[-1].outputs[0].text
