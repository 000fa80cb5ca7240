"""What the parts of a model add to a logit, layer by layer.

>>> figure = direct_logits(direct_logit_attribution(vlm, real, yes))
>>> figure.data[0].z.shape, figure.data[1].z.shape
((8, 8), (8, 1))
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from mechvlm.plot.look import NOTHING, colours, finished, plain, tick_step


def direct_logits(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """A table of heads by layer, beside it the MLPs, in one scale of colours; what no layer adds is in the caption.

    Args:
        found: what `direct_logit_attribution` returns, of one prompt, or of several, whose mean is drawn.
        caption: by default says the sum, what entered, the biases and what the sum misses.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.direct_logits(mv.direct_logit_attribution(vlm, [real, null], yes), title="Parts of the answer")
    """
    if not isinstance(found, xr.Dataset) or not {"contribution", "heads", "mlps", "remainder"} <= set(found.data_vars):
        raise TypeError(
            "direct_logits draws what direct_logit_attribution returns, and was given a "
            f"{type(found).__name__}; make it with mv.direct_logit_attribution(vlm, prompt, metric)."
        )
    mean = found[["contribution", "heads", "mlps", "remainder", "logit"]]
    missed = float(abs(mean.remainder).max())
    mean = mean.mean("prompt") if "prompt" in mean.dims else mean
    tables = [mean.heads.transpose("layer", "head").values, mean.mlps.values[:, None]]
    layers, heads = tables[0].shape
    wide, tall = min(48.0, max(8.0, 560 / heads)), min(36.0, max(6.0, 560 / layers))
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[heads, 1.4], horizontal_spacing=0.03)
    for column, (table, name) in enumerate(zip(tables, ("head", "MLP"), strict=True), 1):
        texts = [
            [_text(layer, name, at if column == 1 else None, value) for at, value in enumerate(row)]
            for layer, row in enumerate(table)
        ]
        look = {"coloraxis": "coloraxis", "hoverinfo": "text", "xgap": 1, "ygap": int(tall > 12)}
        figure.add_heatmap(z=table, hovertext=texts, **look, row=1, col=column)
    steps = (tick_step(heads, max(1, int(heads * wide / 24))), tick_step(layers, max(1, int(layers * tall / 18))))
    bare = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(title_text="head", tickvals=np.arange(heads)[:: steps[0]], **bare, col=1)
    figure.update_xaxes(tickvals=[0], ticktext=["MLP"], **bare, col=2)
    figure.update_yaxes(autorange="reversed", tickvals=np.arange(layers)[:: steps[1]], **bare)
    figure.update_yaxes(title_text="layer", col=1)
    every = np.concatenate([table.flatten() for table in tables])
    title_of_bar = "added to the logit (logits)"
    figure.update_layout(coloraxis=colours(every, None, "Viridis", "RdBu_r", title_of_bar), plot_bgcolor=NOTHING)
    width, height = max(300.0, wide * (heads + 1.4)), max(160.0, tall * layers)
    return finished(figure, title, caption or _said(mean, found, missed), width, height)


def _text(layer: int, name: str, head: int | None, value: float) -> str:
    """What is said of a cell."""
    return f"layer {layer}<br>{name}{'' if head is None else f' {head}'}<br><b>{value:+.4g}</b>"


def _said(mean: xr.Dataset, found: xr.Dataset, missed: float) -> str:
    """What the table does not show; parts that are exactly 0 are left out."""
    outside = mean.contribution.where(~mean.contribution.kind.isin(["head", "mlp"]), drop=True)
    values = {name: float(outside.sel(component=name)) for name in outside.component.values.tolist()}
    parts = [f"{name} {value:+.3g}" for name, value in values.items() if value]
    several = f"Means over {found.sizes['prompt']} prompts. " if "prompt" in found.dims else ""
    heads, mlps = float(mean.heads.sum()), float(mean.mlps.sum())
    return plain(
        f"{several}{found.attrs['metric']} {float(mean.logit):+.3g} = heads {heads:+.3g}, MLPs {mlps:+.3g}, "
        f"{', '.join(parts)}; the sum misses at most {missed:.1g}."
    )
