"""Where each architecture keeps its parts: one row of `ARCHS` per model type.

Rule this module guards: these are the only Hugging Face attribute names in the package. A row says what is true of the
installed library and differs from the defaults; the laws (`mechvlm.laws`) prove it right. Nothing is guessed: a model
type without a row is refused by name.

>>> ARCHS["llava"].text.layers
'model.language_model.layers'
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stack:
    """One tower: where its layers are, and what their parts are called within a layer.

    Attributes:
        layers: path of the list of layers.
        embed: path of the module that turns words, or squares of the picture, into vectors.
        mid_norm: the norm that reads the residual stream between attention and MLP.
        interface: the call that every attention module makes with (module, q, k, v, mask), as nnsight names it.
        causal: whether a query sees only what stands before it.
    """

    layers: str
    embed: str
    mid_norm: str
    attention: str = "self_attn"
    mlp: str = "mlp"
    interface: str = "attention_interface_1"
    causal: bool = True


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        text: the language model's tower.
        vision: the vision tower.
        image_features: path of the module whose output takes the image placeholders' places.
        norm: path of the final norm of the language model.
        unembed: path of the module that makes logits.
        template: the prompt its authors document, for processors that hold no chat template; `{text}` is the question.
        image: how one image is written in a prompt.
    """

    text: Stack
    vision: Stack
    image_features: str
    norm: str
    unembed: str
    template: str
    image: str = "<image>"


ARCHS: dict[str, Arch] = {
    "llava": Arch(
        text=Stack(
            layers="model.language_model.layers",
            embed="model.language_model.embed_tokens",
            mid_norm="post_attention_layernorm",
        ),
        vision=Stack(
            layers="model.vision_tower.encoder.layers",
            embed="model.vision_tower.embeddings",
            mid_norm="layer_norm2",
            causal=False,
        ),
        image_features="model.multi_modal_projector",
        norm="model.language_model.norm",
        unembed="lm_head",
        template="USER: <image>\n{text} ASSISTANT:",
    ),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of one loaded model, read from its configuration.

    Attributes:
        layers, heads, kv_heads, d_head, d_model: per tower.
        live: per tower, how many layers can still reach the answer. LLaVA takes its image features before the last
            layer of its vision tower, which therefore changes nothing.
        image_token: the id that stands for an image token in `input_ids`.
        grid: rows and columns of the image tokens of one image.
        tokens_per_image: how many positions one image takes.
        picture: height and width, in pixels, of the picture the vision tower sees.
        vocabulary: number of words.
        longest: number of positions the model was built for.
    """

    layers: dict[str, int]
    heads: dict[str, int]
    kv_heads: dict[str, int]
    d_head: dict[str, int]
    d_model: dict[str, int]
    live: dict[str, int]
    image_token: int
    grid: tuple[int, int]
    tokens_per_image: int
    picture: tuple[int, int]
    vocabulary: int
    longest: int


def arch_of(config: Any) -> Arch:
    """The row of a model's configuration.

    Raises:
        ValueError: for a model type that has none.
    """
    if config.model_type not in ARCHS:
        raise ValueError(
            f"mechvlm does not know {config.model_type!r} models yet; it knows {', '.join(sorted(ARCHS))}. Adding one "
            "is a row in mechvlm/archs.py."
        )
    return ARCHS[config.model_type]


def kernels_of(config: Any) -> dict[str, str]:
    """The attention implementation of each tower."""
    return {"text": config.get_text_config()._attn_implementation, "vision": config.vision_config._attn_implementation}


def set_kernels(hf_model: Any, kernels: dict[str, str]) -> None:
    """Set the attention implementation of each tower."""
    hf_model.set_attn_implementation({"text_config": kernels["text"], "vision_config": kernels["vision"]})


def check_config(config: Any) -> None:
    """Refuse settings of a LLaVA model that mechvlm does not read right, or that no model could have.

    Raises:
        ValueError: with what is wrong and what is read.
    """
    text, vision = config.get_text_config(), config.vision_config
    if config.vision_feature_select_strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; it must be 'default' "
            "(without the class token) or 'full'."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer is {config.vision_feature_layer!r}; mechvlm reads models that take one layer's "
            "features."
        )
    if not -vision.num_hidden_layers <= config.vision_feature_layer <= vision.num_hidden_layers:
        raise ValueError(
            f"vision_feature_layer is {config.vision_feature_layer}, and the vision tower has "
            f"{vision.num_hidden_layers} layers; the configuration does not fit."
        )
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"this llava model has a {vision.model_type!r} vision tower; mechvlm knows llava with 'clip_vision_model'."
        )
    if text.model_type != "llama":
        raise ValueError(f"this llava model decodes with {text.model_type!r}; mechvlm knows llava with 'llama'.")
    if not 0 < vision.patch_size <= vision.image_size:
        raise ValueError(
            f"patch_size is {vision.patch_size} and image_size {vision.image_size}; the configuration does not fit."
        )


def shape_of(config: Any) -> Shape:
    """The sizes of a LLaVA model, from its configuration.

    Raises:
        ValueError: for settings of the architecture that mechvlm does not read right yet.
    """
    check_config(config)
    text, vision = config.get_text_config(), config.vision_config
    side = vision.image_size // vision.patch_size
    layers = {"text": text.num_hidden_layers, "vision": vision.num_hidden_layers}
    taken = config.vision_feature_layer
    class_token = 1 if config.vision_feature_select_strategy == "full" else 0
    return Shape(
        layers=layers,
        heads={"text": text.num_attention_heads, "vision": vision.num_attention_heads},
        kv_heads={"text": text.num_key_value_heads, "vision": vision.num_attention_heads},
        d_head={"text": text.head_dim, "vision": vision.hidden_size // vision.num_attention_heads},
        d_model={"text": text.hidden_size, "vision": vision.hidden_size},
        live={"text": layers["text"], "vision": taken if taken >= 0 else layers["vision"] + 1 + taken},
        image_token=config.image_token_id,
        grid=(side, side),
        tokens_per_image=side * side + class_token,
        picture=(vision.image_size, vision.image_size),
        vocabulary=text.vocab_size,
        longest=text.max_position_embeddings,
    )
