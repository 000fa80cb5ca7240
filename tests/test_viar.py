"""VIAR's intervention and what is asked about it: amounts by hand, odds in the model, and planted answers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jaxtyping import config
from zoo import ask, build

import mechvlm as mv
from mechvlm.methods.bias import layer_amounts, named_layers, viar_bias, viar_edits
from mechvlm.methods.published import ADAPTIVE_TABLE, ZONE


@cache
def vlm() -> mv.VLM:
    return tiny.vlm()


@cache
def large() -> mv.VLM:
    """As many layers as LLaVA-1.5-7B has."""
    return tiny.vlm(layers=32, width=8, heads=2, kv_heads=1)


@cache
def across() -> mv.VLM:
    """A model that sees the picture by cross-attention."""
    return build("mllama")


@cache
def real() -> mv.Prompt:
    return vlm().prompt(tiny.picture(), "is there a dog ?")


def log_odds(edits: list[mv.Edit], layer: int, keys: list[int], queries: list[int]) -> torch.Tensor:
    """The log odds that queries look at keys, over head and query."""
    site = mv.Site("pattern", layer)
    paid = vlm().run(real(), read=[site], edits=edits)[site][0].double()[:, queries][..., keys].sum(-1)
    return (paid / (1 - paid)).log()


# -- the bias --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [-1.5, 0.5, 2.0])
def test_an_amount_moves_the_odds_of_the_picture_by_its_exponential(amount: float) -> None:
    edits = viar_edits(vlm(), real(), amount, layers=[0])
    behind = real().question + real().last
    moved = log_odds(edits, 0, real().image, behind) - log_odds([], 0, real().image, behind)
    assert torch.allclose(moved, torch.full_like(moved, amount), atol=1e-4)


def test_the_bias_is_on_the_image_tokens_that_are_there() -> None:
    (edit,) = viar_edits(vlm(), real(), 2.0, layers=[1])
    assert edit.bias is not None and list(edit.bias.keys) == real().image
    assert real().encoding["input_ids"][0, list(edit.bias.keys)].unique().tolist() == [tiny.IMAGE]


def test_the_published_columns_hold_the_first_position_and_lack_the_last_image_tokens() -> None:
    (edit,) = viar_edits(vlm(), real(), 2.0, layers=[1], convention="viar-2026")
    assert edit.bias is not None
    before = real().image[0]
    keys = list(edit.bias.keys)
    assert keys == list(range(tiny.TOKENS)) and keys[0] in real().bos
    assert set(real().image) - set(keys) == set(real().image[-before:])


def test_the_published_bias_is_the_mask_of_the_published_code() -> None:
    """Against a model whose masks are changed by hooks: `mask[:, :, :, 0:N] += b` in some layers."""
    eager = tiny.vlm(attention="eager", dtype=torch.float64)
    prompt = eager.prompt(tiny.picture(), "is there a dog ?")

    def hook(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = given["attention_mask"].clone()
        mask[:, :, :, : tiny.TOKENS] += 2.0
        return args, {**given, "attention_mask": mask}

    with torch.no_grad():
        layers = [eager.hf.model.language_model.layers[at].self_attn for at in (1, 2)]
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        expected = eager.hf(**{n: x.double() if x.is_floating_point() else x for n, x in prompt.encoding.items()})
        [one.remove() for one in hooks]
    edits = viar_edits(eager, prompt, 2.0, layers=[1, 2], convention="viar-2026")
    assert torch.allclose(eager.run(prompt, edits=edits).logits, expected.logits[:, -1], atol=1e-9)


def test_the_published_layers_are_eight_to_sixteen() -> None:
    prompt = large().prompt(tiny.picture(), "is there a dog ?")
    edits = viar_edits(large(), prompt, convention="viar-2026")
    assert [edit.site.layer for edit in edits] == list(ZONE) == list(range(8, 17))
    assert {edit.bias.amount for edit in edits if edit.bias} == {2.0}


def test_when_is_handed_on() -> None:
    assert {edit.when for edit in viar_edits(vlm(), real(), layers=[0, 1], when="decode")} == {"decode"}
    prefill, decode, always = (
        vlm().generate(real(), viar_edits(vlm(), real(), 6.0, [0, 1, 2], when=when), 6, do_sample=False)
        for when in ("prompt", "decode", "always")
    )
    plain = vlm().generate(real(), max_new_tokens=6, do_sample=False)
    assert decode.tokens[0, 0] == plain.tokens[0, 0] and prefill.tokens[0, 0] == always.tokens[0, 0]


# -- adaptive amounts --------------------------------------------------------------------------------------------------


def test_the_adaptive_amounts_by_hand() -> None:
    model, v = vlm(), [0.2, 0.6, 0.5]
    # 1 - v is 0.8, 0.4, 0.5: its mean over all layers 17/30, its largest in layers 1 and 2 is 0.5.
    assert layer_amounts(model, 2.0, [1, 2], "code", v) == pytest.approx({1: 0.8 * 30 / 17, 2: 1.0 * 30 / 17})
    assert layer_amounts(model, 2.0, [1, 2], "paper", v) == pytest.approx({1: 1.6, 2: 2.0})


def test_the_stored_table_sets_the_published_adaptive_amounts() -> None:
    code = layer_amounts(large(), 2.0, adaptive="code", convention="viar-2026")
    v = np.array(ADAPTIVE_TABLE)
    assert np.allclose(list(code.values()), 2 * (1 - v) / (1 - v).mean()) and list(code) == list(range(32))
    assert np.mean(list(code.values())) == pytest.approx(2.0)
    paper = layer_amounts(large(), 2.0, adaptive="paper", convention="viar-2026")
    assert list(paper) == list(ZONE) and max(paper.values()) == 2.0
    assert max(paper, key=lambda layer: paper[layer]) == 15  # the lowest of the table's zone


def test_an_amount_for_each_layer() -> None:
    edits = viar_edits(vlm(), real(), {0: 1.0, 2: -0.5})
    assert [(edit.site.layer, edit.bias.amount) for edit in edits if edit.bias] == [(0, 1.0), (2, -0.5)]


# -- heads -------------------------------------------------------------------------------------------------------------


def test_only_the_named_heads_are_biased() -> None:
    behind = real().question + real().last
    for heads in ([(0, 1), (0, 3)], {(0, 1): 2.0, (0, 3): 2.0}):
        edits = viar_edits(vlm(), real(), 2.0, heads=heads)
        moved = log_odds(edits, 0, real().image, behind) - log_odds([], 0, real().image, behind)
        assert torch.allclose(moved[[1, 3]], torch.full_like(moved[[1, 3]], 2.0), atol=1e-4)
        assert torch.count_nonzero(moved[[0, 2]]) == 0


def test_heads_have_amounts_of_their_own() -> None:
    behind = real().question + real().last
    edits = viar_edits(vlm(), real(), heads={(0, 1): 1.0, (0, 2): -1.0, (1, 0): 3.0}, layers=[0])
    moved = log_odds(edits, 0, real().image, behind) - log_odds([], 0, real().image, behind)
    assert torch.allclose(moved, torch.tensor([0.0, 1.0, -1.0, 0.0]).double()[:, None].expand_as(moved), atol=1e-4)


def test_a_function_of_the_prompt_finds_each_prompts_own_positions() -> None:
    make = viar_bias(vlm(), 2.0, layers=range(1, 3))
    other = vlm().prompt(tiny.picture(), "the <image> is red", raw=True)
    for prompt in (real(), other):
        assert [edit.bias.keys for edit in make(prompt) if edit.bias] == [tuple(prompt.image)] * 2
    assert real().image != other.image
    assert make.__name__ == "viar_edits(amount=2.0, layers=1-2)"


def test_layers_in_words() -> None:
    assert named_layers([9, 3, 4, 5, 0]) == "0, 3-5, 9"


REFUSED: list[tuple[str, Callable[[], object]]] = [
    (
        "convention='viar' is not known; leave it out for the corrected quantity, or give 'viar-2026' for the "
        "published one.",
        lambda: viar_edits(vlm(), real(), layers=[0], convention="viar"),
    ),
    (
        "no layers were given, and which of them look away from the picture differs from model to model; give layers=, "
        "for instance those that mv.find_zone finds, or convention='viar-2026' for the published 8 to 16.",
        lambda: viar_edits(vlm(), real()),
    ),
    (
        "adaptive='both' is not known; choose 'paper' or 'code', or None for one amount.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="both"),
    ),
    (
        "adaptive amounts need a profile; give profile=, the image's share in each of this model's 3 layers.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="code"),
    ),
    (
        "the profile has 32 layers, and this model 3; give one share for each layer.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="code", convention="viar-2026"),
    ),
    (
        "the profile holds 1.5, which is no share; each layer's is from 0 to below 1.",
        lambda: viar_edits(vlm(), real(), layers=[0], adaptive="code", profile=[0.1, 1.5, 0.2]),
    ),
    (
        "a profile sets adaptive amounts; say by which formula, adaptive='paper' or 'code'.",
        lambda: viar_edits(vlm(), real(), layers=[0], profile=[0.1, 0.5, 0.2]),
    ),
    (
        "layer 3 is not in this model, which has 3 layers.",
        lambda: viar_edits(vlm(), real(), layers=[3], adaptive="code", profile=[0.1, 0.5, 0.2]),
    ),
    (
        "amount= says of each layer by how much it is biased, so layers= and adaptive= would say it twice; leave them "
        "out.",
        lambda: viar_edits(vlm(), real(), {0: 1.0}, layers=[0]),
    ),
    (
        "none of heads=[(1, 0)] is in layers 0; give heads of those.",
        lambda: viar_edits(vlm(), real(), layers=[0], heads=[(1, 0)]),
    ),
    (
        "heads holds (1, 0, 2), which is no pair of layer and head; write for instance (3, 0).",
        lambda: viar_edits(vlm(), real(), heads=[(1, 0, 2)]),  # type: ignore[arg-type]
    ),
    (
        "heads={(1, 0): 2.0} names no head to bias; write for instance {(3, 0): 2.0}.",
        lambda: viar_edits(vlm(), real(), layers=[0], heads={(1, 0): 2.0}),
    ),
    (
        "the prompt 'is there a dog ?' holds no image, so there is nothing to look at more.",
        lambda: viar_edits(vlm(), vlm().prompt(None, "is there a dog ?"), layers=[0]),
    ),
    (
        "this model sees the picture by cross-attention, in layers 1, 3, where all keys are the picture's, so a bias "
        "on them changes nothing; scale what those layers add instead, by mv.scale_heads(..., cross=True).",
        lambda: viar_edits(across(), ask(across(), tiny.picture()), layers=[0]),
    ),
]


@pytest.mark.parametrize(("message", "wrong"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_is_refused(message: str, wrong: Callable[[], object]) -> None:
    """Without the test run's type checks, as users meet them."""
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises((ValueError, TypeError)) as refused:
            wrong()
    finally:
        config.update("jaxtyping_disable", False)
    assert str(refused.value) == message
