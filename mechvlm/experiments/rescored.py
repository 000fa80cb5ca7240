"""What a patch of queries or of keys does to attention itself, where its gradient has vanished: the softmax made anew.

Where a softmax is saturated its gradient is next to nothing, and so is the estimate of a patch that turns it over.
The gradient behind the softmax, of the pattern, does not vanish. So the pattern that a patch would make is computed
exactly here, and only what follows is taken to be linear.

Rule this module guards: attention is made in pieces, as in `mechvlm.lazy_attention`, and in 32 bits at least. A patch
of one key changes one column of the scores, and each row's change follows from that one number, so that no row is made
anew for each of its keys.

>>> attention = vlm.run(real, {"text.3.pattern": mv.lazy()}, grad_of=yes).grad["text.3.pattern"]
>>> query_changes(attention, attention.q).abs().max()
tensor(0.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechvlm.attention import Piece, known
from mechvlm.lazy_attention import Attention
from mechvlm.masks import indicator

SHARE = 4
"""By how much the pieces are smaller than those of a reading, since more than one copy of each is at work."""


def heads_of(attention: Attention) -> tuple[Tensor, Tensor]:
    """Queries and keys as they enter the scores, with what edits have put on them.

    Example:
        >>> q, k = heads_of(vlm.run(real, {"text.3.pattern": mv.lazy()})["text.3.pattern"])
        >>> q.shape, k.shape
        (torch.Size([1, 8, 49, 24]), torch.Size([1, 4, 49, 24]))
    """
    return attention.q.clone(), attention.k.clone()


def query_changes(
    attention: Attention, q: Float[Tensor, "#batch head query d_head"]
) -> Float[Tensor, "batch head query"]:
    """The change of a metric by each query, exact up to the pattern and linear from there: the row's change times dA.

    Args:
        attention: with the gradient at z.
        q: the queries that are put in, each by itself; keys, values and who sees whom stay.

    Example:
        >>> attention = vlm.run(real, {"text.3.pattern": mv.lazy()}, grad_of=yes).grad["text.3.pattern"]
        >>> query_changes(attention, attention.q * 2).shape
        torch.Size([1, 8, 49])

    Source:
        Kramár et al. (2024), "AtP*: An efficient and scalable method for localizing LLM behaviour to components",
        section 3, QK fix, queries.
    """
    own = widened(attention)
    other = replace(own, q=q.to(own.q).expand(own.q.shape), z_gradient=None)
    out = own.q.new_zeros(own.q.shape[:3])
    for mine, theirs in _both(own, other):
        change = (theirs.pattern - mine.pattern) * known(mine.gradient)
        out[mine.batch, mine.heads, mine.rows] = change.sum(-1)
    return out


def key_changes(
    attention: Attention,
    k: Float[Tensor, "#batch kv_head key d_head"],
    places: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "batch kv_head place"]:
    """The change of a metric by each key, or by several together: that of all rows that see them, times dA.

    Args:
        attention: with the gradient at z. A key serves several heads under grouped queries; their changes are summed.
        k: the keys that are put in; queries, values and who sees whom stay.
        places: keys that are put in together, so that each row is made anew once for all of them. None: each by itself.

    Example:
        >>> attention = vlm.run(real, {"text.3.pattern": mv.lazy()}, grad_of=yes).grad["text.3.pattern"]
        >>> key_changes(attention, attention.k * 2, [real.image, real.question]).shape
        torch.Size([1, 4, 2])

    Source:
        Kramár et al. (2024), section 3, QK fix, keys.
    """
    own = widened(attention)
    other = replace(own, k=k.to(own.k).expand(own.k.shape), z_gradient=None)
    (batch, kv_heads, key, _), share = own.k.shape, own.q.shape[1] // own.k.shape[1]
    chosen = None if places is None else [indicator(some, key).to(own.k.device) for some in places]
    out = own.k.new_zeros(batch, kv_heads, key if chosen is None else len(chosen))
    for mine, theirs in _both(own, other):
        served = slice(mine.heads.start // share, -(-mine.heads.stop // share))
        if chosen is None:
            where, change = mine.keys, alone(mine, theirs.scores).sum(2)
        else:
            where = slice(None)
            change = torch.stack([together(mine, theirs.scores, some[mine.keys]) for some in chosen], -1)
        out[mine.batch, served, where] += change.unflatten(1, (-1, share)).sum(2)
    return out


def alone(mine: Piece, scores: Float[Tensor, "batch head some key"]) -> Float[Tensor, "batch head some key"]:
    """The change of each row by each of its keys, whose score becomes another, by itself.

    The weight a of a key against all others is a logistic function of its score, and what the others have between them
    keeps its proportions. So the row's change is (a' - a) times the key's dA minus the others' mean dA. What the others
    have is summed without the largest of them where that is the key itself, and not found as 1 - a, which rounds to 0.

    Example:
        >>> s, dA = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
        >>> piece = Piece(*[slice(0, 1)] * 3, slice(0, 4), s, s.softmax(-1), dA)
        >>> alone(piece, s).abs().max()
        tensor(0.)
    """
    old, a, gradient = mine.scores, mine.pattern, known(mine.gradient)
    largest = old.argmax(-1, keepdim=True)
    without = old.scatter(-1, largest, -torch.inf)
    rest = old.logsumexp(-1, keepdim=True) + torch.log1p(-a)
    rest = rest.scatter(-1, largest, without.logsumexp(-1, keepdim=True))
    paid = a * gradient
    mean = (paid.sum(-1, keepdim=True) - paid) / (1 - a)
    mean = mean.scatter(-1, largest, (without.softmax(-1) * gradient).sum(-1, keepdim=True))
    change = torch.sigmoid(scores - rest) - torch.sigmoid(old - rest)
    # A key that is not seen, or is the only one, cannot change its row.
    return torch.where((old > -torch.inf) & (rest > -torch.inf), change * (gradient - mean), 0.0)


def together(
    mine: Piece, scores: Float[Tensor, "batch head some key"], inside: Bool[Tensor, " key"]
) -> Float[Tensor, "batch head"]:
    """The change of all rows by several keys whose scores become others at once, summed over the rows.

    Example:
        >>> s, dA = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
        >>> piece = Piece(*[slice(0, 1)] * 3, slice(0, 4), s, s.softmax(-1), dA)
        >>> together(piece, s, torch.ones(4, dtype=torch.bool))
        tensor([[0.]])
    """
    new = torch.where(inside, scores, mine.scores)
    nowhere = (new == -torch.inf).all(-1, keepdim=True)
    pattern = new.masked_fill(nowhere, 0.0).softmax(-1).masked_fill(nowhere, 0.0)
    return ((pattern - mine.pattern) * known(mine.gradient)).sum((-2, -1))


def widened(attention: Attention) -> Attention:
    """The same in 32 bits at least, in smaller pieces: differences of patterns are lost in fewer.

    Example:
        >>> widened(vlm.run(real, {"text.3.pattern": mv.lazy()}, grad_of=yes).grad["text.3.pattern"]).q.dtype
        torch.float32
    """
    wide = torch.promote_types(attention.q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (attention.q, attention.k, attention.v))
    budget = max(1, attention.budget // SHARE)
    return replace(attention, q=q, k=k, v=v, z_gradient=known(attention.z_gradient).to(wide), budget=budget)


def _both(own: Attention, other: Attention) -> Iterator[tuple[Piece, Piece]]:
    """The pieces of two attentions of one shape, side by side."""
    every = own.asked(None)
    for batch, heads, rows in own.blocks(len(every)):
        yield (own.piece(batch, heads, rows, every[rows]), other.piece(batch, heads, rows, every[rows]))
