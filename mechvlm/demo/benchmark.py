"""The demo model's POPE: `python -m mechvlm.demo.benchmark --out DIR` writes the files that ship, from a seed.

As in POPE (Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models") each scene has six
questions, three with yes and three with no, and three files differ only in what is asked for in vain: something random,
the most frequent thing that is absent, or the absent thing that most often keeps company with what is there. A "thing"
is a digit, a colour, or a digit in a colour; a scene has one question of each with yes and one with no. Frequency and
company are counted over scenes drawn as for training.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from mechvlm.demo import SPLITS
from mechvlm.demo.handwriting import paint, pool
from mechvlm.demo.questions import is_there
from mechvlm.demo.world import COLOURS, DIGITS, PLACES, Scene, sample

SEED = 2023
SCENES = 150
WARP = 0.5
COUNTED = 20_000

Thing = tuple[int | None, int | None]  # a digit, a colour, or both
KINDS: tuple[tuple[Thing, ...], ...] = (
    tuple((digit, None) for digit in range(len(DIGITS))),
    tuple((None, colour) for colour in range(len(COLOURS))),
    tuple(product(range(len(DIGITS)), range(len(COLOURS)))),
)


def present(scene: Scene) -> set[Thing]:
    """Everything a scene holds that can be asked for."""
    things = [thing for item in scene.items for thing in product((item.digit, None), (item.colour, None))]
    return set(things) - {(None, None)}


@cache
def _together() -> Counter[tuple[Thing, Thing]]:
    """In how many training scenes two things are seen together; a thing with itself: in how many it is seen."""
    rng = random.Random(SEED)
    together: Counter[tuple[Thing, Thing]] = Counter()
    for _ in range(COUNTED):
        things = sorted(present(sample(rng, pool("train"))), key=str)
        together.update(product(things, things))
    return together


def absent(scene: Scene, kind: Sequence[Thing], split: str, rng: random.Random) -> Thing:
    """The thing of a kind to ask for in vain."""
    there = present(scene)
    missing = [thing for thing in kind if thing not in there]
    if split == "random":
        return rng.choice(missing)
    company = _together()
    if split == "popular":
        return max(missing, key=lambda thing: company[thing, thing])
    return max(missing, key=lambda thing: sum(company[thing, other] for other in there))


def ask(scene: Scene, split: str, rng: random.Random) -> list[tuple[str, str]]:
    """Six questions with their labels, in turn yes and no. Those with yes are the same in every split."""
    there = present(scene)
    found = [rng.choice([thing for thing in kind if thing in there]) for kind in KINDS]
    missed = [absent(scene, kind, split, rng) for kind in KINDS]
    pairs = zip(found, missed, strict=True)
    return [(is_there(*thing), label) for pair in pairs for thing, label in zip(pair, ("yes", "no"), strict=True)]


def draw() -> list[Scene]:
    """The scenes, from handwriting that is in no other split."""
    rng = random.Random(SEED)
    return [sample(rng, pool("benchmark")) for _ in range(SCENES)]


def _record(scene: Scene, image: str) -> str:
    items = [
        {"place": PLACES[item.cell], "digit": item.digit, "colour": COLOURS[item.colour], "glyph": item.glyph}
        for item in scene.items
    ]
    return json.dumps({"image": image, "items": items})


def main(out: Annotated[Path, typer.Option(help="Directory to write to.")]) -> None:
    """Writes the images, what is in them, and the three files of questions."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    drawn = draw()
    names = [f"scene_{number:03}.png" for number in range(len(drawn))]
    for name, pixels in zip(names, paint(drawn, np.random.default_rng(SEED), WARP), strict=True):
        Image.fromarray(pixels).save(out / "images" / name, optimize=True)
    records = [_record(scene, name) for scene, name in zip(drawn, names, strict=True)]
    (out / "scenes.jsonl").write_text("\n".join(records) + "\n")
    for split in SPLITS:
        lines = [
            json.dumps({"question_id": 6 * number + place + 1, "image": name, "text": text, "label": label})
            for number, (scene, name) in enumerate(zip(drawn, names, strict=True))
            for place, (text, label) in enumerate(ask(scene, split, random.Random(f"{SEED} {number}")))
        ]
        (out / f"digits_pope_{split}.json").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
