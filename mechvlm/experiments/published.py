"""What a published study did otherwise than it should: which positions are the image, which token is an answer.

VIAR's code takes the first N columns for the image, where N is the number of image tokens, and the rows behind them for
text, wherever the image stands. In LLaVA-1.5 that counts the beginning token and the words before the image as image,
and its last few tokens as text.

Rule this module guards: a convention that is a mistake is never the default, and has one name everywhere.

>>> published("viar-2026"), {name: len(held) for name, held in spans_of(real, ["image", "text"], VIAR).items()}
(True, {'image': 36, 'text': 13})
"""

from collections.abc import Sequence

from mechvlm.experiments.conventions import CONVENTIONS, called
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, told
from mechvlm.vlm import VLM

VIAR = "viar-2026"
"""The conventions of VIAR (github.com/aayambansal/VIAR), as its code was in 2026."""
SPANS = ("bos", "prefix", "image", "separators", "question", "last", "text")
"""Spans of a prompt; `text` is question and last together, all words behind the image, as `conventions` has it."""


def published(convention: object) -> bool:
    """Whether the published convention is asked for, and not the corrected one.

    Raises:
        ValueError: for anything but None and the name of a convention, and for those that only `layer_profile` knows.

    Example:
        >>> published(None)
        False
    """
    if convention in CONVENTIONS and convention != VIAR:
        raise ValueError(
            f"convention={convention!r} is a way to take positions that layer_profile alone knows; choose None for "
            f"correct positions, or {VIAR!r} for what was published."
        )
    if convention is not None and convention != VIAR:
        raise ValueError(
            f"convention={told(convention)} is not known; choose None for correct positions, or {VIAR!r} for what was "
            "published."
        )
    return convention is not None


def named_spans(spans: object) -> list[str]:
    """Names of spans as a list, without repetitions.

    Raises:
        ValueError: for a name that is none, or none at all.

    Example:
        >>> named_spans("text"), named_spans(["last", "image"])
        (['text'], ['last', 'image'])
    """
    given = [spans] if isinstance(spans, str) else listed(spans)
    wrong = [name for name in given or () if name not in SPANS]
    if wrong or not given:
        raise ValueError(f"spans={told(spans)} must name spans of a prompt; choose from {', '.join(map(repr, SPANS))}.")
    return list(dict.fromkeys(given))


def spans_of(prompt: Prompt, spans: Sequence[str], convention: str | None = None) -> dict[str, list[int]]:
    """Positions of a prompt by span; a span that it has not is empty.

    Args:
        spans: names, of `SPANS`.
        convention: "viar-2026" takes positions 0 to N - 1 for the image, where N counts the image tokens, and all
            others for text; it knows no other spans.

    Raises:
        ValueError: for a prompt without an image, or with nothing else.

    Example:
        >>> {name: len(held) for name, held in spans_of(real, ["image", "text"]).items()}
        {'image': 36, 'text': 10}
    """
    as_called = called(prompt, VIAR if published(convention) else None)
    own = as_called.spans if published(convention) else {**as_called.really, "text": as_called.text}
    return {name: list(own.get(name, ())) for name in spans}


def lower_case_token(vlm: VLM, word: str) -> int:
    """The one token of a word in small letters as the tokenizer writes it by itself; VIAR reads answers off such.

    Raises:
        ValueError: where that is not one token, or the model has no processor.

    Example:
        >>> vlm.word(lower_case_token(vlm, "yes"))
        'yes'
    """
    spellings = vlm.token_ids(word.lower())
    written = vlm.processor.tokenizer.encode(word.lower(), add_special_tokens=False)
    found = [number for number in written if number in spellings]
    if len(found) != 1:
        raise ValueError(
            f"{word.lower()!r} is not one token of this model, which {VIAR!r} needs; give a metric, and no convention."
        )
    return found[0]
