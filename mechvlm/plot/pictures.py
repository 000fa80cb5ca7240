"""Figures on the picture that a prompt asks about: what belongs to an image token is drawn where the token looks.

Rule this module guards: values find their squares by position. One without a square is left out only where it belongs
to a position that is no image token; anything else that does not fit is refused.

>>> token_grid(real).data[0].hovertext[0][0]
'position 3<br>row 0, column 0'
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from PIL import Image

from mechvlm.imagemap import ImageMap
from mechvlm.plot.canvas import COUNTED_BY, Canvas
from mechvlm.plot.look import INK, colours, finished, label, one_array, plain, tick_step
from mechvlm.prompt import Prompt

# The lowest values are clear, so that what matters least hides nothing of the picture.
ONE_SIGN = [
    [0.0, "rgba(255, 240, 120, 0.0)"],
    [0.25, "rgba(255, 200, 60, 0.45)"],
    [0.6, "rgba(250, 110, 30, 0.7)"],
    [1.0, "rgba(220, 0, 70, 0.9)"],
]
BOTH_SIGNS = [
    [0.0, "rgba(0, 85, 215, 0.9)"],
    [0.25, "rgba(80, 160, 245, 0.55)"],
    [0.5, "rgba(255, 255, 255, 0.0)"],
    [0.75, "rgba(250, 140, 80, 0.55)"],
    [1.0, "rgba(215, 20, 30, 0.9)"],
]
# Under words the picture stays to be seen; the words have a white rim of their own.
_UNDER_WORDS = [
    [0.0, "rgba(255, 255, 255, 0.25)"],
    [0.5, "rgba(170, 210, 245, 0.45)"],
    [1.0, "rgba(90, 165, 240, 0.6)"],
]
ELSEWHERE = {
    "keys": "this picture is seen by cross-attention, whose keys are its squares, and no position of the text stands "
    "for one; mv.attention_map in a layer of cross-attention and mv.gradient_attribution give values by key.",
    "patches": "this picture is seen through a Q-Former, whose queries stand for no place in it; mv.queries_to_patches "
    "says where they look, and mv.compose_queries carries values on them over to the patches.",
}
"""Why values by position have no place in a picture, and what has."""
_RIM = ", ".join(f"{x}px {y}px 2px white" for x in (-1, 0, 1) for y in (-1, 0, 1))


def over_image(
    values: xr.DataArray | Sequence[int | float] | np.ndarray,
    image_map: ImageMap,
    picture: Image.Image,
    limits: tuple[float, float] | None = None,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """The picture, and over each image token's square a colour for its value; the lowest values are clear.

    Args:
        values: dim `position`, whose coordinates are positions and may hold others than the image's; or one value for
            each of the image's tokens, in their order. A token without a value, or with nan, stays clear. Where the
            picture's squares are keys of cross-attention the dim is `key`, and `patch` where a Q-Former stands
            between them and the text.
        image_map: which token looks where, `prompt.images[0]`.
        picture: the original, `prompt.pictures[0]`.
        limits: lowest and highest value of the colours, for figures that are to be compared.

    Raises:
        ValueError: if no value belongs to the image, or the picture is another, or values by position are given where
            no position stands for a place in it.
        TypeError: for a dataset, or where image_map and picture are something else.

    Example:
        >>> over_image(attention_map(vlm, real, layer=3, head=5), real.images[0], real.pictures[0])
    """
    on_picture("over_image", image_map, picture)
    if isinstance(values, xr.Dataset):
        one_array(values, "over_image")
    known = _by_position(values, image_map)
    name = label(values) if isinstance(values, xr.DataArray) else "value"
    texts = {position: f"<b>{name} {value:.4g}</b>" for position, value in known.items()}
    canvas = Canvas.of(image_map, picture)
    figure = canvas.figure(known, texts)
    figure.update_layout(coloraxis=colours(np.array(list(known.values())), limits, ONE_SIGN, BOTH_SIGNS, name))
    return finished(figure, title, caption, canvas.width, canvas.height, axis=False)


def tokens_over_image(
    lens: xr.Dataset, prompt: Prompt, layer: int, image: int = 0, title: str = "", caption: str = ""
) -> go.Figure:
    """The picture, and in each image token's square the word the logit lens reads there, the bluer the more likely.

    Long words are cut; all of the lens's words for a token show on hover.

    Args:
        lens: what `logit_lens` returns: variables `token` and `probability` over layer, position and rank.
        layer: after which layer, one of the lens's.
        image: which of the prompt's images.

    Raises:
        ValueError: for a layer that is not in the lens, a lens without this image's positions, or an image of which no
            position stands for a place.

    Example:
        >>> tokens_over_image(logit_lens(vlm, real, positions=real.image), real, layer=6)
    """
    image_map, picture = _image(prompt, image)
    if image_map.of != "tokens":
        raise ValueError(f"what the lens reads at positions cannot be drawn: {ELSEWHERE[image_map.of]}")
    read = _readings(lens, layer, image_map)
    known = {position: ranked[0][1] for position, ranked in read.items()}
    texts = {
        position: "<br>".join(
            f"{rank}. <b>{plain(word)}</b> {share:.3f}" for rank, (word, share) in enumerate(ranked, 1)
        )
        for position, ranked in read.items()
    }
    canvas = Canvas.of(image_map, picture, smallest=38)
    figure = canvas.figure(known, texts)
    _write(figure, canvas, {position: ranked[0][0] for position, ranked in read.items()})
    shares = np.array([0.0, *known.values()])
    figure.update_layout(coloraxis=colours(shares, None, _UNDER_WORDS, _UNDER_WORDS, "probability"))
    return finished(
        figure, title or f"Logit lens after layer {layer}", caption, canvas.width, canvas.height, axis=False
    )


def token_grid(prompt: Prompt, image: int = 0, title: str = "", caption: str = "") -> go.Figure:
    """The picture with the squares of its image tokens; position, row and column of each show on hover.

    Args:
        image: which of the prompt's images.

    Raises:
        ValueError: for an image that is not in the prompt.

    Example:
        >>> token_grid(real)
    """
    image_map, picture = _image(prompt, image)
    canvas = Canvas.of(image_map, picture)
    figure = canvas.figure({}, {})
    for number, tiles in enumerate(canvas.panels, 1):
        for tile in tiles:
            upright = [at for x in tile.x for at in ((x, tile.y[0]), (x, tile.y[-1]), (None, None))]
            level = [at for y in tile.y for at in ((tile.x[0], y), (tile.x[-1], y), (None, None))]
            x, y = zip(*upright, *level, strict=True)
            for ink, width in (
                ("rgba(255, 255, 255, 0.6)", 2.5),
                ("rgba(0, 0, 0, 0.7)", 0.8),
            ):  # seen on dark and light
                line = {"color": ink, "width": width}
                figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", row=1, col=number)
        if len(tiles) == 1:
            figure.update_xaxes(title_text="column", **_numbers(tiles[0].x), col=number)
            if number in (1, len(canvas.panels)):  # between panels there is no room for numbers
                side = "left" if number == 1 else "right"
                figure.update_yaxes(title_text="row", side=side, **_numbers(tiles[0].y), col=number)
    return finished(figure.update_layout(showlegend=False), title, caption, canvas.width, canvas.height)


def on_picture(drawer: str, image_map: object, picture: object) -> None:
    """Refuse what is no place to draw on.

    Raises:
        TypeError: where one of them is something else, for instance the other.
    """
    if not isinstance(image_map, ImageMap) or not isinstance(picture, Image.Image):
        raise TypeError(
            f"{drawer} takes values, then an ImageMap, then a picture, and was given {type(image_map).__name__} and "
            f"{type(picture).__name__} for these; write {drawer}(values, prompt.images[0], prompt.pictures[0])."
        )


def _numbers(lines: list[float]) -> dict[str, object]:
    """Ticks that count the spaces between lines."""
    step = tick_step(len(lines), 20)
    middles = (np.array(lines[1:]) + lines[:-1]) / 2
    return {"showticklabels": True, "tickvals": middles[::step], "ticktext": [*map(str, range(0, len(middles), step))]}


def _write(figure: go.Figure, canvas: Canvas, words: Mapping[int, str]) -> None:
    """Write a word into each token's square, in one or two lines, cut where it is too long."""
    for number, tiles in enumerate(canvas.panels, 1):
        for tile in tiles:
            wide, tall = (canvas.scale * float(np.diff(lines).min()) for lines in (tile.x, tile.y))
            size = min(14.0, max(7.0, tall / 3.2))
            room = max(2, int(wide / (0.58 * size)))
            marks = [
                (x, y, _fitted(words[at], room, 2 if tall >= 2.5 * size else 1))
                for y, row in zip((np.array(tile.y[1:]) + tile.y[:-1]) / 2, tile.positions.tolist(), strict=True)
                for x, at in zip((np.array(tile.x[1:]) + tile.x[:-1]) / 2, row, strict=True)
                if at in words
            ]
            x, y, text = zip(*marks, strict=True) if marks else ((), (), ())
            font = {"size": size, "color": INK, "weight": "bold", "shadow": _RIM}
            style = {"mode": "text", "hoverinfo": "skip", "showlegend": False, "textfont": font}
            figure.add_scatter(x=x, y=y, text=text, **style, row=1, col=number)


def _fitted(word: str, room: int, rows: int) -> str:
    """A word in as many rows of as many letters as there is room for."""
    kept = word if len(word) <= room * rows else word[: room * rows - 1] + "\u2026"
    return "<br>".join(plain(kept[start : start + room]) for start in range(0, len(kept), room))


def _image(prompt: Prompt, image: int) -> tuple[ImageMap, Image.Image]:
    if not prompt.pictures:
        raise ValueError("the prompt has no picture; make it with vlm.prompt(image, text), not from a ready encoding.")
    if not 0 <= image < len(prompt.images):
        raise ValueError(f"there is no image {image}; the prompt's are numbered from 0 to {len(prompt.images) - 1}.")
    return prompt.images[image], prompt.pictures[image]


def _by_position(values: xr.DataArray | Sequence[int | float] | np.ndarray, image_map: ImageMap) -> dict[int, float]:
    """The finite values of the image's tokens by position."""
    dim = COUNTED_BY[image_map.of]
    if isinstance(values, xr.DataArray) and values.dims != (dim,):
        if dim != "position" and "position" in values.dims:
            raise ValueError(f"values by position cannot be drawn: {ELSEWHERE[image_map.of]}")
        given = ", ".join(map(str, values.dims)) or "none"
        raise ValueError(
            f"over_image draws one dim, {dim}, and the array has {given}; choose or average the others first."
        )
    numbers = np.asarray(values, dtype=float)
    if isinstance(values, xr.DataArray) and dim in values.coords:
        given_at = values[dim].values.tolist()
    elif numbers.shape == (len(image_map.positions),):
        given_at = list(image_map.positions)
    else:
        how = f"give one each, or a DataArray whose dim {dim} says which is whose."
        raise ValueError(
            f"the image has {len(image_map.positions)} {image_map.of}, and values of shape {numbers.shape} were given; "
            f"{ELSEWHERE.get(image_map.of, how)}"
        )
    wanted = set(image_map.positions)
    pairs = zip(given_at, numbers.tolist(), strict=True)
    known = {position: value for position, value in pairs if position in wanted and np.isfinite(value)}
    if not known:
        said = "positions" if dim == "position" else image_map.of
        raise ValueError(
            f"there is nothing to draw: no finite value belongs to the image's {image_map.of}, which are {said} "
            f"{image_map.positions[0]} to {image_map.positions[-1]}."
        )
    return known


def _readings(lens: xr.Dataset, layer: int, image_map: ImageMap) -> dict[int, list[tuple[str, float]]]:
    """What the lens reads at the image's tokens: by position, words with their probabilities, the likeliest first."""
    if not {"token", "probability"} <= set(lens.data_vars):
        raise ValueError(
            f"a lens has variables token and probability, as logit_lens makes them, and this dataset has "
            f"{', '.join(map(str, lens.data_vars)) or 'none'}."
        )
    layers = lens.layer.values.tolist()
    if layer not in layers:
        raise ValueError(f"layer {layer} is not in the lens; its layers are {', '.join(map(str, layers))}.")
    here = lens[["token", "probability"]].sel(layer=layer).transpose("position", "rank", ...)
    rows = zip(here.position.values.tolist(), here.token.values, here.probability.values, strict=True)
    wanted = set(image_map.positions)
    read = {
        position: [(_visible(str(word)), float(share)) for word, share in zip(words, shares, strict=True)]
        for position, words, shares in rows
        if position in wanted
    }
    if not read:
        raise ValueError(
            "the lens has no position of this image; make it with logit_lens(..., positions=prompt.image)."
        )
    return read


def _visible(word: str) -> str:
    """A token's text with nothing invisible in it: without the mark of a space, and signs for white space alone."""
    bare = word.replace("<0x0A>", "\n").replace("\u2581", " ").replace("\u0120", " ")
    return bare.strip() or bare.replace("\n", "\u23ce").replace(" ", "\u2423") or "\u2205"
