"""How gradients of attribution patching are taken: at the target, without one layer after the other, or along a path.

Rule this module guards: a way that cannot reach the nodes, or does not begin and end at the two prompts, is refused
before anything runs.

>>> [len(edits) for edits in drops_of("text", range(4), first=2)[0]]
[0, 2, 2]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.experiments.attributed_nodes import STREAM, Nodes
from mechvlm.experiments.exchange import layers_of
from mechvlm.experiments.inputs import PIXELS, input_sites
from mechvlm.experiments.paths import edits_to, path_points
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.sites import PATTERN_KINDS, Site, told
from mechvlm.vlm import VLM

METHODS = {
    "atp": "estimate: (source - target) times the metric's gradient at the target, to first order",
    "qk": "estimate: as atp; of queries and keys the change of the pattern times the metric's gradient there",
    "drop": "estimate: the size of atp's with one layer left out of the gradient, averaged over layers; no sign",
    "atp*": "estimate: as drop, with queries and keys as in qk; no sign",
    "ig": "estimate: (source - target) times the metric's gradient, averaged over the path from target to source",
}
PATHS = ("embed", "image_features", "pixels")
STEPS = 5
Held = dict[Any, Any]


@dataclass(frozen=True)
class Way:
    """How gradients are taken.

    Attributes:
        variants: the edits of each pass over the target.
        weights: what each pass counts.
        sized: whether the sizes of what each pass estimates are summed, or its signed values.
        rescored: whether the softmax is made anew for queries and keys.
        inputs: what is moved from the target's to the source's, along a path; none where gradients are at the target.
        kept: what one pass of a job leaves for the next, by ("source", site) and ("target", site).
    """

    variants: list[list[Edit]] = field(default_factory=lambda: [[]])
    weights: list[float] = field(default_factory=lambda: [1.0])
    sized: bool = False
    rescored: bool = False
    inputs: tuple[Site, ...] = ()
    kept: Held = field(default_factory=dict)


def dropped(gradient: Tensor) -> Tensor:
    """A gradient that does not flow.

    Example:
        >>> dropped(torch.ones(2)).tolist()
        [0.0, 0.0]
    """
    return torch.zeros_like(gradient)


def drops_of(tower: str, layers: Sequence[int], first: int) -> tuple[list[list[Edit]], list[float]]:
    """A pass for each layer, in which no gradient flows through what its attention and MLP add; and what each counts.

    Args:
        layers: all that can reach the answer.
        first: where the first node is. A layer before it changes no gradient there, so all of those are one pass.

    Example:
        >>> variants, weights = drops_of("text", range(4), first=2)
        >>> [len(edits) for edits in variants], weights
        ([0, 2, 2], [2.0, 1.0, 1.0])
    """
    behind = [layer for layer in layers if layer >= first]
    variants = [
        [Edit(Site(kind, layer, tower), dropped, on="grad", label="drop") for kind in ("attn_out", "mlp_out")]
        for layer in behind
    ]
    before = len(layers) - len(behind)
    return ([[], *variants], [float(before), *[1.0] * len(behind)]) if before else (variants, [1.0] * len(behind))


def path_of(inputs: Sequence[Site], shares: Sequence[float], kept: Held) -> list[list[Edit]]:
    """For each share of the way from the target to the source the edits that move the inputs there.

    Args:
        kept: where both runs' inputs will be once these have run.

    Example:
        >>> len(path_of([mv.Site("embed")], [0.25, 0.75], {}))
        2
    """
    return [edits_to({site: partial(_between, kept, key_of(site), share) for site in inputs}) for share in shares]


def _between(kept: Held, key: tuple, share: float) -> Tensor:
    target = kept["target", key]
    moved: Tensor = target + share * (kept["source", key] - target)
    return moved


def way_of(
    vlm: VLM, source: Prompt, target: Prompt, nodes: Nodes, method: str, asked: Mapping[str, Any]
) -> tuple[Way, dict[str, str | int | float]]:
    """How gradients are taken, and what a record says of it.

    Args:
        asked: steps, path and rule of a path, None where nothing was said.

    Raises:
        ValueError: for what cannot be; see `attribution_patching`.
    """
    if method not in METHODS:
        raise ValueError(f"method={told(method)} is not known; choose from {', '.join(map(repr, METHODS))}.")
    given = [name for name, value in asked.items() if value is not None]
    if given and method != "ig":
        raise ValueError(
            f"{given[0]}={told(asked[given[0]])} is of a path, and method={method!r} has none; say method='ig'."
        )
    how: dict[str, str | int | float] = {"method": method, "value": METHODS[method], "tower": nodes.tower}
    if method == "ig":
        return _path(vlm, source, target, nodes, asked, how)
    if method in ("qk", "atp*"):
        _check_rescored(vlm, nodes)
    if method in ("atp", "qk"):
        return Way(rescored=method == "qk"), how
    if nodes.tower == "qformer":
        raise ValueError(
            f"method={method!r} leaves out what a layer adds, and a Q-Former's norms stand behind its sums, so that no "
            "layer adds anything by itself; choose from 'atp', 'qk', 'ig'."
        )
    every = layers_of(vlm, nodes.tower, None)
    if len(every) < 2:
        raise ValueError(
            f"method={method!r} leaves out one layer of several, and this tower has {len(every)}; choose 'atp'."
        )
    first = min((layer if layer is not None else 0 for layer in (site.layer for site in nodes.sites)), default=0)
    variants, weights = drops_of(nodes.tower, every, first)
    how["passes"] = len(variants)
    return Way(variants, weights, sized=True, rescored=method == "atp*"), how


def _path(
    vlm: VLM, source: Prompt, target: Prompt, nodes: Nodes, asked: Mapping[str, Any], how: dict[str, str | int | float]
) -> tuple[Way, dict[str, str | int | float]]:
    """The path of integrated gradients."""
    path = "embed" if asked["path"] is None else asked["path"]
    rule = "midpoint" if asked["rule"] is None else asked["rule"]
    if path not in PATHS:
        raise ValueError(f"path={told(path)} is not known; choose from {', '.join(map(repr, PATHS))}.")
    shares, weights = path_points(STEPS if asked["steps"] is None else asked["steps"], rule)
    if nodes.tower != "text" and path != "pixels":
        raise ValueError(
            f"the path of {path!r} begins behind the {nodes.tower} tower, so no gradient reaches it; say path='pixels'."
        )
    if path != "embed" and not torch.equal(source.encoding["input_ids"], target.encoding["input_ids"]):
        raise ValueError(
            f"the words of source and target differ, and a path of {path!r} moves the picture alone; say path='embed', "
            "which moves both."
        )
    picture = tuple(input_sites(vlm, "image_features"))
    inputs = {
        "embed": (Site("embed"), *(picture if target.image else ())),
        "image_features": picture,
        "pixels": (PIXELS,),
    }
    way = Way(weights=weights, inputs=inputs[path])
    way = replace(way, variants=path_of(way.inputs, shares, way.kept))
    return way, {**how, "path": path, "steps": len(shares), "rule": rule}


def _check_rescored(vlm: VLM, nodes: Nodes) -> None:
    """Refuse to make a softmax anew key by key where an edit of the model's own stands behind it."""
    behind = [edit for edit in vlm.edits if edit.site.kind in PATTERN_KINDS and edit.bias is None]
    wrong = [edit for edit in behind if edit.site.tower == nodes.tower and edit.site.layer in nodes.held.get("k", ())]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is an edit of the model's own, and how it changes with one key is not known; leave 'k' or its "
            "layer out, or choose method='atp'."
        )


def passes_of(vlm: VLM, key: tuple) -> int:
    """In how many of the passes a node has a gradient: not in that which leaves its own layer out.

    Example:
        >>> passes_of(vlm, ("z", 3, "text")), passes_of(vlm, ("resid_pre", 3, "text"))
        (7, 8)
    """
    kind, layer, tower = key
    every = vlm.shape.live[tower]
    return every if layer is None or kind in STREAM else every - 1


def completeness_of(total: float, difference: float) -> dict[str, float]:
    """How far the estimates at a path's inputs are from summing to what the metric changes by along it.

    Example:
        >>> completeness_of(3.0, 4.0)
        {'completeness_gap': 1.0, 'completeness_gap_relative': 0.25}
    """
    gap = abs(total - difference)
    relative = gap / abs(difference) if difference else float("inf") if gap else 0.0
    return {"completeness_gap": gap, "completeness_gap_relative": relative}
