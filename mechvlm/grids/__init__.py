"""How each family of image processors lays an image out in tokens: one function a family, from what it returned.

A function takes the model's configuration, the encoding of one prompt, what the image processor's settings say (None
for a ready encoding without one) and the sizes of the original pictures (width, height; None where they are not known),
and returns one `Grid` an image, in the order in which the images stand in the text.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from mechvlm.imagemap import Grid

NEEDED: dict[str, tuple[str, ...]] = {
    "llava_next": ("image_sizes",),
    "llava_onevision": ("image_sizes",),
    "mistral3": ("image_sizes",),
    "qwen2_vl": ("image_grid_thw", "mm_token_type_ids"),
    "qwen2_5_vl": ("image_grid_thw", "mm_token_type_ids"),
    "qwen3_vl": ("image_grid_thw", "mm_token_type_ids"),
    "glm4v": ("image_grid_thw", "mm_token_type_ids"),
    "paligemma": ("token_type_ids",),
    "gemma3": ("token_type_ids",),
    "molmo2": ("image_grids", "image_token_pooling", "image_num_crops", "mm_token_type_ids"),
    "mllama": ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"),
    "instructblip": ("qformer_input_ids",),
}
"""What an encoding of an image must hold besides, by the model's type: without it some models fail, and others run and
answer something else."""

PICTURED = ("blip-2", "instructblip", "paligemma")
"""The types of models that read no text without an image."""

_MARKED = {
    "gemma3": "token_type_ids",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), "mm_token_type_ids"),
}
_BY_POSITION = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
# Families whose processors keep a picture's proportions, and fail where that leaves nothing of a side.
_PROPORTIONED = ("patches", "pixtral")


def grids_of(
    family: str,
    config: Any,
    encoding: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    sizes: Sequence[tuple[int, int]] | None,
) -> list[Grid]:
    """How a model takes each image of a prompt.

    Args:
        family: the module of this package that knows its processor.

    Raises:
        ValueError: for an encoding, settings or sizes that do not fit together, or that are not undone.
    """
    ids = encoding.get("input_ids")
    if ids is None or ids.ndim != 2:
        return []  # no prompt at all, which is said where the prompt is made
    if encoding.get("pixel_values") is None:
        _check_pictured(config, 0)
        return []
    _check_parts(config, encoding, ids)
    if family == "patches":
        import_module("mechvlm.grids.patches").check_width(config, encoding["pixel_values"])
    return import_module(f"mechvlm.grids.{family}").grids(config, encoding, settings, sizes)


def check_pictures(family: str, config: Any, settings: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse pictures that a model's processor cannot take, before it fails over them.

    Raises:
        ValueError: with the picture's size, where there is one, and what would be right.
    """
    _check_pictured(config, len(sizes))
    if family in _PROPORTIONED and settings.get("do_resize"):
        import_module(f"mechvlm.grids.{family}").check_sizes(settings, sizes)


def _check_pictured(config: Any, count: int) -> None:
    if config.model_type in PICTURED and not count:
        raise ValueError(f"{config.model_type} models read no text without an image; give one.")


def _check_parts(config: Any, encoding: Mapping[str, Tensor], ids: Tensor) -> None:
    """Whether everything is there that the model reads with an image, and is of the same text."""
    for name in NEEDED.get(config.model_type, ()):
        if name not in encoding:
            raise ValueError(f"the encoding has pixel_values and no {name}; this model needs both.")
    for name in _BY_POSITION:
        if name in encoding and encoding[name].shape[:2] != ids.shape:
            raise ValueError(
                f"{name} has the shape {tuple(encoding[name].shape)} and input_ids {tuple(ids.shape)}; they must be of "
                "the same positions."
            )
    kinds = encoding.get(_MARKED.get(config.model_type, ""))
    if kinds is not None and not bool(((kinds == 1) == (ids == config.image_token_id)).all()):
        raise ValueError(
            f"{_MARKED[config.model_type]} must be 1 at the image tokens and nowhere else; encode words and pictures "
            "together."
        )
