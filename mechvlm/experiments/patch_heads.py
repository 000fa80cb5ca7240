"""Which heads carry what was seen, and by what: their output, their queries, keys and values, or where they look.

>>> found = patch_heads(vlm, source=real, target=null, metric=yes, positions=real.find("7")).normalised
>>> found.stack(at=["layer", "head"]).idxmax("at").item()
(0, 7)
"""

from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from mechvlm.edits import Edit
from mechvlm.experiments.exchange import Patching, exchange, layers_of, matched, patched_with
from mechvlm.experiments.patches import from_run, reading_of
from mechvlm.experiments.sight import named as layers_named
from mechvlm.metrics import Metric
from mechvlm.plan import length_at
from mechvlm.prompt import Prompt
from mechvlm.run import Run
from mechvlm.sites import PATTERN_KINDS, Site, places
from mechvlm.vlm import VLM

KINDS = ("q", "k", "v", "scores", "pattern", "z", "cross_scores", "cross_pattern", "cross_z")


def patch_heads(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    positions: Sequence[int] | None = None,
    kind: str = "z",
    batch_size: int | None = None,
    direction: str = "denoise",
    layers: Sequence[int] | None = None,
    tower: str = "text",
    out: str | Path | None = None,
) -> xr.Dataset:
    """How far the target's answer becomes the source's when one head's part of a layer is taken from it.

    Args:
        source, target, metric, batch_size, direction, tower, out: as in `patch_spans`.
        positions: where; None means everywhere, `target.last` only where the answer is made. Of "scores" and "pattern"
            they are the queries whose rows are taken, and rows elsewhere are neither read nor made.
        kind: "z", what a head took in; "pattern" or "scores", where it looks, while it takes in what is the target's
            there; "v", what is taken in from `positions`, while all look where they did; "q" and "k", who looks and who
            is looked at. Of keys and values there may be fewer heads than of queries; the axis is then `kv_head`. In
            layers that attend to the picture (Mllama's, a Q-Former's) the kinds are "cross_z" and so on.
        layers: None means all that have such heads.

    Returns:
        As `patch_spans`, over axes layer and head, or kv_head.

    Raises:
        ValueError, TypeError: as `patch_spans`, and for a kind without heads or a layer without the kind.

    Example:
        >>> mv.plot.heatmap(mv.patch_heads(vlm, real, null, yes, positions=real.last).normalised)

    Source:
        Wang et al. (2023), "Interpretability in the Wild", section 3; Golovanevsky et al. (2025), "What Do VLMs
        NOTICE?", section 4, heads at the answer's token.
    """
    if kind not in KINDS:
        raise ValueError(f"heads have no {kind!r} to patch; choose from {', '.join(KINDS)}.")
    chosen = _layers(vlm, kind, tower, layers)
    matched(vlm, source, target, chosen, tower)
    sites = {layer: Site(kind, layer, tower) for layer in chosen}
    at = None if positions is None else places("positions", positions, all_by_none=True)
    held = sorted(set(at or range(length_at(sites[chosen[0]], target))))
    rows = None if at is None and kind not in PATTERN_KINDS else held
    of = "kv_head" if kind in ("k", "v") else "head"
    count = (vlm.shape.kv_heads if kind in ("k", "v") else vlm.shape.heads)[tower]

    def patching(run: Run) -> Patching:
        def edits(layer: int, **head: int) -> list[Edit]:
            return [from_run(run, sites[layer], rows, [head[of]], held)]

        return edits

    read = reading_of(list(sites.values()), held)
    about = {"site": kind, "tower": tower, "positions": "all" if at is None else ", ".join(map(str, at))}
    about |= patched_with(vlm, direction)
    axes, how = {"layer": chosen, of: range(count)}, (direction, batch_size, out)
    return exchange(vlm, source, target, metric, read, patching, axes, about, *how)


def _layers(vlm: VLM, kind: str, tower: str, layers: Sequence[int] | None) -> list[int]:
    """The layers that were given, or all that have such heads."""
    chosen = layers_of(vlm, tower, layers)
    having = [layer for layer in chosen if kind in vlm.shape.kinds[tower][layer]]
    without = [layer for layer in chosen if layer not in having]
    if not having or (without and layers is not None):
        here = [one for one in KINDS if any(one in vlm.shape.kinds[tower][layer] for layer in without)]
        raise ValueError(f"this model has no {kind} in {layers_named(without)}; choose from {', '.join(here)}.")
    return having
