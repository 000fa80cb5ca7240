"""Load a model by its name, from a directory, or the demo that ships with the package.

>>> vlm = mv.load("llava-hf/llava-1.5-7b-hf")
>>> vlm = mv.load("demo")
"""

from pathlib import Path
from typing import Any

import torch

from mechvlm.archs import arch_of
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
        ValueError: where there is no such model, or mechvlm does not know its kind.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # seconds to import

    if remote:
        raise ValueError("remote runs are not part of this version of mechvlm; leave remote=True out.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(place)!r} was asked for, and this machine has no CUDA; use device='cpu'.")
    path = str(DEMO if str(name) == "demo" else name)
    origin = {key: settings[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in settings}
    try:
        config = AutoConfig.from_pretrained(path, **origin)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no model {str(name)!r}: it is no checkpoint directory, and the hub did not give it "
            f"({str(error).splitlines()[0]})"
        ) from None
    arch_of(config)
    kind = dtype or (torch.float32 if place.type == "cpu" else "auto")
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=kind, **settings)
        processor = AutoProcessor.from_pretrained(path, **origin)
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {str(name)!r} could not be loaded: {str(error).splitlines()[0]}") from None
    if "device_map" not in settings:  # which places the model itself, through accelerate
        model = model.to(place)
    return VLM(model.eval().requires_grad_(False), processor, name=str(name))
