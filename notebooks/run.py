"""Execute the notebooks from their py:percent twins, each in a clean kernel, and write the .ipynb.

    python notebooks/run.py             # all of them; prints the seconds and the size of each
    python notebooks/run.py 03 06       # some
"""

import os
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
    """The notebook of a twin, with the outputs of a clean kernel that starts in this folder; raises
    where a cell does."""
    book = jupytext.reads(twin.read_text(encoding="utf-8"), fmt="py:percent")
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    options = dict(timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}})
    # coalesced: else a slow kernel would cut what one cell prints into pieces
    NotebookClient(book, coalesce_streams=True, **options).execute()
    return tidied(book)


def tidied(book):
    """Without anything that differs from run to run, or from machine to machine, for no reason."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python"}
    book.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": language})
    for i, cell in enumerate(book.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
    return book


def main(numbers):
    for twin in (t for t in TWINS if not numbers or t.name[:2] in numbers):
        start, path = time.perf_counter(), twin.with_suffix(".ipynb")
        nbformat.write(executed(twin), path)
        size, seconds = path.stat().st_size, time.perf_counter() - start
        print(f"{twin.stem:20}{seconds:6.0f} s{size / 1000:8.0f} kB", flush=True)
        if size > LIMIT:
            sys.exit(f"{path.name} has {size} bytes, more than {LIMIT}: fewer or smaller figures")


if __name__ == "__main__":
    main([name[:2] for name in sys.argv[1:]])
