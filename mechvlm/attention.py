"""Attention in plain torch: scores, pattern, z, their gradients, and the pieces in which they are made.

Rule this module guards: everything about attention is computed from what a Hugging Face attention module hands to its
kernel, so it is the same under every kernel; and keys that serve several heads are not repeated. No model and no engine
is known here.

Shapes: `q` is `batch head query d_head`; `k` and `v` are `batch kv_head key d_head`, where one key-value head serves
`head // kv_head` neighbouring heads.

>>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
>>> pattern(scores(q, k, 8**-0.5, torch.zeros(1, 1, 5, 5))).sum(-1).allclose(torch.ones(1, 4, 5))
True
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mechvlm.masks import Sees
from mechvlm.sites import told

COPIES = 4
"""How many tensors of a piece's size are alive at once: scores, mask or gradient, softmax, and what comes of it."""

Change = Callable[[str, Tensor, Tensor], Tensor]
"""From "scores" or "pattern", a piece of it, `batch head some key`, and the positions of its queries, to the edited."""


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
    return capped(grouped(q, k.transpose(-1, -2)) * scale, cap) + mask


def grouped(
    a: Float[Tensor, "batch head some inner"], b: Float[Tensor, "batch kv_head inner other"]
) -> Float[Tensor, "batch head some other"]:
    """The product of each head's matrix with that of the key-value head that serves it, which is not repeated."""
    batch, kv_heads = b.shape[:2]
    return (a.reshape(batch, kv_heads, -1, a.shape[-1]) @ b).reshape(*a.shape[:3], b.shape[-1])


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
    return grouped(pattern, v).transpose(1, 2).contiguous()


def mixed_by_kernel(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    sees: Sees,
    scale: float,
    values: Float[Tensor, "key n"],
    budget: int,
) -> Float[Tensor, "batch head query n"]:
    """Columns of numbers, mixed by the fused kernel as it mixes values; no more of them than `d_head`.

    A kernel wants values as wide as queries, and without a mask where it can be told by `is_causal`; where not, some
    queries at a time have a mask of their own.
    """
    batch, kv_heads, key, own = k.shape
    width = -(-own // 8) * 8
    columns = pad(values.to(q), (0, width - values.shape[1])).expand(batch, kv_heads, key, width)
    q, k = (pad(x, (0, width - own)) if width != own else x for x in (q, k))
    shared = q.shape[1] != kv_heads
    if sees.simple:
        causal = sees.causal and q.shape[2] > 1
        found = scaled_dot_product_attention(q, k, columns, is_causal=causal, scale=scale, enable_gqa=shared)
        return found[..., : values.shape[1]]
    out = q.new_zeros(*q.shape[:3], values.shape[1])
    share = max(1, budget // (COPIES * batch * q.shape[1] * key * max(4, q.element_size())))
    for start in range(0, q.shape[2], share):
        some = torch.arange(start, min(start + share, q.shape[2]))
        keys, here = sees.reach(int(some[0]), int(some[-1])), some.to(q.device)
        mask = sees.added(some, keys, q)
        nowhere = (mask == -torch.inf).all(-1, keepdim=True)
        seen = (q[:, :, here], k[:, :, keys], columns[:, :, keys], mask.masked_fill(nowhere, 0.0))
        found = scaled_dot_product_attention(*seen, scale=scale, enable_gqa=shared)
        out[:, :, here] = found.masked_fill(nowhere, 0.0)[..., : values.shape[1]]
    return out


def scores_gradient(
    pattern: Float[Tensor, "batch head query key"], gradient: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """The gradient of the scores from the pattern and its gradient: `A * (dA - sum(A * dA))`."""
    return pattern * (gradient - (pattern * gradient).sum(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of some heads, whole from the first key they see to the last.

    Attributes:
        batch, heads, rows: where it stands along the axes of what was asked for; `rows` along the queries asked.
        keys: which keys it has; those that are left out are seen by none of its queries.
        scores, pattern: `batch head some key`.
        gradient: of the pattern, where the gradient at z is known.
    """

    batch: slice
    heads: slice
    rows: slice
    keys: slice
    scores: Tensor
    pattern: Tensor
    gradient: Tensor | None = None


def blocks(
    q: Sequence[int], k: Sequence[int], rows: int, room: int, whole_heads: bool = False
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the batch, the heads and the rows asked for, such that each block has at most `room` rows of one head.

    Heads that share keys stay together, so a block has at least one row of each of them.

    Args:
        whole_heads: whether a block has all heads and the whole batch, whatever the room.
    """
    batch, heads = q[:2]
    share = heads // k[1]
    if whole_heads or room >= batch * heads:
        sizes = (batch, heads, max(room // (batch * heads), 1))
    else:
        sizes = (1, max(room // share, 1) * share, 1) if room < heads else (room // heads, heads, 1)
    for first in range(0, batch, sizes[0]):
        for head in range(0, heads, sizes[1]):
            for row in range(0, rows, sizes[2]):
                yield (
                    slice(first, min(first + sizes[0], batch)),
                    slice(head, min(head + sizes[1], heads)),
                    slice(row, min(row + sizes[2], rows)),
                )


def saliency(piece: Piece) -> Tensor:
    """Gradient times attention, of a piece: what a weight, taken away, would take from the metric, to first order.

    Example:
        >>> run = vlm.run(real, read={"text.3.pattern": mv.lazy()}, grad_of=mv.logit_difference("yes", "no"))
        >>> run.grad["text.3.pattern"].collected(saliency, [-1], len(real)).shape
        torch.Size([1, 8, 1, 49])

    Raises:
        ValueError: where the gradient at z is not known.
    """
    wide = torch.promote_types(piece.pattern.dtype, torch.float32)  # products of small numbers
    return piece.pattern.to(wide) * known(piece.gradient).to(wide)


def known(gradient: Tensor | None) -> Tensor:
    """A gradient as it is; refused where there is none."""
    if gradient is None:
        raise ValueError(
            "this attention knows no gradient; take it from run.grad of a run with grad_of= a metric, not from the run."
        )
    return gradient


def bytes_of(budget: int | str) -> int:
    """A size of memory in bytes: a number of them, or a text such as "256MiB".

    Raises:
        ValueError: for anything else.

    Example:
        >>> bytes_of("1.5 GiB")
        1610612736
    """
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", budget) if isinstance(budget, str) else None
    size = budget if isinstance(budget, int) and not isinstance(budget, bool) else 0
    if found and found[2] in units and found[1].count(".") <= 1 and found[1] != ".":
        size = int(float(found[1]) * units[found[2]])
    if size < 1:
        raise ValueError(
            f"attention_budget={told(budget)} is no size of memory; give bytes, or a text such as '256MiB'."
        )
    return size
