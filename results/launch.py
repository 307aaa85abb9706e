"""Many runs of train.py: each in its own process, and a finished one never twice.

Shared by the scripts of this folder that train; for commands see ablate.py and reproduce.py.
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
    """Train the run `out` with these flags of train.py: a finished run is kept, a started one is
    resumed. ValueError if it has other flags, or fails."""
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
        raise ValueError(f"the run {out} failed, see above; the same command continues")
    return out


def positive(text):
    """An argparse type: a whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def command(program, main):
    """As eval.run_command; Ctrl-C, which stops and saves the runs, also prints one line."""
    try:
        run_command(program, main)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
