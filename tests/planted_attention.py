"""Hand-built models in which a gradient says next to nothing of a patch that turns the answer over.

Both are `planted.build` with a few weights more, and with norms taken away where what follows is to be linear:

* `saturated`: one word is marked more strongly than the picture. Where it stands, its key takes all of the planted
  head's attention; where another word stands there, none. Either way the softmax is saturated, its gradient nothing.
* `cancelled`: the MLP of the last layer takes away what the planted head says, as long as that is yes. So the way
  through the MLP cancels the direct way to first order, and a change to no is passed over.
"""

from typing import Any

import planted
import torch

import mechvlm as mv

OTHER, MARKED, PLACE = 8, 11, 18
"""A word that does not ask, one with the mark, and where it stands: behind the image."""


def ended(layer: int, head: int) -> Any:
    """The planted model without its last norm, so that all behind the planted head is linear."""
    made = planted.build(layer, head)
    made.model.language_model.norm = torch.nn.Identity()
    return made


def saturated(layer: int = 1, head: int = 2) -> tuple[mv.VLM, mv.Prompt, mv.Prompt, mv.Prompt]:
    """The model, a prompt that asks, one that does not, and one in which the marked word stands behind the image."""
    made = ended(layer, head)
    with torch.no_grad():
        made.model.language_model.embed_tokens.weight[MARKED, planted.MARK] = 5.0
    vlm = mv.VLM(made)
    others = [planted.asked(vlm, 1.0, words) for words in ((1, 2, 3, 4, 7, OTHER), (1, 2, MARKED, 4, 7, planted.LAST))]
    return vlm, planted.asked(vlm, 1.0), *others


def cancelled(layer: int = 1, head: int = 2) -> tuple[mv.VLM, mv.Prompt, mv.Prompt]:
    """The model, a prompt about a dark picture and one about a bright one."""
    made = ended(layer, head)
    last = made.model.language_model.layers[-1]
    last.post_attention_layernorm = torch.nn.Identity()
    with torch.no_grad():
        # silu(20 x) / 20 is x where x is large, and nothing where it is as far below zero.
        last.mlp.gate_proj.weight[0, planted.SAID] = 20.0
        last.mlp.up_proj.weight[0, planted.CONSTANT] = 1.0
        last.mlp.down_proj.weight[planted.SAID, 0] = -1 / 20
    vlm = mv.VLM(made)
    return vlm, planted.asked(vlm, -1.0), planted.asked(vlm, 1.0)
