"""Law 15: in a model built so that one head of one layer carries the answer, that one is found and no other."""

import planted
import pytest
import torch

import mechvlm as mv

METRIC = mv.logit_difference(planted.YES, planted.NO)
PLANTS = [(0, 3, 4), (1, 2, 2), (1, 0, 2), (2, 1, 4)]


@pytest.mark.parametrize(("layer", "head", "kv_heads"), PLANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ablation_finds_the_head(layer: int, head: int, kv_heads: int, attention: str) -> None:
    vlm, real, *_ = planted.planted(layer, head, kv_heads, attention)
    clean = vlm.metric(METRIC)(vlm.run(real).logits)
    variants = [[mv.ablate_heads(at, [one])] for at in range(3) for one in range(4)]
    effect = (vlm.metric(METRIC)(vlm.run(real, variants=variants).logits) - clean).reshape(3, 4)
    assert effect[layer, head] == -clean
    effect[layer, head] = 0
    assert torch.count_nonzero(effect) == 0


@pytest.mark.parametrize(("layer", "head", "kv_heads"), PLANTS)
def test_patching_finds_the_way(layer: int, head: int, kv_heads: int) -> None:
    """The answer is in the image tokens up to the planted layer, and in the last position after it."""
    vlm, real, null, *_ = planted.planted(layer, head, kv_heads)
    metric = vlm.metric(METRIC)
    yes, no = metric(vlm.run(real).logits), metric(vlm.run(null).logits)
    for at in range(3):
        site = mv.Site("resid_pre", at)
        source = vlm.run(real, read=[site])[site]
        for span, positions in real.spans.items():
            carried = metric(vlm.run(null, edits=[mv.patch(site, source, positions)]).logits)
            assert carried == (yes if span == ("image" if at <= layer else "last") else no), (at, span)
    z = mv.Site("z", layer)
    carried = metric(vlm.run(null, edits=[mv.patch(z, vlm.run(real, read=[z])[z], real.last)]).logits)
    assert carried == yes


def test_knockout_and_bias_find_the_way() -> None:
    vlm, real, _, layer, head = planted.planted()
    metric = vlm.metric(METRIC)
    clean = metric(vlm.run(real).logits)
    for at in range(3):
        for one in range(4):
            cut = metric(vlm.run(real, edits=[mv.cut_attention(at, real.image, real.last, [one])]).logits)
            assert (cut == 0) if (at, one) == (layer, head) else (cut == clean)
    # A bias against the image that outweighs its score leaves the planted head nothing to copy.
    blunted = vlm.run(real, edits=[mv.bias_attention(layer, real.image, -5000.0, heads=[head])]).logits
    assert metric(blunted) == 0
