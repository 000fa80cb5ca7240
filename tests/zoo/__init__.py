"""Tiny random models of every architecture in `ARCHS`, with their families' real processors, made offline."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import mechvlm as mv
from zoo import aya, deepseek, gemma, glm, idefics, internvl, llava, mistral, mllama, molmo, ovis, queries, qwen
from zoo.variant import Variant

FAMILIES = (llava, queries, qwen, glm, internvl, idefics, gemma, mistral, molmo, ovis, aya, mllama, deepseek)
VARIANTS: dict[str, Variant] = {name: one for family in FAMILIES for name, one in family.VARIANTS.items()}
"""Every tiny model by its name, which begins with its architecture's."""

QUESTION = "is there a red dog in the image ?"
EAGER_ONLY = {"paligemma2": "transformers computes Gemma 2's capped scores by eager attention only"}
"""Why some models cannot run under another kernel."""


def there(name: str) -> str:
    """Why a variant cannot be built here; empty where it can."""
    if name == "molmo2" and "molmo2" not in CONFIG_MAPPING:
        return f"transformers {transformers.__version__} has no Molmo2; it came with 5.20"
    return ""


second_environment = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="runs in the environment of .ci/run that has torchvision"
)
"""For what takes long and is about every model once more: eager attention, other types, whole reports."""
EACH_KIND = (
    *("llava", "llava_next-mistral", "instructblip", "qwen3_vl", "idefics3", "gemma3", "llava-pixtral", "molmo2"),
    "mllama",
)
"""A model of each kind: one grid, tiles, queries, DeepStack, images that see themselves, cross-attention."""


def each_kind(names: Iterable[str], *more: Any) -> list[Any]:
    """A test's parameters, names and what goes with each: one of each kind always, others in the second environment."""
    return [pytest.param(name, *more, marks=() if name in EACH_KIND else second_environment) for name in names]


def build(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, processor: bool = True
) -> mv.VLM:
    """A tiny model of a variant, with its processor where that can be built here."""
    variant = VARIANTS[name]
    can = processor and (not variant.needs_torchvision or find_spec("torchvision") is not None)
    return mv.VLM(variant.model(attention, dtype, seed), variant.processor() if can else None, name=name)


def ask(vlm: mv.VLM, pictures: Any, words: str = QUESTION) -> mv.Prompt:
    """A question about one picture, or several, through the processor, or as a ready encoding where it is not there."""
    if vlm.processor is not None:
        return vlm.prompt(pictures, words)
    make = VARIANTS[vlm.name].encoding
    assert make is not None, "a variant without its processor needs a ready encoding"
    return vlm.prompt(encoding=make(pictures if isinstance(pictures, list) else [pictures], words))
