"""Where does it look? Attention by span, layer and head, and over the image.

Papers call five different numbers the visual attention ratio; `attention_profile` tells them apart by name. None of
them needs a map of all queries by all keys, and none is made.

>>> attention_profile(vlm, real).mass.sel(span="image").mean(["example", "head"])
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from mechvlm.batch import check_prompts
from mechvlm.experiments.ratios import MEANING, averaged, ratios, visible
from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.selection import Without, kept, keys_out, queries_of
from mechvlm.experiments.sight import cross_layers, image_coordinates, image_dim, looking, named, own_layers
from mechvlm.experiments.sweep import numbers, rows_for
from mechvlm.prompt import Prompt
from mechvlm.readings import VISIBLE, lazy, mass, rows
from mechvlm.sites import Site, whole, whole_numbers
from mechvlm.vlm import VLM

SPANS = ("bos", "prefix", "image", "separators", "question", "last")
Look = tuple[np.ndarray, np.ndarray, np.ndarray]
"""For the queries of one layer: masses `head query span`, visible keys and all keys, `query span`."""


def attention_profile(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    queries: str | Sequence[int] = "last",
    without: Without = None,
    even: str = "visible",
    max_new_tokens: int = 20,
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
    out = keys_out(asked, without)
    if even not in ("visible", "length"):
        raise ValueError(f"even={even!r} is not known; choose 'visible' or 'length'.")
    generated = isinstance(queries, str) and queries == "generated"
    if generated and whole("max_new_tokens", max_new_tokens) < 2:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} makes no token that looks back, since the last one made never does; give "
            "2 or more."
        )
    names = [name for name in SPANS if any(name in prompt.spans for prompt in asked)] + ["generated"] * generated
    looks = _generated(vlm, asked, out, names, max_new_tokens) if generated else _asked(vlm, asked, chosen, out, names)
    averages, n_keys, n_queries = _table(vlm, looks, names, out, even)
    where = queries if isinstance(queries, str) else ", ".join(map(str, queries))
    about = record(vlm, asked, queries=where, even=even, **_said(vlm, without, out))
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


def _asked(
    vlm: VLM,
    prompts: Sequence[Prompt],
    queries: Sequence[tuple[int, ...] | None],
    out: Sequence[tuple[int, ...]],
    names: Sequence[str],
) -> Iterator[tuple[int, int, Look]]:
    """What queries of the prompts pay to spans: number of the prompt, layer, and the numbers.

    Prompts that are divided alike run together, after the first of them, of which it is also asked what it may see.
    """
    alike: dict[tuple, list[int]] = {}
    for number, (prompt, chosen) in enumerate(zip(prompts, queries, strict=True)):
        images = tuple(image.positions for image in prompt.images)
        spans = tuple(kept(prompt, names, out[number]).items())
        alike.setdefault((spans, chosen, len(prompt), images), []).append(number)
    layers = own_layers(vlm)
    with tqdm(total=len(prompts), unit="prompt", leave=False, delay=1) as bar:
        for (spans, chosen, length, _), members in alike.items():
            reading, size = mass(dict(spans), queries=chosen), rows_for(prompts[members[0]])
            keys = np.array([[len(held) for _, held in spans]] * (length if chosen is None else len(chosen)), float)
            first, seen = vlm.run(prompts[members[0]], read={Site("pattern", at): lazy() for at in layers}), {}
            for layer in layers:
                attention = first[Site("pattern", layer)]
                seen[layer] = visible(attention, reading.columns(length), chosen)
                yield members[0], layer, (numbers(reading.of(attention, "pattern")[0]), seen[layer], keys)
            del first  # holds queries and keys of every layer
            bar.update(1)
            for start in range(1, len(members), size):
                group = members[start : start + size]
                run = vlm.run([prompts[at] for at in group], read={Site("pattern", at): reading for at in layers})
                for layer in layers:
                    masses = numbers(run[Site("pattern", layer)])
                    yield from ((number, layer, (masses[at], seen[layer], keys)) for at, number in enumerate(group))
                bar.update(len(group))


def _generated(
    vlm: VLM, prompts: Sequence[Prompt], out: Sequence[tuple[int, ...]], names: Sequence[str], most: int
) -> Iterator[tuple[int, int, Look]]:
    """The same for the tokens of a greedy answer, each in the decode step that looks from it."""
    layers = own_layers(vlm)
    read: dict[Site, Any] = {Site("pattern", layer): rows([-1]) for layer in layers}
    read |= {Site("scores", layer): VISIBLE for layer in layers}
    for number, prompt in enumerate(tqdm(prompts, unit="prompt", leave=False, delay=1)):
        steps = vlm.generate(prompt, max_new_tokens=most, read_each_step=read, do_sample=False, num_beams=1).steps[1:]
        left = kept(prompt, names, out[number])
        for layer in layers if steps else ():
            looks = []
            for count, step in enumerate(steps, 1):
                weights = step[Site("pattern", layer)][0, :, 0].double()
                there = step[Site("scores", layer)][0, 0].double()
                spans = {**left, "generated": tuple(range(len(prompt), len(prompt) + count))}
                columns = mass({name: spans[name] for name in names}).columns(weights.shape[-1]).to(weights)
                looks.append((weights @ columns, there[0] @ columns, columns.sum(0)))
            masses, seen, keys = (torch.stack(part) for part in zip(*looks, strict=True))
            yield number, layer, (numbers(masses.transpose(0, 1)), numbers(seen), numbers(keys))


def _table(
    vlm: VLM, looks: Iterator[tuple[int, int, Look]], names: Sequence[str], out: Sequence[tuple[int, ...]], even: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What `averaged` makes of all prompts and layers, how many keys each prompt has, and how many queries counted.

    Raises:
        ValueError: where the keys that are taken out leave nothing to any query of a prompt.
    """
    sizes = (len(out), vlm.shape.layers["text"], vlm.shape.heads["text"])
    spans, image = (len(names),), [name == "image" for name in names]
    shapes: dict[str, tuple[int, ...]] = {"mass": sizes + spans, "density": sizes + spans}
    shapes |= {"even": sizes[:2] + spans, "rest": sizes}
    table = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    table["queries"] = np.zeros(sizes, dtype=int)
    n_keys, asked = np.zeros((len(out), len(names)), dtype=int), {}
    for number, layer, (masses, seen, keys) in looks:
        n_keys[number], asked[number] = keys[-1], len(keys)
        base = seen if even == "visible" else keys
        for name, values in averaged(masses, base, keys, image, part=bool(out[number])).items():
            table[name][number, layer] = values
    n_queries = table.pop("queries")
    for number, count in asked.items():
        if not n_queries[number].any():
            raise ValueError(
                f"without takes out all that the queries of prompt {number} look at (queries: {count}); take out fewer "
                "keys, or ask positions that see others."
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
