"""Measures every section of a report, and writes the page and the numbers.

>>> made(views.picture, study).title
'The picture, as tokens'
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from tqdm import tqdm

from mechvlm.experiments.record import metric_name
from mechvlm.matching import check_matched
from mechvlm.prompt import Prompt
from mechvlm.report import causes, views
from mechvlm.report.page import Section, page
from mechvlm.report.study import Case, Study
from mechvlm.vlm import VLM

SECTIONS: tuple[Callable[[Study], Section], ...] = (
    views.picture,
    views.answers,
    views.cases,
    views.profile,
    views.attention,
    views.lens,
    causes.heads,
    causes.patching,
    causes.attribution,
    causes.dose,
    causes.generation,
)
"""The parts of a report, in their order on the page."""


def report(
    vlm: VLM,
    real: Prompt,
    null: Prompt,
    out: str | Path,
    answers: Sequence[str | int] = ("yes", "no"),
    layer: int | None = None,
    head: int | None = None,
    null_name: str = "",
    more: Sequence[Case] = (),
) -> Path:
    """Look at one question about one picture from all sides, and write a page that stands alone.

    Args:
        real: the question about the picture.
        null: the same about a null image, `real.with_image(mv.images.black)`.
        out: a folder, made where there is none. It gets report.html, the numbers of each figure as netCDF or
            CSV, and in figures/ each figure as plotly's JSON.
        answers: the answers to follow, the first against the second.
        layer, head: whose attention is drawn over the picture; None takes the head whose effect when ablated, times
            its text positions' attention to the image, is largest.
        null_name: how the report calls the null image.
        more: further questions for a table.

    Returns:
        The page's path.

    Raises:
        ValueError: for prompts without a picture or whose positions differ, answers that are no single tokens, or a
            layer or head that is not there. What goes wrong later is said in the report itself.

    Example:
        >>> mv.report.report(vlm, real, real.with_image(mv.images.black), out="report")
    """
    if not (real.pictures and null.pictures):
        raise ValueError("a report needs a picture; make the prompt with vlm.prompt(image, text).")
    check_matched(real, null)
    study = Study(vlm, real, null, tuple(answers), layer, head, null_name=null_name or "not named", cases=more)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sections, wanted = [], [part for part in SECTIONS if part is not views.cases or more]
    with tqdm(wanted, unit="part", desc="report") as bar:
        for part in bar:
            bar.set_postfix_str(part.__name__)
            sections.append(written(made(part, study), folder))
    path = folder / "report.html"
    path.write_text(page(sections, provenance(study), real.words or real.text), encoding="utf-8")
    return path


def made(part: Callable[[Study], Section], study: Study) -> Section:
    """A section, or in its place what stood in the way."""
    try:
        return part(study)
    except (ValueError, TypeError, torch.OutOfMemoryError) as error:
        title = str(part.__doc__).strip().rstrip(".")
        return Section(part.__name__, title, finding="This part could not be made.", trouble=str(error))


def written(section: Section, folder: Path) -> Section:
    """The section, its numbers and figures written into the folder: arrays as netCDF, tables as CSV, figures as JSON.

    A figure's file is read again by `plotly.io.read_json`.
    """
    files = [
        f"{name}.csv" if isinstance(kept, pd.DataFrame) else f"{name}.nc" for name, kept in section.numbers.items()
    ]
    for file, kept in zip(files, section.numbers.values(), strict=True):
        write_numbers(kept, folder / file)
    for number, drawing in enumerate(section.drawings, 1):
        (folder / "figures").mkdir(exist_ok=True)
        drawing.first.write_json(folder / "figures" / f"{section.name}-{number}.json")
    return replace(section, files=files)


def write_numbers(kept: Any, path: Path) -> None:
    """One result as a file."""
    if isinstance(kept, xr.Dataset | xr.DataArray):
        kept.to_netcdf(path, engine="h5netcdf")
    else:
        kept.to_csv(path, index=False)


def provenance(study: Study) -> dict[str, object]:
    """What the numbers of a report came from."""
    shape, picture = study.vlm.shape, study.real.pictures[0]
    return {
        **study.vlm.provenance(study.real),
        "language model": f"{shape.layers['text']} layers of {shape.heads['text']} heads",
        "vision tower": f"{shape.layers['vision']} layers of {shape.heads['vision']} heads",
        "picture": f"{picture.size[0]} × {picture.size[1]} pixels",
        "null image": study.null_name,
        "metric": metric_name(study.metric),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
