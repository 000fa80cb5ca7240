"""What becomes of the published findings about attention: a U, a zone, a drop, heads, and whose curve it is.

Rule this module guards: published and corrected numbers are in one unit, attention mass, and differ in which positions
are called the image and which text, and in nothing else.

>>> shape = np.array([[3.0, 1.0, 1.0, 2.0]])
>>> gap(shape, 1, 3).tolist(), shares(shape[..., None])
([1.0], array([[1.]]))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.bends import u_shape
from mechvlm.experiments.neglect import neglect_heads
from mechvlm.experiments.zones import find_zone
from mechvlm.methods.findings import Draws, Estimate, Finding, above, claimed, finding

PUBLISHED_BAND = (0.25, 0.53)  # layers 8 to 16 of 32, as shares of the depth


@dataclass(frozen=True)
class Profiles:
    """The attention profiles of one set of prompts, and the draws that everything is compared in.

    Attributes:
        corrected, published: what `layer_profile` returns without and with the convention.
        groups: what each prompt belongs to.
        draws: of the same.
        given: layers to be called the zone, or None to look for it.
        seed: of tests.
    """

    corrected: xr.Dataset
    published: xr.Dataset
    groups: Sequence[Any]
    draws: Draws
    given: Sequence[int] | None = None
    seed: int = 0

    @cached_property
    def layers(self) -> np.ndarray:
        """The layers whose words attend to each other."""
        return self.mass(self.corrected).layer.values

    @cached_property
    def curves(self) -> tuple[Float[np.ndarray, "draw layer"], Float[np.ndarray, "draw layer"]]:
        """Mass on the image by layer in each draw, published and corrected."""
        return self.drawn(self.mass(self.published)), self.drawn(self.mass(self.corrected))

    @cached_property
    def zones(self) -> tuple[xr.Dataset, xr.Dataset]:
        """The zone that is searched for in the published curve, or given, and in the corrected one."""
        rule = "shoulders" if self.given is None else list(self.given)
        return tuple(self.zone(one, rule) for one in (self.published, self.corrected))  # type: ignore[return-value]

    @cached_property
    def band(self) -> tuple[list[int], str]:
        """The layers that are called the zone, and how they were chosen."""
        if self.given is not None:
            return list(self.given), "as given"
        for zone, name in zip(self.zones, ("published", "corrected"), strict=True):
            if bool(zone.found):
                return list(range(int(zone.start), int(zone.stop))), f"found in the {name} curve"
        first, last = (round(share * len(self.layers)) for share in PUBLISHED_BAND)
        chosen = self.layers[max(1, first) : max(max(1, first) + 2, last)].tolist()
        return chosen[: len(self.layers) - 2], "no zone was found; the published share of the depth"

    def mass(self, profile: xr.Dataset) -> xr.DataArray:
        """Mass on what is called the image, over prompt and layer."""
        values = profile.vis_l.sel(quantity="mass", drop=True).dropna("layer", how="all")
        return values.assign_attrs(long_name="attention mass on the image", units="fraction")

    def drawn(self, values: xr.DataArray) -> Float[np.ndarray, "draw ..."]:
        """Means over prompts in each draw."""
        return self.draws.means(values.transpose("prompt", ...).values)

    def zone(self, profile: xr.Dataset, rule: Any) -> xr.Dataset:
        """What `find_zone` says of a profile."""
        return self.tested(self.mass(profile), rule)

    def tested(self, values: xr.DataArray, rule: Any = "shoulders") -> xr.Dataset:
        """What `find_zone` says of values over prompt and layer."""
        how: dict[str, Any] = {"level": self.draws.level, "resamples": len(self.draws.weights) - 1, "seed": self.seed}
        return find_zone(values, self.groups, rule, **how)

    def bent(self, values: xr.DataArray) -> xr.Dataset:
        """What `u_shape` says of them."""
        return u_shape(values, self.groups, self.draws.level, len(self.draws.weights) - 1, self.seed)

    def three(self, published: np.ndarray, corrected: np.ndarray) -> tuple[Estimate, Estimate, Estimate]:
        """A number of each draw in both ways, and their difference, as estimates."""
        one, other, apart = (self.draws.estimate(drawn) for drawn in (published, corrected, published - corrected))
        return one, other, apart


def u_shape_finding(about: Profiles) -> tuple[Finding, xr.Dataset]:
    """Is attention to the image a U over layers?"""
    bent = [about.bent(about.mass(one)) for one in (about.published, about.corrected)]
    x = np.linspace(-1, 1, len(about.layers))
    three = about.three(*(curves @ np.linalg.pinv(np.vander(x, 3))[0] for curves in about.curves))
    names = [str(one["shape"].values) for one in bent]
    is_u = [name == "a U" for name in names]
    ways = [number.by("rises by", "falls by") for number in three]
    said = f"From the middle layers to the ends the published curve {ways[0]}, which makes {names[0]}, and attention "
    said += f"to the image's own tokens {ways[1]}, which makes {names[1]}"
    claim = "attention to the image is a U over the layers"
    found = finding("u_shape", claim, "fraction", three, is_u[0], is_u[1], said, names[1] == "no U")
    return found, xr.concat(bent, xr.Variable("how", ["published", "corrected"]))


def zone_finding(about: Profiles) -> Finding:
    """Is there a band of layers that pays the image less than its neighbours?"""
    (published, corrected), (band, how) = about.zones, about.band
    first = int(np.flatnonzero(about.layers == band[0])[0])
    three = about.three(*(gap(curves, first, first + len(band)) for curves in about.curves))
    still = about.zone(about.corrected, band)
    shown = bool(published.found)
    here = f"{spelled(band)} ({how})"
    said = f"In {here} the published curve is {turned(three[0])} the lower neighbour ({chance(published)}), and "
    said += f"attention to the image's own tokens {turned(three[1])} ({chance(still if shown else corrected)})"
    if about.given is None and bool(corrected.found):
        said += f", whose own zone is {spelled(range(int(corrected.start), int(corrected.stop)))}"
    elif about.given is None:
        said += ", in which no zone is found"
    holds = bool(still.found) if shown else bool(corrected.found)
    return finding("zone", "a band of layers neglects the image", "fraction", three, shown, holds, said)


def drop_finding(about: Profiles) -> Finding:
    """Does the last layer look away?"""
    three = about.three(*(curves[:, -2] - curves[:, -1] for curves in about.curves))
    ways = [number.by("falls by", "rises by") for number in three]
    said = f"At the last layer the published curve {ways[0]}, and attention to the image's own tokens {ways[1]}"
    claim = "the last layer pays the image less than the layer before it"
    return finding("last_drop", claim, "fraction", three, above(three[0]), above(three[1]), said)


def head_findings(about: Profiles) -> tuple[list[Finding], xr.Dataset]:
    """Which heads of the published sets are such heads, and how heads of the zone differ."""
    band = about.band[0]
    how: dict[str, Any] = {"layers": band, "resamples": len(about.draws.weights) - 1, "seed": about.seed}
    both = [neglect_heads(one, **how) for one in (about.published, about.corrected)]
    drawn = [
        about.drawn(one.mass.sel(span="image", drop=True).dropna("layer", how="all"))
        for one in (about.published, about.corrected)
    ]
    sides, found = far(drawn[1]), []
    for name, side, words in (("neglect", -1, "neglecting"), ("specialist", 1, "specialist")):
        marked, corrected = (one[name].values for one in both)
        with np.errstate(invalid="ignore", divide="ignore"):
            left = (sides[:, marked] == side).sum(-1) / np.float64(marked.sum())
        kept = int((marked & corrected).sum())
        said = f"Of the {int(marked.sum())} published {words} heads {kept} are such heads at correct positions, as a "
        said += f"share {about.draws.estimate(left)}; of all heads {corrected.mean():.3f} are"
        claim = f"the published {words} heads are those that look at the image {'less' if side < 0 else 'more'}"
        there = bool(marked.any())
        found.append(claimed(f"{name}_heads", claim, "share that remains", about.draws, left, said, there))
    at = np.searchsorted(about.layers, band)
    wrong, spread = drawn[0][:, at].mean(1).std(-1), np.sqrt(drawn[1][:, at].var(-1).mean(-1))
    three, part = about.three(wrong, spread), about.draws.estimate(wrong / np.where(spread > 0, spread, np.nan))
    said = f"The published spread of the heads of {spelled(band)}, {three[0]}, is taken after layers are averaged by "
    said += f"the number of the head; heads of one layer differ by {three[1]}"
    claim, unit = "heads of the zone hardly differ", "standard deviation, fraction"
    still, against = above(part, 0.5), bool(part.high < 0.5)
    found.append(finding("head_spread", claim, unit, three, bool(three[0].value > 0), still, said, against))
    return found, xr.concat(both, xr.Variable("how", ["published", "corrected"]), combine_attrs="drop_conflicts")


def sink_finding(about: Profiles) -> Finding:
    """Is what was published as attention to the image paid to the image?"""
    really = about.published.really.mean("head").dropna("layer", how="all")
    parts = about.drawn(really)
    names, share = really.own.values.tolist(), shares(parts)
    first = about.drawn(about.corrected["first"].mean("head").dropna("layer", how="all"))
    like = [about.draws.estimate(correlation(about.curves[0], other)) for other in (about.curves[1], first)]
    paid = parts[0].mean(0) / parts[0].mean(0).sum()
    of = {name: (paid[at], share[0, at]) for at, name in enumerate(names)}
    other = [name for name in ("bos", "prefix", "separators") if name in of and of[name][0] > 0]
    said = "Of the published attention to the image "
    said += (
        ", ".join(f"{of[name][0]:.3f} is paid to {name}" for name in other) or "nothing is paid to what is before it"
    )
    said += f"; of how the curve changes over layers, {about.draws.estimate(share[:, names.index('image')])} is the "
    said += "image's" + "".join(f", {of[name][1]:.3f} of {name}" for name in other)
    said += f"; it goes with attention to the image by r = {like[0]}, with that to position 0 by r = {like[1]}"
    claim, unit = "the published curve is that of attention to the image", "share of its variance over layers"
    return claimed("published_curve", claim, unit, about.draws, share[:, names.index("image")], said)


def by_quantity(about: Profiles) -> xr.Dataset:
    """A U and a zone in each of the four quantities that are published under one name, in both conventions.

    Returns:
        Over how and quantity: `least` and `most` of the mean curve; `shape`, `curvature` and `over_line` of `u_shape`
        (the last two also over end); and `p_value`, `start` and `stop` of `find_zone`.
    """
    rows = []
    for profile in (about.published, about.corrected):
        for quantity in profile.quantity.values:
            values = profile.vis_l.sel(quantity=quantity, drop=True).dropna("layer", how="all")
            bent, zone = about.bent(values), about.tested(values)
            ends = {"least": zone["mean"].min(), "most": zone["mean"].max()}
            said, tested = bent[["shape", "curvature", "over_line"]], zone[["p_value", "start", "stop"]]
            rows.append(xr.Dataset({**said, **tested, **ends}))
    names = about.corrected.quantity.values
    both = [xr.concat(rows[at : at + len(names)], xr.Variable("quantity", names)) for at in (0, len(names))]
    return xr.concat(both, xr.Variable("how", ["published", "corrected"])).drop_attrs()


def mistral_finding(about: Profiles, mistral: xr.Dataset) -> Finding:
    """Is the curve of one key the image's?"""
    curves, parts = (
        about.drawn(about.mass(mistral)),
        about.drawn(mistral.really.mean("head").dropna("layer", how="all")),
    )
    first = about.drawn(about.corrected["first"].mean("head").dropna("layer", how="all"))
    image = parts.mean(1)[:, mistral.own.values.tolist().index("image")] / parts.mean(1).sum(-1)
    like = [about.draws.estimate(correlation(curves, other)) for other in (about.curves[1], first)]
    said = (
        f"With one image token counted, what is called the image is position 0, which is paid {curves[0].mean():.3f}, "
    )
    said += (
        f"and {about.draws.estimate(image)} of that is paid to the image; over layers it goes with attention to the "
    )
    said += f"image by r = {like[0]}, with what text pays to position 0 by r = {like[1]}"
    claim, unit = "with n_vis = 1, as for Mistral, the curve is that of attention to the image", "share of mass"
    return claimed("mistral", claim, unit, about.draws, image, said)


def gap(curves: Float[np.ndarray, "draw layer"], first: int, behind: int) -> Float[np.ndarray, " draw"]:
    """How far the mean of some layers is below the lower of the two layers next to them."""
    beside = [at for at in (first - 1, behind) if 0 <= at < curves.shape[-1]]
    return curves[:, beside].min(-1) - curves[:, first:behind].mean(-1)


def far(matrices: Float[np.ndarray, "draw layer head"]) -> Float[np.ndarray, "draw layer head"]:
    """-1 where a head is more than a standard deviation below the mean of all heads, 1 where it is above, else 0."""
    mu, sigma = (of(matrices, axis=(1, 2), keepdims=True) for of in (np.mean, np.std))
    return np.sign(matrices - mu) * (np.abs(matrices - mu) > sigma)


def shares(parts: Float[np.ndarray, "draw layer part"]) -> Float[np.ndarray, "draw part"]:
    """Which share of the variance over layers of a sum of parts is each part's: its covariance with the sum.

    Example:
        >>> shares(np.array([[[1.0, 0.0], [2.0, 0.0]]])).tolist()
        [[1.0, 0.0]]
    """
    off = parts - parts.mean(1, keepdims=True)
    total = off.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (off * total).sum(1) / (total**2).sum(1)


def correlation(
    some: Float[np.ndarray, "draw layer"], others: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " draw"]:
    """Pearson's r over layers, in each draw."""
    a, b = (one - one.mean(-1, keepdims=True) for one in (some, others))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def spelled(band: Sequence[int]) -> str:
    """Layers in words.

    Example:
        >>> spelled(range(3, 6)), spelled([2])
        ('layers 3 to 5', 'layer 2')
    """
    return f"layers {band[0]} to {band[-1]}" if len(band) > 1 else f"layer {band[0]}"


def turned(one: Estimate) -> str:
    """How far below, or above.

    Example:
        >>> turned(Estimate(-0.5, -0.75, -0.25))
        '0.500 [0.250, 0.750] above'
    """
    side = "above" if one.value < 0 else "below"
    return f"{one.by('', '').strip()} {side}"


def chance(zone: xr.Dataset) -> str:
    """The p-value of a zone in words."""
    return f"p = {float(zone.p_value):.3g}"
