"""Map boxes on a page to image tokens: the part of the page that each image token shows.

One function per way of splitting an image. Each takes what the image processor returned (grid sizes, tile
counts, image sizes) and returns the rectangle of the page that each image token's patches show, in order.
Rectangles ignore the few pixels that resizing blurs over an edge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def even(n: int, length: float) -> Spans:
    """A length split into n equal parts."""
    edges = np.arange(n + 1) * (length / n)
    return np.stack([edges[:-1], edges[1:]], axis=1)


def patches(n_tiles: int, tile: int, patch: int) -> Spans:
    """The spans of the patches of adjacent tiles; pixels beyond a tile's last patch are lost."""
    starts = (np.arange(n_tiles)[:, None] * tile + np.arange(tile // patch) * patch).ravel()
    return np.stack([starts, starts + patch], axis=1).astype(np.float64)


def on_page(spans: Spans, offset: float, scale: float) -> Spans:
    """Convert spans on a canvas to spans on the page, whose pixel x lies at `offset + scale * x`."""
    return (spans - offset) / scale


# --- LLaVA-1.5 ----------------------------------------------------------------------------------------


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
        short, long = min(padded), max(padded)
        edge = resize["shortest_edge"]
        other = edge * long // short
        resized = (edge, other) if padded[0] <= padded[1] else (other, edge)
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


# --- LLaVA-NeXT, LLaVA-OneVision ----------------------------------------------------------------------


def padded_tiles(
    page: Size,
    canvas: Size,
    *,
    tile: int,
    patch: int,
    max_tiles: int | None = None,
) -> ImageLayout:
    """A downscaled copy of the page, then the page centred on a canvas of tiles (anyres).

    Rows and columns of patches in the padding are dropped, and each row ends with a row-end token.

    Args:
        page: its size.
        canvas: the resolution that was chosen for it, a whole number of tiles.
        tile, patch: pixels a side.
        max_tiles: LLaVA-OneVision downscales images with more patches than this many tiles; None: no limit.
    """
    side = tile // patch
    n_rows, n_columns = (edge // tile * side for edge in canvas)

    # how the page lies on the canvas
    scales = [canvas[axis] / page[axis] for axis in range(2)]
    scale = min(scales)
    resized = [
        canvas[axis] if scales[axis] == scale else min(math.ceil(page[axis] * scale), canvas[axis])
        for axis in range(2)
    ]
    rows, columns = (
        on_page(
            patches(canvas[axis] // tile, tile, patch),
            (canvas[axis] - resized[axis]) // 2,
            resized[axis] / page[axis],
        )
        for axis in range(2)
    )

    # the rows or columns that the model takes for padding
    if page[1] / page[0] > n_columns / n_rows:
        kept = int(round(page[0] * (n_columns / page[1]), 7))
        margin = (n_rows - kept) // 2
        rows = rows[margin : n_rows - margin]
    else:
        kept = int(round(page[1] * (n_rows / page[0]), 7))
        margin = (n_columns - kept) // 2
        columns = columns[margin : n_columns - margin]

    if max_tiles is not None:
        ratio = math.sqrt(len(rows) * len(columns) / (max_tiles * side**2))
        if ratio > 1.1:
            rows = _interpolated(rows, int(len(rows) // ratio))
            columns = _interpolated(columns, int(len(columns) // ratio))

    base = cells(even(side, page[0]), even(side, page[1]))
    if tile % patch:  # the copy, too, loses what lies beyond the last patch
        spans = [on_page(patches(1, tile, patch), 0, tile / length) for length in page]
        base = cells(*spans)
    fine = cells(rows, columns)
    row_ends = np.full((len(rows), 1, 4), np.nan)
    return join((base, False), (np.concatenate([fine, row_ends], axis=1), True))


def _interpolated(spans: Spans, n: int) -> Spans:
    """The spans of n tokens that interpolate adjacent ones bilinearly (align_corners=False)."""
    source = np.maximum((np.arange(n) + 0.5) * (len(spans) / n) - 0.5, 0)
    first = np.floor(source).astype(int)
    last = np.where(source > first, np.minimum(first + 1, len(spans) - 1), first)
    return np.stack([spans[first, 0], spans[last, 1]], axis=1)


# --- Qwen2-VL, Qwen2.5-VL, Qwen3-VL -------------------------------------------------------------------


def merged_patches(page: Size, grid: Size, *, merge: int) -> ImageLayout:
    """The page resized to `grid` patches, merge x merge of which become one token (Qwen-VL)."""
    rows, columns = (even(grid[axis] // merge, page[axis]) for axis in range(2))
    return join((cells(rows, columns), True))


# --- InternVL, Idefics3, SmolVLM ----------------------------------------------------------------------


def stretched_tiles(page: Size, tiles: Size, side: int) -> ImageLayout:
    """The page resized to rows x columns of tiles, tile by tile; then a downscaled copy if there are several.

    Args:
        page: its size.
        tiles: rows and columns.
        side: tokens a side of a tile.
    """
    n_rows, n_columns = tiles
    fine = cells(even(n_rows * side, page[0]), even(n_columns * side, page[1]))
    by_tile = fine.reshape(n_rows, side, n_columns, side, 4).swapaxes(1, 2)
    if n_rows * n_columns == 1:
        return join((by_tile, True))
    return join((by_tile, True), (cells(even(side, page[0]), even(side, page[1])), False))


def tiling(page: Size, n_tiles: int) -> Size:
    """The rows and columns of n tiles with the aspect ratio closest to the page's (InternVL)."""
    ratio = page[1] / page[0]
    shapes = [(n_tiles // columns, columns) for columns in range(1, n_tiles + 1) if n_tiles % columns == 0]
    return min(shapes, key=lambda shape: abs(ratio - shape[1] / shape[0]))
