"""Where does what was seen pass on its way to the answer? Activation patching from one run into another.

>>> patch_spans(vlm, source=real, target=null, metric=yes).normalised.sel(span="image").values.round(1)
array([ 1. ,  0. , -0. , -0.1, -0.1, -0. , -0. , -0. ])
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from mechvlm.batch import metric_values
from mechvlm.edits import Edit, patch
from mechvlm.experiments.record import metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.sight import check_layers_run, cross_layers, deepstack_layers
from mechvlm.experiments.sight import named as layers_named
from mechvlm.experiments.sweep import sweep
from mechvlm.matching import check_matched
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.run import Run
from mechvlm.sites import Site, told, whole_numbers
from mechvlm.vlm import VLM

KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
STREAM = ("resid_pre", "resid_mid", "resid_post")


def patch_spans(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    spans: Mapping[str, Sequence[int]] | None = None,
    kind: str = "resid_pre",
    batch_size: int | None = None,
) -> xr.Dataset:
    """How far the target's answer becomes the source's when one layer's activations of one span are taken from it.

    By default what *enters* a layer (`resid_pre`) is taken. So layer 0 patches the embeddings, where with two pictures
    and the same words the image span alone must give 1 and every other span 0; and layer l patches all that the layers
    before l wrote. (With `resid_post` the last layer is trivial instead: its last position is the answer.)

    The picture does not enter every model with the embeddings alone. Where features are also added to the image tokens
    behind later layers (Qwen3-VL), they are part of what the picture hands to those tokens: a patch of the residual
    stream at some of them takes what is yet to be added there from the source too, so that layer 0 is as above. Where
    layers look at the picture by cross-attention (Mllama), what they read is the target's picture whatever is patched
    before them; no span gives 1 at layer 0, and only what the patched layers wrote is carried over. `attrs` say which.

    Args:
        source: the prompt patched from, for instance with the real image.
        target: the prompt patched into, for instance `source.with_image(mv.images.black)`.
        spans: named lists of positions; None means the prompt's own, `target.spans`.
        kind: which activation of a layer.
        batch_size: patches in one forward pass; see `sweep`.

    Returns:
        `metric`, in its own unit, and `normalised`, `(metric - target) / (source - target)`: 0 is the target's own
        answer, 1 the source's. Both over axes layer and span; `attrs` hold `source_metric` and `target_metric`.
        Where the two are the same to within the rounding of the logits, so that there is nothing to carry over,
        `normalised` is not a number, and `attrs` hold a `note` that says so.

    Raises:
        ValueError: where positions cannot be matched, or for a kind without positions, or one that some layer of this
            model has not.
        TypeError: for spans that are no lists of positions by name.

    Example:
        >>> yes = mv.logit_difference("yes", "no")
        >>> mv.plot.lines(mv.patch_spans(vlm, real, null, yes).normalised, x="layer", colour="span")

    Source:
        Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2; Zhang and Nanda (2024),
        "Towards Best Practices of Activation Patching", on metrics and their normalisation.
    """
    check_matched(one_prompt(source), one_prompt(target))
    sites = _sites(vlm, kind)
    named = _spans(target, spans)
    for prompt in (source, target):
        check_layers_run(vlm, prompt, range(len(sites)))
    later = deepstack_layers(vlm) if kind in STREAM and target.image else []
    run = vlm.run(source, read=[*sites, *(Site("deepstack", layer) for layer in later)])

    def from_source(layer: int, span: str) -> list[Edit]:
        own = [target.image.index(position) for position in named[span] if position in target.image]
        added = [_features(Site("deepstack", at), run, own) for at in later if at >= layer and own]
        return [patch(sites[layer], run[sites[layer]], positions=named[span]), *added]

    patched = sweep(vlm, target, from_source, metric, batch_size, layer=range(len(sites)), span=list(named))
    measure = vlm.metric(metric)
    other = vlm.run(target).logits
    source_metric, target_metric = (float(metric_values(measure, logits)[0]) for logits in (run.logits, other))
    gap, least = source_metric - target_metric, max(rounding(measure, logits) for logits in (run.logits, other))
    same = abs(gap) <= least
    result = xr.Dataset({"metric": patched, "normalised": (patched - target_metric) / (np.nan if same else gap)})
    result.metric.attrs = {"long_name": metric_name(metric), "units": metric_unit(metric)}
    result.normalised.attrs = {"long_name": "share carried over", "units": "1: all"}
    ends: dict[str, str | float] = {"source_metric": source_metric, "target_metric": target_metric, "site": kind}
    if same:
        ends["note"] = (
            f"source and target differ by {abs(gap):.2g}, which is within the rounding of the logits ({least:.2g}), so "
            "there is nothing to carry over"
        )
    if later:
        ends["patched_with_it"] = f"at image tokens, the features added behind {layers_named(later)} from there on"
    if cross_layers(vlm):
        ends["left_in_place"] = f"the target's picture, which {layers_named(cross_layers(vlm))} look at"
    return result.assign_attrs(
        record(vlm, [source, target], metric, **ends, patched="into the target, from the source")
    )


def _spans(target: Prompt, spans: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    """Spans as they were given, or the target's own."""
    given = target.spans if spans is None else spans
    if not isinstance(given, Mapping):
        raise TypeError(f"spans={told(given)} does not name them; write for instance {{'image': prompt.image}}.")
    return {name: list(whole_numbers("positions", span)) for name, span in given.items()}


def _sites(vlm: VLM, kind: str) -> list[Site]:
    """The sites of a kind in every layer of the language model."""
    if kind not in KINDS:
        raise ValueError(f"spans of {kind!r} cannot be patched; choose from {', '.join(KINDS)}.")
    layers = vlm.shape.kinds["text"]
    without = [layer for layer, kinds in enumerate(layers) if kind not in kinds]
    if without:
        everywhere = [one for one in KINDS if all(one in kinds for kinds in layers)]
        raise ValueError(
            f"this model has no {kind} in {layers_named(without)}; choose from {', '.join(everywhere)}, which every "
            "layer has."
        )
    return [Site(kind, layer) for layer in range(len(layers))]


def _features(site: Site, run: Run, tokens: Sequence[int]) -> Edit:
    """Some image tokens' features behind a layer, taken from another run; tokens are counted through all images."""
    source = run[site].flatten(0, 1)

    def overwrite(x: torch.Tensor) -> torch.Tensor:  # image pos d_model
        rows = x.flatten(0, 1)
        rows[list(tokens)] = source.to(x)[list(tokens)]
        return rows.reshape(x.shape)

    return Edit(site, overwrite, "prompt", label=f"patch {len(tokens)} tokens' features")


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
