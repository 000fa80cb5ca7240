"""Which image tokens move when a part of a picture is painted: the proof that a map is right.

Nothing of mechvlm's engine is used: the real processor makes the encoding, and what transformers hands to the language
model at the positions of the image tokens is compared before and after.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mechvlm.imagemap import Grid, ImageMap, placed
from zoo.variant import Variant

Encode = Callable[[Sequence[Image.Image]], dict[str, torch.Tensor]]
Region = tuple[int, int, int, int]
QUESTION = "what is in the picture ?"


def encoded(variant: Variant, processor: Any, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Some pictures and a question, by the family's processor, or by hand where that needs torchvision."""
    if processor is None and variant.encoding is not None:
        return variant.encoding(pictures, QUESTION)
    if processor.chat_template is None:
        text = "<image>" * len(pictures) + QUESTION
    else:
        parts = [*[{"type": "image"} for _ in pictures], {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return dict(processor(text=[text], images=list(pictures), return_tensors="pt"))


def weak(model: Any, tower: Any) -> Any:
    """The model with a vision tower whose attention says next to nothing, so that a token shows its own place."""
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "self_attn.out_proj" in name:
                weight.mul_(1e-3)
    return model


def received(model: Any, encoding: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the language model receives at the positions of the image tokens."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, given: dict[str, Any]) -> None:
        kept.append(given["inputs_embeds"])

    handle = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**encoding)
    handle.remove()
    return kept[0][encoding["input_ids"] == model.config.image_token_id]


def tower_shapes(model: Any, layers: Any, encoding: dict[str, torch.Tensor]) -> set[tuple[int, ...]]:
    """The shapes, without the width, of what leaves the layers of a vision tower."""
    kept: set[tuple[int, ...]] = set()

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.add(tuple((output[0] if isinstance(output, tuple) else output).shape[:-1]))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        model(**encoding)
    for handle in handles:
        handle.remove()
    return kept


def maps(grids: Sequence[Grid], encoding: dict[str, torch.Tensor], image_token: int) -> list[ImageMap]:
    """Each image's map, with the image tokens counted from 0 instead of from the start of the text."""
    found = int((encoding["input_ids"] == image_token).sum())
    assert found == sum(len(grid.places) for grid in grids) == sum(grid.tokens for grid in grids)
    made, start = [], 0
    for grid in grids:
        made.append(placed(grid, range(start, start + grid.tokens)))
        start += grid.tokens
    return made


def plain(width: int, height: int) -> Image.Image:
    """A grey picture that grows a little lighter to the right and downwards."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    grey = (90 + 20 * across + 20 * down).astype(np.uint8)
    return Image.fromarray(np.stack([grey] * 3, axis=-1))


def region(image: ImageMap, position: int) -> Region | None:
    """The whole pixels of a token's box within the picture; None where less than half of it, or too little, is left."""
    box = image.box(position)
    assert box is not None
    left, top, right, bottom = (round(edge) for edge in box)
    inside = (max(left, 0), max(top, 0), min(right, image.size[0]), min(bottom, image.size[1]))
    width, height = inside[2] - inside[0], inside[3] - inside[1]
    if width < 2 or height < 2 or width * height < 0.5 * (box[2] - box[0]) * (box[3] - box[1]):
        return None
    return inside


def overlaps(box: Sequence[float] | None, part: Region) -> bool:
    """Whether a token's box and a region share some of the picture."""
    if box is None:
        return False
    return box[0] < part[2] and part[0] < box[2] and box[1] < part[3] and part[1] < box[3]


def sample(image: ImageMap, most: int = 5) -> list[tuple[int, Region]]:
    """Some tokens of every tile, with what to paint for them; at random, since a diagonal hides an exchange of axes."""
    found = []
    generator = np.random.default_rng(0)
    for tile in range(len(image.tiles)):
        held = [
            (position, part)
            for position, place in zip(image.positions, image.places, strict=True)
            if place[0] == tile and (part := region(image, position)) is not None
        ]
        found += [held[number] for number in generator.permutation(len(held))[:most]]
    return found


def covered(image: ImageMap, tile: int) -> tuple[float, float, float, float]:
    """The part of the picture under one tile's tokens, after seeing that their boxes meet without gap or overlap."""
    one = image.tiles[tile]
    held = {place[1:] for place in image.places if place[0] == tile}
    rows, columns = sorted({row for row, _ in held}), sorted({column for _, column in held})
    assert held == {(row, column) for row in rows for column in columns}
    assert rows == list(range(rows[0], rows[-1] + 1)) and columns == list(range(columns[0], columns[-1] + 1))
    for row, column in held:
        left, top, right, bottom = one.box(row, column)
        assert np.allclose((right, bottom), (one.box(row, column + 1)[0], one.box(row + 1, column)[1]))
        middle = ((left + right) / 2, (top + bottom) / 2)
        if 0 <= middle[0] < image.size[0] and 0 <= middle[1] < image.size[1]:
            found = image.at(*middle, tile=tile)
            assert found is not None and image.cell(found) == (tile, row, column)
    left, top, right, bottom = (*one.box(rows[0], columns[0])[:2], *one.box(rows[-1], columns[-1])[2:])
    return round(left, 6), round(top, 6), round(right, 6), round(bottom, 6)


def check(model: Any, encode: Encode, pictures: Sequence[Image.Image], images: Sequence[ImageMap]) -> int:
    """Paint the boxes of some tokens of every image, one at a time, and see which image tokens move.

    The token that moves most must be one whose box was painted, and the token itself must move more than any whose box
    was not. Returns how many were painted.
    """
    before = received(model, encode(pictures))
    painted = 0
    for number, image in enumerate(images):
        for position, part in sample(image):
            changed = [picture.copy() for picture in pictures]
            changed[number].paste((255, 30, 0), part)
            move = (received(model, encode(changed)) - before).norm(dim=-1)
            boxes = {other: one.box(other) if one is image else None for one in images for other in one.positions}
            hit = {other for other, box in boxes.items() if overlaps(box, part)}
            most = int(move.argmax())
            assert most in hit, (
                f"{part} moved {most} at {boxes.get(most)} most, not {position} at {image.box(position)}"
            )
            outside = [float(move[other]) for other in range(len(move)) if other not in hit]
            assert float(move[position]) > max(outside, default=0.0), f"{part}: {position} moved less than one outside"
            painted += 1
    return painted
