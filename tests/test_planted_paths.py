"""The hand-built models whose answer goes along known edges: that it does, by patching alone."""

import planted
import planted_paths
import pytest
import torch

import mechvlm as mv

METRIC = mv.logit_difference(planted.YES, planted.NO)


@pytest.mark.parametrize("norms", [True, False])
def test_what_the_asking_word_saw_is_all_that_the_answer_needs(norms: bool) -> None:
    made = planted_paths.two_hops(norms)
    for span, expected in (("question", (0, 1)), ("last", (2, 2))):
        found = mv.patch_heads(made.vlm, made.source, made.target, METRIC, made.target.spans[span])
        assert found.attrs["target_metric"] == 0 and found.attrs["source_metric"] > 1
        assert float(found.normalised.sel(layer=expected[0], head=expected[1])) == 1
        assert float(found.normalised.sum()) == 1


@pytest.mark.parametrize("norms", [True, False])
def test_twin_heads_add_up(norms: bool) -> None:
    made = planted_paths.twins(norms)
    site = mv.Site("attn_out", 1)
    run = made.vlm.run(made.source, [site], variants=[[mv.ablate_heads(1, heads)] for heads in ([3], [2], [0])])[site]
    said = run[:, -1, planted.SAID].tolist()
    assert said[0] == 2 * said[1] > 0 and said[2] == pytest.approx(sum(said[:2]))
    assert torch.count_nonzero(run[2]) == 1
