"""A benchmark's answers as one page: how good, how sure, what an edit changes, and whether a threshold does the same.

>>> found = {"base": base, "edited": edited}
>>> list(table_of(found).columns[:4])
['item', 'question_id', 'image', 'question']
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mechvlm.evaluate import stats
from mechvlm.evaluate.verdicts import calibrated
from mechvlm.plot import comparison, reliability_diagram, threshold_curve
from mechvlm.report.page import Drawing, Section, Table, page
from mechvlm.report.write import written

PER_ITEM = ("p_yes", "p_either", "margin", "predicted", "correct", "answer")
SHOWN = 40
BINS = "Ten bins of equal width over the probability of the likelier of yes and no"
INTERVALS = "In brackets: 95 % intervals, over draws of pictures with all their questions."


def benchmark_page(found: Mapping[str, xr.Dataset], folder: Path, about: Mapping[str, str]) -> Path:
    """Write a page about a model's answers, and about what edits change where there are two evaluations.

    Args:
        found: `base`, and `edited` where there is one, as `mv.evaluate.pope` returns them.
        folder: gets pope.html and the numbers of its tables and figures.
        about: what is said of the page beside what the evaluations say of themselves; `made`, a date, among it.

    Returns:
        The page's path.

    Example:
        >>> benchmark_page({"base": base}, Path("."), {"made": "2026-01-01"}).name
        'pope.html'
    """
    sections = [by_split(found)]
    if "edited" in found:
        sections += changes(found["base"], found["edited"])
    else:
        sections.append(calibration(found["base"]))
    last = list(found.values())[-1]
    title = heading(str(last.attrs.get("questions", "questions")), len(set(last.image.values)))
    said = f"What {last.attrs.get('model', 'the model')} answers to {last.sizes['item']} questions of yes or no"
    about = {**{name: str(value) for name, value in last.attrs.items()}, **about}
    path = folder / "pope.html"
    made = [written(section, folder) for section in sections]
    path.write_text(page(made, about, title, said), encoding="utf-8")
    return path


def heading(questions: str, pictures: int) -> str:
    """What was asked about how much; hashes of files stand with what the numbers come from.

    Args:
        questions: what was read, as `mv.evaluate.pope` keeps it.
        pictures: how many there are.

    Example:
        >>> heading(f"own.json sha256 {'0' * 64}", 1)
        'own.json: 1 picture'
    """
    names = ", ".join(one.partition(" sha256 ")[0] for one in questions.split("; "))
    return f"{names}: {pictures} picture{'s' * (pictures != 1)}"


def by_split(found: Mapping[str, xr.Dataset]) -> Section:
    """Accuracy and the rest for each split, and their mean, as POPE reports them."""
    parts = {
        (str(split), str(name)): stats.scores(part.label.values, part.predicted.values, part.image.values)
        for name, one in found.items()
        for split, part in one.groupby("split")
    }
    metrics = ["accuracy", "precision", "recall", "f1", "yes_ratio", "other"]
    rows = [
        [split, name, *(spelled(part, metric) for metric in metrics)] for (split, name), part in sorted(parts.items())
    ]
    for name in found:
        means = [
            float(np.mean([parts[key].value.sel(metric=one) for key in parts if key[1] == name])) for one in metrics
        ]
        rows.append(["mean of splits", name, *(f"{value:.4f}" for value in means)])
    first = {name: one.isel(item=stats.first_asked(one)) for name, one in found.items()}
    shares = [f"{name} {float(one.correct.mean()):.4f}" for name, one in first.items()]
    count = next(iter(first.values())).sizes["item"]
    return Section(
        "scores",
        "How good",
        f"Right answers, as a share of {count} different questions: {', '.join(shares)}.",
        "For each split, since what is asked for in vain is chosen otherwise in each.",
        f"Yes is the positive answer; the yes-ratio is the share of answers that are yes. {INTERVALS}",
        tables=[Table("Scores by split", ["split", "model", *(one.replace("_", "-") for one in metrics)], rows)],
        numbers={"items": table_of(found), **found},
    )


def spelled(part: xr.Dataset, metric: str) -> str:
    """A score with its interval, where there is one."""
    value, low, high = (float(part[name].sel(metric=metric)) for name in ("value", "low", "high"))
    if not np.isfinite(value):
        return "-"
    return f"{value:.4f}" + (f" [{low:.4f}, {high:.4f}]" if np.isfinite([low, high]).all() else "")


def changes(base: xr.Dataset, edited: xr.Dataset) -> list[Section]:
    """What the edits change, and whether moving the threshold does the same."""
    found = stats.compare(base, edited)
    table = stats.comparison_table(found)
    rows = [[name, *map(str, row)] for name, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return [
        Section(
            "changes",
            "What the edits change",
            str(found.attrs["verdict"][:1].upper() + found.attrs["verdict"][1:]) + ".",
            "The edited model beside the base, and beside the base with a threshold that says yes as often.",
            f"A question that is asked in several splits counts once. {INTERVALS}",
            [Drawing("Scores of base, edited and moved threshold", comparison(found))],
            [Table("Comparison", ["", *map(str, table.columns)], rows)],
            numbers={"comparison": found, "comparison_table": table.reset_index(names="row")},
        ),
        Section(
            "threshold",
            "What a threshold does",
            best_threshold(found),
            "Accuracy over the share of yes when a constant is added to log P(yes) - log P(no), beside the edits.",
            drawings=[Drawing("Accuracy over yes-ratio", threshold_curve(found))],
        ),
        Section(
            "calibration",
            "How sure",
            f"Expected calibration error {float(found.ece.sel(model='base')):.4f}, and "
            f"{float(found.ece.sel(model='edited')):.4f} with edits.",
            f"{BINS}, {found.attrs['calibration']}.",
            drawings=[Drawing("Reliability of base and edited", reliability_diagram(found))],
        ),
        turned_answers(base, edited),
    ]


def best_threshold(found: xr.Dataset) -> str:
    """What the best threshold does, or why there is none to move."""
    if not np.isfinite(found.matched_shift):
        return f"No threshold is moved: {found.attrs['threshold']}."
    return (
        f"The best threshold on these very questions moves the margin by {float(found.sweep_best_shift):+.2f}, and is "
        f"right in {float(found.sweep_best_accuracy):.4f}."
    )


def turned_answers(base: xr.Dataset, edited: xr.Dataset) -> Section:
    """Which answers the edits changed."""
    turned = [
        at for at, (a, b) in enumerate(zip(base.predicted.values, edited.predicted.values, strict=True)) if a != b
    ]
    first = stats.first_asked(base)
    once = [at for at in turned if first[at]]
    columns = ["picture", "question", "right", "base", "edited", "margin of base", "margin with edits"]
    examples = [
        [
            *(str(base[name].values[at]) for name in ("image", "question", "label", "predicted")),
            str(edited.predicted.values[at]),
            *(f"{float(one.margin[at]):+.2f}" for one in (base, edited)),
        ]
        for at in once[:SHOWN]
    ]
    return Section(
        "items",
        "Answers that changed",
        turned_text([bool(edited.correct[at]) for at in once]),
        f"At most {SHOWN} of them; items.csv has all answers." if once else "items.csv has all answers.",
        "Margins are log P(yes) - log P(no), in nats.",
        tables=[Table("Answers that changed", columns, examples)] if once else [],
    )


def turned_text(right: Sequence[bool]) -> str:
    """How many answers changed, and how many of those are right with the edits.

    Example:
        >>> turned_text([True, False, False]), turned_text([])
        ('3 answers changed; with the edits 1 of them is right.', 'No answer changed.')
    """
    if not right:
        return "No answer changed."
    if len(right) == 1:
        return f"1 answer changed, and with the edits it is {'right' if right[0] else 'wrong'}."
    return (
        f"{len(right)} answers changed; with the edits {sum(right)} of them {'is' if sum(right) == 1 else 'are'} right."
    )


def calibration(base: xr.Dataset) -> Section:
    """How sure the model is, and how often right."""
    first = base.isel(item=stats.first_asked(base))
    found = stats.reliability(first.p_yes.values, first.label.values)
    brier = stats.brier(first.p_yes.values, first.label.values)
    return Section(
        "calibration",
        "How sure",
        f"Expected calibration error {float(found.ece):.4f}; Brier score {brier:.4f}.",
        f"{BINS}, {calibrated(base=first)}.",
        drawings=[Drawing("Reliability", reliability_diagram(found))],
        numbers={"reliability": found},
    )


def table_of(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Every item, a row each, with what each evaluation says of it in columns that begin with the evaluation's name.

    Args:
        found: evaluations of the same questions, by name.
    """
    asked = next(iter(found.values()))
    columns: dict[str, Any] = {str(name): asked[name].values for name in asked.coords}
    for name, one in found.items():
        columns |= {f"{name}_{what}": one[what].values for what in PER_ITEM if what in one}
    return pd.DataFrame(columns)
