"""Bootstrap draws of whole clusters, and what of them an interval is.

Rule this module guards: items about one picture are drawn together, and everything compared is of the same draws.

>>> drawn_sums(np.array([[1.0], [1.0]]), np.array([0, 1]), resamples=3, seed=0).tolist()
[[2.0], [2.0], [2.0]]
"""

import numpy as np

from mechvlm.sites import number, whole

VIAR_2026 = "viar-2026"
"""The convention of VIAR's published numbers."""
HELD = 4_000_000
"""Clusters drawn at once."""
FEW = 32
"""Kinds up to which one draw of all their numbers is faster than drawing clusters one by one."""


def checked_draws(resamples: int, level: float = 0.95) -> tuple[int, float]:
    """How often is drawn, and how often an interval is to hold the truth.

    Raises:
        ValueError: for no draws, or a level that is no share.
    """
    if whole("resamples", resamples) < 1:
        raise ValueError(f"resamples={resamples} draws nothing; give for instance 10_000.")
    if not 0 < number("level", level) < 1:
        raise ValueError(f"level={level} is not between 0 and 1; give for instance 0.95.")
    return resamples, level


def cluster_sums(table: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A table of items by columns, summed over the items of each cluster."""
    sums = np.zeros((groups.max() + 1, table.shape[1]))
    np.add.at(sums, groups, table)
    return sums


def drawn_sums(table: np.ndarray, groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The column sums of a table of items in each draw of as many clusters, with replacement: draws by columns.

    Clusters with equal sums are drawn as one kind, whose number is multinomial: the same distribution, and without
    clusters a table of answers has a handful of kinds.
    """
    kinds, counts = np.unique(cluster_sums(table, groups), axis=0, return_counts=True)
    generator, held = np.random.default_rng(seed), max(1, HELD // len(groups))
    starts = range(0, resamples, held)
    return np.concatenate([_counts(counts, min(held, resamples - start), generator) @ kinds for start in starts])


def drawn_clusters(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is in each draw of as many, with replacement: draws by clusters."""
    generator, held = np.random.default_rng(seed), max(1, HELD // clusters)
    once, starts = np.ones(clusters, int), range(0, resamples, held)
    return np.concatenate([_counts(once, min(held, resamples - start), generator) for start in starts])


def _counts(many: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each kind is in each draw, where there are so many of it to draw from."""
    total = int(many.sum())
    if len(many) <= FEW:
        return generator.multinomial(total, many / total, resamples).astype(float)
    drawn = np.repeat(np.arange(len(many)), many)[generator.integers(0, total, (resamples, total))]
    drawn += len(many) * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * len(many)).reshape(resamples, -1).astype(float)


def p_below(draws: np.ndarray, clusters: int, convention: str | None = None) -> np.ndarray:
    """The one-sided p-value of a difference above 0, over the first axis of its draws; what is no number is no draw.

    Args:
        clusters: how many were drawn from; of one, nothing is told.
        convention: None: one more than the draws that are 0 or less, over one more than the draws, so that it is never
            0. "viar-2026": the share of draws that are 0 or less, as published.
    """
    known = np.isfinite(draws)
    many, below = known.sum(0), ((draws <= 0) & known).sum(0)
    found = below / np.maximum(many, 1) if convention == VIAR_2026 else (1 + below) / (1 + many)
    return np.where((many > 0) & (clusters > 1), found, np.nan)


def ends(draws: np.ndarray, clusters: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval over the first axis; not a number where there is one cluster only, or no value."""
    shape = draws.shape[1:]
    low, high = np.full(shape, np.nan), np.full(shape, np.nan)
    known = np.isfinite(draws).any(0)
    if clusters > 1 and known.any():
        low[known], high[known] = np.nanquantile(draws[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
