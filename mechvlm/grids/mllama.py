"""Mllama: the picture is fitted into the best canvas of up to four tiles, padded right and below, and cut.

The text holds one token an image, and looks at the picture through the keys of its cross-attention: for each tile, used
or not, a class token and then the patches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechvlm.imagemap import Grid, Place, Tile

PADDED_TO = 8
"""The vision tower pads each tile's positions to a multiple of this."""


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid of squares a tile; class tokens and unused tiles stand for no place.

    Raises:
        ValueError: where the encoding, the image processor and the model do not agree on the tiles.
    """
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    vision = config.vision_config
    side, slots = vision.image_size, vision.max_num_tiles
    if tuple(pixels.shape[2:]) != (slots, 3, side, side):
        raise ValueError(
            f"the encoding has {pixels.shape[2]} tiles of {pixels.shape[-1]} x {pixels.shape[-2]} pixels an image, and "
            f"this model sees {slots} of {side} x {side}; the processor belongs to another model."
        )
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        if name in encoding and encoding[name].shape[:2] != pixels.shape[:2]:
            raise ValueError(
                f"{name} has the shape {tuple(encoding[name].shape)} and pixel_values {tuple(pixels.shape)}; they must "
                "be of the same images."
            )
    found = []
    for number, shape in enumerate(encoding["aspect_ratio_ids"].reshape(-1).tolist()):
        rows, columns = vision.supported_aspect_ratios[shape - 1]
        size = (columns * side, rows * side) if sizes is None else sizes[number]
        made = (rows, columns) if settings is None else _canvas(size, settings["max_image_tiles"], side)
        if made != (rows, columns):
            raise ValueError(
                f"the encoding has {rows} x {columns} tiles for image {number}, and the processor cuts a picture of "
                f"{size[0]} x {size[1]} pixels into {made[0]} x {made[1]}; the encoding was made of another picture."
            )
        found.append(_grid(size, (rows, columns), vision))
    return found


def _grid(size: tuple[int, int], canvas: tuple[int, int], vision: Any) -> Grid:
    (rows, columns), side, patch = canvas, vision.image_size, vision.patch_size
    new_width, new_height = _fitted(size, (columns * side, rows * side), side)
    x_scale, y_scale = size[0] / new_width, size[1] / new_height
    count = side // patch
    tiles = [
        Tile(count, count, (column * side * x_scale, row * side * y_scale, x_scale, y_scale), (patch, patch))
        for row in range(rows)
        for column in range(columns)
    ]
    places: list[Place | None] = []
    for number in range(vision.max_num_tiles):
        squares = [(number, row, column) for row in range(count) for column in range(count)]
        places += [None, *(squares if number < len(tiles) else [None] * len(squares))]
    positions = math.ceil((count * count + 1) / PADDED_TO) * PADDED_TO * vision.max_num_tiles
    return Grid(size, tuple(tiles), tuple(places), 1, (1, positions), of="keys")


def _canvas(size: tuple[int, int], most: int, side: int) -> tuple[int, int]:
    """How many rows and columns of tiles the processor chooses: the least enlargement, or else the least reduction."""
    shapes = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    scales = {shape: min(shape[0] * side / size[1], shape[1] * side / size[0]) for shape in shapes}
    larger = [scale for scale in scales.values() if scale >= 1]
    best = min(larger) if larger else max(scales.values())
    return min((shape for shape in shapes if scales[shape] == best), key=math.prod)


def _fitted(size: tuple[int, int], canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of the picture within the canvas; it is never enlarged beyond one tile's side."""
    target = [min(max(length, side), most) for length, most in zip(size, canvas, strict=True)]
    x_scale, y_scale = target[0] / size[0], target[1] / size[1]
    if x_scale < y_scale:
        return target[0], min(math.floor(size[1] * x_scale) or 1, target[1])
    return min(math.floor(size[0] * y_scale) or 1, target[0]), target[1]
