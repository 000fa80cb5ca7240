"""Tiny DeepSeek-VL: pictures resized by their longer edge and padded to a square of 24 x 24 pixels, 4 x 4 tokens."""

from typing import Any

import torch
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    LlamaConfig,
    SiglipVisionConfig,
)

from zoo.mute import mute
from zoo.variant import Variant
from zoo.weights import spread
from zoo.words import BOS, EOS, PAD, VOCABULARY, chat, ids, tokenizer

SIDE, PATCH = 24, 6
MARK = "<image_placeholder>"
NAMED = {"image_token": MARK}


def model_deepseek_vl(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> DeepseekVLForConditionalGeneration:
    """A random DeepSeek-VL; `more` goes to LlamaConfig."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = DeepseekVLConfig(
        vision_config=vision, text_config=LlamaConfig(**given | more), image_token_id=ids(named=NAMED)[MARK]
    )
    return mute(spread(DeepseekVLForConditionalGeneration, config, attention, dtype, seed), ids(named=NAMED).values())


def processor_deepseek_vl(min_size: int = 6) -> DeepseekVLProcessor:
    """DeepSeek-VL's own processor; `min_size` is the shortest an edge may become."""
    pictures = DeepseekVLImageProcessor(size={"height": SIDE, "width": SIDE}, min_size=min_size)
    return DeepseekVLProcessor(
        pictures, tokenizer(named=NAMED), chat_template=chat(MARK), num_image_tokens=(SIDE // PATCH) ** 2
    )


VARIANTS: dict[str, Variant] = {"deepseek_vl": Variant(model_deepseek_vl, processor_deepseek_vl)}
