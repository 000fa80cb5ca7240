"""Tiny Molmo2: one view of the whole picture and overlapping crops of it, whose patches an attention pools to tokens.

A crop is 20 x 20 pixels in patches of 4; two by two patches are pooled, so the last row and column of a view hold one
patch only, as in the released models. The family's image processor needs torchvision, and transformers has it from
5.20 on, so everything is imported where it is used.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from zoo.mute import mute
from zoo.variant import Variant
from zoo.weights import spread
from zoo.words import BOS, EOS, PAD, VOCABULARY, chat, ids, tokenizer

SIDE, PATCH, MARGINS, POOL, CROPS = 20, 4, (1, 1), (2, 2), 6
SPECIAL = (
    *("<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>"),
    *("<frame_start>", "<im_end>", "<frame_end>", "<im_low>"),
)
IDS = ids(SPECIAL)
MARK = "<|image|>"


def model_molmo2(attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A random Molmo2; `more` goes to Molmo2TextConfig."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration
    from transformers.models.molmo2.configuration_molmo2 import (
        Molmo2AdapterConfig,
        Molmo2TextConfig,
        Molmo2VisionConfig,
    )

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision = Molmo2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        image_size=[SIDE, SIDE],
        patch_size=PATCH,
        **heads,
    )
    adapter = Molmo2AdapterConfig(
        vision_feature_layer=[2, 1], hidden_size=32, intermediate_size=64, text_hidden_size=32, **heads
    )
    given = {
        "vocab_size": VOCABULARY,
        "additional_vocab_size": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=Molmo2TextConfig(**given | more),
        image_start_token_id=IDS["<im_start>"],
        low_res_image_start_token_id=IDS["<low_res_im_start>"],
        image_end_token_id=IDS["<im_end>"],
        image_patch_id=IDS["<im_patch>"],
        frame_start_token_id=IDS["<frame_start>"],
        frame_end_token_id=IDS["<frame_end>"],
    )
    return mute(spread(Molmo2ForConditionalGeneration, config, attention, dtype, seed), IDS.values())


def settings() -> dict[str, Any]:
    """What the image processor is made with."""
    return {
        "size": {"height": SIDE, "width": SIDE},
        "patch_size": PATCH,
        "overlap_margins": list(MARGINS),
        "pooling_size": list(POOL),
        "max_crops": CROPS,
    }


def processor_molmo2() -> Any:
    """Molmo2's own processor; needs torchvision."""
    from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

    words = tokenizer(SPECIAL, start=False)
    return Molmo2Processor(Molmo2ImageProcessor(**settings()), Molmo2VideoProcessor(), words, chat_template=chat(MARK))


def pictures_molmo2(**changes: Any) -> Any:
    """Molmo2's own image processor, its two calls of torchvision replaced by torch's; `changes` to `settings`."""
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    class Offline(Molmo2ImageProcessor):
        def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            shape = (size.height, size.width)
            return torch.nn.functional.interpolate(image, shape, mode="bilinear", align_corners=False)

        def normalize(self, image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, **_: Any) -> torch.Tensor:
            return (image - mean[:, None, None]) / std[:, None, None]

    return Offline(**settings() | changes)


def encoding_molmo2(
    pictures: Sequence[Image.Image],
    words: str,
    seed: int = 0,  # noqa: ARG001
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """A ready encoding, as `processor_molmo2` makes it, without torchvision; `changes` to `settings`."""
    given = dict(pictures_molmo2(**changes)(list(pictures), return_tensors="pt"))
    marks = []
    for low_rows, low_columns, rows, columns in given["image_grids"].tolist():
        low = "<low_res_im_start>" + ("<im_patch>" * low_columns + "<im_col>") * low_rows + "<im_end>"
        marks.append(low + "<im_start>" + ("<im_patch>" * columns + "<im_col>") * rows + "<im_end>")
    text = f"<s>HUMAN : {''.join(marks)} {words} GPT :"
    found = tokenizer(SPECIAL, start=False)(text, return_tensors="pt")
    kinds = torch.isin(found["input_ids"], torch.tensor([IDS[token] for token in SPECIAL[2:]])).long()
    given_words = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
    return {**given_words, "mm_token_type_ids": kinds, **given}


VARIANTS: dict[str, Variant] = {}
if find_spec("transformers.models.molmo2") is not None:
    VARIANTS["molmo2"] = Variant(model_molmo2, processor_molmo2, encoding_molmo2, needs_torchvision=True)
