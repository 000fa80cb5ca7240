"""What does the model hold at each position? The logit lens.

>>> logit_lens(vlm, real, positions=real.image).token.sel(layer=6, rank=1)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.experiments.record import chosen_layers, one_prompt, record, word_list
from mechvlm.experiments.sight import check_layers_run
from mechvlm.experiments.sweep import numbers
from mechvlm.experiments.translators import by_layer, said_of, translated
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, whole, whole_numbers
from mechvlm.unembedding import decoded
from mechvlm.vlm import VLM

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def logit_lens(
    vlm: VLM,
    prompt: Prompt,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    top: int = 5,
    words: Sequence[str | int] = (),
    kind: str = "resid_post",
    translators: Any = None,
    piece: int | None = None,
) -> xr.Dataset:
    """The words that each position's residual stream stands for, were it decoded after each layer.

    What a layer leaves (`resid_post`) goes through the model's own final norm and unembedding. After the last layer, at
    the last position, this is the model's own prediction. Only the answers leave the forward pass, and the logits of
    all positions over all the vocabulary are never held together where they would not fit `vlm.attention_budget`.

    Args:
        positions: which; None means all. Negative ones count from the end.
        layers: after which layers, counted from 0; None means all.
        top: how many of the likeliest tokens to keep.
        words: words, or token ids, whose probability and rank to keep as well.
        kind: what to decode: the stream as it enters a layer (`resid_pre`), between attention and MLP (`resid_mid`) or
            leaves it (`resid_post`); or what attention or the MLP adds (`attn_out`, `mlp_out`). What is added is normed
            by itself, so that its words say where it points, and not what it adds to the logits.
        translators: functions from `pos d_model` to `pos d_model`, applied before the norm: one for all layers, or a
            list or mapping by layer, such as `mv.tuned_lens` makes. They get the stream in the model's precision.
        piece: how many tokens of the vocabulary are decoded at once; by default what the budget allows. It changes no
            result.

    Returns:
        `token`, text, and `probability`, both over axes layer, position, rank (from 1); with words also over layer,
        position, word: `word_probability`, a word's single-token spellings summed, and `word_rank`, the place of its
        best placed spelling among all tokens, 1 the top; tokens of equal logits share the best place.

    Raises:
        ValueError: for positions or layers that are not there, a word that is no single token, no token to keep,
            another kind, or translators that are missing, fail, or return another shape.
        TypeError: for positions, layers or words that are no list, or translators that are no functions.

    Example:
        >>> lens = mv.logit_lens(vlm, real, positions=real.image, words=["red"])
        >>> mv.plot.tokens_over_image(lens, real, layer=6)
        >>> mv.plot.words_by_layer(lens, "rank")

    Source:
        nostalgebraist (2020), "interpreting GPT: the logit lens"; for image tokens Neo et al. (2024), "Towards
        Interpreting Visual Information Processing in Vision-Language Models", section 5; translators: Belrose et al.
        (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", section 3.
    """
    where = within_prompt(prompt, range(len(one_prompt(prompt))) if positions is None else positions)
    after = check_layers_run(vlm, prompt, chosen_layers(vlm, layers))
    words = word_list(words)
    _check_kind(kind)
    ids = checked_words(vlm, words, top)
    sites = [Site(kind, layer) for layer in after]
    through = by_layer(translators, sites)

    def decode(h: Tensor, site: Site) -> tuple:  # batch pos d_model
        streams = translated(through[site], h[0, where], site) if site in through else h[0, where]
        return decoded(vlm, streams, top, ids, piece)

    run = vlm.run(prompt, read={site: partial(decode, site=site) for site in sites})
    tokens, shares, of_words, ranks = (torch.stack(part) for part in zip(*(run[site] for site in sites), strict=True))
    axes = ["layer", "position"]
    found: dict[str, Any] = {
        "token": ([*axes, "rank"], texts_of(vlm, tokens)),
        "probability": ([*axes, "rank"], numbers(shares.exp()), {"long_name": "probability"}),
    }
    if words:
        found["word_probability"] = ([*axes, "word"], numbers(of_words.exp()), {"long_name": "probability"})
        found["word_rank"] = ([*axes, "word"], ranks.cpu().numpy(), {"long_name": "rank, 1 the top"})
    norm = "" if translators is None else "translator, then "
    about = {"decoded": f"{norm}final norm, then unembedding, then softmax", "translators": said_of(translators)}
    return xr.Dataset(
        found,
        coords={
            **{"layer": after, "position": where, "rank": np.arange(1, top + 1)},
            "input_token": ("position", np.array([prompt.tokens[position] for position in where], dtype=str)),
            **({"word": [str(word) for word in words]} if words else {}),
        },
        attrs={**record(vlm, [prompt], site=kind), **about},
    )


def _check_kind(kind: str) -> None:
    """Refuse what cannot be decoded."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is nothing that can be decoded; choose from {', '.join(KINDS)}.")


def checked_words(vlm: VLM, words: Sequence[str | int], top: int) -> list[list[int]]:
    """The token ids of words, and that so many tokens can be named.

    Raises:
        ValueError: for a word that is no single token, or no token to name.

    Example:
        >>> checked_words(vlm, [7], 5)
        [[7]]
    """
    most = vlm.shape.vocabulary
    if not 1 <= whole("top", top) <= most:
        raise ValueError(f"top={top} tokens cannot be kept; give 1 to {most}, the size of the vocabulary.")
    ids = [[word] if isinstance(word, int) else vlm.token_ids(word) for word in words]
    beyond = [number for same in ids for number in same if not 0 <= number < most]
    if beyond:
        raise ValueError(f"token id {beyond[0]} is not in the vocabulary of {most}.")
    return ids


def within_prompt(prompt: Prompt, positions: Sequence[int]) -> list[int]:
    """Positions of a prompt, counted from 0.

    Raises:
        ValueError, TypeError: for positions that it has not, or none.

    Example:
        >>> within_prompt(real, [3, -1])
        [3, 48]
    """
    chosen = whole_numbers("positions", positions)
    beyond = [position for position in chosen if not -len(prompt) <= position < len(prompt)]
    if beyond or not chosen:
        given = f"position {beyond[0]}" if beyond else "an empty list"
        raise ValueError(f"positions holds {given}; give positions of the prompt, which has {len(prompt)}.")
    return [position % len(prompt) for position in chosen]


def texts_of(vlm: VLM, tokens: Tensor) -> np.ndarray:
    """Token ids as texts."""
    known = {number: vlm.word(number) for number in tokens.unique().tolist()}
    return np.array([known[number] for number in tokens.flatten().tolist()], dtype=str).reshape(tokens.shape)
