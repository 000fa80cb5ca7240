"""Code as it travels to where a model runs: by its source, with nothing of mechvlm needed there.

nnsight sends a traced block to a server as source, with all that the block refers to. This module is its pickler with
what a toolkit needs beside: functions and classes of mechvlm go by source wherever it is installed, without annotations
and without what `dataclasses` makes (which is bytecode of one Python version); and what the server would refuse, or
would silently run as something else, is refused here, before it is sent, by name.

Rule this module guards: what is sent refers to `ALLOWED` modules and to nothing else that has to be installed there.

>>> ALLOWED[:3]
('builtins', 'torch', 'math')
"""

import __future__

import dis
import inspect
import io
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, UnionType
from typing import Any
from uuid import uuid4

import torch
from nnsight import register
from nnsight.intervention.serialization import DEFAULT_PROTOCOL, CustomCloudPickler, reduce_block
from nnsight.ndif import pull_env
from nnsight.schema.config import CONFIG

from mechvlm.origins import file_of, installed
from mechvlm.remade import bound, changed, held_by, made_for, partially, together, within

ALLOWED = (
    "builtins", "torch", "math", "numpy", "einops", "collections", "operator", "_operator", "typing", "enum", "time",
    "pandas", "sympy",
)  # fmt: skip
"""What a server lets shipped code use: the whitelist of NDIF's published server (ndif-team/ndif, February 2026)."""
MACHINERY = ("nnsight", "cloudpickle", "copyreg", "_codecs", "_collections_abc", "_collections", "_io")
"""What unpickling itself refers to."""
MADE = (
    "__init__", "__eq__", "__hash__", "__repr__", "__setattr__", "__delattr__", "__replace__", "__lt__", "__le__",
    "__gt__", "__ge__", "__getstate__", "__setstate__",
)  # fmt: skip
"""Functions that `dataclasses` makes, without source."""
PARAMS = "__dataclass_params__"
KEPT_OUT = ("__annotations__", "__dataclass_fields__", PARAMS, "__match_args__", "__doc__")
"""What else a class has in its dictionary that is not needed where it arrives."""

ABSENT = ("open", "exec", "compile", "locals", "bin", "breakpoint", "exit", "quit", "help", "license")
"""Python's own functions that servers take away from shipped code."""
SOURCELESS = ("<string>", replace.__code__.co_filename)
SAYING = ("LOAD", "STORE", "BINARY", "UNARY", "COMPARE", "CONTAINS", "IS_OP")
INSTEAD_OF = {
    "mechvlm.imagemap.ImageMap": "the positions that are wanted",
    "xarray.core.dataset.Dataset": "its numbers, torch.as_tensor(x.values)",
    "xarray.core.dataarray.DataArray": "its numbers, torch.as_tensor(x.values)",
    "PIL.Image.Image": "its numbers, torch.as_tensor(numpy.array(picture))",
}
"""What users' functions like to hold and is not sent, and what they may hold instead."""

REMEMBERED: dict[FunctionType, tuple] = {}
"""How functions of this package are sent: reading their source takes longer than many a run."""
SENT: dict[type, Callable[[Any], tuple]] = {}
"""Types of values that are sent as others: from a value to what makes the other, and of what."""


class Unsendable(ValueError):
    """Something that cannot be sent to where the model runs."""


def ship(package: str) -> None:
    """Let a package's functions and classes travel by source; its submodules with it."""
    register(package)


def payload(tracer: Any, compress: bool | None = None) -> bytes:
    """A captured block with all that it refers to, as nnsight's `RequestModel.deserialize` reads it.

    Args:
        compress: by default as nnsight is configured.

    Raises:
        Unsendable: for a function that would not be the same there, or a module that is not there.
    """
    pull_env()  # modules of the user's that are not installed travel by source
    frame = tracer.info.frame
    block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    held = io.BytesIO()
    Courier(held).dump((tracer, block))
    if not (CONFIG.API.COMPRESS if compress is None else compress):
        return held.getvalue()
    from zstandard import ZstdCompressor  # which only remote runs need

    return ZstdCompressor(level=6).compress(held.getvalue())


class Courier(CustomCloudPickler):
    """nnsight's pickler, for what a toolkit has to send: the one seam to how nnsight ships code."""

    def __init__(self, file: Any) -> None:
        CustomCloudPickler.__init__(self, file, protocol=DEFAULT_PROTOCOL)
        self.mark = uuid4().hex

    def reducer_override(self, obj: Any) -> Any:
        """How an object is sent; NotImplemented for the ordinary way."""
        if type(obj) in SENT:
            return SENT[type(obj)](obj)
        check_held(type(obj))
        if type(obj).__name__ == "_lru_cache_wrapper":
            return self.reducer_override(obj.__wrapped__)  # the same results, found anew
        if type(obj) is partial:
            return bound, (obj.func, obj.args, obj.keywords)
        if isinstance(obj, UnionType):
            return together, obj.__args__
        if isinstance(obj, ModuleType):
            check_module(obj.__name__, f"the module {obj.__name__}")
        if isinstance(obj, FunctionType | type):
            obj = INSTEAD.get(obj, obj)
        if isinstance(obj, FunctionType) and obj in REMEMBERED:
            return REMEMBERED[obj]
        sent = self.by_source(obj)
        if not isinstance(obj, FunctionType | BuiltinFunctionType | type):
            return sent
        if sent is not NotImplemented and len(sent) == 2:
            return sent  # the type of None, and the like
        if sent is NotImplemented and not allowed(str(obj.__module__)) and of_users(str(obj.__module__)):
            register(str(obj.__module__))
            return self.reducer_override(obj)
        if sent is NotImplemented:  # by reference
            check_module(str(obj.__module__ or "builtins"), f"{obj.__qualname__} of {obj.__module__}")
            return sent
        return self.of_class(obj, sent) if isinstance(obj, type) else self.of_function(obj, sent)

    def by_source(self, obj: Any) -> Any:
        """How nnsight sends an object: a function by the lines that it stands in, which are read out of their place.

        Raises:
            Unsendable: where they are no function there.
        """
        try:
            return CustomCloudPickler.reducer_override(self, obj)
        except SyntaxError as why:
            raise Unsendable(
                f"the lines of the function {obj.__qualname__} cannot be sent by themselves ({why.msg}); write it at "
                "the left margin of a file, without nonlocal, and let its arguments hold what it needs."
            ) from None

    def of_function(self, function: Any, sent: tuple) -> tuple:
        """A function that is sent by source, undecorated where that is the same, and without its annotations."""
        inner = undecorated(function)
        if "ctx_factory" in inner.__code__.co_freevars and of_torch(inner):
            opened = dict(zip(inner.__code__.co_freevars, inner.__closure__, strict=True))["ctx_factory"]
            return within, (), (opened.cell_contents, inner.__wrapped__), None, None, held_by
        if not ours(inner):
            check_code(inner.__code__, inner)
        made, given, *rest = sent if inner is function else CustomCloudPickler.reducer_override(self, inner)
        if not ours(inner):
            check_source(given[0] if len(given) == 7 else "", inner)
        if len(given) == 7:
            # It is found in its source by the name that stands there, which is not always the one it goes by.
            given = (given[0], inner.__code__.co_name, *given[2:4], None, *given[5:])
        found = (made, given, *rest)
        if ours(function) and inner.__closure__ is None:
            REMEMBERED[function] = found
        return found

    def of_class(self, kind: Any, sent: tuple) -> tuple:
        """A class, with what a dataclass has made for it written out in functions that have source."""
        made, given, state, *rest = sent
        # cloudpickle knows classes again by this mark, and would write into the sender's own in the same process.
        given = (*given[:4], f"{self.mark}-{given[4]}", *given[5:])
        own = {name: value for name, value in state[0].items() if name not in KEPT_OUT}
        if ours(kind):
            # These make values of what users write, which is done before anything is sent.
            own = {name: value for name, value in own.items() if not isinstance(value, classmethod)}
        if is_dataclass(kind):
            own = {name: value for name, value in own.items() if name not in MADE or not generated(value)}
            own = {**made_for(kind, vars(kind)[PARAMS]), **own} if PARAMS in vars(kind) else own
        return (made, given, (own, *state[1:]), *rest)


def ours(thing: Any) -> bool:
    """Whether a function or class is of this package."""
    return str(thing.__module__).split(".")[0] == "mechvlm"


def generated(value: Any) -> bool:
    """Whether an entry of a class's dictionary is a function without a file of its own, or of `dataclasses`."""
    return not isinstance(value, FunctionType) or inspect.unwrap(value).__code__.co_filename in SOURCELESS


INSTEAD: dict[Any, Any] = {replace: changed, partial: partially}
"""What modules have that servers do not have, and what does the same there."""


def undecorated(function: Any) -> Any:
    """The function inside decorators that do nothing to its result; torch's contexts go along.

    Raises:
        Unsendable: for any other decorator, which nnsight would drop without a word.
    """
    while "__wrapped__" in function.__dict__:
        if "ctx_factory" in function.__code__.co_freevars and of_torch(function):
            return function
        if not ours(function):
            raise Unsendable(
                f"the function {function.__qualname__} is wrapped by a decorator, which is lost on the way to where "
                "the model runs, so that another function would run there; write what it does into the function."
            )
        function = function.__dict__["__wrapped__"]
    return function


def of_torch(function: FunctionType) -> bool:
    """Whether a wrapper is torch's own, such as `torch.no_grad()`."""
    return function.__code__.co_filename.startswith(str(torch.__path__[0]))


def allowed(module: str) -> bool:
    """Whether servers have a module and let it be used."""
    return module.split(".", maxsplit=1)[0] in (*ALLOWED, *MACHINERY)


def of_users(module: str) -> bool:
    """Whether a module is a file of the user's own, and no installed package."""
    file = file_of(module)
    return bool(file) and not installed(file)


def check_module(module: str, what: str) -> None:
    """Refuse what is of a module that servers do not have.

    Raises:
        Unsendable: with its name.
    """
    if allowed(module):
        return
    if of_users(module) or module == "mechvlm":
        raise Unsendable(
            f"{what} is not sent as a whole to where the model runs; write `from {module} import ...`, and functions "
            "and classes that are named go along."
        )
    raise Unsendable(
        f"{what} cannot be used where the model runs, since servers have {', '.join(ALLOWED[1:6])} and little else; "
        "use torch, or work out before the run what the function needs, and let it hold the result."
    )


def check_held(kind: type) -> None:
    """Refuse a value that is not sent, and that another can stand for.

    Raises:
        Unsendable: with what that is.
    """
    name = next((one for one in map(named, kind.__mro__) if one in INSTEAD_OF), None)
    if name is not None:
        raise Unsendable(
            f"{name.rpartition('.')[2]} is not sent to where the model runs, and a function that is to run there holds "
            f"one; let it hold {INSTEAD_OF[name]}."
        )


def named(kind: type) -> str:
    """A class's module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_source(source: str, function: FunctionType) -> None:
    """Refuse a function whose lines are not what runs here: it would be another one there.

    Raises:
        Unsendable: where there are no lines, or they have been changed since they were read.
    """
    code = function.__code__
    if not source and not str(function.__module__).startswith("namedtuple_"):
        raise Unsendable(
            f"the function {function.__qualname__} is known by its compiled code alone, which another Python may not "
            "run; write it into a file or into a cell of a notebook."
        )
    if not source or "__class__" in code.co_freevars or "@pytest_ar" in function.__globals__:
        return  # named tuples' own, methods that call super(), and what pytest has rewritten
    flags = code.co_flags & __future__.annotations.compiler_flag
    made = compile(source, code.co_filename, "exec", flags, dont_inherit=True).co_consts
    if not any(steps(one) == steps(code) for one in made if isinstance(one, CodeType)):
        raise Unsendable(
            f"the function {function.__qualname__} does something else here than its lines say in the file, "
            "which are what is sent; import that file anew."
        )


def steps(code: CodeType) -> list[tuple[str, str]]:
    """What code does with names and values, wherever it finds those that it does not hold itself."""
    kinds = {"LOAD_GLOBAL": "LOAD_NAME", "LOAD_DEREF": "LOAD_NAME", "LOAD_METHOD": "LOAD_ATTR"}
    said = [step for step in dis.get_instructions(code) if step.opname.startswith(SAYING)]
    said = [step for step in said if step.opname != "LOAD_CLOSURE" and not isinstance(step.argval, CodeType)]
    own = [(kinds.get(step.opname, step.opname), repr(step.argval)) for step in said]
    return own + [step for inner in code.co_consts if isinstance(inner, CodeType) for step in steps(inner)]


def check_code(code: CodeType, function: FunctionType) -> None:
    """Refuse what the lines of a user's function import or call, where servers do not give it.

    Raises:
        Unsendable: with its name.
    """
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            check_module(step.argval, f"the module {step.argval}")
        if step.opname == "LOAD_GLOBAL" and step.argval in ABSENT and step.argval not in function.__globals__:
            raise Unsendable(
                f"the function {function.__qualname__} calls {step.argval}(), which servers do not let it; do that "
                "here, with what the function returns."
            )
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            check_code(inner, function)
