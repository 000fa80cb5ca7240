"""A report's sections as one HTML page that needs nothing else: plotly.js stands in it once.

Rule this module guards: texts of a model or a user never become markup. Tables and sentences go through the template,
which escapes them; figures are JSON in which no tag can begin.

>>> made = {"model": "demo", "made": "2026-01-01"}
>>> page([Section("a", "Title", "Found.", "Shown.", "Units.")], made, "Is there a 7?").count("<section")
3
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

TEMPLATES = Path(__file__).parents[1] / "templates"
THUMBNAIL = 240
NUMBER = re.compile(r"(\[[-+\d., ]{1,40}\]|(?<![\w.])[-+]?\d+\.\d{1,12}(?!\w))")
"""A number with decimals, or an interval in brackets, in a cell."""
COUNTED = "Layers and heads are those of the language model and count from 0."


@dataclass(frozen=True)
class Drawing:
    """One figure, or several of which a slider shows one.

    Attributes:
        alt: what is to be seen, in words.
        figures: a figure, or figures by what the slider says of each.
        chooser: what the slider chooses.
        start: which of them is shown first.
    """

    alt: str
    figures: go.Figure | Mapping[str, go.Figure]
    chooser: str = ""
    start: int = 0

    @property
    def choices(self) -> list[str]:
        """What the slider says of each figure; empty for one alone."""
        return [] if isinstance(self.figures, go.Figure) else list(self.figures)

    @property
    def first(self) -> go.Figure:
        """The figure that is shown first."""
        return self.figures if isinstance(self.figures, go.Figure) else list(self.figures.values())[self.start]

    @property
    def json(self) -> str:
        """The figures, and once what they have in common: the picture under them."""
        figures = [self.figures] if isinstance(self.figures, go.Figure) else list(self.figures.values())
        made = [json.loads(figure.to_json()) for figure in figures]
        images = made[0]["layout"].get("images", [])
        for one in made:
            one["layout"].pop("images", None)
            one["layout"].pop("template", None)
        template = json.loads(figures[0].to_json())["layout"].get("template", {})
        text = json.dumps({"figures": made, "images": images, "template": template})
        return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@dataclass(frozen=True)
class Table:
    """A table of texts, with a picture before each row where `pictures` are given."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    pictures: Sequence[Image.Image] = ()

    @property
    def thumbnails(self) -> list[str]:
        """The rows' pictures, as they stand in the page."""
        return [embedded(picture) for picture in self.pictures]


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        name: its anchor.
        finding: what came out, in a sentence.
        sentence: what it shows and how that was computed.
        conventions: units, where counting starts, what positive means.
        pictures: pictures to be shown as they are, by their captions.
        numbers: results to be written beside the page, by the names of their files.
        trouble: why it could not be made, if so.
    """

    name: str
    title: str
    finding: str = ""
    sentence: str = ""
    conventions: str = ""
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[str] = ()
    trouble: str = ""

    @property
    def shown(self) -> dict[str, str]:
        """The pictures, as they stand in the page."""
        return {caption: embedded(picture) for caption, picture in self.pictures.items()}


def page(sections: Sequence[Section], provenance: Mapping[str, object], question: str, about: str = "") -> str:
    """The whole page.

    Args:
        provenance: what the numbers came from, for the last section.
        question: the question asked, for the heading.
        about: what the page shows, in words that a full stop can follow; by default that of a report.
    """
    about = about or f"What {provenance['model']} does with the picture when it answers this question"
    loader = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    loader.trim_blocks = loader.lstrip_blocks = True
    loader.filters["unbroken"] = unbroken
    return loader.get_template("report.html.j2").render(
        sections=sections, provenance=provenance, question=question, about=about, plotly=get_plotlyjs()
    )


def unbroken(cell: object) -> Markup:
    """A cell's text for a page, whose numbers and intervals of numbers are not broken over lines.

    Example:
        >>> str(unbroken("0.5 [0.25, 0.75] <"))
        '<span class="number">0.5</span> <span class="number">[0.25, 0.75]</span> &lt;'
    """
    parts = NUMBER.split(str(cell))  # every other part is a number
    return Markup("").join(
        Markup('<span class="number">{}</span>').format(part) if at % 2 else part for at, part in enumerate(parts)
    )


def embedded(picture: Image.Image) -> str:
    """A picture as text that a page can hold; larger ones become smaller."""
    small = picture.copy()
    small.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    data = BytesIO()
    small.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def listed(values: xr.DataArray) -> str:
    """A few numbers in a row, for those who cannot see the figure."""
    return ", ".join(f"{value:.2f}" for value in np.asarray(values))
