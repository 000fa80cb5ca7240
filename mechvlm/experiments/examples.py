"""The same experiment on several prompts: each prompt's values are kept, and their mean has an interval.

Rule this module guards: nothing is averaged away. Results have an axis `prompt`, and the interval of a mean is over
prompts, or over clusters of them that are not independent, such as several questions about one picture.

>>> clean_values(vlm, [real, null], metric_of_each(yes, [real, null])).round(1).values
array([ 2.6, -5.8])
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.edits import Edit
from mechvlm.experiments.record import metric_name, metric_unit, record
from mechvlm.experiments.sweep import sweeping, valued
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, beside, together
from mechvlm.sites import listed, places, told
from mechvlm.units import each
from mechvlm.vlm import VLM

PositionsOf = Sequence[int] | Callable[[Prompt], Sequence[int]] | None
"""Positions of any prompt: the same ones of each, or a function from a prompt to its own; None for all."""
Points = Callable[..., list[Edit]]


def metric_of_each(metric: Metric | Sequence[Metric], prompts: Sequence[Prompt]) -> list[Metric]:
    """One metric for each prompt: the same for all, or those of a list.

    Raises:
        ValueError: for a list of another length.
        TypeError: for what is no metric, such as a word.

    Example:
        >>> [str(one) for one in metric_of_each(yes, [real, null])]
        ["logit_difference('yes', 'no')", "logit_difference('yes', 'no')"]
    """
    if callable(metric):
        return [metric] * len(prompts)
    given = listed(metric)
    if given is None or not all(map(callable, given)):
        raise TypeError(
            f"{told(metric)} is no metric; give mv.logit_difference('yes', 'no') or a function of logits (batch "
            "vocab), or a list with one for each prompt."
        )
    if len(given) != len(prompts):
        raise ValueError(
            f"{len(given)} metrics were given for {len(prompts)} prompts; give one for each, or one for all."
        )
    return list(given)


def positions_of(given: PositionsOf, prompt: Prompt) -> tuple[int, ...] | None:
    """A prompt's positions, as they were given or as a function of the prompt says; None for all.

    Example:
        >>> positions_of(lambda prompt: prompt.last, real)
        (48,)
    """
    chosen = given(prompt) if callable(given) else given
    return None if chosen is None else places("positions", chosen, all_by_none=True)


def said_of(positions: PositionsOf) -> str:
    """Positions in words, for a record.

    Example:
        >>> said_of(None), said_of([3, 4]), said_of(lambda prompt: prompt.last)
        ('all', '3, 4', 'as a function of the prompt')
    """
    if positions is None:
        return "all"
    return "as a function of the prompt" if callable(positions) else ", ".join(map(str, positions))


def clean_values(vlm: VLM, prompts: Sequence[Prompt], metrics: Sequence[Metric]) -> xr.DataArray:
    """Each prompt's metric without any edit but the model's own, over axis prompt."""
    found = [*together(vlm, (valued(vlm, *one) for one in zip(prompts, metrics, strict=True)))]
    return _clean(prompts, found)


def swept(
    vlm: VLM,
    prompts: Sequence[Prompt],
    points: Callable[[Prompt], Points],
    metrics: Sequence[Metric],
    batch_size: int | None = None,
    out: str | Path | None = None,
    **axes: Any,
) -> xr.DataArray:
    """A sweep of each prompt, with one axis more in front: prompt. In `attrs`, `engine`: how the points were run.

    Where the model runs elsewhere, all of it is one job.

    Args:
        points: from a prompt to its function from a point to edits.
        out: a folder; each prompt's sweep keeps its own results in it, by its number.

    Example:
        >>> cut = lambda prompt: lambda layer: [mv.cut_attention(layer, prompt.image, queries=prompt.last)]
        >>> swept(vlm, [real, null], cut, [yes, yes], layer=[0, 1]).dims
        ('prompt', 'layer')
    """

    def one(number: int) -> Work[xr.DataArray]:
        kept = None if out is None else Path(out) / f"prompt-{number}"
        return sweeping(vlm, prompts[number], points(prompts[number]), metrics[number], batch_size, kept, **axes)

    return _joined(prompts, each(vlm, prompts, one, out, ["swept"]))


def swept_and_clean(
    vlm: VLM,
    prompts: Sequence[Prompt],
    points: Callable[[Prompt], Points] | Sequence[Callable[[Prompt], Points]],
    metrics: Sequence[Metric],
    batch_size: int | None = None,
    out: str | Path | None = None,
    **axes: Any,
) -> tuple[xr.DataArray, xr.DataArray]:
    """What `swept` and `clean_values` return, elsewhere as one job.

    Args:
        points: as in `swept`, or one for each prompt, since a prompt may be there twice.
        vlm, prompts, metrics, batch_size, out, axes: as in `swept`.
    """

    def one(number: int) -> Work[list[Any]]:
        kept = None if out is None else Path(out) / f"prompt-{number}"
        about, own = (vlm, prompts[number]), points if callable(points) else points[number]
        sweep = sweeping(*about, own(prompts[number]), metrics[number], batch_size, kept, **axes)
        return beside([sweep, valued(*about, metrics[number])])

    found = each(vlm, prompts, one, out, ["swept"])
    return _joined(prompts, [sweep for sweep, _ in found]), _clean(prompts, [value for _, value in found])


def _clean(prompts: Sequence[Prompt], values: Sequence[float]) -> xr.DataArray:
    return xr.DataArray(values, dims=["prompt"], coords=prompt_coordinates(prompts), name="clean")


def _joined(prompts: Sequence[Prompt], found: Sequence[xr.DataArray]) -> xr.DataArray:
    """Sweeps of prompts as one."""
    along = prompt_coordinates(prompts)
    joined = xr.concat(found, xr.Variable("prompt", along["prompt"]), combine_attrs="drop")
    engines = "; ".join(dict.fromkeys(str(one.attrs["engine"]) for one in found))
    return joined.assign_coords(along).assign_attrs(engine=engines)


def prompt_coordinates(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The coordinates of an axis of prompts: their numbers and their words."""
    words = np.array([prompt.words for prompt in prompts], dtype=str)
    return {"prompt": np.arange(len(prompts)), "question": ("prompt", words)}


def averaged(values: xr.DataArray, clusters: Sequence[Hashable] | None = None) -> dict[str, xr.DataArray]:
    """The `mean` over prompts, and `low` and `high`, the ends of its 95% interval.

    The ends are not numbers where prompts make fewer than two clusters.

    Raises:
        ValueError: for clusters of another number of prompts.
    """
    apart = {dim: f"over {dim}" for dim in values.dims if dim != "prompt"}  # its variables have names of their own
    back = {other: dim for dim, other in apart.items()}
    found = mean_interval(values.rename(apart), "prompt", clusters)
    return {name: found[name].rename(back) for name in ("mean", "low", "high")}


def about(
    vlm: VLM,
    prompts: Sequence[Prompt],
    metrics: Sequence[Metric],
    clusters: Sequence[Hashable] | None,
    **more: str | int | float,
) -> dict[str, Any]:
    """The `attrs` of a result over prompts: as `record`, with the metrics' names and what intervals are over."""
    named = "; ".join(dict.fromkeys(map(metric_name, metrics)))
    over = "prompts" if clusters is None else f"{len(set(clusters))} clusters of prompts"
    return {**record(vlm, prompts), "metric": named, "interval": f"95% interval, bootstrap over {over}", **more}


def unit_of(metrics: Sequence[Metric]) -> str:
    """The metrics' unit; several are named beside one another."""
    return "; ".join(dict.fromkeys(map(metric_unit, metrics)))


def labelled(found: Mapping[str, xr.DataArray], name: str, unit: str) -> dict[str, xr.DataArray]:
    """Variables with one meaning and unit.

    Example:
        >>> labelled({"mean": xr.DataArray(0.5)}, "effect", "logits")["mean"].attrs
        {'long_name': 'effect', 'units': 'logits'}
    """
    return {key: values.assign_attrs(long_name=name, units=unit) for key, values in found.items()}


def p_values(ranked: xr.DataArray, random: xr.DataArray, objective: str = "lower", dim: str = "sample") -> xr.DataArray:
    """The share of random sets that change a metric's mean over prompts as much or more, the set itself among them.

    Args:
        ranked: over prompt and other axes.
        random: the same with one axis more, `dim`.
        objective: "lower" where a change is a loss, "higher" where it is a gain.

    Example:
        >>> ranked = xr.DataArray([0.0], dims=["prompt"])
        >>> p_values(ranked, xr.DataArray([[1.0, 2.0, 3.0]], dims=["prompt", "sample"])).item()
        0.25

    Source:
        Phipson and Smyth (2010), "Permutation P-values Should Never Be Zero": one is added above and below.
    """
    mine, theirs = ranked.mean("prompt"), random.mean("prompt")
    same = 1e-6 * (1 + abs(mine))  # the same set, run in another batch, differs by rounding
    as_much = theirs <= mine + same if checked_objective(objective) == "lower" else theirs >= mine - same
    found = (as_much.sum(dim) + 1) / (random.sizes[dim] + 1)
    return found.assign_attrs(long_name="share of random sets that do as much", units="1: all")


def checked_objective(objective: str) -> str:
    """ "lower" or "higher".

    Raises:
        ValueError: for another word.
    """
    if objective not in ("lower", "higher"):
        raise ValueError(f"objective={objective!r} is not known; choose 'lower' or 'higher'.")
    return objective


def checked_mapping(what: str, given: Any, prompt: Prompt) -> dict[str, list[int]]:
    """Named positions of a prompt, as they were given or as a function of the prompt says.

    Raises:
        TypeError: for positions without names.
        ValueError: for none.
    """
    held = given(prompt) if callable(given) else given
    if not isinstance(held, Mapping) or any(listed(values) is None for values in held.values()):
        raise TypeError(f"{what}={told(held)} does not name positions; write for instance {{'image': prompt.image}}.")
    if not held:
        raise ValueError(f"{what} names no positions; give at least one name.")
    return {str(name): list(places("positions", values)) for name, values in held.items()}


def shared_names(what: str, named: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that every prompt's positions have.

    Raises:
        ValueError: where one prompt's are others.
    """
    other = next((one for one in named if set(one) != set(named[0])), None)
    if other is not None:
        raise ValueError(
            f"one prompt's {what} are {', '.join(named[0])}, and another's {', '.join(other)}; give all the same names."
        )
    return list(named[0])
