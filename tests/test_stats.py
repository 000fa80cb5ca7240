"""Statistics of evaluations against scipy, statsmodels, scikit-learn and plain loops, and with planted truths."""

from itertools import product

import numpy as np
import pytest
import xarray as xr
from evaluations import baseline, changed, evaluation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, pointbiserialr, ttest_ind
from sklearn import metrics as reference
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

import mechvlm as mv
from mechvlm import plot
from mechvlm.evaluate.draws import drawn_clusters
from mechvlm.evaluate.scoring import METRICS

stats = mv.evaluate.stats
ANSWERS = st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no", "other"])), min_size=1)


# -- effects ----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0, 1))
def test_cohens_h_is_statsmodels(p1: float, p2: float) -> None:
    assert stats.cohens_h(p1, p2) == pytest.approx(proportion_effectsize(p2, p1), abs=1e-12)


@pytest.mark.parametrize(("tails", "name"), [(2, "two-sided"), (1, "larger")])
def test_power_is_statsmodels(tails: int, name: str) -> None:
    for h, n in product((-0.3, 0.0, 0.02, 0.2), (10, 500)):
        assert stats.power(h, n, 0.03, tails) == pytest.approx(NormalIndPower().power(h, n, 0.03, 1, name), abs=1e-12)


def test_the_required_number_is_the_first_with_the_power() -> None:
    for h in (0.05, 0.2, -0.8):
        n = stats.required_n(h, 0.9, 0.01)
        assert stats.power(h, n, 0.01) >= 0.9 > stats.power(h, n - 1, 0.01)


def test_two_equal_shares_are_told_apart_as_often_as_alpha_and_half_as_often_upwards() -> None:
    assert stats.power(0, 100) == pytest.approx(0.05)
    assert stats.power(0, 100, tails="upper") == pytest.approx(0.025)


def test_cohens_d_is_the_t_statistic_over_its_root() -> None:
    one, two = np.random.default_rng(0).normal(size=12), np.random.default_rng(1).normal(1, 2, 30)
    t = ttest_ind(two, one).statistic
    assert stats.cohens_d(one, two) == pytest.approx(t * (1 / 12 + 1 / 30) ** 0.5)


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exact", "corrected"), [(True, True), (False, True), (False, False)])
def test_mcnemar_is_statsmodels(exact: bool, corrected: bool) -> None:
    for b, c in ((3, 9), (0, 1), (40, 20)):
        wanted = mcnemar([[5, b], [c, 7]], exact=exact, correction=corrected)
        found = stats.mcnemar(b, c, exact, corrected)
        assert (found.statistic, found.p_value) == (wanted.statistic, wanted.pvalue)


def test_the_paired_bootstrap_is_scipys() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=60), generator.normal(0.3, 1, 60)
    found = stats.paired_bootstrap(a, b, resamples=20_000)
    wanted = bootstrap([b - a], np.mean, n_resamples=20_000, method="percentile", rng=0)
    assert [found.low, found.high] == pytest.approx(wanted.confidence_interval, abs=0.015)
    assert found.p_value == pytest.approx((wanted.bootstrap_distribution <= 0).mean(), abs=0.01)


def test_items_of_a_cluster_are_drawn_together() -> None:
    """Six equal items a picture: as if there were one."""
    once = np.random.default_rng(0).normal(size=40)
    alone = stats.paired_bootstrap(np.zeros(40), once)
    names = [f"picture {at}" for at in range(40) for _ in range(6)]
    six = stats.paired_bootstrap(np.zeros(240), np.repeat(once, 6), clusters=names)
    apart = stats.paired_bootstrap(np.zeros(240), np.repeat(once, 6))
    assert (six.low, six.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / 6**0.5, rel=0.05)


def test_values_that_many_items_have_are_drawn_as_often() -> None:
    """Forty values once and one two hundred times, which is a draw of another kind than of a few answers."""
    values = np.concatenate([np.linspace(1, 2, 40), np.full(200, -1.0)])
    found = stats.paired_bootstrap(np.zeros(240), values)
    deviation = values.std() / 240**0.5
    assert [found.low, found.high] == pytest.approx(values.mean() + 1.96 * deviation * np.array([-1, 1]), abs=0.01)


def test_one_picture_has_no_interval() -> None:
    found = stats.paired_bootstrap([0, 1], [1, 1], clusters=["a", "a"])
    assert found.mean == 0.5
    assert np.isnan([found.low, found.high]).all()


def test_a_certain_difference_is_believed_and_none_is_even() -> None:
    assert stats.beta_independent(10, 100, 60, 100).p_above == 1.0
    assert stats.beta_independent(50, 100, 50, 100).p_above == pytest.approx(0.5, abs=0.007)
    assert stats.beta_paired(40, 5, 5, 50).p_above == pytest.approx(0.5, abs=0.007)


def test_a_beta_posterior_is_its_formula() -> None:
    found = stats.beta_independent(30, 100, 45, 100)
    assert found.mean == pytest.approx(46 / 102 - 31 / 102, abs=1e-3)
    exact = stats.beta_paired(30, 2, 17, 51)
    assert exact.mean == pytest.approx((18 - 3) / 104, abs=1e-3)


# -- answers ----------------------------------------------------------------------------------------------------------


@given(ANSWERS)
@settings(max_examples=40)
def test_scores_are_scikit_learns(answers: list[tuple[str, str]]) -> None:
    labels, predicted = (list(one) for one in zip(*answers, strict=True))
    found = stats.scores(labels, predicted, resamples=1).value
    yes = [[one == "yes" for one in side] for side in (labels, predicted)]
    assert found.sel(metric="accuracy").item() == pytest.approx(np.mean([a == b for a, b in answers]))
    assert found.sel(metric="yes_ratio").item() == pytest.approx(np.mean(yes[1]))
    assert found.sel(metric="other").item() == pytest.approx(np.mean([one == "other" for one in predicted]))
    for name in ("precision", "recall", "f1"):
        score = {"precision": reference.precision_score, "recall": reference.recall_score, "f1": reference.f1_score}
        wanted = score[name](*yes, zero_division=np.nan)
        assert found.sel(metric=name).item() == pytest.approx(wanted, nan_ok=True)


def test_intervals_of_scores_are_those_of_plain_draws_of_pictures() -> None:
    one = baseline(30)
    labels, predicted, images = (one[name].values for name in ("label", "predicted", "image"))
    found = stats.scores(labels, predicted, images, resamples=4000)
    names, generator, drawn = np.unique(images), np.random.default_rng(5), []
    places = {name: np.flatnonzero(images == name) for name in names}
    for _ in range(1500):
        here = np.concatenate([places[name] for name in generator.choice(names, len(names))])
        hit = ((labels[here] == "yes") & (predicted[here] == "yes")).sum()
        drawn.append(2 * hit / ((labels[here] == "yes").sum() + (predicted[here] == "yes").sum()))
    f1 = found.sel(metric="f1")
    assert [f1.low, f1.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_brier_is_scikit_learns() -> None:
    one = baseline()
    wanted = reference.brier_score_loss(one.label.values == "yes", one.p_yes.values)
    assert stats.brier(one.p_yes, one.label) == pytest.approx(wanted)


def test_reliability_is_a_loop_over_items() -> None:
    one, error = baseline(), 0.0
    sure = np.maximum(one.p_yes.values, 1 - one.p_yes.values)
    found = stats.reliability(one.p_yes, one.label)
    for at in range(10):
        here = [k for k in range(len(sure)) if at / 10 < sure[k] <= (at + 1) / 10]
        assert found.n_items.values[at] == len(here)
        if here:
            right = np.mean(one.correct.values[here])
            assert found.accuracy.values[at] == pytest.approx(right)
            error += len(here) / len(sure) * abs(right - np.mean(sure[here]))
    assert found.ece.item() == pytest.approx(error)


def test_a_bin_holds_its_upper_end() -> None:
    found = stats.calibration([0.0, 0.25, 0.5, 0.75, 1.0], [1, 1, 1, 1, 1], bins=4)
    assert found.n_items.values.tolist() == [2, 1, 1, 1]


def test_answers_as_often_right_as_sure_have_no_calibration_error() -> None:
    sure, right = np.repeat([0.75, 0.9], [40, 50]), np.concatenate([np.arange(40) < 30, np.arange(50) < 45])
    assert stats.calibration(sure, right).ece.item() == pytest.approx(0, abs=1e-12)


# -- thresholds -------------------------------------------------------------------------------------------------------


def test_a_sweep_is_every_shift_by_itself() -> None:
    one = baseline()
    found = stats.threshold_sweep(one.margin, one.label, [-1.0, 0.0, 2.5])
    for shift in (-1.0, 0.0, 2.5):
        here = changed(one, shift)
        wanted = stats.scores(here.label, here.predicted, resamples=1).value
        for name in ("accuracy", "f1", "yes_ratio"):
            assert found.sel(shift=shift)[name].item() == wanted.sel(metric=name).item()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.floats(0, 1))
def test_a_matched_shift_is_between_the_two_next_yes_ratios(margins: list[int], wanted: float) -> None:
    found = stats.matched_shift([float(one) for one in margins], wanted)
    margins_ = np.array(margins, float)
    for side in ("fewer", "more"):
        said = (margins_ + found[side].item() > 0).mean()
        assert said == pytest.approx(found[f"{side}_ratio"].item())
    possible = np.array([(margins_ > edge).mean() for edge in range(-4, 5)])
    assert found.fewer_ratio.item() == pytest.approx(possible[possible <= wanted + 1e-12].max())
    assert found.more_ratio.item() == pytest.approx(possible[possible >= wanted - 1e-12].min())
    mixed = found.fewer_ratio + found.weight * (found.more_ratio - found.fewer_ratio)
    assert mixed.item() == pytest.approx(wanted)


def test_a_threshold_that_has_the_yes_ratio_is_not_moved() -> None:
    assert stats.matched_shift([3.0, 1.0, -1.0, -5.0], 0.5)["shift"].item() == 0.0


def test_ties_are_answered_by_lot_on_average() -> None:
    """Four items of one margin, three of them yes, of which half are to be yes: every choice of two, averaged."""
    labels = np.array(["yes", "yes", "yes", "no"])
    found = stats.matched_baseline([1.0] * 4, labels, 0.5, resamples=1).value.sel(metric="accuracy").item()
    chosen = [np.isin(np.arange(4), [i, j]) for i in range(4) for j in range(i)]
    assert found == pytest.approx(np.mean([(one == (labels == "yes")).mean() for one in chosen]))


def test_a_matched_baseline_is_a_sweeps_row_where_one_has_its_yes_ratio() -> None:
    one = baseline()
    row = stats.threshold_sweep(one.margin, one.label, [0.75])
    found = stats.matched_baseline(one.margin, one.label, row.yes_ratio.item(), resamples=1).value
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found.sel(metric=name).item() == pytest.approx(row[name].item())


# -- many tests -------------------------------------------------------------------------------------------------------


def test_what_was_not_tested_has_no_p_value_and_does_not_count() -> None:
    found = stats.benjamini_hochberg([0.01, np.nan, 0.04])
    assert found[[0, 2]].tolist() == [0.02, 0.04]
    assert np.isnan(found[1])


def planted(items: int = 300) -> tuple[xr.DataArray, np.ndarray, np.ndarray]:
    """Layer 1 says which answer it is, layer 2 whether it is right; answers say yes are right more often."""
    generator = np.random.default_rng(0)
    answer = generator.random(items) < 0.5
    right = generator.random(items) < np.where(answer, 0.9, 0.5)
    values = generator.normal(size=(items, 4))
    values[:, 1] += 3 * answer
    values[:, 2] += 0.8 * right
    layers = xr.DataArray(values, dims=["item", "layer"], coords={"layer": range(4)})
    return layers, right, np.where(answer, "yes", "no")


def test_what_tells_yes_from_no_is_not_told_from_being_right_within_answers() -> None:
    values, right, answer = planted()
    plain = stats.associate(values, right, permutations=999)
    within = stats.associate(values, right, strata=answer, permutations=999)
    assert plain.layer[plain.p_max <= 0.05].values.tolist() == [1, 2]
    assert within.layer[within.p_max <= 0.05].values.tolist() == [2]


def test_correlations_are_scipys_with_and_without_strata() -> None:
    values, right, answer = planted(80)
    found = stats.associate(values, right, strata=answer, permutations=9, resamples=9)
    alone = stats.associate(values, right, permutations=9, resamples=9)
    for layer in range(4):
        column = values.values[:, layer]
        wanted = pointbiserialr(right, column)
        assert (alone.r[layer].item(), alone.p[layer].item()) == pytest.approx(tuple(wanted))
        for stratum in ("yes", "no"):
            here = answer == stratum
            r = found.r_stratum.sel(stratum=stratum, layer=layer).item()
            assert r == pytest.approx(pointbiserialr(right[here], column[here])[0])
        design = np.stack([right, answer == "yes", answer == "no"], 1).astype(float)
        assert found.p[layer].item() == pytest.approx(OLS(column, design).fit().pvalues[0])


def test_p_values_of_permutations_are_those_of_all_permutations() -> None:
    values = xr.DataArray(np.random.default_rng(1).normal(size=(8, 1)), dims=["item", "layer"])
    right = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    found = stats.associate(values, right, permutations=20_000, resamples=1)
    every = [pointbiserialr(np.isin(np.arange(8), [i, j, k]), values.values[:, 0])[0]
             for i in range(8) for j in range(i) for k in range(j)]  # fmt: skip
    wanted = (np.abs(every) >= abs(found.r.item()) - 1e-9).mean()
    assert found.p_permuted.item() == pytest.approx(wanted, abs=4 * (0.25 / 20_000) ** 0.5)
    assert found.p_max.item() == found.p_permuted.item()


def test_permutations_stay_within_strata() -> None:
    """Beside all outcomes that keep each stratum's count: a quarter and a half are right, so that strata differ."""
    values = np.random.default_rng(4).normal(size=8)
    right, strata = np.array([1, 0, 0, 0, 1, 1, 0, 0]), np.repeat([0, 1], 4)
    data = xr.DataArray(values[:, None], dims=["item", "layer"])
    found = stats.associate(data, right, strata=strata, permutations=20_000, resamples=1)
    x = values - np.repeat([values[:4].mean(), values[4:].mean()], 4)
    every = []
    for i, j, k in product(range(4), range(4, 8), range(4, 8)):
        if j < k:
            y = np.isin(np.arange(8), [i, j, k]) - np.repeat([0.25, 0.5], 4)
            every.append(np.corrcoef(x, y)[0, 1])
    wanted = (np.abs(every) >= abs(found.r_within.item()) - 1e-9).mean()
    assert found.p_permuted.item() == pytest.approx(wanted, abs=4 * (0.25 / 20_000) ** 0.5)


def test_no_p_value_of_permutations_is_zero() -> None:
    right = np.arange(60) < 30
    data = xr.DataArray(np.stack([right, -1.0 * right], 1), dims=["item", "layer"])
    found = stats.associate(data, right, permutations=9, resamples=1)
    assert found.p_permuted.values.tolist() == found.p_max.values.tolist() == [0.1, 0.1]


def test_the_interval_of_a_correlation_is_that_of_plain_draws_of_clusters() -> None:
    values, right, answer = planted(90)
    groups = np.arange(90) // 3
    found = stats.associate(values, right, strata=answer, clusters=groups, permutations=1, resamples=4000)
    generator, drawn = np.random.default_rng(2), []
    for _ in range(1500):
        here = np.concatenate([np.flatnonzero(groups == one) for one in generator.integers(0, 30, 30)])
        x, y = values.values[here, 2].copy(), right[here].astype(float)
        for stratum in ("yes", "no"):
            of = answer[here] == stratum
            x[of] -= x[of].mean()
            y[of] -= y[of].mean()
        drawn.append(np.corrcoef(x, y)[0, 1])
    assert [found.low[2], found.high[2]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.025)


def test_a_value_that_does_not_vary_goes_with_nothing() -> None:
    values, right, _ = planted(40)
    values[:, 3] = 0.1
    found = stats.associate(values, right, permutations=20, resamples=5)
    assert all(np.isnan(found[name][3]) for name in ("r", "d", "p", "p_bh", "p_permuted", "p_max", "low"))
    assert np.isfinite(found.p_max[:3]).all()


def test_draws_without_an_error_have_no_correlation_and_no_part_in_the_interval() -> None:
    """Beside numpy in every draw: four errors of 60, in clusters of their own, are not drawn in 2 % of draws."""
    right = np.arange(60) >= 4
    values = np.random.default_rng(0).normal(5, 1, size=60) + right
    data = xr.DataArray(values[:, None], dims=["item", "layer"])
    found = stats.associate(data, right, permutations=1, resamples=3000)
    times = drawn_clusters(60, 3000, 0)
    kept = [np.repeat(np.arange(60), one.astype(int)) for one in times if 0 < one[:4].sum() < 60]
    wanted = np.quantile([np.corrcoef(values[one], right[one])[0, 1] for one in kept], [0.025, 0.975])
    assert found.attrs["left_out"] == 3000 - len(kept) > 20
    assert [found.low.item(), found.high.item()] == pytest.approx(wanted)


def test_one_error_has_no_interval_nor_has_what_is_seldom_drawn() -> None:
    values, right, answer = planted(60)
    one = stats.associate(values, np.arange(60) > 0, permutations=9, resamples=200)
    assert one.low.isnull().all() and one.high.isnull().all()
    assert one.attrs["interval"] == "none: the outcome is False in less than two clusters"
    alone = right | (answer == "yes")
    alone[np.flatnonzero(answer == "yes")[0]] = False
    within = stats.associate(values, alone & (answer == "yes"), strata=answer, permutations=9, resamples=200)
    assert within.attrs["interval"].endswith("in less than two clusters of the strata in which it varies")
    strata, seldom = np.array(["a"] * 2 + ["b"] * 58), xr.DataArray(np.eye(60)[:, :1], dims=["item", "layer"])
    drawn = stats.associate(seldom, np.arange(60) % 2, strata=strata, permutations=9, resamples=200)
    assert drawn.attrs["interval"] == "none: there is a correlation in less than half of the 200 draws"
    assert drawn.low.isnull().all() and np.isfinite(drawn.r_within).all()
    assert stats.associate(values, right, permutations=9).attrs["interval"].startswith("percentile")


# -- two evaluations --------------------------------------------------------------------------------------------------


def compared(base: xr.Dataset, edited: xr.Dataset, resamples: int = 800, duplicates: str = "drop") -> xr.Dataset:
    return stats.compare(base, edited, duplicates, resamples)


def test_an_edit_that_moves_the_threshold_is_equivalent_to_moving_the_threshold() -> None:
    base = baseline()
    found = compared(base, changed(base, 0.7))
    for name in ("advantage", "advantage_low", "advantage_high"):
        assert found[name].values[:-1] == pytest.approx(np.zeros(6), abs=1e-12)
    assert found.matched_shift.item() == pytest.approx(0.7, abs=0.05)
    assert "cannot be told from" in found.attrs["verdict"]


def test_an_edit_that_knows_the_answer_is_better_than_a_threshold() -> None:
    base = baseline(80)
    found = compared(base, changed(base, np.where(base.label == "yes", 1.2, -0.5)))
    assert found.advantage_low.sel(metric="accuracy") > 0
    assert "is better than" in found.attrs["verdict"]


def test_an_edit_that_adds_noise_is_worse_than_a_threshold() -> None:
    base = baseline(80)
    found = compared(base, changed(base, 0.5 + np.random.default_rng(1).normal(0, 3, 480)))
    assert found.advantage_high.sel(metric="accuracy") < 0
    assert "is worse than" in found.attrs["verdict"]


def test_the_advantage_is_that_of_plain_draws_with_the_threshold_matched_anew() -> None:
    base = baseline(25)
    edited = changed(base, 0.6 + np.random.default_rng(1).normal(size=150))
    found = compared(base, edited, 3000).sel(metric="accuracy")
    margins, truth, groups = base.margin.values, base.label.values == "yes", np.arange(150) // 6
    generator, drawn = np.random.default_rng(9), []
    for _ in range(1500):
        here = np.concatenate([np.arange(6) + 6 * one for one in generator.integers(0, groups.max() + 1, 25)])
        many = int((edited.margin.values[here] > 0).sum())
        top = here[np.argsort(-margins[here], kind="stable")[:many]]
        # An item drawn twice has one margin, so that the last of the highest may be tied with its like.
        moved = truth[top].sum() + (~truth[here]).sum() - (~truth[top]).sum()
        drawn.append(edited.correct.values[here].mean() - moved / 150)
    assert [found.advantage_low, found.advantage_high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.008)


def test_a_comparison_holds_what_each_statistic_says_by_itself() -> None:
    base = baseline()
    edited = changed(base, 0.4 + np.random.default_rng(2).normal(0, 0.8, 240))
    found = compared(base, edited)
    first, second = base.correct.values, edited.correct.values
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    assert (found.only_base.item(), found.only_edited.item()) == (b, c)
    assert found.mcnemar_p_exact.item() == stats.mcnemar(b, c, exact=True).p_value
    h = stats.cohens_h(first.mean(), second.mean())
    assert found.cohens_h.sel(share="accuracy").item() == pytest.approx(h)
    assert found.required_n.sel(share="accuracy").item() == stats.required_n(h)
    assert found.value.sel(model="edited", metric="brier").item() == pytest.approx(
        stats.brier(edited.p_yes, edited.label)
    )
    assert found.ece.sel(model="base").item() == stats.reliability(base.p_yes, base.label).ece.item()
    bootstrapped = stats.paired_bootstrap(first, second, base.image.values)
    accuracy = found.sel(metric="accuracy")
    assert accuracy.difference.item() == pytest.approx(bootstrapped.mean)
    assert [accuracy.difference_low, accuracy.difference_high] == pytest.approx(
        [bootstrapped.low, bootstrapped.high], abs=0.013
    )
    change = edited.margin.values - base.margin.values
    assert found.margin_change.item() == pytest.approx(change.mean())
    sure = np.abs(base.margin.values) < 2
    assert found.band_change.sel(band="below 2").item() == pytest.approx(change[sure].mean())
    assert found.band_items.values.sum() == 240


def doubled(one: xr.Dataset) -> xr.Dataset:
    """Every question asked twice."""
    twice = xr.concat([one, one], "item")
    return twice.assign_coords(item=np.arange(2 * one.sizes["item"]), duplicate_of=twice.duplicate_of)


def test_a_question_asked_twice_counts_once_unless_said_otherwise() -> None:
    base = baseline(20)
    edited = changed(base, np.where(base.label == "yes", 1.0, -0.5))
    once, dropped = compared(base, edited), compared(doubled(base), doubled(edited))
    kept = compared(doubled(base), doubled(edited), duplicates="keep")
    xr.testing.assert_identical(once, dropped)
    assert kept.only_base == 2 * once.only_base
    assert kept.mcnemar_p < once.mcnemar_p
    # Pictures are drawn, so that the interval does not believe in the repetition.
    assert kept.difference_low.values == pytest.approx(once.difference_low.values)


def test_other_answers_are_wrong_and_are_not_yes() -> None:
    base = baseline(10)
    edited = changed(base, 0.0)
    edited["predicted"] = edited.predicted.copy(data=np.where(np.arange(60) < 6, "other", edited.predicted))
    edited["correct"] = edited.correct & (edited.predicted != "other")
    found = compared(base, edited).value
    assert found.sel(model="edited", metric="other").item() == 0.1
    for name in ("accuracy", "yes_ratio"):
        of = edited.correct if name == "accuracy" else edited.predicted == "yes"
        assert found.sel(model="edited", metric=name).item() == pytest.approx(of.mean().item())


def test_the_table_says_what_the_comparison_found() -> None:
    base = baseline()
    found = compared(base, changed(base, 0.4))
    table = stats.comparison_table(found)
    said = found.value.sel(model="base", metric="accuracy").item()
    assert table.loc["accuracy", "base"].startswith(f"{said:.4f} [")
    assert table.loc["accuracy", "edited - threshold moved"] == "+0.0000 [+0.0000, +0.0000]"
    assert table.loc["right in one only", ["base", "edited"]].tolist() == [
        f"{int(found[f'only_{k}'])}" for k in ("base", "edited")
    ]
    assert not table.isna().any(axis=None)
    same = stats.comparison_table(compared(base, base))
    assert same.loc["items a group for a power of 0.8", "edited - base"] == "none, as there is no difference"
    assert same.loc["McNemar", "edited - base"] == "no item differs"
    sure = base.assign(margin=base.margin.copy(data=np.where(base.margin > 0, 3.0, -3.0)))
    bands = stats.comparison_table(compared(sure, changed(sure, 0.5))).loc["by |baseline margin| (items)"]
    assert bands["edited - base"] == f"2 to 5: +0.500 ({found.attrs['items']})"


def test_the_base_has_the_same_interval_by_itself_and_compared() -> None:
    base = baseline()
    found = compared(base, changed(base, 0.4)).sel(model="base", metric=list(METRICS))
    alone = stats.scores(base.label, base.predicted, base.image, resamples=800)
    for name in ("value", "low", "high"):
        np.testing.assert_array_equal(found[name], alone[name])


def test_a_comparison_can_be_kept_in_a_file(tmp_path: object) -> None:
    base = baseline(10)
    found = compared(base, changed(base, 0.4), 50)
    found.to_netcdf(f"{tmp_path}/found.nc")
    with xr.open_dataset(f"{tmp_path}/found.nc") as again:
        assert again.attrs["verdict"] == found.attrs["verdict"]
        assert again.attrs["base_edits"] == "none"


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_reliability_diagram_holds_the_bins_that_hold_items() -> None:
    found = stats.reliability([0.95, 0.92, 0.65, 0.2], ["yes", "no", "yes", "no"])
    points = plot.reliability_diagram(found).data[1]
    assert points.x.tolist() == pytest.approx([0.65, 0.8, 0.935])
    assert points.y.tolist() == [1.0, 1.0, 0.5]


def test_the_edited_model_stands_beside_the_threshold_curve() -> None:
    base = baseline(20)
    found = compared(base, changed(base, 0.5), 50)
    curve, first, second = plot.threshold_curve(found).data
    sweep = stats.threshold_sweep(base.margin, base.label)
    assert (curve.x.tolist(), curve.y.tolist()) == (sweep.yes_ratio.values.tolist(), sweep.accuracy.values.tolist())
    assert second.y[0] == found.value.sel(model="edited", metric="accuracy").item()
    assert first.x[0] == found.value.sel(model="base", metric="yes_ratio").item()
    assert plot.threshold_curve(sweep).data[0].y.tolist() == curve.y.tolist()


def test_a_comparison_is_drawn_with_its_intervals() -> None:
    base = baseline(20)
    found = compared(base, changed(base, 0.5 + np.random.default_rng(0).normal(size=120)), 50)
    change, ahead = plot.comparison(found).data
    for trace, name in ((change, "difference"), (ahead, "advantage")):
        here = found.sel(metric=["accuracy", "precision", "recall", "f1", "yes_ratio"])
        assert np.asarray(trace.x) == pytest.approx(here[name].values)
        assert np.asarray(trace.x) + trace.error_x.array == pytest.approx(here[f"{name}_high"].values)
        assert np.asarray(trace.x) - trace.error_x.arrayminus == pytest.approx(here[f"{name}_low"].values)


def test_an_association_marks_the_layers_that_are_left() -> None:
    values, right, answer = planted()
    found = stats.associate(values, right, strata=answer, permutations=999)
    drawn = {trace.name: trace for trace in plot.association(found).data}
    assert drawn["pooled within"].y.tolist() == found.r_within.values.tolist()
    assert drawn["within no"].y.tolist() == found.r_stratum.sel(stratum="no").values.tolist()
    assert drawn["p_max up to 0.05"].x.tolist() == [2]


def test_evaluations_are_made_as_said() -> None:
    one = evaluation(np.array([2.0, -1.0]), np.array(["yes", "yes"]), np.array(["a", "a"]))
    assert one.correct.values.tolist() == [True, False]
