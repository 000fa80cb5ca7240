"""Pictures that become one square: what painting shows, and what is refused."""

from dataclasses import replace

import pytest
import tiny
from zoo import gemma, llava, painting

# PaliGemma's processor makes numpy arrays of tensors in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZES = ([(60, 40)], [(40, 60)], [(100, 31)], [(48, 48)], [(4000, 50)], [(90, 61), (33, 70)])
NAMES = ("llava", "llava-siglip", "vipllava", "paligemma", "gemma3")
VARIANTS = llava.VARIANTS | gemma.VARIANTS


def names(sizes):
    return " and ".join(f"{width}x{height}" for width, height in sizes)


def made(name, sizes, processor=None):
    """A model that shows places, how to encode pictures for it, some pictures, and their maps."""
    from mechvlm.grids import square

    variant = VARIANTS[name]
    processor = processor or variant.processor()
    model = variant.model()
    painting.weak(model, model.model.vision_tower)
    pictures = [painting.plain(*size) for size in sizes]

    def encode(some):
        return painting.encoded(variant, processor, some)

    encoding = encode(pictures)
    grids = square.grids(model.config, encoding, processor.image_processor.to_dict(), sizes)
    return model, encode, pictures, grids, painting.maps(grids, encoding, model.config.image_token_id)


@pytest.mark.parametrize("sizes", SIZES, ids=names)
@pytest.mark.parametrize("name", NAMES)
def test_painting_a_tokens_box_moves_that_token(name, sizes):
    model, encode, pictures, _, images = made(name, sizes)
    assert painting.check(model, encode, pictures, images) >= 2 * len(sizes)


@pytest.mark.parametrize(
    "settings",
    [{"pad": True}, {"crop": False, "size": {"height": 24, "width": 24}}, {"size": {"shortest_edge": 30}}],
    ids=["padded", "stretched", "cropped"],
)
def test_painting_shows_the_place_however_the_square_is_made(settings):
    model, encode, pictures, _, images = made("llava", [(90, 61), (33, 70)], tiny.processor(**settings))
    assert painting.check(model, encode, pictures, images) >= 4


def test_painting_finds_a_map_with_rows_and_columns_exchanged():
    model, encode, pictures, _, images = made("gemma3", [(60, 40)])
    wrong = replace(images[0], places=tuple((0, column, row) for _, row, column in images[0].places))
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [wrong])


def test_painting_finds_a_map_that_is_one_token_off():
    model, encode, pictures, _, images = made("paligemma", [(60, 40)])
    wrong = replace(images[0], places=(*images[0].places[1:], images[0].places[0]))
    with pytest.raises(AssertionError, match="most, not|moved less"):
        painting.check(model, encode, pictures, [wrong])


@pytest.mark.parametrize("name", ["llava-siglip", "paligemma", "gemma3"])
def test_the_boxes_cover_a_stretched_picture_without_gap_or_overlap(name):
    for image in made(name, [(60, 40), (31, 100)])[-1]:
        assert painting.covered(image, 0) == (0, 0, *image.size)


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_has_as_many_rows_and_positions_as_the_grids_say(name):
    model, encode, pictures, grids, _ = made(name, [(60, 40), (31, 100)])
    (rows, positions), *others = painting.tower_shapes(model, model.model.vision_tower.encoder.layers, encode(pictures))
    assert not others
    assert rows == sum(grid.vision[0] for grid in grids)
    assert {positions} == {grid.vision[1] for grid in grids}


def test_a_class_token_that_is_kept_stands_for_no_place():
    from mechvlm.grids import square

    config = tiny.model(strategy="full").config
    (grid,) = square.grids(config, {"pixel_values": tiny.encoding()["pixel_values"]}, None, [(60, 40)])
    assert (grid.places[0], grid.places[1], grid.tokens) == (None, (0, 0, 0), 17)


def test_a_ready_encoding_without_sizes_is_mapped_onto_what_the_model_sees():
    from mechvlm.grids import square

    model = VARIANTS["gemma3"].model()
    encoding = painting.encoded(VARIANTS["gemma3"], gemma.processor_gemma3(), [painting.plain(60, 40)])
    (grid,) = square.grids(model.config, encoding, None, None)
    assert grid.size == (32, 32)
    assert grid.tiles[0].box(1, 2) == (16, 8, 24, 16)


def test_pan_and_scan_is_refused():
    from mechvlm.grids import square

    processor = gemma.processor_gemma3()
    encoding = painting.encoded(VARIANTS["gemma3"], processor, [painting.plain(60, 40)])
    settings = processor.image_processor.to_dict() | {"do_pan_and_scan": True}
    with pytest.raises(ValueError, match=r"do_pan_and_scan=True, .* set image_processor\.do_pan_and_scan = False\.$"):
        square.grids(VARIANTS["gemma3"].model().config, encoding, settings, [(60, 40)])


def test_more_pictures_than_images_are_refused():
    from mechvlm.grids import square

    encoding = painting.encoded(VARIANTS["gemma3"], gemma.processor_gemma3(), [painting.plain(60, 40)] * 2)
    with pytest.raises(ValueError, match=r"^pixel_values hold 2 pictures for 1 images; there must be one an image\.$"):
        square.grids(VARIANTS["gemma3"].model().config, encoding, None, [(60, 40)])


def test_pixels_of_another_size_are_refused():
    from mechvlm.grids import square

    encoding = painting.encoded(VARIANTS["gemma3"], gemma.processor_gemma3(), [painting.plain(60, 40)])
    config = VARIANTS["llava-siglip"].model().config
    with pytest.raises(
        ValueError, match=r"^pixel_values are \(1, 3, 32, 32\); this model sees \(images, 3, 24, 24\)\.$"
    ):
        square.grids(config, encoding, None, None)


def test_a_tower_whose_positions_are_not_known_is_refused():
    from transformers import PixtralVisionConfig

    from mechvlm.grids import square

    config = tiny.model().config
    config.vision_config = PixtralVisionConfig(image_size=24, patch_size=6)
    with pytest.raises(ValueError, match=r"^the vision tower is a 'pixtral'; mechvlm knows the positions of 'clip_"):
        square.grids(config, {"pixel_values": tiny.encoding()["pixel_values"]}, None, None)
