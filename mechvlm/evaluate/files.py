"""Questions with yes or no for an answer, as POPE and its mirrors keep them, read into one form.

Rule this module guards: everything that is wrong with a file is found before a model runs, with its line.

>>> items = mv.evaluate.read_pope("demo", split="adversarial")
>>> items[1].question, items[1].label
('Is there a 1 in the image?', 'no')
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechvlm import demo
from mechvlm.demo import SPLITS
from mechvlm.sites import told

SUFFIXES = (".json", ".jsonl")
KEYS = {
    "question_id": ("question_id", "id", "image_id"),
    "image": ("image_source", "image_name", "image"),
    "question": ("text", "question", "query"),
    "label": ("label", "answer"),
}
"""What a line has to say, and what files call it: POPE's own, `lmms-lab/POPE`, POPEv2."""


@dataclass(frozen=True)
class Item:
    """One question about one picture.

    Attributes:
        number: its place in what was read, from 0.
        question_id: as the file has it. Ids begin again in every split.
        image: the picture's name, by which it is looked for and by which items are grouped.
        question: as it stands in the file, before any template.
        label: the right answer, "yes" or "no".
        split: how what is asked for in vain was chosen, such as "adversarial"; a file's name where it says no split.
        duplicate_of: the number of the first item with this picture and question; its own where that is itself.
        where: its file and line.
        picture: the picture where it came with the item: its file, or a function that gives it.
    """

    number: int
    question_id: int | str
    image: str
    question: str
    label: str
    split: str
    duplicate_of: int
    where: str = field(default="", compare=False)
    picture: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Held:
    """A picture within rows, taken out when it is asked for, so that a data set is not held decoded."""

    rows: Any
    row: int

    def __call__(self) -> Any:
        """The picture: a PIL image, its file's bytes, or a path."""
        found = self.rows[self.row]["image"]
        inside = found.get("bytes") if isinstance(found, Mapping) else None
        return inside if inside is not None else found["path"] if isinstance(found, Mapping) else found


@dataclass(frozen=True)
class Line:
    """What stood somewhere, before it is known to be an item."""

    where: str
    row: Any
    split: str
    source: str = ""
    picture: Any = None
    trouble: str = ""


def read_pope(questions: Any, split: str | Sequence[str] | None = None) -> list[Item]:
    """The questions of a POPE file, or of what is laid out like one.

    Args:
        questions: a file of JSON lines with question_id, image, text and label, or a JSON list of such; several paths;
            a folder of them; rows as in `lmms-lab/POPE` (question_id, question, answer, image_source, image, category):
            a data set of the datasets package, a dictionary of them, a list of dictionaries or a data frame; "demo" for
            the demo model's benchmark; or items read before, which are counted anew.
        split: keep one split, or some; None keeps all.

    Returns:
        Items in the order of the file. The same question about the same picture, which POPE asks again in its other
        splits, is there each time and says in `duplicate_of` which is the first.

    Raises:
        ValueError: where there is nothing to read, or something is wrong with a line: no JSON, a key that is missing, a
            label other than yes and no, an id that has another question already, or a question with two labels. The
            sentence names the line, and lines that are wrong as well.
        TypeError: for what holds no questions.

    Example:
        >>> len(mv.evaluate.read_pope("demo")), len(mv.evaluate.read_pope("demo", split="random"))
        (2700, 900)

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE).
    """
    wanted = None if split is None else (split,) if isinstance(split, str) else tuple(split)
    if isinstance(questions, list | tuple) and questions and all(isinstance(one, Item) for one in questions):
        return counted(only(list(questions), wanted))
    found = [(line, item_of(line)) for line in lines_of(questions, wanted)]
    sound = [(line.source, item) for line, item in found if isinstance(item, Item)]
    troubles = [(line.where, trouble) for line, trouble in found if isinstance(trouble, str)]
    refuse([*troubles, *contradictions(sound)])
    return counted(only([item for _, item in sound], wanted))


def only(items: list[Item], wanted: tuple[str, ...] | None) -> list[Item]:
    """The items of some splits.

    Raises:
        ValueError: for a split that is not there, or where there is no item at all.
    """
    if not items:
        raise ValueError("these questions are empty; give a file with a question in each line.")
    there = list(dict.fromkeys(item.split for item in items))
    missing = [name for name in wanted or () if name not in there]
    if missing:
        raise ValueError(f"these questions have no split {missing[0]!r}; they have {', '.join(there)}.")
    return [item for item in items if wanted is None or item.split in wanted]


def counted(items: Sequence[Item]) -> list[Item]:
    """Items with their numbers, and with what they repeat."""
    first: dict[tuple[str, str], int] = {}
    return [
        replace(item, number=number, duplicate_of=first.setdefault((item.image, item.question), number))
        for number, item in enumerate(items)
    ]


def contradictions(found: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, str]]:
    """Lines whose id has another question already, or whose question has another label, each with a sentence.

    Args:
        found: items, each with what it was read from.
    """
    ids: dict[tuple[str, str, int | str], Item] = {}
    asked: dict[tuple[str, str], Item] = {}
    for source, item in found:
        before = ids.setdefault((source, item.split, item.question_id), item)
        if before != item:
            yield (
                item.where,
                f"question_id {item.question_id!r} is that of another question ({before.where}); give each question of "
                "a split an id of its own",
            )
        same = asked.setdefault((item.image, item.question), item)
        if same.label != item.label:
            yield (
                item.where,
                f"the label of {item.question!r} is {item.label!r} here and {same.label!r} before ({same.where}); one "
                "of them is wrong",
            )


def item_of(line: Line) -> Item | str:
    """What a line says, or what is wrong with it."""
    if line.trouble:
        return line.trouble
    if not isinstance(line.row, Mapping):
        return f"it is {told(line.row)}, and a question is an object with question_id, image, text and label"
    row = {what: next((line.row[key] for key in keys if key in line.row), None) for what, keys in KEYS.items()}
    missing = [what for what, value in row.items() if value is None]
    if missing:
        return (
            f"it has no {' or '.join(map(repr, KEYS[missing[0]]))}; a question has question_id, image, text and label"
        )
    label = str(row["label"]).strip().lower()
    if label not in ("yes", "no"):
        return f"the label is {row['label']!r}, and it must be yes or no"
    if not isinstance(row["question"], str) or not row["question"].strip():
        return f"the question is {row['question']!r}, and it must be a text"
    number = row["question_id"] if isinstance(row["question_id"], int) else str(row["question_id"])
    split = str(line.row.get("split") or line.row.get("category") or line.split)
    name = row["image"] if isinstance(row["image"], str) else f"picture of {line.where}"
    picture = None if isinstance(line.row.get("image"), str | None) else line.picture
    return Item(0, number, name, row["question"].strip(), label, split, 0, line.where, picture)


def refuse(troubles: Sequence[tuple[str, str]]) -> None:
    """Say what is wrong with the first of some lines, and which are wrong as well.

    Raises:
        ValueError: where there is a line at all.
    """
    if not troubles:
        return
    (where, sentence), *others = troubles
    places = [place for place in dict.fromkeys(place for place, _ in others) if place != where]
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    also = f" (wrong as well: {'; '.join(places[:5])}{more})" if places else ""
    raise ValueError(f"{where}: {sentence}{also}.")


def lines_of(questions: Any, wanted: tuple[str, ...] | None) -> Iterator[Line]:
    """Every line of what was given, whatever stands in it."""
    if isinstance(questions, str) and questions == "demo":
        yield from demo_lines()
    elif is_paths(questions):
        for path in paths_of(questions, wanted):
            yield from file_lines(path)
    elif isinstance(questions, Mapping):
        for name, rows in questions.items():
            yield from row_lines(rows, str(name))
    else:
        yield from row_lines(questions, "test")


def demo_lines() -> Iterator[Line]:
    """The demo model's benchmark, whose pictures come along."""
    pictures = {scene.file.name: scene.file for scene in demo.scenes()}
    for split in SPLITS:
        for number, asked in enumerate(demo.pope(split)):
            row = {"question_id": asked.question_id, "image_name": asked.image, "text": asked.text}
            row |= {"label": asked.label, "image": pictures[asked.image]}
            yield Line(f"digits_pope_{split}.json, line {number + 1}", row, split, split, pictures[asked.image])


def is_paths(questions: Any) -> bool:
    """Whether questions were given as a path, or as several."""
    if isinstance(questions, list | tuple):
        return bool(questions) and all(isinstance(one, str | Path) for one in questions)
    return isinstance(questions, str | Path)


def paths_of(questions: Any, wanted: tuple[str, ...] | None = None) -> list[Path]:
    """The files that were given; of a folder those of the wanted splits.

    Raises:
        ValueError: for a path without a file.
    """
    found = []
    for given in map(Path, questions if isinstance(questions, list | tuple) else [questions]):
        if not given.exists():
            raise ValueError(f"there is no file '{given}' of questions; give a POPE file, a folder of them, or 'demo'.")
        inside = [path for path in sorted(given.glob("*")) if path.suffix in SUFFIXES] if given.is_dir() else [given]
        if not inside:
            raise ValueError(f"the folder '{given}' holds no questions; they are in files that end in .json or .jsonl.")
        if given.is_dir():
            inside.sort(key=lambda path: (*SPLITS, split_of(path)).index(split_of(path)))
            inside = [path for path in inside if wanted is None or split_of(path) in wanted] or inside
        found += inside
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
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            yield Line(f"{path.name}, line {error.lineno}", None, **about, trouble=broken(error))
        else:
            yield from (Line(f"{path.name}, entry {number + 1}", row, **about) for number, row in enumerate(entries))
        return
    for number, line in enumerate(text.split("\n")):
        where = f"{path.name}, line {number + 1}"
        if not line.strip():
            continue
        try:
            yield Line(where, json.loads(line), **about)
        except json.JSONDecodeError as error:
            yield Line(where, None, **about, trouble=broken(error))


def broken(error: json.JSONDecodeError) -> str:
    """What is wrong with a text that is no JSON."""
    return f"it is no JSON ({error.msg}, column {error.colno}); correct it, or take it out"


def row_lines(rows: Any, split: str) -> Iterator[Line]:
    """Rows of a data set.

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
    for number, row in enumerate(held):
        yield Line(f"{split}, row {number}", row, split, split, Held(held, number))
