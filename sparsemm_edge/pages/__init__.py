"""Page images with known text, for scoring, for the demo model and for eval.

A seed makes a page: the same seed the same page (with the same Pillow and matplotlib, whose fonts are used).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFont

SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono")
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic")


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


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that matplotlib brings; `size` in pixels an em."""
    import matplotlib  # slow, and who only asks for the names of pages does not need it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # the basic layout is the same with and without libraqm
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def contrast(paper: npt.NDArray[np.float64], ink: npt.NDArray[np.float64]) -> float:
    """How far two RGB colours are apart in steps of grey (luma of ITU-R BT.601)."""
    return float(abs((paper - ink) @ np.array([0.299, 0.587, 0.114])))


def noisy(rng: np.random.Generator, page: npt.NDArray[np.float32], most: float) -> npt.NDArray[np.uint8]:
    """A page with grey noise of a standard deviation up to `most`: [height, width, 3], 0 to 255."""
    noise = rng.standard_normal((*page.shape[:2], 1), np.float32) * np.float32(rng.uniform(0, most))
    return np.clip(page + noise, 0, 255).astype(np.uint8)
