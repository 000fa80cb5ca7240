"""Edges between the parts of a language model, those with the largest scores.

>>> figure = edges(edge_attribution(vlm, null, real, yes, method="eap"), top=20)
>>> figure.layout.xaxis.title.text
'layer'
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.edge_paths import Heads
from mechvlm.plot.attributed import agreed
from mechvlm.plot.look import PALETTE, plain
from mechvlm.plot.nodes import Line, Places, wired
from mechvlm.sites import whole

EFFECTS = {"raises the metric": "#b2182b", "lowers it": "#2166ac"}  # the ends of the heat maps' colours
SHARES = {"": PALETTE[6]}  # of information flow, which are no effects
NARROW, BROAD = 0.8, 7.0  # pixels


def edges(found: xr.Dataset, top: int = 30, title: str = "", caption: str = "") -> go.Figure:
    """The edges with the largest scores, as a graph: layers across, heads up, MLPs below.

    The broader an edge, the larger its score by size; red raises the metric when it is patched from the source, blue
    lowers it, as in heat maps, and shares of information-flow routes, which do neither, are grey. Where spans are
    apart, each edge is that of one span, and edges between the same two nodes lie beside each other. A key-value head
    stands before the middle of the query heads that it serves. Hovering shows names, span and score, and what the
    edge's patch did where it was verified.

    Args:
        found: what `edge_attribution` returns.
        top: how many.
        caption: by default says how many edges are drawn, of how many, and how well scores and patches agree.

    Raises:
        TypeError: for anything else.
        ValueError: for fewer than one edge, or scores that are all nothing.

    Example:
        >>> found = mv.edge_attribution(vlm, real, null, yes, method="eap", spans="each")
        >>> mv.plot.edges(found, top=20, title="Which edges carry the answer")
    """
    if not isinstance(found, xr.Dataset) or "score" not in found or not {"writer", "reader"} <= set(found.score.dims):
        raise TypeError(
            f"edges draws what edge_attribution returns, and was given a {type(found).__name__}; make it with "
            "mv.edge_attribution(vlm, source, target, metric)."
        )
    shown, all_of = _largest(found.score, top)
    exact, largest = _exact(found), abs(shown[0][3])
    routes = found.attrs.get("method") == "information-flow-routes"
    key, heading = (SHARES, "") if routes else (EFFECTS, "patched from<br>the source")
    lines = []
    for writer, reader, span, score in shown:
        text = f"{plain(writer)} -> {plain(reader)}{f', {plain(span)}' if span else ''}<br>score {score:+.4g}"
        if (writer, reader, span) in exact:
            text += f"<br><b>exact {exact[writer, reader, span]:+.4g}</b>"
        width = NARROW + (BROAD - NARROW) * abs(score) / largest
        lines.append(Line(writer, reader, text, list(key)[0 if score > 0 else -1], width))
    names = [str(name) for dim in ("writer", "reader") for name in found[dim].values]
    within = Heads.among(names)
    places = Places.holding(names, per_key=max(1, within.heads // within.kv_heads))
    nodes = {name: plain(name) for one in lines for name in one[:2]}
    return wired(places, nodes, lines, key, heading, title, caption or _said(found, len(shown), all_of))


def _largest(score: xr.DataArray, top: int) -> tuple[list[tuple[str, str, str, float]], int]:
    """Writer, reader, span and score of the edges with the largest scores, and how many edges there are."""
    if whole("top", top) < 1:
        raise ValueError(f"top={top} draws nothing; give 1 or more edges.")
    apart = score if "span" in score.dims else score.expand_dims(span=[""])
    values = apart.transpose("writer", "reader", "span").values
    size = np.where(np.isfinite(values), np.abs(values), -1.0).ravel()
    if not (size > 0).any():
        raise ValueError("all scores are 0, so there is no edge to draw; give prompts that differ.")
    order = [at for at in np.argsort(-size, kind="stable")[:top] if size[at] > 0]
    names = [apart[dim].values for dim in ("writer", "reader", "span")]
    found = []
    for at in order:
        place_of = np.unravel_index(at, values.shape)
        writer, reader, span = (str(one[i]) for one, i in zip(names, place_of, strict=True))
        found.append((writer, reader, span, float(values[place_of])))
    return found, int((size >= 0).sum())


def _exact(found: xr.Dataset) -> dict[tuple[str, str, str], float]:
    """What the patches of the edges that were verified did."""
    if "exact" not in found:
        return {}
    of = found.isel(kind=0)
    spans = of.node_span.values if "node_span" in of.coords else [""] * of.sizes["node"]
    names = zip(of.node_writer.values, of.node_reader.values, spans, strict=True)
    return {(str(a), str(b), str(c)): float(x) for (a, b, c), x in zip(names, of.exact.values, strict=True)}


def _said(found: xr.Dataset, count: int, all_of: int) -> str:
    """What is drawn, and how well scores and patches agree."""
    said = f"The {count} largest of {all_of} edges by {found.attrs.get('method', 'score')}"
    if "exact" not in found:
        return f"{said}, none of them patched."
    at_most = found.attrs["verify"]
    return f"{said}. Up to {at_most} from the top and as many at random, patched: {agreed(found.isel(kind=0))}."
