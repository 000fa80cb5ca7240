"""Images that are stretched to whole squares, cut, and followed by all of them in one square: Idefics 3, SmolVLM, Aya.

Nothing is padded or cropped away: every square of the cut picture stands for the same share of the original. In the
vision tower a square is a grid of patches, of which the connector makes one token each block.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechvlm.imagemap import Grid, Place, Tile

Size = tuple[int, int]
_LARGEST = 4096
"""Idefics 3 makes no picture longer than this."""


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid for each square of the cut picture, row by row, and one for all of it, which comes last."""
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    side, squares = pixels.shape[-1], pixels.shape[:-3].numel()
    if pixels.shape[-2] != side:
        raise ValueError(f"pixel_values have the shape {tuple(pixels.shape)}; the last two must make a square.")
    seen = encoding.get("pixel_attention_mask")
    if seen is not None and seen.shape != pixels[..., 0, :, :].shape:
        raise ValueError(
            f"pixel_attention_mask has the shape {tuple(seen.shape)} and pixel_values {tuple(pixels.shape)}; they must "
            "be of the same squares."
        )
    pictures = None if sizes is None else [(int(size[0]), int(size[1])) for size in sizes]
    if config.model_type == "aya_vision":
        cuts = _cuts_of_aya(settings, pictures, side, squares)
    else:
        if not bool((pixels.flatten(-3) != 0).any(-1).all()):
            raise ValueError(
                f"a part of the picture is 0 everywhere in pixel_values, which {config.model_type} models take for "
                "padding and leave out; change one of its pixels a little."
            )
        cuts = _cuts_of_idefics(config, encoding, settings, pictures, side)
    if sum(_squares(cut) for cut in cuts) != squares:
        raise ValueError(
            f"pixel_values hold {squares} squares, and pictures cut into {_written(cuts)} make "
            f"{sum(_squares(cut) for cut in cuts)}; the processor or its settings are not those that made them."
        )
    if pictures is None:
        pictures = [(max(across, 1) * side, max(down, 1) * side) for across, down in cuts]
    return [_grid(config, size, cut, side) for size, cut in zip(pictures, cuts, strict=True)]


def _squares(cut: Size) -> int:
    across, down = cut
    return across * down + 1


def _written(cuts: Sequence[Size]) -> str:
    return ", ".join(f"{down} x {across}" for across, down in cuts)


def _grid(config: Any, size: Size, cut: Size, side: int) -> Grid:
    """One image; `cut` is how many squares lie across and down, (0, 0) where it is not cut."""
    across, down = cut
    patch, block = config.vision_config.patch_size, _block(config)
    rows, patches = side // patch // block, (side // patch) ** 2
    if side // patch % block:
        raise ValueError(
            f"pixel_values are squares of {side} pixels, {side // patch} patches to a side; it must be whole tokens of "
            f"{block} patches."
        )
    tiles = []
    for number in range(across * down):
        x_scale, y_scale = size[0] / (across * side), size[1] / (down * side)
        row, column = divmod(number, across)
        tiles.append((column * side * x_scale, row * side * y_scale, x_scale, y_scale))
    tiles.append((0.0, 0.0, size[0] / side, size[1] / side))
    places: list[Place] = [
        (tile, row, column) for tile in range(len(tiles)) for row in range(rows) for column in range(rows)
    ]
    token = (block * patch, block * patch)
    made = tuple(Tile(rows, rows, view, token) for view in tiles)
    return Grid(size, made, tuple(places), len(places), (len(tiles), patches))


def _block(config: Any) -> int:
    """Patches along a side of a token."""
    if config.model_type != "aya_vision":
        return config.scale_factor
    if config.vision_feature_select_strategy != "full":
        raise ValueError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; Aya Vision's tower has no "
            "class token to leave out, so it must be 'full'."
        )
    return config.downsample_factor


def _cuts_of_aya(
    settings: Mapping[str, Any] | None, pictures: list[Size] | None, side: int, squares: int
) -> list[Size]:
    """How each picture is cut: into the squares whose shape is nearest to its own."""
    if pictures is None:
        if squares == 1:
            return [(0, 0)]
        raise ValueError(
            f"pixel_values hold {squares} squares, and a ready encoding does not say how they lie in a picture; make "
            "the prompt from the picture."
        )
    given = {"min_patches": 1, "max_patches": 12, **(settings or {})}
    if given.get("size", {"height": side, "width": side}) != {"height": side, "width": side}:
        raise ValueError(f"the image processor's size is {given['size']}, and pixel_values are squares of {side}.")
    if squares == len(pictures) or given["max_patches"] <= 1:
        # Aya's processor cuts whatever its image processor's settings say, so only the squares tell that it did not.
        return [(0, 0)] * len(pictures)
    return [_nearest(size, side, given["min_patches"], given["max_patches"]) for size in pictures]


def _nearest(size: Size, side: int, fewest: int, most: int) -> Size:
    """Squares across and down; of equally near ones the more, while the picture has half as many pixels."""
    pairs = [(across, down) for across in range(1, most + 1) for down in range(1, most + 1)]
    allowed = sorted(
        (pair for pair in pairs if fewest <= pair[0] * pair[1] <= most), key=lambda pair: pair[0] * pair[1]
    )
    best, difference = (1, 1), float("inf")
    for pair in allowed:
        new = abs(size[0] / size[1] - pair[0] / pair[1])
        more = new == difference and size[0] * size[1] > 0.5 * side * side * pair[0] * pair[1]
        if new < difference or more:
            best, difference = pair, new
    return best if best != (1, 1) else (0, 0)


def _cuts_of_idefics(
    config: Any,
    encoding: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    pictures: list[Size] | None,
    side: int,
) -> list[Size]:
    """How each picture is cut, by the image processor's rules or, for a ready encoding, by its text."""
    if settings is None or pictures is None:
        return _cuts_in_text(config, encoding)
    largest = settings["max_image_size"]["longest_edge"]
    if largest != side:
        raise ValueError(
            f"the image processor's max_image_size is {largest} pixels, and pixel_values are squares of {side}."
        )
    splits = settings.get("do_image_splitting", True)
    return [_apart(config, size, _shrunk(settings, size), side, splits) for size in pictures]


def _apart(config: Any, size: Size, shrunk: Size, side: int, splits: bool) -> Size:
    """Squares across and down, after seeing that the first resizing leaves a pixel for each of their tokens.

    Raises:
        ValueError: where tokens that stand side by side would see the same pixel, so that a box said too much.
    """
    cut = _stretched(shrunk, side) if splits else (0, 0)
    rows = side // config.vision_config.patch_size // _block(config)
    for few, many, had in zip(shrunk, (max(squares, 1) * rows for squares in cut), size, strict=True):
        if few < min(many, had):
            raise ValueError(
                f"a picture of {size[0]} x {size[1]} pixels becomes one of {shrunk[0]} x {shrunk[1]} before it is cut, "
                f"too few for {many} tokens to see different ones; cut it into parts, or pad it."
            )
    return cut


def _shrunk(settings: Mapping[str, Any], size: Size) -> Size:
    """Width and height after the first resizing, rounded as the image processor rounds."""
    if not settings.get("do_resize", True):
        return size
    if set(settings["size"]) == {"height", "width"}:
        return settings["size"]["width"], settings["size"]["height"]
    if set(settings["size"]) != {"longest_edge"}:
        raise ValueError(
            f"the processor resizes pictures to {settings['size']}, and mechvlm undoes only a 'longest_edge', or "
            "'height' and 'width'; set image_processor.size to one of these."
        )
    longest, (width, height) = settings["size"]["longest_edge"], size
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > _LARGEST:
        width, height = _LARGEST, int(_LARGEST / aspect)
    elif height > width and height > _LARGEST:
        width, height = int(_LARGEST * aspect), _LARGEST
    return max(width, 1), max(height, 1)


def _stretched(size: Size, side: int) -> Size:
    """Squares across and down after the second resizing, to whole squares; (0, 0) where there is but one."""
    width, height = size
    aspect = width / height
    if width >= height:
        across = math.ceil(width / side)
        down = math.ceil(int(across * side / aspect) / side)
    else:
        down = math.ceil(height / side)
        across = math.ceil(int(down * side * aspect) / side)
    return (across, down) if (across, down) != (1, 1) else (0, 0)


def _cuts_in_text(config: Any, encoding: Mapping[str, Tensor]) -> list[Size]:
    """How each picture is cut, from the marks around the runs of image tokens.

    Two marks stand before a run: one for all of them, and one that says which square it is, or that it is all of the
    picture. A line of squares ends with a line break, so that there are more marks before the next run.
    """
    ids = [None, *encoding["input_ids"][0].tolist(), None]
    image = [number == config.image_token_id for number in ids]
    starts = [place for place in range(1, len(ids)) if image[place] and not image[place - 1]]
    ends = [place for place in range(1, len(ids)) if image[place - 1] and not image[place]]
    if not starts:
        raise ValueError("the text holds no image token, and the encoding has pixel_values; it needs both or neither.")
    around = {ids[start - 2] for start in starts} | {ids[ends[-1]]}
    if len(around) != 1:
        raise ValueError("before each run of image tokens there must be two marks, the first the same for all.")
    found: list[Size] = []
    breaks: list[int] = []
    first = 0
    for number, start in enumerate(starts):
        if number > first and start - ends[number - 1] > 2:
            breaks.append(number - first)
        if ids[start - 1] == ids[starts[-1] - 1]:
            found.append(_cut_of(breaks, number - first))
            breaks, first = [], number + 1
    return found


def _cut_of(breaks: Sequence[int], squares: int) -> Size:
    """Squares across and down, from the numbers of squares behind which a line ends."""
    if not squares:
        return 0, 0
    if not breaks or list(breaks) != list(range(breaks[0], squares + 1, breaks[0])) or breaks[-1] != squares:
        raise ValueError(
            f"the text does not say how {squares} squares lie in a picture; make the prompt from the picture."
        )
    return breaks[0], squares // breaks[0]
