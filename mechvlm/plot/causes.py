"""Figures of what was cut or put back, layer by layer.

>>> found = information_flow(vlm, [real, null], edges=["image->last", "last->last"], layers=[0, 4])
>>> figure = flow(found)
"""

import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.charts import heatmap, lines


def flow(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The change of the answer by each cut edge over layers, with its interval, and the same by random keys, dashed.

    Args:
        found: what `information_flow` returns, or some edges of it.
        caption: by default says what the lines and bands are.

    Raises:
        TypeError: for anything else.

    Example:
        >>> found = mv.information_flow(vlm, [real, null], edges=["image->last", "last->last"], layers=[0, 4])
        >>> mv.plot.flow(found.sel(edge=["image->last"]), title="From the picture to the answer")
    """
    _check(found, "flow", "edge", "information_flow", "vlm, prompts")
    parts, names = [(found["mean"], found["low"], found["high"])], ["the edge"]
    count = int(found.answered_right.sum())
    said = f"Mean over {count} prompt{'s' if count != 1 else ''}"
    if bool(found["low"].notnull().any()):
        said += f"; the band is its {100 * found.attrs['level']:g} % interval, clustered"
    if "control" in found:
        every = found.control.mean("sample").mean("prompt")
        parts.append((every, every, every))
        names.append("random keys")
        said += ". Dashed: as many random keys cut from the same queries"
    axis = xr.Variable("cut", names)
    mean, low, high = (xr.concat(one, axis, coords="minimal", compat="override") for one in zip(*parts, strict=True))
    mean = mean.assign_attrs(found["mean"].attrs)
    mean["layer"].attrs.setdefault("long_name", _layers(found))
    dash = "cut" if len(names) > 1 else None
    drawn = [one if dash else one.isel(cut=0, drop=True) for one in (mean, low, high)]
    band = (drawn[1], drawn[2])
    figure = lines(drawn[0], "layer", "edge", dash, band=band, title=title, caption=caption or f"{said}.")
    return figure.update_xaxes(zeroline=False)


def tracing(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """How much of the answer each place brings back: spans or positions down, layers to the right.

    Positions that are image tokens can be drawn on the picture: `over_image(found["mean"].sel(layer=3), ...)`.

    Args:
        found: what `causal_trace` returns.
        caption: by default says between which values the metric was, clean and corrupted.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.tracing(mv.causal_trace(vlm, real, yes, layers=[0, 4], samples=2))
    """
    _check(found, "tracing", "indirect", "causal_trace", "vlm, prompt")
    across = [str(dim) for dim in found["mean"].dims if dim != "layer"]
    mean = found["mean"].transpose(*across, "layer")
    mean["layer"].attrs.setdefault("long_name", _layers(found))
    draws = found.sizes["sample"]
    said = (
        f"Metric with {found.attrs['site']} put back minus corrupted, the mean over {draws} draw"
        f"{'s' if draws > 1 else ''} of noise. Clean {float(found.clean):.4g}, corrupted "
        f"{float(found.corrupted.mean()):.4g}."
    )
    return heatmap(mean, title=title, caption=caption or said)


def _layers(found: xr.Dataset) -> str:
    """What the axis of layers counts."""
    alone = bool((found["first"] == found["last"]).all())
    return "layer" if alone else "layers" if found["layer"].dtype.kind == "U" else "centre of the window of layers"


def _check(found: object, drawer: str, needed: str, experiment: str, given: str) -> None:
    """Refuse what the experiment does not return."""
    if not isinstance(found, xr.Dataset) or not {needed, "mean", "layer"} <= {*found.variables}:
        raise TypeError(
            f"{drawer} draws what {experiment} returns, and was given a {type(found).__name__}; make it with "
            f"mv.{experiment}({given})."
        )
