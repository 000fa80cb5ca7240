"""Tiny Mllama: text layers 1 and 3 look at the picture by cross-attention, and do nothing else.

A picture is up to 4 tiles of 16 x 16 pixels in patches of 4, so each tile is a class token and 16 patches; the vision
tower pads them to 24.
"""

from typing import Any

import torch
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from zoo.mute import mute
from zoo.variant import Variant
from zoo.weights import spread
from zoo.words import BOS, EOS, PAD, VOCABULARY, chat, ids, tokenizer

SIDE, PATCH, TILES = 16, 4, 4
SPECIAL = ("<|image|>", "<|python_tag|>")
IMAGE = ids(SPECIAL)["<|image|>"]


def model_mllama(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> MllamaForConditionalGeneration:
    """A random Mllama with its gates open; `more` goes to MllamaTextConfig."""
    vision = MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_global_layers=2,
        attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        max_num_tiles=TILES,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=3 * 32,
    )
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = MllamaConfig(vision_config=vision, text_config=MllamaTextConfig(**given | more), image_token_index=IMAGE)
    made = spread(MllamaForConditionalGeneration, config, attention, dtype, seed)
    with torch.no_grad():
        # transformers starts every gate at zero or near it, and the picture would not be looked at.
        for name, weight in made.named_parameters():
            if weight.numel() == 1 and "gate" in name:
                weight.add_(0.5)
    return mute(made, ids(SPECIAL).values())


def processor_mllama() -> MllamaProcessor:
    """Mllama's own processor."""
    pictures = MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=TILES)
    return MllamaProcessor(pictures, tokenizer(SPECIAL, start=False), chat_template=chat("<|image|>"))


VARIANTS: dict[str, Variant] = {"mllama": Variant(model_mllama, processor_mllama)}
