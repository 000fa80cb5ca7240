"""What is said of circuits once they have run: shares of a behaviour, areas under curves, means over examples.

Rule this module guards: a mean over examples is a quotient of means, so that no example decides in which the model has
next to nothing to lose.

>>> shares(np.array([[1.0, 3.0]]), np.array([5.0]), np.array([1.0])).tolist()
[[0.0, 0.5]]
"""

from collections.abc import Hashable, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.curves import resampled
from mechvlm.experiments.examples import p_values
from mechvlm.experiments.uncertainty import mean_interval

SAME = 1e-5
"""Answers closer than this, to their size and one, are the same."""
AVERAGED = ("faithfulness", "completeness")
RESAMPLES = 2000
FEWEST = 2
"""Circuits between none and all edges, of which there is a curve."""


def shares(
    metric: Float[np.ndarray, "prompt ..."],
    every: Float[np.ndarray, " prompt"],
    none: Float[np.ndarray, " prompt"],
) -> Float[np.ndarray, "prompt ..."]:
    """(metric - none) / (every - none); not numbers where the two are the same.

    Args:
        metric: of circuits.
        every, none: of all edges, and of none.
    """
    gap = every - none
    unit = np.where(np.abs(gap) > SAME * (1 + np.maximum(np.abs(every), np.abs(none))), gap, np.nan)
    along = (len(gap), *[1] * (metric.ndim - 1))
    return (metric - none.reshape(along)) / unit.reshape(along)


def areas(
    share: Float[np.ndarray, " circuit"], faithfulness: Float[np.ndarray, "prompt circuit"]
) -> Float[np.ndarray, "2 prompt"]:
    """The areas CPR and CMD of each example's curve; not numbers where shares fall from circuit to circuit.

    Of a single circuit there is no curve, and its area would be that of two straight lines: not a number either.

    CPR is the area under faithfulness f(k) over the share k of edges from 0 to 1, CMD that of |1 - f(k)|, both by
    trapezoids between the circuits, with f(0) = 0 and f(1) = 1. Of circuits of one share, as two are of which the
    larger has more edges on no path, the first counts, and all have to be as faithful.

    Example:
        >>> areas(np.array([0.25, 0.5]), np.array([[0.5, 1.0]])).tolist()
        [[0.75], [0.25]]

    Source:
        Mueller et al. (2025), "MIB: A Mechanistic Interpretability Benchmark", section 3.
    """
    inner = (share > 0) & (share < 1)
    inner[1:] &= np.diff(share) > 0
    same = np.diff(share) == 0
    few = inner.sum() < FEWEST
    moved = np.abs(np.diff(faithfulness))[:, same]
    if few or not np.isfinite(share).all() or (np.diff(share) < 0).any() or (moved > SAME * 100).any():
        return np.full((2, len(faithfulness)), np.nan)
    ends = np.zeros((len(faithfulness), 1)), np.ones((len(faithfulness), 1))
    curve = np.concatenate([ends[0], faithfulness[:, inner], ends[1]], axis=1)
    at = np.array([0.0, *share[inner], 1.0])
    return np.stack([np.trapezoid(curve, at, axis=1), np.trapezoid(np.abs(1 - curve), at, axis=1)])


def mean_areas(
    share: Float[np.ndarray, " circuit"],
    faithfulness: Float[np.ndarray, "prompt circuit"],
    weights: Float[np.ndarray, " prompt"],
    clusters: Sequence[Hashable] | None = None,
) -> Float[np.ndarray, "area end"]:
    """The areas CPR and CMD of the mean curve, each with the low and the high end of its 95% interval.

    CMD of the mean curve is at most the mean of the examples' own, whose curves may lie above 1 as well as below.

    Args:
        weights: how much each example counts.
        clusters: what examples belong together; whole clusters are drawn again.

    Example:
        >>> mean_areas(np.array([0.25, 0.5]), np.array([[0.5, 1.5], [0.5, 0.5]]), np.ones(2))[:, 0].tolist()
        [0.75, 0.25]
    """
    names = list(range(len(weights)) if clusters is None else clusters)
    groups = list(dict.fromkeys(names))
    member = np.array([[one == name for one in names] for name in groups], dtype=float) * weights
    there = np.isfinite(faithfulness)
    sums, counts = member @ np.where(there, faithfulness, 0.0), member @ there
    draws = resampled(np.random.default_rng(0), np.arange(len(groups)), len(groups), RESAMPLES)
    times = np.concatenate([np.ones((1, len(groups))), draws if len(groups) > 1 else draws * np.nan])
    with np.errstate(invalid="ignore", divide="ignore"):
        found = areas(share, (times @ sums) / (times @ counts))
    known = [one[np.isfinite(one)] for one in found[:, 1:]]
    ends = [np.quantile(one, [0.025, 0.975]) if len(one) else np.full(2, np.nan) for one in known]
    return np.concatenate([found[:, :1], ends], axis=1)


def with_means(
    found: xr.Dataset, random: Float[np.ndarray, "prompt sample circuit"], clusters: Sequence[Hashable] | None
) -> xr.Dataset:
    """A result with the means of its shares and areas over prompts, and with random circuits beside.

    Args:
        found: `faithfulness` and `completeness` over prompt and circuit, whose `share` is a coordinate, `all` and
            `none`, `cpr` and `cmd` over prompt.
        random: faithfulness of random circuits.
        clusters: see `mean_interval`.
    """
    gaps = np.abs(found["all"].values - found["none"].values)
    heavy = gaps if gaps.sum() > 0 else np.ones_like(gaps)
    more: dict[str, xr.DataArray] = {}
    for name in AVERAGED:
        over = mean_interval(found[name], "prompt", clusters, weights=heavy.tolist())
        more |= {f"{name}_{end}": over[end].assign_attrs(found[name].attrs) for end in ("mean", "low", "high")}
    over_curve = mean_areas(found["share"].values, found["faithfulness"].values, heavy, clusters)
    for name, values in zip(("cpr", "cmd"), over_curve, strict=True):
        ends = zip(("mean", "low", "high"), values, strict=True)
        more |= {f"{name}_{end}": xr.DataArray(value, attrs=found[name].attrs) for end, value in ends}
    result = found.assign(more)
    if not random.shape[1]:
        return result
    drawn = xr.DataArray(random, dims=["prompt", "sample", "circuit"], coords={"sample": np.arange(random.shape[1])})
    result["random"] = drawn.weighted(xr.DataArray(heavy, dims="prompt")).mean("prompt")
    mine = result["faithfulness_mean"].expand_dims("prompt")
    better = p_values(mine, result["random"].expand_dims("prompt"), "higher")
    result["p_value"] = better.where(mine.isel(prompt=0).notnull())
    result["random"].attrs = {"long_name": "faithfulness of random circuits", "units": "1: all"}
    return result
