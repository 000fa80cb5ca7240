"""Molmo2's whole picture and overlapping crops: what a token's box says is what it shows."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from zoo import boxes
from zoo.molmo import IDS, SIDE, encoding_molmo2, model_molmo2, pictures_molmo2, processor_molmo2

from mechvlm.grids import molmo
from mechvlm.imagemap import Grid

pytestmark = pytest.mark.skipif(
    find_spec("transformers.models.molmo2") is None, reason="this version of transformers has no Molmo2"
)
SIZES = [(60, 40), (40, 60), (100, 31), (24, 24), (16, 16), (33, 90)]
WORDS = "what is in the image ?"
SETTINGS = [
    {},
    {"pooling_size": [3, 3]},  # two patches are missing, one before and one after
    {"pooling_size": [1, 2], "overlap_margins": [2, 1]},
    {"pooling_size": [4, 2], "overlap_margins": [0, 1], "max_crops": 3},
    {"pooling_size": [1, 1], "overlap_margins": [0, 0]},
]


@pytest.fixture(scope="module")
def model() -> Any:
    made = model_molmo2()
    boxes.weaken(made.model.vision_tower, "o_proj")
    return made


def grids(
    model: Any, pictures: Sequence[Image.Image], given: dict[str, Any] | None = None, *, known: bool = True
) -> list[Grid]:
    settings = pictures_molmo2(**(given or {})).to_dict() if known else None
    encoding = encoding_molmo2(pictures, WORDS, **(given or {}))
    return molmo.grids(model.config, encoding, settings, [picture.size for picture in pictures])


def features(model: Any, pictures: Sequence[Image.Image], given: dict[str, Any] | None = None) -> Tensor:
    """What is added to each image token, in the order of the text."""
    encoding = encoding_molmo2(pictures, WORDS, **(given or {}))
    names = ("pixel_values", "image_token_pooling", "image_grids")
    return torch.cat(model.get_image_features(**{name: encoding[name] for name in names}).pooler_output)


@pytest.mark.parametrize("size", SIZES)
def test_painting_a_tokens_box_changes_that_token_most(model: Any, size: tuple[int, int]) -> None:
    (grid,) = grids(model, [boxes.plain(*size)])
    assert boxes.check(grid, lambda picture: features(model, [picture]), each=5) == 10


@pytest.mark.parametrize("given", SETTINGS)
@pytest.mark.parametrize("size", [(60, 40), (100, 31), (33, 90)])
def test_painting_shows_the_same_whatever_is_pooled_and_dropped(
    model: Any, size: tuple[int, int], given: dict[str, Any]
) -> None:
    (grid,) = grids(model, [boxes.plain(*size)], given)
    assert boxes.check(grid, lambda picture: features(model, [picture], given), each=4) == 8


def test_of_two_pictures_the_second_ones_tokens_follow_the_first_ones(model: Any) -> None:
    first = boxes.plain(100, 31)
    found = grids(model, [first, boxes.plain(40, 60)])
    count = found[0].tokens
    assert boxes.check(found[1], lambda picture: features(model, [first, picture])[count:]) == 6


@pytest.mark.parametrize("size", SIZES)
def test_a_place_for_every_image_token_of_the_text(model: Any, size: tuple[int, int]) -> None:
    pictures = [boxes.plain(*size), boxes.plain(50, 50)]
    ids = encoding_molmo2(pictures, WORDS)["input_ids"]
    found = grids(model, pictures)
    assert [grid.tokens for grid in found] == [len(grid.places) for grid in found]
    assert sum(grid.tokens for grid in found) == int((ids == IDS["<im_patch>"]).sum())


@pytest.mark.parametrize("given", SETTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_each_view_covers_the_picture_once(model: Any, size: tuple[int, int], given: dict[str, Any]) -> None:
    (grid,) = grids(model, [boxes.plain(*size)], given)
    assert boxes.covered(grid, [0]) == pytest.approx(size[0] * size[1])
    assert boxes.covered(grid, [1]) == pytest.approx(size[0] * size[1])


@pytest.mark.parametrize("given", SETTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_the_encoding_alone_says_how_the_picture_was_cut(
    model: Any, size: tuple[int, int], given: dict[str, Any]
) -> None:
    pictures = [boxes.plain(50, 50), boxes.plain(*size)]
    assert grids(model, pictures, given, known=False) == grids(model, pictures, given)


def test_the_vision_tower_takes_a_row_a_crop(model: Any) -> None:
    pictures = [boxes.plain(60, 40), boxes.plain(16, 16)]
    assert [grid.vision for grid in grids(model, pictures)] == [(7, 25), (2, 25)]
    seen = model.model.vision_tower(encoding_molmo2(pictures, WORDS)["pixel_values"]).last_hidden_state
    assert seen.shape[:2] == (9, 25)


def test_the_picture_matters_to_the_answer() -> None:
    model = model_molmo2(dtype=torch.float64)
    answers = [model(**encoding_molmo2([boxes.noise(seed)], WORDS)).logits[0, -1] for seed in (0, 1)]
    assert all(answer.isfinite().all() for answer in answers)
    assert float((answers[0] - answers[1]).abs().max()) > 1e-3


def test_without_the_kinds_of_its_tokens_the_model_answers_as_if_images_were_words() -> None:
    model, encoding = model_molmo2(), encoding_molmo2([boxes.noise(0)], WORDS)
    kinds = encoding.pop("mm_token_type_ids")
    causal = model(**encoding).logits[0, -1]
    assert float((model(**encoding, mm_token_type_ids=kinds).logits[0, -1] - causal).abs().max()) > 1e-3


def test_without_sizes_the_boxes_are_those_of_the_canvas(model: Any) -> None:
    (grid,) = molmo.grids(model.config, encoding_molmo2([boxes.plain(60, 40)], WORDS), None, None)
    assert grid.size == (44, 32)
    assert grid.tiles[1].box(1, 2) == (16, 8, 24, 16)
    assert grid.tiles[0].box(0, 0) == pytest.approx((0, 0, 8 * 44 / SIDE, 8 * 32 / SIDE))


def test_words_alone_have_no_grid(model: Any) -> None:
    assert molmo.grids(model.config, {"input_ids": torch.tensor([[1, 20]])}, None, None) == []


def _fewer_patches(encoding: dict[str, Tensor]) -> None:
    encoding["pixel_values"] = encoding["pixel_values"][:, :16]


def _other_patches(encoding: dict[str, Tensor]) -> None:
    encoding["image_token_pooling"] = encoding["image_token_pooling"].flip(0)


@pytest.mark.parametrize(
    ("change", "known", "sentence"),
    [
        (
            _fewer_patches,
            True,
            "the encoding's crops have 16 patches, and this model sees 5 x 5 and needs a square; the processor belongs "
            "to another model.",
        ),
        (
            _other_patches,
            True,
            "the patches that image_token_pooling names are not the cut that the image processor's settings make into "
            "6 crops of 5 x 5 patches; encode the picture with this model's processor.",
        ),
        (
            _other_patches,
            False,
            "the patches that image_token_pooling names are no known cut into 6 crops of 5 x 5 patches; encode the "
            "picture with this model's processor.",
        ),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(
    model: Any, change: Callable[[dict[str, Tensor]], None], known: bool, sentence: str
) -> None:
    encoding = encoding_molmo2([boxes.plain(60, 40)], WORDS)
    change(encoding)
    settings = pictures_molmo2().to_dict() if known else None
    with pytest.raises(ValueError) as error:
        molmo.grids(model.config, encoding, settings, [(60, 40)])
    assert str(error.value) == sentence


@pytest.mark.torchvision
@pytest.mark.skipif(find_spec("torchvision") is None, reason="Molmo2's processor needs torchvision")
@pytest.mark.parametrize("sizes", [[(60, 40)], [(100, 31), (16, 16), (33, 90)]])
def test_the_encoding_made_without_torchvision_is_the_processors_own(sizes: list[tuple[int, int]]) -> None:
    pictures = [boxes.plain(*size) for size in sizes]
    processor = processor_molmo2()
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": WORDS}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs, ours = processor(text=[text], images=pictures, return_tensors="pt"), encoding_molmo2(pictures, WORDS)
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
