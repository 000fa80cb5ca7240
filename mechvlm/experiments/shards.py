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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.metrics import WordMetric
from mechvlm.sites import told

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
            with xr.open_dataset(path, engine="h5netcdf") as shard:
                if shard.attrs["fingerprint"] != self.fingerprint:
                    raise ValueError(
                        f"out={str(self.folder)!r} holds another sweep: the model, the prompt, the metric, the axes or "
                        "what the edits do is not the same; give another folder, or empty this one."
                    )
                found |= dict(zip(shard.point.values.tolist(), shard.value.values.tolist(), strict=True))
        return found

    def add(self, points: Iterable[int], values: Tensor) -> None:
        """Keep a finished batch; it is there whole or not at all."""
        numbers = np.asarray(list(points))
        shard = xr.Dataset({"value": ("point", values.detach().double().cpu().numpy())}, {"point": numbers})
        taken = [int(path.stem.removeprefix("points-")) for path in self.files()]
        name = f"points-{max(taken, default=-1) + 1:06d}"
        unfinished = self.folder / f"{name}.unfinished"
        shard.assign_attrs(fingerprint=self.fingerprint).to_netcdf(unfinished, engine="h5netcdf")
        unfinished.replace(self.folder / f"{name}{SUFFIX}")


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
    parts: list[Any]
    if isinstance(thing, Tensor):
        held = thing.detach().cpu().contiguous()
        return f"{held.dtype}{tuple(held.shape)}".encode() + held.view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        return f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes()
    if isinstance(thing, Edit):
        parts = [str(thing), thing.site, thing.when, thing.on, thing.positions, thing.heads, thing.rows, thing.bias]
        return b"".join(written(part, known) for part in [*parts, *([] if thing.bias else [thing.fn])])
    if isinstance(thing, WordMetric):
        return repr((thing.name, thing.words, thing.ids)).encode()
    if isinstance(thing, FunctionType):
        return of_function(thing, known)
    if isinstance(thing, Mapping):
        parts = [one for pair in sorted(thing.items(), key=lambda pair: str(pair[0])) for one in pair]
        return b"map" + b"".join(written(part, known) for part in parts)
    if isinstance(thing, list | tuple):
        return b"list" + b"".join(written(part, known) for part in thing)
    return told_in_full(thing).encode()


def told_in_full(thing: Any) -> str:
    """A thing by its text; by its type alone where the text names a place in memory, which no two processes share."""
    text = repr(thing)
    return f"a {type(thing).__qualname__}" if " at 0x" in text else text


def of_function(function: Callable, known: dict[int, tuple[Any, bytes]]) -> bytes:
    """What a function does: its code, its defaults, and what it holds."""
    code = vars_of_code(function)
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    names = [function.__globals__[name] for name in code[2] if name in function.__globals__]
    more = [one for one in names if isinstance(one, FunctionType | Tensor | int | float | str | tuple)]
    parts = [*code, function.__defaults__, function.__kwdefaults__, *held, *more]
    return b"function" + b"".join(written(part, known) for part in parts)


def vars_of_code(function: Any) -> tuple[bytes, list[Any], tuple[str, ...]]:
    """A function's code, the constants in it (those of functions within it by their code), and the names it uses."""
    code = function.__code__
    constants = [(one.co_code, one.co_names) if isinstance(one, type(code)) else one for one in code.co_consts]
    return code.co_code, constants, code.co_names
