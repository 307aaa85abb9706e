"""The course: twins in step, outputs light, solutions pass where stubs and wrong answers fail."""

import ast
import inspect
import re
import sys

import jupytext
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))  # where a notebook's kernel starts

import course
import run

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
    assert len(set(numbers)) == len(numbers) >= 8 and min(numbers) == 1
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
    assert len(printed) + len(figures) == len(outputs) and len(figures) >= 2
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
def test_a_solution_passes_and_the_stub_and_a_nearly_right_answer_fail_with_a_hint(stem, name):
    right = course.solution(name)
    assert course.status(right) == ("solved", "") and course.use(right) is right

    def nearly(*arguments):  # the solution with its result moved by a little
        x = right(*arguments)
        if isinstance(x, tuple):
            return (x[0] + 0.01, *x[1:])
        return None if x is None or isinstance(x, torch.nn.Module) else x + 1

    nearly.__name__ = name
    for wrong in (stub(stem, name), nearly):
        state, hint = course.status(wrong)
        assert state in ("open", "not yet") and len(hint) > 10 and course.use(wrong) is not wrong


class Wrong:
    """Plausible wrong answers, each called like its exercise, __ and what is wrong."""

    def color_share__every_channel(picture, color):
        return (np.abs(picture.astype(int) - np.array(color)) < 60).all(-1).mean()

    def online_logsumexp__keeps_all(chunks):
        return torch.cat(list(chunks), 1).logsumexp(1)

    def clipped_objective__detached(ratio, advantage, low, high):
        return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).detach()

    def causal_attention__width_four(q, k, v):
        return course.solution("causal_attention")(q * q.shape[-1] ** 0.5 / 2, k, v)

    def equal_diversity__extrapolates(points, diversity):
        (d0, q0), *_, (d1, q1) = sorted(points)
        return q0 + (q1 - q0) * (diversity - d0) / (d1 - d0) if diversity <= d1 else None

    def kmeans_step__in_place(patches, entries):
        return entries.copy_(course.solution("kmeans_step")(patches, entries))

    def allowed_probs__in_place(logits, first, last, temperature):
        return logits.copy_(course.solution("allowed_probs")(logits, first, last, temperature))

    def advantages__other_eps(rewards):
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)

    def token_mean__nothing_valid(per_token, mask):
        return torch.where(mask, per_token, 0.0).sum() / mask.sum()


@pytest.mark.parametrize("name", [name for name in vars(Wrong) if not name.startswith("_")])
def test_a_plausible_wrong_answer_is_refused(name):
    wrong = getattr(Wrong, name)
    wrong.__name__ = name.split("__")[0]
    assert course.status(wrong)[0] == "not yet"


@pytest.mark.slow
@pytest.mark.parametrize("stem", TWINS)
def test_a_notebook_runs_in_a_clean_kernel_with_stubs_and_with_solutions(stem, tmp_path):
    n, twin = len(names_in_calls(stem, "course.final")), tmp_path / "solved.py"
    twin.write_text(solved(stem), encoding="utf-8")
    for source, count in ((TWINS[stem], 0), (twin, n)):
        assert f"{count} of {n} solved" in run.executed(source).cells[-1].outputs[0].text
