"""The run that a sweep starts from: what each layer was given and made of the prompt, kept for every point.

A point of a sweep differs from this run only behind its first edit, and only at the positions that the edit reaches.
What is kept here is all that is needed to begin there: the residual stream between layers, keys and values, what the
model handed to each layer beside it (positions, masks), and each site that is edited, as it was before.

Rule this module guards: which positions can begin a run of their own is read off the masks the model really used, never
assumed from its name: where words see what stands behind them, a run begins before all of those.

>>> start = start_of(vlm, real, [("z", 3, "text")])
>>> start.cuts[:3], start.hindrance
((0, 1, 2), '')
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechvlm.edits import Edit
from mechvlm.passes import forward
from mechvlm.plan import Plan, key_of
from mechvlm.prompt import Prompt
from mechvlm.visit import RESIDUAL_KINDS, Visit, apply_edit
from mechvlm.walk import at

ALONG = {
    "attention_mask": -2,
    "position_embeddings": -2,
    "position_ids": -1,
    "cross_attention_mask": -2,
    "full_text_row_masked_out_mask": -2,
}
"""What layers are handed that has an entry for each position, and along which axis."""
REPEATED = ("cross_attention_states",)
"""What they are handed that every row of a batch needs its own of."""
CACHE, MASK = "past_key_values", "attention_mask"


@dataclass(frozen=True)
class Start:
    """What a run showed of itself before the edits of a sweep's points.

    Attributes:
        vlm, prompt: what ran, with the model's own edits.
        plan: of these edits.
        sites: activations before any edit of them: the embeddings, what leaves each layer, keys, values, and sites
            that points edit.
        given: for each layer, its arguments by name.
        logits: of the last position, `1 vocab`.
        cuts: positions at which a run of the rest can begin, the positions before being as they were.
        hindrance: why points have to be full passes; empty where they have not.
    """

    vlm: Any
    prompt: Prompt
    plan: Plan
    sites: Mapping[tuple, Tensor]
    given: Sequence[Mapping[str, Any]]
    logits: Tensor
    cuts: tuple[int, ...]
    hindrance: str = ""
    edited: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Layers of the language model."""
        return len(self.given)

    def after(self, site: tuple) -> Tensor:
        """A site after the model's own edits of it."""
        if site not in self.edited:
            x = self.sites[site]
            for entry in self.plan.active(site, 0):
                x = apply_edit(x, site, entry, self.plan.layout, False)
            self.edited[site] = x
        return self.edited[site]

    def cut(self, position: int) -> int:
        """The last position, not after a given one, at which a run of the rest can begin."""
        return max(one for one in self.cuts if one <= position)

    @property
    def takes_features(self) -> bool:
        """Whether the picture's features stand as they are where they enter the language model."""
        features, stream = self.sites.get(FEATURES), self.sites[("resid_pre", 0, "text")]
        if features is None or not self.prompt.image:
            return False
        own = self.after(FEATURES).reshape(-1, stream.shape[-1])
        return len(own) == len(self.prompt.image) and torch.equal(own.to(stream.device), stream[0, self.prompt.image])


FEATURES = ("image_features", None, "text")


class Recording(Visit):
    """A visit that also keeps some sites as they were before any edit of them."""

    def __init__(self, plan: Plan, sites: Iterable[tuple]) -> None:
        super().__init__(plan)
        self.wanted, self.before = frozenset(sites), dict[tuple, Tensor]()

    def offer(self, site: tuple, x: Tensor) -> Tensor:
        """Keep the tensor, then treat it as any visit does."""
        if site in self.wanted:
            self.before[site] = x.detach()
        return super().offer(site, x)


def needed(vlm: Any, prompt: Prompt, more: Iterable[tuple]) -> list[tuple]:
    """The sites that reruns begin from, and those that are edited, by points or by the model's own edits."""
    found = [("resid_pre", 0, "text")]
    for layer, kinds in enumerate(vlm.shape.kinds["text"]):
        if prompt.images or "cross_z" not in kinds:  # layers that look at the picture do not run without one
            found += [(kind, layer, "text") for kind in ("k", "v", "resid_post", "deepstack") if kind in kinds]
    found = [site for site in found if prompt.images or site[0] != "deepstack"]
    return list(dict.fromkeys([*found, *more, *tried(vlm.edits)]))


KEPT = ("image_features", "deepstack", "k", "v", *RESIDUAL_KINDS)
"""Kinds of sites whose activations a start keeps, so that edits can be tried on them."""


def tried(edits: Iterable[Edit]) -> list[tuple]:
    """The sites of edits that a start has to keep."""
    return [key_of(edit.site) for edit in edits if edit.site.tower == "text" and edit.site.kind in KEPT]


def start_of(vlm: Any, prompt: Prompt, edited: Iterable[tuple]) -> Start:
    """Run a prompt once, with the model's own edits, and keep what reruns begin from.

    Args:
        edited: the sites that points edit.
    """
    plan = vlm.plan([prompt])
    visit = Recording(plan, needed(vlm, prompt, edited))
    modules = [at(vlm.hf, path)[number] for path, number in vlm.arch.text.layers]
    given: dict[int, tuple[tuple, dict]] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, args: tuple, named: dict) -> None:
            given[layer] = (args, named)

        return hook

    hooks = [module.register_forward_pre_hook(keep(n), with_kwargs=True) for n, module in enumerate(modules)]
    try:
        run = forward(vlm, visit, vlm.batch([prompt], plan), more=visit.wanted)
    finally:
        for hook in hooks:
            hook.remove()
    named = [given[layer][1] if layer in given else {} for layer in range(len(modules))]
    why = hindrance(vlm, [given.get(layer, ((), {})) for layer in range(len(modules))], len(prompt))
    return Start(vlm, prompt, plan, visit.before, named, run.logits, cuts_of(named, len(prompt)), why)


def hindrance(vlm: Any, given: Sequence[tuple[tuple, dict]], length: int) -> str:
    """Why layers cannot be called by themselves with what they were given; empty where they can."""
    if vlm.attention == "flex_attention":
        return "flex_attention's masks cannot be cut to some positions"
    for layer, (args, named) in enumerate(given):
        if not args and not named:
            return f"layer {layer} does not run without an image"
        known = {*ALONG, *REPEATED, CACHE}
        unknown = [name for name, value in named.items() if isinstance(value, Tensor) and name not in known]
        if len(args) > 1 or unknown:
            what = unknown[0] if unknown else f"{len(args)} unnamed arguments"
            return f"layers of this model are handed {what}, of which it is not known what belongs to which position"
        for name, axis in ALONG.items():
            value = named.get(name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape[axis] != length):
                    return f"{name} of layer {layer} has no entry for each position"
    return ""


def cuts_of(given: Sequence[Mapping[str, Any]], length: int) -> tuple[int, ...]:
    """The positions before which no position sees what stands at them or behind them, in any layer."""
    allowed, seen = torch.ones(length, dtype=torch.bool), set()
    for named in given:
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.data_ptr() in seen:
            continue
        seen.add(mask.data_ptr())
        visible = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(0).any(0).cpu()
        furthest = torch.where(visible, torch.arange(length), -1).amax(1).cummax(0).values
        allowed[1:] &= furthest[:-1] < torch.arange(1, length)
    return tuple(allowed.nonzero()[:, 0].tolist())
