"""DeepSeek-VL: the longer edge is resized to the square's, and the shorter one padded evenly."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechvlm.imagemap import Grid, Tile, View


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid of squares an image; those at the padded edges reach over the picture's."""
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(
            f"the encoding's pictures are {pixels.shape[-1]} x {pixels.shape[-2]} pixels, and this model sees {side} x "
            f"{side}; the processor belongs to another model."
        )
    count = side // patch
    places = tuple((0, row, column) for row in range(count) for column in range(count))
    found = []
    for number in range(pixels.shape[0]):
        size = (side, side) if sizes is None else sizes[number]
        view = (0.0, 0.0, size[0] / side, size[1] / side) if settings is None else view_of(settings, size, side)
        tile = Tile(count, count, view, (patch, patch))
        found.append(Grid(size, (tile,), places, len(places), (1, len(places))))
    return found


def view_of(settings: Mapping[str, Any], size: tuple[int, int], side: int) -> View:
    """How the square that DeepSeek-VL's image processor makes lies in the original picture of some width and height.

    Raises:
        ValueError: where the square would not have the side that the model sees.
    """
    width, height = size
    if settings["do_resize"]:
        scale = settings["size"]["height"] / max(size)
        width, height = (max(round(length * scale), settings["min_size"]) for length in size)
    left = top = 0
    made = (width, height)
    if settings["do_pad"]:
        longer = max(width, height)
        left, top, made = (longer - width) // 2, (longer - height) // 2, (longer, longer)
    if made != (side, side):
        raise ValueError(
            f"the processor makes pictures of {made[0]} x {made[1]} pixels from one of {size[0]} x {size[1]}, and this "
            f"model sees {side} x {side}; the processor belongs to another model."
        )
    x_scale, y_scale = size[0] / width, size[1] / height
    return -left * x_scale, -top * y_scale, x_scale, y_scale
