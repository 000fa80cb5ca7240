"""What if it looked more, or less? A metric against the amount of an attention bias.

>>> dose_response(vlm, real, mv.logit_difference("yes", "no"), amounts=[-4, -2, 0, 2, 4]).metric
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from mechvlm.attention_edits import bias_attention
from mechvlm.batch import metric_values
from mechvlm.experiments.record import chosen_layers, metric_name, metric_unit, one_prompt, record
from mechvlm.experiments.sight import cross_layers, named, own_layers
from mechvlm.experiments.sweep import numbers, runs_of
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.readings import mass
from mechvlm.sites import Site, listed, number, told, whole_numbers
from mechvlm.vlm import VLM


def dose_response(
    vlm: VLM,
    prompt: Prompt,
    metric: Metric,
    amounts: Sequence[int | float],
    layers: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> xr.Dataset:
    """A metric, and the attention that was really paid, at each of several biases on the attention to some keys.

    A bias of b multiplies the odds that a query looks at the keys by e^b, in each biased layer and head. 0 is the
    unedited model, minus infinity cuts.

    Args:
        amounts: numbers to add to the attention scores.
        layers: which layers are biased, counted from 0; None means all whose words attend to each other.
        keys: the positions looked at; None means the image tokens.
        batch_size: amounts in one forward pass; see `sweep`.

    Returns:
        `metric`, in its own unit, and `mass`, the last position's attention on the keys averaged over all layers and
        heads, both over axis amount; `mass_by_layer`, averaged over heads, over amount and layer. Layers that attend to
        the picture alone, by cross-attention, have no attention on positions: they are left out of `mass`, and not a
        number in `mass_by_layer`.

    Raises:
        ValueError: without amounts, or without keys in a prompt that holds no image, or whose image is seen by
            cross-attention, where all keys are the image's and a bias on them would change nothing.
        TypeError: for amounts, layers or keys that are no list of numbers.

    Example:
        >>> mv.plot.lines(mv.dose_response(vlm, real, mv.probability("yes"), [-4, -2, 0, 2, 4]).metric, x="amount")

    Source:
        The bias is the intervention of VIAR, which adds a constant to the scores of image keys in a band of layers.
    """
    looked_at = _keys(vlm, one_prompt(prompt), keys)
    biases = _amounts(amounts)
    if not biases:
        raise ValueError("amounts is empty; give at least one, for instance [-2, 0, 2].")
    own = own_layers(vlm)
    biased = own if layers is None else chosen_layers(vlm, layers)
    variants = [[bias_attention(layer, looked_at, amount) for layer in biased] for amount in biases]
    sites = [Site("pattern", layer) for layer in own]
    reading = mass({"keys": looked_at}, queries=[len(prompt) - 1])
    measure, values, masses = vlm.metric(metric), [], []
    for run in runs_of(vlm, prompt, variants, dict.fromkeys(sites, reading), batch_size):
        values.append(metric_values(measure, run.logits))
        # Layers may be on several devices.
        masses.append(torch.stack([run[site][..., 0, 0].float().mean(-1).to(run.logits.device) for site in sites], -1))
    by_layer, units = np.full((len(biases), vlm.shape.layers["text"]), np.nan), "fraction"
    by_layer[:, own] = numbers(torch.cat(masses))
    return xr.Dataset(
        {
            "metric": (
                ["amount"],
                numbers(torch.cat(values)),
                {"long_name": metric_name(metric), "units": metric_unit(metric)},
            ),
            "mass": (["amount"], by_layer[:, own].mean(1), {"long_name": "attention mass", "units": units}),
            "mass_by_layer": (["amount", "layer"], by_layer, {"long_name": "attention mass", "units": units}),
        },
        coords={
            "amount": ("amount", biases, {"long_name": "bias on the keys’ scores"}),
            "layer": list(range(by_layer.shape[1])),
        },
        attrs=record(
            vlm, [prompt], metric, biased_layers=", ".join(map(str, biased)), biased_keys=len(looked_at), query="last"
        ),
    )


def _keys(vlm: VLM, prompt: Prompt, keys: Sequence[int] | None) -> list[int]:
    """The positions whose attention is biased: the image tokens, or those given."""
    looked_at = prompt.image if keys is None else list(whole_numbers("keys", keys))
    if not looked_at:
        raise ValueError(
            "the prompt holds no image, so there is nothing to look at; pass keys=, the positions to bias."
        )
    across = cross_layers(vlm)
    if keys is None and across:
        raise ValueError(
            f"this model sees the picture by cross-attention, in {named(across)}, where all keys are the picture's, so "
            "a bias on them changes nothing; pass keys=, positions of the text, or use mv.ablate_each_head."
        )
    return looked_at


def _amounts(amounts: Sequence[int | float]) -> list[float]:
    found = listed(amounts)
    if found is None:
        raise TypeError(f"amounts={told(amounts)} is not a list of amounts; write for instance [-2, 0, 2].")
    return [number("amount", amount) for amount in found]
