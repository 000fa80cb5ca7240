"""Nodes where they stand in the model and lines between them, which figures of edges and of circuits are made of.

Rule this module guards: a node's place is a matter of its name and of the model's size, so that two figures of one
model can be laid over each other: layers across, heads up, MLPs below them.

>>> Places(4, 8).at("a2.h3"), Places(4, 8).at("m2")
((2.0, 3.0), (2.5, -2.0))
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from mechvlm.nodes import Node
from mechvlm.plot.look import INK, finished, plain, tick_step

SYMBOLS = {"attention": "circle", "mlp": "square", "logits": "star"}  # and diamonds for what enters
BELOW = -2.0  # where MLPs stand
BEFORE = 0.3
"""How far before their heads shared keys and values stand, in layers."""
STEPS = 24  # of a curve
FADED = 0.75


@dataclass(frozen=True)
class Places:
    """Where the nodes of a model stand.

    Args:
        layers, heads: of the model.
        per_key: query heads that share a key-value head.
    """

    layers: int
    heads: int
    per_key: int = 1

    @classmethod
    def holding(cls, names: Iterable[str], layers: int = 0, heads: int = 0, per_key: int = 1) -> "Places":
        """The places of a model that has these nodes, and at least so many layers and heads.

        Example:
            >>> Places.holding(["image", "a2.h3"], heads=8)
            Places(layers=3, heads=8, per_key=1)
        """
        nodes = [Node.parse(name) for name in names]
        layers = max(layers, *(1 + (node.layer or 0) for node in nodes))
        return cls(layers, max(heads, *(1 + (node.head or 0) for node in nodes)), per_key)

    def at(self, name: str) -> tuple[float, float]:
        """Across, in layers, and up, in heads: keys and values before the middle of the heads that share them."""
        node = Node.parse(name)
        if node.kind in ("embed", "image"):
            return -1.2, (self.heads - 1) * (0.85 if node.kind == "image" else 0.15)
        if node.layer is None:
            return self.layers + 0.3, (self.heads - 1) / 2
        if node.kind != "attention":
            return node.layer + 0.5, BELOW if node.kind == "mlp" else self.heads + 0.5
        if node.head is None or node.reads not in ("k", "v"):
            return float(node.layer), (self.heads - 1) / 2 if node.head is None else float(node.head)
        return node.layer - BEFORE * (self.per_key > 1), (node.head + 0.5) * self.per_key - 0.5


class Line(NamedTuple):
    """A line from what writes to what reads.

    Attributes:
        text: shown where the mouse is.
        of: what gives it its colour.
        width: in pixels.
    """

    writer: str
    reader: str
    text: str
    of: str
    width: float
    dash: str = "solid"


def wired(
    places: Places,
    nodes: Mapping[str, str],
    lines: Sequence[Line],
    key: Mapping[str, str],
    heading: str = "",
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """A figure of nodes and lines between them.

    Args:
        nodes: by name, what is shown of each where the mouse is.
        lines: those of one look are drawn together, and those between the same two places lie beside each other.
        key: the colour of each thing that lines are of; one without a name is not explained.
        heading: of that.

    Example:
        >>> lines = [Line("image", "a0.h1", "2", "image", 3.0), Line("a0.h1", "logits", "1", "last", 2.0)]
        >>> nodes = {"image": "", "a0.h1": "", "logits": ""}
        >>> len(wired(Places(1, 2), nodes, lines, {"image": "#0072B2", "last": "#D55E00"}).data)
        5
    """
    figure = go.Figure()
    _draw_lines(figure, places, lines, key)
    for name, ink in key.items():
        if name:
            line = {"color": ink, "width": 3}
            figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=plain(name), legendgroup=name)
    _draw_nodes(figure, places, nodes)
    layers, heads = (list(range(0, count, tick_step(count, 16))) for count in (places.layers, places.heads))
    figure.update_xaxes(title_text="layer", tickvals=layers, range=[-1.9, places.layers + 0.9], zeroline=False)
    ticks = {"tickvals": [BELOW, *heads], "ticktext": ["MLP", *map(str, heads)]}
    figure.update_yaxes(title_text="head", range=[BELOW - 0.8, places.heads + 1.3], zeroline=False, **ticks)
    figure.update_layout(showlegend=any(key), legend_title_text=heading)
    wide, tall = 84.0 * (places.layers + 2), 30.0 * (places.heads + 4)
    return finished(figure, title, caption, min(920.0, max(380.0, wide)), min(640.0, max(260.0, tall)))


def _draw_lines(figure: go.Figure, places: Places, lines: Sequence[Line], key: Mapping[str, str]) -> None:
    """Lines in groups of one colour, breadth and dash, since a trace has one of each; the broadest last."""
    groups: dict[tuple, tuple[list[float | None], list[float | None], list[str]]] = {}
    beside: dict[tuple, int] = {}
    for one in lines:
        ends = places.at(one.writer), places.at(one.reader)
        beside[ends] = beside.get(ends, -1) + 1
        across, up = curve(*ends, beside[ends])
        x, y, texts = groups.setdefault((one.width, one.of, one.dash), ([], [], []))
        x += [*across, None]
        y += [*up, None]
        texts += [one.text] * (STEPS + 1)
    for (width, of, dash), (x, y, texts) in sorted(groups.items(), key=lambda group: group[0][0]):
        line = {"color": key[of], "width": width, "dash": dash}
        look = {"mode": "lines", "opacity": FADED, "hovertext": texts, "hoverinfo": "text", "showlegend": False}
        figure.add_scatter(x=x, y=y, line=line, name=plain(of), legendgroup=of, **look)


def _draw_nodes(figure: go.Figure, places: Places, nodes: Mapping[str, str]) -> None:
    """The nodes over their lines; a part that reads and writes is one of them."""
    spots: dict[tuple[float, float], list[str]] = {}
    for name in nodes:
        spots.setdefault(places.at(name), []).append(name)
    across, up = zip(*spots, strict=True)
    names = [min(some, key=len) for some in spots.values()]
    sides = ["middle left" if ".kv" in name else "bottom center" if name[0] == "m" else "top center" for name in names]
    kinds = [SYMBOLS.get(Node.parse(name).kind, "diamond") for name in names]
    marker = {"symbol": kinds, "size": 11, "color": "white", "line": {"color": INK, "width": 1.5}}
    text = {"text": [name.partition("<")[0] for name in names], "textposition": sides, "textfont": {"size": 10}}
    hover = {"hovertext": [nodes[name] for name in names], "hoverinfo": "text", "cliponaxis": False}
    figure.add_scatter(x=across, y=up, mode="markers+text", marker=marker, showlegend=False, **text, **hover)


def curve(start: tuple[float, float], end: tuple[float, float], number: int = 0) -> tuple[list[float], list[float]]:
    """A line that leaves and arrives level; further ones between the same two places lie beside the first.

    Example:
        >>> x, y = curve((0.0, 0.0), (2.0, 1.0))
        >>> x[0], y[0], x[-1], y[-1]
        (0.0, 0.0, 2.0, 1.0)
    """
    along = np.linspace(0, 1, STEPS)
    rise = along**2 * (3 - 2 * along)
    flat = min(1.5, 0.25 * (end[0] - start[0])) if start[1] == end[1] else 0.0  # or it would go through nodes between
    bow = (flat + 0.3 * ((number + 1) // 2) * (-1) ** number) * np.sin(np.pi * along)
    return (start[0] + (end[0] - start[0]) * along).tolist(), (start[1] + (end[1] - start[1]) * rise + bow).tolist()
