"""What jobs on a server cost: how many there are, bytes sent and brought back, and the time against the same call here.

A server on this machine runs random LLaVAs in an environment without mechvlm (`tests/loopback`); what is asked of them
is a run that reads a layer's residual stream and pattern, an attention profile of 20 prompts, and the ablation of every
head. Bytes are as they travel, compressed. Models have 2, 8 and 32 layers, and 8 layers of four times the width, which
have sixteen times the weights. The time is the median of some rounds after a first one, whose jobs also check versions.

    python bench/remote.py [--rounds 3] [--layers 2 8 32] [--widths 32 128] [--prompts 20]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

import loopback  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import xarray as xr  # noqa: E402

import mechvlm as mv  # noqa: E402

METRIC = mv.logit_difference("yes", "no")
QUESTION = "is there a red dog in the image ?"


def calls(prompts: int) -> dict[str, Callable[[mv.VLM], Any]]:
    """What is asked, by what it is called."""

    def run(vlm: mv.VLM) -> Any:
        return vlm.run(vlm.prompt(tiny.picture(), QUESTION), ["text.1.resid_post", "text.1.pattern"])

    def profile(vlm: mv.VLM) -> Any:
        return mv.attention_profile(vlm, [vlm.prompt(tiny.picture(number), QUESTION) for number in range(prompts)])

    def heads(vlm: mv.VLM) -> Any:
        return mv.ablate_each_head(vlm, vlm.prompt(tiny.picture(), QUESTION), METRIC)

    return {"a run": run, f"a profile of {prompts} prompts": profile, "a sweep over heads": heads}


def check_equal(one: Any, other: Any) -> None:
    """Assert that a call gives the same here and there, to 1e-6 of the largest number, or of 1."""
    if isinstance(one, xr.Dataset):
        pairs = [(one[name], other[name]) for name in one.data_vars if one[name].dtype.kind == "f"]
    else:
        pairs = [(one, other) if isinstance(one, xr.DataArray) else (one.logits, other.logits)]
    for here, there in pairs:
        largest = max(1.0, float(np.nanmax(np.abs(np.asarray(here)))))
        np.testing.assert_allclose(np.asarray(there), np.asarray(here), rtol=0, atol=1e-6 * largest)


def seconds(call: Callable[[mv.VLM], Any], vlm: mv.VLM, rounds: int) -> float:
    """The median time of a call, the first one aside."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call(vlm)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(server: loopback.Server, layers: int, width: int, rounds: int, prompts: int) -> None:
    """A row for each call of one model."""
    here = tiny.vlm(layers=layers, width=width)
    folder = server.deploy(here.hf, here.processor, name=f"{layers}-{width}")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    modules = len(list(here.hf.modules()))
    for name, call in calls(prompts).items():
        there = mv.load(str(folder), remote=server.url)
        check_equal(call(here), call(there))
        traffic = mv.remote.traffic(there)
        own, sent = seconds(call, here, rounds), seconds(call, there, rounds)
        size = f"{layers} | {width} | {weights / 1e6:.2f} | {modules}"
        bytes_of = f"{len(traffic)} | {traffic.sent.sum() / 1e3:.1f} | {traffic.back.sum() / 1e3:.1f}"
        print(f"| {size} | {name} | {bytes_of} | {own:.3f} | {sent:.3f} |", flush=True)


def main() -> None:
    """Measure what was asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--prompts", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(layers, asked.widths[0]) for layers in asked.layers]
    sizes += [(asked.layers[len(asked.layers) // 2], width) for width in asked.widths[1:]]
    print("| layers | width | weights, MB | modules | call | jobs | sent, kB | back, kB | s, here | s, there |")
    print("|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as jobs, loopback.serve() as server:
        os.environ["MECHVLM_JOBS"] = jobs
        for layers, width in sizes:
            measure(server, layers, width, asked.rounds, asked.prompts)


if __name__ == "__main__":
    main()
