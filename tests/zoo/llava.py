"""Tiny LLaVA, LLaVA-NeXT, LLaVA-OneVision and VipLLaVA models, and their processors.

The vision towers see squares of 24 pixels in patches of 6, so one square is 4 x 4 tokens.
"""

from collections.abc import Sequence
from typing import Any

import tiny
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from zoo import words
from zoo.variant import Variant
from zoo.weights import spread

SIDE, PATCH, LAYERS = 24, 6, 3
TOKENS = (SIDE // PATCH) ** 2
IMAGE, VIDEO = words.ids(["<image>", "<video>"]).values()
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
"""LLaVA-NeXT's list of resolutions, in units of this tower's square."""

MEAN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _many(side: int) -> list[list[int]]:
    """LLaVA-OneVision's list of resolutions, up to 4 x 4 squares instead of 6 x 6."""
    return [[side * rows, side * columns] for rows in range(1, 5) for columns in range(1, 5)]


def clip(**more: Any) -> CLIPVisionConfig:
    """A CLIP tower of three layers."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=more.pop("layers", LAYERS),
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        **more,
    )


def siglip(side: int = SIDE, patch: int = PATCH, **more: Any) -> SiglipVisionConfig:
    """A SigLIP tower of three layers, without the pooling head that no VLM uses."""
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
        **more,
    )


def text(kind: type, **more: Any) -> Any:
    """A language model of three layers with grouped-query attention."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": words.VOCABULARY,
        "max_position_embeddings": 1024,
        "bos_token_id": words.BOS,
        "eos_token_id": words.EOS,
        "pad_token_id": words.PAD,
    }
    return kind(**(settings | more))


def model_llava_siglip(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """LLaVA with a SigLIP tower, which has no class token, and a Mistral language model."""
    config = LlavaConfig(
        vision_config=siglip(),
        text_config=text(MistralConfig, sliding_window=None, **more),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    return spread(LlavaForConditionalGeneration, config, attention, dtype, seed)


def processor_llava_siglip() -> LlavaProcessor:
    """A processor for a tower without a class token."""
    return LlavaProcessor(
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}),
        words.tokenizer(["<image>", "<video>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=words.chat(),
    )


def model_llava_next(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, *, kind: type = LlamaConfig, **more: Any
) -> PreTrainedModel:
    """LLaVA-NeXT; with `kind` MistralConfig as in llava-v1.6-mistral, whose language model has no window."""
    settings = {"num_key_value_heads": 4} if kind is LlamaConfig else {"sliding_window": None}
    config = LlavaNextConfig(
        vision_config=clip(),
        text_config=text(kind, **(settings | more)),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        image_grid_pinpoints=PINPOINTS,
    )
    return spread(LlavaNextForConditionalGeneration, config, attention, dtype, seed)


def model_llava_next_mistral(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """LLaVA-NeXT with Mistral, grouped-query attention and no window."""
    return model_llava_next(attention, dtype, seed, kind=MistralConfig, **more)


def model_llava_next_sliding(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """LLaVA-NeXT with Mistral and a window that is shorter than any prompt with an image."""
    return model_llava_next(attention, dtype, seed, kind=MistralConfig, sliding_window=12, **more)


def processor_llava_next(**more: Any) -> LlavaNextProcessor:
    """A processor that cuts a picture into squares of 24 pixels; `more` goes to the image processor."""
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        **(MEAN | more),
    )
    return LlavaNextProcessor(
        pictures,
        words.tokenizer(["<image>", "<video>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat(),
    )


def model_llava_onevision(
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    aspect: str = "anyres_max_9",
    side: int = SIDE,
    **more: Any,
) -> PreTrainedModel:
    """LLaVA-OneVision: SigLIP and Qwen2.

    Args:
        aspect: says from how many tokens on the grid is made coarser.
        side: pixels along a side of a square; 26 leave a rest of 2 beside its patches, as 384 do with patches of 14.
    """
    config = LlavaOnevisionConfig(
        vision_config=siglip(side),
        text_config=text(Qwen2Config, bos_token_id=None, **more),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_many(side),
        vision_aspect_ratio=aspect,
    )
    return spread(LlavaOnevisionForConditionalGeneration, config, attention, dtype, seed)


def pictures_llava_onevision(side: int = SIDE, **more: Any) -> LlavaOnevisionImageProcessor:
    """The family's image processor; `side` as in `model_llava_onevision`."""
    return LlavaOnevisionImageProcessor(
        size={"height": side, "width": side}, image_grid_pinpoints=_many(side), **(MEAN | more)
    )


def processor_llava_onevision(aspect: str = "anyres_max_9") -> LlavaOnevisionProcessor:
    """The family's processor; it holds a video processor, and that needs torchvision."""
    from transformers import LlavaOnevisionVideoProcessor

    return LlavaOnevisionProcessor(
        pictures_llava_onevision(),
        words.tokenizer(["<image>", "<video>"], bos=None),
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=TOKENS,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect,
        chat_template=words.chat(),
    )


def encoding_llava_onevision(
    pictures: Sequence[Image.Image],
    question: str = "what is in the picture ?",
    seed: int = 0,
    *,
    nested: bool = False,
    aspect: str = "anyres_max_9",
    side: int = SIDE,
) -> dict[str, torch.Tensor]:
    """What the family's processor makes of some pictures and a question, images first, without torchvision.

    The number of tokens of a picture is the processor's own, asked of its class without making one.

    Args:
        nested: hand the pictures over as those of one prompt; several are then padded and not cut.
        aspect, side: as in `model_llava_onevision`.
    """
    del seed  # nothing here is random
    given: dict[str, Any] = {}
    marks = ""
    if pictures:
        held = [list(pictures)] if nested else list(pictures)
        given = dict(pictures_llava_onevision(side)(held, return_tensors="pt"))
        ruler = object.__new__(LlavaOnevisionProcessor)
        ruler.image_processor, ruler.num_image_tokens = pictures_llava_onevision(side), TOKENS
        ruler.vision_aspect_ratio, ruler.vision_feature_select_strategy = aspect, "full"
        ruler.image_token = "<image>"
        marks = "".join(ruler.replace_image_token(given, number) for number in range(len(pictures)))
    tokens = words.tokenizer(["<image>", "<video>"], bos=None)(f"HUMAN : {marks} {question} GPT :", return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **given}


def model_vipllava(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """VipLLaVA: a CLIP tower of four layers, of which three give the image features together."""
    config = VipLlavaConfig(
        vision_config=clip(layers=4),
        text_config=text(LlamaConfig, num_key_value_heads=4, **more),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layers=[-2, -4, 2],  # the name that both transformers 5.17 and 5.23 take
    )
    return spread(VipLlavaForConditionalGeneration, config, attention, dtype, seed)


def processor_vipllava() -> LlavaProcessor:
    """LLaVA's processor, which VipLLaVA uses too."""
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True, **MEAN
    )
    return LlavaProcessor(
        pictures,
        words.tokenizer(["<image>", "<video>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat(),
    )


def model_llava(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """LLaVA-1.5 of `tiny`, with grouped-query attention."""
    return tiny.model(2, attention, dtype, seed, **more)


VARIANTS: dict[str, Variant] = {
    "llava": Variant(model_llava, tiny.processor),
    "llava-siglip": Variant(model_llava_siglip, processor_llava_siglip),
    "llava_next-vicuna": Variant(model_llava_next, processor_llava_next),
    "llava_next-mistral": Variant(model_llava_next_mistral, processor_llava_next),
    "llava_next-sliding": Variant(model_llava_next_sliding, processor_llava_next),
    "llava_onevision": Variant(
        model_llava_onevision, processor_llava_onevision, encoding_llava_onevision, needs_torchvision=True
    ),
    "vipllava": Variant(model_vipllava, processor_vipllava),
}
