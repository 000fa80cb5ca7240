"""What stands for a value where a model runs elsewhere, for functions of the user's that name it.

>>> make, given = sent_prompt(real)
>>> len(make(*given)) == len(real) and make(*given).image == real.image
True
"""

from collections.abc import Callable
from dataclasses import dataclass

from mechvlm.prompt import Prompt

NAMES = ("words", "text", "tokens", "bos", "prefix", "image", "separators", "question", "last")


@dataclass(frozen=True, eq=False)
class SentPrompt:
    """What of a prompt goes along: its words and positions, and neither pictures nor pixels."""

    words: str
    text: str
    tokens: list[str]
    bos: list[int]
    prefix: list[int]
    image: list[int]
    separators: list[int]
    question: list[int]
    last: list[int]
    spans: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.tokens)


def sent_prompt(prompt: Prompt) -> tuple[Callable, tuple]:
    """What makes what stands for a prompt, and of what."""
    return SentPrompt, (*(vars(prompt)[name] for name in NAMES), prompt.spans)
