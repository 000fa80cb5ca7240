"""Figures of path patching: what each sender passes on, layer by layer.

>>> found = path_patching(vlm, real, null, yes, senders=["image", "a0.h7", "a1.h2", "m1"])
>>> [str(label) for label in senders(found.normalised).layout.xaxis.ticktext]
['h2', 'h7', 'MLP', 'image']
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.charts import heatmap

COLUMNS = {"head": "h{}", "mlp": "MLP", "deepstack": "deep-stack", "image": "image", "embed": "words"}
"""How the kinds of senders are written, in the order of their columns."""


def senders(
    array: xr.DataArray,
    facet: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """A value of each sender as a table in colours: layers go down, heads and then MLPs to the right.

    What enters before the first layer (words, image tokens) stands in a row of its own above it, "in". What was not
    measured is grey.

    Args:
        array: over sender, such as `path_patching(...).normalised`; and one dim more with `facet`.
        facet, limits: see `heatmap`; by default receivers stand side by side.

    Raises:
        TypeError: for what has no senders.
        ValueError: as `heatmap`.

    Example:
        >>> found = mv.path_patching(vlm, real, null, yes, receivers={"logits": "logits", "head": ["a3.h7<q>"]})
        >>> mv.plot.senders(found.normalised, title="Who writes what is read")
    """
    if not isinstance(array, xr.DataArray) or not {"sender", "kind", "layer", "head"} <= set(array.coords):
        raise TypeError(
            f"senders draws a variable of path_patching, and was given a {type(array).__name__} without senders; write "
            "for instance mv.plot.senders(found.normalised)."
        )
    kinds, layers, heads = (array[name].values.tolist() for name in ("kind", "layer", "head"))
    ranks = [(list(COLUMNS).index(kind), head) for kind, head in zip(kinds, heads, strict=True)]
    columns, rows = sorted(set(ranks)), sorted(set(layers))
    other = [dim for dim in array.dims if dim != "sender"]
    table = np.full([*(array.sizes[dim] for dim in other), len(rows), len(columns)], np.nan)
    down, right = [rows.index(layer) for layer in layers], [columns.index(rank) for rank in ranks]
    table[..., down, right] = array.transpose(*other, "sender").values
    named = [list(COLUMNS.values())[kind].format(head) for kind, head in columns]
    places = {"layer": ["in" if row < 0 else str(row) for row in rows], "part": named}
    drawn = xr.DataArray(
        table,
        dims=[*other, "layer", "part"],
        coords={**{dim: array[dim].values for dim in other}, **places},
        name=array.name,
        attrs=array.attrs,
    )
    chosen = facet or ("receiver" if "receiver" in other else None)
    return heatmap(drawn, facet=chosen, limits=limits, title=title, caption=caption)
