"""Null images: pictures that tell nothing, or something else, in place of a real one.

A null image is a function from a picture to a picture of the same size, so that the prompt keeps its positions.
`black`, `grey`, `white` and `mean` are such functions; `colour`, `noise`, `diffusion`, `blur`, `shuffle` and `swap`
make one.

Rule this module guards: everything happens to the picture, before any processor; what the processor then does (resize,
crop, normalise) it does to the null image too. A null image is the same at every call, and its `__name__` says how it
was made. Pictures come in through `to_picture`, of `mechvlm.pixels`.

>>> black(Image.new("RGB", (4, 3), "red")).getpixel((0, 0)), blur(2).__name__
((0, 0, 0), 'blur(sigma=2)')
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from mechvlm.pixels import from_levels, to_picture

NullImage = Callable[[Image.Image], Image.Image]
"""A function from a picture to a picture of the same size."""

NOISE_MEAN, NOISE_STD = 127.5, 64.0  # of 255; CLIP's own deviations are 67 to 70
STEPS = 1000
WIDEST = 1_000_000  # pixels; Pillow's own limit is higher, and less round
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def black(image: Image.Image) -> Image.Image:
    """A black picture of the same size."""
    return _filled(image, (0, 0, 0))


def grey(image: Image.Image) -> Image.Image:
    """A picture of middle grey, 128 of 255, of the same size."""
    return _filled(image, (128, 128, 128))


def white(image: Image.Image) -> Image.Image:
    """A white picture of the same size."""
    return _filled(image, (255, 255, 255))


def mean(image: Image.Image) -> Image.Image:
    """The picture's own mean colour everywhere: its overall colour stays, and everything in it goes.

    This is not what a processor takes for zero. For that, with `pixel_values` 0 to within half a level of 255, pass the
    processor's mean: `colour([255 * share for share in processor.image_processor.image_mean])`.
    """
    return _filled(image, np.asarray(_given(image)).reshape(-1, 3).mean(0))


def colour(rgb: Sequence[int | float]) -> NullImage:
    """A null image of one colour: red, green and blue from 0 to 255, rounded to whole numbers.

    Raises:
        ValueError: for anything but three numbers from 0 to 255.

    Example:
        >>> colour((122.8, 116.7, 104.1)).__name__
        'colour((123, 117, 104))'
    """
    if len(rgb) != 3 or not all(0 <= value <= 255 for value in rgb):
        raise ValueError(f"{rgb} is not a colour; give red, green and blue from 0 to 255, like (123, 117, 104).")
    rounded = tuple(round(value) for value in rgb)
    return _named(f"colour({rounded})", lambda image: _filled(image, rounded))


def noise(seed: int = 0) -> NullImage:
    """A null image of noise: every pixel and channel independently normal, mean 127.5, deviation 64, clipped.

    Papers draw such noise on `pixel_values`, after the processor. Here it is drawn on the picture, so a processor that
    makes the picture smaller weakens it. Pictures of one size get the same noise from the same seed.
    """
    _check_seed(seed)

    def noisy(image: Image.Image) -> Image.Image:
        width, height = _given(image).size
        return from_levels(np.random.default_rng(seed).normal(NOISE_MEAN, NOISE_STD, (height, width, 3)))

    return _named(f"noise(seed={seed})", noisy)


def diffusion(t: int = 500, seed: int = 0) -> NullImage:
    """The picture after t steps of forward diffusion, which drowns it in noise little by little.

    `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`, where `a_t` is the product of `1 - beta` up to step t and `beta` is
    `sigmoid(-6 ... 6) * (5e-3 - 1e-5) + 1e-5` in the source's 1000 steps. At t=500 the picture's weight is 0.86 and the
    noise's 0.51; at t=999 they are 0.29 and 0.96.

    The source adds the noise to `pixel_values`, after the processor. Here pixels are normalised with CLIP's mean and
    deviation (those of the source's models), mixed, and made a picture again. Three things differ: the result is
    clipped to 0..255 and rounded; the noise is drawn at the picture's own size, so a processor that makes it smaller
    weakens it (by half from 640 x 480 pixels to 336; contrasts add theirs behind the processor, by
    `mv.methods.viar.PixelDiffusion`); and to a processor with other constants than CLIP's the noise has another
    strength.

    Args:
        t: the step, from 0 (the picture, all but unchanged) to 999.

    Raises:
        ValueError: for a step outside 0..999.

    Source:
        Leng et al. (2024), "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
        Decoding", section 3.2, and `vcd_add_noise.py` of its code, whose `noise_step` is our t.
    """
    _check_seed(seed)
    kept = diffusion_share(t)

    def diffused(image: Image.Image) -> Image.Image:
        normalised = (np.asarray(_given(image)) / 255 - CLIP_MEAN) / CLIP_STD
        drawn = np.random.default_rng(seed).standard_normal(normalised.shape)
        mixed = math.sqrt(kept) * normalised + math.sqrt(1 - kept) * drawn
        return from_levels((mixed * CLIP_STD + CLIP_MEAN) * 255)

    return _named(f"diffusion(t={t}, seed={seed})", diffused)


def diffusion_share(t: int = 500) -> float:
    """What is left of a picture's variance after t steps of forward diffusion, from 1 down: `a_t` of `diffusion`.

    Raises:
        ValueError: for a step outside 0..999.

    Example:
        >>> round(diffusion_share(500) ** 0.5, 2), round((1 - diffusion_share(500)) ** 0.5, 2)
        (0.86, 0.51)

    Source:
        Leng et al. (2024), section 3.2.
    """
    if not 0 <= t < STEPS or t != int(t):
        raise ValueError(f"diffusion has no step t={t}; steps are whole numbers from 0 to 999, and 500 is the usual.")
    beta = (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, STEPS))) + 1e-5
    return float(np.prod(1 - beta[: int(t) + 1]))


def blur(sigma: int | float) -> NullImage:
    """The picture, blurred: colours and layout stay, and details go.

    Args:
        sigma: standard deviation of the Gaussian, in pixels of the picture; 0 leaves it as it is.

    Raises:
        ValueError: for a negative sigma, or one wider than any picture.
    """
    if not 0 <= sigma <= WIDEST:
        raise ValueError(
            f"sigma={sigma} is no width of a blur; give the standard deviation in pixels, from 0 to {WIDEST}."
        )
    return _named(f"blur(sigma={sigma})", lambda image: _given(image).filter(ImageFilter.GaussianBlur(sigma)))


def shuffle(seed: int = 0, grid: tuple[int, int] = (6, 6)) -> NullImage:
    """The picture cut into equal cells that have changed places: every colour stays, and the layout goes.

    No cell stays where it was. Where the grid does not divide the picture, the few pixels left over at the right and
    at the bottom stay.

    Args:
        grid: rows and columns of cells.

    Raises:
        ValueError: for a grid of fewer than two cells; and, once it meets a picture, for one finer than its pixels.
    """
    _check_seed(seed)
    if len(grid) != 2 or min(grid) < 1 or math.prod(grid) < 2:
        raise ValueError(f"grid={grid} cannot be shuffled; give rows and columns with at least two cells, like (6, 6).")
    rows, columns = grid

    def shuffled(image: Image.Image) -> Image.Image:
        picture = _given(image)
        width, height = picture.size[0] // columns, picture.size[1] // rows
        if not (width and height):
            raise ValueError(
                f"a grid of {rows} rows and {columns} columns is too fine for a picture {picture.size[1]} pixels high "
                f"and {picture.size[0]} wide; each cell needs at least one pixel."
            )
        # One cycle through all cells in random order: unlike a plain permutation it leaves none in its place.
        cycle = np.random.default_rng(seed).permutation(rows * columns)
        result = picture.copy()
        for start, end in zip(cycle.tolist(), np.roll(cycle, 1).tolist(), strict=True):
            left, top = start % columns * width, start // columns * height
            cell = picture.crop((left, top, left + width, top + height))
            result.paste(cell, (end % columns * width, end // columns * height))
        return result

    return _named(f"shuffle(seed={seed}, grid={grid})", shuffled)


def swap(image: str | Path | bytes | np.ndarray | Image.Image) -> NullImage:
    """Another picture in place of the real one, stretched to its size.

    The name holds the other picture's size and the beginning of the SHA-256 of its pixels.

    Example:
        >>> real.with_image(swap("other.png"))
    """
    other = to_picture(image)
    name = f"swap({other.size[0]} x {other.size[1]} picture {hashlib.sha256(other.tobytes()).hexdigest()[:8]})"
    return _named(name, lambda image: other.resize(_given(image).size, Image.Resampling.LANCZOS))


def _given(image: Image.Image) -> Image.Image:
    """The picture that a null image is made from, upright and RGB."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"a null image is made from a PIL image, not from {type(image).__name__}; use to_picture.")
    return to_picture(image)


def _filled(image: Image.Image, rgb: Sequence[int] | np.ndarray) -> Image.Image:
    red, green, blue = (round(float(value)) for value in rgb)
    return Image.new("RGB", _given(image).size, (red, green, blue))


def _check_seed(seed: int) -> None:
    if seed < 0 or seed != int(seed):
        raise ValueError(f"seed={seed} is not a seed; give a whole number from 0.")


def _named(name: str, function: NullImage) -> NullImage:
    function.__name__ = function.__qualname__ = name
    return function
