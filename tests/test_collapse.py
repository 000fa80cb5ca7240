"""Layers with the real picture and with a null one, and gradients by layer: plain hooks, planted truth, by hand."""

import functools
import json
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
import zoo
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mechvlm as mv
from mechvlm.experiments import collapse, nulls, updates
from mechvlm.experiments.published import lower_case_token, spans_of
from mechvlm.experiments.visual_gradient import decay_rate
from mechvlm.references import layer_at, placed

METRIC = mv.logit_difference(30, 31)
LAYOUTS = ["llava", "llava_next-vicuna", "qwen2_vl", "qwen3_vl"]  # one grid, tiles, m-rope, features behind layers
VIAR = Path(__file__).parent / "data" / "viar"


@functools.cache
def made(name: str) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """A model, a prompt, and the same about another picture."""
    vlm = zoo.build(name, dtype=torch.float64)
    return vlm, zoo.ask(vlm, tiny.picture(0, 48, 40)), zoo.ask(vlm, tiny.picture(1, 48, 40))


def streams(vlm: mv.VLM, prompt: mv.Prompt, grad: bool = False) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """What enters and leaves each layer, by plain hooks; the last state after the final norm; the last logits."""
    before, after, hooks = [], [], []
    for number in range(vlm.shape.layers["text"]):

        def enters(module: Any, args: tuple, named: dict) -> None:  # noqa: ARG001
            before.append(args[0] if args else named["hidden_states"])

        def leaves(module: Any, args: tuple, out: Any) -> Any:  # noqa: ARG001
            state = out[0] if isinstance(out, tuple) else out
            after.append(state.requires_grad_(True) if grad and not state.requires_grad else state)

        layer = layer_at(vlm, "text", number)
        hooks += [layer.register_forward_pre_hook(enters, with_kwargs=True), layer.register_forward_hook(leaves)]
    with torch.set_grad_enabled(grad):
        out = vlm.hf(**placed(vlm, prompt), use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return before, after, out.hidden_states[-1], out.logits[0, -1]


def cosine(pair: list[Tensor]) -> Tensor:
    """Position by position."""
    return cosine_similarity(pair[0], pair[1], dim=-1)


def table(name: str) -> dict[str, np.ndarray]:
    """A published table by layer."""
    held = json.loads((VIAR / f"{name}.json").read_text())["by_layer"]
    return {key: np.array(values, dtype=float) for key, values in held.items()}


# Real and null


@pytest.mark.parametrize("name", LAYOUTS)
def test_collapse_is_the_cosine_of_what_plain_hooks_see(name: str) -> None:
    vlm, real, null = made(name)
    found = mv.language_prior_collapse(vlm, real, {"other": [null]}).isel(prompt=0, null=0)
    own = [streams(vlm, prompt)[:3] for prompt in (real, null)]
    for layer in found.layer.values:
        left = [run[1][layer][0] for run in own]
        update = [run[1][layer][0] - run[0][layer][0] for run in own]
        here = found.sel(layer=layer)
        for span, held in {**real.spans, "text": real.question + real.last}.items():
            expected = {
                "update_cosine": cosine(update),
                "state_cosine": cosine(left),
                "norm": left[0].norm(dim=-1),
                "null_norm": left[1].norm(dim=-1),
                "norm_difference": left[0].norm(dim=-1) - left[1].norm(dim=-1),
                "distance": (left[0] - left[1]).norm(dim=-1),
            }
            for number, values in expected.items():
                got = float(here[number].sel(span=span))
                assert got == pytest.approx(float(values[held].mean()), abs=1e-10), (span, number)
    normed = [run[2][0] for run in own]
    changed = [run[2][0] - run[0][-1][0] for run in own]
    for number, pair in {"update_cosine_normed": changed, "state_cosine_normed": normed}.items():
        expected_last = float(cosine(pair)[real.last].mean())
        assert float(found[number].sel(span="last")) == pytest.approx(expected_last, abs=1e-10)
    assert bool(found.update_cosine.sel(span="bos").isnull().all()) == ("bos" not in real.spans)


def test_the_published_convention_is_hidden_states_over_the_first_columns() -> None:
    vlm, real, null = made("llava")
    found = mv.language_prior_collapse(vlm, real, {"black": [null]}, convention="viar-2026").isel(prompt=0, null=0)
    count = len(real.image)
    rows = {"image": slice(0, count), "text": slice(count, None)}
    with torch.no_grad():
        states = [
            vlm.hf(**placed(vlm, one), use_cache=False, output_hidden_states=True).hidden_states[1:]
            for one in (real, null)
        ]
    for span, kept in rows.items():
        own = found.sel(span=span)
        raw = [float(cosine([s[layer][0] for s in states])[kept].mean()) for layer in range(3)]
        np.testing.assert_allclose(own.state_cosine, raw, rtol=0, atol=1e-10)
        updates = [np.nan]
        for layer in (1, 2):
            pair = [s[layer][0] - s[layer - 1][0] for s in states]
            updates.append(float(cosine(pair)[kept].mean()))
        np.testing.assert_allclose(own.update_cosine, updates, rtol=0, atol=1e-10)
        norms = [[float(one[layer][0].norm(dim=-1)[kept].mean()) for layer in range(3)] for one in states]
        np.testing.assert_allclose(own.norm, norms[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(own.norm_difference, np.subtract(norms[0], norms[1]), rtol=0, atol=1e-10)
    assert found.attrs["convention"] == "viar-2026" and "update_cosine_normed" not in found


def test_both_conventions_by_hand() -> None:
    """A layer that adds (1, 0) to the real run and (0, 1) to the null, and a "norm" that turns both to (1, 1)."""
    before = torch.tensor([[[0.0, 2.0]], [[2.0, 0.0]]])
    after = before + torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    reduced = updates.Reduced([[0]], torch.ones_like)
    reduced.enters(before)
    both = reduced.last(after)[:, :, :, 0]
    update, state, norm, apart = both[1, 0].tolist()
    assert (update, state) == (0.0, pytest.approx(4 / 5))
    assert (norm, apart) == (pytest.approx(5**0.5), pytest.approx(2**0.5))
    # After the norm the "updates" are (1, -1) and (-1, 1), whatever the layer did, and the states are the same.
    assert both[1, 1].tolist() == pytest.approx([-1.0, 1.0, 2**0.5, 0.0])
    layers = [np.full((2, 4, 1), 0.5), both[:, 0, :, None].numpy()]
    right, old = (
        collapse.tabled(layers, both[:, 1, :, None].numpy(), 1, as_published) for as_published in (False, True)
    )
    assert right["update_cosine"][:, 0].tolist() == [0.5, 0.0] and right["update_cosine_normed"][0] == pytest.approx(-1)
    assert np.isnan(old["update_cosine"][0, 0]) and old["update_cosine"][1, 0] == pytest.approx(-1)
    still = layers[1].copy()
    still[1, 0] = np.nan  # nothing is added anywhere
    assert collapse.tabled([layers[0], still], still, 1, True)["update_cosine"][1, 0] == 1
    still[1] = np.nan  # a state that is no number
    assert np.isnan(collapse.tabled([layers[0], still], still, 1, True)["update_cosine"][1, 0])
    assert right["state_cosine"][1, 0] == pytest.approx(4 / 5) and old["state_cosine"][1, 0] == pytest.approx(1)
    assert right["norm"][1, 0] == pytest.approx(5**0.5) and old["norm"][1, 0] == pytest.approx(2**0.5)


def test_the_columns_of_the_convention_are_the_first_ones() -> None:
    """Three positions stand before the picture, so that its last three tokens count as text, and those three as it."""
    _, real, _ = made("llava")
    right, old = spans_of(real, ["image", "text"]), spans_of(real, ["image", "text"], "viar-2026")
    assert (right["image"][0], old["image"][0], old["image"][-1]) == (3, 0, 15)
    assert old["text"] == [*real.image[-3:], *real.question, *real.last]


def test_a_position_that_nothing_is_added_to_has_no_direction() -> None:
    before = torch.zeros(2, 3, 2)
    after = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    update = updates.by_span(updates.compared(before, after), [[0, 1], [0], [1, 2]])[1, 0]
    assert update[0] == 1 and update[1].isnan() and update[2] == 0.5


def test_the_published_table_has_the_marks_of_its_convention() -> None:
    """No first update; the black picture's states the same for all questions; a jump where the final norm comes in."""
    held = table("collapse")
    update, raw = held["residual_cosine_sim_mean"], held["raw_cosine_sim_mean"]
    assert np.flatnonzero(np.isnan(update)).tolist() == [0]
    np.testing.assert_allclose(
        held["vis_norm_real_mean"] - held["vis_norm_black_mean"], held["vis_norm_difference"], rtol=0, atol=1e-9
    )
    means = [update[1], update[2:8].mean(), update[8:17].mean(), update[17:31].mean(), update[30], update[31]]
    assert np.round(means, 3).tolist() == pytest.approx([0.923, 0.819, 0.699, 0.655, 0.805, 0.921], abs=1e-12)
    assert (int(np.nanargmin(update)), int(raw.argmin())) == (25, 21)
    # Of all steps from layer to layer the last is the greatest, in updates and in the black picture's norm.
    assert (
        int(np.nanargmax(np.abs(np.diff(update)))) == int(np.abs(np.diff(held["vis_norm_black_mean"])).argmax()) == 30
    )
    # 200 questions about one black picture have one norm: a value of half precision, in steps of 1/32 or 1/16.
    assert np.all(held["vis_norm_black_mean"] * 32 % 1 == 0)


def test_a_black_picture_before_the_words_is_the_same_for_all_questions() -> None:
    """What makes the published norms of the black picture so round; the image's positions see none of the question."""
    vlm = tiny.vlm()
    asked = [vlm.prompt(tiny.picture(seed), text) for seed, text in enumerate(["is there a dog", "what is red ?"])]
    found = mv.language_prior_collapse(vlm, asked, "black", spans=["image", "text"])
    first, second = found.null_norm.sel(span="image", null="black").values
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert np.abs(np.diff(found.norm.sel(span="image"), axis=0)).min() > 1e-4


def test_where_text_is_cut_from_the_picture_nothing_of_it_arrives() -> None:
    """Planted: words see the picture in layer 1 alone. Before it they are the same, and from it on they are not."""
    vlm, real, null = made("llava")
    words = [*real.question, *real.last]
    blind = vlm.with_edits([mv.cut_attention(layer, real.image, words) for layer in (0, 2)])
    found = mv.language_prior_collapse(blind, real, {"other": [null]}).isel(prompt=0, null=0)
    update, state = found.update_cosine, found.state_cosine
    assert float(state.sel(span="text", layer=0)) == pytest.approx(1, abs=1e-12)
    assert (state.sel(span="text").values[1:] < 0.999).all() and (update.sel(span="text").values[1:] < 0.999).all()
    assert (state.sel(span="image") < 0.999).all() and (update.sel(span=["bos", "prefix"]) > 1 - 1e-12).all()


def test_where_words_are_made_alike_and_cut_off_the_picture_has_stopped_mattering() -> None:
    """Planted: before layer 2 the words get the null's states, and no longer see the picture: collapse from 2 on."""
    vlm, real, null = made("llava")
    words, site = [*real.question, *real.last], mv.Site("resid_pre", 2)
    same = mv.patch(site, vlm.run(null, read=[site])[site], positions=words)
    blind = vlm.with_edits([same, mv.cut_attention(2, real.image, words)])
    update = mv.language_prior_collapse(blind, real, {"other": [null]}).update_cosine.sel(span="text")[0, 0].values
    assert (update[:2] < 0.999).all() and update[2] == pytest.approx(1, abs=1e-12)


def test_the_hand_built_head_writes_opposite_answers() -> None:
    """A bright and a dark picture: one layer writes anything at all, at the last position, in opposite directions."""
    vlm, bright, dark, layer, _ = planted.planted()
    found = mv.language_prior_collapse(vlm, bright, {"dark": [dark]}, spans="last")
    update = found.update_cosine.sel(span="last", null="dark", prompt=0).values
    assert np.flatnonzero(np.isfinite(update)).tolist() == [layer] and update[layer] == pytest.approx(-1, abs=1e-5)


def test_several_nulls_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.vlm(dtype=torch.float64)
    asked = [vlm.prompt(tiny.picture(seed), "is there a dog") for seed in (0, 0, 1)]
    every = ["black", "noise", "blur", "swap", "no_image"]
    found = mv.language_prior_collapse(vlm, asked, every, clusters=[0, 0, 1])
    monkeypatch.setattr(collapse, "rows_for", lambda prompt: 3)  # noqa: ARG005
    few = mv.language_prior_collapse(vlm, asked, every, clusters=[0, 0, 1])
    xr.testing.assert_allclose(found, few, rtol=0, atol=1e-10)
    one = mv.language_prior_collapse(vlm, asked[0], mv.images.noise())
    np.testing.assert_allclose(one.update_cosine[0, 0], found.update_cosine.sel(null="noise")[0], rtol=0, atol=1e-10)
    above = found.update_cosine.sel(null="black") - found.update_cosine.sel(null="swap")
    np.testing.assert_allclose(found.above_swap.sel(null="black"), above, rtol=0, atol=1e-12)
    own = mv.mean_interval(found.update_cosine, "prompt", [0, 0, 1])
    np.testing.assert_array_equal(found.update_cosine_low, own.low)
    assert found.attrs["interval"] == "95% percentile bootstrap over 2 clusters"
    assert "noise: noise(seed=0)" in found.attrs["nulls"]


def test_a_swap_is_the_next_prompts_other_picture() -> None:
    vlm = tiny.vlm()
    pictures = [tiny.picture(seed) for seed in (0, 0, 1)]
    asked = [vlm.prompt(picture, "is there a dog") for picture in pictures]
    swapped = nulls.null_prompts(vlm, asked, "swap")["swap"]
    seen = [one.pictures[0].tobytes() for one in swapped]
    assert seen == [pictures[2].tobytes(), pictures[2].tobytes(), pictures[0].tobytes()]


def test_without_the_picture_words_are_matched_from_the_end() -> None:
    vlm, real, _ = made("llava")
    blind = vlm.prompt(None, real.words)
    found = mv.language_prior_collapse(vlm, real, "no_image").isel(prompt=0, null=0)
    own = [streams(vlm, prompt) for prompt in (real, blind)]
    same = [at for at in real.question if at - len(real) >= -nulls.common_end(real, blind)]
    assert len(same) >= len(real.words.split())
    for layer in range(3):
        update = [run[1][layer][0] - run[0][layer][0] for run in own]
        for span, held in {"question": same, "last": real.last}.items():
            rows = [at - len(real) for at in held]
            expected = float(cosine([one[rows] for one in update]).mean())
            assert float(found.update_cosine.sel(span=span, layer=layer)) == pytest.approx(expected, abs=1e-10)
    assert found.update_cosine.sel(span=["bos", "prefix", "image"]).isnull().all()
    last = [run[2][0, -1] - run[0][-1][0, -1] for run in own]
    assert float(found.update_cosine_normed.sel(span="last")) == pytest.approx(float(cosine(last)))


def two_about_one(vlm: mv.VLM) -> list[mv.Prompt]:
    return [vlm.prompt(tiny.picture(seed), text) for seed, text in ((0, "is there"), (0, "is a dog"), (1, "is there"))]


def test_prompts_about_one_picture_are_one_cluster_unless_others_are_named() -> None:
    vlm = tiny.vlm()
    asked = two_about_one(vlm)
    for measure in (mv.language_prior_collapse, functools.partial(mv.gradient_by_layer, metric=METRIC)):
        assert measure(vlm, asked).attrs["interval"].endswith("over 2 clusters")
    assert mv.language_prior_collapse(vlm, asked, clusters=[1, 2, 3]).attrs["interval"].endswith("3 clusters")


def refused(wrong: Any) -> str:
    """The sentence of a refusal, of a model that must not run."""
    vlm = tiny.vlm()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(vlm), "run", lambda *_, **__: pytest.fail("the model ran"))
        with pytest.raises(ValueError) as caught:
            wrong(vlm, two_about_one(vlm))
    return str(caught.value)


WRONG: list[tuple[Any, str]] = [
    (
        lambda vlm, asked: mv.language_prior_collapse(vlm, asked, clusters=[1]),
        "clusters=[1] must name one cluster for each of the 3 prompts.",
    ),
    (
        lambda vlm, asked: mv.gradient_by_layer(vlm, asked, METRIC, [1]),
        "clusters=[1] must name one cluster for each of the 3 prompts.",
    ),
    (
        lambda vlm, asked: mv.language_prior_collapse(vlm, asked, {"swap": "black"}),
        "nulls calls 'black' by the name of another null, 'swap'; give it a name of its own.",
    ),
    (
        lambda vlm, asked: mv.language_prior_collapse(vlm, asked, {"swap": mv.images.noise(3)}),
        "nulls calls 'noise' by the name of another null, 'swap'; give it a name of its own.",
    ),
    (
        lambda vlm, asked: mv.gradient_by_layer(vlm, asked, METRIC, between=1),  # type: ignore[arg-type]
        "between=1 must be two layers, the lower first, below the last of 3, whose gradient is zero; give for instance "
        "between=(0, 1).",
    ),
    (
        lambda vlm, asked: mv.language_prior_collapse(vlm, asked, convention="viar-2026-mistral"),
        "convention='viar-2026-mistral' is a way to take positions that layer_profile alone knows; choose None for "
        "correct positions, or 'viar-2026' for what was published.",
    ),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_cannot_be_is_refused_before_the_model_runs(wrong: Any, message: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert refused(wrong) == message
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# Gradients


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_by_layer_are_plain_autograd(name: str) -> None:
    vlm, real, null = made(name)
    found = mv.gradient_by_layer(vlm, real, METRIC, nulls={"other": [null]}, between=(0, 1)).isel(prompt=0)
    for picture, prompt in {"real": real, "other": null}.items():
        _, after, _, logits = streams(vlm, prompt, grad=True)
        gradients = torch.autograd.grad(logits[30] - logits[31], after)
        for layer, (state, gradient) in enumerate(zip(after, gradients, strict=True)):
            g, h = gradient[0].norm(dim=-1), state[0].detach().norm(dim=-1)
            own = found.sel(picture=picture, layer=layer)
            for span in found.span.values.tolist():
                for variable, values in {"gradient_norm": g, "state_norm": h, "relative": g * h}.items():
                    expected = float(values[real.spans.get(span, [])].mean())
                    got = float(own[variable].sel(span=span))
                    assert got == pytest.approx(expected, rel=1e-9, abs=1e-14, nan_ok=span not in real.spans)
    at_end = found.gradient_norm.isel(layer=-1)
    assert (at_end.sel(span=["image", "question"]) == 0).all() and (at_end.sel(span="last") > 0).all()
    assert found.by_construction.sel(span="image").values.tolist() == [*[False] * (len(found.layer) - 1), True]


def test_rates_and_ratios_are_a_straight_line_fitted_by_numpy() -> None:
    vlm = tiny.vlm(dtype=torch.float64, layers=5)
    asked = [vlm.prompt(tiny.picture(seed), "is there a dog") for seed in range(3)]
    found = mv.gradient_by_layer(vlm, asked, METRIC, [0, 0, 1], between=(1, 3))
    for prompt in range(3):
        for picture, span in (("real", "image"), ("black", "image"), ("real", "question")):
            own = found.gradient_norm.sel(prompt=prompt, picture=picture, span=span).values
            slope = -np.polyfit(range(4), np.log(own[:4]), 1)[0]
            one = found.sel(prompt=prompt, picture=picture, span=span)
            assert float(one.rate) == pytest.approx(slope, abs=1e-10)
            assert float(one.expected) == pytest.approx(2 * slope, abs=1e-10)
            image = found.gradient_norm.sel(prompt=prompt, picture="real", span="image").values
            assert float(one.excess) == pytest.approx(np.log(image[1] / image[3]) - 2 * slope, abs=1e-10)
            beyond = np.log(image[1] / image[3]) - np.log(own[1] / own[3])
            assert float(one.excess_measured) == pytest.approx(beyond, abs=1e-10)
    own_interval = mv.mean_interval(found.excess, "prompt", [0, 0, 1])
    np.testing.assert_array_equal(found.excess_high, own_interval.high)


def test_an_exponential_decay_has_its_rate() -> None:
    falls = np.exp(-np.outer([0.1, 0.7], np.arange(6)))
    np.testing.assert_allclose(decay_rate(falls), [0.1, 0.7], atol=1e-12)
    falls[1, 4:] = 0  # zeros have no logarithm, and are left out
    np.testing.assert_allclose(decay_rate(falls), [0.1, 0.7], atol=1e-12)
    assert np.isnan(decay_rate(np.array([1.0, 0.0, np.nan])))


def test_the_published_gradients_end_in_zero_and_fall_fast_in_the_middle() -> None:
    """ "5 times" is layer 8 over layer 16; by the curve's own mean decay it would be 2.5."""
    mean = table("gradients")["mean_vis_grad_norm"]
    assert mean[31] == 0 and (mean[:31] > 0).all()
    assert mean[8] / mean[16] == pytest.approx(4.7, abs=0.05)
    rate = float(decay_rate(mean))
    assert rate == pytest.approx(-np.polyfit(range(31), np.log(mean[:31]), 1)[0], abs=1e-12)
    assert np.exp(8 * rate) == pytest.approx(2.513, abs=1e-3)


def test_a_gradient_ends_where_nothing_looks_at_the_picture_any_more() -> None:
    """Planted: from layer 2 of 4 on no other position sees the picture; what layer 1 leaves there reaches nothing."""
    vlm = tiny.vlm(layers=4)
    real = vlm.prompt(tiny.picture(), "is there a dog")
    cuts = [mv.cut_attention(layer, real.image, [*real.question, *real.last]) for layer in (2, 3)]
    found = mv.gradient_by_layer(vlm.with_edits(cuts), real, METRIC).isel(prompt=0).sel(picture="real")
    image = found.gradient_norm.sel(span="image").values
    assert image[0] > 0 and not image[1:].any()
    assert (found.gradient_norm.sel(span="question").values[:3] > 0).all()
    assert found.rate.isnull().sel(span="image") and found.rate.notnull().sel(span="question")


def test_the_hand_built_head_takes_the_gradient_from_the_picture_to_the_last_position() -> None:
    vlm, bright, dark, layer, _ = planted.planted()
    yes = mv.logit_difference(planted.YES, planted.NO)
    found = mv.gradient_by_layer(vlm, bright, yes, nulls={"dark": [dark]}).isel(prompt=0).sel(picture="real")
    norms = found.gradient_norm
    assert np.flatnonzero(norms.sel(span="image")).tolist() == list(range(layer))
    assert (norms.sel(span="last") > 0).all() and not norms.sel(span="question").any()


def test_prompts_of_several_lengths_are_those_one_by_one() -> None:
    vlm = tiny.vlm(dtype=torch.float64)
    asked = [vlm.prompt(tiny.picture(n), text) for n, text in enumerate(["is there", "what is red ?", "is a dog"])]
    found = mv.gradient_by_layer(vlm, asked, METRIC)
    for number, prompt in enumerate(asked):
        one = mv.gradient_by_layer(vlm, prompt, METRIC)
        np.testing.assert_allclose(one.relative[0], found.relative[number], rtol=0, atol=1e-10)


def test_the_published_gradient_is_of_one_token_at_the_first_columns() -> None:
    vlm = tiny.vlm(dtype=torch.float64)
    real = vlm.prompt(tiny.picture(), "is there a dog")
    found = mv.gradient_by_layer(vlm, real, convention="viar-2026").isel(prompt=0, picture=0)
    _, after, _, logits = streams(vlm, real, grad=True)
    token = lower_case_token(vlm, "yes")
    assert vlm.word(token) == "yes"
    gradients = torch.autograd.grad(logits[token], after)
    expected = [float(one[0, : len(real.image)].norm(dim=-1).mean()) for one in gradients]
    np.testing.assert_allclose(found.gradient_norm.sel(span="image"), expected, rtol=0, atol=1e-12)
    assert found.span.values.tolist() == ["image"] and found.attrs["nulls"] == "none"


def test_of_a_words_spellings_the_published_token_is_the_one_written_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.vlm()
    ids = {"yes": [9], " yes": [8], "Yes": [7], " Yes": [6]}
    monkeypatch.setattr(vlm.processor.tokenizer, "encode", lambda word, **_: ids[word])
    assert (vlm.token_ids("yes"), lower_case_token(vlm, "Yes")) == ([6, 7, 8, 9], 9)


# Figures


def test_the_curves_are_the_means_and_their_right_panel_ends_after_the_norm() -> None:
    vlm = tiny.vlm()
    asked = [vlm.prompt(tiny.picture(seed), "is there a dog") for seed in range(3)]
    found = mv.language_prior_collapse(vlm, asked, ["black", "swap"])
    figure = mv.plot.collapse_curves(found, span="last")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.fill == "tonexty"]
    assert [trace.name for trace in lines] == ["black", "swap"] * 2
    for trace, band, null in zip(lines[:2], bands[:2], ("black", "swap"), strict=True):
        own = found.sel(null=null, span="last")
        np.testing.assert_array_equal(trace.y, own.update_cosine_mean)
        np.testing.assert_array_equal(band.y, own.update_cosine_high)
    assert lines[2].y[-1] == float(found.update_cosine_normed_mean.sel(null="black", span="last"))
    np.testing.assert_array_equal(lines[2].y[:-1], lines[0].y[:-1])
    old = mv.language_prior_collapse(vlm, asked[0], convention="viar-2026")
    alone = mv.plot.collapse_curves(old)
    assert [one.text for one in alone.layout.annotations] == [
        "Outputs of layers, the last after the final norm",
        "Positions: text. One prompt.",
    ]


def test_the_decay_is_drawn_without_zeros_and_with_what_is_expected() -> None:
    vlm = tiny.vlm(layers=5)
    asked = [vlm.prompt(tiny.picture(seed), "is there a dog") for seed in range(2)]
    found = mv.gradient_by_layer(vlm, asked, METRIC, between=(1, 3))
    figure = mv.plot.gradient_decay(found, spans=["image", "last"])
    drawn = {trace.name: trace for trace in figure.data if "markers" in trace.mode}
    assert list(drawn) == ["image, real", "image, black", "last, real", "last, black"]
    real = found.gradient_norm_mean.sel(picture="real", span="image").values
    np.testing.assert_array_equal(drawn["image, real"].y, [*real[:4], np.nan])
    assert np.isfinite(drawn["last, real"].y).all() and figure.layout.yaxis.type == "log"
    expected = figure.data[-1]
    rate = float(found.rate_mean.sel(picture="black", span="image"))
    np.testing.assert_allclose(expected.y, real[1] * np.exp(-rate * np.arange(3)), rtol=1e-9)
    assert list(expected.x) == [1, 2, 3]
