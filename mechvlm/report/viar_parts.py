"""Figures and tables of each part of VIAR's study, for its page.

Rule this module guards: a figure is drawn of the part's own numbers, and of nothing that is not in its file.

>>> found = mv.methods.viar.study(vlm, items=24, parts=["heads"], pictures=4)
>>> len(SHOWN["heads"](found.parts)[0])
1
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from mechvlm import plot
from mechvlm.evaluate import stats
from mechvlm.evaluate.verdicts import SENTENCES
from mechvlm.methods.outcomes import compared
from mechvlm.methods.wording import with_interval
from mechvlm.report.page import Drawing, Table, listed

Parts = Mapping[str, xr.Dataset]
Shown = tuple[Sequence[Drawing], Sequence[Table]]
ENDS = ("value", "low", "high")


def _profile(parts: Parts) -> Shown:
    found = parts["profile"]
    quantities = [str(one) for one in found.quantity.values]
    fine = {"density": 6}  # weights of single keys
    rows = [
        [int(layer), *(with_interval(*_three(found, int(layer), one), digits=fine.get(one, 3)) for one in quantities)]
        for layer in found.layer.values
    ]
    alt = f"Attention to the image by layer: {listed(found['mean'].sel(quantity='mass'))}."
    figure = plot.layer_spans(found, title="Attention to the image, and to position 0")
    return [Drawing(alt, figure)], [Table("Four numbers called visual attention", ["layer", *quantities], rows)]


def _three(found: xr.Dataset, layer: int, quantity: str) -> list[float]:
    return [float(found[end].sel(layer=layer, quantity=quantity)) for end in ("mean", "low", "high")]


def _zone(parts: Parts) -> Shown:
    found = parts["zone"]
    figure = plot.zone_curve(found, title="Is there a zone?")
    return [Drawing(f"The curve by layer: {listed(found['mean'])}.", figure)], []


def _heads(parts: Parts) -> Shown:
    figure = plot.head_matrix(parts["heads"], title="Attention to the image, head by head")
    return [Drawing("Map of attention to the image by layer and head, with marks.", figure)], []


def _collapse(parts: Parts) -> Shown:
    found = parts["collapse"]
    values = {"update_cosine": "What layers add", "state_cosine": "What layers hold"}
    return [
        Drawing(f"{title}, real and null: cosines by layer.", plot.collapse_curves(found, value, "text", title=title))
        for value, title in values.items()
    ], []


def _gradients(parts: Parts) -> Shown:
    found = parts["gradients"]
    spans = [name for name in ("image", "question") if name in found.span.values]
    titles = {"gradient_norm": "Length of the gradient", "relative": "Gradient times state"}
    return [
        Drawing(f"{title} by layer.", plot.gradient_decay(found, value, spans, title=title))
        for value, title in titles.items()
    ], []


def _base(parts: Parts) -> Shown:
    found = parts["base"].isel(item=stats.first_asked(parts["base"]))
    scored = stats.scores(found.label.values, found.predicted.values, found.image.values)
    rows = [
        [str(metric).replace("_", "-"), with_interval(*(scored[end].sel(metric=metric) for end in ENDS))]
        for metric in scored["metric"].values
        if np.isfinite(float(scored["value"].sel(metric=metric)))
    ]
    sure = stats.reliability(found.p_yes.values, found.label.values)
    moved = stats.threshold_sweep(found.margin.values, found.label.values)
    drawings = [
        Drawing("Share of right answers by confidence.", plot.reliability_diagram(sure, title="How sure, how right")),
        Drawing("Accuracy as the threshold moves.", plot.threshold_curve(moved, title="Another threshold")),
    ]
    return drawings, [Table("Scores", ["", "value"], rows)]


def _samples(parts: Parts) -> Shown:
    found = parts["samples"]
    if "measure" not in found.dims:
        return [], []
    both = xr.concat([found.right, found.wrong], xr.Variable("answer", ["right", "wrong"])).rename("attention mass")
    r = plot.association(found, title="Attention and being right")
    r.update_xaxes(type="category")  # or plotly leaves out the zone among numbers
    means = plot.lines(both, "measure", "answer", title="Attention on right and on wrong answers")
    return [Drawing("Correlations by layer.", r), Drawing("Attention by layer, right and wrong.", means)], []


def _edit(parts: Parts, edited: xr.Dataset, name: str) -> Shown:
    """What one edit changes: figures and the table of a comparison."""
    found = compared(parts, edited, name)
    found = found.assign_attrs({said: str(found[said].item()) for said in SENTENCES if said in found})
    found = found.assign_attrs(items=edited.sizes["item"])
    table = stats.comparison_table(found)
    rows = [[row, *map(str, cells)] for row, cells in zip(table.index, table.to_numpy().tolist(), strict=True)]
    drawings = [
        Drawing(f"What {name} changes in each score.", plot.comparison(found, title=f"What it changes: {name}")),
        Drawing("Accuracy against the share of yes.", plot.threshold_curve(found, title=f"Beside a threshold: {name}")),
        Drawing("How right by how sure.", plot.reliability_diagram(found, title=f"How sure: {name}")),
    ]
    return drawings, [Table(f"Comparison: {name}", ["", *map(str, table.columns)], rows)]


def _bias(parts: Parts) -> Shown:
    return _edit(parts, parts["bias"], "VIAR")


def _head_bias(parts: Parts) -> Shown:
    return _edit(parts, parts["head_bias"], "heads of neglect")


def _adaptive(parts: Parts) -> Shown:
    each = parts["adaptive"]
    return _joined([_edit(parts, each.sel(edit=one), f"adaptive, {one}") for one in map(str, each.edit.values)])


def _contrast(parts: Parts) -> Shown:
    each = parts["contrast"]
    return _joined([_edit(parts, each.sel(edit=one), one) for one in map(str, each.edit.values)])


def _joined(each: Sequence[Shown]) -> Shown:
    return [drawing for one in each for drawing in one[0][:2]], [table for one in each for table in one[1]]


def _when(parts: Parts) -> Shown:
    found = parts["when"]
    plain = found.sel(edit="none")
    changed = (found.answer != plain.answer).astype(float).mean("item")
    turned = (found.predicted != plain.predicted).sum("item")
    rows = [
        [str(name), f"{float(changed.sel(edit=name)):.3f}", int(turned.sel(edit=name))]
        + [
            f"{float(found.correct.sel(edit=name).astype(float).mean()):.4f}",
            str(found.answer.sel(edit=name).values[0]),
        ]
        for name in found.edit.values
    ]
    columns = ["bias", "texts changed", "answers turned", "accuracy", "first answer"]
    return [], [Table(f"{found.sizes['item']} answers in words, by when the bias acts", columns, rows)]


def _doses(parts: Parts) -> Shown:
    figure = plot.dose_curves(parts["doses"], title="How much bias")
    return [Drawing("Accuracy, threshold and share of yes by amount.", figure)], []


def _layers(parts: Parts) -> Shown:
    found = parts["layers"]
    titles = {"accuracy": "Accuracy", "beyond": "Above the moved threshold"}
    return [
        Drawing(f"{title} of each set of layers, and of random ones.", plot.layer_controls(found, name, title=title))
        for name, title in titles.items()
    ], []


def _statistics(parts: Parts) -> Shown:
    found, rows = parts["statistics"], []
    for name in map(str, found.edit.values):
        one = found.sel(edit=name, metric="accuracy")
        test = float(one.mcnemar_p_exact)
        cells = [name, int(one.n_items), with_interval(one.value.sel(model="edited"))]
        cells.append(with_interval(one.difference, one.difference_low, one.difference_high, sign="+"))
        cells.append(with_interval(one.advantage, one.advantage_low, one.advantage_high, sign="+"))
        rows.append([*cells, f"{int(one.only_base)} / {int(one.only_edited)}", f"{test:.3g}" if test == test else "-"])
    over = found.sel(metric="accuracy", drop=True)
    ahead = over.advantage.assign_attrs(long_name="accuracy above the moved threshold")
    figure = plot.bars(
        ahead.rename("advantage"),
        "edit",
        band=(over.advantage_low, over.advantage_high),
        title="More than a threshold?",
    )
    columns = [
        "edit",
        "questions",
        "accuracy",
        "edited - base",
        "edited - threshold moved",
        "right in one",
        "McNemar p",
    ]
    drawings = [
        Drawing("What each edit adds to a moved threshold.", figure),
        *_edit(parts, parts["bias"], "VIAR")[0][:1],
    ]
    return drawings, [Table("Every edit", columns, rows), *_edit(parts, parts["bias"], "VIAR")[1]]


SHOWN: dict[str, Callable[[Parts], Shown]] = {
    **{"profile": _profile, "zone": _zone, "heads": _heads, "collapse": _collapse, "gradients": _gradients},
    **{"base": _base, "samples": _samples, "bias": _bias, "adaptive": _adaptive, "head_bias": _head_bias},
    **{"when": _when, "doses": _doses, "layers": _layers, "contrast": _contrast, "statistics": _statistics},
}
"""What draws each part."""
