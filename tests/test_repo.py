"""What holds for all files: size and form, equations, imports, what README and Makefile say."""

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import eval as evaluation
import train

BUDGETS = dict(data=1150, model=450, reward=510, grpo=390, kernels=260, eval=1000, train=1280)
MAY_IMPORT = dict(data="", model="data", reward="model data", grpo="model data",
                  kernels="grpo model", eval="data model reward grpo kernels",
                  train="data model reward grpo kernels eval")  # fmt: skip
PACKAGES = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "tqdm", "matplotlib"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
new_readme = pytest.mark.skipif("| file |" not in README, reason="README is not rewritten yet")
of_every_file = pytest.mark.parametrize("name", BUDGETS)


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def nodes(name, *kinds):
    return [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, kinds)]


@of_every_file
def test_files_columns_functions_and_classes_are_short_and_no_warning_is_silenced(name):
    lines = source(name).splitlines()
    assert not re.search(r"#.*(noqa|TODO|FIXME|XXX)", source(name))
    assert len(lines) <= BUDGETS[name] and max(map(len, lines)) <= 100
    assert {f"{name}.py" for name in BUDGETS} == {path.name for path in ROOT.glob("*.py")}
    for node in nodes(name, ast.FunctionDef, ast.ClassDef):
        length = node.end_lineno - node.lineno + 1
        assert length <= (150 if isinstance(node, ast.ClassDef) else 50), (node.name, length)


@of_every_file
def test_every_equation_has_its_line_and_every_tagged_line_its_equation(name):
    tag, text = r"\([A-Z]\d+\)", source(name)
    listed = set(re.findall(tag, ast.get_docstring(ast.parse(text))))
    tagged = set(re.findall(tag, " ".join(re.findall(rf"  #((?: {tag})+)$", text, re.M))))
    assert listed == tagged, f"no line: {listed - tagged}; no equation: {tagged - listed}"
    assert listed or name == "data"


@of_every_file
def test_imports_go_one_way_and_use_only_the_packages_that_are_required(name):
    every = nodes(name, ast.Import, ast.ImportFrom)
    names = [getattr(node, "module", None) or x.name for node in every for x in node.names]
    modules = {module.split(".")[0] for module in names}
    assert modules & set(BUDGETS) <= set(MAY_IMPORT[name].split())
    assert modules - set(BUDGETS) - sys.stdlib_module_names <= PACKAGES
    assert not modules & {"pickle", "shelve", "marshal"}


@of_every_file
def test_nothing_is_unpickled_or_evaluated_and_text_is_utf8_everywhere(name):
    for node in nodes(name, ast.Call):
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ("eval", "exec", "os.system", "torch.load"), node.lineno
        assert options.get("shell", "False") == options.get("allow_pickle", "False") == "False"
        assert called != "np.load" or "allow_pickle" in options, node.lineno
        binary = any(re.fullmatch(r"'[rwa]b\+?'", ast.unparse(a)) for a in node.args)
        if called.endswith((".read_text", ".write_text", ".open")) or called == "open":
            utf8 = options.get("encoding") == "'utf-8'" or called in ("Image.open", "tarfile.open")
            assert binary or utf8, node.lineno


def test_importing_starts_no_work_no_thread_and_writes_nothing(tmp_path):
    script = """if True:
    import sys, threading, numpy, safetensors.torch, tokenizers, torch, tqdm, PIL.ImageOps
    def refuse(event, arguments):
        assert event not in ("subprocess.Popen", "os.fork", "socket.connect"), event
    before = threading.active_count(), torch.get_rng_state().sum()
    sys.addaudithook(refuse)
    import data, model, reward, grpo, kernels, eval, train
    assert before == (threading.active_count(), torch.get_rng_state().sum())"""
    env, argv = {"PYTHONPATH": str(ROOT)}, [sys.executable, "-B", "-c", script]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, env=os.environ | env)
    assert (done.returncode, done.stdout + done.stderr, [*tmp_path.iterdir()]) == (0, b"", [])


def commands(text):
    """The words of every line of a text that calls one of our files."""
    line = r"^ *(?:\$ )?(?:[\w./]*python3?|torchrun) (?!-m)(.*\.py\b.*)$"
    for words in re.findall(line, text, re.M):
        words = shlex.split(re.sub(r"\s\.\.\.", "", words), comments=True)
        yield [{"cuda": "cpu"}.get(word, word) for word in words if not word.startswith("--nproc")]


@pytest.mark.parametrize("name", [*BUDGETS, pytest.param("README", marks=new_readme)])
def test_every_command_in_a_docstring_and_in_the_readme_parses(name):
    text = README if name == "README" else ast.get_docstring(ast.parse(source(name)))
    assert (lines := list(commands(text)))
    for file, *argv in lines:
        assert (ROOT / file).is_file(), file
        if file == "train.py":
            train.parse_flags([word for word in argv if word != "--resume"])
        elif file == "eval.py":
            evaluation.parse_arguments(argv)


@new_readme
def test_the_readme_is_short_and_knows_where_everything_is():
    lines = README.splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 110
    for name in BUDGETS:
        row = next(line for line in lines if re.match(rf"\| \[?`{name}\.py`", line))
        assert str(len(source(name).splitlines())) in re.findall(r"\d+", row.replace(",", "")), row
    for target in re.findall(r"(?:^|`)make ([a-z-]+)(?= *[#`\n])", README, re.M):
        assert f"\n{target}:" in MAKEFILE, target
    walk = re.findall(r"`(\w+)`\**\s\((\w+)\.py:(\d+)", README)
    assert len(walk) == 12
    for function, file, line in walk:
        assert re.match(rf"\s*(def|class) {function}\b", source(file).splitlines()[int(line) - 1])
    for path in re.findall(r"\]\(((?!http)[^)#]+)[)#]", README):
        assert (ROOT / path).exists(), path


def test_no_file_names_a_place_on_somebodys_machine():
    folders, ends = ("", "tests/", "results/**/", "notebooks/**/"), (".py", ".md", ".toml", "file")
    for folder, end in itertools.product(folders, ends):
        for path in ROOT.glob(f"{folder}*{end}"):
            text = path.read_text(encoding="utf-8")
            found = re.findall(r"(?<![\w.:/])/(?:home|root|tmp|Users|work|mnt)/[\w.-]+", text)
            assert not found, (path.name, found)


def test_make_test_is_what_the_server_runs_and_means_the_linter_and_every_fast_test():
    rules = dict(re.findall(r"^([\w-]+):.*\n((?:\t.*\n)+)", MAKEFILE, re.M))
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == "make test"
    assert "ruff check ." in rules["test"] and rules["test"].endswith("-m pytest\n")
    assert rules["test-all"].endswith('-m pytest -m "slow or not slow"\n')


def test_a_half_made_environment_is_made_again(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stubs = {".venv/bin/python": "exit 1", "whole": "exit 0", "maker": "cp whole .venv/bin/python"}
    for name, line in stubs.items():  # a Python without pip; one with it; what makes that one
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    argv = ["make", "-C", tmp_path, f"PYTHON={tmp_path}/maker", ".venv/bin/.runtime"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and "exit 0" in (tmp_path / ".venv/bin/python").read_text(), done
