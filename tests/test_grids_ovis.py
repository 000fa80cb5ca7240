"""Ovis2's tiles and DeepSeek-VL's padded square: what a token's box says is what it shows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from zoo import boxes
from zoo.deepseek import MARK, model_deepseek_vl, processor_deepseek_vl
from zoo.ovis import IDS, SIDE, TOKENS, model_ovis2, processor_ovis2

from mechvlm.grids import deepseek, ovis
from mechvlm.imagemap import Grid

SIZES = [(60, 40), (40, 60), (100, 31), (24, 24), (16, 16), (33, 90)]


@pytest.fixture(scope="module")
def ovis2() -> PreTrainedModel:
    made = model_ovis2()
    boxes.weaken(made.model.vision_tower, "out_proj")
    return made


@pytest.fixture(scope="module")
def deepseek_vl() -> PreTrainedModel:
    made = model_deepseek_vl()
    boxes.weaken(made.model.vision_model, "out_proj")
    return made


def encoded(processor: Any, mark: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    text = " and ".join([mark] * len(pictures)) + " what is in the image ?"
    return dict(processor(images=list(pictures), text=[text], return_tensors="pt"))


def parts(pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    return encoded(processor_ovis2(), "<image>", pictures)


def squares(pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    return encoded(processor_deepseek_vl(), MARK, pictures)


def parts_of(model: PreTrainedModel, encoding: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[Grid]:
    return ovis.grids(model.config, encoding, processor_ovis2().image_processor.to_dict(), sizes)


def squares_of(model: PreTrainedModel, encoding: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[Grid]:
    return deepseek.grids(model.config, encoding, processor_deepseek_vl().image_processor.to_dict(), sizes)


def features(model: PreTrainedModel, encoding: dict[str, Tensor]) -> Tensor:
    """What each image token gets from the picture, in the order of the text."""
    return model.model.get_image_features(encoding["pixel_values"]).pooler_output.flatten(0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_painting_a_tokens_box_changes_that_token_most_in_ovis2(ovis2: PreTrainedModel, size: tuple[int, int]) -> None:
    (grid,) = parts_of(ovis2, parts([boxes.plain(*size)]), [size])
    assert boxes.check(grid, lambda picture: features(ovis2, parts([picture])), each=4) == 4 * len(grid.tiles)


@pytest.mark.parametrize("size", SIZES)
def test_painting_a_tokens_box_changes_that_token_most_in_deepseek_vl(
    deepseek_vl: PreTrainedModel, size: tuple[int, int]
) -> None:
    (grid,) = squares_of(deepseek_vl, squares([boxes.plain(*size)]), [size])
    assert boxes.check(grid, lambda picture: features(deepseek_vl, squares([picture])), each=6) >= 6


def test_of_two_pictures_the_second_ones_tokens_follow_the_first_ones_in_ovis2(ovis2: PreTrainedModel) -> None:
    first, size = boxes.plain(100, 31), (40, 60)
    found = parts_of(ovis2, parts([first, boxes.plain(*size)]), [first.size, size])
    count = len(found[0].places)
    assert boxes.check(found[1], lambda picture: features(ovis2, parts([first, picture]))[count:]) == 21


def test_of_two_pictures_the_second_ones_tokens_follow_the_first_ones_in_deepseek_vl(
    deepseek_vl: PreTrainedModel,
) -> None:
    first, size = boxes.plain(100, 31), (40, 60)
    found = squares_of(deepseek_vl, squares([first, boxes.plain(*size)]), [first.size, size])
    assert boxes.check(found[1], lambda picture: features(deepseek_vl, squares([first, picture]))[16:]) == 3


@pytest.mark.parametrize("size", SIZES)
def test_a_place_for_every_image_token_of_the_text(
    ovis2: PreTrainedModel, deepseek_vl: PreTrainedModel, size: tuple[int, int]
) -> None:
    pictures = [boxes.plain(*size), boxes.plain(50, 50)]
    for model, encoding, found in (
        (ovis2, parts(pictures), parts_of(ovis2, parts(pictures), [size, (50, 50)])),
        (deepseek_vl, squares(pictures), squares_of(deepseek_vl, squares(pictures), [size, (50, 50)])),
    ):
        ids = int((encoding["input_ids"] == model.config.image_token_id).sum())
        assert [grid.tokens for grid in found] == [len(grid.places) for grid in found]
        assert sum(grid.tokens for grid in found) == ids


@pytest.mark.parametrize("size", SIZES)
def test_whole_and_parts_each_cover_the_picture_once(ovis2: PreTrainedModel, size: tuple[int, int]) -> None:
    (grid,) = parts_of(ovis2, parts([boxes.plain(*size)]), [size])
    assert boxes.covered(grid, [0]) == pytest.approx(size[0] * size[1])
    if len(grid.tiles) > 1:
        assert boxes.covered(grid, range(1, len(grid.tiles))) == pytest.approx(size[0] * size[1])


@pytest.mark.parametrize("size", SIZES)
def test_the_square_covers_the_picture_once(deepseek_vl: PreTrainedModel, size: tuple[int, int]) -> None:
    (grid,) = squares_of(deepseek_vl, squares([boxes.plain(*size)]), [size])
    assert boxes.covered(grid, [0]) == pytest.approx(size[0] * size[1])


def test_the_grid_of_parts_is_the_one_that_the_processor_made(ovis2: PreTrainedModel) -> None:
    pictures = [boxes.plain(*size) for size in SIZES]
    made = processor_ovis2().image_processor(pictures, return_tensors="pt")["grids"].tolist()
    found = parts_of(ovis2, parts(pictures), SIZES)
    assert [len(grid.tiles) for grid in found] == [1 if made == [1, 1] else 1 + made[0] * made[1] for made in made]
    for (rows, columns), grid in zip(made, found, strict=True):
        last = grid.tiles[-1].view
        expected = (grid.size[0] * (columns - 1) / columns, grid.size[1] * (rows - 1) / rows)
        assert last[:2] == pytest.approx(expected)


def test_a_picture_that_is_not_cut_is_one_tile(ovis2: PreTrainedModel) -> None:
    processor = processor_ovis2(crop=False)
    encoding = encoded(processor, "<image>", [boxes.plain(100, 31)])
    (grid,) = ovis.grids(ovis2.config, encoding, processor.image_processor.to_dict(), [(100, 31)])
    assert len(grid.places) == TOKENS
    assert boxes.check(grid, lambda picture: features(ovis2, encoded(processor, "<image>", [picture]))) == 3


def test_the_vision_tower_takes_a_row_a_tile(ovis2: PreTrainedModel, deepseek_vl: PreTrainedModel) -> None:
    pictures, sizes = [boxes.plain(60, 40), boxes.plain(24, 24)], [(60, 40), (24, 24)]
    assert [grid.vision for grid in parts_of(ovis2, parts(pictures), sizes)] == [(7, 36), (1, 36)]
    assert [grid.vision for grid in squares_of(deepseek_vl, squares(pictures), sizes)] == [(1, 16), (1, 16)]
    seen = ovis2.model.vision_tower.transformer(parts(pictures)["pixel_values"]).last_hidden_state
    assert seen.shape[:2] == (8, 36)


def test_the_picture_matters_to_the_answer() -> None:
    for make, encode in ((model_ovis2, parts), (model_deepseek_vl, squares)):
        model = make(dtype=torch.float64)
        answers = [model(**encode([boxes.noise(seed)])).logits[0, -1] for seed in (0, 1)]
        assert all(answer.isfinite().all() for answer in answers)
        assert float((answers[0] - answers[1]).abs().max()) > 1e-3


def test_without_sizes_the_boxes_are_those_of_what_the_model_sees(
    ovis2: PreTrainedModel, deepseek_vl: PreTrainedModel
) -> None:
    (grid,) = ovis.grids(ovis2.config, parts([boxes.plain(60, 40)]), None, None)
    assert grid.size == (2 * SIDE, 3 * SIDE)
    assert grid.tiles[-1].box(0, 0) == (SIDE, 2 * SIDE, SIDE + 8, 2 * SIDE + 8)
    (grid,) = deepseek.grids(deepseek_vl.config, squares([boxes.plain(60, 40)]), None, None)
    assert grid.tiles[0].box(1, 2) == (12, 6, 18, 12)


def test_words_alone_have_no_grid(ovis2: PreTrainedModel, deepseek_vl: PreTrainedModel) -> None:
    words = {"input_ids": torch.tensor([[1, 20]])}
    assert ovis.grids(ovis2.config, words, None, None) == deepseek.grids(deepseek_vl.config, words, None, None) == []


def test_a_shorter_edge_that_became_the_smallest_allowed_is_stretched(deepseek_vl: PreTrainedModel) -> None:
    encoding, size = squares([boxes.plain(200, 10)]), (200, 10)
    (grid,) = squares_of(deepseek_vl, encoding, [size])
    # 10 pixels of 200 would have become 1 of 24; the smallest allowed is 6, in the second and third row of squares.
    assert grid.tiles[0].view == pytest.approx((0, -15, 200 / 24, 10 / 6))
    assert boxes.check(grid, lambda picture: features(deepseek_vl, squares([picture]))) == 3


def _text_of_another(encoding: dict[str, Tensor], _settings: dict[str, Any]) -> None:
    encoding["input_ids"] = torch.where(encoding["input_ids"] == IDS["<IMG_ROW>"], 20, encoding["input_ids"])


def _smaller(encoding: dict[str, Tensor], _settings: dict[str, Any]) -> None:
    encoding["pixel_values"] = encoding["pixel_values"][..., :16, :16]


def _cropped(_encoding: dict[str, Tensor], settings: dict[str, Any]) -> None:
    settings["do_center_crop"] = True


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            _text_of_another,
            "the text has places for 5 tiles, and there are 7; encode words and pictures together.",
        ),
        (
            _smaller,
            "the encoding's pictures are 16 x 16 pixels, and this model sees 24 x 24; the processor belongs to another "
            "model.",
        ),
        (
            _cropped,
            "the image processor has do_resize=True and do_center_crop=True, and mechvlm undoes Ovis2's resizing "
            "without a crop only; set do_resize = True and do_center_crop = False.",
        ),
    ],
)
def test_what_ovis2_cannot_have_made_is_refused(ovis2: PreTrainedModel, change: Any, sentence: str) -> None:
    encoding, settings = parts([boxes.plain(60, 40)]), processor_ovis2().image_processor.to_dict()
    change(encoding, settings)
    with pytest.raises(ValueError) as error:
        ovis.grids(ovis2.config, encoding, settings, [(60, 40)])
    assert str(error.value) == sentence


def test_tiles_that_tokens_do_not_fill_are_refused(ovis2: PreTrainedModel) -> None:
    encoding = parts([boxes.plain(60, 40)])
    stride = ovis2.config.vision_config.hidden_stride
    ovis2.config.vision_config.hidden_stride = 4
    try:
        with pytest.raises(ValueError) as error:
            parts_of(ovis2, encoding, [(60, 40)])
    finally:
        ovis2.config.vision_config.hidden_stride = stride
    assert str(error.value) == (
        "a tile of 24 pixels does not divide into tokens of 16, and mechvlm does not undo the padding that Ovis2 adds "
        "then; use a vision_config whose image_size is a multiple of patch_size * hidden_stride."
    )


@pytest.mark.parametrize(
    ("pixels", "changes", "sentence"),
    [
        (
            16,
            {},
            "the encoding's pictures are 16 x 16 pixels, and this model sees 24 x 24; the processor belongs to another "
            "model.",
        ),
        (
            24,
            {"do_pad": False},
            "the processor makes pictures of 24 x 16 pixels from one of 60 x 40, and this model sees 24 x 24; the "
            "processor belongs to another model.",
        ),
        (
            24,
            {"do_resize": False},
            "the processor makes pictures of 60 x 60 pixels from one of 60 x 40, and this model sees 24 x 24; the "
            "processor belongs to another model.",
        ),
    ],
)
def test_what_deepseek_vl_cannot_have_made_is_refused(
    deepseek_vl: PreTrainedModel, pixels: int, changes: dict[str, Any], sentence: str
) -> None:
    encoding = squares([boxes.plain(60, 40)])
    encoding["pixel_values"] = encoding["pixel_values"][..., :pixels, :pixels]
    settings = processor_deepseek_vl().image_processor.to_dict() | changes
    with pytest.raises(ValueError) as error:
        deepseek.grids(deepseek_vl.config, encoding, settings, [(60, 40)])
    assert str(error.value) == sentence
