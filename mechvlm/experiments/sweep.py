"""Sweeps: one experiment for each point of a grid, and as little work for each as is exact.

Rule this module guards: a sweep is exact. Every point has the answer of a full forward pass with that point's edits;
what is left out is what the edits cannot change: the picture, the layers before the first edit, the positions before
the first one that is edited, and all of the last layer but its last position (`mechvlm.points`).

>>> sweep(vlm, real, lambda layer, head: [mv.ablate_heads(layer, [head])], yes, layer=range(8), head=range(8))
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.shards import Shards
from mechvlm.fingerprints import fingerprint, weights_print
from mechvlm.metrics import Metric, probability
from mechvlm.points import answering, rows_at_once, rows_for, way_of
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, done
from mechvlm.run import Run
from mechvlm.sites import Site, listed, told
from mechvlm.units import progress, stretches, taken
from mechvlm.vlm import VLM


def sweep(
    vlm: VLM,
    prompt: Prompt,
    point_to_edits: Callable[..., Sequence[Edit]],
    metric: Metric,
    batch_size: int | None = None,
    out: str | Path | None = None,
    fast: bool = True,
    **axes: Iterable[Any],
) -> xr.DataArray:
    """A metric at each point of a grid of experiments.

    The prompt runs once. A point is then run from the first layer that its edits change, and from the first position:
    the one an edit names (`positions`, `queries`, `rows`), or, where it names none, the first that it is found to
    change. Points that begin near each other are rows of one batch. Edits before the language model (of the vision
    tower, say) need full passes, which share the picture where the architecture lets them. Edits that all points have
    in common belong to the model: `vlm.with_edits`. An edit's function may be tried first, and called again where a
    batch is begun anew, so it must give the same for the same: one that draws numbers has to take a seed of its own.

    Args:
        point_to_edits: from a point of the grid, as named arguments, to the edits to make there.
        metric: a function of the last position's logits, such as `logit_difference("yes", "no")`.
        batch_size: at most so many points in one batch; by default as many as are worth it and fit the free memory.
            Where memory does not suffice after all, a batch is halved.
        out: a folder in which each finished batch is kept; the same sweep, started again, goes on from there. Another
            one is refused. What makes it another is the model and its weights, the prompt, the points, and what the
            functions of edits and metric do, hold and find by name (a counter too); not what they read from files, the
            environment or other packages. `point_to_edits` is asked for all points before the first of them runs.
        fast: False makes each point a row of a full forward pass, to compare with.
        axes: the values of each axis: numbers or names. Every combination of them is a point.

    Returns:
        The metric of each point, in its own unit, over the axes in their order. `attrs["engine"]` says how the points
        were run.

    Raises:
        ValueError: without axes, for an axis without values or with one twice, for a function that takes other names,
            or for a folder that holds another sweep.
        TypeError: for values of an axis that are neither numbers nor names, or a function that returns no list.

    Example:
        >>> cut = lambda layer, span: [mv.cut_attention(layer, real.spans[span], queries=real.last)]
        >>> mv.sweep(vlm, real, cut, mv.probability("yes"), layer=range(8), span=["image", "question"])
    """
    return done(vlm, sweeping(vlm, prompt, point_to_edits, metric, batch_size, out, fast, **axes))


def sweeping(
    vlm: VLM,
    prompt: Prompt,
    point_to_edits: Callable[..., Sequence[Edit]],
    metric: Metric,
    batch_size: int | None = None,
    out: str | Path | None = None,
    fast: bool = True,
    **axes: Iterable[Any],
) -> Work[xr.DataArray]:
    """A sweep as work (`mechvlm.rounds`), so that several sweeps, and what stands beside them, can be one job.

    Args:
        vlm, prompt, point_to_edits, metric, batch_size, out, fast, axes: as in `sweep`.

    Example:
        >>> cut = lambda layer: [mv.cut_attention(layer, real.image, queries=real.last)]
        >>> done(vlm, sweeping(vlm, real, cut, yes, layer=[0, 1])).dims
        ('layer',)
    """
    one_prompt(prompt)
    grid = {name: values_of_axis(name, values) for name, values in axes.items()}
    check_grid(grid, point_to_edits)
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    variants = [edits_at(point, point_to_edits(**point)) for point in points]
    values, how = yield from measuring(vlm, prompt, variants, metric, batch_size, out, fast)
    return xr.DataArray(
        values.reshape([len(along) for along in grid.values()]),
        dims=list(grid),
        coords=grid,
        name="metric",
        attrs={
            **record(vlm, [prompt], metric, value="the metric of the last position's logits, with each point's edits"),
            "engine": how,
        },
    )


def measuring(
    vlm: VLM,
    prompt: Prompt,
    variants: Sequence[Sequence[Edit]],
    metric: Metric,
    batch_size: int | None = None,
    out: str | Path | None = None,
    fast: bool = True,
) -> Work[tuple[np.ndarray, str]]:
    """A metric of each of some lists of edits, and how they were run; as work, see `mechvlm.rounds`.

    Args:
        vlm, prompt, metric, batch_size, out, fast: as in `sweep`.
    """
    measure, values = vlm.metric(metric), np.full(len(variants), np.nan)
    shards = None if out is None else Shards(out, sweep_print(vlm, prompt, variants, measure))
    # Elsewhere a sweep is whole: a process that had a part of one and waited for part of another would hold others up.
    parts = [range(len(variants))] if shards is None or vlm.place.remote else stretches(len(variants))
    there, how = np.zeros(len(variants), bool), [] if out is None else [f"read from {Path(str(out)).name}"]

    def left() -> list[int]:
        for point, value in (shards.values() if shards is not None else {}).items():
            values[point], there[point] = value, True
        bar.update(int(there.sum()) - bar.n)
        return [at for at, points in enumerate(parts) if not there[points].all()]

    with progress(len(variants), "point", quiet=vlm.place.remote) as bar:
        for part in taken(shards, len(parts), left):
            way = way_of(vlm, prompt, variants, batch_size, fast, [at for at in parts[part] if not there[at]])
            how = [way.how]
            made = yield from answering(way, partial(metric_values, measure))
            for points, found in made:
                if shards is None:
                    values[list(points)] = numbers(found)
                else:
                    shards.add(points, found)
                bar.update(len(points))
    return values, how[0]


def valued(vlm: VLM, prompt: Prompt, metric: Metric, edits: Sequence[Edit] = ()) -> Work[float]:
    """A metric of one prompt, as work (`mechvlm.rounds`).

    Example:
        >>> round(done(vlm, valued(vlm, real, yes)), 1)
        2.6
    """
    (run,) = yield [{"by": vlm, "prompt": prompt, "edits": edits, "value": partial(metric_values, vlm.metric(metric))}]
    found: Any = run.metric
    return float(found[0])


def value_and_top(measure: Metric | None, logits: Float[Tensor, "1 vocab"]) -> Float[Tensor, "1 2"]:
    """A metric, by default the probability of the likeliest token, and that token.

    Example:
        >>> value, top = value_and_top(None, vlm.run(real).logits)[0].tolist()
        >>> vlm.word(int(top)), round(value, 2)
        ('yes', 0.93)
    """
    top = int(logits[0].argmax())
    value = metric_values(probability(top).resolve(lambda _: [top]) if measure is None else measure, logits)
    return torch.stack([value.double(), torch.full_like(value, top, dtype=torch.float64)], -1)


def sweep_print(vlm: VLM, prompt: Prompt, variants: Sequence[Sequence[Edit]], measure: Metric) -> str:
    """What a sweep is: model, prompt, metric and edits."""
    about = {name: text for name, text in vlm.provenance(prompt).items() if name not in ("device", "edits")}
    own = weights_print(vlm)
    return fingerprint(about, own, prompt.encoding, list(vlm.edits), [list(edits) for edits in variants], measure)


def runs_of(
    vlm: VLM,
    prompt: Prompt,
    variants: Sequence[Sequence[Edit]],
    read: Mapping[Site, Callable[[torch.Tensor], Any] | None] | None = None,
    batch_size: int | None = None,
    grad_of: Metric | None = None,
) -> Iterator[Run]:
    """Run variants of a prompt by full passes, some at a time, with a progress bar where it takes more than a second.

    For what is read of them, or for gradients; where the last logits are all, `measuring` is faster. Elsewhere all of
    them are one job.

    Raises:
        ValueError: for a batch size below one.
    """
    yield from in_sight(asked := asked_of(prompt, variants, read, batch_size, grad_of), vlm.runs(asked))


def asked_of(
    prompt: Prompt,
    variants: Sequence[Sequence[Edit]],
    read: Mapping[Site, Any] | None = None,
    batch_size: int | None = None,
    grad_of: Metric | None = None,
    reduce: Callable[[dict, dict], Any] | None = None,
    value: Metric | None = None,
) -> list[dict[str, Any]]:
    """What full passes of variants of a prompt ask for, some at a time; see `mechvlm.rounds`.

    Args:
        reduce, value: as of `VLM.runs`, of each batch.

    Raises:
        ValueError: for a batch size below one.

    Example:
        >>> len(asked_of(real, [[]] * 5, batch_size=2))
        3
    """
    size = rows_at_once(batch_size, rows_for(prompt))
    groups = [variants[start : start + size] for start in range(0, len(variants), size)]
    same = {"prompt": prompt, "read": read or (), "grad_of": grad_of, "reduce": reduce, "value": value}
    return [{**same, "variants": rows} for rows in groups]


def in_sight(asked: Sequence[Mapping[str, Any]], runs: Iterator[Run]) -> Iterator[Run]:
    """Runs, with a progress bar that counts their variants.

    Example:
        >>> len(list(in_sight([{"variants": [[]]}], iter([vlm.run(real)]))))
        1
    """
    with progress(sum(len(one["variants"]) for one in asked), "run") as bar:
        for one, run in zip(asked, runs, strict=True):
            yield run
            bar.update(len(one["variants"]))


def numbers(values: torch.Tensor) -> np.ndarray:
    """A tensor as an array of ordinary numbers, whatever its precision and device."""
    return values.detach().double().cpu().numpy()


def check_grid(grid: Mapping[str, Sequence[Any]], point_to_edits: Callable[..., Sequence[Edit]]) -> None:
    """Refuse a grid without points, or a function that its points do not fit."""
    if not grid:
        raise ValueError("a sweep needs at least one axis, for instance layer=range(8).")
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise ValueError(f"the axis {empty[0]!r} has no values; give at least one.")
    try:
        inspect.signature(point_to_edits).bind(**{name: values[0] for name, values in grid.items()})
    except TypeError:
        taken = ", ".join(inspect.signature(point_to_edits).parameters) or "nothing"
        raise ValueError(
            f"point_to_edits takes {taken}, and the axes are {', '.join(grid)}; its arguments must be named like the "
            "axes."
        ) from None


def values_of_axis(name: str, values: Any) -> list[Any]:
    """The values of an axis, each a number or a name, so that results can be found by them.

    Raises:
        TypeError: for a single value, or one that is no coordinate.
        ValueError: for a value that is there twice.
    """
    found = listed(values)
    if found is None:
        raise TypeError(f"the axis {name!r} is {told(values)}, and an axis is a list of values; write {name}=[...].")
    plain = [value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value for value in found]
    wrong = [value for value in plain if not isinstance(value, str | int | float | np.generic)]
    if wrong:
        raise TypeError(
            f"the axis {name!r} holds {told(wrong[0])}, and its values must be numbers or names, by which results are "
            "found; give names, and look up in point_to_edits what they stand for."
        )
    twice = [value for at, value in enumerate(plain) if value in plain[:at]]
    if twice:
        raise ValueError(f"the axis {name!r} holds {told(twice[0])} more than once; give each value once.")
    return plain


def edits_at(point: Mapping[str, Any], edits: Any) -> list[Edit]:
    """The edits of a point, as a list.

    Raises:
        TypeError: for a single edit, or what is no list.
    """
    if isinstance(edits, list | tuple):
        return list(edits)
    where = ", ".join(f"{name}={value!r}" for name, value in point.items())
    given = "one edit" if isinstance(edits, Edit) else told(edits)
    raise TypeError(f"point_to_edits returned {given} at {where}; it must return a list of edits, such as [edit].")
