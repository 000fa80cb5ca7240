"""What queries of many prompts pay to spans, read some prompts at a time, so that no map is made or kept.

Rule this module guards: prompts that run together are divided alike, so that one reading is right for all of them.

>>> groups_of([real, real, null], {0: [0, 1, 2]})
[[0], [1, 2]]
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mechvlm.experiments.ratios import visible
from mechvlm.experiments.selection import kept
from mechvlm.experiments.sight import own_layers
from mechvlm.experiments.sweep import numbers, rows_for
from mechvlm.prompt import Prompt
from mechvlm.readings import VISIBLE, lazy, mass, rows
from mechvlm.sites import Site
from mechvlm.vlm import VLM

Look = tuple[np.ndarray, np.ndarray, np.ndarray]
"""For the queries of one layer: masses `head query span`, visible keys and all keys, `query span`."""


def alike(
    prompts: Sequence[Prompt],
    queries: Sequence[tuple[int, ...] | None],
    gone: Sequence[tuple[int, ...]],
    names: Sequence[str],
) -> dict[int, list[int]]:
    """Prompts that are divided alike, by the number of the first of them."""
    same: dict[tuple, list[int]] = {}
    for number, (prompt, chosen) in enumerate(zip(prompts, queries, strict=True)):
        images = tuple(image.positions for image in prompt.images)
        spans = tuple(kept(prompt, names, gone[number]).items())
        same.setdefault((spans, chosen, len(prompt), images), []).append(number)
    return {members[0]: members for members in same.values()}


def groups_of(prompts: Sequence[Prompt], firsts: dict[int, list[int]]) -> list[list[int]]:
    """What runs together: the first of those that are divided alike by itself, and then batches of the others."""
    groups = []
    for first, members in firsts.items():
        size = rows_for(prompts[first])
        groups += [[first], *(members[start : start + size] for start in range(1, len(members), size))]
    return groups


class Asking:
    """What queries of prompts pay to spans. Of the first of those divided alike it is also asked what it may see.

    Args:
        queries: of each prompt the positions that look; None for all.
        gone: of each the keys that are taken out.
        names: the spans.
        firsts: what `alike` found.
    """

    def __init__(
        self,
        vlm: VLM,
        prompts: Sequence[Prompt],
        queries: Sequence[tuple[int, ...] | None],
        gone: Sequence[tuple[int, ...]],
        names: Sequence[str],
        firsts: dict[int, list[int]],
    ) -> None:
        self.names, self.firsts = names, firsts
        self.vlm, self.prompts, self.queries, self.layers = vlm, prompts, queries, own_layers(vlm)
        self.spans = [kept(prompt, names, out) for prompt, out in zip(prompts, gone, strict=True)]
        self.seen: dict[int, dict[int, np.ndarray]] = {}

    def first(self, number: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Number, layer and masses of a prompt that runs by itself; what it may see is kept."""
        chosen = self.queries[number]
        reading = mass(self.spans[number], queries=chosen)
        run = self.vlm.run(self.prompts[number], read={Site("pattern", at): lazy() for at in self.layers})
        self.seen = {number: {}}  # of those who run next
        for layer in self.layers:
            attention = run[Site("pattern", layer)]
            self.seen[number][layer] = visible(attention, reading.columns(len(self.prompts[number])), chosen)
            yield number, layer, numbers(reading.of(attention, "pattern")[0])

    def others(self, group: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """The same of prompts that run together."""
        reading = mass(self.spans[group[0]], queries=self.queries[group[0]])
        read = {Site("pattern", at): reading for at in self.layers}
        run = self.vlm.run([self.prompts[at] for at in group], read=read)
        for layer in self.layers:
            masses = numbers(run[Site("pattern", layer)])
            yield from ((number, layer, masses[at]) for at, number in enumerate(group))

    def looks(self, group: Sequence[int]) -> Iterator[tuple[int, int, Look]]:
        """Number of the prompt, layer, and the numbers, of one group."""
        first = next(first for first, members in self.firsts.items() if group[0] in members)
        if first not in self.seen and first != group[0]:  # another process has done it
            list(self.first(first))
        own = self.spans[first].values()
        for number, layer, masses in self.first(first) if first == group[0] else self.others(group):
            keys = np.array([[len(held) for held in own]] * masses.shape[1], float)
            yield number, layer, (masses, self.seen[first][layer], keys)

    def generated(self, group: Sequence[int], most: int) -> Iterator[tuple[int, int, Look]]:
        """The same for the tokens of a greedy answer, each in the decode step that looks from it."""
        read: dict[Site, Any] = {Site("pattern", layer): rows([-1]) for layer in self.layers}
        read |= {Site("scores", layer): VISIBLE for layer in self.layers}
        for number in group:
            prompt = self.prompts[number]
            steps = self.vlm.generate(
                prompt, max_new_tokens=most, read_each_step=read, do_sample=False, num_beams=1
            ).steps[1:]
            left = self.spans[number]
            for layer in self.layers if steps else ():
                looks = []
                for count, step in enumerate(steps, 1):
                    weights = step[Site("pattern", layer)][0, :, 0].double()
                    there = step[Site("scores", layer)][0, 0].double()
                    spans = {**left, "generated": tuple(range(len(prompt), len(prompt) + count))}
                    columns = mass({name: spans[name] for name in self.names}).columns(weights.shape[-1]).to(weights)
                    looks.append((weights @ columns, there[0] @ columns, columns.sum(0)))
                masses, seen, keys = (torch.stack(part) for part in zip(*looks, strict=True))
                yield number, layer, (numbers(masses.transpose(0, 1)), numbers(seen), numbers(keys))
