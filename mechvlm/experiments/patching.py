"""Where does what was seen pass on its way to the answer? Activation patching from one run into another.

Here are patches of positions, one by one or in spans; heads and attention are in `mechvlm.experiments.patch_heads`, the
picture's features in `mechvlm.experiments.patch_features`, averages over pairs in `mechvlm.experiments.patch_pairs`.

>>> patch_spans(vlm, source=real, target=null, metric=yes).normalised.sel(span="image").values.round(1)
array([ 1. ,  0. , -0. , -0.1, -0.1, -0. , -0. , -0. ])
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from mechvlm.edits import Edit
from mechvlm.experiments.exchange import Patching, exchange, layers_of, matched, patched_with, window_of
from mechvlm.experiments.patches import features_patch, from_run, reading_of
from mechvlm.experiments.sight import deepstack_layers
from mechvlm.experiments.sight import named as layers_named
from mechvlm.metrics import Metric
from mechvlm.plan import check_range, length_at
from mechvlm.prompt import Prompt
from mechvlm.run import Run
from mechvlm.sites import PATTERN_KINDS, Site, places, told, whole_numbers
from mechvlm.vlm import VLM

KINDS = ("resid_pre", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
STREAM = ("resid_pre", "resid_mid", "resid_post")
Spans = Mapping[str, Sequence[int]]


def patch_spans(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    spans: Spans | Callable[[Prompt], Spans] | None = None,
    kind: str = "resid_pre",
    batch_size: int | None = None,
    direction: str = "denoise",
    layers: Sequence[int] | None = None,
    window: int = 1,
    tower: str = "text",
    out: str | Path | None = None,
) -> xr.Dataset:
    """How far the target's answer becomes the source's when one layer's activations of one span are taken from it.

    By default what *enters* a layer (`resid_pre`) is taken. So layer 0 patches the embeddings, where with two pictures
    and the same words the image span alone must give 1 and every other span 0; and layer l patches all that the layers
    before l wrote. (With `resid_post` the last layer is trivial instead: its last position is the answer.)

    The picture does not enter every model with the embeddings alone. Where features are also added to the image tokens
    behind later layers (Qwen3-VL), they are part of what the picture hands to those tokens: a patch of the residual
    stream at some of them takes what is yet to be added there from the source too, so that layer 0 is as above. Where
    layers look at the picture by cross-attention (Mllama), what they read is the target's picture whatever is patched
    before them; no span gives 1 at layer 0, and only what the patched layers wrote is carried over. `attrs` say which.

    Args:
        source: the prompt patched from, for instance with the real image.
        target: the prompt patched into, for instance `source.with_image(mv.images.black)`.
        spans: named lists of positions, or a function from the target to them, such as `mv.image_regions`; None means
            the prompt's own, `target.spans`, or, in another tower, all positions together.
        kind: which activation of a layer. Of "scores" and "pattern" the rows of a span's queries are taken.
        batch_size: patches in one forward pass; see `sweep`.
        direction: "denoise" patches the source into the target. "noise" patches the target into the source: what breaks
            the answer, and so is needed for it, where denoising finds what suffices. "both" has an axis `direction`.
        layers: of the tower; None means all that can reach the answer.
        window: so many layers around each layer are patched together, at the ends fewer. For `attn_out` and `mlp_out`:
            what one layer adds may matter little by itself.
        tower: "vision" for the vision tower's own positions (its patches, in its own order; all tiles of a picture
            together), "qformer" for the Q-Former's.
        out: a folder in which finished points are kept; see `sweep`.

    Returns:
        `metric`, in its own unit, and `normalised`, `(metric - target) / (source - target)`: 0 is the target's own
        answer, 1 the source's (in direction "noise" the other way round, so that 1 always means that all was carried
        over). Both over axes layer and span; `attrs` hold `source_metric` and `target_metric`. Where the two are the
        same to within the rounding of the logits, so that there is nothing to carry over, `normalised` is not a number,
        and `attrs` hold a `note` that says so.

    Raises:
        ValueError: where positions cannot be matched, or for a kind without positions, or one that some layer of this
            model has not.
        TypeError: for spans that are no lists of positions by name.

    Example:
        >>> yes = mv.logit_difference("yes", "no")
        >>> mv.plot.lines(mv.patch_spans(vlm, real, null, yes).normalised, x="layer", colour="span")

    Source:
        Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2; Zhang and Nanda (2024),
        "Towards Best Practices of Activation Patching", on metrics and their normalisation, and on windows of layers;
        Heimersheim and Nanda (2024), "How to use and interpret activation patching", on both directions.
    """
    chosen = layers_of(vlm, tower, layers)
    matched(vlm, source, target, chosen, tower)
    sites = sites_of(vlm, kind, tower)
    named = _spans(target, spans, sites[0])
    later = deepstack_layers(vlm) if kind in STREAM and target.image and tower == "text" else []
    patches = _Positions(sites, named, target, later, window)
    about: dict[str, str | int | float] = {
        "site": kind,
        "tower": tower,
        "window": window,
        **patched_with(vlm, direction, later),
    }
    axes: dict[str, list] = {"layer": chosen, "span": list(named)}
    how = (direction, batch_size, out)
    return exchange(vlm, source, target, metric, patches.read(chosen), patches.by_span, axes, about, *how)


def patch_positions(
    vlm: VLM,
    source: Prompt,
    target: Prompt,
    metric: Metric,
    positions: Sequence[int] | None = None,
    kind: str = "resid_pre",
    batch_size: int | None = None,
    direction: str = "denoise",
    layers: Sequence[int] | None = None,
    window: int = 1,
    tower: str = "text",
    out: str | Path | None = None,
) -> xr.Dataset:
    """How far the target's answer becomes the source's when a layer's activation at one position is taken from it.

    Args:
        positions: which, each by itself; None means all.
        kind, batch_size, direction, layers, window, tower, out: as in `patch_spans`.

    Returns:
        As `patch_spans`, over axes layer and position. In the text, `token` and `span` say of each position what stands
        there and what it belongs to.

    Raises:
        ValueError, TypeError: as `patch_spans`.

    Example:
        >>> found = mv.patch_positions(vlm, real, null, yes, positions=real.question + real.last, layers=[2, 3])
        >>> mv.plot.patched_positions(found.normalised)
        >>> seen = mv.patch_positions(vlm, real, null, yes, positions=real.image, layers=[0]).normalised
        >>> mv.plot.over_image(seen.sel(layer=0), real.images[0], real.pictures[0])

    Source:
        As `patch_spans`.
    """
    site = sites_of(vlm, kind, tower)[0]
    count = length_at(site, target)
    chosen = range(count) if positions is None else places("positions", positions, all_by_none=True)
    named = {str(position): [position] for position in chosen}
    found = patch_spans(
        vlm, source, target, metric, named, kind, batch_size, direction, layers, window, tower, out
    ).rename(span="position")
    found = found.assign_coords(position=np.array(chosen, dtype=int))
    if tower != "text":
        return found
    spans = {position: name for name, held in target.spans.items() for position in held}
    words = {"token": [target.tokens[at] for at in chosen], "span": [spans[at] for at in chosen]}
    return found.assign_coords({name: ("position", values) for name, values in words.items()})


def sites_of(vlm: VLM, kind: str, tower: str = "text") -> list[Site]:
    """The sites of a kind in every layer of a tower.

    Raises:
        ValueError: for a kind without positions, or one that some layer has not.
    """
    if kind not in KINDS:
        raise ValueError(f"spans of {kind!r} cannot be patched; choose from {', '.join(KINDS)}.")
    layers_of(vlm, tower, None)
    layers = vlm.shape.kinds[tower]
    without = [layer for layer, kinds in enumerate(layers) if kind not in kinds]
    if without:
        everywhere = [one for one in KINDS if all(one in kinds for kinds in layers)]
        raise ValueError(
            f"this model has no {kind} in {layers_named(without)}; choose from {', '.join(everywhere)}, which every "
            "layer has."
        )
    return [Site(kind, layer, tower) for layer in range(len(layers))]


class _Positions:
    """Patches of spans of positions, in every layer or a window of them."""

    def __init__(self, sites: list[Site], spans: Spans, target: Prompt, later: list[int], window: int) -> None:
        self.sites, self.spans, self.target, self.later, self.window = sites, spans, target, later, window
        self.held = sorted({position for positions in spans.values() for position in positions})

    def around(self, layer: int) -> range:
        """The layers that are patched together."""
        return window_of(layer, self.window, len(self.sites))

    def read(self, layers: Sequence[int]) -> dict:
        """What is read of the run that is patched from."""
        wanted = sorted({at for layer in layers for at in self.around(layer)})
        later = {Site("deepstack", at): None for at in self.later}
        return {**reading_of([self.sites[at] for at in wanted], self.held), **later}

    def by_span(self, run: Run) -> Patching:
        """From a run to the edits of each point."""
        image = {position: token for token, position in enumerate(self.target.image)}

        def edits(layer: int, span: str) -> list[Edit]:
            positions = self.spans[span]
            own = [image[position] for position in positions if position in image]
            layers = self.around(layer)
            made = [from_run(run, self.sites[at], positions, None, self.held) for at in layers]
            added = [Site("deepstack", at) for at in self.later if at >= layers[0] and own]
            return [*made, *(features_patch(site, run[site], own) for site in added)]

        return edits


def _spans(target: Prompt, spans: object, site: Site) -> dict[str, list[int]]:
    """Spans as they were given, or the target's own."""
    count = length_at(site, target)
    given = spans(target) if callable(spans) else spans
    if given is None:
        given = target.spans if site.tower == "text" else {"all": range(count)}
    if not isinstance(given, Mapping):
        raise TypeError(f"spans={told(given)} does not name them; write for instance {{'image': prompt.image}}.")
    named = {name: list(whole_numbers("positions", span)) for name, span in given.items()}
    for name, span in named.items():
        check_range(f"span {name!r}", site, span, [count])
        if site.kind in PATTERN_KINDS:
            named[name] = sorted({position % count for position in span})
    return named
