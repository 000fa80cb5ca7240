"""The pictures that questions are about: found, opened and told apart before a model sees the first of them.

>>> items = mv.evaluate.read_pope("demo", split="random")[:6]
>>> list(looked_at(items)) == [items[0].image], picture_of(items[0]).size
(True, (72, 72))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mechvlm.evaluate.files import Item, hash_of, refuse
from mechvlm.pixels import to_picture
from mechvlm.sites import told

ENDINGS = ("", ".jpg", ".jpeg", ".png")


def picture_of(item: Item, images: Any = None) -> Image.Image:
    """The picture that an item is about.

    Args:
        images: a folder, a mapping from names to pictures, or a function from a name to a picture; None where pictures
            came with the items. Names without an ending are looked for with one, too.

    Raises:
        ValueError: for a picture that is not there, or cannot be read; with the item's line.
        TypeError: for images that are none of these.
    """
    if images is None:
        given = item.picture() if callable(item.picture) else item.picture
        if given is None:
            raise ValueError(
                f"{item.where}: the picture {item.image!r} did not come with its question; give images=, a folder, a "
                "mapping from names to pictures, or a function."
            )
    elif isinstance(images, Mapping):
        name: str | int = item.image
        if name not in images and item.image.isdecimal() and len(item.image) < 20:
            name = int(item.image)  # which it may have been in its row
        if name not in images:
            raise ValueError(f"{item.where}: images holds no {item.image!r}; give every picture by its name.")
        given = images[name]
    elif isinstance(images, str | Path):
        given = file_of(Path(images), item.image)
    elif callable(images):
        given = images(item.image)
    else:
        raise TypeError(f"images={told(images)} gives no pictures; give a folder, a mapping or a function of a name.")
    try:
        return to_picture(given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{item.where}: {error}") from None


def file_of(folder: Path, name: str) -> Path:
    """The file of a picture; without an ending where there is none of that name.

    Raises:
        ValueError: for what is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"images='{folder}' is no folder; give the one that holds the pictures.")
    return next((path for end in ENDINGS if (path := folder / f"{name}{end}").is_file()), folder / name)


def looked_at(items: Sequence[Item], images: Any = None) -> dict[str, str]:
    """Every picture's name, with a hash of its pixels; each was opened, so that a run does not end with the last one.

    Pictures that come with rows are opened row by row, since two of one name may differ.

    Raises:
        ValueError: where one is missing or damaged, or is another than before by that name, with the line of the first
            item that asks about it, and of others like it.
    """
    first: dict[Any, Item] = {}
    for item in items:
        first.setdefault((item.image, own_key(item) if images is None else None), item)
    hashes, lines, troubles = dict[str, str](), dict[str, str](), list[tuple[str, str]]()
    for item in tqdm(first.values(), desc="pictures", unit="picture", leave=False, delay=1):
        try:
            found = hash_of(picture_of(item, images))
        except ValueError as error:
            where, said, sentence = str(error).partition(": ")
            if not said or where != item.where:
                raise
            troubles.append((where, sentence.removesuffix(".")))
            continue
        if hashes.setdefault(item.image, found) != found:
            before = lines[item.image]
            troubles.append(
                (item.where, f"another picture is called {item.image!r} ({before}); give each its own name")
            )
        lines.setdefault(item.image, item.where)
    refuse(troubles)
    return hashes


def own_key(item: Item) -> str | int:
    """What tells pictures that came with items apart without opening them: a file's path, or which row it is in."""
    return str(item.picture) if isinstance(item.picture, str | Path) else id(item.picture)
