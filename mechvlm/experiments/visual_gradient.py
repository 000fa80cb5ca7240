"""How fast does the answer stop depending on the picture? Gradients at the residual stream, layer by layer.

Gradients at any position grow smaller towards the last layers, since fewer layers are left to carry them to the last
position, and more so where the stream grows. A fall at the image tokens means something beside that of other positions,
and of the same tokens when there is nothing to see.

Rule this module guards: at the last layer all gradients but the last position's are zero by construction, whatever the
model does; that is marked. The last layer is in no fit, not even the last position's.

>>> found = gradient_by_layer(vlm, [real], mv.logit_difference("yes", "no"))
>>> found.rate.dims, float(found.gradient_norm.sel(picture="real", span="image", layer=7)[0])
(('prompt', 'picture', 'span'), 0.0)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.experiments.knockout import clusters_of
from mechvlm.experiments.nulls import NO_IMAGE, described, null_prompts
from mechvlm.experiments.published import VIAR, lower_case_token, named_spans, published, spans_of
from mechvlm.experiments.record import metric_unit, record
from mechvlm.experiments.sight import image_dim
from mechvlm.experiments.sweep import numbers
from mechvlm.experiments.uncertainty import with_intervals
from mechvlm.metrics import Metric
from mechvlm.points import rows_for
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, unsaid
from mechvlm.sites import Site, listed, told, whole_numbers
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

MEANING = {
    "gradient_norm": "norm of the gradient at the residual stream",
    "relative": "norm of the gradient times norm of the state",
    "state_norm": "norm of the residual state",
    "rate": "decay of the gradient",
    "relative_rate": "decay of the gradient times the state",
    "log_ratio": "log ratio of the gradients at two layers",
    "expected": "log ratio that the decay rate gives",
    "excess": "log ratio at the image beyond what is expected",
    "excess_measured": "log ratio at the image beyond the baseline's",
}


def gradient_by_layer(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    metric: Metric | None = None,
    clusters: Sequence[Any] | None = None,
    nulls: Any = ("black",),
    spans: Sequence[str] = ("bos", "prefix", "image", "question", "last"),
    between: Sequence[int] | None = None,
    convention: str | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """The length of a metric's gradient at each layer's output, by span, and how fast it falls from layer to layer.

    Args:
        prompts: one, or several; those as long as each other run together.
        metric: what to take the gradient of; under "viar-2026" none is given.
        clusters: what prompts belong together, for the intervals; by default their pictures.
        nulls: pictures with nothing to see, whose runs give the baseline: as in `language_prior_collapse`, but for
            "no_image", which has no image tokens.
        spans: "image" and others to compare with: "bos", "prefix", "separators", "question", "last", "text".
        between: the two layers of `log_ratio`; by default a quarter and half of the depth, as 8 and 16 of the published
            32.
        convention: "viar-2026" computes what was published: the gradient of the logit of the token "yes" in small
            letters, at positions 0 to N - 1, where N counts the image tokens; the picture is the real one only.
        out: a folder in which what is finished is kept, and which several processes can share; see `mechvlm.workers`.

    Returns:
        Over axes prompt, picture ("real" and the nulls), layer and span: `gradient_norm`, the mean over the span's
        positions of the length of the metric's gradient at `resid_post`; `state_norm`, that of the state; and
        `relative`, the mean of their product: how much the metric changes, to first order and at most, for a change of
        the state in proportion to its length. Only this has no scale of its own: a stream that doubles from one layer
        to the next halves the gradient for that reason alone.

        `by_construction`, over layer and span, marks zeros that any model has: at the last layer all but the last
        position's.

        Over prompt, picture and span: `rate`, by which the logarithm of `gradient_norm` falls per layer, a straight
        line fitted to all layers but the last (least squares; natural logarithms; a gradient that is exactly zero is
        left out). The last layer is in no span's fit, so that all are fitted to the same layers: "last" and "text" are
        not zero there, but have passed no layer. `relative_rate` is the same of `relative`. `log_ratio`, the logarithm
        of `gradient_norm` at the first layer of `between` over that at the second; `expected`, `rate` times the layers
        between them. `excess` is `log_ratio` of the real picture's image tokens minus `expected` of each baseline:
        (null, image), the same positions with nothing to see; (real, question) or (real, prefix), words; and
        (real, image), the image's own mean decay, beyond which a fall is one of these layers. An excess of 0 is no
        more than the baseline's; exp(excess) is the factor. `excess_measured` compares with the baseline's own
        `log_ratio` at these two layers instead of its fit. With (null, image) at 0 there, the fall is that of these
        positions, whatever they show.

        Each with `_mean`, `_low` and `_high` over prompts, an interval over clusters. The mean of a logarithm is that
        of the geometric mean.

    Raises:
        ValueError: without prompts, for one without an image, for a span, null or convention that is not known, for
            another number of clusters, without a metric, or with one under a convention; for pictures that are seen by
            cross-attention, whose values no position holds.

    Example:
        >>> found = mv.gradient_by_layer(vlm, [real], mv.logit_difference("yes", "no"), between=(2, 4))
        >>> found.excess.sel(picture="black", span="image").dims
        ('prompt',)

    Source:
        VIAR (github.com/aayambansal/VIAR), its gradient attribution, with `gradient_norm` of the image; baselines,
        rates and `relative` are ours.
    """
    asked, names = check_prompts(prompts, vlm.shape), named_spans(spans)
    measure = _metric(vlm, metric, convention)
    names = ["image"] if published(convention) else [*dict.fromkeys([*names, "image"])]
    if any(image_dim(prompt) == "key" for prompt in asked):
        raise ValueError(
            "this model sees pictures by cross-attention, so no position of its residual stream holds a picture; "
            "mv.gradient_attribution gives gradients by key."
        )
    groups, held = clusters_of(asked, clusters), [spans_of(prompt, names, convention) for prompt in asked]
    others = {} if published(convention) else null_prompts(vlm, asked, nulls)
    if any(len(one) != len(prompt) for null in others.values() for one, prompt in zip(null, asked, strict=True)):
        raise ValueError(f"{NO_IMAGE!r} leaves no image tokens to take a gradient at; choose another null.")
    ends = _between(between, vlm.shape.layers["text"])
    pictures = {"real": asked, **others}
    places = {name: None if out is None else Path(out) / f"picture {at}" for at, name in enumerate(pictures)}
    norms = {name: _norms(vlm, shown, held, measure, places[name]) for name, shown in pictures.items()}
    how = convention or "positions computed"
    said = described(nulls) if others else "none"
    about = record(vlm, asked, measure, nulls=said, convention=how, between=f"{ends[0]}, {ends[1]}")
    values = np.stack(list(norms.values()), 1)  # prompt picture measure layer span
    found = _dataset(values, list(pictures), names, ends).assign_attrs(about)
    return with_intervals(_said(found, metric_unit(measure)), groups)


def decay_rate(values: Float[np.ndarray, "*rest layer"]) -> Float[np.ndarray, "*rest"]:
    """By how much the logarithm of some values falls per layer: minus the slope of the least-squares line.

    Values that are zero or not a number are left out; with fewer than two left there is no rate, but NaN.

    Example:
        >>> float(decay_rate(np.array([8.0, 4.0, 2.0, 0.0])).round(4))  # the logarithm of 2
        0.6931
    """
    there = np.isfinite(values) & (values > 0)
    logs = np.log(np.where(there, values, 1.0))
    count = there.sum(-1, keepdims=True)
    layer = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = np.where(there, layer - (layer * there).sum(-1, keepdims=True) / count, 0.0)
        slope = (x * logs).sum(-1) / (x**2).sum(-1)
    return np.asarray(np.where(count[..., 0] > 1, -slope, np.nan))


def _metric(vlm: VLM, metric: Metric | None, convention: str | None) -> Metric:
    """The metric that the gradient is of."""
    if not published(convention):
        if metric is None:
            raise ValueError("a gradient is of a metric, and none was given; give mv.logit_difference('yes', 'no').")
        return metric
    if metric is not None:
        raise ValueError(f"convention={VIAR!r} has a metric of its own, the logit of 'yes'; leave metric out.")
    token = lower_case_token(vlm, "yes")

    def logit(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        return logits[:, token]

    logit.__name__ = f"logit of token {token} ({vlm.word(token)})"
    return logit


def _between(between: Sequence[int] | None, layers: int) -> tuple[int, int]:
    """Two layers, the lower first, both of which have gradients."""
    ends = (layers // 4, layers // 2) if between is None else tuple(whole_numbers("between", listed(between) or ()))
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] < layers - 1:
        raise ValueError(
            f"between={told(between)} must be two layers, the lower first, below the last of {layers}, whose gradient "
            "is zero; give for instance between=(0, 1)."
        )
    return ends[0], ends[1]


def _norms(
    vlm: VLM, prompts: Sequence[Prompt], held: Sequence[dict[str, list[int]]], metric: Metric, out: Path | None
) -> Float[np.ndarray, "prompt measure layer span"]:
    """Gradient norm, state norm and their product, averaged over spans, of each prompt and layer."""
    sites = [Site("resid_post", layer) for layer in range(vlm.shape.layers["text"])]
    alike: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike.setdefault(len(prompt), []).append(number)
    sizes = [(members, max(1, rows_for(prompts[members[0]]) // 4)) for members in alike.values()]
    groups = [members[start : start + size] for members, size in sizes for start in range(0, len(members), size)]

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        some, read = [prompts[at] for at in group], dict.fromkeys(sites, lengths)
        (run,) = yield [{"prompt": some, "read": read, "grad_of": metric, "value": unsaid}]
        gradient, state = (np.stack([numbers(of[site]) for site in sites]) for of in (run.grad, run))
        three = np.stack([gradient, state, gradient * state])  # measure layer row pos
        rows = [averaged(three[:, :, row], list(held[number].values())) for row, number in enumerate(group)]
        return arrays(norms=np.stack(rows))

    found: dict[int, np.ndarray] = {}
    what = ["gradient_by_layer", held, metric]
    for group, one in zip(groups, worked(vlm, prompts, groups, work, out, what), strict=True):
        found |= dict(zip(group, one.norms.values, strict=True))
    return np.stack([found[number] for number in range(len(prompts))])


def lengths(x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos"]:
    """The length of each position's vector, in single precision at least.

    Example:
        >>> lengths(torch.tensor([[[3.0, 4.0]]]))
        tensor([[5.]])
    """
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def averaged(
    values: Float[np.ndarray, "measure layer pos"], spans: Sequence[Sequence[int]]
) -> Float[np.ndarray, "measure layer span"]:
    """Means over the positions of spans; not a number where a span has none.

    Example:
        >>> averaged(np.array([[[1.0, 2.0, 6.0]]]), [[1, 2], []])
        array([[[ 4., nan]]])
    """
    nothing = np.full(values.shape[:-1], np.nan)
    return np.stack([values[..., list(held)].mean(-1) if held else nothing for held in spans], -1)


def _dataset(
    values: Float[np.ndarray, "prompt picture measure layer span"],
    pictures: list[str],
    names: list[str],
    ends: tuple[int, int],
) -> xr.Dataset:
    """What gradients are, how they fall, and against what."""
    layers = values.shape[3]
    coords = {"prompt": np.arange(len(values)), "picture": pictures, "layer": np.arange(layers), "span": names}
    dims = ["prompt", "picture", "layer", "span"]
    three = ("gradient_norm", "state_norm", "relative")
    found = xr.Dataset({name: (dims, values[:, :, at]) for at, name in enumerate(three)}, coords)
    zero = np.array(
        [[layer == layers - 1 and name not in ("last", "text") for name in names] for layer in range(layers)]
    )
    found = found.assign_coords(by_construction=(["layer", "span"], zero))
    for name, of in (("rate", "gradient_norm"), ("relative_rate", "relative")):
        along = found[of].isel(layer=slice(None, -1)).transpose("prompt", "picture", "span", "layer")
        found[name] = (along.dims[:-1], decay_rate(along.values))
    first, second = (found.gradient_norm.sel(layer=layer, drop=True) for layer in ends)
    found["log_ratio"] = np.log(first.where(first > 0) / second.where(second > 0))
    found["expected"] = found.rate * (ends[1] - ends[0])
    own = found.log_ratio.sel(picture="real", span="image", drop=True)
    found["excess"], found["excess_measured"] = own - found.expected, own - found.log_ratio
    return found


def _said(found: xr.Dataset, unit: str) -> xr.Dataset:
    """The same with names and units."""
    units = {
        "gradient_norm": f"{unit} per unit of the residual stream",
        "relative": unit,
        "state_norm": "residual stream",
        **{name: "nats per layer" for name in ("rate", "relative_rate")},
    }
    for name in found.data_vars:
        found[name].attrs = {"long_name": MEANING[str(name)], "units": units.get(str(name), "nats")}
    return found
