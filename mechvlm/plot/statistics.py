"""Figures of evaluations: how sure and how right, what a threshold does, what an edit adds to it, what goes with it.

Rule this module guards: what is compared is drawn with its interval, and the threshold beside the edit.

>>> threshold_curve(mv.evaluate.stats.compare(base, edited, resamples=200)).data[0].name
'base, threshold moved'
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.look import GREY, INK, PALETTE, faded, finished, plain

DRAWN = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes-ratio"}
"""Metrics that a comparison draws, in this order; the Brier score is the only one of which less is better."""
MODELS = {"base": PALETTE[0], "edited": PALETTE[1], "threshold": PALETTE[2]}
COMPARED = {"value", "difference", "advantage", "sweep_accuracy", "bin_accuracy"}


def reliability_diagram(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """How often answers are right against how likely the model took them to be, a point a bin, beside the diagonal.

    Args:
        found: what `reliability`, `calibration` or `compare` returns.
        caption: by default says what the points are, and the expected calibration error.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.reliability_diagram(mv.evaluate.stats.reliability([0.9, 0.8, 0.3], ["yes", "no", "no"]))
    """
    compared = isinstance(found, xr.Dataset) and "bin_accuracy" in found
    if not compared:
        _check(
            found, "reliability_diagram", {"confidence", "accuracy", "n_items", "ece"}, "mv.evaluate.stats.reliability"
        )
    figure, said, lowest = go.Figure(), [], 1.0
    even = {"color": GREY, "dash": "dash", "width": 1.5}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=even, name="as right as sure", hoverinfo="skip")
    for name in ("base", "edited") if compared else ("",):
        one = found.sel(model=name) if compared else found
        confidence, accuracy, items = (
            one[f"bin_{part}" if compared else ("n_items" if part == "items" else part)].values
            for part in ("confidence", "accuracy", "items")
        )
        held = np.flatnonzero(items > 0)
        lowest = min(lowest, confidence[held].min())
        size = 6 + 22 * np.sqrt(items[held] / items[held].sum())
        ink = MODELS[name or "base"]
        texts = [f"{accuracy[at]:.3f} right<br>{confidence[at]:.3f} sure<br><b>{items[at]:g} items</b>" for at in held]
        look = {"marker": {"size": size, "color": ink}, "line": {"color": ink, "width": 2}, "mode": "lines+markers"}
        hover = {"hovertext": texts, "hoverinfo": "text", "name": name or "answers"}
        figure.add_scatter(x=confidence[held], y=accuracy[held], **look, **hover)
        said.append(f"{name}{' ' if name else ''}{float(one.ece):.4f}")
    figure.update_xaxes(title_text="mean confidence of a bin", range=[0.45 if lowest >= 0.5 else 0, 1.03])
    figure.update_yaxes(title_text="share of right answers", range=[0, 1.03])
    figure.update_layout(showlegend=True)
    note = f"A point is a bin, as large as it has items. Expected calibration error: {', '.join(said)}."
    return finished(figure, title, caption or note, 420, 420)


def threshold_curve(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """Accuracy against the yes-ratio as the threshold moves, with the edited model beside the curve.

    Args:
        found: what `compare` or `threshold_sweep` returns.
        caption: by default says what the curve is, and of a comparison whether the edit is more than a threshold.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.threshold_curve(mv.evaluate.stats.threshold_sweep([2.0, -1.0, 0.5], ["yes", "no", "no"]))
    """
    compared = isinstance(found, xr.Dataset) and "sweep_accuracy" in found
    if not compared:
        _check(found, "threshold_curve", {"accuracy", "yes_ratio"}, "mv.evaluate.stats.threshold_sweep", "shift")
    before = "sweep_" if compared else ""
    ratio, accuracy = (found[before + name].values for name in ("yes_ratio", "accuracy"))
    texts = [
        f"shift {shift:+g}<br>yes-ratio {x:.4f}<br><b>accuracy {y:.4f}</b>"
        for shift, x, y in zip(found["shift"].values, ratio, accuracy, strict=True)
    ]
    look = {"mode": "lines+markers", "marker": {"size": 5, "color": GREY}, "line": {"color": GREY, "width": 2}}
    figure = go.Figure()
    figure.add_scatter(x=ratio, y=accuracy, name="base, threshold moved", hovertext=texts, hoverinfo="text", **look)
    for name in ("base", "edited") if compared else ():
        x, y = (found.sel(model=name, metric=metric) for metric in ("yes_ratio", "accuracy"))
        figure.add_scatter(
            **{"x": [float(x["value"])], "y": [float(y["value"])], "name": name, "mode": "markers"},
            **{"error_x": _reach([x]), "error_y": _reach([y])},
            marker={"size": 11, "color": MODELS[name], "symbol": "diamond" if name == "edited" else "circle"},
        )
    figure.update_xaxes(title_text="share of answers that are yes")
    figure.update_yaxes(title_text="accuracy")
    figure.update_layout(showlegend=compared)
    said = "Each point of the curve is one shift of the threshold."
    if compared:
        said = f"{said} Bars: {found.attrs['interval']}. {_sentence(found.attrs['verdict'])}"
    return finished(figure, title, caption or said, 520, 360)


def comparison(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """What an edit changes in every metric, and what of it a threshold of the same yes-ratio does not.

    Args:
        found: what `compare` returns.
        caption: by default says what the bars are.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.comparison(mv.evaluate.stats.compare(base, edited, resamples=200), title="What the bias does")
    """
    _check(found, "comparison", COMPARED, "mv.evaluate.stats.compare")
    figure, names = go.Figure(), list(DRAWN)
    figure.add_vline(x=0, line={"color": GREY, "width": 1.5})
    drawn = (
        ("edited - base", "difference", MODELS["edited"], 0.14),
        ("edited - threshold moved", "advantage", MODELS["threshold"], -0.14),
    )
    for name, variable, ink, aside in drawn:
        one = [found.sel(metric=metric) for metric in names]
        values = [float(each[variable]) for each in one]
        texts = [
            f"{DRAWN[metric]}<br><b>{value:+.4f}</b><br>from {float(each[variable + '_low']):+.4f} "
            f"to {float(each[variable + '_high']):+.4f}"
            for metric, each, value in zip(names, one, values, strict=True)
        ]
        figure.add_scatter(
            **{"x": values, "y": -np.arange(len(names)) + aside, "mode": "markers", "name": name},
            **{"error_x": _reach(one, variable), "hovertext": texts, "hoverinfo": "text"},
            marker={"size": 9, "color": ink},
        )
    ticks = {"tickvals": -np.arange(len(names)), "ticktext": list(DRAWN.values())}
    figure.update_yaxes(showgrid=False, zeroline=False, **ticks)
    figure.update_xaxes(title_text="difference", zeroline=False)
    figure.update_layout(showlegend=True)
    said = (
        f"Bars: {found.attrs['interval']}, {found.attrs['items']} items on {found.attrs['images']} images. Threshold "
        "moved: the base, with its threshold where it says yes as often as the edited model."
    )
    if not np.isfinite(found.matched_shift):
        why = plain(str(found.attrs.get("threshold", "answers are not of the margin")))
        said = f"{said.partition(' Threshold ')[0]} No threshold is moved: {why}."
    return finished(figure, title, caption or said, 560, 300)


def association(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """Correlations layer by layer, with the interval of what was tested, and within each stratum.

    Args:
        found: what `associate` returns, of values over one dim.
        caption: by default says what was tested, and which marks are what.

    Raises:
        TypeError: for anything else.
        ValueError: for another number of dims than one.

    Example:
        >>> values = xr.DataArray(np.arange(12.0).reshape(6, 2) % 5, dims=["item", "layer"])
        >>> mv.plot.association(mv.evaluate.stats.associate(values, [0, 1, 0, 1, 1, 1], permutations=99))
    """
    _check(found, "association", {"r", "p_bh", "p_max"}, "mv.evaluate.stats.associate")
    if found.r.ndim != 1:
        dims = ", ".join(map(str, found.r.dims)) or "none"
        raise ValueError(f"association draws one dim, and the correlations have {dims}; choose with sel.")
    dim, tested = str(found.r.dims[0]), str(found.attrs["tested"])
    x = found[dim].values
    figure, ink = go.Figure(), MODELS["base"]
    shared = {"x": x, "mode": "lines", "showlegend": False, "hoverinfo": "skip", "line": {"width": 0}}
    figure.add_scatter(y=found.low.values, **shared)
    figure.add_scatter(y=found.high.values, fill="tonexty", fillcolor=faded(ink), **shared)
    if tested != "r":
        figure.add_scatter(x=x, y=found.r.values, mode="lines", name="all", line={"color": GREY, "dash": "dot"})
        for stratum, colour in zip(found.stratum.values, PALETTE[1:], strict=False):
            line = {"color": colour, "dash": "dash", "width": 1.5}
            name = plain(f"within {stratum}")
            figure.add_scatter(x=x, y=found.r_stratum.sel(stratum=stratum).values, mode="lines", name=name, line=line)
    name, values = ("tested" if tested == "r" else "pooled within"), found[tested].values
    texts = [
        f"{dim} {at}<br><b>r {r:+.4f}</b><br>p {p:.3g}, BH {bh:.3g}, max {most:.3g}"
        for at, r, p, bh, most in zip(x, values, *(found[key].values for key in ("p", "p_bh", "p_max")), strict=True)
    ]
    look = {"mode": "lines+markers", "line": {"color": ink, "width": 2.5}, "marker": {"size": 5, "color": ink}}
    figure.add_scatter(x=x, y=values, name=name, hovertext=texts, hoverinfo="text", **look)
    for key, symbol, size in (("p_bh", "circle-open", 13), ("p_max", "diamond", 8)):
        held = np.flatnonzero(found[key].values <= 0.05)
        marker = {"symbol": symbol, "size": size, "color": INK, "line": {"width": 2}}
        label = {"p_bh": "p_bh up to 0.05", "p_max": "p_max up to 0.05"}[key]
        figure.add_scatter(x=x[held], y=values[held], mode="markers", marker=marker, name=label, hoverinfo="skip")
    figure.update_xaxes(title_text=dim, zeroline=False)
    figure.update_yaxes(title_text="correlation r")
    figure.update_layout(showlegend=True, legend_traceorder="normal")
    said = f"Tested: {name.replace('tested', 'all items')}. Band: 95 % over {found.attrs['clusters']} clusters."
    return finished(figure, title, caption or said, 600, 340)


def _sentence(text: str) -> str:
    return plain(f"{text[0].upper()}{text[1:]}.")


def _reach(parts: list[xr.Dataset], name: str = "value") -> dict[str, object]:
    """Error bars from the ends of intervals."""
    before = "" if name == "value" else f"{name}_"
    values, low, high = (
        np.array([float(part[key]) for part in parts]) for key in (name, f"{before}low", f"{before}high")
    )
    return {"type": "data", "array": high - values, "arrayminus": values - low, "thickness": 1.5, "width": 4}


def _check(found: object, drawer: str, wanted: set[str], maker: str, dim: str | None = None) -> None:
    """Refuse what another function made."""
    held = {str(name) for name in found.data_vars} if isinstance(found, xr.Dataset) else set()
    lacks = dim is not None and isinstance(found, xr.Dataset) and dim not in found.dims
    if not wanted <= held or lacks:
        raise TypeError(f"{drawer} was given a {type(found).__name__} that it cannot draw; make it with {maker}.")
