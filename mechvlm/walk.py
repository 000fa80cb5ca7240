"""Visit a traced model's sites in forward order.

A forward pass meets activations in a fixed order, and code inside an nnsight trace must ask for them in that order.
`walk` is the one place that knows it: it goes through the model once and offers every wanted site to one callback,
`touch(site, tensor) -> tensor`. Users list reads and edits in any order and never meet an out-of-order error.

Rules this module guards:

* Only wanted sites are asked for, and only what the callback changed (`is not`) is written back. A mere reading leaves
  the fused kernel's result as it was, bit for bit.
* Everything about attention goes through the call that every Hugging Face attention module makes with
  (q, k, v, mask), which is there under every attention implementation.
* What runs inside a trace is plain functions over tensors, tuples and dicts: such code can be shipped by source.

A site travels as the tuple (kind, layer, tower).
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mechvlm.archs import Arch, Stack

Touch = Callable[[tuple, Tensor], Tensor]
Attend = Callable[[tuple, Any, set[str]], None]
Wanted = Mapping[tuple, set[str]]


def at(model: Any, path: str) -> Any:
    """The part of a model, or of the nnsight model around it, that a path of `ARCHS` names."""
    return operator.attrgetter(path)(model)


def walk(model: Any, arch: Arch, wanted: Wanted, touch: Touch, attend: Attend, pictures: bool = True) -> None:
    """Go through one forward pass and offer each wanted site to `touch`, and each layer's attention to `attend`.

    Args:
        model: the nnsight model, inside a trace.
        wanted: the kinds wanted of each (tower, layer), and of (tower, None) for those without a layer.
        touch: given a site and its tensor, returns the tensor to go on with.
        attend: given a layer's (tower, layer), its attention call and the kinds wanted; see `mechvlm.seam`.
        pictures: whether this pass sees the images; the steps of a generation do not.
    """
    if "embed" in wanted.get(("text", None), ()):
        part = at(model, arch.text.embed)
        _offer(part, ("embed", None, "text"), touch)
    if pictures:
        if "embed" in wanted.get(("vision", None), ()):
            _offer(at(model, arch.vision.embed), ("embed", None, "vision"), touch)
        _walk_tower(model, arch.vision, "vision", wanted, touch, attend)
        if "image_features" in wanted.get(("text", None), ()):
            _offer(at(model, arch.image_features), ("image_features", None, "text"), touch)
    _walk_tower(model, arch.text, "text", wanted, touch, attend)
    if "logits" in wanted.get(("text", None), ()):
        _offer(at(model, arch.unembed), ("logits", None, "text"), touch)


def _offer(part: Any, site: tuple, touch: Touch) -> None:
    old = part.output
    new = touch(site, old)
    if new is not old:
        part.output = new


def _walk_tower(model: Any, stack: Stack, tower: str, wanted: Wanted, touch: Touch, attend: Attend) -> None:
    layers = at(model, stack.layers)
    for index in sorted(layer for name, layer in wanted if name == tower and layer is not None):
        walk_layer(layers[index], stack, tower, index, wanted[(tower, index)], touch, attend)


def walk_layer(layer: Any, stack: Stack, tower: str, index: int, kinds: set[str], touch: Touch, attend: Attend) -> None:
    """Offer the wanted sites of one layer, top to bottom in forward order."""
    if "resid_pre" in kinds:
        old = layer.input
        new = touch(("resid_pre", index, tower), old)
        if new is not old:
            layer.input = new

    attention = at(layer, stack.attention)
    if kinds & {"q", "k", "v", "scores", "pattern", "z"}:
        attend((tower, index), at(attention.source, stack.interface), kinds)

    if "attn_out" in kinds:
        old = attention.output
        new = touch(("attn_out", index, tower), old[0])
        if new is not old[0]:
            attention.output = (new, *old[1:])

    mid: Any = None
    if "resid_mid" in kinds:
        norm = at(layer, stack.mid_norm)
        old = norm.input
        new = touch(("resid_mid", index, tower), old)
        if new is not old:
            norm.input = mid = new

    added: Any = None
    if "mlp_out" in kinds or mid is not None:
        mlp = at(layer, stack.mlp)
        old = added = mlp.output
        if "mlp_out" in kinds:
            added = touch(("mlp_out", index, tower), old)
            if added is not old:
                mlp.output = added

    if mid is not None or "resid_post" in kinds:
        # The layer adds the MLP to the residual stream it had before an edit of resid_mid; add it to the edited one.
        old = layer.output if mid is None else mid + added
        new = touch(("resid_post", index, tower), old) if "resid_post" in kinds else old
        if new is not old or mid is not None:
            layer.output = new
