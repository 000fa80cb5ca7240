"""Figures of layers with the real picture and a null one, and of gradients by layer.

>>> found = mv.language_prior_collapse(vlm, [real], ["black", "noise"])
>>> len(collapse_curves(found).layout.annotations)  # two headings, one caption
3
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from mechvlm.plot.look import DASHES, GREY, PALETTE, faded, finished, label, plain, tick_step

HEADINGS = ("Outputs of layers", "Last output after the final norm")
PUBLISHED = "Outputs of layers, the last after the final norm"


def collapse_curves(
    found: xr.Dataset, value: str = "update_cosine", span: str = "text", title: str = "", caption: str = ""
) -> go.Figure:
    """How alike layers work with the real and with null pictures: a line for each null, with its interval.

    Side by side what layers really do, and the same with the last layer's output taken after the final norm, as
    transformers' `hidden_states` has it, which looks as if the last layer brought the runs together or apart. A result
    under the published convention has the second alone.

    Args:
        found: what `language_prior_collapse` returns.
        value: "update_cosine" or "state_cosine".
        span: one that it was asked for.
        caption: by default says what the lines and bands are.

    Raises:
        TypeError: for anything else.
        ValueError: for another value or span.

    Example:
        >>> mv.plot.collapse_curves(mv.language_prior_collapse(vlm, [real], ["black", "noise"]), span="last")
    """
    _check(found, "collapse_curves", "language_prior_collapse", {"update_cosine_mean", "state_cosine_mean"})
    values = [name for name in ("update_cosine", "state_cosine") if name == value]
    if not values or span not in found.span.values:
        raise ValueError(
            f"value={value!r} and span={span!r} cannot be drawn; choose 'update_cosine' or 'state_cosine', and a span "
            f"of the result, which has {', '.join(map(str, found.span.values))}."
        )
    three = [found[f"{value}_{end}"].sel(span=span).transpose("null", "layer") for end in ("mean", "low", "high")]
    ends = [f"{value}_normed_{end}" for end in ("mean", "low", "high")]
    panels = [three]
    if ends[0] in found:
        last = found.layer[-1]
        panels.append(
            [one.where(one.layer != last, found[end].sel(span=span)) for one, end in zip(three, ends, strict=True)]
        )
    names = HEADINGS if len(panels) > 1 else [PUBLISHED]
    figure = make_subplots(1, len(panels), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.05)
    for column, panel in enumerate(panels, 1):
        for number, null in enumerate(found.null.values):
            curve = [one.isel(null=number).values for one in panel]
            _curve(figure, found.layer.values, curve, str(null), PALETTE[number % len(PALETTE)], column=column)
    figure.update_xaxes(title_text="layer", tickvals=_ticks(found), zeroline=False)
    figure.update_yaxes(title_text=label(found[value]), col=1)
    figure.update_layout(showlegend=True, legend_title_text="null")
    said = caption or f"Positions: {plain(span)}. {_averaged(found)}"
    return finished(figure, title, said, 400 * len(panels), 340)


def gradient_decay(
    found: xr.Dataset,
    value: str = "gradient_norm",
    spans: Sequence[str] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """Gradients by layer on a logarithmic axis, with the decay that the image's is compared with.

    A colour for each span, solid lines for the real picture, dashed ones for null pictures, with intervals. The grey
    dotted line falls from the image's first of the two layers of `log_ratio` at the rate of the first null's image
    tokens: what the fall would be with nothing to see. Zeros by construction are left out.

    Args:
        found: what `gradient_by_layer` returns.
        value: "gradient_norm" or "relative".
        spans: which to draw; None: all.
        caption: by default says what the lines and bands are.

    Raises:
        TypeError: for anything else.
        ValueError: for another value, or a span that is not there.

    Example:
        >>> mv.plot.gradient_decay(mv.gradient_by_layer(vlm, [real], yes), spans=["image", "question"])
    """
    _check(found, "gradient_decay", "gradient_by_layer", {"gradient_norm_mean", "relative_rate_mean"})
    names = [str(name) for name in (found.span.values if spans is None else spans)]
    if value not in ("gradient_norm", "relative") or not set(names) <= set(found.span.values):
        raise ValueError(
            f"value={value!r} and spans={names} cannot be drawn; choose 'gradient_norm' or 'relative', and spans of "
            f"the result, which has {', '.join(map(str, found.span.values))}."
        )
    figure = make_subplots(1, 1)
    for number, name in enumerate(names):
        for style, picture in enumerate(found.picture.values):
            of = [found[f"{value}_{end}"].sel(span=name, picture=picture) for end in ("mean", "low", "high")]
            curve = [one.where(~found.by_construction.sel(span=name) & (one > 0)).values for one in of]
            ink, dash = PALETTE[number % len(PALETTE)], DASHES[style % len(DASHES)]
            _curve(figure, found.layer.values, curve, f"{name}, {picture}", ink, dash)
    said = f"{_averaged(found)} Zeros by construction are left out."
    if found.sizes["picture"] > 1 and "image" in names:
        null = str(found.picture.values[1])
        _expected(figure, found, value, null)
        said += f" Grey: falls as the image tokens' does on average with the picture {plain(null)}."
    figure.update_xaxes(title_text="layer", tickvals=_ticks(found), zeroline=False)
    figure.update_yaxes(title_text=label(found[value]), type="log", dtick="D2", exponentformat="power")
    figure.update_layout(showlegend=True, legend_title_text="span, picture")
    return finished(figure, title, caption or said, 520, max(360, 24 * len(figure.data) // 3))


def _curve(
    figure: go.Figure,
    layers: np.ndarray,
    curve: list[np.ndarray],
    name: str,
    ink: str,
    dash: str = "solid",
    column: int = 1,
) -> None:
    """A line with its band, into one panel; the legend names it once."""
    mean, low, high = curve
    shared = {"x": layers, "name": plain(name), "legendgroup": name}
    if np.isfinite(low).any():
        for bound, fill in ((low, "none"), (high, "tonexty")):
            edge = {"mode": "lines", "line": {"width": 0}, "fill": fill, "fillcolor": faded(ink)}
            figure.add_scatter(y=bound, showlegend=False, hoverinfo="skip", row=1, col=column, **edge, **shared)
    line = {"color": ink, "dash": dash, "width": 2.5}
    hover = [
        f"{plain(name)}<br>layer {layer}<br><b>{a:.4g}</b><br>from {b:.4g} to {c:.4g}"
        for layer, a, b, c in zip(layers, mean, low, high, strict=True)
    ]
    more = {"hovertext": hover, "hoverinfo": "text", "showlegend": column == 1, "marker_size": 5}
    figure.add_scatter(y=mean, mode="lines+markers", line=line, row=1, col=column, **more, **shared)


def _expected(figure: go.Figure, found: xr.Dataset, value: str, null: str) -> None:
    """The image's gradient, had it fallen as that of a null picture does on average."""
    first = int(str(found.attrs["between"]).split(",")[0])
    rate = "rate" if value == "gradient_norm" else "relative_rate"
    falls = float(found[f"{rate}_mean"].sel(picture=null, span="image"))
    start = float(found[f"{value}_mean"].sel(picture="real", span="image", layer=first))
    layers = found.layer.values[first:-1]
    line = {"color": GREY, "dash": "dot", "width": 2}
    y = start * np.exp(-falls * (layers - first))
    figure.add_scatter(x=layers, y=y, mode="lines", line=line, name=f"expected from {plain(null)}", hoverinfo="y")


def _ticks(found: xr.Dataset) -> np.ndarray:
    return found.layer.values[:: tick_step(found.sizes["layer"], 12)]


def _averaged(found: xr.Dataset) -> str:
    """Over what lines and bands are."""
    count = found.sizes["prompt"]
    return f"Mean over {count} prompts; bands: {found.attrs['interval']}." if count > 1 else "One prompt."


def _check(found: object, drawer: str, maker: str, wanted: set[str]) -> None:
    """Refuse what another function made."""
    if not isinstance(found, xr.Dataset) or not wanted <= {str(name) for name in found.data_vars}:
        raise TypeError(
            f"{drawer} draws what {maker} returns, and was given a {type(found).__name__}; make it with mv.{maker}."
        )
