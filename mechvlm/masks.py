"""Which keys each query of an attention call may look at, without the square of all queries by all keys.

Rule this module guards: nothing that is read makes a mask whole that no kernel was handed as a tensor. It is a rule
(causal, within a window, within one image's stretch, what a `BlockMask` says), and is written out for some queries at a
time.

>>> Sees(3, 3, causal=True).added(torch.tensor([0, 2]), slice(0, 3), torch.zeros(1))
tensor([[[[0., -inf, -inf],
          [0., 0., 0.]]]])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.sites import whole_numbers

Rule = Callable[[Int[Tensor, "some 1"], Int[Tensor, "1 key"]], Bool[Tensor, "*axes some key"]]


@dataclass(frozen=True, eq=False)
class Sees:
    """Who may look at whom, in one attention call.

    Attributes:
        query, key: how many there are. Without a tensor, the queries are the last positions of the keys.
        handed: a tensor `rows heads query key`, to add to the scores or boolean (True: may look). Its forbidden places
            hold minus infinity, or the lowest finite number, as Hugging Face writes them.
        causal: no query sees what stands behind it; as all that follows, only where no tensor was handed.
        window: how many keys a query sees at most, itself included.
        padding: True for keys that are there, `batch key`.
        stretch: a number for each position, rising; only positions with the same number see each other.
        rule: from indices of queries and of keys to whether they may meet.
        kept: the same for what edits have left, `rows heads query key`, which holds beside all else.
        missing: so many first keys are seen by nobody, and the tensor does not have them.
    """

    query: int
    key: int
    handed: Tensor | None = None
    causal: bool = False
    window: int | None = None
    padding: Bool[Tensor, "batch key"] | None = None
    stretch: Int[Tensor, " key"] | None = None
    rule: Rule | None = None
    missing: int = 0
    kept: Rule | None = None

    @property
    def simple(self) -> bool:
        """Whether a kernel can be told by its `is_causal` alone."""
        more = (self.handed, self.window, self.padding, self.stretch, self.rule, self.kept)
        return all(one is None for one in more) and not self.missing and self.query in (1, self.key)

    def reach(self, first: int, last: int) -> slice:
        """The keys that queries `first` to `last` see at most."""
        start, stop, before = 0, self.key, self.key - self.query
        if self.handed is None and self.stretch is not None:
            ids = self.stretch
            start = int(torch.searchsorted(ids, ids[first + before]))
            stop = int(torch.searchsorted(ids, ids[last + before], right=True))
        if self.handed is None and self.causal:
            stop = min(stop, last + before + 1)
            start = start if self.window is None else max(start, first + before - self.window + 1)
        start = min(max(start, self.missing), self.key - 1)
        return slice(start, max(stop, start + 1))  # at least one, seen or not

    def added(self, queries: Int[Tensor, " some"], keys: slice, like: Tensor) -> Float[Tensor, "rows heads some keys"]:
        """What is added to the scores of some queries: zero where they may look, minus infinity where not."""
        if self.kept is not None:
            place = torch.arange(keys.start, keys.stop, device=like.device)[None]
            cut = ~self.kept(queries.to(like.device)[:, None], place)
            return torch.where(cut, -torch.inf, replace(self, kept=None).added(queries, keys, like))
        if self.handed is not None:
            inner = slice(max(keys.start - self.missing, 0), max(keys.stop - self.missing, 0))
            some = added_of(self.handed[..., queries.to(self.handed.device), :][..., inner], like)
            return torch.nn.functional.pad(some, (max(self.missing - keys.start, 0), 0), value=-torch.inf)
        device = like.device
        last = (queries.to(device) + self.key - self.query)[:, None]
        place = torch.arange(keys.start, keys.stop, device=device)[None]
        allowed = place >= torch.full_like(last, self.missing)
        if self.causal:
            allowed = allowed & (place <= last)
        if self.window is not None:
            allowed = allowed & (place > last - self.window)
        if self.stretch is not None:
            ids = self.stretch.to(device)
            allowed = allowed & (ids[last] == ids[place])
        allowed = allowed[None, None]
        if self.rule is not None:
            allowed = allowed & self.rule(queries.to(device)[:, None], place)
        if self.padding is not None:
            allowed = allowed & self.padding[:, None, None, keys].to(device)
        return torch.zeros(allowed.shape, dtype=like.dtype, device=device).masked_fill(~allowed, -torch.inf)

    def whole(self, like: Tensor) -> Float[Tensor, "rows heads query key"]:
        """The same for all queries and keys at once."""
        return self.added(torch.arange(self.query), slice(0, self.key), like)

    def narrowed(self, rows: list[int] | slice, queries: slice, keys: slice) -> "Sees":
        """The same for some rows of a batch, and stretches of queries and of keys."""
        (first, last, _), (start, stop, _) = queries.indices(self.query), keys.indices(self.key)
        part = replace(
            self,
            query=last - first,
            key=stop - start,
            missing=max(self.missing - start, 0),
            kept=None if self.kept is None else shifted(self.kept, first, start, rows),
        )
        if self.handed is not None:
            own = self.handed[rows] if self.handed.shape[0] > 1 else self.handed
            inner = slice(max(start - self.missing, 0), stop - self.missing)
            return replace(part, handed=own[..., queries, inner])
        padding = self.padding if self.padding is None or self.padding.shape[0] == 1 else self.padding[rows]
        return replace(
            part,
            padding=None if padding is None else padding[:, keys],
            stretch=None if self.stretch is None else self.stretch[keys],
            rule=None if self.rule is None else shifted(self.rule, first, start, rows),
        )


def shifted(rule: Rule, first: int, start: int, rows: list[int] | slice = slice(None)) -> Rule:
    """A rule for some rows of a batch, whose indices count from other places."""

    def moved(queries: Tensor, keys: Tensor) -> Tensor:
        found = rule(queries + first, keys + start)
        return found[rows] if found.ndim == 4 and found.shape[0] > 1 else found

    return moved


def added_of(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask, or one whose forbidden places hold a very low number, as zeros and minus infinity to add."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf).to(like.dtype)


def sees_of(handed: object, q: Tensor, k: Tensor, causal: bool, window: int | None, missing: int = 0) -> Sees:
    """What a call's mask says, whatever its kernel takes.

    Args:
        handed: a tensor `rows heads query key`; a `BlockMask`, which FlexAttention takes; the padding `batch key`,
            which flash attention takes; or None.
        window: how many keys a query sees at most, for kernels that are told so and not by a mask.
        missing: how many of the first keys what was handed does not know of.
    """
    query, key = q.shape[2], k.shape[2]
    # A window that is no shorter than the text hides nothing.
    within = window if causal and window is not None and window < key else None
    rule = Sees(query, key, causal=causal, window=within, missing=missing)
    if handed is None:
        return rule
    if not isinstance(handed, Tensor):
        return replace(rule, causal=False, window=None, rule=shifted(block_rule(handed, q.shape[0]), 0, -missing))
    if handed.ndim == 2:
        there = handed[:, -(key - missing) :].bool()
        return replace(rule, padding=torch.nn.functional.pad(there, (missing, 0), value=False))
    return Sees(query, key, handed=handed[..., : key - missing], missing=missing)


def block_rule(handed: Any, batch: int) -> Rule:
    """What a FlexAttention block mask, whose function takes single indices, says of each query and key."""
    over_keys = torch.vmap(handed.mask_mod, (None, None, None, 0))
    over_queries = torch.vmap(over_keys, (None, None, 0, None))
    over_rows = torch.vmap(over_queries, (0, None, None, None))

    def rule(queries: Tensor, keys: Tensor) -> Tensor:
        rows = torch.arange(batch, device=keys.device)
        return over_rows(rows, rows.new_zeros(()), queries[:, 0], keys[0])[:, None]

    return rule


def within(what: str, indices: Sequence[int], count: int) -> list[int]:
    """Indices among so many, counted from 0.

    Raises:
        ValueError, TypeError: for one that is not there, an empty list, or what are no whole numbers.

    Example:
        >>> within("queries", [0, -1], 3)
        [0, 2]
    """
    found = whole_numbers(what, indices)
    beyond = [index for index in found if not -count <= index < count]
    if beyond or not found:
        given = f"hold {beyond[0]}" if beyond else "are an empty list"
        raise ValueError(f"the {what} {given}; this attention has {count}, counted from 0 (None means all).")
    return [index % count for index in found]


def indicator(positions: Sequence[int] | None, length: int) -> Bool[Tensor, " length"]:
    """Which of so many positions are among some; all of them for None.

    Example:
        >>> indicator([0, -1], 3)
        tensor([ True, False,  True])
    """
    if positions is None:
        return torch.ones(length, dtype=torch.bool)
    where = torch.zeros(length, dtype=torch.bool)
    where[list(positions)] = True
    return where
