"""On which pixels, or which image features, does the answer depend? Gradients where a picture enters, three ways.

Rule this module guards: what is said to sum to a difference of the metric is checked to, in every result. All that a
picture hands on at a place is moved together, so that nothing of it passes by.

>>> found = integrated_gradients(vlm, real, mv.logit_difference("yes", "no"), at="pixels")
>>> found.attrs["completeness_gap_relative"] < 0.05
True
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.experiments.inputs import (
    PATCHED,
    PIXELS,
    input_sites,
    squares_of,
    token_coordinates,
    token_dim,
    token_sums,
)
from mechvlm.experiments.paths import baseline_of, between, edits_to, noisy, points_of
from mechvlm.experiments.record import metric_unit, one_prompt, record
from mechvlm.experiments.sweep import asked_of, in_sight, numbers, rows_for, valued
from mechvlm.metrics import Metric
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, beside, done, together, unsaid
from mechvlm.sites import Site, number, whole
from mechvlm.vlm import VLM

STEPS = (64, 128, 256, 512, 1024)
"""How many points integrated gradients take, where nobody says, until their sum is close enough."""

Values = Mapping[Site, Tensor]


def input_times_gradient(vlm: VLM, prompt: Prompt, metric: Metric, at: str = "image_features") -> xr.Dataset:
    """How much each image token, or pixel, speaks for a metric, to first order.

    Args:
        at: "image_features", where the picture enters the language model, or "pixels", where it enters the model.

    Returns:
        As `integrated_gradients`, without its checks: the sum is not the metric, since the model is not linear.

    Raises:
        ValueError: for a prompt without an image, another place, or pixels that are of no single token.
        TypeError: for several prompts.

    Example:
        >>> found = mv.input_times_gradient(vlm, real, mv.logit_difference("yes", "no"), at="pixels")
        >>> found.pixel_attribution.dims
        ('square', 'channel', 'y', 'x')

    Source:
        Simonyan et al. (2014), "Deep Inside Convolutional Networks", section 3; times the input: Shrikumar et al.
        (2016), "Not Just a Black Box".
    """
    sites = input_sites(vlm, at)
    run = vlm.run(one_prompt(prompt), read=sites, grad_of=metric)
    gradient = {site: run.grad[site].double() for site in sites}
    product = {site: gradient[site] * run[site].double() for site in sites}
    value = float(run.metric[0]) if run.metric is not None else float("nan")
    return _result(vlm, prompt, metric, (product, gradient), "gradient x input", value=value)


def integrated_gradients(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    at: str = "image_features",
    baseline: Any = None,
    steps: int | None = None,
    method: str = "gauss-legendre",
    tolerance: float = 0.05,
    batch_size: int | None = None,
) -> xr.Dataset:
    """How much of a metric each image token, or pixel, accounts for, between a picture that says nothing and this one.

    The gradients along the straight line from the baseline to the input, averaged, times the way between them. They sum
    to the metric at the input minus the metric at the baseline (completeness), but for the error of the average, which
    falls with `steps`; where features enter behind several layers too, or as keys, all move together.

    Args:
        at: "image_features", where the picture enters the language model, or "pixels", where it enters the model.
        baseline: another prompt of the same words and positions, or a picture or a function from picture to picture
            for `prompt.with_image`; None means a black picture. "zeros" means features of zero, a hard baseline:
            a norm of the language model sees their direction alone, so that all of the metric's change is where they
            all but vanish, and the sum rarely holds.
        steps: points of the line at which a gradient is taken. None: 64, doubled until the sum is within the tolerance,
            at most 1,024; the way from a black picture may be steep.
        method: how they lie and weigh: "gauss-legendre" or "midpoint".
        tolerance: the largest completeness gap, as a fraction of the metric's difference. Half precision alone may make
            a gap of some percent.
        batch_size: points in one forward and backward pass; by default a quarter of a sweep's.

    Returns:
        `attribution`, in the metric's unit, over axis position, image tokens only, with image, tile, row and column as
        further coordinates, -1 for what stands for no place; `gradient_norm`, the length of the averaged gradient. The
        axis is `key` under cross-attention (Mllama), and `patch` for the pixels under a Q-Former. At the pixels of
        models that are called with pictures `pixel_attribution` has them one by one, over axes square (with coordinates
        image_of and tile_of), channel, y and x of what the model sees.

        In `attrs`: `value` and `baseline_value` of the metric; `completeness_gap`, the attributions' sum minus the
        difference of the two, without sign, and the same relative to it; `outside_tokens`, the sum over pixels that are
        in no token's square.

    Raises:
        ValueError: where the gap is above `tolerance`; for a prompt without an image, a baseline with other words or
            positions, another place or method, or pixels that are of no single token.
        TypeError: for several prompts.

    Example:
        >>> found = mv.integrated_gradients(vlm, real, mv.logit_difference("yes", "no"), at="pixels")
        >>> mv.plot.over_image(found.attribution, real.images[0], real.pictures[0])

    Source:
        Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks", sections 3 and 5.
    """
    sites, allowed = input_sites(vlm, at), number("tolerance", tolerance)
    points_of(STEPS[0] if steps is None else steps, method)
    if not allowed >= 0:
        raise ValueError(f"tolerance={allowed:g} is no fraction of a difference; give a number from 0, such as 0.05.")
    least_said, other = baseline_of(one_prompt(prompt), at, baseline)
    x, *others = _inputs(vlm, [prompt] if other is None else [prompt, other], sites)
    base = others[0] if others else {site: torch.zeros_like(x[site]) for site in sites}
    way = {site: x[site] - base[site] for site in sites}
    works, value, least = list[Work[Any]]([_ends(vlm, prompt, metric, base)]), 0.0, 0.0
    for count in STEPS if steps is None else [steps]:
        shares, weights = points_of(count, method)
        variants = [edits_to({site: partial(between, base[site], way[site], at) for site in sites}) for at in shares]
        works.append(_averaged(prompt, metric, variants, sites, weights, batch_size))
        found: list[Any] = [*together(vlm, works)]
        gradient, works = found.pop(), []
        value, least = found[0] if found else (value, least)
        product = {site: gradient[site] * way[site] for site in sites}
        total = float(sum(part.sum() for part in product.values()))
        if abs(total - (value - least)) <= allowed * abs(value - least):
            break
    gap, relative = completeness(total, value - least, allowed, count)
    how: dict[str, Any] = {"steps": count, "method": method, "baseline": least_said, "baseline_value": least}
    gaps = {"completeness_gap": gap, "completeness_gap_relative": relative}
    return _result(vlm, prompt, metric, (product, gradient), "integrated gradients", value=value, **how, **gaps)


def smooth_grad(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    at: str = "image_features",
    noise: float = 0.15,
    samples: int = 16,
    seed: int = 0,
    times_input: bool = False,
    batch_size: int | None = None,
) -> xr.Dataset:
    """The gradient of a metric, averaged over noisy copies of the input, so that single steep spots even out.

    Args:
        at: "image_features", where the picture enters the language model, or "pixels", where it enters the model.
        noise: the standard deviation, as a fraction of the distance from the input's lowest to its highest value.
        samples: noisy copies.
        seed: of the noise; the same seed gives the same copies, whatever the batch size.
        times_input: whether to multiply by the input, which gives a sign.
        batch_size: copies in one forward and backward pass; by default a quarter of a sweep's.

    Returns:
        As `integrated_gradients`, without its checks. Without `times_input` a token's `attribution` is the length of
        the averaged gradient, as `gradient_norm`, and `pixel_attribution` that gradient itself.

    Raises:
        ValueError: as for `integrated_gradients`, and for a negative noise or no samples.
        TypeError: for several prompts.

    Example:
        >>> mv.smooth_grad(vlm, real, mv.logit_difference("yes", "no"), at="pixels", samples=4).attrs["samples"]
        4

    Source:
        Smilkov et al. (2017), "SmoothGrad: removing noise by adding noise", section 3.
    """
    sites, count, spread = input_sites(vlm, at), whole("samples", samples), number("noise", noise)
    if count < 1 or not 0 <= spread < float("inf"):
        raise ValueError(
            f"samples={count} and noise={spread:g} average nothing; give 1 sample or more, and noise from 0."
        )
    (x,) = _inputs(vlm, [one_prompt(prompt)], sites)
    seeds = np.random.SeedSequence(whole("seed", seed)).generate_state(count * len(sites)).reshape(count, len(sites))
    variants = [
        edits_to({site: partial(noisy, x[site], spread, int(own)) for site, own in zip(sites, row, strict=True)})
        for row in seeds
    ]
    gradient = done(vlm, _averaged(prompt, metric, variants, sites, [1 / count] * count, batch_size))
    product = {site: gradient[site] * x[site] for site in sites} if times_input else None
    how = {"noise": spread, "samples": count, "seed": whole("seed", seed)}
    name = "smoothed gradient x input" if times_input else "norm of the smoothed gradient"
    return _result(vlm, prompt, metric, (product, gradient), name, **how)


def _inputs(vlm: VLM, prompts: Sequence[Prompt], sites: Sequence[Site]) -> list[dict[Site, Tensor]]:
    """What each of some pictures hands on at some sites."""
    runs = vlm.runs({"prompt": prompt, "read": sites, "value": unsaid} for prompt in prompts)
    return [{site: run[site].double() for site in sites} for run in runs]


def _averaged(
    prompt: Prompt,
    metric: Metric,
    variants: Sequence[Sequence[Edit]],
    sites: Sequence[Site],
    weights: Sequence[float],
    batch_size: int | None,
) -> Work[dict[Site, Tensor]]:
    """The gradients of variants of a prompt at some sites, summed by weight, where the model runs."""
    size = max(1, rows_for(prompt) // 4) if batch_size is None else batch_size
    left, keys = list(weights), [key_of(site) for site in sites]
    total: dict[tuple, Any] = dict.fromkeys(keys, 0.0)

    def summed(_read: dict, gradients: dict) -> dict[tuple, Tensor] | None:
        own = left[:size]
        del left[:size]
        for key in keys:
            held = gradients[key]
            for weight, row in zip(own, held if isinstance(held, list) else held.chunk(len(own)), strict=True):
                total[key] = total[key] + weight * row.double()
        return None if left else total

    asked = asked_of(prompt, variants, dict.fromkeys(sites), size, metric, summed, unsaid)
    *_, run = in_sight(asked, (yield asked))
    return {site: run.reduced[key] for site, key in zip(sites, keys, strict=True)}


def _ends(vlm: VLM, prompt: Prompt, metric: Metric, base: Values) -> Work[list[float]]:
    """The metric at the input and at the baseline."""
    least = edits_to({site: partial(between, start, start, 0.0) for site, start in base.items()})
    return beside([valued(vlm, prompt, metric, edits) for edits in ([], least)])


def completeness(total: float, difference: float, tolerance: float, steps: int) -> tuple[float, float]:
    """How far attributions are from summing to a difference, absolutely and relative to it.

    Raises:
        ValueError: where that is farther than the tolerance, a fraction of the difference.

    Example:
        >>> completeness(total=4.0, difference=4.1, tolerance=0.05, steps=64)  # doctest: +ELLIPSIS
        (0.09..., 0.02...)
    """
    gap = abs(total - difference)
    relative = gap / abs(difference) if difference else float("inf") if gap else 0.0
    if not relative <= tolerance:
        raise ValueError(
            f"the attributions sum to {total:.4g}, and from the baseline to the prompt the metric changes by "
            f"{difference:.4g}, which is {relative:.1%} away, where tolerance={tolerance:g}; take more than "
            f"steps={steps}, or allow more."
        )
    return gap, relative


def _result(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    found: tuple[Values | None, Values],
    name: str,
    **conventions: str | int | float,
) -> xr.Dataset:
    """Attributions as they are returned.

    Args:
        found: what is summed over a token, None for the gradient's length there; and the gradient.
        name: of the attribution.
    """
    product, gradient = found
    at = "pixels" if PIXELS in gradient else "image_features"
    dim, unit = token_dim(prompt, at), metric_unit(metric)
    per = f"{unit} per unit of the {'pixel' if at == 'pixels' else 'feature'}"
    norm = np.sqrt(token_sums(vlm, prompt, {site: x**2 for site, x in gradient.items()}))
    sums = norm if product is None else token_sums(vlm, prompt, product)
    said = {"long_name": name, "units": per if product is None else unit}
    values: dict[str, Any] = {
        "attribution": ([dim], sums, said),
        "gradient_norm": ([dim], norm, {"long_name": "norm of the gradient", "units": per}),
    }
    coordinates = token_coordinates(prompt, at)
    if at == "pixels":
        shown = gradient if product is None else product
        if product is not None:
            conventions["outside_tokens"] = float(product[PIXELS].sum()) - float(sums.sum())
        if vlm.arch.grid not in PATCHED:
            squares = squares_of(vlm, prompt, shown[PIXELS])
            said = {**said, "long_name": name.removeprefix("norm of the ")}
            values["pixel_attribution"] = (
                ["square", "channel", "y", "x"],
                numbers(torch.stack(sum(squares, []))),
                said,
            )
            cells = [(image, tile) for image, held in enumerate(squares) for tile in range(len(held))]
            which = np.array(cells, dtype=int).T
            coordinates |= {"image_of": ("square", which[0]), "tile_of": ("square", which[1])}
    taken = ", ".join(map(str, gradient))
    attrs = record(vlm, [prompt], metric, **conventions, taken_at=taken)
    return xr.Dataset(values, coords=coordinates, attrs=attrs)
