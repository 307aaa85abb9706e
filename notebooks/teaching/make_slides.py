"""Execute slides.py and write slides.ipynb, with the slides' metadata and nothing else.

    $ python notebooks/teaching/make_slides.py      # half a minute
"""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def main():
    book = jupytext.reads((HERE / "slides.py").read_text(encoding="utf-8"), fmt="py:percent")
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for i, cell in enumerate(book.cells):
        kept = {"slideshow": cell.metadata["slideshow"]} if "slideshow" in cell.metadata else {}
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict(kept)
    nbformat.write(book, HERE / "slides.ipynb")
    size = (HERE / "slides.ipynb").stat().st_size
    print(f"{len(book.cells)} cells, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
