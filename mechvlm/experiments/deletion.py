"""Do the image tokens that a map points at matter? Take them away, the highest first, and see what the answer loses.

A map of attention, or of a gradient, is a claim about which tokens the answer rests on. This is its causal check: the
tokens' representations are replaced by those of a picture without anything to see, in the order of the map and in
random orders of the same counts. A map that is no better than chance falls as slowly as the random orders do.

>>> deletion_curve(vlm, real, mv.gradient_attribution(vlm, real, yes).attribution, yes).ranked
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm import images
from mechvlm.edits import Edit
from mechvlm.experiments.inputs import input_sites
from mechvlm.experiments.record import metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.sight import image_coordinates, image_dim
from mechvlm.experiments.sweep import measuring
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import done
from mechvlm.sites import Site, told, whole, whole_numbers
from mechvlm.vlm import VLM


def deletion_curve(
    vlm: VLM,
    prompt: Prompt,
    ranking: Any,
    metric: Metric,
    null: Any = None,
    counts: Sequence[int] | None = None,
    samples: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
) -> xr.Dataset:
    """A metric while more and more image tokens are taken away, in the order of a map and in random orders.

    A token is taken away where the picture enters the language model: its image features (and what deep-stack adds of
    them) become those of `null`, at the same position.

    Args:
        ranking: one number for each image token, as `attention_map`, `gradient_attribution` and their like return; the
            highest goes first, and of equal ones the first in the text.
        null: the same words about a picture without anything to see, whose features take the places: a prompt, or what
            `prompt.with_image` takes; by default `mv.images.black`.
        counts: how many tokens are taken away; by default none, 1, 2, 4, ... and all.
        samples: how many random orders.
        seed: of the random orders.
        batch_size: runs in one forward pass; see `sweep`.

    Returns:
        `ranked`, the metric over axis count, and `random`, over sample and count, in the metric's unit. `advantage`,
        over sample: how much lower the ranked curve lies than that random one, on average over the counts between none
        and all, as a share of what taking all away loses; 0 for a map that says nothing, not a number where all of
        them lose nothing.

    Raises:
        ValueError: for a prompt without an image, a ranking of other tokens or with NaN, or counts that are not there.

    Example:
        >>> seen = mv.attention_map(vlm, real, 3)
        >>> mv.plot.deletion(mv.deletion_curve(vlm, real, seen, mv.logit_difference("yes", "no")))

    Source:
        Petsiuk et al. (2018), "RISE", section 4.1 (deletion); its pixels are tokens here, and random orders are added.
    """
    order = ranked_tokens(one_prompt(prompt), ranking)
    total = len(order)
    asked = counted(total, counts)
    if whole("samples", samples) < 1:
        raise ValueError(f"samples={samples} compares with nothing; give 1 random order or more.")
    other = nothing_to_see(prompt, null)
    sites = input_sites(vlm, "image_features")
    source = vlm.run(other, read=sites)
    draw = np.random.default_rng(seed)
    orders = [order, *(draw.permutation(total) for _ in range(samples))]
    variants = [without(sites, source, one[:count]) for one in orders for count in asked]
    values, how = done(vlm, measuring(vlm, prompt, variants, metric, batch_size))
    found = values.reshape(len(orders), len(asked))
    about = {"long_name": metric_name(metric), "units": metric_unit(metric)}
    return xr.Dataset(
        {
            "ranked": (["count"], found[0], about),
            "random": (["sample", "count"], found[1:], about),
            "advantage": (["sample"], advantage(found, asked, total), {"long_name": "advantage", "units": "share"}),
        },
        coords={
            "count": ("count", asked, {"long_name": "image tokens taken away"}),
            "sample": np.arange(samples),
        },
        attrs=record(
            vlm, [prompt], metric, null=other.text, tokens=total, ranking=str(ranking.name), seed=seed, engine=how
        ),
    )


def ranked_tokens(prompt: Prompt, ranking: object) -> np.ndarray:
    """The image tokens by their place among the picture's features, the highest first.

    Raises:
        TypeError, ValueError: for what is no ranking of the prompt's image tokens.
    """
    if not prompt.image:
        raise ValueError("the prompt holds no image to take away; make it with vlm.prompt(image, text).")
    if not isinstance(ranking, xr.DataArray):
        raise TypeError(f"ranking={told(ranking)} is no DataArray; give what attention_map or the like returns.")
    dim, own = image_dim(prompt), list(np.asarray(image_coordinates(prompt)[image_dim(prompt)]))
    if ranking.dims != (dim,) or sorted(ranking[dim].values) != sorted(own):
        raise ValueError(
            f"the ranking has axes {', '.join(map(str, ranking.dims))} of {ranking.size} numbers; it must have one for "
            f"each of the prompt's {len(own)} image tokens, over axis {dim}."
        )
    values = ranking.sel({dim: own}).values.astype(float)
    if not np.isfinite(values).all():
        raise ValueError("the ranking holds values that are no finite numbers, so tokens cannot be put in order.")
    return np.argsort(-values, kind="stable")


def nothing_to_see(prompt: Prompt, null: Any) -> Prompt:
    """The prompt whose features take the places.

    Raises:
        ValueError: for other words, or another number of image tokens.
    """
    other = null if isinstance(null, Prompt) else prompt.with_image(images.black if null is None else null)
    mine, theirs = (one.encoding["input_ids"].tolist() for one in (prompt, other))
    if mine != theirs or prompt.features != other.features:
        raise ValueError(
            f"null asks {other.words!r}, with {len(other.image)} image tokens, and the prompt {prompt.words!r}, with "
            f"{len(prompt.image)}; only the picture may differ, so make it with prompt.with_image."
        )
    return other


def counted(total: int, counts: Sequence[int] | None) -> list[int]:
    """How many tokens are taken away, rising.

    Raises:
        ValueError: for a number that there is not.
    """
    if counts is None:
        return sorted({0, total, *(2**power for power in range(total.bit_length()) if 2**power < total)})
    found = sorted(set(whole_numbers("counts", counts)))
    if not found or found[0] < 0 or found[-1] > total:
        raise ValueError(
            f"counts={told(counts)} cannot be taken from {total} image tokens; give numbers from 0 to that."
        )
    return found


def without(sites: Sequence[Site], source: object, tokens: np.ndarray) -> list[Edit]:
    """The edits that replace some tokens' features by another run's."""
    index = torch.tensor(tokens.tolist(), dtype=torch.long)

    def edit(site: Site) -> Edit:
        given = source[site].flatten(0, 1)  # type: ignore[index]

        def replaced(features: Tensor) -> Tensor:  # image pos d_model
            flat = features.flatten(0, 1)
            here = index.to(flat.device)
            return flat.index_copy(0, here, given.to(flat)[here]).reshape(features.shape)

        return Edit(site, replaced, "prompt", label=f"take away {len(tokens)} image tokens")

    return [edit(site) for site in sites] if len(tokens) else []


def advantage(found: np.ndarray, counts: Sequence[int], total: int) -> np.ndarray:
    """How much lower the first curve lies than each other one, as a share of what taking all away loses."""
    inner = [at for at, count in enumerate(counts) if 0 < count < total]
    lost = found[0, 0] - found[0, -1]
    if not inner or counts[0] != 0 or counts[-1] != total or lost == 0:
        return np.full(len(found) - 1, np.nan)
    return (found[1:, inner] - found[0, inner]).mean(1) / lost
