"""What may be said of answers: of one split, parsed, under other settings, and where questions share a picture."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from evaluations import baseline, changed, evaluation

import mechvlm as mv
from mechvlm import plot
from mechvlm.methods.bands import _chance, _point
from mechvlm.report import benchmark

stats = mv.evaluate.stats
EDIT = np.where(np.arange(60) % 2 == 0, 0.9, -0.4) + np.random.default_rng(7).normal(0, 0.5, 60)


def of_words(one: xr.Dataset, turned: int = 3, to: str = "other") -> xr.Dataset:
    """An evaluation whose parser read some of the answers otherwise than the first token says."""
    predicted = np.where(np.arange(one.sizes["item"]) % 20 < turned, to, one.predicted.values.astype("<U5"))
    return one.assign(predicted=("item", predicted), correct=("item", predicted == one.label.values))


# -- some items of an evaluation --------------------------------------------------------------------------------------


def splits(one: xr.Dataset) -> xr.Dataset:
    """Two splits that share their questions of yes, as POPE's do, over what one split is."""
    other = one.question.values.astype("<U60").copy()
    other[one.label.values == "no"] = [f"another {at}" for at in range((one.label == "no").sum().item())]
    whole = xr.concat([one, one.assign_coords(question=("item", other))], "item")
    count = one.sizes["item"]
    first = np.where(one.label.values == "yes", np.arange(count), np.arange(count) + count)
    both = np.concatenate([np.arange(count), first])
    names = np.repeat(["random", "popular"], count)
    return whole.assign_coords(item=np.arange(2 * count), duplicate_of=("item", both), split=("item", names))


def second_split(one: xr.Dataset) -> xr.Dataset:
    return splits(one).isel(item=slice(one.sizes["item"], None))


def test_one_split_of_an_evaluation_is_compared_with_all_its_questions() -> None:
    base, edited = baseline(10), changed(baseline(10), EDIT)
    whole, found = (stats.compare(of(base), of(edited), resamples=50) for of in (splits, second_split))
    xr.testing.assert_identical(
        found.drop_attrs(deep=False), stats.compare(base, edited, resamples=50).drop_attrs(deep=False)
    )
    assert (found.attrs["items"], whole.attrs["items"]) == (60, 90)


def test_the_first_of_those_that_are_there_counts() -> None:
    part = splits(baseline(2)).isel(item=[14, 2, 3, 15, 2])
    assert stats.first_asked(part).tolist() == [True, False, True, True, False]


def test_one_split_is_correlated_and_reported_with_all_its_questions() -> None:
    base = baseline(10)
    attention = xr.DataArray(np.random.default_rng(0).normal(size=(60, 2)), dims=["item", "layer"])
    found = mv.methods.viar.depth_correlation(second_split(base), attention, permutations=9)
    assert found.attrs["items"] == 60
    assert benchmark.calibration(second_split(base)).numbers["reliability"].n_items.sum() == 60
    edited = changed(base, EDIT)
    turned = int((base.predicted != edited.predicted).sum())
    section = benchmark.turned_answers(second_split(base), second_split(edited))
    assert turned >= 5 and section.finding.startswith(f"{turned} answers changed")
    assert "of 60 different questions" in benchmark.by_split({"base": second_split(base)}).finding
    assert _point(second_split(base), second_split(edited)) == _point(base, edited)


# -- parsed answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["other", "yes"])
@pytest.mark.parametrize("side", ["base", "edited", "both"])
def test_of_parsed_answers_nothing_is_said_of_a_threshold(side: str, to: str) -> None:
    base, edited = baseline(10), changed(baseline(10), EDIT)
    base, edited = (
        of_words(one, to=to) if side in (name, "both") else one for name, one in (("base", base), ("edited", edited))
    )
    found = stats.compare(base, edited, resamples=50)
    for name in ("advantage", "advantage_low", "advantage_p", "matched_shift", "sweep_accuracy", "sweep_best_shift"):
        assert found[name].isnull().all()
    assert found.value.sel(model="threshold").isnull().all()
    assert found.difference.sel(metric="accuracy") == (edited.correct.mean() - base.correct.mean())
    verdict = found.attrs["verdict"]
    assert "whether a threshold does the same cannot be said" in verdict and "moving the threshold:" not in verdict
    named = "base" if side == "both" else side
    off = int((of_words(baseline(10) if named == "base" else changed(baseline(10), EDIT), to=to).predicted
               != (baseline(10) if named == "base" else changed(baseline(10), EDIT)).predicted).sum())  # fmt: skip
    assert found.attrs["threshold"].startswith(f"{off} of 60 answers ({named})")


def test_the_same_parsed_answers_are_not_worse_than_themselves() -> None:
    base = of_words(baseline(10))
    found = stats.compare(base, base, resamples=50)
    assert found.attrs["verdict"] == (
        "accuracy with the edit is that of base: no answer turns right or wrong, so there is nothing to tell apart"
    )


def test_a_page_is_headed_by_files_without_their_hashes_and_breaks_no_interval(tmp_path: Path) -> None:
    base = baseline(10).assign_attrs(questions=f"a.json sha256 {'0' * 64}; b.json sha256 {'1' * 64}", model="tiny")
    made = benchmark.benchmark_page({"base": base}, tmp_path, {"made": "2026-01-01"}).read_text(encoding="utf-8")
    assert "<h1>a.json, b.json: 10 pictures</h1>" in made
    assert made.count("0" * 64) == 1  # where the numbers come from
    shown = benchmark.by_split({"base": base}).tables[0].rows[0][2]
    value, _, interval = str(shown).partition(" ")
    assert f'<span class="number">{value}</span> <span class="number">{interval}</span>' in made


def test_where_no_answer_changes_nothing_is_told_apart() -> None:
    base = baseline(10)
    found = stats.compare(base, changed(base, 1e-9), resamples=50)
    assert found.attrs["verdict"].endswith(
        "is that of base: no answer turns right or wrong, so there is nothing to tell apart"
    )
    section = benchmark.turned_answers(base, base)
    assert (section.finding, section.tables) == ("No answer changed.", [])
    assert benchmark.turned_text([False]) == "1 answer changed, and with the edits it is wrong."
    assert benchmark.turned_text([True, True, False]) == "3 answers changed; with the edits 2 of them are right."


def test_parsed_answers_that_are_the_margins_have_a_threshold() -> None:
    base = baseline(10).assign_attrs(parser="official")
    found = stats.compare(base, changed(base, EDIT), resamples=50)
    assert found.attrs["threshold"] == "of the base's margin"
    assert found.advantage.sel(metric="accuracy").notnull()


def test_calibration_of_parsed_answers_says_that_it_is_of_the_first_token() -> None:
    plain, parsed = baseline(10), of_words(baseline(10))
    assert stats.compare(plain, plain, resamples=9).attrs["calibration"] == "of the answers"
    found = stats.compare(plain, parsed, resamples=9)
    assert found.attrs["calibration"] == (
        "of the first token's yes or no, which is not the answer that counts in 0 of 60 items of base and 9 of 60 "
        "items of edited"
    )
    assert "not the answer that counts in 9 of 60 items of base" in benchmark.calibration(parsed).sentence


def test_the_table_and_the_pages_of_parsed_answers_say_why_there_is_no_threshold() -> None:
    base = of_words(baseline(10))
    edited = of_words(changed(baseline(10), EDIT))
    found = stats.compare(base, edited, resamples=50)
    table = stats.comparison_table(found)
    assert table.loc["nothing is said of a threshold, since", "threshold moved"] == found.attrs["threshold"]
    assert table.loc["accuracy", "threshold moved"] == table.loc["shift of the threshold", "threshold moved"] == ""
    assert "Brier score, first token" in table.index and "expected calibration error, first token" in table.index
    assert not table.map(lambda cell: "nan" in cell).any(axis=None)
    sections = benchmark.changes(base, edited)
    assert sections[1].finding == f"No threshold is moved: {found.attrs['threshold']}."
    assert "nan" not in " ".join(section.finding for section in sections)
    caption = " ".join(note.text for note in plot.comparison(found).layout.annotations)
    assert "No threshold is moved" in caption.replace("<br>", " ")


def test_random_layers_are_not_counted_where_nothing_is_said_of_a_threshold() -> None:
    parsed = of_words(baseline(10))
    assert np.isnan(_point(parsed, parsed)[1]) and _point(parsed, parsed)[0] == parsed.correct.mean()
    columns = [{"accuracy": (0.9, 0.8, 1.0), "beyond": (own, np.nan, np.nan)} for own in (np.nan, 0.1)]
    found = _chance(columns, [[(0.5, np.nan)], [(0.5, np.nan)]], 1)
    assert np.isnan(found["p_value_beyond"][1]).all() and found["p_value"][1].tolist() == [0.5, 0.5]


def test_a_contrast_is_compared_with_a_threshold_and_has_none_itself() -> None:
    """Its margin is before the cut, and what it says is after it."""
    base, cut = baseline(10), changed(baseline(10), EDIT)
    gone = (np.arange(60) % 4 == 0) & (cut.margin.values > 0)
    said = np.where(gone, "no", cut.predicted)
    cut = cut.assign(
        predicted=("item", said), p_yes=cut.p_yes.where(~gone, 0.0), correct=("item", said == base.label.values)
    )
    assert gone.sum() >= 1
    found = stats.compare(base, cut, resamples=50)
    assert found.attrs["threshold"] == "of the base's margin" and found.attrs["calibration"] == "of the answers"
    ratio = (cut.predicted == "yes").mean().item()
    moved = stats.matched_baseline(base.margin, base.label, ratio, resamples=1).value.sel(metric="accuracy").item()
    assert found.advantage.sel(metric="accuracy").item() == pytest.approx(cut.correct.mean().item() - moved)
    assert stats.compare(cut, base, resamples=50).attrs["threshold"].startswith(f"{gone.sum()} of 60 answers (base)")


# -- other settings ---------------------------------------------------------------------------------------------------


def test_what_differs_beside_the_edit_is_named() -> None:
    base = baseline(10).assign_attrs(template="{question}", parser="none")
    edited = changed(base, EDIT)

    def said(**attrs: str) -> str:
        found = stats.compare(
            base, edited.assign_attrs({"template": "{question}", "parser": "none"} | attrs), resamples=9
        )
        return str(found.attrs["verdict"].partition(" ")[2].partition(" cannot ")[0].partition(" is ")[0])

    assert said() == "with the edit"
    assert said(template="viar", edits="none") == "with another template"
    assert said(template="viar") == "with another template and the edit"
    assert said(model="other", template="viar", parser="official", edits="none") == (
        "with another model, another template and another parser"
    )
    found = stats.compare(base, edited.assign_attrs(template="viar", edits="none"), resamples=9)
    assert found.attrs["differs"] == "another template"
    assert stats.comparison_table(found).loc["what differs", "edited"] == "another template"


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_no_p_value_of_draws_is_zero_but_the_published_one() -> None:
    apart = np.zeros(50), np.ones(50)
    assert stats.paired_bootstrap(*apart, resamples=99).p_value == 0.01
    assert stats.paired_bootstrap(*apart, resamples=99, convention="viar-2026").p_value == 0.0
    base = baseline(10)
    found = stats.compare(base, changed(base, np.where(base.label == "yes", 9.0, -9.0)), resamples=99)
    assert found.p.sel(metric="accuracy") == found.advantage_p.sel(metric="accuracy") == 0.01


def test_the_published_p_value_is_the_share_of_draws() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    own, old = (stats.paired_bootstrap(a, b, resamples=999, convention=name).p_value for name in (None, "viar-2026"))
    assert own == pytest.approx((1 + round(old * 999)) / 1000)


def test_one_picture_has_no_p_value_and_no_verdict() -> None:
    base = baseline(1)
    edited = changed(base, -3.0)
    assert np.isnan(stats.paired_bootstrap(base.correct, edited.correct, base.image.values).p_value)
    found = stats.compare(base, edited, resamples=9)
    assert found.p.isnull().all() and found.advantage_p.isnull().all()
    assert "cannot be told" in found.attrs["verdict"] and "on one picture" in found.attrs["verdict"]
    assert stats.comparison_table(found).loc["one-sided p of the difference, accuracy", "edited - base"] == ""
    several = evaluation(np.array([1.0, -1, 1, -1, 1, 1]), np.array(["yes", "no"] * 3), np.array(["a"] * 6))
    attention = xr.DataArray(np.arange(6.0)[:, None] ** 2, dims=["item", "layer"])
    said = mv.methods.viar.depth_correlation(several, attention, permutations=9)
    assert np.isnan([said.p, said.p_max, said.p_permuted, said.p_bh]).all() and np.isfinite(said.r)
    assert "cannot be told from none on one picture" in said.says.item()


def null_world(seed: int, pictures: int = 60) -> tuple[xr.Dataset, xr.DataArray]:
    """Some pictures are harder, and attention is mostly the picture's; neither has to do with the other."""
    generator = np.random.default_rng(seed)
    picture, labels = np.repeat(np.arange(pictures), 6), np.where(np.arange(6 * pictures) % 2 == 0, "yes", "no")
    hard = generator.normal(size=pictures)[picture]
    margins = np.where(labels == "yes", 1, -1) * (1.2 + 0.8 * hard + generator.normal(size=6 * pictures))
    attention = generator.normal(size=(pictures, 4))[picture] + 0.4 * generator.normal(size=(6 * pictures, 4))
    return evaluation(margins, labels, picture.astype(str)), xr.DataArray(attention, dims=["item", "layer"])


def test_attention_that_pictures_share_is_not_taken_for_an_association() -> None:
    """Of 30 worlds 2 are expected below 0.05; permuting items finds a quarter of them."""
    found = items = 0
    for seed in range(30):
        answers, attention = null_world(seed)
        strata = answers.predicted.values
        given = {"strata": strata, "permutations": 99, "resamples": 1}
        clustered = stats.associate(attention, answers.correct, clusters=np.repeat(range(60), 6), **given)
        found += float(clustered.p_max.min()) <= 0.05
        items += float(stats.associate(attention, answers.correct, **given).p_max.min()) <= 0.05
    assert found <= 4 and items >= 5


def test_attention_that_goes_with_being_right_is_found_over_pictures() -> None:
    answers, attention = null_world(0)
    attention[:, 2] -= 1.5 * answers.correct.values
    found = mv.methods.viar.depth_correlation(answers, attention, permutations=499)
    assert ["more attention" in said for said in found.says.values] == [False, False, True, False]
    assert "over pictures" in found.says.values[2]


def test_p_values_over_clusters_are_those_of_all_signs() -> None:
    generator = np.random.default_rng(5)
    x, right, groups = generator.normal(size=(24, 2)), np.arange(24) % 3 == 0, np.arange(24) // 3
    strata = generator.integers(0, 2, 24)
    found = stats.associate(
        xr.DataArray(x, dims=["item", "layer"]), right, strata, groups, permutations=20_000, resamples=1
    )
    x, y = x.copy(), right.astype(float)
    for stratum in (0, 1):
        x[strata == stratum] -= x[strata == stratum].mean(0)
        y[strata == stratum] -= y[strata == stratum].mean()
    scores = np.stack([(x * y[:, None])[groups == one].sum(0) for one in range(8)])
    every = np.array([np.abs(np.array(signs) @ scores) for signs in product((-1, 1), repeat=8)])
    every /= (scores**2).sum(0) ** 0.5
    own = np.abs(scores.sum(0)) / (scores**2).sum(0) ** 0.5
    assert found.p_permuted.values == pytest.approx((every >= own - 1e-9).mean(0), abs=4 * (0.25 / 20_000) ** 0.5)
    wanted = (every.max(1)[:, None] >= own - 1e-9).mean(0)
    assert found.p_max.values == pytest.approx(wanted, abs=4 * (0.25 / 20_000) ** 0.5)
