"""Along which ways, and in which layers, does the picture reach the answer? Attention cut between spans.

>>> found = information_flow(vlm, real, edges=["image->last", "question->last"], window=3, layers=[1, 4])
>>> found.change.isel(prompt=0).dims
('edge', 'layer')
"""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit
from mechvlm.experiments.edges import Edge, Edges, Window, check_among_words, cuts, edges_of, random_keys, windows_of
from mechvlm.experiments.objects import Objects, objects_of
from mechvlm.experiments.record import metric_name, metric_unit, record, word_list
from mechvlm.experiments.sweep import numbers, sweeping, value_and_top
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.metrics import Metric, WordMetric, probability
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work
from mechvlm.sites import listed, told, whole
from mechvlm.units import each
from mechvlm.vlm import VLM


def information_flow(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | None = None,
    answers: Sequence[str | int] | None = None,
    edges: Edges = None,
    objects: Objects = None,
    window: int = 9,
    layers: Sequence[Any] | None = None,
    controls: int = 1,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How the answer changes when attention between two spans is cut in a window of layers, edge by edge.

    Edges are named as information goes, `source->target`: queries of the target no longer look at keys of the source,
    in all heads of the window's layers, and the rest of their attention is renormalised. A query that is left without
    any key receives nothing.

    Args:
        prompts: one, or a list.
        metric: by default the probability of the answer: of the given one, else of the first token that the model
            itself says without a cut.
        answers: the right answer to each prompt, a word of one token (in all its spellings) or a token id. Prompts
            whose likeliest first token is not the answer are left out: their values are not a number.
        edges: by default image->question, image->last, question->last, and two controls, last->last and bos->last; with
            `objects` also object->question, object->last, rest->question and rest->last, where rest are the other image
            tokens. Or names of spans such as ["prefix->last"], {name: (queries, keys)}, or a function from a prompt to
            that. All prompts must have the same names.
        objects: the image tokens of each prompt's object: a function of a prompt, or a list with one entry for each
            prompt (also for a single one): a list of positions, a box as a tuple, or a mask.
        window: how many layers are cut together, about each centre, fewer at the ends of the model.
        layers: the centres, by default all; or windows as they are, such as [(0, 9), (5, 14)].
        controls: how many times each edge is cut from as many random keys instead, of all positions before its last
            query but bos and its queries; its own keys are among them. Where the picture is most of the prompt, random
            keys are mostly image tokens, and question tokens among them may cost more than the edge.
        seed: of the random keys, which are the same in every window.
        clusters: what prompts belong together, for the interval; by default their pictures.
        level: of the interval.
        batch_size, out: see `sweep`; with several prompts `out` holds a folder for each.

    Returns:
        Over axes prompt, edge and layer (the centre, or the window as text): `metric`, and `change` by the cut: in
        percent of the uncut value where the metric is a probability, else the difference in the metric's unit.
        `control`: the change by random keys, with an axis sample. `mean`, `low`, `high`: of `change` over prompts, over
        edge and layer; the bounds are not a number where there is only one cluster. `base`: the uncut metric. Further
        coordinates: the windows' `first` and `last` layer; `n_queries` and `n_keys` of each edge; `n_random`, how many
        random keys were drawn; `answered_right`.

    Raises:
        ValueError: for edges, windows or objects that are not there, prompts whose edges have other names, or edges
            from a picture that is seen by cross-attention.
        TypeError: for what is no prompt, or no list.

    Example:
        >>> found = mv.information_flow(vlm, [real, null], edges=["image->last", "last->last"], layers=[(0, 3), (4, 7)])
        >>> mv.plot.flow(found)

    Source:
        Geva et al. (2023), "Dissecting Recall of Factual Associations", section 5 (knockout in a window of layers);
        Zhang et al. (2025), "Cross-modal Information Flow in Multimodal Large Language Models" (these edges, windows of
        9 layers, the change in percent, answers that are right alone); Neo et al. (2024), "Towards Interpreting Visual
        Information Processing in Vision-Language Models" (windows given as groups: 0-9, 5-14, 11-20, 15-24, 21-31). The
        random keys are added here.
    """
    asked = check_prompts(prompts, vlm.shape)
    held = objects_of(asked, objects)
    ways = [edges_of(prompt, edges, own) for prompt, own in zip(asked, held, strict=True)]
    _check_alike(vlm, asked, ways)
    if whole("controls", controls) < 0:
        raise ValueError(f"controls={controls} is no number of random cuts; give 0 or more.")
    windows, draw, engine = windows_of(vlm, window, layers), np.random.default_rng(seed), "none: no prompt was right"
    measures, base, right = _measured(vlm, asked, metric, answers)
    drawn = [with_random(prompt, own, controls, draw) for prompt, own in zip(asked, ways, strict=True)]
    places = [out if out is None or len(asked) == 1 else Path(out) / f"prompt-{at}" for at in range(len(asked))]
    values = np.full((len(asked), controls + 1, len(ways[0]), len(windows)), np.nan)

    def one(number: int) -> Work[xr.DataArray]:
        at = rows[number]
        return _swept(vlm, asked[at], drawn[at], windows, measures[at], batch_size, places[at])

    rows = np.flatnonzero(right)
    for at, swept in zip(rows, each(vlm, [asked[at] for at in rows], one, out, ["information_flow"]), strict=True):
        values[at], engine = swept.values.reshape(values.shape[1:]), swept.attrs["engine"]
    named, cut = "as given" if isinstance(windows[0].name, str) else window, "all heads, in each layer of the window"
    about = record(vlm, asked, metric, cut=cut, window=named, seed=seed, level=level, engine=engine)
    if metric is None:
        about["metric"] = metric_name(measures[0]) if len(asked) == 1 else "probability of the answer"
    found = _dataset(asked, ways, windows, drawn, values, base, _change(metric, about["metric"]))
    found = found.assign_coords(answered_right=("prompt", right))
    mean = interval(found.change[right], list(compress(clusters_of(asked, clusters), right)), level)
    return found.assign(mean.data_vars).assign_attrs(about)


def percent(metric: Metric | None) -> bool:
    """Whether changes of a metric are told in percent: those of probabilities are.

    Example:
        >>> percent(None), percent(mv.logit_difference("yes", "no"))
        (True, False)
    """
    return metric is None or (isinstance(metric, WordMetric) and metric.name == "probability")


def clusters_of(prompts: Sequence[Prompt], clusters: Sequence[Any] | np.ndarray | None) -> list[Any]:
    """What prompts belong together: those about one picture, where nothing else is said.

    Example:
        >>> len(set(clusters_of([real, real.with_text("Is it red?")], None)))
        1
    """
    if clusters is not None:
        given = listed(clusters)
        if given is None or len(given) != len(prompts):
            raise ValueError(f"clusters={told(clusters)} must name one cluster for each of the {len(prompts)} prompts.")
        return list(given)
    pixels = [prompt.encoding.get("pixel_values") for prompt in prompts]
    return [at if x is None else sha256(numbers(x).tobytes()).hexdigest() for at, x in enumerate(pixels)]


def interval(values: xr.DataArray, clusters: Sequence[Any], level: float) -> xr.Dataset:
    """The mean over prompts with its interval; without one where fewer than two clusters could be drawn.

    Example:
        >>> interval(xr.DataArray([[1.0]], dims=["prompt", "layer"]), ["a"], 0.95).low.values
        array([nan])
    """
    dim = str(values.dims[0])
    if len({str(cluster) for cluster in clusters}) > 1:
        found = mean_interval(values, dim, clusters=clusters, level=level)[["mean", "low", "high"]]
    else:
        mean = values.sum(dim, min_count=1) / values.count(dim)  # not a number where there is none
        found = xr.Dataset({"mean": mean, "low": mean * np.nan, "high": mean * np.nan})
    for name in found.data_vars:
        found[name].attrs = dict(values.attrs)
    return found


def with_random(prompt: Prompt, edges: Mapping[str, Edge], controls: int, draw: np.random.Generator) -> dict[str, Edge]:
    """Edges, and behind them each as often as there are controls with random keys in place of its own.

    Example:
        >>> list(with_random(real, {"image->last": (real.last, real.image)}, 1, np.random.default_rng(0)))
        ['image->last', 'image->last, random 0']
    """
    random = {
        f"{name}, random {number}": (edge[0], random_keys(prompt, edge, draw))
        for number in range(controls)
        for name, edge in edges.items()
    }
    return {**edges, **random}


def _check_alike(vlm: VLM, prompts: Sequence[Prompt], ways: Sequence[Mapping[str, Edge]]) -> None:
    """Refuse prompts whose edges have other names, and edges that are not between positions."""
    for number, (prompt, edges) in enumerate(zip(prompts, ways, strict=True)):
        check_among_words(vlm, prompt, edges)
        if list(edges) != list(ways[0]):
            raise ValueError(
                f"the edges of prompt 0 are {', '.join(ways[0])}, and those of prompt {number} {', '.join(edges)}; "
                "name with edges= what all of them have."
            )


def _measured(
    vlm: VLM, prompts: Sequence[Prompt], metric: Metric | None, answers: Sequence[str | int] | None
) -> tuple[list[Metric], list[float], np.ndarray]:
    """For each prompt the metric, its uncut value, and whether the likeliest first token is the answer."""
    given = [None] * len(prompts) if answers is None else word_list(answers, "answers")
    if len(given) != len(prompts):
        raise ValueError(f"there are {len(given)} answers and {len(prompts)} prompts; give one for each.")
    own = [metric if metric is not None or answer is None else probability(answer) for answer in given]
    known = [None if one is None else vlm.metric(one) for one in own]
    measures, base, right = [], [], []
    asked = [
        {"prompt": prompt, "value": partial(value_and_top, one)} for prompt, one in zip(prompts, known, strict=True)
    ]
    for answer, one, run in zip(given, known, vlm.runs(asked), strict=True):
        both: Any = run.metric
        value, top = float(both[0, 0]), int(both[0, 1])
        measures.append(vlm.metric(probability(top)) if one is None else one)
        base.append(value)
        right.append(answer is None or top == answer or (isinstance(answer, str) and top in vlm.token_ids(answer)))
    return measures, base, np.array(right, dtype=bool)


def _swept(
    vlm: VLM,
    prompt: Prompt,
    points: Mapping[str, Edge],
    windows: Sequence[Window],
    measure: Metric,
    batch_size: int | None,
    out: str | Path | None,
) -> Work[xr.DataArray]:
    """The metric with each edge cut in each window; not a number where there are no keys to cut."""
    at = {window.name: window for window in windows}

    def cut(edge: str, layer: int | str) -> list[Edit]:
        return cuts(vlm, points[edge], at[layer]) if points[edge][1] else []

    found = yield from sweeping(vlm, prompt, cut, measure, batch_size, out, edge=list(points), layer=list(at))
    return found.where(xr.DataArray([bool(keys) for _, keys in points.values()], dims=["edge"]))


def _change(metric: Metric | None, name: str | int | float) -> dict[str, dict[str, Any]]:
    """What is said about the metric, and about a change of it."""
    unit = "probability" if metric is None else metric_unit(metric)
    relative = percent(metric)
    said = {"long_name": f"change of {name}", "units": "%" if relative else unit}
    return {"metric": {"long_name": str(name), "units": unit}, "change": said}


def _dataset(
    prompts: Sequence[Prompt],
    ways: Sequence[Mapping[str, Edge]],
    windows: Sequence[Window],
    drawn: Sequence[Mapping[str, Edge]],
    values: np.ndarray,
    base: Sequence[float],
    about: Mapping[str, dict[str, Any]],
) -> xr.Dataset:
    """Metric and change over prompt, edge and layer, and the change by random keys over sample as well."""
    uncut = np.array(base)[:, None, None, None]
    change = values - uncut
    if about["change"]["units"] == "%":
        change = 100 * change / np.where(uncut > 0, uncut, np.nan)
    axes, names = ["prompt", "edge", "layer"], list(ways[0])
    counts = np.array([[[len(part) for part in own[name]] for name in names] for own in ways])
    found = xr.Dataset(
        {
            "metric": (axes, values[:, 0], about["metric"]),
            "change": (axes, change[:, 0], about["change"]),
            "base": (["prompt"], np.array(base), about["metric"]),
        },
        coords={
            "prompt": np.arange(len(prompts)),
            "question": ("prompt", np.array([prompt.words for prompt in prompts], dtype=str)),
            "edge": names,
            "layer": [window.name for window in windows],
            "first": ("layer", [window.first for window in windows]),
            "last": ("layer", [window.last for window in windows]),
            "n_queries": (["prompt", "edge"], counts[..., 0]),
            "n_keys": (["prompt", "edge"], counts[..., 1]),
        },
    )
    if values.shape[1] == 1:
        return found
    random = [[len(own[f"{name}, random 0"][1]) for name in names] for own in drawn]
    found["control"] = (["prompt", "sample", "edge", "layer"], change[:, 1:], about["change"])
    return found.assign_coords(n_random=(["prompt", "edge"], random), sample=np.arange(values.shape[1] - 1))
