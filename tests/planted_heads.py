"""A hand-built LLaVA with a head that looks at the position before and one that finds what followed a word last time.

Every weight is zero but these. Words have a direction each (from `WORD` on) and all positions one in common. In layer
0, head 0 turns its queries by one position against its keys, so that it looks at the position before, and copies the
word it finds there to directions from `BEFORE` on. In layer 1, head 1 looks for positions before which its own word
stands: the induction head of two layers.
"""

import math
from typing import Any

import planted
import torch

VOCABULARY = 12
CONSTANT, WORD, BEFORE, WIDTH, HEAD = 0, 2, 14, 40, 16
SLOW = (2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15)
"""The dimensions of a head that rotary embedding hardly turns within these texts."""


def build(attention: str = "sdpa") -> Any:
    """The hand-built model."""
    model = planted.empty(2, 2, 2, WIDTH, attention, head_dim=HEAD)
    with torch.no_grad():
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
    return vlm, planted.asked(vlm, 1.0, [1] * 6)
