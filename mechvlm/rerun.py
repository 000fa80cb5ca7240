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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm import batch as batches
from mechvlm.attention import capped
from mechvlm.edits import Edit
from mechvlm.handed import CACHE, Enough, Prefix, arguments, packs
from mechvlm.plan import Plan, key_of
from mechvlm.reach import Reach
from mechvlm.seam import attending
from mechvlm.start import FEATURES, Start
from mechvlm.visit import RESIDUAL_KINDS, Visit, apply_edit
from mechvlm.walk import at, walk_layer

STREAM = ("resid_pre", "resid_post", "deepstack", "image_features")
"""What is edited between layers; anything else is inside one."""


class Reaching(Exception):  # noqa: N818 - found out and answered within the engine
    """An edit changed a position before the one that it was taken to begin with."""


@dataclass(frozen=True)
class Rows:
    """Rows of edits on their way.

    Attributes:
        start: the run before.
        edits: of each row, in the order of the layers that the rows begin with.
        first: the first position that is run.
        loose: whether what a row's edits do to the positions before is seen by none.
        masks: those made for calls.
    """

    start: Start
    edits: tuple[tuple[Edit, ...], ...]
    first: int
    loose: tuple[bool, ...]
    masks: dict[tuple, Tensor] = field(default_factory=dict)

    def at(self, site: tuple, row: int) -> list[Edit]:
        """The edits that a row has at a site, the model's own first."""
        return [edit for edit in (*self.start.vlm.edits, *self.edits[row]) if key_of(edit.site) == site]

    def some(self, which: Sequence[int]) -> "Rows":
        """Some of the rows."""
        return replace(
            self, edits=tuple(self.edits[row] for row in which), loose=tuple(self.loose[row] for row in which)
        )

    def inside(self, layer: int, row: int) -> list[Edit]:
        """The edits that a row has inside a layer."""
        return [edit for edit in self.edits[row] if inside(edit, layer)]


def inside(edit: Edit, layer: int) -> bool:
    """Whether an edit acts inside a layer of the language model."""
    return edit.site.tower == "text" and edit.site.layer == layer and edit.site.kind not in STREAM


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


def edited(rows: Rows, site: tuple, x: Tensor, edits: Sequence[Edit], loose: bool) -> Tensor:
    """A row's activation after its edits; the very same object where they changed nothing.

    Args:
        x: of the positions that are run.
    """
    first, layout = rows.first, rows.start.plan.layout
    whole = torch.cat([rows.start.sites[site][:, :first], x], 1) if first else x
    new = whole
    for edit in edits:
        new = apply_edit(new, site, (0, None, edit), layout, False)
    if new is whole:
        return x
    if first and not loose and not torch.equal(new[:, :first], rows.start.after(site)[:, :first]):
        raise Reaching
    return new[:, first:]


def rerun(
    start: Start, variants: Sequence[Sequence[Edit]], reaches: Sequence[Reach], first: int | None = None
) -> Float[Tensor, "batch vocab"]:
    """The last position's logits of rows of edits, run from where they begin.

    Args:
        first: the position to begin with; by default the first that a row begins with.

    Raises:
        Reaching: where an edit changed a position before that.
        ValueError, TypeError: as `vlm.run` does.
    """
    order = sorted(range(len(variants)), key=lambda row: reaches[row].begin)
    begin = min(reach.first for reach in reaches) if first is None else first
    loose = tuple(reaches[row].last and bool(begin) for row in order)
    rows = Rows(start, tuple(tuple(variants[row]) for row in order), begin, loose)
    vlm = start.vlm
    with torch.no_grad():
        h = start.sites[("resid_pre", 0, "text")][:0, begin:]
        for layer in range(reaches[order[0]].begin, start.layers):
            h = entering(rows, layer, joined(rows, layer, h, sum(reach.begin <= layer for reach in reaches)))
            h = through(rows, layer, h) if layer < start.layers - 1 else last_positions(rows, layer, h)
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
    done, new = len(h), own.expand(count - len(h), *own.shape[1:])
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


def leaving(rows: Rows, layer: int, row: int, x: Tensor) -> Tensor:
    """What leaves a layer in a row, after the row's edits of it."""
    edits = rows.at(site := ("resid_post", layer, "text"), row)
    return edited(rows, site, x, edits, rows.loose[row]) if edits else x


def put_row(h: Tensor, row: int, new: Tensor) -> None:
    """Write a row that changed into a batch that is no one else's."""
    if new.data_ptr() != h[row].data_ptr():
        h[row] = new[0]


def entering(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What enters a layer, after edits of it."""
    site = ("resid_pre", layer, "text")
    for row in range(len(h)):
        if edits := rows.at(site, row):
            put_row(h, row, edited(rows, site, h[row : row + 1], edits, rows.loose[row]))
    return h


def placed(rows: Rows, site: tuple, h: Tensor, add: bool) -> Tensor:
    """The picture's features, edited, put or added where image tokens stand.

    Args:
        add: whether every row has them added; else those that edit them have them put.
    """
    start, first = rows.start, rows.first
    if site not in start.sites:
        return h
    here = [(token, position - first) for token, position in enumerate(start.prompt.image) if position >= first]
    tokens, places = (torch.tensor([pair[at] for pair in here], dtype=torch.long, device=h.device) for at in (0, 1))
    own = start.after(site).reshape(-1, h.shape[-1]).to(h)
    for row in range(len(h)):
        mine = [edit for edit in rows.edits[row] if key_of(edit.site) == site]
        x = start.sites[site] if mine else start.after(site)
        for edit in rows.at(site, row) if mine else ():
            x = apply_edit(x, site, (0, None, edit), start.plan.layout, False)
        x = x.reshape(-1, h.shape[-1]).to(h)
        before = len(start.prompt.image) - len(here)
        if not torch.equal(x[:before], own[:before]):
            raise Reaching
        if add or mine:
            h[row, places] = h[row, places] + x[tokens] if add else x[tokens]
    return h


def through(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What leaves a layer, before edits of it."""
    own = any(inside(edit, layer) for edit in rows.start.vlm.edits)
    within = [row for row in range(len(h)) if own or rows.inside(layer, row)]
    if not within:
        return called(rows, layer, h)
    if len(within) == len(h):
        return traced(rows, layer, h, within)
    out = torch.empty_like(h)
    others = [row for row in range(len(h)) if row not in within]
    out[within] = traced(rows, layer, h[within], within)
    out[others] = called(rows, layer, h[others])
    return out


def last_positions(rows: Rows, layer: int, h: Tensor) -> Tensor:
    """What leaves the last layer at the last position, after edits of it, `batch 1 d_model`."""
    own, site = any(inside(edit, layer) for edit in rows.start.vlm.edits), ("resid_post", layer, "text")
    whole = [row for row in range(len(h)) if own or rows.inside(layer, row) or rows.at(site, row)]
    others = [row for row in range(len(h)) if row not in whole]
    out = h[:, -1:].clone()
    if others:
        out[others] = last_query(rows, layer, h[others] if whole else h)
    if whole:
        left = through(rows.some(whole), layer, h[whole])
        for row, x in zip(whole, left, strict=True):
            out[row] = leaving(rows, layer, row, x[None])[0, -1:]
    return out


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
    batches.check_fired(visit)
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
