"""A circuit as a value: the edges of a model that a behaviour is claimed to rest on, by name.

Rule this module guards: a circuit holds names and numbers alone. It is saved as text that can be read, is the same
circuit when it is loaded, and says nothing of a model that was not written into it.

>>> Circuit([Edge("image", "a2.kv1<v>"), Edge("a2.h3", "logits")], heads=8, kv_heads=4)
Circuit(2 edges, 3 nodes: image, 1 head, logits)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from mechvlm.circuit_text import as_html, as_json, from_json
from mechvlm.edge_paths import INPUTS, LISTS, Edge, Heads, on_paths, place_of
from mechvlm.edits import Edit
from mechvlm.nodes import Node
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, told, whole


@dataclass(frozen=True, repr=False)
class Circuit:
    """Some of the edges of a language model, or all edges between chosen nodes.

    Circuits are sets: `a & b` has the edges (or nodes) of both, `a | b` those of either, `a - b` those of the first
    alone, and `~a` all of the model but those of `a`. So `Circuit()` has no edge, and `~Circuit()` every one. Equal
    circuits list the same in the same order, whatever the scores.

    Args:
        edges: each once.
        chosen: instead of edges, names of heads and MLPs as they write: "a3.h5", "m3". All edges between them belong
            to the circuit, and all to them from what enters (embeddings, image), and to the logits.
        heads, kv_heads: how many a layer has, which says what heads a key-value head is part of. 0: not known.
        layers: how many there are, for figures. 0: not known.
        crossing: the layers whose heads look at the picture's features, which no edge brings.
        candidates: how many edges, heads and MLPs, and heads it was chosen from; 0: not known.
        metric, model, note: what it is of, and how it was chosen, for people to read.
        inverted: whether it has all edges, or nodes, but these.

    Raises:
        ValueError: for an edge or a node given twice, edges and nodes together, or numbers that do not fit.
        TypeError: for what are no edges.

    Example:
        >>> found = mv.Circuit([mv.Edge("image", "a2.kv1<v>"), mv.Edge("a2.h3", "logits")], heads=8, kv_heads=4)
        >>> found.nodes, found.n_edges
        (('image', 'a2.h3', 'logits'), 2)
    """

    edges: Sequence[Edge] = ()
    chosen: Sequence[str] = ()
    heads: int = 0
    kv_heads: int = 0
    layers: int = 0
    crossing: Sequence[int] = ()
    candidates: Sequence[int] = (0, 0, 0)
    metric: str = ""
    model: str = ""
    note: str = ""
    inverted: bool = False

    def __post_init__(self) -> None:
        for name in LISTS:
            given = listed(vars(self)[name])
            kind, how = LISTS[name]
            if given is None or not all(isinstance(one, kind) for one in given):
                raise TypeError(f"{name}={told(vars(self)[name])} cannot be a circuit's; write {how}.")
            object.__setattr__(self, name, given)
        if self.edges and self.chosen:
            raise ValueError("a circuit is of edges or of chosen nodes, and both were given; give one of the two.")
        wrong = [
            one for one in self.chosen if Node.parse(one).kind not in ("attention", "mlp") or Node.parse(one).reads
        ]
        if wrong:
            raise ValueError(f"{wrong[0]!r} cannot be chosen; name heads and MLPs as they write, 'a3.h5' or 'm3'.")
        held: Sequence[Any] = (*self.edges, *self.chosen)
        if len(set(held)) < len(held):
            twice = next(one for at, one in enumerate(held) if one in held[:at])
            raise ValueError(f"{twice} is in the circuit more than once; give each once.")
        for name in ("heads", "kv_heads", "layers"):
            object.__setattr__(self, name, whole(name, vars(self)[name]))
        for name in ("crossing", "candidates"):
            object.__setattr__(self, name, tuple(whole(f"{name}:", one) for one in vars(self)[name]))
        if len(self.candidates) != 3 or min(self.candidates) < 0:
            raise ValueError(
                f"candidates={told(self.candidates)} are not three numbers, of edges, of heads and MLPs, and of heads; "
                "give 0 where it is not known."
            )
        heads, kv_heads = self.heads, self.kv_heads
        if heads < 0 or bool(heads) != (kv_heads > 0) or (heads and heads % kv_heads):
            raise ValueError(
                f"heads={heads} and kv_heads={kv_heads} do not fit; the first is a multiple of the second, and both "
                "are 0 where they are not known."
            )

    @property
    def n_edges(self) -> int:
        """How many edges are listed; 0 for chosen nodes, whose edges depend on the model. Of `~circuit`, the others."""
        return max(0, self.candidates[0] - len(self.edges)) if self.inverted else len(self.edges)

    @property
    def n_nodes(self) -> int:
        """How many nodes there are; see `nodes`."""
        return len(self.nodes)

    @property
    def spans(self) -> tuple[str, ...]:
        """The names of the spans at which there are edges, in the order in which they are first named."""
        return tuple(dict.fromkeys(edge.span for edge in self.edges if edge.span is not None))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes listed, or at the ends of listed edges, in forward order, as they write; and "logits".

        A key-value head is no node by itself: it is counted with the query heads that write.
        """
        found = {*self.chosen, *(edge.writer for edge in self.edges)}
        for edge in self.edges:
            node = Node.parse(edge.reader)
            if node.reads == "" or (node.reads == "q" and node.head is not None):
                found.add(edge.reader.removesuffix("<q>"))
        return tuple(sorted(found, key=place_of))

    def of_kind(self, *kinds: str) -> tuple[str, ...]:
        """The nodes of some kinds: "attention" for heads, "mlp", "embed", "image", "deepstack", "logits".

        Example:
            >>> mv.Circuit(chosen=["m3", "a3.h5"]).of_kind("attention")
            ('a3.h5',)
        """
        return tuple(name for name in self.nodes if Node.parse(name).kind in kinds)

    def kept(
        self, writers: Sequence[str], readers: Sequence[str], span: str | None = None
    ) -> Bool[np.ndarray, "writer reader"]:
        """Which edges between some writers and readers are in the circuit, at a span.

        Args:
            span: None: only those at all positions.

        Raises:
            ValueError: for an edge between nodes, or a chosen node, that are not among these.

        Example:
            >>> found = mv.Circuit([mv.Edge("image", "m2", "image")])
            >>> found.kept(["embed", "image"], ["m2"], "image").tolist()
            [[False], [True]]
        """
        if self.chosen:
            strange = [one for one in self.chosen if one not in writers]
            if strange:
                raise ValueError(
                    f"the circuit's node {strange[0]} is not in this model; name heads and MLPs that it has."
                )
            inside = [Node.parse(one).kind in INPUTS or (one in self.chosen) != self.inverted for one in writers]
            within = Heads.among(readers)
            parts = [within.written(reader) for reader in readers]
            reads = [not one or any((name in self.chosen) != self.inverted for name in one) for one in parts]
            return np.outer(np.array(inside, dtype=bool), np.array(reads, dtype=bool))
        rows, columns = ({name: at for at, name in enumerate(names)} for names in (writers, readers))
        table = np.zeros((len(rows), len(columns)), dtype=bool)
        for edge in self.edges:
            if edge.writer not in rows or edge.reader not in columns:
                raise ValueError(f"the circuit's edge {edge} is not in this model; make the circuit of its own scores.")
            table[rows[edge.writer], columns[edge.reader]] |= edge.span in (None, span)
        return table != self.inverted

    def pruned(self) -> "Circuit":
        """The circuit without edges that lie on no path from what enters to the logits.

        An edge into keys or values leads on to every head of the group, and at any positions. Chosen nodes stay as
        they are, since all of them read what enters and are read by the logits.

        Raises:
            ValueError: where it is not known how many heads there are, or for all edges but some.

        Example:
            >>> stray = mv.Edge("a1.h0", "m1")
            >>> mv.Circuit([mv.Edge("image", "logits"), stray], heads=8, kv_heads=4).pruned().n_edges
            1
        """
        if self.chosen:
            return self
        if self.inverted:
            raise ValueError("a circuit of all edges but some cannot be pruned; list the edges that it has.")
        ends = [(edge.writer, edge.reader, edge.span) for edge in self.edges]
        kept = on_paths(ends, self.within())
        return replace(self, edges=[edge for edge, stays in zip(self.edges, kept, strict=True) if stays])

    def within(self) -> Heads:
        """Which readers belong to which heads.

        Raises:
            ValueError: where it is not known how many heads there are.

        Example:
            >>> mv.Circuit(heads=8, kv_heads=4).within().written("a3.kv1<v>")
            ('a3.h2', 'a3.h3')
        """
        if not self.heads:
            raise ValueError(
                "the circuit does not say how many heads a layer has, which tells what a key-value head is part of; "
                "give heads= and kv_heads=."
            )
        return Heads(self.heads, self.kv_heads, tuple(self.crossing))

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._with(other, lambda mine, theirs: [one for one in mine if one in theirs])

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._with(other, lambda mine, theirs: [*(mine | theirs)])

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._with(other, lambda mine, theirs: [one for one in mine if one not in theirs])

    def __invert__(self) -> "Circuit":
        return replace(self, inverted=not self.inverted)

    def _with(self, other: Any, join: Callable[[dict[Any, None], dict[Any, None]], list[Any]]) -> "Circuit":
        """A circuit of the edges, or nodes, of two."""
        if not isinstance(other, Circuit):
            raise TypeError(f"{told(other)} is no circuit; make it with mv.Circuit or mv.choose_circuit.")
        if self.inverted or other.inverted or (self.edges and other.chosen) or (self.chosen and other.edges):
            raise ValueError(
                "circuits of edges and of chosen nodes, or of all edges but some, cannot be put together; give two "
                "that list edges, or two that list nodes."
            )
        pairs = (self.edges, other.edges), (self.chosen, other.chosen)
        edges, chosen = (join(dict.fromkeys(mine), dict.fromkeys(theirs)) for mine, theirs in pairs)
        return replace(self, edges=edges, chosen=chosen, note="", **self._shared(other))

    def _shared(self, other: "Circuit") -> dict[str, Any]:
        """What is known of two circuits together: of one model where both say which."""
        pairs = [((one.heads, one.kv_heads), one.crossing) for one in (self, other) if one.heads]
        if len(pairs) == 2 and pairs[0][0] != pairs[1][0]:
            (first, _), (then, _) = pairs
            raise ValueError(
                f"one circuit's layers have {first[0]} heads and {first[1]} key-value heads and the other's {then[0]} "
                f"and {then[1]}, so they are not of one model; put circuits of one together."
            )
        (heads, kv_heads), crossing = pairs[0] if pairs else ((0, 0), self.crossing)
        candidates = [
            0 if 0 < a != b > 0 else max(a, b) for a, b in zip(self.candidates, other.candidates, strict=True)
        ]
        words = [(vars(self)[name], vars(other)[name]) for name in ("metric", "model")]
        metric, model = [mine or theirs if mine == theirs or not (mine and theirs) else "" for mine, theirs in words]
        known: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "crossing": crossing, "candidates": candidates}
        return {**known, "layers": max(self.layers, other.layers), "metric": metric, "model": model}

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON, an edge a line.

        Example:
            >>> mv.Circuit([mv.Edge("image", "logits")]).save("circuit.json")
            >>> mv.Circuit.load("circuit.json").n_edges
            1
        """
        fields = {**vars(self), "edges": [tuple(vars(edge).values()) for edge in self.edges]}
        Path(path).write_text(as_json(fields), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """The circuit that a file holds.

        Raises:
            ValueError: for a file that `save` did not write, or that a later version of mechvlm wrote.
        """
        text = Path(path).read_text("utf-8", errors="replace")
        held = from_json(text, str(path), set(cls.__dataclass_fields__))
        return cls(**{**held, "edges": [Edge(*edge) for edge in held["edges"]]})

    def edits(self, vlm: Any, source: Prompt, target: Prompt) -> list[Edit]:
        """Edits of the target's run that put the source's writes in the place of all nodes outside the circuit.

        For chosen nodes this is the circuit. For edges it is more: a node that has any edge writes to everyone, so
        edges left out between two of its nodes are back; `mv.circuit_faithfulness` leaves them out. A node is patched
        at the spans where none of its edges is. Heads are patched before a norm that stands behind attention (Gemma,
        GLM), which is then that of the patched heads, while a circuit has each run's own.

        Args:
            vlm: the model.
            source, target: prompts whose positions mean the same.

        Raises:
            ValueError: where their positions do not mean the same.

        Example:
            >>> found = mv.Circuit(chosen=["a3.h7", "a4.h1", "m2"])
            >>> run = vlm.run(real, edits=found.edits(vlm, source=null, target=real))

        Source:
            Wang et al. (2023), "Interpretability in the Wild", section 4, with the source's values in place of means.
        """
        from mechvlm.experiments.circuit_edits import outside

        return outside(vlm, self, source, target)

    def __repr__(self) -> str:
        counts = {"head": self.of_kind("attention"), "MLP": self.of_kind("mlp")}
        parts = [*self.of_kind(*INPUTS), *(_counted(len(held), what) for what, held in counts.items() if held)]
        nodes = ", ".join([*parts, *self.of_kind("logits")])
        edges = "" if self.chosen else f"{_counted(len(self.edges), 'edge')}, "
        said = f"{edges}{_counted(self.n_nodes, 'node')}" + (f": {nodes}" if nodes else "")
        about = "".join(f"; {what}" for what in (self.metric, self.note) if what)
        return f"Circuit({'all but ' if self.inverted else ''}{said}{about})"

    def _repr_html_(self) -> str:
        return as_html(repr(self), [(str(edge), edge.score) for edge in self.edges], self.chosen)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
