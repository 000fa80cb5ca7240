"""Residual streams as logits, some of the vocabulary at a time.

Rule this module guards: the logits of all positions over all the vocabulary are never held together where they would
not fit, and what is said of them (likeliest tokens, probabilities, ranks) is what all of them together would say.

>>> h = vlm.run(real, read=["text.7.resid_post"])["text.7.resid_post"][0]
>>> decoded(vlm, h, top=2, words=[vlm.token_ids("yes")], piece=50)[0].shape == (len(real), 2)
True
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechvlm.attention import capped
from mechvlm.batch import check_width
from mechvlm.devices import plain, runs_on
from mechvlm.shapes import Parts, Shape
from mechvlm.sites import whole
from mechvlm.walk import at

BYTES = 16
"""What a logit takes while it is looked at: itself in two precisions, and what is worked out from it."""
Said = tuple[Int[Tensor, "pos top"], Float[Tensor, "pos top"], Float[Tensor, "pos word"], Int[Tensor, "pos word"]]
"""What residual streams say."""
FEWEST = 1024  # tokens of the vocabulary at once, below which products of matrices are slow


@dataclass(frozen=True)
class Readout:
    """Of a model, what readings may use where it runs: its final norm, its unembedding and its sizes.

    A reading that holds a `VLM` is sent with this in its place.
    """

    model: Any
    arch: Parts
    shape: Shape
    attention_budget: int

    @property
    def hf(self) -> Any:
        """The model itself."""
        return self.model._module

    def unembed(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Residual streams as logits."""
        return unembedded(self.model, self.arch, self.shape.logit_cap, h)


def unembedded(model: Any, arch: Parts, cap: float | None, h: Tensor) -> Tensor:
    """Residual streams as logits, through the final norm and the unembedding.

    Args:
        model: the nnsight model, through which a reading within a run may call its modules without being taken for the
            model's own call.
    """
    with torch.no_grad():
        return capped(at(model, arch.unembed)(normed(model, arch, h)), cap)


def normed(model: Any, arch: Parts, h: Tensor) -> Tensor:
    """Residual streams after the final norm."""
    embed, norm = at(model, str(arch.text.embed))._module, at(model, arch.norm)
    with torch.no_grad():
        device, dtype = runs_on(norm._module), embed.get_parameter("weight").dtype
        # Sent code may have no weights beside it: states are then where they have been made.
        found: Tensor = norm(h.to(h.device if device.type == "meta" else device, dtype))
        return found


def decoded(
    vlm: Any,
    h: Float[Tensor, "pos d_model"],
    top: int,
    words: Sequence[Sequence[int]] = (),
    piece: int | None = None,
) -> Said:
    """Streams through the final norm and the unembedding, in pieces that fit `vlm.attention_budget`.

    Args:
        top: how many of the likeliest tokens to name.
        words: token ids, the spellings of each word.
        piece: how many tokens of the vocabulary at once; by default what the budget allows.

    Returns:
        One row a position: the likeliest tokens and their log-probabilities, falling, `pos top`; of each word the
        log-probability, its spellings joined, in nats, and the rank of the best placed one, 1 the top, `pos word`.

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
        first, second, third, fourth = (torch.cat(part) for part in zip(*parts, strict=True))
        return first, second, third, fourth


def divisible(vlm: Any) -> bool:
    """Whether the unembedding is a plain matrix in memory; quantised or offloaded ones give all logits or none.

    Example:
        >>> divisible(vlm)
        True
    """
    head = at(vlm.hf, vlm.arch.unembed)
    return type(head) is torch.nn.Linear and not head.weight.is_meta and plain(head.weight)


class Vocabulary:
    """The logits of a few streams, piece by piece; the piece made last is kept."""

    def __init__(self, vlm: Any, h: Float[Tensor, "pos d_model"], columns: int) -> None:
        self.x = normed(vlm.model, vlm.arch, h)
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


def _decoded(vocabulary: Vocabulary, top: int, words: Sequence[Sequence[int]]) -> Said:
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
    return tokens, values[0] - total[:, None], of_words, ranks
