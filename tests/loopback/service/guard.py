"""What shipped code may do on the server, as the server code that NDIF has published (February 2026) allows it.

The lists are those of `protected_environment.py` there. Two differences: they bind what was shipped and not the whole
process, so that the model's own code imports what it likes; and names that moved since then stand in `NNSIGHT_081`.
"""

import builtins
import importlib
import types
from typing import Any

import cloudpickle.cloudpickle  # type: ignore[import-untyped]
from nnsight.intervention import interleaver, iterator, serialization
from nnsight.intervention import tracer as intervention_tracer
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.tracing import tracer as tracing_tracer

EXCEPTIONS = """
BaseExceptionGroup ArithmeticError AssertionError AttributeError BaseException BlockingIOError BrokenPipeError
BufferError BytesWarning ChildProcessError ConnectionAbortedError ConnectionError ConnectionRefusedError
ConnectionResetError DeprecationWarning EOFError Ellipsis EncodingWarning EnvironmentError Exception False
FileExistsError FileNotFoundError FloatingPointError FutureWarning GeneratorExit IOError ImportError
ImportWarning IndentationError IndexError InterruptedError IsADirectoryError KeyError KeyboardInterrupt
LookupError MemoryError ModuleNotFoundError NameError None NotADirectoryError NotImplemented NotImplementedError
OSError OverflowError PendingDeprecationWarning PermissionError ProcessLookupError RecursionError ReferenceError
ResourceWarning RuntimeError RuntimeWarning StopAsyncIteration StopIteration SyntaxError SyntaxWarning
SystemError SystemExit TabError TimeoutError True TypeError UnboundLocalError UnicodeDecodeError
UnicodeEncodeError UnicodeError UnicodeTranslateError UnicodeWarning UserWarning ValueError Warning
ZeroDivisionError
"""
FUNCTIONS = """
__doc__ __import__ __loader__ __name__ __package__ __spec__ __build_class__ abs aiter all anext any ascii bool
bytearray bytes callable chr classmethod complex copyright credits delattr dict dir divmod enumerate filter
float format frozenset getattr hasattr hash hex id int isinstance issubclass iter len list map max min next
object oct ord pow print property range repr reversed round set setattr slice sorted staticmethod str sum super
tuple type vars zip memoryview globals input eval
"""
BUILTINS = {*EXCEPTIONS.split(), *FUNCTIONS.split()}

STRICT = {"builtins", "_operator", "operator"}
BEGINNINGS = (
    *("torch", "collections", "nnsight.intervention.envoy", "time", "numpy", "sympy", "nnterp", "math", "einops"),
    *("urllib3", "typing", "pandas", "enum"),
)
STRICT_LOADING = {
    *STRICT,
    *("nnsight.schema.request", "nnsight.modeling.mixins.remoteable", "nnsight.intervention.tracing.base"),
    *("nnsight.intervention.interleaver", "nnsight.intervention.batching"),
}
BEGINNINGS_LOADING = (*BEGINNINGS, "pickle", "cloudpickle", "copyreg", "nnsight.modeling")
NNSIGHT_081 = {
    "nnsight.tracing.tracer.save",
    "nnsight.tracing.tracer.Tracer",
    "nnsight.tracing.tracer.Tracer.Info",
    "nnsight.tracing.util.SerializedFrame",
    "nnsight.intervention.serialization._load_function",
    "nnsight.intervention.serialization._fill",
    "nnsight.intervention.tracer.InterleavingTracer",
}
"""What a plain session or trace of nnsight 0.8.1 needs that the published lists, made for an older one, do not have."""

SERVED: set[str] = set()
"""Every `module.name` that a request has asked for, for a test to look at."""


def may_import(name: str) -> bool:
    """Whether shipped code may import a module while it runs."""
    return name in STRICT or name.startswith(BEGINNINGS)


def may_load(module: str, name: str) -> bool:
    """Whether a payload may name something of a module."""
    if module == "builtins":
        return name in BUILTINS
    return f"{module}.{name}" in NNSIGHT_081 or module in STRICT_LOADING or module.startswith(BEGINNINGS_LOADING)


class Lent(types.ModuleType):
    """A module as shipped code gets it: what it holds, but no other modules than its own parts."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not isinstance(found, types.ModuleType) or name.startswith("__"):
            return found
        if not found.__name__.startswith(super().__getattribute__("__name__") + "."):
            raise AttributeError(f"Module attribute {found.__name__} is not whitelisted")
        return lent(found)


def lent(module: types.ModuleType) -> Lent:
    """A module behind the guard."""
    made = Lent(module.__name__)
    made.__dict__.update(module.__dict__)
    return made


def guarded_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """What `import` does in shipped code."""
    if level > 0 or not may_import(name):
        raise ImportError(f"Module {'.' * level}{name} is not whitelisted")
    return lent(builtins.__import__(name, globals, locals, fromlist, level))


def guarded_subimport(name: str) -> Any:
    """What a payload that names a module gets."""
    if name not in STRICT_LOADING and not name.startswith(BEGINNINGS_LOADING):
        raise ImportError(f"Module {name} is not whitelisted")
    return importlib.import_module(name)


SAFE = {name: value for name, value in vars(builtins).items() if name in BUILTINS} | {"__import__": guarded_import}


def guarded_exec(code: types.CodeType, scope: dict) -> None:
    """How nnsight runs a block: with the builtins that are left."""
    dict.__setitem__(scope, "__builtins__", SAFE)  # a scope's own way of setting would count it among the block's names
    exec(code, scope)


class Unpickler(CustomCloudUnpickler):
    """An unpickler that finds only what is on the lists."""

    def find_class(self, module: str, name: str) -> Any:
        """The thing of this name, if a payload may have it."""
        SERVED.add(f"{module}.{name}")
        if not may_load(module, name):
            raise ImportError(f"Module {module} is not whitelisted (asked for {name})")
        if module == "cloudpickle.cloudpickle" and name == "subimport":
            return guarded_subimport
        return super().find_class(module, name)


def stand() -> None:
    """Take the builtins that are not on the list from every function and block that is shipped."""
    vars(serialization)["__builtins__"] = SAFE
    vars(cloudpickle.cloudpickle)["__builtins__"] = SAFE
    for module in (tracing_tracer, intervention_tracer, interleaver, iterator):
        vars(module)["exec"] = guarded_exec
