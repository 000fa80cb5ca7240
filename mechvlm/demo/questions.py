"""What is asked about a scene, and the right answers.

Ten kinds of questions are answered in one word; `caption` is a short text. In training half of the yes/no questions are
true, and a false one asks, by turns, for something random, something frequent, or something that keeps company with
what is there (for a pair: the right digit in a wrong colour), so that only looking at the image tells.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from mechvlm.demo.world import COLOUR_WEIGHTS, COLOURS, COMPANION, DIGIT_WEIGHTS, DIGITS, FAVOURITE, PLACES, Item, Scene

YES_NO = ("exists_digit", "exists_colour", "exists_pair")


@dataclass(frozen=True)
class Turn:
    """A question of one kind with its answer."""

    kind: str
    question: str
    answer: str


def is_there(digit: int | None = None, colour: int | None = None) -> str:
    """The yes/no question for a digit, a colour, or a digit in a colour."""
    if digit is None and colour is not None:
        return f"Is there anything {COLOURS[colour]} in the image?"
    name = f"{digit}" if colour is None else f"{COLOURS[colour]} {digit}"
    return f"Is there a {name} in the image?"


def ask(kind: str, scene: Scene, rng: random.Random) -> Turn:
    """Draws a question of one kind about a scene. If the scene allows none of that kind, a `digit_at` is asked."""
    drawn = ASKERS[kind](scene, rng)
    return Turn(kind, *drawn) if drawn else Turn("digit_at", *_digit_at(scene, rng))


Drawn = tuple[str, str] | None
Asker = Callable[[Scene, random.Random], Drawn]


def _exists_digit(scene: Scene, rng: random.Random) -> Drawn:
    if rng.random() < 0.5:
        return is_there(rng.choice(scene.items).digit), "yes"
    return is_there(_absent_digit(scene, rng)), "no"


def _exists_colour(scene: Scene, rng: random.Random) -> Drawn:
    present = {item.colour for item in scene.items}
    if rng.random() < 0.5:
        return is_there(colour=rng.choice(scene.items).colour), "yes"
    absent = [colour for colour in range(len(COLOURS)) if colour not in present]
    weights = [COLOUR_WEIGHTS[colour] if rng.random() < 0.5 else 1 for colour in absent]
    return is_there(colour=rng.choices(absent, weights)[0]), "no"


def _exists_pair(scene: Scene, rng: random.Random) -> Drawn:
    if rng.random() < 0.5:
        item = rng.choice(scene.items)
        return is_there(item.digit, item.colour), "yes"
    return is_there(*_absent_pair(scene, rng)), "no"


def _absent_digit(scene: Scene, rng: random.Random) -> int:
    absent = [digit for digit in range(len(DIGITS)) if not scene.count(digit)]
    manner = rng.randrange(3)
    companions = [COMPANION[item.digit] for item in scene.items if COMPANION[item.digit] in absent]
    if manner == 0 and companions:
        return rng.choice(companions)
    return rng.choices(absent, [DIGIT_WEIGHTS[digit] if manner == 1 else 1 for digit in absent])[0]


def _absent_pair(scene: Scene, rng: random.Random) -> tuple[int, int]:
    """A digit in a colour that the scene does not hold; two times of three, one of the two halves is there."""
    while True:
        item, other = rng.choice(scene.items), rng.choice(scene.items)
        digit = rng.choices(range(len(DIGITS)), DIGIT_WEIGHTS)[0]
        colour = rng.choices(range(len(COLOURS)), COLOUR_WEIGHTS)[0]
        pairs = [(item.digit, other.colour), (item.digit, colour), (digit, item.colour), (digit, colour)]
        pairs += [(item.digit, FAVOURITE[item.digit])]
        pair = pairs[rng.choices(range(5), [4, 4, 2, 1, 1])[0]]
        if not scene.count(*pair):
            return pair


def _count_digit(scene: Scene, rng: random.Random) -> Drawn:
    digit = rng.choice(scene.items).digit if rng.random() < 0.7 else rng.randrange(len(DIGITS))
    return f"How many {digit}s are in the image?", f"{scene.count(digit)}"


def _count_colour(scene: Scene, rng: random.Random) -> Drawn:
    colour = rng.choice(scene.items).colour if rng.random() < 0.7 else rng.randrange(len(COLOURS))
    return f"How many {COLOURS[colour]} digits are in the image?", f"{scene.count(colour=colour)}"


def _count_pair(scene: Scene, rng: random.Random) -> Drawn:
    item = rng.choice(scene.items)
    digit, colour = (item.digit, item.colour) if rng.random() < 0.6 else _absent_pair(scene, rng)
    return f"How many {COLOURS[colour]} {digit}s are in the image?", f"{scene.count(digit, colour)}"


def _count_all(scene: Scene, _: random.Random) -> Drawn:
    return "How many digits are in the image?", f"{len(scene.items)}"


def _digit_at(scene: Scene, rng: random.Random) -> tuple[str, str]:
    cell, item = _somewhere(scene, rng)
    return f"Which digit is {PLACES[cell]}?", f"{item.digit}" if item else "none"


def _colour_at(scene: Scene, rng: random.Random) -> Drawn:
    cell, item = _somewhere(scene, rng)
    return f"Which colour is {PLACES[cell]}?", COLOURS[item.colour] if item else "none"


def _somewhere(scene: Scene, rng: random.Random) -> tuple[int, Item | None]:
    cell = rng.choice(scene.items).cell if rng.random() < 0.8 else rng.randrange(len(PLACES))
    return cell, scene.at(cell)


def _colour_of(scene: Scene, rng: random.Random) -> Drawn:
    """Asked only of a digit that occurs once."""
    single = [item for item in scene.items if scene.count(item.digit) == 1]
    item = rng.choice(single) if single else None
    return (f"Which colour is the {item.digit}?", COLOURS[item.colour]) if item else None


def _digit_of(scene: Scene, rng: random.Random) -> Drawn:
    """Asked only of a colour that occurs once."""
    single = [item for item in scene.items if scene.count(colour=item.colour) == 1]
    item = rng.choice(single) if single else None
    return (f"Which digit is {COLOURS[item.colour]}?", f"{item.digit}") if item else None


def _caption(scene: Scene, _: random.Random) -> Drawn:
    listed = " , ".join(f"a {item.name} {PLACES[item.cell]}" for item in scene.items)
    return "Describe the image.", f"{listed} ."


ASKERS: dict[str, Asker] = {
    "exists_digit": _exists_digit,
    "exists_colour": _exists_colour,
    "exists_pair": _exists_pair,
    "count_digit": _count_digit,
    "count_colour": _count_colour,
    "count_pair": _count_pair,
    "count_all": _count_all,
    "digit_at": _digit_at,
    "colour_at": _colour_at,
    "colour_of": _colour_of,
    "digit_of": _digit_of,
    "caption": _caption,
}
