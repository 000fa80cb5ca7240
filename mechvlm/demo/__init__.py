"""The small trained model that ships with the package, and the pictures and questions to try it on.

`mv.load("demo")` loads it from `path()` like any checkpoint directory. It sees coloured handwritten digits on a 3 x 3
grid; README.md beside this file is its model card. Nothing heavy is imported here.

    >>> picture = demo.scenes()[0]
    >>> picture.scene.items[0].name
    >>> vlm.prompt(picture.image, "Is there a red 3 in the image?")

Modules, from data to model: `world` (what a scene holds), `handwriting` (how it looks), `questions`, `benchmark`,
`build` (the untrained model), `packing`, `train`, `card` (the figures of the model card).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mechvlm.demo.world import COLOURS, PLACES, Item, Scene

HERE = Path(__file__).parent
SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Picture:
    """A scene of the benchmark and the file it is painted in."""

    file: Path
    scene: Scene

    @property
    def image(self) -> Image.Image:
        """The picture, 72 x 72 pixels in RGB."""
        with Image.open(self.file) as opened:
            return opened.convert("RGB")


@dataclass(frozen=True)
class Question:
    """A line of a POPE file: `label` is the right answer, "yes" or "no", and `image` a file name."""

    question_id: int
    image: str
    text: str
    label: str


def path() -> Path:
    """The directory of the trained model and its processor."""
    return HERE / "model"


def scenes() -> list[Picture]:
    """The scenes of the benchmark, with what is in them. None of their handwriting was trained on."""
    return [_picture(line) for line in (HERE / "pope" / "scenes.jsonl").read_text().splitlines()]


def pope(split: str = "random") -> list[Question]:
    """The benchmark's questions: three with yes and three with no for each scene, in the order of the scenes.

    Args:
        split: how what is asked for in vain was chosen: `random`, `popular` or `adversarial`.
    """
    if split not in SPLITS:
        raise ValueError(f"the benchmark has no split {split!r}; it has {', '.join(SPLITS)}.")
    lines = (HERE / "pope" / f"digits_pope_{split}.json").read_text().splitlines()
    return [Question(**json.loads(line)) for line in lines]


def _picture(line: str) -> Picture:
    record = json.loads(line)
    items = [
        Item(PLACES.index(item["place"]), item["digit"], COLOURS.index(item["colour"]), item["glyph"])
        for item in record["items"]
    ]
    return Picture(HERE / "pope" / "images" / record["image"], Scene(tuple(items)))
