"""What an answer says, yes or no: by the first token's logits, or by rules over generated text, which disagree.

The rules are those of published evaluations, as their code has them. The same answers give other numbers under another
rule, so a result names its own.

>>> PARSERS["official"]("There is no dog.", "no"), PARSERS["lmms-eval"]("There is no dog.", "no")
('no', 'other')
>>> PARSERS["official"]("", "no"), PARSERS["viar"]("", "no")
('yes', 'no')
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.sites import listed, told
from mechvlm.vlm import VLM

Parser = Callable[[str, str], str]
"""From a generated text, and the right answer, to "yes", "no" or "other"."""

JOINS = ("logsumexp", "max")


def official(answer: str, label: str) -> str:  # noqa: ARG001  (a parser is given the label; only VCD's looks at it)
    """POPE's own: no where the first sentence, commas aside, has the word No, no or not; yes for all else.

    An empty answer is a yes, and so is "Nope", "NO" and "There isn't one"; "Yes, no doubt" is a no.

    Source:
        AoiDragon/POPE, evaluate.py.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def opera(answer: str, label: str) -> str:  # noqa: ARG001
    """OPERA's and AvisC's: as the official one, of all sentences, with NO and words that end in n't among the noes.

    Points are taken out before words are told apart, so "No.There" is a yes.

    Source:
        shikiw/OPERA, pope_eval.py; sangminwoo/AvisC, eval_bench/pope_eval_llavab.py.
    """
    words = answer.replace(".", "").replace(",", "").split(" ")
    no = {"No", "no", "not", "NO"} & set(words) or any(word.endswith("n't") for word in words)
    return "no" if no else "yes"


def vcd(answer: str, label: str) -> str:
    """VCD's: looks for the right answer anywhere in the text, and takes the other one where it is not there.

    It has to know the label, and is generous: "Yes, no doubt" is right either way, and "I cannot tell" right about what
    is absent, since "cannot" has a "no" in it.

    Source:
        DAMO-NLP-SG/VCD, experiments/eval/eval_pope.py.
    """
    said = label in answer.lower().strip()
    return label if said else {"yes": "no", "no": "yes"}[label]


def lmms_eval(answer: str, label: str) -> str:  # noqa: ARG001
    """lmms-eval's: the whole answer is yes or no, in any case, or it is neither.

    "No." is neither, since of the full stop. What is neither is wrong; lmms-eval itself leaves it out of its recall,
    and its yes-ratio counts labels and not answers.

    Source:
        EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/pope/utils.py.
    """
    bare = answer.lower().strip()
    return bare if bare in ("yes", "no") else "other"


def viar(answer: str, label: str) -> str:  # noqa: ARG001
    """VIAR's: yes where "yes" stands in the first ten characters, in any case; no for all else, an empty answer too.

    Source:
        aayambansal/VIAR, src/eval_viar.py.
    """
    return "yes" if "yes" in answer.lower()[:10] else "no"


def first_word(answer: str, label: str) -> str:  # noqa: ARG001
    """The first word, whatever stands around it, is yes or no; else neither."""
    word = re.match(r"\W*(\w+)", answer.lower())
    return word[1] if word and word[1] in ("yes", "no") else "other"


PARSERS: dict[str, Parser] = {
    "official": official,
    "opera": opera,
    "vcd": vcd,
    "lmms-eval": lmms_eval,
    "viar": viar,
    "first-word": first_word,
}
"""The rules by their names."""


def parser_of(parser: str | Parser | None) -> Parser | None:
    """A rule by its name; a function of one's own as it is.

    Raises:
        ValueError: for a name that no rule has.
        TypeError: for what is neither.
    """
    if parser is None or (callable(parser) and not isinstance(parser, str)):
        return parser
    if not isinstance(parser, str):
        raise TypeError(
            f"parser={told(parser)} is no rule; give a name, a function of an answer and its label, or None for logits."
        )
    if parser not in PARSERS:
        raise ValueError(f"no parser is called {parser!r}; choose from {', '.join(PARSERS)}, or None for logits.")
    return PARSERS[parser]


@dataclass(frozen=True)
class Scoring:
    """How the first token's logits are read: the ids of yes and of no, and how several are joined.

    Attributes:
        joined: "logsumexp" adds the probabilities of a word's spellings; "max" takes the likeliest one.
    """

    yes: tuple[int, ...]
    no: tuple[int, ...]
    joined: str = "logsumexp"

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """log P(yes) - log P(no), in nats; and P(yes) + P(no), how much of all probability the two have."""
        known = logits.double().log_softmax(-1)
        both = [self.one(known[:, list(ids)]) for ids in (self.yes, self.no)]
        return both[0] - both[1], both[0].exp() + both[1].exp()

    def one(self, spelled: Float[Tensor, "row spelling"]) -> Float[Tensor, " row"]:
        """The log-probability of a word, from those of its spellings."""
        return spelled.logsumexp(-1) if self.joined == "logsumexp" else spelled.amax(-1)

    def __str__(self) -> str:
        ids = [" ".join(map(str, ids)) for ids in (self.yes, self.no)]
        return f"first token's logits, {self.joined} over the ids of yes ({ids[0]}) and no ({ids[1]})"


def scoring_of(vlm: VLM, joined: str = "logsumexp", tokens: Any = None) -> Scoring:
    """How a model's first token is read.

    Args:
        joined: "logsumexp" or "max", over the tokens of a word.
        tokens: which tokens are yes and which are no. None: all single-token spellings (`vlm.token_ids`). "lower-case":
            the one token each that "yes" and "no" begin with, as VIAR reads them. Or a dictionary of lists of token
            ids, {"yes": [...], "no": [...]}.

    Raises:
        ValueError: for another word, an id that is not in the vocabulary, or one that is both.
        TypeError: for lists that hold no ids.

    Example:
        >>> scoring_of(vlm, "max").joined
        'max'
    """
    if joined not in JOINS:
        raise ValueError(f"joined={joined!r} is not known; choose from {', '.join(map(repr, JOINS))}.")
    if tokens is None:
        ids = {word: tuple(vlm.token_ids(word)) for word in ("yes", "no")}
    elif tokens == "lower-case":
        ids = {word: (first_id(vlm, word),) for word in ("yes", "no")}
    else:
        ids = exact_ids(tokens, vlm.shape.vocabulary)
    shared = set(ids["yes"]) & set(ids["no"])
    if shared:
        raise ValueError(f"token id {min(shared)} stands for yes and for no; give each token to one of them.")
    return Scoring(ids["yes"], ids["no"], joined)


def first_id(vlm: VLM, word: str) -> int:
    """The token that a word begins with, written alone and as it is."""
    vlm.token_ids(word)  # which says what is missing where there is no processor, or no such word
    return int(vlm.processor.tokenizer.encode(word, add_special_tokens=False)[0])


def exact_ids(tokens: Any, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Token ids as they were given."""
    if not isinstance(tokens, Mapping) or set(tokens) != {"yes", "no"}:
        raise ValueError(
            f"tokens={told(tokens)} does not say which tokens are yes and no; give {{'yes': [ids], 'no': [ids]}}, "
            "'lower-case', or None for all spellings."
        )
    ids: dict[str, Sequence[Any]] = {word: listed(values) or () for word, values in tokens.items()}
    wrong = [one for values in ids.values() for one in values if not is_id(one, vocabulary)]
    if wrong or not all(ids.values()):
        raise ValueError(
            f"tokens={told(tokens)} are no token ids; give at least one whole number each, below {vocabulary}."
        )
    return {word: tuple(values) for word, values in ids.items()}


def is_id(given: Any, vocabulary: int) -> bool:
    """Whether something is a token's id; True, which Python takes for 1, is none."""
    return isinstance(given, int) and not isinstance(given, bool) and 0 <= given < vocabulary


def chances(margins: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """P(yes) / (P(yes) + P(no)), from log P(yes) - log P(no)."""
    return torch.sigmoid(margins)
