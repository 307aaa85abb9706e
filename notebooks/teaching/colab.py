"""The first cell of a notebook on Colab: fetches this repository and what it needs.

`REPOSITORY` is the one place that holds the address. It is not set yet: set it here, once, to
something that `git clone` accepts, or give it on the command line.

    $ python notebooks/teaching/colab.py                            # prints the cell to paste
    $ python notebooks/teaching/colab.py --repository https://github.com/OWNER/NAME

Tried in a fresh virtual environment that, like Colab, has torch, numpy, pillow, tqdm and matplotlib
but neither tokenizers nor safetensors, with a clone on the same disk as the address. Not tried on
Colab itself.
"""

import argparse
import sys

REPOSITORY = ""  # such as "https://github.com/OWNER/NAME"

CELL = '''\
import importlib.util, os, subprocess, sys

REPOSITORY, FOLDER = "{repository}", os.path.abspath("lvrpo")
if not os.path.isdir(FOLDER):
    subprocess.run(["git", "clone", "-q", "--depth", "1", REPOSITORY, FOLDER], check=True)
NEEDED = {{"torch": "torch", "numpy": "numpy", "pillow": "PIL", "tokenizers": "tokenizers",
          "safetensors": "safetensors", "tqdm": "tqdm", "matplotlib": "matplotlib"}}
missing = [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
os.chdir(os.path.join(FOLDER, "notebooks"))
sys.path.insert(0, os.getcwd())
print("ready; installed:", ", ".join(missing) or "nothing")'''


def first_cell(repository):
    """The text of the cell. ValueError while there is no address."""
    if not repository:
        raise ValueError("no address: set REPOSITORY in this file, or give --repository")
    if not set(repository).isdisjoint('"\\\n'):
        raise ValueError(f"--repository {repository!r}: expected an address without quotes")
    return CELL.format(repository=repository)


def main():
    parser = argparse.ArgumentParser(description="Prints the first cell of a notebook on Colab.")
    parser.add_argument("--repository", default=REPOSITORY, help="what `git clone` accepts")
    try:
        print(first_cell(parser.parse_args().repository))
    except ValueError as error:
        print(f"colab.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
