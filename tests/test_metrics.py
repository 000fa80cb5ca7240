"""Metrics of the last logits against plain torch, and usable wherever a metric is."""

import numpy as np
import planted
import pytest
import tiny
import torch

import mechvlm as mv


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(1), "is there a red cat in the image ?")


def test_kl_divergence_is_torchs_own() -> None:
    known, rows = torch.randn(1, 64).double(), torch.randn(5, 64).double()
    own = torch.nn.functional.kl_div(
        rows.log_softmax(-1), known.log_softmax(-1).expand(5, -1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(mv.kl_divergence(known)(rows), own)
    torch.testing.assert_close(mv.kl_divergence(rows)(rows), torch.zeros(5).double(), rtol=0, atol=1e-12)
    half = mv.kl_divergence(known.bfloat16())(rows)
    assert half.dtype == torch.float64 and float((half - own).abs().max()) < 0.05


def test_a_token_that_the_reference_rules_out_adds_nothing() -> None:
    known = torch.tensor([[0.0, 0.0, -torch.inf]])
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]])
    np.testing.assert_allclose(mv.kl_divergence(known)(rows), [np.log(3 / 2), 0], atol=1e-12)


def test_kl_divergence_has_a_gradient_where_the_runs_differ_and_none_where_they_agree(
    vlm: mv.VLM, real: mv.Prompt
) -> None:
    run, site = vlm.run(real), "text.1.resid_post"
    metric = mv.kl_divergence(run)
    same = vlm.run(real, read=[site], grad_of=metric).grad[site]
    other = vlm.run(real.with_image(mv.images.black), read=[site], grad_of=metric).grad[site]
    assert float(same.abs().max()) < 1e-6 < 1e-3 < float(other.abs().max())


def test_rank_counts_the_likelier_tokens_and_takes_the_best_spelling(vlm: mv.VLM) -> None:
    logits = torch.randn(6, 64)
    ids = [9, 20]
    metric = mv.metrics.WordMetric("rank", ("both",), (tuple(ids),))
    order = logits.argsort(-1, descending=True).tolist()
    assert metric(logits).tolist() == [1 + min(row.index(number) for number in ids) for row in order]
    assert vlm.metric(mv.rank(7))(torch.ones(1, 64)).tolist() == [1]


def test_a_sweep_of_rank_and_divergence_finds_the_planted_head() -> None:
    vlm, real, null, layer, head = planted.planted()
    clean = vlm.run(real)
    for metric, found in ((mv.kl_divergence(clean), lambda x: x > 0.1), (mv.rank(planted.NO), lambda x: x < 0)):
        effect = mv.ablate_each_head(vlm, real, metric)
        assert [tuple(place) for place in np.argwhere(found(effect.values))] == [(layer, head)]
        assert np.count_nonzero(np.abs(effect.values) > 1e-6) == 1
    patched = mv.patch_spans(vlm, real, null, mv.kl_divergence(clean))
    assert abs(float(patched.normalised.sel(layer=0, span="image")) - 1) < 1e-6


def test_records_say_what_was_compared_with_and_in_which_unit(vlm: mv.VLM, real: mv.Prompt) -> None:
    run = vlm.run(real)
    effect = mv.ablate_each_head(vlm, real, mv.kl_divergence(run))
    assert effect.attrs["metric"] == f"kl_divergence(logits 1 x 64, likeliest token {int(run.logits.argmax())})"
    assert effect.attrs["units"] == "nats"
    effect = mv.ablate_each_head(vlm, real, mv.rank("yes"))
    assert (effect.attrs["metric"], effect.attrs["units"]) == ("rank('yes')", "rank")
