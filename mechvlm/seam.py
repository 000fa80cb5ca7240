"""One layer's attention, read and edited at the call every Hugging Face attention module makes.

The call is `(module, q, k, v, mask, scaling=...) -> (z, weights)` under every attention implementation, so reading its
arguments and writing its result is all that is needed, without reloading a model for another implementation:

* q, k, v and z are read and written as they are;
* a bias on keys is added to the mask handed to the kernel, or is one more feature of queries and keys;
* rows, masses and whole patterns are computed from q, k and the mask, and nothing is written back;
* only an edit of the scores or the pattern computes this layer's attention anew, and only for the edited rows.

Some vision towers make the call once for every image or window; there q, k, v and z are taken around it
(`mechvlm.calls`), and a bias computes the layer anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as widen

from mechvlm import attention
from mechvlm.attention import Mass, Rows
from mechvlm.calls import Call, Chunked, call_of
from mechvlm.layout import Group
from mechvlm.sites import CROSS_KINDS
from mechvlm.towers import Block
from mechvlm.visit import Visit, narrow, parts, put

Place = tuple[str, int, str]
"""Tower, layer, and what the names of the attention's sites begin with: nothing, or `cross_`."""


def attend(visit: Visit, place: Place, module: Any, block: Block, kinds: set[str]) -> None:
    """Read and edit one layer's attention.

    Args:
        module: the attention module, inside a trace.
        block: what the layer's parts are called.
        kinds: what is wanted of q, k, v, scores, pattern and z.
    """
    tower, layer, _ = place

    def offer(kind: str, old: Tensor) -> Tensor:
        """Offer q, k or v as `batch pos head d_head`."""
        if kind not in kinds:
            return old
        shown = old.transpose(1, 2)
        new = visit.touch((kind, layer, tower), shown)
        # A gradient is that of a tensor in the graph: the view that was offered has to be the one that is used.
        return old if new is shown and not visit.plan.gradient else new.transpose(1, 2)

    growing = visit.step and tower == "text" and not place[2]
    call = call_of(module, block, offer, visit.plan.layout.length + visit.step if growing else None)
    changed = call.offer(offer)
    width = call.v.shape[-1]
    anew = must_recompute(visit, place, call)
    if not anew:
        anew, biased = bias_call(visit, place, call)
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


def attending(visit: Visit) -> Callable:
    """The callback for a layer's attention."""

    def callback(place: tuple, module: Any, block: Block, kinds: set[str]) -> None:
        attend(visit, (*place, "cross_" if kinds & set(CROSS_KINDS) else ""), module, block, kinds)

    return callback


def sites(place: Place) -> tuple[tuple, tuple]:
    """The sites of a layer's scores and pattern."""
    tower, layer, kind = place
    return (f"{kind}scores", layer, tower), (f"{kind}pattern", layer, tower)


def must_recompute(visit: Visit, place: Place, call: Call | Chunked) -> bool:
    """Whether this pass edits the scores or the pattern in a way that no kernel can be asked for."""
    scores, pattern = sites(place)
    plan = visit.plan
    if plan.active(pattern, visit.step) or plan.grads.get(scores) or plan.grads.get(pattern):
        return True
    ways = {edit.way if edit.bias is not None else "recompute" for _, _, edit in plan.active(scores, visit.step)}
    return bool(ways - set(call.ways))


def bias_call(visit: Visit, place: Place, call: Call | Chunked) -> tuple[bool, bool]:
    """Add the biases of a layer to its call; whether it must be recomputed after all, and whether the call changed."""
    scores, _ = sites(place)
    entries = visit.plan.active(scores, visit.step)
    acting = [entry for entry in entries if entry[2].bias is not None and entry[2].bias.amount != 0]
    by_mask = [entry for entry in acting if entry[2].way == "mask"]
    by_feature = [entry for entry in acting if entry[2].way == "feature"]
    if by_mask:
        added = biased_mask(visit, scores, call, by_mask)
        if added is None:
            return True, False
        call.mask = added
    if by_feature:
        add_features(visit, scores, call, by_feature)
    visit.fired.update(number for number, _, _ in entries)
    return False, bool(by_mask or by_feature)


def biased_mask(visit: Visit, site: tuple, call: Call | Chunked, entries: list) -> Tensor | None:
    """The mask with biases added; None where a query would see nothing any more, which kernels answer differently."""
    base = call.allowed()
    heads, query, key = call.q.shape[1], call.q.shape[2], call.k.shape[2]
    total = base
    for _, rows, edit in entries:
        groups = visit.plan.layout.groups(site, rows, call.q.shape[0])
        if groups == [(None, 0, None)]:
            total = total + edit.bias.mask(heads, query, key, base)
            continue
        total = total.expand(call.q.shape[0], heads if edit.bias.heads else total.shape[1], query, key).clone()
        for group, part in parts(total, site, rows, visit.plan.layout):
            new = part + edit.bias.mask(heads, part.shape[2], part.shape[3], base)
            total = put(total, site, group, new)
    blind = (base == -torch.inf).all(-1, keepdim=True)
    if bool(((total == -torch.inf).all(-1, keepdim=True) & ~blind).any()):
        return None
    # Rows of padding see nothing; kernels answer NaN for them, which would spread. They are never read.
    return total.masked_fill(blind, 0.0)


def add_features(visit: Visit, site: tuple, call: Call | Chunked, entries: list) -> None:
    """Widen queries, keys and values so that the products of the new features are the biases."""
    width = -(-len(entries) // 8) * 8
    q, k = widen(call.q, (0, width)), widen(call.k, (0, width))
    for number, (_, rows, edit) in enumerate(entries):
        for indices, start, stop in visit.plan.layout.groups(site, rows, call.q.shape[0]):
            chosen = slice(None) if indices is None else indices
            here, there = (slice(start if x.shape[2] > 1 else 0, stop) for x in (call.q, call.k))
            query, key = call.q[:, :, here].shape[2], call.k[:, :, there].shape[2]
            to_query, to_key = attention.bias_features(edit.bias, call.q.shape[1], query, key, call.scale)
            feature = call.q.shape[-1] + number
            q[chosen, :, here, feature] = to_query.to(q)
            k[chosen, :, there, feature] = to_key.to(k)
    call.q, call.k, call.v = q, k, widen(call.v, (0, width))


def read_attention(visit: Visit, place: Place, call: Call | Chunked) -> None:
    """Read scores and pattern of a layer that is not computed anew; nothing is written back."""
    scores, pattern = sites(place)
    whole = None
    for site in (scores, pattern):
        if site not in visit.plan.reads:
            continue
        read = visit.plan.reads[site]
        if isinstance(read, Rows | Mass) and not visit.plan.gradient:
            keep_rows(visit, site, call, read)
            continue
        if whole is None:
            whole = call.scores()
        visit.keep(site, whole if site is scores else attention.pattern(whole))
        if visit.plan.gradient:
            visit.graph[site] = ("by formula", attention.pattern(whole).detach(), call.v)


def keep_rows(visit: Visit, site: tuple, call: Call | Chunked, read: Rows | Mass) -> None:
    """Compute and keep only the rows or masses that were asked for, of each group of rows with the same padding."""
    kept: list[tuple[Group, object]] = []
    for group in visit.plan.layout.groups(site, None, call.q.shape[0]):
        indices, start, stop = group
        chosen = slice(None) if indices is None else indices
        here = slice(start if call.q.shape[2] > 1 else 0, stop)
        there = slice(None) if site[0].startswith("cross") else slice(start, stop)
        q, k, mask = call.q[chosen][:, :, here], call.k[chosen][:, :, there], call.mask
        if mask is not None:
            mask = (mask[chosen] if mask.shape[0] > 1 else mask)[..., here, there]
        value = attention.read_rows(read, site[0], q, k, call.scale, mask, call.causal, call.cap)
        kept.append((group, value.detach()))
    visit.saved.setdefault(site, []).append(kept)


def recompute(visit: Visit, place: Place, call: Call | Chunked) -> Tensor | None:
    """This layer's z from edited scores and pattern; None where the edits changed nothing."""
    scores, pattern = sites(place)
    old = call.scores()
    new = visit.touch(scores, old)
    before = attention.pattern(new)
    after = visit.touch(pattern, before)
    if new is old and after is before and not visit.plan.gradient:
        return None
    return attention.attend(after, call.v)


def graph_needs_z(visit: Visit, place: Place) -> bool:
    """Whether a gradient of this layer's scores or pattern is to be computed from that of z."""
    return any(isinstance(visit.graph.get(site), tuple) for site in sites(place))


def finish(visit: Visit, place: Place, call: Call | Chunked, wants_z: bool, new: Tensor | None, width: int) -> None:
    """Put the computed z in place, offer it, and write the result back where it changed."""
    own = call.result()
    z = own if own.shape[-1] == width else own[..., :width]
    if new is not None:
        z = only_edited(visit, place, z, new)
    final = visit.touch((f"{place[2]}z", place[1], place[0]), z) if wants_z else z
    for attended in sites(place):
        if isinstance(visit.graph.get(attended), tuple):
            visit.graph[attended] = (z, *visit.graph[attended][1:])  # before the edits of z
    if final is not own or (call.shown_anew and final.requires_grad):
        call.put(final)


def only_edited(visit: Visit, place: Place, old: Tensor, new: Tensor) -> Tensor:
    """The computed z in the rows whose scores or pattern were edited, the kernel's in the others.

    Where gradients are taken it is the computed one in all rows, since those of the pattern are taken through it.
    """
    plan, z = visit.plan, old
    if plan.gradient:
        return new
    where = (f"{place[2]}z", place[1], place[0])
    for site in sites(place):
        for _, rows, _ in plan.active(site, visit.step) + plan.grads.get(site, []):
            if rows is None:
                return new
            for group in plan.layout.groups(site, rows, old.shape[0]):
                indices = group[0]
                part = narrow(new if indices is None else new[indices], where, group)
                z = put(z, where, group, part)
    return z
