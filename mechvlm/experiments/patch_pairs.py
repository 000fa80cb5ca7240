"""What holds over many pairs: activation patching of minimal pairs, with intervals and with random nodes for controls.

>>> pair = mv.MinimalPair(image, mv.images.black(image), "Is there a 7 in the image?", "yes", "no")
>>> patch_pairs(vlm, [pair], controls=0, layers=[0], spans=mv.image_regions).sizes["span"]
9
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.experiments.examples import p_values
from mechvlm.experiments.patch_features import patch_features
from mechvlm.experiments.patch_heads import patch_heads
from mechvlm.experiments.patching import patch_positions, patch_spans
from mechvlm.experiments.sweep import valued
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.metrics import Metric
from mechvlm.pairs import MinimalPair
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, beside, together
from mechvlm.sites import listed, told, whole
from mechvlm.units import each
from mechvlm.vlm import VLM

WHAT: dict[str, Callable[..., xr.Dataset]] = {
    "spans": patch_spans,
    "positions": patch_positions,
    "heads": patch_heads,
    "features": patch_features,
}
SETS = {"spans": "span", "features": "region"}
"""What patches sets of positions, which have random sets of as many for controls, and their axis."""
TAKEN = {"spans": "spans", "features": "regions"}
"""By which argument."""
OF_ONE = ("source_metric", "target_metric", "note", "prompt")
"""Attributes that are those of one pair."""


def patch_pairs(
    vlm: VLM,
    pairs: Sequence[MinimalPair],
    what: str = "spans",
    metric: Metric | None = None,
    direction: str = "both",
    only_right: bool = True,
    controls: int = 20,
    level: float = 0.95,
    seed: int = 0,
    out: str | Path | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Activation patching of each of some minimal pairs, and what is true of them on average.

    The source is a pair's first prompt and the target its second. Each pair is patched by itself; pairs that share a
    `cluster` are drawn together for the intervals.

    Args:
        pairs: their prompts must have the same spans, or positions, or as many heads, as the patches have axes.
        what: "spans" (`patch_spans`), "positions" (`patch_positions`), "heads" (`patch_heads`) or "features"
            (`patch_features`, whose `regions` must be given).
        metric: None means each pair's own, the logit of `answer_a` minus that of `answer_b`.
        direction: "denoise", "noise" or "both"; see `patch_spans`.
        only_right: leave pairs out to which the model does not give both right answers, by their own metric: there is
            nothing right to be carried over. `right` says which they are, `attrs` how many.
        controls: for each span or region so many random sets of as many positions, drawn for each pair from all
            positions of its spans, or image tokens of its regions; the same sets in all layers, and for spans of one
            size. Each set is as many runs as a span. Single positions and heads have other ones, drawn from the map,
            for controls, and need no more runs. 0: none.
        level, seed: of the intervals, and of the draws; see `mean_interval`.
        out: a folder in which finished points are kept; see `sweep`.
        settings: further ones of the experiment, such as `kind`, `layers`, `spans` (best a function of a prompt, such
            as `mv.image_regions`) or `batch_size`.

    Returns:
        `metric` and `normalised` over axis pair and those of the experiment; `source_metric`, `target_metric`, `right`
        and `cluster` over axis pair; `mean`, `low`, `high` and `count` of `normalised` over pairs, each weighed by
        the gap between its two answers (so it is the quotient of the means, which no pair with a small gap decides);
        with controls `control`, the mean over pairs of random nodes, over axis control, and `p_value`, the share of
        them, itself counted in, that carry over as much or more.

    Raises:
        ValueError: for pairs that cannot be put together, none that is right, or an unknown `what`.
        TypeError: for what are no pairs.

    Example:
        >>> seen = [one.image for one in mv.demo.scenes()[:3] if any(item.digit == 7 for item in one.scene.items)]
        >>> asked = "Is there a 7 in the image?"
        >>> pairs = [mv.MinimalPair(one, mv.images.black(one), asked, "yes", "no") for one in seen]
        >>> mv.plot.patched_pairs(mv.patch_pairs(vlm, pairs, controls=2, layers=[0, 4], direction="denoise"))

    Source:
        Golovanevsky et al. (2025), "What Do VLMs NOTICE?", section 3; controls of as many random nodes, as Wang et al.
        (2023), "Interpretability in the Wild", section 4. Numbers of controls that reach a value count it too: Phipson
        and Smyth (2010), "Permutation P-values Should Never Be Zero".
    """
    given = _checked(pairs, what, controls)
    prompts = [pair.prompts(vlm) for pair in given]
    right = np.array([*together(vlm, (_is_right(vlm, *each) for each in zip(given, prompts, strict=True)))])
    kept = [at for at in range(len(given)) if right[at] or not only_right]
    if not kept:
        raise ValueError(
            f"the model gives both right answers to none of {len(given)} pairs; only_right=False patches them all."
        )

    def one(number: int) -> Work[xr.Dataset]:
        at = kept[number]
        more = {**settings, "direction": direction} | ({} if out is None else {"out": Path(out) / f"pair {at}"})
        sets = _sets(what, prompts[at][1], settings) if what in SETS else {}
        if sets:
            more[TAKEN[what]] = {**sets, **_random(sets, controls, np.random.default_rng([seed, at]))}
        found = WHAT[what](vlm, *prompts[at], given[at].metric if metric is None else metric, **more)
        yield from ()  # each pair is patched by itself, in jobs of its own
        return _split(found, SETS[what], sets, controls) if sets and controls else found

    found = each(vlm, [prompts[at][1] for at in kept], one, out, ["patch_pairs", what])
    return _together(found, what, kept, given, right, controls, level, seed)


def _checked(pairs: object, what: str, controls: int) -> list[MinimalPair]:
    """The pairs as a list."""
    given = listed(pairs) or ()
    wrong = [pair for pair in given if not isinstance(pair, MinimalPair)]
    if not given or wrong:
        raise TypeError(f"pairs={told(pairs)} is not a list of pairs; make each with mv.MinimalPair(...).")
    if what not in WHAT:
        raise ValueError(f"what={told(what)} is not known; choose from {', '.join(map(repr, WHAT))}.")
    if whole("controls", controls) < 0:
        raise ValueError(f"controls={controls} draws nothing; give 0 or more random nodes.")
    return list(given)


def _is_right(vlm: VLM, pair: MinimalPair, prompts: Sequence[Prompt]) -> Work[bool]:
    """Whether a model gives both right answers rather than each other's."""
    a, b = yield from beside([valued(vlm, prompt, pair.metric) for prompt in prompts])
    return a > 0 > b


def _sets(what: str, target: Prompt, settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """The sets of positions to patch."""
    name = TAKEN[what]
    given = settings.get(name, target.spans if what == "spans" and settings.get("tower", "text") == "text" else None)
    sets = given(target) if callable(given) else given
    if not isinstance(sets, Mapping):
        raise TypeError(f"{name}={told(sets)} does not name sets of positions; give for instance mv.image_regions.")
    return {str(key): list(positions) for key, positions in sets.items()}


def _random(sets: Mapping[str, list[int]], controls: int, draw: np.random.Generator) -> dict[str, list[int]]:
    """Random sets of as many positions, drawn from those of all sets; the same for sets of one size."""
    pool = np.array(sorted({position for positions in sets.values() for position in positions}))
    sizes = dict.fromkeys(map(len, sets.values()))
    return {
        f"{size} positions, random set {number}": sorted(draw.choice(pool, size, replace=False).tolist())
        for number in range(controls)
        for size in sizes
    }


def _split(one: xr.Dataset, dim: str, sets: Mapping[str, list[int]], controls: int) -> xr.Dataset:
    """What was asked for, and as `random` what random sets carry over, along an axis of their own."""
    own = list(sets)
    random = [
        one.normalised.sel({dim: [f"{len(sets[name])} positions, random set {number}" for name in own]})
        for number in range(controls)
    ]
    numbered = xr.DataArray(np.arange(controls), dims="control", name="control")
    return one.sel({dim: own}).assign(random=xr.concat([part.assign_coords({dim: own}) for part in random], numbered))


def _together(
    found: list[xr.Dataset], what: str, kept: list[int], pairs: list[MinimalPair], right: np.ndarray, *settings: Any
) -> xr.Dataset:
    """Results of each pair as one, with means over pairs."""
    controls, level, seed = settings
    same = [one.drop_vars([name for name in one.coords if name not in one.dims]) for one in found]
    for at, one in zip(kept, same, strict=True):
        if not all(one[dim].equals(same[0][dim]) for dim in one.dims):
            raise ValueError(
                f"pair {at} has other spans, positions or regions than pair {kept[0]}, so they cannot be averaged; "
                "give pairs of like prompts, or spans that all of them have."
            )
    table = xr.concat(same, xr.DataArray(kept, dims="pair", name="pair"), combine_attrs="override")
    cluster = [f"pair {at}" if pairs[at].cluster is None else str(pairs[at].cluster) for at in kept]
    nodes = table.drop_vars("random", errors="ignore")
    ends = {end: [one.attrs[end] for one in found] for end in ("source_metric", "target_metric")}
    gaps = [abs(float(there) - float(here)) for there, here in zip(*ends.values(), strict=True)]
    over = mean_interval(nodes.normalised, "pair", cluster, level, seed=seed, weights=gaps)
    result = xr.merge([nodes, over], combine_attrs="override")
    for end, values in ends.items():
        result[end] = ("pair", values)
    result["right"], result["cluster"] = ("pair", right[kept]), ("pair", cluster)
    if controls:
        heavy = xr.DataArray(gaps, dims="pair")
        drawn = table.random.weighted(heavy).mean("pair") if "random" in table else _drawn(over["mean"], controls, seed)
        result["control"] = drawn.assign_coords(control=np.arange(controls))
        mine = result["mean"].expand_dims("prompt")
        found_p = p_values(mine, result.control.expand_dims("prompt"), "higher", "control")
        result["p_value"] = found_p.where(result["mean"].notnull())
    result.attrs = {}
    attrs = {name: value for name, value in found[0].attrs.items() if name not in OF_ONE}
    counts = {"pairs": len(kept), "left_out": len(pairs) - len(kept), "right": int(right.sum())}
    return result.assign_attrs({**attrs, **over.attrs, **counts, "controls": controls, "what": what})


def _drawn(mean: xr.DataArray, controls: int, seed: int) -> xr.DataArray:
    """Random nodes of a map of means: in each control one for the whole map, of its direction."""
    dims = [dim for dim in mean.dims if dim != "direction"]
    nodes = mean.stack(node=dims).reset_index("node", drop=True)
    chosen = np.random.default_rng(seed).integers(0, nodes.sizes["node"], controls)
    return nodes.isel(node=chosen).rename(node="control").assign_coords(control=np.arange(controls))
