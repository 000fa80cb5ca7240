"""What is asked of where a model is to go, and in how many bits, and whether it can be had; said before it is read.

The words are those of transformers' `from_pretrained`: device_map, max_memory, offload_folder, quantization_config.

>>> check_placing("cuda", {"device_map": "auto"})  # doctest: +SKIP
ValueError: device='cuda' and device_map='auto' both say where the model goes; give one of them.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from mechvlm.batch import check_kernel
from mechvlm.devices import method_of
from mechvlm.processes import here
from mechvlm.shapes import Shape
from mechvlm.sites import told

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What transformers takes for a device_map that it works out itself."""
OF_A_MAP = ("max_memory", "offload_folder", "offload_buffers")
"""Settings that say something of a device_map."""


def check_placing(device: Any, settings: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> None:
    """Refuse a place for a model that cannot be had.

    Args:
        device: what was asked for as one device.
        settings: those handed to `from_pretrained`.
        own: how the checkpoint's own configuration says that it is quantised.

    Raises:
        ValueError, ModuleNotFoundError: where two things contradict each other, or a device or a package is not there.
    """
    plan = settings.get("device_map")
    if device is not None and plan is not None:
        raise ValueError(
            f"device={told(str(device))} and device_map={told(plan)} both say where the model goes; give one of them."
        )
    alone = [name for name in OF_A_MAP if plan is None and settings.get(name) is not None]
    if alone:
        raise ValueError(f"{alone[0]} says how a device_map is made; give device_map='auto' with it.")
    for one in plan.values() if isinstance(plan, Mapping) else () if plan in (None, *PLANS) else (plan,):
        if one != "disk":
            place_of(one)
    method = method_of(settings.get("quantization_config") or own)
    if method == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            'bitsandbytes is not installed, which weights of 4 or 8 bits need; pip install "mechvlm[bitsandbytes]" '
            "brings it."
        )
    if (plan is not None or method) and find_spec("accelerate") is None:
        what = "device_map" if plan is not None else "quantization_config"
        raise ModuleNotFoundError(
            f'accelerate is not installed, which {what} needs; pip install "mechvlm[accelerate]" brings it.'
        )


def check_map(model: Any, plan: Any) -> None:
    """Refuse a device_map that names a part which the model does not have, and so would not place what was meant.

    Raises:
        ValueError: for such a part.
    """
    there = {name for names in (model.named_modules(), model.named_parameters()) for name, _ in names}
    unknown = [name for name in plan if name not in there] if isinstance(plan, Mapping) else []
    if unknown:
        raise ValueError(
            f"device_map places {unknown[0]!r}, and this model has no such part; its parts are named by "
            "model.named_modules()."
        )


def place_of(device: Any) -> torch.device:
    """A device of this machine by its name; by default CUDA where there is one, of several processes each its own.

    Raises:
        ValueError: for what is no device, or none of this machine.

    Example:
        >>> place_of("cpu")
        device(type='cpu')
    """
    try:
        own = f"cuda:{here().local % max(1, torch.cuda.device_count())}" if here().count > 1 else "cuda"
        asked = own if torch.cuda.is_available() else "cpu"
        place = torch.device("cuda", device) if type(device) is int else torch.device(device or asked)
        place = torch.device(own) if place == torch.device("cuda") else place
    except (RuntimeError, TypeError):
        raise ValueError(f"there is no device {told(device)}; give 'cpu', 'cuda' or 'cuda:0'.") from None
    there = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    count = there.get(place.type)
    if count == 0:
        raise ValueError(
            f"device {str(place)!r} was asked for, and this machine has no {place.type.upper()}; use device='cpu'."
        )
    if count is not None and (place.index or 0) >= count:
        raise ValueError(
            f"device {str(place)!r} was asked for, and this machine has {count}, counted from 0; use '{place.type}:0'."
        )
    return place


def computes_on(device: Any, plan: Any) -> torch.device:
    """The device that computes: what was asked for, or the first that a device_map names."""
    named = [one for one in plan.values() if one not in ("cpu", "disk")] if isinstance(plan, Mapping) else [plan]
    if plan is None or not named or named[0] in PLANS:
        return place_of("cpu" if isinstance(plan, Mapping) else device)
    return place_of(named[0])


def check_kernels(kernels: Any, shape: Shape) -> None:
    """Refuse an attention implementation that mechvlm does not read right, or that this model's text tower cannot use.

    Args:
        kernels: one for all towers, or one for each, by the name of its part of the configuration.
    """
    named = kernels if isinstance(kernels, Mapping) else {"": kernels} if kernels else {}
    for part, kernel in named.items():
        check_kernel(kernel, *(shape.ahead, shape.score_cap) if part in ("", "text_config") else ())
