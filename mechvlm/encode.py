"""From pictures and words to a prompt, through the model's own processor.

Rule this module guards: the text is the model's chat template's, or the one its authors document, or the user's
verbatim; what a processor cannot take is said in one sentence, with the sizes of the pictures.

>>> encode(vlm.processor, vlm.arch, vlm.shape, vlm.hf.config, [image], "Is there a 7 in the image?").image[:3]
[3, 4, 5]
"""

from typing import Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from mechvlm.archs import Arch
from mechvlm.grids import check_pictures, grids_of
from mechvlm.prompt import Prompt, locate
from mechvlm.shapes import Parts, Shape


def encode(
    processor: Any, parts: Parts, shape: Shape, config: Any, pictures: list[Image.Image], words: str, raw: bool = False
) -> Prompt:
    """Encode pictures and words, through the model's own processor.

    Raises:
        ValueError: for a text without room for the images, or with room for others.
    """
    row = parts.row
    mark = processor.image_token if row.mark is None else row.mark
    text = words if raw else _dress(processor, row, mark, len(pictures), words)
    if mark and text.count(mark) != len(pictures):
        raise ValueError(
            f"the text has {text.count(mark)} {mark} and {len(pictures)} images were given; with raw=True each image "
            f"needs one {mark} in the text, where it is to stand."
        )
    # A text that starts with the start token already, as some templates write it, must not get a second one.
    start = processor.tokenizer.bos_token
    settings = {} if start is None or not text.startswith(start) else {"add_special_tokens": False}
    sizes, drawn = [picture.size for picture in pictures], processor.image_processor.to_dict()
    check_pictures(parts.grid, config, drawn, sizes)
    encoding = _processed(processor, text, pictures, settings)
    known = ("input_ids", "attention_mask", "pixel_values", *row.inputs)
    kept = {name: value for name, value in encoding.items() if name in known and isinstance(value, Tensor)}
    tokens = processor.tokenizer.convert_ids_to_tokens(kept["input_ids"][0].tolist())
    laid = grids_of(parts.grid, config, kept, drawn, sizes)

    def again(other: list[Image.Image], others: str) -> Prompt:
        return encode(processor, parts, shape, config, other, others, raw)

    return locate(kept, shape, laid, tokens, processor.tokenizer.bos_token_id, words, text, pictures, again)


def _processed(processor: Any, text: str, pictures: list[Image.Image], settings: dict[str, Any]) -> Any:
    """What the processor makes of one prompt.

    Raises:
        ValueError: with what the processor says of pictures that it cannot take.
    """
    try:
        return processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", **settings)
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError, RuntimeError, MemoryError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        sizes = ", ".join(f"{width} x {height}" for width, height in (picture.size for picture in pictures)) or "none"
        raise ValueError(f"the model's processor cannot take this prompt (pictures: {sizes}): {said}.") from error


def _dress(processor: Any, row: Arch, mark: str, images: int, words: str) -> str:
    """The words in the model's chat template, or in its family's documented prompt where it has none."""
    if not words.strip():
        raise ValueError("the question is empty; write one, or pass raw=True with the whole prompt.")
    if mark and mark in words:
        raise ValueError(
            f"the question holds {mark} itself, whose place the template decides; pass raw=True to "
            "give the whole prompt verbatim."
        )
    if processor.chat_template is None:
        return row.template.replace("{image}", row.image.replace("{mark}", mark) * images).replace("{text}", words)
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
