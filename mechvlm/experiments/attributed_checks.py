"""How far an estimate of many patches can be trusted: some of them are made, those estimated highest and random ones.

Rule this module guards: what was patched is told apart by how it was chosen. Nodes chosen by their estimate say how
good the top of the list is; only nodes drawn at random say anything of what the estimate passed over.

>>> table = xr.DataArray([[1.0, -3.0]], dims=["layer", "position"], coords={"layer": [0], "position": [0, 1]})
>>> [node.drawn for node in chosen_nodes({"mlp_out": table}, 1, seed=0)["mlp_out"]]
['top', 'random']
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.correlations import correlation, rank_correlation
from mechvlm.sites import whole

AMONG = ("top", "random", "both")
UNSEEN = 0.05
"""How likely a draw may be to have met none of the worst nodes, for `missed_share`."""
MISSED = (
    "missed: the largest |exact - estimate| of the random nodes, no bound on that of the nodes that were not patched; "
    "missed_share: at 95 % confidence no larger share of the nodes that are not among the top has a larger one"
)


@dataclass(frozen=True)
class Node:
    """One patch that can be made.

    Attributes:
        layer: -1 for what has none.
        place: a position, or a key of cross-attention, or the name of a span.
        head: None where all of the activation is patched.
    """

    kind: str
    layer: int
    place: Any
    head: int | None
    estimate: float
    drawn: str


def count_of(verify: object, what: str = "nodes") -> int:
    """How many of each sort are patched.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> count_of(3)
        3
    """
    count = whole("verify", verify)
    if count < 0:
        raise ValueError(f"verify={count} patches nothing; give 0 or more {what}.")
    return count


def chosen_nodes(estimates: Mapping[str, xr.DataArray], count: int, seed: int) -> dict[str, list[Node]]:
    """For each kind so many nodes with the largest estimates by size, and as many of the others at random.

    Args:
        estimates: by kind, over layer, position or span, and maybe head; what is not a number is no node.
        count: of each; fewer where there are no more.

    Example:
        >>> table = xr.DataArray([[1.0, -3.0, 2.0]], dims=["layer", "position"], coords={"layer": [0]})
        >>> found = chosen_nodes({"mlp_out": table.assign_coords(position=[0, 1, 2])}, 1, seed=0)
        >>> [(node.place, node.drawn) for node in found["mlp_out"]][0]
        (1, 'top')
    """
    found: dict[str, list[Node]] = {}
    for number, (kind, table) in enumerate(estimates.items()):
        values = table.values.ravel()
        size = np.where(np.isfinite(values), np.abs(values), -1.0)
        order = np.argsort(-size, kind="stable")[: int((size >= 0).sum())]
        top, rest = order[:count], order[count:]
        random = np.random.default_rng([seed, number]).choice(rest, min(count, len(rest)), replace=False)
        picked = [*((at, "top") for at in top), *((at, "random") for at in random)]
        found[kind] = [_node(kind, table, int(at), drawn) for at, drawn in picked]
    return found


def unpatched(estimates: Mapping[str, xr.DataArray], nodes: Mapping[str, Sequence[Node]]) -> dict[str, int]:
    """For each kind, how many nodes were not chosen.

    Example:
        >>> unpatched({"mlp_out": xr.DataArray([[1.0, -3.0, np.nan]])}, {"mlp_out": []})
        {'mlp_out': 2}
    """
    return {kind: int(np.isfinite(table.values).sum()) - len(nodes[kind]) for kind, table in estimates.items()}


def check_finite(what: str, values: Float[np.ndarray, "..."]) -> None:
    """Refuse estimates that are no numbers.

    Raises:
        ValueError: for one that is not finite.
    """
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(
            f"{wrong.size} estimates of {what} are {wrong[0]}; give a metric whose gradient is finite at these logits, "
            "or load the model in float32."
        )


def _node(kind: str, table: xr.DataArray, at: int, drawn: str) -> Node:
    """The node at a place of a table, counted through all of it."""
    where = dict(zip(table.dims, map(int, np.unravel_index(at, table.shape)), strict=True))
    layer = int(table.layer.values[where.pop("layer")]) if "layer" in where else -1
    (dim, place), *heads = where.items()
    named = table[dim].values[place].item()
    return Node(kind, layer, named, heads[0][1] if heads else None, float(table.values.flat[at]), drawn)


def checked(
    nodes: Mapping[str, Sequence[Node]],
    exact: Mapping[str, np.ndarray],
    left: Mapping[str, int],
    dim: str,
    sized: bool = False,
) -> xr.Dataset:
    """What was estimated beside what the patches did, and how well the two agree, for each kind.

    Args:
        exact: by kind, of each of its nodes.
        left: by kind, how many nodes were not patched.
        dim: what a node's place is, "position" or "span".
        sized: whether estimates have no sign, so that they are compared with the sizes of what the patches did.

    Returns:
        `estimate` and `exact` over axes kind and node, and `pearson` and so on over kind; see `attribution_patching`.
    """
    kinds, most = list(nodes), max(map(len, nodes.values()))

    def table(of: Any, fill: Any) -> tuple[list[str], np.ndarray]:
        rows = [[of(node) for node in nodes[kind]] for kind in kinds]
        return ["kind", "node"], np.array([row + [fill] * (most - len(row)) for row in rows])

    values = {kind: np.array([node.estimate for node in nodes[kind]]) for kind in kinds}
    drawn = {kind: np.array([node.drawn for node in nodes[kind]]) for kind in kinds}
    truth = {kind: np.abs(exact[kind]) if sized else exact[kind] for kind in kinds}
    agreed = [[_both(values[kind], truth[kind], drawn[kind], among) for among in AMONG] for kind in kinds]
    ends = [_ends(values[kind], truth[kind], drawn[kind], left[kind]) for kind in kinds]
    padded = [np.append(exact[kind], np.full(most - len(exact[kind]), np.nan)) for kind in kinds]
    found: dict[str, Any] = {
        "estimate": table(lambda node: node.estimate, np.nan),
        "exact": (["kind", "node"], np.array(padded)),
        "pearson": (["kind", "among"], np.array(agreed)[..., 0]),
        "spearman": (["kind", "among"], np.array(agreed)[..., 1]),
        **{name: (["kind"], np.array(ends)[:, at]) for at, name in enumerate(("precision", "missed", "missed_share"))},
    }
    places: dict[str, Any] = {
        "node_layer": table(lambda node: node.layer, -1),
        f"node_{dim}": table(lambda node: node.place, -1 if dim == "position" else ""),
        "node_head": table(lambda node: -1 if node.head is None else node.head, -1),
        "drawn": table(lambda node: node.drawn, ""),
    }
    return xr.Dataset(found, coords={"kind": kinds, "node": np.arange(most), "among": list(AMONG), **places})


def _both(estimate: np.ndarray, exact: np.ndarray, drawn: np.ndarray, among: str) -> tuple[float, float]:
    """Pearson's and Spearman's correlation among the nodes of one choice, or of both; of two, which always lie on a
    line, there is none.
    """
    here = drawn == among if among != "both" else np.ones(len(drawn), bool)
    if here.sum() < 3:
        return float("nan"), float("nan")
    return correlation(estimate[here], exact[here]), rank_correlation(estimate[here], exact[here])


def _ends(estimate: np.ndarray, exact: np.ndarray, drawn: np.ndarray, left: int) -> tuple[float, float, float]:
    """How many of the top are in truth, the largest error of a random node, and how many others may have a larger."""
    top, random = drawn == "top", drawn == "random"
    least = np.sort(np.abs(exact))[::-1][top.sum() - 1]
    precision = float((np.abs(exact[top]) >= least).mean())
    if not random.any():
        return precision, float("nan"), 0.0
    missed = float(np.abs(exact - estimate)[random].max())
    return precision, missed, 1 - UNSEEN ** (1 / random.sum()) if left else 0.0
