"""Page images with known text: what heads are scored on, what the demo model reads, what eval asks about."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Chunk:
    """A stretch of text on a page, and where it is.

    Attributes:
        text: the text, never empty.
        box: left, top, right, bottom in pixels; right and bottom lie outside the ink.
    """

    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Page:
    """Attributes:
    name: how reports call it: a file name, or the seed it was made from.
    image: RGB.
    chunks: its text in reading order.
    """

    name: str
    image: Image.Image
    chunks: tuple[Chunk, ...]
