"""Where does the picture's information lie? Noise on the picture, and clean activations put back place by place.

>>> found = causal_trace(vlm, real, yes, layers=[0, 4], samples=2)
>>> found["mean"].dims, found.indirect.dims
(('layer', 'span'), ('sample', 'layer', 'span'))
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit, patch
from mechvlm.experiments.edges import Window, windows_of
from mechvlm.experiments.inputs import input_sites
from mechvlm.experiments.knockout import interval
from mechvlm.experiments.objects import object_tokens
from mechvlm.experiments.record import metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.sight import check_layers_run, cross_layers, deepstack_layers, image_dim, named
from mechvlm.experiments.sweep import numbers, sweeping, value_and_top, valued, values_of_axis
from mechvlm.metrics import Metric, probability
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, beside, both, together, unsaid
from mechvlm.run import Run
from mechvlm.sites import Site, number, told, whole, whole_numbers
from mechvlm.vlm import VLM

KINDS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
STREAM = ("resid_pre", "resid_mid", "resid_post")


def causal_trace(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric | None = None,
    noise: float = 3.0,
    on: str = "image_features",
    objects: Any = None,
    kind: str = "resid_post",
    window: int = 1,
    layers: Sequence[Any] | None = None,
    spans: Mapping[str, Sequence[int]] | None = None,
    positions: Sequence[int] | None = None,
    samples: int = 10,
    seed: int = 1,
    std_of: Sequence[Prompt] | None = None,
    level: float = 0.95,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How far the answer comes back when clean activations are put back, one by one, into a run with a noisy picture.

    Three runs are compared: the clean one; the corrupted one, with Gaussian noise added to the picture; and the
    corrupted one with one layer's activations of one span (or a window of layers') as they were in the clean run. All
    runs of a sample have the same noise.

    Noise lies off what the model was trained on; where there is a second picture, patching between the two
    (`patch_spans`) says the same without it.

    Args:
        metric: by default the probability of the first token that the model says in the clean run.
        noise: how many standard deviations of what it is added to.
        on: "image_features", what takes the image tokens' places (what deep-stack adds of the picture too, with a
            standard deviation of its own); or "pixels", all the model is called with.
        objects: image tokens, whose features alone are corrupted: a list of positions, a box as a tuple, or a mask; see
            `object_tokens`.
        kind: what is put back: "resid_pre", "resid_mid", "resid_post", "attn_out" or "mlp_out".
        window: how many layers are put back together, about each centre l: of 10 those from l - 5 to l + 4.
        layers: the centres, by default all; or windows as they are, (first, last).
        spans: positions that are put back together, by name; by default the prompt's spans, the last image token, and
            with `objects` these and the rest of the image.
        positions: instead of spans, positions that are put back one by one, for instance range(len(prompt)).
        samples, seed: how many times noise is drawn, and from which random numbers.
        std_of: the prompts over whose pictures the standard deviation is taken; by default this one. It is one number,
            over all tokens and dimensions of the image's features, or over all pixels and channels.
        level: of the interval of the mean over samples.
        batch_size, out: see `sweep`; `out` holds a folder for each sample.

    Returns:
        `indirect`, the metric restored minus corrupted, over sample, layer and span (or position). `mean`, `low` and
        `high`: of `indirect` over samples. Over sample: `corrupted`, and `total`, the metric clean minus corrupted.
        `clean`. All in the metric's unit. `attrs` hold the noise's standard deviation.

    Raises:
        ValueError: for a prompt without an image, a kind or place that is not there, or noise of objects in pixels.
        TypeError: for what is no prompt, or no list.

    Example:
        >>> each = mv.causal_trace(vlm, real, yes, positions=real.image, layers=[2], samples=2)
        >>> mv.plot.over_image(each["mean"].sel(layer=2), real.images[0], real.pictures[0])

    Source:
        Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2 and appendix B: 3 standard
        deviations, windows of 10 for attention and MLP outputs. There it is words that are corrupted; the standard
        deviation is of the image's features here, since those of words are of another size.
    """
    _check(vlm, one_prompt(prompt), kind, samples, noise)
    entries, own = input_sites(vlm, on, "on"), _corrupted_tokens(prompt, on, objects)
    dim, places = _places(prompt, spans, positions, own)
    windows = {one.name: one for one in windows_of(vlm, window, layers)}
    shown = [prompt] if std_of is None else check_prompts(std_of, vlm.shape)
    found_clean = _clean(vlm, prompt, _read(vlm, kind, windows.values(), entries), metric)
    (clean, value, measure), stds = both(vlm, found_clean, _stds(shown, entries))
    axes: dict[str, Any] = {"layer": list(windows), dim: list(places)}

    def put_back(layer: int | str, **place: Any) -> list[Edit]:
        return restored(vlm, prompt, clean, kind, windows[layer], places[place[dim]])

    def sample(at: int, edits: list[Edit]) -> Work[list[Any]]:
        noisy, folder = vlm.with_edits(edits), None if out is None else Path(out) / f"sample-{at}"
        swept = sweeping(noisy, prompt, put_back, measure, batch_size, folder, **axes)
        return beside([valued(noisy, prompt, measure), swept])

    sized = {site: noise * std for site, std in stds.items()}
    noisy = (sample(*one) for one in enumerate(noises(prompt, clean, sized, own, samples, seed)))
    corrupted, found = (list(part) for part in zip(*together(vlm, noisy), strict=True))
    said, every = measure if metric is None else metric, list(windows.values())
    result = _dataset(found, value, corrupted, every, level, said)
    about = record(vlm, [prompt], said, site=kind, noise=noise, on=on, seed=seed, level=level)
    about |= {"engine": found[0].attrs["engine"]}
    return result.assign_attrs({**about, **_about(vlm, list(windows), window, stds)})


def restored(vlm: VLM, prompt: Prompt, clean: Run, kind: str, window: Window, positions: Sequence[int]) -> list[Edit]:
    """The edits that put a clean run's activations back, at some positions of the layers of a window.

    Where the picture's features are also added to image tokens behind later layers (Qwen3-VL), they are part of what
    these tokens hold: with the residual stream of some of them, what is yet to be added there is put back too.

    Example:
        >>> clean = vlm.run(real, read=["text.2.resid_post"])
        >>> [str(edit) for edit in restored(vlm, real, clean, "resid_post", Window(2, 2, 2), real.last)]
        ['patch 1 positions at text.2.resid_post (prompt only)']
    """
    sites = [Site(kind, layer) for layer in range(window.first, window.last + 1)]
    edits = [patch(site, clean[site], positions=positions) for site in sites]
    tokens = [prompt.image.index(at) for at in positions if at in set(prompt.image)]
    if kind not in STREAM or not tokens:
        return edits
    later = [Site("deepstack", layer) for layer in deepstack_layers(vlm) if layer >= window.first]
    return [*edits, *(_features(site, clean[site], tokens) for site in later)]


def _features(site: Site, source: Tensor, tokens: Sequence[int]) -> Edit:
    """Some image tokens' features, counted through all images, as they were in another run."""
    given, index = source.flatten(0, 1), torch.tensor(tokens)

    def put(x: Tensor) -> Tensor:  # image pos d_model
        flat, here = x.flatten(0, 1), index.to(x.device)
        return flat.index_copy(0, here, given.to(flat)[here]).reshape(x.shape)

    return Edit(site, put, "prompt", label=f"put back {len(tokens)} tokens' features")


def noises(
    prompt: Prompt, clean: Run, sized: Mapping[Site, float], tokens: Sequence[int], samples: int, seed: int
) -> Iterator[list[Edit]]:
    """For each sample the edits that add its noise: one draw for each site, so that every run of a sample has the same.

    Args:
        sized: the noise's standard deviation at each site.
        tokens: the image tokens that alone are corrupted; none for all.

    Example:
        >>> site = mv.Site("image_features")
        >>> len(list(noises(real, vlm.run(real, read=[site]), {site: 1.0}, [], 3, 1)))
        3
    """
    draw = torch.Generator().manual_seed(seed)
    others = [at for at, position in enumerate(prompt.image) if position not in set(tokens)] if tokens else []

    def adding(site: Site, size: float) -> Edit:
        added = size * torch.randn(clean[site].shape, generator=draw)
        if others:
            added.flatten(0, 1)[others] = 0

        def add(x: Tensor) -> Tensor:
            return x + added.to(x)

        return Edit(site, add, "prompt", label=f"noise of {size:.4g}, seed {seed}")

    for _ in range(samples):
        yield [adding(site, size) for site, size in sized.items()]


def _check(vlm: VLM, prompt: Prompt, kind: str, samples: int, noise: float) -> None:
    """Refuse what cannot be put back, or corrupts nothing."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} cannot be put back; choose from {', '.join(KINDS)}.")
    if whole("samples", samples) < 1 or number("noise", noise) < 0:
        raise ValueError(
            f"samples={samples} and noise={noise} corrupt nothing; give 1 sample or more, and noise from 0."
        )
    check_layers_run(vlm, prompt, range(vlm.shape.layers["text"]))


def _corrupted_tokens(prompt: Prompt, on: str, objects: Any) -> list[int]:
    """The image tokens that alone are corrupted; none for all of them."""
    if objects is None:
        return []
    if on == "pixels" or image_dim(prompt) == "key":
        other = "the pixels" if on == "pixels" else "keys of cross-attention"
        raise ValueError(
            f"objects={told(objects)} are image tokens, and the noise is on {other}, which are not theirs; leave "
            "objects out, or choose on='image_features' where image tokens have features."
        )
    return object_tokens(prompt, objects)


def _places(
    prompt: Prompt,
    spans: Mapping[str, Sequence[int]] | None,
    positions: Sequence[int] | None,
    objects: Sequence[int],
) -> tuple[str, dict[Any, list[int]]]:
    """What is put back together, and the axis it makes."""
    if positions is not None and spans is not None:
        raise ValueError("spans and positions were both given; activations are put back by the one or by the other.")
    if positions is not None:
        return "position", {at: [at] for at in values_of_axis("position", whole_numbers("positions", positions))}
    if spans is None:
        found = {**prompt.spans, **({"last image token": prompt.image[-1:]} if prompt.image else {})}
        rest = [at for at in prompt.image if at not in set(objects)]
        return "span", {
            **found,
            **({"object": list(objects)} if objects else {}),
            **({"rest": rest} if objects else {}),
        }
    if not isinstance(spans, Mapping):
        raise TypeError(f"spans={told(spans)} does not name them; write {{'image': prompt.image}}.")
    return "span", {name: list(whole_numbers("positions", span)) for name, span in spans.items()}


def _about(vlm: VLM, names: Sequence[Any], window: int, stds: Mapping[Site, float]) -> dict[str, str | int | float]:
    """What is said of the windows and of the noise."""
    across = cross_layers(vlm)
    left = {"left_in_place": f"the noisy picture, which {named(across)} look at"} if across else {}
    size = "as given" if isinstance(names[0], str) else window
    return {"window": size, "std": ", ".join(f"{std:.6g} at {site}" for site, std in stds.items()), **left}


def _read(vlm: VLM, kind: str, windows: Iterable[Window], entries: Sequence[Site]) -> list[Site]:
    """What is read of the clean run: what is put back, and where the picture enters."""
    inside = {layer: Site(kind, layer) for one in windows for layer in range(one.first, one.last + 1)}
    return [*dict.fromkeys([*entries, *input_sites(vlm, "image_features"), *inside.values()])]


def _clean(vlm: VLM, prompt: Prompt, read: Sequence[Site], metric: Metric | None) -> Work[tuple[Run, float, Metric]]:
    """The run that is put back, its metric, and which that is: by default the probability of its likeliest token."""
    given = None if metric is None else vlm.metric(metric)
    (clean,) = yield [{"prompt": prompt, "read": read, "value": partial(value_and_top, given)}]
    found: Any = clean.metric
    return clean, float(found[0, 0]), vlm.metric(probability(int(found[0, 1]))) if given is None else given


def _stds(prompts: Sequence[Prompt], entries: Sequence[Site]) -> Work[dict[Site, float]]:
    """The standard deviation of all numbers at each place where pictures enter, over all prompts."""
    sums = {site: np.zeros(3) for site in entries}

    def powers(features: Tensor) -> Tensor:
        x = features.double()
        return torch.stack([torch.tensor(float(x.numel())).to(x), x.sum(), (x**2).sum()])[None]

    for run in (
        yield [{"prompt": prompt, "read": dict.fromkeys(entries, powers), "value": unsaid} for prompt in prompts]
    ):
        for site in entries:
            sums[site] += numbers(run[site])[0]
    return {site: float(np.sqrt(max(0.0, (of - total**2 / n) / (n - 1)))) for site, (n, total, of) in sums.items()}


def _dataset(
    restored_to: Sequence[xr.DataArray],
    clean: float,
    corrupted: Sequence[float],
    windows: Sequence[Window],
    level: float,
    metric: Metric,
) -> xr.Dataset:
    """What was found, over sample, layer and place."""
    every = xr.concat(restored_to, "sample", coords="minimal", compat="override").drop_attrs()
    noisy = xr.DataArray(np.array(corrupted), dims=["sample"])
    name, unit = metric_name(metric), {"units": metric_unit(metric)}
    indirect = (every - noisy).assign_attrs(long_name="indirect effect", **unit)
    found = xr.Dataset({"indirect": indirect, **interval(indirect, range(len(corrupted)), level).data_vars})
    found["corrupted"] = noisy.assign_attrs(long_name=f"{name}, corrupted", **unit)
    found["total"] = (clean - noisy).assign_attrs(long_name="total effect", **unit)
    found["clean"] = ((), clean, {"long_name": f"{name}, clean", **unit})
    reached: dict[str, Any] = {
        "first": ("layer", [at.first for at in windows]),
        "last": ("layer", [at.last for at in windows]),
    }
    return found.assign_coords(sample=np.arange(len(corrupted)), **reached)
