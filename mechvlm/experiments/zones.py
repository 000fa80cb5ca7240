"""Is there a band of layers that pays the picture less than the layers around it? A test that may say no.

Rule this module guards: a zone that is found by looking at the data is never tested on the data it was found in. Some
curve always has a lowest stretch; whether it is there in pictures that were not looked at is another question.

>>> curve = np.array([3.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0]) + np.random.default_rng(0).normal(size=(40, 7)) / 5
>>> found = find_zone(xr.DataArray(curve, dims=["prompt", "layer"]))
>>> bool(found.found), int(found.start), int(found.stop)
(True, 2, 5)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.sites import listed, number, told, whole, whole_numbers

RULES = ("shoulders", "below_mean")
LEAST = 2
"""Layers that make a zone: a single low layer is none."""
Run = tuple[int, int] | None
Curve = Float[np.ndarray, " layer"]
Times = Float[np.ndarray, " cluster"]
"""How often each cluster counts: 1 or 0 for one of a half, or how often it is drawn."""


@dataclass(frozen=True)
class Seen:
    """Values summed over the prompts of each cluster, and how many prompts each cluster has."""

    sums: Float[np.ndarray, "cluster layer"]
    counts: Float[np.ndarray, " cluster"]


Choice = Callable[[Seen, Times], Run]


def find_zone(
    values: xr.DataArray,
    clusters: Sequence[Any] | None = None,
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
    which it is not (the larger of the two sides; 1 where no zone was chosen). Each split gives two, and the p-value of
    all is twice their median, which is careful rather than exact. A fixed list of layers is not chosen by data, so that
    all pictures test it, once. A dip that is real is found however shallow it is, where pictures are many: look at
    `gap`, too.

    Args:
        values: numbers over `prompt` and `layer`, for instance `profile.vis_l.sel(quantity="mass")`. The layer axis
            must have no gaps: values that are no numbers are refused.
        clusters: what prompts belong together, for instance `profile.cluster.values`; None: each stands alone. Halves
            and resamples are made of whole clusters.
        rule: "shoulders": the longest run of at least two layers of which each is below both layers next to the run, by
            more than chance (over pictures, in pairs, one-sided at `level`): else two peaks of noise would make one.
            "below_mean": the longest run below the mean over layers minus `c` standard deviations. Of runs of one
            length it is the one further below its neighbours; one that holds the first or the last layer has a
            shoulder missing and is none. Or layers, one after the other, such as range(8, 17); at the first or last
            layer these have one neighbour.
        c: of "below_mean".
        level: a zone is found where the p-value is at most 1 - level.
        splits: how often clusters are halved; of no use for fixed layers.
        resamples: of each half.
        seed: of splits and resamples.

    Returns:
        `found` (bool), `p_value`, and `start` and `stop`, the first layer of the zone and the first behind it; not
        numbers where none is found. `chosen_start` and `chosen_stop` are those that the rule chooses before any test
        (not numbers where it chooses none). `gap`: how far the zone's mean is below the lower of its neighbours, in the
        unit of the values: the median over the halves that were not chosen by, so that it owes nothing to the choice;
        for fixed layers of all pictures. `same`: in which share of resamples of all pictures the rule chooses the same
        layers again, and `in_zone`, over layer, in which share a layer is in what it chooses. `mean`, `low` and
        `high`, over layer: the curve, with its interval at each layer. `attrs` say how it was made.

    Raises:
        ValueError: for other rules or axes, values that are not numbers, too few layers, or fewer than four clusters.
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
    table, seen = _by_cluster(values, clusters)
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; choose 'shoulders' or 'below_mean', or give layers.")
    fixed = None if isinstance(rule, str) else _fixed(rule, table.layer.values)
    _check(level, splits, resamples)
    z = NormalDist().inv_cdf(level)
    named: dict[Any, Choice] = {"shoulders": partial(_shoulders, z=z), "below_mean": partial(_below, c=c)}
    choose: Choice = (lambda *_: fixed) if fixed else named[rule]
    draw, total = np.random.default_rng(seed), len(seen.counts)
    again, all_of_them = _drawn(draw, np.arange(total), total, resamples), np.ones(total)
    chosen = choose(seen, all_of_them)
    p_value, gap = _tested(seen, fixed, all_of_them, again) if fixed else _halves(seen, choose, draw, splits, resamples)
    runs = [choose(seen, times) for times in again]
    layers, found = table.layer.values, chosen is not None and p_value <= 1 - level
    inside = [np.mean([run is not None and run[0] <= at < run[1] for run in runs]) for at in range(len(layers))]
    ends = dict(zip(("chosen_start", "chosen_stop"), chosen or (np.nan, np.nan), strict=True))
    ends |= dict(zip(("start", "stop"), chosen if chosen and found else (np.nan, np.nan), strict=True))
    result = xr.Dataset({name: float(at + layers[0]) for name, at in ends.items()}, {"layer": layers})
    same = float(np.mean([run == chosen for run in runs])) if chosen else 0.0
    result = result.assign(found=found, p_value=p_value, gap=gap, same=same)
    ends_of = np.quantile(_curve(seen, again), [(1 - level) / 2, (1 + level) / 2], axis=0)
    for name, curve in zip(("mean", "low", "high"), (_curve(seen, all_of_them), *ends_of), strict=True):
        result[name] = ("layer", curve, {"long_name": values.name or "value", **values.attrs})
    result["in_zone"] = ("layer", inside, {"long_name": "resamples with the layer in the zone", "units": "share"})
    test = "all pictures" if fixed else "chosen by one half of the pictures, tested on the other; twice the median p"
    about: dict[str, Any] = {"rule": f"layers {told(rule)}" if fixed else rule, "c": c, "test": test, "level": level}
    about |= {"quantity": str(values.quantity.item())} if "quantity" in values.coords else {}
    return result.assign_attrs(about, splits=splits, resamples=resamples, seed=seed, clusters=total)


def u_shape(
    values: xr.DataArray,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Whether a curve over layers is bent like a U: how much better a parabola foretells a layer that it has not seen.

    Args:
        values, clusters: as in `find_zone`.
        level: of the intervals, which are those of resampled clusters and say nothing of other models' layers.

    Returns:
        `gain`: 1 - (squared errors of the parabola) / (squared errors of a constant), each fitted to the mean curve
        without the layer whose value it is to give; at most 1, and 0 or less where the parabola is of no use.
        `over_line`: the same against a straight line instead of a constant, since a mere slope has a gain, too.
        `curvature`: what the parabola rises from the middle to either end, in the unit of the values; above 0 for a U.
        `bottom`: the layer where it is lowest or highest. All over `end`: "mean", "low" and "high".

    Raises:
        ValueError, TypeError: as `find_zone`.

    Example:
        >>> curves = np.array([[4.0, 1.1, 0.0, 0.9, 4.0], [4.1, 1.0, 0.0, 1.0, 3.9]] * 2)
        >>> mv.u_shape(xr.DataArray(curves, dims=["prompt", "layer"])).curvature.sel(end="mean").item() > 0
        True

    Source:
        VIAR (github.com/aayambansal/VIAR) speaks of a U-shaped profile and gives no score. Errors of layers left out:
        Allen (1974), "The Relationship between Variable Selection and Data Augmentation" (PRESS).
    """
    _, seen = _by_cluster(values, clusters)
    _check(level, 1, resamples)
    total = len(seen.counts)
    drawn = _drawn(np.random.default_rng(seed), np.arange(total), total, resamples)
    curves = _curve(seen, np.vstack([np.ones(total), drawn]))
    x = np.linspace(-1, 1, curves.shape[1])
    errors = [_left_out(curves, np.vander(x, degree + 1)) for degree in range(3)]
    slope, curvature = (np.linalg.lstsq(np.vander(x, 3), curves.T, rcond=None)[0][at] for at in (1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"gain": 1 - errors[2] / errors[0], "over_line": 1 - errors[2] / errors[1], "curvature": curvature}
        found["bottom"] = (1 - slope / (2 * curvature)) * (curves.shape[1] - 1) / 2
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    ends = {name: [each[0], *np.quantile(each[1:], quantiles)] for name, each in found.items()}
    about = {"level": level, "resamples": resamples, "seed": seed, "clusters": total}
    return xr.Dataset({name: ("end", each) for name, each in ends.items()}, {"end": ["mean", "low", "high"]}, about)


def _check(level: float, splits: int, resamples: int) -> None:
    """Refuses a level that is no share, and nothing to draw."""
    if not 0 < number("level", level) < 1:
        raise ValueError(f"level={level} is no share; give for instance 0.95.")
    if whole("splits", splits) < 1 or whole("resamples", resamples) < 1:
        raise ValueError(f"splits={splits} and resamples={resamples} must both be 1 or more.")


def _by_cluster(values: xr.DataArray, clusters: Sequence[Any] | None) -> tuple[xr.DataArray, Seen]:
    """The values with their axes in order, and by cluster."""
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


def _fixed(rule: Any, layers: np.ndarray) -> tuple[int, int]:
    """Layers that were given, as the place of the first and of the first behind them."""
    chosen = whole_numbers("rule", rule)
    places = [int(np.flatnonzero(layers == layer)[0]) if layer in layers else -1 for layer in chosen]
    if not places or -1 in places or places != list(range(places[0], places[0] + len(places))):
        raise ValueError(
            f"rule={told(rule)} must be layers of the values, one after the other; they are {layers[0]} to "
            f"{layers[-1]}."
        )
    if len(places) == len(layers):
        raise ValueError(f"rule={told(rule)} holds all layers, so there are no others to compare with; give fewer.")
    return places[0], places[-1] + 1


def _shoulders(seen: Seen, times: Times, z: float) -> Run:
    """The longest run of layers each of which is below both layers next to the run, by more than chance."""
    curve = _curve(seen, times)
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
    return _longest(curve, [(first, behind) for first, behind in runs])


def _below(seen: Seen, times: Times, c: float) -> Run:
    """The longest run of layers below the mean over layers minus so many standard deviations."""
    curve = _curve(seen, times)
    low = np.r_[False, curve < curve.mean() - c * curve.std(), False]
    firsts, behinds = np.flatnonzero(low[1:] & ~low[:-1]), np.flatnonzero(low[:-1] & ~low[1:])
    runs = [(int(a), int(b)) for a, b in zip(firsts, behinds, strict=True) if b - a >= LEAST]
    return _longest(curve, [run for run in runs if run[0] > 0 and run[1] < len(curve)])


def _longest(curve: Curve, runs: Sequence[tuple[int, int]]) -> Run:
    """The longest run, of several the deepest."""
    return max(runs, key=lambda run: (run[1] - run[0], min(_gaps(curve, run))), default=None)


def _gaps(curves: Float[np.ndarray, "*some layer"], run: tuple[int, int]) -> list[Any]:
    """How far a run's mean is below the layer before it and the layer behind it, where there are such."""
    inside = curves[..., run[0] : run[1]].mean(-1)
    beside = [at for at in (run[0] - 1, run[1]) if 0 <= at < curves.shape[-1]]
    return [curves[..., at] - inside for at in beside]


def _curve(seen: Seen, times: Float[np.ndarray, "*some cluster"]) -> Float[np.ndarray, "*some layer"]:
    """The mean over prompts, where clusters count so many times."""
    return (times @ seen.sums) / (times @ seen.counts)[..., None]


def _drawn(
    draw: np.random.Generator, members: np.ndarray, total: int, resamples: int
) -> Float[np.ndarray, "resample cluster"]:
    """How often each of so many clusters is drawn in each resample of some of them."""
    times = np.zeros((resamples, total))
    times[:, members] = draw.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return times


def _tested(
    seen: Seen, run: tuple[int, int], times: Times, drawn: Float[np.ndarray, "resample cluster"]
) -> tuple[float, float]:
    """The p-value of a run that owes nothing to these clusters, and how far it is below the lower of its neighbours."""
    above = [1 + int((gap <= 0).sum()) for gap in _gaps(_curve(seen, drawn), run)]
    return max(above) / (1 + len(drawn)), float(min(_gaps(_curve(seen, times), run)))


def _halves(seen: Seen, choose: Choice, draw: np.random.Generator, splits: int, resamples: int) -> tuple[float, float]:
    """Twice the median p-value of zones chosen by one half and tested on the other, and their median gap."""
    found, total = [], len(seen.counts)
    for _ in range(splits):
        mine = np.zeros(total)
        mine[draw.permutation(total)[: total // 2]] = 1.0
        for half in (mine, 1 - mine):
            run, other = choose(seen, half), np.flatnonzero(half == 0)
            drawn = _drawn(draw, other, total, resamples)
            found.append((1.0, np.nan) if run is None else _tested(seen, run, 1 - half, drawn))
    p_values, gaps = np.array(found).T
    there = gaps[np.isfinite(gaps)]
    return min(1.0, 2 * float(np.median(p_values))), float(np.median(there)) if len(there) else float("nan")


def _left_out(
    curves: Float[np.ndarray, "curve layer"], terms: Float[np.ndarray, "layer term"]
) -> Float[np.ndarray, " curve"]:
    """The squared errors of a least-squares fit at each layer when it is left out, summed; by leverage."""
    hat = terms @ np.linalg.pinv(terms)
    return (((curves - curves @ hat.T) / (1 - np.diag(hat))) ** 2).sum(-1)
