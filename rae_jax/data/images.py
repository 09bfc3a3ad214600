"""Encoded image files to uint8 arrays and back."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from rae_jax import storage

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm"),
)

# Pillow reports damaged metadata and very large files as warnings, from whatever
# thread decodes them. The pixels are right or an exception follows, so they are
# noise; and `warnings.catch_warnings` is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """An image file that cannot be read; says which, why and what to do."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # All arguments, so that it can be pickled.
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"Cannot read {self.name}: {self.reason}. Remove or replace the file, or "
            "run `rae-jax prepare --skip-bad`, which leaves such files out and lists "
            "them."
        )


def decode(image: bytes | str | Path, name: str = "") -> np.ndarray:
    """Returns the pixels of an encoded image, uint8 (h, w, 3); see `open_rgb`."""
    return np.array(open_rgb(image, name))


def open_rgb(image: bytes | str | Path, name: str = "") -> Image.Image:
    """Returns an encoded image as a picture of Pillow, decoded, in mode "RGB".

    Equal to Pillow's `convert("RGB")`, which the official code uses, except where
    that is plainly wrong:
      * an EXIF orientation is applied (files without one, such as nearly all of
        ImageNet, are not affected);
      * 16-bit grey is scaled to 8 bits, where Pillow clips it;
      * transparent pixels are laid on white, where Pillow shows the arbitrary
        colours stored beneath them. Opaque alpha changes nothing.
    CMYK, grey and palette files become RGB; of an animation the first frame is read.

    Args:
        image: The encoded bytes, or the path of a file on a disk or in a bucket.
        name: What error messages call the image; defaults to its path.

    Raises:
        BadImageError: The file is empty, truncated, damaged or not an image.
    """
    if not isinstance(image, bytes):
        image, name = storage.read_bytes(storage.path(image)), name or str(image)
    name = name or "image"
    if not image:
        raise BadImageError(name, "the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            return _to_rgb(_upright(opened))
    except Exception as error:  # Damaged files raise nearly any type in Pillow.
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image in a known format"
        raise BadImageError(name, reason) from None


def encode(image: np.ndarray, quality: int | None = 95) -> bytes:
    """Encodes uint8 pixels (h, w, 3) as JPEG of a quality, or as PNG if it is None."""
    buffer = io.BytesIO()
    if quality is None:
        Image.fromarray(image).save(buffer, "PNG")
    else:
        # No chroma subsampling: the crops are small and are cropped again.
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return image  # It has nothing to search through.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Damaged metadata must not cost the picture.
        return image
    method = _ORIENTATIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "PA" or image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integer pixels have no defined range")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
