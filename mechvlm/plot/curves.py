"""Curves of one order against chance.

>>> found = deletion_curve(vlm, real, gradient_attribution(vlm, real, yes).attribution, yes, samples=2)
>>> figure = deletion(found)
"""

import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.charts import lines

MOST = 24
"""As many counts as have room for a place of their own each; more stand where their numbers are."""


def deletion(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The metric while image tokens are taken away, or put in, in the order of a map and in random orders.

    Counts stand at even distances, as the default ones double from one to the next.

    Args:
        found: what `deletion_curve` returns; of both modes, deletion is drawn solid and insertion dashed.
        caption: by default says what the lines and the band are.

    Raises:
        TypeError: for anything else.

    Example:
        >>> found = mv.deletion_curve(vlm, real, mv.attention_map(vlm, real, 3), yes, samples=2)
        >>> mv.plot.deletion(found, title="Does the map point at what matters?")
    """
    if not isinstance(found, xr.Dataset) or not {"ranked", "random"} <= set(found.data_vars):
        held = f" with {', '.join(map(str, found.data_vars))}" if isinstance(found, xr.Dataset) else ""
        raise TypeError(
            f"deletion draws what deletion_curve returns, and was given a {type(found).__name__}{held}; make it with "
            "mv.deletion_curve(vlm, prompt, ranking, metric)."
        )
    orders = found.sizes["sample"]
    said = (
        f"ranked: in the order of the map, the highest first. random: the mean of {orders} random "
        f"order{'s' if orders > 1 else ''}; the band reaches from the lowest to the highest of them."
    )
    if found.sizes["count"] <= MOST:
        each = xr.Variable("count", [str(count) for count in found["count"].values], found["count"].attrs)
        found = found.assign_coords(count=each)
    dash = "mode" if "mode" in found.dims else None
    both = [found.random.mean("sample"), found.ranked]
    low, high = [found.random.min("sample"), found.ranked], [found.random.max("sample"), found.ranked]
    order = xr.Variable("order", ["random", "ranked"])

    def together(parts: list[xr.DataArray]) -> xr.DataArray:
        return xr.concat(parts, order, coords="minimal", compat="override").assign_attrs(found.ranked.attrs)

    band = (together(low), together(high))
    return lines(together(both), "count", "order", dash, band=band, title=title, caption=caption or said)
