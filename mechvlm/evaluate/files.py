"""Questions with yes or no for an answer, as POPE and its mirrors keep them, read into one form.

Rule this module guards: everything that is wrong with a file is found before a model runs, with its line.

>>> items = mv.evaluate.read_pope("demo", split="adversarial")
>>> items[1].question, items[1].label
('Is there a 1 in the image?', 'no')
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from PIL import Image

from mechvlm.evaluate.lines import Line, inside, lines_of, missing
from mechvlm.pixels import to_picture
from mechvlm.sites import listed, told

KEYS = {
    "question_id": ("question_id", "id"),
    "image": ("image_source", "image_name", "image"),
    "question": ("text", "question", "query"),
    "label": ("label", "answer"),
}
"""What a line has to say, and what files call it: POPE's own, `lmms-lab/POPE`, POPEv2.

POPEv2 has an `image_id`, which numbers pictures, and no id of a question: there the line's number is taken.
"""


@dataclass(frozen=True)
class Item:
    """One question about one picture.

    Attributes:
        number: its place in what was read, from 0.
        question_id: as the file has it; a text where it is beyond 64 bits. Ids begin again in every split.
        image: the picture's name, by which it is looked for and by which items are grouped; a picture that comes in a
            row without a name is named by a hash of its pixels.
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
            sentence names the line, and lines that are wrong as well. Also for a split that is not there.
        TypeError: for what holds no questions.

    Example:
        >>> len(mv.evaluate.read_pope("demo")), len(mv.evaluate.read_pope("demo", split="random"))
        (2700, 900)

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE).
    """
    wanted = None if split is None else splits_of(split)
    if isinstance(questions, list | tuple) and questions and all(isinstance(one, Item) for one in questions):
        return counted(only(list(questions), wanted))
    found = [(line, item_of(line)) for line in lines_of(questions, wanted)]
    sound = [(line.source, item) for line, item in found if isinstance(item, Item)]
    troubles = [(line.where, trouble) for line, trouble in found if isinstance(trouble, str)]
    refuse([*troubles, *contradictions(sound)])
    return counted(only([item for _, item in sound], wanted))


def splits_of(split: Any) -> tuple[str, ...]:
    """The splits to keep, by their names.

    Raises:
        ValueError: for what names none.
    """
    names = (split,) if isinstance(split, str) else listed(split)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"split={told(split)} names no split; give a name, a list of names, or None for all.")
    return names


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
    row = {what: first_of(line.row, keys) for what, keys in KEYS.items()}
    if row["question_id"] is None and not missing(line.row.get("image_id")):
        row["question_id"] = line.number
    lacking = [what for what, value in row.items() if value is None]
    if lacking:
        return (
            f"it has no {' or '.join(map(repr, KEYS[lacking[0]]))}; a question has question_id, image, text and label"
        )
    label = str(row["label"]).strip().lower()
    if label not in ("yes", "no"):
        return f"the label is {row['label']!r}, and it must be yes or no"
    if not isinstance(row["question"], str) or not row["question"].strip():
        return f"the question is {row['question']!r}, and it must be a text"
    number = named(row["question_id"])
    if number is None:
        return f"the question_id is {told(row['question_id'])}, and it must be a text or a whole number"
    split = str(first_of(line.row, ("split", "category")) or line.split)
    try:
        name, held = image_of(line, row["image"])
    except (ValueError, TypeError) as error:
        return str(error).removesuffix(".")
    return Item(0, number, name, row["question"].strip(), label, split, 0, line.where, held)


def first_of(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What a row says under the first of some keys that says anything; None where none does."""
    return next((row[key] for key in keys if key in row and not missing(row[key])), None)


def named(given: Any) -> int | str | None:
    """An id, or a name: a text, or a whole number, as which data frames with gaps hold floats; None for others.

    Numbers beyond 64 bits, which no file of results holds, are made texts.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, bool) or not (isinstance(given, Integral) or (isinstance(given, float) and given % 1 == 0)):
        return None
    number = int(given)
    return number if -(2**63) <= number < 2**63 else f"{number:#x}" if number.bit_length() > 10_000 else str(number)


def image_of(line: Line, given: Any) -> tuple[str, Any]:
    """A picture's name, and the picture where it comes along.

    Raises:
        ValueError, TypeError: for what is neither a name nor a picture.
    """
    own, name = line.row.get("image"), named(given)
    held = None if missing(own) or named(own) is not None else line.picture
    if name is not None:
        return str(name), held
    if held is None:
        raise ValueError(f"the image is {told(given)}, and it must be a text or a whole number")
    return f"picture {hash_of(to_picture(inside(own)))[:16]}", held


def hash_of(picture: Image.Image) -> str:
    """A picture's size and pixels, as a short text."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]


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
