"""The parts of a logit as named arrays: by component, by layer and head, by span, by image token.

Rule this module guards: every number of a table is one that the model's run gave, and tables of several prompts hold 0
where a prompt has no such part, since it then adds nothing.

>>> taken = taken_of({"enters": 1.0, "heads": np.ones((1, 2)), "mlps": np.zeros(1), "bias": 0.5, "deepstack": {},
...     "keys": {}, "norm_bias": 0.0, "unembed_bias": 0.0, "spellings": 0.0, "stream": 3.5, "logit": 3.5}, 3.5)
>>> joined([taken]).contribution[0].to_series().to_dict()
{'embed': 1.0, 'a0.h0': 1.0, 'a0.h1': 1.0, 'm0': 0.0, 'bias': 0.5, 'norm.bias': 0.0, 'unembed.bias': 0.0}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from mechvlm.experiments.sight import image_coordinates, image_dim
from mechvlm.experiments.sweep import numbers
from mechvlm.nodes import Node
from mechvlm.prompt import Prompt, laid

ELSEWHERE, KEYS = "elsewhere", "image keys"
"""The spans of positions that no other holds, and of what cross-attention looks at."""


@dataclass(frozen=True)
class Taken:
    """One prompt's logit, taken apart.

    Attributes:
        parts: by the names of `mechvlm.nodes`, and biases, spellings and edits.
        heads, mlps: the same, `layer head` and `layer`.
        keys: of layers that ran, what each head took from each key, `head key`.
        across: the layers whose keys are the picture's.
        metric, logit: the model's own number, and the same before any cap.
    """

    parts: dict[str, float]
    heads: Float[np.ndarray, "layer head"]
    mlps: Float[np.ndarray, " layer"]
    keys: dict[int, np.ndarray]
    across: tuple[int, ...]
    metric: float
    logit: float


def taken_of(
    found: Mapping[str, Any],
    metric: float,
    several: bool = False,
    edited: bool = False,
    image: bool = False,
    across: Sequence[int] = (),
) -> Taken:
    """What `parts_of` found, by the names of nodes.

    Args:
        several: whether a word has several spellings.
        edited: whether the model has edits.
        image: whether an image token answers.
        across: the layers whose keys are the picture's.
    """
    heads, mlps = _array(found["heads"]), _array(found["mlps"])
    parts = {"image" if image else "embed": float(found["enters"])}
    for layer in range(len(mlps)):
        parts |= {f"a{layer}.h{head}": float(value) for head, value in enumerate(heads[layer])}
        parts[f"m{layer}"] = float(mlps[layer])
        if layer in found["deepstack"]:
            parts[f"d{layer}"] = float(found["deepstack"][layer])
    parts["bias"] = float(found["bias"])
    if edited:
        parts["edits"] = float(found["stream"]) - sum(parts.values())
    parts |= {"norm.bias": float(found["norm_bias"]), "unembed.bias": float(found["unembed_bias"])}
    if several:
        parts["spellings"] = float(found["spellings"])
    keys = {layer: _array(values) for layer, values in found["keys"].items()}
    return Taken(parts, heads, mlps, keys, tuple(across), metric, float(found["logit"]))


def components(taken: Taken) -> xr.Dataset:
    """All parts of one logit, and those by layer and head."""
    return xr.Dataset(
        {
            "contribution": ("component", list(taken.parts.values())),
            "heads": (("layer", "head"), taken.heads),
            "mlps": ("layer", taken.mlps),
            "metric": taken.metric,
            "logit": taken.logit,
            "remainder": taken.logit - sum(taken.parts.values()),
        },
        coords={
            "component": list(taken.parts),
            "layer": np.arange(len(taken.mlps)),
            "head": np.arange(taken.heads.shape[1]),
        },
    )


def joined(taken: Sequence[Taken]) -> xr.Dataset:
    """Those of several prompts; a part that one of them lacks adds 0."""
    names = list(dict.fromkeys(sorted((name for one in taken for name in one.parts), key=_order)))
    full = [components(one).reindex(component=names, fill_value=0.0) for one in taken]
    found = xr.concat(full, "prompt")
    return found.assign_coords(_kinds(names))


def _order(name: str) -> tuple[int, ...]:
    """Where a part stands among others, in forward order."""
    if name in LAST:
        return (2, LAST.index(name))
    node = Node.parse(name)
    if node.layer is None:
        return (0, ("embed", "image").index(name))
    return (1, node.layer, ("attention", "mlp", "deepstack").index(node.kind), node.head or 0)


LAST = ("bias", "edits", "norm.bias", "unembed.bias", "spellings")
"""What no node writes, in the order in which it is told."""


def _kinds(names: Sequence[str]) -> dict[str, Any]:
    """What each component is, and of which layer and head."""
    found = []
    for name in names:
        node = None if name in LAST else Node.parse(name)
        if node is None:
            found.append(("bias" if name.endswith("bias") else name, -1, -1))
        else:
            kind = "head" if node.kind == "attention" else node.kind
            found.append((kind, -1 if node.layer is None else node.layer, -1 if node.head is None else node.head))
    kinds, layers, heads = zip(*found, strict=True)
    return {
        "kind": ("component", np.array(kinds, dtype=str)),
        "of_layer": ("component", np.array(layers)),
        "of_head": ("component", np.array(heads)),
    }


def by_span(taken: Sequence[Taken], spans: Sequence[Mapping[str, Sequence[int]]]) -> xr.DataArray:
    """What heads take from the spans that they look at, over prompt, layer, head and span.

    Args:
        spans: of each prompt, which hold each of its positions once; `KEYS` stands for all keys of the picture.
    """
    names = list(dict.fromkeys(name for one in spans for name in one))
    table = np.zeros((len(taken), *taken[0].heads.shape, len(names)))
    for row, (one, named) in enumerate(zip(taken, spans, strict=True)):
        for layer, values in one.keys.items():
            own = {KEYS: range(values.shape[-1])} if layer in one.across else named
            for name, positions in own.items():
                table[row, layer, :, names.index(name)] = values[:, list(positions)].sum(-1)
    return xr.DataArray(table, dims=["prompt", "layer", "head", "span"], coords={"span": names})


def by_token(taken: Sequence[Taken], prompt: Prompt) -> xr.DataArray:
    """What heads take from each image token, over prompt, layer, head and position; or from each key of the picture.

    Args:
        prompt: one of the prompts, whose image tokens lie as the others' do.
    """
    dim, shown = image_dim(prompt), image_coordinates(prompt)
    layers = list(taken[0].across) if dim == "key" else [at for at in taken[0].keys if at not in taken[0].across]
    there = np.asarray(shown[dim])
    table = np.stack([[one.keys[layer][:, there] for layer in layers] for one in taken])
    coordinates: dict[str, Any] = {"layer": layers, **shown}
    return xr.DataArray(table, dims=["prompt", "layer", "head", dim], coords=coordinates)


def laid_out(prompt: Prompt) -> tuple[Any, ...]:
    """Which positions are of the image, and how each picture's tokens are laid out."""
    return tuple(prompt.image), tuple(laid(image) for image in prompt.images)


def _array(values: Any) -> np.ndarray:
    return numbers(values) if isinstance(values, torch.Tensor) else np.asarray(values, dtype=float)
