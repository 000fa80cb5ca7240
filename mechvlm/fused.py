"""Changes of scores that keep the fused kernel: in the mask it is handed, or as more features of queries and keys.

Rule this module guards: a change that is asked for acts exactly as it would on the scores; where no way of asking a
kernel does, the layer is computed anew instead.

The ways, and which of them "auto" takes: the mask, where the kernel was handed one and it fits the budget of memory;
else features, whose memory grows with the length and not with its square; else the layer is computed anew. Layers that
are changed alike share one mask.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mechvlm.biases import (
    OUT_OF_SIGHT,
    Bias,
    Scale,
    bias_features,
    fits_together,
    last_of,
    scale_features,
    where_of,
)
from mechvlm.calls import Call, Chunked
from mechvlm.edits import Edit
from mechvlm.masks import Rule, indicator
from mechvlm.visit import Visit, parts, put

Place = tuple[str, int, str]
"""Tower, layer, and what the names of the attention's sites begin with: nothing, or `cross_`."""


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
    entries = plan.active(scores, visit.step)
    if any(way_of(edit, call, plan.budget) == "recompute" for _, _, edit in entries):
        return True
    acting = [entry for entry in entries if change_of(entry[2]).amount != 0]
    rows = range(len(plan.layout.pads))
    if not all(
        fits_together([change_of(edit) for _, own, edit in acting if own is None or row in own]) for row in rows
    ):
        return True
    by_feature = [entry for entry in acting if way_of(entry[2], call, plan.budget) == "feature"]
    return bool(by_feature) and call.widest is not None and columns(visit, call, by_feature)[1] > call.widest


def columns(visit: Visit, call: Call | Chunked, entries: list) -> tuple[list[int], int]:
    """Where the features of each entry begin, and how wide queries and keys become; unlike rows share columns."""
    own, rows = call.q.shape[-1], range(len(visit.plan.layout.pads))
    free, starts = dict.fromkeys(rows, own), []
    for _, chosen, edit in entries:
        mine = rows if chosen is None else chosen
        starts.append(max(free[row] for row in mine))
        free.update(dict.fromkeys(mine, starts[-1] + (own if isinstance(edit.bias, Scale) else 2)))
    return starts, own + -(-(max(free.values()) - own) // 8) * 8


def way_of(edit: Edit, call: Call | Chunked, budget: int) -> str:
    """How an edit of the scores is made."""
    if edit.bias is None:
        return "recompute"
    heads = 1 if edit.bias.heads is None else call.q.shape[1]
    size = call.q.shape[0] * heads * call.q.shape[2] * call.k.shape[2] * call.q.element_size()
    # Where the kernel has no mask yet, one would make it look at what stands behind each query as well.
    fitting = ("mask", "feature") if call.sees.handed is not None and size <= budget else ("feature", "mask")
    wanted = fitting if edit.way == "auto" else (edit.way,)
    # A cut by a feature is a large number, so that another cannot be; and a type of 16 bits may not hold it.
    most = min(-OUT_OF_SIGHT, torch.finfo(call.q.dtype).max * call.scale)
    unfit = {"mask": isinstance(edit.bias, Scale), "feature": not abs(edit.bias.amount) < most}
    if edit.bias.amount == -torch.inf:
        unfit["feature"] = False
    possible = [way for way in wanted if way in call.ways and not unfit.get(way)]
    return possible[0] if possible else "recompute"


def change_call(visit: Visit, place: Place, call: Call | Chunked) -> tuple[bool, bool]:
    """Add the changes of a layer to its call; whether it must be recomputed after all, and whether the call changed."""
    scores, _ = sites(place)
    entries = visit.plan.active(scores, visit.step)
    acting = [entry for entry in entries if change_of(entry[2]).amount != 0]
    ways = {entry[0]: way_of(entry[2], call, visit.plan.budget) for entry in acting}
    by_mask = [entry for entry in acting if ways[entry[0]] == "mask"]
    by_feature = [entry for entry in acting if ways[entry[0]] == "feature"]
    cuts = [entry for entry in acting if change_of(entry[2]).amount == -torch.inf]
    hidden = [entry for entry in cuts if ways[entry[0]] == "feature"]
    if hidden and blinds(visit, scores, call, cuts):
        return True, False
    if by_mask and isinstance(call, Call):
        added = shared_mask(visit, scores, call, by_mask)
        if added is None:
            return True, False
        call.add(added)
    if by_feature:
        add_features(visit, scores, call, by_feature)
        if hidden:
            call.sees = replace(call.sees, kept=kept_by(visit, scores, call, hidden))
    visit.fired.update(number for number, _, _ in entries)
    return False, bool(by_mask or by_feature)


def change_of(edit: Edit) -> Bias | Scale:
    """What an edit does that a kernel can be asked for."""
    assert edit.bias is not None, edit
    return edit.bias


def blinds(visit: Visit, site: tuple, call: Call | Chunked, cuts: list) -> bool:
    """Whether cuts together leave some query no key that it sees, which kernels answer differently."""
    query, key = call.q.shape[2], call.k.shape[2]
    alone = change_of(cuts[0][2]) if len(cuts) == 1 else None
    if alone is not None and cuts[0][1] is None and call.sees.simple and call.sees.causal and query == key:
        kept = (~indicator(alone.keys, key)).nonzero()[:, 0]
        asked = indicator(alone.queries, key).nonzero()[:, 0]
        return not len(kept) or int(asked[0]) < int(kept[0])
    left = kept_by(visit, site, call, cuts)
    sees, like = replace(call.sees, kept=None), call.q[:1, :1, :1, :1]
    place = torch.arange(key, device=like.device)[None]
    for some in torch.arange(query).split(64):
        seen = sees.added(some, slice(0, key), like) == 0
        if bool((seen.any(-1) & ~(seen & left(some.to(like.device)[:, None], place)).any(-1)).any()):
            return True
    return False


def kept_by(visit: Visit, site: tuple, call: Call | Chunked, cuts: list) -> Rule:
    """What cuts leave, as a rule over the queries and keys of a call: `rows heads query key`."""
    (batch, heads, query, _), key = call.q.shape, call.k.shape[2]

    def kept(queries: Tensor, keys: Tensor) -> Tensor:
        found = torch.ones(batch, heads, len(queries), keys.shape[1], dtype=torch.bool, device=keys.device)
        for _, rows, edit in cuts:
            change = change_of(edit)
            for indices, start, stop in visit.plan.layout.groups(site, rows, batch):
                begin = start if query > 1 else 0
                first = 0 if change.cross else start
                have = (stop or query) - begin, (key if change.cross else stop or key) - first
                own_q, own_k = queries[:, 0].cpu() - begin, keys[0].cpu() - first
                count = have[0] if change.cross else have[1]
                at = own_q.clamp(0, have[0] - 1) + (0 if change.cross else have[1] - have[0])
                cut = where_of(change, heads, at, count, have[1])[..., own_k.clamp(0, have[1] - 1)]
                cut = cut & ((own_q >= 0) & (own_q < have[0]))[:, None] & ((own_k >= 0) & (own_k < have[1]))
                chosen = slice(None) if indices is None else indices
                found[chosen] = found[chosen] & ~cut.to(found.device)
        return found

    return kept


def shared_mask(visit: Visit, site: tuple, call: Call, entries: list) -> Tensor | None:
    """The mask with biases added, which layers that are changed alike share."""
    about = (
        visit.step,
        call.q.shape[:3],
        call.k.shape[2],
        call.missing,
        call.q.dtype,
        call.sees.causal,
        site[2],
        call.q.device,
    )
    changes = tuple((None if rows is None else tuple(rows), edit.bias) for _, rows, edit in entries)
    if visit.mask is None or visit.mask[:2] != ((about, changes), id(call.handed)):
        # The handed mask is kept with what was made of it, so that no other can take its place in memory.
        visit.mask = ((about, changes), id(call.handed), call.handed, biased_mask(visit, site, call, entries))
    return visit.mask[3]


def biased_mask(visit: Visit, site: tuple, call: Call, entries: list) -> Tensor | None:
    """The mask with biases added; None where a query would see nothing any more, which kernels answer differently."""
    base = call.sees.whole(call.q)
    heads = call.q.shape[1]
    total = base
    for _, rows, edit in entries:
        groups = visit.plan.layout.groups(site, rows, call.q.shape[0])
        if groups == [(None, 0, None)]:
            total = total + whole_mask(edit.bias, heads, total)
            continue
        total = total.expand(call.q.shape[0], heads if edit.bias.heads else total.shape[1], *total.shape[2:]).clone()
        for group, part in parts(total, site, rows, visit.plan.layout):
            total = put(total, site, group, part + whole_mask(edit.bias, heads, part))
    blind = (base == -torch.inf).all(-1, keepdim=True)
    if bool(((total == -torch.inf).all(-1, keepdim=True) & ~blind).any()):
        return None
    # Rows of padding see nothing; kernels answer NaN for them, which would spread. They are never read.
    return total.masked_fill(blind, 0.0)


def whole_mask(bias: Bias, heads: int, like: Tensor) -> Tensor:
    """A bias as something to add to the scores of all queries."""
    queries, count = last_of(like, bias.cross)
    return bias.mask(heads, queries, count, like.shape[3], like)


def add_features(visit: Visit, site: tuple, call: Call | Chunked, entries: list) -> None:
    """Widen queries, keys and values so that the products of the new features are the changes."""
    starts, wide = columns(visit, call, entries)
    width = wide - call.q.shape[-1]
    q, k = pad(call.q, (0, width)), pad(call.k, (0, width))
    for at, (_, rows, edit) in zip(starts, entries, strict=True):
        size = call.q.shape[-1] if isinstance(edit.bias, Scale) else 2
        for indices, start, stop in visit.plan.layout.groups(site, rows, call.q.shape[0]):
            chosen = slice(None) if indices is None else indices
            here = slice(start if call.q.shape[2] > 1 else 0, stop)
            there = slice(None) if edit.bias.cross else slice(start, stop)
            some_q, some_k = call.q[chosen][:, :, here], call.k[chosen][:, :, there]
            to_query, to_key = products(edit.bias, some_q, some_k, call.scale)
            q[chosen, :, here, at : at + size] = to_query
            k[chosen, :, there, at : at + size] = to_key
    call.q, call.k, call.v = q, k, pad(call.v, (0, width))


def products(change: Bias | Scale, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The features of one change, of queries and of keys."""
    query, key = q.shape[2], k.shape[2]
    queries = torch.arange(query) + (0 if change.cross else key - query)
    count = query if change.cross else key
    if isinstance(change, Scale):
        return scale_features(change, q, k, queries, count)
    to_query, to_key = bias_features(change, q.shape[1], queries, count, key, scale, q)
    return to_query[:, :, None].expand(-1, -1, 2), to_key
