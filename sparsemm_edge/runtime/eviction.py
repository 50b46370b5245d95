"""Which table of head budgets a prompt gets: the file's, or one shared out anew for this prompt."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsemm_edge import defaults
from sparsemm_edge.budgets import head_budgets
from sparsemm_edge.errors import SparseMMError
from sparsemm_edge.gguf_metadata import POOL_KERNEL, ModelShape, SparseMMMetadata
from sparsemm_edge.scores import HeadScores, group_scores


@dataclass(frozen=True)
class Eviction:
    """What a generation wants of eviction. What is None is as the converted file says.

    Attributes:
        enabled: False keeps the whole cache.
        policy: sparsemm, uniform, pyramid, random, or full (which keeps the whole cache too).
        budget: mean head budget in positions, window included.
        window: observation window in positions.
        scores: a head scores file to use instead of the scores in the model file.
    """

    enabled: bool = True
    policy: str | None = None
    budget: int | None = None
    window: int | None = None
    scores: Path | None = None


@dataclass(frozen=True)
class HeadBudgetTable:
    """Attributes:
    head_budgets: [n_layer, n_head_kv] positions that a KV head keeps, window included.
    window: observation window in positions.
    pool_kernel: width of the max pooling of the votes, in positions.
    """

    head_budgets: npt.NDArray[np.uint32]
    window: int
    pool_kernel: int


def plan(
    wanted: Eviction, metadata: SparseMMMetadata | None, shape: ModelShape, n_prompt: int, model: Path
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

    Raises:
        SparseMMError: a policy that needs head scores and there are none, scores that do not fit the model,
            or a budget that the policy refuses.
    """
    wishes = any(wish is not None for wish in (wanted.policy, wanted.budget, wanted.window, wanted.scores))
    if not wanted.enabled or wanted.policy == "full":
        return None
    if not wishes:
        if metadata is None or not metadata.enabled:
            return None
        if not metadata.water_fill_length:
            return HeadBudgetTable(metadata.head_budgets, metadata.window, metadata.pool_kernel)

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
    budget, window = defaults.BUDGET, defaults.WINDOW
    floor_ratio, pool_kernel, seed = defaults.FLOOR_RATIO, POOL_KERNEL, 0
    if metadata is not None:
        budget, window = metadata.budget, metadata.window
        floor_ratio, pool_kernel, seed = metadata.floor_ratio, metadata.pool_kernel, metadata.seed
    budget = budget if wanted.budget is None else wanted.budget
    window = window if wanted.window is None else wanted.window
    table = head_budgets(
        policy,
        scores,
        n_layer=shape.n_layer,
        n_head_kv=shape.n_head_kv,
        budget=budget,
        window=window,
        floor_ratio=floor_ratio,
        n_prompt=n_prompt,
        seed=seed,
    )
    return HeadBudgetTable(table, window, pool_kernel)
