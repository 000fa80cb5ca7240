"""A run as an `ActivationCache` of TransformerLens, so that what is written for one reads a vision-language model.

Rule this module guards: the numbers that the cache's methods give add up. Its model's `W_U` holds the gain of the final
norm, its `hook_embed` is the residual stream that enters the first layer (words, with image features in their places),
and where a norm stands behind attention, what each head adds is what that norm leaves of it.

>>> cache = run.to_activation_cache()  # doctest: +SKIP
>>> parts = cache.decompose_resid(apply_ln=False)  # doctest: +SKIP
>>> cache.logit_attrs(parts, "yes", "no")[:, 0, -1]  # doctest: +SKIP
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.run import Run
from mechvlm.shapes import Shape
from mechvlm.sites import CROSS_KINDS, MODEL_KINDS, Site
from mechvlm.weights import Weights

NAMES = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""TransformerLens's names of what a layer has; its `q` and `k` are before rotary embedding, and these behind it."""

WHOLE = {
    Site("embed"): "embed.hook_out",
    Site("embed", tower="vision"): "vision_encoder.hook_vision_embed",
    Site("image_features"): "vision_projector.hook_out",
    Site("logits"): "unembed.hook_out",
}
LAYERS = {"text": "blocks", "vision": "vision_encoder.encoder_layers"}
READ = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def cache_sites(vlm: Any) -> list[Site]:
    """What to read so that every method of the cache that has to do with the residual stream finds what it needs."""
    layers = enumerate(vlm.shape.kinds["text"])
    return [Site(kind, layer) for layer, kinds in layers for kind in READ if kind in kinds]


@dataclass(frozen=True)
class FinalNorm:
    """A final norm, taken apart: `norm(x) = centred(x) / scale(x) * gain + bias`.

    Attributes:
        module: the norm.
        gain, bias: found by asking it, since norms differ in how they keep them.
        centring: whether the mean is taken away first, as LayerNorm does and RMSNorm does not.
    """

    module: Any
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centring: bool

    def centred(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A residual stream less its mean, where the norm takes it away."""
        return x - x.mean(-1, keepdim=True) if self.centring else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What the norm divides a residual stream by."""
        with torch.no_grad():
            out = self.module(x).to(x.device) - self.bias
        found = (self.centred(x) * self.gain).norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True)
        return torch.where(found.isfinite() & (found > 0), found, torch.ones_like(found))

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm without its gain and bias, which `W_U` and `b_U` of the cache's model hold."""
        return self.centred(x) / self.scale(x)


def final_norm(module: Any, width: int, like: Tensor, large: float = 1e4) -> FinalNorm:
    """Ask a norm what it does, by three vectors: zeros, a large constant, and a large one whose signs alternate."""
    zeros = torch.zeros(1, 1, width, device=like.device, dtype=like.dtype)
    signs = torch.ones_like(zeros)
    signs[..., 1::2] = -1
    with torch.no_grad():
        bias, flat, alternating = (module(x)[0, 0].to(like.device) for x in (zeros, zeros + large, large * signs))
    centring = bool((flat - bias).abs().max() < 1e-3 * (alternating - bias).abs().max())
    return FinalNorm(module, (alternating - bias) * signs[0, 0], bias, centring)


@dataclass(frozen=True)
class Config:
    """What an `ActivationCache` asks of a model's configuration."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    normalization_type: str
    device: torch.device
    attn_only: bool = False
    final_rms: bool = False


@dataclass(frozen=True)
class Attention:
    """What an `ActivationCache` asks of a layer's attention."""

    weights: Weights
    layer: int
    normed: bool

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """What heads' `z` are multiplied with."""
        if self.normed:
            raise ValueError(
                f"a norm or a gate stands behind the heads of text layer {self.layer}, so what each adds takes two "
                f"readings; run with read=[..., 'text.{self.layer}.z', 'text.{self.layer}.attn_out']."
            )
        return self.weights.heads_out(self.layer).to(self.weights.vlm.device)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """The bias of the output."""
        return self.weights.b_O(self.layer).to(self.weights.vlm.device)


@dataclass(frozen=True)
class Layer:
    """What an `ActivationCache` asks of a layer."""

    attn: Attention


@dataclass(frozen=True)
class Model:
    """What an `ActivationCache` asks of a model.

    Attributes:
        W_U, b_U: the unembedding, with the final norm's gain and bias in it.
        ln_final: the final norm without them.
    """

    vlm: Any
    cfg: Config
    blocks: Sequence[Layer]
    W_U: Float[Tensor, "d_model vocab"]
    b_U: Float[Tensor, " vocab"]
    ln_final: FinalNorm

    def to_single_token(self, word: str) -> int:
        """The id of a word that is one token as it is written.

        Raises:
            ValueError: where it is none, or several.
        """
        if self.vlm.processor is None:
            raise ValueError(f"without a processor {word!r} has no token; give a token's id.")
        tokenizer = self.vlm.processor.tokenizer
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"{word!r} is not one token of this model; give a token's id.")
        return ids[0]

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*tokens d_model"]:
        """The columns of the unembedding that tokens have, with the final norm's gain in them."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[ids] if not isinstance(ids, Tensor) or ids.numel() > 1 else self.W_U.T[int(ids)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the attention's biases up to a layer, which no head has."""
        if include_mlp_biases:
            raise ValueError("mechvlm reads no neurons, so pass expand_neurons=False.")
        before = range(layer + (1 if mlp_input else 0))
        return sum((self.blocks[index].attn.b_O for index in before), torch.zeros_like(self.W_U[:, 0]))


class Entries(dict):
    """The tensors of a cache, by TransformerLens's names; one that is missing is asked for in a sentence."""

    def __init__(self, tensors: dict[str, Tensor], kinds: Sequence[Sequence[str]]) -> None:
        super().__init__(tensors)
        there = [Site(kind, layer) for layer, those in enumerate(kinds) for kind in those]
        self.sites = {name_of(site): site for site in there}
        self.sites["hook_embed"] = Site("resid_pre", 0)
        self.sites["ln_final.hook_scale"] = Site("resid_post", len(kinds) - 1)

    def __missing__(self, name: str) -> Tensor:
        if name in self.sites:
            raise ValueError(f"{name} is not in this cache; run with read=[..., {str(self.sites[name])!r}].")
        rotary = " (q and k are kept behind rotary embedding, as hook_rot_q and hook_rot_k)"
        why = rotary if name.endswith(("attn.hook_q", "attn.hook_k")) else ""
        raise ValueError(f"a cache of this model has no {name}, since no site stands for it{why}.")


def to_activation_cache(run: Run, vlm: Any) -> Any:
    """A run as a `transformer_lens.ActivationCache`.

    `cache["pattern", 3]`, `cache.decompose_resid()`, `cache.accumulated_resid()`, `cache.logit_attrs(...)` and
    `cache.stack_head_results()` then work as on a run of TransformerLens, with what was read; `cache_sites` lists what
    they need. Attributions are of the logits before any cap, and without those of the biases, which `cache.model.b_U`
    holds.

    Raises:
        ValueError: for a reading that is not the whole tensor.
        ModuleNotFoundError: where TransformerLens is not installed.
    """
    from transformer_lens import ActivationCache

    tensors: dict[str, Tensor] = {}
    for site in run.values:
        x = run[site]
        if not isinstance(x, Tensor) or not is_whole(x, site, vlm.shape):
            raise ValueError(f"{site} was read by a function, and a cache takes whole tensors; read it without one.")
        tensors[name_of(site)] = x.to(vlm.device)  # where layers are on several, a cache adds them up on one
    model, read = model_of(vlm), set(run.values)
    last = model.cfg.n_layers - 1
    if Site("resid_pre", 0) in read:
        tensors["hook_embed"] = tensors[name_of(Site("resid_pre", 0))]
    if Site("resid_post", last) in read:
        tensors["ln_final.hook_scale"] = model.ln_final.scale(tensors[name_of(Site("resid_post", last))])
    for layer, block in enumerate(model.blocks):
        z, out = (Site(kind, layer) for kind in ("z", "attn_out"))
        if block.attn.normed and {z, out} <= read:
            tensors[f"blocks.{layer}.attn.hook_result"] = shares(run[z], run[out], Weights(vlm), layer)
    cache = ActivationCache(Entries(tensors, vlm.shape.kinds["text"]), model)
    cache.has_embed = True  # so that a decomposition without it is an error, and not a sum that lacks it
    return cache


def is_whole(x: Tensor, site: Site, shape: Shape) -> bool:
    """Whether a reading has the shape of the whole tensor of its site."""
    if site.kind == "pixels":
        return True  # whose axes are the processor's
    if x.ndim != len(site.axes):
        return False
    sizes = dict(zip(site.axes, x.shape, strict=True))
    known = {
        "head": shape.heads[site.tower],
        "kv_head": shape.kv_heads[site.tower],
        "d_head": shape.d_head[site.tower],
        "vocab": sizes.get("vocab"),
        "d_model": shape.d_model["text" if site.kind in MODEL_KINDS and site.kind != "embed" else site.tower],
    }
    alike = sizes.get("query") == sizes.get("key") or site.kind in CROSS_KINDS
    return alike and all(sizes[axis] == known[axis] for axis in known.keys() & sizes.keys())


def name_of(site: Site) -> str:
    """TransformerLens's name of a site; its own where that has none."""
    if site in WHOLE:
        return WHOLE[site]
    if site.tower in LAYERS and site.kind in NAMES:
        return f"{LAYERS[site.tower]}.{site.layer}.{NAMES[site.kind]}"
    return str(site)


def shares(z: Tensor, out: Tensor, weights: Weights, layer: int) -> Float[Tensor, "batch pos head d_model"]:
    """What each head adds to the residual stream behind a norm or a gate, which scales all heads alike."""
    parts = torch.einsum("bphd,hdm->bphm", z, weights.heads_out(layer).to(z))
    whole = parts.sum(2) + weights.b_O(layer).to(z)
    factor = torch.where(whole == 0, torch.zeros_like(out), out / whole)
    return (parts * factor.unsqueeze(2)).to(weights.vlm.device)


def model_of(vlm: Any) -> Model:
    """What an `ActivationCache` asks of a model, of a VLM."""
    shape, weights = vlm.shape, Weights(vlm)
    norm = final_norm(vlm.hf.get_submodule(vlm.arch.norm), shape.d_model["text"], weights.W_E)
    cfg = Config(
        n_layers=shape.layers["text"],
        n_heads=shape.heads["text"],
        n_key_value_heads=shape.kv_heads["text"],
        d_model=shape.d_model["text"],
        d_head=shape.d_head["text"],
        d_vocab=weights.W_U.shape[1],
        normalization_type="LNPre" if norm.centring else "RMSPre",
        device=vlm.device,
    )
    blocks = [Layer(Attention(weights, layer, stands_behind(vlm, layer))) for layer in range(cfg.n_layers)]
    W_U, b_U = (x.to(vlm.device) for x in (weights.W_U, weights.b_U))
    folded, bias = W_U * norm.gain[:, None], b_U + norm.bias @ W_U
    return Model(vlm, cfg, blocks, folded, bias, norm)


def stands_behind(vlm: Any, layer: int) -> bool:
    """Whether a norm or a factor stands between a layer's attention and the residual stream."""
    block = vlm.arch.stacks["text"].blocks[layer]
    return block.attn_out is not None or block.attn_scale is not None
