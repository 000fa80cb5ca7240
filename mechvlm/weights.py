"""The matrices of each head, by the names and shapes of the circuits literature: W_Q, W_K, W_V, W_O and products.

Rows are what goes in and columns what comes out, as in TransformerLens: `x @ W_V` is a head's values. Nothing is folded
unless asked, so what goes in is what stands behind the layer's norm.

>>> vlm.weights.OV(3, 5).svd()  # doctest: +SKIP
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.devices import held, matrix_of
from mechvlm.sites import whole

APART = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "projection_layer"),
)
"""What attention modules call their four projections."""

FUSED = (("qkv", "proj"), ("qkv", "projection"))
"""What those call them that project to queries, keys and values at once: all queries, all keys, all values."""

NORMS = ("q_norm", "k_norm")
"""What they call their norms of each head's queries and keys, where they have them."""


@dataclass(frozen=True, repr=False)
class Weights:
    """The weights of one model, read where they are: only what is kept elsewhere, or packed by bitsandbytes, is copied.

    Attributes:
        vlm: the model.
    """

    vlm: Any

    def W_Q(self, layer: int, head: int, tower: str = "text") -> Float[Tensor, "d_model d_head"]:
        """A head's queries: `x @ W_Q`, before any norm of queries and before rotary embedding."""
        return self._in("q", layer, self._head(head, tower), tower)

    def W_K(self, layer: int, head: int, tower: str = "text") -> Float[Tensor, "d_model d_head"]:
        """The keys that a head reads; with grouped queries those of key-value head `head // group`."""
        return self._in("k", layer, self._shared(head, tower), tower)

    def W_V(self, layer: int, head: int, tower: str = "text") -> Float[Tensor, "d_model d_head"]:
        """The values that a head reads; with grouped queries those of key-value head `head // group`."""
        return self._in("v", layer, self._shared(head, tower), tower)

    def W_O(self, layer: int, head: int, tower: str = "text") -> Float[Tensor, "d_head d_model"]:
        """What a head adds to the attention's output: `z @ W_O`, less the bias that all heads share."""
        return self.heads_out(layer, tower)[self._head(head, tower)]

    def heads_out(self, layer: int, tower: str = "text") -> Float[Tensor, "head d_head d_model"]:
        """`W_O` of all heads of a layer."""
        weight = self._matrix(self._path("o", layer, tower))
        return weight.T.unflatten(0, (self.vlm.shape.heads[tower], -1))

    def b_O(self, layer: int, tower: str = "text") -> Float[Tensor, " d_model"]:
        """The bias of the attention's output; zeros where it has none."""
        return self._bias(self._path("o", layer, tower))

    def OV(self, layer: int, head: int, tower: str = "text") -> Any:
        """What a head moves: `W_V W_O`, from the stream it reads to the stream it adds to.

        Returns:
            a `transformer_lens.FactoredMatrix`, which keeps the two factors: `.svd()`, `.eigenvalues`, `.AB`.
        """
        return factored(self.W_V(layer, head, tower), self.W_O(layer, head, tower))

    def QK(self, layer: int, head: int, tower: str = "text") -> Any:
        """What a head looks for: `W_Q W_K^T`, between the stream of the query and that of the key.

        With rotary embedding this is the part that does not know positions: the score of a query and a key at the same
        place. Norms and biases of queries and keys, where a model has them, are not in it, nor is the scale of the
        scores.

        Returns:
            a `transformer_lens.FactoredMatrix`.
        """
        return factored(self.W_Q(layer, head, tower), self.W_K(layer, head, tower).T)

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The word embeddings."""
        return self._held(f"{self.vlm.arch.text.embed}.weight")

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The unembedding, without the final norm's gain; see `mechvlm.circuits.final_norm` for that."""
        return self._matrix(self.vlm.arch.unembed).T

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """The bias of the unembedding; zeros where it has none."""
        return self._bias(self.vlm.arch.unembed)

    def __repr__(self) -> str:
        return f"Weights({self.vlm.name})"

    def _head(self, head: int, tower: str) -> int:
        count, number = self.vlm.shape.heads[tower], whole("head", head)
        if not 0 <= number < count:
            raise ValueError(
                f"the {tower} tower has {count} heads a layer, counted from 0, so there is no head {head}."
            )
        return number

    def _shared(self, head: int, tower: str) -> int:
        group = self.vlm.shape.heads[tower] // self.vlm.shape.kv_heads[tower]
        return self._head(head, tower) // group

    def _in(self, which: str, layer: int, head: int, tower: str) -> Tensor:
        fused = len(names_of(self.vlm.hf.get_submodule(attention_of(self.vlm, layer, tower)))) == 2
        part = "qkv".index(which) if fused else None
        count = self.vlm.shape.heads[tower] if which == "q" else self.vlm.shape.kv_heads[tower]
        found: Tensor = self.vlm.place.ask(self.vlm.model, head_of, self._path(which, layer, tower), part, count, head)
        return found

    def _matrix(self, path: str) -> Tensor:
        found: Tensor = self.vlm.place.ask(self.vlm.model, matrix_at, path)
        return found

    def _held(self, path: str) -> Tensor:
        found: Tensor = self.vlm.place.ask(self.vlm.model, held_at, path)
        return found

    def _bias(self, path: str) -> Tensor:
        if self.vlm.hf.get_submodule(path).bias is not None:
            return self._held(f"{path}.bias")
        return torch.zeros_like(self._matrix(path)[:, 0])

    def _path(self, which: str, layer: int, tower: str) -> str:
        path = attention_of(self.vlm, layer, tower)
        names = names_of(self.vlm.hf.get_submodule(path))
        return f"{path}.{names[which == 'o'] if len(names) == 2 else names['qkvo'.index(which)]}"


def matrix_at(model: Any, path: str) -> Tensor:
    """The matrix of a linear module, where the model runs."""
    return matrix_of(model._module, path)


def held_at(model: Any, path: str) -> Tensor:
    """A weight by its name, where the model runs."""
    return held(model._module, path)


def head_of(model: Any, path: str, part: int | None, count: int, head: int) -> Tensor:
    """What one head projects by, `d_model d_head`, where the model runs.

    Args:
        part: which third of the matrix holds it, where one matrix projects to queries, keys and values.
        count: how many heads there are.
    """
    weight = matrix_of(model._module, path)
    own = weight if part is None else weight.chunk(3)[part]
    return own.unflatten(0, (count, -1))[head].T


def attention_of(vlm: Any, layer: int, tower: str) -> str:
    """Where a layer keeps its self-attention module.

    Raises:
        ValueError: for a layer that is not there, or without self-attention.
    """
    count = vlm.shape.layers[tower]
    if not 0 <= whole("layer", layer) < count:
        raise ValueError(f"the {tower} tower has {count} layers, counted from 0, so there is no layer {layer}.")
    stack = vlm.arch.stacks[tower]
    (where, index), block = stack.layers[layer], stack.blocks[layer]
    if block.attention is None:
        raise ValueError(f"layer {layer} of the {tower} tower attends to the image only, and has no heads of its own.")
    return f"{where}.{index}.{block.attention}"


def names_of(attention: Any) -> tuple[str, ...]:
    """What an attention module calls its projections.

    Raises:
        ValueError: for a module that has others than those known.
    """
    there = {name for name, _ in attention.named_children()}
    for names in (*APART, *FUSED):
        if there.issuperset(names):
            return names
    raise ValueError(
        f"{type(attention).__name__} has {', '.join(sorted(there))}, among which mechvlm knows no projections to "
        "queries, keys, values and outputs."
    )


def factored(left: Tensor, right: Tensor) -> Any:
    """A product of two matrices that keeps its factors."""
    from transformer_lens import FactoredMatrix

    return FactoredMatrix(left, right)
