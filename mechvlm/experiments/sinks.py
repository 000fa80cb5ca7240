"""Which positions are attention sinks: by massive activations, by what is paid to them, and by likeness to the first.

Rule this module guards: a sink is said by the rule that found it. The rules need not agree, so each has its own
variable, and no residual stream or map of queries by keys is kept to compute them.

>>> found = sinks(vlm, real, threshold=3.0)
>>> found.position[found.sink_by_activation.any("layer")].values.tolist() == sink_positions(found)
True
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.experiments.record import chosen_layers, one_prompt, record
from mechvlm.experiments.sight import NOWHERE, cross_layers, named, own_layers
from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.prompt import Prompt
from mechvlm.readings import lazy
from mechvlm.rounds import unsaid
from mechvlm.sites import Site, number, told, whole_numbers
from mechvlm.vlm import VLM

FIRST_LAYER = 2
"""Sinks are looked for from this layer on, as VAR and ACT do."""
ALIKE = 0.9
"""The cosine to the first token's state above which a state counts as like it."""
PRIMARY, SECONDARY = 17 / 32, 4 / 32
"""Lifetimes as shares of the layers: the paper's L - 15 and 4 layers, in a model of L = 32."""
RULES = ("activation", "mass", "either", "both")


def sinks(
    vlm: VLM,
    prompt: Prompt,
    dims: Sequence[int] | None = None,
    threshold: float = 20.0,
    alpha: float = 5.0,
    layers: Sequence[int] | None = None,
) -> xr.Dataset:
    """The attention sinks of a prompt: positions that are looked at for no content of their own.

    Args:
        dims: dimensions of the residual stream in which sinks are massive, for instance [1415, 2533] for LLaMA-2-7B and
            Vicuna-7B. None finds them: the two in which the first token's state is largest, relative to its root mean
            square, on average over the middle half of the layers. `attrs` tell them.
        threshold: of `phi`, above which a position is a sink by activation. `phi` is never above the square root of the
            model's width, so that the published 20 finds nothing in models narrower than 400 and a smaller one is
            needed there; `note` says so.
        alpha: a position is a sink by mass where its column mass is above `alpha` divided by the number of positions.
            The default is this package's: five times what attention spread evenly over all positions would pay.
        layers: by default all. Lifetimes are counted over, and relative to, those given.

    Returns:
        `phi` over layer and position: the largest of |h[d]| / rms(h) over `dims`, of the state h that enters the layer,
        without a norm's weight. `column_mass` over layer, head and position: the attention weights on a key, summed
        over queries and divided by how many queries see it. `cosine` over layer and position: to the first token's
        state. `sink_by_activation` and `sink_by_mass` over layer and position (of the heads' mean; the first position
        is never one by mass): false before layer 2. `lifetime` over position: in how many layers |cosine| is above
        0.9. `label` over position: of the sinks by activation in any layer, those that are like the first token in at
        least 17/32 of the layers are "primary", those in at least 4/32 "secondary"; all others "none". These shares
        are the published L - 15 and 4 layers of a model of 32.
        Coordinates by position: token, span, and image, tile, row and column, -1 for what stands for no place.
        The first token is the bos token, or position 0 where the prompt has none; `attrs` say which. Layers that
        attend to the picture's keys instead of the text have no column mass (not a number); `note` names them.

    Raises:
        ValueError: for dimensions or layers that are not there, or thresholds that are not positive.

    Example:
        >>> found = mv.sinks(vlm, real, threshold=3.0)
        >>> found.phi.dims, found.column_mass.dims
        (('layer', 'position'), ('layer', 'head', 'position'))

    Source:
        Kang et al. (2025), "See What You Are Told: Visual Attention Sink in Large Multimodal Models", section 3: `phi`
        and its threshold. Yu et al. (2024), "Unveiling and Harnessing Hidden Attention Sinks" (ACT): `column_mass`,
        the first token and the first two layers left out; its last layer, left out there, is kept here.
        arXiv 2512.22213, "Secondary attention sinks": `cosine`, `lifetime` and, for visual tokens, its labels
        for those that are also sinks by activation.
    """
    one_prompt(prompt)
    chosen = chosen_layers(vlm, layers)
    first = (prompt.bos or [0])[0]
    massive = _dims(vlm, dims)
    above, times = _positive("threshold", threshold), _positive("alpha", alpha)
    own = [layer for layer in chosen if layer in own_layers(vlm)]
    state = states(massive, first)
    read: dict[Any, Any] = {Site("resid_pre", layer): state for layer in chosen}
    read |= {Site("pattern", layer): lazy(column_mass) for layer in own}
    before = [] if massive else [_first(vlm, prompt, first, massive)]
    *looked, run = vlm.runs([*before, {"prompt": prompt, "read": read, "value": unsaid}])
    massive = looked[0].reduced if looked else massive
    seen = np.stack([numbers(run[Site("resid_pre", layer)][0]) for layer in chosen])  # layer position 2
    columns = np.full((len(chosen), vlm.shape.heads["text"], len(prompt)), np.nan)
    for layer in own:
        columns[chosen.index(layer)] = numbers(run[Site("pattern", layer)][0])
    about = record(
        vlm,
        [prompt],
        threshold=above,
        alpha=times,
        dims=", ".join(map(str, massive)),
        first=f"position {first}, " + ("the bos token" if prompt.bos else "since the prompt has no bos token"),
        mass_threshold=times / len(prompt),
        **_note(vlm, chosen, above),
    )
    return _dataset(prompt, chosen, seen, columns, about)


def sink_positions(found: xr.Dataset, rule: str = "activation") -> list[int]:
    """The positions that are sinks in any layer.

    Args:
        found: what `sinks` returns.
        rule: "activation", "mass", "either" or "both" (in the same layer).

    Raises:
        ValueError: for another rule, or a dataset that `sinks` did not make.

    Example:
        >>> mv.attention_profile(vlm, real, without=lambda prompt: mv.sink_positions(mv.sinks(vlm, prompt)))
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; choose {', '.join(map(repr, RULES))}.")
    if not {"sink_by_activation", "sink_by_mass"} <= set(found.data_vars):
        raise ValueError(
            f"sinks are a dataset with sink_by_activation and sink_by_mass, and this one has "
            f"{', '.join(map(str, found.data_vars)) or 'nothing'}; make it with mv.sinks(vlm, prompt)."
        )
    one, other = found.sink_by_activation, found.sink_by_mass
    which = {"activation": one, "mass": other, "either": one | other, "both": one & other}[rule]
    return found.position.values[which.any("layer").values].tolist()


def states(dims: Sequence[int], first: int) -> Callable[[Tensor], Tensor]:
    """A reading of a residual stream: `phi` and the cosine to the first token's state, `batch pos 2`.

    Example:
        >>> vlm.run(real, read={"text.3.resid_pre": states([0, 1], 0)})["text.3.resid_pre"].shape
        torch.Size([1, 49, 2])
    """

    def read(h: Tensor) -> Tensor:
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        rms = wide.pow(2).mean(-1).sqrt().clamp_min(torch.finfo(wide.dtype).tiny)
        phi = wide[..., list(dims)].abs().amax(-1) / rms
        return torch.stack([phi, torch.cosine_similarity(wide, wide[:, first : first + 1], dim=-1)], -1)

    return read


def column_mass(attention: Attention) -> Float[Tensor, "batch head key"]:
    """What is paid to each key, averaged over the queries that see it.

    Not a number where none does.

    Example:
        >>> run = vlm.run(real, read={"text.3.pattern": mv.lazy()})
        >>> column_mass(run["text.3.pattern"]).shape
        torch.Size([1, 8, 49])

    Source:
        Yu et al. (2024), "Unveiling and Harnessing Hidden Attention Sinks" (ACT).
    """
    every = attention.q.new_ones(attention.q.shape[:3])
    seen_by = attention.sight().drawn(every[:1, :1], of=lambda piece: (piece.scores > -torch.inf).float())
    return attention.drawn(every) / seen_by


def labels(lifetime: np.ndarray, massive: np.ndarray, layers: int) -> np.ndarray:
    """Which positions are primary and which secondary sinks.

    Args:
        lifetime: in how many of the layers a position is like the first token.
        massive: whether it is a sink by activation in any of them.

    Example:
        >>> labels(np.array([32, 17, 16, 4, 3]), np.array([True] * 5), 32).tolist()
        ['primary', 'primary', 'secondary', 'secondary', 'none']
    """
    kind = np.where(lifetime >= PRIMARY * layers, "primary", np.where(lifetime >= SECONDARY * layers, "secondary", ""))
    return np.where(massive & (kind != ""), kind, "none")


def _dataset(
    prompt: Prompt, layers: Sequence[int], seen: np.ndarray, columns: np.ndarray, about: dict[str, Any]
) -> xr.Dataset:
    """What was read, judged."""
    phi, cosine = seen[..., 0], seen[..., 1]
    late = np.array(layers)[:, None] >= FIRST_LAYER
    massive = (phi > about["threshold"]) & late
    paid = (columns.mean(1) > about["mass_threshold"]) & late & (np.arange(len(prompt)) > 0)
    lifetime = (np.abs(cosine) > ALIKE).sum(0)
    by_layer = ("layer", "position")
    return xr.Dataset(
        {
            "phi": (by_layer, phi, {"long_name": "massive activation", "units": "rms"}),
            "cosine": (by_layer, cosine, {"long_name": "cosine to the first token's state"}),
            "column_mass": (("layer", "head", "position"), columns, {"long_name": "column mass", "units": "fraction"}),
            "sink_by_activation": (by_layer, massive, {"long_name": "phi above the threshold"}),
            "sink_by_mass": (by_layer, paid, {"long_name": "heads' mean column mass above alpha / positions"}),
            "lifetime": ("position", lifetime, {"long_name": f"lifetime of |cosine| > {ALIKE}", "units": "layers"}),
            "label": ("position", labels(lifetime, massive.any(0), len(layers))),
        },
        coords={"layer": list(layers), "head": np.arange(columns.shape[1]), **_places(prompt)},
        attrs=about,
    )


def _note(vlm: VLM, layers: Sequence[int], threshold: float) -> dict[str, Any]:
    """What must be known to read the result: a threshold that no state reaches, and layers without column masses."""
    width = vlm.shape.d_model["text"]
    across = [layer for layer in cross_layers(vlm) if layer in layers]
    said = [f"{named(across)}: attention to the picture's keys alone"] if across else []
    if threshold >= width**0.5:
        said.append(
            f"no state reaches the threshold of {threshold:g}, since phi is at most {width**0.5:.1f} in a model of "
            f"width {width}: take a smaller one"
        )
    return {"note": "; ".join(said)} if said else {}


def _places(prompt: Prompt) -> dict[str, Any]:
    """For every position its token, its span, and the image, tile, row and column it belongs to."""
    span = {position: name for name, positions in prompt.spans.items() for position in positions}
    cells: dict[int, tuple[int, ...]] = {}
    for count, image in enumerate(prompt.images):
        if image.of == "tokens":
            held = (*image.positions, *image.separators)
            cells |= {position: (count, *(image.cell(position) or NOWHERE)) for position in held}
    places = np.array([cells.get(position, (-1, *NOWHERE)) for position in range(len(prompt))], dtype=int)
    along = {name: ("position", places[:, at]) for at, name in enumerate(("image", "tile", "row", "column"))}
    named_by = {"token": prompt.tokens, "span": [span[position] for position in range(len(prompt))]}
    texts = {name: ("position", np.array(values, dtype=str)) for name, values in named_by.items()}
    return {"position": np.arange(len(prompt)), **texts, **along}


def _dims(vlm: VLM, dims: Sequence[int] | None) -> list[int]:
    """Dimensions as they were given; none where they are to be found."""
    width = vlm.shape.d_model["text"]
    if dims is not None:
        given = list(whole_numbers("dims", dims))
        wrong = [dim for dim in given if not 0 <= dim < width]
        if wrong or not given:
            what = f"dimension {wrong[0]}" if wrong else "an empty list"
            raise ValueError(f"dims holds {what}; the residual stream has dimensions 0 to {width - 1}.")
        return given
    return []


def _first(vlm: VLM, prompt: Prompt, first: int, massive: list[int]) -> dict[str, Any]:
    """A run that finds the two dimensions in which the first token's state is massive.

    Args:
        massive: where they are put, for the run after it, wherever both run.
    """
    count = vlm.shape.layers["text"]
    sites = [Site("resid_pre", layer) for layer in range(count // 4, max(count - count // 4, 1))]

    def look(read: dict, _gradients: dict) -> list[int]:
        found = np.stack([numbers(state[0]) for state in read.values()])
        rms = np.sqrt((found**2).mean(-1, keepdims=True))
        large = (np.abs(found) / np.where(rms > 0, rms, 1.0)).mean(0)
        massive.extend(np.argsort(-large, kind="stable")[:2].tolist())
        return massive

    return {"prompt": prompt, "read": dict.fromkeys(sites, lambda h: h[:, first]), "reduce": look, "value": unsaid}


def _positive(name: str, value: Any) -> float:
    """A number above zero."""
    given = number(name, value)
    if not given > 0:
        raise ValueError(
            f"{name}={told(value)} is not above zero, so every position would be a sink; give a higher one."
        )
    return given
