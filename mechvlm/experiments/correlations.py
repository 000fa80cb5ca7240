"""How much two rows of numbers go together, of which either may stand still.

>>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
1.0
"""

import numpy as np
from jaxtyping import Float


def ranks(values: Float[np.ndarray, " value"]) -> Float[np.ndarray, " value"]:
    """Each value's place in the order, from 1; equal ones share the mean of theirs.

    Example:
        >>> ranks(np.array([5.0, 1.0, 5.0]))
        array([2.5, 1. , 2.5])
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    places: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return places


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
