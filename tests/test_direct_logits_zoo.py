"""Parts of a logit on every architecture: they sum to the model's own number, and heads to what they are made of."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv

pytestmark = zoo.second_environment
ANSWER, OTHER = 30, 31


def with_exact_norms(model: Any) -> Any:
    """The model with norms in its own precision; transformers' are in float32 whatever the model is in."""

    def forward_of(module: Any) -> Any:
        name = type(module).__name__
        settings = vars(module)
        eps = settings.get("variance_epsilon", settings.get("eps"))
        extra = 1.0 if name.startswith("Gemma") else 0.0
        centring = name.endswith("LayerNorm")

        def forward(x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True) if centring else x
            return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (extra + module.weight)

        return forward

    for module in model.modules():
        name = type(module).__name__
        if name.endswith(("RMSNorm", "Cohere2LayerNorm")) and module.weight.dtype == torch.float64:
            module.forward = forward_of(module)
    return model


def asked(name: str, dtype: torch.dtype) -> tuple[mv.VLM, mv.Prompt]:
    """A model whose norms have gains, and a question about a picture."""
    model = zoo.VARIANTS[name].model("eager" if name in zoo.EAGER_ONLY else "sdpa", dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "norm" in part and "vision" not in part:
                weight.add_((torch.rand(weight.shape, generator=generator) - 0.5).to(weight))
    if dtype == torch.float64:
        with_exact_norms(model)
    can = not zoo.VARIANTS[name].needs_torchvision or find_spec("torchvision") is not None
    vlm = mv.VLM(model, zoo.VARIANTS[name].processor() if can else None, name=name)
    return vlm, zoo.ask(vlm, tiny.picture(1, 40, 28))


NAMES = [name for name in zoo.VARIANTS if not zoo.there(name)]


@pytest.mark.parametrize("name", NAMES)
def test_parts_sum_to_the_logit_difference_and_heads_to_their_spans(name: str) -> None:
    vlm, prompt = asked(name, torch.float64)
    found = mv.direct_logit_attribution(vlm, prompt, mv.logit_difference(ANSWER, OTHER), by="token")
    size = float(np.abs(found.contribution).sum())
    logits = vlm.run(prompt).logits[0]
    assert float(found.metric) == pytest.approx(float(logits[ANSWER] - logits[OTHER]), abs=1e-12 * size)
    if vlm.shape.logit_cap is None:
        assert float(found.logit) == pytest.approx(float(found.metric), abs=1e-12 * size)
    assert float(np.abs(found.contribution.sum() - found.logit)) < 1e-9 * size
    eager = 1e-6 if name in zoo.EAGER_ONLY else 1e-9  # transformers' eager attention has its softmax in float32
    assert float(np.abs(found.by_span.sum("span") - found.heads).max()) < eager * size
    assert float(np.abs(found.heads).min()) > 0
    if not vlm.shape.crosses:
        through = found.by_span.sel(span="image") - found.by_token.sum("position")
        assert float(np.abs(through).max()) < 1e-9 * size
    else:
        across = found.by_token.sum("key") - found.heads.sel(layer=found.by_token.dropna("layer").layer)
        assert float(np.abs(across).max()) < 1e-9 * size


@pytest.mark.parametrize("name", zoo.EACH_KIND)
def test_in_single_precision_they_sum_as_rounding_allows(name: str) -> None:
    vlm, prompt = asked(name, torch.float32)
    found = mv.direct_logit_attribution(vlm, prompt, ANSWER)
    assert float(np.abs(found.remainder)) < 1e-5 * float(np.abs(found.contribution).sum())
