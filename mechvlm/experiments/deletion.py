"""Do the image tokens that a map points at matter? Take them away, or put them in, the highest first.

A map of attention, or of a gradient, is a claim about which tokens the answer rests on. This is its causal check: the
tokens become those of a picture without anything to see (deletion), or that picture gets the real one's tokens
(insertion), in the order of the map and in random orders of the same counts. A map that is no better than chance falls,
or rises, as slowly as the random orders do.

Rule this module guards: both ways are one experiment, of which tokens are away. Inserting some is taking the others
away, so the curves of both have the same two ends: the prompt itself and the null prompt.

>>> deletion_curve(vlm, real, mv.gradient_attribution(vlm, real, yes).attribution, yes).ranked
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.inputs import token_dim
from mechvlm.experiments.record import metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.removal import Tokens, nothing_to_see, removable, removed, token_places
from mechvlm.experiments.uncertainty import with_intervals
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, done
from mechvlm.sites import told, whole, whole_numbers
from mechvlm.vlm import VLM

MODES = ("deletion", "insertion")
COUNTED = {"deletion": "image tokens taken away", "insertion": "image tokens put in", "both": "image tokens"}


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
    mode: str = "deletion",
    at: str = "image_features",
) -> xr.Dataset:
    """A metric while image tokens are taken away, or put in, in the order of a map and in random orders.

    Args:
        ranking: one number for each image token, as `attention_map`, `gradient_attribution` and their like return; the
            highest goes first, and of equal ones the first in the text.
        null: the same words about a picture without anything to see, whose features take the places: a prompt, or what
            `prompt.with_image` takes; by default `mv.images.black`.
        counts: how many tokens are taken away or put in; by default none, 1, 2, 4, ... and all.
        samples: how many random orders.
        seed: of the random orders.
        batch_size: runs in one forward pass; see `sweep`.
        mode: "deletion" begins with the picture and takes tokens away, "insertion" begins with the null picture and
            puts the picture's tokens in; "both" does both, in the same orders.
        at: "image_features": a token's features, where the picture enters the language model (and what deep-stack adds
            of them), become the null picture's at the same position. They were made of the whole picture, so those that
            stay may still tell of what is away. "pixels": the token's square in the picture itself becomes the null
            picture's, before the vision tower; every number is a full pass. Tokens that no pixel belongs to are then
            left out; under a Q-Former the ranking is by patch.

    Returns:
        `ranked`, the metric over axis count, and `random`, over sample and count, in the metric's unit. `advantage`,
        over sample: how much lower than that random one the ranked curve lies (for insertion: how much higher), on
        average over the counts between none and all, as a share of what the whole picture adds to the metric; 0 for a
        map that says nothing, not a number where the picture adds nothing. `advantage_mean`, with `advantage_low` and
        `advantage_high`, the ends of its interval over random orders, which says nothing of other pictures
        (`compare_maps` does). `p_value`: the share of orders that lie as low (or as high) on average, the map's own
        among them. `area`, and `random_area` over sample: the mean height of the curve over the share of tokens, as
        RISE has it, in the metric's unit. `value` and `null_value`: the metric of the two prompts.
        With `mode="both"` all but the last two have a first axis mode.

    Raises:
        ValueError: for a prompt without an image, a ranking of other tokens or with NaN, counts that are not there,
            another mode or place, or, at the pixels, a prompt without its picture.
        TypeError: for a ranking that is no DataArray.

    Example:
        >>> seen = mv.attention_map(vlm, real, 3)
        >>> found = mv.deletion_curve(vlm, real, seen, mv.logit_difference("yes", "no"), samples=2, mode="both")
        >>> found.advantage.dims
        ('mode', 'sample')
        >>> mv.plot.deletion(found)

    Source:
        Petsiuk et al. (2018), "RISE: Randomized Input Sampling for Explanation of Black-box Models", section 4.1
        (deletion and insertion); its pixels are tokens, or their squares, here, and random orders are added.
    """
    order, other = ranked_tokens(one_prompt(prompt), ranking, at), nothing_to_see(prompt, null)
    asked, modes = counted(len(order), counts), chosen_modes(mode)
    orders = [order, *random_orders(order, samples, seed)]
    every = sorted({0, *asked, len(order)})
    curves, how = done(vlm, curves_of(vlm, prompt, other, orders, every, metric, modes, at, batch_size))
    found = xr.concat([_scores(curve, every, one) for one, curve in zip(modes, curves, strict=True)], "mode")
    found = _described(found.assign_coords(mode=list(modes)).sel(count=asked), metric)
    found["count"].attrs = {"long_name": COUNTED[mode]}
    first = curves[0, 0, [0, -1]] if modes[0] == "deletion" else curves[0, 0, [-1, 0]]
    found = found.assign({name: ((), end) for name, end in zip(("value", "null_value"), first, strict=True)})
    about: dict[str, str | int] = {
        "null_text": other.text,
        "tokens": len(order),
        "ranking": str(ranking.name),
        "mode": mode,
        "at": at,
    }
    attrs = record(vlm, [prompt], metric, **about, seed=seed, engine=how, interval="95%, bootstrap over random orders")
    return (found if mode == "both" else found.isel(mode=0, drop=True)).assign_attrs(attrs)


def _scores(curves: Float[np.ndarray, "order count"], counts: Sequence[int], mode: str) -> xr.Dataset:
    """What is said of the curves of a map, the first, and of random orders."""
    gained, areas = advantages(curves[:1], curves[1:], mode)[0], area(curves, counts)
    found = with_intervals(xr.Dataset({"advantage": ("sample", gained)}), dim="sample")
    means = curves.mean(-1) * (1 if mode == "deletion" else -1)
    as_good = (means[1:] <= means[0] + 1e-6 * (1 + abs(means[0]))).sum()  # the same order, in another batch, is as good
    values: dict[str, Any] = {
        "ranked": ("count", curves[0]),
        "random": (("sample", "count"), curves[1:]),
        "area": ((), areas[0]),
        "random_area": ("sample", areas[1:]),
        "p_value": ((), (1 + as_good) / len(curves)),
    }
    return found.assign(values).assign_coords(count=list(counts), sample=np.arange(len(gained)))


def _described(found: xr.Dataset, metric: Metric) -> xr.Dataset:
    """The same, with what its numbers are."""
    for name in ("ranked", "random", "area", "random_area"):
        found[name].attrs = {"long_name": metric_name(metric), "units": metric_unit(metric)}
    for name in ("advantage", "advantage_mean", "advantage_low", "advantage_high"):
        found[name].attrs = {"long_name": "advantage over random orders", "units": "share"}
    found["p_value"].attrs = {"long_name": "share of orders that do as well", "units": "1: all"}
    return found


def curves_of(
    vlm: VLM,
    prompt: Prompt,
    other: Prompt,
    orders: Sequence[Tokens],
    counts: Sequence[int],
    metric: Metric,
    modes: Sequence[str] = MODES,
    at: str = "image_features",
    batch_size: int | None = None,
) -> Work[tuple[Float[np.ndarray, "mode order count"], str]]:
    """The metric while tokens are taken away, or put in, in some orders, and how it was run; as work.

    Example:
        >>> values, _ = done(vlm, curves_of(vlm, real, null, [np.arange(36)], [0, 36], yes))
        >>> values[:, 0].round(1).tolist()
        [[2.6, -5.8], [-5.8, 2.6]]
    """
    sets = [one[:count] if mode == "deletion" else one[count:] for mode in modes for one in orders for count in counts]
    values, how = yield from removed(vlm, prompt, other, sets, metric, at, batch_size)
    return values.reshape(len(modes), len(orders), len(counts)), how


def ranked_tokens(prompt: Prompt, ranking: object, at: str = "image_features", called: str = "ranking") -> Tokens:
    """The image tokens that can be taken away, by their place among the picture's, the highest first.

    Args:
        called: what the ranking is called, for what is refused.

    Raises:
        TypeError, ValueError: for what is no ranking of the prompt's image tokens.

    Example:
        >>> ranked_tokens(real, mv.attention_map(vlm, real, 3)).shape
        (36,)
    """
    held = removable(prompt, at)
    if not isinstance(ranking, xr.DataArray):
        raise TypeError(
            f"{called}={told(ranking)} is no DataArray; give a map, such as "
            "mv.attention_map(vlm, prompt, 3) or mv.relevancy(vlm, prompt, metric).relevancy."
        )
    dim, own = token_dim(prompt, at), token_places(prompt, at)
    if ranking.dims != (dim,) or sorted(ranking[dim].values) != sorted(own):
        raise ValueError(
            f"the {called} has axes {', '.join(map(str, ranking.dims))} of {ranking.size} numbers; it must have one "
            f"for each of the prompt's {len(own)} image tokens, over axis {dim}."
        )
    values = ranking.sel({dim: own}).values.astype(float)
    if not np.isfinite(values).all():
        raise ValueError(f"the {called} holds values that are no finite numbers, so tokens cannot be put in order.")
    order = np.argsort(-values, kind="stable")
    return order[np.isin(order, held)]


def random_orders(tokens: Tokens, samples: int, seed: int) -> list[Tokens]:
    """So many random orders of some tokens.

    Raises:
        ValueError: for less than one.

    Example:
        >>> len(random_orders(np.arange(36), samples=3, seed=0))
        3
    """
    if whole("samples", samples) < 1:
        raise ValueError(f"samples={samples} compares with nothing; give 1 random order or more.")
    draw, held = np.random.default_rng(whole("seed", seed)), np.sort(tokens)
    return [held[draw.permutation(len(held))] for _ in range(samples)]


def chosen_modes(mode: str) -> tuple[str, ...]:
    """The ways to go that are asked for.

    Raises:
        ValueError: for another word.

    Example:
        >>> chosen_modes("both")
        ('deletion', 'insertion')
    """
    if mode not in COUNTED:
        raise ValueError(f"mode={told(mode)} is not known; choose from {', '.join(map(repr, COUNTED))}.")
    return MODES if mode == "both" else (mode,)


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


def advantages(
    ranked: Float[np.ndarray, "order count"], random: Float[np.ndarray, "sample count"], mode: str
) -> Float[np.ndarray, "order sample"]:
    """How much better each curve is than each random one, as a share of what lies between the ends.

    Args:
        ranked, random: from none to all; the ends do not count.

    Example:
        >>> advantages(np.array([[4.0, 0.0, 0.0]]), np.array([[4.0, 2.0, 0.0]]), "deletion")
        array([[0.5]])
    """
    whole_way = ranked[0, 0] - ranked[0, -1]  # of deletion; insertion goes the other way, and so does what is better
    if ranked.shape[1] < 3 or whole_way == 0 or mode not in MODES:
        return np.full((len(ranked), len(random)), np.nan)
    return (random[None, :, 1:-1] - ranked[:, None, 1:-1]).mean(-1) / whole_way


def area(curves: Float[np.ndarray, "*curve count"], counts: Sequence[int]) -> Float[np.ndarray, "*curve"]:
    """The mean height of curves over the share of tokens, straight between counts.

    Example:
        >>> area(np.array([[1.0, 0.0, 0.0]]), [0, 1, 2])
        array([0.25])
    """
    width = np.diff(np.asarray(counts, dtype=float)) / (counts[-1] - counts[0])
    return ((curves[..., 1:] + curves[..., :-1]) / 2 * width).sum(-1)
