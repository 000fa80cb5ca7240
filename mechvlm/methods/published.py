"""What VIAR published as fixed numbers and words: its zone, its prompt, its null image, and its adaptive table.

Rule this module guards: these are facts about one study of one model, used where `convention="viar-2026"` asks for them
and nowhere else.

>>> len(ADAPTIVE_TABLE), ZONE[0], ZONE[-1]
(32, 8, 16)
"""

from mechvlm import images

ZONE = tuple(range(8, 17))
"""The layers of LLaVA-1.5-7B that were called the visual neglect zone; written by hand, found by no rule."""

TEMPLATE = "USER: <image>\n{question}\nAnswer with yes or no.\nASSISTANT:"
"""The whole prompt of the published runs: a raw one, `vlm.prompt(image, text, raw=True)`."""

NULL = images.grey
"""The picture that the published contrast is against: grey, 128 of 255."""

ADAPTIVE_TABLE = (
    *(0.1970, 0.0542, 0.2019, 0.3790, 0.2706, 0.2307, 0.2664, 0.2364),
    *(0.2075, 0.1813, 0.1825, 0.2101, 0.1894, 0.1743, 0.1912, 0.1731),
    *(0.1866, 0.2594, 0.2441, 0.2773, 0.3141, 0.4308, 0.3543, 0.3723),
    *(0.3259, 0.4952, 0.3032, 0.3213, 0.3330, 0.3099, 0.2849, 0.1409),
)
"""v of each of the 32 layers of LLaVA-1.5-7B, by which the adaptive bias is set: `density_share` of the text's rows.

From `attention_analysis_summary.json`, `vis_attn_frac_mean` of 50 pictures. The image's columns there are 0 to 575,
which hold the words before the picture, the first position's sink among them, and lack the last image tokens.
"""
