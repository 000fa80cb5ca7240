"""The cache and the matrices that TransformerLens's methods work on: every number against one worked out by hand."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from zoo import aya, gemma, glm, idefics, internvl, llava, mllama, queries, qwen

import mechvlm as mv
from mechvlm import bridge, circuits
from mechvlm.references import apart, eager_rounding
from mechvlm.sites import Site
from mechvlm.weights import Weights, attention_of

needs_transformer_lens = [
    pytest.mark.transformer_lens,
    pytest.mark.skipif(not bridge.installed(), reason="TransformerLens is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ZOO = {
    **{**llava.VARIANTS, **gemma.VARIANTS, **idefics.VARIANTS, **qwen.VARIANTS},
    **{**glm.VARIANTS, **internvl.VARIANTS, **aya.VARIANTS, **mllama.VARIANTS, **queries.VARIANTS},
}
CACHED = (
    "llava",
    "llava_onevision",
    "gemma3",
    "idefics3",
    "internvl-qwen3",
    "aya_vision",
    "blip2-opt",
    "glm4v",
    "qwen3_vl",
)
"""Rotary or learned positions, two norms or four a layer, biases or none, parallel or not, RMSNorm and LayerNorm."""


def asked(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A tiny model whose final norm has a gain, and a question about a picture."""
    variant, picture = ZOO[name], tiny.picture(width=40, height=28)
    vlm = mv.VLM(variant.model("sdpa", dtype), None if variant.needs_torchvision else variant.processor(), name=name)
    with torch.no_grad():
        for weight in vlm.hf.get_submodule(vlm.arch.norm).parameters():
            weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    if variant.needs_torchvision and variant.encoding is not None:
        return vlm, vlm.prompt(encoding=variant.encoding([picture], "what is in the picture ?"))
    return vlm, vlm.prompt(picture, "what is in the picture ?")


def cached(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Any]:
    """The same with a run of everything about the residual stream, and its cache."""
    vlm, prompt = asked(name, dtype)
    run = vlm.run(prompt, read=circuits.cache_sites(vlm))
    return vlm, prompt, run, circuits.to_activation_cache(run, vlm)


class TestCache:
    pytestmark = needs_transformer_lens

    @pytest.mark.parametrize("name", CACHED)
    def test_attributions_add_up_to_the_logit_difference(self, name: str) -> None:
        vlm, _, run, cache = cached(name)
        parts = cache.decompose_resid()
        found = cache.logit_attrs(parts, 10, 11)[:, 0, -1].sum() + cache.model.b_U[10] - cache.model.b_U[11]
        assert apart(found, run.logits[0, 10] - run.logits[0, 11]) < eager_rounding(vlm)

    @pytest.mark.parametrize("name", [name for name in CACHED if name != "qwen3_vl"])
    def test_a_decomposition_adds_up_at_every_position(self, name: str) -> None:
        vlm, _, run, cache = cached(name)
        last = run[Site("resid_post", vlm.shape.layers["text"] - 1)]
        assert apart(cache.decompose_resid().sum(0), last) < 1e-12

    @pytest.mark.parametrize("name", ["llava", "gemma3", "blip2-opt"])
    def test_attributions_of_heads_are_those_of_direct_logit_attribution(self, name: str) -> None:
        vlm, prompt, _, cache = cached(name)
        heads = cache.logit_attrs(cache.stack_head_results(), 10, 11)[:, 0, -1]
        found = mv.direct_logit_attribution(vlm, prompt, mv.logit_difference(10, 11))
        assert apart(torch.as_tensor(found.heads.values).flatten(), heads) < eager_rounding(vlm)

    def test_without_qwen3s_deepstack_a_decomposition_adds_up_where_no_image_stands(self) -> None:
        """What Qwen3-VL adds between layers has a site of its own and no name in TransformerLens."""
        vlm, prompt, run, cache = cached("qwen3_vl")
        rest = cache.decompose_resid().sum(0) - run[Site("resid_post", vlm.shape.layers["text"] - 1)]
        assert rest.abs().amax(-1)[0].gt(1e-9).nonzero()[:, 0].tolist() == prompt.image

    @pytest.mark.parametrize("name", CACHED)
    def test_what_heads_add_is_attention_less_its_bias(self, name: str) -> None:
        vlm, _, run, cache = cached(name)
        heads, labels = cache.stack_head_results(return_labels=True)
        each = heads.unflatten(0, (vlm.shape.layers["text"], -1)).sum(1)
        behind = circuits.stands_behind(vlm, 0)  # a norm, which the bias has gone through too; these have none
        for layer, found in enumerate(each):
            whole = run[Site("attn_out", layer)] - (0 if behind else Weights(vlm).b_O(layer))
            assert apart(found, whole) < 1e-12
        assert labels[vlm.shape.heads["text"]] == "L1H0"

    @pytest.mark.parametrize("name", CACHED)
    def test_the_accumulated_stream_is_the_logit_lens(self, name: str) -> None:
        vlm, _, run, cache = cached(name)
        lens = cache.accumulated_resid(apply_ln=True)[:, 0, -1] @ cache.model.W_U + cache.model.b_U
        layers = range(vlm.shape.layers["text"])
        own = [vlm.unembed(run[Site("resid_pre", layer)][0, -1]) for layer in layers]
        assert apart(lens, torch.stack([*own, run.logits[0]])) < eager_rounding(vlm)

    def test_heads_mlps_embedding_and_biases_are_everything(self) -> None:
        vlm, _, run, cache = cached("blip2-opt")
        parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
        assert apart(parts.sum(0), run[Site("resid_post", vlm.shape.layers["text"] - 1)]) < 1e-12
        assert labels[-2:] == ["embed", "bias"]
        assert cache.model.blocks[0].attn.b_O.abs().max() > 0

    def test_a_batch_has_its_own_tokens_for_each_row(self) -> None:
        vlm, prompt = asked("llava")
        run = vlm.run([prompt, prompt.with_image(mv.images.black)], read=circuits.cache_sites(vlm))
        cache = circuits.to_activation_cache(run, vlm)
        yes, no = torch.tensor([10, 12]), torch.tensor([11, 13])
        found = cache.logit_attrs(cache.decompose_resid(), yes, no)[:, :, -1].sum(0)
        rows = torch.arange(2)
        assert apart(found, run.logits[rows, yes] - run.logits[rows, no]) < eager_rounding(vlm)

    def test_a_word_is_taken_for_its_token(self) -> None:
        vlm, _, _, cache = cached("llava")
        parts = cache.decompose_resid()
        [token] = vlm.processor.tokenizer.encode("dog", add_special_tokens=False)
        assert torch.equal(cache.logit_attrs(parts, "dog"), cache.logit_attrs(parts, token))
        with pytest.raises(ValueError, match="'nonsense' is not one token of this model; give a token's id"):
            cache.logit_attrs(parts, "nonsense")

    def test_sites_have_the_names_and_shapes_of_transformer_lens(self) -> None:
        vlm, prompt = asked("llava", torch.float32)
        lens = bridge.bridged(vlm)
        text = ("resid_pre", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
        sites = [Site(kind, 1) for kind in text]
        sites += [Site(kind, 1, "vision") for kind in text if kind not in ("q", "k", "resid_mid")]
        sites += [Site("embed"), Site("embed", tower="vision"), Site("image_features"), Site("logits")]
        cache = circuits.to_activation_cache(vlm.run(prompt, read=sites), vlm)
        _, theirs = lens.raw(prompt, {}, [name for name in cache if name != "hook_embed"])
        assert len(theirs) == len(sites)
        assert all(cache[name].shape == theirs[name].shape for name in theirs)

    def test_circuitsvis_takes_a_pattern(self) -> None:
        visual = pytest.importorskip("circuitsvis", reason="CircuitsVis is not installed")
        vlm, prompt = asked("llava", torch.float32)
        cache = circuits.to_activation_cache(vlm.run(prompt, read=["text.0.pattern"]), vlm)
        words = [vlm.word(int(token)) for token in prompt.encoding["input_ids"][0]]
        shown = visual.attention.attention_patterns(words, cache["pattern", 0][0])
        assert cache["pattern", 0][0].shape == (vlm.shape.heads["text"], len(words), len(words))
        assert "AttentionPatterns" in str(shown)

    @pytest.mark.parametrize(
        ("ask", "said"),
        [
            (lambda cache: cache["pattern", 1], "hook_pattern is not in this cache; run with read=.*'text.1.pattern'"),
            (lambda cache: cache.decompose_resid(), "hook_embed is not in this cache; .*'text.0.resid_pre'"),
            (lambda cache: cache.stack_head_results(), "blocks.0.attn.hook_z is not in this cache; .*'text.0.z'"),
            (lambda cache: cache.logit_attrs(torch.ones(1, 1, 1, 32), 3), "hook_scale is not .*'text.2.resid_post'"),
            (lambda cache: cache["q", 0], "no site stands for it .q and k are kept behind rotary embedding"),
            (lambda cache: cache["post", 0, "mlp"], "has no blocks.0.mlp.hook_post, since no site stands for it"),
        ],
    )
    def test_what_was_not_read_is_asked_for(self, ask: Any, said: str) -> None:
        vlm, prompt = asked("llava", torch.float32)
        cache = circuits.to_activation_cache(vlm.run(prompt, read=["text.0.attn_out"]), vlm)
        with pytest.raises(ValueError, match=said):
            ask(cache)

    def test_behind_a_norm_heads_take_two_readings(self) -> None:
        vlm, prompt = asked("gemma3")
        sites = [Site("z", layer) for layer in range(vlm.shape.layers["text"])]
        cache = circuits.to_activation_cache(vlm.run(prompt, read=sites), vlm)
        with pytest.raises(ValueError, match="text layer 0, so what each adds takes two readings"):
            cache.stack_head_results()

    @pytest.mark.parametrize(
        ("site", "part"),
        [
            (Site("attn_out", 0), lambda x: x[:, -1]),
            (Site("attn_out", 0), lambda x: x.mean(-1, keepdim=True)),
            (Site("pattern", 0), mv.rows([-1])),
            (Site("pattern", 0), mv.mass({"some": [1, 2]})),
        ],
    )
    def test_a_part_of_a_tensor_is_refused(self, site: Site, part: Any) -> None:
        vlm, prompt = asked("llava")
        run = vlm.run(prompt, read={site: part})
        with pytest.raises(ValueError, match=f"{site} was read by a function, and a cache takes whole tensors"):
            circuits.to_activation_cache(run, vlm)

    @pytest.mark.parametrize("head", [0, 3])
    def test_circuits_are_those_of_transformer_lens(self, head: int) -> None:
        vlm, _ = asked("llava", torch.float32)
        lens, weights = bridge.bridged(vlm).model, Weights(vlm)
        assert torch.equal(weights.OV(1, head).AB, lens.OV[1, head].AB)
        assert torch.equal(weights.QK(1, head).AB, lens.QK[1, head].AB)
        assert torch.equal(weights.W_U, lens.W_U)
        assert torch.equal(weights.W_E, lens.W_E)

    def test_an_ov_circuit_keeps_its_factors(self) -> None:
        weights = Weights(asked("llava")[0])
        circuit = weights.OV(0, 1, "vision")
        assert circuit.mdim == 8
        assert apart(circuit.AB, weights.W_V(0, 1, "vision") @ weights.W_O(0, 1, "vision")) < 1e-14


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3", "internvl", "instructblip", "blip2-opt", "qwen3_vl"])
def test_projections_of_heads_are_the_models_own(name: str, tower: str) -> None:
    """`x @ W_V` is a head's values and `z @ W_O`, summed, what the module puts out; qkv in one matrix included."""
    vlm, prompt = asked(name)
    weights, shape = Weights(vlm), vlm.shape
    caught: dict[str, Any] = {}
    module = vlm.hf.get_submodule(attention_of(vlm, 0, tower))

    def entered(_: Any, given: tuple, named: dict[str, Any]) -> None:
        caught["x"] = named.get("hidden_states", given[0] if given else None)

    def left(_m: Any, _i: Any, out: Tensor) -> None:
        caught["out"] = out

    handles = [
        module.register_forward_pre_hook(entered, with_kwargs=True),
        vlm.hf.get_submodule(weights._path("o", 0, tower)).register_forward_hook(left),
    ]
    run = vlm.run(prompt, read=[Site("z", 0, tower), Site("v", 0, tower)])
    for handle in handles:
        handle.remove()
    z, v, group = run[Site("z", 0, tower)], run[Site("v", 0, tower)], shape.heads[tower] // shape.kv_heads[tower]
    whole = sum(z[:, :, head] @ weights.W_O(0, head, tower) for head in range(shape.heads[tower]))
    assert apart((whole + weights.b_O(0, tower)).flatten(0, 1), caught["out"].flatten(0, -2)) < 1e-13
    x = caught["x"].reshape(*v.shape[:2], -1)
    zeros = vlm.hf.get_submodule(weights._path("v", 0, tower)).bias
    for head in range(shape.heads[tower]):
        bias = 0 if zeros is None else zeros[-v.shape[2] * v.shape[3] :].unflatten(0, (v.shape[2], -1))[head // group]
        assert apart(x @ weights.W_V(0, head, tower) + bias, v[:, :, head // group]) < 1e-13


def test_with_one_query_and_key_at_one_place_qk_is_the_score() -> None:
    """Rotary embedding turns a query and a key at the same place alike, so the diagonal of the scores knows none."""
    vlm, prompt = asked("llava")
    weights, run = Weights(vlm), vlm.run(prompt, read=["text.0.resid_pre", "text.0.scores"])
    x = vlm.hf.model.language_model.layers[0].input_layernorm(run["text.0.resid_pre"])[0]
    for head in range(vlm.shape.heads["text"]):
        products = (x @ weights.W_Q(0, head) * (x @ weights.W_K(0, head))).sum(-1)
        own = run["text.0.scores"][0, head].diagonal() * vlm.shape.d_head["text"] ** 0.5
        assert apart(products, own) < eager_rounding(vlm)


def test_weights_are_views() -> None:
    vlm, _ = asked("llava")
    own = vlm.hf.model.language_model.layers[1].self_attn.o_proj.weight
    assert Weights(vlm).W_O(1, 2).untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda weights: weights.W_Q(0, 4),
            "the text tower has 4 heads a layer, counted from 0, so there is no head 4",
        ),
        (lambda weights: weights.W_O(7, 0), "the text tower has 3 layers, counted from 0, so there is no layer 7"),
        (lambda weights: weights.W_V(0, -1), "counted from 0, so there is no head -1"),
    ],
)
def test_a_head_that_is_not_there_is_named(ask: Any, said: str) -> None:
    weights = Weights(asked("llava")[0])
    with pytest.raises(ValueError, match=said):
        ask(weights)


def test_a_layer_without_heads_of_its_own_is_named() -> None:
    with pytest.raises(ValueError, match="layer 1 of the text tower attends to the image only"):
        Weights(asked("mllama")[0]).W_Q(1, 0)


@pytest.mark.parametrize("name", ["llava", "gemma3", "blip2-opt"])
def test_a_final_norm_is_taken_apart(name: str) -> None:
    """By asking it: its gain, its bias, whether it takes the mean away, and what it divides by."""
    vlm, _ = asked(name)
    own = vlm.hf.get_submodule(vlm.arch.norm)
    norm = circuits.final_norm(own, vlm.shape.d_model["text"], Weights(vlm).W_E)
    x = torch.randn(2, 5, vlm.shape.d_model["text"], dtype=torch.float64)
    assert norm.centring == (name == "blip2-opt")
    assert apart(norm(x) * norm.gain + norm.bias, own(x)) < eager_rounding(vlm)
