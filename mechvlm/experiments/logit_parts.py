"""What each part of a language model adds to the logits of a few words, worked out where the model runs.

Behind the last layer there is a norm and a matrix. With the norm's scale as it was, both are linear, so that what a
part adds to the residual stream of the answering position adds so much to a word's logit. Where a norm or a gate stands
behind a layer's attention, that is held as it was too.

Rule this module guards: a head's part and the parts of the keys that it looks at come of the same directions, so that
keys sum to their head.

>>> about = Words(((vlm.token_ids("yes")[0],), (vlm.token_ids("no")[0],)), (1.0, -1.0))
>>> about.joined(torch.tensor([[2.0, 0.5]])).item()
1.5
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.circuits import FinalNorm, final_norm
from mechvlm.devices import held, matrix_of, runs_on
from mechvlm.experiments.sight import cross_layers
from mechvlm.lazy_attention import Attention
from mechvlm.prompt import Prompt
from mechvlm.readings import lazy
from mechvlm.sites import Site
from mechvlm.unembedding import unembedded
from mechvlm.vlm import VLM
from mechvlm.walk import at
from mechvlm.writes import Writing, writing


@dataclass(frozen=True)
class Words:
    """Words whose logits are added up: each a list of token ids, its spellings, and how often it counts.

    Attributes:
        ids: for each word its spellings.
        signs: 1 for the answer, -1 for what it is compared with.
    """

    ids: tuple[tuple[int, ...], ...]
    signs: tuple[float, ...]

    @property
    def tokens(self) -> list[int]:
        """All spellings, word by word."""
        return [token for word in self.ids for token in word]

    def by_word(self, said: Float[Tensor, "batch token"]) -> list[Float[Tensor, "batch some"]]:
        """Each word's part of what there is of `tokens`."""
        return list(said.split([len(word) for word in self.ids], -1))

    def joined(self, said: Float[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
        """The logits of `tokens` as one number: a word's spellings by log-sum-exp, words added up."""
        words = zip(self.signs, self.by_word(said), strict=True)
        return torch.stack([sign * logits.logsumexp(-1) for sign, logits in words]).sum(0)

    def shares(self, said: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
        """How much each token's logit counts: its share among its word's spellings, times the word's sign."""
        words = zip(self.signs, self.by_word(said), strict=True)
        return torch.cat([sign * logits.softmax(-1) for sign, logits in words], -1)

    def spread(self, said: Float[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
        """What joining adds to the shares' mean of the logits: exactly their entropy, in nats; 0 for one spelling."""
        words = zip(self.signs, self.by_word(said), strict=True)
        return torch.stack([sign * torch.special.entr(x.softmax(-1)).sum(-1) for sign, x in words]).sum(0)


def value_of(words: Words, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """What is asked about, from the model's own logits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return words.joined(wide[:, words.tokens])


def read_for(vlm: VLM, prompt: Prompt, words: Words, keys: bool) -> tuple[dict[Any, Any], list[int]]:
    """What has to be read of a run, and which layers run in it.

    Args:
        keys: whether heads are to be split by the keys that they look at.
    """
    how, across = writing(vlm), cross_layers(vlm)
    layers = [layer for layer in range(len(how.kinds)) if prompt.images or layer not in across]
    read: dict[Any, Any] = {Site("resid_pre", 0): last, Site("resid_post", len(how.kinds) - 1): last}
    for layer in layers:
        read |= {Site(how.kinds[layer], layer): last, Site("mlp_out", layer): last}
        if layer in how.added and ends_in_image(prompt):
            read[Site("deepstack", layer)] = last_token
        if keys:
            site = Site("cross_pattern" if layer in across else "pattern", layer)
            read[site] = lazy(partial(by_key, vlm, how, layer, words.tokens))
    return read, layers


def ends_in_image(prompt: Prompt) -> bool:
    """Whether the position that answers is an image token.

    Example:
        >>> ends_in_image(real)
        False
    """
    return len(prompt) - 1 in prompt.image


def last(x: Tensor) -> Tensor:  # batch pos ...
    """What is at the position that answers, `batch ...`."""
    return x[:, -1].clone()


def last_token(x: Tensor) -> Tensor:  # ... token d_model
    """What belongs to the last image token, `1 d_model`."""
    return x.reshape(-1, x.shape[-1])[-1:].clone()


def wide(x: Tensor) -> Tensor:
    """Numbers in single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_at(reader: Any, module: Any) -> FinalNorm:
    """A norm of the language model, taken apart, where the model runs.

    Args:
        reader: the VLM, or what stands for it there.
        module: nnsight's, which a reading may call without being taken for the model's own call.
    """
    like = torch.zeros(1, dtype=type_of(module._module), device=runs_on(module._module))
    found = final_norm(module, reader.shape.d_model["text"], like)
    return FinalNorm(found.module, wide(found.gain), wide(found.bias), found.centring)


def type_of(norm: torch.nn.Module) -> torch.dtype:
    """In which type a norm is asked: half precision would round, but LayerNorm takes none but its weights'."""
    own = next(norm.parameters()).dtype
    return own if isinstance(norm, torch.nn.LayerNorm) else torch.promote_types(own, torch.float32)


def scale_of(norm: FinalNorm, x: Float[Tensor, "1 d_model"]) -> Float[Tensor, ""]:
    """What a norm divides a stream by."""
    with torch.no_grad():
        out = wide(norm.module(x.to(norm.gain.device, type_of(norm.module._module)))) - norm.bias
    found = (norm.centred(x.to(norm.gain)) * norm.gain).norm() / out.norm()
    return torch.where(found.isfinite() & (found > 0), found, torch.ones_like(found))


def through(norm: FinalNorm, directions: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """Directions behind a norm as directions before it, but for its scale."""
    return norm.centred(directions.to(norm.gain) * norm.gain)


def unembedding_rows(reader: Any, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the unembedding reads for tokens, `token d_model`, and its biases, `token`."""
    rows = matrix_at(reader, reader.arch.unembed, tokens)
    bias = bias_at(reader, reader.arch.unembed)
    return rows, torch.zeros_like(rows[:, 0]) if bias is None else bias[list(tokens)]


def matrix_at(reader: Any, path: str, rows: Sequence[int] | None = None) -> Float[Tensor, "out in"]:
    """The matrix of a linear module, or some of its rows."""
    found = matrix_of(reader.model._module, path).detach()
    return wide(found if rows is None else found[list(rows)])


def bias_at(reader: Any, path: str) -> Float[Tensor, " out"] | None:
    """Its bias, where it has one."""
    own = at(reader.model, path)._module.bias
    return None if own is None else wide(held(reader.model._module, f"{path}.bias").detach())


def towards(
    reader: Any, how: Writing, layer: int, tokens: Sequence[int]
) -> tuple[Float[Tensor, "head d_head token"], Float[Tensor, "token d_model"]]:
    """What each number of a head's `z` adds to tokens' logits, and what each number behind its matrix does.

    Both but for the scales of the norms that stand behind.
    """
    rows, _ = unembedding_rows(reader, tokens)
    directions = behind(reader, layer, through(norm_at(reader, at(reader.model, reader.arch.norm)), rows))
    matrix = matrix_at(reader, how.out[layer]).T.unflatten(0, (how.heads, -1))
    return torch.einsum("hdm,tm->hdt", matrix, directions.to(matrix)), directions


def behind(reader: Any, layer: int, directions: Tensor) -> Tensor:
    """Directions in the residual stream as directions in what a layer's attention puts out, but for its norm's scale.

    Where nothing stands between the two they are the same.
    """
    norm = norm_behind(reader, layer)
    if norm is not None:
        return through(norm, directions)
    block, (path, number) = reader.arch.text.blocks[layer], reader.arch.text.layers[layer]
    module = at(reader.model, path)[number]
    return directions * wide(block.attn_scale(module).detach()).to(directions) if block.attn_scale else directions


def by_key(
    reader: Any, how: Writing, layer: int, tokens: Sequence[int], attention: Attention
) -> Float[Tensor, "batch head key token"]:
    """What the last query takes from each key towards tokens' logits, by head, but for the scales of norms."""
    weights, _ = towards(reader, how, layer, tokens)
    values = wide(attention.v[..., : weights.shape[1]])
    by_group = weights.to(values).unflatten(0, (values.shape[1], -1))
    moved = torch.einsum("bnkd,ngdt->bngkt", values, by_group).flatten(1, 2)
    return wide(attention.rows([-1]))[:, :, 0, :, None] * moved


def parts_of(
    reader: Any, how: Writing, words: Words, layers: Sequence[int], read: Mapping[tuple, Tensor], _gradients: Any
) -> dict[str, Any]:
    """What each part added to what is asked about, in one run.

    Args:
        reader: the VLM, or what stands for it where the model runs.
        layers: those that ran.
        read: what `read_for` names.

    Returns:
        `enters` (1), `deepstack` (layer: number), `heads` (layer head), `mlps` (layer), `bias`, what attention's output
        biases add, `norm_bias`, `unembed_bias` and `spellings`, 1 each; `stream`, what the last residual stream makes
        in all; `logit`, what the model itself makes of it before any cap; `keys`, of each layer, `head key`.
    """
    final, first = (wide(read[kind, at_layer, "text"]) for kind, at_layer in ends(how))
    norm = norm_at(reader, at(reader.model, reader.arch.norm))
    said = wide(unembedded(reader.model, reader.arch, None, read[ends(how)[0] + ("text",)]))[:, words.tokens]
    rows, biases = unembedding_rows(reader, words.tokens)
    said, shares = said.to(rows), words.shares(said).to(rows)[0]
    scale = scale_of(norm, final).to(rows)
    direction = (shares / scale) @ through(norm, rows).to(rows)

    def towards_it(x: Tensor) -> Tensor:
        return wide(x).to(direction).flatten() @ direction

    found: dict[str, Any] = {"heads": rows.new_zeros(len(how.out), how.heads), "mlps": rows.new_zeros(len(how.out))}
    found |= {"deepstack": {}, "keys": {}, "bias": rows.new_zeros(()), "enters": towards_it(first)}
    for layer in layers:
        found["mlps"][layer] = towards_it(read["mlp_out", layer, "text"])
        if ("deepstack", layer, "text") in read:
            found["deepstack"][layer] = towards_it(read["deepstack", layer, "text"])
        heads, bias, by = head_parts(reader, how, layer, words.tokens, read[how.kinds[layer], layer, "text"])
        found["heads"][layer] = (heads / by).to(rows) @ (shares / scale)
        found["bias"] += (bias[0] / by + bias[1]).to(rows) @ (shares / scale)
        key = ("cross_pattern" if how.kinds[layer] == "cross_z" else "pattern", layer, "text")
        if key in read:
            found["keys"][layer] = (read[key][0] / by).to(rows) @ (shares / scale)
    return {
        **found,
        "norm_bias": shares @ (rows @ norm.bias.to(rows)),
        "unembed_bias": shares @ biases.to(rows),
        "spellings": words.spread(said)[0],
        "stream": towards_it(final),
        "logit": words.joined(said)[0],
    }


def ends(how: Writing) -> tuple[tuple[str, int], tuple[str, int]]:
    """Where the residual stream ends, and where it begins."""
    return ("resid_post", len(how.kinds) - 1), ("resid_pre", 0)


def head_parts(
    reader: Any, how: Writing, layer: int, tokens: Sequence[int], z: Float[Tensor, "1 head d_head"]
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """What a layer's heads add to tokens' logits, `head token`, and their bias, but for the final norm's scale.

    Returns:
        The heads' parts, to be divided by the third, the scale of the norm behind the layer's attention; the bias's
        part, to be divided by it too, and that of the norm's own bias.
    """
    weights, directions = towards(reader, how, layer, tokens)
    heads = torch.einsum("hd,hdt->ht", wide(z[0]).to(weights), weights)
    own = bias_at(reader, how.out[layer])
    bias = torch.zeros_like(directions[0]) if own is None else own.to(directions)
    norm, by = norm_behind(reader, layer), scale_behind(reader, how, layer, z)
    if norm is None:
        return heads, (directions @ bias, torch.zeros_like(directions[:, 0])), by.to(heads)
    rows, _ = unembedding_rows(reader, tokens)
    beyond = through(norm_at(reader, at(reader.model, reader.arch.norm)), rows) @ norm.bias.to(rows)
    return heads, (directions @ bias, beyond), by.to(heads)


def norm_behind(reader: Any, layer: int) -> FinalNorm | None:
    """The norm between a layer's attention and the residual stream, where there is one."""
    block, (path, number) = reader.arch.text.blocks[layer], reader.arch.text.layers[layer]
    return norm_at(reader, at(at(reader.model, path)[number], block.attn_out)) if block.attn_out else None


def scale_behind(reader: Any, how: Writing, layer: int, z: Float[Tensor, "1 head d_head"]) -> Float[Tensor, ""]:
    """What that norm divided by; 1 where there is none."""
    norm, matrix = norm_behind(reader, layer), matrix_at(reader, how.out[layer])
    if norm is None:
        return torch.ones((), dtype=matrix.dtype)
    bias = bias_at(reader, how.out[layer])
    whole = matrix @ wide(z).flatten().to(matrix)
    return scale_of(norm, (whole if bias is None else whole + bias.to(whole))[None])
