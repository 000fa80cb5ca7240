"""Whether a model is as often right as it is sure.

Rule this module guards: confidence is in the answer that was given, and what it is a probability of is said.

>>> round(reliability([0.9, 0.8], ["yes", "yes"]).ece.item(), 6)
0.15
"""

import numpy as np
import xarray as xr

from mechvlm.evaluate.items import Values, as_many, measured, shares_of_one, yes_answers
from mechvlm.sites import whole


def reliability(p_yes: Values, labels: Values, bins: int = 10) -> xr.Dataset:
    """How often answers are right, by how likely the model took them to be, and the expected calibration error.

    An item's answer is "yes" where its probability is above one half; its confidence is that answer's probability, from
    one half to 1, so that the lower half of the bins stays empty.

    Args:
        p_yes: P(yes) / (P(yes) + P(no)), one for each item.
        labels: "yes" or "no", in the same order.
        bins: how many, of equal width from 0 to 1.

    Returns:
        As `calibration` does.

    Raises:
        ValueError: for no probabilities, other labels, or other numbers of them.

    Example:
        >>> found = mv.evaluate.stats.reliability([0.95, 0.9, 0.15, 0.7], ["yes", "yes", "no", "no"])
        >>> found.n_items.values[6:].tolist()
        [1, 0, 2, 1]

    Source:
        Guo et al. (2017), "On Calibration of Modern Neural Networks", section 2.
    """
    shares, truth = shares_of_one("p_yes", p_yes), yes_answers("labels", labels)
    as_many(p_yes=shares, labels=truth)
    found = calibration(np.maximum(shares, 1 - shares), (shares > 0.5) == truth, bins)
    return found.assign_attrs(confidence="of the answer among yes and no: max(p_yes, 1 - p_yes)")


def calibration(confidence: Values, correct: Values, bins: int = 10) -> xr.Dataset:
    """How often answers are right in each of some bins of confidence, and the expected calibration error.

    Use it where confidence is anything else than `reliability` takes: VIAR's published bins are of the answer's
    probability among all words, which can be below one half.

    Args:
        confidence: the probability given to each item's answer.
        correct: whether it is right, in the same order.
        bins: how many, of equal width; each holds its upper end, and the first also 0.

    Returns:
        Over `bin`: `n_items`, and the means `confidence` and `accuracy`, not numbers in an empty bin; `lower` and
        `upper` ends. `ece` is a single number. It has no interval: drawn again, a calibration error comes out too
        large.

    Raises:
        ValueError: for no probabilities, other numbers of values, or no bins.

    Example:
        >>> mv.evaluate.stats.calibration([0.6, 0.6, 0.9], [True, False, True], bins=2).accuracy.values[1].round(3)
        np.float64(0.667)

    Source:
        Guo et al. (2017), "On Calibration of Modern Neural Networks", section 2.
    """
    sure, right = shares_of_one("confidence", confidence), measured("correct", correct)
    as_many(confidence=sure, correct=right)
    if whole("bins", bins) < 1:
        raise ValueError(f"bins={bins} holds nothing; give for instance 10.")
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, values, bins) / count for values in (sure, right)]
    held = count > 0
    error = expected_calibration_error(count[held], means[0][held], means[1][held])
    return xr.Dataset(
        {
            "n_items": ("bin", count, {"long_name": "items", "units": "1"}),
            "confidence": ("bin", means[0], {"long_name": "mean confidence", "units": "probability"}),
            "accuracy": ("bin", means[1], {"long_name": "accuracy", "units": "share"}),
            "ece": ((), error, {"long_name": "expected calibration error", "units": "1"}),
        },
        coords={"bin": np.arange(bins), "lower": ("bin", edges[:-1]), "upper": ("bin", edges[1:])},
        attrs={"bins": "of equal width, each with its upper end", "items": int(count.sum())},
    )


def expected_calibration_error(count: Values, confidence: Values, accuracy: Values) -> float:
    """The mean distance of accuracy from confidence over bins, each weighed by its items.

    Args:
        count: items in each bin; empty bins are left out.
        confidence: the mean confidence in each.
        accuracy: the share of right answers in each.

    Raises:
        ValueError: for other numbers of values, or no item in any bin.

    Example:
        >>> round(mv.evaluate.stats.expected_calibration_error([1, 3], [0.6, 0.9], [1.0, 0.8]), 3)
        0.175

    Source:
        Naeini et al. (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    items, sure, right = measured("count", count), measured("confidence", confidence), measured("accuracy", accuracy)
    as_many(count=items, confidence=sure, accuracy=right)
    if not items.sum() > 0:
        raise ValueError("no bin holds an item, so there is no calibration to measure.")
    return float((items * np.abs(sure - right)).sum() / items.sum())
