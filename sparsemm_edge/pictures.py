"""Open images as an image viewer shows them, for all commands and the API."""

import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from sparsemm_edge.errors import SparseMMError, one_line

Picture = str | Path | bytes | Image.Image
"""What pictures are given as: a file, its bytes, or a picture that is open already."""

_WHITE_LEVELS = (255, 4095, 65535)  # of 8, 12 and 16 bits

# What people take for pictures, how it begins (HEIC after four bytes of length), and what to do about it
_NO_PICTURES = (
    (b"%PDF", "a PDF file, not a picture: save the page as PNG, with pdftoppm -r 150 -png for instance"),
    (b"%!PS", "a PostScript file, not a picture: save it as PNG"),
    (b"<svg", "an SVG drawing, not a picture: save it as PNG"),
    *(
        (b"ftyp" + brand, "a HEIC picture, which is not supported: save it as JPEG or PNG")
        for brand in b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()
    ),
    (b"ftypavif", "an AVIF picture, which this Pillow cannot read: save it as JPEG or PNG"),
)


def open_picture(source: Picture, name: str = "") -> Image.Image:
    """Open an image as RGB, as a viewer shows it.

    EXIF rotation is applied, transparency becomes white, grey of more than 8 bits is scaled to black and
    white, and of an animation or a multi-page file the first image is used.

    Args:
        source: a file, the bytes of one, or a picture.
        name: names it in errors; a file names itself.

    Raises:
        SparseMMError: no such file, not a picture, or one that is not supported.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, name or "the picture")
    where = name or ("the picture" if isinstance(source, bytes) else str(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is large, or that its EXIF data is odd: see below
        try:
            opened = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        except (FileNotFoundError, IsADirectoryError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else "a folder, not a picture"
            raise SparseMMError(f"{where}: {reason}") from error
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise SparseMMError(f"{where}: more than {most:,} pixels: make it smaller") from error
        except Exception as error:  # decoders stumble in many ways
            raise SparseMMError(f"{where}: {_why_not(source, error)}") from error
        with opened:
            return _upright_rgb(opened, where)


def _upright_rgb(image: Image.Image, where: str) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # decoders stumble in many ways
        raise SparseMMError(f"{where}: not an image that can be read ({one_line(error)})") from error
    if not image.width or not image.height:
        raise SparseMMError(f"{where}: a picture without pixels ({image.width} x {image.height})")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # struct.error, SyntaxError, ...
        raise SparseMMError(
            f"{where}: its EXIF data is broken ({one_line(error)}): save it anew, or without EXIF data"
        ) from error
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        if image.has_transparency_data:
            picture = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return image.convert("RGB")
    except Exception as error:  # a mode that cannot be converted, for want of memory, ...
        raise SparseMMError(
            f"{where}: a picture of mode {image.mode} cannot be used ({one_line(error)})"
        ) from error


def _eight_bits(grey: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scale grey to 0 to 255. White is the smallest usual maximum that no pixel exceeds."""
    values = np.nan_to_num(grey.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    levels = _WHITE_LEVELS if np.issubdtype(grey.dtype, np.integer) else (1, *_WHITE_LEVELS)
    darkest, brightest = float(values.min()), float(values.max())
    black, white = 0.0, next((float(level) for level in levels if brightest <= level), brightest)
    if darkest < 0:  # from -1 to 1, or no usual range: from the darkest to the brightest pixel
        black, white = (-1.0, 1.0) if darkest >= -1 and brightest <= 1 else (darkest, brightest)
        white = max(white, black + 1)
    return np.rint((values - black) * (255 / (white - black))).astype(np.uint8)


def _why_not(source: str | Path | bytes, error: Exception) -> str:
    """The error message for a file that is not an image."""
    start = source[:512] if isinstance(source, bytes) else b""
    if not isinstance(source, bytes):
        with suppress(OSError, ValueError), Path(source).open("rb") as file:
            start = file.read(512)
    for magic, said in _NO_PICTURES:
        if start.startswith(magic) or start[4:].startswith(magic) or (magic == b"<svg" and magic in start):
            return said
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read (its kind is unknown)"
    return f"not an image that can be read ({one_line(error)})"
