"""By how much is the right answer likelier than any other that may be said?

>>> float(margin(vlm, "yes")(vlm.run(real).logits)[0]) > 0
True
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechvlm.experiments.accuracy import YES_NO
from mechvlm.experiments.record import word_list
from mechvlm.metrics import Metric, log_probability
from mechvlm.sites import told
from mechvlm.vlm import VLM


def margin(vlm: VLM, answer: str, words: Sequence[str] = YES_NO) -> Metric:
    """A metric: by how much the right word's log-probability exceeds that of the likeliest other word.

    Args:
        answer: one of `words`; each counts in all its single-token spellings.

    Raises:
        ValueError: for an answer that is none of the words, or a single word.

    Example:
        >>> bool(margin(vlm, "yes")(vlm.run(real).logits) > 0)
        True
    """
    allowed = list(word_list(words))
    if answer not in allowed or len(allowed) < 2:
        raise ValueError(f"the answer {answer!r} stands beside no other word of {told(words)}; give it and others.")
    measures = [vlm.metric(log_probability(word)) for word in (answer, *(one for one in allowed if one != answer))]

    def margin(logits: Tensor) -> Tensor:  # batch vocab
        right, *others = (measure(logits) for measure in measures)
        return right - torch.stack(others).amax(0)

    return margin
