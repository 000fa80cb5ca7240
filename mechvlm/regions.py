"""Regions of the picture as lists of positions: parts of it, tiles, boxes and masks.

Rule this module guards: a region is named in the original picture, and its tokens are those whose squares lie there,
with what the processor did undone. Every tile that sees the region counts; what stands for no place is in no region.

>>> list(image_regions(real, 2, 2))
['top left', 'top right', 'bottom left', 'bottom right']
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from mechvlm.imagemap import OF, ImageMap
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, number, told, whole

Box = Sequence[float]
"""Left, top, right and bottom, in pixels of the original picture."""
BESIDE = 1.0
"""Pixels by which a box may reach out of the picture, as rounded annotations do."""
ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "centre", "right")}
ELSEWHERE = {
    "keys": "the picture is seen by cross-attention, whose keys are its squares, and no position of the text stands "
    "for one; say of='keys' for those, which edits with cross=True take.",
    "patches": "the picture is seen through a Q-Former, whose queries stand for no place in it; say of='patches' "
    "for positions of the vision tower.",
}
"""Why a region holds no positions of the text, and what it does hold."""


def image_regions(
    prompt: Prompt, rows: int = 3, columns: int = 3, image: int = 0, of: str = "tokens"
) -> dict[str, list[int]]:
    """The picture cut into equal parts, and for each the image tokens that look there.

    A token belongs to the part that holds the centre of what it sees of the picture, so that every token that sees any
    of it belongs to one part. Tokens of several tiles may look at the same part, and all of them count. Parts that no
    token sees, because the processor cropped them away or there are more parts than tokens, are left out.

    Args:
        rows, columns: of parts. Up to three have names like "top left", more are called "row 0, column 5".
        image: which of the prompt's images.
        of: what is wanted: positions of the image "tokens" in the text; where the model has none for places in the
            picture, the "keys" of cross-attention, or the "patches" of the vision tower.

    Raises:
        ValueError: without an image, for a model whose image tokens stand for no places, or for fewer parts than one.

    Example:
        >>> mv.patch_spans(vlm, real, null, yes, spans=mv.image_regions(real)).normalised.sizes["span"]
        9
    """
    seen, down, across = _seen(prompt, image, of), whole("rows", rows), whole("columns", columns)
    if down < 1 or across < 1:
        raise ValueError(f"{rows} x {columns} parts are none; give 1 row and 1 column or more.")
    held: dict[tuple[int, int], list[int]] = {(row, column): [] for row in range(down) for column in range(across)}
    width, height = prompt.images[image].size
    for position, (left, top, right, bottom) in seen.items():
        row, column = int((top + bottom) / 2 / height * down), int((left + right) / 2 / width * across)
        held[row, column].append(position)
    return {_called(*part, down, across): positions for part, positions in held.items() if positions}


def tile_regions(prompt: Prompt, image: int = 0, of: str = "tokens") -> dict[str, list[int]]:
    """The image tokens of each tile that the picture is seen as: "tile 0", "tile 1", in the model's order.

    Args:
        image, of: as in `image_regions`.

    Raises:
        ValueError: as `image_regions`.

    Example:
        >>> {name: len(positions) for name, positions in mv.tile_regions(real).items()}
        {'tile 0': 36}
    """
    own = _map(prompt, image, of)
    tiles: dict[str, list[int]] = {f"tile {number}": [] for number in range(len(own.tiles))}
    for position, (tile, _, _) in zip(own.positions, own.places, strict=True):
        tiles[f"tile {tile}"].append(position)
    return {name: sorted(positions) for name, positions in tiles.items() if positions}


def tokens_in(
    prompt: Prompt,
    box: Sequence[float] | None = None,
    mask: np.ndarray | Tensor | None = None,
    image: int = 0,
    share: float = 0.5,
    border: int = 0,
    of: str = "tokens",
) -> list[int]:
    """The image tokens that look at an object, given as a box or a mask on the original picture.

    Args:
        box: left, top, right and bottom, in pixels of the original picture.
        mask: true where the object is, of the picture's height by its width.
        image, of: as in `image_regions`.
        share: how much of what a token sees of the picture has to lie in the object, above 0 and up to 1.
        border: so many more rows and columns of the same tile around those tokens are taken as well.

    Returns:
        Positions in rising order, of all tiles.

    Raises:
        ValueError: for neither or both of box and mask, one that does not fit the picture (a box may reach out by a
            pixel), or no token that sees as much of the object.
        TypeError: for numbers that are none.

    Example:
        >>> mv.tokens_in(real, box=(0, 0, 24, 12))
        [3, 4]

    Source:
        Neo et al. (2024), "Towards Interpreting Visual Information Processing in Vision-Language Models", section 3,
        whose object tokens have a buffer of 0, 1 or 2 cells.
    """
    seen, own = _seen(prompt, image, of), prompt.images[image]
    if not 0 < number("share", share) <= 1:
        raise ValueError(f"share={share} is no part of a square; give a number above 0 and up to 1.")
    if whole("border", border) < 0:
        raise ValueError(f"border={border} takes nothing in; give 0 or more rows and columns.")
    area = _area(own, box, mask)
    shares = {position: area(seen[position]) / _size(seen[position]) for position in seen}
    inside = {position for position, part in shares.items() if part >= share - 1e-9}
    if not inside:
        best = max(shares, key=lambda position: shares[position])
        raise ValueError(
            f"no image token has {share:.0%} of its square in there; the most is {shares[best]:.0%}, at position "
            f"{best}, so take a smaller share or a larger region."
        )
    cells = [own.cell(position) for position in inside]
    near = {
        position
        for position, (tile, row, column) in zip(own.positions, own.places, strict=True)
        if any(cell and cell[0] == tile and max(abs(cell[1] - row), abs(cell[2] - column)) <= border for cell in cells)
    }
    return sorted(near & set(seen))


def _called(row: int, column: int, rows: int, columns: int) -> str:
    """A part's name."""
    if rows not in ROWS or columns not in COLUMNS:
        return f"row {row}, column {column}"
    words = [ROWS[rows][row], COLUMNS[columns][column]]
    return "centre" if words == ["middle", "centre"] else " ".join(word for word in words if word) or "all"


def _map(prompt: Prompt, image: int, of: str) -> ImageMap:
    """The map of one of a prompt's images, which has to be of what is wanted."""
    if of not in OF:
        raise ValueError(f"of={of!r} is not known; choose from {', '.join(map(repr, OF))}.")
    if not isinstance(prompt, Prompt):
        raise TypeError(f"{told(prompt)} is not one prompt; make it with vlm.prompt(image, text).")
    if not 0 <= whole("image", image) < len(prompt.images):
        raise ValueError(f"there is no image {image}; the prompt holds {len(prompt.images)}, counted from 0.")
    own = prompt.images[image]
    if own.of != of:
        there = ELSEWHERE.get(own.of, "the picture's squares are image tokens; leave of= out.")
        raise ValueError(f"regions of this prompt are not of {of}: {there}")
    return own


def _seen(prompt: Prompt, image: int, of: str) -> dict[int, Box]:
    """What each token sees of the picture: its square without what the processor padded; in rising order."""
    own = _map(prompt, image, of)
    found: dict[int, Box] = {}
    for position in sorted(own.positions):
        left, top, right, bottom = own.box(position) or (0.0,) * 4
        part = (max(left, 0.0), max(top, 0.0), min(right, float(own.size[0])), min(bottom, float(own.size[1])))
        if part[0] < part[2] - 1e-9 and part[1] < part[3] - 1e-9:
            found[position] = part
    return found


def _size(box: Box) -> float:
    """The area of a box."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _area(own: ImageMap, box: object, mask: object) -> Callable[[Box], float]:
    """How much of an object lies in a box, in pixels."""
    if (box is None) == (mask is None):
        raise ValueError(
            "an object is given by box or by mask, and by one of them; give box=(left, top, right, bottom)."
        )
    if mask is not None:
        return _area_of_mask(own, mask)
    found = listed(box)
    sides = tuple(number("box: side", side) for side in found or ())
    if len(sides) != 4 or not (sides[0] < sides[2] and sides[1] < sides[3]):
        raise ValueError(
            f"box={told(box)} is no box; give (left, top, right, bottom) in pixels, left before right and top before "
            "bottom."
        )
    left, top, right, bottom = sides
    width, height = own.size
    if min(left, top) < -BESIDE or right > width + BESIDE or bottom > height + BESIDE:
        raise ValueError(
            f"box={told(box)} reaches out of the picture, which is {width} pixels wide and {height} high; give pixels "
            "of the original picture."
        )
    return lambda at: _size((max(left, at[0]), max(top, at[1]), min(right, at[2]), min(bottom, at[3])))


def _area_of_mask(own: ImageMap, mask: object) -> Callable[[Box], float]:
    """The same of a mask, exactly, also where a box's sides cut pixels."""
    held = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if held.shape != own.size[::-1] or held.dtype != bool:
        raise ValueError(
            f"the mask is {held.dtype} of {' x '.join(map(str, held.shape))}; it must be bool of the picture's height "
            f"by width, {own.size[1]} x {own.size[0]}."
        )
    summed = np.pad(held.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def within(x: float, y: float) -> float:  # of the mask, above y and left of x; linear within a pixel
        column, row = min(int(x), own.size[0] - 1), min(int(y), own.size[1] - 1)
        corners = summed[row : row + 2, column : column + 2]
        return float(np.array([1 - y + row, y - row]) @ corners @ np.array([1 - x + column, x - column]))

    return lambda at: within(at[2], at[3]) - within(at[0], at[3]) - within(at[2], at[1]) + within(at[0], at[1])
