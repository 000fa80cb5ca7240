"""VIAR's intervention and what is asked about it: amounts by hand, odds in the model, and planted answers."""

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import evaluations
import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
from jaxtyping import config
from scipy.stats import pointbiserialr
from zoo import ask, build

import mechvlm as mv
from mechvlm.methods.bands import bias_layers, layer_sets, other_bands, random_sets
from mechvlm.methods.bias import head_pairs, layer_amounts, named_layers, viar_bias, viar_edits, zone_layers
from mechvlm.methods.depth import depth_correlation, item_attention
from mechvlm.methods.dose import bias_doses
from mechvlm.methods.published import ADAPTIVE_TABLE, ADAPTIVE_TABLE_CODE, TEMPLATE, TEMPLATES, ZONE

ASKED: list[dict[str, Any]] = [
    {
        "question_id": at,
        "question": f"is there a {thing} ?",
        "answer": label,
        "image_source": str(at // 2),
        "image": one,
    }
    for at, (thing, label, one) in enumerate(
        (thing, label, tiny.picture(number)) for number in range(3) for thing, label in (("dog", "yes"), ("cat", "no"))
    )
]
ENDS = (("", 0.0), ("_low", -0.1), ("_high", 0.1))
PERSAMPLE = Path(__file__).parent / "data" / "viar" / "persample.csv"


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def large() -> mv.VLM:
    """As many layers as LLaVA-1.5-7B has."""
    return tiny.vlm(layers=32, width=8, heads=2, kv_heads=1)


@cache
def across() -> mv.VLM:
    """A model that sees the picture by cross-attention."""
    return build("mllama")


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


def log_odds(edits: list[mv.Edit], layer: int, keys: list[int], queries: list[int]) -> torch.Tensor:
    """The log odds that queries look at keys, over head and query."""
    site = mv.Site("pattern", layer)
    paid = vlm().run(real(), read=[site], edits=edits)[site][0].double()[:, queries][..., keys].sum(-1)
    return (paid / (1 - paid)).log()


# -- the bias --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [-1.5, 0.5, 2.0])
def test_an_amount_moves_the_odds_of_the_picture_by_its_exponential(amount: float) -> None:
    edits = viar_edits(vlm(), real(), amount, layers=[0])
    behind = real().question + real().last
    moved = log_odds(edits, 0, real().image, behind) - log_odds([], 0, real().image, behind)
    assert torch.allclose(moved, torch.full_like(moved, amount), atol=1e-4)


def test_the_bias_is_on_the_image_tokens_that_are_there() -> None:
    (edit,) = viar_edits(vlm(), real(), 2.0, layers=[1])
    assert edit.bias is not None and list(edit.bias.keys) == real().image
    assert real().encoding["input_ids"][0, list(edit.bias.keys)].unique().tolist() == [tiny.IMAGE]


def test_the_published_columns_hold_the_first_position_and_lack_the_last_image_tokens() -> None:
    (edit,) = viar_edits(vlm(), real(), 2.0, layers=[1], convention="viar-2026")
    assert edit.bias is not None
    before = real().image[0]
    keys = list(edit.bias.keys)
    assert keys == list(range(tiny.TOKENS)) and keys[0] in real().bos
    assert set(real().image) - set(keys) == set(real().image[-before:])


def test_the_published_bias_is_the_mask_of_the_published_code() -> None:
    """Against a model whose masks are changed by hooks: `mask[:, :, :, 0:N] += b` in some layers."""
    eager = tiny.vlm(attention="eager", dtype=torch.float64)
    prompt = eager.prompt(tiny.picture(), "is there a dog ?")

    def hook(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = given["attention_mask"].clone()
        mask[:, :, :, : tiny.TOKENS] += 2.0
        return args, {**given, "attention_mask": mask}

    with torch.no_grad():
        layers = [eager.hf.model.language_model.layers[at].self_attn for at in (1, 2)]
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        expected = eager.hf(**{n: x.double() if x.is_floating_point() else x for n, x in prompt.encoding.items()})
        [one.remove() for one in hooks]
    edits = viar_edits(eager, prompt, 2.0, layers=[1, 2], convention="viar-2026")
    assert torch.allclose(eager.run(prompt, edits=edits).logits, expected.logits[:, -1], atol=1e-9)


def test_the_published_layers_are_eight_to_sixteen() -> None:
    prompt = large().prompt(tiny.picture(), "is there a dog ?")
    edits = viar_edits(large(), prompt, convention="viar-2026")
    assert [edit.site.layer for edit in edits] == list(ZONE) == list(range(8, 17))
    assert {edit.bias.amount for edit in edits if edit.bias} == {2.0}


def test_when_is_handed_on() -> None:
    assert {edit.when for edit in viar_edits(vlm(), real(), layers=[0, 1], when="decode")} == {"decode"}
    prefill, decode, always = (
        vlm().generate(real(), viar_edits(vlm(), real(), 6.0, [0, 1, 2], when=when), 6, do_sample=False)
        for when in ("prompt", "decode", "always")
    )
    plain = vlm().generate(real(), max_new_tokens=6, do_sample=False)
    assert decode.tokens[0, 0] == plain.tokens[0, 0] and prefill.tokens[0, 0] == always.tokens[0, 0]


# -- adaptive amounts --------------------------------------------------------------------------------------------------


def test_the_adaptive_amounts_by_hand() -> None:
    model, v = vlm(), [0.2, 0.6, 0.5]
    # 1 - v is 0.8, 0.4, 0.5: its mean over all layers 17/30, its largest in layers 1 and 2 is 0.5.
    assert layer_amounts(model, 2.0, [1, 2], "code", v) == pytest.approx({1: 0.8 * 30 / 17, 2: 1.0 * 30 / 17})
    assert layer_amounts(model, 2.0, [1, 2], "paper", v) == pytest.approx({1: 1.6, 2: 2.0})


def test_the_stored_table_sets_the_published_adaptive_amounts() -> None:
    code = layer_amounts(large(), 2.0, adaptive="code", convention="viar-2026")
    v = np.array(ADAPTIVE_TABLE_CODE)
    assert np.abs(v - ADAPTIVE_TABLE).max() < 0.00051  # the code has three digits
    assert np.allclose(list(code.values()), 2 * (1 - v) / (1 - v).mean()) and list(code) == list(range(32))
    assert np.mean(list(code.values())) == pytest.approx(2.0)
    paper = layer_amounts(large(), 2.0, adaptive="paper", convention="viar-2026")
    assert list(paper) == list(ZONE) and max(paper.values()) == 2.0
    assert max(paper, key=lambda layer: paper[layer]) == 15  # the lowest of the table's zone


def test_the_prompts_of_the_published_attention_lack_a_sentence() -> None:
    bare = "USER: <image>\n{question}\nASSISTANT:"
    assert {name for name, text in TEMPLATES.items() if text == bare} == {
        *("profile", "collapse", "correlation", "gradient")
    }
    assert TEMPLATES["pope"] == TEMPLATE == bare.replace("\nASS", "\nAnswer with yes or no.\nASS")


def test_an_amount_for_each_layer() -> None:
    edits = viar_edits(vlm(), real(), {0: 1.0, 2: -0.5})
    assert [(edit.site.layer, edit.bias.amount) for edit in edits if edit.bias] == [(0, 1.0), (2, -0.5)]


# -- heads -------------------------------------------------------------------------------------------------------------


def test_only_the_named_heads_are_biased() -> None:
    behind = real().question + real().last
    for heads in ([(0, 1), (0, 3)], {(0, 1): 1.0, (0, 3): 1.0}):
        edits = viar_edits(vlm(), real(), 2.0, heads=heads)
        moved = log_odds(edits, 0, real().image, behind) - log_odds([], 0, real().image, behind)
        assert torch.allclose(moved[[1, 3]], torch.full_like(moved[[1, 3]], 2.0), atol=1e-4)
        assert torch.count_nonzero(moved[[0, 2]]) == 0


def test_heads_have_factors_of_the_amount() -> None:
    behind = real().question + real().last
    factors = {(0, 1): 0.5, (0, 2): -0.5, (1, 0): 1.5}
    edits = viar_edits(vlm(), real(), 2.0, heads=factors, layers=[0])
    moved = log_odds(edits, 0, real().image, behind) - log_odds([], 0, real().image, behind)
    assert torch.allclose(moved, torch.tensor([0.0, 1.0, -1.0, 0.0]).double()[:, None].expand_as(moved), atol=1e-4)
    v = [0.2, 0.6, 0.5]
    adaptive = viar_edits(vlm(), real(), 2.0, heads=factors, adaptive="paper", profile=v)
    assert [edit.bias.amount for edit in adaptive if edit.bias] == pytest.approx([1.0, -1.0, 1.5])
    by_layer = viar_edits(vlm(), real(), {0: 4.0}, heads=factors)
    assert [edit.bias.amount for edit in by_layer if edit.bias] == [2.0, -2.0]


def test_a_function_of_the_prompt_finds_each_prompts_own_positions() -> None:
    make = viar_bias(vlm(), 2.0, layers=range(1, 3))
    other = vlm().prompt(tiny.picture(), "the <image> is red", raw=True)
    for prompt in (real(), other):
        assert [edit.bias.keys for edit in make(prompt) if edit.bias] == [tuple(prompt.image)] * 2
    assert real().image != other.image
    assert make.__name__ == "viar_edits(amount=2.0, layers=1-2)"


def test_planted_truth_a_bias_makes_an_answer_that_looks_more_itself() -> None:
    """One head looks evenly at all positions and carries the answer: what it says is a known function of the bias.

    Of 22 positions 16 are the picture's, so it pays 16 e^b / (16 e^b + 6) to it, and says so much of what it sees: more
    yes where the picture is bright, less where it is dark.
    """
    model, bright, dark, layer, head = planted.planted()
    model.hf.model.language_model.layers[layer].self_attn.q_proj.weight.data.zero_()
    measure = model.metric(mv.logit_difference(planted.YES, planted.NO))

    def paid(amount: float) -> float:
        return 16 * np.exp(amount) / (16 * np.exp(amount) + 6)

    for prompt, sign in ((bright, 1), (dark, -1)):
        assert (len(prompt), len(prompt.image)) == (22, 16)
        plain = float(measure(model.run(prompt).logits))
        assert np.sign(plain) == sign
        for amount in (-2.0, 1.0, 3.0):
            edits = viar_edits(model, prompt, amount, layers=[layer])
            said = float(measure(model.run(prompt, edits=edits).logits))
            # The final norm divides by the stream's length, which grows with what is said: compared before it.
            site = mv.Site("attn_out", layer)
            before, after = (
                float(model.run(prompt, read=[site], edits=one)[site][0, -1, planted.SAID]) for one in ([], edits)
            )
            assert after / before == pytest.approx(paid(amount) / paid(0.0), rel=1e-4)
            assert np.sign(said - plain) == np.sign(amount) * sign
            others = viar_edits(model, prompt, amount, heads=[(layer, other) for other in range(4) if other != head])
            assert float(measure(model.run(prompt, edits=others).logits)) == pytest.approx(plain, abs=1e-5)


def test_a_zone_that_was_found_gives_its_layers_and_neglect_heads_their_pairs() -> None:
    zone = xr.Dataset({"found": True, "start": 8.0, "stop": 17.0, "p_value": 0.01})
    assert tuple(zone_layers(zone)) == ZONE
    heads = xr.DataArray([[False, True], [True, False]], {"layer": [3, 4]}, ["layer", "head"])
    found = xr.Dataset({"neglect": heads, "specialist": ~heads}).assign_coords(head=[0, 1])
    assert head_pairs(found) == [(3, 1), (4, 0)] and head_pairs(found, "specialist") == [(3, 0), (4, 1)]


def test_layers_in_words() -> None:
    assert named_layers([9, 3, 4, 5, 0]) == "0, 3-5, 9"


# -- doses -------------------------------------------------------------------------------------------------------------


@cache
def doses() -> xr.Dataset:
    return bias_doses(vlm(), ASKED[:4], [0.0, 4.0], layers=[0, 1], masses=2, resamples=20)


def biased(amount: float, layers: list[int], asked: list[dict[str, Any]] = ASKED) -> xr.Dataset:
    """The evaluation with a bias written by hand."""
    return mv.evaluate.pope(
        vlm(), asked, edits=lambda prompt: [mv.bias_attention(layer, prompt.image, amount) for layer in layers]
    )


def test_each_amount_is_the_evaluation_with_that_bias() -> None:
    plain = mv.evaluate.pope(vlm(), ASKED[:4])
    for amount in (0.0, 4.0):
        expected = plain if amount == 0 else biased(amount, [0, 1], ASKED[:4])
        here = doses().sel(amount=amount)
        assert np.allclose(here.margin, expected.margin, atol=1e-5) and (here.correct == expected.correct).all()
        assert float(here.accuracy) == pytest.approx(float(expected.correct.mean()))
        assert float(here.yes_ratio) == pytest.approx(float((expected.predicted == "yes").mean()))
        assert float(here.brier) == pytest.approx(float(((expected.p_yes - (plain.label == "yes")) ** 2).mean()))
        assert float(here.gain) == pytest.approx(float(here.accuracy) - float(plain.correct.mean()))
        assert float(here.beyond) == pytest.approx(float(here.accuracy) - float(here.matched))
    assert not np.array_equal(doses().margin[0], doses().margin[1])


def test_doses_scale_heads_factors_and_each_has_a_folder(tmp_path: Path) -> None:
    heads = {(0, 1): 1.0, (0, 2): 0.5}
    found = bias_doses(vlm(), ASKED[:2], [1.0, 6.0], heads=heads, masses=0, resamples=20, out=tmp_path)
    by_hand = mv.evaluate.pope(
        vlm(),
        ASKED[:2],
        edits=lambda prompt: [
            mv.bias_attention(0, prompt.image, 6.0 * by, heads=[head]) for (_, head), by in heads.items()
        ],
    )
    assert np.allclose(found.margin.sel(amount=6.0), by_hand.margin, atol=1e-5)
    assert not np.allclose(found.margin.sel(amount=1.0), by_hand.margin, atol=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"unedited", "amount 1", "amount 6"}
    assert all(f"amount={by}" in found.attrs["edits"] for by in (1.0, 6.0))


def test_a_dose_says_how_much_attention_it_moved() -> None:
    """By whole patterns, of the first question about each of the first two pictures."""
    prompts = [vlm().prompt(ASKED[at]["image"], ASKED[at]["question"]) for at in (0, 2)]
    sites = [mv.Site("pattern", layer) for layer in range(3)]
    for amount in (0.0, 4.0):
        paid = []
        for prompt in prompts:
            edits = [mv.bias_attention(layer, prompt.image, amount) for layer in (0, 1)] if amount else []
            run = vlm().run(prompt, read=sites, edits=edits)
            rows = prompt.question + prompt.last
            paid.append([float(run[site][0][:, rows][..., prompt.image].sum(-1).mean()) for site in sites])
        here = doses().sel(amount=amount)
        assert np.allclose(here.mass_by_layer, np.mean(paid, 0), atol=1e-5)
        assert float(here.mass) == pytest.approx(np.mean(paid, 0)[:2].mean(), abs=1e-5)
    assert (np.diff(doses().mass) > 0).all()


def test_planted_truth_what_only_moves_the_threshold_is_found_to() -> None:
    """An edit that adds a number to the logits of yes changes answers, and nothing that a threshold would not."""
    ids = vlm().token_ids("yes")
    plain = mv.evaluate.pope(vlm(), ASKED)
    by = float(np.median(-plain.margin.values))

    def favour(logits: torch.Tensor) -> torch.Tensor:
        logits[..., ids] += by
        return logits

    moved = mv.evaluate.pope(vlm(), ASKED, edits=[mv.Edit("logits", favour)])
    assert (moved.predicted != plain.predicted).any()
    found = mv.evaluate.stats.compare(plain, moved, resamples=200).sel(metric="accuracy")
    ends = [float(found[f"advantage{end}"]) for end in ("", "_low", "_high")]
    assert ends == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


# -- sets of layers ----------------------------------------------------------------------------------------------------


def test_sets_of_layers_are_compared_with_random_ones() -> None:
    """Of three layers there are two other ones: both are run, and the p-value counts those that do as well."""
    some = ASKED[:2]
    right = {layer: float(biased(3.0, [layer], some).correct.mean()) for layer in range(3)}
    found = bias_layers(vlm(), some, {"first": [0], "all": [0, 1, 2]}, amount=3.0, controls=5, resamples=20)
    first = found.sel(set="first")
    assert float(first.accuracy) == right[0] and int(first.n_controls) == 2
    assert sorted(first.random_accuracy.values[:2]) == sorted([right[1], right[2]])
    assert np.isnan(first.random_accuracy.values[2:]).all()
    as_well = sum(right[layer] >= right[0] for layer in (1, 2))
    assert float(first.p_value) == pytest.approx((1 + as_well) / 3)
    whole = found.sel(set="all")
    assert float(whole.accuracy) == float(biased(3.0, [0, 1, 2], some).correct.mean())
    assert int(whole.n_controls) == 0 and np.isnan(whole.p_value) and np.isnan(whole.p_value_beyond)
    assert found.layers.values.tolist() == ["0", "0-2"]


def test_a_band_is_compared_with_every_other_band() -> None:
    """A zone of two in three layers has one other place; a random pair would have two."""
    some = ASKED[:2]
    found = bias_layers(vlm(), some, {"zone": [0, 1]}, amount=3.0, controls=5, resamples=20, control="bands")
    assert int(found.n_controls[0]) == 1 and found.attrs["control"] == "bands"
    assert float(found.random_accuracy[0, 0]) == float(biased(3.0, [1, 2], some).correct.mean())
    every = other_bands({8: 1.0, 9: 2.0, 10: 3.0}, range(32), 100, seed=0)
    assert [min(one) for one in every] == [at for at in range(30) if at != 8]
    assert all([one[at] for at in sorted(one)] == [1.0, 2.0, 3.0] for one in every)
    drawn = other_bands({8: 1.0, 9: 2.0, 10: 3.0}, range(32), 7, seed=0)
    assert len(drawn) == 7 and all(one in every for one in drawn)


def test_random_sets_are_as_large_as_biased_and_never_the_set_itself() -> None:
    own = {3: 2.0, 4: 2.0, 5: 1.0}
    found = random_sets(own, range(8), 20, seed=0)
    assert len(found) == 20 == len({tuple(sorted(one.items())) for one in found}) and own not in found
    assert all(sorted(one.values()) == [1.0, 2.0, 2.0] and set(one) <= set(range(8)) for one in found)
    assert found == random_sets(own, range(8), 20, seed=0) != random_sets(own, range(8), 20, seed=1)


def test_random_sets_favour_no_layer() -> None:
    drawn = [layer for seed in range(300) for one in random_sets({0: 1.0}, range(8), 1, seed) for layer in one]
    counts = np.bincount(drawn, minlength=8)
    assert counts[0] == 0
    expected = 300 / 7
    assert (np.abs(counts[1:] - expected) < 5 * np.sqrt(expected)).all()


def test_the_usual_sets_hold_every_layer_where_it_belongs() -> None:
    amounts = layer_amounts(vlm(), 2.0, [0, 1, 2], "code", [0.1, 0.2, 0.3])
    sets = layer_sets(vlm(), [1], amounts)
    assert sets == {"zone": [1], "before": [0], "behind": [2], "last": [2], "all": [0, 1, 2], "adaptive": amounts}
    assert "before" not in layer_sets(vlm(), [0])


# -- attention and being right -----------------------------------------------------------------------------------------


def test_the_attention_of_each_item_is_its_patterns_summed() -> None:
    found, published = (item_attention(vlm(), ASKED[:3], convention=which) for which in (None, "viar-2026"))
    sites = [mv.Site("pattern", layer) for layer in range(3)]
    for item in (0, 2):
        prompt = vlm().prompt(ASKED[item]["image"], ASKED[item]["question"])
        run = vlm().run(prompt, read=sites)
        rows = prompt.question + prompt.last
        paid = [float(run[site][0][:, rows][..., prompt.image].sum(-1).mean()) for site in sites]
        assert np.allclose(found.sel(item=item), paid, atol=1e-5)
        old = [float(run[site][0][:, tiny.TOKENS :, : tiny.TOKENS].mean()) for site in sites]
        assert np.allclose(published.sel(item=item), old, atol=1e-6)
    assert (found.long_name, published.long_name) == ("attention mass", "attention density")


@cache
def published_items() -> tuple[xr.Dataset, xr.DataArray]:
    """The published answers and attention of 500 questions."""
    rows = list(csv.DictReader(PERSAMPLE.read_text().splitlines()))
    labels, predicted = (np.array([row[name] for row in rows]) for name in ("answer_gt", "pred"))
    margins = np.where(predicted == "yes", 1.0, -1.0)
    made = evaluations.evaluation(margins, labels, np.array([str(at // 6) for at in range(len(rows))]))
    values = [[float(row[f"layer_{layer}"]) for layer in range(32)] for row in rows]
    return made, xr.DataArray(np.array(values), {"layer": range(32)}, ["item", "layer"])


def test_the_published_correlations_come_out_under_the_published_convention() -> None:
    found = depth_correlation(*published_items(), permutations=50, convention="viar-2026")
    assert found.r.sel(measure=["zone", "14", "15", "17"]).values.round(3).tolist() == [-0.023, -0.154, -0.142, -0.14]
    assert found.p.sel(measure=["zone"]).values.round(3).tolist() == [0.615]
    assert found.p.sel(measure=["14", "15", "17"]).values.round(4).tolist() == [0.0005, 0.0015, 0.0017]
    said = str(found.says.sel(measure="14").item())
    assert said.startswith("layer 14: more attention to the picture on wrong answers (r = -0.154")
    assert float(found.wrong.sel(measure="14")) > float(found.right.sel(measure="14"))
    summary = json.loads((PERSAMPLE.parent / "persample_summary.json").read_text())
    assert float(found.d.sel(measure="zone")) == pytest.approx(summary["cohens_d"], abs=1e-6)


def test_the_published_association_is_one_of_the_answers_yes() -> None:
    found = depth_correlation(*published_items(), permutations=300).sel(measure="14")
    assert found.r_stratum.sel(stratum=["yes", "no"]).values.round(3).tolist() == [-0.295, -0.008]
    assert float(found.p_max) < 0.05
    said = str(found.says.item())
    assert "within each answer" not in said and "-0.295 in yes" in said and "-0.008 in no" in said


def test_attention_is_put_in_the_order_of_the_items() -> None:
    made, attention = published_items()
    numbered = attention.assign_coords(item=made.item.values)
    turned = depth_correlation(made, numbered.isel(item=slice(None, None, -1)), permutations=20)
    assert np.array_equal(turned.r, depth_correlation(made, attention, permutations=20).r)


def test_planted_truth_attention_that_only_tells_yes_from_no_is_not_taken_for_being_right() -> None:
    """Answers of yes look more and are right more: all items together associate, and none of the answers does."""
    generator, count = np.random.default_rng(0), 2000
    said_yes = generator.random(count) < 0.5
    right = generator.random(count) < np.where(said_yes, 0.9, 0.6)
    labels = np.where(said_yes == right, "yes", "no")
    made = evaluations.evaluation(np.where(said_yes, 1.0, -1.0), labels, np.arange(count).astype(str))
    attention = xr.DataArray(said_yes[:, None] + 0.3 * generator.normal(size=(count, 2)), dims=["item", "layer"])
    together = depth_correlation(made, attention, [0], 100, convention="viar-2026").sel(measure="0")
    apart = depth_correlation(made, attention, [0], 100).sel(measure="0")
    expected = pointbiserialr(right, attention[:, 0])
    assert float(together.r) == pytest.approx(expected.statistic) and float(together.p) == pytest.approx(
        expected.pvalue
    )
    assert float(together.r) > 0.25 and abs(float(apart.r_within)) < 0.05 and float(apart.p_max) > 0.05
    assert "less attention to the picture on wrong answers" in str(together.says.item())
    assert "no association" in str(apart.says.item())


def test_a_profile_of_prompts_is_attention_of_items() -> None:
    made, attention = published_items()
    of_prompts = depth_correlation(made, attention.rename(item="prompt"), permutations=20)
    assert np.array_equal(of_prompts.r, depth_correlation(made, attention, permutations=20).r)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_doses_are_drawn_beside_the_moved_threshold() -> None:
    names = ("accuracy", "matched", "beyond", "yes_ratio", "mass")
    curves = {
        f"{name}{end}": ("amount", np.array([0.5, 0.6, 0.4]) + by + at / 100)
        for at, name in enumerate(names)
        for end, by in ENDS
    }
    found = xr.Dataset(curves, {"amount": [0.0, 1.0, 4.0]})
    figure = mv.plot.dose_curves(found)
    drawn = {trace.name: trace for trace in figure.data if trace.showlegend is None}
    said = ("biased", "threshold moved instead", "beyond the threshold", "share of yes", "attention on the picture")
    for name, variable in zip(said, names, strict=True):
        assert drawn[name].x.tolist() == [0.0, 1.0, 4.0]
        assert drawn[name].y.tolist() == found[variable].values.tolist()


@pytest.mark.parametrize("measure", ["accuracy", "beyond"])
def test_sets_of_layers_are_drawn_beside_random_ones(measure: str) -> None:
    ends = {
        f"{name}{end}": ("set", [0.5 + by, 0.6 + by]) for name in ("accuracy", "beyond", "gain") for end, by in ENDS
    }
    random = ("set", "sample"), [[0.4, 0.8], [np.nan, np.nan]]
    p = {"p_value": ("set", [0.25, np.nan]), "p_value_beyond": ("set", [0.25, np.nan])}
    coords = {"set": ["zone", "all"], "layers": ("set", ["3-4", "0-7"])}
    found = xr.Dataset({**ends, **p, "random_accuracy": random, "random_beyond": random}, coords)
    figure = mv.plot.layer_controls(found, measure)
    drawn = {trace.name: trace for trace in figure.data if trace.mode == "markers"}
    assert drawn["these layers"].y.tolist() == [0.5, 0.6]
    band, middle = [trace for trace in figure.data if trace.name == "random layers"]
    assert (min(band.y), max(band.y)) == (0.4, 0.8) and list(middle.y) == pytest.approx([0.6, 0.6])
    assert [note.text for note in figure.layout.annotations][:2] == ["p = 0.25", "no p-value"]
    assert figure.layout.xaxis.ticktext == ("zone<br>3-4", "all<br>0-7")


REFUSED: list[tuple[str, Callable[[], object]]] = [
    (
        "convention='viar' is not known; choose None for correct positions, or 'viar-2026' for what was published.",
        lambda: viar_edits(vlm(), real(), layers=[0], convention="viar"),
    ),
    (
        "no layers were given, and which of them look away from the picture differs from model to model; give layers=, "
        "for instance those that mv.find_zone finds, or convention='viar-2026' for the published 8 to 16.",
        lambda: viar_edits(vlm(), real()),
    ),
    (
        "adaptive='both' is not known; choose 'paper' or 'code', or None for one amount.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="both"),
    ),
    (
        "adaptive amounts need a profile; give profile=, the image's share in each of this model's 3 layers.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="code"),
    ),
    (
        "the profile has 32 layers, and this model 3; give one share for each layer.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="code", convention="viar-2026"),
    ),
    (
        "the profile holds 1.5, which is no share; each layer's is from 0 to below 1.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="code", profile=[0.1, 1.5, 0.2]),
    ),
    (
        "a profile sets adaptive amounts; say by which formula, adaptive='paper' or 'code'.",
        lambda: viar_edits(vlm(), real(), layers=[0], profile=[0.1, 0.5, 0.2]),
    ),
    (
        "layer 3 is not in this model, which has 3 layers.",
        lambda: viar_edits(vlm(), real(), layers=[3], adaptive="code", profile=[0.1, 0.5, 0.2]),
    ),
    (
        "amount= says of each layer by how much it is biased, so layers= and adaptive= would say it twice; leave them "
        "out.",
        lambda: viar_edits(vlm(), real(), {0: 1.0}, layers=[0]),
    ),
    (
        "none of heads=[(1, 0)] is in layers 0; give heads of those.",
        lambda: viar_edits(vlm(), real(), layers=[0], heads=[(1, 0)]),
    ),
    (
        "heads holds (1, 0, 2), which is no pair of layer and head; write for instance (3, 0).",
        lambda: viar_edits(vlm(), real(), heads=[(1, 0, 2)]),  # type: ignore[arg-type]
    ),
    (
        "none of heads={(1, 0): 2.0} is in layers 0; give heads of those.",
        lambda: viar_edits(vlm(), real(), layers=[0], heads={(1, 0): 2.0}),
    ),
    (
        "heads={1: 2.0} names no pair of layer and head; write for instance {(3, 0): 0.5}.",
        lambda: viar_edits(vlm(), real(), layers=[0], heads={1: 2.0}),  # type: ignore[dict-item]
    ),
    (
        "adaptive='nonsense' is not known; choose 'paper' or 'code', or None for one amount.",
        lambda: viar_edits(vlm(), real(), heads={(1, 0): 2.0}, adaptive="nonsense"),
    ),
    (
        "amount={} names no layer to bias; write for instance {3: 2.0}.",
        lambda: viar_edits(vlm(), real(), {}),
    ),
    ("layer 7 is not in this model, which has 3 layers.", lambda: viar_edits(vlm(), real(), layers=[7])),
    ("layer 7 is not in this model, which has 3 layers.", lambda: viar_edits(vlm(), real(), {7: 1.0})),
    ("None names no heads; make it with mv.neglect_heads(profile).", lambda: head_pairs(None)),  # type: ignore[arg-type]
    ("layer 9 is not in this model, which has 3 layers.", lambda: bias_doses(vlm(), ASKED, layers=[9], masses=0)),
    (
        "layers holds 0 more than once; give each layer once.",
        lambda: bias_doses(vlm(), ASKED, layers=[0, 0], masses=0),
    ),
    (
        "masses=-1 is no number of pictures; give 0 or more.",
        lambda: bias_doses(vlm(), ASKED, layers=[0], masses=-1),
    ),
    (
        "masses=8 measures the pass over the prompt, which when='decode' leaves alone; give masses=0.",
        lambda: bias_doses(vlm(), ASKED, layers=[0], when="decode", parser="viar"),
    ),
    (
        "amounts holds 2 more than once; give each once.",
        lambda: bias_doses(vlm(), ASKED, [0, 2, 2.0], layers=[0]),
    ),
    ("amounts is empty; give at least one, for instance [0, 1, 2].", lambda: bias_doses(vlm(), ASKED, {}, layers=[0])),  # type: ignore[arg-type]
    ("layer 9 is not in this model, which has 3 layers.", lambda: bias_layers(vlm(), ASKED, {"a": [9]})),
    ("layers holds 0 more than once; give each layer once.", lambda: bias_layers(vlm(), ASKED, {"a": [0, 0]})),
    ("layer 99 is not in this model, which has 3 layers.", lambda: layer_sets(vlm(), [99])),
    (
        "control='near' is not known; choose 'layers' or 'bands'.",
        lambda: bias_layers(vlm(), ASKED, {"a": [0]}, control="near"),
    ),
    (
        "layers 0, 2 are no band of neighbours, and control='bands' compares with such; choose control='layers'.",
        lambda: bias_layers(vlm(), ASKED, {"a": [0, 2]}, control="bands"),
    ),
    (
        "the evaluation has no questions, so repeated ones cannot be told; give it question, as mv.evaluate.pope does.",
        lambda: depth_correlation(
            evaluations.baseline(1).drop_vars("question"), xr.DataArray(np.ones((6, 3)), dims=["item", "layer"])
        ),
    ),
    (
        "attention and the evaluation number their items otherwise; give both for the same questions, or drop the "
        "numbers with attention.drop_vars('item').",
        lambda: depth_correlation(
            evaluations.baseline(1), xr.DataArray(np.ones((6, 3)), {"item": range(1, 7)}, ["item", "layer"])
        ),
    ),
    (
        "the prompt 'is there a dog ?' holds no image, so there is nothing to look at more.",
        lambda: viar_edits(vlm(), vlm().prompt(None, "is there a dog ?"), layers=[0]),
    ),
    (
        "no zone was found (p = 0.4), so there are no layers to bias; give layers= yourself.",
        lambda: zone_layers(xr.Dataset({"found": False, "start": np.nan, "stop": np.nan, "p_value": 0.4})),
    ),
    ("a list is no zone; make it with mv.find_zone.", lambda: zone_layers([8, 9])),  # type: ignore[arg-type]
    ("side='left' is not known; choose 'neglect' or 'specialist'.", lambda: head_pairs(xr.Dataset(), "left")),
    (
        "dose_curves draws what bias_doses returns, and was given a Dataset; make it with mv.methods.viar.bias_doses.",
        lambda: mv.plot.dose_curves(xr.Dataset()),
    ),
    (
        "measure='f1' is not known; choose 'accuracy' or 'beyond'.",
        lambda: mv.plot.layer_controls(
            xr.Dataset({name: 0.0 for name in ("accuracy", "random_accuracy", "p_value")}), "f1"
        ),
    ),
    (
        "amounts=2 is not a list of amounts; write for instance [0, 1, 2].",
        lambda: bias_doses(vlm(), ASKED, 2, layers=[0]),  # type: ignore[arg-type]
    ),
    (
        "amounts is empty; give at least one, for instance [0, 1, 2].",
        lambda: bias_doses(vlm(), ASKED, [], layers=[0]),
    ),
    (
        "layer_sets=[0] are no sets with names; write for instance {'zone': [8, 9]}.",
        lambda: bias_layers(vlm(), ASKED, [0]),  # type: ignore[arg-type]
    ),
    (
        "layer_sets holds no set; give at least one, for instance {'zone': [8, 9]}.",
        lambda: bias_layers(vlm(), ASKED, {}),
    ),
    (
        "the set 'zone' has no layers; give at least one, or leave the set out.",
        lambda: bias_layers(vlm(), ASKED, {"zone": []}),
    ),
    (
        "controls=-1 is no number of random sets; give 0 or more.",
        lambda: bias_layers(vlm(), ASKED, {"zone": [0]}, controls=-1),
    ),
    (
        "{} is no evaluation; make it with mv.evaluate.pope.",
        lambda: depth_correlation({}, xr.DataArray([[1.0]], dims=["item", "layer"])),  # type: ignore[arg-type]
    ),
    (
        "attention is an array of item by layer, and item, head was given; average the other dims first.",
        lambda: depth_correlation(evaluations.baseline(1), xr.DataArray([[1.0]], dims=["item", "head"])),
    ),
    (
        "there is attention of 1 items, and the evaluation has 6; give both for the same questions in the same order.",
        lambda: depth_correlation(evaluations.baseline(1), xr.DataArray([[1.0]], dims=["item", "layer"])),
    ),
    (
        "zone=[7] is not among the layers 0 to 2; give at least one of them.",
        lambda: depth_correlation(evaluations.baseline(1), xr.DataArray(np.ones((6, 3)), dims=["item", "layer"]), [7]),
    ),
    (
        "this model sees the picture by cross-attention, in layers 1, 3, where all keys are the picture's, so a bias "
        "on them changes nothing; scale what those layers add instead, by mv.scale_heads(..., cross=True).",
        lambda: viar_edits(across(), ask(across(), tiny.picture()), layers=[0]),
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
