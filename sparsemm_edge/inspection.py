"""Statistics of a converted GGUF file."""

from typing import Any

import numpy as np

from sparsemm_edge.budgets import POLICIES
from sparsemm_edge.gguf_metadata import ModelShape, SparseMMMetadata
from sparsemm_edge.scores import group_scores

PROMPT_LENGTHS = (640, 2944, 8192)
"""Prompts to state KV bytes for: one image in LLaVA-1.5, one in LLaVA-NeXT, several."""

_SETTINGS = ("policy", "budget", "window", "floor_ratio", "pool_kernel", "vote", "residual")


def to_dict(shape: ModelShape, metadata: SparseMMMetadata) -> dict[str, Any]:
    """Shape, settings and statistics of the table of head budgets (positions), ready for JSON.

    `heads_at_floor` is the share of KV heads, 0 to 1, that got no more than the floor and the window.
    """
    table, spec = metadata.head_budgets, metadata.spec
    return {
        "architecture": shape.arch,
        **{name: getattr(shape, name) for name in ("name", "n_layer", "n_head", "n_head_kv")},
        "enabled": metadata.enabled,
        **{name: getattr(spec, name) for name in _SETTINGS},
        "water_fill_length": metadata.water_fill_length,
        "head_budgets": {
            "min": int(table.min()),
            "median": float(np.median(table)),
            "mean": float(table.mean()),
            "max": int(table.max()),
            "heads_at_floor": float((table <= spec.least + spec.floor).mean()),
        },
        "scores_source": metadata.scores_source,
    }


def kv_bytes(shape: ModelShape, metadata: SparseMMMetadata) -> dict[str, dict[int, int]]:
    """Bytes of K and V (f16) kept after prompts of PROMPT_LENGTHS positions: `{row: {prompt length: bytes}}`.

    Row `as stored` is the file's own table, what any llama.cpp with the patch keeps. The rows named after
    policies share the file's budget out again, water-filled for each length if the file's table is.
    """
    grouped = group_scores(metadata.head_scores, shape.n_head_kv)

    def kept(row: str, n_prompt: int) -> int:
        table = metadata.head_budgets
        if row != "as stored":
            table = metadata.spec.override(policy=row).table(grouped, shape.kv_heads, n_prompt)
        return shape.kv_bytes(int(np.minimum(table, n_prompt).sum(dtype=np.int64)))

    return {row: {n: kept(row, n) for n in PROMPT_LENGTHS} for row in ("as stored", *POLICIES)}
