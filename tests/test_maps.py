"""Maps of a picture held against the model: tokens taken away and put in, one by one, and maps against each other."""

import functools
from itertools import combinations
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import scipy.stats
import tiny
import torch
import xarray as xr
import zoo
from PIL import Image
from planted import IMAGE, LAST, NO, YES

import mechvlm as mv
from mechvlm.experiments import compared
from mechvlm.experiments.chance import holm, sign_flips
from mechvlm.experiments.removal import exchanger, removable, squares
from mechvlm.metrics import Metric
from mechvlm.references import placed

METRIC = mv.logit_difference(YES, NO)
TINY = mv.logit_difference("yes", "no")
FIRST = (
    "occlusion",
    "attribution_patching",
    "integrated_gradients",
    "gradient_attention",
    "relevancy",
    "direct_logits",
)


@functools.cache
def one_token() -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """A model that attends evenly, and a prompt in which the image's sixth token carries the answer; and an empty one.

    It is the planted model without its scores, so that attention is the same whatever the picture.
    """
    hf = planted.build(layer=1, head=2)
    attention = hf.model.language_model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
    vlm, ids = mv.VLM(hf), torch.tensor([[1, 2, *[IMAGE] * 16, 3, 4, 7, LAST]])
    pixels = torch.zeros(2, 1, 3, 8, 8)
    pixels[0, ..., 2:4, 2:4] = 1.0
    real, null = (vlm.prompt(encoding={"input_ids": ids, "pixel_values": one}) for one in pixels)
    return vlm, real, null


def plain(vlm: mv.VLM, prompt: mv.Prompt) -> float:
    """The metric of transformers' own model."""
    with torch.no_grad():
        return float(vlm.metric(TINY)(vlm.hf(**placed(vlm, prompt), use_cache=False).logits[:, -1]))


def test_maps_that_ask_the_model_find_the_token_that_carries_the_answer() -> None:
    vlm, real, null = one_token()
    found = mv.compare_maps(vlm, [real], METRIC, list(FIRST), null=[null], samples=4).isel(prompt=0)
    assert found.attribution.argmax("token").values.tolist() == [5] * len(FIRST)
    insertion = found.curve.sel(mode="insertion")
    np.testing.assert_allclose(insertion[:, 1:], float(found.value), rtol=1e-5)
    np.testing.assert_allclose(insertion[:, 0], float(found.null_value), atol=1e-6)
    np.testing.assert_allclose(found.curve.sel(mode="deletion")[:, 1:], float(found.null_value), atol=1e-6)
    assert bool((found.advantage > 0).all())


def test_maps_that_do_not_look_at_what_is_seen_do_not_find_it() -> None:
    vlm, real, null = one_token()
    maps = {name: name for name in ("attention_rollout", "attention")}
    found = mv.compare_maps(vlm, [real], METRIC, maps, null=[null], samples=4).isel(prompt=0)
    other = mv.compare_maps(vlm, [real], METRIC, {"null's": lambda _: mv.attention_rollout(vlm, null).rollout}, [null])
    np.testing.assert_allclose(found.attribution[0], other.attribution[0, 0], rtol=1e-6)
    np.testing.assert_allclose(found.curve.sel(mode="insertion", share=1 / 16), 0.0, atol=1e-6)


def test_occlusion_is_one_run_of_the_model_with_that_token_of_the_null_picture() -> None:
    vlm = zoo.build("llava", dtype=torch.float64)
    real = zoo.ask(vlm, tiny.picture(0))
    null = real.with_image(mv.images.black)
    found = mv.occlusion(vlm, real, TINY)
    projector = vlm.hf.model.multi_modal_projector
    with torch.no_grad():
        handle = projector.register_forward_hook(lambda _module, _given, made: kept.append(made))
        kept: list[torch.Tensor] = []
        whole, empty = plain(vlm, real), plain(vlm, null)
        handle.remove()
        lost = []
        for token in range(16):
            mixed = kept[0].clone()
            mixed.view(-1, mixed.shape[-1])[token] = kept[1].view(-1, mixed.shape[-1])[token]
            handle = projector.register_forward_hook(lambda _module, _given, _made, mixed=mixed: mixed)
            lost.append(whole - plain(vlm, real))
            handle.remove()
    np.testing.assert_allclose(found.attribution, lost, rtol=1e-9, atol=1e-12)
    assert (found.attrs["value"], found.attrs["null_value"]) == pytest.approx((whole, empty), rel=1e-12)


def test_tokens_of_a_block_share_what_is_lost_with_all_of_them() -> None:
    vlm, real, null = one_token()
    found = mv.occlusion(vlm, real, METRIC, null, block=2).attribution
    value = vlm.metric(METRIC)(vlm.run(real).logits).item()
    expected = np.zeros((4, 4))
    expected[:2, 0:2] = value / 4
    np.testing.assert_allclose(found.values.reshape(4, 4), expected, atol=1e-5)


def test_at_the_pixels_a_curve_is_plain_runs_of_painted_pictures() -> None:
    vlm = tiny.vlm(dtype=torch.float64)
    picture = tiny.picture(0)
    real = vlm.prompt(picture, "is there a red dog in the image ?")
    values = np.arange(16.0)[::-1]
    ranking = xr.DataArray(values, dims=["position"], coords={"position": real.image})
    found = mv.deletion_curve(vlm, real, ranking, TINY, counts=[0, 3, 16], samples=1, mode="both", at="pixels")

    def painted(first: int, last: int) -> float:
        pixels = np.asarray(picture.convert("RGB")).copy()
        for token in range(first, last):
            row, column = divmod(token, 4)
            pixels[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] = 0
        return plain(vlm, vlm.prompt(Image.fromarray(pixels), "is there a red dog in the image ?"))

    deleted, inserted = found.ranked.values
    np.testing.assert_allclose(deleted, [painted(0, 0), painted(0, 3), painted(0, 16)], rtol=1e-9)
    np.testing.assert_allclose(inserted, [painted(0, 16), painted(3, 16), painted(0, 0)], rtol=1e-9)


def test_squares_of_overlapping_tiles_are_taken_out_of_all_of_them() -> None:
    vlm = zoo.build("llava_next-vicuna")
    real = zoo.ask(vlm, tiny.picture(0, 48, 40))
    layers = squares(real)[0]
    assert len(layers) == 2 and not set(layers[0].ravel()) - {-1} & set(layers[1].ravel())
    token = int(layers[0][0, 0])
    null = real.with_image(mv.images.white)
    gone = np.asarray(exchanger(real, null)(frozenset({token}))[0])
    own = np.asarray(real.pictures[0])
    np.testing.assert_array_equal((gone != own).any(-1), (layers[0] == token) & (own != 255).any(-1))
    assert exchanger(real, null)(frozenset(removable(real, "pixels").tolist()))[0] is null.pictures[0]


@functools.cache
def asked(count: int = 2) -> tuple[mv.VLM, list[mv.Prompt], list[Metric]]:
    """A tiny model and questions about pictures, with metrics that the pictures raise."""
    vlm = tiny.vlm(dtype=torch.float64)
    prompts = [vlm.prompt(tiny.picture(at), "is there a red dog in the image ?") for at in range(count)]
    ends = [[plain(vlm, one) for one in (prompt, prompt.with_image(mv.images.black))] for prompt in prompts]
    return vlm, prompts, [TINY if real > null else mv.logit_difference("no", "yes") for real, null in ends]


@functools.cache
def compared_once() -> xr.Dataset:
    """What is found of two maps on these questions."""
    return mv.compare_maps(*asked(), ["attention", "occlusion"], samples=2)


def test_what_is_said_of_maps_follows_from_their_curves() -> None:
    vlm, prompts, metrics = asked()
    found = compared_once()
    assert found.attrs["left_out"] == 0
    for number, prompt in enumerate(prompts):
        one = found.isel(prompt=number)
        added = float(one.value - one.null_value)
        scaled = (one.curve.sel(map="attention", mode="insertion") - one.null_value) / added
        counts = np.ceil(np.array(compared.SHARES) * 16)
        height = np.trapezoid(scaled, counts / 16)
        assert float(one.area.sel(map="attention", mode="insertion")) == pytest.approx(height, rel=1e-9)
        gained = (one.random - one.curve.sel(map="attention"))[..., 1:-1].mean(["share", "sample"]) / added
        sign = xr.DataArray([1, -1], dims="mode", coords={"mode": one["mode"]})
        np.testing.assert_allclose(one.advantage.sel(map="attention"), gained * sign, rtol=1e-9)
        own = mv.occlusion(vlm, prompt, metrics[number]).attribution.values
        np.testing.assert_allclose(one.attribution.sel(map="occlusion"), own, rtol=1e-9, atol=1e-12)
        weights = np.stack([vlm.run(prompt, [f"text.{at}.pattern"])[f"text.{at}.pattern"][0, :, -1] for at in range(3)])
        looked = weights.mean((0, 1))[prompt.image]
        np.testing.assert_allclose(one.attribution.sel(map="attention"), looked, rtol=1e-9)
        same = scipy.stats.spearmanr(looked, own).statistic
        assert float(one.agreement.sel(map="attention", other="occlusion")) == pytest.approx(same, rel=1e-9)
    added = (found.value - found.null_value).values
    mean = (found.advantage.values * added[:, None, None]).sum(0) / added.sum()
    np.testing.assert_allclose(found.advantage_mean, mean, rtol=1e-9)


def test_signs_are_drawn_by_cluster_as_scipy_draws_them() -> None:
    values = np.random.default_rng(0).normal(0.5, 1, 8)
    clusters = [0, 0, 1, 2, 3, 3, 4, 5]
    sums = np.bincount(clusters, values)
    exact = scipy.stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    found = sign_flips(xr.DataArray(values, dims="prompt"), clusters)
    assert float(found) == pytest.approx(exact.pvalue, rel=1e-12)
    many = sign_flips(xr.DataArray(np.ones(20), dims="prompt"))
    assert float(many) == 1e-4  # of 9,999 draws none is as far
    assert np.isnan(float(sign_flips(xr.DataArray([1.0, 2.0], dims="prompt"), ["a", "a"])))


def test_holm_is_the_closed_test_by_bonferroni() -> None:
    p = np.random.default_rng(0).random(6) ** 3
    every = [some for size in range(1, 7) for some in combinations(range(6), size)]
    closed = [max(min(1.0, len(some) * p[list(some)].min()) for some in every if at in some) for at in range(6)]
    np.testing.assert_allclose(holm(p), closed, rtol=1e-12)


def test_the_figure_has_each_map_over_the_picture_and_both_curves() -> None:
    vlm, prompts, metrics = asked()
    found = compared_once()
    figure = mv.plot.compared_maps(found, prompts[1], 1)
    heats = [trace for trace in figure.data if trace.type == "heatmap"]
    shown = heats[1].customdata[3::6, 3::6]  # one pixel of each square
    np.testing.assert_allclose(shown.ravel(), found.attribution.sel(map="occlusion")[1])
    assert float(np.abs(np.asarray(heats[1].z)).max()) == pytest.approx(1)
    lines = [trace for trace in figure.data if trace.name == "attention"]
    assert [trace.showlegend for trace in lines] == [True, False]
    np.testing.assert_allclose(lines[1].y, found.curve[1].sel(map="attention", mode="insertion"))
    gained = found.advantage[1].sel(map="attention")
    words = f"deletion {float(gained[0]):+.2f}, insertion {float(gained[1]):+.2f}"
    assert figure.layout.annotations[0].text == f"<b>attention</b><br>{words}"
    both = mv.deletion_curve(vlm, prompts[0], mv.attention_map(vlm, prompts[0], 1), TINY, samples=1, mode="both")
    assert {trace.line.dash for trace in mv.plot.deletion(both).data} >= {"solid", "dash"}


def compare(**wrong: Any) -> object:
    vlm, real, null = one_token()
    given: dict[str, Any] = {"maps": ["random"], "null": [null], "samples": 1, **wrong}
    return mv.compare_maps(vlm, [real], METRIC, **given)


def curve(**wrong: Any) -> object:
    vlm, real, null = one_token()
    return mv.deletion_curve(vlm, real, mv.attention_map(vlm, real, 1), METRIC, **{"null": null, **wrong})


def draw(**wrong: Any) -> object:
    given: dict[str, Any] = {"found": compared_once(), "prompt": asked()[1][0], **wrong}
    return mv.plot.compared_maps(**given)


KNOWN = (
    "occlusion, attribution_patching, input_times_gradient, integrated_gradients, smooth_grad, gradient_attention, "
    "relevancy, direct_logits, attention_rollout, attention, random"
)
READY = (
    "at='pixels' takes squares out of the picture itself, and this prompt was made from a ready encoding; make it with "
    "vlm.prompt(image, text), or take at='image_features'."
)
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (curve, {"mode": "back"}, "mode='back' is not known; choose from 'deletion', 'insertion', 'both'."),
    (curve, {"at": "text"}, "at='text' is not where a picture enters; choose from 'image_features', 'pixels'."),
    (curve, {"at": "pixels"}, READY),
    (compare, {"at": "pixels"}, READY),
    (
        compare,
        {"maps": ["chance"]},
        f"maps holds 'chance', which is no map that is known; choose from {KNOWN}, or give a mapping from a name to a "
        "function of a prompt.",
    ),
    (compare, {"maps": ["random", "random"]}, "maps holds 'random' more than once; give each map once."),
    (compare, {"maps": []}, "maps=[] names no maps; give a list such as ['relevancy', 'attention']."),
    (compare, {"maps": "random"}, "maps='random' names no maps; give a list such as ['relevancy', 'attention']."),
    (
        compare,
        {"maps": {"mine": 3}},
        "maps holds 3, which is neither the name of a map nor a function; write for instance {'mine': lambda prompt: "
        "mv.attention_map(vlm, prompt, 3)}.",
    ),
    (
        compare,
        {"maps": {"mine": lambda _: xr.Dataset()}},
        "a function of maps returned a Dataset and no DataArray; choose a variable, like mv.relevancy(vlm, prompt, "
        "metric).relevancy.",
    ),
    (
        compare,
        {"maps": {"mine": lambda _: xr.DataArray([1.0], dims="position", coords={"position": [2]})}},
        "the map 'mine' has axes position of 1 numbers; it must have one for each of the prompt's 16 image tokens, "
        "over axis position.",
    ),
    (compare, {"null": []}, "null has 0 prompts for 1; give one for each, or one for all."),
    (compare, {"shares": [2]}, "shares=[2] are no shares of the image tokens; give numbers from 0 to 1."),
    (compare, {"samples": 0}, "samples=0 compares with nothing; give 1 random order or more."),
    (
        lambda **wrong: mv.occlusion(*one_token()[:2], METRIC, one_token()[2], **wrong),
        {"block": 0},
        "block=0 takes nothing away; give 1, or more rows and columns together.",
    ),
    (
        draw,
        {"found": xr.Dataset({"mass": 1})},
        "compared_maps draws what compare_maps returns, and was given a Dataset with mass; make it with "
        "mv.compare_maps(vlm, prompts, metric).",
    ),
    (draw, {"number": 2}, "there is no prompt 2; 2 were compared, counted from 0."),
    (draw, {"maps": ["x"]}, "maps=['x'] are not all among those compared, which are attention, occlusion."),
    (draw, {"image": 1}, "there is no picture 1; the prompt holds 1, counted from 0."),
    (
        draw,
        {"prompt": tiny.vlm().prompt(tiny.picture(), "is there a cat ?")},
        "prompt 0 of those compared asks 'is there a red dog in the image ?', with 16 image tokens, and 'is there a "
        "cat ?', with 16, was given; give the prompt with that number.",
    ),
]


@pytest.mark.parametrize("call, wrong, message", WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_is_refused(call: Any, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((ValueError, TypeError)) as caught:
        call(**wrong)
    assert str(caught.value) == message


def test_pixels_of_a_null_picture_that_is_not_there_are_refused() -> None:
    vlm = tiny.vlm()
    real = vlm.prompt(tiny.picture(), "is there a cat ?")
    null = vlm.prompt(encoding=real.with_image(mv.images.black).encoding)
    with pytest.raises(ValueError) as caught:
        mv.occlusion(vlm, real, TINY, null, at="pixels")
    assert str(caught.value) == (
        "at='pixels' puts squares of the null picture into the picture, and null was made from a ready encoding; make "
        "it with prompt.with_image, or take at='image_features'."
    )
    with pytest.raises(ValueError, match="batch_size=0 runs nothing"):
        mv.occlusion(vlm, real, TINY, at="pixels", batch_size=0)
