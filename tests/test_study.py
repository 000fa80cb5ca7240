"""VIAR's whole study: its parts against what they are made of, one that was stopped, sentences that follow numbers."""

import html
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr
from evaluations import baseline, changed

import mechvlm as mv
from mechvlm.methods import parts as parts_module
from mechvlm.methods import study as study_module
from mechvlm.methods.parts import PARTS, Plan, layers_of, side_by_side
from mechvlm.methods.sentences import finding
from mechvlm.methods.study import study
from mechvlm.methods.wording import against_threshold, with_interval
from mechvlm.report.viar_page import viar_page

PICTURES = {f"{number}.png": tiny.picture(number) for number in range(5)}
WORDS = ("cat", "red dog")
ROWS = [
    {"question_id": 2 * number + at, "image": name, "text": f"is there a {word} in the image ?"}
    | {"label": ("yes", "no")[(number + at) % 2]}
    for number, name in enumerate(PICTURES)
    for at, word in enumerate(WORDS)
]
FEW: dict[str, Any] = {"images": PICTURES, "split": None, "amounts": [0.0, 2.0], "pictures": 4, "few": 6}
FEW |= {"controls": 1, "resamples": 40}


@cache
def vlm() -> mv.VLM:
    return tiny.vlm(layers=5, width=16, vision_layers=2)


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def whole(folder: Path) -> study_module.Studied:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parts_module, "SPOKEN", 4)  # which takes most of the time
        return study(vlm(), ROWS, zone=[1, 2], out=folder, **FEW)


def biased(prompt: mv.Prompt) -> list[mv.Edit]:
    return [mv.bias_attention(layer, prompt.image, 2.0) for layer in (1, 2)]


# -- the parts --------------------------------------------------------------------------------------------------------


def test_every_part_is_a_file_and_has_a_finding(whole: study_module.Studied, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.nc" for name in PARTS)
    assert list(whole.findings) == list(PARTS)
    for name, said in whole.findings.items():
        assert said.endswith(".") and "nan" not in said, (name, said)
        xr.testing.assert_identical(xr.load_dataset(folder / f"{name}.nc", engine="h5netcdf"), whole[name])


def test_answers_are_those_of_the_bias_made_by_hand(whole: study_module.Studied) -> None:
    for name, edits in (("base", ()), ("bias", biased)):
        expected = mv.evaluate.pope(vlm(), ROWS, PICTURES, edits)
        np.testing.assert_allclose(whole[name].margin, expected.margin, atol=1e-5)
    compared = mv.evaluate.stats.compare(whole["base"], whole["bias"], resamples=40, seed=0)
    np.testing.assert_array_equal(whole["statistics"].sel(edit="VIAR").advantage, compared.advantage)


def test_adaptive_amounts_are_those_of_the_measured_shares(whole: study_module.Studied) -> None:
    share = whole["profile"].vis_l.sel(quantity="density_share").mean("prompt").values
    code = {layer: 2.0 * (1 - share[layer]) / (1 - share).mean() for layer in (1, 2)}

    def edits(prompt: mv.Prompt) -> list[mv.Edit]:
        return [mv.bias_attention(layer, prompt.image, by) for layer, by in code.items()]

    expected = mv.evaluate.pope(vlm(), ROWS, PICTURES, edits)
    np.testing.assert_allclose(whole["adaptive"].sel(edit="code").margin, expected.margin, atol=1e-5)


def test_heads_of_neglect_are_biased_and_no_others(whole: study_module.Studied) -> None:
    layers, heads = np.nonzero(whole["heads"].neglect.values)
    pairs = list(zip(layers.tolist(), heads.tolist(), strict=True))
    assert whole["head_bias"].attrs["heads"] == ", ".join(f"{layer}.{head}" for layer, head in pairs)

    def edits(prompt: mv.Prompt) -> list[mv.Edit]:
        return [mv.bias_attention(layer, prompt.image, 2.0, heads=[head]) for layer, head in pairs]

    expected = mv.evaluate.pope(vlm(), ROWS, PICTURES, edits)
    np.testing.assert_allclose(whole["head_bias"].margin, expected.margin, atol=1e-5)


def test_a_bias_in_the_prompt_is_not_one_while_answering(whole: study_module.Studied) -> None:
    """What is said first comes out of the pass over the prompt, which a bias of later steps cannot change."""
    found = whole["when"]
    np.testing.assert_array_equal(found.margin.sel(edit="decode"), found.margin.sel(edit="none"))
    np.testing.assert_array_equal(found.margin.sel(edit="prompt"), found.margin.sel(edit="always"))
    assert (found.margin.sel(edit="prompt") != found.margin.sel(edit="none")).all()


def test_the_published_convention_is_passed_on() -> None:
    some = ["profile", "collapse", "gradients", "bias"]
    found = study(vlm(), ROWS, zone=[1, 2], convention="viar-2026", parts=some, **{**FEW, "template": "{question}"})
    assert all("viar-2026" in found[name].attrs["convention"] for name in some[:3])
    image = range(tiny.TOKENS)  # columns from 0, where the beginning and the words before the picture stand

    def edits(prompt: mv.Prompt) -> list[mv.Edit]:
        assert prompt.image[0] > 0
        return [mv.bias_attention(layer, image, 2.0) for layer in (1, 2)]

    expected = mv.evaluate.pope(vlm(), ROWS, PICTURES, edits, tokens="lower-case")
    np.testing.assert_allclose(found["bias"].margin, expected.margin, atol=1e-5)
    assert not any("nan" in said for said in found.findings.values())


def test_the_page_shows_every_part_with_its_finding_and_its_numbers(
    whole: study_module.Studied, tmp_path: Path
) -> None:
    page = viar_page(whole, tmp_path, {"made": "2026-01-01"}).read_text(encoding="utf-8")
    assert page.count("<section") == len(PARTS) + 2
    assert page.count('<p class="trouble">') == 1  # the one for browsers without scripts
    figures = sorted(path.stem.rpartition("-")[0] for path in (tmp_path / "figures").iterdir())
    assert set(figures) == set(PARTS) - {"when"}
    for name, said in whole.findings.items():
        assert f'href="parts/{name}.nc"' in page
        assert html.escape(said, quote=False) in page.replace("&#39;", "'")
    items = pd.read_csv(tmp_path / "items.csv")
    np.testing.assert_allclose(items.VIAR_margin, whole["bias"].margin, atol=1e-6)


# -- one that was stopped ---------------------------------------------------------------------------------------------


def test_a_study_that_was_stopped_goes_on(
    whole: study_module.Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["zone", "heads", "bias"]

    def stop(*_: Any) -> xr.Dataset:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(PARTS, "heads", (stop, PARTS["heads"][1]))
        with pytest.raises(KeyboardInterrupt):
            study(vlm(), ROWS, zone=[1, 2], parts=wanted, out=tmp_path, **FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.nc", "zone.nc"]
    monkeypatch.setitem(PARTS, "profile", (stop, ()))
    monkeypatch.setitem(PARTS, "zone", (stop, ("profile",)))
    found = study(vlm(), ROWS, zone=[1, 2], parts=wanted, out=tmp_path, **FEW)
    assert list(found.parts) == ["profile", "zone", "heads", "base", "bias"]
    for name in found.parts:
        xr.testing.assert_equal(found[name], whole[name])


def test_parts_are_made_with_what_they_need_and_nothing_else(tmp_path: Path) -> None:
    found = study(vlm(), ROWS, parts="zone", out=tmp_path, **FEW)
    assert list(found.findings) == ["zone"] and list(found.parts) == ["profile", "zone"]
    assert repr(found) == "Studied(profile, zone)"


@pytest.mark.usefixtures("whole")
def test_another_study_in_the_folder_is_refused(folder: Path) -> None:
    for change in ({"amount": 3.0}, {"items": 8}, {"seed": 1}):
        with pytest.raises(ValueError) as caught:
            study(vlm(), ROWS, zone=[1, 2], parts=["base"], out=folder, **{**FEW, **change})
        assert str(caught.value) == (
            f"out={str(folder)!r} holds another study: the model, the questions, the pictures or the settings are not "
            "the same; give another folder, or empty this one."
        )


# -- which layers -----------------------------------------------------------------------------------------------------


def plan(depth: int, **more: Any) -> Plan:
    given: dict[str, Any] = {"vlm": tiny.vlm(layers=depth, width=8, heads=2, kv_heads=1), "items": [], "images": None}
    given |= {"source": "", "template": "", "zone": None, "amount": 2.0, "amounts": (), "pictures": 1, "few": 1}
    return Plan(**{**given, "controls": 1, "resamples": 1, "convention": None, "seed": 0, **more})


@pytest.mark.parametrize(
    "depth, more, curve, layers, why",
    [
        (7, {}, [3.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0], [2, 3, 4], "the zone that was found"),
        (8, {}, list(range(8)), [2, 3], "no zone was found, and no band to choose; these stand where the published"),
        (7, {"zone": (0, 1)}, [3.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0], [0, 1], "as asked for"),
        (17, {"convention": "viar-2026"}, [1.0] * 17, list(range(8, 17)), "the published layers"),
    ],
)
def test_the_layers_that_are_biased_are_found_or_stated(
    depth: int, more: dict[str, Any], curve: list[float], layers: list[int], why: str
) -> None:
    noise = np.random.default_rng(0).normal(size=(30, depth)) / 20
    found = mv.find_zone(xr.DataArray(curve + noise, dims=["prompt", "layer"]), splits=5, resamples=100)
    chosen = layers_of(plan(depth, **more), found)
    assert chosen[0] == layers and chosen[1].startswith(why)


# -- sentences --------------------------------------------------------------------------------------------------------

UNSURE = np.random.default_rng(1).normal(size=240)


@pytest.mark.parametrize(
    "change, verdict",
    [
        (0.5, "+0.0000 [+0.0000, +0.0000], so it does no more than moving the threshold"),
        (np.where(baseline().label == "yes", 1.5, -1.5), "so it does more than moving the threshold"),
        (np.where(baseline().label == "yes", -1.5, 1.5), "so it does less than moving the threshold"),
        (UNSURE / 3, "so it cannot be told from moving the threshold"),
        (0.0, "as no answer turns right or wrong, so there is nothing to tell apart"),
    ],
)
def test_a_planted_change_of_the_answers_is_told_for_what_it_is(change: Any, verdict: str) -> None:
    base, edited = baseline(), changed(baseline(), change)
    found = mv.evaluate.stats.compare(base, edited, resamples=500)
    one = found.sel(metric="accuracy")
    said = against_threshold(found)
    assert said.endswith(verdict)
    assert with_interval(one.difference, one.difference_low, one.difference_high, sign="+") in said
    assert finding("bias", {"base": base, "bias": edited}).endswith(f"{verdict}.")


def test_whether_the_bias_beats_a_threshold_is_answered_by_the_numbers() -> None:
    base = baseline()
    toward = np.where(base.label == "yes", 1.5, -1.5)
    for change, answer in ((0.5, "No: by +0.0000 [+0.0000, +0.0000]"), (toward, "Yes: by +"), (-toward, "No, it does")):
        edited = changed(base, change)
        found = mv.evaluate.stats.compare(base, edited, resamples=500)
        one = found.assign(n_items=240).expand_dims(edit=["VIAR"])
        said = finding("statistics", {"statistics": one.assign_attrs(images=40)})
        assert said.startswith(f"Does the bias beat a threshold of the same share of yes? {answer}"), said


def test_a_zone_is_spoken_of_where_there_is_one() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 7)) / 5
    for curve, said in (
        (
            [3.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0],
            "Layers 2 to 4 pay the image less than the layers beside them: their mean is 1.9",
        ),
        ([2.0] * 7, "No zone of neglect is found: the rule chooses"),
    ):
        values = xr.DataArray(np.array(curve) + noise, dims=["prompt", "layer"])
        bent = mv.u_shape(values, resamples=100)
        found = mv.find_zone(values, splits=5, resamples=100)
        both = found.assign({f"u_{name}": one for name, one in bent.data_vars.items()})
        both = both.assign_attrs(layers="2, 3", layers_from="as asked for")
        assert finding("zone", {"zone": both}).startswith(said)
        assert finding("zone", {"zone": both}).endswith("Biased: 2-3, as asked for.")


@pytest.mark.parametrize(
    "curve, shape, better",
    [
        ([3.0, 1.5, 1.0, 1.0, 1.0, 1.5, 3.0], "a U", "better"),
        ([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "no U", "worse"),
    ],
)
def test_a_curve_is_called_a_u_by_the_rule_of_the_audit_and_no_other(
    curve: list[float], shape: str, better: str
) -> None:
    noise = np.random.default_rng(0).normal(size=(40, len(curve))) / 20
    values = xr.DataArray(np.array(curve) + noise, dims=["prompt", "layer"])
    bent = mv.u_shape(values, resamples=100)
    both = mv.find_zone(values, splits=5, resamples=100)
    both = both.assign({f"u_{name}": one for name, one in bent.data_vars.items()})
    said = finding("zone", {"zone": both.assign_attrs(layers="2, 3", layers_from="as asked for")})
    assert float(bent.curvature.sel(end="low")) > 0  # which alone is no U
    assert f". The curve is {shape}: its curvature is +" in said
    assert f"a parabola foretells a layer left out {better} than a straight line" in said


def test_where_all_answers_are_right_nothing_goes_with_being_right() -> None:
    right = [{**row, "label": "yes"} for row in ROWS]
    shifted = study(vlm(), right, zone=[1], parts=["base"], **FEW)["base"]
    labels = dict(zip(shifted.question_id.values.tolist(), shifted.predicted.values.tolist(), strict=True))
    right = [{**row, "label": labels[row["question_id"]]} for row in ROWS]
    found = study(vlm(), right, zone=[1], parts=["samples"], **FEW)
    assert found.findings["samples"] == "All 10 answers are right, so nothing can go with being right."
    assert found["samples"].attention.sizes == {"item": 10, "layer": 5}


def test_evaluations_side_by_side_are_each_one_again() -> None:
    base, edited = baseline(), changed(baseline(), 0.5)
    both = side_by_side({"one": base, "two": edited})
    for name, alone in (("one", base), ("two", edited)):
        xr.testing.assert_equal(both.sel(edit=name, drop=True), alone)
    assert both.attrs["edits"] == "one: none | two: planted"


# -- refusals ---------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, Callable[[], object]]] = [
    (
        f"parts=['profile', 'attention'] are no parts of the study; choose from {', '.join(PARTS)}.",
        lambda: study(vlm(), ROWS, parts=["profile", "attention"], **FEW),
    ),
    ("few=0 is too few; give 1 or more.", lambda: study(vlm(), ROWS, **{**FEW, "few": 0})),
    (
        "the part 'zone' needs 4 pictures, and the 4 questions are about 2; ask more questions with items (--items), "
        "or all.",
        lambda: study(vlm(), ROWS, parts=["bias"], items=4, **FEW),
    ),
    (
        "pictures=3 is too few for the part 'zone'; give 4 or more.",
        lambda: study(vlm(), ROWS, parts=["bias"], **{**FEW, "pictures": 3}),
    ),
    ("items=0 is too few; give 1 or more.", lambda: study(vlm(), ROWS, items=0, **FEW)),
    ("zone=[1, 3] must be layers of 0 to 4, one after the other.", lambda: study(vlm(), ROWS, zone=[1, 3], **FEW)),
    ("zone=[4, 5] must be layers of 0 to 4, one after the other.", lambda: study(vlm(), ROWS, zone=[4, 5], **FEW)),
    (
        "out=3 is not a folder; give its path, or None to keep nothing on disk.",
        lambda: study(vlm(), ROWS, parts="base", out=3, **FEW),  # type: ignore[arg-type]
    ),
    (
        f"out={__file__!r} is a file; give a folder, in which each part is a file.",
        lambda: study(vlm(), ROWS, parts="base", out=__file__, **FEW),
    ),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("message, wrong", CASES, ids=[message[:50] for message, _ in CASES])
def test_what_cannot_be_studied_is_refused(message: str, wrong: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        wrong()
    assert str(caught.value) == message
