"""Zones of layers, bends of curves and heads of neglect: planted, absent, and in VIAR's own published tables."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import scipy.stats
import xarray as xr

import mechvlm as mv
from mechvlm.experiments import zones

PUBLISHED = json.loads((Path(__file__).parent / "data" / "viar" / "attention.json").read_text())
NEGLECT, ZONE = 1e-5 * np.array(PUBLISHED["mean"]), range(8, 17)
QUICK: dict[str, Any] = {"splits": 10, "resamples": 200}


def table(curve: np.ndarray, prompts: int = 40, noise: float = 1.0, seed: int = 0) -> xr.DataArray:
    """A curve with noise of its own for every prompt."""
    made = curve + noise * np.random.default_rng(seed).normal(size=(prompts, len(curve)))
    return xr.DataArray(made, dims=["prompt", "layer"])


def dip(depth: float, layers: int = 12, start: int = 4, stop: int = 8) -> np.ndarray:
    curve = np.zeros(layers)
    curve[start:stop] -= depth
    return curve


def layer_head(matrix: np.ndarray) -> xr.DataArray:
    return xr.DataArray(matrix, dims=["layer", "head"])


# -- zones -----------------------------------------------------------------------------------------------------------


def test_a_planted_zone_is_found_where_it_was_planted() -> None:
    found = mv.find_zone(table(dip(2.0)), splits=10)
    assert bool(found.found) and (int(found.start), int(found.stop)) == (4, 8)
    assert float(found.p_value) < 0.01
    assert float(found.gap) == pytest.approx(2.0, abs=0.5)
    assert float(found.same) > 0.9
    assert found.in_zone[4:8].min() > 0.9 > 0.1 > found.in_zone[[0, 1, 2, 10, 11]].max()


def test_flat_noise_has_a_zone_no_more_often_than_the_level_allows() -> None:
    curves = [table(np.zeros(12), prompts=16, seed=seed) for seed in range(30)]
    hits = sum(bool(mv.find_zone(curve, level=0.9, splits=5, resamples=50).found) for curve in curves)
    assert hits <= 7  # of 30, where the level allows 3: a binomial count is above 7 less than once in a hundred times


def test_flat_noise_would_have_a_zone_if_it_were_tested_on_the_pictures_that_chose_it() -> None:
    """What the halves are for: the layers that stand out most pass a test that knows of no choice."""
    runs = [(first, behind) for first in range(1, 10) for behind in range(first + 2, 12)]
    passed = 0
    for seed in range(30):
        noise = table(np.zeros(12), prompts=16, seed=seed)
        x = noise.values

        def depth(run: tuple[int, int], x: np.ndarray = x) -> float:
            gaps = [x[:, at] - x[:, slice(*run)].mean(1) for at in (run[0] - 1, run[1])]
            return min(gap.mean() / gap.std() for gap in gaps)

        passed += float(mv.find_zone(noise, rule=range(*max(runs, key=depth)), **QUICK).p_value) <= 0.1
    assert passed > 7


@pytest.mark.parametrize("rule", ["shoulders", "below_mean"])
@pytest.mark.parametrize("curve", [np.linspace(0, 3, 12), np.linspace(3, 0, 12), -dip(2.0)], ids=["up", "down", "bump"])
def test_slopes_and_bumps_are_no_zones(curve: np.ndarray, rule: str) -> None:
    found = mv.find_zone(table(curve), rule=rule, **QUICK)
    assert not bool(found.found) and np.isnan([found.start, found.stop]).all()


def test_layers_that_were_given_are_tested_as_they_are() -> None:
    curve = table(dip(2.0)).assign_coords(layer=np.arange(3, 15))
    right, wrong = (mv.find_zone(curve, rule=range(*ends), **QUICK) for ends in ((7, 11), (9, 13)))
    assert bool(right.found) and (int(right.start), int(right.stop)) == (7, 11)
    assert not bool(wrong.found) and int(wrong.chosen_start) == 9 and np.isnan(wrong.start)
    inside, beside = curve.values.mean(0)[4:8].mean(), curve.values.mean(0)[[3, 8]]
    assert float(right.gap) == pytest.approx(beside.min() - inside)


def test_prompts_about_one_picture_count_once() -> None:
    once = table(dip(0.9), prompts=12)
    often = xr.concat([once] * 6, "prompt")
    alone, together = mv.find_zone(once, **QUICK), mv.find_zone(often, clusters=list(range(12)) * 6, **QUICK)
    assert float(alone.p_value) == float(together.p_value)
    assert float(mv.find_zone(often, **QUICK).p_value) < float(alone.p_value)


def test_the_zone_that_is_written_by_hand_is_the_old_rule_on_one_published_quantity_only() -> None:
    """Layers 8 to 16 are below the mean minus half a deviation in `density_share`; in `mass` 9 and 10 are."""
    curves = {"share": np.array(PUBLISHED["summary"]["vis_attn_frac_mean"]), "mass": NEGLECT.mean(1)}
    same = {name: xr.DataArray(np.tile(curve, (4, 1)), dims=["prompt", "layer"]) for name, curve in curves.items()}
    found = {name: mv.find_zone(curve, rule="below_mean", **QUICK) for name, curve in same.items()}
    assert (int(found["share"].chosen_start), int(found["share"].chosen_stop)) == (8, 17)
    assert (int(found["mass"].chosen_start), int(found["mass"].chosen_stop)) == (9, 11)


def test_halves_that_choose_other_layers_say_nothing_for_those_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: all pictures choose one dip, and their halves another one, which holds."""
    curves = table(dip(3.0) + dip(3.0, 12, 9, 11), prompts=16, noise=0.2)
    own = zones._shoulders

    def elsewhere(seen: Any, times: np.ndarray, z: float) -> Any:
        return own(seen, times, z) if times.all() and (times == 1).all() else zones.Band(9, 11, (8, 11))

    monkeypatch.setattr(zones, "_shoulders", elsewhere)
    found = mv.find_zone(curves, **QUICK)
    assert int(found.chosen_start) == 4 and float(found.p_value) == 1 and not bool(found.found)
    assert np.isnan(found.gap_unseen)
    low = curves.values.mean(0)
    assert float(found.gap) == pytest.approx(min(low[3], low[8]) - low[4:8].mean())


def test_a_flat_bottom_is_found_below_the_mean_though_its_layers_are_alike() -> None:
    found = [mv.find_zone(table(dip(2.0, 12, 3, 9), 24, seed=seed), rule="below_mean", **QUICK) for seed in range(4)]
    assert all(bool(one.found) for one in found)


@pytest.mark.parametrize("pictures, least", [(6, 2 / 27), (8, 2 / 4**4)])
def test_few_pictures_have_no_small_p_value_however_little_they_differ(pictures: int, least: float) -> None:
    found = mv.find_zone(table(dip(2.0), pictures, noise=1e-6), splits=10, resamples=1000)
    assert float(found.p_value) == pytest.approx(least) and bool(found.found) == (pictures > 6)


# -- the bend of a curve ---------------------------------------------------------------------------------------------


def test_a_parabola_is_a_u_and_its_bend_and_bottom_are_those_planted() -> None:
    x = np.linspace(-1, 1, 9)
    found = mv.u_shape(table(3 * (x - 0.25) ** 2, noise=0.0))
    assert found.curvature.values == pytest.approx([3, 3, 3])
    assert found.bottom.values == pytest.approx([5, 5, 5])
    assert found.gain.values == pytest.approx([1, 1, 1])
    assert found["shape"] == "a U"


@pytest.mark.parametrize(
    "curve, noise, said",
    [
        ((np.linspace(-1, 1, 9)) ** 2, 0.1, "a U"),
        (-((np.linspace(-1, 1, 9)) ** 2), 0.1, "no U"),
        (np.linspace(1, 3, 9) ** 2, 0.1, "no U"),  # bent up, and foretold by the parabola, but lowest at its end
        (np.r_[1.0, np.zeros(8)], 0.01, "no U"),  # bent up, and worse foretold by a parabola than by a line
        (np.ones(9), 0.0, "no U"),
        (np.zeros(9), 0.1, "not surely a U"),
    ],
    ids=["parabola", "upside down", "half a parabola", "one high end", "flat", "noise"],
)
def test_a_u_is_bent_up_foretold_by_its_parabola_and_lowest_inside(curve: np.ndarray, noise: float, said: str) -> None:
    assert mv.u_shape(table(curve, noise=noise), resamples=200)["shape"] == said


def test_a_slope_has_a_gain_over_a_constant_and_no_bend() -> None:
    found = mv.u_shape(table(np.linspace(0, 1, 10), prompts=200, noise=0.05))
    assert float(found.gain.sel(end="low")) > 0.9 > 0.5 > float(found.over_line.sel(end="mean"))
    low, high = (float(found.curvature.sel(end=end)) for end in ("low", "high"))
    assert low < 0.01 and high > -0.01


def test_the_gain_is_that_of_fits_to_all_other_layers() -> None:
    curve = table(dip(1.0, 9, 3, 6), prompts=5)
    y, x = curve.values.mean(0), np.arange(9)
    errors = []
    for degree in range(3):
        left = [y[at] - np.polyval(np.polyfit(np.delete(x, at), np.delete(y, at), degree), at) for at in x]
        errors.append(sum(error**2 for error in left))
    found = mv.u_shape(curve).sel(end="mean")
    assert float(found.gain) == pytest.approx(1 - errors[2] / errors[0])
    assert float(found.over_line) == pytest.approx(1 - errors[2] / errors[1])


def test_the_published_mass_is_no_u() -> None:
    found = mv.u_shape(xr.DataArray(np.tile(NEGLECT.mean(1), (4, 1)), dims=["prompt", "layer"])).sel(end="mean")
    assert float(found.gain) < 0.1 and float(found.curvature) < 0


def test_the_curvatures_interval_is_students_and_holds_the_truth_as_often_as_it_says() -> None:
    x, out = np.linspace(-1, 1, 10), 0
    for seed in range(200):
        curves = table(np.zeros(10), prompts=8, seed=seed)
        ends = mv.u_shape(curves, resamples=1).curvature.values
        out += not ends[1] <= 0 <= ends[2]
        own = np.polyfit(x, curves.values.T, 2)[0]
    np.testing.assert_allclose(ends[1:], scipy.stats.t.interval(0.95, 7, own.mean(), scipy.stats.sem(own)))
    assert out <= 18  # 10 are due; a binomial count is above 18 less than once in a hundred times


@pytest.mark.parametrize("curve", [np.zeros(9), np.ones(9), np.linspace(0.1, 3, 9)], ids=["none", "flat", "line"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_what_is_not_bent_has_no_bottom(curve: np.ndarray, noise: float) -> None:
    found = mv.u_shape(table(curve, noise=noise), resamples=50)
    assert found.bottom.isnull().all()
    assert bool(found.over_line.isnull().all()) == (noise == 0)


# -- heads -----------------------------------------------------------------------------------------------------------


def test_the_published_heads_of_neglect_are_counted_again() -> None:
    found = mv.neglect_heads(layer_head(NEGLECT), layers=ZONE)
    assert (round(float(found.mu), 5), round(float(found.sigma), 5)) == (0.86892, 0.11833)
    assert (int(found.neglect.sum()), int(found.neglect.sel(layer=1).sum()), int(found.specialist.sum())) == (
        126,
        32,
        39,
    )
    np.testing.assert_allclose(found.layer_mean, 1e-5 * np.array(PUBLISHED["layer_means"]), atol=1e-5)
    np.testing.assert_allclose(found.layer_std, 1e-5 * np.array(PUBLISHED["layer_stds"]), atol=1e-5)


def test_heads_of_the_published_zone_differ_three_times_as_much_as_published() -> None:
    found = mv.neglect_heads(layer_head(NEGLECT), layers=ZONE)
    assert float(found.spread_of_numbers) == pytest.approx(0.037, abs=5e-4)
    assert float(found.spread) == pytest.approx(0.108, abs=5e-4)
    within = found.layer_std.sel(layer=list(ZONE))
    assert (float(within.min()), float(within.max())) == pytest.approx((0.083, 0.138), abs=5e-4)


def test_published_tables_of_attention_keep_their_own_identities() -> None:
    parts = {name: 1e-5 * np.array(column) for name, column in PUBLISHED["decomposed"].items()}
    np.testing.assert_allclose(parts["text2vis"] + parts["text2text"], 1, atol=2e-5)
    np.testing.assert_allclose(parts["vis2vis"] + parts["vis2text"], 1, atol=2e-5)
    np.testing.assert_allclose(parts["text2vis"], NEGLECT.mean(1), atol=1e-3)  # of 200 questions, and of 150
    rows = 604  # the only length at which the published column agrees in all layers
    together = (parts["text2vis"] * (rows - 576) + parts["vis2vis"] * 576) / rows
    np.testing.assert_allclose(parts["vis_frac_aggregate"], together, atol=1e-5)
    entropy = {name: np.array(column) for name, column in PUBLISHED["summary"].items()}
    quotient = entropy["h_vis_mean"] / entropy["h_text_mean"]
    np.testing.assert_allclose(entropy["h_ratio_mean"], quotient, atol=4e-3)  # a mean of quotients, of rounded means


def test_planted_heads_are_told_from_all_others_and_how_often_they_return() -> None:
    draw = np.random.default_rng(0)
    mass = 0.5 + 0.02 * draw.normal(size=(20, 4, 6))
    mass[:, 1, 2], mass[:, 3, 5] = mass[:, 1, 2] - 0.3, mass[:, 3, 5] + 0.3
    found = mv.neglect_heads(xr.DataArray(mass, dims=["prompt", "layer", "head"]), sigmas=2)
    assert np.argwhere(found.neglect.values).tolist() == [[1, 2]]
    assert np.argwhere(found.specialist.values).tolist() == [[3, 5]]
    assert (found.often == 1).all()
    np.testing.assert_allclose(found["std"], mass.std(0))


def test_averaging_over_layers_by_the_number_of_a_head_hides_how_heads_differ() -> None:
    """Each layer has one head that is 1 and others that are 0, under another number: numbers have one mean."""
    found = mv.neglect_heads(layer_head(np.eye(4)))
    assert float(found.spread_of_numbers) == 0
    assert float(found.spread) == pytest.approx(np.sqrt(3) / 4)


# -- figures and sentences -------------------------------------------------------------------------------------------


def test_a_zone_is_filled_where_it_holds_and_outlined_where_it_does_not() -> None:
    found, none = mv.find_zone(table(dip(2.0)), **QUICK), mv.find_zone(table(np.zeros(12)), rule=[3, 4, 5], **QUICK)
    filled, outlined = mv.plot.zone_curve(found), mv.plot.zone_curve(none)
    assert (filled.layout.shapes[0].x0, filled.layout.shapes[0].x1) == (3.5, 7.5)
    said = filled.layout.annotations[0].text.replace("<br>", " ")
    assert f"; {float(found.gap):.3g} below the lower shoulder; the same layers in {float(found.same):.0%} of" in said
    mass = mv.plot.zone_curve(mv.find_zone(table(5 + dip(2.0)), rule=[4, 5], **QUICK))
    assert mass.layout.yaxis.rangemode == "tozero" and filled.layout.yaxis.rangemode is None
    assert filled.layout.shapes[0].fillcolor and not outlined.layout.shapes[0].fillcolor
    assert outlined.layout.annotations[0].text.startswith("No zone: the rule chooses layers 3 to 5, which do not")
    assert not mv.plot.zone_curve(mv.find_zone(table(np.linspace(0, 9, 12)), **QUICK)).layout.shapes


def test_heads_of_neglect_are_marked_where_they_are() -> None:
    found = mv.neglect_heads(layer_head(NEGLECT))
    down, up = (trace for trace in mv.plot.head_matrix(found).data if trace.type == "scatter")
    assert len(up.x) == 39
    assert [list(pair) for pair in zip(down.y, down.x, strict=True)] == np.argwhere(found.neglect.values).tolist()


NONE = xr.DataArray(np.zeros((4, 5)), dims=["prompt", "layer"])
WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: mv.find_zone([1, 2]), TypeError, "[1, 2] is no DataArray; give values over prompt and layer."),  # type: ignore[arg-type]
    (
        lambda: mv.find_zone(NONE.rename(prompt="pair")),
        ValueError,
        "the values have pair, layer; give them over prompt and layer, for instance "
        "profile.vis_l.sel(quantity='mass').",
    ),
    (
        lambda: mv.find_zone(NONE.isel(layer=[0, 1, 2])),
        ValueError,
        "the values are of layers 0, 1, 2; give at least four, one after the other.",
    ),
    (
        lambda: mv.find_zone(NONE.where(NONE.layer != 2)),
        ValueError,
        "the values of layers 2 are not all numbers; give layers that have them.",
    ),
    (
        lambda: mv.u_shape(NONE, clusters=["a"]),
        ValueError,
        "clusters=['a'] must name one cluster for each of the 4 prompts.",
    ),
    (
        lambda: mv.find_zone(NONE, clusters=[1, 1, 2, 3]),
        ValueError,
        "the values are of 3 clusters, and a test on halves needs at least 4 pictures.",
    ),
    (
        lambda: mv.find_zone(NONE, rule="deep"),
        ValueError,
        "rule='deep' is not known; choose 'shoulders' or 'below_mean', or give layers.",
    ),
    (
        lambda: mv.find_zone(NONE, rule=[1, 3]),
        ValueError,
        "rule=[1, 3] must be layers of the values, one after the other; they are 0 to 4.",
    ),
    (
        lambda: mv.find_zone(NONE, rule=range(5)),
        ValueError,
        "rule=range(0, 5) holds all layers, so there are no others to compare with; give fewer.",
    ),
    (lambda: mv.u_shape(NONE, level=95), ValueError, "level=95 is no share; give for instance 0.95."),
    (lambda: mv.find_zone(NONE, splits=0), ValueError, "splits=0 halves nothing; give for instance 50."),
    (lambda: mv.u_shape(NONE, resamples=0), ValueError, "resamples=0 draws nothing; give for instance 1000."),
    (lambda: mv.find_zone(NONE, seed=-1), ValueError, "seed=-1 is no seed of random draws; give 0 or more."),
    (lambda: mv.find_zone(NONE, c="a"), TypeError, "c='a' is not a number."),  # type: ignore[arg-type]
    (
        lambda: mv.find_zone(NONE, c=float("nan")),
        ValueError,
        "c=nan gives no threshold; give a number of standard deviations, for instance 0.5.",
    ),
    (
        lambda: mv.find_zone(NONE, rule=None),  # type: ignore[arg-type]
        ValueError,
        "rule=None is not known; choose 'shoulders' or 'below_mean', or give layers.",
    ),
    (
        lambda: mv.neglect_heads(layer_head(np.eye(3)), sigmas=-1),
        ValueError,
        "sigmas=-1 tells no heads apart; give a number above 0, for instance 1.",
    ),
    (
        lambda: mv.neglect_heads(layer_head(np.eye(3)), sigmas=float("nan")),
        ValueError,
        "sigmas=nan tells no heads apart; give a number above 0, for instance 1.",
    ),
    (
        lambda: mv.neglect_heads(layer_head(np.eye(3)), resamples=0),
        ValueError,
        "resamples=0 draws nothing; give for instance 1000.",
    ),
    (
        lambda: mv.neglect_heads(layer_head(np.eye(3)), layers="8-16"),  # type: ignore[arg-type]
        TypeError,
        "layers='8-16' is not a list of layers; write for instance [0].",
    ),
    (
        lambda: mv.attention_blocks(None),  # type: ignore[arg-type]
        TypeError,
        "a NoneType is no profile by layer; make it with mv.layer_profile(vlm, prompts).",
    ),
    (
        lambda: mv.attention_blocks(xr.Dataset()),
        TypeError,
        "a Dataset is no profile by layer; make it with mv.layer_profile(vlm, prompts).",
    ),
    (
        lambda: mv.neglect_heads([[0.5]]),  # type: ignore[arg-type]
        TypeError,
        "[[0.5]] is no profile; make it with mv.layer_profile(vlm, prompts).",
    ),
    (
        lambda: mv.neglect_heads(NONE),
        ValueError,
        "the values have prompt, layer; give them over layer and head, and over prompt where there are several.",
    ),
    (
        lambda: mv.neglect_heads(layer_head(np.array([[0.5, np.nan]]))),
        ValueError,
        "the values are not all numbers, so no head can be told from the others; leave out what is not.",
    ),
    (
        lambda: mv.neglect_heads(layer_head(np.eye(3)), layers=[3]),
        ValueError,
        "layers=[3] must be of those that have values: 0, 1, 2.",
    ),
    (
        lambda: mv.plot.zone_curve(NONE),  # type: ignore[arg-type]
        TypeError,
        "zone_curve draws what find_zone returns, and was given a DataArray; make it with mv.find_zone(values).",
    ),
]


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("wrong, kind, message", WRONG, ids=[message[:40] for *_, message in WRONG])
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_is_refused_in_a_sentence(wrong: Callable[[], object], kind: type, message: str) -> None:
    with pytest.raises(kind) as caught:
        wrong()
    assert str(caught.value) == message
