"""What does it say? The probabilities of answers, of one prompt beside another.

>>> answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"]).sel(prompt="null", word="yes").item()
0.5
"""

from collections.abc import Mapping, Sequence

import torch
import xarray as xr

from mechvlm.experiments.record import record
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

    Example:
        >>> mv.answer_probabilities(vlm, {"real": real, "null": null}, ["yes", "no"])

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), asks yes or no; the
        joining of spellings is the first-token scoring that later re-analyses use.
    """
    if not prompts or not len(words):
        raise ValueError("answer_probabilities needs at least one prompt and one word.")
    measures = [vlm.metric(probability(word)) for word in words]
    asked = list(prompts.values())
    size = min(map(rows_for, asked))
    found = []
    for start in range(0, len(asked), size):
        logits = vlm.run(asked[start : start + size]).logits.float()
        found.append(torch.stack([measure(logits) for measure in measures], -1))
    return xr.DataArray(
        numbers(torch.cat(found)),
        dims=["prompt", "word"],
        coords={"prompt": list(prompts), "word": [str(word) for word in words]},
        name="probability",
        attrs=record(vlm, asked, value="softmax over the vocabulary at the last position, spellings of a word summed"),
    )
