"""Is there a band of layers that pays the picture less than the layers around it? A test that may say no.

Rule this module guards: a zone that is found by looking at the data is never tested on the data it was found in. Some
curve always has a lowest stretch; whether it is there in pictures that were not looked at is another question.

>>> curve = np.array([3.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0]) + np.random.default_rng(0).normal(size=(40, 7)) / 5
>>> found = find_zone(xr.DataArray(curve, dims=["prompt", "layer"]))
>>> bool(found.found), int(found.start), int(found.stop)
(True, 2, 5)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.curves import Curve, Seen, Times, by_cluster, check_draws, curve_of, resampled
from mechvlm.sites import listed, number, told, whole, whole_numbers

RULES = ("shoulders", "below_mean")
LEAST = 2
"""Layers that make a zone: a single low layer is none."""
ALIKE = 0.5
"""The share of common layers from which a half's band is the one that all pictures choose."""


@dataclass(frozen=True)
class Band:
    """Layers by their place, the first and the first behind them, and those that they are compared with."""

    start: int
    stop: int
    shoulders: tuple[int, ...]


Run = Band | None
Choice = Callable[[Seen, Times], Run]


def find_zone(
    values: xr.DataArray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    rule: str | Sequence[int] = "shoulders",
    c: float = 0.5,
    level: float = 0.95,
    splits: int = 50,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """The longest band of layers below its neighbours, and whether it holds in pictures it was not chosen by.

    The zone that is told is chosen by the mean curve of all prompts. Whether there is one at all is tested on halves:
    it is chosen by one half of the pictures, and in the other half the mean over its layers has to be below the layer
    before it and below the layer behind it. The half's p-value is the share of bootstrap resamples of its pictures in
    which it is not, the larger of the two sides; it is 1 where the half chose no layers, or others than the zone that
    is told, with less than half of all layers of the two in common. With m pictures in the half it is never below m to
    the power of -m, the share of resamples that hold one picture alone: so with 6 pictures in all nothing is found at a
    level of 0.95. Each split gives two, and the p-value of all is twice their median, which is careful rather than
    exact. A fixed list of layers is not chosen by data, so that all pictures test it, once, by a bootstrap that finds
    somewhat too much in very few pictures (4 to 8): have more, or take a higher level. A dip that is real is found
    however shallow it is, where pictures are many: look at `gap`, too.

    Args:
        values: numbers over `prompt` and `layer`, for instance `profile.vis_l.sel(quantity="mass")`. The layer axis
            must have no gaps: values that are no numbers are refused.
        clusters: what prompts belong together, for instance `profile.cluster.values`; None: each stands alone. Halves
            and resamples are made of whole clusters.
        rule: "shoulders": the longest run of at least two layers of which each is below both layers next to the run, by
            more than chance (over pictures, in pairs, one-sided at `level`): else two peaks of noise would make one.
            "below_mean": the longest run below the mean over layers minus `c` standard deviations. Of runs of one
            length it is the one further below its neighbours; one that holds the first or the last layer has a
            shoulder missing and is none. It is compared with the nearest layers on both sides that are above the mean,
            since those next to it may belong to one flat bottom with it; where a bottom is more than half of all
            layers, halves choose different pieces of it, and "shoulders" finds more. Or layers, one after the other,
            such as range(8, 17); at the first or last layer these have one neighbour.
        c: of "below_mean".
        level: a zone is found where the p-value is at most 1 - level.
        splits: how often clusters are halved; of no use for fixed layers.
        resamples: of each half.
        seed: of splits and resamples.

    Returns:
        `found` (bool), `p_value` (1 where the rule chooses no layers), and `start` and `stop`, the first layer of the
        zone and the first behind it; not numbers where none is found. `chosen_start` and `chosen_stop` are those that
        the rule chooses before any test (not numbers where it chooses none). `gap`: how far the mean of the chosen
        layers is below the lower of the two layers that they are compared with, in the unit of the values, by all
        pictures; the choice makes it somewhat large. `gap_unseen` is the same in halves that did not choose (of what
        the other half chose in its place): their median, which owes nothing to the choice; not a number where no half
        chose alike. `same`: in which share of resamples of all pictures the rule chooses the same layers again, and
        `in_zone`, over layer, in which share a layer is in what it chooses. `mean`, `low` and `high`, over layer: the
        curve, with its interval at each layer. `attrs` say how it was made.

    Raises:
        ValueError: for other rules or axes, values that are not numbers, too few layers, fewer than four clusters, or
            nothing to draw.
        TypeError: for values that are no DataArray.

    Example:
        >>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:8]]
        >>> profile = mv.layer_profile(vlm, asked)
        >>> zone = mv.find_zone(profile.vis_l.sel(quantity="mass"), profile.cluster.values, splits=5)
        >>> zone.in_zone.dims
        ('layer',)

    Source:
        VIAR (github.com/aayambansal/VIAR) writes its zones by hand (layers 8 to 16 of LLaVA-1.5), and older code of it
        takes layers below the mean minus half a standard deviation; the test is this package's. Twice the median of
        p-values of splits: Meinshausen, Meier and Buehlmann (2009), "p-Values for High-Dimensional Regression".
    """
    table, seen = by_cluster(values, clusters)
    layers, fixed = table.layer.values, _checked(rule, c, table.layer.values)
    check_draws(level, resamples, seed)
    if whole("splits", splits) < 1:
        raise ValueError(f"splits={splits} halves nothing; give for instance 50.")
    z = NormalDist().inv_cdf(level)
    named: dict[Any, Choice] = {"shoulders": partial(_shoulders, z=z), "below_mean": partial(_below, c=c)}
    choose: Choice = (lambda *_: fixed) if fixed else named[rule]
    draw, total = np.random.default_rng(seed), len(seen.counts)
    again, everything = resampled(draw, np.arange(total), total, resamples), np.ones(total)
    band = choose(seen, everything)
    p_value, gap = _tested(seen, band, everything, again) if band else (1.0, np.nan)
    unseen = gap
    if band and not fixed:
        p_value, unseen = _halves(seen, choose, band, draw, splits, resamples)
    test = "all pictures" if fixed else "chosen by one half of the pictures, tested on the other; twice the median p"
    about: dict[str, Any] = {"rule": f"layers {told(rule)}" if fixed else rule, "c": c, "test": test, "level": level}
    about |= {"quantity": str(values.quantity.item())} if "quantity" in values.coords else {}
    result = _again(xr.Dataset({}, {"layer": layers}, about), band, [choose(seen, times) for times in again])
    result = _named(result, band, p_value <= 1 - level)
    result = result.assign(p_value=p_value, gap=gap, gap_unseen=unseen)
    ends_of = np.quantile(curve_of(seen, again), [(1 - level) / 2, (1 + level) / 2], axis=0)
    for name, curve in zip(("mean", "low", "high"), (curve_of(seen, everything), *ends_of), strict=True):
        result[name] = ("layer", curve, {"long_name": values.name or "value", **values.attrs})
    return result.assign_attrs(splits=splits, resamples=resamples, seed=seed, clusters=total)


def _named(result: xr.Dataset, band: Run, held: bool) -> xr.Dataset:
    """The same with the layers of the band, and of the zone where it held."""
    first, nan = float(result.layer[0]), float("nan")
    chosen = (nan, nan) if band is None else (first + band.start, first + band.stop)
    start, stop = chosen if held else (nan, nan)
    return result.assign(
        chosen_start=chosen[0], chosen_stop=chosen[1], start=start, stop=stop, found=held and band is not None
    )


def _again(result: xr.Dataset, band: Run, runs: Sequence[Run]) -> xr.Dataset:
    """The same with how often resamples choose the band, and each layer."""
    held = [(run.start, run.stop) if run else (0, 0) for run in runs]
    inside = [np.mean([start <= at < stop for start, stop in held]) for at in range(result.sizes["layer"])]
    result["same"] = float(np.mean([one == (band.start, band.stop) for one in held])) if band else 0.0
    result["in_zone"] = ("layer", inside, {"long_name": "resamples with the layer in the zone", "units": "share"})
    return result


def _checked(rule: Any, c: float, layers: np.ndarray) -> Run:
    """Layers that were given, where a rule is not one of `RULES`."""
    if not math.isfinite(number("c", c)):
        raise ValueError(f"c={c} gives no threshold; give a number of standard deviations, for instance 0.5.")
    if (isinstance(rule, str) and rule not in RULES) or (not isinstance(rule, str) and listed(rule) is None):
        raise ValueError(f"rule={told(rule)} is not known; choose 'shoulders' or 'below_mean', or give layers.")
    return None if isinstance(rule, str) else _fixed(rule, layers)


def _fixed(rule: Any, layers: np.ndarray) -> Band:
    """Layers that were given, as places, with the layers beside them."""
    chosen = whole_numbers("rule", rule)
    places = [int(np.flatnonzero(layers == layer)[0]) if layer in layers else -1 for layer in chosen]
    if not places or -1 in places or places != list(range(places[0], places[0] + len(places))):
        raise ValueError(
            f"rule={told(rule)} must be layers of the values, one after the other; they are {layers[0]} to "
            f"{layers[-1]}."
        )
    if len(places) == len(layers):
        raise ValueError(f"rule={told(rule)} holds all layers, so there are no others to compare with; give fewer.")
    beside = (places[0] - 1, places[-1] + 1)
    return Band(places[0], places[-1] + 1, tuple(at for at in beside if 0 <= at < len(layers)))


def _shoulders(seen: Seen, times: Times, z: float) -> Run:
    """The longest run of layers each of which is below both layers next to the run, by more than chance."""
    curve = curve_of(seen, times)
    off = np.sqrt(times)[:, None] * (seen.sums - seen.counts[:, None] * curve)
    # The error is that of all pictures, also in a half, so that both look for dips of one depth.
    spread = off.T @ off / (times @ seen.counts) ** 2 * times.sum() / len(times)
    error = np.sqrt(np.maximum(np.diag(spread)[:, None] + np.diag(spread) - 2 * spread, 0.0))
    below = curve[:, None] < curve - z * error  # layer shoulder
    layer, other = np.indices(below.shape)
    # Whether all layers from `first` to before `behind` are below the one at first - 1, and below the one at behind.
    before = np.roll(below.T, 1, axis=0) | (other < layer)  # first layer
    left = np.roll(np.logical_and.accumulate(before, axis=1), 1, axis=1)  # first behind
    right = np.logical_and.accumulate((below | (layer >= other))[::-1])[::-1]  # first behind
    runs = np.argwhere(left & right & (layer > 0) & (other - layer >= LEAST)).tolist()
    return _longest(curve, [Band(first, behind, (first - 1, behind)) for first, behind in runs])


def _below(seen: Seen, times: Times, c: float) -> Run:
    """The longest run of layers below the mean over layers minus so many standard deviations.

    Its shoulders are the nearest layers on either side that are above the mean: those next to it may be of one flat
    bottom with it, on the other side of the threshold by chance.
    """
    curve = curve_of(seen, times)
    low = np.r_[False, curve < curve.mean() - c * curve.std(), False]
    firsts, behinds = np.flatnonzero(low[1:] & ~low[:-1]), np.flatnonzero(low[:-1] & ~low[1:])
    above = np.flatnonzero(curve > curve.mean())
    runs = [Band(a, b, (a - 1, b)) for a, b in zip(firsts.tolist(), behinds.tolist(), strict=True) if b - a >= LEAST]
    run = _longest(curve, [run for run in runs if (above < run.start).any() and (above >= run.stop).any()])
    beside = (above[above < run.start][-1], above[above >= run.stop][0]) if run else ()
    return run and Band(run.start, run.stop, tuple(map(int, beside)))


def _longest(curve: Curve, runs: Sequence[Band]) -> Run:
    """The longest run, of several the deepest."""
    return max(runs, key=lambda run: (run.stop - run.start, min(_gaps(curve, run))), default=None)


def _gaps(curves: Float[np.ndarray, "*some layer"], run: Band) -> list[Any]:
    """How far a run's mean is below each of its shoulders."""
    inside = curves[..., run.start : run.stop].mean(-1)
    return [curves[..., at] - inside for at in run.shoulders]


def _overlap(one: Band, other: Band) -> float:
    """The share of layers of either that are layers of both."""
    both = min(one.stop, other.stop) - max(one.start, other.start)
    return max(0, both) / (max(one.stop, other.stop) - min(one.start, other.start))


def _tested(seen: Seen, run: Band, times: Times, drawn: Float[np.ndarray, "resample cluster"]) -> tuple[float, float]:
    """The p-value of a run that owes nothing to these clusters, and how far it is below the lower of its shoulders."""
    above = [1 + int((gap <= 0).sum()) for gap in _gaps(curve_of(seen, drawn), run)]
    pictures = np.count_nonzero(times)
    p_value = max(max(above) / (1 + len(drawn)), float(pictures) ** -pictures)
    return p_value, float(min(_gaps(curve_of(seen, times), run)))


def _halves(
    seen: Seen, choose: Choice, band: Band, draw: np.random.Generator, splits: int, resamples: int
) -> tuple[float, float]:
    """Twice the median p-value of a band that is chosen by one half and tested on the other, and its median gap.

    Where a half chooses no layers, or others than the band, it says nothing for the band: p is 1.
    """
    found, total = [], len(seen.counts)
    for _ in range(splits):
        mine = np.zeros(total)
        mine[draw.permutation(total)[: total // 2]] = 1.0
        for half in (mine, 1 - mine):
            run, other = choose(seen, half), np.flatnonzero(half == 0)
            if run is None or _overlap(run, band) < ALIKE:
                found.append((1.0, np.nan))
            else:
                found.append(_tested(seen, run, 1 - half, resampled(draw, other, total, resamples)))
    p_values, gaps = np.array(found).T
    there = gaps[np.isfinite(gaps)]
    return min(1.0, 2 * float(np.median(p_values))), float(np.median(there)) if len(there) else float("nan")
