"""Which part of the original picture each image token stands for.

Rule this module guards: pixel boxes are computed from what the image processor really did, its padding, resizing,
cropping and cutting into tiles undone in the order it did them. Token coordinates are never guessed from a number of
tokens. What each family of processors does stands in `mechvlm.grids`.

>>> image = prompt.images[0]
>>> image.box(prompt.image[0]), image.at(40, 10)
((0.0, 0.0, 12.0, 12.0), 6)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

View = tuple[float, float, float, float]
"""How a picture the model sees lies in the original: x = left + x' * x_scale, y = top + y' * y_scale."""

Place = tuple[int, int, int]
"""Tile, row and column."""

OF = ("tokens", "keys", "patches")


@dataclass(frozen=True)
class Tile:
    """One grid of tokens over one picture that the model sees: the whole image, or a part of it at a higher resolution.

    Attributes:
        rows, columns: the grid.
        view: how the picture that the grid starts in the top left corner of lies in the original.
        token: height and width, in pixels of that picture, of one token's square.
    """

    rows: int
    columns: int
    view: View
    token: tuple[float, float]

    def box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a square, in pixels of the original picture."""
        (left, top, x_scale, y_scale), (height, width) = self.view, self.token
        return (
            left + column * width * x_scale,
            top + row * height * y_scale,
            left + (column + 1) * width * x_scale,
            top + (row + 1) * height * y_scale,
        )

    def cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The columns of some x and the rows of some y of the original picture; they may lie outside the grid."""
        (left, top, x_scale, y_scale), (height, width) = self.view, self.token
        # A pixel's centre that lies on an edge, to within rounding, belongs to the square right of it.
        columns = np.floor((x - left) / x_scale / width + 1e-9).astype(int)
        return columns, np.floor((y - top) / y_scale / height + 1e-9).astype(int)


@dataclass(frozen=True)
class Grid:
    """One image as a model takes it, before it is known where in the text it stands.

    Attributes:
        size: width and height of the original picture, in pixels.
        tiles: the grids that the model sees.
        places: for each of the things in `of`, in the model's order, its tile, row and column; None for one that stands
            for no place (a class token, the end of a row).
        tokens: how many image tokens it takes in the text.
        of: what the places are of: the image "tokens"; the "keys" of cross-attention, where the text holds one token an
            image; or the "patches" of the vision tower, where a Q-Former's queries stand between them and the text.
        vision: how many rows along the first axis it takes in the vision tower's tensors (its tiles), and how many
            positions each of them has.
    """

    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    places: tuple[Place | None, ...]
    tokens: int
    vision: tuple[int, int]
    of: str = "tokens"


@dataclass(frozen=True)
class ImageMap:
    """The tokens of one image: where each is in the text, and which part of the original picture it stands for.

    Attributes:
        positions: positions of this image's tokens in the prompt, in the model's order. Where `of` is "keys" or
            "patches" they count those of the cross-attention or of the vision tower instead.
        places: tile, row and column of each.
        tiles: the grids the image is seen as: the whole image, its parts at a higher resolution, or both.
        size: width and height of the original picture, in pixels; where a ready encoding does not say them, those of
            what the model sees.
        separators: positions of this image's tokens that stand for no place (a class token, the end of a row).
        of: what `positions` are positions of: "tokens", "keys" or "patches"; see `Grid`.
    """

    positions: tuple[int, ...]
    places: tuple[Place, ...]
    tiles: tuple[Tile, ...]
    size: tuple[int, int]
    separators: tuple[int, ...] = ()
    of: str = "tokens"

    @property
    def rows(self) -> int:
        """Rows of the only tile."""
        return self._only().rows

    @property
    def columns(self) -> int:
        """Columns of the only tile."""
        return self._only().columns

    @property
    def token(self) -> tuple[float, float]:
        """Height and width of a token's square of the only tile, in pixels of what the model sees."""
        return self._only().token

    def _only(self) -> Tile:
        if len(self.tiles) != 1:
            raise ValueError(f"this image is seen as {len(self.tiles)} tiles, each with a grid of its own; use .tiles.")
        return self.tiles[0]

    @cached_property
    def _place_of(self) -> dict[int, Place]:
        return dict(zip(self.positions, self.places, strict=True))

    @cached_property
    def _position_of(self) -> dict[Place, int]:
        return dict(zip(self.places, self.positions, strict=True))

    def cell(self, position: int) -> Place | None:
        """Tile, row and column of a token; None for a separator.

        Raises:
            ValueError: for a position that is no token of this image.
        """
        if position in self.separators:
            return None
        if position not in self._place_of:
            held = sorted((*self.positions, *self.separators))
            raise ValueError(
                f"position {position} is not a token of this image, whose {self.of} are {held[0]} to {held[-1]}."
            )
        return self._place_of[position]

    def box(self, position: int) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of a token's square, in pixels of the original picture; None for a separator.

        A square may reach over the picture's edge where the processor padded it.
        """
        cell = self.cell(position)
        return None if cell is None else self.tiles[cell[0]].box(cell[1], cell[2])

    def at(self, x: float, y: float, tile: int | None = None) -> int | None:
        """The position of the token whose square holds a point of the original picture; None where no token looks.

        Args:
            tile: which tile to ask; by default the one that sees the point at the highest resolution.

        Raises:
            ValueError: for a point outside the picture.
        """
        if not (0 <= x < self.size[0] and 0 <= y < self.size[1]):
            raise ValueError(f"({x}, {y}) is outside the picture, which is {self.size[0]} x {self.size[1]} pixels.")
        if tile is not None and not 0 <= tile < len(self.tiles):
            raise ValueError(f"there is no tile {tile}; this image has {len(self.tiles)}, counted from 0.")
        for number in self._finest() if tile is None else [tile]:
            columns, rows = self.tiles[number].cells(np.array([x]), np.array([y]))
            found = self._position_of.get((number, int(rows[0]), int(columns[0])))
            if found is not None:
                return found
        return None

    def _finest(self) -> list[int]:
        """The tiles by the area of the original picture that one of their tokens covers, smallest first."""
        boxes = [tile.box(0, 0) for tile in self.tiles]
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        return sorted(range(len(self.tiles)), key=lambda number: areas[number])

    def heat(self, values: Sequence[float] | np.ndarray | Tensor, tile: int | None = None) -> np.ndarray:
        """One value per token, painted on the original picture: an array of its height by its width.

        Args:
            values: one for each of `positions`, or, as `prompt.image` has them, of those and the separators in the
                order of the text; separators are not painted.
            tile: paint this tile's tokens only; by default each pixel shows the token that sees it at the highest
                resolution.

        Not a number where no token looks (what the processor cropped away).
        """
        numbers = np.asarray(values.detach().double().cpu() if isinstance(values, Tensor) else values, dtype=float)
        every = sorted((*self.positions, *self.separators))
        if numbers.shape == (len(every),):
            numbers = numbers[np.searchsorted(every, self.positions)]
        if numbers.shape != (len(self.positions),):
            raise ValueError(
                f"heat() takes {len(self.positions)} values, one per image token, and got an array of shape "
                f"{numbers.shape}."
            )
        painted = np.full((self.size[1], self.size[0]), np.nan)
        for number in reversed(self._finest()) if tile is None else [tile]:
            one = self.tiles[number]
            grid = np.full((one.rows, one.columns), np.nan)
            for value, (of, row, column) in zip(numbers, self.places, strict=True):
                if of == number:
                    grid[row, column] = value
            # Pixels are painted by their centres, so that a box edge within a pixel falls to one side.
            columns, rows = one.cells(np.arange(self.size[0]) + 0.5, np.arange(self.size[1]) + 0.5)
            seen = ((rows >= 0) & (rows < one.rows))[:, None] & ((columns >= 0) & (columns < one.columns))[None]
            here = grid[rows.clip(0, one.rows - 1)[:, None], columns.clip(0, one.columns - 1)[None]]
            painted = np.where(seen & ~np.isnan(here), here, painted)
        return painted

    def __repr__(self) -> str:
        grids = " and ".join(dict.fromkeys(f"{tile.rows} x {tile.columns}" for tile in self.tiles)) or "no"
        tiles = "" if len(self.tiles) == 1 else f" in {len(self.tiles)} tiles"
        held = sorted((*self.positions, *self.separators))
        return (
            f"ImageMap({grids} {self.of}{tiles} at {held[0]} to {held[-1]} on a {self.size[0]} x {self.size[1]} "
            "picture)"
        )


def placed(grid: Grid, positions: Sequence[int]) -> ImageMap:
    """The map of one image whose tokens (or keys, or patches) are at some positions, in the order of its places."""
    pairs = list(zip(positions, grid.places, strict=True))
    return ImageMap(
        positions=tuple(position for position, place in pairs if place is not None),
        places=tuple(place for _, place in pairs if place is not None),
        tiles=grid.tiles,
        size=grid.size,
        separators=tuple(position for position, place in pairs if place is None),
        of=grid.of,
    )
