"""Which image tokens show an object: said by positions, by a box, by a mask, or by a function of the prompt.

Rule this module guards: what is said of an object is about image tokens alone, and about at least one.

>>> objects_of([real], [[3, 4]]), objects_of([real], lambda prompt: prompt.image[:2])
([[3, 4]], [[3, 4]])
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mechvlm.prompt import Prompt
from mechvlm.regions import tokens_in
from mechvlm.sites import listed, told, whole_numbers

Objects = Callable[[Prompt], Sequence[int]] | Sequence[Any] | None
"""A function from a prompt to its image tokens, or for each prompt a list of positions, a box or a mask."""


def objects_of(prompts: Sequence[Prompt], objects: Objects) -> list[list[int]]:
    """The image tokens of each prompt that show its object; none of any prompt for None.

    Args:
        objects: a function of a prompt; or a list with one entry for each prompt: a list of positions; a box, the tuple
            (left, top, right, bottom) in pixels of the original picture; or a mask of the picture, `y x`. Boxes and
            masks are of the first picture and hold the tokens of which at least half lies in them.

    Raises:
        ValueError, TypeError: for another number of entries, positions of other tokens, or none.

    Example:
        >>> objects_of([real], [(0, 0, 24, 12)])
        [[3, 4]]
    """
    if objects is None:
        return [[] for _ in prompts]
    each = [objects(prompt) for prompt in prompts] if callable(objects) else listed(objects)
    if each is None or len(each) != len(prompts):
        raise ValueError(
            f"objects={told(objects)} is not one object for each of {len(prompts)} prompts; give a list of them, or a "
            "function from a prompt to its image tokens."
        )
    return [object_tokens(prompt, one) for prompt, one in zip(prompts, each, strict=True)]


def object_tokens(prompt: Prompt, given: Any) -> list[int]:
    """The image tokens of one prompt that show an object, in the order of the text.

    Args:
        given: a list of positions, a box as a tuple of four numbers, or a mask `y x`.

    Raises:
        ValueError, TypeError: for positions of other tokens, or none.

    Example:
        >>> object_tokens(real, np.ones((72, 72), bool)) == real.image
        True
    """
    if isinstance(given, tuple) and len(given) == 4:
        found = tokens_in(prompt, box=given)
    elif np.ndim(given) == 2:
        found = tokens_in(prompt, mask=np.asarray(given))
    else:
        found = list(whole_numbers("objects", given))
    foreign = sorted(set(found) - set(prompt.image))
    if foreign or not found:
        what = f"position {foreign[0]}, which is no image token of this prompt" if foreign else "no image token"
        raise ValueError(f"the object holds {what}; give some of prompt.image.")
    return sorted(set(found))
