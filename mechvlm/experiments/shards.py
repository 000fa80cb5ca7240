"""Finished points of a sweep, kept in a folder as they are finished, so that a sweep that was stopped goes on.

Each batch is a netCDF file of its own, put in place whole, so that a stop at any moment loses at most the batch that
was running. Each says of which sweep it is: the model, the prompt, the metric, the points and what their edits do.

Rule this module guards: values are never taken for another sweep's. What a function does is told by its code and by
what it holds, tensors included.

>>> shards = Shards("sweeps/heads", fingerprint("heads", 64))
>>> shards.add((0, 1), torch.tensor([0.5, 0.25])); shards.values()
{0: 0.5, 1: 0.25}
"""

import hashlib
import sys
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.sites import told
from mechvlm.vlm import VLM

SUFFIX = ".nc"


class Shards:
    """A folder of finished points.

    Args:
        folder: where; made if it is not there.
        print_of: the fingerprint of the sweep.

    Raises:
        TypeError: for what is no path.
        ValueError: for a folder that holds another sweep.
    """

    def __init__(self, folder: str | Path, print_of: str) -> None:
        if not isinstance(folder, str | Path):
            raise TypeError(f"out={told(folder)} is not a folder; give its path, or None to keep nothing on disk.")
        self.folder, self.fingerprint = Path(folder), print_of
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out={str(folder)!r} is a file; give a folder, in which each finished batch is a file.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.values()

    def files(self) -> list[Path]:
        """The batches that are there."""
        return sorted(self.folder.glob(f"points-*{SUFFIX}"))

    def values(self) -> dict[int, float]:
        """The finished points' values, by their number.

        Raises:
            ValueError: where the folder holds another sweep's.
        """
        found: dict[int, float] = {}
        for path in self.files():
            with opened(path) as shard:
                if shard.attrs.get("fingerprint") != self.fingerprint:
                    raise ValueError(
                        f"out={str(self.folder)!r} holds another sweep: the model, the prompt, the metric, the axes or "
                        "what the edits do is not the same; give another folder, or empty this one."
                    )
                found |= dict(zip(shard.point.values.tolist(), shard.value.values.tolist(), strict=True))
        return found

    def add(self, points: Iterable[int], values: Tensor) -> None:
        """Keep a finished batch; it is there whole or not at all, whoever else writes into the folder."""
        numbers = np.asarray(list(points))
        shard = xr.Dataset({"value": ("point", values.detach().double().cpu().numpy())}, {"point": numbers})
        name = f"points-{numbers[0]:06d}-{uuid.uuid4().hex[:12]}"
        unfinished = self.folder / f"{name}.unfinished"
        shard.assign_attrs(fingerprint=self.fingerprint).to_netcdf(unfinished, engine="h5netcdf")
        unfinished.replace(self.folder / f"{name}{SUFFIX}")


def opened(path: Path) -> xr.Dataset:
    """A finished batch.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        return xr.open_dataset(path, engine="h5netcdf")
    except OSError:
        raise ValueError(f"{str(path)!r} is no finished batch of a sweep; take it out of the folder.") from None


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
    if isinstance(thing, ModuleType) or (isinstance(thing, type) and installed(thing)):
        return thing.__name__.encode()
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
    if isinstance(thing, type):
        return [thing.__qualname__, {name: one for name, one in vars(thing).items() if not name.startswith("__")}]
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
    try:
        return [vars(thing)]
    except TypeError:
        return [text_of(thing)]  # of a built-in type


def text_of(thing: Any) -> str:
    """A thing by its text; without its place in memory, which no two processes share."""
    text = repr(thing)
    return type(thing).__qualname__ if " at 0x" in text else text


def parts_of_function(function: FunctionType) -> list[Any]:
    """What a function does: its code, its defaults, what it holds, and what it finds by name."""
    known = installed(function)
    function = unwrap(function) if known else function  # from the checks of shapes that a test run puts around ours
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    if known:
        return [function.__qualname__, function.__defaults__, function.__kwdefaults__, *held]
    names = sorted(names_in(function.__code__) & set(function.__globals__))
    found = [one for name in names for one in (name, function.__globals__[name])]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, *held, *found]


def installed(thing: Any) -> bool:
    """Whether a function or class comes with a package, ours included, and is known by its name."""
    package = str(thing.__module__).split(".")[0]
    path = vars(sys.modules[package]).get("__file__") if package in sys.modules else None
    return package in {"mechvlm", *sys.stdlib_module_names} - {"__main__"} or "site-packages" in str(path)


def names_in(code: CodeType) -> set[str]:
    """The names that a function's code uses, and that of functions within it."""
    within = [names_in(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*within)


def weights_print(hf_model: torch.nn.Module) -> list[str]:
    """A model's weights: of each its shape, its sum, its squares' sum, and where its largest values stand."""
    found = []
    for name, weight in hf_model.named_parameters():
        flat = weight.detach().flatten()
        sums = flat.sum(dtype=torch.float64), torch.linalg.vector_norm(flat, dtype=torch.float64)
        numbers = " ".join(f"{float(one):.7e}" for one in sums)
        found.append(f"{name} {tuple(weight.shape)} {numbers} {int(flat.argmax())} {int(flat.argmin())}")
    return found
