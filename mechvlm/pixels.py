"""The one door through which pictures come in: a file, its bytes, a PIL image or an array, as an upright RGB picture.

Rule this module guards: what comes out is the picture as a viewer shows it on white, pixel for pixel; whatever
else a file holds or fails to hold is refused in a sentence, and never with what Pillow raises.

>>> to_picture(np.zeros((3, 4))).size
(4, 3)
"""

from io import BytesIO
from pathlib import Path
from struct import error as StructError

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

DAMAGED = (
    *(OSError, SyntaxError, EOFError, StructError, AssertionError, Image.DecompressionBombError),
    *(ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
)
"""What Pillow raises over a file that breaks off or makes no sense; which it is depends on the format."""


def to_picture(image: str | Path | bytes | np.ndarray | Image.Image) -> Image.Image:
    """A picture as mechvlm uses it, upright, in red, green and blue, from whatever holds one.

    A rotation that the camera noted (EXIF) is carried out, what is transparent is laid on white, and 16 bits become 8.
    Of a phone's multi-picture JPEG (MPO) the main picture is taken.

    Args:
        image: a path, a file's bytes, a PIL image, or an array of (height, width), (height, width, 3) or
            (height, width, 4), uint8 or float from 0 to 1.

    Raises:
        ValueError: if there is no picture, or more than one.
        TypeError: for anything else.

    Example:
        >>> to_picture(np.zeros((3, 4))).size
        (4, 3)
    """
    if isinstance(image, np.ndarray):
        return _upright(_from_array(image), "the array")
    if isinstance(image, Image.Image):
        return _upright(image, "the picture")
    if isinstance(image, bytes):
        return _decoded(image, "the file given as bytes")
    if not isinstance(image, str | Path):
        raise TypeError(f"{type(image).__name__} is not a picture; give a path, bytes, a PIL image or a numpy array.")
    name, path = f"'{image}'", Path(image)
    if str(image).lower().startswith(("http:/", "https:/")):  # of two slashes, a Path keeps one
        raise ValueError(f"{name} is an address, and mechvlm downloads nothing; save the picture and give its path.")
    if not path.is_file():
        raise ValueError(f"there is no file {name}; give the path of one picture.")
    return _decoded(path.read_bytes(), name)


def _decoded(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty; give a file that holds a picture.")
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture that Pillow can read; save it as PNG or JPEG.") from None
    except Image.DecompressionBombError as reason:  # an Exception of its own, of no kind below
        raise ValueError(
            f"{name} has more pixels than Pillow opens ({str(reason).rstrip('.')}); give a smaller copy."
        ) from None
    except DAMAGED as reason:
        raise ValueError(f"{name} is cut short or damaged ({_said(reason)}); save it again.") from reason
    return _upright(image, name)


def _said(reason: Exception) -> str:
    """The first line of what Pillow says, to stand within a sentence."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0].rstrip(".")


def _upright(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} is {image.size[0]} x {image.size[1]} pixels; a picture has at least one each way.")
    turned = _read(image, name)
    if turned is None:
        raise ValueError(
            f"{name} has several frames ({image.format}); pick one: open it with PIL.Image.open, go to a frame with "
            f"image.seek(0), and give image.copy()."
        )
    if turned.mode in ("I", "F"):
        raise ValueError(
            f"{name} holds 32-bit numbers (mode {turned.mode}), which have no white; give an array of floats, 0 to 1."
        )
    clear = turned.info.get("transparency")
    if turned.mode.startswith("I;16"):
        levels = np.asarray(turned)
        return from_levels(np.where(levels == clear, 255, levels / 257)).convert("RGB")  # equal to None is nothing
    if isinstance(clear, tuple) and max(clear) > 255:
        raise ValueError(
            f"{name} has a transparent colour of 16 bits, {clear}, and Pillow reads 8; save it with 8 bits a channel."
        )
    if turned.has_transparency_data:
        layer = (turned.convert("LA") if turned.mode == "La" else turned).convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return turned.convert("RGB")


def _read(image: Image.Image, name: str) -> Image.Image | None:
    """The pixels, turned upright; None where there are several frames.

    Raises:
        ValueError: where they cannot be read, which Pillow finds out only now.
    """
    try:
        return None if image.format != "MPO" and _has_frames(image) else ImageOps.exif_transpose(image)
    except DAMAGED as reason:
        raise ValueError(
            f"{name} is cut short or damaged ({_said(reason)}); save it again."
            if name != "the picture"
            else f"the picture cannot be read ({_said(reason)}); its file is damaged, or was closed before it was read."
        ) from reason


def _has_frames(image: Image.Image) -> bool:
    """Whether there is a second frame, found out by going there and back, which every PIL image can be asked."""
    if image.tell() == 0:
        try:
            image.seek(1)
        except EOFError:
            return False
        image.seek(0)
    return True


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim < 2 or array.shape[2:] not in ((), (3,), (4,)) or 0 in array.shape:
        turn = "; move the channels last with array.transpose(1, 2, 0)" if array.shape[:1] in ((1,), (3,), (4,)) else ""
        raise ValueError(
            f"an array of shape {array.shape} is not a picture; its shape must be (height, width), (height, width, 3) "
            f"or (height, width, 4){turn}."
        )
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype} is not a picture; make it uint8, 0 to 255, or float, 0 to 1.")
    if not (array.min() >= 0 and array.max() <= 1):  # so that a nan is refused too
        raise ValueError(
            f"floats of a picture go from 0 to 1, and these from {array.min():.4g} to {array.max():.4g}; rescale them."
        )
    return from_levels(array * 255.0)


def from_levels(levels: np.ndarray) -> Image.Image:
    """A picture of levels from 0 to 255, rounded and clipped."""
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
