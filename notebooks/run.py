"""Executes the notebooks from their py:percent twins, each in a clean kernel, and writes the .ipynb files with outputs.

    python notebooks/run.py             # all of them; prints the minutes and the size of each
    python notebooks/run.py 03 05       # some
"""

import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TWINS = sorted(HERE.glob("[0-9][0-9]_*.py"))
LIMIT = 300_000  # bytes of one executed notebook


def executed(twin):
    """The notebook of a twin with the outputs of a clean kernel that starts in this folder; raises where a cell does."""
    book = jupytext.reads(twin.read_text(encoding="utf-8"), fmt="py:percent")
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    # coalesced: a slow kernel would else cut what one cell prints into pieces
    NotebookClient(book, timeout=600, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(HERE)}}).execute()
    return tidied(book)


def tidied(book):
    """Without anything that differs from run to run, or from machine to machine, for no reason."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for i, cell in enumerate(book.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
    return book


def main(names):
    for twin in (t for t in TWINS if not names or t.name[:2] in names):
        start = time.perf_counter()
        path = twin.with_suffix(".ipynb")
        nbformat.write(executed(twin), path)
        size = path.stat().st_size
        print(f"{twin.stem:20}{(time.perf_counter() - start) / 60:6.2f} min{size / 1000:8.0f} kB", flush=True)
        if size > LIMIT:
            sys.exit(f"{path.name} has {size} bytes, more than {LIMIT}: fewer or smaller figures")


if __name__ == "__main__":
    main([re.sub(r"\D", "", name) for name in sys.argv[1:]])
