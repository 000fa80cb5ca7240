"""What may be said of two evaluations: what differs between them, whose threshold can be moved, and the sentence.

Rule this module guards: a threshold of the margin is moved only where answers are the margin's sign, and what differs
between two evaluations beside their edits is named wherever they are compared.

>>> off_margin(base), unlike(base, edited)
(0, ['the edit'])
"""

import numpy as np
import xarray as xr

from mechvlm.evaluate.items import predictions

SETTINGS = {
    **{"model": "another model", "revision": "another revision", "dtype": "another dtype"},
    **{"attention": "another attention implementation", "preprocessing": "other preprocessing"},
    **{"pictures_sha256": "other pictures", "template": "another template", "parser": "another parser"},
    **{"scoring": "another scoring", "decoding": "another decoding"},
}
"""What a record says of an evaluation beside its edits, and how a sentence names what is not the same."""


OF_ANSWERS = "of the answers"
SENTENCES = ("verdict", "threshold", "differs", "calibration")
"""The attributes of a comparison that say what its numbers are of."""


def off_margin(one: xr.Dataset, cut: bool = False) -> int:
    """How many answers are not the sign of their margin: yes where it is above 0, else no.

    Args:
        one: an evaluation.
        cut: answers that are the likelier of yes and no by `p_yes` count as well, whatever their margin: those of a
            contrast, which are after its cut.

    Example:
        >>> off_margin(base.assign(predicted=("item", ["other"] * 240)))
        240
    """
    said = predictions(one.predicted.values)
    same = said == np.where(one.margin.values > 0, "yes", "no")
    if cut:
        same |= said == np.where(one.p_yes.values > 0.5, "yes", "no")
    return int((~same).sum())


def no_threshold(base: xr.Dataset, edited: xr.Dataset) -> str:
    """Why the base's threshold cannot be moved to answer as the edited model does; nothing where it can.

    The base's answers must be the sign of its margin, since that is what is moved. Those of the edited model must be
    of its first token, like the base's: the sign of its margin, or, after the cut of a contrast, of `p_yes`.

    Example:
        >>> no_threshold(base, edited)
        ''
    """
    count = base.sizes["item"]
    for name, one, cut in (("base", base, False), ("edited", edited, True)):
        off = off_margin(one, cut)
        if off:
            return (
                f"{off} of {count} answers ({name}) are not the sign of the first token's margin (they were parsed "
                "from words, or are of a contrast), and only margins have a threshold"
            )
    return ""


def calibrated(**named: xr.Dataset) -> str:
    """What calibration and the Brier score are of: the answers, or the first token where answers are other ones.

    Args:
        named: evaluations by the names that are said.

    Example:
        >>> calibrated(base=base, edited=edited)
        'of the answers'
    """
    off = {name: _unsure(one) for name, one in named.items()}
    if not any(off.values()):
        return OF_ANSWERS
    said = " and ".join(f"{off[name]} of {one.sizes['item']} items of {name}" for name, one in named.items())
    return f"of the first token's yes or no, which is not the answer that counts in {said}"


def _unsure(one: xr.Dataset) -> int:
    """How many answers are not the likelier of yes and no by `p_yes`."""
    return int((predictions(one.predicted.values) != np.where(one.p_yes.values > 0.5, "yes", "no")).sum())


def unlike(base: xr.Dataset, edited: xr.Dataset) -> list[str]:
    """What is not the same in two evaluations, as a sentence names it; the edit alone where nothing is known.

    Example:
        >>> unlike(base.assign_attrs(template="viar"), base.assign_attrs(template="plain"))
        ['another template']
    """
    ours, theirs = base.attrs, edited.attrs
    both = [name for name in SETTINGS if name in ours and name in theirs]
    found = list(dict.fromkeys(SETTINGS[name] for name in both if str(ours[name]) != str(theirs[name])))
    if not found or str(ours.get("edits")) != str(theirs.get("edits")):
        found.append("the edit")
    return found


def without_threshold(found: xr.Dataset) -> xr.Dataset:
    """A comparison in which nothing is said of a moved threshold: not numbers where it was."""
    gone = [str(name) for name in found.data_vars if str(name).startswith(("advantage", "sweep_"))]
    empty = {name: xr.full_like(found[name], np.nan, dtype=float) for name in (*gone, "matched_shift")}
    rest = {name: found[name].where(found.model != "threshold") for name in ("value", "low", "high")}
    return found.assign({**empty, **rest})


def verdict(found: xr.Dataset, differs: list[str], images: int, unclaimed: str) -> str:
    """Whether the second is told from moving the first one's threshold, in a sentence with its numbers.

    Args:
        differs: as `unlike` says it.
        images: how many pictures there are; one tells nothing of others.
        unclaimed: as `no_threshold` says it.
    """
    one = found.sel(metric="accuracy")
    whose = "accuracy with " + (f"{', '.join(differs[:-1])} and {differs[-1]}" if differs[1:] else differs[0])
    if not float(found.only_base) + float(found.only_edited):
        return f"{whose} is that of base: no answer turns right or wrong, so there is nothing to tell apart"
    name = "difference" if unclaimed else "advantage"
    # Rounded, so that an edit which only moves the threshold is not better by what rounding adds.
    gain, low, high = (round(float(one[each]), 9) + 0.0 for each in (name, f"{name}_low", f"{name}_high"))
    other = "that of base" if unclaimed else "that of the same yes-ratio by moving the threshold"
    if images < 2:
        return f"{whose} cannot be told from {other}: it differs by {gain:+.4f}, on one picture, which has no interval"
    said = "is better than" if low > 0 else "is worse than" if high < 0 else "cannot be told from"
    numbers = f"it differs by {gain:+.4f} [{low:+.4f}, {high:+.4f}]"
    if unclaimed:
        return f"{whose} {said} {other}: {numbers}; whether a threshold does the same cannot be said: {unclaimed}"
    return f"{whose} {said} {other}: {numbers}"
