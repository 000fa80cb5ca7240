"""Figures of what flows where: patches by position, by layer over the picture, and on average over pairs.

>>> patched_positions(mv.patch_positions(vlm, real, null, yes, positions=real.question, layers=[3]).normalised)
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from PIL import Image
from plotly.subplots import make_subplots

from mechvlm.plot.canvas import embedded
from mechvlm.plot.charts import bars, heatmap, lines
from mechvlm.plot.look import colours, finished, label, one_array, plain
from mechvlm.plot.pictures import BOTH_SIGNS, ELSEWHERE, ONE_SIGN
from mechvlm.prompt import Prompt

LONGEST = 12
"""Letters of a word at an axis; longer ones are cut."""
RASTER = 96
"""Values along the longer side of each small picture."""
SMALL = 190
"""Pixels on the screen of the longer side of each small picture."""


def patched_positions(array: xr.DataArray, title: str = "", caption: str = "") -> go.Figure:
    """A table of layer by position with each position's word at its column; runs of image tokens are named once.

    Args:
        array: dims layer and position, with a coordinate `token`, as `patch_positions` returns; of two directions,
            choose one.

    Raises:
        TypeError, ValueError: for anything else.

    Example:
        >>> found = mv.patch_positions(vlm, real, null, yes, layers=[0, 3])
        >>> mv.plot.patched_positions(found.normalised, title="Where the answer is")
    """
    one_array(array, "patched_positions")
    if set(array.dims) != {"layer", "position"} or "token" not in array.coords:
        raise ValueError(
            "patched_positions draws dims layer and position with a coordinate token, and the array has "
            f"{', '.join(map(str, array.dims)) or 'no dims'}; choose first, like "
            "result.normalised.sel(direction='noise')."
        )
    where, words = array.position.values.tolist(), [str(word) for word in array.token.values]
    names = [f"{at} {word}" for at, word in zip(where, words, strict=True)]
    figure = heatmap(array.transpose("layer", "position").assign_coords(position=names), title=title, caption=caption)
    spans = array.span.values.tolist() if "span" in array.coords else [""] * len(where)
    begins = [at for at, span in enumerate(spans) if span != "image" or at == 0 or spans[at - 1] != "image"]
    said = ["image tokens" if spans[at] == "image" else _cut(words[at]) for at in begins]
    figure.update_xaxes(tickvals=begins, ticktext=[plain(word) for word in said])
    return _upright(figure, said)


def _cut(word: str) -> str:
    """A token's text without the marks of a space, cut where it is long."""
    bare = word.replace("\u2581", " ").replace("\u0120", " ").strip() or "\u2423"
    return bare if len(bare) <= LONGEST else bare[: LONGEST - 1] + "\u2026"


def layers_over_image(
    array: xr.DataArray,
    prompt: Prompt,
    layers: Sequence[int] | None = None,
    image: int = 0,
    limits: tuple[float, float] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """The picture once for each layer, and over it the values of its image tokens, all on one scale.

    Where several tiles look at a place, the one that sees it at the highest resolution is shown.

    Args:
        array: dims layer and position, with values for image tokens, as `patch_positions` or `object_map` return.
        layers: which of its layers; None means all.
        image: which of the prompt's images.
        limits: lowest and highest value of the colours.

    Raises:
        TypeError, ValueError: for other dims, a layer or picture that is not there, or values at no image token.

    Example:
        >>> found = mv.patch_positions(vlm, real, null, yes, positions=real.image, layers=[0, 1, 2])
        >>> mv.plot.layers_over_image(found.normalised, real)
    """
    one_array(array, "layers_over_image")
    if set(array.dims) != {"layer", "position"}:
        raise ValueError(
            f"layers_over_image draws dims layer and position, and the array has {', '.join(map(str, array.dims))}; "
            "choose first."
        )
    if not 0 <= image < len(prompt.pictures):
        raise ValueError(f"there is no picture {image}; the prompt holds {len(prompt.pictures)}, counted from 0.")
    own, picture = prompt.images[image], prompt.pictures[image]
    if own.of != "tokens":
        raise ValueError(f"values by position cannot be drawn: {ELSEWHERE[own.of]}")
    chosen = array.layer.values.tolist() if layers is None else list(layers)
    missing = [layer for layer in chosen if layer not in array.layer.values]
    if missing or not chosen:
        raise ValueError(f"layers={chosen} are not all in the array, whose layers are {array.layer.values.tolist()}.")
    held = array.reindex(position=list(own.positions)).transpose("layer", "position")
    if not np.isfinite(held.sel(layer=chosen).values).any():
        raise ValueError("there is nothing to draw: no finite value belongs to an image token of this picture.")
    step = max(1, max(own.size) // RASTER)
    heats = {f"layer {at}": own.heat(held.sel(layer=at).values)[step // 2 :: step, step // 2 :: step] for at in chosen}
    figure, width, height = _small(heats, picture, step)
    figure.update_layout(coloraxis=colours(np.stack([*heats.values()]), limits, ONE_SIGN, BOTH_SIGNS, label(array)))
    return finished(figure, title, caption, width, height, axis=False)


def _small(heats: dict[str, np.ndarray], picture: Image.Image, step: int) -> tuple[go.Figure, float, float]:
    """A small picture for each of some heats, and how large they are together, in pixels on the screen."""
    columns = min(len(heats), 4)
    rows = -(-len(heats) // columns)
    wide, tall = (SMALL * side / max(picture.size) for side in picture.size)
    width, height = columns * wide + (columns - 1) * 14, rows * tall + (rows - 1) * 32
    gaps = {"horizontal_spacing": 14 / width, "vertical_spacing": 32 / height if rows > 1 else 0}
    figure = make_subplots(rows, columns, subplot_titles=list(heats), **gaps)
    under = {"source": embedded(picture), "sizing": "stretch", "layer": "below", "x": 0, "y": 0}
    size = {"sizex": picture.size[0], "sizey": picture.size[1]}
    for number, (name, heat) in enumerate(heats.items()):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        figure.add_layout_image(**under, **size, **place)
        x, y = (np.arange(count) * step + (step - 1) / 2 + 0.5 for count in heat.shape[::-1])
        said = f"{name}<br><b>%{{z:.4g}}</b><extra></extra>"
        figure.add_heatmap(x=x, y=y, z=heat, coloraxis="coloraxis", hovertemplate=said, **place)
    bare = {"showgrid": False, "zeroline": False, "showline": False, "showticklabels": False, "constrain": "domain"}
    figure.update_xaxes(range=[0, picture.size[0]], **bare)
    figure.update_yaxes(range=[picture.size[1], 0], **bare)
    return figure, width, height


def patched_pairs(found: xr.Dataset, direction: str | None = None, title: str = "", caption: str = "") -> go.Figure:
    """What patches carry over on average, with intervals: a line for each span, or bars for regions.

    Heads and positions are a table of means. Dashed lines, or bars beside, are random sets of as many positions, with
    the range of their means.

    Args:
        found: what `patch_pairs` returns.
        direction: which of its directions, where it has both; by default "denoise".
        caption: by default says what is shown.

    Raises:
        TypeError, ValueError: for anything else.

    Example:
        >>> pair = mv.MinimalPair(image, mv.images.black(image), "Is there a 7 in the image?", "yes", "no")
        >>> mv.plot.patched_pairs(mv.patch_pairs(vlm, [pair], controls=2, layers=[0, 4]))
    """
    if not isinstance(found, xr.Dataset) or not {"mean", "low", "high"} <= set(found.data_vars):
        raise TypeError("patched_pairs draws what patch_pairs returns; give the dataset, not one of its variables.")
    here = _one_direction(found, direction)
    mean = here["mean"].assign_attrs(found.normalised.attrs)
    said = caption or _said(found, here)
    if mean.ndim == 2 and "span" not in mean.dims:
        return heatmap(mean, title=title, caption=said)
    low, high = (bound.where(bound.notnull(), mean) for bound in (here.low, here.high))
    nodes = None
    if "control" in here:
        nodes, random = "nodes", here.control
        names = xr.DataArray(["patched", "random sets"], dims=nodes, name=nodes)
        shown = ((mean, random.mean("control")), (low, random.min("control")), (high, random.max("control")))
        mean, low, high = (xr.concat(both, names).assign_attrs(mean.attrs).rename(mean.name) for both in shown)
    if "layer" in mean.dims:
        return lines(mean, x="layer", colour="span", dash=nodes, band=(low, high), title=title, caption=said)
    figure = bars(mean, x="region", colour=nodes, band=(low, high), title=title, caption=said)
    return _upright(figure, [str(name) for name in mean.region.values])


def _upright(figure: go.Figure, names: list[str]) -> go.Figure:
    """The figure with the words at its x axis upright, and room for them."""
    height = 10 + max(0, max(map(len, names)) - 4) * 7
    for below in figure.layout.annotations:
        below.yshift = below.yshift - height
    figure.update_xaxes(tickangle=-90, title_standoff=12)
    return figure.update_layout(height=figure.layout.height + height, margin_b=figure.layout.margin.b + height)


def _one_direction(found: xr.Dataset, direction: str | None) -> xr.Dataset:
    """The means of one direction."""
    if "direction" not in found.dims:
        return found
    there = found.direction.values.tolist()
    if direction is not None and direction not in there:
        raise ValueError(f"direction={direction!r} is not in the result, which has {', '.join(there)}.")
    return found.sel(direction=direction or there[0])


def _said(found: xr.Dataset, here: xr.Dataset) -> str:
    """What a figure of pairs shows."""
    way = here.direction.item() if "direction" in here.coords else found.attrs.get("direction", "")
    left = f", {found.attrs['left_out']} left out as not answered right" if found.attrs.get("left_out") else ""
    sets = "control" in here and bool({"span", "region"} & set(here.dims))
    random = f"; random sets of as many positions: mean and range of {found.attrs['controls']}" if sets else ""
    level = f"{100 * found.attrs['level']:.0f} % intervals over {found.attrs['clusters']} clusters"
    return f"Mean over {found.attrs['pairs']} pairs{left}; {level}; direction: {way}{random}."
