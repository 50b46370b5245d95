"""Document-like pages with known text, to score heads on: headings and columns of words and numbers.

Pages differ in font, size, columns, colours and noise. Every word is a chunk with its own box, and no text
stands on a page twice, so that a word can be told from the others by what it says.
"""

from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.pages import SANS, SERIF, Chunk, Page, contrast, font, noisy

PROMPT = "Write down all the text in this image, word by word, in reading order."
"""What a model is asked about such a page."""

SIZE = (896, 672)  # width, height
LEAST_SIZE, LARGEST_SIZE = 128, 4096  # pixels a side

_FONTS = (*SANS, *SERIF, "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LEAST_CONTRAST = 110.0  # of ink and paper, in steps of grey
_LEAST_FONT_SIZE = 14  # pixels an em, on a page of SIZE


def document_page(seed: int, size: tuple[int, int] = SIZE) -> Page:
    """The page of a seed.

    Args:
        seed: 0 or more.
        size: width and height in pixels.

    Raises:
        SparseMMError: a side is shorter than LEAST_SIZE or longer than LARGEST_SIZE.
    """
    if not LEAST_SIZE <= min(size) <= max(size) <= LARGEST_SIZE:
        raise SparseMMError(
            f"a page of {size[0]} x {size[1]} pixels: sides must be {LEAST_SIZE} to {LARGEST_SIZE} pixels"
        )
    rng = np.random.default_rng(seed)
    paper, ink = _colours(rng)
    image = Image.fromarray(_paper(rng, paper, size))
    page = _Page(rng, image, ink)
    page.write()
    return Page(f"document-{seed}", Image.fromarray(_worn(rng, image)), tuple(page.chunks))


@cache
def words() -> tuple[str, ...]:
    return tuple((files("sparsemm_edge.pages") / "words.txt").read_text(encoding="utf-8").split())


class _Page:
    """A page being written, column by column from the top."""

    def __init__(self, rng: np.random.Generator, image: Image.Image, ink: tuple[int, ...]) -> None:
        self.rng = rng
        self.draw = ImageDraw.Draw(image)
        self.ink = ink
        self.width, self.height = image.size
        self.scale = max(0.6, (self.width * self.height) ** 0.5 / (SIZE[0] * SIZE[1]) ** 0.5)
        self.chunks: list[Chunk] = []
        self.used: set[str] = set()
        self.unused = list(rng.permutation(words()))

    def write(self) -> None:
        rng = self.rng
        margin = int(rng.uniform(0.04, 0.09) * self.width)
        top = int(rng.uniform(0.04, 0.09) * self.height)
        n_columns = int(rng.choice([1, 1, 2, 2, 3])) if self.width >= 400 else 1
        family = str(rng.choice(_FONTS))
        size = max(8, round(rng.uniform(_LEAST_FONT_SIZE, 26) * self.scale))
        if rng.random() < 0.6:
            heading = font(str(rng.choice(_FONTS)), round(size * rng.uniform(1.3, 1.9)))
            top = self._line(heading, margin, top, self.width - margin) + size
            if rng.random() < 0.5:
                self.draw.line([margin, top - size // 2, self.width - margin, top - size // 2], self.ink)
        gap = size * 2
        column_width = (self.width - 2 * margin - gap * (n_columns - 1)) / n_columns
        for column in range(n_columns):
            left = round(margin + column * (column_width + gap))
            begin = top + int(max(0.0, rng.uniform(-0.3, 0.5)) * self.height)
            self._column(font(family, size), left, begin, round(left + column_width))

    def _column(self, font: ImageFont.FreeTypeFont, left: int, top: int, right: int) -> None:
        spacing = self.rng.uniform(1.25, 2.2)
        bottom = self.height - 2 * font.size
        # short columns, too: what a page says should fit into an answer
        n_lines = int(self.rng.integers(3, 13))
        for _ in range(n_lines):
            if top + font.size * spacing > bottom or self.rng.random() < 0.04:
                break
            indent = int(self.rng.choice([0, 0, 0, 0, font.size * 2]))
            following = self._line(font, left + indent, top, right)
            top = max(following, top + round(font.size * spacing))
            if self.rng.random() < 0.12:
                top += int(font.size)  # a new paragraph

    def _line(self, font: ImageFont.FreeTypeFont, left: int, top: int, right: int) -> int:
        """Draw words as far as they fit; returns where the next line may begin."""
        blank = font.getlength(" ")
        x, bottom = float(left), top + int(font.size)
        while True:
            text = self._text()
            width = font.getlength(text)
            if x + width > right:
                return bottom
            box = self.draw.textbbox((x, top), text, font=font)
            if box[3] > self.height:
                return bottom
            self.draw.text((x, top), text, fill=self.ink, font=font)
            self.chunks.append(Chunk(text, (box[0], box[1], box[2], box[3])))
            self.used.add(text)
            x += width + blank
            bottom = max(bottom, round(box[3]) + 2)

    def _text(self) -> str:
        """A word, a number or a string of letters that is not yet on the page."""
        rng = self.rng
        while True:
            kind = rng.random()
            if kind < 0.7 and self.unused:
                text = self.unused.pop()
                if rng.random() < 0.15:
                    text = text.capitalize()
                if rng.random() < 0.08:
                    text += str(rng.choice([".", ",", ":", ";"]))
            elif kind < 0.85:
                text = _number(rng)
            else:
                letters = "".join(rng.choice(list(_LETTERS), int(rng.integers(3, 8))))
                text = letters.upper() if rng.random() < 0.5 else letters
            if text not in self.used:
                return text


def _number(rng: np.random.Generator) -> str:
    digits = "".join(str(digit) for digit in rng.integers(0, 10, int(rng.integers(2, 7))))
    forms = (digits, f"{digits[:-1]}.{digits[-1]}", f"{int(digits) % 100}%", f"{digits}-{digits[::-1]}")
    return str(rng.choice(forms))


def _colours(rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], tuple[int, ...]]:
    """Paper and ink; half of the pages are dark on nearly white."""
    if rng.random() < 0.5:
        paper, ink = rng.uniform(225, 256, 3), rng.uniform(0, 70, 3)
    else:
        paper, ink = rng.uniform(0, 256, (2, 3))
        while contrast(paper, ink) < _LEAST_CONTRAST:
            paper, ink = rng.uniform(0, 256, (2, 3))
    return paper, tuple(int(channel) for channel in ink)


def _paper(
    rng: np.random.Generator, colour: npt.NDArray[np.float64], size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """A sheet of one colour with a slight shade across it: [height, width, 3]."""
    across, down = (np.linspace(-0.5, 0.5, side) for side in size)
    slope = rng.uniform(-14, 14, 2)
    shade = down[:, None] * slope[0] + across * slope[1]
    return np.clip(colour + shade[..., None], 0, 255).astype(np.uint8)


def _worn(rng: np.random.Generator, image: Image.Image) -> npt.NDArray[np.uint8]:
    """The page a little out of focus and with some noise, nothing moved: [height, width, 3]."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.7))))
    return noisy(rng, np.asarray(image, np.float32), 8)
