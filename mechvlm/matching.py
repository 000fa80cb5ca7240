"""Whether two prompts can be patched into each other: their positions have to mean the same.

>>> check_matched(real, null)
"""

from mechvlm.prompt import Prompt, laid

REMEDY = "make one from the other with prompt.with_image, which keeps them."


def check_matched(source: Prompt, target: Prompt) -> None:
    """Refuse two prompts whose positions do not mean the same.

    Positions mean the same where both prompts are as long, their image tokens stand at the same positions and look at
    the same squares of pictures that are laid out alike, and every span has the same positions.

    Raises:
        ValueError: for other lengths, image tokens elsewhere, pictures laid out otherwise, or other spans.
    """
    if len(source) != len(target):
        raise ValueError(
            f"the source has {len(source)} positions and the target {len(target)}, so positions cannot be matched; "
            f"{REMEDY}"
        )
    if source.image != target.image:
        raise ValueError(
            f"the source's image tokens do not stand where the target's do, so positions cannot be matched; {REMEDY}"
        )
    if [laid(one) for one in source.images] != [laid(one) for one in target.images]:
        raise ValueError(
            "the source's image tokens stand for other squares of its picture than the target's, so positions cannot "
            f"be matched; {REMEDY}"
        )
    apart = [name for name in source.spans if source.spans[name] != target.spans.get(name)]
    if apart:
        raise ValueError(
            f"the span {apart[0]!r} does not stand at the same positions in the source and in the target, so positions "
            f"cannot be matched; {REMEDY}"
        )
