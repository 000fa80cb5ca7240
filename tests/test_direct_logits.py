"""Parts of a logit: those of hand-written hooks, all of the answer where one head carries it, and no part forgotten."""

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
from mechvlm.metrics import WordMetric

PLANTED = mv.logit_difference(planted.YES, planted.NO)
YES = mv.logit_difference("yes", "no")


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    made = tiny.vlm(2, "sdpa", torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.hf.model.language_model.norm.weight.add_(torch.rand(32, generator=generator))
    return made


@pytest.fixture(scope="module")
def found(vlm: mv.VLM, real: mv.Prompt) -> xr.Dataset:
    return mv.direct_logit_attribution(vlm, real, YES, by="token")


def by_hand(vlm: mv.VLM, prompt: mv.Prompt) -> dict[str, Any]:
    """The same by hooks on Hugging Face's eager model and its weights, one head and one key at a time."""
    model = tiny.model(2, "eager", torch.float64)
    model.load_state_dict(vlm.hf.state_dict())
    plain = Plain(model)
    plain({name: x.double() if x.is_floating_point() else x for name, x in prompt.encoding.items()})
    language, seen = model.model.language_model, {place[:2]: x[0] for place, x in plain.seen.items() if "text" in place}
    yes, no = (vlm.token_ids(word)[0] for word in ("yes", "no"))
    stream = seen["resid_post", 2][-1]
    reads = (model.lm_head.weight[yes] - model.lm_head.weight[no]) * language.norm.weight
    reads = reads / (stream.pow(2).mean() + language.norm.variance_epsilon).sqrt()
    keys = torch.zeros(3, 4, len(prompt), dtype=torch.float64)
    for layer in range(3):
        out = language.layers[layer].self_attn.o_proj.weight.T.unflatten(0, (4, 8))
        for head in range(4):
            moved = seen["v", layer][:, head // 2] @ out[head]  # two heads share a key-value head
            keys[layer, head] = seen["pattern", layer][head, -1] * (moved @ reads)
    mlps = torch.stack([seen["mlp_out", layer][-1] @ reads for layer in range(3)])
    return {"keys": keys, "mlps": mlps, "embed": seen["resid_pre", 0][-1] @ reads, "all": stream @ reads}


def test_parts_are_those_of_hooks_by_hand(vlm: mv.VLM, real: mv.Prompt, found: xr.Dataset) -> None:
    expected = by_hand(vlm, real)
    # transformers' norm is in float32 whatever the model is in, and its scale is the one that counts.
    assert np.abs(found.heads.values - expected["keys"].sum(-1).numpy()).max() < 1e-6
    assert np.abs(found.by_token.values - expected["keys"][..., real.image].numpy()).max() < 1e-6
    for name, positions in real.spans.items():
        assert np.abs(found.by_span.sel(span=name) - expected["keys"][..., positions].sum(-1).numpy()).max() < 1e-6
    assert np.abs(found.mlps.values - expected["mlps"].numpy()).max() < 1e-6
    assert float(found.contribution.sel(component="embed")) == pytest.approx(float(expected["embed"]), abs=1e-6)
    assert float(found.contribution.sum()) == pytest.approx(float(expected["all"]), abs=1e-6)
    assert np.abs(found.heads).min() > 1e-4


def test_what_is_taken_apart_is_the_models_own_number(vlm: mv.VLM, real: mv.Prompt, found: xr.Dataset) -> None:
    own = float(vlm.metric(YES)(vlm.run(real).logits)[0])
    assert float(found.metric) == own and float(found.logit) == pytest.approx(own, abs=1e-12)
    assert abs(float(found.remainder)) < 1e-6
    assert float(found.remainder) == pytest.approx(own - float(found.contribution.sum()), abs=1e-12)


def test_heads_and_mlps_are_components_by_their_names(found: xr.Dataset) -> None:
    parts = found.contribution
    assert float(parts.sel(component="a1.h3")) == float(found.heads.sel(layer=1, head=3))
    assert float(parts.sel(component="m2")) == float(found.mlps.sel(layer=2))
    assert parts.component.values[[0, 1, 4, 5]].tolist() == ["embed", "a0.h0", "a0.h3", "m0"]
    assert parts.kind.sel(component=["a1.h3", "m2", "norm.bias"]).values.tolist() == ["head", "mlp", "bias"]


def test_the_planted_head_has_all_of_the_answer_and_takes_it_from_the_bright_squares() -> None:
    vlm, bright, _, layer, head = planted.planted(1, 2)
    squares = torch.ones(1, 3, 8, 8)
    squares[..., 6:] = -1  # the last column of four is dark, and speaks against as loudly
    prompt = vlm.prompt(encoding={"input_ids": bright.encoding["input_ids"], "pixel_values": squares})
    found = mv.direct_logit_attribution(vlm, prompt, PLANTED, by="token")
    answer = float(found.logit)
    assert answer > 1 and np.count_nonzero(found.contribution) == 1
    assert float(found.heads.sel(layer=layer, head=head)) == pytest.approx(answer, rel=1e-6)
    assert float(found.by_span.sel(layer=layer, head=head, span="image")) == pytest.approx(answer, rel=1e-5)
    on_picture = found.by_token.sum(["layer", "head"])
    expected = np.tile([1.0, 1.0, 1.0, -1.0], 4) * answer / 8
    assert np.allclose(on_picture, expected, rtol=1e-4)


def test_a_word_of_several_spellings_leaves_exactly_their_entropy(vlm: mv.VLM, real: mv.Prompt) -> None:
    metric = WordMetric("logit_difference", (7, 9), ids=((7, 8, 20), (9,)))
    found = mv.direct_logit_attribution(vlm, real, metric)
    logits = vlm.run(real).logits[0]
    shares = logits[[7, 8, 20]].softmax(-1)
    entropy = float(-(shares * shares.log()).sum())
    assert float(found.contribution.sel(component="spellings")) == pytest.approx(entropy, abs=1e-9)
    assert float(found.metric) == pytest.approx(float(logits[[7, 8, 20]].logsumexp(-1) - logits[9]), abs=1e-12)
    assert abs(float(found.remainder)) < 1e-6 and entropy > 0.1


def test_one_words_logit_has_the_parts_of_the_difference(vlm: mv.VLM, real: mv.Prompt, found: xr.Dataset) -> None:
    one, other = (mv.direct_logit_attribution(vlm, real, word) for word in ("yes", vlm.token_ids("no")[0]))
    assert np.abs(one.contribution - other.contribution - found.contribution).max() < 1e-12
    assert float(one.metric) == float(vlm.run(real).logits[0, vlm.token_ids("yes")[0]])


@zoo.second_environment
def test_several_prompts_keep_their_own_numbers_and_intervals_are_over_pictures(vlm: mv.VLM, real: mv.Prompt) -> None:
    other = real.with_text("what colour ?"), vlm.prompt(tiny.picture(2), "is there a red cat ?")
    both = mv.direct_logit_attribution(vlm, [real, *other], [YES, "red", YES], by="span")
    alone = mv.direct_logit_attribution(vlm, other[0], "red", by="span")
    assert np.abs(both.contribution.sel(prompt=1) - alone.contribution).max() < 1e-12
    assert np.abs(both.by_span.sel(prompt=1) - alone.by_span).max() < 1e-12
    clusters = [0, 0, 1]
    mean = mv.mean_interval(both.heads.isel(layer=1, head=2), "prompt", clusters)
    assert float(both.contribution_low.sel(component="a1.h2")) == pytest.approx(float(mean.low))
    assert "2 clusters" in both.attrs["interval"]


def test_spans_of_ones_own_leave_the_rest_elsewhere(vlm: mv.VLM, real: mv.Prompt, found: xr.Dataset) -> None:
    own = mv.direct_logit_attribution(vlm, real, YES, spans={"half": real.image[:8]}, by="span")
    assert own.span.values.tolist() == ["half", "elsewhere"]
    assert np.abs(own.by_span.sel(span="half") - found.by_token.isel(position=slice(8)).sum("position")).max() < 1e-12
    assert np.abs(own.by_span.sum("span") - own.heads).max() < 1e-9


def test_what_edits_put_into_the_stream_is_a_part(vlm: mv.VLM, real: mv.Prompt) -> None:
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    steered = vlm.with_edits([mv.steer("text.2.resid_post", direction, 3.0, real.last)])
    found = mv.direct_logit_attribution(steered, real, YES, by="span")
    run = steered.run(real, read={"text.2.resid_post": lambda x: x[:, -1]})
    stream = run["text.2.resid_post"][0]
    yes, no = (vlm.hf.lm_head.weight[vlm.token_ids(word)[0]] for word in ("yes", "no"))
    norm = vlm.hf.model.language_model.norm
    reads = (yes - no) * norm.weight / (stream.pow(2).mean() + norm.variance_epsilon).sqrt()
    added = stream - vlm.run(real, read={"text.2.resid_post": lambda x: x[:, -1]})["text.2.resid_post"][0]
    assert float(found.contribution.sel(component="edits")) == pytest.approx(float(added @ reads), abs=1e-6)
    assert abs(float(found.remainder)) < 1e-6


def test_a_head_that_is_ablated_adds_nothing(vlm: mv.VLM, real: mv.Prompt) -> None:
    ablated = vlm.with_edits([mv.ablate_heads(1, [2])])
    found = mv.direct_logit_attribution(ablated, real, YES)
    assert float(found.heads.sel(layer=1, head=2)) == 0
    assert abs(float(found.contribution.sel(component="edits"))) < 1e-12 and abs(float(found.remainder)) < 1e-6


def test_where_an_image_token_answers_it_is_the_image_that_enters(vlm: mv.VLM, real: mv.Prompt) -> None:
    until = real.image[-1] + 1
    cut = {name: x[:, :until] if x.ndim == 2 else x for name, x in real.encoding.items()}
    found = mv.direct_logit_attribution(vlm, vlm.prompt(encoding=cut), 7)
    assert found.contribution.component.values[0] == "image" and found.contribution.kind.values[0] == "image"
    assert abs(float(found.remainder)) < 1e-6


def test_the_figure_has_heads_and_mlps_by_layer(found: xr.Dataset) -> None:
    figure: Any = mv.plot.direct_logits(found)
    assert np.array_equal(figure.data[0].z, found.heads.values)
    assert np.array_equal(figure.data[1].z[:, 0], found.mlps.values)
    assert "the sum misses at most" in figure.layout.annotations[0].text.replace("<br>", " ")
