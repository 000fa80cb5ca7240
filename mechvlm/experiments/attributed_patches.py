"""Which patches would matter, all of them at once? Attribution patching, beside some of the patches themselves.

What can be patched is in `mechvlm.experiments.attributed_nodes`, the passes in `mechvlm.experiments.attributed_passes`,
and the softmax made anew in `mechvlm.experiments.rescored`.

Rule this module guards: an estimate is of a patch that `mv.patch_positions`, `mv.patch_spans`, `mv.patch_heads` or
`mv.patch_features` makes, of the same positions and the same of the picture, so that it can be held against it.

>>> found = attribution_patching(vlm, source=real, target=null, metric=yes, kinds=["z"])
>>> found.z.dims
('layer', 'position', 'head')
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from mechvlm.experiments.attributed_checks import MISSED, Node, check_finite, checked, chosen_nodes, count_of, unpatched
from mechvlm.experiments.attributed_nodes import Nodes, tables
from mechvlm.experiments.attributed_passes import estimated
from mechvlm.experiments.attributed_ways import completeness_of, passes_of, way_of
from mechvlm.experiments.curves import check_seed
from mechvlm.experiments.exchange import layers_of, matched, nothing_between, patched_with
from mechvlm.experiments.record import metric_name, metric_unit, record
from mechvlm.experiments.sweep import measuring
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, done, unsaid
from mechvlm.sites import Site
from mechvlm.vlm import VLM

UNSIGNED = "; of estimates without sign, |exact| is what they are held against"


def attribution_patching(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    kinds: Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "z"),
    positions: str | Mapping[str, Sequence[int]] | Callable[[Prompt], Mapping[str, Sequence[int]]] = "each",
    layers: Sequence[int] | None = None,
    verify: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    method: str = "atp",
    steps: int | None = None,
    path: str | None = None,
    rule: str | None = None,
    tower: str = "text",
) -> xr.Dataset:
    """About how much each patch from one prompt into another would change a metric: all patches from a few passes.

    To first order a patch changes the metric by the difference of the two activations times the metric's gradient in
    the target's run. That is the patch where all that follows is linear. Where it is not the two differ, and most where
    attention or the metric is saturated, so that the gradient is next to nothing while the patch is not; where what a
    node adds is cancelled by what later layers make of it; or where a normalised stream changes much, as at the first
    layer. `method` has an answer to each of them, at a price. `verify` makes some of the patches, to see by how much an
    estimate is wrong.

    Args:
        source: the prompt patched from; target: the one patched into, in whose run the gradients are taken. With the
            picture in the source and a null picture in the target, what brings the answer back is positive; for a
            circuit (`choose_circuit`) it is the other way round. Of a minimal pair `*pair.prompts(vlm)`, with
            `pair.metric`.
        kinds: "resid_pre", "q", "k", "v", "z", "cross_z", "attn_out", "resid_mid", "mlp_out", "resid_post" of the
            layers that have them, those of heads head by head; and without a layer "embed", the words' embeddings, and
            "image_features", all that the picture hands to the language model, by image token (by key where layers
            attend to it instead).
        positions: "each" by itself; "span", summed over each of the target's spans, as if patched together; or
            positions by name, or a function from the target to them, such as `mv.image_regions`.
        layers: of the tower; None means all that can reach the answer.
        verify: how many nodes of each kind, those with the largest estimates by size, are also patched exactly, and as
            many again, drawn at random from the others. A node is one patch: a position or span in one layer, and of
            one head. 0: none.
        seed: of the draw.
        batch_size: patches in one forward pass; see `sweep`. Of "drop", "atp*" and "ig" the passes in one forward and
            backward pass too, by default a quarter of a sweep's.
        method: "atp", as above: two forward passes and one backward pass.
            "qk": of queries and keys the change of the pattern, whose softmax is made anew with the source's, times the
            gradient behind it. So saturated attention is not passed over. Of several keys under one name the softmax is
            made anew for all of them at once. The same passes; other kinds are as in "atp".
            "drop": for each layer a pass over the target in which no gradient flows through what that layer's attention
            and MLP add, and of the estimates their sizes' mean over the passes that reach the node. So the effects of
            a node along two ways that cancel do not hide each other. It has no sign, and takes as many forward and
            backward passes as the tower has layers (from the first one that is asked for).
            "atp*": both. "ig": the gradient's mean over `steps` points of the path from the target's inputs to the
            source's, each of which is a forward and backward pass.
        steps: of "ig"; 5 unless given.
        path: of "ig", what is moved along it: "embed", words and picture where they enter the language model;
            "image_features" or "pixels", the picture alone, between prompts of the same words.
        rule: of "ig", where on the path from 0 (target) to 1 (source) the points are: "midpoint" (k - 1/2)/steps,
            "right" k/steps, "left" (k - 1)/steps, for k from 1 to steps, or "gauss-legendre", which has weights.
        tower: "vision" for the vision tower's own positions (its patches, in its own order; all tiles of a picture
            together, as in `patch_spans`), "qformer" for the Q-Former's. The path then begins at the pixels.

    Returns:
        A variable for each kind, named as it is, over axes layer, position (or span) and, for kinds of heads, head (or
        kv_head), in the metric's unit: positive where the patch is to raise the metric. Layers without the kind are not
        numbers. Positions of the text say token, span, and for image tokens image, tile, row and column, elsewhere -1.
        `attrs` hold `source_metric` and `target_metric`, and `signed`, 0 for "drop" and "atp*". As in `patch_spans`,
        with the residual stream of image tokens goes what deep-stack adds to them behind later layers. Of "ig" also
        `completeness_gap`: by how much the estimates at the path's inputs miss the difference of the two metrics in
        sum, and the same relative to it; it falls with `steps`. On the path of "embed" the sum of `resid_pre` at layer
        0 is theirs, but for features that are keys.

        With `verify` moreover `estimate` and `exact`, the change of the metric, over axes kind and node, with
        coordinates node_layer (-1 for none), node_position (or node_span), node_head (-1 for all) and drawn, "top" or
        "random". `pearson` and `spearman` of the two over axes kind and among ("top", "random", "both"); "both" has
        half its nodes from the top, and is no correlation over all nodes unless they were all patched. Over kind:
        `precision`, the share of the top nodes that are as high by exact size among those patched; among all nodes it
        is that or less. `missed`, the largest difference of a random node, which bounds no node that was not patched;
        and `missed_share`: a larger share than this of the nodes that are not among the top, each with a larger
        difference than `missed`, would have gone unseen in fewer than 1 of 20 draws. Estimates without a sign are
        compared with the size of the change.

    Raises:
        ValueError: where positions cannot be matched; for another kind, method, path or rule, positions that are not
            there, a negative `verify` or `seed`, a layer without the kind; `steps`, `path` or `rule` of a method that
            has no path; a path behind the nodes, or of the picture alone where words differ; and where the metric's
            gradient is no finite number.
        TypeError: for kinds that are no list.

    Example:
        >>> found = mv.attribution_patching(vlm, real, null, yes, kinds=["mlp_out"], layers=[0, 4], verify=3)
        >>> mv.plot.attributed(found)
        >>> mv.plot.patched_positions(found.mlp_out)
        >>> mv.attribution_patching(vlm, real, null, yes, ["q", "k"], mv.image_regions, method="atp*").q.dims
        ('layer', 'span', 'head')

    Source:
        Nanda (2023), "Attribution Patching: Activation Patching At Industrial Scale"; Kramár et al. (2024), "AtP*: An
        efficient and scalable method for localizing LLM behaviour to components", section 2, and section 3 on queries
        and keys (QK fix) and on layers left out (GradDrop): the paper divides by the number of layers less one, which
        are the passes that reach its nodes, and so it is here; the residual stream and what enters it are reached by
        all. Hanna et al. (2024), "Have Faith in Faithfulness", section 3, on gradients averaged between two inputs.
    """
    chosen = layers_of(vlm, tower, layers)
    matched(vlm, source, target, chosen, tower)
    nodes = Nodes.of(vlm, target, kinds, chosen, tower, positions, layers is not None)
    count, drawn = count_of(verify), check_seed(seed)
    way, how = way_of(vlm, source, target, nodes, method, {"steps": steps, "path": path, "rule": rule})
    source_end, target_end, sums = done(vlm, estimated(vlm, source, target, metric, nodes, way, batch_size))
    for key, values in sums.items():
        check_finite(str(key if isinstance(key, str) else Site(*key)), values)
    made = tables(vlm, target, nodes, {key: x / (passes_of(vlm, key) if way.sized else 1) for key, x in sums.items()})
    said = f"estimated {'size of the ' * way.sized}change of {metric_name(metric)}"
    named = {kind: one.assign_attrs(long_name=said, units=metric_unit(metric)) for kind, one in made.items()}
    found = xr.Dataset(named)
    about: dict[str, str | int | float] = {
        **patched_with(vlm, "denoise", nodes.later),
        **nothing_between(source, target),
        **how,
        **(completeness_of(float(sums["inputs"]), source_end - target_end) if way.inputs else {}),
        **{"signed": int(not way.sized), "source_metric": source_end, "target_metric": target_end},
    }
    if count:
        picked = chosen_nodes(made, count, drawn)
        exact, engine = done(vlm, _patched(vlm, source, target, metric, nodes, picked, batch_size))
        changed = {kind: values - target_end for kind, values in exact.items()}
        dim = "position" if nodes.places is None else "span"
        found = found.merge(_with_units(checked(picked, changed, unpatched(made, picked), dim, way.sized), metric))
        about |= {"verify": count, "seed": drawn, "engine": engine, "missed_says": MISSED + UNSIGNED * way.sized}
    return found.assign_attrs(record(vlm, [source, target], metric, **about))


def _patched(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    nodes: Nodes,
    picked: Mapping[str, Sequence[Node]],
    batch_size: int | None,
) -> Work[tuple[dict[str, np.ndarray], str]]:
    """The metric of the target with each node patched, by kind, and how they were run."""
    every = [node for some in picked.values() for node in some]
    sites = dict.fromkeys([*(nodes.site(node.kind, node.layer) for node in every), *nodes.added])
    (run,) = yield [{"prompt": source, "read": list(sites), "value": unsaid}]
    values, how = yield from measuring(vlm, target, [nodes.edits(run, node) for node in every], metric, batch_size)
    ends = np.cumsum([len(some) for some in picked.values()])
    return dict(zip(picked, np.split(values, ends[:-1]), strict=True)), how


def _with_units(found: xr.Dataset, metric: Metric) -> xr.Dataset:
    """The same, with what its numbers are in."""
    for name, long in (
        ("estimate", "estimated change"),
        ("exact", "change by the patch"),
        ("missed", "largest error of a random node"),
    ):
        found[name].attrs = {"long_name": f"{long} of {metric_name(metric)}", "units": metric_unit(metric)}
    return found
