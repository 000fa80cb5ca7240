"""What jaxtyping's hook puts around every function of mechvlm, with the same checks in less time.

jaxtyping's own `jaxtyped` has the checker make two functions for each that it decorates, again for every function that
an inner `def` makes, and takes a call's arguments apart three times. That was a fifth of all that the tests took. Here
one is made at a function's first call, for all that come from the same lines.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import is_dataclass
from types import CodeType
from typing import Any

import beartype
import jaxtyping

SCOPE = jaxtyping.jaxtyped("context")
"""Axes have the same sizes within one call, and are forgotten after it."""

HELD = threading.local()
MADE: dict[tuple[str, str, CodeType], Callable] = {}
"""What checks a function, by its code: an inner function is made anew whenever the outer one is called."""


def jaxtyped(thing: Any = None, *, typechecker: Callable) -> Any:
    """A function whose arguments and result are checked, or a dataclass whose fields are; as `jaxtyping.jaxtyped`."""
    if thing is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(thing):
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__, typechecker)  # type: ignore[misc]
        return thing
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(checked(thing.__func__, typechecker))
    if isinstance(thing, property):
        return property(*(one and checked(one, typechecker) for one in (thing.fget, thing.fset, thing.fdel)))
    return checked(thing, typechecker)


def checked(function: Any, typechecker: Callable) -> Callable:
    """A function that is checked whenever it is called, unless jaxtyping is switched off then.

    Raises:
        TypeCheckError: at a call, for an argument or a result that is not what the signature says.
    """
    if not function.__annotations__:
        return function
    key = (function.__module__, function.__qualname__, function.__code__)

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **named)
        checks = MADE.get(key) or MADE.setdefault(key, made(function, typechecker))
        with SCOPE:
            HELD.function = function  # no function of mechvlm runs between here and the stand-in
            try:
                return checks(*args, **named)
            except beartype.roar.BeartypeCallHintViolation as wrong:
                raise jaxtyping.TypeCheckError(str(wrong)) from wrong

    return call


def made(function: Callable, typechecker: Callable) -> Callable:
    """What checks a call as a function's signature says, and then calls whichever function is held."""

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        return vars(HELD).pop("function")(*args, **named)

    checks = typechecker(call)
    for one in (call, checks):
        vars(one).pop("__wrapped__", None)  # this function, and what it closes over, may go
    return checks
