"""Laws 4 and 6: patterns and masses are the model's own, and biases do what they say."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechvlm.attention_edits import bias_attention, cut_attention, scale_attention
from mechvlm.laws.finding import Finding, layers_with, some_keys
from mechvlm.prompt import Prompt
from mechvlm.readings import entropy, lazy, mass, rows, top_keys
from mechvlm.references import (
    apart,
    eager_rounding,
    own_patterns,
    rounding,
)
from mechvlm.sites import Site

WAYS = ("mask", "feature", "recompute")


def law_4_patterns(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Patterns are the model's own eager ones, rows sum to one, masses are sums of weights."""
    everywhere = own_patterns(vlm, prompt)
    for tower in vlm.shape.layers:
        for kind in ("pattern", "cross_pattern"):
            sites = [Site(kind, layer, tower) for layer in layers_with(vlm, kind, tower)]
            if sites:
                yield from patterns_at(vlm, prompt, sites, everywhere)


def patterns_at(vlm: Any, prompt: Prompt, sites: list[Site], own: dict[Site, Tensor]) -> Iterator[Finding]:
    """The patterns of one tower, compared with the eager model's, summed, and read in parts."""
    run, where = vlm.run(prompt, read=sites), f"{sites[0].tower}{' cross' if 'cross' in sites[0].kind else ''}"
    worst = max(apart(run[site], own[site]) for site in sites)
    yield Finding(4, f"eager attention, {where}", worst, eager_rounding(vlm))
    one = max(apart(run[site].sum(-1), torch.ones_like(run[site][..., 0])) for site in sites)
    yield Finding(4, f"rows sum to one, {where}", one, rounding(vlm))
    keys = run[sites[0]].shape[-1]
    spans = prompt.spans if where == "text" else {"some": [1, 2, 3], "all": list(range(keys))}
    readings: dict[str, Any] = {
        "mass": mass(spans),
        "mass of rows": mass(spans, [-1, 2]),
        "rows": rows([-1, 2]),
        "rows over some keys": rows([-1, 2], keys=[1, 2, 3]),
        "entropy": entropy(),
        "largest weights": top_keys(3),
    }
    kept = vlm.run(prompt, read={site: lazy() for site in sites})
    for name, reading in readings.items():
        in_run = vlm.run(prompt, read={site: reading for site in sites}) if name == "mass" else None
        room = keys * 256 if name in ("rows", "entropy") else vlm.attention_budget  # the same in smaller pieces
        asked = {site: replace(kept[site], budget=room) for site in sites}
        short = {site: in_run[site] if in_run else reading.of(asked[site], "pattern") for site in sites}
        worst = max(apart(first(short[site]), first(reading(run[site].double()))) for site in sites)
        yield Finding(4, f"{name} without the map, {where}", worst, rounding(vlm))


def first(reading: Any) -> Tensor:
    """The tensor of a reading, or the first of two: keys of equal weights may stand in any order."""
    return reading[0] if isinstance(reading, tuple) else reading


def law_6_biases(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """A bias multiplies the odds of a span by e^b; minus infinity leaves exactly zero; all ways agree."""
    for tower in vlm.shape.layers:
        for kind in ("pattern", "cross_pattern"):
            layers = layers_with(vlm, kind, tower)
            if layers:
                yield from biases_at(vlm, prompt, Site(kind, layers[0], tower))


def biases_at(vlm: Any, prompt: Prompt, site: Site, amount: float = 1.5) -> Iterator[Finding]:
    """The same at one site."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    cross, layer = site.kind == "cross_pattern", int(site.layer or 0)
    keys, where = [1, 2, 3] if cross else some_keys(prompt, site.tower), site.tower + (" cross" if cross else "")
    before = vlm.run(prompt, read=[site])[site].double()
    rest = [key for key in range(before.shape[-1]) if key not in set(keys)]
    sees = (before[..., keys].sum(-1) > 1e-4) & (before[..., rest].sum(-1) > 1e-4)
    odds = before[..., keys].sum(-1) / before[..., rest].sum(-1)
    runs = {}
    for way in WAYS:
        edit = bias_attention(layer, keys, amount, tower=site.tower, way=way, cross=cross)
        runs[way] = vlm.run(prompt, read=[site], edits=[edit])
    for way, run in runs.items():
        after = run[site].double()
        now = after[..., keys].sum(-1) / after[..., rest].sum(-1)
        change = (now / odds)[sees] / torch.tensor(amount, dtype=torch.float64).exp()
        worst = apart(change, torch.ones_like(change)) if bool(sees.any()) else float("inf")
        yield Finding(6, f"odds by {way}, {where}", worst, rounding(vlm, 256))
        yield Finding(6, f"{way} as recompute, {where}", apart(run.logits, runs["recompute"].logits), same)
    factors = [scale_attention(layer, keys, amount, tower=site.tower, way=way, cross=cross) for way in WAYS[1:]]
    one, other = (vlm.run(prompt, edits=[edit]).logits for edit in factors)
    yield Finding(6, f"a factor by feature as recompute, {where}", apart(one, other), same)
    cuts = [cut_attention(layer, keys, tower=site.tower, way=way, cross=cross) for way in WAYS]
    worst = max(vlm.run(prompt, read=[site], edits=[cut])[site][..., keys].abs().max().item() for cut in cuts)
    yield Finding(6, f"a cut leaves zero, {where}", worst, 0.0)
