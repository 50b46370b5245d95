"""Which table of head budgets a prompt gets: the file's, or one shared out anew for this prompt."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsemm_edge.budgets import BudgetSpec
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_metadata import ModelShape, SparseMMMetadata
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

    def spec(self, metadata: SparseMMMetadata | None) -> BudgetSpec:
        """The GGUF's spec, or the defaults if it holds none, with these options."""
        base = BudgetSpec() if metadata is None else metadata.spec
        return base.override(
            policy=self.policy,
            budget=self.budget,
            window=self.window,
            vote=self.vote,
            residual=self.residual,
        )


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

    @classmethod
    def of(cls, spec: BudgetSpec, head_budgets: npt.NDArray[np.uint32]) -> "HeadBudgetTable":
        """Head budgets, and the rest as the spec says."""
        return cls(head_budgets, spec.window, spec.pool_kernel, vote=spec.vote, residual=spec.residual)


def model_scores(
    path: Path | None, metadata: SparseMMMetadata | None, shape: ModelShape
) -> npt.NDArray[np.float64] | None:
    """Head scores summed over each GQA group, [n_layer, n_head_kv]: of a file, or else the GGUF's own.

    None if there are neither.

    Raises:
        SparseMMError: a file that cannot be read or does not fit the model.
    """
    if path is not None:
        given = HeadScores.load(path)
        given.check_fits(shape.n_layer, shape.n_head, shape.n_head_kv)
        return given.grouped(shape.n_head_kv)
    return None if metadata is None else group_scores(metadata.head_scores, shape.n_head_kv)


def check_scores(spec: BudgetSpec, scores: npt.NDArray[np.float64] | None, model: Path) -> None:
    """Raise SparseMMError if a spec needs head scores of a model that has none."""
    if scores is None and spec.policy == "sparsemm":
        raise SparseMMError(
            f"{model} holds no head scores: convert it first (sparsemm-edge convert), or give --scores"
        )


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
        if not metadata.spec.water_fill:
            return HeadBudgetTable.of(metadata.spec, metadata.head_budgets)

    spec = wanted.spec(metadata).override(water_fill=True)
    scores = model_scores(wanted.scores, metadata, shape)
    check_scores(spec, scores, model)
    if n_later is not None and n_prompt <= spec.budget:
        n_prompt = max(n_prompt, n_later)
    return HeadBudgetTable.of(spec, spec.table(scores, shape.kv_heads, n_prompt))
