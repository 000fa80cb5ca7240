"""One layer's attention, read and edited at the call every Hugging Face attention module makes.

The call is `(module, q, k, v, mask, scaling=...) -> (z, weights)` under every attention implementation, so reading its
arguments and writing its result is all that is needed, without reloading a model for another implementation:

* q, k, v and z are read and written as they are;
* a bias on keys is added to the mask handed to the kernel, or is one more feature of queries and keys;
* rows, masses and whole patterns are computed from q, k and the mask, and nothing is written back;
* only an edit of the scores or the pattern computes this layer's attention anew, and only for the edited rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as widen

from mechvlm import attention
from mechvlm.archs import Arch
from mechvlm.attention import Mass, Rows
from mechvlm.plan import Group
from mechvlm.visit import Visit, parts, put


class Call:
    """The arguments of one attention call, by name, and how to write them back."""

    def __init__(self, op: Any, stack_causal: bool) -> None:
        self.op = op
        args, self.named = op.inputs
        self.args = list(args)
        self.in_args = len(self.args) > 4
        self.q, self.k, self.v = self.args[1:4]
        self.mask: Tensor | None = self.args[4] if self.in_args else self.named.get("attention_mask")
        flag = self.named.get("is_causal")
        self.causal = self.mask is None and (stack_causal if flag is None else bool(flag))
        scale = self.named.get("scaling")
        self.scale: float = self.q.shape[-1] ** -0.5 if scale is None else scale
        if self.named.get("softcap") is not None:
            raise ValueError("this model caps its attention scores, which mechvlm does not compute yet.")

    def write(self) -> None:
        """Hand the changed arguments to the kernel."""
        self.args[1:4] = [self.q, self.k, self.v]
        if self.in_args:
            self.args[4] = self.mask
        elif self.mask is not None:
            self.named = {**self.named, "attention_mask": self.mask}
        self.op.inputs = (tuple(self.args), self.named)

    def allowed(self) -> Tensor:
        """The mask as what is added to the scores."""
        return attention.additive_mask(self.mask, self.q, self.k, self.causal)


def attend(visit: Visit, place: tuple, op: Any, kinds: set[str], causal: bool) -> None:
    """Read and edit one layer's attention.

    Args:
        place: (tower, layer).
        op: the attention call, inside a trace.
        kinds: what is wanted of q, k, v, scores, pattern and z.
        causal: whether this tower is, where the call does not say so itself.
    """
    tower, layer = place
    call = Call(op, causal)
    changed = [touch_projection(visit, call, (kind, layer, tower)) for kind in ("q", "k", "v") if kind in kinds]
    width = call.v.shape[-1]
    anew = must_recompute(visit, place)
    if not anew:
        anew, biased = bias_call(visit, place, call)
        changed.append(biased)
    if any(changed):
        call.write()
    new = recompute(visit, place, call) if anew else None
    if not anew:
        read_attention(visit, place, call)
    if new is None and "z" not in kinds and call.v.shape[-1] == width and not graph_needs_z(visit, place):
        return
    finish(visit, place, op, kinds, new, width)


def attending(visit: Visit, arch: Arch) -> Callable:
    """The callback for a layer's attention, which knows whether its tower is causal."""
    causal = {"text": arch.text.causal, "vision": arch.vision.causal}
    return lambda place, op, kinds: attend(visit, place, op, kinds, causal[place[0]])


def touch_projection(visit: Visit, call: Call, site: tuple) -> bool:
    """Offer q, k or v as `batch pos head d_head`; whether the call has to be written back."""
    old = {"q": call.q, "k": call.k, "v": call.v}[site[0]].transpose(1, 2)
    new = visit.touch(site, old)
    # A gradient is that of a tensor in the graph: the view that was offered has to be the one that is used.
    if new is old and not visit.plan.gradient:
        return False
    if site[0] == "q":
        call.q = new.transpose(1, 2)
    elif site[0] == "k":
        call.k = new.transpose(1, 2)
    else:
        call.v = new.transpose(1, 2)
    return True


def sites(place: tuple) -> tuple[tuple, tuple]:
    """The sites of a layer's scores and pattern."""
    return ("scores", place[1], place[0]), ("pattern", place[1], place[0])


def must_recompute(visit: Visit, place: tuple) -> bool:
    """Whether this pass edits the scores or the pattern in a way that no kernel can be asked for."""
    scores, pattern = sites(place)
    plan = visit.plan
    if plan.active(pattern, visit.step) or plan.grads.get(scores) or plan.grads.get(pattern):
        return True
    return any(edit.bias is None or edit.way == "recompute" for _, _, edit in plan.active(scores, visit.step))


def bias_call(visit: Visit, place: tuple, call: Call) -> tuple[bool, bool]:
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


def biased_mask(visit: Visit, site: tuple, call: Call, entries: list) -> Tensor | None:
    """The mask with biases added; None where a query would see nothing any more, which kernels answer differently."""
    base = call.allowed()
    heads, query, key = call.q.shape[1], call.q.shape[2], call.k.shape[2]
    total = base
    for _, rows, edit in entries:
        groups = visit.plan.layout.groups(site, rows, call.q.shape[0])
        if groups == [(None, 0)]:
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


def add_features(visit: Visit, site: tuple, call: Call, entries: list) -> None:
    """Widen queries, keys and values so that the products of the new features are the biases."""
    width = -(-len(entries) // 8) * 8
    q, k = widen(call.q, (0, width)), widen(call.k, (0, width))
    for number, (_, rows, edit) in enumerate(entries):
        for group in visit.plan.layout.groups(site, rows, call.q.shape[0]):
            indices = slice(None) if group[0] is None else group[0]
            start = group[1]
            query = call.q.shape[2] - (start if call.q.shape[2] > 1 else 0)
            key = call.k.shape[2] - start
            to_query, to_key = attention.bias_features(edit.bias, call.q.shape[1], query, key, call.scale)
            feature = call.q.shape[-1] + number
            q[indices, :, call.q.shape[2] - query :, feature] = to_query.to(q)
            k[indices, :, start:, feature] = to_key.to(k)
    call.q, call.k, call.v = q, k, widen(call.v, (0, width))


def read_attention(visit: Visit, place: tuple, call: Call) -> None:
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
            whole = attention.scores(call.q, call.k, call.scale, call.allowed())
        visit.keep(site, whole if site is scores else attention.pattern(whole))
        if visit.plan.gradient:
            visit.graph[site] = ("by formula", attention.pattern(whole).detach(), call.v)


def keep_rows(visit: Visit, site: tuple, call: Call, read: Rows | Mass) -> None:
    """Compute and keep only the rows or masses that were asked for, of each group of rows with the same padding."""
    kept: list[tuple[Group, object]] = []
    for indices, start in visit.plan.layout.groups(site, None, call.q.shape[0]):
        rows = slice(None) if indices is None else indices
        q = call.q[rows][:, :, (start if call.q.shape[2] > 1 else 0) :]
        k = call.k[rows][:, :, start:]
        mask = call.mask
        if mask is not None:
            mask = mask[rows] if mask.shape[0] > 1 else mask
            mask = mask[..., -q.shape[2] :, start : call.k.shape[2]]
        value = attention.read_rows(read, site[0], q, k, call.scale, mask, call.causal)
        kept.append(((indices, start), value.detach()))
    visit.saved.setdefault(site, []).append(kept)


def recompute(visit: Visit, place: tuple, call: Call) -> Tensor | None:
    """This layer's z from edited scores and pattern; None where the edits changed nothing."""
    scores, pattern = sites(place)
    old = attention.scores(call.q, call.k, call.scale, call.allowed())
    new = visit.touch(scores, old)
    before = attention.pattern(new)
    after = visit.touch(pattern, before)
    if new is old and after is before and not visit.plan.gradient:
        return None
    return attention.attend(after, call.v)


def graph_needs_z(visit: Visit, place: tuple) -> bool:
    """Whether a gradient of this layer's scores or pattern is to be computed from that of z."""
    return any(isinstance(visit.graph.get(site), tuple) for site in sites(place))


def finish(visit: Visit, place: tuple, op: Any, kinds: set[str], new: Tensor | None, width: int) -> None:
    """Put the computed z in place, offer it, and write the result back where it changed."""
    out = op.output
    z = out[0][..., :width]
    if new is not None:
        z = only_edited(visit, place, z, new)
    elif out[0].shape[-1] == width:
        z = out[0]
    site = ("z", place[1], place[0])
    final = visit.touch(site, z) if "z" in kinds else z
    for attended in sites(place):
        if isinstance(visit.graph.get(attended), tuple):
            visit.graph[attended] = (z, *visit.graph[attended][1:])  # before the edits of z
    if final is not out[0]:
        op.output = (final, *out[1:])


def only_edited(visit: Visit, place: tuple, old: Tensor, new: Tensor) -> Tensor:
    """The computed z in the rows whose scores or pattern were edited, the kernel's in the others.

    Where gradients are taken it is the computed one in all rows, since those of the pattern are taken through it.
    """
    plan, z = visit.plan, old
    if plan.gradient:
        return new
    for site in sites(place):
        for _, rows, _ in plan.active(site, visit.step) + plan.grads.get(site, []):
            if rows is None:
                return new
            for indices, _ in plan.layout.groups(site, rows, old.shape[0]):
                if indices is None:
                    return new
                index = torch.tensor(indices, device=z.device)
                z = z.index_copy(0, index, new.index_select(0, index))
    return z
