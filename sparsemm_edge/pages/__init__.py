"""Page images with known text, for scoring, for the demo model and for eval."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Chunk:
    """A piece of text on a page, with its box.

    Attributes:
        text: the text, never empty.
        box: left, top, right, bottom in pixels; right and bottom lie outside the ink.
    """

    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Page:
    """Attributes:
    name: a file name, or the seed it was made from.
    image: RGB.
    chunks: its text in reading order.
    """

    name: str
    image: Image.Image
    chunks: tuple[Chunk, ...]
