"""Curves of circuits: how much of a behaviour circuits of growing size bring about, beside random ones.

>>> found = circuit_faithfulness(vlm, Circuit([Edge("image", "logits")]), null, real, yes, controls=0)
>>> [trace.name for trace in faithfulness(found).data if trace.showlegend is not False]
['circuit', 'without it']
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.look import GREY, PALETTE, faded, finished, label, plain

NARROW = 0.1
"""Below this share sizes stand where their logarithms are, since they usually double from one to the next."""
TICKS = [one * 10.0**power for power in range(-6, 0) for one in (1, 2, 5)] + [1.0]
NEEDED = {"faithfulness_mean", "faithfulness_low", "completeness_mean", "n_edges"}


def faithfulness(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The faithfulness of circuits by their share of the model's edges, what is left without them, and chance.

    Args:
        found: what `circuit_faithfulness` returns.
            Where shares are so small that their logarithms are drawn, circuits without any edge are left out.
        caption: by default says what lines and bands are, and the areas under the curve.

    Raises:
        TypeError: for anything else.

    Example:
        >>> circuit = mv.Circuit([mv.Edge("image", "a7.kv1<v>"), mv.Edge("a7.h2", "logits")])
        >>> found = mv.circuit_faithfulness(vlm, circuit, null, real, yes, controls=1)
        >>> mv.plot.faithfulness(found, title="How much does one head explain?")
    """
    if not isinstance(found, xr.Dataset) or not {*found.data_vars, *found.coords} >= NEEDED:
        raise TypeError(
            f"faithfulness draws what circuit_faithfulness returns, and was given a {type(found).__name__}; make it "
            "with mv.circuit_faithfulness."
        )
    found = found.isel(circuit=np.argsort(found["share"].values, kind="stable"))
    least = float(found["share"].where(found["share"] > 0).min().fillna(1.0))
    if least < NARROW:  # no edges have no place among logarithms
        found = found.isel(circuit=np.flatnonzero(found["share"].values > 0))
    figure = go.Figure()
    series = {"circuit": "faithfulness", "without it": "completeness"}
    for number, (name, variable) in enumerate(series.items()):
        middle, low, high = (found[f"{variable}_{end}"].values for end in ("mean", "low", "high"))
        _curve(figure, found, name, PALETTE[number], middle, (low, high))
    if "random" in found:
        drawn = found["random"]
        ends = drawn.min("sample").values, drawn.max("sample").values
        _curve(figure, found, "random", GREY, drawn.mean("sample").values, ends)
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": "#b0b0b0", "width": 1, "dash": "dash"})
    scale = {"type": "log", "range": [np.log10(least * 0.8), 0.05]} if least < NARROW else {"range": [0.0, 1.02]}
    ticks = [tick for tick in TICKS if tick >= least * 0.8]
    named = {"tickvals": ticks, "ticktext": [f"{100 * tick:g} %" for tick in ticks]} if least < NARROW else {}
    figure.update_xaxes(title_text=label(found["share"]), **scale, **named)
    figure.update_yaxes(title_text="share of the behaviour", zeroline=False)
    figure.update_layout(showlegend=True)
    return finished(figure, title, caption or _said(found), width=560, height=360)


def _curve(
    figure: go.Figure,
    found: xr.Dataset,
    name: str,
    ink: str,
    middle: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray],
) -> None:
    """A line with its band; of one circuit a point with its bar."""
    shared = {"x": found["share"].values, "name": name, "legendgroup": name}
    known = np.isfinite(ends[0]).any()
    for bound, fill in zip(ends, ("none", "tonexty"), strict=True):
        edge = {"mode": "lines", "line": {"width": 0}, "fill": fill, "fillcolor": faded(ink)}
        if known and len(middle) > 1:
            figure.add_scatter(y=bound, showlegend=False, hoverinfo="skip", **edge, **shared)
    said = [
        f"{name}, {edges} edges, {nodes} nodes<br><b>{value:.4g}</b>"
        for edges, nodes, value in zip(found["n_edges"].values, found["n_nodes"].values, middle, strict=True)
    ]
    line = {"color": ink, "width": 2.5}
    more: dict[str, Any] = {"hovertext": said, "hoverinfo": "text"}
    if known and len(middle) == 1:
        more["error_y"] = {"array": ends[1] - middle, "arrayminus": middle - ends[0], "color": ink, "width": 6}
    figure.add_scatter(y=middle, mode="lines+markers", marker_size=6, line=line, **more, **shared)


def _said(found: xr.Dataset) -> str:
    """What the lines are, and the areas."""
    prompts = found.sizes["prompt"]
    known = bool(np.isfinite(found["faithfulness_low"]).any())
    said = [f"Mean over {prompts} prompts with the {plain(found.attrs['interval'])}." if known else ""]
    what = "edges" if "edges" in label(found["share"]) else "heads and MLPs"
    said.append(f"circuit: with its {what} alone; without it: with all others alone.")
    all_of, none = (float(found[end].mean()) for end in ("all", "none"))
    said.append(f"1: {found.attrs['metric']} with all of them, on average {all_of:.3g}; 0: with none, {none:.3g}.")
    if "random" in found:
        said.append(f"random: mean and range of {found.sizes['sample']} random circuits of each size.")
    if np.isfinite(found["cpr_mean"]):
        said.append(f"Area under the circuit's curve (CPR) {float(found['cpr_mean']):.3f},")
        said.append(f"between it and 1 (CMD) {float(found['cmd_mean']):.3f}.")
    return " ".join(filter(None, said))
