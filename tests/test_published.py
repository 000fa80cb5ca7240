"""VIAR's published statistics, computed again from its published files: to all printed digits, or to Monte-Carlo error.

What the files hold and where they come from is in data/viar/README.md.
"""

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import pointbiserialr
from statsmodels.stats.multitest import multipletests

import mechvlm as mv

DATA = Path(__file__).parent / "data" / "viar"
stats = mv.evaluate.stats


def published(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


POWER = published("power_analysis")
ACCURACY, YES = POWER["accuracy_analysis"], POWER["yesratio_analysis"]
NINE = published("threshold_comparison")
TESTS = NINE["statistical_tests"]
B, C = TESTS["baseline_only_correct"], TESTS["viar_only_correct"]
# The published counts are shares of 9000 with four digits, cut off and not rounded.
RIGHT = [int(NINE[which]["accuracy"] * 9000) for which in ("baseline", "viar")]
SAID_YES = [int(NINE[which]["yes_ratio"] * 9000) for which in ("baseline", "viar")]


# -- effect sizes, power, McNemar, bootstrap, posteriors --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "h"),
    [
        ((0.836, 0.844), ACCURACY["pope_500"]["cohens_h"]),
        ((0.8458, 0.8483), ACCURACY["pope_9k"]["cohens_h"]),
        ((0.428, 0.5), YES["pope_500"]["cohens_h"]),
        ((0.3798, 0.4037), YES["pope_9k"]["cohens_h"]),
    ],
)
def test_cohens_h_has_all_published_digits(shares: tuple[float, float], h: float) -> None:
    assert stats.cohens_h(*shares) == pytest.approx(h, rel=1e-14)
    assert stats.cohens_h(*reversed(shares)) == pytest.approx(-h, rel=1e-14)


def test_the_published_effects_are_those_of_the_table() -> None:
    assert [round(of["pope_9k"]["cohens_h"], digits) for of, digits in ((ACCURACY, 5), (YES, 4))] == [0.00695, 0.049]


@pytest.mark.parametrize(("of", "n", "required"), [("pope_500", 500, 32961), ("pope_9k", 9000, 325395)])
def test_power_and_required_n_have_all_published_digits(of: str, n: int, required: int) -> None:
    known = ACCURACY[of]
    assert stats.required_n(known["cohens_h"]) == known["required_n_80_power"] == required
    assert stats.power(known["cohens_h"], n, tails="upper") == pytest.approx(known["post_hoc_power"], rel=1e-13)


def test_the_published_power_leaves_out_a_tail() -> None:
    h = ACCURACY["pope_9k"]["cohens_h"]
    assert round(stats.power(h, 9000, tails="upper"), 4) == 0.0676
    assert round(stats.power(h, 9000), 4) == 0.0752
    assert stats.power(h, 325395) == pytest.approx(0.8, abs=1e-5)


def test_mcnemar_of_189_and_212() -> None:
    found = stats.mcnemar(B, C)
    assert (B, C) == (189, 212)
    assert (round(found.statistic, 3), round(found.p_value, 4)) == (TESTS["mcnemar_chi2"], TESTS["mcnemar_p"])


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Who is right about the 9000 items, in no order: what only one is right about is published."""
    both, neither = 7612 - B, 9000 - 7612 - C
    first = np.repeat([1, 1, 0, 0], [both, B, C, neither])
    return first, np.repeat([1, 0, 1, 0], [both, B, C, neither])


def test_paired_bootstrap_of_9000_items() -> None:
    found = stats.paired_bootstrap(*pairs(), convention="viar-2026")
    assert round(found.mean, 4) == TESTS["accuracy_diff"]
    # Two draws of 10,000: each p has a deviation of 0.0034, each end one of some 1e-4; ends are whole items of 9000.
    assert found.p_value == pytest.approx(TESTS["p_one_sided"], abs=4 * 0.0034 * 2**0.5)
    assert [found.low, found.high] == pytest.approx([TESTS["ci_95_low"], TESTS["ci_95_high"]], abs=3e-4)


@pytest.mark.parametrize(
    ("counts", "known", "names"),
    [
        (RIGHT, ACCURACY["pope_9k"], ("p_better", "post_mean_diff", "95ci")),
        (SAID_YES, YES["pope_9k"], ("p_shift", "post_mean_shift", "95ci")),
    ],
    ids=["accuracy", "yes-ratio"],
)
def test_beta_posteriors_to_monte_carlo_error(counts: list[int], known: dict[str, Any], names: tuple[str, ...]) -> None:
    share, mean, ends = (known[f"bayesian_{name}"] for name in names)
    found = stats.beta_independent(counts[0], 9000, counts[1], 9000)
    # Two times 100,000 draws of a difference with a deviation of 0.0054.
    assert found.p_above == pytest.approx(share, abs=4 * (share * (1 - share) / 50_000) ** 0.5)
    assert found.mean == pytest.approx(mean, abs=4 * 0.0054 / 50_000**0.5)
    assert [found.low, found.high] == pytest.approx(ends, abs=2e-4)


def test_beta_posteriors_bit_for_bit_with_the_published_generator() -> None:
    """Which counts and draws were used is not published; these give all sixteen digits of eight numbers."""
    generator = np.random.RandomState(42)
    for counts, known, names in (
        (RIGHT, ACCURACY["pope_9k"], ("p_better", "post_mean_diff", "95ci")),
        (SAID_YES, YES["pope_9k"], ("p_shift", "post_mean_shift", "95ci")),
    ):
        first, second = (generator.beta(1 + k, 9001 - k, 100_000) for k in counts)
        found = [float((second > first).mean()), float((second - first).mean())]
        assert found == pytest.approx([known[f"bayesian_{name}"] for name in names[:2]], rel=1e-13)
        ends = np.percentile(second - first, [2.5, 97.5])
        assert ends == pytest.approx(known[f"bayesian_{names[2]}"], rel=1e-12)


def test_the_published_posterior_is_of_one_right_answer_less() -> None:
    """7634 were counted, while 189 and 212 make it 7635; and pairs say more than two samples do."""
    assert RIGHT == [7612, 7634]
    assert RIGHT[0] - B + C == 7635
    independent = stats.beta_independent(7612, 9000, 7635, 9000)
    paired = stats.beta_paired(7612 - B, B, C, 9000 - 7612 - C)
    assert paired.p_above > 0.87 > 0.69 > independent.p_above
    assert paired.high - paired.low < 0.5 * (independent.high - independent.low)


# -- thresholds -------------------------------------------------------------------------------------------------------


@cache
def nine_thousand() -> tuple[np.ndarray, np.ndarray]:
    """Margins and labels of 9000 items that have every accuracy and yes-ratio of the published sweep.

    Of each step of the threshold the sweep says how many yes- and how many no-questions it moves; their margins are put
    in the middle of the step.
    """
    steps = NINE["threshold_sweep"]
    shifts = [float(shift) for shift in steps]
    hits, alarms = [], []
    for one in steps.values():
        said, right = one["yes_ratio"] * 9000, one["accuracy"] * 9000
        hits.append(round((said + right - 4500) / 2))
        alarms.append(round((said - right + 4500) / 2))
    margins, labels = [np.full(hits[0], 1.0), np.full(alarms[0], 1.0)], ["yes"] * hits[0] + ["no"] * alarms[0]
    for label, counts in (("yes", hits), ("no", alarms)):
        for at in range(1, len(shifts)):
            many = counts[at] - counts[at - 1]
            margins.append(np.full(many, -(shifts[at] + shifts[at - 1]) / 2))
            labels += [label] * many
    return np.concatenate(margins), np.array(labels)


def test_the_threshold_sweep_has_every_published_row_and_its_optimum() -> None:
    steps = NINE["threshold_sweep"]
    found = stats.threshold_sweep(*nine_thousand(), shifts=[float(shift) for shift in steps])
    for name in ("accuracy", "yes_ratio"):
        wanted = [one[name] for one in steps.values()]
        # Four digits, and items come whole: half of 1e-4, and half an item of 9000.
        assert found[name].values == pytest.approx(wanted, abs=0.5e-4 + 0.5 / 9000)
    best = NINE["best_threshold_at_50_yes_ratio"]
    assert found.attrs["best_shift"] == float(best["bias"]) == 1.25
    assert found.attrs["best_accuracy"] == pytest.approx(best["accuracy"], abs=1e-4) == 0.8657


def test_a_threshold_of_the_same_yes_ratio_beats_the_published_intervention() -> None:
    margins, labels = nine_thousand()
    wanted, accuracy = NINE["viar"]["yes_ratio"], NINE["viar"]["accuracy"]
    found = stats.matched_baseline(margins, labels, wanted, resamples=200).value.sel(metric="accuracy").item()
    # Between the published rows at 0.25 and 0.5; the sweep says no more about where.
    low, high = (NINE["threshold_sweep"][shift] for shift in ("0.25", "0.50"))
    share = (wanted - low["yes_ratio"]) / (high["yes_ratio"] - low["yes_ratio"])
    assert found == pytest.approx(low["accuracy"] + share * (high["accuracy"] - low["accuracy"]), abs=1e-4)
    assert accuracy - found == pytest.approx(-0.0058, abs=2e-4)


# -- answers and calibration of POPE-500 ------------------------------------------------------------------------------


def five_hundred(of: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and answers of 250 yes- and 250 no-questions with the published recall and yes-ratio."""
    hits, said = round(of["recall"] * 250), round(of["yes_ratio"] * 500)
    predicted = ["yes"] * hits + ["no"] * (250 - hits) + ["yes"] * (said - hits) + ["no"] * (250 - said + hits)
    return np.repeat(["yes", "no"], 250), np.array(predicted)


@pytest.mark.parametrize("name", ["pope_baseline", "pope_viar_b2.0_full"])
def test_scores_of_pope_500_have_all_published_digits(name: str) -> None:
    known = published(name)
    found = stats.scores(*five_hundred(known), resamples=10).value
    for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert round(found.sel(metric=metric).item(), 4) == known[metric]


@pytest.mark.parametrize("name", ["baseline", "viar"])
def test_the_published_ece_is_that_of_the_published_bins(name: str) -> None:
    known = published("pope_calibration")["results"][name]
    of = {key: [one[key] for one in known["ece_bins"]] for key in ("count", "avg_conf", "avg_acc", "bin")}
    found = stats.expected_calibration_error(of["count"], of["avg_conf"], of["avg_acc"])
    # Means of bins are printed with four digits: each is off by up to 5e-5, a difference of two by up to 1e-4.
    assert found == pytest.approx(known["ece"], abs=1e-4)
    edges = np.linspace(0, 1, 11)
    for bin_, sure in zip(of["bin"], of["avg_conf"], strict=True):
        low, high = (float(edge) for edge in bin_.strip("(]").split(","))
        assert any(np.allclose([low, high], pair) for pair in zip(edges, edges[1:], strict=False))
        assert low < sure <= high


@pytest.mark.parametrize("name", ["baseline", "viar"])
def test_items_placed_in_the_published_bins_are_binned_alike(name: str) -> None:
    bins = published("pope_calibration")["results"][name]["ece_bins"]
    confidence = np.concatenate([np.full(one["count"], one["avg_conf"]) for one in bins])
    right = [round(one["avg_acc"] * one["count"]) for one in bins]
    correct = np.concatenate([np.arange(one["count"]) < many for one, many in zip(bins, right, strict=True)])
    found = stats.calibration(confidence, correct)
    held = found.n_items.values > 0
    assert found.n_items.values[held].tolist() == [one["count"] for one in bins]
    assert found.accuracy.values[held].round(4).tolist() == [one["avg_acc"] for one in bins]


def test_the_published_confidence_is_no_share_of_yes_and_no() -> None:
    """Confidence of the predicted class is below one half in 10 and 36 items: the probability is among all words."""
    results = published("pope_calibration")["results"]
    low = {of: sum(b["count"] for b in results[of]["ece_bins"] if b["avg_conf"] < 0.5) for of in results}
    assert low == {"baseline": 10, "viar": 36}
    items = [one for few in published("pope_calibration")["qualitative"].values() for one in few]
    said = [one[f"{of}_p_yes"] for one in items for of in ("baseline", "viar") if one[f"{of}_pred"] == "yes"]
    assert min(said) < 0.36  # "yes" is predicted with less than one half, so that more was left for other words
    assert len(items) == 38


def test_the_printed_discordant_items_make_the_published_difference() -> None:
    lists = published("pope_calibration")["qualitative"]
    b, c = (len(lists[name]) for name in ("baseline_right_viar_wrong", "baseline_wrong_viar_right"))
    assert (b, c, (c - b) / 500) == (17, 21, pytest.approx(0.844 - 0.836))
    assert stats.mcnemar(b, c, exact=True).p_value == pytest.approx(0.627, abs=5e-4)


# -- per-sample correlations ------------------------------------------------------------------------------------------


@cache
def samples() -> dict[str, np.ndarray]:
    with (DATA / "persample.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = {name: np.array([row[name] for row in rows]) for name in ("pred", "answer_gt")}
    layers = np.array([[float(row[f"layer_{layer}"]) for layer in range(32)] for row in rows])
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in ("correct", "p_yes", "neglect_depth")}
    return {**text, **numbers, "layers": layers}


def by_layer() -> xr.DataArray:
    return xr.DataArray(samples()["layers"], dims=["item", "layer"], coords={"layer": range(32)})


@cache
def associated(stratified: bool = False, clustered: bool = False) -> xr.Dataset:
    pred = samples()["pred"]
    # Six questions about each picture, one after the other, as POPE's file has them.
    return stats.associate(
        *(by_layer(), samples()["correct"]),
        strata=pred if stratified else None,
        clusters=np.arange(500) // 6 if clustered else None,
    )


SUMMARY = published("persample_summary")


def test_correlations_of_all_layers_are_the_published_ones() -> None:
    known = SUMMARY["layer_correlations"]
    found = associated()
    assert found.r.values == pytest.approx([one["correlation"] for one in known], abs=1e-7)
    assert found.p.values == pytest.approx([one["p_value"] for one in known], abs=1e-6)
    told = {14: (-0.154, 0.0005), 15: (-0.142, 0.0015), 17: (-0.140, 0.0017), 30: (-0.119, 0.0076), 16: (-0.093, 0.037)}
    for layer, (r, p) in told.items():
        here = found.sel(layer=layer)
        assert round(here.r.item(), 3) == r
        assert round(here.p.item(), 3 if layer == 16 else 4) == p


def test_the_depth_of_the_zone_goes_with_nothing() -> None:
    depth, correct = samples()["neglect_depth"], samples()["correct"]
    assert depth == pytest.approx(samples()["layers"][:, 8:17].mean(1), abs=1e-11)
    found = stats.associate(xr.DataArray(depth, dims="item"), correct)
    assert (round(found.r.item(), 4), round(found.p.item(), 3)) == (-0.0226, 0.615)
    assert found.r.item() == pytest.approx(SUMMARY["point_biserial_r"], abs=1e-7)
    assert float(found.low) < 0 < float(found.high)


def test_the_published_cohens_d_weighs_both_groups_alike() -> None:
    depth, correct = samples()["neglect_depth"], samples()["correct"] == 1
    published_d = stats.cohens_d(depth[~correct], depth[correct], convention="viar-2026")
    assert published_d == pytest.approx(SUMMARY["cohens_d"], abs=1e-6)
    assert stats.cohens_d(depth[~correct], depth[correct]) == pytest.approx(-0.05967, abs=1e-5)


def test_three_layers_are_left_after_either_correction() -> None:
    found = associated()
    for name in ("p_bh", "p_max"):
        assert found.layer[found[name] <= 0.05].values.tolist() == [14, 15, 17]
    # 5000 permutations: a p of 0.001 (BH: times 16) has a deviation of 0.00045, one of 0.04 of 0.0028.
    left = found.sel(layer=[14, 15, 17])
    assert left.p_bh.values == pytest.approx([0.016, 0.016, 0.024], abs=4 * 32 / 3 * 0.0005)
    assert left.p_max.values == pytest.approx([0.018, 0.039, 0.047], abs=4 * 0.003)


def test_the_three_layers_are_left_over_pictures_too_within_answers() -> None:
    found = associated(stratified=True, clustered=True)
    assert found.layer[found.p_max <= 0.05].values.tolist() == [14, 15, 17]


def test_benjamini_hochberg_of_the_published_p_values_is_statsmodels() -> None:
    p = [one["p_value"] for one in SUMMARY["layer_correlations"]]
    found = stats.benjamini_hochberg(p)
    assert found == pytest.approx(multipletests(p, method="fdr_bh")[1], rel=1e-12)
    assert found[[14, 15, 17]].round(4).tolist() == [0.017, 0.0187, 0.0187]


def test_the_association_is_in_the_predicted_yes() -> None:
    found = associated(stratified=True).sel(layer=[14, 17]).r_stratum
    assert found.sel(stratum="yes").values.round(3).tolist() == [-0.295, -0.345]
    assert found.sel(stratum="no").values.round(3).tolist() == [-0.008, 0.054]


def test_within_answers_the_association_stays_and_is_pooled() -> None:
    found = associated(stratified=True)
    pred, correct, layer = samples()["pred"], samples()["correct"], samples()["layers"][:, 17]
    x, y = layer.copy(), correct.copy()
    for answer in ("yes", "no"):
        x[pred == answer] -= x[pred == answer].mean()
        y[pred == answer] -= y[pred == answer].mean()
    assert found.r_within.sel(layer=17).item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert found.layer[found.p_max <= 0.05].values.tolist() == [14, 15, 17]


def test_attention_in_layer_17_says_which_answer_it_is() -> None:
    layer = by_layer().sel(layer=17)
    for name, r in (("pred", -0.58), ("answer_gt", -0.52)):
        yes = samples()[name] == "yes"
        found = stats.associate(layer, yes, permutations=50, resamples=10).r.item()
        assert round(found, 2) == r
        assert found == pytest.approx(pointbiserialr(yes, layer.values)[0], abs=1e-12)


# -- why 9000 questions are not 9000 items ----------------------------------------------------------------------------


@cache
def questions() -> list[tuple[str, str]]:
    """Image and question of all 9000 lines, split by split."""
    known = published("pope_questions")
    splits = ("random", "popular", "adversarial")
    return [(image, asked) for split in splits for image, of in known.items() for asked in of[split]]


def test_9000_questions_are_5127_on_500_pictures() -> None:
    assert len(questions()) == 9000
    assert len(set(questions())) == 5127
    assert len({image for image, _ in questions()}) == 500
    yes = [
        {one for at, one in enumerate(questions()[start : start + 3000]) if at % 2 == 0} for start in (0, 3000, 6000)
    ]
    assert yes[0] == yes[1] == yes[2]
    assert len(yes[0]) == 1500


def test_repeated_questions_pretend_to_be_information() -> None:
    """Answers made up for each unique question: repeated as in POPE, the interval is too narrow by what is repeated."""
    generator, unique = np.random.default_rng(0), sorted(set(questions()))
    known = {one: generator.random() < 0.03 for one in unique}
    better = {one: known[one] and generator.random() < 0.5 for one in unique}
    widths = {}
    for name, items in (("lines", questions()), ("unique", unique)):
        first, second = ([of[one] for one in items] for of in (better, known))
        found = stats.paired_bootstrap(first, second, resamples=4000)
        widths[name] = found.high - found.low
        if name == "unique":
            images = [image for image, _ in items]
            clustered = stats.paired_bootstrap(first, second, clusters=images, resamples=4000)
            widths["clustered"] = clustered.high - clustered.low
    assert widths["lines"] < 0.85 * widths["unique"]
    assert widths["clustered"] == pytest.approx(widths["unique"], rel=0.15)  # made up without anything shared
