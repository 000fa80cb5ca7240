"""Many experiments on one prompt: each a list of edits, all answered by the last position's logits.

The prompt is run once. A point is then run from where its edits begin, many points as rows of one batch
(`mechvlm.rerun`), or, where that cannot be, as a row of a full pass. Both are exact; `how` says which it was, and why.

Rule this module guards: that layers may be called by themselves is tried on this model and this prompt, and believed
only where the logits come out the same.

>>> way = way_of(vlm, real, [[mv.ablate_heads(layer, [0])] for layer in range(8)])
>>> way.how
'rerun from the edited layer; last layer for the last position'
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mechvlm.between import Reaching
from mechvlm.edits import Edit
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.reach import Reach, reach_of, whole_from
from mechvlm.rerun import rerun
from mechvlm.rounds import Work, done
from mechvlm.schedule import Batch, batches, cost_of
from mechvlm.sites import whole
from mechvlm.start import Start, start_of, tried

FEW = 4
"""Points from which on the run that is kept, and its trial, are worth their time."""
POSITIONS_AT_ONCE = 8192
"""Positions of all rows of a full pass together, which bounds its memory."""
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Way:
    """How points are to be run.

    Attributes:
        start: the run they begin from; None where all are full passes.
        batches: points that are rerun together.
        full: points that need a full pass.
        rows: so many of these in one pass.
        how: the same in words.
    """

    vlm: Any
    prompt: Prompt
    variants: Sequence[Sequence[Edit]]
    start: Start | None
    batches: Sequence[Batch]
    full: Sequence[int]
    rows: int
    how: str


def rows_for(prompt: Prompt) -> int:
    """How many rows of a prompt to run at once."""
    return min(ROWS_AT_ONCE, max(1, POSITIONS_AT_ONCE // len(prompt)))


def rows_at_once(batch_size: int | None, otherwise: int) -> int:
    """How many rows one pass has.

    Raises:
        ValueError: for a batch size below one.

    Example:
        >>> rows_at_once(None, 8), rows_at_once(2, 8)
        (8, 2)
    """
    size = otherwise if batch_size is None else whole("batch_size", batch_size)
    if size < 1:
        raise ValueError(f"batch_size={size} runs nothing; give 1 or more.")
    return size


def way_of(
    vlm: Any,
    prompt: Prompt,
    variants: Sequence[Sequence[Edit]],
    rows: int | None = None,
    fast: bool = True,
    points: Sequence[int] | None = None,
) -> Way:
    """How to run points, each a list of edits.

    Args:
        rows: at most so many in one batch.
        fast: False makes each point a row of a full pass.
        points: those to run, by their number; None for all.

    Raises:
        ValueError, TypeError: for a number of rows below one, or edits that cannot be.
    """
    size = rows_at_once(rows, rows_for(prompt))
    asked = list(range(len(variants))) if points is None else list(points)
    if variants:
        vlm.plan([prompt], variants=list(variants))  # what cannot be is said before anything runs
    if not fast or len(asked) < FEW or vlm.place.remote:
        why = "the model runs elsewhere" if vlm.place.remote else "they are few" if fast else "it was asked for"
        return Way(vlm, prompt, variants, None, (), asked, size, f"a full pass for each point, since {why}")
    start = tested(start_of(vlm, prompt, {site for point in asked for site in tried(variants[point])}))
    reaches = [reach_of(start, variants[point]) for point in asked]
    full = [point for point, reach in zip(asked, reaches, strict=True) if reach is None]
    known = [(point, reach) for point, reach in zip(asked, reaches, strict=True) if reach is not None]
    cost = cost_of(vlm, len(prompt), rows)
    made = batches([reach for _, reach in known], len(prompt), start.layers, cost)
    made = [replace(one, points=tuple(known[at][0] for at in one.points)) for one in made]
    return Way(vlm, prompt, variants, start, made, full, size, told_how(start, made, full))


def tested(start: Start) -> Start:
    """A start, once layers called by themselves have given the logits that the whole model gave."""
    if start.hindrance:
        return start
    try:
        own = rerun(start, [[]], [Reach(0, trial_from(start))])
    except Reaching:
        return replace(start, hindrance="edits of the model's own do not do the same each time, or not to each part")
    gap, scale = float((own - start.logits).abs().max()), float(start.logits.abs().max())
    if gap <= (0.03 if start.logits.dtype.itemsize == 2 else 2e-5) * scale:
        return start
    return replace(start, hindrance=f"layers called by themselves answer otherwise than the model, by {gap:.2g}")


def trial_from(start: Start) -> int:
    """Where the trial begins: at the last image token, or where the model's own edits let it."""
    first = start.cut(start.prompt.image[-1] if start.prompt.image else len(start.prompt) // 2)
    for edit in start.vlm.edits:
        first = start.cut(min(first, whole_from(start, edit, 0, first)))
    return first


def told_how(start: Start, made: Sequence[Batch], full: Sequence[int]) -> str:
    """How points are run, in words."""
    if not made:
        why = start.hindrance or "the edits act where the picture is still being read"
        return f"a full pass for each point, since {why}"
    reused = any(reach.first and not reach.last for one in made for reach in one.reaches)
    bidirectional = len(start.cuts) < len(start.prompt)
    parts = ["rerun from the edited layer"]
    if reused:
        parts.append("earlier positions reused")
    elif len(start.cuts) == 1:
        parts.append("earlier positions not reused, since all words see each other")
    if reused and bidirectional:
        parts.append("image tokens that see each other rerun together")
    parts.append("last layer for the last position")
    if full:
        parts.append(f"{len(full)} points by full passes")
    return "; ".join(parts)


def answers(way: Way, value: Metric | None = None) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The points that ran together, by their number, and their logits, `batch vocab`.

    Args:
        value: what is wanted of the logits instead of themselves, `(batch vocab) -> (batch)`.
    """
    yield from done(way.vlm, answering(way, value))


def answering(way: Way, value: Metric | None = None) -> Work[Iterator[tuple[tuple[int, ...], Tensor]]]:
    """The same as work (`mechvlm.rounds`): elsewhere full passes are asked for, here each is run when its turn comes.

    Args:
        value: as in `answers`.
    """
    if not way.vlm.place.remote:
        return ran_here(way, value)
    groups = grouped(way)
    runs = yield [
        {"by": way.vlm, "prompt": way.prompt, "variants": [way.variants[point] for point in some], "value": value}
        for some in groups
    ]
    found: list[Any] = [run.logits if value is None else run.metric for run in runs]
    return zip(groups, found, strict=True)


def grouped(way: Way) -> list[tuple[int, ...]]:
    """Points that are rows of one full pass."""
    return [tuple(way.full[at : at + way.rows]) for at in range(0, len(way.full), way.rows)]


def ran_here(way: Way, value: Metric | None) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Points as they are run in this process."""
    for batch in way.batches:
        yield from ((points, of(value, logits)) for points, logits in rerun_some(way, batch))
    for some in grouped(way):
        yield from ((points, of(value, logits)) for points, logits in full_passes(way, some))


def of(value: Metric | None, logits: Tensor) -> Tensor:
    """What is wanted of logits."""
    return logits if value is None else value(logits)


def rerun_some(way: Way, batch: Batch, first: int | None = None) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A batch of reruns; two halves of it where memory does not suffice.

    Args:
        first: the position to begin with; by default the first that a point begins with.
    """
    assert way.start is not None
    halves, begins = [batch], first
    try:
        yield batch.points, rerun(way.start, [way.variants[point] for point in batch.points], batch.reaches, first)
        return
    except Reaching:
        begins = 0
    except RuntimeError as error:
        if len(batch.points) == 1 or not out_of_memory(error):
            raise
        pairs = zip(halved(batch.points), halved(batch.reaches), strict=True)
        halves = [Batch(*pair) for pair in pairs]
    for half in halves:
        yield from rerun_some(way, half, begins)


def full_passes(way: Way, points: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A batch of full passes; two halves of it where memory does not suffice."""
    try:
        yield points, way.vlm.run(way.prompt, variants=[way.variants[point] for point in points]).logits
        return
    except RuntimeError as error:
        if len(points) == 1 or not out_of_memory(error):
            raise
    for half in halved(points):
        yield from full_passes(way, half)


def halved(points: tuple) -> list[tuple]:
    """Two halves."""
    return [points[: len(points) // 2], points[len(points) // 2 :]]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
