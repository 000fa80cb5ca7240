"""One layer's attention, not made: queries, keys, values and who sees whom, and what can be computed of it in pieces.

Rule this module guards: no map of all queries by all keys is held, but pieces of it that fit a budget of memory,
whatever the length. Shapes are those of `mechvlm.attention`.

>>> from mechvlm.masks import Sees
>>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
>>> Attention(q, k, k, Sees(5, 5, causal=True), 8**-0.5).rows([-1]).sum(-1).allclose(torch.ones(1, 4, 1))
True
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from mechvlm.attention import Piece, grouped, known, mixed_by_kernel, scores_gradient
from mechvlm.masks import indicator, within
from mechvlm.pieces import Pieces


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Pieces):
    """One layer's attention, not made. What is asked of it is computed in pieces, exactly, at any length.

    A reading with `mv.lazy()` gives one, `run[mv.Site("pattern", 3)]`. In a run with a gradient `run.grad` has it too,
    and there it knows the gradient at z. Queries count as positions do; negative ones from the end.

    Example:
        >>> attention = vlm.run(real, read={"text.3.pattern": mv.lazy()})["text.3.pattern"]
        >>> attention.rows([-1], keys=real.image).shape
        torch.Size([1, 8, 1, 36])
    """

    def __repr__(self) -> str:
        batch, heads, queries, _ = self.q.shape
        edited = ", edited" if self.change else ""
        known = "" if self.z_gradient is None else ", with gradient"
        return (
            f"Attention({batch} x {heads} heads, {queries} queries x {self.k.shape[2]} keys, not made{edited}{known})"
        )

    # -- readings ----------------------------------------------------------------------------------------------------

    def rows(
        self, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None, scores: bool = False
    ) -> Float[Tensor, "batch head rows key"]:
        """The pattern of some queries, over all keys or some; or the scores."""
        if scores:
            return self.over_keys(lambda piece: piece.scores, queries, keys, -torch.inf)
        return self.over_keys(lambda piece: piece.pattern, queries, keys)

    def mixed(
        self, values: Float[Tensor, "key n"], queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head rows n"]:
        """The pattern times columns of numbers, one number a key: for indicators of spans, the mass of each span.

        Through the fused kernel where all queries are asked for; no row is made then.
        """
        if values.ndim != 2 or values.shape[0] != self.k.shape[2] or not values.shape[1]:
            raise ValueError(
                f"the values are {list(values.shape)}; they must be columns of one number for each of "
                f"{self.k.shape[2]} keys."
            )
        if queries is not None or self.cap is not None or self.change is not None:
            return self.collected(
                lambda piece: piece.pattern @ values[piece.keys].to(piece.pattern), queries, values.shape[1]
            )
        about, width = (self.q, self.k, self.sees, self.scale), self.q.shape[-1]
        starts = range(0, values.shape[1], width)
        return torch.cat([mixed_by_kernel(*about, values[:, at : at + width], self.budget) for at in starts], -1)

    def mass(
        self, spans: Mapping[str, Sequence[int]], queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head rows span"]:
        """What queries pay to spans of keys, in the order of the spans."""
        key = self.k.shape[2]
        columns = [indicator(within(f"keys of {name!r}", keys, key), key) for name, keys in spans.items()]
        return self.mixed(torch.stack(columns, -1).float(), queries)

    def entropy(
        self, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head rows"]:
        """The entropy of each query's attention in nats, over all keys, or over some of which it is made to sum to one.

        Not a number where a query pays nothing to those keys.
        """
        count = self.k.shape[2]
        among = None if keys is None else indicator(within("keys", keys, count), count)

        def of(piece: Piece) -> Tensor:
            # An edited pattern need not be a softmax of its scores.
            kept = piece.scores if self.change is None else piece.pattern.log()
            if among is not None:
                kept = kept.masked_fill(~among[piece.keys].to(kept.device), -torch.inf)
            p = kept.softmax(-1, dtype=torch.promote_types(kept.dtype, torch.float32))
            return torch.special.entr(p).sum(-1, keepdim=True)

        return self.collected(of, queries, 1)[..., 0]

    def top(
        self, count: int, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "batch head rows top"], Int[Tensor, "batch head rows top"]]:
        """The largest weights of each query, falling, and the keys they are on; among all keys or some.

        Keys that a query cannot see come last, with a weight of zero.
        """
        if count < 1:
            raise ValueError(f"the largest {count} weights are none; give 1 or more.")
        among = torch.arange(self.k.shape[2]) if keys is None else torch.tensor(within("keys", keys, self.k.shape[2]))
        count = min(count, len(among))
        found: list[Tensor] = []

        def weights(piece: Piece) -> Tensor:
            value = pad(piece.pattern, (piece.keys.start, self.k.shape[2] - piece.keys.stop))
            best = value[..., among.to(value.device)].topk(count, -1)
            found.append(among.to(value.device)[best.indices])
            return best.values

        out = self.collected(weights, queries, count)
        where = torch.zeros(out.shape, dtype=torch.long, device=out.device)
        for (batch, heads, rows), value in zip(self.blocks(out.shape[2]), found, strict=True):
            where[batch, heads, rows] = value
        return out, where

    def drawn(
        self,
        weights: Float[Tensor, "batch weighted rows"],
        queries: Sequence[int] | None = None,
        of: Callable[[Piece], Tensor] | None = None,
    ) -> Float[Tensor, "batch head key"]:
        """Weights of queries times the pattern, summed over queries: a row of a product of patterns, one layer on.

        Args:
            weights: one for each query asked for and head; a head axis of 1 stands for all heads.
            of: what is taken of each piece instead of its pattern, for instance `saliency`.
        """
        asked, heads = len(self.asked(queries)), self.q.shape[1]
        if weights.shape[1] not in (1, heads) or weights.shape[2] != asked:
            raise ValueError(
                f"the weights are {list(weights.shape)} for {asked} queries and {heads} heads; give one for each of "
                "them, with one head for all or each."
            )
        wide = torch.promote_types(self.q.dtype, torch.float32)
        out = torch.zeros(self.q.shape[0], self.q.shape[1], self.k.shape[2], dtype=wide, device=self.q.device)
        given = weights.to(out).expand(*self.q.shape[:2], weights.shape[-1])
        for piece in self.pieces(queries):
            value = piece.pattern if of is None else of(piece)
            row = given[piece.batch, piece.heads, piece.rows].unsqueeze(-2)
            out[piece.batch, piece.heads, piece.keys] += (row @ value.to(wide)).squeeze(-2)
        return out

    def gradient_rows(
        self, queries: Sequence[int] | None = None, keys: Sequence[int] | None = None, scores: bool = False
    ) -> Float[Tensor, "batch head rows key"]:
        """The gradient of some queries' pattern, over all keys or some; or that of their scores.

        That of the pattern says what a weight would do if it were there, and so is not zero on keys a query cannot see.

        Raises:
            ValueError: where the gradient at z is not known.
        """
        if scores:
            return self.over_keys(lambda piece: scores_gradient(piece.pattern, known(piece.gradient)), queries, keys)
        of_z, chosen = known(self.z_gradient), self.asked(queries).to(self.q.device)
        some = slice(None) if keys is None else within("keys", keys, self.k.shape[2])
        values = self.v[:, :, some][..., : of_z.shape[-1]]
        return grouped(of_z[:, chosen].transpose(1, 2), values.transpose(-1, -2))

    def gradient_mixed(
        self, values: Float[Tensor, "key n"], queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head rows n"]:
        """The gradient of the pattern times columns of numbers, for all queries or some; no row is made.

        Raises:
            ValueError: where the gradient at z is not known.
        """
        of_z, chosen = known(self.z_gradient), self.asked(queries).to(self.q.device)
        columns = self.v[..., : of_z.shape[-1]].transpose(-1, -2) @ values.to(self.v)
        return grouped(of_z[:, chosen].transpose(1, 2), columns)

    # -- parts -------------------------------------------------------------------------------------------------------

    def attended_again(self, queries: Sequence[int] | None = None) -> Float[Tensor, "batch rows head d_value"]:
        """The same in a graph of gradients, whose backward pass makes each piece again instead of keeping it."""

        def part(q: Tensor, k: Tensor, v: Tensor, some: list[int]) -> Tensor:
            return replace(self, q=q, k=k, v=v).attended(some)

        asked, given = self.asked(queries), (self.q, self.k, self.v)
        chunks = [asked[rows].tolist() for _, _, rows in self.blocks(len(asked))]
        return torch.cat([checkpoint(part, *given, some, use_reentrant=False) for some in chunks], 1)

    def attended(self, queries: Sequence[int] | None = None) -> Float[Tensor, "batch rows head d_head"]:
        """`z` of some queries: the values, mixed by the pattern."""
        share, width = self.q.shape[1] // self.k.shape[1], self.v.shape[-1]

        def of(piece: Piece) -> Tensor:
            served = slice(piece.heads.start // share, -(-piece.heads.stop // share))
            return grouped(piece.pattern, self.v[piece.batch, served, piece.keys])

        return self.collected(of, queries, width).transpose(1, 2).contiguous()
