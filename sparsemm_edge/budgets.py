"""How much of the KV cache each head keeps: BudgetSpec makes the table of head budgets from head scores.

Source: SparseMM (arXiv 2506.05344), section 3.2. A head budget is the number of positions that one KV head of
one layer keeps after the prompt, the observation window included.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge import defaults
from sparsemm_edge.errors import SparseMMError, check_within
from sparsemm_edge.policies import POLICIES

VOTES = {"mixkv": 1, "snapkv": 0}
"""Names of the votes that rank a head's positions, and their numbers in the patched llama.cpp (enum
llama_head_vote). `snapkv` ranks by the attention from the window's queries (arXiv 2404.14469), `mixkv` by
that times the norm of the value, mixed with how much the key differs from the head's mean key (arXiv
2510.20707)."""

FULL = 2**31 - 1
"""The head budget of policy `full`. llama.cpp counts positions in int32, so no prompt is longer and nothing
is ever evicted. A table of it does not fit 32 bits when summed: sum head budgets in 64."""

MAX_WINDOW = 1024
"""The largest observation window that the patched llama.cpp takes; its scores take memory in every layer."""

POOL_KERNEL = 7
"""Width of the max pooling of the votes, in positions."""


@dataclass(frozen=True)
class BudgetSpec:
    """How KV heads share the cache, and how each head selects the positions it keeps.

    Attributes:
        policy: the weights by which heads share the budget, one of POLICIES.
        budget: B, the mean of the head budgets, in positions, window included.
        window: w, the observation window in positions; 1 <= w < B, at most MAX_WINDOW.
        floor_ratio: rho, the share of B less window and residual slot that every head gets, 0 to 1.
        vote: how a head's positions are ranked, one of VOTES.
        residual: whether an evicting head uses one position for a slot that summarises what it evicted.
        water_fill: whether positions that a head cannot use, because the prompt is shorter than its share, go
            to the other heads in proportion to their weight. The paper leaves them unused (False).
        seed: of policy `random`.
        pool_kernel: width of the max pooling of the votes, in positions; odd.
    """

    policy: str = "sparsemm"
    budget: int = defaults.BUDGET
    window: int = defaults.WINDOW
    floor_ratio: float = defaults.FLOOR_RATIO
    vote: str = defaults.VOTE
    residual: bool = defaults.RESIDUAL
    water_fill: bool = True
    seed: int = 0
    pool_kernel: int = POOL_KERNEL

    def override(self, **changes: Any) -> "BudgetSpec":
        """This spec with the given attributes changed; those that are None stay.

        A changed budget without a window shrinks the window to at most a quarter of the budget.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("budget", self.budget) != self.budget:
            given.setdefault("window", window_for(given["budget"], self.window))
        return replace(self, **given)

    @property
    def least(self) -> int:
        """The fewest positions of a head that evicts: the window, and the residual slot if there is one."""
        return self.window + self.residual

    @property
    def floor(self) -> int:
        """The positions beyond `least` that every head gets."""
        return int((self.budget - self.least) * self.floor_ratio)

    def table(
        self, scores: npt.NDArray[np.float64] | None, shape: tuple[int, int], n_prompt: int | None = None
    ) -> npt.NDArray[np.uint32]:
        """Distribute `budget * n_layer * n_head_kv` positions over the heads.

        Every head gets `least` and `floor`; the rest goes to the heads in proportion to the policy's weights.

        Args:
            scores: [n_layer, n_head_kv], not negative, any scale; only `sparsemm` reads them.
            shape: the model's n_layer and n_head_kv.
            n_prompt: the prompt's length in positions, for water-filling; None sets no limit. A prompt of at
                most B positions is kept whole: each head budget is then B.

        Returns:
            [n_layer, n_head_kv], summing to exactly `budget * n_layer * n_head_kv`. No head is below `least`;
            with water-filling none is above `max(n_prompt, budget)`. Policy `full` makes a table of `FULL`,
            whatever the other attributes.

        Raises:
            SparseMMError: an attribute outside its range, or scores of another shape.
        """
        if self.policy not in POLICIES:
            raise SparseMMError(f"unknown policy {self.policy!r}: expected one of {', '.join(POLICIES)}")
        if self.policy != "full":
            self._check(n_prompt)
        weights = POLICIES[self.policy](scores, shape, self.seed)
        if weights is None:
            return np.full(shape, FULL, dtype=np.uint32)
        if weights.shape != shape or not np.isfinite(weights).all() or (weights < 0).any():
            raise SparseMMError(
                f"policy {self.policy} must return {shape[0]} x {shape[1]} finite weights, none negative"
            )
        limit: float = np.inf
        if self.water_fill and n_prompt is not None:
            if n_prompt <= self.budget:
                return np.full(shape, self.budget, dtype=np.uint32)
            limit = n_prompt - self.least
        total = (self.budget - self.least) * weights.size
        caps = _fill(weights.ravel(), total=total, floor=self.floor, limit=limit)
        table = _round_to_sum(caps, total) + self.least
        if table.max() > FULL:
            raise SparseMMError(
                f"a budget of {self.budget} gives one head {table.max()} positions, more than {FULL}"
            )
        return table.reshape(shape).astype(np.uint32)

    def _check(self, n_prompt: int | None) -> None:
        """Raise SparseMMError if an attribute or the prompt's length is outside its range."""
        check_within("the window", self.window, 1, MAX_WINDOW)
        if self.budget <= self.window:
            raise SparseMMError(
                f"the budget ({self.budget}) must be larger than the window ({self.window}) it includes"
            )
        check_within("the budget", self.budget, 1, FULL)
        check_within("the floor ratio", self.floor_ratio, 0, 1)
        if self.vote not in VOTES:
            raise SparseMMError(f"unknown vote {self.vote!r}: expected one of {', '.join(VOTES)}")
        if n_prompt is not None:
            check_within("the prompt length", n_prompt, 1, FULL)
        check_within("the seed", self.seed, 0, 2**32 - 1)


def window_for(budget: int, window: int = defaults.WINDOW) -> int:
    """The observation window for a budget, in positions: `window`, but at most a quarter of the budget."""
    return max(1, min(window, budget // defaults.WINDOW_SHARE))


def _fill(
    weights: npt.NDArray[np.float64], *, total: int, floor: int, limit: float
) -> npt.NDArray[np.float64]:
    """Real-valued caps `floor + weight * x`, at most `limit`, with x such that they sum to `total`.

    Needs `floor <= total / n <= limit`. Each round distributes what the heads at the limit leave over the
    others; x only grows, so a head at the limit stays there, and at most n rounds are needed.
    """
    caps = np.full(weights.size, float(limit))
    free = np.ones(weights.size, dtype=bool)
    while free.any():
        rest = weights[free] if weights[free].any() else np.ones(int(free.sum()))
        pool = total - caps[~free].sum() - floor * free.sum()
        caps[free] = floor + pool * (rest / rest.sum())
        over = free & (caps > limit)
        if not over.any():
            break
        caps[over] = limit
        free &= ~over
    return caps


def _round_to_sum(caps: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers that sum to `total`: rounded down, the largest remainders rounded up instead.

    This is `round(cap)` for every head, except where rounding would miss the total.
    """
    whole = np.floor(caps).astype(np.int64)
    largest_remainders = np.argsort(whole - caps, kind="stable")[: total - int(whole.sum())]
    whole[largest_remainders] += 1
    return whole
