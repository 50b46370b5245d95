"""Budget policies: every position of the budget is spent, on the heads that the policy says."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from helpers.paths import PUBLISHED_SCORES
from sparsemm_edge import SparseMMError
from sparsemm_edge.budgets import POLICIES, BudgetSpec
from sparsemm_edge.scores import HeadScores, group_scores

EVICTING = [policy for policy in POLICIES if policy != "full"]


def published_table(n_prompt: int | None = None, **changes: object) -> np.ndarray:
    grouped = group_scores(HeadScores.load(PUBLISHED_SCORES).scores, 32)
    spec = BudgetSpec(budget=256, window=32, floor_ratio=0.1, residual=False)
    return spec.override(**changes).table(grouped, (32, 32), n_prompt)


def tiny_table(
    policy: str, scores: object = None, n_prompt: int | None = None, **changes: object
) -> np.ndarray:
    grouped = None if scores is None else np.array(scores, dtype=float)
    spec = BudgetSpec(policy, budget=110, window=10, floor_ratio=0.1, residual=False)
    return replace(spec, **changes).table(grouped, (2, 2), n_prompt)  # type: ignore[arg-type]


def used(table: np.ndarray, n_prompt: int) -> float:
    """The share of a table's positions that a prompt can fill."""
    return float(np.minimum(table, n_prompt).sum() / table.sum())


def test_the_paper_leaves_a_third_of_the_budget_unused_and_water_filling_nothing() -> None:
    assert used(published_table(n_prompt=640, water_fill=False), 640) == pytest.approx(0.62, abs=0.005)
    assert used(published_table(n_prompt=640), 640) == 1
    assert used(published_table(n_prompt=2944), 2944) == 1


def test_without_water_filling_the_table_is_the_papers_formula() -> None:
    scores = group_scores(HeadScores.load(PUBLISHED_SCORES).scores, 32)
    base = 256 - 32
    floor = int(base * 0.1)
    paper = np.round(scores * (base - floor) * 32 * 32 + floor).astype(int) + 32
    table = published_table(water_fill=False).astype(int)
    off = table - paper
    # only the total is mended: as few heads as it takes, by one position each
    assert np.abs(off).sum() == abs(256 * 1024 - paper.sum())
    assert np.abs(off).max() <= 1


def test_sum_floor_and_limit_hold_for_any_scores() -> None:
    for seed in range(500):
        random = np.random.default_rng(seed)
        n_layer, n_head_kv = (int(n) for n in random.integers(1, 9, 2))
        budget = int(random.integers(2, 500))
        window = int(random.integers(1, budget))
        n_prompt = int(random.integers(1, 2000))
        floor_ratio = float(random.choice([0, 0.1, 1, random.random()]))
        scores = random.random((n_layer, n_head_kv)) ** random.integers(1, 30)
        scores *= random.random(scores.shape) > random.random()  # some heads have none
        scores[0, 0] += 1e-9
        for policy in EVICTING:
            for water_fill, residual in itertools.product((True, False), repeat=2):
                spec = BudgetSpec(policy, budget, window, floor_ratio, "mixkv", residual, water_fill, seed)
                table = spec.table(scores, (n_layer, n_head_kv), n_prompt)
                case = (seed, policy, water_fill, residual)
                least = window + residual
                assert table.shape == (n_layer, n_head_kv) and table.dtype == np.uint32, case
                assert table.sum() == budget * n_layer * n_head_kv, case
                assert table.min() >= least + int((budget - least) * floor_ratio), case
                if water_fill:
                    assert table.max() <= max(n_prompt, budget), case


def test_the_surplus_goes_to_the_other_heads_in_proportion_to_score() -> None:
    # floor 10, pool 360: the first head could use 324 + 10 + 10, but the prompt ends at 200
    table = tiny_table("sparsemm", [[90, 6], [3, 1]], n_prompt=200)
    assert table[0, 0] == 200
    above_floor = table.ravel()[1:].astype(int) - 10 - 10
    assert above_floor.sum() == 4 * 100 - 190 - 3 * 10
    np.testing.assert_allclose(above_floor, 180 * np.array([0.6, 0.3, 0.1]), atol=1)


def test_surplus_that_no_scored_head_can_use_is_shared_by_the_rest() -> None:
    table = tiny_table("sparsemm", [[5, 0], [0, 0]], n_prompt=152)
    assert table.ravel().tolist() == [152, 96, 96, 96]


def test_a_prompt_within_the_budget_is_kept_whole_by_every_head() -> None:
    for policy in POLICIES:
        for n_prompt in (1, 109, 110):
            assert tiny_table(policy, [[90, 6], [3, 1]], n_prompt=n_prompt).min() >= n_prompt


def test_a_prompt_one_longer_than_the_budget_still_spends_it_all() -> None:
    table = tiny_table("sparsemm", [[90, 6], [3, 1]], n_prompt=111)
    assert table.max() <= 111
    assert table.sum() == 4 * 110


def test_only_the_ratio_of_scores_matters() -> None:
    scores = np.random.default_rng(0).random((2, 2))
    np.testing.assert_array_equal(tiny_table("sparsemm", scores), tiny_table("sparsemm", scores * 1e6))


def test_uniform_gives_every_head_the_budget() -> None:
    assert (tiny_table("uniform") == 110).all()


def test_pyramid_is_linear_over_layers_with_the_first_layer_most() -> None:
    spec = BudgetSpec("pyramid", budget=132, window=32, floor_ratio=0.2, residual=False)
    table = spec.table(None, (5, 4))
    # mean cap 100: from 180 in the first layer to the floor of 20 in the last, the window on top
    assert table[:, 0].tolist() == [212, 172, 132, 92, 52]
    assert (table == table[:, :1]).all()
    assert table.mean() == 132
    assert (spec.table(None, (1, 4)) == 132).all()


def test_random_depends_on_its_seed_only() -> None:
    one, same, other = (tiny_table("random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert len(np.unique(one)) > 1


def test_full_is_longer_than_any_prompt_and_fits_32_bits() -> None:
    table = tiny_table("full", budget=2, window=9)  # its arguments do not matter
    assert (table == 2**31 - 1).all()
    assert table.dtype == np.uint32


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"window": 0}, "the window is 0"),
        ({"window": 1025, "budget": 4096}, "the window is 1025: it must be 1 to 1024"),
        ({"budget": 10}, r"the budget \(10\) must be larger than the window \(10\)"),
        ({"budget": 9}, r"the budget \(9\) must be larger than the window \(10\)"),
        ({"budget": 2**31}, "the budget is 2147483648: it must be 1 to 2147483647"),
        ({"budget": 2**31 - 1}, "positions, more than 2147483647"),
        ({"floor_ratio": -0.1}, "the floor ratio is -0.1"),
        ({"floor_ratio": 1.1}, "the floor ratio is 1.1"),
        ({"floor_ratio": float("nan")}, "the floor ratio is nan"),
        ({"n_prompt": 0}, "the prompt length is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"vote": "best"}, "unknown vote 'best': expected one of mixkv, snapkv"),
        ({"policy": "snapkv"}, "unknown policy 'snapkv': expected one of sparsemm, uniform"),
        ({"scores": None}, "needs head scores"),
        ({"scores": [[1.0, 2.0, 3.0]]}, r"scores of shape \(1, 3\) for a model of \(2, 2\)"),
        ({"scores": [[1.0, 2.0], [3.0, float("nan")]]}, "must be finite"),
        ({"scores": [[0.0, 0.0], [0.0, 0.0]]}, "not all zero"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, object], reason: str) -> None:
    settings = {"policy": "sparsemm", "scores": [[4.0, 3.0], [2.0, 1.0]]} | arguments
    with pytest.raises(SparseMMError, match=reason):
        tiny_table(**settings)  # type: ignore[arg-type]


def test_override_changes_what_is_not_none_and_a_smaller_budget_shrinks_the_window() -> None:
    spec = BudgetSpec(budget=256, window=32, seed=5)
    assert spec.override(budget=None, vote=None) == spec
    assert spec.override(residual=False, vote="snapkv") == replace(spec, residual=False, vote="snapkv")
    assert spec.override(budget=256).window == 32
    assert spec.override(budget=64).window == 16
    assert spec.override(budget=64, window=20).window == 20
    assert spec.override(budget=1024).window == 32


@pytest.mark.parametrize(
    "weights", [np.ones((2, 3)), -np.ones((2, 2)), np.full((2, 2), np.nan)], ids=["shape", "sign", "nan"]
)
def test_a_new_policy_must_give_every_head_a_weight(
    weights: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "new", lambda scores, shape, seed: weights)
    with pytest.raises(SparseMMError, match="policy new must return 2 x 2 finite weights"):
        tiny_table("new")
