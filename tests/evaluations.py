"""Evaluations with planted answers, shaped as `mv.evaluate.pope` makes them."""

import numpy as np
import xarray as xr


def evaluation(margins: np.ndarray, labels: np.ndarray, images: np.ndarray, **attrs: str) -> xr.Dataset:
    """An evaluation whose items have these margins; yes is said above 0, and all questions differ."""
    count = len(margins)
    predicted = np.where(margins > 0, "yes", "no")
    values = {
        "p_yes": 1 / (1 + np.exp(-margins)),
        "margin": margins,
        "predicted": predicted,
        "correct": predicted == labels,
    }
    along = {
        "item": np.arange(count),
        "question_id": np.arange(1, count + 1),
        "image": images,
        "question": np.array([f"Is there a thing {at} in the image?" for at in range(count)]),
        "label": labels,
        "split": np.array(["random"] * count),
        "duplicate_of": np.arange(count),
    }
    coords = {name: ("item", array) for name, array in along.items()}
    return xr.Dataset({name: ("item", array) for name, array in values.items()}, coords=coords, attrs=attrs)


def baseline(images: int = 40, each: int = 6, seed: int = 0) -> xr.Dataset:
    """Six questions a picture, of which half are yes; margins that tell them apart, and that pictures share in part."""
    generator, count = np.random.default_rng(seed), images * each
    labels = np.where(np.arange(count) % 2 == 0, "yes", "no")
    noise = 1.5 * generator.normal(size=count) + np.repeat(generator.normal(size=images), each)
    pictures = np.repeat([f"picture {at}" for at in range(images)], each)
    return evaluation(np.where(labels == "yes", 1.0, -2.0) + noise, labels, pictures, model="planted", edits="none")


def changed(base: xr.Dataset, change: float | np.ndarray, edits: str = "planted") -> xr.Dataset:
    """An evaluation of the same questions with something added to the margins."""
    found = evaluation(base.margin.values + change, base.label.values, base.image.values, model="planted", edits=edits)
    return found.assign_coords(duplicate_of=base.duplicate_of)
