"""Tiny PaliGemma (1 and 2) and Gemma 3 models, and their processors.

The SigLIP towers see squares of 32 pixels: PaliGemma in 4 x 4 patches of 8, each a token; Gemma 3 in 8 x 8 patches of
4, of which 2 x 2 are averaged into a token.
"""

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
)

from zoo import words
from zoo.llava import siglip, text
from zoo.variant import Variant
from zoo.weights import spread

SIDE, TOKENS = 32, 16
PALIGEMMA = ("<image>", "\n")
GEMMA3 = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TURNS = ("\n", "<start_of_turn>", "<end_of_turn>")
CHAT = (
    "<bos>{% for message in messages %}<start_of_turn>user\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
"""Gemma 3's chat template, with the words that the tokenizer knows."""

LOCATIONS = 1152
"""How many location and segment tokens PaliGemma's processor adds to its tokenizer."""


def model_paligemma(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, *, kind: type = GemmaConfig, **more: Any
) -> PreTrainedModel:
    """PaliGemma: Gemma with one key-value head and heads wider than d_model / heads; the whole prompt sees itself."""
    settings = {"num_key_value_heads": 1} if kind is GemmaConfig else {}
    config = PaliGemmaConfig(
        vision_config=siglip(SIDE, SIDE // 4),
        text_config=text(kind, **({"head_dim": 16, "vocab_size": words.VOCABULARY + LOCATIONS} | settings | more)),
        image_token_index=words.ids(PALIGEMMA)["<image>"],
        projection_dim=32,
        hidden_size=32,
    )
    return spread(PaliGemmaForConditionalGeneration, config, attention, dtype, seed)


def model_paligemma2(
    attention: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """PaliGemma 2: Gemma 2 with soft-capped scores and logits, and windows shorter than the prompt."""
    settings = {
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
    }
    return model_paligemma(attention, dtype, seed, kind=Gemma2Config, **(settings | more))


def processor_paligemma() -> PaliGemmaProcessor:
    """A processor; PaliGemma has no chat template, its documented prompt is the image and the words."""
    pictures = SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, image_seq_length=TOKENS)
    return PaliGemmaProcessor(pictures, words.tokenizer(PALIGEMMA, bos="<bos>", start=False))


def model_gemma3(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> PreTrainedModel:
    """Gemma 3: three windowed layers to one full, queries and keys normed, images that see themselves."""
    ids = words.ids(TURNS, GEMMA3)
    settings = {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    }
    config = Gemma3Config(
        vision_config=siglip(SIDE, SIDE // 8),
        text_config=text(Gemma3TextConfig, **(settings | more)),
        mm_tokens_per_image=TOKENS,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    return spread(Gemma3ForConditionalGeneration, config, attention, dtype, seed)


def processor_gemma3() -> Gemma3Processor:
    """A processor with pan and scan off, as it is by default."""
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        words.tokenizer(TURNS, GEMMA3, bos="<bos>", start=False),
        chat_template=CHAT,
        image_seq_length=TOKENS,
    )


VARIANTS: dict[str, Variant] = {
    "paligemma": Variant(model_paligemma, processor_paligemma),
    "paligemma2": Variant(model_paligemma2, processor_paligemma),
    "gemma3": Variant(model_gemma3, processor_gemma3),
}
