"""Maps of what matters in a picture, by name: one number for each image token, made in the ways that papers make them.

Rule this module guards: a map is what the experiment of its name returns, with that experiment's own settings; what is
summed up to give one number a token is said here.

>>> made("attention", Asked(vlm, real, yes, null)).dims
('position',)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.experiments.direct_logits import direct_logit_attribution
from mechvlm.experiments.inputs import input_sites, token_coordinates, token_dim, token_sums
from mechvlm.experiments.occlusion import occlusion
from mechvlm.experiments.relevance import gradient_attention, relevancy
from mechvlm.experiments.rollout import attention_rollout
from mechvlm.experiments.saliency import input_times_gradient, integrated_gradients, smooth_grad
from mechvlm.experiments.sight import cross_layers, image_coordinates, image_dim, looking, own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.metrics import Metric, WordMetric
from mechvlm.prompt import Prompt
from mechvlm.readings import rows
from mechvlm.rounds import unsaid
from mechvlm.sites import listed, told
from mechvlm.vlm import VLM

Map = Callable[[Prompt], xr.DataArray]


@dataclass(frozen=True)
class Asked:
    """What a map is asked about.

    Attributes:
        other: the null prompt.
        at: where gradients are taken and tokens taken away, "image_features" or "pixels".
        seed: of what draws numbers.
    """

    vlm: VLM
    prompt: Prompt
    metric: Metric
    other: Prompt
    at: str = "image_features"
    seed: int = 0
    batch_size: int | None = None


def _input_times_gradient(asked: Asked) -> xr.DataArray:
    return input_times_gradient(asked.vlm, asked.prompt, asked.metric, asked.at).attribution


def _attribution_patching(asked: Asked) -> xr.DataArray:
    """The picture's features minus the null picture's, times the gradient at the picture: occlusion, to first order."""
    sites = input_sites(asked.vlm, asked.at)
    run = asked.vlm.run(asked.prompt, read=sites, grad_of=asked.metric)
    null = asked.vlm.run(asked.other, read=sites)
    product = {site: (run[site].double() - null[site].double()) * run.grad[site].double() for site in sites}
    sums = token_sums(asked.vlm, asked.prompt, product)
    return xr.DataArray(
        sums, dims=[token_dim(asked.prompt, asked.at)], coords=token_coordinates(asked.prompt, asked.at)
    )


def _integrated_gradients(asked: Asked) -> xr.DataArray:
    more: dict[str, Any] = {"baseline": asked.other, "batch_size": asked.batch_size}
    return integrated_gradients(asked.vlm, asked.prompt, asked.metric, asked.at, **more).attribution


def _smooth_grad(asked: Asked) -> xr.DataArray:
    more: dict[str, Any] = {"seed": asked.seed, "batch_size": asked.batch_size}
    return smooth_grad(asked.vlm, asked.prompt, asked.metric, asked.at, **more).attribution


def _gradient_attention(asked: Asked) -> xr.DataArray:
    return gradient_attention(asked.vlm, asked.prompt, asked.metric).attribution.sum(["layer", "head"])


def _relevancy(asked: Asked) -> xr.DataArray:
    return relevancy(asked.vlm, asked.prompt, asked.metric).relevancy


def _attention_rollout(asked: Asked) -> xr.DataArray:
    return attention_rollout(asked.vlm, asked.prompt).rollout


def _attention(asked: Asked) -> xr.DataArray:
    """The last position's attention, averaged over heads and over the layers that look at the picture."""
    dim, prompt = image_dim(asked.prompt), asked.prompt
    layers = cross_layers(asked.vlm) if dim == "key" else own_layers(asked.vlm)
    sites = [looking(asked.vlm, prompt, layer) for layer in layers]
    read = dict.fromkeys(sites, rows([-1], None if dim == "key" else prompt.image))
    (run,) = asked.vlm.runs([{"prompt": prompt, "read": read, "value": unsaid}])
    weights = np.stack([numbers(run[site])[0, :, 0] for site in sites])
    return xr.DataArray(weights.mean((0, 1)), dims=[dim], coords=image_coordinates(prompt))


def _direct_logits(asked: Asked) -> xr.DataArray:
    """What heads take from each image token to the logit directly, summed over layers and heads."""
    metric: Any = asked.metric
    return direct_logit_attribution(asked.vlm, asked.prompt, metric, by="token").by_token.sum(["layer", "head"])


def _occlusion(asked: Asked) -> xr.DataArray:
    more: dict[str, Any] = {"null": asked.other, "at": asked.at, "batch_size": asked.batch_size}
    return occlusion(asked.vlm, asked.prompt, asked.metric, **more).attribution


def _random(asked: Asked) -> xr.DataArray:
    coordinates, dim = token_coordinates(asked.prompt, asked.at), token_dim(asked.prompt, asked.at)
    count = len(np.ravel(coordinates["row"][1]))  # type: ignore[index]
    return xr.DataArray(np.random.default_rng([asked.seed, 1]).random(count), dims=[dim], coords=coordinates)


MAPS: dict[str, Callable[[Asked], xr.DataArray]] = {
    "occlusion": _occlusion,
    "attribution_patching": _attribution_patching,
    "input_times_gradient": _input_times_gradient,
    "integrated_gradients": _integrated_gradients,
    "smooth_grad": _smooth_grad,
    "gradient_attention": _gradient_attention,
    "relevancy": _relevancy,
    "direct_logits": _direct_logits,
    "attention_rollout": _attention_rollout,
    "attention": _attention,
    "random": _random,
}
THROUGH_WORDS = ("relevancy", "attention_rollout")
"""Maps that follow attention from word to word, so that pictures have to stand among the words."""
BY_POSITION = ("gradient_attention", "relevancy", "direct_logits", "attention_rollout", "attention")
"""Maps of attention to image tokens, which are no patches of the picture under a Q-Former."""
OF_WORDS = ("direct_logits",)
"""Maps of a word's logit, or of the difference of two, and of no other metric."""


def chosen_maps(prompt: Prompt, maps: Any, at: str, metrics: Sequence[Metric] = ()) -> dict[str, str | Map]:
    """Maps by name: names that are known, and functions.

    Args:
        maps: names; or a mapping from names of one's own to names or to functions from a prompt to a map; or None
            for all that there are for such a prompt.
        metrics: those that maps are asked about.

    Raises:
        ValueError: for a name that is not known or is there twice, or no map at all.
        TypeError: for what is no name and no function.

    Example:
        >>> list(chosen_maps(real, {"mine": lambda prompt: mv.attention_map(vlm, prompt, 3)}, "image_features"))
        ['mine']
    """
    if maps is None:
        by_key, by_patch = image_dim(prompt) == "key", token_dim(prompt, at) == "patch"
        words = all(isinstance(one, WordMetric) and one.name == "logit_difference" for one in metrics)
        without = (*(THROUGH_WORDS if by_key else ()), *(BY_POSITION if by_patch else ()), *(() if words else OF_WORDS))
        return {name: name for name in MAPS if name not in without}
    if isinstance(maps, Mapping):
        pairs = [(str(name), one) for name, one in maps.items()]
    else:
        pairs = [(one, one) for one in (None if isinstance(maps, str) else listed(maps)) or ()]
    if not pairs:
        raise ValueError(f"maps={told(maps)} names no maps; give a list such as ['relevancy', 'attention'].")
    for at_place, (name, one) in enumerate(pairs):
        _check(name, one, [other for other, _ in pairs[:at_place]])
    return dict(pairs)


def _check(name: Any, one: Any, before: Sequence[Any]) -> None:
    """Refuse what is no map."""
    if not (isinstance(name, str) and (isinstance(one, str) or callable(one))):
        raise TypeError(
            f"maps holds {told(one)}, which is neither the name of a map nor a function; write for instance "
            "{'mine': lambda prompt: mv.attention_map(vlm, prompt, 3)}."
        )
    if isinstance(one, str) and one not in MAPS:
        raise ValueError(
            f"maps holds {told(one)}, which is no map that is known; choose from {', '.join(MAPS)}, or give a "
            "mapping from a name to a function of a prompt."
        )
    if name in before:
        raise ValueError(f"maps holds {told(name)} more than once; give each map once.")


def made(name: str | Map, asked: Asked) -> xr.DataArray:
    """A map of a prompt, by its name or by a function.

    Raises:
        TypeError: for a function that returns no DataArray.
    """
    if isinstance(name, str):
        return MAPS[name](asked)
    found: Any = name(asked.prompt)
    if not isinstance(found, xr.DataArray):
        raise TypeError(
            f"a function of maps returned {told(found)} and no DataArray; choose a variable, like "
            "mv.relevancy(vlm, prompt, metric).relevancy."
        )
    return found
