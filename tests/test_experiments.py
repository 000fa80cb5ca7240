"""The experiments against independent references: eager attention, plain hooks, autograd, and what was planted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import tiny
import torch
import xarray as xr

import mechvlm as mv
from mechvlm.experiments.ablation import ablate_each_head, at_positions
from mechvlm.experiments.answers import answer_probabilities
from mechvlm.experiments.attribution import gradient_attribution
from mechvlm.experiments.dose import dose_response
from mechvlm.experiments.lens import logit_lens
from mechvlm.experiments.patching import patch_spans
from mechvlm.experiments.profile import attention_map, attention_profile
from mechvlm.experiments.sweep import sweep

YES = mv.logit_difference("yes", "no")
PLANTED = mv.logit_difference(planted.YES, planted.NO)
LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module", params=[(2, "sdpa"), (4, "eager")], ids=["grouped, sdpa", "full, eager"])
def vlm(request: pytest.FixtureRequest) -> mv.VLM:
    return tiny.vlm(*request.param)


@pytest.fixture(scope="module")
def real(vlm: mv.VLM) -> mv.Prompt:
    return vlm.prompt(tiny.picture(1), "is there a red cat in the image ?")


@pytest.fixture(scope="module")
def null(real: mv.Prompt) -> mv.Prompt:
    return real.with_image(mv.images.black)


def eager_patterns(vlm: mv.VLM, prompt: mv.Prompt) -> np.ndarray:
    """Layer, head, query, key, as transformers computes them with eager attention."""
    used, vlm.attention = vlm.attention, "eager"
    with torch.no_grad():
        patterns = vlm.hf(**prompt.encoding, output_attentions=True).attentions
    vlm.attention = used
    return torch.cat(patterns).numpy()


def yes_minus_no(vlm: mv.VLM, logits: torch.Tensor) -> torch.Tensor:
    yes, no = (vlm.token_ids(word) for word in ("yes", "no"))
    return logits[..., yes].logsumexp(-1) - logits[..., no].logsumexp(-1)


def own_metric(vlm: mv.VLM, prompt: mv.Prompt) -> float:
    """The metric of a plain forward pass."""
    with torch.no_grad():
        return float(yes_minus_no(vlm, vlm.hf(**prompt.encoding).logits[0, -1]))


# -- where it looks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["last", "text", [20, -2]])
def test_profile_equals_eager_attention(vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt, queries: Any) -> None:
    other = vlm.prompt(tiny.picture(2), "what colour ?")
    prompts = [real, other, null]
    profile = attention_profile(vlm, prompts, queries=queries)
    assert profile.mass.dims == ("example", "layer", "head", "span")
    assert profile.question.values.tolist() == [prompt.words for prompt in prompts]
    for example, prompt in enumerate(prompts):
        own = eager_patterns(vlm, prompt)
        rows = {"last": [-1], "text": prompt.question + prompt.last}.get(str(queries), queries)
        for span, keys in prompt.spans.items():
            expected = own[:, :, rows][..., keys].sum(-1).mean(-1)
            assert np.abs(profile.mass.sel(example=example, span=span) - expected).max() < 1e-6
            assert profile.n_keys.sel(example=example, span=span) == len(keys)
    assert np.abs(profile.mass.sum("span") - 1).max() < 1e-6


def test_lift_is_one_for_even_attention(vlm: mv.VLM, real: mv.Prompt) -> None:
    model = tiny.model()
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    even = mv.VLM(model, tiny.processor())
    lift = attention_profile(even, even.prompt(tiny.picture(), "is there a cat ?"), queries="text").lift
    assert np.abs(lift - 1).max() < 1e-5
    assert np.isnan(attention_profile(vlm, real, queries=[0]).lift.sel(span="image")).all()


def test_attention_map_is_the_image_part_of_a_row(vlm: mv.VLM, real: mv.Prompt) -> None:
    own = eager_patterns(vlm, real)
    one, mean = attention_map(vlm, real, 1, 2), attention_map(vlm, real, 1, query=-3)
    assert np.abs(one - own[1, 2, -1][real.image]).max() < 1e-6
    assert np.abs(mean - own[1, :, -3].mean(0)[real.image]).max() < 1e-6
    both = attention_map(vlm, real, 1, 2, query=[-1, 20])
    assert both.dims == ("query", "position")
    assert np.abs(both - own[1, 2][[-1, 20]][:, real.image]).max() < 1e-6
    assert one.position.values.tolist() == real.image
    assert [real.images[0].cell(p) for p in real.image] == [
        (0, int(r), int(c)) for r, c in zip(one.row, one.column, strict=True)
    ]


# -- what it holds ---------------------------------------------------------------------------------------------------


def test_lens_of_the_last_layer_is_the_prediction(vlm: mv.VLM, real: mv.Prompt) -> None:
    lens = logit_lens(vlm, real, positions=[-1], words=["yes", 5])
    shares = vlm.run(real).logits[0].softmax(-1)
    last = lens.isel(layer=-1, position=0)
    assert np.abs(last.probability - shares.topk(5).values.numpy()).max() < 1e-6
    assert last.token.values.tolist() == [vlm.word(number) for number in shares.topk(5).indices.tolist()]
    assert abs(float(last.word_probability.sel(word="yes")) - float(shares[vlm.token_ids("yes")].sum())) < 1e-6
    assert abs(float(last.word_probability.sel(word="5")) - float(shares[5])) < 1e-6


def test_lens_equals_hidden_states_through_the_unembedding(vlm: mv.VLM, real: mv.Prompt) -> None:
    lens = logit_lens(vlm, real, layers=[0, 1], top=3)
    with torch.no_grad():
        hidden = vlm.hf(**real.encoding, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            shares = vlm.hf.lm_head(vlm.hf.model.language_model.norm(hidden[layer + 1][0])).softmax(-1).topk(3)
            assert np.abs(lens.probability.sel(layer=layer) - shares.values.numpy()).max() < 1e-6
    assert lens.position.values.tolist() == list(range(len(real)))
    assert lens.input_token.values.tolist() == real.tokens
    assert lens["rank"].values.tolist() == [1, 2, 3]


# -- what it needs ---------------------------------------------------------------------------------------------------


def hooked(vlm: mv.VLM, prompt: mv.Prompt, layer: int, head: int, change: Any) -> float:
    """The metric of a plain forward pass in which a hook changes what one head hands to the output matrix."""

    def hook(_module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = given[0].clone()
        width = vlm.shape.d_head["text"]
        z[..., head * width : (head + 1) * width] = change(z[..., head * width : (head + 1) * width])
        return (z,)

    handle = vlm.hf.model.language_model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        return own_metric(vlm, prompt)
    finally:
        handle.remove()


def test_ablation_equals_plain_hooks(vlm: mv.VLM, real: mv.Prompt) -> None:
    effect = ablate_each_head(vlm, real, YES, batch_size=5)
    clean = own_metric(vlm, real)
    expected = [[hooked(vlm, real, la, he, torch.zeros_like) - clean for he in range(HEADS)] for la in range(LAYERS)]
    assert effect.dims == ("layer", "head")
    assert np.abs(effect - expected).max() < 2e-5
    assert np.abs(effect).max() > 0.01
    assert abs(effect.attrs["clean"] - clean) < 1e-5


def test_ablation_at_positions_and_to_another_prompt(vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt) -> None:
    here = ablate_each_head(vlm, real, YES, positions=real.last)
    clean = own_metric(vlm, real)

    def last_only(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, -1] = 0
        return z

    assert abs(float(here.sel(layer=1, head=2)) - (hooked(vlm, real, 1, 2, last_only) - clean)) < 2e-5
    assert np.abs(ablate_each_head(vlm, real, YES, to=real)).max() < 2e-5
    other = vlm.run(null, read=["text.1.z"])["text.1.z"]
    resampled = ablate_each_head(vlm, real, YES, to=null)
    expected = hooked(vlm, real, 1, 2, lambda _: other[:, :, 2]) - clean
    assert abs(float(resampled.sel(layer=1, head=2)) - expected) < 2e-5
    mean = [torch.zeros(HEADS, vlm.shape.d_head["text"])] * LAYERS
    assert np.abs(ablate_each_head(vlm, real, YES, to=mean) - ablate_each_head(vlm, real, YES)).max() < 2e-5


@pytest.mark.parametrize("plant", [(1, 2, 2), (2, 1, 4)])
def test_the_planted_head_is_found(plant: tuple[int, int, int]) -> None:
    vlm, real, null, layer, head = planted.planted(*plant)
    effect = ablate_each_head(vlm, real, PLANTED)
    found = np.zeros((3, 4))
    found[layer, head] = -effect.attrs["clean"]
    assert np.abs(effect - found).max() < 1e-5
    assert abs(effect.attrs["clean"]) > 1
    patched = patch_spans(vlm, real, null, PLANTED).normalised
    for at in range(3):
        for span in real.spans:
            carries = span == ("image" if at <= layer else "last")
            assert abs(float(patched.sel(layer=at, span=span)) - carries) < 1e-5, (at, span)
    profile = attention_profile(vlm, real).mass.sel(span="image", example=0)
    assert float(profile.sel(layer=layer, head=head)) > 0.99
    attributed = gradient_attribution(vlm, real, PLANTED).attribution
    assert (attributed > 0).all()


# -- where it passes -------------------------------------------------------------------------------------------------


def test_patching_equals_plain_hooks(vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt) -> None:
    patched = patch_spans(vlm, real, null, YES)
    with torch.no_grad():
        hidden = vlm.hf(**real.encoding, output_hidden_states=True).hidden_states
    ends = own_metric(vlm, real), own_metric(vlm, null)
    for layer, span in ((0, "image"), (1, "image"), (2, "question"), (2, "last")):

        def hook(_module: Any, args: tuple, named: dict, layer: int = layer, span: str = span) -> tuple:
            h = args[0].clone()
            h[:, real.spans[span]] = hidden[layer][:, real.spans[span]]
            return (h, *args[1:]), named

        stack = vlm.hf.model.language_model.layers[layer]
        handle = stack.register_forward_pre_hook(hook, with_kwargs=True)
        expected = own_metric(vlm, null)
        handle.remove()
        assert abs(float(patched.metric.sel(layer=layer, span=span)) - expected) < 2e-5
        share = (expected - ends[1]) / (ends[0] - ends[1])
        assert abs(float(patched.normalised.sel(layer=layer, span=span)) - share) < 1e-3
    assert abs(float(patched.normalised.sel(layer=0, span="image")) - 1) < 1e-3
    assert np.abs(patched.normalised.sel(layer=0, span=["bos", "prefix", "question", "last"])).max() < 1e-3
    assert abs(patched.attrs["source_metric"] - ends[0]) < 1e-5
    assert abs(patched.attrs["target_metric"] - ends[1]) < 1e-5


def test_patching_everything_gives_the_source(vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt) -> None:
    everywhere = {"all": list(range(len(real)))}
    for kind in ("resid_pre", "resid_post"):
        assert np.abs(patch_spans(vlm, real, null, YES, everywhere, kind).normalised - 1).max() < 1e-3
    same = patch_spans(vlm, real, real, YES)
    assert np.isnan(same.normalised).all()
    assert np.abs(same.metric - same.attrs["source_metric"]).max() < 2e-5


def test_attribution_equals_autograd(vlm: mv.VLM, real: mv.Prompt) -> None:
    held = []

    def hook(_module: Any, _given: Any, out: torch.Tensor) -> torch.Tensor:
        held.append(out.detach().requires_grad_(True))
        return held[0]

    handle = vlm.hf.model.multi_modal_projector.register_forward_hook(hook)
    metric = yes_minus_no(vlm, vlm.hf(**real.encoding).logits[0, -1])
    handle.remove()
    (gradient,) = torch.autograd.grad(metric, held)
    found = gradient_attribution(vlm, real, YES)
    assert found.position.values.tolist() == real.image
    assert np.abs(found.attribution - (gradient * held[0]).sum(-1).flatten().detach().numpy()).max() < 1e-5
    assert np.abs(found.gradient_norm - gradient.norm(dim=-1).flatten().numpy()).max() < 1e-5


# -- what if it looked more ------------------------------------------------------------------------------------------


def test_dose_multiplies_the_odds(vlm: mv.VLM, real: mv.Prompt) -> None:
    amounts = [-float("inf"), -1.0, 0, 2.0]
    dose = dose_response(vlm, real, YES, amounts, layers=[1])
    assert abs(float(dose.metric.sel(amount=0.0)) - own_metric(vlm, real)) < 2e-5
    own = torch.tensor(eager_patterns(vlm, real)[1, :, -1])
    for amount in amounts:
        image = own[:, real.image].sum(-1) * np.exp(amount)
        share = image / (image + 1 - own[:, real.image].sum(-1))
        assert abs(float(dose.mass_by_layer.sel(amount=amount, layer=1)) - float(share.mean())) < 1e-5
        one = vlm.run(real, edits=[mv.bias_attention(1, real.image, amount)])
        assert abs(float(dose.metric.sel(amount=amount)) - float(yes_minus_no(vlm, one.logits)[0])) < 2e-5
    assert np.abs(dose.mass - dose.mass_by_layer.mean("layer")).max() < 1e-12
    assert dose.attrs["biased_layers"] == "1"


def test_sweep_equals_one_run_a_point(vlm: mv.VLM, real: mv.Prompt) -> None:
    def cut(layer: int, span: str) -> list[mv.Edit]:
        return [mv.cut_attention(layer, real.spans[span], queries=real.last)]

    swept = sweep(vlm, real, cut, YES, batch_size=4, layer=range(LAYERS), span=["image", "question"])
    assert swept.dims == ("layer", "span")
    for layer in range(LAYERS):
        for span in ("image", "question"):
            alone = yes_minus_no(vlm, vlm.run(real, edits=cut(layer, span)).logits)
            assert abs(float(swept.sel(layer=layer, span=span)) - float(alone[0])) < 2e-5


def test_answers_equal_the_softmax(vlm: mv.VLM, real: mv.Prompt) -> None:
    short = vlm.prompt(tiny.picture(2), "what ?")
    found = answer_probabilities(vlm, {"long": real, "short": short}, ["yes", "no", 7])
    for name, prompt in (("long", real), ("short", short)):
        with torch.no_grad():
            shares = vlm.hf(**prompt.encoding).logits[0, -1].softmax(-1)
        expected = [float(shares[ids].sum()) for ids in (vlm.token_ids("yes"), vlm.token_ids("no"), [7])]
        assert np.abs(found.sel(prompt=name) - expected).max() < 1e-6
    assert found.word.values.tolist() == ["yes", "no", "7"]


# -- results as files, other precisions ------------------------------------------------------------------------------


def every_result(vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt) -> dict[str, xr.Dataset | xr.DataArray]:
    return {
        "answers": answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"]),
        "profile": attention_profile(vlm, [real, null]),
        "map": attention_map(vlm, real, 0, 1),
        "lens": logit_lens(vlm, real, words=["cat"]),
        "ablation": ablate_each_head(vlm, real, YES),
        "patching": patch_spans(vlm, real, null, YES),
        "attribution": gradient_attribution(vlm, real, YES),
        "dose": dose_response(vlm, real, YES, [-1, 0, 1]),
    }


def test_results_say_where_they_come_from_and_survive_netcdf(
    vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt, tmp_path: Path
) -> None:
    for name, result in every_result(vlm, real, null).items():
        assert result.attrs["model"] == "tiny", name
        assert result.attrs["prompt"] == real.text
        assert result.attrs["layers"] == "counted from 0"
        result.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
        opened = xr.load_dataset(tmp_path / f"{name}.nc", engine="h5netcdf")
        same = opened if isinstance(result, xr.Dataset) else opened[str(result.name)]
        xr.testing.assert_equal(same, result)
        assert same.attrs["model"] == "tiny"


def test_half_precision() -> None:
    vlm = tiny.vlm(dtype=torch.bfloat16)
    real = vlm.prompt(tiny.picture(1), "is there a cat ?")
    for name, result in every_result(vlm, real, real.with_image(mv.images.grey)).items():
        assert result.attrs["dtype"] == "bfloat16", name


# -- sentences -------------------------------------------------------------------------------------------------------

SHORT = "is there a cat in"
Call = Callable[[mv.VLM, mv.Prompt], object]
WRONG: list[tuple[Call, str]] = [
    (lambda vlm, _: attention_profile(vlm, []), "the list of prompts is empty."),
    (
        lambda vlm, real: attention_profile(vlm, real, queries="first"),
        "queries='first' is not known; choose 'last', 'text', 'all', 'generated' or a list of positions.",
    ),
    (
        lambda vlm, real: attention_profile(vlm, real, queries=[0, 99]),
        "queries holds position 99; give positions of the prompt, which has 30.",
    ),
    (
        lambda vlm, real: attention_profile(vlm, real, queries=[]),
        "queries holds an empty list; give positions of the prompt, which has 30.",
    ),
    (
        lambda vlm, _: attention_map(vlm, vlm.prompt(None, SHORT), 0),
        "the prompt holds no image to look at; make it with vlm.prompt(image, text).",
    ),
    (
        lambda vlm, real: attention_map(vlm, real, 0, 4),
        "the text tower has 4 heads a layer, counted from 0, so there is no head 4.",
    ),
    (
        lambda vlm, real: attention_map(vlm, real, 3),
        "the text tower has 3 layers, counted from 0, so there is no text.3.pattern to read.",
    ),
    (
        lambda vlm, real: logit_lens(vlm, real, positions=[-31]),
        "positions holds position -31; give positions of the prompt, which has 30.",
    ),
    (
        lambda vlm, real: logit_lens(vlm, real, top=0),
        "top=0 tokens cannot be kept; give 1 to 64, the size of the vocabulary.",
    ),
    (lambda vlm, real: logit_lens(vlm, real, layers=[]), "layers is empty; give at least one, or None for all."),
    (
        lambda vlm, real: logit_lens(vlm, real, words=["zebra"]),
        "no spelling of 'zebra' is a single token of this model; give a token id.",
    ),
    (
        lambda vlm, real: logit_lens(vlm, real, words=[64]),
        "token id 64 is not in the vocabulary of 64.",
    ),
    (
        lambda *_: at_positions(mv.ablate_heads(0, [0]), []),
        "positions is empty, so nothing would be edited; give at least one, or None for all.",
    ),
    (
        lambda vlm, real: ablate_each_head(vlm, real, YES, to=[torch.zeros(4, 8)]),
        "to holds 1 tensors; give one for each of the 3 layers.",
    ),
    (
        lambda vlm, real: ablate_each_head(vlm, real, YES, to=real.with_text(SHORT)),
        "to has 26 positions and the prompt 30, so positions cannot be matched; make it with prompt.with_image, which "
        "keeps them.",
    ),
    (
        lambda vlm, real: patch_spans(vlm, real, real.with_text(SHORT), YES),
        "the source has 30 positions and the target 26, so positions cannot be matched; make one from the other with "
        "prompt.with_image, which keeps them.",
    ),
    (
        lambda vlm, _: patch_spans(
            vlm,
            vlm.prompt(tiny.picture(), "<image> a cat", raw=True),
            vlm.prompt(tiny.picture(), "a <image> cat", raw=True),
            YES,
        ),
        "the source's image tokens do not stand where the target's do, so positions cannot be matched; make one from "
        "the other with prompt.with_image, which keeps them.",
    ),
    (
        lambda vlm, real: patch_spans(vlm, real, real, YES, kind="embed"),
        "spans of 'embed' cannot be patched; choose from resid_pre, q, k, v, scores, pattern, z, attn_out, resid_mid, "
        "mlp_out, resid_post.",
    ),
    (
        lambda vlm, _: gradient_attribution(vlm, vlm.prompt(None, SHORT), YES),
        "the prompt holds no image, so there is no image_features to read; make it with vlm.prompt(image, text).",
    ),
    (
        lambda vlm, _: dose_response(vlm, vlm.prompt(None, SHORT), YES, [1]),
        "the prompt holds no image, so there is nothing to look at; pass keys=, the positions to bias.",
    ),
    (
        lambda vlm, real: dose_response(vlm, real, YES, []),
        "amounts is empty; give at least one, for instance [-2, 0, 2].",
    ),
    (lambda vlm, real: sweep(vlm, real, list, YES), "a sweep needs at least one axis, for instance layer=range(8)."),
    (lambda vlm, real: sweep(vlm, real, list, YES, layer=[]), "the axis 'layer' has no values; give at least one."),
    (
        lambda vlm, real: sweep(vlm, real, lambda head: [head][:0], YES, layer=[0]),
        "point_to_edits takes head, and the axes are layer; its arguments must be named like the axes.",
    ),
    (
        lambda vlm, real: sweep(vlm, real, lambda layer: [layer][:0], YES, batch_size=0, layer=[0]),
        "batch_size=0 runs nothing; give 1 or more.",
    ),
    (
        lambda vlm, _: answer_probabilities(vlm, {}, ["yes"]),
        "answer_probabilities needs at least one prompt and one word.",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_sentences(vlm: mv.VLM, real: mv.Prompt, call: Call, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        call(vlm, real)
    assert str(refused.value) == sentence


NAMED = "prompts must have names, such as {'real': real, 'null': null}, and list was given."
ONE = "is not one prompt; make it with vlm.prompt(image, text), and ask about several one by one."
NO_WORDS = "words='yes' is not a list of words; write ['yes']."
Loose = Callable[[Any, Any], object]
MISTAKEN: list[tuple[Loose, str]] = [
    (lambda vlm, real: answer_probabilities(vlm, [real], ["yes"]), NAMED),  # type: ignore[arg-type]
    (lambda vlm, real: answer_probabilities(vlm, {"real": real}, "yes"), NO_WORDS),
    (lambda vlm, real: logit_lens(vlm, real, words="yes"), NO_WORDS),
    (lambda vlm, real: logit_lens(vlm, real, words=7), "words=7 is not a list of words; write [7]."),  # type: ignore[arg-type]
    (lambda vlm, _: gradient_attribution(vlm, [1], YES), f"[1] {ONE}"),  # type: ignore[arg-type]
    (lambda vlm, _: ablate_each_head(vlm, [1], YES), f"[1] {ONE}"),  # type: ignore[arg-type]
    (lambda vlm, real: patch_spans(vlm, [1], real, YES), f"[1] {ONE}"),  # type: ignore[arg-type]
    (lambda vlm, _: dose_response(vlm, [1], YES, [1]), f"[1] {ONE}"),  # type: ignore[arg-type]
    (lambda vlm, _: sweep(vlm, [1], list, YES, layer=[0]), f"[1] {ONE}"),  # type: ignore[arg-type]
    (
        lambda vlm, real: logit_lens(vlm, real, layers=3),  # type: ignore[arg-type]
        "layers=3 is not a list of layers; write for instance [0].",
    ),
    (
        lambda vlm, real: logit_lens(vlm, real, positions=-1),  # type: ignore[arg-type]
        "positions=-1 is not a list of positions; write for instance [0].",
    ),
    (
        lambda vlm, real: attention_profile(vlm, real, queries=3),  # type: ignore[arg-type]
        "queries=3 is not a list of queries; write for instance [0].",
    ),
    (lambda vlm, real: attention_map(vlm, real, 0, 1, query=0.5), "query 0.5 is not a whole number."),  # type: ignore[arg-type]
    (lambda vlm, real: attention_map(vlm, real, 0, 1.0), "head 1.0 is not a whole number."),  # type: ignore[arg-type]
    (
        lambda vlm, real: ablate_each_head(vlm, real, YES, positions=-1),  # type: ignore[arg-type]
        "positions=-1 is not a list of positions; write for instance [0].",
    ),
    (
        lambda vlm, real: ablate_each_head(vlm, real, YES, to=0.0),  # type: ignore[arg-type]
        "to=0.0 is neither a prompt nor a list of tensors, one for each of 3 layers.",
    ),
    (
        lambda vlm, real: patch_spans(vlm, real, real, YES, spans=[1]),  # type: ignore[arg-type]
        "spans=[1] does not name them; write for instance {'image': prompt.image}.",
    ),
    (
        lambda vlm, real: dose_response(vlm, real, YES, 2.0),  # type: ignore[arg-type]
        "amounts=2.0 is not a list of amounts; write for instance [-2, 0, 2].",
    ),
    (lambda vlm, real: dose_response(vlm, real, YES, ["a"]), "amount='a' is not a number."),  # type: ignore[list-item]
    (
        lambda vlm, real: sweep(vlm, real, list, YES, layer=3),  # type: ignore[arg-type]
        "the axis 'layer' is 3, and an axis is a list of values; write layer=[...].",
    ),
    (
        lambda vlm, real: sweep(vlm, real, list, YES, heads=[[0, 1]]),
        "the axis 'heads' holds [0, 1], and its values must be numbers or names, by which results are found; give "
        "names, and look up in point_to_edits what they stand for.",
    ),
    (
        lambda vlm, real: sweep(vlm, real, lambda layer: mv.ablate_heads(layer, [0]), YES, layer=[0]),  # type: ignore
        "point_to_edits returned one edit at layer=0; it must return a list of edits, such as [edit].",
    ),
    (
        lambda vlm, real: sweep(vlm, real, lambda layer: 7 * layer, YES, layer=[1]),
        "point_to_edits returned 7 at layer=1; it must return a list of edits, such as [edit].",
    ),
    (
        lambda vlm, real: sweep(vlm, real, lambda layer: [][layer:], lambda logits: logits.mean(), layer=[0, 1]),
        "the metric returned () for 2 rows; it must return one number a row.",
    ),
    (
        lambda vlm, real: dose_response(vlm, real, lambda logits: logits[:, :2], [0, 1]),
        "the metric returned (2, 2) for 2 rows; it must return one number a row.",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), MISTAKEN, ids=[sentence[:40] for _, sentence in MISTAKEN])
def test_plausible_mistakes(vlm: mv.VLM, real: mv.Prompt, call: Loose, sentence: str) -> None:
    """Without the test run's type checks, as users meet them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises((ValueError, TypeError)) as refused:
            call(vlm, real)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(refused.value) == sentence


def test_a_gap_of_rounding_size_is_not_blown_up(vlm: mv.VLM, real: mv.Prompt, null: mv.Prompt) -> None:
    """A difference that rounding alone can make carries nothing, and says so."""

    def nearly_blind(logits: torch.Tensor) -> torch.Tensor:
        return 5 + 1e-9 * logits[:, 0]

    found = patch_spans(vlm, real, null, nearly_blind)
    assert np.isnan(found.normalised).all()
    assert "within the rounding of the logits" in found.attrs["note"]
    assert "note" not in patch_spans(vlm, real, null, YES).attrs


def test_a_prompt_that_ends_in_its_image(vlm: mv.VLM) -> None:
    prompt = vlm.prompt(tiny.picture(1), "what is this <image>", raw=True)
    text, last = (attention_profile(vlm, prompt, queries=queries).mass for queries in ("text", "last"))
    assert (text == last).all()
