"""The demo's POPE by one process and by several that share a folder: the same answers, and how long they take.

Each process has a thread of its own (OMP_NUM_THREADS=1), as on a node with a GPU for each. They are started as
`accelerate launch` and `torchrun` start them, by their variables (RANK, WORLD_SIZE), and say nothing to each other but
by the folder of finished pictures. Two times are taken: `asking`, from when all have loaded their model until the last
has all answers, and `whole`, with starting Python and loading. One and several take turns in rounds; ratios are medians
of rounds. Answers are asserted equal to the last bit, and every picture to be answered once.

    python bench/workers.py [--workers 2] [--rounds 3] [--split adversarial]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import mechvlm as mv


def work(folder: Path, split: str, count: int) -> None:
    """One process: load, wait until all have, ask, and keep what was found."""
    number = int(os.environ.get("RANK", "0"))
    vlm = mv.load("demo")
    mv.evaluate.pope(vlm, mv.evaluate.read_pope("demo", split)[:2], out=folder / f"first-{number}")  # what loads once
    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < count:
        time.sleep(0.01)
    start = time.time()
    found = mv.evaluate.pope(vlm, "demo", split=split, out=folder / "answers")
    told = {"start": start, "end": time.time(), "computed": found.attrs["answers_computed"]}
    (folder / f"told-{number}.json").write_text(json.dumps(told))
    np.savez(folder / f"found-{number}.npz", margin=found.margin.values, p_either=found.p_either.values)


def timed(count: int, split: str) -> dict[str, Any]:
    """Start some processes on a folder of their own; seconds, what each answered, and what they found."""
    with tempfile.TemporaryDirectory() as made:
        folder, start = Path(made), time.time()
        running = []
        for number in range(count):
            seat = {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number)} if count > 1 else {}
            words = [sys.executable, __file__, "--folder", made, "--workers", str(count), "--split", split]
            running.append(subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1", **seat}))
        assert not any(process.wait() for process in running), "a process failed"
        whole = time.time() - start
        told = [json.loads((folder / f"told-{number}.json").read_text()) for number in range(count)]
        found = [dict(np.load(folder / f"found-{number}.npz")) for number in range(count)]
        asking = max(one["end"] for one in told) - min(one["start"] for one in told)
        return {"asking": asking, "whole": whole, "computed": [one["computed"] for one in told], "found": found}


def check(one: dict[str, Any], several: dict[str, Any]) -> None:
    """Refuse answers that are not those of one process, to the last bit, or that were made twice."""
    (right,) = one["found"]
    for found in several["found"]:
        assert all(np.array_equal(found[name], right[name]) for name in right), "the answers differ"
    assert sum(several["computed"]) == sum(one["computed"]), "a picture was answered twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--split", default="adversarial")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        work(options.folder, options.split, options.workers)
        return
    ratios: dict[str, list[float]] = {"asking": [], "whole": []}
    print("| round | processes | asking, s | whole, s | answers of each |\n|--:|--:|--:|--:|---|")
    for round_ in range(options.rounds):
        one, several = timed(1, options.split), timed(options.workers, options.split)
        check(one, several)
        for name, found in ratios.items():
            found.append(several[name] / one[name])
        for count, made in ((1, one), (options.workers, several)):
            each = ", ".join(map(str, made["computed"]))
            print(f"| {round_} | {count} | {made['asking']:.1f} | {made['whole']:.1f} | {each} |", flush=True)
    said = ", ".join(f"{name} {statistics.median(found):.2f}" for name, found in ratios.items())
    print(
        f"\ntime of {options.workers} processes over that of one, median of rounds: {said}; answers equal bit for bit"
    )


if __name__ == "__main__":
    main()
