"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and their real processors.

A patch is 4 pixels wide, so a token (2 x 2 merged patches) is 8. A picture is seen with at most 2304 pixels, that is 36
tokens. The vision tower is half as wide as the language model, so that no test takes one for the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from zoo import words
from zoo.variant import Variant
from zoo.weights import spread

PATCH, MERGE, TEMPORAL = 4, 2, 2
SIZE = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
SPECIAL = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDS = words.ids(SPECIAL)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
HEAD = "<|im_start|>system answer short .<|im_end|><|im_start|>user "
TAIL = "<|im_end|><|im_start|>assistant "
CHAT = (
    "<|im_start|>system answer short .<|im_end|>"
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def _text(rope: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": words.VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | rope,
        "bos_token_id": None,
        "eos_token_id": words.EOS,
        "pad_token_id": words.PAD,
    } | more


def _vision(more: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": 4,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    } | more


def _ids() -> dict[str, int]:
    return {
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def model_qwen2_vl(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """A random Qwen2-VL; `more` is its text configuration's."""
    vision = _vision({"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2})
    config = Qwen2VLConfig(text_config=_text({"mrope_section": [2, 1, 1]}, more), vision_config=vision, **_ids())
    return spread(Qwen2VLForConditionalGeneration, config, attention, dtype, seed)


def model_qwen2_5_vl(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """A random Qwen2.5-VL, whose vision layers 0 and 2 look at windows of 2 x 2 tokens; `more` is its text's."""
    vision = _vision(
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 2 * PATCH * MERGE,
            "fullatt_block_indexes": [1, 3],
        }
    )
    config = Qwen2_5_VLConfig(text_config=_text({"mrope_section": [2, 1, 1]}, more), vision_config=vision, **_ids())
    return spread(Qwen2_5_VLForConditionalGeneration, config, attention, dtype, seed)


def model_qwen3_vl(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """A random Qwen3-VL, whose vision layers 0 and 2 also feed the first text layers; `more` is its text's."""
    vision = _vision(
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        }
    )
    text = _text({"mrope_section": [4, 2, 2], "mrope_interleaved": True}, {"head_dim": 16, **more})
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_ids())
    return spread(Qwen3VLForConditionalGeneration, config, attention, dtype, seed)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all three: no start token, padding on the left."""
    return words.tokenizer(SPECIAL, bos=None, eos="<|im_end|>", pad="<|endoftext|>", start=False, chat_template=CHAT)


def pictures() -> Any:
    """The image processor of all three."""
    return Qwen2VLImageProcessor(size=dict(SIZE), patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL)


def processor_qwen2_vl() -> ProcessorMixin:
    """Qwen2-VL's real processor; it needs torchvision."""
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(pictures(), tokenizer(), _films(Qwen2VLVideoProcessor), chat_template=CHAT)


def processor_qwen2_5_vl() -> ProcessorMixin:
    """Qwen2.5-VL's real processor; it needs torchvision."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(pictures(), tokenizer(), _films(Qwen2VLVideoProcessor), chat_template=CHAT)


def processor_qwen3_vl() -> ProcessorMixin:
    """Qwen3-VL's real processor; it needs torchvision."""
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(pictures(), tokenizer(), _films(Qwen3VLVideoProcessor), chat_template=CHAT)


def _films(kind: Callable[..., Any]) -> Any:
    return kind(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL)


def encoding(pictures_: Sequence[Image.Image], said: str) -> dict[str, torch.Tensor]:
    """What any of the three processors returns for a chat of some pictures and some words, made without torchvision."""
    seen = pictures()(images=list(pictures_), return_tensors="pt") if pictures_ else {}
    marks = "".join(
        IMAGE.replace("<|image_pad|>", "<|image_pad|>" * (int(grid.prod()) // MERGE**2))
        for grid in seen.get("image_grid_thw", [])
    )
    found = tokenizer()(f"{HEAD}{marks}{said}{TAIL}", return_tensors="pt")
    ids = found["input_ids"]
    kinds = (ids == IDS["<|image_pad|>"]).long()
    return {"input_ids": ids, "attention_mask": found["attention_mask"], "mm_token_type_ids": kinds, **seen}


VARIANTS: dict[str, Variant] = {
    "qwen2_vl": Variant(model_qwen2_vl, processor_qwen2_vl, encoding, needs_torchvision=True),
    "qwen2_5_vl": Variant(model_qwen2_5_vl, processor_qwen2_5_vl, encoding, needs_torchvision=True),
    "qwen3_vl": Variant(model_qwen3_vl, processor_qwen3_vl, encoding, needs_torchvision=True),
}
