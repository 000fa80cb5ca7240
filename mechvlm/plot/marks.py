"""Sinks on the picture: each square's massive activation as a colour, and a mark for what kind of sink it is.

Rule this module guards: a mark stands in the middle of its own square, and only where a rule found a sink.

>>> sinks_over_image(mv.sinks(vlm, real, threshold=3.0), real).data[1].name
'massive only'
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.imagemap import ImageMap
from mechvlm.plot.canvas import Canvas
from mechvlm.plot.look import INK, colours, finished, label, plain
from mechvlm.plot.pictures import BOTH_SIGNS, ELSEWHERE, _image
from mechvlm.prompt import Prompt

NEEDED = ("phi", "label", "sink_by_activation", "sink_by_mass")
MARKS = {
    "primary": ("circle", 0.5, "#0072B2"),
    "secondary": ("diamond", 0.5, "#009E73"),
    "massive only": ("x", 0.42, INK),
    "by mass": ("square-open", 0.8, INK),
}
"""Symbol, size as a share of the square, and colour of each kind."""
# Up to the threshold; what is below half of it, as most of a picture is, hides nothing.
UP_TO_THRESHOLD = [
    [0.0, "rgba(255, 225, 120, 0.0)"],
    [0.5, "rgba(255, 200, 60, 0.15)"],
    [0.75, "rgba(250, 130, 40, 0.3)"],
    [1.0, "rgba(220, 0, 70, 0.5)"],
]
NAMED = 6  # sinks outside the picture that the caption names


def sinks_over_image(
    found: xr.Dataset, prompt: Prompt, layer: int | None = None, image: int = 0, title: str = "", caption: str = ""
) -> go.Figure:
    """The picture, each square coloured by its massive activation, and a mark on each sink.

    A circle is a primary sink, a diamond a secondary one, a cross a sink by activation that is neither (massive only),
    and a frame a sink by mass. Colours go from nothing to the threshold, above which a square is a sink by activation.

    Args:
        found: what `mv.sinks` returns.
        layer: one of its layers; None takes each square's largest activation, and the sinks of any layer.
        image: which of the prompt's images.
        caption: by default says what was found at all, and names the sinks that stand for no place in this picture.

    Raises:
        ValueError: for a dataset that `sinks` did not make, or made of a prompt with another number of positions, a
            layer that it has not, or an image of which no position stands for a place.

    Example:
        >>> mv.plot.sinks_over_image(mv.sinks(vlm, real, threshold=3.0), real)
    """
    image_map, picture = _image(prompt, image)
    if image_map.of != "tokens":
        raise ValueError(f"sinks, which are positions, cannot be drawn: {ELSEWHERE[image_map.of]}")
    every = _in_layers(found, prompt, layer)
    phi = every.phi.sel(position=list(image_map.positions)).max("layer", keep_attrs=True)
    values = dict(zip(image_map.positions, phi.values.tolist(), strict=True))
    kinds = _kinds(every)
    texts = {
        at: "<br>".join([f"<b>{label(phi)} {value:.4g}</b>", *(kind for kind, held in kinds.items() if at in held)])
        for at, value in values.items()
    }
    canvas = Canvas.of(image_map, picture)
    figure = canvas.figure(values, texts)
    _mark(figure, canvas, image_map, kinds)
    limits = (0.0, float(found.attrs["threshold"]))
    axis = colours(phi.values, limits, UP_TO_THRESHOLD, BOTH_SIGNS, label(phi))
    figure.update_layout(coloraxis=axis, showlegend=True)
    where = "in any layer" if layer is None else f"in layer {layer}"
    said = caption or _told(every, kinds, values, where)
    done = finished(figure, title or f"Sinks {where}", said, canvas.width, canvas.height, axis=False)
    # The legend stands between title and picture, with room for two lines of it.
    done.update_layout(height=done.layout.height + 30, margin_t=done.layout.margin.t + 30)
    done.update_layout(title={"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 16}})
    return done.update_layout(legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"})


def _in_layers(found: xr.Dataset, prompt: Prompt, layer: int | None) -> xr.Dataset:
    """The sinks in one layer, or in all.

    Raises:
        ValueError: for what `sinks` did not make of this prompt, or a layer that it has not.
    """
    if not set(NEEDED) <= set(found.data_vars):
        raise ValueError(
            f"sinks are a dataset with {', '.join(NEEDED)}, and this one has "
            f"{', '.join(map(str, found.data_vars)) or 'nothing'}; make it with mv.sinks(vlm, prompt)."
        )
    if found.sizes["position"] != len(prompt):
        raise ValueError(
            f"the sinks are of a prompt with {found.sizes['position']} positions, and this one has {len(prompt)}; make "
            "them with mv.sinks(vlm, prompt)."
        )
    layers = found.layer.values.tolist()
    if layer is not None and layer not in layers:
        raise ValueError(f"layer {layer} is not among the sinks; their layers are {', '.join(map(str, layers))}.")
    return found.sel(layer=layers if layer is None else [layer])


def _told(every: xr.Dataset, kinds: dict[str, list[int]], values: dict[int, float], where: str) -> str:
    """What the figure cannot show: that a rule found nothing, and sinks that stand for no place in the picture."""
    massive = {at for kind, held in kinds.items() if kind != "by mass" for at in held}
    rules = {
        f"by activation (threshold {every.attrs['threshold']:g})": massive,
        f"by mass (alpha {every.attrs['alpha']:g})": set(kinds["by mass"]),
    }
    none = [rule for rule, held in rules.items() if not held]
    said = [f"No sink {where} {' or '.join(none)}."] if none else []
    others = sorted(set().union(*rules.values()) - set(values))
    if others:
        tokens = every.token.values
        words = [
            f"{at} '{plain(str(tokens[at]))}' ({', '.join(kind for kind, held in kinds.items() if at in held)})"
            for at in others[:NAMED]
        ]
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        said.append(f"Sinks that stand for no place in this picture: {', '.join(words)}{more}.")
    if any(value > every.attrs["threshold"] and at not in massive for at, value in values.items()):
        said.append("Above the threshold without a mark: in the first two layers alone, which do not count.")
    if "note" in every.attrs:
        said.append(f"Note: {plain(every.attrs['note'])}.")
    return " ".join(said)


def _kinds(here: xr.Dataset) -> dict[str, list[int]]:
    """The positions of each kind of sink."""
    massive, paid = (here[name].any("layer").values for name in ("sink_by_activation", "sink_by_mass"))
    named = here.label.values
    chosen = {
        "primary": massive & (named == "primary"),
        "secondary": massive & (named == "secondary"),
        "massive only": massive & (named == "none"),
        "by mass": paid,
    }
    return {kind: here.position.values[which].tolist() for kind, which in chosen.items()}


def _mark(figure: go.Figure, canvas: Canvas, image_map: ImageMap, kinds: dict[str, list[int]]) -> None:
    """Put each kind's mark in the middle of its squares, in the panel that has them."""
    listed: set[str] = set()
    quiet = {"showlegend": False, "hoverinfo": "skip"}
    for kind, (symbol, size, ink) in MARKS.items():
        for number, tiles in enumerate(canvas.panels, 1):
            inside = {at for tile in tiles for at in tile.positions.flatten().tolist()}
            boxes = [box for at in kinds[kind] if at in inside and (box := image_map.box(at))]
            if not boxes:
                continue
            left, top, right, bottom = np.array(boxes).T
            pixels = size * canvas.scale * float(np.minimum(right - left, bottom - top).min())
            place = {"x": ((left + right) / 2).tolist(), "y": ((top + bottom) / 2).tolist(), "name": kind}
            look = {"symbol": symbol, "size": max(pixels, 6.0), "color": ink, "line": {"color": "white", "width": 2}}
            if symbol.endswith("open"):
                under = {**look, "color": "white", "line": {"color": "white", "width": 6}}  # seen on dark and light
                figure.add_scatter(**place, mode="markers", marker=under, **quiet, row=1, col=number)
                look["line"] = {"color": ink, "width": 2}
            shown = {"showlegend": kind not in listed, "legendgroup": kind, "hoverinfo": "skip"}
            figure.add_scatter(**place, mode="markers", marker=look, **shown, row=1, col=number)
            listed.add(kind)
