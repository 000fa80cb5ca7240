"""Circuits as pictures: each node where it stands in the model, each edge between the two.

>>> circuit(Circuit([Edge("image", "a2.kv1<v>"), Edge("a2.h3", "logits")], heads=8, kv_heads=4)).layout.xaxis.title.text
'layer'
"""

import math
from collections import Counter

import plotly.graph_objects as go

from mechvlm.circuit_value import Circuit
from mechvlm.edge_paths import Edge, place_of
from mechvlm.nodes import Node
from mechvlm.plot.look import PALETTE, plain
from mechvlm.plot.nodes import Line, Places, wired

READS = {"q": "queries", "k": "keys", "v": "values", "": "MLP"}
EVERYWHERE = "all positions"
WIDTHS = (1.1, 2.0, 3.2, 4.8)  # pixels, from the lowest quarter of the largest score to the highest
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
    shown = sorted(found.edges, key=lambda edge: -abs(edge.score) if math.isfinite(edge.score) else 0.0)[:MOST]
    lines = _lines(found, shown)
    places = Places.holding([*found.nodes, *(edge.reader for edge in found.edges)], found.layers, found.heads)
    said = f" Drawn are the {MOST} of largest score." if len(found.edges) > MOST else ""
    said += " Dotted: scores of the sign that fewer edges have." if any(line.dash == "dot" for line in lines) else ""
    caption = caption or plain(repr(found)) + "." + said
    return wired(places, _nodes(found), lines, _key(found), title=title, caption=caption)


def _nodes(found: Circuit) -> dict[str, str]:
    """What is said of each node: its name, and how many edges it has."""
    out = Counter(edge.writer for edge in found.edges)
    into = Counter(end for edge in found.edges for end in _ends(found, edge))
    counted = {name: f"<br>{into[name]} edges in, {out[name]} out" if found.edges else "" for name in found.nodes}
    return {name: name + said for name, said in counted.items()}


def _key(found: Circuit) -> dict[str, str]:
    """The colour of each span in the order of the pass, or of each thing that is read."""
    forward = sorted(found.edges, key=lambda edge: (edge.span is None, place_of(edge.writer)))
    order = [edge.span or EVERYWHERE for edge in forward] if found.spans else [*READS.values(), "logits"]
    drawn = {_colour_of(found, edge) for edge in found.edges}
    names = [name for name in dict.fromkeys(order) if name in drawn]
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def _lines(found: Circuit, shown: list[Edge]) -> list[Line]:
    """A line for each edge, or, into what heads share, for each of these."""
    largest = max((abs(edge.score) for edge in shown if math.isfinite(edge.score)), default=0.0)
    usual = 1 if sum(edge.score > 0 for edge in shown) >= sum(edge.score < 0 for edge in shown) else -1
    lines = []
    for edge in shown:
        known = math.isfinite(edge.score)
        text = plain(str(edge)) + (f"<br><b>{edge.score:+.4g}</b>" if known else "")
        width = WIDTHS[min(3, int(4 * abs(edge.score) / largest))] if known and largest else WIDTHS[0]
        look = _colour_of(found, edge), width, "dot" if edge.score * usual < 0 else "solid"
        lines += [Line(edge.writer, end, text, *look) for end in _ends(found, edge)]
    return lines


def _colour_of(found: Circuit, edge: Edge) -> str:
    """What an edge is coloured by."""
    if found.spans:
        return edge.span or EVERYWHERE
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
