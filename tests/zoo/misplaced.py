"""Proof of a grid by painting: paint what it says a place stands for, and see which of the model's features change.

It takes any reading of the model, so that the vision tower's own order can be proven as well as the text's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechvlm.imagemap import Grid

Box = tuple[float, float, float, float]
Encode = Callable[[Sequence[Image.Image]], dict[str, Tensor]]


def smooth(width: int, height: int, turn: int = 0) -> Image.Image:
    """A picture whose colours change slowly and are nowhere grey, so that no norm blows up a patch of zeros."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([200 + 40 * x, 40 + 30 * y, 60 + 30 * x * y], -1)
    return Image.fromarray(np.roll(colours, turn, -1).astype(np.uint8))


def painted(picture: Image.Image, box: Box) -> Image.Image:
    """The picture with the pixels whose centres lie in a box in another colour."""
    left, top, right, bottom = (max(math.ceil(edge - 0.5), 0) for edge in box)
    pixels = np.array(picture)
    pixels[top:bottom, left:right] = (10, 220, 250)
    return Image.fromarray(pixels)


def quiet(model: Any, *outputs: str) -> Any:
    """The model with its vision tower's attention made weak, so that features change where the picture does.

    Args:
        outputs: how the names of the matrices end that attention writes through.
    """
    ends = tuple(f"{name}.{kind}" for name in outputs for kind in ("weight", "bias"))
    found = [weight for name, weight in model.named_parameters() if name.endswith(ends)]
    assert found
    for weight in found:
        weight.mul_(1e-3)
    return model


def entering(model: Any, encoding: dict[str, Tensor]) -> Tensor:
    """What enters the language model at the image tokens, in the order of the text."""
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**encoding)
    hook.remove()
    return seen[0][encoding["input_ids"] == model.config.image_token_id]


def sample(grid: Grid, many: int = 8) -> list[int]:
    """Numbers of places, spread over the image, at least two of every tile."""
    found = set(np.linspace(0, len(grid.places) - 1, many).round().astype(int).tolist())
    for tile in range(len(grid.tiles)):
        held = [number for number, place in enumerate(grid.places) if place is not None and place[0] == tile]
        found |= {held[0], held[len(held) // 2], held[-1]}
    return sorted(number for number in found if grid.places[number] is not None)


def misplaced(
    encode: Encode, read: Callable[[dict[str, Tensor]], Tensor], pictures: Sequence[Image.Image], grids: Sequence[Grid]
) -> list[str]:
    """Places whose box is painted while another place's feature changes most; empty where the grids are right.

    Within its own tile no other place may change more than the painted one, and what changes most of all must look at
    what was painted.

    Args:
        encode: from pictures to an encoding.
        read: from an encoding to one feature for each of the places of all grids, in order.
    """
    before, wrong = read(encode(pictures)), []
    held = [(number, place, _box(grid, place)) for number, grid in enumerate(grids) for place in grid.places]
    assert len(held) == len(before)
    start = 0
    for number, grid in enumerate(grids):
        for at in (start + place for place in sample(grid)):
            _, own, box = held[at]
            assert own is not None
            other = [painted(one, box) if n == number else one for n, one in enumerate(pictures)]
            change = (read(encode(other)) - before).norm(dim=-1).tolist()
            tile = [i for i, (n, place, _) in enumerate(held) if n == number and place and place[0] == own[0]]
            most, beside = int(np.argmax(change)), max(tile, key=change.__getitem__)
            if beside != at or held[most][0] != number or not _overlap(held[most][2], box):
                wrong.append(f"{at} was painted; {beside} changed most in its tile and {most} of all")
        start += len(grid.places)
    return wrong


def blurred(
    encode: Encode, read: Callable[[dict[str, Tensor]], Tensor], picture: Image.Image, grid: Grid, margin: float = 1.5
) -> list[str]:
    """Lines one pixel wide that change the wrong row or column of a tile most; empty where all edges are right.

    Args:
        margin: how near to an edge of a box a line may not be, in pixels of what the model sees: resizing blurs it.
    """
    before, wrong = read(encode([picture])), []
    for axis, length in enumerate(picture.size):
        for at in range(0, length, 2):
            line = (at, 0, at + 1, picture.size[1]) if axis == 0 else (0, at, picture.size[0], at + 1)
            change = (read(encode([painted(picture, line)])) - before).norm(dim=-1)
            for number, tile in enumerate(grid.tiles):
                unit, start, scale = tile.token[1 - axis], tile.view[axis], tile.view[2 + axis]
                cell, within = divmod((at + 0.5 - start) / scale, unit)
                where = [i for i, place in enumerate(grid.places) if place is not None and place[0] == number]
                moved = change[where].reshape(tile.rows, tile.columns)
                count = moved.shape[1 - axis]
                if (
                    0 <= cell < count
                    and margin <= within <= unit - margin
                    and set(moved.argmax(dim=1 - axis).tolist()) != {int(cell)}
                ):
                    wrong.append(f"axis {axis}, line {at}: {moved.argmax(dim=1 - axis).tolist()}, not {int(cell)}")
    return wrong


def cover(grid: Grid, tiles: Sequence[int]) -> np.ndarray:
    """How many boxes of some tiles hold the centre of each pixel of the original picture."""
    width, height = grid.size
    x, y, found = np.arange(width) + 0.5, np.arange(height) + 0.5, np.zeros((height, width), int)
    for place in grid.places:
        if place is not None and place[0] in tiles:
            left, top, right, bottom = (edge - 1e-9 for edge in _box(grid, place))
            found += ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
    return found


def _box(grid: Grid, place: Any) -> Any:
    return None if place is None else grid.tiles[place[0]].box(place[1], place[2])


def _overlap(one: Box | None, other: Box) -> bool:
    if one is None:
        return False
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])
