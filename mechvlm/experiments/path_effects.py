"""Along which path does it pass? Path patching: from one node to another, with everything between held still.

Rule this module guards: a path is from sender to receiver and by nothing else. What the heads in between, and the MLPs
if so asked, add is held as it was.

>>> found = path_patching(vlm, source=real, target=null, metric=yes, senders=["image", "a0.h7"], receivers=["a3.h7<q>"])
>>> found.sender.values.tolist()
['image', 'a0.h7']
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.batch import metric_values
from mechvlm.experiments.exchange import matched, patched_with, rounding, shared_out
from mechvlm.experiments.kept import Kept, Leg, keep, legs_run
from mechvlm.experiments.path_stages import (
    FREEZE,
    checked_receivers,
    frozen_edits,
    frozen_sites,
    positions_in,
    received,
    recording,
    sender_edits,
    sender_sites,
    senders_of,
    stages_of,
    stream_of,
)
from mechvlm.experiments.record import metric_name, metric_unit, record
from mechvlm.experiments.shards import Shards
from mechvlm.metrics import Metric
from mechvlm.nodes import Node, feeds
from mechvlm.prompt import Prompt
from mechvlm.rounds import done
from mechvlm.sites import listed, told
from mechvlm.units import print_of, taken
from mechvlm.vlm import VLM

DIRECTIONS = {"denoise": "into the target, from the source", "noise": "into the source, from the target"}
AT_ONCE = 1 << 30
"""Bytes of what receivers take in that are held at once, which bounds how many senders one piece has."""


def path_patching(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    senders: str | Sequence[str] | None = None,
    receivers: str | Sequence[str] | Mapping[str, str | Sequence[str]] = "logits",
    positions: Sequence[int] | str | None = None,
    freeze: Sequence[str] = ("heads", "mlps"),
    direction: str = "denoise",
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """How far the target's answer becomes the source's when one node's output reaches some others as in the source.

    First the target runs with the sender's output taken from the source and all heads (and MLPs) frozen, that is kept
    at what they were without it; what the receivers then take in is recorded. Then the target runs with nothing
    changed but the receivers, which take in what was recorded. For the receiver "logits" the first of the two runs is
    the answer: what the sender adds to the last residual stream, and nothing in between makes of it, is its direct
    path. Where a norm stands behind attention (Gemma 3, GLM), a head is replaced before it, and the norm's scale is
    worked out anew; an edge of `edge_attribution` is of what the head adds behind the norm, with the scale of each run.

    Args:
        source: the prompt patched from. target: the one patched into.
        senders: one or several of what writes into the residual stream: "a3.h5" (a head), "m3" (an MLP), "embed" (the
            words), "image" (what enters at image tokens), "d3" (what deep-stack adds behind layer 3). None means every
            head and MLP that stands before a receiver. Each by itself.
        receivers: "logits", or a list of "a5.h3<q>" (a head's queries), "a5.kv1<k>", "a5.kv1<v>" (keys and values,
            which with grouped queries serve several heads), "a5.h3<z>" (all that a head takes in), "m5" (what an MLP
            reads), "a5<q>" (the queries of a layer that attends to the picture's features). Those of a list receive
            together, each what was recorded, so that nothing of one reaches another. A mapping from names to such
            lists does each by itself, along axis receiver.
        positions: where the sender's output is taken from the source: a list, a span's name, or None for everywhere.
        freeze: ("heads", "mlps"), or ("heads",), as published: what MLPs make of the sender then belongs to the path.
        direction: "denoise" patches the source into the target, "noise" the target into the source.
        batch_size: senders in one forward pass; see `sweep`.
        out: a folder in which finished senders are kept; see `sweep`.

    Returns:
        `metric` and `normalised` as in `patch_spans`, over axis sender (after axis receiver, for a mapping), with
        coordinates `kind`, `layer` and `head` (-1 where there is none). Not a number where a sender does not stand
        before a set of receivers. `attrs` hold `source_metric`, `target_metric`, `receivers` and what was frozen.

    Raises:
        ValueError: where positions cannot be matched; for a name the model has not, a sender that stands before no
            receiver or writes nothing at the positions, "logits" among other receivers, or another word for `freeze`
            or `direction`.
        TypeError: for names that are no list.

    Example:
        >>> found = mv.path_patching(vlm, real, null, yes, receivers=["a3.h7<q>"], positions="last")
        >>> mv.plot.senders(found.normalised)

    Source:
        Wang et al. (2023), "Interpretability in the Wild", section 3.1 and appendix B, with ("heads",); Goldowsky-Dill
        et al. (2023), "Localizing Model Behavior with Path Patching", on paths in general.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={told(direction)} is not known; choose from 'denoise', 'noise'.")
    matched(vlm, source, target, [])
    into = target if direction == "denoise" else source
    several = isinstance(receivers, Mapping)
    sets = {str(name): checked_receivers(vlm, one) for name, one in _sets(receivers).items()}
    names = senders_of(vlm, senders, list(sets.values()))
    paths = Paths(vlm, into, sets, names, positions_in(into, positions), _freeze(freeze), batch_size)
    ends, values, how = _measured(paths, source if into is target else target, metric, out)
    table = xr.DataArray(values, dims=["receiver", "sender"], coords={"receiver": list(sets), **_named(names)})
    swept = (table if several else table.isel(receiver=0, drop=True)).rename("metric")
    result = shared_out(swept, direction, *(ends if into is target else ends[::-1]))
    result.metric.attrs = {"long_name": metric_name(metric), "units": metric_unit(metric)}
    about = {
        "receivers": "; ".join(
            f"{name}: {', '.join(one)}" if several else ", ".join(one) for name, one in sets.items()
        ),
        "positions": "all" if paths.positions is None else ", ".join(map(str, paths.positions)),
        "frozen": " and ".join(paths.freeze) + " between sender and receivers, as they were",
        "patched": DIRECTIONS[direction],
        "direction": direction,
        "engine": how,
        **patched_with(vlm, direction),
    }
    return result.assign_attrs(record(vlm, [source, target], metric, **{**result.attrs, **about}))


@dataclass(frozen=True)
class Paths:
    """What is asked of one run that is patched into.

    Attributes:
        into: the prompt patched into.
        sets: receivers by the set's name.
        positions: where senders are patched; None for everywhere.
    """

    vlm: VLM
    into: Prompt
    sets: Mapping[str, Sequence[str]]
    senders: Sequence[str]
    positions: tuple[int, ...] | None
    freeze: tuple[str, ...]
    batch_size: int | None

    def before(self, receivers: Sequence[str]) -> list[int]:
        """The senders, by number, that stand before one of some receivers."""
        reads = [stream_of(name) for name in receivers]
        shape = self.vlm.shape
        return [at for at, name in enumerate(self.senders) if any(feeds(shape, name, one) for one in reads)]

    def pieces(self) -> list[tuple[str, list[int]]]:
        """Sets and as many senders of each as are worked through at once."""
        found = []
        for name, receivers in self.sets.items():
            at, size = self.before(receivers), senders_at_once(self.vlm, self.into, receivers)
            found += [(name, at[start : start + size]) for start in range(0, len(at), size)]
        return found

    def leg(self, kept: Kept, name: str, senders: Sequence[int]) -> Leg:
        """The runs of some senders to one set of receivers."""
        vlm, into, at, receivers = self.vlm, self.into, self.positions, self.sets[name]
        edits = {self.senders[n]: sender_edits(vlm, kept, self.senders[n], into, at) for n in senders}
        if list(receivers) == ["logits"]:
            layers = vlm.shape.layers["text"]
            return Leg([], list(edits.values()), frozen_edits(vlm, kept, into, self.freeze, layers, layers), Kept())
        own, stages, size = Kept(), stages_of(vlm, receivers), self.batch_size
        asked = [
            one for stage in stages for one in recording(vlm, kept, own, into, stage, edits, at, self.freeze, size)
        ]
        return Leg(asked, [received(own, sender, stages, at) for sender in edits], [], own)

    def first(self, kept: Kept, given: Prompt, metric: Metric) -> list[dict[str, Any]]:
        """The runs of both prompts, which keep what is patched and what is frozen."""
        layers, value = self.vlm.shape.layers["text"], partial(_end, self.vlm.metric(metric))
        frozen = frozen_sites(self.vlm, self.into, self.freeze, layers, layers)
        reads = (("given", given, sender_sites(self.vlm, self.senders)), ("taken", self.into, frozen))
        return [
            {"prompt": prompt, "read": sites, "value": value, "reduce": keep(kept, [name])}
            for name, prompt, sites in reads
        ]


def senders_at_once(vlm: VLM, prompt: Prompt, receivers: Sequence[str]) -> int:
    """How many senders' records are held at once.

    Example:
        >>> senders_at_once(vlm, real, ["a3.h5<q>"])
        256
    """
    shape = vlm.shape
    widths = [shape.d_model["text"] if name[0] == "m" else shape.d_head["text"] for name in receivers]
    return max(1, min(256, AT_ONCE // (8 * len(prompt) * sum(widths))))


def _measured(
    paths: Paths, given: Prompt, metric: Metric, out: str | Path | None
) -> tuple[list[np.ndarray], np.ndarray, str]:
    """The metric of the prompt patched from and of the one patched into, that of each path, and how they were run."""
    vlm, kept, pieces = paths.vlm, Kept(), paths.pieces()
    first, order = paths.first(kept, given, metric), list(paths.sets)
    values = np.full((len(paths.sets), len(paths.senders)), np.nan)
    if out is None:
        legs = [paths.leg(kept, *piece) for piece in pieces]
        ends, found, how = done(vlm, legs_run(vlm, paths.into, first, legs, metric, paths.batch_size))
        for (name, at), some in zip(pieces, found, strict=True):
            values[order.index(name), at] = some
        return [one[0] for one in ends], values, how
    about = ["path_patching", paths.sets, paths.senders, paths.positions, paths.freeze, vlm.metric(metric)]
    shards, made = Shards(out, print_of(vlm, [given, paths.into], about)), [f"read from {Path(out).name}"]

    def left() -> list[int]:
        for point, value in shards.values().items():
            values.flat[point] = value
        return [n for n, (name, at) in enumerate(pieces) if np.isnan(values[order.index(name), at]).any()]

    for n in taken(shards, len(pieces), left):
        name, at = pieces[n]
        leg = paths.leg(kept, name, at)
        _, found, how = done(vlm, legs_run(vlm, paths.into, first, [leg], metric, paths.batch_size))
        shards.add([order.index(name) * len(paths.senders) + one for one in at], torch.as_tensor(found[0]))
        made = [how]
    ends, _, _ = done(vlm, legs_run(vlm, paths.into, first, [], metric))
    return [one[0] for one in ends], values, made[0]


def _end(measure: Metric, logits: Tensor) -> Tensor:  # batch vocab
    """A metric, and how far rounding of the logits moves it."""
    return torch.tensor([[float(metric_values(measure, logits)[0]), rounding(measure, logits)]], dtype=torch.float64)


def _sets(receivers: Any) -> dict[Any, Any]:
    """Receivers by the name of their set."""
    if not isinstance(receivers, Mapping):
        return {"": receivers}
    if not receivers:
        raise ValueError("receivers names no sets; write for instance {'answer': 'logits'}.")
    return dict(receivers)


def _freeze(given: Any) -> tuple[str, ...]:
    """What is frozen, as it was given."""
    found = listed(given)
    if found not in FREEZE:
        raise ValueError(f"freeze={told(given)} is not known; choose from ('heads', 'mlps') and ('heads',).")
    return found


def _named(names: Sequence[str]) -> dict[str, Any]:
    """The coordinates of senders."""
    nodes = [Node.parse(name) for name in names]
    number = {"layer": [node.layer for node in nodes], "head": [node.head for node in nodes]}
    kinds = ["head" if node.kind == "attention" else node.kind for node in nodes]
    columns = {key: [-1 if one is None else one for one in column] for key, column in number.items()}
    return {"sender": list(names), "kind": ("sender", kinds), **{key: ("sender", x) for key, x in columns.items()}}
