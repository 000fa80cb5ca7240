"""What text rows pay to the picture, layer by layer and head by head: corrected, or as VIAR published it.

Rule this module guards: one reading of a layer gives all of it, whoever is called text and image; a convention changes
which positions have these names (`mechvlm.experiments.conventions`), and never the arithmetic.

>>> found = layer_profile(vlm, [real, null])
>>> found.vis_l.sel(quantity="mass").dims
('prompt', 'layer')
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.experiments.conventions import Called, called, check_convention
from mechvlm.experiments.curves import check_level
from mechvlm.experiments.examples import prompt_coordinates
from mechvlm.experiments.knockout import clusters_of, interval
from mechvlm.experiments.profile import SPANS
from mechvlm.experiments.ratios import MEANING, averaged, ratios, visible
from mechvlm.experiments.record import record
from mechvlm.experiments.sight import cross_layers, own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.prompt import Prompt
from mechvlm.readings import Entropy, Mass, lazy
from mechvlm.rounds import Work, unsaid
from mechvlm.sites import Site
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

ROWS = ("text", "image", "all")
QUANTITIES = {
    "density_share": "dV / (dV + dT), d: mean weight per key, over heads and text rows",
    "mass": "sum over image keys, mean over heads and text rows",
    "density": "mean over image keys, heads and text rows",
    "all_rows": "sum over image keys, mean over heads and all rows",
}
"""The four quantities that VIAR publishes as `vis_l`, with their formulas."""
AT_ONCE = 2048
"""Positions whose queries and keys are held at once, in all layers."""
Found = dict[str, np.ndarray]
MEASURED = ("mass", "density", "even", "rest", "paid", "really", "first", "h_image", "h_rest", "entropy")
"""What is worked out of each layer's attention, where the model runs."""


def layer_profile(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    clusters: Sequence[Any] | np.ndarray | None = None,
    convention: str | None = None,
    level: float = 0.95,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How much text rows look at the picture in each layer and head, for each prompt and on average.

    Text rows are all positions behind the image. Where the picture comes through a Q-Former, its image tokens are the
    queries' outputs, and what is paid to them is paid to a summary of the picture.

    Args:
        clusters: what prompts belong together, for the intervals; by default their pictures.
        convention: None for positions as they are, or a published way to take them: "viar-2026" (LLaVA-1.5: of N image
            tokens, columns 0 to N - 1 are the image and rows from N on text), "viar-2026-mistral" (column 0 alone is
            the image, so that attention to the first token is called visual) or "viar-2026-qwen2-vl" (the image tokens,
            and rows before them are text, too). The spans are then `image` and `text`, even attention is N / T
            whatever a row sees, and a row that pays nothing has an entropy of 0.
        level: of the intervals.
        out: a folder in which what is finished is kept, and which several processes can share; see `mechvlm.workers`.

    Returns:
        Over prompt, layer and head: `mass`, `density` and `lift` (also over span), `density_share` and `vas`, as in
        `attention_profile`; `paid`, the mass of three groups of rows (also over rows and span): "text", "image" and
        "all"; `first`, what text rows pay to position 0; `really` (also over own): what they pay to the keys that are
        called the image, by the span that these belong to; `h_image` and `h_rest`, the entropy in nats of a text row
        made to sum to one over the image's keys, or all others; `entropy`, that of all rows over all keys.
        Over prompt and layer: `h_ratio`, the quotient of the two means over heads (not the mean of quotients); `vis_l`
        (also over quantity), the four numbers that VIAR publishes under this name: "density_share", "mass", "density"
        and "all_rows", whose formulas are in the attrs. `mean`, `low` and `high` over layer and quantity are its mean
        over prompts with its interval; for anything else there is `mv.mean_interval`, with clusters
        `found.cluster.values`. Layers whose words do not attend to each other are not numbers. `cluster`, and
        `positions`, their number, are over prompt.

    Raises:
        ValueError: without prompts, for one without an image, for another convention, a level that is no share, another
            number of clusters, or for a model whose words see
            the picture by cross-attention.

    Example:
        >>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:4]]
        >>> found = mv.layer_profile(vlm, asked)
        >>> published = mv.layer_profile(vlm, asked, convention="viar-2026")
        >>> mv.plot.lines(found["mean"].sel(quantity="mass"), "layer", band=(found.low[:, 1], found.high[:, 1]))

    Source:
        VIAR (github.com/aayambansal/VIAR): src/eval_modal.py (`density_share` and the entropies), src/eval_revision.py
        and src/eval_review2.py (`mass`, rows and heads), src/eval_upgrade.py (`density`); its paper, equation 1
        (`all_rows`). Spans, rows and intervals are this package's where no convention is named.
    """
    asked = check_prompts(prompts, vlm.shape)
    check_convention(convention)
    check_level(level)
    if cross_layers(vlm):
        raise ValueError(
            "the words of this model see the picture by cross-attention, whose weights are all the picture's, so there "
            "is no share to profile; mv.attention_map shows what such a layer looks at."
        )
    groups = clusters_of(asked, clusters)
    looks = [called(prompt, convention) for prompt in asked]
    own = tuple(name for name in SPANS if any(name in look.really for look in looks))
    names = own if convention is None else ("image", "text")

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        table: Found = {}
        read = yield from _read(vlm, [asked[at] for at in group], looks[group[0]], names, own)
        for row, layer, found in read:
            for name, values in found.items():
                shape = (len(group), vlm.shape.layers["text"], *values.shape)
                table.setdefault(name, np.full(shape, np.nan))[row, layer] = values
        return arrays(**table)

    together, table = _groups(asked, looks), dict[str, np.ndarray]()
    for group, found in zip(
        together, worked(vlm, asked, together, work, out, ["layer_profile", convention]), strict=True
    ):
        for name, values in found.items():
            table.setdefault(str(name), np.empty((len(asked), *values.shape[1:])))[group] = values
    about = record(vlm, asked, convention=convention or "none: positions as they are", level=level)
    result = _dataset(table, looks, names, own).assign_coords(prompt_coordinates(asked))
    result = result.assign(cluster=("prompt", np.array([str(group) for group in groups])))
    result["positions"] = ("prompt", np.array([len(look) for look in looks]))
    return result.assign(interval(result.vis_l, groups, level).data_vars).assign_attrs(about)


def of_pattern(pattern: Float[Tensor, "head query key"], look: Called) -> Found:
    """The numbers of one layer's pattern, given directly; what a row may see is what causal attention lets it.

    Args:
        look: what is called text and image, for instance `called(prompt, "viar-2026")`.

    Example:
        >>> one = called(real, "viar-2026")
        >>> of_pattern(torch.full((8, 49, 49), 1 / 49).tril(), one)["first"].shape
        (8,)
    """
    names, own = tuple(look.spans), tuple(look.really)
    made = pattern[None].double()
    sees = torch.ones(1, 1, *pattern.shape[-2:], dtype=torch.double).tril()
    return next(_measured(lambda reading: reading(made), lambda mass: numbers(mass(sees)[0, 0]), look, names, own))


def attention_blocks(profile: xr.Dataset) -> xr.Dataset:
    """Who pays whom, layer by layer, in the names of VIAR's published table of decomposed attention.

    Args:
        profile: what `layer_profile` returns.

    Returns:
        Over layer, means over prompts and heads: `text2vis`, `text2text`, `vis2vis` and `vis2text`, the fractions that
        text rows and image rows pay to the image and to all else; `head_vis_frac_std`, `_min` and `_max` of the heads'
        means over all rows; `attn_entropy` of all rows in nats; `vis_frac_aggregate`, what all rows pay to the image.
        Under a convention the last weighs rows by the length of the last prompt, as published.

    Raises:
        TypeError: for what is no profile.

    Example:
        >>> found = mv.attention_blocks(mv.layer_profile(vlm, [real, null]))
        >>> bool(np.allclose(found.text2vis + found.text2text, 1))
        True

    Source:
        VIAR (github.com/aayambansal/VIAR): src/eval_revision.py, decomposed attention.
    """
    if not isinstance(profile, xr.Dataset) or not {"paid", "entropy", "n_keys"} <= set(profile.data_vars):
        raise TypeError(
            f"a {type(profile).__name__} is no profile by layer; make it with mv.layer_profile(vlm, prompts)."
        )
    paid = profile.paid.sel(span="image").mean(["prompt", "head"])
    heads = profile.paid.sel(span="image", rows="all").mean("prompt")
    text, image = paid.sel(rows="text", drop=True), paid.sel(rows="image", drop=True)
    found = {"text2vis": text, "text2text": 1 - text, "vis2vis": image, "vis2text": 1 - image}
    ends = {"std": heads.std("head"), "min": heads.min("head"), "max": heads.max("head")}
    found |= {f"head_vis_frac_{name}": values for name, values in ends.items()}
    together = paid.sel(rows="all", drop=True)
    if not profile.attrs["convention"].startswith("none"):
        share = profile.n_keys.sel(span="image").values[-1] / profile.positions.values[-1]
        together = text * (1 - share) + image * share
    found |= {"attn_entropy": profile.entropy.mean(["prompt", "head"]), "vis_frac_aggregate": together}
    return xr.Dataset(found).drop_vars(["span", "rows"], errors="ignore").assign_attrs(profile.attrs)


def _groups(prompts: Sequence[Prompt], looks: Sequence[Called]) -> list[list[int]]:
    """Prompts that are divided alike, as many of them as run together."""
    alike: dict[tuple, list[int]] = {}
    for number, (prompt, look) in enumerate(zip(prompts, looks, strict=True)):
        images = tuple(image.positions for image in prompt.images)
        alike.setdefault((tuple(look.really.items()), images), []).append(number)
    sizes = [(members, max(1, AT_ONCE // len(prompts[members[0]]))) for members in alike.values()]
    return [members[start : start + size] for members, size in sizes for start in range(0, len(members), size)]


def _read(
    vlm: VLM, prompts: Sequence[Prompt], look: Called, names: Sequence[str], own: Sequence[str]
) -> Work[list[tuple[int, int, Found]]]:
    """Row, layer, and the numbers, of prompts that are divided alike and run together."""
    layers = own_layers(vlm)
    reading = lazy(partial(_of_attention, look, tuple(names), tuple(own)))
    read = {Site("pattern", at): reading for at in layers}
    (run,) = yield [{"prompt": prompts, "read": read, "value": unsaid}]
    found = []
    for layer in layers:
        values = dict(zip(MEASURED, map(numbers, run[Site("pattern", layer)]), strict=True))
        found += [(row, layer, {name: x[row] for name, x in values.items()}) for row in range(len(prompts))]
    return found


def _of_attention(look: Called, names: Sequence[str], own: Sequence[str], attention: Attention) -> tuple[Tensor, ...]:
    """The numbers of one layer, in the order of `MEASURED`, with the batch in front."""

    def seen(mass: Mass) -> np.ndarray:
        return visible(attention, mass.columns(attention.k.shape[2]), None)

    rows = list(_measured(lambda reading: reading.of(attention, "pattern"), seen, look, names, own))
    return tuple(torch.from_numpy(np.stack([row[name] for row in rows])) for name in MEASURED)


def _measured(
    read: Callable[[Mass | Entropy], Tensor],
    seen: Callable[[Mass], np.ndarray],
    look: Called,
    names: Sequence[str],
    own: Sequence[str],
) -> Iterator[Found]:
    """The numbers of one layer, for each row of a batch."""
    length, among = len(look), set(look.image)
    spans = {f"span {name}": look.spans.get(name, ()) for name in names}
    spans |= {f"own {name}": tuple(key for key in look.really.get(name, ()) if key in among) for name in own}
    reading = Mass((*spans.items(), ("first", (0,))))
    masses, seeing = numbers(read(reading)), seen(reading)[:, : len(names)]
    rest = tuple(key for key in range(length) if key not in among)
    spread = {"h_image": Entropy(look.text, look.image), "h_rest": Entropy(look.text, rest), "entropy": Entropy()}
    entropies = {name: numbers(read(entropy)) for name, entropy in spread.items()}
    for at, one in enumerate(masses):
        of_text = one[:, list(look.text)].mean(1)
        found = _paid(one[..., : len(names)], seeing, look, names)
        found |= {"really": of_text[:, len(names) : -1], "first": of_text[:, -1]}
        for name, values in entropies.items():
            zero = look.convention is not None  # published entropies add 1e-10 to every weight
            found[name] = np.nan_to_num(values[at]).mean(-1) if zero else _mean(values[at])
        yield found


def _paid(
    masses: Float[np.ndarray, "head query span"],
    seeing: Float[np.ndarray, "query span"],
    look: Called,
    names: Sequence[str],
) -> Found:
    """What the three groups of rows pay to spans, and what `averaged` says of the text rows."""
    n_keys = np.array([len(look.spans.get(name, ())) for name in names], dtype=float)
    keys, image = np.tile(n_keys, (masses.shape[1], 1)), [name == "image" for name in names]
    even = seeing if look.convention is None else keys
    text = list(look.text)
    found = averaged(masses[:, text], even[text], keys[text], image)
    groups = {"text": text, "image": list(look.image), "all": list(range(masses.shape[1]))}
    found["paid"] = np.stack([masses[:, groups[rows]].mean(1) for rows in ROWS], 1)
    return {name: values for name, values in found.items() if name != "queries"}


def _mean(values: Float[np.ndarray, "head row"]) -> Float[np.ndarray, " head"]:
    """The mean over rows that have a value."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(-1) / there.sum(-1)


def _dataset(table: Found, looks: Sequence[Called], names: Sequence[str], own: Sequence[str]) -> xr.Dataset:
    """All numbers with their names."""
    n_keys = np.array([[len(look.spans.get(name, ())) for name in names] for look in looks])
    axes, found = ("prompt", "layer", "head", "span"), ratios(table, list(names), n_keys)
    dense, rest = found["density"][..., names.index("image")].mean(-1), table["rest"].mean(-1)
    at = {rows: table["paid"][..., number, names.index("image")].mean(-1) for number, rows in enumerate(ROWS)}
    with np.errstate(invalid="ignore", divide="ignore"):
        share = dense / (dense + rest)
        ratio = table["h_image"].mean(-1) / table["h_rest"].mean(-1)
    vis = {"density_share": share, "mass": at["text"], "density": dense, "all_rows": at["all"]}
    named_by = {name: {"long_name": long, "units": units} for name, (long, units) in MEANING.items()}
    result = xr.Dataset({name: (axes[: values.ndim], values, named_by[name]) for name, values in found.items()})
    for name in ("h_image", "h_rest", "entropy"):
        result[name] = (axes[:3], table[name], {"long_name": "entropy", "units": "nats"})
    result["h_ratio"] = (axes[:2], ratio, {"long_name": "entropy over the image over that over the rest", "units": "1"})
    fraction = {"long_name": "attention mass", "units": "fraction"}
    result["first"] = (axes[:3], table["first"], fraction)
    result["really"] = ((*axes[:3], "own"), table["really"], fraction)
    result["paid"] = ((*axes[:3], "rows", "span"), table["paid"], fraction)
    result["n_keys"] = (("prompt", "span"), n_keys)
    result["vis_l"] = (
        ("prompt", "layer", "quantity"),
        np.stack([vis[name] for name in QUANTITIES], -1),
        {"long_name": "what VIAR calls vis_l", "units": "as its quantity", **QUANTITIES},
    )
    layers, heads = (np.arange(count) for count in found["vas"].shape[1:])
    along: dict[str, Any] = {"layer": layers, "head": heads, "span": list(names), "own": list(own)}
    return result.assign_coords({**along, "rows": list(ROWS), "quantity": list(QUANTITIES)})
