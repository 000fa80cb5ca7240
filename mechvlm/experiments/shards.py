"""Finished points of a sweep, kept in a folder as they are finished, so that a sweep that was stopped goes on.

Each batch is a netCDF file of its own, put in place whole, so that a stop at any moment loses at most the batch that
was running. Each says of which sweep it is: the model, the prompt, the metric, the points and what their edits do.

Rule this module guards: values are never taken for another sweep's; `mechvlm.fingerprints` tells them apart.

>>> from mechvlm.fingerprints import fingerprint
>>> shards = Shards("sweeps/heads", fingerprint("heads", 64))
>>> shards.add((0, 1), torch.tensor([0.5, 0.25])); shards.values()
{0: 0.5, 1: 0.25}
"""

import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr
from torch import Tensor

from mechvlm.sites import told

SUFFIX = ".nc"


class Shards:
    """A folder of finished points.

    Args:
        folder: where; made if it is not there.
        print_of: the fingerprint of the sweep.

    Raises:
        TypeError: for what is no path.
        ValueError: for a folder that holds another sweep.
    """

    def __init__(self, folder: str | Path, print_of: str) -> None:
        if not isinstance(folder, str | Path):
            raise TypeError(f"out={told(folder)} is not a folder; give its path, or None to keep nothing on disk.")
        self.folder, self.fingerprint = Path(folder), print_of
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out={str(folder)!r} is a file; give a folder, in which each finished batch is a file.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.values()

    def files(self) -> list[Path]:
        """The batches that are there."""
        return sorted(self.folder.glob(f"points-*{SUFFIX}"))

    def values(self) -> dict[int, float]:
        """The finished points' values, by their number.

        Raises:
            ValueError: where the folder holds another sweep's.
        """
        found: dict[int, float] = {}
        for path in self.files():
            with opened(path) as shard:
                if shard.attrs.get("fingerprint") != self.fingerprint:
                    raise ValueError(
                        f"out={str(self.folder)!r} holds another sweep: the model, the prompt, the metric, the axes or "
                        "what the edits do is not the same; give another folder, or empty this one."
                    )
                found |= dict(zip(shard.point.values.tolist(), shard.value.values.tolist(), strict=True))
        return found

    def add(self, points: Iterable[int], values: Tensor) -> None:
        """Keep a finished batch; it is there whole or not at all, whoever else writes into the folder."""
        numbers = np.asarray(list(points))
        shard = xr.Dataset({"value": ("point", values.detach().double().cpu().numpy())}, {"point": numbers})
        name = f"points-{numbers[0]:06d}-{uuid.uuid4().hex[:12]}"
        unfinished = self.folder / f"{name}.unfinished"
        shard.assign_attrs(fingerprint=self.fingerprint).to_netcdf(unfinished, engine="h5netcdf")
        unfinished.replace(self.folder / f"{name}{SUFFIX}")


def opened(path: Path) -> xr.Dataset:
    """A finished batch.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        return xr.open_dataset(path, engine="h5netcdf")
    except OSError:
        raise ValueError(f"{str(path)!r} is no finished batch of a sweep; take it out of the folder.") from None
