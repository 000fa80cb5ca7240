"""Image tokens taken away: some of a picture becomes that of another one, without anything to see, where it enters.

Rule this module guards: with no token taken away it is the prompt itself, and with all of them the null prompt, at the
image features (and what deep-stack adds of them) as at the pixels.

>>> from mechvlm.rounds import done
>>> values, how = done(vlm, removed(vlm, real, null, [np.arange(0), np.arange(36)], yes))
>>> values.round(1)
array([ 2.6, -5.8])
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mechvlm import images
from mechvlm.batch import metric_values
from mechvlm.edits import Edit
from mechvlm.experiments.inputs import ENTRIES, input_sites, token_coordinates, token_dim
from mechvlm.experiments.sweep import measuring, numbers
from mechvlm.imagemap import ImageMap
from mechvlm.metrics import Metric
from mechvlm.points import rows_for
from mechvlm.prompt import Prompt
from mechvlm.rounds import Work, unsaid
from mechvlm.sites import Site, told, whole
from mechvlm.units import progress
from mechvlm.vlm import VLM

Tokens = Int[np.ndarray, " token"]
"""Image tokens by their place among those of `token_coordinates`."""


def removed(
    vlm: VLM,
    prompt: Prompt,
    other: Prompt,
    sets: Sequence[np.ndarray],
    metric: Metric,
    at: str = "image_features",
    batch_size: int | None = None,
) -> Work[tuple[np.ndarray, str]]:
    """A metric with each of some sets of image tokens taken away, and how that was run; as work, see `mechvlm.rounds`.

    Sets that hold the same tokens are run once.

    Args:
        sets: image tokens by their place among those of `token_coordinates`.
        other: the null prompt, whose features, or pixels, take the places.
        at: "image_features" or "pixels"; at the pixels the tokens' squares are exchanged in the picture itself, and
            what no token's square holds is exchanged with the last of them.
    """
    each: dict[frozenset[int], int] = {}
    which = [each.setdefault(frozenset(one.tolist()), len(each)) for one in sets]
    if at == "pixels":
        values = yield from _of_pictures(vlm, prompt, other, list(each), metric, batch_size)
        return values[which], "full passes, each with a picture of its own"
    sites = input_sites(vlm, at)
    (source,) = yield [{"prompt": other, "read": sites, "value": unsaid}]
    variants = [without(sites, source, np.array(sorted(one), dtype=int)) for one in each]
    values, how = yield from measuring(vlm, prompt, variants, metric, batch_size)
    return values[which], how


def _of_pictures(
    vlm: VLM,
    prompt: Prompt,
    other: Prompt,
    sets: Sequence[frozenset[int]],
    metric: Metric,
    batch_size: int | None,
) -> Work[np.ndarray]:
    """A metric of the prompt about each of some pictures, with squares of the other picture in them."""
    size = rows_for(prompt) if batch_size is None else whole("batch_size", batch_size)
    if size < 1:
        raise ValueError(f"batch_size={size} runs nothing; give 1 or more.")
    change, value = exchanger(prompt, other), partial(metric_values, vlm.metric(metric))
    prompts = [prompt.with_image(change(one)) for one in sets]
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    runs, found = (yield [{"prompt": group, "value": value} for group in groups]), []
    with progress(len(prompts), "picture", quiet=vlm.place.remote) as bar:
        for group, run in zip(groups, runs, strict=True):
            said: Any = run.metric
            found.append(numbers(said))
            bar.update(len(group))
    return np.concatenate(found)


def without(sites: Sequence[Site], source: object, tokens: np.ndarray) -> list[Edit]:
    """The edits that replace some tokens' features by another run's.

    Args:
        source: a run, or a mapping, that holds the other features of each site.

    Example:
        >>> sites = input_sites(vlm, "image_features")
        >>> without(sites, vlm.run(null, read=sites), np.array([0, 3]))[0].label
        'take away 2 image tokens'
    """
    index = torch.tensor(tokens.tolist(), dtype=torch.long)

    def edit(site: Site) -> Edit:
        given = source[site].flatten(0, 1)  # type: ignore[index]

        def replaced(features: Tensor) -> Tensor:  # image pos d_model
            flat = features.flatten(0, 1)
            here = index.to(flat.device)
            return flat.index_copy(0, here, given.to(flat)[here]).reshape(features.shape)

        return Edit(site, replaced, "prompt", label=f"take away {len(tokens)} image tokens")

    return [edit(site) for site in sites] if len(tokens) else []


def nothing_to_see(prompt: Prompt, null: Any) -> Prompt:
    """The prompt whose features, or pixels, take the places.

    Args:
        null: a prompt, or what `prompt.with_image` takes; None means a black picture.

    Raises:
        ValueError: for other words, or another number of image tokens.

    Example:
        >>> nothing_to_see(real, None).pictures[0].getpixel((0, 0))
        (0, 0, 0)
    """
    other = null if isinstance(null, Prompt) else prompt.with_image(images.black if null is None else null)
    mine, theirs = (one.encoding["input_ids"].tolist() for one in (prompt, other))
    if mine != theirs or prompt.features != other.features:
        raise ValueError(
            f"null asks {other.words!r}, with {len(other.image)} image tokens, and the prompt {prompt.words!r}, with "
            f"{len(prompt.image)}; only the picture may differ, so make it with prompt.with_image."
        )
    return other


def removable(prompt: Prompt, at: str) -> Tokens:
    """The image tokens that can be taken away: all of them at the features, those that have pixels at the pixels.

    Raises:
        ValueError: for another place, a prompt without an image, or, at the pixels, one without its picture.

    Example:
        >>> len(removable(real, "pixels"))
        36
    """
    if at not in ENTRIES:
        raise ValueError(f"at={told(at)} is not where a picture enters; choose from {', '.join(map(repr, ENTRIES))}.")
    if not prompt.image:
        raise ValueError("the prompt holds no image to take away; make it with vlm.prompt(image, text).")
    if at == "pixels":
        held = [layer[layer >= 0] for layers in squares(prompt) for layer in layers]
        return np.unique(np.concatenate(held))
    return np.arange(len(token_places(prompt, at)))


def token_places(prompt: Prompt, at: str) -> list[int]:
    """What each image token is known by: its position, key or patch, in the order of `token_coordinates`.

    Example:
        >>> token_places(real, "pixels")[:3]
        [3, 4, 5]
    """
    held: Any = token_coordinates(prompt, at)[token_dim(prompt, at)]
    return np.ravel(held[-1] if isinstance(held, tuple) else held).tolist()


def squares(prompt: Prompt) -> list[list[Int[np.ndarray, "height width"]]]:
    """For each picture, which image token each of its pixels belongs to; -1 where none looks.

    A pixel belongs to the token whose square holds its centre. Where squares overlap (parts of a picture and its
    overview) there are several layers, and a pixel belongs to a token of each.

    Raises:
        ValueError: for a prompt without its picture.

    Example:
        >>> squares(real)[0][0][0, [0, 12]]
        array([0, 1])
    """
    if not prompt.pictures:
        raise ValueError(
            "at='pixels' takes squares out of the picture itself, and this prompt was made from a ready encoding; make "
            "it with vlm.prompt(image, text), or take at='image_features'."
        )
    numbered = {place: number for number, place in enumerate(token_places(prompt, "pixels"))}
    return [_layers(image, numbered) for image in prompt.images]


def _layers(image: ImageMap, numbered: dict[int, int]) -> list[np.ndarray]:
    """The same of one picture, in as few layers as its tiles overlap."""
    layers: list[np.ndarray] = []
    held = sorted((*image.positions, *image.separators))  # of which a class token is no token of a Q-Former's pictures
    values = np.array([numbered.get(place, -1) for place in held], dtype=float)
    for tile in range(len(image.tiles)):
        painted = np.nan_to_num(image.heat(values, tile), nan=-1).astype(int)
        free = next((layer for layer in layers if not ((layer >= 0) & (painted >= 0)).any()), None)
        if free is None:
            layers.append(painted)
        else:
            np.maximum(free, painted, out=free)
    return layers


def exchanger(prompt: Prompt, other: Prompt) -> Callable[[frozenset[int]], list[Image.Image]]:
    """A function from image tokens to the prompt's pictures with the squares of those taken from another prompt's.

    Raises:
        ValueError: for a prompt without its picture.

    Example:
        >>> exchanger(real, null)(frozenset({0}))[0].getpixel((0, 0))
        (0, 0, 0)
    """
    owned = squares(prompt)
    if not other.pictures:
        raise ValueError(
            "at='pixels' puts squares of the null picture into the picture, and null was made from a ready encoding; "
            "make it with prompt.with_image, or take at='image_features'."
        )
    every = set(removable(prompt, "pixels").tolist())
    pairs = [[np.asarray(one.pictures[at]) for one in (prompt, other)] for at in range(len(owned))]

    def exchanged(tokens: frozenset[int]) -> list[Image.Image]:
        if every <= tokens:
            return list(other.pictures)
        table = np.zeros(max(every) + 2, dtype=bool)  # the last stands for -1, no token
        table[sorted(tokens & every)] = True
        found = []
        for layers, (mine, its) in zip(owned, pairs, strict=True):
            gone = np.logical_or.reduce([table[layer] for layer in layers])
            found.append(Image.fromarray(np.where(gone[..., None], its, mine)))
        return found

    return exchanged
