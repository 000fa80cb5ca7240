"""Where a model runs: in this process, or elsewhere, with a job for each thing that is asked of it.

Everything that touches a model's activations is a plain function of the nnsight model and of plain values, which opens
its own traces. A place is asked to run such a function, and answers what it returned.

Rule this module guards: nothing below `mv.load(..., remote=)` differs. What runs elsewhere is the very function that
runs here, sent by its source (`mechvlm.shipping`), and what it returns are tensors, numbers, texts, and lists, tuples
and mappings of them.

>>> HERE.ask(vlm.model, lambda model, x: x + 1, 1)
2
"""

import io
import linecache
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from nnsight import save
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.util import push
from torch import Tensor

from mechvlm.hosts import Server
from mechvlm.jobs import JobBackend
from mechvlm.lazy_attention import Attention
from mechvlm.masks import Sees
from mechvlm.shipping import payload, ship
from mechvlm.sites import told


@dataclass(frozen=True)
class Here:
    """In this process."""

    remote = False
    name = ""

    def ask(self, model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model and of plain values."""
        return function(model, *arguments)


HERE = Here()


@dataclass(frozen=True)
class There:
    """Elsewhere: on NDIF, on a server of one's own, or, to try it out, in this process as if it were elsewhere.

    Attributes:
        backend: makes what sends a captured block and brings its results, from a model and from what is asked of it.
        name: what it is called, for records.
        traffic: bytes sent and bytes brought back, compressed as they travel, of each job so far.
        weights: what the model's weights are (`mechvlm.fingerprints`), once it was asked.
    """

    backend: Callable[[Any, tuple], Any]
    name: str
    traffic: list[tuple[int, int]] = field(default_factory=list, compare=False)
    weights: list[str] = field(default_factory=list, compare=False)

    remote = True

    def ask(self, model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model and of plain values, as one job."""
        answer: Callable[..., Any] = answered
        found: Any = None
        backend = self.backend(model, (function, arguments))
        with model.session(backend=backend):
            found = answer(function, model, arguments).save()
        self.traffic.append(backend.traffic)
        return unpacked(found["answer"])


def answered(function: Callable[..., Any], model: Any, arguments: tuple) -> dict:
    """What a function returned, as what can be sent."""
    return {"answer": packed(function(model, *arguments))}


MARK = "mechvlm attention"


def packed(value: Any) -> Any:
    """A value in what every computer with torch can read."""
    if isinstance(value, Attention):
        if value.change is not None:
            raise ValueError(
                "attention that an edit changes cannot be sent from where the model runs without being made; read "
                "rows(), mass() or the like instead of lazy()."
            )
        held = {name: x for name, x in value.__dict__.items() if name not in ("sees", "own", "change")}
        own = None if value.own is None else written_out(value.own, value.q)
        return {MARK: packed({**held, "sees": written_out(value.sees, value.q), "own": own})}
    if isinstance(value, Tensor):
        # What is part of a larger tensor would travel with all of it.
        return value.detach().clone() if value.untyped_storage().nbytes() > value.nbytes else value.detach()
    if isinstance(value, Mapping):
        return {name: packed(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        found = [packed(one) for one in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float | bool | bytes | slice | torch.dtype | torch.device):
        return value
    raise TypeError(
        f"what was read is {type(value).__module__}.{type(value).__qualname__}, which cannot be sent from where the "
        "model runs; return tensors, numbers, texts, or lists, tuples and mappings of them."
    )


def written_out(sees: Sees, like: Tensor) -> dict:
    """Who sees whom as plain values; a rule that is a function is written out as a mask."""
    if sees.rule is not None or sees.kept is not None:
        return {"query": sees.query, "key": sees.key, "handed": sees.whole(like)}
    return {name: x for name, x in sees.__dict__.items() if name not in ("rule", "kept")}


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    if isinstance(value, dict) and MARK in value:
        held = unpacked(value[MARK])
        own = None if held["own"] is None else Sees(**held["own"])
        return Attention(**{**held, "sees": Sees(**held["sees"]), "own": own})
    if isinstance(value, dict):
        return {name: unpacked(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        found = [unpacked(one) for one in value]
        return found if isinstance(value, list) else tuple(found)
    return value


def of_ours(saved: Mapping[str, Any]) -> bool:
    """Whether what a job saved is an answer of `answered`."""
    return [*saved] == ["found"] and isinstance(saved["found"], dict) and [*saved["found"]] == ["answer"]


class Simulated(Backend):
    """Runs a captured block in this process from what would be sent, with nothing but torch and nnsight to import."""

    def __init__(self, model: Any, _asked: tuple = ()) -> None:
        self.model = model
        self.traffic = (0, 0)

    def __call__(self, tracer: Any) -> None:
        """Send, receive and run a block, and write what it saved into the frame that it stands in."""
        sent, frame = payload(tracer, compress=False), tracer.info.frame
        name = frame.f_code.co_filename
        lines = linecache.cache.get(name)
        hidden = {module: sys.modules.pop(module) for module in [*sys.modules] if not on_servers(module)}
        try:
            received = RequestModel.deserialize(sent, persistent(self.model), compress=False)
        finally:
            sys.modules.update(hidden)
            # The block's source is registered under this file's name, whose own lines are others.
            linecache.cache.pop(name)
            if lines is not None:
                linecache.cache[name] = lines
        received.execute(received.info.code)
        found = received.info.frame.f_locals
        back = io.BytesIO()
        torch.save(found["found"], back)
        self.traffic = (packed_size(sent), packed_size(back.getvalue()))
        with torch.serialization.safe_globals([slice]):
            arrived = torch.load(io.BytesIO(back.getvalue()), weights_only=True)
        save(arrived)
        push(frame, {"found": arrived})


def packed_size(content: bytes) -> int:
    """How many bytes travel for these."""
    from zstandard import ZstdCompressor  # which only remote runs need

    return len(ZstdCompressor(level=6).compress(content))


def on_servers(module: str) -> bool:
    """Whether a module can be there when what was sent is read."""
    root = module.split(".", maxsplit=1)[0]
    there = ("torch", "numpy", "transformers", "einops", "nnsight", "cloudpickle", "greenlet", "torchvision")
    return root in there or (root in sys.stdlib_module_names and root != "__main__")


def persistent(model: Any) -> dict[str, Any]:
    """What is not sent, but is there already: the modules and the machinery of their traces."""
    return {"Interleaver": model.interleaver, **{f"Module:{one.path}": one._module for one in model.modules()}}


def place_of(remote: Any) -> Here | There:
    """Where a model runs, from what the user said.

    Raises:
        TypeError, ValueError: for anything but False, True, "local", the address of a server, or a `Server`.
    """
    if remote is False or remote is None:
        return HERE
    if not (remote is True or isinstance(remote, str | Server)):
        raise TypeError(f"remote={told(remote)} says no place; give True for NDIF, 'local', or a server's address.")
    if isinstance(remote, str) and remote != "local" and not remote.startswith(("http://", "https://")):
        raise ValueError(
            f"remote={remote!r} is no place; give True for NDIF, 'http://...' for a server of your own, or 'local' to "
            "try here what would be sent."
        )
    ship("mechvlm")
    if remote == "local":
        return There(Simulated, "this machine, as if elsewhere")
    server = remote if isinstance(remote, Server) else Server(None if remote is True else remote)
    return There(lambda model, asked: job_of(model, asked, server), server.host or "NDIF")


def job_of(model: Any, asked: tuple, server: Server) -> Backend:
    """What sends a block to a server as one job, which is known again by what is asked for.

    Args:
        asked: the function, and what it is given; empty for a job that is sent whatever was sent before.
        server: where it is sent, and how it is waited for.
    """
    from mechvlm.fingerprints import fingerprint  # which knows models, whose places these are

    env = model._remoteable_get_env()
    known = fingerprint(*asked, sorted(env.items()), version("mechvlm")) if asked else ""
    return JobBackend(model.to_model_key(), server, env, known, payload=payload)
