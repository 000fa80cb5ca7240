"""Q-Former models: the patches of the vision tower, and the way from the queries to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from zoo import boxes
from zoo.queries import IMAGE, PATCH, QUERIES, SIDE, VARIANTS

from mechvlm.grids import queries
from mechvlm.imagemap import Grid, placed

SIZES = [(60, 40), (40, 60), (100, 31), (24, 24), (16, 16), (33, 90)]
PATCHES = (SIDE // PATCH) ** 2
HEADS = 4
every = pytest.mark.parametrize("name", VARIANTS)


def encoded(name: str, picture: Image.Image) -> dict[str, Tensor]:
    return dict(VARIANTS[name].processor()(images=[picture], text=["what is in the image ?"], return_tensors="pt"))


def grid_of(name: str, config: Any, picture: Image.Image) -> Grid:
    settings = VARIANTS[name].processor().image_processor.to_dict()
    (grid,) = queries.grids(config, encoded(name, picture), settings, [picture.size])
    return grid


def patches(model: Any, encoding: dict[str, Tensor]) -> Tensor:
    """What the Q-Former sees of the picture: one row a position of the vision tower."""
    return model.vision_model(pixel_values=encoding["pixel_values"]).last_hidden_state[0]


def looked(model: Any, encoding: dict[str, Tensor]) -> dict[int, Tensor]:
    """The weights of each cross-attention of the Q-Former: layer -> (image, head, query, patch)."""
    kept: dict[int, Tensor] = {}
    handles = [
        layer.crossattention.attention.register_forward_hook(
            lambda _module, _given, out, number=number: kept.update({number: out[1]})
        )
        for number, layer in enumerate(model.qformer.encoder.layer)
        if layer.has_cross_attention
    ]
    with torch.no_grad():
        model(**encoding)
    for handle in handles:
        handle.remove()
    return kept


@every
@pytest.mark.parametrize("size", SIZES)
def test_painting_a_patchs_box_changes_that_patch_most(name: str, size: tuple[int, int]) -> None:
    model = VARIANTS[name].model()
    boxes.weaken(model.vision_model, "projection")
    grid = grid_of(name, model.config, boxes.plain(*size))
    assert boxes.check(grid, lambda picture: patches(model, encoded(name, picture)), each=6) == 6


@every
@pytest.mark.parametrize("size", SIZES)
def test_the_boxes_cover_the_picture_once(name: str, size: tuple[int, int]) -> None:
    grid = grid_of(name, VARIANTS[name].model().config, boxes.plain(*size))
    assert boxes.covered(grid, [0]) == pytest.approx(size[0] * size[1])


@every
def test_the_queries_stand_first_in_the_text_and_the_places_are_the_towers(name: str) -> None:
    model, picture = VARIANTS[name].model(), boxes.plain(60, 40)
    encoding, grid = encoded(name, picture), grid_of(name, model.config, picture)
    assert encoding["input_ids"][0, :QUERIES].tolist() == [IMAGE] * QUERIES
    assert int((encoding["input_ids"] == IMAGE).sum()) == grid.tokens == QUERIES
    assert grid.of == "patches"
    assert grid.vision == (1, PATCHES + 1) == (1, len(grid.places))
    assert grid.places[0] is None
    assert patches(model, encoding).shape[0] == len(grid.places)


@every
def test_every_second_layer_of_the_q_former_looks_at_the_patches(name: str) -> None:
    model, encoding = VARIANTS[name].model("eager"), encoded(name, boxes.plain(60, 40))
    weights = looked(model, encoding)
    assert list(weights) == [0, 2]
    for pattern in weights.values():
        assert pattern.shape == (1, HEADS, QUERIES, PATCHES + 1)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(1, HEADS, QUERIES))
        assert pattern.max() > 2 / (PATCHES + 1)  # not uniform


@every
def test_attention_to_the_queries_becomes_attention_to_patches_through_the_q_formers_own(name: str) -> None:
    model, picture = VARIANTS[name].model("eager"), boxes.plain(60, 40)
    grid = grid_of(name, model.config, picture)
    image = placed(grid, range(len(grid.places)))
    for pattern in looked(model, encoded(name, picture)).values():
        to_queries = torch.softmax(torch.arange(QUERIES).float(), 0)
        composed = to_queries @ pattern[0].mean(0)
        assert float(composed.sum()) == pytest.approx(1)
        heat = image.heat(composed[list(image.positions)])
        assert heat.shape == (40, 60)
        assert float(composed[1:].sum()) < 1  # the class token takes its share, and has no place
        assert heat[0, 0] == pytest.approx(float(composed[1]))
        assert heat[39, 59] == pytest.approx(float(composed[PATCHES]))


@every
def test_no_query_stands_for_a_place(name: str) -> None:
    model = VARIANTS[name].model()
    boxes.weaken(model.vision_model, "projection")
    plain = boxes.plain(24, 24)
    painted = plain.copy()
    painted.paste(boxes.COLOUR, (0, 0, PATCH, PATCH))
    moved = []
    for picture in (plain, painted):
        kept: list[Tensor] = []
        handle = model.language_projection.register_forward_hook(
            lambda _module, _given, out, kept=kept: kept.append(out[0])
        )
        with torch.no_grad():
            model(**encoded(name, picture))
        handle.remove()
        moved.append(kept[0])
    # Every query moves when one patch does.
    assert float((moved[1] - moved[0]).norm(dim=-1).min()) > 1e-4


@every
def test_the_picture_matters_to_the_answer(name: str) -> None:
    model = VARIANTS[name].model(dtype=torch.float64)
    answers = [model(**encoded(name, boxes.noise(seed))).logits[0, -1] for seed in (0, 1)]
    assert all(answer.isfinite().all() for answer in answers)
    assert float((answers[0] - answers[1]).abs().max()) > 1e-3


@every
def test_without_sizes_the_boxes_are_those_of_what_the_model_sees(name: str) -> None:
    config, encoding = VARIANTS[name].model().config, encoded(name, boxes.plain(60, 40))
    (grid,) = queries.grids(config, encoding, None, None)
    assert grid.size == (SIDE, SIDE)
    assert grid.tiles[0].box(1, 2) == (12, 6, 18, 12)


@every
def test_words_alone_have_no_grid(name: str) -> None:
    words = {"input_ids": torch.tensor([[1, 20]])}
    assert queries.grids(VARIANTS[name].model().config, words, None, None) == []


def _two(encoding: dict[str, Tensor]) -> None:
    encoding["pixel_values"] = encoding["pixel_values"].repeat(2, 1, 1, 1)


def _small(encoding: dict[str, Tensor]) -> None:
    encoding["pixel_values"] = encoding["pixel_values"][..., :12, :12]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            _two,
            "this prompt has 2 images, and blip-2 writes the queries of one before the words; ask about one image at a "
            "time.",
        ),
        (
            _small,
            "the encoding's pictures are 12 x 12 pixels, and this model sees 24 x 24; the processor belongs to another "
            "model.",
        ),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(change: Callable[[dict[str, Tensor]], None], sentence: str) -> None:
    encoding = encoded("blip2-opt", boxes.plain(60, 40))
    change(encoding)
    with pytest.raises(ValueError) as error:
        queries.grids(VARIANTS["blip2-opt"].model().config, encoding, None, None)
    assert str(error.value) == sentence
