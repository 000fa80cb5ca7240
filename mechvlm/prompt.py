"""A question about images, encoded for one model, and which position is what.

Rule this module guards: positions are computed from what the processor returned, never assumed. Image tokens are where
`input_ids` holds the image token; their number must be what the model's grid says; each one's pixel box undoes the
padding, resizing and cropping that the processor did.

>>> prompt.spans["image"][:3], prompt.images[0].box(prompt.image[0])
([3, 4, 5], (0.0, 0.0, 12.0, 12.0))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from mechvlm import images
from mechvlm.archs import Arch, Shape
from mechvlm.imagemap import ImageMap, View, view_of
from mechvlm.images import to_picture
from mechvlm.sites import told


@dataclass(frozen=True, repr=False, eq=False)
class Prompt:
    """A question about one or more images, encoded for one model.

    Attributes:
        words: the question, as the user wrote it.
        text: the whole prompt, verbatim, as the processor was given it.
        encoding: what the model is called with, a batch of one.
        tokens: the text of each position.
        bos, prefix, image, question, last: lists of positions that together are all positions, each once. `prefix` is
            what stands before the first image token, `question` everything after it that is neither an image token nor
            the last position; without an image everything but `bos` and `last` is `question`.
        images: an `ImageMap` for each image.
        pictures: the original pictures, empty for a ready encoding.
        shape: the sizes of the model it was encoded for.
    """

    words: str
    text: str
    encoding: dict[str, Tensor]
    tokens: list[str]
    bos: list[int]
    prefix: list[int]
    image: list[int]
    question: list[int]
    last: list[int]
    images: list[ImageMap]
    pictures: list[Image.Image] = field(default_factory=list)
    again: Callable[[list[Image.Image], str], "Prompt"] | None = None
    shape: Shape | None = None

    @property
    def spans(self) -> dict[str, list[int]]:
        """The named spans that are not empty, in the order bos, prefix, image, question, last."""
        named = {
            "bos": self.bos,
            "prefix": self.prefix,
            "image": self.image,
            "question": self.question,
            "last": self.last,
        }
        return {name: positions for name, positions in named.items() if positions}

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        spans = ", ".join(f"{name} {_ranges(positions)}" for name, positions in self.spans.items())
        return f"Prompt({self.words!r}: {len(self)} positions; {spans})"

    def with_image(self, image: Any) -> "Prompt":
        """The same words about another picture: a picture, or a function from picture to picture (a null image).

        Raises:
            ValueError: if positions would not match, because the picture has another size or the prompt no picture.

        Example:
            >>> null = real.with_image(mv.images.black)
        """
        if self.again is None or not self.pictures:
            raise ValueError(
                "this prompt was made from a ready encoding or without an image, so there is no picture to exchange; "
                "make it with vlm.prompt(image, text)."
            )
        makers = (images.noise, images.diffusion, images.blur, images.shuffle, images.colour)
        if any(image is maker for maker in makers):
            raise ValueError(
                f"mv.images.{image.__name__} makes a null image from its settings; call it, for instance "
                "mv.images.noise(0) or mv.images.blur(8)."
            )
        if callable(image):
            pictures = [to_picture(image(picture)) for picture in self.pictures]
        elif isinstance(image, list | tuple):
            pictures = [to_picture(one) for one in image]
        else:
            pictures = [to_picture(image)]
        if len(pictures) != len(self.pictures):
            raise ValueError(f"the prompt holds {len(self.pictures)} images and {len(pictures)} were given.")
        other = self.again(pictures, self.words)
        if len(other) != len(self):
            raise ValueError(
                f"with this picture the prompt has {len(other)} positions and before {len(self)}, so positions cannot "
                f"be matched; give a picture of {self.pictures[0].size[0]} x {self.pictures[0].size[1]} pixels."
            )
        return other

    def with_text(self, text: str) -> "Prompt":
        """The same pictures with other words; positions match those of this prompt only as far as the tokens do."""
        if self.again is None:
            raise ValueError("this prompt was made from a ready encoding; make it with vlm.prompt(image, text).")
        return self.again(self.pictures, text)

    def find(self, words: str) -> list[int]:
        """The positions of some words of the question; where they stand more than once, all of them.

        Whole words only: "red" is not found in "there".

        Raises:
            ValueError: if they are not in the question.

        Example:
            >>> real.find("image")
            [45]
        """
        if not isinstance(words, str):
            raise TypeError(f"find looks for words, and {told(words)} is none; write it in quotes.")
        wanted = "".join(words.lower().split())
        plain = ["" if position in set(self.image) else _bare(token) for position, token in enumerate(self.tokens)]
        starts = np.cumsum([0, *map(len, plain)]).tolist()
        text = "".join(plain)
        asked = "".join(self.words.lower().split())
        first = max(text.rfind(asked), 0) if asked else 0
        last = first + len(asked) if asked and asked in text else len(text)
        begins = {start for start, token in zip(starts, self.tokens, strict=False) if self._begins(token)}
        found, at = set(), text.find(wanted, first, last)
        while wanted and at >= 0:
            end = at + len(wanted)
            if at in begins and (end in begins or end == len(text) or not text[end].isalnum()):
                found |= {p for p, token in enumerate(plain) if token and starts[p] < end and starts[p + 1] > at}
            at = text.find(wanted, at + 1, last)
        if not found:
            raise ValueError(f"{words!r} are no words of the question {self.words or self.text!r}.")
        return sorted(found)

    def _begins(self, token: str) -> bool:
        """Whether a token begins a word: where tokens bear marks for a space, those that do; else every token."""
        marked = any(one[:1] in _SPACES for one in self.tokens)
        return token[:1] in _SPACES or not marked or not token[:1].isalnum()


_SPACES = ("▁", "Ġ")
"""What tokenizers write for the space before a word."""


def _bare(token: str) -> str:
    """A token's text without the marks that tokenizers use for a space."""
    return token.strip("▁Ġ ").lower()


def _ranges(positions: list[int]) -> str:
    if positions == list(range(positions[0], positions[-1] + 1)):
        return str(positions[0]) if len(positions) == 1 else f"{positions[0]} to {positions[-1]}"
    return f"{len(positions)} positions"


def encode(processor: Any, arch: Arch, shape: Shape, pictures: list[Image.Image], words: str, raw: bool) -> Prompt:
    """A prompt from pictures and words, through the model's own processor.

    Raises:
        ValueError: for a text without room for the images, or with room for others.
    """
    text = words if raw else _dress(processor, arch, len(pictures), words)
    mark = processor.image_token
    if text.count(mark) != len(pictures):
        raise ValueError(
            f"the text has {text.count(mark)} {mark} and {len(pictures)} images were given; with raw=True each image "
            f"needs one {mark} in the text, where it is to stand."
        )
    views = [view_of(processor.image_processor, picture.size, shape.picture) for picture in pictures]
    # A text that starts with the start token already, as some templates write it, must not get a second one.
    start = processor.tokenizer.bos_token
    special = start is None or not text.startswith(start)
    encoding = processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=special)
    kept = {name: value for name, value in encoding.items() if isinstance(value, Tensor)}
    sizes = [picture.size for picture in pictures]
    tokens = processor.tokenizer.convert_ids_to_tokens(kept["input_ids"][0].tolist())

    def again(other: list[Image.Image], others: str) -> Prompt:
        return encode(processor, arch, shape, other, others, raw)

    return locate(kept, shape, tokens, processor.tokenizer.bos_token_id, sizes, views, words, text, pictures, again)


def _dress(processor: Any, arch: Arch, images: int, words: str) -> str:
    """The words in the model's chat template, or in its family's documented prompt where it has none."""
    if not words.strip():
        raise ValueError("the question is empty; write one, or pass raw=True with the whole prompt.")
    if processor.image_token in words:
        raise ValueError(
            f"the question holds {processor.image_token} itself, whose place the template decides; pass raw=True to "
            "give the whole prompt verbatim."
        )
    if processor.chat_template is None:
        return arch.template.replace("<image>\n", f"{processor.image_token}\n" * images).format(text=words)
    content = [{"type": "image"}] * images + [{"type": "text", "text": words}]
    try:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the model's chat template cannot be used ({said}); pass raw=True with the whole prompt, or set "
            "processor.chat_template."
        ) from error


def locate(
    encoding: dict[str, Tensor],
    shape: Shape,
    tokens: list[str] | None = None,
    bos: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    views: Sequence[View] | None = None,
    words: str = "",
    text: str = "",
    pictures: Sequence[Image.Image] = (),
    again: Callable[[list[Image.Image], str], Prompt] | None = None,
) -> Prompt:
    """Say of each position of an encoding what it is.

    Raises:
        ValueError: for an encoding that no model could run, or whose image tokens and pictures do not agree.
    """
    ids = _checked_ids(encoding, shape)
    images = _split_images(ids, encoding.get("pixel_values"), shape)
    everywhere = [position for positions in images for position in positions]
    first, end = (everywhere[0] if everywhere else 0), len(ids) - 1
    start = [0] if bos is not None and ids[0] == bos else []
    sizes = sizes or [(shape.picture[1], shape.picture[0])] * len(images)
    views = views or [(0.0, 0.0, 1.0, 1.0)] * len(images)
    inside = set(everywhere)
    return Prompt(
        words=words,
        text=text,
        encoding={**encoding, "attention_mask": encoding.get("attention_mask", torch.ones_like(encoding["input_ids"]))},
        tokens=tokens or [str(number) for number in ids],
        bos=start,
        prefix=list(range(len(start), first)),
        image=everywhere,
        question=[at for at in range(max(first, len(start)), end) if at not in inside],
        last=[end] if end not in inside and [end] != start else [],
        images=[_map(positions, size, view, shape) for positions, size, view in zip(images, sizes, views, strict=True)],
        shape=shape,
        pictures=list(pictures),
        again=again,
    )


def _checked_ids(encoding: dict[str, Tensor], shape: Shape) -> list[int]:
    ids = encoding.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        given = tuple(ids.shape) if isinstance(ids, Tensor) else ids
        raise ValueError(f"an encoding needs input_ids of shape (1, positions), and this one's are {given}.")
    if ids.is_floating_point() or int(ids.min()) < 0:
        raise ValueError("input_ids must be token ids, whole numbers from 0.")
    if int(ids.max()) >= shape.vocabulary:
        raise ValueError(f"token id {int(ids.max())} is not in the model's vocabulary of {shape.vocabulary}.")
    mask = encoding.get("attention_mask")
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        raise ValueError(
            "the encoding of one prompt must not be padded: attention_mask must be all ones, in the shape of "
            "input_ids. Give vlm.run a list of prompts to run them as one batch."
        )
    if ids.shape[1] > shape.longest:
        raise ValueError(f"the prompt has {ids.shape[1]} positions and the model was built for {shape.longest}.")
    return ids[0].tolist()


def _split_images(ids: list[int], pixels: Tensor | None, shape: Shape) -> list[list[int]]:
    """Positions per image, split by the number each takes: two images side by side make one run of image tokens."""
    marked = [position for position, number in enumerate(ids) if number == shape.image_token]
    count, each = (0 if pixels is None else pixels.shape[0]), shape.tokens_per_image
    if pixels is not None and pixels.shape[1:] != (3, *shape.picture):
        raise ValueError(
            f"pixel_values are {tuple(pixels.shape)}; this model sees (images, 3, {shape.picture[0]}, "
            f"{shape.picture[1]})."
        )
    if pixels is not None and not (pixels.is_floating_point() and bool(pixels.isfinite().all())):
        raise ValueError("pixel_values must be finite floats, as the image processor makes them from a picture.")
    if pixels is not None and not count:
        raise ValueError("pixel_values hold no image; leave them out of the encoding.")
    if len(marked) != count * each:
        raise ValueError(
            f"the prompt holds {len(marked)} image tokens and {count} images, which take {each} each; every image "
            "needs its tokens and every image token its image."
        )
    return [marked[start : start + each] for start in range(0, len(marked), each)]


def _map(positions: list[int], size: tuple[int, int], view: View, shape: Shape) -> ImageMap:
    rows, columns = shape.grid
    spare = len(positions) - rows * columns
    return ImageMap(
        positions=tuple(positions[spare:]),
        rows=rows,
        columns=columns,
        size=size,
        view=view,
        token=(shape.picture[0] // rows, shape.picture[1] // columns),
        separators=tuple(positions[:spare]),
    )
