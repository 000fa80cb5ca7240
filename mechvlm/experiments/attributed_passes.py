"""The passes that estimates are made of: differences of two runs, times gradients of one run or of several.

Rule this module guards: no activation leaves where the model runs. What is summed over the last axis, and over the
positions of a node, is summed there, for each pass before its size is taken, since a patch is of all of a node at once.

>>> nodes = Nodes.of(vlm, null, ["z"], [3], "text", "each", given=True)
>>> from mechvlm.rounds import done
>>> list(done(vlm, estimated(vlm, real, null, yes, nodes, Way(), None))[2])
[('z', 3, 'text')]
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.experiments.attributed_nodes import FEATURES, STREAM, Nodes
from mechvlm.experiments.attributed_ways import Held, Way
from mechvlm.experiments.rescored import heads_of, key_changes, query_changes
from mechvlm.experiments.sweep import asked_of, numbers, rows_for
from mechvlm.lazy_attention import Attention
from mechvlm.metrics import Metric
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.readings import lazy
from mechvlm.rounds import Work
from mechvlm.sites import Site
from mechvlm.vlm import VLM

FIXED = ("q", "k")
"""The kinds whose softmax can be made anew."""
Products = dict[tuple, Tensor]


def estimated(
    vlm: VLM, source: Prompt, target: Prompt, metric: Metric, nodes: Nodes, way: Way, size: int | None
) -> Work[tuple[float, float, dict[Any, np.ndarray]]]:
    """The metric of both prompts, and estimates by site, over position, span or key.

    Args:
        way: where it is a path, what is estimated at its inputs is under "inputs", summed.
        size: passes in one batch; by default a quarter of a sweep's.
    """
    measure, kept = vlm.metric(metric), way.kept
    anew: dict[tuple, list[str]] = {}
    for site in nodes.sites if way.rescored else ():
        if site.kind in FIXED:
            anew.setdefault(("pattern", site.layer, site.tower), []).append(site.kind)
    sites = [site for site in nodes.sites if not (way.rescored and site.kind in FIXED)]
    plain = dict.fromkeys([*sites, *nodes.added, *way.inputs])
    places = None if nodes.places is None else list(nodes.places.values())
    made: dict[Site, Any] = {
        Site(*key): lazy(partial(_rescored, kept, key, kinds, places)) for key, kinds in anew.items()
    }
    passes = max(1, rows_for(target) // 4) if size is None else size
    about = {
        "sites": [key_of(site) for site in sites],
        "added": [key_of(site) for site in nodes.added],
        "inputs": [key_of(site) for site in way.inputs],
        **{"anew": anew, "sized": way.sized, "length": nodes.length, "image": nodes.image, "keyed": nodes.keyed},
        "places": places,
    }
    add = partial(_add, about, kept, {}, list(way.weights), passes)
    one = {"value": partial(metric_values, measure)}
    read = {**plain, **dict.fromkeys(made, lazy(heads_of))}
    asked: list[Mapping[str, Any]] = [{"prompt": source, "read": read, "reduce": partial(_keep, kept, "source"), **one}]
    if way.inputs:
        asked.append({"prompt": target, "read": plain, "reduce": partial(_keep, kept, "target"), **one})
    asked += asked_of(target, way.variants, {**plain, **made}, passes, measure, add, one["value"])
    start, end, *more = yield asked
    last: Any = [end, *more][-1]
    ends: list[Any] = [start.metric, end.metric]
    return float(ends[0][0]), float(ends[1][0]), {key: numbers(x) for key, x in last.reduced.items()}


def _keep(kept: Held, whose: str, read: Held, _gradients: Held) -> None:
    """Leave what a run read to the next."""
    for key, value in read.items():
        kept[whose, key] = value


def _rescored(
    kept: Held, key: tuple, kinds: Sequence[str], places: Sequence[Sequence[int]] | None, attention: Attention
) -> tuple[Tensor, ...]:
    """The changes by queries and by keys of one layer, `batch place head`, once the gradient is known."""
    if attention.z_gradient is None:
        return tuple(attention.q.new_zeros(attention.q.shape[0], 1) for _ in kinds)
    q, k = kept["source", key]
    found = [query_changes(attention, q) if kind == "q" else key_changes(attention, k, places) for kind in kinds]
    return tuple(one.transpose(1, 2) for one in found)


def _add(about: Held, kept: Held, total: Held, left: list, passes: int, read: Held, gradients: Held) -> Held | None:
    """Add what a batch of passes estimates; all of it is returned after the last one."""
    own = left[:passes]
    del left[:passes]
    for row, weight in enumerate(own):
        known = {key: _row(held, row, len(own)) for key, held in gradients.items()}
        last, products = not left and row == len(own) - 1, {}
        for key in [key for key in known if key not in about["anew"]]:
            there = kept["target", key] if about["inputs"] else _row(read[key], row, len(own))
            given = kept.pop(("source", key)) if last else kept["source", key]
            products[key] = _product(given, there, known[key])
        found = {key: _at_nodes(about, key, products) for key in about["sites"]}
        for (_, *where), kinds in about["anew"].items():
            for kind, value in zip(kinds, known["pattern", *where], strict=True):
                by_position = value.double().sum(0)
                found[kind, *where] = by_position if kind == "k" else _under(about["places"], by_position)
        if about["inputs"]:
            found["inputs"] = torch.stack(
                [products[key].sum(dtype=torch.float64).cpu() for key in about["inputs"]]
            ).sum()
        for key, value in found.items():
            total[key] = total.get(key, 0.0) + weight * (value.abs() if about["sized"] else value)
    return None if left else total


def _product(source: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """The difference of two activations times a gradient, in 32 bits at least; its sums are in 64."""
    wide = torch.promote_types(source.dtype, torch.float32)
    return (source.to(wide) - target.to(wide)).mul_(gradient.to(wide))


def _row(held: Any, row: int, rows: int) -> Any:
    """One row's part of a reading, or of several."""
    if isinstance(held, list):
        return held[row]
    return tuple(one.chunk(rows)[row] for one in held) if isinstance(held, tuple) else held.chunk(rows)[row]


def _at_nodes(about: Held, key: tuple, products: Products) -> Tensor:
    """The products at a site, summed over all that a patch of a node changes, over position, span or key, and head."""
    kind, layer = key[:2]
    added = [
        products[other].sum(-1, dtype=torch.float64).flatten().to(products[key].device)
        for other in about["added"]
        if kind in (*STREAM, FEATURES) and (layer is None or other[1] >= layer)
    ]
    if kind != FEATURES:
        found = products[key].sum(-1, dtype=torch.float64).sum(0)  # all tiles of a picture together
        if added:
            found[about["image"]] += torch.stack(added).sum(0)
        return _under(about["places"], found)
    tokens = torch.stack([products[key].sum(-1, dtype=torch.float64).flatten(), *added]).sum(0)
    if about["keyed"]:
        return tokens
    found = tokens.new_zeros(about["length"])
    found[about["image"]] = tokens
    return _under(about["places"], found)


def _under(places: Sequence[Sequence[int]] | None, values: Tensor) -> Tensor:
    """Values by position as they are, or summed under each name."""
    return values if places is None else torch.stack([values[list(some)].sum(0) for some in places])
