"""Gradients where a picture enters: plain autograd on transformers' models, complete, and on the right tokens."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import planted
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.inputs import PIXELS, token_coordinates, token_dim, token_sums
from mechvlm.experiments.paths import noisy
from mechvlm.references import placed

METRIC = mv.logit_difference(30, 31)
LAYOUTS = ["llava", "llava_next-vicuna", "qwen2_vl", "molmo2", "mllama"]
BOXED = ["llava", "llava_next-vicuna", "idefics3", "aya_vision", "mllama"]
PICTURED = [name for name in LAYOUTS if name not in ("qwen2_vl", "molmo2")]


@functools.cache
def made(name: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """A model, a prompt, and the same prompt about a picture on the way to another."""
    if zoo.there(name):
        pytest.skip(zoo.there(name))  # runs again on the transformers release that has it
    vlm = zoo.build(name, dtype=torch.float64)
    prompt = zoo.ask(vlm, tiny.picture(0, 48, 40))
    pixels, others = (x.encoding["pixel_values"] for x in (prompt, zoo.ask(vlm, tiny.picture(1, 48, 40))))
    return vlm, prompt, replace(prompt, encoding={**prompt.encoding, "pixel_values": pixels.lerp(others, 0.3)})


def plain(vlm: mv.VLM, prompt: mv.Prompt, pixels: Tensor) -> tuple[float, Tensor]:
    """The metric and its gradient at the pixels, from transformers' own model."""
    pixels = pixels.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = vlm.hf(**{**placed(vlm, prompt), "pixel_values": pixels}, use_cache=False).logits[0, -1]
        value = logits[30] - logits[31]
        return float(value.detach()), torch.autograd.grad(value, pixels)[0]


def own_integral(vlm: mv.VLM, prompt: mv.Prompt, base: mv.Prompt, steps: int) -> Tensor:
    """Integrated gradients by the midpoint rule, one point at a time."""
    first, last = placed(vlm, base)["pixel_values"], placed(vlm, prompt)["pixel_values"]
    gradients = [plain(vlm, prompt, first + (step + 0.5) / steps * (last - first))[1] for step in range(steps)]
    return sum(gradients, torch.zeros_like(first)) / steps * (last - first)


@pytest.mark.parametrize("name", LAYOUTS)
def test_integrated_gradients_are_a_plain_loop_of_autograd(name: str) -> None:
    vlm, prompt, other = made(name)
    found = mv.integrated_gradients(vlm, prompt, METRIC, "pixels", other, 3, "midpoint", np.inf, batch_size=2)
    own = own_integral(vlm, prompt, other, 3)
    np.testing.assert_allclose(found.attribution, token_sums(vlm, prompt, {PIXELS: own}), rtol=0, atol=1e-6)
    everything = float(found.attribution.sum()) + found.attrs["outside_tokens"]
    assert everything == pytest.approx(float(own.sum()), abs=1e-6)
    assert (name in PICTURED) == ("pixel_attribution" in found)
    if name in PICTURED:
        shown = found.pixel_attribution.values
        np.testing.assert_allclose(shown, own.reshape(-1, *own.shape[-3:])[: len(shown)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", ["image_features", "pixels"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "mllama", "molmo2", "blip2-llama"])
def test_attributions_sum_to_the_difference_of_the_metric(name: str, at: str) -> None:
    """Qwen3-VL adds features behind layers and Mllama's are keys: without those the sum would be another."""
    vlm, prompt, other = made(name)
    found = mv.integrated_gradients(vlm, prompt, METRIC, at, other, steps=16, tolerance=0.01)
    difference = (
        plain(vlm, prompt, placed(vlm, prompt)["pixel_values"])[0]
        - plain(vlm, other, placed(vlm, other)["pixel_values"])[0]
    )
    total = float(found.attribution.sum()) + found.attrs.get("outside_tokens", 0.0)
    assert abs(difference) > 1e-4
    assert total == pytest.approx(difference, rel=0.01)
    assert found.attrs["completeness_gap"] == pytest.approx(abs(total - difference), abs=1e-6)


def test_integrated_gradients_at_features_are_a_plain_loop_of_autograd() -> None:
    vlm, prompt, _ = made("llava")
    own, steps = [], 4
    with torch.no_grad():
        whole = vlm.hf.model.multi_modal_projector(
            vlm.hf.model.vision_tower(placed(vlm, prompt)["pixel_values"], output_hidden_states=True).hidden_states[-2][
                :, 1:
            ]
        )
    for step in range(steps):
        leaf = (whole * (step + 0.5) / steps).requires_grad_(True)
        handle = vlm.hf.model.multi_modal_projector.register_forward_hook(lambda _m, _i, _o, leaf=leaf: leaf)
        with torch.enable_grad():
            logits = vlm.hf(**placed(vlm, prompt), use_cache=False).logits[0, -1]
            own.append(torch.autograd.grad(logits[30] - logits[31], leaf)[0])
        handle.remove()
    found = mv.integrated_gradients(
        vlm, prompt, METRIC, baseline="zeros", steps=steps, method="midpoint", tolerance=np.inf
    )
    expected = (torch.stack(own).mean(0) * whole).sum(-1)[0]
    np.testing.assert_allclose(found.attribution, expected, rtol=0, atol=1e-8)


def test_smooth_grad_without_noise_is_the_gradient() -> None:
    vlm, prompt, _ = made("llava_next-vicuna")
    for at in ("image_features", "pixels"):
        once = mv.input_times_gradient(vlm, prompt, METRIC, at)
        still = mv.smooth_grad(vlm, prompt, METRIC, at, noise=0, samples=2, times_input=True)
        np.testing.assert_allclose(still.attribution, once.attribution, rtol=0, atol=1e-9)
        bare = mv.smooth_grad(vlm, prompt, METRIC, at, noise=0, samples=1)
        np.testing.assert_allclose(bare.attribution, once.gradient_norm, rtol=0, atol=1e-9)


def test_smooth_grad_is_a_plain_mean_over_noisy_pixels() -> None:
    vlm, prompt, _ = made("llava")
    pixels = placed(vlm, prompt)["pixel_values"]
    found = mv.smooth_grad(vlm, prompt, METRIC, "pixels", noise=0.3, samples=3, seed=7, batch_size=2)
    copies = [noisy(pixels, 0.3, int(seed)) for seed in np.random.SeedSequence(7).generate_state(3)]
    assert float((copies[0] - pixels).std()) == pytest.approx(0.3 * float(pixels.max() - pixels.min()), rel=0.05)
    own = torch.stack([plain(vlm, prompt, copy)[1] for copy in copies]).mean(0)
    np.testing.assert_allclose(found.pixel_attribution, own, rtol=0, atol=1e-9)
    other = mv.smooth_grad(vlm, prompt, METRIC, "pixels", noise=0.3, samples=3, seed=8)
    assert np.abs(other.pixel_attribution - found.pixel_attribution).max() > 1e-3 * float(own.abs().max())


@pytest.mark.parametrize("name", BOXED)
def test_pixels_that_change_belong_to_the_token_whose_box_changed(name: str) -> None:
    """By the processor's own work: a token's box in the second picture is painted, and the pixels are compared."""
    vlm, *_ = made(name)
    first, second = tiny.picture(0, 60, 40), tiny.picture(1, 48, 40)
    prompt = vlm.prompt([first, second], zoo.QUESTION)
    other, image = prompt.images
    inside = [at for at in image.positions if max(image.box(at) or ()) <= 40]  # some reach into what is padded
    for position in (inside[0], inside[len(inside) // 2], inside[-1]):
        left, top, right, bottom = (round(edge) for edge in image.box(position) or ())
        painted = second.copy()
        painted.paste((255, 0, 255), (left, top, right, bottom))
        changed = prompt.with_image([first, painted]).encoding["pixel_values"] - prompt.encoding["pixel_values"]
        sums = token_sums(vlm, prompt, {PIXELS: changed.abs()}).tolist()
        where: Any = token_coordinates(prompt, "pixels")[token_dim(prompt, "pixels")]
        by_token = dict(zip(where.tolist(), sums, strict=True))
        tile = (image.cell(position) or (-1,))[0]
        beside = [at for at, place in zip(image.positions, image.places, strict=True) if place[0] == tile]
        assert max(beside, key=lambda at: by_token[at]) == position
        assert not any(by_token[at] for at in other.positions)


@functools.cache
def one_square() -> tuple[mv.VLM, mv.Prompt, mv.Prompt, int]:
    """A model that answers with one square's brightness, a random and a dark picture, and the square's position."""
    model, square, mark = planted.build(1, 2).double(), 6, 3
    with torch.no_grad():
        planted.plant(model, 1, 2)
        model.model.vision_tower.embeddings.position_embedding.weight[square + 1, mark] = 1.0
        model.model.multi_modal_projector.linear_1.weight[2, mark] = 1.0
        model.model.multi_modal_projector.linear_2.weight[planted.MARK, 2] = 1.0
        model.model.multi_modal_projector.linear_2.bias[planted.MARK] = 0.0
    vlm = mv.VLM(model)
    ids = torch.tensor([[1, 2, *[planted.IMAGE] * 16, 3, 4, 7, planted.LAST]])
    random = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real, dark = (
        vlm.prompt(encoding={"input_ids": ids, "pixel_values": x}) for x in (random, torch.full_like(random, -1.0))
    )
    return vlm, real, dark, real.image[square]


@pytest.mark.parametrize("at", ["image_features", "pixels"])
def test_the_one_square_that_answers_gets_it_all(at: str) -> None:
    vlm, real, dark, planted_at = one_square()
    metric = mv.logit_difference(planted.YES, planted.NO)
    found = mv.integrated_gradients(vlm, real, metric, at, dark, steps=24)
    difference = found.attrs["value"] - found.attrs["baseline_value"]
    assert difference > 1
    assert float(found.attribution.sel(position=planted_at)) == pytest.approx(difference, rel=0.01)
    assert float(np.abs(found.attribution.drop_sel(position=planted_at)).max()) < 0.01 * difference
    assert int(mv.smooth_grad(vlm, real, metric, at).attribution.idxmax()) == planted_at
    assert int(np.abs(mv.input_times_gradient(vlm, real, metric, at).attribution).idxmax()) == planted_at


def test_gradient_attribution_is_input_times_gradient_at_the_features() -> None:
    vlm, prompt, _ = made("qwen3_vl")
    one, other = mv.gradient_attribution(vlm, prompt, METRIC), mv.input_times_gradient(vlm, prompt, METRIC)
    assert one.identical(other)


def test_results_can_be_stored(tmp_path: Any) -> None:
    vlm, prompt, other = made("llava")
    found = mv.integrated_gradients(vlm, prompt, METRIC, "pixels", other, steps=4)
    found.to_netcdf(tmp_path / "found.nc", engine="h5netcdf")
