"""One layer's attention, read and edited at the call every Hugging Face attention module makes.

The call is `(module, q, k, v, mask, scaling=...) -> (z, weights)` under every attention implementation, so reading its
arguments and writing its result is all that is needed, without reloading a model for another implementation:

* q, k, v and z are read and written as they are;
* a change that a kernel can be asked for (`mechvlm.biases`) is added to the mask it is handed, or is more features of
  queries and keys (`mechvlm.fused`);
* rows, masses and whole patterns are computed from q, k and the mask, in pieces, and nothing is written back;
* only another edit of the scores or the pattern computes this layer's attention anew, and only for the edited rows; in
  pieces too, where the edit says that it treats every query by itself.

Some vision towers make the call once for every image or window; there q, k, v and z are taken around it
(`mechvlm.calls`), and a bias computes the layer anew.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechvlm.attention import Change
from mechvlm.attention import attend as attended
from mechvlm.attention import pattern as pattern_of
from mechvlm.attention import scores as scores_of
from mechvlm.calls import Call, Chunked, call_of, projected
from mechvlm.fused import Place, change_call, must_recompute, sites
from mechvlm.layout import Group
from mechvlm.lazy_attention import Attention
from mechvlm.plan import name_of
from mechvlm.readings import Lazy, Reading, Visible
from mechvlm.sites import CROSS_KINDS, RAW_KINDS
from mechvlm.towers import Block
from mechvlm.visit import Attended, Visit, apply_some, narrow, put

Anew = list[tuple[Group, list[int] | None, Tensor]]
"""z that was computed anew: of a group of rows, some queries (None: all), as `batch query head d_head`."""


def attend(visit: Visit, place: Place, module: Any, block: Block, kinds: set[str]) -> None:
    """Read and edit one layer's attention.

    Args:
        module: the attention module, inside a trace.
        block: what the layer's parts are called.
        kinds: what is wanted of q, k, v, scores, pattern and z.
    """
    tower, offer = place[0], partial(offered, visit, place, kinds)
    for kind, raw in projected(module, block, kinds).items():
        visit.graph[kind, place[1], tower] = raw
    if kinds <= set(RAW_KINDS):
        return
    own = tower == "text" and not place[2]
    call = call_of(module, block, offer, visit.plan.layout.length + visit.step if own else None)
    changed = call.offer(offer)
    width = call.v.shape[-1]
    anew = must_recompute(visit, place, call)
    if not anew:
        anew, biased = change_call(visit, place, call)
        changed = changed or biased
    if changed:
        call.write()
    new = recompute(visit, place, call) if anew else None
    if not anew:
        read_attention(visit, place, call)
    wants_z = f"{place[2]}z" in kinds
    if new is None and not wants_z and call.v.shape[-1] == width and not graph_needs_z(visit, place):
        return
    finish(visit, place, call, wants_z, new, width)


def offered(visit: Visit, place: Place, kinds: set[str], kind: str, old: Tensor) -> Tensor:
    """Offer q, k or v as `batch pos head d_head`."""
    if kind not in kinds:
        return old
    shown = old.transpose(1, 2)
    new = visit.touch((kind, place[1], place[0]), shown)
    # A gradient is that of a tensor in the graph: the view that was offered has to be the one that is used.
    return old if new is shown and not visit.plan.gradient else new.transpose(1, 2)


def attending(visit: Visit) -> Callable:
    """The callback for a layer's attention."""

    def callback(place: tuple, module: Any, block: Block, kinds: set[str]) -> None:
        attend(visit, (*place, "cross_" if kinds & set(CROSS_KINDS) else ""), module, block, kinds)

    return callback


def part_of(visit: Visit, place: Place, call: Call | Chunked, group: Group, live: bool = False) -> Attention:
    """The attention of one group of rows, over their own positions, not made.

    Args:
        live: whether gradients flow through it.
    """
    indices, start, stop = group
    chosen = slice(None) if indices is None else indices
    here = slice(start if call.q.shape[2] > 1 else 0, stop)
    there = slice(None) if place[2] else slice(start, stop)
    q, k, v = (x[chosen] if live else x.detach()[chosen] for x in (call.q, call.k, call.v))
    sees, own = (one.narrowed(chosen, here, there) for one in (call.sees, call.own))
    given = (q[:, :, here], k[:, :, there], v[:, :, there])
    return Attention(*given, sees, call.scale, call.cap, visit.plan.budget, own=own)


def groups_at(visit: Visit, place: Place, call: Call | Chunked) -> list[Group]:
    """The groups of rows that have the same positions."""
    return visit.plan.layout.groups(sites(place)[1], None, call.q.shape[0])


def read_attention(visit: Visit, place: Place, call: Call | Chunked) -> None:
    """Read scores and pattern of a layer that is not computed anew; nothing is written back."""
    asked = [site for site in sites(place) if site in visit.plan.reads]
    if not asked:
        return
    own = [(group, part_of(visit, place, call, group)) for group in groups_at(visit, place, call)]
    for site in asked:
        read_parts(visit, site, own)
        if visit.plan.gradient:
            visit.graph[site] = Attended(own)


def read_parts(visit: Visit, site: tuple, own: list[tuple[Group, Attention]]) -> None:
    """Keep what a site's reading says of each group's attention."""
    read = visit.plan.reads[site]
    if isinstance(read, Reading):
        visit.saved.setdefault(site, []).append([(group, read.of(part, site[0])) for group, part in own])
        return
    made = [(group, part.rows(scores=site[0].endswith("scores"))) for group, part in own]
    visit.keep_parts(site, made)


def recompute(visit: Visit, place: Place, call: Call | Chunked) -> Anew | None:
    """This layer's z from edited scores and pattern; None where the edits changed nothing."""
    scores, pattern = sites(place)
    plan = visit.plan
    entries = [(site, entry) for site in (scores, pattern) for entry in plan.active(site, visit.step)]
    if unmade(visit, place, entries):
        return in_pieces(visit, place, call, entries)
    if isinstance(plan.reads.get(pattern), Lazy):
        raise ValueError(
            f"attention is to be kept unmade at {name_of(pattern)} (by lazy(), or an experiment that follows it), and "
            "an edit there has to have the whole map; give the edit rows='each' if it treats every query by itself, or "
            "read rows(), mass() or the like."
        )
    old = scores_of(call.q, call.k, call.scale, call.sees.whole(call.q), call.cap)
    new = visit.touch(scores, old)
    before = pattern_of(new)
    after = visit.touch(pattern, before)
    if isinstance(plan.reads.get(scores), Visible):
        read_parts(
            visit, scores, [(group, part_of(visit, place, call, group)) for group in groups_at(visit, place, call)]
        )
    if new is old and after is before and not plan.gradient:
        return None
    z = attended(after, call.v)
    return [((None, 0, None), None, z)] if plan.gradient else only_edited(visit, place, call.q.shape[0], z)


def unmade(visit: Visit, place: Place, entries: list) -> bool:
    """Whether edits, and what is read beside them, need no whole map: each query is treated by itself."""
    scores, pattern = sites(place)
    plan = visit.plan
    if not all(entry[2].bias is not None or entry[2].rows is not None for _, entry in entries):
        return False
    if not plan.gradient:
        return True
    # The gradient of scores is known from that of z only where no edit stands between them and the pattern.
    read = plan.reads.get(scores)
    fitting = read is None and scores not in plan.reads
    fitting = fitting or (isinstance(read, Reading) and not plan.active(pattern, visit.step))
    return fitting and not (plan.grads.get(scores) or plan.grads.get(pattern))


def in_pieces(visit: Visit, place: Place, call: Call | Chunked, entries: list) -> Anew | None:
    """The same for edits that treat every query by itself, for the queries they are for, in pieces."""
    anew: Anew = []
    edited = edited_parts(visit, place, call, entries)
    for group, part, changed in edited:
        queries = queries_of(entries, part, place)
        if queries == []:
            continue  # a step that none of its edits is for
        if visit.plan.gradient:
            live = part_of(visit, place, call, group, live=True)
            anew.append((group, queries, replace(live, change=part.change).attended_again(queries)))
            continue
        z = part.attended(queries)
        if any(changed):
            anew.append((group, queries, z))
    visit.fired.update(entry[0] for _, entry in entries)
    own = [(group, part) for group, part, _ in edited]
    for site in sites(place):
        if site in visit.plan.reads:
            read_parts(visit, site, own)
            if visit.plan.gradient:
                visit.graph[site] = Attended(own)
    return anew or None


def edited_parts(
    visit: Visit, place: Place, call: Call | Chunked, entries: list
) -> list[tuple[Group, Attention, list[bool]]]:
    """The edited attention of each group, not made, and a list that is told whether an edit changed anything."""
    found = []
    for group in groups_at(visit, place, call):
        part, changed = part_of(visit, place, call, group), list[bool]()
        change = editing(visit, place, group, part, entries, changed, call.q.shape[0])
        found.append((group, replace(part, change=change), changed))
    return found


def editing(
    visit: Visit, place: Place, group: Group, part: Attention, entries: list, changed: list[bool], batch: int
) -> Change:
    """The edits of a layer's scores and pattern as a function of pieces of one group of rows.

    Args:
        changed: is told of each edit of each piece whether it changed anything.
        batch: rows of the tensors of this call.
    """
    first, count = positions_of(part, place)
    layout, (scores, _) = visit.plan.layout, sites(place)

    def change(kind: str, piece: Tensor, queries: Tensor) -> Tensor:
        for site, entry in entries:
            if (site == scores) != (kind == "scores"):
                continue
            for edited in layout.groups(site, entry[1], batch):
                local = within(edited, group)
                if local == []:
                    continue
                given = piece if local is None else piece[local]
                new = apply_some(given, site, entry[2], queries + first, count)
                changed.append(new is not given)
                if new is not given:
                    index = None if local is None else torch.tensor(local, device=piece.device)
                    piece = new if index is None else piece.index_copy(0, index, new)
        return piece

    return change


def within(edited: Group, group: Group) -> list[int] | None:
    """Which rows of a group an edit is for, by their place in it; None for all."""
    if group == (None, 0, None):
        return edited[0]
    if edited[1:] != group[1:]:
        return []
    if edited[0] is None or group[0] is None:
        return None
    return [group[0].index(row) for row in edited[0] if row in group[0]]


def positions_of(part: Attention, place: Place) -> tuple[int, int]:
    """The position of the first query, and how many positions there are by now."""
    key, query = part.k.shape[2], part.q.shape[2]
    return (0, query) if place[2] else (key - query, key)


def queries_of(entries: list, part: Attention, place: Place) -> list[int] | None:
    """The queries that edits are for, counted from the first one that is there; None for all."""
    first, count = positions_of(part, place)
    wanted: set[int] = set()
    for _, (_, _, edit) in entries:
        rows = edit.rows if edit.bias is None else edit.bias.queries
        if not isinstance(rows, tuple):
            return None
        wanted |= {row % count for row in rows}
    return sorted(row - first for row in wanted if row >= first)


def graph_needs_z(visit: Visit, place: Place) -> bool:
    """Whether a gradient of this layer's scores or pattern is to be computed from that of z."""
    return any(isinstance(visit.graph.get(site), Attended) for site in sites(place))


def finish(visit: Visit, place: Place, call: Call | Chunked, wants_z: bool, new: Anew | None, width: int) -> None:
    """Put the computed z in place, offer it, and write the result back where it changed."""
    own = call.result()
    z = own if own.shape[-1] == width else own[..., :width]
    where = (f"{place[2]}z", place[1], place[0])
    for group, queries, part in new or ():
        whole = visit.plan.gradient and group == (None, 0, None) and queries is None
        z = part if whole else replaced(z, where, group, queries, part)
    final = visit.touch(where, z) if wants_z else z
    for site in sites(place):
        attended = visit.graph.get(site)
        if isinstance(attended, Attended):
            attended.z = z  # before the edits of z
    if final is not own or (call.shown_anew and final.requires_grad):
        call.put(final)


def replaced(z: Tensor, where: tuple, group: Group, queries: list[int] | None, part: Tensor) -> Tensor:
    """z with the part of a group of rows, or of some of its queries, replaced."""
    if queries is None:
        return put(z, where, group, part)
    now = narrow(z if group[0] is None else z[group[0]], where, group).clone()
    now[:, queries] = part
    return put(z, where, group, now)


def only_edited(visit: Visit, place: Place, batch: int, z: Tensor) -> Anew:
    """The computed z of the rows whose scores or pattern were edited."""
    where = (f"{place[2]}z", place[1], place[0])
    found: Anew = []
    for site in sites(place):
        for _, rows, _ in visit.plan.active(site, visit.step):
            if rows is None:
                return [((None, 0, None), None, z)]
            for group in visit.plan.layout.groups(site, rows, batch):
                part = z if group[0] is None else z[group[0]]
                found.append((group, None, narrow(part, where, group)))
    return found
