"""Which image tokens does the answer rest on? Sets of them replaced by a token that says nothing, against random sets.

Rule this module guards: a set is compared with random sets of as many other image tokens of the same picture.

>>> sets = {"outliers": norm_outliers(vlm, real, count=3)}
>>> ablate_image_tokens(vlm, real, yes, sets, controls=4).effect.dims
('prompt', 'set')
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit
from mechvlm.experiments.examples import (
    Points,
    about,
    averaged,
    checked_mapping,
    checked_objective,
    labelled,
    metric_of_each,
    p_values,
    shared_names,
    swept_and_clean,
    unit_of,
)
from mechvlm.experiments.inputs import input_sites
from mechvlm.experiments.means import mean_features
from mechvlm.experiments.record import one_prompt
from mechvlm.experiments.removal import without
from mechvlm.experiments.saliency import integrated_gradients
from mechvlm.experiments.sight import image_coordinates, image_dim
from mechvlm.experiments.sweep import numbers
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, number, told, whole
from mechvlm.vlm import VLM

Sets = Mapping[str, Sequence[int]] | Callable[[Prompt], Mapping[str, Sequence[int]]]
"""Named sets of image tokens, by position."""


def ablate_image_tokens(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    sets: Sets,
    to: Any = "mean",
    controls: int = 10,
    seed: int = 0,
    objective: str = "lower",
    clusters: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How a metric changes when sets of image tokens say nothing any more, and when as many others do.

    A token is replaced where the picture enters the language model: its image features, and what deep-stack adds of
    them. The published numbers count prompts alone that are answered right with the whole picture; leave others out by
    `found.clean`, or do not ask them.

    Args:
        metric: one for all prompts, or a list with one for each.
        sets: named lists of positions of image tokens (keys, where cross-attention looks at the picture), or a function
            from a prompt to them: regions of `image_regions`, objects of `tokens_in` with a border of 0, 1 or 2
            tokens, `norm_outliers`, `gradient_tokens`. All prompts have sets of the same names.
        to: what takes their place. "mean": the mean image token of these prompts; what `mean_features` gives of a
            dataset; "zero"; one vector, `d_model`; or a prompt with the same image tokens, or a function from a prompt
            to one, whose tokens at the same places are taken.
        controls: how many random sets for each set, drawn anew for each prompt.
        seed: of the random sets.
        objective: whether taking tokens away is to make the metric "lower" or "higher", for `p_value`.
        clusters, batch_size, out: as in `ablate_each`.

    Returns:
        `effect`, over axes prompt and set: the metric with the set replaced minus the metric without; `mean`, `low` and
        `high` over prompts; `random`, over prompt, set and sample, the effect of random sets of the same count from the
        picture's other image tokens. `p_value`, over set: the share of samples whose mean over prompts is as low, with
        the set itself among them. `tokens`, over prompt and set: the count. `clean`, over prompt.

    Raises:
        ValueError, TypeError: for sets that hold what is no image token, or more than half of them, and a `to` that
            does not fit.

    Example:
        >>> parts = lambda prompt: mv.image_regions(prompt, 2, 2)
        >>> mv.plot.token_sets(mv.ablate_image_tokens(vlm, [real], yes, parts, controls=2))

    Source:
        Neo et al. (2024), "Towards Interpreting Visual Information Processing in Vision-Language Models", section 3:
        object tokens with a buffer, register tokens and high-gradient tokens against random ones of the same count.
    """
    asked, checked = check_prompts(prompts, vlm.shape), checked_objective(objective)
    metrics, sites = metric_of_each(metric, asked), input_sites(vlm, "image_features")
    drawn = _drawn(asked, [_places(prompt, checked_mapping("sets", sets, prompt)) for prompt in asked], controls, seed)
    source = _source(vlm, asked, to, sites, None if out is None else Path(out) / "means")

    def points(own: dict[str, list[list[int]]], prompt: Prompt) -> Points:
        given = source(prompt)

        def away(set: str, sample: int) -> list[Edit]:  # the axis is named so
            return without(sites, given, np.array(own[set][sample + 1]))

        return away

    axes = {"set": list(drawn[0]), "sample": range(-1, controls)}
    ways = [partial(points, own) for own in drawn]
    run, clean = swept_and_clean(vlm, asked, ways, metrics, batch_size, out, **axes)
    found = run - clean
    effect, random = found.sel(sample=-1, drop=True), found.sel(sample=slice(0, None))
    effects = {"effect": effect, "random": random, **averaged(effect, clusters)}
    values = labelled(effects, "effect of ablation", unit_of(metrics))
    values |= labelled({"clean": clean}, "metric without ablation", unit_of(metrics))
    held = xr.DataArray([[len(own[key][0]) for key in own] for own in drawn], dims=["prompt", "set"])
    counts = {"p_value": p_values(effect, random, checked), "tokens": held.assign_attrs(units="image tokens")}
    more: dict[str, str | int] = {"ablated_to": _told(to), "objective": checked, "controls": controls, "seed": seed}
    sign = "metric with tokens replaced minus metric without"
    return xr.Dataset(
        {**values, **counts}, attrs=about(vlm, asked, metrics, clusters, value=sign, engine=run.attrs["engine"], **more)
    )


def norm_outliers(vlm: VLM, prompt: Prompt, count: int | None = None, factor: float | None = None) -> list[int]:
    """The image tokens whose image features are longest: often registers, which hold no part of the picture.

    Args:
        count: so many of them; or
        factor: all that are longer than so many times the median.

    Returns:
        Positions (keys, where cross-attention looks at the picture), the longest first.

    Raises:
        ValueError: for neither or both of count and factor, or ones that leave no token or take more than there are.

    Example:
        >>> mv.norm_outliers(vlm, real, count=2)
        [24, 37]

    Source:
        Darcet et al. (2024), "Vision Transformers Need Registers", section 2.1; Neo et al. (2024), section 3.
    """
    site = Site("image_features")
    where = _tokens(one_prompt(prompt))
    norms = numbers(vlm.run(prompt, read=[site])[site].double().norm(dim=-1).flatten())
    order = np.argsort(-norms, kind="stable")
    if (count is None) == (factor is None):
        raise ValueError("outliers are so many, or longer than so many times the median; give count or factor.")
    if count is not None:
        return [where[at] for at in order[: _number_of(count, len(where))]]
    least = number("factor", factor) * float(np.median(norms))
    found = [where[at] for at in order if norms[at] > least]
    if not found:
        raise ValueError(
            f"no image token is longer than {least:.4g}, {factor} times the median; the longest has {norms.max():.4g}."
        )
    return found


def gradient_tokens(vlm: VLM, prompt: Prompt, metric: Metric, count: int, **settings: Any) -> list[int]:
    """The image tokens that account for most of a metric, by integrated gradients.

    Args:
        count: so many of them.
        settings: of `integrated_gradients`, such as `baseline` and `steps` (the source takes 50).

    Returns:
        Positions (keys, where cross-attention looks at the picture), the highest attribution first.

    Raises:
        ValueError: for more tokens than there are, or where `integrated_gradients` finds no sum.

    Example:
        >>> len(mv.gradient_tokens(vlm, real, yes, 3, tolerance=0.1))
        3

    Source:
        Neo et al. (2024), "Towards Interpreting Visual Information Processing in Vision-Language Models", section 3.
    """
    wanted = _number_of(count, len(_tokens(one_prompt(prompt))))
    found = integrated_gradients(vlm, prompt, metric, at="image_features", **settings).attribution
    order = np.argsort(-found.values, kind="stable")[:wanted]
    return [int(at) for at in found[found.dims[0]].values[order]]


def _number_of(count: int, total: int) -> int:
    if not 1 <= whole("count", count) <= total:
        raise ValueError(f"count={count} image tokens cannot be taken of {total}; give a number from 1 to that.")
    return count


def _tokens(prompt: Prompt) -> list[int]:
    """Positions or keys of a picture's image tokens, in the order of its features."""
    if not prompt.image:
        raise ValueError("the prompt holds no image to take tokens of; make it with vlm.prompt(image, text).")
    return [int(at) for at in np.asarray(image_coordinates(prompt)[image_dim(prompt)])]


def _total(prompt: Prompt) -> int:
    return len(_tokens(prompt))


def _places(prompt: Prompt, sets: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Sets by their tokens' places among the picture's features."""
    where = {position: at for at, position in enumerate(_tokens(prompt))}
    for name, positions in sets.items():
        wrong = [position for position in positions if position not in where]
        if wrong:
            raise ValueError(f"the set {name!r} holds {wrong[0]}, which is no image token; give some of prompt.image.")
    return {name: sorted({where[position] for position in positions}) for name, positions in sets.items()}


def _drawn(
    prompts: Sequence[Prompt], places: Sequence[Mapping[str, list[int]]], controls: int, seed: int
) -> list[dict[str, list[list[int]]]]:
    """For each prompt and each set its tokens, and after them random sets of as many others."""
    if whole("controls", controls) < 1:
        raise ValueError(f"controls={controls} compares with nothing; give 1 random set or more.")
    draw, names = np.random.default_rng(seed), shared_names("sets", places)
    return [
        {key: [own[key], *_others(key, own[key], _total(prompt), controls, draw)] for key in names}
        for prompt, own in zip(prompts, places, strict=True)
    ]


def _others(name: str, places: Sequence[int], total: int, controls: int, draw: np.random.Generator) -> list[list[int]]:
    """Random sets of as many other tokens."""
    others = np.setdiff1d(np.arange(total), places)
    if len(others) < len(places):
        raise ValueError(
            f"the set {name!r} holds {len(places)} of {total} image tokens, so there are not as many others to compare "
            "it with; give smaller sets."
        )
    return [sorted(draw.permutation(others)[: len(places)].tolist()) for _ in range(controls)]


def _source(
    vlm: VLM, prompts: Sequence[Prompt], to: Any, sites: Sequence[Site], out: Path | None
) -> Callable[[Prompt], Any]:
    """What takes the place of a prompt's features, by site."""
    if isinstance(to, str) and to == "mean":
        to = mean_features(vlm, prompts, out)
    if isinstance(to, Prompt) or callable(to):
        return lambda prompt: _of_another(vlm, prompt, to(prompt) if callable(to) else to, sites)
    width = vlm.shape.d_model["text"]
    if isinstance(to, str) and to == "zero":
        vectors = dict.fromkeys(sites, torch.zeros(width))
    elif isinstance(to, Tensor) and len(sites) == 1:
        vectors = {sites[0]: to}
    elif isinstance(to, Mapping) and set(to) == set(sites):
        vectors = dict(to)
    else:
        raise TypeError(
            f"to={told(to)} cannot take the place of image features; give 'mean', 'zero', a prompt, or what "
            "mv.mean_features returns."
        )
    for site, vector in vectors.items():
        if vector.shape != (width,):
            raise ValueError(f"to holds {tuple(vector.shape)} for {site}; it must be one vector of {width}.")
    return lambda prompt: {site: vectors[site].expand(1, _total(prompt), width) for site in sites}


def _of_another(vlm: VLM, prompt: Prompt, other: Prompt, sites: Sequence[Site]) -> Any:
    if other.features != prompt.features:
        raise ValueError(
            f"to has {_total(other)} image tokens and the prompt {_total(prompt)}, so they cannot be matched; make it "
            "with prompt.with_image."
        )
    return vlm.run(other, read=sites)


def _told(to: Any) -> str:
    if isinstance(to, str):
        return {"mean": "the mean image token of these prompts", "zero": "zero"}[to]
    return "another prompt's tokens" if isinstance(to, Prompt) or callable(to) else "given values"
