"""Units of work, shared by however many processes see one folder.

A unit is done when its file is there. A process takes one that is neither done nor taken, and waits at the end for
those that others do, so that each process has all of the result. One that dies costs its unit, which another takes.

Rule this module guards: what a unit is depends on the work alone, never on who does it or what was finished before; so
a result is the same number for number, whether one process made it or several.

>>> def work(group):
...     (run,) = yield [{"prompt": [real, null][group[0]]}]
...     return arrays(most=run.logits.max().item())
>>> [float(one.most.round(1)) for one in worked(vlm, [real, null], [[0], [1]], work)]
[10.0, 11.0]
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from tqdm import tqdm

from mechvlm.fingerprints import fingerprint, weights_print
from mechvlm.finished import Folder
from mechvlm.processes import alone, here
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, done, together
from mechvlm.vlm import VLM

PAUSE = 0.1
"""Seconds between looks at what others have finished, where nothing is left to take."""
STRETCHES = 4
"""Stretches for each process, of work that has no units of its own: more would cost, fewer would leave some idle."""

T = TypeVar("T")


def check_shared(out: Any, units: int) -> None:
    """Refuse that each of several processes does all of some units.

    Raises:
        ValueError: where there are several processes and no folder.
    """
    own = here()
    if out is None and own.count > 1 and units > 1:
        raise ValueError(
            f"this is process {own.number} of {own.count}, and each of them would do all of this work; give out=, a "
            "folder that all of them see, so that they share it."
        )


def taken(folder: Folder | None, count: int, left: Callable[[], Collection[int]]) -> Iterator[int]:
    """Units to do here, by their number, until none is left; those that others do are waited for.

    Args:
        count: how many units there are.
        left: which are not done, as the folder is now.
    """
    if folder is None:
        yield from left()
        return
    own = here()
    start = own.number * count // own.count  # each at its own place, in case the file system knows no locks
    while waiting := sorted(left(), key=lambda number: (number - start) % count):
        took = False
        for number in waiting:
            with folder.claim(str(number)) as mine:
                if mine and number in left():
                    took = True
                    yield number
        if not took:
            time.sleep(PAUSE)


def progress(total: int, unit: str, done: int = 0, name: str | None = None, quiet: bool = False) -> tqdm:
    """A bar that shows after a second, in the first of several processes; none where all is done at once."""
    off = quiet or here().quiet or None
    return tqdm(total=total, initial=done, unit=unit, desc=name, leave=False, delay=1, disable=off)


def stretches(points: int) -> list[range]:
    """Points of one sweep, divided where there are several processes.

    Example:
        >>> stretches(64)
        [range(0, 64)]
    """
    own = here()
    count = 1 if own.count == 1 else min(points, STRETCHES * own.count)
    ends = [points * at // count for at in range(count + 1)]
    return [range(*pair) for pair in zip(ends, ends[1:], strict=False)]


def worked(
    vlm: VLM,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Work[xr.Dataset]],
    out: str | Path | None = None,
    about: Sequence[Any] = (),
) -> Iterator[xr.Dataset]:
    """What some work makes of each group of prompts, in the order of the groups.

    What all groups ask for is one job where the model runs elsewhere; in several processes, each group's is.

    Args:
        groups: numbers of prompts; a group is a unit.
        work: from a group to work (`mechvlm.rounds`) that returns what was found, in plain arrays.
        out: a folder, in which each unit is kept; the same work, started again or in several processes, goes on from
            there. Another one is refused.
        about: what else makes this work another: its name and its arguments.

    Raises:
        ValueError: for a folder that holds another work, or none where there are several processes.
    """
    check_shared(out, len(groups))
    bar = progress(len(prompts), "prompt")
    if out is None:
        with bar:
            for group, found in zip(groups, by_itself(together(vlm, map(work, groups))), strict=True):
                bar.update(len(group))
                yield found
        return
    folder = Folder(out, print_of(vlm, prompts, about), "part")
    kept: dict[int, Path] = {}

    def left() -> list[int]:
        for path in folder.fresh():
            number = int(path.name.split("-")[1])
            if not kept or number >= len(groups):
                folder.read(path)  # another's is refused before anything runs
            bar.update(0 if number in kept else len(groups[number]))
            kept[number] = path
        return [number for number in range(len(groups)) if number not in kept]

    def keeping(number: int) -> Work[None]:
        folder.keep(number, (yield from work(groups[number])))  # as it ends, and not when all have

    with bar:
        if vlm.place.remote and here().count == 1:
            for _ in together(vlm, [keeping(number) for number in left()]):
                pass
        for number in taken(folder, len(groups), left):
            with alone():
                folder.keep(number, done(vlm, work(groups[number])))
    yield from (folder.read(kept[number]) for number in range(len(groups)))


def by_itself(values: Iterator[T]) -> Iterator[T]:
    """Values, each made as if there were no other processes."""
    while True:
        with alone():
            try:
                value = next(values)
            except StopIteration:
                return
        yield value


def each(
    vlm: VLM, prompts: Sequence[Prompt], one: Callable[[int], Work[T]], out: str | Path | None, about: Sequence[Any]
) -> list[T]:
    """What an experiment that keeps its own points finds with each of some prompts, prompt by prompt.

    Args:
        one: the experiment as work, of a prompt by its number; what others have finished, it reads from their files.
    """
    if len(prompts) < 2:  # one, which may divide itself
        return [done(vlm, one(number)) for number in range(len(prompts))]
    mine: dict[int, T] = {}

    def work(group: Sequence[int]) -> Work[xr.Dataset]:
        mine[group[0]] = yield from one(group[0])
        return xr.Dataset()

    numbers = range(len(prompts))
    for _ in worked(vlm, prompts, [[number] for number in numbers], work, out, about):
        pass
    with alone():
        return [mine[number] if number in mine else done(vlm, one(number)) for number in numbers]


def print_of(vlm: VLM, prompts: Sequence[Prompt], about: Sequence[Any]) -> str:
    """What work on some prompts is: model, weights, edits, prompts and arguments."""
    said = {name: text for name, text in vlm.provenance(prompts[0]).items() if name not in ("device", "edits")}
    asked = [[prompt.encoding, prompt.spans] for prompt in prompts]
    return fingerprint(said, weights_print(vlm), list(vlm.edits), asked, list(about))


def arrays(**found: Any) -> xr.Dataset:
    """Arrays by their names, as a dataset whose axes mean nothing.

    Example:
        >>> dict(arrays(mass=np.zeros((2, 3))).sizes)
        {'mass 0': 2, 'mass 1': 3}
    """
    held = {name: np.asarray(values) for name, values in found.items()}
    return xr.Dataset({name: ([f"{name} {at}" for at in range(x.ndim)], x) for name, x in held.items()})
