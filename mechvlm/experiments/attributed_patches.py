"""Which patches would matter, all of them at once? Attribution patching, beside some of the patches themselves.

Rule this module guards: an estimate is of a patch that `mv.patch_positions`, `mv.patch_spans` or `mv.patch_heads`
makes, of the same positions and the same of the picture, so that it can be held against it.

>>> found = attribution_patching(vlm, source=real, target=null, metric=yes, kinds=["z"])
>>> found.z.dims
('layer', 'position', 'head')
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.attributed_checks import Node, checked, chosen_nodes
from mechvlm.experiments.exchange import layers_of, matched, patched_with
from mechvlm.experiments.patches import features_patch, from_run
from mechvlm.experiments.record import metric_name, metric_unit, record
from mechvlm.experiments.sight import deepstack_layers, image_coordinates, image_dim
from mechvlm.experiments.sight import named as layers_named
from mechvlm.experiments.sweep import measuring, numbers
from mechvlm.metrics import Metric
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, done, unsaid
from mechvlm.run import Run
from mechvlm.sites import Site, listed, told, whole
from mechvlm.vlm import VLM

HEADS = {"q": "head", "k": "kv_head", "v": "kv_head", "z": "head"}
STREAM = ("resid_pre", "resid_mid", "resid_post")
KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
MISSED = (
    "missed: the largest |exact - estimate| of the random nodes, no bound on that of the nodes that were not patched; "
    "missed_share: at 95 % confidence no larger share of the nodes that are not among the top has a larger one"
)


def attribution_patching(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    kinds: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "z"),
    positions: str = "each",
    layers: Sequence[int] | None = None,
    verify: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
) -> xr.Dataset:
    """About how much each patch from one prompt into another would change a metric: all patches from two passes.

    To first order a patch changes the metric by the difference of the two activations times the metric's gradient in
    the target's run. That is the patch where all that follows is linear. Where it is not the two differ, and most where
    attention or the metric is saturated, so that the gradient is next to nothing while the patch is not; or where a
    normalised stream changes much, as at the first layer. `verify` makes some of the patches, to see by how much.

    Args:
        source, target: as in `patch_spans`. Of a minimal pair `*pair.prompts(vlm)`, with `pair.metric`.
        kinds: of the language model's layers: "resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out",
            "resid_post". Those of heads are estimated head by head.
        positions: "each" by itself, or "span", summed over each of the target's spans, as if patched together.
        layers: None means all that can reach the answer.
        verify: how many nodes of each kind, those with the largest estimates by size, are also patched exactly, and as
            many again, drawn at random from the others. A node is one patch: a position or span in one layer, and of
            one head. 0: none.
        seed: of the draw.
        batch_size: patches in one forward pass; see `sweep`.

    Returns:
        A variable for each kind, named as it is, over axes layer, position (or span) and, for kinds of heads, head (or
        kv_head), in the metric's unit: positive where the patch is to raise the metric. Layers without the kind are not
        numbers. Positions say token, span, and for image tokens image, tile, row and column, elsewhere -1. `attrs` hold
        `source_metric` and `target_metric`. As in `patch_spans`, with the residual stream of image tokens goes what
        deep-stack adds to them behind later layers.

        With `verify` moreover `estimate` and `exact`, the change of the metric, over axes kind and node, with
        coordinates node_layer, node_position (or node_span), node_head (-1 for all) and drawn, "top" or "random".
        `pearson` and `spearman` of the two over axes kind and among ("top", "random", "both"); "both" has half its
        nodes from the top, and is no correlation over all nodes unless they were all patched. Over kind: `precision`,
        the share of the top nodes that are as high by exact size among those patched; among all nodes it is that or
        less. `missed`, the largest difference of a random node, which bounds no node that was not patched; and
        `missed_share`: a larger share than this of the nodes that are not among the top, each with a larger difference
        than `missed`, would have gone unseen in fewer than 1 of 20 draws.

    Raises:
        ValueError: where positions cannot be matched; for another kind, another word for `positions`, a negative
            `verify`, or a layer without the kind.
        TypeError: for kinds that are no list.

    Example:
        >>> found = mv.attribution_patching(vlm, real, null, yes, kinds=["mlp_out"], layers=[0, 4], verify=3)
        >>> mv.plot.attributed(found)
        >>> mv.plot.patched_positions(found.mlp_out)

    Source:
        Nanda (2023), "Attribution Patching: Activation Patching At Industrial Scale"; Kramár et al. (2024), "AtP*: An
        efficient and scalable method for localizing LLM behaviour to components", section 2, and section 3 on where it
        fails.
    """
    chosen = layers_of(vlm, "text", layers)
    matched(vlm, source, target, chosen)
    held = _kinds(vlm, kinds, chosen, layers is not None)
    count = _checked(positions, verify)
    later = deepstack_layers(vlm) if target.image and any(kind in STREAM for kind in held) else []
    source_end, target_end, products = done(vlm, _estimated(vlm, source, target, metric, held, later))
    tables = _tables(vlm, target, products, held, chosen, later)
    if positions == "span":
        tables = {kind: _by_span(table, target) for kind, table in tables.items()}
    said = {"long_name": f"estimated change of {metric_name(metric)}", "units": metric_unit(metric)}
    found = xr.Dataset({kind: table.assign_attrs(said) for kind, table in tables.items()})
    about: dict[str, str | int | float] = {
        **patched_with(vlm, "denoise", later),
        "value": "estimate: (source - target) times the metric's gradient at the target, to first order",
        "source_metric": source_end,
        "target_metric": target_end,
    }
    if count:
        nodes = chosen_nodes(tables, count, whole("seed", seed))
        exact, engine = done(vlm, _patched(vlm, source, target, metric, nodes, later, batch_size))
        changed = {kind: values - target_end for kind, values in exact.items()}
        dim = "span" if positions == "span" else "position"
        found = found.merge(_with_units(checked(nodes, changed, count, dim), metric))
        about |= {"verify": count, "seed": whole("seed", seed), "engine": engine, "missed_says": MISSED}
    return found.assign_attrs(record(vlm, [source, target], metric, **about))


def _kinds(vlm: VLM, kinds: Any, layers: Sequence[int], given: bool) -> dict[str, list[int]]:
    """The kinds that are asked for, and which of the layers have each."""
    asked = listed(kinds)
    if not asked:
        raise TypeError(f"kinds={told(kinds)} is no list of kinds; write for instance ['resid_pre', 'z'].")
    wrong = [kind for kind in asked if kind not in KINDS]
    if wrong:
        raise ValueError(f"{told(wrong[0])} cannot be estimated by position; choose from {', '.join(KINDS)}.")
    held = {kind: [at for at in layers if kind in vlm.shape.kinds["text"][at]] for kind in asked}
    for kind, having in held.items():
        without = [at for at in layers if at not in having]
        if not having or (without and given):
            here = [one for one in KINDS if all(one in vlm.shape.kinds["text"][at] for at in without)]
            raise ValueError(
                f"this model has no {kind} in {layers_named(without)}, so no patch of it can be estimated; choose from "
                f"{', '.join(here)}."
            )
    return held


def _checked(positions: object, verify: object) -> int:
    """How many nodes of each sort are patched."""
    if positions not in ("each", "span"):
        raise ValueError(f"positions={told(positions)} is not known; choose from 'each', 'span'.")
    count = whole("verify", verify)
    if count < 0:
        raise ValueError(f"verify={count} patches nothing; give 0 or more nodes.")
    return count


def _estimated(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    held: Mapping[str, Sequence[int]],
    later: Sequence[int],
) -> Work[tuple[float, float, dict[tuple, Tensor]]]:
    """The metric of both prompts, and the products at each site, summed over the last axis where the model runs."""
    measure, kept = vlm.metric(metric), dict[tuple, Tensor]()
    sites = [Site(kind, layer) for kind, layers in held.items() for layer in layers]
    sites += [Site("deepstack", layer) for layer in later]

    # Both runs are of one job, so that what the first one kept is there for the second, wherever they run.
    def keep(read: dict, _gradients: dict) -> None:
        kept.update(read)

    def products(read: dict, gradients: dict) -> dict[tuple, Tensor]:
        def product(key: tuple) -> Tensor:
            difference = kept.pop(key).double() - read[key].double()
            return (difference * gradients[key].double()).sum(-1)

        return {key: product(key) for key in list(read)}

    value = partial(metric_values, measure)
    runs = yield [
        {"prompt": source, "read": sites, "value": value, "reduce": keep},
        {"prompt": target, "read": sites, "value": value, "reduce": products, "grad_of": measure},
    ]
    first, second = runs
    ends: list[Any] = [first.metric, second.metric]
    return float(ends[0][0]), float(ends[1][0]), second.reduced


def _tables(
    vlm: VLM,
    target: Prompt,
    products: Mapping[tuple, Tensor],
    held: Mapping[str, Sequence[int]],
    layers: Sequence[int],
    later: Sequence[int],
) -> dict[str, xr.DataArray]:
    """Estimates of each kind over layer, position and head."""
    coordinates = {"layer": list(layers), **_coordinates(target)}
    added = {at: numbers(products[key_of(Site("deepstack", at))].flatten()) for at in later}
    found = {}
    for kind, having in held.items():
        dims, sizes = ["layer", "position"], [len(layers), len(target)]
        own: dict[str, Any] = dict(coordinates)
        if kind in HEADS:
            dims, of = [*dims, HEADS[kind]], HEADS[kind]
            sizes.append((vlm.shape.kv_heads if of == "kv_head" else vlm.shape.heads)["text"])
            own[of] = range(sizes[-1])
        table = np.full(sizes, np.nan)
        for layer in having:
            row = numbers(products[key_of(Site(kind, layer))][0])
            for at, values in added.items():
                if kind in STREAM and at >= layer:
                    row[target.image] += values
            table[layers.index(layer)] = row
        found[kind] = xr.DataArray(table, dims=dims, coords=own)
    return found


def _coordinates(target: Prompt) -> dict[str, Any]:
    """What stands at each position, and which part of the picture it is of."""
    spans = {position: name for name, held in target.spans.items() for position in held}
    everywhere = range(len(target))
    found: dict[str, Any] = {
        "position": np.arange(len(target)),
        "token": ("position", list(target.tokens)),
        "span": ("position", [spans[at] for at in everywhere]),
    }
    if not target.image or image_dim(target) == "key":
        return found
    shown: dict[str, Any] = image_coordinates(target)
    for name in ("image", "tile", "row", "column"):
        column = np.full(len(target), -1)
        column[shown["position"]] = shown[name][1]
        found[name] = ("position", column)
    return found


def _by_span(table: xr.DataArray, target: Prompt) -> xr.DataArray:
    """Estimates summed over each span."""
    plain = table.drop_vars(set(table.coords) - set(table.dims))
    sums = [plain.sel(position=positions).sum("position", skipna=False) for positions in target.spans.values()]
    together = xr.concat(sums, xr.Variable("span", list(target.spans)), coords="minimal", compat="override")
    return together.transpose("layer", "span", ...)


def _patched(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    nodes: Mapping[str, Sequence[Node]],
    later: Sequence[int],
    batch_size: int | None,
) -> Work[tuple[dict[str, np.ndarray], str]]:
    """The metric of the target with each node patched, by kind, and how they were run."""
    every = [node for some in nodes.values() for node in some]
    sites = [*dict.fromkeys(Site(node.kind, node.layer) for node in every), *(Site("deepstack", at) for at in later)]
    (run,) = yield [{"prompt": source, "read": sites, "value": unsaid}]
    variants = [_edits(run, target, node, later) for node in every]
    values, how = yield from measuring(vlm, target, variants, metric, batch_size)
    ends = np.cumsum([len(some) for some in nodes.values()])
    return dict(zip(nodes, np.split(values, ends[:-1]), strict=True)), how


def _edits(run: Run, target: Prompt, node: Node, later: Sequence[int]) -> list[Edit]:
    """The patch of a node, with what deep-stack adds to its image tokens where it is of the residual stream."""
    positions = [node.place] if isinstance(node.place, int) else target.spans[node.place]
    heads = None if node.head is None else [node.head]
    made = from_run(run, Site(node.kind, node.layer), positions, heads, positions)
    image = {position: token for token, position in enumerate(target.image)}
    own = [image[position] for position in positions if position in image]
    added = [Site("deepstack", at) for at in later if node.kind in STREAM and at >= node.layer and own]
    return [made, *(features_patch(site, run[site], own) for site in added)]


def _with_units(found: xr.Dataset, metric: Metric) -> xr.Dataset:
    """The same, with what its numbers are in."""
    for name, long in (
        ("estimate", "estimated change"),
        ("exact", "change by the patch"),
        ("missed", "largest error of a random node"),
    ):
        found[name].attrs = {"long_name": f"{long} of {metric_name(metric)}", "units": metric_unit(metric)}
    return found
