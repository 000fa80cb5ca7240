"""Where a model's parts run, and their weights, where these are kept elsewhere between calls.

A model may be spread over several devices, and what finds no room there be kept in memory or on disk: accelerate's
hooks bring such weights in as their module is called, and leave a tensor without numbers ("meta") in their place
afterwards.

Rule this module guards: a weight is never read that holds no numbers, and never taken for a matrix where it is a code.

>>> held(vlm.hf, "lm_head.weight").shape  # doctest: +SKIP
torch.Size([32064, 4096])
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that are what they say; types of 8 bits and whole numbers are codes, with scales beside them."""


def hooks_of(module: Any) -> Iterable[Any]:
    """The hooks by which accelerate places a module, none where it does not."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else vars(hook).get("hooks", (hook,))


def runs_on(module: Any) -> torch.device:
    """The device that a module computes on, wherever its weights are kept between calls.

    Raises:
        ValueError: for a module that has no weights, or whose weights hold no numbers.

    Example:
        >>> runs_on(vlm.hf.lm_head)
        device(type='cpu')
    """
    for hook in hooks_of(module):
        where = vars(hook).get("execution_device")
        if where is not None:
            return torch.device(where)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    raise ValueError(f"{type(module).__name__} has no weights, so it is on no device; ask a module that has some.")


def held(model: Any, path: str) -> Tensor:
    """A weight by its name, with its numbers, on the device that its module computes on.

    Returns:
        The weight itself; where it is kept elsewhere between calls, a copy.

    Raises:
        ValueError: for a weight that holds no numbers anywhere.

    Example:
        >>> held(vlm.hf, "lm_head.weight") is vlm.hf.lm_head.weight
        True
    """
    *modules, name = path.split(".")
    own = model.get_submodule(".".join(modules))
    found = {**vars(own)["_parameters"], **vars(own)["_buffers"]}[name]
    if not found.is_meta:
        return found
    for depth in range(len(modules), -1, -1):  # a hook may bring in the weights of all that its module holds
        for hook in hooks_of(model.get_submodule(".".join(modules[:depth]))):
            kept = kept_by(hook, ".".join((*modules[depth:], name)))
            if kept is not None:
                return kept.to(runs_on(model.get_submodule(".".join(modules[:depth]))))
    raise ValueError(f"the weight {path} holds no numbers (it is on the meta device); load the model with its weights.")


def kept_by(hook: Any, name: str) -> Tensor | None:
    """A weight that a hook brings in as its module is called; None where that is not one of them."""
    settings = vars(hook)
    if not settings.get("offload"):
        return None
    try:
        return settings["weights_map"][name]
    except KeyError:
        return None


def whole_numbers_of(weight: Tensor) -> Tensor:
    """A weight's numbers, for what adds them up: codes as numbers too."""
    return weight if weight.is_floating_point() and weight.dtype in PLAIN else weight.double()


def matrix_of(model: Any, path: str) -> Tensor:
    """The matrix that a linear module multiplies by, `out in`.

    Returns:
        The weight itself; of one that bitsandbytes has packed a copy, unpacked.

    Raises:
        ValueError: for a module that multiplies by something else than a plain matrix.

    Example:
        >>> matrix_of(vlm.hf, "lm_head") is vlm.hf.lm_head.weight
        True
    """
    module = model.get_submodule(path)
    if type(module).__module__.startswith("bitsandbytes."):
        return asked(model, module)
    if type(module).forward is not torch.nn.Linear.forward:
        raise ValueError(
            f"the weights of {path} are those of a {type(module).__name__}, which mechvlm does not take apart; load "
            "the model without quantisation or adapters to look at its matrices."
        )
    weight = held(model, f"{path}.weight")
    if not plain(weight):
        kind = f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"the weights of {path} are packed ({kind}); load the model without quantisation to look at its matrices."
        )
    return weight


def plain(weight: Tensor) -> bool:
    """Whether a weight is a matrix of numbers, and no code of one.

    Example:
        >>> plain(torch.zeros(2, 2)), plain(torch.zeros(2, 2, dtype=torch.int8))
        (True, False)
    """
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in PLAIN


def asked(model: Any, module: Any) -> Tensor:
    """The matrix of a linear module, asked by vectors that are one in one place, since its packing changes."""
    dtype = model.dtype  # another would change the type that packed modules compute in from then on
    ones = torch.eye(module.in_features, dtype=dtype, device=runs_on(module))
    with torch.no_grad():
        columns = module(ones)
        return (columns - module(torch.zeros_like(ones[:1]))).T


def places_of(model: Any) -> str:
    """Where a model's parts are, as records say it: its device, or those of a device_map, memory and disk among them.

    Example:
        >>> places_of(vlm.hf)
        'cpu'
    """
    plan = vars(model).get("hf_device_map") or {"": runs_on(model)}
    return ", ".join(
        dict.fromkeys(str(torch.device("cuda", one) if type(one) is int else one) for one in plan.values())
    )


def method_of(quantised: Any) -> str:
    """How weights are, or are to be, quantised, by transformers' name; empty where they are not.

    Example:
        >>> method_of({"quant_method": "bitsandbytes", "load_in_4bit": True}), method_of(None)
        ('bitsandbytes', '')
    """
    if not quantised:
        return ""
    held = quantised if isinstance(quantised, Mapping) else quantised.to_dict()
    in_bits = held.get("load_in_4bit") or held.get("load_in_8bit")
    return "bitsandbytes" if in_bits else str(held.get("quant_method", "")).rpartition(".")[2].lower()


def packing_of(config: Any) -> str:
    """What records say of weights that are quantised; empty where they are not.

    Example:
        >>> packing_of(vlm.hf.config)
        ''
    """
    own = config.to_dict().get("quantization_config") or {}
    bits = [f" in {bits} bits" for bits in (4, 8) if own.get(f"load_in_{bits}bit")]
    return f", weights packed by {method_of(own)}{''.join(bits)}" if own else ""


ASKED_WHERE = {
    "mllama": "model.vision_model.patch_embedding",
    "idefics3": "model.vision_model.embeddings.patch_embedding",
    "glm4v": "model.visual.embeddings",
}
"""Parts that transformers asks where they are, or takes the weights of, outside of their calls, by type of model."""


def check_kept(model: Any) -> None:
    """Refuse a part that is kept elsewhere between calls where transformers does not wait for its call.

    Raises:
        ValueError: for such a part.
    """
    path = ASKED_WHERE.get(model.config.model_type)
    part = None if path is None else model.get_submodule(path)
    if part is not None and any(hooks_of(part)) and any(weight.is_meta for weight in part.parameters()):
        raise ValueError(
            f"transformers reads the weights of {path} outside of its call in a {model.config.model_type} model, so "
            "they cannot be kept in memory or on disk; give that part a device of its own in device_map."
        )


def check_differentiable(model: Any) -> None:
    """Refuse gradients where packed weights have none.

    Raises:
        ValueError: for weights of 4 bits on a CPU, which bitsandbytes repacks, once it has run, for a kernel that
            gradients do not pass.
    """
    own = model.config.to_dict().get("quantization_config") or {}
    if own.get("load_in_4bit") and runs_on(model).type == "cpu":
        raise ValueError(
            "bitsandbytes computes no gradients of weights of 4 bits on a CPU; load them in 8 bits, or onto a GPU."
        )
