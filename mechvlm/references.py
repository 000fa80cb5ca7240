"""What a model says by itself: numbers that do not pass through mechvlm, for the laws to compare with.

Its plain forward, its own eager attention weights and plain autograd through it, caught by torch hooks; and how far two
tensors are apart.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mechvlm.prompt import Prompt
from mechvlm.shapes import kernels_of, set_kernels
from mechvlm.sites import Site


def negative_of(prompt: Prompt) -> Prompt:
    """The same words about the negative of the picture."""
    return replace(prompt, encoding={**prompt.encoding, "pixel_values": -prompt.encoding["pixel_values"]})


def own_logits(vlm: Any, prompt: Prompt, keep: int = 1) -> Tensor:
    """The last position's logits, from the model alone, which makes those of the last `keep` positions (0: of all)."""
    kept = {"logits_to_keep": keep} if vlm.arch.row.keeps else {}
    with torch.no_grad():
        return vlm.hf(**placed(vlm, prompt), use_cache=False, **kept).logits[:, -1]


def placed(vlm: Any, prompt: Prompt) -> dict[str, Tensor]:
    """A prompt's encoding where the model is, in its type."""
    moved = {name: tensor.to(vlm.device) for name, tensor in prompt.encoding.items()}
    return {name: x.to(vlm.dtype) if x.is_floating_point() else x for name, x in moved.items()}


def layer_at(vlm: Any, tower: str, index: int) -> Any:
    """A layer of the model itself."""
    path, number = vlm.arch.stacks[tower].layers[index]
    return attrgetter(path)(vlm.hf)[number]


def attention_at(vlm: Any, tower: str, index: int, cross: bool = False) -> Any:
    """The attention module of a layer; None where it has none of this kind."""
    block = vlm.arch.stacks[tower].blocks[index]
    path = block.cross if cross else block.attention
    return None if path is None else attrgetter(path)(layer_at(vlm, tower, index))


@contextmanager
def eagerly(vlm: Any) -> Iterator[list[tuple[Any, Tensor]]]:
    """Run the model itself with transformers' eager attention, and catch each module's attention weights.

    They are caught where the kernel returns them, since some towers call it several times and drop what it returned.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    caught: list[tuple[Any, Tensor]] = []
    kernels = kernels_of(vlm.hf.config)

    def watched(module: Any, *given: Any, **named: Any) -> Any:
        z, weights = vars(sys.modules[type(module).__module__])["eager_attention_forward"](module, *given, **named)
        caught.append((module, weights))
        return z, weights

    AttentionInterface.register("mechvlm_watched_eager", watched)
    AttentionMaskInterface.register("mechvlm_watched_eager", AttentionMaskInterface()["eager"])
    vlm.hf.set_attn_implementation("mechvlm_watched_eager")
    try:
        yield caught
    finally:
        set_kernels(vlm.hf, kernels)


def attentions(vlm: Any) -> list[Any]:
    """All attention modules of the model's towers."""
    found = [
        attention_at(vlm, tower, index, cross)
        for tower, stack in vlm.arch.stacks.items()
        for index in range(len(stack.layers))
        for cross in (False, True)
    ]
    return [module for module in found if module is not None]


def own_patterns(vlm: Any, prompt: Prompt) -> dict[Site, Tensor]:
    """The model's own eager attention weights, caught where its kernel returns them."""
    with eagerly(vlm) as caught:
        own_logits(vlm, prompt)
    found: dict[Site, Tensor] = {}
    for tower, stack in vlm.arch.stacks.items():
        for index in range(len(stack.layers)):
            for kind, cross in (("pattern", False), ("cross_pattern", True)):
                module = attention_at(vlm, tower, index, cross)
                weights = [one for owner, one in caught if owner is module]
                if weights:
                    found[Site(kind, index, tower)] = along_diagonal(weights)
    return found


def along_diagonal(chunks: list[Tensor]) -> Tensor:
    """The patterns of one sequence's stretches, each of which sees itself only, as that of the sequence."""
    if len(chunks) == 1:
        return chunks[0]
    heads = [torch.block_diag(*(chunk[0, head] for chunk in chunks)) for head in range(chunks[0].shape[1])]
    return torch.stack(heads)[None]


def own_gradients(vlm: Any, prompt: Prompt, token: int) -> dict[Site, Tensor]:
    """Gradients by plain autograd on the model's own eager attention, at the text's patterns and residual streams."""
    stack, held, handles = vlm.arch.text, {}, []
    first = attrgetter(stack.embed)(vlm.hf)
    # The graph starts at the word embeddings, whose weights may be frozen.
    handles.append(first.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_(True)))
    for index in range(len(stack.layers)):

        def keep(_m: Any, _i: Any, out: Any, site: Site) -> None:
            held[site] = out[0] if isinstance(out, tuple) else out

        handles.append(layer_at(vlm, "text", index).register_forward_hook(bind(keep, Site("resid_post", index))))
    try:
        with eagerly(vlm) as caught, torch.enable_grad():
            logits = vlm.hf(**placed(vlm, prompt), use_cache=False).logits
            owners = {attention_at(vlm, "text", index): index for index in range(len(stack.layers))}
            held |= {Site("pattern", owners[owner]): weights for owner, weights in caught if owner in owners}
        found = torch.autograd.grad(logits[0, -1, token], list(held.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(held.items(), found, strict=True)
    return {site: torch.zeros_like(x) if gradient is None else gradient for (site, x), gradient in pairs}


def bind(keep: Callable, site: Site) -> Callable:
    """A forward hook that knows which site it is of."""
    return lambda module, given, out: keep(module, given, out, site)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    a, b = a.double(), b.double().to(a.device)
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return float("inf")
    largest = b[finite].abs().max().item() if bool(finite.any()) else 0.0
    return (a[finite] - b[finite]).abs().max().item() / (largest or 1.0) if bool(finite.any()) else 0.0


def rounding(vlm: Any, times: float = 64) -> float:
    """What rounding may do: so many units in the last place of the model's type, and never a tenth of the value."""
    return min(times * torch.finfo(vlm.dtype).eps, 0.1)


def eager_rounding(vlm: Any, times: float = 64) -> float:
    """The same where transformers' eager attention is compared with, whose softmax is float32 whatever the type."""
    return max(rounding(vlm, times), times * torch.finfo(torch.float32).eps)


def differs(a: Tensor, b: Tensor) -> float:
    """Zero where two tensors are the same bit for bit, else their difference."""
    return 0.0 if torch.equal(a, b.to(a.device)) else max(apart(a, b), torch.finfo(torch.float64).tiny)
