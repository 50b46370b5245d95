"""Contexts of llama.cpp that evict by a table, and what the tests do with them by its C functions."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from sparsemm_edge.budgets import POOL_KERNEL, BudgetSpec
from sparsemm_edge.runtime import VisionModel, library
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import llama

FORTY = np.full((5, 4), 40, np.uint32)  # head budgets of the test model llava: 5 layers x 4 KV heads
_evicts_by: dict[int, HeadBudgetTable | None] = {}  # by llama_model pointer


def evict_by(
    model: VisionModel,
    table: np.ndarray | None,
    window: int = 8,
    max_tail: int = 0,
    vote: str = "snapkv",
    residual: bool = False,
) -> None:
    """What context_of() and raw_context() make from now on evicts by this table; None: keeps everything."""
    wanted = None
    if table is not None:
        wanted = HeadBudgetTable(table, window, POOL_KERNEL, max_tail or None, vote, residual)
    _evicts_by[model.pointer] = wanted


def context_of(model: VisionModel, **options: Any) -> Context:
    return Context(model, _evicts_by[model.pointer], **options)


def raw_context(model: VisionModel, **changes: Any) -> int | None:
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    for name, value in changes.items():
        setattr(params, name, value)
    library.forget_errors()
    heads = library.head_params(_evicts_by[model.pointer])
    found: int | None = llama._lib.llama_init_from_model_heads(model.pointer, params, heads)
    return found


def append(ctx: int, tokens: list[int], first: int, n_asking: int) -> None:
    """Append tokens at position `first` in one batch, of which the last `n_asking` ask for logits."""
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i >= len(tokens) - n_asking
    status = llama.llama_decode(ctx, batch)
    llama.llama_batch_free(batch)
    assert status == 0


def decode(ctx: int, tokens: list[int], first: int) -> np.ndarray:
    """Append tokens at position `first`; the logits after the last one."""
    append(ctx, tokens, first, n_asking=1)
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(ctx, -1), (300,)).copy()


def aborted(ctx: int, tokens: list[int], first: int, after: int) -> bool:
    """Whether appending `tokens` failed when it was to be aborted after so many nodes of the graph."""
    left = after

    @llama.ggml_abort_callback
    def abort(_: Any) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    llama.llama_set_abort_callback(ctx, abort, None)
    try:
        decode(ctx, tokens, first)
    except AssertionError:
        return True
    finally:
        llama.llama_set_abort_callback(ctx, llama.ggml_abort_callback(), None)
    return False


def saved(ctx: int, whole: bool) -> bytes:
    size = llama.llama_state_get_size(ctx) if whole else llama.llama_state_seq_get_size(ctx, 0)
    data = (ctypes.c_uint8 * size)()
    if whole:
        assert llama.llama_state_get_data(ctx, data, size) == size
    else:
        assert llama.llama_state_seq_get_data(ctx, data, size, 0) == size
    return bytes(data)


def restored(ctx: int, state: bytes, whole: bool) -> bool:
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    if whole:
        return bool(llama.llama_state_set_data(ctx, data, len(state)) == len(state))
    return bool(llama.llama_state_seq_set_data(ctx, data, len(state), 0) == len(state))


def slots_of(context: Context) -> list[list[Any]]:
    """slots[layer][head]: number of positions, K and V of each KV head's residual slot; None without one."""
    memory, shape = llama.llama_get_memory(context.pointer), context._model.shape

    def slot(il: int, ih: int) -> tuple[int, np.ndarray, np.ndarray] | None:
        n = library.heads_n_lost(memory, il, ih)
        k, v = np.empty(shape.n_embd_head_k, np.float32), np.empty(shape.n_embd_head_v, np.float32)
        pointers = (each.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for each in (k, v))
        if n:
            llama._lib.llama_memory_heads_residual(memory, il, ih, *pointers)
        return (n, k, v) if n else None

    return [[slot(il, ih) for ih in range(shape.n_head_kv)] for il in range(shape.n_layer)]


def random_table(
    model: VisionModel, budget: int, window: int, n_prompt: int, seed: int = 0, residual: bool = False
) -> np.ndarray:
    """Head budgets that differ widely, `budget` on average."""
    spec = BudgetSpec("random", budget, window, residual=residual, seed=seed)
    return spec.table(None, model.shape.kv_heads, n_prompt)
