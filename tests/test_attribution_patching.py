"""Attribution patching: what autograd gives by hand, exact where all is linear, and shown wrong where it is wrong."""

from typing import Any

import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr
import zoo
from plain import Plain

import mechvlm as mv
from mechvlm.experiments.attributed_checks import checked, chosen_nodes, unpatched
from mechvlm.experiments.correlations import correlation, rank_correlation

PLANTED = mv.logit_difference(planted.YES, planted.NO)
YES = mv.logit_difference("yes", "no")
KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@pytest.fixture(scope="module")
def found(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> xr.Dataset:
    return mv.attribution_patching(vlm, real, other, YES, kinds=KINDS, verify=2)


def by_hand(vlm: mv.VLM, source: mv.Prompt, target: mv.Prompt) -> dict[str, np.ndarray]:
    """The same by hooks on Hugging Face's modules and torch's autograd."""
    ids = vlm.token_ids("yes"), vlm.token_ids("no")
    runs = [Plain(tiny.model(2, "eager", torch.float64), gradients=True) for _ in range(2)]
    logits = []
    for plain, prompt in zip(runs, (source, target), strict=True):
        encoding = {name: x.double() if x.is_floating_point() else x for name, x in prompt.encoding.items()}
        logits.append(plain(encoding)[0, -1])
    value = logits[1][ids[0]].logsumexp(0) - logits[1][ids[1]].logsumexp(0)

    def product(kind: str, layer: int) -> np.ndarray:
        place = (kind, layer, "text")
        difference = (runs[0].seen[place] - runs[1].seen[place]).detach()
        return (difference * runs[1].gradient(value, place)).sum(-1)[0].numpy()

    return {kind: np.stack([product(kind, layer) for layer in range(3)]) for kind in KINDS}


def test_estimates_are_autograds_at_every_site_by_position_and_by_head(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset
) -> None:
    expected = by_hand(vlm, real, other)
    for kind in KINDS:
        assert found[kind].shape == expected[kind].shape
        assert np.abs(found[kind].values - expected[kind]).max() < 1e-9, kind
        assert np.abs(expected[kind]).max() > 1e-3, kind


def test_heads_have_an_axis_of_their_own_under_grouped_queries(found: xr.Dataset) -> None:
    assert [found[kind].dims[2:] for kind in ("q", "k", "v", "z")] == [("head",), ("kv_head",), ("kv_head",), ("head",)]
    assert (found.sizes["head"], found.sizes["kv_head"]) == (4, 2)


def test_what_is_verified_is_what_patching_finds(
    vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt, found: xr.Dataset
) -> None:
    of = found.sel(kind="k")
    assert of.drawn.values.tolist() == ["top", "top", "random", "random"]
    for node in range(4):
        one = of.isel(node=node)
        place = {"layer": int(one.node_layer), "kv_head": int(one.node_head)}
        at = int(one.node_position)
        patched = mv.patch_heads(vlm, real, other, YES, [at], "k", layers=[place["layer"]])
        change = float(patched.metric.sel(place)) - patched.attrs["target_metric"]
        assert float(one.exact) == pytest.approx(change, abs=1e-12)
        assert float(one.estimate) == float(found.k.sel({**place, "position": at}))


def test_spans_sum_their_positions_and_are_patched_together(vlm: mv.VLM, real: mv.Prompt, other: mv.Prompt) -> None:
    each = mv.attribution_patching(vlm, real, other, YES, kinds=["mlp_out"])
    spans = mv.attribution_patching(vlm, real, other, YES, kinds=["mlp_out"], positions="span", verify=4)
    for name, positions in other.spans.items():
        sums = each.mlp_out.sel(position=positions).sum("position")
        assert np.allclose(spans.mlp_out.sel(span=name), sums, atol=1e-12)
    patched = mv.patch_spans(vlm, real, other, YES, kind="mlp_out")
    changes = patched.metric - patched.attrs["target_metric"]
    for node in range(spans.sizes["node"]):
        one = spans.isel(node=node, kind=0)
        place = {"layer": int(one.node_layer), "span": str(one.node_span.values)}
        assert float(one.exact) == pytest.approx(float(changes.sel(place)), abs=1e-12)


def test_a_prompt_patched_with_itself_changes_nothing(vlm: mv.VLM, real: mv.Prompt) -> None:
    found = mv.attribution_patching(vlm, real, real, YES, verify=1)
    assert all((found[kind] == 0).all() for kind in ("resid_pre", "attn_out", "mlp_out", "z"))
    assert np.abs(found.exact).max() < 1e-12
    assert found.attrs["note"] == "source and target are the same prompt, so no patch changes anything"


def linear_end() -> tuple[mv.VLM, mv.Prompt, mv.Prompt, int, int]:
    """The planted model without its last norm: behind the planted head all is linear."""
    made = planted.build(1, 2)
    made.model.language_model.norm = torch.nn.Identity()
    asked = planted.planted()
    return mv.VLM(made), asked[1], asked[2], 1, 2


def test_the_estimate_is_the_patch_where_all_that_follows_is_linear() -> None:
    vlm, bright, dark, layer, head = linear_end()
    found = mv.attribution_patching(vlm, bright, dark, PLANTED, kinds=["z", "attn_out"], layers=[layer], verify=100)
    gap = found.attrs["source_metric"] - found.attrs["target_metric"]
    expected = xr.zeros_like(found.z)
    expected.loc[{"layer": layer, "position": len(bright) - 1, "head": head}] = gap
    assert gap > 1 and np.abs(found.z - expected).max() < 1e-5
    assert np.nanmax(np.abs(found.estimate - found.exact)) < 1e-5
    assert found.missed_share.values.tolist() == [0.0, 0.0]


def test_saturated_attention_is_passed_over_and_verify_shows_it() -> None:
    vlm, real, _, layer, head = planted.planted()
    ids = real.encoding["input_ids"].clone()
    ids[0, -1] = 8  # another last word, which does not ask: the planted head then looks everywhere alike
    unasked = vlm.prompt(encoding={"input_ids": ids, "pixel_values": real.encoding["pixel_values"]})
    found = mv.attribution_patching(vlm, unasked, real, PLANTED, kinds=["q"], layers=[layer], verify=44)
    of = found.isel(kind=0)
    there = (of.node_position == len(real) - 1) & (of.node_head == head)
    node = of.isel(node=int(there.values.argmax()))
    assert abs(float(node.estimate)) < 1e-3 * abs(float(node.exact))
    assert float(node.exact) < -0.2
    assert float(np.abs(of.exact - of.estimate).max()) == pytest.approx(abs(float(node.exact)), rel=1e-3)


def test_the_picture_moves_as_one_where_it_enters_behind_later_layers_too() -> None:
    vlm = zoo.build("qwen3_vl")
    real, null = (zoo.ask(vlm, tiny.picture(number, 60, 40)) for number in (0, 1))
    metric = mv.logit_difference(30, 31)
    found = mv.attribution_patching(vlm, real, null, metric, kinds=["resid_pre"], positions="span", verify=1)
    sites = [mv.Site("image_features"), *(mv.Site("deepstack", layer) for layer in range(vlm.shape.deepstack))]
    one, other = vlm.run(real, sites), vlm.run(null, sites, grad_of=metric)
    expected = sum(float(((one[site] - other[site]) * other.grad[site]).sum()) for site in sites)
    assert float(found.resid_pre.sel(layer=0, span="image")) == pytest.approx(expected, rel=1e-4)


def test_positions_say_which_part_of_the_picture_they_are(found: xr.Dataset, other: mv.Prompt) -> None:
    assert found.row.sel(position=other.image).values.tolist() == np.repeat(range(4), 4).tolist()
    assert set(found.row.sel(position=other.question).values) == {-1}
    assert found.token.values.tolist() == list(other.tokens)


def test_agreement_is_counted_as_it_is_defined() -> None:
    generator = np.random.default_rng(0)
    one, two = generator.normal(size=(2, 30))
    one[3] = one[7]
    data = xr.Dataset({"one": ("at", one), "two": ("at", two)}).to_dataframe()
    assert correlation(one, two) == pytest.approx(data.corr().loc["one", "two"])
    assert rank_correlation(one, two) == pytest.approx(data.corr("spearman").loc["one", "two"])


def test_the_share_of_the_top_that_is_in_truth_there(found: xr.Dataset) -> None:
    for kind in KINDS:
        of = found.sel(kind=kind)
        sizes = dict(enumerate(np.abs(of.exact.values)))
        best = sorted(sizes, key=lambda at: -sizes[at])[:2]
        assert float(of.precision) == len({0, 1} & set(best)) / 2
        assert float(of.missed) == np.abs(of.exact - of.estimate).values[2:].max()
        assert float(of.missed_share) == pytest.approx(1 - 0.05**0.5)


@pytest.mark.parametrize(("nodes", "share"), [(4, 0.0), (5, 1 - 0.05**0.5)])
def test_nothing_is_unseen_where_every_node_was_patched(nodes: int, share: float) -> None:
    table = xr.DataArray(np.arange(1.0, nodes + 1)[None], dims=["layer", "position"], coords={"layer": [0]})
    estimates = {"z": table.assign_coords(position=range(nodes))}
    picked = chosen_nodes(estimates, 2, 0)
    exact = {"z": np.array([node.estimate for node in picked["z"]])}
    found = checked(picked, exact, unpatched(estimates, picked), "position")
    assert float(found.missed_share[0]) == pytest.approx(share)


def test_the_figure_has_every_node_where_it_belongs(found: xr.Dataset) -> None:
    figure: Any = mv.plot.attributed(found.sel(kind=["z", "k"]))
    drawn = {trace.name: trace for trace in figure.data}
    assert list(drawn) == ["estimate = exact", "z, top", "z, random", "k, top", "k, random"]
    of = found.sel(kind="k")
    assert list(drawn["k, random"].x) == of.estimate.values[2:].tolist()
    assert list(drawn["k, random"].y) == of.exact.values[2:].tolist()
    assert list(drawn["estimate = exact"].x) == list(drawn["estimate = exact"].y)
