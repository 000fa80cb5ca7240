"""Changes of scores that keep the fused kernel: in the mask it is handed, or as more features of queries and keys.

Rule this module guards: a change that is asked for acts exactly as it would on the scores; where no way of asking a
kernel does, the layer is computed anew instead.

The ways, and which of them "auto" takes: the mask, where the kernel was handed one and it fits the budget of memory;
else features, whose memory grows with the length and not with its square; else the layer is computed anew. Layers that
are changed alike share one mask.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mechvlm.biases import Bias, Scale, bias_features, fits_together, last_of, scale_features
from mechvlm.calls import Call, Chunked
from mechvlm.edits import Edit
from mechvlm.masks import indicator
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
    edits = [edit for _, _, edit in plan.active(scores, visit.step)]
    if any(way_of(edit, call, plan.budget) == "recompute" for edit in edits):
        return True
    changes = [edit.bias for edit in edits if edit.bias is not None and edit.bias.amount != 0]
    wide = call.q.shape[-1] * (1 + sum(isinstance(change, Scale) for change in changes)) + 8 * len(changes)
    narrow_enough = call.widest is None or wide <= call.widest or not features(edits, call, plan.budget)
    return not (fits_together(changes) and narrow_enough)


def features(edits: Sequence[Edit], call: Call | Chunked, budget: int) -> bool:
    """Whether one of some edits is made by features."""
    return any(way_of(edit, call, budget) == "feature" for edit in edits)


def way_of(edit: Edit, call: Call | Chunked, budget: int) -> str:
    """How an edit of the scores is made."""
    if edit.bias is None:
        return "recompute"
    heads = 1 if edit.bias.heads is None else call.q.shape[1]
    size = call.q.shape[0] * heads * call.q.shape[2] * call.k.shape[2] * call.q.element_size()
    # Where the kernel has no mask yet, one would make it look at what stands behind each query as well.
    fitting = ("mask", "feature") if call.sees.handed is not None and size <= budget else ("feature", "mask")
    wanted = fitting if edit.way == "auto" else (edit.way,)
    possible = [way for way in wanted if way in call.ways and not (way == "mask" and isinstance(edit.bias, Scale))]
    return possible[0] if possible else "recompute"


def change_call(visit: Visit, place: Place, call: Call | Chunked) -> tuple[bool, bool]:
    """Add the changes of a layer to its call; whether it must be recomputed after all, and whether the call changed."""
    scores, _ = sites(place)
    entries = visit.plan.active(scores, visit.step)
    acting = [entry for entry in entries if change_of(entry[2]).amount != 0]
    ways = {entry[0]: way_of(entry[2], call, visit.plan.budget) for entry in acting}
    by_mask = [entry for entry in acting if ways[entry[0]] == "mask"]
    by_feature = [entry for entry in acting if ways[entry[0]] == "feature"]
    if any(blinds(change_of(entry[2]), call) for entry in by_feature):
        return True, False
    if by_mask and isinstance(call, Call):
        added = shared_mask(visit, scores, call, by_mask)
        if added is None:
            return True, False
        call.add(added)
    if by_feature:
        add_features(visit, scores, call, by_feature)
    visit.fired.update(number for number, _, _ in entries)
    return False, bool(by_mask or by_feature)


def change_of(edit: Edit) -> Bias | Scale:
    """What an edit does that a kernel can be asked for."""
    assert edit.bias is not None, edit
    return edit.bias


def blinds(change: Bias | Scale, call: Call | Chunked) -> bool:
    """Whether a cut leaves some query no key that it sees, which kernels answer differently."""
    if change.amount != -torch.inf or isinstance(change, Scale):
        return False
    query, key = call.q.shape[2], call.k.shape[2]
    first, count = (0, query) if change.cross else (key - query, key)
    cut = indicator(change.keys, key)
    asked = indicator(change.queries, count)[first:].nonzero()[:, 0]
    if call.sees.simple and call.sees.causal:
        kept = (~cut).nonzero()[:, 0]
        return bool(len(asked)) and (not len(kept) or int(asked[0]) + first < int(kept[0]))
    for some in asked.split(256):
        seen = call.sees.added(some, slice(0, key), call.q[:1, :1, :1, :1]) == 0
        if bool((seen.any(-1) & ~(seen & ~cut.to(seen.device)).any(-1)).any()):
            return True
    return False


def shared_mask(visit: Visit, site: tuple, call: Call, entries: list) -> Tensor | None:
    """The mask with biases added, which layers that are changed alike share."""
    about = (visit.step, call.q.shape[:3], call.k.shape[2], call.missing, call.q.dtype, call.sees.causal, site[2])
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
    scales = [entry for entry in entries if isinstance(entry[2].bias, Scale)]
    biases = [entry for entry in entries if isinstance(entry[2].bias, Bias)]
    own = call.q.shape[-1]
    width = own * len(scales) + -(-2 * len(biases) // 8) * 8
    q, k = pad(call.q, (0, width)), pad(call.k, (0, width))
    at = own
    for _, rows, edit in (*scales, *biases):
        size = own if isinstance(edit.bias, Scale) else 2
        for indices, start, stop in visit.plan.layout.groups(site, rows, call.q.shape[0]):
            chosen = slice(None) if indices is None else indices
            here, there = (slice(start if x.shape[2] > 1 else 0, stop) for x in (call.q, call.k))
            some_q, some_k = call.q[chosen][:, :, here], call.k[chosen][:, :, there]
            to_query, to_key = products(edit.bias, some_q, some_k, call.scale)
            q[chosen, :, here, at : at + size] = to_query
            k[chosen, :, there, at : at + size] = to_key
        at += size
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
