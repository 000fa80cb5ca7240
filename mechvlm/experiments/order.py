"""How much is lost when parts of a model go one after another, and does chance lose as much?

Rule this module guards: a set of parts is compared with random sets of the same count, since taking out any k heads
costs something.

>>> found = ablate_in_order(vlm, real, yes, [(0, 7), (3, 1)], controls=4)
>>> found.ranked.dims, found.random.dims
(('prompt', 'count'), ('prompt', 'sample', 'count'))
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit
from mechvlm.experiments.ablations import Part, ablated_to, all_parts, parts_of, parts_out
from mechvlm.experiments.examples import (
    Points,
    PositionsOf,
    about,
    averaged,
    checked_objective,
    labelled,
    metric_of_each,
    p_values,
    said_of,
    swept,
    swept_and_clean,
    unit_of,
)
from mechvlm.experiments.means import To
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.sites import told, whole, whole_numbers
from mechvlm.vlm import VLM


def strongest(effects: xr.DataArray, count: int, objective: str = "lower") -> list[Part]:
    """The parts that change a metric the most, the strongest first.

    Args:
        effects: over layer and head, or layer: `ablate_each(...)["mean"]`, or what `ablate_each_head` returns.
        count: how many.
        objective: "lower": those whose ablation lowers the metric the most; "higher": those that raise it the most.

    Returns:
        Pairs of layer and head, or single layers as tuples; of equal ones the first in the model.

    Raises:
        ValueError, TypeError: for an array with other axes, or more parts than there are.

    Example:
        >>> mv.strongest(mv.ablate_each(vlm, real, yes, layers=[0, 1])["mean"], 2)
        [(0, 7), (1, 3)]
    """
    axes = ("layer", "head")
    if not isinstance(effects, xr.DataArray) or effects.dims not in (axes, axes[:1]):
        held = ", ".join(map(str, effects.dims)) or "no axes" if isinstance(effects, xr.DataArray) else told(effects)
        raise TypeError(
            f"strongest takes effects over layer and head, or layer, and was given {held}; take the mean over prompts, "
            'ablate_each(...)["mean"].'
        )
    if not 1 <= whole("count", count) <= effects.size:
        raise ValueError(f"count={count} parts cannot be taken of {effects.size}; give a number from 1 to that.")
    values = effects.values.astype(float).ravel()
    signed = values if checked_objective(objective) == "lower" else -values
    order = np.argsort(signed, kind="stable")[:count]
    places = np.unravel_index(order, effects.shape)
    along = [effects[dim].values[at] for dim, at in zip(effects.dims, places, strict=True)]
    return [tuple(int(one) for one in part) for part in zip(*along, strict=True)]


def ablate_in_order(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    order: Sequence[Any],
    what: str = "head",
    to: To = None,
    positions: PositionsOf = None,
    counts: Sequence[int] | None = None,
    candidates: Sequence[Any] | None = None,
    controls: int = 20,
    seed: int = 0,
    objective: str = "lower",
    clusters: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """A metric while more and more parts of the model are taken out, in an order and in random orders.

    The order must come from other prompts than those it is tested on: the strongest heads of a few prompts are strong
    there by chance as well.

    Args:
        metric, what, to, positions, clusters, batch_size, out: as in `ablate_each`.
        order: parts, the first goes first: pairs of layer and head, or layers, as `strongest` gives them.
        counts: how many are taken out; by default none, 1, 2, ... and all of the order.
        candidates: of which parts random orders are drawn; by default all of the model, those of the order among them.
        controls: how many random orders, the same ones for each prompt.
        seed: of the random orders.
        objective: whether taking parts out is to make the metric "lower" or "higher".

    Returns:
        `ranked`, the metric over axes prompt and count; its `mean` over prompts with `low` and `high`, the ends of the
        95% interval; `random`, over prompt, sample and count; all in the metric's unit. `p_value`, over count: the
        share of random sets whose mean over prompts is as low (or high), with the set itself counted among them, so
        that 20 controls give 1/21 at the least. `attrs` hold the order.

    Raises:
        ValueError, TypeError: for parts, counts or candidates that are not there.

    Example:
        >>> found = mv.ablate_in_order(vlm, real, yes, [(0, 7), (1, 3)], controls=3)
        >>> mv.plot.ablation_order(found, title="Two heads against chance")

    Source:
        Michel et al. (2019), "Are Sixteen Heads Really Better than One?", section 4, takes heads out in the order of
        a score; random sets of the same count, their intervals and p-values are added.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics, ranked = metric_of_each(metric, asked), parts_of(what, order)
    taken = _counts(counts, len(ranked))
    orders = [ranked, *_drawn(vlm, what, candidates, len(ranked), controls, seed)]
    checked_objective(objective)

    def points(prompt: Prompt) -> Points:
        edits = parts_out(vlm, prompt, what, to, positions)

        def first_of(sample: int, count: int) -> list[Edit]:
            return edits(orders[sample + 1][:count])

        return first_of

    found = swept(vlm, asked, points, metrics, batch_size, out, sample=range(-1, controls), count=taken)
    mine, random = found.sel(sample=-1, drop=True), found.sel(sample=slice(0, None))
    unit = unit_of(metrics)
    more = {"ablated": what, "ablated_to": ablated_to(to), "positions": said_of(positions), "objective": objective}
    more["engine"] = found.attrs["engine"]
    attrs = about(vlm, asked, metrics, clusters, **more, order=said(ranked), controls=controls, seed=seed)
    values = labelled({"ranked": mine, "random": random, **averaged(mine, clusters)}, attrs["metric"], unit)
    result = xr.Dataset({**values, "p_value": p_values(mine, random, objective)}, attrs=attrs)
    return result.assign_coords(count=("count", taken, {"long_name": f"{_plural(what)} taken out"}))


def ablate_all_but(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    parts: Sequence[Any],
    what: str = "head",
    to: To = None,
    positions: PositionsOf = None,
    candidates: Sequence[Any] | None = None,
    controls: int = 20,
    seed: int = 0,
    objective: str = "lower",
    clusters: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """What each part of a set brings back when all the others of the set are taken out (leave-one-out).

    A part whose work another one does as well changes nothing when it goes alone; here it shows.

    Args:
        parts: the set, as `order` of `ablate_in_order`; the other arguments are as there.

    Returns:
        `effect`, over axes prompt and part: the metric with all of the set but this part taken out, minus the metric
        with all of it taken out; its `mean`, `low` and `high` over prompts. `all_out` and `clean`, over prompt: the
        metric with all of the set taken out, and with none. `random`, over prompt and sample: with random sets of the
        same count taken out, and `p_value`, as in `ablate_in_order`. Parts are named "layer.head", or by the layer.

    Raises:
        ValueError, TypeError: as `ablate_in_order`.

    Example:
        >>> mv.ablate_all_but(vlm, real, yes, [(0, 7), (1, 3)], controls=3).part.values.tolist()
        ['0.7', '1.3']

    Source:
        Wang et al. (2023), "Interpretability in the Wild", section 4: a component's part in a circuit is judged with
        other components out as well (minimality), since they make up for it in the whole model.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics, whole_set = metric_of_each(metric, asked), parts_of(what, parts)
    left = [whole_set[:at] + whole_set[at + 1 :] for at in range(len(whole_set))]
    sets = [whole_set, *left, *_drawn(vlm, what, candidates, len(whole_set), controls, seed)]
    checked_objective(objective)

    def points(prompt: Prompt) -> Points:
        edits = parts_out(vlm, prompt, what, to, positions)

        def out_of(parts: int) -> list[Edit]:
            return edits(sets[parts])

        return out_of

    found, clean = swept_and_clean(vlm, asked, points, metrics, batch_size, out, parts=range(len(sets)))
    ends = 1 + len(left)
    all_out = found.isel(parts=0, drop=True)
    kept = found.isel(parts=slice(1, ends)).rename(parts="part").assign_coords(part=[name(one) for one in whole_set])
    random = found.isel(parts=slice(ends, None)).rename(parts="sample").assign_coords(sample=np.arange(controls))
    effect = kept - all_out
    more = {"ablated": what, "ablated_to": ablated_to(to), "positions": said_of(positions), "objective": objective}
    more["engine"] = found.attrs["engine"]
    attrs = about(vlm, asked, metrics, clusters, **more, parts=said(whole_set), controls=controls, seed=seed)
    unit = unit_of(metrics)
    metric_values = {"all_out": all_out, "clean": clean, "random": random}
    values = labelled(metric_values, attrs["metric"], unit)
    values |= labelled({"effect": effect, **averaged(effect, clusters)}, f"brought back by one {what}", unit)
    return xr.Dataset({**values, "p_value": p_values(all_out, random, objective)}, attrs=attrs)


def name(part: Part) -> str:
    """A part's name: `3.5` is head 5 of layer 3.

    Example:
        >>> name((3, 5)), name((3,))
        ('3.5', '3')
    """
    return ".".join(map(str, part))


def said(parts: Sequence[Part]) -> str:
    """Parts in words, for a record."""
    return ", ".join(map(name, parts))


def _plural(what: str) -> str:
    return {"head": "heads", "attention": "attention blocks", "mlp": "MLPs", "layer": "layers"}[what]


def _counts(counts: Sequence[int] | None, total: int) -> list[int]:
    """How many parts are taken out, rising."""
    if counts is None:
        return list(range(total + 1))
    found = sorted(set(whole_numbers("counts", counts)))
    if not found or found[0] < 0 or found[-1] > total:
        raise ValueError(f"counts={told(counts)} cannot be taken from {total} parts; give numbers from 0 to that.")
    return found


def _drawn(
    vlm: VLM, what: str, candidates: Sequence[Any] | None, count: int, controls: int, seed: int
) -> list[list[Part]]:
    """Random orders of so many parts."""
    pool = all_parts(vlm, what) if candidates is None else parts_of(what, candidates)
    if whole("controls", controls) < 1:
        raise ValueError(f"controls={controls} compares with nothing; give 1 random set or more.")
    if count > len(pool):
        raise ValueError(f"{count} parts cannot be drawn of {len(pool)} candidates; give more candidates.")
    draw = np.random.default_rng(seed)
    return [[pool[at] for at in draw.permutation(len(pool))[:count]] for _ in range(controls)]
