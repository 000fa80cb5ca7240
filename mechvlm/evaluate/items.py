"""What statistics are about: answers, labels and numbers of items, as many of each, and the pictures they belong to.

Rule this module guards: what does not fit together, or is no number, is refused before anything is computed of it.

>>> yes_answers("labels", ["yes", "no"])
array([ True, False])
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.sites import listed, told

Values = Sequence[Any] | np.ndarray | xr.DataArray
"""One value for each item."""

ANSWERS = ("yes", "no", "other")
"""What an item's answer is read as; "other" is neither."""


def one_each(name: str, values: Any) -> np.ndarray:
    """Values of items as an array with one axis.

    Raises:
        TypeError: for what is no list.
        ValueError: for no item at all, or several values of an item.
    """
    given = _held(values)
    if given is None:
        raise TypeError(f"{name}={told(values)} is not a list with a value for each item.")
    array = np.asarray(given)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} has the shape {array.shape}; give one value for each item, and at least one.")
    return array


def yes_answers(name: str, values: Any) -> np.ndarray:
    """Which items are "yes", where each is "yes" or "no".

    Raises:
        ValueError: for anything else in the list.
    """
    array = one_each(name, values)
    wrong = [value for value in dict.fromkeys(array.tolist()) if value not in ("yes", "no")]
    if wrong:
        raise ValueError(f"{name} holds {told(wrong[0])}; give 'yes' or 'no' for each item.")
    return array == "yes"


def predictions(values: Any) -> np.ndarray:
    """What was answered to each item: "yes", "no" or "other".

    Raises:
        ValueError: for anything else in the list.
    """
    array = one_each("predicted", values)
    wrong = [value for value in dict.fromkeys(array.tolist()) if value not in ANSWERS]
    if wrong:
        raise ValueError(f"predicted holds {told(wrong[0])}; give 'yes', 'no' or 'other' for each item.")
    return array


def measured(name: str, values: Any) -> np.ndarray:
    """Numbers, one for each item; of truths, 1 and 0.

    Raises:
        TypeError: for what is no number.
        ValueError: for what is infinite, or not a number that was computed.
    """
    array = one_each(name, values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} holds {array.dtype}; give a number for each item.")
    numbers = array.astype(float)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        raise ValueError(f"{name} holds {numbers[wrong[0]]:g} at item {wrong[0]}; give finite numbers.")
    return numbers


def shares_of_one(name: str, values: Any) -> np.ndarray:
    """Probabilities, one for each item.

    Raises:
        ValueError: for a number below 0 or above 1.
    """
    numbers = measured(name, values)
    wrong = numbers[(numbers < 0) | (numbers > 1)]
    if len(wrong):
        raise ValueError(f"{name} holds {wrong[0]:g}, which is no probability; give numbers from 0 to 1.")
    return numbers


def as_many(**named: np.ndarray) -> int:
    """How many items there are, where every array has a value for each.

    Raises:
        ValueError: where arrays differ in length.
    """
    sizes = {name: len(array) for name, array in named.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"there must be as many values of each, and {said}.")
    return next(iter(sizes.values()))


def cluster_numbers(clusters: Any, count: int) -> np.ndarray:
    """The number of each item's cluster, counted from 0; without clusters each item is its own.

    Raises:
        ValueError: for another number of names than of items.
    """
    if clusters is None:
        return np.arange(count)
    given = _held(clusters)
    if given is None or len(given) != count:
        raise ValueError(f"clusters={told(clusters)} must name one cluster for each of the {count} items.")
    names: dict[Any, int] = {}
    return np.array([names.setdefault(key, len(names)) for key in given])


def first_asked(asked: xr.Dataset) -> np.ndarray:
    """Which items are the first with their picture and question, among those that are there.

    `duplicate_of` is of the whole evaluation: of a part of it, such as one split, the first may be in another one.

    Args:
        asked: an evaluation, or some items of one.

    Example:
        >>> mv.evaluate.stats.first_asked(base.isel(item=[3, 4, 3])).tolist()
        [True, True, False]
    """
    seen: dict[tuple[str, str], int] = {}
    pairs = zip(map(str, asked.image.values), map(str, asked.question.values), strict=True)
    return np.array([seen.setdefault(pair, at) == at for at, pair in enumerate(pairs)], bool)


def _held(values: Any) -> Sequence[Any] | np.ndarray | None:
    """What a list or an array holds; None for a single value. An array with names is slow to go through."""
    return np.asarray(values) if isinstance(values, xr.DataArray) else listed(values)
