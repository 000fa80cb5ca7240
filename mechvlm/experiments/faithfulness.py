"""Does a circuit do what the model does, and does the model do it without the circuit?

Rule this module guards: a circuit is measured by running it, between the model with all of its edges and with none, and
beside random circuits of as many edges.

>>> found = circuit_faithfulness(vlm, Circuit([Edge("image", "logits")]), null, real, yes, controls=0)
>>> found.faithfulness.round(3).values
array([[0.]])
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.batch import check_prompts
from mechvlm.circuit_value import Circuit
from mechvlm.experiments.choosing import scored_circuit
from mechvlm.experiments.circuit_edits import check_spans, kept_at, kept_in
from mechvlm.experiments.circuit_measures import areas, shares, with_means
from mechvlm.experiments.circuit_runs import streams_metrics
from mechvlm.experiments.curves import check_seed
from mechvlm.experiments.examples import about, metric_of_each, prompt_coordinates, unit_of
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.random_circuits import all_edges, random_circuit
from mechvlm.experiments.sweep import valued
from mechvlm.metrics import Metric
from mechvlm.nodes import Node, readers, writers
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, beside
from mechvlm.sites import listed, told, whole
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM
from mechvlm.wired import Streams, streams_of

OFF = 0.02
"""How far the circuits of all edges and of none may be from the model's own answers, as a share of their difference."""


def circuit_faithfulness(
    vlm: VLM,
    circuits: Circuit | Sequence[Circuit] | xr.Dataset | Sequence[xr.Dataset],
    sources: Prompt | Sequence[Prompt],
    targets: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    sizes: Sequence[int] | None = None,
    ablate: str = "source",
    controls: int = 10,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How much of a model's behaviour circuits bring about by themselves, and how much is left without them.

    A circuit is run with the source's writes along all edges outside it. Faithfulness is (m(circuit) - m(none)) /
    (m(all) - m(none)), where m is the metric with the edges of the circuit, with none of the model's, and with all:
    1 where the circuit does what the model does. Completeness is the same of all edges but the circuit's: 0 where
    nothing is left of the behaviour. Choose circuits on other examples than those they are tested on.

    Args:
        circuits: one or several, the smaller first; or scores, one result or several (see `choose_circuit`), of which
            `sizes` are taken.
        sources, targets: for each example the prompt that spoils the answer, and the one whose answer is explained.
        metric: one for all examples, or one for each.
        sizes: where scores are given: how many edges or nodes each circuit is to have, before those are left out that
            lie on no path.
        ablate: what goes along edges outside: "source", what was written in the example's source; "mean", the mean of
            what was written in all sources, whose positions then have to be the same.
        controls: how many random circuits for each circuit, of as many edges on paths, or as many heads and MLPs; the
            same ones for each example. 0: none.
        clusters: what each example belongs to, over which intervals are; by default the target's picture.
        seed: of the random circuits.
        batch_size: rows in one forward pass; 64 where it is not given. Circuits share a pass as far as what is held of
            their parts' writes is 1 GiB at most.
        out: a folder in which finished examples are kept.

    Returns:
        Over axes prompt and circuit: `metric` of the circuit and `complement` of all edges but its own; `faithfulness`
        and `completeness`. Over prompt: `all`, `none`, `target_metric` and `source_metric` (the model's own), and the
        areas `cpr` and `cmd` (see Source) of the curve of faithfulness over the share of edges, from no edge to all;
        not numbers for circuits that do not grow, or for less than two between these ends. Of these four `_mean`,
        `_low` and `_high`: over prompts, each weighed by the size of the difference of its all and none, so that the
        mean is a quotient of means where all these have one sign, with the ends of the 95% interval. Mean areas are
        those of the mean curve. `random`, faithfulness of random circuits, over sample and circuit, weighed likewise,
        and `p_value`: the share of them, the circuit itself counted in, that are as faithful or more.
        Examples for which all and none are the same have no faithfulness. Circuits have coordinates n_edges, n_nodes
        and share, of all edges (or heads and MLPs) of the model; at spans an edge counts for each span at which it
        carries something in the first target.

    Raises:
        ValueError: for lists of other lengths; for spans that a prompt has not; where a model's own answers are not
            those of all edges and none; and as `circuit_metrics`.
        TypeError: for what are no circuits.

    Example:
        >>> scores = mv.attribution_patching(vlm, null, real, yes, kinds=["z", "mlp_out"], positions="span")
        >>> found = mv.circuit_faithfulness(vlm, scores, [null], [real], yes, sizes=[40], controls=0)
        >>> mv.plot.faithfulness(found)

    Source:
        Wang et al. (2023), "Interpretability in the Wild", section 4; Hanna et al. (2024), "Have Faith in
        Faithfulness", section 2, for faithfulness; Marks et al. (2025), "Sparse Feature Circuits", section 3.3, for
        completeness as that of the complement. Mueller et al. (2025), "MIB: A Mechanistic Interpretability Benchmark",
        section 3: CPR is the area under faithfulness f(k) over the share of edges k, the higher the better, and CMD
        that of |1 - f(k)|, the lower the better; both by trapezoids, with f(0) = 0 and f(1) = 1.
    """
    into, spoilt = check_prompts(targets, vlm.shape), check_prompts(sources, vlm.shape)
    metrics, apart = metric_of_each(metric, into), clusters_of(into, clusters)
    given = _circuits(circuits, sizes)
    _checked(vlm, into, spoilt, given, ablate, whole("controls", controls))
    draw = np.random.default_rng(check_seed(seed))
    common = [name for name in into[0].spans if all(name in one.spans for one in into)]
    drawn = [[random_circuit(vlm, one, into[0], draw, common) for one in given] for _ in range(controls)]
    every = [~Circuit(), Circuit(), *given, *(~one for one in given), *(one for some in drawn for one in some)]

    streams = _streams(vlm, every)

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        (number,) = group
        pair = into[number], (spoilt if ablate == "mean" else spoilt[number])
        plain = [valued(vlm, one, metrics[number]) for one in (into[number], spoilt[number])]
        own = yield from beside(plain)
        values = streams_metrics(vlm, *pair, streams(into[number]), metrics[number], batch_size)
        check_ends(own, values[:2].tolist(), ablate)
        return arrays(values=np.concatenate([own, values]))

    listed_by = [[one.inverted, *map(str, one.edges), *one.chosen] for one in every]
    what: list[Any] = ["circuit_faithfulness", listed_by]
    what += [[one.encoding for one in spoilt], metrics, ablate, batch_size]
    groups = [[number] for number in range(len(into))]
    table = np.stack([one["values"].values for one in worked(vlm, into, groups, work, out, what)])
    found = _measured(vlm, into, given, table, controls, apart)
    attrs = about(vlm, into, metrics, apart, ablate=ablate, controls=controls, seed=seed)
    for name in ("metric", "complement", "all", "none", "target_metric", "source_metric"):
        found[name].attrs = {"long_name": f"{name} {attrs['metric']}", "units": unit_of(metrics)}
    return found.assign_attrs(attrs)


def check_ends(own: Sequence[float], circuits: Sequence[float], ablate: str = "source") -> None:
    """Refuse circuits of all edges and of none that do not answer as the model does.

    Args:
        own: the model's metric of the target and of the source.
        circuits: that of all edges and of none.
        ablate: with "mean" that of none is of no prompt.

    Raises:
        ValueError: where one of them is off by more than a fiftieth of the two answers' difference.

    Example:
        >>> check_ends([2.0, -1.0], [2.0, -1.0])
    """
    pairs = list(zip(own, circuits, strict=True))[: 2 if ablate == "source" else 1]
    worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    gap = abs(circuits[0] - circuits[1])
    if abs(worst[0] - worst[1]) > OFF * gap + 1e-4 * (1 + max(map(abs, own))):
        raise ValueError(
            f"the model's own metric is {worst[0]:.5g}, and {worst[1]:.5g} where it is run as a circuit of all edges, "
            "or of none, so what circuits do is lost in rounding; load the model with dtype='float32'."
        )


def _circuits(circuits: Any, sizes: Any) -> list[Circuit]:
    """The circuits, those of scores chosen."""
    given: list[Any] = (
        [circuits] if isinstance(circuits, Circuit | xr.Dataset) else list(listed(circuits) or [circuits])
    )
    if all(isinstance(one, xr.Dataset) for one in given):
        if sizes is None:
            raise ValueError("scores make circuits of any size; give sizes, for instance sizes=[10, 100, 1000].")
        counts = [whole("sizes:", size) for size in listed(sizes) or [sizes]]
        if min(counts) < 1:
            raise ValueError(f"sizes={told(sizes)} hold {min(counts)}; give numbers of edges or nodes from 1 on.")
        return [scored_circuit(given, size) for size in counts]
    wrong = [one for one in given if not isinstance(one, Circuit)]
    if wrong:
        raise TypeError(f"{told(wrong[0])} is no circuit; make it with mv.Circuit or mv.choose_circuit.")
    if sizes is not None:
        raise ValueError(
            f"sizes={told(sizes)} are of circuits yet to be chosen, and circuits were given; leave it out."
        )
    return given


def _checked(
    vlm: VLM, into: Sequence[Prompt], spoilt: Sequence[Prompt], given: Sequence[Circuit], ablate: str, controls: int
) -> None:
    if len(into) != len(spoilt):
        raise ValueError(f"{len(spoilt)} sources were given for {len(into)} targets; give one source for each target.")
    if ablate not in ("source", "mean"):
        raise ValueError(f"ablate={told(ablate)} is not known; choose from 'source', 'mean'.")
    if controls < 0:
        raise ValueError(f"controls={controls} draws nothing; give 0 or more random circuits.")
    for one in given:
        kept_at(vlm, one, [None])
        for prompt in into:
            check_spans(one, prompt)


def _streams(vlm: VLM, circuits: Sequence[Circuit]) -> Callable[[Prompt], list[Streams]]:
    """From a prompt to the streams of the circuits, which are made once for all prompts with the same spans."""
    made: dict[tuple[str, ...], list[Streams]] = {}

    def at_spans(prompt: Prompt) -> list[Streams]:
        spans = tuple(prompt.spans)
        if spans not in made:
            made[spans] = [streams_of(vlm.shape, kept_in(vlm, one, prompt)) for one in circuits]
        return made[spans]

    return at_spans


def _measured(
    vlm: VLM,
    into: Sequence[Prompt],
    given: Sequence[Circuit],
    table: Float[np.ndarray, "prompt value"],
    controls: int,
    clusters: Sequence[Hashable] | None,
) -> xr.Dataset:
    """What was measured, by its names."""
    count = len(given)
    plain, ends, rest = table[:, :2], table[:, 2:4], table[:, 4:]
    metric, complement = rest[:, :count], rest[:, count : 2 * count]
    random = rest[:, 2 * count :].reshape(len(table), controls, count)
    sizes = np.array([_size(vlm, circuit, into[0]) for circuit in given]).T
    faithfulness = shares(metric, *ends.T)
    one, both = ["prompt"], ["prompt", "circuit"]
    said = {"units": "1: all"}
    values = {
        "metric": (both, metric),
        "complement": (both, complement),
        "faithfulness": (both, faithfulness, {"long_name": "faithfulness", **said}),
        "completeness": (both, shares(complement, *ends.T), {"long_name": "faithfulness without the circuit", **said}),
        **{name: (one, ends[:, at]) for at, name in enumerate(("all", "none"))},
        **{name: (one, plain[:, at]) for at, name in enumerate(("target_metric", "source_metric"))},
        **{name: (one, area) for name, area in zip(("cpr", "cmd"), areas(sizes[2], faithfulness), strict=True)},
    }
    counted = "heads and MLPs" if any(one.chosen for one in given) else "edges"
    along = {
        "circuit": np.arange(count),
        "n_edges": ("circuit", sizes[0].astype(int)),
        "n_nodes": ("circuit", sizes[1].astype(int)),
        "share": ("circuit", sizes[2], {"long_name": f"share of the model's {counted}"}),
        "named": ("circuit", np.array([repr(circuit) for circuit in given])),
    }
    coordinates = {**prompt_coordinates(into), **along}
    return with_means(xr.Dataset(values, coords=coordinates), shares(random, *ends.T), clusters)


def _size(vlm: VLM, circuit: Circuit, prompt: Prompt) -> tuple[int, int, float]:
    """How many edges and nodes a circuit has, and which share that is of all edges; of chosen nodes, of all nodes.

    Where a circuit is at spans, each of its edges counts once for each span at which it is, as the model's do. Those
    that carry nothing there, as embeddings at image tokens, do not count.
    """
    kept = kept_in(vlm, circuit, prompt)
    if circuit.chosen:
        every = [name for name in writers(vlm.shape) if Node.parse(name).kind in ("attention", "mlp")]
        inside = len(every) - circuit.n_nodes if circuit.inverted else circuit.n_nodes
        return int(kept.sum()), inside, inside / len(every)
    there = all_edges(vlm, prompt, list(prompt.spans) if circuit.spans else [None])
    kept &= there
    ends = (writers(vlm.shape), (0, 2)), (readers(vlm.shape), (0, 1))
    found = [Node.parse(names[at]) for names, axes in ends for at in np.flatnonzero(kept.any(axes))]
    # What a head reads is no node of its own, as in `Circuit.nodes`.
    nodes = {replace(node, reads="") for node in found if node.reads not in ("k", "v")}
    return int(kept.sum()), len(nodes) if circuit.inverted else circuit.n_nodes, int(kept.sum()) / int(there.sum())
