"""Recompute every verdict and interval of the study from the committed outcomes.

outcomes.json.gz has the numbers of every seed, which decide, and the outcome of every test item,
whose means must equal those numbers. Judges by rule.md, as claims.py does, and compares with
claims.json and claims.md. Prints the tables; status 1 if they differ.

    $ python results/recompute.py      # 5 seconds
"""

import json
import sys
from pathlib import Path

from claims import claims, load_outcomes, tables
from launch import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import Parser


def recompute(results):
    """(the tables, the names of the committed files that differ from them)."""
    results = Path(results)
    outcomes = load_outcomes(results / "outcomes.json.gz")
    done = claims(outcomes)
    text, differ = tables(done), []
    for method, by_seed in outcomes["runs"].items():
        for seed, run in by_seed.items():
            for metric, items in run["items"].items():
                if abs(sum(items) / len(items) - run["numbers"][metric]) > 1e-4:
                    differ.append(f"{method} {seed} {metric}")
    if json.loads((results / "claims.json").read_text(encoding="utf-8")) != done:
        differ.append("claims.json")
    if (results / "claims.md").read_text(encoding="utf-8") != text:
        differ.append("claims.md")
    return text, differ


def main():
    parser = Parser(description="Judge the committed outcomes again.")
    parser.add_argument("--results", default=Path(__file__).parent, help="their folder [here]")
    text, differ = recompute(parser.parse_args().results)
    print(text)
    print(f"differs: {', '.join(differ)}" if differ else "the committed tables come out of it")
    sys.exit(bool(differ))


if __name__ == "__main__":
    command("recompute.py", main)
