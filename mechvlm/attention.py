"""Attention in plain torch: scores, pattern, chosen rows, mass by span, biases, and their gradients.

Rule this module guards: everything about attention is computed from what a Hugging Face attention module hands to its
kernel, `(q, k, v, mask, scale)`, so it is the same under every kernel; and no `query x key` map is made where only some
rows or some sums were asked for. No model and no engine is known here.

Shapes: `q` is `batch head query d_head`; `k` and `v` are `batch kv_head key d_head`, where one key-value head serves
`head // kv_head` neighbouring heads.

>>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
>>> pattern(scores(q, k, 8**-0.5, additive_mask(None, q, k, causal=True))).sum(-1).allclose(torch.ones(1, 4, 5))
True
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mechvlm.sites import told, whole_numbers


def additive_mask(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Float[Tensor, "rows heads query key"]:
    """A mask in one form, zero where a query may look and minus infinity where it may not.

    Hugging Face hands kernels no mask, a boolean one (True: may look), or one to add whose forbidden places hold the
    lowest finite number; without a mask the kernel is causal or not by a flag.
    """
    query, key = q.shape[-2], k.shape[-2]
    if mask is None:
        allowed = torch.ones(query, key, dtype=torch.bool, device=q.device)
        if causal and query > 1:
            allowed = allowed.tril(key - query)
        mask = allowed[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)[..., :key]
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    return mask.masked_fill(forbidden, -torch.inf)[..., :key].to(q.dtype)


def scores(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    mask: Float[Tensor, "rows heads query key"],
    cap: float | None = None,
) -> Float[Tensor, "batch head query key"]:
    """What goes into the softmax: scaled products of queries and keys, minus infinity where masked.

    Args:
        cap: the products x are made c tanh(x / c) before they are masked, as Gemma 2 does.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    return capped((grouped @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale, cap) + mask


def capped(x: Tensor, cap: float | None) -> Tensor:
    """Numbers x as c tanh(x / c), as Gemma 2 makes its scores and logits; as they are where there is no c."""
    return x if cap is None else torch.tanh(x / cap) * cap


def pattern(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """How each query divides its attention over the keys; a query that may look nowhere pays nothing.

    The softmax is taken in float32 at least and cast back, as Hugging Face's eager attention does.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nowhere, 0.0).softmax(-1, dtype=wide).masked_fill(nowhere, 0.0).to(scores.dtype)


def attend(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch kv_head key d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """`z`: the values of each head, mixed by its pattern."""
    grouped = pattern.unflatten(1, (v.shape[1], -1))
    return (grouped @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).contiguous()


def pattern_gradient(
    z_gradient: Float[Tensor, "batch query head d_head"], v: Float[Tensor, "batch kv_head key d_head"]
) -> Float[Tensor, "batch head query key"]:
    """The gradient of the pattern from that of `z`: `dL/dA[q, k] = dL/dz[q] . v[k]`."""
    grouped = z_gradient.transpose(1, 2).unflatten(1, (v.shape[1], -1))
    return (grouped @ v.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def scores_gradient(
    pattern: Float[Tensor, "batch head query key"], gradient: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """The gradient of the scores from the pattern and its gradient: `A * (dA - sum(A * dA))`."""
    return pattern * (gradient - (pattern * gradient).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Bias:
    """A number added to the scores of some keys, for some queries and heads; None means all of them.

    Attributes:
        cross: whether keys are the image's, and not the positions that queries are among.
    """

    keys: tuple[int, ...]
    amount: float
    queries: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    cross: bool = False

    def __call__(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """The biased scores. Queries are positions of the whole text; during decoding only the last one is present."""
        return scores + self.mask(scores.shape[1], scores.shape[2], scores.shape[3], scores)

    def mask(self, head: int, query: int, key: int, like: Tensor) -> Float[Tensor, "1 heads query key"]:
        """The bias as something to add to the scores; one head where all heads are treated alike."""
        heads = torch.ones(1, dtype=torch.bool) if self.heads is None else _indicator(self.heads, head)
        queries = self.among(query, key)
        where = heads[:, None, None] & queries[:, None] & _indicator(self.keys, key)
        amount = torch.tensor(self.amount, dtype=torch.float64).to(like)  # too large a number becomes infinite
        added = torch.zeros(where.shape, dtype=like.dtype, device=like.device)
        return added.masked_fill(where.to(like.device), amount)[None]

    def among(self, query: int, key: int) -> Bool[Tensor, " query"]:
        """Which of the last positions, the queries that are there, this bias is for."""
        if self.cross:
            return _indicator(self.queries, query)
        return _indicator(self.queries, key)[key - query :]


def _indicator(positions: Sequence[int] | None, length: int) -> Bool[Tensor, " length"]:
    if positions is None:
        return torch.ones(length, dtype=torch.bool)
    where = torch.zeros(length, dtype=torch.bool)
    where[list(positions)] = True
    return where


def bias_features(
    bias: Bias, head: int, query: int, key: int, scale: float
) -> tuple[Float[Tensor, "head query"], Float[Tensor, " key"]]:
    """A feature of queries and one of keys whose product, scaled, is the bias.

    For kernels that take no mask: the query's is `1 / scale` where the bias applies to it, the key's is the amount.
    """
    heads, queries = _indicator(bias.heads, head), bias.among(query, key)
    return (heads[:, None] & queries).double() / scale, _indicator(bias.keys, key).double() * bias.amount


@dataclass(frozen=True)
class Rows:
    """A reading of `scores` or `pattern`: only these queries' rows. Made by `rows`."""

    queries: tuple[int, ...]

    def __call__(self, whole: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head rows key"]:
        return whole[:, :, list(self.queries)]


@dataclass(frozen=True)
class Mass:
    """A reading of `pattern`: how much each query pays to each span. Made by `mass`."""

    spans: tuple[tuple[str, tuple[int, ...]], ...]
    queries: tuple[int, ...] | None = None

    def __call__(self, whole: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head rows span"]:
        chosen = whole if self.queries is None else whole[:, :, list(self.queries)]
        among = [_indicator(keys, chosen.shape[-1]).to(chosen.device) for _, keys in self.spans]
        return torch.stack([chosen[..., keys].sum(-1) for keys in among], -1)


def rows(queries: Sequence[int]) -> Rows:
    """Read only some queries' rows of an attention pattern or its scores, without making the rest.

    Args:
        queries: positions; negative ones count from the end.

    Example:
        >>> vlm.run(real, read={mv.Site("pattern", 3): mv.rows([-1])})[mv.Site("pattern", 3)].shape
        torch.Size([1, 8, 1, 49])
    """
    chosen = whole_numbers("queries", queries)
    if not chosen:
        raise ValueError("rows() was given no query; give at least one position, for instance rows([-1]).")
    return Rows(chosen)


def mass(spans: Mapping[str, Sequence[int]], queries: Sequence[int] | None = None) -> Mass:
    """Read how much attention queries pay to spans of keys, exactly, without a map for each head.

    Args:
        spans: named lists of positions, for instance `prompt.spans`; they may overlap.
        queries: the positions that attend; None means all. Negative ones count from the end.

    The reading has axes `batch head query span`.

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
    chosen = None if queries is None else rows(queries).queries
    return Mass(tuple((str(name), whole_numbers("keys", keys)) for name, keys in spans.items()), chosen)


def read_rows(
    reading: Rows | Mass,
    kind: str,
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    mask: Tensor | None,
    causal: bool,
    cap: float | None = None,
) -> Tensor:
    """What `reading` would give on the whole scores or pattern, computed for its rows only."""
    queries = range(q.shape[2]) if reading.queries is None else [query % q.shape[2] for query in reading.queries]
    if isinstance(reading, Mass) and reading.queries is None and cap is None:
        return _mass_of_all(reading, q, k, scale, additive_mask(mask, q, k, causal))
    some = q[:, :, list(queries)]
    if mask is not None:
        allowed = additive_mask(mask[..., list(queries), :], some, k, causal=False)
    else:
        last = torch.tensor(queries, device=q.device)[:, None] + k.shape[2] - q.shape[2]
        seen = torch.arange(k.shape[2], device=q.device) <= last
        allowed = additive_mask(seen[None, None] if causal and q.shape[2] > 1 else None, some, k, causal=False)
    chosen = scores(some, k, scale, allowed, cap)
    chosen = chosen if kind.endswith("scores") else pattern(chosen)
    return Mass(reading.spans)(chosen) if isinstance(reading, Mass) else chosen


def _mass_of_all(reading: Mass, q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Every query's mass: attention with the values replaced by indicator columns of the spans."""
    indicator = torch.stack([_indicator(keys, k.shape[2]) for _, keys in reading.spans], -1).to(q)
    width = -(-max(q.shape[-1], indicator.shape[-1]) // 8) * 8
    values = pad(indicator, (0, width - indicator.shape[-1])).expand(*k.shape[:3], width)
    nowhere = (mask == -torch.inf).all(-1, keepdim=True)
    wide_q, wide_k = pad(q, (0, width - q.shape[-1])), pad(k, (0, width - k.shape[-1]))
    group = q.shape[1] // k.shape[1]
    out = scaled_dot_product_attention(
        wide_q,
        wide_k.repeat_interleave(group, 1),
        values.repeat_interleave(group, 1),
        attn_mask=mask.masked_fill(nowhere, 0.0),
        scale=scale,
    )
    return out[..., : indicator.shape[-1]].masked_fill(nowhere, 0.0)
