"""Ovis2: the whole picture as one tile, then, where it is large, its parts; marks in the text say how many there are.

A mark ends each row of tiles, another each tile within a row. Both are words of their own and none of the image's
tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechvlm.imagemap import Grid, Tile


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """The grid of the whole picture, and one grid a part, row by row.

    Raises:
        ValueError: where text, pixels and settings do not agree, and for ways to resize or crop that are not undone.
    """
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    side = config.vision_config.image_size
    _check(config, pixels, settings)
    canvases = _canvases(config, encoding["input_ids"][0].tolist())
    tiles = sum(1 if rows * columns == 1 else 1 + rows * columns for rows, columns in canvases)
    if tiles != pixels.shape[0]:
        raise ValueError(
            f"the text has places for {tiles} tiles, and there are {pixels.shape[0]}; encode words and pictures "
            "together."
        )
    found = []
    for number, (rows, columns) in enumerate(canvases):
        size = (columns * side, rows * side) if sizes is None else sizes[number]
        found.append(_grid(config.vision_config, size, rows, columns))
    return found


def _grid(vision: Any, size: tuple[int, int], rows: int, columns: int) -> Grid:
    side, token = vision.image_size, vision.patch_size * vision.hidden_stride
    count = side // token
    whole = Tile(count, count, (0.0, 0.0, size[0] / side, size[1] / side), (token, token))
    x_scale, y_scale = size[0] / (columns * side), size[1] / (rows * side)
    parts = [
        Tile(count, count, (column * side * x_scale, row * side * y_scale, x_scale, y_scale), (token, token))
        for row in range(rows)
        for column in range(columns)
    ]
    tiles = (whole, *(parts if len(parts) > 1 else ()))
    places = tuple(
        (number, row, column) for number in range(len(tiles)) for row in range(count) for column in range(count)
    )
    return Grid(size, tiles, places, len(places), (len(tiles), (side // vision.patch_size) ** 2))


def _check(config: Any, pixels: Tensor, settings: Mapping[str, Any] | None) -> None:
    vision = config.vision_config
    side, token = vision.image_size, vision.patch_size * vision.hidden_stride
    if side % token:
        raise ValueError(
            f"a tile of {side} pixels does not divide into tokens of {token}, and mechvlm does not undo the padding "
            "that Ovis2 adds then; use a vision_config whose image_size is a multiple of patch_size * hidden_stride."
        )
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(
            f"the encoding's pictures are {pixels.shape[-1]} x {pixels.shape[-2]} pixels, and this model sees {side} x "
            f"{side}; the processor belongs to another model."
        )
    if settings is not None and (settings.get("do_center_crop") or not settings["do_resize"]):
        raise ValueError(
            f"the image processor has do_resize={settings['do_resize']} and do_center_crop="
            f"{settings.get('do_center_crop')}, and mechvlm undoes Ovis2's resizing without a crop only; set do_resize "
            "= True and do_center_crop = False."
        )


def _canvases(config: Any, ids: list[int]) -> list[tuple[int, int]]:
    """Rows and columns of parts of each image, counted from the marks between its first and its last."""
    first, _, next_column, next_row, last = config.visual_indicator_token_ids
    found = []
    start = None
    for position, token in enumerate(ids):
        if token == first:
            start = position
        elif token == last and start is not None:
            marks = ids[start:position]
            rows = marks.count(next_row) + 1
            found.append((rows, marks.count(next_column) // rows + 1))
            start = None
    return found
