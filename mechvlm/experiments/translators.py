"""Translators: what a residual stream is turned into before it is decoded, so that early layers can be read at all.

Rule this module guards: a translator is applied where it was trained. One that knows its site is refused anywhere else.

>>> shift = Translator(torch.eye(len(direction)), direction)
>>> mv.logit_lens(vlm, real, positions=[-1], translators=shift).attrs["translators"]
'Translator'
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.edits import name_of
from mechvlm.sites import Site, told
from mechvlm.visit import written

Translate = Callable[[Tensor], Tensor]
"""From residual streams, `pos d_model`, to as many that the final norm and the unembedding can read."""


@dataclass(frozen=True, eq=False, repr=False)
class Translator:
    """h + W h + b: a learned change of the residual stream.

    Attributes:
        weight, bias: W and b; computed in their own precision, or the stream's where that is finer.
        site: where it was trained; None where it may be applied anywhere.
        source: where it comes from, for records.
    """

    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"] | None = None
    site: Site | None = None
    source: str = ""

    def __call__(self, h: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        wide = h.to(torch.promote_types(h.dtype, self.weight.dtype))
        bias = None if self.bias is None else self.bias.to(wide)
        return wide + torch.nn.functional.linear(wide, self.weight.to(wide), bias)


def tuned_lens(path: str | Path) -> list[Translator]:
    """The translators of a tuned lens, from the folder in which the tuned-lens package keeps it.

    Its translator number l reads what *enters* layer l, and not what layer l leaves; so they are for
    `logit_lens(..., kind="resid_pre")`, and are refused elsewhere.

    Args:
        path: a folder with `config.json` and `params.pt`, or `params.safetensors` instead of that. Nothing else than
            tensors is read from it, so that a file cannot run code.

    Raises:
        ValueError: where a file is missing, or does not hold one square matrix (and at most one bias) for each layer.

    Example:
        >>> mv.logit_lens(vlm, real, kind="resid_pre", translators=mv.tuned_lens("my_lens"))  # doctest: +SKIP

    Source:
        Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", section 3; the
        files of github.com/AlignmentResearch/tuned-lens, whose translator is added to h, as here.
    """
    folder = Path(path)
    state, settings = _state(folder), json.loads((folder / "config.json").read_text())
    count, width = (settings.get(name) for name in ("num_hidden_layers", "d_model"))
    numbers = sorted({name.split(".")[0] for name in state}, key=lambda name: (len(name), name))
    good: dict[str, tuple] = {f"{number}.weight": (width, width) for number in numbers}
    good |= {f"{number}.bias": (width,) for number in numbers if f"{number}.bias" in state}
    if {name: tuple(x.shape) for name, x in state.items()} != good or numbers != [str(n) for n in range(count or 0)]:
        raise ValueError(
            f"{folder.name} holds parameters of other names or shapes than a tuned lens of {count} layers, {width} "
            "wide; they are 0.weight, 0.bias and so on, one of each for every layer."
        )
    name = f"tuned lens of {settings.get('base_model_name_or_path', 'an unnamed model')}"
    return [
        Translator(state[f"{number}.weight"], state.get(f"{number}.bias"), Site("resid_pre", number), name)
        for number in range(len(numbers))
    ]


def _state(folder: Path) -> dict[str, Tensor]:
    """The parameters in a folder.

    Raises:
        ValueError: for a folder without them.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder that a tuned lens was saved in.")
    if (folder / "params.safetensors").is_file():
        from safetensors.torch import load_file

        return load_file(folder / "params.safetensors")
    if not (folder / "params.pt").is_file():
        raise ValueError(f"{folder} holds neither params.pt nor params.safetensors; give the folder of a tuned lens.")
    try:
        # The tuned-lens package writes no other format; weights_only reads tensors, and refuses all else by this error.
        return dict(torch.load(folder / "params.pt", map_location="cpu", weights_only=True))
    except UnpicklingError as error:
        raise ValueError(
            f"{folder / 'params.pt'} holds more than tensors, which are all that is read from it; save the lens's "
            "state_dict."
        ) from error


def by_layer(translators: Any, sites: Sequence[Site]) -> dict[Site, Translate]:
    """The translator of each site: one for all, or by layer; none for None.

    Raises:
        ValueError: for a layer without one, or a translator of another site.
        TypeError: for what is no function.
    """
    if translators is None:
        return {}
    found: dict[Site, Translate] = {}
    listed = isinstance(translators, list | tuple | torch.nn.ModuleList)
    known = dict(enumerate(translators)) if listed else translators
    for site in sites:
        if isinstance(known, Mapping) and site.layer not in known:
            raise ValueError(
                f"there is no translator for layer {site.layer}; give one for each layer that is asked, or a function "
                "for all."
            )
        one = known[site.layer] if isinstance(known, Mapping) else known
        if not callable(one):
            raise TypeError(
                f"the translator of layer {site.layer} is {told(one)}, and it must be a function from `pos d_model` to "
                "`pos d_model`."
            )
        if isinstance(one, Translator) and one.site not in (None, site):
            raise ValueError(
                f"a translator trained at {one.site} was given for {site}; read where it was trained, for instance "
                "kind='resid_pre' for a tuned lens."
            )
        found[site] = one
    return found


def translated(translate: Translate, h: Float[Tensor, "pos d_model"], site: Site) -> Float[Tensor, "pos d_model"]:
    """What a translator makes of streams.

    Raises:
        ValueError: where it fails, or returns anything but finite numbers of the streams' shape.
    """
    try:
        new: Any = translate(h)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the translator of {site} failed on {written(h)}: {said}; it must take and return `pos d_model`."
        ) from error
    shaped = isinstance(new, Tensor) and new.shape == h.shape and new.is_floating_point()
    if not shaped or not bool(new.isfinite().all()):
        given = "values that are not finite" if shaped else written(new) if isinstance(new, Tensor) else told(new)
        raise ValueError(
            f"the translator of {site} returned {given} for {written(h)}; it must return finite numbers of that shape."
        )
    return new


def said_of(translators: Any) -> str:
    """Translators as records name them."""
    if isinstance(translators, Mapping):
        translators = list(translators.values())
    several = isinstance(translators, list | tuple | torch.nn.ModuleList)
    first = next(iter(translators), None) if several else translators
    if isinstance(first, Translator) and first.source:
        return first.source
    return name_of(first) if callable(first) else "none"
