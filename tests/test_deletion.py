"""Taking image tokens away in the order of a map."""

from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import xarray as xr
import zoo
from planted import NO, YES, planted

import mechvlm as mv

METRIC = mv.logit_difference(YES, NO)


def ranking(prompt: mv.Prompt, values: Any, dim: str = "position") -> xr.DataArray:
    """Numbers for a prompt's image tokens."""
    return xr.DataArray(np.asarray(values, dtype=float), dims=[dim], coords={dim: prompt.image}, name="map")


def one_bright_square() -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """The planted model, a dark picture with a bright sixth square, and a dark one."""
    vlm, _, dark, _, _ = planted()
    pixels = dark.encoding["pixel_values"].clone()
    pixels[..., 2:4, 2:4] = 40.0
    return vlm, vlm.prompt(encoding={**dark.encoding, "pixel_values": pixels}), dark


def test_the_square_that_carries_the_answer_loses_all_of_it_at_once() -> None:
    vlm, prompt, dark = one_bright_square()
    found = mv.deletion_curve(vlm, prompt, ranking(prompt, np.arange(16) == 5), METRIC, dark, samples=4)
    assert found["count"].values.tolist() == [0, 1, 2, 4, 8, 16]
    np.testing.assert_allclose(found.ranked[1:], found.ranked[-1], rtol=1e-5)
    assert float(found.ranked[0]) > float(found.ranked[1])
    np.testing.assert_allclose(found.ranked[0], vlm.metric(METRIC)(vlm.run(prompt).logits).item(), rtol=1e-6)
    np.testing.assert_allclose(found.random[:, -1], vlm.metric(METRIC)(vlm.run(dark).logits).item(), rtol=1e-5)
    assert bool((found.advantage > 0).all())


def test_a_map_that_points_elsewhere_has_no_advantage() -> None:
    vlm, prompt, dark = one_bright_square()
    found = mv.deletion_curve(vlm, prompt, ranking(prompt, np.arange(16) != 5), METRIC, dark, samples=4)
    assert bool((found.advantage <= 0).all())


@pytest.mark.parametrize("name", ["llava_next-vicuna", "qwen3_vl", "mllama"])
def test_each_count_is_one_run_with_those_features_replaced(name: str) -> None:
    vlm = zoo.build(name, dtype=torch.float64)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    real = zoo.ask(vlm, pixels)
    null = zoo.ask(vlm, np.zeros_like(pixels))
    seen = mv.gradient_attribution(vlm, real, mv.log_probability(7)).attribution
    found = mv.deletion_curve(vlm, real, seen, mv.log_probability(7), null, counts=[0, 3], samples=1)
    first = np.argsort(-seen.values)[:3]
    sites = [mv.Site("image_features"), *(mv.Site("deepstack", layer) for layer in range(vlm.shape.deepstack))]
    source = vlm.run(null, read=sites)

    def put(site: mv.Site) -> mv.Edit:
        def fn(x: torch.Tensor) -> torch.Tensor:
            x.view(-1, x.shape[-1])[first.tolist()] = source[site].view(-1, x.shape[-1])[first.tolist()]
            return x

        return mv.Edit(site, fn)

    by_hand = vlm.run(real, edits=[put(site) for site in sites])
    np.testing.assert_allclose(found.ranked[1], by_hand.logits.log_softmax(-1)[0, 7].item(), rtol=1e-9)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("counts=[99] cannot be taken from 16 image tokens; give numbers from 0 to that.", {"counts": [99]}),
    ("samples=0 compares with nothing; give 1 random order or more.", {"samples": 0}),
    (
        "ranking=[1] is no DataArray; give a map, such as mv.attention_map(vlm, prompt, 3) or mv.relevancy(vlm, "
        "prompt, metric).relevancy.",
        {"ranking": [1]},
    ),
]


@pytest.mark.parametrize("message, wrong", WRONG, ids=[message[:30] for message, _ in WRONG])
def test_what_is_refused(message: str, wrong: dict[str, Any]) -> None:
    vlm, prompt, dark = one_bright_square()
    given: dict[str, Any] = {"ranking": ranking(prompt, np.arange(16)), "metric": METRIC, "null": dark, **wrong}
    with pytest.raises((ValueError, TypeError)) as caught:
        mv.deletion_curve(vlm, prompt, **given)
    assert str(caught.value) == message


def test_a_ranking_of_other_tokens_or_with_holes_is_refused() -> None:
    vlm, prompt, dark = one_bright_square()
    other = ranking(prompt, np.arange(16)).assign_coords(position=np.arange(16))
    with pytest.raises(ValueError, match="it must have one for each of the prompt's 16 image tokens"):
        mv.deletion_curve(vlm, prompt, other, METRIC, dark)
    with pytest.raises(ValueError, match="holds values that are no finite numbers"):
        mv.deletion_curve(vlm, prompt, ranking(prompt, [np.nan] * 16), METRIC, dark)


def test_another_question_is_no_null() -> None:
    vlm, prompt, dark = one_bright_square()
    ids = dark.encoding["input_ids"].clone()
    ids[0, 0] = 3
    other = vlm.prompt(encoding={**dark.encoding, "input_ids": ids})
    with pytest.raises(ValueError, match="only the picture may differ, so make it with prompt.with_image"):
        mv.deletion_curve(vlm, prompt, ranking(prompt, np.arange(16)), METRIC, other)


def test_the_figure_has_the_range_of_the_random_orders() -> None:
    vlm, prompt, dark = one_bright_square()
    found = mv.deletion_curve(vlm, prompt, ranking(prompt, np.arange(16) == 5), METRIC, dark, samples=3)
    figure = mv.plot.deletion(found)
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["random", "ranked"]
    np.testing.assert_allclose(figure.data[0].y, found.random.min("sample"))
    assert figure.layout.annotations[-1].text.replace("<br>", " ") == (
        "ranked: in the order of the map, the highest first. random: the mean of 3 random orders; the band reaches "
        "from the lowest to the highest of them."
    )


def test_counts_stand_at_even_distances_while_there_is_room() -> None:
    def drawn(counts: range | list[int]) -> Any:
        values = np.zeros((2, len(counts)))
        found = xr.Dataset({"ranked": ("count", values[0]), "random": (("sample", "count"), values)})
        return mv.plot.deletion(found.assign_coords(count=list(counts)))

    few, many = drawn([0, 1, 2, 4, 576]), drawn(range(100))
    assert list(few.data[-1].x) == [0, 1, 2, 3, 4] and list(few.layout.xaxis.ticktext) == ["0", "1", "2", "4", "576"]
    assert list(many.data[-1].x) == list(range(100))


@pytest.mark.parametrize(
    "wrong, given",
    [(xr.DataArray([1.0]), "a DataArray"), (xr.Dataset({"mass": 1}), "a Dataset with mass"), ([1], "a list")],
)
def test_nothing_but_a_deletion_curve_is_drawn(wrong: Any, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError) as caught:
        mv.plot.deletion(wrong)
    assert str(caught.value) == (
        f"deletion draws what deletion_curve returns, and was given {given}; make it with "
        "mv.deletion_curve(vlm, prompt, ranking, metric)."
    )
