"""Pictures of any size, resized to whole tokens and padded to the largest of them: Pixtral and Mistral Small 3.

The encoding says how large each picture is without the padding (`image_sizes`). The text holds a row of image tokens, a
token of another kind at its end ([IMG_BREAK], or [IMG_END] after the last), and so on; only image tokens have places.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.imagemap import Grid, Tile


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid of squares an image, as wide and as high as the processor made it.

    Raises:
        ValueError: where the encoding, the settings and the configuration do not agree.
    """
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    patch = config.vision_config.patch_size
    token = patch * (config.spatial_merge_size if config.model_type == "mistral3" else 1)
    seen = _seen(encoding, token)
    if sizes is not None and len(sizes) != len(seen):
        raise ValueError(f"there are {len(sizes)} pictures, and pixel_values holds {len(seen)}; they must agree.")
    found = []
    for number, (high, wide) in enumerate(seen):
        size = (wide, high) if sizes is None else tuple(sizes[number])
        if settings is not None and sizes is not None:
            _check(settings, size, (wide, high), token)
        rows, columns = high // token, wide // token
        view = (0.0, 0.0, size[0] / wide, size[1] / high)
        tile = Tile(rows, columns, view, (token, token))
        places = tuple((0, row, column) for row in range(rows) for column in range(columns))
        found.append(Grid(size, (tile,), places, len(places), (1, (high // patch) * (wide // patch))))
    if config.model_type == "mistral3" and [grid.tokens for grid in found] == [1]:
        raise ValueError(  # the model squeezes away the axis of tokens, and then fails
            f"a picture of {size[0]} x {size[1]} pixels becomes a single image token, with which a mistral3 model "
            f"cannot run; give one of more than {token} pixels one way."
        )
    return found


def _seen(encoding: Mapping[str, Tensor], token: int) -> list[tuple[int, int]]:
    """Height and width of each picture that the model sees, without the padding."""
    pixels = encoding["pixel_values"]
    held = tuple(pixels.shape)
    # Without `image_sizes` the tower takes all of every picture.
    given = encoding.get("image_sizes", torch.tensor([held[-2:]] * held[0]))
    seen = [(int(high), int(wide)) for high, wide in torch.as_tensor(given).tolist()]
    if len(seen) != held[0] or any(high > held[-2] or wide > held[-1] for high, wide in seen):
        raise ValueError(f"image_sizes is {seen} and pixel_values is {held}; they must be of the same pictures.")
    if any(high < token or wide < token for high, wide in seen):
        raise ValueError(f"image_sizes is {seen}, and a token of this model is {token} x {token} pixels.")
    return seen


def _check(settings: Mapping[str, Any], size: tuple[int, int], seen: tuple[int, int], token: int) -> None:
    """Whether the settings make the picture that the encoding holds.

    Raises:
        ValueError: for a processor that is not known or that crops, and where they do not.
    """
    name = settings["image_processor_type"]
    if not name.startswith("PixtralImageProcessor"):
        raise ValueError(f"mechvlm does not know how {name} resizes pictures; Pixtral's is PixtralImageProcessor.")
    if settings.get("do_center_crop"):
        raise ValueError(
            f"{name} has do_center_crop=True, which mechvlm does not undo; set image_processor.do_center_crop = False."
        )
    made = _resized(settings["size"], size, token) if settings["do_resize"] else size
    if made != seen:
        raise ValueError(
            f"the processor makes pictures of {made[0]} x {made[1]} pixels from one of {size[0]} x {size[1]}, and "
            f"image_sizes speaks of {seen[0]} x {seen[1]}; the encoding was made with other settings or pictures."
        )


def check_sizes(settings: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse pictures of which the processor would leave nothing.

    Raises:
        ValueError: with the picture's size and what would be right.
    """
    for width, height in sizes:
        limit, narrow = settings["size"], "high" if width > height else "wide"
        if 0 in _shrunk(limit, (width, height)):
            raise ValueError(
                f"a picture of {width} x {height} pixels would be less than one pixel {narrow} when the processor has "
                f"resized it to {limit}; cut it into parts, or pad it."
            )


def _resized(limit: Mapping[str, int], size: tuple[int, int], token: int) -> tuple[int, int]:
    """Width and height after the processor's own resizing: not above the limit, then up to whole tokens."""
    width, height = _shrunk(limit, size)
    return ((width - 1) // token + 1) * token, ((height - 1) // token + 1) * token


def _shrunk(limit: Mapping[str, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height not above the limit."""
    width, height = size
    longest = limit.get("longest_edge")
    most = (longest, longest) if longest else (limit["width"], limit["height"])
    ratio = max(height / most[1], width / most[0])
    if ratio > 1:
        width, height = math.floor(width / ratio), math.floor(height / ratio)
    return width, height
