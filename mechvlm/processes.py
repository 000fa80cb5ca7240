"""Which of how many processes this one is, where a script was started in several at once.

A launcher says so in the environment, which is all that is asked: `accelerate launch`, `torchrun` and MPI each set a
number, a count and a number on the machine. Processes say nothing to each other but by files (`mechvlm.units`).

Rule this module guards: a process knows its place without joining a group, so that one that dies holds up no other.

>>> here()
Process(number=0, count=1, local=0, quiet=False)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""What launchers call a process's number, their count, and its number on its machine."""


@dataclass(frozen=True)
class Process:
    """One of several processes.

    Args:
        number: which, from 0.
        count: how many there are.
        local: which on its machine, from 0: the number of its GPU.
        quiet: whether it shows no progress.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    quiet: bool = False


_SEAT: ContextVar[Process | None] = ContextVar("process", default=None)


def here() -> Process:
    """Which process this is: as a launcher said, else the only one.

    Example:
        >>> here().count
        1
    """
    seat = _SEAT.get()
    return launched(os.environ) if seat is None else seat


def launched(environment: "os._Environ[str] | dict[str, str]") -> Process:
    """What launchers' variables say; the first launcher's that are all there.

    Example:
        >>> launched({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
        Process(number=1, count=2, local=1, quiet=True)
    """
    for names in NAMES:
        told = [environment.get(name, "") for name in names]
        if all(one.isdecimal() for one in told[:2]):
            number, count = int(told[0]), int(told[1])
            return Process(number, count, int(told[2]) if told[2].isdecimal() else number, number > 0)
    return Process()


@contextmanager
def seated(seat: Process) -> Iterator[None]:
    """Be a certain process for a while, whatever the environment says.

    Example:
        >>> with seated(Process(1, 2)):
        ...     here().number
        1
    """
    before = _SEAT.set(seat)
    try:
        yield
    finally:
        _SEAT.reset(before)


@contextmanager
def alone() -> Iterator[None]:
    """Share nothing for a while: what runs within a unit of work is this process's own, experiments included.

    Example:
        >>> with seated(Process(1, 2)), alone():
        ...     here().count
        1
    """
    own = here()
    with seated(Process(local=own.local, quiet=own.quiet)):
        yield
