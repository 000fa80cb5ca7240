"""Edges between the parts of a language model, drawn from left to right as the pass goes.

Rule this module guards: a node's place is a matter of its name alone, so that two figures of one model can be laid over
each other: layers across, heads up, MLPs below them.

>>> place("a3.h5", 8), place("m3", 8)
((6.0, 5.0), (7.0, -1.5))
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.nodes import Node
from mechvlm.plot.look import INK, PALETTE, finished, plain

RAISES, LOWERS = PALETTE[0], PALETTE[1]
NARROW, BROAD = 0.8, 7.0  # pixels
STEPS = 24  # of a curve
FADED = 0.75
Shown = tuple[str, str, str, float]
"""Writer, reader, span and score."""
BEFORE = 0.35
"""How far before their heads shared keys and values stand, in half layers."""


def edges(found: xr.Dataset, top: int = 30, title: str = "", caption: str = "") -> go.Figure:
    """The edges with the largest scores, as a graph: layers across, heads up, MLPs below.

    The broader an edge, the larger its score by size; blue raises the metric, orange lowers it. Where spans are apart,
    each edge is that of one span, and edges between the same two nodes lie beside each other. A key-value head stands
    before the middle of the query heads that it serves. Hovering shows names, span and score, and what the edge's patch
    did where it was verified.

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
    said = caption or _said(found, len(shown), all_of)
    layers = 1 + max((Node.parse(name).layer or 0) for name in found.reader.values)
    heads = len({Node.parse(name).head for name in found.writer.values} - {None})
    figure = layered(shown, _per_key(found.score), _exact(found), layers, heads)
    return finished(figure, title, said, width=min(1000, 150 + 90 * layers), height=120 + 26 * heads)


def place(name: str, heads: int, per_key: int = 1) -> tuple[float, float]:
    """Where a node stands: across two steps a layer, up its head.

    Args:
        heads: how many a layer has.
        per_key: query heads that share a key-value head.
    """
    node = Node.parse(name)
    if node.kind in ("embed", "image"):
        return -1.5, heads * (0.75 if node.kind == "image" else 0.25) - 0.5
    if node.layer is None:
        return float("inf"), (heads - 1) / 2
    if node.kind == "attention":
        head = (heads - 1) / 2 if node.head is None else float(node.head)
        if node.head is not None and node.reads in ("k", "v"):
            head = node.head * per_key + (per_key - 1) / 2
            return 2.0 * node.layer - (BEFORE if per_key > 1 else 0.0), head
        return 2.0 * node.layer, float(head)
    return 2.0 * node.layer + 1.0, -1.5 if node.kind == "mlp" else heads + 0.5


def layered(
    shown: Sequence[Shown],
    per_key: int = 1,
    exact: Mapping[tuple[str, str, str], float] | None = None,
    layers: int = 0,
    heads: int = 0,
) -> go.Figure:
    """Some edges between nodes, each where it stands in the pass.

    Args:
        shown: writer, reader, span (empty for all positions) and score of each.
        per_key: query heads that share a key-value head.
        exact: what patches of some of them did.
        layers, heads: at least so many are given room, so that figures of one model have nodes in the same places.

    Example:
        >>> len(layered([("image", "a0.h1<q>", "", 2.0), ("a0.h1", "logits", "", -1.0)]).data)
        5
    """
    nodes = list(dict.fromkeys(name for one in shown for name in one[:2]))
    numbers = [(Node.parse(name).layer, place(name, 1, per_key)[1]) for name in nodes]
    heads = max(heads, 1 + math.ceil(max(up for _, up in numbers)))
    end = 2.0 * max(0, layers - 1, *(layer for layer, _ in numbers if layer is not None)) + 2.5
    spots = {name: (min(across, end), up) for name, (across, up) in ((n, place(n, heads, per_key)) for n in nodes)}
    largest, beside, figure = max(abs(one[3]) for one in shown), dict[tuple, int](), go.Figure()
    for writer, reader, span, score in shown:
        ends = spots[writer], spots[reader]
        number = beside[ends] = beside.get(ends, -1) + 1
        x, y = curve(*ends, number)
        at, patched = f", {plain(span)}" if span else "", (exact or {}).get((writer, reader, span))
        text = f"{plain(writer)} -> {plain(reader)}{at}<br>score {score:+.4g}"
        text += "" if patched is None else f"<br><b>exact {patched:+.4g}</b>"
        ink = {"color": RAISES if score > 0 else LOWERS, "width": NARROW + (BROAD - NARROW) * abs(score) / largest}
        look = {"mode": "lines", "opacity": FADED, "hoverinfo": "text", "hovertext": text, "showlegend": False}
        figure.add_scatter(x=x, y=y, line=ink, **look)
    for colour, name in ((RAISES, "raises the metric"), (LOWERS, "lowers it")):
        figure.add_scatter(x=[None], y=[None], mode="lines", line={"color": colour, "width": 3}, name=name)
    _draw_nodes(figure, spots)
    figure.update_layout(showlegend=True)
    ticks = np.arange(0, end - 2, 2)
    figure.update_xaxes(title_text="layer", tickvals=ticks, ticktext=[str(int(at // 2)) for at in ticks])
    figure.update_xaxes(range=[-2.4, end + 0.8], zeroline=False)
    figure.update_yaxes(title_text="head", tickvals=list(range(heads)), range=[-2.4, heads + 0.2], zeroline=False)
    return figure


def _draw_nodes(figure: go.Figure, spots: Mapping[str, tuple[float, float]]) -> None:
    """The nodes over their edges; a part that reads and writes is one of them."""
    named: dict[tuple[float, float], list[str]] = {}
    for name, spot in spots.items():
        own = name.partition("<")[0]
        named.setdefault(spot, []).extend([own] if own not in named.get(spot, []) else [])
    texts = [plain(min(names, key=len)) for names in named.values()]
    across, up = zip(*named, strict=True)
    marker = {"size": 9, "color": "white", "line": {"color": INK, "width": 1.5}}
    sides = ["bottom center" if y < 0 else "top center" for y in up]
    sides = ["middle left" if ".kv" in text else side for text, side in zip(texts, sides, strict=True)]
    look = {"mode": "markers+text", "textposition": sides, "textfont": {"size": 11}, "hoverinfo": "skip"}
    figure.add_scatter(x=across, y=up, text=texts, marker=marker, showlegend=False, **look)


def curve(start: tuple[float, float], end: tuple[float, float], number: int = 0) -> tuple[list[float], list[float]]:
    """A line that leaves and arrives level; further ones between the same two places lie beside the first.

    Example:
        >>> x, y = curve((0.0, 0.0), (2.0, 1.0))
        >>> x[0], y[0], x[-1], y[-1]
        (0.0, 0.0, 2.0, 1.0)
    """
    along = np.linspace(0, 1, STEPS)
    rise = along**2 * (3 - 2 * along)
    flat = 0.25 if start[1] == end[1] else 0.0  # or it would go through the nodes between
    bow = (flat + 0.3 * ((number + 1) // 2) * (-1) ** number) * np.sin(np.pi * along)
    return (start[0] + (end[0] - start[0]) * along).tolist(), (start[1] + (end[1] - start[1]) * rise + bow).tolist()


def _largest(score: xr.DataArray, top: int) -> tuple[list[Shown], int]:
    """The edges with the largest scores, the smallest of them first, and how many edges there are."""
    if top < 1:
        raise ValueError(f"top={top} draws nothing; give 1 or more edges.")
    apart = score if "span" in score.dims else score.expand_dims(span=[""])
    values = apart.transpose("writer", "reader", "span").values
    size = np.where(np.isfinite(values), np.abs(values), -1.0).ravel()
    if not (size > 0).any():
        raise ValueError("all scores are 0, so there is no edge to draw; give prompts that differ.")
    order = [at for at in np.argsort(-size, kind="stable")[:top] if size[at] > 0][::-1]
    names = [apart[dim].values for dim in ("writer", "reader", "span")]
    found = []
    for at in order:
        place_of = np.unravel_index(at, values.shape)
        writer, reader, span = (str(one[i]) for one, i in zip(names, place_of, strict=True))
        found.append((writer, reader, span, float(values[place_of])))
    return found, int((size >= 0).sum())


def _per_key(score: xr.DataArray) -> int:
    """How many query heads share a key-value head."""
    nodes = [Node.parse(name) for name in score.reader.values]
    heads, keys = ({node.head for node in nodes if node.reads == of and node.head is not None} for of in "qk")
    return len(heads) // len(keys) if keys else 1


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
    of = found.isel(kind=0)
    top, random = (float(of.pearson.sel(among=among)) for among in ("top", "random"))
    worst = f", largest error of these {float(of.missed):.3g}" if "missed" in of else ""
    return (
        f"{said}. Of {found.attrs['verify']} from the top and as many at random, patched: r {top:.3f} among the top, "
        f"{random:.3f} among random edges{worst}."
    )
