"""The passes that each way of scoring edges asks for, and what each of them counts for.

Rule this module guards: gradients are averaged along a way from the target to the source that ends at both, and the
points on it have names.

>>> [site.kind for site in entering(vlm, real)]
['resid_pre']
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.edge_products import Graph, Turn
from mechvlm.experiments.paths import path_points
from mechvlm.experiments.sight import deepstack_layers
from mechvlm.metrics import Metric
from mechvlm.passes import pass_of
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.reads import raw_sites, stream_sites
from mechvlm.sites import Site
from mechvlm.vlm import VLM
from mechvlm.writes import write_sites

METHODS = ("eap", "eap-ig", "clean-corrupted", "ig-activations", "information-flow-routes", "exact")
ALONG = ("eap-ig", "ig-activations")
"""Those that take gradients at points on a path."""


def turns_of(
    vlm: VLM, source: Prompt, target: Prompt, metric: Metric, graph: Graph, method: str, steps: int, rule: str
) -> tuple[list[Turn], dict]:
    """The passes of a method, in order, and the mapping in which the source's activations are handed on to edits."""
    held, kept = dict[tuple, Any](), dict[tuple, Tensor]()
    streams = [] if method == "information-flow-routes" else stream_sites(vlm)

    def one(prompt: Prompt, keeps: str = "", weight: float = 0.0, edits: Sequence[Edit] = (), **more: Any) -> Turn:
        wrote = write_sites(vlm, bool(prompt.images)) if keeps else []
        read = [*wrote, *(streams if weight else []), *more.pop("read", [])]
        asked = {"grad_of": metric} if weight else {"value": partial(metric_values, vlm.metric(metric))}
        what = pass_of(vlm, held, prompt, list(dict.fromkeys(read)), edits, **asked)
        if weight:
            what.plan.reads.update(dict.fromkeys(raw_sites(graph.inputs)))
        return Turn(what, keeps, weight, **more)

    if method == "information-flow-routes":
        return [one(source, "source"), one(target, "target", read=stream_sites(vlm), routes=True)], kept
    if method == "eap":
        return [one(source, "source"), one(target, "target", 1.0)], kept
    if method == "clean-corrupted":
        return [one(source, "source", 0.5), one(target, "target", 0.5)], kept
    groups = {(0, len(graph.writers)): entering(vlm, source)}
    if method == "ig-activations":
        groups = layer_by_layer(vlm, source, graph.writers)
    ends = [one(source, "source", read=groups_sites(groups)), one(target, "target")]
    points = list(zip(*path_points(steps, rule), strict=True))
    between = [
        one(target, "", weight, [nearer(site, kept, share) for site in sites], rows=rows)
        for rows, sites in groups.items()
        for share, weight in points
    ]
    return [*ends, *between], kept


def groups_sites(groups: Mapping[tuple[int, int], Sequence[Site]]) -> list[Site]:
    """All sites of some groups, once each.

    Example:
        >>> groups_sites({(0, 1): [Site("z", 0)], (1, 2): [Site("z", 0)]})
        [Site(kind='z', layer=0, tower='text')]
    """
    return list(dict.fromkeys(site for sites in groups.values() for site in sites))


def entering(vlm: VLM, prompt: Prompt) -> list[Site]:
    """Where words and picture enter the language model.

    Example:
        >>> entering(vlm, real)
        [Site(kind='resid_pre', layer=0, tower='text')]
    """
    across = [Site("image_features")] if vlm.shape.crosses and prompt.images else []
    later = [Site("deepstack", layer) for layer in deepstack_layers(vlm) if prompt.images]
    return [*across, Site("resid_pre", 0), *later]


def layer_by_layer(vlm: VLM, prompt: Prompt, writers: Sequence[str]) -> dict[tuple[int, int], list[Site]]:
    """The writers of one layer that are moved together, from and to, and where.

    Example:
        >>> layer_by_layer(vlm, real, nodes.writers(vlm.shape))[2, 10]
        [Site(kind='attn_out', layer=0, tower='text')]
    """
    found, start = {(0, 2): [Site("resid_pre", 0)]}, 2
    for layer, kinds in enumerate(vlm.shape.kinds["text"]):
        sizes = [("attn_out", vlm.shape.heads["text"]), ("mlp_out", 1)]
        sizes += [("deepstack", 1)] if "deepstack" in kinds else []
        for kind, size in sizes:
            if kind != "deepstack" or prompt.images:
                found[start, start + size] = [Site(kind, layer)]
            start += size
    assert start == len(writers)
    return found


def nearer(site: Site, kept: Mapping[tuple, Tensor], share: float) -> Edit:
    """Move an activation a share of the way to what the source had there.

    Example:
        >>> site = mv.Site("resid_pre", 0)
        >>> str(nearer(site, {("resid_pre", 0, "text"): torch.zeros(1, 49, 128)}, 0.5))
        '0.5 of the way at text.0.resid_pre (prompt only)'
    """
    function: Any = partial(mixed, kept, key_of(site), share)
    return Edit(site, function, "prompt", label=f"{share:g} of the way")


def mixed(kept: Mapping[tuple, Tensor], key: tuple, share: float, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """An activation with a share of another in its place.

    Example:
        >>> mixed({("z", 0, "text"): torch.ones(1)}, ("z", 0, "text"), 0.25, torch.zeros(1))
        tensor([0.2500])
    """
    return x + share * (kept[key].to(x) - x)
