"""What things are, as one short text: models, prompts, tensors, and what functions do.

Rule this module guards: two things that do otherwise have other texts. What a function does is told by its code and by
what it holds, tensors included.

>>> fingerprint([1, "a"]) == fingerprint([1, "a"])
True
"""

import dis
import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import unwrap
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm.devices import held, whole_numbers_of
from mechvlm.edits import Edit
from mechvlm.origins import file_of, installed
from mechvlm.shipping import MADE, generated
from mechvlm.vlm import VLM


def fingerprint(*things: Any) -> str:
    """What things are, as one short text; the same for the same, whatever process asks.

    Example:
        >>> fingerprint([1, "a"]) == fingerprint([1, "a"]), fingerprint(1) == fingerprint(2)
        (True, False)
    """
    known: dict[int, tuple[Any, bytes]] = {}
    return hashlib.sha256(written(things, known)).hexdigest()[:32]


def written(thing: Any, known: dict[int, tuple[Any, bytes]]) -> bytes:
    """What a thing is, as bytes.

    Args:
        known: what has been written already, by identity; each is held, so that no other can take its place in memory.
    """
    if id(thing) not in known:
        known[id(thing)] = (thing, b"a thing that holds itself")
        known[id(thing)] = (thing, hashlib.sha256(spelled(thing, known)).digest())
    return known[id(thing)][1]


def spelled(thing: Any, known: dict[int, tuple[Any, bytes]]) -> bytes:
    """The same of one that has not been written yet."""
    if isinstance(thing, Tensor):
        held = thing.detach().cpu().contiguous()
        return f"{held.dtype}{tuple(held.shape)}".encode() + held.view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        return f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes()
    if isinstance(thing, str | bytes | int | float | complex | None):
        return repr(thing).encode()
    if type(thing) in (list, tuple) and all(type(part) in (int, float, str) for part in thing):
        return repr(thing).encode()  # positions, of which there may be thousands
    if isinstance(thing, ModuleType) and comes_along(thing.__name__):
        return thing.__name__.encode()
    if isinstance(thing, type) and by_name(thing):
        return f"{thing.__module__}.{thing.__qualname__}".encode()
    parts = list(parts_of(thing))
    if isinstance(thing, set | frozenset):
        return b"set" + b"".join(sorted(written(part, known) for part in parts))
    return type(thing).__qualname__.encode() + b"".join(written(part, known) for part in parts)


def parts_of(thing: Any) -> Iterable[Any]:
    """What a thing is made of."""
    if isinstance(thing, VLM):
        return [thing.name, list(thing.edits)]  # its weights are told once, by `weights_print`
    if isinstance(thing, Edit) and thing.bias is not None:
        return [str(thing), thing.bias, thing.when, thing.site]
    if isinstance(thing, ModuleType):
        return [thing.__name__, {name: one for name, one in vars(thing).items() if not name.startswith("__")}]
    if isinstance(thing, type):
        own = {name: one for name, one in vars(thing).items() if written_by_hand(name, one)}
        return [thing.__qualname__, own, thing.__bases__]
    if isinstance(thing, classmethod | staticmethod):
        return [thing.__func__]
    if isinstance(thing, property):
        return [thing.fget, thing.fset, thing.fdel]
    if isinstance(thing, FunctionType):
        return parts_of_function(thing)
    if isinstance(thing, CodeType):
        return [thing.co_code, thing.co_names, thing.co_varnames, list(thing.co_consts)]
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, Mapping):
        return [one for pair in sorted(thing.items(), key=lambda pair: str(pair[0])) for one in pair]
    if isinstance(thing, list | tuple | set | frozenset | np.ndarray):
        return thing
    return parts_of_object(thing)


def written_by_hand(name: str, thing: Any) -> bool:
    """Whether an entry of a class is its author's: `__call__` and the like are, what Python adds by itself is not."""
    if not name.startswith("__"):
        return True
    return isinstance(thing, FunctionType) and not (name in MADE and generated(thing))


def parts_of_object(thing: Any) -> Iterable[Any]:
    """What an object holds: what would be copied of it, slots and the state of generators of numbers included."""
    if isinstance(thing, torch.Generator):
        return [thing.get_state()]
    try:
        held = thing.__reduce_ex__(4)
    except TypeError:  # it cannot be copied
        try:
            return [vars(thing)]
        except TypeError:
            return [text_of(thing)]
    return held if isinstance(held, tuple) else [text_of(thing)]


def text_of(thing: Any) -> str:
    """A thing by its text; without its place in memory, which no two processes share."""
    text = repr(thing)
    return type(thing).__qualname__ if " at 0x" in text else text


def parts_of_function(function: FunctionType) -> list[Any]:
    """What a function does: its code, its defaults, what it holds, and what it finds by name."""
    known = by_name(function)
    function = unwrap(function) if known else function  # from the checks of shapes that a test run puts around ours
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    if known:
        named = function.__module__, function.__qualname__
        return [*named, function.__defaults__, function.__kwdefaults__, *held]
    names = sorted(names_in(function.__code__) & set(function.__globals__))
    found = [one for name in names for one in (name, function.__globals__[name])]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, *held, *found]


def by_name(thing: Any) -> bool:
    """Whether a function or class comes with a package, ours included, and is known by its name."""
    return comes_along(str(thing.__module__))


def comes_along(module: str) -> bool:
    """Whether a module comes with a package, ours included."""
    package = module.split(".", maxsplit=1)[0]
    if package == "__main__":  # a user's, though Ray's workers have a file of Ray's there
        return False
    known = package in {"mechvlm", *sys.stdlib_module_names}
    return known or any(installed(file) for file in (file_of(module), file_of(package)) if file)


def names_in(code: CodeType) -> set[str]:
    """The names that a function's code looks up, and that of functions within it."""
    within = [names_in(one) for one in code.co_consts if isinstance(one, CodeType)]
    # Names of attributes stand in `co_names` too; another thing of such a name is none of the function's.
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*within)


def weights_print(vlm: Any) -> list[str]:
    """A model's weights: of each its shape, its sum, its squares' sum, and where its largest values stand."""
    if not vlm.embedding.is_meta or not vlm.place.remote:
        found: list[str] = vlm.place.ask(vlm.model, prints_of)
        return found
    # A server's weights stay what they are, and each of many sweeps would ask for them in a job of its own.
    kept: list[str] = vlm.place.weights
    kept += () if kept else vlm.place.ask(vlm.model, prints_of) or ["known by the model's name and revision alone"]
    return list(kept)


def prints_of(model: Any) -> list[str]:
    """The same, where the model runs; nothing where code runs beside the weights, and not with them.

    Args:
        model: the nnsight model.
    """
    found = []
    for name, _ in model._module.named_parameters():
        try:
            weight = held(model._module, name)
        except ValueError:
            return []
        flat = whole_numbers_of(weight.detach()).flatten()
        sums = flat.sum(dtype=torch.float64), torch.linalg.vector_norm(flat, dtype=torch.float64)
        numbers = " ".join(f"{float(one):.7e}" for one in sums)
        found.append(f"{name} {tuple(weight.shape)} {numbers} {int(flat.argmax())} {int(flat.argmin())}")
    return found
