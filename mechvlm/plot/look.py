"""What all figures have in common: fonts, colours, labels, sizes.

Rule this module guards: sizes are in pixels and say how big the plotted area is; margins, title and caption come on
top, so that no title squeezes a figure.

>>> finished(go.Figure(), "Title", "A sentence below.", width=400, height=300).layout.width
500
"""

import html
import textwrap

import numpy as np
import plotly.graph_objects as go
import xarray as xr

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D"]  # after Okabe and Ito
DASHES = ["solid", "dash", "dot", "dashdot"]
INK, GREY, FAINT, NOTHING = "#222222", "#8a8a8a", "#e8e8e8", "#d9d9d9"  # GREY is what results stand beside
LEFT, RIGHT, TOP, BOTTOM = 70, 110, 66, 64  # margins; RIGHT has room for a legend or a colour bar

_FRAME = {
    "gridcolor": FAINT,
    "zerolinecolor": "#b0b0b0",
    "automargin": True,
    "ticks": "",
    "ticklabelstandoff": 4,
    "title": {"standoff": 10},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Liberation Sans, Arial, Helvetica, sans-serif", "size": 14, "color": INK},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 18}},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": {**_FRAME, "showline": True, "linecolor": "#888888"},
        "yaxis": _FRAME,
        "coloraxis": {"colorbar": {"thickness": 14, "outlinewidth": 0, "ypad": 0, "title": {"side": "right"}}},
        "legend": {"tracegroupgap": 0},
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 13, "color": INK}},
    }
)


def finished(figure: go.Figure, title: str, caption: str, width: float, height: float, axis: bool = True) -> go.Figure:
    """A figure with its look, its title above, its caption below, and a plotted area of the given size.

    Without an `axis` the caption stands right under the plotted area.
    """
    bar = figure.layout.coloraxis.colorbar.title
    for upright in (bar, *(axis.title for axis in figure.select_yaxes())):
        upright.text = "<br>".join(_wrapped(upright.text or "", height / 7.5))
    keyed = figure.layout.showlegend or figure.layout.coloraxis.colorscale
    right = RIGHT + 18 * bar.text.count("<br>") if keyed else 30
    headed, broken = _wrapped(title, (width + right) / 9), _wrapped(caption, (width + right) / 6.2)
    figure.update_layout(title_text="<br>".join(headed))
    top, bottom = (TOP + 24 * (len(headed) - 1) if headed else 30), (BOTTOM if axis else 20)
    if broken:
        below = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "yshift": 8 - bottom, "yanchor": "top"}
        style = {"font": {"size": 12, "color": "#555555"}, "align": "left", "xanchor": "left", "showarrow": False}
        figure.add_annotation(text="<br>".join(broken), **below, **style)
    return figure.update_layout(
        template=TEMPLATE,
        width=round(LEFT + width + right),
        height=round(top + height + bottom + 17 * len(broken)),
        margin={"l": LEFT, "r": right, "t": top, "b": bottom + 17 * len(broken)},
    )


def _wrapped(text: str, letters: float) -> list[str]:
    return textwrap.wrap(text, max(16, int(letters)), break_long_words=False)


def label(array: xr.DataArray, dim: str | None = None) -> str:
    """What to write at an axis: the long name or the name of an array or of its dim, and the units if there are any."""
    named = array if dim is None else array[dim]
    text = str(named.attrs.get("long_name", named.name or "value")).replace("_", " ")
    return plain(f"{text} ({named.attrs['units']})" if "units" in named.attrs else text)


def one_array(array: object, drawer: str) -> None:
    """Refuse what is no array with named dims.

    Raises:
        TypeError: for a dataset, and anything else.
    """
    if not isinstance(array, xr.DataArray):
        raise TypeError(
            f"{drawer} draws a DataArray, not a {type(array).__name__}; choose a variable, like result.mass."
        )


def plain(text: str) -> str:
    """A text from data, so that plotly shows it as it is: `<s>` is a token and not a tag."""
    return html.escape(text, quote=False)  # of quotation marks plotly would show the code


def colours(
    numbers: np.ndarray,
    limits: tuple[float, float] | None,
    one_sign: str | list[list[object]],
    both_signs: str | list[list[object]],
    title: str,
) -> dict[str, object]:
    """A colour axis: two colours that meet at zero where values have both signs, else one scale from lowest to highest.

    With both signs the scale reaches as far below zero as above, also where the limits do not.

    Raises:
        ValueError: for limits that are not in order.
    """
    if limits and not limits[0] < limits[1]:
        raise ValueError(f"limits={limits} are not a lower and a higher number, like (0, 1).")
    finite = numbers[np.isfinite(numbers)]
    low, high = limits or (float(finite.min()), float(finite.max()))
    signs = low < 0 < high
    if signs:
        low, high = min(low, -high), max(high, -low)
    if low == high:
        high = low + (abs(low) or 1.0)
    scale = both_signs if signs else one_sign
    return {"colorscale": scale, "colorbar": {"title": {"text": title}}, "cmin": low, "cmax": high}


def faded(ink: str) -> str:
    """A colour, all but transparent, for the band around its line."""
    red, green, blue = (int(ink[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.18)"


def tick_step(count: float, most: int) -> int:
    """The whole number, a round one, to go from tick to tick so that there are not too many."""
    return next(
        step * power for power in (1, 10, 100, 1000, 10000) for step in (1, 2, 5) if count <= most * step * power
    )
