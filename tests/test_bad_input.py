"""Whatever is typed, missing or damaged: one line that names the problem and the remedy, exit status 2, and nothing written."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data_public import idx
from test_train import prepared

import train

FASHION = "data/fashion_mnist/train-images-idx3-ubyte.gz"
LABELS = "data/fashion_mnist/train-labels-idx1-ubyte.gz"
NEW = "train.py --preset smoke --device cpu --out {tmp}/new "
CLOTHES = NEW + "--data fashion_mnist --data-dir {tmp}/data"
RESUME, RUN, DRAW = "train.py --resume --out {tmp}/run ", "eval.py --run {tmp}/run ", "eval.py --run {tmp}/run --out {tmp}/new.png --draw "
ASK = 'eval.py --run {tmp}/run --ask "what color is the circle ?" --image '


# ---------------------------------------------------------------- what may have happened to a file


def absent(path):
    path.unlink()


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])


def holds(content):
    return lambda path: path.write_bytes(content)


def changed(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def tensors(change):
    return lambda path: save_file({k: change(v).contiguous() for k, v in load_file(str(path)).items()}, str(path))


def unfinished(path):
    """The alignment is still to do."""
    for name in ("aligned.safetensors", "eval.json", "report.html"):
        (path / name).unlink()


CASES = {  # name: (command, {file: what happened to it}, what the line says)
    # flags
    "unknown flag": (NEW + "--grup-size 4", {}, "unrecognized arguments: --grup-size 4; did you mean --group-size?"),
    "word too many": (NEW + "extra", {}, "unrecognized arguments: extra"),
    "value missing": (NEW + "--batch", {}, "--batch: expected one argument; see --help"),
    "text for a number": (NEW + "--batch many", {}, "--batch: invalid int value: 'many'"),
    "fraction for a whole number": (NEW + "--batch 1.5", {}, "--batch: invalid int value: '1.5'"),
    "preset misspelt": (NEW + "--preset smokee", {}, "invalid choice: 'smokee' .*; did you mean smoke?"),
    "method misspelt": (NEW + "--method lvrp", {}, "invalid choice: 'lvrp' .*; did you mean lvrpo?"),
    "unknown reward": (NEW + "--reward human", {}, "invalid choice: 'human' .choose from .*rule.*learned.*mix"),
    "unknown device": (NEW + "--device tpu", {}, "invalid choice: 'tpu'"),
    "absent device": (NEW + "--device mps", {}, "--device mps: not available here; use one of auto, "),
    "batch of none": (NEW + "--batch 0", {}, "--batch 0: expected more than 0"),
    "group of one": (NEW + "--group-size 1", {}, "--group-size 1: expected at least 2"),
    "negative penalty": (NEW + "--kl-coef -0.1", {}, "--kl-coef -0.1: expected 0 or more"),
    "clip range of one": (NEW + "--clip-low 1", {}, "--clip-low 1.0: expected between 0 and 1"),
    "rate not a number": (NEW + "--lr nan", {}, "--lr nan: expected more than 0"),
    "infinite rate": (NEW + "--grpo-lr inf", {}, "--grpo-lr inf: expected more than 0"),
    "infinite temperature": (NEW + "--temperature inf", {}, "--temperature inf: expected more than 0"),
    "negative seed": (NEW + "--seed -1", {}, "--seed -1: expected 0 or more"),
    "seed too large": (NEW + "--seed 9999999999999999999999", {}, r"expected 0 or more, below 2\*\*63"),
    "too many threads": (NEW + "--threads 100000", {}, "--threads 100000: expected 0 to 1024"),
    "patch that does not fit": (NEW + "--patch 5", {}, "--patch 5: expected 4, 8 or 16"),
    "width and heads disagree": (NEW + "--heads 5", {}, "--width 32: expected a multiple of 2 x heads = 10"),
    "unknown data": (NEW + "--data syntetic", {}, "--data syntetic: expected .* did you mean synthetic?"),
    "data twice": (NEW + "--data synthetic,synthetic", {}, "--data synthetic,synthetic: expected .*, each once"),
    "unknown stage": (NEW + "--stage grpp", {}, "--stage grpp: expected .*; did you mean grpo?"),
    "stage of another method": (NEW + "--method unified --stage grpo", {}, "--stage grpo: expected all, or names from codebook"),
    "stage without those before": (NEW + "--stage grpo", {}, "--stage grpo: a new run begins with codebook; add --base RUN, or --resume"),
    "method without a base": (NEW + "--method clip --extra-steps 0", {}, "--method clip needs --base RUN"),
    # run directories
    "there is a run": ("train.py --preset smoke --out {tmp}/run", {}, "already holds a run .config.json.: add --resume"),
    "there are results": ("train.py --preset smoke --out {tmp}/run", {"run/config.json": absent}, "already holds a run .eval.json."),
    "nothing to resume": ("train.py --resume --out {tmp}/new", {}, "new holds no run to resume; leave --resume out"),
    "a file for a folder": ("train.py --preset smoke --out {tmp}/run/eval.json", {}, "eval.json: is a file; name a folder"),
    "a folder below a file": ("train.py --preset smoke --out {tmp}/run/eval.json/new", {}, "Not a directory; make room or get permission"),
    "other flags when resumed": (RESUME + "--grpo-steps 9", {}, "--grpo-steps 9: the run in .* has 4; leave it out to go on"),
    "no base": (NEW + "--base {tmp}/none", {}, "--base .*none: codebook.safetensors is not there; train it first"),
    "base of another width": (NEW + "--base {tmp}/run --width 64", {}, r"has another configuration: width 32 \(here 64\)"),
    "damaged base": (NEW + "--base {tmp}/run", {"run/clip.safetensors": short}, "--base .*clip.safetensors cannot be .*train it again"),
    # checkpoints
    "configuration cut short": (RESUME, {"run/config.json": short}, "config.json is damaged .*; start again with another --out"),
    "configuration of other names": (RESUME, {"run/config.json": changed(depth=3)}, "config.json is damaged .*depth"),
    "configuration of other types": (RESUME, {"run/config.json": changed(width="wide")}, "config.json is damaged"),
    "configuration a folder": (RESUME, {"run/config.json": folder}, "config.json is damaged .*Is a directory"),
    "policy absent": (DRAW + "a", {"run/aligned.safetensors": absent}, "aligned.safetensors is not there: .*--resume .*goes on"),
    "policy cut short": (DRAW + "a", {"run/aligned.safetensors": short}, "aligned.safetensors cannot be used .*; delete it and .*--resume"),
    "policy flipped": (DRAW + "a", {"run/aligned.safetensors": flipped}, "aligned.safetensors cannot be used .its checksum"),
    "policy empty": (DRAW + "a", {"run/aligned.safetensors": holds(b"")}, "aligned.safetensors cannot be used"),
    "policy a pickle": (DRAW + "a", {"run/aligned.safetensors": holds(b"\x80\x04K\x01.")}, "aligned.safetensors cannot be used"),
    "policy not finite": (DRAW + "a", {"run/aligned.safetensors": tensors(lambda t: t * np.nan)}, "holds weights that are not finite"),
    "policy of another width": (DRAW + "a", {"run/config.json": changed(width=64)}, "cannot be used .*: it is of another configuration"),
    "policy of another depth": (DRAW + "a", {"run/config.json": changed(layers=3)}, "Missing key.*: it is of another configuration"),
    "other words": (DRAW + "a", {"run/words.json": holds(b'["a"]'), "run/tokenizer.json": short}, "is not a finished run"),
    "other codebook": (DRAW + "a", {"run/codebook.safetensors": tensors(lambda t: t[:-1])}, "size mismatch.*another configuration"),
    "codebook flipped": (RUN, {"run/codebook.safetensors": flipped}, "is not a finished run .*checksum"),
    "reward flipped": (RESUME, {"run": unfinished, "run/clip.safetensors": flipped}, "clip.safetensors cannot be used .its checksum"),
    "base not finite": (RESUME, {"run": unfinished, "run/base.safetensors": tensors(lambda t: t / 0)}, "base.safetensors holds weights"),
    "state damaged": (RESUME, {"run": unfinished, "run/state_grpo.safetensors": holds(b"{}")}, "state_grpo.* cannot be .*; delete it"),
    "log not text": (RESUME, {"run": unfinished, "run/metrics.csv": holds(b"\xff\xfe\n")}, "metrics.csv is damaged .*; repair that line"),
    "log without stages": (RESUME, {"run": unfinished, "run/metrics.csv": holds(b"step\n1\n")}, "metrics.csv is damaged .*stage"),
    "results cut short": (RUN, {"run/eval.json": short}, "eval.json is damaged .*--stage eval .*makes it again"),
    "results without a table": (RUN, {"run/eval.json": holds(b"{}")}, "eval.json is damaged"),
    "no run": ("eval.py --run {tmp}/none", {}, "none is not a finished run .*; make one with `python train.py --out"),
    "comparison with nothing": ("eval.py --compare {tmp}/run {tmp}/none", {}, "none/eval.json is not there: has this run finished?"),
    "comparison with itself": ("eval.py --compare {tmp}/run {tmp}/run", {}, "expected runs on the same data, each method and seed once"),
    # prompts and pictures
    "nothing to do": ("eval.py", {}, "say what to do: --run DIR"),
    "two things to do": (RUN + "--draw a --ask b", {}, "--ask: not allowed with argument --draw"),
    "prompt empty": (DRAW + "' '", {}, "--draw: found 0 tokens, expected 1 to 64; try"),
    "unknown words": (DRAW + "'a crimson circle'", {}, "unknown word.* 'crimson'; this model knows: .*circle"),
    "10,000 words": (DRAW + repr("red " * 10000), {}, "--draw: found 10000 tokens, expected 1 to 64"),
    "one endless word": (DRAW + "x" * 10000, {}, "unknown word.* 'x{40}';"),
    "control characters": (DRAW + "'a \x07\x1b[31m circle'", {}, r"unknown word.* '\\x07\\x1b\[31m'"),
    "another script": (DRAW + "'красный круг'", {}, "unknown word.* 'красный', 'круг'; this model knows"),
    "question empty": ("eval.py --run {tmp}/run --ask '' --image {tmp}/run/samples/base.png", {}, "--ask: found 0 tokens"),
    "question without a picture": ("eval.py --run {tmp}/run --ask 'is there a circle ?'", {}, "--ask needs --image FILE"),
    "picture absent": (ASK + "{tmp}/none.png", {}, "none.png: cannot be read as a picture"),
    "picture a folder": (ASK + "{tmp}", {}, "cannot be read as a picture .*Is a directory"),
    "picture a text": (ASK + "{tmp}/run/config.json", {}, "config.json: cannot be read as a picture"),
    "picture cut short": (ASK + "{tmp}/run/samples/base.png", {"run/samples/base.png": short}, "base.png: cannot be read as a picture"),
    "temperature below zero": (DRAW + "a --temperature -1", {}, "--temperature -1.0 --guidance 0.0: expected numbers"),
    "infinite guidance": (DRAW + "a --guidance inf", {}, "--guidance inf: expected numbers"),
    "seed below zero": (DRAW + "a --seed -1", {}, "--seed -1: expected 0 or more"),
    "unknown picture format": (RUN + "--draw a --out {tmp}/new.txt", {}, "new.txt: no kind of picture file is called so; name a .png file"),
    "picture into no folder": (RUN + "--draw a --out {tmp}/none/new.png", {}, "new.png: cannot be written .No such file"),
    "numbers into a folder": (RUN + "--json {tmp}", {}, "cannot be written .Is a directory.; make room, get permission, or name another"),
    "ablation misspelt": ("eval.py --ablate grop", {}, "invalid choice: 'grop' .*; did you mean group?"),
    "ablation of no seed": ("eval.py --ablate kl --seeds 0 --run {tmp}/run", {}, "--seeds 0: expected 1 or more"),
    # data
    "data absent": (CLOTHES, {FASHION: absent}, "found No such file .*; .*add --download, or put the official files at"),
    "data a folder": (CLOTHES, {FASHION: folder}, "found Is a directory"),
    "data empty": (CLOTHES, {FASHION: holds(b"")}, "ubyte.gz: found "),
    "data not gzip": (CLOTHES, {FASHION: holds(b"<html>")}, "found BadGzipFile.*expected a gzip file"),
    "data cut short": (CLOTHES, {FASHION: short}, "found EOFError.*expected a gzip file"),
    "other magic number": (CLOTHES, {FASHION: holds(gzip.compress(idx(np.arange(3))))}, "magic number 0x00000801, expected 0x00000803"),
    "other picture size": (CLOTHES, {FASHION: holds(gzip.compress(idx(np.zeros((40, 9, 8)))))}, r"found pictures of \[9, 8\]"),
    "fewer labels": (CLOTHES, {LABELS: holds(gzip.compress(idx(np.arange(9))))}, "found 9 labels, expected one for each of 40 pictures"),
    "label out of range": (CLOTHES, {LABELS: holds(gzip.compress(idx(np.full(40, 10))))}, "found label 10, expected 0 to 9"),
}  # fmt: skip
PROCESSES = ("unknown flag", "preset misspelt", "rate not a number", "there is a run", "damaged base", "configuration cut short",
             "policy flipped", "results cut short", "10,000 words", "data cut short")  # fmt: skip


@pytest.fixture
def prepare(smoke, clothes, tmp_path):
    """prepare(name of a case) -> the words of its command, the folder it works on, damaged, and all files of that folder."""
    root = tmp_path / "clothes"
    root.mkdir()
    shutil.move(tmp_path / "fashion_mnist", root / "fashion_mnist")

    def prepare(name):
        line, damage, _ = CASES[name]
        top = tmp_path / "case" / name.replace(" ", "-")
        shutil.copytree(smoke, top / "run")
        shutil.copytree(root, top / "data")
        for file, happened in damage.items():
            happened(top / file)
        return [word.replace("{tmp}", str(top)) for word in shlex.split(line)], top, files(top)

    return prepare


def files(top):
    return {p: p.read_bytes() if p.is_file() else None for p in top.rglob("*")}


def check(status, err, program, says):
    assert status == 2 and re.fullmatch(rf"{program}: .*({says}).*\n", err), err


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(prepare, command, name):
    argv, top, before = prepare(name)
    done = command(*argv)
    check(done.status, done.err, argv[0], CASES[name][2])
    assert files(top) == before


def test_the_same_is_true_of_real_processes(prepare):
    prepared = {name: prepare(name) for name in PROCESSES}
    started = {name: subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                      encoding="utf-8") for name, (argv, _, _) in prepared.items()}  # fmt: skip
    for name, (argv, top, before) in prepared.items():
        err = started[name].communicate()[1]
        check(started[name].returncode, err, argv[0], CASES[name][2])
        assert files(top) == before


def test_there_are_cases_enough():
    assert len(CASES) >= 60 and len(PROCESSES) >= 10


# ---------------------------------------------------------------- a disk that is full, or may not be written to


@pytest.fixture
def disk():
    """disk(n): from now on a file may have n bytes at most, and the system refuses the rest, as a full disk does."""
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, file", [(300, "metrics.csv"), (100_000, "base.safetensors")])
def test_a_full_disk_ends_a_run_with_one_line_and_more_room_lets_it_go_on(smoke, tmp_path, command, disk, size, file):
    small = dict(pretrain_steps=8, batch=8, stage="pretrain")
    train.main(prepared(smoke, tmp_path / "whole", **small))
    prepared(smoke, tmp_path / "run", **small)
    argv = ("train.py", "--resume", "--stage", "pretrain", "--out", tmp_path / "run")
    disk(size)
    done = command(*argv)
    disk(10**9)
    last = done.err.splitlines()[-1]
    assert done.status == 2 and re.match("train.py: .*File too large.*make room", last) and "Traceback" not in done.err
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert not any(name.startswith("writing-") for name in left) and "base.safetensors" not in left
    assert command(*argv).status == 0
    for name in ("base.safetensors", "metrics.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("flags, file", [(["--json"], "numbers.json"), (["--draw", "a red circle", "--out"], "picture.png")])
def test_a_full_disk_leaves_the_file_that_was_there(smoke, tmp_path, command, disk, flags, file):
    (tmp_path / file).write_text("what was there")
    disk(60)
    done = command("eval.py", "--run", smoke, *flags, tmp_path / file)
    disk(10**9)
    check(done.status, done.err, "eval.py", f"{file}: cannot be written .File too large.; make room")
    assert (tmp_path / file).read_text() == "what was there" and [p.name for p in tmp_path.iterdir()] == [file]


def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path, command):
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # who may write everywhere but in a file system of the kernel
        place = "/proc/run"
    else:
        (tmp_path / "closed").mkdir(mode=0o555)
        place = tmp_path / "closed" / "run"
    done = command("train.py", "--preset", "smoke", "--device", "cpu", "--out", place)
    check(done.status, done.err, "train.py", "run: .*; make room or get permission there")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_device_is_written_to_and_never_replaced(smoke, command):
    done = command("eval.py", "--run", smoke, "--json", "/dev/full")
    check(done.status, done.err, "eval.py", "/dev/full: cannot be written .No space left on device.")
    assert command("eval.py", "--run", smoke, "--json", "/dev/null").status == 0
    assert all(os.path.exists(p) and not os.path.isfile(p) for p in ("/dev/full", "/dev/null"))


def test_a_model_that_no_memory_can_hold_is_one_line(smoke, tmp_path, command):
    prepared(smoke, tmp_path / "run", width=4 * 10**12)
    done = command("train.py", "--resume", "--stage", "pretrain", "--out", tmp_path / "run")
    check(done.status, done.err, "train.py", "out of memory .*; lower --batch, --prompts, --group-size or --width")


def test_a_picture_of_another_size_is_scaled(smoke, tmp_path, command):
    answers, drawn = [], Image.open(smoke / "samples" / "base.png").crop((340, 0, 372, 32))
    for size in (32, 256):
        drawn.resize((size, size), Image.Resampling.NEAREST).save(tmp_path / "p.png")
        answers.append(command("eval.py", "--run", smoke, "--ask", "is there a red circle ?", "--image", tmp_path / "p.png"))
    assert answers[0].status == answers[1].status == 0 and answers[0].out == answers[1].out != ""
