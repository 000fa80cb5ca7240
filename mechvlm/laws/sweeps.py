"""Law 8 of sweeps: a point that is run from where its edits begin has the answer of a full pass."""

from collections.abc import Iterator
from typing import Any

import torch

from mechvlm.attention_edits import bias_attention, cut_attention
from mechvlm.edits import Edit, ablate_heads, patch, scale_heads
from mechvlm.laws.finding import Finding, layers_with
from mechvlm.points import answers, way_of
from mechvlm.prompt import Prompt
from mechvlm.references import apart, eager_rounding, negative_of, rounding
from mechvlm.sites import Site

KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def law_8_sweeps(vlm: Any, prompt: Prompt) -> Iterator[Finding]:
    """Whatever is edited, wherever: alone and with other points, with edits of the model's own and without."""
    same = (eager_rounding if vlm.attention == "eager" else rounding)(vlm)
    if vlm.attention == "flex_attention":
        return  # all points are full passes there
    points = points_of(vlm, prompt)
    common = vlm.with_edits([scale_heads(layers_with(vlm, "z")[0], [0], 0.5)])
    for name, model, rows, how in (
        ("", vlm, None, "batches"),
        (" with edits of its own", common, 1, "points"),
    ):
        full = torch.cat([model.run(prompt, variants=points[at : at + 8]).logits for at in range(0, len(points), 8)])
        found = torch.full_like(full, torch.nan)
        for which, logits in answers(way_of(model, prompt, points, rows)):
            found[list(which)] = logits
        yield Finding(8, f"{how} of a sweep{name}", apart(found, full), same)


def points_of(vlm: Any, prompt: Prompt) -> list[list[Edit]]:
    """Edits of every kind of site, at the first layer or the last one."""
    null, length = negative_of(prompt), len(prompt)
    kinds = vlm.shape.kinds["text"]
    layers = (0, len(kinds) - 1)
    kept = [Site(kind, layer) for layer in layers for kind in kinds[layer][layer > 0 :: 2] if kind in KINDS]
    other = vlm.run(null, read=kept)
    points = [[patch(site, other[site], [length // 2 + at % 3])] for at, site in enumerate(kept)]
    first, last = layers_with(vlm, "z")[0], layers_with(vlm, "z")[-1]
    points += [
        [ablate_heads(first, [0])],
        [cut_attention(last, [length // 2], queries=[length - 1])],
        [bias_attention(first, prompt.image, 1.0), ablate_heads(last, [1])],
        [Edit(Site("pattern", last), lambda rows: rows * 0.5, rows=[-1])],
        [Edit(Site("scores", first), lambda rows: rows * 0.5, rows="each")],
        [],
        [Edit("image_features", lambda x: x * 2)],
        [scale_heads(0, [0], 2.0, tower="vision")],
    ]
    return points + [
        [Edit(Site("deepstack", layer), lambda x: x * 2)] for layer in layers if "deepstack" in kinds[layer]
    ]
