"""What does the answer need? Parts of the language model taken out, one at a time, over one prompt or many.

Heads, attention blocks, MLPs, layers, positions and regions of the picture. Rule this module guards: an effect is a
difference of the same prompt's metric, so that prompts are compared with themselves before anything is averaged.

>>> found = ablate_each(vlm, [real, null], yes, "mlp")
>>> found.effect.dims, sorted(found.data_vars)
(('prompt', 'layer'), ['clean', 'effect', 'high', 'low', 'mean'])
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit, ablate_heads
from mechvlm.experiments.ablation import at_positions
from mechvlm.experiments.examples import (
    Points,
    PositionsOf,
    about,
    averaged,
    checked_mapping,
    labelled,
    metric_of_each,
    positions_of,
    said_of,
    shared_names,
    swept_and_clean,
    unit_of,
)
from mechvlm.experiments.means import To, put, replacements
from mechvlm.experiments.record import chosen_layers
from mechvlm.experiments.sight import check_layers_run, deepstack_layers, head_site
from mechvlm.experiments.sight import named as layers_named
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, listed, told, whole_numbers
from mechvlm.vlm import VLM

PARTS: dict[str, tuple[str, ...]] = {
    "head": ("z",),
    "attention": ("attn_out",),
    "mlp": ("mlp_out",),
    "layer": ("attn_out", "mlp_out"),
}
"""Parts of the model that can be taken out, and the activations that are then replaced."""
PLACES = ("position", "region")
Part = tuple[int, ...]
"""Layer and head of a head; layer of an attention block, MLP or layer."""
Regions = Mapping[str, Sequence[int]] | Callable[[Prompt], Mapping[str, Sequence[int]]] | None


def ablate_each(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    what: str = "head",
    to: To = None,
    positions: PositionsOf = None,
    regions: Regions = None,
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    clusters: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How a metric changes when one part of the model, or what it holds at one place, is taken out of the run.

    Args:
        prompts: one, or several; every part is taken out of each.
        metric: one for all prompts, or a list with one for each, such as the right answer's logit minus the other's.
        what: "head"; "attention", all that a layer's attention adds; "mlp", what its MLP adds; "layer", both;
            "position", what one position holds before a layer; "region", what several hold.
        to: what takes the place. None: zero. A prompt with the same positions, or a function from a prompt to one: what
            was there in its run (resample-ablation). One tensor for each layer, as `mean_activations` makes them
            (mean-ablation); for "layer" a mapping with lists for `attn_out` and `mlp_out`.
        positions: where heads, blocks, MLPs and layers are taken out: positions, or a function such as `lambda prompt:
            prompt.last`; None means everywhere. For "position", which are asked about.
        regions: for "region": named lists of positions, or a function from a prompt to them; by default its spans.
        kind: for "position" and "region", of which activation; by default `resid_pre`, what enters the layer.
        layers: which, by default all.
        clusters: for each prompt what it shares with others, for instance the picture's name: the interval is then over
            clusters. By default every prompt stands for itself.
        batch_size, out: see `sweep`; of each prompt.

    Returns:
        `effect`, the metric with the ablation minus the metric without, over axes prompt and layer, and head, position
        or region; `mean` over prompts, with `low` and `high`, the ends of its 95% interval (not numbers for a single
        cluster); `clean`, each prompt's metric without. All in the metric's unit.

    Raises:
        ValueError, TypeError: for parts, positions or metrics that are not there, or a `to` that does not fit.

    Example:
        >>> found = mv.ablate_each(vlm, [real, null], yes, "region", to=lambda prompt: null, layers=[0, 4])
        >>> found["mean"].dims
        ('layer', 'region')

    Source:
        Michel et al. (2019), "Are Sixteen Heads Really Better than One?", section 3.2 (heads); Wang et al. (2023),
        "Interpretability in the Wild", section 2, on means of a reference distribution instead of zero.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics, chosen = metric_of_each(metric, asked), chosen_layers(vlm, layers)
    site = _kind_at(what, kind, regions, positions)
    for prompt in asked:
        check_layers_run(vlm, prompt, chosen)

    def points(prompt: Prompt) -> Points:
        if what in PARTS:
            return _one_part(vlm, prompt, what, to, positions)
        return _one_place(vlm, prompt, what, to, site, checked_mapping("regions", regions or _spans, prompt))

    axes = {"layer": chosen, **_axis(vlm, asked, what, positions, regions)}
    found, clean = swept_and_clean(vlm, asked, points, metrics, batch_size, out, **axes)
    where = {"engine": found.attrs["engine"], "ablated": what, "ablated_to": ablated_to(to)}
    where |= {"site": site, **_left_in_place(vlm, site)} if what in PLACES else {"positions": said_of(positions)}
    effect = found - clean
    unit = unit_of(metrics)
    values = labelled({"effect": effect, **averaged(effect, clusters)}, f"effect of ablating one {what}", unit)
    sign = "metric with the ablation minus metric without"
    attrs = about(vlm, asked, metrics, clusters, value=sign, **where)
    return xr.Dataset({**values, **labelled({"clean": clean}, "metric without ablation", unit)}, attrs=attrs)


def parts_out(
    vlm: VLM, prompt: Prompt, what: str = "head", to: To = None, positions: PositionsOf = None
) -> Callable[[Sequence[Part]], list[Edit]]:
    """A function from parts of the model to the edits that take them out of a prompt's run, all at once.

    Args:
        what, to, positions: as in `ablate_each`; parts are pairs of layer and head for "head", layers for the others.

    Example:
        >>> [edit.label for edit in parts_out(vlm, real)([(3, 1), (3, 2), (5, 0)])]
        ['ablate heads [1, 2]', 'ablate heads [0]']
    """
    given = replacements(vlm, prompt, to, PARTS[what])
    at = positions_of(positions, prompt)

    def edits(parts: Sequence[Part]) -> list[Edit]:
        if what != "head":
            sites = [Site(kind, layer) for (layer,) in dict.fromkeys(parts) for kind in PARTS[what]]
            return [put(site, given[site], at) for site in sites]
        heads: dict[int, list[int]] = {}
        for layer, head in dict.fromkeys(parts):
            heads.setdefault(layer, []).append(head)
        return [_heads_out(head_site(vlm, layer), own, given, at) for layer, own in heads.items()]

    return edits


def parts_of(what: str, parts: Any) -> list[Part]:
    """Parts as tuples: pairs of layer and head, or layers.

    Raises:
        ValueError, TypeError: for what is no list of them, or one that is given twice.

    Example:
        >>> parts_of("head", [(3, 1)]), parts_of("mlp", [3])
        ([(3, 1)], [(3,)])
    """
    if what not in PARTS:
        raise ValueError(f"what={what!r} is no part that can be taken out; choose from {', '.join(PARTS)}.")
    held = listed(parts)
    rows = [listed(part) or (part,) for part in held or ()]
    size, each = (2, "a pair (layer, head)") if what == "head" else (1, "a layer")
    if not rows or any(len(row) != size for row in rows):
        raise ValueError(f"{told(parts)} is not a list of parts; each must be {each}, and there must be one or more.")
    found = [whole_numbers("parts", row) for row in rows]
    twice = [part for at, part in enumerate(found) if part in found[:at]]
    if twice:
        raise ValueError(f"the part {', '.join(map(str, twice[0]))} is given more than once; give each once.")
    return found


def all_parts(vlm: VLM, what: str) -> list[Part]:
    """Every part of a kind that the language model has.

    Example:
        >>> len(all_parts(vlm, "head")), all_parts(vlm, "mlp")[:2]
        (64, [(0,), (1,)])
    """
    layers = range(vlm.shape.layers["text"])
    if what == "head":
        return [(layer, head) for layer in layers for head in range(vlm.shape.heads["text"])]
    return [(layer,) for layer in layers]


def ablated_to(to: To) -> str:
    """What took the place, in words, for a record."""
    if to is None:
        return "zero"
    if isinstance(to, Prompt):
        return "another prompt's output"
    return "another prompt's output, a function of the prompt" if callable(to) else "given values"


def _heads_out(
    site: Site, heads: Sequence[int], given: Mapping[Site, Tensor | None], at: tuple[int, ...] | None
) -> Edit:
    edit = ablate_heads(int(site.layer or 0), heads, to=given[site], cross=site.kind == "cross_z")
    return edit if at is None else at_positions(edit, at)


def _one_part(vlm: VLM, prompt: Prompt, what: str, to: To, positions: PositionsOf) -> Points:
    edits = parts_out(vlm, prompt, what, to, positions)

    def head_at(layer: int, head: int) -> list[Edit]:
        return edits([(layer, head)])

    def part_at(layer: int) -> list[Edit]:
        return edits([(layer,)])

    return head_at if what == "head" else part_at


def _one_place(vlm: VLM, prompt: Prompt, what: str, to: To, kind: str, regions: Mapping[str, Sequence[int]]) -> Points:
    given = list(replacements(vlm, prompt, to, [kind]).items())  # in the order of the layers

    def region_at(layer: int, region: str) -> list[Edit]:
        return [put(*given[layer], regions[region])]

    def position_at(layer: int, position: int) -> list[Edit]:
        return [put(*given[layer], [position])]

    return region_at if what == "region" else position_at


def _kind_at(what: str, kind: str | None, regions: Regions, positions: PositionsOf) -> str:
    """Which activation is replaced at a place; a choice that would not be heard is refused."""
    if what not in PARTS and what not in PLACES:
        raise ValueError(f"what={what!r} cannot be taken out; choose from {', '.join((*PARTS, *PLACES))}.")
    if kind is not None and what in PARTS:
        raise ValueError(f"kind={kind!r} is for positions and regions, and what={what!r} says it itself; leave it out.")
    if regions is not None and what != "region":
        raise ValueError(f"regions are taken out with what='region', and what={what!r}; write that, or leave them out.")
    if positions is not None and what == "region":
        raise ValueError("positions are not heard with what='region', whose regions say them; leave them out.")
    return kind or "resid_pre"


def _axis(
    vlm: VLM, prompts: Sequence[Prompt], what: str, positions: PositionsOf, regions: Regions
) -> dict[str, Sequence[Any]]:
    """The axis beside the layers."""
    if what == "head":
        return {"head": range(vlm.shape.heads["text"])}
    if what == "position":
        return {"position": _shared_positions(prompts, positions)}
    return {"region": _shared_names(prompts, regions)} if what == "region" else {}


def _spans(prompt: Prompt) -> dict[str, list[int]]:
    return {name: positions for name, positions in prompt.spans.items() if positions}


def _shared_positions(prompts: Sequence[Prompt], positions: PositionsOf) -> list[int]:
    """Positions that mean the same in all prompts."""
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(
            f"the prompts have {', '.join(map(str, lengths))} positions, so that no position is the same in all; take "
            "what='region', whose positions may differ."
        )
    found = positions_of(positions, prompts[0])
    return list(range(lengths[0]) if found is None else found)


def _shared_names(prompts: Sequence[Prompt], regions: Regions) -> list[str]:
    """Names of regions, which all prompts must have."""
    return shared_names("regions", [checked_mapping("regions", regions or _spans, prompt) for prompt in prompts])


def _left_in_place(vlm: VLM, kind: str) -> dict[str, str]:
    """What of the picture an ablation of the residual stream does not reach."""
    later = deepstack_layers(vlm)
    if not later or kind not in ("resid_pre", "resid_mid", "resid_post"):
        return {}
    return {"left_in_place": f"at image tokens, the features added behind {layers_named(later)}"}
