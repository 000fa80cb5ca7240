"""A LLaVA forward pass in plain torch, with every activation offered to a function: what mechvlm is compared with.

Hooks on Hugging Face's modules and an attention written out here; nothing of mechvlm's engine, and one prompt at a
time, so that there is no padding, no batch and no cache to get wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama

Place = tuple[str, int | None, str]
"""Kind, layer and tower."""


class Plain:
    """A forward pass that is watched.

    Args:
        model: with eager attention.
        edits: (place, function, "value" or "grad"), in the order they act.
        gradients: keep the graph, so that gradients of what was seen can be taken.
    """

    def __init__(
        self, model: Any, edits: Sequence[tuple[Place, Callable[[Tensor], Tensor], str]] = (), gradients: bool = False
    ) -> None:
        self.model, self.edits, self.gradients = model, list(edits), gradients
        self.seen: dict[Place, Tensor] = {}

    def touch(self, place: Place, x: Tensor) -> Tensor:
        for where, function, on in self.edits:
            if where == place and on == "value":
                x = function(x.clone())
        if self.gradients and not x.requires_grad:
            x = x.detach().requires_grad_(True)
        if self.gradients and place[0] == "resid_pre":
            x = x.view_as(x)  # what enters a layer, and not what else the layer below may have given it to
        self.seen[place] = x
        for where, function, on in self.edits:
            if where == place and on == "grad" and x.requires_grad:
                x = x.clone()
                x.register_hook(lambda gradient, function=function: function(gradient.clone()))
                x = x.clone()  # so that no other site, such as the next layer's resid_pre, is the tensor with the hook
        return x

    def __call__(self, encoding: dict[str, Tensor]) -> Tensor:
        """The logits of every position."""
        kept = {name: x for name, x in encoding.items() if name in ("input_ids", "attention_mask", "pixel_values")}
        with self.watched(), torch.set_grad_enabled(self.gradients):
            return self.model(**kept, use_cache=False).logits

    def gradient(self, value: Tensor, place: Place) -> Tensor:
        found = torch.autograd.grad(value, self.seen[place], allow_unused=True, retain_graph=True)[0]
        return torch.zeros_like(self.seen[place]) if found is None else found

    @contextmanager
    def watched(self) -> Iterator[None]:
        inner, hooks, places = self.model.model, [], {}
        towers = {"text": inner.language_model, "vision": inner.vision_tower.encoder}
        for tower, stack in towers.items():
            for number, layer in enumerate(stack.layers):
                places[layer.self_attn] = (number, tower)
                hooks += self.layer_hooks(layer, number, tower)
        whole: list[tuple[Any, Place]] = [
            (inner.language_model.embed_tokens, ("embed", None, "text")),
            (inner.vision_tower.embeddings, ("embed", None, "vision")),
            (inner.multi_modal_projector, ("image_features", None, "text")),
            (self.model.lm_head, ("logits", None, "text")),
        ]
        for module, place in whole:
            hooks.append(module.register_forward_hook(lambda module, given, out, place=place: self.touch(place, out)))  # noqa: ARG005
        with pytest.MonkeyPatch.context() as patched:
            for library in (modeling_llama, modeling_clip):
                patched.setattr(library, "eager_attention_forward", self.attention_of(places))
            yield
        for hook in hooks:
            hook.remove()

    def layer_hooks(self, layer: Any, number: int, tower: str) -> list[Any]:
        held: dict[str, Tensor] = {}
        norm = layer.post_attention_layernorm if tower == "text" else layer.layer_norm2

        def before(module: Any, args: tuple, named: dict) -> tuple[tuple, dict]:  # noqa: ARG001
            if args:
                return (self.touch(("resid_pre", number, tower), args[0]), *args[1:]), named
            return args, {**named, "hidden_states": self.touch(("resid_pre", number, tower), named["hidden_states"])}

        def attended(module: Any, given: Any, out: tuple) -> tuple:  # noqa: ARG001
            return (self.touch(("attn_out", number, tower), out[0]), *out[1:])

        def middle(module: Any, args: tuple) -> tuple:  # noqa: ARG001
            held["mid"] = self.touch(("resid_mid", number, tower), args[0])
            return (held["mid"],)

        def added(module: Any, given: Any, out: Tensor) -> Tensor:  # noqa: ARG001
            held["mlp"] = self.touch(("mlp_out", number, tower), out)
            return held["mlp"]

        def after(module: Any, given: Any, out: Any) -> Tensor:  # noqa: ARG001
            return self.touch(("resid_post", number, tower), held["mid"] + held["mlp"])

        return [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.self_attn.register_forward_hook(attended, prepend=True),
            norm.register_forward_pre_hook(middle),
            layer.mlp.register_forward_hook(added, prepend=True),
            layer.register_forward_hook(after, prepend=True),  # before transformers' own, which keeps hidden states
        ]

    def attention_of(self, places: dict[Any, tuple[int, str]]) -> Callable:
        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **more: Any) -> tuple:  # noqa: ARG001
            number, tower = places[module]
            q, k, v = (
                self.touch((kind, number, tower), x.transpose(1, 2)).transpose(1, 2)
                for kind, x in (("q", q), ("k", k), ("v", v))
            )
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(group, 1)) * scaling
            if tower == "text":
                length = scores.shape[-1]
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            scores = self.touch(("scores", number, tower), scores)
            blind = (scores == -torch.inf).all(-1, keepdim=True)
            pattern = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
            pattern = self.touch(("pattern", number, tower), pattern)
            z = torch.einsum("bhqk,bhkd->bqhd", pattern, v.repeat_interleave(group, 1))
            return self.touch(("z", number, tower), z), None

        return attention
