"""Types of models that transformers calls image-text-to-text and mechvlm does not read, each with the reason.

Rule this module guards: every type of transformers' table is in `mechvlm.archs.ARCHS` or here, so that nobody is told
less than why. Data only; `mechvlm.shapes.check_known` makes the sentence.

>>> REFUSED["florence2"].split(",")[0]
'they are encoder-decoders'
"""

ENCODER_DECODER = (
    "they are encoder-decoders, whose question and answer stand in different towers, and mechvlm reads one decoder"
)
LINEAR_ATTENTION = (
    "some of their layers mix positions by linear attention, a recurrent state, which has no pattern of queries by keys"
)
CONVOLUTION = "some of their layers mix positions by a short convolution, which has no pattern of queries by keys"
INDEXED_ATTENTION = (
    "an indexer first picks the keys that their attention sees, so that queries and keys alone do not say the pattern"
)
LATENT_ATTENTION = (
    "their attention makes keys and values of different widths from one latent vector, and mechvlm has no "
    "sites for these yet"
)
PICTURE_AS_WORDS = (
    "the picture becomes words of a codebook before the language model, so that there is no image feature to read"
)
MAKES_PICTURES = "they also make pictures, with a second head and a codebook, and mechvlm has no sites for these yet"
NO_VISION_TOWER = "they have no vision tower: patches of the picture go straight into the language model"
NO_IMAGE_TOKEN = (
    "their image features stand before the words or where a mask says, and mechvlm places images by their "
    "tokens in the text"
)
CROSS_ATTENTION_TEXT = (
    "their words look at the picture by cross-attention of another form than Mllama's, which mechvlm has no sites for"
)
RESAMPLER = (
    "queries of another kind than a Q-Former's stand between vision tower and text, and no map from them to "
    "places is proved"
)
STREAMS = (
    "their layers carry several residual streams, or add a third part to one, so that the residual laws do not hold"
)
DIFFUSION = "they write blocks of words by diffusion, not one word after another"
NOT_VISION_LANGUAGE = "they are not models of pictures and words: they read proteins, or move a robot"
VIDEO_OR_SOUND = "they are made for video or for sound as well, whose tokens mechvlm does not place"
FOREIGN_TOWER = (
    "their vision tower is no plain transformer of patches (it is convolutional, timm's or SAM's), and "
    "mechvlm has no sites for it"
)
MIXTURE_OF_EXPERTS = "their MLPs are mixtures of experts, of which no row in mechvlm/archs.py is proved yet"
NO_ROW = "nothing known stands in the way, but no row in mechvlm/archs.py is written and proved yet"
WORDS_ONLY = "their configuration has no vision_config, so there is no vision tower to read beside the words"

REFUSED: dict[str, str] = {
    "aria": RESAMPLER,
    "blip": CROSS_ATTENTION_TEXT,
    "chameleon": PICTURE_AS_WORDS,
    "cohere2_vision": NO_ROW,
    "cohere_compass": NO_ROW,
    "cosmos3_edge": NO_ROW,
    "cosmos3_omni": VIDEO_OR_SOUND,
    "deepseek_ocr2": RESAMPLER,
    "deepseek_vl_hybrid": FOREIGN_TOWER,
    "diffusion_gemma": DIFFUSION,
    "dots3_note": INDEXED_ATTENTION,
    "emu3": PICTURE_AS_WORDS,
    "ernie4_5_vl_moe": MIXTURE_OF_EXPERTS,
    "evolla": NOT_VISION_LANGUAGE,
    "exaone4_5": NO_ROW,
    "fast_vlm": FOREIGN_TOWER,
    "florence2": ENCODER_DECODER,
    "fuyu": NO_VISION_TOWER,
    "gemma3n": STREAMS,
    "gemma4": STREAMS,
    "gemma4_unified": NO_VISION_TOWER,
    "git": NO_IMAGE_TOKEN,
    "glm46v": NO_ROW,
    "glm4v_moe": MIXTURE_OF_EXPERTS,
    "glm5_next": LINEAR_ATTENTION,
    "glm_ocr": NO_ROW,
    "glmga": NO_ROW,
    "got_ocr2": FOREIGN_TOWER,
    "granite4_vision": RESAMPLER,
    "granite_docling": NO_ROW,
    "hunyuan_vl": NO_ROW,
    "hyperclovax_vision_v2": VIDEO_OR_SOUND,
    "idefics": CROSS_ATTENTION_TEXT,
    "idefics2": RESAMPLER,
    "inkling2": CONVOLUTION,
    "inkling_mm_model": CONVOLUTION,
    "instructblipvideo": VIDEO_OR_SOUND,
    "janus": MAKES_PICTURES,
    "kimi_k25": LATENT_ATTENTION,
    "kosmos-2": NO_IMAGE_TOKEN,
    "kosmos-2.5": NO_IMAGE_TOKEN,
    "lfm2_vl": CONVOLUTION,
    "lfm3_vl": CONVOLUTION,
    "lighton_ocr": NO_ROW,
    "llama4": MIXTURE_OF_EXPERTS,
    "llava_next_video": VIDEO_OR_SOUND,
    "minicpm_ocr": LINEAR_ATTENTION,
    "minicpmv4_6": LINEAR_ATTENTION,
    "minicpmv4_7": LINEAR_ATTENTION,
    "minimax_m3_vl": INDEXED_ATTENTION,
    "mistral4": LATENT_ATTENTION,
    "mistral_large4": INDEXED_ATTENTION,
    "muse_glimmer": NO_ROW,
    "muse_spark": VIDEO_OR_SOUND,
    "nemotron_h_omni": LINEAR_ATTENTION,
    "paddleocr_vl": NO_ROW,
    "perception_lm": FOREIGN_TOWER,
    "pi0": NOT_VISION_LANGUAGE,
    "pix2struct": ENCODER_DECODER,
    "pp_chart2table": FOREIGN_TOWER,
    "pp_formulanet": ENCODER_DECODER,
    "qianfan_ocr": NO_ROW,
    "qwen2_5_omni_thinker": VIDEO_OR_SOUND,
    "qwen3_5": LINEAR_ATTENTION,
    "qwen3_5_moe": LINEAR_ATTENTION,
    "qwen3_omni_moe_thinker": VIDEO_OR_SOUND,
    "qwen3_vl_moe": MIXTURE_OF_EXPERTS,
    "qwen4_exp": LINEAR_ATTENTION,
    "shieldgemma2": NO_ROW,
    "step3p7": MIXTURE_OF_EXPERTS,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "unlimited_ocr": FOREIGN_TOWER,
    "video_llama_3": VIDEO_OR_SOUND,
    "video_llava": VIDEO_OR_SOUND,
    "vision-encoder-decoder": ENCODER_DECODER,
}
"""Why, by the `model_type` of their configurations: a clause in the plural, to stand within a sentence."""
