"""Print the computed table of docs/models.md: K and V of each shape, full and evicted, as `fit` counts.

python scripts/models_table.py
"""

from __future__ import annotations

from pathlib import Path

from sparsemm_edge.gguf_header import read_header
from sparsemm_edge.gguf_metadata import ModelShape
from sparsemm_edge.profiling.shapes import SHAPES, header_of_shape, scores_file
from sparsemm_edge.runtime.estimate import Estimate
from sparsemm_edge.runtime.eviction import Eviction, plan
from sparsemm_edge.runtime.session import N_UBATCH

N_PAGE, N_REPLY, BUDGET = 2944, 64, 256  # positions; of ten pages, ten times the prompt and the budget


def bytes_of(estimate: Estimate, shape: ModelShape, n_pages: int) -> tuple[int, int, int]:
    """Bytes of K and V after so many pages and a reply: full cache, evicted, and evicted at the peak."""
    n_prompt = n_pages * N_PAGE
    n_ctx = n_prompt + N_REPLY
    with scores_file(shape, None, None) as (scores, _):
        table = plan(
            Eviction(budget=n_pages * BUDGET, scores=scores),
            None,
            shape,
            n_prompt,
            Path(f"{shape.name}.gguf"),
        )
    assert table is not None
    full, evicted = (
        estimate.context_sizes(
            n_prompt=n_prompt, n_predict=N_REPLY, n_ctx=n_ctx, n_ubatch=N_UBATCH, table=evicts_by
        )
        for evicts_by in (None, table)
    )
    return full.kv, evicted.kv, evicted.kv_peak


def memory_table() -> str:
    """The table in Markdown, in MiB but for the bytes of a token."""
    lines = [
        "| shape | layers x KV heads | K and V of a token | 1 page: full | evicted | at the peak"
        " | 10 pages: full | evicted | at the peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, text in SHAPES.items():
        shape = text.model_shape(name)
        token = shape.kv_bytes(shape.n_layer * shape.n_head_kv) / 2**10
        with header_of_shape(name, text) as path, Estimate(read_header(path), None) as estimate:
            amounts = [f"{n / 2**20:,.0f}" for pages in (1, 10) for n in bytes_of(estimate, shape, pages)]
        heads = f"{shape.n_layer} x {shape.n_head_kv}"
        lines.append(" | ".join([f"| {name}", heads, f"{token:.0f} KiB", *amounts]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table())
