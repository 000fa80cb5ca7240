"""A tiny random GLM-4.1V and its real processor: sandwich norms, a fused gate and up matrix, half-rotated heads."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from zoo import words
from zoo.variant import Variant
from zoo.weights import spread

PATCH, MERGE, TEMPORAL = 4, 2, 2
SIZE = {"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 48 * 48}
"""GLM counts the pixels of two frames, the picture shown twice."""

SPECIAL = (
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>", "<|image|>"),
    *("<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
IDS = words.ids(SPECIAL)
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
CHAT = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_glm4v(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """A random GLM-4.1V; `more` is its text configuration's."""
    text = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": words.VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 1],
        },
        "eos_token_id": words.EOS,
        "pad_token_id": words.PAD,
    } | more
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": 48,
        "intermediate_size": 64,
    }
    config = Glm4vConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IDS["<|image|>"],
        video_token_id=IDS["<|video|>"],
        image_start_token_id=IDS["<|begin_of_image|>"],
        image_end_token_id=IDS["<|end_of_image|>"],
        video_start_token_id=IDS["<|begin_of_video|>"],
        video_end_token_id=IDS["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    return spread(Glm4vForConditionalGeneration, config, attention, dtype, seed)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: no start token of its own, the template writes `[gMASK]<sop>`."""
    return words.tokenizer(SPECIAL, bos=None, eos="<|endoftext|>", start=False, chat_template=CHAT)


def pictures() -> Any:
    """The image processor."""
    return Glm4vImageProcessor(size=dict(SIZE), patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL)


def processor_glm4v() -> ProcessorMixin:
    """GLM-4.1V's real processor; it needs torchvision."""
    from transformers import Glm4vProcessor, Glm4vVideoProcessor

    films = Glm4vVideoProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL)
    return Glm4vProcessor(pictures(), tokenizer(), films, chat_template=CHAT)


def encoding_glm4v(pictures_: Sequence[Image.Image], said: str) -> dict[str, torch.Tensor]:
    """What the processor returns for a chat of some pictures and some words, made without torchvision."""
    seen = pictures()(images=list(pictures_), return_tensors="pt") if pictures_ else {}
    marks = "".join(
        IMAGE.replace("<|image|>", "<|image|>" * (int(grid.prod()) // MERGE**2))
        for grid in seen.get("image_grid_thw", [])
    )
    found = tokenizer()(f"[gMASK]<sop><|user|>{marks}{said}<|assistant|>", return_tensors="pt")
    ids = found["input_ids"]
    kinds = (ids == IDS["<|image|>"]).long()
    return {"input_ids": ids, "attention_mask": found["attention_mask"], "mm_token_type_ids": kinds, **seen}


VARIANTS: dict[str, Variant] = {
    "glm4v": Variant(model_glm4v, processor_glm4v, encoding_glm4v, needs_torchvision=True),
}
