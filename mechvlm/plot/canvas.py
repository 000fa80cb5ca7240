"""A picture with the squares of its image tokens over it, on which the figures of `pictures` draw.

Rule this module guards: where a token looks is asked of its `ImageMap`, never computed here. Where squares overlap (the
tiles of a picture and its overview) every layer of them gets its own copy of the picture, side by side.

>>> Canvas.of(real.images[0], real.pictures[0]).panels[0][0].positions[0]
array([3, 4, 5, 6, 7, 8])
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from mechvlm.imagemap import ImageMap

SIDE = 520  # pixels on the screen of a picture's longer side, where nothing asks for more
LARGEST = 1200  # pixels of the longer side that are embedded
SMALL = 300  # a picture below this is enlarged square by square; browsers would blur it
COUNTED_BY = {"tokens": "position", "keys": "key", "patches": "patch"}
"""The dim of values over an image, by what its squares are of."""
GAP = 0.03  # between panels, as a share of the width


@dataclass(frozen=True)
class Tile:
    """One grid of image tokens: the lines between its columns and rows, and the positions in it (-1: none)."""

    x: list[float]
    y: list[float]
    positions: np.ndarray

    def overlaps(self, other: "Tile") -> bool:
        """Whether a part of the picture lies in both."""
        sideways = min(self.x[-1], other.x[-1]) - max(self.x[0], other.x[0])
        downwards = min(self.y[-1], other.y[-1]) - max(self.y[0], other.y[0])
        return min(sideways, downwards) > 1e-6 * (self.x[-1] - self.x[0])


@dataclass(frozen=True)
class Canvas:
    """A picture and its image tokens, cut into panels without overlap.

    Attributes:
        panels: for each copy of the picture the tiles over it.
        area: left, top, right and bottom of what is shown, in pixels of the picture: the picture and all squares.
        scale: pixels on the screen for a pixel of the picture.
    """

    image_map: ImageMap
    picture: Image.Image
    panels: list[list[Tile]]
    area: tuple[float, float, float, float]
    scale: float

    @classmethod
    def of(cls, image_map: ImageMap, picture: Image.Image, smallest: float = 0) -> "Canvas":
        """The canvas of an image; `smallest` is how many pixels on the screen a token's square has at least.

        Raises:
            ValueError: if the picture is not the one that the tokens look at.
        """
        if picture.size != image_map.size:
            raise ValueError(
                f"the picture is {picture.size[0]} x {picture.size[1]} pixels, and the tokens look at one of "
                f"{image_map.size[0]} x {image_map.size[1]}; give the picture that the prompt was made with."
            )
        tiles = _tiles(image_map)
        area = (
            min(0.0, *(tile.x[0] for tile in tiles)),
            min(0.0, *(tile.y[0] for tile in tiles)),
            max(picture.size[0], *(tile.x[-1] for tile in tiles)),
            max(picture.size[1], *(tile.y[-1] for tile in tiles)),
        )
        square = min(float(np.diff(lines).min()) for tile in tiles for lines in (tile.x, tile.y))
        scale = max(SIDE / max(area[2] - area[0], area[3] - area[1]), smallest / square)
        return cls(image_map, picture, _panels(tiles), area, scale)

    @property
    def width(self) -> float:
        """How wide the figure is to be drawn, in pixels on the screen."""
        return self.scale * (self.area[2] - self.area[0]) * len(self.panels) / (1 - GAP * (len(self.panels) - 1))

    @property
    def height(self) -> float:
        """How high the figure is to be drawn, in pixels on the screen."""
        return self.scale * (self.area[3] - self.area[1])

    def figure(self, values: Mapping[int, float], texts: Mapping[int, str]) -> go.Figure:
        """The picture, each token's square coloured by its value if it has one, and its text shown on hover."""
        figure = make_subplots(1, len(self.panels), horizontal_spacing=GAP)
        under = {"source": embedded(self.picture), "sizing": "stretch", "layer": "below", "x": 0, "y": 0}
        clear = {"colorscale": ["rgba(0, 0, 0, 0)"] * 2, "showscale": False}
        look = {"hoverinfo": "text", **({"coloraxis": "coloraxis"} if values else clear)}
        # Without any value a square still needs one: plotly shows no text over a table that is empty.
        heats = values or dict.fromkeys(self.image_map.positions, 0.0)
        for number, tiles in enumerate(self.panels, 1):
            place = {"row": 1, "col": number}
            figure.add_layout_image(sizex=self.picture.size[0], sizey=self.picture.size[1], **under, **place)
            for tile in tiles:
                heat = [[heats.get(at, np.nan) for at in row] for row in tile.positions.tolist()]
                said = [[self._said(at, texts.get(at)) for at in row] for row in tile.positions.tolist()]
                figure.add_heatmap(x=tile.x, y=tile.y, z=heat, hovertext=said, **look, **place)
        left, top, right, bottom = self.area
        bare = {"showgrid": False, "zeroline": False, "showline": False, "showticklabels": False, "constrain": "domain"}
        figure.update_xaxes(range=[left, right], **bare)
        figure.update_yaxes(range=[bottom, top], **bare)
        for axis in figure.select_yaxes():
            axis.scaleanchor = axis.anchor  # a pixel stays a square
        return figure

    def _said(self, position: int, text: str | None) -> str:
        cell = self.image_map.cell(position) if position >= 0 else None
        if cell is None:
            return ""
        tiled = f"tile {cell[0]}, " if sum(map(len, self.panels)) > 1 else ""
        return f"{COUNTED_BY[self.image_map.of]} {position}<br>{tiled}row {cell[1]}, column {cell[2]}" + (
            f"<br>{text}" if text else ""
        )


def _tiles(image_map: ImageMap) -> list[Tile]:
    """The grids of an image's tokens; tokens that stand for no place are in none."""
    cells: dict[int, dict[tuple[int, int], int]] = {}
    for position in image_map.positions:
        cell = image_map.cell(position)
        if cell is not None:
            cells.setdefault(cell[0], {})[cell[1:]] = position
    return [_tile(image_map, cells[number]) for number in sorted(cells)]


def _tile(image_map: ImageMap, cells: Mapping[tuple[int, int], int]) -> Tile:
    rows, columns = ({cell[axis] for cell in cells} for axis in (0, 1))
    positions = np.full((max(rows) - min(rows) + 1, max(columns) - min(columns) + 1), -1)
    x, y = np.full(positions.shape[1] + 1, np.nan), np.full(positions.shape[0] + 1, np.nan)
    for (row, column), position in cells.items():
        down, right = row - min(rows), column - min(columns)
        positions[down, right] = position
        x[right], y[down], x[right + 1], y[down + 1] = image_map.box(position) or (np.nan,) * 4
    return Tile(x.tolist(), y.tolist(), positions)


def _panels(tiles: list[Tile]) -> list[list[Tile]]:
    panels: list[list[Tile]] = []
    for tile in tiles:
        free = [panel for panel in panels if not any(tile.overlaps(other) for other in panel)]
        if free:
            free[0].append(tile)
        else:
            panels.append([tile])
    return panels


def embedded(picture: Image.Image) -> str:
    """The picture as a PNG inside the figure; small ones enlarged without smoothing, large ones reduced."""
    picture, longer = picture.convert("RGB"), max(picture.size)
    if longer > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    elif longer < SMALL:
        times = LARGEST // longer
        picture = picture.resize((picture.size[0] * times, picture.size[1] * times), Image.Resampling.NEAREST)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
