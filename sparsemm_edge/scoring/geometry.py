"""Map boxes on a page to image tokens: the part of the page that each image token shows.

One function per way of splitting an image. Each takes what the image processor returned (grid sizes, tile
counts, image sizes) and returns the rectangle of the page that each image token's patches show, in order.
Rectangles ignore the few pixels that resizing blurs over an edge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError

Spans = npt.NDArray[np.float64]
"""[n, 2]: where n neighbouring columns (or rows) of tokens begin and end on the page, in pixels."""

Rects = npt.NDArray[np.float64]
"""[..., 4]: left, top, right and bottom of what tokens show, in pixels of the page."""

Size = tuple[int, int]
"""Height and width, as image processors order them."""


@dataclass(frozen=True)
class ImageLayout:
    """The image tokens of a prompt, in order.

    Attributes:
        rects: float64 [n, 4], left, top, right and bottom of what a token shows, in pixels of the page; NaN
            for tokens that show nothing (row ends, class token). Tokens of padding lie outside the page.
        detail: bool [n], True for the most detailed view of the page, False for the downscaled copy that some
            architectures add.
    """

    rects: npt.NDArray[np.float64]
    detail: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rects)

    def covered(self, box: Sequence[float], *, detail: bool = True) -> npt.NDArray[np.intp]:
        """The image tokens that overlap a box, as ascending indices.

        Args:
            box: left, top, right, bottom in pixels of the page.
            detail: search the most detailed view; False: the downscaled copy.
        """
        left, top, right, bottom = self.rects.T
        wide = np.minimum(right, box[2]) - np.maximum(left, box[0])
        high = np.minimum(bottom, box[3]) - np.maximum(top, box[1])
        return np.flatnonzero((wide > 0) & (high > 0) & (self.detail == detail))


def join(*parts: tuple[Rects, bool]) -> ImageLayout:
    """Concatenate groups of tokens (rects, detail)."""
    rects = np.concatenate([part.reshape(-1, 4) for part, _ in parts])
    return ImageLayout(rects, np.concatenate([np.full(part.size // 4, detail) for part, detail in parts]))


def cells(rows: Spans, columns: Spans) -> Rects:
    """[n_rows, n_columns, 4]: the rects of a grid of tokens."""
    rects = np.empty((len(rows), len(columns), 4))
    rects[..., 1::2] = rows[:, None]
    rects[..., ::2] = columns
    return rects


def split(page: Size, n_rows: int, n_columns: int) -> Rects:
    """[n_rows, n_columns, 4]: the whole page split into equal tokens."""
    edges = [np.arange(n + 1) * (length / n) for n, length in zip((n_rows, n_columns), page, strict=True)]
    return cells(*(np.stack([each[:-1], each[1:]], axis=1) for each in edges))


def by_tile(fine: Rects, side: int) -> Rects:
    """The rects of a grid of tokens in the order of its tiles, which are `side` tokens a side."""
    n_rows, n_columns = (length // side for length in fine.shape[:2])
    return fine.reshape(n_rows, side, n_columns, side, 4).swapaxes(1, 2)


def patches(n_tiles: int, tile: int, patch: int) -> Spans:
    """The spans of the patches of adjacent tiles; pixels beyond a tile's last patch are lost."""
    starts = (np.arange(n_tiles)[:, None] * tile + np.arange(tile // patch) * patch).ravel()
    return np.stack([starts, starts + patch], axis=1).astype(np.float64)


def on_page(spans: Spans, offset: float, scale: float) -> Spans:
    """Convert spans on a canvas to spans on the page, whose pixel x lies at `offset + scale * x`."""
    return (spans - offset) / scale


def centred(page: Size, canvas: Size, tokens: list[Spans], real: type[np.floating[Any]]) -> list[Spans]:
    """Where tokens lie on a page that is scaled to fit a canvas and centred on it: spans of rows and columns.

    Args:
        page, canvas: their sizes.
        tokens: the spans of rows and columns on the canvas.
        real: the precision in which the image processor computes the scale, which decides about pixels.
    """
    scale = min(real(canvas[axis]) / real(page[axis]) for axis in range(2))
    spans = []
    for axis in range(2):
        resized = min(math.ceil(real(page[axis]) * scale), canvas[axis])
        spans.append(on_page(tokens[axis], (canvas[axis] - resized) // 2, resized / page[axis]))
    return spans


def cropped_square(
    page: Size,
    pixels: Size,
    *,
    patch: int,
    resize: dict[str, int] | None,
    pad_to_square: bool,
    n_class_tokens: int,
    n_dropped: int,
) -> ImageLayout:
    """One image of fixed size: padded, resized and cropped by the image processor (LLaVA-1.5).

    Args:
        page: its size.
        pixels: its size after processing.
        patch: pixels a side of the image encoder's patches.
        resize: the processor's `size`: {"shortest_edge": n} or {"height": h, "width": w}; None: no resizing.
        pad_to_square: pad before resizing.
        n_class_tokens: tokens that the encoder puts before the patches.
        n_dropped: tokens that the model drops at the front.

    Raises:
        SparseMMError: these settings do not give an image of this size.
    """
    padded = (max(page), max(page)) if pad_to_square else page
    if resize is None:
        resized = padded
    elif "shortest_edge" in resize:
        height, width = (resize["shortest_edge"] * length // min(padded) for length in padded)
        resized = (height, width)
    else:
        resized = (resize["height"], resize["width"])
    if resized[0] < pixels[0] or resized[1] < pixels[1]:
        raise SparseMMError(
            f"the image processor makes {pixels[0]} x {pixels[1]} pixels of a page of {page[0]} x {page[1]},"
            f" which its settings do not explain (resized to {resized[0]} x {resized[1]})"
        )
    spans = []
    for axis in range(2):
        scale = resized[axis] / padded[axis]
        crop = (resized[axis] - pixels[axis]) // 2
        margin = (padded[axis] - page[axis]) // 2
        spans.append(on_page(patches(1, pixels[axis], patch), margin * scale - crop, scale))
    rects = np.concatenate([np.full((n_class_tokens, 4), np.nan), cells(*spans).reshape(-1, 4)])
    return join((rects[n_dropped:], True))


def padded_tiles(
    page: Size, canvas: Size, *, tile: int, patch: int, max_tiles: int | None = None
) -> ImageLayout:
    """A downscaled copy of the page, then the page centred on a canvas of tiles (anyres).

    LLaVA-NeXT and LLaVA-OneVision. Rows and columns of patches in the padding are dropped, and each row ends
    with a row-end token.

    Args:
        page: its size.
        canvas: the resolution that was chosen for it, a whole number of tiles.
        tile, patch: pixels a side.
        max_tiles: LLaVA-OneVision downscales images with more patches than this many tiles; None: no limit.
    """
    spans = centred(page, canvas, [patches(edge // tile, tile, patch) for edge in canvas], np.float64)

    # the rows or columns that the model takes for padding
    n_rows, n_columns = map(len, spans)
    cut, whole = (0, 1) if page[1] / page[0] > n_columns / n_rows else (1, 0)
    kept = int(round(page[cut] * (len(spans[whole]) / page[whole]), 7))
    margin = (len(spans[cut]) - kept) // 2
    spans[cut] = spans[cut][margin : len(spans[cut]) - margin]

    if max_tiles is not None:
        ratio = math.sqrt(len(spans[0]) * len(spans[1]) / (max_tiles * (tile // patch) ** 2))
        if ratio > 1.1:
            spans = [_interpolated(each, int(len(each) // ratio)) for each in spans]

    copy = cells(*(on_page(patches(1, tile, patch), 0, tile / length) for length in page))
    fine = cells(*spans)
    row_ends = np.full((len(fine), 1, 4), np.nan)
    return join((copy, False), (np.concatenate([fine, row_ends], axis=1), True))


def _interpolated(spans: Spans, n: int) -> Spans:
    """The spans of n tokens that interpolate adjacent ones bilinearly (align_corners=False)."""
    source = np.maximum((np.arange(n) + 0.5) * (len(spans) / n) - 0.5, 0)
    first = np.floor(source).astype(int)
    last = np.where(source > first, np.minimum(first + 1, len(spans) - 1), first)
    return np.stack([spans[first, 0], spans[last, 1]], axis=1)


def stretched_tiles(page: Size, tiles: Size, side: int) -> ImageLayout:
    """The page resized to whole tiles, tile by tile; then a downscaled copy if there are several.

    InternVL, Idefics3 and SmolVLM.

    Args:
        page: its size.
        tiles: rows and columns.
        side: tokens a side of a tile.
    """
    fine = by_tile(split(page, tiles[0] * side, tiles[1] * side), side)
    copies = [] if tiles == (1, 1) else [(split(page, side, side), False)]
    return join((fine, True), *copies)


def tiling(page: Size, n_tiles: int) -> Size:
    """The rows and columns of n tiles with the aspect ratio closest to the page's (InternVL)."""
    ratio = page[1] / page[0]
    shapes = [(n_tiles // columns, columns) for columns in range(1, n_tiles + 1) if n_tiles % columns == 0]
    return min(shapes, key=lambda shape: abs(ratio - shape[1] / shape[0]))
