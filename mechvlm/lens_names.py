"""Which hook of TransformerLens is which site, and which are not what their names say.

Rule this module guards: a name is given only to a site that the hook tells truly; law 11 (`mechvlm.laws_bridge`) proves
both that those are right and that the others are not. Everything here is about a `TransformerBridge`; nothing imports
TransformerLens before it is asked for.
"""

from typing import Any

from mechvlm.sites import Site

TEXT = "blocks"
VISION = ("vision_encoder.encoder_layers", "vision_encoder.blocks")
"""Where TransformerLens keeps the layers of a vision tower: CLIP's and SigLIP's, Qwen's."""

WHOLE = {
    Site("embed"): "hook_embed",
    Site("embed", tower="vision"): "vision_encoder.hook_vision_embed",
    Site("image_features"): "vision_projector.hook_out",
    Site("logits"): "unembed.hook_out",
}
LAYER = {
    "resid_pre": ("hook_resid_pre",),
    "v": ("attn.hook_v",),
    "z": ("attn.hook_z",),
    "attn_out": ("hook_attn_out",),
    "resid_mid": ("hook_resid_mid", "ln2.hook_in", "norm2.hook_in"),
    "mlp_out": ("hook_mlp_out",),
    "resid_post": ("hook_resid_post",),
}
"""The names of hooks that say the same of every tower, in order of preference."""

ROTATED = {"q": ("attn.hook_rot_q",), "k": ("attn.hook_rot_k",)}
UNROTATED = {"q": ("attn.hook_q",), "k": ("attn.hook_k",)}
WEIGHTS = {"scores": ("attn.hook_attn_scores",), "pattern": ("attn.hook_pattern",)}

MISSING = "TransformerLens has no such hook"
BEFORE_ROTARY = "TransformerLens shows q and k before rotary embedding only"
NATIVE = (
    "TransformerLens leaves this attention to transformers, so its hook_attn_scores holds the pattern and an edit of "
    "hook_attn_scores or hook_pattern is discarded"
)
TILES = "TransformerLens shows what the projector makes of each tile or window, before tokens take their order"
REORDERED = ("llava_next", "llava_onevision", "qwen2_5_vl")
"""Model types that reorder or repack the projector's output."""


def layers_of(model: Any) -> dict[str, str]:
    """Per tower, the name of TransformerLens's list of its layers."""
    there = model.hook_dict
    return {"text": TEXT, "vision": next((one for one in VISION if f"{one}.0.hook_in" in there), VISION[0])}


def names_of(model: Any, vlm: Any) -> tuple[dict[Site, str], dict[Site, str]]:
    """The hook of each site that TransformerLens tells truly, and the reason for each that it does not."""
    there = set(model.hook_dict)
    names = {site: name for site, name in WHOLE.items() if name in there}
    untold = {site: MISSING for site in WHOLE if site not in names}
    if vlm.hf.config.model_type in REORDERED:
        names.pop(Site("image_features"))
        untold[Site("image_features")] = TILES
    for tower, prefix in layers_of(model).items():
        told, reasons = hooks_of(model, tower, f"{prefix}.0.attn.hook_pattern" in there)
        for layer in range(vlm.shape.layers[tower]):
            untold |= {Site(kind, layer, tower): reason for kind, reason in reasons.items()}
            for kind, choices in told.items():
                full = [f"{prefix}.{layer}.{name}" for name in choices]
                found = next((name for name in full if name in there), None)
                if found is None:
                    untold[Site(kind, layer, tower)] = MISSING
                else:
                    names[Site(kind, layer, tower)] = found
    return names, untold


def hooks_of(model: Any, tower: str, patterns: bool) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The hooks of each kind of site of a tower, and the reasons where there is none to trust."""
    if tower == "text" and rebuilds(model):
        return {**LAYER, **ROTATED, **WEIGHTS}, {}
    reasons = dict.fromkeys(WEIGHTS, NATIVE if patterns else MISSING)
    if tower == "text":
        return LAYER, reasons | dict.fromkeys(ROTATED, BEFORE_ROTARY)
    return {**LAYER, **UNROTATED}, reasons  # the vision towers whose q and k TransformerLens shows rotate nothing


def rebuilds(model: Any) -> bool:
    """Whether TransformerLens computes the text tower's attention itself, so that all its hooks are what they say."""
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge,
    )

    return isinstance(model.blocks[0].attn, PositionEmbeddingsAttentionBridge)


def recorded(vlm: Any) -> frozenset[Site]:
    """The ends of the vision layers whose outputs, as transformers records them, are the image features."""
    taken, layers = vlm.hf.config.to_dict().get("vision_feature_layer"), vlm.shape.layers["vision"]
    numbers = [] if taken is None else [taken] if isinstance(taken, int) else taken
    ends = [number - 1 if number >= 0 else layers + number for number in numbers]
    return frozenset(Site(kind, end, "vision") for end in ends if end >= 0 for kind in ("resid_mid", "resid_post"))
