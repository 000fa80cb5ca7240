"""Which edges between the parts of a model would matter? Edge attribution, beside some of the edges patched exactly.

An edge goes from what writes into the residual stream to what reads from it (`mechvlm.nodes`). Patching it gives the
reader, and no other, what the writer wrote for another prompt.

Rule this module guards: whatever estimates an edge is held against the same patch, which moves one reader's input and
leaves everything else to the model.

>>> found = edge_attribution(vlm, source=real, target=null, metric=yes, method="eap")
>>> found.score.dims
('writer', 'reader')
"""

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.batch import check_fired
from mechvlm.experiments.attributed_checks import MISSED, check_finite, count_of
from mechvlm.experiments.curves import check_seed
from mechvlm.experiments.edge_checks import edges_patched, patched_exactly
from mechvlm.experiments.edge_products import Graph, edges_scored
from mechvlm.experiments.edge_turns import ALONG, METHODS, turns_of
from mechvlm.experiments.exchange import matched, nothing_between, patched_with
from mechvlm.experiments.paths import RULES, path_points
from mechvlm.experiments.record import metric_name, metric_unit, record
from mechvlm.metrics import Metric
from mechvlm.nodes import Node, feeds, readers, writers
from mechvlm.points import rows_at_once
from mechvlm.prompt import Prompt
from mechvlm.reads import inputs_of
from mechvlm.shapes import Shape
from mechvlm.sites import told, whole_numbers
from mechvlm.vlm import VLM
from mechvlm.writes import SUMS, writing

TIMES = "(source - target) of the write times the metric's gradient at the reader's input"
STEPS = 5
"""Points on a path, unless their number is given."""
VALUES = {
    "eap": f"{TIMES} in the target's run",
    "eap-ig": f"{TIMES}, averaged on the way from the target's embeddings to the source's",
    "clean-corrupted": f"{TIMES}, averaged over the target's run and the source's",
    "ig-activations": f"{TIMES}, averaged on the way of the writer's own layer to the source's",
    "information-flow-routes": "how near the write comes to the sum that the reader reads, in the target's run, as a "
    "share of what all writes do; the mean over positions",
    "exact": "the metric where the reader alone is given the source's write, less the target's metric",
}


def edge_attribution(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    method: str = "eap-ig",
    steps: int | None = None,
    rule: str | None = None,
    spans: str | Mapping[str, Sequence[int]] | Callable[[Prompt], Mapping[str, Sequence[int]]] | None = None,
    verify: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
) -> xr.Dataset:
    """About how much each edge between two parts of the language model, patched from one prompt, would change a metric.

    To first order the patch of an edge changes the metric by what the writer wrote for the source less what it wrote
    for the target, times the metric's gradient at the reader's input, summed over positions. All edges are had from two
    forward passes and one backward ("eap"), or one backward a point ("eap-ig"). Estimates are wrong where the model is
    not linear: `verify` patches some of the edges, to see by how much.

    Args:
        source: the prompt patched from; target: the one patched into, in whose run the gradients are taken. With the
            picture in the source and a null picture in the target, what brings the answer back is positive; for a
            circuit (`choose_circuit`) it is the other way round. Of a minimal pair `*pair.prompts(vlm)`, with
            `pair.metric`.
        method: "eap" takes the gradient at the target; "eap-ig" averages it over `steps` points between the embeddings
            (words, image features and what deep-stack adds of them) of the target and of the source;
            "clean-corrupted" over the target's run and the source's; "ig-activations" over points at which all that
            one layer's attention, or MLP, writes is between the two, each writer by its own layer's points (passes:
            `steps` for each layer's attention and MLP); "information-flow-routes" is no estimate of a patch: the share
            of each write in what a reader reads, by distance, in the target's run alone; "exact" patches every edge.
        steps: points of "eap-ig" and "ig-activations"; 5 unless given.
        rule: of these two, where on the path the points are, as in `attribution_patching`; "right" is the rule
            published for edges, where the corrupted prompt, which is the source, is one of the points.
        spans: None sums over all positions; "each" keeps the target's spans apart; or positions under names of your
            own, or a function from the target to them, such as `mv.image_regions`. A position is where the write is
            written and read.
        verify: how many edges, those with the largest scores by size, are also patched exactly, and as many again,
            drawn at random from the others. 0: none.
        seed: of the draw.
        batch_size: patches in one forward pass; see `sweep`.

    Returns:
        `score` over axes writer, reader and, where spans are apart, span, in the metric's unit (a share for
        "information-flow-routes"): positive where the patch is to raise the metric. What does not stand before the
        reader is not a number. Names are those of `mechvlm.nodes`: "image" -> "a3.kv1<v>". With `verify` also, for the
        edges that were patched, over axes kind ("edge") and node: `estimate` and `exact`, with `node_writer`,
        `node_reader`, `node_span` and `drawn`; and `pearson`, `spearman`, `precision`, `missed` and `missed_share` as
        in `attribution_patching`. Shares are held against the size of the exact change, and have no `missed`.

    Raises:
        ValueError: where positions cannot be matched; for a method, rule or spans that are not known, fewer than one
            step, `steps` or `rule` of a method that has none, a negative `verify` or `seed`, or a `verify` where every
            edge is patched anyway; a batch of no rows; or a gradient of the metric that is no finite number.
        TypeError: for spans that are no lists of positions.

    Example:
        >>> found = mv.edge_attribution(vlm, real, null, yes, method="eap", spans="each", verify=10)
        >>> mv.plot.edges(found, top=20)

    Source:
        Syed et al. (2023), "Attribution Patching Outperforms Automated Circuit Discovery", section 3 (EAP); Hanna et
        al. (2024), "Have Faith in Faithfulness", section 3 (EAP-IG); Marks et al. (2024), "Sparse Feature Circuits",
        section 2 (gradients between activations); Ferrando and Voita (2024), "Information Flow Routes", section 2.
    """
    matched(vlm, source, target, range(vlm.shape.layers["text"]))
    _check_edits(vlm)
    count = _checked(method, verify)
    points = _points(method, steps, rule)
    rows_at_once(batch_size, 1)
    drawn = check_seed(seed)
    chosen = _spans(target, spans)
    graph = graph_of(vlm, target, list(chosen.values()))
    score, ends, about = _scored(vlm, source, target, metric, graph, method, points, batch_size)
    check_finite("edges", score)
    table = _table(vlm, graph, score, list(chosen) if spans is not None else None)
    routes = method == "information-flow-routes"
    unit = "share" if routes else metric_unit(metric)
    long = "share of what is read" if routes else f"change of {metric_name(metric)}"
    found = xr.Dataset({"score": table.assign_attrs({"long_name": long, "units": unit})})
    about |= {"method": method, "source_metric": ends["source"], "target_metric": ends["target"]}
    about |= {
        "value": VALUES[method],
        **patched_with(vlm, "denoise"),
        **({} if routes else nothing_between(source, target)),
    }
    if count:
        both = (source, target)
        more, engine = edges_patched(vlm, both, metric, graph, table, count, drawn, routes, batch_size)
        found = found.merge(_with_units(more, unit, metric))
        about |= {"verify": count, "seed": drawn, "engine": engine, **({} if routes else {"missed_says": MISSED})}
    return found.assign_attrs(record(vlm, [source, target], metric, **about))


def graph_of(vlm: VLM, target: Prompt, spans: Sequence[Sequence[int]]) -> Graph:
    """The parts of a model and the positions to sum over, as plain values."""
    names, shape = writers(vlm.shape), vlm.shape
    before = []
    for layer, kinds in enumerate(shape.kinds["text"]):
        first = f"a{layer}.h0<q>" if "q" in kinds else f"a{layer}<q>"
        # Writers are in forward order, so those that stand before a reader are the first ones.
        ends = [partial(_stands_behind, shape, reader) for reader in (first, f"m{layer}")]
        counts = [bisect(names, 0, key=end) for end in ends]
        before.append((counts[0], counts[1]))
    return Graph(
        writing(vlm),
        inputs_of(vlm),
        names,
        tuple(before),
        len(readers(shape)),
        tuple(tuple(positions) for positions in spans),
        tuple(target.image),
        shape.d_model["text"],
        vlm.attention_budget,
    )


def _stands_behind(shape: Shape, reader: str, writer: str) -> bool:
    """Whether a writer does not stand before a reader."""
    return not feeds(shape, writer, reader)


def _scored(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    graph: Graph,
    method: str,
    points: tuple[int, str],
    batch_size: int | None,
) -> tuple[np.ndarray, dict[str, float], dict[str, Any]]:
    """Scores over writer, reader and span, the metric of both prompts, and what a record has to say."""
    if method == "exact":
        names = [(a, b) for a in graph.writers for b in readers(vlm.shape) if feeds(vlm.shape, a, b)]
        edges = [(writer, reader, span) for writer, reader in names for span in range(len(graph.spans))]
        changes, ends, engine = patched_exactly(vlm, source, target, metric, graph, edges, batch_size)
        score = np.zeros((len(graph.writers), graph.readers, len(graph.spans)))
        rows, columns = (dict(zip(all_, range(len(all_)), strict=True)) for all_ in (graph.writers, readers(vlm.shape)))
        for (writer, reader, span), change in zip(edges, changes, strict=True):
            score[rows[writer], columns[reader], span] = change
        return score, ends, {"engine": engine}
    turns, kept = turns_of(vlm, source, target, metric, graph, method, *points)
    shown = vlm.place.ask(vlm.model, edges_scored, vlm.arch, vlm.shape.logit_cap, graph, turns, kept)
    for turn, fired in zip(turns, shown["fired"], strict=True):
        check_fired(turn.what.plan, fired)
    ends = {name: float(end) for name, end in shown["ends"].items()}
    told_points = dict(zip(("steps", "rule"), points, strict=True)) if method in ALONG else {}
    return shown["scores"].numpy(), ends, told_points


def _points(method: str, steps: Any, rule: Any) -> tuple[int, str]:
    """How many points there are on the path, and by which rule."""
    given = {name: value for name, value in (("steps", steps), ("rule", rule)) if value is not None}
    if given and method not in ALONG:
        name, value = next(iter(given.items()))
        raise ValueError(
            f"{name}={told(value)} is of a path, and method={method!r} has none; choose from "
            f"{', '.join(map(repr, ALONG))}."
        )
    found = STEPS if steps is None else steps, RULES[0] if rule is None else rule
    return len(path_points(*found)[0]), found[1]


def _checked(method: object, verify: object) -> int:
    """How many edges of each sort are patched."""
    if method not in METHODS:
        raise ValueError(f"method={told(method)} is not known; choose from {', '.join(map(repr, METHODS))}.")
    count = count_of(verify, "edges")
    if count and method == "exact":
        raise ValueError(f"verify={count} patches edges that method='exact' patches anyway; leave it out.")
    return count


def _check_edits(vlm: VLM) -> None:
    """Refuse a model in which the stream is something else than the sum of what its parts write."""
    edited = [edit for edit in vlm.edits if edit.site.kind in SUMS and edit.site.tower == "text"]
    if edited:
        raise ValueError(
            f"{edited[0]} is an edit of sums of what parts write, and edges are of the parts; take the edges of "
            "vlm.without_edits(), or edit z or mlp_out."
        )


def _spans(target: Prompt, spans: Any) -> dict[str, list[int]]:
    """The positions of each span; all of them as one for None."""
    spans = spans(target) if callable(spans) else spans
    if spans is None:
        return {"all": list(range(len(target)))}
    if isinstance(spans, str) and spans == "each":
        return {name: positions for name, positions in target.spans.items() if positions}
    if not isinstance(spans, Mapping) or not spans:
        raise ValueError(
            f"spans={told(spans)} is not known; choose from None, 'each', or name positions, "
            "such as {'image': prompt.image}."
        )
    found = {str(name): list(whole_numbers(f"positions of {name!r}", positions)) for name, positions in spans.items()}
    for name, positions in found.items():
        wrong = [at for at in positions if not 0 <= at < len(target)]
        if not positions or wrong or len(set(positions)) < len(positions):
            raise ValueError(
                f"span {name!r} is {told(positions)}; give it positions from 0 to {len(target) - 1}, each once."
            )
    return found


def _table(vlm: VLM, graph: Graph, scores: np.ndarray, spans: Sequence[str] | None) -> xr.DataArray:
    """Scores under their names; what is no edge is not a number."""
    first, then = graph.writers, readers(vlm.shape)
    there = np.ones((len(first), len(then)), bool)
    for at, reader in enumerate(map(Node.parse, then)):
        if reader.layer is not None:
            there[graph.before[reader.layer][reader.kind == "mlp"] :, at] = False
    table = xr.DataArray(
        np.where(there[..., None], scores, np.nan),
        dims=["writer", "reader", "span"],
        coords={"writer": list(first), "reader": list(then)},
    )
    return table.isel(span=0) if spans is None else table.assign_coords(span=list(spans))


def _with_units(found: xr.Dataset, unit: str, metric: Metric) -> xr.Dataset:
    """The same, with what its numbers are in."""
    found["estimate"].attrs = {"long_name": "score of the edge", "units": unit}
    said = {"long_name": f"change of {metric_name(metric)} by the patch", "units": metric_unit(metric)}
    found["exact"].attrs = said
    if "missed" in found:
        found["missed"].attrs = {"long_name": "largest error of a random edge", "units": unit}
    return found
