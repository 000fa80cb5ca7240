"""VIAR's first form (its `viar.py`): weights of the picture multiplied where they are spread wider than the words'.

A factor on weights that are then made to sum to one again is a bias of its logarithm on the scores: `viar_edits` again,
by 0.5 to 1.6 instead of 2. The published function makes its hooks and never registers them, and they would change the
weights that a layer returns, not what it made of them: it answers as the unedited model does.

Rule this module guards: a limit on a ratio of entropies is never told without the ratio that even attention has.

>>> [edit.site.layer for edit in legacy_edits(vlm, real)]
[2, 3, 4, 5]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.attention_edits import bias_attention
from mechvlm.edits import Edit, name_of
from mechvlm.experiments.conventions import called
from mechvlm.experiments.layer_profile import layer_profile
from mechvlm.experiments.published import VIAR, published
from mechvlm.experiments.record import one_prompt, record
from mechvlm.experiments.sight import own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.experiments.uncertainty import mean_interval
from mechvlm.lazy_attention import Attention
from mechvlm.methods.bias import check_picture
from mechvlm.methods.grey import from_null, shares
from mechvlm.methods.published import NULL
from mechvlm.prompt import Prompt
from mechvlm.readings import Entropy, lazy
from mechvlm.sites import Site, listed, number, told, whole_numbers
from mechvlm.vlm import VLM

RATIO, BASE, LARGEST, FIRST, SHARE = 1.5, 2.0, 5.0, 2, 0.75
"""The published limit, factors, first layer, and share of the layers behind which nothing is changed."""
LEAST = 1e-6
"""What counts as no factor and no entropy."""


def entropy_layers(profile: xr.Dataset, ratio: float = RATIO, level: float = 0.95) -> xr.Dataset:
    """The layers in which attention is spread over the picture much wider than over the words.

    Entropy grows with the number of keys, so that even attention has a large ratio itself: 2.3 for the 576 columns and
    some 40 words of LLaVA-1.5 as published. A ratio above the limit alone is therefore no sign of neglect.

    Args:
        profile: what `mv.layer_profile` returns.
        ratio: the limit, which a ratio may equal.
        level: of the intervals, over pictures.

    Returns:
        Over prompt and layer: `ratio`, the profile's `h_ratio`; `above`, whether it is at or above the limit (bool);
        `relative`, the ratio divided by `even`. Over prompt: `even`, the ratio of even causal attention to the same
        keys (not a number under conventions for other models). Over layer: `mean` of the ratio, with `low` and `high`;
        `share` of the prompts above the limit, with `share_low` and `share_high`; `chosen`, whether the mean is at or
        above the limit, and `sure`, whether the interval's lower end is (bool).

    Raises:
        TypeError: for what is no profile.

    Example:
        >>> asked = [vlm.prompt(one.image, "Is there a 7 in the image?") for one in mv.demo.scenes()[:4]]
        >>> found = mv.methods.viar.entropy_layers(mv.layer_profile(vlm, asked))
        >>> found.layer.values[found.chosen].tolist(), bool((found.relative > 1).all())
        ([0, 1, 2, 3, 4, 5, 6, 7], True)

    Source:
        VIAR (github.com/aayambansal/VIAR): src/viar.py, `entropy_threshold`. It asks one prompt; intervals and `even`
        are this package's.
    """
    if not isinstance(profile, xr.Dataset) or not {"h_ratio", "cluster", "n_keys", "positions"} <= set(profile):
        raise TypeError(f"{told(profile)} is no profile; make it with mv.layer_profile(vlm, prompts).")
    limit, clusters = number("ratio", ratio), profile.cluster.values.tolist()
    ratios, even = profile.h_ratio.drop_attrs(), _even(profile)
    above = ratios >= limit
    over = mean_interval(ratios, "prompt", clusters, level)
    shares = mean_interval(above.where(ratios.notnull()), "prompt", clusters, level)
    found = {"ratio": ratios, "above": above, "even": even, "relative": ratios / even}
    found |= {name: over[name] for name in ("mean", "low", "high")}
    found |= {"share": shares["mean"], "share_low": shares.low, "share_high": shares.high}
    found |= {"chosen": over["mean"] >= limit, "sure": over.low >= limit}
    about = {"ratio": limit, "level": level, "even": "ratio of causal attention that is even over the keys it sees"}
    return xr.Dataset(found).assign_attrs({**profile.attrs, **about})


def entropy_ratios(vlm: VLM, prompt: Prompt, convention: str | None = None) -> list[float]:
    """How much wider each layer's attention is spread over the picture than over the rest.

    Args:
        convention: None: entropies of text rows, as in `mv.layer_profile`. "viar-2026": of all rows, over columns 0 to
            N - 1 for N image tokens and over all others. Rows that see none of the others count as an entropy of 0, so
            that the ratio is far larger: even attention of LLaVA-1.5 has about 30, not 2.3.

    Returns:
        A ratio for each layer; not a number for layers whose words do not attend to each other.

    Example:
        >>> now, then = (entropy_ratios(vlm, real, which) for which in (None, "viar-2026"))
        >>> round(now[3], 1), round(then[3], 1)
        (1.8, 6.3)

    Source:
        VIAR: src/viar.py, `compute_attention_entropy`.
    """
    old = published(convention)
    check_picture(vlm, one_prompt(prompt))
    if not old:
        return layer_profile(vlm, prompt).h_ratio.values[0].tolist()
    look, own = called(prompt, VIAR), own_layers(vlm)
    run = vlm.run(prompt, read={Site("pattern", layer): lazy(partial(_spread, dict(look.spans))) for layer in own})
    found = [math.nan] * vlm.shape.layers["text"]
    for layer in own:
        image, rest = numbers(run[Site("pattern", layer)][0]).tolist()
        found[layer] = image / rest if rest >= LEAST else math.inf
    return found


def legacy_factors(
    ratios: Sequence[float],
    layers: Sequence[int] | None = None,
    base: float = BASE,
    largest: float = LARGEST,
    ratio: float = RATIO,
) -> dict[int, float]:
    """By what each layer's weights of the picture are multiplied, from its ratio of entropies.

    `1 + (min(base + r - ratio, largest) - 1) (1 - layer / 2L)` of L layers, where its own ratio r is at least `ratio`.

    Args:
        ratios: of each layer of the model, for instance from `entropy_ratios`; no number, or an infinite one, is none.
        layers: which layers; None: from 2 to three quarters of all.
        base: the factor at the limit, before it falls with depth.
        largest: no factor is above it.
        ratio: the limit.

    Returns:
        Factors above 1 by layer; layers that are left alone are left out.

    Raises:
        ValueError: for a layer that is not there.
        TypeError: for ratios that are no list of numbers.

    Example:
        >>> legacy_factors([9.0, 9.0, 1.4, 1.5, 2.5, 9.0, 9.0, 9.0])
        {3: 1.8125, 4: 2.5, 5: 3.75}

    Source:
        VIAR: src/viar.py, `compute_rescaling_factor`.
    """
    given = listed(ratios)
    if given is None:
        raise TypeError(f"ratios={told(ratios)} is not a list of ratios; give one for each layer, by entropy_ratios.")
    chosen = range(FIRST, int(SHARE * len(given))) if layers is None else whole_numbers("layers", layers)
    outside = [layer for layer in chosen if not 0 <= layer < len(given)]
    if outside:
        raise ValueError(f"layer {outside[0]} has no ratio; {len(given)} were given, for layers from 0.")
    base, largest, ratio = number("base", base), number("largest", largest), number("ratio", ratio)
    found = {}
    for layer in chosen:
        own = number("ratios:", given[layer])
        if ratio <= own < math.inf:
            found[layer] = 1 + (min(base + own - ratio, largest) - 1) * (1 - layer / (2 * len(given)))
    return {layer: factor for layer, factor in found.items() if factor > 1 + LEAST}


def legacy_edits(
    vlm: VLM,
    prompt: Prompt,
    base: float = BASE,
    largest: float = LARGEST,
    ratio: float = RATIO,
    layers: Sequence[int] | None = None,
    importance: xr.DataArray | None = None,
    when: str = "always",
    convention: str | None = None,
) -> list[Edit]:
    """The edits of VIAR's first form: weights of image tokens times a factor, and rows made to sum to one again.

    Each is a bias of the factor's logarithm, which is the same: softmax(s + log f) is proportional to f times
    softmax(s). Entropies are those of the unedited pass over the prompt, and factors stay the same in later steps; the
    published code would find them anew in each step.

    Args:
        base, largest, ratio, layers: as in `legacy_factors`.
        importance: of each head, for instance of `grey_divergence`: a head's factor is `1 + (factor - 1) importance`.
            None: all heads alike.
        when: "prompt", "decode" or "always".
        convention: "viar-2026" has the published columns 0 to N - 1 for N image tokens, and the ratio over all rows.

    Returns:
        An edit for each layer whose ratio is at the limit or above it, or for each of its heads; none where there is no
        such layer.

    Raises:
        ValueError: for a prompt without a picture, or one seen by cross-attention; layers or heads that are not there;
            an importance below 0.
        TypeError: for numbers that are none, or an importance that is no array.

    Example:
        >>> vlm.generate(real, edits=mv.methods.viar.legacy_edits(vlm, real)).text
        'yes'

    Source:
        VIAR: src/viar.py, `rescale_attention`.
    """
    factors = legacy_factors(entropy_ratios(vlm, prompt, convention), layers, base, largest, ratio)
    keys = list(range(len(prompt.image))) if convention else prompt.image
    if importance is None:
        return [bias_attention(layer, keys, math.log(factor), when=when) for layer, factor in factors.items()]
    edits, of = [], _importance(vlm, importance, factors)
    for layer, factor in factors.items():
        alike: dict[float, list[int]] = {}
        for head, share in enumerate(of[layer]):
            alike.setdefault(math.log1p((factor - 1) * share), []).append(head)
        edits += [bias_attention(layer, keys, by, heads=heads, when=when) for by, heads in alike.items()]
    return edits


def grey_divergence(vlm: VLM, prompt: Prompt, null: Callable | None = None, temperature: float = 1.0) -> xr.Dataset:
    """How far each head's attention, and the answer, are from what they are with a grey picture.

    Args:
        null: a null image; None: grey, 128 of 255.
        temperature: of the softmax over heads. At 1 the largest importance of a layer is e times its smallest, whatever
            the divergences: it tells heads of a layer apart, and not whether any of them looks.

    Returns:
        Over layer and head: `divergence`, KL(row with the picture || row without) of the attention pattern in nats, the
        mean over all rows; `importance`, the published share of it: scaled from 0 to 1 within a layer (1 where all
        heads are alike), its softmax over heads, times their number. Without axes: `answer`, KL(with || without) of the
        next token in nats. What a head does for the answer is another question, asked by
        `mv.ablate_each_head(vlm, prompt, mv.kl_divergence(vlm.run(prompt)), to=null)`.

    Raises:
        ValueError: for a temperature that is not above 0, a prompt without a picture, or one seen by cross-attention.
        TypeError: for more than one prompt.

    Example:
        >>> found = mv.methods.viar.grey_divergence(vlm, real)
        >>> bool(np.allclose(found.importance.mean("head"), 1)), bool(found.answer > 0)
        (True, True)

    Source:
        VIAR: src/viar.py, `compute_head_importance`, which divides by the number of keys as well; `importance` is the
        same either way.
    """
    check_picture(vlm, one_prompt(prompt))
    if not 0 < number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature={temperature} divides nothing; give a number above 0.")
    null, own = null or NULL, own_layers(vlm)
    apart, answer = from_null(vlm, prompt, prompt.with_image(null), own)
    axes, units = ("layer", "head"), {"long_name": "KL of attention rows", "units": "nats"}
    found = {"divergence": (axes, apart, units), "importance": (axes, shares(apart, temperature))}
    about = record(vlm, [prompt], null=name_of(null), temperature=float(temperature))
    return xr.Dataset({**found, "answer": answer}, {"layer": own, "head": range(apart.shape[1])}, about)


def _even(profile: xr.Dataset) -> xr.DataArray:
    """The ratio of entropies of causal attention that is even over the keys it sees, for each prompt."""
    convention = str(profile.attrs["convention"])
    rows = {VIAR: ["text"]}.get(convention, ["question", "last"] if convention.startswith("none") else [])
    text = profile.n_keys.reindex(span=rows, fill_value=0).sum("span").values.astype(int)
    image = profile.n_keys.sel(span="image").values
    found = np.full(len(image), np.nan)
    for at, (keys, count, length) in enumerate(zip(image, text, profile.positions.values, strict=True)):
        if count:
            found[at] = np.log(keys) / np.log(np.arange(length - keys - count, length - keys) + 1).mean()
    return xr.DataArray(found, dims="prompt")


def _spread(spans: Mapping[str, tuple[int, ...]], attention: Attention) -> Float[Tensor, "1 span"]:
    """The published entropy over the image's columns and over the others, the mean over heads and rows."""
    each = (numbers(Entropy(None, spans[name]).of(attention, "pattern")) for name in ("image", "text"))
    return torch.tensor([[float(np.nan_to_num(one).mean()) for one in each]], dtype=torch.float64)


def _importance(vlm: VLM, given: Any, layers: Any) -> dict[int, list[float]]:
    """Of each layer that is edited, the importance of its heads."""
    if not isinstance(given, xr.DataArray) or set(given.dims) != {"layer", "head"}:
        raise TypeError(
            f"importance is {told(given)}, and must be an array over layer and head; take it from grey_divergence."
        )
    held = given.transpose("layer", "head")
    numbered = {int(layer): row for layer, row in zip(held.layer.values, held.values, strict=True)}
    heads = vlm.shape.heads["text"]
    if set(layers) - set(numbered) or held.sizes["head"] != heads:
        raise ValueError(
            f"importance holds {held.sizes['head']} heads of layers {list(numbered)}; give the {heads} heads of each "
            f"layer that is edited, {', '.join(map(str, layers))}."
        )
    wrong = held.values[~((held.values >= 0) & np.isfinite(held.values))]
    if wrong.size:
        raise ValueError(f"importance holds {wrong[0]:g}; each head's is a number from 0, and 1 on average.")
    return {layer: numbered[layer].tolist() for layer in layers}
