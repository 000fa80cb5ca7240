"""Could chance have done it? Signs drawn anew for clusters, and what is left where many things were tested.

Rule this module guards: examples about one picture change their sign together, and what was observed is counted too, so
that no p-value is 0.

>>> float(sign_flips(xr.DataArray([1.0] * 6, dims="prompt")))
0.03125
"""

from collections.abc import Hashable, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

DRAWS = 9999


def sign_flips(
    values: xr.DataArray, clusters: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> xr.DataArray:
    """How often a sum over prompts is as far from 0 where each cluster's sign is a matter of chance; two-sided.

    Args:
        values: over prompt and other axes; what is not a number counts nothing.
        clusters: what each prompt belongs to; None: each stands alone.
        draws: of the signs of all clusters; where there are no more ways than that, each of them counts once instead.
        seed: of the draws, which are the same for all other axes.

    Returns:
        P-values over the other axes, not a number where fewer than two clusters have values. Of n clusters they are no
        less than 2 / 2^n.

    Example:
        >>> float(sign_flips(xr.DataArray([1.0, 2.0, -0.5], dims="prompt")))
        0.5

    Source:
        Fisher (1935), "The Design of Experiments", section 21; the draw that is added is that of Phipson and Smyth
        (2010), "Permutation P-values Should Never Be Zero".
    """
    along = values.transpose("prompt", ...)
    table = along.values.astype(float).reshape(len(along), -1)
    names = list(range(len(along)) if clusters is None else clusters)
    member = np.array([[one == name for one in names] for name in dict.fromkeys(names)], dtype=float)
    there = np.isfinite(table)
    sums = member @ np.where(there, table, 0.0)
    signs, more = _signs(len(sums), draws, seed)
    observed = np.abs(sums.sum(0))
    as_far = (np.abs(signs @ sums) >= observed - 1e-9 * (1 + observed)).sum(0)
    found = np.where((member @ there > 0).sum(0) > 1, (more + as_far) / (more + len(signs)), np.nan)
    other = along.isel(prompt=0, drop=True)
    return other.copy(data=found.reshape(other.shape))


def _signs(count: int, draws: int, seed: int) -> tuple[Float[np.ndarray, "draw cluster"], int]:
    """Signs of so many clusters, and how many draws the observed ones count beside them."""
    if 2**count <= draws:
        return 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1), 0
    return np.random.default_rng(seed).choice([-1.0, 1.0], (draws, count)), 1


def holm(p: Float[np.ndarray, "*test"]) -> Float[np.ndarray, "*test"]:
    """P-values such that the chance of even one false finding among all is below a level.

    Args:
        p: one for each test; what is not a number was not tested, and stays.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03, np.nan])).round(2)
        array([0.03, 0.06, 0.06,  nan])

    Source:
        Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    flat, found = p.ravel(), np.full(p.size, np.nan)
    tested = np.flatnonzero(np.isfinite(flat))
    order = tested[np.argsort(flat[tested], kind="stable")]
    steps = flat[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return found.reshape(p.shape)
