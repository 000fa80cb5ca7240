"""What a head would write to the vocabulary, if it looked at one thing: a direction, or a position of a prompt.

Rule this module guards: of a prompt's position it is what the head's part of the logit would be with an attention of
one, every norm's scale as it was in the run; of a bare direction, of which no run knows a scale, norms are applied as
they are.

>>> found = ov_writes(vlm, 7, 3, real, real.image, top=3)
>>> found.token.dims, found.token.shape
(('head', 'position', 'rank'), (1, 36, 3))
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import check_width
from mechvlm.experiments.folded import heads_of, written
from mechvlm.experiments.lens import checked_words, texts_of, within_prompt
from mechvlm.experiments.logit_parts import (
    bias_at,
    last,
    matrix_at,
    norm_at,
    norm_behind,
    scale_behind,
    scale_of,
    type_of,
    wide,
)
from mechvlm.experiments.record import record, word_list
from mechvlm.experiments.sweep import numbers
from mechvlm.prompt import Prompt
from mechvlm.rounds import unsaid
from mechvlm.sites import Site, places, told, whole
from mechvlm.unembedding import unembedded
from mechvlm.vlm import VLM
from mechvlm.walk import at
from mechvlm.weights import attention_of, names_of
from mechvlm.writes import Writing, writing

BYTES = 16
"""What a logit takes while it is looked at."""


def ov_writes(
    vlm: VLM,
    layer: int,
    heads: int | Sequence[int] | None,
    what: Prompt | Float[Tensor, "*direction d_model"],
    positions: Sequence[int] | None = None,
    top: int = 10,
    words: Sequence[str | int] = (),
) -> xr.Dataset:
    """Which words a head would speak for if it looked at one position of a prompt, or one direction, and nothing else.

    Args:
        layer: one whose words attend to each other.
        heads: one, several, or None for all.
        what: a prompt; or directions of the residual stream that enters the layer, one or several, for instance a mean
            over image tokens or the difference of two.
        positions: of the prompt; by default its image tokens, in this layer.
        top: how many words are named.
        words: words, or token ids, whose logits are wanted.

    Returns:
        `token` and `logit` over head, position (or direction) and rank: the words with the highest logits and these,
        falling. `word_logit` over head, position and word, where words are given: of a word's spellings the highest.
        Of a prompt's position a logit is what the head would add to the word's logit at the answering position with an
        attention of 1 on this position, with the norms' scales of the prompt's run; times the attention it is what
        `direct_logit_attribution` gives for that position. Logits are those before any cap, without biases of the
        output. Of a direction no run knows a scale: it is read through the layer's norm as it is, and logits are what
        the model would make of the head's write alone, final norm, cap and all, without the bias of the values.
        Positions say token, direction counts.

    Raises:
        ValueError: for a layer, head or position that is not there, a layer that attends to the picture's keys instead,
            directions of another width or with NaN, or a word of several tokens.
        TypeError: for what is neither a prompt nor directions, or positions of directions.

    Example:
        >>> mv.ov_writes(vlm, 7, 3, real, [43], words=["yes"]).word_logit.round(1).item()
        2.4
        >>> mv.ov_writes(vlm, 7, None, image_mean, top=3).logit.dims
        ('head', 'direction', 'rank')

    Source:
        Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", on OV circuits; Dar et al. (2023),
        "Analyzing Transformers in Embedding Space", section 3.
    """
    layers, count = vlm.shape.layers["text"], vlm.shape.heads["text"]
    if not 0 <= whole("layer", layer) < layers:
        raise ValueError(f"the text tower has {layers} layers, counted from 0, so there is no layer {layer}.")
    attention_of(vlm, layer, "text")
    chosen = list(range(count)) if heads is None else list(places("heads", [heads] if np.ndim(heads) == 0 else heads))
    if max(chosen) >= count:
        raise ValueError(
            f"the text tower has {count} heads a layer, counted from 0, so there is no head {max(chosen)}."
        )
    asked = word_list(words)
    ids = checked_words(vlm, asked, top)
    about: list[Any] = [writing(vlm), layer, chosen, top, ids]
    if isinstance(what, Prompt):
        where = within_prompt(what, what.image if positions is None else positions)
        read: dict[Any, Any] = {Site("resid_pre", layer): partial(some, where), Site("z", layer): last}
        read |= {Site("resid_post", vlm.shape.layers["text"] - 1): last}
        reduce = partial(of_run, vlm, *about)
        run = next(vlm.runs([{"prompt": what, "read": read, "value": unsaid, "reduce": reduce}]))
        tokens = ("position", np.array([what.tokens[at] for at in where], dtype=str))
        attrs = record(vlm, [what], layer=layer, norms="scales of the run")
        return _dataset(vlm, run.reduced, chosen, asked, {"position": where, "input_token": tokens}, attrs)
    if not isinstance(what, Tensor) or what.ndim not in (1, 2) or not what.is_floating_point():
        raise TypeError(f"{told(what)} is no prompt and no direction; give a prompt, or numbers, direction by d_model.")
    if positions is not None:
        raise TypeError("positions are of a prompt, and directions were given; leave them out, or give a prompt.")
    streams = what.detach().reshape(-1, what.shape[-1])
    check_width(streams, vlm.shape.d_model["text"])
    if not streams.isfinite().all():
        raise ValueError("the directions hold values that are no finite numbers, so no word follows; give finite ones.")
    found = vlm.place.ask(vlm.model, of_directions, vlm, *about, streams)
    attrs = {"model": vlm.name, "layer": layer, "norms": "of the direction, and of the head's write alone"}
    return _dataset(vlm, found, chosen, asked, {"direction": range(len(streams))}, attrs)


def some(positions: Sequence[int], x: Tensor) -> Tensor:  # batch pos d_model
    """A stream at some positions, `pos d_model`."""
    return x[0, list(positions)].clone()


def values_of(
    reader: Any, layer: int, streams: Float[Tensor, "pos d_model"], bias: bool
) -> Float[Tensor, "kv_head pos d_head"]:
    """The values that a layer's heads read of streams, through its norm.

    Args:
        bias: whether the bias of the values counts.
    """
    block, (path, number) = reader.arch.text.blocks[layer], reader.arch.text.layers[layer]
    module = at(reader.model, path)[number]
    norm, part = at(module, str(block.pre)), names_of(at(module, block.attention)._module)[2]
    matrix = matrix_at(reader, f"{path}.{number}.{block.attention}.{part}")
    with torch.no_grad():
        read = wide(norm(streams.to(matrix.device, type_of(norm._module))))
    values = read.to(matrix) @ matrix.T
    own = bias_at(reader, f"{path}.{number}.{block.attention}.{part}")
    values = values if own is None or not bias else values + own.to(values)
    return values.unflatten(1, (heads_of(reader)[2], -1)).transpose(0, 1)


def writes_of(
    reader: Any, how: Writing, layer: int, heads: Sequence[int], values: Float[Tensor, "kv_head pos d_head"]
) -> Float[Tensor, "head pos d_model"]:
    """What heads put out of values, before any norm behind."""
    matrix = matrix_at(reader, how.out[layer]).T.unflatten(0, (how.heads, -1))[list(heads)]
    served = [head * len(values) // how.heads for head in heads]
    return torch.einsum("hpd,hdm->hpm", values[served].to(matrix), matrix)


def of_run(
    reader: Any,
    how: Writing,
    layer: int,
    heads: Sequence[int],
    top: int,
    words: Sequence[Sequence[int]],
    read: Mapping[tuple, Tensor],
    _gradients: Any,
) -> list[Tensor]:
    """What heads would write of positions of a run, every scale as it was: as `said` returns it."""
    made = writes_of(reader, how, layer, heads, values_of(reader, layer, read["resid_pre", layer, "text"], True))
    behind = scale_behind(reader, how, layer, read["z", layer, "text"])
    added = written(reader, layer, made.flatten(0, 1)) / behind.to(made)
    norm = norm_at(reader, at(reader.model, reader.arch.norm))
    scale = scale_of(norm, wide(read["resid_post", len(how.kinds) - 1, "text"]))
    final = (norm.centred(added.to(norm.gain)) * norm.gain / scale).unflatten(0, made.shape[:2])
    head, own = at(reader.model, reader.arch.unembed), bias_at(reader, reader.arch.unembed)

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            out = wide(head(x.to(reader.model._module.dtype)))
        return out if own is None else out - own.to(out)

    return said(reader, final, logits, top, words)


def of_directions(
    _model: Any,
    reader: Any,
    how: Writing,
    layer: int,
    heads: Sequence[int],
    top: int,
    words: Sequence[Sequence[int]],
    streams: Float[Tensor, "direction d_model"],
) -> list[Tensor]:
    """What heads would write of directions, with norms as they are: as `said` returns it."""
    made = writes_of(reader, how, layer, heads, values_of(reader, layer, streams, False))
    norm = norm_behind(reader, layer)
    if norm is None:
        made = written(reader, layer, made.flatten(0, 1)).unflatten(0, made.shape[:2])
    else:
        with torch.no_grad():
            made = wide(norm.module(made.to(type_of(norm.module._module))))

    def logits(x: Tensor) -> Tensor:
        return wide(unembedded(reader.model, reader.arch, reader.shape.logit_cap, x))

    return said(reader, made, logits, top, words)


def said(
    reader: Any, made: Float[Tensor, "head pos d_model"], logits: Any, top: int, words: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The best tokens, their logits, and those of words, `head pos ...`, some streams at a time."""
    flat, found = made.flatten(0, 1), []
    for part in flat.split(max(1, reader.attention_budget // (BYTES * reader.shape.vocabulary))):
        out = logits(part)
        best = out.topk(top, -1)
        own = [out[:, list(ids)].amax(-1) for ids in words]
        found.append((best.indices, best.values, torch.stack(own, -1) if own else out[:, :0]))
    return [torch.cat(parts).unflatten(0, made.shape[:2]) for parts in zip(*found, strict=True)]


def _dataset(
    vlm: VLM,
    found: Sequence[Tensor],
    heads: Sequence[int],
    words: Sequence[str | int],
    along: dict[str, Any],
    about: Mapping[str, Any],
) -> xr.Dataset:
    """What was found, with names."""
    tokens, logits, own = found
    axes = ["head", next(iter(along))]
    held: dict[str, Any] = {
        "token": ([*axes, "rank"], texts_of(vlm, tokens)),
        "logit": ([*axes, "rank"], numbers(logits), {"long_name": "logit", "units": "logits"}),
    }
    coordinates = {"head": list(heads), "rank": np.arange(1, tokens.shape[-1] + 1), **along}
    if words:
        held["word_logit"] = ([*axes, "word"], numbers(own), {"long_name": "logit", "units": "logits"})
        coordinates["word"] = [str(word) for word in words]
    return xr.Dataset(held, coords=coordinates, attrs=about)
