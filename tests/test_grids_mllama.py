"""Mllama's tiles, and the keys of its cross-attention: what a key's box says is what it shows."""

from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from zoo import boxes
from zoo.mllama import IMAGE, PATCH, SIDE, TILES, model_mllama, processor_mllama

from mechvlm.grids import mllama
from mechvlm.imagemap import Grid

# transformers 5.17 calls its own vision layers by an argument that it says is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.hidden_state. is deprecated:FutureWarning")
SIZES = [(60, 40), (40, 60), (100, 31), (24, 24), (16, 16), (7, 5), (33, 90)]
KEYS = (SIDE // PATCH) ** 2 + 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = model_mllama()
    boxes.weaken(made.model.vision_model, "o_proj")
    return made


def encoded(pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    text = "<s> user : " + "<|image|>" * len(pictures) + " what is in the image ?"
    return dict(processor_mllama()(images=[list(pictures)], text=[text], return_tensors="pt"))


def grids(model: PreTrainedModel, encoding: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[Grid]:
    return mllama.grids(model.config, encoding, processor_mllama().image_processor.to_dict(), sizes)


def keys(model: PreTrainedModel, encoding: dict[str, Tensor]) -> Tensor:
    """What the cross-attention of every layer makes its keys of: one row a key."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    seen = model.model.vision_model(**{name: encoding[name] for name in names}).last_hidden_state
    return model.model.multi_modal_projector(seen).flatten(0, 3)


@pytest.mark.parametrize("size", SIZES)
def test_painting_a_keys_box_changes_that_key_most(model: PreTrainedModel, size: tuple[int, int]) -> None:
    (grid,) = grids(model, encoded([boxes.plain(*size)]), [size])
    assert boxes.check(grid, lambda picture: keys(model, encoded([picture])), each=4) >= 4


def test_of_two_pictures_the_second_ones_keys_follow_the_first_ones(model: PreTrainedModel) -> None:
    first, size = boxes.plain(33, 90), (60, 40)
    found = grids(model, encoded([first, boxes.plain(*size)]), [first.size, size])
    assert [grid.size for grid in found] == [first.size, size]

    def features(picture: Image.Image) -> Tensor:
        seen = keys(model, encoded([first, picture]))
        assert torch.equal(seen[: TILES * KEYS], keys(model, encoded([first, first]))[: TILES * KEYS])
        return seen[TILES * KEYS :]

    assert boxes.check(found[1], features) == 12


@pytest.mark.parametrize("size", SIZES)
def test_the_boxes_cover_the_picture_once(model: PreTrainedModel, size: tuple[int, int]) -> None:
    (grid,) = grids(model, encoded([boxes.plain(*size)]), [size])
    assert boxes.covered(grid, range(len(grid.tiles))) == pytest.approx(size[0] * size[1])


def test_one_image_token_stands_before_a_class_token_and_patches_of_every_slot(model: PreTrainedModel) -> None:
    encoding = encoded([boxes.plain(100, 31)])
    (grid,) = grids(model, encoding, [(100, 31)])
    assert (encoding["input_ids"] == IMAGE).sum() == grid.tokens == 1
    assert grid.of == "keys"
    assert len(grid.places) == TILES * KEYS == keys(model, encoding).shape[0]
    assert [number for number, place in enumerate(grid.places) if place is None] == [0, 17, 34, 51]


def test_slots_that_no_tile_fills_stand_for_no_place(model: PreTrainedModel) -> None:
    (grid,) = grids(model, encoded([boxes.plain(16, 16)]), [(16, 16)])
    assert len(grid.tiles) == 1
    assert set(grid.places[KEYS:]) == {None}


def test_the_vision_tower_holds_the_tiles_of_an_image_in_one_padded_row(model: PreTrainedModel) -> None:
    encoding = encoded([boxes.plain(60, 40), boxes.plain(16, 16)])
    seen: list[torch.Size] = []
    layer = model.model.vision_model.transformer.layers[0]
    handle = layer.register_forward_hook(lambda _module, _given, out: seen.append(out.shape))
    keys(model, encoding)
    handle.remove()
    found = grids(model, encoding, [(60, 40), (16, 16)])
    assert seen[0][:2] == (2, 96)
    assert [grid.vision for grid in found] == [(1, 96), (1, 96)]


def test_words_before_the_image_token_look_at_it_too_and_at_slots_that_no_tile_fills() -> None:
    model, encoding = model_mllama("eager"), encoded([boxes.noise(0, 16, 16)])
    kept: list[Tensor] = []
    layer = model.model.language_model.layers[1].cross_attn
    handle = layer.register_forward_hook(lambda _module, _given, out: kept.append(out[1]))
    model(**encoding)
    handle.remove()
    mass = kept[0][0].reshape(4, -1, TILES, KEYS).sum(-1)
    at = encoding["input_ids"][0].tolist().index(IMAGE)
    assert at > 0
    assert float(mass[:, :at, 1:].min()) > 0.01
    assert float(mass[:, at:, 1:].max()) == 0


def test_the_picture_matters_to_the_answer() -> None:
    model = model_mllama(dtype=torch.float64)
    answers = [model(**encoded([boxes.noise(seed)])).logits[0, -1] for seed in (0, 1)]
    assert all(answer.isfinite().all() for answer in answers)
    assert float((answers[0] - answers[1]).abs().max()) > 1e-3


def test_without_sizes_the_boxes_are_those_of_the_canvas(model: PreTrainedModel) -> None:
    (grid,) = mllama.grids(model.config, encoded([boxes.plain(100, 31)]), None, None)
    assert grid.size == (4 * SIDE, SIDE)
    assert grid.tiles[3].box(0, 0) == (3 * SIDE, 0, 3 * SIDE + PATCH, PATCH)


def test_words_alone_have_no_grid(model: PreTrainedModel) -> None:
    assert mllama.grids(model.config, {"input_ids": torch.tensor([[1, 20]])}, None, None) == []


def _fewer_tiles(encoding: dict[str, Tensor]) -> None:
    encoding["pixel_values"] = encoding["pixel_values"][:, :, :2]


def _other_shape(encoding: dict[str, Tensor]) -> None:
    encoding["aspect_ratio_ids"] = torch.tensor([[1]])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            _fewer_tiles,
            "the encoding has 2 tiles of 16 x 16 pixels an image, and this model sees 4 of 16 x 16; the processor "
            "belongs to another model.",
        ),
        (
            _other_shape,
            "the encoding has 1 x 1 tiles for image 0, and the processor cuts a picture of 60 x 40 pixels into 2 x 2; "
            "the encoding was made of another picture.",
        ),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(
    model: PreTrainedModel, change: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    encoding = encoded([boxes.plain(60, 40)])
    change(encoding)
    with pytest.raises(ValueError) as error:
        grids(model, encoding, [(60, 40)])
    assert str(error.value) == sentence
