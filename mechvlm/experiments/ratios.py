"""Five numbers that papers call the visual attention ratio, told apart by name and computed from masses by span.

Rule this module guards: each query's row is made to sum to one before anything is averaged, and a ratio is a ratio of
averages, never an average of ratios.

>>> half = averaged(np.array([[[0.5, 0.5]]]), np.array([[0.2, 0.8]]), np.array([[2.0, 8.0]]), [True, False])
>>> half["density"].tolist(), half["rest"].tolist()
([[0.25, 0.0625]], [0.0625])
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from mechvlm.lazy_attention import Attention

MEANING = {
    "mass": ("attention mass", "fraction"),
    "density": ("attention density", "fraction per key"),
    "density_share": ("image's share of attention density", "0.5: as much per key as elsewhere"),
    "lift": ("attention lift", "1: even"),
    "vas": ("image over system attention", "ratio"),
}
"""Long name and unit of each ratio."""


def averaged(
    masses: Float[np.ndarray, "head query span"],
    even: Float[np.ndarray, "query span"],
    keys: Float[np.ndarray, "query span"],
    image: Sequence[bool],
    part: bool = False,
) -> dict[str, np.ndarray]:
    """What the queries of one layer pay to spans, averaged over them.

    Args:
        masses: what each query pays to each span; the spans share no key.
        even: the same, were its attention spread evenly.
        keys: how many keys each span has for each query.
        image: which of the spans is the image.
        part: whether the spans leave keys out; each row is then made to sum to one over what they hold, and a query
            that pays nothing to it is left out.

    Returns:
        `mass` and `density` over head and span, `even` over span, and `rest`, the density of all keys that are not
        the image's, over head. Not a number where no query is left. `queries` over head: how many are.
    """
    left = masses.sum(-1, keepdims=True)
    there = left > 0
    rows = masses / np.where(there, left, 1.0) if part else masses
    sees = even.sum(-1, keepdims=True)
    evens = even / np.where(sees > 0, sees, 1.0)
    other = ~np.array(image, dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        dense = np.where(keys > 0, rows / keys, np.nan)
        rest = rows[..., other].sum(-1, keepdims=True) / keys[:, other].sum(-1, keepdims=True)
        count = there.sum(1)
        return {
            "mass": np.where(there, rows, 0.0).sum(1) / count,
            "density": np.where(there, dense, 0.0).sum(1) / count,
            "even": np.where(sees > 0, evens, 0.0).sum(0) / (sees > 0).sum(0),
            "rest": (np.where(there, rest, 0.0).sum(1) / count)[:, 0],
            "queries": count[:, 0],
        }


def ratios(found: dict[str, np.ndarray], names: Sequence[str], n_keys: np.ndarray) -> dict[str, np.ndarray]:
    """The five, from averages over example and layer, and head and span where they have them.

    Args:
        found: what `averaged` gives, for all examples and layers.
        names: the spans.
        n_keys: how many keys each span of each example has.
    """
    mass, density, rest = found["mass"], found["density"], found["rest"]
    nothing = np.full(rest.shape, np.nan)
    at = {name: mass[..., number] for number, name in enumerate(names)}
    dense = density[..., names.index("image")] if "image" in names else nothing
    pictured = n_keys[:, names.index("image")] > 0 if "image" in names else np.zeros(len(n_keys), dtype=bool)
    system = sum((at[name] for name in ("bos", "prefix") if name in at), np.zeros(rest.shape))
    with np.errstate(invalid="ignore", divide="ignore"):
        over = np.where(pictured[:, None, None] & (system > 0), at.get("image", nothing) / system, np.nan)
        return {
            "mass": mass,
            "density": density,
            "density_share": dense / (dense + rest),
            "lift": mass / np.where(found["even"] > 0, found["even"], np.nan)[:, :, None],
            "vas": over,
        }


def visible(
    attention: Attention, columns: Float[torch.Tensor, "key span"], queries: Sequence[int] | None
) -> Float[np.ndarray, "query span"]:
    """How many keys of each span each query may look at, as the layer's own mask has it, in pieces."""
    seen = attention.sight().collected(
        lambda piece: (piece.scores > -torch.inf).float() @ columns[piece.keys].to(piece.scores.device),
        queries,
        columns.shape[1],
    )
    return seen[0, 0].double().cpu().numpy()
