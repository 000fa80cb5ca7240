"""From the last position's logits to one number per row.

A metric is any function `(batch vocab) -> (batch)`; the ones here are written in words, which a model turns into its
own token ids (`vlm.metric`). A word counts in all its single-token spellings ("yes", "Yes", each with and without the
space before it), whose logits are joined by log-sum-exp, so that no probability is left out.

>>> vlm.metric(mv.logit_difference("yes", "no"))(vlm.run(real).logits)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.sites import told, whole

Metric = Callable[[Tensor], Tensor]
UNITS = {
    "logit_difference": "logits",
    "log_probability": "nats",
    "probability": "probability",
    "rank": "rank",
}


@dataclass(frozen=True)
class WordMetric:
    """A metric written in words; `ids` are the token ids they stand for in one model, one tuple a word."""

    name: str
    words: tuple[str | int, ...]
    ids: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for word in self.words:
            if isinstance(word, bool) or not isinstance(word, str | int):
                raise TypeError(f"{told(word)} is not a word; {self.name} takes words and token ids.")

    def resolve(self, spellings: Callable[[str], Sequence[int]]) -> "WordMetric":
        """The same metric with the token ids of one model, as `spellings` gives them."""
        ids = tuple((word,) if isinstance(word, int) else tuple(spellings(word)) for word in self.words)
        shared = set(ids[0]).intersection(*ids[1:]) if len(ids) > 1 else set()
        if shared:
            raise ValueError(f"{self} compares a word with itself; give two different words.")
        return replace(self, ids=ids)

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else told(logits)
            raise TypeError(f"{self} takes logits, batch by vocab, for instance run.logits, and got {given}.")
        if self.ids is None:
            raise ValueError(
                f"{self} is written in words, and only a model knows their tokens; use vlm.metric({self})."
            )
        above = [number for ids in self.ids for number in ids if not 0 <= number < logits.shape[-1]]
        if above:
            raise ValueError(f"token id {above[0]} is not in the vocabulary of {logits.shape[-1]}.")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision rounds probabilities away
        if self.name == "rank":
            best = logits[:, list(self.ids[0])].amax(-1, keepdim=True)
            return 1.0 + (logits > best).sum(-1).to(logits.dtype)
        said = [logits[:, list(ids)].logsumexp(-1) for ids in self.ids]
        if self.name == "logit_difference":
            return said[0] - said[1]
        log_probability = said[0] - logits.logsumexp(-1)
        return log_probability if self.name == "log_probability" else log_probability.exp()

    @property
    def unit(self) -> str:
        """What the metric is counted in, for axes."""
        return UNITS[self.name]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.words))})"


@dataclass(frozen=True, eq=False)
class DivergenceMetric:
    """How far each row's answer is from a reference; `reference` are its logits, in double precision."""

    reference: Float[Tensor, "rows vocab"]
    unit: str = "nats"

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else told(logits)
            raise TypeError(f"kl_divergence takes logits, batch by vocab, for instance run.logits, and got {given}.")
        rows, vocabulary = self.reference.shape
        if rows not in (1, len(logits)) or vocabulary != logits.shape[1]:
            raise ValueError(
                f"the reference's logits are {rows} by {vocabulary}, and the run's {len(logits)} by {logits.shape[1]}; "
                "give one row, or one for each of the run's, of the same model."
            )
        known = self.reference.to(logits.device).log_softmax(-1)
        apart = known - logits.double().log_softmax(-1)
        return torch.where(known == -torch.inf, 0.0, known.exp() * apart).sum(-1)

    def __str__(self) -> str:
        rows, vocabulary = self.reference.shape
        likeliest = ", ".join(map(str, self.reference[:8].argmax(-1).tolist())) + (", ..." if rows > 8 else "")
        return f"kl_divergence(logits {rows} x {vocabulary}, likeliest token {likeliest})"


def logit_difference(answer: str | int, other: str | int) -> WordMetric:
    """The logit of one word minus that of another: their log odds against each other.

    Args:
        answer, other: words, or token ids to be taken as they are.

    Example:
        >>> mv.ablate_each_head(vlm, real, mv.logit_difference("yes", "no"))
    """
    return WordMetric("logit_difference", (answer, other))


def log_probability(answer: str | int) -> WordMetric:
    """The log-probability, in nats, that the next token is this word."""
    return WordMetric("log_probability", (answer,))


def probability(answer: str | int) -> WordMetric:
    """The probability that the next token is this word."""
    return WordMetric("probability", (answer,))


def rank(answer: str | int) -> WordMetric:
    """At which place of all next tokens this word stands: 1 is the likeliest; of several spellings the best placed.

    Tokens of equal logits share the best place. A rank is a count, so it has no gradient.

    Example:
        >>> float(vlm.metric(mv.rank("yes"))(vlm.run(real).logits)[0])
        1.0
    """
    return WordMetric("rank", (answer,))


def kl_divergence(reference: Any) -> DivergenceMetric:
    """How far each row's answer is from a reference: KL(reference || row), in nats, over the whole vocabulary.

    It is 0 where a row predicts what the reference does, and never negative but for rounding (computed in float64).

    Args:
        reference: a run, for instance of the same prompt without edits, or logits, batch by vocab. One row is compared
            with every row; several row by row, so that a sweep, whose batches may have any size, takes one.

    Raises:
        TypeError: for anything else.
        ValueError: for logits that are not a number, or of another vocabulary or another number of rows.

    Example:
        >>> mv.ablate_each_head(vlm, real, mv.kl_divergence(vlm.run(real)))

    Source:
        Zhang and Nanda (2024), "Towards Best Practices of Activation Patching in Language Models", section 2.2.
    """
    try:
        logits = reference if isinstance(reference, Tensor) else reference.logits
    except AttributeError:
        logits = None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        given = tuple(logits.shape) if isinstance(logits, Tensor) else told(reference)
        raise TypeError(f"kl_divergence compares with a run or with logits, batch by vocab, and got {given}.")
    if bool(logits.isnan().any()):
        raise ValueError("the reference's logits hold values that are not a number (NaN); compare with another run.")
    return DivergenceMetric(logits.detach().double())


def spellings(tokenizer: Any, word: str) -> list[int]:
    """The ids of a word's single-token spellings: as given, in small letters and capitalised, with a space or without.

    Raises:
        ValueError: where no spelling is one token.
    """
    bare = word.strip()
    written = {bare, bare.lower(), bare.capitalize()}
    found = []
    for spelling in sorted(written | {f" {one}" for one in written}):
        ids = tokenizer.encode(spelling, add_special_tokens=False)
        kept = [number for number in ids if tokenizer.decode([number]).strip()]
        found += kept if len(kept) == 1 and kept[0] != tokenizer.unk_token_id else []
    if not found:
        raise ValueError(f"no spelling of {word!r} is a single token of this model; give a token id.")
    return sorted(set(found))


def ids_of(processor: Any, word: object) -> list[int]:
    """The ids of a word's single-token spellings, from a model's processor.

    Raises:
        TypeError, ValueError: for what is no word, or without a processor.
    """
    if not isinstance(word, str):
        raise TypeError(f"{told(word)} is not a word; token ids need no spelling.")
    if processor is None:
        raise ValueError(f"without a processor {word!r} has no token; give token ids instead of words.")
    return spellings(processor.tokenizer, word)


def text_of(processor: Any, token: int, vocabulary: int) -> str:
    """A token's text; its number where there is no processor, or its tokenizer has none.

    Raises:
        ValueError: for an id that is not in a vocabulary of so many.
    """
    number = whole("the token", token)
    if not 0 <= number < vocabulary:
        raise ValueError(f"token id {number} is not in the model's vocabulary of {vocabulary}.")
    text = None if processor is None else processor.tokenizer.convert_ids_to_tokens(number)
    return str(number) if text is None else text
