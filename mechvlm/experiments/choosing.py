"""Which edges, or nodes, make a circuit? The best by their scores, or those that hang together best.

Rule this module guards: what a circuit was chosen from, and how, stands in the circuit.

>>> scores = attribution_patching(vlm, source=null, target=real, metric=yes, kinds=["z", "mlp_out"], positions="span")
>>> choose_circuit(scores, 10).n_nodes
10
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice, takewhile
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.circuit_value import Circuit
from mechvlm.edge_paths import Edge, Heads, at_other_positions
from mechvlm.nodes import Node
from mechvlm.sites import listed, number, told, whole

NODE_KINDS = {"z": "a{layer}.h{head}", "mlp_out": "m{layer}"}
"""The kinds of `attribution_patching` that are nodes, and how these are named."""

NODES = (("attention", "mlp"), ("attention",))


def choose_circuit(
    scores: xr.Dataset | Sequence[xr.Dataset],
    count: int | None = None,
    threshold: float | None = None,
    by: str = "abs",
    how: str = "top",
    prune: bool = True,
) -> Circuit:
    """The edges with the highest scores, or a circuit grown from the logits upwards, of so many edges.

    The target of the scores is the prompt whose answer the circuit is to explain, and the source the one that spoils
    it: an edge matters where reading the source's write changes the answer.

    Args:
        scores: what `edge_attribution` returns, for a circuit of edges; or `attribution_patching` with the kinds "z"
            or "mlp_out" or both, for one of heads and MLPs. Several of them, of several pairs of prompts: their mean,
            for which the metric has to go the same way from every target to its source, as `pair.metric` does; the
            circuit's note says how many do not.
        count: how many edges, or nodes. With `prune` fewer may be left.
        threshold: instead of a count, all whose score, as `by` says, is at least so much; above 0 for sizes.
        by: "abs", the size of the score; "value", how far it goes from the target's answer towards the source's, so
            that what works against the target's answer is left out first. Of scores without a sign ("drop", "atp*",
            "information-flow-routes") the two are the same.
        how: "top", the highest scores wherever they are; "greedy", one after the other the highest among the edges
            that lead into what is in the circuit already, beginning with the logits; of edges alone. Shares of
            information flow are largest at the first layers, of which few are on a path: take "greedy" with them.
        prune: leave out what lies on no path from what enters to the logits.

    Returns:
        The circuit, its edges with their scores, the highest first; its `note` says how it was chosen, and how many
        edges were left out that lie on no path.

    Raises:
        ValueError: for another word, "greedy" of nodes, neither or both of `count` and `threshold`, more edges than
            there are, scores that are not of one pair of prompts each or of edges and nodes together, no score that
            is high enough, a threshold that leaves out no size, or edges none of which lies on a path.
        TypeError: for other results.

    Example:
        >>> scores = mv.attribution_patching(vlm, null, real, yes, kinds=["z"], positions="span")
        >>> mv.choose_circuit(scores, 3).of_kind("attention")
        ('a0.h7', 'a7.h2', 'a7.h3')

    Source:
        Syed et al. (2023), "Attribution Patching Outperforms Automated Circuit Discovery", section 3; Hanna et al.
        (2024), "Have Faith in Faithfulness", section 3 (greedy) and appendix (pruning); `by="value"` as in Mueller et
        al. (2025), "MIB", section 3, for CPR.
    """
    found = scored_circuit(scores, count, threshold, by, how, prune)
    if not found.n_nodes:
        raise ValueError(
            f"no edge of the {found.note} lies on a path from what enters to the logits; choose more of them, or "
            "how='greedy', which follows paths from the logits, or prune=False."
        )
    return found


def scored_circuit(
    scores: Any,
    count: int | None = None,
    threshold: float | None = None,
    by: str = "abs",
    how: str = "top",
    prune: bool = True,
) -> Circuit:
    """The same circuit, which has no edge where none of those chosen lies on a path.

    Raises:
        ValueError, TypeError: see `choose_circuit`.
    """
    _checked(count, threshold, by, how)
    several = [scores] if isinstance(scores, xr.Dataset) else list(listed(scores) or [scores])
    of_nodes = _are_nodes(several)
    if of_nodes and how == "greedy":
        raise ValueError("how='greedy' follows edges, and the scores are of nodes; write how='top'.")
    table = _nodes(several) if of_nodes else _edges(several)
    rank = np.abs(table.values) if by == "abs" else table.values * _towards(several)
    finite = np.isfinite(rank)
    limit = int(finite.sum()) if count is None else whole("count", count)
    if not 1 <= limit <= finite.sum():
        what = "nodes" if of_nodes else "edges"
        raise ValueError(f"count={limit} cannot be taken of {int(finite.sum())} {what}; give a number from 1 to that.")
    within = None if of_nodes else _heads(table)
    order = _highest(rank) if within is None or how == "top" else _grown(table, rank, within)
    least = -np.inf if threshold is None else number("threshold", threshold)
    chosen = list(takewhile(lambda at: rank[at] >= least, islice(order, limit)))
    if not chosen:
        raise ValueError(f"no score is {least:g} or more; the highest is {np.nanmax(rank):.4g}.")
    attrs = several[0].attrs
    note = f"{how} {len(chosen)} by {by}" + (f" of at least {least:g}" if count is None else "") + _of_pairs(several)
    about: dict[str, Any] = {"metric": str(attrs.get("metric", "")), "model": str(attrs.get("model", "")), "note": note}
    names = [str(name) for name in table["node" if within is None else "writer"].values]
    kinds = [Node.parse(name).kind for name in names]
    about["layers"] = 1 + max(Node.parse(name).layer or 0 for name in names)
    counts = (0 if within is None else int(finite.sum()), *(sum(map(kinds.count, some)) for some in NODES))
    if within is None:
        return Circuit(chosen=[names[at] for (at,) in chosen], candidates=counts, **about)
    held: dict[str, Any] = {"heads": within.heads, "kv_heads": within.kv_heads, "crossing": within.crossing}
    found = Circuit([_edge(table, at) for at in chosen], candidates=counts, **held, **about)
    kept = found.pruned() if prune else found
    lost = found.n_edges - kept.n_edges
    return replace(kept, note=f"{note}, less {lost} on no path") if kept.edges and lost else kept


def _checked(count: object, threshold: object, by: str, how: str) -> None:
    if (count is None) == (threshold is None):
        raise ValueError(f"count={told(count)} and threshold={told(threshold)}; give one of the two.")
    for what, word, known in (("by", by, ("abs", "value")), ("how", how, ("top", "greedy"))):
        if word not in known:
            raise ValueError(f"{what}={told(word)} is not known; choose from {', '.join(map(repr, known))}.")
    if by == "abs" and threshold is not None and number("threshold", threshold) <= 0:
        raise ValueError(f"threshold={told(threshold)} leaves out no size; give one above 0, or by='value'.")


def _are_nodes(several: Sequence[Any]) -> bool:
    """Whether scores are of nodes; else they are of edges."""
    edges = [isinstance(one, xr.Dataset) and "score" in one for one in several]
    nodes = [isinstance(one, xr.Dataset) and any(kind in one for kind in NODE_KINDS) for one in several]
    if all(edges) or (all(nodes) and not any(edges)):
        return not all(edges)
    wrong = [one for one, edge, node in zip(several, edges, nodes, strict=True) if not (edge or node)]
    if not wrong:
        raise ValueError("scores of edges and of nodes have no mean; give results of one kind.")
    raise TypeError(
        f"{told(wrong[0])} holds no scores of edges or of heads and MLPs; give what mv.edge_attribution returns, or "
        "mv.attribution_patching with kinds=['z', 'mlp_out']."
    )


def _edges(several: Sequence[xr.Dataset]) -> xr.DataArray:
    """Scores over writer, reader and, where there are any, span; the mean of several."""
    return _mean([one["score"].transpose("writer", "reader", ...) for one in several], ("writer", "reader", "span"))


def _nodes(several: Sequence[xr.Dataset]) -> xr.DataArray:
    """Scores over node: sums over positions or spans, as if patched together; the mean of several."""
    return _mean([_by_node(one) for one in several], ("node",))


def _by_node(one: xr.Dataset) -> xr.DataArray:
    found: dict[str, float] = {}
    for kind, name in NODE_KINDS.items():
        if kind not in one:
            continue
        table = one[kind].sum([dim for dim in one[kind].dims if dim in ("position", "span")], skipna=False)
        for place in np.ndindex(*table.shape):
            at = {str(dim): int(table[dim].values[index]) for dim, index in zip(table.dims, place, strict=True)}
            found[name.format(**at)] = float(table.values[place])
    return xr.DataArray(list(found.values()), dims="node", coords={"node": list(found)})


def _mean(tables: Sequence[xr.DataArray], dims: Sequence[str]) -> xr.DataArray:
    """The mean of like tables."""
    first = tables[0]
    if set(first.dims) - set(dims):
        more = ", ".join(str(dim) for dim in first.dims if dim not in dims)
        raise ValueError(f"the scores have axes {more} too; take their mean over them, or give a list of results.")
    if any(one.dims != first.dims or any(not one[dim].equals(first[dim]) for dim in first.dims) for one in tables):
        raise ValueError("the results are of other nodes or spans than each other and have no mean; give like ones.")
    return first.copy(data=np.mean([one.values for one in tables], axis=0))


def _towards(several: Sequence[xr.Dataset]) -> float:
    """1 where the source's metric is above the target's, -1 below it; sizes and shares have no sign to turn."""
    if several[0].attrs.get("method") == "information-flow-routes" or not several[0].attrs.get("signed", 1):
        return 1.0
    ends: list[list[Any]] = [[one.attrs.get(f"{end}_metric") for end in ("source", "target")] for one in several]
    if any(None in pair for pair in ends):
        raise ValueError(
            "the scores do not say source_metric and target_metric in their attrs, so by='value' does not know which "
            "sign speaks for the target's answer; use by='abs'."
        )
    return float(np.sign(sum([float(source) - float(target) for source, target in ends])))


def _of_pairs(several: Sequence[xr.Dataset]) -> str:
    """How many pairs of prompts there are, and how many of them the mean has against itself."""
    if len(several) < 2:
        return ""
    ends = [[one.attrs.get(f"{end}_metric", 0.0) for end in ("source", "target")] for one in several]
    ways = [float(source) - float(target) for source, target in ends]
    against = min(sum(way > 0 for way in ways), sum(way < 0 for way in ways))
    return f", mean of {len(several)} pairs" + (f", the metric of {against} going the other way" if against else "")


def _heads(table: xr.DataArray) -> Heads:
    return Heads.among([str(name) for name in table["reader"].values])


def _edge(table: xr.DataArray, at: tuple[int, ...]) -> Edge:
    """The edge at a place of the table of scores."""
    names = [str(table[dim].values[index]) for dim, index in zip(table.dims, at, strict=True)]
    return Edge(names[0], names[1], names[2] if names[2:] else None, float(table.values[at]))


def _highest(rank: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Places of finite numbers, the highest first, and of equal ones the first."""
    flat = rank.ravel()
    order = np.argsort(-np.where(np.isfinite(flat), flat, -np.inf), kind="stable")[: int(np.isfinite(flat).sum())]
    for place in zip(*np.unravel_index(order, rank.shape), strict=True):
        yield tuple(int(index) for index in place)


def _grown(table: xr.DataArray, rank: np.ndarray, within: Heads) -> Iterator[tuple[int, ...]]:
    """Places of edges, one after the other the highest of those that lead into what is there, from the logits on."""
    spans = range(table.sizes.get("span", 1))
    column = {str(name): at for at, name in enumerate(table["reader"].values)}
    names = [str(name) for name in table["writer"].values]
    held: list[tuple[float, tuple[int, ...]]] = []
    seen: set[tuple[str, int]] = set()

    def open_up(reader: str, span: int) -> None:
        if reader in column and (reader, span) not in seen:
            seen.add((reader, span))
            for row in range(len(names)):
                place = (row, column[reader], span)[: rank.ndim]
                if np.isfinite(rank[place]):
                    heappush(held, (-float(rank[place]), place))

    for span in spans:
        open_up("logits", span)
    while held:
        place = heappop(held)[1]
        yield place
        for reader in within.readers(names[place[0]]):
            for span in spans if at_other_positions(reader) else place[2:] or [0]:
                open_up(reader, span)
