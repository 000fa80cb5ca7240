"""Minimal pairs: two questions that differ in one thing, and the two answers that are right for them.

>>> pair = MinimalPair(image, mv.images.black(image), "Is there a 7 in the image?", "yes", "no")
>>> source, target = pair.prompts(vlm)
"""

from dataclasses import dataclass
from typing import Any

from mechvlm.matching import check_matched
from mechvlm.metrics import WordMetric, logit_difference
from mechvlm.prompt import Prompt
from mechvlm.sites import told
from mechvlm.vlm import VLM


@dataclass(frozen=True, eq=False)
class MinimalPair:
    """Two pictures that differ in one thing, one question, and its right answer about each.

    A dataset is a list of pairs. Pairs that share a picture are not independent: give them the same `cluster`, and
    intervals are made by resampling clusters.

    Args:
        image_a, image_b: pictures; of the same size, so that the model gives them the same positions. The same picture
            twice where the texts differ.
        text: the question about both.
        answer_a, answer_b: the right answers, words or token ids.
        text_b: the question about `image_b` where it is another one, as long in tokens.
        cluster: a name of what the pair was made from, such as the id of its picture; None: it stands alone.

    Raises:
        ValueError: where nothing differs, or both answers are the same.

    Example:
        >>> pair = mv.MinimalPair(image, mv.images.black(image), "Is there a 7 in the image?", "yes", "no")
        >>> str(pair.metric)
        "logit_difference('yes', 'no')"

    Source:
        Golovanevsky et al. (2025), "What Do VLMs NOTICE?", section 3: semantic minimal pairs.
    """

    image_a: Any
    image_b: Any
    text: str
    answer_a: str | int
    answer_b: str | int
    text_b: str | None = None
    cluster: str | int | None = None

    def __post_init__(self) -> None:
        if self.answer_a == self.answer_b:
            raise ValueError(f"both answers are {told(self.answer_a)}; a minimal pair has two different ones.")
        if self.image_a is self.image_b and self.text_b in (None, self.text):
            raise ValueError("the pair has one picture and one text, so nothing differs; give image_b or text_b.")

    @property
    def metric(self) -> WordMetric:
        """How much more the model says `answer_a` than `answer_b`, in logits."""
        return logit_difference(self.answer_a, self.answer_b)

    def prompts(self, vlm: VLM) -> tuple[Prompt, Prompt]:
        """Both questions, encoded for a model.

        Raises:
            ValueError: where their positions do not mean the same, because pictures have other sizes or texts other
                lengths.
        """
        first = vlm.prompt(self.image_a, self.text)
        second = vlm.prompt(self.image_b, self.text if self.text_b is None else self.text_b)
        check_matched(first, second)
        return first, second
