"""How much two rows of numbers go together, of which either may stand still.

>>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
1.0
"""

import numpy as np
from jaxtyping import Float


def correlation(one: Float[np.ndarray, " value"], other: Float[np.ndarray, " value"]) -> float:
    """Pearson's correlation; not a number for fewer than two values, or where one of the two does not vary.

    Example:
        >>> correlation(np.array([1.0, 1.0]), np.array([0.0, 2.0]))
        nan
    """
    if len(one) < 2:
        return float("nan")
    first, second = one - one.mean(), other - other.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size > 0 else float("nan")


def rank_correlation(one: Float[np.ndarray, " value"], other: Float[np.ndarray, " value"]) -> float:
    """Spearman's correlation, in which equal values share the mean of their places; no number where Pearson's is none.

    Example:
        >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
        1.0
    """
    from scipy.stats import rankdata  # takes a while to import

    return correlation(rankdata(one), rankdata(other))
