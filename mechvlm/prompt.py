"""A question about images, encoded for one model, and which position is what.

Rule this module guards: positions are computed from what the processor returned, never assumed. Image tokens are where
`input_ids` holds the image token; their number must be what the model's grid says; each one's pixel box undoes the
padding, resizing and cropping that the processor did.

>>> prompt.spans["image"][:3], prompt.images[0].box(prompt.image[0])
([3, 4, 5], (0.0, 0.0, 12.0, 12.0))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechvlm import images
from mechvlm.imagemap import Grid, ImageMap, placed
from mechvlm.pixels import to_picture
from mechvlm.shapes import Shape
from mechvlm.sites import told


@dataclass(frozen=True, repr=False, eq=False)
class Prompt:
    """A question about one or more images, encoded for one model.

    Attributes:
        words: the question, as the user wrote it.
        text: the whole prompt, verbatim, as the processor was given it.
        encoding: what the model is called with, a batch of one.
        tokens: the text of each position.
        bos, prefix, image, separators, question, last: lists of positions that together are all positions, each once.
            `prefix` is what stands before the first image token, `separators` what stands within an image and is no
            image token (the ends of rows, the names of tiles), `question` everything else after the first image token
            but the last position; without an image everything but `bos` and `last` is `question`.
        images: an `ImageMap` for each image.
        grids: how the model takes each image.
        pictures: the original pictures, empty for a ready encoding.
        shape: the sizes of the model it was encoded for.
    """

    words: str
    text: str
    encoding: dict[str, Tensor]
    tokens: list[str]
    bos: list[int]
    prefix: list[int]
    image: list[int]
    question: list[int]
    last: list[int]
    images: list[ImageMap]
    separators: list[int] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    again: Callable[[list[Image.Image], str], "Prompt"] | None = None
    shape: Shape | None = None

    @property
    def spans(self) -> dict[str, list[int]]:
        """The named spans that are not empty, in the order bos, prefix, image, separators, question, last."""
        named = {
            "bos": self.bos,
            "prefix": self.prefix,
            "image": self.image,
            "separators": self.separators,
            "question": self.question,
            "last": self.last,
        }
        return {name: positions for name, positions in named.items() if positions}

    @property
    def features(self) -> tuple[int, ...]:
        """How many vectors each image gives the language model."""
        return tuple(len(grid.places) if grid.of == "keys" else grid.tokens for grid in self.grids)

    @property
    def vision(self) -> tuple[tuple[int, int], ...]:
        """For each image, how many rows it takes in the vision tower's tensors, and how many positions each has."""
        return tuple(grid.vision for grid in self.grids)

    @property
    def queries(self) -> int:
        """How many positions a Q-Former has: its queries, and the words it is given."""
        words = self.encoding.get("qformer_input_ids")
        return sum(grid.tokens for grid in self.grids[:1]) + (0 if words is None else words.shape[1])

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        spans = ", ".join(f"{name} {_ranges(positions)}" for name, positions in self.spans.items())
        return f"Prompt({self.words!r}: {len(self)} positions; {spans})"

    def with_image(self, image: Any) -> "Prompt":
        """The same words about another picture: a picture, or a function from picture to picture (a null image).

        Raises:
            ValueError: if positions would not match, because the picture has another size or the prompt no picture.

        Example:
            >>> null = real.with_image(mv.images.black)
        """
        if self.again is None or not self.pictures:
            raise ValueError(
                "this prompt was made from a ready encoding or without an image, so there is no picture to exchange; "
                "make it with vlm.prompt(image, text)."
            )
        makers = (images.noise, images.diffusion, images.blur, images.shuffle, images.colour)
        if any(image is maker for maker in makers):
            raise ValueError(
                f"mv.images.{image.__name__} makes a null image from its settings; call it, for instance "
                "mv.images.noise(0) or mv.images.blur(8)."
            )
        if callable(image):
            pictures = [to_picture(image(picture)) for picture in self.pictures]
        elif isinstance(image, list | tuple):
            pictures = [to_picture(one) for one in image]
        else:
            pictures = [to_picture(image)]
        if len(pictures) != len(self.pictures):
            raise ValueError(f"the prompt holds {len(self.pictures)} images and {len(pictures)} were given.")
        other = self.again(pictures, self.words)
        if len(other) == len(self) and [laid(one) for one in other.images] != [laid(one) for one in self.images]:
            raise ValueError(
                "with this picture the prompt has as many positions as before, but other squares of the picture at "
                f"them, so positions cannot be matched; give a picture of {self.pictures[0].size[0]} x "
                f"{self.pictures[0].size[1]} pixels."
            )
        if len(other) != len(self):
            raise ValueError(
                f"with this picture the prompt has {len(other)} positions and before {len(self)}, so positions cannot "
                f"be matched; give a picture of {self.pictures[0].size[0]} x {self.pictures[0].size[1]} pixels."
            )
        return other

    def with_text(self, text: str) -> "Prompt":
        """The same pictures with other words; positions match those of this prompt only as far as the tokens do."""
        if self.again is None:
            raise ValueError("this prompt was made from a ready encoding; make it with vlm.prompt(image, text).")
        return self.again(self.pictures, text)

    def find(self, words: str) -> list[int]:
        """The positions of some words of the question; where they stand more than once, all of them.

        Whole words only: "red" is not found in "there".

        Raises:
            ValueError: if they are not in the question.

        Example:
            >>> real.find("image")
            [45]
        """
        if not isinstance(words, str):
            raise TypeError(f"find looks for words, and {told(words)} is none; write it in quotes.")
        wanted = "".join(words.lower().split())
        plain = ["" if position in set(self.image) else _bare(token) for position, token in enumerate(self.tokens)]
        starts = np.cumsum([0, *map(len, plain)]).tolist()
        text = "".join(plain)
        asked = "".join(self.words.lower().split())
        first = max(text.rfind(asked), 0) if asked else 0
        last = first + len(asked) if asked and asked in text else len(text)
        begins = {start for start, token in zip(starts, self.tokens, strict=False) if self._begins(token)}
        found, at = set(), text.find(wanted, first, last)
        while wanted and at >= 0:
            end = at + len(wanted)
            if at in begins and (end in begins or end == len(text) or not text[end].isalnum()):
                found |= {p for p, token in enumerate(plain) if token and starts[p] < end and starts[p + 1] > at}
            at = text.find(wanted, at + 1, last)
        if not found:
            raise ValueError(f"{words!r} are no words of the question {self.words or self.text!r}.")
        return sorted(found)

    def _begins(self, token: str) -> bool:
        """Whether a token begins a word: where tokens bear marks for a space, those that do; else every token."""
        marked = any(one[:1] in _SPACES for one in self.tokens)
        return token[:1] in _SPACES or not marked or not token[:1].isalnum()


_SPACES = ("▁", "Ġ")
"""What tokenizers write for the space before a word."""


def _bare(token: str) -> str:
    """A token's text without the marks that tokenizers use for a space."""
    return token.strip("▁Ġ ").lower()


def _ranges(positions: list[int]) -> str:
    if positions == list(range(positions[0], positions[-1] + 1)):
        return str(positions[0]) if len(positions) == 1 else f"{positions[0]} to {positions[-1]}"
    return f"{len(positions)} positions"


def laid(image: ImageMap) -> tuple:
    """How an image's tokens are laid out, whatever the size of the picture."""
    lefts, tops = (sorted({round(tile.view[axis], 6) for tile in image.tiles}) for axis in (0, 1))
    tiles = tuple(
        (tile.rows, tile.columns, lefts.index(round(tile.view[0], 6)), tops.index(round(tile.view[1], 6)))
        for tile in image.tiles
    )
    return image.positions, image.places, image.separators, tiles


def locate(
    encoding: dict[str, Tensor],
    shape: Shape,
    grids: Sequence[Grid],
    tokens: list[str] | None = None,
    bos: int | None = None,
    words: str = "",
    text: str = "",
    pictures: Sequence[Image.Image] = (),
    again: Callable[[list[Image.Image], str], Prompt] | None = None,
) -> Prompt:
    """Say of each position of an encoding what it is.

    Args:
        grids: how the model takes each image, in the order of the text.

    Raises:
        ValueError: for an encoding that no model could run, or whose image tokens and pictures do not agree.
    """
    ids = _checked_ids(encoding, shape)
    images = _split_images(ids, grids, shape)
    everywhere = [position for positions in images for position in positions]
    first, end = (everywhere[0] if everywhere else 0), len(ids) - 1
    start = [0] if bos is not None and ids[0] == bos else []
    inside = set(everywhere)
    within = [at for one in images if one for at in range(one[0], one[-1]) if at not in inside]
    taken = inside | set(within)
    return Prompt(
        words=words,
        text=text,
        encoding={**encoding, "attention_mask": encoding.get("attention_mask", torch.ones_like(encoding["input_ids"]))},
        tokens=tokens or [str(number) for number in ids],
        bos=start,
        prefix=list(range(len(start), first)),
        image=everywhere,
        separators=within,
        question=[at for at in range(max(first, len(start)), end) if at not in taken],
        last=[end] if end not in inside and [end] != start else [],
        images=_maps(images, grids),
        grids=list(grids),
        shape=shape,
        pictures=list(pictures),
        again=again,
    )


def _maps(images: Sequence[list[int]], laid: Sequence[Grid]) -> list[ImageMap]:
    """A map for each image; keys and patches are counted through all images of the prompt."""
    found, before = [], 0
    for positions, grid in zip(images, laid, strict=True):
        inner = range(before, before + len(grid.places))
        found.append(placed(grid, positions if grid.of == "tokens" else inner))
        before += len(grid.places)
    return found


def _checked_ids(encoding: dict[str, Tensor], shape: Shape) -> list[int]:
    ids = encoding.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        given = tuple(ids.shape) if isinstance(ids, Tensor) else ids
        raise ValueError(f"an encoding needs input_ids of shape (1, positions), and this one's are {given}.")
    if ids.is_floating_point() or int(ids.min()) < 0:
        raise ValueError("input_ids must be token ids, whole numbers from 0.")
    if int(ids.max()) >= shape.vocabulary:
        raise ValueError(f"token id {int(ids.max())} is not in the model's vocabulary of {shape.vocabulary}.")
    mask = encoding.get("attention_mask")
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        raise ValueError(
            "the encoding of one prompt must not be padded: attention_mask must be all ones, in the shape of "
            "input_ids. Give vlm.run a list of prompts to run them as one batch."
        )
    if ids.shape[1] > shape.longest:
        raise ValueError(f"the prompt has {ids.shape[1]} positions and the model was built for {shape.longest}.")
    return ids[0].tolist()


def _split_images(ids: list[int], laid: Sequence[Grid], shape: Shape) -> list[list[int]]:
    """Positions per image, split by the number each takes: two images side by side make one run of image tokens."""
    marked = [position for position, number in enumerate(ids) if number == shape.image_token]
    takes = [grid.tokens for grid in laid]
    if len(marked) != sum(takes):
        each = f"{takes[0]} each" if len(set(takes)) == 1 else " and ".join(map(str, takes)) or "none"
        raise ValueError(
            f"the prompt holds {len(marked)} image tokens and {len(laid)} images, which take {each}; every image "
            "needs its tokens and every image token its image."
        )
    starts = [sum(takes[:number]) for number in range(len(takes))]
    return [marked[start : start + length] for start, length in zip(starts, takes, strict=True)]


def checked_pixels(encoding: dict[str, Tensor]) -> None:
    """Refuse pixel values that no image processor makes."""
    pixels = encoding.get("pixel_values")
    if pixels is None:
        return
    if not (pixels.is_floating_point() and bool(pixels.isfinite().all())):
        raise ValueError("pixel_values must be finite floats, as the image processor makes them from a picture.")
    if not pixels.numel():
        raise ValueError("pixel_values hold no image; leave them out of the encoding.")
