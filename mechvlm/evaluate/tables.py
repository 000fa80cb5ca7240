"""A comparison as one table that can be read.

Rule this module guards: the table holds what `compare` found, and computes nothing.

>>> comparison_table(mv.evaluate.stats.compare(base, edited, resamples=200)).columns.tolist()
['base', 'edited', 'edited - base', 'threshold moved', 'edited - threshold moved']
"""

import numpy as np
import pandas as pd
import xarray as xr

from mechvlm.evaluate.verdicts import OF_ANSWERS

TITLES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "yes_ratio": "yes-ratio of the answers",
    "other": "answers that are neither",
    "brier": "Brier score",
}
COLUMNS = ["base", "edited", "edited - base", "threshold moved", "edited - threshold moved"]


def comparison_table(found: xr.Dataset) -> pd.DataFrame:
    """What `compare` found, as a table of texts: a row a quantity, intervals in brackets.

    Args:
        found: what `compare` returns.

    Returns:
        Columns base, edited, edited - base, threshold moved (the base with the edited yes-ratio), and edited -
        threshold moved; below the metrics stand the tests, in the column of what they are about. Where nothing can be
        said of a threshold, its columns are empty and a row says why; further rows say what differs beside the edit,
        and of what calibration is where it is not of the answers.

    Raises:
        TypeError: for anything else.

    Example:
        >>> table = mv.evaluate.stats.comparison_table(mv.evaluate.stats.compare(base, edited, resamples=200))
        >>> table.loc["accuracy", "base"]
        '0.7625 [0.7..., 0.8...]'
    """
    if not isinstance(found, xr.Dataset) or not {"advantage", "margin_change", "p_above"} <= set(found.data_vars):
        raise TypeError(f"comparison_table takes what compare returns, and was given a {type(found).__name__}.")
    rows = {TITLES[name]: _row(found.sel(metric=name)) for name in found["metric"].values.tolist()}
    apart = found.attrs.get("calibration", OF_ANSWERS) != OF_ANSWERS
    if apart:
        rows = {f"{name}, first token" if name == TITLES["brier"] else name: row for name, row in rows.items()}
    rows["expected calibration error" + ", first token" * apart] = [
        *(f"{value:.4f}" for value in found.ece.sel(model=["base", "edited"]).values),
        *("", "", ""),
    ]
    return pd.DataFrame.from_dict(rows | _tests(found) | _notes(found), orient="index", columns=COLUMNS)


def _row(one: xr.Dataset) -> list[str]:
    def of(model: str) -> str:
        here = one.sel(model=model)
        return _said(here["value"], here["low"], here["high"])

    changed, ahead = (
        _said(one[name], one[f"{name}_low"], one[f"{name}_high"], "+") for name in ("difference", "advantage")
    )
    return [of("base"), of("edited"), changed, of("threshold"), ahead]


def _tests(found: xr.Dataset) -> dict[str, list[str]]:
    """Rows of single numbers, each in the column of what it is about."""
    right, paired = found.sel(share="accuracy"), found.sel(share="accuracy", posterior="paired")
    apart = found.sel(share="accuracy", posterior="independent")
    change = _said(found.margin_change, found.margin_change_low, found.margin_change_high, "+")
    bands = "; ".join(
        f"{band}: {value:+.3f} ({count:g})"
        for band, value, count in zip(found.band.values, found.band_change.values, found.band_items.values, strict=True)
        if count
    )
    test = "no item differs"
    if np.isfinite(found.mcnemar):
        test = f"{float(found.mcnemar):.3f} (p {float(found.mcnemar_p):.3g}; exact {float(found.mcnemar_p_exact):.3g})"
    single = {
        "right in one only": [f"{int(found.only_base)}", f"{int(found.only_edited)}", ""],
        "one-sided p of the difference, accuracy": ["", "", _figure(found.p.sel(metric="accuracy"), ".4g")],
        "McNemar": ["", "", test],
        "Cohen's h, accuracy": ["", "", f"{float(right.cohens_h):+.4f}"],
        "Cohen's h, yes-ratio": ["", "", f"{float(found.cohens_h.sel(share='yes_ratio')):+.4f}"],
        "power at this many items, as two groups": ["", "", f"{float(right.power):.3f}"],
        "items a group for a power of 0.8": ["", "", _whole(float(right.required_n))],
        "P(edited better), of pairs": ["", "", _believed(paired)],
        "P(edited better), as two groups": ["", "", _believed(apart)],
        "change of the margin": ["", "", change],
        "by |baseline margin| (items)": ["", "", bands],
    }
    rows = {name: [*row, "", ""] for name, row in single.items()}
    rows["shift of the threshold"] = ["", "", "", _figure(found.matched_shift, "+.3f"), ""]
    best = [_figure(found.sweep_best_accuracy, ".4f"), _figure(found.sweep_best_shift, "+.2f")]
    rows["best threshold, on these items"] = ["", "", "", " at ".join(filter(None, best)), ""]
    return rows


def _notes(found: xr.Dataset) -> dict[str, list[str]]:
    """Rows that say what the numbers above are not of."""
    rows = {}
    if not np.isfinite(found.matched_shift):
        rows["nothing is said of a threshold, since"] = ["", "", "", found.attrs.get("threshold", ""), ""]
    if found.attrs.get("differs", "the edit") != "the edit":
        rows["what differs"] = ["", found.attrs["differs"], "", "", ""]
    if found.attrs.get("calibration", OF_ANSWERS) != OF_ANSWERS:
        rows["Brier score and calibration are"] = [found.attrs["calibration"], "", "", "", ""]
    return rows


def _figure(value: xr.DataArray, look: str) -> str:
    """A number, or nothing where it is none."""
    return f"{float(value):{look}}" if np.isfinite(value) else ""


def _whole(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "none, as there is no difference"


def _believed(one: xr.Dataset) -> str:
    said = _said(one.posterior_mean, one.posterior_low, one.posterior_high, "+")
    return f"{float(one.p_above):.4f} ({said})"


def _said(value: xr.DataArray, low: xr.DataArray, high: xr.DataArray, sign: str = "") -> str:
    """A number with its interval; nothing where there is none."""
    middle, ends = float(value), [float(low), float(high)]
    if not np.isfinite(middle):
        return ""
    middle, ends = round(middle, 9) + 0.0, [round(end, 9) + 0.0 for end in ends]  # no -0.0000
    if not np.isfinite(ends).all():
        return f"{middle:{sign}.4f}"
    return f"{middle:{sign}.4f} [{ends[0]:{sign}.4f}, {ends[1]:{sign}.4f}]"
