"""Answers of an evaluation, kept in a folder picture by picture, so that one that was stopped goes on.

Rule this module guards: answers are never taken for another evaluation's. `mechvlm.experiments.shards` keeps sweeps so.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import xarray as xr

from mechvlm.finished import Folder

Answer = tuple[float, float, str]
"""Of one item: log P(yes) - log P(no), P(yes) + P(no), and the generated text."""


class Finished(Folder):
    """A folder of finished pictures' answers.

    Args:
        folder: where; made if it is not there.
        print_of: the fingerprint of the evaluation.

    Attributes:
        engines: how batches of the answers that are there were run, and how often.

    Raises:
        TypeError: for what is no path.
        ValueError: for a file.
    """

    def __init__(self, folder: str | Path, print_of: str) -> None:
        super().__init__(folder, print_of, "answers")
        self.found: dict[int, Answer] = {}
        self.engines: Counter[str] = Counter()

    def answers(self) -> dict[int, Answer]:
        """The finished answers, by the numbers of their items.

        Raises:
            ValueError: where the folder holds another evaluation's.
        """
        for kept in self.new():
            columns = [kept[name].values.tolist() for name in ("margin", "p_either", "answer")]
            self.found |= dict(zip(kept.item.values.tolist(), zip(*columns, strict=True), strict=True))
            self.engines[kept.attrs.get("engine", "kept from before")] += 1
        return self.found

    def add(self, answers: Mapping[int, Answer], engine: str) -> None:
        """Keep finished answers, and how they were run."""
        columns = zip(("margin", "p_either", "answer"), zip(*answers.values(), strict=True), strict=True)
        kept = xr.Dataset({name: ("item", list(values)) for name, values in columns}, {"item": list(answers)})
        self.keep(min(answers), kept.assign_attrs(engine=engine))
