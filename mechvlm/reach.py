"""Where a row's edits begin to act: at which layer, and at which position.

Rule this module guards: nothing is believed that cannot be found out. Where an edit says which positions it is for,
that is where a rerun begins, and a rerun that sees it change another one is begun anew from the first position; where
it does not say, it is tried on the activation it would be given, which is known. What acts before the language model,
or in a way that is not known here, is left to a full pass.

>>> from mechvlm.start import start_of
>>> reach_of(start_of(vlm, real, []), [mv.steer("text.3.resid_pre", direction, 1.0, [20])])
Reach(begin=3, first=20, last=False)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechvlm.edits import Edit
from mechvlm.plan import key_of
from mechvlm.sites import CROSS_KINDS, PATTERN_KINDS
from mechvlm.start import Start
from mechvlm.visit import apply_edit

BEHIND = ("resid_post", "deepstack")
BY_TOKEN = ("image_features", "deepstack")
"""Kinds of sites whose positions are those of image tokens."""


@dataclass(frozen=True, order=True)
class Reach:
    """Where a row's edits begin to act.

    Attributes:
        begin: the layer to begin with; the number of layers where nothing but the last residual stream is edited.
        first: the first position that differs.
        last: whether only the last position has to be run, all that it looks at being as it was.
    """

    begin: int
    first: int
    last: bool = False


def reach_of(start: Start, edits: Sequence[Edit]) -> Reach | None:
    """Where edits begin to act; None where they need a full pass."""
    end, own = start.layers, start.vlm.edits
    at_logits = any(edit.site.kind == "logits" for edit in own)  # which a rerun does not come by
    if start.hindrance or at_logits or not all(replayed(start, edit) for edit in edits):
        return None
    if not edits:
        return Reach(end, len(start.prompt) - 1, last=True)
    begin = min(layer_of(edit) for edit in edits)
    if begin >= end - 1 and last_suffices(start, edits, begin):
        return Reach(begin, len(start.prompt) - 1, last=True)
    first = start.cut(first_changed(start, edits))
    for edit in own:
        first = start.cut(min(first, whole_from(start, edit, begin, first)))
    return Reach(begin, first)


def last_suffices(start: Start, edits: Sequence[Edit], begin: int) -> bool:
    """Whether the last layer alone is edited, at one place, so that all its last position looks at is as it was."""
    end, sites = start.layers, {edit.site for edit in edits}
    own = [edit for edit in start.vlm.edits if edit.site.tower == "text" and (edit.site.layer or 0) >= end - 1]
    entering = begin == end - 1 and any(site.kind in ("resid_pre", "image_features", *BEHIND) for site in sites)
    return len(sites) == 1 and not own and not entering and not any(counts_rows(start, edit) for edit in edits)


def counts_rows(start: Start, edit: Edit) -> bool:
    """Whether an edit of attention tells rows by their number, so that it has to be given those that it is for."""
    if edit.site.kind in CROSS_KINDS and edit.site.kind in PATTERN_KINDS:
        return True  # whose queries are counted from the first one that is there
    if edit.site.kind not in PATTERN_KINDS or edit.bias is not None or edit.rows == "each":
        return False
    return edit.rows is None or any(row % len(start.prompt) < len(start.prompt) - 1 for row in edit.rows)


def whole_from(start: Start, edit: Edit, begin: int, first: int) -> int:
    """Where a rerun has to begin for an edit of the model's own, which would begin at a layer and a position."""
    site, length = edit.site, len(start.prompt)
    if site.tower != "text" or site.layer is None or site.layer < begin or not counts_rows(start, edit):
        return first
    if site.kind in CROSS_KINDS or edit.rows is None:
        return 0
    rows = [row % length for row in edit.rows]
    return min(rows) if first <= max(rows) else first


def replayed(start: Start, edit: Edit) -> bool:
    """Whether an edit acts within what a rerun runs."""
    site = edit.site
    if site.kind == "image_features":
        return start.takes_features and not any(own.site.tower != "text" for own in start.vlm.edits)
    return site.tower == "text" and site.layer is not None and edit.on == "value"


def layer_of(edit: Edit) -> int:
    """The layer that a rerun has to begin with."""
    return 0 if edit.site.layer is None else edit.site.layer + (edit.site.kind in BEHIND)


def first_changed(start: Start, edits: Sequence[Edit]) -> int:
    """The first position that edits change."""
    found = [first_query(start, edit) for edit in edits if edit.site.kind in PATTERN_KINDS]
    for site in dict.fromkeys(edit.site for edit in edits if edit.site.kind not in PATTERN_KINDS):
        here = [edit for edit in edits if edit.site == site]
        said = [position % len(start.prompt) for edit in here for position in edit.positions]
        if site.kind in BY_TOKEN or not all(edit.positions for edit in here):
            said = [*(said if site.kind not in BY_TOKEN else []), found_out(start, here)]
        found.append(min(said))
    return min(found)


def found_out(start: Start, edits: Sequence[Edit]) -> int:
    """The first position that edits of one site change, tried on the activation that they would be given."""
    key = key_of(edits[0].site)
    before = new = start.after(key)
    try:
        for edit in edits:
            new = apply_edit(new, key, (0, None, edit), start.plan.layout, False)
    except (ValueError, TypeError):
        return 0  # an edit before it may change what it fails on; where none does, the rerun says so
    changed = (new != before).flatten(2).any(-1).flatten().nonzero()[:, 0]
    if not len(changed):
        return len(start.prompt) - 1
    first = int(torch.min(changed))
    return start.prompt.image[first] if edits[0].site.kind in BY_TOKEN else first


def first_query(start: Start, edit: Edit) -> int:
    """The first position whose attention an edit changes."""
    length = len(start.prompt)
    if edit.site.kind in CROSS_KINDS:
        return 0
    if edit.bias is None:
        return min(row % length for row in edit.rows) if isinstance(edit.rows, tuple) else 0
    queries = range(length) if edit.bias.queries is None else [query % length for query in edit.bias.queries]
    if len(start.cuts) < length:
        return min(queries)
    # Before the first of its keys no position sees one.
    return min((query for query in queries if query >= min(edit.bias.keys)), default=length - 1)
