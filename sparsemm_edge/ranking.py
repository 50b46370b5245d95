"""Statistics of head rankings: concentration, similarity and convergence."""

from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]

TOP_SHARES = (0.01, 0.05, 0.10, 0.20)
"""The shares of the heads that reports speak of."""

N_SPLITS = 20
"""Random halvings that a convergence figure is the mean of."""


def top_heads(scores: Scores, share: float) -> npt.NDArray[np.intp]:
    """The flat indices of the top `share` of the heads, best first; the earlier head wins a tie.

    Their number is rounded down, but is at least one.
    """
    return np.argsort(-scores.ravel(), kind="stable")[: max(1, int(scores.size * share))]


def held_by_top(scores: Scores, share: float) -> float:
    """The fraction of the total score in the top `share` of the heads."""
    return float(scores.ravel()[top_heads(scores, share)].sum() / scores.sum())


def overlap_of_top(one: Scores, other: Scores, share: float) -> float:
    """The fraction of the top `share` of the heads that two rankings have in common."""
    return float(np.isin(top_heads(one, share), top_heads(other, share)).mean())


def spearman(one: Scores, other: Scores) -> float:
    """Spearman's rank correlation of two tables of scores, -1 to 1; ties share their mean rank.

    A table of equal scores has a correlation of 0 with any other.
    """
    deviations = []
    for table in (one, other):
        _, inverse, counts = np.unique(table.ravel(), return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
        deviations.append(ranks - ranks.mean())
    norm = np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    return float((deviations[0] * deviations[1]).sum() / norm) if norm else 0.0


def convergence(pages: Scores, seed: int = 0) -> list[dict[str, float]]:
    """How well two halves of 10, 20, 50, 100, ... pages, and of all pages, agree on the ranking.

    The first n pages are split in two at random, N_SPLITS times. Their agreement is that of n / 2 pages
    with n / 2 new ones.

    Args:
        pages: [n_pages, n_layer, n_head], each page's scores.
        seed: of the halvings.

    Returns:
        For each number of pages `n_pages`, `spearman` (rank correlation of the halves) and `top_overlap`
        (part of the top 5 % of the heads that both halves name), means over the halvings.
    """
    total = len(pages)
    steps = [step * 10**power for power in range(1, 7) for step in (1, 2, 5)]
    report = []
    for n in [*(step for step in steps if step < total), total]:
        if n < 2:
            continue
        rng = np.random.default_rng(seed)
        correlations, overlaps = [], []
        for _ in range(N_SPLITS):
            order = rng.permutation(n)
            half, rest = (pages[order[i::2]].mean(axis=0) for i in range(2))
            correlations.append(spearman(half, rest))
            overlaps.append(overlap_of_top(half, rest, 0.05))
        report.append(
            {"n_pages": n, "spearman": float(np.mean(correlations)), "top_overlap": float(np.mean(overlaps))}
        )
    return report
