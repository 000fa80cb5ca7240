"""A hand-built LLaVA in which one head of one layer carries the image's answer to the last position.

Every weight is zero but these. The vision tower writes each square's brightness into its token; the projector hands
it on in one direction of the residual stream and marks image tokens in another; in layer `layer`, head `head`, the
last position (alone marked, by its word) looks at the marked image tokens and copies their brightness to a direction
that the unembedding reads as yes (bright) or no (dark). So the answer is in the image tokens up to that layer and in
the last position after it, and every other head adds exactly nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

YES, NO, LAST, IMAGE = 5, 6, 9, 10
BRIGHT, MARK, CALL, SAID, CONSTANT = 2, 3, 1, 4, 6
"""Directions of the residual stream: brightness, image mark, the last word's mark, the answer, and one for all."""


def empty(
    heads: int = 4, kv_heads: int = 2, layers: int = 3, width: int = 32, attention: str = "sdpa", **more: Any
) -> Any:
    """A LLaVA that sees and says nothing: all its weights are zero, but for those of norms."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=12,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        **more,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def build(layer: int, head: int, kv_heads: int = 2, layers: int = 3, heads: int = 4, attention: str = "sdpa") -> Any:
    """The hand-built model."""
    model = empty(heads, kv_heads, layers, attention=attention)
    with torch.no_grad():
        plant(model, layer, head)
    return model


def seen_and_said(model: Any) -> None:
    """Brightness into the image tokens, marks into these and into all, and the answer out of the last position."""
    parts = model.model
    patches = parts.vision_tower.embeddings.patch_embedding.weight
    patches[0], patches[1] = 1 / patches[0].numel(), -1 / patches[1].numel()
    parts.multi_modal_projector.linear_1.weight[0, 0] = 1.0
    parts.multi_modal_projector.linear_1.weight[1, 0] = -1.0
    parts.multi_modal_projector.linear_2.weight[BRIGHT, 0] = 1.0
    parts.multi_modal_projector.linear_2.weight[BRIGHT, 1] = -1.0
    parts.multi_modal_projector.linear_2.bias[MARK] = 1.0
    parts.language_model.embed_tokens.weight[:, CONSTANT] = 1.0
    model.lm_head.weight[YES, SAID], model.lm_head.weight[NO, SAID] = 3.0, -3.0


def plant(model: Any, layer: int, head: int) -> None:
    """Set the few weights that are not zero."""
    seen_and_said(model)
    language = model.model.language_model
    language.embed_tokens.weight[LAST, CALL] = 1.0
    attention = language.layers[layer].self_attn
    width, group = attention.head_dim, attention.num_key_value_groups
    # The slowest rotary pair does not turn within this text, so that the score depends on the marks alone.
    query, key = head * width + width - 1, (head // group) * width + width - 1
    attention.q_proj.weight[query, CALL] = 12.0
    attention.k_proj.weight[key, MARK] = 12.0
    attention.v_proj.weight[(head // group) * width, BRIGHT] = 1.0
    attention.o_proj.weight[SAID, head * width] = 2.0


def asked(vlm: Any, value: float, words: Sequence[int] = (1, 2, 3, 4, 7, LAST)) -> Any:
    """A prompt of a picture of one brightness, which stands behind the first two of some words."""
    ids = torch.tensor([[*words[:2], *[IMAGE] * 16, *words[2:]]])
    return vlm.prompt(encoding={"input_ids": ids, "pixel_values": torch.full((1, 3, 8, 8), value)})


def planted(
    layer: int = 1, head: int = 2, kv_heads: int = 2, attention: str = "sdpa"
) -> tuple[Any, Any, Any, int, int]:
    """The model, a prompt about a bright picture, the same about a dark one, and where the answer passes."""
    import mechvlm as mv

    vlm = mv.VLM(build(layer, head, kv_heads, attention=attention))
    return vlm, asked(vlm, 1.0), asked(vlm, -1.0), layer, head
