"""Where does it look? Attention by span, layer and head, and over the image.

Names that the literature mixes up, and what they mean here: `mass` is the sum of attention weights on a span, `lift` is
mass divided by what attention spread evenly over all visible positions would give it.

>>> attention_profile(vlm, real).mass.sel(span="image").mean(["example", "head"])
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from mechvlm.batch import check_prompts
from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.sight import cross_layers, image_coordinates, image_dim, looking, named, own_layers
from mechvlm.experiments.sweep import numbers, rows_for
from mechvlm.prompt import Prompt
from mechvlm.readings import mass, rows
from mechvlm.sites import Site, whole, whole_numbers
from mechvlm.vlm import VLM

SPANS = ("bos", "prefix", "image", "separators", "question", "last")


def attention_profile(
    vlm: VLM, prompts: Prompt | Sequence[Prompt], queries: str | Sequence[int] = "last"
) -> xr.Dataset:
    """How the attention of some positions divides over the spans of a prompt, in every layer and head.

    Args:
        prompts: one, or several that run as batches.
        queries: "last", the position that answers; "text", all positions after the image, averaged,
            or the last where there are none; or positions.

    Returns:
        `mass`, fractions that sum to 1 over the spans, which hold every position once; `lift`, mass over the share of
        the visible keys that the span has (1: as if attention were spread evenly), not a number where none of the
        queries sees the span. What is visible is what the layer's own mask leaves: a layer with a window sees less.
        Both over axes example, layer, head, span; `n_keys` counts a span's positions. Layers that attend to the
        picture's keys instead of the text (Mllama's cross-attention) divide nothing over its spans; they are not
        numbers, and `attrs` name them in `note`. `attention_map` shows what they look at.

    Raises:
        ValueError: without prompts, or for positions that a prompt has not.

    Example:
        >>> mv.attention_profile(vlm, [real, null]).mass.mean("head").sel(span="image")

    Source:
        Chen et al. (2024), "An Image is Worth 1/2 Tokens After Layer 2", section 3, whose attention allocation is mass.
    """
    asked = check_prompts(prompts, vlm.shape)
    chosen = [_queries(prompt, queries) for prompt in asked]
    names = [name for name in SPANS if any(name in prompt.spans for prompt in asked)]
    masses, even = _masses(vlm, asked, chosen, names)
    lift = masses / np.where(even > 0, even, np.nan)[:, :, None]
    axes = ["example", "layer", "head", "span"]
    long = {"mass": "attention mass", "lift": "attention lift"}
    where = queries if isinstance(queries, str) else ", ".join(map(str, queries))
    across = cross_layers(vlm)
    note: dict[str, Any] = (
        {"note": f"{named(across)}: attention to the picture's keys alone, so no number by span"} if across else {}
    )
    return xr.Dataset(
        {
            "mass": (axes, masses, {"long_name": long["mass"], "units": "fraction"}),
            "lift": (axes, lift, {"long_name": long["lift"], "units": "1: even"}),
            "n_keys": (["example", "span"], np.array([[len(p.spans.get(n, ())) for n in names] for p in asked])),
        },
        coords={
            "example": np.arange(len(asked)),
            "question": ("example", np.array([prompt.words for prompt in asked], dtype=str)),
            "layer": np.arange(masses.shape[1]),
            "head": np.arange(masses.shape[2]),
            "span": names,
        },
        attrs=record(vlm, asked, queries=where, averaged="over the queries; heads and examples are kept", **note),
    )


def attention_map(
    vlm: VLM, prompt: Prompt, layer: int, head: int | None = None, query: int | Sequence[int] = -1
) -> xr.DataArray:
    """The attention weight of one position on each image token, in one head or averaged over a layer's heads.

    Args:
        layer: counted from 0. Where the picture is seen by cross-attention, one of the layers that do.
        head: counted from 0; None averages over the heads.
        query: the position that looks; by default the last, which answers. Or several.

    Returns:
        Attention weights over axis position, image tokens only, and for several queries over query and position. Their
        sum is the image's mass, at most 1. Image, tile, row and column are further coordinates, -1 for what stands
        for no place. In a layer of cross-attention the axis is `key` instead: all keys of the picture, which sum to 1.
        In a model with a Q-Former the tokens are its queries, which stand for no place; `queries_to_patches` says how
        those look at the picture.

    Raises:
        ValueError: for a prompt without an image, or a layer, head or query that is not there, or a layer that attends
            to words only.

    Example:
        >>> mv.plot.over_image(mv.attention_map(vlm, real, 3, 5), real.images[0], real.pictures[0])
    """
    if not one_prompt(prompt).image:
        raise ValueError("the prompt holds no image to look at; make it with vlm.prompt(image, text).")
    heads = vlm.shape.heads["text"]
    if head is not None and not 0 <= whole("head", head) < heads:
        raise ValueError(f"the text tower has {heads} heads a layer, counted from 0, so there is no head {head}.")
    alone = np.ndim(query) == 0
    asked = [whole("query", query)] if alone else list(whole_numbers("query", query))
    site, dim = looking(vlm, prompt, layer), image_dim(prompt)
    seen = vlm.run(prompt, read={site: rows(asked)})[site][0].float()  # head query key
    weights = numbers(seen.mean(0) if head is None else seen[head])
    which = "mean over heads" if head is None else f"head {head}"
    maps = xr.DataArray(
        weights if dim == "key" else weights[:, prompt.image],
        dims=["query", dim],
        coords={"query": asked, **image_coordinates(prompt)},
        name="attention",
        attrs={**record(vlm, [prompt], layer=int(layer), head=which, site=str(site)), "long_name": "attention weight"},
    )
    return maps.isel(query=0) if alone else maps


def _queries(prompt: Prompt, queries: str | Sequence[int]) -> tuple[int, ...]:
    """The positions that attend, counted from 0."""
    if isinstance(queries, str):
        if queries not in ("last", "text"):
            raise ValueError(f"queries={queries!r} is not known; choose 'last', 'text' or a list of positions.")
        text = prompt.question + prompt.last if queries == "text" else []
        return tuple(text or [len(prompt) - 1])  # a prompt that ends in its image answers there
    chosen = whole_numbers("queries", queries)
    beyond = [query for query in chosen if not -len(prompt) <= query < len(prompt)]
    if beyond or not chosen:
        given = f"position {beyond[0]}" if beyond else "an empty list"
        raise ValueError(f"queries holds {given}; give positions of the prompt, which has {len(prompt)}.")
    return tuple(query % len(prompt) for query in chosen)


def _masses(
    vlm: VLM, prompts: Sequence[Prompt], queries: Sequence[tuple[int, ...]], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mass by example, layer, head and span, and by example, layer and span what attention spread evenly would give.

    Prompts that are divided alike run together, after the first of them, of which it is also read what it may see.
    """
    alike: dict[tuple, list[int]] = {}
    for number, (prompt, chosen) in enumerate(zip(prompts, queries, strict=True)):
        spans = tuple((name, tuple(prompt.spans.get(name, ()))) for name in names)
        images = tuple(image.positions for image in prompt.images)
        alike.setdefault((spans, chosen, len(prompt), images), []).append(number)
    layers = own_layers(vlm)
    sites = [Site("pattern", layer) for layer in layers]
    found = np.full((len(prompts), vlm.shape.layers["text"], vlm.shape.heads["text"], len(names)), np.nan)
    even = np.full((len(prompts), vlm.shape.layers["text"], len(names)), np.nan)
    with tqdm(total=len(prompts), unit="prompt", leave=False, delay=1) as bar:
        for (spans, chosen, *_), members in alike.items():
            reading, size = mass(dict(spans), queries=chosen), rows_for(prompts[members[0]])
            seen: dict[Any, Any] = {Site("scores", layer): rows(chosen) for layer in layers}
            for start in (0, *range(1, len(members), size)):
                group = members[start : start + size] if start else members[:1]
                more = {} if start else seen
                run = vlm.run([prompts[number] for number in group], read={**dict.fromkeys(sites, reading), **more})
                masses = np.stack([numbers(run[site].float().mean(2)) for site in sites], 1)
                for at, number in enumerate(group):
                    found[number, layers] = masses[at]
                if not start:
                    visible = [np.isfinite(numbers(run[site][0, 0])) for site in seen]
                    even[np.ix_(members, layers)] = [_even(rows, spans) for rows in visible]
                bar.update(len(group))
    return found, even


def _even(visible: np.ndarray, spans: Sequence[tuple[str, tuple[int, ...]]]) -> list[float]:
    """The mass of each span if every query spread its attention evenly over what it sees, `query key`."""
    return [float((visible[:, list(keys)].sum(-1) / visible.sum(-1)).mean()) for _, keys in spans]
