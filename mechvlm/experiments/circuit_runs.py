"""What a circuit alone does: a metric of a model in which all that is not in it carries another prompt's values.

>>> circuit_metrics(vlm, real, null, [[("image", "logits", None)]], yes).shape
(1,)
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from mechvlm.batch import metric_values
from mechvlm.edge_paths import Ends
from mechvlm.experiments.circuit_edits import edge_table
from mechvlm.experiments.sweep import numbers
from mechvlm.matching import check_matched
from mechvlm.metrics import Metric
from mechvlm.nodes import readers, writers
from mechvlm.passes import pass_of
from mechvlm.points import rows_at_once
from mechvlm.prompt import Prompt
from mechvlm.rounds import unsaid
from mechvlm.sites import told
from mechvlm.vlm import VLM
from mechvlm.wired import Streams, run_wired, streams_of, wires_of
from mechvlm.writes import SUMS, write_sites, writing

ROWS = 64
"""How many rows one pass has, unless a single circuit needs more."""
BYTES = 1 << 30
"""What is held of what all parts write in the circuits of one pass, unless a single circuit needs more."""


def circuit_metrics(
    vlm: VLM,
    target: Prompt,
    source: Prompt | Sequence[Prompt],
    circuits: Sequence[Sequence[Ends]],
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
        batch_size: rows in one forward pass; 64 where it is not given. A circuit takes as many as there are different
            streams in one layer: at most one for each head's queries, keys and values. Whatever is given, one pass has
            one circuit, or so many that what is held of their writes (circuits x writers x positions x d_model) is
            1 GiB at most.

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
    streams = (streams_of(vlm.shape, _table(vlm, edges, list(target.spans))) for edges in circuits)
    return streams_metrics(vlm, target, source, streams, metric, batch_size)


def streams_metrics(
    vlm: VLM,
    target: Prompt,
    source: Prompt | Sequence[Prompt],
    circuits: Iterable[Streams],
    metric: Metric,
    batch_size: int | None = None,
) -> Float[np.ndarray, " circuit"]:
    """The same of circuits by the streams that their readers are given; see `circuit_metrics`.

    Args:
        vlm, target, source, metric, batch_size: as there.
        circuits: of edges at the target's spans, in their order, or at all positions.

    Raises:
        ValueError: as there, but for edges.
    """
    others = [source] if isinstance(source, Prompt) else list(source)
    for other in others:
        check_matched(other, target)
    _checked(vlm)
    place = {at: number for number, held in enumerate(target.spans.values()) for at in held}
    of_position = [place[at] for at in range(len(target))]
    value, held = partial(metric_values, vlm.metric(metric)), dict[tuple, Any]()
    read = [pass_of(vlm, held, other, read=write_sites(vlm, bool(other.image)), value=unsaid) for other in others]
    each = len(writers(vlm.shape)) * len(target) * vlm.shape.d_model["text"] * vlm.dtype.itemsize
    groups = _grouped(circuits, rows_at_once(batch_size, ROWS), BYTES // each)
    passes = []
    for wires in (wires_of(vlm.shape, some, of_position) for some in groups):
        passes.append((pass_of(vlm, held, target, variants=[[]] * (wires.rows * wires.circuits), value=value), wires))
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


def _grouped(circuits: Iterable[Streams], rows: int, most: int) -> Iterator[list[Streams]]:
    """Circuits that run in one pass: one, or as many as have so many rows at most, of which all get equally many."""
    some: list[Streams] = []
    for one in circuits:
        more = [*some, one]
        if some and (len(more) > most or len(more) * max(each.rows for each in more) > rows):
            yield some
            more = [one]
        some = more
    if some:
        yield some


def _table(vlm: VLM, edges: Sequence[Ends], spans: Sequence[str]) -> Bool[np.ndarray, "span writer reader"]:
    """The edges of one circuit, each looked at, at each span."""
    known = edge_table(vlm)
    rows, columns = ({name: at for at, name in enumerate(names(vlm.shape))} for names in (writers, readers))
    kept = np.zeros((len(spans), *known.shape), dtype=bool)
    for writer, reader, span in edges:
        if writer not in rows or reader not in columns or not known[rows[writer], columns[reader]]:
            raise ValueError(
                f"there is no edge {writer} -> {reader} in this model; see mechvlm.nodes for what writes, what reads, "
                "and what stands before what."
            )
        if span is not None and span not in spans:
            raise ValueError(f"the edge {writer} -> {reader} is at {told(span)}; choose from {', '.join(spans)}.")
        kept[slice(None) if span is None else spans.index(span), rows[writer], columns[reader]] = True
    return kept
