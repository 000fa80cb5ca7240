"""P-values of many tests at once.

Rule this module guards: a p-value by permutation counts what was observed among the permutations, so that it is never
0.

>>> benjamini_hochberg([0.01, 0.02, 0.9]).round(3).tolist()
[0.03, 0.03, 0.9]
"""

import numpy as np

from mechvlm.evaluate.items import Values, one_each
from mechvlm.sites import told


def benjamini_hochberg(p: Values) -> np.ndarray:
    """P-values such that among all below a level at most that share is false, on average.

    Args:
        p: one for each test; what is not a number was not tested, and stays.

    Raises:
        ValueError: for a number below 0 or above 1.

    Example:
        >>> mv.evaluate.stats.benjamini_hochberg([0.001, 0.04, 0.03]).round(3).tolist()
        [0.003, 0.04, 0.04]

    Source:
        Benjamini and Hochberg (1995), "Controlling the False Discovery Rate", Journal of the Royal Statistical Society
        B 57.
    """
    from scipy.stats import false_discovery_control

    given = one_each("p", p).astype(float)
    wrong = given[(given < 0) | (given > 1)]
    if len(wrong):
        raise ValueError(f"p holds {wrong[0]:g}, which is no p-value; give numbers from 0 to 1.")
    tested = np.isfinite(given)
    found = given.copy()
    if tested.any():
        found[tested] = false_discovery_control(given[tested])
    return found


def max_statistic(observed: Values, permuted: np.ndarray) -> np.ndarray:
    """P-values for the largest of many statistics: how often any of them is as large where nothing is there.

    Holds the chance of even one false finding among all, whatever depends on what.

    Args:
        observed: a statistic for each test, whose sign does not count; not a number where there was none.
        permuted: those of each permutation: permutations by tests.

    Returns:
        (1 + permutations whose largest statistic is at least as large) / (1 + permutations), for each test.

    Raises:
        ValueError: for permutations of another number of tests, or none.

    Example:
        >>> mv.evaluate.stats.max_statistic([3.0, -1.0], np.array([[0.5, 2.0], [-1.5, 0.0], [0.2, 0.1]])).tolist()
        [0.25, 0.75]

    Source:
        Westfall and Young (1993), "Resampling-Based Multiple Testing"; the 1 is that of Phipson and Smyth (2010),
        "Permutation P-values Should Never Be Zero".
    """
    here = np.abs(one_each("observed", observed).astype(float))
    if not isinstance(permuted, np.ndarray) or permuted.ndim != 2 or permuted.shape[1] != len(here):
        said = permuted.shape if isinstance(permuted, np.ndarray) else told(permuted)
        raise ValueError(f"permuted is {said}; give an array of permutations by the {len(here)} tests.")
    if not len(permuted):
        raise ValueError("permuted holds no permutation; give at least one.")
    most = np.nanmax(np.where(np.isfinite(permuted), np.abs(permuted), -np.inf), 1)
    found = p_of(here, most[:, None])
    return np.where(np.isfinite(here), found, np.nan)


def p_of(observed: np.ndarray, permuted: np.ndarray) -> np.ndarray:
    """How often a permutation, or what was observed itself, is at least as large; rounding does not count."""
    return (1 + (permuted >= observed - 1e-12).sum(0)) / (1 + len(permuted))
