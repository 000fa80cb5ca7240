"""What stands in files and rows of questions, line by line, before it is known to be a question.

Rule this module guards: whatever stands there, a line of it comes out, with its place, or with what is wrong with it.

>>> line = next(lines_of([{"question_id": 1}]))
>>> line.where, line.row, line.number
('row 1 of the list', {'question_id': 1}, 1)
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechvlm import demo
from mechvlm.demo import SPLITS
from mechvlm.sites import told

SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class Held:
    """A picture within rows, taken out when it is asked for, so that a data set is not held decoded."""

    rows: Any
    row: int

    def __call__(self) -> Any:
        """The picture: a PIL image, its file's bytes, or a path."""
        return inside(self.rows[self.row]["image"])


def inside(held: Any) -> Any:
    """What a picture is kept as in a row, out of the dictionary that data sets put around undecoded ones."""
    if not isinstance(held, Mapping):
        return held
    return held.get("path") if held.get("bytes") is None else held["bytes"]


def missing(value: Any) -> bool:
    """Whether a row says nothing here; a data frame says it by NaN."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


@dataclass(frozen=True)
class Line:
    """What stood somewhere, before it is known to be an item; `number` counts lines, entries or rows from 1."""

    where: str
    number: int
    row: Any
    split: str
    source: str = ""
    picture: Any = None
    trouble: str = ""


def lines_of(questions: Any, wanted: tuple[str, ...] | None = None) -> Iterator[Line]:
    """Every line of what was given, whatever stands in it."""
    if isinstance(questions, str) and questions == "demo":
        yield from demo_lines()
    elif is_paths(questions):
        for path in paths_of(questions, wanted):
            yield from file_lines(path)
    elif isinstance(questions, Mapping):
        for name, rows in questions.items():
            yield from row_lines(rows, str(name), f"split {str(name)!r}")
    else:
        kind = "data frame" if isinstance(questions, pd.DataFrame) else type(questions).__name__
        yield from row_lines(questions, "test", "" if kind not in ("data frame", "list", "tuple") else kind)


def demo_lines() -> Iterator[Line]:
    """The demo model's benchmark, whose pictures come along."""
    pictures = {scene.file.name: scene.file for scene in demo.scenes()}
    for split in SPLITS:
        for number, asked in enumerate(demo.pope(split)):
            row = {"question_id": asked.question_id, "image_name": asked.image, "text": asked.text}
            row |= {"label": asked.label, "image": pictures[asked.image]}
            where = f"digits_pope_{split}.json, line {number + 1}"
            yield Line(where, number + 1, row, split, split, pictures[asked.image])


def is_paths(questions: Any) -> bool:
    """Whether questions were given as a path, or as several."""
    if isinstance(questions, list | tuple):
        return bool(questions) and all(isinstance(one, str | Path) for one in questions)
    return isinstance(questions, str | Path)


def paths_of(questions: Any, wanted: tuple[str, ...] | None = None) -> list[Path]:
    """The files that were given; of a folder those of the wanted splits.

    Raises:
        ValueError: for a path without a file, or a file that is given twice.
    """
    found: list[Path] = []
    for given in map(Path, questions if isinstance(questions, list | tuple) else [questions]):
        if not given.exists():
            raise ValueError(f"there is no file '{given}' of questions; give a POPE file, a folder of them, or 'demo'.")
        files = [path for path in sorted(given.glob("*")) if path.suffix in SUFFIXES] if given.is_dir() else [given]
        if not files:
            raise ValueError(f"the folder '{given}' holds no questions; they are in files that end in .json or .jsonl.")
        if given.is_dir():
            files.sort(key=lambda path: (*SPLITS, split_of(path)).index(split_of(path)))
            files = [path for path in files if wanted is None or split_of(path) in wanted] or files
        found += files
    places = [path.resolve() for path in found]
    twice = [path for at, path in enumerate(found) if places[at] in places[:at]]
    if twice:
        raise ValueError(f"the file '{twice[0]}' of questions was given twice; give each file once.")
    return found


def split_of(path: Path) -> str:
    """The split that a file's name says; the whole name without its ending where it says none."""
    return next((split for split in SPLITS if split in path.stem.lower()), path.stem)


def file_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, or the entries of a list.

    Raises:
        ValueError: for a file that is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"'{path}' is no text; give questions as JSON, or as rows, such as a pandas data frame."
        ) from None
    about = {"split": split_of(path), "source": str(path)}
    if text.lstrip().startswith("["):
        entries, line, trouble = parsed(text)
        if trouble:
            yield Line(f"{path.name}, line {line}", line, None, **about, trouble=trouble)
            return
        for number, row in enumerate(entries, 1):
            yield Line(f"{path.name}, entry {number}", number, row, **about)
        return
    for number, own in enumerate(text.split("\n"), 1):
        if own.strip():
            row, _, trouble = parsed(own)
            yield Line(f"{path.name}, line {number}", number, row, **about, trouble=trouble)


def parsed(text: str) -> tuple[Any, int, str]:
    """What JSON says; or, for what is none, the line within it and what is wrong there."""
    try:
        return json.loads(text), 0, ""
    except json.JSONDecodeError as error:
        said = f"it is no JSON ({error.msg}, column {error.colno}); correct it, or take it out"
        return None, error.lineno, said
    except RecursionError:
        line = text.count("\n", 0, deepest(text)) + 1
        return None, line, "it is nested more deeply than Python reads JSON; correct it, or take it out"
    except ValueError:  # of int, which takes 4300 digits
        longest = max(re.finditer(r"\d+", text), key=lambda found: len(found[0]))
        said = f"it holds a number of {len(longest[0])} digits"
        return None, text.count("\n", 0, longest.start()) + 1, f"{said}; correct it, or take it out"


def deepest(text: str) -> int:
    """Where brackets are nested most deeply; those within quoted texts count as well, which are few."""
    depth = np.cumsum([(one in "[{") - (one in "]}") for one in text])
    return int(depth.argmax())


def row_lines(rows: Any, split: str, holder: str) -> Iterator[Line]:
    """Rows of a data set, told by their number from 1 and by what holds them: a split's name, or a kind of list.

    Raises:
        TypeError: for what has none.
    """
    if isinstance(rows, pd.DataFrame):
        rows = rows.to_dict("records")
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise TypeError(
            f"{told(rows)} holds no questions; give a POPE file, a folder of them, rows as in lmms-lab/POPE, or 'demo'."
        )
    held = rows if isinstance(rows, Sized) else list(rows)
    for at, row in enumerate(held):
        yield Line(f"row {at + 1}{holder and f' of the {holder}'}", at + 1, row, split, split, Held(held, at))
