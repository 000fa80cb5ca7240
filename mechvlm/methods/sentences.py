"""What came out of each part of a study, in a sentence that is made of its numbers.

Rule this module guards: no sentence is fixed. What it says depends on where an interval or a p-value lies, and it holds
them; what could not be told from nothing is said to be so.

>>> finding("base", {"base": base}).split(" of ")[0]
'Right in 0.7625 [0.7167, 0.8125]'
"""

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.methods import outcomes
from mechvlm.methods.bias import named_layers
from mechvlm.methods.wording import upper, with_interval

Made = Mapping[str, xr.Dataset]


def finding(name: str, parts: Made) -> str:
    """What came out of a part.

    Args:
        name: the part's.
        parts: it, and the parts that it is made of.

    Example:
        >>> finding("base", {"base": base}).split(" of ")[0]
        'Right in 0.7625 [0.7167, 0.8125]'
    """
    return FINDINGS[name](parts)


def _profile(parts: Made) -> str:
    found = parts["profile"]
    three = [found[end].sel(quantity="mass") for end in ("mean", "low", "high")]
    held = np.flatnonzero(np.isfinite(three[0].values))
    ends = [held[int(at(three[0].values[held]))] for at in (np.argmin, np.argmax)]
    least, most = (
        f"layer {int(found.layer[at])} ({with_interval(*(one.values[at] for one in three), digits=3)})" for at in ends
    )
    first = mean_interval(found["first"].mean(["layer", "head"]), "prompt", found.cluster.values.tolist())
    said = with_interval(first["mean"], first["low"], first["high"], digits=3)
    return (
        f"Of what text rows pay, the image gets least in {least} and most in {most}, and position 0 {said} on average "
        f"over layers; {found.sizes['prompt']} pictures."
    )


def _zone(parts: Made) -> str:
    found = parts["zone"]
    chosen = [float(found[f"chosen_{end}"]) for end in ("start", "stop")]
    which = "no layers" if not np.isfinite(chosen).all() else _run(range(int(chosen[0]), int(chosen[1])))
    p = f"p = {float(found.p_value):.3g}, {found.attrs['clusters']} pictures"
    said = f"No zone of neglect is found: the rule chooses {which} ({p})"
    if bool(found.found):
        said = f"{which} pay the image less than the layers beside them: their mean "
        said += f"is {float(found.gap):.3f} below the lower neighbour ({p}; {found.attrs['test']})"
    over, bent = ([float(found[f"u_{name}"].sel(end=end)) for end in ("mean", "low", "high")] for name in _BENT)
    better = "better" if over[1] > 0 else "worse" if over[2] < 0 else "not surely better"
    said += f". The curve is {found['u_shape'].item()}: its curvature is {with_interval(*bent, sign='+', digits=3)}, "
    said += f"and a parabola foretells a layer left out {better} than a straight line "
    said += f"({with_interval(*over, sign='+', digits=2)} of its error)"
    if over[1] > 0 and bent[1] > 0 and found["u_shape"] != "a U":
        said += ", but is lowest at an end"
    return f"{upper(said)}. Biased: {named_layers(_layers(found))}, {found.attrs['layers_from']}."


_BENT = ("over_line", "curvature")


def _heads(parts: Made) -> str:
    found = parts["heads"]
    counts = [int(found[name].sum()) for name in ("neglect", "specialist")]
    again = [float(found.often.where(found[name]).mean()) for name in ("neglect", "specialist")]
    sure = ", ".join(
        f"{count} look {far} (again in {share:.0%} of resamples)" if count else f"none looks {far}"
        for count, share, far in zip(counts, again, ("far less", "far more"), strict=True)
    )
    return (
        f"Of {found.neglect.size} heads, {sure}; the mean is {float(found.mu):.3f}, a standard deviation "
        f"{float(found.sigma):.3f}. Heads of one layer spread by {float(found.spread):.3f}, which averaging by their "
        f"numbers makes {float(found.spread_of_numbers):.3f}."
    )


def _collapse(parts: Made) -> str:
    found = parts["collapse"]
    alike = found.update_cosine.sel(span="text").mean("layer")
    over = {str(null): mean_interval(alike.sel(null=null), "prompt") for null in found.null.values}
    spelled = {null: with_interval(one["mean"], one["low"], one["high"], digits=3) for null, one in over.items()}
    each = ", ".join(f"{cosine} with {_null(null)}" for null, cosine in spelled.items())
    said = f"Behind the picture, what layers add has a cosine with what they add for the real picture of {each}"
    if "above_swap" not in found:
        return f"{said}; {found.sizes['prompt']} pictures."
    black = mean_interval(found.above_swap.sel(span="text", null="black").mean("layer"), "prompt")
    low, high = float(black["low"]), float(black["high"])
    verdict = "cannot be told from another real picture"
    if low > 0:
        verdict = "is more like the real one than another real picture is"
    elif high < 0:
        verdict = "is less like the real one than another real picture is"
    beyond = with_interval(black["mean"], low, high, sign="+", digits=3)
    return f"{said}: a black picture {verdict} ({beyond}), {found.sizes['prompt']} pictures, mean over layers."


def _null(name: str) -> str:
    return {"swap": "another picture", "noise": "noise"}.get(name, f"a {name} picture")


def _gradients(parts: Made) -> str:
    found = parts["gradients"]
    first, second = str(found.attrs["between"]).split(", ")
    image = found.sel(span="image")
    own = [float(np.exp(image[f"log_ratio_{end}"].sel(picture="real"))) for end in ("mean", "low", "high")]
    said = f"From layer {first} to layer {second} the gradient at the image falls {with_interval(*own, digits=2)} times"
    baselines = [str(name) for name in found.picture.values if name != "real"]
    if not baselines:
        rest = [float(image[f"excess_{end}"].sel(picture="real")) for end in ("mean", "low", "high")]
        return f"{said}, {_beyond(rest)} its mean decay ({with_interval(*rest, sign='+', digits=3)} nats)."
    rest = [float(image[f"excess_measured_{end}"].sel(picture=baselines[0])) for end in ("mean", "low", "high")]
    nats = with_interval(*rest, sign="+", digits=3)
    return (
        f"{said}, {_beyond(rest)} its fall with a {baselines[0]} picture ({nats} nats, {found.sizes['prompt']} "
        "pictures)."
    )


def _beyond(three: list[float]) -> str:
    return "faster than" if three[1] > 0 else "more slowly than" if three[2] < 0 else "which is not told apart from"


def _layers(found: xr.Dataset) -> list[int]:
    return [int(layer) for layer in str(found.attrs["layers"]).split(", ")]


def _run(layers: range) -> str:
    return f"layers {layers.start} to {layers.stop - 1}" if len(layers) > 1 else f"layer {layers.start}"


FINDINGS: dict[str, Callable[[Made], str]] = {
    **{"profile": _profile, "zone": _zone, "heads": _heads, "collapse": _collapse, "gradients": _gradients},
    **outcomes.SAID,
}
"""What says the finding of each part."""
