"""How a model looks at pictures: which layers attend to what, and where the values of image tokens belong.

Rule this module guards: a value is given a place in the picture only where its token stands for one. A query of a
Q-Former does not, and neither does the one token that stands for an image whose features are keys of cross-attention.

>>> cross_layers(vlm), image_dim(real), looking(vlm, real, 3)
([], 'position', Site(kind='pattern', layer=3, tower='text'))
"""

from collections.abc import Sequence

import numpy as np

from mechvlm.prompt import Prompt
from mechvlm.sites import Site
from mechvlm.vlm import VLM

NOWHERE = (-1, -1, -1)
"""Tile, row and column of what stands for no place."""


def own_layers(vlm: VLM) -> list[int]:
    """The layers of the language model whose words attend to each other.

    Example:
        >>> own_layers(vlm)
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return [layer for layer, kinds in enumerate(vlm.shape.kinds["text"]) if "pattern" in kinds]


def cross_layers(vlm: VLM) -> list[int]:
    """The layers of the language model that attend to the image's features, and to nothing else.

    Example:
        >>> cross_layers(vlm)
        []
    """
    return [layer for layer, kinds in enumerate(vlm.shape.kinds["text"]) if "cross_pattern" in kinds]


def head_site(vlm: VLM, layer: int) -> Site:
    """Where a layer's heads hand over what they took in: `z`, or `cross_z` where they look at the picture alone.

    Example:
        >>> head_site(vlm, 3)
        Site(kind='z', layer=3, tower='text')
    """
    return Site("cross_z" if layer in cross_layers(vlm) else "z", layer)


def check_layers_run(vlm: VLM, prompt: Prompt, layers: Sequence[int]) -> list[int]:
    """Some layers as they are; those that a prompt without an image skips are refused.

    Raises:
        ValueError: for such a layer.
    """
    skipped = [layer for layer in cross_layers(vlm) if layer in layers]
    if skipped and not prompt.images:
        raise ValueError(
            f"the prompt holds no image, and {named(skipped)} of this model run only with one; make it with "
            "vlm.prompt(image, text)."
        )
    return list(layers)


def looking(vlm: VLM, prompt: Prompt, layer: int) -> Site:
    """The site of a layer's attention to the picture.

    Raises:
        ValueError: for a layer that does not look at it, because others do by cross-attention.
    """
    if image_dim(prompt) == "position":
        return Site("pattern", layer)
    if layer in own_layers(vlm):
        raise ValueError(
            f"layer {layer} of this model attends to words only; the picture is seen by cross-attention, in "
            f"{named(cross_layers(vlm))}."
        )
    return Site("cross_pattern", layer)


def image_dim(prompt: Prompt) -> str:
    """What the values of a picture are counted by: `position`, of the text, or `key`, of cross-attention.

    Example:
        >>> image_dim(real)
        'position'
    """
    return "key" if any(image.of == "keys" for image in prompt.images) else "position"


def image_coordinates(prompt: Prompt) -> dict[str, object]:
    """For each image token, or key, its position, and the image, tile, row and column it belongs to.

    Tile, row and column are -1 for what stands for no place: a separator, a class token, a query of a Q-Former.
    """
    dim, cells = image_dim(prompt), dict[int, tuple[int, ...]]()
    for number, image in enumerate(prompt.images):
        if image.of != "patches":
            held = (*image.positions, *image.separators)
            cells |= {position: (number, *(image.cell(position) or NOWHERE)) for position in held}
    where = sorted(cells) if dim == "key" else prompt.image
    places = np.array([cells.get(position, (0, *NOWHERE)) for position in where], dtype=int).reshape(-1, 4)
    along = {name: (dim, places[:, at]) for at, name in enumerate(("image", "tile", "row", "column"))}
    return {dim: np.array(where, dtype=int), **along}


def deepstack_layers(vlm: VLM) -> list[int]:
    """The layers of the language model behind which features of the picture are added to its image tokens.

    Example:
        >>> deepstack_layers(vlm)
        []
    """
    return list(range(vlm.shape.deepstack))


def named(layers: Sequence[int]) -> str:
    """Layers in words.

    Example:
        >>> named([1, 3]), named([2])
        ('layers 1, 3', 'layer 2')
    """
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}" if layers else ""
