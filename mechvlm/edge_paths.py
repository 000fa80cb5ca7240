"""Edges by the names of their ends, and which of them lie on a path from what enters a language model to its logits.

Rule this module guards: a key-value head belongs to all query heads of its group, and what is read at some positions
goes on from these positions, except through keys and values, which other positions read.

>>> within = Heads(8, 4)
>>> on_paths([("image", "a2.kv1<v>", None), ("a2.h3", "logits", None), ("a1.h0", "m1", None)], within)
[True, True, False]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from mechvlm.nodes import Node
from mechvlm.sites import number, told

INPUTS = ("embed", "image", "deepstack")
"""The kinds of nodes that write and do not read."""
Ends = tuple[str, str, str | None]
"""Writer, reader and span (None: all positions) of an edge."""


@dataclass(frozen=True)
class Edge:
    """What one node reads of what another writes.

    Args:
        writer, reader: names of nodes; see `mechvlm.nodes`.
        span: the name of the positions at which it is written and read; None for all.
        score: how much it matters, by whatever it was chosen; no number where it was not. Edges with other scores are
            the same edge.

    Raises:
        ValueError: for a name that does not write or read, a writer that does not stand before the reader, or a score
            that is infinite.
        TypeError: for a span that is no name.

    Example:
        >>> print(mv.Edge("a3.h5", "a5.kv0<v>", "image"))
        a3.h5 -> a5.kv0<v> (image)
    """

    writer: str
    reader: str
    span: str | None = None
    score: float = field(default=math.nan, compare=False)

    def __post_init__(self) -> None:
        first, then = Node.parse(self.writer), Node.parse(self.reader)
        if first.reads or first.kind == "logits":
            raise ValueError(f"{self.writer!r} writes nothing; write for instance 'image', 'a3.h5' or 'm3'.")
        if not then.reads and then.kind not in ("mlp", "logits"):
            raise ValueError(f"{self.reader!r} reads nothing; write for instance 'a3.h5<q>', 'm3' or 'logits'.")
        if not place_of(self.writer)[:2] < place_of(self.reader)[:2]:
            raise ValueError(
                f"{self.writer} does not stand before {self.reader}, so there is no edge between the two; name an "
                "earlier writer, or a later reader."
            )
        if not (self.span is None or (isinstance(self.span, str) and self.span)):
            raise TypeError(f"span={told(self.span)} names no positions; write for instance 'image', or None for all.")
        object.__setattr__(self, "score", number("score", self.score))
        if math.isinf(self.score):
            raise ValueError(f"score={self.score} is infinite; give a number, or leave it out.")

    def __str__(self) -> str:
        return f"{self.writer} -> {self.reader}" + ("" if self.span is None else f" ({self.span})")


LISTS: dict[str, tuple[type, str]] = {
    "edges": (Edge, "edges=[mv.Edge('image', 'a2.kv1<v>')], or chosen=['a3.h5', 'm3'] for nodes"),
    "chosen": (str, "names of heads and MLPs, chosen=['a3.h5', 'm3']"),
    "crossing": (Integral, "layers, crossing=[3]"),
    "candidates": (Integral, "how many edges, heads and MLPs, and heads, candidates=(0, 0, 0)"),
}
"""What the lists of a circuit hold, and how they are written."""


@dataclass(frozen=True)
class Heads:
    """What leads from a reader to what its node writes.

    Attributes:
        heads, kv_heads: of a layer.
        crossing: layers whose heads look at the picture's features, which no edge brings to them.
    """

    heads: int
    kv_heads: int
    crossing: tuple[int, ...] = ()

    @staticmethod
    def among(names: Sequence[str]) -> "Heads":
        """How many heads some writers and readers are of, which have to be all of a model.

        Example:
            >>> Heads.among(["a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "logits"])
            Heads(heads=2, kv_heads=1, crossing=())
        """
        nodes = [node for node in map(Node.parse, names) if node.kind == "attention"]
        of_keys = [node.head or 0 for node in nodes if node.reads in ("k", "v")]
        heads = 1 + max((node.head or 0 for node in nodes if node.reads not in ("k", "v")), default=0)
        crossing = sorted({node.layer or 0 for node in nodes if node.head is None})
        return Heads(heads, 1 + max(of_keys, default=heads - 1), tuple(crossing))

    def written(self, reader: str) -> tuple[str, ...]:
        """The nodes that a reader is part of, as they write.

        Example:
            >>> Heads(8, 4).written("a3.kv1<v>"), Heads(8, 4).written("m3"), Heads(8, 4).written("logits")
            (('a3.h2', 'a3.h3'), ('m3',), ())
        """
        node = Node.parse(reader)
        if node.kind != "attention":
            return (reader,) if node.kind == "mlp" else ()
        if node.reads == "q" and node.head is not None:
            return (reader.removesuffix("<q>"),)
        group = self.heads // max(1, self.kv_heads)
        some = range(self.heads) if node.head is None else range(node.head * group, (node.head + 1) * group)
        return tuple(f"a{node.layer}.h{head}" for head in some)

    def readers(self, writer: str) -> tuple[str, ...]:
        """What the node of a writer reads; nothing for what enters.

        Example:
            >>> Heads(8, 4).readers("a3.h2")
            ('a3.h2<q>', 'a3.kv1<k>', 'a3.kv1<v>')
        """
        node = Node.parse(writer)
        if node.kind != "attention":
            return (writer,) if node.kind == "mlp" else ()
        if node.layer in self.crossing:
            return (f"a{node.layer}<q>",)
        assert node.head is not None
        key = node.head * self.kv_heads // max(1, self.heads)
        return (f"{writer}<q>", f"a{node.layer}.kv{key}<k>", f"a{node.layer}.kv{key}<v>")


def place_of(name: str) -> tuple[float, int, int]:
    """Where a node stands in the pass, to put names in forward order; the last number tells nodes of one place apart.

    Example:
        >>> sorted(["logits", "m1", "a2.h0", "a1.h3", "image"], key=place_of)
        ['image', 'a1.h3', 'm1', 'a2.h0', 'logits']
    """
    node = Node.parse(name)
    if node.kind == "logits":
        return math.inf, 0, 0
    if node.layer is None:
        return -1.0, ("embed", "image").index(node.kind), 0
    return float(node.layer), ("attention", "mlp", "deepstack").index(node.kind), node.head or 0


def at_other_positions(reader: str) -> bool:
    """Whether what is read here is used at other positions than it is read at: keys and values are."""
    return Node.parse(reader).reads in ("k", "v")


def on_paths(edges: Sequence[Ends], within: Heads) -> list[bool]:
    """For each edge, whether it lies on a path of edges from what enters to the logits.

    Args:
        within: of the model.
    """
    crossing = [f"a{layer}.h{head}" for layer in within.crossing for head in range(within.heads)]
    reached: dict[str, set[str | None]] = {name: {None} for name in crossing}
    forward = [False] * len(edges)
    for at in sorted(range(len(edges)), key=lambda at: place_of(edges[at][1])):
        writer, reader, span = edges[at]
        forward[at] = Node.parse(writer).kind in INPUTS or _meet(reached.get(writer), span)
        for name in within.written(reader) if forward[at] else ():
            reached.setdefault(name, set()).add(None if at_other_positions(reader) else span)
    needed: dict[str, set[str | None]] = {}
    kept = [False] * len(edges)
    for at in sorted(range(len(edges)), key=lambda at: place_of(edges[at][0]), reverse=True):
        writer, reader, span = edges[at]
        anywhere = None if at_other_positions(reader) else span
        leads = reader == "logits" or any(_meet(needed.get(name), anywhere) for name in within.written(reader))
        kept[at] = forward[at] and leads
        if kept[at]:
            needed.setdefault(writer, set()).add(span)
    return kept


def _meet(spans: set[str | None] | None, span: str | None) -> bool:
    """Whether something is there at a span; None is all positions."""
    return bool(spans and (span is None or span in spans or None in spans))
