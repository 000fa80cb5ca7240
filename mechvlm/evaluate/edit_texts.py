"""Edits written as text, for the command line and for records: `bias:2.0@8-16`, `cut@4-7`, `ablate@3.5,4.1`.

What a text means is made for each prompt, since the picture's positions differ from one to the next.

>>> edits = edits_from("bias:2.0@2-4")
>>> [str(edit) for edit in edits(real)][0]
'bias +2 attention to 36 keys at text.2.scores'
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mechvlm.attention_edits import bias_attention, cut_attention
from mechvlm.edits import Edit, ablate_heads, scale_heads
from mechvlm.prompt import Prompt
from mechvlm.sites import told

FORMS = "bias:AMOUNT@LAYERS, cut@LAYERS, ablate@LAYER.HEAD,... or scale:FACTOR@LAYER.HEAD,..."
LAYERS = r"\d+(-\d+)?(,\d+(-\d+)?)*"
HEADS = r"\d+\.\d+(,\d+\.\d+)*"
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"


@dataclass(frozen=True)
class EditTexts:
    """Edits as they were written; called with a prompt it gives the edits there."""

    texts: tuple[str, ...]

    def __call__(self, prompt: Prompt) -> list[Edit]:
        """The edits of all texts at a prompt, in their order.

        Raises:
            ValueError: for attention to a picture that the prompt does not hold.
        """
        return [edit for text in self.texts for edit in edits_at(text, prompt)]

    def __str__(self) -> str:
        return "; ".join(self.texts)


def edits_from(*texts: str) -> EditTexts:
    """Edits from texts, which act together.

    Args:
        texts: `bias:AMOUNT@LAYERS` adds to the attention scores of the picture's keys, in all heads and for all
            queries; `cut@LAYERS` takes attention to the picture away; `ablate@LAYER.HEAD,...` makes what heads write
            zero, and `scale:FACTOR@LAYER.HEAD,...` multiplies it. Layers are `8`, `8-16` (both ends included) or
            `8-16,20`, counted from 0.

    Returns:
        A function from a prompt to the list of edits, for `pope` and whatever takes one.

    Raises:
        ValueError: for a text that has none of these forms.

    Example:
        >>> found = mv.evaluate.edits_from("bias:2.0@2-4", "ablate@3.5")
        >>> str(found), len(found(real))
        ('bias:2.0@2-4; ablate@3.5', 4)

    Source:
        The intervention of VIAR is `bias:2.0@8-16`.
    """
    for text in texts:
        parts_of(text)
    return EditTexts(tuple(text.strip() for text in texts))


def no_texts(edits: Any) -> Any:
    """What was given as edits, as it is, where it holds no text: `edits_from` makes edits of those.

    Raises:
        TypeError: for a text, or a list with texts.
    """
    held = [edits] if isinstance(edits, str) else edits if isinstance(edits, list | tuple) else []
    texts = [one for one in held if isinstance(one, str)]
    if texts:
        said = ", ".join(map(repr, texts))
        raise TypeError(
            f"edits={told(edits)} is text; give edits=mv.evaluate.edits_from({said}), which makes edits of it."
        )
    return edits


def parts_of(text: str) -> tuple[str, float, str]:
    """What a text says: what to do, by how much, and where.

    Raises:
        ValueError: for a text that has none of the forms.
    """
    named = re.fullmatch(rf"(bias|scale):({NUMBER})@(.+)|(cut|ablate)@(.+)", str(text).replace(" ", ""))
    if named:
        what, amount, where = named[1] or named[6], float(named[2] or 0), named[5] or named[7]
        by_layers = what in ("bias", "cut")
        if re.fullmatch(LAYERS if by_layers else HEADS, where) and all(a <= b for a, b in spans_of(where, by_layers)):
            return what, amount, where
    raise ValueError(f"no edit is written {text!r}; write {FORMS}, for instance bias:2.0@8-16 or ablate@3.5,4.1.")


def spans_of(where: str, by_layers: bool) -> list[tuple[int, int]]:
    """Layers from and to, or a layer and a head, of each part of a place."""
    if not by_layers:
        return [(0, 0)]
    ends = [part.split("-") for part in where.split(",")]
    return [(int(one[0]), int(one[-1])) for one in ends]


def edits_at(text: str, prompt: Prompt) -> list[Edit]:
    """The edits of one text at a prompt."""
    what, amount, where = parts_of(text)
    if what in ("bias", "cut"):
        layers = dict.fromkeys(layer for first, last in spans_of(where, True) for layer in range(first, last + 1))
        return [on_picture(layer, prompt, amount if what == "bias" else None) for layer in layers]
    by_layer: dict[int, list[int]] = {}
    for part in where.split(","):
        layer, head = map(int, part.split("."))
        by_layer.setdefault(layer, []).append(head)
    make: Callable[[int, list[int]], Edit] = (
        ablate_heads if what == "ablate" else lambda layer, heads: scale_heads(layer, heads, amount)
    )
    return [make(layer, heads) for layer, heads in by_layer.items()]


def on_picture(layer: int, prompt: Prompt, amount: float | None) -> Edit:
    """A bias of attention to the picture, or a cut for None: by cross-attention where the picture is seen by that.

    Raises:
        ValueError: for a prompt without a picture.
    """
    if not prompt.images:
        raise ValueError(
            "attention to the picture cannot be edited in a prompt without one; give the prompt a picture."
        )
    cross = prompt.images[0].of == "keys"
    keys = [at for one in prompt.images for at in (*one.positions, *one.separators)] if cross else prompt.image
    if amount is None:
        return cut_attention(layer, keys, cross=cross)
    return bias_attention(layer, keys, amount, cross=cross)
