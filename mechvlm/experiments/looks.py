"""What queries of many prompts pay to spans, read some prompts at a time, so that no map is made or kept.

Rule this module guards: prompts that run together are divided alike, so that one reading is right for all of them.

>>> groups_of([real, real, null], {0: [0, 1, 2]})
[[0], [1, 2]]
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm.experiments.ratios import averaged, visible
from mechvlm.experiments.selection import kept
from mechvlm.experiments.sight import own_layers
from mechvlm.experiments.sweep import numbers, rows_for
from mechvlm.lazy_attention import Attention
from mechvlm.prompt import Prompt
from mechvlm.readings import VISIBLE, Mass, lazy, mass, rows
from mechvlm.rounds import Work, unsaid
from mechvlm.run import Run
from mechvlm.sites import Site
from mechvlm.vlm import VLM

Averages = dict[str, np.ndarray]
"""What `averaged` says of one layer."""
AVERAGED = ("mass", "density", "rest", "queries", "even")
"""In which order it is sent from where the model runs."""


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
    """What queries of prompts pay to spans, averaged. Of the first of those divided alike it is asked what it may see.

    Args:
        queries: of each prompt the positions that look; None for all.
        gone: of each the keys that are taken out.
        names: the spans.
        firsts: what `alike` found.
        even: "visible" or "length"; see `attention_profile`.
    """

    def __init__(
        self,
        vlm: VLM,
        prompts: Sequence[Prompt],
        queries: Sequence[tuple[int, ...] | None],
        gone: Sequence[tuple[int, ...]],
        names: Sequence[str],
        firsts: dict[int, list[int]],
        even: str,
    ) -> None:
        self.names, self.firsts, self.even, self.gone = names, firsts, even, gone
        self.vlm, self.prompts, self.queries, self.layers = vlm, prompts, queries, own_layers(vlm)
        self.spans = [kept(prompt, names, out) for prompt, out in zip(prompts, gone, strict=True)]
        self.evens: dict[int, list[np.ndarray]] = {}

    def keys(self, number: int) -> np.ndarray:
        """How many keys each span has, for each query of a prompt."""
        chosen = self.queries[number]
        count = len(self.prompts[number]) if chosen is None else len(chosen)
        return np.array([[len(held) for held in self.spans[number].values()]] * count, float)

    def asked(self, group: Sequence[int]) -> dict[str, Any]:
        """The run of prompts that are divided alike."""
        number, first = group[0], group[0] in self.firsts
        reading = mass(self.spans[number], queries=self.queries[number])
        image = [name == "image" for name in self.names]
        sees = first and self.even == "visible"
        paid = lazy(partial(_paid, reading, self.keys(number), image, bool(self.gone[number]), sees))
        read = {Site("pattern", at): paid for at in self.layers}
        return {"prompt": [self.prompts[at] for at in group], "read": read, "value": unsaid}

    def first(self, number: int) -> Work[Run]:
        """The run of a prompt that runs by itself; what even attention would give it is kept."""
        (run,) = yield [self.asked([number])]
        self.evens[number] = [numbers(run[Site("pattern", layer)][-1])[0] for layer in self.layers]
        return run

    def looks(self, group: Sequence[int]) -> Work[list[tuple[int, int, Averages]]]:
        """Number of the prompt, layer, and what `averaged` says of it, of one group."""
        first = next(first for first, members in self.firsts.items() if group[0] in members)
        if first == group[0]:
            run = yield from self.first(first)
        else:
            (run,) = yield [self.asked(group)]
            if first not in self.evens:  # another process has done it
                yield from self.first(first)
        found = []
        for layer, even in zip(self.layers, self.evens[first], strict=True):
            values = dict(zip(AVERAGED, map(numbers, run[Site("pattern", layer)]), strict=True))
            for at, number in enumerate(group):
                found.append((number, layer, {name: x[at] for name, x in values.items()} | {"even": even}))
        return found

    def generated(self, group: Sequence[int], most: int) -> Work[list[tuple[int, int, Averages]]]:
        """The same for the tokens of a greedy answer, each in the decode step that looks from it."""
        yield from ()  # generations are no runs: each is a job of its own
        found: list[tuple[int, int, Averages]] = []
        image = [name == "image" for name in self.names]
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
                every, base = numbers(keys), numbers(seen if self.even == "visible" else keys)
                means = averaged(numbers(masses.transpose(0, 1)), base, every, image, part=bool(self.gone[number]))
                found.append((number, layer, means | {"n_keys": every[-1], "asked": np.array(len(every))}))
        return found


def _paid(
    reading: Mass, keys: np.ndarray, image: Sequence[bool], part: bool, sees: bool, attention: Attention
) -> tuple[Tensor, ...]:
    """What `averaged` says of one layer where the model runs, in the order of `AVERAGED`, with the batch in front."""
    masses = numbers(reading.of(attention, "pattern"))
    base = visible(attention, reading.columns(attention.k.shape[2]), reading.queries) if sees else keys
    rows = [averaged(one, base, keys, image, part) for one in masses]
    return tuple(torch.from_numpy(np.stack([row[name] for row in rows])) for name in AVERAGED)
