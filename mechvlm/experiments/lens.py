"""What does the model hold at each position? The logit lens.

>>> logit_lens(vlm, real, positions=real.image).token.sel(layer=6, rank=1)
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.experiments.record import chosen_layers, one_prompt, record, word_list
from mechvlm.experiments.sight import check_layers_run
from mechvlm.experiments.sweep import numbers
from mechvlm.prompt import Prompt
from mechvlm.sites import Site, whole, whole_numbers
from mechvlm.vlm import VLM


def logit_lens(
    vlm: VLM,
    prompt: Prompt,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    top: int = 5,
    words: Sequence[str | int] = (),
) -> xr.Dataset:
    """The words that each position's residual stream stands for, were it decoded after each layer.

    What a layer leaves (`resid_post`) goes through the model's own final norm and unembedding. After the last layer, at
    the last position, this is the model's own prediction. Only the answers leave the forward pass.

    Args:
        positions: which; None means all. Negative ones count from the end.
        layers: after which layers, counted from 0; None means all.
        top: how many of the likeliest tokens to keep.
        words: words, or token ids, whose probability to keep as well.

    Returns:
        `token`, text, and `probability`, both over axes layer, position, rank (from 1); with words also
        `word_probability` over layer, position, word, a word's single-token spellings summed.

    Raises:
        ValueError: for positions or layers that are not there, a word that is no single token, or no token to keep.
        TypeError: for positions, layers or words that are no list.

    Example:
        >>> lens = mv.logit_lens(vlm, real, positions=real.image, words=["red"])
        >>> mv.plot.tokens_over_image(lens, real, layer=6)

    Source:
        nostalgebraist (2020), "interpreting GPT: the logit lens"; for image tokens Neo et al. (2024), "Towards
        Interpreting Visual Information Processing in Vision-Language Models", section 5.
    """
    where, after = _positions(one_prompt(prompt), positions), check_layers_run(vlm, prompt, chosen_layers(vlm, layers))
    words = word_list(words)
    most = vlm.shape.vocabulary
    if not 1 <= whole("top", top) <= most:
        raise ValueError(f"top={top} tokens cannot be kept; give 1 to {most}, the size of the vocabulary.")
    ids = [[word] if isinstance(word, int) else vlm.token_ids(word) for word in words]
    beyond = [number for same in ids for number in same if not 0 <= number < vlm.shape.vocabulary]
    if beyond:
        raise ValueError(f"token id {beyond[0]} is not in the vocabulary of {vlm.shape.vocabulary}.")

    def decode(h: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:  # batch pos d_model
        shares = vlm.unembed(h[0, where]).float().softmax(-1)
        return *shares.topk(top), [shares[:, same].sum(-1) for same in ids]

    sites = [Site("resid_post", layer) for layer in after]
    run = vlm.run(prompt, read=dict.fromkeys(sites, decode))
    axes = ["layer", "position", "rank"]
    shares, tokens, of_words = zip(*(run[site] for site in sites), strict=True)
    lens = xr.Dataset(
        {
            "token": (axes, _texts(vlm, torch.stack(tokens))),
            "probability": (axes, numbers(torch.stack(shares)), {"long_name": "probability"}),
        },
        coords={
            "layer": after,
            "position": where,
            "rank": np.arange(1, top + 1),
            "input_token": ("position", np.array([prompt.tokens[position] for position in where], dtype=str)),
        },
        attrs=record(vlm, [prompt], site="resid_post", decoded="final norm, then unembedding, then softmax"),
    )
    if words:
        stacked = np.stack([np.stack([numbers(one) for one in each], -1) for each in of_words])
        lens["word_probability"] = (["layer", "position", "word"], stacked, {"long_name": "probability"})
        lens = lens.assign_coords(word=[str(word) for word in words])
    return lens


def _positions(prompt: Prompt, positions: Sequence[int] | None) -> list[int]:
    if positions is None:
        return list(range(len(prompt)))
    chosen = whole_numbers("positions", positions)
    beyond = [position for position in chosen if not -len(prompt) <= position < len(prompt)]
    if beyond or not chosen:
        given = f"position {beyond[0]}" if beyond else "an empty list"
        raise ValueError(f"positions holds {given}; give positions of the prompt, which has {len(prompt)}.")
    return [position % len(prompt) for position in chosen]


def _texts(vlm: VLM, tokens: Tensor) -> np.ndarray:
    """Token ids as texts."""
    known = {number: vlm.word(number) for number in tokens.unique().tolist()}
    return np.array([known[number] for number in tokens.flatten().tolist()], dtype=str).reshape(tokens.shape)
