"""Random circuits, which a circuit is compared with: of as many edges that lie on paths, or of as many nodes.

Rule this module guards: a random circuit can carry something from the picture to the answer, as the one that it is
compared with can. Edges drawn one by one would lie on no path, and any circuit would be better.

>>> found = random_circuit(vlm, Circuit([Edge("image", "logits")]), real, np.random.default_rng(0))
>>> found.n_edges
1
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from mechvlm.circuit_value import Circuit
from mechvlm.edge_paths import INPUTS, Edge, Heads, at_other_positions
from mechvlm.experiments.circuit_edits import edge_table, kept_at, positions_written
from mechvlm.nodes import Node, readers, writers
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM

PATIENCE = 20
"""Paths in a row that add nothing, after which edges are drawn one by one."""


def random_circuit(
    vlm: VLM, circuit: Circuit, prompt: Prompt, draw: np.random.Generator, among: Sequence[str] | None = None
) -> Circuit:
    """A random circuit of as many edges as another, or of as many heads and as many MLPs; of all but as many.

    Edges are those of random paths from what enters to the logits, as many paths as have room; what is left of the
    number is drawn among all other edges. A path is drawn from the logits back: of all that stands before, one writer;
    of what that one reads (queries, keys, values), one reader; and so on.

    Args:
        prompt: whose spans are those at which edges are, where the circuit's are at spans. An edge at all positions
            then counts once for each span.
        among: those of its spans that other prompts have too; None: all.

    Example:
        >>> drawn = random_circuit(vlm, Circuit(chosen=["a3.h5", "m2"]), real, np.random.default_rng(0))
        >>> len(drawn.of_kind("attention")), len(drawn.of_kind("mlp"))
        (1, 1)
    """
    if circuit.chosen:
        return Circuit(chosen=_nodes(vlm, circuit, draw), inverted=circuit.inverted, note="random nodes")
    columns, rows = readers(vlm.shape), writers(vlm.shape)
    names = rows, columns, Heads.among(columns)
    spans: dict[Any, list[int]] = {None: list(range(len(prompt)))}
    if circuit.spans:
        spans = {name: held for name, held in prompt.spans.items() if among is None or name in among}
    table = all_edges(vlm, prompt, list(spans))
    listed = kept_at(vlm, ~circuit if circuit.inverted else circuit, list(spans))
    wanted = int((np.stack(list(listed.values())) & table).sum())
    found: dict[tuple[int, ...], None] = {}
    idle = 0
    while len(found) < wanted and idle < PATIENCE:
        path = [place for place in _path(table, *names, list(spans.values()), draw) if place not in found]
        fits = 0 < len(path) <= wanted - len(found)
        found |= dict.fromkeys(path if fits else [])
        idle = 0 if fits else idle + 1
    for place in found:
        table[place] = False
    left = np.flatnonzero(table)
    missing = min(wanted - len(found), len(left))
    more = np.unravel_index(left[draw.choice(len(left), missing, replace=False)], table.shape)
    edges = [
        Edge(rows[row], columns[column], list(spans)[at]) for at, row, column in [*found, *zip(*more, strict=True)]
    ]
    return Circuit(edges, inverted=circuit.inverted, note="random paths")


def all_edges(vlm: VLM, prompt: Prompt, spans: Sequence[str | None]) -> Bool[np.ndarray, "span writer reader"]:
    """All edges of a model that carry something, at each of some spans of a prompt; None is all positions.

    Left out are those of embeddings and pictures where there is none, and those to the logits but at the last position.

    Example:
        >>> all_edges(vlm, real, [None, "image", "last"]).sum((1, 2))
        array([4694, 4484, 4557])
    """
    kinds = {name: Node.parse(name).kind for name in writers(vlm.shape)}
    found = []
    for span in spans:
        held = list(range(len(prompt))) if span is None else prompt.spans[span]
        one_of = {kind: name for name, kind in kinds.items()}
        writes = {kind: bool(positions_written(name, held, prompt)) for kind, name in one_of.items()}
        reads = np.array([name != "logits" or len(prompt) - 1 in held for name in readers(vlm.shape)])
        found.append(edge_table(vlm) & np.array([writes[kind] for kind in kinds.values()])[:, None] & reads)
    return np.stack(found)


def _nodes(vlm: VLM, circuit: Circuit, draw: np.random.Generator) -> list[str]:
    """As many heads, and as many MLPs."""
    found: list[str] = []
    for kind in ("attention", "mlp"):
        pool = [name for name in writers(vlm.shape) if Node.parse(name).kind == kind]
        found += [pool[at] for at in draw.choice(len(pool), len(circuit.of_kind(kind)), replace=False)]
    return found


def _path(
    table: Bool[np.ndarray, "span writer reader"],
    rows: Sequence[str],
    columns: Sequence[str],
    within: Heads,
    spans: Sequence[Sequence[int]],
    draw: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Places of one path from the logits back to what enters; a layer that looks at the picture may be its end.

    Args:
        spans: positions of each.
    """
    last = max(map(max, spans))
    span, column = next(at for at, held in enumerate(spans) if last in held), columns.index("logits")
    path: list[tuple[int, ...]] = []
    while (some := np.flatnonzero(table[span, :, column])).size:
        row = int(some[draw.integers(len(some))])
        path.append((span, row, column))
        if Node.parse(rows[row]).kind in INPUTS:
            return path
        choices = within.readers(rows[row])
        reader = choices[draw.integers(len(choices))]
        column = columns.index(reader)
        if at_other_positions(reader):
            seen = [at for at, held in enumerate(spans) if min(held) <= max(spans[span])]
            span = seen[draw.integers(len(seen))]
    return path
