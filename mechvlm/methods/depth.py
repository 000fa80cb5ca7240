"""Do answers that look less at the picture go wrong more? Attention of each item against whether its answer is right.

Rule this module guards: what tells "yes" from "no" is not told from what tells right from wrong until answers of each
kind are looked at by themselves, and many layers are many tests.

>>> item_attention(vlm, mv.evaluate.read_pope("demo", "random")[:2]).sizes
Frozen({'item': 2, 'layer': 8})
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.evaluate import read_pope, stats
from mechvlm.experiments.published import published
from mechvlm.experiments.record import record
from mechvlm.experiments.sight import own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.methods.asked import prompt_of
from mechvlm.methods.published import ZONE
from mechvlm.prompt import Prompt
from mechvlm.readings import Mass, lazy, mass
from mechvlm.rounds import unsaid
from mechvlm.sites import Site, told, whole_numbers
from mechvlm.vlm import VLM

ZONE_NAME = "zone"


def depth_correlation(
    evaluation: xr.Dataset,
    attention: xr.DataArray,
    zone: Sequence[int] | None = None,
    permutations: int = 5000,
    seed: int = 0,
    convention: str | None = None,
) -> xr.Dataset:
    """How much attention to the picture goes with the answer being right, layer by layer and over a zone.

    Args:
        evaluation: what `mv.evaluate.pope` returns.
        attention: what each item's rows pay to its picture, over item (or prompt) and layer, in the evaluation's order
            or with its numbers along item: `item_attention`, or `vis_l` of `mv.layer_profile` at one quantity.
        zone: layers whose mean is one more test; None: none.
        permutations, seed: of the permuted answers; see `mv.evaluate.stats.associate`.
        convention: None looks at each predicted answer by itself (`r_within` is what is tested), takes questions about
            one picture together (p-values by `associate`'s draws of signs), corrects for the number of layers, and
            counts repeated questions once. "viar-2026" correlates all items together, corrects
            nothing and averages layers 8 to 16 where no zone is given.

    Returns:
        Over measure, the layers and "zone": what `associate` returns (`d` under the published convention with the
        published deviation, of both groups alike), and `says`, the finding in words, with the r of each answer by
        itself. A negative r means more attention to the picture on wrong answers.

    Raises:
        ValueError: for attention of other items, an evaluation without its questions, or a zone
            that is not among its layers.
        TypeError: for what is no evaluation or no array of items by layers.

    Example:
        >>> asked = mv.evaluate.read_pope("demo", "adversarial")[:150]
        >>> base, attention = mv.evaluate.pope(vlm, asked), item_attention(vlm, asked)  # doctest: +SKIP
        >>> mv.methods.viar.depth_correlation(base, attention, zone=[2, 3, 4]).says.values  # doctest: +SKIP

    Source:
        VIAR's per-sample correlation (`persample_correlation`), read there with the opposite sign.
    """
    old = published(convention)
    if isinstance(attention, xr.DataArray) and "prompt" in attention.dims:
        attention = attention.drop_vars("prompt", errors="ignore").rename(prompt="item")
    _check(evaluation, attention, old)
    if "item" in attention.coords:
        attention = attention.sel(item=evaluation["item"].values)
    chosen = list(ZONE) if old and zone is None else None if zone is None else list(whole_numbers("zone", zone))
    table = _measures(attention, chosen)
    if old:
        answers, more = evaluation, {}
    else:
        once = stats.first_asked(evaluation)
        answers, table = evaluation.isel(item=once), table.isel(item=once)
        more = {"strata": answers.predicted.values, "clusters": answers.image.values}
    found = stats.associate(table, answers.correct.values, permutations=permutations, seed=seed, **more)
    right = answers.correct.values.astype(bool)
    if old:
        found = found.assign(d=("measure", [_published_d(row, right) for row in table.values.T]))
    found = found.assign(right=table.isel(item=right).mean("item"), wrong=table.isel(item=~right).mean("item"))
    said = [_said(found.sel(measure=name), str(name)) for name in found.measure.values]
    about = {"sign": "a negative r: more attention to the picture on wrong answers", "items": int(table.sizes["item"])}
    return found.assign(says=("measure", said)).assign_attrs(**about, convention=convention or "corrected")


def item_attention(
    vlm: VLM,
    questions: Any,
    images: Any = None,
    split: str | Sequence[str] | None = None,
    template: str = "{question}",
    convention: str | None = None,
) -> xr.DataArray:
    """What the rows behind the picture pay to it, for each question of an evaluation and each layer.

    Args:
        questions, images, split, template: as in `mv.evaluate.pope`.
        convention: "viar-2026" takes columns 0 to N-1 for the picture and rows N and on for the text, and divides by N:
            what was published is density, the mean over keys.

    Returns:
        Attention mass from 0 to 1, averaged over rows and heads, over item and layer; under the published convention
        attention density. A repeated question is read once.

    Example:
        >>> item_attention(vlm, mv.evaluate.read_pope("demo", "random")[:1]).values.round(1)[0, :2].tolist()
        [0.7, 0.7]

    Source:
        VIAR's `neglect_depth` and `layer_text2vis`, which differ from this by the convention.
    """
    old, own, found = published(convention), own_layers(vlm), dict[int, np.ndarray]()
    items, prompts = list(read_pope(questions, split)), list[Prompt]()
    fresh = [item for item in items if item.duplicate_of == item.number]

    def asked() -> Iterator[dict[str, Any]]:
        for item in fresh:
            prompts.append(prompt_of(vlm, item, images, template))
            count, size = len(prompts[-1].image), len(prompts[-1])
            keys = list(range(count)) if old else prompts[-1].image
            text = list(range(count, size)) if old else prompts[-1].question + prompts[-1].last
            reading = lazy(partial(_paid, mass({"image": keys}, queries=text)))
            yield {"prompt": prompts[-1], "read": {Site("pattern", layer): reading for layer in own}, "value": unsaid}

    for number, (item, run) in enumerate(zip(fresh, vlm.runs(asked()), strict=True)):
        paid = np.array([numbers(run[Site("pattern", layer)][0]) for layer in own])
        found[item.number] = paid / len(prompts[number].image) if old else paid
    named = {"long_name": "attention density", "units": "1/key"} if old else {"long_name": "attention mass"}
    about = {"units": "fraction", **named, "convention": convention or "corrected"}
    values = np.stack([found[item.duplicate_of] for item in items])
    coords = {"item": [item.number for item in items], "layer": own}
    return xr.DataArray(values, coords, ["item", "layer"], "attention", {**record(vlm, prompts[:1]), **about})


def _paid(reading: Mass, attention: Attention) -> Float[Tensor, " 1"]:
    """What one layer's rows pay, on average over them and over heads."""
    return reading.of(attention, "pattern").float().mean()[None]


def _published_d(values: np.ndarray, right: np.ndarray) -> float:
    """Cohen's d as published, right above wrong; not a number where nothing varies, or one group has no two items."""
    groups = values[~right], values[right]
    if min(map(len, groups)) < 2 or not any(np.ptp(group) for group in groups):
        return float("nan")
    return stats.cohens_d(*groups, convention="viar-2026")


def _check(evaluation: Any, attention: Any, old: bool) -> None:
    if not isinstance(evaluation, xr.Dataset) or not {"correct", "predicted", "image"} <= set(evaluation.variables):
        raise TypeError(f"{told(evaluation)} is no evaluation; make it with mv.evaluate.pope.")
    if not isinstance(attention, xr.DataArray) or set(attention.dims) != {"item", "layer"}:
        held = ", ".join(map(str, attention.dims)) if isinstance(attention, xr.DataArray) else type(attention).__name__
        raise TypeError(f"attention is an array of item by layer, and {held} was given; average the other dims first.")
    if attention.sizes["item"] != evaluation.sizes["item"]:
        raise ValueError(
            f"there is attention of {attention.sizes['item']} items, and the evaluation has "
            f"{evaluation.sizes['item']}; give both for the same questions in the same order."
        )
    if not old and "question" not in evaluation.variables:
        raise ValueError(
            "the evaluation has no questions, so repeated ones cannot be told; give it question, as mv.evaluate.pope "
            "does."
        )
    if "item" in attention.coords and sorted(attention["item"].values) != sorted(evaluation["item"].values):
        raise ValueError(
            "attention and the evaluation number their items otherwise; give both for the same questions, or drop the "
            "numbers with attention.drop_vars('item')."
        )


def _measures(attention: xr.DataArray, zone: list[int] | None) -> xr.DataArray:
    """Attention of each item in each layer, and its mean over the zone."""
    layers = attention.layer.values.tolist() if "layer" in attention.coords else list(range(attention.sizes["layer"]))
    outside = [layer for layer in zone or () if layer not in layers]
    if outside or zone == []:
        raise ValueError(
            f"zone={told(zone)} is not among the layers {layers[0]} to {layers[-1]}; give at least one of them."
        )
    along = attention.transpose("item", "layer").values.astype(float)
    names = [str(layer) for layer in layers]
    if zone:
        mean = along[:, [layers.index(layer) for layer in zone]].mean(1, keepdims=True)
        along, names = np.concatenate([along, mean], 1), [*names, ZONE_NAME]
    return xr.DataArray(along, dims=["item", "measure"], coords={"measure": names}, name="attention")


def _said(one: xr.Dataset, name: str) -> str:
    """The finding of one measure, in words."""
    where = name if name == ZONE_NAME else f"layer {name}"
    old = "r_within" not in one
    r, p = float(one.r if old else one.r_within), float(one.p if old else one.p_max)
    if not np.isfinite(r):
        return f"{where}: attention does not vary."
    if not np.isfinite(p):
        return f"{where}: an association cannot be told from none on one picture (r = {r:+.3f})."
    how = "uncorrected, answers of both kinds together"
    if not old:
        each = [f"{float(one.r_stratum.sel(stratum=kind)):+.3f} in {kind}" for kind in one.stratum.values]
        how = f"over pictures, corrected for all layers, pooled over kinds of answer; {', '.join(each)}"
    direction = "more" if r < 0 else "less"
    known = (
        f"{direction} attention to the picture on wrong answers"
        if p < 0.05
        else "no association that is told from none"
    )
    return f"{where}: {known} (r = {r:+.3f}, p = {p:.3g}; {how})."
