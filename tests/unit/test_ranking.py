"""How concentrated scores are, and how alike two rankings."""

import itertools

import numpy as np
import pytest

from sparsemm_edge.ranking import convergence, held_by_top, overlap_of_top, spearman, top_heads


def test_rank_correlation_follows_the_formula_without_ties() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)), for every order of five values."""
    one = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    for order in itertools.permutations(range(5)):
        d = np.arange(5) - np.array(order)
        assert spearman(one, np.array(order, float)) == pytest.approx(1 - 6 * (d**2).sum() / (5 * 24))


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    one, two = np.array([1.0, 2.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0, 40.0])
    ranks = np.array([1, 2.5, 2.5, 4]), np.array([1, 2, 3, 4])
    assert spearman(one, two) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert spearman(one, one.reshape(2, 2)) == pytest.approx(1)
    assert spearman(one, np.zeros(4)) == 0


def test_what_the_top_heads_hold() -> None:
    scores = np.zeros((4, 10))
    scores[1, 2], scores[3, 9], scores[0, 0] = 6, 3, 1
    assert list(top_heads(scores, 0.05)) == [12, 39]
    assert held_by_top(scores, 0.05) == pytest.approx(0.9)
    assert held_by_top(scores, 0.01) == pytest.approx(0.6)  # at least one head
    assert held_by_top(scores, 0.2) == pytest.approx(1)


def test_overlap_is_the_part_of_the_top_heads_that_both_name() -> None:
    one, two = np.arange(40.0), np.arange(40.0)
    assert overlap_of_top(one, two, 0.1) == 1
    two[39] = -1
    assert overlap_of_top(one, two, 0.1) == 0.75
    assert overlap_of_top(one, one[::-1], 0.1) == 0


def test_halves_agree_the_more_pages_there_are() -> None:
    """Pages that are a fixed ranking under noise: agreement grows with their number and is never perfect."""
    rng = np.random.default_rng(0)
    truth = rng.exponential(size=(4, 16))
    pages = truth + 3 * rng.standard_normal((120, 4, 16))
    report = convergence(pages)
    assert [step["n_pages"] for step in report] == [10, 20, 50, 100, 120]
    agreement = [step["spearman"] for step in report]
    assert agreement[0] < agreement[2] < agreement[4] < 1
    assert all(0 <= step["top_overlap"] <= 1 for step in report)
    assert convergence(np.repeat(truth[None], 10, axis=0))[0]["spearman"] == pytest.approx(1)
    assert convergence(pages[:1]) == []
