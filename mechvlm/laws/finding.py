"""What a law finds, and which sites it looks at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechvlm.prompt import Prompt
from mechvlm.sites import Site


@dataclass(frozen=True)
class Finding:
    """How far a model is from one law: the largest error, and what is allowed (zero: bit for bit)."""

    law: int
    what: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed."""
        return self.error <= self.allowed


def all_sites(vlm: Any, live: bool = False) -> list[Site]:
    """Every site of a model; with `live`, those from which an edit can reach the answer."""
    layers = vlm.shape.live if live else vlm.shape.layers
    inner = [
        Site(kind, layer, tower)
        for tower in layers
        for layer in range(layers[tower])
        for kind in vlm.shape.kinds[tower][layer]
    ]
    vision = [Site("embed", tower="vision")] if vlm.shape.embeds_vision else []
    return [Site("pixels", tower="vision"), Site("embed"), *vision, Site("image_features"), *inner, Site("logits")]


def layers_with(vlm: Any, kind: str, tower: str = "text") -> list[int]:
    """The layers of a tower that have some site; in Mllama's text tower some look at the image only."""
    return [layer for layer, kinds in enumerate(vlm.shape.kinds[tower]) if kind in kinds]


def some_keys(prompt: Prompt, tower: str) -> Sequence[int]:
    """Positions that a law biases attention to."""
    return prompt.image if tower == "text" else [1, 2, 3]
