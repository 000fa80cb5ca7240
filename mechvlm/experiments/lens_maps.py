"""Where in the picture does the model hold a word, and is that where the thing is?

Rule this module guards: a map is compared with a mask pixel by pixel of the original picture, through what the
processor really did to it; pixels that no image token looks at take part in no score, and how many there are is said.

>>> held = object_map(vlm, real, "red")
>>> held.sizes["position"] == len(real.image), held.peak_layer.dims
(True, ('position',))
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechvlm.experiments.lens import logit_lens
from mechvlm.experiments.record import one_prompt, word_list
from mechvlm.experiments.sight import image_coordinates
from mechvlm.imagemap import ImageMap
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, told, whole, whole_numbers
from mechvlm.vlm import VLM

COUNTED_BY = {"tokens": "position", "keys": "key", "patches": "patch"}
"""The dim of values over an image, by what its squares are of."""
NO_PLACE = {
    "keys": "this picture is seen by cross-attention, whose keys are its squares, and no position of the text stands "
    "for one; give values by key, such as mv.attention_map in a layer of cross-attention returns.",
    "patches": "this picture is seen through a Q-Former, whose queries stand for no place in it; mv.queries_to_patches "
    "says where they look, and mv.compose_queries carries values on them over to the patches.",
}
"""Why values by position have no place in a picture, and what has."""
SCORES = {
    "iou": "intersection over union",
    "mean_iou": "intersection over union, mean of object and rest",
    "accuracy": "share of pixels told right",
    "best_iou": "intersection over union at the best threshold",
    "best_threshold": "threshold with the best intersection over union",
    "average_precision": "average precision",
    "auroc": "area under the ROC curve",
    "pointing": "pointing game",
}


def object_map(
    source: VLM | xr.Dataset, prompt: Prompt, word: str | int, layer: int | Sequence[int] | None = None
) -> xr.DataArray:
    """How likely a word is at each image token, were its residual stream decoded: where the model holds the word.

    Args:
        source: a model, which is then read by the logit lens with its defaults; or what `logit_lens` returned with this
            word, for translators or another kind of site.
        word: a word, counted in all its single-token spellings, or a token id.
        layer: after which layer, or layers; None takes each token's highest probability over the layers.

    Returns:
        Probabilities over axis position, image tokens only (for several layers over layer and position), with the
        coordinates image, tile, row and column, -1 for tokens that stand for no place. Without a layer `peak_layer`
        says in which each token has its highest, and `attrs` hold `internal_confidence`, the highest of all.

    Raises:
        ValueError: for a prompt without an image, one of whose image no position stands for a place, or a lens without
            this word, layer or the image's positions.
        TypeError: for a source that is neither.

    Example:
        >>> held = mv.object_map(vlm, real, "7", layer=5)
        >>> mv.plot.over_image(held, real.images[0], real.pictures[0])

    Source:
        Jiang et al. (2025), "Interpreting and Editing Vision-Language Representations to Mitigate Hallucinations",
        internal confidence and zero-shot segmentation; here a word is all its single-token spellings, added up.
    """
    _placed(prompt)
    name = str(word_list([word])[0])
    several = listed(layer) is not None
    wanted = None if layer is None else list(whole_numbers("layer", layer if several else [layer]))
    if isinstance(source, VLM):
        source = logit_lens(source, prompt, positions=prompt.image, layers=wanted, top=1, words=[word])
    shown = _word_of(source, "word_probability", name)
    layers, positions = shown.layer.values.tolist(), shown.position.values.tolist()
    missing = [one for one in wanted or () if one not in layers]
    if missing:
        raise ValueError(f"layer {missing[0]} is not in the lens; its layers are {', '.join(map(str, layers))}.")
    if not set(prompt.image) <= set(positions):
        raise ValueError("the lens has not all image tokens; make it with logit_lens(..., positions=prompt.image).")
    found = shown.sel(word=name, position=prompt.image).drop_vars(["input_token", "word"])
    found = found.assign_coords(image_coordinates(prompt)).rename("probability")
    about = {**source.attrs, "long_name": f"probability of {name}", "word": name}
    if wanted is not None:
        chosen = found.sel(layer=wanted)
        return (chosen if several else chosen.isel(layer=0)).assign_attrs(about)
    peak = xr.Variable("position", found.layer.values[found.argmax("layer").values])
    highest = found.max("layer").assign_coords(peak_layer=peak)
    return highest.assign_attrs({**about, "over_layers": "the highest", "internal_confidence": float(highest.max())})


def segmentation_scores(
    values: xr.DataArray, prompt: Prompt, mask: Any, image: int = 0, threshold: float | None = None
) -> xr.Dataset:
    """How well a map over image tokens finds a thing whose pixels are known.

    Each pixel of the original picture has the value of the token that sees it at the highest resolution. Pixels that
    none sees, because the processor cropped them away, take part in no score.

    Args:
        values: dim `position` (or `key`, `patch`, as the image's squares are counted), and any others, such as layer,
            each of whose values is scored: what `object_map`, `attention_map` or an attribution returns.
        mask: booleans, height by width of the original picture: where the thing is.
        image: which of the prompt's images.
        threshold: a pixel is told to be the thing's where its value is above; None takes the mean over pixels.

    Returns:
        Over the map's other dims: `iou`, intersection over union of what is above the threshold with the mask;
        `mean_iou`, the mean of that and of the rest's; `accuracy`, the share of pixels told right; `best_iou` and
        `best_threshold`, the highest that any threshold reaches (it knows the mask: an upper bound);
        `average_precision` and `auroc`, without a threshold, equal values together; `pointing`, the share of the pixels
        with the highest value that lie on the thing. And of the mask alone: `object_share`, its share of the pixels
        that are scored, which is a blind map's average precision, and `object_seen`, how much of the thing any token
        sees.

    Raises:
        ValueError: for a mask of another size, or with nothing or everything in it; values that do not cover the image,
            or have no place in it.
        TypeError: for values that are no DataArray, or a mask that is not of booleans.

    Example:
        >>> mask = np.zeros((72, 72), bool)
        >>> mask[:24, :24] = True
        >>> float(mv.segmentation_scores(mv.object_map(vlm, real, "7"), real, mask).object_share.round(2))
        0.11

    Source:
        IoU, accuracy and average precision by pixels: Jiang et al. (2025), "Interpreting and Editing Vision-Language
        Representations to Mitigate Hallucinations", zero-shot segmentation, after Chefer et al. (2021), "Transformer
        Interpretability Beyond Attention Visualization", section 4; pointing game: Zhang et al. (2016), "Top-down
        Neural Attention by Excitation Backprop", section 4, without its tolerance of 15 pixels.
    """
    image_map = _image_of(prompt, image)
    here = np.asarray(mask)
    if here.dtype != bool:
        raise TypeError(f"the mask holds {here.dtype}, and it must hold booleans, such as labels == 3.")
    if here.shape != image_map.size[::-1]:
        raise ValueError(
            f"the mask has the shape {here.shape}, and the picture is {image_map.size[1]} high and "
            f"{image_map.size[0]} wide; give the mask of the original picture."
        )
    dim, along = _along(values, image_map)
    others = [str(one) for one in values.dims if one != dim]
    stacked = along.transpose(*others, dim).values.reshape(-1, len(image_map.positions)).astype(float)
    rows = [_scored(image_map.heat(one), here, threshold) for one in stacked]
    shape = [values.sizes[one] for one in others]
    found: dict[str, Any] = {
        name: (others, np.array([row[name] for row in rows]).reshape(shape), {"long_name": long})
        for name, long in SCORES.items()
    }
    found["object_share"], found["object_seen"] = rows[0]["object_share"], rows[0]["object_seen"]
    kept = {name: values.coords[name] for name in others if name in values.coords}
    used = "the mean of the map over pixels" if threshold is None else float(threshold)
    return xr.Dataset(found, coords=kept, attrs={**values.attrs, "threshold": used, "image": int(image)})


def word_share(lens: xr.Dataset, positions: Sequence[int], word: str | int, top: int = 5) -> xr.Dataset:
    """At how many of some image tokens the lens reads a word among its likeliest, layer by layer.

    Args:
        lens: what `logit_lens` returned with this word, over the positions of the picture.
        positions: the thing's image tokens, for instance `mv.tokens_in(prompt, mask=mask)`.
        top: up to which rank the word counts as read.

    Returns:
        Over axis layer, shares from 0 to 1: `share`, of those positions, and `elsewhere`, of the lens's other
        positions, not a number where it has none. `peak_layer`: the first layer with the highest share.

    Raises:
        ValueError: for a lens without this word or these positions, or no positions, or a rank below 1.

    Example:
        >>> lens = mv.logit_lens(vlm, real, positions=real.image, words=["7"])
        >>> mv.word_share(lens, real.image[:16], "7").share.dims
        ('layer',)

    Source:
        Neo et al. (2024), "Towards Interpreting Visual Information Processing in Vision-Language Models", section 5.
    """
    name = str(word_list([word])[0])
    ranks = _word_of(lens, "word_rank", name).sel(word=name)
    wanted = list(whole_numbers("positions", positions))
    held = ranks.position.values.tolist()
    missing = [position for position in wanted if position not in held]
    if missing or not wanted:
        given = f"position {missing[0]}" if missing else "an empty list"
        raise ValueError(f"positions holds {given}; give some of the lens's, which are {len(held)}.")
    if whole("top", top) < 1:
        raise ValueError(f"top={top} is no rank; give 1 or more, where 1 is the likeliest token.")
    read = (ranks <= top).transpose("layer", "position")
    rest = read.sel(position=[position for position in held if position not in wanted])
    share = read.sel(position=wanted).mean("position")
    elsewhere = rest.mean("position") if rest.sizes["position"] else share * np.nan
    about = {"long_name": f"share with {name} in the top {top}"}
    return xr.Dataset(
        {
            "share": (["layer"], share.values, about),
            "elsewhere": (["layer"], elsewhere.values, about),
            "peak_layer": int(share.layer.values[share.values.argmax()]),
        },
        coords={"layer": ranks.layer.values},
        attrs={**lens.attrs, "word": name, "top": int(top), "tokens": len(wanted)},
    )


def _placed(prompt: Prompt) -> None:
    """Refuse a prompt without an image, or of one of whose images no position stands for a place."""
    if not one_prompt(prompt).image:
        raise ValueError("the prompt holds no image to look at; make it with vlm.prompt(image, text).")
    for image_map in prompt.images:
        if image_map.of != "tokens":
            raise ValueError(f"a word read at positions has no place in the picture: {NO_PLACE[image_map.of]}")


def _image_of(prompt: Prompt, image: int) -> ImageMap:
    """One of the prompt's images."""
    if not 0 <= whole("image", image) < len(one_prompt(prompt).images):
        raise ValueError(f"there is no image {image}; the prompt has {len(prompt.images)}, counted from 0.")
    return prompt.images[image]


def _word_of(lens: Any, variable: str, word: str) -> xr.DataArray:
    """A variable of a lens that holds a word."""
    if not isinstance(lens, xr.Dataset):
        raise TypeError(f"{told(lens)} is no lens; give what logit_lens returned.")
    words = lens.word.values.tolist() if variable in lens.data_vars else []
    if word not in words:
        raise ValueError(
            f"the lens does not hold {word!r}, but {', '.join(map(repr, words)) or 'no words'}; make it with "
            f"logit_lens(..., words=[{word!r}])."
        )
    return lens[variable]


def _along(values: Any, image_map: ImageMap) -> tuple[str, xr.DataArray]:
    """The dim that counts the image's squares, and the values at them in their order."""
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"{told(values)} is no DataArray; give what object_map or attention_map returns.")
    dim = COUNTED_BY[image_map.of]
    if dim not in values.dims:
        if "position" in values.dims:
            raise ValueError(f"values by position have no place in the picture: {NO_PLACE[image_map.of]}")
        raise ValueError(f"the map has no axis {dim}, but {', '.join(map(str, values.dims)) or 'none'}.")
    at = values[dim].values.tolist() if dim in values.coords else []
    missing = set(image_map.positions) - set(at)
    if missing:
        raise ValueError(
            f"the map has no value for {len(missing)} of the image's {len(image_map.positions)} {image_map.of}, nor "
            f"for {dim} {min(missing)}; give one for each, with coordinate {dim}."
        )
    return dim, values.sel({dim: list(image_map.positions)})


def _scored(heat: np.ndarray, mask: np.ndarray, threshold: float | None) -> dict[str, float]:
    """The scores of one map, painted on the picture."""
    seen = ~np.isnan(heat)
    value, thing = heat[seen], mask[seen]
    count = int(thing.sum())
    if not 0 < count < len(thing):
        raise ValueError(
            f"of the {len(thing)} pixels that image tokens look at {count} are in the mask; give one with some of them "
            "in it and some outside."
        )
    told_so = value > (value.mean() if threshold is None else threshold)
    found, rest = _iou(told_so, thing), _iou(~told_so, ~thing)
    levels, inverse = np.unique(-value, return_inverse=True)  # equal values are told together
    hits = np.cumsum(np.bincount(inverse, thing, minlength=len(levels)))
    told_as = np.cumsum(np.bincount(inverse, minlength=len(levels)))
    recall, false = hits / count, (told_as - hits) / (len(thing) - count)
    ious = hits / (told_as + count - hits)
    # Above the next lower value are all down to this one; below the lowest stands no other.
    below = np.append(-levels[1:], -np.inf)
    return {
        "iou": found,
        "mean_iou": (found + rest) / 2,
        "accuracy": float((told_so == thing).mean()),
        "best_iou": float(ious.max()),
        "best_threshold": float(below[ious.argmax()]),
        "average_precision": float((np.diff(recall, prepend=0) * hits / told_as).sum()),
        "auroc": float(np.trapezoid(np.append(0, recall), np.append(0, false))),
        "pointing": float(thing[value == value.max()].mean()),
        "object_share": count / len(thing),
        "object_seen": count / int(mask.sum()),
    }


def _iou(told_so: np.ndarray, thing: np.ndarray) -> float:
    """Intersection over union; 0 where both are empty is not possible, since a thing is never."""
    return float((told_so & thing).sum() / (told_so | thing).sum())
