"""What a builder of a tiny model provides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Variant:
    """One architecture, or one way of building it.

    Attributes:
        model: from attention implementation, type and seed to a random model in evaluation mode.
        processor: makes the family's real processor.
        encoding: from pictures and words to a ready encoding, where the processor needs torchvision.
        needs_torchvision: whether `processor` does.
    """

    model: Callable[..., Any]
    processor: Callable[[], Any]
    encoding: Callable[..., dict[str, torch.Tensor]] | None = None
    needs_torchvision: bool = False
