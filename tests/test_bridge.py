"""Law 11: TransformerLens, a program that shares no code with this one, reads and edits the same.

Skipped where TransformerLens is not installed; `.ci/run` has an environment that holds it.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from zoo import gemma, glm, idefics, llava, mistral, qwen

import mechvlm as mv
from mechvlm import bridge
from mechvlm.laws_bridge import law_11_transformer_lens, probe
from mechvlm.lens_names import layers_of
from mechvlm.references import apart, differs, eager_rounding
from mechvlm.sites import Site

pytestmark = [
    pytest.mark.transformer_lens,
    pytest.mark.skipif(not bridge.installed(), reason="TransformerLens is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what TransformerLens imports
]

ZOO = {**llava.VARIANTS, **gemma.VARIANTS, **idefics.VARIANTS, **mistral.VARIANTS, **glm.VARIANTS, **qwen.VARIANTS}
BOTH = (
    "llava",
    "llava-siglip",
    "llava_next-vicuna",
    "llava_next-mistral",
    "llava_next-sliding",
    "llava_onevision",
    "gemma3",
    "idefics3",
    "mistral3",
    "glm4v",
    "qwen2_5_vl",
    "qwen3_vl",
)
"""What both know; text attention of the last three is left to transformers by TransformerLens."""

NATIVE = BOTH[-3:]
QUESTION = "what is in the picture ?"


def asked(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> tuple[Any, Any]:
    """A tiny model of the zoo, and a question about a picture that is wider than high."""
    variant, picture = ZOO[name], tiny.picture(width=40, height=28)
    if variant.needs_torchvision and variant.encoding is not None:
        vlm = mv.VLM(variant.model(attention, dtype), None, name=name)
        return vlm, vlm.prompt(encoding=variant.encoding([picture], QUESTION))
    vlm = mv.VLM(variant.model(attention, dtype), variant.processor(), name=name)
    return vlm, vlm.prompt(picture, QUESTION)


@pytest.mark.parametrize(("dtype", "attention"), [(torch.float32, "sdpa"), (torch.float64, "eager")])
@pytest.mark.parametrize("name", BOTH)
def test_every_site_is_the_same_in_both_engines(name: str, dtype: torch.dtype, attention: str) -> None:
    found = list(law_11_transformer_lens(*asked(name, dtype, attention)))
    assert len(found) > 20
    assert [finding for finding in found if not finding.holds] == []


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_in_double_precision_and_the_same_attention_only_the_last_bits_differ(name: str) -> None:
    """Both then round attention weights alike, and nothing else is rounded coarsely."""
    vlm, prompt = asked(name, torch.float64, "eager")
    lens = bridge.bridged(vlm)
    sites = [site for site in lens.names if site.kind in ("resid_post", "z", "attn_out", "mlp_out", "v")]
    own, theirs = vlm.run(prompt, read=sites), lens.run(prompt, read=sites)
    assert max(apart(own[site], theirs[site]) for site in sites) < 1e-14
    edits = [probe(Site(kind, 1)) for kind in ("resid_pre", "z", "mlp_out")]
    assert apart(vlm.run(prompt, edits=edits).logits, lens.run(prompt, edits=edits).logits) < 1e-14


def test_a_wrong_site_breaks_the_law() -> None:
    """The law can fail: a hook that is another layer's is found out, in reading and in editing."""
    vlm, prompt = asked("llava")
    lens = bridge.bridged(vlm)
    first, second = Site("mlp_out", 0), Site("mlp_out", 1)
    swapped = {**lens.names, first: lens.names[second], second: lens.names[first]}
    wrong = bridge.Bridge(lens.model, swapped, lens.untold, lens.lost, lens.dtype)
    broken = [finding.what for finding in law_11_transformer_lens(vlm, prompt, wrong) if not finding.holds]
    assert broken == ["reading mlp_out, text", "editing mlp_out, text"]


def test_the_vlm_is_left_as_it_is() -> None:
    """TransformerLens puts its own modules into the model it is given, and is given a copy."""
    vlm, prompt = asked("llava")
    sites = [Site("pattern", 1), Site("z", 0, "vision")]
    before, kinds = vlm.run(prompt, read=sites), [type(module) for module in vlm.hf.modules()]
    lens = bridge.bridged(vlm)
    lens.run(prompt, read=sites, edits=[probe(Site("pattern", 1))])
    after = vlm.run(prompt, read=sites)
    assert [type(module) for module in vlm.hf.modules()] == kinds
    assert vlm.attention == "sdpa"
    assert all(torch.equal(before[site], after[site]) for site in sites)


def test_nothing_is_ever_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it finds no processor TransformerLens runs pip for torchvision; not so while a bridge is made."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    ran: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *given, **_: ran.append(given))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not there
    cfg = SimpleNamespace(is_multimodal=True)
    with bridge.offline():
        helpers.load_modality_processor(SimpleNamespace(), cfg, str(tmp_path), False, None)
        assert ran == []
    helpers.load_modality_processor(SimpleNamespace(), cfg, str(tmp_path), False, None)
    assert "torchvision" in ran[0][0], "TransformerLens no longer does, so bridge.offline may go"


def test_edits_of_several_sites_act_together() -> None:
    vlm, prompt = asked("gemma3")
    lens = bridge.bridged(vlm)
    edits = [
        mv.ablate_heads(1, [0, 2]),
        mv.bias_attention(2, prompt.image, 1.5, way="recompute"),
        mv.scale_heads(0, [1], 2.0, tower="vision"),
        mv.steer("text.0.resid_mid", torch.ones(vlm.shape.d_model["text"]), 0.5),
        probe(Site("resid_post", 0)),
    ]
    assert apart(vlm.run(prompt, edits=edits).logits, lens.run(prompt, edits=edits).logits) < eager_rounding(vlm)


@pytest.mark.parametrize("name", NATIVE)
def test_transformer_lens_discards_edits_of_attention_it_leaves_to_transformers(name: str) -> None:
    vlm, prompt = asked(name)
    lens = bridge.bridged(vlm)
    plain, _ = lens.raw(prompt, {})
    for kind, hook in (("scores", "hook_attn_scores"), ("pattern", "hook_pattern")):
        edited, shown = lens.raw(prompt, {f"blocks.1.attn.{hook}": probe(Site(kind, 1)).fn})
        assert torch.equal(edited, plain)
        rows = shown[f"blocks.1.attn.{hook}"].sum(-1)
        assert apart(rows, torch.ones_like(rows)) < eager_rounding(vlm), "it is not the pattern that is shown"
        here = vlm.run(prompt, edits=[probe(Site(kind, 1))]).logits
        assert differs(here, vlm.run(prompt).logits) > 1e-3


def test_transformer_lens_drops_edits_of_the_vision_layer_whose_output_is_taken() -> None:
    vlm, prompt = asked("llava")
    lens = bridge.bridged(vlm)
    taken = Site("resid_post", vlm.shape.live["vision"] - 1, "vision")
    assert lens.lost == {taken, Site("resid_mid", taken.layer, "vision")}
    plain, _ = lens.raw(prompt, {})
    edited, _ = lens.raw(prompt, {lens.names[taken]: lambda x: x * 0})
    assert torch.equal(edited, plain)
    with pytest.raises(ValueError, match="would be dropped by TransformerLens"):
        lens.run(prompt, edits=[probe(taken)])


def test_transformer_lens_edits_resid_mid_for_the_mlp_only() -> None:
    """Its hook is the input of the norm before the MLP; the residual stream goes around it."""
    vlm, prompt = asked("llava")
    lens = bridge.bridged(vlm)
    names = [f"blocks.0.{hook}" for hook in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")]
    added = torch.linspace(-1, 1, vlm.shape.d_model["text"])  # not a factor, which the norm would take away again
    _, plain = lens.raw(prompt, {}, names)
    _, edited = lens.raw(prompt, {names[0]: lambda x: x + added}, names)
    change = edited[names[1]] - plain[names[1]]
    assert change.abs().max() > 0.1
    assert apart(edited[names[2]] - plain[names[2]], change) < 1e-5, "only what the MLP adds has changed"
    edit = [mv.steer("text.0.resid_mid", added)]
    here = vlm.run(prompt, read=["text.0.resid_post"], edits=edit)["text.0.resid_post"]
    assert apart(here - plain[names[2]], change + added) < 1e-5, "here the stream has changed too"


def test_transformer_lens_has_words_where_the_image_features_stand() -> None:
    """So its own decomposition of the residual stream does not add up at image positions."""
    vlm, prompt = asked("llava")
    lens = bridge.bridged(vlm)
    _, shown = lens.raw(prompt, {}, ["hook_embed", "blocks.0.hook_resid_pre"])
    differ = (shown["hook_embed"] - shown["blocks.0.hook_resid_pre"]).abs().amax(-1)[0]
    assert differ.nonzero()[:, 0].tolist() == prompt.image


def test_every_site_is_named_or_its_lack_is_explained() -> None:
    for name in BOTH:
        vlm, _ = asked(name)
        lens = bridge.bridged(vlm)
        for tower in layers_of(lens.model):
            for layer in range(vlm.shape.layers[tower]):
                for kind in ("resid_pre", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_out"):
                    assert (Site(kind, layer, tower) in lens.names) != (Site(kind, layer, tower) in lens.untold)


def test_errors_say_what_is_wrong() -> None:
    vlm, prompt = asked("llava")
    lens = bridge.bridged(vlm)
    with pytest.raises(ValueError, match="vision.0.pattern cannot be had from TransformerLens: TransformerLens leaves"):
        lens.run(prompt, read=["vision.0.pattern"])
    with pytest.raises(ValueError, match="edits a gradient; TransformerLens is asked for values only"):
        lens.run(prompt, edits=[mv.Edit("text.0.z", torch.clone, on="grad")])
    with pytest.raises(ValueError, match="text.1.z was not read in this run; pass read="):
        lens.run(prompt, read=["text.0.z"])["text.1.z"]
    assert "LlavaForConditionalGeneration; 64 sites, 6 untold" in repr(lens)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2_vl", "TransformerLens does not know Qwen2VLForConditionalGeneration"),
        ("llava-pixtral", "knows LLaVA with CLIP or SigLIP, and this one's vision tower is 'pixtral'"),
    ],
)
def test_a_model_that_transformer_lens_does_not_know_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bridge.bridged(asked(name)[0])


@pytest.mark.parametrize("name", BOTH)
def test_under_eager_attention_both_engines_read_the_same_bits(name: str) -> None:
    vlm, prompt = asked(name, attention="eager")
    lens = bridge.bridged(vlm)
    sites = [site for site in lens.names if site.kind != "image_features"]
    own, theirs = vlm.run(prompt, read=sites), lens.run(prompt, read=sites)
    assert [site for site in sites if differs(own[site].flatten(), theirs[site].flatten())] == []


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_its_names_are_taken_wherever_a_site_is(name: str) -> None:
    lens = bridge.bridged(asked(name)[0])
    assert all(Site.parse(hook) == site for site, hook in lens.names.items())
