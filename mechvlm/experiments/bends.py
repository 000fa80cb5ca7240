"""Is a curve over layers bent like a U?

Rule this module guards: a shape is judged by layers that it was not fitted to.

>>> curves = xr.DataArray(np.tile([4.0, 1.0, 0.0, 1.0, 4.0], (4, 1)), dims=["prompt", "layer"])
>>> float(u_shape(curves).curvature.sel(end="mean").round(6))
4.0
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.curves import Seen, by_cluster, check_draws, curve_of, resampled

INTERVAL = "t over clusters for the curvature, else percentile bootstrap over clusters (narrow for few)"


def u_shape(
    values: xr.DataArray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Whether a curve over layers is bent like a U: how much better a parabola foretells a layer that it has not seen.

    Args:
        values, clusters: as in `find_zone`.
        level: of the intervals, which are over clusters and say nothing of other models' layers. That of the curvature
            is Student's t with one degree of freedom less than there are clusters. The others are percentiles of
            resampled clusters, which are too narrow where there are few: with 8 pictures of no bend at all such an
            interval leaves out the truth some 12 times in 100, and not 5.

    Returns:
        `gain`: 1 - (squared errors of the parabola) / (squared errors of a constant), each fitted to the mean curve
        without the layer whose value it is to give; at most 1, and 0 or less where the parabola is of no use.
        `over_line`: the same against a straight line instead of a constant, since a mere slope has a gain, too.
        `curvature`: what the parabola rises from the middle to either end, in the unit of the values; above 0 for a U.
        `bottom`: the layer where it is lowest or highest; not a number where the curvature's interval holds 0, as for a
        line. A gain over a fit without errors, of a flat curve or a line, is not a number either. All over `end`:
        "mean", "low" and "high"; `attrs["interval"]` says what the ends are. `shape`: "a U" where the intervals of
        curvature and `over_line` are above 0 and the bottom is between the first layer and the last; "no U" where one
        of these intervals is not above 0 anywhere, or the bottom's is all outside; and else "not surely a U".

    Raises:
        ValueError, TypeError: as `find_zone`.

    Example:
        >>> curves = np.array([[4.0, 1.1, 0.0, 0.9, 4.0], [4.1, 1.0, 0.0, 1.0, 3.9]] * 2)
        >>> mv.u_shape(xr.DataArray(curves, dims=["prompt", "layer"]))["shape"].item()
        'a U'

    Source:
        VIAR (github.com/aayambansal/VIAR) speaks of a U-shaped profile and gives no score. Errors of layers left out:
        Allen (1974), "The Relationship between Variable Selection and Data Augmentation" (PRESS).
    """
    _, seen = by_cluster(values, clusters)
    check_draws(level, resamples, seed)
    total = len(seen.counts)
    x = np.linspace(-1, 1, seen.sums.shape[1])
    drawn = resampled(np.random.default_rng(seed), np.arange(total), total, resamples)
    curves = curve_of(seen, np.vstack([np.ones(total), drawn]))
    errors = [_left_out(curves, np.vander(x, degree + 1)) for degree in range(3)]
    slope, curvature = (np.linalg.lstsq(np.vander(x, 3), curves.T, rcond=None)[0][at] for at in (1, 0))
    nothing = 1e-12 * max(1e-300, float(np.abs(curves).max()))  # what rounding leaves of a curve that has no bend
    errors = [np.where(each > nothing**2, each, np.nan) for each in errors[:2]] + errors[2:]
    bent = _bend(seen, x, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"gain": 1 - errors[2] / errors[0], "over_line": 1 - errors[2] / errors[1], "curvature": curvature}
        found["bottom"] = (1 - slope / (2 * curvature)) * (curves.shape[1] - 1) / 2
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    ends = {name: [each[0], *np.quantile(each[1:], quantiles)] for name, each in found.items()}
    ends["curvature"] = [curvature[0], *bent]
    if bent[0] <= nothing and bent[1] >= -nothing:
        ends["bottom"] = [np.nan] * 3
    about = {"level": level, "resamples": resamples, "seed": seed, "clusters": total, "interval": INTERVAL}
    result = xr.Dataset({name: ("end", each) for name, each in ends.items()}, {"end": ["mean", "low", "high"]}, about)
    return result.assign(shape=_shape(ends, len(x) - 1, nothing))


def _shape(ends: Mapping[str, Sequence[float]], last: int, nothing: float) -> str:
    """What the intervals make of a curve: a U, none, or neither for sure."""
    (bend, line), (bottom, low, high) = (ends[name] for name in ("curvature", "over_line")), ends["bottom"]
    if bend[1] > nothing and line[1] > 0 and 0 < bottom < last:
        return "a U"
    return "no U" if bend[2] <= nothing or line[2] <= 0 or high <= 0 or low >= last else "not surely a U"


def _bend(seen: Seen, x: Float[np.ndarray, " layer"], level: float) -> tuple[float, float]:
    """The ends of the t interval of the mean curve's bend, whose standard error is that of means of clusters."""
    from scipy.stats import t  # takes a while to import

    terms = np.linalg.pinv(np.vander(x, 3))[0]
    curve, total = curve_of(seen, np.ones(len(seen.counts))), len(seen.counts)
    off = (seen.sums - seen.counts[:, None] * curve) @ terms / seen.counts.sum()
    reach = float(t.ppf((1 + level) / 2, total - 1) * np.sqrt((off**2).sum() * total / (total - 1)))
    return float(curve @ terms) - reach, float(curve @ terms) + reach


def _left_out(
    curves: Float[np.ndarray, "curve layer"], terms: Float[np.ndarray, "layer term"]
) -> Float[np.ndarray, " curve"]:
    """The squared errors of a least-squares fit at each layer when it is left out, summed; by leverage."""
    hat = terms @ np.linalg.pinv(terms)
    return (((curves - curves @ hat.T) / (1 - np.diag(hat))) ** 2).sum(-1)
