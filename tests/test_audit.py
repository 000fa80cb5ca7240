"""The audit where truth was planted, and its numbers against plain runs of the model."""

import functools
import math

import numpy as np
import pytest
import tiny
import torch
import xarray as xr

import mechvlm as mv
from mechvlm.methods.audit import audit
from mechvlm.methods.audit_attention import correlation, far, gap, shares
from mechvlm.methods.audit_causes import collapse_findings
from mechvlm.methods.findings import CONCLUSIONS, RULE, Estimate, draws_of, verdict

LAYERS = 6
QUESTIONS = ("Is there a cat?", "Is there a red dog in the image?")
SINK = (3.0, 3.0, -1.0, -1.0, 3.0, 3.0)
"""The bias on the first token in each layer: little in the middle."""


@functools.cache
def even() -> tuple[mv.VLM, list[mv.Prompt]]:
    """A model whose attention is even in all layers, and prompts about eight pictures, as few as can show a zone."""
    vlm = tiny.vlm(layers=LAYERS)
    for layer in vlm.hf.model.language_model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    return vlm, [vlm.prompt(tiny.picture(seed), QUESTIONS[seed % 2]) for seed in range(8)]


def paid(prompts: list[mv.Prompt], first: float, image: float) -> float:
    """What text rows pay to the image where attention is even but for a bias on the first token and on the image."""
    found = []
    for prompt in prompts:
        count, behind = len(prompt.image), prompt.image[-1] + 1
        rows = np.arange(behind, len(prompt))
        others = rows + 1 - count - 1
        found.append((count * math.exp(image) / (count * math.exp(image) + math.exp(first) + others)).mean())
    return float(np.mean(found))


def to_stay(prompts: list[mv.Prompt], first: float, wanted: float) -> float:
    """The bias on the image by which it is paid as much as is wanted, whatever the first token takes."""
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if paid(prompts, first, middle) < wanted else (low, middle)
    return low


@functools.cache
def with_a_sink() -> dict[str, xr.Dataset]:
    """The first token is a sink outside the middle layers; attention to the image is the same in all."""
    vlm, prompts = even()
    edits = []
    for layer, first in enumerate(SINK):
        image = to_stay(prompts, first, 0.5)
        edits += [mv.bias_attention(layer, [0], first), mv.bias_attention(layer, prompts[0].image, image)]
    return audit(vlm.with_edits(edits), prompts, mistral=True, resamples=200)


@functools.cache
def with_a_zone() -> dict[str, xr.Dataset]:
    """The image is paid less in layers 2 and 3, and nothing else is planted."""
    vlm, prompts = even()
    return audit(
        vlm.with_edits([mv.bias_attention(layer, prompts[0].image, -1.0) for layer in (2, 3)]), prompts, resamples=200
    )


def of(found: dict[str, xr.Dataset], name: str) -> xr.Dataset:
    return found["findings"].sel(finding=name)


def test_a_sink_makes_a_zone_that_does_not_survive() -> None:
    found = with_a_sink()
    flat = found["profile"]["mean"].sel(quantity="mass")
    assert float(flat.max() - flat.min()) < 1e-5  # what was planted
    assert [float(found["published_zone"][end]) for end in ("start", "stop")] == [2, 4]
    zone = of(found, "zone")
    assert zone.verdict == "does not survive"
    assert zone.published.sel(end="low") > 0.02
    assert abs(zone.corrected.sel(end="value")) < 1e-5


def test_a_sink_makes_a_u_that_does_not_survive() -> None:
    assert of(with_a_sink(), "u_shape").verdict == "does not survive"


def test_the_published_curve_is_found_to_be_the_sinks() -> None:
    found = of(with_a_sink(), "published_curve")
    assert found.verdict == "does not survive"
    assert found.corrected.sel(end="high") < 0.5


def test_one_token_counted_as_the_image_is_no_image() -> None:
    found = of(with_a_sink(), "mistral")
    assert found.verdict == "does not survive"
    assert (found.corrected == 0).all()


def test_a_zone_that_is_there_survives_where_it_is() -> None:
    found = with_a_zone()
    zone = of(found, "zone")
    assert zone.verdict == "survives"
    assert [float(found["zone"][end]) for end in ("start", "stop")] == [2, 4]
    vlm, prompts = even()
    planted = paid(prompts, 0.0, 0.0) - paid(prompts, 0.0, -1.0)
    assert float(zone.corrected.sel(end="value")) == pytest.approx(planted, abs=1e-5)
    assert of(found, "published_curve").verdict == "survives"


def test_sentences_say_the_numbers_and_the_verdict_of_their_row() -> None:
    for found in (with_a_sink(), with_a_zone()):
        for row in found["findings"].transpose("finding", ...).finding.values:
            one = of(found, row)
            said, what = str(one.sentence.values), str(one.verdict.values)
            assert said.endswith(f": {CONCLUSIONS[what]}.")
            if one.unit != "log ratio, nats" and np.isfinite(one.corrected).all():  # which is said as a factor
                assert f"{abs(float(one.corrected.sel(end='value'))):.3f}" in said, said


@functools.cache
def plain() -> tuple[mv.VLM, list[mv.Prompt], dict[str, xr.Dataset]]:
    """A random model with nothing planted, in double precision, and its audit with a given zone."""
    vlm = tiny.vlm(layers=LAYERS, attention="eager", dtype=torch.float64, seed=1)
    prompts = [vlm.prompt(tiny.picture(seed), QUESTIONS[seed % 2]) for seed in range(4)]
    return vlm, prompts, audit(vlm, prompts, zone=[2, 3], resamples=50)


def masses(published: bool) -> np.ndarray:
    """Attention to the image by the plain model's own maps, `prompt layer head`."""
    vlm, prompts, _ = plain()
    found = []
    for prompt in prompts:
        with torch.no_grad():
            maps = vlm.hf(**prompt.encoding, output_attentions=True).attentions
        count, behind = len(prompt.image), prompt.image[-1] + 1
        keys, rows = (slice(0, count), slice(count, None)) if published else (prompt.image, slice(behind, None))
        found.append([one[0][:, rows][..., keys].sum(-1).mean(-1).numpy() for one in maps])
    return np.array(found)


def test_numbers_of_attention_are_those_of_the_plain_models_maps() -> None:
    *_, found = plain()
    for name, published in (("published", True), ("corrected", False)):
        heads = masses(published)
        curve = heads.mean((0, 2))
        low = min(curve[1], curve[4]) - curve[2:4].mean()
        bend = np.polyfit(np.linspace(-1, 1, LAYERS), curve, 2)[0]
        matrix = heads.mean(0)
        spread = matrix[2:4].mean(0).std() if published else np.sqrt(matrix[2:4].var(-1).mean())
        expected = {"zone": low, "last_drop": curve[-2] - curve[-1], "u_shape": bend, "head_spread": spread}
        for row, value in expected.items():
            assert float(of(found, row)[name].sel(end="value")) == pytest.approx(value, abs=1e-7), (
                row
            )  # Hugging Face's softmax is single


def test_heads_that_remain_are_counted() -> None:
    *_, found = plain()
    matrix, true = (masses(published).mean(0) for published in (True, False))
    for row, sign in (("neglect_heads", -1), ("specialist_heads", 1)):
        marked, really = (sign * (one - one.mean()) > one.std() for one in (matrix, true))
        assert marked.any()
        share = (marked & really).sum() / marked.sum()
        assert float(of(found, row).corrected.sel(end="value")) == pytest.approx(share)


def test_the_end_of_the_collapse_is_that_of_hidden_states_and_of_true_outputs() -> None:
    vlm, prompts, found = plain()
    rises: dict[str, list[float]] = {"published": [], "corrected": []}
    for prompt in prompts:
        last: list[torch.Tensor] = []
        states, entered = [], []
        for one in (prompt, prompt.with_image(mv.images.black)):
            hook = vlm.hf.model.language_model.layers[-1].register_forward_hook(
                lambda module, args, out, last=last: last.append(out[0] if isinstance(out, tuple) else out)  # noqa: ARG005
            )
            with torch.no_grad():
                states.append(vlm.hf(**one.encoding, output_hidden_states=True).hidden_states)
            hook.remove()
            entered.append(states[-1][-2])
        for name, ends, first in (
            ("published", [one[-1] for one in states], len(prompt.image)),
            ("corrected", last, prompt.image[-1] + 1),
        ):
            cosines = []
            for after, before in ((ends, entered), (entered, [one[-3] for one in states])):
                a, b = (x[0, first:] - y[0, first:] for x, y in zip(after, before, strict=True))
                cosines.append(torch.cosine_similarity(a, b, dim=-1).mean().item())
            rises[name].append(cosines[0] - cosines[1])
    for name, values in rises.items():
        assert float(of(found, "collapse_last")[name].sel(end="value")) == pytest.approx(np.mean(values), abs=1e-9)


def test_the_audit_says_which_layers_it_took_for_the_zone() -> None:
    chosen = [found["findings"].attrs for found in (plain()[-1], with_a_sink())]
    assert [(about["zone"], about["zone_was"]) for about in chosen] == [
        ("2, 3", "as given"),
        ("2, 3", "found in the published curve"),
    ]


ONE, HALF, NONE = Estimate(1.0, 0.9, 1.1), Estimate(0.4, 0.3, 0.5), Estimate(0.0, -0.1, 0.1)
TINY, WIDE = Estimate(0.05, 0.04, 0.06), Estimate(0.5, -0.2, 1.2)


@pytest.mark.parametrize(
    ("corrected", "shown", "still", "against", "expected"),
    [
        (ONE, True, True, False, "survives"),
        (HALF, True, True, False, "survives in part"),
        (TINY, True, True, False, "does not survive"),
        (NONE, True, False, False, "does not survive"),
        (WIDE, True, False, False, "not decided"),
        (WIDE, True, False, True, "does not survive"),
        (NONE, False, False, False, "not there"),
        (ONE, False, True, False, "only corrected"),
    ],
)
def test_verdicts(corrected: Estimate, shown: bool, still: bool, against: bool, expected: str) -> None:
    apart = Estimate(*(1 - end for end in (corrected.value, corrected.high, corrected.low)))
    assert verdict(ONE, corrected, apart, shown, still, against) == expected


def test_a_smaller_number_that_may_be_as_large_is_not_in_part() -> None:
    assert verdict(ONE, HALF, Estimate(0.6, -0.1, 1.3), True, True) == "survives"


def test_what_could_not_be_made_as_published_is_told() -> None:
    assert verdict(Estimate(float("nan")), ONE, NONE, False, True) == "not made"


def test_draws_are_of_whole_clusters_and_leave_out_what_is_no_number() -> None:
    draws = draws_of(["a", "b", "a"], 300, 0, 0.9)
    assert np.array_equal(draws.weights[:, 0], draws.weights[:, 2])
    assert (draws.weights[:, 0] + draws.weights[:, 1] == 2)[1:].all()
    values = np.array([1.0, 3.0, np.nan])
    assert draws.means(values)[0] == 2
    one = draws.estimate(draws.means(values))
    assert (one.value, one.low, one.high) == (2, 1, 3)


def test_shares_of_parts_are_covariances_and_sum_to_one() -> None:
    parts = np.random.default_rng(0).normal(size=(1, 7, 3))
    total = parts[0].sum(-1)
    expected = [np.cov(part, total)[0, 1] / np.var(total, ddof=1) for part in parts[0].T]
    assert np.allclose(shares(parts)[0], expected)
    assert shares(parts).sum() == pytest.approx(1)
    assert correlation(parts[..., 0], parts[..., 1])[0] == pytest.approx(np.corrcoef(*parts[0, :, :2].T)[0, 1])


def test_a_gap_is_below_the_lower_neighbour_and_far_heads_are_beyond_one_deviation() -> None:
    assert gap(np.array([[5.0, 1.0, 2.0, 4.0]]), 1, 3).tolist() == [2.5]
    assert far(np.array([[[0.0, 5.0], [5.0, 10.0]]])).tolist() == [[[-1, 0], [0, 1]]]


def test_a_black_picture_that_is_less_alike_than_another_one_is_not_ignored() -> None:
    found = with_a_zone()
    one, true = of(found, "collapse_zone"), found["collapse"].sel(span="text", layer=[2, 3])
    black, swap = (true.update_cosine.sel(null=null).mean() for null in ("black", "swap"))
    assert one.published.sel(end="low") > 0 and one.corrected.sel(end="low") > 0 and black < swap - 0.1
    assert one.verdict == "does not survive"
    assert f"less alike than another real one by {float(swap - black):.3f}" in str(one.sentence.values)
    assert "so that its cosine says nothing of a picture that is ignored" in str(one.sentence.values)


@pytest.mark.parametrize(
    ("beyond", "expected"),
    [
        ([0.2, 0.3, 0.2, 0.3], "survives"),
        ([-0.2, -0.3, -0.2, -0.3], "does not survive"),
        ([-0.3, 0.3, -0.2, 0.3], "not decided"),
        (None, "not decided"),
    ],
)
def test_the_collapse_of_a_zone_depends_on_another_real_picture(beyond: list[float] | None, expected: str) -> None:
    cosines = np.tile([0.5, 0.5, 0.9, 0.9, 0.5, 0.5], (4, 1, 1, 1))
    dims = ["prompt", "null", "span", "layer"]
    planted = xr.Dataset({name: (dims, cosines) for name in ("update_cosine", "update_cosine_normed")})
    planted["update_cosine_normed"] = planted.update_cosine.isel(layer=-1)
    planted = planted.assign_coords(null=["black"], span=["text"])
    if beyond is not None:
        planted["above_swap"] = planted.update_cosine * 0 + xr.DataArray(beyond, dims="prompt")
    assert collapse_findings(planted, planted, draws_of(range(4), 200, 0, 0.95), [2, 3])[0].verdict == expected


@pytest.mark.parametrize("shown", [False, True])
def test_a_finding_with_a_test_of_its_own_is_decided_by_it_and_the_rule_says_so(shown: bool) -> None:
    assert verdict(ONE, ONE, NONE, shown, True) == ("survives" if shown else "only corrected")
    assert "where a finding has a test of its own, that test alone decides, wherever the interval lies" in RULE


def test_where_all_inner_layers_are_the_zone_the_collapse_has_nothing_to_be_compared_with() -> None:
    _, _, found = plain()
    draws = draws_of([0, 1, 2, 3], 10, 0, 0.95)
    zone, end = collapse_findings(found["collapse"], found["published_collapse"], draws, [1, 2, 3, 4])
    assert (zone.verdict, end.verdict == "not made") == ("not made", False)
