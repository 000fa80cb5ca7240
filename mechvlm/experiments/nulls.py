"""The same questions about pictures that tell nothing, or something else: null prompts, by name.

`black`, `grey`, `white`, `mean` (the picture's own mean colour), `noise`, `diffusion` (step 500), `blur` (by an eighth
of the shorter side), `shuffle` (6 x 6 cells) and `swap`, the picture of the next prompt that asks about another one.
`no_image` takes the image tokens out; its positions match the prompt's from the end only. Image features that are set
to zero, or to their mean over a data set, are none of these: they are edits of `image_features` and no pictures.

Rule this module guards: a null prompt has the positions of its prompt, each with the same meaning; only `no_image` has
not, and is kept apart.

>>> [len(one) for one in null_prompts(vlm, [real], ["black", mv.images.blur(8)]).values()]
[1, 1]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mechvlm import images
from mechvlm.edits import name_of
from mechvlm.experiments.sight import check_layers_run
from mechvlm.matching import check_matched
from mechvlm.prompt import Prompt
from mechvlm.sites import listed, told
from mechvlm.vlm import VLM

NO_IMAGE = "no_image"
BLUR = 8  # the shorter side is so many standard deviations


def blurred(picture: Image.Image) -> Image.Image:
    """A picture blurred by an eighth of its shorter side: colours and coarse layout stay, and nothing can be read."""
    return images.blur(min(picture.size) / BLUR)(picture)


NAMED: dict[str, images.NullImage] = {
    "black": images.black,
    "grey": images.grey,
    "white": images.white,
    "mean": images.mean,
    "noise": images.noise(),
    "diffusion": images.diffusion(),
    "blur": blurred,
    "shuffle": images.shuffle(),
}
"""Null images by name, with the settings that they have here."""


def null_prompts(vlm: VLM, prompts: Sequence[Prompt], nulls: Any) -> dict[str, list[Prompt]]:
    """For each null, by its name, a null prompt for each prompt.

    Args:
        nulls: a name (see the module), a function of `mv.images`, or a list of these; or a mapping from names of one's
            own to such, or to lists with a prompt for each prompt, where they come as ready encodings.

    Raises:
        ValueError: for a name that is not known, is there twice, or is given to
            another null; null prompts whose positions do not match; `swap`
            where all prompts are about one picture; `no_image` for a model that has layers for a picture alone.

    Example:
        >>> list(null_prompts(vlm, [real], "black"))
        ['black']
    """
    made = {}
    for name, null in _listed(nulls).items():
        if isinstance(null, list | tuple):
            made[name] = _ready(name, null, prompts)
        elif null == "swap":
            made[name] = _swapped(prompts)
        elif null == NO_IMAGE:
            made[name] = [_without(vlm, prompt) for prompt in prompts]
        else:
            made[name] = [prompt.with_image(NAMED.get(null, null)) for prompt in prompts]
    return made


def described(nulls: Any) -> str:
    """What each null is, with its settings, for records.

    Example:
        >>> described(["black", "noise"])
        'black; noise: noise(seed=0)'
    """
    said = {name: NAMED.get(null, null) if isinstance(null, str) else null for name, null in _listed(nulls).items()}
    texts = {name: name_of(null) if callable(null) else name for name, null in said.items()}
    return "; ".join(name if text == name else f"{name}: {text}" for name, text in texts.items())


def common_end(prompt: Prompt, other: Prompt) -> int:
    """How many tokens two prompts have in common, counted from the end.

    Example:
        >>> common_end(real, real.with_image(mv.images.black)) == len(real)
        True
    """
    pairs = zip(*(one.encoding["input_ids"][0].tolist()[::-1] for one in (prompt, other)), strict=False)
    count = 0
    for own, its in pairs:
        if own != its:
            break
        count += 1
    return count


def _listed(nulls: Any) -> dict[str, Any]:
    """Nulls by name."""
    if isinstance(nulls, Mapping):
        given = list(nulls.items())
    else:
        each = [nulls] if isinstance(nulls, str) or callable(nulls) else listed(nulls)
        given = [(null if isinstance(null, str) else name_of(null), null) for null in each or ()]
    known = (*NAMED, "swap", NO_IMAGE)
    wrong = [
        null
        for _, null in given
        if not (callable(null) or isinstance(null, list | tuple) or (isinstance(null, str) and null in known))
    ]
    if wrong or not given:
        raise ValueError(
            f"nulls={told(wrong[0] if wrong else nulls)} is no null image; choose from {', '.join(map(repr, known))}, "
            "or give a function of mv.images."
        )
    kinds = {name: null if isinstance(null, str) else _kind(null) for name, null in given}
    false = [name for name, kind in kinds.items() if name in known and kind in known and kind != name]
    if false:
        raise ValueError(
            f"nulls calls {kinds[false[0]]!r} by the name of another null, {false[0]!r}; give it a name of its own."
        )
    names = [name for name, _ in given]
    twice = [name for at, name in enumerate(names) if name in names[:at]]
    if twice:
        raise ValueError(f"nulls holds {twice[0]!r} more than once; give each once.")
    return dict(given)


def _kind(null: Any) -> str:
    """The name of a function of `mv.images`, without its settings."""
    return name_of(null).partition("(")[0] if callable(null) else ""


def _ready(name: str, null: Sequence[Any], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Null prompts as they were given."""
    if len(null) != len(prompts):
        raise ValueError(f"the null {name!r} has {len(null)} prompts for {len(prompts)}; give one for each.")
    for own, prompt in zip(null, prompts, strict=True):
        check_matched(own, prompt)
    return list(null)


def _swapped(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt about the pictures of the next one that has others."""
    seen = [tuple(picture.tobytes() for picture in prompt.pictures) for prompt in prompts]
    found = []
    for at, prompt in enumerate(prompts):
        order = [*range(at + 1, len(prompts)), *range(at)]
        other = next((one for one in order if seen[one] != seen[at] and len(seen[one]) == len(seen[at])), None)
        if other is None:
            raise ValueError(
                "'swap' takes the picture of another prompt, and all of these are about the same; give prompts about "
                "several pictures, or mv.images.swap(picture)."
            )
        pairs = zip(prompt.pictures, prompts[other].pictures, strict=True)
        found.append(prompt.with_image([images.swap(its)(own) for own, its in pairs]))
    return found


def _without(vlm: VLM, prompt: Prompt) -> Prompt:
    """The question without its picture."""
    if prompt.again is None:
        raise ValueError(
            f"{NO_IMAGE!r} takes the picture out of a question, and this prompt was made from a ready encoding; make "
            "it with vlm.prompt(image, text)."
        )
    other = prompt.again([], prompt.words)
    check_layers_run(vlm, other, range(vlm.shape.layers["text"]))
    return other
