"""Attention implementations beside SDPA and eager: flex, and a kernel in plain torch that is handed what flash is."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flex_attention as flex
from transformers.masking_utils import flash_attention_mask

import mechvlm as mv
from mechvlm import batch, laws
from mechvlm.references import apart

WITHOUT_GRADIENTS = [law for law in laws.LAWS if law is not laws.law_10_gradients]


def like_flash(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **more: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, None]:
    """Attention from what flash attention is handed: the padding of the keys, a window, and whether to look ahead."""
    query, key = q.shape[2], k.shape[2]
    here, there = torch.arange(key - query, key)[:, None], torch.arange(key)
    allowed = torch.ones(q.shape[0], 1, query, key, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        allowed &= there <= here
        allowed &= there > here - (sliding_window or key)
    if mask is not None:
        allowed &= mask[:, None, None].bool()
    allowed |= ~allowed.any(-1, keepdim=True)  # rows of padding, which nothing reads
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def like_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "mechvlm_stand_in"
    AttentionInterface.register(name, like_flash)
    AttentionMaskInterface.register(name, flash_attention_mask)
    monkeypatch.setattr(batch, "KERNELS", (*batch.KERNELS, name))
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def asked(name: str) -> tuple[mv.VLM, mv.Prompt]:
    vlm = zoo.build(name)
    return vlm, zoo.ask(vlm, tiny.picture(width=48, height=48))


@pytest.mark.parametrize(
    "name", [pytest.param("llava", marks=zoo.second_environment), "llava_next-sliding", "llava-siglip"]
)
def test_every_law_holds_on_what_flash_attention_is_handed(name: str, like_flash_kernel: str) -> None:
    vlm, prompt = asked(name)
    before = vlm.run(prompt).logits
    vlm.attention = like_flash_kernel
    assert apart(vlm.run(prompt).logits, before) < 1e-6
    for law in (law for law in laws.LAWS if law is not laws.law_12_elsewhere or name == "llava"):
        assert [finding for finding in law(vlm, prompt) if not finding.holds] == []


def uncompiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, training: bool = False, **more: Any) -> Any:  # noqa: ARG001
    return flex_attention(q, k, v, **more)


@pytest.mark.filterwarnings("ignore:(?s).*flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, of its own code
@zoo.second_environment
def test_every_law_without_gradients_holds_under_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled: PyTorch would compile the kernel anew for every shape, for minutes, and it is handed the same."""
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", uncompiled)
    vlm, prompt = asked("llava")
    vlm.attention = "flex_attention"
    for law in WITHOUT_GRADIENTS:
        assert [finding for finding in law(vlm, prompt) if not finding.holds] == []


def test_flex_attention_takes_no_gradients_on_a_cpu() -> None:
    vlm, prompt = asked("llava")
    vlm.attention = "flex_attention"
    with pytest.raises(ValueError, match="computes no gradients of flex_attention on a CPU; set vlm.attention"):
        vlm.run(prompt, grad_of=lambda logits: logits[:, 0])


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_flash_attention_is_refused_where_image_tokens_see_each_other(name: str) -> None:
    vlm, _ = asked(name)
    with pytest.raises(ValueError, match="flash_attention_2 takes no mask, and in this architecture"):
        vlm.attention = "flash_attention_2"
