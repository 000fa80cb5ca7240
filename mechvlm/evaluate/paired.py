"""Whether one of two models is better, from their answers to the same items.

Rule this module guards: what is compared is pairs. A difference is always that of the second from the first.

>>> round(mcnemar(189, 212).statistic, 3)
1.207
"""

from dataclasses import dataclass

import numpy as np

from mechvlm.evaluate.draws import VIAR_2026, checked_draws, drawn_sums, ends, p_below
from mechvlm.evaluate.items import Values, as_many, cluster_numbers, measured
from mechvlm.sites import told, whole


@dataclass(frozen=True)
class McNemar:
    """What McNemar's test says.

    Attributes:
        statistic: chi-squared with one degree of freedom; of the exact test the smaller of both counts.
        p_value: two-sided.
    """

    statistic: float
    p_value: float


@dataclass(frozen=True)
class Difference:
    """A difference of two means over the same items, with its bootstrap interval.

    Attributes:
        mean: second minus first.
        low: lower end; not a number where there is one cluster only.
        high: upper end.
        p_value: one-sided, of a difference above 0, and never 0; not a number where there is one cluster only.
    """

    mean: float
    low: float
    high: float
    p_value: float


def mcnemar(b: int, c: int, exact: bool = False, corrected: bool = True) -> McNemar:
    """McNemar's test: are there more items that only one of two models answers right?

    Items must be independent. Of questions about one picture that is not so; see `paired_bootstrap`.

    Args:
        b: items that only the first model answers right.
        c: items that only the second answers right.
        exact: by the binomial distribution instead of chi-squared, for few items.
        corrected: with the continuity correction, `(|b - c| - 1)^2 / (b + c)`; the exact test has none.

    Returns:
        `p_value`, two-sided, and `statistic`: chi-squared with one degree of freedom, or with exact=True the smaller of
        b and c, which the binomial distribution of b + c items with chance 1/2 is asked about.

    Raises:
        ValueError: for counts below 0, or without any item on which the models differ.

    Example:
        >>> round(mv.evaluate.stats.mcnemar(189, 212).p_value, 4)
        0.2719

    Source:
        McNemar (1947), "Note on the sampling error of the difference between correlated proportions", Psychometrika
        12; continuity correction after Edwards (1948).
    """
    for name, count in (("b", b), ("c", c)):
        if whole(name, count) < 0:
            raise ValueError(f"{name}={count} is no number of items; counts go from 0.")
    if b + c == 0:
        raise ValueError("b and c are 0: no item is answered right by one model only, so there is nothing to test.")
    # The import takes a second, and most who compare effects never test.
    from statsmodels.stats.contingency_tables import mcnemar as by_statsmodels

    found = by_statsmodels([[0, b], [c, 0]], exact=exact, correction=corrected)
    return McNemar(float(found.statistic), float(found.pvalue))


def paired_bootstrap(
    a: Values,
    b: Values,
    clusters: Values | None = None,
    resamples: int = 10_000,
    seed: int = 42,
    level: float = 0.95,
    convention: str | None = None,
) -> Difference:
    """The difference of two means over the same items, with an interval from whole clusters drawn again.

    Args:
        a: a number for each item, for instance whether the first model is right.
        b: the same of the second model, in the same order.
        clusters: what each item belongs to, for instance its picture; None: each stands alone.
        resamples: how often clusters are drawn.
        seed: of the draws.
        level: how often the interval holds the true difference.
        convention: of the p-value. None: one more than the draws in which the difference is 0 or less, over one more
            than the draws. "viar-2026": the share of draws in which it is 0 or less, which can be 0.

    Returns:
        Mean, interval, and the one-sided p-value. With few clusters the interval is somewhat too narrow.

    Raises:
        ValueError: for other numbers of values, values that are not finite, or another convention.

    Example:
        >>> found = mv.evaluate.stats.paired_bootstrap([1, 0, 0, 1], [1, 1, 0, 1], clusters=["x", "x", "y", "y"])
        >>> found.mean, found.low, found.high
        (0.25, 0.0, 0.5)

    Source:
        Efron and Tibshirani (1993), "An Introduction to the Bootstrap", sections 8 and 13; what is added to the p-value
        as in Davison and Hinkley (1997), "Bootstrap Methods and their Application", section 4.2.
    """
    first, second = measured("a", a), measured("b", b)
    groups = cluster_numbers(clusters, as_many(a=first, b=second))
    checked_draws(resamples, level)
    if convention not in (None, VIAR_2026):
        raise ValueError(f"convention={told(convention)} is not known; give None or {VIAR_2026!r}.")
    total = int(groups.max()) + 1
    table = np.stack([second - first, np.ones(len(first))], 1)
    sums = drawn_sums(table, groups, resamples, seed)
    draws = sums[:, 0] / sums[:, 1]
    low, high = ends(draws, total, level)
    p_value = p_below(draws, total, convention)
    return Difference(float((second - first).mean()), float(low), float(high), float(p_value))
