"""What stands, where a model runs, for what cannot be sent as it is: plain functions that have source.

>>> partially(max, 3)(1, 2)
3
"""

import operator
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from typing import Any

ORDERS = {"__lt__": operator.lt, "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge}


def made_for(kind: Any, asked: Any) -> dict[str, Callable[..., Any]]:
    """What `dataclasses` makes for a class, as functions that have source.

    Args:
        asked: what the class was decorated with, `__dataclass_params__`.
    """
    made: dict[str, Callable[..., Any]] = {"__init__": init_of(kind)} if asked.init else {}
    names = [one.name for one in fields(kind) if one.compare]
    if "__slots__" in vars(kind):
        made["__setstate__"] = state_of([one.name for one in fields(kind)])
    if asked.eq:
        made |= {"__eq__": compared(names, operator.eq), "__hash__": hash_of(names)}
    return made | ({name: compared(names, by) for name, by in ORDERS.items()} if asked.order else {})


def init_of(kind: Any) -> Callable[..., None]:
    """What `dataclasses` makes a class's `__init__` of, as a function that has source."""
    own = [one.name for one in fields(kind)]
    makers = {one.name: one.default_factory for one in fields(kind) if one.default_factory is not MISSING}
    given = [*signature(kind.__init__).parameters.values()][1:]
    names = [one.name for one in given]
    defaults = {one.name: one.default for one in given if one.default is not Parameter.empty}
    defaults = {name: value for name, value in defaults.items() if name not in makers}
    handed = [name for name in names if name not in own]
    checked = "__post_init__" in dir(kind)

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        values = {**defaults, **dict(zip(names, given)), **named}  # noqa: B905 - those left out have defaults
        for name in own:
            if name in values or name in makers:
                object.__setattr__(self, name, values[name] if name in values else makers[name]())
        if checked:
            self.__post_init__(*[values[name] for name in handed])

    return __init__


def state_of(names: list[str]) -> Callable[[Any, Any], None]:
    """What sets the fields of a class with slots: a list of values, or as Python itself sends them."""

    def __setstate__(self: Any, state: Any) -> None:
        given = dict(zip(names, state, strict=True)) if isinstance(state, list) else state[1]
        for name, value in given.items():
            object.__setattr__(self, name, value)

    return __setstate__


def compared(names: list[str], by: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    """Equality or order of dataclasses, by some of their fields."""

    def compare(self: Any, other: Any) -> Any:
        if type(self) is not type(other):
            return NotImplemented
        return by(*(tuple(one.__getattribute__(name) for name in names) for one in (self, other)))

    return compare


def hash_of(names: list[str]) -> Callable[[Any], int]:
    """The hash of a frozen dataclass."""
    return lambda self: hash(tuple(self.__getattribute__(name) for name in names))


def changed(value: Any, **fields: Any) -> Any:
    """`dataclasses.replace`, for values whose classes have arrived without their fields."""
    return type(value)(**{**value.__dict__, **fields})


def bound(function: Any, args: tuple, named: dict) -> Any:
    """A `functools.partial` as a plain function."""
    return lambda *more, **others: function(*args, *more, **{**named, **others})


def together(*kinds: type) -> tuple:
    """Several classes, for `isinstance`."""
    return kinds


def partially(function: Any, *args: Any, **named: Any) -> Any:
    """`functools.partial` itself."""
    return lambda *more, **others: function(*args, *more, **{**named, **others})


def within() -> Any:
    """A function inside a context of torch's, such as `@torch.no_grad()`; which function and which, `held_by` says."""
    held: list[Any] = []

    def entered(*given: Any, **named: Any) -> Any:
        opened, function = held
        with opened():
            return function(*given, **named)

    entered.held = held  # type: ignore[attr-defined]
    return entered


def held_by(entered: Any, held: tuple) -> None:
    """Tell what `within` made which context it opens, and for which function."""
    entered.held.extend(held)
