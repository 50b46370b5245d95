"""Which table of head budgets a prompt gets: the file's, or one shared out anew for this prompt."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsemm_edge import defaults
from sparsemm_edge.budgets import check_vote, head_budgets, window_for
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_metadata import POOL_KERNEL, ModelShape, SparseMMMetadata
from sparsemm_edge.scores import HeadScores, group_scores


@dataclass(frozen=True)
class Eviction:
    """Eviction options; None uses the GGUF's value.

    Attributes:
        enabled: False keeps the whole cache.
        policy: sparsemm, uniform, pyramid, random, or full (which keeps the whole cache too).
        budget: mean head budget in positions, window included.
        window: observation window in positions.
        scores: a head scores file to use instead of the scores in the model file.
        max_tail: most generated positions that a head holds, the oldest go first; None: all of them.
        vote: how the positions of a head are ranked, one of budgets.VOTES.
        residual: whether one place of a head that evicts stands for all that it lost.
    """

    enabled: bool = True
    policy: str | None = None
    budget: int | None = None
    window: int | None = None
    scores: Path | None = None
    max_tail: int | None = None
    vote: str | None = None
    residual: bool | None = None


@dataclass(frozen=True, eq=False)
class HeadBudgetTable:
    """What a context evicts by.

    Attributes:
        head_budgets: [n_layer, n_head_kv] positions that a KV head keeps, window included.
        window: observation window in positions.
        pool_kernel: width of the max pooling of the votes, in positions.
        max_tail: most generated positions that a head holds; None: all of them.
        vote: how the positions of a head are ranked, one of budgets.VOTES.
        residual: whether one place of a head that evicts stands for all that it lost.
    """

    head_budgets: npt.NDArray[np.uint32]
    window: int
    pool_kernel: int
    max_tail: int | None = None
    vote: str = "snapkv"
    residual: bool = False


def budget_and_window(wanted: Eviction, metadata: SparseMMMetadata | None) -> tuple[int, int]:
    """The mean head budget and the observation window, in positions.

    A window that nobody asked for shrinks with another budget than the file's, see budgets.window_for.
    """
    budget, window = defaults.BUDGET, defaults.WINDOW
    if metadata is not None:
        budget, window = metadata.budget, metadata.window
    if wanted.budget is not None and wanted.budget != budget:
        budget = wanted.budget
        window = window_for(budget, window)
    return budget, window if wanted.window is None else wanted.window


def same_budgets(a: HeadBudgetTable | None, b: HeadBudgetTable | None) -> bool:
    """Whether two contexts evict prompts alike, whatever their max_tail."""
    if a is None or b is None:
        return a is b
    same_votes = (a.window, a.pool_kernel, a.vote) == (b.window, b.pool_kernel, b.vote)
    return same_votes and a.residual == b.residual and np.array_equal(a.head_budgets, b.head_budgets)


def plan(
    wanted: Eviction,
    metadata: SparseMMMetadata | None,
    shape: ModelShape,
    n_prompt: int,
    model: Path,
    n_later: int | None = None,
) -> HeadBudgetTable | None:
    """The head budgets for a prompt of n_prompt positions; None keeps the whole cache.

    Without wishes the file's table is used as it is if it was not water-filled. If it was, that was for
    another prompt length: the budget is shared out again from the head scores in the file, water-filled for
    this one. Wishes share it out again as well, and always water-filled.

    Args:
        wanted: the wishes.
        metadata: what the model file holds, None if it was never converted.
        shape: the model's shape.
        n_prompt: length of the prompt in positions.
        model: the model file, for error messages.
        n_later: the length that the sequence can get, if more prompts follow. A first prompt that fits into
            the budget would give all heads the same: the budget is then shared out for this length.

    Raises:
        SparseMMError: a policy that needs head scores and there are none, scores that do not fit the model,
            a budget that the policy refuses, or a bound of generated positions that cannot be kept.
    """
    table = _plan(wanted, metadata, shape, n_prompt, model, n_later)
    if wanted.max_tail is None:
        return table
    if table is None:
        raise SparseMMError("only a cache that evicts drops generated positions: no --kv-max-tail without it")
    if wanted.max_tail < table.window:
        raise SparseMMError(
            f"at most {wanted.max_tail} generated positions are to be held: it must be at least the"
            f" observation window, {table.window}"
        )
    return replace(table, max_tail=wanted.max_tail)


def _plan(
    wanted: Eviction,
    metadata: SparseMMMetadata | None,
    shape: ModelShape,
    n_prompt: int,
    model: Path,
    n_later: int | None,
) -> HeadBudgetTable | None:
    """plan() without max_tail."""
    if not wanted.enabled or wanted.policy == "full":
        return None
    if replace(wanted, max_tail=None) == Eviction():  # no wishes
        if metadata is None or not metadata.enabled:
            return None
        if not metadata.water_fill_length:
            return HeadBudgetTable(
                metadata.head_budgets,
                metadata.window,
                metadata.pool_kernel,
                vote=metadata.vote,
                residual=metadata.residual,
            )

    policy = wanted.policy or (metadata.policy if metadata is not None else "sparsemm")
    scores = None
    if wanted.scores is not None:
        given = HeadScores.load(wanted.scores)
        given.check_fits(shape.n_layer, shape.n_head, shape.n_head_kv)
        scores = given.grouped(shape.n_head_kv)
    elif metadata is not None:
        scores = group_scores(metadata.head_scores.astype(np.float64), shape.n_head_kv)
    elif policy == "sparsemm":
        raise SparseMMError(
            f"{model} holds no head scores: convert it first (sparsemm-edge convert), or give --scores"
        )
    budget, window = budget_and_window(wanted, metadata)
    floor_ratio, pool_kernel, seed = defaults.FLOOR_RATIO, POOL_KERNEL, 0
    vote, residual = defaults.VOTE, defaults.RESIDUAL
    if metadata is not None:
        floor_ratio, pool_kernel, seed = metadata.floor_ratio, metadata.pool_kernel, metadata.seed
        vote, residual = metadata.vote, metadata.residual
    vote = vote if wanted.vote is None else wanted.vote
    residual = residual if wanted.residual is None else wanted.residual
    check_vote(vote)
    if n_later is not None and n_prompt <= budget:
        n_prompt = max(n_prompt, n_later)
    table = head_budgets(
        policy,
        scores,
        n_layer=shape.n_layer,
        n_head_kv=shape.n_head_kv,
        budget=budget,
        window=window,
        floor_ratio=floor_ratio,
        residual=residual,
        n_prompt=n_prompt,
        seed=seed,
    )
    return HeadBudgetTable(table, window, pool_kernel, vote=vote, residual=residual)
