"""What a model says by itself: numbers that do not pass through mechvlm, for the laws to compare with.

Its plain forward, its own eager attention weights and plain autograd through it, caught by torch hooks; and how far two
tensors are apart.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mechvlm.archs import kernels_of, set_kernels
from mechvlm.prompt import Prompt


def null_of(prompt: Prompt, vlm: Any) -> Prompt:
    """The same words without a picture: all pixels at the value that normalises to zero."""
    pixels = torch.zeros_like(prompt.encoding["pixel_values"])
    return vlm.prompt(encoding={**prompt.encoding, "pixel_values": pixels})


def own_logits(vlm: Any, prompt: Prompt, keep: int = 1) -> Tensor:
    """The last position's logits, from the model alone, which makes those of the last `keep` positions (0: of all)."""
    with torch.no_grad():
        return vlm.hf(**placed(vlm, prompt), use_cache=False, logits_to_keep=keep).logits[:, -1]


def placed(vlm: Any, prompt: Prompt) -> dict[str, Tensor]:
    """A prompt's encoding where the model is, in its type."""
    moved = {name: tensor.to(vlm.device) for name, tensor in prompt.encoding.items()}
    return {name: x.to(vlm.dtype) if x.is_floating_point() else x for name, x in moved.items()}


def own_patterns(vlm: Any, prompt: Prompt, tower: str) -> list[Tensor]:
    """The model's own eager attention weights, caught by torch hooks."""
    stack, kernels = stack_of(vlm, tower), kernels_of(vlm.hf.config)
    caught: list[Tensor] = []
    modules = [attrgetter(stack.attention)(layer) for layer in attrgetter(stack.layers)(vlm.hf)]
    handles = [one.register_forward_hook(lambda _m, _i, out: caught.append(out[1])) for one in modules]
    vlm.attention = "eager"
    try:
        own_logits(vlm, prompt)
    finally:
        set_kernels(vlm.hf, kernels)
        for handle in handles:
            handle.remove()
    return caught


def stack_of(vlm: Any, tower: str) -> Any:
    """Where a tower keeps its parts."""
    return vlm.arch.text if tower == "text" else vlm.arch.vision


def own_gradients(vlm: Any, prompt: Prompt, token: int) -> dict[tuple[str, int], Tensor]:
    """Gradients by plain autograd on the model's own eager attention, caught by torch hooks."""
    stack, kernels, held, handles = vlm.arch.text, kernels_of(vlm.hf.config), {}, []
    first = attrgetter(stack.embed)(vlm.hf)
    # The graph starts at the word embeddings, whose weights may be frozen.
    handles.append(first.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_(True)))
    for index, layer in enumerate(attrgetter(stack.layers)(vlm.hf)):

        def keep(_m: Any, _i: Any, out: Any, key: tuple[str, int]) -> None:
            held[key] = out[1] if key[0] == "pattern" else out

        attention = attrgetter(stack.attention)(layer)
        handles.append(attention.register_forward_hook(bind(keep, ("pattern", index))))
        handles.append(layer.register_forward_hook(bind(keep, ("resid_post", index))))
    vlm.attention = "eager"
    try:
        with torch.enable_grad():
            logits = vlm.hf(**placed(vlm, prompt), use_cache=False).logits
        found = torch.autograd.grad(logits[0, -1, token], list(held.values()), allow_unused=True)
    finally:
        set_kernels(vlm.hf, kernels)
        for handle in handles:
            handle.remove()
    pairs = zip(held.items(), found, strict=True)
    return {key: torch.zeros_like(x) if gradient is None else gradient for (key, x), gradient in pairs}


def bind(keep: Callable, key: tuple[str, int]) -> Callable:
    """A forward hook that knows which site it is of."""
    return lambda module, given, out: keep(module, given, out, key)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    a, b = a.double(), b.double()
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
    return 0.0 if torch.equal(a, b) else max(apart(a, b), torch.finfo(torch.float64).tiny)
