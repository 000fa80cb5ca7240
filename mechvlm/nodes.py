"""The parts of a language model as a graph: who writes into the residual stream, and who reads from it, by name.

Rule this module guards: names are all there is. Whether one node can reach another follows from where the two stand
in the pass, and nothing here holds a tensor.

>>> Node.parse("a3.kv1<v>")
Node(kind='attention', layer=3, head=1, reads='v')
"""

import math
import re
from dataclasses import dataclass
from functools import cache

from mechvlm.shapes import Shape

_COUNT = r"(0|[1-9][0-9]*)"  # one way to write each number, so that a node has one name
_NAMES = (
    (re.compile(rf"a{_COUNT}\.h{_COUNT}(?:<(q)>)?"), "attention"),
    (re.compile(rf"a{_COUNT}\.kv{_COUNT}<(k|v)>"), "attention"),
    (re.compile(rf"a{_COUNT}<(q)>"), "attention"),
    (re.compile(rf"m{_COUNT}"), "mlp"),
    (re.compile(rf"d{_COUNT}"), "deepstack"),
    (re.compile(r"embed|image|logits"), ""),
)


@dataclass(frozen=True)
class Node:
    """A part of a language model.

    Writers are "embed" (what enters the first layer, but at image tokens), "image" (what enters at image tokens),
    "a3.h5" (what query head 5 of layer 3 adds), "m3" (what the MLP of layer 3 adds) and "d3" (what deep-stack adds to
    the image tokens behind layer 3). Readers are "a3.h5<q>" (the queries of a head), "a3.kv1<k>" and "a3.kv1<v>" (keys
    and values, of which there may be fewer heads), "a3<q>" (the queries of all heads of a layer that attends to the
    picture's features instead), "m3" and "logits".

    Attributes:
        kind: "embed", "image", "attention", "mlp", "deepstack" or "logits".
        layer: None for those without.
        head: of queries; of keys and values where `reads` is one of these. None for "a3<q>" and what has no heads.
        reads: "q", "k" or "v" of an attention that reads, else an empty text.

    Example:
        >>> Node("attention", 3, 5).name, Node("attention", 3, 1, "v").name, Node("mlp", 2).name
        ('a3.h5', 'a3.kv1<v>', 'm2')
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    reads: str = ""

    @staticmethod
    @cache
    def parse(name: str) -> "Node":
        """The node of a name.

        Raises:
            ValueError: for what is no name of a node.

        Example:
            >>> Node.parse("m3")
            Node(kind='mlp', layer=3, head=None, reads='')
        """
        for pattern, kind in _NAMES:
            found = pattern.fullmatch(name)
            if found and not kind:
                return Node(name)
            if found:
                numbers = [int(group) for group in found.groups() if group and group.isdigit()]
                reads = next((group for group in found.groups() if group and group.isalpha()), "")
                return Node(kind, numbers[0], numbers[1] if numbers[1:] else None, reads)
        raise ValueError(
            f"{name!r} names no node; write for instance 'image', 'a3.h5' or 'm3' for what writes, and 'a3.h5<q>', "
            "'a3.kv1<v>', 'm3' or 'logits' for what reads."
        )

    @property
    def name(self) -> str:
        """The node's name."""
        if self.kind != "attention":
            return {"mlp": f"m{self.layer}", "deepstack": f"d{self.layer}"}.get(self.kind, self.kind)
        head = "" if self.head is None else f".{'kv' if self.reads in ('k', 'v') else 'h'}{self.head}"
        return f"a{self.layer}{head}" + (f"<{self.reads}>" if self.reads else "")


def writers(shape: Shape) -> tuple[str, ...]:
    """What writes into the residual stream, in forward order.

    Example:
        >>> writers(vlm.shape)[:4], len(writers(vlm.shape))
        (('embed', 'image', 'a0.h0', 'a0.h1'), 74)
    """
    found = ["embed", "image"]
    for layer, kinds in enumerate(shape.kinds["text"]):
        found += [f"a{layer}.h{head}" for head in range(shape.heads["text"])]
        found += [f"m{layer}", *([f"d{layer}"] if "deepstack" in kinds else [])]
    return tuple(found)


def readers(shape: Shape) -> tuple[str, ...]:
    """What reads from the residual stream, in forward order.

    Example:
        >>> readers(vlm.shape)[-2:], len(readers(vlm.shape))
        (('m7', 'logits'), 137)
    """
    found: list[str] = []
    for layer, kinds in enumerate(shape.kinds["text"]):
        if "q" in kinds:
            found += [f"a{layer}.h{head}<q>" for head in range(shape.heads["text"])]
            found += [f"a{layer}.kv{head}<{of}>" for of in "kv" for head in range(shape.kv_heads["text"])]
        else:
            found.append(f"a{layer}<q>")
        found.append(f"m{layer}")
    return (*found, "logits")


def feeds(shape: Shape, writer: str, reader: str) -> bool:
    """Whether what a node writes stands in the residual stream that another reads.

    Example:
        >>> feeds(vlm.shape, "a3.h5", "m3"), feeds(vlm.shape, "a3.h5", "a3.h6<q>")
        (True, False)
    """
    return written_at(writer) < read_at(shape, reader)


def written_at(writer: str) -> float:
    """When a node writes, in half layers: the later a number, the later in the pass.

    Example:
        >>> written_at("image"), written_at("a3.h5"), written_at("m3")
        (-1.0, 6.0, 7.0)
    """
    node = Node.parse(writer)
    return -1.0 if node.layer is None else 2.0 * node.layer + (node.kind != "attention")


def read_at(shape: Shape, reader: str) -> float:
    """When the stream that a node reads is put together; what is written before stands in it.

    Example:
        >>> read_at(vlm.shape, "a3.h5<q>"), read_at(vlm.shape, "m3"), read_at(vlm.shape, "logits")
        (6.0, 7.0, inf)
    """
    node = Node.parse(reader)
    if node.layer is None:
        return math.inf
    # In a layer whose attention and MLP read one stream (Cohere 2) none of the two reads what the other writes.
    return 2.0 * node.layer + (node.kind == "mlp" and "resid_mid" in shape.kinds["text"][node.layer])
