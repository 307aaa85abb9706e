"""A finished run on one page: is it healthy, what did it learn, how did it get there?

Writes RUN/curves.png from metrics.csv, and RUN/report.html, which needs no other file and no
network: health checks with advice, the same prompts before and after, numbers with intervals,
fronts of quality against diversity, curves, configuration.

    $ python results/report.py runs/lvrpo-cpu-0      # 5 seconds
"""

import base64
import html
import io
import json
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import Parser, by_source, read_result, run_command, tables
from model import atomically
from train import read_log

# ---------------------------------------------------------------- health: can the run be trusted?

ADVICE = {  # of each check: what to do if it is not good
    "reward and judge": "stop earlier, raise --kl-coef or --ptx-coef, or fix the reward",
    "diversity": "stop earlier, or raise --kl-coef, --ptx-coef or --temperature",
    "spread": "raise --group-size or --temperature, or train the base for longer",
    "KL": "raise --kl-coef or lower --grpo-lr: far from the base a reward means less",
    "entropy": "raise --kl-coef or lower --grpo-lr: without entropy nothing is explored",
    "clipping": "take fewer --epochs or a lower --grpo-lr",
    "skipped steps": "lower the learning rate of that stage",
    "reward": "give it more --clip-steps before it is optimised",
}


def mark(look, act=False):
    return "act" if act else "look" if look else "good"


def values_of(rows, column):
    """The values in a column of metrics.csv, without empty cells."""
    return [float(row[column]) for row in rows if row.get(column)]


def ends(rows, column, share=0.1):
    """Means of the first and of the last share of a column; None without values."""
    values = values_of(rows, column)
    n = max(1, round(share * len(values)))
    return (float(np.mean(values[:n])), float(np.mean(values[-n:]))) if values else None


def by_task(rows, prefix):
    """{task: mean over the last quarter of the steps} of the columns PREFIX_TASK."""
    columns = [c for c in (rows[0] if rows else ()) if c.startswith(prefix) and values_of(rows, c)]
    return {c.removeprefix(prefix): ends(rows, c, 0.25)[1] for c in columns}


def health(log, validity):
    """[(check, "good", "look" or "act", what it found)] in the rows of metrics.csv and in
    reward_validity_aligned.json. The limits are rules of thumb."""
    rows, checks = [row for row in log if row["stage"] == "align"], []
    reward, judge, distinct, entropy = (ends(rows, column) for column in (
        "reward_draw", "val_compose", "val_diversity_compose", "entropy_draw"))
    prefixes = "zero_spread_", "kl_", "clip_low_", "clip_high_"
    idle, kl, low, high = (by_task(rows, prefix) for prefix in prefixes)
    moved = "reward of drawings {:.2f} to {:.2f}, ".format(*reward) if reward else ""
    if reward and judge:
        text = moved + "right by the judge {:.2f} to {:.2f}".format(*judge)
        hacked = reward[1] > reward[0] and judge[1] < judge[0] - 0.1
        checks.append(("reward and judge", mark(False, hacked), text + ": hacked" * hacked))
    if reward and distinct:
        text = moved + "distinct of the right ones {:.2f} to {:.2f}".format(*distinct)
        dull = reward[1] > reward[0] and distinct[1] < 0.6 * distinct[0]
        checks.append(("diversity", mark(False, dull), text + ": collapsing" * dull))
    if idle:
        shares = ", ".join(f"{task} {share:.0%}" for task, share in idle.items())
        text = f"uninformative groups (equal rewards) in the last quarter: {shares}"
        checks.append(("spread", mark(max(idle.values()) > 0.9), text))
    if kl:
        far = max(kl, key=kl.get)
        text = f"{kl[far]:.2g} nats per token from the base in the last quarter, furthest in {far}"
        checks.append(("KL", mark(kl[far] > 0.5, kl[far] > 2), text))
    if entropy:
        text = "of drawings {:.2f} to {:.2f} nats per token".format(*entropy)
        limits = (entropy[1] < share * entropy[0] for share in (0.5, 0.2))
        checks.append(("entropy", mark(*limits), text))
    if low and high:
        share = max(low[task] + high[task] for task in low)
        text = f"{share:.0%} of the ratios are outside the clip range, in the task with most"
        checks.append(("clipping", mark(share > 0.2, share > 0.4), text))
    skipped = {row["stage"]: float(row["skipped"]) for row in log}  # a count: the last row has all
    where = " ".join(f"{stage} {n:.0f}" for stage, n in skipped.items() if n) or "none"
    checks.append(("skipped steps", mark(where != "none"), f"gradients not finite: {where}"))
    for fault, share in validity.items():
        if len(fault.split()) == 3 and share < 0.85:  # source, pool, kind of fault
            text = f"sees only {share:.0%} of the faults of the aligned model's drawings: {fault}"
            checks.append(("reward", "look", text))
    return checks


# ---------------------------------------------------------------- curves

Panel = namedtuple("Panel", "title unit stages prefixes log zero", defaults=(False, ""))
NETWORKS, ALIGN = ("clip", "clip_report", "preference"), ("align",)
PANELS = (
    Panel("next-token loss", "nats a token", ("pretrain", "align"), ("loss", "nll"), True),
    Panel("loss of the reward's networks", "nats a pair", NETWORKS, ("loss",), True),
    Panel("the reward's networks, in training", "share right", NETWORKS, ("r1", "accuracy")),
    Panel("reward of pictures and captions", "nats", ALIGN, ("reward_d", "reward_c", "reward_s")),
    Panel("reward of answers", "points: key 1, form 0.2", ALIGN, ("reward_v", "reward_m")),
    Panel("judge, validation prompts", "share right, share distinct", ALIGN, ("val_",)),
    Panel("groups of equal rewards", "share of groups", ALIGN, ("zero_spread_",),
          zero="every group had different rewards"),
    Panel("exact KL to the base", "nats a token", ALIGN, ("kl_",),
          zero="the policy never left the base: is anything learned?"),
    Panel("entropy", "nats a token", ALIGN, ("entropy_",), zero="every choice was certain"),
    Panel("ratios outside the clip range", "share of tokens", ALIGN, ("clip_low_", "clip_high_"),
          zero="with one pass over each rollout every ratio is 1"),
    Panel("gradient before clipping", "norm", ALIGN, ("grad_norm",), True,
          zero="no gradient: nothing was learned"),
)  # fmt: skip


def lines_of(log, panel):
    """[(label, steps, values)] of a panel's curves, smoothed; without those that are always 0, and
    without the loss of alignment by rewards, which is no next-token loss (nll is)."""
    lines = []
    for stage in panel.stages:
        rows = [row for row in log if row["stage"] == stage]
        for column in [c for c in (rows[0] if rows else ()) if c.startswith(panel.prefixes)]:
            values, steps = values_of(rows, column), [int(r["step"]) for r in rows if r[column]]
            if any(values) and not (column == "loss" and by_task(rows, "reward_")):
                width = max(1, len(values) // 40)
                edges = np.pad(values, (width // 2, (width - 1) // 2), "edge")
                label = column if len(panel.stages) == 1 else f"{stage} {column}"
                lines.append((label, steps, np.convolve(edges, np.ones(width) / width, "valid")))
    return lines


def all_zero(log, panel):
    """Do a panel's columns have values, and are all of them 0?"""
    rows = [row for row in log if row["stage"] in panel.stages]
    columns = [c for c in (rows[0] if rows else ()) if c.startswith(panel.prefixes)]
    values = [value for column in columns for value in values_of(rows, column)]
    return bool(values) and not any(values)


def figure_of(n, columns):
    """A figure and its n axes."""
    rows = -(-n // columns)
    figure = Figure(figsize=(5 * columns, 3.3 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


class Plain(LogFormatter):
    """Labels of a logarithmic axis as 0.3 and 20, not as powers of ten."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def curves(log, path):
    """One panel per question that the run has data for; no file if it has none. Instead of curves
    that are flat at 0, a panel says what that means."""
    panels = [(panel, lines_of(log, panel)) for panel in PANELS]
    panels = [(panel, lines) for panel, lines in panels if lines or all_zero(log, panel)]
    figure, axes = figure_of(len(panels), 3)
    for ax, (panel, lines) in zip(axes, panels):
        stage = "alignment" if panel.stages == ALIGN else "its stage"
        ax.set(title=panel.title, xlabel=f"step of {stage}", ylabel=panel.unit)
        for label, steps, values in lines:
            ax.plot(steps, values, label=label, marker="o" if len(steps) < 12 else None)
        if lines:
            ax.set_yscale("log" if panel.log else "linear")
            ax.legend(fontsize=7)
        else:
            words = f"0 at all steps:\n{panel.zero or 'nothing was measured'}"
            ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes)
            ax.set(xticks=(), yticks=())
        if lines and panel.log:
            ax.yaxis.set_major_formatter(Plain())
            ax.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
    if panels:
        figure.savefig(path, dpi=80)


def fronts(sweep):
    """Quality against diversity, one point per temperature, as the bytes of a .png file."""
    kinds = [k for k in ("", "_heldout") if f"compose{k}" in sweep["base"][0]]
    figure, axes = figure_of(len(kinds), 2)
    for ax, kind in zip(axes, kinds):
        for model, rows in sweep.items():
            rows = [row for row in rows if row[f"diversity{kind}"] is not None]  # two right ones
            x, y = ([row[m + kind] for row in rows] for m in ("diversity", "compose"))
            ax.plot(x, y, marker="o", label=model)
            for row, *place in zip(rows, x, y):
                ax.annotate(f"T={row['temperature']}", place, fontsize=6)
        ax.set(title="three objects" if kind else "common prompts", ylabel="right (share)")
        ax.set_xlabel("distinct of the right ones (share)")
        ax.legend()
    figure.savefig(file := io.BytesIO(), dpi=80)
    return file.getvalue()


# ---------------------------------------------------------------- the page

STYLE = """body{font:16px/1.5 system-ui;color:#1f2328;max-width:70rem;margin:auto;padding:1rem}
h2{font-size:1.15rem;border-bottom:1px solid #d1d9e0}ul{list-style:none;padding:0}li{margin:.6rem}
img{max-width:100%}pre{overflow-x:auto}.note{color:#59636e}.mark{color:#fff;padding:.1rem .6rem}
.good{background:#1a7f37}.look{background:#9a6700}.act{background:#cf222e}"""


def picture(data, name):
    """A .png file, embedded in the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{name}">'


def page(folder, log):
    """The page as text. ValueError if the run is not finished."""
    result, say, pictures = read_result(folder), html.escape, []
    meta, path = result["meta"], folder / "reward_validity_aligned.json"
    for file in (folder / "samples" / "before_after.png", folder / "curves.png"):
        pictures.append(picture(file.read_bytes(), file.name) if file.is_file() else "none")
    title = say(f"{meta['method']}, seed {meta['seed']}, {meta['data']}, {meta['preset']} preset")
    checks, validity = "", json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name, word, text in health(log, validity):
        advice = f'<div class="note">→ {ADVICE[name]}</div>' * (word != "good")
        checks += f'<li><b class="mark {word}">{word}</b> <b>{name}</b>: {say(text)}{advice}\n'
    swept = {name: part["sweep"] for name, part in by_source(result).items() if part["sweep"]}
    front = "".join(f"<p>{say(name)}{picture(fronts(s), 'front')}" for name, s in swept.items())
    facts = [f"{k}: {meta[k]}" for k in ("command", "commit", "machine", "versions", "seconds")]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>{STYLE}</style><h1>{title}</h1><h2>Health</h2><ul>{checks}</ul><h2>Before and after</h2>
<p class="note">The same prompts and noise; green frames are right by the judge.</p>{pictures[0]}
<h2>Test scenes</h2><pre>{say(tables(result))}</pre><h2>Quality against diversity</h2>{front}
<h2>Curves</h2>{pictures[1]}<h2>Run</h2><pre>{say(chr(10).join(facts))}</pre>
<h2>Configuration</h2><pre>{say(json.dumps(meta["config"], indent=1))}</pre></html>
"""


def main():
    parser = Parser(description="Writes RUN/report.html and RUN/curves.png of a finished run.")
    parser.add_argument("run", metavar="RUN", type=Path)
    folder = parser.parse_args().run
    log = read_log(folder / "metrics.csv")
    curves(log, folder / "curves.png")
    with atomically(folder / "report.html") as new:
        new.write_text(page(folder, log), encoding="utf-8")
    print(folder / "report.html")


if __name__ == "__main__":
    run_command("report.py", main)
