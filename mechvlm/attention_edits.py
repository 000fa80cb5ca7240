"""Edits of attention that keep the fused kernel: numbers added to scores, knockouts, and factors on scores.

>>> vlm.run(real, edits=[bias_attention(3, keys=real.image, amount=2.0, queries=real.last)])
"""

from collections.abc import Sequence

from mechvlm.biases import Bias, Change, Scale
from mechvlm.edits import Edit
from mechvlm.sites import Site, number, places


def bias_attention(
    layer: int,
    keys: Sequence[int],
    amount: float,
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: str = "text",
    way: str = "auto",
    cross: bool = False,
    when: str = "always",
) -> Edit:
    """Add a number to the attention scores of some keys: their odds are multiplied by e to that number.

    Args:
        keys: the positions looked at, for instance `prompt.image`.
        amount: added before the softmax, in every pass; minus infinity cuts.
        queries: the positions that look; None means all, generated ones included.
        heads: None means all.
        way, when: see `Edit`; "decode" is for generated positions alone.
        cross: bias attention to the image's features (Mllama, Q-Formers). Keys are then the `positions` of a map in
            `prompt.images`, and its `separators`, since class tokens have seen the picture as well.

    Example:
        >>> vlm.generate(real, edits=[mv.bias_attention(layer, real.image, 2.0) for layer in range(2, 6)])

    Source:
        The intervention of VIAR adds a constant to the scores of image keys in a band of layers.
    """
    amount = number("amount", amount)
    if amount != amount or amount == float("inf"):
        raise ValueError(f"amount={amount} cannot be added to a score; give a number, or -inf to cut.")
    name = "cut attention" if amount == float("-inf") else f"bias {amount:+g} attention"
    return changing(Bias(*between(keys, queries, heads, amount), cross), name, layer, tower, way, when)


def scale_attention(
    layer: int,
    keys: Sequence[int],
    factor: float,
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: str = "text",
    way: str = "auto",
    cross: bool = False,
    when: str = "always",
) -> Edit:
    """Multiply the attention scores of some keys by a number, before the softmax.

    A score may be negative, and a factor above one then takes attention away; `bias_attention` with the factor's
    logarithm multiplies the weights' odds instead, whatever the sign.

    Args:
        keys, queries, heads, tower, way, cross, when: as in `bias_attention`.
        factor: what scores are multiplied by, in every pass; 0 makes them all alike.

    Example:
        >>> vlm.run(real, edits=[mv.scale_attention(3, real.image, 1.15, queries=real.question + real.last)])

    Source:
        VAF (CVPR 2025, "ClearSight") multiplies scores of image keys by 1.15 and of system keys by 0.95 in layers 9 to
        14, for the queries behind the image.
    """
    factor = number("factor", factor)
    if not abs(factor) < float("inf"):
        raise ValueError(f"factor={factor} cannot multiply a score; give a finite number.")
    scale = Scale(*between(keys, queries, heads, factor), cross)
    return changing(scale, f"scale attention by {factor:g}", layer, tower, way, when)


def between(
    keys: Sequence[int], queries: Sequence[int] | None, heads: Sequence[int] | None, amount: float
) -> tuple[tuple[int, ...], float, tuple[int, ...] | None, tuple[int, ...] | None]:
    """What a change is about: keys, by how much, queries and heads."""
    return (
        places("keys", keys),
        amount,
        None if queries is None else places("queries", queries, all_by_none=True),
        None if heads is None else places("heads", heads, all_by_none=True),
    )


def changing(change: Change, what: str, layer: int, tower: str, way: str, when: str) -> Edit:
    """A change of scores as an edit."""
    name = f"{what} to {len(change.keys)} keys"
    if change.queries is not None:
        name += f" from {len(change.queries)} queries"
    if change.heads is not None:
        name += f" in heads {list(change.heads)}"
    site = Site("cross_scores" if change.cross else "scores", layer, tower)
    if change.cross and change.queries and when == "always":
        when = "prompt"  # a step's query has no position among those keys
    if way == "mask" and isinstance(change, Scale):
        raise ValueError("a mask is added and multiplies nothing; use way='feature', 'recompute' or 'auto'.")
    positions, heads = change.queries or (), change.heads or ()
    return Edit(site, change, when, "value", name, positions, heads, bias=change, way=way)


def cut_attention(
    layer: int,
    keys: Sequence[int],
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tower: str = "text",
    way: str = "auto",
    cross: bool = False,
    when: str = "always",
) -> Edit:
    """Knock out attention from some queries to some keys: exactly zero, the rest renormalised by the softmax.

    A query that is cut from every key it sees receives nothing (`z` is zero there).

    Example:
        >>> vlm.run(real, edits=[mv.cut_attention(layer, real.image, queries=real.last) for layer in range(4, 8)])

    Source:
        Geva et al. (2023), "Dissecting Recall of Factual Associations", section 5.
    """
    return bias_attention(layer, keys, float("-inf"), queries, heads, tower, way, cross, when)
