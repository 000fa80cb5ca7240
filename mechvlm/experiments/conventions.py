"""Which positions are called the image and which rows text: as they are, or as a publication took them.

Rule this module guards: positions are those of the prompt, unless a convention is named; what a convention calls the
image keeps, beside that name, the spans that it really holds.

>>> called(real).image == tuple(real.image), called(real, "viar-2026").image[:2]
(True, (0, 1))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechvlm.experiments.selection import queries_of
from mechvlm.prompt import Prompt
from mechvlm.sites import told

CONVENTIONS = ("viar-2026", "viar-2026-mistral", "viar-2026-qwen2-vl")
"""The ways in which VIAR's published scripts take positions: for LLaVA-1.5, for Mistral, for Qwen2-VL."""


@dataclass(frozen=True)
class Called:
    """What is called what in a prompt.

    Attributes:
        spans: keys by their name; they hold every position once, and one of them is "image".
        text: the rows that are called text.
        really: the spans of the prompt, whatever the convention calls them.
        convention: its name, or None.
    """

    spans: Mapping[str, tuple[int, ...]]
    text: tuple[int, ...]
    really: Mapping[str, tuple[int, ...]]
    convention: str | None = None

    @property
    def image(self) -> tuple[int, ...]:
        """The keys that are called the image, and the rows."""
        return self.spans["image"]

    def __len__(self) -> int:
        return sum(map(len, self.spans.values()))


def check_convention(convention: Any) -> str | None:
    """A convention's name as it is, or None.

    Raises:
        ValueError: for a name that is not known.

    Example:
        >>> check_convention("viar-2026")
        'viar-2026'
    """
    if convention is not None and convention not in CONVENTIONS:
        raise ValueError(
            f"convention={told(convention)} is not known; choose from {', '.join(map(repr, CONVENTIONS))}, or None for "
            "the positions as they are."
        )
    return convention


def called(prompt: Prompt, convention: str | None = None) -> Called:
    """The keys and rows of a prompt by the name that a convention gives them.

    Args:
        convention: None: the image tokens are where the prompt has them, and text rows are all positions behind the
            image, or the last where there are none. "viar-2026": of N image tokens and T positions, columns 0 to N - 1
            are the image and rows N to T - 1 text, wherever the image stands. "viar-2026-mistral": the image is column
            0 alone, since tokens were counted by subtracting two lengths that are equal. "viar-2026-qwen2-vl": the
            image tokens as they are, and all other rows text, those before the image among them.

    Raises:
        ValueError: for a convention that is not known, a prompt without an image, or one that is called image
            throughout.

    Example:
        >>> one = called(real, "viar-2026")
        >>> one.image[-1] + 1 == len(real.image) == one.text[0]
        True

    Source:
        VIAR (github.com/aayambansal/VIAR): src/eval_modal.py and src/eval_upgrade.py, where tokens are told apart.
    """
    if not prompt.image:
        raise ValueError("the prompt holds no image to look at; make it with vlm.prompt(image, text).")
    check_convention(convention)
    really = {name: tuple(positions) for name, positions in prompt.spans.items()}
    if convention is None:
        return Called(really, queries_of(prompt, "text") or (), really)
    count = {"viar-2026": len(prompt.image), "viar-2026-mistral": 1}.get(convention)
    image = tuple(prompt.image) if count is None else tuple(range(count))
    text = tuple(position for position in range(len(prompt)) if position not in set(image))
    if not text:
        raise ValueError(
            f"the prompt's {len(prompt)} positions are all image tokens, so no row is text; ask a question about the "
            "image."
        )
    return Called({"image": image, "text": text}, text, really, convention)
