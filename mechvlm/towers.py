"""What the towers of models are made of: one row of `TOWER_TYPES` a type of tower.

Rule this module guards: with `mechvlm.archs` these are the only Hugging Face attribute names in the package. Many
architectures share a type of tower, so a row of `ARCHS` says where its towers are, and a row here what is in them.

>>> TOWER_TYPES["llama"].layers, TOWER_TYPES["clip_vision_model"].embed
('layers', 'embeddings')
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechvlm.devices import held
from mechvlm.sites import CROSS_KINDS, SELF_KINDS


@dataclass(frozen=True)
class Block:
    """What the parts of one layer are called, as paths within it.

    Attributes:
        attention: the module that attends; None where a layer has no self-attention.
        cross: the module that attends to the image's features.
        mlp: the module of the MLP, or its last one.
        attn_out, mlp_out: the module whose output is added to the residual stream, where a norm or a projection stands
            behind the attention or the MLP.
        pre: the norm that reads the residual stream before attention; None where there is none.
        mid: the norm that reads the residual stream between attention and MLP; None where both read the same stream.
        attn_scale, mlp_scale: from a layer to what multiplies the two outputs on their way to the residual stream.
        interface: the call that every attention module makes with (module, q, k, v, mask), as nnsight names it; None
            where it is made once for every image or window, and q, k, v and z are taken around it.
        causal: whether a query sees only what stands before it, where the call does not say so.
        norms_after: whether the norms stand behind the sums, so that nothing is a residual sum.
    """

    attention: str | None = "self_attn"
    cross: str | None = None
    mlp: str = "mlp"
    attn_out: str | None = None
    mlp_out: str | None = None
    pre: str | None = "input_layernorm"
    mid: str | None = "post_attention_layernorm"
    attn_scale: Callable[[Any], Any] | None = None
    mlp_scale: Callable[[Any], Any] | None = None
    interface: str | None = "attention_interface_1"
    causal: bool = True
    norms_after: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The sites that such a layer has, in forward order."""
        own = SELF_KINDS if self.attention else ()
        across = CROSS_KINDS if self.cross else ()
        if self.norms_after:
            return ("resid_pre", *own, *across, "resid_post")
        middle = ("attn_out", "resid_mid", "mlp_out") if self.mid else ("attn_out", "mlp_out")
        return ("resid_pre", *own, *across, *middle, "resid_post")


@dataclass(frozen=True)
class Tower:
    """What a tower of one type is made of, as paths within it.

    Attributes:
        block: its layers' parts.
        layers: paths of its lists of layers.
        embed: the module that turns words, or squares of the picture, into the vectors that enter; None where no module
            gives them one vector a position.
        norm: its final norm; only a text tower's matters.
        crossing: the parts of layers that attend to the image's features, where they are others.
        crosses: from the tower's configuration to the layers that do.
        more: further lists of layers behind the first: the path, the configuration's word for their number, the parts.
        packed: whether all images stand in one sequence.
        flat: whether that sequence has no batch axis.
        grid: the module of `mechvlm.grids` for images that go through this tower, whatever the architecture.
    """

    block: Block
    layers: str = "layers"
    embed: str | None = "embed_tokens"
    norm: str = "norm"
    crossing: Block | None = None
    crosses: Callable[[Any], Sequence[int]] = lambda _: ()
    more: tuple[tuple[str, str, Block], ...] = ()
    packed: bool = False
    flat: bool = False
    grid: str | None = None


PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""What the attention modules of language models call their projections to queries, keys and values."""


def _tanh_of(gate: str) -> Callable[[Any], Any]:
    return lambda layer: vars_of(layer, gate).tanh()


def vars_of(layer: Any, name: str) -> Any:
    """A weight of a layer, through nnsight."""
    return held(layer._module, name)


def _mllama_mlp(layer: Any) -> Any:
    """A gate, and zero for the words that stand before every image."""
    sees = layer.inputs[1]["full_text_row_masked_out_mask"]
    gate = vars_of(layer, "cross_attn_mlp_gate").tanh()
    return gate if sees is None else gate * sees[:, 0].to(gate.device)  # it may not have come to the layer's yet


_PLAIN = Block()
_CLIP = Block(pre="layer_norm1", mid="layer_norm2", causal=False)
_GEMMA = Block(
    mid="pre_feedforward_layernorm", attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"
)
_QWEN_VISION = Block(attention="attn", pre="norm1", mid="norm2", interface=None, causal=False)
_BERT = Block(attention="attention.attention", pre=None, causal=False, norms_after=True)
_QFORMER = Tower(
    _BERT,
    "encoder.layer",
    None,
    crossing=replace(_BERT, cross="crossattention.attention"),
    crosses=lambda config: range(0, config.num_hidden_layers, config.cross_attention_frequency),
)

TOWER_TYPES: dict[str, Tower] = {
    # language models
    "llama": Tower(_PLAIN),
    "mistral": Tower(_PLAIN),
    "qwen2": Tower(_PLAIN),
    "qwen3": Tower(_PLAIN),
    "qwen2_vl_text": Tower(_PLAIN),
    "qwen2_5_vl_text": Tower(_PLAIN),
    "qwen3_vl_text": Tower(_PLAIN),
    "molmo2_text": Tower(_PLAIN),
    "gemma": Tower(_PLAIN),
    "gemma2": Tower(_GEMMA),
    "gemma3_text": Tower(_GEMMA),
    "glm4v_text": Tower(Block(attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")),
    "cohere2": Tower(Block(mid=None)),
    "opt": Tower(
        Block(mlp="fc2", pre="self_attn_layer_norm", mid="final_layer_norm"),
        "decoder.layers",
        "decoder.embed_tokens",
        "decoder.final_layer_norm",
    ),
    "mllama_text_model": Tower(
        _PLAIN,
        crossing=Block(
            attention=None,
            cross="cross_attn",
            attn_scale=_tanh_of("cross_attn_attn_gate"),
            mlp_scale=_mllama_mlp,
            causal=False,
        ),
        crosses=lambda config: config.cross_attention_layers,
    ),
    # vision towers
    "clip_vision_model": Tower(_CLIP, "encoder.layers", "embeddings"),
    "siglip_vision_model": Tower(_CLIP, "encoder.layers", "embeddings"),
    "idefics3_vision": Tower(_CLIP, "encoder.layers", "embeddings"),
    "smolvlm_vision": Tower(_CLIP, "encoder.layers", "embeddings"),
    "instructblip_vision_model": Tower(_CLIP, "encoder.layers", "embeddings"),
    "blip_2_vision_model": Tower(_CLIP, "encoder.layers", "embeddings"),
    "molmo2_vision": Tower(_CLIP, "layers", "patch_embedding"),
    "ovis2_vision": Tower(
        Block(attention="attention", mlp="ffn", pre="rms_norm1", mid="rms_norm2", causal=False),
        "transformer.encoder.layers",
        "transformer.embeddings",
    ),
    "internvl_vision": Tower(
        Block(
            attention="attention",
            pre="layernorm_before",
            mid="layernorm_after",
            attn_scale=lambda layer: vars_of(layer, "lambda_1"),
            mlp_scale=lambda layer: vars_of(layer, "lambda_2"),
            causal=False,
        ),
        "encoder.layer",
        "embeddings",
    ),
    "pixtral": Tower(
        Block(attention="attention", mlp="feed_forward", pre="attention_norm", mid="ffn_norm", causal=False),
        "transformer.layers",
        "ln_pre",
        packed=True,
        grid="pixtral",
    ),
    "qwen2_vl_vision": Tower(_QWEN_VISION, "blocks", "patch_embed", packed=True, flat=True),
    "qwen2_5_vl_vision": Tower(_QWEN_VISION, "blocks", "patch_embed", packed=True, flat=True),
    "qwen3_vl_vision": Tower(_QWEN_VISION, "blocks", "patch_embed", packed=True, flat=True),
    "glm4v_vision": Tower(_QWEN_VISION, "blocks", "patch_embed", packed=True, flat=True),
    "mllama_vision_model": Tower(
        Block(causal=False),
        "transformer.layers",
        None,
        more=(
            (
                "global_transformer.layers",
                "num_global_layers",
                Block(causal=False, attn_scale=_tanh_of("gate_attn"), mlp_scale=_tanh_of("gate_ffn")),
            ),
        ),
    ),
    # Q-Formers
    "instructblip_qformer": _QFORMER,
    "blip_2_qformer": _QFORMER,
}
"""Types of towers, and what they are made of."""
