"""What a causal sweep costs: a plain loop of full passes, mechvlm, and TransformerLens's loop, on the same weights.

A random LLaVA, 256 wide with 8 layers, reads 168 positions, 144 of them image tokens, in float32 under SDPA. Each point
overwrites an activation by that of another prompt (other words, another picture) and reads a logit difference. The
plain loop is the Hugging Face model with a torch hook, one forward pass a point; TransformerLens's is `run_with_hooks`
with the picture given, one pass a point, under the eager attention that it takes; both run an evenly spread sample of
the points, and their time is scaled up. All take turns in rounds, so that a machine that slows down slows all; ratios
are medians of rounds, with quartiles. Beside other work on the machine, `--clock cpu` counts the processor's seconds.

In float32 results are asserted equal to the plain loop's, absolutely, to 1e-5, logits having a spread of one. In other
types the largest difference is shown, and how far the plain loop is from itself when each pass has two rows;
`--dtype float32` asserts on any device. What `mv.sweep` does once (the run without the points' edits) is in its time.

The floor is the arithmetic that an exact sweep of full layers cannot avoid (bench/floor.py). Its share is the time that
it would take at the rate of a batched full forward pass, or of one large matrix product, over the time mechvlm took.

    python bench/sweeps.py [--rounds 5] [--sample 0.1] [--threads 1] [--sweeps pre post heads last] [--full]
    python bench/sweeps.py --kinds [llava_next qwen2_5_vl ...]
    python bench/sweeps.py --shape 7b --device cuda --dtype bfloat16 --rounds 1 --sample 0.01 --sweeps pre heads
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from floor import Costs, forward_rate, product_rate, tower_share
from loops import SWEEPS, Setting, lens_loop, ours, plain
from wide import KINDS, SIZES, llava

TOLERANCE = 1e-5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TITLES = {
    "pre": "layers x positions, resid_pre",
    "post": "layers x positions, resid_post",
    "heads": "layers x heads, z at all positions",
    "last": "layers x heads, z at the last position",
}


@dataclass
class Measured:
    """Seconds of each loop in each round, scaled to all points; the largest differences; what the engine said."""

    points: int
    times: dict[str, list[float]]
    gaps: dict[str, float]
    said: str

    def ratio(self, loop: str) -> str:
        """A loop's time over mechvlm's, round by round: the median and the quartiles."""
        ratios = [theirs / own for theirs, own in zip(self.times[loop], self.times["mechvlm"], strict=True)]
        if len(ratios) == 1:
            return f"**{ratios[0]:.2f}** (one round)"
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return f"**{median:.2f}** ({low:.2f} to {high:.2f})"

    def seconds(self, loop: str) -> str:
        """The median of a loop's times."""
        return f"{statistics.median(self.times[loop]):.2f}"

    def differences(self) -> str:
        """From the plain loop: mechvlm's, then that of the others by name."""
        found = [f"{gap:.1e}" + ("" if loop == "mechvlm" else f" ({loop})") for loop, gap in self.gaps.items()]
        return ", ".join(found)


def row(*cells: Any) -> None:
    """A line of a table in markdown."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def sampled(count: int, share: float) -> list[int]:
    """Evenly spread numbers of points, the first and the last among them."""
    some = min(count, max(round(share * count), 16))
    return np.linspace(0, count - 1, some).round().astype(int).tolist()


def measure(at: Setting, name: str, options: argparse.Namespace) -> Measured:
    """A sweep by every loop, in turns; refused where results differ."""
    points = at.points(name)
    chosen = sampled(len(points), options.sample)
    some = [points[number] for number in chosen]
    loops: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(at, name, some),
        "mechvlm": lambda: ours(at, name, options.batch_size),
    }
    if at.lens is not None:
        loops["TransformerLens"] = lambda: lens_loop(at, name, some)
    # What a first pass allocates is nobody's time.
    plain(at, name, some[:2]), ours(at, "last", options.batch_size, layers=1)
    if at.lens is not None:
        lens_loop(at, name, some[:2])
    clock, names = CLOCKS[options.clock], list(loops)
    times: dict[str, list[float]] = {loop: [] for loop in names}
    values: dict[str, Any] = {}
    for turn in range(options.rounds):
        for loop in (names * 2)[turn % len(names) :][: len(names)]:
            start = clock()
            values[loop] = loops[loop]()  # numbers on the CPU, so a GPU has finished
            spent = clock() - start
            times[loop].append(spent if loop == "mechvlm" else spent * len(points) / len(some))
    said = str(values["mechvlm"].attrs.get("engine", ""))
    values["mechvlm"] = values["mechvlm"].values.reshape(-1)[chosen]
    return Measured(len(points), times, compared(at, name, values, partial(plain, at, name, some)), said)


def compared(at: Setting, name: str, values: dict[str, Any], again: Callable) -> dict[str, float]:
    """How far each loop is from the plain one; in float32 refused above the tolerance."""
    assert values["plain"].std() > 1e-3, f"{name}: patches change next to nothing, so agreement would say nothing"
    gaps = {loop: float(np.abs(found - values["plain"]).max()) for loop, found in values.items() if loop != "plain"}
    if not at.exact:
        gaps["plain loop of two rows"] = float(np.abs(again(rows=2) - values["plain"]).max())
        return gaps
    for loop, gap in gaps.items():
        assert gap <= TOLERANCE, f"{name}: {loop} differs from the plain loop by {gap:.1e}"
    return gaps


def describe(at: Setting, costs: Costs, options: argparse.Namespace) -> None:
    """What is run, and how much of a full pass is not the language model."""
    size = SIZES[options.shape]
    millions = sum(weight.numel() for weight in at.hf.parameters()) / 1e6
    width, layers, heads, mlp = size.tower
    print(f"{millions:.1f} M parameters: {size.layers} layers x {size.heads} heads, {size.width} wide, MLP {size.mlp};")
    print(f"tower of {layers} layers x {heads} heads, {width} wide, MLP {mlp}: {tower_share(at, costs):.0%} of a pass")
    print(f"{at.length} positions, {len(at.prompt.image)} of the image; {at.vlm.dtype}, {at.vlm.device}")
    about(options)
    if at.lens is None:
        print("without TransformerLens, which is not installed here or was left out")


def about(options: argparse.Namespace) -> None:
    """How it is measured."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads", end="; ")
    print(
        f"{options.rounds} rounds, {options.clock} clock; other loops on {options.sample:.0%} of the points, 16 or more"
    )


def told(said: dict[str, str]) -> None:
    """What the engine says that it could reuse."""
    print()
    for title, sentence in said.items():
        print(f"{title}: {sentence or 'the engine says nothing'}")


def part_llava(options: argparse.Namespace) -> None:
    """LLaVA, all sweeps asked for, with the share of the floor."""
    at = Setting(llava(options.shape, options.device, options.type), options.lens, options.full, options.stride)
    size = SIZES[options.shape]
    costs = Costs(size.width, size.mlp, size.layers, at.length, size.vocabulary)
    describe(at, costs, options)
    print()
    loops = ["plain", "mechvlm", *(["TransformerLens"] if at.lens is not None else [])]
    others = [loop for loop in loops if loop != "mechvlm"]
    shares = ["share of the floor, at a forward's rate", "at a matrix product's"]
    heads = [*(f"{loop}, s" for loop in loops), *(f"{loop} / mechvlm" for loop in others), *shares]
    row("sweep", "points", *heads, "largest difference")
    row("---", *["--:"] * (len(heads) + 2))
    said, rates = {}, []
    for name in options.sweeps:
        clock = CLOCKS[options.clock]
        rates.append((forward_rate(at, costs, clock), product_rate(at, costs, clock)))
        found = measure(at, name, options)
        rates.append((forward_rate(at, costs, clock), product_rate(at, costs, clock)))
        floor = sum(costs.of(name, point) for point in at.points(name))
        took = statistics.median(found.times["mechvlm"])
        near = [max(pair) for pair in zip(*rates[-2:], strict=True)]
        cells = [*map(found.seconds, loops), *map(found.ratio, others), *(f"{floor / r / took:.1%}" for r in near)]
        row(TITLES[name], found.points, *cells, found.differences())
        said[TITLES[name]] = found.said
    best = [max(column) / 1e9 for column in zip(*rates, strict=True)]
    print(f"\nbatched full forward pass {best[0]:.1f} GFLOP/s, matrix product {best[1]:.1f} GFLOP/s")
    told(said)


def part_kinds(options: argparse.Namespace) -> None:
    """One model of each kind of obstacle: exactness, and what the sweep gains."""
    about(options)
    print()
    shown = ("positions", "sweep", "points", "plain, s", "mechvlm, s", "plain / mechvlm", "largest difference")
    row("model", "obstacle", *shown)
    row("---", "---", "--:", "---", *["--:"] * 5)
    said = {}
    for model in options.kinds or KINDS:
        made = KINDS[model]()
        made.model.to(options.device)
        at = Setting(made, False, options.full, options.stride)
        for name in options.sweeps:
            found = measure(at, name, options)
            times = [found.seconds("plain"), found.seconds("mechvlm"), found.ratio("plain")]
            row(model, made.obstacle, at.length, TITLES[name], found.points, *times, found.differences())
            said[f"{model}, {TITLES[name]}"] = found.said
    told(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES), default="small")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="models of each kind of obstacle instead")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=float, default=0.1, help="share of the points that the other loops run")
    parser.add_argument("--stride", type=int, default=1, help="sweep one position of so many, for a quick look")
    parser.add_argument("--batch-size", type=int, help="of mv.sweep; by default its own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--full", action="store_true", help="a full pass for every row, without the fast engine")
    parser.add_argument("--no-lens", dest="lens", action="store_false", help="leave TransformerLens out")
    options = parser.parse_args()
    if options.kinds is not None and options.dtype != "float32":
        parser.error("--kinds is in float32, in which results are asserted equal")
    torch.set_num_threads(options.threads)
    options.type = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.dtype]
    options.sweeps = options.sweeps or (list(SWEEPS) if options.kinds is None else ["pre", "last"])
    if options.kinds is None:
        part_llava(options)
    else:
        part_kinds(options)


if __name__ == "__main__":
    main()
