"""How good answers are: accuracy, precision, recall, F1, the share of "yes", and the Brier score.

Rule this module guards: the yes-ratio is that of the predictions. Of the labels it would be one half whatever is said.

>>> scores(["yes", "no"], ["yes", "yes"]).value.sel(metric="yes_ratio").item()
1.0
"""

import numpy as np
import xarray as xr

from mechvlm.evaluate.draws import checked_draws, cluster_sums, drawn_clusters, drawn_sums, ends
from mechvlm.evaluate.items import Values, as_many, cluster_numbers, predictions, shares_of_one, yes_answers

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "other")
"""What is measured of answers; yes is the positive answer."""


def scores(
    labels: Values,
    predicted: Values,
    clusters: Values | None = None,
    resamples: int = 10_000,
    seed: int = 42,
    level: float = 0.95,
) -> xr.Dataset:
    """Accuracy, precision, recall, F1, yes-ratio and the share of other answers, with intervals over clusters.

    Yes is the positive answer. An answer that is neither yes nor no is wrong, and is in the yes-ratio as not "yes".

    Args:
        labels: "yes" or "no", one for each item.
        predicted: "yes", "no" or "other", in the same order.
        clusters: what each item belongs to, for instance its picture; None: each stands alone.
        resamples: how often clusters are drawn.
        seed: of the draws.
        level: how often an interval holds the true value.

    Returns:
        `value`, `low` and `high` over `metric`. Precision is not a number where no answer is "yes"; ends of an interval
        are not where there is one cluster only.

    Raises:
        ValueError: for other answers, or other numbers of them.

    Example:
        >>> found = mv.evaluate.stats.scores(["yes", "yes", "no", "no"], ["yes", "no", "no", "other"])
        >>> found.value.sel(metric=["accuracy", "precision", "recall"]).values.tolist()
        [0.5, 1.0, 0.5]

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), section 5.1.
    """
    table = answer_table(yes_answers("labels", labels), predictions(predicted))
    groups = cluster_numbers(clusters, len(table))
    checked_draws(resamples, level)
    total = int(groups.max()) + 1
    if clusters is None:
        draws = drawn_sums(table, groups, resamples, seed)
    else:  # the very draws of `compare`, so that the same answers have the same interval in both
        draws = drawn_clusters(total, resamples, seed) @ cluster_sums(table, groups)
    low, high = ends(measures(draws), total, level)
    found = {"value": measures(table.sum(0)), "low": low, "high": high}
    return xr.Dataset(
        {name: ("metric", array, {"long_name": "share", "units": "1"}) for name, array in found.items()},
        coords={"metric": list(METRICS)},
        attrs={
            "positive": "yes",
            "yes_ratio": "share of predictions",
            "items": len(table),
            "clusters": total,
            "interval": "percentile bootstrap over clusters",
            **{"level": level, "resamples": resamples, "seed": seed},
        },
    )


def brier(p_yes: Values, labels: Values) -> float:
    """The Brier score: the mean squared distance of the probability of "yes" from what was right, 0 the best.

    Always saying one half scores 0.25.

    Args:
        p_yes: P(yes) / (P(yes) + P(no)), one for each item.
        labels: "yes" or "no", in the same order.

    Raises:
        ValueError: for no probabilities, other labels, or other numbers of them.

    Example:
        >>> round(mv.evaluate.stats.brier([0.9, 0.2], ["yes", "no"]), 3)
        0.025

    Source:
        Brier (1950), "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78.
    """
    return float(squared_errors(p_yes, labels).mean())


def squared_errors(p_yes: Values, labels: Values) -> np.ndarray:
    """The squared distance of each item's probability of "yes" from its label."""
    shares, truth = shares_of_one("p_yes", p_yes), yes_answers("labels", labels)
    as_many(p_yes=shares, labels=truth)
    return (shares - truth) ** 2


def answer_table(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Of each item whether it is: right about yes, wrong about yes, right about no, a yes, another answer, an item.

    Such rows can be summed over any items, and `measures` says what the sums mean.
    """
    as_many(labels=truth, predicted=predicted)
    said_yes, said_no = predicted == "yes", predicted == "no"
    columns = [said_yes & truth, said_yes & ~truth, said_no & ~truth, truth, ~(said_yes | said_no), truth | True]
    return np.stack(columns, 1).astype(float)


def measures(sums: np.ndarray) -> np.ndarray:
    """`METRICS` along the last axis, of sums of `answer_table`'s rows."""
    hit, alarm, spared, positive, other, items = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [
            (hit + spared) / items,
            hit / (hit + alarm),
            hit / positive,
            2 * hit / (hit + alarm + positive),
            (hit + alarm) / items,
            other / items,
        ]
    return np.stack(found, -1)
