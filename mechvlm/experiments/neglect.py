"""Which heads look at the picture much less, or much more, than heads do on average.

Rule this module guards: heads of different layers share no more than a number, so how heads differ is told within
layers; what averaging over layers by the number of the head gives is told beside it, under another name.

>>> found = neglect_heads(layer_profile(vlm, [real, null]))
>>> found.neglect.dims, bool((found.neglect & found.specialist).any())
(('layer', 'head'), False)
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from mechvlm.experiments.curves import check_draws
from mechvlm.sites import number, told, whole_numbers


def neglect_heads(
    profile: xr.Dataset | xr.DataArray,
    sigmas: float = 1.0,
    layers: Sequence[int] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> xr.Dataset:
    """Heads whose mean attention to the picture is far below, or far above, that of all heads of all layers.

    Args:
        profile: what `layer_profile` returns, whose mass on the image is taken, by its own convention; or an array of
            such numbers over layer and head, and over prompt where there are several.
        sigmas: how many standard deviations make a head one of neglect or a specialist.
        layers: of which `spread` and `spread_of_numbers` are told, for instance those of a zone; None: all.
        resamples: how often pictures are drawn again for `often`.
        seed: of these draws.

    Returns:
        Over layer and head: `mean` over prompts and `std` over prompts (of a population, as published); `neglect`,
        below mu - sigmas x sigma, and `specialist`, above mu + sigmas x sigma (bool); `often`: in which share of
        resamples of the pictures it is on that side again (for other heads: in which it is on neither). `mu` and
        `sigma` are over all heads of all layers; `layer_mean` and `layer_std` (over layer) over the heads of one.
        `spread`: how heads of one layer differ, the root of the mean of the layers' variances. `spread_of_numbers`: the
        standard deviation over head numbers after averaging over layers, which VIAR publishes as the spread between
        heads, and which is smaller since head 3 of one layer has nothing to do with head 3 of another.

    Raises:
        ValueError: for other axes, values that are not numbers, layers that are not there, sigmas that are not above 0,
            or nothing to draw.
        TypeError: for what is no profile.

    Example:
        >>> found = mv.neglect_heads(mv.layer_profile(vlm, [real, null]), layers=range(2, 6))
        >>> bool(found.spread > found.spread_of_numbers)
        True

    Source:
        VIAR (github.com/aayambansal/VIAR): src/eval_review2.py, head-level analysis. `spread` and `often` are this
        package's.
    """
    if not 0 < number("sigmas", sigmas) < np.inf:
        raise ValueError(f"sigmas={sigmas} tells no heads apart; give a number above 0, for instance 1.")
    check_draws(0.5, resamples, seed)
    table, groups = _table(profile)
    mean, std = table.mean("prompt"), table.std("prompt")
    chosen = _layers(mean, layers)
    sides = _sides(mean.values[None], sigmas)[0]
    drawn = np.random.default_rng(seed)
    named = {name: at for at, name in enumerate(dict.fromkeys(groups))}
    member = np.array([[named[one] == at for one in groups] for at in range(len(named))], dtype=float)
    draws = drawn.multinomial(len(named), np.full(len(named), 1 / len(named)), resamples) @ member
    again = np.einsum("rp,plh->rlh", draws / draws.sum(-1, keepdims=True), table.values)
    often = (_sides(again, sigmas) == sides).mean(0)
    found: dict[str, xr.DataArray] = {
        "mean": mean,
        "std": std,
        "neglect": mean.copy(data=sides < 0),
        "specialist": mean.copy(data=sides > 0),
    }
    found |= {"often": mean.copy(data=often), "mu": mean.mean(), "sigma": mean.std()}
    found |= {"layer_mean": mean.mean("head"), "layer_std": mean.std("head")}
    some = mean.sel(layer=chosen)
    found |= {"spread": some.var("head").mean() ** 0.5, "spread_of_numbers": some.mean("layer").std()}
    about = {"sigmas": sigmas, "layers_of_spread": ", ".join(map(str, chosen)), "resamples": resamples, "seed": seed}
    return xr.Dataset(found).reset_coords(drop=True).assign_attrs({**profile.attrs, **about})


def _table(profile: xr.Dataset | xr.DataArray) -> tuple[xr.DataArray, list[str]]:
    """Numbers over prompt, layer and head, and what prompts belong together."""
    if isinstance(profile, xr.Dataset) and {"mass", "cluster"} <= set(profile.data_vars):
        table, groups = profile.mass.sel(span="image", drop=True), [str(one) for one in profile.cluster.values]
    elif isinstance(profile, xr.DataArray):
        table = profile if "prompt" in profile.dims else profile.expand_dims("prompt")
        groups = [str(at) for at in range(table.sizes["prompt"])]
    else:
        raise TypeError(f"{told(profile)} is no profile; make it with mv.layer_profile(vlm, prompts).")
    if set(table.dims) != {"prompt", "layer", "head"}:
        raise ValueError(
            f"the values have {', '.join(map(str, profile.dims)) or 'no axes'}; give them over layer and head, and "
            "over prompt where there are several."
        )
    table = table.transpose("prompt", "layer", "head").dropna("layer", how="all")
    if not np.isfinite(table.values).all() or not table.size:
        raise ValueError(
            "the values are not all numbers, so no head can be told from the others; leave out what is not."
        )
    return table, groups


def _layers(mean: xr.DataArray, layers: Sequence[int] | None) -> list[int]:
    """The layers whose spread is told."""
    held = mean.layer.values.tolist()
    chosen = held if layers is None else list(whole_numbers("layers", layers))
    if not chosen or set(chosen) - set(held):
        raise ValueError(f"layers={told(layers)} must be of those that have values: {', '.join(map(str, held))}.")
    return chosen


def _sides(matrices: np.ndarray, sigmas: float) -> np.ndarray:
    """-1 where a head of a matrix is far below the mean of all, 1 where it is far above, else 0."""
    mu, sigma = (of(matrices, axis=(1, 2), keepdims=True) for of in (np.mean, np.std))
    return (matrices > mu + sigmas * sigma).astype(int) - (matrices < mu - sigmas * sigma)
