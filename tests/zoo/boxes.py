"""Law 13 done hard where no image token shows the place: for features of keys, patches or tokens that a test computes.

A part of a plain picture is painted in one colour; the features that change most must be those of things whose boxes
hold that part. The towers' attention is made weak first, so that a patch's feature is about that patch.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechvlm.imagemap import Grid

COLOUR = (250, 20, 130)
Box = tuple[int, int, int, int]


def plain(width: int, height: int) -> Image.Image:
    """A light picture that grows lighter towards the lower right; a norm would make noise of a patch of mean grey."""
    shade = np.add.outer(np.arange(height) / height, np.arange(width) / width) * 40 + 190
    return Image.fromarray(np.repeat(shade[:, :, None], 3, axis=2).astype(np.uint8))


def noise(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A picture of random colours, different at every pixel."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def weaken(tower: torch.nn.Module, name: str, factor: float = 1e-3) -> None:
    """Scale the output matrix of each attention in a tower; `name` is the matrix's."""
    found = [module for path, module in tower.named_modules() if path.split(".")[-1] == name]
    assert found, f"no module called {name}"
    with torch.no_grad():
        for module in found:
            module.weight.mul_(factor)


def region(grid: Grid, index: int) -> Box | None:
    """The whole pixels of a box, within the picture; None where there are none, or the thing has no place."""
    place = grid.places[index]
    if place is None:
        return None
    box = grid.tiles[place[0]].box(place[1], place[2])
    left, right = (min(max(round(x), 0), grid.size[0]) for x in box[::2])
    top, bottom = (min(max(round(y), 0), grid.size[1]) for y in box[1::2])
    return (left, top, right, bottom) if left < right and top < bottom else None


def sample(grid: Grid, each: int = 3, seed: int = 0) -> Iterator[tuple[int, Box]]:
    """A few things of every tile that see some of the picture, and the pixels they see."""
    order = np.random.default_rng(seed).permutation(len(grid.places))
    for tile in range(len(grid.tiles)):
        seen = [(int(index), region(grid, index)) for index in order if (grid.places[index] or (-1,))[0] == tile]
        yield from [(index, box) for index, box in seen if box is not None][:each]


def check(grid: Grid, features: Callable[[Image.Image], Tensor], each: int = 3) -> int:
    """Paint the boxes of some things one after another; how many there were.

    What changes most must hold what was painted, and within its tile must be the very thing whose box it was.

    Args:
        features: from a picture to what the model sees in it, one row for each of the grid's places.
    """
    base = plain(*grid.size)
    before = features(base)
    assert before.shape[0] == len(grid.places)
    done = 0
    for index, box in sample(grid, each):
        painted = base.copy()
        painted.paste(COLOUR, box)
        change = (features(painted) - before).norm(dim=-1)
        tile_of = torch.tensor([-1 if place is None else place[0] for place in grid.places])
        most = int(torch.where(tile_of >= 0, change, -1.0).argmax())
        assert change[index] > 0, f"{grid.places[index]} does not see {box}"
        assert overlap(grid, most, box) > 0, f"painting {box} changed {grid.places[most]} most"
        own = int(torch.where(tile_of == tile_of[index], change, -1.0).argmax())
        assert own == index, f"painting {grid.places[index]} changed {grid.places[own]} most"
        done += 1
    return done


def overlap(grid: Grid, index: int, box: Box) -> float:
    """The area that a thing's box and some pixels share."""
    place = grid.places[index]
    assert place is not None
    left, top, right, bottom = grid.tiles[place[0]].box(place[1], place[2])
    width = min(right, box[2]) - max(left, box[0])
    height = min(bottom, box[3]) - max(top, box[1])
    return max(width, 0.0) * max(height, 0.0)


def covered(grid: Grid, tiles: Sequence[int]) -> float:
    """The area of the picture that the boxes of some tiles hold, each box counted by itself."""
    whole = (0, 0, *grid.size)
    held = [index for index, place in enumerate(grid.places) if place is not None and place[0] in tiles]
    return sum(overlap(grid, index, whole) for index in held)
