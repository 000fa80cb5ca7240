"""What statistics refuse, word for word; `test_errors.py` runs these, and sees that none is left out."""

from collections.abc import Callable

import numpy as np
import xarray as xr
from evaluations import baseline, changed

import mechvlm as mv

stats, plot = mv.evaluate.stats, mv.plot
Case = tuple[str, Callable[[], object]]


def table(**dims: int) -> xr.DataArray:
    return xr.DataArray(np.arange(np.prod(list(dims.values())), dtype=float).reshape(*dims.values()), dims=list(dims))


def compared(*, base: object = None, edited: object = None, **more: object) -> xr.Dataset:
    one = baseline(2)
    return stats.compare(one if base is None else base, changed(one, 0.5) if edited is None else edited, **more)  # type: ignore[arg-type]


def other(name: str) -> xr.Dataset:
    """An evaluation in which one item has something else."""
    one = baseline(2)
    return one.assign_coords({name: ("item", np.where(np.arange(12) == 3, "else", one[name].values))})


def unmeasured() -> xr.Dataset:
    one = baseline(2)
    return one.assign(margin=one.margin.where(one.item != 4))


VALUES: list[Case] = [
    ("labels=3 is not a list with a value for each item.", lambda: stats.scores(3, ["yes"])),  # type: ignore[arg-type]
    ("labels has the shape (0,); give one value for each item, and at least one.", lambda: stats.scores([], [])),
    ("labels holds 'maybe'; give 'yes' or 'no' for each item.", lambda: stats.scores(["maybe"], ["yes"])),
    ("predicted holds 'Yes'; give 'yes', 'no' or 'other' for each item.", lambda: stats.scores(["yes"], ["Yes"])),
    ("margins holds <U1; give a number for each item.", lambda: stats.matched_shift(["a"], 0.5)),
    ("margins holds nan at item 1; give finite numbers.", lambda: stats.matched_shift([0.0, np.nan], 0.5)),
    ("p_yes holds 1.5, which is no probability; give numbers from 0 to 1.", lambda: stats.brier([1.5], ["yes"])),
    ("there must be as many values of each, and p_yes has 2, labels has 1.", lambda: stats.brier([1, 0], ["yes"])),
    (
        "clusters=['a'] must name one cluster for each of the 2 items.",
        lambda: stats.paired_bootstrap([1, 0], [0, 1], clusters=["a"]),
    ),
    (
        "resamples=0 draws nothing; give for instance 10_000.",
        lambda: stats.paired_bootstrap([1, 0], [0, 1], resamples=0),
    ),
    (
        "level=95 is not between 0 and 1; give for instance 0.95.",
        lambda: stats.paired_bootstrap([1, 0], [0, 1], level=95),
    ),
]

EFFECTS: list[Case] = [
    ("p2=84 is no share; give a number from 0 to 1.", lambda: stats.cohens_h(0.8, 84)),
    ("n=0 is no number of items; give at least 1.", lambda: stats.power(0.1, 0)),
    ("alpha=5 is not between 0 and 1; give for instance 0.05.", lambda: stats.power(0.1, 10, 5)),
    ("power=80 is not between 0 and 1; give for instance 0.8.", lambda: stats.required_n(0.1, 80)),
    ("tails=3 is not known; give 2, 1 or 'upper'.", lambda: stats.power(0.1, 10, tails=3)),
    (
        "h=0 is no difference, which no number of items would show; give the h that is to be seen.",
        lambda: stats.required_n(0),
    ),
    (
        "power=0.02 is not above alpha=0.05 / 2, which one item has; give for instance 0.8.",
        lambda: stats.required_n(0.1, 0.02),
    ),
    (
        "the groups have 1 and 2 items; a deviation takes at least two in each.",
        lambda: stats.cohens_d([1], [1, 2]),
    ),
    ("convention='viar' is not known; give None or 'viar-2026'.", lambda: stats.cohens_d([1, 2], [1, 2], "viar")),
    (
        "no value differs from its group's mean, so there is no deviation to measure a difference in.",
        lambda: stats.cohens_d([1, 1], [2, 2]),
    ),
    (
        "convention='viar' is not known; give None or 'viar-2026'.",
        lambda: stats.paired_bootstrap([1, 2], [1, 2], convention="viar"),
    ),
    ("b=-1 is no number of items; counts go from 0.", lambda: stats.mcnemar(-1, 2)),
    (
        "b and c are 0: no item is answered right by one model only, so there is nothing to test.",
        lambda: stats.mcnemar(0, 0),
    ),
    ("n1=-3 counts nothing; give a number from 0.", lambda: stats.beta_independent(0, -3, 1, 2)),
    ("k2=3 is more than the n2=2 items it was counted among.", lambda: stats.beta_independent(0, 3, 3, 2)),
]

TABLES: list[Case] = [
    ("bins=0 holds nothing; give for instance 10.", lambda: stats.reliability([0.5], ["yes"], 0)),
    (
        "no bin holds an item, so there is no calibration to measure.",
        lambda: stats.expected_calibration_error([0], [0.5], [0.5]),
    ),
    ("yes_ratio=40 is no share; give a number from 0 to 1.", lambda: stats.matched_shift([0.0], 40)),
    ("p holds 2, which is no p-value; give numbers from 0 to 1.", lambda: stats.benjamini_hochberg([0.5, 2])),
    (
        "permuted is (4,); give an array of permutations by the 2 tests.",
        lambda: stats.max_statistic([1.0, 2.0], np.zeros(4)),
    ),
    ("permuted holds no permutation; give at least one.", lambda: stats.max_statistic([1.0], np.zeros((0, 1)))),
    (
        "permutations=0 permutes nothing; give for instance 5000.",
        lambda: stats.associate(table(item=2, layer=1), [0, 1], permutations=0),
    ),
    ("[1, 2] is no DataArray; give values with a dim 'item'.", lambda: stats.associate([1, 2], [0, 1])),  # type: ignore[arg-type]
    (
        "there is no dim 'item'; the values have prompt, layer.",
        lambda: stats.associate(table(prompt=2, layer=3), [0, 1]),
    ),
    ("outcome holds 2; give true or false for each item.", lambda: stats.associate(table(item=2), [0, 2])),
    (
        "the outcome is True for all 2 items, so nothing can go with it.",
        lambda: stats.associate(table(item=2), [1, 1]),
    ),
    (
        "base is a list without question_id, image, question, label, duplicate_of, p_yes, margin, predicted, correct; "
        "give an evaluation, as mv.evaluate.pope returns it.",
        lambda: compared(base=[]),
    ),
    (
        "edited is a Dataset without margin; give an evaluation, as mv.evaluate.pope returns it.",
        lambda: compared(edited=baseline(2).drop_vars("margin")),
    ),
    ("duplicates='first' is not known; give 'drop' or 'keep'.", lambda: compared(duplicates="first")),
    (
        "base has 18 items and edited 12; evaluate both on the same questions.",
        lambda: compared(base=baseline(3)),
    ),
    (
        "item 3 has the question 'Is there a thing 3 in the image?' in base and 'else' in edited; evaluate both on the "
        "same questions, in the same order.",
        lambda: compared(edited=other("question")),
    ),
    (
        "item 3 has the image 'else' in base and 'picture 0' in edited; evaluate both on the same questions, in the "
        "same order.",
        lambda: compared(base=other("image")),
    ),
    ("margin holds nan at item 4; give finite numbers.", lambda: compared(edited=unmeasured())),
    (
        "comparison_table takes what compare returns, and was given a Dataset.",
        lambda: stats.comparison_table(baseline(2)),
    ),
]

FIGURES: list[Case] = [
    (
        "comparison was given a Dataset that it cannot draw; make it with mv.evaluate.stats.compare.",
        lambda: plot.comparison(baseline(2)),
    ),
    (
        "reliability_diagram was given a list that it cannot draw; make it with mv.evaluate.stats.reliability.",
        lambda: plot.reliability_diagram([]),  # type: ignore[arg-type]
    ),
    (
        "threshold_curve was given a Dataset that it cannot draw; make it with mv.evaluate.stats.threshold_sweep.",
        lambda: plot.threshold_curve(baseline(2)),
    ),
    (
        "association draws one dim, and the correlations have layer, head; choose with sel.",
        lambda: plot.association(
            stats.associate(table(item=4, layer=2, head=2), [0, 1, 1, 0], permutations=3, resamples=3)
        ),
    ),
]

CASES = VALUES + EFFECTS + TABLES + FIGURES
MODULES = [
    *("association", "calibration", "comparison", "corrections", "draws", "effects", "items", "paired", "posteriors"),
    *("scoring", "stats", "tables", "thresholds", "verdicts"),
]
"""The modules of `mechvlm.evaluate` whose sentences these are."""
