"""What jaxtyping's hook puts around every function of mechvlm, with the same checks in less time.

jaxtyping's own `jaxtyped` has the checker make two functions for each that it decorates, again for every function that
an inner `def` makes, and takes a call's arguments apart three times. That was a fifth of all that the tests took. Here
one is made, for all that come from the same lines, and only signatures with shapes remember what their axes are.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from types import CodeType, FunctionType
from typing import Any, get_type_hints

import beartype
import jaxtyping

SCOPE = jaxtyping.jaxtyped("context")
"""Within one call an axis has one size, which is forgotten after it."""

HELD = threading.local()
MADE: dict[tuple[str, str, CodeType], tuple[AbstractContextManager, Callable]] = {}
"""What checks a function, by its code: an inner function is made anew whenever the outer one is called."""


def jaxtyped(thing: Any = None, *, typechecker: Callable) -> Any:
    """A function whose arguments and result are checked, or a dataclass whose fields are; as `jaxtyping.jaxtyped`."""
    if thing is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(thing):
        if is_dataclass(thing) and "__init__" in vars(thing):
            setattr(thing, "__init__", checked(thing.__init__, typechecker))  # noqa: B010
        return thing
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(checked(thing.__func__, typechecker))
    if isinstance(thing, property):
        parts: list[Any] = [one and checked(one, typechecker) for one in (thing.fget, thing.fset, thing.fdel)]
        return property(*parts)
    return checked(thing, typechecker)


def checked(function: Any, typechecker: Callable) -> Callable:
    """A function that is checked whenever it is called, unless jaxtyping is switched off then.

    Raises:
        TypeCheckError: at a call, for an argument or a result that is not what the signature says.
    """
    if not function.__annotations__:
        return function
    key = (function.__module__, function.__qualname__, function.__code__)
    if key not in MADE:
        MADE[key] = made(function, typechecker)
    scope, checks = MADE[key]

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **named)
        with scope:
            HELD.function = function  # no function of mechvlm runs between here and the one that takes it up
            try:
                return checks(*args, **named)
            except beartype.roar.BeartypeCallHintViolation as wrong:
                raise jaxtyping.TypeCheckError(str(wrong)) from wrong

    return nowhere(call)


def made(function: FunctionType, typechecker: Callable) -> tuple[AbstractContextManager, Callable]:
    """Within what a function is called, and what checks its call and then calls whichever function is held."""
    same = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    same.__annotations__ = {name: known(hint, function) for name, hint in function.__annotations__.items()}
    functools.update_wrapper(same, function, ("__module__", "__name__", "__qualname__"), ())
    del same.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(same)
    def call(*args: Any, **named: Any) -> Any:
        return vars(HELD).pop("function")(*args, **named)

    checks = typechecker(nowhere(call))
    for one in (call, checks):
        vars(one).pop("__wrapped__", None)  # the first of these functions, and what it closes over, may go
    shapes = any("jaxtyping" in repr(hint) for hint in same.__annotations__.values())
    return (SCOPE if shapes else nullcontext()), checks


def nowhere(call: Any) -> Any:
    """A function that is in no file, so that whoever looks for the user's line does not stop here."""
    call.__code__ = call.__code__.replace(co_filename="<checked>")
    return call


def known(hint: Any, function: FunctionType) -> Any:
    """A hint without quotation marks, or anything at all where only type checkers know its names."""

    def one() -> None:
        pass

    one.__annotations__ = {"value": hint}
    try:
        return get_type_hints(one, function.__globals__, include_extras=True)["value"]
    except NameError:
        return Any
