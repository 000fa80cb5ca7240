"""Load a model by its name, from a directory, or the demo that ships with the package.

>>> vlm = mv.load("llava-hf/llava-1.5-7b-hf")  # doctest: +SKIP
>>> vlm = mv.load("demo")
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from mechvlm.attention import bytes_of
from mechvlm.hosts import Server
from mechvlm.places import place_of
from mechvlm.placing import check_kernels, check_map, check_placing, computes_on
from mechvlm.shapes import shape_of
from mechvlm.sites import told
from mechvlm.vlm import VLM
from mechvlm.wrapped import without_weights

DEMO = Path(__file__).parent / "demo" / "model"

# TypeError is transformers' for a setting it does not know, ImportError for a package that a setting needs, and
# RuntimeError torch's for a device that is full or absent.
TROUBLE = (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    remote: bool | str | Server = False,
    attention_budget: int | str = "256MiB",
    **settings: Any,
) -> VLM:
    """A model that can be read and edited, with its processor.

    Args:
        name: a name on the Hugging Face hub, a checkpoint directory, or "demo", the small trained model that ships with
            the package.
        device: by default CUDA where there is one; of several processes (`accelerate launch`) each takes its own GPU.
            For one model on several devices, or one that finds no room there, see `device_map`.
        dtype: by default float32 on a CPU, and what the checkpoint holds elsewhere.
        remote: True runs the model on NDIF, "http://..." on a server of one's own; its weights are not loaded here.
            Each run, and each sweep, profile or generation, is then a job there (`mv.remote`). `mv.remote.Server` says
            more, such as how long a job is waited for. "local" loads the model,
            and sends everything that is asked of it as it would be sent, to try that out.
        attention_budget: as in `VLM`.
        settings: handed to transformers' `from_pretrained`: attn_implementation, revision, ... `device_map="auto"`
            spreads the layers over the devices there are, as `max_memory` allows, and keeps in memory, or on disk in
            `offload_folder`, what finds no room; `quantization_config` packs weights into fewer bits.

    Raises:
        ValueError, TypeError: where there is no such model, device or type, or mechvlm does not know its kind.
        ModuleNotFoundError: where a package that a setting needs is not installed.

    Example:
        >>> mv.load("Qwen/Qwen2.5-VL-72B-Instruct", device_map="auto")  # doctest: +SKIP
    """
    from transformers import AutoProcessor  # seconds to import

    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"{told(name)} is no name of a model; give one on the hub, a checkpoint directory or 'demo'.")
    bytes_of(attention_budget)
    check_placing(device, settings)
    place = computes_on(device, settings.get("device_map"))
    if str(name) != "demo" and Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"there is no directory {str(name)!r}; give a checkpoint directory, or a name on the hub.")
    path = str(DEMO if str(name) == "demo" else name)
    known = ("revision", "token", "cache_dir", "trust_remote_code")
    origin: dict[str, Any] = {key: settings[key] for key in known if key in settings}
    config = configuration(path, str(name), origin)
    # Before gigabytes are read, all that the configuration alone can tell.
    check_kernels(settings.get("attn_implementation"), shape_of(config))
    if remote not in (False, "local"):
        return elsewhere(path, str(name), {"device": device, "dtype": dtype, **settings}, remote, attention_budget)
    own = config.to_dict().get("quantization_config")
    check_placing(device, settings, own)
    kind = type_of(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    if (own or settings.get("quantization_config")) and settings.get("device_map") is None:
        settings["device_map"] = {"": place}  # packed weights are made where they are to stay
    model = weighted(path, str(name), {**settings, "dtype": kind})
    check_map(model, settings.get("device_map"))
    with said_in_one_sentence(str(name)):
        processor = AutoProcessor.from_pretrained(path, **origin)
        if settings.get("device_map") is None:
            model = model.to(place)
    return VLM(model.eval().requires_grad_(False), processor, str(name), attention_budget, remote)


def elsewhere(
    path: str, name: str, settings: Mapping[str, Any], remote: bool | str | Server, attention_budget: int | str
) -> VLM:
    """A model that runs elsewhere: its processor, and its modules without weights.

    Raises:
        ValueError: for settings that are the server's to make, or a checkpoint that cannot be read.
    """
    from transformers import AutoProcessor, GenerationConfig

    place_of(remote)
    fine = ("revision", "trust_remote_code", "attn_implementation", "token", "cache_dir")
    given = {key: value for key, value in settings.items() if value is not None}
    theirs = [key for key in given if key not in fine]
    if theirs:
        raise ValueError(
            f"{theirs[0]}={told(given[theirs[0]])} is for the server to decide, which holds the weights; leave it out."
        )
    origin = {key: value for key, value in given.items() if key != "attn_implementation"}
    with said_in_one_sentence(name):
        processor = AutoProcessor.from_pretrained(path, **origin)
        model = without_weights(path, processor, **given)
        if not Path(path).is_dir() or (Path(path) / "generation_config.json").is_file():
            model._module.generation_config = GenerationConfig.from_pretrained(path, **origin)
    return VLM(model, processor, name, attention_budget, remote)


def configuration(path: str, name: str, origin: Mapping[str, Any]) -> Any:
    """The configuration of a checkpoint directory, or of a model on the hub.

    Raises:
        ValueError: where there is none, or none that transformers can read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **origin)
    except (*TROUBLE, KeyError) as error:  # KeyError is transformers' for a part of a type it does not know
        why = reason(error)
    if (Path(path) / "config.json").is_file():
        raise ValueError(f"the config.json in {name!r} could not be read ({why}).")
    if Path(path).is_dir():
        raise ValueError(
            f"the directory {name!r} holds no config.json, so it is no checkpoint; give the folder that "
            "save_pretrained wrote."
        )
    raise ValueError(f"there is no model {name!r}: it is no checkpoint directory, and the hub did not give it ({why}).")


def weighted(path: str, name: str, settings: Mapping[str, Any]) -> Any:
    """The model with all of its weights from the checkpoint; transformers would make up what is not in it.

    Raises:
        ValueError: for weights that are not there or have another shape.
    """
    from transformers import AutoModelForImageTextToText

    told_all = {**settings, "output_loading_info": True, "ignore_mismatched_sizes": True}  # so that we can say which
    with said_in_one_sentence(name):
        model, found = AutoModelForImageTextToText.from_pretrained(path, **told_all)
    if found["mismatched_keys"]:
        key, held, asked = min(found["mismatched_keys"], key=lambda one: in_order(one[0]))
        raise ValueError(
            f"the weights {key} of {name!r} are {sizes(held)} and its config.json asks for {sizes(asked)}; the two "
            "must be of one model."
        )
    if found["missing_keys"]:
        first, count = min(found["missing_keys"], key=in_order), len(found["missing_keys"])
        raise ValueError(
            f"the checkpoint {name!r} does not hold the weights {first}, one of {count} that its config.json asks for; "
            "mechvlm runs no made-up weights, so correct the configuration or complete the checkpoint."
        )
    return model


@contextmanager
def said_in_one_sentence(name: str) -> Iterator[None]:
    """Turn what transformers, torch and safetensors raise over a checkpoint into a sentence."""
    try:
        yield
    except TROUBLE as error:
        raise ValueError(f"the model {name!r} could not be loaded ({reason(error)}).") from None


def in_order(key: str) -> list[str | int]:
    """What sorts names of weights by their numbers, layer 8 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def sizes(shape: Any) -> str:
    """A shape as it is read out: 384 x 128."""
    return " x ".join(map(str, shape))


def type_of(dtype: Any) -> Any:
    """A type of weights, by itself or by its name."""
    names = ("float32", "float16", "bfloat16", "float64", "auto")
    if dtype is None or isinstance(dtype, torch.dtype) or dtype in names:
        return dtype
    raise ValueError(f"there is no type {told(dtype)} of weights; give one of {', '.join(map(repr, names))}.")


def reason(error: Exception) -> str:
    """The first sentence of what transformers or the hub says, to stand within another."""
    first, *more = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return (f"{first} {more[0]}" if first.endswith(":") and more else first).rstrip(".:")
