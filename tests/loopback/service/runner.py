"""What shipped code has of the model where NDIF runs it in a process of its own: modules, traces and calls, no weights.

NDIF's server (its documentation of autumn 2026, `docs/concepts/sandbox-execution.md`) runs the code of keys that are
not trusted beside the model. There the module tree stands without weights; what a trace reads is sent over, and so is
what a module, called inside a trace by its name in nnsight's tree, makes of a value. Here code and model share a
process; weights that would not be there are handed out on torch's "meta" device, which has shapes and no numbers, and
calls are refused.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import nnsight
import torch
from nnsight.intervention.envoy import Envoy

from .guard import SAFE

NNSIGHT = nnsight.__path__[0]
REAL_GET, REAL_CALL, REAL_ENVOY = torch.nn.Module.__getattr__, torch.nn.Module.__call__, Envoy.__call__
REAL_NAMED, REAL_ONE = torch.nn.Module.named_parameters, torch.nn.Module.get_parameter
HOOK = torch.nn.Module.register_forward_hook


def shipped(frame: FrameType | None) -> bool:
    """Whether a frame is of shipped code, or of nnsight's looking up a module's attribute for it."""
    while frame is not None and frame.f_code.co_filename.startswith(NNSIGHT) and frame.f_code.co_name == "__getattr__":
        frame = frame.f_back
    return frame is not None and frame.f_builtins is SAFE


def weightless(found: Any) -> Any:
    """A tensor as it stands in a module tree without weights: its shape and its type."""
    return torch.empty_like(found, device="meta") if isinstance(found, torch.Tensor) else found


def get(module: torch.nn.Module, name: str) -> Any:
    """What a module holds; of its weights, where shipped code asks, their shape and type."""
    found = REAL_GET(module, name)
    return weightless(found) if shipped(sys._getframe(1)) else found


def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module, unless shipped code does without nnsight."""
    if sys._getframe(1).f_builtins is SAFE:
        raise RuntimeError(f"the weights are not where this code runs (called {type(module).__name__} itself)")
    return REAL_CALL(module, *args, **kwargs)


def named(envoy: Envoy, *args: Any, **kwargs: Any) -> Any:
    """Calls a module by its name in nnsight's tree, which takes a trace that runs."""
    if not envoy.interleaver.interleaving and sys._getframe(1).f_builtins is SAFE:
        raise RuntimeError(f"the weights are not where this code runs (called {envoy.path} outside a trace)")
    return REAL_ENVOY(envoy, *args, **kwargs)


def named_parameters(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """A module's weights by their names."""
    apart = shipped(sys._getframe(1))
    return ((name, weightless(one) if apart else one) for name, one in REAL_NAMED(module, *args, **kwargs))


def parameters(module: torch.nn.Module, recurse: bool = True) -> Iterator[Any]:
    """A module's weights."""
    apart = shipped(sys._getframe(1))
    return (weightless(one) if apart else one for _, one in REAL_NAMED(module, recurse=recurse))


def get_parameter(module: torch.nn.Module, name: str) -> Any:
    """One of a module's weights."""
    found = REAL_ONE(module, name)
    return weightless(found) if shipped(sys._getframe(1)) else found


def hooked(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A hook on a module; the model does not run where shipped code does."""
    if sys._getframe(1).f_builtins is not SAFE:
        return HOOK(module, *args, **kwargs)
    raise RuntimeError(f"the model does not run where this code does (a hook on {type(module).__name__})")


def stand_apart() -> None:
    """Keep weights from shipped code from now on."""
    ours = {"named_parameters": named_parameters, "parameters": parameters, "get_parameter": get_parameter}
    for name, function in {**ours, "register_forward_hook": hooked, "__getattr__": get, "__call__": call}.items():
        setattr(torch.nn.Module, name, function)
    setattr(Envoy, "__call__", named)  # noqa: B010 (a method of nnsight's, which mypy would not have replaced)
