"""What a report draws over the picture, and what it says where nothing can be drawn there.

Rule this module guards: every image of the prompt gets its figure, every tile is counted, and where an image token
stands for no place the page says so instead.

>>> grids(study.real.images[0]), place(study.real, 7)
('6 × 6 squares', 'row 0, column 4')
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go
import xarray as xr
from PIL import Image

from mechvlm import plot
from mechvlm.experiments.sight import cross_layers, image_dim, named
from mechvlm.imagemap import ImageMap
from mechvlm.prompt import Prompt
from mechvlm.report.page import Drawing
from mechvlm.report.study import Study

Draw = Callable[[ImageMap, Image.Image], go.Figure | Mapping[str, go.Figure]]
NO_PLACE = (
    "The image tokens are a Q-Former’s queries, which stand for no place, so nothing is drawn on the picture; "
    "mv.queries_to_patches shows where the queries look."
)
"""What stands where a Q-Former's queries would have to be drawn."""
NOT_DRAWN = {
    "patches": NO_PLACE,
    "keys": "The image’s one token stands for no place in the picture, so nothing is drawn there.",
}
"""The same for what is read at positions of the text, by what the squares of the picture are of."""


def kind(prompt: Prompt) -> str:
    """What the squares of a prompt's pictures are of: `tokens`, `keys` or `patches`.

    Example:
        >>> kind(real)
        'tokens'
    """
    return prompt.images[0].of


def grids(image: ImageMap) -> str:
    """The grids an image is seen as, in words."""
    counted = Counter((tile.rows, tile.columns) for tile in image.tiles)
    if len(image.tiles) == 1:
        return f"{image.rows} × {image.columns} squares"
    each = [f"{count} of {rows} × {columns}" for (rows, columns), count in counted.items()]
    return f"squares of {len(image.tiles)} tiles ({', '.join(each)})"


def every_grid(prompt: Prompt) -> str:
    """The grids of every image, in words."""
    return ", and the ".join(dict.fromkeys(map(grids, prompt.images)))


def square(prompt: Prompt) -> str:
    """The size of a token's square, in pixels of what the model sees."""
    sizes = dict.fromkeys(tile.token for image in prompt.images for tile in image.tiles)
    return " or ".join(f"{width} × {height}" for height, width in sizes)


def gaps(prompt: Prompt) -> str:
    """How many squares of the grids no image token stands for, in a sentence; nothing where each has one.

    Example:
        >>> gaps(real)
        ''
    """
    every = sum(tile.rows * tile.columns for image in prompt.images for tile in image.tiles)
    missing = every - sum(len(image.positions) for image in prompt.images)
    return f"{missing} of the grids’ {every} squares have no token." if missing else ""


def names(prompt: Prompt, what: str) -> list[str]:
    """What the page calls each picture.

    Example:
        >>> names(real, "picture")
        ['The picture']
    """
    several = len(prompt.images) > 1
    return [f"{what.capitalize()} {n}" if several else f"The {what}" for n in range(len(prompt.images))]


def place(prompt: Prompt, at: int) -> str:
    """Where an image token, or a key, looks, in words.

    Args:
        at: its position; that of its key where the picture is seen by cross-attention.
    """
    if kind(prompt) == "patches":
        return f"position {at}, query {prompt.image.index(at)} of the Q-Former"
    number, image = next((n, one) for n, one in enumerate(prompt.images) if at in one.positions + one.separators)
    cell = image.cell(at)
    which = f"image {number}, " if len(prompt.images) > 1 else ""
    if cell is None:
        return f"{which}{image_dim(prompt)} {at}, which stands for no place"
    tile = f"tile {cell[0]}, " if len(image.tiles) > 1 else ""
    return f"{which}{tile}row {cell[1]}, column {cell[2]}"


def best_place(values: xr.DataArray, prompt: Prompt) -> str:
    """Where the value farthest from zero belongs, in words."""
    dim = image_dim(prompt)
    return place(prompt, int(values[dim].values[int(abs(values.values).argmax())]))


def over_pictures(prompt: Prompt, alt: str, draw: Draw, chooser: str = "", start: int = 0) -> list[Drawing]:
    """A drawing for each image of a prompt; none where its tokens stand for no place.

    Args:
        alt: what is to be seen, in words.
        draw: from an image and its picture to a figure, or to several for a slider.
        chooser, start: of that slider, as in `Drawing`.
    """
    if kind(prompt) == "patches":
        return []
    shown = zip(names(prompt, "image"), prompt.images, prompt.pictures, strict=True)
    several = len(prompt.images) > 1
    return [
        Drawing(f"{name}: {alt}" if several else alt, draw(image, picture), chooser, start)
        for name, image, picture in shown
    ]


def values_over(values: xr.DataArray, prompt: Prompt, alt: str) -> list[Drawing]:
    """One value a token, over each image.

    Example:
        >>> len(values_over(mv.attention_map(vlm, real, 3), real, "The picture, coloured by attention."))
        1
    """
    return over_pictures(prompt, alt, lambda image, picture: plot.over_image(values, image, picture))


def seen(study: Study) -> str:
    """How the picture takes part in the prompt, in a sentence."""
    prompt = study.real
    taken, every = len(prompt.image), len(prompt)
    which = "The picture takes" if len(prompt.images) == 1 else f"The {len(prompt.images)} pictures take"
    first = f"{which} {taken} of the prompt’s {every} positions"
    if kind(prompt) == "tokens":
        nowhere = sum(len(image.separators) for image in prompt.images)
        return f"{first}, of which {nowhere} stand for no place in it." if nowhere else f"{first}."
    if kind(prompt) == "patches":
        squares = len(prompt.images[0].positions)
        return f"{first}: the queries of a Q-Former, which read its {squares} patches."
    keys = sum(len(image.positions) for image in prompt.images)
    return f"{first}, and {keys} keys of the cross-attention in {named(cross_layers(study.vlm))}."


def squares(study: Study) -> str:
    """What the squares over the picture are, in words."""
    become = {
        "tokens": "that the vision tower turns into one image token each",
        "keys": "whose keys the layers of cross-attention look at; the text holds one token for the image",
        "patches": "of the vision tower that the Q-Former’s queries look at; a query itself stands for no place",
    }
    return f"{every_grid(study.real)} {become[kind(study.real)]}"


def joined(parts: Sequence[str]) -> str:
    """Sentences in a row, the empty ones left out.

    Example:
        >>> joined(["One.", "", "Two."])
        'One. Two.'
    """
    return " ".join(part for part in parts if part)


def stretches_of(positions: Sequence[int]) -> str:
    """Positions in words: where they begin and end, and where there are gaps.

    Example:
        >>> stretches_of([3, 4, 5]), stretches_of([3, 4, 7]), stretches_of([1, 3, 5, 7, 9])
        ('3 to 5', '3 to 4, 7', '1, 3, 5 and 2 more stretches up to 9')
    """
    starts = [at for at in positions if at - 1 not in positions]
    ends = [at for at in positions if at + 1 not in positions]
    said = [str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True)]
    rest = len(said) - 3
    return ", ".join(said) if rest <= 0 else f"{', '.join(said[:3])} and {rest} more stretches up to {ends[-1]}"
