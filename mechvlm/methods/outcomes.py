"""What came out of the parts of a study that ask the model questions: answers, and what edits change of them.

Rule this module guards: no edit is spoken of without the threshold that says yes as often.

>>> base_said({"base": base}).split(" of ")[0]
'Right in 0.7625 [0.7167, 0.8125]'
"""

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from mechvlm.evaluate import stats
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.methods.wording import against_threshold, upper, with_interval

Made = Mapping[str, xr.Dataset]
LEVEL = 0.05


def compared(parts: Made, edited: xr.Dataset, name: str) -> xr.Dataset:
    """An edit against the model as it is: from the statistics where they are there, else made now."""
    if "statistics" in parts:
        return parts["statistics"].sel(edit=name)
    same = parts["base"].isel(item=slice(0, edited.sizes["item"]))
    return stats.compare(same, edited, resamples=2000, seed=0)


def base_said(parts: Made) -> str:
    """The finding of `base`."""
    found = parts["base"]
    once = found.isel(item=stats.first_asked(found))
    scored = stats.scores(once.label.values, once.predicted.values, once.image.values)
    right, yes = (
        with_interval(*(scored[end].sel(metric=metric) for end in ("value", "low", "high")))
        for metric in ("accuracy", "yes_ratio")
    )
    sure = stats.reliability(once.p_yes.values, once.label.values)
    wrong, images = int((~once.correct.values.astype(bool)).sum()), len(set(once.image.values))
    return (
        f"Right in {right} of {once.sizes['item']} questions about {images} pictures ({wrong} wrong), share of yes "
        f"{yes}, Brier score {stats.brier(once.p_yes.values, once.label.values):.4f}, expected calibration error "
        f"{float(sure.ece):.4f}."
    )


def samples_said(parts: Made) -> str:
    """The finding of `samples`."""
    found = parts["samples"]
    if "nothing" in found.attrs:
        return f"{upper(found.attrs['nothing'])}."
    old = found.attrs["convention"] != "corrected"
    tested, p = ("r", "p") if old else ("r_within", "p_max")
    if not np.isfinite(found[p]).any():
        return "Whether attention goes with being right cannot be told: it does not vary, or there is one picture only."
    zone = found.sel(measure="zone")
    at = found.isel(measure=int(np.nanargmin(found[p].values)))
    wrong = found.attrs["items"] - found.attrs["outcomes"]
    held = "goes with being wrong" if float(at[tested]) < 0 else "goes with being right"
    said = held if float(at[p]) <= LEVEL else "is not seen to go with being right or wrong"
    how = "not corrected, answers of both kinds together" if old else "within answers of one kind, corrected for layers"
    r, over = (with_interval(one[tested], one.low, one.high, sign="+", digits=3) for one in (at, zone))
    return (
        f"More attention to the picture {said}: strongest at {_where(at)}, r {r}, p = {float(at[p]):.3g}; in the "
        f"biased layers {over}, p = {float(zone[p]):.3g} ({how}). {wrong} of {found.attrs['items']} answers are wrong."
    )


def _where(one: xr.Dataset) -> str:
    name = str(one.measure.item())
    return "the biased layers" if name == "zone" else f"layer {name}"


def bias_said(parts: Made) -> str:
    """The finding of `bias`."""
    return f"With the bias: {against_threshold(compared(parts, parts['bias'], 'VIAR'))}."


def adaptive_said(parts: Made) -> str:
    """The finding of `adaptive`."""
    each = parts["adaptive"]
    found = {one: compared(parts, each.sel(edit=one), f"adaptive, {one}") for one in map(str, each.edit.values)}
    return " ".join(f"Adaptive by the {one}’s formula: {against_threshold(two)}." for one, two in found.items())


def head_bias_said(parts: Made) -> str:
    """The finding of `head_bias`."""
    heads = str(parts["head_bias"].attrs["heads"])
    if heads.startswith("none"):
        return f"No head was biased: {heads.removeprefix('none: ')}."
    count = len(heads.split(", "))
    said = against_threshold(compared(parts, parts["head_bias"], "heads of neglect"))
    return f"With the bias in {count} heads of neglect: {said}."


def when_said(parts: Made) -> str:
    """The finding of `when`."""
    found = parts["when"]
    plain, said = found.sel(edit="none"), []
    for name in (str(one) for one in found.edit.values if one != "none"):
        other = found.sel(edit=name)
        changed = xr.DataArray((other.answer.values != plain.answer.values).astype(float), dims="item")
        share = mean_interval(changed, "item", plain.image.values.tolist())
        turned = int((other.predicted.values != plain.predicted.values).sum())
        said.append(f"{name} {with_interval(share['mean'], share['low'], share['high'], digits=3)} ({turned} turn)")
    return f"Share of {found.sizes['item']} answers in words that the bias changes, by when it acts: {', '.join(said)}."


def doses_said(parts: Made) -> str:
    """The finding of `doses`."""
    found = parts["doses"]
    biased = found.isel(amount=np.flatnonzero(found.amount.values != 0))
    best = biased.isel(amount=int(np.argmax(biased.beyond.values)))
    worst = biased.isel(amount=int(np.argmin(biased.accuracy.values)))
    low = float(best.beyond_low)
    verdict = "above what a moved threshold gives" if low > 0 else "which is not told from a moved threshold"
    mass = ""
    if "mass" in found:
        ends = [
            found.isel(amount=at) for at in (int(np.argmin(found.amount.values)), int(np.argmax(found.amount.values)))
        ]
        mass = f"attention to the image from {float(ends[0].mass):.3f} to {float(ends[1].mass):.3f}, "
    beyond = with_interval(best.beyond, low, best.beyond_high, sign="+")
    lowest = with_interval(worst.accuracy, worst.accuracy_low, worst.accuracy_high)
    return (
        f"Of {biased.sizes['amount']} amounts up to {float(found.amount.max()):g}, {mass}the best against the "
        f"threshold is {float(best.amount):g}: {beyond}, {verdict}; the lowest accuracy is {lowest} at "
        f"{float(worst.amount):g} ({found.sizes['item']} questions)."
    )


def layers_said(parts: Made) -> str:
    """The finding of `layers`."""
    found, said = parts["layers"], []
    for name in map(str, found["set"].values):
        one = found.sel(set=name)
        gain = with_interval(one.gain, one.gain_low, one.gain_high, sign="+")
        p = float(one.p_value)
        how = "no random set to compare with" if np.isnan(p) else f"p = {p:.2g} of {int(one.n_controls)} random sets"
        said.append(f"{name} ({one.layers.item()}) {gain}, {how}")
    zone = found.sel(set="zone")
    better = float(zone.p_value) <= LEVEL
    told = "more than random layers do" if better else "no more than random layers do"
    return f"In accuracy the biased layers change {told}: {'; '.join(said)} ({found.attrs['items']} questions)."


def contrast_said(parts: Made) -> str:
    """The finding of `contrast`."""
    each = parts["contrast"]
    return " ".join(
        f"{one}: {against_threshold(compared(parts, each.sel(edit=one), one))}." for one in map(str, each.edit.values)
    )


def statistics_said(parts: Made) -> str:
    """The finding of `statistics`."""
    found = parts["statistics"].sel(edit="VIAR")
    one, right = found.sel(metric="accuracy"), found.sel(share="accuracy")
    low, high = round(float(one.advantage_low), 9), round(float(one.advantage_high), 9)
    answer = "Yes" if low > 0 else "No, it does worse" if high < 0 else "No"
    test = "no answer is right in one only"
    if np.isfinite(float(found.mcnemar)):
        test = f"right in one only {int(found.only_base)} and {int(found.only_edited)}, McNemar p = "
        test += f"{float(found.mcnemar_p_exact):.3g}"
    needed = float(right.required_n)
    power = f"{needed:,.0f} questions a group" if np.isfinite(needed) else "no number of questions, as nothing differs"
    beyond = with_interval(one.advantage, low, high, sign="+")
    return (
        f"Does the bias beat a threshold of the same share of yes? {answer}: by {beyond} "
        f"({int(found.n_items)} questions, {found.attrs['images']} pictures; {test}; Cohen’s h "
        f"{float(right.cohens_h):+.4f}, for which a power of 0.8 takes {power}). The best threshold on these questions "
        f"gives {float(found.sweep_best_accuracy):.4f}."
    )


SAID: dict[str, Callable[[Made], str]] = {
    **{"base": base_said, "samples": samples_said, "bias": bias_said, "adaptive": adaptive_said},
    **{"head_bias": head_bias_said, "when": when_said, "doses": doses_said, "layers": layers_said},
    **{"contrast": contrast_said, "statistics": statistics_said},
}
"""What says the finding of each of these parts."""
