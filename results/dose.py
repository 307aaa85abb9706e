"""How one could build a world in which a method wins: doses of noise in pre-training's answers.

For each dose, a base learns from answers of which that share is wrong, spread evenly over the other
words of their kind. Then run lvrpo, and unified twice: with the same clean answers that GRPO's
reward knows (as in the study), and without them. From 0.5 on, the likeliest answer to a yes/no
question is wrong; from 0.75 on, to any question. Only questions: tasks vqa, multihop, text.

Writes dose.json and dose.png, and prints a table. Run it again to continue where it stopped.

    $ python results/dose.py      # two cores: an hour
"""

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch import command, positive
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import train
from eval import Parser, over_seeds, read_result

DOSES = (0.0, 0.3, 0.45, 0.55, 0.7)
METHODS = {  # name: the method, and the share of GRPO's answers in its rows (train.SHOWN)
    "lvrpo": ("lvrpo", 0.5),
    "unified": ("unified", 0.5),
    "unified, no keys": ("unified", 0.0),
}
METRICS = ("vqa", "vqa_three", "multihop", "multihop_three")


def one(out, dose, name, seed, preset):
    """Train and measure one method at one dose, in a process of its own."""
    folder, base = Path(out) / f"{name}-{dose}-{seed}", Path(out) / f"lvrpo-{dose}-{seed}"
    if (folder / "eval.json").is_file():
        return
    method, train.SHOWN = METHODS[name]
    data.NOISE["answer"] = dose
    flags = {"preset": preset, "method": method, "seed": seed, "threads": 1, "out": str(folder)}
    flags |= {"tasks": "vqa,multihop,text"} | ({"base": str(base)} if name != "lvrpo" else {})
    resume = (folder / "config.json").is_file()
    train.main(train.resumed(flags | {"resume": True}) if resume else train.make_config(**flags))


def of_one_seed(out, dose, seed, preset):
    """Train lvrpo, including the base, then the others. ValueError if one fails."""
    for name in METHODS:
        process = multiprocessing.get_context("spawn").Process(
            target=one, args=(out, dose, name, seed, preset))
        process.start()
        process.join()
        if process.exitcode:
            raise ValueError(f"{name} with dose {dose} and seed {seed} failed, see above")


def collected(out, seeds):
    """{dose: {metric: {base or method: its value with each seed}}} of finished runs."""
    values = {}
    for dose in DOSES:
        runs = {name: [read_result(Path(out) / f"{name}-{dose}-{seed}") for seed in range(seeds)]
                for name in METHODS}
        values[str(dose)] = rows = {}
        for metric in METRICS:
            group = "understanding" if metric.startswith("vqa") else "reasoning"
            rows[metric] = {"base": [r["base"][group][metric]["value"] for r in runs["lvrpo"]]}
            for name, results in runs.items():
                rows[metric][name] = [r["aligned"][group][metric]["value"] for r in results]
    return values


def less(row, name):
    """lvrpo minus another method, seed by seed."""
    return [round(a - b, 4) for a, b in zip(row["lvrpo"], row[name], strict=True)]


def table(values):
    """Markdown: a line per dose and metric; base, methods, and lvrpo minus unified."""
    head = ["wrong answers", "metric", "base", *METHODS, "lvrpo − unified", "lvrpo − no keys"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for dose, rows in values.items():
        for metric, row in rows.items():
            columns = [*row.values(), *(less(row, name) for name in list(METHODS)[1:])]
            cells = [f"{float(dose):.0%}", f"`{metric}`", *map(over_seeds, columns)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(values, path):
    """The differences over the dose, a panel per metric: means and each seed."""
    chosen = ("vqa", "multihop")
    image = Figure(figsize=(8, 3), layout="constrained")
    axes = image.subplots(1, len(chosen), sharey=True)
    for ax, metric in zip(axes, chosen):
        for name, color in zip(list(METHODS)[1:], ("#2b6cb0", "#c05621")):
            label = "the same answer keys" if name == "unified" else "no keys for unified"
            rows = {float(dose): less(row[metric], name) for dose, row in values.items()}
            ax.plot(list(rows), [sum(v) / len(v) for v in rows.values()], color=color, label=label)
            for dose, seeds in rows.items():
                ax.plot([dose] * len(seeds), seeds, "o", color=color, markersize=3)
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set(title=metric, xlabel="share of wrong answers in pre-training")
    axes[0].set_ylabel("lvrpo − unified, share right")
    axes[0].legend()
    image.savefig(path, dpi=110)


def main():
    parser = Parser(description="The noise of pre-training's answers, in doses.")
    parser.add_argument("--out", default="runs/dose", help="folder for the runs [runs/dose]")
    parser.add_argument("--results", default=Path(__file__).parent, help="for dose.* [here]")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds per dose [3]")
    parser.add_argument("--jobs", type=positive, default=2, help="runs at a time [2]")
    parser.add_argument("--preset", default="cpu", help="as in train.py [cpu]")
    args = parser.parse_args()
    plan = [(args.out, dose, seed, args.preset) for seed in range(args.seeds) for dose in DOSES]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(of_one_seed, *zip(*plan)))
    values, results = collected(args.out, args.seeds), Path(args.results)
    train.write_json(results / "dose.json", values)
    figure(values, results / "dose.png")
    print(table(values))


if __name__ == "__main__":
    command("dose.py", main)
