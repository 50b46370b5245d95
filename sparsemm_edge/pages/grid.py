"""Pages that the demo model reads: lines of a key and a value, one glyph per patch of the image encoder.

A page is a grid of square cells, as LLaVA cuts an image into patches: DEMO, what the demo model reads, has
24 x 24 as LLaVA-1.5 has, SMALL has 16 x 16. Lines `KEY value`, such as `KQ 7F3`, lie on rows and from columns
of their own; each has a font, a size and a colour. A key is two letters, and they appear nowhere else on the
page.

Seeds below FIRST_TRAINING_SEED are held out. The demo model is trained on seeds from there on only.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sparsemm_edge.pages import SANS, SERIF, Chunk, Page, contrast, font, noisy

CELL = 14
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O: they look like digits
DIGITS = "0123456789"
VALUE_LENGTH = (3, 6)
FIRST_TRAINING_SEED = 1_000_000

READ_PROMPTS = ("Read the page.", "What does the page say?")
LOOKUP_PROMPTS = ("What is {}?", "Look up {}.")
READ_PROMPT = READ_PROMPTS[0]

_FONTS = (*SANS, "DejaVuSansMono-Bold", *SERIF)
_FONT_SIZES = (10, 11, 12, 13)  # pixels an em
_MARGIN = 3  # by how much a glyph's mask is larger than its cell, on every side
_LEAST_CONTRAST = 90.0  # of ink and paper, in steps of grey


@dataclass(frozen=True)
class Grid:
    """A kind of pages.

    Attributes:
        name: the data set's name.
        side: cells in a row and in a column.
        n_lines: least and most lines of a page.
    """

    name: str
    side: int
    n_lines: tuple[int, int]

    @property
    def size(self) -> int:
        """Pixels in a row and in a column."""
        return CELL * self.side


DEMO = Grid("grid", 24, (2, 8))
SMALL = Grid("grid-16", 16, (2, 6))
GRIDS = {grid.name: grid for grid in (DEMO, SMALL)}
SIZE = DEMO.size


@dataclass(frozen=True)
class GridPage(Page):
    """A page of lines; its chunks are its glyphs, since the model's tokens are characters.

    Attributes:
        text: the expected transcription: the lines in reading order, joined by newlines.
        lookups: key and expected answer (the line) of each line.
    """

    text: str
    lookups: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Line:
    """A line of text on the grid; `row` and `column` are the cell of its first character."""

    row: int
    column: int
    text: str


def lookup_prompt(key: str) -> str:
    """The question for the value of a key."""
    return LOOKUP_PROMPTS[0].format(key)


def grid_page(seed: int, n_lines: int | None = None, grid: Grid = DEMO) -> GridPage:
    """The page of a seed.

    Args:
        seed: 0 or more; below FIRST_TRAINING_SEED it is held out from training.
        n_lines: within grid.n_lines; None: the seed chooses.
        grid: the kind of page.
    """
    rng = np.random.default_rng(seed)
    if n_lines is None:
        n_lines = int(rng.integers(grid.n_lines[0], grid.n_lines[1] + 1))
    lines = _random_lines(rng, n_lines, grid)
    texts = [line.text for line in lines]
    return GridPage(
        name=f"{grid.name}-{seed}",
        image=Image.fromarray(draw_lines(rng, lines, grid)),
        chunks=tuple(chunk for line in lines for chunk in _glyphs(line)),
        text="\n".join(texts),
        lookups=tuple((text.split()[0], text) for text in texts),
    )


def draw_lines(rng: np.random.Generator, lines: list[Line], grid: Grid = DEMO) -> npt.NDArray[np.uint8]:
    """A page with these lines, in random fonts and colours: [grid.size, grid.size, 3]."""
    paper = rng.uniform(0, 255, 3)
    page = np.empty((grid.size + 2 * _MARGIN, grid.size + 2 * _MARGIN, 3), np.float32)
    page[:] = paper
    for line in lines:
        name, size = rng.choice(_FONTS), int(rng.choice(_FONT_SIZES))
        ink = _ink(rng, paper)
        jitter = rng.integers(-1, 2, (len(line.text), 2))
        for i, char in enumerate(line.text):
            if char == " ":
                continue
            mask = _glyph_mask(name, size, char)
            # of the mask, margin included, in the page with its own margin
            y, x = np.maximum(np.array([line.row, line.column + i]) * CELL + jitter[i], 0)
            region = page[y : y + len(mask), x : x + len(mask)]
            region += mask[: len(region), : region.shape[1]] * (ink - region)
    return noisy(rng, page[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN], 10)


def _random_lines(rng: np.random.Generator, n_lines: int, grid: Grid) -> list[Line]:
    shuffled = rng.permutation(list(LETTERS))
    keys = ["".join(shuffled[2 * i : 2 * i + 2]) for i in range(n_lines)]
    rest = [*shuffled[2 * n_lines :], *DIGITS]
    lines = []
    for row, key in zip(np.sort(rng.choice(grid.side, n_lines, replace=False)), keys, strict=True):
        length = int(rng.integers(VALUE_LENGTH[0], VALUE_LENGTH[1] + 1))
        text = f"{key} {''.join(rng.choice(rest, length))}"
        lines.append(Line(int(row), int(rng.integers(0, grid.side - len(text) + 1)), text))
    return lines


def _glyphs(line: Line) -> list[Chunk]:
    """The characters of a line, each with its cell as the box: ink reaches over it by a pixel or two."""
    top = line.row * CELL
    return [
        Chunk(char, ((line.column + i) * CELL, top, (line.column + i + 1) * CELL, top + CELL))
        for i, char in enumerate(line.text)
        if char != " "
    ]


def _ink(rng: np.random.Generator, paper: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """A colour with contrast to the paper."""
    while True:
        ink = rng.uniform(0, 255, 3)
        if contrast(paper, ink) >= _LEAST_CONTRAST:
            return ink.astype(np.float32)


@cache
def _glyph_mask(name: str, size: int, char: str) -> npt.NDArray[np.float32]:
    """Coverage of a glyph in the middle of a cell with a margin all round: [side, side, 1], 0 to 1."""
    face = font(name, size)
    side = CELL + 2 * _MARGIN
    mask = Image.new("L", (side, side))
    height = -face.getbbox("H", anchor="ls")[1]
    ImageDraw.Draw(mask).text((side / 2, round((side + height) / 2)), char, fill=255, font=face, anchor="ms")
    return np.asarray(mask, np.float32)[..., None] / np.float32(255)
