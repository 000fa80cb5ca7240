"""What becomes of the published findings about residual updates and gradients: the collapse, and its end; the fall.

Rule this module guards: an update is what a layer adds, before any norm; and a gradient that falls is compared with how
gradients fall.

>>> inner(8, [2, 3])
[1, 4, 5, 6]
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from mechvlm.methods.audit_attention import spelled
from mechvlm.methods.findings import Draws, Estimate, Finding, above, finding


def collapse_findings(corrected: xr.Dataset, published: xr.Dataset, draws: Draws, band: Sequence[int]) -> list[Finding]:
    """Do layers of the zone work as if the picture were not there, and does the last layer?

    A cosine says something of a picture that is ignored only where a black one is more alike than another real one is.

    Args:
        corrected, published: what `language_prior_collapse` returns without and with the convention.
        band: the layers of the zone.
    """
    where = {"null": "black", "span": "text"}
    both = [draws.means(one.update_cosine.sel(where).values) for one in (published, corrected)]
    others = inner(both[0].shape[1], band)
    nothing = np.full(len(draws.weights), np.nan)
    higher = [one[:, list(band)].mean(1) - one[:, others].mean(1) if others else nothing for one in both]
    three = _three(draws, higher)
    ways = [one.by("more alike by", "less alike by") for one in three]
    said = f"In {spelled(band)} updates with the picture and without are {ways[0]} than in the other inner layers as "
    said += f"published, and {ways[1]} at the words behind the image"
    beyond = Estimate(float("nan"))
    if "above_swap" in corrected:
        beyond = draws.estimate(draws.means(corrected.above_swap.sel(where).values)[:, list(band)].mean(1))
    said += f" ({swapped(beyond)})"
    claim, still = "in the zone layers work alike with the picture and without", above(three[1]) and above(beyond)
    zone = finding("collapse_zone", claim, "cosine", three, above(three[0]), still, said, bool(beyond.high <= 0))
    last = _three(draws, [one[:, -1] - one[:, -2] for one in both])
    normed = draws.means(corrected.update_cosine_normed.sel(where).values) - both[1][:, -2]
    ways = [one.by("rises by", "falls by") for one in (*last[:2], draws.estimate(normed))]
    said = f"At the last layer the cosine {ways[0]} as published, where its output is taken after the final norm; that "
    said += f"of what the layer adds {ways[1]}, and with the norm put back it {ways[2]}"
    claim = "the last layer's updates are alike again"
    return [zone, finding("collapse_last", claim, "cosine", last, above(last[0]), above(last[1]), said)]


def gradient_findings(
    corrected: xr.Dataset, published: xr.Dataset | None, draws: Draws, trouble: str = ""
) -> list[Finding]:
    """Does the gradient at the image fall over the zone by more than gradients fall?

    Args:
        corrected, published: what `gradient_by_layer` returns without and with the convention.
        trouble: why there is no published one.
    """
    ends = str(corrected.attrs["between"])
    fall = np.full(len(draws.weights), np.nan)
    if published is not None:
        fall = draws.means(published.log_ratio.sel(picture="real", span="image").values)
    found = []
    for name, claim, of, against, words in (
        (
            *("gradient_zone", "the gradient at the image falls in the zone more than elsewhere", "excess"),
            *("real", "its own mean decay gives"),
        ),
        (
            *("gradient_picture", "what was seen is lost over the zone", "excess_measured"),
            *("black", "at the same tokens of a black picture"),
        ),
    ):
        left = draws.means(corrected[of].sel(picture=against, span="image").values)
        three = _three(draws, [fall, left])
        said = f"From layer {ends.replace(', ', ' to layer ')} the published gradient falls by a factor of "
        said += f"{factor(three[0])}; at the image's own tokens it falls {factor(three[1])} times as much as {words}"
        said = said if published is not None else f"{said} (as published: {trouble.rstrip('.')})"
        found.append(finding(name, claim, "log ratio, nats", three, above(three[0]), above(three[1]), said))
    return found


def swapped(beyond: Estimate) -> str:
    """What another real picture makes of a black one's cosine.

    Args:
        beyond: how much more alike updates are with a black picture than with another real one.

    Example:
        >>> swapped(Estimate(float("nan")))
        'there is no other real picture to compare a black one with'
    """
    if not np.isfinite(beyond.value):
        return "there is no other real picture to compare a black one with"
    way = beyond.by("more alike than another real one by", "less alike than another real one by")
    more = "" if above(beyond) else ", so that its cosine says nothing of a picture that is ignored"
    return f"there a black picture is {way}{more}"


def inner(count: int, band: Sequence[int]) -> list[int]:
    """The layers that are not of the zone, without the first, which has no published update, and the last."""
    return [layer for layer in range(1, count - 1) if layer not in set(band)]


def factor(one: Estimate) -> str:
    """A log ratio as the factor that it is.

    Example:
        >>> factor(Estimate(0.0, -0.1, 0.1))
        '1.00 [0.90, 1.11]'
    """
    if not np.isfinite(one.value):
        return "(no number)"
    ends = f" [{np.exp(one.low):.2f}, {np.exp(one.high):.2f}]" if np.isfinite(one.low) else ""
    return f"{np.exp(one.value):.2f}{ends}"


def _three(draws: Draws, both: Sequence[np.ndarray]) -> tuple[Estimate, Estimate, Estimate]:
    """Published, corrected and the difference."""
    one, other, apart = (draws.estimate(drawn) for drawn in (*both, both[0] - both[1]))
    return one, other, apart
