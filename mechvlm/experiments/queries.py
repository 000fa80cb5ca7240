"""Where do a Q-Former's queries look? Their attention to the patches, and what is carried over from queries to patches.

A query stands for no place in the picture, so nothing that a language model says of its image tokens can be drawn there
as it is. What the queries themselves look at can. Composing the two is a step of its own, and never done silently.

>>> looks = queries_to_patches(vlm, real)  # doctest: +SKIP
>>> looks.dims  # doctest: +SKIP
('layer', 'head', 'query', 'patch')
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.sight import NOWHERE
from mechvlm.experiments.sweep import numbers
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, told, whole, whole_numbers
from mechvlm.vlm import VLM

DIMS = ("layer", "head", "query", "patch")


def queries_to_patches(vlm: VLM, prompt: Prompt, layer: int | None = None, head: int | None = None) -> xr.DataArray:
    """How each query of the Q-Former divides its attention over the patches of the picture: its own cross-attention.

    Args:
        layer: one of the Q-Former's layers that look at the picture, counted from 0 in it; None means all of them.
        head: counted from 0; None means all.

    Returns:
        Attention weights over layer, head, query and patch, each also where only one was asked for. They sum to 1 over
        the patches, the vision tower's class token among them. Each patch has its image, row and column, -1 for the
        class token; each query has the `position` of the prompt where it stands.

    Raises:
        ValueError: for a model without a Q-Former, or a layer or head that does not look.
        TypeError: for several prompts.

    Example:
        >>> looks = mv.queries_to_patches(vlm, real, layer=0).mean(["layer", "head"])  # doctest: +SKIP
        >>> mv.plot.over_image(looks.isel(query=5), real.images[0], real.pictures[0])  # doctest: +SKIP

    Source:
        Li et al. (2023), "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
        Language Models", section 3.1: the queries see the picture through cross-attention in every other block.
    """
    one_prompt(prompt)
    layers, heads = _layers(vlm, layer), _heads(vlm, head)
    sites = [Site("cross_pattern", one, "qformer") for one in layers]
    run = vlm.run(prompt, read=sites)
    weights = np.stack([numbers(run[site][0, heads]) for site in sites])
    (image,) = prompt.images
    places = np.array([(0, *(image.cell(at) or NOWHERE)) for at in range(weights.shape[-1])], dtype=int)
    along = {name: ("patch", places[:, at]) for at, name in enumerate(("image", "tile", "row", "column"))}
    return xr.DataArray(
        weights,
        dims=DIMS,
        coords={
            "layer": layers,
            "head": heads,
            "query": np.arange(weights.shape[2]),
            "position": ("query", np.array(prompt.image, dtype=int)),
            "patch": np.arange(weights.shape[3]),
            **along,
        },
        name="attention",
        attrs={
            **record(vlm, [prompt], site="cross_pattern", tower="qformer", queries="the Q-Former's"),
            "layers": "the Q-Former's, counted from 0",
            "long_name": "attention weight of the Q-Former",
        },
    )


def compose_queries(
    values: xr.DataArray | Sequence[int | float] | np.ndarray,
    looks: xr.DataArray,
    layers: Sequence[int] | None = None,
) -> xr.DataArray:
    """Values on the Q-Former's queries, carried over to the patches that the queries look at.

    Each query's value is spread over the patches by the weights of its cross-attention, averaged over heads and over
    the chosen layers, and scaled so that they sum to 1 for each query; so the sum over patches is the sum over queries.

    This is a first-order path product: the language model's attention (or whatever the values are) to a query, times
    the query's attention to a patch. It is not attention of the language model to the patches, which it never sees. It
    leaves out what the queries tell each other, the layers' values and MLPs, what the vision tower had already mixed
    between patches, and every other path. Say so where you show it.

    Args:
        values: dim `position`, the image's, as `attention_map` and `gradient_attribution` make them, and any others
            beside it; or one value for each query, in their order.
        looks: what `queries_to_patches` returns, or a part of it.
        layers: which of its layers to average over; None means all it holds.

    Returns:
        Values over axis patch, and those of `values` beside position. `attrs["composed"]` says how.

    Raises:
        ValueError: for values or weights of other queries, or layers that `looks` does not hold.

    Example:
        >>> import xarray as xr
        >>> at = {"query": [0, 1], "position": ("query", [3, 4]), "patch": [0, 1, 2]}
        >>> looks = xr.DataArray([[[[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]]], dims=["layer", "head", "query", "patch"])
        >>> mv.compose_queries([2.0, 1.0], looks.assign_coords(layer=[0], head=[0], **at)).values
        array([0.5, 2. , 0.5])
    """
    chosen = _chosen(looks, layers)
    weights = chosen.mean([dim for dim in ("layer", "head") if dim in chosen.dims]).swap_dims(query="position")
    weights = (weights / weights.sum("patch")).drop_vars("query")
    given = _on_queries(values, weights)
    found = xr.dot(given, weights, dim="position").rename(given.name or "value")
    named = ", ".join(map(str, np.atleast_1d(chosen.layer.values).tolist()))
    how = (
        f"values on queries x the Q-Former's attention, mean over its layers {named} and heads {_heads_of(chosen)}: a "
        "first-order path product, not attention to patches"
    )
    about = f"{given.attrs.get('long_name', given.name or 'value')}, through the Q-Former’s attention"
    return found.assign_attrs({**given.attrs, "composed": how, "long_name": about})


def _layers(vlm: VLM, layer: int | None) -> list[int]:
    """The layers of the Q-Former that look at the picture, or the one asked for."""
    if "qformer" not in vlm.shape.layers:
        raise ValueError(
            "this model has no Q-Former, so no queries stand between its picture and its text; mv.attention_map shows "
            "attention to the picture itself."
        )
    looking = [one for one, kinds in enumerate(vlm.shape.kinds["qformer"]) if "cross_pattern" in kinds]
    if layer is not None and whole("layer", layer) not in looking:
        raise ValueError(
            f"the Q-Former's layers {', '.join(map(str, looking))} look at the picture, so there is no attention to it "
            f"in layer {layer}."
        )
    return looking if layer is None else [whole("layer", layer)]


def _heads(vlm: VLM, head: int | None) -> list[int]:
    count = vlm.shape.heads["qformer"]
    if head is not None and not 0 <= whole("head", head) < count:
        raise ValueError(f"the Q-Former has {count} heads a layer, counted from 0, so there is no head {head}.")
    return list(range(count)) if head is None else [whole("head", head)]


def _chosen(looks: Any, layers: Sequence[int] | None) -> xr.DataArray:
    """Weights of queries on patches, of the layers asked for."""
    fits = isinstance(looks, xr.DataArray) and {"query", "patch"} <= set(looks.dims) <= set(DIMS)
    if not fits or not {"layer", "head", "position"} <= set(looks.coords):
        raise ValueError(
            f"looks is {told(looks)}; give what mv.queries_to_patches returns, with dims query and patch and their "
            "coordinates."
        )
    if layers is None:
        return looks
    wanted, held = list(whole_numbers("layers", layers)), np.atleast_1d(looks.layer.values).tolist()
    beyond = [layer for layer in wanted if layer not in held]
    if beyond or not wanted:
        raise ValueError(
            f"looks holds layers {', '.join(map(str, held))}, and layers={told(layers)} was given; choose from those, "
            "or None for all."
        )
    return looks.sel(layer=wanted) if "layer" in looks.dims else looks


def _heads_of(looks: xr.DataArray) -> str:
    return ", ".join(map(str, np.atleast_1d(looks["head"].values).tolist()))


def _on_queries(values: Any, weights: xr.DataArray) -> xr.DataArray:
    """Values over the positions of the queries, without coordinates that say where in a picture they would be."""
    at = weights.position.values.tolist()
    if not isinstance(values, xr.DataArray):
        plain = np.asarray(values, dtype=float)
        if plain.shape != (len(at),):
            raise ValueError(
                f"there are {len(at)} queries, and values of shape {plain.shape} were given; give one each."
            )
        return xr.DataArray(plain, dims=["position"], coords={"position": at})
    if "position" not in values.dims or "patch" in values.dims:
        raise ValueError(
            f"values must have dim position, the queries' in the prompt, and these have "
            f"{', '.join(map(str, values.dims))}."
        )
    if sorted(values.position.values.tolist()) != sorted(at):
        raise ValueError(
            f"the values belong to positions {told(values.position.values.tolist())}, and the queries stand at "
            f"{told(at)}; give those alone."
        )
    return values.drop_vars([name for name in ("image", "tile", "row", "column") if name in values.coords])
