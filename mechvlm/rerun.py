"""Some rows of edits, run from where they begin: at a layer, and at a position.

Rules this module guards:

* Exact: what a row would have been given is what it is given. Positions before the first one that is edited have the
  keys, values and activations they had in the run before, and an edit that changes one of them after all is found out.
* The last layer is computed for the last position only, whose logits are asked for; of the others it makes the keys and
  values. An edit within it that needs more makes the whole layer.

A layer whose inside is edited is run in a trace, others are called as they are.

>>> from mechvlm.start import start_of
>>> start = start_of(vlm, real, [("z", 3, "text")])
>>> rerun(start, [[mv.ablate_heads(3, [0])], [mv.ablate_heads(3, [1])]], Reach(begin=3, first=0)).shape[0]
2
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm import batch as batches
from mechvlm.attention import capped
from mechvlm.edits import Edit
from mechvlm.plan import Plan
from mechvlm.reach import Reach
from mechvlm.seam import attending
from mechvlm.start import ALONG, CACHE, FEATURES, REPEATED, Start, own_edits
from mechvlm.visit import RESIDUAL_KINDS, Visit
from mechvlm.walk import at, walk_layer


class Reaching(Exception):  # noqa: N818 - found out and answered within the engine
    """An edit changed a position before the one that it was taken to begin with."""


class Resumed(Visit):
    """A visit of the last positions of a prompt, in which edits see all of them.

    Attributes:
        start: the run before.
        reach: where this one begins.
    """

    def __init__(self, plan: Plan, start: Start, reach: Reach) -> None:
        super().__init__(plan)
        self.start, self.reach = start, reach

    def offer(self, site: tuple, x: Tensor) -> Tensor:
        """Show edits the whole text, the positions before as they were, and go on with what is run."""
        first = self.reach.first
        if not first or site[0] not in RESIDUAL_KINDS or site[2] != "text" or not self.plan.active(site, 0):
            return super().offer(site, x)
        before = self.start.sites[site][:, :first]
        whole = torch.cat([before.expand(x.shape[0], *before.shape[1:]), x], 1)
        new = super().offer(site, whole)
        if new is whole:
            return x
        if not self.reach.last and not torch.equal(
            new[:, :first], self.start.after(site)[:, :first].expand_as(whole[:, :first])
        ):
            raise Reaching
        return new[:, first:]


@dataclass
class Prefix:
    """What a layer takes for its cache: the keys and values of the positions before.

    Attributes:
        held: keys and values, `batch kv_head pos d_head`.
        whole: whether they are those of all positions already.
        taking: whether the layer is to end where its keys and values are made.
    """

    held: tuple[Tensor, ...]
    whole: bool = False
    taking: bool = False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """All keys and values, as a layer asks its cache for them."""
        if not self.whole:
            pairs = zip(self.held, (keys, values), strict=True)
            self.held = tuple(torch.cat([x.expand(len(y), *x.shape[1:]), y], 2) for x, y in pairs)
        if self.taking:
            raise Enough
        return self.held


class Enough(Exception):  # noqa: N818 - ends a layer where its keys and values are made
    """A layer's keys and values are there, and the rest of it is not wanted."""


def rerun(start: Start, rows: Sequence[Sequence[Edit]], reach: Reach) -> Float[Tensor, "batch vocab"]:
    """The last position's logits of rows of edits, run from where they begin.

    Raises:
        Reaching: where an edit changed a position before `reach.first`.
        ValueError, TypeError: as `vlm.run` does.
    """
    features = any(edit.site.kind == "image_features" for row in rows for edit in row)
    vlm = start.vlm.without_edits()
    plan = vlm.plan([start.prompt], (), own_edits(start, reach.begin, features), variants=rows)
    visit = Resumed(plan, start, reach)
    with torch.no_grad():
        h = entered(visit, features)
        for layer in range(reach.begin, start.layers):
            h = behind(visit, layer, through(visit, layer, h))
        norm, head = at(vlm.hf, vlm.arch.norm), at(vlm.hf, vlm.arch.unembed)
        logits = capped(head(norm(h[:, -1])), vlm.shape.logit_cap)
    batches.check_fired(visit)
    batches.check_finite(logits)
    return logits


def entered(visit: Resumed, features: bool) -> Tensor:
    """The residual stream that the first layer is given, but for edits of it.

    Args:
        features: whether the picture's features are edited.
    """
    start, (begin, first) = visit.start, (visit.reach.begin, visit.reach.first)
    rows = len(visit.plan.layout.pads)
    site = ("resid_post", begin - 1, "text") if begin else ("resid_pre", 0, "text")
    h = start.sites[site][:, first:]
    h = h.expand(rows, *h.shape[1:])
    if begin:
        return behind(visit, begin - 1, visit.touch(site, h) if visit.plan.active(site, 0) else h)
    return placed(visit, FEATURES, h, add=False) if features else h


def behind(visit: Resumed, layer: int, h: Tensor) -> Tensor:
    """The residual stream with what is added to image tokens behind a layer."""
    site = ("deepstack", layer, "text")
    return placed(visit, site, h, add=True) if site in visit.start.sites else h


def placed(visit: Resumed, site: tuple, h: Tensor, add: bool) -> Tensor:
    """The picture's features, edited, put or added where image tokens stand."""
    start, first, rows = visit.start, visit.reach.first, h.shape[0]
    x = start.sites[site].reshape(-1, h.shape[-1])
    if visit.plan.active(site, 0):
        x = visit.touch(site, x if visit.plan.layout.shared > 1 else x.repeat(rows, 1))
        own = start.after(site).reshape(-1, h.shape[-1])
        before = [token for token, position in enumerate(start.prompt.image) if position < first]
        if not torch.equal(x.reshape(rows, -1, h.shape[-1])[:, before], own[before].expand(rows, -1, -1)):
            raise Reaching
    x = x.reshape(-1, len(start.prompt.image), h.shape[-1]).to(h)
    here = [(token, position - first) for token, position in enumerate(start.prompt.image) if position >= first]
    if not here:
        return h
    tokens, places = (torch.tensor(one, device=h.device) for one in zip(*here, strict=True))
    new = x[:, tokens].expand(rows, -1, -1)
    return h.index_copy(1, places, h[:, places] + new if add else new)


def through(visit: Resumed, layer: int, h: Tensor) -> Tensor:
    """What leaves a layer; of the last one, the last position alone where no edit needs more."""
    kinds = visit.plan.wanted().get(("text", layer), set()) - {"deepstack"}
    if kinds - {"resid_pre", "resid_post"}:
        return traced(visit, layer, h, kinds)
    pre, post = (("resid_pre", layer, "text"), ("resid_post", layer, "text"))
    h = visit.touch(pre, h) if "resid_pre" in kinds else h
    if layer == visit.start.layers - 1 and "resid_post" not in kinds:
        return last_query(visit, layer, h)
    h = module_of(visit, layer)(h, **arguments(visit, layer, h))
    return visit.touch(post, h) if "resid_post" in kinds else h


def module_of(visit: Resumed, layer: int) -> Any:
    """A layer of the language model itself."""
    path, number = visit.start.vlm.arch.text.layers[layer]
    return at(visit.start.vlm.hf, path)[number]


def traced(visit: Resumed, layer: int, h: Tensor, kinds: set[str]) -> Tensor:
    """What leaves a layer whose inside is edited."""
    vlm, module, named = visit.start.vlm, module_of(visit, layer), arguments(visit, layer, h)
    path, number = vlm.arch.text.layers[layer]
    shown: dict[str, Tensor] = {}

    def call(stream: Tensor) -> Tensor:
        return module(stream, **named)

    with vlm.model.trace(h, fn=call):
        envoy = at(vlm.model, path)[number]
        walk_layer(envoy, vlm.arch.text, ("text", layer), kinds, visit.touch, attending(visit))
        shown["h"] = envoy.output
    return shown["h"]


def last_query(visit: Resumed, layer: int, h: Tensor) -> Tensor:
    """What leaves a layer at the last position, from the keys and values of all."""
    module, attends = module_of(visit, layer), visit.start.vlm.arch.text.blocks[layer].attention
    if not attends or h.shape[1] == 1:
        return module(h[:, -1:], **arguments(visit, layer, h[:, -1:]))
    cache = Prefix(held(visit, layer), taking=True)
    with suppress(Enough):
        module(h, **{**arguments(visit, layer, h), CACHE: cache})
    every = Prefix(cache.held, whole=True)
    return module(h[:, -1:], **{**arguments(visit, layer, h[:, -1:]), CACHE: every})


def held(visit: Resumed, layer: int) -> tuple[Tensor, ...]:
    """A layer's keys and values of the positions before, as `1 kv_head pos d_head`."""
    first = visit.reach.first
    sites = [(kind, layer, "text") for kind in ("k", "v")]
    return tuple(visit.start.sites[site].transpose(1, 2)[:, :, :first] for site in sites)


def arguments(visit: Resumed, layer: int, h: Tensor) -> dict[str, Any]:
    """What a layer is handed beside some last positions of the residual stream."""
    start, (rows, count) = visit.start, h.shape[:2]
    named, block = dict(start.given[layer]), start.vlm.arch.text.blocks[layer]
    length = len(start.prompt)
    for name, axis in ALONG.items():
        value = named.get(name)
        if isinstance(value, tuple):
            named[name] = tuple(x.narrow(axis, length - count, count) for x in value)
        elif value is not None:
            named[name] = value.narrow(axis, length - count, count)
    for name in REPEATED:
        if isinstance(named.get(name), Tensor):
            named[name] = named[name].repeat(rows, *[1] * (named[name].ndim - 1))
    if block.attention and visit.reach.first:
        named[CACHE] = Prefix(held(visit, layer))
    causal = named.get("attention_mask") is None and start.vlm.attention == "sdpa"
    if block.attention and causal and 1 < count < length:
        # The kernel's own causal mask takes the first query for the first position.
        named["attention_mask"] = torch.ones(count, length, dtype=torch.bool, device=h.device).tril(length - count)[
            None, None
        ]
    return named
