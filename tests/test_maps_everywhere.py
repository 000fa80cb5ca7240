"""Taking tokens away in every architecture: both ends are the two prompts, at the features and at the pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zoo
from test_maps import TINY, asked

import mechvlm as mv
from mechvlm.experiments import compared
from mechvlm.experiments.inputs import token_dim
from mechvlm.experiments.maps import MAPS
from mechvlm.experiments.removal import token_places
from mechvlm.references import placed

pytestmark = zoo.second_environment
METRIC = mv.logit_difference(7, 9)


def plain(vlm: mv.VLM, prompt: mv.Prompt) -> float:
    """The metric of transformers' own model."""
    with torch.no_grad():
        logits = vlm.hf(**placed(vlm, prompt), use_cache=False).logits[0, -1]
    return float(logits[7] - logits[9])


@pytest.mark.parametrize("at", ["image_features", "pixels"])
@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_without_any_token_it_is_the_null_prompt_and_with_all_the_prompt(name: str, at: str) -> None:
    if zoo.there(name):
        pytest.skip(zoo.there(name))  # runs again on the transformers release that has it
    vlm = zoo.build(name, dtype=torch.float64)
    real = zoo.ask(vlm, tiny.picture(0, 48, 40))
    if not real.pictures and at == "pixels":
        pytest.skip("no processor of this variant is made here")  # runs again where there is one
    null = real.with_image(mv.images.grey) if real.pictures else zoo.ask(vlm, np.full((40, 48, 3), 128, np.uint8))
    places, dim = token_places(real, at), token_dim(real, at)
    ranking = xr.DataArray(np.arange(len(places)), dims=[dim], coords={dim: places})
    found = mv.deletion_curve(vlm, real, ranking, METRIC, null, samples=1, mode="both", at=at)
    ends = [plain(vlm, real), plain(vlm, null)]
    assert abs(ends[0] - ends[1]) > 1e-6
    np.testing.assert_allclose(found.ranked.sel(mode="deletion")[[0, -1]], ends, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.ranked.sel(mode="insertion")[[-1, 0]], ends, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([found.value, found.null_value], ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mllama", "instructblip", "qwen3_vl", "llava_next-vicuna"])
@pytest.mark.parametrize("at", ["image_features", "pixels"])
def test_every_map_that_there_is_for_a_model_can_be_compared(name: str, at: str) -> None:
    vlm = zoo.build(name, dtype=torch.float64)
    real = zoo.ask(vlm, tiny.picture(0, 48, 40))
    null = real.with_image(mv.images.grey)
    metric = METRIC if plain(vlm, real) > plain(vlm, null) else mv.logit_difference(9, 7)
    maps = mv.compare_maps(vlm, real, metric, null=[null], samples=1, at=at, shares=[0.5])
    own = maps.attribution.isel(prompt=0)
    assert np.isfinite(own.values).all()
    occluded = mv.occlusion(vlm, real, metric, null, at).attribution
    np.testing.assert_allclose(own.sel(map="occlusion"), occluded, rtol=1e-9, atol=1e-12)
    missing = {"mllama": {"relevancy", "attention_rollout"}}.get(name, set())
    if name == "instructblip" and at == "pixels":
        missing = {"relevancy", "attention_rollout", "attention", "gradient_attention"}
    assert set(MAPS) - set(maps["map"].values) == missing


def test_insertion_of_some_is_deletion_of_the_others() -> None:
    vlm = tiny.vlm(dtype=torch.float64)
    real = vlm.prompt(tiny.picture(0), "is there a red dog in the image ?")
    ranking = mv.attention_map(vlm, real, 1)
    upside_down = ranking.copy(data=-ranking.values)
    inserted = mv.deletion_curve(vlm, real, ranking, TINY, counts=range(17), samples=1, mode="insertion")
    deleted = mv.deletion_curve(vlm, real, upside_down, TINY, counts=range(17), samples=1)
    np.testing.assert_allclose(inserted.ranked, deleted.ranked[::-1], rtol=1e-9)


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, prompts, metrics = asked()
    settings: dict[str, Any] = {"maps": ["occlusion"], "samples": 1, "out": tmp_path}
    first = mv.compare_maps(vlm, prompts, metrics, **settings)
    monkeypatch.setattr(compared, "made", lambda *_: pytest.fail("a map was made again"))
    xr.testing.assert_identical(mv.compare_maps(vlm, prompts, metrics, **settings), first)
    with pytest.raises(ValueError, match="holds another experiment"):
        mv.compare_maps(vlm, prompts, metrics, **{**settings, "seed": 1})


def test_each_curve_is_that_of_deletion_curve() -> None:
    vlm, prompts, metrics = asked(1)
    seen = mv.attention_map(vlm, prompts[0], 1)
    found = mv.compare_maps(vlm, prompts, metrics, {"layer 1": lambda _: seen}, samples=2, shares=[0.25, 0.5])
    own = mv.deletion_curve(vlm, prompts[0], seen, metrics[0], counts=[0, 4, 8, 16], samples=2, mode="both")
    np.testing.assert_allclose(found.curve[0, 0], own.ranked, rtol=1e-9)
    np.testing.assert_allclose(found.random[0].transpose("mode", "sample", "share"), own.random, rtol=1e-9)
    np.testing.assert_allclose(found.advantage[0, 0], own.advantage.mean("sample"), rtol=1e-9)
