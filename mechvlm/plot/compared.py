"""Several maps of one picture side by side, and what taking away or putting in what they point at does.

Rule this module guards: what is drawn over the picture and what stands above it are of one prompt; means over prompts
are drawn by `bars`.

>>> found = compare_maps(vlm, [real], yes, ["attention", "random"], samples=2)
>>> figure = compared_maps(found, real)
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mechvlm.imagemap import ImageMap
from mechvlm.plot.canvas import COUNTED_BY, embedded
from mechvlm.plot.look import DASHES, FAINT, GREY, PALETTE, finished, plain
from mechvlm.plot.patched import RASTER
from mechvlm.plot.pictures import BOTH_SIGNS, ELSEWHERE, ONE_SIGN
from mechvlm.prompt import Prompt

SMALL, GAP, HEAD = 190, 16, 44
"""Pixels on the screen: a small picture's longer side, what is between two, and the room for the words above one."""
CURVES, APART, BELOW = 270, 90, 60
"""Pixels on the screen: how high curves are, how far they are apart, and the room above them."""
MOST = 5
"""Small pictures in a row."""
WAYS = {"deletion": "taken away", "insertion": "put in"}


def compared_maps(
    found: xr.Dataset,
    prompt: Prompt,
    number: int = 0,
    maps: Sequence[str] | None = None,
    image: int = 0,
    title: str = "",
    caption: str = "",
) -> go.Figure:
    """Each map over the picture with its advantage over random orders, and below the curves of deletion and insertion.

    A map's colours reach to its own largest value, since maps have different units; the lowest value of a map without
    negative ones is clear, as is 0 in others. Hovering shows the values themselves.

    Args:
        found: what `compare_maps` returns.
        prompt: one of those that were compared.
        number: which of them, counted from 0.
        maps: which to draw, by name; by default all.
        image: which of the prompt's images.
        caption: by default says what the numbers, lines and the band are.

    Raises:
        TypeError: for anything else than what `compare_maps` returns.
        ValueError: for a number, map or picture that is not there, a prompt that was left out, or another prompt.

    Example:
        >>> found = mv.compare_maps(vlm, [real], yes, ["relevancy", "attention"], samples=2)
        >>> mv.plot.compared_maps(found, real, title="Which map points at the 7?")
    """
    one = _one(found, prompt, number, maps)
    if not 0 <= image < len(prompt.pictures):
        raise ValueError(f"there is no picture {image}; the prompt holds {len(prompt.pictures)}, counted from 0.")
    own = prompt.images[image]
    step = max(1, max(own.size) // RASTER)
    heats = {str(name): _heat(one.sel(map=name), own, step) for name in one["map"].values}
    size = [SMALL * side / max(own.size) for side in own.size]
    across = min(len(heats), MOST)
    down = -(-len(heats) // across)
    width = max(across * size[0] + (across - 1) * GAP, 2 * CURVES + APART)
    upper = down * (size[1] + HEAD)
    figure = _Pixels(width, upper + BELOW + CURVES)
    signed = any(np.nanmin(heat) < 0 for heat in heats.values())
    for at, (name, heat) in enumerate(heats.items()):
        left, top = at % across * (size[0] + GAP), at // across * (size[1] + HEAD) + HEAD
        figure.place(left, top, size[0], size[1])
        figure.picture(heat, step, embedded(prompt.pictures[image]), own.size, _words(name, one.sel(map=name)))
    for at, mode in enumerate(WAYS):
        half = (width - APART) / 2
        figure.place(at * (half + APART), upper + BELOW, half, CURVES)
        figure.curves(one.sel(mode=mode), f"image tokens {WAYS[mode]} (%)", named=at == 0)
    scale, low = (BOTH_SIGNS, -1) if signed else (ONE_SIGN, 0)
    bar = {"title": {"text": "share of the map's largest"}, "y": 1, "yanchor": "top", "len": max(size[1], 150)}
    axis = {"colorscale": scale, "cmin": low, "cmax": 1, "colorbar": {**bar, "lenmode": "pixels"}}
    made = figure.figure.update_layout(coloraxis=axis, showlegend=True)
    made.update_layout(legend={"y": CURVES / figure.height, "yanchor": "top"})
    said = caption or _said(found, one)
    made = finished(made, title, said, width, figure.height)
    longest = max(len(name) for name in ("random orders", *heats))
    more = max(0, round(7.6 * longest) + 56 - made.layout.margin.r)  # a legend takes its room from the panels
    return made.update_layout(width=made.layout.width + more, margin_r=made.layout.margin.r + more)


class _Pixels:
    """A figure whose panels are placed by pixels on the screen, from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure, self.width, self.height, self.count = go.Figure(), width, height, 0

    def place(self, left: float, top: float, width: float, height: float) -> None:
        """Begin a panel."""
        self.count += 1
        self.at = (left, top, width, height)
        across = [left / self.width, (left + width) / self.width]
        down = [1 - (top + height) / self.height, 1 - top / self.height]
        x, y = ({"domain": held, "anchor": f"{other}{self.count}"} for held, other in ((across, "y"), (down, "x")))
        self.figure.update_layout({f"xaxis{self.count}": x, f"yaxis{self.count}": y})

    @property
    def axes(self) -> dict[str, str]:
        """The panel's axes, as traces name them."""
        mark = "" if self.count == 1 else str(self.count)
        return {"xaxis": f"x{mark}", "yaxis": f"y{mark}"}

    def picture(self, heat: np.ndarray, step: int, source: str, size: tuple[int, int], words: str) -> None:
        """The picture with values over it, by the largest of them, and words above."""
        low, most = float(np.nanmin(heat)), float(np.nanmax(np.abs(heat)))
        base = 0.0 if low < 0 else low
        shown = (heat - base) / ((most - base) or 1.0)
        x, y = (np.arange(count) * step + (step - 1) / 2 + 0.5 for count in heat.shape[::-1])
        said = "<b>%{customdata:.4g}</b><extra></extra>"
        look = {"coloraxis": "coloraxis", "hovertemplate": said, "hoverongaps": False}
        self.figure.add_heatmap(x=x, y=y, z=shown, customdata=heat, **look, **self.axes)
        own = {"xref": self.axes["xaxis"], "yref": self.axes["yaxis"], "x": 0, "y": 0}
        self.figure.add_layout_image(
            source=source, sizing="stretch", layer="below", sizex=size[0], sizey=size[1], **own
        )
        bare = {"showgrid": False, "zeroline": False, "showline": False, "showticklabels": False}
        self.figure.update_layout({f"xaxis{self.count}": {**bare, "range": [0, size[0]]}})
        self.figure.update_layout({f"yaxis{self.count}": {**bare, "range": [size[1], 0]}})
        left, top, wide, _ = self.at
        where = {"xref": "paper", "yref": "paper", "x": (left + wide / 2) / self.width, "y": 1 - top / self.height}
        style = {"font": {"size": 12}, "showarrow": False, "xanchor": "center", "yanchor": "bottom"}
        self.figure.add_annotation(text=words, **where, **style)

    def curves(self, one: xr.Dataset, along: str, named: bool) -> None:
        """The metric by the share of tokens, a line for each map, and the range of the random orders."""
        shares = [f"{100 * share:.3g}" for share in one.share.values]
        low, high = one.random.min("sample").values, one.random.max("sample").values
        plain_line = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, **self.axes}
        self.figure.add_scatter(x=shares, y=low, line={"width": 0}, **plain_line)
        self.figure.add_scatter(x=shares, y=high, line={"width": 0}, fill="tonexty", fillcolor="#e2e2e2", **plain_line)
        mean = {"color": GREY, "width": 2, "dash": "dot"}
        series = [("random orders", one.random.mean("sample").values, mean)]
        for at, name in enumerate(one["map"].values):
            ink, dash = PALETTE[at % len(PALETTE)], DASHES[at // len(PALETTE) % len(DASHES)]
            series.append((str(name), one.curve.sel(map=name).values, {"color": ink, "width": 2, "dash": dash}))
        for name, values, line in series:
            said = f"{plain(name)}<br>%{{x}} %<br><b>%{{y:.4g}}</b><extra></extra>"
            look = {"mode": "lines", "hovertemplate": said, "legendgroup": name, "showlegend": named}
            self.figure.add_scatter(x=shares, y=values, name=plain(name), line=line, **look, **self.axes)
        unit = one.curve.attrs.get("units", "")
        self.figure.update_layout({f"xaxis{self.count}": {"title": {"text": along}, "type": "category"}})
        self.figure.update_layout({f"yaxis{self.count}": {"title": {"text": f"metric ({plain(unit)})"}}})
        self.figure.update_layout({f"{axis}axis{self.count}": {"gridcolor": FAINT} for axis in "xy"})


def _one(found: object, prompt: Prompt, number: int, maps: Sequence[str] | None) -> xr.Dataset:
    """What was found of one prompt, and of some maps."""
    if not isinstance(found, xr.Dataset) or not {"curve", "advantage", "attribution", "place"} <= set(found.data_vars):
        held = f" with {', '.join(map(str, found.data_vars))}" if isinstance(found, xr.Dataset) else ""
        raise TypeError(
            f"compared_maps draws what compare_maps returns, and was given a {type(found).__name__}{held}; make it "
            "with mv.compare_maps(vlm, prompts, metric)."
        )
    if not 0 <= number < found.sizes["prompt"]:
        raise ValueError(f"there is no prompt {number}; {found.sizes['prompt']} were compared, counted from 0.")
    names = found["map"].values.tolist()
    wrong = [name for name in maps or () if name not in names]
    if wrong or (maps is not None and not maps):
        raise ValueError(f"maps={list(maps or ())} are not all among those compared, which are {', '.join(names)}.")
    one = found.isel(prompt=number).sel(map=list(maps or names))
    if not np.isfinite(one.curve.values).all():
        raise ValueError(f"prompt {number} was left out, since its picture does not raise the metric; choose another.")
    held_at = {place for place in one.place.values.tolist() if place >= 0}
    counted = str(found.attrs["counted_by"])
    for image in prompt.images:
        if COUNTED_BY[image.of] != counted:
            raise ValueError(f"maps by {counted} cannot be drawn: {ELSEWHERE.get(image.of, 'the picture has none.')}")
    drawn = {place for image in prompt.images for place in image.positions}
    if not drawn <= held_at or str(one.question.item()) != prompt.words:
        raise ValueError(
            f"prompt {number} of those compared asks {str(one.question.item())!r}, with {len(held_at)} image tokens, "
            f"and {prompt.words!r}, with {len(drawn)}, was given; give the prompt with that number."
        )
    return one


def _heat(one: xr.Dataset, own: ImageMap, step: int) -> np.ndarray:
    """A map painted on the picture, some of its pixels."""
    known = dict(zip(one.place.values.tolist(), one.attribution.values.tolist(), strict=True))
    values = np.array([known.get(place, np.nan) for place in sorted((*own.positions, *own.separators))])
    return own.heat(values)[step // 2 :: step, step // 2 :: step]


def _words(name: str, one: xr.Dataset) -> str:
    """What stands above a map."""
    gained = ", ".join(f"{mode} {float(one.advantage.sel(mode=mode)):+.2f}" for mode in WAYS)
    return f"<b>{plain(name)}</b><br>{gained}"


def _said(found: xr.Dataset, one: xr.Dataset) -> str:
    """What the figure shows."""
    return (
        "Above each map: its advantage over random orders, as a share of what the picture adds to the metric; 0 is "
        f"chance. Below: {plain(str(found.attrs.get('metric', 'the metric')))} while image tokens are taken away or "
        f"put in, the map's highest first, at {str(found.attrs.get('at', '')).replace('_', ' ')}; grey: the mean and "
        f"the range of {one.sizes['sample']} random orders."
    )
