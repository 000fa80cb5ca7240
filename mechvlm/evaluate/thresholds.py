"""What moving the threshold alone would do: yes wherever the margin, plus a shift, is above 0.

Rule this module guards: items with one margin get one answer. A yes-ratio that no threshold has is reached between the
two next to it, and what is said of it is the mean of both, weighed by how near each is.

>>> threshold_sweep([1.0, -1.0], ["yes", "yes"], shifts=[0, 2]).accuracy.values.tolist()
[0.5, 1.0]
"""

import numpy as np
import xarray as xr

from mechvlm.evaluate.draws import checked_draws, drawn_clusters, ends
from mechvlm.evaluate.items import Values, as_many, cluster_numbers, measured, yes_answers
from mechvlm.evaluate.scoring import METRICS, answer_table, measures
from mechvlm.sites import number

SHIFTS = tuple(float(shift) for shift in np.arange(-6, 6.25, 0.25))
"""Shifts of the margin that are tried, in logits."""

BETWEEN = "where no threshold has the yes-ratio, the mean of the two next to it, weighed by how near each is"
HELD = 500_000
"""Numbers held at once of margins drawn again."""


def threshold_sweep(margins: Values, labels: Values, shifts: Values = SHIFTS) -> xr.Dataset:
    """Scores of the same model with its threshold moved: yes where margin + shift is above 0.

    Args:
        margins: log P(yes) - log P(no), one for each item.
        labels: "yes" or "no", in the same order.
        shifts: what is added to every margin, in logits (nats).

    Returns:
        `accuracy`, `precision`, `recall`, `f1` and `yes_ratio` over `shift`. `attrs` tell the shift of the best
        accuracy, the nearest to 0 of several. It is the best on the very items that it is measured on.

    Raises:
        ValueError: for values that are not finite, other labels, or other numbers of them.

    Example:
        >>> found = mv.evaluate.stats.threshold_sweep([2.0, -0.5, -3.0], ["yes", "yes", "no"], shifts=[0, 1, 4])
        >>> found.accuracy.values.round(3).tolist(), found.attrs["best_shift"]
        ([0.667, 1.0, 0.667], 1.0)

    Source:
        VIAR's threshold comparison, which adds t to the logit of "yes".
    """
    numbers, truth, moved = measured("margins", margins), yes_answers("labels", labels), measured("shifts", shifts)
    as_many(margins=numbers, labels=truth)
    rows = []
    for shift in moved:
        # `numbers > -shift`, not `numbers + shift > 0`: a sum is rounded, and an order is not.
        rows.append(measures(answer_table(truth, np.where(numbers > -shift, "yes", "no")).sum(0)))
    table = np.stack(rows, 1)
    found = {name: ("shift", table[place], {"units": "1"}) for place, name in enumerate(METRICS) if name != "other"}
    accuracy = table[METRICS.index("accuracy")]
    best = min(np.flatnonzero(accuracy == accuracy.max()), key=lambda at: abs(moved[at]))
    axis = ("shift", moved, {"long_name": "shift of the margin", "units": "logits"})
    about = {"best_shift": float(moved[best]), "best_accuracy": float(accuracy[best]), "best": "on these very items"}
    return xr.Dataset(found, coords={"shift": axis}, attrs={"rule": "yes where margin + shift > 0", **about})


def matched_shift(margins: Values, yes_ratio: float) -> xr.Dataset:
    """The shift of the threshold with which a share of the items is answered "yes".

    Args:
        margins: log P(yes) - log P(no), one for each item.
        yes_ratio: the share wanted, from 0 to 1.

    Returns:
        `shift`, in logits, of the share nearest to the wanted one; `fewer` and `more`, the shifts with the largest
        share that is at most, and the smallest that is at least the wanted one; `fewer_ratio` and `more_ratio`, those
        shares; and `weight`, how much `more` counts, so that the mean of both shares is the one wanted. Between two
        margins all shifts are alike: it is 0 where that is among them, else the one in the middle.

    Raises:
        ValueError: for a share below 0 or above 1, or values that are not finite.

    Example:
        >>> found = mv.evaluate.stats.matched_shift([3.0, 1.0, -1.0, -5.0], 0.75)
        >>> found["shift"].item(), found.more_ratio.item()
        (3.0, 0.75)

    Source:
        The baseline that VIAR's effect on answers has to beat: caveat 10 of its reading.
    """
    numbers = measured("margins", margins)
    if not 0 <= number("yes_ratio", yes_ratio) <= 1:
        raise ValueError(f"yes_ratio={yes_ratio} is no share; give a number from 0 to 1.")
    steps, counts = np.unique(-numbers, return_counts=True)
    ratios = np.concatenate([[0.0], np.cumsum(counts) / len(numbers)])
    more = int(np.searchsorted(ratios, yes_ratio - 1e-12))
    fewer = more if ratios[more] <= yes_ratio + 1e-12 else more - 1
    gap = ratios[more] - ratios[fewer]
    weight = (yes_ratio - ratios[fewer]) / gap if gap else 0.0
    chosen = more if weight > 0.5 else fewer
    found = {
        **{"shift": _shift(steps, chosen), "fewer": _shift(steps, fewer), "more": _shift(steps, more)},
        **{"fewer_ratio": ratios[fewer], "more_ratio": ratios[more], "weight": weight},
    }
    return xr.Dataset(found, attrs={"rule": "yes where margin + shift > 0", "between": BETWEEN})


def matched_baseline(
    margins: Values,
    labels: Values,
    yes_ratio: float,
    clusters: Values | None = None,
    resamples: int = 2000,
    seed: int = 42,
    level: float = 0.95,
) -> xr.Dataset:
    """Scores of a model with its threshold moved until it says "yes" as often as is wanted.

    Whatever makes a model say "yes" more often has to be better than this, or it does no more than a threshold.

    Args:
        margins: log P(yes) - log P(no), one for each item.
        labels: "yes" or "no", in the same order.
        yes_ratio: the share wanted, from 0 to 1.
        clusters: what each item belongs to; None: each stands alone.
        resamples: how often clusters are drawn; the threshold is matched anew in each draw.
        seed: of the draws.
        level: how often an interval holds the true value.

    Returns:
        `value`, `low` and `high` over `metric`. Where no threshold has the yes-ratio, right and wrong answers are
        counted between the two next to it, as if items of one margin were answered "yes" by lot.

    Raises:
        ValueError: for values that are not finite, other labels, other numbers of them, or what is no share.

    Example:
        >>> found = mv.evaluate.stats.matched_baseline([2.0, 1.0, -1.0, -2.0], ["yes", "yes", "yes", "no"], 0.75)
        >>> found.value.sel(metric="accuracy").item()
        1.0

    Source:
        As `matched_shift`.
    """
    numbers, truth = measured("margins", margins), yes_answers("labels", labels)
    groups = cluster_numbers(clusters, as_many(margins=numbers, labels=truth))
    shift = matched_shift(numbers, yes_ratio)
    checked_draws(resamples, level)
    total = int(groups.max()) + 1
    drawn = drawn_clusters(total, resamples, seed)
    sums = moved_sums(numbers, truth, np.full(resamples, float(yes_ratio)), drawn, groups)
    low, high = ends(measures(sums), total, level)
    here = measures(moved_sums(numbers, truth, np.array([yes_ratio]), np.ones((1, total)), groups)[0])
    found = {"value": here, "low": low, "high": high}
    return xr.Dataset(
        {**{name: ("metric", array) for name, array in found.items()}, "shift": shift["shift"]},
        coords={"metric": list(METRICS)},
        attrs={"between": BETWEEN, "interval": "percentile bootstrap over clusters", "level": level, "seed": seed},
    )


def moved_sums(
    margins: np.ndarray, truth: np.ndarray, ratios: np.ndarray, drawn: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Sums of `answer_table`'s rows in each draw of clusters, with the threshold where the draw has its yes-ratio.

    Args:
        ratios: the yes-ratio wanted in each draw.
        drawn: how often each draw holds each cluster: draws by clusters.
        groups: the cluster of each item.
    """
    order = np.argsort(-margins, kind="stable")
    last = np.append(np.flatnonzero(np.diff(margins[order])), len(order) - 1)  # of items that share a margin
    right, place, found = truth[order].astype(float), groups[order], []
    held = max(1, HELD // len(order))
    for start in range(0, len(drawn), held):
        weights = drawn[start : start + held][:, place]
        said = np.cumsum(weights, 1)[:, last]
        hits = np.cumsum(weights * right, 1)[:, last]
        for at in range(len(weights)):
            items = said[at, -1]
            yes = ratios[start + at] * items
            hit = np.interp(yes, np.append(0.0, said[at]), np.append(0.0, hits[at]))
            positive = hits[at, -1]
            found.append([hit, yes - hit, items - positive - (yes - hit), positive, 0.0, items])
    return np.array(found)


def _shift(steps: np.ndarray, many: int) -> float:
    """A shift by which the items of so many of the highest margins are answered yes; `steps` are minus the margins."""
    # yes where margin > -shift: shifts above steps[many - 1], and up to steps[many].
    low = steps[many - 1] if many else -np.inf
    high = steps[many] if many < len(steps) else np.inf
    if low < 0 <= high:
        return 0.0
    if not many:
        return float(high)
    return float(np.nextafter(low, np.inf) if many == len(steps) else (low + high) / 2)
