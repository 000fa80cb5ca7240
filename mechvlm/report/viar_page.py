"""VIAR's study as one page: a section for each part, with its finding, its figures, its tables and its numbers.

Rule this module guards: findings are those of `mechvlm.methods.sentences`, and every figure is drawn of the part's own
numbers, which lie beside the page.

>>> found = mv.methods.viar.study(vlm, items=24, parts=["heads"], pictures=4)
>>> section("heads", found.parts).title
'Heads of neglect, and specialists'
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from mechvlm.evaluate import stats
from mechvlm.methods.sentences import finding
from mechvlm.methods.study import Studied
from mechvlm.report.benchmark import table_of
from mechvlm.report.page import COUNTED, Section, page
from mechvlm.report.viar_parts import SHOWN
from mechvlm.report.write import written

Parts = Mapping[str, xr.Dataset]
INTERVALS = "In brackets: 95 % intervals, over draws of pictures with all their questions."
MARGIN = "Margins are log P(yes) - log P(no), in nats; yes is the positive answer."


def viar_page(found: Studied, folder: Path, about: Mapping[str, str]) -> Path:
    """Write the page of a study, whose parts lie in the folder `parts` beside it.

    Args:
        found: what `mv.methods.viar.study` returns.
        folder: gets viar.html, figures and tables.
        about: what is said of the page beside what the parts say of themselves; `made`, a date, among it.

    Returns:
        The page's path.
    """
    sections = []
    for name in found.asked:
        one = written(section(name, found.parts), folder)
        sections.append(replace(one, files=[f"parts/{name}.nc", *one.files]))
    first = next(iter(found.parts.values()))
    what = f"VIAR’s study of {first.attrs['model']}"
    said = f"{what}, with {found.about['items']} questions; {found.about['convention']} quantities"
    told = {name: str(value) for name, value in {**first.attrs, **found.about}.items()}
    path = folder / "viar.html"
    path.write_text(page(sections, {**told, **about}, what, said), encoding="utf-8")
    return path


def section(name: str, parts: Parts) -> Section:
    """The section of one part."""
    title, sentence, conventions = TEXTS[name]
    drawings, tables = SHOWN[name](parts)
    numbers: dict[str, Any] = {}
    if name == "statistics":
        edited = {"VIAR": "bias", "heads of neglect": "head_bias"}
        numbers["items"] = table_of({"base": parts["base"], **{one: parts[two] for one, two in edited.items()}})
        table = stats.comparison_table(parts["statistics"].sel(edit="VIAR"))
        numbers["comparison_table"] = table.reset_index(names="row")
    return Section(name, title, finding(name, parts), sentence, conventions, drawings, tables, numbers=numbers)


TEXTS: dict[str, tuple[str, str, str]] = {
    "profile": (
        "How much text rows look at the picture",
        "Attention that the rows behind the picture pay to it, layer by layer, and what they pay to position 0.",
        "Fractions, means over heads, rows and pictures; density_share is 0.5 where a key of the image gets as much as "
        f"any other. {COUNTED}",
    ),
    "zone": (
        "Is there a zone of neglect?",
        "A band of layers below both of its neighbours, chosen by half of the pictures and tested on the other half.",
        "A parabola is judged by layers that it was not fitted to, against a straight line. " + COUNTED,
    ),
    "heads": (
        "Heads of neglect, and specialists",
        "Each head’s mean attention to the picture; marks are one standard deviation below or above the mean of all.",
        f"Fractions. {COUNTED}",
    ),
    "collapse": (
        "Real pictures and null ones",
        "How alike what layers add, and what they hold, is with the real picture and with a null one; rows of text.",
        "Cosines of residual updates, before the final norm and after it; 1 is alike. Without another real picture to "
        "compare with, a cosine has no scale.",
    ),
    "gradients": (
        "How fast the answer stops depending on the picture",
        "The length of the gradient of the answer’s logit difference at each layer’s output.",
        "Logarithmic; the last layer’s is zero at all positions but the last, whatever the model does, and left out.",
    ),
    "base": ("What it answers", "The model as it is.", f"{MARGIN} {INTERVALS}"),
    "samples": (
        "Attention, and being right",
        "Correlation of each item’s attention to its picture with its answer being right, within each answer.",
        "Negative: more attention on wrong answers. p_max is corrected for the number of layers by permutation.",
    ),
    "bias": ("What the bias changes", "The bias in the chosen layers, all heads.", f"{MARGIN} {INTERVALS}"),
    "adaptive": (
        "Amounts by layer",
        "The bias with an amount for each layer: by the paper’s formula, and by that of its code.",
        f"{MARGIN} {INTERVALS}",
    ),
    "head_bias": ("The bias in heads of neglect", "In those heads alone.", f"{MARGIN} {INTERVALS}"),
    "when": (
        "In the prompt, or while answering",
        "Greedy answers in words, with the bias in the pass over the prompt, in the steps behind it, or in both.",
        "A text is changed where any letter is. The first token comes out of the pass over the prompt.",
    ),
    "doses": ("How much bias", "The bias at several amounts, beside a moved threshold.", f"{MARGIN}"),
    "layers": (
        "In which layers",
        "The bias in the chosen layers, before and behind them, each beside as many random layers.",
        "p is (1 + random sets that do as well) / (1 + random sets).",
    ),
    "contrast": (
        "Visual contrastive decoding",
        "The first token of a contrast with a ruined picture, with the bias in both branches and without.",
        f"{MARGIN} {INTERVALS}",
    ),
    "statistics": (
        "Is it more than another threshold?",
        "Every edit against the model as it is, and against its threshold moved until it says yes as often.",
        f"{INTERVALS} McNemar’s test takes items for independent, which questions about one picture are not.",
    ),
}
"""Of each part its title, what is shown, and in which units."""
