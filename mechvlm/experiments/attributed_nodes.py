"""What a patch can be estimated of: kinds of activations, their layers, and positions one by one or under a name.

Rule this module guards: a node is what one patch changes. What is estimated of it and what patches it are of the same
positions, the same heads and the same of the picture.

>>> Nodes.of(vlm, real, ["z"], [3], "text", "each", given=True).sites
[Site(kind='z', layer=3, tower='text')]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.edits import Edit, patch
from mechvlm.experiments.attributed_checks import Node
from mechvlm.experiments.patches import features_patch, from_run
from mechvlm.experiments.sight import deepstack_layers, image_coordinates, image_dim
from mechvlm.experiments.sight import named as layers_named
from mechvlm.plan import check_range, length_at
from mechvlm.prompt import Prompt
from mechvlm.run import Run
from mechvlm.sites import Site, listed, told, whole_numbers
from mechvlm.vlm import VLM

HEADS = {"q": "head", "k": "kv_head", "v": "kv_head", "z": "head", "cross_z": "head"}
STREAM = ("resid_pre", "resid_mid", "resid_post")
KINDS = ("resid_pre", "q", "k", "v", "z", "cross_z", "attn_out", "resid_mid", "mlp_out", "resid_post")
ENTRIES = {"text": ("embed", "image_features"), "vision": ("embed",), "qformer": ()}
"""What has no layer, by tower."""
FEATURES = "image_features"


@dataclass(frozen=True)
class Nodes:
    """The nodes of one tower.

    Attributes:
        held: for each kind the layers that have it; none for what has no layer.
        layers: those asked for.
        places: the positions under each name; None where each position is a node.
        length: how many positions there are.
        image: the positions of the picture's tokens, in the text.
        later: the layers behind which features of the picture are added, and patched with the residual stream.
        keyed: whether the picture's features are keys of cross-attention, which have no positions.
    """

    tower: str
    held: dict[str, list[int]]
    layers: list[int]
    places: dict[str, list[int]] | None
    length: int
    image: list[int]
    later: list[int]
    keyed: bool

    @classmethod
    def of(
        cls, vlm: VLM, target: Prompt, kinds: Any, layers: Sequence[int], tower: str, positions: Any, given: bool
    ) -> "Nodes":
        """The nodes that are asked for.

        Args:
            given: whether the layers were named, so that each has to have every kind.

        Raises:
            ValueError, TypeError: as `attribution_patching` says.
        """
        held = _kinds(vlm, kinds, layers, tower, given)
        here = tower == "text"
        length = len(target) if here else length_at(Site("resid_pre", 0, tower), target)
        keyed = here and image_dim(target) == "key"
        places = _places(positions, target, tower, length)
        if places is not None and keyed and FEATURES in held:
            raise ValueError(
                "image_features of this model are keys of cross-attention and stand at no position, so they cannot be "
                "summed by positions; write positions='each', or leave them out."
            )
        if places is not None and tower == "qformer" and "cross_z" in held:
            _check_queries(places, length_at(Site("cross_z", held["cross_z"][0], tower), target))
        moved = target.image and here and any(kind in (*STREAM, FEATURES) for kind in held)
        return cls(
            tower, held, list(layers), places, length, target.image, deepstack_layers(vlm) if moved else [], keyed
        )

    @property
    def sites(self) -> list[Site]:
        """Where the nodes are."""
        return [self.site(kind, layer) for kind, layers in self.held.items() for layer in layers or [-1]]

    def site(self, kind: str, layer: int) -> Site:
        """Where nodes of a kind are; layer -1 stands for none."""
        return Site(kind, None if layer < 0 else layer, self.tower)

    @property
    def added(self) -> list[Site]:
        """What is added of the picture behind later layers."""
        return [Site("deepstack", at) for at in self.later]

    def passing(self, site: Site) -> list[Site]:
        """What of the picture has yet to be added behind a site, and so is patched with it."""
        if site.kind not in (*STREAM, FEATURES):
            return []
        return [one for one in self.added if site.layer is None or int(one.layer or 0) >= site.layer]

    def positions(self, node: Node) -> list[int]:
        """The positions of a node."""
        return [node.place] if isinstance(node.place, int) else (self.places or {})[node.place]

    def edits(self, run: Run, node: Node) -> list[Edit]:
        """The patch of a node from a run, with what is added to its image tokens where it is of the residual stream."""
        site, positions = self.site(node.kind, node.layer), self.positions(node)
        tokens = {position: token for token, position in enumerate(self.image)}
        own = [tokens[position] for position in positions if position in tokens]
        if node.kind == FEATURES:
            own = positions if self.keyed else own
            return [features_patch(one, run[one], own) for one in (site, *self.passing(site))]
        made = (
            patch(site, run[site], positions)
            if site.layer is None
            else from_run(run, site, positions, None if node.head is None else [node.head], positions)
        )
        return [made, *(features_patch(one, run[one], own) for one in self.passing(site) if own)]


def _kinds(vlm: VLM, kinds: Any, layers: Sequence[int], tower: str, given: bool) -> dict[str, list[int]]:
    """The kinds that are asked for, and which of the layers have each."""
    asked = listed(kinds)
    if not asked:
        raise TypeError(f"kinds={told(kinds)} is no list of kinds; write for instance ['resid_pre', 'z'].")
    known = (*KINDS, *ENTRIES[tower])
    wrong = [kind for kind in asked if kind not in known]
    if wrong:
        raise ValueError(f"{told(wrong[0])} cannot be estimated by position; choose from {', '.join(known)}.")
    here = vlm.shape.kinds[tower]
    held = {kind: [at for at in layers if kind in here[at]] for kind in asked}
    for kind, having in held.items():
        without = [at for at in layers if at not in having]
        if kind in KINDS and (not having or (without and given)):
            others = [one for one in KINDS if all(one in here[at] for at in without)]
            raise ValueError(
                f"this model has no {kind} in {layers_named(without)}, so no patch of it can be estimated; choose from "
                f"{', '.join(others)}."
            )
    return held


def _check_queries(places: Mapping[str, Sequence[int]], queries: int) -> None:
    """Refuse to sum what attends to the picture over positions that do not."""
    for name, positions in places.items():
        if max(positions) >= queries:
            raise ValueError(
                f"cross_z of a Q-Former is of its {queries} queries alone, and span {name!r} holds position "
                f"{max(positions)}; name positions below {queries}, or write positions='each'."
            )


def _places(positions: Any, target: Prompt, tower: str, length: int) -> dict[str, list[int]] | None:
    """Positions by name, or None for each by itself."""
    made = positions(target) if isinstance(positions, Callable) else positions  # type: ignore[arg-type]
    if isinstance(made, str) and made == "each":
        return None
    if isinstance(made, str) and made == "span":
        return dict(target.spans) if tower == "text" else {"all": list(range(length))}
    if not isinstance(made, Mapping) or not made:
        raise ValueError(
            f"positions={told(made)} is not known; choose from 'each', 'span', or name positions, such as "
            "{'image': prompt.image} or mv.image_regions(prompt)."
        )
    named = {str(name): whole_numbers("positions", some) for name, some in made.items()}
    for name, some in named.items():
        check_range(f"span {name!r}", Site("resid_pre", 0, tower), some, [length])
        if not some:
            raise ValueError(f"span {name!r} holds no position, so nothing is patched there; leave it out.")
    return {name: sorted({position % length for position in some}) for name, some in named.items()}


def tables(vlm: VLM, target: Prompt, nodes: Nodes, sums: Mapping[tuple, np.ndarray]) -> dict[str, xr.DataArray]:
    """Estimates of each kind, over layer, position or span, and head.

    Args:
        sums: by site, over position, span or key, and head.
    """
    found = {}
    for kind, having in nodes.held.items():
        keyed = kind == FEATURES and nodes.keyed
        own = _along(target, nodes, keyed)
        dims = ["key" if keyed else "position" if nodes.places is None else "span"]
        sizes = [len(own[dims[0]])]
        if kind in HEADS:
            of = HEADS[kind]
            dims, sizes = (
                [*dims, of],
                [*sizes, (vlm.shape.kv_heads if of == "kv_head" else vlm.shape.heads)[nodes.tower]],
            )
            own[of] = range(sizes[-1])
        if kind not in KINDS:
            values = sums[(kind, None, nodes.tower)]
            if kind == FEATURES and not keyed:
                values = np.where(_in_image(nodes), values, np.nan)
            found[kind] = xr.DataArray(values, dims=dims, coords=own)
            continue
        table = np.full([len(nodes.layers), *sizes], np.nan)
        for layer in having:
            row = sums[(kind, layer, nodes.tower)]
            table[nodes.layers.index(layer), : len(row)] = row  # a Q-Former's cross-attention is of its queries alone
        found[kind] = xr.DataArray(table, dims=["layer", *dims], coords={"layer": nodes.layers, **own})
    return found


def _in_image(nodes: Nodes) -> np.ndarray:
    """Which of the places hold an image token."""
    tokens = set(nodes.image)
    places = [[at] for at in range(nodes.length)] if nodes.places is None else nodes.places.values()
    return np.array([bool(tokens & set(held)) for held in places])


def _along(target: Prompt, nodes: Nodes, keyed: bool) -> dict[str, Any]:
    """What stands at each position, and which part of the picture it is of; or the names of spans."""
    if keyed:
        return image_coordinates(target)
    if nodes.places is not None:
        return {"span": list(nodes.places)}
    found: dict[str, Any] = {"position": np.arange(nodes.length)}
    if nodes.tower != "text":
        return found
    spans = {position: name for name, held in target.spans.items() for position in held}
    found["token"] = ("position", list(target.tokens))
    found["span"] = ("position", [spans[at] for at in range(nodes.length)])
    if not target.image or image_dim(target) == "key":
        return found
    shown: dict[str, Any] = image_coordinates(target)
    for name in ("image", "tile", "row", "column"):
        column = np.full(nodes.length, -1)
        column[shown["position"]] = shown[name][1]
        found[name] = ("position", column)
    return found
