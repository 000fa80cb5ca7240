"""What a layer is handed when it is called for some last positions of a prompt: arguments by name, mask and cache.

Rows of a batch may be packed: they stand behind one another as one sequence, which sees the positions before once, and
each row itself. So keys and values of those positions are not copied for every row, which costs more than the row where
few positions are run.

Rule this module guards: a mask says of each query what the model's own mask says of it, and hides other rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechvlm.calls import MASKED
from mechvlm.start import ALONG, CACHE, MASK, REPEATED, Start


class Enough(Exception):  # noqa: N818 - ends a layer where its keys and values are made
    """A layer's keys and values are there, and the rest of it is not wanted."""


@dataclass
class Prefix:
    """What a layer takes for its cache: the keys and values of the positions before.

    Attributes:
        held: keys and values, `batch kv_head pos d_head`.
        whole: whether they are those of all positions already.
        taking: whether the layer is to end where its keys and values are made.
    """

    held: tuple[Tensor, ...]
    whole: bool = False
    taking: bool = False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """All keys and values, as a layer asks its cache for them."""
        if not self.whole:
            pairs = zip(self.held, (keys, values), strict=True)
            self.held = tuple(torch.cat([x.expand(len(y), *x.shape[1:]), y], 2) for x, y in pairs)
        if self.taking:
            raise Enough
        return self.held


def packs(start: Start, layer: int, h: Tensor, first: int) -> bool:
    """Whether rows are cheaper as one sequence than as a batch: where they are short beside what stands before them."""
    rows, run = h.shape[:2]
    block = start.vlm.arch.text.blocks[layer]
    short = rows * run <= 2 * len(start.prompt) - first
    return rows > 1 and bool(first) and bool(block.attention) and start.vlm.attention in MASKED and short


def arguments(
    start: Start, layer: int, sizes: tuple[int, int, int], masks: dict[tuple, Tensor], packed: bool = False
) -> dict[str, Any]:
    """What a layer is handed beside the residual stream.

    Args:
        sizes: rows; positions that are run, to the end of the prompt; how many of them, to the end, are queries.
        masks: those made before.
        packed: whether rows stand behind one another as one sequence.
    """
    rows, run, queries = sizes
    named, length = dict(start.given[layer]), len(start.prompt)
    times = rows if packed else 1
    for name, axis in ALONG.items():
        value = named.get(name)
        if isinstance(value, tuple):
            named[name] = tuple(along(x, axis, length - queries, times) for x in value)
        elif value is not None and name != MASK:
            named[name] = along(value, axis, length - queries, times)
    for name in REPEATED:
        if isinstance(named.get(name), Tensor) and not packed:
            named[name] = named[name].repeat(rows, *[1] * (named[name].ndim - 1))
    if start.vlm.arch.text.blocks[layer].attention:
        named[CACHE] = Prefix(held(start, layer, length - run))
        named[MASK] = mask_of(start, named.get(MASK), sizes, masks, packed)
    return named


def along(x: Tensor, axis: int, first: int, times: int) -> Tensor:
    """The part of an argument that belongs to some last positions, once for each row that is packed."""
    part = x.narrow(axis, first, x.shape[axis] - first)
    return torch.cat([part] * times, axis) if times > 1 else part


def held(start: Start, layer: int, first: int) -> tuple[Tensor, ...]:
    """A layer's keys and values of the positions before, as `1 kv_head pos d_head`."""
    sites = [(kind, layer, "text") for kind in ("k", "v")]
    return tuple(start.sites[site].transpose(1, 2)[:, :, :first] for site in sites)


def mask_of(
    start: Start, own: Tensor | None, sizes: tuple[int, int, int], masks: dict[tuple, Tensor], packed: bool
) -> Tensor | None:
    """The mask of some last positions; None where the kernel's own is right.

    Args:
        own: the mask of the whole prompt, that the model made.
    """
    (rows, run, queries), length = sizes, len(start.prompt)
    if start.vlm.attention not in MASKED or (own is None and not packed and queries in (1, length)):
        return own
    key = (None if own is None else own.data_ptr(), rows if packed else 1, run, queries)
    if key not in masks:
        # The kernel's own causal mask takes the first query for the first position.
        device = start.logits.device
        causal = torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)[None, None]
        part = causal if own is None else own[..., length - queries :, :]
        masks[key] = packed_mask(part, rows, length - run) if packed else part
    return masks[key]


def packed_mask(part: Tensor, rows: int, first: int) -> Tensor:
    """The mask of packed rows: each sees the positions before, and itself.

    Args:
        part: of one row, `1 1 query key`.
    """
    queries, run = part.shape[2], part.shape[3] - first
    hidden = False if part.dtype == torch.bool else torch.finfo(part.dtype).min
    whole = torch.full((rows, queries, rows, run), hidden, dtype=part.dtype, device=part.device)
    whole[range(rows), :, range(rows)] = part[0, 0, :, first:]
    before = part[0, 0, :, :first].expand(rows, queries, first).reshape(rows * queries, first)
    return torch.cat([before, whole.reshape(rows * queries, rows * run)], 1)[None, None]
