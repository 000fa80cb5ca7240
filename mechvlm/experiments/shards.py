"""Finished points of a sweep, kept in a folder as they are finished, so that a sweep that was stopped goes on.

Each batch is a file of its own (`mechvlm.finished`), which says of which sweep it is: the model, the prompt, the
metric, the points and what their edits do.

Rule this module guards: values are never taken for another sweep's; `mechvlm.fingerprints` tells them apart.

>>> from mechvlm.fingerprints import fingerprint
>>> shards = Shards("sweeps/heads", fingerprint("heads", 64))
>>> shards.add((0, 1), torch.tensor([0.5, 0.25])); shards.values()
{0: 0.5, 1: 0.25}
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr
from torch import Tensor

from mechvlm.finished import Folder


class Shards(Folder):
    """A folder of finished points.

    Args:
        folder: where; made if it is not there.
        print_of: the fingerprint of the sweep.

    Raises:
        TypeError: for what is no path.
        ValueError: for a file.
    """

    def __init__(self, folder: str | Path, print_of: str) -> None:
        super().__init__(folder, print_of, "points")
        self.found: dict[int, float] = {}

    def values(self) -> dict[int, float]:
        """The finished points' values, by their number.

        Raises:
            ValueError: where the folder holds another sweep's.
        """
        for shard in self.new():
            self.found |= dict(zip(shard.point.values.tolist(), shard.value.values.tolist(), strict=True))
        return self.found

    def add(self, points: Iterable[int], values: Tensor) -> None:
        """Keep a finished batch."""
        numbers = np.asarray(list(points))
        shard = xr.Dataset({"value": ("point", values.detach().double().cpu().numpy())}, {"point": numbers})
        self.keep(int(numbers[0]), shard)
