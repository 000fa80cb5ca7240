"""A model run as a circuit: along the edges that are kept goes what its parts write, along all others another run's.

Each reader of the residual stream (the queries, keys and values of each head, each MLP, the logits) is given a stream
of its own: the sum of what the parts before it wrote, each as it is in this run where the edge is kept, and as it was
in the other run where it is not. Readers that are given the same stream share a row of the batch, and each head is put
together in the circuit's first row from the rows that its queries, keys and values were read from. So a circuit is one
forward pass with some rows, and nothing of a layer is computed by other means than the model's. Where layers attend to
the picture's features beside the stream (Mllama) there is no such run, and it is refused.

Rule this module guards: all edges give the prompt's own run, and none the other's, to rounding.

>>> streams_of(vlm.shape, np.zeros((1, 74, 137), dtype=bool)).rows  # no edge: all readers are given the same
1
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.nodes import read_at, readers, writers
from mechvlm.passes import Pass, of_groups, passed
from mechvlm.plan import Plan
from mechvlm.shapes import Parts, Shape
from mechvlm.visit import Visit
from mechvlm.writes import Writing, head_writes, written

END = ("end", 0)


@dataclass(frozen=True)
class Streams:
    """The streams that the readers of one circuit are given, each of them once.

    Attributes:
        kept: for each moment at which streams are put together, the edges that are kept in each of them. Moments are
            ("pre", layer), ("mid", layer) and ("end", 0).
        places: which of the streams of its moment each reader is given.
    """

    kept: dict[tuple, Bool[np.ndarray, "row span writer"]]
    places: Int[np.ndarray, " reader"]

    @property
    def rows(self) -> int:
        """How many different streams there are at one moment, at most."""
        return max(map(len, self.kept.values()))


@dataclass(frozen=True)
class Wires:
    """Which stream each reader of some circuits is given.

    Attributes:
        circuits: how many.
        rows: of the batch, for each circuit.
        writers: names, in forward order.
        spans: of each position, the number of its span.
        masks: for each moment the edges that are kept; see `Streams`.
        places: for each reader, the row of the batch that it reads, of each circuit.
        between: for each layer, whether its MLP reads behind its attention.
    """

    circuits: int
    rows: int
    writers: tuple[str, ...]
    spans: Int[Tensor, " pos"]
    masks: dict[tuple, Bool[Tensor, "circuit row span writer"]]
    places: dict[str, Int[Tensor, " circuit"]]
    between: tuple[bool, ...]

    @property
    def first(self) -> Int[Tensor, " circuit"]:
        """The row of the batch in which each circuit is put together."""
        return torch.arange(self.circuits) * self.rows


def streams_of(shape: Shape, kept: Bool[np.ndarray, "span writer reader"]) -> Streams:
    """The streams that the readers of a circuit are given.

    Args:
        kept: the edges of the circuit, at each span, or at all of them alike.
    """
    by_reader = np.stack([np.ascontiguousarray(one.T) for one in kept], axis=1)  # quicker than all at once
    found: dict[tuple, dict[bytes, int]] = {}
    places = []
    for edges, reader in zip(by_reader, readers(shape), strict=True):
        here = found.setdefault(_moment(shape, reader), {})
        places.append(here.setdefault(edges.tobytes(), len(here)))
    size = (-1, *kept.shape[:2])
    different = {moment: np.frombuffer(b"".join(here), dtype=bool).reshape(size) for moment, here in found.items()}
    return Streams(different, np.array(places))


def wires_of(shape: Shape, circuits: Sequence[Streams], of_position: Sequence[int]) -> Wires:
    """The streams of several circuits as rows of one batch.

    Args:
        of_position: the number of each position's span.
    """
    rows, spans = max(one.rows for one in circuits), max(one.kept[END].shape[1] for one in circuits)
    names, masks = writers(shape), {}
    for moment in circuits[0].kept:
        each = [one.kept[moment] for one in circuits]
        mask = np.zeros((len(each), rows if moment[0] == "pre" else 1, spans, len(names)), dtype=bool)
        for circuit, kept in enumerate(each):
            mask[circuit, : len(kept)] = kept
        masks[moment] = torch.from_numpy(mask)
    placed = np.array([one.places + at * rows for at, one in enumerate(circuits)])
    places = dict(zip(readers(shape), map(torch.tensor, placed.T), strict=True))
    between = tuple("resid_mid" in kinds for kinds in shape.kinds["text"])
    held = torch.tensor(of_position if spans > 1 else [0] * len(of_position))
    return Wires(len(circuits), rows, names, held, masks, places, between)


def _moment(shape: Shape, reader: str) -> tuple:
    """When a reader's stream is put together."""
    half = read_at(shape, reader)
    return END if half == math.inf else (("pre", "mid")[int(half % 2)], int(half // 2))


class Wired(Visit):
    """What happens while circuits are walked.

    Args:
        plan: of the run, for its rows; it reads nothing.
        other: what each part wrote in the other run, `pos d_model`.
        image: positions of the image tokens.
    """

    def __init__(
        self, plan: Plan, model: Any, how: Writing, wires: Wires, other: Mapping[str, Tensor], image: Sequence[int]
    ) -> None:
        Visit.__init__(self, plan)
        self.model, self.how, self.wires, self.image = model, how, wires, list(image)
        self.other = other
        shape = (wires.circuits, len(wires.writers), *other["embed"].shape)
        # How far what each part writes here is from what it wrote in the other run; later parts have written nothing.
        self.changes = other["embed"].new_zeros(shape)
        wide = torch.promote_types(self.changes.dtype, torch.float32)  # parts are many, and rounded once each
        self.base = self.changes.new_zeros((wires.circuits, *other["embed"].shape), dtype=wide)
        self.z: Tensor | None = None
        self.before: list[str] = []

    def touch(self, site: tuple, x: Tensor) -> Tensor:
        """Give each reader its stream, and take down what each part writes."""
        kind, layer, tower = site
        if tower != "text":
            return Visit.touch(self, site, x)
        if kind == "resid_pre":
            if layer == 0:
                self.enter(x[0])
            return Visit.touch(self, site, self.streams(("pre", layer), x))
        if kind == "resid_mid":
            return Visit.touch(self, site, self.streams(("mid", layer), x))
        if kind == "resid_post":
            return Visit.touch(self, site, self.streams(END, x))
        x = Visit.touch(self, site, x)
        if kind in ("q", "k", "v"):
            return self.put_together(kind, layer, x)
        if kind == "deepstack":
            self.note(f"d{layer}", x.reshape(-1, x.shape[-1])[: len(self.image)])
        elif kind == "z":
            self.z = x[self.wires.first.to(x.device)]
            if not self.how.behind[layer]:
                self.heads(layer, None)
        elif kind == "attn_out":
            self.heads(layer, x[self.wires.first.to(x.device)])
        elif kind == "mlp_out":
            rows = self.wires.places[f"m{layer}"] if not self.wires.between[layer] else self.wires.first
            self.wrote(f"m{layer}", x[rows.to(x.device)])
        return x

    def enter(self, first: Float[Tensor, "pos d_model"]) -> None:
        """Take down what enters the first layer, which is the prompt's own."""
        image = torch.zeros_like(first)
        image[self.image] = first[self.image]
        self.wrote("embed", first - image)
        self.wrote("image", image)

    def note(self, name: str, at_image: Float[Tensor, "token d_model"]) -> None:
        """Take down what deep-stack adds, which is known before the layers run."""
        whole = torch.zeros_like(self.other["embed"])
        whole[self.image] = at_image.to(whole)
        self.changes[:, self.wires.writers.index(name)] = whole - self.other[name]

    def wrote(self, name: str, x: Tensor) -> None:
        """Take down what a part writes, `pos d_model`, or one of them for each circuit."""
        self.changes[:, self.wires.writers.index(name)] = x.to(self.changes) - self.other[name]
        self.base += self.other[name]

    def heads(self, layer: int, out: Float[Tensor, "circuit pos d_model"] | None) -> None:
        """Take down what the heads of a layer write."""
        assert self.z is not None
        size = self.z.shape[:2]
        flat = None if out is None else out.flatten(0, 1)
        parts, bias = head_writes(self.model, self.how, layer, self.z.flatten(0, 1), flat)
        for head, part in enumerate(parts.unflatten(0, size).unbind(2)):
            self.wrote(f"a{layer}.h{head}", part)
        self.base += (bias if bias.ndim == 1 else bias.unflatten(0, size)).to(self.base)

    def streams(self, moment: tuple, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """The rows with the streams that are read at a moment."""
        if moment[0] == "pre" and (added := f"d{moment[1] - 1}") in self.wires.writers:
            self.base += self.other[added]
        mask = self.wires.masks[moment].to(x)
        found = self.base.unsqueeze(1).repeat(1, mask.shape[1], 1, 1)
        for span in range(mask.shape[2]):
            at = (self.wires.spans == span).nonzero()[:, 0].to(found.device)
            here = at if mask.shape[2] > 1 else slice(None)  # all positions, without a copy of what is large
            change = torch.einsum("crw,cwpd->crpd", mask[:, :, span].to(self.changes), self.changes[:, :, here])
            found[:, :, here] += change
        x = x.clone()
        at = (self.wires.first[:, None] + torch.arange(mask.shape[1])).flatten().to(x.device)
        x[at] = found.flatten(0, 1).to(x)
        return x

    def put_together(self, kind: str, layer: int, x: Tensor) -> Tensor:
        """Each circuit's first row with every head from the row in which its stream is."""
        name, heads = "h" if kind == "q" else "kv", range(x.shape[2])
        rows = torch.stack([self.wires.places[f"a{layer}.{name}{head}<{kind}>"] for head in heads], 1).to(x.device)
        new = x.clone()
        new[self.wires.first.to(x.device)] = x[rows, :, torch.tensor(heads, device=x.device)].transpose(1, 2)
        return new


def run_wired(
    model: Any, arch: Parts, cap: float | None, how: Writing, others: Sequence[Pass], image: list, wired: Sequence
) -> list[Tensor]:
    """A metric of each of some circuits, run where the model is.

    Args:
        others: passes over the prompts whose writes go along edges that are not kept; of several, their mean.
        image: positions of the image tokens.
        wired: for each pass over circuits the pass, and its wires.
    """
    other = mean_writes(model, arch, cap, how, others, image)
    found = []
    for one, wires in wired:
        visit = Wired(one.plan, model, how, wires, other, image)
        shows = passed(model, arch, cap, visit, one, wired_sites(how, wires))
        found.append(shows["metric"][wires.first])
    return found


def wired_sites(how: Writing, wires: Wires) -> list[tuple]:
    """The sites at which circuits are put together."""
    found: list[tuple] = []
    for layer, behind in enumerate(how.behind):
        kinds = ["resid_pre", "q", "k", "v", "z", *(["attn_out"] if behind else [])]
        kinds += [*(["resid_mid"] if wires.between[layer] else []), "mlp_out"]
        kinds += ["deepstack"] if layer in how.added else []
        found += [(kind, layer, "text") for kind in kinds]
    return [*found, ("resid_post", len(how.behind) - 1, "text")]


def mean_writes(
    model: Any, arch: Parts, cap: float | None, how: Writing, passes: Sequence[Pass], image: Sequence[int]
) -> dict[str, Tensor]:
    """What each part wrote, over the runs of some prompts with the same positions."""
    total: dict[str, Tensor] = {}
    for one in passes:
        shows = passed(model, arch, cap, Visit(one.plan), one)
        read: dict[tuple, Any] = {site: of_groups(steps[0]) for site, steps in shows["saved"].items()}
        for name, part in written(model, how, read, image).items():
            total[name] = part + total[name] if name in total else part
    return {name: part / len(passes) for name, part in total.items()}
