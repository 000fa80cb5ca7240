"""Rows of edits on their way through a model, and what happens to them between its layers.

Rule this module guards: edits see all positions of their prompt, those before the first that is run as they were, and
one that changes one of those after all is found out.

>>> from mechvlm.start import start_of
>>> start = start_of(vlm, real, [("z", 3, "text")])
>>> Rows(start, ((mv.ablate_heads(3, [0]),),), first=0, loose=(False,)).at(("z", 3, "text"), row=0)[0].site
Site(kind='z', layer=3, tower='text')
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.plan import key_of
from mechvlm.start import Start
from mechvlm.visit import apply_edit

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
        streams: what enters the first layer in each row, where rows have words of their own.
        masks: those made for calls.
    """

    start: Start
    edits: tuple[tuple[Edit, ...], ...]
    first: int
    loose: tuple[bool, ...]
    streams: Tensor | None = None
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
