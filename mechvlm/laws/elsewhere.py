"""Law 12: here equals elsewhere."""

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from mechvlm.attention_edits import bias_attention, cut_attention
from mechvlm.edits import Edit, ablate_heads, patch, scale_heads, steer
from mechvlm.laws.finding import Finding, all_sites, layers_with
from mechvlm.places import place_of
from mechvlm.points import answers, way_of
from mechvlm.prompt import Prompt
from mechvlm.readings import entropy, mass, rows, top_keys
from mechvlm.references import differs, negative_of
from mechvlm.run import Run
from mechvlm.sites import Site


def law_12_elsewhere(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """What is sent by its source, as to a server, and run from what arrives, is what is run here, bit for bit."""
    there = copy(vlm)
    there.place = place_of("local")
    asked = runs_of(vlm, prompt)
    both = zip(vlm.runs(asked.values()), there.runs(asked.values()), strict=True)
    for what, (here, sent) in zip(asked, both, strict=True):
        yield Finding(12, what, farthest(shown(here), shown(sent)), 0.0)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "read_each_step": {Site("logits"): last_of}}
    said = [model.generate(prompt, edits_of(vlm, prompt), **settings) for model in (vlm, there)]
    here, sent = ([one.tokens, *one[Site("logits")]] for one in said)
    yield Finding(12, "generation with edits", farthest(here, sent), 0.0)
    points = [[ablate_heads(layer, [0])] for layer in layers_with(vlm, "z")]
    # Elsewhere every point is a row of a full pass; law 8 compares these with reruns of a part of the model.
    ways = [way_of(model, prompt, points, rows=2, fast=False) for model in (vlm, there)]
    here, sent = ([logits for _, logits in answers(way)] for way in ways)
    yield Finding(12, "a sweep", farthest(here, sent), 0.0)
    h = torch.linspace(-1, 1, vlm.shape.d_model["text"], dtype=vlm.dtype, device=vlm.device)[None]
    yield Finding(12, "unembedding", farthest([vlm.unembed(h)], [there.unembed(h)]), 0.0)


def runs_of(vlm: Any, prompt: Prompt) -> dict[str, dict[str, Any]]:
    """Runs of every kind, by what they are; elsewhere they are one job."""
    layers = layers_with(vlm, "pattern")
    at, edits = Site("pattern", layers[0]), edits_of(vlm, prompt)
    readings = {"rows": rows([-1]), "mass": mass(prompt.spans), "entropy": entropy(), "top_keys": top_keys(3)}
    asked: dict[str, dict[str, Any]] = {"reading every site": {"read": all_sites(vlm)}}
    asked |= {f"reading by {name}": {"read": {at: reading}} for name, reading in readings.items()}
    asked["reading by a function"] = {"read": {at: lambda pattern: pattern[0, :, -1].max(-1).indices}}
    asked["edits"] = {"read": [at], "edits": edits}
    asked["variants"] = {"variants": [[], edits, [cut_attention(layers[-1], prompt.image)]]}
    if vlm.attention != "flex_attention":  # which has no gradients everywhere
        sites = [Site("image_features"), at, Site("resid_post", layers[0])]
        # A logit's share and not a logit, since some models leave those of a few tokens at 0.
        asked["gradients"] = {"read": sites, "edits": edits, "grad_of": lambda logits: logits.log_softmax(-1)[:, 5]}
    return {what: {"prompt": prompt, **one} for what, one in asked.items()}


def edits_of(vlm: Any, prompt: Prompt) -> list[Edit]:
    """Edits of every kind, a function of one's own that holds a tensor among them."""
    layers = layers_with(vlm, "z")
    site, own = Site("resid_post", layers[0]), torch.linspace(0.5, 1.5, vlm.shape.heads["text"])
    other = vlm.run(negative_of(prompt), read=[site])[site]

    def by_head(pattern: Tensor) -> Tensor:
        return pattern * own.to(pattern)[:, None, None]

    return [
        bias_attention(layers[0], prompt.image, 1.0),
        cut_attention(layers[-1], [1], heads=[1]),
        bias_attention(layers[-1], prompt.image, 0.5, heads=[0], way="recompute"),
        scale_heads(layers[0], [0], 2.0),
        patch(site, other, prompt.image[:2]),
        steer(Site("resid_pre", layers[-1]), torch.ones(vlm.shape.d_model["text"]), 0.5, [2]),
        Edit(Site("pattern", layers[-1]), by_head),
    ]


def last_of(logits: Tensor) -> Tensor:
    """Those of the last position."""
    return logits[:, -1]


def shown(run: Run) -> list[Tensor]:
    """All numbers that a run shows."""
    found = [run.logits, *numbers(dict(run.values)), *numbers(dict(run.grad))]
    return found if run.metric is None else [*found, run.metric]


def numbers(value: Any) -> list[Tensor]:
    """The tensors in what was read, which may be several at a site."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    return [x for part in parts for x in numbers(part)]


def farthest(here: list[Tensor], sent: list[Tensor]) -> float:
    """The largest difference of tensors in the same order; infinite where they are not the same in number and shape."""
    if [x.shape for x in here] != [x.shape for x in sent]:
        return float("inf")
    return max(differs(one, other) for one, other in zip(sent, here, strict=True))
