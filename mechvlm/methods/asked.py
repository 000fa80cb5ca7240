"""What an evaluation asks, as prompts: for what is read of a model beside its answers.

>>> [prompt.words for prompt in prompts_of(vlm, "demo", 1, split="random")]
['Is there a 9 in the image?']
"""

from collections.abc import Sequence
from typing import Any

from mechvlm.evaluate import read_pope
from mechvlm.evaluate.files import Item
from mechvlm.evaluate.pictures import picture_of
from mechvlm.evaluate.task import text_of
from mechvlm.prompt import Prompt
from mechvlm.vlm import VLM


def prompt_of(vlm: VLM, item: Item, images: Any = None, template: str = "{question}", picture: Any = None) -> Prompt:
    """An item's question about its picture, as `mv.evaluate.pope` asks it.

    Args:
        images, template: as in `mv.evaluate.pope`.
        picture: the picture, where it is open already.
    """
    text, own = text_of(template), vlm.arch.row.mark
    marks = {"<image>", vlm.processor.image_token if own is None else own} - {""}
    about = picture_of(item, images) if picture is None else picture
    return vlm.prompt(about, text.replace("{question}", item.question), any(mark in text for mark in marks))


def prompts_of(
    vlm: VLM,
    questions: Any,
    count: int | None = None,
    images: Any = None,
    split: str | Sequence[str] | None = None,
    template: str = "{question}",
) -> list[Prompt]:
    """The first question about each of the first pictures of an evaluation.

    Args:
        questions, images, split, template: as in `mv.evaluate.pope`.
        count: how many pictures; None: all.
    """
    first: dict[str, Item] = {}
    for item in read_pope(questions, split):
        first.setdefault(item.image, item)
    return [prompt_of(vlm, item, images, template) for item in list(first.values())[:count]]
