"""Which points of a sweep run together: rows of one batch, which begin at one position and join at their layers.

Every row of a batch is run from the earliest position among them, so rows that begin near each other belong together;
and each call of a layer has a cost of its own, so that many rows are better than few. Both are weighed here in the
arithmetic of one position. What is chosen changes how long a sweep takes, and nothing that it finds.

>>> [len(batch.points) for batch in batches([Reach(0, 5), Reach(2, 6), Reach(0, 90)], 100, 8, Cost(24, 640))]
[1, 2]
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mechvlm.reach import Reach

SHARE_OF_MEMORY = 0.4
"""Of the memory that is free, how much a batch may take."""
MOST_ROWS = 256
WITHIN_CACHE = 1024
"""Positions of all rows beyond which a CPU's caches do not hold what passes between two operations."""
UNKNOWN = 2**31
"""Bytes taken for free where a system does not say."""


@dataclass(frozen=True)
class Cost:
    """What batches cost, in the arithmetic of one position of one layer, and how large they may be.

    Attributes:
        batch: of a layer, for being called.
        most: positions of all rows together.
        rows: rows at most.
    """

    batch: float
    most: int
    rows: int = MOST_ROWS


@dataclass(frozen=True)
class Batch:
    """Points that run together, by their number, and where each begins."""

    points: tuple[int, ...]
    reaches: tuple[Reach, ...]


def cost_of(vlm: Any, length: int, rows: int | None = None) -> Cost:
    """What batches of a model cost, by its size and where it runs; estimates, which time alone depends on.

    Args:
        rows: at most so many in a batch.
    """
    width, heads = vlm.shape.d_model["text"], vlm.shape.kv_heads["text"] * vlm.shape.d_head["text"]
    # Seconds for a call of a layer, arithmetic a second, and the positions that reading the weights is worth.
    call, speed, reading = (1e-3, 3e14, 150.0) if vlm.device.type == "cuda" else (6e-4, 8e10, 6.0)
    position = 24 * width**2
    size = vlm.dtype.itemsize
    each = size * (16 * width + 2 * vlm.shape.vocabulary // max(length, 1)) + size * 4 * heads
    each += size * vlm.shape.heads["text"] * length * (vlm.attention == "eager")
    held = int(free_memory(vlm.device) * SHARE_OF_MEMORY / each)
    fit = max(1, min(rows or MOST_ROWS, held // length))
    return Cost(call * speed / position + reading, max(length, WITHIN_CACHE if vlm.device.type == "cpu" else held), fit)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model runs."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + (
            torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    if os.name != "posix" or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return UNKNOWN
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def batches(reaches: Sequence[Reach], length: int, layers: int, cost: Cost) -> list[Batch]:
    """Points put together where that is cheaper than apart, the last positions first."""
    order = sorted(range(len(reaches)), key=lambda point: (-reaches[point].first, reaches[point].begin))
    found: list[list[int]] = []
    first = begin = work = 0
    for point in order:
        one = reaches[point]
        own = layers - one.begin + 1
        # What one more costs beside its own work: others are run from its position on, and layers are called for it.
        more = work * (first - one.first) + cost.batch * max(0, begin - one.begin)
        rows = len(found[-1]) + 1 if found else 0
        if found and rows <= cost.rows and rows * (length - one.first) <= cost.most and more <= cost.batch * own:
            found[-1].append(point)
            begin, work = min(begin, one.begin), work + own
        else:
            found.append([point])
            begin, work = one.begin, own
        first = one.first
    return [Batch(tuple(points), tuple(reaches[point] for point in points)) for points in found]
