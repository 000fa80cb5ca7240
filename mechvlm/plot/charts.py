"""Charts of arrays with named dims: lines, bars and tables in colours.

Rule this module guards: every dim of the array is drawn. One too many is refused, never averaged or dropped silently.

>>> bars(probabilities, x="word", colour="prompt").data[0].name
'real'
"""

from collections.abc import Iterator, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from mechvlm.plot.look import DASHES, NOTHING, PALETTE, colours, faded, finished, label, one_array, plain, tick_step

Band = tuple[xr.DataArray, xr.DataArray]
"""A lower and an upper bound, shaped like the array that they bound."""


def lines(
    array: xr.DataArray,
    x: str,
    colour: str | None = None,
    dash: str | None = None,
    band: Band | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """One line for each value of a dim, for instance attention by layer with a line for each span.

    Args:
        array: dims `x`, `colour` and `dash`, and no others.
        colour: the dim whose values get a colour each; more than seven get shades from dark to light.
        dash: the dim whose values get solid, dashed and dotted lines, for instance real and null; at most four.
        band: lower and upper bounds, shaped like `array`, for instance of a confidence interval.

    Raises:
        ValueError: for other dims, or nothing to draw.

    Example:
        >>> lines(profile.mass.mean(["example", "head"]), x="layer", colour="span", title="Where the answer looks")
    """
    _check(array, "lines", [x, colour, dash])
    if dash and array.sizes[dash] > len(DASHES):
        raise ValueError(f"{dash!r} has {array.sizes[dash]} values, and there are 4 dashes; use colour={dash!r}.")
    places, ticks = _axis(array[x].values)
    bounds = _bounds(array, band)
    figure = go.Figure()
    for place, name, ink, style in _series(array, colour, dash):
        shared = {"x": places, "name": name, "legendgroup": name}
        for bound, fill in zip(bounds, ("none", "tonexty"), strict=False):
            edge = {"mode": "lines", "line": {"width": 0}, "fill": fill, "fillcolor": faded(ink)}
            figure.add_scatter(y=bound.isel(place).values, showlegend=False, hoverinfo="skip", **edge, **shared)
        one = array.isel(place)
        line = {"color": ink, "dash": style, "width": 2.5}
        hover = {"hovertext": hover_texts(one), "hoverinfo": "text"}
        mode = "lines+markers" if one.size <= 40 else "lines"
        figure.add_scatter(y=one.values, mode=mode, line=line, marker_size=6, **hover, **shared)
    figure.update_xaxes(title_text=label(array, x), **ticks)
    return _with_legend(figure, array, colour, dash, title, caption, 560)


def bars(
    array: xr.DataArray,
    x: str,
    colour: str | None = None,
    band: Band | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """A bar for each value, for instance the probability of each answer, with real and null image side by side.

    Args:
        array: dims `x` and `colour`, and no others.
        colour: the dim whose values stand side by side, a colour each.
        band: lower and upper bounds, shaped like `array`, drawn as error bars.

    Raises:
        ValueError: for other dims, or nothing to draw.

    Example:
        >>> bars(probabilities, x="word", colour="prompt")
    """
    _check(array, "bars", [x, colour])
    places, ticks = _axis(array[x].values.astype(str))
    bounds = _bounds(array, band)
    figure = go.Figure()
    for place, name, ink, _ in _series(array, colour, None):
        one = array.isel(place)
        low, high = [bound.isel(place) for bound in bounds] or [one, one]
        reach = {"array": (high - one).values, "arrayminus": (one - low).values, "visible": bool(bounds)}
        hover = {"hovertext": hover_texts(one), "hoverinfo": "text"}
        figure.add_bar(x=places, y=one.values, name=name, marker_color=ink, error_y=reach, **hover)
    figure.update_xaxes(title_text=label(array, x), showgrid=False, **ticks)
    figure.update_layout(bargap=0.35, bargroupgap=0.08)
    return _with_legend(figure, array, colour, None, title, caption, min(900, max(320, 60 * array.size)))


def heatmap(
    array: xr.DataArray,
    facet: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """A table in colours: the first dim goes down, the second to the right, for instance layer by head.

    Values of both signs get two colours that meet at zero, others one scale from the lowest to the highest. What is no
    number is grey.

    Args:
        array: two dims, or three with `facet`.
        facet: the dim whose values, at most three, stand side by side on one scale, for instance real and null. It may
            be left out where only one dim is that short.
        limits: lowest and highest value of the colours, for figures that are to be compared.

    Raises:
        ValueError: for other dims, or nothing to draw.

    Example:
        >>> heatmap(ablate_each_head(vlm, real, logit_difference("yes", "no")), title="What each head adds")
    """
    facet = facet or _short_dim(array)
    down, right = _table_dims(array, facet)
    panels = [array.isel({facet: place}) for place in range(array.sizes[facet])] if facet else [array]
    names = [plain(f"{facet}: {value}") for value in array[facet].values] if facet else None
    wide = min(64.0, max(6.0, 680 / (len(panels) * array.sizes[right])))
    tall = min(36.0, max(6.0, 560 / array.sizes[down]))
    figure = make_subplots(1, len(panels), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.04)
    cells = {"coloraxis": "coloraxis", "hoverinfo": "text", "xgap": int(wide > 12), "ygap": int(tall > 12)}
    for number, panel in enumerate(panels, 1):
        table = panel.transpose(down, right)
        texts = hover_texts(table, {facet: array[facet].values[number - 1]} if facet else {})
        figure.add_heatmap(z=table.values, hovertext=texts, **cells, row=1, col=number)
    figure.update_xaxes(title_text=label(array, right), **_table_axis(array[right].values, wide))
    figure.update_yaxes(autorange="reversed", **_table_axis(array[down].values, tall))
    figure.update_yaxes(title_text=label(array, down), col=1)
    axis = colours(array.values, limits, "Viridis", "RdBu_r", label(array))
    figure.update_layout(coloraxis=axis, plot_bgcolor=NOTHING)
    width, height = wide * len(panels) * array.sizes[right], tall * array.sizes[down]
    return finished(figure, title, caption, max(280.0, width), max(160.0, height))


def hover_texts(array: xr.DataArray, more: dict[str, object] | None = None) -> np.ndarray:
    """For each value of an array what to say about it: its coordinates, each in a line, and the value."""
    texts = np.empty(array.shape, dtype=object)
    scalars = {str(name): one.item() for name, one in array.coords.items() if one.ndim == 0}
    name = label(array)
    along = [(str(dim), array[dim].values) for dim in array.dims]
    for place in np.ndindex(*array.shape):
        named = {**scalars, **(more or {}), **{dim: of[at] for (dim, of), at in zip(along, place, strict=True)}}
        said = [plain(f"{dim} {value}") for dim, value in named.items()]
        texts[place] = "<br>".join([*said, f"<b>{name} {float(array.values[place]):.4g}</b>"])
    return texts


def _check(array: xr.DataArray, drawer: str, wanted: Sequence[str | None]) -> None:
    """Raises: ValueError, TypeError: where an array is not one of numbers with exactly the dims that are drawn."""
    one_array(array, drawer)
    dims, drawn = [str(dim) for dim in array.dims], [dim for dim in wanted if dim is not None]
    for dim in drawn:
        if dim not in dims:
            raise ValueError(f"there is no dim {dim!r} to draw; the array has {', '.join(dims) or 'none'}.")
    if len(set(drawn)) < len(drawn):
        raise ValueError(f"each dim can be drawn once, and {drawer} was asked for {', '.join(drawn)}.")
    spare = [dim for dim in dims if dim not in drawn]
    if spare:
        raise ValueError(
            f"{drawer} would draw {', '.join(drawn)}, and the array also has {', '.join(spare)}; choose or average "
            f"first, like array.mean({spare})."
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{drawer} draws numbers, and the array holds {array.dtype}.")
    if not np.isfinite(array.values.astype(float)).any():
        raise ValueError(f"there is nothing to draw: of the array's {array.size} values none is a finite number.")


def _short_dim(array: xr.DataArray) -> str | None:
    """The facet of an array of three dims that does not name it: the only one with at most three values."""
    if not isinstance(array, xr.DataArray) or array.ndim != 3:
        return None
    short = [str(dim) for dim in array.dims if array.sizes[dim] <= 3]
    return short[0] if len(short) == 1 else None


def _table_dims(array: xr.DataArray, facet: str | None) -> tuple[str, str]:
    if isinstance(array, xr.DataArray) and array.ndim != 2 + bool(facet):
        raise ValueError(
            f"heatmap draws two dims, and a third as facet=; the array has {', '.join(map(str, array.dims)) or 'none'}"
            f"{f', and the facet is {facet}' if facet else ''}."
        )
    _check(array, "heatmap", [*(str(dim) for dim in array.dims if dim != facet), facet])
    if facet and array.sizes[facet] > 3:
        raise ValueError(f"{facet!r} has {array.sizes[facet]} values, and at most 3 tables stand side by side.")
    down, right = [str(dim) for dim in array.dims if dim != facet]
    return down, right


def _series(array: xr.DataArray, colour: str | None, dash: str | None) -> Iterator[tuple[dict, str, str, str]]:
    """Where in the array each line or bar is, its name in the legend, its colour and its dash."""
    many = array.sizes[colour] if colour else 1
    inks = (
        PALETTE if many <= len(PALETTE) else sample_colorscale("Viridis", np.linspace(0, 0.9, many), colortype="tuple")
    )
    for first in range(many):
        for second in range(array.sizes[dash] if dash else 1):
            place = {dim: at for dim, at in ((colour, first), (dash, second)) if dim}
            name = ", ".join(str(array[dim].values[at]) for dim, at in place.items())
            yield place, plain(name), _hex(inks[first]), DASHES[second]


def _hex(ink: str | tuple[float, float, float]) -> str:
    return ink if isinstance(ink, str) else "#" + "".join(f"{round(255 * part):02x}" for part in ink)


def _bounds(array: xr.DataArray, band: Band | None) -> list[xr.DataArray]:
    for bound in band or ():
        if dict(bound.sizes) != dict(array.sizes):
            raise ValueError(f"a bound of the band has sizes {dict(bound.sizes)}, and the array {dict(array.sizes)}.")
    return [bound.transpose(*array.dims) for bound in band or ()]


def _axis(values: np.ndarray) -> tuple[np.ndarray, dict[str, object]]:
    """Where to draw coordinates, and the axis's ticks. Texts stand side by side, also where two are the same."""
    if values.dtype.kind in "iu":
        return values, {"tickvals": values[:: tick_step(len(values), 16)], "zeroline": False}
    if values.dtype.kind == "f":
        return values, {}
    places = np.arange(len(values))
    named = {"tickvals": places, "ticktext": [plain(str(value)) for value in values]}
    return places, {**named, "ticklabeloverflow": "allow"}  # or the last one may be left out


def _table_axis(values: np.ndarray, size: float) -> dict[str, object]:
    """The ticks of a table whose cells have a size in pixels: as many labels as there is room for."""
    step = tick_step(18 / size, 1) if values.dtype.kind in "iuf" else 1
    shown = [plain(f"{value:.4g}" if values.dtype.kind == "f" else str(value)) for value in values[::step]]
    return {"tickvals": np.arange(len(values))[::step], "ticktext": shown, "showgrid": False, "zeroline": False}


def _with_legend(
    figure: go.Figure, array: xr.DataArray, colour: str | None, dash: str | None, title: str, caption: str, width: float
) -> go.Figure:
    heading = ", ".join(label(array, dim) for dim in (colour, dash) if dim)
    figure.update_yaxes(title_text=label(array))
    figure.update_layout(legend_title_text=heading, showlegend=bool(heading))
    return finished(figure, title, caption, width, max(330, 22 * len({trace.name for trace in figure.data}) + 40))
