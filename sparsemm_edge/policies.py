"""Budget policies: the weights by which KV heads share the budget. One function a policy.

A new policy is a function here with its name in POLICIES; `convert`, `generate`, `eval` and `inspect` then
take that name.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sparsemm_edge.errors import SparseMMError

Weights = npt.NDArray[np.float64]
Policy = Callable[[Weights | None, tuple[int, int], int], Weights | None]
"""`policy(scores, shape, seed)` returns weights of shape [n_layer, n_head_kv], not negative; only their
ratios matter. None evicts nothing.

    scores: head scores summed over each GQA group, [n_layer, n_head_kv]; None if there are none.
    shape: n_layer, n_head_kv.
    seed: for policies that draw random numbers.
"""


def sparsemm(scores: Weights | None, shape: tuple[int, int], seed: int) -> Weights:
    """The head scores (SparseMM, arXiv 2506.05344)."""
    if scores is None:
        raise SparseMMError("policy sparsemm needs head scores")
    if scores.shape != shape:
        raise SparseMMError(f"head scores of shape {scores.shape} for a model of {shape} layers x KV heads")
    if not np.isfinite(scores).all() or (scores < 0).any() or not scores.any():
        raise SparseMMError("head scores must be finite, not negative and not all zero")
    return scores.astype(np.float64)


def uniform(scores: Weights | None, shape: tuple[int, int], seed: int) -> Weights:
    """All heads alike (SnapKV, arXiv 2404.14469)."""
    return np.ones(shape)


def pyramid(scores: Weights | None, shape: tuple[int, int], seed: int) -> Weights:
    """Falls linearly over the layers to 0 in the last one (PyramidKV, arXiv 2406.02069)."""
    n_layer = shape[0]
    ramp = np.arange(n_layer - 1, -1, -1, dtype=np.float64) if n_layer > 1 else np.ones(1)
    return np.broadcast_to(ramp[:, None], shape)


def random(scores: Weights | None, shape: tuple[int, int], seed: int) -> Weights:
    """Random numbers, as a baseline."""
    return np.random.default_rng(seed).random(shape)


def full(scores: Weights | None, shape: tuple[int, int], seed: int) -> None:
    """The full cache."""
    return None


POLICIES: dict[str, Policy] = {
    "sparsemm": sparsemm,
    "uniform": uniform,
    "pyramid": pyramid,
    "random": random,
    "full": full,
}
