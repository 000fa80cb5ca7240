"""A tiny Aya Vision model and its processor.

The SigLIP tower sees squares of 24 pixels in 6 x 6 patches of 4; pixel shuffle makes one token of 2 x 2 patches.
"""

from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    GotOcr2ImageProcessor,
    PreTrainedModel,
)

from zoo import words
from zoo.llava import siglip, text
from zoo.variant import Variant
from zoo.weights import spread

SIDE, PATCH, DOWN = 24, 4, 2
MOST = 6
PATCH_TOKEN = "<|IMG_PATCH|>"
SPECIAL = (
    *("<image>", PATCH_TOKEN, "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
    *(f"TILE_{number}" for number in range(1, MOST + 1)),
)


def model_aya_vision(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """Aya Vision: Cohere 2, whose attention and MLP read the same norm; three windowed layers to one without places."""
    settings = {"num_hidden_layers": 4, "sliding_window": 8, "logit_scale": 0.25}
    config = AyaVisionConfig(
        vision_config=siglip(SIDE, PATCH),
        text_config=text(Cohere2Config, **(settings | more)),
        image_token_index=words.ids(SPECIAL)[PATCH_TOKEN],
        downsample_factor=DOWN,
    )
    return spread(AyaVisionForConditionalGeneration, config, attention, dtype, seed)


def processor_aya_vision(**more: Any) -> AyaVisionProcessor:
    """A processor that cuts a picture into up to six squares; `more` goes to the image processor."""
    settings = {"max_patches": MOST, "min_patches": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return AyaVisionProcessor(
        GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, **(settings | more)),
        words.tokenizer(SPECIAL),
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=DOWN,
        chat_template=words.chat(),
    )


VARIANTS: dict[str, Variant] = {"aya_vision": Variant(model_aya_vision, processor_aya_vision)}
