"""Ways of information between positions, and the windows of layers in which they are cut.

Rule this module guards: an edge is named as information goes, `source->target`: the keys that are looked at, and the
queries that look.

>>> edges_of(real, ["image->last"])["image->last"][0], windows_of(vlm, 3, None)[0]
([48], Window(name=0, first=0, last=1))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mechvlm.attention_edits import cut_attention
from mechvlm.edits import Edit
from mechvlm.experiments.record import chosen_layers
from mechvlm.experiments.sight import cross_layers, named, own_layers
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, told, whole, whole_numbers
from mechvlm.vlm import VLM

Edge = tuple[list[int], list[int]]
"""Queries and keys."""
Edges = Mapping[str, Any] | Sequence[str] | Callable[[Prompt], Mapping[str, Any]] | None
"""Names of edges between spans, or queries and keys by name, or a function from a prompt to those."""

DEFAULT = ("image->question", "image->last", "question->last", "last->last", "bos->last")
OF_OBJECTS = ("object->question", "object->last", "rest->question", "rest->last")


class Window(NamedTuple):
    """Layers that are cut together, from the first to the last; named by their centre, or as `0-9`."""

    name: int | str
    first: int
    last: int


def edges_of(prompt: Prompt, edges: Edges = None, objects: Sequence[int] = ()) -> dict[str, Edge]:
    """Edges by name, each as queries and keys.

    Args:
        edges: None for the default ones, between the spans that the prompt has; names such as "prefix->last", of spans
            and of `object` and `rest` (the image tokens that are not the object's); or queries and keys by name, or a
            function from a prompt to them.
        objects: the object's image tokens.

    Raises:
        ValueError, TypeError: for no edge, or a span that the prompt has not.

    Example:
        >>> edges_of(real, {"first half->last": (real.last, real.image[:18])})["first half->last"][0]
        [48]
    """
    given = edges(prompt) if callable(edges) and not isinstance(edges, Mapping) else edges
    spans = {**prompt.spans, **_parts_of_image(prompt, objects)}
    if given is None:
        wanted = (*DEFAULT, *OF_OBJECTS)
        given = [name for name in wanted if set(name.split("->")) <= set(spans)]
    if isinstance(given, Mapping):
        found = {str(name): _edge(str(name), edge) for name, edge in given.items()}
    else:
        found = {name: _between(name, spans) for name in listed(given) or ()}
    if not found:
        raise ValueError(
            f"edges={told(edges)} holds no edge; give names such as ['image->last'], or {{name: (queries, keys)}}."
        )
    return found


def _parts_of_image(prompt: Prompt, objects: Sequence[int]) -> dict[str, list[int]]:
    """The image tokens of the object, and the others."""
    if not objects:
        return {}
    rest = [position for position in prompt.image if position not in set(objects)]
    return {"object": list(objects), **({"rest": rest} if rest else {})}


def _edge(name: str, edge: Any) -> Edge:
    """Queries and keys as they were given."""
    both = listed(edge)
    if both is None or len(both) != 2:
        raise TypeError(f"the edge {name!r} is {told(edge)}; give its queries and its keys, two lists of positions.")
    found = list(whole_numbers("queries", both[0])), list(whole_numbers("keys", both[1]))
    if found[0] and not found[1]:
        raise ValueError(f"the edge {name!r} has no keys, so nothing would be cut; give at least one.")
    return found


def _between(name: Any, spans: Mapping[str, list[int]]) -> Edge:
    """The edge from one span to another."""
    ends = name.split("->") if isinstance(name, str) else []
    if len(ends) != 2 or not set(ends) <= set(spans):
        raise ValueError(
            f"{told(name)} is no edge of this prompt; write source->target, each one of {', '.join(spans)}."
        )
    return list(spans[ends[1]]), list(spans[ends[0]])


def check_among_words(vlm: VLM, prompt: Prompt, edges: Mapping[str, Edge]) -> None:
    """Refuse edges from the picture where the model sees it by cross-attention, and not among the words.

    Raises:
        ValueError: for such an edge.
    """
    across = cross_layers(vlm)
    seen = [name for name, (_, keys) in edges.items() if across and set(keys) & set(prompt.image)]
    if seen:
        raise ValueError(
            f"this model sees the picture by cross-attention, in {named(across)}, so {seen[0]!r} is no edge between "
            "positions; give edges= between words, or cut with mv.cut_attention(..., cross=True) in mv.sweep."
        )


def windows_of(vlm: VLM, window: int, layers: Sequence[Any] | None) -> list[Window]:
    """The windows of layers that are cut, one after another.

    Args:
        window: how many layers about each centre, cut short at the ends of the model; of an even number one more stands
            before the centre than behind it.
        layers: the centres; None for every layer. Or windows as they are, each (first, last), last included.

    Raises:
        ValueError: for a window of no layer, or layers that the model has not.

    Example:
        >>> windows_of(vlm, 3, [0, 4]), windows_of(vlm, 9, [(0, 3), (2, 5)])[1]
        ([Window(name=0, first=0, last=1), Window(name=4, first=3, last=5)], Window(name='2-5', first=2, last=5))
    """
    size, count = whole("window", window), vlm.shape.layers["text"]
    if size < 1:
        raise ValueError(f"window={size} cuts no layer; give 1 or more.")
    groups = [listed(one) for one in listed(layers) or ()]
    wrong: list[Any]
    if groups and all(group is not None for group in groups):
        pairs = [whole_numbers("layers", group) for group in groups]
        wrong = [pair for pair in pairs if len(pair) != 2 or not 0 <= pair[0] <= pair[1] < count]
        found = [] if wrong else [Window(f"{first}-{last}", first, last) for first, last in dict.fromkeys(pairs)]
    else:
        centres = chosen_layers(vlm, layers)
        wrong = [centre for centre in centres if not 0 <= centre < count]
        found = [Window(centre, *reach(centre, size, count)) for centre in centres]
    if wrong:
        raise ValueError(
            f"layers holds {told(wrong[0])}, and the layers of this model are 0 to {count - 1}; give centres, or pairs "
            "of a first and a last layer."
        )
    return found


def reach(centre: int, window: int, count: int) -> tuple[int, int]:
    """The first and the last layer of so many about a centre, in a model of `count` layers.

    Example:
        >>> reach(10, 9, 32), reach(10, 10, 32), reach(1, 9, 32)
        ((6, 14), (5, 14), (0, 5))
    """
    return max(0, centre - window // 2), min(count, centre - window // 2 + window) - 1


def cuts(vlm: VLM, edge: Edge, window: Window) -> list[Edit]:
    """The edits that cut an edge in all heads of a window, in the pass over the prompt.

    Example:
        >>> len(cuts(vlm, (real.last, real.image), Window(4, 3, 5)))
        3
    """
    queries, keys = edge
    inside = [layer for layer in own_layers(vlm) if window.first <= layer <= window.last]
    return [cut_attention(layer, keys, queries=queries) for layer in inside]


def random_keys(prompt: Prompt, edge: Edge, draw: np.random.Generator) -> list[int]:
    """As many random keys as an edge has, of those that its queries could look at instead.

    They are drawn from all positions before the last query, an edge's own keys among them; not from the queries, so
    that none of them loses itself, nor from `bos`, where attention rests that is not needed. Fewer where there are
    fewer.

    Example:
        >>> len(random_keys(real, (real.last, real.question), np.random.default_rng(0))) == len(real.question)
        True
    """
    queries, keys = edge
    others = [at for at in range(max(queries, default=0)) if at not in {*queries, *prompt.bos}]
    return sorted(draw.permutation(others)[: len(keys)].tolist())
