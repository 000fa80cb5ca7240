"""VIAR, "Vision-Informed Attention Rebalancing" (2026): everything the study does, under one name.

Every function gives the corrected quantity; with `convention="viar-2026"` it gives the published one.

`study` does all of it with one model, part by part (`PARTS`), and says what came out (`finding`).

The prompts of the results differ: `TEMPLATES` has them by name.

Below stands for each result of the study which function has it, what was published, and what was wrong with that.

* layer profile, U-shape: `layer_profile`, `u_shape`
    published: four numbers under one name: `density_share` of 50 pictures (0.17 to 0.21 in layers 8 to 16), `mass`
        (0.84 there), `density`, and mass over all rows (0.98).
    wrong: columns 0 to 575 hold the first position, a sink, and lack the last image tokens; of Mistral the first
        position alone was read; of Qwen2-VL a weight for each key was compared with a share.
* neglect zone: `find_zone`, `zone_layers`
    published: layers 8 to 16, written by hand: `ZONE`.
    wrong: no rule, and no test.
* heads of neglect: `neglect_heads`, `head_pairs`
    published: 126 below mu - sigma, 39 specialists, spread 0.037.
    wrong: the spread was taken over head numbers, after averaging over layers.
* language-prior collapse: `language_prior_collapse`
    published: cosines of updates 0.92, 0.82, 0.70, 0.66, and 0.92 in layer 31.
    wrong: the last layer's state was read behind the final norm.
* gradients by layer: `gradient_by_layer`
    published: five times less from layer 8 to 16, 0 in layer 31.
    wrong: the decay to expect was not taken off; the last layer's is 0 by construction.
* attention and being right: `depth_correlation`, `item_attention`
    published: r = -0.154 in layer 14, p = 0.0005.
    wrong: read with the opposite sign; 32 tests uncorrected; yes and no together, and within no there is nothing.
* the bias: `viar_edits`, `viar_bias`
    published: +2 on columns 0 to 575 in layers 8 to 16.
    wrong: the first position is biased too, and the last image tokens are not.
* adaptive bias: `layer_amounts`
    published: `ADAPTIVE_TABLE`, in the code of three digits (`ADAPTIVE_TABLE_CODE`); the paper divides by the zone's
        largest, the code by the mean of all layers.
    wrong: two formulas under one name; the table has the profile's columns.
* doses: `bias_doses`
    published: accuracy 0.82 at 0, 0.845 at 2, 0.515 at 5 (200 questions).
    wrong: no threshold beside it. Of the 9,000 questions the bias has 0.848 right at a yes-ratio of 0.404; a moved
        threshold has 0.853 at 0.399, and 0.866 at best.
* layers of the bias: `bias_layers`, `layer_sets`
    published: 0.845 in layers 8 to 16, 0.815 to 0.825 elsewhere.
    wrong: no random layers beside it; a difference of five questions.
* contrast: `vcd_generate`, `vcd_pope`, `contrast_logits`, `PixelDiffusion`
    published: VCD 0.79 on 500 questions.
    wrong: no cut of implausible tokens, and no picture after the first token, so it was not VCD.
* legacy form: `entropy_layers`, `legacy_edits`, `grey_divergence`, and `contrast_logits` without a cut
    published: factors of 2 to 5, less with depth, on weights in layers 2 to 23 where a ratio of entropies is from 1.5.
    wrong: the hooks were never registered. A factor is a bias of its logarithm. In the published table, of
        rows behind the picture, no layer of 2 to 23 has such a ratio (0.5 to 1.2); by all rows, as this code has it,
        even attention has 30.
* statistics: `mv.evaluate.stats`
    published: McNemar 1.207, p = 0.272, and more.
    wrong: 9,000 items of which 5,127 are different, on 500 pictures; pairs taken as independent.

`audit` computes both of what is found by layer, of one model and the same prompts, and says what survives.

>>> viar_edits(vlm, real, 2.0, layers=[2, 3])[0].label
'bias +2 attention to 36 keys'
"""

from mechvlm.experiments.bends import u_shape
from mechvlm.experiments.collapse import language_prior_collapse
from mechvlm.experiments.layer_profile import attention_blocks, layer_profile
from mechvlm.experiments.neglect import neglect_heads
from mechvlm.experiments.visual_gradient import gradient_by_layer
from mechvlm.experiments.zones import find_zone
from mechvlm.methods.audit import audit
from mechvlm.methods.bands import bias_layers, layer_sets
from mechvlm.methods.bias import head_pairs, layer_amounts, viar_bias, viar_edits, zone_layers
from mechvlm.methods.contrast import contrast_logits, vcd_generate
from mechvlm.methods.contrast_pope import vcd_pope
from mechvlm.methods.depth import depth_correlation, item_attention
from mechvlm.methods.dose import bias_doses
from mechvlm.methods.findings import audit_table
from mechvlm.methods.legacy import entropy_layers, entropy_ratios, grey_divergence, legacy_edits, legacy_factors
from mechvlm.methods.nulled import PixelDiffusion
from mechvlm.methods.parts import PARTS
from mechvlm.methods.published import ADAPTIVE_TABLE, ADAPTIVE_TABLE_CODE, NULL, TEMPLATE, TEMPLATES, ZONE
from mechvlm.methods.sentences import finding
from mechvlm.methods.study import Studied, study

__all__ = [
    "ADAPTIVE_TABLE",
    "ADAPTIVE_TABLE_CODE",
    "NULL",
    "PARTS",
    "PixelDiffusion",
    "TEMPLATE",
    "TEMPLATES",
    "ZONE",
    "Studied",
    "attention_blocks",
    "audit",
    "audit_table",
    "bias_doses",
    "bias_layers",
    "contrast_logits",
    "depth_correlation",
    "entropy_layers",
    "entropy_ratios",
    "find_zone",
    "finding",
    "gradient_by_layer",
    "grey_divergence",
    "head_pairs",
    "item_attention",
    "language_prior_collapse",
    "layer_amounts",
    "layer_profile",
    "layer_sets",
    "legacy_edits",
    "legacy_factors",
    "neglect_heads",
    "study",
    "u_shape",
    "vcd_generate",
    "vcd_pope",
    "viar_bias",
    "viar_edits",
    "zone_layers",
]
