"""Models inside nnsight: with weights, to run here, or as modules without them, for a server that has them.

>>> in_nnsight(vlm.hf).lm_head  # doctest: +SKIP
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from nnsight import NNsight

from mechvlm.devices import hooks_of

OUTPUT = ".*has a submodule named 'output'"
"""What nnsight says of Q-Formers; mechvlm never asks for their submodules of that name."""


class Traced(NNsight):
    """The nnsight model inside; what it is called with is placed by accelerate's hooks where there are any."""

    @property
    def device(self) -> torch.device | None:
        """Where nnsight is to send what it is called with; None for nowhere.

        By itself it takes the place of the first weights, which may be kept elsewhere, and hold no numbers here.
        """
        first = next(self._module.parameters()).device
        return None if first.type == "meta" or any(hooks_of(self._module)) else first


def in_nnsight(hf_model: torch.nn.Module) -> Any:
    """A model inside nnsight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OUTPUT)
        return Traced(hf_model)


def without_weights(path: str, processor: Any, **settings: Any) -> Any:
    """The modules of a model that a server has, named as the server knows it.

    Args:
        path: its name on the hub, or a folder, which a server of one's own has to have at the same path.
    """
    from nnsight.modeling.huggingface import _ID_CACHE
    from nnsight.modeling.transformers import TransformersModel

    if Path(path).is_dir():
        _ID_CACHE[path] = path  # else nnsight asks the hub what the model is called there
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OUTPUT)
        model = TransformersModel(path, task="image-text-to-text", processor=processor, **settings)
    for name in ("token", "cache_dir"):  # nnsight sends what the model was made with
        model.kwargs.pop(name, None)
    model._module.eval()
    return model
