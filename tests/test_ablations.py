"""Ablations of parts, places and image tokens against plain hooks on the Hugging Face model, and what was planted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.examples import p_values
from mechvlm.experiments.means import KINDS

YES = mv.logit_difference("yes", "no")
PLANTED = mv.logit_difference(planted.YES, planted.NO)
LAYERS, HEADS, WIDTH = 3, 4, 8
TEXTS = ("is there a red cat in the image ?", "is there a blue dog in the image ?", "is there no dog ?")


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def asked() -> tuple[mv.Prompt, ...]:
    """Two questions of one length about two pictures, and a shorter one."""
    return tuple(vlm().prompt(tiny.picture(seed), text) for seed, text in enumerate(TEXTS, 1))


@contextmanager
def hooked(changes: dict[str, Callable[[Tensor], Tensor]], model: mv.VLM | None = None) -> Iterator[None]:
    """Plain hooks: on what goes into a module where its path ends in "<", else on what comes out."""
    modules, handles = dict((model or vlm()).hf.named_modules()), []
    for path, change in changes.items():

        def before(_module: Any, given: tuple, change: Callable = change) -> tuple:
            return (change(given[0].clone()), *given[1:])

        def after(_module: Any, _given: tuple, made: Any, change: Callable = change) -> Any:
            return (change(made[0].clone()), *made[1:]) if isinstance(made, tuple) else change(made.clone())

        module = modules[path.removesuffix("<")]
        into = path.endswith("<")
        handles.append(module.register_forward_pre_hook(before) if into else module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def metric(prompt: mv.Prompt, changes: dict[str, Callable[[Tensor], Tensor]] | None = None) -> float:
    """Yes minus no of a plain forward pass with plain hooks."""
    with torch.no_grad(), hooked(changes or {}):
        logits = vlm().hf(**prompt.encoding).logits[0, -1]
    yes, no = (logits[vlm().token_ids(word)].logsumexp(-1) for word in ("yes", "no"))
    return float(yes - no)


def layer(number: int, part: str) -> str:
    return f"model.language_model.layers.{number}.{part}"


def without_heads(number: int, heads: Sequence[int], to: float = 0.0) -> dict[str, Callable[[Tensor], Tensor]]:
    def change(z: Tensor) -> Tensor:
        z.unflatten(-1, (HEADS, WIDTH))[:, :, list(heads)] = to
        return z

    return {layer(number, "self_attn.o_proj<"): change}


def heads_out(parts: Sequence[tuple[int, int]]) -> dict[str, Callable[[Tensor], Tensor]]:
    merged: dict[str, Callable[[Tensor], Tensor]] = {}
    for number in range(LAYERS):
        own = [head for at, head in parts if at == number]
        merged |= without_heads(number, own) if own else {}
    return merged


# -- one part at a time ----------------------------------------------------------------------------------------------


def test_ablated_heads_of_several_prompts_are_those_of_each_alone() -> None:
    found = mv.ablate_each(vlm(), asked()[1:], YES)
    for number, prompt in enumerate(asked()[1:]):
        assert abs(float(found.clean[number]) - metric(prompt)) < 1e-5
    assert np.abs(found.effect[1] - mv.ablate_each_head(vlm(), asked()[2], YES)).max() < 1e-6
    assert np.abs(found["mean"] - found.effect.values.mean(0)).max() < 1e-12
    assert bool((found.low <= found["mean"]).all()) and bool((found["mean"] <= found.high).all())


@pytest.mark.parametrize(
    ("what", "modules"), [("attention", ["self_attn"]), ("mlp", ["mlp"]), ("layer", ["self_attn", "mlp"])]
)
def test_ablated_blocks_equal_plain_hooks(what: str, modules: list[str]) -> None:
    prompt = asked()[0]
    found = mv.ablate_each(vlm(), prompt, YES, what).effect.sel(prompt=0)
    expected = [
        metric(prompt, {layer(at, one): torch.zeros_like for one in modules}) - metric(prompt) for at in range(LAYERS)
    ]
    assert np.abs(found - expected).max() < 2e-5
    assert np.abs(expected).max() > 0.01


def test_an_ablation_of_the_last_position_alone_equals_a_plain_hook() -> None:
    def last(x: Tensor) -> Tensor:
        x[:, -1] = 0
        return x

    found = mv.ablate_each(vlm(), asked(), YES, "mlp", positions=lambda prompt: prompt.last, layers=[1])
    expected = [metric(prompt, {layer(1, "mlp"): last}) - metric(prompt) for prompt in asked()]
    assert np.abs(found.effect.sel(layer=1) - expected).max() < 2e-5


def test_a_position_replaced_by_its_mean_equals_a_plain_hook() -> None:
    means = mv.mean_activations(vlm(), asked()[:2], "mlp_out", "each")

    def replaced(x: Tensor) -> Tensor:
        x[:, 5] = means[1][5]
        return x

    prompts = asked()[:2]
    found = mv.ablate_each(vlm(), prompts, YES, "position", means, [5, 20], kind="mlp_out", layers=[1])
    expected = [metric(prompt, {layer(1, "mlp"): replaced}) - metric(prompt) for prompt in prompts]
    assert np.abs(found.effect.sel(layer=1, position=5) - expected).max() < 2e-5
    assert np.abs(expected).max() > 1e-4


def test_patched_with_itself_nothing_changes() -> None:
    for what in ("layer", "region"):
        found = mv.ablate_each(vlm(), asked()[0], YES, what, to=lambda prompt: prompt)
        assert np.abs(found.effect).max() < 1e-5, what


def test_the_planted_layer_and_place_are_found_and_nothing_else() -> None:
    model, real, null, at, _ = planted.planted()
    clean = float(model.metric(PLANTED)(model.run(real).logits))
    for what, carries in (("attention", True), ("mlp", False), ("layer", True)):
        found = mv.ablate_each(model, real, PLANTED, what).effect[0]
        assert np.abs(found - np.where(np.arange(3) == at, -clean * carries, 0)).max() < 1e-4, what
    regions = {"image": real.image, "question": real.question, "last": real.last}
    dark = mv.ablate_each(model, real, PLANTED, "region", null, regions=regions).effect[0]
    carried = [[span == ("image" if number <= at else "last") for span in regions] for number in range(3)]
    assert np.abs(dark + 2 * clean * np.array(carried)).max() < 1e-4


# -- means -----------------------------------------------------------------------------------------------------------


def kept(prompt: mv.Prompt, path: str) -> Tensor:
    """What goes into a module in a plain forward pass."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x.clone())
        return x

    metric(prompt, {path: keep})
    return found[0][0]


def test_means_over_a_dataset_are_those_of_all_its_positions() -> None:
    own = [kept(prompt, layer(1, "self_attn.o_proj<")).unflatten(-1, (HEADS, WIDTH)) for prompt in asked()]
    means = mv.mean_activations(vlm(), asked())
    assert len(means) == LAYERS
    assert torch.allclose(means[1], torch.cat(own).mean(0), atol=1e-6)
    of_last = mv.mean_activations(vlm(), asked(), positions=lambda prompt: prompt.last)
    assert torch.allclose(of_last[1], torch.stack([x[-1] for x in own]).mean(0), atol=1e-6)
    each = mv.mean_activations(vlm(), asked()[:2], positions="each")
    assert torch.allclose(each[1], torch.stack(own[:2]).mean(0), atol=1e-6)


def test_means_have_the_shape_of_their_kind() -> None:
    one = asked()[0]
    shapes = {kind: tuple(mv.mean_activations(vlm(), one, kind)[0].shape) for kind in KINDS}
    assert shapes == {
        **dict.fromkeys(("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"), (HEADS * WIDTH,)),
        **dict.fromkeys(("q", "z"), (HEADS, WIDTH)),
        **dict.fromkeys(("k", "v"), (2, WIDTH)),
    }


# -- several parts ---------------------------------------------------------------------------------------------------


def test_parts_taken_out_in_order_equal_plain_hooks() -> None:
    order = [(2, 1), (0, 3), (2, 0)]
    found = mv.ablate_in_order(vlm(), asked()[:2], YES, order, controls=2)
    for number, prompt in enumerate(asked()[:2]):
        expected = [metric(prompt, heads_out(order[:count])) for count in range(4)]
        assert np.abs(found.ranked.sel(prompt=number) - expected).max() < 2e-5
    assert found.random.dims == ("prompt", "sample", "count")


def test_leaving_one_out_equals_plain_hooks() -> None:
    parts = [(2, 1), (0, 3), (2, 0)]
    found = mv.ablate_all_but(vlm(), asked()[0], YES, parts, controls=2)
    out = metric(asked()[0], heads_out(parts))
    assert abs(float(found.all_out[0]) - out) < 2e-5
    expected = [metric(asked()[0], heads_out([one for one in parts if one != part])) - out for part in parts]
    assert np.abs(found.effect.sel(prompt=0) - expected).max() < 2e-5
    assert found.part.values.tolist() == ["2.1", "0.3", "2.0"]


def test_the_planted_head_is_what_an_order_loses_and_random_sets_do_not() -> None:
    model, real, _, at, head = planted.planted()
    others = [(one, 0) for one in range(3)] + [(0, 1)]
    found = mv.ablate_in_order(model, real, PLANTED, [(0, 1), (at, head)], candidates=others, controls=4)
    assert np.abs(found.ranked.sel(prompt=0) / float(found.ranked[0, 0]) - [1, 1, 0]).max() < 1e-4
    assert found.p_value.values.tolist() == [1, 1, 1 / 5]
    alone = mv.ablate_all_but(model, real, PLANTED, [(0, 1), (at, head)], candidates=others, controls=4)
    assert np.abs(alone.effect[0] / float(alone.clean[0]) - [0, 1]).max() < 1e-4
    assert float(alone.p_value) == 1 / 5


def test_random_sets_count_themselves_among_those_that_do_as_much() -> None:
    ranked = xr.DataArray([0.0, 2.0], dims=["prompt"])
    random = xr.DataArray([[0.0, 3.0, 1.0], [1.0, 3.0, 1.0]], dims=["prompt", "sample"])  # means 0.5, 3, 1
    assert float(p_values(ranked, random)) == 3 / 4
    assert float(p_values(ranked, random, "higher")) == 3 / 4
    assert float(p_values(ranked - 1, random)) == 1 / 4


def test_the_strongest_parts_come_first_and_of_equal_ones_the_first() -> None:
    effects = xr.DataArray([[0.0, -2.0], [-2.0, 3.0]], dims=["layer", "head"], coords={"layer": [4, 6], "head": [0, 1]})
    assert mv.strongest(effects, 3) == [(4, 1), (6, 0), (4, 0)]
    assert mv.strongest(effects, 1, "higher") == [(6, 1)]
    assert mv.strongest(effects.sel(head=0, drop=True), 1) == [(6,)]


# -- a search --------------------------------------------------------------------------------------------------------


def test_a_search_takes_in_each_round_what_plain_hooks_find_best() -> None:
    pool = [(0, 3), (2, 0), (2, 1), (1, 2)]
    prompts = asked()[:2]
    found = mv.find_heads(vlm(), prompts, YES, 2, pool, objective="higher")
    taken: list[tuple[int, int]] = []
    for round_ in (1, 2):
        scores = {
            part: np.mean([metric(prompt, heads_out([*taken, part])) for prompt in prompts])
            for part in pool
            if part not in taken
        }
        taken.append(max(scores, key=lambda part: scores[part]))
        for part, score in scores.items():
            assert abs(float(found.score.sel(round=round_, candidate=f"{part[0]}.{part[1]}")) - score) < 2e-5
    assert mv.heads_found(found) == taken
    assert np.isnan(found.score.sel(round=2, candidate=f"{taken[0][0]}.{taken[0][1]}"))


def test_a_perturbation_may_know_the_prompt() -> None:
    """Rows that are other positions in each prompt."""
    model = vlm()
    prompts = [
        model.prompt(tiny.picture(), words) for words in ("is there a cat ?", "is there a red cat in the image ?")
    ]
    assert len(prompts[0]) != len(prompts[1])

    def softer(layer: int, heads: list[int], prompt: mv.Prompt) -> mv.Edit:
        return mv.soft_identity(layer, heads, 0.7, queries=prompt.last)

    found = mv.find_heads(model, prompts, YES, 1, [(1, 2)], perturb=softer)
    for at, prompt in enumerate(prompts):
        want = model.metric(YES)(model.run(prompt, edits=[mv.soft_identity(1, [2], 0.7, prompt.last)]).logits)
        assert abs(float(found.metric[at, 1]) - float(want[0])) < 1e-5


def test_a_search_finds_the_planted_head_and_says_so_of_prompts_held_out() -> None:
    model, real, null, at, head = planted.planted()
    metrics = [PLANTED, mv.logit_difference(planted.NO, planted.YES)]
    found = mv.find_heads(model, real, PLANTED, 1, held_out=[real, null], held_out_metric=metrics)
    assert mv.heads_found(found) == [(at, head)]
    assert np.abs(found.held_out / found.metric[0, 0] - [[1, 0], [1, 0]]).max() < 1e-4


@pytest.mark.parametrize("queries", [None, [-1]])
def test_softened_heads_mix_in_each_positions_own_value(queries: list[int] | None) -> None:
    prompt, share = asked()[0], 0.3
    at = None if queries is None else prompt.last
    value = kept(prompt, layer(1, "input_layernorm<"))
    with torch.no_grad():
        block = vlm().hf.model.language_model.layers[1]
        own = block.self_attn.v_proj(block.input_layernorm(value)).unflatten(-1, (2, WIDTH))
    own = own.repeat_interleave(HEADS // 2, 1)

    def mixed(z: Tensor) -> Tensor:
        here = slice(None) if at is None else at
        heads = z.unflatten(-1, (HEADS, WIDTH))
        heads[0, here, 2] = (1 - share) * heads[0, here, 2] + share * own[here, 2]
        return z

    softened = vlm().run(prompt, edits=[mv.soft_identity(1, [2], share, at)]).logits
    expected = metric(prompt, {layer(1, "self_attn.o_proj<"): mixed})
    assert abs(float(vlm().metric(YES)(softened)[0]) - expected) < 2e-5
    assert abs(expected - metric(prompt)) > 1e-4


# -- image tokens ----------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_there_twice_has_random_sets_of_its_own_each_time() -> None:
    prompt, other = asked()[:2]
    sets = {"few": prompt.image[2:5]}
    found = mv.ablate_image_tokens(vlm(), [prompt, other, prompt], YES, sets, to="zero", controls=3)
    again = mv.ablate_image_tokens(vlm(), [prompt, other], YES, sets, to="zero", controls=3)
    np.testing.assert_allclose(found.random[:2], again.random, atol=1e-6)
    assert not np.allclose(found.random[0], found.random[2], atol=1e-3)


def test_replaced_image_tokens_equal_a_plain_hook_on_the_projector() -> None:
    prompt = asked()[0]
    sets = {"few": prompt.image[2:5], "one": [prompt.image[7]]}
    found = mv.ablate_image_tokens(vlm(), asked()[:2], YES, sets, controls=1)
    features = torch.cat([kept(one, layer(0, "input_layernorm<"))[one.image] for one in asked()[:2]])

    def replaced(x: Tensor, places: Sequence[int]) -> Tensor:
        x[:, list(places)] = features.mean(0)
        return x

    for key, places in (("few", [2, 3, 4]), ("one", [7])):
        path = "model.multi_modal_projector"
        expected = metric(prompt, {path: partial(replaced, places=places)}) - metric(prompt)
        assert abs(float(found.effect.sel(prompt=0, set=key)) - expected) < 2e-5
    assert found.tokens.values.tolist() == [[3, 1], [3, 1]]


def spotted() -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """The planted model, a dark picture with one bright square (row 1, column 2), and a dark one."""
    model, _, dark, *_ = planted.planted()
    pixels = dark.encoding["pixel_values"].clone()
    pixels[..., 2:4, 4:6] = 1.0
    return model, model.prompt(encoding={"input_ids": dark.encoding["input_ids"], "pixel_values": pixels}), dark


def test_the_planted_image_token_is_the_one_that_matters() -> None:
    model, spot, dark = spotted()
    bright, other = spot.image[6], spot.image[3]
    found = mv.ablate_image_tokens(model, spot, PLANTED, {"spot": [bright], "other": [other]}, to=dark, controls=15)
    assert float(found.effect.sel(set="spot")[0]) < -0.05
    assert abs(float(found.effect.sel(set="other")[0])) < 1e-4
    assert np.abs(found.random.sel(set="spot")).max() < 1e-4
    assert float(found.p_value.sel(set="spot")) == 1 / 16
    assert set(np.round(found.random.sel(set="other").values.ravel(), 4)) <= {0, round(float(found.effect[0, 0]), 4)}


def test_gradients_point_at_the_planted_image_token() -> None:
    model, spot, dark = spotted()
    # The sum needs thousands of steps here; that nothing belongs to tokens which are the baseline's own needs none.
    found = mv.gradient_tokens(model, spot, PLANTED, 1, baseline=dark, steps=8, tolerance=1000.0)
    assert found == [spot.image[6]]


def test_outliers_are_the_longest_features_of_a_plain_forward_pass() -> None:
    prompt = asked()[0]
    norms = kept(prompt, layer(0, "input_layernorm<"))[prompt.image].norm(dim=-1).numpy()
    longest = [prompt.image[at] for at in np.argsort(-norms)]
    assert mv.norm_outliers(vlm(), prompt, count=3) == longest[:3]
    assert mv.norm_outliers(vlm(), prompt, factor=1.05) == longest[: (norms > 1.05 * np.median(norms)).sum()]


# -- accuracy, on the demo model -------------------------------------------------------------------------------------


def test_answers_are_the_likelier_of_the_words_in_a_plain_forward_pass() -> None:
    prompts = asked()
    right = mv.answer_accuracy(vlm(), [(prompt, "yes") for prompt in prompts])
    assert right.values.tolist() == [float(metric(prompt) > 0) for prompt in prompts]
    wrong = mv.answer_accuracy(vlm(), [(prompt, "no") for prompt in prompts])
    assert (right + wrong).values.tolist() == [1, 1, 1]


def test_the_heads_that_answer_for_a_red_3_cost_more_accuracy_than_random_ones() -> None:
    """Found by `ablate_each` to means on 24 other scenes, the even ones of each kind: effects -3.8, -3.2 and -1.2."""
    demo, question = mv.load("demo"), "Is there a red 3 in the image?"
    scenes = [one for one in mv.demo.scenes() if any(item.digit == 3 or item.colour == 0 for item in one.scene.items)]
    there = [any((item.digit, item.colour) == (3, 0) for item in one.scene.items) for one in scenes]
    chosen = [at for answer in (True, False) for at in np.flatnonzero(np.array(there) == answer)[1:7:2]]
    prompts = [demo.prompt(scenes[at].image, question) for at in chosen]
    metrics = [mv.accuracy(demo, "yes" if there[at] else "no") for at in chosen]
    means = mv.mean_activations(demo, prompts, positions="each")
    heads = [(7, 3), (1, 3), (7, 2)]
    found = mv.ablate_in_order(demo, prompts, metrics, heads, to=means, counts=[3])
    answers = ["yes" if there[at] else "no" for at in chosen]
    assert mv.answer_accuracy(demo, list(zip(prompts, answers, strict=True))).mean() == 1
    assert found["mean"].item() <= 2 / 3
    assert found.p_value.item() == 1 / 21  # each of 20 random sets costs less
