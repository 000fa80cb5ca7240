"""VIAR, "Vision-Informed Attention Rebalancing" (2026): everything the study does, under one name.

>>> viar_edits(vlm, real, 2.0, layers=[2, 3])[0].label
'bias +2 attention to 36 keys'
"""

from mechvlm.methods.bias import layer_amounts, viar_bias, viar_edits
from mechvlm.methods.contrast import contrast_logits, vcd_generate
from mechvlm.methods.published import ADAPTIVE_TABLE, NULL, TEMPLATE, ZONE

__all__ = [
    "ADAPTIVE_TABLE",
    "NULL",
    "TEMPLATE",
    "ZONE",
    "contrast_logits",
    "layer_amounts",
    "vcd_generate",
    "viar_bias",
    "viar_edits",
]
