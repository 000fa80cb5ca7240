"""VIAR's intervention: a bias on the attention to image tokens, in a band of layers.

Rule this module guards: the bias is on the image tokens that are there, in layers that were given or found; the
published columns and layers have to be asked for by name.

>>> [str(edit) for edit in viar_edits(vlm, real, 2.0, layers=[2, 3])]
['bias +2 attention to 36 keys at text.2.scores', 'bias +2 attention to 36 keys at text.3.scores']
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.attention_edits import bias_attention
from mechvlm.edits import Edit
from mechvlm.experiments.published import published
from mechvlm.experiments.record import chosen_layers
from mechvlm.experiments.sight import cross_layers, named
from mechvlm.methods.published import ADAPTIVE_TABLE, ADAPTIVE_TABLE_CODE, ZONE
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, number, told, whole
from mechvlm.vlm import VLM

Heads = Sequence[int] | Sequence[tuple[int, int]] | Mapping[tuple[int, int], float] | None
"""Heads in every layer; pairs of layer and head; pairs with a factor each; None: all."""
FORMULAS = ("paper", "code")


def viar_edits(
    vlm: VLM,
    prompt: Prompt,
    amount: float | Mapping[int, float] = 2.0,
    layers: Sequence[int] | None = None,
    heads: Heads = None,
    when: str = "always",
    adaptive: str | None = None,
    profile: Any = None,
    convention: str | None = None,
) -> list[Edit]:
    """The edits that make a model look more at the picture: a bias on the image tokens' scores in some layers.

    A bias of b multiplies the odds that a query looks at the picture by e^b, in each biased layer and head.

    Args:
        amount: added before the softmax; or an amount for each layer, whose layers are then those that are biased.
        layers: which layers, counted from 0. No model has a zone that could be assumed, so they have to be given.
        heads: None for all; numbers of heads, the same in every layer; pairs of layer and head, such as neglect heads,
            whose layers are then those that are biased; or such pairs with a factor each, by which the layer's amount
            is multiplied: {(3, 0): 0.5} biases that head by half the amount.
        when: "prompt" biases the pass over the prompt, "decode" the steps after it, "always" both.
        adaptive: None for the same amount in each layer; "code": `amount * (1 - v) / mean of (1 - v) over all layers`,
            as the published code has it; "paper": divided by the largest `1 - v` of the biased layers instead.
        profile: v, the image's share of attention density in each of the model's layers, for adaptive amounts: the
            `mean` of `mv.layer_profile` at quantity "density_share".
        convention: "viar-2026" biases columns 0 to N-1 for N image tokens, wherever the picture stands, so the first
            position and the words before the picture with it; layers are 8 to 16 where none are given (all for the
            code's adaptive form), and v is the stored table of LLaVA-1.5: for adaptive="code" that of the code, in
            three digits, and for "paper" that of the published file, in four.

    Returns:
        An edit for each layer, or for each amount in a layer.

    Raises:
        ValueError: without layers; for a prompt without a picture, or one seen by cross-attention; for a profile that
            does not fit; for a formula or a convention that is not known.
        TypeError: for heads or amounts that are no numbers.

    Example:
        >>> vlm.generate(real, edits=viar_edits(vlm, real, 2.0, layers=range(2, 6))).text
        'yes'

    Source:
        VIAR, "Vision-Informed Attention Rebalancing" (2026): the intervention and its adaptive form; amount 2 in layers
        8 to 16 of LLaVA-1.5-7B, all heads, all rows, in the pass over the prompt and in every step.
    """
    old = published(convention)
    check_picture(vlm, prompt)
    keys = list(range(len(prompt.image))) if old else prompt.image
    shares = _factors(heads)
    if shares is not None and layers is None and not isinstance(amount, Mapping):
        layers = sorted({layer for layer, _ in shares})
    edits = []
    for layer, by in layer_amounts(vlm, amount, layers, adaptive, profile, convention).items():
        for some, factor in _alike(layer, heads, shares):
            edits.append(bias_attention(layer, keys, by * factor, heads=some, when=when))
    if not edits:
        among = layers if layers is not None else amount if isinstance(amount, Mapping) else ZONE
        raise ValueError(f"none of heads={told(heads)} is in layers {named_layers(among)}; give heads of those.")
    return edits


def viar_bias(vlm: VLM, amount: float | Mapping[int, float] = 2.0, **settings: Any) -> Callable[[Prompt], list[Edit]]:
    """The intervention as a function from a prompt to its edits, since positions differ from prompt to prompt.

    Args:
        amount, settings: those of `viar_edits`.

    Returns:
        What `mv.evaluate.pope(edits=)` takes. Its name says what it does.

    Example:
        >>> viar_bias(vlm, 2.0, layers=[2, 3]).__name__
        'viar_edits(amount=2.0, layers=[2, 3])'
    """

    def edits(prompt: Prompt) -> list[Edit]:
        return viar_edits(vlm, prompt, amount, **settings)

    given = {"amount": amount, **settings}
    said = ", ".join(f"{name}={_short(value)}" for name, value in given.items() if value is not None)
    edits.__name__ = edits.__qualname__ = f"viar_edits({said})"
    return edits


def layer_amounts(
    vlm: VLM,
    amount: float | Mapping[int, float],
    layers: Sequence[int] | None = None,
    adaptive: str | None = None,
    profile: Any = None,
    convention: str | None = None,
) -> dict[int, float]:
    """How much each layer's scores are biased.

    Args:
        amount, layers, adaptive, profile, convention: as in `viar_edits`.

    Example:
        >>> layer_amounts(vlm, 2.0, [2, 3], "paper", profile=[0.5] * 2 + [0.2, 0.6] + [0.5] * 4)
        {2: 2.0, 3: 1.0}
    """
    old = published(convention)
    if adaptive not in (None, *FORMULAS):
        raise ValueError(f"adaptive={adaptive!r} is not known; choose 'paper' or 'code', or None for one amount.")
    if isinstance(amount, Mapping):
        if adaptive or layers is not None:
            raise ValueError(
                "amount= says of each layer by how much it is biased, so layers= and adaptive= would say it twice; "
                "leave them out."
            )
        if not amount:
            raise ValueError("amount={} names no layer to bias; write for instance {3: 2.0}.")
        chosen = chosen_layers(vlm, list(amount))
        check_layers(vlm, chosen)
        return {layer: number("amount", by) for layer, by in zip(chosen, amount.values(), strict=True)}
    if layers is None and not old:
        raise ValueError(
            "no layers were given, and which of them look away from the picture differs from model to model; give "
            "layers=, for instance those that mv.find_zone finds, or convention='viar-2026' for the published 8 to 16."
        )
    whole_model = old and layers is None and adaptive == "code"
    chosen = chosen_layers(vlm, None if whole_model else ZONE if layers is None else layers)
    check_layers(vlm, chosen)
    if adaptive is None:
        if profile is not None:
            raise ValueError("a profile sets adaptive amounts; say by which formula, adaptive='paper' or 'code'.")
        return dict.fromkeys(chosen, number("amount", amount))
    stored = ADAPTIVE_TABLE_CODE if adaptive == "code" else ADAPTIVE_TABLE
    missing = 1 - _profile(vlm, stored if old and profile is None else profile)
    over = missing.mean() if adaptive == "code" else missing[chosen].max()
    return {layer: number("amount", amount) * float(missing[layer] / over) for layer in chosen}


def zone_layers(zone: xr.Dataset) -> list[int]:
    """The layers of a zone that was found.

    Args:
        zone: what `mv.find_zone` returns.

    Raises:
        ValueError: where there is none.
        TypeError: for anything else.

    Example:
        >>> zone_layers(xr.Dataset({"found": True, "start": 3.0, "stop": 5.0, "p_value": 0.01}))
        [3, 4]
    """
    if not isinstance(zone, xr.Dataset) or not {"found", "start", "stop", "p_value"} <= set(zone.data_vars):
        raise TypeError(f"a {type(zone).__name__} is no zone; make it with mv.find_zone.")
    if not bool(zone.found):
        raise ValueError(
            f"no zone was found (p = {float(zone.p_value):.3g}), so there are no layers to bias; give layers= yourself."
        )
    return list(range(int(zone.start), int(zone.stop)))


def head_pairs(found: xr.Dataset, side: str = "neglect") -> list[tuple[int, int]]:
    """Heads of neglect, or specialists, as pairs of layer and head: for `heads=` of `viar_edits`.

    Args:
        found: what `mv.neglect_heads` returns.
        side: "neglect" or "specialist".

    Raises:
        ValueError: for another side.
        TypeError: for what `mv.neglect_heads` does not return.

    Example:
        >>> head_pairs(mv.neglect_heads(mv.layer_profile(vlm, [real, null])))[0]
        (0, 4)
    """
    if side not in ("neglect", "specialist"):
        raise ValueError(f"side={side!r} is not known; choose 'neglect' or 'specialist'.")
    if not isinstance(found, xr.Dataset) or side not in found:
        raise TypeError(f"{told(found)} names no heads; make it with mv.neglect_heads(profile).")
    chosen = found[side].transpose("layer", "head")
    return [(int(chosen.layer[at]), int(chosen["head"][head])) for at, head in np.argwhere(chosen.values)]


def named_layers(layers: Sequence[int] | Mapping[int, float]) -> str:
    """Layers in words: runs of them by their ends."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _profile(vlm: VLM, profile: Any) -> np.ndarray:
    """v of every layer of the model."""
    count, given = vlm.shape.layers["text"], None if profile is None else listed(profile)
    if given is None:
        raise ValueError(
            f"adaptive amounts need a profile; give profile=, the image's share in each of this model's {count} layers."
        )
    if len(given) != count:
        raise ValueError(f"the profile has {len(given)} layers, and this model {count}; give one share for each layer.")
    shares = np.array([number("profile:", share) for share in given])
    wrong = shares[~((shares >= 0) & (shares < 1))]
    if wrong.size:
        raise ValueError(f"the profile holds {wrong[0]:g}, which is no share; each layer's is from 0 to below 1.")
    return shares


def _pairs(heads: Any) -> list[tuple[int, int]] | None:
    """Pairs of layer and head; None where heads are plain numbers, or all."""
    given = None if heads is None else listed(heads)
    if not given or listed(given[0]) is None:
        return None
    found = [listed(pair) for pair in given]
    wrong = [one for one, pair in zip(given, found, strict=True) if pair is None or len(pair) != 2]
    if wrong:
        raise TypeError(f"heads holds {told(wrong[0])}, which is no pair of layer and head; write for instance (3, 0).")
    return [(whole("layer", layer), whole("head", head)) for layer, head in filter(None, found)]


def _factors(heads: Any) -> dict[tuple[int, int], float] | None:
    """Pairs of layer and head with what each multiplies its layer's amount by; None for plain numbers, or all."""
    if not isinstance(heads, Mapping):
        pairs = _pairs(heads)
        return None if pairs is None else dict.fromkeys(pairs, 1.0)
    pairs = _pairs(list(heads))
    if pairs is None:
        raise ValueError(f"heads={told(heads)} names no pair of layer and head; write for instance {{(3, 0): 0.5}}.")
    return {pair: number("heads:", by) for pair, by in zip(pairs, heads.values(), strict=True)}


def _alike(
    layer: int, heads: Any, factors: Mapping[tuple[int, int], float] | None
) -> list[tuple[list[int] | None, float]]:
    """Heads of a layer, those with one factor together."""
    if factors is None:
        return [(heads, 1.0)]
    found: dict[float, list[int]] = {}
    for (at, head), factor in factors.items():
        if at == layer:
            found.setdefault(factor, []).append(head)
    return [(some, factor) for factor, some in found.items()]


def check_layers(vlm: VLM, layers: Sequence[int]) -> None:
    """Refuse layers that the model has not, before anything runs."""
    count = vlm.shape.layers["text"]
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layer {outside[0]} is not in this model, which has {count} layers.")


def check_picture(vlm: VLM, prompt: Prompt) -> None:
    """Refuse a prompt whose picture no bias on positions can reach."""
    if not prompt.image:
        raise ValueError(f"the prompt {prompt.words!r} holds no image, so there is nothing to look at more.")
    across = cross_layers(vlm)
    if across:
        raise ValueError(
            f"this model sees the picture by cross-attention, in {named(across)}, where all keys are the picture's, so "
            "a bias on them changes nothing; scale what those layers add instead, by mv.scale_heads(..., cross=True)."
        )


def _short(value: Any) -> str:
    return f"{value.start}-{value.stop - 1}" if isinstance(value, range) and value.step == 1 else told(value)
