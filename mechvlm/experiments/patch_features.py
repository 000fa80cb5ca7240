"""Which part of the picture matters: its features taken from another picture, region by region.

>>> patch_features(vlm, source=real, target=null, metric=yes, regions={"all": real.image}).normalised.values.round(3)
array([1.])
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from mechvlm.experiments.exchange import Patching, exchange, matched
from mechvlm.experiments.inputs import input_sites
from mechvlm.experiments.patches import features_patch
from mechvlm.experiments.sight import image_coordinates, image_dim
from mechvlm.metrics import Metric
from mechvlm.prompt import Prompt
from mechvlm.run import Run
from mechvlm.sites import places, told
from mechvlm.vlm import VLM

Regions = Mapping[str, Sequence[int]]


def patch_features(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    regions: Regions | Callable[[Prompt], Regions] | None = None,
    batch_size: int | None = None,
    direction: str = "denoise",
    out: str | Path | None = None,
) -> xr.Dataset:
    """How far the target's answer becomes the source's when some of its image features are taken from the source.

    What is taken is all that the picture hands to the language model for these image tokens: the projector's features,
    and those that are added behind later layers (Qwen3-VL). All of the picture gives 1 where only pictures differ. A
    feature has already seen the rest of its own picture in the vision tower.

    Args:
        source, target, metric, batch_size, direction, out: as in `patch_spans`.
        regions: named lists of positions of image tokens, or a function from the target to them, such as
            `mv.image_regions`. Where layers look at the picture by cross-attention (Mllama) they are its keys, as
            `mv.image_regions(target, of="keys")` has them. None means each token, or key, by itself.

    Returns:
        `metric` and `normalised` as of `patch_spans`, over axis region; or, for single tokens, over axis position (or
        key), with the image, tile, row and column of each.

    Raises:
        ValueError, TypeError: as `patch_spans`; also without an image, and for positions that are no image tokens.

    Example:
        >>> parts = mv.patch_features(vlm, real, null, yes, regions=mv.image_regions)
        >>> mv.plot.bars(parts.normalised, x="region")

    Source:
        Golovanevsky et al. (2025), "What Do VLMs NOTICE?", section 3, of whose pictures one part differs; patched here
        are features instead of module outputs.
    """
    matched(vlm, source, target, [])
    if not target.image:
        raise ValueError("the prompts hold no image, so there are no features; make them with vlm.prompt(image, text).")
    dim, where = image_dim(target), image_coordinates(target)
    own = [int(position) for position in np.asarray(where[image_dim(target)])]
    given = regions(target) if callable(regions) else regions
    if given is None:
        named = {str(position): [position] for position in own}
    elif isinstance(given, Mapping):
        named = {name: list(places("positions", positions)) for name, positions in given.items()}
    else:
        raise TypeError(f"regions={told(given)} does not name them; write for instance mv.image_regions(prompt).")
    beyond = [position for positions in named.values() for position in positions if position not in own]
    if beyond:
        raise ValueError(
            f"{dim} {beyond[0]} is no image token of the target, whose {dim}s are {own[0]} to {own[-1]}; give those."
        )
    tokens = {name: [own.index(position) for position in positions] for name, positions in named.items()}
    sites = input_sites(vlm, "image_features")

    def patching(run: Run) -> Patching:
        return lambda region: [features_patch(site, run[site], tokens[region]) for site in sites]

    read, about = dict.fromkeys(sites), {"site": ", ".join(map(str, sites))}
    axes, how = {"region": list(named)}, (direction, batch_size, out)
    found = exchange(vlm, source, target, metric, read, patching, axes, about, *how)
    if given is not None:
        return found
    return found.rename(region=dim).assign_coords({dim: own}).assign_coords(where)
