"""How far attention and the answer are from what they are with another picture: the parts of `grey_divergence`.

Rule this module guards: two runs are compared where the model runs, and neither's attention is made or brought away.

>>> shares(np.array([[0.0, 1.0]]), 1.0).round(2)
array([[0.54, 1.46]])
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechvlm.experiments.sweep import numbers
from mechvlm.lazy_attention import Attention
from mechvlm.metrics import kl_divergence
from mechvlm.prompt import Prompt
from mechvlm.readings import lazy
from mechvlm.sites import Site
from mechvlm.vlm import VLM

FLOOR, AT_ONCE = 1e-10, 256
"""The smallest weight in a logarithm; queries whose rows are held at once."""


def from_null(vlm: VLM, prompt: Prompt, null: Prompt, layers: Sequence[int]) -> tuple[np.ndarray, float]:
    """How far attention, by layer and head, and the answer are from another prompt's.

    What is compared stays where the model runs.

    Example:
        >>> apart, answer = from_null(vlm, real, null, [0, 1])
        >>> apart.shape, answer > 0
        ((2, 8), True)
    """
    sites, held = [("pattern", layer, "text") for layer in layers], dict[str, Any]()

    def said(logits: Tensor) -> Tensor:
        held["logits"] = logits
        return logits.new_zeros(len(logits))

    def seen(read: dict, _gradients: dict) -> None:
        held["maps"] = read

    def changed(logits: Tensor) -> Tensor:
        return kl_divergence(held["logits"])(logits)

    def moved(read: dict, _gradients: dict) -> Tensor:
        return torch.from_numpy(np.stack([_apart(held["maps"][site], read[site]) for site in sites]))

    reads = dict.fromkeys((Site(*site) for site in sites), lazy())
    first = {"prompt": prompt, "read": reads, "value": said, "reduce": seen}
    _, run = vlm.runs([first, {"prompt": null, "read": reads, "value": changed, "reduce": moved}])
    answer: Any = run.metric
    return numbers(run.reduced), float(answer[0])


def _apart(real: Attention, null: Attention) -> np.ndarray:
    """KL(real || null) of each head's rows, the mean over rows; some rows at a time."""
    count, total = real.q.shape[2], np.zeros(real.q.shape[1])
    for start in range(0, count, AT_ONCE):
        queries = range(start, min(start + AT_ONCE, count))
        with_it, without = (one.rows(queries)[0].double() for one in (real, null))
        logs = with_it.clamp_min(FLOOR).log() - without.clamp_min(FLOOR).log()
        total += numbers((with_it * logs).sum((-1, -2)))
    return total / count


def shares(apart: np.ndarray, temperature: float) -> np.ndarray:
    """Published importance: from 0 to 1 within a layer, then the softmax over heads times their number.

    Args:
        apart: of each layer and head how far its attention is from what it is without the picture.

    Example:
        >>> shares(np.array([[0.2, 0.2]]), 1.0)
        array([[1., 1.]])
    """
    low, high = apart.min(1, keepdims=True), apart.max(1, keepdims=True)
    scaled = np.where(high > low, (apart - low) / np.where(high > low, high - low, 1.0), 1.0)
    raised = np.exp((scaled - scaled.max(1, keepdims=True)) / temperature)
    return raised / raised.mean(1, keepdims=True)
