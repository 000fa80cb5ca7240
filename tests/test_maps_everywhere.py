"""Taking tokens away in every architecture: both ends are the two prompts, at the features and at the pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zoo
from test_maps import METRIC as PLANTED
from test_maps import TINY, asked, one_token

import mechvlm as mv
from mechvlm.experiments import compared
from mechvlm.experiments.inputs import token_dim
from mechvlm.experiments.maps import MAPS, chosen_maps
from mechvlm.experiments.removal import token_places
from mechvlm.references import placed

pytestmark = zoo.second_environment
METRIC = mv.log_probability(7)


def plain(vlm: mv.VLM, prompt: mv.Prompt) -> float:
    """The metric of transformers' own model."""
    with torch.no_grad():
        logits = vlm.hf(**placed(vlm, prompt), use_cache=False).logits[0, -1]
    return float(logits.log_softmax(-1)[7])


def made(name: str, at: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """A model, a question about a picture, and about a grey one."""
    if zoo.there(name):
        pytest.skip(zoo.there(name))  # runs again on the transformers release that has it
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    if vlm.processor is None and at == "pixels":
        pytest.skip("a ready encoding has no picture")  # runs where the processor can be made: with torchvision
    picture = tiny.picture(0, 48, 40)
    return vlm, zoo.ask(vlm, picture), zoo.ask(vlm, mv.images.grey(picture))


@pytest.mark.parametrize("at", ["image_features", "pixels"])
@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_without_any_token_it_is_the_null_prompt_and_with_all_the_prompt(name: str, at: str) -> None:
    vlm, real, null = made(name, at)
    places, dim = token_places(real, at), token_dim(real, at)
    ranking = xr.DataArray(np.arange(len(places)), dims=[dim], coords={dim: places})
    found = mv.deletion_curve(vlm, real, ranking, METRIC, null, [0], 1, mode="both", at=at)
    ends = [plain(vlm, real), plain(vlm, null)]
    assert abs(ends[0] - ends[1]) > 1e-6
    np.testing.assert_allclose(found.ranked[:, 0], ends, rtol=1e-9)
    np.testing.assert_allclose([found.value, found.null_value], ends, rtol=1e-9)


@pytest.mark.parametrize("at", ["image_features", "pixels"])
@pytest.mark.parametrize("name", ["mllama", "instructblip"])
def test_every_map_that_there_is_for_a_model_can_be_compared(name: str, at: str) -> None:
    vlm, real, null = made(name, at)
    named = chosen_maps(real, None, at)
    without = {"relevancy", "attention_rollout"} if name == "mllama" else set()
    by_patch = {"relevancy", "attention_rollout", "attention", "gradient_attention", "direct_logits"}
    assert set(MAPS) - set(named) == (by_patch if (name, at) == ("instructblip", "pixels") else without)
    kept = [one for one in named if one not in ("integrated_gradients", "smooth_grad", "direct_logits")]
    sign = 1 if plain(vlm, real) > plain(vlm, null) else -1

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return sign * logits.log_softmax(-1)[:, 7]

    found = mv.compare_maps(vlm, real, metric, kept, [null], at, [0.5], samples=1).isel(prompt=0)
    assert np.isfinite(found.attribution.values).all()
    lost = mv.occlusion(vlm, real, metric, null, at).attribution
    np.testing.assert_allclose(found.attribution.sel(map="occlusion"), lost, rtol=1e-9, atol=1e-12)


def test_maps_of_features_have_no_place_in_a_picture_under_a_q_former() -> None:
    vlm, real, null = made("instructblip", "image_features")
    sign = 1 if plain(vlm, real) > plain(vlm, null) else -1
    found = mv.compare_maps(
        vlm, real, lambda logits: sign * logits.log_softmax(-1)[:, 7], ["random"], [null], samples=1
    )
    with pytest.raises(ValueError, match="maps by position cannot be drawn: this picture is seen through a Q-Former"):
        mv.plot.compared_maps(found, real)


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


def test_a_prompt_whose_picture_takes_away_is_left_out() -> None:
    vlm, prompts, metrics = asked()
    against = mv.logit_difference("no", "yes") if str(metrics[1]) == str(TINY) else TINY
    found = mv.compare_maps(vlm, prompts, [metrics[0], against], ["random"], samples=1)
    assert found.attrs["left_out"] == 1 and np.isnan(found.advantage[1]).all()
    np.testing.assert_allclose(found.advantage_mean, found.advantage[0], rtol=1e-9)
    with pytest.raises(ValueError) as caught:
        mv.plot.compared_maps(found, prompts[1], 1)
    assert str(caught.value) == ("prompt 1 was left out, since its picture does not raise the metric; choose another.")
    with pytest.raises(ValueError) as caught:
        mv.compare_maps(vlm, prompts[1], against, ["random"])
    assert str(caught.value) == (
        f"the pictures raise {against} in none of the 1 prompts above what the null pictures give, so there is nothing "
        "for a map to explain; give a metric that they raise, such as that of the right answer."
    )


def test_features_times_gradient_are_nothing_behind_a_norm_and_gradients_are_longest_elsewhere() -> None:
    vlm, real, null = one_token()
    found = mv.compare_maps(vlm, [real], PLANTED, ["input_times_gradient", "smooth_grad"], null=[null], samples=1)
    nothing, length = found.attribution[0].values
    assert np.abs(nothing).max() < 1e-3 * float(found.value[0])
    assert length.argmin() == 5
