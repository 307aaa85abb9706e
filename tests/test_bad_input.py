"""Whatever is typed, missing or damaged: one line that names what is wrong, and status 2."""

import fcntl
import io
import itertools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import termios
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import TINY, read_json, run_like

import eval as evaluation
import train

NEW = "train.py --preset smoke --device cpu --out {top}/new "
CLOTHES = NEW + "--data fashion_mnist --data-dir {top} "
RESUME, RUN = "train.py --resume --out {top}/run", "eval.py --run {top}/run "
DRAW, SAMPLE = RUN + "--out {top}/new.png --draw ", "{top}/run/samples/base.png"
ASK = RUN + "--ask 'what color is the circle ?' --image "
POLICY, REWARD, CONFIG = "run/aligned.safetensors", "run/clip.safetensors", "run/config.json"

FLAGS = {  # of train.py: what the line says
    "--grup-size 4": "unrecognized arguments: --grup-size 4", "--batch 0": "expected more than 0",
    "--batch 1.5": "--batch: invalid int value: '1.5'", "--kl-coef -0.1": "expected 0 or more",
    "--method lvrp": "'lvrp' .*lvrpo.*unified", "--patch 5": "patch.* 5", "--lr nan": "nan: exp",
    "--device mps": "--device mps: not available here; use one of auto, ",
    "--group-size 1": "--group-size 1: expected at least 2", "--temperature inf": "inf: expected",
    "--clip-low 1": "--clip-low 1.0: expected less than 1", f"--seed {10**30}": "--seed 10+: exp",
    "--heads 5": "width 32: .* multiple of 2 x heads = 10",
    "--data syntetic": "--data syntetic: expected .*synthetic", "--data synthetic,": ",: expected",
    "--tasks draw,storys": "--tasks draw,storys: expected all, or .*story",
    "--tasks text": "--tasks text: expected .*draw",
    "--tasks caption,story": "--tasks caption,story: expected draw beside story",
    "--tasks vqa --method clip": "vqa: expected .*caption.* --method clip",
    "--tasks draw --method sft": "draw: expected .*vqa.* --method sft",
    "--method clip --extra-steps 0": "needs --base RUN", "--method clip --data shapes": "--method",
    "--base {top}/none": "none is not a run", "--base {top}/run --width 64": "width.* 32.* 64",
}  # fmt: skip
PROMPTS = {  # of eval.py --draw
    "' '": "an empty prompt", "'a crimson circle'": "unknown word.* 'crimson'; .*knows: .*circle",
    "'a blue-ish circle'": "word.* 'blue-ish'", "'красный круг'": "'красный', 'круг'",
    repr("red " * 9999): "9999 tokens where 20 fit", "x" * 9999: "unknown word.* 'x{40}';",
    "a --temperature -1": "temperature -1.0: expected 0 or more", f"a --seed {10**30}": "--seed",
    "a --device tpu": "--device tpu: not available here", "a --ask b": "not allowed with argument",
    "a --out {top}/x.psd": "x.psd: not a format .* name a .png",
    "a --out {top}/none/x.png": "x.png: cannot be written",
}  # fmt: skip
CASES = [  # command, what its line says, and a file with what happens to it, see `damage`
    *((NEW + flags, says) for flags, says in FLAGS.items()),
    *((DRAW + prompt, says) for prompt, says in PROMPTS.items()),
    (CLOTHES + "--tasks multihop,text", "--tasks multihop,text: expected .*draw"),
    (CLOTHES + "--data-dir no", "no/fashion_mnist/.*found No such file .*--download"),
    (NEW[:-4] + "run", "already holds a run: add --resume, or .* another --out"),
    (NEW[:-4] + "run", "already holds a run", CONFIG, None),
    (NEW[:-4] + POLICY, "aligned.safetensors: is a file; name a folder"),
    (NEW + "--base {top}/run", "--base .*run.* finish", "run/base.safetensors", None),
    (NEW + "--base {top}/run --method sft --extra-steps 0", "extra", "run/timing.csv", None),
    (RESUME[:-3] + "new", "new holds no run to resume"), (RESUME, CONFIG, CONFIG, 100),
    (RESUME, CONFIG, CONFIG, b"{}"),
    (RESUME, "clip.safetensors: cannot be read", REWARD, 100),
    (RESUME, "state_align.* cannot be read", "run/state_align.safetensors", b"{}"),
    (DRAW + "a", "is not a run", "run/tokenizer.json", 100),
    (DRAW + "a", "aligned.safetensors is of another configuration", CONFIG, {"width": 64}),
    (DRAW + "a", "another configuration", "run/codebook.safetensors", lambda t: t[:-1]),
    (DRAW + "a", "aligned.safetensors: cannot", POLICY, None),
    (DRAW + "a", "weights that are not finite", POLICY, lambda t: t * np.nan),
    (DRAW + "a", "not learned the task draw; it knows vqa,text", CONFIG, {"tasks": "vqa,text"}),
    (ASK + SAMPLE + " --think", "not learned .* multihop", CONFIG, {"tasks": "draw,vqa"}),
    (ASK + SAMPLE, "base.png: cannot be read as a picture", "run/samples/base.png", 100),
    (RUN + "--caption {top}/none.png", "none.png: cannot be read as a picture"),
    (RUN + "--ask 'is it ?'", "needs --image"), (RUN + "--ask '' --image " + SAMPLE, "an empty"),
    *((RUN, "eval.json: .*--resume --out", "run/eval.json", how) for how in (100, b"{}", None)),
    (RUN + "--json {top}", "Is a directory"), ("eval.py", "which run: --run"),
    *((f"eval.py --{x}" + " {top}/none", "none/eval.json: ") for x in ("run", "compare {top}/run")),
    ("eval.py --compare {top}/run {top}/run", "lvrpo with seed 0 is given twice"),
]  # fmt: skip


def damage(path, how):
    """None: it is gone; a number: so many bytes are cut off; bytes: all that is left; a dict:
    what changes in its JSON; a function: of its tensors."""
    if how is None:
        path.unlink()
    elif callable(how):
        save_file({name: how(tensor) for name, tensor in load_file(path).items()}, path)
    elif isinstance(how, dict):
        path.write_text(json.dumps(read_json(path) | how), encoding="utf-8")
    else:
        path.write_bytes(how if isinstance(how, bytes) else path.read_bytes()[:-how])


def files(top):
    """All that a command could change; it may begin a folder `new`, but leave no run in it."""
    every = [p for p in top.rglob("*") if p.name not in ("new", "lock")]
    return {p: p.is_file() and p.read_bytes() for p in every}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].split(" ", 6)[-1][-40:])
def test_bad_input_is_one_line_and_status_2_and_changes_nothing(smoke, clothes, command, case):
    (line, says, *happened), top = case, clothes.parent
    shutil.copytree(smoke, top / "run")
    if "--resume" in line and CONFIG not in happened:  # its alignment is still to do
        for name in ("aligned.safetensors", "eval.json"):
            (top / "run" / name).unlink()
    if happened:
        damage(top / happened[0], happened[1])
    argv, before = [word.replace("{top}", str(top)) for word in shlex.split(line)], files(top)
    done = command(*argv)
    assert done.status == 2 and re.fullmatch(rf"{argv[0]}: .*({says}).*\n", done.err), done.err
    assert files(top) == before


@pytest.fixture
def disk():
    """disk(n): from now on a file may have n bytes, as on a full disk; disk(-1): as before."""
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]) if n > 0 else before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(smoke, tmp_path, command, disk):
    (tmp_path / "numbers.json").write_text("before")
    disk(60_000)
    base = command(*NEW.replace("{top}", str(tmp_path)).split(), "--base", smoke)
    disk(60)
    numbers = command("eval.py", "--run", smoke, "--json", tmp_path / "numbers.json")
    with pytest.raises(ValueError, match="x.safetensors: cannot be written .*too large"):
        train.save_tensors({"a": torch.zeros(99)}, tmp_path / "x.safetensors")
    disk(-1)
    for done in (base, numbers):
        assert done.status == 2 and re.fullmatch(r".* be written .File too large.*\n", done.err)
    assert (tmp_path / "numbers.json").read_text() == "before"
    new = list((tmp_path / "new").glob("*.*"))
    assert new and all(p.read_bytes() == (smoke / p.name).read_bytes() for p in new)
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.json", "new"}


def test_what_is_no_plain_file_is_written_to_and_never_replaced(smoke, tmp_path, command):
    os.mkfifo(tmp_path / "pipe")  # as /dev/stdout and /dev/null are, which root could replace
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    done = command("eval.py", "--run", smoke, "--json", tmp_path / "pipe")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and done.status == 0
    assert json.loads(os.read(reader, 2**20))["base"]
    os.close(reader)


def test_a_sheet_shows_words_and_enlarged_pictures_framed_green_where_right_else_red():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    sheet = np.asarray(train.contact_sheet([("a prompt", pictures, [True, False])], words=100))
    assert [sheet[0, x].tolist() for x in (100, 170)] == [[40, 160, 60], [210, 60, 50]]
    assert (sheet[2:66:2, 172:236:2] == pictures[1]).all() and (sheet[:, :100] < 99).any()


def test_a_run_can_be_trained_in_a_thread(smoke, tmp_path, monkeypatch):
    monkeypatch.delitem(train.STAGES, train.evaluate)  # which takes longest
    place = dict(method="unified", extra_steps=1, base=str(smoke), out=str(tmp_path / "run"))
    thread = threading.Thread(target=train.main, args=[train.make_config(**TINY | place)])
    thread.start()
    thread.join()
    assert (tmp_path / "run/aligned.safetensors").is_file()


def test_commits_are_marked_where_files_changed_and_commands_quoted(tmp_path, monkeypatch):
    def git(*words):
        who = "-c", "user.name=a", "-c", "user.email=a@b"
        subprocess.run(["git", *who, "-C", tmp_path, *words], check=True, capture_output=True)

    here, copy = tmp_path / "train.py", tmp_path / "copy" / "train.py"
    copy.parent.mkdir()  # in the repository of something else
    here.write_text("committed")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(train, "__file__", here)
    commit = train.commit_of_code()
    here.write_text("changed")
    assert re.fullmatch("[0-9a-f]{7,}", commit) and train.commit_of_code() == f"{commit}+changes"
    monkeypatch.setattr(train, "__file__", copy)
    assert train.commit_of_code() == ""
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setattr(train, "__file__", here)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "my runs/a"])
    described = train.describe(SimpleNamespace(reason="cpu"))
    assert described["commit"] == "" and shlex.split(described["command"])[1:] == sys.argv


def test_every_picture_format_is_written_or_refused_in_one_line(tmp_path):
    Image.init()
    for number, ending in enumerate([*Image.EXTENSION, ".PNG", ""]):
        path = tmp_path / f"{number}{ending}"
        try:
            evaluation.save_picture(np.zeros((32, 32, 3), np.uint8), path)
            assert path.is_file()
        except ValueError as error:
            assert not path.exists() and "\n" not in str(error) and ending != ".PNG"
    assert not list(tmp_path.glob("writing-*"))


def test_an_ascii_console_shows_tables_and_help_even_without_docstrings(smoke, tmp_path):
    result = read_json(smoke / "eval.json")
    for seed in (0, 1):  # two seeds have an interval: ±
        (tmp_path / str(seed)).mkdir()
        result["meta"]["seed"] = seed
        (tmp_path / str(seed) / "eval.json").write_text(json.dumps(result))
    script = "import runpy, sys; sys.path[0] = '.'\nfor sys.argv in {!r}:\n  try:"
    script += " runpy.run_path(sys.argv[0], run_name='__main__')\n  except SystemExit: pass"
    commands = [["eval.py", "--compare", f"{tmp_path}/0", f"{tmp_path}/1"], ["train.py", "--help"]]
    done = subprocess.run([sys.executable, "-OO", "-c", script.format(commands)], cwd=ROOT,
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"0.000 ? 0.000" in done.stdout and b"--grpo" in done.stdout


@pytest.mark.parametrize("terminal, states", [(True, 15), (False, 4)])
def test_progress_fits_80_columns_and_a_log_gets_few_lines(
        smoke, tmp_path, monkeypatch, terminal, states):  # fmt: skip
    run, (master, slave), clock = run_like(smoke, tmp_path / "run"), os.openpty(), itertools.count()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, bytes([24, 0, 80, 0, 0, 0, 0, 0]))  # rows, columns
    row = dict(loss=-1.2345e-5, reward_draw=-2.3456, kl_draw=1.2345e-5, r1=0.12345)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock) / 10)
    with open(slave, "w") if terminal else io.StringIO() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        train.fit(run, "preference", run.policy(), 100, 1e-3, lambda step, update: row)
        stream.flush()
        shown = os.read(master, 2**16).decode() if terminal else stream.getvalue()
    shown = re.split(r"[\r\n]+", shown.strip())
    assert 2 <= len(shown) <= states and "100/100" in shown[-1]
    assert not terminal or max(map(len, shown)) <= 80
