"""Prompts as one batch, and what is checked before and after it runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.metrics import Metric
from mechvlm.plan import Layout
from mechvlm.prompt import Prompt
from mechvlm.sites import told, whole
from mechvlm.visit import Visit

KERNELS = ("sdpa", "eager")
"""The attention implementations whose arguments mechvlm reads right."""


def scored(metric: Metric, logits: Tensor) -> Tensor:
    """A metric's value of each row, checked."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the metric returned {given} for {logits.shape[0]} rows; it must return one number a row.")
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"the metric is {float(values.detach()[~values.isfinite()][0])} in one row; it must be a finite number."
        )
    if not values.requires_grad:
        raise ValueError("the metric does not depend on the logits it was given, so it has no gradient.")
    return values


def collate(prompts: Sequence[Prompt], layout: Layout, filler: int) -> dict[str, Tensor]:
    """One left-padded batch of several prompts, or one prompt repeated for its variants."""
    if len(prompts) == 1:
        rows = len(layout.pads)
        encoding = dict(prompts[0].encoding)
        return {
            name: x if name == "pixel_values" and layout.shared > 1 else x.repeat(rows, *[1] * (x.ndim - 1))
            for name, x in encoding.items()
        }
    ids, masks = [], []
    for prompt, pad in zip(prompts, layout.pads, strict=True):
        ids.append(torch.nn.functional.pad(prompt.encoding["input_ids"], (pad, 0), value=filler))
        masks.append(torch.nn.functional.pad(prompt.encoding["attention_mask"], (pad, 0)))
    batch = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    if any(layout.pads):
        # Without this the model would count positions from the padding.
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    pixels = [prompt.encoding["pixel_values"] for prompt in prompts if prompt.images]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def check_prompts(prompt: object) -> list[Prompt]:
    """One prompt or several, as a list."""
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    for one in prompts:
        if not isinstance(one, Prompt):
            raise TypeError(f"{told(one)} is not a prompt; make one with vlm.prompt(image, text).")
    if not prompts:
        raise ValueError("the list of prompts is empty.")
    return prompts


def check_variants(prompts: Sequence[Prompt], variants: object) -> int:
    """How many rows variants make of a batch: one for each list of edits; the batch as it is without any."""
    if variants is None:
        return 1
    if not isinstance(variants, list | tuple):
        raise TypeError(f"variants={told(variants)} is not a list of lists of edits, one for each row.")
    if len(prompts) != 1 or not variants:
        raise ValueError("variants are rows of one prompt: give one prompt and at least one list of edits.")
    return len(variants)


def check_ends(prompts: Sequence[Prompt], position: Any) -> list[int]:
    """The position whose logits are wanted, counted from the end of each prompt."""
    wanted, shortest = whole("position", position), min(map(len, prompts))
    if not -shortest <= wanted < shortest:
        raise ValueError(f"position {wanted} is not in the prompt, which has {shortest} positions.")
    return [wanted if wanted < 0 else wanted - len(prompt) for prompt in prompts]


def check_sampling(max_new_tokens: int, sampling: Mapping[str, Any]) -> None:
    """Refuse ways of generating whose steps are not one new position each, with a cache that grows by it."""
    if whole("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} generates nothing; give 1 or more.")
    given = {"input_ids", "inputs_embeds", "attention_mask", "pixel_values", "position_ids"} & sampling.keys()
    if given:
        raise ValueError(f"{min(given)} comes from the prompt; change the prompt instead of passing it to generate.")
    refused = {"assistant_model", "prompt_lookup_num_tokens", "custom_generate", "streamer"} & sampling.keys()
    if not sampling.get("use_cache", True):
        refused = {"use_cache=False"}
    if sampling.get("cache_implementation") not in (None, "dynamic"):
        refused = {f"cache_implementation={sampling['cache_implementation']!r}"}
    if refused:
        raise ValueError(
            f"generate does not take {min(refused)}: edits and readings rest on steps of one new position, with a "
            "cache that grows by it."
        )


def check_fired(visit: Visit) -> None:
    """Refuse a run in which an edit never acted."""
    missed = [label for number, label in enumerate(visit.plan.labels) if number not in visit.fired]
    if missed:
        raise ValueError(
            f"{missed[0]} never acted in this run, so nothing it was to change was changed. A decode step's edit needs "
            "a second token, and a gradient's edit a site that the metric depends on."
        )


def check_finite(logits: Tensor) -> None:
    """Refuse a run whose answer is not a number."""
    broken = logits.isnan().any(-1).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(
            f"the logits of row {broken[0]} are not a number (NaN), so nothing can be said of this run; look for an "
            f"edit that made values too large for {str(logits.dtype).removeprefix('torch.')}."
        )


def check_processor(processor: Any) -> Any:
    """A processor as it is, or None; anything else, such as a tokenizer alone, is refused."""
    from transformers import ProcessorMixin  # which torch's users have loaded by the time they have a processor

    if processor is not None and not isinstance(processor, ProcessorMixin):
        raise TypeError(
            f"{told(processor)} is not a processor of images and text; AutoProcessor loads the model's own."
        )
    return processor


def check_width(h: object, width: int) -> None:
    """Refuse what is no residual stream."""
    if not isinstance(h, Tensor) or h.ndim < 1 or h.shape[-1] != width:
        given = tuple(h.shape) if isinstance(h, Tensor) else told(h)
        raise ValueError(f"unembed takes residual streams, tensors whose last axis is {width} long, and got {given}.")


def check_kernel(kernel: str) -> str:
    """An attention implementation that mechvlm reads right."""
    if kernel not in KERNELS:
        raise ValueError(
            f"the attention implementation is {kernel!r}; mechvlm reads {' and '.join(KERNELS)} exactly. Set "
            "vlm.attention, or load with attn_implementation='sdpa'."
        )
    return kernel
