"""Random circuits, which a circuit is compared with: of as many edges that lie on paths, or of as many nodes.

Rule this module guards: a random circuit can carry something from the picture to the answer, as the one that it is
compared with can. Edges drawn one by one would lie on no path, and any circuit would be better.

>>> found = random_circuit(vlm, Circuit([Edge("image", "logits")]), real, np.random.default_rng(0))
>>> found.n_edges
1
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechvlm.circuit_value import Circuit
from mechvlm.edge_paths import INPUTS, Edge, Ends, Heads, at_other_positions
from mechvlm.experiments.circuit_edits import edge_table, positions_written
from mechvlm.nodes import Node, readers, writers
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM

PATIENCE = 20
"""Paths in a row that add nothing, after which edges are drawn one by one."""


def random_circuit(vlm: VLM, circuit: Circuit, prompt: Prompt, draw: np.random.Generator) -> Circuit:
    """A random circuit of as many edges as another, or of as many heads and as many MLPs; of all but as many.

    Edges are those of random paths from what enters to the logits, as many paths as have room; what is left of the
    number is drawn among all other edges. A path is drawn from the logits back: of all that stands before, one writer;
    of what that one reads (queries, keys, values), one reader; and so on.

    Args:
        prompt: whose spans are those at which edges are, where the circuit's are at spans.

    Example:
        >>> drawn = random_circuit(vlm, Circuit(chosen=["a3.h5", "m2"]), real, np.random.default_rng(0))
        >>> len(drawn.of_kind("attention")), len(drawn.of_kind("mlp"))
        (1, 1)
    """
    if circuit.chosen:
        return Circuit(chosen=_nodes(vlm, circuit, draw), inverted=circuit.inverted, note="random nodes")
    columns, rows, table = readers(vlm.shape), writers(vlm.shape), edge_table(vlm)
    before = {reader: [rows[at] for at in np.flatnonzero(table[:, number])] for number, reader in enumerate(columns)}
    spans = {name: list(held) for name, held in prompt.spans.items() if held} if circuit.spans else {}
    found: dict[Ends, None] = {}
    idle = 0
    while len(found) < len(circuit.edges) and idle < PATIENCE:
        path = [edge for edge in _path(before, Heads.among(columns), spans, prompt, draw) if edge not in found]
        fits = 0 < len(path) <= len(circuit.edges) - len(found)
        found |= dict.fromkeys(path if fits else [])
        idle = 0 if fits else idle + 1
    left = [edge for edge in all_edges(vlm, prompt, list(spans)) if edge not in found]
    missing = min(len(circuit.edges) - len(found), len(left))
    found |= dict.fromkeys(left[at] for at in draw.choice(len(left), missing, replace=False).tolist())
    return Circuit([Edge(*edge) for edge in found], inverted=circuit.inverted, note="random paths")


def all_edges(vlm: VLM, prompt: Prompt, spans: list[str]) -> list[Ends]:
    """All edges of a model that carry something, at each of some spans of a prompt, or at all positions.

    Left out are those of embeddings and pictures where there is none, and those to the logits but at the last position.

    Example:
        >>> len(all_edges(vlm, real, [])), len(all_edges(vlm, real, ["image"])), len(all_edges(vlm, real, ["last"]))
        (4694, 4484, 4557)
    """
    rows, columns, table = writers(vlm.shape), readers(vlm.shape), edge_table(vlm)
    found: list[Ends] = []
    some: list[Any] = list(spans) or [None]
    for span in some:
        held = range(len(prompt)) if span is None else prompt.spans[span]
        writes = np.array([bool(positions_written(name, list(held), prompt)) for name in rows])
        reads = np.array([name != "logits" or len(prompt) - 1 in held for name in columns])
        kept = table & writes[:, None] & reads
        found += [(rows[row], columns[column], span) for row, column in zip(*np.nonzero(kept), strict=True)]
    return found


def _nodes(vlm: VLM, circuit: Circuit, draw: np.random.Generator) -> list[str]:
    """As many heads, and as many MLPs."""
    found: list[str] = []
    for kind in ("attention", "mlp"):
        pool = [name for name in writers(vlm.shape) if Node.parse(name).kind == kind]
        found += [pool[at] for at in draw.choice(len(pool), len(circuit.of_kind(kind)), replace=False)]
    return found


def _path(
    before: Mapping[str, list[str]],
    within: Heads,
    spans: Mapping[str, list[int]],
    prompt: Prompt,
    draw: np.random.Generator,
) -> list[Ends]:
    """One path from the logits back to what enters; a layer that looks at the picture by itself may be its end."""
    reader: str = "logits"
    span = next((name for name, held in spans.items() if len(prompt) - 1 in held), None)
    path: list[Ends] = []
    while True:
        held = spans[span] if span is not None else list(range(len(prompt)))
        some = [name for name in before[reader] if positions_written(name, held, prompt)]
        if not some:
            return path
        writer = some[draw.integers(len(some))]
        path.append((writer, reader, span))
        if Node.parse(writer).kind in INPUTS:
            return path
        choices = within.readers(writer)
        reader = choices[draw.integers(len(choices))]
        if span is not None and at_other_positions(reader):
            seen = [name for name, those in spans.items() if min(those) <= max(held)]
            span = seen[draw.integers(len(seen))]
