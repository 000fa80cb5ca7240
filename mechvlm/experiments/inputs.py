"""Where a picture enters a model, as pixels or as image features, and which image token a number of it belongs to.

Rule this module guards: a pixel belongs to the image token whose square holds it, in the square of the picture that the
model is called with; one that no token's square holds (padding, a rest at the edge, a crop's margin) belongs to none.

>>> [str(site) for site in input_sites(vlm, "pixels")]
['vision.pixels']
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mechvlm.experiments.sight import deepstack_layers, image_coordinates, image_dim
from mechvlm.experiments.sweep import numbers
from mechvlm.imagemap import Tile
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, told
from mechvlm.vlm import VLM

PIXELS = Site("pixels", tower="vision")
ENTRIES = ("image_features", "pixels")
PATCHED = ("patches", "molmo")
"""Families of processors that hand over patches, and no pictures."""


def input_sites(vlm: VLM, at: str, name: str = "at") -> list[Site]:
    """The sites of all that a picture hands on, at its features (deep-stack's too) or at its pixels.

    Args:
        name: what the argument is called, for what is refused.

    Raises:
        ValueError: for another word.

    Example:
        >>> input_sites(vlm, "image_features")
        [Site(kind='image_features', layer=None, tower='text')]
    """
    if at not in ENTRIES:
        raise ValueError(
            f"{name}={told(at)} is not where a picture enters; choose from {', '.join(map(repr, ENTRIES))}."
        )
    if at == "pixels":
        return [PIXELS]
    return [Site("image_features"), *[Site("deepstack", layer) for layer in deepstack_layers(vlm)]]


def token_dim(prompt: Prompt, at: str) -> str:
    """What tokens are counted by: `position`; `key`, of cross-attention; `patch`, for the pixels under a Q-Former.

    Example:
        >>> token_dim(real, "pixels")
        'position'
    """
    under = at == "pixels" and any(image.of == "patches" for image in prompt.images)
    return "patch" if under else image_dim(prompt)


def token_coordinates(prompt: Prompt, at: str) -> dict[str, object]:
    """For each token its position, key or patch, and the image, tile, row and column it belongs to.

    Example:
        >>> token_coordinates(real, "pixels")["position"][:3]
        array([3, 4, 5])
    """
    if token_dim(prompt, at) != "patch":
        return image_coordinates(prompt)
    cells = [
        (patch, number, *place)
        for number, image in enumerate(prompt.images)
        for patch, place in zip(image.positions, image.places, strict=True)
    ]
    columns = np.array(cells, dtype=int).reshape(-1, 5).T
    names = ("patch", "image", "tile", "row", "column")
    return {name: ("patch", column) for name, column in zip(names, columns, strict=True)}


def token_sums(vlm: VLM, prompt: Prompt, values: Mapping[Site, Tensor]) -> np.ndarray:
    """Numbers at a picture's features, or at its pixels, summed over each token.

    Args:
        values: for each of `input_sites` a tensor as that site has it.

    Returns:
        One number a token, in the order of `token_coordinates`. A token without a place has no pixels: its sum is 0.

    Raises:
        ValueError: where no map says which pixels are which token's.
    """
    if PIXELS not in values:
        return np.sum([numbers(x.flatten(0, 1).sum(-1)) for x in values.values()], axis=0)
    x, family = values[PIXELS], vlm.arch.grid
    if family == "patches":  # those of one token are neighbours
        return numbers(x.sum(-1).reshape(len(prompt.image), -1).sum(-1))
    if family == "molmo":
        pooled, patches = prompt.encoding["image_token_pooling"].to(x.device), x.sum(-1).flatten()
        return numbers((patches[pooled.clamp(min=0)] * (pooled >= 0)).sum(-1))
    found: dict[int, float] = {}
    for image, squares in zip(prompt.images, squares_of(vlm, prompt, x), strict=True):
        sums = [_box_sums(tile, square) for tile, square in zip(image.tiles, squares, strict=True)]
        for at, (tile, row, column) in zip(image.positions, image.places, strict=True):
            found[at] = float(sums[tile][row, column])
    where: Any = token_coordinates(prompt, "pixels")[token_dim(prompt, "pixels")]
    return np.array([found.get(at, 0.0) for at in np.ravel(where[-1] if isinstance(where, tuple) else where).tolist()])


def squares_of(vlm: VLM, prompt: Prompt, x: Tensor) -> list[list[Tensor]]:
    """For each image the pictures that the model sees of it, `channel y x`, one for each tile of its map.

    Raises:
        ValueError: for models that are called with patches, and where tokens are of several squares together.
    """
    family, packed = vlm.arch.grid, "vision" in vlm.shape.packed
    if family in PATCHED:
        raise ValueError(f"{vlm.hf.config.model_type} models are called with patches, and not with pictures.")
    x = x[0] if family == "mllama" else x
    if x.ndim == 5 and x.shape[0] == len(prompt.images):
        held = list(x)  # those of an image with fewer squares than another's are filled up
    else:
        held = list(x.flatten(0, -4).split([1 if packed else rows for rows, _ in prompt.vision]))
    for number, (image, (rows, _)) in enumerate(zip(prompt.images, prompt.vision, strict=True)):
        if family != "mllama" and not packed and len(image.tiles) != rows:
            raise ValueError(
                f"image {number} is seen as {rows} squares, whose tokens are put together to {len(image.tiles)} grids, "
                "so its pixels are no single token's; take at='image_features'."
            )
    return [list(own[: len(image.tiles)]) for image, own in zip(prompt.images, held, strict=True)]


def _box_sums(tile: Tile, square: Tensor) -> np.ndarray:
    """The sum over each token's box of a picture; what lies behind the last row and column is in none."""
    high, wide = map(round, tile.token)
    inner = square.sum(0)[: tile.rows * high, : tile.columns * wide]
    return numbers(inner.reshape(tile.rows, high, tile.columns, wide).sum((1, 3)))
