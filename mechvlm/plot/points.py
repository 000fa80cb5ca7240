"""Figures of single pixels on the picture that a prompt asks about.

Rule this module guards: a pixel of what the model sees is drawn where its tile says that it lies in the original.

>>> found = input_times_gradient(vlm, real, yes, at="pixels")
>>> pixels_over_image(found.pixel_attribution, real.images[0], real.pictures[0]).data[0].z.shape
(72, 72)
"""

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from PIL import Image

from mechvlm.imagemap import ImageMap
from mechvlm.plot.canvas import SIDE, embedded
from mechvlm.plot.look import colours, finished, label, one_array
from mechvlm.plot.pictures import BOTH_SIGNS, ONE_SIGN, on_picture

FINEST = 600  # points along the longer side that are drawn of a larger picture
SHOWN = 99.5  # percent of the values, by their size, that the colours tell apart; single pixels stand out far


def pixels_over_image(
    values: xr.DataArray,
    image_map: ImageMap,
    picture: Image.Image,
    image: int = 0,
    tile: int | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """The picture, and over it a colour for each pixel that the model sees, summed over channels.

    Args:
        values: dims square, channel, y and x, with the coordinates image_of and tile_of, as the experiments'
            `pixel_attribution`; channel may be missing.
        image_map: where each tile lies, `prompt.images[image]`.
        picture: the original, `prompt.pictures[image]`.
        image: which of the prompt's images.
        tile: which tile to draw; by default each point shows the tile that sees it at the highest resolution.
        limits: lowest and highest value of the colours; by default those of all but the 0.5 % that are farthest from 0.

    Raises:
        ValueError: for other dims, an image or a tile that is not in the values, or another picture.
        TypeError: for a dataset, or where image_map and picture are something else.

    Example:
        >>> found = mv.integrated_gradients(vlm, real, mv.logit_difference("yes", "no"), at="pixels")
        >>> pixels_over_image(found.pixel_attribution, real.images[0], real.pictures[0])
    """
    on_picture("pixels_over_image", image_map, picture)
    one_array(values, "pixels_over_image")
    if {*values.dims} - {"channel"} != {"square", "y", "x"} or not {"image_of", "tile_of"} <= {*values.coords}:
        raise ValueError(
            "pixels_over_image draws square, channel, y and x with the coordinates image_of and tile_of, and the array "
            f"has {', '.join(map(str, values.dims)) or 'no dim'}; give an experiment's pixel_attribution."
        )
    if picture.size != image_map.size:
        raise ValueError(
            f"the picture is {picture.size[0]} x {picture.size[1]} pixels, and the model was shown one of "
            f"{image_map.size[0]} x {image_map.size[1]}; give the picture that the prompt was made with."
        )
    summed = values.sum("channel", keep_attrs=True) if "channel" in values.dims else values
    summed = summed.transpose("square", "y", "x")
    held = {
        int(at): square
        for of, at, square in zip(summed.image_of.values, summed.tile_of.values, summed.values, strict=True)
        if of == image and tile in (None, at)
    }
    if not held:
        raise ValueError(f"the values have no square of image {image}{'' if tile is None else f' and tile {tile}'}.")
    x, y, painted = _painted(held, image_map)
    scale, name = SIDE / max(picture.size), label(values)
    figure = go.Figure(go.Heatmap(x=x, y=y, z=painted, coloraxis="coloraxis", hoverongaps=False))
    width, height = picture.size
    place = {"x": 0, "y": 0, "sizex": width, "sizey": height, "xref": "x", "yref": "y"}
    figure.add_layout_image(source=embedded(picture), sizing="stretch", layer="below", **place)
    bare = {"showgrid": False, "zeroline": False, "showline": False, "showticklabels": False, "constrain": "domain"}
    figure.update_xaxes(range=[0, width], **bare)
    figure.update_yaxes(range=[height, 0], scaleanchor="x", **bare)
    most = float(np.nanpercentile(np.abs(painted), SHOWN)) or 1.0
    axis = colours(painted.clip(-most, most), limits, ONE_SIGN, BOTH_SIGNS, name)
    figure.update_layout(coloraxis=axis)
    return finished(figure, title, caption, scale * width, scale * height, axis=False)


def _painted(held: dict[int, np.ndarray], image_map: ImageMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the original picture, and the value of the pixel that sees each; not a number where none does."""
    width, height = image_map.size
    across, down = (max(1, round(length * min(1.0, FINEST / max(width, height)))) for length in (width, height))
    x, y = (np.arange(across) + 0.5) * width / across, (np.arange(down) + 0.5) * height / down
    painted = np.full((down, across), np.nan)
    # The coarsest first, so that finer ones are painted over it.
    for number in sorted(held, key=lambda at: -image_map.tiles[at].view[2] * image_map.tiles[at].view[3]):
        rows, columns = held[number].shape
        at_x, at_y = replace(image_map.tiles[number], rows=rows, columns=columns, token=(1.0, 1.0)).cells(x, y)
        seen = ((at_y >= 0) & (at_y < rows))[:, None] & ((at_x >= 0) & (at_x < columns))[None]
        here = held[number][at_y.clip(0, rows - 1)[:, None], at_x.clip(0, columns - 1)[None]]
        painted = np.where(seen, here, painted)
    return x, y, painted
