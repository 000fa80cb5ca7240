"""How large a difference is, and how many items it takes to see it.

Rule this module guards: a power that leaves out a tail says so in its name.

>>> round(cohens_h(0.836, 0.844), 5), required_n(cohens_h(0.836, 0.844))
(0.02182, 32961)
"""

import math

import numpy as np

from mechvlm.evaluate.draws import VIAR_2026
from mechvlm.evaluate.items import Values, measured
from mechvlm.sites import number, told, whole


def cohens_h(p1: float, p2: float) -> float:
    """Cohen's h: how far apart two shares are, on a scale on which their errors are equally large everywhere.

    `2 arcsin sqrt(p2) - 2 arcsin sqrt(p1)`, in radians: positive where the second share is larger. 0.2 is called small,
    0.5 medium, 0.8 large.

    Raises:
        ValueError: for a number below 0 or above 1.

    Example:
        >>> round(mv.evaluate.stats.cohens_h(0.8458, 0.8483), 5)
        0.00695

    Source:
        Cohen (1988), "Statistical Power Analysis for the Behavioral Sciences", section 6.2.
    """
    for name, share in (("p1", p1), ("p2", p2)):
        if not 0 <= number(name, share) <= 1:
            raise ValueError(f"{name}={share} is no share; give a number from 0 to 1.")
    return 2 * math.asin(math.sqrt(p2)) - 2 * math.asin(math.sqrt(p1))


def power(h: float, n: int, alpha: float = 0.05, tails: int | str = 2) -> float:
    """How likely a difference of so large an h is found, with two independent groups of n items each.

    Answers of two models to the same questions are pairs, which see smaller differences than two groups do.

    Args:
        h: Cohen's h.
        n: items in each group.
        alpha: how often a difference is found where there is none.
        tails: 2: a two-sided test, which finds a difference in either direction. 1: a one-sided test for a positive h.
            "upper": of the two-sided test only the findings with the sign of h, as VIAR's published power is; for a
            small h it is too low, by half where h is 0.

    Raises:
        ValueError: for an n below 1, an alpha that is no share, or other tails.

    Example:
        >>> h = mv.evaluate.stats.cohens_h(0.8458, 0.8483)
        >>> round(mv.evaluate.stats.power(h, 9000, tails="upper"), 4), round(mv.evaluate.stats.power(h, 9000), 4)
        (0.0676, 0.0752)

    Source:
        Cohen (1988), "Statistical Power Analysis for the Behavioral Sciences", section 6.3; "upper" is the post-hoc
        power of VIAR, Phi(|h| sqrt(n / 2) - 1.96), section 1i of its statistics.
    """
    from scipy.stats import norm

    if whole("n", n) < 1:
        raise ValueError(f"n={n} is no number of items; give at least 1.")
    _share("alpha", alpha)
    away = number("h", h) * math.sqrt(n / 2)
    if tails == 1:
        return float(norm.sf(norm.isf(alpha) - away))
    if tails not in (2, "upper"):
        raise ValueError(f"tails={tails!r} is not known; give 2, 1 or 'upper'.")
    edge = norm.isf(alpha / 2)
    upper = float(norm.sf(edge - abs(away)))
    return upper if tails == "upper" else upper + float(norm.cdf(-edge - abs(away)))


def required_n(h: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """How many items each of two independent groups needs, for a difference of h to be found so often.

    The two-sided test's `2 ((z_(1 - alpha/2) + z_power) / h)^2`, rounded up. Findings with the wrong sign, of which
    there are fewer than one in a hundred thousand at the usual power, are not counted.

    Raises:
        ValueError: for an h of 0, or a power or an alpha that is no share, or a power that no test would have less of.

    Example:
        >>> mv.evaluate.stats.required_n(mv.evaluate.stats.cohens_h(0.8458, 0.8483))
        325395

    Source:
        Cohen (1988), "Statistical Power Analysis for the Behavioral Sciences", section 6.4.
    """
    from scipy.stats import norm

    _share("power", power)
    _share("alpha", alpha)
    if number("h", h) == 0:
        raise ValueError("h=0 is no difference, which no number of items would show; give the h that is to be seen.")
    reach = norm.isf(alpha / 2) + norm.ppf(power)
    if reach <= 0:
        raise ValueError(f"power={power} is not above alpha={alpha} / 2, which one item has; give for instance 0.8.")
    return math.ceil(2 * float(reach / h) ** 2)


def cohens_d(first: Values, second: Values, convention: str | None = None) -> float:
    """Cohen's d: the difference of two means, second minus first, in standard deviations.

    Args:
        first: numbers, one for each item of a group; at least two.
        second: those of the other group.
        convention: None: the deviation within groups, each weighed by its items (less one). "viar-2026": the root of
            the mean of both variances, however many items each has, which its published d is.

    Raises:
        ValueError: for a group of one item, groups that do not vary at all, or another convention.

    Example:
        >>> round(mv.evaluate.stats.cohens_d([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]), 6)
        1.0

    Source:
        Cohen (1988), "Statistical Power Analysis for the Behavioral Sciences", section 2.2.
    """
    one, two = measured("first", first), measured("second", second)
    if min(len(one), len(two)) < 2:
        raise ValueError(f"the groups have {len(one)} and {len(two)} items; a deviation takes at least two in each.")
    if convention not in (None, VIAR_2026):
        raise ValueError(f"convention={told(convention)} is not known; give None or {VIAR_2026!r}.")
    if convention == VIAR_2026:
        spread = float(np.sqrt((one.var() + two.var()) / 2))
    else:
        within = ((one - one.mean()) ** 2).sum() + ((two - two.mean()) ** 2).sum()
        spread = float(np.sqrt(within / (len(one) + len(two) - 2)))
    if spread == 0:
        raise ValueError("no value differs from its group's mean, so there is no deviation to measure a difference in.")
    return float(two.mean() - one.mean()) / spread


def _share(name: str, value: float) -> None:
    if not 0 < number(name, value) < 1:
        raise ValueError(
            f"{name}={value} is not between 0 and 1; give for instance {0.8 if name == 'power' else 0.05}."
        )
