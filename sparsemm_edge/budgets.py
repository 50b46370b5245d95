"""Budget policies: head scores in, a table of head budgets out.

Source: SparseMM (arXiv 2506.05344), section 3.2. A head budget is the number of positions that one KV head of
one layer keeps after the prompt, the observation window included. The policies differ only in the scores
that they share the budget out by, so one function serves them all.
"""

import numpy as np
import numpy.typing as npt

from sparsemm_edge import defaults
from sparsemm_edge.errors import SparseMMError

POLICIES = ("sparsemm", "uniform", "pyramid", "random", "full")

VOTES = ("mixkv", "snapkv")
"""How the positions of a head are ranked: `snapkv` by the attention that they get from the window's queries
(arXiv 2404.14469), `mixkv` by that times the norm of the value, mixed with how much the key differs from the
mean key of the head (arXiv 2510.20707)."""

FULL = 2**31 - 1
"""The head budget of policy `full`. llama.cpp counts positions in int32, so no prompt is longer and nothing
is ever evicted. A table of it does not fit 32 bits when summed: sum head budgets in 64."""

MAX_WINDOW = 1024
"""The largest observation window that the patched llama.cpp takes; its scores take memory in every layer."""


def head_budgets(
    policy: str,
    grouped_scores: npt.NDArray[np.float64] | None,
    *,
    n_layer: int,
    n_head_kv: int,
    budget: int,
    window: int,
    floor_ratio: float = defaults.FLOOR_RATIO,
    residual: bool = False,
    water_fill: bool = True,
    n_prompt: int | None = None,
    seed: int = 0,
) -> npt.NDArray[np.uint32]:
    """Share the positions of all KV heads out to them.

    Every head gets the window, the place of its residual slot if it has one, and a floor, which is
    `floor_ratio` of what is left of the budget after those; the rest of
    `budget * n_layer * n_head_kv` goes to the heads in proportion to

    - `sparsemm`: their score;
    - `uniform`: nothing, all alike (SnapKV, arXiv 2404.14469);
    - `pyramid`: a ramp over the layers, the first layer most, the last only the floor (PyramidKV,
      arXiv 2406.02069);
    - `random`: a random score drawn from `seed`.

    `full` evicts nothing: every head budget is `FULL`, whatever the other arguments.

    Args:
        policy: one of POLICIES.
        grouped_scores: [n_layer, n_head_kv], not negative, any scale; only `sparsemm` reads it.
        n_layer, n_head_kv: the model's layers, and KV heads per layer.
        budget: B, the mean of the head budgets, in positions.
        window: w, the observation window, in positions; 1 <= w < B, at most MAX_WINDOW.
        floor_ratio: rho, the share of B less window and slot that every head gets, 0 to 1.
        residual: whether one place of a head that evicts is the residual slot, which stands for what it lost.
        water_fill: a head cannot keep more positions than the prompt has. True gives what it cannot use to
            the other heads, in proportion to their score, until the budget is spent. False is the paper:
            the surplus stays unused.
        n_prompt: the prompt's length in positions that water-filling is for; None sets no limit. A prompt
            of at most B positions is kept whole by a head budget of B each.
        seed: of policy `random`.

    Returns:
        [n_layer, n_head_kv], summing to exactly `budget * n_layer * n_head_kv` (except `full`). No head is
        below `window`, or `window + 1` with a residual slot; with water-filling none is above
        `max(n_prompt, budget)`.

    Raises:
        SparseMMError: an argument outside its range, or scores that do not have the shape.
    """
    shape = (n_layer, n_head_kv)
    if policy == "full":
        return np.full(shape, FULL, dtype=np.uint32)
    if not 1 <= window <= MAX_WINDOW:
        raise SparseMMError(f"the window is {window}: it must hold 1 to {MAX_WINDOW} positions")
    if budget <= window:
        raise SparseMMError(f"the budget ({budget}) must be larger than the window ({window}) it includes")
    if budget > FULL:
        raise SparseMMError(f"the budget is {budget}: it must be at most {FULL}")
    if not 0 <= floor_ratio <= 1:
        raise SparseMMError(f"the floor ratio is {floor_ratio}: it must be between 0 and 1")
    if n_prompt is not None and not 1 <= n_prompt <= FULL:
        raise SparseMMError(f"the prompt length is {n_prompt}: it must be 1 to {FULL}")
    if not 0 <= seed < 2**32:
        raise SparseMMError(f"the seed is {seed}: it must be 0 to {2**32 - 1}")

    least = window + residual
    shares = _shares(policy, grouped_scores, shape, seed).ravel()
    limit: float = np.inf
    if water_fill and n_prompt is not None:
        if n_prompt <= budget:
            return np.full(shape, budget, dtype=np.uint32)
        limit = n_prompt - least

    base = budget - least
    total = base * shares.size
    floor = int(base * floor_ratio)
    caps = _fill(shares, total=total, floor=floor, limit=limit)
    table = _round_to_sum(caps, total) + least
    if table.max() > FULL:
        raise SparseMMError(f"a budget of {budget} gives one head {table.max()} positions, more than {FULL}")
    return table.reshape(shape).astype(np.uint32)


def check_vote(vote: str) -> None:
    """Raise SparseMMError unless this is one of VOTES."""
    if vote not in VOTES:
        raise SparseMMError(f"unknown vote {vote!r}: expected one of {', '.join(VOTES)}")


def window_for(budget: int, window: int = defaults.WINDOW) -> int:
    """The observation window for a budget, in positions: `window`, but at most a quarter of the budget."""
    return max(1, min(window, budget // defaults.WINDOW_SHARE))


def _shares(
    policy: str, grouped_scores: npt.NDArray[np.float64] | None, shape: tuple[int, int], seed: int
) -> npt.NDArray[np.float64]:
    """What the policy shares the budget out by: [n_layer, n_head_kv], not negative, not all zero."""
    n_layer = shape[0]
    if policy == "uniform":
        return np.ones(shape)
    if policy == "pyramid":
        ramp = np.arange(n_layer - 1, -1, -1, dtype=np.float64) if n_layer > 1 else np.ones(1)
        return np.broadcast_to(ramp[:, None], shape)
    if policy == "random":
        return np.random.default_rng(seed).random(shape)
    if policy != "sparsemm":
        raise SparseMMError(f"unknown policy {policy!r}: expected one of {', '.join(POLICIES)}")
    if grouped_scores is None:
        raise SparseMMError(f"policy {policy} needs head scores")
    if grouped_scores.shape != shape:
        raise SparseMMError(
            f"head scores of shape {grouped_scores.shape} for a model of {shape} layers x KV heads"
        )
    if not np.isfinite(grouped_scores).all() or (grouped_scores < 0).any() or not grouped_scores.any():
        raise SparseMMError("head scores must be finite, not negative and not all zero")
    return grouped_scores.astype(np.float64)


def _fill(
    shares: npt.NDArray[np.float64], *, total: int, floor: int, limit: float
) -> npt.NDArray[np.float64]:
    """Real-valued caps `floor + share * x`, at most `limit`, with x such that they sum to `total`.

    Needs `floor <= total / n <= limit`. Each round shares out among the heads below the limit what the
    others leave; as x only grows, a head at the limit stays there, so at most n rounds are needed.
    """
    caps = np.full(shares.size, float(limit))
    free = np.ones(shares.size, dtype=bool)
    while free.any():
        weights = shares[free] if shares[free].any() else np.ones(int(free.sum()))
        pool = total - caps[~free].sum() - floor * free.sum()
        caps[free] = floor + pool * (weights / weights.sum())
        over = free & (caps > limit)
        if not over.any():
            break
        caps[over] = limit
        free &= ~over
    return caps


def _round_to_sum(caps: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers that sum to `total`: rounded down, the largest remainders rounded up instead.

    Which is `round(cap)` for every head, but for those whose rounding would miss the total.
    """
    whole = np.floor(caps).astype(np.int64)
    largest_remainders = np.argsort(whole - caps, kind="stable")[: total - int(whole.sum())]
    whole[largest_remainders] += 1
    return whole
