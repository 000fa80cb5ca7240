"""InstructBLIP and BLIP-2: one square of patches an image, which a Q-Former's queries read for the text.

A query stands for no place. What the grid places are the patches of the vision tower; the way from queries to patches
is the Q-Former's own cross-attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechvlm.grids.square import view_of
from mechvlm.imagemap import Grid, Tile


def grids(
    config: Any, encoding: Mapping[str, Tensor], settings: Mapping[str, Any] | None, sizes: Sequence | None
) -> list[Grid]:
    """One grid of patches, a class token before them; the image takes as many tokens as there are queries.

    Raises:
        ValueError: for several images, which these models cannot take in one prompt, and for pictures that are not of
            the size the vision tower was made for.
    """
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return []
    if pixels.shape[0] > 1:
        raise ValueError(
            f"this prompt has {pixels.shape[0]} images, and {config.model_type} writes the queries of one before the "
            "words; ask about one image at a time."
        )
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(
            f"the encoding's pictures are {pixels.shape[-1]} x {pixels.shape[-2]} pixels, and this model sees {side} x "
            f"{side}; the processor belongs to another model."
        )
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        if name in encoding and encoding[name].shape != (1, *encoding["qformer_input_ids"].shape[1:]):
            raise ValueError(
                f"{name} has the shape {tuple(encoding[name].shape)}, and the question is one text of "
                f"{encoding['qformer_input_ids'].shape[-1]} positions; encode words and picture together."
            )
    count = side // patch
    size = (side, side) if sizes is None else sizes[0]
    view = (0.0, 0.0, size[0] / side, size[1] / side)
    if settings is not None:
        view = view_of(settings, size, (side, side))
    tile = Tile(count, count, view, (patch, patch))
    places = (None, *[(0, row, column) for row in range(count) for column in range(count)])
    return [Grid(size, (tile,), places, config.num_query_tokens, (1, len(places)), of="patches")]
