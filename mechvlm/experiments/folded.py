"""The matrices of a layer's heads with the norms before and behind them folded in, read where the model runs.

A head reads the residual stream through a norm. What that does but for its scale, which every stream has its own of, is
linear: it may take the mean away, and multiplies each dimension by a gain. Both go into the matrices, so that circuits
of two layers are between one stream and another.

Rule this module guards: no matrix of the stream's width by its width is made. A circuit stays two factors.

>>> from mechvlm.writes import writing
>>> factors(vlm, writing(vlm), 3)["o"].shape
torch.Size([8, 24, 128])
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.experiments.logit_parts import matrix_at, norm_at, norm_behind, through, wide
from mechvlm.walk import at
from mechvlm.weights import NORMS, names_of
from mechvlm.writes import Writing


def factors(reader: Any, how: Writing, layer: int) -> dict[str, Tensor]:
    """A layer's matrices, norms folded in.

    Args:
        reader: the VLM, or what stands for it where the model runs.
        layer: one whose words attend to each other.

    Returns:
        `q`, `head d_model d_head`, `k` and `v`, `kv_head d_model d_head`, and `o`, `head d_head d_model`; in single
        precision at least. Biases and scales are left out.
    """
    block, (path, number) = reader.arch.text.blocks[layer], reader.arch.text.layers[layer]
    module = at(reader.model, path)[number]
    enters, attention = norm_at(reader, at(module, str(block.pre))), at(module, block.attention)
    names = names_of(attention._module)
    found: dict[str, Tensor] = {}
    for name, part, count in zip("qkv", names, heads_of(reader), strict=False):
        rows = through(enters, matrix_at(reader, f"{path}.{number}.{block.attention}.{part}"))
        found[name] = rows.unflatten(0, (count, -1)).transpose(1, 2)
    there = dict(attention._module.named_children())
    for name, norm in zip("qk", NORMS, strict=True):
        if norm in there:
            gain = gain_of(at(attention, norm)).to(found[name])
            # Some norm each head by itself, with one gain for all; others all heads together.
            found[name] = found[name] * gain.unflatten(0, (-1, 1, found[name].shape[-1]))
    found["o"] = written(reader, layer, matrix_at(reader, how.out[layer]).T).unflatten(0, (how.heads, -1))
    return found


def heads_of(reader: Any) -> tuple[int, int, int]:
    """How many heads queries, keys and values have."""
    shape = reader.shape
    return shape.heads["text"], shape.kv_heads["text"], shape.kv_heads["text"]


def gain_of(norm: Any) -> Float[Tensor, " width"]:
    """By what a norm of queries or keys multiplies, found by asking it."""
    weight = next(norm._module.parameters())
    signs = torch.ones(1, weight.numel(), device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    signs[:, 1::2] = -1  # whose mean is zero
    with torch.no_grad():
        found: Tensor = (norm(1e4 * signs) * signs)[0]
    return found


def written(reader: Any, layer: int, made: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
    """What a layer's attention puts out as what it adds to the residual stream, but for the scale of a norm between."""
    norm = norm_behind(reader, layer)
    if norm is not None:
        return norm.centred(made.to(norm.gain)) * norm.gain
    block, (path, number) = reader.arch.text.blocks[layer], reader.arch.text.layers[layer]
    module = at(reader.model, path)[number]
    return made * wide(block.attn_scale(module).detach()).to(made) if block.attn_scale else made
