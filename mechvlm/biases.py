"""Changes of scores that a fused kernel can be asked for: numbers added to them, and factors they are multiplied by.

Rule this module guards: a change is defined on the scores, and every way of making it gives the same. An additive mask,
or more features of queries and keys, whose products are what is to be added, need no scores.

>>> Bias(keys=(0, 1), amount=2.0, queries=(-1,)).mask(4, torch.tensor([2]), 3, 3, torch.zeros(1))
tensor([[[[2., 2., 0.]]]])
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.masks import indicator

OUT_OF_SIGHT = -1e4
"""What is added to the scores of a key that is cut by a feature; its weight is exactly zero then."""


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
        return self.at(scores, *last_of(scores, self.cross))

    def at(
        self, scores: Float[Tensor, "batch head some key"], queries: Int[Tensor, " some"], count: int
    ) -> Float[Tensor, "batch head some key"]:
        """The biased scores of queries at some of so many positions."""
        return scores + self.mask(scores.shape[1], queries, count, scores.shape[3], scores)

    def mask(
        self, head: int, queries: Int[Tensor, " some"], count: int, key: int, like: Tensor
    ) -> Float[Tensor, "1 heads some key"]:
        """The bias as something to add to the scores; one head where all heads are treated alike."""
        where = where_of(self, head, queries, count, key)
        amount = torch.tensor(self.amount, dtype=torch.float64).to(like)  # too large a number becomes infinite
        added = torch.zeros(where.shape, dtype=like.dtype, device=like.device)
        return added.masked_fill(where.to(like.device), amount)[None]


@dataclass(frozen=True)
class Scale:
    """A factor on the scores of some keys, for some queries and heads; None means all of them. As `Bias` otherwise."""

    keys: tuple[int, ...]
    factor: float
    queries: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    cross: bool = False

    @property
    def amount(self) -> float:
        """How far the factor is from changing nothing."""
        return self.factor - 1

    def __call__(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """The scaled scores; as for `Bias`."""
        return self.at(scores, *last_of(scores, self.cross))

    def at(
        self, scores: Float[Tensor, "batch head some key"], queries: Int[Tensor, " some"], count: int
    ) -> Float[Tensor, "batch head some key"]:
        """The scaled scores of queries at some of so many positions. What is masked stays so."""
        where = where_of(self, scores.shape[1], queries, count, scores.shape[3]).to(scores.device)
        return torch.where(where & (scores != -torch.inf), scores * self.factor, scores)


Change = Bias | Scale


def last_of(scores: Tensor, cross: bool) -> tuple[Int[Tensor, " query"], int]:
    """The positions of the queries that scores have, and of how many: the last of their keys, or, across, their own."""
    query, key = scores.shape[2:]
    return (torch.arange(query), query) if cross else (torch.arange(key - query, key), key)


def where_of(
    change: Change, head: int, queries: Int[Tensor, " some"], count: int, key: int
) -> Bool[Tensor, "heads some key"]:
    """Which scores are changed; one head where all heads are treated alike."""
    heads = torch.ones(1, dtype=torch.bool) if change.heads is None else indicator(change.heads, head)
    among = indicator(change.queries, count)[queries.cpu()]
    return heads[:, None, None] & among[:, None] & indicator(change.keys, key)


def bias_features(
    bias: Bias, head: int, queries: Int[Tensor, " some"], count: int, key: int, scale: float, like: Tensor
) -> tuple[Float[Tensor, "head some"], Float[Tensor, "key 2"]]:
    """Features of queries and of keys whose products, scaled, are the bias.

    For kernels that take no mask. The query's feature is one where the bias applies to it. The key's two hold the
    amount as a number of the kernel's type and what is left of it, since a type of 16 bits holds three figures.
    """
    heads = torch.ones(head, dtype=torch.bool) if bias.heads is None else indicator(bias.heads, head)
    among = indicator(bias.queries, count)[queries.cpu()]
    wanted = max(bias.amount, OUT_OF_SIGHT) / scale
    wanted = max(wanted, torch.finfo(like.dtype).min)
    coarse = torch.tensor(wanted, dtype=torch.float64).to(like.dtype)
    fine = (wanted - coarse.double()).to(like.dtype)
    to_key = indicator(bias.keys, key)[:, None] * torch.stack([coarse, fine])
    return (heads[:, None] & among).to(like), to_key.to(like)


def scale_features(
    change: Scale,
    q: Float[Tensor, "batch head some d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    queries: Int[Tensor, " some"],
    count: int,
) -> tuple[Float[Tensor, "batch head some d_head"], Float[Tensor, "batch kv_head key d_head"]]:
    """The queries and keys that are added as features, so that their products come a factor more."""
    head, key = q.shape[1], k.shape[2]
    heads = torch.ones(head, dtype=torch.bool) if change.heads is None else indicator(change.heads, head)
    among = heads[:, None] & indicator(change.queries, count)[queries.cpu()]
    keys = indicator(change.keys, key)[:, None].to(k) * change.amount
    return q * among[:, :, None].to(q), k * keys


def fits_together(changes: list[Change]) -> bool:
    """Whether changes act alike one after the other and all at once.

    No factor stands behind a bias, or behind another factor on the same keys.
    """
    for at, change in enumerate(changes):
        before = changes[:at] if isinstance(change, Scale) else []
        if any(isinstance(other, Bias) or set(other.keys) & set(change.keys) for other in before):
            return False
    return True
