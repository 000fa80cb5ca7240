"""The address of an activation: which kind, which layer, which tower.

The words and shapes are TransformerLens's. One clash of words is settled here: a *patch* is an edit (overwriting an
activation with another run's); the squares of a picture are *image tokens*.

Rule this module guards: a `Site` is only an address. It holds no tensor, knows no model, and says what axes to expect.

>>> str(Site("pattern", 12)), Site.parse("blocks.12.attn.hook_pattern") == Site("pattern", 12)
('text.12.pattern', True)
"""

import operator
import re
from dataclasses import dataclass
from typing import Any

LAYER_KINDS = (
    "resid_pre",
    "q",
    "k",
    "v",
    "scores",
    "pattern",
    "z",
    "cross_scores",
    "cross_pattern",
    "cross_z",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
    "deepstack",
)
"""What a layer of a tower may have, in forward order. Which of them a model's layer has stands in `vlm.shape.kinds`."""

SELF_KINDS = ("q", "k", "v", "scores", "pattern", "z")
CROSS_KINDS = ("cross_scores", "cross_pattern", "cross_z")
ATTENTION_KINDS = SELF_KINDS + CROSS_KINDS
RAW_KINDS = ("raw_q", "raw_k", "raw_v")
"""What a layer's heads project the stream to, before any norm and rotary embedding; no sites, only gradients of them
are taken (`mechvlm.reads`)."""
PATTERN_KINDS = ("scores", "pattern", "cross_scores", "cross_pattern")
"""Those with axes `batch head query key`."""

MODEL_KINDS = ("pixels", "embed", "image_features", "logits")
TOWERS = ("text", "vision", "qformer")

_AXES = {
    "q": ("batch", "pos", "head", "d_head"),
    "k": ("batch", "pos", "kv_head", "d_head"),
    "v": ("batch", "pos", "kv_head", "d_head"),
    "z": ("batch", "pos", "head", "d_head"),
    "scores": ("batch", "head", "query", "key"),
    "pattern": ("batch", "head", "query", "key"),
    "cross_z": ("batch", "pos", "head", "d_head"),
    "cross_scores": ("batch", "head", "query", "key"),
    "cross_pattern": ("batch", "head", "query", "key"),
    "deepstack": ("image", "pos", "d_model"),
    "logits": ("batch", "pos", "vocab"),
    "image_features": ("image", "pos", "d_model"),
    "pixels": ("image", "..."),
}

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "ln2.hook_in": "resid_mid",
    "norm2.hook_in": "resid_mid",
}
_LENS_LAYER = re.compile(r"(blocks|vision_encoder\.(?:encoder_layers|blocks))\.(\d+)\.(\S+)")
_LENS_WHOLE = {
    "hook_embed": ("embed", "text"),
    "vision_encoder.hook_vision_embed": ("embed", "vision"),
    "vision_projector.hook_out": ("image_features", "text"),
    "unembed.hook_out": ("logits", "text"),
}


@dataclass(frozen=True, order=True)
class Site:
    """Where an activation lives.

    Kinds, in forward order: `pixels` (with `tower="vision"`: what the processor made of the pictures, the
    `pixel_values` that the model is called with, in the processor's own axes), `embed` (word embeddings, before image
    features take the placeholders' places; with `tower="vision"` the embedded squares of the picture), then per layer
    of a tower `resid_pre, q, k, v, scores, pattern, z, attn_out, resid_mid, mlp_out, resid_post`, then `image_features`
    (what the projector hands to the language model) and `logits`.

    `q` and `k` are as the scores use them: after rotary embedding and any norm; `k` and `v` have the key-value heads.
    `scores` are scaled and masked (minus infinity where a query may not look). `attn_out` and `mlp_out` are what is
    *added to the residual stream*.

    Some architectures have more: `cross_scores, cross_pattern, cross_z` in layers that attend to the image's features
    (Mllama's text tower, the Q-Former), and `deepstack`, what Qwen3-VL adds to the image tokens behind a text layer.

    Args:
        kind: one of the words above.
        layer: counted from 0 in its tower; None for `pixels`, `embed`, `image_features` and `logits`.
        tower: "text", "vision" or "qformer".

    Raises:
        ValueError: for a word, tower or layer that cannot be.

    Example:
        >>> Site("resid_post", 3, tower="vision").axes
        ('batch', 'pos', 'd_model')
    """

    kind: str
    layer: int | None = None
    tower: str = "text"

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            raise ValueError(f"no tower is called {self.tower!r}; there are {', '.join(TOWERS)}.")
        if self.kind not in LAYER_KINDS + MODEL_KINDS:
            raise ValueError(
                f"no activation is called {self.kind!r}. In forward order they are: {', '.join(LAYER_KINDS)}; and, "
                f"without a layer, {', '.join(MODEL_KINDS)}."
            )
        if self.kind == "deepstack" and self.tower != "text":
            raise ValueError(f"deepstack is added to the text tower; leave tower={self.tower!r} out.")
        if self.kind in MODEL_KINDS:
            if self.layer is not None:
                raise ValueError(f"{self.kind} has no layer, and layer={self.layer} was given; leave it out.")
            if self.kind == "pixels" and self.tower != "vision":
                raise ValueError("pixels are what the vision tower sees; write Site('pixels', tower='vision').")
            if self.tower != "text" and (self.kind not in ("pixels", "embed") or self.tower == "qformer"):
                raise ValueError(f"{self.kind} belongs to the whole model; leave tower={self.tower!r} out.")
        elif self.layer is None:
            raise ValueError(f"{self.kind} needs a layer, for instance Site({self.kind!r}, 0).")
        elif isinstance(self.layer, bool) or whole("layer", self.layer) < 0:
            raise ValueError(f"layer {self.layer} is not a layer; layers count from 0.")
        else:
            object.__setattr__(self, "layer", whole("layer", self.layer))  # numpy's and torch's numbers too

    def __str__(self) -> str:
        if self.kind in MODEL_KINDS:
            return self.kind if self.tower == "text" else f"{self.tower}.{self.kind}"
        return f"{self.tower}.{self.layer}.{self.kind}"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of the tensor that lives here.

        The first axis of `pixels` counts what the model's processor counts: images, squares of them, patches, or texts;
        the others are its own too.
        """
        return _AXES.get(self.kind, ("batch", "pos", "d_model"))

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site that a TransformerLens hook name, or this site's own text, stands for.

        Example:
            >>> Site.parse("blocks.3.hook_resid_post"), Site.parse("vision.0.z")
            (Site(kind='resid_post', layer=3, tower='text'), Site(kind='z', layer=0, tower='vision'))
        """
        lens = _LENS_LAYER.fullmatch(name)
        if lens and lens[1] == "blocks" and lens[3] in ("attn.hook_q", "attn.hook_k"):
            raise ValueError(
                f"{name!r} is before rotary embedding in TransformerLens, and mechvlm's q and k are after it; write "
                f"'blocks.{lens[2]}.attn.hook_rot_{lens[3][-1]}' or 'text.{lens[2]}.{lens[3][-1]}'."
            )
        if lens and lens[3] in _TRANSFORMER_LENS:
            return cls(_TRANSFORMER_LENS[lens[3]], int(lens[2]), "text" if lens[1] == "blocks" else "vision")
        if lens:
            raise ValueError(
                f"{name!r} is a hook of TransformerLens that no site stands for; a layer's are "
                f"{', '.join(dict.fromkeys(_TRANSFORMER_LENS.values()))}."
            )
        if name in _LENS_WHOLE:
            kind, tower = _LENS_WHOLE[name]
            return cls(kind, tower=tower)
        own = re.fullmatch(rf"({'|'.join(TOWERS)})\.(\d+)\.(\w+)", name)
        if own and own[3] in LAYER_KINDS:
            return cls(own[3], int(own[2]), own[1])
        if name in MODEL_KINDS:
            return cls(name)
        if name in ("vision.pixels", "vision.embed"):
            return cls(name.removeprefix("vision."), tower="vision")
        raise ValueError(
            f"{name!r} names no site; write 'text.12.pattern', 'image_features' or, as in TransformerLens, "
            "'blocks.12.attn.hook_pattern'."
        )


def as_site(value: "Site | str") -> Site:
    """A `Site` as it is, or the one that a name stands for."""
    if isinstance(value, Site):
        return value
    if isinstance(value, str):
        return Site.parse(value)
    raise TypeError(f"{told(value)} is not a site; write Site('pattern', 12) or 'text.12.pattern'.")


def whole(what: str, value: Any) -> int:
    """A whole number, whether Python, numpy or torch wrote it.

    Raises:
        TypeError: for anything else, 1.0 and True included.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{what} {told(value)} is not a whole number.")


def whole_numbers(what: str, values: Any) -> tuple[int, ...]:
    """Positions or heads as a tuple, from a list, a range, an array or a tensor of them.

    Raises:
        TypeError: for a single number, or anything in the list that is not a whole number.
    """
    found = listed(values)
    if found is None:
        raise TypeError(f"{what}={told(values)} is not a list of {what}; write for instance [0].")
    return tuple(whole(f"{what}:", value) for value in found)


def listed(values: Any) -> tuple | None:
    """What a list, a range, an array or a tensor holds; None for a single value, a text included."""
    if isinstance(values, str | bytes):
        return None
    try:
        return tuple(values)
    except TypeError:
        return None


def places(what: str, values: Any, all_by_none: bool = False) -> tuple[int, ...]:
    """Positions or heads to be edited: whole numbers from 0, at least one."""
    numbers = whole_numbers(what, values)
    if not numbers:
        none = ", or None for all" if all_by_none else ""
        raise ValueError(f"{what} is empty, so nothing would be edited; give at least one{none}.")
    wrong = [number for number in numbers if number < 0]
    if wrong:
        raise ValueError(f"{what} holds {wrong[0]}; {what} count from 0, and prompt.last is the last position.")
    return numbers


def number(what: str, value: Any) -> float:
    """A number, whether Python, numpy or torch wrote it."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError is torch's, for a tensor of several numbers
        pass
    raise TypeError(f"{what}={told(value)} is not a number.")


def told(value: object) -> str:
    """A value as an error names it: written out where that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
