"""Tiny random Mistral Small 3.1 and Pixtral (a "llava" with Pixtral's tower), and their real processor.

Pixtral's tower takes pictures of any size, packed into one sequence. A token is 8 pixels wide in both: one patch of 8
in Pixtral, 2 x 2 merged patches of 4 in Mistral Small.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from zoo import words
from zoo.variant import Variant
from zoo.weights import spread

TOKEN, LONGEST = 8, 48
SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")
IDS = words.ids(SPECIAL)
CHAT = (
    "{% for message in messages %}[INST]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}[/INST]{% endfor %}"
)


def _tower(patch: int, more: dict[str, Any] | None) -> PixtralVisionConfig:
    return PixtralVisionConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": patch,
        }
        | (more or {})
    )


def _text(more: dict[str, Any]) -> MistralConfig:
    return MistralConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": words.VOCABULARY,
            "max_position_embeddings": 512,
            "sliding_window": None,
            "bos_token_id": words.BOS,
            "eos_token_id": words.EOS,
            "pad_token_id": words.PAD,
        }
        | more
    )


def model_mistral3(
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    vision: dict[str, Any] | None = None,
    **more: Any,
) -> PreTrainedModel:
    """A random Mistral Small 3.1; `vision` is laid over the tower's configuration, `more` over the text's."""
    config = Mistral3Config(
        vision_config=_tower(TOKEN // 2, vision),
        text_config=_text(more),
        image_token_index=IDS["[IMG]"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return spread(Mistral3ForConditionalGeneration, config, attention, dtype, seed)


def model_pixtral(
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    vision: dict[str, Any] | None = None,
    **more: Any,
) -> PreTrainedModel:
    """A random Pixtral; `vision` is laid over the tower's configuration, `more` over the text's."""
    config = LlavaConfig(
        vision_config=_tower(TOKEN, vision),
        text_config=_text(more),
        image_token_index=IDS["[IMG]"],
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return spread(LlavaForConditionalGeneration, config, attention, dtype, seed)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of both."""
    return words.tokenizer(SPECIAL, chat_template=CHAT)


def pictures(patch: int) -> Any:
    """The image processor, for a tower of some patch size."""
    return PixtralImageProcessor(size={"longest_edge": LONGEST}, patch_size={"height": patch, "width": patch})


def processor_mistral3() -> ProcessorMixin:
    """Mistral Small's real processor, which is Pixtral's; it needs torchvision."""
    from transformers import PixtralProcessor

    return PixtralProcessor(
        pictures(TOKEN // 2), tokenizer(), patch_size=TOKEN // 2, spatial_merge_size=2, chat_template=CHAT
    )


def processor_pixtral() -> ProcessorMixin:
    """Pixtral's real processor; it needs torchvision."""
    from transformers import PixtralProcessor

    return PixtralProcessor(pictures(TOKEN), tokenizer(), patch_size=TOKEN, spatial_merge_size=1, chat_template=CHAT)


def encoding(pictures_: Sequence[Image.Image], said: str) -> dict[str, torch.Tensor]:
    """What either processor returns for a chat of some pictures and some words, made without torchvision.

    The processor resizes to whole tokens, whatever patch size the image processor itself holds.
    """
    seen = pictures(TOKEN)(images=list(pictures_), return_tensors="pt") if pictures_ else {}
    marks = ""
    for height, width in torch.as_tensor(seen.get("image_sizes", [])).tolist():
        row = "[IMG]" * (width // TOKEN)
        marks += "[IMG_BREAK]".join([row] * (height // TOKEN)) + "[IMG_END]"
    found = tokenizer()(f"[INST]{marks}{said}[/INST]", return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], **seen}


VARIANTS: dict[str, Variant] = {
    "mistral3": Variant(model_mistral3, processor_mistral3, encoding, needs_torchvision=True),
    "llava-pixtral": Variant(model_pixtral, processor_pixtral, encoding, needs_torchvision=True),
}
