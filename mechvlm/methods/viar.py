"""VIAR, "Vision-Informed Attention Rebalancing" (2026): everything the study does, under one name.

>>> viar_edits(vlm, real, 2.0, layers=[2, 3])[0].label
'bias +2 attention to 36 keys'
"""

from mechvlm.methods.bands import bias_layers, layer_sets
from mechvlm.methods.bias import layer_amounts, viar_bias, viar_edits
from mechvlm.methods.contrast import contrast_logits, vcd_generate, vcd_pope
from mechvlm.methods.depth import depth_correlation, item_attention
from mechvlm.methods.dose import bias_doses
from mechvlm.methods.published import ADAPTIVE_TABLE, NULL, TEMPLATE, ZONE

__all__ = [
    "ADAPTIVE_TABLE",
    "NULL",
    "TEMPLATE",
    "ZONE",
    "bias_doses",
    "bias_layers",
    "contrast_logits",
    "depth_correlation",
    "item_attention",
    "layer_amounts",
    "layer_sets",
    "vcd_generate",
    "vcd_pope",
    "viar_bias",
    "viar_edits",
]
