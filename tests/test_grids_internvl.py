"""InternVL: which tile each token is of and where it looks, proven by painting."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from zoo import internvl
from zoo.misplaced import blurred, cover, entering, misplaced, painted, quiet, smooth

from mechvlm.grids import internvl as layout

SIZES = {(60, 40): (2, 2), (40, 60): (1, 2), (58, 30): (2, 1), (100, 31): (3, 1), (24, 24): (1, 1), (17, 90): (1, 4)}
"""Pictures, and the columns and rows of tiles that each is cut into."""

SAID = "what colour is the cat ?"
torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
numpy2 = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # transformers 5.17's
every = pytest.mark.parametrize("name", list(internvl.VARIANTS))


def encode(seen: Sequence[Image.Image]) -> dict[str, Tensor]:
    return internvl.encoding_internvl(seen, SAID)


def settings() -> dict[str, Any]:
    return internvl.pictures().to_dict()


def laid_out(model: Any, seen: Sequence[Image.Image]) -> list[Any]:
    return layout.grids(model.config, encode(seen), settings(), [one.size for one in seen])


@every
@pytest.mark.parametrize("size", list(SIZES))
def test_the_token_that_a_box_belongs_to_changes_most_when_it_is_painted(name: str, size: tuple[int, int]) -> None:
    model, seen = quiet(internvl.VARIANTS[name].model(), "attention.projection_layer"), [smooth(*size)]
    found = laid_out(model, seen)
    assert len(found[0].tiles) == int(np.prod(SIZES[size])) + (SIZES[size] != (1, 1))
    assert misplaced(encode, lambda e: entering(model, e), seen, found) == []


@every
@pytest.mark.parametrize("size", [(60, 40), (100, 31)])
def test_a_line_one_pixel_wide_changes_the_row_or_column_that_holds_it(name: str, size: tuple[int, int]) -> None:
    model, seen = quiet(internvl.VARIANTS[name].model(), "attention.projection_layer"), smooth(*size)
    (grid,) = laid_out(model, [seen])
    assert blurred(encode, lambda e: entering(model, e), seen, grid) == []


def test_two_pictures_of_different_sizes_are_told_apart() -> None:
    model, seen = quiet(internvl.model_internvl(), "attention.projection_layer"), [smooth(60, 40), smooth(31, 77, 1)]
    found = laid_out(model, seen)
    assert [grid.size for grid in found] == [(60, 40), (31, 77)]
    assert [len(grid.tiles) for grid in found] == [5, 4]
    assert misplaced(encode, lambda e: entering(model, e), seen, found) == []


@pytest.mark.parametrize("size", list(SIZES))
def test_the_tiles_hold_every_pixel_once_and_so_does_the_whole(size: tuple[int, int]) -> None:
    model, seen = internvl.model_internvl(), [smooth(*size)]
    (grid,) = laid_out(model, seen)
    last = len(grid.tiles) - 1
    assert (cover(grid, [last]) == 1).all()
    assert (cover(grid, range(last) if last else [0]) == 1).all()
    assert len(grid.places) == grid.tokens == int((encode(seen)["input_ids"] == model.config.image_token_id).sum())
    assert grid.vision == (last + 1, 37)


def test_the_towers_patches_stand_row_by_row_after_a_class_token() -> None:
    model, seen = quiet(internvl.model_internvl(), "attention.projection_layer"), [smooth(60, 40)]
    (grid,), kept = laid_out(model, seen), []
    hook = model.model.vision_tower.encoder.layer[1].register_forward_hook(lambda _m, _a, out: kept.append(out))
    left, top, x, y = grid.tiles[1].view
    for row, column in ((0, 0), (2, 3), (5, 1)):
        box = (left + column * 4 * x, top + row * 4 * y, left + (column + 1) * 4 * x, top + (row + 1) * 4 * y)
        kept.clear()
        for one in (seen[0], painted(seen[0], box)):
            with torch.no_grad():
                model(**encode([one]))
        assert kept[0].shape == (*grid.vision, 16)
        assert int((kept[1] - kept[0])[1].norm(dim=-1).argmax()) == 1 + row * 6 + column
    hook.remove()


def test_the_canvas_is_the_processors_own() -> None:
    sizes = np.random.default_rng(0).integers(1, 2000, (300, 2)).tolist() + [[448 * i, 448 * j] for i, j in _few()]
    for (width, height), most in product(sizes, (1, 4, 6, 12)):
        for side in (24, 448):
            assert layout.canvas((width, height), side, 1, most) == get_optimal_tiled_canvas(
                (height, width), (side, side), 1, most
            )


def _few() -> list[tuple[int, int]]:
    return [(i, j) for i in range(1, 5) for j in range(1, 5)]


def test_a_picture_that_was_not_cut_is_seen_whole() -> None:
    config, seen = internvl.model_internvl().config, smooth(60, 40)
    held = dict(internvl.pictures()(images=[seen], return_tensors="pt", crop_to_patches=False))
    ids = torch.tensor([[0, *[config.image_token_id] * 9, 1]])
    (grid,) = layout.grids(config, {"input_ids": ids, "pixel_values": held["pixel_values"]}, settings(), [(60, 40)])
    assert len(grid.tiles) == 1
    assert grid.tiles[0].box(2, 2) == pytest.approx((40, 80 / 3, 60, 40))


def test_a_ready_encoding_of_a_known_picture_needs_no_settings() -> None:
    config = internvl.model_internvl().config
    for size in SIZES:
        seen = smooth(*size)
        assert layout.grids(config, encode([seen]), None, [size]) == layout.grids(
            config, encode([seen]), settings(), [size]
        )


def test_an_encoding_of_unknown_pictures_is_mapped_to_the_tiles_one_below_the_other() -> None:
    (grid,) = layout.grids(internvl.model_internvl().config, encode([smooth(58, 30)]), None, None)
    assert grid.size == (24, 72)
    assert [tile.box(0, 0) for tile in grid.tiles] == [(0, 0, 8, 8), (0, 24, 8, 32), (0, 48, 8, 56)]


def test_text_alone_has_no_grids() -> None:
    assert layout.grids(internvl.model_internvl().config, encode([]), None, []) == []


REFUSED: dict[str, tuple[dict[str, Any], list[tuple[int, int]], str]] = {
    "kind": (
        {"image_processor_type": "OtherImageProcessor"},
        [(58, 30)],
        "mechvlm does not know how OtherImageProcessor cuts pictures into tiles; InternVL's is GotOcr2ImageProcessor.",
    ),
    "tiles": (
        {"max_patches": 1},
        [(58, 30)],
        "the processor cuts a picture of 58 x 30 pixels into 1 x 1 tiles and a whole, and the text holds tokens of 3; "
        "the encoding was made with other settings or pictures.",
    ),
    "pictures": ({}, [(58, 30)] * 2, "there are 2 pictures, and the text holds 1 images; they must agree."),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_what_does_not_agree_is_refused(which: str) -> None:
    other, sizes, sentence = REFUSED[which]
    with pytest.raises(ValueError) as told:
        layout.grids(internvl.model_internvl().config, encode([smooth(58, 30)]), settings() | other, sizes)
    assert str(told.value) == sentence


def test_an_encoding_with_fewer_tokens_than_tiles_is_refused() -> None:
    held = encode([smooth(58, 30)]) | {"pixel_values": torch.zeros(2, 3, 24, 24)}
    with pytest.raises(ValueError) as told:
        layout.grids(internvl.model_internvl().config, held, None, None)
    assert str(told.value) == (
        "the text holds runs of [27] image tokens and pixel_values is (2, 3, 24, 24); a tile is 24 x 24 pixels and 9 "
        "tokens."
    )


def test_a_model_whose_tiles_are_not_square_is_refused() -> None:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=[24, 48], patch_size=[4, 4]), vision_feature_select_strategy="default"
    )
    with pytest.raises(ValueError) as told:
        layout.grids(config, {"pixel_values": torch.zeros(1, 3, 24, 48)}, None, None)
    assert str(told.value) == (
        "the model has tiles of 48 x 24 pixels in patches of 4 x 4 and vision_feature_select_strategy='default'; "
        "mechvlm knows square tiles and patches with 'default'."
    )


@pytest.mark.torchvision
@torchvision
@numpy2
def test_the_encoding_made_by_hand_is_the_real_processors() -> None:
    processor, seen = internvl.processor_internvl(), [smooth(60, 40), smooth(31, 77, 1)]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": SAID}]
    chat = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    real, made = dict(processor(text=[chat], images=seen, return_tensors="pt")), encode(seen)
    assert list(real) == list(made)
    assert all(torch.equal(real[key], made[key]) and real[key].dtype == made[key].dtype for key in real)


@pytest.mark.torchvision
@torchvision
@numpy2
def test_the_processor_cuts_pictures_whatever_its_image_processor_says() -> None:
    processor = internvl.processor_internvl()
    processor.image_processor.crop_to_patches = False
    seen = processor(text="<IMG_CONTEXT>", images=[smooth(58, 30)], return_tensors="pt")
    assert len(seen["pixel_values"]) == 3
