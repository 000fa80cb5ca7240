"""Load a model by its name, from a directory, or the demo that ships with the package.

>>> vlm = mv.load("llava-hf/llava-1.5-7b-hf")
>>> vlm = mv.load("demo")
"""

from pathlib import Path
from typing import Any

import torch

from mechvlm.archs import arch_of
from mechvlm.sites import told
from mechvlm.vlm import VLM

DEMO = Path(__file__).parent / "demo" / "model"


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    remote: bool = False,
    **settings: Any,
) -> VLM:
    """A model that can be read and edited, with its processor.

    Args:
        name: a name on the Hugging Face hub, a checkpoint directory, or "demo", the small trained model that ships with
            the package.
        device: by default CUDA where there is one.
        dtype: by default float32 on a CPU, and what the checkpoint holds elsewhere.
        remote: not in this version.
        settings: handed to transformers' `from_pretrained`: attn_implementation, device_map, revision, ...

    Raises:
        ValueError, TypeError: where there is no such model, device or type, or mechvlm does not know its kind.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # seconds to import

    if remote:
        raise ValueError("remote runs are not part of this version of mechvlm; leave remote=True out.")
    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"{told(name)} is no name of a model; give one on the hub, a checkpoint directory or 'demo'.")
    place = place_of(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(place)!r} was asked for, and this machine has no CUDA; use device='cpu'.")
    if str(name) != "demo" and Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"there is no directory {str(name)!r}; give a checkpoint directory, or a name on the hub.")
    path = str(DEMO if str(name) == "demo" else name)
    origin = {key: settings[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in settings}
    try:
        config = AutoConfig.from_pretrained(path, **origin)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no model {str(name)!r}: it is no checkpoint directory, and the hub did not give it "
            f"({reason(error)})."
        ) from None
    arch_of(config)
    kind = type_of(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=kind, **settings)
        processor = AutoProcessor.from_pretrained(path, **origin)
    except (OSError, ValueError, TypeError) as error:  # TypeError is transformers' for a setting it does not know
        raise ValueError(f"the model {str(name)!r} could not be loaded ({reason(error)}).") from None
    if "device_map" not in settings:  # which places the model itself, through accelerate
        model = model.to(place)
    return VLM(model.eval().requires_grad_(False), processor, name=str(name))


def place_of(device: Any) -> torch.device:
    """A device by its name; by default CUDA where there is one."""
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ValueError(f"there is no device {told(device)}; give 'cpu', 'cuda' or 'cuda:0'.") from None


def type_of(dtype: Any) -> Any:
    """A type of weights, by itself or by its name."""
    names = ("float32", "float16", "bfloat16", "float64", "auto")
    if dtype is None or isinstance(dtype, torch.dtype) or dtype in names:
        return dtype
    raise ValueError(f"there is no type {told(dtype)} of weights; give one of {', '.join(map(repr, names))}.")


def reason(error: Exception) -> str:
    """The first sentence of what transformers or the hub says, to stand within another."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
