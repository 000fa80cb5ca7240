"""What does it say? The probabilities of answers, of one prompt beside another.

>>> found = answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"])
>>> found.sel(word="yes").values.round(2)
array([0.93, 0.  ])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.experiments.record import record, word_list
from mechvlm.experiments.sweep import numbers, rows_for
from mechvlm.metrics import probability
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM


def answer_probabilities(vlm: VLM, prompts: Mapping[str, Prompt], words: Sequence[str | int]) -> xr.DataArray:
    """How likely the next token is each of some words, for each of some prompts.

    Args:
        prompts: by name; they run as left-padded batches.
        words: words, each counted in all its single-token spellings, or token ids.

    Returns:
        Probabilities from 0 to 1 over axes prompt and word. They are not renormalised: what is missing to 1 went to
        other tokens.

    Raises:
        ValueError: without prompts or words, or for a word that is no single token.
        TypeError: for prompts without names, or words that are no list.

    Example:
        >>> mv.answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"])

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), asks yes or no; the
        joining of spellings is the first-token scoring that later re-analyses use.
    """
    if not isinstance(prompts, Mapping):
        raise TypeError(
            f"prompts must have names, such as {{'real': real, 'null': null}}, and {type(prompts).__name__} was given."
        )
    words = word_list(words)
    if not prompts or not words:
        raise ValueError("answer_probabilities needs at least one prompt and one word.")
    measures = [vlm.metric(probability(word)) for word in words]
    asked = check_prompts(list(prompts.values()), vlm.shape)
    size = min(map(rows_for, asked))

    def said(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch word"]:
        return torch.stack([measure(logits.float()) for measure in measures], -1)

    groups = ({"prompt": asked[start : start + size], "value": said} for start in range(0, len(asked), size))
    found: list[Any] = [run.metric for run in vlm.runs(groups)]
    return xr.DataArray(
        numbers(torch.cat(found)),
        dims=["prompt", "word"],
        coords={"prompt": list(prompts), "word": [str(word) for word in words]},
        name="probability",
        attrs=record(vlm, asked, value="softmax over the vocabulary at the last position, spellings of a word summed"),
    )
