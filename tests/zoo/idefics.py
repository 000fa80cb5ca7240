"""Tiny Idefics3 and SmolVLM models, and their processors.

The vision towers see squares of 24 pixels in 6 x 6 patches of 4; pixel shuffle makes one token of 2 x 2 patches, so one
square is 3 x 3 tokens. A picture is resized until its longer side is 3 squares and cut; all of it follows, in one
square.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)

from zoo import words
from zoo.llava import text
from zoo.variant import Variant
from zoo.weights import spread

SIDE, PATCH, SCALE, TOKENS = 24, 4, 2, 9
MOST = 3
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
SPECIAL = (
    *("<image>", FAKE, GLOBAL, "<end_of_utterance>", "\n"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
PICTURES = {
    "size": {"longest_edge": MOST * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def pictures_of(arch: str, **more: Any) -> Any:
    """The image processor of "idefics3" or "smolvlm"; `more` goes to it."""
    if importlib.util.find_spec("torchvision") is None:
        # By their own modules: transformers 5.17 gives these classes out only where torchvision is.
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Idefics3
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil as SmolVLM
    else:
        from transformers import Idefics3ImageProcessor as Idefics3
        from transformers import SmolVLMImageProcessor as SmolVLM
    return {"idefics3": Idefics3, "smolvlm": SmolVLM}[arch](**(PICTURES | more))


def _config(kind: type, side: int, more: dict[str, Any]) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": PATCH,
    }
    return kind(
        vision_config=vision,
        text_config=text(LlamaConfig, **more),
        image_token_id=words.ids(SPECIAL)["<image>"],
        scale_factor=SCALE,
        pad_token_id=words.PAD,
    )


def model_idefics3(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, *, side: int = SIDE, **more: Any
) -> PreTrainedModel:
    """Idefics3, with a Llama language model; `side` of a square is in pixels."""
    return spread(Idefics3ForConditionalGeneration, _config(Idefics3Config, side, more), attention, dtype, seed)


def processor_idefics3(**more: Any) -> Idefics3Processor:
    """A processor that cuts pictures into squares; `more` goes to the image processor."""
    return Idefics3Processor(
        pictures_of("idefics3", **more),
        words.tokenizer(SPECIAL),
        image_seq_len=TOKENS,
        chat_template=words.chat(),
    )


def model_smolvlm(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, *, side: int = SIDE, **more: Any
) -> PreTrainedModel:
    """SmolVLM, with a Llama language model; `side` of a square is in pixels."""
    return spread(SmolVLMForConditionalGeneration, _config(SmolVLMConfig, side, more), attention, dtype, seed)


def processor_smolvlm(**more: Any) -> SmolVLMProcessor:
    """The family's processor; it holds a video processor, and that needs torchvision and num2words."""
    from transformers import SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    if processing_smolvlm.num2words is None:
        # It spells out how many frames a video has, and nothing else; no test here shows a video.
        processing_smolvlm.num2words = str
    return SmolVLMProcessor(
        pictures_of("smolvlm", **more),
        words.tokenizer(SPECIAL),
        SmolVLMVideoProcessor(),
        image_seq_len=TOKENS,
        chat_template=words.chat(),
    )


def encoding_smolvlm(
    pictures: Sequence[Image.Image], question: str = "what is in the picture ?", seed: int = 0, **more: Any
) -> dict[str, torch.Tensor]:
    """What the family's processor makes of some pictures and a question, images first, without torchvision.

    Args:
        more: handed to the image processor.
    """
    del seed  # nothing here is random
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    given: dict[str, Any] = {}
    marks = ""
    if pictures:
        seen = pictures_of("smolvlm", **more)
        given = dict(seen([list(pictures)], return_tensors="pt", return_row_col_info=True))
        pairs = zip(given.pop("rows")[0], given.pop("cols")[0], strict=True)
        marks = "".join(get_image_prompt_string(*pair, TOKENS, FAKE, "<image>", GLOBAL) for pair in pairs)
    tokens = words.tokenizer(SPECIAL)(f"HUMAN : {marks} {question} GPT :", return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **given}


VARIANTS: dict[str, Variant] = {
    "idefics3": Variant(model_idefics3, processor_idefics3),
    "smolvlm": Variant(model_smolvlm, processor_smolvlm, encoding_smolvlm, needs_torchvision=True),
}
