"""Prompts as one batch, and what is checked before and after it runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.archs import Shape
from mechvlm.metrics import Metric
from mechvlm.plan import Layout
from mechvlm.prompt import Prompt
from mechvlm.sites import told, whole
from mechvlm.visit import Visit

KERNELS = ("sdpa", "eager")
"""The attention implementations whose arguments mechvlm reads right."""


def metric_values(metric: Metric, logits: Tensor) -> Tensor:
    """A metric's value of each row: one finite number a row, or a sentence that says what it is instead."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the metric returned {given} for {logits.shape[0]} rows; it must return one number a row.")
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"the metric is {float(values.detach()[~values.isfinite()][0])} in one row; it must be a finite number."
        )
    return values


def scored(metric: Metric, logits: Tensor) -> Tensor:
    """A metric's value of each row, which a gradient can be taken of."""
    values = metric_values(metric, logits)
    if not values.requires_grad:
        raise ValueError("the metric does not depend on the logits it was given, so it has no gradient.")
    return values


def tensors_of(encoding: Any) -> dict[str, Tensor]:
    """A ready encoding as tensors, whatever a processor made of it.

    Raises:
        TypeError, ValueError: for what is no mapping, or holds what a prompt does not consist of.
    """
    if not isinstance(encoding, Mapping):
        raise TypeError(f"encoding={told(encoding)} is not what a processor returns: a mapping from names to tensors.")
    known = ("input_ids", "attention_mask", "pixel_values")
    unknown = sorted(set(map(str, encoding)) - set(known))
    if unknown:
        raise ValueError(
            f"the encoding holds {unknown[0]!r}; a prompt of this model consists of {', '.join(known)}, so leave it "
            "out."
        )
    try:
        return {name: torch.as_tensor(value) for name, value in encoding.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the encoding is not made of numbers: {str(error).splitlines()[0].rstrip('.')}.") from None


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


def check_prompts(prompt: object, shape: Shape | None = None) -> list[Prompt]:
    """One prompt or several, all encoded for a model of this shape where one is given, as a list."""
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    for one in prompts:
        if not isinstance(one, Prompt):
            raise TypeError(f"{told(one)} is not a prompt; make one with vlm.prompt(image, text).")
        if shape is not None and one.shape != shape:
            raise ValueError(
                f"the prompt {one.words!r} was encoded for another model, whose words and image tokens are others; "
                "make it "
                "with this model's vlm.prompt."
            )
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


REFUSED_SAMPLING = {
    "use_cache": (True, None),
    "cache_implementation": ("dynamic", None),
    "guidance_scale": (1, None),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (0, None),
    "dola_layers": (None,),
    "prefill_chunk_size": (None,),
    "custom_generate": (None,),
    "past_key_values": (None,),
    "streamer": (None,),
}
"""Settings of a generation, and the values with which each step is one pass over one new position."""


def check_sampling(max_new_tokens: int, sampling: Mapping[str, Any], own: Any) -> None:
    """Refuse ways of generating whose steps are not one new position each, with a cache that grows by it.

    Args:
        sampling: what the user passed.
        own: the model's own generation configuration, which holds where neither the user nor his configuration does.
    """
    if whole("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} generates nothing; give 1 or more.")
    given = {"input_ids", "inputs_embeds", "attention_mask", "pixel_values", "position_ids"} & sampling.keys()
    if given:
        raise ValueError(f"{min(given)} comes from the prompt; change the prompt instead of passing it to generate.")
    config = sampling.get("generation_config") or own
    settings = {**config.to_dict(), **sampling}
    refused = [name for name, fine in REFUSED_SAMPLING.items() if name in settings and settings[name] not in fine]
    if refused:
        raise ValueError(
            f"generate does not take {refused[0]}={told(settings[refused[0]])}: edits and readings rest on steps of "
            "one new position, each one pass, with a cache that grows by it."
        )


def check_padding(layout: Layout, kernel: str, dtype: torch.dtype) -> None:
    """Refuse padding where transformers cannot do it."""
    if any(layout.pads) and kernel == "eager" and dtype == torch.float64:
        raise ValueError(
            "transformers' eager attention answers NaN for a padded batch in float64; set vlm.attention = 'sdpa', "
            "or run "
            "the prompts one by one."
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


def check_model(hf_model: Any) -> None:
    """Refuse what is no model of transformers."""
    from transformers import PreTrainedModel  # seconds to import, and imported by whoever has a model

    if not isinstance(hf_model, PreTrainedModel):
        raise TypeError(
            f"{told(hf_model)} is not a transformers model; mv.load takes a name, mv.VLM a model in memory."
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
