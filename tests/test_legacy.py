"""VIAR's first form: its formulas once more on the eager model's attention, by hand and in torch."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from jaxtyping import config
from zoo import ask, build

import mechvlm as mv
from mechvlm.methods.contrast import contrast_logits
from mechvlm.methods.legacy import entropy_layers, entropy_ratios, grey_divergence, legacy_edits, legacy_factors

PUBLISHED = Path(__file__).parent / "data" / "viar" / "attention.json"
IMAGE = slice(0, tiny.TOKENS)
"""The columns that the published code calls the image."""


@cache
def vlm() -> mv.VLM:
    return tiny.vlm(attention="eager", dtype=torch.float64, layers=4)


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


@cache
def attentions(grey: bool = False) -> list[torch.Tensor]:
    """The eager model's own attention, head by query by key, for each layer."""
    prompt = real().with_image(mv.images.grey) if grey else real()
    with torch.no_grad():
        said = vlm().hf(
            **{name: x.double() if x.is_floating_point() else x for name, x in prompt.encoding.items()},
            output_attentions=True,
        )
    return [one[0] for one in said.attentions]


def entropy(rows: torch.Tensor) -> torch.Tensor:
    """As published: rows made to sum to one, with 1e-10 against zeros."""
    p = rows / (rows.sum(-1, keepdim=True) + 1e-10)
    return -(p * (p + 1e-10).log()).sum(-1).mean()


# -- which layers ----------------------------------------------------------------------------------------------------


def test_the_published_ratio_is_that_of_all_rows_and_the_first_columns() -> None:
    expected = [(entropy(one[..., IMAGE]) / entropy(one[..., tiny.TOKENS :])).item() for one in attentions()]
    assert np.allclose(entropy_ratios(vlm(), real(), "viar-2026"), expected, rtol=1e-6)


def test_the_ratio_is_that_of_the_rows_behind_the_picture() -> None:
    image, behind = real().image, real().question + real().last
    rest = [at for at in range(len(real())) if at not in image]
    expected = [
        (entropy(one[:, behind][..., image]) / entropy(one[:, behind][..., rest])).item() for one in attentions()
    ]
    assert np.allclose(entropy_ratios(vlm(), real()), expected, rtol=1e-6)


@cache
def even() -> tuple[mv.VLM, mv.Prompt]:
    """A model that looks at everything alike, since its queries are zero."""
    model = tiny.vlm()
    for layer in model.hf.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return model, model.prompt(tiny.picture(), "is there a dog ?")


@pytest.mark.parametrize("convention", [None, "viar-2026"])
def test_even_attention_has_the_ratio_that_is_told_of_it(convention: str | None) -> None:
    found = entropy_layers(mv.layer_profile(*even(), convention=convention))
    assert np.allclose(found.relative, 1, atol=1e-5) and float(found.even[0]) > 1


def test_rows_that_see_no_words_make_the_published_ratio_large() -> None:
    words, logs = len(even()[1]) - tiny.TOKENS, np.log(np.arange(1, tiny.TOKENS + 1))
    expected = (logs.sum() + words * logs[-1]) / logs[:words].sum()
    assert entropy_ratios(*even(), "viar-2026") == pytest.approx([expected] * 3, rel=1e-5) and expected > 3


def test_layers_are_chosen_by_the_mean_and_counted_by_prompt() -> None:
    ratios = [[1.0, 1.5, 3.0], [1.0, 1.4, 3.0], [1.0, 1.8, 3.0], [9.0, 1.3, np.nan]]
    profile = xr.Dataset(
        {
            "h_ratio": (("prompt", "layer"), ratios),
            "cluster": ("prompt", list("aabc")),
            "positions": ("prompt", [10] * 4),
            "n_keys": (("prompt", "span"), [[5, 5]] * 4),
        },
        {"layer": range(3), "span": ["image", "text"]},
        {"convention": "viar-2026"},
    )
    found = entropy_layers(profile)
    assert found.above.values.astype(int).tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 1], [1, 0, 0]]
    assert np.allclose(found["mean"], [3.0, 1.5, 3.0]) and found.share.values.tolist() == [0.25, 0.5, 1.0]
    assert found.chosen.values.tolist() == [True, True, True] and found.sure.values.tolist() == [False, False, True]
    assert np.allclose(found.even, math.log(5) / np.mean(np.log([1, 2, 3, 4, 5])))


# -- by how much -----------------------------------------------------------------------------------------------------


def test_factors_rise_with_the_ratio_and_fall_with_depth() -> None:
    ratios = [1.0] * 32
    ratios[1], ratios[2], ratios[8], ratios[16], ratios[20], ratios[23], ratios[24] = (
        9.0,
        1.5,
        2.5,
        9.0,
        1.49,
        1.75,
        9.0,
    )
    expected = {2: 1 + 1 * (1 - 1 / 32), 8: 1 + 2 * 0.875, 16: 1 + 4 * 0.75, 23: 1 + 1.25 * (1 - 23 / 64)}
    assert legacy_factors(ratios) == pytest.approx(expected)


def test_layers_without_an_entropy_get_no_factor() -> None:
    assert legacy_factors([math.nan, math.inf, 2.0], layers=[0, 1, 2]) == pytest.approx({2: 1 + 1.5 * (1 - 1 / 3)})


def test_the_published_table_leaves_every_layer_alone() -> None:
    ratios = json.loads(PUBLISHED.read_text())["summary"]["h_ratio_mean"]
    assert legacy_factors(ratios) == {} and list(legacy_factors(ratios, range(32))) == [0, 1]
    assert (min(ratios[2:24]), max(ratios[2:24])) == (0.475, 1.208)


def scaled(layer: int, keys: list[int], by: torch.Tensor) -> mv.Edit:
    """Weights times a number for each head, and made to sum to one again, as published."""

    def fn(pattern: torch.Tensor) -> torch.Tensor:
        scale = torch.ones_like(pattern)
        scale[..., keys] = by[None, :, None, None].to(pattern)
        return pattern * scale / (pattern * scale).sum(-1, keepdim=True)

    return mv.Edit(mv.Site("pattern", layer), fn)


@pytest.mark.parametrize("convention", [None, "viar-2026"])
def test_a_bias_of_the_logarithm_is_the_factor_on_weights(convention: str | None) -> None:
    factors = legacy_factors(entropy_ratios(vlm(), real(), convention), ratio=0.5)
    keys = list(range(tiny.TOKENS)) if convention else real().image
    by_hand = [scaled(layer, keys, torch.full((4,), factor, dtype=torch.float64)) for layer, factor in factors.items()]
    edits = legacy_edits(vlm(), real(), ratio=0.5, convention=convention)
    found, plain = vlm().run(real(), edits=edits).logits, vlm().run(real()).logits
    assert list(factors) == [2] and not torch.allclose(found, plain, atol=1e-3)
    assert torch.allclose(found, vlm().run(real(), edits=by_hand).logits, atol=1e-9)


def test_a_head_has_its_share_of_the_factor() -> None:
    importance = xr.DataArray([[0.0, 1.0, 1.0, 2.0]], dims=["layer", "head"], coords={"layer": [2]})
    edits = legacy_edits(vlm(), real(), ratio=0.5, importance=importance)
    factor = legacy_factors(entropy_ratios(vlm(), real()), ratio=0.5)[2]
    by_hand = scaled(2, real().image, 1 + (factor - 1) * torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64))
    assert len(edits) == 3
    assert torch.allclose(vlm().run(real(), edits=edits).logits, vlm().run(real(), edits=[by_hand]).logits, atol=1e-9)


def test_there_is_no_edit_below_the_limit() -> None:
    assert legacy_edits(vlm(), real(), ratio=100.0) == []


# -- a grey picture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_divergence_and_importance_are_the_published_ones(temperature: float) -> None:
    found = grey_divergence(vlm(), real(), temperature=temperature)
    pairs = zip(attentions(), attentions(grey=True), strict=True)
    for layer, (one, other) in enumerate(pairs):
        apart = torch.nn.functional.kl_div((other + 1e-10).log(), one, reduction="none").mean((1, 2))
        share = ((apart - apart.min()) / (apart.max() - apart.min()) / temperature).softmax(0) * 4
        assert np.allclose(found.divergence[layer] / len(real()), apart, atol=1e-8)
        assert np.allclose(found.importance[layer], share, atol=1e-5)


def test_the_answer_s_divergence_is_that_of_the_next_token() -> None:
    grey = real().with_image(mv.images.grey)
    p, q = (vlm().run(prompt).logits[0].softmax(-1) for prompt in (real(), grey))
    assert float(grey_divergence(vlm(), real()).answer) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)


def test_heads_that_see_the_same_are_alike() -> None:
    found = grey_divergence(vlm(), real(), null=lambda picture: picture)
    assert np.allclose(found.divergence, 0) and np.allclose(found.importance, 1) and abs(float(found.answer)) < 1e-12


def test_the_published_contrast_differs_by_a_constant() -> None:
    one, other = torch.randn(2, 3, 7, dtype=torch.float64)
    published = 2.5 * one.log_softmax(-1) - 1.5 * other.log_softmax(-1)
    ours = contrast_logits(one, other, alpha=1.5, beta=0.0)
    assert torch.allclose((published - ours).std(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(published.softmax(-1), ours.softmax(-1))


# -- refused ---------------------------------------------------------------------------------------------------------


def shares(*values: float, layer: int = 2) -> xr.DataArray:
    return xr.DataArray([values], dims=["layer", "head"], coords={"layer": [layer]})


def across() -> tuple[mv.VLM, mv.Prompt]:
    model = build("mllama")
    return model, ask(model, tiny.picture())


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("[1.0] is no profile; make it with mv.layer_profile(vlm, prompts).", lambda: entropy_layers([1.0])),  # type: ignore[arg-type]
    ("ratio='high' is not a number.", lambda: legacy_factors([1.0] * 4, ratio="high")),  # type: ignore[arg-type]
    (
        "ratios=2.0 is not a list of ratios; give one for each layer, by entropy_ratios.",
        lambda: legacy_factors(2.0),  # type: ignore[arg-type]
    ),
    ("layer 4 has no ratio; 4 were given, for layers from 0.", lambda: legacy_factors([2.0] * 4, layers=[4])),
    ("temperature=0 divides nothing; give a number above 0.", lambda: grey_divergence(vlm(), real(), temperature=0)),
    (
        "the prompt 'is there a dog ?' holds no image, so there is nothing to look at more.",
        lambda: grey_divergence(vlm(), vlm().prompt(None, "is there a dog ?")),
    ),
    (
        "this model sees the picture by cross-attention, in layers 1, 3, where all keys are the picture's, so a bias "
        "on them changes nothing; scale what those layers add instead, by mv.scale_heads(..., cross=True).",
        lambda: legacy_edits(*across()),
    ),
    (
        "importance is [1, 1, 1, 1], and must be an array over layer and head; take it from grey_divergence.",
        lambda: legacy_edits(vlm(), real(), ratio=0.5, importance=[1, 1, 1, 1]),  # type: ignore[arg-type]
    ),
    (
        "importance holds 4 heads of layers [1]; give the 4 heads of each layer that is edited, 2.",
        lambda: legacy_edits(vlm(), real(), ratio=0.5, importance=shares(1, 1, 1, 1, layer=1)),
    ),
    (
        "importance holds -1; each head's is a number from 0, and 1 on average.",
        lambda: legacy_edits(vlm(), real(), ratio=0.5, importance=shares(1, -1, 2, 2)),
    ),
]


@pytest.mark.parametrize(("message", "wrong"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_is_refused(message: str, wrong: Callable[[], object]) -> None:
    """Without the test run's type checks, as users meet them."""
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises((ValueError, TypeError)) as refused:
            wrong()
    finally:
        config.update("jaxtyping_disable", False)
    assert str(refused.value) == message
