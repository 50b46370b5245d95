"""The table of head budgets for a prompt: the file's own, or a new one from the options."""

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
        enabled: False keeps the full cache.
        policy, budget, window, vote, residual: as in BudgetSpec; policy `full` keeps the full cache too.
        scores: a head scores file to use instead of the scores in the model file.
        max_tail: most generated positions per head, oldest dropped first; None: no limit.
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
    """Eviction parameters of a context.

    Attributes:
        head_budgets: [n_layer, n_head_kv] positions that a KV head keeps, window included.
        window, pool_kernel, vote, residual: as in BudgetSpec.
        max_tail: most generated positions per head; None: no limit.
    """

    head_budgets: npt.NDArray[np.uint32]
    window: int
    pool_kernel: int
    max_tail: int | None = None
    vote: str = "snapkv"
    residual: bool = False

    @classmethod
    def of(cls, spec: BudgetSpec, head_budgets: npt.NDArray[np.uint32]) -> "HeadBudgetTable":
        """Head budgets with the window, pooling, vote and residual slot of a spec."""
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
        return group_scores(given.scores, shape.n_head_kv)
    return None if metadata is None else group_scores(metadata.head_scores, shape.n_head_kv)


def check_scores(spec: BudgetSpec, scores: npt.NDArray[np.float64] | None, model: Path) -> None:
    """Raise SparseMMError if a spec needs head scores of a model that has none."""
    if scores is None and spec.policy == "sparsemm":
        raise SparseMMError(
            f"{model} holds no head scores: convert it first (sparsemm-edge convert), or give --scores"
        )


def same_budgets(a: HeadBudgetTable | None, b: HeadBudgetTable | None) -> bool:
    """Whether two tables evict prompts in the same way; max_tail does not matter."""
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
    """The head budgets for a prompt of n_prompt positions; None keeps the full cache.

    Without options, a file's table that was not water-filled is used as it is. Otherwise a new table is
    made from the head scores, water-filled for this prompt length.

    Args:
        wanted: the options.
        metadata: of the model file; None if it was not converted.
        shape: the model's shape.
        n_prompt: length of the prompt in positions.
        model: the model file, for error messages.
        n_later: the length that the sequence can reach, if more prompts follow. Used instead of n_prompt if
            the first prompt fits into the budget, where all heads would get the same.

    Raises:
        SparseMMError: missing head scores, scores that do not fit the model, an invalid budget, or a max_tail
            below the window.
    """
    table = _plan(wanted, metadata, shape, n_prompt, model, n_later)
    if wanted.max_tail is None:
        return table
    if table is None:
        raise SparseMMError("--kv-max-tail needs a cache that evicts")
    if wanted.max_tail < table.window:
        raise SparseMMError(
            f"--kv-max-tail is {wanted.max_tail}: it must be at least the observation window, {table.window}"
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
    if replace(wanted, max_tail=None) == Eviction():  # no options
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
