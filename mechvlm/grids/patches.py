"""Pictures of any size, resized to whole tokens and cut into patches: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4.1V.

The encoding says how many patches a picture is cut into (`image_grid_thw`). The tower merges squares of them into
tokens, which stand row by row in the text. Inside the tower the patches of one token are neighbours, and Qwen2.5-VL
sorts the tokens by the windows of its attention: see `tower_places`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm.imagemap import Grid, Tile

FRAMES = {"Qwen2VLImageProcessor": False, "Glm4vImageProcessor": True}
"""Whether a processor counts a picture's pixels once for every frame that it shows it in."""

LONGEST = 200
"""How many times as long as wide a picture may be for these processors."""


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid of squares an image, as wide and as high as the processor made it.

    Raises:
        ValueError: for films, and where the encoding, the settings and the configuration do not agree.
    """
    if "video_grid_thw" in encoding:
        raise ValueError("the encoding holds films, and mechvlm reads pictures only; leave video_grid_thw out.")
    if "image_grid_thw" not in encoding:
        return []
    patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
    if settings is not None and (settings["patch_size"], settings["merge_size"]) != (patch, merge):
        raise ValueError(
            f"the processor merges {settings['merge_size']} x {settings['merge_size']} patches of "
            f"{settings['patch_size']} pixels, and this model {merge} x {merge} of {patch}; the processor belongs to "
            "another model."
        )
    counts = _counts(encoding, merge)
    if sizes is not None and len(sizes) != len(counts):
        raise ValueError(f"there are {len(sizes)} pictures, and image_grid_thw holds {len(counts)}; they must agree.")
    found = []
    for number, (high, wide) in enumerate(counts):
        seen = (wide * patch, high * patch)
        size = seen if sizes is None else tuple(sizes[number])
        if settings is not None and sizes is not None:
            _check(settings, size, seen)
        rows, columns = high // merge, wide // merge
        view = (0.0, 0.0, size[0] / seen[0], size[1] / seen[1])
        tile = Tile(rows, columns, view, (patch * merge, patch * merge))
        places = tuple((0, row, column) for row in range(rows) for column in range(columns))
        found.append(Grid(size, (tile,), places, len(places), (1, high * wide)))
    return found


def check_width(config: Any, pixels: Tensor) -> None:
    """Refuse patches of another size than the model's.

    Raises:
        ValueError: with the shape that they have and the one that is right.
    """
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    if pixels.shape[1:] != (width,):
        raise ValueError(
            f"pixel_values have the shape {tuple(pixels.shape)}, and this model sees (patches, {width}); the processor "
            "belongs to another model."
        )


def tower_places(config: Any, encoding: Mapping[str, Tensor]) -> list[tuple[int, int, int]]:
    """Image, row and column of each patch, in the order in which the patches stand in the vision tower's layers.

    The first of every `spatial_merge_size ** 2` of them says in which order the merger returns the tokens.
    """
    vision = config.vision_config
    merge, found = vision.spatial_merge_size, []
    for image, (high, wide) in enumerate(_counts(encoding, merge)):
        rows, columns = high // merge, wide // merge
        token = np.arange(rows * columns)
        if vision.model_type == "qwen2_5_vl_vision":
            side = vision.window_size // merge // vision.patch_size
            row, column = token // columns, token % columns
            token = token[np.lexsort((column % side, row % side, column // side, row // side))]
        within = [(i, j) for i in range(merge) for j in range(merge)]
        found += [
            (image, int(t // columns) * merge + i, int(t % columns) * merge + j) for t in token for i, j in within
        ]
    return found


def _counts(encoding: Mapping[str, Tensor], merge: int) -> list[tuple[int, int]]:
    """Patches of each image: how many high, how many wide."""
    counts = torch.as_tensor(encoding["image_grid_thw"]).tolist()
    for frames, high, wide in counts:
        if frames != 1 or high % merge or wide % merge:
            raise ValueError(
                f"image_grid_thw holds {frames} x {high} x {wide} patches, and a picture has one frame of a whole "
                f"number of {merge} x {merge} squares."
            )
    patches = sum(high * wide for _, high, wide in counts)
    held = encoding["pixel_values"].shape[0] if "pixel_values" in encoding else patches
    if held != patches:
        raise ValueError(f"pixel_values holds {held} patches, and image_grid_thw speaks of {patches}.")
    return [(high, wide) for _, high, wide in counts]


def _check(settings: Mapping[str, Any], size: tuple[int, int], seen: tuple[int, int]) -> None:
    """Whether the settings make the picture that the encoding holds.

    Raises:
        ValueError: for a processor that is not known, and where they do not.
    """
    name = settings["image_processor_type"]
    kind = next((kind for kind in FRAMES if name.startswith(kind)), None)
    if kind is None:
        raise ValueError(f"mechvlm does not know how {name} resizes pictures; it knows {' and '.join(FRAMES)}.")
    made = _resized(settings, size, FRAMES[kind]) if settings["do_resize"] else size
    if made != seen:
        raise ValueError(
            f"the processor makes pictures of {made[0]} x {made[1]} pixels from one of {size[0]} x {size[1]}, and "
            f"image_grid_thw speaks of {seen[0]} x {seen[1]}; the encoding was made with other settings or pictures."
        )


def check_sizes(_: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse pictures that the processor finds too long.

    Raises:
        ValueError: with the picture's size and what would be right.
    """
    for width, height in sizes:
        long, ratio = "wide as high" if width > height else "high as wide", max(width / height, height / width)
        if ratio > LONGEST:
            raise ValueError(
                f"a picture of {width} x {height} pixels is {ratio:.6g} times as {long}, and this model's processor "
                f"takes at most {LONGEST} times; cut it into parts, or pad it."
            )


def _resized(settings: Mapping[str, Any], size: tuple[int, int], frames: bool) -> tuple[int, int]:
    """Width and height after the processor's own resizing, rounded as it rounds (Python's `round`: halves to even)."""
    (width, height), factor = size, settings["patch_size"] * settings["merge_size"]
    shown = settings["temporal_patch_size"] if frames else 1
    if frames and min(width, height) < factor:
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    fewest, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    if shown * high * wide > most:
        beta = math.sqrt((shown * height * width) / most)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif shown * high * wide < fewest:
        beta = math.sqrt(fewest / (shown * height * width))
        high = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return wide, high
