"""Where the tokens of an image are in a sequence, and which of them the heads keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Kept = Sequence[Sequence[npt.NDArray[np.integer[Any]]]]
"""kept[layer][head_kv]: the positions that a KV head holds, as indices of tokens in the sequence."""


@dataclass(frozen=True)
class ImageGrid:
    """The image tokens of a sequence, row by row from the top left.

    Attributes:
        start: index of the first image token in the sequence.
        n_rows, n_columns: image tokens down and across.
        padded: whether the image is padded to the shape of the grid (LLaVA) or stretched to it.
    """

    start: int
    n_rows: int
    n_columns: int
    padded: bool = True


def kept_on_grid(kept: Kept, grid: ImageGrid) -> npt.NDArray[np.bool_]:
    """Which image tokens each KV head holds: [n_layer, n_head_kv, n_rows, n_columns]."""
    tokens = np.arange(grid.start, grid.start + grid.n_rows * grid.n_columns)
    held = np.array([[np.isin(tokens, positions) for positions in heads] for heads in kept])
    return held.reshape(*held.shape[:2], grid.n_rows, grid.n_columns)
