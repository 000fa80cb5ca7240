"""What takes the place of an activation that is ablated: zero, what another prompt had there, or a mean over a dataset.

Rule this module guards: a mean is taken where it is put. Activations of a dataset are summed prompt by prompt, where
the model runs, and never kept.

>>> means = mean_activations(vlm, [real, null])
>>> len(means), means[0].shape
(8, torch.Size([8, 24]))
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit, patch
from mechvlm.experiments.examples import PositionsOf, positions_of
from mechvlm.experiments.inputs import input_sites
from mechvlm.experiments.sight import check_layers_run, head_site
from mechvlm.experiments.sight import named as layers_named
from mechvlm.experiments.sweep import numbers
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, unsaid
from mechvlm.sites import Site, places, told
from mechvlm.units import arrays, worked
from mechvlm.vlm import VLM

KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
HEADED = ("q", "k", "v", "z", "cross_z")
"""Kinds with an axis of heads before the last."""
SUMMED = 16
"""Prompts whose activations are summed together, which are kept and shared as one."""
To = None | Prompt | Callable[[Prompt], Prompt] | Sequence[Tensor] | Mapping[str, Sequence[Tensor]]
"""What takes the place; see `ablate_each`."""


def mean_activations(
    vlm: VLM,
    prompts: Prompt | Sequence[Prompt],
    kind: str = "z",
    positions: PositionsOf | str = None,
    out: str | Path | None = None,
) -> list[Tensor]:
    """The mean of an activation over a dataset, in every layer of the language model.

    Args:
        kind: which activation; `z`, what heads hand over, is `cross_z` in layers that attend to the picture (Mllama).
        positions: over which positions of each prompt the mean is taken as well: None means all of them; a list; a
            function from a prompt to positions, such as `lambda prompt: prompt.image`. "each" takes none: every
            position has its own mean, over prompts of one length.
        out: a folder in which what is finished is kept, and which several processes can share; see `mechvlm.workers`.

    Returns:
        One tensor a layer, in float32 or better, without the axis of the batch: `head d_head` for z, q, k and v,
        `d_model` for others; with "each" the axis pos before. `ablate_each_head(to=)` and `ablate_each(to=)` take them.

    Raises:
        ValueError: without prompts, for a kind that a layer has not, or prompts of several lengths with "each".

    Example:
        >>> scenes = [vlm.prompt(one.image, "Is there a red 3 in the image?") for one in mv.demo.scenes()[:4]]
        >>> means = mv.mean_activations(vlm, scenes, positions="each")
        >>> mv.ablate_each(vlm, scenes[0], yes, to=means, layers=[0]).effect.dims
        ('prompt', 'layer', 'head')

    Source:
        Wang et al. (2023), "Interpretability in the Wild", section 2: knockouts by means over a reference distribution.
    """
    asked = check_prompts(prompts, vlm.shape)
    lengths = sorted({len(prompt) for prompt in asked})
    each = isinstance(positions, str)
    if isinstance(positions, str) and positions != "each":
        raise ValueError(f"positions={positions!r} is not known; give positions, a function of a prompt, or 'each'.")
    if each and len(lengths) > 1:
        raise ValueError(
            f"the prompts have {', '.join(map(str, lengths))} positions, so that no position is the same in all; leave "
            "positions='each' out, or ask the same words about pictures of one size."
        )
    sites = sites_of(vlm, kind)
    for prompt in asked:
        check_layers_run(vlm, prompt, range(len(sites)))
    own = None if isinstance(positions, str) else positions
    found = _means(vlm, asked, sites, lambda prompt: positions_of(own, prompt), each, out)
    return [found[site] for site in sites]


def mean_features(vlm: VLM, prompts: Prompt | Sequence[Prompt], out: str | Path | None = None) -> dict[Site, Tensor]:
    """The mean image token of a dataset: of the image features, and of what deep-stack adds of them.

    Args:
        out: a folder in which what is finished is kept, and which several processes can share; see `mechvlm.workers`.

    Returns:
        By site one vector, `d_model`, for `ablate_image_tokens(to=)`.

    Raises:
        ValueError: for prompts without an image.

    Example:
        >>> {str(site): vector.shape for site, vector in mv.mean_features(vlm, [real, null]).items()}
        {'image_features': torch.Size([128])}

    Source:
        Neo et al. (2024), "Towards Interpreting Visual Information Processing in Vision-Language Models", section 3.
    """
    asked = check_prompts(prompts, vlm.shape)
    if not all(prompt.images for prompt in asked):
        raise ValueError("a prompt holds no image, so it has no image features; make it with vlm.prompt(image, text).")
    return _means(vlm, asked, input_sites(vlm, "image_features"), lambda _: None, False, out)


def _means(
    vlm: VLM,
    prompts: Sequence[Prompt],
    sites: Sequence[Site],
    chosen: Callable[[Prompt], tuple[int, ...] | None],
    each: bool,
    out: str | Path | None,
) -> dict[Site, Tensor]:
    """Sums of all prompts over how many were summed: first within groups of prompts, then over groups."""

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        totals, count = yield from _sums([prompts[at] for at in group], sites, chosen, each)
        return arrays(count=count, **{str(site): numbers(total) for site, total in totals.items()})

    groups = [range(at, min(at + SUMMED, len(prompts))) for at in range(0, len(prompts), SUMMED)]
    what = ["means", *map(str, sites), [chosen(prompt) for prompt in prompts], each]
    sums, count = dict[Site, np.ndarray](), 0
    for found in worked(vlm, prompts, groups, work, out, what):
        sums = {site: sums.get(site, 0.0) + found[str(site)].values for site in sites}
        count += int(found["count"])
    wide = torch.promote_types(vlm.dtype, torch.float32)
    return {site: torch.as_tensor(total / count).to(vlm.device, wide) for site, total in sums.items()}


def _sums(
    prompts: Sequence[Prompt],
    sites: Sequence[Site],
    chosen: Callable[[Prompt], tuple[int, ...] | None],
    each: bool,
) -> Work[tuple[dict[Site, Tensor], int]]:
    """The sums of some prompts, and how many were summed."""

    def summed(at: tuple[int, ...] | None, x: Tensor) -> tuple[Tensor, Tensor]:  # batch pos ...
        own = x if at is None else x[:, list(at)]
        total = own.double().sum(0) if each else own.double().flatten(0, 1).sum(0)
        return total[None], torch.tensor([[1 if each else own.shape[:2].numel()]])

    sums, counts = dict[tuple, Any](), list[int]()

    def added(read: dict, _gradients: dict) -> Any:
        for key, (total, _) in read.items():
            sums[key] = sums[key] + total[0] if key in sums else total[0]
        counts.append(int(next(iter(read.values()))[1]))
        return None if len(counts) < len(prompts) else (sums, sum(counts))

    same = {"reduce": added, "value": unsaid}
    *_, run = yield [
        {"prompt": prompt, "read": dict.fromkeys(sites, partial(summed, chosen(prompt))), **same} for prompt in prompts
    ]
    totals, count = run.reduced
    return {site: totals[key_of(site)] for site in sites}, count


def sites_of(vlm: VLM, kind: str) -> list[Site]:
    """The site of a kind in every layer of the language model; of `z` in layers of cross-attention it is `cross_z`.

    Raises:
        ValueError: for a kind without positions, or one that a layer has not.
    """
    layers = vlm.shape.kinds["text"]
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no activation with positions; choose from {', '.join(KINDS)}.")
    found = [head_site(vlm, at) if kind == "z" else Site(kind, at) for at in range(len(layers))]
    lacking = [at for at, site in enumerate(found) if site.kind not in layers[at]]
    if lacking:
        raise ValueError(f"this model has no {kind} in {layers_named(lacking)}; choose a kind that every layer has.")
    return found


def replacements(vlm: VLM, prompt: Prompt, to: To, kinds: Sequence[str]) -> dict[Site, Tensor | None]:
    """What takes the place of each layer's activations of some kinds; None for zero.

    Raises:
        ValueError, TypeError: for a prompt of another length, or tensors that are not one for each layer.
    """
    by_kind = {kind: sites_of(vlm, kind) for kind in kinds}
    sites = [site for own in by_kind.values() for site in own]
    layers = vlm.shape.layers["text"]
    if to is None:
        return dict.fromkeys(sites)
    other = to(prompt) if callable(to) else to
    if isinstance(other, Prompt):
        if len(other) != len(prompt):
            raise ValueError(
                f"to has {len(other)} positions and the prompt {len(prompt)}, so positions cannot be matched; make it "
                "with prompt.with_image, which keeps them."
            )
        check_layers_run(vlm, other, range(layers))
        run = vlm.run(other, read=sites)
        return {site: run[site] for site in sites}
    if isinstance(other, Mapping) and set(other) == set(kinds):
        parts: dict[str, Any] = dict(other)
    elif isinstance(other, list | tuple | Tensor) and len(kinds) == 1:
        parts = {kinds[0]: other}
    else:
        raise TypeError(_neither(other, kinds, layers))
    for given in parts.values():
        if len(given) != layers:
            raise ValueError(f"to holds {len(given)} tensors; give one for each of the {layers} layers.")
    return {site: x for kind in kinds for site, x in zip(by_kind[kind], parts[kind], strict=True)}


def _neither(to: object, kinds: Sequence[str], layers: int) -> str:
    if len(kinds) == 1:
        return f"to={told(to)} is neither a prompt nor a list of tensors, one for each of {layers} layers."
    each = ", ".join(f"{kind!r}: [...]" for kind in kinds)
    return (
        f"to={told(to)} is neither a prompt nor tensors for {' and '.join(kinds)}; write {{{each}}}, lists of one for "
        f"each of {layers} layers."
    )


def put(site: Site, value: Tensor | None, positions: Sequence[int] | None = None) -> Edit:
    """The edit that puts zero, a mean or another run's activation in an activation's place.

    Args:
        value: None for zero; a mean, with or without an axis of positions; or what another run had, with its batch.
        positions: where; None for everywhere.

    Raises:
        ValueError: for a value of another shape, when the model runs.

    Example:
        >>> put(mv.Site("mlp_out", 3), None, real.last).label
        'ablate 1 positions'
    """
    tail = 2 if site.kind in HEADED else 1
    if value is not None and value.ndim == tail + 2:
        return patch(site, value, positions)
    chosen = None if positions is None else places("positions", positions, all_by_none=True)

    def replaced(x: Tensor) -> Tensor:  # batch pos ...
        if value is None:
            new = torch.zeros_like(x)
        elif value.shape in (x.shape[2:], x.shape[1:]):
            new = value.to(x).expand(x.shape)
        else:
            raise ValueError(
                f"what is put at {site} holds {tuple(value.shape)}; it must be {tuple(x.shape[2:])}, or that once for "
                f"each of {x.shape[1]} positions."
            )
        if chosen is None:
            return new.clone()
        x[:, list(chosen)] = new[:, list(chosen)]
        return x

    length = value.shape[0] if value is not None and value.ndim > tail else None
    # As in `patch`: keys and values are read from the cache in every later step.
    when = "always" if (chosen is None and length is None) or site.kind in ("k", "v") else "prompt"
    label = "ablate" if chosen is None else f"ablate {len(chosen)} positions"
    return Edit(site, replaced, when, label=label, positions=chosen or (), length=length)
