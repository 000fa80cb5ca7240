"""Null images keep the size and lose what they say they lose; every door for a picture opens or says why not."""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from mechvlm import images

pictures = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda size: arrays(np.uint8, (*size, 3)).map(Image.fromarray)
)
seeds = st.integers(0, 2**32)


def some_picture(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def saved(image: Image.Image, format: str = "PNG", **more: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Null images

CONSTANT = {images.black: 0, images.grey: 128, images.white: 255}


def nulls() -> list[images.NullImage]:
    return [
        *CONSTANT,
        images.mean,
        images.colour((1, 2, 3)),
        images.noise(1),
        images.diffusion(300),
        images.blur(2),
        images.shuffle(1, (1, 2)),
        images.swap(Image.new("RGB", (30, 20), "red")),
    ]


@given(pictures)
def test_null_images_keep_the_size_and_repeat_themselves(picture: Image.Image) -> None:
    before = picture.tobytes()
    for null in nulls():
        if null.__name__.startswith("shuffle") and picture.size[0] < 2:
            continue
        made = null(picture)
        assert (made.size, made.mode) == (picture.size, "RGB"), null.__name__
        assert made.tobytes() == null(picture).tobytes(), null.__name__
    assert picture.tobytes() == before


def test_names_say_how_it_was_made() -> None:
    assert [null.__name__ for null in nulls()] == [
        "black",
        "grey",
        "white",
        "mean",
        "colour((1, 2, 3))",
        "noise(seed=1)",
        "diffusion(t=300, seed=0)",
        "blur(sigma=2)",
        "shuffle(seed=1, grid=(1, 2))",
        "swap(30 x 20 picture 4d860a62)",
    ]


def test_constant_pictures() -> None:
    for null, level in CONSTANT.items():
        assert (pixels(null(some_picture())) == level).all()
    assert (pixels(images.colour((10.4, 0, 255))(some_picture())) == (10, 0, 255)).all()


@given(pictures)
def test_mean_keeps_the_mean(picture: Image.Image) -> None:
    made = pixels(images.mean(picture))
    assert np.ptp(made, axis=(0, 1)).max() == 0
    assert np.abs(made[0, 0] - pixels(picture).mean((0, 1))).max() <= 0.5


def test_the_processors_mean_becomes_zero() -> None:
    """What the docstring of `mean` promises: within half a level of 255."""
    share = np.array([0.48145466, 0.4578275, 0.40821073])
    made = pixels(images.colour([255 * one for one in share.tolist()])(some_picture()))
    assert np.abs(made / 255 - share).max() <= 0.5 / 255


def test_noise_is_what_it_says() -> None:
    made = pixels(images.noise(3)(some_picture(300, 300)))
    assert abs(made.mean() - 127.5) < 0.5
    assert 60 < made.std() < 64  # of the 64, clipping takes a little
    assert abs(np.corrcoef(made[..., 0].ravel(), made[..., 1].ravel())[0, 1]) < 0.02
    assert images.noise(4)(some_picture()).tobytes() != images.noise(3)(some_picture()).tobytes()


def source_weights(t: int) -> tuple[float, float]:
    """The weights of picture and noise, written as in the source, in torch."""
    import torch

    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, dim=0)
    return float(kept[t].sqrt()), float((1 - kept[t]).sqrt())


@pytest.mark.parametrize("t", [0, 100, 500])
def test_diffusion_weights_are_the_sources(t: int) -> None:
    """On a picture of two greys far from the clipping, the step's weights can be read off the result."""
    picture = Image.fromarray(np.full((400, 400, 3), [118, 112, 100], np.uint8))
    normalised = lambda image: (pixels(image) / 255 - images.CLIP_MEAN) / images.CLIP_STD  # noqa: E731
    kept, added = source_weights(t)
    made = normalised(images.diffusion(t)(picture))
    np.testing.assert_allclose(made.mean((0, 1)), kept * normalised(picture)[0, 0], atol=0.005)
    np.testing.assert_allclose(made.std((0, 1)), added, atol=0.005)


def test_diffusion_drowns_the_picture_step_by_step() -> None:
    picture = some_picture(60, 60)
    likeness = [
        np.corrcoef(pixels(images.diffusion(t)(picture)).ravel(), pixels(picture).ravel())[0, 1]
        for t in (0, 200, 400, 600, 800, 999)
    ]
    assert likeness[0] > 0.999
    assert likeness == sorted(likeness, reverse=True)


@given(pictures)
def test_blur_of_zero_changes_nothing(picture: Image.Image) -> None:
    assert images.blur(0)(picture).tobytes() == picture.tobytes()


def test_blur_takes_details_and_leaves_the_mean() -> None:
    sharp, soft, softer = (pixels(images.blur(sigma)(some_picture(60, 60))) for sigma in (0, 2, 6))
    assert sharp.std() > 3 * soft.std() > 3 * softer.std()
    assert abs(sharp.mean() - softer.mean()) < 3


@given(pictures, seeds, st.integers(1, 9), st.integers(1, 9))
def test_shuffle_moves_every_cell(picture: Image.Image, seed: int, rows: int, columns: int) -> None:
    width, height = picture.size[0] // columns, picture.size[1] // rows
    if rows * columns < 2 or not (width and height):
        return
    numbers = np.zeros(picture.size[::-1], np.uint8)
    for row in range(rows):
        for column in range(columns):
            numbers[row * height : (row + 1) * height, column * width : (column + 1) * width] = row * columns + column
    made = np.asarray(images.shuffle(seed, (rows, columns))(Image.fromarray(numbers)))[..., 0]
    inside = (slice(0, rows * height), slice(0, columns * width))
    assert (made[inside] != numbers[inside]).all()
    moved = np.asarray(images.shuffle(seed, (rows, columns))(picture)).reshape(-1, 3)
    assert sorted(map(tuple, moved.tolist())) == sorted(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


def test_shuffle_leaves_what_the_grid_does_not_reach() -> None:
    picture = some_picture(32, 21)
    before, after = pixels(picture), pixels(images.shuffle(grid=(4, 5))(picture))
    assert (before[20:] == after[20:]).all()
    assert (before[:, 30:] == after[:, 30:]).all()


def test_swap_stretches_the_other_picture() -> None:
    other = some_picture(7, 5)
    assert images.swap(other)(some_picture(7, 5)).tobytes() == other.tobytes()
    assert images.swap(Image.new("RGB", (3, 9), "red"))(some_picture()).getcolors() == [(600, (255, 0, 0))]


def test_a_null_image_is_upright() -> None:
    assert images.blur(1)(rotated()).size == images.black(rotated()).size == (20, 30)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: images.colour((1, 2)),
            "(1, 2) is not a colour; give red, green and blue from 0 to 255, like (123, 117, 104).",
        ),
        (
            lambda: images.colour((1, 2, 300)),
            "(1, 2, 300) is not a colour; give red, green and blue from 0 to 255, like (123, 117, 104).",
        ),
        (lambda: images.noise(-1), "seed=-1 is not a seed; give a whole number from 0."),
        (
            lambda: images.diffusion(1000),
            "diffusion has no step t=1000; steps are whole numbers from 0 to 999, and 500 is the usual.",
        ),
        (
            lambda: images.diffusion(-1),
            "diffusion has no step t=-1; steps are whole numbers from 0 to 999, and 500 is the usual.",
        ),
        (
            lambda: images.blur(-2),
            "sigma=-2 is no width of a blur; give the standard deviation in pixels, from 0 to 1000000.",
        ),
        (
            lambda: images.blur(float("nan")),
            "sigma=nan is no width of a blur; give the standard deviation in pixels, from 0 to 1000000.",
        ),
        (
            lambda: images.shuffle(grid=(1, 1)),
            "grid=(1, 1) cannot be shuffled; give rows and columns with at least two cells, like (6, 6).",
        ),
        (
            lambda: images.shuffle(grid=(21, 2))(some_picture()),
            "a grid of 21 rows and 2 columns is too fine for a picture 20 pixels high and 30 wide; each cell needs at "
            "least one pixel.",
        ),
    ],
)
def test_what_no_null_image_can_be_made_of(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.usefixtures("untyped")
def test_a_null_image_needs_a_picture() -> None:
    for null in nulls():
        with pytest.raises(TypeError, match=r"^a null image is made from a PIL image, not from str; use to_picture\.$"):
            null("cat.png")  # type: ignore[arg-type]


# to_picture


def rotated() -> Image.Image:
    """A picture of 30 x 20 whose camera was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.open(BytesIO(saved(some_picture(), exif=exif)))


@given(pictures)
def test_a_picture_survives_every_door(picture: Image.Image) -> None:
    array = np.asarray(picture)
    for given_as in (picture, array, array / 255, (array / 255).astype(np.float32), saved(picture)):
        assert images.to_picture(given_as).tobytes() == picture.tobytes()


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    some_picture().save(path)
    assert images.to_picture(path) == images.to_picture(str(path)) == some_picture()


def test_exif_rotation_is_carried_out() -> None:
    made = images.to_picture(rotated())
    assert (made.size, made.getexif().get(0x0112)) == ((20, 30), None)
    assert (pixels(made) == np.rot90(pixels(some_picture()), -1)).all()


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
    assert images.to_picture(clear).getcolors() == [(4, (255, 255, 255))]
    assert np.asarray(images.to_picture(half)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert images.to_picture(saved(palette)).getcolors() == [(4, (0, 0, 255))]
    assert images.to_picture(saved(palette, transparency=1)).getcolors() == [(4, (255, 255, 255))]


def test_other_modes() -> None:
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(images.to_picture(saved(deep)))[..., 0].tolist() == [[0, 1, 255]]
    assert np.asarray(images.to_picture(np.array([[0, 7]], np.uint8))).tolist() == [[[0, 0, 0], [7, 7, 7]]]
    assert images.to_picture(Image.new("1", (1, 1), 1)).getcolors() == [(1, (255, 255, 255))]
    assert images.to_picture(Image.new("CMYK", (1, 1))).getcolors() == [(1, (255, 255, 255))]


def frames(format: str) -> bytes:
    return saved(some_picture(), format, save_all=True, append_images=[Image.new("RGB", (30, 20))])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused_and_one_is_taken(format: str) -> None:
    message = (
        f"the file given as bytes has several frames ({format}); pick one: open it with PIL.Image.open, go to a frame "
        f"with image.seek(0), and give image.copy()."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        images.to_picture(frames(format))
    with Image.open(BytesIO(frames(format))) as image:
        image.seek(1)
        with pytest.raises(ValueError, match="^the picture has several frames"):
            images.to_picture(image)
        assert image.tell() == 1
        image.seek(0)
        assert images.to_picture(image.copy()).size == (30, 20)


def test_a_phones_second_picture_is_left_out() -> None:
    assert images.to_picture(frames("MPO")).size == (30, 20)


@pytest.mark.parametrize(
    "given_as, message",
    [
        (
            "https://example.org/cat.png",
            "'https://example.org/cat.png' is an address, and mechvlm downloads nothing; save the picture and give its "
            "path.",
        ),
        (
            Path("http://example.org"),
            "'http:/example.org' is an address, and mechvlm downloads nothing; save the picture and give its path.",
        ),
        ("no_such.png", "there is no file 'no_such.png'; give the path of one picture."),
        (Path(), "there is no file '.'; give the path of one picture."),
        (b"", "the file given as bytes is empty; give a file that holds a picture."),
        (b"hello", "the file given as bytes is not a picture that Pillow can read; save it as PNG or JPEG."),
        (Image.new("RGB", (0, 5)), "the picture is 0 x 5 pixels; a picture has at least one each way."),
        (
            Image.new("F", (2, 2)),
            "the picture holds 32-bit numbers (mode F), which have no white; give an array of floats, 0 to 1.",
        ),
        (
            np.zeros((3, 8, 9)),
            "an array of shape (3, 8, 9) is not a picture; its shape must be (height, width), (height, width, 3) or "
            "(height, width, 4); move the channels last with array.transpose(1, 2, 0).",
        ),
        (
            np.zeros((0, 8)),
            "an array of shape (0, 8) is not a picture; its shape must be (height, width), (height, width, 3) or "
            "(height, width, 4).",
        ),
        (
            np.zeros((2, 2), int),
            "an array of int64 is not a picture; make it uint8, 0 to 255, or float, 0 to 1.",
        ),
        (
            np.array([[-1.0, 255.0]]),
            "floats of a picture go from 0 to 1, and these from -1 to 255; rescale them.",
        ),
        (
            np.array([[np.nan, 1.0]]),
            "floats of a picture go from 0 to 1, and these from nan to nan; rescale them.",
        ),
    ],
)
def test_what_is_no_picture(given_as: str | Path | bytes | np.ndarray | Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        images.to_picture(given_as)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(saved(some_picture())[:200])
    with pytest.raises(ValueError, match=r"empty\.png' is empty; give a file that holds a picture\.$"):
        images.to_picture(tmp_path / "empty.png")
    message = r"cut\.png' is cut short or damaged \(image file is truncated.*\); save it again\.$"
    with pytest.raises(ValueError, match=message):
        images.to_picture(tmp_path / "cut.png")


@pytest.mark.usefixtures("untyped")
def test_wrong_types() -> None:
    message = r"^list is not a picture; give a path, bytes, a PIL image or a numpy array\.$"
    with pytest.raises(TypeError, match=message):
        images.to_picture([1, 2])  # type: ignore[arg-type]
