"""A tiny random InternVL and its real processor: up to four tiles of 24 x 24 pixels and a thumbnail.

A tile is 3 x 3 tokens of 8 pixels, each four patches of 4.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from zoo import words
from zoo.variant import Variant
from zoo.weights import spread

SIDE, PATCH, TILES = 24, 4, 4
TOKENS = (SIDE // PATCH // 2) ** 2
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL = ("<|im_start|>",)
IDS = words.ids(SPECIAL, NAMED)
CHAT = (
    "<|im_start|>system answer short .<|im_end|>"
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def model_internvl(
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    language: str = "qwen2",
    vision: dict[str, Any] | None = None,
    **more: Any,
) -> PreTrainedModel:
    """A random InternVL.

    Args:
        language: the language model: "qwen2" (InternVL 2.5 and 3) or "qwen3" (InternVL 3.5).
        vision: laid over the vision tower's configuration.
        more: laid over the language model's.
    """
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
        "layer_scale_init_value": 0.5,
        "norm_type": "layer_norm",
    } | (vision or {})
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": words.VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": words.EOS,
        "pad_token_id": words.PAD,
        "tie_word_embeddings": False,
    } | more
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower),
        text_config=AutoConfig.for_model(language, **text),
        image_token_id=IDS["<IMG_CONTEXT>"],
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return spread(InternVLForConditionalGeneration, config, attention, dtype, seed)


def model_internvl_qwen3(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """A random InternVL 3.5: Qwen3's language model, and the large tower's norms, also of queries and keys."""
    tower = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
    return model_internvl(attention, dtype, seed, language="qwen3", vision=tower, **{"head_dim": 16, **more})


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, with the names of the special tokens that the processor asks it for."""
    return words.tokenizer(
        SPECIAL, NAMED, bos=None, eos="<|im_end|>", pad="<|endoftext|>", start=False, chat_template=CHAT
    )


def pictures() -> Any:
    """The image processor."""
    return GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=TILES
    )


def processor_internvl() -> ProcessorMixin:
    """InternVL's real processor; it needs torchvision."""
    from transformers import InternVLProcessor, InternVLVideoProcessor

    films = InternVLVideoProcessor(size={"height": SIDE, "width": SIDE})
    return InternVLProcessor(pictures(), tokenizer(), films, image_seq_length=TOKENS, chat_template=CHAT)


def encoding_internvl(pictures_: Sequence[Image.Image], said: str) -> dict[str, torch.Tensor]:
    """What the processor returns for a chat of some pictures and some words, made without torchvision."""
    seen = pictures()(images=list(pictures_), return_tensors="pt") if pictures_ else {}
    marks = "".join(
        "<img>" + "<IMG_CONTEXT>" * (TOKENS * int(count)) + "</img>" for count in seen.pop("num_patches", [])
    )
    text = f"<|im_start|>system answer short .<|im_end|><|im_start|>user {marks}{said}<|im_end|><|im_start|>assistant "
    found = tokenizer()(text, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], **seen}


VARIANTS: dict[str, Variant] = {
    "internvl": Variant(model_internvl, processor_internvl, encoding_internvl, needs_torchvision=True),
    "internvl-qwen3": Variant(model_internvl_qwen3, processor_internvl, encoding_internvl, needs_torchvision=True),
}
