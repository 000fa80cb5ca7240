"""Mistral Small 3.1 and Pixtral: where each token looks, proven by painting."""

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PixtralImageProcessor
from zoo import mistral
from zoo.misplaced import blurred, cover, entering, misplaced, painted, quiet, smooth

from mechvlm.grids import pixtral as layout

VARIANTS = mistral.VARIANTS
SIZES = [(60, 40), (40, 60), (100, 31), (48, 48), (17, 90)]
SAID = "what colour is the cat ?"
torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
every = pytest.mark.parametrize("name", list(VARIANTS))


def encode(seen: Sequence[Image.Image]) -> dict[str, Tensor]:
    return mistral.encoding(seen, SAID)


def settings() -> dict[str, Any]:
    return mistral.pictures(4).to_dict()


def laid_out(model: Any, seen: Sequence[Image.Image]) -> list[Any]:
    return layout.grids(model.config, encode(seen), settings(), [one.size for one in seen])


@every
@pytest.mark.parametrize("size", SIZES)
def test_the_token_that_a_box_belongs_to_changes_most_when_it_is_painted(name: str, size: tuple[int, int]) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attention.o_proj"), [smooth(*size)]
    assert misplaced(encode, lambda e: entering(model, e), seen, laid_out(model, seen)) == []


@every
@pytest.mark.parametrize("size", [(60, 40), (100, 31)])
def test_a_line_one_pixel_wide_changes_the_row_or_column_that_holds_it(name: str, size: tuple[int, int]) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attention.o_proj"), smooth(*size)
    (grid,) = laid_out(model, [seen])
    assert blurred(encode, lambda e: entering(model, e), seen, grid) == []


@every
def test_two_pictures_of_different_sizes_are_told_apart(name: str) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attention.o_proj"), [smooth(60, 40), smooth(31, 77, 1)]
    found = laid_out(model, seen)
    assert [(grid.tiles[0].rows, grid.tiles[0].columns) for grid in found] == [(4, 6), (6, 3)]
    assert misplaced(encode, lambda e: entering(model, e), seen, found) == []


@every
def test_boxes_hold_every_pixel_once_and_every_image_token_has_a_place(name: str) -> None:
    model = VARIANTS[name].model()
    for size in SIZES:
        (grid,) = laid_out(model, [smooth(*size)])
        assert (cover(grid, [0]) == 1).all()
        held = int((encode([smooth(*size)])["input_ids"] == model.config.image_token_id).sum())
        assert len(grid.places) == grid.tokens == held


@every
def test_the_towers_patches_stand_image_by_image_row_by_row(name: str) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attention.o_proj"), [smooth(60, 40), smooth(31, 77, 1)]
    found, kept = laid_out(model, seen), []
    hook = model.model.vision_tower.transformer.layers[1].register_forward_hook(lambda _m, _a, out: kept.append(out))
    side = model.config.vision_config.patch_size
    left, top, x, y = found[1].tiles[0].view
    columns = found[1].tiles[0].columns * 8 // side
    for row, column in ((0, 0), (2, 1), (5, 2)):
        box = (left + column * side * x, top + row * side * y, (column + 1) * side * x, (row + 1) * side * y)
        kept.clear()
        for one in (seen[1], painted(seen[1], box)):
            with torch.no_grad():
                model(**encode([seen[0], one]))
        assert kept[0].shape == (1, found[0].vision[1] + found[1].vision[1], 16)
        at = int((kept[1] - kept[0])[0].norm(dim=-1).argmax())
        assert at == found[0].vision[1] + row * columns + column
    hook.remove()


@pytest.mark.parametrize("small", [False, True])
def test_pictures_of_any_size_are_resized_as_the_processor_does_it(small: bool) -> None:
    made = mistral.pictures(8) if small else PixtralImageProcessor()
    token = 8 if small else 16
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=token), model_type="llava")
    for width, height in np.random.default_rng(0).integers(9, 130 if small else 1400, (60, 2)).tolist():
        held = dict(
            made(images=[smooth(width, height)] if small else [Image.new("L", (width, height))], return_tensors="pt")
        )
        (grid,) = layout.grids(config, held, made.to_dict(), [(width, height)])
        assert grid.tiles[0].box(grid.tiles[0].rows - 1, grid.tiles[0].columns - 1)[2:] == pytest.approx(
            (width, height)
        )


def test_an_encoding_of_unknown_pictures_is_mapped_to_what_the_model_sees() -> None:
    found = layout.grids(mistral.model_mistral3().config, encode([smooth(60, 40), smooth(31, 77)]), None, None)
    assert [grid.size for grid in found] == [(48, 32), (24, 48)]
    assert found[1].tiles[0].box(5, 2) == (16, 40, 24, 48)


def test_without_image_sizes_the_whole_of_every_picture_is_seen() -> None:
    held = {"pixel_values": torch.zeros(2, 3, 16, 24)}
    assert [grid.size for grid in layout.grids(mistral.model_pixtral().config, held, None, None)] == [(24, 16)] * 2


def test_a_picture_that_is_not_resized_loses_what_fills_no_token() -> None:
    held = {"pixel_values": torch.zeros(1, 3, 21, 30), "image_sizes": torch.tensor([[21, 30]])}
    (grid,) = layout.grids(mistral.model_mistral3().config, held, settings() | {"do_resize": False}, [(30, 21)])
    assert grid.tiles[0].box(1, 2) == (16, 8, 24, 16)
    assert grid.tokens == 6
    assert grid.vision == (1, 35)


def test_text_alone_has_no_grids() -> None:
    assert layout.grids(mistral.model_mistral3().config, encode([]), None, []) == []


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kind": (
        {},
        {"image_processor_type": "OtherImageProcessor"},
        "mechvlm does not know how OtherImageProcessor resizes pictures; Pixtral's is PixtralImageProcessor.",
    ),
    "crop": (
        {},
        {"do_center_crop": True},
        "PixtralImageProcessor has do_center_crop=True, which mechvlm does not undo; set "
        "image_processor.do_center_crop = False.",
    ),
    "size": (
        {},
        {"size": {"longest_edge": 32}},
        "the processor makes pictures of 32 x 24 pixels from one of 60 x 40, and image_sizes speaks of 48 x 32; the "
        "encoding was made with other settings or pictures.",
    ),
    "many": (
        {"image_sizes": torch.tensor([[32, 48], [8, 8]])},
        {},
        "image_sizes is [(32, 48), (8, 8)] and pixel_values is (1, 3, 32, 48); they must be of the same pictures.",
    ),
    "small": (
        {"image_sizes": torch.tensor([[4, 48]])},
        {},
        "image_sizes is [(4, 48)], and a token of this model is 8 x 8 pixels.",
    ),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_what_does_not_agree_is_refused(which: str) -> None:
    encoding, other, sentence = REFUSED[which]
    held = {"pixel_values": torch.zeros(1, 3, 32, 48), "image_sizes": torch.tensor([[32, 48]])} | encoding
    with pytest.raises(ValueError) as told:
        layout.grids(mistral.model_mistral3().config, held, settings() | other, [(60, 40)])
    assert str(told.value) == sentence


def test_another_number_of_pictures_than_the_encoding_holds_is_refused() -> None:
    with pytest.raises(ValueError) as told:
        layout.grids(mistral.model_mistral3().config, encode([smooth(60, 40)]), None, [(60, 40)] * 2)
    assert str(told.value) == "there are 2 pictures, and pixel_values holds 1; they must agree."


@pytest.mark.torchvision
@torchvision
@every
def test_the_encoding_made_by_hand_is_the_real_processors(name: str) -> None:
    processor, seen = VARIANTS[name].processor(), [smooth(60, 40), smooth(31, 77, 1)]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": SAID}]
    chat = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    real, made = dict(processor(text=[chat], images=seen, return_tensors="pt")), encode(seen)
    assert list(real) == list(made)
    assert all(torch.equal(real[key], made[key]) and real[key].dtype == made[key].dtype for key in real)
