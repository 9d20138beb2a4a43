"""Images: from bytes that anybody may have sent to arrays, and from arrays to bytes that are always the same."""

import io
import math

import numpy as np
from PIL import Image

FORMATS = "PNG", "JPEG", "WEBP"
#: Feature maps that are drawn, at most, and so many in a row.
_MAPS, _ACROSS = 12, 3
#: Of each map's magnitudes, the part that is drawn without being clipped: few are much larger than all others.
_SHOWN = 0.995

# Sizes are compared with the service's own limits, which are lower.
Image.MAX_IMAGE_PIXELS = None


class Refusal(Exception):
    """A request that is not answered: an HTTP status, and what is wrong, in words for who sent it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def _open(body: bytes) -> Image.Image:
    if not body:
        raise Refusal(422, "the body is empty; it has to be an image")
    try:
        return Image.open(io.BytesIO(body), formats=FORMATS)
    except Exception:  # parsers raise all kinds of errors
        raise Refusal(422, f"the body is no image that can be read; {', '.join(FORMATS)} can") from None


def size_of(body: bytes) -> tuple[int, int]:
    """Return height and width, from the header: nothing is decoded."""
    with _open(body) as image:
        return image.height, image.width


def decode(body: bytes, channels: int) -> np.ndarray:
    """Return an image as float32 of values from 0 to 1, (channels, height, width)."""
    with _open(body) as image:
        try:
            if image.mode.startswith("I"):  # 16 bits, grey, as micrographs have
                pixels, most = np.stack([np.asarray(image)] * channels, -1), 65535
            else:
                pixels, most = np.asarray(image.convert("L" if channels == 1 else "RGB")), 255
        except Exception as error:  # decoders, too
            raise Refusal(422, f"the image is damaged or cut off: {error}") from None
    return (pixels.astype(np.float32) / np.float32(most)).reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def encode(pixels: np.ndarray) -> bytes:
    """Return uint8 of (height, width) or (height, width, 3) as PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def picture(values: np.ndarray) -> np.ndarray:
    """Return values from 0 to 1, (channels, height, width), as uint8; the last axis is colour if there is any."""
    if len(values) not in (1, 3):
        values = values[:1]
    with np.errstate(invalid="ignore"):  # NaN is black
        pixels = np.rint(np.nan_to_num(values, nan=0.0).clip(0, 1) * 255).astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def stretched(values: np.ndarray) -> np.ndarray:
    """Return values moved to between 0 and 1."""
    least, most = float(np.nanmin(values)), float(np.nanmax(values))
    if not math.isfinite(most - least) or most == least:
        return np.zeros_like(values)
    return (values - np.float32(least)) / np.float32(most - least)


def sheet(maps: np.ndarray) -> np.ndarray:
    """Return some of (maps, height, width), side by side; zero is grey in all of them, and each has its own scale."""
    maps = maps[np.linspace(0, len(maps) - 1, min(len(maps), _MAPS)).astype(int)]
    count, height, width = maps.shape
    across = min(count, _ACROSS)
    down = -(-count // across)
    drawn = np.full((down * (height + 1) - 1, across * (width + 1) - 1), 255, np.uint8)
    for index, each in enumerate(maps):
        row, column = divmod(index, across)
        top, left = row * (height + 1), column * (width + 1)
        largest = max(float(np.quantile(np.abs(np.nan_to_num(each)), _SHOWN)), 1e-12)
        drawn[top : top + height, left : left + width] = picture(0.5 + each[None] / (2 * np.float32(largest)))
    return drawn
