"""Law 11: every site that TransformerLens tells truly is the same there, read and edited; the others are shown up.

TransformerLens shares no code with mechvlm, so an error of one is not an error of the other. It is imported only where
the law runs, and the law only runs where it is asked for: `mechvlm.laws` does not know of it.

>>> [finding for finding in law_11_transformer_lens(vlm, prompt) if not finding.holds]  # doctest: +SKIP
[]
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.bridge import Bridge, bridged
from mechvlm.edits import Edit
from mechvlm.laws import Finding
from mechvlm.lens_names import NATIVE, layers_of
from mechvlm.prompt import Prompt
from mechvlm.references import apart, eager_rounding
from mechvlm.sites import Site

BROKEN = float("inf")


def law_11_transformer_lens(vlm: Any, prompt: Prompt, lens: Bridge | None = None) -> Iterator[Finding]:
    """Readings and edits are TransformerLens's own, at every site it tells truly.

    Args:
        lens: the model inside TransformerLens, where it was made before.
    """
    lens = lens or bridged(vlm)
    # TransformerLens's attention is eager; another kernel rounds elsewhere, and norms behind sublayers enlarge that.
    same = eager_rounding(vlm) if vlm.attention == "eager" else eager_rounding(vlm, 256)
    sites = [site for site in lens.names if has(vlm, site)]
    own, theirs = vlm.run(prompt, read=sites), lens.run(prompt, read=sites)
    yield Finding(11, "logits", apart(own.logits, theirs.logits), same)
    for what, alike in by_kind(sites):
        found = [differing(own[site], theirs[site]) for site in alike]
        yield Finding(11, f"reading {what}", max(found), same)
    live = [site for site in sites if reaches(vlm, site)]
    for what, alike in by_kind([site for site in live if site not in lens.lost]):
        found = []
        for site in alike:
            edits = [probe(site)]
            here, there = vlm.run(prompt, edits=edits).logits, lens.run(prompt, edits=edits).logits
            found.append(BROKEN if torch.equal(here, own.logits) else apart(here, there))
        yield Finding(11, f"editing {what}", max(found), same)
    for site in (site for site in live if site in lens.lost and site.kind == "resid_post"):
        logits, _ = lens.raw(prompt, {lens.names[site]: probe(site).fn})
        yield Finding(
            11, f"TransformerLens's {lens.names[site]}: an edit does nothing", apart(logits, theirs.logits), 0.0
        )
        idle = torch.equal(vlm.run(prompt, edits=[probe(site)]).logits, own.logits)
        yield Finding(11, f"{site}: an edit here acts", BROKEN if idle else 0.0, 0.0)
    yield from law_11_untold(vlm, prompt, lens)


def law_11_untold(vlm: Any, prompt: Prompt, lens: Bridge) -> Iterator[Finding]:
    """Where TransformerLens leaves attention to transformers, its scores are the pattern and its edits do nothing."""
    plain = vlm.run(prompt).logits
    base, _ = lens.raw(prompt, {})
    for tower, prefix in layers_of(lens.model).items():
        sites = [site for site, reason in lens.untold.items() if site.tower == tower and reason == NATIVE]
        sites = [site for site in sites if has(vlm, site) and reaches(vlm, site)]
        for kind, hook in (("scores", "hook_attn_scores"), ("pattern", "hook_pattern")):
            shown, effects, own = [], [], []
            for site in (site for site in sites if site.kind == kind):
                name, pattern = f"{prefix}.{site.layer}.attn.{hook}", Site("pattern", site.layer, tower)
                logits, seen = lens.raw(prompt, {name: probe(site).fn})
                shown.append(apart(seen[name], vlm.run(prompt, read=[pattern])[pattern]))
                effects.append(apart(logits, base))
                edited = vlm.run(prompt, edits=[probe(site)]).logits
                own.append(BROKEN if torch.equal(edited, plain) else 0.0)
            if shown:
                what = f"TransformerLens's {hook}, {tower}"
                yield Finding(11, f"{what}: holds the pattern", max(shown), eager_rounding(vlm))
                yield Finding(11, f"{what}: an edit does nothing", max(effects), 0.0)
                yield Finding(11, f"{kind}, {tower}: an edit here acts", max(own), 0.0)


def has(vlm: Any, site: Site) -> bool:
    """Whether a model has a site."""
    if site.layer is None:
        return site.tower == "text" or vlm.arch.vision.embed is not None
    return site.kind in vlm.shape.kinds[site.tower][site.layer]


def reaches(vlm: Any, site: Site) -> bool:
    """Whether an edit of a site can reach the answer."""
    return site.layer is None or site.layer < vlm.shape.live[site.tower]


def by_kind(sites: Sequence[Site]) -> Iterator[tuple[str, list[Site]]]:
    """Sites together with those of the same kind in the same tower."""
    for tower, kind in dict.fromkeys((site.tower, site.kind) for site in sites):
        alike = [site for site in sites if (site.tower, site.kind) == (tower, kind)]
        yield (kind if alike[0].layer is None and tower == "text" else f"{kind}, {tower}"), alike


def differing(here: Tensor, there: Tensor) -> float:
    """How far a reading is from TransformerLens's, which may have tiles where there are images here."""
    same = here.numel() == there.numel() and here.shape[-1] == there.shape[-1]
    return apart(here.flatten(0, -2), there.flatten(0, -2)) if same else BROKEN


def probe(site: Site) -> Edit:
    """An edit that every site allows: one head scaled where there are heads, else everything."""

    def scale(x: Tensor) -> Tensor:
        if site.kind in ("q", "k", "v", "z"):
            x[:, :, 0] *= 1.5
        elif site.kind in ("scores", "pattern"):
            x[:, 0] *= 0.5
        else:
            x *= 1.1
        return x

    return Edit(site, scale, label="a probe")
