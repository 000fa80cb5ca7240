"""How many questions are answered right, when only some words may be said?

>>> picture = mv.demo.scenes()[0]
>>> items = [(vlm.prompt(picture.image, asked.text), asked.label) for asked in mv.demo.pope()[:6]]
>>> float(answer_accuracy(vlm, items).mean())
1.0
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechvlm.batch import check_prompts
from mechvlm.edits import Edit
from mechvlm.experiments.examples import prompt_coordinates
from mechvlm.experiments.record import record, word_list
from mechvlm.experiments.sweep import numbers
from mechvlm.metrics import Metric, log_probability
from mechvlm.points import rows_for
from mechvlm.prompt import Prompt
from mechvlm.sites import told
from mechvlm.vlm import VLM

YES_NO = ("yes", "no")


def accuracy(vlm: VLM, answer: str, words: Sequence[str] = YES_NO) -> Metric:
    """A metric that is 1 where the right word is likelier than each of the others, and 0 where it is not.

    Args:
        answer: the right word, one of `words`; each counts in all its single-token spellings.

    Raises:
        ValueError: for an answer that is none of the words, or a single word.

    Example:
        >>> mv.ablate_in_order(vlm, real, mv.accuracy(vlm, "yes"), [(0, 7)], controls=2).ranked.values
        array([[1., 0.]])

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE); by the first token.
    """
    allowed = list(word_list(words))
    if answer not in allowed or len(allowed) < 2:
        raise ValueError(f"the answer {answer!r} is to be told from others, and the words are {told(words)}.")
    measures = [vlm.metric(log_probability(word)) for word in (answer, *(one for one in allowed if one != answer))]

    def accuracy(logits: Tensor) -> Tensor:  # batch vocab
        right, *others = (measure(logits) for measure in measures)
        return (right > torch.stack(others).amax(0)).to(right)

    return accuracy


def answer_accuracy(
    vlm: VLM, items: Sequence[tuple[Prompt, str]], edits: Sequence[Edit] = (), words: Sequence[str] = YES_NO
) -> xr.DataArray:
    """Which questions are answered right, when only some words may be said.

    Args:
        items: prompts with their right answers, each one of `words`.
        edits: made in every prompt's run; positions are each prompt's own.
        words: what may be said; the likeliest of them at the last position is the answer.

    Returns:
        1.0 for right and 0.0 for wrong, over axis prompt; the mean is the accuracy.

    Raises:
        ValueError: without items, or for an answer that is none of the words.

    Example:
        >>> mv.mean_interval(mv.answer_accuracy(vlm, [(real, "yes"), (null, "no")]), "prompt")

    Source:
        Li et al. (2023), "Evaluating Object Hallucination in Large Vision-Language Models" (POPE); by the first token.
    """
    asked = check_prompts([prompt for prompt, _ in items], vlm.shape)
    measures = [accuracy(vlm, answer, words) for _, answer in items]
    size, found = min(map(rows_for, asked)), []

    def right(measures: Sequence[Metric], logits: Tensor) -> Tensor:  # batch vocab
        return torch.cat([measure(row[None]) for measure, row in zip(measures, logits, strict=True)])

    groups = [slice(start, start + size) for start in range(0, len(asked), size)]
    runs = ({"prompt": asked[own], "edits": edits, "value": partial(right, measures[own])} for own in groups)
    for run in vlm.runs(runs):
        values: Any = run.metric
        found += numbers(values).tolist()
    attrs = record(vlm, asked, words=", ".join(words), value="1 where the right word is likeliest of the words")
    coordinates = {**prompt_coordinates(asked), "answer": ("prompt", np.array([answer for _, answer in items]))}
    return xr.DataArray(found, dims=["prompt"], coords=coordinates, name="right", attrs=attrs)
