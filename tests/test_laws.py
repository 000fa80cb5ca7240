"""The laws of docs/architecture.md over tiny random models: grouped queries or not, SDPA and eager, three types."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import zoo

import mechvlm as mv
from mechvlm import laws
from mechvlm.shapes import Parts

MODELS = [(2, "sdpa"), (2, "eager"), (4, "sdpa"), pytest.param(4, "eager", marks=zoo.second_environment)]
EXACT = (laws.law_1_reading, laws.law_2_writing_back, laws.law_3_residuals, laws.law_5_patching)
"""The laws that hold bit for bit, and so in bfloat16 too."""
AGAIN = [pytest.param(law, marks=zoo.second_environment if law is laws.law_12_elsewhere else ()) for law in laws.LAWS]
"""All laws, for models of which law 12 says the same as of those of `MODELS`."""


def broken(law: Any, vlm: Any) -> list[laws.Finding]:
    found = list(law(vlm, vlm.prompt(tiny.picture(), "is there a red dog in the image ?")))
    assert found, "a law that finds nothing has tested nothing"
    return [finding for finding in found if not finding.holds]


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("kv_heads", "attention"), MODELS)
def test_float32(law: Any, kv_heads: int, attention: str) -> None:
    assert broken(law, tiny.vlm(kv_heads, attention)) == []


@pytest.mark.parametrize("law", AGAIN, ids=lambda law: law.__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float64(law: Any, attention: str) -> None:
    """Where a difference is rounding, it shrinks with the type; a bug stays."""
    assert broken(law, tiny.vlm(2, attention, torch.float64)) == []


@pytest.mark.parametrize("law", AGAIN, ids=lambda law: law.__name__)
def test_features_of_several_layers(law: Any) -> None:
    """A projector that takes the states behind two layers of the vision tower; every layer of it matters then."""
    assert broken(law, tiny.vlm(feature_layer=[-3, -1])) == []


@pytest.mark.parametrize("law", EXACT, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("kv_heads", "attention"), MODELS)
def test_bfloat16(law: Any, kv_heads: int, attention: str) -> None:
    assert broken(law, tiny.vlm(kv_heads, attention, torch.bfloat16)) == []


@zoo.second_environment
@pytest.mark.parametrize(("kv_heads", "attention"), MODELS)
def test_elsewhere_in_bfloat16(kv_heads: int, attention: str) -> None:
    assert broken(laws.law_12_elsewhere, tiny.vlm(kv_heads, attention, torch.bfloat16)) == []


def test_what_differs_elsewhere_is_found() -> None:
    """Law 12 can fail: a function that counts its calls counts on its own side only."""
    vlm, calls = tiny.vlm(), []

    def counting(pattern: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return pattern / len(calls)

    vlm = vlm.with_edits([mv.Edit("text.1.pattern", counting)])
    assert "edits" in [finding.what for finding in broken(laws.law_12_elsewhere, vlm)]


def with_blocks(parts: Parts, tower: str, **changes: Any) -> Parts:
    """A model's parts, with something else said of every layer of one tower."""
    stack = parts.stacks[tower]
    blocks = tuple(replace(block, **changes) for block in stack.blocks)
    return replace(parts, stacks={**parts.stacks, tower: replace(stack, blocks=blocks)})


@pytest.mark.parametrize(
    ("wrong", "law", "found"),
    [
        (lambda arch: with_blocks(arch, "text", causal=False), laws.law_4_patterns, "eager attention, text"),
        (lambda arch: with_blocks(arch, "vision", causal=True), laws.law_4_patterns, "eager attention, vision"),
        (
            lambda arch: replace(arch, norm="model.language_model.layers.0.input_layernorm"),
            laws.law_7_lens,
            "the last layer's lens",
        ),
        (
            lambda arch: with_blocks(arch, "text", mlp="post_attention_layernorm"),
            laws.law_3_residuals,
            "residual sums, text",
        ),
    ],
)
def test_a_wrong_row_of_the_table_breaks_a_law(wrong: Any, law: Any, found: str) -> None:
    """The laws can fail: a row of the tables that says something false of the model is found out."""
    vlm = tiny.vlm()
    with torch.no_grad():
        vlm.hf.model.language_model.norm.weight.mul_(1.5)
    vlm.arch = wrong(vlm.arch)
    assert found in [finding.what for finding in broken(law, vlm)]


def test_check_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = tiny.vlm().check()
    assert set(table["law"]) == set(range(1, 14)) - {11}
    assert set(table["verdict"]) == {"holds"}
    assert "eager attention, vision" in capsys.readouterr().out


def test_an_edit_that_never_acts_is_an_error() -> None:
    """Law 14: the model stops at its first word, so the edit of later steps has nothing to do."""
    vlm = tiny.vlm(with_processor=False)
    prompt = vlm.prompt(encoding=tiny.encoding())
    first = vlm.generate(prompt, max_new_tokens=1, do_sample=False).tokens[0, 0].item()
    late = mv.Edit("text.1.mlp_out", lambda x: x * 2, when="decode", label="late")
    with pytest.raises(ValueError, match="late at text.1.mlp_out \\(decode only\\) never acted"):
        vlm.generate(prompt, [late], max_new_tokens=3, do_sample=False, eos_token_id=first)


def test_a_padded_batch_generates_as_its_rows_do() -> None:
    vlm = tiny.vlm(with_processor=False)
    prompts = [vlm.prompt(encoding=tiny.encoding(question=question, seed=question)) for question in (7, 4, 10)]
    edits = [mv.bias_attention(1, list(range(3, 19)), 2.0), mv.cut_attention(0, [1], heads=[2])]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = vlm.generate(prompts, edits, **settings).tokens
    alone = [vlm.generate(prompt, edits, **settings).tokens for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kept", ["text", "vision"])
def test_odds_for_chosen_queries_and_heads(kept: str) -> None:
    """Law 6 for some queries and heads only: theirs change by e to the bias, the others not at all."""
    vlm = tiny.vlm(with_processor=False)
    prompt, site = vlm.prompt(encoding=tiny.encoding()), mv.Site("pattern", 0, kept)
    keys, queries, heads = [4, 5, 6], [12, 15], [1, 3]
    before = vlm.run(prompt, read=[site])[site]
    edits = [mv.bias_attention(0, keys, 1.25, queries, heads, tower=kept)]
    after = vlm.run(prompt, read=[site], edits=edits)[site]

    def odds(pattern: torch.Tensor) -> torch.Tensor:
        inside = pattern[..., keys].sum(-1)
        return inside / (pattern.sum(-1) - inside)

    changed = torch.zeros(before.shape[:3], dtype=torch.bool)
    changed[:, torch.tensor(heads)[:, None], torch.tensor(queries)] = True
    ratio = odds(after) / odds(before)
    torch.testing.assert_close(ratio[changed], torch.full_like(ratio[changed], 1.25).exp(), rtol=1e-5, atol=0)
    assert torch.equal(after[~changed], before[~changed])
