"""Pictures cut into squares beside all of them in one, padding left out: LLaVA-NeXT and LLaVA-OneVision."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from zoo import llava, painting

SIZES = ([(60, 40)], [(40, 60)], [(100, 31)], [(31, 100)], [(48, 48)], [(4000, 50)], [(90, 61), (33, 70)])
NAMES = ("llava_next-vicuna", "llava_next-mistral", "llava_onevision")
NEEDS_TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the processor holds a video processor, for torchvision"
)


def names(sizes):
    return " and ".join(f"{width}x{height}" for width, height in sizes)


def settings_of(name, side=24):
    next_one = name.startswith("llava_next")
    return (
        llava.processor_llava_next().image_processor if next_one else llava.pictures_llava_onevision(side)
    ).to_dict()


def made(name, sizes, *, nested=None, **more):
    """A model that shows places, how to encode pictures for it, some pictures, their grids and their maps."""
    from mechvlm.grids import anyres

    variant = llava.VARIANTS[name]
    model = variant.model(**more)
    painting.weak(model, model.model.vision_tower)
    processor = None if variant.needs_torchvision else variant.processor()
    pictures = [painting.plain(*size) for size in sizes]
    given = more | ({"nested": nested} if nested else {})

    def encode(some):
        if given:
            assert variant.encoding is not None
            return variant.encoding(some, **given)
        return painting.encoded(variant, processor, some)

    encoding = encode(pictures)
    grids = anyres.grids(model.config, encoding, settings_of(name, model.config.vision_config.image_size), sizes)
    return model, encode, pictures, grids, painting.maps(grids, encoding, model.config.image_token_id)


@pytest.mark.parametrize("sizes", SIZES, ids=names)
@pytest.mark.parametrize("name", NAMES)
def test_painting_a_tokens_box_moves_that_token(name, sizes):
    model, encode, pictures, _, images = made(name, sizes)
    assert painting.check(model, encode, pictures, images) >= 4 * len(sizes)


@pytest.mark.parametrize(("aspect", "grid"), [("anyres_max_9", (12, 12)), ("anyres_max_3", (6, 6))])
def test_painting_shows_the_place_in_a_grid_made_coarser(aspect, grid):
    model, encode, pictures, _, images = made("llava_onevision", [(200, 200)], aspect=aspect)
    assert (images[0].tiles[1].rows, images[0].tiles[1].columns) == grid
    assert painting.check(model, encode, pictures, images) >= 8


@pytest.mark.parametrize("sizes", [[(104, 78)], [(40, 60)], [(120, 35), (200, 200)]], ids=names)
def test_painting_shows_the_place_where_squares_are_no_whole_patches(sizes):
    model, encode, pictures, _, images = made("llava_onevision", sizes, side=26)
    assert painting.check(model, encode, pictures, images) >= 8


def test_pixels_beside_the_patches_of_a_square_are_seen_in_no_square():
    _, _, _, _, (image,) = made("llava_onevision", [(78, 52)], side=26)
    # The picture is 3 x 2 squares of 26 pixels, of which the tower sees 24.
    assert image.box(image.at(27, 1)) == (26, 0, 32, 6)
    assert image.cell(image.at(25, 1))[0] == 0


def test_painting_shows_the_place_in_several_images_of_one_prompt_that_are_padded():
    model, encode, pictures, _, images = made("llava_onevision", [(90, 61), (33, 70)], nested=True)
    assert [(len(image.tiles), len(image.separators)) for image in images] == [(1, 1), (1, 1)]
    assert painting.check(model, encode, pictures, images) >= 4


def test_painting_finds_a_map_without_the_newlines():
    model, encode, pictures, _, images = made("llava_next-vicuna", [(60, 40)])
    counted = tuple(range(len(images[0].positions)))
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [replace(images[0], positions=counted, separators=())])


def test_painting_finds_a_map_that_forgets_the_padding():
    model, encode, pictures, _, images = made("llava_next-vicuna", [(40, 60)])
    whole, *squares = images[0].tiles
    wrong = [replace(one, view=(one.view[0] + 10, *one.view[1:])) for one in squares]
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [replace(images[0], tiles=(whole, *wrong))])


def test_painting_finds_a_map_with_squares_column_by_column():
    model, encode, pictures, _, images = made("llava_next-mistral", [(48, 48)])
    tiles = images[0].tiles
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [replace(images[0], tiles=(tiles[0], *tiles[1::2], *tiles[2::2]))])


@pytest.mark.parametrize("name", NAMES)
def test_the_boxes_of_whole_and_squares_lie_without_gap_or_overlap(name):
    for image in made(name, [(60, 40), (31, 100), (48, 48)])[-1]:
        assert painting.covered(image, 0) == (0, 0, *image.size)
        parts = [painting.covered(image, tile) for tile in range(1, len(image.tiles))]
        token = image.tiles[1].box(0, 0)
        left, top = min(part[0] for part in parts), min(part[1] for part in parts)
        right, bottom = max(part[2] for part in parts), max(part[3] for part in parts)
        assert sum((one[2] - one[0]) * (one[3] - one[1]) for one in parts) == pytest.approx(
            (right - left) * (bottom - top)
        )
        # A token of padding may be kept on each side, or a token of the picture left out.
        assert max(abs(left), abs(right - image.size[0])) <= token[2] - token[0]
        assert max(abs(top), abs(bottom - image.size[1])) <= token[3] - token[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_the_fine_grid_ends_in_a_token_without_a_place(name):
    _, _, _, grids, (image,) = made(name, [(60, 40)])
    columns = 12 if name == "llava_onevision" else 8
    assert image.separators == tuple(range(16 + columns, grids[0].tokens, columns + 1))
    assert {image.box(position) for position in image.separators} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_has_as_many_rows_and_positions_as_the_grids_say(name):
    model, encode, pictures, grids, _ = made(name, [(60, 40), (31, 100)])
    (rows, positions), *others = painting.tower_shapes(model, model.model.vision_tower.encoder.layers, encode(pictures))
    assert not others
    assert rows == sum(grid.vision[0] for grid in grids)
    assert {positions} == {grid.vision[1] for grid in grids}


def test_a_picture_that_loses_its_fine_grid_keeps_the_grid_of_all_of_it():
    _, _, _, grids, (image,) = made("llava_next-vicuna", [(50, 4000)])
    assert {place[0] for place in image.places} == {0}
    assert (len(image.separators), grids[0].tokens) == (4, 20)
    assert image.cell(image.at(20, 3999)) == (0, 3, 1)


def test_a_picture_of_one_pixel_has_tokens_in_both_grids():
    _, _, _, _, (image,) = made("llava_next-vicuna", [(1, 1)])
    assert image.at(0.5, 0.5) == 4 * 2 + 2
    assert {tile for tile in range(len(image.tiles)) if image.at(0.5, 0.5, tile=tile) is not None} == {0, 2}


def test_the_original_size_is_read_from_a_ready_encoding():
    from mechvlm.grids import anyres

    model, encode, pictures, grids, _ = made("llava_next-vicuna", [(60, 40)])
    assert anyres.grids(model.config, encode(pictures), None, None) == grids


def test_a_prompt_without_an_image_has_no_grid():
    from mechvlm.grids import anyres

    assert anyres.grids(llava.VARIANTS["llava_onevision"].model().config, {}, None, None) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, r"^the image processor is a SiglipImageProcessor; mechvlm "),
        ({"size": {"shortest_edge": 30}}, r"size is \{'shortest_edge': 30\}; it must be 24 pixels"),
        ({"crop_size": {"height": 20, "width": 24}}, r"crop_size is \{'height': 20, 'width': 24\}; it must be 24"),
        ({"image_grid_pinpoints": [[24, 24]]}, r"image_grid_pinpoints give 24 x 24 and the model's 48 x 48; the "),
    ],
)
def test_settings_that_are_not_undone_are_refused(settings, sentence):
    from mechvlm.grids import anyres

    model, encode, pictures, _, _ = made("llava_next-vicuna", [(60, 40)])
    with pytest.raises(ValueError, match=sentence):
        anyres.grids(model.config, encode(pictures), settings_of("llava_next") | settings, [(60, 40)])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_sizes": torch.tensor([[60, 40]])}, r"^image_sizes say that the pictures are \[\(40, 60\)\] pixels"),
        ({"image_sizes": None}, r"^the encoding has pixel_values and no image_sizes; this model needs both\.$"),
        ({"pixel_values": torch.zeros(1, 3, 3, 24, 24)}, r"ask for 1 images of \[5\] squares of 24 pixels\.$"),
    ],
)
def test_an_encoding_that_disagrees_with_itself_is_refused(change, sentence):
    from mechvlm.grids import anyres

    model, encode, pictures, _, _ = made("llava_next-vicuna", [(60, 40)])
    encoding = {name: value for name, value in (encode(pictures) | change).items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        anyres.grids(model.config, encoding, None, [(60, 40)])


def test_resolutions_that_are_no_whole_squares_are_refused():
    from mechvlm.grids import anyres

    model, encode, pictures, _, _ = made("llava_next-vicuna", [(60, 40)])
    model.config.image_grid_pinpoints = [[30, 48]]
    with pytest.raises(ValueError, match=r"a resolution of 48 x 30 pixels; it must be whole squares of 24\.$"):
        anyres.grids(model.config, encode(pictures), None, None)


def test_a_class_token_among_the_squares_is_refused():
    from mechvlm.grids import anyres

    model, encode, pictures, _, _ = made("llava_next-vicuna", [(60, 40)])
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match=r"is 'full', which gives 17 tokens a square where 16 make up its grid"):
        anyres.grids(model.config, encode(pictures), None, None)


@pytest.mark.torchvision
@NEEDS_TORCHVISION
@pytest.mark.parametrize("sizes", [[(60, 40)], [(60, 40), (31, 100)], [(200, 200)]], ids=names)
def test_the_encoding_made_by_hand_is_the_processors_own(sizes):
    variant = llava.VARIANTS["llava_onevision"]
    pictures = [painting.plain(*size) for size in sizes]
    theirs, ours = painting.encoded(variant, variant.processor(), pictures), painting.encoded(variant, None, pictures)
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
