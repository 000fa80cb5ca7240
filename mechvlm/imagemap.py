"""Which part of the original picture each image token stands for.

Rule this module guards: pixel boxes are computed from what the image processor really did, its padding, resizing and
cropping undone in the order it did them. Token coordinates are never guessed from a number of tokens.

>>> image = prompt.images[0]
>>> image.box(prompt.image[0]), image.at(40, 10)
((0.0, 0.0, 12.0, 12.0), 6)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

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
        numbers = np.asarray(values.detach().double().cpu() if isinstance(values, Tensor) else values, dtype=float)
        if numbers.shape != (len(self.positions),):
            raise ValueError(
                f"heat() takes {len(self.positions)} values, one per image token, and got an array of shape "
                f"{numbers.shape}."
            )
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


def view_of(image_processor: Any, size: tuple[int, int], seen: tuple[int, int]) -> View:
    """How the picture a CLIP or LLaVA image processor hands to the model lies in the original picture.

    Args:
        size: width and height of the original.
        seen: height and width of what the model sees.

    Raises:
        ValueError: for a way to pad, resize or crop that is not known, or that makes pictures of another size.
    """
    settings = image_processor.to_dict()
    (width, height), left, top = size, 0.0, 0.0
    if settings.get("do_pad") and not settings["image_processor_type"].startswith("LlavaImageProcessor"):
        raise ValueError(
            f"{settings['image_processor_type']} has do_pad=True, and mechvlm undoes the padding of "
            "LlavaImageProcessor only; set image_processor.do_pad = False."
        )
    if settings.get("do_pad") and width != height:
        side = max(width, height)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        width = height = side
    x_scale = y_scale = 1.0
    if settings.get("do_resize"):
        new_width, new_height = _resized(settings["size"], width, height)
        x_scale, y_scale = width / new_width, height / new_height
        width, height = new_width, new_height
    if settings.get("do_center_crop"):
        crop = settings["crop_size"]
        left += _cropped(width, crop["width"]) * x_scale
        top += _cropped(height, crop["height"]) * y_scale
        width, height = crop["width"], crop["height"]
    if (height, width) != tuple(seen):
        raise ValueError(
            f"the processor makes pictures of {width} x {height} pixels from one of {size[0]} x {size[1]}, and this "
            f"model sees {seen[1]} x {seen[0]}; the processor belongs to another model."
        )
    return left, top, x_scale, y_scale


def _resized(size: dict[str, int], width: int, height: int) -> tuple[int, int]:
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(
            f"the processor resizes pictures to {size}, and mechvlm undoes only a 'shortest_edge', or 'height' and "
            "'width'; set image_processor.size to one of these."
        )
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
