"""The points at which saliency takes gradients: on the line from a baseline to an input, or around the input.

Rule this module guards: a point is made where and when the model runs, so that however many there are, no more than a
batch of them is held.

>>> points_of(2, "midpoint")
([0.25, 0.75], [0.5, 0.5])
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm import images
from mechvlm.edits import Edit, name_of
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, told, whole

METHODS = ("gauss-legendre", "midpoint")
RULES = ("midpoint", "left", "right", "gauss-legendre")


def points_of(steps: Any, method: Any) -> tuple[list[float], list[float]]:
    """Where on the way from 0 to 1 gradients are taken, and how each of them weighs.

    Raises:
        ValueError: for fewer steps than one, or another method.
        TypeError: for a number of steps that is not whole.
    """
    count = whole("steps", steps)
    if count < 1:
        raise ValueError(f"steps={count} takes no gradient; give 1 or more.")
    if method not in METHODS:
        raise ValueError(f"method={told(method)} is not known; choose from {', '.join(map(repr, METHODS))}.")
    if method == "midpoint":
        return [(step + 0.5) / count for step in range(count)], [1 / count] * count
    at, weights = np.polynomial.legendre.leggauss(count)
    return ((at + 1) / 2).tolist(), (weights / 2).tolist()


def path_points(steps: Any, rule: Any) -> tuple[list[float], list[float]]:
    """Points on the way from a target (0) to a source (1), and how each of them weighs.

    Args:
        rule: "midpoint" takes the middles of so many equal stretches, "right" their ends nearer to the source, "left"
            those nearer to the target; "gauss-legendre" has points and weights of its own.

    Raises:
        ValueError: for another rule, or fewer steps than one.
        TypeError: for a number of steps that is not whole.

    Example:
        >>> [path_points(2, rule)[0] for rule in ("midpoint", "left", "right")]
        [[0.25, 0.75], [0.0, 0.5], [0.5, 1.0]]
    """
    if rule not in RULES:
        raise ValueError(f"rule={told(rule)} is not known; choose from {', '.join(map(repr, RULES))}.")
    if rule in METHODS:
        return points_of(steps, rule)
    middles, weights = points_of(steps, "midpoint")
    return [middle + (0.5 if rule == "right" else -0.5) / len(middles) for middle in middles], weights


def baseline_of(prompt: Prompt, at: str, baseline: Any) -> tuple[str, Prompt | None]:
    """What the line begins at, in words, and as a prompt; None for zeros.

    Raises:
        ValueError: for a prompt with other words or positions, or where no picture can be exchanged.

    Example:
        >>> baseline_of(real, "pixels", mv.images.white)[0]
        'white'
    """
    if isinstance(baseline, str) and baseline == "zeros":
        if at == "pixels":
            raise ValueError("baseline='zeros' is of image features; at pixels give a picture, such as mv.images.grey.")
        return baseline, None
    if isinstance(baseline, Prompt):
        other, said = baseline, "another prompt"
    else:
        other = prompt.with_image(images.black if baseline is None else baseline)
        said = "black" if baseline is None else name_of(baseline) if callable(baseline) else "another picture"
    for name, own in prompt.encoding.items():
        found = other.encoding.get(name)
        if found is None or found.shape != own.shape or not (name == "pixel_values" or torch.equal(found, own)):
            raise ValueError(
                f"the baseline's {name} are not the prompt's, and only the pixels may differ; make it with "
                "prompt.with_image."
            )
    return said, other


def between(base: Tensor, way: Tensor, share: float) -> Tensor:
    """The point so far on a way, from 0 to 1.

    Example:
        >>> between(torch.tensor(1.0), torch.tensor(4.0), 0.25).item()
        2.0
    """
    return base + share * way


def noisy(x: Tensor, spread: float, seed: int) -> Tensor:
    """A tensor with normal noise, whose standard deviation is a fraction of the range of its values.

    Example:
        >>> noisy(torch.ones(2, 2), 0.5, seed=0).tolist()  # a range of zero has no noise
        [[1.0, 1.0], [1.0, 1.0]]
    """
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + spread * (x.max() - x.min()) * drawn.to(x.device)


def edits_to(points: Mapping[Site, Callable[[], Tensor]]) -> list[Edit]:
    """What puts other values in the place of a picture's.

    Example:
        >>> len(edits_to({mv.Site("image_features"): lambda: torch.zeros(1)}))
        1
    """
    return [Edit(site, partial(_put, make), "prompt", label="move the input") for site, make in points.items()]


def _put(make: Callable[[], Tensor], x: Tensor) -> Tensor:
    return make().to(x)
