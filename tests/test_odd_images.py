"""Odd pictures, and texts with too many images or too few, through every processor: a right prompt or one sentence."""

# ruff: noqa: ARG005

import contextlib
import importlib
import pkgutil
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import zoo
from PIL import Image, TiffImagePlugin
from torch import Tensor
from zoo.variant import Variant

import mechvlm as mv
from mechvlm.imagemap import ImageMap
from mechvlm.pixels import to_picture
from mechvlm.refusals import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # GLM's processor, under NumPy 2

PACKAGE = Path(mv.__file__).parent
SAID = "is there a red dog ?"
VARIANTS: dict[str, Variant] = {}
for found in pkgutil.iter_modules(zoo.__path__):
    VARIANTS |= vars(importlib.import_module(f"zoo.{found.name}")).get("VARIANTS", {})
NAMES = sorted(name for name in VARIANTS if name not in REFUSED)
SKIP = pytest.mark.skipif(find_spec("torchvision") is None, reason="the processor cannot be built without torchvision")


def marked(name: str) -> Any:
    marks = [pytest.mark.torchvision, SKIP] if VARIANTS[name].needs_torchvision else []
    return pytest.param(name, marks=marks)


every = pytest.mark.parametrize("name", [marked(name) for name in NAMES])


@pytest.fixture(autouse=True)
def untyped() -> Iterator[None]:
    """Without the test run's type checks, so that a wrong type meets our own sentence, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@cache
def vlm(name: str) -> mv.VLM:
    return mv.VLM(VARIANTS[name].model(), VARIANTS[name].processor(), name=name)


def said(call: Callable[[], object]) -> str:
    """The sentence that a call is refused with: one, on one line, raised by the package itself."""
    with pytest.raises((ValueError, TypeError)) as told:
        call()
    message, raised = str(told.value), traceback.extract_tb(told.tb)[-1]
    assert type(told.value) in (ValueError, TypeError)
    assert PACKAGE in Path(raised.filename).parents, f"{raised.filename} raised it"
    assert message.endswith(".") and "\n" not in message and message.count(". ") == 0, message
    return message


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Shapes ---------------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (2, 3), (3, 1), (4000, 50), (50, 4000), (300, 1), (1, 300)]
RATIO = (
    "a picture of {0} x {1} pixels is 300 times as {2}, and this model's processor takes at most 200 times; cut it "
    "into parts, or pad it."
)
NOTHING = (
    "a picture of {0} x {1} pixels would be less than one pixel {3} when the processor has resized it to "
    "{{'longest_edge': 48}}; cut it into parts, or pad it."
)
SINGLE = (
    "a picture of {0} x {1} pixels becomes a single image token, with which a mistral3 model cannot run; give one of "
    "more than 8 pixels one way."
)
FEW = (
    "a picture of {0} x {1} pixels becomes one of {4} before it is cut, too few for 3 tokens to see different ones; "
    "cut it into parts, or pad it."
)
THIN, LONG, SMALL = ((300, 1), (1, 300)), ((4000, 50), (50, 4000)), ((1, 1), (2, 3), (3, 1))
SHAPES = {
    **{(name, size): RATIO for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v") for size in THIN},
    **{(name, size): NOTHING for name in ("mistral3", "llava-pixtral") for size in THIN + LONG},
    **{("mistral3", size): SINGLE for size in SMALL},
    **{(name, size): FEW for name in ("idefics3", "smolvlm") for size in LONG},
}
"""What is refused, and how; every other shape gives a right prompt."""

each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def refusal(name: str, size: tuple[int, int]) -> str | None:
    wide = size[0] > size[1]
    words = ("wide as high", "high", "72 x 1") if wide else ("high as wide", "wide", "1 x 72")
    return SHAPES[name, size].format(*size, *words) if (name, size) in SHAPES else None


@every
@each_size
def test_a_picture_of_any_shape_makes_a_whole_prompt_or_is_refused_in_a_sentence(
    name: str, size: tuple[int, int]
) -> None:
    picture, refused = noise(*size), refusal(name, size)
    if refused:
        assert said(lambda: vlm(name).prompt(picture, SAID)) == refused
        return
    prompt = vlm(name).prompt(picture, SAID)
    (image,) = prompt.images
    assert image.size == size
    assert prompt.image == (prompt.encoding["input_ids"][0] == vlm(name).shape.image_token).nonzero()[:, 0].tolist()
    assert sorted(position for held in prompt.spans.values() for position in held) == list(range(len(prompt)))
    if image.of == "tokens":
        assert sorted((*image.positions, *image.separators)) == prompt.image
    heat = image.heat(np.ones(len(image.positions)))
    assert heat.shape == (size[1], size[0]) and np.nanmin(heat) == np.nanmax(heat) == 1
    assert bool(vlm(name).run(prompt).logits.isfinite().all())


def features(model: mv.VLM, picture: Image.Image) -> tuple[ImageMap, Tensor]:
    """An image's map, and what its tokens, keys or patches hold where the tower's attention says next to nothing."""
    prompt, live = model.prompt(picture, SAID), model.shape.live["vision"]
    layers = [layer for layer in range(live) if "z" in model.shape.kinds["vision"][layer]]
    weak = [mv.Edit(f"vision.{layer}.z", lambda x: x * 1e-4) for layer in layers]
    site = f"vision.{live - 1}.resid_post" if prompt.images[0].of == "patches" else "image_features"
    held = model.run(prompt, read=[site], edits=weak)[site]
    return prompt.images[0], held.reshape(-1, held.shape[-1])


def gradual(width: int, height: int) -> Image.Image:
    shade = np.add.outer(np.arange(height) / height, np.arange(width) / width) * 40 + 190
    return Image.fromarray(np.repeat(shade[:, :, None], 3, axis=2).astype(np.uint8))


def pixels_of(image: ImageMap, position: int) -> tuple[int, int, int, int] | None:
    """The whole pixels of a box, within the picture."""
    box = image.box(position)
    assert box is not None
    left, right = (min(max(round(x), 0), image.size[0]) for x in box[::2])
    top, bottom = (min(max(round(y), 0), image.size[1]) for y in box[1::2])
    return (left, top, right, bottom) if left < right and top < bottom else None


def shares(image: ImageMap, position: int, part: tuple[int, int, int, int]) -> bool:
    box = image.box(position)
    assert box is not None
    return min(box[2], part[2]) > max(box[0], part[0]) and min(box[3], part[3]) > max(box[1], part[1])


@every
@pytest.mark.parametrize("size", [(2, 3), *LONG], ids=lambda size: f"{size[0]}x{size[1]}")
def test_boxes_of_odd_shapes_hold_what_their_tokens_see(name: str, size: tuple[int, int]) -> None:
    if (name, size) in SHAPES:
        pytest.skip("refused, as the test above says")
    base = gradual(*size)
    image, before = features(vlm(name), base)
    held = sorted((*image.positions, *image.separators))
    assert len(before) == len(held)
    seen = [position for position in image.positions if pixels_of(image, position)]
    order = np.random.default_rng(0).permutation(len(seen))[:5]
    assert len(order)
    for position in (seen[number] for number in order):
        part, painted = pixels_of(image, position), base.copy()
        assert part is not None
        painted.paste((250, 20, 130), part)
        moved = (features(vlm(name), painted)[1] - before).norm(dim=-1)
        most = held[int(moved.argmax())]
        assert float(moved[held.index(position)]) > 0
        assert shares(image, most, part), f"painting {part} moved {image.box(most)} most"


# Kinds of pictures ----------------------------------------------------------------------------------------------------


def rgb(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.broadcast_to(array, (*array.shape[:2], 3)).astype(np.uint8))


def on_white(colours: np.ndarray, clear: np.ndarray) -> Image.Image:
    return rgb(np.where(clear[..., None], 255, colours))


def saved(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    data = BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


COLOURS = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
GREY, CLEAR = COLOURS[..., :1], COLOURS[..., 1] > 128
ALPHA = np.where(CLEAR, 0, 255).astype(np.uint8)[..., None]


def palette() -> tuple[Image.Image, Image.Image]:
    """A palette of which colour 2 is transparent."""
    numbers = (COLOURS[..., 0] % 4).astype(np.uint8)
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    image = Image.frombytes("P", (48, 40), numbers.tobytes())
    image.putpalette(table.tobytes())
    made = Image.open(BytesIO(saved(image, transparency=2)))
    return made, on_white(table[numbers], numbers == 2)


def turned() -> tuple[bytes, Image.Image]:
    """A JPEG whose camera says that it was turned: its left edge is the picture's upper edge."""
    exif = Image.Exif()
    exif[0x112] = 6
    data = saved(Image.fromarray(COLOURS), "JPEG", exif=exif)
    stored = np.asarray(Image.open(BytesIO(saved(Image.fromarray(COLOURS), "JPEG"))))
    return data, Image.fromarray(np.ascontiguousarray(np.rot90(stored, -1)))


def deep_tiff() -> bytes:
    levels = (COLOURS[..., 0].astype(np.uint16) * 257).astype(">u2")
    image = Image.frombytes("I;16B", (48, 40), levels.tobytes())
    return saved(image, "TIFF", tiffinfo=TiffImagePlugin.ImageFileDirectory_v2())


BITS = COLOURS[..., 0] > 100
RIGHT: dict[str, Callable[[], tuple[Any, Image.Image]]] = {
    "grey": lambda: (Image.fromarray(GREY[..., 0]), rgb(GREY)),
    "grey with transparency": lambda: (
        Image.fromarray(np.concatenate([GREY, ALPHA], -1), "LA"),
        on_white(GREY, CLEAR),
    ),
    "colours with transparency": lambda: (
        Image.fromarray(np.concatenate([COLOURS, ALPHA], -1)),
        on_white(COLOURS, CLEAR),
    ),
    "palette with transparency": palette,
    "one bit": lambda: (Image.fromarray(BITS), rgb(BITS[..., None] * 255)),
    "16 bits": lambda: (Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), rgb(GREY)),
    "16 bits, a file": lambda: (deep_tiff(), rgb(GREY)),
    "CMYK": lambda: (
        Image.fromarray(np.concatenate([255 - COLOURS, np.zeros_like(GREY)], -1), "CMYK"),
        Image.fromarray(COLOURS),
    ),
    "turned by the camera": turned,
    "GIF of one frame": lambda: (saved(Image.fromarray(GREY[..., 0]), "GIF"), rgb(GREY)),
    "array of bytes": lambda: (COLOURS, Image.fromarray(COLOURS)),
    "array of floats": lambda: (COLOURS.astype(np.float32) / 255, Image.fromarray(COLOURS)),
    "array with transparency": lambda: (np.concatenate([COLOURS, ALPHA], -1), on_white(COLOURS, CLEAR)),
}


@every
@pytest.mark.parametrize("kind", RIGHT)
def test_a_picture_of_any_kind_is_encoded_as_what_a_viewer_shows(name: str, kind: str) -> None:
    given, shown = RIGHT[kind]()
    prompt, plain = vlm(name).prompt(given, SAID), vlm(name).prompt(shown, SAID)
    assert prompt.pictures[0].mode == "RGB" and prompt.pictures[0].tobytes() == shown.tobytes()
    assert prompt.images == plain.images and prompt.images[0].size == shown.size
    assert list(prompt.encoding) == list(plain.encoding)
    assert all(torch.equal(value, plain.encoding[key]) for key, value in prompt.encoding.items())
    assert prompt.images[0].heat(np.zeros(len(prompt.images[0].positions))).shape == (shown.size[1], shown.size[0])
    assert bool(vlm(name).run(prompt).logits.isfinite().all())


def film() -> bytes:
    return saved(noise(8, 8), "GIF", save_all=True, append_images=[noise(8, 8, 1), noise(8, 8, 2)])


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def closed() -> Image.Image:
    with opened(saved(noise(8, 8))) as image:
        return image


def key_of_16_bits() -> bytes:
    """A PNG of 8 bits a channel whose transparent colour has 16."""
    data = saved(Image.fromarray(COLOURS), transparency=(1, 2, 3))
    at = data.index(b"tRNS") + 4
    body = b"tRNS" + b"\x10\x01\x00\x02\x00\x03"
    return data[: at - 4] + body + zlib.crc32(body).to_bytes(4, "big") + data[at + 10 :]


CUT = "image file is truncated"
WRONG: dict[str, tuple[str, Callable[[Path], object]]] = {
    "32-bit whole numbers": (
        "the picture holds 32-bit numbers (mode I), which have no white; give an array of floats, 0 to 1.",
        lambda folder: Image.new("I", (8, 8), 70000),
    ),
    "32-bit floats": (
        "the picture holds 32-bit numbers (mode F), which have no white; give an array of floats, 0 to 1.",
        lambda folder: Image.new("F", (8, 8), 0.5),
    ),
    "several frames": (
        "the file given as bytes has several frames (GIF); pick one: open it with PIL.Image.open, go to a frame with "
        "image.seek(0), and give image.copy().",
        lambda folder: film(),
    ),
    "several frames, opened": (
        "the picture has several frames (GIF); pick one: open it with PIL.Image.open, go to a frame with "
        "image.seek(0), and give image.copy().",
        lambda folder: opened(film()),
    ),
    "array of 16 bits": (
        "an array of uint16 is not a picture; make it uint8, 0 to 255, or float, 0 to 1.",
        lambda folder: COLOURS.astype(np.uint16),
    ),
    "array of floats to 255": (
        "floats of a picture go from 0 to 1, and these from 0 to 255; rescale them.",
        lambda folder: COLOURS.astype(np.float64),
    ),
    "cut short": (
        f"the file given as bytes is cut short or damaged ({CUT}); save it again.",
        lambda folder: saved(noise(40, 40))[:-2000],
    ),
    "cut short, a file": (
        f"'cut.png' is cut short or damaged ({CUT}); save it again.",
        lambda folder: written(folder / "cut.png", saved(noise(40, 40))[:-2000]),
    ),
    "cut short, opened": (
        f"the picture cannot be read ({CUT}); its file is damaged, or was closed before it was read.",
        lambda folder: opened(saved(noise(40, 40))[:-2000]),
    ),
    "closed": (
        "the picture cannot be read (AssertionError); its file is damaged, or was closed before it was read.",
        lambda folder: closed(),
    ),
    "empty": (
        "'none.png' is empty; give a file that holds a picture.",
        lambda folder: written(folder / "none.png", b""),
    ),
    "words": (
        "'words.png' is not a picture that Pillow can read; save it as PNG or JPEG.",
        lambda folder: written(folder / "words.png", b"a cat on a mat"),
    ),
    "a folder": ("there is no file '.'; give the path of one picture.", lambda folder: folder),
    "nothing": ("NoneType is not a picture; give a path, bytes, a PIL image or a numpy array.", lambda folder: [None]),
    "a tensor": (
        "Tensor is not a picture; give a path, bytes, a PIL image or a numpy array.",
        lambda folder: torch.zeros(3, 8, 8),
    ),
    "no pixels": (
        "the picture is 0 x 5 pixels; a picture has at least one each way.",
        lambda folder: Image.new("RGB", (0, 5)),
    ),
    "transparent colour of 16 bits": (
        "the file given as bytes has a transparent colour of 16 bits, (4097, 2, 3), and Pillow reads 8; save it with 8 "
        "bits a channel.",
        lambda folder: key_of_16_bits(),
    ),
}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@every
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_picture_is_refused_in_a_sentence(name: str, kind: str, tmp_path: Path) -> None:
    sentence, make = WRONG[kind]
    given = make(tmp_path)
    heard = said(lambda: vlm(name).prompt(given, SAID))
    assert heard.replace(f"{tmp_path}/", "").replace(f"{tmp_path}", ".") == sentence


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """A file cut somewhere, or with some bytes that are others."""
    if generator.random() < 0.4:
        return data[: generator.integers(1, len(data))]
    made = bytearray(data)
    for _ in range(generator.integers(1, 8)):
        made[generator.integers(0, len(made))] = generator.integers(0, 256)
    return bytes(made)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds in the files
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM", "PCX", "TGA", "SGI", "DDS", "IM"])
def test_whatever_pillow_raises_over_a_damaged_file_is_said_in_a_sentence(kind: str) -> None:
    generator, whole, refused = np.random.default_rng(0), saved(noise(24, 20), kind), 0
    for _ in range(150):
        data = damaged(whole, generator)
        doors: list[Any] = [data]
        with contextlib.suppress(Exception):  # Pillow's own, before a picture comes to us
            doors.append(opened(data))
        for given in doors:
            if isinstance(given, Image.Image) and given.size[0] * given.size[1] > 10**6:
                continue
            try:
                assert to_picture(given).mode == "RGB"
            except ValueError as error:
                raised = traceback.extract_tb(error.__traceback__)[-1]
                assert Path(raised.filename) == PACKAGE / "pixels.py", str(error)
                refused += 1
    assert refused


def test_premultiplied_transparency_is_laid_on_white() -> None:
    plain = Image.fromarray(np.concatenate([GREY, ALPHA], -1), "LA")
    assert to_picture(plain.convert("La")).tobytes() == on_white(GREY, CLEAR).tobytes()


def test_a_transparent_level_of_16_bits_is_laid_on_white() -> None:
    image = Image.fromarray(np.array([[1000, 257 * 7]], np.uint16))
    assert np.asarray(to_picture(saved(image, transparency=1000)))[..., 0].tolist() == [[255, 7]]


# Pictures that become zero --------------------------------------------------------------------------------------------


@every
def test_a_picture_that_becomes_zero_is_seen_or_refused(name: str) -> None:
    model = mv.VLM(VARIANTS[name].model(), VARIANTS[name].processor(), name=name)
    model.processor.image_processor.do_normalize = False
    kind, black = model.hf.config.model_type, Image.new("RGB", (48, 40))
    if kind in ("idefics3", "smolvlm"):
        assert said(lambda: model.prompt(black, SAID)) == (
            f"a part of the picture is 0 everywhere in pixel_values, which {kind} models take for padding and leave "
            "out; change one of its pixels a little."
        )
        black.putpixel((3, 3), (1, 1, 1))  # the squares that do not hold it are still black
        assert said(lambda: model.prompt(black, SAID)).startswith("a part of the picture is 0 everywhere")
        black = Image.new("RGB", (48, 40), (1, 1, 1))
    prompt = model.prompt(black, SAID)
    assert bool(model.run(prompt).logits.isfinite().all())


# Images and their places in the text ----------------------------------------------------------------------------------


def mark_of(model: mv.VLM) -> str:
    row = model.arch.row
    return model.processor.image_token if row.mark is None else row.mark


@every
@pytest.mark.parametrize(("marks", "images"), [(0, 1), (2, 1), (1, 2), (1, 0), (3, 2)])
def test_a_text_with_too_many_marks_or_too_few_is_refused(name: str, marks: int, images: int) -> None:
    model, pictures = vlm(name), [noise(48, 40, seed) for seed in range(images)]
    mark = mark_of(model)
    if not mark:
        pytest.skip("the processor puts the image before the text by itself")
    text = f"{mark} " * marks + SAID
    sentence = (
        f"the text has {marks} {mark} and {images} images were given; with raw=True each image needs one {mark} in the "
        "text, where it is to stand."
    )
    if not images and model.hf.config.model_type == "paligemma":
        assert said(lambda: model.prompt(pictures, text, raw=True)) in (sentence, blind("paligemma"))
        return
    assert said(lambda: model.prompt(pictures, text, raw=True)) == sentence


def blind(kind: str) -> str:
    return f"{kind} models read no text without an image; give one."


@every
def test_a_text_without_an_image_is_read_or_refused(name: str) -> None:
    model = vlm(name)
    kind = model.hf.config.model_type
    if kind in ("blip-2", "instructblip", "paligemma"):
        assert said(lambda: model.prompt(None, SAID)) == blind(kind)
        return
    prompt = model.prompt(None, SAID)
    assert prompt.images == [] and bool(model.run(prompt).logits.isfinite().all())


@every
def test_two_images_are_read_or_refused(name: str) -> None:
    model, pictures = vlm(name), [noise(48, 40), noise(30, 60, 1)]
    kind = model.hf.config.model_type
    if kind in ("blip-2", "instructblip"):
        assert said(lambda: model.prompt(pictures, SAID)) == (
            f"this prompt has 2 images, and {kind} writes the queries of one before the words; ask about one image at "
            "a time."
        )
        return
    prompt = model.prompt(pictures, SAID)
    assert [image.size for image in prompt.images] == [(48, 40), (30, 60)]
    assert bool(model.run(prompt).logits.isfinite().all())


BY_POSITION = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")


@cache
def ready(name: str) -> dict[str, Tensor]:
    """A ready encoding of one picture in one square, where the processor cuts: that is what can be read without one."""
    kind = vlm(name).hf.config.model_type
    return dict(vlm(name).prompt(noise(1, 1) if kind == "aya_vision" else noise(48, 40), SAID).encoding)


def take(name: str, keep: Callable[[list[int], int], list[int]]) -> dict[str, Tensor]:
    """What is changed when only some positions are kept, or some twice."""
    ids = ready(name)["input_ids"][0].tolist()
    kept = keep(ids, vlm(name).shape.image_token)
    return {key: value[:, kept] for key, value in ready(name).items() if key in BY_POSITION}


def of_images(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in ready(name).items() if key not in BY_POSITION}


def without_first(ids: list[int], image: int) -> list[int]:
    return [at for at in range(len(ids)) if at != ids.index(image)]


def twice_first(ids: list[int], image: int) -> list[int]:
    return sorted([*range(len(ids)), ids.index(image)])


def without_all(ids: list[int], image: int) -> list[int]:
    return [at for at, number in enumerate(ids) if number != image]


CHANGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "one token less": lambda name: take(name, without_first),
    "one token more": lambda name: take(name, twice_first),
    "no token": lambda name: take(name, without_all),
    "no pixels": lambda name: {"pixel_values": None},
    "nothing of images": lambda name: dict.fromkeys(of_images(name)),
    "pixels twice": lambda name: {"pixel_values": torch.cat([ready(name)["pixel_values"]] * 2)},
    "all of images twice": lambda name: {key: torch.cat([value] * 2) for key, value in of_images(name).items()},
    "half as wide": lambda name: {"pixel_values": ready(name)["pixel_values"][..., ::2].contiguous()},
    "less by one": lambda name: {"pixel_values": ready(name)["pixel_values"][:-1]},
    "no ids": lambda name: {"input_ids": None},
}


@every
@pytest.mark.parametrize("change", CHANGES)
def test_a_ready_encoding_whose_text_and_images_disagree_is_refused(name: str, change: str) -> None:
    given = {**ready(name), **CHANGES[change](name)}
    said(lambda: vlm(name).prompt(encoding={key: value for key, value in given.items() if value is not None}))


@every
def test_a_ready_encoding_is_read_as_its_picture_is(name: str) -> None:
    again, model = vlm(name).prompt(encoding=ready(name)), vlm(name)
    whole = model.prompt(noise(1, 1) if model.hf.config.model_type == "aya_vision" else noise(48, 40), SAID)
    assert (again.image, again.separators) == (whole.image, whole.separators)
    assert torch.equal(model.run(again).logits, model.run(whole).logits)


def missing(name: str) -> str:
    return f"the encoding has pixel_values and no {name}; this model needs both."


def unlike(name: str, shape: str, other: str, of: str, ends: str) -> str:
    return f"{name} has the shape {shape} and {other} {of}; they must be of the same {ends}."


def ready_with(name: str, key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[], object]:
    """A ready encoding of which one part is changed, or left out."""

    def make() -> object:
        given = {**ready(name), key: change(ready(name)[key])}
        return vlm(name).prompt(encoding={part: value for part, value in given.items() if value is not None})

    return make


def gone(_: Tensor) -> None:
    return None


def doubled(value: Tensor) -> Tensor:
    return torch.cat([value] * 2)


def shortened(value: Tensor) -> Tensor:
    return value[:, 1:]


QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
PARTS: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    *((name, part, gone, missing(part)) for name in QWEN for part in ("image_grid_thw", "mm_token_type_ids")),
    *((name, "token_type_ids", gone, missing("token_type_ids")) for name in ("gemma3", "paligemma", "paligemma2")),
    *(
        ("mllama", part, gone, missing(part))
        for part in ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    ),
    *(
        ("molmo2", part, gone, missing(part))
        for part in ("image_grids", "image_token_pooling", "image_num_crops", "mm_token_type_ids")
    ),
    *(
        (name, "image_sizes", gone, missing("image_sizes"))
        for name in ("llava_next-vicuna", "llava_onevision", "mistral3")
    ),
    ("instructblip", "qformer_input_ids", gone, missing("qformer_input_ids")),
    *(
        (
            name,
            part,
            torch.zeros_like,
            f"{part} must be 1 at the image tokens and nowhere else; encode words and pictures together.",
        )
        for name, part in (("gemma3", "token_type_ids"), *((one, "mm_token_type_ids") for one in QWEN))
    ),
    *(
        (name, part, shortened, unlike(part, f"(1, {length - 1})", "input_ids", f"(1, {length})", "positions"))
        for name, part, length in (("gemma3", "token_type_ids", 37), ("qwen2_5_vl", "mm_token_type_ids", 49))
    ),
    (
        "mllama",
        "cross_attention_mask",
        shortened,
        unlike("cross_attention_mask", "(1, 11, 1, 4)", "input_ids", "(1, 12)", "positions"),
    ),
    (
        "mllama",
        "aspect_ratio_mask",
        doubled,
        unlike("aspect_ratio_mask", "(2, 1, 4)", "pixel_values", "(1, 1, 4, 3, 16, 16)", "images"),
    ),
    (
        "mllama",
        "aspect_ratio_ids",
        doubled,
        unlike("aspect_ratio_ids", "(2, 1)", "pixel_values", "(1, 1, 4, 3, 16, 16)", "images"),
    ),
    *(
        (
            name,
            "pixel_attention_mask",
            doubled,
            unlike("pixel_attention_mask", "(2, 10, 24, 24)", "pixel_values", "(1, 10, 3, 24, 24)", "squares"),
        )
        for name in ("idefics3", "smolvlm")
    ),
    *(
        (
            "instructblip",
            part,
            doubled,
            f"{part} has the shape (2, 7), and the question is one text of 7 positions; encode words and picture "
            "together.",
        )
        for part in ("qformer_input_ids", "qformer_attention_mask")
    ),
    *(
        (
            name,
            "pixel_values",
            lambda value: value[:, ::2],
            "pixel_values have the shape (120, 48), and this model sees (patches, 96); the processor belongs to "
            "another model.",
        )
        for name in QWEN
    ),
    (
        "molmo2",
        "image_token_pooling",
        doubled,
        "image_grids is [[3, 3, 4, 6]] and image_num_crops [7], and there are 7 crops in pixel_values and 66 tokens in "
        "image_token_pooling; they must be of the same images.",
    ),
    (
        "molmo2",
        "pixel_values",
        lambda value: value[..., ::2],
        "the encoding's patches hold 24 numbers, and this model's 48; the processor belongs to another model.",
    ),
]
PART_NAMES = [name for name in {name: None for name, *_ in PARTS} if name in VARIANTS]


@pytest.mark.parametrize("name", [marked(name) for name in PART_NAMES])
def test_a_part_of_a_ready_encoding_that_is_missing_or_does_not_fit_is_named(name: str) -> None:
    heard = [(part, said(ready_with(name, part, change))) for of, part, change, _ in PARTS if of == name]
    assert heard == [(part, sentence) for of, part, _, sentence in PARTS if of == name]


@pytest.mark.parametrize("name", [marked(name) for name in ("idefics3", "smolvlm")])
def test_squares_without_a_token_are_refused(name: str) -> None:
    given = {**ready(name), **take(name, without_all)}
    assert said(lambda: vlm(name).prompt(encoding=given)) == (
        "the text holds no image token, and the encoding has pixel_values; it needs both or neither."
    )
