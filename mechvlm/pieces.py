"""The pieces in which one layer's attention is made: some rows of some heads at a time, within a budget of memory.

Rule this module guards: no map of all queries by all keys is held; a piece has only the keys that its queries can see.
Shapes are those of `mechvlm.attention`.

>>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
>>> [piece.keys.stop for piece in Pieces(q, k, k, Sees(5, 5, causal=True), 8**-0.5, budget=400).pieces([0, 3])]
[1, 4]
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mechvlm.attention import COPIES, Change, Piece, blocks, grouped, pattern, scores
from mechvlm.masks import Sees, within

Own = TypeVar("Own", bound="Pieces")


@dataclass(frozen=True, eq=False, repr=False)
class Pieces:
    """One layer's attention as what it is made of; `mechvlm.lazy_attention.Attention` says what can be asked of it.

    Attributes:
        q, k, v, scale, cap, sees: what the kernel was handed, biases included.
        own: which keys the model itself lets each query look at; None where that is `sees`.
        budget: how many bytes the pieces may take at once.
        z_gradient: `batch query head d_head`, or None.
        change: edits of scores and pattern, or None.
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
    own: Sees | None = None

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

    def sight(self: Own) -> Own:
        """Attention that every query spreads evenly over the keys that the model lets it see, as a single head's."""
        nothing = self.q.new_zeros(1, 1, self.q.shape[2], 1), self.k.new_zeros(1, 1, self.k.shape[2], 1)
        everything = slice(None)
        sees = (self.own or self.sees).narrowed([0], everything, everything)
        return type(self)(nothing[0], nothing[1], nothing[1], sees, 1.0, budget=self.budget)

    def of_rows(self: Own, rows: slice) -> Own:
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
            own=None if self.own is None else self.own.narrowed(rows, everything, everything),
            z_gradient=None if self.z_gradient is None else self.z_gradient[rows],
        )
