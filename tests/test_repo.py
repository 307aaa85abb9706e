"""What holds for all source files: equations have lines and lines equations, examples run, imports go one way, nothing unsafe."""

import ast
import dataclasses
import doctest
import importlib
import io
import json
import re
import sys
import tokenize

import pytest
from conftest import ROOT

import eval as evaluation
import train

FILES = ("data", "model", "reward", "grpo", "kernels", "eval", "train")  # the reading order, but for eval, which train imports
MAY_IMPORT = {"data": "", "model": "data", "reward": "data model", "grpo": "data model reward", "kernels": "data model grpo",
              "eval": "data model reward grpo kernels", "train": "data model reward grpo kernels eval"}  # fmt: skip
PACKAGES = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "tqdm", "matplotlib"}


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def comments(text):
    return [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]


def calls(tree):
    """Every call in a syntax tree, by its dotted name: 'torch.load', 'eval'; a call on something unnamed ends in its method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield re.sub(r"^.*[)\]]\.", "?.", ast.unparse(node.func)), node


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_list_of_files_is_complete():
    assert {f"{name}.py" for name in FILES} == {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", FILES)
def test_every_equation_has_a_line_and_every_tagged_line_an_equation(name):
    text = source(name)
    listed = set(re.findall(r"\([A-Z]\d+\)", ast.get_docstring(ast.parse(text)) or ""))
    tagged = {tag for c in comments(text) if re.fullmatch(r"#( \([A-Z]\d+\))+", c) for tag in re.findall(r"\([A-Z]\d+\)", c)}
    assert listed == tagged, f"no line: {sorted(listed - tagged)}; no equation: {sorted(tagged - listed)}"
    assert listed or name == "data"


@pytest.mark.parametrize("name", FILES)
def test_the_examples_in_docstrings_run(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and attempted == source(name).count(">>> ")


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_with_what_it_is_and_the_command_that_exercises_it(name):
    doc = ast.get_docstring(ast.parse(source(name)))
    assert len(doc.splitlines()) > 5 and re.search(r"(train|eval|data|model|kernels)\.py", doc.split("\n\n")[-1])


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way_and_use_only_the_packages_that_are_required(name):
    modules = set(imported(ast.parse(source(name))))
    assert modules & set(FILES) <= set(MAY_IMPORT[name].split())
    assert modules - set(FILES) - sys.stdlib_module_names <= PACKAGES


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled_evaluated_or_run_in_a_shell(name):
    tree = ast.parse(source(name))
    assert not {"pickle", "shelve", "dill", "joblib", "marshal"} & set(imported(tree))
    for called, node in calls(tree):
        assert called not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"}, node.lineno
        flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert flags.get("shell") != "True" and flags.get("allow_pickle", "False") == "False", node.lineno
        assert called != "np.load" or "allow_pickle" in flags, node.lineno


@pytest.mark.parametrize("name", FILES)
def test_text_is_utf8_everywhere_and_nothing_needs_a_posix_system(name):
    """What is written here must be read on Windows and macOS, whose own encodings, signals and ways to start a process differ."""
    tree = ast.parse(source(name))
    for called, node in calls(tree):
        word, words = called.split(".")[-1], ast.unparse(node)
        text = word in ("read_text", "write_text") or (word == "open" and called.split(".")[0] not in ("Image", "tarfile", "os"))
        assert not text or "encoding=" in words or "utf-8" in words or re.search(r"'[rw]b\+?'", words), f"{name}.py:{node.lineno}"
        assert called not in {"os.fork", "os.kill", "os.getuid", "os.geteuid", "os.chmod", "os.symlink", "os.mkfifo"}, node.lineno
    assert not {"fcntl", "pwd", "grp", "termios", "multiprocessing"} & set(imported(tree))
    assert not re.search(r"signal\.SIG(?!INT|TERM)|set_start_method", source(name))
    guarded = [n for block in ast.walk(tree) if isinstance(block, ast.Try) for n in block.body if isinstance(n, ast.Import)]
    assert "resource" not in set(imported(tree)) or any(a.name == "resource" for n in guarded for a in n.names)


@pytest.mark.parametrize("name", FILES)
def test_importing_a_file_defines_things_and_starts_no_work(name):
    for node in ast.parse(source(name)).body:
        plain = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign))
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        pairs = ast.unparse(node) == "random.Random(0).shuffle(_pairs)"  # which pairs of kinds are held out
        assert plain or main or text or pairs, f"{name}.py:{node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_no_exception_is_swallowed_and_no_work_is_left_undone(name):
    text = source(name)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not all(isinstance(s, ast.Pass) for s in node.body), node.lineno
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


# ---------------------------------------------------------------- the README agrees with the sources and with results/

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_the_readme_tells_how_long_a_file_is(name):
    stated = int(re.search(rf"\| `{name}\.py` \|[^|]*\| (\d+) \|", README)[1])
    assert abs(stated - source(name).count("\n")) <= 10


def test_every_flag_in_the_readme_exists():
    known = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(train.Config)}
    known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source("eval") + source("kernels")))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known | {"--nproc"}  # torchrun's


def test_every_picture_and_result_in_the_readme_exists():
    paths = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert paths and all((ROOT / path).exists() for path in paths)


def test_the_example_in_the_readme_gives_what_it_says():
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False) == (0, README.count(">>> "))


def test_the_fronts_in_the_readme_are_those_of_the_results():
    rows = re.findall(r"^\| (base|unified|lvrpo), (one or two|three) objects \|(.*)\|$", README, re.M)
    assert len(rows) == 6
    for model, objects, cells in rows:
        quality, name = "compose" + "_heldout" * (objects == "three"), "base" if model == "base" else "aligned"
        runs = (ROOT / "results" / "cpu").glob(f"{'unified' if model == 'unified' else 'lvrpo'}-*/eval.json")
        fronts = [json.loads(path.read_text(encoding="utf-8"))["sweep"][name] for path in runs]
        for temperature, cell in zip((0.1, 0.3, 0.5, 0.7, 1.0), cells.split("|"), strict=True):
            values = [row[quality] for front in fronts for row in front if row["temperature"] == temperature]
            assert len(values) == 5 and int(cell.split("@")[0]) == round(100 * sum(values) / 5), (model, objects, temperature)


def test_the_numbers_in_the_readme_are_those_of_the_results():
    folders = sorted((ROOT / "results" / "cpu").glob("*-*"))
    assert evaluation.compare(folders).strip() == (ROOT / "results" / "cpu" / "compare.txt").read_text(encoding="utf-8").strip()
    claims = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))
    header = re.search(r"^\| \| (base \(n=.*)\|$", README, re.M)[1]
    methods = re.findall(r"(\w+)(?: of 8)?\*{0,2} \(n=(\d)\)", header)
    assert {m for m, _ in methods} == set(claims["methods"])
    rows = re.findall(r"^\| `([a-z0-9_]+(?: @ [a-zT ]+)?)` [^|]*\|(.*)\|$", README, re.M)
    table = {metric: [cell.strip() for cell in cells.split("|")] for metric, cells in rows if cells.count("|") == len(methods) - 1}
    assert len(table) > 10
    for metric, cells in table.items():
        for (method, n), cell in zip(methods, cells, strict=True):
            found = claims["methods"][method][metric]
            assert cell == f"{found['mean']:.3f}" and len(found["seeds"]) == int(n), (metric, method)


def test_the_tables_of_tasks_are_those_of_the_results():
    results, found = ROOT / "results", set()
    tables = {"tasks/all.txt": "tasks/all*", "tasks/hops.txt": "tasks/hops*", "fashion_mnist/compare.txt": "fashion_mnist/*-*"}
    for text, folders in tables.items():
        compared = evaluation.compare(sorted(path for path in results.glob(folders) if path.is_dir()))
        assert compared.strip() == (results / text).read_text(encoding="utf-8").strip()
        for line in compared.splitlines()[1:]:
            metric, lvrpo, unified, base, difference, _ = re.split("  +", line.strip())
            found.add((metric, *(x.split(" ")[0] for x in (base, unified, lvrpo)), difference))
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([^|]+) \|$", README, re.M)
    assert len(rows) == 20 and set(rows) <= found


def test_the_verdicts_in_the_readme_are_those_of_the_results():
    claims = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]
    rows = re.findall(r"^\| [^|`]+ \| `(\w+)` \|(.*)\|$", README, re.M)
    assert len(rows) == 6
    for metric, cells in rows:
        judged = {c["against"]: c for c in claims if c["metric"] == metric}
        for method, cell in zip(("unified", "clip", "beit"), cells.split("|")):
            c = judged[method]
            assert cell.strip() == f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}] {c['verdict']}", (metric, method)
