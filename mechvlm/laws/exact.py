"""Laws 1, 2, 3 and 5: what holds bit for bit, and so in every type."""

from collections.abc import Iterator
from typing import Any

import torch

from mechvlm.attention_edits import bias_attention
from mechvlm.edits import Edit, patch, scale_heads, steer
from mechvlm.laws.finding import Finding, all_sites, layers_with
from mechvlm.prompt import Prompt
from mechvlm.readings import rows
from mechvlm.references import (
    differs,
    negative_of,
    own_logits,
)
from mechvlm.sites import PATTERN_KINDS, Site

RESIDUAL = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def law_1_reading(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Reading changes nothing; an edit that adds or scales by nothing changes nothing."""
    # Making all positions' logits multiplies other matrices than making one's, so it is compared with the same.
    own, whole = own_logits(vlm, prompt), own_logits(vlm, prompt, keep=0)
    yield Finding(1, "reading every site", differs(vlm.run(prompt, read=all_sites(vlm)).logits, whole), 0.0)
    inner = [site for site in all_sites(vlm) if site.kind != "logits"]
    kept = {site: (rows([-1]) if site.kind in PATTERN_KINDS else None) for site in inner}
    yield Finding(1, "reading rows", differs(vlm.run(prompt, read=kept).logits, own), 0.0)
    nothing = torch.zeros(vlm.shape.d_model["text"])
    for way in ("mask", "feature", "recompute"):
        biases = [bias_attention(layer, prompt.image, 0.0, way=way) for layer in layers_with(vlm, "scores")]
        yield Finding(1, f"a bias of 0 by {way}", differs(vlm.run(prompt, edits=biases).logits, own), 0.0)
    heads = [scale_heads(layers_with(vlm, "z", tower)[0], [0], 1.0, tower=tower) for tower in vlm.shape.layers]
    null = [*heads, steer("text.0.resid_post", nothing)]
    yield Finding(1, "scaling by 1, adding 0", differs(vlm.run(prompt, edits=null).logits, own), 0.0)


def law_2_writing_back(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Writing back what was read changes nothing."""
    edits = [Edit(site, torch.clone) for site in all_sites(vlm, live=True)]
    yield Finding(2, "every site", differs(vlm.run(prompt, edits=edits).logits, own_logits(vlm, prompt, keep=0)), 0.0)


def law_3_residuals(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """What attention and MLP add is what the residual stream gains, within a layer and from one to the next."""
    run = vlm.run(prompt, read=all_sites(vlm))
    for tower, kinds in vlm.shape.kinds.items():
        if "attn_out" not in kinds[0]:
            continue  # a Q-Former's norms stand behind the sums, so it has no such sites
        worst = 0.0
        for layer, own in enumerate(kinds):
            at = {kind: run[Site(kind, layer, tower)] for kind in own if kind in RESIDUAL}
            at = {kind: x.to(at["attn_out"].device) for kind, x in at.items()}  # what enters may be elsewhere
            between = at["resid_pre"] + at["attn_out"]
            if "resid_mid" in at:
                worst = max(worst, differs(between, at["resid_mid"]))
            worst = max(worst, differs(between + at["mlp_out"], at["resid_post"]))
        yield Finding(3, f"residual sums, {tower}", worst, 0.0)
    worst = 0.0
    for layer in range(vlm.shape.layers["text"] - 1):
        left = run[Site("resid_post", layer)].clone()
        if layer < vlm.shape.deepstack:
            left[0, prompt.image] += run[Site("deepstack", layer)].flatten(0, 1).to(left.device)
        worst = max(worst, differs(left, run[Site("resid_pre", layer + 1)]))
    yield Finding(3, "from layer to layer, text", worst, 0.0)


def law_5_patching(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """All of a residual stream from another run is that run; a run patched into itself is itself."""
    null = negative_of(prompt)
    for tower, layers in vlm.shape.live.items():
        sites = [Site("resid_post", layer, tower) for layer in range(layers)]
        every = {site for at in sites for site in (at, *beside(vlm, at))}
        real, other = vlm.run(prompt, read=every), vlm.run(null, read=every)
        foreign = itself = 0.0
        for site in sites:
            edits = [patch(one, other[one]) for one in (site, *beside(vlm, site))]
            foreign = max(foreign, differs(vlm.run(prompt, edits=edits).logits, other.logits))
            itself = max(itself, differs(vlm.run(prompt, edits=[patch(site, real[site])]).logits, real.logits))
        yield Finding(5, f"another run's resid_post, {tower}", foreign, 0.0)
        yield Finding(5, f"its own resid_post, {tower}", itself, 0.0)


def beside(vlm: Any, site: Site) -> list[Site]:
    """What passes a residual stream by on the image's way to the answer, and has to be patched with it."""
    layer = int(site.layer or 0)
    if site.tower == "text":
        crossing = [Site("image_features")] if layers_with(vlm, "cross_z") else []
        return crossing + [Site("deepstack", later) for later in range(layer, vlm.shape.deepstack)]
    last = Site("resid_post", vlm.shape.live["vision"] - 1, "vision")
    if site.tower == "qformer":
        return [last]
    # Where the projector sees several layers, those below are no part of this one's residual stream.
    return [Site("resid_post", below, "vision") for below in range(layer)] if vlm.shape.several else []
