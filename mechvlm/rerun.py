"""Some rows of edits, run from where they begin: each from its layer, all from one position.

Rows join at the layer that their edits begin with; until then they would be the run before. From there on each layer is
called for the positions from the first edited one on, with the keys and values of those before as its cache.

Rules this module guards:

* Exact: what a row would have been given is what it is given. Edits see all positions, those before as they were, and
  an edit that changes one of them after all is found out.
* The last layer is computed for the last position only; of the others it makes the keys and values. An edit within it,
  or of what leaves it, makes the whole layer.

A layer is run in a trace for the rows that edit its inside; for others it is called as it is.

>>> from mechvlm.start import start_of
>>> start = start_of(vlm, real, [("z", 3, "text"), ("z", 5, "text")])
>>> rows = [mv.ablate_heads(3, [0])], [mv.ablate_heads(5, [1])]
>>> rerun(start, rows, [Reach(begin=3, first=0), Reach(begin=5, first=0)]).shape[0]
2
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm import batch as batches
from mechvlm.attention import capped
from mechvlm.between import Reaching, Rows, edited, entering, inside, leaving, placed, put_row
from mechvlm.edits import Edit
from mechvlm.handed import CACHE, Enough, Prefix, arguments, packs
from mechvlm.plan import Plan
from mechvlm.reach import Reach
from mechvlm.seam import attending
from mechvlm.start import FEATURES, Start
from mechvlm.visit import RESIDUAL_KINDS, Visit
from mechvlm.walk import at, walk_layer


class Resumed(Visit):
    """A visit of the last positions of a prompt, in which edits see all of them."""

    def __init__(self, plan: Plan, rows: Rows, loose: Sequence[bool]) -> None:
        super().__init__(plan)
        self.rows, self.loose = rows, loose

    def offer(self, site: tuple, x: Tensor) -> Tensor:
        """Show edits the whole text, the positions before as they were, and go on with what is run."""
        entries, first = self.plan.active(site, 0), self.rows.first
        if not first or site[0] not in RESIDUAL_KINDS or not entries:
            new = super().offer(site, x)
            if first and entries and site[0] in ("k", "v"):
                self.check_keys(site, new)
            return new
        self.fired.update(number for number, _, _ in entries)
        changed = x
        for row in range(len(x)):
            edits = [edit for _, rows, edit in entries if rows is None or row in rows]
            new = edited(self.rows, site, x[row : row + 1], edits, self.loose[row]) if edits else x
            if edits and new.data_ptr() != x[row].data_ptr():
                changed = x.clone() if changed is x else changed
                changed[row] = new[0]
        return changed

    def check_keys(self, site: tuple, x: Tensor) -> None:
        """Find out whether edits changed keys or values of the positions before."""
        own = self.rows.start.after(site)[:, : self.rows.first]
        firm = [row for row in range(len(x)) if not self.loose[row]]
        if firm and not torch.equal(x[firm][:, : self.rows.first], own.expand(len(firm), *own.shape[1:])):
            raise Reaching


def rerun(
    start: Start,
    variants: Sequence[Sequence[Edit]],
    reaches: Sequence[Reach],
    first: int | None = None,
    streams: Float[Tensor, "batch pos d_model"] | None = None,
    ends: Sequence[int] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """The last position's logits of rows of edits, run from where they begin.

    Args:
        first: the position to begin with; by default the first that a row begins with.
        streams: what enters the first layer from there on, in rows of other words that all begin with that layer.
        ends: the last position of each such row, where they end apart; no edit may then tell positions apart.

    Raises:
        Reaching: where an edit changed a position before that.
        ValueError, TypeError: as `vlm.run` does.
    """
    order = sorted(range(len(variants)), key=lambda row: reaches[row].begin)
    begin = min(reach.first for reach in reaches) if first is None else first
    loose = tuple(reaches[row].last and bool(begin) for row in order)
    rows = Rows(start, tuple(tuple(variants[row]) for row in order), begin, loose, streams)
    vlm = start.vlm
    with torch.no_grad():
        h = start.sites[("resid_pre", 0, "text")][:0, begin:]
        for layer in range(reaches[order[0]].begin, start.layers):
            h = entering(rows, layer, joined(rows, layer, h, sum(reach.begin <= layer for reach in reaches)))
            whole = layer < start.layers - 1 or ends is not None
            h = through(rows, layer, h) if whole else last_positions(rows, layer, h)
        if ends is not None:
            h = h[torch.arange(len(h)), torch.tensor(ends) - begin][:, None]
        h = joined(rows, start.layers, h if len(h) else h[:, -1:], len(order))
        norm, head = at(vlm.hf, vlm.arch.norm), at(vlm.hf, vlm.arch.unembed)
        said = capped(head(norm(h[:, -1])), vlm.shape.logit_cap)
    said = said[torch.tensor(order).argsort().to(said.device)]
    batches.check_finite(said)
    return said


def joined(rows: Rows, layer: int, h: Tensor, count: int) -> Tensor:
    """The residual stream that enters a layer, with the rows that begin there; what left the one before is edited.

    Args:
        count: rows that have begun by this layer.
    """
    start = rows.start
    own = start.sites[("resid_post", layer - 1, "text") if layer else ("resid_pre", 0, "text")][:, rows.first :]
    own = own if layer or rows.streams is None else rows.streams
    h, done, new = h.to(own.device), len(h), own.expand(count - len(h), *own.shape[1:])
    if layer == start.layers:
        # Of rows that came by the last layer only the last position is left, edited already.
        late = [leaving(rows, layer - 1, row, new[row - done : row - done + 1])[:, -1:] for row in range(done, count)]
        return torch.cat([h, *late])
    h = torch.cat([h, new]) if len(new) else h
    for row in range(count) if layer else ():
        put_row(h, row, leaving(rows, layer - 1, row, h[row : row + 1]))
    return (
        placed(rows, ("deepstack", layer - 1, "text"), h, add=True) if layer else placed(rows, FEATURES, h, add=False)
    )


def through(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What leaves a layer, before edits of it."""
    own = any(inside(edit, layer) for edit in rows.start.vlm.edits)
    within = [row for row in range(len(h)) if own or rows.inside(layer, row)]
    if not within:
        return called(rows, layer, h)
    if len(within) == len(h):
        return traced(rows, layer, h, within)
    others = [row for row in range(len(h)) if row not in within]
    # Made of what leaves the layer, since what enters may be on another device.
    both = torch.cat([traced(rows, layer, h[within], within), called(rows, layer, h[others])])
    return both[torch.tensor([*within, *others]).argsort().to(both.device)]


def last_positions(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What leaves the last layer at the last position, after edits of it, `batch 1 d_model`."""
    own, site = any(inside(edit, layer) for edit in rows.start.vlm.edits), ("resid_post", layer, "text")
    whole = [row for row in range(len(h)) if own or rows.inside(layer, row) or rows.at(site, row)]
    others = [row for row in range(len(h)) if row not in whole]
    found: dict[int, Tensor] = {}
    if others:
        found |= dict(zip(others, last_query(rows, layer, h[others] if whole else h), strict=True))
    if whole:
        left = through(rows.some(whole), layer, h[whole])
        found |= {row: leaving(rows, layer, row, x[None])[0, -1:] for row, x in zip(whole, left, strict=True)}
    return torch.stack([found[row] for row in range(len(h))]) if found else h[:, -1:]


def module_of(start: Start, layer: int) -> Any:
    """A layer of the language model itself."""
    path, number = start.vlm.arch.text.layers[layer]
    return at(start.vlm.hf, path)[number]


def called(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What leaves a layer that no edit is inside of."""
    packed = packs(rows.start, layer, h, rows.first)
    named = arguments(rows.start, layer, (*h.shape[:2], h.shape[1]), rows.masks, packed)
    given = h.reshape(1, -1, h.shape[-1]) if packed else h
    return module_of(rows.start, layer)(given, **named).reshape(h.shape)


def traced(rows: Rows, layer: int, h: Tensor, within: Sequence[int]) -> Tensor:
    """What leaves a layer whose inside is edited.

    Args:
        within: which rows these are.
    """
    start, vlm = rows.start, rows.start.vlm.without_edits()
    own = [edit for edit in start.vlm.edits if inside(edit, layer) and edit.when != "decode"]
    plan = vlm.plan([start.prompt], (), own, variants=[rows.inside(layer, row) for row in within])
    visit = Resumed(plan, rows, [rows.loose[row] for row in within])
    module, named = module_of(start, layer), arguments(start, layer, (*h.shape[:2], h.shape[1]), rows.masks)
    path, number = vlm.arch.text.layers[layer]
    shown: dict[str, Tensor] = {}

    def call(stream: Tensor) -> Tensor:
        return module(stream, **named)

    with vlm.model.trace(h, fn=call):
        envoy = at(vlm.model, path)[number]
        kinds = plan.wanted()[("text", layer)]
        walk_layer(envoy, vlm.arch.text, ("text", layer), kinds, visit.touch, attending(visit))
        shown["h"] = envoy.output
    batches.check_fired(plan, visit.fired)
    return shown["h"]


def last_query(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What leaves a layer at the last position, from the keys and values of all, `batch 1 d_model`."""
    start, module, (count, run, width) = rows.start, module_of(rows.start, layer), h.shape
    last = h[:, -1:]
    if not start.vlm.arch.text.blocks[layer].attention or run == 1:
        return called(rows, layer, last)
    packed = packs(start, layer, h, rows.first)
    named = arguments(start, layer, (count, run, run), rows.masks, packed)
    taking = Prefix(named[CACHE].held, taking=True)
    with suppress(Enough):
        module(h.reshape(1, -1, width) if packed else h, **{**named, CACHE: taking})
    named = arguments(start, layer, (count, run, 1), rows.masks, packed)
    given = last.reshape(1, -1, width) if packed else last
    return module(given, **{**named, CACHE: Prefix(taking.held, whole=True)}).reshape(last.shape)
