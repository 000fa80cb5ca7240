"""Tiny InstructBLIP and BLIP-2 models: a Q-Former's queries stand between the vision tower and the text.

The picture is 24 x 24 pixels in patches of 6; the Q-Former has 4 layers, of which 0 and 2 look at the patches.
"""

from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
)

from zoo.mute import mute
from zoo.variant import Variant
from zoo.weights import spread
from zoo.words import BOS, EOS, PAD, VOCABULARY, ids, tokenizer

SIDE, PATCH, QUERIES = 24, 6, 8
SPECIAL = ("<image>",)
IMAGE = ids(SPECIAL)["<image>"]

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QFORMER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_attention_frequency": 2,
    "max_position_embeddings": 128,
}


def _llama(more: dict[str, Any]) -> LlamaConfig:
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
    return LlamaConfig(**given | more)


def _opt(more: dict[str, Any]) -> OPTConfig:
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return OPTConfig(**given | more)


def _rest() -> dict[str, Any]:
    return {
        "vision_config": dict(VISION),
        "qformer_config": dict(QFORMER),
        "num_query_tokens": QUERIES,
        "image_token_index": IMAGE,
    }


def model_instructblip(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> InstructBlipForConditionalGeneration:
    """A random InstructBLIP whose text model is Llama, as Vicuna is; `more` goes to LlamaConfig."""
    config = InstructBlipConfig(text_config=_llama(more), **_rest())
    return mute(spread(InstructBlipForConditionalGeneration, config, attention, dtype, seed), [IMAGE])


def model_blip2_opt(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Blip2ForConditionalGeneration:
    """A random BLIP-2 whose text model is OPT; `more` goes to OPTConfig."""
    config = Blip2Config(text_config=_opt(more), **_rest())
    return mute(spread(Blip2ForConditionalGeneration, config, attention, dtype, seed), [IMAGE])


def model_blip2_llama(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Blip2ForConditionalGeneration:
    """A random BLIP-2 whose text model is Llama; `more` goes to LlamaConfig."""
    config = Blip2Config(text_config=_llama(more), **_rest())
    return mute(spread(Blip2ForConditionalGeneration, config, attention, dtype, seed), [IMAGE])


def _pictures() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})


def processor_instructblip() -> InstructBlipProcessor:
    """InstructBLIP's own processor; the family has no chat template, its prompt is the question itself."""
    return InstructBlipProcessor(
        _pictures(), tokenizer(SPECIAL), tokenizer(side="right", bos="[CLS]"), num_query_tokens=QUERIES
    )


def processor_blip2() -> Blip2Processor:
    """BLIP-2's own processor; its documented prompt is "Question: ... Answer:"."""
    return Blip2Processor(_pictures(), tokenizer(SPECIAL), num_query_tokens=QUERIES)


VARIANTS: dict[str, Variant] = {
    "instructblip": Variant(model_instructblip, processor_instructblip),
    "blip2-opt": Variant(model_blip2_opt, processor_blip2),
    "blip2-llama": Variant(model_blip2_llama, processor_blip2),
}
