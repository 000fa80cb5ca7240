"""Which maps of a picture can be believed? Several of them on the same questions, against chance and each other.

Rule this module guards: maps are compared on the same examples, with the same random orders and the same runs; what is
said of a mean has an interval over pictures, and what is tested several times is corrected for it.

>>> found = compare_maps(vlm, [real], yes, ["attention", "random"], samples=2)
>>> found.advantage.dims
('prompt', 'map', 'mode')
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.batch import check_prompts
from mechvlm.experiments.chance import holm, sign_flips
from mechvlm.experiments.correlations import rank_correlation
from mechvlm.experiments.curves import check_seed
from mechvlm.experiments.deletion import MODES, advantages, area, curves_of, random_orders, ranked_tokens
from mechvlm.experiments.examples import about, metric_of_each, prompt_coordinates, unit_of
from mechvlm.experiments.inputs import token_dim
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.maps import Asked, Map, chosen_maps, made
from mechvlm.experiments.record import metric_name
from mechvlm.experiments.removal import nothing_to_see, token_places
from mechvlm.experiments.sweep import valued
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, together
from mechvlm.sites import listed, number, told, whole
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
MEANT = {
    "advantage": "how much better than random orders, as a share of what the picture adds",
    "area": "height of the curve over the share of tokens; 0: the null picture, 1: the picture",
    "agreement": "rank correlation of two maps over image tokens",
}


def compare_maps(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | Sequence[Metric],
    maps: Any = None,
    null: Any = None,
    at: str = "image_features",
    shares: Sequence[float] = SHARES,
    samples: int = 10,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How well maps point at the image tokens that an answer rests on: deletion, insertion, and how they agree.

    Args:
        metric: one for all prompts, or a list with one for each; one that the picture raises, such as the right
            answer's logit minus the wrong one's.
        maps: names of maps, or a mapping from names of one's own to these or to functions from a prompt to a map
            (one number for each image token, as `relevancy(...).relevancy`). "occlusion" is exact for one token at a
            time, and "attribution_patching" its first-order estimate, (picture - null) x gradient;
            "input_times_gradient", "integrated_gradients" (from the null picture), "smooth_grad" (its length),
            "gradient_attention" (summed over layers and heads), "relevancy", "direct_logits" (what heads take from a
            token to the logit directly, of a `logit_difference`), "attention_rollout", "attention" (the last row,
            averaged over heads and layers) and "random". None means all that there are: under cross-attention,
            "relevancy" and "attention_rollout" are not, at the pixels under a Q-Former all of attention are not, and
            for other metrics "direct_logits" is not.
        null: as in `deletion_curve`; or a list with one for each prompt.
        at: "image_features" or "pixels": where tokens are taken away, as in `deletion_curve`, and where gradients and
            occlusions are taken.
        shares: how many of the image tokens are taken away or put in, as shares from 0 to 1, rounded up.
        samples: how many random orders for each prompt.
        seed: of these, and of what draws numbers in the maps that go by a name.
        clusters: what prompts belong together, for intervals and p-values; by default their pictures.
        batch_size: runs in one forward pass; see `sweep`.
        out: a folder in which each finished prompt is kept, and which several processes can share.

    Returns:
        Over prompt, map and mode ("deletion", "insertion"): `curve` (also over share), the metric, and `random`
        (over sample instead of map). `advantage`: how much lower than random orders (for insertion: higher) the
        curve is, on average over the shares between 0 and 1, as a share of what the picture adds to the metric; `area`,
        the mean height of the curve, where 0 is the null picture and 1 the picture, and `random_area`. `agreement`,
        over prompt, map and other: Spearman's rank correlation of two maps. `attribution`, over prompt, map and token,
        with `place`, the token's position (or key, or patch; -1 where a prompt has fewer); `value` and
        `null_value`, the metric of both prompts.

        `advantage_mean`, `area_mean` and `agreement_mean`, over prompts, with `_low` and `_high`, the ends of their
        intervals over pictures. An advantage and an area count as much as the picture adds to the metric, so that a
        prompt of which it adds next to nothing decides nothing. `p_value`, over map and mode: of no advantage over
        random orders, two-sided, where each picture's advantage might as well have been a loss; `p_holm`, corrected
        for all of them. Prompts of which the picture adds nothing, or takes away, are left out (`attrs["left_out"]`,
        and not a number), since there is nothing to be lost.

    Raises:
        ValueError: where the picture raises the metric of no prompt; for a map that is not known, or numbers that are
            no map of a prompt; and as for `deletion_curve` and the maps' own experiments.
        TypeError: for what is no map.

    Example:
        >>> mine = {"layer 3": lambda prompt: mv.attention_map(vlm, prompt, 3), "relevancy": "relevancy"}
        >>> found = mv.compare_maps(vlm, [real], yes, mine, samples=2)
        >>> mv.plot.compared_maps(found, real)

    Source:
        Petsiuk et al. (2018), "RISE", section 4.1, for the curves; Adebayo et al. (2018), "Sanity Checks for Saliency
        Maps", section 3, for rank correlation of maps.
    """
    asked = check_prompts(prompts, vlm.shape)
    metrics, groups = metric_of_each(metric, asked), clusters_of(asked, clusters)
    others, named = _nulls(asked, null), chosen_maps(asked[0], maps, at, metrics)
    parts, drawn = _shares(shares), [whole("samples", samples), check_seed(seed)]
    ends = _ends(vlm, asked, others, metrics)
    kept = [at for at, (real, least) in enumerate(ends) if real > least]

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        own = Asked(vlm, asked[group[0]], metrics[group[0]], others[group[0]], at, drawn[1] + group[0], batch_size)
        return _one(own, named, parts, drawn[0])

    told_by = ["compare_maps", list(named.items()), [one.encoding for one in others], metrics, at, parts, drawn]
    found = list(worked(vlm, asked, [[number] for number in kept], work, out, told_by))
    table = _table(asked, dict(zip(kept, found, strict=True)), list(named), parts, drawn[0], at)
    more: dict[str, Any] = {"at": at, "samples": drawn[0], "seed": drawn[1], "left_out": len(asked) - len(kept)}
    result = _scored(
        table.assign({name: ("prompt", ends[:, at]) for at, name in enumerate(("value", "null_value"))}), groups
    )
    more["counted_by"] = token_dim(asked[0], at)
    more["engine"] = "; ".join(dict.fromkeys(str(one.attrs["engine"]) for one in found))
    attrs = about(vlm, asked, metrics, groups, **more)
    return _described(result, unit_of(metrics)).assign_attrs(attrs)


def _nulls(prompts: Sequence[Prompt], null: Any) -> list[Prompt]:
    """A null prompt for each prompt."""
    given = [null] * len(prompts) if listed(null) is None else list(null)
    if len(given) != len(prompts):
        raise ValueError(f"null has {len(given)} prompts for {len(prompts)}; give one for each, or one for all.")
    return [nothing_to_see(prompt, one) for prompt, one in zip(prompts, given, strict=True)]


def _shares(shares: Any) -> list[float]:
    """Shares of the image tokens, rising, with both ends."""
    given = [number("shares:", share) for share in listed(shares) or ()]
    if not given or min(given) < 0 or max(given) > 1:
        raise ValueError(f"shares={told(shares)} are no shares of the image tokens; give numbers from 0 to 1.")
    return sorted({0.0, *given, 1.0})


def _ends(
    vlm: VLM, prompts: Sequence[Prompt], others: Sequence[Prompt], metrics: Sequence[Metric]
) -> Float[np.ndarray, "prompt end"]:
    """The metric of each prompt and of its null prompt.

    Raises:
        ValueError: where no picture raises it.
    """
    pairs = [(one, of) for own in zip(prompts, others, metrics, strict=True) for one, of in ((own[0], own[2]), own[1:])]
    found = np.array([*together(vlm, (valued(vlm, one, of) for one, of in pairs))]).reshape(-1, 2)
    if not (found[:, 0] > found[:, 1]).any():
        named = "; ".join(dict.fromkeys(map(metric_name, metrics)))
        raise ValueError(
            f"the pictures raise {named} in none of the {len(prompts)} prompts above what the null pictures give, so "
            "there is nothing for a map to explain; give a metric that they raise, such as that of the right answer."
        )
    return found


def _one(asked: Asked, named: dict[str, str | Map], shares: Sequence[float], samples: int) -> Work[xr.Dataset]:
    """The curves and maps of one prompt: maps in the order of their names, then random orders."""
    places = token_places(asked.prompt, asked.at)
    maps = {name: made(of, asked) for name, of in named.items()}
    orders = [ranked_tokens(asked.prompt, one, asked.at, f"map {name!r}") for name, one in maps.items()]
    values = np.stack([one.sel({one.dims[0]: places}).values.astype(float) for one in maps.values()])
    counts = [int(np.ceil(share * len(orders[0]) - 1e-9)) for share in shares]
    more = random_orders(orders[0], samples, asked.seed)
    curves, how = yield from curves_of(
        *(asked.vlm, asked.prompt, asked.other, [*orders, *more], counts, asked.metric),
        at=asked.at,
        batch_size=asked.batch_size,
    )
    agreed = np.array([[rank_correlation(one[orders[0]], other[orders[0]]) for other in values] for one in values])
    return arrays(curves=curves, maps=values, agreement=agreed, counts=np.array(counts)).assign_attrs(engine=how)


def _table(
    prompts: Sequence[Prompt],
    found: dict[int, xr.Dataset],
    named: Sequence[str],
    shares: Sequence[float],
    samples: int,
    at: str,
) -> xr.Dataset:
    """What was found of each prompt, side by side; not a number for those that were left out."""
    places = [token_places(prompt, at) for prompt in prompts]
    most, count = max(map(len, places)), len(named)
    sizes = {"prompt": len(prompts), "map": count, "mode": len(MODES), "share": len(shares), "sample": samples}
    sizes |= {"token": most, "other": count}
    axes = {
        "curve": ("prompt", "map", "mode", "share"),
        "random": ("prompt", "sample", "mode", "share"),
        "advantage": ("prompt", "map", "mode"),
        "area": ("prompt", "map", "mode"),
        "random_area": ("prompt", "sample", "mode"),
        "agreement": ("prompt", "map", "other"),
        "attribution": ("prompt", "map", "token"),
    }
    held = {name: np.full([sizes[axis] for axis in own], np.nan) for name, own in axes.items()}
    for row, one in found.items():
        curves = one.curves.values
        ends = curves[0, 0, [-1, 0]]
        areas = (area(curves, one.counts.values.tolist()) - ends[0]) / (ends[1] - ends[0])
        gained = [advantages(own[:count], own[count:], mode).mean(-1) for own, mode in zip(curves, MODES, strict=True)]
        held["curve"][row], held["random"][row] = np.split(curves.transpose(1, 0, 2), [count])
        held["advantage"][row] = np.transpose(gained)
        held["area"][row], held["random_area"][row] = np.split(areas.T, [count])
        held["agreement"][row], held["attribution"][row, :, : len(places[row])] = one.agreement, one.maps
    along = np.array([[*own, *[-1] * (most - len(own))] for own in places])
    result = xr.Dataset({name: (axes[name], values) for name, values in held.items()})
    result = result.assign(place=(("prompt", "token"), along))
    over = {"map": list(named), "other": list(named), "mode": list(MODES), "sample": np.arange(samples)}
    return result.assign_coords({**prompt_coordinates(prompts), **over, "share": list(shares)})


def _scored(table: xr.Dataset, groups: Sequence[Hashable]) -> xr.Dataset:
    """The same with means, intervals and p-values."""
    added = (table.value - table.null_value).clip(0.0)
    weights = {"advantage": added.values.tolist(), "area": added.values.tolist(), "agreement": None}
    found: dict[str, xr.DataArray] = {}
    for name, heavy in weights.items():
        means = mean_interval(table[name], "prompt", groups, weights=heavy)
        found |= {f"{name}_{end}": means[end] for end in ("mean", "low", "high")}
    found["p_value"] = sign_flips(table.advantage * added, groups)
    found["p_holm"] = found["p_value"].copy(data=holm(found["p_value"].values))
    return table.assign(found)


def _described(found: xr.Dataset, unit: str) -> xr.Dataset:
    """The same, with what its numbers are."""
    for name in ("curve", "random", "value", "null_value"):
        found[name].attrs = {"long_name": "metric", "units": unit}
    for name, meaning in MEANT.items():
        for one in (name, *(f"{name}_{end}" for end in ("mean", "low", "high"))):
            found[one].attrs = {"long_name": name, "units": "share" if name != "agreement" else "1", "meaning": meaning}
    found["share"].attrs = {"long_name": "share of image tokens"}
    return found
