"""Map boxes on a page to image tokens as llama.cpp's mtmd (0c1e57098, tools/mtmd) lays images out.

Where a checkpoint's image processor crops or stretches, mtmd mostly keeps the aspect ratio and pads. Canvas
size and tiling are recomputed here and compared with the tokens that mtmd made, so that a change in mtmd is
an error and not a wrong score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_header import GGUFHeader
from sparsemm_edge.scoring.geometry import ImageLayout, Rects, Size, Spans, cells, even, join, on_page

_KEYS = "clip.vision."
_PIXTRAL_TOKENS = (8, 1024)  # default limits of an image's tokens
_INTERNVL_TILES = (1, 12)
_IMG_BREAK = "v.token_embd.img_break"

_MROPE = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "glm4v", "paddleocr")
SUPPORTED = ("mlp", *_MROPE, "pixtral", "internvl", "idefics3", "gemma3")
"""The kinds of projectors whose image tokens have a place on the image that is known here."""


@dataclass(frozen=True)
class Tile:
    """A chunk of image tokens of a prompt, as mtmd made it.

    Attributes:
        n_tokens: its tokens.
        n_columns, n_rows: of tokens, where the position encoding has both (M-RoPE); else n_tokens and 1.
    """

    n_tokens: int
    n_columns: int
    n_rows: int


@dataclass(frozen=True)
class ImageEncoder:
    """Image layout parameters from an image encoder's file.

    Attributes:
        path: the file, for messages.
        kind: of the projector.
        image_size, patch: side of an image (or tile) and of a patch, in pixels.
        merge: merge x merge patches become one token.
        pinpoints: available canvas sizes, height and width; empty: none.
        longest_edge: length of the longer side after resizing, before splitting (Idefics3).
        n_tiles: least and most tiles of an image (InternVL).
        row_ends: whether rows are separated by a token (Pixtral).
        token_limits: fewest and most tokens of an image; None if not set.
    """

    path: str
    kind: str
    image_size: int
    patch: int
    merge: int
    pinpoints: tuple[Size, ...]
    longest_edge: int
    n_tiles: tuple[int, int]
    row_ends: bool
    token_limits: tuple[int | None, int | None]

    @classmethod
    def of(
        cls, header: GGUFHeader, token_limits: tuple[int | None, int | None] = (None, None)
    ) -> "ImageEncoder":
        """Args:
            header: of the image encoder's GGUF file (mmproj).
            token_limits: fewest and most tokens of an image, from the user.

        Raises:
            SparseMMError: the layout of this encoder type is not known.
        """
        name = str(header.path)
        kind = header.value("clip.projector_type", header.value(f"{_KEYS}projector_type"))
        if kind not in SUPPORTED:
            raise SparseMMError(
                f"{name}: which part of an image a token shows is not known for image encoders of type"
                f" {kind!r}, so heads cannot be scored; it is for {', '.join(SUPPORTED)}"
            )

        def number(key: str, default: int) -> int:
            value = header.value(_KEYS + key, default)
            if not isinstance(value, int) or not 0 < value < 2**16:
                raise SparseMMError(f"{name}: {_KEYS}{key} is {value!r}, expected a number of 1 to 65535")
            return value

        merge = "spatial_merge_size"
        if kind in ("internvl", "idefics3", "gemma3"):
            merge = "projector.scale_factor"
        points = header.value(f"{_KEYS}image_grid_pinpoints", [])
        edge = header.value(f"{_KEYS}preproc_image_size", 0)
        return cls(
            path=name,
            kind=kind,
            image_size=number("image_size", 0),
            patch=number("patch_size", 0),
            # mtmd counts the tokens of these by pairs of patches, whatever the file says
            merge=2 if kind in _MROPE else number(merge, 4 if kind == "gemma3" else 1),
            pinpoints=tuple((int(h), int(w)) for w, h in zip(points[::2], points[1::2], strict=True)),
            longest_edge=int(edge),
            n_tiles=(
                number("preproc_min_tiles", _INTERNVL_TILES[0]),
                number("preproc_max_tiles", _INTERNVL_TILES[1]),
            ),
            row_ends=_IMG_BREAK in header.tensors,
            token_limits=token_limits,
        )

    def layout(self, page: Size, tiles: Sequence[Tile]) -> ImageLayout:
        """The part of a page that each image token of a prompt shows.

        Args:
            page: its height and width.
            tiles: the image chunks of the prompt, in order.

        Raises:
            SparseMMError: mtmd used another layout than expected.
        """
        if self.kind in _MROPE:
            made = self._of_grid(page, (tiles[0].n_rows, tiles[0].n_columns))
        elif self.kind == "pixtral":
            made = self._pixtral(page)
        elif self.kind == "internvl":
            made = self._internvl(page)
        elif self.kind == "idefics3":
            made = self._idefics3(page)
        elif self.pinpoints:
            made = self._llava_next(page)
        else:
            made = join((_padded(page, (self.image_size, self.image_size), self._token), True))
        n_tokens = sum(tile.n_tokens for tile in tiles)
        if len(made) != n_tokens:
            raise SparseMMError(
                f"{self.path}: an image of {page[1]} x {page[0]} takes {n_tokens} tokens, {len(made)} were"
                f" expected of an encoder of type {self.kind!r}: which part of it they show is not known"
            )
        return made

    @property
    def _side(self) -> int:
        """Tokens per side of an image or tile."""
        return self.image_size // self.patch // self.merge

    @property
    def _token(self) -> int:
        """Side of the area of one token, in pixels."""
        return self.patch * self.merge

    def _of_grid(self, page: Size, grid: Size) -> ImageLayout:
        canvas = (grid[0] * self._token, grid[1] * self._token)
        return join((_padded(page, canvas, self._token), True))

    def _pixtral(self, page: Size) -> ImageLayout:
        """Rows of tokens, separated by a token in most files."""
        limits = [given or usual for given, usual in zip(self.token_limits, _PIXTRAL_TOKENS, strict=True)]
        least, most = (limit * self._token**2 for limit in limits)
        canvas = _whole_tokens(page, self._token, least, most)
        grid = _padded(page, canvas, self._token)
        if self.row_ends:
            ends = np.full((len(grid), 1, 4), np.nan)
            grid = np.concatenate([grid, ends], axis=1).reshape(-1, 4)[:-1]
        return join((grid, True))

    def _llava_next(self, page: Size) -> ImageLayout:
        """Tiles of the canvas row by row, then a downscaled copy; only the copy for small pages."""
        copy = self._copy(page)
        if max(page) <= self.image_size:
            return join((copy, True))
        canvas = _best_canvas(page, self.pinpoints)
        fine = _padded(page, canvas, self._token)
        return join((self._by_tile(fine), True), (copy, False))

    def _internvl(self, page: Size) -> ImageLayout:
        """The same with every canvas whose number of tiles is allowed."""
        copy = self._copy(page)
        if max(page) <= self.image_size:
            return join((copy, True))
        least, most = self.n_tiles
        canvases = [
            (rows * self.image_size, columns * self.image_size)
            for columns in range(least, most + 1)
            for rows in range(max(-(-least // columns), least), min(most // columns, most) + 1)
        ]
        fine = _padded(page, _best_canvas(page, canvases), self._token)
        return join((self._by_tile(fine), True), (copy, False))

    def _idefics3(self, page: Size) -> ImageLayout:
        """Tiles of the page, resized to whole tiles, then a downscaled copy."""
        if not self.longest_edge or self.token_limits != (None, None):
            raise SparseMMError(
                f"{self.path}: where its image tokens lie is known only for files with"
                f" {_KEYS}preproc_image_size and without limits for the tokens of an image"
            )
        n_rows, n_columns = _stretched_tiles(page, self.image_size, self.longest_edge)
        fine = cells(even(n_rows * self._side, page[0]), even(n_columns * self._side, page[1]))
        return join((self._by_tile(fine), True), (self._copy(page), False))

    def _copy(self, page: Size) -> Rects:
        """The page resized to one tile."""
        return cells(even(self._side, page[0]), even(self._side, page[1]))

    def _by_tile(self, fine: Rects) -> Rects:
        """The rects of a grid of tokens in tile order, row by row within each tile."""
        rows, columns = (length // self._side for length in fine.shape[:2])
        return fine.reshape(rows, self._side, columns, self._side, 4).swapaxes(1, 2)


# mtmd counts in single precision, which decides about pixels: so do these


def _padded(page: Size, canvas: Size, token: int) -> Rects:
    """The page scaled to fit a canvas, centred, split into tokens: [n_rows, n_columns, 4]."""
    scale = min(np.float32(canvas[axis]) / np.float32(page[axis]) for axis in range(2))
    spans = []
    for axis in range(2):
        resized = min(math.ceil(np.float32(page[axis]) * scale), canvas[axis])
        margin = (canvas[axis] - resized) // 2
        spans.append(on_page(_rows(canvas[axis], token), margin, resized / page[axis]))
    return cells(*spans)


def _rows(length: int, token: int) -> Spans:
    """The spans of whole tokens on a canvas of this length."""
    starts = np.arange(length // token) * float(token)
    return np.stack([starts, starts + token], axis=1)


def _whole_tokens(page: Size, token: int, least: int, most: int) -> Size:
    """The size closest to the page's in whole tokens, within the pixel limits."""
    height, width = np.float32(page[0]), np.float32(page[1])
    rows, columns = (max(1, math.floor(float(side / np.float32(token)) + 0.5)) for side in (height, width))
    if rows * columns * token**2 > most:
        beta = np.sqrt(height * width / np.float32(most))
        rows, columns = (max(1, math.floor(side / beta / np.float32(token))) for side in (height, width))
    elif rows * columns * token**2 < least:
        beta = np.sqrt(np.float32(least) / (height * width))
        rows, columns = (math.ceil(side * beta / np.float32(token)) for side in (height, width))
    return rows * token, columns * token


def _best_canvas(page: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that keeps most of the page's pixels; of several, the one with least padding."""

    def fits(canvas: Size) -> tuple[int, int]:
        scale = min(np.float32(canvas[axis]) / np.float32(page[axis]) for axis in range(2))
        used = int(np.float32(page[0]) * scale) * int(np.float32(page[1]) * scale)
        used = min(used, page[0] * page[1])
        return used, used - canvas[0] * canvas[1]

    return max(canvases, key=fits)  # the first of equals, as mtmd takes it


def _stretched_tiles(page: Size, tile: int, longest_edge: int) -> Size:
    """Rows and columns of tiles of a page whose longer side is resized to `longest_edge` (Idefics3)."""
    ratio = page[1] / page[0]
    if page[1] >= page[0]:
        height, width = int(longest_edge / ratio), longest_edge
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * ratio)
        width += width % 2
    return -(-height // tile), -(-width // tile)
