"""Curves of one order against chance.

>>> found = deletion_curve(vlm, real, gradient_attribution(vlm, real, yes).attribution, yes, samples=2)
>>> figure = deletion(found)
"""

import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.charts import lines


def deletion(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The metric while image tokens are taken away, in the order of a map and in random orders, with their range.

    Args:
        found: what `deletion_curve` returns.

    Example:
        >>> found = mv.deletion_curve(vlm, real, mv.attention_map(vlm, real, 3), yes, samples=2)
        >>> mv.plot.deletion(found, title="Does the map point at what matters?")
    """
    both = [found.random.mean("sample"), found.ranked]
    low, high = [found.random.min("sample"), found.ranked], [found.random.max("sample"), found.ranked]
    order = xr.Variable("order", ["random", "ranked"])

    def together(parts: list[xr.DataArray]) -> xr.DataArray:
        return xr.concat(parts, order, coords="minimal", compat="override").assign_attrs(found.ranked.attrs)

    return lines(together(both), "count", "order", band=(together(low), together(high)), title=title, caption=caption)
