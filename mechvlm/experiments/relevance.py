"""Which attention mattered? The gradient of a metric times attention: by row, through all layers, and between spans.

Rule this module guards: the row that is read is that of the position which predicts. The next position's row cannot
have mattered to that prediction, and its gradient is exactly zero.

>>> relevancy(vlm, real, mv.logit_difference("yes", "no")).relevancy.idxmax().item()
21.0
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.attention import Piece, saliency
from mechvlm.experiments.record import chosen_layers, metric_unit, one_prompt, record
from mechvlm.experiments.rollout import Row, among_words, carried, folded, place_of, row_of_product, unit
from mechvlm.experiments.sight import cross_layers, image_coordinates, image_dim, looking, named, own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.masks import indicator
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.readings import rows
from mechvlm.sites import told, whole, whole_numbers
from mechvlm.vlm import VLM


def gradient_attention(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    layers: Sequence[int] | None = None,
    queries: int | Sequence[int] = -1,
    position: int = -1,
) -> xr.Dataset:
    """What each attention weight on the picture adds to a metric, to first order: the weight times its gradient.

    Args:
        layers: which; None means all, or, where the picture is seen by cross-attention, all that do.
        queries: the position that looks; by default the last, which answers. Or several.
        position: whose logits the metric is of. Where attention looks back only, queries behind it cannot have
            mattered, and all of theirs is exactly zero: the row of a token that was said is not the one that said it.

    Returns:
        `attribution`, attention times gradient, in the metric's unit; `attention`, the weights; `gradient`, the
        metric's change per unit of weight, which is not zero on keys that a query cannot see. All over axes layer, head
        and position, image tokens only, with image, tile, row and column as further coordinates, -1 for what stands for
        no place; and query, where several were asked for, counted from 0. In layers of cross-attention the axis is
        `key` instead of position. The sum is not the metric, since the model is not linear.

    Raises:
        ValueError: for a prompt without an image, or a layer, query or position that is not there, or a layer that
            attends to words only.
        TypeError: for several prompts.

    Example:
        >>> found = mv.gradient_attention(vlm, real, mv.logit_difference("yes", "no"))
        >>> mv.plot.heatmap(found.attribution.sum("position"), title="What each head's attention to the picture adds")
        >>> total = found.attribution.sum(["layer", "head"])
        >>> mv.plot.over_image(total, real.images[0], real.pictures[0])

    Source:
        Chefer et al. (2021), "Generic Attention-Model Explainability for Interpreting Bi-Modal and Encoder-Decoder
        Transformers", section 3, equation 5, before the mean over heads and the cut at zero. "Hallucination Begins
        Where Saliency Drops" (2026) scores tokens by its size; the published code takes the gradient of the prediction
        at one position and reads the row of the next, which is zero.
    """
    if not one_prompt(prompt).image:
        raise ValueError("the prompt holds no image to look at; make it with vlm.prompt(image, text).")
    dim, alone = image_dim(prompt), np.ndim(queries) == 0
    asked = [whole("queries", queries)] if alone else list(whole_numbers("queries", queries))
    chosen = cross_layers(vlm) if layers is None and dim == "key" else chosen_layers(vlm, layers)
    sites = [looking(vlm, prompt, layer) for layer in chosen]
    reading = rows(asked, None if dim == "key" else prompt.image)
    run = vlm.run(prompt, read=dict.fromkeys(sites, reading), grad_of=metric, position=position)
    weights, gradients = (np.stack([numbers(of[site][0]) for site in sites]) for of in (run, run.grad))
    axes, metric_in = ["layer", "head", "query", dim], metric_unit(metric)
    long = {"long_name": "gradient x attention", "units": metric_in}
    found = xr.Dataset(
        {
            "attribution": (axes, weights * gradients, long),
            "attention": (axes, weights, {"long_name": "attention weight", "units": "fraction"}),
            "gradient": (axes, gradients, {"long_name": "gradient of the weight", "units": f"{metric_in} per weight"}),
        },
        coords={
            "layer": chosen,
            "head": np.arange(weights.shape[1]),
            "query": [at % len(prompt) for at in asked],
            **image_coordinates(prompt),
        },
        attrs=record(vlm, [prompt], metric, metric_position=place_of(prompt, position)),
    )
    return found.isel(query=0) if alone else found


def relevancy(
    vlm: VLM, prompt: Prompt, metric: Metric, position: int = -1, layers: Sequence[int] | None = None
) -> xr.Dataset:
    """On which tokens a metric rests, followed through all layers: gradient times attention, multiplied up.

    Each layer's map is the mean over heads of attention times its gradient, where that is positive; the relevancy R of
    all positions for each other begins as the identity, and each layer adds its map times R. What is formed of it is
    one row.

    Args:
        position: whose logits the metric is of, and whose row is read: the position that predicts; by default the last.
        layers: which maps to multiply, in the model's order; None means all.

    Returns:
        `relevancy` over axis position, image tokens only, with image, tile, row and column as further coordinates, -1
        for what stands for no place; and `by_span`, its sums over the spans of the prompt, of which the position's own
        holds the 1 that R begins with. Never negative: what speaks against the metric is left out. Proportions mean
        more than values, since a product of maps has no unit.

        Where pictures are seen by cross-attention (Mllama) this is refused: the paper's rule for two modalities needs
        choices that it does not make for such decoders. The tokens of a model with a Q-Former are its queries, which
        stand for no place; `compose_queries` carries values on them over to patches.

    Raises:
        ValueError: for a prompt without an image, a model that sees its picture by cross-attention, or a position or
            layer that is not there.
        TypeError: for several prompts.

    Example:
        >>> found = mv.relevancy(vlm, real, mv.logit_difference("yes", "no"))
        >>> mv.plot.over_image(found.relevancy, real.images[0], real.pictures[0])

    Source:
        Chefer et al. (2021), "Generic Attention-Model Explainability for Interpreting Bi-Modal and Encoder-Decoder
        Transformers", section 3, equations 5 and 6, the rule for self-attention.
    """
    chosen, at = among_words(vlm, prompt, layers), place_of(prompt, position)
    row, value = folded(vlm, prompt, chosen, partial(_relevant, unit(at, len(prompt))), metric, position)
    about = {**record(vlm, [prompt], metric), "value": value}
    return row_of_product(vlm, prompt, "relevancy", row, chosen, at, about, {"long_name": "relevancy"})


def span_flow(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    spans: Mapping[str, Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    position: int = -1,
) -> xr.Dataset:
    """How much of what matters to a metric flows from each span to each other, in every layer and head.

    Args:
        spans: named lists of positions, which may overlap; None means the prompt's own.
        layers: which; None means all whose words attend to each other.
        position: whose logits the metric is of.

    Returns:
        `flow` over axes layer, head, source and target: the size of attention times gradient, summed over the pairs of
        a query in the target and a key in the source, and divided by the number of pairs of which the query sees the
        key, itself included. A position that sees only itself (the first) has weight 1 on itself, whatever the model.
        In the metric's unit; sum it over head for the paper's. Not a number where no query of the target sees the
        source. `pairs` counts them, by layer: a layer with a window sees fewer. Sizes do not say whether what flows
        speaks for the metric or against it.

    Raises:
        ValueError: for spans of no position or of one that is not there, a layer that is not there or attends to the
            picture alone, or a position that is not there.
        TypeError: for several prompts.

    Example:
        >>> found = mv.span_flow(vlm, real, mv.logit_difference("yes", "no"))
        >>> into_last = found.flow.sum("head", min_count=1).sel(target="last")
        >>> mv.plot.lines(into_last, x="layer", colour="source", title="What flows into the last position")

    Source:
        Yin et al. (2025), "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal
        Large Language Models", their flow analysis, after Wang et al. (2023), "Label Words are Anchors", section 2.
    """
    named_spans = _spans(one_prompt(prompt), spans)
    chosen = own_layers(vlm) if layers is None else _attending(vlm, chosen_layers(vlm, layers))
    found, value = folded(vlm, prompt, chosen, partial(_flows, named_spans), metric, position)
    sums, pairs = map(numbers, found)
    unit_of = metric_unit(metric)
    with np.errstate(invalid="ignore"):
        flow = np.where(pairs[:, None] > 0, sums / pairs[:, None], np.nan)
    long = {"long_name": "|gradient x attention| per pair", "units": unit_of}
    return xr.Dataset(
        {
            "flow": (["layer", "head", "target", "source"], flow, long),
            "pairs": (["layer", "target", "source"], pairs.astype(int), {"long_name": "pairs that see each other"}),
        },
        coords={
            "layer": chosen,
            "head": np.arange(flow.shape[1]),
            "target": list(named_spans),
            "source": list(named_spans),
        },
        attrs=record(vlm, [prompt], metric, value=value, metric_position=place_of(prompt, position)),
    ).transpose("layer", "head", "source", "target")


# -- parts -----------------------------------------------------------------------------------------------------------


def _relevant(row: Row, maps: Sequence[Attention]) -> Row:
    """A row of the relevancy of all positions for each other, which begins as itself."""
    for attention in reversed(maps):
        row = row + carried(row, attention, _positive)
    return row


def _positive(piece: Piece) -> Tensor:
    """The same where it speaks for the metric."""
    return saliency(piece).clamp_(min=0)


def _flows(spans: Mapping[str, Sequence[int]], maps: Sequence[Attention]) -> tuple[Tensor, Tensor]:
    """Both numbers of `_between`, for each layer."""
    sums, pairs = zip(*(_between(one, spans) for one in maps), strict=True)
    return torch.from_numpy(np.stack(sums)), torch.from_numpy(np.stack(pairs))


def _between(attention: Attention, spans: Mapping[str, Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """By head, target and source, sizes of attention times gradient; and how many pairs see each other."""
    length, count = attention.k.shape[2], len(spans)
    columns = torch.stack([indicator(keys, length) for keys in spans.values()], -1)

    def summed(piece: Piece) -> Tensor:
        weighted = saliency(piece)
        return weighted.abs_() @ columns[piece.keys].to(weighted)

    def seen(piece: Piece) -> Tensor:
        there = (piece.scores > -torch.inf).float()
        return there @ columns[piece.keys].to(there)

    sizes, pairs = attention.collected(summed, None, count), attention.sight().collected(seen, None, count)
    into = numbers(columns)
    by_span = [np.einsum("hqs,qt->hts", numbers(by_query[0]), into) for by_query in (sizes, pairs)]
    return by_span[0], by_span[1][0]


def _spans(prompt: Prompt, spans: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Spans as they were given, counted from 0; or the prompt's own."""
    named_by = prompt.spans if spans is None else spans
    if not isinstance(named_by, Mapping) or not named_by:
        raise ValueError(
            f"spans={told(named_by)} names no positions; give for instance prompt.spans or {{'image': prompt.image}}."
        )
    given = {str(name): whole_numbers(str(name), held) for name, held in named_by.items()}
    for name, held in given.items():
        beyond = [position for position in held if not -len(prompt) <= position < len(prompt)]
        if beyond or not held:
            wrong = f"position {beyond[0]}" if beyond else "nothing"
            raise ValueError(f"the span {name!r} holds {wrong}; give positions of the prompt, which has {len(prompt)}.")
    return {name: tuple(position % len(prompt) for position in held) for name, held in given.items()}


def _attending(vlm: VLM, layers: list[int]) -> list[int]:
    """Layers whose words attend to each other."""
    across = [layer for layer in layers if layer in cross_layers(vlm)]
    if across:
        raise ValueError(
            f"in {named(across)} words attend to the picture alone, so nothing flows between spans; choose from "
            f"{named(own_layers(vlm))}."
        )
    return layers
