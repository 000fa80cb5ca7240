"""Two evaluations of the same questions: what changed, how sure that is, and would another threshold have done it?

Rule this module guards: every interval is of the same draws of pictures, and in each draw the threshold is matched
anew.

>>> float(compare(base, base).advantage.sel(metric="accuracy"))
0.0
"""

from typing import Any

import numpy as np
import xarray as xr

from mechvlm.evaluate.calibration import reliability
from mechvlm.evaluate.draws import checked_draws, cluster_sums, drawn_clusters, ends, p_below
from mechvlm.evaluate.effects import cohens_h, power, required_n
from mechvlm.evaluate.items import cluster_numbers, first_asked, measured, predictions, shares_of_one, yes_answers
from mechvlm.evaluate.paired import mcnemar
from mechvlm.evaluate.posteriors import beta_independent, beta_paired
from mechvlm.evaluate.scoring import METRICS, answer_table, measures, squared_errors
from mechvlm.evaluate.thresholds import BETWEEN, matched_shift, moved_sums, threshold_sweep
from mechvlm.evaluate.verdicts import calibrated, no_threshold, unlike, verdict, without_threshold
from mechvlm.sites import told

MODELS = ("base", "edited", "threshold")
"""Of what scores are: the model, the edited one, and the model with its threshold where it has the edited yes-ratio."""

COMPARED = (*METRICS, "brier")
SHARES = ("accuracy", "yes_ratio")
NEEDED = ("question_id", "image", "question", "label", "duplicate_of", "p_yes", "margin", "predicted", "correct")
BANDS = (2.0, 5.0)
"""Where baseline margins, in logits and without their sign, are divided."""


def compare(
    base: xr.Dataset,
    edited: xr.Dataset,
    duplicates: str = "drop",
    resamples: int = 10_000,
    seed: int = 42,
    level: float = 0.95,
) -> xr.Dataset:
    """What an edit changes in the answers to the same questions, and whether moving the threshold does the same.

    Args:
        base: an evaluation, as `mv.evaluate.pope` returns it.
        edited: one of the same questions in the same order, with edits. One with another model, template, scoring,
            parser or decoding is compared as well, and `attrs["differs"]` and the verdict name what is not the same.
        duplicates: "drop": of the items that are there, a question asked twice about one picture counts once. "keep":
            as often as it is asked, which pretends to more information than there is, since its answer is the same.
        resamples: how often pictures are drawn.
        seed: of the draws.
        level: how often an interval holds the true value.

    Returns:
        Over `metric` (accuracy, precision, recall, f1, yes_ratio, other, brier): `value`, `low`, `high` of each
        `model`; `difference`, edited minus base, with its `_low`, `_high` and `p`, one-sided: one more than the draws
        in which it is 0 or less, over one more than the draws; and `advantage`, edited minus threshold, with its ends:
        the answer to "equivalent to moving the threshold?", where the threshold is moved, by margins, to the edited
        yes-ratio (`matched_shift`), in each draw anew. `attrs["verdict"]` says it in a sentence. A moved threshold has
        no Brier score. One picture has no interval and no `p`.

        Where answers are not the sign of the margin (parsed from words, or a contrast for the base), nothing is said of
        a threshold: `advantage*`, `matched_shift` and `sweep_*` are not numbers, and `attrs["threshold"]` and the
        verdict say why. `attrs["calibration"]` says whether `ece`, `bin_*` and the Brier score are of the answers, or
        of the first token, which need not be what was parsed.

        Pairs: `only_base` and `only_edited` right, `mcnemar`, `mcnemar_p` (corrected) and `mcnemar_p_exact`, not
        numbers where no item differs. Over `share` (accuracy, yes_ratio): `cohens_h`, `power` and `required_n` (per
        group, as of two independent groups), and over `posterior` (paired, independent) `p_above`, `posterior_mean`,
        `_low`, `_high`. These take items for independent. `sweep_*` over `shift`: the base with its threshold moved.
        `bin_*` over `bin`, and `ece`. `margin_change`, in logits, with its ends, and by |baseline margin| over `band`,
        with `band_items`.

    Raises:
        ValueError: for evaluations of other questions or in another order, or values that are not finite.
        TypeError: for what is no evaluation.

    Example:
        >>> found = mv.evaluate.stats.compare(base, edited, resamples=200)
        >>> print(found.attrs["verdict"])
        accuracy with the edit cannot be told from that of ... the threshold: it differs by +0.0000 [+0.0000, +0.0000]

    Source:
        VIAR's statistics, with pairs taken as pairs, pictures as clusters, and the threshold as the thing to beat.
    """
    checked_draws(resamples, level)
    base, edited = _matching(base, edited, duplicates)
    count = base.sizes["item"]
    groups = cluster_numbers(base.image.values, count)
    total = int(groups.max()) + 1
    drawn = drawn_clusters(total, resamples, seed)
    every, once = _three(base, edited, drawn, groups), _three(base, edited, np.ones((1, total)), groups)[:, 0]
    found = _differences(once, every, total, level)
    found |= _margins(base, edited, drawn, groups, level) | _pairs(base, edited)
    wanted = float(once[1, METRICS.index("yes_ratio")])
    found["matched_shift"] = matched_shift(base.margin.values, wanted)["shift"]
    coords = {"model": list(MODELS), "metric": list(COMPARED), "share": list(SHARES), "band": _band_names()}
    result = xr.Dataset(found, coords={**coords, "posterior": ["paired", "independent"]})
    result = xr.merge([result, _shares(base, edited), _sweep(base), _bins(base, edited)], combine_attrs="drop")
    about: dict[str, Any] = {"items": count, "images": total, "level": level, "resamples": resamples, "seed": seed}
    unclaimed, differs = no_threshold(base, edited), unlike(base, edited)
    about |= {"threshold": unclaimed or "of the base's margin", "differs": ", ".join(differs)}
    about |= {
        "calibration": calibrated(base=base, edited=edited),
        "duplicates": duplicates,
        "interval": "percentile bootstrap over images",
        "between": BETWEEN,
    }
    known = {f"base_{name}": value for name, value in base.attrs.items() if edited.attrs.get(name) != value}
    result = without_threshold(result) if unclaimed else result
    return result.assign_attrs(
        {**edited.attrs, **known, **about, "verdict": verdict(result, differs, total, unclaimed)}
    )


def _matching(base: Any, edited: Any, duplicates: str) -> tuple[xr.Dataset, xr.Dataset]:
    """Both evaluations, over the items that count."""
    for name, one in (("base", base), ("edited", edited)):
        held = set(map(str, one.variables)) if isinstance(one, xr.Dataset) else set()
        lacking = [each for each in NEEDED if each not in held]
        if lacking:
            raise TypeError(
                f"{name} is a {type(one).__name__} without {', '.join(lacking)}; give an evaluation, as "
                "mv.evaluate.pope returns it."
            )
    if duplicates not in ("drop", "keep"):
        raise ValueError(f"duplicates={told(duplicates)} is not known; give 'drop' or 'keep'.")
    if base.sizes["item"] != edited.sizes["item"]:
        raise ValueError(
            f"base has {base.sizes['item']} items and edited {edited.sizes['item']}; evaluate both on the same "
            "questions."
        )
    for name in ("image", "question", "label"):
        differ = np.flatnonzero(base[name].values != edited[name].values)
        if len(differ):
            here, there = base[name].values[differ[0]], edited[name].values[differ[0]]
            raise ValueError(
                f"item {differ[0]} has the {name} {told(str(here))} in base and {told(str(there))} in edited; evaluate "
                "both on the same questions, in the same order."
            )
    if duplicates == "drop":
        first = first_asked(base)
        base, edited = base.isel(item=first), edited.isel(item=first)
    for one in (base, edited):
        measured("margin", one.margin.values)
        shares_of_one("p_yes", one.p_yes.values)
    return base, edited


def _three(base: xr.Dataset, edited: xr.Dataset, drawn: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Every metric of each model in each draw: model by draw by metric."""
    truth = yes_answers("label", base.label.values)
    measured_of = []
    for one in (base, edited):
        table = answer_table(truth, predictions(one.predicted.values))
        errors = squared_errors(one.p_yes.values, one.label.values)
        sums = drawn @ cluster_sums(np.concatenate([table, errors[:, None]], 1), groups)
        measured_of.append(np.concatenate([measures(sums[:, :-1]), sums[:, -1:] / sums[:, -2:-1]], 1))
    ratios = measured_of[1][:, METRICS.index("yes_ratio")]
    moved = measures(moved_sums(base.margin.values.astype(float), truth, ratios, drawn, groups))
    return np.stack([*measured_of, np.concatenate([moved, np.full((len(moved), 1), np.nan)], 1)])


def _differences(once: np.ndarray, every: np.ndarray, total: int, level: float) -> dict[str, Any]:
    """Values of each model, the edited one minus the base, and minus the base with its threshold moved."""
    low, high = ends(every.transpose(1, 0, 2), total, level)
    over = ["model", "metric"]
    found: dict[str, Any] = {"value": (over, once), "low": (over, low), "high": (over, high)}
    for name, other in (("difference", 0), ("advantage", 2)):
        draws = every[1] - every[other]
        reach = ends(draws, total, level)
        found |= {name: ("metric", once[1] - once[other])}
        found |= {f"{name}_{end}": ("metric", one) for end, one in zip(("low", "high"), reach, strict=True)}
        found["p" if name == "difference" else "advantage_p"] = ("metric", p_below(draws, total))
    return found


def _margins(
    base: xr.Dataset, edited: xr.Dataset, drawn: np.ndarray, groups: np.ndarray, level: float
) -> dict[str, Any]:
    """The mean change of the margin with its interval, and by how sure the base was."""
    change = edited.margin.values.astype(float) - base.margin.values
    sums = drawn @ cluster_sums(np.stack([change, np.ones_like(change)], 1), groups)
    low, high = ends(sums[:, 0] / sums[:, 1], int(groups.max()) + 1, level)
    place = np.digitize(np.abs(base.margin.values), BANDS)
    count = np.bincount(place, minlength=len(BANDS) + 1)
    with np.errstate(invalid="ignore"):
        means = np.bincount(place, change, len(BANDS) + 1) / count
    units = {"long_name": "change of the margin", "units": "logits"}
    single = {"margin_change": change.mean(), "margin_change_low": low, "margin_change_high": high}
    found: dict[str, Any] = {name: ((), float(value), units) for name, value in single.items()}
    return {**found, "band_change": ("band", means, units), "band_items": ("band", count)}


def _band_names() -> list[str]:
    reach = [f"{low:g} to {high:g}" for low, high in zip(BANDS, BANDS[1:], strict=False)]
    return [f"below {BANDS[0]:g}", *reach, f"from {BANDS[-1]:g}"]


def _pairs(base: xr.Dataset, edited: xr.Dataset) -> dict[str, Any]:
    """How many items only one model answers right, and McNemar's test of it."""
    first, second = (one.correct.values.astype(bool) for one in (base, edited))
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    tested = (np.nan, np.nan, np.nan)
    if b + c:
        usual = mcnemar(b, c)
        tested = (usual.statistic, usual.p_value, mcnemar(b, c, exact=True).p_value)
    names = ("mcnemar", "mcnemar_p", "mcnemar_p_exact")
    return {"only_base": b, "only_edited": c, **dict(zip(names, tested, strict=True))}


def _shares(base: xr.Dataset, edited: xr.Dataset) -> xr.Dataset:
    """Effect sizes, power and posteriors of accuracy and of the yes-ratio."""
    count, rows, believed = base.sizes["item"], [], []
    for name in SHARES:
        pair = (one.correct.values if name == "accuracy" else one.predicted.values == "yes" for one in (base, edited))
        first, second = (each.astype(bool) for each in pair)
        h = cohens_h(float(first.mean()), float(second.mean()))
        rows.append([h, power(h, count), required_n(h) if h else np.nan])
        both, one, two = int((first & second).sum()), int((first & ~second).sum()), int((second & ~first).sum())
        paired = beta_paired(both, one, two, count - both - one - two)
        believed.append([paired, beta_independent(both + one, count, both + two, count)])
    table = np.array(rows, float)
    found: dict[str, Any] = {
        name: ("share", table[:, at]) for at, name in enumerate(("cohens_h", "power", "required_n"))
    }

    def of(read: str) -> list[list[float]]:
        return [[vars(one)[read] for one in row] for row in believed]

    named = {"p_above": "p_above", "posterior_mean": "mean", "posterior_low": "low", "posterior_high": "high"}
    return xr.Dataset(found | {name: (["share", "posterior"], of(read)) for name, read in named.items()})


def _sweep(base: xr.Dataset) -> xr.Dataset:
    found = threshold_sweep(base.margin.values, base.label.values)
    best = {f"sweep_{name}": found.attrs[name] for name in ("best_shift", "best_accuracy")}
    return found.rename({name: f"sweep_{name}" for name in found.data_vars}).assign(best).drop_attrs(deep=False)


def _bins(base: xr.Dataset, edited: xr.Dataset) -> xr.Dataset:
    both = [reliability(one.p_yes.values, one.label.values) for one in (base, edited)]
    found = xr.concat(both, xr.Variable("model", list(MODELS[:2])), coords="minimal", compat="override")
    names = {name: f"bin_{name}" for name in ("confidence", "accuracy", "lower", "upper")}
    found = found.rename({**names, "n_items": "bin_items"})
    return found.assign(bin_items=found.bin_items.astype(float)).reindex(model=list(MODELS)).drop_attrs(deep=False)
