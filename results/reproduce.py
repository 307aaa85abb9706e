"""The study behind the paper's claims, in one go: every method, the ablations, real pictures.

lvrpo trains the base of its seed; all other methods start there. Baselines see what it sees and get
about its seconds; controls differ as rule.md says, which also has the rule for every verdict. Run
the command again to continue where it stopped; claims.py judges what is finished.

    $ python results/reproduce.py --data-dir data      # two cores: see what it says at the start
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from claims import BASELINES, CONTROLS, collect, tables, write
from launch import command, positive, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import Parser
from train import make_config

MINUTES = {"lvrpo": 8}  # of one core, with the cpu preset; any other run: 5
ABLATIONS = {  # one change of lvrpo each; groups of 2 have as many samples
    "reward-rule": {"contrast": 0.0},
    "reward-learned": {"contrast": 0.0, "reward": "learned"},
    "reward-rule-and-learned": {"contrast": 0.0, "reward": "mix"},
    "reward-contrast": {"contrast": 1.0},
    "no-rarity": {"rarity": 0.0},
    "kl-0": {"kl_coef": 0.0},
    "kl-0.2": {"kl_coef": 0.2},
    "groups-of-2": {"group_size": 2, "prompts": 64},
}
REAL = {"data": "fashion_mnist", "tasks": "draw,caption,vqa,text", "download": True}


def plan(out, seeds, real_seeds):
    """Yields (folder, flags of train.py) for every run, bases first."""
    for seed in range(seeds):
        yield f"lvrpo-{seed}", {"method": "lvrpo", "seed": seed}
    for method in (*BASELINES, *CONTROLS):
        for seed in range(seeds):
            base = {"base": str(out / f"lvrpo-{seed}")}
            yield f"{method}-{seed}", {"method": method, "seed": seed} | base
    for method in ("lvrpo", "unified"):
        for seed in range(real_seeds):
            base = {"base": str(out / f"real/lvrpo-{seed}")} if method != "lvrpo" else {}
            yield f"real/{method}-{seed}", {"method": method, "seed": seed} | base | REAL
    for name, change in ABLATIONS.items():
        for seed in range(seeds):
            base = {"base": str(out / f"lvrpo-{seed}"), "seed": seed}
            yield f"ablations/{name}-{seed}", base | change


def reproduce(out, results, preset, seeds=5, real_seeds=3, jobs=2, **flags):
    """Train and evaluate all runs, `jobs` at a time with their share of the cores. Returns the
    tables of the claims; ValueError names the runs that failed."""
    out, failed, done = Path(out), [], {}
    runs = list(plan(out, seeds, real_seeds))
    minutes = sum(MINUTES.get(change.get("method"), 5) for _, change in runs) / jobs
    print(f"{len(runs)} runs: {minutes:.0f} minutes with the cpu preset; finished ones are kept")
    flags |= {"preset": preset, "threads": max(1, torch.get_num_threads() // jobs)}

    def one(name, change):
        if "base" in change:
            done[change["base"]].result()  # submitted earlier
        try:
            trained(out / name, **flags | change)
        except ValueError as error:  # it diverged: the others continue without it
            failed.append(str(error))

    with ThreadPoolExecutor(jobs) as pool:
        for name, change in runs:
            done[str(out / name)] = pool.submit(one, name, change)
    for future in done.values():
        future.result()
    judged = write(collect(out), results)
    if failed:
        raise ValueError("; ".join(failed))
    return tables(judged)


def main():
    parser = Parser(description="Train every method from the same base, and judge the claims.")
    parser.add_argument("--out", default="runs/reproduce", help="run folder [runs/reproduce]")
    parser.add_argument("--results", default=Path(__file__).parent, help="for claims.* [here]")
    parser.add_argument("--preset", default="auto", help="as in train.py [auto]")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--data-dir", default="data", help="as in train.py [data]")
    parser.add_argument("--seeds", type=positive, default=5, help="seeds per method [5]")
    parser.add_argument("--real-seeds", type=int, default=3, help="seeds on Fashion-MNIST [3]")
    parser.add_argument("--jobs", type=positive, help="runs at a time [2; on a GPU 1]")
    args = parser.parse_args()
    preset = make_config(preset=args.preset, device=args.device).preset
    jobs, where = args.jobs or (1 if preset == "gpu" else 2), (args.out, args.results)
    flags = {"device": args.device, "data_dir": args.data_dir}
    print(reproduce(*where, preset, args.seeds, args.real_seeds, jobs, **flags))


if __name__ == "__main__":
    command("reproduce.py", main)
