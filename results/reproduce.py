"""The study behind the paper's claims: every method from the same base, seed by seed.

lvrpo trains the base of its seed; the others start there and get the same seconds. Controls (the
same rewards without GRPO, or plain training on clean answers) have fewer seeds. After every seed
claims.py judges the runs that are finished. Given again, the command goes on where it stopped.

    $ python results/reproduce.py --seeds 5      # two cores: 90 minutes
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from claims import BASELINES, CONTROLS, claims, tables
from launch import command, positive, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import Parser
from train import make_config

MINUTES = {"lvrpo": 10, "best_of_n": 3}  # of one core, with the cpu preset; any other method: 5
FEWER = {"cpu": {"eval_items": 512, "eval_prompts": 24}}  # test items of a preset


def reproduce(out, results, preset, seeds=5, control_seeds=3, jobs=2, **flags):
    """Train and measure every method, `jobs` seeds at a time with their share of the cores. Returns
    the tables of the claims; ValueError names the runs that failed."""
    out, failed = Path(out), []
    plan = {seed: ["lvrpo", *BASELINES] for seed in range(seeds)}
    for seed in range(min(seeds, control_seeds)):
        plan[seed] += CONTROLS
    runs = [method for methods in plan.values() for method in methods]
    minutes = sum(MINUTES.get(method, 5) for method in runs) / jobs
    print(f"{len(runs)} runs: {minutes:.0f} minutes with the cpu preset; finished ones are kept")
    flags |= {"threads": max(1, torch.get_num_threads() // jobs)} | FEWER.get(preset, {})

    def one_seed(seed):
        for method in plan[seed]:
            base = {} if method == "lvrpo" else {"base": str(out / f"lvrpo-{seed}")}
            settings = {"preset": preset, "method": method, "seed": seed} | base | flags
            try:
                trained(out / f"{method}-{seed}", **settings)
            except ValueError as error:  # one that diverged: the others go on without it
                failed.append(str(error))

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(one_seed, plan):
            done = claims(out, results)
    if failed:
        raise ValueError("; ".join(failed))
    return tables(done)


def main():
    parser = Parser(description="Train every method from the same base, and judge the claims.")
    parser.add_argument("--out", default="runs/reproduce", help="for the runs [runs/reproduce]")
    parser.add_argument("--results", default=Path(__file__).parent, help="for claims.* [here]")
    parser.add_argument("--preset", default="auto", help="as in train.py [auto]")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--seeds", type=positive, default=5, help="of lvrpo and the baselines [5]")
    parser.add_argument("--control-seeds", type=int, default=3, help="of the controls [3]")
    parser.add_argument("--jobs", type=positive, help="seeds at a time [2; on a GPU 1]")
    args = parser.parse_args()
    preset = make_config(preset=args.preset, device=args.device).preset
    jobs = args.jobs or (1 if preset == "gpu" else 2)
    where = args.out, args.results
    print(reproduce(*where, preset, args.seeds, args.control_seeds, jobs, device=args.device))


if __name__ == "__main__":
    command("reproduce.py", main)
