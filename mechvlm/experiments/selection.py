"""Which positions look, and which keys they are taken to look at.

Rule this module guards: positions are counted from 0 and belong to a prompt; one that it has not is refused.

>>> queries_of(real, "last"), keys_out([real], "bos")
((48,), [(0,)])
"""

from collections.abc import Callable, Sequence
from typing import Any

import xarray as xr

from mechvlm.experiments.sinks import sink_positions
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, told, whole_numbers

QUERIES = ("last", "text", "all", "generated")
Without = str | Sequence[Any] | Callable[[Prompt], Sequence[int]] | xr.Dataset | None
"""Keys that are taken out: "bos", positions, sinks, a function of a prompt, or a list of these for each prompt."""


def queries_of(prompt: Prompt, queries: str | Sequence[int]) -> tuple[int, ...] | None:
    """The positions that attend, counted from 0; None for all."""
    if isinstance(queries, str):
        if queries not in QUERIES:
            raise ValueError(
                f"queries={queries!r} is not known; choose {', '.join(map(repr, QUERIES))} or a list of positions."
            )
        text = prompt.question + prompt.last if queries == "text" else []
        # A prompt that ends in its image answers there.
        return None if queries == "all" else tuple(text or [len(prompt) - 1])
    return positions_of(prompt, "queries", queries)


def positions_of(prompt: Prompt, name: str, positions: Any) -> tuple[int, ...]:
    """Positions of a prompt, counted from 0; at least one."""
    chosen = whole_numbers(name, positions)
    beyond = [position for position in chosen if not -len(prompt) <= position < len(prompt)]
    if beyond or not chosen:
        given = f"position {beyond[0]}" if beyond else "an empty list"
        raise ValueError(f"{name} holds {given}; give positions of the prompt, which has {len(prompt)}.")
    return tuple(position % len(prompt) for position in chosen)


def keys_out(prompts: Sequence[Prompt], without: Without, name: str = "without") -> list[tuple[int, ...]]:
    """The keys that are taken out of each prompt; `name` is the argument's, for what is refused."""
    if isinstance(without, xr.Dataset) and len(prompts) > 1:
        raise ValueError(
            f"{name} holds the sinks of one prompt, and there are {len(prompts)}; give a list with one dataset for "
            "each, or a function of a prompt."
        )
    given = None if isinstance(without, xr.Dataset) or callable(without) else listed(without)
    each: list[Any] = [without] * len(prompts) if given is None else list(given)
    if given is not None and not any(isinstance(one, xr.Dataset) or listed(one) is not None for one in given):
        each = [given] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{name} holds {len(each)} lists, and there are {len(prompts)} prompts; give one each.")
    return [_out(prompt, one, name) for prompt, one in zip(prompts, each, strict=True)]


def _out(prompt: Prompt, without: Any, name: str) -> tuple[int, ...]:
    """The keys that are taken out of one prompt."""
    if isinstance(without, str) and without != "bos":
        raise ValueError(f"{name}={without!r} is not known; write 'bos', or give positions or a function of a prompt.")
    found = without(prompt) if callable(without) else without
    if isinstance(found, xr.Dataset):
        found = _of_its_own(prompt, found, name)
    elif found is None or isinstance(found, str):
        found = prompt.bos if found else []
    given = listed(found)
    if given is None:
        raise TypeError(f"{name}={told(found)} says no keys; give 'bos', positions, sinks, or a function of a prompt.")
    taken = positions_of(prompt, name, given) if given else ()
    if len(set(taken)) == len(prompt):
        raise ValueError(f"{name} takes out all positions of the prompt; leave at least one.")
    return tuple(sorted(set(taken)))


def _of_its_own(prompt: Prompt, found: xr.Dataset, name: str) -> list[int]:
    """The sinks of a prompt; those of one with another number of positions are refused."""
    held = sink_positions(found)
    if found.sizes["position"] != len(prompt):
        raise ValueError(
            f"{name} holds the sinks of a prompt with {found.sizes['position']} positions, and this one has "
            f"{len(prompt)}; make them with mv.sinks(vlm, prompt)."
        )
    return held


def kept(prompt: Prompt, names: Sequence[str], out: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The keys of each span that are left."""
    taken = set(out)
    return {name: tuple(key for key in prompt.spans.get(name, ()) if key not in taken) for name in names}
