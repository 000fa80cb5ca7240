"""What a report is about: a model, a question about a picture, the same about a null image, and what is measured.

>>> Study(vlm, real, null).metric
WordMetric(name='logit_difference', words=('yes', 'no'), ...)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import xarray as xr

from mechvlm.experiments.ablation import ablate_each_head
from mechvlm.experiments.profile import attention_profile
from mechvlm.experiments.sight import cross_layers, image_dim
from mechvlm.metrics import Metric, log_probability, logit_difference
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM


@dataclass(frozen=True)
class Case:
    """One more question to answer in the report's table, with the same question about a null image.

    Attributes:
        right: the right answer, where it is known.
    """

    real: Prompt
    null: Prompt
    right: str = ""


@dataclass(frozen=True, repr=False)
class Study:
    """What a report looks at.

    Args:
        real, null: the same words at the same positions, with the picture and with the null image.
        answers: words, or token ids, of which the report follows the first against the second; alone, its probability.
        layer, head: whose attention is drawn over the picture; None lets the report choose.
        bias: what is added to attention scores of image tokens in the comparison of generations.
        null_name: how the null image was made.
        cases: further questions, for the table.

    Raises:
        ValueError: for answers that are no single tokens, or a layer or head that is not there.
    """

    vlm: VLM
    real: Prompt
    null: Prompt
    answers: Sequence[str | int] = ("yes", "no")
    layer: int | None = None
    head: int | None = None
    bias: float = 2.0
    null_name: str = "black"
    cases: Sequence[Case] = ()
    metric: Metric = field(init=False)

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("a report follows at least one answer; give words, such as yes and no.")
        first, *others = self.answers
        made = logit_difference(first, others[0]) if others else log_probability(first)
        object.__setattr__(self, "metric", self.vlm.metric(made))
        for word in self.answers:
            if isinstance(word, str):
                self.vlm.token_ids(word)
        check_chosen("layer", self.layer, self.vlm.shape.layers["text"])
        check_chosen("head", self.head, self.vlm.shape.heads["text"])

    @cached_property
    def effect(self) -> xr.DataArray:
        """What ablating each head changes; measured once, for two sections."""
        return ablate_each_head(self.vlm, self.real, self.metric)

    @cached_property
    def chosen(self) -> tuple[int, int, str]:
        """Layer and head whose attention is drawn, and how they were chosen."""
        if self.layer is not None and self.head is not None:
            return self.layer, self.head, "as was asked for"
        if image_dim(self.real) == "key":
            return self._chosen_across()
        looks = attention_profile(self.vlm, self.real, queries="text").mass.sel(span="image").isel(example=0)
        score = looks * abs(self.effect)
        score = score if self.layer is None else score.sel(layer=[self.layer])
        score = score if self.head is None else score.sel(head=[self.head])
        best = score.isel(score.argmax(...))
        how = "the one whose effect when ablated, times its text positions’ attention to the image, is largest"
        return int(best.layer), int(best["head"]), how

    def _chosen_across(self) -> tuple[int, int, str]:
        """The same among the layers of cross-attention, all of whose attention is to the picture."""
        score = abs(self.effect).sel(layer=cross_layers(self.vlm) if self.layer is None else [self.layer])
        score = score if self.head is None else score.sel(head=[self.head])
        best = score.isel(score.argmax(...))
        how = "the one of cross-attention whose effect when ablated is largest"
        return int(best.layer), int(best["head"]), how

    @property
    def measured(self) -> str:
        """The metric in words."""
        words = [f"“{word}”" for word in self.answers]
        if len(words) == 1:
            return f"the log-probability of {words[0]}"
        return f"the logit of {words[0]} minus the logit of {words[1]}"

    @property
    def unit(self) -> str:
        """The metric's unit in words."""
        return "nats" if len(self.answers) == 1 else "logits (nats of log odds)"


def check_chosen(what: str, given: int | None, count: int) -> None:
    """Refuse a layer or a head that the model has not."""
    if given is not None and not 0 <= given < count:
        each = "" if what == "layer" else " in each layer"
        raise ValueError(
            f"the language model has {count} {what}s{each}, counted from 0, so there is no {what} {given}."
        )
