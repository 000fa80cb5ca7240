"""The handwritten digits, who may use which of them, and how a scene is painted with them.

The digits are scikit-learn's copy of the UCI set "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0): 1,797 grey images of 8 x 8 pixels. They are split once and for all: 70 % may be trained
on, 10 % serve to watch the training, 20 % are kept for the benchmark. Painting is plain numpy in float64, so that it is
fast enough for training and yields the same bytes everywhere.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mechvlm.demo.world import CELLS, DIGITS, Scene

CELL = 24
SIDE = 3 * CELL
RGB = np.array([[225, 45, 45], [50, 180, 60], [70, 95, 235], [230, 210, 55], [165, 60, 205], [50, 200, 210]], float)
SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "benchmark": (0.8, 1.0)}
FINE, MARGIN = 32, 8  # glyphs are enlarged to FINE pixels and padded by MARGIN, to be sampled from when painting


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  (a second's import, needed only to paint)

    data = load_digits()
    return data.images, data.target


@cache
def glyphs() -> Float[np.ndarray, "glyph y x"]:
    """Every handwritten digit as ink between 0 and 1, enlarged so that it can be turned and bent smoothly."""
    images, _ = _digits()
    small = [Image.fromarray(image.astype(np.float32)) for image in images]
    large = [np.asarray(image.resize((FINE, FINE), Image.Resampling.BICUBIC)) for image in small]
    return np.pad(np.clip(np.stack(large) / 16.0, 0, 1).astype(float), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))


@cache
def pool(split: str) -> tuple[tuple[int, ...], ...]:
    """For each digit, the glyphs that belong to a split: `train`, `validation` or `benchmark`. Splits share none."""
    _, labels = _digits()
    order = np.random.default_rng(1998).permutation(len(labels))
    low, high = (round(share * len(labels)) for share in SPLITS[split])
    chosen = sorted(order[low:high].tolist())
    return tuple(tuple(i for i in chosen if labels[i] == digit) for digit in range(len(DIGITS)))


def paint(
    scenes: Sequence[Scene], rng: np.random.Generator, warp: float = 1.0
) -> UInt8[np.ndarray, "scene y x channel"]:
    """Paints scenes on noisy dark ground, with dull strokes and dots as clutter in some of the empty cells.

    Args:
        warp: how much handwriting is turned, slanted and bent. Training uses 1, since 1,258 glyphs are few; the
            validation and benchmark scenes use 0.5 and stay closer to the handwriting as it was.
    """
    ground = rng.uniform(14, 60, (len(scenes), 1, 1, 1)) + rng.uniform(-8, 8, (len(scenes), 1, 1, 3))
    canvas = np.broadcast_to(ground, (len(scenes), SIDE, SIDE, 3)).copy()
    cells = canvas.reshape(len(scenes), 3, CELL, 3, CELL, 3).transpose(0, 1, 3, 2, 4, 5)  # a view: scene row column y x
    _clutter(cells, scenes, rng)
    _write(cells, scenes, rng, warp)
    canvas += 2.0 * rng.integers(-5, 6, (len(scenes), SIDE, SIDE, 1))
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


def _write(cells: np.ndarray, scenes: Sequence[Scene], rng: np.random.Generator, warp: float) -> None:
    placed = [(number, item) for number, scene in enumerate(scenes) for item in scene.items]
    where = np.array([number for number, _ in placed])
    row, column = np.divmod(np.array([item.cell for _, item in placed]), 3)
    ink = _bent(np.array([item.glyph for _, item in placed]), rng, warp)
    colour = RGB[np.array([item.colour for _, item in placed])]
    colour = (colour + rng.uniform(-18, 18, colour.shape)) * rng.uniform(0.8, 1.08, (len(placed), 1))
    alpha = np.clip(ink * rng.uniform(1.0, 1.5, (len(placed), 1, 1)), 0, 1)[..., None]
    cells[where, row, column] = cells[where, row, column] * (1 - alpha) + colour[:, None, None] * alpha


def _bent(index: np.ndarray, rng: np.random.Generator, warp: float) -> np.ndarray:
    """The ink of glyphs as it falls on a cell, after shift, scale, turn, slant and a gentle wave."""
    amount = (len(index), 1, 1)
    steps = np.arange(CELL) - (CELL - 1) / 2
    y = steps[None, :, None] + rng.uniform(-2, 2, amount)
    x = steps[None, None, :] + rng.uniform(-2, 2, amount)
    turn, slant = rng.uniform(-0.2, 0.2, amount) * warp, rng.uniform(-0.25, 0.25, amount) * warp
    y, x = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn) + slant * y
    phase = rng.uniform(0, 2 * np.pi, (2, *amount))
    y, x = y + 0.8 * warp * np.sin(x / 4 + phase[0]), x + 0.8 * warp * np.sin(y / 4 + phase[1])
    size = rng.uniform(18.5, 21.5, (2, *amount)) * (1 + warp * rng.uniform(-0.06, 0.06, (2, *amount)))
    middle = MARGIN + (FINE - 1) / 2
    return _bilinear(index, middle + y * FINE / size[0], middle + x * FINE / size[1])


def _bilinear(index: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    ink = glyphs()
    limit = ink.shape[-1] - 2
    top, left = np.clip(np.floor(y), 0, limit).astype(int), np.clip(np.floor(x), 0, limit).astype(int)
    down, right = np.clip(y - top, 0, 1), np.clip(x - left, 0, 1)
    i = index[:, None, None]
    upper = ink[i, top, left] * (1 - right) + ink[i, top, left + 1] * right
    lower = ink[i, top + 1, left] * (1 - right) + ink[i, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _clutter(cells: np.ndarray, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Two dull strokes (or dots, when short) in about two empty cells of five."""
    empty = np.ones((len(scenes), CELLS), bool)
    for number, scene in enumerate(scenes):
        empty[number, [item.cell for item in scene.items]] = False
    where, cell = np.nonzero(empty & (rng.random(empty.shape) < 0.4))
    row, column = np.divmod(cell, 3)
    steps = np.arange(CELL, dtype=float)
    for _ in range(2):
        start = rng.uniform(4, CELL - 4, (len(where), 2))
        end = start + rng.uniform(-9, 9, start.shape) * rng.integers(0, 2, (len(where), 1))
        along = end - start
        y, x = steps[None, :, None] - start[:, :1, None], steps[None, None, :] - start[:, 1:, None]
        share = (y * along[:, :1, None] + x * along[:, 1:, None]) / ((along**2).sum(1)[:, None, None] + 1e-9)
        share = np.clip(share, 0, 1)
        distance = np.hypot(y - share * along[:, :1, None], x - share * along[:, 1:, None])
        alpha = np.clip(rng.uniform(1.2, 2.4, (len(where), 1, 1)) - distance, 0, 1)[..., None]
        dull = rng.uniform(80, 150, (len(where), 1)) + rng.uniform(-14, 14, (len(where), 3))
        cells[where, row, column] = cells[where, row, column] * (1 - alpha) + dull[:, None, None] * alpha
