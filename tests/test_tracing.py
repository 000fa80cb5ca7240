"""Noise on the picture, and clean activations put back."""

from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import plain
import planted
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.tracing import noises

METRIC = mv.logit_difference(planted.YES, planted.NO)
FEATURES = mv.Site("image_features")


@cache
def pair() -> tuple[mv.VLM, Any, mv.Prompt]:
    """A random model, the same weights for hooks of plain torch, and a prompt with a picture."""
    vlm = tiny.vlm(dtype=torch.float64)
    return vlm, tiny.model(attention="eager", dtype=torch.float64), vlm.prompt(tiny.picture(), "is there a dog ?")


def speckled(layer: int) -> tuple[mv.VLM, mv.Prompt]:
    """The planted model, and a picture whose squares differ."""
    vlm, real, *_ = planted.planted(layer)
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3
    return vlm, vlm.prompt(encoding={**real.encoding, "pixel_values": pixels})


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_answer_comes_back_at_image_tokens_before_and_at_the_last_position_from_the_planted_layer_on(
    layer: int,
) -> None:
    vlm, prompt = speckled(layer)
    found = mv.causal_trace(vlm, prompt, METRIC, samples=2)
    assert (abs(found.total) > 0.5).all()
    for at in range(3):
        for span in ("image", "question", "prefix", "last"):
            wanted = found.total if span == ("image" if at < layer else "last") else 0 * found.total
            np.testing.assert_allclose(found.indirect.sel(layer=at, span=span), wanted, atol=1e-4)


@pytest.mark.parametrize("kind, window", [("resid_post", 1), ("attn_out", 2)])
def test_every_run_is_what_hooks_by_hand_give(kind: str, window: int) -> None:
    vlm, model, real = pair()
    metric = mv.log_probability(7)
    found = mv.causal_trace(vlm, real, metric, kind=kind, window=window, samples=2, seed=3)
    own = plain.Plain(model)
    own(real.encoding)
    features, draw = own.seen["image_features", None, "text"], torch.Generator().manual_seed(3)
    for sample in range(2):  # the second draw comes behind the first
        noise = 3 * features.std() * torch.randn(features.shape, generator=draw)
        noisy = (("image_features", None, "text"), lambda x, noise=noise: x + noise, "value")
        corrupted = plain.Plain(model, [noisy])(real.encoding)[0, -1].log_softmax(-1)[7].item()
        assert found.corrupted[sample] == pytest.approx(corrupted, abs=1e-6)
        for span, positions in real.spans.items():
            back = []
            for layer in range(3 - window, 3) if window > 1 else [1]:

                def put(x: Tensor, layer: int = layer, positions: list[int] = positions) -> Tensor:
                    x[:, positions] = own.seen[kind, layer, "text"][:, positions]
                    return x

                back.append(((kind, layer, "text"), put, "value"))
            restored = plain.Plain(model, [noisy, *back])(real.encoding)[0, -1].log_softmax(-1)[7].item()
            indirect = found.indirect[sample].sel(span=span, layer=2 if window > 1 else 1)
            assert indirect == pytest.approx(restored - corrupted, abs=1e-6)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_what_puts_everything_back_gives_the_clean_answer(name: str) -> None:
    vlm = zoo.build(name, dtype=torch.float64)
    prompt = zoo.ask(vlm, tiny.picture(0, 56, 40))
    found = mv.causal_trace(vlm, prompt, mv.log_probability(7), spans={"all": range(len(prompt))}, samples=1)
    assert abs(found.total[0]) > 1e-4
    np.testing.assert_allclose(found.indirect[0, :, 0], found.total[0], atol=1e-9)


def test_no_noise_corrupts_nothing() -> None:
    vlm, _, real = pair()
    found = mv.causal_trace(vlm, real, noise=0, layers=[1], samples=1)
    assert found.total[0] == 0 and found.clean == found.corrupted[0]


def test_the_same_seed_gives_the_same_numbers_and_samples_differ() -> None:
    vlm, _, real = pair()
    first, again = (
        mv.causal_trace(vlm, real, layers=[1], spans={"end": real.last}, samples=2, seed=5) for _ in range(2)
    )
    np.testing.assert_array_equal(first.indirect, again.indirect)
    assert first.corrupted[0] != first.corrupted[1]
    other = mv.causal_trace(vlm, real, layers=[1], spans={"end": real.last}, samples=1, seed=6)
    assert other.corrupted[0] not in first.corrupted.values.tolist()


@pytest.mark.parametrize("on", ["image_features", "pixels"])
def test_the_deviation_is_of_the_picture_alone(on: str) -> None:
    vlm, model, real = pair()
    own = plain.Plain(model)
    own(real.encoding)
    held = real.encoding["pixel_values"] if on == "pixels" else own.seen["image_features", None, "text"]
    site = "vision.pixels" if on == "pixels" else "image_features"
    for prompt in (real, real.with_text("what colour is the cat ?")):
        found = mv.causal_trace(vlm, prompt, layers=[1], samples=1, on=on)
        assert found.attrs["std"] == f"{held.std().item():.6g} at {site}"


def test_the_deviation_may_be_of_other_pictures() -> None:
    vlm, _, real = pair()
    others = [real, real.with_image(tiny.picture(3))]
    both = torch.cat([vlm.run(one, read=[FEATURES])[FEATURES] for one in others])
    found = mv.causal_trace(vlm, real, layers=[1], samples=1, std_of=others)
    assert found.attrs["std"] == f"{both.std().item():.6g} at image_features"


def test_noise_of_an_object_is_on_its_tokens_alone() -> None:
    vlm, _, real = pair()
    clean = vlm.run(real, read=[FEATURES])
    edits = next(noises(real, clean, {FEATURES: 1.0}, real.image[2:5], 1, 0))
    moved = (vlm.run(real, read=[FEATURES], edits=edits)[FEATURES] - clean[FEATURES])[0].abs().sum(-1)
    assert moved.nonzero()[:, 0].tolist() == [2, 3, 4]
    found = mv.causal_trace(vlm, real, layers=[0], samples=1, objects=real.image[2:5], kind="resid_pre")
    back = found.indirect[0, 0]
    np.testing.assert_allclose(back.sel(span=["object", "image"]), found.total[0], atol=1e-9)
    np.testing.assert_allclose(back.sel(span=["rest", "question", "last"]), 0, atol=1e-9)


def test_positions_are_put_back_one_by_one() -> None:
    vlm, _, real = pair()
    found = mv.causal_trace(vlm, real, positions=real.last, layers=[1], samples=1)
    spans = mv.causal_trace(vlm, real, spans={"end": real.last}, layers=[1], samples=1)
    assert found["mean"].dims == ("layer", "position")
    np.testing.assert_allclose(found.indirect.values, spans.indirect.values, atol=1e-12)


WRONG: list[tuple[str, dict[str, Any]]] = [
    (
        "kind='z' cannot be put back; choose from resid_pre, attn_out, resid_mid, mlp_out, resid_post.",
        {"kind": "z"},
    ),
    ("samples=0 and noise=3.0 corrupt nothing; give 1 sample or more, and noise from 0.", {"samples": 0}),
    (
        "spans and positions were both given; activations are put back by the one or by the other.",
        {"spans": {}, "positions": [1]},
    ),
    ("spans=[1] does not name them; write {'image': prompt.image}.", {"spans": [1]}),
    (
        "objects=[3] are image tokens, and the noise is on the pixels, which are not theirs; leave objects out, or "
        "choose on='image_features' where image tokens have features.",
        {"objects": [3], "on": "pixels"},
    ),
    ("on='embed' is not where a picture enters; choose from 'image_features', 'pixels'.", {"on": "embed"}),
]


@pytest.mark.parametrize("message, wrong", WRONG, ids=[message[:30] for message, _ in WRONG])
def test_what_is_refused(message: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    vlm, _, real = pair()
    with pytest.raises((ValueError, TypeError)) as caught:
        mv.causal_trace(vlm, real, **wrong)
    assert str(caught.value) == message


def test_a_prompt_without_a_picture_is_refused() -> None:
    vlm, _, _ = pair()
    with pytest.raises(ValueError, match="the prompt holds no image, so there is no image_features to read"):
        mv.causal_trace(vlm, vlm.prompt(None, "is there"))


def test_the_figure_has_places_down_and_layers_across() -> None:
    vlm, _, real = pair()
    found = mv.causal_trace(vlm, real, layers=[0, 2], samples=1)
    figure = mv.plot.tracing(found)
    np.testing.assert_array_equal(figure.data[0].z, found["mean"].transpose("span", "layer"))
    assert figure.layout.annotations[-1].text.startswith("Metric with resid_post put back minus corrupted, the mean")


def test_nothing_but_a_causal_trace_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError) as caught:
        mv.plot.tracing([1])  # type: ignore[arg-type]
    assert str(caught.value) == (
        "tracing draws what causal_trace returns, and was given a list; make it with mv.causal_trace(vlm, prompt)."
    )
