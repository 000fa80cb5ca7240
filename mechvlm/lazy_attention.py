"""One layer's attention, not made: queries, keys, values and who sees whom, and what can be computed of it in pieces.

Rule this module guards: no map of all queries by all keys is held, but pieces of it that fit a budget of memory,
whatever the length. Shapes are those of `mechvlm.attention`.

>>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
>>> Attention(q, k, k, Sees(5, 5, causal=True), 8**-0.5).rows([-1]).sum(-1).allclose(torch.ones(1, 4, 1))
True
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mechvlm.attention import (
    COPIES,
    Change,
    Piece,
    blocks,
    grouped,
    known,
    mixed_by_kernel,
    pattern,
    scores,
    scores_gradient,
)
from mechvlm.masks import Sees, indicator, within


@dataclass(frozen=True, eq=False, repr=False)
class Attention:
    """One layer's attention, not made. What is asked of it is computed in pieces, exactly, at any length.

    A reading with `mv.lazy()` gives one, `run[mv.Site("pattern", 3)]`. In a run with a gradient `run.grad` has it too,
    and there it knows the gradient at z. Queries count as positions do; negative ones from the end.

    Attributes:
        q, k, v, scale, cap, sees: what the kernel was handed.
        budget: how many bytes the pieces may take at once.
        z_gradient: `batch query head d_head`, or None.
        change: edits of scores and pattern, or None.

    Example:
        >>> attention = vlm.run(real, read={"text.3.pattern": mv.lazy()})["text.3.pattern"]
        >>> attention.rows([-1], keys=real.image).shape
        torch.Size([1, 8, 1, 36])
    """

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    v: Float[Tensor, "batch kv_head key d_value"]
    sees: Sees
    scale: float
    cap: float | None = None
    budget: int = 2**28
    z_gradient: Float[Tensor, "batch query head d_z"] | None = None
    change: Change | None = None

    def __repr__(self) -> str:
        batch, heads, queries, _ = self.q.shape
        edited = ", edited" if self.change else ""
        known = "" if self.z_gradient is None else ", with gradient"
        return (
            f"Attention({batch} x {heads} heads, {queries} queries x {self.k.shape[2]} keys, not made{edited}{known})"
        )

    # -- pieces ------------------------------------------------------------------------------------------------------

    def asked(self, queries: Sequence[int] | None) -> Int[Tensor, " some"]:
        """Queries as indices from 0."""
        count = self.q.shape[2]
        return torch.arange(count) if queries is None else torch.tensor(within("queries", queries, count))

    def pieces(self, queries: Sequence[int] | None = None) -> Iterator[Piece]:
        """The rows asked for, in pieces that fit the budget."""
        chosen = self.asked(queries)
        for batch, heads, rows in self.blocks(len(chosen)):
            yield self.piece(batch, heads, rows, chosen[rows])

    def blocks(self, rows: int) -> Iterator[tuple[slice, slice, slice]]:
        """Where the pieces of so many rows stand. An edit has to see all heads of the whole batch."""
        copies = COPIES if self.z_gradient is None else COPIES + 2
        room = self.budget // (copies * self.k.shape[2] * max(4, self.q.element_size()))
        return blocks(self.q.shape, self.k.shape, rows, room, whole_heads=self.change is not None)

    def piece(self, batch: slice, heads: slice, rows: slice, queries: Int[Tensor, " some"]) -> Piece:
        """One piece."""
        share = self.q.shape[1] // self.k.shape[1]
        served = slice(heads.start // share, -(-heads.stop // share))
        keys = self.sees.reach(int(queries.min()), int(queries.max()))
        if self.change is not None:
            keys = slice(0, self.k.shape[2])  # edits index keys by their position
        q = self.q[batch, heads][:, :, queries.to(self.q.device)]
        mask = self.sees.added(queries, keys, q)
        mask = mask[batch] if mask.shape[0] > 1 else mask
        mask = mask[:, heads] if mask.shape[1] > 1 else mask
        found = scores(q, self.k[batch, served, keys], self.scale, mask, self.cap)
        if self.change is not None:
            found = self.change("scores", found, queries)
        made = pattern(found)
        if self.change is not None:
            made = self.change("pattern", made, queries)
        return Piece(batch, heads, rows, keys, found, made, self.gradient_of(batch, heads, served, keys, queries))

    def gradient_of(self, batch: slice, heads: slice, served: slice, keys: slice, queries: Tensor) -> Tensor | None:
        """The gradient of a piece of the pattern from that of `z`: `dL/dA[q, k] = dL/dz[q] . v[k]`."""
        if self.z_gradient is None:
            return None
        of_z = self.z_gradient[batch, queries.to(self.z_gradient.device)][:, :, heads].transpose(1, 2)
        values = self.v[batch, served, keys][..., : of_z.shape[-1]]  # without what biases added behind
        return grouped(of_z, values.transpose(-1, -2))

    def collected(
        self,
        of: Callable[[Piece], Tensor],
        queries: Sequence[int] | None,
        last: int,
        fill: float = 0.0,
        by_key: bool = False,
    ) -> Float[Tensor, "batch head rows last"]:
        """What a function makes of each piece, put together.

        Args:
            of: from a piece to `batch head some last`.
            by_key: whether its last axis are the keys of the piece, and what is asked for is by all keys.
            fill: what stands at keys that no piece has.
        """
        chosen = self.asked(queries)
        out: Tensor | None = None
        for piece in self.pieces(queries):
            value = of(piece)
            if out is None:
                shape = (*self.q.shape[:2], len(chosen), last)
                out = torch.full(shape, fill, dtype=value.dtype, device=value.device)
            place = piece.keys if by_key else slice(None)
            out[piece.batch, piece.heads, piece.rows, place] = value
        return self.q.new_full((*self.q.shape[:2], 0, last), fill) if out is None else out

    def over_keys(
        self,
        of: Callable[[Piece], Tensor],
        queries: Sequence[int] | None,
        keys: Sequence[int] | None,
        fill: float = 0.0,
    ) -> Float[Tensor, "batch head rows key"]:
        """The same for what has one number a key of the piece; some keys of it, or all."""
        if keys is None:
            return self.collected(of, queries, self.k.shape[2], fill, by_key=True)
        chosen = within("keys", keys, self.k.shape[2])

        def some(piece: Piece) -> Tensor:
            left, right = piece.keys.start, self.k.shape[2] - piece.keys.stop
            return pad(of(piece), (left, right), value=fill)[..., chosen]

        return self.collected(some, queries, len(keys), fill)

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
        """The largest weights of each query, falling, and the keys they are on; among all keys or some."""
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

    def attended(self, queries: Sequence[int] | None = None) -> Float[Tensor, "batch rows head d_head"]:
        """`z` of some queries: the values, mixed by the pattern."""
        share, width = self.q.shape[1] // self.k.shape[1], self.v.shape[-1]

        def of(piece: Piece) -> Tensor:
            served = slice(piece.heads.start // share, -(-piece.heads.stop // share))
            return grouped(piece.pattern, self.v[piece.batch, served, piece.keys])

        return self.collected(of, queries, width).transpose(1, 2).contiguous()

    def of_rows(self, rows: slice) -> "Attention":
        """Some rows of the batch alone."""
        if self.change is not None and self.q.shape[0] > 1:
            raise ValueError(
                "edited attention cannot be split into the rows of its batch; read rows(), mass() or the like instead "
                "of lazy(), or run the rows one by one."
            )
        everything = slice(None)
        return replace(
            self,
            q=self.q[rows],
            k=self.k[rows],
            v=self.v[rows],
            sees=self.sees.narrowed(rows, everything, everything),
            z_gradient=None if self.z_gradient is None else self.z_gradient[rows],
        )
