"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4.1V: where each token looks, proven by painting."""

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Glm4vImageProcessor, Qwen2VLImageProcessor
from zoo import glm, qwen
from zoo.misplaced import blurred, cover, entering, misplaced, painted, quiet, smooth

from mechvlm.grids import patches

VARIANTS = qwen.VARIANTS | glm.VARIANTS
PICTURES = {"qwen2_vl": qwen, "qwen2_5_vl": qwen, "qwen3_vl": qwen, "glm4v": glm}
SIZES = [(60, 40), (40, 60), (100, 31), (48, 48), (17, 90)]
SAID = "what colour is the cat ?"
torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
every = pytest.mark.parametrize("name", list(VARIANTS))


def encode(name: str, seen: Sequence[Image.Image]) -> dict[str, Tensor]:
    made = VARIANTS[name].encoding
    assert made is not None
    return made(seen, SAID)


def settings(name: str) -> dict[str, Any]:
    return PICTURES[name].pictures().to_dict()


def laid_out(name: str, model: Any, seen: Sequence[Image.Image]) -> list[Any]:
    return patches.grids(model.config, encode(name, seen), settings(name), [one.size for one in seen])


@every
@pytest.mark.parametrize("size", SIZES)
def test_the_token_that_a_box_belongs_to_changes_most_when_it_is_painted(name: str, size: tuple[int, int]) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attn.proj"), [smooth(*size)]
    found = laid_out(name, model, seen)
    assert misplaced(lambda made: encode(name, made), lambda e: entering(model, e), seen, found) == []


@every
@pytest.mark.parametrize("size", [(60, 40), (100, 31)])
def test_a_line_one_pixel_wide_changes_the_row_or_column_that_holds_it(name: str, size: tuple[int, int]) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attn.proj"), smooth(*size)
    (grid,) = laid_out(name, model, [seen])
    assert blurred(lambda made: encode(name, made), lambda e: entering(model, e), seen, grid) == []


@every
def test_two_pictures_of_different_sizes_are_told_apart(name: str) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attn.proj"), [smooth(60, 40), smooth(31, 77, 1)]
    found = laid_out(name, model, seen)
    assert [grid.size for grid in found] == [(60, 40), (31, 77)]
    assert misplaced(lambda made: encode(name, made), lambda e: entering(model, e), seen, found) == []


@every
def test_boxes_hold_every_pixel_once_and_every_image_token_has_a_place(name: str) -> None:
    model = VARIANTS[name].model()
    for size in SIZES:
        seen = [smooth(*size)]
        (grid,) = laid_out(name, model, seen)
        assert (cover(grid, [0]) == 1).all()
        held = int((encode(name, seen)["input_ids"] == model.config.image_token_id).sum())
        assert len(grid.places) == grid.tokens == held
        assert grid.vision == (1, len(encode(name, seen)["pixel_values"]))


@pytest.mark.parametrize("tower", [0, 1])
def test_qwen3_feeds_the_first_text_layers_in_the_order_of_the_text(tower: int) -> None:
    model, seen = quiet(VARIANTS["qwen3_vl"].model(), "attn.proj"), [smooth(60, 40), smooth(40, 60, 1)]

    def read(encoding: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out = model.model.visual(encoding["pixel_values"], grid_thw=encoding["image_grid_thw"])
        return out.deepstack_features[tower]

    found = laid_out("qwen3_vl", model, seen)
    assert misplaced(lambda made: encode("qwen3_vl", made), read, seen, found) == []


@every
def test_the_order_of_patches_inside_the_tower_is_the_one_that_is_said(name: str) -> None:
    model, seen = quiet(VARIANTS[name].model(), "attn.proj"), [smooth(60, 40), smooth(40, 60, 1)]
    found, side = laid_out(name, model, seen), PICTURES[name].PATCH
    places = patches.tower_places(model.config, encode(name, seen))
    before = _residuals(model, encode(name, seen))
    for at in range(0, len(places), 7):
        image, row, column = places[at]
        left, top, x, y = found[image].tiles[0].view
        box = (left + column * side * x, top + row * side * y, (column + 1) * side * x, (row + 1) * side * y)
        other = [painted(one, box) if number == image else one for number, one in enumerate(seen)]
        after = _residuals(model, encode(name, other))
        changes = [(new - old).norm(dim=-1) for new, old in zip(after, before, strict=True)]
        assert [int(change.argmax()) for change in changes[:-1]] == [at] * (len(changes) - 1)
        assert int(changes[-1].argmax()) == at // 4  # the merger's output, before it is put in the order of the text


def _residuals(model: Any, encoding: dict[str, Tensor]) -> list[Tensor]:
    """What each vision layer returns, and then the merger."""
    seen: list[Tensor] = []
    modules = [*model.model.visual.blocks, model.model.visual.merger]
    hooks = [one.register_forward_hook(lambda _module, _args, out: seen.append(out)) for one in modules]
    with torch.no_grad():
        model(**encoding)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_order_is_windowed_in_qwen2_5_only() -> None:
    given = {"image_grid_thw": torch.tensor([[1, 6, 10]])}
    rows = {
        name: [(row, column) for _, row, column in patches.tower_places(VARIANTS[name].model().config, given)[::4]]
        for name in VARIANTS
    }
    text = [(row, column) for row in (0, 2, 4) for column in (0, 2, 4, 6, 8)]
    assert rows["qwen2_vl"] == rows["qwen3_vl"] == rows["glm4v"] == text
    assert rows["qwen2_5_vl"][:6] == [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6)]
    assert sorted(rows["qwen2_5_vl"]) == text


@pytest.mark.parametrize("kind", [Qwen2VLImageProcessor, Glm4vImageProcessor])
@pytest.mark.parametrize("small", [False, True])
def test_pictures_of_any_size_are_resized_as_the_processor_does_it(kind: Any, small: bool) -> None:
    made = kind(size=dict(qwen.SIZE), patch_size=4) if small else kind()
    vision = SimpleNamespace(patch_size=made.patch_size, spatial_merge_size=2, model_type="")
    for width, height in np.random.default_rng(0).integers(8, 130 if small else 600, (60 if small else 12, 2)).tolist():
        held = dict(made(images=[smooth(width, height)], return_tensors="pt"))
        (grid,) = patches.grids(SimpleNamespace(vision_config=vision), held, made.to_dict(), [(width, height)])
        assert grid.tiles[0].box(grid.tiles[0].rows - 1, grid.tiles[0].columns - 1)[2:] == pytest.approx(
            (width, height)
        )


def test_an_encoding_of_unknown_pictures_is_mapped_to_what_the_model_sees() -> None:
    config = VARIANTS["qwen2_vl"].model().config
    (grid,) = patches.grids(config, {"image_grid_thw": torch.tensor([[1, 4, 6]])}, None, None)
    assert grid.size == (24, 16)
    assert grid.tiles[0].box(1, 2) == (16, 8, 24, 16)


def test_text_alone_has_no_grids() -> None:
    assert patches.grids(VARIANTS["qwen2_vl"].model().config, encode("qwen2_vl", []), None, []) == []


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "films": (
        {"video_grid_thw": torch.ones(1, 3)},
        {},
        "the encoding holds films, and mechvlm reads pictures only; leave video_grid_thw out.",
    ),
    "frames": (
        {"image_grid_thw": torch.tensor([[2, 4, 6]])},
        {},
        "image_grid_thw holds 2 x 4 x 6 patches, and a picture has one frame of a whole number of 2 x 2 squares.",
    ),
    "patches": (
        {"image_grid_thw": torch.tensor([[1, 4, 6]])},
        {},
        "pixel_values holds 60 patches, and image_grid_thw speaks of 24.",
    ),
    "merge": (
        {},
        {"patch_size": 14},
        "the processor merges 2 x 2 patches of 14 pixels, and this model 2 x 2 of 4; the processor belongs to another "
        "model.",
    ),
    "size": (
        {},
        {"size": {"shortest_edge": 0, "longest_edge": 500}},
        "the processor makes pictures of 24 x 16 pixels from one of 60 x 40, and image_grid_thw speaks of 40 x 24; the "
        "encoding was made with other settings or pictures.",
    ),
    "kind": (
        {},
        {"image_processor_type": "OtherImageProcessor"},
        "mechvlm does not know how OtherImageProcessor resizes pictures; it knows Qwen2VLImageProcessor and "
        "Glm4vImageProcessor.",
    ),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_what_does_not_agree_is_refused(which: str) -> None:
    encoding, other, sentence = REFUSED[which]
    held = {"image_grid_thw": torch.tensor([[1, 6, 10]]), "pixel_values": torch.zeros(60, 96)} | encoding
    with pytest.raises(ValueError) as told:
        patches.grids(VARIANTS["qwen2_vl"].model().config, held, settings("qwen2_vl") | other, [(60, 40)])
    assert str(told.value) == sentence


def test_another_number_of_pictures_than_the_encoding_holds_is_refused() -> None:
    with pytest.raises(ValueError) as told:
        patches.grids(
            VARIANTS["qwen2_vl"].model().config, {"image_grid_thw": torch.tensor([[1, 4, 4]])}, None, [(9, 9)] * 2
        )
    assert str(told.value) == "there are 2 pictures, and image_grid_thw holds 1; they must agree."


@pytest.mark.torchvision
@torchvision
@every
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # GLM's processor, under NumPy 2
def test_the_encoding_made_by_hand_is_the_real_processors(name: str) -> None:
    processor, seen = VARIANTS[name].processor(), [smooth(60, 40), smooth(31, 77, 1)]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": SAID}]
    chat = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    real, made = dict(processor(text=[chat], images=seen, return_tensors="pt")), encode(name, seen)
    assert list(real) == list(made)
    assert all(torch.equal(real[key], made[key]) and real[key].dtype == made[key].dtype for key in real)


@pytest.mark.torchvision
@torchvision
def test_both_backends_make_the_same_grid() -> None:
    from transformers import Glm4vImageProcessorPil, Qwen2VLImageProcessorPil

    pairs = [(Qwen2VLImageProcessor, Qwen2VLImageProcessorPil), (Glm4vImageProcessor, Glm4vImageProcessorPil)]
    for kind, plain in pairs:
        for width, height in np.random.default_rng(1).integers(8, 130, (40, 2)).tolist():
            made = [one(size=dict(qwen.SIZE), patch_size=4)(smooth(width, height)) for one in (kind, plain)]
            assert made[0]["image_grid_thw"].tolist() == np.asarray(made[1]["image_grid_thw"]).tolist()
