"""Executes every tutorial from top to bottom in a fresh kernel and fails at the first cell that raises.

What a notebook prints is not compared: it may differ between machines. Each notebook stays paired with its `.py`
script, which is what reviews read; a notebook whose cells differ from its script's fails as well.

    python tutorials/run.py                     # check all of them
    python tutorials/run.py --write 2           # execute those whose name begins with 2, and keep the new outputs
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
SECONDS_PER_CELL = 300


def unpaired(path: Path) -> str | None:
    """What is wrong between a notebook and its script, or None if they hold the same cells."""
    script = path.with_suffix(".py")
    if not script.exists():
        return f"{path.name} has no script beside it; make one with `jupytext --sync {path.name}`."
    pairs = [[(c.cell_type, c.source.strip()) for c in jupytext.read(file).cells] for file in (path, script)]
    if pairs[0] != pairs[1]:
        return f"{path.name} and {script.name} differ; bring them together with `jupytext --sync {path.name}`."
    return None


def execute(path: Path, write: bool) -> str | None:
    """Runs one notebook. Returns what went wrong, or None."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": HERE}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{path.name}: {error}"
    if write:
        nbformat.write(notebook, path)
    return None


def main() -> int:
    """Checks or rewrites the tutorials asked for; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("beginnings", nargs="*", default=[""], help="only notebooks whose names begin so")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    wanted = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # tutorials run on the model that comes with the package
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no bars among the outputs
    if wanted.write:
        os.environ["PLOTLY_RENDERER"] = "png"  # pictures that any reader shows; takes kaleido and a Chrome or Chromium
    paths = [p for p in sorted(HERE.glob("*.ipynb")) if p.name.startswith(tuple(wanted.beginnings))]

    def run(path: Path) -> bool:
        start = time.perf_counter()
        wrong = unpaired(path) or execute(path, wanted.write)
        print(wrong or f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
        return wrong is not None

    # Two at a time, a thread each, where nothing is kept; the later ones take longest, and so come first.
    side_by_side = 1 if wanted.write else 2
    if side_by_side > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(side_by_side) as pool:
        failures = sum(pool.map(run, paths[::-1]))
    print(f"{len(paths)} notebooks, {failures} failed")
    return failures


if __name__ == "__main__":
    sys.exit(main())
