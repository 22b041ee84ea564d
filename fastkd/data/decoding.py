"""Image files as 8-bit RGB, as a viewer on white paper shows them.

Grey of 16 bits is divided by 257 (TIFF's 12 bits by 4095 / 255): order and range stay. Transparency is laid over white:
the colours that stand under alpha 0 are not seen. The orientation that EXIF and TIFF give is carried out. 32-bit
integers and floats are refused by name: nothing says which value is white.
"""

import errno
from typing import Any

import numpy as np

from fastkd._core.extras import require

VERSION = 2  # changes when the pixels of a file do; kept logits and trained guides know it


class UnreadableImage(ValueError):
    """A file that is missing, truncated or no image: `path`, and `reason` in a few words."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"image {path} cannot be read ({reason}); remove or replace it")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


# What is wrong with the machine, not with the file.
_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def open_image(path: str) -> Any:
    """The image in file `path` as a PIL image in RGB. Raises UnreadableImage, naming the file, if it cannot be read."""
    pillow = require("PIL.Image", "Reading images")
    try:
        with pillow.open(path) as image:
            return as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
            raise
        known = error.strerror if isinstance(error, OSError) and error.errno else ""
        reason = known or str(error) or type(error).__name__
        raise UnreadableImage(path, " ".join(reason.replace(f" {path!r}", "").split())) from error


def as_rgb(image: Any) -> Any:
    """A PIL image of any mode as one of mode RGB, upright. ValueError for a mode whose range nobody knows."""
    image.load()  # what the end of a file says (transparency, EXIF) is known then
    turn = _orientation(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WIDE):
        image = _from_many_bits(image)
    elif image.mode in _NO_RANGE:
        raise ValueError(
            f"its pixels are {_NO_RANGE[image.mode]} (mode {image.mode}), of which nothing says what is white: save it "
            "with 8 or 16 bits a channel"
        )
    elif _transparent(image):
        image = _over_white(image)
    else:
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


_NO_RANGE = {"I": "32-bit integers", "F": "32-bit floats"}
_WIDE = ("PNG", "PPM")  # whose mode I means 16 bits
_TELLS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow finds an orientation
_BITS, _MEANING, _ORIENTATION = 258, 262, 274  # TIFF's tags


def _orientation(image: Any) -> Any:
    """How to transpose an image so that it stands upright; None where it does."""
    if not hasattr(image, "tag_v2") and not any(key in image.info for key in _TELLS):
        return None  # to ask `getexif` would take as long as a small image
    how = require("PIL.Image", "Reading images").Transpose
    turns = {2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE}
    turns |= {6: how.ROTATE_270, 7: how.TRANSVERSE, 8: how.ROTATE_90}
    try:
        return turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return None


def _transparent(image: Any) -> bool:
    palette = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info or palette == "RGBA"


def _over_white(image: Any) -> Any:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.getextrema()[3][0] < 255:
        pillow = require("PIL.Image", "Reading images")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _from_many_bits(image: Any) -> Any:
    """Grey of up to 16 bits."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF; its 12 bits come as they are, not as 16
    white = 2 ** min(16, tags.get(_BITS, (16,))[0]) - 1
    values = np.asarray(image).astype(np.int64)  # [H, W]
    grey = (np.clip(values, 0, white) * 255 + white // 2) // white
    if tags.get(_MEANING) == 0:  # TIFF's "white is zero", which Pillow carries out for 8 bits only
        grey = 255 - grey
    if "transparency" in image.info:  # one value that is not seen
        grey[values == image.info["transparency"]] = 255
    return require("PIL.Image", "Reading images").fromarray(grey.astype(np.uint8)).convert("RGB")
