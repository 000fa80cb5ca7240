"""The page of an audit: a table of verdicts, and beside each other what was published and what is corrected.

Rule this module guards: every sentence about a finding is the audit's own, which is made of its numbers.

>>> counted(["survives", "not there", "survives"])
'2 survive, 1 is not shown either way'
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from mechvlm import plot
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.methods.findings import Estimate, audit_table
from mechvlm.report.page import COUNTED, Drawing, Section, Table, page
from mechvlm.report.write import written

WIDTH, ENTRY, ROW = 430, 160, 20  # of a figure that stands beside another; an entry of a legend, and its height
WAYS = ("published", "corrected")
COUNTS = {
    "survives": ("survives", "survive"),
    "survives in part": ("survives in part", "survive in part"),
    "does not survive": ("does not survive", "do not survive"),
    "not decided": ("is not decided", "are not decided"),
    "not there": ("is not shown either way", "are not shown either way"),
    "only corrected": ("is shown only when corrected", "are shown only when corrected"),
    "not made": ("could not be made", "could not be made"),
}
"""Verdicts as they are counted, of one and of several."""
VIAR_SAID = "As VIAR’s code takes them (convention viar-2026)"


def audit_page(found: Mapping[str, xr.Dataset], folder: str | Path, about: Mapping[str, str]) -> Path:
    """Write an audit as a page that stands alone, with its numbers beside it.

    Args:
        found: what `mv.methods.viar.audit` returns.
        folder: gets audit.html, every dataset as netCDF, the findings as CSV, too, and the figures.
        about: what is said of the page beside what the findings say of themselves; `made`, a date, among it.

    Returns:
        The page's path.

    Example:
        >>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:4]]
        >>> audit_page(mv.methods.viar.audit(vlm, asked, resamples=50), ".", {"made": "2026-01-01"}).name
        'audit.html'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = (verdicts, spans, sink, zone, heads, collapse, gradients)
    sections = [written(part(found), folder) for part in parts]
    own = found["findings"].attrs
    first, *others = str(own["prompt"]).split("\n---\n")
    provenance = {name: str(value) for name, value in own.items() if name != "rule"}
    provenance |= {"prompt": first + (f"\n(and {len(others)} others)" if others else ""), **about}
    title = f"Which of VIAR’s findings does {own['model']} show?"
    said = f"{own['prompts']} questions about {own['clusters']} pictures, as published and corrected"
    path = folder / "audit.html"
    path.write_text(page(sections, provenance, title, said), encoding="utf-8")
    return path


def verdicts(found: Mapping[str, xr.Dataset]) -> Section:
    """All findings in one table."""
    findings = found["findings"]
    rows = [
        [claim, *row]
        for claim, row in zip(findings.claim.values.tolist(), audit_table(findings).to_numpy().tolist(), strict=True)
    ]
    names = [str(name).replace("_", " ") for name in findings.finding.values]
    words = list(zip(names, findings.sentence.values.tolist(), strict=True))
    columns = ("published finding", "verdict", *WAYS, "difference", "unit")
    level = f"{100 * float(findings.attrs['level']):.0f} %"
    return Section(
        "verdicts",
        "Verdicts",
        f"Of {len(rows)} published findings: {counted(findings.verdict.values.tolist())}.",
        f"Each finding as its published code measures it on this model, and corrected. {findings.attrs['rule']}",
        f"In brackets: {level} intervals over draws of {findings.attrs['clusters']} pictures with all their questions, "
        f"the same draws for both. Difference: published minus corrected. The zone: layers {findings.attrs['zone']} "
        f"({findings.attrs['zone_was']}). {COUNTED}",
        tables=[Table("Verdicts", columns, rows), Table("In words", ("finding", "what came out"), words)],
        numbers={"findings": findings, "findings_table": frame(findings)},
    )


def spans(found: Mapping[str, xr.Dataset]) -> Section:
    """Who is paid by text, truly and under the name of the image."""
    profile, published = found["profile"], found["published_profile"]
    curves = {"What text pays": profile.mass, "What is called the image": published.really}
    drawings = []
    for title, values in curves.items():
        dim = str(values.dims[-1])
        kept = values.isel({dim: np.flatnonzero((values.fillna(0) > 0).any([*values.dims[:-1]]))})
        over = mean_interval(kept.mean("head").rename({dim: "to"}), "prompt", published.cluster.values.tolist())
        mean = over["mean"].assign_attrs(long_name="attention mass", units="fraction")
        figure = plot.lines(mean, "layer", "to", band=(over.low, over.high), title=title)
        said = "; ".join(f"{name}: {float(mean.sel(to=name).mean()):.3f}" for name in mean.to.values)
        drawings.append(Drawing(f"{title}, by layer; means over layers: {said}.", narrow(figure)))
    paid = published.really.mean(["prompt", "layer", "head"])
    other = float(1 - paid.sel(own="image") / paid.sum())
    return Section(
        "spans",
        "Who is paid",
        f"{other:.1%} of what is published as attention to the image is paid to other tokens.",
        "Left: attention of the words behind the picture, by what they pay. Right: what the published rows pay to the "
        "published columns, by what these really hold.",
        f"Sums over keys, means over heads and rows. {VIAR_SAID}, the image is the first N positions, where N counts "
        "the image tokens, and text is all behind them.",
        drawings,
        numbers={name: found[name] for name in ("profile", "published_profile", "mistral_profile") if name in found},
    )


def sink(found: Mapping[str, xr.Dataset]) -> Section:
    """The first position's curve, the image's, and the published one."""
    profile, published = found["profile"], found["published_profile"]
    drawings = [
        Drawing(
            "Attention to the image and to position 0 by layer.",
            narrow(plot.layer_spans(profile, title="Image and position 0", caption="What text really pays.")),
        ),
        Drawing(
            "The published curve beside the corrected one.",
            narrow(
                plot.published_beside(
                    profile, published, title="Published and corrected", caption="Both are mass on the image."
                )
            ),
        ),
    ]
    said = sentences(found, "published_curve", "mistral")
    return Section(
        "sink",
        "Whose curve it is",
        said[0],
        " ".join(said[1:]),
        "A correlation is over layers, between mean curves.",
        drawings,
    )


def zone(found: Mapping[str, xr.Dataset]) -> Section:
    """The zone, the U and the last layer."""
    named = dict(zip(WAYS, ("published_zone", "zone"), strict=True))
    drawings = []
    for way, name in named.items():
        one = found[name]
        p_value = f"p = {float(one.p_value):.3g}; grey: a zone; dotted: chosen, does not hold."
        figure = plot.zone_curve(one, title=f"Zone, {way}", caption=p_value)
        drawings.append(Drawing(f"The {way} curve by layer, with its zone where there is one.", narrow(figure)))
    first, *others = sentences(found, "zone", "u_shape", "last_drop")
    units = found["quantities"]
    rows = [
        [
            str(quantity),
            way,
            f"{float(one.least):.3g} to {float(one.most):.3g}",
            str(Estimate(*one.curvature.values.tolist())),
            str(one["shape"].values),
        ]
        + [zone_of(one)]
        for quantity in units["quantity"].values
        for way in WAYS
        for one in [units.sel(quantity=quantity, how=way)]
    ]
    columns = ("quantity", "positions", "range over layers", "rise from middle to ends", "a U?", "zone")
    return Section(
        "zone",
        "A zone, a U, and the last layer",
        first,
        " ".join(others),
        "A zone is chosen by one half of the pictures and tested on the other. The table has the four quantities that "
        "were published under one name, each in its own unit; verdicts are of mass.",
        drawings,
        [Table("The same in every published unit", columns, rows)],
        numbers={name: found[name] for name in ("zone", "published_zone", "u_shape", "quantities")},
    )


def heads(found: Mapping[str, xr.Dataset]) -> Section:
    """Heads that look little, and much."""
    drawings = []
    for way in WAYS:
        one = found["heads"].sel(how=way, drop=True)
        said = f"Down: {int(one.neglect.sum())} neglecting heads; up: {int(one.specialist.sum())} specialists."
        drawings.append(
            Drawing(f"Map of heads, {way}. {said}", narrow(plot.head_matrix(one, title=f"Heads, {way}", caption=said)))
        )
    first, *others = sentences(found, "neglect_heads", "specialist_heads", "head_spread")
    return Section(
        "heads",
        "Heads of neglect, and specialists",
        first,
        " ".join(others),
        "A head is marked where its mean attention to the image is a standard deviation below or above that of all.",
        drawings,
        numbers={"heads": found["heads"]},
    )


def collapse(found: Mapping[str, xr.Dataset]) -> Section:
    """Updates with the picture and without."""
    true, old = found["collapse"], found["published_collapse"]
    drawings = [
        Drawing(
            "Cosines of updates by layer, of outputs as they are and with the last taken after the final norm.",
            narrow(plot.collapse_curves(true, title="Corrected positions"), 2 * WIDTH),
        ),
        Drawing("The same as published.", narrow(plot.collapse_curves(old, title="Published", caption=" "))),
    ]
    first, *others = sentences(found, "collapse_zone", "collapse_last")
    return Section(
        "collapse",
        "Is the picture still used?",
        first,
        " ".join(others),
        "The cosine between what a layer adds with the picture and with a black one, or another real one (swap), at "
        "the same words. By itself a cosine has no scale; that of the swap is one.",
        drawings,
        numbers={"collapse": true, "published_collapse": old},
    )


def gradients(found: Mapping[str, xr.Dataset]) -> Section:
    """How gradients fall."""
    names = {"gradients": "Corrected", "published_gradients": "Published"}
    drawings = [
        Drawing(
            f"Gradients by layer, {title.lower()}.",
            narrow(plot.gradient_decay(found[name], spans=shown, title=title, caption=" ")),
        )
        for name, title in names.items()
        if name in found
        for shown in [[one for one in ("image", "question") if one in found[name].span.values]]
    ]
    first, *others = sentences(found, "gradient_zone", "gradient_picture")
    return Section(
        "gradients",
        "Does the answer stop depending on the picture?",
        first,
        " ".join(others),
        f"The metric’s gradient at each layer’s output: {found['gradients'].attrs['metric']}; as published the logit "
        "of a small “yes”. At the last layer all but the last position’s are zero by construction, and left out. Grey: "
        "falls as the image tokens’ does on average with a black picture.",
        drawings,
        numbers={name: found[name] for name in names if name in found},
    )


def narrow(figure: go.Figure, width: float = WIDTH) -> go.Figure:
    """A figure that has room beside another: its legend goes above the plotted area."""
    if not figure.layout.showlegend:
        return figure.update_layout(width=width)
    above = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.07, "yanchor": "bottom", "title_text": ""}
    entries = len({trace.name for trace in figure.data if trace.showlegend is not False})
    room = ROW + ROW * math.ceil(entries / (width // ENTRY))
    top, height = figure.layout.margin.t + room, figure.layout.height + room
    figure.update_layout(width=width, legend=above, margin_r=20, margin_t=top, height=height)
    return figure.update_layout(title={"y": 1, "yanchor": "top", "yref": "container", "pad": {"t": ROW}})


def sentences(found: Mapping[str, xr.Dataset], *names: str) -> list[str]:
    """What the audit says of findings; nothing of those that it has not."""
    findings = found["findings"]
    return [str(findings.sentence.sel(finding=name).values) for name in names if name in findings.finding.values]


def zone_of(one: xr.Dataset) -> str:
    """The zone of a quantity in words."""
    if not np.isfinite(float(one.start)):
        return f"none (p = {float(one.p_value):.3g})"
    return f"{float(one.start):.0f} to {float(one.stop) - 1:.0f} (p = {float(one.p_value):.3g})"


def counted(said: Sequence[str]) -> str:
    """How many of each verdict, in words."""
    counts = Counter(said)
    return ", ".join(f"{counts[what]} {COUNTS[what][counts[what] > 1]}" for what in COUNTS if counts[what])


def frame(findings: xr.Dataset) -> pd.DataFrame:
    """Findings as a table of plain columns, a row each."""
    columns = {name: findings[name].values for name in ("finding", "claim", "unit", "verdict")}
    for way in (*WAYS, "difference"):
        columns |= {f"{way}_{end}": findings[way].sel(end=end).values for end in findings.end.values}
    return pd.DataFrame({**columns, "sentence": findings.sentence.values})
