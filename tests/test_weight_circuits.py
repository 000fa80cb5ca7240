"""Circuits from weights: scores of whole matrices, and what a head would write of what it looks at, by hand."""

import numpy as np
import planted
import pytest
import tiny
import torch
import zoo
from torch import Tensor

import mechvlm as mv
from mechvlm.experiments.weight_circuits import circuits, score


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    made = tiny.vlm(2, "sdpa", torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in made.hf.model.language_model.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand(32, generator=generator))
    return made


def whole(vlm: mv.VLM, layer: int, head: int) -> dict[str, Tensor]:
    """A head's circuits as matrices of d_model by d_model, with the gain of the norm that it reads through."""
    block = vlm.hf.model.language_model.layers[layer]
    gain, attention, kv = block.input_layernorm.weight[:, None], block.self_attn, head // 2
    q = gain * attention.q_proj.weight[8 * head : 8 * head + 8].T
    k, v = (gain * part.weight[8 * kv : 8 * kv + 8].T for part in (attention.k_proj, attention.v_proj))
    return {"qk": q @ k.T, "ov": v @ attention.o_proj.weight[:, 8 * head : 8 * head + 8].T}


def test_scores_are_those_of_whole_matrices(vlm: mv.VLM) -> None:
    found = mv.composition_scores(vlm)
    matrices = {(layer, head): whole(vlm, layer, head) for layer in range(3) for head in range(4)}
    for (first, writer), one in matrices.items():
        for (then, reader), other in matrices.items():
            place = {"writer_layer": first, "writer_head": writer, "reader_layer": then, "reader_head": reader}
            read = {"q": other["qk"], "k": other["qk"].T, "v": other["ov"]}
            for way, second in read.items():
                expected = (one["ov"] @ second).norm() / (one["ov"].norm() * second.norm())
                own = float(found[way].sel(place))
                assert np.isnan(own) if then <= first else own == pytest.approx(float(expected), abs=1e-12)


def test_matrices_of_normal_numbers_have_the_value_that_is_subtracted(vlm: mv.VLM) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (30, 64, 4), "k": (30, 64, 4), "v": (30, 64, 4), "o": (30, 4, 64)}
    one, other = (
        circuits({name: torch.randn(size, generator=generator) for name, size in sizes.items()}) for _ in range(2)
    )
    for way in ("q", "k", "v"):
        assert float(score(one, other, way).pow(2).mean()) == pytest.approx(1 / 64, rel=0.03)
    found, above = mv.composition_scores(vlm), mv.composition_scores(vlm, subtract=True)
    assert np.allclose((found.q - above.q).values[0, :, 1], 32**-0.5)


def test_a_head_that_reads_what_another_writes_scores_one_and_others_nothing() -> None:
    made = planted.build(0, 2)
    with torch.no_grad():
        later = made.model.language_model.layers[2].self_attn
        later.q_proj.weight[8, planted.SAID], later.k_proj.weight[0, planted.CALL] = 1.0, 1.0  # head 1 asks for it
        later.v_proj.weight[0, planted.SAID] = 1.0
        later.o_proj.weight[20, 8] = 1.0
    found = mv.composition_scores(mv.VLM(made)).sel(writer_layer=0, reader_layer=2)
    for way in ("q", "v"):
        table = found[way].values
        assert table[2, 1] == pytest.approx(1.0, abs=1e-6)
        table[2, 1] = 0
        assert np.count_nonzero(table) == 0
    assert np.count_nonzero(found.k) == 0


@zoo.second_environment
def test_what_a_head_writes_of_a_position_times_its_attention_is_its_part_of_the_logit(vlm: mv.VLM) -> None:
    real = vlm.prompt(tiny.picture(1), "is there a red cat ?")
    yes, no = (vlm.token_ids(word)[0] for word in ("yes", "no"))
    parts = mv.direct_logit_attribution(vlm, real, mv.logit_difference(yes, no), by="token").by_token
    for layer in range(3):
        found = mv.ov_writes(vlm, layer, None, real, words=[yes, no])
        paid = mv.attention_map(vlm, real, layer, 3)
        logit = found.word_logit.sel(word=str(yes)) - found.word_logit.sel(word=str(no))
        assert np.abs(paid.values * logit.sel(head=3).values - parts.sel(layer=layer, head=3).values).max() < 1e-6


def test_what_a_head_writes_of_a_direction_is_worked_out_by_hand(vlm: mv.VLM) -> None:
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mv.ov_writes(vlm, 1, [3, 0], directions, top=4, words=["cat"])
    language = vlm.hf.model.language_model
    attention = language.layers[1].self_attn
    with torch.no_grad():
        for row, head in enumerate((3, 0)):
            kv = head // 2
            read = language.layers[1].input_layernorm(directions) @ attention.v_proj.weight[8 * kv : 8 * kv + 8].T
            logits = vlm.hf.lm_head(language.norm(read @ attention.o_proj.weight[:, 8 * head : 8 * head + 8].T))
            best = logits.topk(4)
            assert np.allclose(found.logit[row], best.values, atol=1e-12)
            assert found.token.values[row].tolist() == [[vlm.word(int(at)) for at in line] for line in best.indices]
            assert np.allclose(found.word_logit[row, :, 0], logits[:, vlm.token_ids("cat")[0]], atol=1e-12)
    assert found.logit.dims == ("head", "direction", "rank")


def test_the_planted_head_says_yes_of_brightness() -> None:
    vlm, _, _, layer, head = planted.planted(1, 2)
    bright = torch.zeros(32)
    bright[planted.BRIGHT] = 1.0
    found = mv.ov_writes(vlm, layer, None, torch.stack([bright, -bright]), top=1)
    assert found.token.sel(head=head).values[:, 0].tolist() == [str(planted.YES), str(planted.NO)]
    assert (found.logit.sel(head=head) > 1).all()
    assert not found.logit.sel(head=[0, 1, 3]).any()
