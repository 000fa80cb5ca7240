"""Answers of an evaluation, kept in a folder picture by picture, so that one that was stopped goes on.

Rule this module guards: answers are never taken for another evaluation's. `mechvlm.experiments.shards` keeps sweeps so.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path

import xarray as xr

from mechvlm.experiments.shards import SUFFIX
from mechvlm.sites import told

Answer = tuple[float, float, str]
"""Of one item: log P(yes) - log P(no), P(yes) + P(no), and the generated text."""


class Finished:
    """A folder of finished pictures' answers.

    Args:
        folder: where; made if it is not there.
        print_of: the fingerprint of the evaluation.

    Raises:
        TypeError: for what is no path.
        ValueError: for a folder that holds another evaluation.
    """

    def __init__(self, folder: str | Path, print_of: str) -> None:
        if not isinstance(folder, str | Path):
            raise TypeError(f"out={told(folder)} is not a folder; give its path, or None to keep nothing on disk.")
        self.folder, self.fingerprint = Path(folder), print_of
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"out={str(folder)!r} is a file; give a folder, in which each picture's answers are a file."
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def answers(self) -> dict[int, Answer]:
        """The finished answers, by the numbers of their items.

        Raises:
            ValueError: where the folder holds another evaluation's.
        """
        found: dict[int, Answer] = {}
        for path in sorted(self.folder.glob(f"answers-*{SUFFIX}")):
            with opened(path) as kept:
                if kept.attrs.get("fingerprint") != self.fingerprint:
                    raise ValueError(
                        f"out={str(self.folder)!r} holds another evaluation: the model, the questions, the pictures, "
                        "the edits, the template or the scoring is not the same; give another folder, or empty this "
                        "one."
                    )
                columns = [kept[name].values.tolist() for name in ("margin", "p_either", "answer")]
                found |= dict(zip(kept.item.values.tolist(), zip(*columns, strict=True), strict=True))
        return found

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Keep finished answers; they are there whole or not at all, whoever else writes into the folder."""
        columns = zip(("margin", "p_either", "answer"), zip(*answers.values(), strict=True), strict=True)
        kept = xr.Dataset({name: ("item", list(values)) for name, values in columns}, {"item": list(answers)})
        name = f"answers-{min(answers):06d}-{uuid.uuid4().hex[:12]}"
        unfinished = self.folder / f"{name}.unfinished"
        kept.assign_attrs(fingerprint=self.fingerprint).to_netcdf(unfinished, engine="h5netcdf")
        unfinished.replace(self.folder / f"{name}{SUFFIX}")


def opened(path: Path) -> xr.Dataset:
    """A finished picture's answers.

    Raises:
        ValueError: for a file that holds none.
    """
    try:
        return xr.open_dataset(path, engine="h5netcdf")
    except OSError:
        raise ValueError(
            f"'{path}' holds no finished answers of an evaluation; take it out of the folder, and they are asked again."
        ) from None
