"""Molmo2: the whole picture squeezed into one square, then at a higher resolution, cut into overlapping crops.

Each token pools a few patches, and the encoding says which. The crops' overlapping margins are dropped, so that what is
left is one grid over the whole picture.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mechvlm.imagemap import Grid, Tile


@dataclass(frozen=True)
class _Cut:
    """How a picture was cut: rows and columns of patches a token, and of crops; what crops drop before and after."""

    pool: tuple[int, int]
    crops: tuple[int, int]
    margins: tuple[int, int]

    def canvas(self, side: int) -> tuple[int, int]:
        """Rows and columns of patches of the higher resolution; `side` is a crop's."""
        both = sum(self.margins)
        return self.crops[0] * (side - both) + both, self.crops[1] * (side - both) + both


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """Two grids an image, both over the whole picture; a token at an edge may reach over it.

    Raises:
        ValueError: where the patches that the encoding pools are not those of any cut, or not those of the settings.
    """
    pooling = encoding.get("image_token_pooling")
    if pooling is None:
        return []
    patch = config.vision_config.patch_size
    side = _side(config, encoding["pixel_values"])
    found, token, unit = [], 0, 0
    grid_sizes, crops = encoding["image_grids"].tolist(), encoding["image_num_crops"].tolist()
    held, tokens = encoding["pixel_values"].shape[:-2].numel(), sum(a * b + c * d for a, b, c, d in grid_sizes)
    if (len(crops), sum(crops), tokens) != (len(grid_sizes), held, pooling.shape[0]):
        raise ValueError(
            f"image_grids is {grid_sizes} and image_num_crops {crops}, and there are {held} crops in pixel_values and "
            f"{pooling.shape[0]} tokens in image_token_pooling; they must be of the same images."
        )
    for number, ((low_rows, low_columns, rows, columns), units) in enumerate(zip(grid_sizes, crops, strict=True)):
        count = low_rows * low_columns + rows * columns
        pooled = pooling[token : token + count].numpy()
        token, unit, first = token + count, unit + units, unit
        here = np.where(pooled >= 0, pooled - first * side * side, -1)
        cut = _cut(here, units - 1, side, settings, (low_rows, low_columns, rows, columns))
        height, width = cut.canvas(side)
        size = (width * patch, height * patch) if sizes is None else sizes[number]
        tiles = (
            _tile(size, (side, side), (low_rows, low_columns), cut.pool, patch),
            _tile(size, (height, width), (rows, columns), cut.pool, patch),
        )
        places = tuple(
            (tile, row, column)
            for tile, shape in enumerate(tiles)
            for row in range(shape.rows)
            for column in range(shape.columns)
        )
        found.append(Grid(size, tiles, places, count, (units, side * side)))
    return found


def _side(config: Any, pixels: Tensor) -> int:
    """How many patches a crop's side has."""
    vision = config.vision_config
    high, wide = (length // vision.patch_size for length in vision.image_size)
    if high != wide or pixels.shape[-2] != high * wide:
        raise ValueError(
            f"the encoding's crops have {pixels.shape[-2]} patches, and this model sees {high} x {wide} and needs a "
            "square; the processor belongs to another model."
        )
    if pixels.shape[-1] != 3 * vision.patch_size**2:
        raise ValueError(
            f"the encoding's patches hold {pixels.shape[-1]} numbers, and this model's {3 * vision.patch_size**2}; the "
            "processor belongs to another model."
        )
    return high


def _tile(
    size: tuple[int, int], seen: tuple[int, int], shape: tuple[int, int], pool: tuple[int, int], patch: int
) -> Tile:
    """The grid over a picture squeezed into `seen` rows and columns of patches."""
    x_scale, y_scale = size[0] / (seen[1] * patch), size[1] / (seen[0] * patch)
    # Where the patches do not fill the tokens, half of what is missing comes first.
    top, left = ((rows * step - length) // 2 for rows, step, length in zip(shape, pool, seen, strict=True))
    view = (-left * patch * x_scale, -top * patch * y_scale, x_scale, y_scale)
    return Tile(*shape, view, (pool[0] * patch, pool[1] * patch))


def _cut(
    pooled: np.ndarray, crops: int, side: int, settings: Mapping[str, Any] | None, shape: tuple[int, int, int, int]
) -> _Cut:
    """The only cut whose tokens pool the patches that the encoding says."""
    for cut in _cuts(pooled.shape[1], crops, side, settings):
        low, high = _pooled(np.arange(side * side).reshape(side, side), cut.pool), cut.canvas(side)
        if (*low.shape[:2], *(math.ceil(n / step) for n, step in zip(high, cut.pool, strict=True))) != shape:
            continue
        fine = _pooled(_kept(cut, side), cut.pool)
        fine = np.where(fine >= 0, fine + side * side, -1)
        if np.array_equal(np.concatenate([low.reshape(-1, low.shape[-1]), fine.reshape(-1, fine.shape[-1])]), pooled):
            return cut
    means = "no known cut" if settings is None else "not the cut that the image processor's settings make"
    raise ValueError(
        f"the patches that image_token_pooling names are {means} into {crops} crops of {side} x {side} patches; encode "
        "the picture with this model's processor."
    )


def _cuts(slots: int, crops: int, side: int, settings: Mapping[str, Any] | None) -> Iterator[_Cut]:
    """Every cut into so many crops whose tokens have so many slots; the settings leave few."""
    pools = [(high, slots // high) for high in range(1, slots + 1) if slots % high == 0]
    margins = [(before, after) for before in range(side) for after in range(side - before)]
    if settings is not None:
        pools = [pool for pool in pools if pool == tuple(settings["pooling_size"])]
        margins = [tuple(settings["overlap_margins"])]
    for rows in range(1, crops + 1):
        if crops % rows == 0:
            yield from (_Cut(pool, (rows, crops // rows), margin) for pool in pools for margin in margins)


def _kept(cut: _Cut, side: int) -> np.ndarray:
    """The number of the patch at each row and column of the canvas, where crops are counted row by row."""
    crop_row, row = _lines(cut.crops[0], side, cut.margins)
    crop_column, column = _lines(cut.crops[1], side, cut.margins)
    crop = crop_row[:, None] * cut.crops[1] + crop_column
    return (crop * side + row[:, None]) * side + column


def _lines(crops: int, side: int, margins: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, the crop that each line of the canvas is taken from, and its number there."""
    pairs = [
        (crop, line)
        for crop in range(crops)
        for line in range(margins[0] if crop else 0, side if crop == crops - 1 else side - margins[1])
    ]
    held = np.array(pairs).reshape(-1, 2)
    return held[:, 0], held[:, 1]


def _pooled(patches: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Rows, columns and slots: the patches that each token pools, -1 where there is none."""
    missing = [-length % step for length, step in zip(patches.shape, pool, strict=True)]
    padded = np.pad(patches, [(lack // 2, lack - lack // 2) for lack in missing], constant_values=-1)
    rows, columns = padded.shape[0] // pool[0], padded.shape[1] // pool[1]
    return padded.reshape(rows, pool[0], columns, pool[1]).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
