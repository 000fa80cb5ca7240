"""The world the demo model lives in: coloured digits on a 3 x 3 grid, and which of them are usually seen together.

POPE's popular and adversarial questions only mean something when some things are frequent and some things keep company.
So digits and colours have unequal frequencies here, every digit has a companion that often appears beside it, and every
digit has a favourite colour. All of it is mild: any digit occurs in any colour beside any other, thousands of times.

    >>> scene = sample(random.Random(0), pool=[[digit] for digit in range(10)])
    >>> scene.items[0].digit, scene.items[0].colour, PLACES[scene.items[0].cell]
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

DIGITS = tuple("0123456789")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
CELLS = len(PLACES)
MOST_DIGITS = 5

# Relative frequencies; the order of popularity is 7 3 1 0 8 5 2 9 4 6, and red before blue before green.
DIGIT_WEIGHTS = (10, 11, 8, 13, 7, 8, 6, 14, 9, 7)
COLOUR_WEIGHTS = (10, 7, 9, 6, 5, 6)
COMPANION = (8, 7, 5, 9, 6, 2, 4, 1, 0, 3)  # companions come in pairs: 0 with 8, 1 with 7, 2 with 5, 3 with 9, 4 with 6
FAVOURITE = (0, 2, 1, 0, 3, 4, 5, 2, 1, 3)  # 0 and 3 like red, 1 and 7 like blue, ...
REPEAT, ACCOMPANY, PREFER = 0.18, 0.25, 0.25


@dataclass(frozen=True)
class Item:
    """One digit of a scene; `glyph` says which of the 1,797 handwritten digits was drawn."""

    cell: int
    digit: int
    colour: int
    glyph: int

    @property
    def name(self) -> str:
        """The words that single it out: `red 3`."""
        return f"{COLOURS[self.colour]} {self.digit}"


@dataclass(frozen=True)
class Scene:
    """What is in one image, in reading order."""

    items: tuple[Item, ...]

    def count(self, digit: int | None = None, colour: int | None = None) -> int:
        """How many items have this digit and this colour; None stands for any."""
        return sum(digit in (None, item.digit) and colour in (None, item.colour) for item in self.items)

    def at(self, cell: int) -> Item | None:
        """The item in one cell, if there is one."""
        return next((item for item in self.items if item.cell == cell), None)


def sample(rng: random.Random, pool: Sequence[Sequence[int]]) -> Scene:
    """Draws a scene of one to five digits.

    Args:
        pool: for each digit, the glyphs that may be used: this is what keeps held-out handwriting out of training.
    """
    amount = rng.randint(1, MOST_DIGITS)
    digits: list[int] = []
    while len(digits) < amount:
        digits.append(_next_digit(rng, digits))
    rng.shuffle(digits)
    cells = sorted(rng.sample(range(CELLS), amount))
    return Scene(
        tuple(
            Item(cell, digit, _colour(rng, digit), rng.choice(pool[digit]))
            for cell, digit in zip(cells, digits, strict=True)
        )
    )


def _next_digit(rng: random.Random, digits: Sequence[int]) -> int:
    luck = rng.random()
    if digits and luck < REPEAT:
        return rng.choice(digits)
    if digits and luck < REPEAT + ACCOMPANY:
        return COMPANION[digits[-1]]
    return rng.choices(range(len(DIGITS)), DIGIT_WEIGHTS)[0]


def _colour(rng: random.Random, digit: int) -> int:
    if rng.random() < PREFER:
        return FAVOURITE[digit]
    return rng.choices(range(len(COLOURS)), COLOUR_WEIGHTS)[0]
