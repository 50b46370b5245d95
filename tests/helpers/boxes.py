"""Boxes to paint on a page, to see which image tokens show them."""

from __future__ import annotations

import numpy as np

from sparsemm_edge.scoring.geometry import ImageLayout


def boxes(
    size: tuple[int, int], blur: float, layout: ImageLayout, detail: bool
) -> list[tuple[tuple[int, int, int, int], set[int], set[int]]]:
    """Twelve boxes whose edges lie further from those of the tokens than a resize blurs, so that exactly
    one set of tokens shows them, and four boxes anywhere. With each the tokens that show the box made
    smaller and larger by the blur."""
    rng = np.random.default_rng(7)
    clear, other = [], []
    for _ in range(20_000):
        (left, right), (top, bottom) = (np.sort(rng.integers(0, length + 1, 2)) for length in size)
        if left == right or top == bottom:
            continue
        inner = (left + blur, top + blur, right - blur, bottom - blur)
        outer = (left - blur, top - blur, right + blur, bottom + blur)
        least, most = (set(layout.covered(box, detail=detail)) for box in (inner, outer))
        (clear if least == most and least else other).append(((left, top, right, bottom), least, most))
        if len(clear) == 12:
            break
    assert len(clear) >= 4
    return [*clear, *other[:4]]
