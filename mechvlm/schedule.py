"""Which points of a sweep run together: rows of one batch begin at one layer and one position.

Every row of a batch is run from the earliest layer and position among them, so rows that begin near each other belong
together; and each batch has a cost of its own, so that many rows are better than few. Both are weighed here in the
arithmetic of one position. What is chosen changes how long a sweep takes, and nothing that it finds.

>>> [len(batch.points) for batch in batches([Reach(0, 5), Reach(0, 6), Reach(7, 9)], 10, 8, Cost(24, 4, 64))]
[2, 1]
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
UNKNOWN = 2**31
"""Bytes taken for free where a system does not say."""


@dataclass(frozen=True)
class Cost:
    """What batches cost, in the arithmetic of one position of one layer, and how large they may be.

    Attributes:
        batch: of a layer, for being called.
        row: of a row, for its keys and values.
        most: positions of all rows together.
    """

    batch: float
    row: float
    most: int
    rows: int = MOST_ROWS


@dataclass(frozen=True)
class Batch:
    """Points that run together, by their number, and where they begin."""

    points: tuple[int, ...]
    reach: Reach


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
    most = max(1, int(free_memory(vlm.device) * SHARE_OF_MEMORY / each))
    return Cost(call * speed / position + reading, length * heads / (6 * width), most, rows or MOST_ROWS)


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
    """Points put together where that is cheaper than apart, in the order of where they begin."""
    order = sorted(
        range(len(reaches)), key=lambda point: (reaches[point].last, reaches[point].begin, -reaches[point].first)
    )
    found: list[Batch] = []
    held: list[int] = []
    reach = Reach(0, 0)
    for point in order:
        one = reaches[point]
        joint = Reach(min(reach.begin, one.begin), min(reach.first, one.first), one.last)
        if held and reach.last == one.last and fits(reach, one, joint, len(held), length, layers, cost):
            held.append(point)
            reach = joint
            continue
        found += [Batch(tuple(held), reach)] if held else []
        held, reach = [point], one
    return [*found, Batch(tuple(held), reach)] if held else found


def fits(reach: Reach, one: Reach, joint: Reach, rows: int, length: int, layers: int, cost: Cost) -> bool:
    """Whether one more point is run more cheaply in a batch of so many rows than in a batch of its own."""
    wide = (rows + 1) * (length - joint.first + cost.row)
    if rows >= cost.rows or (rows + 1) * length > cost.most:
        return False
    now = (layers - reach.begin + 1) * rows * (length - reach.first + cost.row)
    apart = (layers - one.begin + 1) * (cost.batch + length - one.first + cost.row)
    return (layers - joint.begin + 1) * wide - now <= apart
