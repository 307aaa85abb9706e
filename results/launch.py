"""Many runs of train.py: each in a process of its own, and a finished one never twice.

What the scripts of this folder that train have in common; for commands see ablate.py, reproduce.py.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval import run_command

MAY_DIFFER = ("device", "threads", "compile", "data_dir")  # where and how a run computes, not what


def trained(out, **flags):
    """The run `out`, trained with these flags of train.py: kept where it is finished, gone on with
    where it has started. ValueError if it has other flags, or fails."""
    out = Path(out)
    saved, words = out / "config.json", ["--out", str(out)]
    if saved.is_file():
        stored = json.loads(saved.read_text(encoding="utf-8"))
        same = {k for k, v in flags.items() if k in stored and type(stored[k])(v) == stored[k]}
        if others := set(flags) - same - set(MAY_DIFFER):
            names = ", ".join(sorted(others))
            raise ValueError(f"{out} has another {names}; delete it, or choose another --out")
        flags, words = {k: v for k, v in flags.items() if k in MAY_DIFFER}, [*words, "--resume"]
    if (out / "eval.json").is_file():
        return out
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    print(f"train.py --out {out}{' --resume' * saved.is_file()}", flush=True)
    argv = [sys.executable, str(ROOT / "train.py"), *words]
    status = subprocess.run(argv, stdout=subprocess.DEVNULL).returncode
    if status > 128:  # stopped by a signal, after saving
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"the run {out} failed, see above; the same command goes on")
    return out


def positive(text):
    """For argparse: a whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def command(program, main):
    """As eval.run_command; and Ctrl-C, which has stopped and saved the runs, is one line."""
    try:
        run_command(program, main)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
