"""What a circuit alone does: a metric of a model in which all that is not in it carries another prompt's values.

>>> circuit_metrics(vlm, real, null, [[("image", "logits", None)]], yes).shape
(1,)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mechvlm.batch import metric_values
from mechvlm.experiments.sweep import numbers
from mechvlm.matching import check_matched
from mechvlm.metrics import Metric
from mechvlm.nodes import feeds, readers, writers
from mechvlm.passes import pass_of
from mechvlm.points import rows_at_once
from mechvlm.prompt import Prompt
from mechvlm.rounds import unsaid
from mechvlm.sites import told
from mechvlm.vlm import VLM
from mechvlm.wired import Edges, run_wired, wires_of
from mechvlm.writes import SUMS, write_sites, writing

ROWS = 64
"""How many rows one pass has, unless a single circuit needs more."""


def circuit_metrics(
    vlm: VLM,
    target: Prompt,
    source: Prompt | Sequence[Prompt],
    circuits: Sequence[Edges],
    metric: Metric,
    batch_size: int | None = None,
) -> Float[np.ndarray, " circuit"]:
    """A metric of a prompt where only the edges of a circuit carry what is written in its own run.

    Along every other edge goes what the same part wrote in the other prompt's run, so all edges give the prompt's own
    metric and none the other's. What a part writes is worked out anew from what it is given, in forward order, so an
    edge matters only as far as a path of kept edges leads to it.

    Args:
        target: the prompt whose behaviour the circuit is to explain.
        source: the prompt whose writes stand for what is left out; of several, with the same positions, their mean.
        circuits: of each its edges (writer, reader, span), by the names of `mechvlm.nodes`; the span is one of the
            target's, at whose positions the edge is kept, or None for all.
        batch_size: rows in one forward pass. A circuit takes as many as there are different streams in one layer: at
            most one for each head's queries, keys and values.

    Raises:
        ValueError: where positions cannot be matched; for an edge that is none; for a model whose layers attend to the
            picture's features beside the residual stream; for a model with edits of sums of what parts write.

    Example:
        >>> edges = [("image", "a0.h7<q>", None), ("a0.h7", "logits", "last")]
        >>> circuit_metrics(vlm, real, null, [edges], yes).shape
        (1,)

    Source:
        Wang et al. (2023), "Interpretability in the Wild", section 2.3; Hanna et al. (2024), "Have Faith in
        Faithfulness", section 2, edges as streams of their own.
    """
    others = [source] if isinstance(source, Prompt) else list(source)
    for other in others:
        check_matched(other, target)
    _checked(vlm)
    spans = list(target.spans)
    wanted = [_edges(vlm, edges, spans) for edges in circuits]
    of_position = [next(n for n, span in enumerate(spans) if at in target.spans[span]) for at in range(len(target))]
    value, held = partial(metric_values, vlm.metric(metric)), dict[tuple, Any]()
    read = [pass_of(vlm, held, other, read=write_sites(vlm, bool(other.image)), value=unsaid) for other in others]
    passes, start = [], 0
    size = rows_at_once(batch_size, ROWS)
    while start < len(wanted):
        some = max(1, size // wires_of(vlm.shape, wanted[start : start + 1], of_position, spans).rows)
        wires = wires_of(vlm.shape, wanted[start : start + some], of_position, spans)
        passes.append((pass_of(vlm, held, target, variants=[[]] * (wires.rows * wires.circuits), value=value), wires))
        start += wires.circuits
    how = writing(vlm)
    found = vlm.place.ask(vlm.model, run_wired, vlm.arch, vlm.shape.logit_cap, how, read, list(target.image), passes)
    return numbers(torch.cat(found)) if found else np.zeros(0)


def _checked(vlm: VLM) -> None:
    """Refuse models in which something passes the residual stream by."""
    if vlm.shape.crosses:
        raise ValueError(
            f"layers of {vlm.name} attend to the picture's features beside the residual stream, so a circuit of its "
            "parts cannot be run; patch their heads with mv.patch_heads(..., kind='cross_z')."
        )
    edited = [edit for edit in vlm.edits if edit.site.kind in SUMS and edit.site.tower == "text"]
    if edited:
        raise ValueError(
            f"{edited[0]} is an edit of a sum of what parts write, and a circuit is run part by part; run circuits of "
            "vlm.without_edits(), or edit z or mlp_out."
        )


def _edges(vlm: VLM, edges: Edges, spans: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """The edges of one circuit, each looked at."""
    write, read = set(writers(vlm.shape)), set(readers(vlm.shape))
    found = []
    for writer, reader, span in edges:
        if writer not in write or reader not in read or not feeds(vlm.shape, writer, reader):
            raise ValueError(
                f"there is no edge {writer} -> {reader} in this model; see mechvlm.nodes for what writes, what reads, "
                "and what stands before what."
            )
        if span is not None and span not in spans:
            raise ValueError(f"the edge {writer} -> {reader} is at {told(span)}; choose from {', '.join(spans)}.")
        found.append((writer, reader, span))
    return found
