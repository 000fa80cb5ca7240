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
"""The whole prompt of the published answers to POPE: a raw one, `vlm.prompt(image, text, raw=True)`."""

_BARE = "USER: <image>\n{question}\nASSISTANT:"

TEMPLATES = {
    **dict.fromkeys(
        ("pope", "doses", "layers", "contrast", "calibration", "threshold", "decomposed", "heads"), TEMPLATE
    ),
    **dict.fromkeys(("profile", "collapse", "correlation", "gradient"), _BARE),
    "mistral": "[INST] <image>\n{question} [/INST]",
}
"""The whole prompt of each published result on LLaVA, by its name; "mistral" is LLaVA-1.6's profile.

The attention of 50 pictures (and with it `ADAPTIVE_TABLE`), the collapse, the correlation with its answers, and the
gradients were asked for without the sentence "Answer with yes or no.", the answers of the tables with it.
Qwen2-VL was asked the question alone, in its own chat template, and InstructBLIP "{question} Answer with yes or no.".
"""

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

ADAPTIVE_TABLE_CODE = (
    *(0.197, 0.054, 0.202, 0.379, 0.271, 0.231, 0.266, 0.236),
    *(0.208, 0.181, 0.183, 0.210, 0.189, 0.174, 0.191, 0.173),
    *(0.187, 0.259, 0.244, 0.277, 0.314, 0.431, 0.354, 0.372),
    *(0.326, 0.495, 0.303, 0.321, 0.333, 0.310, 0.285, 0.141),
)
"""The same in three digits, as `eval_viar.py` has it: what the published adaptive runs used (`adaptive="code"`)."""
