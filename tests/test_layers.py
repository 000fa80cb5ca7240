"""The house rules that a parser can see: what may import what, what may not be written, and how long things are.

The rules are the tables below. Each test names its violators as `file:line`, so that a failure can be clicked on.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mechvlm"

# In reading order: a module imports only what stands before it, in its own line or in a line above.
LAYERS: dict[str, tuple[str, ...]] = {
    "values": (
        *(
            "sites",
            "masks",
            "attention",
            "pieces",
            "lazy_attention",
            "readings",
            "biases",
            "devices",
            "towers",
            "archs",
            "refusals",
            "shapes",
            "nodes",
            "origins",
        ),
        *(
            "pixels",
            "images",
            "imagemap",
            "grids",
            "prompt",
            "matching",
            "regions",
            "encode",
            "edits",
            "attention_edits",
            *("edge_paths", "circuit_text", "circuit_value"),
            "metrics",
        ),
    ),
    "engine": (
        *(
            *("processes", "remade", "shipping"),
            "layout",
            "plan",
            "visit",
            "calls",
            "fused",
            "seam",
            "walk",
            "run",
            "batch",
            "placing",
            "generating",
            *("sent", "ledger", "hosts", "failures", "jobs", "places", "wrapped"),
            *("weights", "writes", "reads"),
            "unembedding",
            *("passes", "wired"),
            *("rounds", "start", "reach", "schedule", "handed", "between", "rerun", "points"),
            "vlm",
            *("placing", "load", "fingerprints", "finished", "units", "workers", "shared"),
        ),
        *("lens_names", "bridge", "circuits", "remote"),
    ),
    "science": ("pairs", "references", "laws", "laws_bridge", "experiments", "evaluate", "methods"),
    "pictures": ("plot", "report", "commands", "cli"),
}
# mechvlm.demo stands aside: its model is made like any other, with values at most; science and pictures may import it.
DEMO = "demo"
# mechvlm/__init__.py re-exports: it may import everything; science and pictures may use its names, as users do.
FACE = "__init__"
FORBIDDEN_PAIRS = {("plot", "vlm"): "a figure is made from results, never from a model"}
# Written reasons for an import that the table would refuse; it stands inside a function, so that no circle arises.
UPWARDS = {
    ("vlm", "laws"): "vlm.check() runs the laws, which use what every user can",
    ("places", "fingerprints"): "a job is known again by what it asks for, which may be anything that users hand over",
    ("circuit_value", "experiments"): "circuit.edits() patches what a run of the source had, as experiments do",
    ("run", "circuits"): "run.to_activation_cache() hands a run to TransformerLens, whose circuits take it apart",
}
# Foreign packages, and the only modules that may import them.
ONLY_IN = {
    "nnsight": {"walk", "vlm", "shipping", "places", "wrapped", "hosts", "failures", "jobs", "remote"},
    "ray": {"workers"},
    "transformer_lens": {"lens_names", "bridge", "weights", "circuits"},
}

NAMES_TO_AVOID = {"utils", "helpers", "base", "common"}
MAX_MODULE, MAX_FUNCTION = 320, 45  # lines, docstrings of functions aside; the aims are 300 and 40
LONGER: dict[str, str] = {}  # "module.py" or "module.py:function" -> the reason why it may be longer
# Written reasons for what the table of forbidden calls would refuse: "module.py:function" -> the reason.
ALLOWED: dict[str, str] = {}


def calls(name: str) -> Callable[[ast.AST], bool]:
    """Whether a node of the syntax tree calls a function of this name."""
    return lambda node: isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def catches_everything(node: ast.AST) -> bool:
    """Whether a node is `except:`, `except Exception:` or one that lists it."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(kind is None or ast.unparse(kind) in {"Exception", "BaseException"} for kind in kinds)


def imports_annotations(node: ast.AST) -> bool:
    """Whether a node is `from __future__ import annotations`, under which shapes are no longer checked."""
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


FORBIDDEN: dict[str, Callable[[ast.AST], bool]] = {
    "print(": calls("print"),
    "hasattr(": calls("hasattr"),
    "getattr(": calls("getattr"),
    "except Exception": catches_everything,
    "from __future__ import": imports_annotations,
}

UNITS = {DEMO, *(member for members in LAYERS.values() for member in members)}
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]
each_module = pytest.mark.parametrize("path", MODULES, ids=IDS)


def unit(path: Path) -> str:
    """The name under which a file stands in the table: `experiments/profile.py` is `experiments`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@cache
def imported(path: Path) -> tuple[tuple[str, int], ...]:
    """Every module a file imports, dotted and absolute, with the line; `import` inside a function counts too."""
    return tuple(imports_of(path))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """The same, one after another."""
    package = ("mechvlm", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*start, *([node.module] if node.module else [])))
            modules = {alias.name for alias in node.names if origin == "mechvlm" and alias.name in UNITS}
            yield from ((f"mechvlm.{name}", node.lineno) for name in sorted(modules))
            if not modules:
                yield origin, node.lineno


def units_imported(path: Path) -> Iterator[tuple[str, int]]:
    """The parts of mechvlm a file imports, under the names of the table; `FACE` for mechvlm itself."""
    for name, line in imported(path):
        if name.split(".")[0] == "mechvlm":
            yield (name.split(".")[1] if "." in name else FACE), line


def allowed_imports(name: str) -> set[str]:
    """The parts of mechvlm that one part may import."""
    if name == DEMO:
        return {DEMO, *LAYERS["values"]}
    order = [member for members in LAYERS.values() for member in members]
    if name not in order:
        raise ValueError(f"mechvlm/{name} is in no layer; put it into LAYERS in tests/test_layers.py.")
    outer = {DEMO, FACE} if name in LAYERS["science"] + LAYERS["pictures"] else set()
    return {*order[: order.index(name) + 1], *outer}


@each_module
def test_imports_point_upwards(path: Path) -> None:
    name = unit(path)
    if name == FACE:
        return
    allowed = allowed_imports(name)
    allowed |= {other for (where, other) in UPWARDS if where == name}
    wrong = [f"{path}:{line} imports {other}" for other, line in units_imported(path) if other not in allowed]
    assert not wrong, f"{name} may import {sorted(allowed)}"


@each_module
def test_forbidden_pairs(path: Path) -> None:
    wrong = [
        f"{path}:{line} imports {other}: {FORBIDDEN_PAIRS[unit(path), other]}"
        for other, line in units_imported(path)
        if (unit(path), other) in FORBIDDEN_PAIRS
    ]
    assert not wrong


@each_module
def test_foreign_engines_have_one_seam(path: Path) -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for name, line in imported(path)
        if unit(path) not in ONLY_IN.get(name.split(".")[0], {unit(path)})
    ]
    assert not wrong


@each_module
def test_no_file_is_a_drawer(path: Path) -> None:
    assert path.stem not in NAMES_TO_AVOID, f"{path} is named after nothing; name it after what is in it."


@each_module
def test_forbidden_words(path: Path) -> None:
    tree = ast.parse(path.read_text())
    excused = {
        inner
        for function in functions(tree)
        if f"{path.name}:{function.name}" in ALLOWED
        for inner in ast.walk(function)
    }
    placed = [n for n in ast.walk(tree) if isinstance(n, ast.expr | ast.stmt | ast.excepthandler)]
    rules = FORBIDDEN.items()
    wrong = [f"{path}:{n.lineno}: {rule}" for n in placed for rule, seen in rules if seen(n) and n not in excused]
    assert not wrong, "not used in mechvlm"


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and inner functions too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@each_module
def test_lengths(path: Path) -> None:
    source = path.read_text()
    wrong = []
    if len(source.splitlines()) > MAX_MODULE and path.name not in LONGER:
        wrong.append(f"{path} has {len(source.splitlines())} lines; {MAX_MODULE} are allowed")
    for function in functions(ast.parse(source)):
        told = len((ast.get_docstring(function) or "").splitlines())  # teaching is not length
        length = (function.end_lineno or function.lineno) - function.lineno + 1 - told
        if length > MAX_FUNCTION and f"{path.name}:{function.name}" not in LONGER:
            wrong.append(f"{path}:{function.lineno} {function.name} has {length} lines; {MAX_FUNCTION} are allowed")
    assert not wrong


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions, classes and methods whose names do not begin with `_`; a setter has its getter's docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    inside = [node for top in tree.body if isinstance(top, ast.ClassDef) for node in top.body]
    for node in [*tree.body, *inside]:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        if not any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list):
            yield node


@each_module
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    wrong = [f"{path}:{node.lineno} {node.name}" for node in public_definitions(tree) if not ast.get_docstring(node)]
    if tree.body and not ast.get_docstring(tree):
        wrong.append(f"{path}:1 the module")
    assert not wrong


def test_the_architecture_page_has_each_module_once_in_its_layer() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text().partition("| layer | module | what it is |")[2]
    rows = [line.split("|")[1:3] for line in page.partition("\n\n")[0].splitlines()[2:]]
    found: dict[str, list[str]] = {}
    for layer, modules in rows:
        names = re.findall(r"`([\w/]+?)(?:\.py|/)`", modules)
        found.setdefault(layer.strip() or list(found)[-1], []).extend(names)
    assert {layer: sorted(names) for layer, names in found.items()} == {
        layer: sorted(set(names)) for layer, names in LAYERS.items()
    }


def test_written_reasons_are_still_needed() -> None:
    places = {path.name for path in MODULES}
    for path in MODULES:
        places |= {f"{path.name}:{function.name}" for function in functions(ast.parse(path.read_text()))}
    assert set(LONGER) | set(ALLOWED) <= places


def test_the_rules_are_seen() -> None:
    """The finders find: a rule that nothing can break would pass forever."""
    code = "try:\n    print(getattr(a, 'b'), hasattr(a, 'b'))\nexcept (ValueError, Exception):\n    pass"
    future = ast.parse("from __future__ import annotations")
    nodes = [*ast.walk(ast.parse(code)), *ast.walk(future)]
    assert [rule for rule, breaks in FORBIDDEN.items() if any(breaks(node) for node in nodes)] == list(FORBIDDEN)
    file = PACKAGE / "plot.py"
    assert (unit(file), unit(PACKAGE / "experiments" / "lens.py")) == ("plot", "experiments")
    assert "vlm" not in allowed_imports("sites") | allowed_imports("walk") | allowed_imports(DEMO)
    assert {"vlm", DEMO} <= allowed_imports("laws")
