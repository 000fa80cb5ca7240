"""Figures of ablations: what each part adds, with intervals, and sets of parts against random ones.

>>> figure = ablation_order(mv.ablate_in_order(vlm, real, yes, [(0, 7), (1, 3)], controls=3))
>>> [trace.name for trace in figure.data if trace.showlegend is None]
['random', 'ranked']
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.plot.charts import bars, heatmap, hover_texts, lines
from mechvlm.plot.look import GREY


def effects(found: xr.Dataset, facet: str | None = None, title: str = "", caption: str = "") -> go.Figure:
    """The mean effect of ablating each part, with its interval: on hover in a table, as error bars of single layers.

    Args:
        found: what `ablate_each` returns.
        facet: see `heatmap`.
        caption: by default says over what the mean and the interval are.

    Raises:
        TypeError: for anything else.
        ValueError: where there is nothing to draw.

    Example:
        >>> mv.plot.effects(mv.ablate_each(vlm, [real, null], yes, layers=[0, 1, 2]), title="Heads")
    """
    _check(found, "effects", "ablate_each", {"effect", "mean", "low", "high"})
    mean, low, high = found["mean"], found["low"], found["high"]
    prompts, known = found.sizes["prompt"], bool(np.isfinite(low).any())
    over = f"mean over {prompts} prompts; " if prompts > 1 else ""
    said = caption or (over + f"{found.attrs['interval']}" if known else over.removesuffix("; "))
    if mean.ndim == 1:
        return bars(mean, str(mean.dims[0]), band=(low, high) if known else None, title=title, caption=said)
    figure = heatmap(mean, facet=facet, title=title, caption=said)
    if known:
        down, right = [dim for dim in mean.dims if dim != facet][:2]
        for number, trace in enumerate(figure.data):
            place = {facet: number} if facet else {}
            parts = [one.isel(place).transpose(down, right) for one in (mean, low, high)]
            trace.hovertext = _with_interval(*parts)
    return figure


def ablation_order(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The metric while parts are taken out, in an order with its interval, and in random orders with their range.

    Args:
        found: what `ablate_in_order` returns.
        caption: by default says what the lines and the bands are.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.ablation_order(mv.ablate_in_order(vlm, real, yes, [(0, 7), (1, 3)], controls=3))
    """
    _check(found, "ablation_order", "ablate_in_order", {"ranked", "random", "mean", "p_value"})
    random, mean = found["random"].mean("prompt"), found["mean"]
    known = bool(np.isfinite(found["low"]).any())
    ends = (found["low"], found["high"]) if known else (mean, mean)
    order = xr.Variable("order", ["random", "ranked"])
    band = tuple(_joined(pair, order) for pair in ((random.min("sample"), ends[0]), (random.max("sample"), ends[1])))
    both = _joined((random.mean("sample"), mean), order).assign_attrs(found["ranked"].attrs)
    said = caption or (
        f"ranked: in the given order{', with the ' + found.attrs['interval'] if known else ''}. random: "
        f"{found.sizes['sample']} random orders, their mean and range."
    )
    return lines(both, "count", "order", band=(band[0], band[1]), title=title, caption=said)


def head_search(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The metric after each round of a greedy search, on the prompts searched and those held out, and all candidates.

    Args:
        found: what `find_heads` returns.
        caption: by default says what dots and lines are.

    Raises:
        TypeError: for anything else.

    Example:
        >>> mv.plot.head_search(mv.find_heads(vlm, real, yes, count=2, candidates=[(0, 7), (1, 3), (3, 7)]))
    """
    _check(found, "head_search", "find_heads", {"metric", "score", "layer", "head"})
    parts = [found["metric"].mean("prompt")]
    names = ["searched"]
    if "held_out" in found:
        parts, names = [*parts, found["held_out"].mean("held_out_prompt")], [*names, "held out"]
    heads = zip(found["layer"].values[1:], found["head"].values[1:], strict=True)
    labels = ["none", *(f"+ {layer}.{head}" for layer, head in heads)]
    both = _joined(parts, xr.Variable("prompts", names)).assign_attrs(found["metric"].attrs)
    rounds = xr.Variable("round", labels, {"long_name": "heads taken, one by one (layer.head)"})
    said = (
        caption or "Lines: the mean over prompts with all heads so far perturbed. Dots: every candidate of the round."
    )
    figure = lines(both.assign_coords(round=rounds), "round", "prompts", title=title, caption=said)
    tried = found["score"].stack(at=["round", "candidate"]).dropna("at")
    text = [
        f"{candidate}<br><b>{value:.4g}</b>"
        for candidate, value in zip(tried.candidate.values, tried.values, strict=True)
    ]
    dots = {"color": GREY, "size": 4, "opacity": 0.6}
    hover = {"hovertext": text, "hoverinfo": "text", "showlegend": False}
    figure.add_scatter(x=tried["round"].values, y=tried.values, mode="markers", marker=dots, name="candidates", **hover)
    return figure


def token_sets(found: xr.Dataset, title: str = "", caption: str = "") -> go.Figure:
    """The effect of replacing each set of image tokens, beside random sets of as many others.

    Args:
        found: what `ablate_image_tokens` returns.
        caption: by default says what the bars' ends are.

    Raises:
        TypeError: for anything else.

    Example:
        >>> sets = {"outliers": mv.norm_outliers(vlm, real, count=3)}
        >>> mv.plot.token_sets(mv.ablate_image_tokens(vlm, real, yes, sets, controls=3))
    """
    _check(found, "token_sets", "ablate_image_tokens", {"effect", "random", "mean", "tokens"})
    random, mean = found["random"].mean("prompt"), found["mean"]
    known = bool(np.isfinite(found["low"]).any())
    ends = (found["low"], found["high"]) if known else (mean, mean)
    which = xr.Variable("tokens replaced", ["the set", "random"])
    band = tuple(_joined(pair, which) for pair in ((ends[0], random.min("sample")), (ends[1], random.max("sample"))))
    both = _joined((mean, random.mean("sample")), which).assign_attrs(found["effect"].attrs)
    said = caption or (
        f"Mean over {found.sizes['prompt']} prompts{'; the set: ' + found.attrs['interval'] if known else ''}. random: "
        f"as many other image tokens, the range of {found.sizes['sample']} samples."
    )
    return bars(both, "set", "tokens replaced", band=(band[0], band[1]), title=title, caption=said)


def _joined(parts: list[xr.DataArray] | tuple[xr.DataArray, ...], along: xr.Variable) -> xr.DataArray:
    return xr.concat(list(parts), along, coords="minimal", compat="override", combine_attrs="drop")


def _with_interval(mean: xr.DataArray, low: xr.DataArray, high: xr.DataArray) -> np.ndarray:
    """What a table says on hover, with a line for the interval."""
    texts = hover_texts(mean)
    for place in np.ndindex(*mean.shape):
        texts[place] += f"<br>from {low.values[place]:.4g} to {high.values[place]:.4g}"
    return texts


def _check(found: object, drawer: str, maker: str, wanted: set[str]) -> None:
    """Refuse what another function made."""
    held = {str(name) for name in found.data_vars} if isinstance(found, xr.Dataset) else set()
    if not wanted <= held:
        with_ = f" with {', '.join(sorted(held))}" if held else ""
        raise TypeError(
            f"{drawer} draws what {maker} returns, and was given a {type(found).__name__}{with_}; make it with "
            f"mv.{maker}."
        )
