"""What reaches one position through all layers' attention: rollout, and the flow of VL-SAM.

Rule this module guards: both are one row of a product of layers' attention maps, and only that row is formed, from the
last layer down: a vector times each layer's attention, in pieces that fit the budget. No map and no product of maps is
ever held, so memory grows with the length of the prompt and not with its square.

>>> round(float(attention_rollout(vlm, real).by_span.sum()), 5)
1.0
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.attention import Piece
from mechvlm.batch import check_ends, metric_values
from mechvlm.experiments.record import chosen_layers, one_prompt, record
from mechvlm.experiments.selection import Without, keys_out
from mechvlm.experiments.sight import cross_layers, image_coordinates, named
from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.masks import indicator
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.readings import lazy
from mechvlm.rounds import unsaid
from mechvlm.sites import Site, number
from mechvlm.vlm import VLM

Row = Float[Tensor, " pos"]
"""One row of a product of attention maps, on the CPU in float64."""


def attention_rollout(
    vlm: VLM,
    prompt: Prompt,
    position: int = -1,
    residual: float = 0.5,
    without_bos: bool = False,
    discard: Without = None,
    layers: Sequence[int] | None = None,
) -> xr.Dataset:
    """Where one position's attention comes from, through all layers: attention maps multiplied, as if they were all.

    Each layer's map is its heads' mean; a share of every row stays where it is, for the residual stream.

    Args:
        position: whose row of the product is wanted; by default the last, which answers.
        residual: the share of the residual stream, from 0 to 1. 0.5 is the paper's: the map plus the identity, its rows
            made to sum to 1.
        without_bos: leave out the first token's column, which most heads rest on and which hides all else.
        discard: further columns that are left out, as `without` of `attention_profile`: positions, "bos", a function
            from a prompt to positions, or what `mv.sinks` found.
        layers: which maps to multiply, in the model's order; None means all.

    Returns:
        `rollout`, fractions over axis position, image tokens only, with image, tile, row and column as further
        coordinates, -1 for what stands for no place; and `by_span`, its sums over the spans of the prompt, which are 1
        together. Where columns are left out, each row of a layer's mean map is made to sum to 1 without them, and a row
        that has nothing else keeps to itself.

    Raises:
        ValueError: for a prompt without an image, a model that sees its picture by cross-attention, a residual that is
            no share, a position or layer that is not there, or columns of which none is left.
        TypeError: for several prompts, or columns that are no positions.

    Example:
        >>> found = mv.attention_rollout(vlm, real, without_bos=True)
        >>> mv.plot.over_image(found.rollout, real.images[0], real.pictures[0])

    Source:
        Abnar & Zuidema (2020), "Quantifying Attention Flow in Transformers", section 3, attention rollout. Their
        attention flow, a maximum flow through the graph of all layers, is not here: it needs every edge of it.
    """
    chosen, at = among_words(vlm, prompt, layers), place_of(prompt, position)
    share = number("residual", residual)
    if not 0 <= share <= 1:
        raise ValueError(f"residual={residual} is no share; give 0 to 1, and 0.5 for the paper's.")
    dropped = _dropped(prompt, without_bos, discard)
    start = unit(at, len(prompt))

    def rolled(maps: Sequence[Attention]) -> Row:
        row = start
        for attention in reversed(maps):
            row = share * row + (1 - share) * _rolled(row, attention, dropped)
        return row

    row, _ = folded(vlm, prompt, chosen, rolled)
    about: dict[str, str | float] = {"residual": share, "discarded": ", ".join(map(str, dropped)) or "none"}
    long = {"long_name": "attention rollout", "units": "fraction"}
    return row_of_product(vlm, prompt, "rollout", row, chosen, at, about, long)


def attention_flow(
    vlm: VLM,
    prompt: Prompt,
    position: int = -1,
    head_weights: bool = True,
    layers: Sequence[int] | None = None,
) -> xr.Dataset:
    """What reaches one position through all layers by VL-SAM's attention flow, in which focused heads count for more.

    Two other things go by this name: the maximum flow of Abnar and Zuidema, which is not in mechvlm, and the gradient
    times attention between spans of ClearSight, which is `span_flow`.

    Args:
        position: whose row of the flow is wanted; by default the last, which answers.
        head_weights: weigh each head by the mean over its rows of their largest weight; without, all heads count 1.
        layers: which maps to take, in the model's order; None means all.

    Returns:
        `flow` over axis position, image tokens only, with image, tile, row and column as further coordinates, -1 for
        what stands for no place; `by_span`, its sums over the spans of the prompt; and `head_weight` over layer and
        head. A map of layer l is S = mean over heads of A times the head's weight, and F_l = (I + S)(I + F_(l-1)), from
        F = 0 before the first. Nothing in it is made to sum to 1: values grow up to twofold with each layer, and only
        their proportions mean anything.

        VL-SAM also scales the image's columns by their place, by a constant that its description leaves uncertain; that
        is not done here.

    Raises:
        ValueError: for a prompt without an image, a model that sees its picture by cross-attention, or a position or
            layer that is not there.
        TypeError: for several prompts.

    Example:
        >>> found = mv.attention_flow(vlm, real)
        >>> mv.plot.over_image(found.flow, real.images[0], real.pictures[0])

    Source:
        Lin et al. (2024), "Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts",
        section 3, head aggregation and attention flow. The row is all that is computed of F.
    """
    chosen, at = among_words(vlm, prompt, layers), place_of(prompt, position)
    (flow, focus), _ = folded(vlm, prompt, chosen, partial(_flowing, unit(at, len(prompt)), head_weights))
    heads = numbers(focus)
    about = {"head_weights": "mean of rows' maxima" if head_weights else "1"}
    found = row_of_product(vlm, prompt, "flow", flow, chosen, at, about, {"long_name": "attention flow"})
    weight = (["layer", "head"], heads, {"long_name": "weight of the head in the flow"})
    return found.assign(head_weight=weight).assign_coords(layer=chosen, head=np.arange(heads.shape[1]))


# -- rows of products ------------------------------------------------------------------------------------------------


def carried(
    row: Row,
    attention: Attention,
    of: Callable[[Piece], Tensor] | None = None,
    weights: Float[Tensor, " head"] | None = None,
) -> Row:
    """A row of numbers times a layer's attention, averaged over its heads: the row one layer further down.

    Args:
        of: what is taken of each piece instead of its pattern.
        weights: one for each head, by which it counts; by default 1.

    The row is scaled before it is handed on, so that a product of many layers overflows no type that they are in.

    Example:
        >>> attention = vlm.run(real, read={"text.3.pattern": mv.lazy()})["text.3.pattern"]
        >>> carried(unit(5, len(real)), attention).sum().round(decimals=3)
        tensor(1., dtype=torch.float64)
    """
    reached = row.nonzero()[:, 0].tolist()
    if not reached:
        return torch.zeros_like(row)
    size = row.abs().max()
    counts = torch.ones(attention.q.shape[1], dtype=row.dtype) if weights is None else weights
    given = (counts[:, None] * row[reached] / size)[None]
    return attention.drawn(given, reached, of)[0].double().mean(0).cpu() * size


def unit(at: int, length: int) -> Row:
    """The row that holds one position alone.

    Example:
        >>> unit(1, 3)
        tensor([0., 1., 0.], dtype=torch.float64)
    """
    return torch.zeros(length, dtype=torch.float64).index_fill(0, torch.tensor([at]), 1.0)


def folded(
    vlm: VLM,
    prompt: Prompt,
    layers: Sequence[int],
    function: Callable[[list[Attention]], Any],
    metric: Metric | None = None,
    position: int = -1,
) -> tuple[Any, float]:
    """What a function makes of several layers' attention, where the model runs; and the metric, where one is given.

    Args:
        function: of the layers' attention in their order, not made; with a metric it knows the metric's gradient.
        metric, position: what gradients are taken of, and at which position's logits.

    Example:
        >>> folded(vlm, real, [0, 2], lambda maps: [len(one.rows([-1])) for one in maps])[0]
        [1, 1]
    """
    sites, graded = [("pattern", layer, "text") for layer in layers], metric is not None

    def reduced(read: dict, gradients: dict) -> Any:
        return function([(gradients if graded else read)[site] for site in sites])

    read = dict.fromkeys((Site(*site) for site in sites), lazy())
    value = unsaid if metric is None else partial(metric_values, vlm.metric(metric))
    asked = {"read": read, "grad_of": metric, "position": position, "value": value, "reduce": reduced}
    run = next(vlm.runs([{"prompt": prompt, **asked}]))
    said: Any = run.metric
    return run.reduced, float(said[0])


def among_words(vlm: VLM, prompt: Prompt, layers: Sequence[int] | None) -> list[int]:
    """The layers whose maps are multiplied, in the model's order, where pictures stand among the words.

    Raises:
        ValueError: where they do not, or where there is none.
        TypeError: for several prompts.
    """
    if not one_prompt(prompt).image:
        raise ValueError("the prompt holds no image to look at; make it with vlm.prompt(image, text).")
    across = cross_layers(vlm)
    if across:
        raise ValueError(
            f"this model sees its picture by cross-attention, in {named(across)}, and its words' attention to each "
            "other never reaches it; mv.attention_map and mv.gradient_attention show each of these layers by itself."
        )
    return sorted(chosen_layers(vlm, layers))


def place_of(prompt: Prompt, position: int) -> int:
    """A position counted from 0.

    Raises:
        ValueError: for one that is not in the prompt.
        TypeError: for what is no whole number.
    """
    return check_ends([prompt], position)[0] + len(prompt)


def row_of_product(
    vlm: VLM,
    prompt: Prompt,
    name: str,
    row: Row,
    layers: Sequence[int],
    at: int,
    about: Mapping[str, str | int | float],
    long: Mapping[str, str],
) -> xr.Dataset:
    """A row over all positions as a result: over the image tokens, and summed over each span."""
    values, spans = numbers(row), prompt.spans
    sums = np.array([values[held].sum() for held in spans.values()])
    taken = {"query": at, "multiplied": ", ".join(map(str, layers))}
    return xr.Dataset(
        {
            name: (["position"], values[prompt.image], dict(long)),
            "by_span": (["span"], sums, {**long, "long_name": f"{long['long_name']}, sum over the span"}),
        },
        coords={**image_coordinates(prompt), "span": list(spans)},
        attrs={**record(vlm, [prompt]), **taken, **about},
    )


# -- parts -----------------------------------------------------------------------------------------------------------


def _dropped(prompt: Prompt, without_bos: bool, discard: Without) -> list[int]:
    """The positions whose columns are left out, counted from 0."""
    if without_bos and not prompt.bos:
        raise ValueError("without_bos=True, and this prompt begins with no such token; leave it out, or use discard=.")
    (given,) = keys_out([prompt], discard, "discard")
    return sorted({*(prompt.bos if without_bos else ()), *given})


def _rolled(row: Row, attention: Attention, dropped: Sequence[int]) -> Row:
    """A row times the mean map of a layer; without some columns, and rows then summing to 1."""
    if not dropped:
        return carried(row, attention)
    left = ~indicator(dropped, len(row))
    reached = row.nonzero()[:, 0].tolist()

    def rest(piece: Piece) -> Tensor:
        wide = piece.pattern.to(torch.promote_types(piece.pattern.dtype, torch.float32))
        return (wide @ left[piece.keys, None].to(wide)).to(wide)

    mass = attention.collected(rest, reached, 1)[0, ..., 0].double().mean(0).cpu()
    scaled, stays = torch.zeros_like(row), torch.zeros_like(row)
    scaled[reached] = torch.where(mass > 0, row[reached] / mass.where(mass > 0, 1.0), 0.0)
    stays[reached] = torch.where(mass > 0, 0.0, row[reached])
    return carried(scaled, attention) * left + stays


def _flowing(row: Row, head_weights: bool, maps: Sequence[Attention]) -> tuple[Row, Float[Tensor, "layer head"]]:
    """The flow that reaches a row, and by how much each layer's heads counted."""
    flow, heads = torch.zeros_like(row), torch.ones(len(maps), maps[0].q.shape[1], dtype=torch.float64)
    for index in reversed(range(len(maps))):
        if head_weights:
            heads[index] = _focus(maps[index])
        row = row + carried(row, maps[index], weights=heads[index])
        flow = flow + row
    return flow, heads


def _focus(attention: Attention) -> Float[Tensor, " head"]:
    """How focused each head is: the mean over queries of the largest weight of each."""
    largest = attention.collected(lambda piece: piece.pattern.amax(-1, keepdim=True), None, 1)
    return largest[0, ..., 0].double().mean(-1).cpu()
