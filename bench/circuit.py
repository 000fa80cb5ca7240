"""A circuit of the demo model: what answers whether a red or green thing is there, and how much of that it explains.

Pairs are those of bench/attribution_errors.py. Edges are scored by EAP-IG on the first pairs, and by EAP, and the
circuits of each size tested on the others: faithfulness and completeness with 95 % intervals over pictures, beside
random circuits of as many edges. Then what the circuit of `--shown` edges is made of, how stable it is over halves of
the pairs, and the pairs that it explains least.

    python bench/circuit.py [--find 40] [--test 60] [--sizes 20 40 80 160 320 640] [--controls 5] [--shown 80]
"""

import argparse

import numpy as np
import torch
import transformers
import xarray as xr
from attribution_errors import METRIC, pairs
from tqdm import tqdm

import mechvlm as mv

SCORES = ("eap", "eap-ig")


def said(found: xr.Dataset, name: str, at: int) -> str:
    """A mean with its interval."""
    low, mean, high = (float(found[f"{name}_{end}"][at]) for end in ("low", "mean", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def table(found: xr.Dataset, scored: str) -> None:
    """Faithfulness and completeness by size, in markdown."""
    print(f"\nScored by {scored}; CPR {float(found.cpr_mean):.3f}, CMD {float(found.cmd_mean):.3f}\n")
    print("| edges | nodes | faithfulness | completeness | largest of random circuits | p |\n|--:|--:|---|---|--:|--:|")
    for at in range(found.sizes["circuit"]):
        one = found.isel(circuit=at)
        cells = [int(one.n_edges), int(one.n_nodes), said(found, "faithfulness", at), said(found, "completeness", at)]
        cells += [f"{float(one.random.max()):.2f}", f"{float(one.p_value):.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--find", type=int, default=40)
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 40, 80, 160, 320, 640])
    parser.add_argument("--controls", type=int, default=5)
    parser.add_argument("--shown", type=int, default=80)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    vlm = mv.load("demo")
    every = [both for _, both in zip(range(arguments.find + arguments.test), pairs(vlm), strict=False)]
    find, test = every[: arguments.find], every[arguments.find :]
    print(f"{len(find)} pairs to find it on, {len(test)} to test it; torch {torch.__version__}")
    targets, sources = ([pair[at] for pair in test] for at in (0, 1))
    for method in SCORES:
        scores = [
            mv.edge_attribution(vlm, source=b, target=a, metric=METRIC, method=method, spans="each")
            for a, b in tqdm(find, method)
        ]
        found = mv.circuit_faithfulness(
            vlm, scores, sources, targets, METRIC, sizes=arguments.sizes, controls=arguments.controls
        )
        table(found, method)
        circuit = mv.choose_circuit(scores, arguments.shown)
        number = found.n_edges.values.tolist().index(circuit.n_edges)
        each = found.faithfulness.isel(circuit=number)
        low, middle, high = np.quantile(each, [0.1, 0.5, 0.9])
        print(f"\n{circuit}\nfaithfulness of single pairs, 10 %, half, 90 %: {low:.2f}, {middle:.2f}, {high:.2f}")
        print("\n".join(f"  {edge} {edge.score:.2f}" for edge in circuit.edges[:25]))
        for at in np.argsort(each.values)[:3]:
            print(f"  explained least: {targets[at].words!r} {float(each[at]):.2f}")
        halves = mv.circuit_stability(lambda some: mv.choose_circuit(some, arguments.shown), scores, splits=20)
        for of in halves.of.values:
            one = halves.sel(of=of)
            print(f"  halves share of {of}: {float(one['mean']):.2f} [{float(one.low):.2f}, {float(one.high):.2f}]")


if __name__ == "__main__":
    main()
