"""What is read of attention without making it: rows, masses by span, entropies, largest weights, or all of it later.

Each is a small value that says what is wanted. Where it is read, `Attention` computes it from queries, keys and the
rule of who sees whom, in pieces that fit the budget of memory (`mv.load(..., attention_budget="256MiB")`).

>>> vlm.run(real, read={mv.Site("pattern", 3): mv.entropy([-1])})[mv.Site("pattern", 3)].shape
torch.Size([1, 8, 1])
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.lazy_attention import Attention
from mechvlm.masks import indicator
from mechvlm.sites import told, whole, whole_numbers

Some = tuple[int, ...] | None


@dataclass(frozen=True)
class Rows:
    """A reading of `scores` or `pattern`: some queries' rows, over some keys. Made by `rows`."""

    queries: Some
    keys: Some = None

    def __call__(self, made: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head rows some"]:
        return taken(taken(made, self.queries, 2), self.keys, 3)

    def of(self, attention: Attention, kind: str) -> Tensor:
        """What it reads of an attention."""
        return attention.rows(self.queries, self.keys, kind.endswith("scores"))

    def of_gradient(self, attention: Attention, kind: str) -> Tensor:
        """What it reads of the gradient."""
        return attention.gradient_rows(self.queries, self.keys, kind.endswith("scores"))


@dataclass(frozen=True)
class Mass:
    """A reading of `pattern`: how much each query pays to each span. Made by `mass`."""

    spans: tuple[tuple[str, tuple[int, ...]], ...]
    queries: Some = None

    def __call__(self, made: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head rows span"]:
        return taken(made, self.queries, 2) @ self.columns(made.shape[-1]).to(made)

    def columns(self, key: int) -> Float[Tensor, "key span"]:
        """One for each key of a span."""
        return torch.stack([indicator(keys, key) for _, keys in self.spans], -1).float()

    def of(self, attention: Attention, _kind: str) -> Tensor:
        """What it reads of an attention."""
        return attention.mixed(self.columns(attention.k.shape[2]), self.queries)

    def of_gradient(self, attention: Attention, _kind: str) -> Tensor:
        """The gradient of the pattern, summed over each span."""
        return attention.gradient_mixed(self.columns(attention.k.shape[2]), self.queries)


@dataclass(frozen=True)
class Entropy:
    """A reading of `pattern`: how widely each query spreads its attention. Made by `entropy`."""

    queries: Some = None
    keys: Some = None

    def __call__(self, made: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head rows"]:
        p = taken(taken(made, self.queries, 2), self.keys, 3)
        return torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1)

    def of(self, attention: Attention, _kind: str) -> Tensor:
        """What it reads of an attention."""
        return attention.entropy(self.queries, self.keys)


@dataclass(frozen=True)
class Top:
    """A reading of `pattern`: the largest weights of each query and their keys. Made by `top_keys`."""

    count: int
    queries: Some = None
    keys: Some = None

    def __call__(self, made: Float[Tensor, "batch head query key"]) -> tuple[Tensor, Tensor]:
        among = range(made.shape[-1]) if self.keys is None else [key % made.shape[-1] for key in self.keys]
        best = taken(taken(made, self.queries, 2), self.keys, 3).topk(min(self.count, len(among)), -1)
        return best.values, torch.tensor(list(among), device=made.device)[best.indices]

    def of(self, attention: Attention, _kind: str) -> tuple[Tensor, Tensor]:
        """What it reads of an attention."""
        return attention.top(self.count, self.queries, self.keys)


@dataclass(frozen=True)
class Lazy:
    """A reading of `pattern`: the attention itself, not made, or what a function makes of it. Made by `lazy`."""

    function: Callable[[Attention], Any] | None = None

    queries = None

    def of(self, attention: Attention, _kind: str) -> Any:
        """The attention, with tensors of its own: a cache goes on writing into the model's."""
        if self.function is not None:
            return self.function(attention)
        return replace(attention, q=attention.q.clone(), k=attention.k.clone(), v=attention.v.clone())

    def of_gradient(self, attention: Attention, _kind: str) -> Any:
        """The attention, which knows the gradient at z."""
        return attention if self.function is None else self.function(attention)


@dataclass(frozen=True)
class Visible:
    """A reading of `scores`: one for each key that the model lets the newest query see, whatever is edited."""

    queries = (-1,)

    def of(self, attention: Attention, _kind: str) -> Float[Tensor, "batch 1 1 key"]:
        """What it reads of an attention, the same for each row of a batch."""
        seen = attention.sight().rows([-1], scores=True)
        return (seen > -torch.inf).to(seen).expand(attention.q.shape[0], 1, 1, -1)


VISIBLE = Visible()

Reading = Rows | Mass | Entropy | Top | Lazy | Visible


def taken(x: Tensor, indices: Some, axis: int) -> Tensor:
    """Some places along an axis, or all."""
    return (
        x if indices is None else x.index_select(axis, torch.tensor([i % x.shape[axis] for i in indices]).to(x.device))
    )


def rows(queries: Sequence[int] | None, keys: Sequence[int] | None = None) -> Rows:
    """Read only some queries' rows of an attention pattern or its scores, without making the rest.

    Args:
        queries: positions; negative ones count from the end. None means all.
        keys: only what is paid to these, for instance `prompt.image`: a map over the image. None means all.

    The reading has axes `batch head query key`.

    Example:
        >>> vlm.run(real, read={mv.Site("pattern", 3): mv.rows([-1])})[mv.Site("pattern", 3)].shape
        torch.Size([1, 8, 1, 49])
    """
    return Rows(chosen("rows", queries), chosen("rows", keys, "key"))


def mass(spans: Mapping[str, Sequence[int]], queries: Sequence[int] | None = None) -> Mass:
    """Read how much attention queries pay to spans of keys, exactly, without a map for each head.

    Args:
        spans: named lists of positions, for instance `prompt.spans`; they may overlap.
        queries: the positions that attend; None means all. Negative ones count from the end.

    The reading has axes `batch head query span`. Where all queries are asked for, it is the fused kernel's result on
    values that say for each key which spans it is in.

    Source:
        docs/architecture.md, Conventions: the summed weights of a span's keys, neither divided by their number nor by
        what even attention would give. Chen et al. (2024), "An Image is Worth 1/2 Tokens After Layer 2", section 3.
    """
    if not isinstance(spans, Mapping):
        raise TypeError(
            f"spans={told(spans)} are not named; give for instance prompt.spans or {{'image': prompt.image}}."
        )
    if not spans:
        raise ValueError("mass() was given no span; give for instance prompt.spans or {'image': prompt.image}.")
    named = tuple((str(name), whole_numbers("keys", keys)) for name, keys in spans.items())
    return Mass(named, chosen("mass", queries))


def entropy(queries: Sequence[int] | None = None, keys: Sequence[int] | None = None) -> Entropy:
    """Read how widely queries spread their attention: the entropy of their rows, in nats.

    Args:
        queries: positions; None means all. Negative ones count from the end.
        keys: among these only, over which each row is made to sum to one, for instance `prompt.image`; a query that
            pays them nothing has none (not a number). None means all.

    The reading has axes `batch head query`.

    Example:
        >>> vlm.run(real, read={"text.3.pattern": mv.entropy([-1], keys=real.image)})["text.3.pattern"].shape
        torch.Size([1, 8, 1])
    """
    return Entropy(chosen("entropy", queries), chosen("entropy", keys, "key"))


def top_keys(count: int, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None) -> Top:
    """Read the keys that queries look at most: a pair of tensors `batch head query top`, weights falling and positions.

    Args:
        count: how many; where there are fewer keys, that many are returned. Keys that a query cannot see come last,
            with weight 0.
        queries: positions; None means all. Negative ones count from the end.
        keys: among these only, for instance `prompt.image`. None means all.

    Example:
        >>> weights, positions = vlm.run(real, read={"text.3.pattern": mv.top_keys(5, [-1])})["text.3.pattern"]
    """
    if whole("count", count) < 1:
        raise ValueError(f"top_keys({count}) reads nothing; give 1 or more.")
    return Top(int(count), chosen("top_keys", queries), chosen("top_keys", keys, "key"))


def lazy(function: Callable[[Attention], Any] | None = None) -> Lazy:
    """Keep a layer's attention as it is, not made, to ask it for rows, masses or products after the run.

    Args:
        function: asks it during the run, where the model runs; what it returns (tensors with the batch axis first, or a
            tuple of them) is kept instead. In a run with `grad_of=` it is asked again once the gradient is known, for
            `run.grad`.

    What is kept are queries, keys, values and the rule of who sees whom: memory grows with the length and not with its
    square. `run.grad` of a run with `grad_of=` has the same attention, which there knows its gradient.

    Example:
        >>> attention = vlm.run(real, read={"text.3.pattern": mv.lazy()})["text.3.pattern"]
        >>> attention.rows([-1]).shape
        torch.Size([1, 8, 1, 49])
    """
    if function is not None and not callable(function):
        raise TypeError(f"lazy({told(function)}) holds no function; write mv.lazy(), or a function of the attention.")
    return Lazy(function)


def chosen(name: str, positions: Any, what: str = "query") -> Some:
    """Positions as they were given, or None for all; an empty list is refused."""
    found = None if positions is None else whole_numbers({"query": "queries", "key": "keys"}[what], positions)
    if found is not None and not found:
        raise ValueError(f"{name}() was given no {what}; give at least one position, for instance {name}([-1]).")
    return found
