"""Circuits as pictures: each node where it stands in the model, each edge between the two.

Rule this module guards: a node stands in the same place in every figure of a model, so that two circuits can be laid
beside each other.

>>> circuit(Circuit([Edge("image", "a2.kv1<v>"), Edge("a2.h3", "logits")], heads=8, kv_heads=4)).layout.xaxis.title.text
'layer'
"""

import math

import numpy as np
import plotly.graph_objects as go

from mechvlm.circuit_value import Circuit
from mechvlm.edge_paths import Edge, place_of
from mechvlm.nodes import Node
from mechvlm.plot.look import INK, PALETTE, finished, plain, tick_step

SYMBOLS = {"attention": "circle", "mlp": "square", "embed": "diamond", "image": "diamond", "deepstack": "diamond"}
READS = {"q": "queries", "k": "keys", "v": "values", "": "MLP"}
WIDTHS = (1.1, 2.0, 3.2, 4.8)  # pixels, from the lowest quarter of the largest score to the highest
BENT = 0.09  # how far an edge is bent, as a share of its length
POINTS = 13  # of a line
MOST = 2000
"""Edges that are drawn, those with the largest scores."""


def circuit(found: Circuit, title: str = "", caption: str = "") -> go.Figure:
    """A circuit, layer by layer from left to right: heads as circles by their number, MLPs as squares below.

    Lines are edges, the broader the larger the score by size, dotted where it has another sign than most have; their
    colour is the span at which they are, or, where there are no spans, what is read: queries, keys, values, by an MLP,
    by the logits. An edge into keys or values is drawn to each head of the group that writes in the circuit.

    Args:
        found: a circuit of edges, or of chosen nodes, which are drawn without the edges between all of them.
        caption: by default the circuit in words.

    Raises:
        TypeError: for what is no circuit.
        ValueError: for one without nodes, or of all edges but some.

    Example:
        >>> edges = [mv.Edge("image", "a2.kv1<v>", "image", 2.0), mv.Edge("a2.h3", "logits", "last", 1.5)]
        >>> mv.plot.circuit(mv.Circuit(edges, heads=8, kv_heads=4))
    """
    if not isinstance(found, Circuit):
        raise TypeError(f"circuit draws a circuit, not a {type(found).__name__}; make it with mv.choose_circuit.")
    if found.inverted or not found.nodes:
        raise ValueError(f"{found!r} lists nothing to draw; give a circuit that lists edges or nodes.")
    places = Places.of(found)
    figure = go.Figure()
    shown = sorted(found.edges, key=lambda edge: -abs(edge.score) if math.isfinite(edge.score) else 0.0)[:MOST]
    _draw_edges(figure, found, places, shown)
    _draw_nodes(figure, found, places)
    step = tick_step(places.layers, 16)
    layers = list(range(0, places.layers, step))
    figure.update_xaxes(title_text="layer", tickvals=layers, range=[-1.9, places.layers + 0.9], zeroline=False)
    heads = list(range(0, places.heads, tick_step(places.heads, 16)))
    ticks = {"tickvals": [places.below, *heads], "ticktext": ["MLP", *map(str, heads)]}
    figure.update_yaxes(title_text="head", zeroline=False, range=[places.below - 0.8, places.above + 0.8], **ticks)
    figure.update_layout(showlegend=bool(found.edges))
    said = f" Drawn are the {MOST} of largest score." if len(found.edges) > MOST else ""
    dotted = any(line.line.dash == "dot" for line in figure.data)
    said += " Dotted: scores of the sign that fewer edges have." if dotted else ""
    size = min(920.0, max(380.0, 84.0 * (places.layers + 2))), min(640.0, max(260.0, 30.0 * (places.heads + 4)))
    return finished(figure, title, caption or plain(repr(found)) + "." + said, *size)


class Places:
    """Where nodes stand.

    Args:
        layers, heads: of the model, as far as the circuit tells.
    """

    def __init__(self, layers: int, heads: int) -> None:
        self.layers, self.heads = layers, heads
        self.below, self.above = -2.0, heads + 0.5

    @classmethod
    def of(cls, found: Circuit) -> "Places":
        """The places of a circuit's model."""
        nodes = [Node.parse(name) for name in [*found.nodes, *(edge.reader for edge in found.edges)]]
        layers = 1 + max((node.layer for node in nodes if node.layer is not None), default=0)
        layers = max(found.layers, layers)
        return cls(layers, max(found.heads, 1 + max((node.head or 0 for node in nodes), default=0)))

    def at(self, name: str) -> tuple[float, float]:
        """Across and up, of a node as it writes, or the logits.

        Example:
            >>> Places(4, 8).at("a2.h3"), Places(4, 8).at("m2")
            ((2.0, 3.0), (2.5, -2.0))
        """
        node = Node.parse(name)
        if node.kind in ("embed", "image"):
            return -1.2, (self.heads - 1) * (0.85 if node.kind == "image" else 0.15)
        if node.layer is None:
            return self.layers + 0.3, (self.heads - 1) / 2
        if node.kind == "attention":
            return float(node.layer), float(node.head or 0)
        return node.layer + 0.5, self.below if node.kind == "mlp" else self.above


def _draw_nodes(figure: go.Figure, found: Circuit, places: Places) -> None:
    counts: dict[str, list[int]] = {name: [0, 0] for name in found.nodes}
    for edge in found.edges:
        counts[edge.writer][1] += 1
        for name in _ends(found, edge):
            if name in counts:
                counts[name][0] += 1
    names = list(found.nodes)
    across, up = zip(*(places.at(name) for name in names), strict=True)
    said = [name + (f"<br>{into} edges in, {out} out" if found.edges else "") for name, (into, out) in counts.items()]
    kinds = [Node.parse(name).kind for name in names]
    marker = {"symbol": [SYMBOLS.get(kind, "star") for kind in kinds], "size": 13, "color": "white"}
    text = {"text": names, "textposition": "top center", "textfont": {"size": 10}, "cliponaxis": False}
    look = {"mode": "markers+text", "showlegend": False, "hovertext": said, "hoverinfo": "text"}
    figure.add_scatter(x=across, y=up, marker={**marker, "line": {"color": INK, "width": 1.6}}, **text, **look)


def _draw_edges(figure: go.Figure, found: Circuit, places: Places, shown: list[Edge]) -> None:
    """Lines in groups of one colour, breadth and dash, since a line has one of each."""
    largest = max((abs(edge.score) for edge in shown if math.isfinite(edge.score)), default=0.0)
    usual = 1 if sum(edge.score > 0 for edge in shown) >= sum(edge.score < 0 for edge in shown) else -1
    groups: dict[tuple[str, int, bool], list[Edge]] = {}
    for edge in shown:
        share = abs(edge.score) / largest if largest and math.isfinite(edge.score) else 0.0
        groups.setdefault((_colour_of(found, edge), min(3, int(4 * share)), edge.score * usual < 0), []).append(edge)
    named = {_colour_of(found, edge) for edge in found.edges}
    spans = sorted(
        found.spans, key=lambda span: min(place_of(edge.writer) for edge in found.edges if edge.span == span)
    )
    names = [name for name in (*READS.values(), "logits", *spans, "all positions") if name in named]
    for number, name in enumerate(names):
        key = {"color": PALETTE[number % len(PALETTE)], "width": 3}
        figure.add_scatter(x=[None], y=[None], mode="lines", line=key, name=plain(name), legendgroup=name)
    for (name, breadth, unusual), edges in sorted(groups.items(), key=lambda group: group[0][1]):
        x, y, said = [], [], []
        for edge in edges:
            score = f"<br><b>{edge.score:+.4g}</b>" if math.isfinite(edge.score) else ""
            for end in _ends(found, edge):
                across, up = _line(places.at(edge.writer), places.at(end))
                x += [*across, None]
                y += [*up, None]
                said += [plain(str(edge)) + score] * (POINTS + 1)
        ink = PALETTE[names.index(name) % len(PALETTE)]
        line = {"color": ink, "width": WIDTHS[breadth], "dash": "dot" if unusual else "solid"}
        look = {"mode": "lines", "opacity": 0.75, "hovertext": said, "hoverinfo": "text"}
        figure.add_scatter(x=x, y=y, line=line, name=plain(name), legendgroup=name, showlegend=False, **look)


def _colour_of(found: Circuit, edge: Edge) -> str:
    """What an edge is coloured by."""
    if found.spans:
        return edge.span or "all positions"
    return "logits" if edge.reader == "logits" else READS[Node.parse(edge.reader).reads]


def _ends(found: Circuit, edge: Edge) -> list[str]:
    """The nodes to which an edge is drawn: of the heads that share keys and values, those that write."""
    if edge.reader == "logits":
        return ["logits"]
    node = Node.parse(edge.reader)
    if node.kind == "mlp" or (node.reads == "q" and node.head is not None):
        return [edge.reader.removesuffix("<q>")]
    group = found.within().written(edge.reader)
    return [name for name in group if name in found.nodes] or list(group[:1])


def _line(start: tuple[float, float], end: tuple[float, float]) -> tuple[list[float], list[float]]:
    """Points along a line that is bent a little, so that lines of one row do not hide each other."""
    share = np.linspace(0.0, 1.0, POINTS)
    across, up = (a + (b - a) * share for a, b in zip(start, end, strict=True))
    bend = BENT * (end[0] - start[0]) * 4 * share * (1 - share)
    return across.tolist(), (up + (bend if end[1] >= start[1] else -bend)).tolist()
