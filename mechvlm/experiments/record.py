"""What every result says about itself: model, prompt, metric, versions and conventions, as plain text and numbers.

Rule this module guards: nothing that netCDF cannot hold goes into a result's `attrs`.

>>> record(vlm, [real], metric=mv.probability("yes"))["metric"]
"probability('yes')"
"""

from collections.abc import Sequence
from typing import Any

from mechvlm.edits import name_of
from mechvlm.metrics import DivergenceMetric, Metric, WordMetric
from mechvlm.prompt import Prompt
from mechvlm.sites import told, whole_numbers
from mechvlm.vlm import VLM


def record(
    vlm: VLM, prompts: Sequence[Prompt], metric: Metric | None = None, **conventions: str | int | float
) -> dict[str, str | int | float]:
    """The `attrs` of a result.

    Args:
        prompts: those that ran; texts that differ are all kept, a line between them.
        metric: kept by its name.
        conventions: further attributes, such as what the sign of an effect means.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    named = {} if metric is None else {"metric": metric_name(metric)}
    about = {**vlm.provenance(prompts[0]), "prompt": "\n---\n".join(texts), "layers": "counted from 0", **named}
    return {**about, **conventions}


def metric_name(metric: Metric) -> str:
    """How a metric is written: `logit_difference('yes', 'no')`, or the name of the function."""
    return str(metric) if isinstance(metric, WordMetric | DivergenceMetric) else name_of(metric)


def metric_unit(metric: Metric) -> str:
    """The unit of a metric, for axes: logits, nats, probability, rank, or the name of the function."""
    return metric.unit if isinstance(metric, WordMetric | DivergenceMetric) else name_of(metric)


def chosen_layers(vlm: VLM, layers: Sequence[int] | None) -> list[int]:
    """Layers of the language model as they were given, or all of them for None.

    Raises:
        ValueError: for an empty list, or a layer given twice. A layer that is not there is refused by the run that
            reads or edits it.
        TypeError: for what is no list of whole numbers.
    """
    if layers is None:
        return list(range(vlm.shape.layers["text"]))
    chosen = whole_numbers("layers", layers)
    if not chosen:
        raise ValueError("layers is empty; give at least one, or None for all.")
    twice = [layer for at, layer in enumerate(chosen) if layer in chosen[:at]]
    if twice:
        raise ValueError(f"layers holds {twice[0]} more than once; give each layer once.")
    return list(chosen)


def one_prompt(prompt: Any) -> Prompt:
    """A prompt as it is.

    Raises:
        TypeError: for anything else, a list of prompts included.
    """
    if not isinstance(prompt, Prompt):
        raise TypeError(
            f"{told(prompt)} is not one prompt; make it with vlm.prompt(image, text), and ask about several one by one."
        )
    return prompt


def word_list(words: Any, name: str = "words") -> list[str | int]:
    """Words, or token ids, as a list; `name` is the argument's, for what is refused.

    Raises:
        TypeError: for a single word or number.
    """
    try:
        if not isinstance(words, str):
            return list(words)
    except TypeError:
        pass
    raise TypeError(f"{name}={told(words)} is not a list of words; write [{told(words)}].")
