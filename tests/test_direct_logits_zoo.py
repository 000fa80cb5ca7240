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


EACH_KIND = [name for name in zoo.EACH_KIND if not zoo.there(name)]
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


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama", "blip2-opt"])
def test_in_single_precision_they_sum_as_rounding_allows(name: str) -> None:
    vlm, prompt = asked(name, torch.float32)
    found = mv.direct_logit_attribution(vlm, prompt, ANSWER)
    assert float(np.abs(found.remainder)) < 1e-5 * float(np.abs(found.contribution).sum())


def test_what_deepstack_adds_to_an_image_token_that_answers_is_a_part() -> None:
    vlm, prompt = asked("qwen3_vl", torch.float64)
    until = prompt.image[-1] + 1
    kept = ("input_ids", "attention_mask", "mm_token_type_ids")
    cut = {name: x[:, :until] if name in kept else x for name, x in prompt.encoding.items()}
    found = mv.direct_logit_attribution(vlm, vlm.prompt(encoding=cut), ANSWER)
    assert found.contribution.component.values[0] == "image"
    added = found.contribution.where(found.contribution.kind == "deepstack", drop=True)
    assert added.sizes["component"] == vlm.shape.deepstack and float(np.abs(added).min()) > 1e-6
    assert abs(float(found.remainder)) < 1e-9 * float(np.abs(found.contribution).sum())


@pytest.mark.parametrize("name", EACH_KIND)
def test_what_a_head_writes_of_a_position_times_its_attention_is_its_part(name: str) -> None:
    vlm, prompt = asked(name, torch.float64)
    layer = [at for at, kinds in enumerate(vlm.shape.kinds["text"]) if "pattern" in kinds][-1]
    where = [1, *prompt.image[-2:]]
    found = mv.ov_writes(vlm, layer, None, prompt, where, top=2, words=[ANSWER, OTHER])
    spans = {"one": where[:1], "two": where[1:]}
    parts = mv.direct_logit_attribution(vlm, prompt, mv.logit_difference(ANSWER, OTHER), spans, by="span")
    site = mv.Site("pattern", layer)
    paid = vlm.run(prompt, read={site: mv.rows([-1], keys=where)})[site][0, :, 0].numpy()
    own = paid * (found.word_logit[..., 0] - found.word_logit[..., 1]).values
    size = float(np.abs(parts.contribution).sum())
    assert np.abs(own[:, :1].sum(-1) - parts.by_span.sel(layer=layer, span="one")).max() < 1e-9 * size
    assert np.abs(own[:, 1:].sum(-1) - parts.by_span.sel(layer=layer, span="two")).max() < 1e-9 * size


@pytest.mark.parametrize("name", EACH_KIND)
def test_every_kind_of_model_has_labels_and_circuits(name: str) -> None:
    vlm, prompt = asked(name, torch.float32)
    found = mv.label_heads(vlm, prompt, repeat=5, sink_threshold=3.0)
    text = [at for at, kinds in enumerate(vlm.shape.kinds["text"]) if "pattern" in kinds]
    assert np.isfinite(found.score.sel(kind="previous", layer=text)).all()
    assert np.isfinite(found.score.sel(kind="induction", layer=text)).all()
    assert float(found.score.max()) <= 1 + 1e-5 and float(found.score.min()) >= 0
    scores = mv.composition_scores(vlm, layers=text[-2:]).isel(writer_layer=0, reader_layer=1)
    for way in ("q", "k", "v"):
        assert float(scores[way].min()) > 0 and float(scores[way].max()) <= 1
