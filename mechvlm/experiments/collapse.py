"""Does the picture still change what layers do? Updates and states with the real picture, and with a null one.

Rule this module guards: an update is what a layer really adds, its output minus its input, before any final norm.
transformers' `hidden_states[-1]` is after the final norm, and an "update" taken with it is none.

>>> found = language_prior_collapse(vlm, real, "black")
>>> found.update_cosine.dims
('prompt', 'null', 'layer', 'span')
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.nulls import common_end, described, null_prompts
from mechvlm.experiments.published import VIAR, named_spans, published, spans_of
from mechvlm.experiments.record import record
from mechvlm.experiments.sweep import numbers
from mechvlm.experiments.uncertainty import with_intervals
from mechvlm.experiments.updates import MEASURES, Reduced
from mechvlm.points import rows_for
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, beside, unsaid
from mechvlm.sites import Site
from mechvlm.unembedding import normed as after_norm
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

FROM_END = ("question", "last", "text")
"""Spans that can be matched from the end, where the picture is taken out."""
MEANING = {
    "update_cosine": ("residual updates, real and null", "cosine"),
    "state_cosine": ("residual states, real and null", "cosine"),
    "norm": ("norm of the real state", "residual stream"),
    "null_norm": ("norm of the null's state", "residual stream"),
    "norm_difference": ("norm of the real state minus the null's", "residual stream"),
    "distance": ("norm of the difference of the states", "residual stream"),
    "above_swap": ("update cosine above another real picture's", "cosine"),
}
Table = dict[str, np.ndarray]
COMPARED = ("resid_pre", "resid_post")
"""What a layer is handed, and what it hands on."""


def language_prior_collapse(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    nulls: Any = ("black",),
    clusters: Sequence[Any] | None = None,
    spans: Sequence[str] = ("bos", "prefix", "image", "question", "last", "text"),
    convention: str | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How alike a model's layers work with the real picture and with a null one, layer by layer and span by span.

    A cosine near 1 at the words behind the picture says that a layer adds much the same there whatever it was shown.
    By itself it has no scale: words, their places and the template are the same in both runs. So give "swap" among the
    nulls, another real picture: `above_swap` is what a null's cosine has beyond that. Where a null picture is no more
    like the real one than another real picture is, its cosine says nothing about a picture that is ignored. "noise" is
    another null to compare "black" with, which is no more typical a picture.

    Args:
        prompts: one, or several. Each runs with its null prompts as a batch, and is reduced where the model runs.
        nulls: null images: "black", "grey", "white", "mean", "noise", "diffusion", "blur", "shuffle", "swap" (the
            picture of the next prompt that has another one), functions of `mv.images`, or "no_image", which takes the
            image tokens out: positions are then matched from the end, for the spans question, last and text, as far as
            the tokens are the same (edits of the model itself act there at other words). A mapping names them, or ready
            null prompts, one for each prompt.
        clusters: what prompts belong together, for the intervals; by default their pictures.
        spans: over whose positions is averaged: "bos", "prefix", "image", "separators", "question", "last", or "text",
            question and last together.
        convention: "viar-2026" computes what was published: positions 0 to N - 1 are the image, where N counts the
            image tokens, all behind them text; the last layer's state is the one after the final norm; the first
            layer's update is not a number, and that of a layer that adds nothing at any position is 1. The null is
            black.
        out: a folder in which what is finished is kept, and which several processes can share; see `mechvlm.workers`.

    Returns:
        Over axes prompt, null, layer and span: `update_cosine`, the mean over the span's positions of the cosine of
        what a layer adds (its output minus its input) in the real and in the null run, and `state_cosine`, the same of
        its output. A position that a layer adds exactly nothing to in either run has no direction there, and is left
        out (also under the convention, which leaves out products of norms up to 1e-8). `norm`, the mean norm of the
        real run's outputs (without axis null), `null_norm`, `norm_difference`, the first minus the second, and
        `distance`, the mean norm of the difference. With "swap" among the nulls `above_swap`, an update cosine minus
        that of the swap. `update_cosine_normed` and `state_cosine_normed` are the last layer's with its output taken
        after the final norm, as `hidden_states[-1]` has it (not under the published convention, where that is in its
        place). Each with `_mean`, `_low` and `_high` over prompts, an interval over clusters. What a prompt has no
        positions of is not a number.

    Raises:
        ValueError: without prompts, for one without an image, for a span, null or convention that is not known, for
            another number of clusters, or a convention together with other nulls or spans than its own.

    Example:
        >>> found = mv.language_prior_collapse(vlm, [real], ["black", "noise"])
        >>> bool((found.update_cosine.sel(span="bos") > 0.999).all())  # nothing of the picture is seen before it
        True

    Source:
        VIAR (github.com/aayambansal/VIAR), its "language prior collapse"; its layer l is our layer l, and its updates
        are of `hidden_states`, whose last entry is after the final norm.
    """
    old, asked, names = published(convention), check_prompts(prompts, vlm.shape), named_spans(spans)
    if old:
        names = [name for name in names if name in ("image", "text")]
        if described(nulls) != "black" or not names:
            raise ValueError(
                f"convention={VIAR!r} compares with black pictures, in the spans 'image' and 'text', and was asked for "
                f"{described(nulls)} in {', '.join(named_spans(spans))}; leave the convention out for others."
            )
    groups, held = clusters_of(asked, clusters), [spans_of(prompt, names, convention) for prompt in asked]
    others = null_prompts(vlm, asked, nulls)

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        (number,) = group
        own = {null: others[null][number] for null in others}
        tables = yield from _tables(vlm, asked[number], own, held[number], old)
        return arrays(**{f"{at} {name}": x for at, null in enumerate(others) for name, x in tables[null].items()})

    found: dict[str, list[Table]] = {null: [] for null in others}
    shown = [other for null in others for other in others[null]]
    what = ["language_prior_collapse", [one.encoding for one in shown], list(others), names, convention]
    for one in worked(vlm, asked, [[number] for number in range(len(asked))], work, out, what):
        for number, tables in enumerate(found.values()):
            named = [str(name).split(" ", 1) for name in one]
            tables.append({name: one[f"{at} {name}"].values for at, name in named if at == str(number)})
    how = convention or "outputs before the final norm, positions computed"
    return _dataset(asked, found, names, groups, record(vlm, asked, nulls=described(nulls), convention=how))


def _tables(
    vlm: VLM, prompt: Prompt, others: Mapping[str, Prompt], held: dict[str, list[int]], old: bool
) -> Work[dict[str, Table]]:
    """The measures of one prompt with each of its null prompts."""
    whole = [null for null in others if len(others[null]) == len(prompt)]
    apart = [null for null in others if null not in whole]
    made, *ends = yield from beside(
        [
            _together(vlm, prompt, [others[null] for null in whole], list(held.values()), old),
            *(_from_the_end(vlm, prompt, others[null], held) for null in apart),
        ]
    )
    return dict(zip(whole, made, strict=True)) | {null: table for null, (table,) in zip(apart, ends, strict=True)}


def tabled(
    layers: Sequence[Float[np.ndarray, "row measure span"]],
    normed: Float[np.ndarray, "row measure span"],
    row: int,
    old: bool,
) -> Table:
    """One null's measures over layer and span, and those of the last layer after the final norm over span.

    Args:
        layers: the measures of each layer, the real run's in row 0.
        normed: those of the last layer after the final norm.
        row: the null's.
        old: whether to put together what was published: the normed in the last layer's place, no first update, and 1
            for updates that are all zero.
    """
    every = np.stack([*layers[:-1], normed if old else layers[-1]])  # layer row measure span
    own = {name: every[:, row, number] for number, name in enumerate(MEASURES)}
    own["null_norm"], own["norm"] = own["norm"], every[:, 0, MEASURES.index("norm")]
    if old:
        nothing = np.isnan(own["update_cosine"]) & np.isfinite(own["distance"])  # and not a state that is no number
        own["update_cosine"] = np.where(nothing, 1.0, own["update_cosine"])
        own["update_cosine"][0] = np.nan
        return own
    return own | {f"{name}_normed": normed[row, number] for number, name in enumerate(MEASURES[:2])}


def _together(
    vlm: VLM, prompt: Prompt, others: Sequence[Prompt], spans: list[list[int]], old: bool
) -> Work[list[Table]]:
    """A prompt with null prompts of its own positions, as one batch, or several, each with the real one first."""
    count, size = vlm.shape.layers["text"], max(1, rows_for(prompt) - 1)
    groups, found = [others[start : start + size] for start in range(0, len(others), size)], list[Table]()
    asked = [
        {"prompt": [prompt, *some], "read": Reduced(spans, _norm_of(vlm)).reads(count), "value": unsaid}
        for some in groups
    ]
    for some, run in zip(groups, (yield asked), strict=True):
        layers = [numbers(run[Site("resid_post", layer)]) for layer in range(count)]
        measures = [*layers[:-1], layers[-1][:, 0]]
        found += [tabled(measures, layers[-1][:, 1], row, old) for row in range(1, len(some) + 1)]
    return found


def _from_the_end(vlm: VLM, prompt: Prompt, other: Prompt, held: dict[str, list[int]]) -> Work[list[Table]]:
    """A prompt with one that has other positions before the words; only what stands at common tokens is compared."""
    count, first = vlm.shape.layers["text"], len(prompt) - common_end(prompt, other)
    places = [(kind, layer, "text") for layer in range(count) for kind in COMPARED]
    spans, norm, held_there = list(ends_of(prompt, other, held).values()), _norm_of(vlm), dict[str, Any]()

    def ends(one: Prompt) -> dict[Site, Any]:
        start = first + len(one) - len(prompt)
        part = partial(torch.narrow_copy, dim=1, start=start, length=len(one) - start)
        return dict.fromkeys((Site(*place) for place in places), part)

    def keep(read: dict, _gradients: dict) -> None:
        held_there["states"] = read

    def compare(read: dict, _gradients: dict) -> list[Tensor]:
        both, reduced, layers = held_there["states"], Reduced(spans, norm), []
        for layer in range(count):
            pre, post = (torch.cat([both[kind, layer, "text"], read[kind, layer, "text"]]) for kind in COMPARED)
            reduced.enters(pre)
            layers.append(reduced.leaves(post))
        return [*layers, reduced.last(post)[:, 1]]

    _, run = yield [
        {"prompt": prompt, "read": ends(prompt), "reduce": keep, "value": unsaid},
        {"prompt": other, "read": ends(other), "reduce": compare, "value": unsaid},
    ]
    *layers, normed = map(numbers, run.reduced)
    return [tabled(layers, normed, 1, False)]


def ends_of(prompt: Prompt, other: Prompt, held: dict[str, list[int]]) -> dict[str, list[int]]:
    """Which positions of spans can be compared with another prompt's, counted from the first common token of the end.

    Example:
        >>> ends_of(real, vlm.prompt(None, real.words), {"last": real.last, "image": real.image})["image"]
        []
    """
    first = len(prompt) - common_end(prompt, other)
    return {
        name: [position - first for position in positions if position >= first and name in FROM_END]
        for name, positions in held.items()
    }


def _norm_of(vlm: VLM) -> Callable[[Tensor], Tensor]:
    """The final norm, for readings."""
    return lambda x: after_norm(vlm.model, vlm.arch, x)


def _dataset(
    asked: Sequence[Prompt],
    found: dict[str, list[Table]],
    names: list[str],
    clusters: Sequence[Any],
    about: dict[str, Any],
) -> xr.Dataset:
    """All tables as they are returned, with means and intervals."""
    dims = ["prompt", "null", "layer", "span"]
    first = next(iter(found.values()))[0]
    values = {}
    for name, one in first.items():
        stacked = np.stack([[table[name] for table in found[null]] for null in found], 1)
        values[name] = (dims if one.ndim == 2 else [dims[0], dims[1], dims[3]], stacked)
    values["norm"] = ([dims[0], *dims[2:]], values["norm"][1][:, 0])
    values["norm_difference"] = (dims, values["norm"][1][:, None] - values["null_norm"][1])
    where = {
        "prompt": np.arange(len(asked)),
        "null": list(found),
        "layer": np.arange(len(first["norm"])),
        "span": names,
    }
    result = xr.Dataset(values, where)
    if "swap" in found:
        result["above_swap"] = result.update_cosine - result.update_cosine.sel(null="swap", drop=True)
    for name in map(str, result.data_vars):
        long, unit = MEANING[name.removesuffix("_normed")]
        after = " (output after the final norm)" if name.endswith("_normed") else ""
        result[name].attrs = {"long_name": long + after, "units": unit}
    return with_intervals(result, clusters).assign_attrs(about)
