"""Records of commands: what was asked, from which it can be done again.

Rule this module guards: a rerun computes again what the record says and nothing else, and never overwrites a record.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

RECORD = "record.json"
WITH_RERUN = ("rerun", "out", "device")
"""What may be said together with --rerun: nothing that its numbers rest on, beside the device, which it records."""
KINDS: dict[Any, str] = {
    **{str: "a text", str | None: "a text or null", list[str]: "a list of texts"},
    **{int: "a number", int | None: "a number or null", float: "a number", bool: "true or false"},
}


def rerun_folder(command: Callable, given: Mapping[str, Any], record: Path, out: Path | None) -> Path:
    """Where a rerun is written: never over a record, least of all the one that it reruns.

    Args:
        command: whose defaults say which options were given.
        given: its options.

    Raises:
        ValueError: for a folder with a record, or an option that the record has already.
    """
    defaults = {name: one.default for name, one in signature(command).parameters.items() if name not in WITH_RERUN}
    more = [name for name, default in defaults.items() if given[name] != default]
    if more:
        word = "a model" if more[0] == "model" else "--" + more[0].replace("_", "-")
        raise ValueError(f"{word} was given with --rerun, whose record says all of it; leave one of them out.")
    own = record.resolve().parent
    folder = own.with_name(own.name + "-rerun") if out is None else out
    if folder.resolve() == own or (folder / RECORD).exists():
        raise ValueError(f"the folder '{folder}' holds a record already; choose another with --out for the rerun.")
    return folder


def recorded(
    path: Path, command: str, kind: Any, more: Callable[[Mapping[str, Any]], str] = lambda _: ""
) -> dict[str, Any]:
    """An earlier run's record.

    Args:
        command: which wrote it, by its name.
        kind: the class of what it was asked.
        more: what else is wrong with a record, in words; nothing where nothing is.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        trouble = flaw_of(found, kind) or more(found)
    except (OSError, ValueError, RecursionError) as error:
        trouble = type(error).__name__
    if trouble:
        raise ValueError(f"'{path}' is no record of mechvlm {command} ({trouble}); give the {RECORD} that it wrote.")
    return found


def flaw_of(found: Any, kind: Any) -> str:
    """What a record lacks, or has of the wrong kind; nothing where it is whole."""
    asked = found.get("asked") if isinstance(found, Mapping) else None
    if not isinstance(asked, Mapping):
        return "it has no 'asked'"
    kinds = {one.name: one.type for one in fields(kind)}
    wrong = [name for name in kinds if name not in asked or not is_kind(asked[name], kinds[name])]
    if wrong:
        return f"its {wrong[0]!r} is not {KINDS[kinds[wrong[0]]]}"
    texts = [name for name in ("questions_sha256", "weights", "made") if not isinstance(found.get(name), str)]
    more = [name for name in asked if name not in kinds]
    return f"its {texts[0]!r} is not a text" if texts else f"its {more[0]!r} is unknown" if more else ""


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; True, which Python takes for 1, is no number."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind is float:
        kind = int | float
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
