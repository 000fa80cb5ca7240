"""Prompts as one batch, and what is checked before and after it runs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.devices import check_kept, packing_of, places_of
from mechvlm.edits import Edit
from mechvlm.encode import encode
from mechvlm.grids import grids_of
from mechvlm.layout import Layout
from mechvlm.metrics import Metric
from mechvlm.pixels import to_picture
from mechvlm.plan import Plan
from mechvlm.prompt import Prompt, checked_pixels, locate
from mechvlm.shapes import Parts, Shape, installed, kernels_of, shape_of
from mechvlm.sites import told, whole

KERNELS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
"""The attention implementations whose arguments mechvlm reads right."""


def metric_values(metric: Metric, logits: Tensor) -> Tensor:
    """A metric's value of each row: one finite number a row, or a sentence that says what it is instead."""
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the metric returned {given} for {logits.shape[0]} rows; it must return one number a row.")
    if not values.is_floating_point():
        values = values.to(torch.promote_types(logits.dtype, torch.float32))  # whether, or which, of each row
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


def tensors_of(encoding: Any, more: Sequence[str] = ()) -> dict[str, Tensor]:
    """A ready encoding as tensors, whatever a processor made of it.

    Args:
        more: what this architecture's encodings hold beside input_ids, attention_mask and pixel_values.

    Raises:
        TypeError, ValueError: for what is no mapping, or holds what a prompt does not consist of.
    """
    if not isinstance(encoding, Mapping):
        raise TypeError(f"encoding={told(encoding)} is not what a processor returns: a mapping from names to tensors.")
    known = ("input_ids", "attention_mask", "pixel_values", *more)
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


def ready_or_asked(about: tuple, image: Any, text: Any, raw: bool, encoding: Any) -> Prompt:
    """A prompt from an encoding, or from pictures and words.

    Args:
        about: a model's processor, parts, shape and configuration.
    """
    processor, parts, shape, config = about
    if encoding is not None:
        if image is not None or text is not None:
            raise ValueError("encoding= is a whole prompt; leave image and text out.")
        return ready(encoding, parts, shape, config)
    if not isinstance(text, str):
        raise TypeError(f"a prompt needs its text; write vlm.prompt(image, 'What is this?'), not text={text!r}.")
    if processor is None:
        raise ValueError("this model was given no processor, so it takes ready encodings: vlm.prompt(encoding=...).")
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    return encode(processor, parts, shape, config, list(map(to_picture, images)), text, raw)


def ready(encoding: Any, parts: Parts, shape: Shape, config: Any) -> Prompt:
    """A prompt from what a processor made of it."""
    tensors = tensors_of(encoding, parts.row.inputs)
    checked_pixels(tensors)
    return locate(tensors, shape, grids_of(parts.grid, config, tensors, None, None))


TEXT_LIKE = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""What has one entry a position of the text along its second axis; everything else is of the images."""


def collate(prompts: Sequence[Prompt], layout: Layout, filler: int, positions: str) -> dict[str, Tensor]:
    """One left-padded batch of several prompts, or one prompt repeated for its variants.

    Args:
        filler: the id that pads, which must not be the image token's.
        positions: how the model is told its positions; see `Arch`.
    """
    if len(prompts) == 1 and (len(layout.pads) == 1 or layout.shared > 1):
        rows = len(layout.pads)
        encoding = prompts[0].encoding
        return {n: x.repeat(rows, *[1] * (x.ndim - 1)) if n in TEXT_LIKE else x for n, x in encoding.items()}
    prompts = prompts if len(prompts) > 1 else list(prompts) * len(layout.pads)
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.encoding))
    batch = {}
    for name in names:
        pads = layout.pads if name in TEXT_LIKE else (0,) * len(prompts)
        held = [
            (prompt.encoding[name], pad) for prompt, pad in zip(prompts, pads, strict=True) if name in prompt.encoding
        ]
        if name in INDICES:
            held = list(zip(counted_on([x for x, _ in held], prompts, INDICES[name]), pads, strict=True))
        batch[name] = stacked([left_padded(x, pad, filler if name == "input_ids" else 0) for x, pad in held])
    if any(layout.pads) and positions != "own":
        # Without this the model would count positions from the padding.
        first = 1 if positions == "ids from 1" else 0
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0) + first
    return batch


INDICES = {"image_token_pooling": "pixel_values"}
"""What counts the rows of another input, its first two axes as one; minus one counts nothing."""


def counted_on(tensors: Sequence[Tensor], prompts: Sequence[Prompt], of: str) -> list[Tensor]:
    """Indices of several prompts as indices of their batch."""
    before, found = 0, []
    for x, prompt in zip(tensors, prompts, strict=True):
        found.append(torch.where(x < 0, x, x + before))
        before += prompt.encoding[of].shape[:2].numel()
    return found


def left_padded(x: Tensor, pad: int, value: int) -> Tensor:
    """A tensor `batch pos ...` with so many more positions before its own."""
    return torch.nn.functional.pad(x, (*[0, 0] * (x.ndim - 2), pad, 0), value=value) if pad else x


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors behind one another along the first axis; where others differ in length, zeros fill them up at the end."""
    sizes = [max(lengths) for lengths in zip(*(x.shape[1:] for x in tensors), strict=True)]
    filled = []
    for x in tensors:
        missing = [length for size, own in zip(sizes, x.shape[1:], strict=True) for length in (size - own, 0)]
        filled.append(torch.nn.functional.pad(x, missing[::-1]) if any(missing) else x)
    return torch.cat(filled)


def check_prompts(prompt: object, shape: Shape | None = None) -> list[Prompt]:
    """One prompt or several, all encoded for a model of this shape where one is given, as a list."""
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    for one in prompts:
        if not isinstance(one, Prompt):
            raise TypeError(f"{told(one)} is not a prompt; make one with vlm.prompt(image, text).")
        if shape is not None and one.shape != shape:
            raise ValueError(
                f"the prompt {one.words!r} was encoded for another model, whose words and image tokens are others; "
                "make it with this model's vlm.prompt."
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


def check_padding(layout: Layout, kernel: str, dtype: torch.dtype, crossing: bool = False) -> None:
    """Refuse padding where transformers cannot do it.

    Args:
        crossing: whether the text tower attends to the images' features.
    """
    if crossing and len(set(layout.images)) > 1:
        raise ValueError(
            f"the prompts hold {' and '.join(map(str, sorted(set(layout.images))))} images, and this model pads the "
            "fewer with empty ones that its words then look at; run such prompts apart."
        )
    if any(layout.pads) and kernel == "eager" and dtype == torch.float64:
        raise ValueError(
            "transformers' eager attention answers NaN for a padded batch in float64; set vlm.attention = 'sdpa', or "
            "run the prompts one by one."
        )


def check_fired(plan: Plan, fired: Collection[int]) -> None:
    """Refuse a run in which an edit never acted, from the numbers of those that did."""
    missed = [label for number, label in enumerate(plan.labels) if number not in fired]
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
    """Refuse what is no model of transformers.

    Raises:
        TypeError: for anything else.
    """
    from transformers import PreTrainedModel  # seconds to import, and imported by whoever has a model

    if not isinstance(hf_model, PreTrainedModel):
        raise TypeError(
            f"{told(hf_model)} is not a transformers model; mv.load takes a name, mv.VLM a model in memory."
        )


def check_state(hf_model: Any) -> None:
    """Refuse a model in training, or with an attention implementation that mechvlm does not read right."""
    if hf_model.training:
        raise ValueError("the model is in training mode, where dropout makes runs differ; call model.eval() first.")
    check_kept(hf_model)
    shape = shape_of(hf_model.config)
    for tower, kernel in kernels_of(hf_model.config).items():
        check_kernel(kernel, *(shape.ahead, shape.score_cap) if tower == "text" else ())


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


def check_kernel(kernel: str, ahead: str = "", cap: float | None = None) -> str:
    """An attention implementation that mechvlm reads right.

    Args:
        ahead: which words see what stands behind them; see `Arch`.
        cap: what caps the scores of the text tower.
    """
    if kernel not in KERNELS:
        raise ValueError(
            f"the attention implementation is {kernel!r}; mechvlm reads {', '.join(KERNELS[:-1])} and {KERNELS[-1]} "
            "exactly. Set vlm.attention, or load with attn_implementation='sdpa'."
        )
    if kernel == "flash_attention_2" and ahead:
        raise ValueError(
            "flash_attention_2 takes no mask, and in this architecture image tokens see those behind them, which it "
            "would hide from them; use 'sdpa'."
        )
    if kernel == "sdpa" and cap is not None:
        raise ValueError(
            f"sdpa does not cap attention scores, which this model does at {cap:g}; load with "
            "attn_implementation='eager'."
        )
    return kernel


def check_gradients(kernel: str, device: torch.device) -> None:
    """Refuse gradients where the kernel has none."""
    if kernel == "flex_attention" and device.type == "cpu":
        raise ValueError(
            "PyTorch computes no gradients of flex_attention on a CPU; set vlm.attention = 'sdpa' for this run."
        )


def provenance(vlm: Any, prompt: Prompt, edits: Sequence[Edit]) -> dict[str, str]:
    """What a record of an experiment has to say, as plain text."""
    return {
        "model": str(vlm.name),
        "revision": str(vlm.hf.config.to_dict().get("_commit_hash") or "unknown"),
        "dtype": str(vlm.dtype).removeprefix("torch.") + packing_of(vlm.hf.config),
        "device": vlm.place.name or places_of(vlm.hf),
        "attention": vlm.attention,
        "prompt": prompt.text,
        "edits": "; ".join(map(str, edits)) or "none",
        "versions": ", ".join(f"{p} {installed(p)}" for p in ("mechvlm", "nnsight", "transformers", "torch")),
    }
