"""Pictures stretched over a canvas of square tiles, the tiles row by row, and the whole picture after them: InternVL.

A picture that fits one tile is seen once. Which canvas a picture gets depends on its shape; how many tiles an image was
cut into is read from its run of image tokens, since the processor does not return it.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mechvlm.imagemap import Grid, Place, Tile


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid a tile; the last is the whole picture where there are several.

    Where the sizes of the pictures are not known, the original is taken to be what the model sees: the tiles, one below
    the other.

    Raises:
        ValueError: where the encoding, the settings and the configuration do not agree.
    """
    if "pixel_values" not in encoding:
        return []
    side, token, count = _shape(config)
    tiles = _tiles(config, encoding, side, count)
    if sizes is not None and len(sizes) != len(tiles):
        raise ValueError(f"there are {len(sizes)} pictures, and the text holds {len(tiles)} images; they must agree.")
    found = []
    for number, many in enumerate(tiles):
        size = (side, side * many) if sizes is None else tuple(sizes[number])
        if sizes is None:
            views = [(0.0, float(side * tile), 1.0, 1.0) for tile in range(many)]
        else:
            views = _views(settings, size, side, many)
        seen = tuple(Tile(count, count, view, (token, token)) for view in views)
        places: tuple[Place, ...] = tuple(product(range(many), range(count), range(count)))
        patches = (side // config.vision_config.patch_size[0]) ** 2
        found.append(Grid(size, seen, places, len(places), (many, patches + 1)))
    return found


def _shape(config: Any) -> tuple[int, int, int]:
    """A tile's side and a token's in pixels, and how many tokens are in a row of a tile."""
    (height, width), (patch, other) = config.vision_config.image_size, config.vision_config.patch_size
    if (height, patch) != (width, other) or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"the model has tiles of {width} x {height} pixels in patches of {other} x {patch} and "
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}; mechvlm knows square tiles and "
            "patches with 'default'."
        )
    token = round(patch / config.downsample_ratio)
    return height, token, height // token


def _tiles(config: Any, encoding: Mapping[str, Tensor], side: int, count: int) -> list[int]:
    """How many tiles each image was cut into, from the runs of image tokens: a start token stands before each."""
    image = encoding["input_ids"].reshape(-1) == config.image_token_id
    starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
    runs = torch.bincount(starts.cumsum(0)[image])[1:].tolist()
    held = tuple(encoding["pixel_values"].shape)
    if any(run % count**2 for run in runs) or held[-2:] != (side, side) or sum(runs) != held[0] * count**2:
        raise ValueError(
            f"the text holds runs of {runs} image tokens and pixel_values is {held}; a tile is {side} x {side} pixels "
            f"and {count**2} tokens."
        )
    return [run // count**2 for run in runs]


def _views(
    settings: Mapping[str, Any] | None, size: tuple[int, int], side: int, many: int
) -> list[tuple[float, float, float, float]]:
    """How each tile lies in the original picture: those of the canvas row by row, then the whole."""
    (width, height), whole = size, (0.0, 0.0, size[0] / side, size[1] / side)
    fewest, most = many - 1, many - 1
    if settings is not None:
        if not settings["image_processor_type"].startswith("GotOcr2ImageProcessor"):
            raise ValueError(
                f"mechvlm does not know how {settings['image_processor_type']} cuts pictures into tiles; InternVL's is "
                "GotOcr2ImageProcessor."
            )
        fewest, most = settings["min_patches"], settings["max_patches"]
    if many == 1:
        return [whole]
    columns, rows = canvas(size, side, fewest, most)
    if columns * rows + 1 != many:
        raise ValueError(
            f"the processor cuts a picture of {width} x {height} pixels into {columns} x {rows} tiles and a whole, and "
            f"the text holds tokens of {many}; the encoding was made with other settings or pictures."
        )
    x, y = width / (columns * side), height / (rows * side)
    return [(column * side * x, row * side * y, x, y) for row in range(rows) for column in range(columns)] + [whole]


def canvas(size: tuple[int, int], side: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows of tiles: those of the picture's shape, and more of them where the picture is large.

    Args:
        size: width and height of the original.
        side: of a tile.
        fewest, most: how many tiles there may be.
    """
    width, height = size
    all_ = [(i, j) for i, j in product(range(1, most + 1), repeat=2) if fewest <= i * j <= most]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(all_, key=lambda grid: grid[0] * grid[1]):
        off = abs(width / height - columns / rows)
        if off < least:
            best, least = (columns, rows), off
        elif off == least and width * height > 0.5 * side * side * columns * rows:
            best = (columns, rows)
    return best
