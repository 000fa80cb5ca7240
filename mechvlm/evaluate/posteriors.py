"""How likely one share is above another, given what was counted, from an even prior.

Rule this module guards: pairs are not two samples. Answers of two models to the same items have `beta_paired`.

>>> round(beta_independent(0, 0, 0, 0).p_above, 1)  # nothing counted, nothing known
0.5
"""

from dataclasses import dataclass

import numpy as np

from mechvlm.evaluate.draws import checked_draws, ends
from mechvlm.sites import whole


@dataclass(frozen=True)
class Posterior:
    """What is believed of a difference of two shares, second minus first.

    Attributes:
        mean: the expected difference.
        low: lower end of the central interval.
        high: upper end.
        p_above: probability that the second share is larger.
    """

    mean: float
    low: float
    high: float
    p_above: float


def beta_independent(
    k1: int, n1: int, k2: int, n2: int, draws: int = 100_000, seed: int = 42, level: float = 0.95
) -> Posterior:
    """The posterior of the difference between shares of two independent samples, by Monte Carlo.

    Each share is Beta(1 + k, 1 + n - k). For answers of two models to the same items it is conservative: they are right
    and wrong together, which makes the difference more certain than this says; use `beta_paired`.

    Args:
        k1: how many of the first sample, for instance right answers.
        n1: items of the first sample.
        k2: how many of the second.
        n2: items of the second sample.
        draws: the error of the probability is at most 0.5 / sqrt(draws).
        seed: of the draws.
        level: of the interval.

    Raises:
        ValueError: for counts below 0, or above their n.

    Example:
        >>> found = mv.evaluate.stats.beta_independent(7612, 9000, 7634, 9000)
        >>> round(found.p_above, 2), round(found.mean, 3)
        (0.68, 0.002)

    Source:
        Gelman et al. (2013), "Bayesian Data Analysis", section 2.4; VIAR's posteriors are of this kind.
    """
    _counts(k1=k1, n1=n1, k2=k2, n2=n2)
    for k, n, which in ((k1, n1, "1"), (k2, n2, "2")):
        if k > n:
            raise ValueError(f"k{which}={k} is more than the n{which}={n} items it was counted among.")
    checked_draws(draws, level)
    generator = np.random.default_rng(seed)
    first = generator.beta(1 + k1, 1 + n1 - k1, draws)
    return _posterior(generator.beta(1 + k2, 1 + n2 - k2, draws) - first, level)


def beta_paired(
    both: int,
    only_first: int,
    only_second: int,
    neither: int,
    draws: int = 100_000,
    seed: int = 42,
    level: float = 0.95,
) -> Posterior:
    """The posterior of the difference between two shares over the same items, by Monte Carlo.

    The four shares of the table of pairs are Dirichlet(1 + counts); the difference is that of the two cells on which
    the models differ. Items are taken for independent, which questions about one picture are not.

    Args:
        both: items for which both models have it, for instance a right answer.
        only_first: those for which only the first has.
        only_second: those for which only the second has.
        neither: those for which none has.
        draws: the error of the probability is at most 0.5 / sqrt(draws).
        seed: of the draws.
        level: of the interval.

    Raises:
        ValueError: for counts below 0.

    Example:
        >>> round(mv.evaluate.stats.beta_paired(7423, 189, 212, 1176).p_above, 2)
        0.87

    Source:
        Gelman et al. (2013), "Bayesian Data Analysis", section 3.4.
    """
    _counts(both=both, only_first=only_first, only_second=only_second, neither=neither)
    checked_draws(draws, level)
    cells = np.random.default_rng(seed).dirichlet([1 + both, 1 + only_first, 1 + only_second, 1 + neither], draws)
    return _posterior(cells[:, 2] - cells[:, 1], level)


def _counts(**counts: int) -> None:
    for name, count in counts.items():
        if whole(name, count) < 0:
            raise ValueError(f"{name}={count} counts nothing; give a number from 0.")


def _posterior(difference: np.ndarray, level: float) -> Posterior:
    low, high = ends(difference, 2, level)
    return Posterior(float(difference.mean()), float(low), float(high), float((difference > 0).mean()))
