"""Two runs and what is put from one into the other, in one direction or in both.

Rule this module guards: both directions are measured on one scale, on which 0 is the answer of the prompt that is
patched into, and 1 that of the prompt that is patched from.

>>> window_of(3, 3, 8)
range(2, 5)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.record import metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.sight import check_layers_run, cross_layers
from mechvlm.experiments.sight import named as layers_named
from mechvlm.experiments.sweep import numbers, sweeping
from mechvlm.matching import check_matched
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, together
from mechvlm.run import Run
from mechvlm.sites import Site, told, whole, whole_numbers
from mechvlm.vlm import VLM

DIRECTIONS = {
    "denoise": "into the target, from the source",
    "noise": "into the source, from the target",
    "both": "into the target, from the source (denoise), and the other way round (noise)",
}
INTO = {"denoise": "the target's picture", "noise": "the source's picture"}
Patching = Callable[..., list[Edit]]


def exchange(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    read: Mapping[Site, Any],
    patching: Callable[[Run], Patching],
    axes: Mapping[str, Iterable[Any]],
    about: Mapping[str, str | int | float],
    direction: str = "denoise",
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """A metric at each point of a grid of patches from one prompt's run into another's.

    Args:
        read: what the patches need of the run that is patched from.
        patching: from that run to the function from a point of the grid to its edits; see `sweep`.
        axes: as in `sweep`.
        about: further attributes.
        direction: "denoise" patches from the source into the target, "noise" from the target into the source, and
            "both" does both, along axis `direction`.
        out: a folder in which finished points are kept; see `sweep`.

    Returns:
        `metric` and `normalised`; see `patch_spans`.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={told(direction)} is not known; choose from {', '.join(map(repr, DIRECTIONS))}.")
    ways = {"denoise": (source, target), "noise": (target, source)}
    asked = list(ways) if direction == "both" else [direction]

    measure = vlm.metric(metric)

    def patched(way: str) -> Work[tuple[Any, list[xr.DataArray]]]:
        given, taken = ways[way]
        (run,) = yield [{"prompt": given, "read": read if way in asked else (), "value": partial(_end, measure)}]
        if way not in asked:
            return run.metric, []
        kept = out if out is None or direction != "both" else Path(out) / way
        return run.metric, [(yield from sweeping(vlm, taken, patching(run), metric, batch_size, kept, True, **axes))]

    order = sorted(ways, key=lambda way: way not in asked)
    shown = dict(zip(order, together(vlm, map(patched, order)), strict=True))
    found = [one for way in asked for one in shown[way][1]]
    swept = xr.concat(found, xr.DataArray(list(ways), dims="direction", name="direction")) if found[1:] else found[0]
    result = shared_out(swept, direction, *(numbers(shown[way][0])[0] for way in ways))
    result.metric.attrs = {"long_name": metric_name(metric), "units": metric_unit(metric)}
    made = {"patched": DIRECTIONS[direction], "direction": direction, "engine": found[0].attrs["engine"]}
    return result.assign_attrs(record(vlm, [source, target], metric, **{**result.attrs, **about, **made}))


def _end(measure: Metric, logits: Tensor) -> Float[Tensor, "1 2"]:
    """A metric, and how far rounding of the logits moves it."""
    return torch.tensor([[float(metric_values(measure, logits)[0]), rounding(measure, logits)]], dtype=torch.float64)


def shared_out(
    swept: xr.DataArray,
    direction: str,
    source: Float[np.ndarray, "2"],
    target: Float[np.ndarray, "2"],
) -> xr.Dataset:
    """A metric with patches, and how much of the way from one prompt's answer to the other's each of them goes.

    Args:
        source, target: the metric of each prompt, and how far rounding of the logits moves it.
    """
    of = {"source_metric": float(source[0]), "target_metric": float(target[0])}
    gap, least = of["source_metric"] - of["target_metric"], float(max(source[1], target[1]))
    unit = np.nan if abs(gap) <= least else gap
    denoised = (swept - of["target_metric"]) / unit
    noised = (of["source_metric"] - swept) / unit
    if direction == "both":
        normalised = denoised.where(swept.direction == "denoise", noised)
    else:
        normalised = denoised if direction == "denoise" else noised
    result = xr.Dataset({"metric": swept, "normalised": normalised}, attrs=of)
    result.normalised.attrs = {"long_name": "share carried over", "units": "1: all"}
    if np.isnan(unit):
        result.attrs["note"] = (
            f"source and target differ by {abs(gap):.2g}, which is within the rounding of the logits ({least:.2g}), so "
            "there is nothing to carry over"
        )
    return result


def matched(vlm: VLM, source: Prompt, target: Prompt, layers: Sequence[int], tower: str = "text") -> None:
    """Refuse two prompts whose positions do not mean the same, or that skip one of the layers.

    Raises:
        ValueError, TypeError: see `check_matched`.
    """
    check_matched(one_prompt(source), one_prompt(target))
    for prompt in (source, target) if tower == "text" else ():
        check_layers_run(vlm, prompt, layers)


def nothing_between(source: Prompt, target: Prompt) -> dict[str, str | int | float]:
    """What a record has to say of two prompts that are the same, so that nothing patched changes anything.

    Example:
        >>> nothing_between(real, null), list(nothing_between(real, real))
        ({}, ['note'])
    """
    own, other = target.encoding, source.encoding
    if own.keys() != other.keys() or not all(torch.equal(own[name], other[name]) for name in own):
        return {}
    return {"note": "source and target are the same prompt, so no patch changes anything"}


def layers_of(vlm: VLM, tower: str, layers: Sequence[int] | None, called: str = "layers") -> list[int]:
    """The layers of a tower that can reach the answer, or those that were given.

    Raises:
        ValueError: for a tower that the model has not, an empty list, or a layer given twice or not there.
    """
    if tower not in vlm.shape.layers:
        raise ValueError(f"this model has no tower {told(tower)}; it has {', '.join(vlm.shape.layers)}.")
    live = vlm.shape.live[tower]
    if layers is None:
        return list(range(live))
    chosen = list(whole_numbers(called, layers))
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < live:
        raise ValueError(
            f"{called}={told(chosen)} cannot be patched; give each layer once, from 0 to {live - 1}, or None for all."
        )
    return chosen


def window_of(layer: int, window: int, layers: int) -> range:
    """The layers of a window around one, of so many layers in all.

    Raises:
        ValueError: for a window of no layers.

    Example:
        >>> window_of(3, 3, 8), window_of(3, 4, 8), window_of(0, 3, 8)
        (range(2, 5), range(1, 5), range(0, 2))
    """
    if whole("window", window) < 1:
        raise ValueError(f"window={window} holds no layer; give 1 or more.")
    return range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))


def patched_with(vlm: VLM, direction: str, later: Sequence[int] = ()) -> dict[str, str]:
    """What a record has to say of a picture that enters behind the first layer.

    Args:
        later: the layers behind which features of the picture are patched as well.
    """
    said = {}
    if later:
        said["patched_with_it"] = f"at image tokens, the features added behind {layers_named(later)} from there on"
    if cross_layers(vlm):
        whose = INTO.get(direction, "the picture of the prompt patched into")
        said["left_in_place"] = f"{whose}, which {layers_named(cross_layers(vlm))} look at"
    return said


def rounding(measure: Metric, logits: torch.Tensor) -> float:
    """How far a metric moves when logits move by what their precision cannot hold: the largest of some random tries.

    Example:
        >>> rounding(vlm.metric(mv.probability("yes")), vlm.run(real).logits) < 1e-5
        True
    """
    exact, eps = logits[:1].detach().double().cpu(), torch.finfo(logits.dtype).eps
    unit = eps * exact.abs().max()
    tries = exact + unit * torch.randn(
        16, exact.shape[1], dtype=exact.dtype, generator=torch.Generator().manual_seed(0)
    )
    here, there = metric_values(measure, exact.to(logits.device)), metric_values(measure, tries.to(logits.device))
    return max(float((there - here).abs().max()), eps * float(here.abs()[0]))
