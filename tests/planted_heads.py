"""A hand-built LLaVA with a head that looks at the position before and one that finds what followed a word last time.

Every weight is zero but these. Words have a direction each (from `WORD` on) and all positions one in common. In layer
0, head 0 turns its queries by one position against its keys, so that it looks at the position before, and copies the
word it finds there to directions from `BEFORE` on. In layer 1, head 1 looks for positions before which its own word
stands: the induction head of two layers.
"""

import math
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VOCABULARY, IMAGE = 12, 10
CONSTANT, WORD, BEFORE, WIDTH, HEAD = 0, 2, 14, 40, 16
SLOW = (2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15)
"""The dimensions of a head that rotary embedding hardly turns within these texts."""


def build(attention: str = "sdpa") -> Any:
    """The hand-built model."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        plant(model)
    return model


def plant(model: Any) -> None:
    """Set the few weights that are not zero."""
    language = model.model.language_model
    model.model.multi_modal_projector.linear_2.bias[CONSTANT] = 1.0
    words = torch.arange(VOCABULARY)
    language.embed_tokens.weight[:, CONSTANT] = 1.0
    language.embed_tokens.weight[words, WORD + words] = 0.1
    first, second = (layer.self_attn for layer in language.layers)
    # The fastest pair turns by one radian a position; a query turned back by one meets the key before it.
    first.q_proj.weight[0, CONSTANT], first.q_proj.weight[HEAD // 2, CONSTANT] = 6 * math.cos(1), -6 * math.sin(1)
    first.k_proj.weight[0, CONSTANT] = 6.0
    first.v_proj.weight[words, WORD + words] = 1.0
    first.o_proj.weight[BEFORE + words, words] = 1.0
    own = HEAD + torch.tensor(SLOW)
    second.q_proj.weight[own, WORD + words] = 20.0
    second.k_proj.weight[own, BEFORE + words] = 20.0


def asked(attention: str = "sdpa") -> tuple[Any, Any]:
    """The model and a prompt with a picture."""
    import mechvlm as mv

    vlm = mv.VLM(build(attention))
    ids = torch.tensor([[1, 1, *[IMAGE] * 16, 1, 1, 1, 1]])
    return vlm, vlm.prompt(encoding={"input_ids": ids, "pixel_values": torch.ones(1, 3, 8, 8)})
