"""Print the computed tables of docs/models.md: K and V of each shape, full and evicted, as `fit` counts.

python scripts/models_table.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsemm_edge.gguf_metadata import ModelShape
from sparsemm_edge.profiling.shapes import SHAPES, header_of_shape, scores_file
from sparsemm_edge.runtime.context import N_UBATCH
from sparsemm_edge.runtime.estimate import Estimate
from sparsemm_edge.runtime.eviction import Eviction, plan

N_REPLY = 64
PAGES = ((2944, 256), (29440, 2560))  # prompt and mean budget of a page and of ten, in positions
LENGTHS = ((4096, 256), (16384, 1024), (65536, 4096))


def bytes_of(estimate: Estimate, shape: ModelShape, n_prompt: int, budget: int) -> tuple[int, int, int]:
    """Bytes of K and V after a prompt and a reply: full cache, evicted, and evicted at the peak."""
    n_ctx = n_prompt + N_REPLY
    with scores_file(shape, None, None) as (scores, _):
        wanted = Eviction(budget=budget, scores=scores)
        table = plan(wanted, None, shape, n_prompt, Path(f"{shape.name}.gguf"))
    assert table is not None
    # not llama.cpp's own cache, in which Gemma's windows are as long as the context by default
    everything = replace(table, head_budgets=np.full_like(table.head_budgets, n_ctx))
    full, evicted = (
        estimate.context_sizes(
            n_prompt=n_prompt, n_predict=N_REPLY, n_ctx=n_ctx, n_ubatch=N_UBATCH, table=evicts_by
        )
        for evicts_by in (everything, table)
    )
    return full.kv, evicted.kv, evicted.kv_peak


def table(names: list[str], prompts: Sequence[tuple[int, int]]) -> str:
    """K and V of these shapes in Markdown, in MiB but for the bytes of a token."""
    heading = ["shape", "layers x KV heads", "K and V of a token"]
    heading += [f"{n_prompt}: full | evicted to {budget} | at the peak" for n_prompt, budget in prompts]
    lines = [f"| {' | '.join(heading)} |", "| --- " * (3 + 3 * len(prompts)) + "|"]
    for name in names:
        shape = SHAPES[name].model_shape(name)
        token = shape.kv_bytes(shape.n_layer * shape.n_head_kv) / 2**10
        with header_of_shape(name, SHAPES[name]) as path, Estimate(path) as estimate:
            amounts = [bytes_of(estimate, shape, n_prompt, budget) for n_prompt, budget in prompts]
        cells = [name, f"{shape.n_layer} x {shape.n_head_kv}", f"{token:.0f} KiB"]
        cells += [f"{n / 2**20:,.0f}" for each in amounts for n in each]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> tuple[str, str]:
    """Of models all of whose layers evict, and of those that have other layers besides."""
    whole = [name for name, shape in SHAPES.items() if shape.full_every == 1]
    return table(whole, PAGES), table([name for name in SHAPES if name not in whole], LENGTHS)


if __name__ == "__main__":
    print(*tables(), sep="\n\n")
