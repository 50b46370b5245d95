"""Print the computed table of docs/models.md: K and V of each shape, full and evicted, as `fit` counts.

python scripts/models_table.py
"""

from __future__ import annotations

from pathlib import Path

from sparsemm_edge.gguf_metadata import ModelShape
from sparsemm_edge.kv_layout import evicting_cache, full_cache
from sparsemm_edge.profiling.shapes import SHAPES, scores_file
from sparsemm_edge.runtime.eviction import Eviction, plan

N_PAGE, N_REPLY, BUDGET = 2944, 64, 256  # positions; of ten pages, ten times the prompt and the budget


def bytes_of(shape: ModelShape, n_pages: int) -> tuple[int, int, int]:
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
    evicted = evicting_cache(shape, table.head_budgets, n_prompt=n_prompt, n_reply=N_REPLY, n_ctx=n_ctx)
    return full_cache(shape, n_ctx).now, evicted.now, evicted.peak


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
        amounts = [f"{n / 2**20:,.0f}" for pages in (1, 10) for n in bytes_of(shape, pages)]
        heads = f"{shape.n_layer} x {shape.n_head_kv}"
        lines.append(" | ".join([f"| {name}", heads, f"{token:.0f} KiB", *amounts]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table())
