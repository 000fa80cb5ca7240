"""Curves over layers, one for each prompt, whose pictures are drawn again as a whole.

Rule this module guards: whatever is said of a mean curve can be said of the pictures of a half, or of a resample, by
counting pictures and never by copying values.

>>> seen = by_cluster(xr.DataArray(np.eye(4), dims=["prompt", "layer"]), None)[1]
>>> curve_of(seen, np.ones(4))
array([0.25, 0.25, 0.25, 0.25])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.sites import listed, number, told, whole

Curve = Float[np.ndarray, " layer"]
Times = Float[np.ndarray, " cluster"]
"""How often each cluster counts: 1 or 0 for one of a half, or how often it is drawn."""


@dataclass(frozen=True)
class Seen:
    """Values summed over the prompts of each cluster, and how many prompts each cluster has."""

    sums: Float[np.ndarray, "cluster layer"]
    counts: Float[np.ndarray, " cluster"]


def by_cluster(values: xr.DataArray, clusters: Sequence[Any] | np.ndarray | None) -> tuple[xr.DataArray, Seen]:
    """Values over prompt and layer with their axes in order, and the same by cluster.

    Raises:
        ValueError: for other axes, layers with gaps, values that are not numbers, or fewer than four clusters.
        TypeError: for values that are no DataArray.

    Example:
        >>> by_cluster(xr.DataArray(np.ones((8, 4)), dims=["prompt", "layer"]), [1, 1, 2, 2, 3, 3, 4, 4])[1].counts
        array([2., 2., 2., 2.])
    """
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"{told(values)} is no DataArray; give values over prompt and layer.")
    if set(values.dims) != {"prompt", "layer"}:
        raise ValueError(
            f"the values have {', '.join(map(str, values.dims)) or 'no axes'}; give them over prompt and layer, for "
            "instance profile.vis_l.sel(quantity='mass')."
        )
    table = values.transpose("prompt", "layer")
    if "layer" not in table.coords:
        table = table.assign_coords(layer=np.arange(table.sizes["layer"]))
    layers = table.layer.values
    if table.sizes["layer"] < 4 or not np.array_equal(layers, np.arange(layers[0], layers[0] + len(layers))):
        raise ValueError(
            f"the values are of layers {', '.join(map(str, layers))}; give at least four, one after the other."
        )
    if not np.isfinite(table.values).all():
        empty = layers[~np.isfinite(table.values).all(0)]
        raise ValueError(
            f"the values of layers {', '.join(map(str, empty))} are not all numbers; give layers that have them."
        )
    given = list(range(table.sizes["prompt"])) if clusters is None else listed(clusters)
    if given is None or len(given) != table.sizes["prompt"]:
        raise ValueError(
            f"clusters={told(clusters)} must name one cluster for each of the {table.sizes['prompt']} prompts."
        )
    names = list(dict.fromkeys(given))
    if len(names) < 4:
        raise ValueError(f"the values are of {len(names)} clusters, and a test on halves needs at least 4 pictures.")
    member = np.array([[one == name for one in given] for name in names], dtype=float)
    return table, Seen(member @ table.values.astype(float), member.sum(1))


def curve_of(seen: Seen, times: Float[np.ndarray, "*some cluster"]) -> Float[np.ndarray, "*some layer"]:
    """The mean over prompts, where clusters count so many times.

    Example:
        >>> curve_of(Seen(np.array([[1.0, 2.0], [5.0, 6.0]]), np.array([1.0, 1.0])), np.array([1.0, 3.0]))
        array([4., 5.])
    """
    return (times @ seen.sums) / (times @ seen.counts)[..., None]


def resampled(
    draw: np.random.Generator, members: np.ndarray, total: int, resamples: int
) -> Float[np.ndarray, "resample cluster"]:
    """How often each of so many clusters is drawn in each resample of some of them.

    Example:
        >>> resampled(np.random.default_rng(0), np.array([0, 2]), 3, 5).sum(0)[1]
        np.float64(0.0)
    """
    times = np.zeros((resamples, total))
    times[:, members] = draw.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return times


def check_draws(level: float, resamples: int, seed: int) -> None:
    """Refuse a level that is no share, nothing to draw, and a seed that is none.

    Raises:
        ValueError: for these.
        TypeError: for what is no number at all.
    """
    check_level(level)
    if whole("resamples", resamples) < 1:
        raise ValueError(f"resamples={resamples} draws nothing; give for instance 1000.")
    check_seed(seed)


def check_seed(seed: int) -> int:
    """A seed as it is.

    Raises:
        ValueError: for a negative one.
        TypeError: for what is no whole number.

    Example:
        >>> check_seed(3)
        3
    """
    if whole("seed", seed) < 0:
        raise ValueError(f"seed={seed} is no seed of random draws; give 0 or more.")
    return seed


def check_level(level: float) -> None:
    """Refuse a level that is no share.

    Raises:
        ValueError: for these.
    """
    if not 0 < number("level", level) < 1:
        raise ValueError(f"level={level} is no share; give for instance 0.95.")
