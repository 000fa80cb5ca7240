"""Figures of attention by layer: a zone in its curve, heads of neglect, and what a convention makes of the same model.

>>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:6]]
>>> figure = layer_spans(mv.layer_profile(vlm, asked))
>>> [trace.name for trace in figure.data if trace.mode == "lines+markers"]
['image', 'position 0']
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.plot.charts import heatmap, lines
from mechvlm.plot.look import FAINT, INK

ENDS = ("mean", "low", "high")
UNITS = {
    "mass": ("attention mass on the image", "fraction"),
    "all_rows": ("attention mass on the image, all rows", "fraction"),
    "density": ("attention density on the image", "fraction per key"),
    "density_share": ("image's share of attention density", "0.5: as much per key as elsewhere"),
}
"""Long name and unit of each quantity that is published as `vis_l`."""


def zone_curve(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The mean curve over layers with its interval, and the zone, grey where the test found it, else only outlined.

    Args:
        found: what `find_zone` returns.
        caption: by default says what was chosen, with which p-value and gap, and how often it is chosen again.

    Raises:
        TypeError: for anything else.

    Example:
        >>> curve = np.array([3.0, 3.0, 1.0, 1.0, 3.0]) + np.random.default_rng(0).normal(size=(40, 5)) / 5
        >>> mv.plot.zone_curve(mv.find_zone(xr.DataArray(curve, dims=["prompt", "layer"])))
    """
    _check(found, "zone_curve", "find_zone", "values", {"in_zone", "p_value", "mean", "low", "high", "gap", "same"})
    start, stop = float(found.chosen_start), float(found.chosen_stop)
    chosen, held = bool(np.isfinite(start)), bool(found.found)
    which = f"layers {start:.0f} to {stop - 1:.0f}" if chosen else "no layers"
    verdict = (
        f"A zone: {which}" if held else f"No zone: the rule chooses {which}" + (", which do not hold" if chosen else "")
    )
    said = f"{verdict}; p = {float(found.p_value):.3g} ({found.attrs['test']})"
    if chosen:
        gap, same = float(found.gap), float(found.same)
        said += f"; {gap:.3g} below the lower shoulder; the same layers in {same:.0%} of resamples"
    band = (found["low"], found["high"])
    over = (
        f". Line and band: mean and {100 * found.attrs['level']:.0f}% interval over {found.attrs['clusters']} pictures."
    )
    long, units = UNITS.get(found.attrs.get("quantity", ""), (found["mean"].attrs["long_name"], None))
    mean = found["mean"].assign_attrs(long_name=long, **({"units": units} if units else {}))
    figure = lines(mean, "layer", band=band, title=title, caption=caption or said + over)
    if float(found["low"].min()) >= 0:
        figure.update_yaxes(rangemode="tozero")
    if chosen:
        fill = (
            {"fillcolor": FAINT, "line": {"width": 0}} if held else {"line": {"width": 1, "dash": "dot", "color": INK}}
        )
        figure.add_vrect(x0=start - 0.5, x1=stop - 0.5, layer="below", **fill)
    return figure


def head_matrix(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """Each head's mean attention to the picture, with marks on heads of neglect (down) and specialists (up).

    Args:
        found: what `neglect_heads` returns.
        caption: by default counts both and says how heads spread.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.head_matrix(mv.neglect_heads(mv.layer_profile(vlm, [real, null])))
    """
    _check(found, "head_matrix", "neglect_heads", "profile", {"neglect", "specialist", "mean", "spread"})
    sigmas = found.attrs["sigmas"]
    down, up = int(found.neglect.sum()), int(found.specialist.sum())
    spread, wrong, mu, sigma = (float(found[name]) for name in ("spread", "spread_of_numbers", "mu", "sigma"))
    said = (
        f"Down: {down} heads below mean - {sigmas:g} sd; up: {up} above mean + {sigmas:g} sd (mean {mu:.3f}, sd "
        f"{sigma:.3f} over all heads). Spread of the heads of one layer: {spread:.3f}; after averaging over layers by "
        f"the number of the head: {wrong:.3f}."
    )
    mean = found["mean"].transpose("layer", "head").assign_attrs(long_name="mean attention to the image")
    figure = heatmap(mean, title=title, caption=caption or said)
    for name, symbol in (("neglect", "triangle-down"), ("specialist", "triangle-up")):
        layers, heads = np.nonzero(found[name].transpose("layer", "head").values)
        mark = {"symbol": symbol, "size": 8, "color": "white", "line": {"width": 1, "color": INK}}
        figure.add_scatter(
            x=heads, y=layers, mode="markers", marker=mark, showlegend=False, hoverinfo="skip", name=name
        )
    # Marks are put outside the table's frame by themselves, unless its range is said.
    figure.update_xaxes(range=[-0.5, mean.sizes["head"] - 0.5])
    return figure.update_yaxes(autorange=None, range=[mean.sizes["layer"] - 0.5, -0.5])


def published_beside(
    corrected: xr.Dataset, published: xr.Dataset, quantity: str = "mass", title: str = "", caption: str = ""
) -> go.Figure:
    """One quantity by layer as it is, beside what a published convention gives for the same prompts.

    Args:
        corrected, published: what `layer_profile` returns, without and with a convention.
        quantity: one of those that are published as `vis_l`.
        caption: by default says which positions the convention calls the image.

    Raises:
        TypeError: for anything else.
        ValueError: for a quantity that is not there.

    Example:
        >>> mv.plot.published_beside(mv.layer_profile(vlm, real), mv.layer_profile(vlm, real, convention="viar-2026"))
    """
    both = (corrected, published)
    for one in both:
        _check(one, "published_beside", "layer_profile", "prompts", {"vis_l", "mean", "first"})
    if quantity not in UNITS:
        raise ValueError(f"quantity={quantity!r} is not known; choose from {', '.join(map(repr, UNITS))}.")
    named = [one.attrs["convention"].split(":")[0].replace("none", "corrected") for one in both]
    where, (long, units) = xr.Variable("positions", named), UNITS[quantity]
    mean, low, high = (xr.concat([one[end].sel(quantity=quantity, drop=True) for one in both], where) for end in ENDS)
    held = published.really.mean(["prompt", "layer", "head"])
    parts = ", ".join(
        f"{float(held.sel(own=own)):.3f} {own}" for own in held.own.values if float(held.sel(own=own)) > 0
    )
    said = f"What {named[1]} calls the image is paid, on average over layers: {parts}."
    mean = mean.assign_attrs(long_name=long, units=units)
    return lines(mean, "layer", "positions", band=_shown(low, high), title=title, caption=caption or said)


def layer_spans(profile: xr.Dataset, level: float = 0.95, title: str = "", caption: str = "") -> go.Figure:
    """What text rows pay to the image by layer, and what they pay to position 0 alone: is a dip that of a sink?

    Args:
        profile: what `layer_profile` returns.
        level: of the bands, drawn where prompts are about more than one picture.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.layer_spans(mv.layer_profile(vlm, [real, null]), title="Image and sink")
    """
    _check(profile, "layer_spans", "layer_profile", "prompts", {"vis_l", "mass", "first"})
    curves = [profile.mass.sel(span="image", drop=True), profile["first"]]
    named, about = _called(profile)
    together = xr.concat([one.mean("head") for one in curves], xr.Variable("span", [named, "position 0"]))
    over = mean_interval(together, "prompt", profile.cluster.values.tolist(), level)
    mean = over["mean"].assign_attrs(long_name="attention mass", units="fraction")
    said = f"Means over {profile.sizes['prompt']} prompts about {over.attrs['clusters']} pictures, heads and text rows."
    said += about
    return lines(mean, "layer", "span", band=_shown(over.low, over.high), title=title, caption=caption or said)


def _called(profile: xr.Dataset) -> tuple[str, str]:
    """What to call the line of the image, and what to say of a convention's."""
    name = str(profile.attrs["convention"]).split(":")[0]
    if name == "none":
        return "image", ""
    if not name.startswith("viar-2026") or name.endswith("qwen2-vl"):
        return "image", f" Rows as {name} takes them."
    counts = sorted({int(count) for count in profile.n_keys.sel(span="image").values})
    most = f"{counts[-1] - 1}" if len(counts) == 1 else "N - 1"
    columns = "column 0" if counts == [1] else f"columns 0 to {most}"
    return columns, f" {columns.capitalize()}: what {name} calls the image, position 0 among them."


def _shown(low: xr.DataArray, high: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray] | None:
    """A band, where there is one."""
    return (low, high) if bool(np.isfinite(low).any()) else None


def _check(found: object, drawer: str, maker: str, given: str, wanted: set[str]) -> None:
    """Raises: TypeError: for what is not the result that a figure draws."""
    if not isinstance(found, xr.Dataset) or not wanted <= set(found.data_vars):
        raise TypeError(
            f"{drawer} draws what {maker} returns, and was given a {type(found).__name__}; make it with "
            f"mv.{maker}({'vlm, ' if given == 'prompts' else ''}{given})."
        )
