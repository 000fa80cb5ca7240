"""Means with intervals: how far a mean over examples may be off, where examples come in groups.

Rule this module guards: examples about one picture are not independent, so whole groups are drawn again, not examples.

>>> mean_interval(xr.DataArray([1.0, 2.0, 3.0, 4.0], dims="pair"), "pair")["mean"].item()
2.5
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.sites import listed, number, told, whole

CELLS_AT_ONCE = 2000
"""Means for which draws are held at once, which bounds the memory of an interval."""


def mean_interval(
    values: xr.DataArray,
    dim: str,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> xr.Dataset:
    """The mean along a dim with its bootstrap interval, where whole clusters are drawn with replacement.

    The mean is that of all values, so that large clusters weigh more. The interval is the percentile bootstrap's: it
    is somewhat too narrow for few clusters (less than some twenty), and has no width to give for one.

    Args:
        values: numbers; what is not a number is left out of its own mean.
        dim: the dim to average over, for instance "pair".
        clusters: what each value along `dim` belongs to, for instance the id of its picture; None: each stands alone.
        level: how often the interval holds the true mean, above 0 and below 1.
        resamples: how often clusters are drawn.
        seed: of the draws, which are the same for all other dims, so that differences between them mean something.
        weights: how much each value along `dim` counts, from 0; None: all alike. The mean of quotients, each weighed by
            its denominator, is the quotient of the means.

    Returns:
        `mean`, `low` and `high`, over the other dims; `low` and `high` are not a number where there is one cluster
        only. `count` says how many values each mean is of. (`found["mean"]`: `found.mean` is xarray's method.)

    Raises:
        ValueError: for a dim that is not there, another number of clusters than of values, or a level that is no share.
        TypeError: for values that are no DataArray.

    Example:
        >>> found = mv.mean_interval(xr.DataArray([0.0, 0.0, 1.0, 1.0], dims="pair"), "pair", clusters=[1, 1, 2, 2])
        >>> float(found.low), float(found["mean"]), float(found.high)
        (0.0, 0.5, 1.0)

    Source:
        Efron and Tibshirani (1993), "An Introduction to the Bootstrap", sections 8 and 13; clusters as in Davison and
        Hinkley (1997), "Bootstrap Methods and their Application", section 3.8.
    """
    groups = _groups(values, dim, clusters)
    if not 0 < number("level", level) < 1:
        raise ValueError(f"level={level} is no share; give for instance 0.95.")
    if whole("resamples", resamples) < 1:
        raise ValueError(f"resamples={resamples} draws nothing; give for instance 2000.")
    along = values.transpose(dim, ...)
    table = along.values.astype(float).reshape(len(groups), -1)
    there, total = np.isfinite(table), groups.max() + 1
    # With each cluster's sum and count, a mean of drawn clusters is a quotient of two products, for all cells at once.
    member = (groups == np.arange(total)[:, None]).astype(float)
    heavy = _weights(weights, len(groups))[:, None]
    sums, counts = member @ (heavy * np.where(there, table, 0.0)), member @ (heavy * there)
    drawn = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / total), resamples).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / counts.sum(0)
    ends = np.full((2, table.shape[1]), np.nan)
    for cells in np.array_split(np.flatnonzero((counts > 0).sum(0) > 1), 1 + table.shape[1] // CELLS_AT_ONCE):
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (drawn @ sums[:, cells]) / (drawn @ counts[:, cells])
        ends[:, cells] = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    other = along.isel({dim: 0}, drop=True)
    found = {"mean": mean, "low": ends[0], "high": ends[1], "count": there.sum(0)}
    result = xr.Dataset({name: other.copy(data=array.reshape(other.shape)) for name, array in found.items()})
    result["count"].attrs = {"long_name": "values", "units": "1"}
    about = {"level": level, "resamples": resamples, "seed": seed, "clusters": int(total), "averaged": dim}
    return result.assign_attrs(interval="percentile bootstrap over clusters", **about)


def with_intervals(found: xr.Dataset, clusters: Sequence[Any] | None = None, dim: str = "prompt") -> xr.Dataset:
    """A dataset with, beside each variable, its mean along a dim and the ends of its interval.

    Args:
        found: variables that all have the dim.
        clusters: see `mean_interval`.

    Returns:
        The same, and `NAME_mean`, `NAME_low` and `NAME_high` of each; `attrs["interval"]` says what interval.

    Example:
        >>> found = with_intervals(xr.Dataset({"gap": ("prompt", [1.0, 3.0])}))
        >>> float(found.gap_mean), float(found.gap_low), float(found.gap_high)
        (2.0, 1.0, 3.0)
    """
    more: dict[str, xr.DataArray] = {}
    for name, values in found.data_vars.items():
        interval = mean_interval(values, dim, clusters)
        more |= {f"{name}_{end}": interval[end].assign_attrs(values.attrs) for end in ("mean", "low", "high")}
    about = interval.attrs
    said = f"{about['level']:.0%} {about['interval'].replace('clusters', str(about['clusters']) + ' clusters')}"
    return found.assign(more).assign_attrs(interval=said)


def _weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """How much each of so many values counts."""
    if weights is None:
        return np.ones(count)
    given = np.array([number("weights:", weight) for weight in listed(weights) or ()])
    if len(given) != count or not (given >= 0).all() or not given.sum() > 0:
        raise ValueError(f"weights={told(weights)} must say for each of the {count} values how much it counts, from 0.")
    return given


def _groups(values: xr.DataArray, dim: str, clusters: Sequence[Any] | None) -> np.ndarray:
    """The number of the cluster of each value along a dim."""
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"{told(values)} is no DataArray; give values with a dim to average over.")
    if dim not in values.dims:
        raise ValueError(
            f"there is no dim {dim!r} to average over; the values have {', '.join(map(str, values.dims))}."
        )
    if not values.size:
        raise ValueError(f"the values have sizes {dict(values.sizes)}, so there is nothing to average.")
    if clusters is None:
        return np.arange(values.sizes[dim])
    given = listed(clusters)
    if given is None or len(given) != values.sizes[dim]:
        raise ValueError(
            f"clusters={told(clusters)} must name one cluster for each of the {values.sizes[dim]} values along {dim!r}."
        )
    names: dict[Any, int] = {}
    return np.array([names.setdefault(name, len(names)) for name in given])
