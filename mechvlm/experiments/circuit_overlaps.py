"""Do two circuits share more than chance would have them share, and is a circuit found again?

Rule this module guards: what two circuits have in common is said beside what two random ones of the same sizes have.

>>> one, other = (Circuit(chosen=names, candidates=(0, 72, 64)) for names in (["a1.h2", "m3"], ["a1.h2", "a2.h5"]))
>>> float(circuit_overlap(one, other).overlap.sel(of="nodes").round(2))
0.33
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.circuit_value import Circuit
from mechvlm.sites import listed, told, whole

PLACE = {"nodes": 1, "heads": 2, "edges": 0}
"""What two circuits may have in common, and where a circuit says how many there were to choose from."""


def circuit_overlap(one: Circuit, other: Circuit) -> xr.Dataset:
    """How much two circuits of one model have in common: nodes, heads, and edges.

    Nodes are heads and MLPs; what enters and the logits are in any circuit.

    Args:
        one, other: for instance of the same question about other pictures, or of colour and digit. Edges are the same
            where they are at the same span.

    Returns:
        Over axis of ("nodes", "heads", "edges"): `shared`, how many both have; `count`, over axis circuit too, how
        many each has; `overlap`, the shared ones divided by all that either has; `share`, over axis circuit, the
        shared ones divided by the circuit's own. `expected`, how many two random circuits of the same sizes would
        share, and `p_value`, how often they would share as many or more: not numbers where it is not known how many
        there are to choose from. Edges are not numbers for circuits of nodes.

    Raises:
        TypeError: for what are no circuits.
        ValueError: for all edges but some, circuits of layers with other numbers of heads, or circuits chosen from
            other numbers of edges or nodes.

    Example:
        >>> digit = mv.Circuit(chosen=["a1.h2", "a3.h7", "m3"])
        >>> colour = mv.Circuit(chosen=["a1.h2", "a4.h1", "m3"])
        >>> mv.circuit_overlap(digit, colour).share.sel(of="heads").values
        array([0.5, 0.5])

    Source:
        Merullo et al. (2024), "Circuit Component Reuse Across Tasks in Transformer Language Models", section 4, for the
        share; the chance level is the hypergeometric distribution's.
    """
    both = [_circuit(one), _circuit(other)]
    heads = [(circuit.heads, circuit.kv_heads) for circuit in both if circuit.heads]
    if len(set(heads)) > 1:
        raise ValueError(
            f"one circuit's layers have {heads[0][0]} heads and {heads[0][1]} key-value heads and the other's "
            f"{heads[1][0]} and {heads[1][1]}, so they are not of one model; compare circuits of one."
        )
    rows: dict[str, list[Any]] = {name: [] for name in ("shared", "overlap", "expected", "p_value", "count", "share")}
    for of in PLACE:
        mine, theirs = (_parts(circuit, of) for circuit in both)
        total = _total(of, *(circuit.candidates[PLACE[of]] for circuit in both))
        known = of != "edges" or not any(circuit.chosen for circuit in both)
        row = (
            _common(mine, theirs, total)
            if known
            else dict.fromkeys(("shared", "overlap", "expected", "p_value"), np.nan)
        )
        for name, value in row.items():
            rows[name].append(value)
        sizes = [len(mine), len(theirs)] if known else [np.nan, np.nan]
        rows["count"].append(sizes)
        rows["share"].append([row["shared"] / size if size else np.nan for size in sizes])
    said = {"expected": "shared by two random circuits", "p_value": "share of random circuits that share as many"}
    values = {
        name: (
            ["of"] if name not in ("count", "share") else ["of", "circuit"],
            held,
            {"long_name": said.get(name, name)},
        )
        for name, held in rows.items()
    }
    notes = {f"circuit_{at}": repr(circuit) for at, circuit in enumerate(both)}
    return xr.Dataset(values, coords={"of": list(PLACE), "circuit": [0, 1]}, attrs=notes)


def circuit_stability(
    make: Callable[[Any], Circuit],
    examples: Sequence[Any] | None = None,
    seeds: Sequence[int] | None = None,
    splits: int = 20,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Is the circuit found again, from other examples or with another seed?

    Args:
        make: from a list of examples, or a seed, to a circuit; for instance
            `lambda scores: mv.choose_circuit(scores, 50)` of scores of several pairs.
        examples: divided into two random halves, `splits` times; what the two halves give is compared.
        seeds: instead of examples; each is given to `make`, and any two circuits are compared.
        clusters: what each example belongs to, such as its picture; a cluster is in one half.
        seed: of the divisions.

    Returns:
        What `circuit_overlap` finds, over axis split (or pair, of seeds) too; and `mean`, `low` and `high` of the
        overlap, over axis of: the mean over splits, and from where to where 95 % of them lie. That is how much
        halves differ, and no confidence interval, since divisions of the same examples are not independent.

    Raises:
        ValueError: for both or neither of examples and seeds, or too few of either.
        TypeError: for what is no function.

    Example:
        >>> scores = mv.attribution_patching(vlm, null, real, yes, kinds=["z"], positions="span")
        >>> found = mv.circuit_stability(lambda some: mv.choose_circuit(some, 5), [scores, scores], splits=2)
        >>> float(found["mean"].sel(of="heads"))
        1.0
    """
    if not callable(make):
        raise TypeError(
            f"make={told(make)} is no function; write for instance lambda scores: mv.choose_circuit(scores, 50)."
        )
    if (examples is None) == (seeds is None):
        raise ValueError("examples and seeds were both given, or neither; give one of the two.")
    if seeds is not None:
        drawn = listed(seeds) or ()
        if len(drawn) < 2:
            raise ValueError(f"seeds={told(seeds)} make {len(drawn)} circuits to compare; give at least 2.")
        circuits = [make(one) for one in drawn]
        found, dim = [circuit_overlap(*pair) for pair in combinations(circuits, 2)], "pair"
    else:
        held = listed(examples) or ()
        halves = _halves(len(held), clusters, whole("splits", splits), whole("seed", seed))
        found, dim = [circuit_overlap(*(make([held[at] for at in half]) for half in pair)) for pair in halves], "split"
    every = xr.concat(found, xr.DataArray(np.arange(len(found)), dims=dim, name=dim), combine_attrs="drop")
    ends = every.overlap.quantile([0.025, 0.975], dim, skipna=False)
    every["mean"] = every.overlap.mean(dim, skipna=False)
    every["low"], every["high"] = ends.isel(quantile=0, drop=True), ends.isel(quantile=1, drop=True)
    for name, said in (("mean", "mean overlap"), ("low", "overlap, low end"), ("high", "overlap, high end")):
        every[name].attrs = {"long_name": said}
    return every.assign_attrs(compared=f"{len(found)} {dim}s", interval=f"95 % of {dim}s")


def _circuit(given: Any) -> Circuit:
    if not isinstance(given, Circuit):
        raise TypeError(f"{told(given)} is no circuit; make it with mv.Circuit or mv.choose_circuit.")
    if given.inverted:
        raise ValueError("all edges but some have no list to compare; give the circuit itself.")
    return given


def _parts(circuit: Circuit, of: str) -> set[Any]:
    """What of a circuit is compared."""
    if of == "edges":
        return set(circuit.edges)
    return set(circuit.of_kind("attention", *(("mlp",) if of == "nodes" else ())))


def _total(of: str, one: int, other: int) -> int:
    """Of how many both were chosen; 0 where it is not known of both."""
    if one and other and one != other:
        raise ValueError(
            f"one circuit was chosen from {one} {of} and the other from {other}, so they are not of like models and "
            "spans; compare circuits chosen from the same."
        )
    return one if one == other else 0


def _common(mine: set[Any], theirs: set[Any], total: int) -> dict[str, float]:
    """What two sets share, and what two random ones of their sizes would."""
    from scipy.stats import hypergeom  # slow to import

    shared, either = len(mine & theirs), len(mine | theirs)
    row = {"shared": shared, "overlap": shared / either if either else np.nan, "expected": np.nan, "p_value": np.nan}
    if total:
        row["expected"] = len(mine) * len(theirs) / total
        row["p_value"] = float(hypergeom.sf(shared - 1, total, len(mine), len(theirs)))
    return row


def _halves(
    count: int, clusters: Sequence[Hashable] | None, splits: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Random divisions of examples into halves of whole clusters."""
    named = list(range(count)) if clusters is None else list(clusters)
    groups = list(dict.fromkeys(named))
    if len(named) != count or len(groups) < 2 or splits < 1:
        raise ValueError(
            f"{count} examples in {len(groups)} clusters cannot be divided {splits} times; give a cluster for each "
            "example, at least 2 clusters and 1 split."
        )
    draw, found = np.random.default_rng(seed), []
    for _ in range(splits):
        first = {groups[at] for at in draw.permutation(len(groups))[: len(groups) // 2]}
        found.append(
            ([at for at in range(count) if named[at] in first], [at for at in range(count) if named[at] not in first])
        )
    return found
