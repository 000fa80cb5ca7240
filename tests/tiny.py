"""Tiny random LLaVA models and a real processor for them, made in milliseconds and without a download.

The picture is 24 x 24 pixels in patches of 6, so one image is 4 x 4 tokens; the language model has 3 layers of 4 heads.
Nothing here is trained: what a test wants to find in such a model, it has to put there.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import mechvlm as mv

SIDE, PATCH = 24, 6
GRID = SIDE // PATCH
TOKENS = GRID * GRID
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *(
        "user",
        "assistant",
        "human",
        "gpt",
        ":",
        ".",
        ",",
        "?",
        "yes",
        "no",
        "is",
        "there",
        "a",
        "an",
        "the",
        "in",
        "of",
    ),
    *("image", "red", "green", "blue", "cat", "dog", "left", "right", "what", "which", "colour", "how", "many", "and"),
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "{", "}"),
)
VOCABULARY = 64
IMAGE, BOS, EOS = SPECIAL.index("<image>"), SPECIAL.index("<s>"), SPECIAL.index("</s>")
CHAT = (
    "{% for message in messages %}HUMAN : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}GPT :{% endif %}"
)
"""A chat template that differs from LLaVA's documented prompt, so that a test can tell which one was used."""


def model(
    kv_heads: int = 2,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    layers: int = 3,
    vision_layers: int = 3,
    heads: int = 4,
    width: int = 32,
    feature_layer: int | list[int] = -2,
    strategy: str = "default",
    vocabulary: int = VOCABULARY,
    spread: float = 0.2,
    **more: Any,
) -> LlavaForConditionalGeneration:
    """A random LLaVA in evaluation mode.

    Args:
        kv_heads: 2 for grouped-query attention, 4 for one key-value head a head.
        attention: "sdpa" or "eager".
        spread: the standard deviation of the weights; wider than transformers' 0.02, so that attention is not uniform
            and every part matters to the answer.
        more: handed to LlamaConfig.
    """
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        **more,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # vectors such as the class token start from torch's own random numbers
        made = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return made.eval().requires_grad_(False).to(dtype)


def processor(
    chat: str | None = CHAT,
    *,
    resize: bool = True,
    size: dict[str, int] | None = None,
    crop: bool = True,
    crop_size: dict[str, int] | None = None,
    pad: bool = False,
    resample: int = 3,
    strategy: str = "default",
    mark: str = "<image>",
    **more: Any,
) -> LlavaProcessor:
    """A real LLaVA processor with a word-level tokenizer, for `model`.

    Args:
        chat: the chat template, or None for a processor without one.
        resize, size, crop, crop_size: the image processor's; by default the shortest edge and the crop are 24 pixels.
        pad: pad to a square first, as LLaVA's own image processor can.
        resample: Pillow's filter: 3 is bicubic, 2 bilinear, 0 takes the nearest pixel.
        mark: the image token.
        more: handed to the image processor.
    """
    words = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL[:-1], mark, *WORDS))}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[mark],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    square = {"height": SIDE, "width": SIDE}
    pictures = (LlavaImageProcessor if pad else CLIPImageProcessor)(
        do_resize=resize,
        size=size or {"shortest_edge": SIDE},
        do_center_crop=crop,
        crop_size=crop_size or square,
        resample=resample,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        **({"do_pad": True} if pad else {}),
        **more,
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        image_token=mark,
        chat_template=chat,
    )


def vlm(
    kv_heads: int = 2,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    with_processor: "bool | LlavaProcessor" = True,
    **more: Any,
) -> mv.VLM:
    """A `VLM` of `model`, with `processor()`, another processor, or none."""
    if isinstance(with_processor, bool):
        chosen = processor(strategy=more.get("strategy", "default")) if with_processor else None
    else:
        chosen = with_processor
    return mv.VLM(model(kv_heads, attention, dtype, seed, **more), chosen, name="tiny")


def picture(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A picture of random colours, different at every pixel."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoding(
    question: int = 7, prefix: int = 3, images: int = 1, seed: int = 0, tokens: int = TOKENS, gap: int = 2
) -> dict[str, torch.Tensor]:
    """A ready encoding of one prompt: some words, images with `gap` words between them, and a question, all random."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL), VOCABULARY, (count,), generator=generator)

    parts: list[torch.Tensor] = [torch.tensor([BOS]), words(prefix - 1)] if prefix else []
    for number in range(images):
        parts += [words(gap if number else 0), torch.full((tokens,), IMAGE)]
    ids = torch.cat([*parts, words(question)])[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        given["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return given
