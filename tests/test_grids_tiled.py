"""Pictures stretched to whole squares, cut, and followed by all of them in one: Idefics 3, SmolVLM, Aya Vision."""

import importlib.util
from dataclasses import replace

import pytest
import torch
import zoo
from zoo import aya, idefics, painting

SIZES = ([(60, 40)], [(40, 60)], [(100, 31)], [(31, 100)], [(48, 48)], [(2000, 90)], [(90, 61), (33, 70)])
NAMES = ("idefics3", "smolvlm", "aya_vision")
VARIANTS = idefics.VARIANTS | aya.VARIANTS
NEEDS_TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the processor holds a video processor, for torchvision"
)


def names(sizes):
    return " and ".join(f"{width}x{height}" for width, height in sizes)


def tower_of(model):
    return model.model.vision_tower if model.config.model_type == "aya_vision" else model.model.vision_model


def made(name, sizes, side=24, **more):
    """A model that shows places, how to encode pictures for it, some pictures, the settings, the grids and maps."""
    from mechvlm.grids import tiled

    variant = VARIANTS[name]
    model = variant.model(**({"side": side} if side != 24 else {}))
    painting.weak(model, tower_of(model))
    if variant.needs_torchvision:
        processor, seen = None, idefics.pictures_of("smolvlm", **more)
    else:
        processor = {"idefics3": idefics.processor_idefics3, "aya_vision": aya.processor_aya_vision}[name](**more)
        seen = processor.image_processor
    pictures = [painting.plain(*size) for size in sizes]

    def encode(some):
        if processor is None:
            assert variant.encoding is not None
            return variant.encoding(some, **more)
        return painting.encoded(variant, processor, some)

    encoding, settings = encode(pictures), seen.to_dict()
    grids = tiled.grids(model.config, encoding, settings, sizes)
    return model, encode, pictures, settings, grids, painting.maps(grids, encoding, model.config.image_token_id)


@pytest.mark.parametrize("sizes", SIZES, ids=names)
@pytest.mark.parametrize("name", NAMES)
def test_painting_a_tokens_box_moves_that_token(name, sizes):
    model, encode, pictures, _, _, images = made(name, sizes)
    assert painting.check(model, encode, pictures, images) >= 8 * len(sizes)


@pytest.mark.parametrize(
    "size",
    [{"longest_edge": 40}, pytest.param({"longest_edge": 100}, marks=zoo.second_environment), {"longest_edge": 20}],
)
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_painting_shows_the_place_whatever_size_the_picture_is_given(name, size):
    model, encode, pictures, _, _, images = made(name, [(60, 41), (33, 70)], size=size)
    assert painting.check(model, encode, pictures, images) >= 8


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_painting_shows_the_place_in_a_picture_that_is_not_cut(name):
    model, encode, pictures, _, _, images = made(name, [(60, 41), (33, 70)], do_image_splitting=False)
    assert [len(image.tiles) for image in images] == [1, 1]
    assert painting.check(model, encode, pictures, images) == 10


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_painting_shows_the_place_where_squares_are_no_whole_patches(name):
    more = {"size": {"longest_edge": 78}, "max_image_size": {"longest_edge": 26}}
    model, encode, pictures, _, _, images = made(name, [(156, 104)], 26, **more)
    # The picture is twice as large as 3 x 2 squares of 26 pixels, of which the tower sees 24.
    assert images[0].box(9) == (52, 0, 68, 16)
    assert images[0].cell(images[0].at(50, 10))[0] == 6
    assert painting.check(model, encode, pictures, images) == 35


@pytest.mark.parametrize("most", [1, 2, 5])
def test_painting_shows_the_place_however_many_squares_aya_may_make(most):
    model, encode, pictures, _, _, images = made("aya_vision", [(60, 40), (33, 70)], max_patches=most)
    assert max(len(image.tiles) for image in images) <= most + 1
    assert painting.check(model, encode, pictures, images) >= 8


def test_painting_finds_a_map_with_all_of_the_picture_first():
    model, encode, pictures, _, _, images = made("idefics3", [(60, 40)])
    tiles = images[0].tiles
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [replace(images[0], tiles=(tiles[-1], *tiles[:-1]))])


def test_painting_finds_a_map_with_squares_column_by_column():
    model, encode, pictures, _, _, images = made("aya_vision", [(60, 40)])
    tiles = images[0].tiles
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [replace(images[0], tiles=(*tiles[0:6:2], *tiles[1:6:2], tiles[6]))])


@pytest.mark.parametrize("name", NAMES)
def test_the_boxes_cover_the_picture_twice_without_gap_or_overlap(name):
    for image in made(name, [(60, 40), (31, 100)])[-1]:
        parts = [painting.covered(image, tile) for tile in range(len(image.tiles))]
        assert parts[-1] == (0, 0, *image.size)
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in parts[:-1]]
        assert sum(areas) == pytest.approx(image.size[0] * image.size[1])
        assert (min(part[0] for part in parts), max(part[2] for part in parts)) == (0, image.size[0])
        assert (min(part[1] for part in parts), max(part[3] for part in parts)) == (0, image.size[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_has_as_many_rows_and_positions_as_the_grids_say(name):
    model, encode, pictures, _, grids, _ = made(name, [(60, 40), (31, 100)])
    (rows, positions), *others = painting.tower_shapes(model, tower_of(model).encoder.layers, encode(pictures))
    assert not others
    assert rows == sum(grid.vision[0] for grid in grids)
    assert {positions} == {grid.vision[1] for grid in grids}


@pytest.mark.parametrize("sizes", [*SIZES, [(20, 20), (60, 40), (31, 100), (48, 48)]], ids=names)
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_the_text_of_a_ready_encoding_says_how_the_squares_lie(name, sizes):
    from mechvlm.grids import tiled

    model, encode, pictures, settings, grids, _ = made(name, sizes)
    read = tiled.grids(model.config, encode(pictures), None, None)
    assert [grid.places for grid in read] == [grid.places for grid in grids]
    for ours, theirs in zip(read, grids, strict=True):
        scale = theirs.size[0] / ours.size[0]
        assert [tile.view[0] * scale for tile in ours.tiles] == pytest.approx([tile.view[0] for tile in theirs.tiles])


def test_a_text_without_line_breaks_does_not_say_how_the_squares_lie():
    from mechvlm.grids import tiled

    model, encode, pictures, _, _, _ = made("idefics3", [(60, 40)])
    encoding = encode(pictures)
    line = idefics.words.ids(idefics.SPECIAL)["\n"]
    encoding["input_ids"] = encoding["input_ids"][encoding["input_ids"] != line][None]
    with pytest.raises(
        ValueError, match=r"^the text does not say how 6 squares lie in a picture; make the prompt from"
    ):
        tiled.grids(model.config, encoding, None, None)


def test_marks_of_more_than_one_token_are_refused():
    from mechvlm.grids import tiled

    model, encode, pictures, _, _, _ = made("idefics3", [(60, 40)])
    encoding = encode(pictures)
    ids = encoding["input_ids"].clone()
    ids[0, (ids[0] == model.config.image_token_id).nonzero()[0, 0] - 2] = 30
    with pytest.raises(ValueError, match=r"^before each run of image tokens there must be two marks"):
        tiled.grids(model.config, encoding | {"input_ids": ids}, None, None)


def test_squares_of_aya_without_the_pictures_size_are_refused():
    from mechvlm.grids import tiled

    model, encode, pictures, _, _, _ = made("aya_vision", [(60, 40)])
    with pytest.raises(ValueError, match=r"^pixel_values hold 7 squares, and a ready encoding does not say how they"):
        tiled.grids(model.config, encode(pictures), None, None)


def test_one_square_of_aya_needs_no_size():
    from mechvlm.grids import tiled

    model, _, _, _, _, _ = made("aya_vision", [(60, 40)])
    (grid,) = tiled.grids(model.config, {"pixel_values": torch.ones(1, 3, 24, 24)}, None, None)
    assert (grid.size, grid.tokens, grid.tiles[0].box(2, 2)) == ((24, 24), 9, (16, 16, 24, 24))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("idefics3", {"max_image_size": {"longest_edge": 12}}, r"max_image_size is 12 pixels, and pixel_values are sq"),
        ("idefics3", {"size": {"shortest_edge": 12}}, r"^the processor resizes pictures to \{'shortest_edge': 12\}, "),
        (
            "idefics3",
            {"do_image_splitting": False},
            r"^pixel_values hold 7 squares, and pictures cut into 0 x 0 make 1",
        ),
        (
            "aya_vision",
            {"max_patches": 3},
            r"^pixel_values hold 7 squares, and pictures cut into 1 x 2 make 3; the pro",
        ),
        ("aya_vision", {"size": {"height": 30, "width": 30}}, r"size is \{'height': 30, 'width': 30\}, and pixel_val"),
    ],
)
def test_settings_that_did_not_make_the_squares_are_refused(name, change, sentence):
    from mechvlm.grids import tiled

    model, encode, pictures, settings, _, _ = made(name, [(60, 40)])
    with pytest.raises(ValueError, match=sentence):
        tiled.grids(model.config, encode(pictures), settings | change, [(60, 40)])


def test_an_aya_tower_that_leaves_out_a_token_is_refused():
    from mechvlm.grids import tiled

    model, encode, pictures, settings, _, _ = made("aya_vision", [(60, 40)])
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match=r"^vision_feature_select_strategy is 'default'; Aya Vision's tower has no"):
        tiled.grids(model.config, encode(pictures), settings, [(60, 40)])


@pytest.mark.torchvision
@NEEDS_TORCHVISION
@pytest.mark.parametrize("sizes", [[(60, 40)], [(60, 40), (31, 100)], [(200, 200)]], ids=names)
def test_the_encoding_made_by_hand_is_the_processors_own(sizes):
    variant = VARIANTS["smolvlm"]
    pictures = [painting.plain(*size) for size in sizes]
    theirs, ours = painting.encoded(variant, variant.processor(), pictures), painting.encoded(variant, None, pictures)
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
