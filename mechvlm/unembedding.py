"""Residual streams as logits, some of the vocabulary at a time.

Rule this module guards: the logits of all positions over all the vocabulary are never held together where they would
not fit, and what is said of them (likeliest tokens, probabilities, ranks) is what all of them together would say.

>>> h = vlm.run(real, read=["text.7.resid_post"])["text.7.resid_post"][0]
>>> Decoded.of(vlm, h, top=2, words=[vlm.token_ids("yes")], piece=50).likeliest.shape == (len(real), 2)
True
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.attention import capped
from mechvlm.batch import check_width
from mechvlm.sites import whole
from mechvlm.walk import at

BYTES = 16
"""What a logit takes while it is looked at: itself in two precisions, and what is worked out from it."""
FEWEST = 1024  # tokens of the vocabulary at once, below which products of matrices are slow


class Decoded(NamedTuple):
    """What residual streams say, one row a position."""

    likeliest: Int[Tensor, "pos top"]
    log_probability: Float[Tensor, "pos top"]
    words: Float[Tensor, "pos word"]
    ranks: Int[Tensor, "pos word"]

    @classmethod
    def of(
        cls,
        vlm: Any,
        h: Float[Tensor, "pos d_model"],
        top: int,
        words: Sequence[Sequence[int]] = (),
        piece: int | None = None,
    ) -> "Decoded":
        """Streams through the final norm and the unembedding, in pieces that fit `vlm.attention_budget`.

        Args:
            top: how many of the likeliest tokens to name.
            words: token ids, the spellings of each word; `words` are their log-probabilities, the spellings of a word
                joined, in nats, and `ranks` the place of the best placed one, 1 the top.
            piece: how many tokens of the vocabulary at once; by default what the budget allows.

        Raises:
            ValueError: for what are no residual streams, or a piece of nothing.
        """
        check_width(h, vlm.shape.d_model["text"])
        width, held = vlm.shape.vocabulary, max(1, vlm.attention_budget // BYTES)
        if piece is not None and whole("piece", piece) < 1:
            raise ValueError(f"piece={piece} holds no token; give how many of the vocabulary to decode at once.")
        columns = min(width, max(FEWEST, held // max(1, len(h))) if piece is None else piece)
        columns = columns if divisible(vlm) else width
        with torch.no_grad():
            rows = h.split(max(1, held // columns))
            parts = [_decoded(Vocabulary(vlm, some, columns), top, words) for some in rows]
            return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))


def divisible(vlm: Any) -> bool:
    """Whether the unembedding is a plain matrix in memory; quantised or offloaded ones give all logits or none.

    Example:
        >>> divisible(vlm)
        True
    """
    head = at(vlm.hf, vlm.arch.unembed)
    return type(head) is torch.nn.Linear and not head.weight.is_meta


class Vocabulary:
    """The logits of a few streams, piece by piece; the piece made last is kept."""

    def __init__(self, vlm: Any, h: Float[Tensor, "pos d_model"], columns: int) -> None:
        # Through nnsight, so that a reading within a run may call it without being taken for the model's own call.
        self.x = at(vlm.model, vlm.arch.norm)(h.to(vlm.device, vlm.dtype))
        self.through, self.own = at(vlm.model, vlm.arch.unembed), at(vlm.hf, vlm.arch.unembed)
        self.cap, self.width, self.columns, self.start = vlm.shape.logit_cap, vlm.shape.vocabulary, columns, -1

    def starts(self) -> range:
        """Where pieces start."""
        return range(0, self.width, self.columns)

    def piece(self, start: int) -> Float[Tensor, "pos piece"]:
        """The logits from one token on, in single precision at least."""
        if start != self.start:
            if self.columns >= self.width:
                made = self.through(self.x)
            else:
                part = slice(start, start + self.columns)
                bias = None if self.own.bias is None else self.own.bias[part]
                made = torch.nn.functional.linear(self.x.to(self.own.weight.device), self.own.weight[part], bias)
            made = capped(made, self.cap)
            self.kept, self.start = made.to(torch.promote_types(made.dtype, torch.float32)), start
        return self.kept

    def logits(self, tokens: Sequence[int]) -> Float[Tensor, "pos token"]:
        """The logits of some tokens, each from the piece that it is in, so that it equals itself there bit for bit."""
        places = [divmod(number, self.columns) for number in sorted(tokens)]
        return torch.stack([self.piece(part * self.columns)[:, column] for part, column in places], -1)


def _decoded(vocabulary: Vocabulary, top: int, words: Sequence[Sequence[int]]) -> Decoded:
    """What one block of positions says: best tokens, sums and ranks carried from piece to piece."""
    said = [vocabulary.logits(same) for same in words]
    best = [one.amax(-1, keepdim=True) for one in said]
    above = [torch.zeros_like(one[:, 0], dtype=torch.long) for one in best]
    values: list[Tensor] = []
    for start in vocabulary.starts():
        piece = vocabulary.piece(start)
        found = piece.topk(min(top, piece.shape[-1]))
        if not values:
            total, values, tokens = piece.logsumexp(-1), [found.values], found.indices
        else:
            total = torch.logaddexp(total, piece.logsumexp(-1))
            both = torch.cat([values[0], found.values], -1)
            kept = both.topk(min(top, both.shape[-1]))
            tokens = torch.cat([tokens, found.indices + start], -1).gather(-1, kept.indices)
            values = [kept.values]
        above = [count + (piece > one).sum(-1) for count, one in zip(above, best, strict=True)]
    none = values[0].new_zeros(len(values[0]), 0)
    of_words = torch.stack([one.logsumexp(-1) - total for one in said], -1) if said else none
    ranks = torch.stack([1 + count for count in above], -1) if said else none.long()
    return Decoded(tokens, values[0] - total[:, None], of_words, ranks)
