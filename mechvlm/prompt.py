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
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mechvlm.archs import Arch, Shape
from mechvlm.images import to_picture

View = tuple[float, float, float, float]
"""How the picture the model sees lies in the original: x = left + x' * x_scale, y = top + y' * y_scale."""


@dataclass(frozen=True)
class ImageMap:
    """The tokens of one image: where each is in the text, and which part of the original picture it stands for.

    Attributes:
        positions: positions of this image's tokens in the prompt, in the order of the grid, row by row.
        rows, columns: the grid.
        size: width and height of the original picture, in pixels.
        view: how the picture the model sees lies in the original.
        token: height and width, in pixels of the picture the model sees, of one token's square.
        separators: positions of this image's tokens that stand for no place (a class token).
    """

    positions: tuple[int, ...]
    rows: int
    columns: int
    size: tuple[int, int]
    view: View
    token: tuple[int, int]
    separators: tuple[int, ...] = ()

    def cell(self, position: int) -> tuple[int, int, int] | None:
        """Tile, row and column of a token; None for a separator.

        Raises:
            ValueError: for a position that is no token of this image.
        """
        if position in self.separators:
            return None
        if position not in self.positions:
            raise ValueError(
                f"position {position} is not a token of this image, whose tokens are {self.positions[0]} to "
                f"{self.positions[-1]}."
            )
        return (0, *divmod(self.positions.index(position), self.columns))

    def box(self, position: int) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of a token's square, in pixels of the original picture; None for a separator.

        A square may reach over the picture's edge where the processor padded it.
        """
        cell = self.cell(position)
        if cell is None:
            return None
        (left, top, x_scale, y_scale), (height, width), (_, row, column) = self.view, self.token, cell
        return (
            left + column * width * x_scale,
            top + row * height * y_scale,
            left + (column + 1) * width * x_scale,
            top + (row + 1) * height * y_scale,
        )

    def at(self, x: float, y: float) -> int | None:
        """The position of the token whose square holds a point of the original picture; None where no token looks.

        Raises:
            ValueError: for a point outside the picture.
        """
        if not (0 <= x < self.size[0] and 0 <= y < self.size[1]):
            raise ValueError(f"({x}, {y}) is outside the picture, which is {self.size[0]} x {self.size[1]} pixels.")
        (left, top, x_scale, y_scale), (height, width) = self.view, self.token
        column = int((x - left) / x_scale // width)
        row = int((y - top) / y_scale // height)
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            return None
        return self.positions[row * self.columns + column]

    def heat(self, values: Sequence[float] | np.ndarray | Tensor) -> np.ndarray:
        """One value per token, painted on the original picture: an array of its height by its width.

        Not a number where no token looks (what the processor cropped away).
        """
        numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
        if numbers.shape != (len(self.positions),):
            raise ValueError(f"heat() takes {len(self.positions)} values, one per image token, and got {numbers.shape}.")
        (left, top, x_scale, y_scale), (height, width) = self.view, self.token
        # Pixels are painted by their centres, so that a box edge within a pixel falls to one side.
        columns = np.floor((np.arange(self.size[0]) + 0.5 - left) / x_scale / width).astype(int)
        rows = np.floor((np.arange(self.size[1]) + 0.5 - top) / y_scale / height).astype(int)
        seen = ((rows >= 0) & (rows < self.rows))[:, None] & ((columns >= 0) & (columns < self.columns))[None]
        grid = numbers.reshape(self.rows, self.columns)
        painted = grid[rows.clip(0, self.rows - 1)[:, None], columns.clip(0, self.columns - 1)[None]]
        return np.where(seen, painted, np.nan)

    def __repr__(self) -> str:
        return (
            f"ImageMap({self.rows} x {self.columns} tokens at {self.positions[0]} to {self.positions[-1]} on a "
            f"{self.size[0]} x {self.size[1]} picture)"
        )


@dataclass(frozen=True, repr=False, eq=False)
class Prompt:
    """A question about one or more images, encoded for one model.

    Attributes:
        words: the question, as the user wrote it.
        text: the whole prompt, verbatim, as the processor was given it.
        encoding: what the model is called with, a batch of one.
        tokens: the text of each position.
        bos, prefix, image, question, last: lists of positions that together are all positions, each once. `prefix` is
            what stands before the first image token, `question` everything after it that is neither an image token nor
            the last position; without an image everything but `bos` and `last` is `question`.
        images: an `ImageMap` for each image.
        pictures: the original pictures, empty for a ready encoding.
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
    pictures: list[Image.Image] = field(default_factory=list)
    again: Callable[[list[Image.Image], str], "Prompt"] | None = None

    @property
    def spans(self) -> dict[str, list[int]]:
        """The named spans that are not empty, in the order bos, prefix, image, question, last."""
        named = {
            "bos": self.bos,
            "prefix": self.prefix,
            "image": self.image,
            "question": self.question,
            "last": self.last,
        }
        return {name: positions for name, positions in named.items() if positions}

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
        if callable(image):
            pictures = [image(picture) for picture in self.pictures]
        elif isinstance(image, list | tuple):
            pictures = [to_picture(one) for one in image]
        else:
            pictures = [to_picture(image)]
        if len(pictures) != len(self.pictures):
            raise ValueError(f"the prompt holds {len(self.pictures)} images and {len(pictures)} were given.")
        other = self.again(pictures, self.words)
        if len(other) != len(self):
            raise ValueError(
                f"with this picture the prompt has {len(other)} positions and before {len(self)}, so positions cannot be "
                f"matched; give a picture of {self.pictures[0].size[0]} x {self.pictures[0].size[1]} pixels."
            )
        return other

    def with_text(self, text: str) -> "Prompt":
        """The same pictures with other words; positions match those of this prompt only as far as the tokens do."""
        if self.again is None:
            raise ValueError("this prompt was made from a ready encoding; make it with vlm.prompt(image, text).")
        return self.again(self.pictures, text)

    def find(self, words: str) -> list[int]:
        """The positions of some words of the question, or all of them where the words stand more than once.

        Raises:
            ValueError: if they are not in the prompt's text.

        Example:
            >>> real.find("red")
        """
        wanted = "".join(words.lower().split())
        plain = ["" if position in set(self.image) else _bare(token) for position, token in enumerate(self.tokens)]
        starts = np.cumsum([0, *(len(token) for token in plain)])
        text, found = "".join(plain), []
        at = text.find(wanted)
        while wanted and at >= 0:
            found += [
                position
                for position, token in enumerate(plain)
                if token and starts[position] < at + len(wanted) and starts[position + 1] > at
            ]
            at = text.find(wanted, at + 1)
        if not found:
            raise ValueError(f"{words!r} is not in the prompt {self.text!r}.")
        return sorted(set(found))


def _bare(token: str) -> str:
    """A token's text without the marks that tokenizers use for a space."""
    return token.replace("▁", "").replace("Ġ", "").strip().lower()


def _ranges(positions: list[int]) -> str:
    if positions == list(range(positions[0], positions[-1] + 1)):
        return str(positions[0]) if len(positions) == 1 else f"{positions[0]} to {positions[-1]}"
    return f"{len(positions)} positions"


def encode(
    processor: Any, arch: Arch, shape: Shape, pictures: list[Image.Image], words: str, raw: bool
) -> Prompt:
    """A prompt from pictures and words, through the model's own processor.

    Raises:
        ValueError: for a text without room for the images, or with room for others.
    """
    text = words if raw else _dress(processor, arch, len(pictures), words)
    mark = processor.image_token
    if text.count(mark) != len(pictures):
        raise ValueError(
            f"the text has {text.count(mark)} {mark} and {len(pictures)} images were given; with raw=True each image needs "
            f"one {mark} in the text, where it is to stand."
        )
    encoding = processor(text=[text], images=pictures or None, return_tensors="pt")
    kept = {name: value for name, value in encoding.items() if isinstance(value, Tensor)}
    views = [view_of(processor.image_processor, picture.size, shape.picture) for picture in pictures]
    sizes = [picture.size for picture in pictures]
    tokens = processor.tokenizer.convert_ids_to_tokens(kept["input_ids"][0].tolist())

    def again(other: list[Image.Image], others: str) -> Prompt:
        return encode(processor, arch, shape, other, others, raw)

    return locate(
        kept, shape, tokens, processor.tokenizer.bos_token_id, sizes, views, words, text, pictures, again
    )


def _dress(processor: Any, arch: Arch, images: int, words: str) -> str:
    """The words in the model's chat template, or in its family's documented prompt where it has none."""
    if not words.strip():
        raise ValueError("the question is empty; write one, or pass raw=True with the whole prompt.")
    if processor.image_token in words:
        raise ValueError(
            f"the question holds {processor.image_token} itself, whose place the template decides; pass raw=True to give the "
            f"whole prompt verbatim."
        )
    if processor.chat_template is None:
        return arch.template.replace("<image>\n", f"{processor.image_token}\n" * images).format(text=words)
    content = [{"type": "image"}] * images + [{"type": "text", "text": words}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def locate(
    encoding: dict[str, Tensor],
    shape: Shape,
    tokens: list[str] | None = None,
    bos: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    views: Sequence[View] | None = None,
    words: str = "",
    text: str = "",
    pictures: Sequence[Image.Image] = (),
    again: Callable[[list[Image.Image], str], Prompt] | None = None,
) -> Prompt:
    """Say of each position of an encoding what it is.

    Raises:
        ValueError: for an encoding that no model could run, or whose image tokens and pictures do not agree.
    """
    ids = _checked_ids(encoding, shape)
    images = _split_images(ids, encoding.get("pixel_values"), shape)
    everywhere = [position for positions in images for position in positions]
    first, end = (everywhere[0] if everywhere else 0), len(ids) - 1
    start = [0] if bos is not None and ids[0] == bos else []
    sizes = sizes or [(shape.picture[1], shape.picture[0])] * len(images)
    views = views or [(0.0, 0.0, 1.0, 1.0)] * len(images)
    inside = set(everywhere)
    return Prompt(
        words=words,
        text=text,
        encoding={**encoding, "attention_mask": encoding.get("attention_mask", torch.ones_like(encoding["input_ids"]))},
        tokens=tokens or [str(number) for number in ids],
        bos=start,
        prefix=list(range(len(start), first)),
        image=everywhere,
        question=[at for at in range(max(first, len(start)), end) if at not in inside],
        last=[end] if end not in inside and [end] != start else [],
        images=[
            _map(positions, size, view, shape) for positions, size, view in zip(images, sizes, views, strict=True)
        ],
        pictures=list(pictures),
        again=again,
    )


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
            "the encoding of one prompt must not be padded: attention_mask must be all ones, in the shape of input_ids. "
            "Give vlm.run a list of prompts to run them as one batch."
        )
    if ids.shape[1] > shape.longest:
        raise ValueError(f"the prompt has {ids.shape[1]} positions and the model was built for {shape.longest}.")
    return ids[0].tolist()


def _split_images(ids: list[int], pixels: Tensor | None, shape: Shape) -> list[list[int]]:
    """Positions per image, split by the number each takes: two images side by side make one run of image tokens."""
    marked = [position for position, number in enumerate(ids) if number == shape.image_token]
    count, each = (0 if pixels is None else pixels.shape[0]), shape.tokens_per_image
    if pixels is not None and pixels.shape[1:] != (3, *shape.picture):
        raise ValueError(
            f"pixel_values are {tuple(pixels.shape)}; this model sees (images, 3, {shape.picture[0]}, {shape.picture[1]})."
        )
    if len(marked) != count * each:
        raise ValueError(
            f"the prompt holds {len(marked)} image tokens and {count} images, which take {each} each; every image needs "
            f"its tokens and every image token its image."
        )
    return [marked[start : start + each] for start in range(0, len(marked), each)]


def _map(positions: list[int], size: tuple[int, int], view: View, shape: Shape) -> ImageMap:
    rows, columns = shape.grid
    spare = len(positions) - rows * columns
    return ImageMap(
        positions=tuple(positions[spare:]),
        rows=rows,
        columns=columns,
        size=size,
        view=view,
        token=(shape.picture[0] // rows, shape.picture[1] // columns),
        separators=tuple(positions[:spare]),
    )


def view_of(image_processor: Any, size: tuple[int, int], seen: tuple[int, int]) -> View:
    """How the picture a CLIP or LLaVA image processor hands to the model lies in the original picture.

    Args:
        size: width and height of the original.
        seen: height and width of what the model sees.
    """
    settings = image_processor.to_dict()
    (width, height), left, top = size, 0.0, 0.0
    if settings.get("do_pad") and width != height:
        side = max(width, height)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        width = height = side
    x_scale = y_scale = 1.0
    if settings["do_resize"]:
        new_width, new_height = _resized(settings["size"], width, height)
        x_scale, y_scale = width / new_width, height / new_height
        width, height = new_width, new_height
    if settings["do_center_crop"]:
        crop = settings["crop_size"]
        left += _cropped(width, crop["width"]) * x_scale
        top += _cropped(height, crop["height"]) * y_scale
        width, height = crop["width"], crop["height"]
    if (height, width) != tuple(seen):
        raise ValueError(
            f"the processor makes pictures of {width} x {height} pixels from one of {size[0]} x {size[1]}, and this model "
            f"sees {seen[1]} x {seen[0]}; the processor belongs to another model."
        )
    return left, top, x_scale, y_scale


def _resized(size: dict[str, int], width: int, height: int) -> tuple[int, int]:
    short = size.get("shortest_edge")
    if short is None:
        return size["width"], size["height"]
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _cropped(length: int, crop: int) -> float:
    """How many pixels a centre crop takes from the start; negative where it pads instead."""
    if crop <= length:
        return float((length - crop) // 2)
    return -float((crop - length + 1) // 2)
