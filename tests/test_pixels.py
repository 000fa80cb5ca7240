"""The site of the pixels a model is called with: read, edited and with gradients, on every architecture."""

import functools
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.references import apart, placed, rounding

PIXELS = mv.Site("pixels", tower="vision")
every = pytest.mark.parametrize("name", zoo.VARIANTS)
each_layout = pytest.mark.parametrize(
    "name",
    ["llava", "llava_next-vicuna", "blip2-opt", "qwen2_vl", "internvl", "idefics3", "mistral3", "molmo2", "mllama"],
)
"""One architecture for each way in which processors lay pictures out in `pixel_values`."""


def metric(logits: Tensor) -> Tensor:
    return logits[:, 30] - logits[:, 31]


@functools.cache
def made(name: str) -> tuple[mv.VLM, mv.Prompt]:
    if zoo.there(name):
        pytest.skip(zoo.there(name))  # runs again on the transformers release that has it
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    return vlm, zoo.ask(vlm, tiny.picture(0, 48, 40))


def plainly(vlm: mv.VLM, prompt: mv.Prompt, pixels: Tensor) -> Tensor:
    """The last logits of transformers' own model, called with other pixels."""
    kept = {"logits_to_keep": 1} if vlm.arch.row.keeps else {}
    return vlm.hf(**{**placed(vlm, prompt), "pixel_values": pixels}, use_cache=False, **kept).logits[:, -1]


@every
def test_gradients_at_the_pixels_are_plain_autograds(name: str) -> None:
    vlm, prompt = made(name)
    pixels = placed(vlm, prompt)["pixel_values"].requires_grad_(True)
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(metric(plainly(vlm, prompt, pixels)).sum(), pixels)
    run = vlm.run(prompt, read=[PIXELS], grad_of=metric)
    assert torch.equal(run[PIXELS], pixels.detach())
    assert expected.abs().max() > 0
    assert apart(run.grad[PIXELS], expected) <= rounding(vlm, 1024)


@each_layout
def test_gradients_behind_the_pixels_are_what_they_are_without_them(name: str) -> None:
    vlm, prompt = made(name)
    sites = [mv.Site("resid_post", 0, "vision"), mv.Site("image_features"), mv.Site("resid_post", 0)]
    own = vlm.run(prompt, read=sites, grad_of=metric)
    beside = vlm.run(prompt, read=[PIXELS, *sites], grad_of=metric)
    assert all(torch.equal(own.grad[site], beside.grad[site]) for site in sites)


@every
def test_edited_pixels_are_another_picture(name: str) -> None:
    vlm, prompt = made(name)
    with torch.no_grad():
        expected = plainly(vlm, prompt, placed(vlm, prompt)["pixel_values"] * 0.5)
    assert torch.equal(vlm.run(prompt, edits=[mv.Edit(PIXELS, lambda x: x * 0.5)]).logits, expected)


@each_layout
def test_rows_with_edited_pixels_are_single_runs(name: str) -> None:
    vlm, prompt = made(name)
    variants = [[mv.Edit(PIXELS, lambda x, by=by: x * by)] for by in (0.5, -1.0)] + [[]]
    together = vlm.run(prompt, read=[PIXELS], variants=variants, grad_of=metric)
    for row, edits in zip(together.rows, variants, strict=True):
        alone = vlm.run(prompt, read=[PIXELS], edits=edits, grad_of=metric)
        assert apart(row.logits, alone.logits) <= rounding(vlm)
        assert torch.equal(row[PIXELS], alone[PIXELS])
        assert apart(row.grad[PIXELS], alone.grad[PIXELS]) <= rounding(vlm, 1024)


@each_layout
def test_rows_of_a_batch_see_their_own_pixels(name: str) -> None:
    """Their tiles, patches and sizes differ, and the shorter ones are filled up."""
    vlm, _ = made(name)
    prompts = [zoo.ask(vlm, tiny.picture(0, 60, 40)), zoo.ask(vlm, tiny.picture(1, 24, 48), "is there a dog ?")]
    shapes: list[tuple[int, ...]] = []

    def darker(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x * 0.5

    edits = [mv.Edit(PIXELS, darker)]
    alone = [vlm.run(prompt, [PIXELS], edits, grad_of=metric) for prompt in prompts]
    together = vlm.run(prompts, [PIXELS], edits, grad_of=metric)
    assert shapes == 2 * [tuple(prompt.encoding["pixel_values"].shape) for prompt in prompts]
    for row, own in zip(together.rows, alone, strict=True):
        assert apart(row.logits, own.logits) <= rounding(vlm)
        assert torch.equal(row[PIXELS], own[PIXELS])
        assert apart(row.grad[PIXELS], own.grad[PIXELS]) <= rounding(vlm, 1024)


@each_layout
def test_a_generation_looks_at_edited_pixels(name: str) -> None:
    vlm, prompt = made(name)
    edits = [mv.Edit(PIXELS, lambda x: x * 0.5, "prompt")]
    last = {mv.Site("logits"): lambda x: x[:, -1], PIXELS: None}
    made_ = vlm.generate(prompt, edits, 2, read_each_step=last, do_sample=False)
    run = vlm.run(prompt, last, edits)
    assert torch.equal(made_[PIXELS][0], run[PIXELS])
    assert apart(made_["logits"][0], run["logits"]) <= rounding(vlm)


def test_an_edit_of_the_pixels_gradient_is_what_is_read_of_it() -> None:
    vlm, prompt = made("llava")
    plain = vlm.run(prompt, [PIXELS], grad_of=metric).grad[PIXELS]
    half = vlm.run(prompt, [PIXELS], [mv.Edit(PIXELS, lambda x: x * 0.5, on="grad")], grad_of=metric).grad[PIXELS]
    assert torch.equal(half, plain * 0.5)


def test_pixels_of_another_picture_are_patched_in() -> None:
    vlm, prompt = made("qwen2_vl")
    other = zoo.ask(vlm, tiny.picture(1, 48, 40))
    held: Any = vlm.run(other, [PIXELS])
    assert torch.equal(vlm.run(prompt, edits=[mv.patch(PIXELS, held[PIXELS])]).logits, held.logits)
