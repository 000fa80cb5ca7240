"""Every position of a prompt is what it is said to be, and every box is where the processor really looks (law 13)."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import mechvlm as mv

SETTINGS: dict[str, dict[str, Any]] = {
    "resize the short edge, crop": {},
    "pad to a square, resize": {"pad": True},
    "crop only": {"resize": False},
    "stretch": {"size": {"height": 24, "width": 24}, "crop": False},
    "stretch wide, crop": {"size": {"height": 30, "width": 36}},
    "resize too small, crop pads": {"size": {"shortest_edge": 19}},
}
sizes = st.tuples(st.integers(1, 120), st.integers(1, 120))
words = st.lists(st.sampled_from([*tiny.WORDS, "unheard"]), min_size=1, max_size=6).map(" ".join)


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def looking(request: pytest.FixtureRequest) -> mv.VLM:
    """A model behind each kind of image processor; bilinear, which smears a colour no further than one pixel."""
    return tiny.vlm(with_processor=tiny.processor(resample=2, **SETTINGS[request.param]))


@pytest.fixture(scope="module")
def vlm() -> mv.VLM:
    return tiny.vlm()


def seen(prompt: mv.Prompt) -> np.ndarray:
    """What the model sees, as colours from 0 to 1, height by width by colour."""
    return prompt.encoding["pixel_values"][0].permute(1, 2, 0).double().numpy() / 2 + 0.5


def cells(pixels: np.ndarray) -> list[float]:
    """The mean of each token's square, row by row."""
    return pixels.reshape(tiny.GRID, tiny.PATCH, tiny.GRID, tiny.PATCH).mean((1, 3)).ravel().tolist()


# Boxes


@settings(max_examples=15)
@given(size=sizes)
@example(size=(1, 1))
@example(size=(4000, 50))
@example(size=(50, 4000))
@example(size=(25, 24))
def test_boxes_tile_what_the_model_sees(looking: mv.VLM, size: tuple[int, int]) -> None:
    image = looking.prompt(Image.new("RGB", size), "is").images[0]
    boxes = np.array([image.box(position) for position in image.positions]).reshape(tiny.GRID, tiny.GRID, 4)
    assert (boxes[:, 1:, 0] == boxes[:, :-1, 2]).all()  # each starts where its neighbour ends, to the last bit
    assert (boxes[1:, :, 1] == boxes[:-1, :, 3]).all()
    assert (boxes[:, :, :2] < boxes[:, :, 2:]).all()
    assert (boxes[:, :, 0] == boxes[:1, :, 0]).all() and (boxes[:, :, 1] == boxes[:, :1, 1]).all()
    assert [image.cell(position) for position in image.positions] == [
        (0, row, column) for row in range(tiny.GRID) for column in range(tiny.GRID)
    ]


@settings(max_examples=8)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@example(size=(70, 11))
@example(size=(24, 24))
def test_box_at_and_heat_agree(looking: mv.VLM, size: tuple[int, int]) -> None:
    image = looking.prompt(Image.new("RGB", size), "is").images[0]
    heat = image.heat(list(image.positions))
    assert heat.shape == (size[1], size[0])
    boxes = np.array([image.box(position) for position in image.positions])
    for y in np.arange(size[1]) + 0.5:
        for x in np.arange(size[0]) + 0.5:
            position = image.at(x, y)
            painted = heat[int(y), int(x)]
            assert np.isnan(painted) if position is None else painted == position
            if np.isclose(boxes[:, [0, 2]], x).any() or np.isclose(boxes[:, [1, 3]], y).any():
                continue  # on a box's edge, up to rounding, either side is right
            inside = (boxes[:, :2] <= (x, y)).all(1) & ((x, y) < boxes[:, 2:]).all(1)
            holds = [image.positions[number] for number in np.flatnonzero(inside)]
            assert holds == ([] if position is None else [position])


def ramp(width: int, height: int) -> Image.Image:
    """A picture that says where it is: red is the place from left to right, green from top to bottom, blue is 1."""
    made = np.full((height, width, 3), 255, dtype=np.uint8)
    made[..., 0] = (np.arange(width) + 0.5) / width * 255
    made[..., 1] = ((np.arange(height) + 0.5) / height * 255)[:, None]
    return Image.fromarray(made)


@settings(max_examples=15)
@given(size=st.tuples(st.integers(24, 250), st.integers(24, 250)))
@example(size=(200, 40))
@example(size=(40, 200))
@example(size=(24, 24))
def test_boxes_are_where_the_picture_landed(looking: mv.VLM, size: tuple[int, int]) -> None:
    """Asks the processor's result itself, by a picture whose colours are coordinates."""
    assume(max(size) <= 6 * min(size))  # else padding leaves less than what a filter mixes
    prompt = looking.prompt(ramp(*size), "is")
    pixels, image = seen(prompt), prompt.images[0]
    inside = pixels[..., 2] > 0.999  # neither padded nor mixed with padding
    corners = [image.box(image.positions[0]), image.box(image.positions[-1])]
    (left, top, _, _), (_, _, right, bottom) = corners[0] or (0,) * 4, corners[1] or (0,) * 4
    across = left + (np.arange(tiny.SIDE) + 0.5) * (right - left) / tiny.SIDE
    down = top + (np.arange(tiny.SIDE) + 0.5) * (bottom - top) / tiny.SIDE
    # Colours have 255 steps, and at the picture's edge a filter sees less than it wants.
    allowed = [length / 255 + 0.35 * max(1, scale) for length, scale in zip(size, _scales(image), strict=True)]
    errors = np.abs(pixels[..., 0] * size[0] - across)[inside], np.abs(pixels[..., 1] * size[1] - down[:, None])[inside]
    assert inside.any()
    assert errors[0].max() <= allowed[0] and errors[1].max() <= allowed[1]
    # What is padding for the processor lies outside the picture for the boxes.
    within = ((across > 0) & (across < size[0]))[None] & ((down > 0) & (down < size[1]))[:, None]
    assert (inside <= within).all()
    assert (within & ~inside).sum() <= 4 * tiny.SIDE  # the mixed pixels along the edges


def _scales(image: mv.ImageMap) -> tuple[float, float]:
    left, top, right, bottom = image.box(image.positions[0]) or (0, 0, 0, 0)
    return (right - left) / tiny.PATCH, (bottom - top) / tiny.PATCH


@settings(max_examples=15)
@given(size=st.tuples(st.integers(30, 150), st.integers(30, 150)), data=st.data())
def test_a_painted_square_lands_in_its_boxes(looking: mv.VLM, size: tuple[int, int], data: st.DataObject) -> None:
    """The brightness of each token is the part of its box that the square covers."""
    width, height = size
    x, y = data.draw(st.integers(0, width - 12)), data.draw(st.integers(0, height - 12))
    across, down = data.draw(st.integers(10, width - x)), data.draw(st.integers(10, height - y))
    made = np.zeros((height, width, 3), dtype=np.uint8)
    made[y : y + down, x : x + across, 0] = 255
    prompt = looking.prompt(Image.fromarray(made), "is")
    image, brightness = prompt.images[0], cells(seen(prompt)[..., 0])
    plain = cells(seen(prompt.with_image(mv.images.black))[..., 0])  # padding may be grey
    for position, bright, ground in zip(image.positions, brightness, plain, strict=True):
        left, top, right, bottom = image.box(position) or (0, 0, 0, 0)
        wide = max(0, min(right, x + across) - max(left, x)) / (right - left)
        high = max(0, min(bottom, y + down) - max(top, y)) / (bottom - top)
        assert bright - ground == pytest.approx(wide * high, abs=0.12)


def test_the_one_token_that_sees_a_square(vlm: mv.VLM) -> None:
    black = Image.new("RGB", (96, 96))
    for y in range(4, 96, 24):
        for x in range(4, 96, 24):
            black.paste((255, 0, 0), (x, y, x + 16, y + 16))
            prompt = vlm.prompt(black, "is")
            bright = cells(seen(prompt)[..., 0])
            assert prompt.images[0].at(x, y) == prompt.image[int(np.argmax(bright))]
            black.paste((0, 0, 0), (x, y, x + 16, y + 16))


def test_a_class_token_stands_for_no_place() -> None:
    full = tiny.vlm(strategy="full")
    prompt = full.prompt([tiny.picture(), tiny.picture(1)], "is")
    assert [len(image.positions) for image in prompt.images] == [16, 16]
    first, second = prompt.images
    assert first.separators == (3,) and second.separators == (20,)
    assert first.cell(3) is None and first.box(3) is None
    assert first.cell(4) == (0, 0, 0) and second.cell(36) == (0, 3, 3)
    assert prompt.image == list(range(3, 37))
    assert full.run(prompt, read=["image_features"])["image_features"].shape == (2, 17, 32)


def test_heat_takes_what_a_reading_gives(vlm: mv.VLM) -> None:
    image = vlm.prompt(tiny.picture(), "is").images[0]
    values = torch.arange(16.0, requires_grad=True)
    expected = np.arange(16.0).reshape(4, 4).repeat(6, 0).repeat(6, 1)
    for given_as in (values, values.bfloat16(), values.detach().numpy(), list(range(16)), np.arange(16, dtype=np.int8)):
        assert np.array_equal(image.heat(given_as), expected)
    assert repr(image) == "ImageMap(4 x 4 tokens at 3 to 18 on a 24 x 24 picture)"


# Spans


def own_ids(vlm: mv.VLM, text: str, pictures: list[Image.Image]) -> list[int]:
    """What the processor itself makes of a text."""
    return vlm.processor(text=[text], images=pictures or None, return_tensors="pt")["input_ids"][0].tolist()


@settings(max_examples=60)
@given(pieces=st.lists(words, min_size=1, max_size=4), outer=st.booleans(), gap=st.booleans())
def test_spans_are_all_positions_once(vlm: mv.VLM, pieces: list[str], outer: bool, gap: bool) -> None:
    """Images anywhere in a raw text: first, last, side by side."""
    marks = (["<image>"] if outer else []) + ["<image><image>" if gap else "<image>"] * (len(pieces) - 1)
    text = " ".join(part for pair in zip([*marks, ""], [*pieces, ""], strict=False) for part in pair)
    text = text if outer else f"{pieces[0]} {text}"
    count = text.count("<image>")
    pictures = [tiny.picture(seed) for seed in range(count)]
    prompt = vlm.prompt(pictures, text, raw=True)
    ids = own_ids(vlm, text, pictures)
    assert prompt.encoding["input_ids"][0].tolist() == ids
    assert prompt.image == [at for at, number in enumerate(ids) if number == tiny.IMAGE]
    assert len(prompt.image) == tiny.TOKENS * count and len(prompt.images) == count
    assert [one for image in prompt.images for one in image.positions] == prompt.image
    assert sorted(sum(prompt.spans.values(), [])) == list(range(len(prompt))) == list(range(len(ids)))
    assert prompt.bos == [0]
    assert all(at < min(prompt.image, default=1) for at in prompt.prefix)
    assert prompt.last == ([len(ids) - 1] if ids[-1] != tiny.IMAGE else [])
    assert list(prompt.spans) == [
        name for name in ("bos", "prefix", "image", "question", "last") if prompt.spans.get(name)
    ]
    assert prompt.text == prompt.words == text
    assert prompt.tokens == vlm.processor.tokenizer.convert_ids_to_tokens(ids)


@settings(max_examples=25)
@given(question=words, count=st.integers(0, 3), chat=st.booleans())
def test_the_template_is_the_chats_or_the_familys(question: str, count: int, chat: bool) -> None:
    vlm = _with_chat() if chat else _without_chat()
    pictures = [tiny.picture(seed) for seed in range(count)]
    prompt = vlm.prompt(pictures, question)
    documented = f"USER: {'<image>' + chr(10)}" if count == 1 else f"USER: {('<image>' + chr(10)) * count}"
    expected = f"HUMAN : {'<image> ' * count}{question} GPT :" if chat else f"{documented}{question} ASSISTANT:"
    assert prompt.text == expected
    assert prompt.words == question
    assert prompt.encoding["input_ids"][0].tolist() == own_ids(vlm, expected, pictures)
    assert prompt.bos == [0] and prompt.last == [len(prompt) - 1]
    if count:
        assert prompt.prefix == [1, 2] and prompt.image == list(range(3, 3 + count * tiny.TOKENS))
        assert prompt.question == list(range(3 + count * tiny.TOKENS, len(prompt) - 1))
    else:
        assert prompt.prefix == prompt.image == [] and prompt.question == list(range(1, len(prompt) - 1))


MADE: dict[bool, mv.VLM] = {}


def _with_chat() -> mv.VLM:
    return MADE.setdefault(True, tiny.vlm())


def _without_chat() -> mv.VLM:
    return MADE.setdefault(False, tiny.vlm(with_processor=tiny.processor(None)))


def test_braces_in_a_question_are_words() -> None:
    assert _without_chat().prompt(None, "what is {text} {0}?").text == "USER: what is {text} {0}? ASSISTANT:"


def test_a_text_gets_one_start_token() -> None:
    """Some templates write it themselves, and so may a raw text."""
    vlm = tiny.vlm(with_processor=tiny.processor("<s>" + tiny.CHAT))
    assert vlm.prompt(tiny.picture(), "is").tokens[:3] == ["<s>", "human", ":"]
    assert vlm.prompt(None, "<s> is", raw=True).tokens == ["<s>", "is"]
    assert vlm.prompt(None, "is", raw=True).tokens == ["<s>", "is"]


def test_another_image_token() -> None:
    vlm = tiny.vlm(with_processor=tiny.processor(None, mark="<picture>"))
    assert vlm.prompt(tiny.picture(), "is").text == "USER: <picture>\nis ASSISTANT:"
    assert len(vlm.prompt(tiny.picture(), "<picture> is", raw=True).image) == tiny.TOKENS


def test_ready_encodings(vlm: mv.VLM) -> None:
    made = vlm.prompt([tiny.picture(), tiny.picture(1)], "is there a cat ?")
    ready = tiny.vlm(with_processor=False).prompt(encoding=made.encoding)
    assert ready.image == made.image and ready.last == made.last and ready.pictures == []
    assert sorted(sum(ready.spans.values(), [])) == list(range(len(made)))
    assert [image.positions for image in ready.images] == [image.positions for image in made.images]
    assert ready.images[0].size == (24, 24) and ready.images[0].box(ready.image[0]) == (0.0, 0.0, 6.0, 6.0)
    without_mask = {name: x for name, x in made.encoding.items() if name != "attention_mask"}
    assert vlm.prompt(encoding=without_mask).encoding["attention_mask"].all()
    assert torch.equal(vlm.run(ready).logits, vlm.run(made).logits)


def test_find(vlm: mv.VLM) -> None:
    prompt = vlm.prompt(tiny.picture(), "is the red cat left of the red dog ?")
    words_from = prompt.image[-1] + 1
    assert [prompt.tokens[at] for at in prompt.find("red")] == ["red", "red"]
    assert prompt.find("Red  Cat") == [words_from + 2, words_from + 3]
    for part in ("ed ca", "ed", "gpt"):  # parts of words, and the template's
        with pytest.raises(ValueError):
            prompt.find(part)
    assert prompt.find("the red dog") == [words_from + 6, words_from + 7, words_from + 8]


def test_repr(vlm: mv.VLM) -> None:
    assert repr(vlm.prompt(tiny.picture(), "is")) == (
        "Prompt('is': 22 positions; bos 0, prefix 1 to 2, image 3 to 18, question 19 to 20, last 21)"
    )
    split = vlm.prompt([tiny.picture()] * 2, "<image> is <image> cat", raw=True)
    assert repr(split).endswith("35 positions; bos 0, image 32 positions, question 17, last 34)")


# Other pictures, other words


def test_with_image_keeps_the_words_and_positions(vlm: mv.VLM) -> None:
    real = vlm.prompt(tiny.picture(0, 40, 30), "is there a dog ?")
    for null in (real.with_image(mv.images.black), real.with_image(Image.new("RGB", (40, 30)))):
        assert null.text == real.text and null.spans == real.spans
        assert (null.encoding["pixel_values"] == -1).all()
        assert null.images[0].box(3) == real.images[0].box(3)
    assert torch.equal(real.with_image(real.pictures[0]).encoding["pixel_values"], real.encoding["pixel_values"])
    array = np.zeros((30, 40, 3), np.uint8)
    assert (real.with_image(array).encoding["pixel_values"] == -1).all()
    assert (real.with_image(np.zeros_like).encoding["pixel_values"] == -1).all()
    other = real.with_image(tiny.picture(1, 60, 20))
    assert other.spans == real.spans and other.images[0].size == (60, 20)


def test_with_image_of_several(vlm: mv.VLM) -> None:
    pictures = [tiny.picture(seed) for seed in range(2)]
    real = vlm.prompt(pictures, "is there a dog ?")
    swapped = real.with_image(pictures[::-1])
    assert torch.equal(swapped.encoding["pixel_values"], real.encoding["pixel_values"].flip(0))
    assert (real.with_image(mv.images.white).encoding["pixel_values"] == 1).all()


def test_with_text_keeps_the_pictures(vlm: mv.VLM) -> None:
    real = vlm.prompt(tiny.picture(), "is there a dog ?")
    other = real.with_text("what is there ?")
    assert torch.equal(other.encoding["pixel_values"], real.encoding["pixel_values"])
    assert other.text == "HUMAN : <image> what is there ? GPT :" and other.image == real.image
    raw = vlm.prompt(tiny.picture(), "is <image> ?", raw=True).with_text("a cat <image>")
    assert raw.text == "a cat <image>" and raw.last == []


# Doors for pictures


def saved(image: Image.Image, format: str = "PNG", **more: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


def test_every_door_leads_to_the_same_pixels(vlm: mv.VLM, tmp_path: Path) -> None:
    picture = tiny.picture(0, 37, 29)
    (tmp_path / "a.png").write_bytes(saved(picture))
    expected = vlm.prompt(picture, "is").encoding["pixel_values"]
    given_as: list[object] = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        saved(picture),
        np.asarray(picture),
        np.asarray(picture) / 255,
        [picture],
        (picture,),
        picture.convert("RGBA"),
    ]
    for one in given_as:
        assert torch.equal(vlm.prompt(one, "is").encoding["pixel_values"], expected)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return saved(tiny.picture(0, 30, 20), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "make, size",
    [
        (lambda: tiny.picture(0, 30, 20).convert("L"), (30, 20)),
        (lambda: tiny.picture(0, 30, 20).convert("LA"), (30, 20)),
        (lambda: tiny.picture(0, 30, 20).convert("1"), (30, 20)),
        (lambda: tiny.picture(0, 30, 20).convert("P"), (30, 20)),
        (lambda: tiny.picture(0, 30, 20).convert("RGBA"), (30, 20)),
        (lambda: tiny.picture(0, 30, 20).convert("CMYK"), (30, 20)),
        (lambda: Image.fromarray(np.full((20, 30), 40000, np.uint16)), (30, 20)),
        (lambda: np.zeros((20, 30)), (30, 20)),
        (_turned, (20, 30)),
        (lambda: tiny.picture(0, 1, 1), (1, 1)),
        (lambda: tiny.picture(0, 1, 400), (1, 400)),
        (lambda: tiny.picture(0, 4000, 50), (4000, 50)),
    ],
)
def test_odd_pictures(vlm: mv.VLM, make: Callable[[], object], size: tuple[int, int]) -> None:
    prompt = vlm.prompt(make(), "is")
    assert prompt.images[0].size == prompt.pictures[0].size == size
    assert prompt.encoding["pixel_values"].shape == (1, 3, 24, 24)
    assert prompt.encoding["pixel_values"].abs().max() <= 1.001
    assert vlm.run(prompt).logits.isfinite().all()


def test_an_animation_is_refused(vlm: mv.VLM) -> None:
    frames = [tiny.picture(seed) for seed in range(2)]
    with pytest.raises(ValueError, match="several frames"):
        vlm.prompt(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "is")


@given(size=sizes)
@settings(max_examples=10)
def test_pixels_are_the_processors_own(vlm: mv.VLM, size: tuple[int, int]) -> None:
    assume(size != (24, 24))
    picture = tiny.picture(0, *size)
    own = vlm.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(vlm.prompt(picture, "is").encoding["pixel_values"], own)


@pytest.mark.parametrize("mark", ["▁", "Ġ"])
def test_find_in_pieces_of_words(mark: str) -> None:
    """Tokenizers that cut words into pieces mark the space before a word; pieces that follow belong to it."""
    tokens = [f"{mark}is", f"{mark}the", "re", f"{mark}a", f"{mark}re", "d", f"{mark}7", "?", f"{mark}A", "SS"]
    prompt = replace(tiny.vlm().prompt(None, "is there a red 7?"), tokens=tokens, image=[])
    assert prompt.find("red") == [4, 5]
    assert prompt.find("a") == [3]
    assert prompt.find("red 7") == [4, 5, 6]
    assert prompt.find("there") == [1, 2]
    with pytest.raises(ValueError):
        prompt.find("the")
