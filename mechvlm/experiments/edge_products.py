"""Scores of all edges between the parts of a language model, made where it runs from a few of its passes.

Rule this module guards: what is kept of a pass grows with its positions and not with the parts of the model. What each
part wrote, and the gradient at each reader's input, are made for some positions at a time and one layer's readers, and
nothing is kept of an edge but a number for each span.

>>> pieces([[0, 1, 2], [3]], 2)
[(0, [0, 1]), (0, [2]), (1, [3])]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.passes import Pass, of_groups, passed
from mechvlm.reads import Inputs, attention_gradients, mlp_gradient
from mechvlm.shapes import Parts
from mechvlm.visit import Visit
from mechvlm.writes import Writing, written

BYTES = 8


@dataclass(frozen=True)
class Graph:
    """The parts of a model and the positions to sum over, as plain values that can be sent.

    Attributes:
        writing, inputs: how its layers write and read.
        writers: names, in forward order.
        before: for each layer how many of them stand before its attention, and before its MLP.
        readers: how many there are.
        spans: positions to sum over.
        image: positions of the image tokens, in their order.
        width: of the residual stream.
        budget: bytes that what is made for some positions may take.
    """

    writing: Writing
    inputs: Inputs
    writers: tuple[str, ...]
    before: tuple[tuple[int, int], ...]
    readers: int
    spans: tuple[tuple[int, ...], ...]
    image: tuple[int, ...]
    width: int
    budget: int


@dataclass(frozen=True)
class Turn:
    """One pass, and what it is for.

    Attributes:
        keeps: "source" or "target" where it shows what each part wrote for that prompt.
        weight: of its gradients in the scores; 0 where none are taken.
        rows: the writers whose edges they count for, from and to.
        routes: whether it is scored by what its parts wrote instead of by gradients.
    """

    what: Pass
    keeps: str = ""
    weight: float = 0.0
    rows: tuple[int, int] = (0, 1 << 30)
    routes: bool = False


def edges_scored(
    model: Any, arch: Parts, cap: float | None, graph: Graph, turns: Sequence[Turn], kept: dict
) -> dict[str, Any]:
    """Scores over writer, reader and span, and the metric of the source and of the target.

    Args:
        model: the nnsight model.
        cap: of the model's logits.
        kept: what edits of later passes find of the source's.
    """
    scores = torch.zeros(len(graph.writers), graph.readers, len(graph.spans), dtype=torch.float64)
    ends: dict[str, Tensor] = {}
    fired: list[list[int]] = []
    ready: dict[str, dict] = {}
    waiting: list[tuple] = []
    for turn in turns:
        shows = passed(model, arch, cap, Visit(turn.what.plan), turn.what)
        fired.append(shows["fired"])
        read = {site: of_groups(steps[0]) for site, steps in shows["saved"].items()}
        gradients = {site: of_groups(found) for site, found in shows["grads"].items()}
        if turn.keeps:
            ready[turn.keeps], ends[turn.keeps] = read, shows["metric"].detach().double().cpu()[0]
        if turn.keeps == "source":
            kept.update(read)
        if turn.routes:
            add_routes(scores, model, graph, read)
        waiting += [(turn, read, gradients)] if turn.weight else []
        if "source" in ready and "target" in ready:
            for one, streams, slopes in waiting:
                add_products(scores, model, graph, ready, one, streams, slopes)
            waiting = []
    return {"scores": scores, "ends": ends, "fired": fired}


def add_products(
    scores: Float[Tensor, "writer reader span"],
    model: Any,
    graph: Graph,
    ends: Mapping[str, Mapping[tuple, Tensor]],
    turn: Turn,
    read: Mapping[tuple, Tensor],
    gradients: Mapping[tuple, Tensor],
) -> None:
    """Add each write's difference times the gradients of one pass at each reader's input, summed over each span."""
    start, stop = turn.rows
    layers = len(graph.before)
    size = 3 * len(graph.writers) + 4 * sum(graph.inputs.counts)
    for span, positions in pieces(graph.spans, graph.budget // (BYTES * graph.width * size)):
        difference = differences(model, graph, ends, positions)[start:stop].flatten(1)
        reader, here = 0, stretch(positions)
        for layer in range(layers):
            heads = attention_gradients(model, graph.inputs, layer, read, gradients, here)
            rest = mlp_gradient(graph.inputs, layer, gradients, heads, here)
            for found, count in zip((heads, rest[None]), graph.before[layer], strict=True):
                some = difference[: max(0, count - start)]
                made = turn.weight * (some @ found.to(some).flatten(1).T).double().cpu()
                scores[start : start + len(some), reader : reader + len(found), span] += made
                reader += len(found)
        behind = gradients["resid_post", layers - 1, "text"][:, here].flatten(1)
        made = turn.weight * (difference @ behind.to(difference).T).double().cpu()
        scores[start : start + len(difference), reader:, span] += made


def differences(
    model: Any, graph: Graph, ends: Mapping[str, Mapping[tuple, Tensor]], positions: Sequence[int]
) -> Float[Tensor, "writer pos d_model"]:
    """What each part wrote for the source, less what it wrote for the target."""
    source, target = (sliced(graph, ends[end], positions) for end in ("source", "target"))
    image = among(graph, positions)
    if not any(graph.writing.behind):  # writing is linear, so the difference itself is written
        apart = {site: x - target[site] for site, x in source.items() if site in target}
        made = written(model, graph.writing, apart, image)
        return torch.stack([made[name] for name in graph.writers])
    one, other = (written(model, graph.writing, some, image) for some in (source, target))
    return torch.stack([one[name] - other[name] for name in graph.writers])


def edges_shown(
    model: Any, arch: Parts, cap: float | None, graph: Graph, turns: Sequence[Turn], names: Sequence[str]
) -> dict[str, Any]:
    """What some parts wrote for the source less what they wrote for the target, and the target's other readings.

    Args:
        turns: the source's pass and the target's.
        names: the parts.
    """
    ready: dict[str, dict] = {}
    ends: dict[str, Tensor] = {}
    for turn in turns:
        shows = passed(model, arch, cap, Visit(turn.what.plan), turn.what)
        ready[turn.keeps] = {site: of_groups(steps[0]) for site, steps in shows["saved"].items()}
        ends[turn.keeps] = shows["metric"].detach().double().cpu()[0]
    difference: dict[str, list[Tensor]] = {name: [] for name in names}
    everywhere = ready["target"]["resid_pre", 0, "text"].shape[1]
    for _, positions in pieces([range(everywhere)], graph.budget // (3 * BYTES * graph.width * len(graph.writers))):
        made = dict(zip(graph.writers, differences(model, graph, ready, positions), strict=True))
        for name in names:
            difference[name].append(made[name].clone())
    own = {site: x for site, x in ready["target"].items() if site[0] in ("q", "k", "v", "mlp_out")}
    return {"difference": {name: torch.cat(some) for name, some in difference.items()}, "own": own, "ends": ends}


def among(graph: Graph, positions: Sequence[int]) -> list[int]:
    """Which of some positions are those of image tokens, by their place among them."""
    tokens = set(graph.image)
    return [at for at, position in enumerate(positions) if position in tokens]


def sliced(graph: Graph, read: Mapping[tuple, Tensor], positions: Sequence[int]) -> dict[tuple, Tensor]:
    """What was read of a language model's layers, at some positions."""
    tokens = {position: token for token, position in enumerate(graph.image)}
    chosen = [tokens[positions[at]] for at in among(graph, positions)]
    some = {}
    for site, x in read.items():
        if site[0] == "deepstack":
            some[site] = x.flatten(0, 1)[chosen][None]
        elif site[2] == "text" and site[1] is not None:
            some[site] = x[:, stretch(positions)]
    return some


def stretch(positions: Sequence[int]) -> Sequence[int] | slice:
    """Positions as a slice where they stand beside each other, so that nothing is copied.

    Example:
        >>> stretch([3, 4, 5]), stretch([3, 5])
        (slice(3, 6, None), [3, 5])
    """
    together = list(positions) == list(range(positions[0], positions[0] + len(positions)))
    return slice(positions[0], positions[0] + len(positions)) if together else positions


def add_routes(
    scores: Float[Tensor, "writer reader span"], model: Any, graph: Graph, read: Mapping[tuple, Tensor]
) -> None:
    """Add each write's share of the sum that a reader reads, by how near it comes to it, as a mean over each span."""
    layers, size = len(graph.before), 6 * len(graph.writers)
    for span, positions in pieces(graph.spans, graph.budget // (BYTES * graph.width * size)):
        parts = written(model, graph.writing, sliced(graph, read, positions), among(graph, positions))
        stacked = torch.stack([parts[name] for name in graph.writers])
        length, reader = len(graph.spans[span]), 0
        for layer in range(layers):
            heads = sum(graph.inputs.counts) if graph.inputs.matrices[layer] else 1
            middle = "resid_mid" if graph.inputs.middle[layer] else "resid_pre"
            both = zip((heads, 1), ("resid_pre", middle), graph.before[layer], strict=True)
            for readers, kind, count in both:
                share = shares(stacked[:count], read[kind, layer, "text"][0, positions]) / length
                scores[:count, reader : reader + readers, span] += share[:, None]
                reader += readers
        scores[:, reader, span] += shares(stacked, read["resid_post", layers - 1, "text"][0, positions]) / length


def shares(writes: Float[Tensor, "writer pos d_model"], stream: Float[Tensor, "pos d_model"]) -> Tensor:  # writer
    """The importance of each of the writes to their sum, summed over positions.

    What no part writes is one of them, so that the shares at a position come to one at most.
    """
    every = torch.cat([writes, (stream - writes.sum(0))[None]]).double()
    whole = stream.double()
    near = (whole.abs().sum(-1) - (whole - every).abs().sum(-1)).clamp(min=0)
    total = near.sum(0)
    return torch.where(total > 0, near / total, torch.zeros_like(near))[:-1].sum(-1).cpu()


def pieces(spans: Sequence[Sequence[int]], size: int) -> list[tuple[int, list[int]]]:
    """The positions of each span, at most so many at a time; at least one."""
    step = max(1, size)
    return [
        (number, list(positions[start : start + step]))
        for number, positions in enumerate(spans)
        for start in range(0, len(positions), step)
    ]
