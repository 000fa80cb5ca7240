"""Images of any resolution, cut into squares beside all of it in one: LLaVA-NeXT and LLaVA-OneVision.

The picture is fitted into the best of a list of resolutions, padded, and cut into squares; the tokens of the squares
are put together to one fine grid, and those of the padding left out. The model sees the whole picture in one square
first, then the fine grid, row by row, each row ended by a newline.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechvlm.grids.square import places_of
from mechvlm.imagemap import Grid, Place, Tile, View

Size = tuple[int, int]


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """The whole image as one grid, and one for each square; one grid only for several images of LLaVA-OneVision."""
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    if settings is not None:
        _check_settings(config, settings)
    pictures = _sizes_of(encoding, sizes)
    alone = _alone(config, encoding, len(pictures))
    found = []
    for size, cut in zip(pictures, alone, strict=True):
        best = _best_of(config, settings, size)
        found.append(_cut(config, size, best) if cut else _padded(config, settings, size))
    _check_pixels(config, pixels, [grid.vision[0] for grid in found])
    return found


def _check_settings(config: Any, settings: Mapping[str, Any]) -> None:
    kind, side = settings["image_processor_type"], config.vision_config.image_size
    if not kind.startswith(("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")):
        raise ValueError(
            f"the image processor is a {kind}; mechvlm undoes what LlavaNextImageProcessor and "
            "LlavaOnevisionImageProcessor do."
        )
    for name in ("size", "crop_size"):
        given = settings.get(name)
        if given and set(given.values()) != {side}:
            raise ValueError(
                f"the image processor's {name} is {given}; it must be {side} pixels, the side of what this model sees."
            )


def _sizes_of(encoding: Mapping[str, Tensor], sizes: Sequence | None) -> list[Size]:
    """Widths and heights, from `image_sizes`, which hold height and width."""
    if "image_sizes" not in encoding:
        raise ValueError("the encoding has pixel_values and no image_sizes; this model needs both.")
    held = [(int(width), int(height)) for height, width in encoding["image_sizes"].tolist()]
    if sizes is not None and held != [(size[0], size[1]) for size in sizes]:
        raise ValueError(
            f"image_sizes say that the pictures are {held} pixels wide and high, and those given are {list(sizes)}."
        )
    return held


def _alone(config: Any, encoding: Mapping[str, Tensor], count: int) -> list[bool]:
    """Of each image whether it is cut: LLaVA-OneVision does not cut several images that one prompt was given."""
    numbers = encoding.get("batch_num_images")
    if config.model_type != "llava_onevision" or numbers is None:
        return [True] * count
    return [number == 1 for number in numbers.tolist() for _ in range(number)]


def _best_of(config: Any, settings: Mapping[str, Any] | None, size: Size) -> Size:
    """Width and height of the best resolution, which the processor and the model work out each for itself."""
    from transformers.image_processing_utils import select_best_resolution

    side = config.vision_config.image_size
    height, width = select_best_resolution((size[1], size[0]), config.image_grid_pinpoints)
    if settings is not None:
        other = select_best_resolution((size[1], size[0]), settings["image_grid_pinpoints"])
        if tuple(other) != (height, width):
            raise ValueError(
                f"for a picture of {size[0]} x {size[1]} pixels the processor's image_grid_pinpoints give "
                f"{other[1]} x {other[0]} and the model's {width} x {height}; the processor belongs to another model."
            )
    if height % side or width % side:
        raise ValueError(
            f"image_grid_pinpoints hold a resolution of {width} x {height} pixels; it must be whole squares of {side}."
        )
    return width, height


def _base(config: Any) -> tuple[int, tuple[Place | None, ...], int]:
    """Tokens along a side of a square, what they stand for, and the positions the tower has for it."""
    vision = config.vision_config
    rows = vision.image_size // vision.patch_size
    places, positions = places_of(config)
    if len(places) != rows * rows or None in places:
        raise ValueError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, which gives {len(places)} "
            f"tokens a square where {rows * rows} make up its grid; take the one that leaves out the class token only."
        )
    return rows, places, positions


def _cut(config: Any, size: Size, best: Size) -> Grid:
    """The image in one square, and the grid of its squares: a tile each, in the order the vision tower has them."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    rows, places, positions = _base(config)
    across, down = best[0] // side, best[1] // side
    skip_x, skip_y = _unpadded(size, across * rows, down * rows)
    shape = (across * rows - 2 * skip_x, down * rows - 2 * skip_y)
    coarse = _coarser(config, *shape)
    whole = Tile(rows, rows, (0.0, 0.0, size[0] / side, size[1] / side), (patch, patch))
    if coarse is None:
        # Squares may be no whole patches: the tower leaves out the rest of each, so that their grids do not touch.
        tiles = [
            Tile(rows, rows, _view(size, best, (column * side, row * side)), (patch, patch))
            for row in range(down)
            for column in range(across)
        ]
        lines = [[(row, column) for column in range(shape[0])] for row in range(shape[1])]
        fine = [[_in_square(skip_y + row, skip_x + column, rows, across) for row, column in line] for line in lines]
    else:
        pitch = side / rows
        view = _view(size, best, (skip_x * pitch, skip_y * pitch))
        tiles = [Tile(coarse[1], coarse[0], view, (shape[1] * pitch / coarse[1], shape[0] * pitch / coarse[0]))]
        fine = [[(1, row, column) for column in range(coarse[0])] for row in range(coarse[1])]
    held: list[Place | None] = list(places)
    for line in fine:
        held += [*line, None]
    return Grid(size, (whole, *tiles), tuple(held), len(held), (1 + across * down, positions))


def _in_square(row: int, column: int, rows: int, across: int) -> Place:
    """The square, behind the one of the whole image, and the place in it of one token of the grid of all of them."""
    return 1 + row // rows * across + column // rows, row % rows, column % rows


def _view(size: Size, best: Size, corner: tuple[float, float]) -> View:
    """How what begins in a corner, in pixels of the best resolution, lies in the picture, which is fitted into it."""
    new = _fitted(size, best)
    x_scale, y_scale = size[0] / new[0], size[1] / new[1]
    left, top = corner[0] - (best[0] - new[0]) // 2, corner[1] - (best[1] - new[1]) // 2
    return left * x_scale, top * y_scale, x_scale, y_scale


def _fitted(size: Size, best: Size) -> Size:
    """Width and height of the picture when it just fits into the best resolution."""
    by_width, by_height = best[0] / size[0], best[1] / size[1]
    if by_width < by_height:
        return best[0], min(math.ceil(size[1] * by_width), best[1])
    return min(math.ceil(size[0] * by_height), best[0]), best[1]


def _unpadded(size: Size, columns: int, rows: int) -> tuple[int, int]:
    """How many columns and rows of tokens the model leaves out on each side, rounded as the model rounds."""
    if size[0] / size[1] > columns / rows:
        return 0, (rows - int(round(size[1] * (columns / size[0]), 7))) // 2
    return (columns - int(round(size[0] * (rows / size[1]), 7))) // 2, 0


def _coarser(config: Any, columns: int, rows: int) -> Size | None:
    """Columns and rows to which LLaVA-OneVision interpolates a grid of too many tokens; None where it does not."""
    if config.model_type != "llava_onevision":
        return None
    most = config.vision_aspect_ratio.removeprefix("anyres_max_")
    if not most.isdigit():
        raise ValueError(
            f"vision_aspect_ratio is {config.vision_aspect_ratio!r}; it must be 'anyres_max_' and a number."
        )
    square = config.vision_config.image_size // config.vision_config.patch_size
    ratio = math.sqrt(columns * rows / (int(most) * square**2))
    return (int(columns // ratio), int(rows // ratio)) if ratio > 1.1 else None


def _padded(config: Any, settings: Mapping[str, Any] | None, size: Size) -> Grid:
    """The image padded to a square, in one grid with a newline behind it."""
    if settings is not None and not settings.get("do_resize"):
        raise ValueError("the image processor has do_resize=False; several images of one prompt need do_resize=True.")
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    rows, places, positions = _base(config)
    longest = max(size)
    scale = longest / side
    view = (-float((longest - size[0]) // 2), -float((longest - size[1]) // 2), scale, scale)
    return Grid(size, (Tile(rows, rows, view, (patch, patch)),), (*places, None), len(places) + 1, (1, positions))


def _check_pixels(config: Any, pixels: Tensor, squares: Sequence[int]) -> None:
    """Squares beyond those an image needs are padding, which the model leaves out."""
    side = config.vision_config.image_size
    held = pixels.shape[0] == len(squares) and pixels.ndim == 5 and pixels.shape[1] >= max(squares)
    flat = pixels.ndim == 4 and pixels.shape[0] == sum(squares)
    if not (held or flat) or tuple(pixels.shape[-3:]) != (3, side, side):
        raise ValueError(
            f"pixel_values have the shape {tuple(pixels.shape)}, and image_sizes ask for {len(squares)} images of "
            f"{list(squares)} squares of {side} pixels."
        )
