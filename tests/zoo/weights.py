"""Random weights that make every part of a tiny model matter to its answer."""

from typing import Any

import torch
from transformers import PreTrainedModel


def spread(
    made: Any,
    config: Any,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    matrices: float = 0.2,
    vectors: float = 0.1,
) -> PreTrainedModel:
    """A random model in evaluation mode, whose weights are wider than transformers' own.

    Matrices are drawn anew, wider than transformers' 0.02 and also where it starts from zero (such a model would ignore
    its picture). Vectors keep what they start from, one for a norm and zero for a bias, and a little noise is added.

    Args:
        made: the class of the model.
        matrices, vectors: the standard deviations.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # vectors such as a class token start from torch's own random numbers
        model = made._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * matrices if weight.ndim > 1 else weight + noise * vectors)
    return model.eval().requires_grad_(False).to(dtype)
