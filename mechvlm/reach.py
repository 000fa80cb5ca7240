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

from mechvlm.edits import Edit
from mechvlm.plan import key_of
from mechvlm.sites import CROSS_KINDS, PATTERN_KINDS
from mechvlm.start import Start
from mechvlm.visit import RESIDUAL_KINDS, check_result

BEHIND = ("resid_post", "deepstack")
KEPT = ("image_features", "deepstack", "k", "v", *RESIDUAL_KINDS)
"""Kinds of sites whose activations a start keeps, so that edits can be tried on them."""


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


def tried(edits: Sequence[Edit]) -> list[tuple]:
    """The sites of edits that a start has to keep."""
    return [key_of(edit.site) for edit in edits if edit.site.tower == "text" and edit.site.kind in KEPT]


def reach_of(start: Start, edits: Sequence[Edit]) -> Reach | None:
    """Where edits begin to act; None where they need a full pass."""
    end = start.layers
    at_logits = any(own.site.kind == "logits" for own in start.vlm.edits)  # which a rerun does not come by
    if start.hindrance or at_logits or not all(replayed(start, edit) for edit in edits):
        return None
    if not edits:
        return Reach(end, len(start.prompt) - 1, last=True)
    begin = min(layer_of(edit) for edit in edits)
    inside = {edit.site for edit in edits}
    own = [edit for edit in start.vlm.edits if edit.site.tower == "text" and (edit.site.layer or 0) >= end - 1]
    # Where the last layer alone is edited, at one place, all that its last position looks at is as it was.
    alone = len(inside) == 1 and not own and not any(whole_map(edit) for edit in edits)
    entering = begin == end - 1 and any(site.kind in ("resid_pre", "image_features", *BEHIND) for site in inside)
    if alone and begin >= end - 1 and not entering:
        return Reach(begin, len(start.prompt) - 1, last=True)
    return Reach(begin, start.cut(min(first_of(start, edit) for edit in edits)))


def replayed(start: Start, edit: Edit) -> bool:
    """Whether an edit acts within what a rerun runs."""
    site = edit.site
    if site.kind == "image_features":
        return start.takes_features and not any(own.site.tower != "text" for own in start.vlm.edits)
    return site.tower == "text" and site.layer is not None and edit.on == "value"


def layer_of(edit: Edit) -> int:
    """The layer that a rerun has to begin with."""
    return 0 if edit.site.layer is None else edit.site.layer + (edit.site.kind in BEHIND)


def whole_map(edit: Edit) -> bool:
    """Whether an edit is a function of a whole map of attention, whose rows it finds by their number."""
    return edit.site.kind in PATTERN_KINDS and edit.bias is None and edit.rows is None


def first_of(start: Start, edit: Edit) -> int:
    """The first position that an edit changes."""
    length = len(start.prompt)
    if edit.site.kind in PATTERN_KINDS:
        return first_query(start, edit)
    if edit.positions and edit.site.kind not in ("image_features", "deepstack"):
        return min(position % length for position in edit.positions)
    before = start.after(key_of(edit.site))
    new = edit.on_some(before.clone())
    check_result(new, before, key_of(edit.site), "value")
    changed = (new != before).flatten(2).any(-1).flatten().nonzero()[:, 0]
    if not len(changed):
        return length - 1
    first = int(changed[0])
    return start.prompt.image[first] if edit.site.kind in ("image_features", "deepstack") else first


def first_query(start: Start, edit: Edit) -> int:
    """The first position whose attention an edit changes."""
    length = len(start.prompt)
    if edit.bias is None:
        return min(row % length for row in edit.rows) if isinstance(edit.rows, tuple) else 0
    queries = range(length) if edit.bias.queries is None else [query % length for query in edit.bias.queries]
    if edit.site.kind in CROSS_KINDS or len(start.cuts) < length:
        return min(queries)
    # Before the first of its keys no position sees one.
    return min((query for query in queries if query >= min(edit.bias.keys)), default=length - 1)
