"""Images that become one square and one grid: LLaVA, VipLLaVA, PaliGemma and Gemma 3.

The square is made by resizing, padding or cropping; Gemma 3 then averages blocks of patches into a token.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor

from mechvlm.imagemap import Grid, Place, Tile, View

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""How many positions stand before the patches, by the type of the vision tower."""

_KEEPS = {"vipllava": "default", "paligemma": "full", "gemma3": "full"}
"""What a model keeps of its tower's positions, where its configuration does not say: without the first, or all."""


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid of squares an image; a class token before it where the model keeps it."""
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if sizes is not None and len(sizes) != pixels.shape[0]:
        raise ValueError(
            f"pixel_values hold {pixels.shape[0]} pictures for {len(sizes)} images; there must be one an image."
        )
    if settings is not None and settings.get("do_pan_and_scan"):
        raise ValueError(
            "the image processor has do_pan_and_scan=True, and mechvlm undoes no crops of Gemma 3; set "
            "image_processor.do_pan_and_scan = False."
        )
    places, positions = places_of(config)
    rows, wide = _tokens(config, side, patch)
    found = []
    for number in range(pixels.shape[0]):
        size = (side, side) if sizes is None else (sizes[number][0], sizes[number][1])
        view = (0.0, 0.0, size[0] / side, size[1] / side)
        if settings is not None:
            view = view_of(settings, size, (side, side))
        found.append(Grid(size, (Tile(rows, rows, view, (wide, wide)),), places, len(places), (1, positions)))
    # After the settings, which say why where a processor made them.
    if tuple(pixels.shape[1:]) != (3, side, side):
        raise ValueError(f"pixel_values are {tuple(pixels.shape)}; this model sees (images, 3, {side}, {side}).")
    return found


def places_of(config: Any) -> tuple[tuple[Place | None, ...], int]:
    """What the tokens of one square stand for, and how many positions the vision tower has for it.

    Raises:
        ValueError: for a vision tower whose positions are not known.
    """
    vision = config.vision_config
    if vision.model_type not in _CLASS_TOKENS:
        raise ValueError(
            f"the vision tower is a {vision.model_type!r}; mechvlm knows the positions of "
            f"{' and '.join(map(repr, sorted(_CLASS_TOKENS)))}."
        )
    classes = _CLASS_TOKENS[vision.model_type]
    rows = _tokens(config, vision.image_size, vision.patch_size)[0]
    all_of = (*[None] * classes, *[(0, row, column) for row in range(rows) for column in range(rows)])
    # "default" leaves the first position out, whatever it is.
    keeps = _KEEPS.get(config.model_type) or config.vision_feature_select_strategy
    positions = classes + (vision.image_size // vision.patch_size) ** 2
    return all_of[keeps == "default" :], positions


def _tokens(config: Any, side: int, patch: int) -> tuple[int, int]:
    """Tokens along a side of the square, and the pixels along a side of a token."""
    if config.model_type != "gemma3":
        return side // patch, patch
    rows = isqrt(config.mm_tokens_per_image)
    pooled = side // patch // rows
    return rows, pooled * patch


def view_of(settings: Mapping[str, Any], size: tuple[int, int], seen: tuple[int, int]) -> View:
    """How the picture a CLIP, SigLIP or LLaVA image processor hands to the model lies in the original picture.

    Args:
        size: width and height of the original.
        seen: height and width of what the model sees.

    Raises:
        ValueError: for a way to pad, resize or crop that is not known, or that makes pictures of another size.
    """
    (width, height), left, top = size, 0.0, 0.0
    if settings.get("do_pad") and not settings["image_processor_type"].startswith("LlavaImageProcessor"):
        raise ValueError(
            f"{settings['image_processor_type']} has do_pad=True, and mechvlm undoes the padding of "
            "LlavaImageProcessor only; set image_processor.do_pad = False."
        )
    if settings.get("do_pad") and width != height:
        side = max(width, height)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        width = height = side
    x_scale = y_scale = 1.0
    if settings.get("do_resize"):
        new_width, new_height = _resized(settings["size"], width, height)
        x_scale, y_scale = width / new_width, height / new_height
        width, height = new_width, new_height
    if settings.get("do_center_crop"):
        crop = settings["crop_size"]
        left += _cropped(width, crop["width"]) * x_scale
        top += _cropped(height, crop["height"]) * y_scale
        width, height = crop["width"], crop["height"]
    if (height, width) != tuple(seen):
        raise ValueError(
            f"the processor makes pictures of {width} x {height} pixels from one of {size[0]} x {size[1]}, and this "
            f"model sees {seen[1]} x {seen[0]}; the processor belongs to another model."
        )
    return left, top, x_scale, y_scale


def _resized(size: dict[str, int], width: int, height: int) -> tuple[int, int]:
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(
            f"the processor resizes pictures to {size}, and mechvlm undoes only a 'shortest_edge', or 'height' and "
            "'width'; set image_processor.size to one of these."
        )
    short = size.get("shortest_edge")
    if short is None:
        return size["width"], size["height"]
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _cropped(length: int, crop: int) -> float:
    """How many pixels a centre crop takes from the start; negative where it pads instead."""
    if crop <= length:
        return float((length - crop) // 2)
    return -float((crop - length + 1) // 2)
