"""What each part of a language model reads from the residual stream, as gradients: of a metric at one reader's input.

A reader's input is the residual stream as that reader alone is given it. Moving it moves the metric by the gradient at
that input, to first order, while every other reader still sees the stream as it was.

Rule this module guards: no model's forward pass is written down again. The gradients of the projections' outputs are
autograd's, of the run itself, so that norms of queries and keys, rotary embedding and the kernel are the model's own.
From there each head's rows of the matrix and the norm before it, called by itself, lead back to the stream. What goes
through the MLP is what is left: the gradient before it less that behind it.

>>> inputs_of(vlm).norms[0]
'model.language_model.layers.0.input_layernorm'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.devices import matrix_of
from mechvlm.sites import RAW_KINDS, Site
from mechvlm.towers import PROJECTIONS
from mechvlm.walk import at


@dataclass(frozen=True)
class Inputs:
    """How the layers of a language model read the residual stream, as plain values that can be sent.

    Attributes:
        counts: heads of queries, of keys and of values in each layer.
        norms: for each layer the path of the norm before its attention.
        matrices: for each layer the paths of its projections to queries, keys and values; none where all heads read
            together, because the layer attends to the picture's features.
        middle: for each layer whether the MLP reads a stream of its own, behind attention.
    """

    counts: tuple[int, int, int]
    norms: tuple[str, ...]
    matrices: tuple[tuple[str, ...], ...]
    middle: tuple[bool, ...]


def inputs_of(vlm: Any) -> Inputs:
    """How the layers of a model's language model read.

    Example:
        >>> inputs_of(vlm).counts, inputs_of(vlm).middle[:2]
        ((8, 4, 4), (True, True))
    """
    stack, shape = vlm.arch.stacks["text"], vlm.shape
    paths = [f"{where}.{index}" for where, index in stack.layers]
    both = list(zip(paths, stack.blocks, strict=True))
    matrices = [
        tuple(f"{path}.{block.attention}.{name}" for name in PROJECTIONS) if block.attention else ()
        for path, block in both
    ]
    return Inputs(
        (shape.heads["text"], shape.kv_heads["text"], shape.kv_heads["text"]),
        tuple(f"{path}.{block.pre}" for path, block in both),
        tuple(matrices),
        tuple(block.mid is not None for block in stack.blocks),
    )


def stream_sites(vlm: Any) -> list[Site]:
    """The sites of the residual stream whose gradients, and values, `attention_gradients` and `mlp_gradient` take.

    Example:
        >>> [str(site) for site in stream_sites(vlm)[:3]]
        ['text.0.resid_pre', 'text.0.resid_mid', 'text.1.resid_pre']
    """
    found = []
    for layer, kinds in enumerate(vlm.shape.kinds["text"]):
        found += [Site(kind, layer) for kind in ("resid_pre", "resid_mid") if kind in kinds]
    return [*found, Site("resid_post", vlm.shape.layers["text"] - 1)]


def raw_sites(how: Inputs) -> list[tuple]:
    """What else has to be among a plan's readings: the projections' outputs, of which gradients alone are kept.

    Example:
        >>> raw_sites(inputs_of(vlm))[:2]
        [('raw_q', 0, 'text'), ('raw_k', 0, 'text')]
    """
    return [(kind, layer, "text") for layer, paths in enumerate(how.matrices) if paths for kind in RAW_KINDS]


def attention_gradients(
    model: Any,
    how: Inputs,
    layer: int,
    read: Mapping[tuple, Tensor],
    gradients: Mapping[tuple, Tensor],
    positions: Sequence[int] | slice,
) -> Float[Tensor, "reader pos d_model"]:
    """The gradient at the input of each reader of a layer's attention, in the order of `mechvlm.nodes.readers`.

    Args:
        model: the nnsight model, where it runs.
        read, gradients: of one prompt's run, by site as a tuple: `stream_sites`, and of the gradients `raw_sites`.
        positions: at which of them; a slice is not copied.
    """
    before = gradients["resid_pre", layer, "text"]
    if not how.matrices[layer]:
        return before[:, positions] - gradients["resid_mid", layer, "text"][:, positions].to(before)
    found = []
    for kind, path, count in zip(RAW_KINDS, how.matrices[layer], how.counts, strict=True):
        raw = gradients[kind, layer, "text"][0, positions].unflatten(-1, (count, -1))
        matrix = matrix_of(model._module, path).to(raw).unflatten(0, (count, -1))
        found.append(torch.einsum("phd,hdm->hpm", raw, matrix))
    stream = read["resid_pre", layer, "text"][0, positions]
    return back_through(at(model, how.norms[layer]), stream, torch.cat(found).to(stream))


def back_through(
    norm: Any, stream: Float[Tensor, "pos d_model"], gradients: Float[Tensor, "reader pos d_model"]
) -> Float[Tensor, "reader pos d_model"]:
    """Gradients behind a norm as those before it.

    Example:
        >>> back_through(torch.nn.Identity(), torch.ones(2, 3), torch.ones(1, 2, 3)).shape
        torch.Size([1, 2, 3])
    """
    with torch.enable_grad():
        own = stream.detach().clone().requires_grad_(True)
        return torch.autograd.grad(norm(own), own, gradients, is_grads_batched=True)[0]


def mlp_gradient(
    how: Inputs,
    layer: int,
    gradients: Mapping[tuple, Tensor],
    attention: Float[Tensor, "reader pos d_model"],
    positions: Sequence[int] | slice,
) -> Float[Tensor, "pos d_model"]:
    """The gradient at the input of a layer's MLP.

    Args:
        attention: what `attention_gradients` found; where the two read one stream, the MLP's part is what is left.
    """
    behind = gradients.get(("resid_pre", layer + 1, "text"))
    behind = gradients["resid_post", layer, "text"] if behind is None else behind
    before = gradients["resid_mid" if how.middle[layer] else "resid_pre", layer, "text"]
    found = before[0, positions] - behind[0, positions].to(before)
    return found if how.middle[layer] else found - attention.sum(0).to(found)
