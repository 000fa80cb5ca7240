"""Where does it look? Attention by span, layer and head, and over the image.

Papers call five different numbers the visual attention ratio; `attention_profile` tells them apart by name. None of
them needs a map of all queries by all keys, and none is made.

>>> attention_profile(vlm, real).mass.sel(span="image").mean(["example", "head"])
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.batch import check_prompts
from mechvlm.experiments.looks import Asking, Averages, alike, groups_of
from mechvlm.experiments.ratios import MEANING, ratios
from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.selection import Without, keys_out, queries_of
from mechvlm.experiments.sight import cross_layers, image_coordinates, image_dim, looking, named
from mechvlm.experiments.sweep import numbers
from mechvlm.prompt import Prompt
from mechvlm.readings import rows
from mechvlm.rounds import Work
from mechvlm.sites import whole, whole_numbers
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

SPANS = ("bos", "prefix", "image", "separators", "question", "last")


def attention_profile(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    queries: str | Sequence[int] = "last",
    without: Without = None,
    even: str = "visible",
    max_new_tokens: int = 20,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How the attention of some positions divides over the spans of a prompt, in every layer and head.

    Args:
        prompts: one, or several. Those with the same spans run together in batches, without padding; others apart.
        queries: whose attention, averaged over them: "last", the position that answers; "text", all positions after the
            image, or the last where there are none; "all" positions, among them those before the image, which cannot
            see it; "generated", the tokens of a greedy answer as they look back in their decode steps (the last one
            made is never looked from), each prompt by itself; or positions.
        without: keys taken out, for instance sinks. Each query's row is made to sum to one over the keys that are left
            before anything is averaged; a query that has nothing left is not among the averaged. "bos"; a list of
            positions; a function from a prompt to positions; what `mv.sinks` found for a single prompt, whose
            `mv.sink_positions` are taken out in every layer; or a list with positions or sinks for each prompt.
        even: what lift compares with. "visible": attention spread evenly over what each query sees by the layer's own
            mask. "length": N / T, a span's share of all positions, as published, whatever a query sees: a query before
            the last sees fewer than T positions, and the whole image if it stands behind it, so that even attention
            has a published lift above 1, and one from before the image below.
        max_new_tokens: at most so many are generated, for queries="generated".
        out: a folder in which what is finished is kept, and which several processes can share; see `mechvlm.workers`.

    Returns:
        Five numbers that papers call visual attention, over axes example, layer and head, and span where it says so:
        `mass` (span): attention weights on the span, fractions that sum to 1 over the spans, which hold every
        position once. `density` (span): mass divided by the number of the span's keys. `density_share`: the image's
        density over the sum of it and that of all other keys together. `lift` (span): mass over what even attention
        would give (1: even), not a number where none of the queries sees the span. `vas`: attention to the image over
        attention to system tokens, bos and prefix, both summed over queries. A mean of it over heads is ruled by heads
        that pay the system tokens next to nothing; take the median, or sum `mass` over heads before dividing.
        `n_keys` counts a span's keys, without those taken out; `n_queries`, over example, layer and head, the queries
        that were averaged over, without those that had nothing left. The span `generated` holds generated tokens.
        Layers that attend to the picture's keys instead of the text (Mllama's cross-attention) divide nothing over its
        spans; they are not numbers, and `attrs` name them in `note`. `attention_map` shows what they look at.

    Raises:
        ValueError: without prompts, or for positions that a prompt has not, or keys of which none is left, to the
            prompt or to any of its queries.

    Example:
        >>> mv.attention_profile(vlm, [real, null]).mass.mean("head").sel(span="image")
        >>> mv.attention_profile(vlm, real, queries="text", without="bos").vas.dims
        ('example', 'layer', 'head')

    Source:
        `mass`: Chen et al. (2024), "An Image is Worth 1/2 Tokens After Layer 2", section 3. `density`,
        `density_share`, and `lift` over length: VIAR (github.com/aayambansal/VIAR), its layer profiles. `vas`: "From
        Narrow to Panoramic Vision" (2026), arXiv 2603.03825, the visual attention score.
    """
    asked = check_prompts(prompts, vlm.shape)
    chosen = [queries_of(prompt, queries) for prompt in asked]
    gone = keys_out(asked, without)
    if even not in ("visible", "length"):
        raise ValueError(f"even={even!r} is not known; choose 'visible' or 'length'.")
    generated = isinstance(queries, str) and queries == "generated"
    if generated and whole("max_new_tokens", max_new_tokens) < 2:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} makes no token that looks back, since the last one made never does; give "
            "2 or more."
        )
    names = [name for name in SPANS if any(name in prompt.spans for prompt in asked)] + ["generated"] * generated
    firsts = {} if generated else alike(asked, chosen, gone, names)
    groups = [[at] for at in range(len(asked))] if generated else groups_of(asked, firsts)
    asking = Asking(vlm, asked, chosen, gone, names, firsts, even)

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        looks = yield from asking.generated(group, max_new_tokens) if generated else asking.looks(group)
        return _averages(vlm, looks, group, asking)

    settings = vlm.hf.generation_config if generated else None
    own = None if settings is None else [max_new_tokens, settings.to_dict()]
    what = ["attention_profile", generated, chosen, gone, even, own]
    found = zip(groups, worked(vlm, asked, groups, work, out, what), strict=True)
    averages, n_keys, n_queries = _table(found, gone)
    where = queries if isinstance(queries, str) else ", ".join(map(str, queries))
    about = record(vlm, asked, queries=where, even=even, **_said(vlm, without, gone))
    return _dataset(asked, names, ratios(averages, names, n_keys), n_keys, n_queries, about)


def attention_map(
    vlm: VLM, prompt: Prompt, layer: int, head: int | None = None, query: int | Sequence[int] = -1
) -> xr.DataArray:
    """The attention weight of one position on each image token, in one head or averaged over a layer's heads.

    Args:
        layer: counted from 0. Where the picture is seen by cross-attention, one of the layers that do.
        head: counted from 0; None averages over the heads.
        query: the position that looks; by default the last, which answers. Or several.

    Returns:
        Attention weights over axis position, image tokens only, and for several queries over query and position;
        coordinate `query` is the position counted from 0. Their sum is the image's mass, at most 1. Image, tile, row
        and column are further coordinates, -1 for what stands for no place. In a layer of cross-attention the axis is
        `key` instead: all keys of the picture, which sum to 1. In a model with a Q-Former the tokens are its queries,
        which stand for no place; `queries_to_patches` says how those look at the picture.

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
        coords={"query": [at % len(prompt) for at in asked], **image_coordinates(prompt)},
        name="attention",
        attrs={**record(vlm, [prompt], layer=int(layer), head=which, site=str(site)), "long_name": "attention weight"},
    )
    return maps.isel(query=0) if alone else maps


def _averages(
    vlm: VLM,
    looks: Sequence[tuple[int, int, Averages]],
    group: Sequence[int],
    asking: Asking,
) -> xr.Dataset:
    """What was found of some prompts and all layers, how many keys each has, and how many queries it was of."""
    names = asking.names
    sizes = (len(group), vlm.shape.layers["text"], vlm.shape.heads["text"])
    spans = (len(names),)
    shapes: dict[str, tuple[int, ...]] = {"mass": sizes + spans, "density": sizes + spans}
    shapes |= {"even": sizes[:2] + spans, "rest": sizes}
    table = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    table["queries"], table["asked"] = np.zeros(sizes, dtype=int), np.zeros(len(group), dtype=int)
    table["n_keys"] = np.zeros((len(group), len(names)), dtype=int)
    for number, layer, found in looks:
        row, keys = group.index(number), asking.keys(number)
        table["n_keys"][row], table["asked"][row] = found.pop("n_keys", keys[-1]), found.pop("asked", len(keys))
        for name, values in found.items():
            table[name][row, layer] = values
    return arrays(**table)


def _table(
    found: Iterable[tuple[Sequence[int], xr.Dataset]], gone: Sequence[tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The averages of all prompts, how many keys each prompt has, and how many queries counted.

    Raises:
        ValueError: where the keys that are taken out leave nothing to any query of a prompt.
    """
    table: dict[str, np.ndarray] = {}
    for group, one in found:
        for name, values in one.items():
            shape = (len(gone), *values.shape[1:])
            table.setdefault(str(name), np.zeros(shape, values.dtype))[list(group)] = values
    n_queries, asked, n_keys = (table.pop(name) for name in ("queries", "asked", "n_keys"))
    for number in np.flatnonzero(asked):
        if not n_queries[number].any():
            raise ValueError(
                f"without takes out all that the queries of prompt {number} look at (queries: {asked[number]}); take "
                "out fewer keys, or ask positions that see others."
            )
    return table, n_keys, n_queries


def _said(vlm: VLM, without: Without, out: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What a profile says about how it was made."""
    across = cross_layers(vlm)
    taken = "none" if without is None else "; ".join(", ".join(map(str, one)) or "none" for one in dict.fromkeys(out))
    note = {"note": f"{named(across)}: attention to the picture's keys alone, so no number by span"} if across else {}
    return {"averaged": "over the queries; heads and examples are kept", "without": taken, **note}


def _dataset(
    prompts: Sequence[Prompt],
    names: Sequence[str],
    found: dict[str, np.ndarray],
    n_keys: np.ndarray,
    n_queries: np.ndarray,
    about: dict[str, Any],
) -> xr.Dataset:
    """The five numbers with their names."""
    axes = ["example", "layer", "head", "span"]
    named_by = {name: {"long_name": long, "units": units} for name, (long, units) in MEANING.items()}
    return xr.Dataset(
        {
            **{name: (axes[: values.ndim], values, named_by[name]) for name, values in found.items()},
            "n_keys": (["example", "span"], n_keys),
            "n_queries": (axes[:3], n_queries),
        },
        coords={
            "example": np.arange(len(prompts)),
            "question": ("example", np.array([prompt.words for prompt in prompts], dtype=str)),
            "layer": np.arange(found["mass"].shape[1]),
            "head": np.arange(found["mass"].shape[2]),
            "span": names,
        },
        attrs=about,
    )
