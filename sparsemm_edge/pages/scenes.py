"""Drawn scenes to score heads on: coloured shapes and charts, with their names and boxes.

Beyond reading, these pages ask what people photograph: which objects, of which colour, how many, where, and
what a chart shows. Models that read badly can answer that.

A chunk is an object: its text holds its possible names, in lower case and capitalised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sparsemm_edge.pages import Chunk, Page, font
from sparsemm_edge.pages.documents import words

SIZE = 448
"""Pixels a side: a scene has no small detail."""

COLOURS = {
    "red": (214, 30, 35),
    "green": (40, 150, 50),
    "blue": (35, 75, 215),
    "yellow": (245, 205, 20),
    "orange": (250, 130, 20),
    "purple": (125, 45, 160),
    "brown": (120, 70, 35),
    "pink": (250, 140, 190),
    "black": (15, 15, 15),
    "gray": (135, 135, 135),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
PROMPT = "a question of each scene"
"""What stands for the questions where one for all pages is expected."""

_CELL = SIZE / 3
_BAR_NAME_LENGTHS = range(4, 7)  # letters

_Box = tuple[float, float, float, float]
_Drawn = tuple[list[Chunk], str, str, Sequence[int]]  # chunks, and question, text and asked of a Scene


@dataclass(frozen=True)
class Scene(Page):
    """A scene.

    Attributes:
        question: what is asked about it.
        text: the shortest answer.
        asked: which of its chunks the answer names, as indices.
    """

    question: str
    text: str
    asked: tuple[int, ...]


def scene(seed: int) -> Scene:
    """The scene of a seed, 0 or more."""
    rng = np.random.default_rng(seed)
    kind = (_things, _place, _count, _chart)[int(rng.integers(4))]
    nearly_white = tuple(int(channel) for channel in rng.integers(238, 256, 3))
    image = Image.new("RGB", (SIZE, SIZE), nearly_white)
    chunks, question, text, asked = kind(rng, ImageDraw.Draw(image))
    return Scene(f"scene-{seed}", image, tuple(chunks), question, text, tuple(asked))


def named(answer: str, page: Scene) -> float:
    """The fraction of requested objects whose names are all in an answer; case is ignored."""
    said = answer.lower()
    things = [page.chunks[index].text.lower().split() for index in page.asked]
    # a number is named by its digits or its word, anything else by its colour and its shape
    found = [(any if name[0].isdigit() else all)(word in said for word in name) for name in things]
    return sum(found) / len(found)


def _things(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> _Drawn:
    """A few things of different shapes and colours: which are there?"""
    chunks, _ = _scatter(rng, draw)
    question = "Which shapes are in this picture, and which colour has each? Answer in a few words."
    return chunks, question, ", ".join(_plain(chunk) for chunk in chunks), range(len(chunks))


def _place(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> _Drawn:
    """The same: which one is at this place?"""
    chunks, cells = _scatter(rng, draw)
    asked = int(rng.integers(len(chunks)))
    row, column = cells[asked]
    question = f"Which shape is {PLACES[row][column]} of this picture, and which colour has it?"
    question += " Answer in a few words."
    return chunks, question, _plain(chunks[asked]), [asked]


def _count(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> _Drawn:
    """Several things of one shape among a few others: how many?"""
    shapes, colours = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLOURS)).tolist()
    cells = _cells(rng)
    n = int(rng.integers(2, 6))
    boxes = [_thing(rng, draw, shapes[0], colours.pop(), cells.pop()) for _ in range(n)]
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    counted = Chunk(
        f"{n} {NUMBERS[n]} {NUMBERS[n].capitalize()}", (min(lefts), min(tops), max(rights), max(bottoms))
    )
    others = []
    for shape in shapes[1 : int(rng.integers(2, 4))]:
        colour = colours.pop()
        others.append(Chunk(_said(colour, shape), _thing(rng, draw, shape, colour, cells.pop())))
    plural = f"{shapes[0]}s" if shapes[0] != "cross" else "crosses"
    question = f"How many {plural} are in this picture? Answer with a number."
    return [counted, *others], question, str(n), [0]


def _chart(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> _Drawn:
    """Bars with names below and values above: what does it show?"""
    n = int(rng.integers(3, 5))
    letters = font("DejaVuSans", 24)
    names: list[str] = []
    for word in rng.permutation([word for word in words() if len(word) in _BAR_NAME_LENGTHS]):
        if len(names) < n and not any(word in name or name in word for name in names):
            names.append(str(word))
    digits = rng.permutation(np.arange(1, 10))  # no digit twice, so that each tells its bar
    values = [int(10 * digits[2 * i] + digits[2 * i + 1]) for i in range(n)]
    colours = [COLOURS[str(colour)] for colour in rng.permutation(list(COLOURS))[:n]]
    bottom, width = SIZE - 60, SIZE / n
    draw.line([10, bottom, SIZE - 10, bottom], fill=(0, 0, 0), width=2)
    chunks = []
    for i, (bar, value) in enumerate(zip(names, values, strict=True)):
        middle = (i + 0.5) * width
        top = bottom - value / 100 * (bottom - 60)
        draw.rectangle([middle - width / 4, top, middle + width / 4, bottom - 2], fill=colours[i])
        draw.text((middle, top - 6), str(value), fill=(0, 0, 0), font=letters, anchor="mb")
        draw.text((middle, bottom + 10), bar, fill=(0, 0, 0), font=letters, anchor="mt")
        box = draw.textbbox((middle, bottom + 10), bar, font=letters, anchor="mt")
        chunks.append(Chunk(f"{bar} {bar.capitalize()}", (box[0], box[1], box[2], box[3])))
        box = draw.textbbox((middle, top - 6), str(value), font=letters, anchor="mb")
        chunks.append(Chunk(str(value), (middle - width / 4, box[1], middle + width / 4, bottom)))
    text = ", ".join(f"{bar} {value}" for bar, value in zip(names, values, strict=True))
    question = "Which bars does this chart have, and how high is each? Answer with names and numbers."
    return chunks, question, text, range(len(chunks))


def _cells(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Rows and columns of nine places, shuffled."""
    return [(int(cell) // 3, int(cell) % 3) for cell in rng.permutation(9)]


def _scatter(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw
) -> tuple[list[Chunk], list[tuple[int, int]]]:
    """Three to five things of different shapes and colours, and their rows and columns, in reading order."""
    n = int(rng.integers(3, 6))
    shapes, colours = rng.permutation(SHAPES)[:n], rng.permutation(list(COLOURS))[:n]
    cells = sorted(_cells(rng)[:n])
    chunks = [
        Chunk(_said(colour, shape), _thing(rng, draw, shape, colour, cell))
        for shape, colour, cell in zip(shapes, colours, cells, strict=True)
    ]
    return chunks, cells


def _thing(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, shape: str, colour: str, cell: tuple[int, int]
) -> _Box:
    """Draw a shape somewhere in a cell; its box."""
    side = float(rng.uniform(0.45, 0.8) * _CELL)
    top, left = (int(place * _CELL + rng.uniform(0.05, 0.95) * (_CELL - side)) for place in cell)
    box: _Box = (left, top, left + int(side), top + int(side))
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse([*box[:2], box[2] - 1, box[3] - 1], fill=fill)
    elif shape == "square":
        draw.rectangle([*box[:2], box[2] - 1, box[3] - 1], fill=fill)
    else:
        points = [(left + x * (side - 2), top + y * (side - 2)) for x, y in _OUTLINES[shape]]
        draw.polygon(points, fill=fill)
        xs, ys = zip(*points, strict=True)
        box = (math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)) + 1, math.ceil(max(ys)) + 1)
    return box


_OUTLINES: dict[str, list[tuple[float, float]]] = {  # within a square of side 1
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "star": [
        (0.5 + radius * math.sin(i * math.pi / 5), 0.5 - radius * math.cos(i * math.pi / 5))
        for i, radius in enumerate((0.5, 0.2) * 5)
    ],
    "cross": [
        *((0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65)),
        *((0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)),
    ],
}


def _said(colour: str, shape: str) -> str:
    """What may be said of a thing."""
    return f"{colour} {shape} {colour.capitalize()} {shape.capitalize()}"


def _plain(chunk: Chunk) -> str:
    """A thing's colour and shape."""
    return " ".join(chunk.text.split()[:2])
