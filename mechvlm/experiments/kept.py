"""What one run keeps for another, where the model runs: activations that later edits put back.

Rule this module guards: what is kept is never sent. Runs that keep it and runs whose edits hold it are asked for at
once where the model runs elsewhere, so that both are one job and hold the same mapping there.

>>> kept = Kept()
>>> runs = vlm.runs([{"prompt": real, "read": ["text.3.z"], "reduce": keep(kept, ["real"])}])
>>> next(runs).reduced, list(kept)
(None, [('real', 'z', 3, 'text')])
>>> run = vlm.run(null, edits=[put_back(kept, "real", mv.Site("z", 3), real.last, [5])])
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.sweep import asked_of, measuring, numbers
from mechvlm.metrics import Metric
from mechvlm.plan import key_of
from mechvlm.prompt import Prompt
from mechvlm.rounds import Asked, Work
from mechvlm.sites import Site
from mechvlm.vlm import VLM

Kept = dict[tuple, Tensor]
"""Activations by a name and the site as a tuple, `(name, kind, layer, tower)`."""


@dataclass(frozen=True)
class Leg:
    """Runs that keep something, and points whose edits put it back.

    Attributes:
        before: the runs, as of `VLM.runs`.
        points: the edits of each point.
        edits: those that all points have in common.
        kept: what these runs keep and nobody needs after the points.
    """

    before: Asked
    points: Sequence[Sequence[Edit]]
    edits: Sequence[Edit]
    kept: Kept


def keep(kept: Kept, names: Sequence[Any]) -> Callable[[dict, dict], None]:
    """For `reduce` of a run: keep what is read of each row, under the row's name.

    Args:
        names: one for each row; with one name the whole of what is read is that row's.

    Example:
        >>> kept = Kept()
        >>> keep(kept, ["a", "b"])({("z", 0, "text"): torch.zeros(2, 3)}, {})
        >>> kept["b", "z", 0, "text"].shape
        torch.Size([1, 3])
    """

    def keeping(read: dict, _gradients: dict) -> None:
        for site, x in read.items():
            for row, name in enumerate(names):
                kept[(name, *site)] = x if len(names) == 1 else x[row : row + 1]

    return keeping


def part_of(x: Tensor, positions: Sequence[int] | None, heads: Sequence[int] | None) -> Tensor:
    """Some positions and heads of an activation `batch pos ...`; None for all.

    Example:
        >>> part_of(torch.zeros(1, 9, 4, 8), [0, 5], [1]).shape
        torch.Size([1, 2, 1, 8])
    """
    some = x if positions is None else x[:, list(positions)]
    return some if heads is None else some[:, :, list(heads)]


def with_part(x: Tensor, part: Tensor, positions: Sequence[int] | None, heads: Sequence[int] | None) -> Tensor:
    """An activation with some positions and heads written over; in place.

    Example:
        >>> with_part(torch.zeros(1, 3), torch.ones(1, 2), [0, 2], None)
        tensor([[1., 0., 1.]])
    """
    index = torch.tensor(range(x.shape[1]) if positions is None else list(positions), device=x.device)
    if heads is None:
        x[:, index] = part.to(x)
    else:
        x[:, index[:, None], torch.tensor(list(heads), device=x.device)] = part.to(x)
    return x


def put_back(
    kept: Kept,
    name: Any,
    site: Site,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    whole: bool = True,
    of: Site | None = None,
) -> Edit:
    """Overwrite some positions and heads of an activation by what a run before kept.

    Args:
        name: under which it is kept.
        of: where it was read; by default the same site.
        positions, heads: None for all; of keys and values, key-value heads.
        whole: whether the whole activation is kept, or only as many positions and heads, in their order.

    Example:
        >>> put_back({}, "real", mv.Site("z", 3), [48], [5]).label
        'put back real'
    """
    key = (name, *key_of(of or site))

    def overwrite(x: Tensor) -> Tensor:  # batch pos ...
        return with_part(x, part_of(kept[key], positions, heads) if whole else kept[key], positions, heads)

    at, some = tuple(positions or ()), tuple(heads or ())
    return Edit(site, overwrite, "prompt", label=f"put back {name}", positions=at, heads=some)


def put_features(kept: Kept, name: Any, site: Site, tokens: Sequence[int]) -> Edit:
    """Overwrite what is added to some image tokens by what a run before kept.

    Args:
        tokens: counted through all images of the prompt.

    Example:
        >>> put_features({}, "real", mv.Site("deepstack", 0), [0, 1]).label
        'put back real'
    """
    key = (name, *key_of(site))

    def overwrite(x: Tensor) -> Tensor:  # image pos d_model
        flat, given = x.flatten(0, 1), kept[key].flatten(0, 1).to(x)
        index = torch.tensor(list(tokens), device=x.device)
        return flat.index_copy(0, index, given[index]).reshape(x.shape)

    return Edit(site, overwrite, "prompt", label=f"put back {name}")


def legs_run(
    vlm: VLM, prompt: Prompt, first: Asked, legs: Sequence[Leg], metric: Metric, batch_size: int | None = None
) -> Work[tuple[list[np.ndarray], list[np.ndarray], str]]:
    """A metric of the points of each leg, after the runs that keep what their edits put back.

    Args:
        first: runs before all legs; each with a `value`.
        metric, batch_size: as in `sweep`.

    Returns:
        The values of the first runs, those of the points of each leg, and how the points were run.
    """
    if vlm.place.remote:
        return (yield from legs_sent(vlm, prompt, first, legs, metric, batch_size))
    ends: list[np.ndarray] = []
    for run in (yield first):
        ends.append(numbers(given_metric(run)))
    found, how = [], dict[str, None]()
    for leg in legs:
        for _ in (yield leg.before):
            pass  # each is run when its turn comes
        values, engine = yield from measuring(vlm.with_edits(leg.edits), prompt, leg.points, metric, batch_size)
        leg.kept.clear()
        found.append(values)
        how[engine] = None
    return ends, found, "; ".join(how)


def legs_sent(
    vlm: VLM, prompt: Prompt, first: Asked, legs: Sequence[Leg], metric: Metric, batch_size: int | None
) -> Work[tuple[list[np.ndarray], list[np.ndarray], str]]:
    """The same as one job, in which each point is a row of a full pass."""
    value = partial(metric_values, vlm.metric(metric))
    asked: list[Mapping[str, Any]] = list(first)
    counts = []
    for leg in legs:
        by = vlm.with_edits(leg.edits)
        rows = [{**one, "by": by} for one in asked_of(prompt, leg.points, None, batch_size, value=value)]
        asked += [*leg.before, *rows]
        counts.append((len(leg.before), len(rows)))
    runs = yield asked
    ends = [numbers(given_metric(next(runs))) for _ in first]
    found = []
    for before, rows_ in counts:
        for _ in range(before):
            next(runs)
        found.append(np.concatenate([numbers(given_metric(next(runs))) for _ in range(rows_)]))
    return ends, found, "a full pass for each point, since the model runs elsewhere"


def given_metric(run: Any) -> Tensor:
    """What a run's `value` was."""
    found: Tensor = run.metric
    return found
