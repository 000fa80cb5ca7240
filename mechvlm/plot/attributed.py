"""Estimates of patches against the patches themselves.

>>> figure = attributed(attribution_patching(vlm, real, null, yes, kinds=["z"], layers=[4], verify=3))
>>> [trace.name for trace in figure.data]
['estimate = exact', 'z, top', 'z, random']
"""

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.look import GREY, INK, PALETTE, finished, plain

SYMBOLS = {"top": "circle", "random": "circle-open"}


def attributed(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """What each patched node was estimated to change, across, against what its patch changed, up, with the diagonal.

    Estimates without a sign ("drop", "atp*") are drawn against the size of the change, and so are shares of
    information-flow routes, without the diagonal, since they are in another unit.
    A node far above or below the middle and near the upright axis is one that the estimate passed over. All estimates
    are drawn with `patched_positions(found.mlp_out)`, `heatmap` or, at image tokens, `over_image`.

    Args:
        found: what `attribution_patching` or `edge_attribution` returns with `verify`.
        caption: by default says how many nodes of each kind were patched, and how well the two agree.

    Raises:
        TypeError: for anything else.

    Example:
        >>> found = mv.attribution_patching(vlm, real, null, yes, kinds=["attn_out"], layers=[2, 4], verify=5)
        >>> mv.plot.attributed(found, title="Attribution patching against patching")
    """
    if not isinstance(found, xr.Dataset) or not {"estimate", "exact", "pearson"} <= set(found.data_vars):
        edges = isinstance(found, xr.Dataset) and "writer" in found.dims
        made, parts = ("edge_attribution", "edges") if edges else ("attribution_patching", "nodes")
        without = " without them" if edges or (isinstance(found, xr.Dataset) and "target_metric" in found.attrs) else ""
        raise TypeError(
            f"attributed draws what {made} returns where some {parts} are patched too, and was given a "
            f"{type(found).__name__}{without}; make it with mv.{made}(vlm, source, target, metric, verify=20)."
        )
    # Estimates without sign are of sizes.
    shares = "missed" not in found
    signed = bool(found.attrs.get("signed", 1)) and not shares
    exact, said = (found.exact, "exact") if signed else (np.abs(found.exact), "|exact|")
    both = np.stack([found.estimate.values, exact.values])
    ends = [float(np.nanmin(both)), float(np.nanmax(both))]
    figure = go.Figure()
    line = {"color": GREY, "dash": "dash", "width": 1.5}
    if not shares:
        figure.add_scatter(x=ends, y=ends, mode="lines", name=f"estimate = {said}", line=line, hoverinfo="skip")
    for number, kind in enumerate(map(str, found["kind"].values)):
        for drawn, symbol in SYMBOLS.items():
            one = found.assign(drawn_at=exact).sel(kind=kind)
            one = one.isel(node=np.flatnonzero(one.drawn.values == drawn))
            if not one.sizes["node"]:
                continue
            ink = PALETTE[number % len(PALETTE)]
            marker = {"symbol": symbol, "size": 8, "color": ink, "line": {"width": 1.5, "color": ink}}
            look = {"mode": "markers", "marker": marker, "hovertext": _texts(one), "hoverinfo": "text"}
            figure.add_scatter(x=one.estimate.values, y=one.drawn_at.values, name=f"{kind}, {drawn}", **look)
    figure.update_xaxes(title_text=f"estimate ({found.estimate.attrs['units']})", zerolinecolor=INK)
    figure.update_yaxes(title_text=f"{said} ({found.exact.attrs['units']})", zerolinecolor=INK)
    figure.update_layout(showlegend=True)
    return finished(figure, title, caption or _said(found), width=460, height=460)


def _texts(one: xr.Dataset) -> list[str]:
    """What is said of each node of a kind."""
    if "node_writer" in one.coords:
        return _edge_texts(one)
    place = "node_span" if "node_span" in one.coords else "node_position"
    columns = (one[name].values for name in ("node_layer", place, "node_head", "estimate", "exact"))
    return [
        (f"layer {layer}, " if layer >= 0 else "")
        + f"{place.removeprefix('node_')} {plain(str(at))}"
        + (f", head {head}" if head >= 0 else "")
        + f"<br>estimate {estimate:+.4g}<br><b>exact {exact:+.4g}</b>"
        for layer, at, head, estimate, exact in zip(*columns, strict=True)
    ]


def _edge_texts(one: xr.Dataset) -> list[str]:
    """What is said of each edge."""
    names = [
        f"{plain(str(a))} -> {plain(str(b))}"
        for a, b in zip(one.node_writer.values, one.node_reader.values, strict=True)
    ]
    spans = (
        [f", {plain(str(span))}" for span in one.node_span.values] if "node_span" in one.coords else [""] * len(names)
    )
    columns = zip(names, spans, one.estimate.values, one.exact.values, strict=True)
    return [f"{name}{span}<br>estimate {x:+.4g}<br><b>exact {y:+.4g}</b>" for name, span, x, y in columns]


def _said(found: xr.Dataset) -> str:
    """How well estimates and patches agree, kind by kind."""
    parts = [f"{kind}: {agreed(found.sel(kind=kind))}" for kind in map(str, found["kind"].values)]
    way = f"Method {found.attrs['method']}. " if "method" in found.attrs else ""
    count = found.attrs["verify"]
    return f"{way}Up to {count} nodes by estimate and as many at random of each kind. {'; '.join(parts)}."


def agreed(of: xr.Dataset) -> str:
    """How well estimates and patches of one kind agree, in words."""
    top, random = (
        [float(of[name].sel(among=among)) for name in ("pearson", "spearman")] for among in ("top", "random")
    )
    said = f"{_correlated(*top)} among the top, precision {float(of.precision):.2f} of those patched"
    if not (of.drawn == "random").any():
        return f"{said}, which are all"
    worst = ""
    if "missed" in of:
        more = f"at most {100 * float(of.missed_share):.2g} % of all others err by more"
        worst = f", largest error of these {float(of.missed):.3g} ({more}, at 95 % confidence)"
    return f"{said}, {_correlated(*random)} among random ones{worst}"


def _correlated(pearson: float, spearman: float) -> str:
    """The two correlations; of fewer than three values, or where all are the same, there are none."""
    return f"r {pearson:.3f} (of ranks {spearman:.3f})" if math.isfinite(pearson) else "too few for r, or all alike,"
