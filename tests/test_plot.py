"""Figures hold the numbers they were given, each in its place; what cannot be drawn is refused with a sentence."""

import base64
import re
from collections.abc import Callable, Iterator
from inspect import isfunction
from io import BytesIO
from typing import Any

import jaxtyping
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mechvlm import plot
from mechvlm.imagemap import Grid, ImageMap, Tile, View, placed
from mechvlm.plot.look import tick_step
from mechvlm.prompt import Prompt

SPANS = ["bos", "image", "<last>"]


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def table(*shape: int, dims: tuple[str, ...] = ("layer", "head"), low: float = 0.0) -> xr.DataArray:
    """Numbers from `low` to 1, all different."""
    numbers = np.linspace(low, 1, int(np.prod(shape))).reshape(shape)
    return xr.DataArray(numbers, dims=dims, name="mass", attrs={"long_name": "share of attention"})


def shares() -> xr.DataArray:
    return table(4, 3, 2, dims=("layer", "span", "picture")).assign_coords(
        layer=range(4), span=SPANS, picture=["real", "null"]
    )


def one_tile(
    positions: range, rows: int, columns: int, size: tuple[int, int], view: View, token: tuple[int, int]
) -> ImageMap:
    places = tuple((0, row, column) for row in range(rows) for column in range(columns))
    return placed(Grid(size, (Tile(rows, columns, view, token),), places, len(places), (1, len(places))), positions)


def image_map(rows: int = 2, columns: int = 3, view: Any = (0.0, 0.0, 1.0, 1.0), size: Any = (30, 20)) -> ImageMap:
    return one_tile(range(5, 5 + rows * columns), rows, columns, size, view, (10, 10))


def picture(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_about(*images: ImageMap, pictures: bool = True) -> Prompt:
    everywhere = [position for one in images for position in one.positions]
    return Prompt(
        words="Is there a dog?",
        text="",
        encoding={},
        tokens=[str(position) for position in range(max(everywhere) + 2)],
        bos=[0],
        prefix=list(range(1, everywhere[0])),
        image=everywhere,
        question=[],
        last=[max(everywhere) + 1],
        images=list(images),
        pictures=[picture(*one.size) for one in images] if pictures else [],
    )


def points() -> xr.DataArray:
    """A value for each channel of the 20 x 30 pixels that `image_map` is of."""
    values = np.arange(3.0 * 20 * 30).reshape(1, 3, 20, 30) - 700
    where = {"image_of": ("square", [0]), "tile_of": ("square", [0])}
    return xr.DataArray(values, dims=["square", "channel", "y", "x"], coords=where, name="pixel_attribution")


def lens(positions: list[int], words: int = 2) -> xr.Dataset:
    token = np.array(
        [[[f"w{layer}{at}{rank}" for rank in range(words)] for at in positions] for layer in (0, 3)], object
    )
    probability = np.linspace(1, 0.1, token.size).reshape(token.shape)
    axes = ("layer", "position", "rank")
    coords = {"layer": [0, 3], "position": positions, "rank": list(range(words))}
    return xr.Dataset({"token": (axes, token), "probability": (axes, probability)}, coords=coords)


# Charts


def test_lines_draws_every_value() -> None:
    array = shares()
    figure = plot.lines(array, "layer", colour="span", dash="picture", title="A title", caption="A sentence.")
    assert [trace.name for trace in figure.data] == [
        "bos, real",
        "bos, null",
        "image, real",
        "image, null",
        "&lt;last&gt;, real",
        "&lt;last&gt;, null",
    ]
    np.testing.assert_array_equal(figure.data[3].y, array.sel(span="image", picture="null"))
    assert [trace.line.dash for trace in figure.data[:2]] == ["solid", "dash"]
    assert figure.data[0].line.color == figure.data[1].line.color != figure.data[2].line.color
    assert figure.data[0].hovertext[2] == "span bos<br>picture real<br>layer 2<br><b>share of attention 0.5217</b>"
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]
    assert (figure.layout.title.text, figure.layout.annotations[0].text) == ("A title", "A sentence.")
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("layer", "share of attention")


def test_lines_draws_bands_behind() -> None:
    array = shares().isel(picture=0)
    figure = plot.lines(array, "layer", colour="span", band=((array - 0.1).T, array + 0.1))
    lower, upper, line = figure.data[3:6]
    np.testing.assert_array_equal(lower.y, array[:, 1] - 0.1)
    np.testing.assert_array_equal(upper.y, array[:, 1] + 0.1)
    assert (lower.fill, upper.fill, line.line.color, upper.fillcolor) == (
        "none",
        "tonexty",
        "#D55E00",
        "rgba(213, 94, 0, 0.18)",
    )


def test_one_line_needs_no_legend() -> None:
    figure = plot.lines(table(3, dims=("amount",)).assign_coords(amount=[-1.5, 0.0, 2.0]), "amount")
    assert (len(figure.data), figure.layout.showlegend, list(figure.data[0].x)) == (1, False, [-1.5, 0.0, 2.0])


def test_many_lines_get_many_colours() -> None:
    figure = plot.lines(table(5, 30, dims=("position", "layer")), "position", colour="layer")
    assert len({trace.line.color for trace in figure.data}) == 30


def test_bars() -> None:
    array = shares().isel(layer=0)
    figure = plot.bars(array, "span", colour="picture", band=(array - 0.1, array + 0.2))
    assert [trace.name for trace in figure.data] == ["real", "null"]
    np.testing.assert_array_equal(figure.data[1].y, array.sel(picture="null"))
    np.testing.assert_allclose(figure.data[1].error_y.array, 0.2)
    np.testing.assert_allclose(figure.data[1].error_y.arrayminus, 0.1)
    assert list(figure.layout.xaxis.ticktext) == ["bos", "image", "&lt;last&gt;"]
    assert plot.bars(array.isel(picture=0), "span").data[0].error_y.visible is False


def test_heatmap_goes_down_and_right() -> None:
    array = table(3, 4)
    figure = plot.heatmap(array)
    np.testing.assert_array_equal(figure.data[0].z, array)
    assert figure.layout.yaxis.autorange == "reversed"
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("layer", "head")
    assert figure.data[0].hovertext[2][3] == "layer 2<br>head 3<br><b>share of attention 1</b>"


@pytest.mark.parametrize("low, limits", [(-0.5, (-1, 1)), (0.25, (0.25, 1)), (1.0, (1, 2))])
def test_colours_meet_at_zero(low: float, limits: tuple[float, float]) -> None:
    axis = plot.heatmap(table(3, 4, low=low)).layout.coloraxis
    assert (axis.cmin, axis.cmax) == limits
    assert (axis.colorscale[-1][1] == plot.heatmap(table(3, 4, low=-1)).layout.coloraxis.colorscale[-1][1]) == (low < 0)


def test_limits_are_kept() -> None:
    axis = plot.heatmap(table(3, 4), limits=(0, 2)).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 2)


def test_what_is_no_number_stays_open() -> None:
    array = table(2, 2, low=0.25).where([[True, False], [True, True]])
    array[1, 0] = -np.inf
    figure = plot.heatmap(array)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.25, 1)
    assert figure.data[0].hovertext[0][1].endswith("nan</b>")


@pytest.mark.parametrize("facet", [None, "picture"])
def test_facets_share_the_colours(facet: str | None) -> None:
    array = table(4, 5, 2, dims=("layer", "head", "picture")).assign_coords(picture=["real", "null"])
    figure = plot.heatmap(array, facet=facet)
    np.testing.assert_array_equal(figure.data[1].z, array[..., 1])
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis"] * 2
    assert [note.text for note in figure.layout.annotations] == ["picture: real", "picture: null"]
    assert figure.data[1].hovertext[0][0].startswith("picture null<br>layer 0<br>head 0")


@given(st.integers(1, 2000), st.integers(1, 40))
def test_ticks_are_not_too_many(count: int, most: int) -> None:
    step = tick_step(count, most)
    assert count <= most * step
    assert step == 1 or count > most * step / 2.5  # and no fewer than need be


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: plot.lines(table(2, 3), "layers", colour="head"),
            "there is no dim 'layers' to draw; the array has layer, head.",
        ),
        (
            lambda: plot.lines(shares(), "layer", colour="span"),
            "lines would draw layer, span, and the array also has picture; choose or average first, like "
            "array.mean(['picture']).",
        ),
        (
            lambda: plot.lines(table(2, 3), "layer", colour="layer"),
            "each dim can be drawn once, and lines was asked for layer, layer.",
        ),
        (
            lambda: plot.lines(table(2, 5), "layer", dash="head"),
            "'head' has 5 values, and there are 4 dashes; use colour='head'.",
        ),
        (
            lambda: plot.lines(table(4, dims=("layer",)), "layer", band=(table(3, dims=("layer",)),) * 2),
            "a bound of the band has sizes {'layer': 3}, and the array {'layer': 4}.",
        ),
        (
            lambda: plot.bars(table(2, dims=("answer",)).astype(str), "answer"),
            "bars draws numbers, and the array holds <U32.",
        ),
        (
            lambda: plot.heatmap(table(2, 2) * np.nan),
            "there is nothing to draw: of the array's 4 values none is a finite number.",
        ),
        (
            lambda: plot.heatmap(table(0, 2)),
            "there is nothing to draw: of the array's 0 values none is a finite number.",
        ),
        (
            lambda: plot.heatmap(table(4, 5, 6, dims=("layer", "head", "example"))),
            "heatmap draws two dims, and a third as facet=; the array has layer, head, example.",
        ),
        (
            lambda: plot.heatmap(table(2, 2), facet="head"),
            "heatmap draws two dims, and a third as facet=; the array has layer, head, and the facet is head.",
        ),
        (
            lambda: plot.heatmap(table(4, 5, 6, dims=("layer", "head", "example")), facet="head"),
            "'head' has 5 values, and at most 3 tables stand side by side.",
        ),
        (
            lambda: plot.heatmap(table(2, 2), limits=(1, 1)),
            "limits=(1, 1) are not a lower and a higher number, like (0, 1).",
        ),
    ],
)
def test_what_no_chart_can_show(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.usefixtures("untyped")
def test_a_dataset_is_not_one_array() -> None:
    draw: dict[str, Callable[[], object]] = {
        "lines": lambda: plot.lines(lens([1]), "layer"),  # type: ignore[arg-type]
        "heatmap": lambda: plot.heatmap(lens([1])),  # type: ignore[arg-type]
        "over_image": lambda: plot.over_image(lens([1]), image_map(), picture()),  # type: ignore[arg-type]
        "pixels_over_image": lambda: plot.pixels_over_image(lens([1]), image_map(), picture()),  # type: ignore[arg-type]
    }
    for name, make in draw.items():
        message = f"^{name} draws a DataArray, not a Dataset; choose a variable, like result\\.mass\\.$"
        with pytest.raises(TypeError, match=message):
            make()


# On the picture


def drawn_at(figure: Any, x: float, y: float) -> float:
    """The value of the square that a point of the picture lies in."""
    heat = figure.data[0]
    return float(heat.z[np.searchsorted(heat.y, y) - 1][np.searchsorted(heat.x, x) - 1])


@settings(max_examples=20)  # a figure takes a twentieth of a second
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(0.3, 3), st.floats(0.3, 3)),
)
def test_each_value_lies_where_its_token_looks(
    rows: int, columns: int, view: tuple[float, float, float, float]
) -> None:
    where = image_map(rows, columns, view)
    values = xr.DataArray(np.arange(1.0, rows * columns + 3), dims="position").assign_coords(
        position=[*reversed(where.positions), 0, 999]
    )
    figure = plot.over_image(values, where, picture())
    for position in where.positions:
        left, top, right, bottom = where.box(position) or (np.nan,) * 4
        assert drawn_at(figure, (left + right) / 2, (top + bottom) / 2) == values.sel(position=position)
    x, y = figure.layout.xaxis.range, figure.layout.yaxis.range
    assert x[0] <= 0 and x[1] >= 30 and y[1] <= 0 and y[0] >= 20


def test_over_image_agrees_with_heat() -> None:
    where = image_map(view=(-4.0, 3.0, 1.3, 0.7))
    values = [0.5, 1, 2, 3, 4, 5]
    figure, heat = plot.over_image(values, where, picture()), where.heat(values)
    for y, x in np.argwhere(np.isfinite(heat)):
        assert drawn_at(figure, x + 0.5, y + 0.5) == heat[y, x]


def test_each_pixel_lies_where_its_tile_looks() -> None:
    """Half as many pixels as the picture has, of its right half only."""
    here = image_map(view=(15.0, 0.0, 2.0, 2.0))
    figure = plot.pixels_over_image(points(), here, picture(), limits=(-9, 9))
    drawn = np.array(figure.data[0].z, dtype=float)
    assert drawn.shape == (20, 30)
    assert np.isnan(drawn[:, :15]).all()
    expected = points().sum("channel").values[0][:10, :8]
    assert np.array_equal(drawn[::2, 15::2], expected)
    assert np.array_equal(drawn[1::2, 16::2], expected[:, :7])
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-9, 9)


def test_finer_tiles_are_drawn_over_coarser_ones() -> None:
    whole, part = Tile(1, 1, (0.0, 0.0, 1.0, 1.0), (20, 30)), Tile(1, 1, (0.0, 0.0, 0.5, 0.5), (20, 30))
    both = ImageMap((5, 6), ((0, 0, 0), (1, 0, 0)), (part, whole), (30, 20))
    values = xr.concat([points() * 0 + 1, points() * 0 + 2], "square").assign_coords(tile_of=("square", [0, 1]))
    drawn = np.array(plot.pixels_over_image(values, both, picture()).data[0].z, dtype=float)
    assert (drawn[:10, :15] == 3).all()
    assert (drawn[10:] == 6).all()
    assert (np.array(plot.pixels_over_image(values, both, picture(), tile=1).data[0].z, dtype=float) == 6).all()


def test_the_picture_is_embedded_pixel_by_pixel() -> None:
    layer = plot.over_image(range(6), image_map(), picture()).layout.images[0]
    with Image.open(BytesIO(base64.b64decode(layer.source.removeprefix("data:image/png;base64,")))) as found:
        assert found.size == (1200, 800)
        assert found.resize((30, 20), Image.Resampling.NEAREST) == picture()
    assert (layer.x, layer.y, layer.sizex, layer.sizey, layer.sizing, layer.layer) == (0, 0, 30, 20, "stretch", "below")


def test_large_pictures_are_embedded_smaller() -> None:
    large = Image.new("RGB", (3000, 1500))
    figure = plot.over_image([1.0, 2.0], image_map(1, 2, (0.0, 0.0, 150.0, 150.0), large.size), large)
    with Image.open(BytesIO(base64.b64decode(figure.layout.images[0].source.split(",")[1]))) as found:
        assert found.size == (1200, 600)
    assert large.size == (3000, 1500)


def test_a_token_without_value_stays_clear() -> None:
    values = xr.DataArray([1.0, np.nan], dims="position", coords={"position": [5, 6]}, name="attention")
    heat = plot.over_image(values, image_map(), picture()).data[0]
    assert heat.z[0][0] == 1 and np.isnan(np.array(heat.z, float)).sum() == 5
    assert heat.hovertext[0][0] == "position 5<br>row 0, column 0<br><b>attention 1</b>"
    assert heat.hovertext[1][2] == "position 10<br>row 1, column 2"


def test_tokens_over_image_writes_the_likeliest_words() -> None:
    prompt = prompt_about(image_map())
    readings = lens([0, *prompt.image, 99])
    figure = plot.tokens_over_image(readings, prompt, layer=3)
    heat, words = figure.data
    assert (words.x[0], words.y[0], words.text[0]) == (5, 5, "w350")
    assert (words.x[5], words.y[5], words.text[5]) == (25, 15, "w3100")
    likeliest = readings.probability.sel(layer=3, position=prompt.image, rank=0)
    np.testing.assert_array_equal(np.ravel(heat.z), likeliest)
    first, second = readings.probability.sel(layer=3, position=5).values
    ranked = f"1. <b>w350</b> {first:.3f}<br>2. <b>w351</b> {second:.3f}"
    assert heat.hovertext[0][0] == f"position 5<br>row 0, column 0<br>{ranked}"
    assert figure.layout.title.text == "Logit lens after layer 3"


@pytest.mark.parametrize(
    "token, shown",
    [
        ("\u2581dog", "dog"),
        ("\u0120dog", "dog"),
        ("<s>", "&lt;s&gt;"),
        ('"', '"'),
        ("\n", "\u23ce"),
        ("<0x0A>", "\u23ce"),
        ("\u2581", "\u2423"),
        ("", "\u2205"),
        ("extraordinarily", "extraordin<br>arily"),
        ("x" * 30, "x" * 10 + "<br>" + "x" * 9 + "\u2026"),
    ],
)
def test_words_fit_and_are_seen(token: str, shown: str) -> None:
    prompt = prompt_about(image_map(6, 6, size=(60, 60)))
    readings = lens(prompt.image)
    readings["token"][:] = token
    assert plot.tokens_over_image(readings, prompt, layer=0).data[1].text[0] == shown


def test_token_grid_numbers_the_squares() -> None:
    figure = plot.token_grid(
        prompt_about(image_map(), one_tile(range(20, 24), 2, 2, (8, 8), (0.0, 0.0, 1.0, 1.0), (4, 4)))
    )
    assert figure.data[0].hovertext[1][2] == "position 10<br>row 1, column 2"
    assert list(figure.layout.xaxis.tickvals) == [5, 15, 25]
    assert figure.layout.yaxis.scaleanchor == "x"
    assert len(figure.data) == 3


def test_overlapping_squares_get_a_panel_each() -> None:
    """An overview of one token and two tiles of two tokens each, which together cover the same picture."""
    whole = Tile(1, 1, (0.0, 0.0, 1.0, 1.0), (20, 20))
    left, right = (Tile(2, 1, (x, 0.0, 1.0, 1.0), (10, 10)) for x in (0.0, 10.0))
    places = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0), None)
    tiled = placed(Grid((20, 20), (whole, left, right), places, 6, (3, 2)), range(1, 7))
    assert (tiled.positions, tiled.separators) == ((1, 2, 3, 4, 5), (6,))
    values = xr.DataArray([1, 2, 3, 4, 5, 6], dims="position", coords={"position": range(1, 7)})
    figure = plot.over_image(values, tiled, picture(20, 20))
    assert [np.ravel(heat.z).tolist() for heat in figure.data] == [[1], [2, 3], [4, 5]]
    assert [heat.xaxis for heat in figure.data] == ["x", "x2", "x2"]
    assert figure.data[2].hovertext[1][0] == "position 5<br>tile 2, row 1, column 0<br><b>value 5</b>"
    assert len(figure.layout.images) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: plot.over_image([1.0, 2.0], image_map(), picture()),
            "the image has 6 tokens, and values of shape (2,) were given; give one each, or a DataArray whose "
            "dim position says which is whose.",
        ),
        (
            lambda: plot.over_image(table(2, 6, dims=("layer", "position")), image_map(), picture()),
            "over_image draws one dim, position, and the array has layer, position; choose or average the others "
            "first.",
        ),
        (
            lambda: plot.over_image(
                table(2, dims=("position",)).assign_coords(position=[0, 1]), image_map(), picture()
            ),
            "there is nothing to draw: no finite value belongs to the image's tokens, which are positions 5 to 10.",
        ),
        (
            lambda: plot.pixels_over_image(points().isel(y=0), image_map(), picture()),
            "pixels_over_image draws square, channel, y and x with the coordinates image_of and tile_of, and the array "
            "has square, channel, x; give an experiment's pixel_attribution.",
        ),
        (
            lambda: plot.pixels_over_image(points(), image_map(), picture(20, 30)),
            "the picture is 20 x 30 pixels, and the model was shown one of 30 x 20; give the picture that the prompt "
            "was made with.",
        ),
        (
            lambda: plot.pixels_over_image(points(), image_map(), picture(), image=1),
            "the values have no square of image 1.",
        ),
        (
            lambda: plot.over_image(range(6), image_map(), picture(20, 30)),
            "the picture is 20 x 30 pixels, and the tokens look at one of 30 x 20; give the picture that the prompt "
            "was made with.",
        ),
        (
            lambda: plot.tokens_over_image(lens([5]), prompt_about(image_map()), layer=1),
            "layer 1 is not in the lens; its layers are 0, 3.",
        ),
        (
            lambda: plot.tokens_over_image(lens([1, 2]), prompt_about(image_map()), layer=0),
            "the lens has no position of this image; make it with logit_lens(..., positions=prompt.image).",
        ),
        (
            lambda: plot.tokens_over_image(xr.Dataset({"mass": 1}), prompt_about(image_map()), layer=0),
            "a lens has variables token and probability, as logit_lens makes them, and this dataset has mass.",
        ),
        (
            lambda: plot.token_grid(prompt_about(image_map(), pictures=False)),
            "the prompt has no picture; make it with vlm.prompt(image, text), not from a ready encoding.",
        ),
        (
            lambda: plot.token_grid(prompt_about(image_map()), image=1),
            "there is no image 1; the prompt's are numbered from 0 to 0.",
        ),
    ],
)
def test_what_no_picture_can_show(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.usefixtures("untyped")
def test_a_map_and_a_picture_cannot_change_places() -> None:
    draw: dict[str, Callable[[Any, Any], object]] = {
        "over_image": lambda first, second: plot.over_image(range(6), first, second),
        "pixels_over_image": lambda first, second: plot.pixels_over_image(points(), first, second),
    }
    for name, make in draw.items():
        with pytest.raises(TypeError) as caught:
            make(picture(), image_map())
        assert str(caught.value) == (
            f"{name} takes values, then an ImageMap, then a picture, and was given Image and ImageMap for these; write "
            f"{name}(values, prompt.images[0], prompt.pictures[0])."
        )


# All figures


def test_help_lists_every_figure() -> None:
    assert all(f"`{name}`" in (plot.__doc__ or "") and callable(vars(plot)[name]) for name in plot.__all__)
    assert not {name for name, one in vars(plot).items() if isfunction(one)} - set(plot.__all__)


def every_figure() -> dict[str, Any]:
    said: dict[str, Any] = {"title": "A title", "caption": "A long sentence about what is seen. " * 10}
    prompt = prompt_about(image_map())
    return {
        "lines": plot.lines(shares()[..., 0], "layer", colour="span", **said),
        "bars": plot.bars(shares()[0], "span", colour="picture", **said),
        "heatmap": plot.heatmap(table(30, 40), **said),
        "over_image": plot.over_image(range(6), image_map(), picture(), **said),
        "tokens_over_image": plot.tokens_over_image(lens(prompt.image), prompt, layer=0, **said),
        "token_grid": plot.token_grid(prompt, **said),
    }


def test_every_figure_has_title_caption_and_room_for_them() -> None:
    for name, figure in every_figure().items():
        caption = figure.layout.annotations[-1]
        lines = caption.text.split("<br>")
        assert figure.layout.title.text == "A title", name
        assert " ".join(lines) == "A long sentence about what is seen. " * 9 + "A long sentence about what is seen."
        assert figure.layout.margin.b >= 17 * len(lines) - caption.yshift - 8, name
        assert max(map(len, lines)) * 6.2 <= figure.layout.width, name
        assert figure.to_json(), name


def test_long_titles_and_labels_are_broken() -> None:
    array = table(2, 3).assign_attrs(long_name="effect of ablation", units="change of logit_difference('yes', 'no')")
    figure = plot.heatmap(array, title="What each head adds to the answer, yes or no, of this model")
    assert figure.layout.title.text == "What each head adds to the answer, yes or no, of<br>this model"
    broken = "effect of ablation<br>(change of<br>logit_difference('yes',<br>'no'))"
    assert figure.layout.coloraxis.colorbar.title.text == broken
    assert "<br>" not in plot.lines(array, "head", colour="layer").layout.xaxis.title.text


def test_figures_leave_no_trace_in_what_they_are_given() -> None:
    array, seen = shares()[..., 0], picture()
    before = array.copy(deep=True), seen.tobytes()
    plot.lines(array, "layer", colour="span")
    plot.over_image(range(6), image_map(), seen)
    assert array.identical(before[0]) and seen.tobytes() == before[1]
