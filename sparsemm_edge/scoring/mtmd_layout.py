"""Map boxes on a page to image tokens as llama.cpp's mtmd (0c1e57098, tools/mtmd) lays images out.

Where a checkpoint's image processor crops or stretches, mtmd mostly keeps the aspect ratio and pads. Canvas
size and tiling are recomputed here and compared with the tokens that mtmd made, so that a change in mtmd is
an error and not a wrong score.
"""

import math
from collections.abc import Sequence

import numpy as np

from sparsemm_edge.errors import SparseMMError, check_within
from sparsemm_edge.gguf_header import GGUFHeader
from sparsemm_edge.scoring import geometry
from sparsemm_edge.scoring.geometry import ImageLayout, Rects, Size

_KEYS = "clip.vision."
_PIXTRAL_TOKENS = (8, 1024)  # default limits of an image's tokens
_IMG_BREAK = "v.token_embd.img_break"

_MROPE = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "glm4v", "paddleocr")
SUPPORTED = ("mlp", *_MROPE, "pixtral", "internvl", "idefics3", "gemma3")
"""The kinds of projectors whose image tokens have a place on the image that is known here."""


class ImageEncoder:
    """How mtmd lays out images for one image encoder.

    Attributes:
        kind: of the projector.
        image_size, patch: side of an image (or tile) and of a patch, in pixels.
        merge: merge x merge patches become one token.
    """

    def __init__(
        self, header: GGUFHeader, token_limits: tuple[int | None, int | None] = (None, None)
    ) -> None:
        """Args:
            header: of the image encoder's GGUF file (mmproj).
            token_limits: fewest and most tokens of an image, from the user; None if not set.

        Raises:
            SparseMMError: the layout of this encoder type is not known.
        """
        self._path = header.path
        self._token_limits = token_limits
        self.kind = kind = header.value("clip.projector_type", header.value(f"{_KEYS}projector_type"))
        if kind not in SUPPORTED:
            raise SparseMMError(
                f"{self._path}: which part of an image a token shows is not known for image encoders of type"
                f" {kind!r}, so heads cannot be scored; it is for {', '.join(SUPPORTED)}"
            )

        def number(key: str, default: int = 0) -> int:
            value = header.value(_KEYS + key, default)
            if not isinstance(value, int):
                raise SparseMMError(f"{self._path}: {_KEYS}{key} is {value!r}, expected a whole number")
            check_within(f"{self._path}: {_KEYS}{key}", value, 1, 2**16 - 1)
            return value

        self.image_size = number("image_size")
        self.patch = number("patch_size")
        if kind in _MROPE:  # mtmd counts the tokens of these by pairs of patches, whatever the file says
            self.merge = 2
        elif kind in ("internvl", "idefics3", "gemma3"):
            self.merge = number("projector.scale_factor", 4 if kind == "gemma3" else 1)
        else:
            self.merge = number("spatial_merge_size", 1)
        # pixels a side of what a token shows, and tokens a side of an image or tile
        self._token = self.patch * self.merge
        self._side = self.image_size // self.patch // self.merge
        # LLaVA-NeXT and InternVL split an image into tiles on the best of these canvases
        points = header.value(f"{_KEYS}image_grid_pinpoints", [])
        self._canvases = [(int(h), int(w)) for w, h in zip(points[::2], points[1::2], strict=True)]
        if kind == "internvl":
            least, most = number("preproc_min_tiles", 1), number("preproc_max_tiles", 12)
            self._canvases = [
                (rows * self.image_size, columns * self.image_size)
                for columns in range(least, most + 1)
                for rows in range(max(-(-least // columns), least), min(most // columns, most) + 1)
            ]
        # Idefics3: the longer side after resizing, before splitting
        self._longest_edge = int(header.value(f"{_KEYS}preproc_image_size", 0))
        self._row_ends = _IMG_BREAK in header.tensors

    def layout(self, page: Size, n_tokens: int, grid: Size) -> ImageLayout:
        """The part of a page that each image token of a prompt shows.

        Args:
            page: its height and width.
            n_tokens: the image tokens that mtmd made.
            grid: their rows and columns, where the position encoding has both (M-RoPE).

        Raises:
            SparseMMError: mtmd used another layout than expected.
        """
        if self.kind in _MROPE:
            canvas = (grid[0] * self._token, grid[1] * self._token)
            made = geometry.join((_padded(page, canvas, self._token), True))
        elif self.kind == "pixtral":
            made = geometry.join((self._pixtral(page), True))
        elif self.kind == "idefics3":
            made = self._idefics3(page)
        elif self._canvases:
            made = self._tiled(page)
        else:
            made = geometry.join((_padded(page, (self.image_size, self.image_size), self._token), True))
        if len(made) != n_tokens:
            raise SparseMMError(
                f"{self._path}: an image of {page[1]} x {page[0]} takes {n_tokens} tokens, {len(made)} were"
                f" expected of an encoder of type {self.kind!r}: which part of it they show is not known"
            )
        return made

    def _pixtral(self, page: Size) -> Rects:
        """Rows of tokens, separated by a token in most files."""
        limits = [given or usual for given, usual in zip(self._token_limits, _PIXTRAL_TOKENS, strict=True)]
        least, most = (limit * self._token**2 for limit in limits)
        grid = _padded(page, _whole_tokens(page, self._token, least, most), self._token)
        if not self._row_ends:
            return grid
        ends = np.full((len(grid), 1, 4), np.nan)
        return np.concatenate([grid, ends], axis=1).reshape(-1, 4)[:-1]

    def _tiled(self, page: Size) -> ImageLayout:
        """Tiles of the canvas row by row, then a downscaled copy; only the copy for small pages."""
        copy = geometry.split(page, self._side, self._side)
        if max(page) <= self.image_size:
            return geometry.join((copy, True))
        fine = _padded(page, _best_canvas(page, self._canvases), self._token)
        return geometry.join((geometry.by_tile(fine, self._side), True), (copy, False))

    def _idefics3(self, page: Size) -> ImageLayout:
        """Tiles of the page, resized to whole tiles, then a downscaled copy."""
        if not self._longest_edge or self._token_limits != (None, None):
            raise SparseMMError(
                f"{self._path}: where its image tokens lie is known only for files with"
                f" {_KEYS}preproc_image_size and without limits for the tokens of an image"
            )
        n_rows, n_columns = _stretched_tiles(page, self.image_size, self._longest_edge)
        fine = geometry.split(page, n_rows * self._side, n_columns * self._side)
        return geometry.join(
            (geometry.by_tile(fine, self._side), True), (geometry.split(page, self._side, self._side), False)
        )


# mtmd counts in single precision, which decides about pixels: so do these


def _padded(page: Size, canvas: Size, token: int) -> Rects:
    """The page scaled to fit a canvas, centred, split into tokens: [n_rows, n_columns, 4]."""
    return geometry.cells(
        *geometry.centred(page, canvas, [geometry.patches(1, length, token) for length in canvas], np.float32)
    )


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
    if ratio >= 1:
        height, width = int(longest_edge / ratio), longest_edge
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * ratio)
        width += width % 2
    return -(-height // tile), -(-width // tile)
