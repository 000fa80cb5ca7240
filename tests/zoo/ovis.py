"""Tiny Ovis2: tiles whose patches become a softmax over a visual vocabulary, and visual words between the tiles.

A tile is 24 x 24 pixels in patches of 4, two by two of which make one token: 3 x 3 tokens a tile.
"""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2ImageProcessor,
    Ovis2Processor,
    Qwen2Config,
)
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from zoo.mute import mute
from zoo.variant import Variant
from zoo.weights import spread
from zoo.words import BOS, EOS, PAD, VOCABULARY, chat, ids, tokenizer

SIDE, PATCH, STRIDE, TILES = 24, 4, 2, 6
TOKENS = (SIDE // PATCH // STRIDE) ** 2
INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
SPECIAL = ("<image>", "<IMG_ATOM>", *INDICATORS)
IDS = ids(SPECIAL)


def model_ovis2(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Ovis2ForConditionalGeneration:
    """A random Ovis2 whose text model is Qwen2; `more` goes to Qwen2Config."""
    vision = Ovis2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vocab_size=64 + len(INDICATORS),
        hidden_stride=STRIDE,
        num_visual_indicator_tokens=len(INDICATORS),
    )
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = Ovis2Config(
        vision_config=vision,
        text_config=Qwen2Config(**given | more),
        image_token_id=IDS["<IMG_ATOM>"],
        visual_indicator_token_ids=[IDS[token] for token in INDICATORS],
        vocab_size=VOCABULARY,
        hidden_size=32,
    )
    made = spread(Ovis2ForConditionalGeneration, config, attention, dtype, seed)
    with torch.no_grad():
        # A softmax over many visual words averages their embeddings nearly away.
        made.model.visual_embeddings_table.weight.mul_(5)
    return mute(made, IDS.values())


def processor_ovis2(crop: bool = True) -> Ovis2Processor:
    """Ovis2's own processor, which cuts pictures into tiles."""
    # transformers 5.17 does not fall back to the second by itself where torchvision is missing.
    made = Ovis2ImageProcessor if find_spec("torchvision") else Ovis2ImageProcessorPil
    pictures = made(size={"height": SIDE, "width": SIDE}, crop_to_patches=crop, max_patches=TILES)
    return Ovis2Processor(
        pictures,
        tokenizer(SPECIAL, start=False),
        chat_template=chat("<image>"),
        image_seq_length=TOKENS,
    )


VARIANTS: dict[str, Variant] = {"ovis2": Variant(model_ovis2, processor_ovis2)}
