"""Where each architecture keeps its parts: one row of `ARCHS` per model type.

Rule this module guards: with `mechvlm.towers` these are the only Hugging Face attribute names in the package. A row
says where a model's towers are; what their layers are made of is a row of `TOWER_TYPES`, by the tower's own type, since
many models share them. The laws (`mechvlm.laws`) prove both right. Nothing is guessed: a type without a row is refused
by name.

>>> ARCHS["llava"].text, ARCHS["qwen3_vl"].grid
('model.language_model', 'patches')
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any


def _taken(config: Any) -> Sequence[int]:
    settings = config.to_dict()
    # VipLLaVA's were several, to 5.22.
    taken = settings.get("vision_feature_layers", settings.get("vision_feature_layer"))
    return () if taken is None else (taken,) if isinstance(taken, int) else tuple(taken)


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        text, vision, qformer: paths of its towers.
        example: a checkpoint of it on the hub.
        unembed: path of the module that makes logits.
        image_features: path of the module, or of the call (as nnsight names it), that makes what takes the image
            placeholders' places.
        pixels: path of the module whose first input `pixel_values` are, as they are; empty for the model itself, which
            some do not call to generate.
        template: the prompt its authors document, for processors that hold no chat template; `{text}` is the question,
            `{image}` one image.
        image: how one image is written there, where `{mark}` is the image token.
        mark: what stands for an image in a raw prompt; None for the processor's image token, empty where the processor
            puts images before the text by itself.
        grid: the module of `mechvlm.grids` that knows how its processor lays images out.
        inputs: what an encoding may hold beside input_ids, attention_mask and pixel_values.
        positions: how a padded batch is told its positions: "ids" counts from 0, "ids from 1", or "own" where the model
            works them out from the attention mask.
        shares: whether rows of a batch can share one computation of the image features.
        ahead: which words see what stands behind them: "" none, "image" those of an image each other, "prompt" all of
            the prompt.
        deepstack: path of the modules whose outputs are added to the image tokens behind the first text layers.
        keeps: whether its forward pass takes `logits_to_keep`.
        words_first: whether the words are embedded before the vision tower runs.
        caps_logits: the release of transformers from which on the configuration's `final_logit_softcapping` is applied;
            empty where it never is.
        taken: from the configuration to the states of the vision tower that the projector sees: 0 the embedding, 1 what
            leaves the first layer; empty for what leaves the last one.
    """

    text: str
    vision: str
    example: str = ""
    unembed: str = "lm_head"
    image_features: str = "model.source.self_get_image_features_0"
    pixels: str = ""
    template: str = "{image}{text}"
    image: str = "{mark}"
    mark: str | None = None
    grid: str = "square"
    inputs: tuple[str, ...] = ()
    positions: str = "ids"
    qformer: str | None = None
    shares: bool = True
    ahead: str = ""
    deepstack: str | None = None
    keeps: bool = True
    words_first: bool = True
    caps_logits: str = ""
    taken: Callable[[Any], Sequence[int]] = _taken


_LLAVA = Arch("model.language_model", "model.vision_tower", template="USER: {image}{text} ASSISTANT:", image="{mark}\n")
_QWEN = Arch(
    "model.language_model",
    "model.visual",
    template="<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n",
    image="<|vision_start|>{mark}<|vision_end|>",
    grid="patches",
    inputs=("image_grid_thw", "mm_token_type_ids"),
    positions="own",
    shares=False,
)
_BLIP = Arch(
    "language_model.model",
    "vision_model",
    unembed="language_model.lm_head",
    qformer="qformer",
    image_features="language_projection",
    pixels="vision_model",
    template="{text}",
    mark="",
    grid="queries",
    keeps=False,
    words_first=False,
)
_IDEFICS = Arch(
    "model.text_model",
    "model.vision_model",
    grid="tiled",
    inputs=("pixel_attention_mask",),
    template="User: {image}{text}\nAssistant:",
)

ARCHS: dict[str, Arch] = {
    "llava": replace(
        _LLAVA, example="llava-hf/llava-1.5-7b-hf", inputs=("image_sizes",)
    ),  # which only a Pixtral tower needs
    "llava_next": replace(_LLAVA, example="llava-hf/llava-v1.6-mistral-7b-hf", grid="anyres", inputs=("image_sizes",)),
    "llava_onevision": replace(
        _LLAVA,
        example="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        grid="anyres",
        inputs=("image_sizes", "batch_num_images"),
    ),
    "vipllava": replace(_LLAVA, example="llava-hf/vip-llava-7b-hf"),
    "instructblip": replace(
        _BLIP, example="Salesforce/instructblip-vicuna-7b", inputs=("qformer_input_ids", "qformer_attention_mask")
    ),
    "blip-2": replace(_BLIP, example="Salesforce/blip2-opt-2.7b"),
    "qwen2_vl": replace(_QWEN, example="Qwen/Qwen2-VL-7B-Instruct"),
    "qwen2_5_vl": replace(_QWEN, example="Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3_vl": replace(_QWEN, example="Qwen/Qwen3-VL-8B-Instruct", deepstack="model.visual.deepstack_merger_list"),
    "glm4v": replace(_QWEN, example="zai-org/GLM-4.1V-9B-Thinking", image="<|begin_of_image|>{mark}<|end_of_image|>"),
    "internvl": replace(_LLAVA, example="OpenGVLab/InternVL3-8B-hf", grid="internvl"),
    "idefics3": replace(_IDEFICS, example="HuggingFaceM4/Idefics3-8B-Llama3"),
    "smolvlm": replace(_IDEFICS, example="HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "paligemma": Arch(
        "model.language_model",
        "model.vision_tower",
        example="google/paligemma-3b-pt-224",
        template="{image}{text}\n",
        inputs=("token_type_ids",),
        positions="ids from 1",
        ahead="prompt",
        caps_logits="5.23",
    ),
    "gemma3": Arch(
        "model.language_model",
        "model.vision_tower",
        example="google/gemma-3-4b-it",
        template="<start_of_turn>user\n{image}{text}<end_of_turn>\n<start_of_turn>model\n",
        mark="<start_of_image>",
        inputs=("token_type_ids",),
        ahead="image",
    ),
    "mistral3": replace(
        _LLAVA,
        example="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        template="[INST]{text}{image}[/INST]",
        image="{mark}",
        grid="pixtral",
        inputs=("image_sizes",),
    ),
    "aya_vision": replace(_LLAVA, example="CohereForAI/aya-vision-8b", grid="tiled"),
    "molmo2": replace(
        _LLAVA,
        example="allenai/Molmo2-8B",
        grid="molmo",
        image="{mark}",
        inputs=("image_grids", "image_token_pooling", "image_num_crops", "mm_token_type_ids"),
        shares=False,
        ahead="image",
        taken=lambda config: [n + 1 if n >= 0 else n for n in config.adapter_config.vision_feature_layer],
    ),
    "ovis2": replace(_LLAVA, example="thisisiron/Ovis2-2B-hf", grid="ovis"),
    "mllama": replace(
        _LLAVA,
        example="meta-llama/Llama-3.2-11B-Vision-Instruct",
        vision="model.vision_model",
        image_features="model.multi_modal_projector",
        image="{mark}",
        words_first=False,
        grid="mllama",
        inputs=("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"),
        shares=False,
    ),
    "deepseek_vl": replace(
        _LLAVA,
        example="deepseek-community/deepseek-vl-1.3b-chat",
        vision="model.vision_model",
        grid="deepseek",
        image="{mark}",
        template="User: {image}{text}\n\nAssistant:",
    ),
}
"""The architectures that mechvlm knows, by the `model_type` of their configurations."""
