"""Whether a measurement, layer by layer, goes with being right: correlations, and what is left of them.

Rule this module guards: many layers are many tests, and what only tells a "yes" from a "no" is not told from being
right until both are looked at by themselves.

>>> associate(xr.DataArray([[1.0], [2.0], [3.0], [5.0]], dims=["item", "layer"]), [0, 0, 1, 1]).r.values.round(2)
array([0.85])
"""

from typing import Any

import numpy as np
import xarray as xr

from mechvlm.evaluate.corrections import benjamini_hochberg, max_statistic, p_of
from mechvlm.evaluate.draws import checked_draws, cluster_sums, drawn_clusters, ends
from mechvlm.evaluate.items import Values, as_many, cluster_numbers, measured, one_each
from mechvlm.sites import told, whole

HELD = 2_000_000
"""Numbers held at once of permuted outcomes."""

NO_SPREAD = 1e-20
"""A sum of squares that is rounding, of numbers that reach 1."""

LEAST = 0.5
"""The share of draws in which there must be a correlation, for an interval of them."""


def associate(
    values: xr.DataArray,
    outcome: Values,
    strata: Values | None = None,
    clusters: Values | None = None,
    permutations: int = 5000,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Point-biserial correlations of measurements with an outcome, corrected for their number, and within strata.

    A negative r means larger measurements where the outcome is false. With strata, what is tested is the correlation
    pooled within them (each stratum's means taken out), and outcomes are permuted within strata. Items of one cluster
    are alike, and permuting them would take every one for independent: where clusters hold several, each cluster's part
    of the correlation has its sign drawn instead, which asks of whole clusters only.

    Args:
        values: numbers over `item` and any others, for instance `layer`.
        outcome: true or false (1 or 0) of each item, for instance whether its answer is right.
        strata: what items are looked at by themselves for, for instance the predicted answer.
        clusters: what each item belongs to, for the interval and the p-values by permutation; None: each stands alone.
        permutations: how often outcomes are permuted, or signs drawn; no p-value of them is below
            1 / (permutations + 1), nor, of few clusters, below 2 / 2^clusters.
        resamples: how often clusters are drawn for the interval.
        seed: of both.

    Returns:
        Over the dims of `values` without `item`: `r`, and with strata `r_within` and `r_stratum` (also over `stratum`);
        `d`, Cohen's d, items with the outcome minus those without; and of what was tested `low` and `high`, the 95 %
        interval, `p` by the t-distribution, which takes items for independent, `p_permuted` by permutation or signs
        (both two-sided), `p_bh`, the latter after Benjamini and Hochberg, and `p_max`, by the largest |r| of each
        permutation, or the largest |t| of each draw of signs (r over the root of the clusters' summed squares).
        `attrs["null"]` says which. A value that does not vary has none of them, and one cluster no p-value. Draws in
        which the outcome does not vary have no correlation and are left out: `attrs["left_out"]` of `resamples`. Where
        less than half are left, or one outcome is in a single cluster, there is no interval, and `attrs["interval"]`
        says why.

    Raises:
        ValueError: for values without items, an outcome that does not vary, or other numbers of them.
        TypeError: for values that are no DataArray.

    Example:
        >>> values = xr.DataArray(np.arange(12.0).reshape(6, 2) % 5, dims=["item", "layer"])
        >>> found = mv.evaluate.stats.associate(values, [0, 1, 0, 1, 1, 1], permutations=99)
        >>> found.r.values.round(2).tolist()
        [-0.16, 0.7]

    Source:
        VIAR's per-sample correlation, whose 32 tests were neither corrected nor stratified; for both corrections see
        `benjamini_hochberg` and `max_statistic`. The draws of signs are those of Hemerik, Goeman and Finos (2020),
        "Robust testing in generalized linear models by sign flipping score contributions", Journal of the Royal
        Statistical Society B 82, of effective scores summed over clusters.
    """
    table, other = _table(values)
    truth = _truth(outcome, len(table))
    layers = np.zeros(len(table), int) if strata is None else cluster_numbers(one_each("strata", strata), len(table))
    groups = cluster_numbers(clusters, len(table))
    if whole("permutations", permutations) < 1:
        raise ValueError(f"permutations={permutations} permutes nothing; give for instance 5000.")
    checked_draws(resamples)
    x, y = _centred(table, layers), _centred(truth[:, None], layers)[:, 0]
    tested = _correlation(x, y)
    total = int(groups.max()) + 1
    if total == len(table):
        strength, null = tested, _permuted(x, y, layers, permutations, seed)
    else:
        strength, null = _flipped(x, y, groups, permutations, seed)
    # Of one cluster nothing is told: its sign says nothing, and its items are no sample of others.
    known = np.isfinite(tested) & (total > 1)
    p = np.where(known, _p_of_t(tested, len(table) - 1 - len(set(layers))), np.nan)
    found = {"r": _correlation(_centred(table, layers * 0), truth - truth.mean()), "d": _effect(table, truth)}
    low, high, said = _interval(table, truth, layers, groups, resamples, seed)
    permuted = np.where(known, p_of(np.abs(strength), np.abs(null)), np.nan)
    found |= {"low": low, "high": high, "p": p, "p_permuted": permuted, "p_bh": benjamini_hochberg(permuted)}
    found["p_max"] = np.where(known, max_statistic(strength, null), np.nan)
    result = xr.Dataset({name: other.copy(data=one.reshape(other.shape)) for name, one in found.items()})
    if strata is not None:
        result = _with_strata(result, other, (table, truth, layers), one_each("strata", strata), tested)
    about = {"tested": "r" if strata is None else "r_within", "permutations": permutations, "resamples": resamples}
    about |= {"items": len(table), "outcomes": int(truth.sum()), "clusters": total, "seed": seed, **said}
    about["null"] = "outcomes permuted within strata" if total == len(table) else "signs of clusters' scores"
    return result.assign_attrs(p="t-distribution, two-sided, items as independent", **about)


def _table(values: Any) -> tuple[np.ndarray, xr.DataArray]:
    """Values as a table of items by all the rest, and an array shaped like the rest."""
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"{told(values)} is no DataArray; give values with a dim 'item'.")
    if "item" not in values.dims:
        raise ValueError(f"there is no dim 'item'; the values have {', '.join(map(str, values.dims)) or 'none'}.")
    along = values.transpose("item", ...)
    table = along.values.astype(float).reshape(values.sizes["item"], -1)
    measured("values", table.ravel())
    largest = np.abs(table).max(0)
    table = table / np.where(largest > 0, largest, 1.0)  # nothing here depends on a scale but what counts as no spread
    other = along.isel(item=0, drop=True).astype(float)
    spare = [name for name in other.coords if name not in other.dims and "item" in values[name].dims]
    return table, other.drop_vars(spare)


def _truth(outcome: Any, count: int) -> np.ndarray:
    truth = measured("outcome", outcome)
    as_many(values=np.empty(count), outcome=truth)
    wrong = truth[~np.isin(truth, (0, 1))]
    if len(wrong):
        raise ValueError(f"outcome holds {wrong[0]:g}; give true or false for each item.")
    if truth.min() == truth.max():
        raise ValueError(f"the outcome is {bool(truth[0])} for all {count} items, so nothing can go with it.")
    return truth


def _centred(table: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """A table of items with each stratum's means taken out."""
    member = (strata == np.arange(strata.max() + 1)[:, None]).astype(float)
    return table - ((member @ table) / member.sum(1)[:, None])[strata]


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The correlation of each column of x with y, both centred; not a number where one does not vary."""
    return _quotient(y @ x, (x**2).sum(0) * (y**2).sum())


def _quotient(together: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    tiny = spreads <= NO_SPREAD
    return np.where(tiny, np.nan, together / np.sqrt(np.where(tiny, 1.0, spreads)))


def _permuted(x: np.ndarray, y: np.ndarray, strata: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """Correlations with the outcome permuted within strata: permutations by columns."""
    generator, found = np.random.default_rng(seed), []
    spreads, held = (x**2).sum(0) * (y**2).sum(), max(1, HELD // len(y))
    for start in range(0, permutations, held):
        mixed = np.tile(y, (min(held, permutations - start), 1))
        for stratum in range(strata.max() + 1):
            here = np.flatnonzero(strata == stratum)
            mixed[:, here] = generator.permuted(mixed[:, here], axis=1)
        found.append(_quotient(mixed @ x, spreads))
    return np.concatenate(found)


def _flipped(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of clusters' scores over the root of their squares, and the same with their signs drawn, by columns."""
    scores = cluster_sums(_quotient(x * y[:, None], (x**2).sum(0) * (y**2).sum()), groups)
    squares = (scores**2).sum(0)
    # Scores that are all 0 speak for nothing, and are not left out: the value varies.
    root = np.where(squares <= NO_SPREAD, np.inf, np.sqrt(squares))
    generator, found = np.random.default_rng(seed), []
    held = max(1, HELD // len(scores))
    for start in range(0, permutations, held):
        drawn = generator.integers(0, 2, (min(held, permutations - start), len(scores)))
        found.append((2.0 * drawn - 1) @ (scores / root))
    return (scores / root).sum(0), np.concatenate(found)


def _p_of_t(r: np.ndarray, freedom: int) -> np.ndarray:
    from scipy.stats import t

    if freedom < 1:
        return np.full(r.shape, np.nan)
    with np.errstate(divide="ignore"):
        return 2 * t.sf(np.abs(r) * np.sqrt(freedom / (1 - np.minimum(r**2, 1))), freedom)


def _effect(table: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Cohen's d of each column, items with the outcome minus those without."""
    with_, without = table[truth == 1], table[truth == 0]
    within = ((with_ - with_.mean(0)) ** 2).sum(0) + ((without - without.mean(0)) ** 2).sum(0)
    return _quotient(with_.mean(0) - without.mean(0), within / max(1, len(table) - 2))


def _interval(
    table: np.ndarray, truth: np.ndarray, strata: np.ndarray, groups: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The percentile interval of the correlation within strata, over draws of clusters that have one."""
    total = int(groups.max()) + 1
    x, y = _centred(table, strata * 0), (truth - truth.mean())[:, None]  # near 0, so that differences of sums are exact
    moments = np.concatenate([x, x**2, x * y, y, y**2, np.ones_like(y)], 1)
    cuts = np.cumsum([x.shape[1]] * 3 + [1, 1])
    drawn = drawn_clusters(total, resamples, seed)
    spread_x, spread_y, together, raw = (np.zeros((resamples, 1)) for _ in range(4))
    for stratum in range(strata.max() + 1):
        here = np.flatnonzero(strata == stratum)
        sums = np.zeros((total, moments.shape[1]))
        np.add.at(sums, groups[here], moments[here])
        of_x, of_xx, of_xy, of_y, of_yy, count = np.split(drawn @ sums, cuts, axis=1)
        many = np.maximum(count, 1)
        spread_x, spread_y = spread_x + of_xx - of_x**2 / many, spread_y + of_yy - of_y**2 / many
        together, raw = together + of_xy - of_x * of_y / many, raw + of_xx
    # What varies at all has a spread of half an item of the outcome; below that, and beside x's squares, is rounding.
    varies = spread_y > 0.25
    draws = np.where(varies & (spread_x > 1e-12 * raw), _quotient(together, spread_x * spread_y), np.nan)
    enough = np.isfinite(draws).mean(0) >= LEAST
    reason = _no_interval(truth, strata, groups)
    if not reason and not enough.any():
        reason = f"none: there is a correlation in less than half of the {resamples} draws"
    low, high = ends(np.where(enough & (reason == ""), draws, np.nan), total, 0.95)
    return low, high, {"left_out": int((~varies).sum()), "interval": reason or "percentile bootstrap over clusters"}


def _no_interval(truth: np.ndarray, strata: np.ndarray, groups: np.ndarray) -> str:
    """Why draws of clusters can give no interval, of strata in which the outcome varies; nothing where they can."""
    varying = [one for one in range(strata.max() + 1) if len(set(truth[strata == one].tolist())) > 1]
    within = np.isin(strata, varying)
    for outcome in (False, True):
        if len(set(groups[within & (truth == outcome)].tolist())) < 2:
            where = " of the strata in which it varies" if len(varying) <= strata.max() else ""
            return f"none: the outcome is {outcome} in less than two clusters{where}"
    return ""


def _with_strata(
    result: xr.Dataset,
    other: xr.DataArray,
    known: tuple[np.ndarray, np.ndarray, np.ndarray],
    names: np.ndarray,
    tested: np.ndarray,
) -> xr.Dataset:
    """A result with the correlations pooled within strata, and in each."""
    table, truth, strata = known
    rows = []
    for stratum in range(strata.max() + 1):
        here = strata == stratum
        alone = np.zeros(int(here.sum()), int)
        rows.append(_correlation(_centred(table[here], alone), truth[here] - truth[here].mean()))
    first = list(dict.fromkeys(names.tolist()))
    each = other.expand_dims(stratum=first).copy(data=np.stack(rows).reshape(len(first), *other.shape))
    counted = ("stratum", np.bincount(strata), {"long_name": "items", "units": "1"})
    within = other.copy(data=tested.reshape(other.shape))
    return result.assign(r_within=within, r_stratum=each, n_stratum=counted)
