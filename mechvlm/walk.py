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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.shapes import Parts, Stack
from mechvlm.sites import CROSS_KINDS, RAW_KINDS, SELF_KINDS
from mechvlm.towers import Block

Touch = Callable[[tuple, Tensor], Tensor]
Attend = Callable[[tuple, Any, Block, set[str]], None]
Wanted = Mapping[tuple, set[str]]


def at(model: Any, path: str) -> Any:
    """The part of a model, or of the nnsight model around it, that a path of `ARCHS` names."""
    return operator.attrgetter(path)(model)


def walk(model: Any, parts: Parts, wanted: Wanted, touch: Touch, attend: Attend, pictures: bool = True) -> None:
    """Go through one forward pass and offer each wanted site to `touch`, and each layer's attention to `attend`.

    Args:
        model: the nnsight model, inside a trace.
        wanted: the kinds wanted of each (tower, layer), and of (tower, None) for those without a layer.
        touch: given a site and its tensor, returns the tensor to go on with.
        attend: given a layer's (tower, layer), its attention module, its parts and the kinds wanted; see
            `mechvlm.seam`.
        pictures: whether this pass sees the images; the steps of a generation do not.
    """
    whole = wanted.get(("text", None), set())
    if pictures and "pixels" in wanted.get(("vision", None), ()):
        _offer_pixels(model, parts.row.pixels, touch)
    if "embed" in whole and parts.row.words_first:
        _offer_output(at(model, str(parts.text.embed)), ("embed", None, "text"), touch)
    if pictures:
        _walk_pictures(model, parts, wanted, touch, attend)
    if "embed" in whole and not parts.row.words_first:
        _offer_output(at(model, str(parts.text.embed)), ("embed", None, "text"), touch)
    _walk_tower(model, parts, "text", wanted, touch, attend)
    if "logits" in whole:
        _offer_output(at(model, parts.unembed), ("logits", None, "text"), touch)


def _walk_pictures(model: Any, parts: Parts, wanted: Wanted, touch: Touch, attend: Attend) -> None:
    if "embed" in wanted.get(("vision", None), ()):
        _offer_output(at(model, str(parts.vision.embed)), ("embed", None, "vision"), touch, parts.vision.flat)
    _walk_tower(model, parts, "vision", wanted, touch, attend)
    if "qformer" in parts.stacks:
        _walk_tower(model, parts, "qformer", wanted, touch, attend)
    if "image_features" in wanted.get(("text", None), ()):
        _offer_features(at(model, parts.row.image_features), ("image_features", None, "text"), touch)


def _offer_pixels(model: Any, path: str, touch: Touch) -> None:
    """Offer the pixels that the model is called with, or the module at a path, whose first input they are."""
    part = at(model, path) if path else model
    given, named = part.inputs
    old = part.input if path else named["pixel_values"]
    new = touch(("pixels", None, "vision"), old)
    if new is not old and path:
        part.input = new
    elif new is not old:
        part.inputs = (given, {**named, "pixel_values": new})


def _offer_output(part: Any, site: tuple, touch: Touch, flat: bool = False) -> None:
    old = part.output
    new = offered(touch, site, old, (1, *old.shape) if flat else None)
    if new is not old:
        part.output = new


def offered(touch: Touch, site: tuple, old: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """What the model goes on with: the very same tensor where nothing changed.

    Args:
        shape: in which the site's tensor is shown, where the model's own is another.
    """
    if shape is None or tuple(shape) == tuple(old.shape):
        return touch(site, old)
    shown = old.reshape(shape)
    new = touch(site, shown)
    # In the graph of gradients it is what was shown that the model has to go on with.
    return old if new is shown and not new.requires_grad else new.reshape(old.shape)


def _offer_features(part: Any, site: tuple, touch: Touch) -> None:
    """Offer the image features as one sequence `all tokens, d_model`, whatever holds them, and put back what is new."""
    whole = part.output
    held = whole if isinstance(whole, Tensor) else whole.pooler_output
    pieces = [held] if isinstance(held, Tensor) else list(held)
    lengths = [piece.numel() // piece.shape[-1] for piece in pieces]
    old = torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])
    new = touch(site, old)
    if new is old and not new.requires_grad:
        return
    times = new.shape[0] // old.shape[0]  # more than once where rows of the batch share the images
    if isinstance(held, Tensor):
        made: Any = new.reshape(-1, *held.shape[1:])
    else:
        parts = new.split(lengths * times)
        made = type(held)(part.reshape(piece.shape) for part, piece in zip(parts, pieces * times, strict=True))
    if isinstance(whole, Tensor):
        part.output = made
    else:
        whole.pooler_output = made
        part.output = whole


def _walk_tower(model: Any, parts: Parts, tower: str, wanted: Wanted, touch: Touch, attend: Attend) -> None:
    stack = parts.stacks[tower]
    for index in range(len(stack.layers)):
        kinds = wanted.get((tower, index), set()) - {"deepstack"}
        if kinds:
            path, number = stack.layers[index]
            walk_layer(at(model, path)[number], stack, (tower, index), kinds, touch, attend)
        if tower == "vision" and index in parts.deepstack:
            tap = parts.deepstack.index(index)
            if "deepstack" in wanted.get(("text", tap), ()):
                _offer_features(at(model, str(parts.row.deepstack))[tap], ("deepstack", tap, "text"), touch)


def walk_layer(layer: Any, stack: Stack, place: tuple, kinds: set[str], touch: Touch, attend: Attend) -> None:
    """Offer the wanted sites of one layer, top to bottom in forward order.

    Args:
        place: (tower, layer).
        kinds: what is wanted of it.
    """
    (tower, index), block = place, stack.blocks[place[1]]
    stream = pre = layer.input
    shape = (1, *stream.shape) if stack.flat else tuple(stream.shape)
    if "resid_pre" in kinds:
        pre = offered(touch, ("resid_pre", index, tower), stream, shape)
        if pre is not stream:
            layer.input = pre
    scales = {
        "attn_out": block.attn_scale and "attn_out" in kinds and block.attn_scale(layer),
        "mlp_out": block.mlp_scale and kinds & {"attn_out", "resid_mid", "mlp_out"} and block.mlp_scale(layer),
    }
    own = kinds & {*SELF_KINDS, *RAW_KINDS}
    if block.attention and own:
        attend(place, at(layer, block.attention), block, own)
    if block.cross and kinds & set(CROSS_KINDS):
        attend(place, at(layer, block.cross), block, kinds & set(CROSS_KINDS))
    mid: Tensor | None = None
    if "attn_out" in kinds:
        part = at(layer, block.attn_out or block.attention or str(block.cross))
        added = _added(part, ("attn_out", index, tower), touch, shape, scales["attn_out"])
        # What enters may still be on the device of the layer before.
        mid = None if added is None else pre.to(added.device) + added.reshape(pre.shape)
    _walk_rest(layer, block, place, kinds, touch, shape, scales["mlp_out"], mid)


def _added(part: Any, site: tuple, touch: Touch, shape: Sequence[int], scale: Any) -> Tensor | None:
    """Offer what attention or MLP adds; what is to be added instead where that cannot be written into the part."""
    whole = part.output
    old = whole[0] if isinstance(whole, tuple) else whole
    if scale is None or scale is False:
        new = offered(touch, site, old, shape)
        if new is not old:
            part.output = (new, *whole[1:]) if isinstance(whole, tuple) else new
        return None
    # What multiplies it may be zero, so it is not the part's output that is changed, but the sum.
    scaled = (old * scale).reshape(shape)
    new = touch(site, scaled)
    return None if new is scaled and not new.requires_grad else new


def _walk_rest(
    layer: Any,
    block: Block,
    place: tuple,
    kinds: set[str],
    touch: Touch,
    shape: Sequence[int],
    scale: Any,
    mid: Tensor | None,
) -> None:
    """The second half of a layer: the stream between, the MLP, and what leaves.

    Args:
        mid: the residual stream between attention and MLP, where it is to be another than the layer's own.
    """
    tower, index = place
    scaled = scale is not None and scale is not False
    stream = mid
    if "resid_mid" in kinds or mid is not None or (scaled and "mlp_out" in kinds):
        norm = at(layer, str(block.mid))
        old = norm.input
        stream = old if mid is None else mid.reshape(old.shape)
        if "resid_mid" in kinds:
            stream = offered(touch, ("resid_mid", index, tower), stream, shape)
        if stream is not old:
            norm.input = mid = stream
    added: Any = None
    if "mlp_out" in kinds or mid is not None:
        part = at(layer, block.mlp_out or block.mlp)
        if "mlp_out" in kinds:
            added = _added(part, ("mlp_out", index, tower), touch, shape, scale)
            if added is not None:
                mid = stream
        if mid is not None and added is None:
            added = part.output * scale if scaled else part.output
    if mid is not None or "resid_post" in kinds:
        # The layer adds the MLP to the residual stream it had before an edit of resid_mid; add it to the edited one.
        whole = layer.output
        own = whole[0] if isinstance(whole, tuple) else whole
        old = own if mid is None else (mid + added.reshape(mid.shape)).reshape(own.shape)
        new = offered(touch, ("resid_post", index, tower), old, shape) if "resid_post" in kinds else old
        if new is not own:
            layer.output = (new, *whole[1:]) if isinstance(whole, tuple) else new
