"""The pictures that questions are about: found, opened and told apart before a model sees the first of them.

>>> items = mv.evaluate.read_pope("demo", split="random")[:6]
>>> list(looked_at(items)) == [items[0].image], picture_of(items[0]).size
(True, (72, 72))
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mechvlm.evaluate.files import Item, refuse
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
        if item.image not in images:
            raise ValueError(f"{item.where}: images holds no {item.image!r}; give every picture by its name.")
        given = images[item.image]
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

    Raises:
        ValueError: where one is missing or damaged, with the line of the first item that asks about it, and of others
            like it.
    """
    first = {item.image: item for item in reversed(items)}
    names = list(dict.fromkeys(item.image for item in items))
    hashes, troubles = {}, []
    for name in tqdm(names, desc="pictures", unit="picture", leave=False, delay=1):
        try:
            hashes[name] = hash_of(picture_of(first[name], images))
        except ValueError as error:
            where, said, sentence = str(error).partition(": ")
            if not said or where != first[name].where:
                raise
            troubles.append((where, sentence.removesuffix(".")))
    refuse(troubles)
    return hashes


def hash_of(picture: Image.Image) -> str:
    """A picture's size and pixels, as a short text."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]
