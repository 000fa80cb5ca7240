"""How findings are worded: numbers with their intervals, and what is said of an edit beside a moved threshold.

Rule this module guards: a verdict depends on where an interval lies, and the interval stands beside it.

>>> with_interval(0.5, 0.25, 0.75)
'0.5000 [0.2500, 0.7500]'
"""

from typing import Any

import numpy as np
import xarray as xr


def with_interval(value: Any, low: Any = np.nan, high: Any = np.nan, *, sign: str = "", digits: int = 4) -> str:
    """A number with its interval in brackets, where there is one.

    Example:
        >>> with_interval(0.5, 0.25, 0.75, sign="+", digits=2)
        '+0.50 [+0.25, +0.75]'
    """
    middle, ends = float(value), [float(low), float(high)]
    middle, ends = round(middle, digits) + 0.0, [round(end, digits) + 0.0 for end in ends]  # no -0.0000
    said = f"{middle:{sign}.{digits}f}"
    return said if not np.isfinite(ends).all() else f"{said} [{ends[0]:{sign}.{digits}f}, {ends[1]:{sign}.{digits}f}]"


def against_threshold(found: xr.Dataset) -> str:
    """What an edit changes, and whether that is more than moving the threshold to the same share of yes.

    Args:
        found: what `mv.evaluate.stats.compare` returns.
    """
    one, ratio = found.sel(metric="accuracy"), found.sel(metric="yes_ratio")
    before, after = (one.sel(model=model).value for model in ("base", "edited"))
    low, high = round(float(one.advantage_low), 9), round(float(one.advantage_high), 9)
    said = "so it cannot be told from moving the threshold"
    if not np.isfinite(float(found.mcnemar)):
        said = "as no answer turns right or wrong, so there is nothing to tell apart"
    elif not np.isfinite(float(one.advantage)):
        said = "and it has no threshold to be compared with, as answers are not the sign of the margin"
    elif low == high == 0:
        said = "so it does no more than moving the threshold"
    elif low > 0:
        said = "so it does more than moving the threshold"
    elif high < 0:
        said = "so it does less than moving the threshold"
    shares = [float(ratio.sel(model=model).value) for model in ("base", "edited")]
    by = with_interval(one.difference, one.difference_low, one.difference_high, sign="+")
    beyond = with_interval(one.advantage, low, high, sign="+")
    moved = with_interval(found.margin_change, found.margin_change_low, found.margin_change_high, sign="+", digits=3)
    compared = f"accuracy above the moved threshold {beyond}, {said}"
    if not np.isfinite(float(one.advantage)):
        compared = "its answers are not those of a threshold of its margins, so none is moved to compare with"
    return (
        f"accuracy {with_interval(before)} to {with_interval(after)} (by {by}), share of yes {shares[0]:.4f} to "
        f"{shares[1]:.4f}, margin for yes by {moved} logits; {compared}"
    )


def upper(text: str) -> str:
    """A text with a large first letter."""
    return text[:1].upper() + text[1:]
