"""A folder of what is finished of one piece of work, so that work that was stopped goes on and several can share it.

Each finished unit is a netCDF file, put in place whole, so that a stop at any moment loses at most what was running.
Each says by a fingerprint of what work it is.

Rule this module guards: nothing is taken for another work's, and nothing rests on a claim. A claim keeps two processes
from doing one unit twice; where it fails to, both do the same, and either file is right.

>>> folder = Folder("answers", "a fingerprint", "answers")
>>> with folder.claim("0") as mine:
...     folder.keep(0, xr.Dataset({"margin": ("item", [0.5])}))
>>> [float(one.margin[0]) for one in folder.new()]
[0.5]
"""

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP
from pathlib import Path
from typing import Any

import xarray as xr
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from mechvlm.sites import told

SUFFIX = ".nc"
WORK = {
    "points": ("a sweep", "the model, the prompt, the metric, the axes or what the edits do"),
    "answers": (
        "an evaluation",
        "the model, the questions, the pictures, the edits, the template or the scoring",
    ),
    "part": ("an experiment", "the model, the prompts or another argument"),
}
"""By what finished files are called: what kind of work they are of, and what makes it another."""


class Folder:
    """A folder of finished units.

    Args:
        out: where; made if it is not there.
        print_of: the fingerprint of the work.
        units: what its files are called: "points", "answers" or "part".

    Raises:
        TypeError: for what is no path.
        ValueError: for a file.
    """

    def __init__(self, out: Any, print_of: str, units: str) -> None:
        if not isinstance(out, str | Path):
            raise TypeError(f"out={told(out)} is not a folder; give its path, or None to keep nothing on disk.")
        self.folder, self.fingerprint, self.units = Path(out), print_of, units
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out={str(out)!r} is a file; give a folder, in which what is finished is kept.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seen: set[str] = set()

    def fresh(self) -> list[Path]:
        """The finished files that have come since this was asked last, whoever put them there."""
        with os.scandir(self.folder) as there:  # before each unit, so without a Path for each file
            names = [entry.name for entry in there if entry.name not in self.seen]
        own = sorted(name for name in names if name.startswith(f"{self.units}-") and name.endswith(SUFFIX))
        self.seen.update(own)
        return [self.folder / name for name in own]

    def new(self) -> Iterator[xr.Dataset]:
        """What is in those files.

        Raises:
            ValueError: where the folder holds another work's files, or what is none.
        """
        return map(self.read, self.fresh())

    def read(self, path: Path) -> xr.Dataset:
        """One finished file.

        Raises:
            ValueError: where it is another work's.
        """
        kind, same = WORK[self.units]
        with opened(path, kind) as kept:
            if kept.attrs.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"out={str(self.folder)!r} holds another {kind.split()[-1]}: {same} is not the same; give another "
                    "folder, or empty this one."
                )
            return kept.load()

    def keep(self, number: int, found: xr.Dataset) -> None:
        """Keep a finished unit; it is there whole or not at all, whoever else writes into the folder."""
        name = f"{self.units}-{number:06d}-{uuid.uuid4().hex[:12]}"
        unfinished = self.folder / f"{name}.unfinished"
        found.assign_attrs(fingerprint=self.fingerprint).to_netcdf(unfinished, engine="h5netcdf")
        unfinished.replace(self.folder / f"{name}{SUFFIX}")

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether a unit is this process's to do, for as long as the context lasts.

        The system's lock on a file says so, which ends with the process that holds it, however that ends.
        """
        lock = FileLock(self.folder / f"{self.units}-{name}.taken")
        if not had(lock):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
            with suppress(OSError):  # another has opened it meanwhile, where open files cannot be removed
                Path(lock.lock_file).unlink(missing_ok=True)


def had(lock: BaseFileLock) -> bool:
    """Whether a lock is had, as it is without one where the file system knows none."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flock not supported")
            lock.acquire(timeout=0)
    except Timeout:
        # What filelock takes where there are no locks is a file, which outlives a process that dies on another machine.
        return isinstance(lock, SoftFileLock)
    except NotImplementedError:
        return True
    except OSError as error:
        if error.errno not in (ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP):
            raise
    return True


def opened(path: Path, kind: str) -> xr.Dataset:
    """A finished file.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        return xr.open_dataset(path, engine="h5netcdf")
    except (BlockingIOError, FileNotFoundError, PermissionError):  # not what is in it: a lock, say
        raise
    except OSError:
        raise ValueError(
            f"{str(path)!r} is no finished part of {kind}; take it out of the folder, and it is made again."
        ) from None
