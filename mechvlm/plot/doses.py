"""Figures of a bias: what each amount does beside a moved threshold, and each set of layers beside random ones.

Rule this module guards: no accuracy is drawn without that of the moved threshold, or of chance, beside it.

>>> some = mv.evaluate.read_pope("demo", "adversarial")[:6]
>>> layer_controls(mv.methods.viar.bias_layers(vlm, some, {"first": [0]}, controls=1, resamples=20)).data[0].name
'random layers'
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from mechvlm.plot.look import INK, PALETTE, faded, finished, label, plain

WIDTH, TALL = 560, 560
BIASED, MOVED = PALETTE[0], PALETTE[1]
CURVES = {"accuracy": ("biased", BIASED, "solid"), "matched": ("threshold moved instead", MOVED, "dash")}
WHITE = {"bgcolor": "rgba(255, 255, 255, 0.8)", "borderpad": 1}
MEASURES = ("accuracy", "beyond")


def dose_curves(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """Accuracy at each amount of a bias and with the threshold moved instead, what is left between them, and the mass.

    From top to bottom: accuracy of the biased model and of the unedited one with its threshold moved until it says yes
    as often; the difference of the two, where 0 is no more than a threshold; the share of yes, and the attention that
    the picture gets. Bands are intervals.

    Args:
        found: what `bias_doses` returns.
        caption: by default says what is drawn, and of how many questions.

    Raises:
        TypeError: for anything else.

    Example:
        >>> some = mv.evaluate.read_pope("demo", "adversarial")[:6]
        >>> found = mv.methods.viar.bias_doses(vlm, some, [0, 2], layers=[2, 3], masses=1, resamples=20)
        >>> mv.plot.dose_curves(found, title="Looking more, or saying yes more?")
    """
    _made(found, "dose_curves", "bias_doses", ("accuracy", "matched", "beyond", "yes_ratio"))
    figure = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.42, 0.29, 0.29])
    for name, (said, ink, dash) in CURVES.items():
        _curve(figure, found, name, said, ink, dash, 1)
    _curve(figure, found, "beyond", "beyond the threshold", PALETTE[2], "solid", 2)
    figure.add_hline(y=0, line={"color": INK, "width": 1}, row=2, col=1)
    _curve(figure, found, "yes_ratio", "share of yes", PALETTE[3], "solid", 3)
    if "mass" in found:
        _curve(figure, found, "mass", "attention on the picture", PALETTE[4], "dot", 3)
    rows = {"accuracy": ["accuracy", "matched"], "difference": ["beyond"], "share": ["yes_ratio", "mass"]}
    for row, (name, drawn) in enumerate(rows.items(), 1):
        reach = _reach([found[one + end].values for one in drawn if one in found for end in ("", "_low", "_high")])
        within = _reach([np.append(reach, 0.0)]) if name == "difference" else np.clip(reach, 0, 1)
        figure.update_yaxes(title_text=name, range=within.tolist(), row=row, col=1)
    figure.update_xaxes(title_text=label(found.accuracy, "amount"), row=3, col=1)
    figure.update_layout(showlegend=True)
    items = found.sizes.get("item", 0)
    said = caption or (
        f"{items} questions. Bands: {plain(str(found.attrs.get('interval', 'intervals')))}. Below 0 in the middle: "
        "moving the threshold of the unedited model does better."
    )
    return finished(figure, title, said, WIDTH, TALL)


def layer_controls(found: xr.Dataset, measure: str = "accuracy", title: str = "", caption: str = "") -> go.Figure:
    """Each set of layers with its interval, and behind it what as many random layers reach.

    Args:
        found: what `bias_layers` returns.
        measure: "accuracy", or "beyond", the accuracy above that of the moved threshold.
        caption: by default says what is drawn.

    Raises:
        TypeError: for anything else.
        ValueError: for another measure.

    Example:
        >>> some = mv.evaluate.read_pope("demo", "adversarial")[:6]
        >>> found = mv.methods.viar.bias_layers(vlm, some, {"middle": [3, 4]}, controls=2, resamples=20)
        >>> mv.plot.layer_controls(found)
    """
    _made(found, "layer_controls", "bias_layers", ("accuracy", "random_accuracy", "p_value"))
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is not known; choose 'accuracy' or 'beyond'.")
    figure, values = go.Figure(), found[measure]
    places = np.arange(found.sizes["set"])
    names = [f"{plain(str(name))}<br>{at}" for name, at in zip(found["set"].values, found.layers.values, strict=True)]
    _chance(figure, found[f"random_{measure}"].values, places)
    ends = [found[f"{measure}{end}"].values for end in ("_low", "_high")]
    reach = {"array": ends[1] - values.values, "arrayminus": values.values - ends[0], "thickness": 2.5, "width": 8}
    mark = {"size": 12, "color": BIASED, "symbol": "diamond"}
    figure.add_scatter(x=places, y=values.values, mode="markers", marker=mark, error_y=reach, name="these layers")
    unedited = 0.0 if measure == "beyond" else float((found.accuracy - found.gain).mean())
    said = "moved threshold" if measure == "beyond" else "unedited model"
    line = {"color": MOVED, "dash": "dash", "width": 2}
    edges = [-0.5, len(places) - 0.5]
    figure.add_scatter(x=edges, y=[unedited] * 2, mode="lines", line=line, name=said, hoverinfo="skip")
    p_values = found["p_value" if measure == "accuracy" else "p_value_beyond"].values
    for place, at, p in zip(places, values.values, p_values, strict=True):
        text = "no p-value" if np.isnan(p) else f"p = {p:.2g}"
        figure.add_annotation(
            x=place, y=at, text=text, showarrow=False, xanchor="left", xshift=9, font={"size": 12}, **WHITE
        )
    figure.update_xaxes(tickvals=places, ticktext=names, showgrid=False, range=edges, zeroline=False)
    figure.update_yaxes(title_text=label(values), zeroline=False)
    figure.update_layout(showlegend=True)
    about = caption or (
        f"Intervals: {plain(str(found.attrs.get('interval', 'as computed')))}. Grey: from the lowest to the highest of "
        f"up to {found.sizes['sample']} sets of as many random layers, dotted their mean. "
        "p = (1 + k) / (1 + n), where k of a set's n random ones do at least as well."
    )
    return finished(figure, title, about, max(360, 110 * len(places)), 360)


def _curve(figure: go.Figure, found: xr.Dataset, name: str, said: str, ink: str, dash: str, row: int) -> None:
    """One line with its band."""
    x, values = found.amount.values, found[name].values
    shared = {"x": x, "legendgroup": said, "name": said}
    for end, fill in (("_low", "none"), ("_high", "tonexty")):
        edge = {"mode": "lines", "line": {"width": 0}, "fill": fill, "fillcolor": faded(ink)}
        figure.add_scatter(
            y=found[f"{name}{end}"].values, showlegend=False, hoverinfo="skip", **edge, **shared, row=row, col=1
        )
    line = {"color": ink, "dash": dash, "width": 2.5}
    figure.add_scatter(y=values, mode="lines+markers", line=line, marker_size=6, **shared, row=row, col=1)


def _reach(drawn: Sequence[np.ndarray]) -> np.ndarray:
    """From below the lowest to above the highest of some numbers, with a little room."""
    every = np.concatenate([each[np.isfinite(each)] for each in drawn])
    low, high = (every.min(), every.max()) if every.size else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.01
    return np.array([low - room, high + room])


def _chance(figure: go.Figure, random: np.ndarray, places: np.ndarray) -> None:
    """What random layers reach: a grey band, with a line at the mean."""
    listed = False
    for place, values in zip(places, random, strict=True):
        there = values[np.isfinite(values)]
        if not len(there):
            continue
        left, right = place - 0.4, place + 0.4
        x, y = [left, right, right, left, left], [there.min()] * 2 + [there.max()] * 2 + [there.min()]
        look = {"mode": "lines", "fill": "toself", "fillcolor": "rgba(120, 120, 120, 0.35)", "line": {"width": 0}}
        named = {"name": "random layers", "legendgroup": "random layers", "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=y, showlegend=not listed, **look, **named)
        middle = {"mode": "lines", "line": {"color": INK, "width": 1.5, "dash": "dot"}, "showlegend": False}
        figure.add_scatter(x=[left, right], y=[there.mean()] * 2, **middle, **named)
        listed = True


def _made(found: object, drawer: str, maker: str, needed: Sequence[str]) -> None:
    """Refuse what another function made."""
    if not isinstance(found, xr.Dataset) or not set(needed) <= set(found.data_vars):
        raise TypeError(
            f"{drawer} draws what {maker} returns, and was given a {type(found).__name__}; make it with "
            f"mv.methods.viar.{maker}."
        )
