"""What each part of a language model adds to the residual stream, one part at a time.

Rule this module guards: the parts sum to the stream. Where a norm, a gate or a factor stands behind attention, what a
head adds is what that leaves of it, with the norm's scale as it was in that run; what no part writes (the biases of the
attention's outputs, and what rounding behind such a norm leaves) is a part of its own, "bias".

>>> run = vlm.run(real, read=[*write_sites(vlm), "text.7.resid_post"])
>>> from mechvlm.plan import key_of
>>> read = {key_of(site): run[site] for site in run.values}
>>> parts = written(vlm.model, writing(vlm), read, real.image)
>>> torch.allclose(sum(parts.values()), run["text.7.resid_post"][0], atol=1e-4)
True
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.devices import held, matrix_of
from mechvlm.shapes import Stack
from mechvlm.sites import Site
from mechvlm.walk import at
from mechvlm.weights import names_of

SUMS = ("resid_pre", "attn_out", "resid_mid", "resid_post")
"""Sites of what several parts write together, an edit of which is no part's."""


@dataclass(frozen=True)
class Writing:
    """How the layers of a language model write, as plain values that can be sent to where it runs.

    Attributes:
        heads: of each layer.
        out: for each layer the path of the matrix behind its heads.
        kinds: for each layer "z", or "cross_z" where it attends to the picture's features.
        behind: for each layer whether a norm, a gate or a factor stands behind that matrix.
        norms: for each layer the path of the norm; empty where there is none.
        added: the layers behind which deep-stack adds features to the image tokens.
    """

    heads: int
    out: tuple[str, ...]
    kinds: tuple[str, ...]
    behind: tuple[bool, ...]
    norms: tuple[str, ...]
    added: tuple[int, ...]


def writing(vlm: Any) -> Writing:
    """How the layers of a model's language model write.

    Example:
        >>> writing(vlm).kinds[:2], writing(vlm).behind[:2]
        (('z', 'z'), (False, False))
    """
    stack: Stack = vlm.arch.stacks["text"]
    out, kinds, norms = [], [], []
    for (where, index), block in zip(stack.layers, stack.blocks, strict=True):
        path = f"{where}.{index}.{block.attention or block.cross}"
        out.append(f"{path}.{names_of(at(vlm.hf, path))[-1]}")
        kinds.append("z" if block.attention else "cross_z")
        norms.append(f"{where}.{index}.{block.attn_out}" if block.attn_out else "")
    behind = tuple(block.attn_out is not None or block.attn_scale is not None for block in stack.blocks)
    added = tuple(layer for layer, those in enumerate(vlm.shape.kinds["text"]) if "deepstack" in those)
    return Writing(vlm.shape.heads["text"], tuple(out), tuple(kinds), behind, tuple(norms), added)


def write_sites(vlm: Any, pictures: bool = True) -> list[Site]:
    """What has to be read of a run to know what each part wrote in it.

    Args:
        pictures: whether the prompt has any, for what deep-stack adds.

    Example:
        >>> [str(site) for site in write_sites(vlm)[:3]]
        ['text.0.resid_pre', 'text.0.z', 'text.0.mlp_out']
    """
    how, found = writing(vlm), [Site("resid_pre", 0)]
    for layer, kind in enumerate(how.kinds):
        found += [Site(kind, layer), *([Site("attn_out", layer)] if how.behind[layer] else []), Site("mlp_out", layer)]
        found += [Site("deepstack", layer)] if layer in how.added and pictures else []
    return found


def written(
    model: Any, how: Writing, read: Mapping[tuple, Tensor], image: Sequence[int], row: int = 0
) -> dict[str, Float[Tensor, "pos d_model"]]:
    """What each part added to the residual stream in a run, at each position.

    Args:
        model: the nnsight model, where it runs.
        read: what was read of `write_sites`, by site as a tuple.
        image: positions of the image tokens.
        row: of the batch.

    Returns:
        By the names of `mechvlm.nodes.writers`, in forward order, and "bias".
    """
    first = read["resid_pre", 0, "text"][row]
    found = {"embed": first.clone(), "image": torch.zeros_like(first), "bias": torch.zeros_like(first)}
    found["image"][image], found["embed"][image] = first[image], 0
    for layer, kind in enumerate(how.kinds):
        out = read["attn_out", layer, "text"][row] if how.behind[layer] else None
        parts, bias = head_writes(model, how, layer, read[kind, layer, "text"][row], out)
        found |= {f"a{layer}.h{head}": part.to(first) for head, part in enumerate(parts.unbind(1))}
        found["bias"] += bias.to(first)
        found[f"m{layer}"] = read["mlp_out", layer, "text"][row].to(first)
        if layer in how.added:
            found[f"d{layer}"] = torch.zeros_like(first)
            if ("deepstack", layer, "text") in read:
                found[f"d{layer}"][image] = read["deepstack", layer, "text"].flatten(0, 1).to(first)
    return found


def head_writes(
    model: Any, how: Writing, layer: int, z: Float[Tensor, "pos head d_head"], out: Tensor | None = None
) -> tuple[Float[Tensor, "pos head d_model"], Float[Tensor, "*pos d_model"]]:
    """What each head of a layer adds to the residual stream, and what of the sum no head does.

    A norm, with its scale as it was, multiplies each number by one that all heads share. That is asked of the norm. It
    is not found by dividing what left the norm by what entered it, which are next to nothing where heads cancel, so
    that the quotient is made of rounding.

    Args:
        model: the nnsight model, where it runs.
        out: `attn_out`, `pos d_model`, where something stands behind the heads' matrix.
    """
    path = how.out[layer]
    matrix = matrix_of(model._module, path).to(z).T.unflatten(0, (how.heads, -1))
    parts = torch.einsum("phd,hdm->phm", z, matrix)
    own = at(model, path)._module.bias
    bias = parts[0, 0] * 0 if own is None else held(model._module, f"{path}.bias").to(z)
    if out is None:
        return parts, bias
    whole = parts.sum(1) + bias
    norm = how.norms[layer]
    factor = gains(at(model, norm), whole) if norm else multiple(whole, out.to(whole))
    parts = parts * factor.to(parts).unsqueeze(-2)
    return parts, out.to(parts) - parts.sum(1)


def gains(norm: Any, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
    """What a norm that takes no mean away multiplies each number of a vector by.

    It multiplies all vectors of one length alike, so it is asked with numbers that are all the same.

    Example:
        >>> gains(torch.nn.RMSNorm(2, eps=0.0), torch.tensor([[3.0, -3.0]]))
        tensor([[0.3333, 0.3333]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = wide.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    with torch.no_grad():
        found: Tensor = norm(length.expand(wide.shape)) / length
    return found


def multiple(x: Float[Tensor, "pos d_model"], out: Float[Tensor, "pos d_model"]) -> Float[Tensor, "1 1"]:
    """The number by which a gate or a factor multiplies everything; 0 where there is nothing.

    Example:
        >>> multiple(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, -1.0]]))
        tensor([[0.5000]])
    """
    one, other = (some.to(torch.promote_types(some.dtype, torch.float32)) for some in (x, out))
    square = one.square().sum()
    return torch.where(square > 0, (one * other).sum() / square, torch.zeros_like(square)).reshape(1, 1)
